"""Kullback-Leibler divergences between Gaussians: the regularisers of latent variables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_normal, draw_uniform
from .._core.checks import (
    check_array,
    check_float,
    check_min_rank,
    check_same_shape,
    check_shape,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.numerics import expm1_excess, numbers, safe_mul, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["gaussian_kl", "multivariate_gaussian_kl"]


@compiled()
def gaussian_kl(
    mean: Float[Array, "*batch latents"],
    log_variance: Float[Array, "*batch latents"],
    *,
    prior_mean: Number | Shaped[Array, "*batch latents"] = 0.0,
    prior_log_variance: Number | Shaped[Array, "*batch latents"] = 0.0,
    free_bits: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Divergence of a diagonal Gaussian from a prior, in nats, from 0 up; summed over latents.

    $$ \ell = \frac{1}{2} \sum_d \log \frac{\sigma_0^2}{\sigma_d^2} - 1
       + \frac{\sigma_d^2 + (\mu_d - \mu_0)^2}{\sigma_0^2} $$

    This is the regulariser of a variational autoencoder. Latents are summed, not averaged: only
    then are reconstruction and divergence in the same unit.

    Args:
        mean: Mean of the posterior, latents last.
        log_variance: Logarithm of its variances, same shape; the variance overflows from 88 on.
        prior_mean: Mean of the prior, a number or an array of the shape of `mean`.
        prior_log_variance: Logarithm of its variances, likewise.
        free_bits: Each latent of each sample costs at least this, in nats; below it has no
            gradient.

    One unit per sample (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014. Free bits: Kingma et al.,
        Improved Variational Inference with Inverse Autoregressive Flow, NIPS 2016, who floor the
        mean over the batch. Equals torch's `kl_divergence` of two independent `Normal`.

    >>> gaussian_kl(jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)))  # (1 + 4) / 2
    Array(2.5, dtype=float32)
    """
    check_float(mean=mean, log_variance=log_variance)
    check_min_rank(1, mean=mean)
    check_same_shape(mean=mean, log_variance=log_variance)
    mean, log_variance = mask(where, *widen(mean, log_variance))
    (floor,) = numbers(mean, free_bits=free_bits)
    prior_mean = _prior("prior_mean", prior_mean, mean, where)
    prior_log_variance = _prior("prior_log_variance", prior_log_variance, mean, where)
    gap = safe_mul(mean - prior_mean, jnp.exp(-0.5 * prior_log_variance) + 0 * mean)
    costs = 0.5 * (expm1_excess(log_variance - prior_log_variance) + jnp.square(gap))
    values = jnp.sum(jnp.where(costs < floor, floor, costs), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def multivariate_gaussian_kl(
    mean: Float[Array, "*batch latents"],
    scale_tril: Float[Array, "*batch latents latents"],
    *,
    prior_mean: Shaped[Array, "*batch latents"] | None = None,
    prior_scale_tril: Shaped[Array, "*batch latents latents"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Divergence of a Gaussian of full covariance from a prior, in nats, from 0 up.

    $$ \ell = \frac{1}{2} \Big( \|W\|_F^2 - D - 2 \sum_d \log W_{dd}
       + |L_0^{-1} (\mu - \mu_0)|^2 \Big), \quad W = L_0^{-1} L $$

    for covariances $L L^\top$ and $L_0 L_0^\top$. Only the lower triangles are read.

    Args:
        mean: Mean of the posterior, latents last.
        scale_tril: Its triangular factor $L$, with a positive diagonal.
        prior_mean: Mean of the prior, of the shape of `mean`; 0 if None.
        prior_scale_tril: Its factor, of the shape of `scale_tril`; the identity if None.

    One unit per sample (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Kullback, Information Theory and Statistics, 1959. Equals torch's `kl_divergence` of two
        `MultivariateNormal`.

    >>> multivariate_gaussian_kl(jnp.array([[1.0, 2.0]]), jnp.eye(2)[None])  # (1 + 4) / 2
    Array(2.5, dtype=float32)
    """
    check_float(mean=mean, scale_tril=scale_tril)
    check_min_rank(1, mean=mean)
    shape = (*mean.shape, mean.shape[-1])
    check_shape(shape, scale_tril=scale_tril)
    mean, scale_tril = mask(where, *widen(mean, scale_tril))
    if where is not None:
        scale_tril = _identity_where_hidden(where, scale_tril)
    if prior_mean is not None:
        check_shape(mean.shape, prior_mean=prior_mean)
        mean = mean - mask(where, *widen(prior_mean))[0].astype(mean.dtype)
    scale_tril = _lower(scale_tril)
    require(lambda: _diagonal(scale_tril) > 0, "scale_tril", "a positive diagonal", where)
    if prior_scale_tril is not None:
        check_shape(shape, prior_scale_tril=prior_scale_tril)
        (prior,) = mask(where, *widen(prior_scale_tril))
        prior = prior if where is None else _identity_where_hidden(where, prior)
        both = jnp.concatenate([scale_tril, mean[..., None]], axis=-1)
        prior = _lower(prior).astype(mean.dtype)
        both = jax.scipy.linalg.solve_triangular(prior, both, lower=True)
        scale_tril, mean = both[..., :-1], both[..., -1]
    sizes = _diagonal(scale_tril)
    below = jnp.sum(jnp.square(_lower(scale_tril, -1)), axis=(-1, -2))
    volume = jnp.sum(expm1_excess(2 * jnp.log(sizes)), axis=-1)
    values = 0.5 * (below + volume + jnp.sum(jnp.square(mean), axis=-1))
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _prior(name: str, prior: Number | Array, mean: Array, where: Where | None) -> Array:
    check_array(**{name: prior})
    if jnp.shape(prior) not in ((), mean.shape):
        expected = f"a scalar or shape {mean.shape}"
        raise ValueError(message(name, expected, f"shape {jnp.shape(prior)}"))
    array = jnp.asarray(prior).astype(mean.dtype)
    return mask(where, array)[0] if array.ndim else array


def _lower(matrix: Array, highest: int = 0) -> Array:
    """`jnp.tril`, with a mask that is sharded as the matrices are, as jax before 0.10 asks for."""
    kept = jnp.tril(jnp.ones(matrix.shape[-2:], matrix.dtype), highest)
    kept = kept.reshape((1,) * (matrix.ndim - 2) + kept.shape) + jnp.zeros_like(matrix)
    return jnp.where(kept > 0, matrix, 0)


def _diagonal(matrix: Array) -> Array:
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def _identity_where_hidden(where: Where, matrix: Array) -> Array:
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    identity = identity.reshape((1,) * (matrix.ndim - 2) + identity.shape)
    return jnp.where(jnp.asarray(where)[..., None, None], matrix, identity)


def _draw_factor(dims: str) -> Draw:
    """Lower triangles with a positive diagonal."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        diagonal = np.eye(shape[-1]) * g.uniform(0.5, 2, shape)
        return np.tril(0.4 * g.standard_normal(shape), -1) + diagonal

    return Draw(dims, sample, "bounded")


_LATENTS = dict(mean=draw_normal("B T D"), log_variance=draw_uniform("B T D", -2, 2))
_PRIOR = dict(prior_mean=0.5, prior_log_variance=-0.4)

CASES = (
    Case(gaussian_kl, _LATENTS),
    Case(gaussian_kl, _LATENTS, dict(_PRIOR, free_bits=0.1), label="prior"),
    Case(
        multivariate_gaussian_kl,
        dict(mean=draw_normal("B V"), scale_tril=_draw_factor("B V V")),
        positions="B",
    ),
)
