"""Losses of pairs and triplets that are given, as distances or as vectors."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from .._core.case import Case, Draw, draw_normal, draw_signs, draw_uniform
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
from .._core.numerics import absolute, numbers, safe_norm, safe_pow, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "contrastive_loss",
    "hinge_embedding_loss",
    "soft_triplet_loss",
    "triplet_margin_loss",
    "unsquared_contrastive_loss",
]

Distance = Callable[[Array, Array], Array]


@compiled()
def contrastive_loss(
    distances: Float[Array, "*shape"],
    same: Bool[Array, "*shape"],
    *,
    margin: Number = 1.0,
    positive_margin: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Contrastive loss of pairs, from 0: half the squared distance by which each is misplaced.

    $$ \ell = \tfrac12 \begin{cases} \max(0, d - m_+)^2 & \text{same} \\
       \max(0, m - d)^2 & \text{else} \end{cases} $$

    Args:
        distances: Distances $d$ of pairs, best from `pairwise_distance`: its gradient is 0 where
            two points coincide.
        same: Whether the two belong together, of the same shape.
        margin: Distance $m$ from which pairs that do not belong together cost nothing.
        positive_margin: Distance $m_+$ up to which pairs that belong together cost nothing.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR
        2006. TensorFlow Addons has no factor 1/2. pytorch-metric-learning's `ContrastiveLoss` is
        `unsquared_contrastive_loss`.

    >>> distances, same = jnp.array([2.0, 0.5, 3.0]), jnp.array([True, False, False])
    >>> contrastive_loss(distances, same, reduction="none")  # 2^2 / 2, 0.5^2 / 2, 0
    Array([2.   , 0.125, 0.   ], dtype=float32)
    """
    excess = _excess(distances, same, margin, positive_margin, where)
    return reduce(0.5 * excess**2, where=where, weights=weights, reduction=reduction)


@compiled()
def unsquared_contrastive_loss(
    distances: Float[Array, "*shape"],
    same: Bool[Array, "*shape"],
    *,
    margin: Number = 1.0,
    positive_margin: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Contrastive loss of pairs without the square, from 0, in the unit of the distances.

    $$ \ell = \begin{cases} \max(0, d - m_+) & \text{same} \\
       \max(0, m - d) & \text{else} \end{cases} $$

    Args:
        distances: Distances $d$ of pairs, best from `pairwise_distance`: its gradient is 0 where
            two points coincide.
        same: Whether the two belong together, of the same shape.
        margin: Distance $m$ from which pairs that do not belong together cost nothing.
        positive_margin: Distance $m_+$ up to which pairs that belong together cost nothing.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR
        2006, with a square. pytorch-metric-learning's `ContrastiveLoss` normalises the embeddings
        and adds two means: one call with `where=positive_mask(labels)`, one with
        `where=negative_mask(labels)`, both with `reduction=nonzero_mean`.

    >>> distances, same = jnp.array([2.0, 0.5, 3.0]), jnp.array([True, False, False])
    >>> unsquared_contrastive_loss(distances, same, reduction="none")
    Array([2. , 0.5, 0. ], dtype=float32)
    """
    excess = _excess(distances, same, margin, positive_margin, where)
    return reduce(excess, where=where, weights=weights, reduction=reduction)


def _excess(
    distances: Array, same: Any, margin: Number, positive_margin: Number, where: Where | None
) -> Array:
    """By how much a pair is too far apart, or too close."""
    check_float(distances=distances)
    check_same_shape(distances=distances, same=same)
    same = jnp.asarray(same)
    if same.dtype != bool:
        raise TypeError(message("same", "a bool array", same.dtype))
    (distances,) = mask(where, *widen(distances))
    margin, positive_margin = numbers(distances, margin=margin, positive_margin=positive_margin)
    require(lambda: distances >= 0, "distances", "values of at least 0", where)
    gap = jnp.where(same, distances - positive_margin, margin - distances)
    return jax.nn.relu(gap)


@compiled()
def hinge_embedding_loss(
    distances: Float[Array, "*shape"],
    labels: Shaped[Array, "*shape"],
    *,
    margin: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""The distance itself where the label is 1, a hinge where it is -1; in its unit.

    $$ \ell = \begin{cases} d & l = 1 \\ \max(0, m - d) & l = -1 \end{cases} $$

    Any other label makes its unit NaN.

    Args:
        distances: Distances $d$ of pairs.
        labels: +1 for a pair that belongs together, -1 for one that does not; of the same shape.
        margin: Distance $m$ from which pairs that do not belong together cost nothing.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR
        2006, with squares. Equals torch's `hinge_embedding_loss`, where another label costs the
        sum of both cases.

    >>> hinge_embedding_loss(jnp.array([2.0, 0.5]), jnp.array([1, -1]), reduction="none")
    Array([2. , 0.5], dtype=float32)
    """
    check_float(distances=distances)
    check_same_shape(distances=distances, labels=labels)
    (distances,) = mask(where, *widen(distances))
    (labels,) = mask(where, jnp.asarray(labels), fill=1)
    (margin,) = numbers(distances, margin=margin)
    pulled, pushed = labels == 1, labels == -1
    require(lambda: pulled | pushed, "labels", "values -1 or 1", where)
    distances = poison(distances, pulled | pushed)
    values = jnp.where(pulled, distances, jax.nn.relu(margin - distances))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("p", "swap", functions=("distance",))
def triplet_margin_loss(
    anchor: Float[Array, "*batch features"],
    positive: Float[Array, "*batch features"],
    negative: Float[Array, "*batch features"],
    *,
    margin: Number = 1.0,
    p: int | float = 2,
    eps: Number = 1e-6,
    swap: bool = False,
    distance: Distance | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hinge on how much nearer the positive is than the negative, from 0, in unit of distance.

    $$ \ell = \max(0, d(a, p) - d(a, n) + m), \quad d(x, y) = |x - y + \varepsilon|_p $$

    With the default `eps` the gradient at coincident points has the size of the one elsewhere, in
    the direction of $(1, \dots, 1)$; with `eps=0` it is 0. Vectors are taken as they are, not
    normalised.

    Args:
        anchor: Vectors $a$, `(*batch, features)`.
        positive: Vectors $p$ that belong to the anchors, of the same shape.
        negative: Vectors $n$ that do not, of the same shape.
        margin: By how much $m$ the negative should be farther, in the unit of the distance.
        p: Power of the norm, from 1 to `inf`; fixed while tracing.
        eps: Added to each difference $\varepsilon$.
        swap: Whether the distance from positive to negative counts where it is the smaller one.
        distance: Used in place of $|\cdot|_p$, without `p` and `eps`: a function of two arrays
            `(*batch, features)` that returns `(*batch,)`. A call that passes one is not compiled.

    One unit per triplet; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Schroff, Kalenichenko and Philbin, FaceNet, CVPR 2015; swap of Balntas et al., Learning
        local feature descriptors with triplets, BMVC 2016. Equals torch's `triplet_margin_loss`
        and `triplet_margin_with_distance_loss`. optax adds `eps` under the root instead and takes
        no absolute values, so that it is right for even `p` alone.

    >>> a, p, n = jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 5.5]])
    >>> triplet_margin_loss(a, p, n, eps=0.0)  # 5 - 5.5 + 1
    Array(0.5, dtype=float32)
    """
    near, far = _distances(anchor, positive, negative, p, eps, swap, distance, where)
    (margin,) = numbers(near, margin=margin)
    values = jax.nn.relu(near - far + margin)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("p", "swap", functions=("distance",))
def soft_triplet_loss(
    anchor: Float[Array, "*batch features"],
    positive: Float[Array, "*batch features"],
    negative: Float[Array, "*batch features"],
    *,
    p: int | float = 2,
    eps: Number = 1e-6,
    swap: bool = False,
    distance: Distance | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Softplus of how much farther the positive is than the negative, above 0; no margin.

    $$ \ell = \log(1 + e^{d(a, p) - d(a, n)}), \quad d(x, y) = |x - y + \varepsilon|_p $$

    Unlike the hinge of `triplet_margin_loss` it never stops pulling.

    Args:
        anchor: Vectors $a$, `(*batch, features)`.
        positive: Vectors $p$ that belong to the anchors, of the same shape.
        negative: Vectors $n$ that do not, of the same shape.
        p: Power of the norm, from 1 to `inf`; fixed while tracing.
        eps: Added to each difference $\varepsilon$; with 0 the gradient is 0 at coincident points.
        swap: Whether the distance from positive to negative counts where it is the smaller one.
        distance: Used in place of $|\cdot|_p$, without `p` and `eps`: a function of two arrays
            `(*batch, features)` that returns `(*batch,)`. A call that passes one is not compiled.

    One unit per triplet; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification,
        arXiv 2017. Equals pytorch-metric-learning's `TripletMarginLoss(margin=0,
        smooth_loss=True)` on unit vectors.

    >>> a, p, n = jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 5.0]])
    >>> soft_triplet_loss(a, p, n, eps=0.0)  # log 2
    Array(0.6931472, dtype=float32)
    """
    near, far = _distances(anchor, positive, negative, p, eps, swap, distance, where)
    return reduce(jax.nn.softplus(near - far), where=where, weights=weights, reduction=reduction)


def _distances(
    anchor: Array,
    positive: Array,
    negative: Array,
    p: int | float,
    eps: Number,
    swap: bool,
    distance: Distance | None,
    where: Where | None,
) -> tuple[Array, Array]:
    """Distances to the positive and to the negative, `(*batch,)`."""
    check_float(anchor=anchor, positive=positive, negative=negative)
    check_min_rank(1, anchor=anchor)
    check_same_shape(anchor=anchor, positive=positive, negative=negative)
    if not p >= 1:
        raise ValueError(message("p", "a power of at least 1", p))
    vectors = widen(anchor, positive, negative)
    # Hidden vectors are set apart, for the sake of distances without a gradient at 0.
    a, b, c = (mask(where, x, fill=i)[0] for i, x in enumerate(vectors, 1))
    (eps,) = numbers(a, eps=eps)

    def measure(x: Array, y: Array) -> Array:
        if distance is None:
            return _norm(x - y + eps, p)
        found = distance(x, y)
        check_array(distance=found)
        check_shape(x.shape[:-1], distance=found)
        return widen(found)[0]

    far = measure(a, c)
    return measure(a, b), jnp.minimum(far, measure(b, c)) if swap else far


def _norm(x: Array, p: float) -> Array:
    """The p-norm over the last axis, without overflow; 0 with zero gradient at the zero vector."""
    if p == 2:
        return safe_norm(x)
    if p == 1:
        return jnp.sum(absolute(x), axis=-1)
    largest = jnp.max(absolute(x), axis=-1, keepdims=True, initial=0)
    if math.isinf(p):
        return largest[..., 0]
    largest = jax.lax.stop_gradient(largest)
    scale = jnp.where((largest == 0) | ~jnp.isfinite(largest), 1, largest)
    power = jnp.asarray(p, x.dtype)
    total = jnp.sum(safe_pow(absolute(x) / scale, power), axis=-1)
    return safe_pow(total, 1 / power) * scale[..., 0]


def _euclidean(x: Array, y: Array) -> Array:
    return safe_norm(x - y)


_SAME = Draw("B C", lambda g, shape, _: g.random(shape) < 0.5, "fixed")
_PAIRS = dict(distances=draw_uniform("B C", 0, 2), same=_SAME)
_MARGINS = dict(margin=1.3, positive_margin=0.2)
_LABELLED = dict(distances=draw_uniform("B C", 0, 2), labels=draw_signs("B C"))
_TRIPLET = {name: draw_normal("B D") for name in ("anchor", "positive", "negative")}

CASES = (
    Case(contrastive_loss, _PAIRS, _MARGINS),
    Case(unsquared_contrastive_loss, _PAIRS, _MARGINS),
    Case(hinge_embedding_loss, _LABELLED, dict(margin=1.3)),
    Case(triplet_margin_loss, _TRIPLET, dict(margin=2.5, swap=True)),
    Case(triplet_margin_loss, _TRIPLET, dict(margin=2.5, p=3, eps=0.0), label="cubic"),
    Case(soft_triplet_loss, _TRIPLET, dict(p=1, eps=0.01)),
    Case(soft_triplet_loss, _TRIPLET, dict(distance=_euclidean), label="distance"),
)
