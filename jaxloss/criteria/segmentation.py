"""Segmentation criteria: cross-entropy of every position together with an overlap loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, draw_labels, draw_normal, draw_probs
from .._core.compiled import compiled
from .._core.numerics import numbers, safe_div, widen
from .._core.reduce import mask, reduce
from .._core.regions import prepare_regions, region_units
from .._core.typing import Number, Reduction, Values, Where
from ..losses.classification import softmax_cross_entropy
from ..losses.segmentation import jaccard_loss

__all__ = ["cross_entropy_iou_loss"]


@compiled()
def cross_entropy_iou_loss(
    logits: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    ce_weight: Number = 0.5,
    iou_weight: Number = 0.5,
    smooth: Number = 1.0,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Weighted sum of cross-entropy (in nats) and soft Jaccard loss of each sample, from 0 up.

    $$ \ell = \lambda_{CE}\, \frac{1}{N} \sum_i -\log p_{i y_i}
       + \lambda_{IoU}\, \frac{1}{K} \sum_c \left(1 - \frac{I_c + s}{P_c + G_c - I_c + s}\right) $$

    over the $N$ kept positions and $K$ classes, with $p$ the softmax of the logits and $I$, $P$ and
    $G$ as in `jaccard_loss`. A label outside `[0, classes)` makes its sample NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last, any number of axes of space.
        target: Integer labels without the class axis, or target probabilities that sum to one.
        ce_weight: Weight of the cross-entropy.
        iou_weight: Weight of the Jaccard loss.
        smooth: Added to both sides of the Jaccard quotient, in positions.
        ignore_index: Integer label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Rahman and Wang, Optimizing Intersection-Over-Union in Deep Neural Networks for Image
        Segmentation, ISVC 2016, averaged with cross-entropy. Equals the same sum of torch's
        `cross_entropy` and a soft Jaccard loss for each image.

    >>> logits = jnp.zeros((1, 2, 2))  # log 2; I = 1/2 and union 3/2 for both classes
    >>> cross_entropy_iou_loss(logits, jnp.array([[0, 1]]))  # (0.693 + 0.4) / 2
    Array(0.5465736, dtype=float32)
    """
    logits, target, where = prepare_regions(
        logits, target, where=where, ignore_index=ignore_index, first="logits"
    )
    (logits,) = mask(where, *widen(logits))
    ce_weight, iou_weight = numbers(logits, ce_weight=ce_weight, iou_weight=iou_weight)
    entropy = softmax_cross_entropy(logits, target, where=where, reduction="none")
    probs = jax.nn.softmax(logits, axis=-1)
    overlap = jaccard_loss(probs, target, smooth=smooth, where=where, reduction="none")
    kept = jnp.ones(entropy.shape, bool) if where is None else where
    space = tuple(range(1, entropy.ndim))
    count = jnp.sum(kept, axis=space, dtype=entropy.dtype)
    values = ce_weight * safe_div(jnp.sum(entropy, axis=space), count)
    values += iou_weight * jnp.sum(overlap, axis=-1) / max(overlap.shape[-1], 1)
    units = region_units(where, values)
    return reduce(values, where=units, weights=weights, reduction=reduction)


_LABELS = dict(logits=draw_normal("B H W C", scale=2), target=draw_labels("B H W"))
_DENSE = dict(logits=draw_normal("B T C", scale=2), target=draw_probs("B T C"))

CASES = (
    Case(
        cross_entropy_iou_loss,
        _LABELS,
        dict(ce_weight=0.4, iou_weight=0.7, smooth=0.5, ignore_index=2),
        positions="B H W",
        sizes=dict(H=3, W=4),
    ),
    Case(cross_entropy_iou_loss, _DENSE, label="dense", positions="B T", sizes=dict(T=6)),
)
