"""Ranking metrics made smooth: NDCG and MRR of soft ranks, and of soft permutations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from .._core.case import Case, draw_labels, draw_normal
from .._core.checks import check_float, check_min_rank, message
from .._core.compiled import compiled
from .._core.labels import poison
from .._core.lists import (
    Lists,
    check_top_n,
    dcg,
    discounts,
    gains,
    ideal_dcg,
    lists_of,
    place_of,
    prepare_lists,
    take_items,
)
from .._core.numerics import numbers, safe_div, widen
from .._core.reduce import reduce
from .._core.sinkhorn import log_sinkhorn
from .._core.softmax import safe_log_sum_exp
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["approx_mrr_loss", "approx_ndcg_loss", "neural_ndcg_loss", "neural_sort"]

BLOCK, LONG = 8, 16  # of long lists, how many items all others are compared with at once


@compiled("top_n", "num_segments")
def approx_ndcg_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    temperature: Number = 1.0,
    top_n: int | None = None,
    segments: Integer[ArrayLike, "*lists items"] | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Minus the normalised discounted cumulative gain (NDCG) of soft ranks, in `[-1, 0]`.

    $$ \ell = -\frac{1}{Z} \sum_i \frac{2^{y_i} - 1}{\log_2(1 + r_i)}, \quad
       r_i = 1 + \sum_{j \ne i} \sigma\left(\frac{s_j - s_i}{T}\right) $$

    with the DCG $Z$ of the best order. Memory: a few arrays of the size of the scores, for value
    and gradient.

    Args:
        scores: One score for each item, `[..., L]`.
        relevance: How relevant each item is, from 0; same shape. No gradient.
        temperature: Difference $T$ of scores that counts; towards 0 the metric becomes exact.
        top_n: How many items count. Each gain is then multiplied by $\sigma((c - r_i) / T)$, where
            $c$, midway between the soft ranks of the items at places `top_n` and `top_n + 1`, has
            no gradient.
        segments: Packed lists: which list of its row an item belongs to, integers `[..., L]`.
        num_segments: How many lists a row has room for.

    One unit per list, of packed lists `[..., num_segments]`; see `jaxloss.reduce`. A list without
    relevant items is no unit.

    Returns:
        A float32 scalar, or one value for each list if `reduction` is `"none"`.

    Reference:
        Qin et al., A General Approximation Framework for Direct Optimization of Information
        Retrieval Measures, Information Retrieval 2010. Equals `rax.approx_t12n(rax.ndcg_metric)`,
        where that runs and every list has a relevant item; TF-Ranking has `temperature=0.1`, and
        allRank's `alpha` is `1 / temperature`.

    >>> scores, relevance = jnp.array([[3.0, 1.0, 2.0]]), jnp.array([[0.0, 0.0, 1.0]])
    >>> approx_ndcg_loss(scores, relevance, temperature=1e-3)  # the second: 1 / log2(3)
    Array(-0.63092977, dtype=float32)
    """
    check_top_n(top_n)
    scores, relevance, lists = prepare_lists(scores, relevance, where, segments, num_segments)
    (temperature,) = numbers(scores, temperature=temperature)
    gain = gains(relevance)
    ideal = ideal_dcg(gain, lists, top_n=top_n)
    options = (gain,) if top_n is None else (gain, temperature, *_at_border(scores, lists, top_n))
    found = _of_ranks(_soft_dcg, lists, scores, temperature, options)
    values = -safe_div(found, ideal)
    return reduce(values, where=~(ideal <= 0), weights=weights, reduction=reduction)


def _soft_dcg(ranks: Array, options: tuple[Array, ...], lists: Lists) -> Array:
    gain, *cut = options
    if cut:
        temperature, border, longer = cut
        middle = jax.lax.stop_gradient(lists.spread(lists.sum(border * ranks)) / 2)
        kept = jax.nn.sigmoid((middle - ranks) / temperature)
        gain = gain * jnp.where(longer == 0, 1, kept)
    return lists.sum(gain * discounts(ranks, gain))


def _at_border(scores: Array, lists: Lists, top_n: int) -> tuple[Array, Array]:
    """Which items are the last that counts and the next one, and if there is one; as 0 and 1."""
    places = lists.ranks(scores)
    border = ((places == top_n) | (places == top_n + 1)).astype(scores.dtype)
    longer = lists.spread(lists.sizes(scores)) > top_n
    return border, jnp.broadcast_to(longer, scores.shape).astype(scores.dtype)


@compiled("num_segments")
def approx_mrr_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    temperature: Number = 1.0,
    segments: Integer[ArrayLike, "*lists items"] | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Minus the reciprocal soft rank of the first relevant item (MRR), in `[-1, 0]`.

    $$ \ell = -\max_{i:\, y_i > 0} \frac{1}{r_i}, \quad
       r_i = 1 + \sum_{j \ne i} \sigma\left(\frac{s_j - s_i}{T}\right) $$

    Memory: a few arrays of the size of the scores, for value and gradient.

    Args:
        scores: One score for each item, `[..., L]`.
        relevance: Above 0 for relevant items; same shape.
        temperature: Difference $T$ of scores that counts; towards 0 the metric becomes exact.
        segments: Packed lists: which list of its row an item belongs to, integers `[..., L]`.
        num_segments: How many lists a row has room for.

    One unit per list, of packed lists `[..., num_segments]`; see `jaxloss.reduce`. A list without
    relevant items is no unit.

    Returns:
        A float32 scalar, or one value for each list if `reduction` is `"none"`.

    Reference:
        Qin et al., A General Approximation Framework for Direct Optimization of Information
        Retrieval Measures, Information Retrieval 2010. Equals `rax.approx_t12n(rax.mrr_metric)`,
        where that runs, for relevance 0 and from 1 up; TF-Ranking's sums over the relevant items.

    >>> scores, relevance = jnp.array([[3.0, 1.0, 2.0]]), jnp.array([[0.0, 1.0, 1.0]])
    >>> approx_mrr_loss(scores, relevance, temperature=1e-3)  # the second is the first relevant
    Array(-0.5, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(scores, relevance, where, segments, num_segments)
    (temperature,) = numbers(scores, temperature=temperature)
    scores = poison(scores, ~jnp.isnan(relevance))
    relevant = (~(relevance <= 0)).astype(scores.dtype)
    found = _of_ranks(_reciprocal, lists, scores, temperature, (relevant,))
    some = lists.sum(relevant) > 0
    return reduce(-found, where=some, weights=weights, reduction=reduction)


def _reciprocal(ranks: Array, options: tuple[Array, ...], lists: Lists) -> Array:
    (relevant,) = options
    return lists.max(relevant / ranks, initial=0)


Found = Callable[[Array, Any, Lists], Array]


def _of_ranks(
    find: Found, lists: Lists, scores: Array, temperature: Array, options: tuple[Array, ...]
) -> Array:
    """What `find` makes of soft ranks, options and lists, `*lists`."""
    scores = jnp.clip(scores, -_most(scores), _most(scores))
    where, segments, count = lists
    return _through(find, count, scores, temperature, options, where, segments)


def _most(scores: Array) -> float:
    """Infinite scores are taken as this: their differences are no NaN."""
    return float(jnp.finfo(scores.dtype).max) / 4


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _through(
    find: Found,
    num_segments: int | None,
    scores: Array,
    temperature: Array,
    options: tuple[Array, ...],
    where: Array | None,
    segments: Array | None,
) -> Array:
    lists = Lists(where, segments, num_segments)
    return find(_soft_ranks(scores, temperature, lists), options, lists)


@_through.defjvp
def _through_jvp(find: Found, num_segments: int | None, primals: Any, tangents: Any) -> Any:
    # The slope of a score is the sum over the others of (c_j - c_i) sigma'((s_j - s_i) / T) / T,
    # with slopes c of the ranks. It is found here, beside the value: no pair of items is kept.
    scores, temperature, options, where, segments = primals
    scores_dot, temperature_dot, options_dot, *_ = tangents
    lists = Lists(where, segments, num_segments)
    ranks = _soft_ranks(scores, temperature, lists)
    out, pull = jax.vjp(lambda ranks: find(ranks, options, lists), ranks)
    (of_ranks,) = pull(jnp.ones_like(out))
    slopes = _slopes(scores, temperature, of_ranks, lists)
    in_options = lambda options: find(ranks, options, lists)
    _, moved = jax.jvp(in_options, (options,), (options_dot,))
    scores_dot -= scores * (temperature_dot / temperature)  # only their quotient matters
    return out, lists.sum(slopes * scores_dot) + moved


def _soft_ranks(scores: Array, temperature: Array, lists: Lists) -> Array:
    """1 and the sum of sigmoids of how far the other items are ahead."""
    ahead = lambda other: jax.nn.sigmoid((other - scores) / temperature)
    return 0.5 + _over_items(ahead, lists, scores)


def _slopes(scores: Array, temperature: Array, of_ranks: Array, lists: Lists) -> Array:
    def share(other: Array, of_other: Array) -> Array:
        e = jnp.exp(-jnp.abs((other - scores) / temperature))
        return (of_other - of_ranks) * (e / jnp.square(1 + e))

    return _over_items(share, lists, scores, of_ranks) / temperature


def _over_items(find: Callable[..., Array], lists: Lists, scores: Array, *more: Array) -> Array:
    """Sum of what `find` makes of the score, and more, of each real item, at items of its list.

    Some items at a time: XLA would keep all pairs of items at once. What rounding takes from the
    sum is given back.
    """
    size = scores.shape[-1]
    if not size:
        return 0 * scores
    block = BLOCK if size >= LONG else 1
    missing = -size % block
    real, arrays = lists.where, (scores, *more)
    if missing:
        real = jnp.ones_like(scores, bool) if real is None else real
    padded = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
    everything = jax.tree.map(padded, (arrays, real, lists.segments))

    def add(k: int | Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        total, lost = state
        part = []
        for b in range(block):
            pick = partial(jax.lax.dynamic_slice_in_dim, start_index=k * block + b, slice_size=1)
            others, kept, segments = jax.tree.map(partial(pick, axis=-1), everything)
            found = find(*others)
            if kept is not None:
                found = jnp.where(kept, found, 0)
            if segments is not None:
                found = jnp.where(segments == lists.segments, found, 0)
            part.append(found)
        added = sum(part[1:], part[0]) - lost
        after = total + added
        return after, (after - total) - added

    return jax.lax.fori_loop(0, -(-size // block), add, (0 * scores, 0 * scores))[0]


@compiled()
def neural_sort(
    scores: Float[Array, "*lists items"],
    *,
    temperature: Number = 1.0,
    where: Where | None = None,
) -> Float[Array, "*lists ranks items"]:
    r"""NeuralSort: how much of each place of a list, the best first, goes to each item.

    $$ P_i = \mathrm{softmax}\left(\frac{(n + 1 - 2 i)\, s - A 1}{T}\right), \quad
       A_{jk} = |s_j - s_k| $$

    for the $n$ real items. Every row sums to 1, and its largest entry is that of the item of rank
    $i$; towards temperature 0 this is the permutation that sorts the scores.

    Args:
        scores: One score for each item, `[..., L]`.
        temperature: $T$: the larger, the softer.
        where: True for real items; the others, and the places behind the real ones, have 0.

    Returns:
        Float32, `[..., L, L]`: places along the last axis but one.

    Reference:
        Grover et al., Stochastic Optimization of Sorting Networks via Continuous Relaxations
        (NeuralSort), ICLR 2019.

    >>> neural_sort(jnp.array([1.0, 3.0, 2.0]), temperature=1e-3)
    Array([[0., 1., 0.],
           [0., 0., 1.],
           [1., 0., 0.]], dtype=float32)
    """
    check_float(scores=scores)
    check_min_rank(1, scores=scores)
    lists = lists_of(scores, where)
    (scores,) = lists.hide(*widen(scores))
    (temperature,) = numbers(scores, temperature=temperature)
    log_p, _, _ = _log_places(scores, temperature, lists)
    column = jnp.broadcast_to(lists.ranks(scores)[..., None, :] - 1, log_p.shape)
    return jnp.take_along_axis(jnp.exp(log_p), column, axis=-1, mode="clip")


def _log_places(scores: Array, temperature: Array, lists: Lists) -> tuple[Array, Array, Lists]:
    """Logarithm of the soft permutation of items in their order; that order; the ordered lists.

    A matrix `[..., places, items]` of items, too, in order; -inf outside of a list.
    """
    order = lists.order(scores)
    (x,), lists = take_items(order, scores), lists.take(order)
    most = _most(x) / (2 * max(x.shape[-1], 1) ** 2)
    x, inside = jnp.clip(x, -most, most), lists.pairs(x)
    slope = _slope(x, inside, lists)
    logits = _logits(jax.lax.stop_gradient(x)) + (slope - jax.lax.stop_gradient(slope))
    logits = jnp.where(inside, logits / temperature, -jnp.inf)
    norm = safe_log_sum_exp(logits)[..., None]
    return jnp.where(inside, logits - norm, -jnp.inf), order, lists


def _slope(x: Array, inside: Array, lists: Lists) -> Array:
    """The logits of the paper up to a constant of each row: right in their slopes, also at ties.

    With the mean place of equal scores, `2 (place_j - i) x_j + sum_k sign(x_j - x_k) x_k`.
    """
    sign = jnp.sign(jax.lax.stop_gradient(x[..., :, None] - x[..., None, :]))
    sign = jnp.where(inside, sign, 0)  # j, k
    place = (lists.spread(lists.sizes(x)) + 1 - jnp.sum(sign, axis=-1)) / 2
    places = lists.places(x).astype(x.dtype)
    shared = jnp.sum(sign * x[..., None, :], axis=-1)
    apart = place[..., None, :] - places[..., :, None]
    return 2 * apart * x[..., None, :] + shared[..., None, :]


def _logits(x: Array) -> Array:
    """The same, less 0 for the item of rank i: sums of terms of one sign, accurate at any size.

    With the gaps g between neighbours, item r > i has -sum_{i <= k < r} (2 (k - i) + 1) g_k, and
    item r < i -sum_{r <= k < i} (2 (i - k) - 1) g_k.
    """
    place = place_of(x).astype(x.dtype)
    apart = place[..., None, :] - place[..., :, None]  # i, k
    factor = 2 * jnp.abs(apart) - 1
    gaps = x[..., :-1] - x[..., 1:]
    none = jnp.zeros_like(x[..., :1])
    before, behind = (jnp.concatenate(g, axis=-1) for g in ([none, gaps], [gaps, none]))
    down = jnp.where(apart > 0, factor * before[..., None, :], 0)
    up = jnp.where(apart < 0, factor * behind[..., None, :], 0)
    axis = down.ndim - 1
    return -(jnp.cumsum(down, axis=axis) + jax.lax.cumsum(up, axis=axis, reverse=True))


@compiled("top_n", "sinkhorn_iterations", "num_segments")
def neural_ndcg_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    temperature: Number = 1.0,
    top_n: int | None = None,
    sinkhorn_iterations: int = 50,
    segments: Integer[ArrayLike, "*lists items"] | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Minus the NDCG of the soft permutation that NeuralSort makes of the scores, in `[-1, 0]`.

    $$ \ell = -\frac{1}{Z} \sum_i \frac{(\hat P G)_i}{\log_2(1 + i)}, \quad G_j = 2^{y_j} - 1 $$

    with `neural_sort`'s $P$ scaled to $\hat P$, whose columns, too, sum to 1, and the DCG $Z$ of
    the best order. Memory: a few arrays `[..., L, L]`.

    Args:
        scores: One score for each item, `[..., L]`.
        relevance: How relevant each item is, from 0; same shape. No gradient.
        temperature: The larger, the softer the permutation; towards 0 the metric becomes exact.
        top_n: How many places count.
        sinkhorn_iterations: How often columns and rows are scaled; 0 leaves $P$ as it is.
        segments: Packed lists: which list of its row an item belongs to, integers `[..., L]`.
        num_segments: How many lists a row has room for.

    One unit per list, of packed lists `[..., num_segments]`; see `jaxloss.reduce`. A list without
    relevant items is no unit.

    Returns:
        A float32 scalar, or one value for each list if `reduction` is `"none"`.

    Reference:
        Pobrotyn and Białobrzeski, NeuralNDCG: Direct Optimisation of a Ranking Metric via
        Differentiable Relaxation of Sorting, 2021. allRank's `neuralNDCG` stops scaling once no
        sum is off by more than 1e-6.

    >>> scores, relevance = jnp.array([[3.0, 1.0, 2.0]]), jnp.array([[0.0, 0.0, 1.0]])
    >>> neural_ndcg_loss(scores, relevance, temperature=1e-3)  # the second: 1 / log2(3)
    Array(-0.63092977, dtype=float32)
    """
    check_top_n(top_n)
    if isinstance(sinkhorn_iterations, bool) or not isinstance(sinkhorn_iterations, int):
        raise TypeError(message("sinkhorn_iterations", "an integer", repr(sinkhorn_iterations)))
    if sinkhorn_iterations < 0:
        raise ValueError(message("sinkhorn_iterations", "at least 0", sinkhorn_iterations))
    scores, relevance, lists = prepare_lists(scores, relevance, where, segments, num_segments)
    (temperature,) = numbers(scores, temperature=temperature)
    gain = gains(relevance)
    ideal = ideal_dcg(gain, lists, top_n=top_n)
    log_p, order, ordered = _log_places(scores, temperature, lists)
    if sinkhorn_iterations:
        real = ordered.where
        log_p = log_sinkhorn(log_p, sinkhorn_iterations, rows=real, columns=real)
    (gain,) = take_items(order, gain)
    # Rows sum to 1. Without the item of rank i no gradient cancels where its share is nearly 1.
    more = gain[..., None, :] - gain[..., :, None]
    expected = gain + jnp.sum(jnp.exp(log_p) * more, axis=-1)
    found = dcg(expected, ordered.places(scores), ordered, top_n=top_n)
    values = -safe_div(found, ideal)
    return reduce(values, where=~(ideal <= 0), weights=weights, reduction=reduction)


_LISTS = dict(scores=draw_normal("B L"), relevance=draw_labels("B L", classes="Y"))
_case = partial(Case, positions="B L", sizes=dict(L=4, Y=4))

CASES = (
    _case(approx_ndcg_loss, _LISTS, dict(temperature=0.7)),
    _case(
        approx_ndcg_loss,
        _LISTS,
        dict(temperature=0.7, top_n=2),
        label="top",
        without={"numerical": "the border of those that count has no gradient"},
    ),
    _case(approx_mrr_loss, _LISTS, dict(temperature=0.7)),
    _case(neural_ndcg_loss, _LISTS, dict(temperature=2.5, top_n=3, sinkhorn_iterations=3)),
)
