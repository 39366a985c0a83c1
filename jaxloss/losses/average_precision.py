"""Losses of the ranking that each sample of a labelled batch makes of the others."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from .._core.case import Case, draw_halves, draw_normal
from .._core.checks import message
from .._core.compiled import compiled
from .._core.numerics import numbers, safe_div
from .._core.pairwise import own_index, pairwise_distance, prepare_batch, similarities
from .._core.reduce import reduce
from .._core.runs import in_chunks
from .._core.sharding import unshard
from .._core.terms import Axis, add_up
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["fast_ap_loss", "histogram_loss", "ranked_list_loss", "smooth_ap_loss"]

BLOCK = 2**22  # comparisons of two samples at once


@compiled("chunk_size", "axis_name")
def smooth_ap_loss(
    embeddings: Float[Array, "batch features"],
    labels: Integer[Array, " batch"],
    *,
    temperature: Number = 0.01,
    chunk_size: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""One minus a smoothed average precision of each query, in `[0, 1)`.

    $$ \ell_q = \frac{1}{|P|} \sum_{i \in P} \frac{N_i}{1 + P_i + N_i}, \quad
       P_i = \sum_{j \in P \setminus i} \sigma\left(\frac{s_{qj} - s_{qi}}{\tau}\right), \quad
       N_i = \sum_{j \in N} \sigma\left(\frac{s_{qj} - s_{qi}}{\tau}\right) $$

    for cosines $s$ of the query with all samples, itself among the positives $P$. Classes may have
    any sizes. Memory: `chunk_size x batch x batch`, made once more for the gradient.

    Args:
        embeddings: Vectors `(batch, features)`; only their directions matter.
        labels: One label for each vector: equal ones belong together.
        temperature: Difference of cosines $\tau$ that counts; towards 0 the average precision
            becomes the exact one.
        chunk_size: Queries taken at once; if None as many as make about four million comparisons.
        axis_name: Mapped axes over which the batch is split; each query ranks all of it.

    One unit per sample that has a positive; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Brown et al., Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval, ECCV 2020,
        with the query itself in the list as in its code. Equals pytorch-metric-learning's
        `SmoothAPLoss` where that is defined: as many classes as samples of each, in order.

    >>> embeddings, labels = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), jnp.array([0, 0, 1])
    >>> smooth_ap_loss(embeddings, labels, reduction="none")  # (0 + 1/3) / 2 of both
    Array([0.16666667, 0.16666667, 0.        ], dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name, unit=True)
    keys = unshard(batch.keys, 0)
    (temperature,) = numbers(keys, temperature=temperature)
    count, size = len(batch.rows), len(keys)
    everyone = jnp.arange(size, dtype=jnp.int32)

    def values(rows: Array, own: Array, positives: Array, negatives: Array) -> Array:
        scores = similarities(rows, keys) / temperature  # (c, m)
        above = jax.nn.sigmoid(scores[:, None] - scores[:, :, None])  # (c, i, j)
        found = positives | (own[:, None] == everyone[None])
        others = found[:, None] & (everyone[:, None] != everyone[None])[None]
        worse = jnp.sum(jnp.where(negatives[:, None], above, 0), axis=2)  # (c, i)
        better = jnp.sum(jnp.where(others, above, 0), axis=2)
        misses = jnp.where(found, worse / (1 + better + worse), 0)
        return safe_div(jnp.sum(misses, axis=1), jnp.sum(found, axis=1, dtype=misses.dtype))

    arrays = (batch.rows, own_index(count, axis_name), batch.positives, batch.negatives)
    if chunk_size is None:
        chunk_size = max(1, BLOCK // max(1, size) ** 2)
    units = in_chunks(values, chunk_size, *arrays)
    exists = jnp.any(batch.positives, axis=1)
    return reduce(units, where=exists, weights=weights, reduction=reduction)


@compiled("num_bins", "axis_name")
def fast_ap_loss(
    embeddings: Float[Array, "batch features"],
    labels: Integer[Array, " batch"],
    *,
    num_bins: int = 10,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""One minus the average precision of each query from histograms of distances, in `[0, 1)`.

    $$ \ell_q = \frac{1}{|P|} \sum_k h^+_k \frac{H^-_k}{H^+_k + H^-_k}, \quad
       H_k = \sum_{l \le k} h_l $$

    with histograms $h^+, h^-$ of the squared distances, in `[0, 4]`, from the query to its
    positives and negatives, each distance split between the two nearest of `num_bins + 1` centres.
    Memory: a few arrays `batch x batch`.

    Args:
        embeddings: Vectors `(batch, features)`; only their directions matter.
        labels: One label for each vector: equal ones belong together.
        num_bins: Intervals between the centres.
        axis_name: Mapped axes over which the batch is split; each query ranks all of it.

    One unit per sample that has a positive; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Cakir et al., Deep Metric Learning to Rank, CVPR 2019. Equals pytorch-metric-learning's
        `FastAPLoss`.

    >>> embeddings, labels = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), jnp.array([0, 0, 1])
    >>> fast_ap_loss(embeddings, labels, num_bins=2, reduction="none")  # the second: a tie
    Array([0. , 0.5, 0. ], dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name, unit=True)
    square = 2 - 2 * similarities(batch.rows, batch.keys)  # (n, m)
    masks = (batch.positives, batch.negatives)
    near, far = _cumulated(square, 0.0, 4.0, num_bins, lambda x: jnp.sum(x, axis=1), masks)
    misses = _steps(near) * safe_div(far, far + near)  # (bins, n)
    count = jnp.sum(batch.positives, axis=1, dtype=square.dtype)
    units = safe_div(jnp.sum(misses, axis=0), count)
    return reduce(units, where=count > 0, weights=weights, reduction=reduction)


@compiled("num_bins", "axis_name")
def histogram_loss(
    embeddings: Float[Array, "batch features"],
    labels: Integer[Array, " batch"],
    *,
    num_bins: int = 100,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""How probably a negative pair of the batch is more alike than a positive one, in `[0, 1]`.

    $$ \ell = \sum_k h^-_k \sum_{l \le k} h^+_l $$

    with histograms $h^+, h^-$ of the cosines of positive and of negative pairs, each of sum 1, and
    each cosine split between the two nearest of `num_bins + 1` centres. 0 if the batch lacks
    positive or negative pairs. Memory: a few arrays `batch x batch`.

    Args:
        embeddings: Vectors `(batch, features)`; only their directions matter.
        labels: One label for each vector: equal ones belong together.
        num_bins: Intervals between the centres.
        axis_name: Mapped axes over which the batch is split; the pairs are those of all of it.
        where: Bool array `(batch,)`; a hidden sample is in no pair.
        weights: A scalar.

    The unit is one, the batch; see `jaxloss.reduce`.

    Returns:
        A float32 scalar.

    Reference:
        Ustinova and Lempitsky, Learning Deep Embeddings with Histogram Loss, NIPS 2016. Equals
        pytorch-metric-learning's `HistogramLoss`, which leaves out pairs of two samples without
        positives and cannot take two samples of one direction.

    >>> embeddings, labels = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), jnp.array([0, 0, 1])
    >>> histogram_loss(embeddings, labels, num_bins=2)  # 0 against -1 and 0: a tie counts
    Array(0.5, dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name, unit=True)
    cosine = similarities(batch.rows, batch.keys)  # (n, m)
    masks = (batch.positives, batch.negatives)
    sums = _cumulated(cosine, -1.0, 1.0, num_bins, jnp.sum, masks)
    counts = (jnp.sum(mask, dtype=cosine.dtype) for mask in masks)
    near, far = (
        safe_div(add_up(h, axis_name), add_up(n, axis_name))
        for h, n in zip(sums, counts, strict=True)
    )
    return reduce(jnp.sum(_steps(far) * near), weights=weights, reduction=reduction)


@compiled("axis_name")
def ranked_list_loss(
    embeddings: Float[Array, "batch features"],
    labels: Integer[Array, " batch"],
    *,
    margin: Number = 0.4,
    alpha: Number = 1.2,
    positive_temperature: Number = 0.0,
    negative_temperature: Number = 10.0,
    imbalance: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Draws the positives of each query into a ball and the negatives out of a larger one.

    $$ \ell_q = (1 - \lambda) \sum_{p \in P^*} w_p (d_{qp} - (\alpha - m))
       + \lambda \sum_{n \in N^*} w_n (\alpha - d_{qn}) $$

    from 0, over the positives farther than $\alpha - m$ and the negatives nearer than $\alpha$, for
    distances of unit vectors. The weights are softmaxes over these, of $T_p d_{qp}$ and of
    $-T_n d_{qn}$; they have a gradient too.

    Args:
        embeddings: Vectors `(batch, features)`; only their directions matter.
        labels: One label for each vector: equal ones belong together.
        margin: Difference $m$ of the two radii.
        alpha: Radius $\alpha$ within which no negative should be.
        positive_temperature: Factor $T_p$; 0 weighs all positives alike.
        negative_temperature: Factor $T_n$: the larger, the more the nearest negatives weigh.
        imbalance: Share $\lambda$ of the negatives.
        axis_name: Mapped axes over which the batch is split; each query ranks all of it.

    One unit per sample that has a positive; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Wang et al., Ranked List Loss for Deep Metric Learning, CVPR 2019. Equals
        pytorch-metric-learning's `RankedListLoss`, whose weights sum to a little less than 1 and
        which leaves out negatives at distance 0.

    >>> embeddings, labels = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0, 1])
    >>> ranked_list_loss(embeddings, labels, margin=0.5, alpha=1.5)  # (2 - 1 + 1.5 - 1.414) / 2
    Array(0.54289323, dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name, unit=True)
    distances = pairwise_distance(batch.rows, batch.keys)  # (n, m)
    margin, alpha, t_p, t_n, share = numbers(
        distances,
        margin=margin,
        alpha=alpha,
        positive_temperature=positive_temperature,
        negative_temperature=negative_temperature,
        imbalance=imbalance,
    )
    pull = _weighed(distances - (alpha - margin), t_p, batch.positives)
    push = _weighed(alpha - distances, t_n, batch.negatives)
    units = (1 - share) * pull + share * push
    exists = jnp.any(batch.positives, axis=1)
    return reduce(units, where=exists, weights=weights, reduction=reduction)


def _weighed(excess: Array, temperature: Array, kept: Array) -> Array:
    """Mean of the kept positive entries of each row, with the weights of a softmax; 0 of none."""
    kept &= ~(excess <= 0)  # a NaN stays
    logits = jnp.where(kept, temperature * excess, 0)
    fixed = jax.lax.stop_gradient(logits)
    top = jnp.max(fixed, axis=1, keepdims=True, initial=-jnp.inf, where=kept)
    top = jnp.where(jnp.isfinite(top), top, 0)
    weight = jnp.where(kept, jnp.exp(logits - top), 0)
    return safe_div(jnp.sum(weight * jnp.where(kept, excess, 0), axis=1), jnp.sum(weight, axis=1))


def _cumulated(
    x: Array,
    low: float,
    high: float,
    bins: Any,
    add: Callable[[Array], Array],
    masks: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Cumulated soft histograms of what each mask keeps, `(bins + 1, ...)`, one bin at a time."""
    if isinstance(bins, bool) or not isinstance(bins, (int, np.integer)):
        raise TypeError(message("num_bins", "an integer", repr(bins)))
    if bins < 1:
        raise ValueError(message("num_bins", "at least 1", bins))
    centres = np.linspace(low, high, int(bins) + 1)

    @jax.checkpoint
    def at(centre: Array) -> tuple[Array, ...]:
        beyond = (x - centre) * (int(bins) / (high - low))
        share = jnp.where(beyond <= 0, 1, jax.nn.relu(1 - beyond))
        return tuple(add(jnp.where(mask, share, 0)) for mask in masks)

    near, far = jax.lax.map(at, jnp.asarray(centres, x.dtype))
    return near, far


def _steps(cumulated: Array) -> Array:
    return jnp.concatenate([cumulated[:1], cumulated[1:] - cumulated[:-1]])


_BATCH = dict(embeddings=draw_normal("B D"), labels=draw_halves("B"))
_COUPLED = {
    "microbatches": "each sample ranks the whole batch",
    "weight_two": "a sample of weight 0 still is ranked by others",
}

CASES = (
    Case(smooth_ap_loss, _BATCH, dict(temperature=0.3), coupled=True, without=_COUPLED),
    Case(
        fast_ap_loss,
        _BATCH,
        dict(num_bins=5),
        sizes=dict(D=4),
        coupled=True,
        without=_COUPLED,
    ),
    Case(
        histogram_loss,
        _BATCH,
        dict(num_bins=5),
        positions="B",
        coupled=True,
        without={"microbatches": "the histograms are those of the whole batch"},
    ),
    Case(
        ranked_list_loss,
        _BATCH,
        dict(
            margin=0.5,
            alpha=1.3,
            positive_temperature=0.5,
            negative_temperature=3.0,
            imbalance=0.4,
        ),
        sizes=dict(D=4),
        coupled=True,
        without=_COUPLED,
    ),
)
