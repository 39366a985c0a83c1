"""Losses on the angles between embeddings and learned prototypes of classes, most with a margin."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from .._core.case import Case, draw_labels, draw_normal
from .._core.checks import message
from .._core.compiled import compiled
from .._core.labels import poison, valid
from .._core.numerics import numbers, safe_norm, unit_vectors
from .._core.pairwise import similarities
from .._core.prototypes import against_others, own_angle, prepare_prototypes, with_own
from .._core.reduce import reduce
from .._core.sharding import one_hot
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "arcface_logits",
    "arcface_loss",
    "cosface_logits",
    "cosface_loss",
    "normalized_softmax_loss",
    "p2s_grad_loss",
    "sphereface_logits",
    "sphereface_loss",
    "subcenter_arcface_logits",
    "subcenter_arcface_loss",
]

Logits = tuple[Array, Array, Array]  # of all classes, of the label in their place, and the labels


@compiled()
def arcface_loss(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes features"],
    labels: Integer[Array, " n"],
    *,
    margin: Number = 0.5,
    scale: Number = 64.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy of scaled cosines with a margin on the angle to the own class, in nats.

    $$ \ell = -\log \frac{e^{s \psi(\theta_y)}}
       {e^{s \psi(\theta_y)} + \sum_{j \ne y} e^{s \cos\theta_j}}, \quad
       \psi(\theta) = \cos(\theta + m) \text{ if } \theta \le \pi - m,
       \text{ else } \cos\theta - m \sin m $$

    Both sides are normalised; a zero vector is at a right angle to everything. The gradient is
    finite at every angle, and 0 from the margin where embedding and prototype are parallel. Memory:
    one `n x classes` array. A label outside `[0, classes)` makes its unit NaN.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Rows of any length, `(classes, features)`.
        labels: Integers `(n,)`.
        margin: Added angle $m$, in radians.
        scale: Inverse temperature $s$ of the cosines.

    One unit per embedding; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, CVPR 2019.
        Equals pytorch-metric-learning's `ArcFaceLoss`, whose margin is in degrees (28.6 by default,
        0.499 radians) and whose gradient is NaN at angle 0.

    >>> embeddings = jnp.array([[2.0, 0.0]])
    >>> arcface_loss(embeddings, jnp.eye(2), jnp.array([0]), margin=jnp.pi / 3, scale=2.0)
    Array(0.3132617, dtype=float32)

    That is `log(1 + e^-1)`: the own cosine falls from 1 to 1/2.
    """
    logits = _arcface(embeddings, prototypes, labels, margin, scale, where)
    return reduce(against_others(*logits), where=where, weights=weights, reduction=reduction)


@compiled()
def arcface_logits(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes features"],
    labels: Integer[Array, " n"],
    *,
    margin: Number = 0.5,
    scale: Number = 64.0,
    where: Where | None = None,
) -> Float[Array, "n classes"]:
    r"""Scaled cosines with a margin on the angle to the own class; not a loss.

    The logits of `arcface_loss`, which is their `softmax_cross_entropy`, for other losses. Without
    a label, at test time, they are `scale * pairwise_cosine(embeddings, prototypes)`.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Rows of any length, `(classes, features)`.
        labels: Integers `(n,)`; one outside `[0, classes)` makes its row NaN.
        margin: Added angle, in radians.
        scale: Inverse temperature of the cosines.
        where: True keeps a row; a hidden one counts as zeros with label 0.

    Returns:
        Float32 logits `(n, classes)`.

    Reference:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, CVPR 2019.

    >>> arcface_logits(jnp.array([[2.0, 0.0]]), jnp.eye(2), jnp.array([1]), margin=0.0, scale=3.0)
    Array([[3., 0.]], dtype=float32)
    """
    return with_own(*_arcface(embeddings, prototypes, labels, margin, scale, where))


def _arcface(
    embeddings: Any, prototypes: Any, labels: Any, margin: Any, scale: Any, where: Any
) -> Logits:
    x, w, labels = prepare_prototypes(embeddings, prototypes, labels, where)
    margin, scale = numbers(x, margin=margin, scale=scale)
    x, w = unit_vectors(x), unit_vectors(w)
    own = _widened_angle(*own_angle(x, w, labels), margin)
    return scale * similarities(x, w), scale * own, labels


def _widened_angle(gap: Array, sine: Array, margin: Array) -> Array:
    """Cosine of angle plus margin from `1 - cos` and `sin`; past pi it goes on falling."""
    turned = (1 - gap) * jnp.cos(margin) - sine * jnp.sin(margin)
    return jnp.where(gap <= 1 + jnp.cos(margin), turned, 1 - gap - margin * jnp.sin(margin))


@compiled()
def subcenter_arcface_loss(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes centers features"],
    labels: Integer[Array, " n"],
    *,
    margin: Number = 0.5,
    scale: Number = 64.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""ArcFace with several prototypes of a class, of which the nearest counts, in nats.

    $$ \ell = -\log \frac{e^{s \psi(\theta_y)}}
       {e^{s \psi(\theta_y)} + \sum_{j \ne y} e^{s \cos\theta_j}}, \quad
       \theta_j = \min_k \angle(x, w_{jk}) $$

    with the $\psi$ of `arcface_loss`, which it is for one centre. Noisy samples gather at centres
    of their own. Memory: one `n x classes` array for each centre. A label outside `[0, classes)`
    makes its unit NaN.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Centres of any length, `(classes, centers, features)`.
        labels: Integers `(n,)`.
        margin: Added angle, in radians.
        scale: Inverse temperature $s$ of the cosines.

    One unit per embedding; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces,
        ECCV 2020. Equals pytorch-metric-learning's `SubCenterArcFaceLoss`, with degrees.

    >>> centers = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [0.0, -1.0]]])
    >>> embeddings, labels = jnp.array([[0.0, 3.0]]), jnp.array([0])
    >>> subcenter_arcface_loss(embeddings, centers, labels, margin=0.0, scale=1.0)  # log(1 + e^-2)
    Array(0.126928, dtype=float32)
    """
    logits = _subcenter_arcface(embeddings, prototypes, labels, margin, scale, where)
    return reduce(against_others(*logits), where=where, weights=weights, reduction=reduction)


@compiled()
def subcenter_arcface_logits(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes centers features"],
    labels: Integer[Array, " n"],
    *,
    margin: Number = 0.5,
    scale: Number = 64.0,
    where: Where | None = None,
) -> Float[Array, "n classes"]:
    r"""Scaled cosines to the nearest centre, with a margin on the own class; not a loss.

    The logits of `subcenter_arcface_loss`, which is their `softmax_cross_entropy`.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Centres of any length, `(classes, centers, features)`.
        labels: Integers `(n,)`; one outside `[0, classes)` makes its row NaN.
        margin: Added angle, in radians.
        scale: Inverse temperature of the cosines.
        where: True keeps a row; a hidden one counts as zeros with label 0.

    Returns:
        Float32 logits `(n, classes)`.

    Reference:
        Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces,
        ECCV 2020.

    >>> centers = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [0.0, -1.0]]])
    >>> subcenter_arcface_logits(jnp.array([[0.0, 3.0]]), centers, jnp.array([0]), margin=0.0)
    Array([[ 64., -64.]], dtype=float32)
    """
    return with_own(*_subcenter_arcface(embeddings, prototypes, labels, margin, scale, where))


def _subcenter_arcface(
    embeddings: Any, prototypes: Any, labels: Any, margin: Any, scale: Any, where: Any
) -> Logits:
    x, w, labels = prepare_prototypes(embeddings, prototypes, labels, where, rank=3)
    margin, scale = numbers(x, margin=margin, scale=scale)
    x, w = unit_vectors(x), unit_vectors(w)
    nearest = similarities(x, w[:, 0])
    for k in range(1, w.shape[1]):  # faster than one maximum, and half its memory
        cosines = similarities(x, w[:, k])
        nearest = jnp.where(cosines > nearest, cosines, nearest)
    gap, sine = own_angle(x, w, labels)  # (n, centers)
    hit = one_hot(jnp.argmin(jax.lax.stop_gradient(gap), axis=1), w.shape[1])
    gap, sine = (jnp.sum(jnp.where(hit, part, 0), axis=1) for part in (gap, sine))
    return scale * nearest, scale * _widened_angle(gap, sine, margin), labels


@compiled()
def cosface_loss(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes features"],
    labels: Integer[Array, " n"],
    *,
    margin: Number = 0.35,
    scale: Number = 64.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy of scaled cosines with a margin on the cosine of the own class, in nats.

    $$ \ell = -\log \frac{e^{s (\cos\theta_y - m)}}
       {e^{s (\cos\theta_y - m)} + \sum_{j \ne y} e^{s \cos\theta_j}} $$

    Both sides are normalised; a zero vector has cosine 0 to everything. Memory: one `n x classes`
    array. A label outside `[0, classes)` makes its unit NaN.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Rows of any length, `(classes, features)`.
        labels: Integers `(n,)`.
        margin: How far $m$ the cosine of the own class is lowered.
        scale: Inverse temperature $s$ of the cosines.

    One unit per embedding; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, CVPR 2018. Equals
        pytorch-metric-learning's `CosFaceLoss`.

    >>> embeddings = jnp.array([[2.0, 0.0]])
    >>> cosface_loss(embeddings, jnp.eye(2), jnp.array([0]), margin=1.0)  # log 2
    Array(0.6931472, dtype=float32)
    """
    logits = _cosface(embeddings, prototypes, labels, margin, scale, where)
    return reduce(against_others(*logits), where=where, weights=weights, reduction=reduction)


@compiled()
def cosface_logits(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes features"],
    labels: Integer[Array, " n"],
    *,
    margin: Number = 0.35,
    scale: Number = 64.0,
    where: Where | None = None,
) -> Float[Array, "n classes"]:
    r"""Scaled cosines with a margin on the cosine of the own class; not a loss.

    The logits of `cosface_loss`, which is their `softmax_cross_entropy`.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Rows of any length, `(classes, features)`.
        labels: Integers `(n,)`; one outside `[0, classes)` makes its row NaN.
        margin: How far the cosine of the own class is lowered.
        scale: Inverse temperature of the cosines.
        where: True keeps a row; a hidden one counts as zeros with label 0.

    Returns:
        Float32 logits `(n, classes)`.

    Reference:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, CVPR 2018.

    >>> cosface_logits(jnp.array([[2.0, 0.0]]), jnp.eye(2), jnp.array([0]), margin=0.25, scale=4.0)
    Array([[3., 0.]], dtype=float32)
    """
    return with_own(*_cosface(embeddings, prototypes, labels, margin, scale, where))


def _cosface(
    embeddings: Any, prototypes: Any, labels: Any, margin: Any, scale: Any, where: Any
) -> Logits:
    x, w, labels = prepare_prototypes(embeddings, prototypes, labels, where)
    margin, scale = numbers(x, margin=margin, scale=scale)
    x, w = unit_vectors(x), unit_vectors(w)
    gap, _ = own_angle(x, w, labels)
    return scale * similarities(x, w), scale * (1 - gap - margin), labels


@compiled("margin")
def sphereface_loss(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes features"],
    labels: Integer[Array, " n"],
    *,
    margin: int = 4,
    scale: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy in which the angle to the own class counts several times, in nats.

    $$ \ell = -\log \frac{e^{s |x| \psi(\theta_y)}}
       {e^{s |x| \psi(\theta_y)} + \sum_{j \ne y} e^{s |x| \cos\theta_j}}, \quad
       \psi(\theta) = (-1)^k \cos(m \theta) - 2 k \text{ for }
       \tfrac{k \pi}{m} \le \theta \le \tfrac{(k + 1) \pi}{m} $$

    Prototypes are normalised, embeddings are not. $\psi$ falls from 1 to $1 - 2m$. Memory: one
    `n x classes` array. A label outside `[0, classes)` makes its unit NaN.

    Args:
        embeddings: Rows `(n, features)`.
        prototypes: Rows of any length, `(classes, features)`.
        labels: Integers `(n,)`.
        margin: How many times $m$ the angle counts, an int of at least 1.
        scale: Factor $s$ of the logits.

    One unit per embedding; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Liu et al., SphereFace: Deep Hypersphere Embedding for Face Recognition, CVPR 2017, who
        blend $\psi$ with the cosine early in training. Equals pytorch-metric-learning's
        `SphereFaceLoss`.

    >>> sphereface_loss(jnp.array([[2.0, 0.0]]), jnp.eye(2), jnp.array([0]))  # log(1 + e^-2)
    Array(0.126928, dtype=float32)
    """
    logits = _sphereface(embeddings, prototypes, labels, margin, scale, where)
    return reduce(against_others(*logits), where=where, weights=weights, reduction=reduction)


@compiled("margin")
def sphereface_logits(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes features"],
    labels: Integer[Array, " n"],
    *,
    margin: int = 4,
    scale: Number = 1.0,
    where: Where | None = None,
) -> Float[Array, "n classes"]:
    r"""Projections on the prototypes, with the angle to the own class multiplied; not a loss.

    The logits of `sphereface_loss`, which is their `softmax_cross_entropy`.

    Args:
        embeddings: Rows `(n, features)`.
        prototypes: Rows of any length, `(classes, features)`.
        labels: Integers `(n,)`; one outside `[0, classes)` makes its row NaN.
        margin: How many times the angle counts, an int of at least 1.
        scale: Factor of the logits.
        where: True keeps a row; a hidden one counts as zeros with label 0.

    Returns:
        Float32 logits `(n, classes)`.

    Reference:
        Liu et al., SphereFace: Deep Hypersphere Embedding for Face Recognition, CVPR 2017.

    >>> sphereface_logits(jnp.array([[2.0, 0.0]]), jnp.eye(2), jnp.array([1]), margin=2)  # 2 cos pi
    Array([[ 2., -2.]], dtype=float32)
    """
    return with_own(*_sphereface(embeddings, prototypes, labels, margin, scale, where))


def _sphereface(
    embeddings: Any, prototypes: Any, labels: Any, margin: Any, scale: Any, where: Any
) -> Logits:
    if isinstance(margin, bool) or not isinstance(margin, (int, np.integer)):
        raise TypeError(message("margin", "an integer", repr(margin)))
    if margin < 1:
        raise ValueError(message("margin", "an integer of at least 1", margin))
    x, w, labels = prepare_prototypes(embeddings, prototypes, labels, where)
    (scale,) = numbers(x, scale=scale)
    w = unit_vectors(w)
    gap, _ = own_angle(unit_vectors(x), w, labels)
    own = safe_norm(x) * _multiplied_angle(gap, int(margin))
    return scale * similarities(x, w), scale * own, labels


def _multiplied_angle(gap: Array, times: int) -> Array:
    """The psi of SphereFace from `1 - cos`."""
    before, multiple = jnp.zeros_like(gap), gap  # 1 - cos(k theta) by Chebyshev's recursion
    for _ in range(times - 1):
        before, multiple = multiple, 2 * multiple - before + 2 * gap * (1 - multiple)
    borders = (1 - math.cos(k * math.pi / times) for k in range(1, times))
    passed = sum((gap >= border).astype(gap.dtype) for border in borders)
    return jnp.where(passed % 2 == 0, 1 - multiple, multiple - 1) - 2 * passed


@compiled()
def normalized_softmax_loss(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes features"],
    labels: Integer[Array, " n"],
    *,
    temperature: Number = 0.05,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy of the cosines between embeddings and prototypes, in nats.

    $$ \ell = -\log \mathrm{softmax}(\cos\theta / T)_y $$

    Both sides are normalised: the logits are `pairwise_cosine(embeddings, prototypes) / T`. Memory:
    one `n x classes` array. A label outside `[0, classes)` makes its unit NaN.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Rows of any length, `(classes, features)`.
        labels: Integers `(n,)`.
        temperature: Divisor $T$ of the cosines.

    One unit per embedding; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Zhai and Wu, Classification is a Strong Baseline for Deep Metric Learning, BMVC 2019. Equals
        pytorch-metric-learning's `NormalizedSoftmaxLoss`, and `cosface_loss` with margin 0.

    >>> embeddings = jnp.array([[2.0, 0.0]])
    >>> normalized_softmax_loss(embeddings, jnp.eye(2), jnp.array([0]), temperature=0.5)
    Array(0.126928, dtype=float32)
    """
    x, w, labels = prepare_prototypes(embeddings, prototypes, labels, where)
    (temperature,) = numbers(x, temperature=temperature)
    x, w = unit_vectors(x), unit_vectors(w)
    gap, _ = own_angle(x, w, labels)
    values = against_others(similarities(x, w) / temperature, (1 - gap) / temperature, labels)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def p2s_grad_loss(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes features"],
    labels: Integer[Array, " n"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean squared error between cosines and one-hot labels, in `[0, 4]`; nothing to tune.

    $$ \ell = \tfrac{1}{C} \sum_j (\cos\theta_j - [j = y])^2 $$

    Both sides are normalised; a zero vector has cosine 0 to everything. A label outside
    `[0, classes)` makes its unit NaN.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Rows of any length, `(classes, features)`.
        labels: Integers `(n,)`.

    One unit per embedding; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Zhang et al., P2SGrad: Refined Gradients for Optimizing Deep Face Models, CVPR 2019, who set
        the gradient; this is its integral, over the number of classes. Equals
        pytorch-metric-learning's `P2SGradLoss`.

    >>> p2s_grad_loss(jnp.array([[2.0, 0.0]]), jnp.eye(2), jnp.array([1]))  # (1 + 1) / 2
    Array(1., dtype=float32)
    """
    x, w, labels = prepare_prototypes(embeddings, prototypes, labels, where)
    cosines = similarities(unit_vectors(x), unit_vectors(w))
    targets = one_hot(labels, cosines.shape[1]).astype(cosines.dtype)
    values = poison(jnp.mean((cosines - targets) ** 2, axis=1), valid(labels, cosines.shape[1]))
    return reduce(values, where=where, weights=weights, reduction=reduction)


_ROWS = dict(embeddings=draw_normal("B D"), prototypes=draw_normal("C D"), labels=draw_labels("B"))
_CENTERS = dict(_ROWS, prototypes=draw_normal("C K D"))

CASES = (
    Case(arcface_loss, _ROWS, dict(margin=0.4, scale=5.0)),
    Case(
        subcenter_arcface_loss,
        _CENTERS,
        dict(margin=0.4, scale=5.0),
        sizes={"K": 2},
    ),
    Case(cosface_loss, _ROWS, dict(margin=0.2, scale=5.0)),
    Case(sphereface_loss, _ROWS, dict(margin=2, scale=0.7)),
    Case(normalized_softmax_loss, _ROWS, dict(temperature=0.3)),
    Case(p2s_grad_loss, _ROWS),
)
