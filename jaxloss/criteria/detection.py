"""Complete criteria of object detectors, from what their heads say to one number and its terms.

Each returns `(total, terms)`, fit for `has_aux=True`: `terms` holds the unweighted terms without a
gradient, and the total is the sum of gain times term. Sums run over the whole batch and are divided
by one count of positives for the batch, at least 1; `axis_name` adds sums and counts up over the
devices of a mapped axis first, so that every device returns the global value (take the gradient
outside the mapped function). Targets, assignments and counts carry no gradient. Results are float32
or wider.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

from .._core.boxes import to_corners
from .._core.case import Case
from .._core.checks import (
    check_array,
    check_float,
    check_integer,
    check_shape,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison, valid
from .._core.numerics import absolute, numbers, safe_div, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.reductions import across
from .._core.sharding import one_hot
from .._core.terms import Axis, Criterion, add_up, per_count, total
from .._core.typing import Number
from ..losses.box_coding import box_to_distances, distances_to_box, encode_deltas
from ..losses.boxes import box_l1_loss, ciou_loss, giou_loss
from ..losses.classification import sigmoid_binary_cross_entropy, softmax_cross_entropy
from ..losses.detection import distribution_focal_loss, expected_bin, gaussian_focal_loss
from ..losses.focal import sigmoid_focal_loss
from ..losses.huber import smooth_l1_loss
from ..losses.matching import IGNORED, max_iou_assign
from ..losses.regression import absolute_error

__all__ = ["centernet_loss", "detr_loss", "fcos_loss", "retinanet_loss", "yolo_detection_loss"]


@compiled("axis_name")
def yolo_detection_loss(
    box_logits: Float[Array, "batch points 4 bins"],
    class_logits: Float[Array, "batch points classes"],
    points: Shaped[Array, "points 2"],
    strides: Shaped[Array, " points"],
    target_boxes: Shaped[Array, "batch points 4"],
    target_scores: Shaped[Array, "batch points classes"],
    foreground: Bool[Array, "batch points"],
    *,
    box_gain: Number = 7.5,
    class_gain: Number = 0.5,
    dfl_gain: Number = 1.5,
    image_size: tuple[Number, Number] | None = None,
    axis_name: Axis = None,
) -> Criterion:
    r"""The detection criterion of YOLO v8 and its successors; terms `box`, `cls` and `dfl`.

    $$ L = \frac{1}{N} \Big( g_b \sum_p w_p (1 - \mathrm{CIoU}(\hat b_p, b_p))
       + g_c \sum_{p,c} \mathrm{BCE}(z_{pc}, \hat s_{pc})
       + g_d \sum_p \frac{w_p}{4} \sum_k \mathrm{DFL}(\ell_{pk}, y_{pk}) \Big) $$

    with $w_p = \sum_c \hat s_{pc}$ on the foreground and $N = \max(\sum_p w_p, 1)$ over the whole
    batch. Distances are expectations over bins of one stride each; their targets $y$ are clamped to
    `[0, bins - 1.01]`, so that an object too large for the bins is fitted as well as they allow.
    With a single bin `box_logits` are the distances in strides themselves and the last term is the
    weighted mean of $|d - y|$ over the four sides. Without foreground only `cls` has a gradient.
    Targets that are NaN, as `task_aligned_assign` makes them for a label outside the classes, make
    the total NaN.

    The targets come from `task_aligned_assign`, mapped over the images:

        boxes = distances_to_box(expected_bin(box_logits) * strides[:, None], points)
        assign = jax.vmap(task_aligned_assign, in_axes=(0, 0, None, 0, 0))
        target_boxes, target_scores, foreground, _ = assign(
            jax.nn.sigmoid(class_logits), boxes, points, true_boxes, labels, where=exists
        )

    Args:
        box_logits: For the sides (left, top, right, bottom) of each point the bins of a distance.
        class_logits: Log-odds of each class.
        points: `grid_points` of all levels, (x, y), in pixels.
        strides: Pixels between neighbouring points of the level of each point.
        target_boxes: Box (x0, y0, x1, y1) for which each foreground point answers, in pixels.
        target_scores: Scores in [0, 1] that the points should have.
        foreground: Which points answer for a box; under the others boxes and bins do not matter.
        box_gain: Weight of the overlap.
        class_gain: Weight of the classification.
        dfl_gain: Weight of the distances.
        image_size: With a single bin: (height, width) in pixels, and distances count in shares of
            the image rather than in strides.
        axis_name: Mapped axis or axes over which sums and counts are added up.

    Returns:
        The total and its terms before their gains, scalars.

    Raises:
        ValueError: If `image_size` is given with several bins.

    Reference:
        Jocher et al., Ultralytics YOLO, 2023; Li et al., Generalized Focal Loss, NeurIPS 2020. Its
        `v8DetectionLoss` returns gain times term times the number of images, counts scores on its
        own device only and adds 1e-7 to denominators; `image_size` is how YOLO26 scales distances.

    >>> box_logits, points = jnp.zeros((1, 1, 4, 3)), jnp.array([[4.0, 4.0]])
    >>> total, terms = yolo_detection_loss(
    ...     box_logits, jnp.zeros((1, 1, 1)), points, jnp.array([4.0]),
    ...     jnp.array([[[0.0, 0.0, 8.0, 8.0]]]), jnp.ones((1, 1, 1)), jnp.array([[True]]),
    ... )
    >>> {name: round(float(value), 4) for name, value in terms.items()}  # 0, log 2, log 3
    {'box': 0.0, 'cls': 0.6931, 'dfl': 1.0986}
    """
    batch, count, classes = _dims("batch points classes", class_logits=class_logits)
    bins = _dims("batch points 4 bins", box_logits=box_logits)[3]
    check_float(box_logits=box_logits, class_logits=class_logits)
    check_shape((batch, count, 4, bins), box_logits=box_logits)
    check_shape((count, 2), points=points)
    check_shape((count,), strides=strides)
    check_shape((batch, count, 4), target_boxes=target_boxes)
    check_shape((batch, count, classes), target_scores=target_scores)
    foreground = _mask((batch, count), foreground=foreground)
    box_logits, target_boxes = mask(foreground, box_logits, jnp.asarray(target_boxes))
    arrays = widen(box_logits, class_logits, points, strides, target_boxes, target_scores)
    box_logits, class_logits, *constants = arrays
    points, strides, target_boxes, target_scores = jax.lax.stop_gradient(constants)
    strides = strides[None, :, None]
    weights = jnp.sum(target_scores, axis=-1)
    weighted: dict[str, Any] = dict(where=foreground, weights=weights, reduction="sum")
    distances = expected_bin(box_logits) if bins > 1 else box_logits[..., 0]  # (b, p, 4)
    target = box_to_distances(target_boxes, points) / strides
    if bins > 1:
        if image_size is not None:
            raise ValueError(message("image_size", "None with several bins", image_size))
        target = jnp.clip(target, 0, bins - 1.01)
        sides = distribution_focal_loss(box_logits, target, reduction="none")
    else:
        scale = jnp.ones(4) if image_size is None else strides / _side_lengths(strides, image_size)
        sides = absolute(distances - target) * scale
    boxes = distances_to_box(distances * strides, points)
    sums = dict(
        box=ciou_loss(boxes, target_boxes, **weighted),
        cls=sigmoid_binary_cross_entropy(class_logits, target_scores, reduction="sum"),
        dfl=reduce(jnp.mean(sides, axis=-1), **weighted),
    )
    terms = per_count(sums, jnp.sum(weights), axis_name)
    return total(terms, box_gain=box_gain, class_gain=class_gain, dfl_gain=dfl_gain)


@compiled("axis_name")
def retinanet_loss(
    class_logits: Float[Array, "batch anchors classes"],
    deltas: Float[Array, "batch anchors 4"],
    anchors: Shaped[Array, "anchors 4"],
    boxes: Shaped[Array, "batch t 4"],
    labels: Integer[Array, "batch t"],
    *,
    positive: Number = 0.5,
    negative: Number = 0.4,
    alpha: Number = 0.25,
    gamma: Number = 2.0,
    beta: Number = 1 / 9,
    box_gain: Number = 1.0,
    where: Bool[Array, "batch t"] | None = None,
    axis_name: Axis = None,
) -> Criterion:
    r"""The criterion of RetinaNet, matching included; terms `cls` and `box`.

    $$ L = \frac{1}{P} \Big( \sum_{a,c} \mathrm{FL}(z_{ac}, [c = y_{i(a)}])
       + g_b \sum_{a \in \mathrm{pos}} \sum_k
       \mathrm{smooth}_\beta(\delta_{ak} - \delta^*_{ak}) \Big) $$

    with the focal loss FL, the object $i(a)$ that `max_iou_assign` gives to anchor $a$, the deltas
    $\delta^*$ of its box from the anchor, and $P$ the number of positive anchors of the batch, at
    least 1. Negative anchors have target 0 in all classes, those in between the bounds do not
    count. An existing object whose label is outside the classes or whose box is not finite makes
    the total NaN.

    Args:
        class_logits: Log-odds of each class, without a background class.
        deltas: Predicted boxes relative to the anchors, as `encode_deltas` gives them.
        anchors: Boxes (x0, y0, x1, y1) shared by all images.
        boxes: Objects in the same unit, padded to a fixed number.
        labels: Classes of the objects.
        positive: From this IoU on an anchor is positive; the best anchors of an object always are.
        negative: Below this IoU an anchor is negative.
        alpha: Weight of target 1 in the focal loss, with `1 - alpha` for target 0.
        gamma: How strongly easy targets are played down.
        beta: Where the square of the smooth L1 loss ends; 0 is the L1 loss.
        box_gain: Weight of the deltas.
        where: Which objects exist; all if None. The others have no effect.
        axis_name: Mapped axis or axes over which sums and counts are added up.

    Returns:
        The total and its terms before their gains, scalars.

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017. torchvision's `RetinaNet` has
        `beta=0`, divides each image by its own positives and takes the mean over images: `jax.vmap`
        of this on batches of one image gives that.

    >>> anchors = jnp.array([[0.0, 0.0, 4.0, 4.0], [8.0, 8.0, 12.0, 12.0]])
    >>> total, terms = retinanet_loss(
    ...     jnp.zeros((1, 2, 1)), jnp.ones((1, 2, 4)), anchors, anchors[None, :1],
    ...     jnp.array([[0]]), beta=0.0,
    ... )
    >>> {name: round(float(value), 4) for name, value in terms.items()}  # 4 * |1 - 0|, log(2) / 4
    {'box': 4.0, 'cls': 0.1733}
    """
    batch, count, classes = _dims("batch anchors classes", class_logits=class_logits)
    check_float(class_logits=class_logits, deltas=deltas)
    check_shape((batch, count, 4), deltas=deltas)
    check_shape((count, 4), anchors=anchors)
    boxes, labels, exists = _objects(boxes, labels, where, batch)
    ok = valid(labels, classes)
    require(lambda: ok, "labels", f"values in [0, {classes})", exists)
    ok = jnp.all((ok & jnp.all(jnp.isfinite(boxes), axis=-1)) | ~exists, axis=1)
    class_logits, deltas, *constants = widen(class_logits, deltas, anchors, boxes)
    anchors, boxes = jax.lax.stop_gradient(constants)
    assign = partial(max_iou_assign, anchors, positive=positive, negative=negative)
    index = jax.vmap(lambda boxes, exists: assign(boxes, where=exists))(boxes, exists)
    foreground = index >= 0  # (b, a)
    truth = one_hot(_take(labels, index), classes) & foreground[..., None]
    kept = jnp.broadcast_to((index != IGNORED)[..., None], truth.shape)
    matched = jnp.where(foreground[..., None], _take(boxes, index), anchors)
    sums = dict(
        cls=sigmoid_focal_loss(
            poison(class_logits, ok[:, None, None]),
            truth,
            alpha=alpha,
            gamma=gamma,
            where=kept,
            reduction="sum",
        ),
        box=smooth_l1_loss(
            deltas,
            encode_deltas(matched, anchors),
            beta=beta,
            where=jnp.broadcast_to(foreground[..., None], deltas.shape),
            reduction="sum",
        ),
    )
    terms = per_count(sums, jnp.sum(foreground), axis_name)
    return total(terms, class_gain=1.0, box_gain=box_gain)


@compiled("weight_by_centerness", "axis_name")
def fcos_loss(
    class_logits: Float[Array, "batch points classes"],
    distances: Float[Array, "batch points 4"],
    centerness_logits: Float[Array, "batch points"],
    target_labels: Integer[Array, "batch points"],
    target_distances: Shaped[Array, "batch points 4"],
    foreground: Bool[Array, "batch points"],
    *,
    alpha: Number = 0.25,
    gamma: Number = 2.0,
    weight_by_centerness: bool = True,
    axis_name: Axis = None,
) -> Criterion:
    r"""The criterion of FCOS; terms `cls`, `box` and `centerness`, each with gain 1.

    $$ L = \frac{1}{P} \sum_{p,c} \mathrm{FL}(z_{pc}, [c = y_p])
       + \frac{\sum_p c_p (1 - \mathrm{GIoU}(\hat d_p, d_p))}{\sum_p c_p}
       + \frac{1}{P} \sum_p \mathrm{BCE}(o_p, c_p), \quad
       c = \sqrt{\frac{\min(l, r)}{\max(l, r)} \frac{\min(t, b)}{\max(t, b)}} $$

    with the last two sums over the foreground, $P$ its number of points in the batch, at least 1,
    and the centerness $c$ of the target. A label outside the classes on the foreground makes the
    total NaN.

    The targets come from `fcos_assign`, mapped over the images:

        assign = jax.vmap(fcos_assign, in_axes=(None, None, None, 0))
        index = assign(points, strides, levels, true_boxes, where=exists)
        target_boxes = jnp.take_along_axis(true_boxes, index[..., None], axis=1, mode="clip")
        target_labels = jnp.take_along_axis(true_labels, index, axis=1, mode="clip")
        target_distances = box_to_distances(target_boxes, points) / strides[:, None]
        foreground = index >= 0

    Args:
        class_logits: Log-odds of each class, without a background class.
        distances: Predicted distances (left, top, right, bottom) from point to sides, at least 0.
        centerness_logits: Log-odds of the centerness.
        target_labels: Class for which each foreground point answers.
        target_distances: True distances in the unit of `distances`, at least 0.
        foreground: Which points answer for an object; under the others only classes matter.
        alpha: Weight of target 1 in the focal loss, with `1 - alpha` for target 0.
        gamma: How strongly easy targets are played down.
        weight_by_centerness: Whether boxes count by their centerness; else each counts once and
            the sum is divided by $P$.
        axis_name: Mapped axis or axes over which sums and counts are added up.

    Returns:
        The total and its terms, scalars.

    Reference:
        Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, ICCV 2019, with the
        authors' GIoU loss. torchvision's `FCOSHead.compute_loss` is `weight_by_centerness=False`.

    >>> one, box = jnp.ones((1, 1), bool), jnp.array([[[1.0, 2.0, 1.0, 2.0]]])
    >>> total, terms = fcos_loss(
    ...     jnp.zeros((1, 1, 1)), 2 * box, jnp.zeros((1, 1)), jnp.zeros((1, 1), int), box, one
    ... )
    >>> {name: round(float(value), 4) for name, value in terms.items()}  # 3/4, log 2, log(2)/16
    {'box': 0.75, 'centerness': 0.6931, 'cls': 0.0433}
    """
    batch, count, classes = _dims("batch points classes", class_logits=class_logits)
    check_float(class_logits=class_logits, distances=distances, centerness_logits=centerness_logits)
    check_shape((batch, count, 4), distances=distances, target_distances=target_distances)
    check_shape((batch, count), centerness_logits=centerness_logits, target_labels=target_labels)
    check_integer(target_labels=target_labels)
    foreground = _mask((batch, count), foreground=foreground)
    labels, target = mask(foreground, jnp.asarray(target_labels), jnp.asarray(target_distances))
    ok = valid(labels, classes) | ~foreground
    require(lambda: ok, "target_labels", f"values in [0, {classes})")
    require(lambda: target >= 0, "target_distances", "values of at least 0")
    arrays = widen(class_logits, distances, centerness_logits, target)
    class_logits, distances, centerness_logits, target = arrays
    target = jax.lax.stop_gradient(target)
    centerness = safe_sqrt(_balance(target[..., ::2]) * _balance(target[..., 1::2]))
    weights = centerness if weight_by_centerness else jnp.ones_like(centerness)
    sums = dict(
        cls=sigmoid_focal_loss(
            poison(class_logits, ok[..., None]),
            one_hot(labels, classes) & foreground[..., None],
            alpha=alpha,
            gamma=gamma,
            reduction="sum",
        ),
        box=giou_loss(
            _around_origin(distances),
            _around_origin(target),
            where=foreground,
            weights=weights,
            reduction="sum",
        ),
        centerness=sigmoid_binary_cross_entropy(
            centerness_logits, centerness, where=foreground, reduction="sum"
        ),
    )
    terms = per_count(sums, jnp.sum(foreground), axis_name)
    if weight_by_centerness:
        weight = add_up(jnp.sum(jnp.where(foreground, centerness, 0)), axis_name)
        terms["box"] = safe_div(add_up(sums["box"], axis_name), weight)
    return total(terms, class_gain=1.0, box_gain=1.0, centerness_gain=1.0)


@compiled("axis_name")
def centernet_loss(
    heat_logits: Float[Array, "batch height width classes"],
    sizes: Float[Array, "batch height width 2"],
    offsets: Float[Array, "batch height width 2"],
    target_heatmap: Shaped[Array, "batch height width classes"],
    target_sizes: Shaped[Array, "batch height width 2"],
    target_offsets: Shaped[Array, "batch height width 2"],
    centers: Bool[Array, "batch height width"],
    *,
    heat_gain: Number = 1.0,
    size_gain: Number = 0.1,
    offset_gain: Number = 1.0,
    axis_name: Axis = None,
) -> Criterion:
    r"""The criterion of CenterNet (objects as points); terms `heat`, `size` and `offset`.

    $$ L = \frac{g_h}{N_1} \sum \mathrm{GF}(z, h)
       + \frac{1}{2 N_c} \sum_{\mathrm{centers}}
       \left( g_s \lVert \hat s - s \rVert_1 + g_o \lVert \hat o - o \rVert_1 \right) $$

    with the penalty-reduced focal loss GF of every cell and class, $N_1$ the number of cells of
    the heatmap that are exactly 1, $N_c$ the number of centers, both of the whole batch and at
    least 1.

    Args:
        heat_logits: Log-odds that an object of a class has its center in a cell.
        sizes: Predicted (width, height), in cells.
        offsets: Predicted offset (x, y) of a center from its cell, in cells.
        target_heatmap: A Gaussian about each center, exactly 1 in its cell, in [0, 1].
        target_sizes: True sizes, where `centers`.
        target_offsets: True offsets, where `centers`.
        centers: Which cells hold a center; under the others sizes and offsets do not matter.
        heat_gain: Weight of the heatmap.
        size_gain: Weight of the sizes.
        offset_gain: Weight of the offsets.
        axis_name: Mapped axis or axes over which sums and counts are added up.

    Returns:
        The total and its terms before their gains, scalars.

    Reference:
        Zhou et al., Objects as Points, 2019. The authors' code adds 1e-4 to the number of numbers
        where this takes the larger of the number of centers and 1.

    >>> heat, two = jnp.array([[[[1.0], [0.0]]]]), jnp.ones((1, 1, 2, 2))
    >>> total, terms = centernet_loss(0 * heat, two, two, heat, 0 * two, two, heat[..., 0] == 1)
    >>> {name: round(float(value), 4) for name, value in terms.items()}  # 2 log(2)/4, 0, 1
    {'heat': 0.3466, 'offset': 0.0, 'size': 1.0}
    """
    batch, height, width, _ = _dims("batch height width classes", heat_logits=heat_logits)
    check_float(heat_logits=heat_logits, sizes=sizes, offsets=offsets)
    check_shape(jnp.shape(heat_logits), target_heatmap=target_heatmap)
    check_shape((batch, height, width, 2), sizes=sizes, offsets=offsets)
    check_shape((batch, height, width, 2), target_sizes=target_sizes, target_offsets=target_offsets)
    centers = _mask((batch, height, width), centers=centers)
    heatmap, *targets = jax.lax.stop_gradient(widen(target_heatmap, target_sizes, target_offsets))
    both: dict[str, Any] = dict(
        where=jnp.broadcast_to(centers[..., None], jnp.shape(sizes)), reduction="sum"
    )
    heat = dict(heat=gaussian_focal_loss(heat_logits, heatmap, reduction="sum"))
    rest = dict(
        size=absolute_error(sizes, targets[0], **both) / 2,
        offset=absolute_error(offsets, targets[1], **both) / 2,
    )
    terms = per_count(heat, jnp.sum(heatmap == 1), axis_name)
    terms |= per_count(rest, jnp.sum(centers), axis_name)
    return total(terms, heat_gain=heat_gain, size_gain=size_gain, offset_gain=offset_gain)


@compiled("axis_name")
def detr_loss(
    logits: Float[Array, "batch q classes"],
    pred_boxes: Float[Array, "batch q 4"],
    labels: Integer[Array, "batch t"],
    boxes: Shaped[Array, "batch t 4"],
    match: Integer[Array, "batch t"],
    *,
    no_object_weight: Number = 0.1,
    class_gain: Number = 1.0,
    l1_gain: Number = 5.0,
    giou_gain: Number = 2.0,
    where: Bool[Array, "batch t"] | None = None,
    axis_name: Axis = None,
) -> Criterion:
    r"""The set criterion of DETR for a given matching; terms `cls`, `l1` and `giou`.

    $$ L = g_c \frac{\sum_q w_q \mathrm{CE}(z_q, y_q)}{\sum_q w_q}
       + \frac{1}{T} \sum_t \left( g_1 \lVert \hat b_{m(t)} - b_t \rVert_1
       + g_u (1 - \mathrm{GIoU}(\hat b_{m(t)}, b_t)) \right) $$

    where a matched query has the label of its object and $w = 1$, every other one "no object" and
    its weight; $T$ is the number of existing objects of the batch, at least 1, those without a
    query included. Without objects only `cls` has a gradient. The total is NaN if an existing
    object has a label outside the classes or a match outside the queries, or if two share a query.

    The matching comes from `hungarian_match`, mapped over the images:

        def match(logits, pred_boxes, labels, boxes, exists):
            return hungarian_match(detr_match_cost(logits, pred_boxes, labels, boxes), where=exists)

        jax.vmap(match)(logits, pred_boxes, labels, boxes, exists)

    Args:
        logits: For each query the classes and, last, "no object".
        pred_boxes: Predicted boxes (cx, cy, w, h), in shares of the image.
        labels: Classes of the objects, padded to a fixed number.
        boxes: Objects, as `pred_boxes`.
        match: The query of each object, -1 for none.
        no_object_weight: Weight of queries without an object in the classification.
        class_gain: Weight of the classification.
        l1_gain: Weight of the distance of the four numbers.
        giou_gain: Weight of the generalized IoU.
        where: Which objects exist; all if None. The others have no effect, whatever their match.
        axis_name: Mapped axis or axes over which sums and counts are added up.

    Returns:
        The total and its terms before their gains, scalars.

    Reference:
        Carion et al., End-to-End Object Detection with Transformers, ECCV 2020. Equals the authors'
        `SetCriterion` with `eos_coef=0.1` on one device; over several it averages the
        classification of the devices. Decoder layers: `jax.vmap` over them, then sum the totals.

    >>> pred = jnp.array([[[0.7, 0.5, 0.2, 0.2]]])
    >>> zero = jnp.array([[0]])
    >>> total, terms = detr_loss(
    ...     jnp.zeros((1, 1, 2)), pred, zero, jnp.array([[[0.5, 0.5, 0.2, 0.2]]]), zero
    ... )
    >>> {name: round(float(value), 4) for name, value in terms.items()}  # log 2, 1 - 0, 0.2
    {'cls': 0.6931, 'giou': 1.0, 'l1': 0.2}
    """
    batch, queries, channels = _dims("batch q classes", logits=logits)
    check_float(logits=logits, pred_boxes=pred_boxes)
    check_shape((batch, queries, 4), pred_boxes=pred_boxes)
    boxes, labels, exists = _objects(boxes, labels, where, batch)
    check_integer(match=match)
    check_shape(labels.shape, match=match)
    (match,) = mask(exists, jnp.asarray(match), fill=-1)
    logits, pred_boxes, boxes = widen(logits, pred_boxes, boxes)
    (weight,) = numbers(logits, no_object_weight=no_object_weight)
    boxes = jax.lax.stop_gradient(boxes)
    paired, hit = match >= 0, one_hot(match, queries)  # (b, t), (b, t, q)
    shares = jnp.sum(hit, axis=1)
    ok = valid(labels, channels - 1)
    require(lambda: ok, "labels", f"values in [0, {channels - 1})", exists)
    require(lambda: match < queries, "match", f"values in [-1, {queries})", exists)
    require(lambda: shares <= 1, "match", "different queries")
    ok = jnp.all((ok & (match >= -1) & (match < queries)) | ~exists, axis=1)
    ok &= jnp.all(shares <= 1, axis=1)
    truth = jnp.sum(jnp.where(hit, labels[..., None], 0), axis=1, dtype=labels.dtype)
    cls = softmax_cross_entropy(
        poison(logits, ok[:, None, None]),
        jnp.where(shares > 0, truth, channels - 1),
        weights=jnp.where(shares > 0, 1, weight),
        reduction="mean" if axis_name is None else across(axis_name),
    )
    pred = _take(pred_boxes, match)
    sums = dict(
        l1=box_l1_loss(pred, boxes, where=paired, reduction="sum"),
        giou=giou_loss(to_corners(pred), to_corners(boxes), where=paired, reduction="sum"),
    )
    terms = {"cls": cls, **per_count(sums, jnp.sum(exists), axis_name)}
    return total(terms, class_gain=class_gain, l1_gain=l1_gain, giou_gain=giou_gain)


def _take(values: Array, index: Array) -> Array:
    """`values[b, index[b, k]]`; anything for an index that is none."""
    if not values.shape[1]:
        return jnp.zeros((*index.shape, *values.shape[2:]), values.dtype)
    index = index.reshape(index.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1, mode="clip")


def _balance(pair: Array) -> Array:
    """The shorter of two distances over the longer one."""
    return safe_div(jnp.min(pair, axis=-1), jnp.max(pair, axis=-1))


def _around_origin(distances: Array) -> Array:
    """The box around a point at 0 with these distances to its sides."""
    return jnp.concatenate([-distances[..., :2], distances[..., 2:]], axis=-1)


def _side_lengths(like: Array, image_size: tuple[Number, Number]) -> Array:
    """The side of the image along which each of the four distances lies."""
    height, width = image_size
    (height,), (width,) = (numbers(like, image_size=size) for size in (height, width))
    return jnp.stack([width, height, width, height])[None, None]


def _objects(
    boxes: Any, labels: Any, where: Array | None, batch: int
) -> tuple[Array, Array, Array]:
    """Boxes and labels, zero where they do not exist, and which exist."""
    count = _dims("batch t 4", boxes=boxes)[1]
    check_shape((batch, count, 4), boxes=boxes)
    check_integer(labels=labels)
    check_shape((batch, count), labels=labels)
    exists = jnp.ones((batch, count), bool) if where is None else _mask((batch, count), where=where)
    boxes, labels = mask(exists, jnp.asarray(boxes), jnp.asarray(labels))
    return boxes, labels, exists


def _dims(names: str, **arrays: Any) -> tuple[int, ...]:
    """The shape of the argument, which has as many axes as names; a number stands for itself."""
    ((name, array),) = arrays.items()
    check_array(**arrays)
    shape, wanted = jnp.shape(array), names.split()
    fits = len(shape) == len(wanted) and all(
        not want.isdigit() or int(want) == size for want, size in zip(wanted, shape, strict=True)
    )
    if not fits:
        raise ValueError(message(name, f"shape ({', '.join(wanted)})", shape))
    return shape


def _mask(shape: tuple[int, ...], **arrays: Any) -> Array:
    check_shape(shape, **arrays)
    ((name, array),) = arrays.items()
    if not jnp.issubdtype(jnp.result_type(array), jnp.bool_):
        raise TypeError(message(name, "a bool array", jnp.result_type(array)))
    return jnp.asarray(array)


CASES: tuple[Case, ...] = ()
