"""Losses that compare embeddings with learned proxies of the classes instead of one another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .._core.case import Case, draw_labels, draw_normal
from .._core.compiled import compiled
from .._core.labels import poison, valid
from .._core.numerics import numbers, safe_div, unit_vectors
from .._core.pairwise import similarities
from .._core.prototypes import against_others, own_angle, prepare_prototypes
from .._core.reduce import reduce
from .._core.sharding import one_hot
from .._core.softmax import log1p_sum_exp
from .._core.terms import Axis, add_up
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["proxy_anchor_loss", "proxy_nca_loss", "soft_triple_loss"]


@compiled()
def soft_triple_loss(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes centers features"],
    labels: Integer[Array, " n"],
    *,
    scale: Number = 20.0,
    gamma: Number = 0.1,
    margin: Number = 0.01,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy of soft similarities to several centres of each class, in nats.

    $$ \ell = -\log \frac{e^{\lambda (S_y - \delta)}}
       {e^{\lambda (S_y - \delta)} + \sum_{j \ne y} e^{\lambda S_j}}, \quad
       S_j = \sum_k \mathrm{softmax}_k(s_{jk} / \gamma)\, s_{jk} $$

    for cosines $s_{jk}$ between embedding and centres. With one centre it is `cosface_loss`.
    Memory: three `n x classes x centers` arrays. A label outside `[0, classes)` makes its unit NaN.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Centres of any length, `(classes, centers, features)`.
        labels: Integers `(n,)`.
        scale: Inverse temperature $\lambda$ of the class similarities.
        gamma: Temperature among the centres of a class; towards 0 only the nearest counts.
        margin: How far $\delta$ the similarity of the own class is lowered.

    One unit per embedding; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Qian et al., SoftTriple Loss: Deep Metric Learning Without Triplet Sampling, ICCV 2019.
        Equals pytorch-metric-learning's `SoftTripleLoss`; the regulariser that merges centres is
        the caller's.

    >>> embeddings, centers = jnp.array([[2.0, 0.0]]), jnp.eye(2)[:, None]
    >>> soft_triple_loss(embeddings, centers, jnp.array([0]), margin=1.0)  # log 2
    Array(0.6931472, dtype=float32)
    """
    x, w, labels = prepare_prototypes(embeddings, prototypes, labels, where, rank=3)
    scale, gamma, margin = numbers(x, scale=scale, gamma=gamma, margin=margin)
    x, w = unit_vectors(x), unit_vectors(w)
    classes, centers, features = w.shape
    cosines = similarities(x, jnp.swapaxes(w, 0, 1).reshape(-1, features))
    cosines = cosines.reshape(-1, centers, classes)
    gap, _ = own_angle(x, w, labels)  # (n, centers)
    own = _soft_maximum(1 - gap, gamma) - margin
    values = against_others(scale * _soft_maximum(cosines, gamma), scale * own, labels)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@jax.checkpoint
def _soft_maximum(x: Array, temperature: Array) -> Array:
    """Mean over axis 1 with softmax weights; the gradient makes the exponentials again."""
    powers = jnp.exp((x - jax.lax.stop_gradient(jnp.max(x, axis=1, keepdims=True))) / temperature)
    return jnp.sum(powers * x, axis=1) / jnp.sum(powers, axis=1)


@compiled()
def proxy_nca_loss(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes features"],
    labels: Integer[Array, " n"],
    *,
    scale: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Neighbourhood components analysis with one proxy for each class, in nats.

    $$ \ell = -\log \frac{e^{-s |x - p_y|^2}}{\sum_j e^{-s |x - p_j|^2}} $$

    with both sides normalised, so that $|x - p|^2 = 2 - 2 \cos\theta$; a zero vector is at a right
    angle to everything. It is `normalized_softmax_loss` at temperature `1 / (2 s)`. Memory: one
    `n x classes` array. A label outside `[0, classes)` makes its unit NaN.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Proxies of any length, `(classes, features)`.
        labels: Integers `(n,)`.
        scale: Inverse temperature $s$ of the squared distances.

    One unit per embedding; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Movshovitz-Attias et al., No Fuss Distance Metric Learning using Proxies, ICCV 2017, with
        the own proxy in the denominator as in Teh et al., ProxyNCA++, ECCV 2020; the first paper
        leaves it out. Equals pytorch-metric-learning's `ProxyNCALoss`.

    >>> proxy_nca_loss(jnp.array([[2.0, 0.0]]), jnp.eye(2), jnp.array([0]))  # log(1 + e^-2)
    Array(0.126928, dtype=float32)
    """
    x, w, labels = prepare_prototypes(embeddings, prototypes, labels, where)
    (scale,) = numbers(x, scale=scale)
    x, w = unit_vectors(x), unit_vectors(w)
    gap, _ = own_angle(x, w, labels)
    values = against_others(2 * scale * similarities(x, w), 2 * scale * (1 - gap), labels)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis_name")
def proxy_anchor_loss(
    embeddings: Float[Array, "n features"],
    prototypes: Float[Array, "classes features"],
    labels: Integer[Array, " n"],
    *,
    margin: Number = 0.1,
    alpha: Number = 32.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""How badly proxies, as anchors, order the embeddings of a batch, from 0 up.

    $$ \ell = \frac{1}{|P^+|} \sum_{p \in P^+}
       \log\Big(1 + \sum_{x:\, y = p} e^{-\alpha (s_{xp} - \delta)}\Big) +
       \frac{1}{C} \sum_p \log\Big(1 + \sum_{x:\, y \ne p} e^{\alpha (s_{xp} + \delta)}\Big) $$

    for cosines $s$; $P^+$ are the classes present in the batch. Embeddings are coupled: the mean
    over parts of a batch is another loss. Memory: two `n x classes` arrays. A kept label outside
    `[0, classes)` makes it NaN.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        prototypes: Proxies of any length, `(classes, features)`.
        labels: Integers `(n,)`.
        margin: Distance $\delta$ from cosine 0 that both sides should keep.
        alpha: Inverse temperature $\alpha$ of the cosines.
        where: Bool array `(n,)` of the embeddings that count.
        weights: A scalar.
        axis_name: Mapped axes over which the embeddings are split; all devices get the loss of the
            whole batch.

    One unit per batch with a kept embedding; see `jaxloss.reduce`.

    Returns:
        A float32 scalar.

    Reference:
        Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020. Equals
        pytorch-metric-learning's `ProxyAnchorLoss`.

    >>> embeddings, labels = jnp.array([[2.0, 0.0]]), jnp.array([0])
    >>> proxy_anchor_loss(embeddings, jnp.eye(2), labels, margin=0.0, alpha=1.0)
    Array(0.6598353, dtype=float32)

    That is `log(1 + e^-1)` of the own class, and half of `log 2` of the other.
    """
    x, w, labels = prepare_prototypes(embeddings, prototypes, labels, where)
    margin, alpha = numbers(x, margin=margin, alpha=alpha)
    cosines = similarities(unit_vectors(x), unit_vectors(w))  # (n, classes)
    own = one_hot(labels, w.shape[0])
    kept = jnp.ones(labels.shape, bool) if where is None else jnp.asarray(where)
    count = lambda flags: add_up(jnp.sum(flags, axis=0, dtype=x.dtype), axis_name)
    near = jnp.where(own & kept[:, None], alpha * (margin - cosines), -jnp.inf)
    far = jnp.where(~own & kept[:, None], alpha * (margin + cosines), -jnp.inf)
    near, far = (jnp.sum(log1p_sum_exp(z, 0, axis_name)) for z in (near, far))
    present = jnp.sum(count(own & kept[:, None]) > 0, dtype=x.dtype)
    bad = count(kept & ~valid(labels, w.shape[0]))
    value = poison(safe_div(near, present) + far / w.shape[0], bad == 0)
    return reduce(value, where=count(kept) > 0, weights=weights, reduction=reduction)


_ROWS = dict(embeddings=draw_normal("B D"), prototypes=draw_normal("C D"), labels=draw_labels("B"))
_CENTERS = dict(_ROWS, prototypes=draw_normal("C K D"))

CASES = (
    Case(
        soft_triple_loss,
        _CENTERS,
        dict(scale=5.0, gamma=0.3, margin=0.1),
        sizes={"K": 2},
    ),
    Case(proxy_nca_loss, _ROWS, dict(scale=1.5)),
    Case(
        proxy_anchor_loss,
        _ROWS,
        dict(margin=0.2, alpha=2.0),
        positions="B",
        coupled=True,
        without={
            "microbatches": "sums over all embeddings of the batch stand inside logarithms",
        },
    ),
)
