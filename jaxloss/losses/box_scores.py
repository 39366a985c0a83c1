"""How well boxes agree: intersection over union and its generalizations, higher is better."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._core.boxes import area, check_boxes, ciou, diou, giou, iou, require_boxes
from .._core.checks import check_same_shape, message
from .._core.compiled import compiled
from .._core.numerics import widen

__all__ = [
    "box_area",
    "box_iou",
    "complete_box_iou",
    "distance_box_iou",
    "generalized_box_iou",
    "pairwise_box_iou",
    "pairwise_generalized_box_iou",
]


@compiled()
def box_area(boxes: Shaped[Array, "*batch corners"]) -> Array:
    """Area of boxes in square pixels, or volume in three dimensions; 0 for crossed corners.

    Args:
        boxes: Boxes `(*batch, 4)` or `(*batch, 6)`, low corner first.

    Returns:
        Float32 `(*batch,)`.

    >>> box_area(jnp.array([[0.0, 0.0, 2.0, 3.0]]))
    Array([6.], dtype=float32)
    """
    check_boxes(4, 6, boxes=boxes)
    (boxes,) = widen(boxes)
    return area(boxes)


@compiled()
def box_iou(a: Shaped[Array, "*batch corners"], b: Shaped[Array, "*batch corners"]) -> Array:
    r"""Intersection over union of pairs of boxes, in `[0, 1]`; 0 for two boxes without area.

    $$ \mathrm{IoU} = \frac{|A \cap B|}{|A \cup B|} $$

    Args:
        a: Boxes `(*batch, 4)` or `(*batch, 6)`, low corner first.
        b: Boxes of the same shape.

    Returns:
        Float32 `(*batch,)`.

    Reference:
        Jaccard, Étude comparative de la distribution florale, 1901. Equals the diagonal of
        torchvision's `box_iou`.

    >>> box_iou(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[1.0, 0.0, 3.0, 2.0]]))  # 2 / 6
    Array([0.33333334], dtype=float32)
    """
    return iou(*_alike(a, b, 4, 6))


@compiled()
def generalized_box_iou(
    a: Shaped[Array, "*batch corners"], b: Shaped[Array, "*batch corners"]
) -> Array:
    r"""IoU minus the share of the enclosing box that neither box covers, in `[-1, 1]`.

    $$ \mathrm{GIoU} = \mathrm{IoU} - \frac{|C| - |A \cup B|}{|C|} $$

    with C the smallest box around both.

    Args:
        a: Boxes `(*batch, 4)` or `(*batch, 6)`, low corner first.
        b: Boxes of the same shape.

    Returns:
        Float32 `(*batch,)`.

    Reference:
        Rezatofighi et al., Generalized Intersection over Union, CVPR 2019. Equals the diagonal of
        torchvision's `generalized_box_iou`.

    >>> generalized_box_iou(jnp.array([[0.0, 0.0, 1.0, 1.0]]), jnp.array([[3.0, 0.0, 4.0, 1.0]]))
    Array([-0.5], dtype=float32)
    """
    return giou(*_alike(a, b, 4, 6))


@compiled()
def distance_box_iou(
    a: Shaped[Array, "*batch corners"], b: Shaped[Array, "*batch corners"]
) -> Array:
    r"""IoU minus the squared distance of the centres, relative to the enclosing box, in `[-1, 1]`.

    $$ \mathrm{DIoU} = \mathrm{IoU} - \frac{\rho^2}{c^2} $$

    with $\rho$ the distance of the centres and $c$ the diagonal of the smallest box around both.

    Args:
        a: Boxes `(*batch, 4)` or `(*batch, 6)`, low corner first.
        b: Boxes of the same shape.

    Returns:
        Float32 `(*batch,)`.

    Reference:
        Zheng et al., Distance-IoU Loss, AAAI 2020. Equals the diagonal of torchvision's
        `distance_box_iou`.

    >>> distance_box_iou(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[2.0, 0.0, 4.0, 2.0]]))
    Array([-0.2], dtype=float32)
    """
    return diou(*_alike(a, b, 4, 6))


@compiled()
def complete_box_iou(a: Shaped[Array, "*batch 4"], b: Shaped[Array, "*batch 4"]) -> Array:
    r"""Distance IoU minus a term for different aspect ratios, at most 1.

    $$ \mathrm{CIoU} = \mathrm{IoU} - \frac{\rho^2}{c^2} - \alpha v, \quad
       v = \frac{4}{\pi^2} \left(\arctan \frac{w_b}{h_b} - \arctan \frac{w_a}{h_a}\right)^2, \quad
       \alpha = \frac{v}{1 - \mathrm{IoU} + v} $$

    with $\alpha$ constant in the gradient. A box without width and height has angle 0.

    Args:
        a: Boxes `(*batch, 4)` as `(x0, y0, x1, y1)`.
        b: Boxes of the same shape.

    Returns:
        Float32 `(*batch,)`.

    Reference:
        Zheng et al., Distance-IoU Loss, AAAI 2020. Equals the diagonal of torchvision's
        `complete_box_iou`.

    >>> complete_box_iou(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 2.0]]))
    Array([1.], dtype=float32)
    """
    return ciou(*_alike(a, b, 4))


@compiled()
def pairwise_box_iou(a: Shaped[Array, "n corners"], b: Shaped[Array, "m corners"]) -> Array:
    """Intersection over union of every box of one set with every box of another, in `[0, 1]`.

    Args:
        a: Boxes `(n, 4)` or `(n, 6)`, low corner first.
        b: Boxes `(m, 4)` or `(m, 6)`.

    Returns:
        Float32 `(n, m)`.

    Reference:
        Jaccard, Étude comparative de la distribution florale, 1901. Equals torchvision's `box_iou`.

    >>> pairwise_box_iou(jnp.array([[0.0, 0.0, 2.0, 2.0]]), jnp.array([[0.0, 0.0, 2.0, 1.0]]))
    Array([[0.5]], dtype=float32)
    """
    return iou(*_sets(a, b))


@compiled()
def pairwise_generalized_box_iou(
    a: Shaped[Array, "n corners"], b: Shaped[Array, "m corners"]
) -> Array:
    """Generalized IoU of every box of one set with every box of another, in `[-1, 1]`.

    Args:
        a: Boxes `(n, 4)` or `(n, 6)`, low corner first.
        b: Boxes `(m, 4)` or `(m, 6)`.

    Returns:
        Float32 `(n, m)`.

    Reference:
        Rezatofighi et al., Generalized Intersection over Union, CVPR 2019. Equals torchvision's
        `generalized_box_iou`.

    >>> boxes = jnp.array([[0.0, 0.0, 1.0, 1.0], [3.0, 0.0, 4.0, 1.0]])
    >>> pairwise_generalized_box_iou(boxes[:1], boxes)
    Array([[ 1. , -0.5]], dtype=float32)
    """
    return giou(*_sets(a, b))


def _alike(a: Array, b: Array, *sizes: int) -> tuple[Array, Array]:
    check_boxes(*sizes, a=a)
    check_same_shape(a=a, b=b)
    a, b = widen(a, b)
    require_boxes(a=a, b=b)
    return a, b


def _sets(a: Array, b: Array) -> tuple[Array, Array]:
    check_boxes(4, 6, a=a)
    check_boxes(jnp.shape(a)[-1], b=b)
    a, b = widen(a, b)
    for name, boxes in (("a", a), ("b", b)):
        if boxes.ndim != 2:
            expected = "two axes, boxes and corners (use jax.vmap for batches)"
            raise ValueError(message(name, expected, f"shape {boxes.shape}"))
    require_boxes(a=a, b=b)
    return a[:, None], b[None]


CASES = ()
