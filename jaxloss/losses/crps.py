"""Continuous ranked probability scores: a whole forecast distribution against one number."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

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
from .._core.numerics import numbers, widen
from .._core.pinball import mean_pinball
from .._core.reduce import mask, reduce
from .._core.sorting import balance, from_keys, sort_keys
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "crps_ensemble",
    "crps_gaussian",
    "crps_gaussian_mixture",
    "crps_laplace",
    "crps_logistic",
    "crps_quantile",
]


@compiled()
def crps_gaussian(
    mean: Float[Array, "*shape"],
    scale: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    min_scale: Number = 1e-6,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Continuous ranked probability score of a Gaussian, in the unit of the target, from 0 up.

    $$ \ell = \sigma \left( z\,(2 \Phi(z) - 1) + 2 \varphi(z) - \frac{1}{\sqrt{\pi}} \right),
       \qquad z = \frac{y - \mu}{\sigma} $$

    It tends to the absolute error as the scale goes to 0.

    Args:
        mean: Predicted mean, in the unit of the target.
        scale: Predicted standard deviation.
        target: Same shape and unit as `mean`.
        min_scale: The least scale, above 0; below it no gradient reaches `scale`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Gneiting et al., Calibrated Probabilistic Forecasting Using Ensemble Model Output
        Statistics and Minimum CRPS Estimation, Monthly Weather Review 2005. Equals scoringrules'
        `crps_normal`.

    >>> one = jnp.ones(1)
    >>> crps_gaussian(one, one, one)  # (sqrt(2) - 1) / sqrt(pi)
    Array(0.23369497, dtype=float32)
    """
    return _of_location_and_scale(
        _gaussian_parts,
        dict(mean=mean, scale=scale, target=target),
        min_scale,
        where=where,
        weights=weights,
        reduction=reduction,
    )


@compiled()
def crps_logistic(
    loc: Float[Array, "*shape"],
    scale: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    min_scale: Number = 1e-6,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Continuous ranked probability score of a logistic distribution, in the unit of the target.

    $$ \ell = s \left( z - 2 \log \sigma(z) - 1 \right), \qquad z = \frac{y - \mu}{s} $$

    Args:
        loc: Predicted mean, in the unit of the target.
        scale: Predicted scale $s$; the standard deviation is $\pi s / \sqrt{3}$.
        target: Same shape and unit as `loc`.
        min_scale: The least scale, above 0; below it no gradient reaches `scale`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Jordan, Krüger and Lerch, Evaluating Probabilistic Forecasts with scoringRules, Journal of
        Statistical Software 2019. Equals scoringrules' `crps_logistic`.

    >>> one = jnp.ones(1)
    >>> crps_logistic(one, one, one)  # 2 log 2 - 1
    Array(0.38629436, dtype=float32)
    """
    return _of_location_and_scale(
        _logistic_parts,
        dict(loc=loc, scale=scale, target=target),
        min_scale,
        where=where,
        weights=weights,
        reduction=reduction,
    )


@compiled()
def crps_laplace(
    loc: Float[Array, "*shape"],
    scale: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    min_scale: Number = 1e-6,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Continuous ranked probability score of a Laplace distribution, in the unit of the target.

    $$ \ell = b \left( |z| + e^{-|z|} - \tfrac{3}{4} \right), \qquad z = \frac{y - \mu}{b} $$

    Args:
        loc: Predicted median, in the unit of the target.
        scale: Predicted scale $b$, the mean absolute error.
        target: Same shape and unit as `loc`.
        min_scale: The least scale, above 0; below it no gradient reaches `scale`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Jordan, Krüger and Lerch, Evaluating Probabilistic Forecasts with scoringRules, Journal of
        Statistical Software 2019. Equals scoringrules' `crps_laplace`.

    >>> one = jnp.ones(1)
    >>> crps_laplace(one, one, one)
    Array(0.25, dtype=float32)
    """
    return _of_location_and_scale(
        _laplace_parts,
        dict(loc=loc, scale=scale, target=target),
        min_scale,
        where=where,
        weights=weights,
        reduction=reduction,
    )


@compiled()
def crps_gaussian_mixture(
    logits: Float[Array, "*batch k"],
    means: Float[Array, "*batch k"],
    scales: Float[Array, "*batch k"],
    target: Shaped[Array, "*batch"],
    *,
    min_scale: Number = 1e-6,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Continuous ranked probability score of a mixture of Gaussians, in the unit of the target.

    $$ \ell = \sum_k \pi_k A(y - \mu_k, \sigma_k)
       - \tfrac{1}{2} \sum_{kl} \pi_k \pi_l A(\mu_k - \mu_l, \sqrt{\sigma_k^2 + \sigma_l^2}) $$

    with $A(\mu, \sigma)$ the mean of the absolute value of a Gaussian. Needs memory for all pairs
    of components.

    Args:
        logits: Logits of the weights of the components, on the last axis.
        means: Their means, in the unit of the target; same shape.
        scales: Their standard deviations; same shape.
        target: One value for each row of `logits`.
        min_scale: The least scale, above 0; below it no gradient reaches `scales`.

    One unit per target; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Grimit et al., The Continuous Ranked Probability Score for Circular Variables, Quarterly
        Journal of the Royal Meteorological Society 2006. Equals scoringrules' `crps_mixnorm`.

    >>> zero, one = jnp.zeros((1, 2)), jnp.ones((1, 2))
    >>> crps_gaussian_mixture(zero, one, one, jnp.ones(1))  # one Gaussian, twice
    Array(0.23369497, dtype=float32)
    """
    check_float(logits=logits, means=means, scales=scales)
    check_min_rank(1, logits=logits)
    check_same_shape(logits=logits, means=means, scales=scales)
    check_shape(jnp.shape(logits)[:-1], target=target)
    logits, means, scales, target = mask(where, *widen(logits, means, scales, target))
    scales = _floored(scales, min_scale)
    p = jax.nn.softmax(logits, axis=-1)
    to_target = _homogeneous(_absolute_parts, target[..., None] - means, scales)
    apart = means[..., :, None] - means[..., None, :]
    large = jnp.maximum(scales[..., :, None], scales[..., None, :])
    small = jnp.minimum(scales[..., :, None], scales[..., None, :])
    both = large * jnp.sqrt(1 + (small / large) ** 2)
    pairs = p[..., :, None] * p[..., None, :] * _homogeneous(_absolute_parts, apart, both)
    values = jnp.sum(p * to_target, axis=-1) - 0.5 * jnp.sum(pairs, axis=(-2, -1))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("fair")
def crps_ensemble(
    samples: Float[Array, "*batch m"],
    target: Shaped[Array, "*batch"],
    *,
    fair: bool = False,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Continuous ranked probability score of an ensemble, in the unit of the target, from 0 up.

    $$ \ell = \frac{1}{M} \sum_i |x_i - y| - \frac{1}{2 M^2} \sum_{ij} |x_i - x_j| $$

    `fair` divides the second sum by $2 M (M - 1)$ instead: without bias as a score of the
    distribution from which the members were drawn. One member costs its absolute error either way.
    From the sorted members, in time $M \log M$ and a few copies of `samples`; equal members share
    their slope evenly, and a member that hits the target has none of the first sum.

    Args:
        samples: Members of the ensemble on the last axis, in the unit of the target.
        target: One value for each ensemble.
        fair: Whether to correct for the size of the ensemble.

    One unit per ensemble; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Matheson and Winkler, Scoring Rules for Continuous Probability Distributions, Management
        Science 1976; `fair`: Ferro, Fair Scores for Ensemble Forecasts, QJRMS 2014. Equals
        scoringrules' `crps_ensemble`: its estimators "nrg" and "qd", and "fair" and "pwm".

    >>> members, target = jnp.array([[0.0, 2.0]]), jnp.array([1.0])
    >>> crps_ensemble(members, target)  # 1 - 4 / 8
    Array(0.5, dtype=float32)
    >>> crps_ensemble(members, target, fair=True)  # 1 - 4 / 4
    Array(0., dtype=float32)
    """
    check_float(samples=samples)
    check_min_rank(1, samples=samples)
    check_shape(jnp.shape(samples)[:-1], target=target)
    check_option((False, True), fair=fair)
    samples, target = mask(where, *widen(samples, target))
    ordered = jax.lax.sort(sort_keys(jax.lax.stop_gradient(samples)))
    values = _ensemble(fair, samples, target, ordered)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def crps_quantile(
    pred: Float[Array, "*shape q"],
    target: Shaped[Array, "*shape"],
    quantiles: Float[Array, " q"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Continuous ranked probability score from predicted quantiles, in the unit of the target.

    $$ \ell = \frac{2}{Q} \sum_k \max(q_k d_k, (q_k - 1) d_k), \qquad d_k = y - \hat y_k $$

    An approximation, better the more evenly and densely the levels fill (0, 1). Crossing quantiles
    are not punished: add `quantile_crossing_penalty(pred)`.

    Args:
        pred: Predicted quantiles `(*shape, q)`.
        target: One value for each row of `pred`, in its unit.
        quantiles: The levels, each in `[0, 1]`, in the order of the last axis of `pred`.

    One unit per target; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Laio and Tamea, Verification Tools for Probabilistic Forecasts of Continuous Hydrological
        Variables, HESS 2007. Twice `multi_quantile_loss`; equals scoringrules' `crps_quantile`.

    >>> pred, levels = jnp.array([[1.0, 4.0]]), jnp.array([0.25, 0.75])
    >>> crps_quantile(pred, jnp.array([3.0]), levels)  # 0.25 * 2 + 0.25 * 1
    Array(0.75, dtype=float32)
    """
    values = 2 * mean_pinball(pred, target, quantiles, where)
    return reduce(values, where=where, weights=weights, reduction=reduction)


Parts = Callable[[Array], tuple[Array, Array]]


def _of_location_and_scale(
    parts: Parts,
    arrays: dict[str, Array],
    min_scale: Number,
    *,
    where: Where | None,
    weights: Values | None,
    reduction: Reduction,
) -> Array:
    check_float(**{name: arrays[name] for name in list(arrays)[:2]})
    check_same_shape(**arrays)
    loc, scale, target = mask(where, *widen(*arrays.values()))
    values = _homogeneous(parts, target - loc, _floored(scale, min_scale))
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _floored(scale: Array, min_scale: Number) -> Array:
    (floor,) = numbers(scale, min_scale=min_scale)
    require(lambda: floor > 0, "min_scale", "a positive value")
    return jnp.where(scale < floor, floor, scale)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _homogeneous(parts: Parts, error: Array, scale: Array) -> Array:
    """`scale g(error / scale)` from `parts`, which are its two derivatives.

    Those are g'(z) and g(z) - z g'(z): neither of them cancels or grows, however large z is.
    """
    slope, rest = parts(_ratio(error, scale))
    return slope * error + rest * scale


@_homogeneous.defjvp
def _homogeneous_jvp(
    parts: Parts, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (error, scale), (error_dot, scale_dot) = primals, tangents
    slope, rest = parts(_ratio(error, scale))
    return slope * error + rest * scale, slope * error_dot + rest * scale_dot


def _ratio(error: Array, scale: Array) -> Array:
    return jnp.clip(error / scale, -1e4, 1e4)  # where all parts have reached their limits


def _gaussian_parts(z: Array) -> tuple[Array, Array]:
    slope = jax.lax.erf(math.sqrt(0.5) * z)
    rest = math.sqrt(2 / math.pi) * jnp.expm1(-0.5 * z * z)
    return slope, rest + (math.sqrt(2) - 1) / math.sqrt(math.pi)


def _absolute_parts(z: Array) -> tuple[Array, Array]:
    """Those of the mean absolute value of a Gaussian."""
    return jax.lax.erf(math.sqrt(0.5) * z), math.sqrt(2 / math.pi) * jnp.exp(-0.5 * z * z)


def _logistic_parts(z: Array) -> tuple[Array, Array]:
    size = jnp.where(z < 0, -z, z)
    q = jnp.exp(-size)
    rest = jnp.log1p(0.5 * jnp.expm1(-size)) + size * q / (1 + q)
    return jnp.tanh(0.5 * z), 2 * rest + (2 * math.log(2) - 1)


def _laplace_parts(z: Array) -> tuple[Array, Array]:
    size = jnp.where(z < 0, -z, z)
    slope = jnp.where(z < 0, jnp.expm1(-size), -jnp.expm1(-size))
    return slope, jnp.expm1(-size) + size * jnp.exp(-size) + 0.25


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _ensemble(fair: bool, samples: Array, target: Array, ordered: Array) -> Array:
    """The score, given the sorted keys of the samples."""
    # The i-th smallest member counts with twice its share of the mass beyond it, as seen from the
    # target: a sum without a negative term.
    count = samples.shape[-1]
    others = count - 1 if fair and count > 1 else count
    distance = from_keys(ordered) - target[..., None]
    rank = jnp.arange(count, dtype=target.dtype).reshape((1,) * target.ndim + (count,))
    rank += 0.5 * (others == count)
    low = (distance < 0).astype(target.dtype)  # no select: ranks are not sharded as members are
    mass = (others - rank) + low * (2 * rank - others)
    return jnp.sum(jnp.abs(distance) * mass, axis=-1) * (2 / max(count * others, 1))


@_ensemble.defjvp
def _ensemble_jvp(
    fair: bool, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Any]
) -> tuple[Array, Array]:
    (samples, target, ordered), (samples_dot, target_dot, _) = primals, tangents
    count = samples.shape[-1]
    others = count - 1 if fair and count > 1 else count
    side = jnp.sign(samples - target[..., None])
    above = balance(ordered, sort_keys(samples)).astype(side.dtype)
    moved = jnp.sum((others * side - above) / max(count * others, 1) * samples_dot, axis=-1)
    moved -= jnp.sum(side, axis=-1) / max(count, 1) * target_dot
    return _ensemble(fair, samples, target, ordered), moved


_SCALED = dict(loc=draw_normal("B C"), scale=draw_uniform("B C", 0.2, 3), target=draw_normal("B C"))
_GAUSSIAN = {"mean": _SCALED["loc"], "scale": _SCALED["scale"], "target": _SCALED["target"]}
_ENSEMBLE = dict(samples=draw_normal("B C D"), target=draw_normal("B C"))
_MIXTURE = dict(
    logits=draw_normal("B C V"),
    means=draw_normal("B C V"),
    scales=draw_uniform("B C V", 0.2, 3),
    target=draw_normal("B C"),
)
_QUANTILES = dict(
    pred=draw_normal("B C V"), target=draw_normal("B C"), quantiles=draw_uniform("V", 0.1, 0.9)
)

CASES = (
    Case(crps_gaussian, _GAUSSIAN, dict(min_scale=0.01)),
    Case(crps_logistic, _SCALED, dict(min_scale=0.01)),
    Case(crps_laplace, _SCALED, dict(min_scale=0.01)),
    Case(crps_gaussian_mixture, _MIXTURE, dict(min_scale=0.01)),
    Case(crps_ensemble, _ENSEMBLE),
    Case(crps_ensemble, _ENSEMBLE, dict(fair=True), "fair"),
    Case(crps_quantile, _QUANTILES),
)
