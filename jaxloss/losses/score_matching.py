"""Score matching: the gradient of a log-density, learned without its normalising constant."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from .._core.case import Case, draw_normal
from .._core.checks import check_shape, message
from .._core.compiled import compiled, uncompiled
from .._core.numerics import widen
from .._core.reduce import mask, reduce
from .._core.samples import (
    PerSample,
    draw_like,
    over,
    per_sample,
    prepare_samples,
    sample_mean,
    sample_sum,
)
from .._core.typing import Reduction, Values, Where
from .._core.windows import any_kept

__all__ = [
    "denoising_score_matching_loss",
    "implicit_score_matching_loss",
    "sliced_score_matching_loss",
]


@compiled()
def denoising_score_matching_loss(
    score: Float[Array, "batch *space channels"],
    noise: Shaped[Array, "batch *space channels"],
    *,
    sigma: PerSample,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Half the squared error of the score of noisy samples, weighted by the noise, from 0 up.

    $$ \ell = \frac{1}{2D} \sum_i \sigma^2 \left( s_i + \frac{\epsilon_i}{\sigma} \right)^2
       = \frac{1}{2D} \sum_i (\sigma s_i + \epsilon_i)^2 $$

    over the D kept positions and channels of a sample. The second form divides by no `sigma`.

    Args:
        score: Output of the network at `x + sigma noise`, `(batch, *space, channels)`.
        noise: The standard normal noise; same shape.
        sigma: Standard deviation of what was added: one number, or one for each sample.
        where: Bool array `(batch, *space)`; a sample with nothing kept is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Vincent, A Connection Between Score Matching and Denoising Autoencoders, Neural Computation
        2011; the weight `sigma^2`: Song and Ermon, Generative Modeling by Estimating Gradients of
        the Data Distribution, NeurIPS 2019, who sum over the dimensions.

    >>> score, noise = jnp.array([[3.0, 0.0]]), jnp.array([[1.0, -1.0]])
    >>> denoising_score_matching_loss(score, noise, sigma=1.0)  # (16 + 1) / 4
    Array(4.25, dtype=float32)
    """
    score, noise = prepare_samples(where, score=score, noise=noise)
    (sigma,) = per_sample(score, where, sigma=sigma)
    values = 0.5 * sample_mean((over(sigma, score) * score + noise) ** 2, where)
    return reduce(values, where=any_kept(where), weights=weights, reduction=reduction)


@uncompiled
def sliced_score_matching_loss(
    score_fn: Callable[[Array], Array],
    x: Float[Array, "batch *space channels"],
    *,
    key: ArrayLike,
    projections: int = 1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Score matching along random directions; it may be negative.

    $$ \ell = \frac{1}{M} \sum_{m=1}^M v_m^T J_s(x) v_m + \tfrac{1}{2} (v_m^T s(x))^2 $$

    with vectors v of random signs and the Jacobian J of the score, whose products with vectors are
    forward-mode derivatives. On average it is `implicit_score_matching_loss`. Sums, not means, over
    kept positions and channels.

    Args:
        score_fn: From samples to scores of the same shape, each sample by itself. It is given the
            dtype of `x` and called as it stands, never compiled here: what it closes over may be
            traced, and gets gradients.
        x: Data `(batch, *space, channels)`.
        key: Random key of the signs, which are drawn for the whole array. Give each microbatch, and
            each device inside `shard_map`, its own.
        projections: Number M of directions, at least 1; memory grows with it.
        where: Bool array `(batch, *space)`; a hidden position is 0 for `score_fn` and no direction.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Song et al., Sliced Score Matching: A Scalable Approach to Density and Score Estimation, UAI
        2019.

    >>> x = jnp.array([[2.0]])
    >>> sliced_score_matching_loss(lambda x: -x, x, key=jax.random.key(0))  # -1 + 4 / 2
    Array(1., dtype=float32)
    """
    if isinstance(projections, bool) or not isinstance(projections, (int, np.integer)):
        raise TypeError(message("projections", "an integer", repr(projections)))
    if projections < 1:
        raise ValueError(message("projections", "at least 1", projections))
    (samples,) = prepare_samples(where, x=x)
    along = partial(_along, score_fn, samples, x, where)
    drawn = lambda key: along(draw_like(_signs, key, samples))
    keys = [key] if projections == 1 else jax.random.split(key, projections)
    values = drawn(keys[0]) if projections == 1 else jnp.mean(jax.vmap(drawn)(keys), axis=0)
    return reduce(values, where=any_kept(where), weights=weights, reduction=reduction)


@uncompiled
def implicit_score_matching_loss(
    score_fn: Callable[[Array], Array],
    x: Float[Array, "batch *space channels"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Score matching with the exact trace of the Jacobian; it may be negative.

    $$ \ell = \mathrm{tr}\, J_s(x) + \tfrac{1}{2} |s(x)|^2 $$

    Up to a constant of the data it is half the squared distance of `s` from the score of the data,
    on average. Sums, not means, over kept positions and channels. Time and memory are those of
    one forward-mode derivative for each of them, so for small samples only.

    Args:
        score_fn: From samples to scores of the same shape, each sample by itself. It is given the
            dtype of `x` and called as it stands, never compiled here: what it closes over may be
            traced, and gets gradients.
        x: Data `(batch, *space, channels)`.
        where: Bool array `(batch, *space)`; a hidden position is 0 for `score_fn` and counts for
            nothing.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Hyvarinen, Estimation of Non-Normalized Statistical Models by Score Matching, JMLR 2005.

    >>> implicit_score_matching_loss(lambda x: -x, jnp.array([[2.0, 1.0]]))  # -2 + 5 / 2
    Array(0.5, dtype=float32)
    """
    (samples,) = prepare_samples(where, x=x)
    size = math.prod(samples.shape[1:])
    basis = jnp.eye(size, dtype=samples.dtype).reshape(size, 1, *samples.shape[1:])
    along = partial(_along, score_fn, samples, x, where)
    values = jnp.sum(jax.vmap(along)(basis), axis=0)  # of v^T J v + (v^T s)^2 / 2
    return reduce(values, where=any_kept(where), weights=weights, reduction=reduction)


def _along(
    score_fn: Callable[[Array], Array], x: Array, like: Array, where: Where | None, v: Array
) -> Array:
    """v^T J v + (v^T s)^2 / 2 of each sample."""

    def score(x: Array) -> Array:
        out = score_fn(x.astype(like.dtype))
        check_shape(x.shape, **{"score_fn(x)": out})
        return out.astype(x.dtype)

    (v,) = mask(where, v + jnp.zeros_like(x))
    s, moved = mask(where, *jax.jvp(score, (x,), (v,)))
    return sample_sum(v * moved) + 0.5 * sample_sum(v * s) ** 2


def _signs(key: ArrayLike, **shape: Any) -> Array:
    # What `bernoulli` draws, which takes no sharding before jax 0.9.
    heads = jax.random.uniform(key, dtype=jnp.float32, **shape) < 0.5
    return jnp.where(heads, jnp.float32(1), jnp.float32(-1))


def _score(x: Array) -> Array:
    """Of neighbouring channels together, so that the Jacobian is not diagonal."""
    (x,) = widen(x)
    return 0.5 * jnp.tanh(jnp.roll(x, 1, axis=-1)) - x


_POINT = dict(x=draw_normal("B 1"))
_SAMPLES = dict(x=draw_normal("B H C"))
_SPACE = dict(H=2, C=2)
_BY_PLACE: dict[str, str] = dict.fromkeys(
    ("deleting", "microbatches", "weight_two", "permutation", "devices"),
    "each sample draws its signs by its place in the batch",
)

CASES = (
    Case(
        denoising_score_matching_loss,
        dict(score=draw_normal("B H W C"), noise=draw_normal("B H W C")),
        dict(sigma=0.6),
        positions="B H W",
        sizes=dict(H=2, W=3, C=2),
    ),
    Case(
        sliced_score_matching_loss,
        _POINT,
        dict(key=np.array([0, 7], np.uint32)),
        functions=dict(score_fn=_score),
    ),
    Case(
        sliced_score_matching_loss,
        _SAMPLES,
        dict(key=np.array([0, 7], np.uint32), projections=2),
        label="directions",
        positions="B H",
        sizes=_SPACE,
        functions=dict(score_fn=_score),
        without=_BY_PLACE,
    ),
    Case(
        implicit_score_matching_loss,
        _SAMPLES,
        positions="B H",
        sizes=_SPACE,
        functions=dict(score_fn=_score),
    ),
)
