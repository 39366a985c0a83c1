"""Pointwise ranking losses: every item of a list by itself, and pairs that are given as such."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, draw_binary, draw_labels, draw_normal, draw_signs
from .._core.checks import (
    check_float,
    check_integer,
    check_min_rank,
    check_same_shape,
    check_shape,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison
from .._core.numerics import numbers, widen
from .._core.reduce import mask, reduce
from .._core.sigmoid import binary_cross_entropy
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "margin_ranking_loss",
    "ordinal_loss",
    "pointwise_sigmoid_loss",
    "pointwise_squared_loss",
]


@compiled()
def pointwise_sigmoid_loss(
    scores: Float[Array, "*shape"],
    relevance: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Binary cross-entropy of each item's score, in nats, from 0 up.

    $$ \ell_i = -y_i \log \sigma(s_i) - (1 - y_i) \log(1 - \sigma(s_i)) $$

    with every digit of the tails, where $s_i$ is far from 0. Relevance outside `[0, 1]` makes its
    item NaN. Relevance is data and gets no gradient.

    Args:
        scores: Log-odds of being relevant, such as `[..., L]` for lists of L items.
        relevance: Same shape: 0 and 1, bools, or shares in `[0, 1]`; scale grades down yourself.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Nallapati, Discriminative models for information retrieval, SIGIR 2004. Equals
        `rax.pointwise_sigmoid_loss`, which clips relevance to `[0, 1]` and loses values below 1e-7,
        and `sigmoid_binary_cross_entropy` here.

    >>> pointwise_sigmoid_loss(jnp.array([0.0, 0.0]), jnp.array([1.0, 0.0]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    scores, relevance = _prepare(scores, relevance, where)
    ok = (relevance >= 0) & (relevance <= 1)
    require(lambda: ok, "relevance", "values in [0, 1]", where)
    values = binary_cross_entropy(poison(scores, ok), relevance)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def pointwise_squared_loss(
    scores: Float[Array, "*shape"],
    relevance: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared difference of each item's score and relevance, from 0 up, without a factor 1/2.

    $$ \ell_i = (s_i - y_i)^2 $$

    Relevance is data and gets no gradient.

    Args:
        scores: Predicted relevance, such as `[..., L]` for lists of L items.
        relevance: Same shape and unit as `scores`.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Cossock and Zhang, Subset Ranking Using Regression, COLT 2006. Equals
        `rax.pointwise_mse_loss`, and `squared_error` here.

    >>> pointwise_squared_loss(jnp.array([1.0, 3.0]), jnp.array([0, 2]))
    Array(1., dtype=float32)
    """
    scores, relevance = _prepare(scores, relevance, where)
    return reduce((scores - relevance) ** 2, where=where, weights=weights, reduction=reduction)


@compiled()
def ordinal_loss(
    scores: Float[Array, "*batch levels"],
    relevance: Integer[Array, "*batch"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Sum of the binary cross-entropies of "more relevant than k", in nats, from 0 up.

    $$ \ell_i = -\sum_{k=0}^{K-1} [y_i > k] \log \sigma(s_{ik})
       + [y_i \le k] \log(1 - \sigma(s_{ik})) $$

    for grades from 0 to K. A grade outside `[0, K]` makes its item NaN. The expected grade is the
    sum of $\sigma(s_{ik})$ over k.

    Args:
        scores: Log-odds of "grade above k" on the last axis, such as `[..., L, K]`.
        relevance: Integer grades without that axis.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Crammer and Singer, Pranking with Ranking, NIPS 2001; Niu et al., Ordinal Regression with
        Multiple Output CNN, CVPR 2016.

    >>> ordinal_loss(jnp.array([[0.0, 0.0]]), jnp.array([1]))  # 2 log 2
    Array(1.3862944, dtype=float32)
    """
    check_float(scores=scores)
    check_min_rank(1, scores=scores)
    check_integer(relevance=relevance)
    check_shape(jnp.shape(scores)[:-1], relevance=relevance)
    scores, relevance = mask(where, *widen(scores), jnp.asarray(relevance))
    levels = scores.shape[-1]
    ok = (relevance >= 0) & (relevance <= levels)
    require(lambda: ok, "relevance", f"values in [0, {levels}]", where)
    level = jnp.arange(levels).reshape((1,) * relevance.ndim + (levels,))
    above = relevance[..., None].astype(level.dtype) > level
    values = binary_cross_entropy(poison(scores, ok[..., None]), above.astype(scores.dtype))
    values = jnp.sum(values, axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def margin_ranking_loss(
    first: Float[Array, "*shape"],
    second: Float[Array, "*shape"],
    order: Shaped[Array, "*shape"],
    *,
    margin: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hinge on given pairs: how much the better score should still gain on the other, from 0.

    $$ \ell = \max(0, m - o\, (s_1 - s_2)) $$

    The gradient at the kink is 0. An order other than -1 and 1 makes its pair NaN.

    Args:
        first: Score of the first of each pair.
        second: Score of the second one, same shape.
        order: Same shape: 1 where the first should be higher, -1 where the second should.
        margin: By how much $m$ it should be higher, in the unit of the scores.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Herbrich, Graepel and Obermayer, Support vector learning for ordinal regression, ICANN 1999.
        Equals torch's `margin_ranking_loss`. Pairs of a list: `pairwise_hinge_loss`.

    >>> margin_ranking_loss(jnp.array([2.0, 2.0]), jnp.array([1.5, 1.5]), jnp.array([1, -1]))
    Array(0.25, dtype=float32)
    """
    check_float(first=first, second=second)
    check_same_shape(first=first, second=second, order=order)
    first, second, order = widen(first, second, jax.lax.stop_gradient(order))
    (margin,) = numbers(first, margin=margin)
    first, second = mask(where, first, second)
    (order,) = mask(where, order, fill=1)
    ok = jnp.abs(order) == 1
    require(lambda: ok, "order", "-1 or 1", where)
    values = poison(jax.nn.relu(margin - order * (first - second)), ok)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _prepare(scores: Array, relevance: Array, where: Where | None) -> tuple[Array, Array]:
    check_float(scores=scores)
    check_same_shape(scores=scores, relevance=relevance)
    scores, relevance = mask(where, *widen(scores, relevance))
    return scores, jax.lax.stop_gradient(relevance)


_GRADED = dict(scores=draw_normal("B L"), relevance=draw_labels("B L", classes="G"))

CASES = (
    Case(
        pointwise_sigmoid_loss,
        dict(scores=draw_normal("B L"), relevance=draw_binary("B L")),
        sizes=dict(L=5),
    ),
    Case(pointwise_squared_loss, _GRADED, sizes=dict(L=5, G=4)),
    Case(
        ordinal_loss,
        dict(scores=draw_normal("B L K"), relevance=draw_labels("B L", classes="G")),
        positions="B L",
        sizes=dict(L=3, K=3, G=4),
    ),
    Case(
        margin_ranking_loss,
        dict(first=draw_normal("B L"), second=draw_normal("B L"), order=draw_signs("B L")),
        dict(margin=0.3),
        sizes=dict(L=5),
    ),
)
