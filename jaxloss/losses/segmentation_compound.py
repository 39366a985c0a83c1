"""Compound losses of regions: an overlap and a distribution loss in one formula, as published."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from .._core.case import Case, Draw, draw_labels, draw_probs, draw_unit
from .._core.checks import check_integer, check_shape, require
from .._core.compiled import compiled
from .._core.labels import class_vectors, is_integer
from .._core.numerics import numbers, safe_div, safe_pow, widen
from .._core.reduce import mask, reduce
from .._core.regions import (
    confusion,
    mismatch,
    prepare_regions,
    region_sums,
    region_values,
)
from .._core.sharding import lookup, one_hot, pick
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "asymmetric_unified_focal_loss",
    "combo_loss",
    "exp_log_loss",
    "generalized_wasserstein_dice_loss",
    "sensitivity_specificity_loss",
]


@compiled()
def combo_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    alpha: Number = 0.5,
    beta: Number = 0.5,
    smooth: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Weighted binary cross-entropy minus the Dice score of each class; from -1 up.

    $$ \ell = -\frac{\alpha}{N} \sum_i \left(\beta\, g_i \log p_i
       + (1 - \beta) (1 - g_i) \log(1 - p_i)\right) - (1 - \alpha) \frac{2 I + s}{P + G + s} $$

    over the $N$ kept positions of a sample, with $I$, $P$ and $G$ as in `dice_loss`. Inside a
    logarithm a probability below 1e-38 is taken as that. A label outside `[0, classes)` makes its
    sample NaN.

    Args:
        probs: Probabilities, classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        alpha: Weight of the cross-entropy; the Dice score weighs `1 - alpha`.
        beta: Weight of the positions inside, `1 - beta` of those outside; above 1/2 for recall.
        smooth: Added to both sides of the Dice quotient, in positions.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Taghanaki et al., Combo Loss: Handling Input and Output Imbalance in Multi-Organ
        Segmentation, CMIG 2019.

    >>> probs, target = jnp.array([[[0.5], [0.5]]]), jnp.array([[[1.0], [0.0]]])
    >>> combo_loss(probs, target)  # log(2) / 4 - 2/3 / 2
    Array(-0.16004652, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where)
    difference, total = region_sums(mismatch, probs, target, where)
    p, g = _expanded(probs, target, where)
    alpha, beta, smooth = numbers(p, alpha=alpha, beta=beta, smooth=smooth)
    costs = -(beta * g * _log(p) + (1 - beta) * (1 - g) * _log(1 - p))
    entropy = _mean(costs, where)
    dice = 1 - safe_div(difference, total + smooth)
    values = alpha * entropy - (1 - alpha) * dice
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _expanded(probs: Array, target: Array, where: Array | None) -> tuple[Array, Array]:
    """Probabilities and memberships, masked and wide."""
    p, target = mask(where, *widen(probs), target)
    g = one_hot(target, p.shape[-1]) if is_integer(target) else target
    (g,) = mask(where, g.astype(p.dtype))
    return p, g


def _log(p: Array) -> Array:
    return jnp.log(jnp.maximum(p, jnp.asarray(np.finfo(np.float32).tiny, p.dtype)))


def _mean(values: Array, where: Array | None) -> Array:
    """Mean over the kept positions, `(batch, *space, classes) -> (batch, classes)`."""
    space = tuple(range(1, values.ndim - 1))
    kept = jnp.ones(values.shape[:-1], bool) if where is None else where
    count = jnp.sum(kept, axis=space, dtype=values.dtype)[:, None]
    return safe_div(jnp.sum(jnp.where(kept[..., None], values, 0), axis=space), count)


@compiled()
def sensitivity_specificity_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    r: Number = 0.05,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared error inside and outside of each class, each averaged for itself, in `[0, 1]`.

    $$ \ell = r \frac{\sum (g - p)^2 g}{\sum g} + (1 - r) \frac{\sum (g - p)^2 (1 - g)}
       {\sum (1 - g)} $$

    over the kept positions of a sample. A class that is nowhere, or everywhere, has one term. A
    label outside `[0, classes)` makes its sample NaN.

    Args:
        probs: Probabilities, classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        r: Weight of the error inside (sensitivity); the error outside weighs `1 - r`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Brosch et al., Deep Convolutional Encoder Networks for Multiple Sclerosis Lesion
        Segmentation, MICCAI 2015.

    >>> probs, target = jnp.array([[[0.5], [0.25]]]), jnp.array([[[1.0], [0.0]]])
    >>> sensitivity_specificity_loss(probs, target, r=0.5)  # (1/4 + 1/16) / 2
    Array(0.15625, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where)
    p, g = _expanded(probs, target, where)
    (r,) = numbers(p, r=r)
    errors = (g - p) ** 2
    inside = safe_div(_mean(errors * g, where), _mean(g, where))
    outside = safe_div(_mean(errors * (1 - g), where), _mean(1 - g, where))
    values = r * inside + (1 - r) * outside
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def exp_log_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    gamma: Number = 0.3,
    dice_weight: Number = 0.8,
    ce_weight: Number = 0.2,
    smooth: Number = 1.0,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Exponential logarithmic loss of each sample, from 0 up: Dice and cross-entropy.

    $$ \ell = \frac{\lambda_D}{K} \sum_c (-\log D_c)^\gamma
       + \frac{\lambda_{CE}}{N} \sum_i \sum_k g_{ik} w_k (-\log p_{ik})^\gamma, \quad
       D_c = \frac{2 I_c + s}{P_c + G_c + s} $$

    over the $N$ kept positions and $K$ classes, with $I$, $P$ and $G$ as in `dice_loss`. For
    `gamma` below 1 the slope is unbounded where a logarithm is 0, and taken as 0 there. Inside a
    logarithm a probability below 1e-38 is taken as that. A label outside `[0, classes)` makes its
    sample NaN.

    Args:
        probs: Softmax probabilities, classes last, any number of axes of space.
        target: Integer labels without the class axis, or target probabilities.
        gamma: Power of the logarithms.
        dice_weight: Weight of the Dice part.
        ce_weight: Weight of the cross-entropy part.
        smooth: Added to both sides of the Dice quotient, in positions.
        class_weights: Weight $w$ of each class in the cross-entropy part; as published, the root of
            all labels over those of the class.
        ignore_index: Integer label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Wong et al., 3D Segmentation with Exponential Logarithmic Loss for Highly Unbalanced Object
        Sizes, MICCAI 2018.

    >>> probs = jnp.array([[[0.5, 0.5], [0.5, 0.5]]])
    >>> exp_log_loss(probs, jnp.array([[0, 1]]), gamma=1.0, dice_weight=0.0)  # log(2) / 5
    Array(0.13862944, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where, ignore_index=ignore_index)
    difference, total = region_sums(mismatch, probs, target, where)
    gamma, dice_weight, ce_weight, smooth = numbers(
        total, gamma=gamma, dice_weight=dice_weight, ce_weight=ce_weight, smooth=smooth
    )
    lost = safe_div(difference, total + smooth)
    tiny = jnp.asarray(np.finfo(np.float32).tiny, lost.dtype)
    overlap = jnp.where(lost >= 1, -jnp.log(tiny), -jnp.log1p(-jnp.where(lost >= 1, 0, lost)))
    values = dice_weight * jnp.mean(safe_pow(overlap, gamma), axis=-1)
    p, ids = mask(where, *widen(probs), target)
    if class_weights is None:
        (class_weights,) = (jnp.ones(p.shape[-1:], p.dtype),)
    (class_weights,) = class_vectors(p, class_weights=class_weights)
    if is_integer(target):
        costs = lookup(class_weights, ids) * safe_pow(-_log(pick(p, ids)), gamma)
    else:
        (g,) = mask(where, target.astype(p.dtype))
        costs = jnp.broadcast_to(class_weights, p.shape) * g * safe_pow(-_log(p), gamma)
        costs = jnp.sum(costs, axis=-1)
    values += ce_weight * _mean(costs[..., None], where)[:, 0]
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def asymmetric_unified_focal_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    weight: Number = 0.5,
    delta: Number = 0.7,
    gamma: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Asymmetric unified focal loss of each sample, from 0 up: class 0 is background.

    $$ \ell = \frac{\lambda}{N K} \sum_i \left((1 - \delta) (1 - p_{i0})^\gamma\, \mathrm{CE}_{i0}
       + \delta \sum_{k > 0} \mathrm{CE}_{ik}\right)
       + \frac{1 - \lambda}{K} \left(1 - T_0 + \sum_{k > 0} (1 - T_k)^{1 - \gamma}\right) $$

    over the $N$ kept positions and $K$ classes, with $\mathrm{CE}_{ik} = -g_{ik} \log p_{ik}$ and
    $T$ the Tversky index with weights $1 - \delta$ of false positives and $\delta$ of false
    negatives. The focus plays down easy background and enhances the small classes. Inside a
    logarithm a probability below 1e-38 is taken as that; the slope of the power is 0 at a perfect
    class. A label outside `[0, classes)` makes its sample NaN.

    Args:
        probs: Softmax probabilities, classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        weight: Weight of the focal part; the Tversky part weighs `1 - weight`.
        delta: Weight of the small classes and of the false negatives, in `[0, 1]`.
        gamma: Strength of the focus, in `[0, 1)`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Yeung et al., Unified Focal Loss, CMIG 2022. Equals MONAI's `AsymmetricUnifiedFocalLoss`,
        which knows two classes only, up to its `epsilon`.

    >>> probs = jnp.array([[[0.5, 0.5], [0.5, 0.5]]])
    >>> asymmetric_unified_focal_loss(
    ...     probs, jnp.array([[0, 1]]), weight=0.0, gamma=0.0
    ... )  # all errors 1/2
    Array(0.5, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where)
    shared, extra, missed = region_sums(confusion, probs, target, where)
    p, g = _expanded(probs, target, where)
    weight, delta, gamma = numbers(p, weight=weight, delta=delta, gamma=gamma)
    back = jnp.arange(p.shape[-1]) == 0
    costs = -g * _log(p)
    easing = (1 - delta) * safe_pow(1 - p[..., :1], gamma)
    costs = jnp.where(back.reshape((1,) * (p.ndim - 1) + (-1,)), easing, delta) * costs
    entropy = jnp.mean(_mean(costs, where), axis=-1)
    wrong = (1 - delta) * extra + delta * missed
    lost = safe_div(wrong, shared + wrong)
    lost = jnp.where(back[None], lost, safe_pow(lost, 1 - gamma))
    values = weight * entropy + (1 - weight) * jnp.mean(lost, axis=-1)
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def generalized_wasserstein_dice_loss(
    probs: Float[Array, " batch *space classes"],
    labels: Integer[Array, " batch *space"],
    distances: Shaped[Array, " classes classes"],
    *,
    smooth: Number = 1e-5,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Generalised Wasserstein Dice loss of each sample, in `[0, 1]`: near classes cost less.

    $$ \ell = 1 - \frac{2\, TP + s}{2\, TP + \sum_i d_i + s}, \quad
       d_i = \sum_l M_{y_i l}\, p_{il}, \quad TP = \sum_{y_i \ne 0} (1 - d_i) $$

    over the kept positions, with class 0 the background. A label outside `[0, classes)` makes its
    sample NaN.

    Args:
        probs: Softmax probabilities, classes last, any number of axes of space.
        labels: Integer labels without the class axis.
        distances: How far class $l$ is from the true class $y$, `(classes, classes)` with rows for
            the true class, zero diagonal and 1 as the largest.
        smooth: Added to both sides of the quotient, in positions.
        ignore_index: Label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Fidon et al., Generalised Wasserstein Dice Score for Imbalanced Multi-class Segmentation
        using Holistic Convolutional Networks, BrainLes 2017. Equals MONAI's
        `GeneralizedWassersteinDiceLoss` with `weighting_mode="default"`, which takes logits.

    >>> probs, far = jnp.array([[[0.5, 0.5], [0.5, 0.5]]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> generalized_wasserstein_dice_loss(probs, jnp.array([[0, 1]]), far, smooth=0.0)
    Array(0.5, dtype=float32)
    """
    check_integer(labels=labels)
    probs, labels, where = prepare_regions(
        probs, labels, where=where, ignore_index=ignore_index, second="labels"
    )
    classes = probs.shape[-1]
    check_shape((classes, classes), distances=distances)
    p, ids = mask(where, *widen(probs), labels)
    (smooth,) = numbers(p, smooth=smooth)
    table = jnp.asarray(distances).astype(p.dtype)
    require(lambda: (table >= 0) & (table <= 1), "distances", "values in [0, 1]")
    hit = one_hot(ids, classes).astype(p.dtype)
    distance = jnp.sum(jnp.matmul(hit, table, precision="highest") * p, axis=-1)
    kept = jnp.ones(ids.shape, bool) if where is None else where
    space = tuple(range(1, ids.ndim))
    total = lambda x, chosen: jnp.sum(jnp.where(chosen, x, 0), axis=space)
    wrong = total(distance, kept)
    values = safe_div(wrong, 2 * total(1 - distance, kept & (ids != 0)) + wrong + smooth)
    values, units = region_values(values, probs, labels, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _distances(_: np.random.Generator, shape: tuple[int, ...], __: Any) -> np.ndarray:
    place = np.linspace(0, 1, shape[0])
    return np.abs(place[:, None] - place)


_LABELS = dict(probs=draw_probs("B H W C"), target=draw_labels("B H W"))
_MEMBERS = dict(probs=draw_unit("B T C"), target=draw_unit("B T C"))
_CLASSES = dict(probs=draw_probs("B H W C"), labels=draw_labels("B H W"))
_METRIC = dict(distances=Draw("C C", _distances, "fixed"))
_WEIGHTS = np.array([0.5, 2.0, 1.0], np.float32)


def _case(loss: Any, **config: Any) -> Case:
    return Case(loss, _LABELS, config, positions="B H W", sizes=dict(H=3, W=4, C=3))


def _soft(loss: Any, **config: Any) -> Case:
    return Case(loss, _MEMBERS, config, "memberships", positions="B T", sizes=dict(T=6, C=3))


CASES = (
    _soft(combo_loss, alpha=0.3, beta=0.7, smooth=0.5),
    _case(sensitivity_specificity_loss, r=0.2),
    _case(exp_log_loss, gamma=0.5, dice_weight=0.7, ce_weight=0.4, class_weights=_WEIGHTS),
    _soft(exp_log_loss, gamma=1.5),
    _case(asymmetric_unified_focal_loss, weight=0.4, delta=0.6, gamma=0.3),
    Case(
        generalized_wasserstein_dice_loss,
        {**_CLASSES, **_METRIC},
        dict(smooth=0.1),
        positions="B H W",
        sizes=dict(H=3, W=4, C=3),
    ),
)
