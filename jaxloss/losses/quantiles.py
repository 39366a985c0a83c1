"""Asymmetric and insensitive losses: quantiles, expectiles and tubes around the target."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal, draw_uniform
from .._core.checks import check_float, check_min_rank, check_same_shape, require
from .._core.compiled import compiled
from .._core.numerics import absolute, numbers, safe_div, widen
from .._core.pinball import mean_pinball, pinball
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "epsilon_insensitive_loss",
    "expectile_loss",
    "multi_quantile_loss",
    "quantile_crossing_penalty",
    "quantile_huber_loss",
    "quantile_loss",
    "squared_epsilon_insensitive_loss",
]


@compiled()
def quantile_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    quantile: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Pinball loss, in the unit of the target: its minimiser is a quantile of the target.

    $$ \ell = \max(q d, (q - 1) d), \qquad d = y - \hat y $$

    The gradient at equality is 0. The median, $q = 0.5$, is half the `absolute_error`.

    Args:
        pred: Predicted quantile.
        target: Same shape and unit as `pred`.
        quantile: Share of targets that should lie below the prediction, in `[0, 1]`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Koenker and Bassett, Regression Quantiles, Econometrica 1978. Equals scikit-learn's
        `mean_pinball_loss`, whose `alpha` is `quantile`.

    >>> quantile_loss(jnp.array([1.0]), jnp.array([3.0]), quantile=0.75)  # 2 too low
    Array(1.5, dtype=float32)
    >>> quantile_loss(jnp.array([3.0]), jnp.array([1.0]), quantile=0.75)  # 2 too high
    Array(0.5, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (quantile,) = numbers(pred, quantile=quantile)
    require(lambda: (quantile >= 0) & (quantile <= 1), "quantile", "a value in [0, 1]")
    values = pinball(target - pred, quantile)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def multi_quantile_loss(
    pred: Float[Array, "*shape q"],
    target: Shaped[Array, "*shape"],
    quantiles: Float[Array, " q"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean pinball loss of several predicted quantiles, in the unit of the target.

    $$ \ell = \frac{1}{Q} \sum_k \max(q_k d_k, (q_k - 1) d_k), \qquad d_k = y - \hat y_k $$

    Crossing quantiles are not punished: add `quantile_crossing_penalty(pred)`. Twice this loss is
    `crps_quantile`.

    Args:
        pred: Predicted quantiles `(*shape, q)`.
        target: One value for each row of `pred`, in its unit.
        quantiles: The levels, each in `[0, 1]`, in the order of the last axis of `pred`.

    One unit per target; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Wen et al., A Multi-Horizon Quantile Recurrent Forecaster, NeurIPS time series workshop
        2017, which sums over the quantiles.

    >>> pred, levels = jnp.array([[1.0, 4.0]]), jnp.array([0.25, 0.75])
    >>> multi_quantile_loss(pred, jnp.array([3.0]), levels)  # (0.25 * 2 + 0.25 * 1) / 2
    Array(0.375, dtype=float32)
    """
    values = mean_pinball(pred, target, quantiles, where)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def quantile_crossing_penalty(
    pred: Float[Array, "*shape q"],
    *,
    margin: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""How far predicted quantiles are out of order, in the unit of the target, from 0 up.

    $$ \ell = \frac{1}{Q - 1} \sum_k \max(0, \hat y_k - \hat y_{k+1} + \delta) $$

    To be added to `multi_quantile_loss` or `crps_quantile`. One quantile cannot cross: 0.

    Args:
        pred: Predicted quantiles `(*shape, q)`, of ascending levels.
        margin: Least distance $\delta$ between neighbours that costs nothing.

    One unit per row of quantiles; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Wen et al., A Multi-Horizon Quantile Recurrent Forecaster, NeurIPS time series workshop
        2017, on the crossing of quantiles.

    >>> quantile_crossing_penalty(jnp.array([[1.0, 4.0, 3.0]]))  # (0 + 1) / 2
    Array(0.5, dtype=float32)
    """
    check_float(pred=pred)
    check_min_rank(1, pred=pred)
    (pred,) = mask(where, *widen(pred))
    (margin,) = numbers(pred, margin=margin)
    require(lambda: margin >= 0, "margin", "a value of at least 0")
    costs = jax.nn.relu(pred[..., :-1] - pred[..., 1:] + margin)
    values = jnp.sum(costs, axis=-1) / max(costs.shape[-1], 1)
    if where is not None:
        (values,) = mask(where, values)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def quantile_huber_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    quantile: Number = 0.5,
    delta: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Pinball loss with a rounded tip of half-width `delta`, in the unit of the target, from 0 up.

    $$ \ell = |q - [d < 0]| \begin{cases} \tfrac{1}{2} d^2 / \delta & |d| \le \delta \\
       |d| - \tfrac{1}{2} \delta & \text{otherwise} \end{cases}, \qquad d = y - \hat y $$

    Args:
        pred: Predicted quantile.
        target: Same shape and unit as `pred`.
        quantile: Share of targets that should lie below the prediction, in `[0, 1]`.
        delta: Where the square ends, in the unit of the target; 0 gives `quantile_loss`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Dabney et al., Distributional Reinforcement Learning with Quantile Regression, AAAI 2018,
        which compares every quantile with every sample of the target. rlax's
        `quantile_regression_loss` is `delta` times this, summed over the quantiles.

    >>> quantile_huber_loss(jnp.array([1.0]), jnp.array([3.0]), quantile=0.75)  # 0.75 (2 - 0.5)
    Array(1.125, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    quantile, delta = numbers(pred, quantile=quantile, delta=delta)
    require(lambda: (quantile >= 0) & (quantile <= 1), "quantile", "a value in [0, 1]")
    require(lambda: delta >= 0, "delta", "a value of at least 0")
    short = target - pred
    inside = jnp.abs(short) < delta
    square = 0.5 * safe_div(jnp.where(inside, short, 0), delta) * short
    cost = jnp.where(inside, square, absolute(short) - 0.5 * delta)
    values = jnp.where(short < 0, 1 - quantile, quantile) * cost
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def expectile_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    expectile: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared error that weighs the two sides differently, in the squared unit of the target.

    $$ \ell = |\tau - [\hat y > y]| \, (\hat y - y)^2 $$

    Its minimiser is the expectile of level $\tau$; $\tau = 0.5$ is half the `squared_error`.

    Args:
        pred: Predicted expectile.
        target: Same shape and unit as `pred`.
        expectile: The level, in `[0, 1]`: the weight of predictions that are too low.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Newey and Powell, Asymmetric Least Squares Estimation and Testing, Econometrica 1987.

    >>> expectile_loss(jnp.array([1.0]), jnp.array([3.0]), expectile=0.75)  # 2 too low
    Array(3., dtype=float32)
    >>> expectile_loss(jnp.array([3.0]), jnp.array([1.0]), expectile=0.75)  # 2 too high
    Array(1., dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (expectile,) = numbers(pred, expectile=expectile)
    require(lambda: (expectile >= 0) & (expectile <= 1), "expectile", "a value in [0, 1]")
    error = pred - target
    values = jnp.where(error > 0, 1 - expectile, expectile) * error**2
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def epsilon_insensitive_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    epsilon: Number = 0.1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Absolute error beyond a tube of half-width `epsilon`, in the unit of the target.

    $$ \ell = \max(0, |\hat y - y| - \epsilon) $$

    The gradient inside the tube and on its border is 0.

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        epsilon: Largest error that costs nothing; 0 gives `absolute_error`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Vapnik, The Nature of Statistical Learning Theory, 1995. The loss of scikit-learn's
        `SVR` and of `SGDRegressor(loss="epsilon_insensitive")`.

    >>> epsilon_insensitive_loss(jnp.array([2.0]), jnp.array([0.0]), epsilon=0.5)
    Array(1.5, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (epsilon,) = numbers(pred, epsilon=epsilon)
    require(lambda: epsilon >= 0, "epsilon", "a value of at least 0")
    values = jax.nn.relu(absolute(pred - target) - epsilon)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def squared_epsilon_insensitive_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    epsilon: Number = 0.1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared error beyond a tube of half-width `epsilon`, in the squared unit of the target.

    $$ \ell = \max(0, |\hat y - y| - \epsilon)^2 $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        epsilon: Largest error that costs nothing; 0 gives `squared_error`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Vapnik, The Nature of Statistical Learning Theory, 1995. The loss of scikit-learn's
        `SGDRegressor(loss="squared_epsilon_insensitive")`.

    >>> squared_epsilon_insensitive_loss(jnp.array([2.0]), jnp.array([0.0]), epsilon=0.5)
    Array(2.25, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (epsilon,) = numbers(pred, epsilon=epsilon)
    require(lambda: epsilon >= 0, "epsilon", "a value of at least 0")
    values = jax.nn.relu(absolute(pred - target) - epsilon) ** 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


_PAIR = dict(pred=draw_normal("B C"), target=draw_normal("B C"))
_QUANTILES = dict(
    pred=draw_normal("B C V"), target=draw_normal("B C"), quantiles=draw_uniform("V", 0.1, 0.9)
)

CASES = (
    Case(quantile_loss, _PAIR, zero_at_target=True),
    Case(quantile_loss, _PAIR, dict(quantile=0.8), "high", zero_at_target=True),
    Case(multi_quantile_loss, _QUANTILES),
    Case(quantile_crossing_penalty, dict(pred=draw_normal("B C V")), dict(margin=0.1)),
    Case(quantile_huber_loss, _PAIR, dict(quantile=0.8, delta=0.4), zero_at_target=True),
    Case(expectile_loss, _PAIR, dict(expectile=0.3), zero_at_target=True),
    Case(epsilon_insensitive_loss, _PAIR, dict(epsilon=0.4), zero_at_target=True),
    Case(epsilon_insensitive_loss, _PAIR, dict(epsilon=0.0), "absolute", zero_at_target=True),
    Case(squared_epsilon_insensitive_loss, _PAIR, dict(epsilon=0.4), zero_at_target=True),
)
