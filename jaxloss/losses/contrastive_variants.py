"""Contrast without the positive in the denominator, of products of rows, and against clumping."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._core.case import Case, draw_normal
from .._core.checks import check_float, check_shape
from .._core.compiled import compiled
from .._core.contrast import (
    Side,
    Term,
    contrast,
    own_logits,
    prepare,
    softplus,
    towers,
)
from .._core.numerics import numbers, safe_div, safe_norm, unit_vectors, widen
from .._core.pairwise import gather_rows, own_index, similarities
from .._core.reduce import mask, reduce
from .._core.sharding import is_sharded, one_hot, unshard
from .._core.softmax import safe_log_sum_exp
from .._core.terms import Axis, add_up
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "decoupled_contrastive_loss",
    "koleo_loss",
    "n_pair_loss",
    "negative_mises_fisher_weights",
]

_OTHERS = (Term("log_sum_exp", "others", columns=True),)


@compiled("axis_name", functions=("weight_fn",))
def decoupled_contrastive_loss(
    query: Float[Array, "n features"],
    keys: Float[Array, "n features"],
    *,
    temperature: Number = 0.1,
    weight_fn: Callable[[Array], Array] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Decoupled contrastive loss: NT-Xent of two views without the positive below, in nats.

    $$ \ell_i = \frac{1}{2} \sum_{u \ne v} \Big(-w_i \frac{u_i \cdot v_i}{T} +
       \log \sum_{j \ne i} (e^{u_i \cdot v_j / T} + e^{u_i \cdot u_j / T})\Big) $$

    with both orders $u, v$ of queries and keys, rows of length 1. It has no lower bound of 0. A
    sample alone has no negatives and is no unit.

    Args:
        query: One view of each sample.
        keys: The other view, in the same order; the loss is symmetric.
        temperature: Divides the cosines; may be a learned array.
        weight_fn: From the cosine of each pair, `(n,)`, to the weight of its positive term, such as
            `negative_mises_fisher_weights`; 1 without one. It sees 0 for hidden samples.
        where: Bool array of the samples that count; a hidden one is no negative either.
        axis_name: Mapped axes over which the batch is split: the rows of all devices are gathered.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Yeh et al., Decoupled Contrastive Learning, ECCV 2022. Equals lightly's `DCLLoss`, whose
        weights are a function of both views.

    >>> eye = jnp.eye(2)
    >>> decoupled_contrastive_loss(eye, eye, temperature=1.0)  # log 2 - 1
    Array(-0.30685282, dtype=float32)
    """
    query, keys = map(unit_vectors, prepare(where, query=query, keys=keys))
    (temperature,) = numbers(query, temperature=temperature)
    meet = partial(_meet, 1 / temperature, where, axis_name)
    (of_query, of_keys), (_, own_query), (_, own_keys) = (
        meet(query, keys),
        meet(query, query),
        meet(keys, keys),
    )
    cosines = jnp.sum(query * keys, axis=1)
    attraction = cosines / temperature
    if weight_fn is not None:
        (factors,) = widen(weight_fn(cosines))
        check_shape(cosines.shape, weight_fn=factors)
        attraction = attraction * factors.astype(cosines.dtype)
    both = jnp.stack([jnp.stack([of_query, own_query]), jnp.stack([of_keys, own_keys])], axis=-1)
    negatives = safe_log_sum_exp(jnp.moveaxis(both, 0, -1))  # (n, 2)
    values = jnp.mean(negatives, axis=1) - attraction
    alone = negatives[:, 0] == -jnp.inf  # which hidden samples are too
    return reduce(values, where=~alone, weights=weights, reduction=reduction)


def _meet(
    scale: Array, where: Where | None, axis_name: Axis, rows: Array, keys: Array
) -> tuple[Array, Array]:
    """Log-sum-exps of the rows over other keys, and of the keys over other rows."""
    sides = towers(rows, keys, scale, normalize=False)
    (a,), (b,) = contrast(_OTHERS, *sides, shown=where, axis_name=axis_name)
    return a, b


@compiled("axis_name")
def negative_mises_fisher_weights(
    cosines: Float[Array, " n"],
    *,
    sigma: Number = 0.5,
    where: Where | None = None,
    axis_name: Axis = None,
) -> Array:
    r"""Weights of pairs for `decoupled_contrastive_loss`: less for those already close.

    $$ w_i = 2 - \frac{e^{s_i / \sigma}}{\frac{1}{n} \sum_j e^{s_j / \sigma}} $$

    Their mean is 1. The gradient goes through them.

    Args:
        cosines: Similarity of each pair.
        sigma: How fast the weight falls with the similarity.
        where: Bool array of the pairs that the mean is over.
        axis_name: Mapped axes over which the mean is taken.

    Returns:
        Float32 weights `(n,)`.

    Reference:
        Yeh et al., Decoupled Contrastive Learning, ECCV 2022. Equals lightly's function of this
        name.

    >>> negative_mises_fisher_weights(jnp.array([0.2, 0.2]))
    Array([1., 1.], dtype=float32)
    """
    check_float(cosines=cosines)
    check_shape((np.size(cosines),), cosines=cosines)
    (cosines,) = mask(where, *widen(cosines))
    (sigma,) = numbers(cosines, sigma=sigma)
    kept = jnp.ones(cosines.shape, bool) if where is None else jnp.asarray(where)
    s = jnp.where(kept, cosines / sigma, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(s, initial=-jnp.inf))
    largest = largest if axis_name is None else jax.lax.pmax(largest, axis_name)
    powers = jnp.exp(s - jnp.where(jnp.isfinite(largest), largest, 0))
    count, total = (add_up(jnp.sum(x, dtype=s.dtype), axis_name) for x in (kept, powers))
    return 2 - safe_div(count * powers, jnp.broadcast_to(total, s.shape))


@compiled("axis_name")
def n_pair_loss(
    query: Float[Array, "n features"],
    keys: Float[Array, "n features"],
    *,
    l2_weight: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""N-pair loss: cross-entropy of finding the own key of each query by products, in nats.

    $$ \ell_i = \log \Big(1 + \sum_{j \ne i} e^{q_i \cdot k_j - q_i \cdot k_i}\Big)
       + \tfrac{\lambda}{4} (|q_i|^2 + |k_i|^2) $$

    Rows are not normalised, which is why their size may be held down.

    Args:
        query: One row for each class or sample.
        keys: Row i is the positive of query i; the others are its negatives.
        l2_weight: $\lambda$, the cost of long rows.
        where: Bool array of the samples that count; a hidden one is no negative either.
        axis_name: Mapped axes over which the batch is split: the keys of all devices are gathered.

    One unit per query; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NIPS 2016.
        Equals pytorch-metric-learning's `NPairsLoss` with
        `distance=DotProductSimilarity(normalize_embeddings=False)` and one pair for each label.

    >>> eye = jnp.eye(2)
    >>> n_pair_loss(eye, eye)  # log(1 + 1 / e)
    Array(0.3132617, dtype=float32)
    """
    query, keys = prepare(where, query=query, keys=keys)
    (l2_weight,) = numbers(query, l2_weight=l2_weight)
    rows, mates = Side(query), Side(keys)
    (others,), _ = contrast(_OTHERS[:1], rows, mates, shown=where, axis_name=axis_name)
    size = jnp.sum(jnp.square(query) + jnp.square(keys), axis=1)
    values = softplus(others - own_logits(rows, mates)) + l2_weight / 4 * size
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis_name")
def koleo_loss(
    embeddings: Float[Array, "n features"],
    *,
    eps: Number = 1e-8,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""KoLeo regulariser: spreads rows over the sphere by the distance to the nearest, in nats.

    $$ \ell_i = -\log \Big(\min_{j \ne i} |x_i - x_j| + \epsilon\Big) $$

    of rows brought to length 1. Equal rows cost $-\log \epsilon$ and do not move.

    Args:
        embeddings: One row for each sample.
        eps: Added to the distance.
        where: Bool array of the samples that count; a hidden one is nobody's neighbour.
        axis_name: Mapped axes over which the batch is split: the rows of all devices are gathered.

    One unit per sample that is not alone; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Sablayrolles et al., Spreading vectors for similarity search, ICLR 2019. Equals the loss of
        that name in DINOv2 and lightly, which add `eps` once more inside the distance.

    >>> koleo_loss(jnp.array([[3.0, 0.0], [-2.0, 0.0]]))  # -log 2
    Array(-0.6931472, dtype=float32)
    """
    (x,) = map(unit_vectors, prepare(where, embeddings=embeddings))
    (eps,) = numbers(x, eps=eps)
    keys, *shown = (unshard(a, 0) for a in gather_rows(axis_name, x, where) if a is not None)
    other = own_index(x.shape[0], axis_name)[:, None] != own_index(keys.shape[0], None)[None]
    if where is not None:
        other &= shown[0][None] & where[:, None]
    near = jnp.where(other, jax.lax.stop_gradient(similarities(x, keys)), -jnp.inf)
    nearest = _rows_at(keys, jnp.argmax(near, axis=1)) if keys.shape[0] else x
    values = -jnp.log(safe_norm(x - nearest) + eps)
    units = jnp.any(other, axis=1)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _rows_at(table: Array, index: Array) -> Array:
    """`table[index]`; by a product where the index is split over an Explicit mesh."""
    if not is_sharded(index, 0):
        return jnp.take(table, index, axis=0)
    chosen = one_hot(index, table.shape[0]).astype(table.dtype)
    return jnp.matmul(chosen, table, precision=jax.lax.Precision.HIGHEST)


_PAIRS = dict(query=draw_normal("B D"), keys=draw_normal("B D"))
_LAWS = {
    "microbatches": "the negatives are those of the whole batch",
    "weight_two": "a sample seen twice is also a negative twice",
}
_coupled = partial(Case, coupled=True, without=_LAWS)

CASES = (
    _coupled(decoupled_contrastive_loss, _PAIRS, dict(temperature=0.4)),
    _coupled(n_pair_loss, _PAIRS, dict(l2_weight=0.3)),
    _coupled(koleo_loss, dict(embeddings=draw_normal("B D")), dict(eps=1e-3)),
)
