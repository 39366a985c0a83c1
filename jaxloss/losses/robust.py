"""Losses whose influence falls off for outliers, in units of a scale."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal
from .._core.checks import check_array, check_float, check_same_shape, require
from .._core.compiled import compiled
from .._core.numerics import (
    absolute,
    expm1,
    horner,
    log1p_square,
    numbers,
    safe_div,
    safe_mul,
    widen,
)
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "cauchy_loss",
    "geman_mcclure_loss",
    "general_robust_loss",
    "tukey_biweight_loss",
    "welsch_loss",
]


@compiled()
def general_robust_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    alpha: Number | Float[Array, "*shape"] = 1.0,
    scale: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Barron's robust loss, without unit, from 0 up: `alpha` says how much outliers count.

    $$ \ell = \frac{|\alpha - 2|}{\alpha} \left[ \left( \frac{x^2}{|\alpha - 2|} + 1
       \right)^{\alpha / 2} - 1 \right], \qquad x = \frac{\hat y - y}{\text{scale}} $$

    and its limits: $x^2 / 2$ at $\alpha = 2$, `pseudo_huber_loss` at 1, `cauchy_loss` at 0,
    `geman_mcclure_loss` at -2, `welsch_loss` at $-\infty$, $e^{x^2 / 2} - 1$ at $\infty$. Value and
    slope are smooth through all of them. The derivative with respect to `alpha` grows without
    bound towards $\alpha = 2$; there it is cut off at a finite value.

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        alpha: A number or an array of the shape of `pred`, infinities included; it may be learned.
        scale: Error that separates inliers from outliers, in the unit of the target.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Barron, A General and Adaptive Robust Loss Function, CVPR 2019.

    >>> general_robust_loss(jnp.array([2.0]), jnp.array([0.0]), alpha=-2.0)  # 2 * 4 / (4 + 4)
    Array(1., dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    check_array(alpha=alpha)
    if jnp.ndim(alpha):
        check_same_shape(pred=pred, alpha=alpha)
    pred, target = widen(pred, target)
    (scale,) = numbers(pred, scale=scale)
    require(lambda: scale > 0, "scale", "a positive value")
    alpha = jnp.asarray(alpha).astype(pred.dtype)
    pred, target = mask(where, pred, target)
    (alpha,) = mask(where, alpha) if alpha.ndim else (alpha,)
    values = _barron((pred - target) / scale, alpha)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def cauchy_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    scale: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Logarithmic loss, without unit, from 0 up: an outlier's pull falls as one over its error.

    $$ \ell = \log(1 + \tfrac{1}{2} x^2), \qquad x = \frac{\hat y - y}{\text{scale}} $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        scale: Error that separates inliers from outliers, in the unit of the target.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Black and Anandan, The robust estimation of multiple motions, CVIU 1996; in this scaling
        Barron, CVPR 2019. Equals kornia's `cauchy_loss`. SciPy's `least_squares` has
        `log(1 + (e / f_scale)^2)`: there `f_scale` is `scale * sqrt(2)`.

    >>> cauchy_loss(jnp.array([2.0]), jnp.array([0.0]))  # log 3
    Array(1.0986123, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (scale,) = numbers(pred, scale=scale)
    require(lambda: scale > 0, "scale", "a positive value")
    values = log1p_square((pred - target) / scale * math.sqrt(0.5))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def geman_mcclure_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    scale: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Bounded loss, in `[0, 2)` and without unit: far outliers hardly pull.

    $$ \ell = \frac{2 x^2}{x^2 + 4}, \qquad x = \frac{\hat y - y}{\text{scale}} $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        scale: Error that separates inliers from outliers, in the unit of the target.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Geman and McClure, Bayesian image analysis, 1985; in this scaling Barron, CVPR 2019.
        Equals kornia's `geman_mcclure_loss`. The textbook form `e^2 / (e^2 + c^2)` is half of
        this at `scale = c / 2`.

    >>> geman_mcclure_loss(jnp.array([2.0]), jnp.array([0.0]))
    Array(1., dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (scale,) = numbers(pred, scale=scale)
    require(lambda: scale > 0, "scale", "a positive value")
    x = (pred - target) / scale
    far = jnp.abs(x) > 2
    square = jnp.where(far, 0, x) ** 2
    inverse = (2 / jnp.where(far, x, 2)) ** 2  # this side keeps large x and small slopes exact
    values = jnp.where(far, 2 - 2 * inverse / (1 + inverse), 2 * square / (square + 4))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def welsch_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    scale: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Bounded loss, in `[0, 1]` and without unit: the pull of outliers dies off like a Gaussian.

    $$ \ell = 1 - e^{-x^2 / 2}, \qquad x = \frac{\hat y - y}{\text{scale}} $$

    Also known as Leclerc's loss.

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        scale: Error that separates inliers from outliers, in the unit of the target.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Dennis and Welsch, Techniques for nonlinear least squares and robust regression,
        Communications in Statistics 1978; Leclerc, Constructing simple stable descriptions for
        image partitioning, IJCV 1989. Equals kornia's `welsch_loss`.

    >>> welsch_loss(jnp.array([100.0]), jnp.array([0.0]))  # an outlier costs 1
    Array(1., dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (scale,) = numbers(pred, scale=scale)
    require(lambda: scale > 0, "scale", "a positive value")
    x = (pred - target) / scale
    values = -expm1(-0.5 * x**2)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def tukey_biweight_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    cutoff: Number = 4.685,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Bounded loss, in `[0, cutoff^2 / 6]`: errors beyond `cutoff` have no gradient at all.

    $$ \ell = \tfrac{1}{6} c^2 \left( 1 - \left( 1 - \min(|\hat y - y| / c, 1)^2 \right)^3 \right),
       \qquad c = \text{cutoff} $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        cutoff: Error from which on an element is ignored, in the unit of the target. The default
            is 95 % efficient for errors of standard deviation 1.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Beaton and Tukey, The Fitting of Power Series, Meaning Polynomials, Illustrated on
        Band-Spectroscopic Data, Technometrics 1974.

    >>> tukey_biweight_loss(jnp.array([9.0]), jnp.array([0.0]), cutoff=6.0)  # 36 / 6
    Array(6., dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (cutoff,) = numbers(pred, cutoff=cutoff)
    require(lambda: cutoff > 0, "cutoff", "a positive value")
    error = pred - target
    size = jnp.where(jnp.abs(error) < cutoff, absolute(error), cutoff)
    size = jnp.where(jnp.isnan(error), error, size)
    z = safe_div(size, cutoff)
    rest = safe_div(cutoff - size, cutoff) * (1 + z)  # 1 - z^2
    near = z < 0.5
    square = jnp.where(near, size, 0) ** 2 * (3 - 3 * z**2 + z**4)
    c = jnp.where(near, 0, cutoff)
    values = jnp.where(near, square, c**2 * (1 - rest**3)) / 6
    return reduce(values, where=where, weights=weights, reduction=reduction)


@jax.custom_jvp
def _barron(x: Array, alpha: Array) -> Array:
    """Barron's loss; its derivatives are given below, because those of this formula cancel."""
    limit, side, b, _, half, ratio = _coordinates(x, alpha)
    power = jnp.where(limit, 1, alpha)
    above = jnp.where(limit, 0, x * (x * _pull(x, alpha)) / power)
    above += jnp.expm1(side * half) / jnp.where(alpha > 1, ratio, 1)
    w = ratio * half
    grown = jnp.where(w < 1, jnp.expm1(jnp.minimum(w, 1)), _root(x, b) ** power - 1)
    below = jnp.where(w == 0, half, grown / jnp.where(w == 0, 1, ratio))
    return jnp.where(alpha > 1, above, below)


def _barron_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    x, alpha = primals
    value = _barron(x, alpha)
    tangent = jnp.zeros_like(value)
    if not isinstance(tangents[0], SymbolicZero):
        tangent += x * _pull(x, alpha) * tangents[0]
    if not isinstance(tangents[1], SymbolicZero):
        tangent += _slope(x, alpha) * tangents[1]
    return value, tangent


_barron.defjvp(_barron_jvp, symbolic_zeros=True)


def _coordinates(x: Array, alpha: Array) -> tuple[Array, ...]:
    """The quantities in which nothing happens at the special values of `alpha`.

    With b = |alpha - 2| and u = log(1 + x^2 / b): whether alpha is infinite, the sign of
    alpha - 2, b, u, half = b u / 2, which is x^2 / 2 in the limit, and ratio = alpha / b. So
    ratio * half = alpha u / 2, the loss is expm1(ratio * half) / ratio, and its slope in x is
    x exp(sign * half).
    """
    limit = jnp.isinf(alpha)
    side = jnp.where(alpha < 2, -1, 1).astype(x.dtype)
    power = jnp.where(limit, 1, alpha)
    eps = jnp.finfo(x.dtype).eps
    b = jnp.maximum(jnp.abs(power - 2), eps**2)  # so small that alpha = 2 is exact
    u = log1p_square(x / jnp.sqrt(b))
    half = jnp.where(limit | (u < eps), 0.5 * x**2, 0.5 * b * u)
    return limit, side, b, jnp.where(limit, 0, u), half, jnp.where(limit, side, power / b)


def _root(x: Array, b: Array) -> Array:
    """sqrt(1 + x^2 / b) without overflow."""
    x = x / jnp.sqrt(b)
    big = jnp.abs(x) > 1e9
    return jnp.where(big, jnp.abs(x), jnp.sqrt(1 + jnp.where(big, 0, x) ** 2))


def _pull(x: Array, alpha: Array) -> Array:
    """Slope over x: exp(sign * half), by a power where the exponent would round too much."""
    limit, side, b, u, half, _ = _coordinates(x, alpha)
    far = (u > 0.5) & ~limit
    power = _root(jnp.where(far, x, 0), b) ** (side * b)
    return jnp.where(far, power, jnp.exp(jnp.where(far, 0, side * half)))


def _slope(x: Array, alpha: Array) -> Array:
    """Derivative with respect to alpha: b / 4 times the integral of e^(alpha p / 2) (p - 1 + e^-p)
    over p from 0 to u.
    """
    limit, _, _, u, half, ratio = _coordinates(x, alpha)
    small = (u < 1) & (jnp.abs(ratio * half) < 1)
    middle = ~small & (jnp.abs(alpha - 2) < 1)
    slope = jnp.zeros_like(x)
    for chosen, part, other in (
        (small, _slope_by_quadrature, 0),
        (middle, _slope_near_two, 2),
        (~small & ~middle, _slope_in_closed_form, 0),
    ):
        chosen &= ~limit
        value = part(jnp.where(chosen, x, 0), jnp.where(chosen, alpha, other))
        slope = jnp.where(chosen, value, slope)
    return slope


def _slope_by_quadrature(x: Array, alpha: Array) -> Array:
    # Gauss and Legendre: positive terms only, where the closed forms cancel.
    _, _, _, u, half, ratio = _coordinates(x, alpha)
    w = ratio * half
    total = jnp.zeros_like(x)
    for node, weight in zip(*np.polynomial.legendre.leggauss(8), strict=True):
        p = 0.5 + 0.5 * float(node)
        total += float(weight) / 2 * p**2 * _phi(-p * u) * jnp.exp(p * w)
    return 0.5 * half * u**2 * total


def _slope_near_two(x: Array, alpha: Array) -> Array:
    _, side, b, u, half, _ = _coordinates(x, alpha)
    pull, growth = _pull(x, alpha), 0.5 * (u + jnp.expm1(-u))
    square = x * (x * pull) * (growth - 1 / alpha)
    return (square + b * pull * growth + 2 * side / alpha * jnp.expm1(side * half)) / alpha


def _slope_in_closed_form(x: Array, alpha: Array) -> Array:
    _, side, _, u, half, ratio = _coordinates(x, alpha)
    w = ratio * half
    small = jnp.abs(w) < 1
    inner, outer = jnp.where(small, w, 0), jnp.where(small, 1, w)
    # u^2 (phi(-u) e^w - d/dw ((e^w - 1) / w)), once by series, once with e^w taken out
    near = _phi(-u) * jnp.exp(inner) - 1 - (inner - 1) * _phi(inner)
    far = jnp.exp(outer) * (_phi(-u) - (outer - 1) / outer**2) - 1 / outer**2
    return 0.5 * side * safe_mul(u**2, jnp.where(small, near, far))


def _phi(z: Array) -> Array:
    """(e^z - 1 - z) / z^2."""
    small = jnp.abs(z) < 1
    inner, outer = jnp.where(small, z, 0), jnp.where(small, 1, z)
    series = horner([1 / math.factorial(k + 2) for k in range(17)], inner)
    return jnp.where(small, series, (jnp.expm1(outer) - outer) / outer**2)


_PAIR = dict(pred=draw_normal("B C"), target=draw_normal("B C"))

CASES = (
    Case(general_robust_loss, _PAIR, zero_at_target=True),
    *(
        Case(
            general_robust_loss,
            _PAIR,
            dict(alpha=alpha, scale=scale),
            f"alpha {alpha}",
            zero_at_target=True,
        )
        for alpha, scale in ((-math.inf, 2.0), (-2.0, 0.7), (0.0, 0.6), (1.7, 0.5), (2.0, 3.0))
    ),
    Case(cauchy_loss, _PAIR, dict(scale=0.7), zero_at_target=True),
    Case(geman_mcclure_loss, _PAIR, dict(scale=0.7), zero_at_target=True),
    Case(welsch_loss, _PAIR, dict(scale=1.5), zero_at_target=True),
    Case(tukey_biweight_loss, _PAIR, dict(cutoff=3.0), zero_at_target=True),
)
