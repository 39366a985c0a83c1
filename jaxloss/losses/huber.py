"""Losses that are square near the target and absolute far from it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal
from .._core.checks import check_float, check_same_shape, require
from .._core.compiled import compiled
from .._core.numerics import absolute, horner, numbers, safe_div, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "balanced_l1_loss",
    "charbonnier_loss",
    "huber_loss",
    "pseudo_huber_loss",
    "smooth_l1_loss",
]


@compiled()
def huber_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    delta: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Half the squared error up to `delta`, linear with slope `delta` beyond, from 0 up.

    $$ \ell = \begin{cases} \tfrac{1}{2} e^2 & |e| \le \delta \\
       \delta (|e| - \tfrac{1}{2} \delta) & \text{otherwise} \end{cases},
       \qquad e = \hat y - y $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        delta: Largest error that counts as an inlier, in the unit of the target; `inf` gives
            `l2_loss`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Huber, Robust Estimation of a Location Parameter, Annals of Mathematical Statistics 1964.
        Equals torch's, optax's and Keras' Huber loss. torch divides weighted means by the number
        of elements; here the sum of the weights divides.

    >>> huber_loss(jnp.array([2.0]), jnp.array([0.0]), delta=0.5)  # 0.5 (2 - 0.25)
    Array(0.875, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (delta,) = numbers(pred, delta=delta)
    require(lambda: delta >= 0, "delta", "a value of at least 0")
    error = pred - target
    slope = jnp.clip(error, -delta, delta)
    values = slope * (error - 0.5 * slope)  # e^2 / 2 inside, as the slope is e there
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def smooth_l1_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    beta: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Absolute error with a rounded tip of width `beta`, in the unit of the target, from 0 up.

    $$ \ell = \begin{cases} \tfrac{1}{2} e^2 / \beta & |e| < \beta \\
       |e| - \tfrac{1}{2} \beta & \text{otherwise} \end{cases},
       \qquad e = \hat y - y $$

    This is `huber_loss(delta=beta) / beta`; the slope far out is 1 whatever `beta`.

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        beta: Where the square ends, in the unit of the target; 0 gives `absolute_error`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Girshick, Fast R-CNN, ICCV 2015. Equals torch's `smooth_l1_loss`, `beta=0` included.
        keras_cv's `SmoothL1Loss` jumps at its cutoff unless that is 1.

    >>> smooth_l1_loss(jnp.array([2.0]), jnp.array([0.0]), beta=0.5)  # 2 - 0.25
    Array(1.75, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (beta,) = numbers(pred, beta=beta)
    require(lambda: beta >= 0, "beta", "a value of at least 0")
    error = pred - target
    inside = jnp.abs(error) < beta
    inner = jnp.where(inside, error, 0)
    square = 0.5 * inner * (inner / jnp.where(inside, beta, 1))
    values = jnp.where(inside, square, absolute(error) - 0.5 * beta)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def charbonnier_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    eps: Number = 1e-3,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Absolute error smoothed at its tip, in the unit of the target, from `eps` up.

    $$ \ell = \sqrt{(\hat y - y)^2 + \epsilon^2} $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        eps: Radius of the tip and value at equality; 0 gives `absolute_error`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Charbonnier et al., Two deterministic half-quadratic regularization algorithms for
        computed imaging, ICIP 1994; Lai et al., Deep Laplacian Pyramid Networks, CVPR 2017.
        BasicSR adds its `eps` unsquared: `eps` here is the root of `eps` there. kornia's
        `charbonnier_loss` is `pseudo_huber_loss(delta=1)`.

    >>> charbonnier_loss(jnp.array([3.0]), jnp.array([0.0]), eps=4.0)
    Array(5., dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (eps,) = numbers(pred, eps=eps)
    values = _hypot(pred - target, eps)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def pseudo_huber_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    delta: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Huber's loss without a kink in any derivative: slope up to `delta`, from 0 up.

    $$ \ell = \delta^2 \left( \sqrt{1 + (\hat y - y)^2 / \delta^2} - 1 \right) $$

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        delta: Error around which square turns into absolute, in the unit of the target.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Charbonnier et al., Deterministic edge-preserving regularization in computed imaging, IEEE
        TIP 1997. Equals `scipy.special.pseudo_huber`, and kornia's `charbonnier_loss` at
        `delta=1`.

    >>> pseudo_huber_loss(jnp.array([4.0]), jnp.array([0.0]), delta=3.0)  # 9 (5/3 - 1)
    Array(6., dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    (delta,) = numbers(pred, delta=delta)
    require(lambda: delta >= 0, "delta", "a value of at least 0")
    values = delta * _excess(pred - target, delta)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def balanced_l1_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    alpha: Number = 0.5,
    gamma: Number = 1.5,
    beta: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Smooth absolute error that lifts the gradient of small errors, from 0 up; for boxes.

    $$ \ell = \begin{cases}
       \tfrac{\alpha \beta}{b} (1 + t) \log(1 + t) - \alpha |e|, \quad t = b |e| / \beta
       & |e| < \beta \\
       \gamma |e| + \gamma \beta / b - \alpha \beta & \text{otherwise} \end{cases},
       \qquad b = e^{\gamma / \alpha} - 1 $$

    The slope is $\alpha \log(1 + t)$ inside and $\gamma$ outside, so both pieces meet smoothly.

    Args:
        pred: Predictions.
        target: Same shape and unit as `pred`.
        alpha: Larger values flatten the gradient of small errors.
        gamma: Slope of large errors.
        beta: Error at which the slope reaches `gamma`, in the unit of the target.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Pang et al., Libra R-CNN: Towards Balanced Learning for Object Detection, CVPR 2019.
        mmdetection leaves `beta` out of two places, so its slope jumps there unless `beta=1`.

    >>> error = jnp.array([1.0, 2.0])  # beyond beta a step of 1 costs gamma
    >>> near, far = balanced_l1_loss(error, jnp.zeros(2), reduction="none")
    >>> far - near
    Array(1.5, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    alpha, gamma, beta = numbers(pred, alpha=alpha, gamma=gamma, beta=beta)
    for name, value in dict(alpha=alpha, gamma=gamma, beta=beta).items():
        require(lambda value=value: value > 0, name, "a positive value")
    error = absolute(pred - target)
    inside = error < beta
    b = jnp.expm1(gamma / alpha)
    near = alpha * beta / b * _integral_of_log1p(b * jnp.where(inside, error, 0) / beta)
    values = jnp.where(inside, near, gamma * error + gamma * beta / b - alpha * beta)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _hypot(x: Array, y: Array) -> Array:
    """sqrt(x^2 + y^2) without overflow; at the origin it is 0 with zero gradient."""
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.abs(x), jnp.abs(y)))
    scale = jnp.where((largest == 0) | ~jnp.isfinite(largest), 1, largest)
    return safe_sqrt((x / scale) ** 2 + (y / scale) ** 2) * scale


def _excess(x: Array, y: Array) -> Array:
    """sqrt(x^2 + y^2) - y for y >= 0, without cancellation in value or gradient."""
    far = jnp.abs(x) > 2 * y
    inner = jnp.where(far, 0, x)
    near = inner * safe_div(inner, _hypot(inner, y) + y)
    return jnp.where(far, _hypot(jnp.where(far, x, 0), y) - y, near)


def _integral_of_log1p(t: Array) -> Array:
    """(1 + t) log(1 + t) - t for t >= 0."""
    # The terms cancel near 0; with s = t / (2 + t) = tanh(log(1 + t) / 2) the same value is
    # t log(1 + t) / 2 + (2 + t) (atanh s - s), and the power series of the last bracket does not.
    small = t < 1
    s = jnp.where(small, t, 0) / (2 + t)
    series = horner([1 / (2 * k + 3) for k in range(16)], s**2)
    near = 0.5 * t * jnp.log1p(t) + (2 + t) * s**3 * series
    wide = jnp.where(small, 1, t)
    return jnp.where(small, near, (1 + wide) * jnp.log1p(wide) - wide)


_PAIR = dict(pred=draw_normal("B C"), target=draw_normal("B C"))

CASES = (
    Case(huber_loss, _PAIR, zero_at_target=True),
    Case(huber_loss, _PAIR, dict(delta=0.7), "delta", zero_at_target=True),
    Case(smooth_l1_loss, _PAIR, zero_at_target=True),
    Case(smooth_l1_loss, _PAIR, dict(beta=0.4), "beta", zero_at_target=True),
    Case(smooth_l1_loss, _PAIR, dict(beta=0.0), "absolute", zero_at_target=True),
    Case(charbonnier_loss, _PAIR, minimum=True),
    Case(charbonnier_loss, _PAIR, dict(eps=0.3), "eps", minimum=True),
    Case(charbonnier_loss, _PAIR, dict(eps=0.0), "absolute", zero_at_target=True),
    Case(pseudo_huber_loss, _PAIR, zero_at_target=True),
    Case(pseudo_huber_loss, _PAIR, dict(delta=0.3), "delta", zero_at_target=True),
    Case(balanced_l1_loss, _PAIR, zero_at_target=True),
    Case(
        balanced_l1_loss,
        _PAIR,
        dict(alpha=0.8, gamma=1.2, beta=1.6),
        "wide",
        zero_at_target=True,
    ),
)
