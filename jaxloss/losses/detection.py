"""Dense losses of detectors: distributions over distances, scores that carry quality, heatmaps."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from .._core.case import Case, Draw, draw_normal, draw_uniform, draw_unit
from .._core.checks import (
    check_array,
    check_float,
    check_min_rank,
    check_same_shape,
    check_shape,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison
from .._core.numerics import absolute, numbers, power_of_log, safe_pow, widen
from .._core.reduce import mask, reduce
from .._core.sharding import one_hot
from .._core.sigmoid import binary_cross_entropy, sigmoid_costs
from .._core.softmax import neg_log_softmax
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "distribution_focal_loss",
    "expected_bin",
    "gaussian_focal_loss",
    "hard_negative_mining",
    "quality_focal_loss",
    "varifocal_loss",
]


@compiled()
def distribution_focal_loss(
    logits: Float[Array, "*batch bins"],
    target: Shaped[Array, "*batch"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy against the two whole bins around a real target, in nats, from 0 up.

    $$ \ell = -(l + 1 - y) \log p_l - (y - l) \log p_{l + 1}, \quad l = \lfloor y \rfloor $$

    with $p$ the softmax of the logits. A target outside `[0, bins - 1]` makes its unit NaN; on the
    last bin the loss is the cross-entropy of that bin. The slope in a whole target is the one above
    it, on the last bin the one below.

    Args:
        logits: Unnormalised log-probabilities of the bins 0, 1, ...; at least two.
        target: Real numbers in the unit of the bins, such as distances to the sides of a box in
            strides.

    One unit per distribution, four for a box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Li et al., Generalized Focal Loss, NeurIPS 2020. ultralytics moves targets to at most
        `bins - 1.01` first and averages the four sides.

    >>> logits = jnp.log(jnp.array([[0.25, 0.25, 0.5]]))
    >>> distribution_focal_loss(logits, jnp.array([1.5]))  # (log 4 + log 2) / 2
    Array(1.0397208, dtype=float32)
    """
    check_float(logits=logits)
    check_min_rank(1, logits=logits)
    bins = logits.shape[-1]
    if bins < 2:
        raise ValueError(message("logits", "at least 2 bins", bins))
    check_shape(logits.shape[:-1], target=target)
    logits, target = mask(where, *widen(logits, target))
    inside = (target >= 0) & (target <= bins - 1)
    require(lambda: inside, "target", f"values in [0, {bins - 1}]", where)
    lower = jnp.clip(jnp.floor(jax.lax.stop_gradient(target)), 0, bins - 2)
    above = target - lower
    nll = neg_log_softmax(poison(logits, inside[..., None]))
    first = one_hot(lower.astype(jnp.int32), bins)
    second = one_hot(lower.astype(jnp.int32) + 1, bins)
    share = jnp.where(first, 1 - above[..., None], jnp.where(second, above[..., None], 0))
    values = jnp.sum(jnp.where(first | second, share * nll, 0), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def expected_bin(logits: Float[Array, "*batch bins"]) -> Array:
    r"""Mean of a distribution over the bins 0, 1, ..., in their unit: what a DFL head predicts.

    $$ d = \sum_k k\, p_k $$

    with $p$ the softmax of the logits.

    Args:
        logits: Unnormalised log-probabilities, bins last.

    Returns:
        Float32 `*batch`, in the unit of the bins.

    Reference:
        Li et al., Generalized Focal Loss, NeurIPS 2020.

    >>> expected_bin(jnp.log(jnp.array([[0.25, 0.25, 0.5]])))  # 0.25 + 2 * 0.5
    Array([1.25], dtype=float32)
    """
    check_float(logits=logits)
    check_min_rank(1, logits=logits)
    (logits,) = widen(logits)
    bins = jnp.arange(logits.shape[-1], dtype=logits.dtype)
    return jnp.sum(jax.nn.softmax(logits) * jnp.broadcast_to(bins, logits.shape), axis=-1)


@compiled()
def quality_focal_loss(
    logits: Float[Array, "*shape"],
    quality: Shaped[Array, "*shape"],
    *,
    beta: Number = 2.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Binary cross-entropy against a quality, in nats, from 0 up: scores near it count less.

    $$ \ell = |q - s|^\beta\, \mathrm{BCE}(s, q), \quad s = \sigma(z) $$

    The gradient flows through the factor as well; where $s = q$ loss and gradient are 0.

    Args:
        logits: Log-odds $z$ of the score; classes usually last.
        quality: Same shape, in `[0, 1]`: the IoU of the predicted box at the class of the object,
            0 elsewhere.
        beta: How strongly good scores are played down; 0 is binary cross-entropy but for $s = q$.

    One unit per element; see `jaxloss.reduce`. Detectors divide the sum by the number of positives:
    `reduction="sum"`, then divide.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Li et al., Generalized Focal Loss, NeurIPS 2020. Equals mmdetection's `QualityFocalLoss`,
        which sums over the classes.

    >>> quality_focal_loss(jnp.array([0.0]), jnp.array([1.0]))  # log(2) / 4
    Array(0.1732868, dtype=float32)
    """
    logits, quality = _prepare(logits, where, quality=quality)
    (beta,) = numbers(logits, beta=beta)
    hit, empty = sigmoid_costs(logits)
    miss = quality * jnp.exp(-empty) - (1 - quality) * jnp.exp(-hit)  # q - s, with every digit
    values = safe_pow(absolute(miss), beta) * binary_cross_entropy(logits, quality)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("stop_gradient_weights")
def varifocal_loss(
    logits: Float[Array, "*shape"],
    quality: Shaped[Array, "*shape"],
    *,
    alpha: Number = 0.75,
    gamma: Number = 2.0,
    stop_gradient_weights: bool = False,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Binary cross-entropy against a quality, in nats, from 0 up: easy negatives count less.

    $$ \ell = w\, \mathrm{BCE}(s, q), \quad
       w = q \text{ for } q > 0, \text{ else } \alpha s^\gamma, \quad s = \sigma(z) $$

    Args:
        logits: Log-odds $z$ of the score; classes usually last.
        quality: Same shape, in `[0, 1]`: the IoU of the predicted box at the class of the object,
            0 elsewhere.
        alpha: Weight of the negatives.
        gamma: How strongly easy negatives are played down.
        stop_gradient_weights: Whether the weights $w$ count as constants in the gradient.

    One unit per element; see `jaxloss.reduce`. Detectors divide the sum by the number of positives:
    `reduction="sum"`, then divide.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Zhang et al., VarifocalNet: An IoU-aware Dense Object Detector, CVPR 2021. mmdetection and
        ultralytics keep the gradient of the weights too.

    >>> varifocal_loss(jnp.array([0.0, 0.0]), jnp.array([1.0, 0.0]), reduction="none")
    Array([0.6931472, 0.1299651], dtype=float32)
    """
    logits, quality = _prepare(logits, where, quality=quality)
    alpha, gamma = numbers(logits, alpha=alpha, gamma=gamma)
    cost, _ = sigmoid_costs(logits)
    scale = jnp.where(quality > 0, quality, alpha * power_of_log(-cost, gamma))
    if stop_gradient_weights:
        scale = jax.lax.stop_gradient(scale)
    values = scale * binary_cross_entropy(logits, quality)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def gaussian_focal_loss(
    logits: Float[Array, "*shape"],
    heatmap: Shaped[Array, "*shape"],
    *,
    alpha: Number = 2.0,
    gamma: Number = 4.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Focal loss of a heatmap with bumps around the centres, in nats, from 0 up.

    $$ \ell = \begin{cases} -(1 - p)^\alpha \log p & g = 1 \\
       -(1 - g)^\gamma p^\alpha \log(1 - p) & \text{else} \end{cases} $$

    with $p = \sigma(z)$. Only a cell of exactly 1 is a positive; cells near one count less.

    Args:
        logits: Log-odds $z$, such as `(batch, height, width, classes)`.
        heatmap: Same shape, in `[0, 1]`: 1 at the centres, falling off around them.
        alpha: How strongly easy cells are played down.
        gamma: How strongly cells near a centre are played down.

    One unit per element; see `jaxloss.reduce`. Detectors divide the sum by the number of centres:
    `reduction="sum"`, then divide.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Law and Deng, CornerNet: Detecting Objects as Paired Keypoints, ECCV 2018; Zhou et al.,
        Objects as Points, 2019. mmdetection's `GaussianFocalLoss` takes probabilities.

    >>> gaussian_focal_loss(jnp.array([0.0, 0.0]), jnp.array([1.0, 0.5]), reduction="none")
    Array([0.1732868 , 0.01083042], dtype=float32)
    """
    logits, heatmap = _prepare(logits, where, heatmap=heatmap)
    alpha, gamma = numbers(logits, alpha=alpha, gamma=gamma)
    hit, empty = sigmoid_costs(logits)
    center = heatmap == 1
    far = safe_pow(jnp.where(center, 1, 1 - heatmap), gamma)
    positive = power_of_log(-empty, alpha) * hit
    values = jnp.where(center, positive, far * power_of_log(-hit, alpha) * empty)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _prepare(logits: Array, where: Where | None, **target: Any) -> tuple[Array, Array]:
    """Check, mask and widen logits and one target in [0, 1]."""
    check_float(logits=logits)
    check_same_shape(logits=logits, **target)
    ((name, values),) = target.items()
    logits, values = mask(where, *widen(logits, values))
    require(lambda: (values >= 0) & (values <= 1), name, "values in [0, 1]", where)
    return logits, values


@compiled()
def hard_negative_mining(
    values: Float[Array, "batch anchors"],
    positives: Bool[Array, "batch anchors"],
    *,
    ratio: Number = 3.0,
    where: Where | None = None,
) -> Bool[Array, "batch anchors"]:
    """A mask of all positives and, in every image, the negatives of largest loss.

    Meant as `where` of a classification loss. An image without positives keeps nothing. Equal
    losses go to the lower index; the mask has no gradient.

    Args:
        values: Loss of each anchor, for ranking.
        positives: Which anchors belong to an object.
        ratio: How many negatives are kept for each positive.
        where: Which anchors exist; the others are neither.

    Returns:
        A bool array `(batch, anchors)`.

    Reference:
        Liu et al., SSD: Single Shot MultiBox Detector, ECCV 2016.

    >>> positives = jnp.array([[True, False, False, False]])
    >>> hard_negative_mining(jnp.array([[0.1, 0.2, 0.9, 0.4]]), positives, ratio=2)
    Array([[ True, False,  True,  True]], dtype=bool)
    """
    check_float(values=values)
    check_array(positives=positives)
    if values.ndim != 2:
        raise ValueError(message("values", "two axes, batch and anchors", f"shape {values.shape}"))
    check_same_shape(values=values, positives=positives)
    if jnp.result_type(positives) != jnp.bool_:
        raise TypeError(message("positives", "a bool array", jnp.result_type(positives)))
    (values,) = widen(jax.lax.stop_gradient(values))
    (ratio,) = numbers(values, ratio=ratio)
    exists = jnp.ones_like(positives)
    if where is not None:
        check_same_shape(values=values, where=where)
        (exists,) = mask(where, exists)
    positives, negatives = positives & exists, ~positives & exists
    index = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    keys = (~negatives, jnp.where(negatives, -values, 0), index)
    order = jax.lax.sort(keys, dimension=1, num_keys=2, is_stable=True)[2]
    rank = jnp.argsort(order, axis=1)
    allowed = ratio * jnp.sum(positives, axis=1, keepdims=True, dtype=values.dtype)
    return positives | (negatives & (rank < allowed))


def _sample_heatmap(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
    kind = g.integers(0, 4, shape)  # one quarter centres, one quarter empty; exact in 16 bits
    return np.select([kind == 0, kind == 1], [1.0, 0.0], g.integers(1, 128, shape) / 128)


_SPREAD = replace(draw_uniform("B 4", 0, 5), ends=lambda y: (0 * y, 0 * y + 5))
_QUALITY = dict(logits=draw_normal("B C", scale=2), quality=draw_unit("B C"))
_HEATMAP = Draw("B C", _sample_heatmap, "fixed")
_SPARSE = dict(logits=draw_normal("B C", scale=2), quality=_HEATMAP)

CASES = (
    Case(distribution_focal_loss, dict(logits=draw_normal("B 4 6", scale=2), target=_SPREAD)),
    Case(quality_focal_loss, _QUALITY, dict(beta=1.5)),
    Case(varifocal_loss, _SPARSE, dict(alpha=0.6, gamma=1.5)),
    Case(
        varifocal_loss,
        _SPARSE,
        dict(stop_gradient_weights=True),
        label="stopped",
        without={"numerical": "the weights count as constants in the gradient"},
    ),
    Case(
        gaussian_focal_loss,
        dict(logits=draw_normal("B C", scale=2), heatmap=_HEATMAP),
        dict(alpha=1.5, gamma=3.0),
    ),
)
