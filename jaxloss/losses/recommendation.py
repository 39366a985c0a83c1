"""Recommendation from implicit feedback: a chosen item against items that were not chosen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Integer

from .._core.case import Case, draw_labels, draw_normal
from .._core.checks import (
    check_float,
    check_integer,
    check_min_rank,
    check_same_shape,
    check_scalar,
    check_shape,
    check_where,
    message,
    naming,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison, valid
from .._core.numerics import numbers, safe_log, widen
from .._core.pairwise import gather_rows, similarities
from .._core.reduce import mask, reduce
from .._core.sharding import unshard
from .._core.sigmoid import sigmoid_costs
from .._core.softmax import log1p_sum_exp
from .._core.terms import Axis
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "adaptive_hinge_loss",
    "bpr_loss",
    "in_batch_log_q",
    "linear_sampled_softmax_loss",
    "sampled_softmax_loss",
    "warp_loss",
]


@compiled()
def bpr_loss(
    positive_scores: Float[Array, "*batch"],
    negative_scores: Float[Array, "*units"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Bayesian personalised ranking: cost of the wrong order of a pair of items, in nats.

    $$ \ell = -\log \sigma(s^+ - s^-) $$

    accurate however far the scores are apart. L2 on the factors of a model is a term of its own.

    Args:
        positive_scores: Scores of chosen items, `[...]`; or `[..., 1]`, with at least one axis
            before the last, to compare each with several negatives.
        negative_scores: Scores of items not chosen, `[...]` or `[..., K]`.

    One unit per negative score; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or the shape of `negative_scores` if `reduction` is `"none"`.

    Reference:
        Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, UAI 2009.
        RecBole's `BPRLoss` adds 1e-10 inside the logarithm, so that it ends at 23 and has no
        gradient there; spotlight's `bpr_loss` is `1 - sigmoid`, another loss.

    >>> bpr_loss(jnp.array([0.0, -50.0]), jnp.array([0.0, 0.0]), reduction="none")  # log 2, 50
    Array([ 0.6931472, 50.       ], dtype=float32)
    """
    check_float(positive_scores=positive_scores, negative_scores=negative_scores)
    positive, negative = widen(positive_scores, negative_scores)
    if positive.ndim > 1 and positive.shape[-1] == 1:
        check_shape((*positive.shape[:-1], *negative.shape[-1:]), negative_scores=negative)
        positive = jnp.broadcast_to(positive, negative.shape)
    check_same_shape(positive_scores=positive, negative_scores=negative)
    positive, negative = mask(where, positive, negative)
    values, _ = sigmoid_costs(positive - negative)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def adaptive_hinge_loss(
    positive_scores: Float[Array, "*batch"],
    negative_scores: Float[Array, "*batch k"],
    *,
    margin: Number = 1.0,
    negative_where: Bool[Array, "*batch k"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hinge on the highest of several negatives, from 0 up, in the unit of the scores.

    $$ \ell = \max(0, m + \max_k s^-_k - s^+) $$

    with gradient 0 at the kink; equally high negatives share theirs. Without a negative it is 0.

    Args:
        positive_scores: The score of a chosen item, `[...]`.
        negative_scores: Scores of sampled items, `[..., K]`.
        margin: How far $m$ the positive should be ahead.
        negative_where: Which negatives there are, of the shape of `negative_scores`.

    One unit per positive; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or the shape of `positive_scores` if `reduction` is `"none"`.

    Reference:
        Weston et al., WSABIE: Scaling Up to Large Vocabulary Image Annotation, IJCAI 2011, whose
        first violator is here the worst of a sample; as spotlight's `adaptive_hinge_loss`, 2017.

    >>> adaptive_hinge_loss(jnp.array([1.0]), jnp.array([[0.5, -2.0]]))  # 1 + 0.5 - 1
    Array(0.5, dtype=float32)
    """
    positive, hinges, (margin,) = _hinges(
        positive_scores, negative_scores, negative_where, where, margin=margin
    )
    highest = jnp.max(hinges, axis=-1, initial=-jnp.inf)
    values = jax.nn.relu(margin + highest - positive)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def warp_loss(
    positive_scores: Float[Array, "*batch"],
    negative_scores: Float[Array, "*batch k"],
    *,
    num_items: int | Integer[Array, ""],
    margin: Number = 1.0,
    negative_where: Bool[Array, "*batch k"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""WARP: hinge on the first negative that violates the margin, weighted by an estimated rank.

    $$ \ell = \log \max\left(1, \left\lfloor \frac{I - 1}{k} \right\rfloor\right)
       \max(0, m + s^-_k - s^+) $$

    from 0, where $k$ counts the negatives looked at until one has $s^-_k > s^+ - m$. The sooner one
    is found, the lower the positive must stand among $I$ items. The weight has no gradient. Without
    a violator it is 0.

    Args:
        positive_scores: The score of a chosen item, `[...]`.
        negative_scores: Scores of sampled items in the order of sampling, `[..., K]`.
        num_items: How many items $I$ there are to sample from.
        margin: How far $m$ the positive should be ahead.
        negative_where: Which negatives there are, of the shape of `negative_scores`; the others are
            not counted in $k$.

    One unit per positive; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or the shape of `positive_scores` if `reduction` is `"none"`.

    Reference:
        Weston et al., WSABIE: Scaling Up to Large Vocabulary Image Annotation, IJCAI 2011, with
        the logarithm of LightFM for the sum 1 + 1/2 + ... + 1/rank. LightFM samples until it finds
        a violator.

    >>> scores = jnp.array([2.0]), jnp.array([[0.0, 1.5, 9.0]])  # found at k = 2: log(10 // 2) / 2
    >>> warp_loss(*scores, num_items=11)
    Array(0.804719, dtype=float32)
    """
    check_integer(num_items=num_items)
    check_scalar(num_items=num_items)
    positive, negative, (margin,) = _hinges(
        positive_scores, negative_scores, negative_where, where, margin=margin
    )
    hinges = jax.nn.relu(margin + negative - positive[..., None])
    violates = ~(hinges <= 0)  # a NaN stays
    first = violates & (jnp.cumsum(violates, axis=-1, dtype=jnp.int32) == 1)
    there = jnp.ones_like(violates) if negative_where is None else jnp.asarray(negative_where)
    tried = jnp.cumsum(there, axis=-1, dtype=jnp.int32)
    others = jnp.asarray(num_items) - 1
    require(lambda: others >= 0, "num_items", "at least 1")
    k = jnp.maximum(jnp.sum(jnp.where(first, tried, 0), axis=-1), 1)
    rank = jnp.maximum(others.astype(k.dtype) // k, 1).astype(hinges.dtype)
    values = jnp.log(rank) * jnp.sum(jnp.where(first, hinges, 0), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _hinges(
    positive: Any, negative: Any, there: Any, where: Where | None, **options: Number
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Checked scores in float32 or wider, -inf for negatives there are not; and the options."""
    positive, negative = _scores(positive, negative, where)
    if there is not None:
        check_where(there, "negative_where")
        check_shape(negative.shape, negative_where=there)
        negative = jnp.where(there, negative, -jnp.inf)
    return positive, negative, numbers(positive, **options)


def _scores(positive: Any, negative: Any, where: Where | None) -> tuple[Array, Array]:
    check_float(positive_scores=positive, negative_scores=negative)
    check_min_rank(1, negative_scores=negative)
    check_shape((*jnp.shape(positive), jnp.shape(negative)[-1]), negative_scores=negative)
    positive, negative = mask(where, *widen(positive, negative))
    return positive, negative


@compiled()
def sampled_softmax_loss(
    positive_scores: Float[Array, "*batch"],
    negative_scores: Float[Array, "*batch k"],
    *,
    positive_log_q: Float[ArrayLike, "*batch"] | None = None,
    negative_log_q: Float[ArrayLike, " k"] | Float[ArrayLike, "*batch k"] | None = None,
    accidental_hits: Bool[Array, "*batch k"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy of the chosen item against a sample of all items, in nats.

    $$ \ell = -z^+ + \log \Big(e^{z^+} + \sum_{k \notin H} e^{z^-_k}\Big), \quad
       z = s - \log q $$

    where $q$ is how often the sampler is expected to draw an item: with it the gradient estimates
    that of the softmax over all items. It equals that softmax if the negatives are all other items
    and $\log q = 0$. Without a negative it is 0. Memory: one array of the size of the negatives.

    Args:
        positive_scores: The score of the chosen item, `[...]`.
        negative_scores: Scores of sampled items, `[..., K]`.
        positive_log_q: Logarithm of the expected count of the chosen item in the sample, of the
            shape of `positive_scores`.
        negative_log_q: The same of the sampled items, of the shape of `negative_scores`, or `(K,)`
            where all share one sample.
        accidental_hits: Which negatives $H$ are the chosen item itself, bool of the shape of
            `negative_scores`: they are left out.

    One unit per positive; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or the shape of `positive_scores` if `reduction` is `"none"`.

    Reference:
        Bengio and Senécal, Adaptive Importance Sampling to Accelerate Training of a Neural
        Probabilistic Language Model, IEEE TNN 2008; two towers: Yi et al., Sampling-Bias-Corrected
        Neural Modeling for Large Corpus Item Recommendations, RecSys 2019. As
        `tf.nn.sampled_softmax_loss`, whose sampler also tells the expected counts. With the other
        items of a batch as negatives and `in_batch_log_q` it is `info_nce(normalize=False)` of rows
        that have one more feature: the temperature in queries, `-log_q` in keys.

    >>> positive, negative = jnp.zeros(1), jnp.zeros((1, 3))
    >>> sampled_softmax_loss(positive, negative, negative_log_q=jnp.log(jnp.ones(3) / 5))  # log 16
    Array(2.7725887, dtype=float32)
    """
    positive, negative = _scores(positive_scores, negative_scores, where)
    values = _sampled(positive, negative, positive_log_q, negative_log_q, accidental_hits, where)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _sampled(
    positive: Array,
    negative: Array,
    positive_log_q: Any,
    negative_log_q: Any,
    hits: Array | None,
    where: Where | None,
) -> Array:
    """Cross-entropy of masked scores after both corrections, without the hits."""
    if positive_log_q is not None:
        check_float(positive_log_q=positive_log_q)
        check_shape(positive.shape, positive_log_q=positive_log_q)
        (log_q,) = mask(where, jnp.asarray(positive_log_q).astype(positive.dtype))
        positive = positive - log_q
    if negative_log_q is not None:
        check_float(negative_log_q=negative_log_q)
        shared = jnp.ndim(negative_log_q) == 1
        check_shape(
            negative.shape[-1:] if shared else negative.shape, negative_log_q=negative_log_q
        )
        log_q = jnp.asarray(negative_log_q).astype(negative.dtype)
        log_q = jnp.broadcast_to(log_q, negative.shape) if shared else mask(where, log_q)[0]
        negative = negative - log_q
    apart = negative - positive[..., None]
    if hits is not None:
        check_where(hits, "accidental_hits")
        check_shape(negative.shape, accidental_hits=hits)
        apart = jnp.where(hits, -jnp.inf, apart)
    return log1p_sum_exp(apart)


def in_batch_log_q(
    item_ids: Integer[Array, " n"], *, where: Where | None = None, axis_name: Axis = None
) -> Float[Array, " n"]:
    """Logarithm of how often the item of each row is in the batch, for `sampled_softmax_loss`.

    This is the expected count of an item as the batch itself estimates it. The items of other
    rows then count as often as there are different ones, however popular.

    Args:
        item_ids: The item of each row, `(n,)`.
        where: True keeps a row; a hidden one is not counted, and has -inf unless its item is.
        axis_name: Mapped axes over which the batch is split; all of it is counted.

    Returns:
        Float32, `(n,)`.

    Reference:
        Yi et al., Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations,
        RecSys 2019, who estimate it from the distance of an item's appearances in the stream.

    >>> in_batch_log_q(jnp.array([7, 3, 7]))  # log 2, log 1, log 2
    Array([0.6931472, 0.       , 0.6931472], dtype=float32)
    """
    with naming("in_batch_log_q"):
        check_integer(item_ids=item_ids)
        if jnp.ndim(item_ids) != 1:
            raise ValueError(message("item_ids", "one axis", f"shape {jnp.shape(item_ids)}"))
        kept = jnp.ones(jnp.shape(item_ids), bool) if where is None else where
        check_where(kept)
        check_shape(jnp.shape(item_ids), where=kept)
    own = jnp.asarray(item_ids)
    everyone, shown = gather_rows(axis_name, own, jnp.asarray(kept))
    assert everyone is not None
    assert shown is not None
    same = (own[:, None] == unshard(everyone)[None]) & unshard(shown)[None]
    return safe_log(jnp.sum(same, axis=1, dtype=jnp.float32))


@compiled()
def linear_sampled_softmax_loss(
    query: Float[Array, "n features"],
    item_embeddings: Float[Array, "items features"],
    positive_index: Integer[Array, " n"],
    negative_index: Integer[Array, " k"],
    *,
    positive_log_q: Float[ArrayLike, " n"] | None = None,
    negative_log_q: Float[ArrayLike, " k"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Sampled softmax of dot products with a table of items, of which only a few rows are read.

    $$ \ell = -z^+ + \log \Big(e^{z^+} + \sum_{k:\, j_k \ne i} e^{z_{j_k}}\Big), \quad
       z_j = q \cdot e_j - \log q_j $$

    in nats. It equals `sampled_softmax_loss` of the products. A sampled item that is the chosen one
    is left out for that row. Memory: `(n + k) features + n k` floats beside the gradient of the
    table. An index outside the table makes its row, for a sampled item all rows, NaN.

    Args:
        query: One row for each unit, `(n, features)`.
        item_embeddings: The table, `(items, features)`.
        positive_index: The chosen item $i$ of each row.
        negative_index: The sampled items $j_k$, shared by all rows, `(k,)`.
        positive_log_q: Logarithm of the expected count of each chosen item in the sample.
        negative_log_q: The same of the sampled items, `(k,)`.

    One unit per row of `query`; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Bengio and Senécal, Adaptive Importance Sampling to Accelerate Training of a Neural
        Probabilistic Language Model, IEEE TNN 2008. As `tf.nn.sampled_softmax_loss` without a bias.
        For a softmax over the whole table see `linear_cross_entropy`.

    >>> query, table = jnp.ones((1, 2)), jnp.zeros((9, 2))
    >>> linear_sampled_softmax_loss(query, table, jnp.array([4]), jnp.array([4, 0, 8]))  # log 3
    Array(1.0986123, dtype=float32)
    """
    check_float(query=query, item_embeddings=item_embeddings)
    for name, array in (("query", query), ("item_embeddings", item_embeddings)):
        if jnp.ndim(array) != 2:
            raise ValueError(message(name, "two axes", f"shape {jnp.shape(array)}"))
    (n, features), items = jnp.shape(query), jnp.shape(item_embeddings)[0]
    check_shape((items, features), item_embeddings=item_embeddings)
    check_integer(positive_index=positive_index, negative_index=negative_index)
    check_shape((n,), positive_index=positive_index)
    check_shape((jnp.size(negative_index),), negative_index=negative_index)
    kind = jnp.promote_types(jnp.result_type(positive_index), jnp.result_type(negative_index))
    kind = jnp.promote_types(kind, jnp.int32)
    chosen, sampled = (jnp.asarray(i).astype(kind) for i in (positive_index, negative_index))
    query, chosen = mask(where, *widen(query), chosen)
    for name, index, shown in (
        ("positive_index", chosen, where),
        ("negative_index", sampled, None),
    ):
        require(lambda i=index: valid(i, items), name, f"values in [0, {items})", shown)
    table = unshard(item_embeddings, 0)
    own, others = (_rows(table, i) for i in (chosen, sampled))
    positive = poison(jnp.sum(query * own, axis=1), valid(chosen, items))
    negative = poison(similarities(query, others), valid(sampled, items)[None])
    hits = chosen[:, None] == unshard(sampled)[None]
    values = _sampled(positive, negative, positive_log_q, negative_log_q, hits, where)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _rows(table: Array, index: Array) -> Array:
    """Rows of a table in float32 or wider, without a wide copy of the table."""
    (rows,) = widen(jnp.take(table, unshard(index), axis=0, mode="clip"))
    return rows


_ONE = dict(positive_scores=draw_normal("B"), negative_scores=draw_normal("B"))
_MANY = dict(positive_scores=draw_normal("B 1"), negative_scores=draw_normal("B K"))
_SAMPLED = dict(positive_scores=draw_normal("B"), negative_scores=draw_normal("B K"))
_TABLE = dict(
    query=draw_normal("B D"),
    item_embeddings=draw_normal("V D"),
    positive_index=draw_labels("B", classes="V"),
    negative_index=draw_labels("K", classes="V"),
)
_LOG_Q = np.log(np.array([0.3, 0.2, 0.5, 0.4], np.float32))
_SIZES = dict(K=4)

CASES = (
    Case(bpr_loss, _ONE),
    Case(bpr_loss, _MANY, label="several", positions="B K", sizes=_SIZES),
    Case(adaptive_hinge_loss, _SAMPLED, dict(margin=0.7), sizes=_SIZES),
    Case(warp_loss, _SAMPLED, dict(num_items=50, margin=0.7), sizes=_SIZES),
    Case(sampled_softmax_loss, _SAMPLED, sizes=_SIZES),
    Case(
        sampled_softmax_loss,
        _SAMPLED,
        dict(negative_log_q=_LOG_Q),
        label="corrected",
        sizes=_SIZES,
    ),
    Case(
        linear_sampled_softmax_loss,
        _TABLE,
        dict(negative_log_q=_LOG_Q),
        sizes=dict(K=4, V=7, D=4),
    ),
)
