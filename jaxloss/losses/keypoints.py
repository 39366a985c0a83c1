"""Coordinates of keypoints: similarity scaled by the object, wing losses, residual likelihood."""

import math
from typing import Any

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
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison
from .._core.numerics import absolute, expm1, numbers, safe_div, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "COCO_SIGMAS",
    "gaussian_rle_loss",
    "oks_loss",
    "rle_loss",
    "soft_wing_loss",
    "wing_loss",
]

COCO_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035),  # nose, eyes, ears
    *(0.079, 0.079, 0.072, 0.072, 0.062, 0.062),  # shoulders, elbows, wrists
    *(0.107, 0.107, 0.087, 0.087, 0.089, 0.089),  # hips, knees, ankles
)


@compiled()
def oks_loss(
    pred: Float[Array, "*batch joints dim"],
    target: Shaped[Array, "*batch joints dim"],
    area: Shaped[Array, "*batch"],
    sigmas: Shaped[Array, " joints"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus the object keypoint similarity of each joint, in `[0, 1]`.

    $$ \ell_k = 1 - \exp\left( -\frac{|\hat y_k - y_k|^2}{2 \, s^2 \, (2 \sigma_k)^2} \right) $$

    with the area $s^2$ of the object in the squared unit of the coordinates. A joint far off has
    loss 1 and gradient 0, and so has every joint but a perfect one if the area is 0. A negative
    area makes the joints of its object NaN.

    Args:
        pred: Predicted coordinates.
        target: Annotated coordinates; `where` hides invisible joints.
        area: Area of each object, such as that of its segmentation or half that of its box.
        sigmas: Tolerance of each joint: `jnp.array(COCO_SIGMAS)` for people, else often
            `1 / joints`.

    One unit per joint; see `jaxloss.reduce`. The mean over objects of the mean over their visible
    joints is `reduction=jaxloss.sequence_mean`.

    Returns:
        A float32 scalar, or `*batch joints` if `reduction` is `"none"`.

    Reference:
        Maji et al., YOLO-Pose: Enhancing YOLO for Multi Person Pose Estimation Using Object
        Keypoint Similarity Loss, CVPRW 2022. `sequence_mean` equals ultralytics' `KeypointLoss`,
        except that an object without a visible joint counts as 0 there and not at all here. One
        minus the OKS of pycocotools is its value for one object.

    >>> pred, target = jnp.array([[[2.0, 1.0]]]), jnp.array([[[1.0, 1.0]]])
    >>> oks_loss(pred, target, jnp.array([0.5]), jnp.array([0.5]))  # 1 - exp(-1)
    Array(0.63212055, dtype=float32)
    """
    check_float(pred=pred)
    check_min_rank(2, pred=pred)
    check_same_shape(pred=pred, target=target)
    check_shape(pred.shape[:-2], area=area)
    check_shape(pred.shape[-2:-1], sigmas=sigmas)
    require(lambda: jnp.asarray(area) >= 0, "area", "values of at least 0")
    require(lambda: jnp.asarray(sigmas) > 0, "sigmas", "positive values")
    pred, target, area, sigmas = widen(pred, target, area, sigmas)
    area = jnp.broadcast_to(area[..., None], pred.shape[:-1])
    pred, target, area = mask(where, pred, target, area)
    error = pred - target
    area = poison(area, area >= 0)
    spread = 2 * area * (2 * sigmas.reshape((1,) * (area.ndim - 1) + (-1,))) ** 2
    reach = 30 * safe_sqrt(spread)  # beyond it the exponential is 0, and the square may overflow
    far = jnp.any(absolute(error) > reach[..., None], axis=-1)
    square = jnp.sum(jnp.where(far[..., None], 0, error) ** 2, axis=-1)
    values = jnp.where(far, 1, -expm1(-safe_div(square, spread)))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def wing_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    width: Number = 10.0,
    curvature: Number = 2.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Logarithm of small errors, absolute value of large ones, from 0 up, in units of the error.

    $$ \ell = \begin{cases} w \log(1 + |e| / \epsilon) & |e| < w \\
       |e| - w + w \log(1 + w / \epsilon) & \text{otherwise} \end{cases}
       \qquad e = \hat y - y $$

    The slope is steepest, $w / \epsilon$, next to 0, where small errors still matter; at 0 it is
    taken as 0.

    Args:
        pred: Predicted coordinates.
        target: Same shape and unit as `pred`.
        width: Error $w$ up to which the loss is logarithmic.
        curvature: $\epsilon > 0$: the smaller, the more the loss bends.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Feng et al., Wing Loss for Robust Facial Landmark Localisation with Convolutional Neural
        Networks, CVPR 2018. Equals segmentation_models_pytorch's `wing_loss`, whose defaults are
        5 and 0.5. mmpose adds up joints and axes before it averages over the batch.

    >>> error = jnp.array([2.0, 11.0])
    >>> wing_loss(error, jnp.zeros(2), width=1.0, curvature=1.0, reduction="none")  # 10 + log 2
    Array([ 1.6931472, 10.693148 ], dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    width, curvature = numbers(pred, width=width, curvature=curvature)
    require(lambda: curvature > 0, "curvature", "a positive value")
    size = absolute(pred - target)
    near = size < width
    log = width * jnp.log1p(jnp.where(near, size, 0) / curvature)
    line = size - width + width * jnp.log1p(width / curvature)
    values = jnp.where(near, log, line)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def soft_wing_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    inner: Number = 2.0,
    outer: Number = 20.0,
    curvature: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Absolute value of small errors, logarithm of larger ones, from 0 up.

    $$ \ell = \begin{cases} |e| & |e| < \omega_1 \\
       \omega_1 + \omega_2 \log \frac{\epsilon + |e|}{\epsilon + \omega_1} & \text{otherwise}
       \end{cases} \qquad e = \hat y - y $$

    Unlike the wing loss it does not magnify the smallest errors, which are mostly those of the
    annotation. The gradient at 0 is 0.

    Args:
        pred: Predicted coordinates.
        target: Same shape and unit as `pred`.
        inner: Error $\omega_1$ up to which the loss is absolute.
        outer: Factor $\omega_2$ of the logarithm.
        curvature: $\epsilon$: the smaller, the more the loss bends.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Lin et al., Structure-Coherent Deep Feature Learning for Robust Face Alignment, IEEE
        Transactions on Image Processing 2021. The units of mmpose's `SoftWingLoss`, which adds up
        joints and axes before it averages over the batch.

    >>> soft_wing_loss(jnp.array([1.0, 2.0]), jnp.zeros(2), reduction="none")
    Array([1., 2.], dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    inner, outer, curvature = numbers(pred, inner=inner, outer=outer, curvature=curvature)
    require(lambda: curvature + inner > 0, "curvature", "a value above -inner")
    size = absolute(pred - target)
    near = size < inner
    beyond = jnp.where(near, 0, size - inner)
    values = jnp.where(near, size, inner + outer * jnp.log1p(beyond / (curvature + inner)))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def rle_loss(
    pred: Float[Array, "*batch joints dim"],
    log_sigma: Float[Array, "*batch joints dim"],
    target: Shaped[Array, "*batch joints dim"],
    flow_log_prob: Shaped[Array, "..."],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Residual log-likelihood of each joint under a flow times a Laplace distribution, in nats.

    $$ \ell = \sum_i \left( \log \sigma_i - \log \phi_i(z)
       + \log 2 \sigma_i + |z_i| \right), \qquad z = \frac{\hat y - y}{\sigma} $$

    The scale enters twice, once for the flow and once for the Laplace distribution whose residual
    the flow learns.

    Args:
        pred: Predicted coordinates.
        log_sigma: Logarithm of the predicted scale of each coordinate.
        target: Annotated coordinates; `where` hides invisible joints.
        flow_log_prob: $\log \phi$ of the normalising flow, evaluated by the caller at $z$: of the
            shape of `pred`, or one for each joint, then subtracted once for each coordinate.

    One unit per joint; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch joints` if `reduction` is `"none"`.

    Reference:
        Li et al., Human Pose Regression with Residual Log-likelihood Estimation, ICCV 2021. The
        units of mmpose's `RLELoss`, which passes the network's output through a sigmoid to get
        the scale and divides the sum by the batch.

    >>> pred, zero = jnp.array([[[3.0, -4.0]]]), jnp.zeros((1, 1, 2))
    >>> rle_loss(pred, zero, zero, zero)  # 2 log 2 + 3 + 4
    Array(8.386294, dtype=float32)
    """
    z, log_sigma, flow = _residual(pred, log_sigma, target, flow_log_prob, where)
    terms = 2 * log_sigma + math.log(2) + absolute(z) - flow
    return reduce(jnp.sum(terms, axis=-1), where=where, weights=weights, reduction=reduction)


@compiled()
def gaussian_rle_loss(
    pred: Float[Array, "*batch joints dim"],
    log_sigma: Float[Array, "*batch joints dim"],
    target: Shaped[Array, "*batch joints dim"],
    flow_log_prob: Shaped[Array, "..."],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Residual log-likelihood of each joint under a flow times a Gaussian, in nats.

    $$ \ell = \sum_i \left( \log \sigma_i - \log \phi_i(z)
       + \log \sqrt{2 \pi} \, \sigma_i + \tfrac{1}{2} z_i^2 \right),
       \qquad z = \frac{\hat y - y}{\sigma} $$

    Args:
        pred: Predicted coordinates.
        log_sigma: Logarithm of the predicted scale of each coordinate.
        target: Annotated coordinates; `where` hides invisible joints.
        flow_log_prob: As for `rle_loss`.

    One unit per joint; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch joints` if `reduction` is `"none"`.

    Reference:
        Li et al., Human Pose Regression with Residual Log-likelihood Estimation, ICCV 2021. The
        units of mmpose's `RLELoss(q_distribution="gaussian")`.

    >>> pred, zero = jnp.array([[[3.0, -4.0]]]), jnp.zeros((1, 1, 2))
    >>> gaussian_rle_loss(pred, zero, zero, zero)  # log(2 pi) + 9 / 2 + 16 / 2
    Array(14.337877, dtype=float32)
    """
    z, log_sigma, flow = _residual(pred, log_sigma, target, flow_log_prob, where)
    terms = 2 * log_sigma + 0.5 * math.log(2 * math.pi) + 0.5 * z**2 - flow
    return reduce(jnp.sum(terms, axis=-1), where=where, weights=weights, reduction=reduction)


def _residual(
    pred: Array, log_sigma: Array, target: Any, flow: Any, where: Where | None
) -> tuple[Array, Array, Array]:
    """Error over scale, logarithm of the scale and of the flow's density, of one shape."""
    check_float(pred=pred, log_sigma=log_sigma)
    check_min_rank(2, pred=pred)
    check_same_shape(pred=pred, log_sigma=log_sigma, target=target)
    check_array(flow_log_prob=flow)
    flow = jnp.asarray(flow)
    if flow.ndim == pred.ndim - 1:
        check_shape(pred.shape[:-1], flow_log_prob=flow)
        flow = flow[..., None]
    else:
        check_shape(pred.shape, flow_log_prob=flow)
    arrays = widen(pred, log_sigma, target, flow)
    pred, log_sigma, target, flow = mask(where, *arrays)
    largest = 0.99 * math.log(jnp.finfo(pred.dtype).max)  # its exponential is finite
    z = (pred - target) * jnp.exp(jnp.minimum(-log_sigma, largest))
    return z, log_sigma, jnp.broadcast_to(flow, pred.shape)


def _log_scales(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
    return g.uniform(-3, 1, shape)


def _largest_scales(x: Any) -> tuple[Any, ...]:
    return np.full_like(x, -30), np.full_like(x, 30)


_PAIR = dict(pred=draw_normal("B T D"), target=draw_normal("B T D"))
_FLOW = dict(
    pred=draw_normal("B T D"),
    log_sigma=Draw("B T D", _log_scales, "bounded", _largest_scales),
    target=draw_normal("B T D"),
)
_JOINTS = dict(T=4, D=2)

CASES = (
    Case(
        oks_loss,
        dict(**_PAIR, area=draw_uniform("B", 1, 3), sigmas=draw_uniform("T", 3, 6)),
        sizes=_JOINTS,
        zero_at_target=True,
    ),
    Case(wing_loss, _PAIR, sizes=_JOINTS, zero_at_target=True),
    Case(
        wing_loss,
        _PAIR,
        dict(width=0.7, curvature=0.3),
        "narrow",
        sizes=_JOINTS,
        zero_at_target=True,
    ),
    Case(
        soft_wing_loss,
        _PAIR,
        dict(inner=0.4, outer=3.0, curvature=0.2),
        sizes=_JOINTS,
        zero_at_target=True,
    ),
    Case(rle_loss, dict(**_FLOW, flow_log_prob=draw_normal("B T D")), sizes=_JOINTS),
    Case(rle_loss, dict(**_FLOW, flow_log_prob=draw_normal("B T")), label="joint", sizes=_JOINTS),
    Case(gaussian_rle_loss, dict(**_FLOW, flow_log_prob=draw_normal("B T D")), sizes=_JOINTS),
)
