"""Further box losses: powers, focus, corners, Gaussians and auxiliary boxes around IoU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.boxes import (
    Sides,
    distance_cost,
    iou_cost,
    log_iou,
    overlap,
    prepare_boxes,
    share,
    sides,
)
from .._core.case import Case, draw_boxes
from .._core.checks import message
from .._core.compiled import compiled
from .._core.numerics import absolute, expm1, numbers, safe_div, safe_norm
from .._core.reduce import reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "alpha_iou_loss",
    "bounded_iou_loss",
    "extended_iou_loss",
    "inner_iou_loss",
    "mpd_iou_loss",
    "nwd_loss",
    "shape_iou_loss",
    "wise_iou_loss",
]


@compiled()
def alpha_iou_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    alpha: Number = 3.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus a power of IoU, in `[0, 1]`: above 1 it stresses boxes that fit well.

    $$ \ell = 1 - \mathrm{IoU}^\alpha $$

    The gradient of disjoint boxes is 0. `alpha=1` is `iou_loss`, `alpha=2` `squared_iou_loss`.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.
        alpha: The power, above 0.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        He et al., Alpha-IoU: A Family of Power Intersection over Union Losses for Bounding Box
        Regression, NeurIPS 2021.

    >>> pred, target = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 1.0]])
    >>> alpha_iou_loss(pred, target)  # 1 - 1 / 8
    Array(0.875, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    (alpha,) = numbers(pred, alpha=alpha)
    logs = log_iou(overlap(sides(pred, target)))
    apart = logs == -jnp.inf
    values = jnp.where(apart, 1, -expm1(alpha * jnp.where(apart, 0, logs)))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def bounded_iou_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    beta: Number = 0.2,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Smooth L1 of four bounds of one minus IoU, from 0 up: centre, width and height apart.

    $$ \begin{aligned}
       \ell &= \sum_{t = w, h} f\left(\min\left(\frac{4 |d_t|}{t^* + 2 |d_t|}, 1\right)\right)
       + f\left(\frac{|t - t^*|}{\max(t, t^*)}\right) \\
       f(u) &= \frac{u^2}{2 \beta} \text{ for } u < \beta, \text{ else } u - \frac{\beta}{2}
       \end{aligned} $$

    with $d_w$ and $d_h$ the differences of the centres along width and height. Each of the four is
    one minus the best IoU that this coordinate alone allows.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.
        beta: Where the square ends, in `(0, 1]`.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Tychsen-Smith and Petersson, Improving Object Localization with Fitness NMS and Bounded IoU
        Loss, CVPR 2018. mmdetection's `bounded_iou_loss` keeps the four terms apart and adds 1e-3
        to the denominators.

    >>> bounded_iou_loss(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 2.0]]))
    Array(0., dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    (beta,) = numbers(pred, beta=beta)
    pair = sides(pred, target)
    shift = 4 * safe_div(pair.offset, pair.second + 2 * absolute(pair.offset))
    change = safe_div(pair.first - pair.second, jnp.maximum(pair.first, pair.second))
    shift, change = _bounded_l1(shift, beta), _bounded_l1(change, beta)
    values = jnp.sum(shift + change, axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _bounded_l1(error: Array, beta: Array) -> Array:
    """Smooth L1 of an error cut off at 1; signed, so that it is smooth at 0."""
    size = absolute(error)
    linear = jnp.where(size < 1, size, 1) - 0.5 * beta
    return jnp.where(size < beta, 0.5 * error**2 / beta, linear)


@compiled()
def extended_iou_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    smooth_point: Number = 0.1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Smooth L1 of one minus a signed IoU, in `[0, 2]`: disjoint boxes have a negative one.

    $$ \begin{aligned}
       \ell &= \frac{u^2}{2 s} \text{ for } u < s, \text{ else } u - \frac{s}{2}, \quad
       u = 1 - \frac{I}{|B| + |B^*| - I} \\
       I &= x_1 y_1 + \min(x_0, x_1) \min(y_0, y_1) - x_0 \max(y_0, y_1) - \max(x_0, x_1)\, y_0
       \end{aligned} $$

    with $(x_0, y_0)$ the larger low corner and $(x_1, y_1)$ the smaller high corner, seen from the
    low corner of the box around both: $I$ is the intersection, or minus what separates the boxes.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.
        smooth_point: Where the square ends.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Peng and Yu, A Systematic IoU-Related Method: Beyond Simplified Regression for Better
        Localization, IEEE Transactions on Image Processing 2021. mmdetection's `EIoULoss`.

    >>> pred, target = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 1.0]])
    >>> extended_iou_loss(pred, target)  # 0.5 - 0.05
    Array(0.45, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    (smooth_point,) = numbers(pred, smooth_point=smooth_point)
    pair = sides(pred, target)
    meet = jnp.all(pair.both > 0, axis=-1)
    error = jnp.where(meet, iou_cost(overlap(pair)), _signed_cost(pred, target, pair))
    square = 0.5 * error**2 / smooth_point
    values = jnp.where(error < smooth_point, square, error - 0.5 * smooth_point)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _signed_cost(a: Array, b: Array, pair: Sides) -> Array:
    """1 - I / (|B| + |B*| - I) where I is 0 or negative."""
    unit = jax.lax.stop_gradient(jnp.where(pair.hull == 0, 1, pair.hull))
    first, second = pair.first / unit, pair.second / unit
    low = absolute(a[..., :2] - b[..., :2]) / unit
    high = (jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])) / unit
    near, far = jnp.minimum(low, high), jnp.maximum(low, high)
    apart = low[..., 0] * far[..., 1] + far[..., 0] * low[..., 1]
    apart = apart - high[..., 0] * high[..., 1] - near[..., 0] * near[..., 1]
    areas = first[..., 0] * first[..., 1] + second[..., 0] * second[..., 1]
    return 1 + share(jax.nn.relu(apart), areas)


@compiled()
def inner_iou_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    ratio: Number = 0.75,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus the IoU of both boxes scaled about their centres, in `[0, 1]`.

    $$ \ell = 1 - \mathrm{IoU}(B_r, B_r^*) $$

    with the sides of $B_r$ those of $B$ times the ratio $r$. Smaller boxes have steeper gradients
    near the target, larger ones reach further.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.
        ratio: The ratio $r$, above 0; the paper takes 0.5 to 1.5.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Zhang et al., Inner-IoU: More Effective Intersection over Union Loss with Auxiliary Bounding
        Box, 2023.

    >>> pred, target = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 1.0]])
    >>> inner_iou_loss(pred, target, ratio=0.5)
    Array(0.8, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    (ratio,) = numbers(pred, ratio=ratio)
    pair = sides(pred, target)
    half, half_ref = 0.5 * ratio * pair.first, 0.5 * ratio * pair.second
    inner = jnp.concatenate([pair.offset - half, pair.offset + half], axis=-1)
    inner_ref = jnp.concatenate([-half_ref, half_ref], axis=-1)
    values = iou_cost(overlap(sides(inner, inner_ref)))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def mpd_iou_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    image_size: tuple[Number, Number],
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus IoU, plus the squared distances of both corners relative to the image.

    $$ \ell = 1 - \mathrm{IoU} + \frac{d_1^2 + d_2^2}{W^2 + H^2} $$

    with $d_1$ and $d_2$ the distances of the low and of the high corners.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.
        image_size: Height $H$ and width $W$ of the image, in the unit of the boxes.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Ma and Xu, MPDIoU: A Loss for Efficient and Accurate Bounding Box Regression, 2023.

    >>> pred, target = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 1.0]])
    >>> mpd_iou_loss(pred, target, image_size=(3, 4))  # 1/2 + 1/25
    Array(0.54, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    if len(image_size) != 2:
        raise ValueError(message("image_size", "two numbers, height and width", len(image_size)))
    diagonal = safe_norm(jnp.stack(numbers(pred, height=image_size[0], width=image_size[1])))
    corners = jnp.sum(((pred - target) / diagonal) ** 2, axis=-1)
    values = iou_cost(overlap(sides(pred, target))) + corners
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def nwd_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    constant: Number = 12.8,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Normalized Wasserstein distance of two boxes taken as Gaussians, in `[0, 1)`.

    $$ \ell = 1 - e^{-W_2 / C}, \quad
       W_2^2 = |d|^2 + \frac{(w - w^*)^2 + (h - h^*)^2}{4} $$

    with $d$ the difference of the centres. Not free of scale; made for objects of a few pixels. The
    gradient at equality is 0.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.
        constant: The constant $C$, about the mean size of the objects, in the unit of the boxes.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Wang et al., A Normalized Gaussian Wasserstein Distance for Tiny Object Detection, 2021.

    >>> pred, target = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[3.0, 4.0, 5.0, 6.0]])
    >>> nwd_loss(pred, target, constant=5.0)  # 1 - 1/e
    Array(0.63212055, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    (constant,) = numbers(pred, constant=constant)
    pair = sides(pred, target)
    parts = [pair.offset, 0.5 * (pair.first - pair.second)]
    values = -expm1(-safe_norm(jnp.concatenate(parts, axis=-1)) / constant)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def shape_iou_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    scale: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus IoU, plus costs of distance and shape weighted by the target, in `[0, 5]`.

    $$ \begin{aligned} \ell &= 1 - \mathrm{IoU} + \frac{q_h d_x^2 + q_w d_y^2}{c^2}
       + \tfrac{1}{2} \left(1 - e^{-q_h |w - w^*| / \max(w, w^*)}\right)^4
       + \tfrac{1}{2} \left(1 - e^{-q_w |h - h^*| / \max(h, h^*)}\right)^4 \\
       q_w &= \frac{2 (w^*)^s}{(w^*)^s + (h^*)^s}, \quad q_h = 2 - q_w \end{aligned} $$

    with $d$ the difference of the centres and $c$ the diagonal of the smallest box around both. A
    target without width or height counts as a square there.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.
        scale: The exponent $s$: how much errors along the shorter side of the target count; 0 for
            all alike.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Zhang and Zhang, Shape-IoU: More Accurate Metric Considering Bounding Box Shape and Scale,
        2023.

    >>> pred, target = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[2.0, 0.0, 4.0, 2.0]])
    >>> shape_iou_loss(pred, target)  # 1 - 0 + 4 / 20
    Array(1.2, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    (scale,) = numbers(pred, scale=scale)
    pair = sides(pred, target)
    across = _across_weights(pair.second, scale)
    ratio = safe_div(absolute(pair.first - pair.second), jnp.maximum(pair.first, pair.second))
    shape = 0.5 * jnp.sum((-jnp.expm1(-across * ratio)) ** 4, axis=-1)
    values = iou_cost(overlap(pair)) + distance_cost(pair, across) + shape
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _across_weights(size: Array, scale: Array) -> Array:
    """(q_h, q_w): what counts along x is the other side of the target, and the reverse."""
    flat = jnp.any(size == 0, axis=-1)
    width, height = jnp.where(flat, 1, size[..., 0]), jnp.where(flat, 1, size[..., 1])
    slimness = scale * (jnp.log(height) - jnp.log(width))
    return 2 * jax.nn.sigmoid(jnp.stack([slimness, -slimness], axis=-1))


@compiled()
def wise_iou_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus IoU, times a focus on boxes whose centres are apart, in `[0, e]`.

    $$ \ell = e^{\rho^2 / c^2} (1 - \mathrm{IoU}) $$

    with $\rho$ the distance of the centres and $c$ the diagonal of the smallest box around both,
    constant in the gradient.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Tong et al., Wise-IoU: Bounding Box Regression Loss with Dynamic Focusing Mechanism, 2023;
        its version 1.

    >>> wise_iou_loss(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 2.0]]))
    Array(0., dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    pair = sides(pred, target)
    away = distance_cost(pair._replace(hull=jax.lax.stop_gradient(pair.hull)))
    values = jnp.exp(away) * iou_cost(overlap(pair))
    return reduce(values, where=where, weights=weights, reduction=reduction)


_PAIR = dict(pred=draw_boxes("B 4"), target=draw_boxes("B 4"))

CASES = (
    Case(alpha_iou_loss, _PAIR, dict(alpha=2.5), zero_at_target=True),
    Case(bounded_iou_loss, _PAIR, dict(beta=0.3), zero_at_target=True),
    Case(extended_iou_loss, _PAIR, dict(smooth_point=0.7), zero_at_target=True),
    Case(inner_iou_loss, _PAIR, dict(ratio=1.2), zero_at_target=True),
    Case(mpd_iou_loss, _PAIR, dict(image_size=(12.0, 16.0)), zero_at_target=True),
    Case(nwd_loss, _PAIR, dict(constant=4.0), zero_at_target=True),
    Case(shape_iou_loss, _PAIR, dict(scale=0.7), zero_at_target=True),
    Case(
        wise_iou_loss,
        _PAIR,
        zero_at_target=True,
        without={"numerical": "the diagonal counts as a constant in the gradient"},
    ),
)
