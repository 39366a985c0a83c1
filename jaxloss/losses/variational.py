"""Variational autoencoders: evidence lower bounds, balanced KL and vector quantisation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from .._core.case import Case, draw_normal
from .._core.checks import check_array, check_float, check_min_rank, check_same_shape, message
from .._core.compiled import compiled, uncompiled
from .._core.numerics import expm1, numbers, safe_log, widen
from .._core.reduce import mask, reduce
from .._core.terms import Criterion, logged
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "balanced_kl",
    "elbo_loss",
    "importance_weighted_elbo",
    "vq_commitment_loss",
]


@compiled()
def elbo_loss(
    reconstruction_nll: Float[Array, "*batch"],
    kl: Float[Array, "*batch"],
    *,
    beta: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Criterion:
    r"""Negative evidence lower bound, in nats per sample; at `beta=1` at least `-log p(x)`.

    $$ \ell = -\log p(x \mid z) + \beta\, \mathrm{KL}(q(z \mid x) \,\|\, p(z)) $$

    Both terms are sums, over pixels and over latents. Taking the mean over one of them is another
    `beta`: the KL of twice as many latents is twice as large, and has to be.

    Args:
        reconstruction_nll: Negative log-likelihood of each sample under one draw of the latents,
            summed over what it is made of, `(*batch,)`.
        kl: KL divergence of each posterior from its prior, summed over the latents; same shape.
        beta: Weight of the KL; may come from a schedule.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        The total, and its terms `reconstruction` and `kl` before `beta` and without a gradient,
        all reduced alike: float32 scalars, or `*batch` if `reduction` is `"none"`.

    Reference:
        Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014; beta: Higgins et al.,
        beta-VAE, ICLR 2017.

    >>> total, terms = elbo_loss(jnp.array([3.0]), jnp.array([2.0]), beta=0.5)
    >>> total, terms["kl"]
    (Array(4., dtype=float32), Array(2., dtype=float32))
    """
    check_float(reconstruction_nll=reconstruction_nll, kl=kl)
    check_same_shape(reconstruction_nll=reconstruction_nll, kl=kl)
    reconstruction, kl = mask(where, *widen(reconstruction_nll, kl))
    (beta,) = numbers(kl, beta=beta)
    reduced = lambda values: reduce(values, where=where, weights=weights, reduction=reduction)
    terms = dict(reconstruction=reduced(reconstruction), kl=reduced(kl))
    parts = lambda: terms | dict(kl=reduced(beta * kl))
    return reduced(reconstruction + beta * kl), logged(terms, parts)


@uncompiled
def balanced_kl(
    kl_fn: Callable[[PyTree, PyTree], Array],
    posterior: PyTree,
    prior: PyTree,
    *,
    alpha: Number = 0.8,
) -> Array:
    r"""A KL divergence whose gradient moves the prior more than the posterior.

    $$ \alpha\, \mathrm{KL}(\mathrm{sg}(q) \,\|\, p) + (1 - \alpha)\,
       \mathrm{KL}(q \,\|\, \mathrm{sg}(p)) $$

    with $\mathrm{sg}$ for what carries no gradient. The value is that of `kl_fn`.

    Args:
        kl_fn: From posterior and prior to the divergence of each sample. Called as it stands, never
            compiled here.
        posterior: Parameters of the posterior, any pytree that `kl_fn` takes.
        prior: Those of the prior.
        alpha: Share of the gradient that goes to the prior.

    Returns:
        What `kl_fn` returns, in float32 or wider.

    Reference:
        Hafner et al., Mastering Atari with Discrete World Models (DreamerV2), ICLR 2021.

    >>> kl_fn = lambda mean, prior_mean: 0.5 * (mean - prior_mean) ** 2  # of unit Gaussians
    >>> jax.grad(balanced_kl, argnums=(1, 2))(kl_fn, 3.0, 1.0, alpha=0.75)  # 0.25 * 2, 0.75 * -2
    (Array(0.5, dtype=float32, weak_type=True), Array(-1.5, dtype=float32, weak_type=True))
    """
    fixed = jax.lax.stop_gradient
    to_prior, to_posterior = kl_fn(fixed(posterior), prior), kl_fn(posterior, fixed(prior))
    check_array(**{"kl_fn(posterior, prior)": to_prior})
    to_prior, to_posterior = widen(to_prior, to_posterior)
    (alpha,) = numbers(to_prior, alpha=alpha)
    return alpha * to_prior + (1 - alpha) * to_posterior


@compiled()
def importance_weighted_elbo(
    log_weights: Float[Array, "*batch samples"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative importance-weighted bound on the log-evidence, in nats per example.

    $$ \ell = -\log \frac{1}{K} \sum_{k=1}^K w_k, \quad w_k = \frac{p(x, z_k)}{q(z_k \mid x)} $$

    With one draw it is the negative ELBO; more draws make it smaller on average, down to
    `-log p(x)`. Where all weights are 0 it is infinite, with zero gradient.

    Args:
        log_weights: `log p(x, z) - log q(z | x)` of each of the draws, `(*batch, samples)`.
        where: Bool array of the examples, `(*batch,)`.

    One unit per example; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, ICLR 2016.

    >>> importance_weighted_elbo(jnp.log(jnp.array([[1.0, 3.0]])))  # -log 2
    Array(-0.6931472, dtype=float32)
    """
    check_float(log_weights=log_weights)
    check_min_rank(1, log_weights=log_weights)
    if not jnp.shape(log_weights)[-1]:
        raise ValueError(message("log_weights", "at least one sample", jnp.shape(log_weights)))
    (log_weights,) = mask(where, *widen(log_weights))
    values = -_log_mean_exp(log_weights)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _log_mean_exp(x: Array) -> Array:
    """Log of the mean of exponentials, with every digit also where all are almost 1."""
    largest = jax.lax.stop_gradient(jnp.max(x, axis=-1))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    below = x - largest[..., None]
    lacking = jnp.mean(expm1(below), axis=-1)  # the mean less 1
    near = lacking > -0.5
    far = safe_log(jnp.where(near, 1, jnp.mean(jnp.exp(below), axis=-1)))
    return jnp.where(near, jnp.log1p(jnp.where(near, lacking, 0)), far) + largest


@compiled()
def vq_commitment_loss(
    encoded: Float[Array, "*batch features"],
    quantized: Shaped[Array, "*batch features"],
    *,
    beta: Number = 0.25,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Codebook and commitment loss of vector quantisation, from 0 up.

    $$ \ell = \frac{1}{D} \big( |\mathrm{sg}(e) - q|^2 + \beta\, |e - \mathrm{sg}(q)|^2 \big) $$

    with $\mathrm{sg}$ for what carries no gradient: the first term moves the codebook only, the
    second the encoder only.

    Args:
        encoded: Output of the encoder, `(*batch, features)`.
        quantized: The code nearest to each vector, looked up with gradient; same shape. The decoder
            takes `encoded + stop_gradient(quantized - encoded)`.
        beta: Weight of the commitment of the encoder.

    One unit per vector; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        van den Oord, Vinyals and Kavukcuoglu, Neural Discrete Representation Learning, NeurIPS
        2017. The paper sums over the features; its code takes the mean, as here.

    >>> vq_commitment_loss(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]]))  # (1 + 0.25) 4 / 2
    Array(2.5, dtype=float32)
    """
    check_float(encoded=encoded)
    check_min_rank(1, encoded=encoded)
    check_same_shape(encoded=encoded, quantized=quantized)
    encoded, quantized = mask(where, *widen(encoded, quantized))
    (beta,) = numbers(encoded, beta=beta)
    codebook = (jax.lax.stop_gradient(encoded) - quantized) ** 2
    commitment = (encoded - jax.lax.stop_gradient(quantized)) ** 2
    values = jnp.sum(codebook + beta * commitment, axis=-1) / max(encoded.shape[-1], 1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


CASES = (
    Case(elbo_loss, dict(reconstruction_nll=draw_normal("B"), kl=draw_normal("B"))),
    Case(
        elbo_loss,
        dict(reconstruction_nll=draw_normal("B T"), kl=draw_normal("B T")),
        dict(beta=0.3),
        label="beta",
    ),
    Case(importance_weighted_elbo, dict(log_weights=draw_normal("B V"))),
    Case(
        vq_commitment_loss,
        dict(encoded=draw_normal("B D"), quantized=draw_normal("B D")),
        dict(beta=0.6),
        zero_at_target=True,
        without={"numerical": "each side is constant in one of the terms"},
    ),
)
