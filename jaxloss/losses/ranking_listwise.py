"""Listwise ranking losses: softmaxes over the items of a list, and the likelihood of an order."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from .._core.case import Case, Draw, draw_labels, draw_normal, draw_uniform
from .._core.checks import check_array, check_float, check_min_rank, message, require
from .._core.compiled import compiled
from .._core.labels import poison
from .._core.lists import Lists, gains, lists_of, place_of, prepare_lists, take_items
from .._core.numerics import expm1, numbers, safe_div, safe_log, safe_mul, widen
from .._core.reduce import reduce
from .._core.sigmoid import binary_cross_entropy, sigmoid_costs
from .._core.softmax import log1p_sum_exp
from .._core.terms import Criterion, logged
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "gumbel_samples",
    "list_mle_loss",
    "normalize_relevance",
    "poly1_softmax_ranking_loss",
    "regression_compatible_ranking_loss",
    "softmax_ranking_loss",
    "unique_softmax_ranking_loss",
]


@compiled("num_segments")
def softmax_ranking_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    segments: Integer[ArrayLike, "*lists items"] | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Softmax ranking loss: cross-entropy of the items of a list with their relevance, in nats.

    $$ \ell = -\sum_i y_i \log \frac{e^{s_i}}{\sum_j e^{s_j}} $$

    Relevance is taken as it is: `[2, 0, 1]` weighs three times what a distribution does. A list
    without relevance costs 0.

    Args:
        scores: One score for each item, `[..., L]`.
        relevance: How relevant each item is, from 0; same shape. No gradient.
        segments: Packed lists: which list of its row an item belongs to, integers `[..., L]`.
        num_segments: How many lists a row has room for.

    One unit per list, of packed lists `[..., num_segments]`; see `jaxloss.reduce`. A list without
    real items is no unit.

    Returns:
        A float32 scalar, or one value for each list if `reduction` is `"none"`.

    Reference:
        Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach (ListNet), ICML
        2007, with `softmax(relevance)` or `normalize_relevance(relevance)`; Bruch et al., An
        Analysis of the Softmax Cross Entropy Loss for Learning-to-Rank, ICTIR 2019. Equals
        `rax.softmax_loss` and `optax.losses.ranking_softmax_loss`; allRank's `listNet` adds 1e-10
        inside the logarithm.

    >>> softmax_ranking_loss(jnp.zeros((1, 3)), jnp.array([[2.0, 0.0, 1.0]]))  # 3 log 3
    Array(3.295837, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(scores, relevance, where, segments, num_segments)
    values = lists.sum(safe_mul(relevance, lists.neg_log_softmax(scores)))
    return reduce(values, where=lists.units(), weights=weights, reduction=reduction)


@compiled("num_segments")
def poly1_softmax_ranking_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    epsilon: Number = 1.0,
    segments: Integer[ArrayLike, "*lists items"] | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Softmax ranking loss with the first term of its polynomial expansion weighted anew, in nats.

    $$ \ell = -\sum_i y_i \log p_i + \epsilon \Big(1 - \frac{\sum_i y_i p_i}{\sum_i y_i}\Big),
       \quad p = \mathrm{softmax}(s) $$

    A list without relevance costs 0.

    Args:
        scores: One score for each item, `[..., L]`.
        relevance: How relevant each item is, from 0; same shape. No gradient.
        epsilon: Weight of the probability that misses the relevant items.
        segments: Packed lists: which list of its row an item belongs to, integers `[..., L]`.
        num_segments: How many lists a row has room for.

    One unit per list, of packed lists `[..., num_segments]`; see `jaxloss.reduce`. A list without
    real items is no unit.

    Returns:
        A float32 scalar, or one value for each list if `reduction` is `"none"`.

    Reference:
        Leng et al., PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions,
        ICLR 2022. Equals `rax.poly1_softmax_loss`, except for lists without relevance, which it
        takes as equally relevant in the second term.

    >>> scores, relevance = jnp.zeros((1, 4)), jnp.array([[1.0, 0.0, 0.0, 0.0]])
    >>> poly1_softmax_ranking_loss(scores, relevance)  # log 4 + 3/4
    Array(2.1362944, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(scores, relevance, where, segments, num_segments)
    (epsilon,) = numbers(scores, epsilon=epsilon)
    costs = lists.neg_log_softmax(scores)
    missed = safe_div(lists.sum(relevance * -expm1(-costs)), lists.sum(relevance))
    values = lists.sum(safe_mul(relevance, costs)) + epsilon * missed
    return reduce(values, where=lists.units(), weights=weights, reduction=reduction)


@compiled("num_segments", functions=("gain",))
def unique_softmax_ranking_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    gain: Callable[[Array], Array] | None = None,
    segments: Integer[ArrayLike, "*lists items"] | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Softmax of each item against only the less relevant ones of its list, in nats.

    $$ \ell = -\sum_i G(y_i) \log \frac{e^{s_i}}{e^{s_i} + \sum_{y_j < y_i} e^{s_j}} $$

    Memory: a few arrays `[..., L, L]`.

    Args:
        scores: One score for each item, `[..., L]`.
        relevance: How relevant each item is; same shape. No gradient.
        gain: The weight $G$ of a relevance; `2^y - 1` if None.
        segments: Packed lists: which list of its row an item belongs to, integers `[..., L]`.
        num_segments: How many lists a row has room for.

    One unit per list, of packed lists `[..., num_segments]`; see `jaxloss.reduce`. A list without
    real items is no unit.

    Returns:
        A float32 scalar, or one value for each list if `reduction` is `"none"`.

    Reference:
        Zhu and Klabjan, Listwise Learning to Rank by Exploring Unique Ratings, WSDM 2020. Equals
        `rax.unique_softmax_loss`.

    >>> scores, relevance = jnp.zeros((1, 3)), jnp.array([[1.0, 0.0, 1.0]])
    >>> unique_softmax_ranking_loss(scores, relevance)  # 2 log 2
    Array(1.3862944, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(scores, relevance, where, segments, num_segments)
    less = relevance[..., :, None] < relevance[..., None, :]  # j, i
    less &= lists.pairs(scores) & ~(scores == -jnp.inf)[..., :, None]
    apart = jnp.where(less, scores[..., :, None] - scores[..., None, :], -jnp.inf)
    costs = log1p_sum_exp(apart, axis=-2)
    values = lists.sum(safe_mul(gains(relevance, gain), costs))
    return reduce(values, where=lists.units(), weights=weights, reduction=reduction)


@compiled("num_segments", functions=("discount",))
def list_mle_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    key: ArrayLike | None = None,
    discount: Callable[[Array], Array] | None = None,
    segments: Integer[ArrayLike, "*lists items"] | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""ListMLE: negative log-likelihood of the order by relevance, in nats.

    $$ \ell = \sum_i D(i) \Big(\log \sum_{j \ge i} e^{s_{\pi(j)}} - s_{\pi(i)}\Big) $$

    with the order $\pi$ by decreasing relevance and weights $D = 1$ of the positions: one item
    after the other is drawn from the softmax of those that are left. Exact for scores any distance
    apart. Items with a score of `-inf` behind all others cost nothing.

    Args:
        scores: One score for each item, `[..., L]`.
        relevance: Only its order counts; same shape. No gradient.
        key: A key of `jax.random` that puts equally relevant items in a random order; draw a new
            one for each step. If None they keep the order they are given in.
        discount: The weight $D$ of each position, given as floats from 1; such as
            `lambda i: 2.0 ** -i` for position-aware ListMLE.
        segments: Packed lists: which list of its row an item belongs to, integers `[..., L]`.
        num_segments: How many lists a row has room for.

    One unit per list, of packed lists `[..., num_segments]`; see `jaxloss.reduce`. A list without
    real items is no unit.

    Returns:
        A float32 scalar, or one value for each list if `reduction` is `"none"`.

    Reference:
        Xia et al., Listwise Approach to Learning to Rank: Theory and Algorithm, ICML 2008; with
        `discount`: Lan et al., Position-Aware ListMLE, UAI 2014. Equals `rax.listmle_loss`; with a
        key another random order. allRank's `listMLE` adds 1e-10 inside the logarithm, which is
        wrong for scores more than 23 apart.

    >>> list_mle_loss(jnp.zeros((1, 3)), jnp.array([[2.0, 0.0, 1.0]]))  # log 3 + log 2 + log 1
    Array(1.7917595, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(scores, relevance, where, segments, num_segments)
    order = lists.order(relevance, None if key is None else jnp.asarray(key))
    (scores,), ordered = take_items(order, scores), lists.take(order)
    _, costs = sigmoid_costs(_others_ahead(scores, ordered))
    if discount is not None:
        costs = discount(ordered.places(scores).astype(costs.dtype)) * costs
    values = ordered.sum(costs)
    return reduce(values, where=lists.units(), weights=weights, reduction=reduction)


def _others_ahead(scores: Array, lists: Lists) -> Array:
    """How far the log-sum-exp of what follows in its list is above each score; -inf for the last.

    Exponentials are taken relative to the highest score that follows, so that no sum underflows.
    """
    linked = _linked(scores, lists)
    (shown,) = lists.hide(jax.lax.stop_gradient(scores), fill=-jnp.inf)
    top = _highest_behind(shown, linked)
    top = jnp.where(jnp.isfinite(top), top, 0)
    after = _ahead(top, 1, 0)
    shrink = jnp.where(linked, jnp.exp(jnp.minimum(after - top, 0)), 0)
    (powers,) = lists.hide(jnp.exp(scores - top))
    rest = jnp.where(linked, _ahead(_summed_behind(shrink, powers), 1, 0), 0)
    none = rest == 0
    return jnp.where(none, -jnp.inf, after - jnp.where(none, 0, scores) + safe_log(rest))


def _linked(like: Array, lists: Lists) -> Array:
    """Whether the item behind each one is real and of its list, of lists in order."""
    linked = place_of(like) < like.shape[-1] - 1
    if lists.where is not None:
        linked &= _ahead(lists.where, 1, False)
    if lists.segments is not None:
        linked &= _ahead(lists.segments, 1, -1) == lists.segments
    return linked


def _ahead(x: Array, steps: int | Array, fill: float) -> Array:
    """What is some steps further along the last axis, and `fill` beyond its end."""
    x = jnp.concatenate([x, jnp.full_like(x, fill)], axis=-1)
    return jax.lax.dynamic_slice_in_dim(x, steps, x.shape[-1] // 2, axis=x.ndim - 1)


def _doublings(like: Array) -> int:
    return max(like.shape[-1] - 1, 0).bit_length()


def _highest_behind(x: Array, linked: Array) -> Array:
    """Largest value from each item to the end of its list."""

    def double(i: int | Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        most, reach = state
        further = jnp.where(reach, _ahead(most, 1 << i, -jnp.inf), -jnp.inf)
        return jnp.maximum(most, further), reach & _ahead(reach, 1 << i, False)

    return jax.lax.fori_loop(0, _doublings(x), double, (x, linked))[0]


def _summed_behind(shrink: Array, amounts: Array) -> Array:
    """The y with `y[i] = amounts[i] + shrink[i] y[i + 1]`, in logarithmically many steps."""

    def solve(shrink: Array, amounts: Array) -> Array:
        def double(i: int | Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            factor, total = state
            total = total + factor * _ahead(total, 1 << i, 0)
            return factor * _ahead(factor, 1 << i, 0), total

        return jax.lax.fori_loop(0, _doublings(shrink), double, (shrink, amounts))[1]

    def forwards(_: object, amounts: Array) -> Array:
        flip = partial(jnp.flip, axis=-1)
        return flip(solve(_ahead(flip(shrink), 1, 0), flip(amounts)))

    return jax.lax.custom_linear_solve(
        lambda y: y - shrink * _ahead(y, 1, 0),
        amounts,
        lambda _, amounts: solve(shrink, amounts),
        forwards,
    )


@compiled("num_segments")
def regression_compatible_ranking_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    alpha: Number = 0.5,
    segments: Integer[ArrayLike, "*lists items"] | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Criterion:
    r"""Accurate probabilities and their order at once: cross-entropies of items and of the list.

    $$ \ell = \frac{1 - \alpha}{n} \sum_i \mathrm{BCE}(s_i, y_i) - \frac{\alpha}{\sum_i y_i}
       \sum_i y_i \log \frac{\sigma(s_i)}{\sum_j \sigma(s_j)} $$

    in nats, for logits $s$ and the $n$ items of a list. Both terms are least where every
    $\sigma(s_i) = y_i$, so that they do not pull apart. A list without relevance has the first
    only.

    Args:
        scores: One logit for each item, `[..., L]`.
        relevance: Its probability, in `[0, 1]`; same shape. No gradient. Outside of it the list is
            NaN.
        alpha: Share of the ranking term.
        segments: Packed lists: which list of its row an item belongs to, integers `[..., L]`.
        num_segments: How many lists a row has room for.

    One unit per list, of packed lists `[..., num_segments]`; see `jaxloss.reduce`. A list without
    real items is no unit.

    Returns:
        The total, and its terms `accuracy` and `ranking` before `alpha` and without a gradient, all
        reduced alike: float32 scalars, or one value for each list if `reduction` is `"none"`.

    Reference:
        Bai et al., Regression Compatible Listwise Objectives for Calibrated Ranking with Binary
        Relevance, CIKM 2023.

    >>> scores, relevance = jnp.zeros((1, 4)), jnp.array([[1.0, 0.0, 0.0, 0.0]])
    >>> _, terms = regression_compatible_ranking_loss(scores, relevance)
    >>> terms["accuracy"], terms["ranking"]  # log 2, log 4
    (Array(0.6931472, dtype=float32), Array(1.3862944, dtype=float32))
    """
    scores, relevance, lists = prepare_lists(scores, relevance, where, segments, num_segments)
    (alpha,) = numbers(scores, alpha=alpha)
    good = (relevance >= 0) & (relevance <= 1)
    require(lambda: good, "relevance", "values in [0, 1]", where)
    scores = poison(scores, good)
    costs, _ = sigmoid_costs(scores)
    entropy = lists.sum(binary_cross_entropy(scores, relevance))
    accuracy = safe_div(entropy, lists.sizes(scores))
    order = lists.sum(safe_mul(relevance, lists.neg_log_softmax(-costs)))
    ranking = safe_div(order, lists.sum(relevance))
    reduced = partial(reduce, where=lists.units(), weights=weights, reduction=reduction)
    terms = dict(accuracy=reduced(accuracy), ranking=reduced(ranking))
    values = dict(accuracy=(1 - alpha) * accuracy, ranking=alpha * ranking)
    parts = lambda: {name: reduced(part) for name, part in values.items()}
    return reduced(values["accuracy"] + values["ranking"]), logged(terms, parts)


@compiled("num_segments")
def normalize_relevance(
    relevance: Shaped[Array, "*lists items"],
    *,
    where: Where | None = None,
    segments: Integer[ArrayLike, "*lists items"] | None = None,
    num_segments: int | None = None,
) -> Float[Array, "*lists items"]:
    """Relevance over its sum in the list: a distribution for `softmax_ranking_loss`.

    Args:
        relevance: How relevant each item is, from 0, `[..., L]`.
        where: True for real items; the others get 0.
        segments: Packed lists: which list of its row an item belongs to, integers `[..., L]`.
        num_segments: How many lists a row has room for.

    Returns:
        Float32 of the shape of `relevance`; all 0 for a list without relevance, where
        `rax.utils.normalize_probabilities` makes all items equal.

    >>> normalize_relevance(jnp.array([2, 0, 2]))
    Array([0.5, 0. , 0.5], dtype=float32)
    """
    check_array(relevance=relevance)
    check_min_rank(1, relevance=relevance)
    lists = lists_of(relevance, where, segments, num_segments)
    (relevance,) = lists.hide(*widen(relevance))
    return safe_div(
        relevance, jnp.broadcast_to(lists.spread(lists.sum(relevance)), relevance.shape)
    )


@compiled("samples")
def gumbel_samples(
    scores: Float[Array, "*lists items"],
    *,
    key: ArrayLike,
    samples: int = 8,
    beta: Number = 1.0,
    where: Where | None = None,
) -> Float[Array, "samples *lists items"]:
    """Scores with Gumbel noise: lists as a softmax of the scores would draw them.

    The order of `scores + noise` is a draw from the Plackett-Luce model of the scores. Feed the
    samples, with relevance broadcast to their shape, to any ranking loss: its mean is the expected
    loss of such a stochastic ranking, smooth where the metric is not.

    Args:
        scores: One score for each item, `[..., L]`.
        key: A key of `jax.random`; draw a new one for each step.
        samples: How many times to draw.
        beta: Scale of the noise.
        where: True for real items; the others stay 0.

    Returns:
        Float32, `[samples, ..., L]`, with a gradient to `scores` and `beta`.

    Reference:
        Bruch et al., A Stochastic Treatment of Learning to Rank Scoring Functions, WSDM 2020. The
        samples of `rax.gumbel_t12n` with the same key.

    >>> gumbel_samples(jnp.array([1.0, 2.0]), key=jax.random.key(0), samples=3, beta=0.0)
    Array([[1., 2.],
           [1., 2.],
           [1., 2.]], dtype=float32)
    """
    if isinstance(samples, bool) or not isinstance(samples, (int, np.integer)):
        raise TypeError(message("samples", "an integer", repr(samples)))
    if samples < 1:
        raise ValueError(message("samples", "at least 1", samples))
    check_float(scores=scores)
    check_min_rank(1, scores=scores)
    lists = lists_of(scores, where)
    (scores,) = widen(scores)
    (beta,) = numbers(scores, beta=beta)
    noise = jax.random.gumbel(key, (int(samples), *scores.shape), scores.dtype)
    (scores,) = lists.hide(scores)
    (noise,) = (noise,) if lists.where is None else (jnp.where(lists.where[None], noise, 0),)
    return scores[None] + beta * noise


_LISTS = dict(scores=draw_normal("B L"), relevance=draw_labels("B L", classes="Y"))
_UNTIED = dict(scores=draw_normal("B L"), relevance=draw_uniform("B L", 0, 3, kind="fixed"))
_SHARES = dict(
    scores=draw_normal("B L"),
    relevance=Draw("B L", lambda g, shape, _: g.integers(0, 9, shape) / 8, "fixed"),
)
_SIZES = dict(L=6, Y=4)
_case = partial(Case, positions="B L", sizes=_SIZES)

CASES = (
    _case(softmax_ranking_loss, _LISTS),
    _case(poly1_softmax_ranking_loss, _LISTS, dict(epsilon=0.7)),
    _case(unique_softmax_ranking_loss, _LISTS),
    _case(list_mle_loss, _LISTS),
    _case(
        list_mle_loss,
        _UNTIED,
        dict(key=np.array([0, 7], np.uint32), discount=lambda place: 1 / place),
        label="position-aware",
    ),
    _case(regression_compatible_ranking_loss, _SHARES, dict(alpha=0.3)),
)
