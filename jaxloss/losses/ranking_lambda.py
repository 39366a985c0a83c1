"""LambdaRank: pairs of a list weighted by what a change of their order does to a ranking metric."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from .._core.case import Case, draw_labels, draw_normal
from .._core.checks import check_shape, message
from .._core.compiled import compiled
from .._core.list_pairs import DENSE_TO, Items, Pairs, Weigh, all_pairs, streamed
from .._core.lists import Lists, check_top_n, discounts, gains, ideal_dcg, prepare_lists
from .._core.numerics import safe_div
from .._core.reduce import reduce
from .._core.sigmoid import sigmoid_costs
from .._core.typing import Reduction, Values, Where

__all__ = [
    "dcg2_pair_weight",
    "dcg_pair_weight",
    "label_difference_pair_weight",
    "lambda_loss",
    "mrr_pair_weight",
    "precision_pair_weight",
]

Segments = Integer[ArrayLike, "*lists items"]
OfItems = Callable[[Array], Array]
PairWeight = Callable[..., Array]
_STATIC = ("top_n", "normalize", "num_segments")


@compiled(*_STATIC, functions=("gain", "discount"))
def dcg_pair_weight(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    top_n: int | None = None,
    normalize: bool = True,
    gain: OfItems | None = None,
    discount: OfItems | None = None,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
) -> Array:
    r"""By how much the DCG changes if two items of a list change places, `[..., L, L]`.

    $|G_i - G_j|\, |D(r_i) - D(r_j)|$ with gains $G = 2^y - 1$, discounts $D(r) = 1 / \log_2(1 + r)$
    and ranks by decreasing score, of equal scores the first first. No gradient. For `lambda_loss`
    (LambdaRank).

    Args:
        scores: Scores `[..., L]`.
        relevance: Same shape: grades.
        top_n: Ranks below the first `top_n` have discount 0.
        normalize: Whether to divide by the largest DCG of the list, so that NDCG changes; where
            that is 0 so are the weights.
        gain: Function of the relevance in place of $G$, item by item.
        discount: Function of the rank in place of $D$.
        segments: Which of several packed lists each item belongs to, integers `[..., L]`.
        num_segments: Number of lists in a row; needed with `segments`.
        where: Bool array `[..., L]`; a hidden item has no rank and weight 0.

    Returns:
        Float32 weights `[..., L, L]`, 0 between items of two lists.

    >>> scores, relevance = jnp.array([2.0, 1.0]), jnp.array([0, 1])
    >>> dcg_pair_weight(scores, relevance)[1, 0]  # 1 - 1 / log2(3)
    Array(0.36907023, dtype=float32)
    """
    given = _prepare(scores, relevance, where, segments, num_segments, top_n)
    return _all(given, _dcg(*given, top_n, normalize, gain, discount))


@compiled(*_STATIC, functions=("gain", "discount"))
def dcg2_pair_weight(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    top_n: int | None = None,
    normalize: bool = True,
    gain: OfItems | None = None,
    discount: OfItems | None = None,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
) -> Array:
    r"""The pair weight of NDCG-Loss2, `[..., L, L]`: it looks at how far apart two ranks are.

    $|G_i - G_j|\, |D(|r_i - r_j|) - D(|r_i - r_j| + 1)|$ with gains, discounts and ranks as in
    `dcg_pair_weight`. NDCG-Loss2++ is `10 * dcg2_pair_weight(...) + dcg_pair_weight(...)`. No
    gradient. With `top_n` a pair whose lower rank r is below it counts `1 / (1 - D(r))` fold
    (Jagerman et al., On Optimizing Top-K Metrics, SIGIR 2022).

    Args:
        scores: Scores `[..., L]`.
        relevance: Same shape: grades.
        top_n: The first ranks for whose sake to sort, here and in the ideal DCG.
        normalize: Whether to divide by the largest DCG of the list.
        gain: Function of the relevance in place of $G$, item by item.
        discount: Function of the rank in place of $D$.
        segments: Which of several packed lists each item belongs to, integers `[..., L]`.
        num_segments: Number of lists in a row; needed with `segments`.
        where: Bool array `[..., L]`; a hidden item has no rank and weight 0.

    Returns:
        Float32 weights `[..., L, L]`, 0 between items of two lists.

    >>> scores, relevance = jnp.array([2.0, 1.0]), jnp.array([0, 1])
    >>> dcg2_pair_weight(scores, relevance)[1, 0]  # neighbours: 1 - 1 / log2(3) too
    Array(0.36907023, dtype=float32)
    """
    given = _prepare(scores, relevance, where, segments, num_segments, top_n)
    return _all(given, _dcg2(*given, top_n, normalize, gain, discount))


@compiled(*_STATIC)
def label_difference_pair_weight(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    top_n: int | None = None,
    normalize: bool = True,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
) -> Array:
    r"""How far apart the relevance of two items of a list is, $|y_i - y_j|$, `[..., L, L]`.

    Args:
        scores: Scores `[..., L]`; only their shape counts.
        relevance: Same shape: grades.
        top_n: Ignored, since no rank counts; here for the sake of `lambda_loss`.
        normalize: Ignored too.
        segments: Which of several packed lists each item belongs to, integers `[..., L]`.
        num_segments: Number of lists in a row; needed with `segments`.
        where: Bool array `[..., L]`; a hidden item has weight 0.

    Returns:
        Float32 weights `[..., L, L]`, 0 between items of two lists.

    >>> label_difference_pair_weight(jnp.zeros(2), jnp.array([3, 1]))[0]
    Array([0., 2.], dtype=float32)
    """
    given = _prepare(scores, relevance, where, segments, num_segments, top_n)
    return _all(given, _label_difference(*given, top_n, normalize))


@compiled(*_STATIC)
def mrr_pair_weight(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    top_n: int | None = None,
    normalize: bool = True,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
) -> Array:
    r"""By how much two items' reciprocal ranks differ if one is relevant, `[..., L, L]`.

    $|1 / r_i - 1 / r_j|$ where exactly one relevance is above 0, else 0: for the mean reciprocal
    rank. Ranks are by decreasing score. No gradient.

    Args:
        scores: Scores `[..., L]`.
        relevance: Same shape: relevant above 0.
        top_n: Ranks below the first `top_n` have the reciprocal 0.
        normalize: Ignored, since the best reciprocal rank is 1.
        segments: Which of several packed lists each item belongs to, integers `[..., L]`.
        num_segments: Number of lists in a row; needed with `segments`.
        where: Bool array `[..., L]`; a hidden item has no rank and weight 0.

    Returns:
        Float32 weights `[..., L, L]`, 0 between items of two lists.

    >>> mrr_pair_weight(jnp.array([2.0, 1.0]), jnp.array([0, 1]))[1]
    Array([0.5, 0. ], dtype=float32)
    """
    given = _prepare(scores, relevance, where, segments, num_segments, top_n)
    return _all(given, _mrr(*given, top_n, normalize))


@compiled(*_STATIC)
def precision_pair_weight(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    top_n: int | None = None,
    normalize: bool = True,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
) -> Array:
    r"""By how much the precision among the first `top_n` changes if two items change places.

    1 where exactly one of them is relevant and exactly one has a rank up to `top_n`, else 0,
    `[..., L, L]`. Ranks are by decreasing score. No gradient.

    Args:
        scores: Scores `[..., L]`.
        relevance: Same shape: relevant above 0.
        top_n: How many ranks are looked at; must be given.
        normalize: Whether to divide by the most relevant items that may be among them.
        segments: Which of several packed lists each item belongs to, integers `[..., L]`.
        num_segments: Number of lists in a row; needed with `segments`.
        where: Bool array `[..., L]`; a hidden item has no rank and weight 0.

    Returns:
        Float32 weights `[..., L, L]`, 0 between items of two lists.

    Raises:
        ValueError: `top_n` is None: the precision of a whole list never changes.

    >>> scores, relevance = jnp.array([2.0, 1.0]), jnp.array([0, 1])
    >>> precision_pair_weight(scores, relevance, top_n=1)[1]
    Array([1., 0.], dtype=float32)
    """
    given = _prepare(scores, relevance, where, segments, num_segments, top_n)
    return _all(given, _precision(*given, top_n, normalize))


@compiled(*_STATIC, functions=("pair_weight",))
def lambda_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    pair_weight: PairWeight = dcg_pair_weight,
    top_n: int | None = None,
    normalize: bool = True,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Logistic loss of a list's pairs, each weighted by what its order is worth (LambdaRank).

    $$ \ell = \sum_{y_i > y_j} w_{ij} \log\left(1 + e^{-(s_i - s_j)}\right) $$

    in nats, from 0 up; $w$ carries no gradient. By default it is the change of the NDCG, so that
    the sum bounds what the ranking lacks. A list without two grades costs 0. With the pair weights
    of this library memory for a few arrays `[..., L]` is enough, also for the gradient; with one of
    yours there are some `[..., L, L]`. Relevance is data and gets no gradient.

    Args:
        scores: Predicted scores `[..., L]`, one list along the last axis.
        relevance: Same shape: grades.
        pair_weight: A function `(scores, relevance, top_n=, normalize=, where=)` that returns
            $w$ `[..., L, L]`, with `segments=` and `num_segments=` too where those are given:
            `dcg2_pair_weight`, `label_difference_pair_weight`, `mrr_pair_weight`,
            `precision_pair_weight`, or yours, of which hidden pairs are ignored. A call that passes
            one is not compiled.
        top_n: See the pair weight.
        normalize: See the pair weight.
        segments: Which list of its row each item belongs to, integers `[..., L]`, where several are
            packed into a row.
        num_segments: Number of lists in a row; needed with `segments`. An item of no list makes its
            row NaN.
        where: Bool array `[..., L]`; a hidden item has no rank and is in no pair.
        weights: One for each list, of the shape of the units.

    One unit per list with an item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `[...]` if `reduction` is `"none"`, of packed lists
        `[..., num_segments]`.

    Reference:
        Burges, From RankNet to LambdaRank to LambdaMART, MSR-TR-2010-82, 2010; Wang et al., The
        LambdaLoss Framework for Ranking Metric Optimization, CIKM 2018. With `normalize=False`, L
        times it equals the sum of `rax.pairwise_logistic_loss` with `rax.dcg_lambdaweight`. allRank
        takes logarithms to base 2.

    >>> scores, relevance = jnp.array([1.0, 1.0]), jnp.array([1, 0])
    >>> lambda_loss(scores, relevance)  # (1 - 1 / log2(3)) log 2
    Array(0.25582, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(scores, relevance, where, segments, num_segments)
    check_top_n(top_n)
    known = next((of for weight, of in _OF_ITEMS if weight is pair_weight), None)
    if known is not None and scores.shape[-1] > DENSE_TO:
        weigh = known(jax.lax.stop_gradient(scores), relevance, lists, top_n, normalize)
        costs, _ = streamed(_weighted_costs, scores, relevance, lists, weigh)
        return reduce(lists.sum(costs), where=lists.units(), weights=weights, reduction=reduction)
    packed = {} if segments is None else dict(segments=lists.segments, num_segments=num_segments)
    fixed = jax.lax.stop_gradient(scores)
    weight = pair_weight(
        fixed, relevance, top_n=top_n, normalize=normalize, where=lists.where, **packed
    )
    check_shape((*scores.shape, scores.shape[-1]), pair_weight=weight)
    pairs = all_pairs(scores, relevance, lists)
    weight = jax.lax.stop_gradient(jnp.asarray(weight)).astype(scores.dtype)
    costs = jnp.sum(_weighted_costs([pairs._replace(weight=weight)]), axis=-1)
    return reduce(lists.sum(costs), where=lists.units(), weights=weights, reduction=reduction)


def _weighted_costs(run: Sequence[Pairs]) -> Array:
    return sum(pairs.sum(pairs.weight * sigmoid_costs(-pairs.gap)[0]) for pairs in run)  # pyright: ignore[reportReturnType, reportOptionalOperand]


def _prepare(
    scores: Any, relevance: Any, where: Any, segments: Any, num_segments: Any, top_n: Any
) -> tuple[Array, Array, Lists]:
    """Scores without a gradient, relevance and lists."""
    check_top_n(top_n)
    scores, relevance, lists = prepare_lists(scores, relevance, where, segments, num_segments)
    return jax.lax.stop_gradient(scores), relevance, lists


def _all(given: tuple[Array, Array, Lists], weigh: Weigh) -> Array:
    """The weights of all pairs of real items of one list."""
    return jnp.where(given[2].pairs(given[0]), weigh.all(), 0)


def _dcg(
    scores: Array,
    relevance: Array,
    lists: Lists,
    top_n: int | None,
    normalize: bool,
    gain: OfItems | None = None,
    discount: OfItems | None = None,
) -> Weigh:
    worth = _worth(relevance, lists, gain, discount, top_n, normalize)
    ranks = lists.ranks(scores).astype(worth.dtype)
    if discount is not None:
        cut = jax.lax.stop_gradient(discounts(ranks, worth, discount, top_n))
        return Weigh((worth, cut), lambda a, b: _gap(a[0], b[0]) * _gap(a[1], b[1]))

    def of(a: Items, b: Items) -> Array:
        low, high = _sorted(a[1], b[1])
        change = _discount_gap(low, high)
        if top_n is not None:
            one = jnp.where(low <= top_n, discounts(low, low), 0)
            change = jnp.where(high <= top_n, change, one)
        return _gap(a[0], b[0]) * change

    return Weigh((worth, ranks), of)


def _dcg2(
    scores: Array,
    relevance: Array,
    lists: Lists,
    top_n: int | None,
    normalize: bool,
    gain: OfItems | None = None,
    discount: OfItems | None = None,
) -> Weigh:
    worth = _worth(relevance, lists, gain, discount, top_n, normalize)
    ranks = lists.ranks(scores).astype(worth.dtype)
    at = lambda rank: jax.lax.stop_gradient(discounts(rank, worth, discount))

    def of(a: Items, b: Items) -> Array:
        low, high = _sorted(a[1], b[1])
        steps = jnp.maximum(high - low, 1)  # an item with itself has no gain to lose
        given = discount is not None
        change = _gap(at(steps), at(steps + 1)) if given else _discount_gap(steps, steps + 1)
        if top_n is not None:
            beyond = safe_div(jnp.ones_like(high), 1 - at(high))
            change = change * jnp.where(high > top_n, beyond, 1)
        return _gap(a[0], b[0]) * change

    return Weigh((worth, ranks), of)


def _label_difference(
    scores: Array,
    relevance: Array,
    lists: Lists,
    top_n: int | None,
    normalize: bool,
) -> Weigh:
    del scores, lists, top_n, normalize
    return Weigh((relevance,), lambda a, b: _gap(a[0], b[0]))


def _mrr(
    scores: Array,
    relevance: Array,
    lists: Lists,
    top_n: int | None,
    normalize: bool,
) -> Weigh:
    del normalize
    ranks = lists.ranks(scores).astype(scores.dtype)

    def of(a: Items, b: Items) -> Array:
        low, high = _sorted(a[1], b[1])
        change = (high - low) / (low * high)
        if top_n is not None:
            change = jnp.where(high <= top_n, change, jnp.where(low <= top_n, 1 / low, 0))
        return _gap(a[0], b[0]) * change

    return Weigh((_relevant(relevance), ranks), of)


def _precision(
    scores: Array,
    relevance: Array,
    lists: Lists,
    top_n: int | None,
    normalize: bool,
) -> Weigh:
    if top_n is None:
        raise ValueError(message("top_n", "a count", None))
    hit = _relevant(relevance)
    if normalize:
        hit = safe_div(hit, lists.spread(jnp.minimum(lists.sum(hit), top_n)))
    inside = (lists.ranks(scores) <= top_n).astype(hit.dtype)
    return Weigh((hit, inside), lambda a, b: _gap(a[0], b[0]) * _gap(a[1], b[1]))


_OF_ITEMS: tuple[tuple[PairWeight, Callable[..., Weigh]], ...] = (
    (dcg_pair_weight, _dcg),
    (dcg2_pair_weight, _dcg2),
    (label_difference_pair_weight, _label_difference),
    (mrr_pair_weight, _mrr),
    (precision_pair_weight, _precision),
)


def _gap(a: Array, b: Array) -> Array:
    return jnp.abs(a - b)


def _sorted(a: Array, b: Array) -> tuple[Array, Array]:
    return jnp.minimum(a, b), jnp.maximum(a, b)


def _relevant(relevance: Array) -> Array:
    return jnp.where(jnp.isnan(relevance), relevance, (relevance > 0).astype(relevance.dtype))


def _worth(
    relevance: Array,
    lists: Lists,
    gain: OfItems | None,
    discount: OfItems | None,
    top_n: int | None,
    normalize: bool,
) -> Array:
    """The gain of each item, as a share of the ideal DCG of its list if `normalize`."""
    worth = jax.lax.stop_gradient(gains(relevance, gain))
    if not normalize:
        return worth
    best = ideal_dcg(worth, lists, discount=discount, top_n=top_n)
    return safe_div(worth, lists.spread(best))


def _discount_gap(low: Array, high: Array) -> Array:
    """D(low) - D(high) of ranks, with every digit also where neighbours far down differ little."""
    change = math.log(2) * jnp.log1p((high - low) / (1 + low))
    return change / (jnp.log1p(low) * jnp.log1p(high))


_LISTS = dict(scores=draw_normal("B L"), relevance=draw_labels("B L", classes="G"))
_SIZES = dict(L=4, G=3)


def _case(label: str = "", **config: Any) -> Case:
    return Case(lambda_loss, _LISTS, config, label, positions="B L", sizes=_SIZES)


CASES = (
    _case(),
    _case("dcg2 of the first", pair_weight=dcg2_pair_weight, top_n=2, normalize=False),
)
