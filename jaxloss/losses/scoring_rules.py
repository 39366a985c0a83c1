"""Proper scores of intervals and of ensembles of vectors."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal, draw_uniform
from .._core.checks import (
    check_float,
    check_min_rank,
    check_option,
    check_same_shape,
    check_shape,
    require,
)
from .._core.compiled import compiled
from .._core.numerics import absolute, numbers, power_of_two, safe_pow, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["energy_score", "interval_score", "variogram_score", "weighted_interval_score"]


@compiled()
def interval_score(
    lower: Float[Array, "*shape"],
    upper: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    alpha: Number = 0.1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Width of a predicted interval and a penalty for missing the target, in its unit.

    $$ \ell = (u - l) + \frac{2}{\alpha} \max(0, l - y) + \frac{2}{\alpha} \max(0, y - u) $$

    Smallest where both ends are quantiles, of levels $\alpha / 2$ and $1 - \alpha / 2$. From 0 up
    unless the ends are crossed. The slope of the penalty on the ends is 0.

    Args:
        lower: Lower end of the interval, in the unit of the target.
        upper: Its upper end; same shape.
        target: Same shape and unit.
        alpha: Share of targets that should lie outside, in (0, 1]: 0.1 for a 90 % interval.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, JASA 2007.
        Also known as the Winkler score; equals scoringrules' `interval_score`.

    >>> lower, upper = jnp.array([0.0]), jnp.array([2.0])
    >>> interval_score(lower, upper, jnp.array([3.0]), alpha=0.5)  # 2 + 4 * 1
    Array(6., dtype=float32)
    """
    check_float(lower=lower, upper=upper)
    check_same_shape(lower=lower, upper=upper, target=target)
    lower, upper, target = mask(where, *widen(lower, upper, target))
    (alpha,) = numbers(lower, alpha=alpha)
    require(lambda: (alpha > 0) & (alpha <= 1), "alpha", "a value in (0, 1]")
    values = (upper - lower) + (2 / alpha) * _missed(lower, upper, target)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def weighted_interval_score(
    median: Float[Array, "*shape"],
    lower: Float[Array, "*shape k"],
    upper: Float[Array, "*shape k"],
    target: Shaped[Array, "*shape"],
    alpha: Float[Array, " k"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Score of a median and several intervals, in the unit of the target: an approximate CRPS.

    $$ \ell = \frac{1}{K + \frac{1}{2}} \left( \tfrac{1}{2} |y - m|
       + \sum_k \tfrac{\alpha_k}{2} \mathrm{IS}_{\alpha_k}(l_k, u_k, y) \right) $$

    with the `interval_score` IS. This is the CRPS of the $2 K + 1$ quantiles that the median and
    the ends of the intervals are.

    Args:
        median: Predicted median, in the unit of the target.
        lower: Lower ends of the intervals `(*shape, k)`.
        upper: Their upper ends; same shape.
        target: Same shape and unit as `median`.
        alpha: For each interval the share of targets that should lie outside, in (0, 1].

    One unit per target; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Bracher et al., Evaluating Epidemic Forecasts in an Interval Format, PLOS Computational
        Biology 2021. scoringrules' `weighted_interval_score` equals it with numba only; its other
        backends put the median itself in place of its error.

    >>> lower, upper = jnp.array([[-1.0, -0.5]]), jnp.array([[1.0, 0.5]])
    >>> median, alpha = jnp.array([0.2]), jnp.array([0.1, 0.5])
    >>> weighted_interval_score(median, lower, upper, jnp.array([2.0]), alpha)  # see below
    Array(1.5, dtype=float32)

    The error of the median gives 1.8 / 2, the intervals 0.1 + 1 and 0.25 + 1.5, over 2.5.
    """
    check_float(median=median, lower=lower, upper=upper, alpha=alpha)
    check_same_shape(median=median, target=target)
    check_min_rank(1, lower=lower)
    check_shape((*jnp.shape(median), jnp.shape(lower)[-1]), lower=lower, upper=upper)
    check_shape(jnp.shape(lower)[-1:], alpha=alpha)
    median, lower, upper, target = mask(where, *widen(median, lower, upper, target))
    alpha = jnp.asarray(alpha).astype(median.dtype)
    require(lambda: (alpha > 0) & (alpha <= 1), "alpha", "values in (0, 1]")
    halves = jnp.broadcast_to(0.5 * alpha, lower.shape)
    costs = halves * (upper - lower) + _missed(lower, upper, target[..., None])
    values = 0.5 * absolute(target - median) + jnp.sum(costs, axis=-1)
    values /= lower.shape[-1] + 0.5
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("fair")
def energy_score(
    samples: Float[Array, "*batch m d"],
    target: Shaped[Array, "*batch d"],
    *,
    fair: bool = False,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""CRPS of an ensemble of vectors, in the unit of the target, from 0 up.

    $$ \ell = \frac{1}{M} \sum_i \lVert x_i - y \rVert
       - \frac{1}{2 M^2} \sum_{ij} \lVert x_i - x_j \rVert $$

    `fair` divides the second sum by $2 M (M - 1)$ instead. Each pair is formed once, as many at a
    time as there are members: memory for a few copies of `samples`. The norm of 0 has gradient 0.

    Args:
        samples: Members of the ensemble `(*batch, m, d)`, in the unit of the target.
        target: One vector `(*batch, d)` for each ensemble.
        fair: Whether to correct for the size of the ensemble.

    One unit per ensemble; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, JASA 2007.
        Equals scoringrules' `es_ensemble`, estimators "nrg" and "fair"; with one coordinate,
        `crps_ensemble`.

    >>> samples, target = jnp.array([[[0.0, 0.0], [3.0, 4.0]]]), jnp.zeros((1, 2))
    >>> energy_score(samples, target)  # 5 / 2 - 2 * 5 / 8
    Array(1.25, dtype=float32)
    """
    samples, target = _vectors(samples, target, where)
    check_option((False, True), fair=fair)
    count = samples.shape[-2]
    others = count - 1 if fair and count > 1 else count
    # of a size at which no square overflows or vanishes beside the others
    apart = samples - target[..., None, :]
    size = power_of_two(jnp.max(jnp.abs(apart), axis=(-2, -1), initial=0))
    apart, samples = apart / size[..., None, None], samples / size[..., None, None]
    norm = lambda x: safe_sqrt(jnp.sum(x * x, axis=-1))
    members = jnp.moveaxis(samples, -2, 0)
    pairs = _over_pairs(lambda x, y, _: jnp.sum(norm(x - y), axis=0), members)
    values = jnp.sum(norm(apart), axis=-1) / max(count, 1) - pairs / max(count * others, 1)
    return reduce(values * size, where=where, weights=weights, reduction=reduction)


@compiled()
def variogram_score(
    samples: Float[Array, "*batch m d"],
    target: Shaped[Array, "*batch d"],
    *,
    p: Number = 0.5,
    pair_weights: Float[Array, "d d"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""How well an ensemble tells how coordinates differ from one another, from 0 up.

    $$ \ell = \sum_{ij} w_{ij} \left( |y_i - y_j|^p
       - \frac{1}{M} \sum_k |x_{ki} - x_{kj}|^p \right)^2 $$

    Unlike the `energy_score` it is sensitive to correlations, and blind to what is added to all
    coordinates. The unit is that of the target to the power of $2 p$. As many pairs of coordinates
    are formed at a time as there are coordinates: memory for a few copies of `samples`. Where two
    coordinates are equal the gradient of their difference is 0.

    Args:
        samples: Members of the ensemble `(*batch, m, d)`, in the unit of the target.
        target: One vector `(*batch, d)` for each ensemble.
        p: Power of the differences, above 0.
        pair_weights: Weights $w$ of the pairs `(d, d)`; all 1 if left out. Each pair counts in both
            orders.

    One unit per ensemble; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Scheuerer and Hamill, Variogram-Based Proper Scoring Rules for Probabilistic Forecasts of
        Multivariate Quantities, Monthly Weather Review 2015. Equals scoringrules'
        `vs_ensemble`.

    >>> samples, target = jnp.array([[[0.0, 1.0], [0.0, 9.0]]]), jnp.zeros((1, 2))
    >>> variogram_score(samples, target)  # 2 ((1 + 3) / 2)^2
    Array(8., dtype=float32)
    """
    samples, target = _vectors(samples, target, where)
    (power,) = numbers(samples, p=p)
    require(lambda: power > 0, "p", "a positive value")
    size = samples.shape[-1]
    both = None
    if pair_weights is not None:
        check_float(pair_weights=pair_weights)
        check_shape((size, size), pair_weights=pair_weights)
        both = jnp.asarray(pair_weights).astype(samples.dtype)
        both = both + both.T
    # coordinates first, the target as a last member
    members = jnp.concatenate([samples, target[..., None, :]], axis=-2)

    def cost(x: Array, y: Array, pair: Array | None) -> Array:
        powers = safe_pow(jnp.abs(x - y), power)
        error = powers[..., -1] - jnp.sum(powers[..., :-1], axis=-1) / max(powers.shape[-1] - 1, 1)
        return jnp.tensordot(pair, error**2, 1) if pair is not None else 2 * jnp.sum(error**2, 0)

    values = _over_pairs(cost, jnp.moveaxis(members, -1, 0), both)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _missed(lower: Array, upper: Array, target: Array) -> Array:
    """By how much an interval misses the target."""
    return jax.nn.relu(lower - target) + jax.nn.relu(target - upper)


def _vectors(samples: Array, target: Array, where: Where | None) -> tuple[Array, Array]:
    check_float(samples=samples)
    check_min_rank(2, samples=samples)
    shape = jnp.shape(samples)
    check_shape((*shape[:-2], shape[-1]), target=target)
    samples, target = mask(where, *widen(samples, target))
    return samples, target


def _over_pairs(cost: Callable[..., Array], rows: Array, weights: Array | None = None) -> Array:
    """Sum over all pairs of rows, the first axis, of `cost(rows, others)`, which sums over rows.

    The rows are held against themselves shifted by 1, 2, ... half of their number.
    """
    count = rows.shape[0]
    if count < 2:
        return jnp.zeros_like(cost(rows, rows, weights))
    if weights is not None:
        weights = jnp.concatenate([weights, weights], axis=1)
    place = jnp.arange(count)

    @partial(jax.checkpoint, prevent_cse=False)
    def at(rows: Array, weights: Array | None, shift: Array) -> Array:
        twice = jnp.concatenate([rows, rows])
        others = jax.lax.dynamic_slice_in_dim(twice, shift, count)
        pair = None if weights is None else weights[place, place + shift]
        return jnp.where(2 * shift == count, 0.5, 1).astype(rows.dtype) * cost(rows, others, pair)

    first = at(rows, weights, jnp.asarray(1))
    step = lambda total, shift: (total + at(rows, weights, shift), None)
    return jax.lax.scan(step, first, jnp.arange(2, count // 2 + 1))[0]


_INTERVAL = dict(lower=draw_normal("B C"), upper=draw_normal("B C"), target=draw_normal("B C"))
_INTERVALS = dict(
    median=draw_normal("B C"),
    lower=draw_normal("B C V"),
    upper=draw_normal("B C V"),
    target=draw_normal("B C"),
    alpha=draw_uniform("V", 0.1, 0.9),
)
_VECTORS = dict(samples=draw_normal("B M V"), target=draw_normal("B V"))

CASES = (
    Case(interval_score, _INTERVAL, dict(alpha=0.2)),
    Case(weighted_interval_score, _INTERVALS),
    Case(energy_score, _VECTORS, sizes=dict(M=4)),
    Case(energy_score, _VECTORS, dict(fair=True), "fair", sizes=dict(M=5)),
    Case(variogram_score, _VECTORS, dict(p=1.5), sizes=dict(M=3)),
)
