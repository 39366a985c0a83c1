"""Which prediction answers for which object: assigners of detectors, with fixed shapes.

One image at a time; `jax.vmap` maps over a batch. The objects of an image are padded to a fixed
number, and `where` says which of them exist: what lies under the padding has no effect. Nothing
here has a gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Shaped

from .._core.assignment import UNMATCHED, argmax, indices, match_columns
from .._core.boxes import area, ciou, giou, intersection, to_corners, to_distances
from .._core.case import Case
from .._core.checks import (
    check_array,
    check_float,
    check_integer,
    check_shape,
    check_where,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison, valid
from .._core.numerics import absolute, numbers, safe_div, widen
from .._core.reduce import mask
from .._core.sharding import lookup, one_hot
from .._core.typing import Number

__all__ = [
    "detr_match_cost",
    "fcos_assign",
    "hungarian_match",
    "max_iou_assign",
    "task_aligned_assign",
]

Boxes = Shaped[Array, "t 4"]
Exists = Bool[Array, " t"]
NEGATIVE, IGNORED = UNMATCHED, -2


@compiled("force_match", "reassign")
def max_iou_assign(
    anchors: Shaped[Array, "n 4"],
    boxes: Boxes,
    *,
    positive: Number = 0.5,
    negative: Number = 0.4,
    force_match: bool = True,
    reassign: bool = False,
    where: Exists | None = None,
) -> Integer[Array, " n"]:
    r"""For every anchor the object it overlaps most, -1 if too little, -2 if in between.

    $$ i_a = \begin{cases} \arg\max_t \mathrm{IoU}(a, t) & \max_t \mathrm{IoU}(a, t) \ge p \\
       -1 & \max_t \mathrm{IoU}(a, t) < n \\ -2 & \text{otherwise} \end{cases} $$

    for the bounds $p$ (positive) and $n$ (negative). Of equal overlaps the lower index wins.
    Without objects every anchor is negative.

    Args:
        anchors: Boxes (x0, y0, x1, y1).
        boxes: Objects in the same unit, padded to a fixed number.
        positive: From this IoU on an anchor is positive.
        negative: Below this IoU an anchor is negative.
        force_match: Whether all anchors that overlap some object best become positive too, for
            the object of their own largest IoU: an object may still end without an anchor. An
            object that overlaps no anchor claims none.
        reassign: Whether instead only the first best anchor of each object becomes positive, for
            that object; of several objects with one best anchor the last takes it.
        where: Which objects exist; all if None.

    Returns:
        Indices of objects, int32.

    Reference:
        Ren et al., Faster R-CNN, NeurIPS 2015 (bounds 0.7 and 0.3); Lin et al., Focal Loss for
        Dense Object Detection, ICCV 2017. Equals torchvision's `Matcher` with
        `allow_low_quality_matches=force_match`, and with bounds of 0.5 and `reassign=True` its
        `SSDMatcher`; there an object of IoU 0 with every anchor claims all anchors of IoU 0.

    >>> anchors = jnp.array([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 3.0], [8.0, 8.0, 9.0, 9.0]])
    >>> max_iou_assign(anchors, jnp.array([[0.0, 0.0, 2.0, 4.0]]), positive=0.7)  # 1/2, 3/4, 0
    Array([-2,  0, -1], dtype=int32)
    """
    boxes, exists = _objects(boxes, where)
    _check_rows(4, anchors=anchors)
    anchors, boxes = jax.lax.stop_gradient(widen(anchors, boxes))
    positive, negative = numbers(anchors, positive=positive, negative=negative)
    if not anchors.shape[0] * boxes.shape[0]:
        return jnp.full(anchors.shape[0], NEGATIVE, jnp.int32)
    both = intersection(anchors[:, None], boxes[None])
    iou = safe_div(both, area(anchors)[:, None] + area(boxes)[None] - both)  # (n, t)
    # Computed once: a second computation of the best overlap could differ in its last digit.
    iou = jax.lax.optimization_barrier(jnp.where(exists[None], iou, -1))
    best, index = jnp.max(iou, axis=1), argmax(iou, axis=1)
    matched = jnp.where(best >= positive, index, jnp.where(best < negative, NEGATIVE, IGNORED))
    if not force_match:
        return matched
    record = jnp.max(iou, axis=0, keepdims=True)
    forced = (iou == record) & (record > 0)
    if not reassign:
        return jnp.where(jnp.any(forced, axis=1), index, matched)
    forced &= jnp.arange(iou.shape[0])[:, None] == argmax(iou, axis=0)[None]
    last = jnp.max(jnp.where(forced, indices(iou.shape[1])[None], -1), axis=1)
    return jnp.where(last >= 0, last, matched)


@compiled("k", "k2")
def task_aligned_assign(
    scores: Float[Array, "p c"],
    pred_boxes: Float[Array, "p 4"],
    points: Shaped[Array, "p 2"],
    boxes: Boxes,
    labels: Integer[Array, " t"],
    *,
    k: int = 10,
    k2: int | None = None,
    alpha: Number = 0.5,
    beta: Number = 6.0,
    small: tuple[Number, Number] | None = None,
    where: Exists | None = None,
) -> tuple[Array, Array, Array, Array]:
    r"""For every object the points that classify and locate it best, and how well they should.

    $$ m_{tp} = s_{p, y_t}^{\alpha} \, u_{tp}^{\beta}, \quad
       u_{tp} = \max(\mathrm{CIoU}(\hat b_p, b_t), 0), \quad
       \hat s_{tp} = m_{tp} \frac{\max_q u_{tq}}{\max_q m_{tq}} $$

    for points strictly inside the box of the object, 0 elsewhere. Every object claims the `k`
    points of largest metric $m$ above 0; a point claimed by several goes to the object that it
    overlaps most among all that contain it. The targets $\hat s$ are taken over what is left. Of
    equal values the lower index wins. An existing object whose label is outside `[0, c)` or whose
    box is not finite makes all target scores NaN.

    Args:
        scores: Probabilities of the classes, such as sigmoids, for each point.
        pred_boxes: Predicted boxes (x0, y0, x1, y1), in pixels.
        points: Where the predictions stand, (x, y), in pixels.
        boxes: Objects, in pixels, padded to a fixed number.
        labels: Classes of the objects.
        k: Points that an object claims.
        k2: Points that an object keeps in the end, if fewer: 1 for one-to-one heads.
        alpha: Exponent of the score.
        beta: Exponent of the overlap.
        small: Sides of boxes shorter than the first number count as the second one, about the
            same centre, when points inside are looked for: no object is missed between points.
        where: Which objects exist; all if None.

    Returns:
        Target boxes `(p, 4)`, target scores `(p, c)`, foreground `(p,)` and the index of the
        object `(p,)`; 0, 0, False and -1 for background.

    Reference:
        Feng et al., TOOD: Task-aligned One-stage Object Detection, ICCV 2021, in the form of
        ultralytics' `TaskAlignedAssigner`, which adds 1e-9 to the denominator: that damps the
        targets of a network so fresh that its largest metrics are as small.

    >>> scores, points = jnp.array([[0.25], [0.25]]), jnp.array([[1.0, 1.0], [9.0, 9.0]])
    >>> box = jnp.array([[0.0, 0.0, 2.0, 2.0]])
    >>> found = task_aligned_assign(scores, jnp.tile(box, (2, 1)), points, box, jnp.array([0]))
    >>> found[1].tolist(), found[3].tolist()
    ([[1.0], [0.0]], [0, -1])
    """
    boxes, labels, exists = _labelled_objects(boxes, labels, where)
    _check_predictions(scores, pred_boxes, points)
    _check_at_least_one(k=k, k2=1 if k2 is None else k2)
    arrays = widen(scores, pred_boxes, points, boxes)
    scores, pred_boxes, points, boxes = jax.lax.stop_gradient(arrays)
    require(lambda: (scores >= 0) & (scores <= 1), "scores", "values in [0, 1]")
    alpha, beta = numbers(scores, alpha=alpha, beta=beta)
    if not scores.shape[0] * boxes.shape[0]:
        return _no_target(scores)
    inside = exists[:, None] & _contains(_grown(boxes, small), points)  # (t, p)
    overlap = ciou(pred_boxes[None], boxes[:, None])
    overlap = jnp.where(inside & (overlap > 0), overlap, 0)
    metric = _scores_of(scores, labels) ** alpha * overlap**beta
    metric = jnp.where(inside & (metric > 0), metric, 0)
    overlap, metric = jax.lax.optimization_barrier((overlap, metric))
    chosen = _largest(metric, k)
    nearest = argmax(jnp.where(inside, overlap, -1), axis=0)
    several = jnp.sum(chosen, axis=0) > 1
    chosen = jnp.where(several[None], one_hot(nearest, boxes.shape[0]).T, chosen)
    if k2 is not None:
        chosen &= _largest(jnp.where(chosen, metric, 0), k2)
    metric, overlap = (jnp.where(chosen, x, 0) for x in (metric, overlap))
    best = jnp.max(overlap, axis=1, keepdims=True)
    share = safe_div(metric, jnp.max(metric, axis=1, keepdims=True)) * best
    ok = valid(labels, scores.shape[1]) & jnp.all(jnp.isfinite(boxes), axis=1)
    ok = jnp.all(ok | ~exists)
    return _targets(chosen, poison(jnp.sum(share, axis=0), ok), boxes, labels, scores)


@compiled()
def fcos_assign(
    points: Shaped[Array, "p 2"],
    strides: Shaped[Array, " p"],
    levels: Integer[Array, " p"],
    boxes: Boxes,
    *,
    radius: Number = 1.5,
    ranges: tuple[tuple[Number, Number], ...] = (
        (-1, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, np.inf),
    ),
    where: Exists | None = None,
) -> Integer[Array, " p"]:
    r"""For every point the smallest object around it that suits its level, -1 if there is none.

    $$ i_p = \arg\min_t \mathrm{area}(t) \quad \text{over} \quad \min(l, t, r, b) > 0, \;
       \max(|x - c_x|, |y - c_y|) < \text{radius} \cdot \text{stride}, \;
       \max(l, t, r, b) \in \text{range} $$

    with the distances of the point from the sides (left, top, right, bottom) and from the centre of
    the box; both ends belong to the range. Of equal areas the lower index wins.

    Args:
        points: Where the predictions stand, (x, y), in pixels.
        strides: Pixels between neighbouring points of the level of each point.
        levels: Level of each point, the row of `ranges` that holds for it.
        boxes: Objects (x0, y0, x1, y1), in pixels, padded to a fixed number.
        radius: How far from the centre of an object its points may lie, in strides; `inf` allows
            all points inside.
        ranges: For each level the smallest and largest distance it has to predict, in pixels.
        where: Which objects exist; all if None.

    Returns:
        Indices of objects, int32. `box_to_distances(boxes[index], points)` are the targets.

    Reference:
        Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, ICCV 2019, with the
        authors' centre sampling. torchvision's `FCOS` excludes both ends of the range.

    >>> points, box = jnp.array([[4.0, 4.0], [12.0, 4.0]]), jnp.array([[0.0, 0.0, 9.0, 9.0]])
    >>> fcos_assign(points, jnp.full(2, 8.0), jnp.zeros(2, int), box)
    Array([ 0, -1], dtype=int32)
    """
    boxes, exists = _objects(boxes, where)
    _check_rows(2, points=points)
    check_shape(jnp.shape(points)[:1], strides=strides, levels=levels)
    check_integer(levels=levels)
    points, boxes, strides = jax.lax.stop_gradient(widen(points, boxes, strides))
    (radius,) = numbers(points, radius=radius)
    low, high = (jnp.stack(numbers(points, **_named(ends))) for ends in zip(*ranges, strict=True))
    levels = jnp.asarray(levels)
    require(lambda: valid(levels, len(ranges)), "levels", f"values in [0, {len(ranges)})")
    if not points.shape[0] * boxes.shape[0]:
        return jnp.full(points.shape[0], NEGATIVE, jnp.int32)
    sides = to_distances(boxes[None], points[:, None])  # (p, t, 4)
    reach = jnp.max(sides, axis=-1)
    off = jnp.max(absolute(sides[..., :2] - sides[..., 2:]), axis=-1) / 2
    fits = exists[None] & (jnp.min(sides, axis=-1) > 0) & (off < (radius * strides)[:, None])
    fits &= (reach >= lookup(low, levels)[:, None]) & (reach <= lookup(high, levels)[:, None])
    fits &= valid(levels, len(ranges))[:, None]
    size = jnp.where(fits, area(boxes)[None], jnp.inf)
    return jnp.where(jnp.any(fits, axis=1), argmax(-size, axis=1), NEGATIVE)


@compiled()
def detr_match_cost(
    logits: Float[Array, "q classes"],
    pred_boxes: Float[Array, "q 4"],
    labels: Integer[Array, " t"],
    boxes: Boxes,
    *,
    class_gain: Number = 1.0,
    l1_gain: Number = 5.0,
    giou_gain: Number = 2.0,
) -> Float[Array, "q t"]:
    r"""What it costs to let a query answer for an object: DETR's matching cost.

    $$ C_{qt} = -g_c\, p_q(y_t) + g_1 \lVert \hat b_q - b_t \rVert_1
       - g_u\, \mathrm{GIoU}(\hat b_q, b_t) $$

    for softmax probabilities $p$. Columns of padded objects may hold anything, since
    `hungarian_match` hides them; a label outside the classes makes its column NaN.

    Args:
        logits: For each query the classes and, last, "no object".
        pred_boxes: Predicted boxes (cx, cy, w, h), in shares of the image.
        labels: Classes of the objects.
        boxes: Objects, as `pred_boxes`.
        class_gain: Weight of the probability.
        l1_gain: Weight of the distance of the four numbers.
        giou_gain: Weight of the generalized IoU.

    Returns:
        Costs for `hungarian_match`, float32.

    Reference:
        Carion et al., End-to-End Object Detection with Transformers, ECCV 2020. Equals the cost of
        the authors' `HungarianMatcher` with `cost_bbox=5` and `cost_giou=2`.

    >>> box = jnp.array([[0.5, 0.5, 0.2, 0.2]])
    >>> detr_match_cost(jnp.zeros((1, 2)), box, jnp.array([0]), box)  # -1/2 - 2
    Array([[-2.5]], dtype=float32)
    """
    check_float(logits=logits, pred_boxes=pred_boxes)
    _check_rows(None, logits=logits)
    check_shape((logits.shape[0], 4), pred_boxes=pred_boxes)
    _check_rows(4, boxes=boxes)
    _check_labels(labels, boxes)
    arrays = widen(logits, pred_boxes, boxes)
    logits, pred_boxes, boxes = jax.lax.stop_gradient(arrays)
    class_gain, l1_gain, giou_gain = numbers(
        logits, class_gain=class_gain, l1_gain=l1_gain, giou_gain=giou_gain
    )
    labels = jnp.asarray(labels)
    own = jnp.take(jax.nn.softmax(logits, axis=-1), labels, axis=1, mode="clip")  # (q, t)
    own = poison(own, jnp.broadcast_to(valid(labels, logits.shape[1] - 1), own.shape))
    distance = jnp.sum(absolute(pred_boxes[:, None] - boxes[None]), axis=-1)
    overlap = giou(to_corners(pred_boxes)[:, None], to_corners(boxes)[None])
    return -class_gain * own + l1_gain * distance - giou_gain * overlap


@compiled()
def hungarian_match(
    cost: Float[Array, "n m"], *, where: Bool[Array, " m"] | None = None
) -> Integer[Array, " m"]:
    r"""The cheapest one-to-one matching: for every target its row, -1 for those left without.

    $$ \min_{\pi} \sum_t C_{\pi(t), t} \quad \text{over injective } \pi $$

    As many targets as possible are matched. NaN and infinite costs count as a price above that of
    any other matching: such a pair is used only where nothing else is left.

    Args:
        cost: Rows are predictions, columns targets.
        where: Which targets exist; all if None. The others have no effect, nor take a row.

    Returns:
        Rows, int32, all different but for -1: where a target does not exist, or if there are more
        targets than rows.

    Mapped over images that are sharded under plain `jit`, every step of the search waits for all
    devices; inside `shard_map` none does.

    Reference:
        Kuhn, The Hungarian method for the assignment problem, 1955; by shortest augmenting paths
        as in Crouse, On implementing 2D rectangular assignment algorithms, IEEE TAES 2016. The
        total cost equals that of scipy's `linear_sum_assignment` on the existing columns.
        `optax.assignment.hungarian_algorithm` knows no padding.

    >>> hungarian_match(jnp.array([[1.0, 2.0], [2.0, 9.0], [5.0, 5.0]]))  # 2 + 2 < 1 + 5
    Array([1, 0], dtype=int32)
    """
    check_float(cost=cost)
    _check_rows(None, cost=cost)
    (cost,) = jax.lax.stop_gradient(widen(cost))
    return match_columns(cost, _exists(where, cost.shape[1]))


def _largest(metric: Array, k: int) -> Array:
    """The `k` largest values above 0 of each row; of equal ones the first.

    One after the other: `top_k` would gather a batch that is sharded.
    """
    count = metric.shape[1]
    place = indices(count)[None]

    def step(_: Any, found: tuple[Array, Array]) -> tuple[Array, Array]:
        last, at = found
        left = jnp.where((metric < last) | ((metric == last) & (place > at)), metric, -1)
        last = jnp.max(left, axis=1, keepdims=True)
        return last, jnp.min(jnp.where(left == last, place, count), axis=1, keepdims=True)

    none = 0 * metric[:, :1]
    begin = none + jnp.inf, none.astype(jnp.int32)
    last, at = jax.lax.fori_loop(0, min(k, count), step, begin)
    return ((metric > last) | ((metric == last) & (place <= at))) & (metric > 0)


def _contains(boxes: Array, points: Array) -> Array:
    """Whether a point lies strictly inside a box, `(t, p)`."""
    return jnp.min(to_distances(boxes[:, None], points[None]), axis=-1) > 0


def _grown(boxes: Array, small: tuple[Number, Number] | None) -> Array:
    """Boxes whose sides below the first number get the second one, about the same centre."""
    if small is None:
        return boxes
    least, instead = numbers(boxes, **_named(small))
    low, high = boxes[:, :2], boxes[:, 2:]
    half = jnp.where(high - low < least, instead, high - low) / 2
    center = low + (high - low) / 2
    return jnp.concatenate([center - half, center + half], axis=1)


def _scores_of(scores: Array, labels: Array) -> Array:
    """What every point gives the class of every object, `(t, p)`."""
    return jnp.take(scores, labels, axis=1, mode="clip").T


def _targets(
    chosen: Array, score: Array, boxes: Array, labels: Array, scores: Array
) -> tuple[Array, Array, Array, Array]:
    """Targets of every point from the pairs `(t, p)` that are left and their scores `(p,)`."""
    foreground, index = jnp.any(chosen, axis=0), argmax(chosen, axis=0)
    target_boxes = jnp.where(foreground[:, None], boxes[index], 0)
    hit = one_hot(labels[index], scores.shape[1]) & foreground[:, None]
    target_scores = jnp.where(hit | jnp.isnan(score)[:, None], score[:, None], 0)
    return target_boxes, target_scores, foreground, jnp.where(foreground, index, NEGATIVE)


def _no_target(scores: Array) -> tuple[Array, Array, Array, Array]:
    p = scores.shape[0]
    index = jnp.full(p, NEGATIVE, jnp.int32)
    return jnp.zeros((p, 4), scores.dtype), jnp.zeros_like(scores), index >= 0, index


def _objects(boxes: Any, where: Exists | None) -> tuple[Array, Array]:
    """Boxes, zero where they do not exist, and which exist."""
    _check_rows(4, boxes=boxes)
    exists = _exists(where, jnp.shape(boxes)[0])
    (boxes,) = mask(exists, *widen(boxes))
    return boxes, exists


def _labelled_objects(boxes: Any, labels: Any, where: Exists | None) -> tuple[Array, Array, Array]:
    boxes, exists = _objects(boxes, where)
    _check_labels(labels, boxes)
    (labels,) = mask(exists, jnp.asarray(labels))
    return boxes, labels, exists


def _exists(where: Any, count: int) -> Array:
    if where is None:
        return jnp.ones(count, bool)
    check_where(where)
    check_shape((count,), where=where)
    return jnp.asarray(where)


def _check_rows(width: int | None, **arrays: Any) -> None:
    """Each argument has two axes, the last one of this size: it belongs to a single image."""
    check_array(**arrays)
    for name, array in arrays.items():
        shape = jnp.shape(array)
        if len(shape) != 2 or width not in (None, shape[1]):
            expected = f"shape (n, {width or 'm'}) of one image (vmap over a batch)"
            raise ValueError(message(name, expected, shape))


def _check_labels(labels: Any, boxes: Array) -> None:
    check_integer(labels=labels)
    check_shape(boxes.shape[:1], labels=labels)


def _check_predictions(scores: Any, pred_boxes: Any, points: Any) -> None:
    check_float(scores=scores, pred_boxes=pred_boxes)
    _check_rows(None, scores=scores)
    check_shape((scores.shape[0], 4), pred_boxes=pred_boxes)
    check_shape((scores.shape[0], 2), points=points)


def _check_at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(message(name, "a count of at least 1", repr(count)))


def _named(values: Any) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(values)}


CASES: tuple[Case, ...] = ()
