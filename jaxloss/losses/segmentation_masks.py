"""Cross-entropies of masks: one mask for each object, and logits that follow their neighbours."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, draw_binary, draw_labels, draw_normal
from .._core.checks import check_float, check_integer, check_min_rank, check_shape, message, require
from .._core.compiled import compiled
from .._core.labels import poison, prepare, valid
from .._core.numerics import absolute, numbers, safe_div
from .._core.reduce import mask, reduce
from .._core.regions import kept_positions, region_units
from .._core.sharding import one_hot, pick
from .._core.sigmoid import binary_cross_entropy, prepare_binary
from .._core.softmax import cross_entropy
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["mask_cross_entropy", "neighbor_aware_margin_loss"]


@compiled()
def mask_cross_entropy(
    logits: Float[Array, " n *space classes"],
    masks: Shaped[Array, " n *space"],
    labels: Integer[Array, " n"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Binary cross-entropy of each object's mask, in nats, from 0 up: only its own class counts.

    $$ \ell = \frac{1}{N} \sum_i \mathrm{BCE}(z_{i y}, m_i) $$

    over the $N$ kept positions of an object of class $y$. A label outside `[0, classes)` makes its
    object NaN, as does an integer mask with another value than 0 and 1.

    Args:
        logits: Log-odds of being inside, one map for each object and class, classes last.
        masks: True masks without the class axis: integers 0 and 1, bools, or shares in `[0, 1]`.
        labels: Class of each object.
        where: Bool array `(n, *space)`; an object with no kept position is no unit.

    One unit per object; see `jaxloss.reduce`. For masks cropped to boxes, `where` is the inside of
    the box.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        He et al., Mask R-CNN, ICCV 2017. Equals torch's `binary_cross_entropy_with_logits` of the
        labelled channels, averaged over each object.

    >>> logits = jnp.array([[[0.0, 50.0], [0.0, -50.0]]])
    >>> mask_cross_entropy(logits, jnp.array([[0, 1]]), jnp.array([0]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    check_float(logits=logits)
    check_min_rank(2, logits=logits)
    check_integer(labels=labels)
    check_shape(logits.shape[:1], labels=labels)
    check_shape(logits.shape[:-1], masks=masks)
    labels, masks = jnp.asarray(labels), jnp.asarray(masks)
    where = kept_positions(masks.shape, masks, where)
    ok = valid(labels, logits.shape[-1])
    some = region_units(where, labels)
    require(lambda: ok, "labels", f"values in [0, {logits.shape[-1]})", some)
    space = (1,) * (masks.ndim - 1)
    ids = jnp.broadcast_to(labels.reshape(-1, *space), masks.shape)
    (logits,) = mask(where, logits)
    chosen = pick(logits, ids)
    chosen, masks = prepare_binary(chosen, masks, where)
    kept = jnp.ones(masks.shape, bool) if where is None else where
    costs = jnp.where(kept, binary_cross_entropy(chosen, masks), 0)
    axes = tuple(range(1, masks.ndim))
    count = jnp.sum(kept, axis=axes, dtype=costs.dtype)
    values = poison(safe_div(jnp.sum(costs, axis=axes), count), ok)
    return reduce(values, where=some, weights=weights, reduction=reduction)


@compiled("kernel_size")
def neighbor_aware_margin_loss(
    logits: Float[Array, " batch *space classes"],
    labels: Integer[Array, " batch *space"],
    *,
    kernel_size: int = 3,
    margin_weight: Number = 0.1,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy that also draws logits to the class shares around, in nats, from 0 up.

    $$ \ell = -\log \mathrm{softmax}(z)_y + \frac{\lambda}{K} \sum_k |u_k - z_k| $$

    for $K$ classes, with $u_k$ the share of class $k$ among the labels of a window around the
    position, where hidden positions and those beyond the edge belong to no class. Trained so,
    probabilities are better calibrated. The slope of the second part is 0 at equality. A label
    outside `[0, classes)` makes its position NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last, any number of axes of space.
        labels: Integer labels without the class axis.
        kernel_size: Odd width of the window along each axis of space.
        margin_weight: Weight of the second part.
        ignore_index: Label whose positions are left out, as by `where`.

    One unit per position; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, *space)` if `reduction` is `"none"`.

    Raises:
        ValueError: If `kernel_size` is even.

    Reference:
        Murugesan et al., Trust Your Neighbours: Penalty-Based Constraints for Model Calibration,
        MICCAI 2023. Equals MONAI's `NACLLoss` with `kernel_ops="mean"` and `distance_type="l1"`,
        whose `alpha` is `margin_weight`.

    >>> logits, labels = jnp.zeros((1, 1, 2)), jnp.array([[0]])
    >>> neighbor_aware_margin_loss(logits, labels, kernel_size=1, margin_weight=1.0)  # log 2 + 1/2
    Array(1.1931472, dtype=float32)
    """
    check_integer(labels=labels)
    check_min_rank(2, logits=logits)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(message("kernel_size", "an odd count of at least 1", kernel_size))
    logits, labels, where = prepare(logits, labels, where=where, ignore_index=ignore_index)
    (margin_weight,) = numbers(logits, margin_weight=margin_weight)
    truth = jax.lax.stop_gradient(one_hot(labels, logits.shape[-1]).astype(logits.dtype))
    (truth,) = mask(where, truth)
    window = (1, *(kernel_size,) * (logits.ndim - 2), 1)
    ones = (1,) * logits.ndim
    shares = jax.lax.reduce_window(truth, 0.0, jax.lax.add, window, ones, "SAME")
    shares = shares / kernel_size ** (logits.ndim - 2)
    margin = jnp.sum(absolute(shares - logits), axis=-1) / max(logits.shape[-1], 1)
    values = cross_entropy(logits, labels) + margin_weight * margin
    return reduce(values, where=where, weights=weights, reduction=reduction)


_OBJECTS = dict(
    logits=draw_normal("B H W C", scale=2), masks=draw_binary("B H W"), labels=draw_labels("B")
)
_PIXELS = dict(logits=draw_normal("B H W C", scale=2), labels=draw_labels("B H W"))
_SIZES = dict(H=3, W=4, C=3)

CASES = (
    Case(mask_cross_entropy, _OBJECTS, positions="B H W", sizes=_SIZES),
    Case(neighbor_aware_margin_loss, _PIXELS, dict(margin_weight=0.3), sizes=_SIZES),
)
