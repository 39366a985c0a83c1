"""What detection heads predict instead of boxes: deltas to anchors, distances to points."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._core.boxes import check_boxes, to_corners, to_distances
from .._core.checks import check_array, check_last, message, naming
from .._core.compiled import compiled
from .._core.numerics import numbers, safe_div, safe_log, widen
from .._core.typing import Number

__all__ = [
    "box_to_distances",
    "decode_deltas",
    "distances_to_box",
    "encode_deltas",
    "grid_points",
]

_MAX_LOG = math.log(1000 / 16)


@compiled()
def encode_deltas(
    boxes: Shaped[Array, "*batch 4"],
    anchors: Shaped[Array, "*anchors 4"],
    *,
    scales: Sequence[Number] = (1.0, 1.0, 1.0, 1.0),
) -> Array:
    r"""Boxes as shifts and log sizes relative to anchors: the targets of an R-CNN head.

    $$ \left(s_x \frac{c_x - c_x^a}{w^a},\ s_y \frac{c_y - c_y^a}{h^a},\ s_w \log \frac{w}{w^a},\
       s_h \log \frac{h}{h^a}\right) $$

    A box without width or height has -inf there; an anchor without one gives 0 in the shift.

    Args:
        boxes: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        anchors: Anchors of the shape of `boxes`, or of its last axes, shared by the others.
        scales: Four factors; R-CNN heads use `(10, 10, 5, 5)`, RetinaNet ones.

    Returns:
        Float32 deltas of the shape of `boxes`.

    Reference:
        Girshick et al., Rich feature hierarchies for accurate object detection, CVPR 2014. Equals
        torchvision's `BoxCoder(weights=scales).encode`.

    >>> encode_deltas(jnp.array([[1.0, 1.0, 3.0, 5.0]]), jnp.array([[0.0, 0.0, 2.0, 4.0]]))
    Array([[0.5 , 0.25, 0.  , 0.  ]], dtype=float32)
    """
    boxes, anchors, factors = _pair("boxes", boxes, anchors, scales)
    low, high = boxes[..., :2], boxes[..., 2:]
    low_ref, high_ref = anchors[..., :2], anchors[..., 2:]
    size, size_ref = high - low, high_ref - low_ref
    shift = safe_div(0.5 * (low - low_ref) + 0.5 * (high - high_ref), size_ref)
    return jnp.concatenate([shift, safe_log(safe_div(size, size_ref))], axis=-1) * factors


@compiled()
def decode_deltas(
    deltas: Shaped[Array, "*batch 4"],
    anchors: Shaped[Array, "*anchors 4"],
    *,
    scales: Sequence[Number] = (1.0, 1.0, 1.0, 1.0),
    max_log: Number = _MAX_LOG,
) -> Array:
    """Boxes from shifts and log sizes relative to anchors: the inverse of `encode_deltas`.

    Args:
        deltas: Deltas `(*batch, 4)`.
        anchors: Anchors of the shape of `deltas`, or of its last axes, shared by the others.
        scales: The four factors used for encoding.
        max_log: Largest logarithm of a ratio of sizes, so that none overflows, log(1000 / 16) if
            not given; clipped ones have gradient 0.

    Returns:
        Float32 boxes `(x0, y0, x1, y1)` of the shape of `deltas`.

    Reference:
        Girshick et al., Rich feature hierarchies for accurate object detection, CVPR 2014. Equals
        torchvision's `BoxCoder(weights=scales).decode_single`.

    >>> decode_deltas(jnp.array([[0.5, 0.25, 0.0, 0.0]]), jnp.array([[0.0, 0.0, 2.0, 4.0]]))
    Array([[1., 1., 3., 5.]], dtype=float32)
    """
    deltas, anchors, factors = _pair("deltas", deltas, anchors, scales)
    (max_log,) = numbers(deltas, max_log=max_log)
    shift, log_ratio = jnp.split(deltas / factors, 2, axis=-1)
    low, high = anchors[..., :2], anchors[..., 2:]
    log_ratio = jnp.where(log_ratio < max_log, log_ratio, max_log)
    center = shift * (high - low) + 0.5 * (low + high)
    return to_corners(jnp.concatenate([center, jnp.exp(log_ratio) * (high - low)], axis=-1))


def _pair(
    name: str, values: Array, anchors: Array, scales: Sequence[Number]
) -> tuple[Array, Array, Array]:
    """Both widened and of one shape, and the four scales ready to multiply with them."""
    check_boxes(**{name: values}, anchors=anchors)
    values, anchors = widen(values, anchors)
    if len(scales) != 4:
        raise ValueError(message("scales", "four numbers", f"{len(scales)}"))
    four = numbers(values, **{f"scales[{i}]": scale for i, scale in enumerate(scales)})
    stretch = jnp.stack(four).reshape((1,) * (values.ndim - 1) + (4,))
    return values, _share("anchors", anchors, values.shape), stretch


def _share(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """`array` repeated over the leading axes of `shape` that it lacks."""
    if array.ndim > len(shape) or array.shape != shape[len(shape) - array.ndim :]:
        raise ValueError(message(name, f"shape {shape} or its last axes", f"shape {array.shape}"))
    return jnp.broadcast_to(array, shape)


@compiled()
def box_to_distances(boxes: Shaped[Array, "*batch 4"], points: Shaped[Array, "*points 2"]) -> Array:
    """Distances from points to the left, top, right and bottom sides of boxes.

    Args:
        boxes: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        points: Points `(*batch, 2)` as (x, y), or of the last axes of that shape.

    Returns:
        Float32 `(x - x0, y - y0, x1 - x, y1 - y)`, all positive for a point inside.

    Reference:
        Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, ICCV 2019.

    >>> box_to_distances(jnp.array([[0.0, 0.0, 4.0, 6.0]]), jnp.array([[1.0, 2.0]]))
    Array([[1., 2., 3., 4.]], dtype=float32)
    """
    check_boxes(boxes=boxes)
    check_last(2, points=points)
    boxes, points = widen(boxes, points)
    points = _share("points", points, (*boxes.shape[:-1], 2))
    return to_distances(boxes, points)


@compiled()
def distances_to_box(
    distances: Shaped[Array, "*batch 4"], points: Shaped[Array, "*points 2"]
) -> Array:
    """Boxes from the distances of points to their four sides: the inverse of `box_to_distances`.

    Args:
        distances: Distances `(*batch, 4)` to the left, top, right and bottom sides.
        points: Points `(*batch, 2)` as (x, y), or of the last axes of that shape.

    Returns:
        Float32 boxes `(x0, y0, x1, y1)`.

    Reference:
        Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, ICCV 2019.

    >>> distances_to_box(jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.array([[1.0, 2.0]]))
    Array([[0., 0., 4., 6.]], dtype=float32)
    """
    check_boxes(distances=distances)
    check_last(2, points=points)
    distances, points = widen(distances, points)
    points = _share("points", points, (*distances.shape[:-1], 2))
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)


def grid_points(
    shapes: Sequence[tuple[int, int]], strides: Sequence[float], *, offset: float = 0.5
) -> tuple[Float[Array, "points 2"], Float[Array, " points"]]:
    """Points of all cells of a feature pyramid, in pixels: level by level, rows first.

    Args:
        shapes: Height and width of each level, in cells.
        strides: Pixels between neighbouring cells of each level.
        offset: Where a point lies in its cell: 0.5 is the middle.

    Returns:
        Points `(points, 2)` with x = (column + offset) stride and y = (row + offset) stride, and
        the stride of each, `(points,)`.

    >>> points, strides = grid_points([(1, 2)], [8])
    >>> points
    Array([[ 4.,  4.],
           [12.,  4.]], dtype=float32)
    """
    with naming("grid_points"):
        check_array(offset=offset)
        if len(shapes) != len(strides):
            expected = f"one stride for each of {len(shapes)} levels"
            raise ValueError(message("strides", expected, f"{len(strides)}"))
    levels = [np.zeros((0, 3))]
    for (height, width), stride in zip(shapes, strides, strict=True):
        rows, columns = np.indices((height, width)).reshape(2, -1)
        cells = [columns + offset, rows + offset, np.ones(height * width)]
        levels.append(np.stack(cells, axis=-1) * stride)
    table = jnp.asarray(np.concatenate(levels), jnp.float32)
    return table[:, :2], table[:, 2]


CASES = ()
