"""Boxes in other notations: the formats of datasets, and scaling."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._core.boxes import check_boxes, to_corners
from .._core.checks import message
from .._core.compiled import compiled
from .._core.numerics import numbers, widen
from .._core.typing import Number

__all__ = [
    "cxcywh_to_xyxy",
    "scale_boxes",
    "xywh_to_xyxy",
    "xyxy_to_cxcywh",
    "xyxy_to_xywh",
    "yxyx_to_xyxy",
]


@compiled()
def cxcywh_to_xyxy(boxes: Shaped[Array, "*batch 4"]) -> Array:
    """Boxes from centre and size to corners, `(cx, cy, w, h)` to `(x0, y0, x1, y1)`.

    Args:
        boxes: Boxes `(*batch, 4)`.

    Returns:
        Float32 boxes of the same shape.

    >>> cxcywh_to_xyxy(jnp.array([2.0, 3.0, 2.0, 4.0]))
    Array([1., 1., 3., 5.], dtype=float32)
    """
    check_boxes(boxes=boxes)
    (boxes,) = widen(boxes)
    return to_corners(boxes)


@compiled()
def xyxy_to_cxcywh(boxes: Shaped[Array, "*batch 4"]) -> Array:
    """Boxes from corners to centre and size, `(x0, y0, x1, y1)` to `(cx, cy, w, h)`.

    Args:
        boxes: Boxes `(*batch, 4)`.

    Returns:
        Float32 boxes of the same shape.

    >>> xyxy_to_cxcywh(jnp.array([1.0, 1.0, 3.0, 5.0]))
    Array([2., 3., 2., 4.], dtype=float32)
    """
    check_boxes(boxes=boxes)
    (boxes,) = widen(boxes)
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([0.5 * low + 0.5 * high, high - low], axis=-1)


@compiled()
def xywh_to_xyxy(boxes: Shaped[Array, "*batch 4"]) -> Array:
    """Boxes from low corner and size to corners, `(x0, y0, w, h)` to `(x0, y0, x1, y1)`.

    Args:
        boxes: Boxes `(*batch, 4)`, as COCO stores them.

    Returns:
        Float32 boxes of the same shape.

    >>> xywh_to_xyxy(jnp.array([1.0, 1.0, 2.0, 4.0]))
    Array([1., 1., 3., 5.], dtype=float32)
    """
    check_boxes(boxes=boxes)
    (boxes,) = widen(boxes)
    low, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([low, low + size], axis=-1)


@compiled()
def xyxy_to_xywh(boxes: Shaped[Array, "*batch 4"]) -> Array:
    """Boxes from corners to low corner and size, `(x0, y0, x1, y1)` to `(x0, y0, w, h)`.

    Args:
        boxes: Boxes `(*batch, 4)`.

    Returns:
        Float32 boxes of the same shape.

    >>> xyxy_to_xywh(jnp.array([1.0, 1.0, 3.0, 5.0]))
    Array([1., 1., 2., 4.], dtype=float32)
    """
    check_boxes(boxes=boxes)
    (boxes,) = widen(boxes)
    low, high = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([low, high - low], axis=-1)


@compiled()
def yxyx_to_xyxy(boxes: Shaped[Array, "*batch 4"]) -> Array:
    """Boxes with rows first to boxes with columns first; its own inverse.

    Args:
        boxes: Boxes `(*batch, 4)` as `(y0, x0, y1, x1)`, the order of TensorFlow.

    Returns:
        Float32 boxes of the same shape, as `(x0, y0, x1, y1)`.

    >>> yxyx_to_xyxy(jnp.array([1.0, 2.0, 3.0, 4.0]))
    Array([2., 1., 4., 3.], dtype=float32)
    """
    check_boxes(boxes=boxes)
    (boxes,) = widen(boxes)
    y0, x0, y1, x1 = (boxes[..., k] for k in range(4))
    return jnp.stack([x0, y0, x1, y1], axis=-1)


@compiled()
def scale_boxes(boxes: Shaped[Array, "*batch 4"], factors: Sequence[Number]) -> Array:
    """Boxes in another unit: pixels from fractions of the image, or back.

    Args:
        boxes: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)` or `(cx, cy, w, h)`.
        factors: Factors `(fx, fy)` of x and y, such as width and height of the image.

    Returns:
        Float32 boxes of the same shape.

    >>> scale_boxes(jnp.array([0.0, 0.5, 0.5, 1.0]), (640, 480))
    Array([  0., 240., 320., 480.], dtype=float32)
    """
    check_boxes(boxes=boxes)
    (boxes,) = widen(boxes)
    if len(factors) != 2:
        raise ValueError(message("factors", "two numbers (fx, fy)", f"{len(factors)}"))
    fx, fy = numbers(boxes, fx=factors[0], fy=factors[1])
    scale = jnp.stack([fx, fy, fx, fy]).reshape((1,) * (boxes.ndim - 1) + (4,))
    return boxes * scale


CASES = ()
