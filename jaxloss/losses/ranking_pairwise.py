"""Pairwise ranking losses: of two items of a list the more relevant one should score higher."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from .._core.case import Case, draw_labels, draw_normal
from .._core.checks import require
from .._core.compiled import compiled
from .._core.list_pairs import (
    SORTED_FROM,
    over_pairs,
    softplus,
    sorted_hinge,
    summed,
)
from .._core.lists import prepare_lists
from .._core.numerics import numbers
from .._core.reduce import reduce
from .._core.reductions import adds_up, of_sums
from .._core.sigmoid import sigmoid_costs
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "pairwise_hinge_loss",
    "pairwise_logistic_loss",
    "pairwise_quantile_loss",
    "pairwise_soft_zero_one_loss",
    "pairwise_squared_loss",
]

Segments = Integer[ArrayLike, "*lists items"]


@compiled("num_segments")
def pairwise_logistic_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Logistic loss of the pairs of a list (RankNet), in nats, from 0 up.

    $$ \ell_{ij} = \log\left(1 + e^{-(s_i - s_j)}\right) \quad \text{for } y_i > y_j $$

    The mean is over all pairs of the batch; `reduction=per_list_mean` averages each list first.
    `"mean"` and `"sum"` without `weights` need memory for a few arrays `[..., L]` only, also for
    the gradient; other reductions and `weights` make arrays `[..., L, L]`. Relevance is data and
    gets no gradient.

    Args:
        scores: Predicted scores `[..., L]`, one list along the last axis.
        relevance: Same shape: grades, of which only the order counts.
        segments: Which list of its row each item belongs to, integers `[..., L]`, where several are
            packed into a row; pairs stay within a list.
        num_segments: Number of lists in a row. If given, an item of no list makes the pairs of its
            row NaN.
        where: Bool array `[..., L]`; a hidden item is in no pair.
        weights: One for each pair, `[..., L, L]`, the more relevant item first.

    One unit per pair of a more relevant item i and another j; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `[..., L, L]` if `reduction` is `"none"`.

    Reference:
        Burges et al., Learning to rank using gradient descent, ICML 2005. Equals
        `rax.pairwise_logistic_loss`; its item weights w are `weights` of
        `broadcast_to(w[..., :, None], (..., L, L))` with the reduction `mean_over_count`.
        TF-Ranking divides by the sum of the weights.

    >>> scores, relevance = jnp.array([1.0, 1.0, 5.0]), jnp.array([1, 0, 0])
    >>> pairwise_logistic_loss(scores, relevance, where=jnp.array([True, True, False]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(
        scores, relevance, where, segments, num_segments, counted=False
    )
    return over_pairs(
        lambda gap, _: sigmoid_costs(-gap)[0],
        scores,
        relevance,
        lists,
        weights=weights,
        reduction=reduction,
        sums=lambda: summed(softplus, scores, relevance, lists),
    )


@compiled("num_segments")
def pairwise_hinge_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    margin: Number = 1.0,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hinge loss of the pairs of a list (ranking SVM): how much of the margin is missing, from 0.

    $$ \ell_{ij} = \max(0, m - (s_i - s_j)) \quad \text{for } y_i > y_j $$

    The gradient at the kink is 0. The mean is over all pairs of the batch. `"mean"` and `"sum"`
    without `weights` need memory for a few arrays `[..., L]` only and, for lists of 512 items or
    more, time in O(L log L) for any grades: by sorting, exactly. Other reductions and `weights`
    make arrays `[..., L, L]`. Relevance is data and gets no gradient.

    Args:
        scores: Predicted scores `[..., L]`, one list along the last axis.
        relevance: Same shape: grades, of which only the order counts.
        margin: By how much $m$ the more relevant item should be ahead, in the unit of the scores.
        segments: Which list of its row each item belongs to, integers `[..., L]`, where several are
            packed into a row; pairs stay within a list.
        num_segments: Number of lists in a row. If given, an item of no list makes the pairs of its
            row NaN.
        where: Bool array `[..., L]`; a hidden item is in no pair.
        weights: One for each pair, `[..., L, L]`, the more relevant item first.

    One unit per pair of a more relevant item i and another j; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `[..., L, L]` if `reduction` is `"none"`.

    Reference:
        Joachims, Optimizing search engines using clickthrough data, KDD 2002; the sums by counting
        are those of Joachims, Training linear SVMs in linear time, KDD 2006. Equals
        `rax.pairwise_hinge_loss`, whose margin is 1.

    >>> pairwise_hinge_loss(jnp.array([1.0, 2.0, 0.5]), jnp.array([2, 1, 1]))  # 2 and 0.5 missing
    Array(1.25, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(
        scores, relevance, where, segments, num_segments, counted=False
    )
    (margin,) = numbers(scores, margin=margin)
    long = scores.shape[-1] >= SORTED_FROM
    return over_pairs(
        lambda gap, _: jax.nn.relu(margin + gap),
        scores,
        relevance,
        lists,
        weights=weights,
        reduction=reduction,
        sums=(lambda: sorted_hinge(scores, relevance, lists, margin)) if long else None,
    )


@compiled("num_segments")
def pairwise_soft_zero_one_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Probability that a pair of a list is in the wrong order, in `[0, 1]`.

    $$ \ell_{ij} = 1 - \sigma(s_i - s_j) \quad \text{for } y_i > y_j $$

    A smooth count of wrong pairs: an outlier costs at most 1. The mean is over all pairs of the
    batch. `"mean"` and `"sum"` without `weights` need memory for a few arrays `[..., L]` only.
    Relevance is data and gets no gradient.

    Args:
        scores: Predicted scores `[..., L]`, one list along the last axis.
        relevance: Same shape: grades, of which only the order counts.
        segments: Which list of its row each item belongs to, integers `[..., L]`, where several are
            packed into a row; pairs stay within a list.
        num_segments: Number of lists in a row. If given, an item of no list makes the pairs of its
            row NaN.
        where: Bool array `[..., L]`; a hidden item is in no pair.
        weights: One for each pair, `[..., L, L]`, the more relevant item first.

    One unit per pair of a more relevant item i and another j; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `[..., L, L]` if `reduction` is `"none"`.

    Reference:
        Pasumarthi et al., TF-Ranking: Scalable TensorFlow Library for Learning-to-Rank, KDD 2019.
        Equals `rax.pairwise_soft_zero_one_loss`.

    >>> pairwise_soft_zero_one_loss(jnp.array([1.0, 1.0]), jnp.array([1, 0]))
    Array(0.5, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(
        scores, relevance, where, segments, num_segments, counted=False
    )
    return over_pairs(
        lambda gap, _: _sigmoid(gap),
        scores,
        relevance,
        lists,
        weights=weights,
        reduction=reduction,
    )


@compiled("num_segments")
def pairwise_squared_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared error of the difference of every two items of a list, from 0 up.

    $$ \ell_{ij} = ((s_i - s_j) - (y_i - y_j))^2 $$

    for all ordered pairs, those of equal relevance and of an item with itself among them: a squared
    error that a constant added to all scores of a list does not change. `"mean"` and `"sum"`
    without `weights`, and with `num_segments` of packed lists, take no array `[..., L, L]`.
    Relevance is data and gets no gradient.

    Args:
        scores: Predicted scores `[..., L]`, one list along the last axis.
        relevance: Same shape and unit as `scores`.
        segments: Which list of its row each item belongs to, integers `[..., L]`, where several are
            packed into a row; pairs stay within a list.
        num_segments: Number of lists in a row. If given, an item of no list makes the pairs of its
            row NaN.
        where: Bool array `[..., L]`; a hidden item is in no pair.
        weights: One for each pair, `[..., L, L]`.

    One unit per ordered pair of real items of one list; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `[..., L, L]` if `reduction` is `"none"`.

    Reference:
        Jagerman et al., Rax: Composable Learning-to-Rank using JAX, KDD 2022. Equals
        `rax.pairwise_mse_loss`.

    >>> pairwise_squared_loss(jnp.array([1.0, 3.0]), jnp.array([0, 1]))  # 0, 1, 1 and 0
    Array(0.5, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(
        scores, relevance, where, segments, num_segments, counted=False
    )
    (error,) = lists.hide(scores - relevance)
    numbered = lists.segments is None or lists.num_segments is not None
    if weights is None and adds_up(reduction) and numbered:
        sizes = lists.sum(jnp.ones_like(error))
        middle = lists.spread(lists.sum(error) / jnp.maximum(sizes, 1))
        total = jnp.sum(2 * sizes * lists.sum((error - middle) ** 2))
        return of_sums(total, jnp.sum(sizes**2), reduction)
    pairs = lists.pairs(error)
    values = jnp.where(pairs, error[..., :, None] - error[..., None, :], 0) ** 2
    return reduce(values, where=pairs, weights=weights, reduction=reduction)


@compiled("squared", "num_segments")
def pairwise_quantile_loss(
    scores: Float[Array, "*lists items"],
    relevance: Shaped[Array, "*lists items"],
    *,
    tau: Number = 0.5,
    squared: bool = False,
    segments: Segments | None = None,
    num_segments: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Pinball loss of the difference of the pairs of a list, from 0 up.

    $$ \ell_{ij} = \tau \max(0, e) + (1 - \tau) \max(0, -e), \quad
       e = (y_i - y_j) - (s_i - s_j) \quad \text{for } y_i > y_j $$

    The gradient at $e = 0$ is 0. The mean is over all pairs of the batch. `"mean"` and `"sum"`
    without `weights` need memory for a few arrays `[..., L]` only. Relevance is data and gets no
    gradient.

    Args:
        scores: Predicted scores `[..., L]`, one list along the last axis.
        relevance: Same shape and unit as `scores`.
        tau: Share $\tau$ of differences that should lie below the predicted one, in `[0, 1]`.
        squared: Whether to square both terms.
        segments: Which list of its row each item belongs to, integers `[..., L]`, where several are
            packed into a row; pairs stay within a list.
        num_segments: Number of lists in a row. If given, an item of no list makes the pairs of its
            row NaN.
        where: Bool array `[..., L]`; a hidden item is in no pair.
        weights: One for each pair, `[..., L, L]`, the more relevant item first.

    One unit per pair of a more relevant item i and another j; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `[..., L, L]` if `reduction` is `"none"`.

    Reference:
        Koenker and Bassett, Regression Quantiles, Econometrica 1978, of differences as in Jagerman
        et al., Rax, KDD 2022. Equals `rax.pairwise_qr_loss`.

    >>> scores, relevance = jnp.array([1.0, 0.0]), jnp.array([3, 0])
    >>> pairwise_quantile_loss(scores, relevance, tau=0.75)  # 2 too close
    Array(1.5, dtype=float32)
    """
    scores, relevance, lists = prepare_lists(
        scores, relevance, where, segments, num_segments, counted=False
    )
    (tau,) = numbers(scores, tau=tau)
    require(lambda: (tau >= 0) & (tau <= 1), "tau", "a value in [0, 1]")
    power = (lambda x: x**2) if squared else (lambda x: x)

    def cost(gap: Array, apart: Array) -> Array:
        error = apart + gap
        above, below = power(jax.nn.relu(error)), power(jax.nn.relu(-error))
        return tau * above + (1 - tau) * below

    return over_pairs(cost, scores, relevance, lists, weights=weights, reduction=reduction)


def _sigmoid(x: Array) -> Array:
    """The logistic function, with a derivative that does not cancel where it is almost 1."""
    positive = x > 0
    tail = jnp.exp(jnp.where(positive, -x, x))
    return jnp.where(positive, 1, tail) / (1 + tail)


_LISTS = dict(scores=draw_normal("B L"), relevance=draw_labels("B L", classes="G"))
_SIZES = dict(L=5, G=3)
_PAIRS = {"reducing": "most pairs are no units, which no array of units can show"}


def _case(loss: Callable[..., Array], label: str = "", **config: object) -> Case:
    without = {} if loss is pairwise_squared_loss else _PAIRS
    return Case(loss, _LISTS, config, label, positions="B L", sizes=_SIZES, without=without)


CASES = (
    _case(pairwise_logistic_loss),
    _case(pairwise_hinge_loss, margin=0.8),
    _case(pairwise_soft_zero_one_loss),
    _case(pairwise_squared_loss),
    _case(pairwise_quantile_loss, tau=0.3),
    _case(pairwise_quantile_loss, "squared", tau=0.3, squared=True),
)
