"""Overlap losses between predicted and true regions: Dice, Tversky, Jaccard and their relatives."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, draw_labels, draw_probs, draw_unit
from .._core.checks import check_array, check_min_rank, check_shape
from .._core.compiled import compiled
from .._core.labels import is_integer
from .._core.numerics import numbers, safe_div, safe_pow, safe_sqrt
from .._core.reduce import reduce
from .._core.regions import (
    area,
    both_absent,
    confusion,
    kept_positions,
    mismatch,
    prepare_regions,
    region_sums,
    region_values,
    space_sums,
    squared_mismatch,
)
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "class_present",
    "dice_loss",
    "focal_tversky_loss",
    "generalized_dice_loss",
    "jaccard_loss",
    "log_cosh_dice_loss",
    "mcc_loss",
    "tversky_loss",
]


@compiled("squared")
def dice_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    squared: bool = False,
    smooth: Number = 1.0,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Soft Dice loss of each class, in `[0, 1]`: what two regions do not share.

    $$ \ell = 1 - \frac{2 I + s}{P + G + s}, \quad I = \tfrac{1}{2} (P + G - \sum |p - g|) $$

    with $P = \sum p$, $G = \sum g$ and sums over the kept positions of a sample; with `squared`,
    $p^2$, $g^2$ and $(p - g)^2$ take the place of $p$, $g$ and $|p - g|$. For targets 0 and 1 the
    overlap $I$ is $\sum p g$; for memberships in between, the loss still is 0 at $p = g$. Two empty
    regions cost 0, also without smoothing. A label outside `[0, classes)` makes its sample NaN. An
    integer target is never held as one-hot: apart from the gradient, no array of the size of
    `probs` is made.

    Args:
        probs: Probabilities (softmax or sigmoid), classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]` of the shape of
            `probs`. Classes may overlap, as in multi-label masks.
        squared: Whether the sums are of squares, as in V-Net.
        smooth: Added to both sides of the quotient, in positions.
        ignore_index: Integer label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`. Dice of the whole batch: reshape to one
    sample. Without the background: slice both arrays, or give class 0 the weight 0. Skip absent
    classes: `weights=class_present(target, classes)`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Drozdzal et al., The Importance of Skip Connections in Biomedical Image Segmentation, 2016;
        squared by Milletari et al., V-Net, 3DV 2016; fractional targets as by Wang et al., Dice
        Semimetric Losses, MICCAI 2023. Equals MONAI's `DiceLoss` with
        `smooth_nr = smooth_dr = smooth` and half of the `smooth` of `optax.losses.dice_loss`.

    >>> probs = jnp.array([[[0.5, 0.5], [0.5, 0.5]]])  # class 0: I = 1/2, P = 1, G = 1
    >>> dice_loss(probs, jnp.array([[0, 1]]))  # 1 - 2/3
    Array(0.33333334, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where, ignore_index=ignore_index)
    terms = squared_mismatch if squared else mismatch
    difference, total = region_sums(terms, probs, target, where)
    (smooth,) = numbers(total, smooth=smooth)
    values = safe_div(difference, total + smooth)
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def tversky_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    alpha: Number = 0.5,
    beta: Number = 0.5,
    smooth: Number = 1.0,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Tversky loss of each class, in `[0, 1]`: Dice that weighs false positives and negatives.

    $$ \ell = 1 - \frac{I + s}{I + \alpha\, FP + \beta\, FN + s} $$

    with overlap $I = \sum \min(p, g)$, $FP = \sum p - I$ and $FN = \sum g - I$ over the kept
    positions of a sample. Half and half it is `dice_loss` of twice the `smooth`, one and one
    `jaccard_loss`. Two empty regions cost 0. A label outside `[0, classes)` makes its sample NaN.

    Args:
        probs: Probabilities (softmax or sigmoid), classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        alpha: Weight of the false positives.
        beta: Weight of the false negatives; above `alpha` for recall.
        smooth: Added to both sides of the quotient, in positions.
        ignore_index: Integer label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Salehi et al., Tversky Loss Function for Image Segmentation Using 3D Fully Convolutional
        Deep Networks, MLMI 2017, with 0.3 and 0.7. Equals MONAI's `TverskyLoss` with
        `smooth_nr = smooth_dr = smooth`; Keras' `tversky` exchanges `alpha` and `beta`.

    >>> probs, target = jnp.array([[[1.0], [0.0]]]), jnp.array([[[1.0], [1.0]]])
    >>> tversky_loss(probs, target, beta=1.0)  # one false negative: 1 - 2/3
    Array(0.33333334, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where, ignore_index=ignore_index)
    values = _tversky(probs, target, where, alpha, beta, smooth)
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _tversky(
    probs: Array, target: Array, where: Array | None, alpha: Number, beta: Number, smooth: Number
) -> Array:
    shared, extra, missed = region_sums(confusion, probs, target, where)
    alpha, beta, smooth = numbers(shared, alpha=alpha, beta=beta, smooth=smooth)
    wrong = alpha * extra + beta * missed
    return safe_div(wrong, shared + wrong + smooth)


@compiled()
def jaccard_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    smooth: Number = 1.0,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Soft Jaccard (intersection over union) loss of each class, in `[0, 1]`.

    $$ \ell = 1 - \frac{I + s}{P + G - I + s}, \quad I = \tfrac{1}{2} (P + G - \sum |p - g|) $$

    with $P = \sum p$ and $G = \sum g$ over the kept positions of a sample. Two empty regions cost
    0. A label outside `[0, classes)` makes its sample NaN.

    Args:
        probs: Probabilities (softmax or sigmoid), classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        smooth: Added to both sides of the quotient, in positions.
        ignore_index: Integer label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Rahman and Wang, Optimizing Intersection-Over-Union in Deep Neural Networks for Image
        Segmentation, ISVC 2016. Equals MONAI's `DiceLoss` with `jaccard=True` and
        `smooth_nr = smooth_dr = 2 * smooth`, and segmentation-models-pytorch's `JaccardLoss` of one
        sample in which every class is present.

    >>> probs = jnp.array([[[0.5, 0.5], [0.5, 0.5]]])  # class 0: I = 1/2, union 3/2
    >>> jaccard_loss(probs, jnp.array([[0, 1]]))  # 1 - 1.5/2.5
    Array(0.4, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where, ignore_index=ignore_index)
    difference, total = region_sums(mismatch, probs, target, where)
    (smooth,) = numbers(total, smooth=smooth)
    values = safe_div(difference, 0.5 * (total + difference) + smooth)
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def focal_tversky_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    alpha: Number = 0.3,
    beta: Number = 0.7,
    gamma: Number = 4 / 3,
    smooth: Number = 1.0,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Focal Tversky loss of each class, in `[0, 1]`: small regions keep a steep slope.

    $$ \ell = \left(1 - \frac{I + s}{I + \alpha\, FP + \beta\, FN + s}\right)^{1 / \gamma} $$

    A root of `tversky_loss` for `gamma` above 1; its slope grows without bound towards a perfect
    class and is taken as 0 there. A label outside `[0, classes)` makes its sample NaN.

    Args:
        probs: Probabilities (softmax or sigmoid), classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        alpha: Weight of the false positives.
        beta: Weight of the false negatives; above `alpha` for recall.
        gamma: Order of the root; 1 is `tversky_loss`.
        smooth: Added to both sides of the quotient, in positions.
        ignore_index: Integer label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Abraham and Khan, A Novel Focal Tversky Loss Function with Improved Attention U-Net for
        Lesion Segmentation, ISBI 2019. segmentation-models-pytorch raises the mean over the classes
        to the power `gamma` instead.

    >>> probs, target = jnp.array([[[1.0], [0.0]]]), jnp.array([[[1.0], [1.0]]])
    >>> focal_tversky_loss(probs, target, beta=2.0, gamma=2.0)  # sqrt(2 / 4)
    Array(0.70710677, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where, ignore_index=ignore_index)
    values = _tversky(probs, target, where, alpha, beta, smooth)
    (gamma,) = numbers(values, gamma=gamma)
    values = safe_pow(values, 1 / gamma)
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def generalized_dice_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    power: Number = 2.0,
    smooth: Number = 1e-5,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Generalised Dice loss of each sample, in `[0, 1]`: small classes weigh as much as large.

    $$ \ell = 1 - \frac{2 \sum_c w_c I_c + s}{\sum_c w_c (P_c + G_c) + s}, \quad
       w_c = G_c^{-\text{power}} $$

    with $I$, $P$ and $G$ as in `dice_loss`. A class that a sample lacks gets the largest weight of
    its other classes, so that false positives cost; without any class all weigh 1. The weights
    carry no gradient. A label outside `[0, classes)` makes its sample NaN.

    Args:
        probs: Probabilities (softmax or sigmoid), classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        power: How strongly small classes gain; 0 weighs all classes with 1.
        smooth: Added to both sides of the quotient.
        ignore_index: Integer label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Sudre et al., Generalised Dice Overlap as a Deep Learning Loss Function for Highly
        Unbalanced Segmentations, DLMIA 2017. Equals MONAI's `GeneralizedDiceLoss` with
        `smooth_nr = smooth_dr = smooth` where some class is present; its `w_type` square, simple
        and uniform are powers 2, 1 and 0. optax averages weighted losses of the classes instead.

    >>> probs = jnp.array([[[0.5, 0.5], [0.5, 0.5]]])
    >>> generalized_dice_loss(probs, jnp.array([[0, 1]]), smooth=0.0)  # 1 - 2/4
    Array(0.5, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where, ignore_index=ignore_index)
    difference, total, size = region_sums(_sized_mismatch, probs, target, where)
    power, smooth = numbers(total, power=power, smooth=smooth)
    # Everything over the largest weight, which may lie beyond float32.
    size = jax.lax.stop_gradient(size)
    smallest = jnp.min(jnp.where(size > 0, size, jnp.inf), axis=-1, keepdims=True, initial=jnp.inf)
    smallest = jnp.where(jnp.isfinite(smallest), smallest, 1)
    scale = jnp.where(size > 0, smallest / jnp.where(size > 0, size, 1), 1) ** power
    difference, total = (jnp.sum(scale * x, axis=-1) for x in (difference, total))
    values = safe_div(difference, total + smooth * smallest[..., 0] ** power)
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _sized_mismatch(p: Array, g: Array) -> tuple[Array, ...]:
    return (*mismatch(p, g), *area(p, g))


@compiled()
def log_cosh_dice_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    smooth: Number = 1.0,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Logarithm of the hyperbolic cosine of the Dice loss of each class, in `[0, 0.434]`.

    $$ \ell = \log \cosh \left(1 - \frac{2 I + s}{P + G + s}\right) $$

    with $I$, $P$ and $G$ as in `dice_loss`: half its square near 0. A label outside `[0, classes)`
    makes its sample NaN.

    Args:
        probs: Probabilities (softmax or sigmoid), classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        smooth: Added to both sides of the quotient, in positions.
        ignore_index: Integer label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Jadon, A Survey of Loss Functions for Semantic Segmentation, CIBCB 2020.

    >>> probs, target = jnp.array([[[1.0], [0.0]]]), jnp.array([[[0.0], [1.0]]])
    >>> log_cosh_dice_loss(probs, target, smooth=0.0)  # log cosh 1
    Array(0.43378085, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where, ignore_index=ignore_index)
    difference, total = region_sums(mismatch, probs, target, where)
    (smooth,) = numbers(total, smooth=smooth)
    values = jnp.log1p(2 * jnp.sinh(0.5 * safe_div(difference, total + smooth)) ** 2)
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def mcc_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus the Matthews correlation coefficient of each class, in `[0, 2]`.

    $$ \ell = 1 - \frac{TP \cdot TN - FP \cdot FN}
                       {\sqrt{(TP + FP) (TP + FN) (TN + FP) (TN + FN)}} $$

    with $TP = \sum \min(p, g)$, $TN = \sum (1 - \max(p, g))$ and the rest accordingly, over the
    kept positions of a sample. Unlike Dice it also counts the background. It is 0 where nothing is
    wrong, and 1 where the root is 0 otherwise. A label outside `[0, classes)` makes its sample NaN.

    Args:
        probs: Probabilities (softmax or sigmoid), classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        ignore_index: Integer label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Abhishek and Hamarneh, Matthews Correlation Coefficient Loss for Deep Convolutional
        Networks, ISBI 2021. Equals MONAI's `MCCLoss` without smoothing, for targets 0 and 1.

    >>> probs, target = jnp.array([[[1.0], [1.0], [0.0]]]), jnp.array([[[1.0], [0.0], [0.0]]])
    >>> mcc_loss(probs, target)  # 1 - 1/2
    Array(0.5, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where, ignore_index=ignore_index)
    counts = region_sums(confusion, probs, target, where)
    values = _one_minus_mcc(*counts, *region_sums(both_absent, probs, target, where, fill=1))
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _one_minus_mcc(tp: Array, fp: Array, fn: Array, tn: Array) -> Array:
    """Without the cancellation of 1 - MCC.

    With r = TP TN over the root, 1 - r^2 = a + b - a b, where a and b are the shares of
    (TP + FP) (TP + FN) and of (TN + FP) (TN + FN) that vanish with the errors.
    """
    wrong, crossed = fp + fn, fp * fn
    inside, outside = (tp + fp) * (tp + fn), (tn + fp) * (tn + fn)
    root = safe_sqrt(inside) * safe_sqrt(outside)
    a = safe_div(tp * wrong + crossed, inside)
    b = safe_div(tn * wrong + crossed, outside)
    values = (a + b * (1 - a)) / (1 + safe_div(tp * tn, root)) + safe_div(crossed, root)
    return jnp.where(root == 0, (wrong > 0).astype(root.dtype), values)


@compiled("num_classes")
def class_present(
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    num_classes: int,
    *,
    where: Where | None = None,
) -> Float[Array, " batch classes"]:
    """Which classes occur in each sample, as weights 0 and 1; not a loss.

    Args:
        target: Integer labels without the class axis, or memberships with it.
        num_classes: Number of classes; labels outside are passed over.
        where: Bool array `(batch, *space)`; hidden positions do not count.

    Returns:
        Float32 array `(batch, classes)`, for the `weights` of a loss with these units.

    >>> class_present(jnp.array([[0, 2, 2]]), 3)
    Array([[1., 0., 1.]], dtype=float32)
    """
    check_array(target=target)
    target = jnp.asarray(target)
    integer = is_integer(target)
    check_min_rank(1 if integer else 2, target=target)
    shape = target.shape if integer else target.shape[:-1]
    check_shape((*shape, *(() if integer else (num_classes,))), target=target)
    where = kept_positions(shape, target, where)
    like = jnp.zeros((*shape, num_classes), jnp.float32)
    arrays = (like, target) if where is None else (like, target, where)
    return (space_sums(area, 0, *arrays)[0] > 0).astype(jnp.float32)


_LABELS = dict(probs=draw_probs("B H W C"), target=draw_labels("B H W"))
_MEMBERS = dict(probs=draw_unit("B H W C"), target=draw_unit("B H W C"))
_LINES = dict(probs=draw_unit("B T C"), target=draw_unit("B T C"))
_ALL, _SIZES = "B H W", dict(H=3, W=4, C=3)


def _case(loss: Any, label: str = "", **config: Any) -> Case:
    return Case(loss, _LABELS, config, label, positions=_ALL, sizes=_SIZES)


def _soft(loss: Any, label: str = "memberships", **config: Any) -> Case:
    return Case(loss, _MEMBERS, config, label, positions=_ALL, sizes=_SIZES, zero_at_target=True)


CASES = (
    _case(dice_loss, smooth=0.5),
    _case(dice_loss, "ignoring", smooth=0.0, ignore_index=1),
    _soft(dice_loss, smooth=0.5),
    _soft(dice_loss, "squared", squared=True),
    Case(
        dice_loss,
        _LABELS,
        dict(squared=True),
        label="large",
        positions=_ALL,
        sizes=dict(H=129, W=65),
    ),
    _case(tversky_loss, alpha=0.3, beta=0.8, smooth=0.5),
    Case(
        tversky_loss,
        _LINES,
        dict(alpha=0.3, beta=0.8),
        label="memberships",
        positions="B T",
        sizes=dict(T=9, C=2),
        zero_at_target=True,
    ),
    _case(jaccard_loss, smooth=0.5),
    _soft(jaccard_loss),
    _case(focal_tversky_loss, alpha=0.4, beta=0.9, gamma=1.5, smooth=0.5),
    _case(generalized_dice_loss, power=1.5, smooth=0.1),
    replace(
        _soft(generalized_dice_loss),
        without={"numerical": "the weights of the classes carry no gradient, by definition"},
    ),
    _case(log_cosh_dice_loss, smooth=0.5),
    _case(mcc_loss),
    _soft(mcc_loss),
)
