"""Elementwise losses between a prediction and a target, and their relative forms."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal, draw_uniform
from .._core.checks import check_float, check_min_rank, check_same_shape, require
from .._core.compiled import compiled
from .._core.numerics import absolute, numbers, safe_div, safe_norm, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "absolute_error",
    "absolute_percentage_error",
    "l2_loss",
    "log_cosh",
    "log_cosh_loss",
    "mae",
    "mape",
    "mse",
    "msle",
    "rmse",
    "root_mean_squared_error",
    "smape",
    "squared_error",
    "squared_logarithmic_error",
    "symmetric_absolute_percentage_error",
]


@compiled()
def squared_error(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared error, in the squared unit of the target; without a factor 1/2.

    $$ \ell = (\hat y - y)^2 $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`; integers are taken as numbers.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Gauss, Theoria motus corporum coelestium, 1809. Equals torch's `mse_loss`.

    >>> squared_error(jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0]))
    Array(5., dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    return reduce((pred - target) ** 2, where=where, weights=weights, reduction=reduction)


mse = squared_error


@compiled()
def l2_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Half the squared error (factor 1/2), in the squared unit of the target.

    $$ \ell = \tfrac{1}{2} (\hat y - y)^2 $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Gauss, Theoria motus corporum coelestium, 1809. Equals `optax.l2_loss`.

    >>> l2_loss(jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0]))
    Array(2.5, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    return reduce(0.5 * (pred - target) ** 2, where=where, weights=weights, reduction=reduction)


@compiled()
def absolute_error(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Absolute error, in the unit of the target.

    $$ \ell = |\hat y - y| $$

    The gradient at equality is 0.

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Laplace, Mémoire sur la probabilité des causes, 1774. Equals torch's `l1_loss`.

    >>> absolute_error(jnp.array([1.0, -3.0]), jnp.array([0.0, 0.0]))
    Array(2., dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    return reduce(absolute(pred - target), where=where, weights=weights, reduction=reduction)


mae = absolute_error


@compiled()
def log_cosh(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Logarithm of the hyperbolic cosine of the error, from 0 up: square near 0, absolute far out.

    $$ \ell = \log \cosh (\hat y - y) $$

    Args:
        pred: Predictions, in a unit in which an error of 1 separates small from large.
        target: Same shape and unit as `pred`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Green, Bayesian reconstructions from emission tomography data, IEEE TMI 1990. Equals
        `optax.log_cosh`, which loses accuracy below an error of 0.01.

    >>> log_cosh(jnp.array([2.0]), jnp.array([0.0]))
    Array(1.3250027, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    values = _log_cosh(pred - target)
    return reduce(values, where=where, weights=weights, reduction=reduction)


log_cosh_loss = log_cosh


@jax.custom_jvp
def _log_cosh(error: Array) -> Array:
    # With u = exp(-|e|) - 1, cosh e = 1 + u^2 / (2 + 2u): exact near 0, where |e| - log 2 cancels.
    size = jnp.abs(error)
    u = jnp.expm1(-size)
    near = size < 1
    inner = jnp.where(near, u * u / jnp.where(near, 2 + 2 * u, 1), (1 + u) ** 2)
    return jnp.where(near, 0, size - math.log(2)) + jnp.log1p(inner)


@_log_cosh.defjvp
def _log_cosh_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (error,), (moved,) = primals, tangents
    return _log_cosh(error), jnp.tanh(error) * moved


@compiled()
def squared_logarithmic_error(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared difference of `log(1 + x)`: for positive quantities over several magnitudes.

    $$ \ell = (\log(1 + \hat y) - \log(1 + y))^2 $$

    A prediction of -1 costs infinity and one below -1 is NaN, in its own unit alone.

    Args:
        pred: Predictions above -1.
        target: Same shape and unit as `pred`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Hyndman and Koehler, Another look at measures of forecast accuracy, IJF 2006. Equals
        scikit-learn's `mean_squared_log_error`; Keras clips negative values first.

    >>> squared_logarithmic_error(jnp.array([1.0]), jnp.array([0.0]))  # (log 2)^2
    Array(0.48045295, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    require(lambda: pred >= -1, "pred", "values of at least -1", where)
    require(lambda: target >= -1, "target", "values of at least -1", where)
    values = (jnp.log1p(pred) - jnp.log1p(target)) ** 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


msle = squared_logarithmic_error


@compiled()
def absolute_percentage_error(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    floor: Number = 1e-7,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Absolute error as a fraction of the target (0.1 is ten percent).

    $$ \ell = \frac{|\hat y - y|}{\max(|y|, \text{floor})} $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        floor: Smallest denominator, in the unit of the target.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        de Myttenaere et al., Mean Absolute Percentage Error for regression models,
        Neurocomputing 2016. Equals scikit-learn's `mean_absolute_percentage_error` while
        `|target| > floor`; Keras multiplies by 100.

    >>> absolute_percentage_error(jnp.array([110.0]), jnp.array([100.0]))
    Array(0.1, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (floor,) = numbers(pred, floor=floor)
    values = safe_div(absolute(pred - target), jnp.maximum(absolute(target), floor))
    return reduce(values, where=where, weights=weights, reduction=reduction)


mape = absolute_percentage_error


@compiled()
def symmetric_absolute_percentage_error(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Absolute error as a fraction of the mean size of both values, in `[0, 2]`; 0/0 is 0.

    $$ \ell = \frac{2 |\hat y - y|}{|\hat y| + |y|} $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Makridakis, Accuracy measures, IJF 1993. Some texts halve it or multiply by 100.

    >>> symmetric_absolute_percentage_error(jnp.array([3.0]), jnp.array([1.0]))
    Array(1., dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    values = safe_div(2 * absolute(pred - target), absolute(pred) + absolute(target))
    return reduce(values, where=where, weights=weights, reduction=reduction)


smape = symmetric_absolute_percentage_error


@compiled()
def root_mean_squared_error(
    pred: Float[Array, "*batch features"],
    target: Shaped[Array, "*batch features"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Root of the mean squared error over the last axis, in the unit of the target.

    $$ \ell = \sqrt{\tfrac{1}{F} \sum_f (\hat y_f - y_f)^2} $$

    over the features that `where` keeps. The gradient of a perfect row is 0.

    Args:
        pred: Predictions `(*batch, features)`.
        target: Same shape and unit as `pred`.
        where: Bool array of the shape of `pred`; a row with no kept feature is no unit.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Hyndman and Koehler, Another look at measures of forecast accuracy, IJF 2006. Equals
        scikit-learn's `root_mean_squared_error` of the transposed arrays.

    >>> root_mean_squared_error(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 0.0]]))  # sqrt(25 / 2)
    Array(3.535534, dtype=float32)
    """
    check_float(pred=pred)
    check_min_rank(1, pred=pred)
    check_same_shape(pred=pred, target=target)
    if where is not None:
        check_same_shape(pred=pred, where=where)
    pred, target = mask(where, *widen(pred, target))
    count = pred.shape[-1] if where is None else jnp.sum(where, axis=-1, dtype=pred.dtype)
    values = safe_div(safe_norm(pred - target), jnp.sqrt(jnp.asarray(count, pred.dtype)))
    units = None if where is None else jnp.any(where, axis=-1)
    return reduce(values, where=units, weights=weights, reduction=reduction)


rmse = root_mean_squared_error

_PAIR = dict(pred=draw_normal("B C"), target=draw_normal("B C"))
_POSITIVE = dict(pred=draw_uniform("B C", 0.1, 5), target=draw_uniform("B C", 0.1, 5))

CASES = (
    Case(squared_error, _PAIR, zero_at_target=True),
    Case(l2_loss, _PAIR, zero_at_target=True),
    Case(absolute_error, _PAIR, zero_at_target=True),
    Case(log_cosh, _PAIR, zero_at_target=True),
    Case(squared_logarithmic_error, _POSITIVE, zero_at_target=True),
    Case(absolute_percentage_error, _POSITIVE, dict(floor=0.2), zero_at_target=True),
    Case(symmetric_absolute_percentage_error, _POSITIVE, zero_at_target=True),
    Case(root_mean_squared_error, _PAIR, positions="B C", zero_at_target=True),
)
