"""Box losses: one minus a score of how well a box covers its target, and the L1 distance."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.boxes import (
    Sides,
    check_boxes,
    distance_cost,
    hull_cost,
    iou_cost,
    iou_of,
    log_iou,
    overlap,
    prepare_boxes,
    shape_cost,
    sides,
)
from .._core.case import Case, draw_boxes
from .._core.checks import check_float, check_same_shape
from .._core.compiled import compiled
from .._core.numerics import absolute, numbers, safe_div, safe_pow, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "box_l1_loss",
    "ciou_loss",
    "diou_loss",
    "eiou_loss",
    "giou_loss",
    "iou_loss",
    "log_iou_loss",
    "siou_loss",
    "squared_iou_loss",
]


@compiled()
def iou_loss(
    pred: Float[Array, "*batch corners"],
    target: Shaped[Array, "*batch corners"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus intersection over union, in `[0, 1]`.

    $$ \ell = 1 - \mathrm{IoU}, \quad \mathrm{IoU} = \frac{|B \cap B^*|}{|B \cup B^*|} $$

    The gradient of disjoint boxes is 0: nothing tells where to go; see `giou_loss`. Two boxes
    without area have IoU 0.

    Args:
        pred: Boxes `(*batch, 4)` or `(*batch, 6)`, low corner first.
        target: Boxes of the same shape.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Rahman and Wang, Optimizing Intersection-Over-Union in Deep Neural Networks, ISVC 2016.
        Equals mmdetection's `IoULoss(mode="linear")` without its floor of 1e-6.

    >>> iou_loss(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 1.0]]))
    Array(0.5, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where, 4, 6)
    values = iou_cost(overlap(sides(pred, target)))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def log_iou_loss(
    pred: Float[Array, "*batch corners"],
    target: Shaped[Array, "*batch corners"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative logarithm of intersection over union, in nats, from 0 up.

    $$ \ell = -\log \mathrm{IoU}, \quad \mathrm{IoU} = \frac{|B \cap B^*|}{|B \cup B^*|} $$

    Boxes that are disjoint or without area cost infinity, with gradient 0; see `giou_loss`.

    Args:
        pred: Boxes `(*batch, 4)` or `(*batch, 6)`, low corner first.
        target: Boxes of the same shape.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Yu et al., UnitBox: An Advanced Object Detection Network, ACM MM 2016. Equals mmdetection's
        `IoULoss(mode="log")`, which stops at an IoU of 1e-6.

    >>> log_iou_loss(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 1.0]]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where, 4, 6)
    values = -log_iou(overlap(sides(pred, target)))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def squared_iou_loss(
    pred: Float[Array, "*batch corners"],
    target: Shaped[Array, "*batch corners"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus squared intersection over union, in `[0, 1]`.

    $$ \ell = 1 - \mathrm{IoU}^2, \quad \mathrm{IoU} = \frac{|B \cap B^*|}{|B \cup B^*|} $$

    The gradient of disjoint boxes is 0; see `giou_loss`. Two boxes without area have IoU 0.

    Args:
        pred: Boxes `(*batch, 4)` or `(*batch, 6)`, low corner first.
        target: Boxes of the same shape.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Yu et al., UnitBox: An Advanced Object Detection Network, ACM MM 2016, with a square in
        place of its logarithm. Equals mmdetection's `IoULoss(mode="square")`.

    >>> squared_iou_loss(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 1.0]]))
    Array(0.75, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where, 4, 6)
    o = overlap(sides(pred, target))
    values = iou_cost(o) * (1 + iou_of(o))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def giou_loss(
    pred: Float[Array, "*batch corners"],
    target: Shaped[Array, "*batch corners"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus generalized IoU, in `[0, 2]`: disjoint boxes attract one another too.

    $$ \ell = 1 - \mathrm{IoU} + \frac{|C| - |B \cup B^*|}{|C|} $$

    with C the smallest box around both.

    Args:
        pred: Boxes `(*batch, 4)` or `(*batch, 6)`, low corner first.
        target: Boxes of the same shape.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Rezatofighi et al., Generalized Intersection over Union, CVPR 2019. Equals torchvision's
        `generalized_box_iou_loss`, which adds 1e-7 to the denominators, and MONAI's `BoxGIoULoss`.

    >>> pred, target = jnp.array([[0.0, 0.0, 1.0, 1.0]]), jnp.array([[3.0, 0.0, 4.0, 1.0]])
    >>> giou_loss(pred, target)  # 1 - 0 + (4 - 2) / 4
    Array(1.5, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where, 4, 6)
    o = overlap(sides(pred, target))
    values = iou_cost(o) + hull_cost(o)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def diou_loss(
    pred: Float[Array, "*batch corners"],
    target: Shaped[Array, "*batch corners"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus distance IoU, in `[0, 2]`: pulls the centres together.

    $$ \ell = 1 - \mathrm{IoU} + \frac{\rho^2}{c^2} $$

    with $\rho$ the distance of the centres and $c$ the diagonal of the smallest box around both.

    Args:
        pred: Boxes `(*batch, 4)` or `(*batch, 6)`, low corner first.
        target: Boxes of the same shape.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Zheng et al., Distance-IoU Loss: Faster and Better Learning for Bounding Box Regression,
        AAAI 2020. Equals torchvision's `distance_box_iou_loss`, which adds 1e-7 to the
        denominators.

    >>> pred, target = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[2.0, 0.0, 4.0, 2.0]])
    >>> diou_loss(pred, target)  # 1 - 0 + 4 / 20
    Array(1.2, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where, 4, 6)
    pair = sides(pred, target)
    values = iou_cost(overlap(pair)) + distance_cost(pair)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("stop_gradient_alpha")
def ciou_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    alpha_threshold: Number | None = None,
    stop_gradient_alpha: bool = True,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus complete IoU, from 0 up: overlap, distance of the centres, aspect ratio.

    $$ \ell = 1 - \mathrm{IoU} + \frac{\rho^2}{c^2} + \alpha v, \quad
       v = \frac{4}{\pi^2} \left(\arctan \frac{w^*}{h^*} - \arctan \frac{w}{h}\right)^2, \quad
       \alpha = \frac{v}{1 - \mathrm{IoU} + v} $$

    with $\rho$ and $c$ as in `diou_loss`. A box without width and height has angle 0, and
    $\alpha$ is 0 for coincident boxes.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.
        alpha_threshold: $\alpha$ is 0 up to this IoU; None for never.
        stop_gradient_alpha: Whether $\alpha$ counts as a constant in the gradient.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Zheng et al., Distance-IoU Loss, AAAI 2020; Enhancing Geometric Factors in Model Learning
        and Inference, IEEE Transactions on Cybernetics 2021, whose code has `alpha_threshold=0.5`.
        Equals torchvision's `complete_box_iou_loss`, which adds 1e-7 to the denominators, and
        ultralytics' `1 - bbox_iou(xywh=False, CIoU=True)`.

    >>> pred, target = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[2.0, 0.0, 4.0, 2.0]])
    >>> ciou_loss(pred, target)  # squares: DIoU
    Array(1.2, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    pair = sides(pred, target)
    o = overlap(pair)
    threshold = None
    if alpha_threshold is not None:
        (threshold,) = numbers(pred, alpha_threshold=alpha_threshold)
    shape = shape_cost(pair, o, alpha_threshold=threshold, stop_gradient_alpha=stop_gradient_alpha)
    values = iou_cost(o) + distance_cost(pair) + shape
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def eiou_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Efficient IoU loss, in `[0, 4]`: overlap, distance of the centres, width and height.

    $$ \ell = 1 - \mathrm{IoU} + \frac{\rho^2}{c^2} + \frac{(w - w^*)^2}{C_w^2}
       + \frac{(h - h^*)^2}{C_h^2} $$

    with $\rho$ the distance of the centres and $c$, $C_w$, $C_h$ the diagonal and the sides of the
    smallest box around both.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Zhang et al., Focal and Efficient IOU Loss for Accurate Bounding Box Regression,
        Neurocomputing 2022. mmdetection's `EIoULoss` is another loss: see `extended_iou_loss`.

    >>> pred, target = jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 1.0]])
    >>> eiou_loss(pred, target)  # 1/2 + 1/32 + 1/4
    Array(0.78125, dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    pair = sides(pred, target)
    shape = jnp.sum(safe_div(pair.first - pair.second, pair.hull) ** 2, axis=-1)
    values = iou_cost(overlap(pair)) + distance_cost(pair) + shape
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def siou_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    theta: Number = 4.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus IoU, plus costs of direction, distance and shape, in `[0, 3]`.

    $$ \begin{aligned} \ell &= 1 - \mathrm{IoU} + \tfrac{1}{2} (\Delta + \Omega), \quad
       A = \frac{2\,|d_x d_y|}{d_x^2 + d_y^2} \\
       \Delta &= \sum_{t = x, y} \left(1 - e^{-(2 - A) (d_t / C_t)^2}\right), \quad
       \Omega = \sum_{t = w, h} \left(1 - e^{-|t - t^*| / \max(t, t^*)}\right)^\theta
       \end{aligned} $$

    with $d$ the difference of the centres and $C$ the sides of the smallest box around both. $A$
    is the sine of twice the angle between $d$ and an axis: 1 on a diagonal, 0 on an axis.

    Args:
        pred: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        target: Boxes of the same shape.
        theta: How little small differences of shape cost; 2 to 6 in the paper.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Gevorgyan, SIoU Loss: More Powerful Learning for Bounding Box Regression, 2022. Equals
        mmdetection's `siou_loss(neg_gamma=True)`; its default reverses the sign of the exponent.

    >>> siou_loss(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 2.0]]))
    Array(0., dtype=float32)
    """
    pred, target = prepare_boxes(pred, target, where)
    (theta,) = numbers(pred, theta=theta)
    pair = sides(pred, target)
    distance, shape = _direction_cost(pair), _ratio_cost(pair, theta)
    values = iou_cost(overlap(pair)) + 0.5 * (distance + shape)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _direction_cost(pair: Sides) -> Array:
    larger = jax.lax.stop_gradient(jnp.max(jnp.abs(pair.offset), axis=-1, keepdims=True))
    way = pair.offset / jnp.where(larger == 0, 1, larger)
    angle = safe_div(2 * absolute(way[..., 0] * way[..., 1]), jnp.sum(way**2, axis=-1))
    shift = safe_div(pair.offset, pair.hull) ** 2
    return jnp.sum(-jnp.expm1((angle[..., None] - 2) * shift), axis=-1)


def _ratio_cost(pair: Sides, theta: Array) -> Array:
    change = absolute(pair.first - pair.second)
    cost = -jnp.expm1(-safe_div(change, jnp.maximum(pair.first, pair.second)))
    return jnp.sum(safe_pow(cost, theta), axis=-1)


@compiled()
def box_l1_loss(
    pred: Float[Array, "*batch 4"],
    target: Shaped[Array, "*batch 4"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Sum of the absolute errors of the four numbers of a box, in their unit.

    $$ \ell = \sum_{k=1}^4 |b_k - b_k^*| $$

    The gradient at equality is 0.

    Args:
        pred: Boxes `(*batch, 4)` in any format; DETR uses `(cx, cy, w, h)` in `[0, 1]`.
        target: Boxes of the same shape.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Carion et al., End-to-End Object Detection with Transformers, ECCV 2020. Equals the sum of
        torch's `l1_loss` over the last axis.

    >>> box_l1_loss(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 1.0, 2.0, 4.0]]))
    Array(3., dtype=float32)
    """
    check_float(pred=pred)
    check_boxes(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    values = jnp.sum(absolute(pred - target), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


_PAIR = dict(pred=draw_boxes("B 4"), target=draw_boxes("B 4"))
_SPACE = dict(pred=draw_boxes("B 6"), target=draw_boxes("B 6"))
_NEAR = dict(pred=draw_boxes("B 4", overlapping=True), target=draw_boxes("B 4", overlapping=True))

CASES = (
    Case(iou_loss, _PAIR, zero_at_target=True),
    Case(log_iou_loss, _NEAR, zero_at_target=True),
    Case(squared_iou_loss, _PAIR, zero_at_target=True),
    Case(giou_loss, _PAIR, zero_at_target=True),
    Case(giou_loss, _SPACE, label="volumes", zero_at_target=True),
    Case(diou_loss, _PAIR, zero_at_target=True),
    Case(
        ciou_loss,
        _PAIR,
        zero_at_target=True,
        without={"numerical": "alpha counts as a constant in the gradient"},
    ),
    Case(
        ciou_loss,
        _PAIR,
        dict(alpha_threshold=0.2, stop_gradient_alpha=False),
        label="whole gradient",
        zero_at_target=True,
    ),
    Case(eiou_loss, _PAIR, zero_at_target=True),
    Case(siou_loss, _PAIR, dict(theta=3.0), zero_at_target=True),
    Case(box_l1_loss, _PAIR, zero_at_target=True),
)
