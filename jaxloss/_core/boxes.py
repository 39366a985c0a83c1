"""Geometry of axis-aligned boxes: corners first low, then high, on a last axis of 4 or 6 numbers.

All functions broadcast, so `f(a[:, None], b[None])` compares all pairs. Sizes come from
differences of coordinates and areas from sizes in a unit near the enclosing box, so that neither
the place nor the scale of a pair costs digits or leaves the range of floats. 0/0 is 0; the sides of
crossed boxes count as 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .checks import check_array, check_float, check_same_shape, message, require
from .numerics import power_of_two, safe_div, safe_log, widen
from .reduce import mask
from .typing import Where


def check_boxes(*sizes: int, **boxes: Any) -> None:
    """The last axis of each argument has one of these sizes (4 if none is named)."""
    check_array(**boxes)
    for name, array in boxes.items():
        if not jnp.ndim(array) or jnp.shape(array)[-1] not in (sizes or (4,)):
            expected = "a last axis of size " + " or ".join(map(str, sizes or (4,)))
            raise ValueError(message(name, expected, f"shape {jnp.shape(array)}"))


def require_boxes(where: Where | None = None, **boxes: Array) -> None:
    """Under `jaxloss.checked`, crossed boxes raise."""
    for name, array in boxes.items():
        dim = array.shape[-1] // 2
        ok = lambda a=array, d=dim: jnp.all(a[..., d:] >= a[..., :d], axis=-1)
        require(ok, name, "boxes whose high corner is not below the low one", where)


def prepare_boxes(
    pred: Array, target: Any, where: Where | None, *sizes: int
) -> tuple[Array, Array]:
    """Check, mask and widen a pair of boxes."""
    check_float(pred=pred)
    check_boxes(*sizes, pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    require_boxes(where, pred=pred, target=target)
    return pred, target


class Sides(NamedTuple):
    """A pair of boxes along each axis, `(*batch, axes)`: lengths, and the way between the centres.

    `offset` is the centre of the first minus that of the second.
    """

    first: Array
    second: Array
    both: Array
    hull: Array
    offset: Array


def sides(a: Array, b: Array) -> Sides:
    """Lengths of two boxes, of their intersection and of the smallest box around both."""
    (a0, a1), (b0, b1) = _corners(a), _corners(b)
    both, hull = _common(a0, a1, b0, b1)
    offset = 0.5 * (a0 - b0) + 0.5 * (a1 - b1)
    return Sides(jax.nn.relu(a1 - a0), jax.nn.relu(b1 - b0), both, hull, offset)


@jax.custom_jvp
def _common(a0: Array, a1: Array, b0: Array, b1: Array) -> tuple[Array, Array]:
    """Lengths of the intersection and of the hull of two intervals."""
    both = jnp.minimum(a1, b1) - jnp.maximum(a0, b0)
    hull = jnp.maximum(a1, b1) - jnp.minimum(a0, b0)
    return jax.nn.relu(both), jax.nn.relu(hull)


@_common.defjvp
def _common_jvp(
    primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    # 2 max(a, b) = a + b + |a - b|: the derivative of all four corners in a few operations.
    a0, a1, b0, b1 = primals
    a0_dot, a1_dot, b0_dot, b1_dot = tangents
    both, hull = _common(*primals)
    total = a1_dot - a0_dot + b1_dot - b0_dot
    edges = jnp.sign(a0 - b0) * (a0_dot - b0_dot) + jnp.sign(a1 - b1) * (a1_dot - b1_dot)
    moved = lambda length, change: jnp.where(length > 0, 0.5 * change, 0)
    return (both, hull), (moved(both, total - edges), moved(hull, total + edges))


def _corners(boxes: Array) -> tuple[Array, Array]:
    dim = boxes.shape[-1] // 2
    return boxes[..., :dim], boxes[..., dim:]


class Overlap(NamedTuple):
    """Areas (volumes) of a pair, up to a common factor that brings the enclosing box near 1.

    `intersection`; `outside` = union - intersection; `gap` = enclosing box - union. The last two
    are sums, free of the cancellation in these differences: exactly 0 for equal boxes.
    """

    intersection: Array
    outside: Array
    gap: Array


def overlap(pair: Sides) -> Overlap:
    """How much of one another and of the enclosing box a pair of boxes covers."""
    scale = _scale(pair)
    first, second, both, hull = (scale * x for x in pair[:4])
    alone = _excess(second, both)
    return Overlap(_product(both), _excess(first, both) + alone, _excess(hull, first) - alone)


def _scale(pair: Sides) -> Array:
    """What brings the longest side of the enclosing box near 1, and rounds nothing."""
    return 1 / power_of_two(_longest(pair.hull))[..., None]


def _product(lengths: Array) -> Array:
    total = lengths[..., 0]
    for k in range(1, lengths.shape[-1]):
        total = total * lengths[..., k]
    return total


def _sum(lengths: Array) -> Array:
    return sum((lengths[..., k] for k in range(1, lengths.shape[-1])), lengths[..., 0])


def _longest(lengths: Array) -> Array:
    longest = lengths[..., 0]
    for k in range(1, lengths.shape[-1]):
        longest = jnp.maximum(longest, lengths[..., k])
    return longest


def _excess(whole: Array, part: Array) -> Array:
    """Product of `whole` minus product of `part`, as a sum over the differences of lengths."""
    missing = whole - part
    excess, inside = missing[..., 0], part[..., 0]
    for k in range(1, whole.shape[-1]):
        excess = excess * whole[..., k] + inside * missing[..., k]
        inside = inside * part[..., k]
    return excess


@jax.custom_jvp
def share(part: Array, rest: Array) -> Array:
    """What `part` makes up of part + rest, two numbers of at least 0; 0/0 is 0."""
    total = part + rest
    return part / jnp.where(total == 0, 1, total)


@share.defjvp
def _share_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # d(p / (p + r)) = (r dp - p dr) / (p + r)^2: no digit is lost where the share is 0 or 1.
    part, rest = primals
    part_dot, rest_dot = tangents
    empty = part + rest == 0
    total = jnp.where(empty, 1, part + rest)
    moved = (rest / total) * (part_dot / total) - (part / total) * (rest_dot / total)
    return share(part, rest), jnp.where(empty, 0, moved)


def area(boxes: Array) -> Array:
    """Area (volume), in the squared (cubed) unit of the boxes."""
    low, high = _corners(boxes)
    return _product(jax.nn.relu(high - low))


def intersection(a: Array, b: Array) -> Array:
    """Area of the intersection, in the squared unit of the boxes."""
    return _product(sides(a, b).both)


def enclosing_box(a: Array, b: Array) -> Array:
    """The smallest box around both."""
    (a0, a1), (b0, b1) = _corners(a), _corners(b)
    return jnp.concatenate([jnp.minimum(a0, b0), jnp.maximum(a1, b1)], axis=-1)


def iou_of(o: Overlap) -> Array:
    """Intersection over union, in [0, 1]."""
    return share(o.intersection, o.outside)


def iou_cost(o: Overlap) -> Array:
    """1 - IoU, with every digit."""
    return jnp.where(o.intersection + o.outside == 0, 1, share(o.outside, o.intersection))


def log_iou(o: Overlap) -> Array:
    """Logarithm of IoU, with every digit near 1; for IoU 0 it is -inf with zero gradient."""
    cost = iou_cost(o)
    near = cost < 0.5
    far = safe_log(jnp.where(near, 1, iou_of(o)))
    return jnp.where(near, jnp.log1p(-jnp.where(near, cost, 0)), far)


def hull_cost(o: Overlap) -> Array:
    """Share of the enclosing box that neither box covers: what GIoU adds to 1 - IoU."""
    return share(o.gap, o.intersection + o.outside)


def distance_cost(pair: Sides, weights: float | Array = 1.0) -> Array:
    """Squared distance of the centres over the squared diagonal of the enclosing box: DIoU.

    `weights` says how much the way along each axis counts.
    """
    scale = _scale(pair)
    way = _sum(weights * (scale * pair.offset) ** 2)
    return safe_div(way, _sum((scale * pair.hull) ** 2))


def aspect_cost(pair: Sides) -> Array:
    """Squared difference of the angles atan(w / h) over (pi / 2)^2: v of CIoU, in [0, 1].

    A box without width and height has angle 0. One arc tangent of the difference of the angles:
    it is exactly 0 for equal shapes and keeps its digits near them.
    """
    (w, h), (w_ref, h_ref) = _shape(pair.first), _shape(pair.second)
    turn = jnp.arctan2((w_ref - w) * h - w * (h_ref - h), w * w_ref + h * h_ref)
    return (4 / np.pi**2) * turn**2


def _shape(size: Array) -> tuple[Array, Array]:
    """Width and height in a unit near the longer one; a point is (0, 1)."""
    longer = jax.lax.stop_gradient(_longest(size))
    scale = 1 / power_of_two(longer)
    return scale * size[..., 0], jnp.where(longer == 0, 1, scale * size[..., 1])


def iou(a: Array, b: Array) -> Array:
    """Intersection over union, in [0, 1]."""
    return iou_of(overlap(sides(a, b)))


def giou(a: Array, b: Array) -> Array:
    """Generalized IoU, in [-1, 1]."""
    o = overlap(sides(a, b))
    return iou_of(o) - hull_cost(o)


def diou(a: Array, b: Array) -> Array:
    """Distance IoU, in [-1, 1]."""
    pair = sides(a, b)
    return iou_of(overlap(pair)) - distance_cost(pair)


def ciou(a: Array, b: Array, *, alpha_threshold: Array | None = None) -> Array:
    """Complete IoU, at most 1: IoU, distance of the centres and aspect ratio."""
    pair = sides(a, b)
    o = overlap(pair)
    return iou_of(o) - distance_cost(pair) - shape_cost(pair, o, alpha_threshold=alpha_threshold)


def shape_cost(
    pair: Sides,
    o: Overlap,
    *,
    alpha_threshold: Array | None = None,
    stop_gradient_alpha: bool = True,
) -> Array:
    """The term alpha v of CIoU, alpha = v / (1 - IoU + v); 0 up to an IoU of `alpha_threshold`."""
    v, cost = aspect_cost(pair), iou_cost(o)
    alpha = share(v, cost)
    if alpha_threshold is not None:
        alpha = jnp.where(cost < 1 - alpha_threshold, alpha, 0)
    return (jax.lax.stop_gradient(alpha) if stop_gradient_alpha else alpha) * v


def to_corners(boxes: Array) -> Array:
    """(cx, cy, w, h) to (x0, y0, x1, y1)."""
    center, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return jnp.concatenate([center - half, center + half], axis=-1)


def to_distances(boxes: Array, points: Array) -> Array:
    """How far the sides of a box lie from a point: left, top, right, bottom; outside it negative.

    Broadcasts over the leading axes.
    """
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)
