"""Contrast of each sample with the others of the batch, on one device or many, whole or chunked."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Integer

from .._core.case import Case, draw_halves, draw_normal
from .._core.checks import check_float, check_shape, check_where, message
from .._core.compiled import compiled
from .._core.contrast import (
    Side,
    Term,
    contrast,
    own_logits,
    prepare,
    softplus,
    towers,
    unit_factor,
    weighted_softplus,
)
from .._core.numerics import numbers, safe_div, widen
from .._core.pairwise import check_labels
from .._core.reduce import mask, reduce, unit_weights
from .._core.reductions import adds_up, of_sums
from .._core.sharding import is_sharded
from .._core.softmax import safe_log_sum_exp
from .._core.terms import Axis
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["clip_loss", "info_nce", "nt_xent", "siglip_loss", "sup_con_loss"]


@compiled("normalize", "chunk_size", "axis_name")
def info_nce(
    query: Float[Array, "n features"],
    keys: Float[Array, "n features"],
    *,
    negative_keys: Float[ArrayLike, "k features"] | Float[ArrayLike, "n k features"] | None = None,
    negative_where: Bool[Array, " k"] | Bool[Array, "n k"] | None = None,
    temperature: Number = 0.1,
    normalize: bool = True,
    chunk_size: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""InfoNCE: cross-entropy of finding the own key of each query among negatives, in nats.

    $$ \ell_i = -\frac{s_{ii}}{T} + \log \Big(e^{s_{ii} / T} + \sum_{j \in N_i} e^{s_{ij} / T}\Big)
    $$

    with the cosines $s$ of queries and keys, or their products unless `normalize`. The negatives
    are the other keys, or only `negative_keys` where there are any. Without a negative it is 0.

    Args:
        query: One row for each sample.
        keys: Row i is the positive of query i.
        negative_keys: Negatives of all queries, `(k, features)`, or of each, `(n, k, features)`.
            They are not gathered over `axis_name`: each device passes those of its queries.
        negative_where: Which of these there are, such as the filled rows of `queue_read`; of the
            shape of `negative_keys` without the features.
        temperature: Divides the similarities; may be a learned array.
        normalize: Whether rows are brought to length 1; a zero row stays zero.
        chunk_size: How many keys to meet at a time, instead of all: temporaries of `n chunk_size`
            floats, not `n^2`, for the same value and gradient. Negatives of each query are met all
            at once.
        where: Bool array of the samples that count; a hidden one is no negative either.
        axis_name: Mapped axes over which the batch is split: the keys of all devices are met. They
            are gathered or, with `chunk_size`, go round in a ring, so that no device holds all.

    One unit per query; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018;
        with `negative_keys`: He et al., Momentum Contrast, CVPR 2020. The multiple negatives
        ranking loss (Henderson et al., 2017) has `temperature=0.05`. Equals torch's
        `cross_entropy(query @ keys.T / temperature, arange(n))` of unit rows.

    >>> eye = jnp.eye(2)
    >>> info_nce(eye, eye, temperature=1.0)  # log(e + 1) - 1
    Array(0.3132617, dtype=float32)
    """
    negatives: list[Any] = []
    if negative_keys is not None:
        check_float(negative_keys=negative_keys)
        negatives.append(negative_keys)
        if negative_where is not None:
            check_where(negative_where, "negative_where")
            check_shape(jnp.shape(negative_keys)[:-1], negative_where=negative_where)
    elif negative_where is not None:
        raise ValueError(message("negative_where", "None without negative_keys", "a mask"))
    inputs = prepare(where, query=query, keys=keys)
    query, keys, *negatives = widen(*inputs, *negatives)
    (temperature,) = numbers(query, temperature=temperature)
    rows, mates = towers(query, keys, 1 / temperature, normalize=normalize)
    options: Any = dict(shown=where, chunk_size=chunk_size, axis_name=axis_name)
    if not negatives:
        (others,), _ = contrast((Term("log_sum_exp", "others"),), rows, mates, **options)
    elif negatives[0].ndim == 3:
        others = _of_each(rows, negatives[0], normalize, where, negative_where)
    else:
        (n,) = negatives
        check_shape((*n.shape[:1], query.shape[1]), negative_keys=n)
        (n,) = mask(negative_where, n)
        met = Side(n, unit_factor(n) if normalize else None)
        terms = (Term("log_sum_exp", "all"),)
        (others,), _ = contrast(terms, rows, met, known=negative_where, **options)
    values = softplus(others - own_logits(rows, mates))
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _of_each(rows: Side, keys: Array, normalize: bool, where: Where | None, known: Any) -> Array:
    """Log-sum-exp of the logits of each row with keys of its own, without a copy of these."""
    n, features = rows.vectors.shape
    check_shape((n, *keys.shape[1:2], features), negative_keys=keys)
    (keys,) = mask(known, *mask(where, keys))
    z = jnp.einsum("nd,nkd->nk", rows.vectors, keys, precision=jax.lax.Precision.HIGHEST)
    (z,) = mask(known, z * unit_factor(keys) if normalize else z, fill=-jnp.inf)
    return safe_log_sum_exp(z)


@compiled("chunk_size", "axis_name")
def nt_xent(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    temperature: Number = 0.07,
    chunk_size: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""NT-Xent: cross-entropy of each positive of a sample among its negatives, in nats.

    $$ \ell_i = \frac{1}{|P_i|} \sum_{p \in P_i} -\log
       \frac{e^{s_{ip} / T}}{e^{s_{ip} / T} + \sum_{j \in N_i} e^{s_{ij} / T}} $$

    with the cosines $s$; positives $P_i$ have the label of $i$, negatives $N_i$ another one, and
    other positives are in no denominator. For two views of each sample in one batch, `labels` is
    `concatenate([arange(n), arange(n)])`. Temporaries for 1024 rows: below 30 MiB.

    Args:
        embeddings: One row for each sample or view.
        labels: Rows of one label are positives of one another.
        temperature: Divides the cosines; may be a learned array.
        chunk_size: How many rows to be compared with at a time, instead of all: temporaries of
            `n chunk_size` floats, not `n^2`, for the same value and gradient.
        where: Bool array of the samples that count; a hidden one is nobody's positive or negative.
        axis_name: Mapped axes over which the batch is split: the rows of all devices are compared.
            They are gathered or, with `chunk_size`, go round in a ring, so that no device holds
            all.

    One unit per sample that has a positive; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`, with 0 for a sample without one.

    Reference:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML
        2020. `optax.losses.ntxent` and pytorch-metric-learning's `NTXentLoss` average over pairs:
        the same where classes have one size, else `weights=positives`, their number for each
        sample. Optax is NaN without any positive, and compares in `n x n x features` floats.

    >>> views = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> nt_xent(views, jnp.array([0, 1, 0, 1]), temperature=1.0)  # log(e + 2) - 1
    Array(0.5514447, dtype=float32)
    """
    rows, mates = _self(embeddings, labels, temperature, where)
    terms = (
        Term("log_sum_exp", "negatives"),
        Term("below", "positives"),
        Term("count", "positives"),
    )
    options: Any = dict(labels=labels, shown=where, chunk_size=chunk_size, axis_name=axis_name)
    (_, count, costs), _ = contrast(terms, rows, mates, **options)
    values = safe_div(costs, count)
    return reduce(values, where=count > 0, weights=weights, reduction=reduction)


@compiled("chunk_size", "axis_name")
def sup_con_loss(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    temperature: Number = 0.1,
    chunk_size: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Supervised contrastive loss: mean cross-entropy of a sample's positives, in nats.

    $$ \ell_i = -\frac{1}{|P_i|} \sum_{p \in P_i} \log
       \frac{e^{s_{ip} / T}}{\sum_{a \ne i} e^{s_{ia} / T}} $$

    with the cosines $s$; positives $P_i$ have the label of $i$, and the denominator holds all other
    samples, positives too, so it is at least $\log |P_i|$.

    Args:
        embeddings: One row for each sample or view.
        labels: Rows of one label are positives of one another.
        temperature: Divides the cosines; may be a learned array.
        chunk_size: How many rows to be compared with at a time, instead of all: temporaries of
            `n chunk_size` floats, not `n^2`, for the same value and gradient.
        where: Bool array of the samples that count; a hidden one is in no sum.
        axis_name: Mapped axes over which the batch is split: the rows of all devices are compared.
            They are gathered or, with `chunk_size`, go round in a ring, so that no device holds
            all.

    One unit per sample that has a positive; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`, with 0 for a sample without one.

    Reference:
        Khosla et al., Supervised Contrastive Learning, NeurIPS 2020: the form with the sum outside
        of the logarithm. The authors' code multiplies by `temperature / 0.07`. Equals
        pytorch-metric-learning's `SupConLoss` where all samples have a positive; that one returns 0
        for a batch of one class.

    >>> views = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> sup_con_loss(views, jnp.array([0, 1, 0, 1]), temperature=1.0)  # log(e + 2) - 1
    Array(0.5514447, dtype=float32)
    """
    rows, mates = _self(embeddings, labels, temperature, where)
    terms = (
        Term("log_sum_exp", "negatives"),
        Term("log_sum_exp", "positives"),
        Term("value", "positives"),
        Term("count", "positives"),
    )
    options: Any = dict(labels=labels, shown=where, chunk_size=chunk_size, axis_name=axis_name)
    (negatives, positives, total, count), _ = contrast(terms, rows, mates, **options)
    # A single positive cancels: its log-sum-exp is its logit.
    positives = jnp.where(count > 0, positives, 0)
    values = softplus(negatives - positives) + (positives - safe_div(total, count))
    return reduce(values, where=count > 0, weights=weights, reduction=reduction)


def _self(
    embeddings: Array, labels: Array, temperature: Number, where: Where | None
) -> tuple[Side, Side]:
    (embeddings,) = prepare(where, embeddings=embeddings)
    check_labels(embeddings.shape[0], labels, where)
    (temperature,) = numbers(embeddings, temperature=temperature)
    return towers(embeddings, embeddings, 1 / temperature, normalize=True)


@compiled("normalize", "chunk_size", "axis_name")
def clip_loss(
    query: Float[Array, "n features"],
    keys: Float[Array, "n features"],
    *,
    logit_scale: Number = 14.285714,
    logit_bias: Number = 0.0,
    normalize: bool = True,
    chunk_size: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""CLIP: mean of the cross-entropies of finding each other's partner, both ways, in nats.

    $$ \ell_i = \frac{1}{2} \Big(\log \sum_j e^{z_{ij}} + \log \sum_j e^{z_{ji}}\Big) - z_{ii},
       \quad z_{ij} = a\, s_{ij} + b $$

    with the cosines $s$ of queries (images) and keys (texts), or their products unless `normalize`.
    The same if both change places. Temporaries for 8192 pairs of 512 features, value and gradient:
    below 64 MiB with `chunk_size=256`, of which 48 MiB are three copies of the queries; without it,
    three arrays of 256 MiB.

    Args:
        query: One row for each pair.
        keys: The partners, in the same order.
        logit_scale: $a$, the inverse temperature. Usually the exponential of a learned number; a
            bound on it, such as 100, is the caller's.
        logit_bias: $b$, which cancels: accepted so that models with one can pass it.
        normalize: Whether rows are brought to length 1; a zero row stays zero.
        chunk_size: How many keys to meet at a time, instead of all: temporaries of `n chunk_size`
            floats, not `n^2`, for the same value and gradient.
        where: Bool array of the pairs that count; a hidden one is no negative either.
        axis_name: Mapped axes over which the batch is split: the rows of all devices are met. They
            are gathered or, with `chunk_size`, go round in a ring, so that no device holds all.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML
        2021. Equals open_clip's `ClipLoss`; over devices, that with `gather_with_grad=True`.

    >>> eye = jnp.eye(2)
    >>> clip_loss(eye, eye, logit_scale=1.0)  # log(e + 1) - 1
    Array(0.3132617, dtype=float32)
    """
    query, keys = prepare(where, query=query, keys=keys)
    scale, _ = numbers(query, logit_scale=logit_scale, logit_bias=logit_bias)
    rows, mates = towers(query, keys, scale, normalize=normalize)
    options: Any = dict(shown=where, chunk_size=chunk_size, axis_name=axis_name)
    terms = (Term("log_sum_exp", "others", columns=True),)
    (of_rows,), (of_keys,) = contrast(terms, rows, mates, **options)
    own = own_logits(rows, mates)
    values = 0.5 * (softplus(of_rows - own) + softplus(of_keys - own))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("normalize", "chunk_size", "axis_name")
def siglip_loss(
    query: Float[Array, "n features"],
    keys: Float[Array, "n features"],
    *,
    logit_scale: Number = 10.0,
    logit_bias: Number = -10.0,
    normalize: bool = True,
    chunk_size: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""SigLIP: binary cross-entropies of every query with every key, in nats per query.

    $$ \ell_i = -\log \sigma(z_{ii}) - \sum_{j \ne i} \log \sigma(-z_{ij}), \quad
       z_{ij} = a\, s_{ij} + b $$

    with the cosines $s$ of queries (images) and keys (texts), or their products unless `normalize`.
    A query costs the sum over all keys: the mean divides by `n`, not `n^2`. Temporaries for 8192
    pairs of 512 features, value and gradient: below 64 MiB with `chunk_size=256`, of which 48 MiB
    are three copies of the queries; without it, three arrays of 256 MiB.

    Args:
        query: One row for each pair.
        keys: The partners, in the same order.
        logit_scale: $a$, usually the exponential of a learned number.
        logit_bias: $b$, usually learned.
        normalize: Whether rows are brought to length 1; a zero row stays zero.
        chunk_size: How many keys to meet at a time, instead of all: temporaries of `n chunk_size`
            floats, not `n^2`, for the same value and gradient.
        where: Bool array of the pairs that count; a hidden one is no negative either.
        axis_name: Mapped axes over which the batch is split: the keys of all devices are met. They
            are gathered or, with `chunk_size`, go round in a ring, so that no device holds all.

    One unit per query; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023. Equals open_clip's
        `SigLipLoss`.

    >>> eye = jnp.eye(2)
    >>> siglip_loss(eye, eye, logit_scale=0.0, logit_bias=0.0)  # 2 log 2
    Array(1.3862944, dtype=float32)
    """
    query, keys = prepare(where, query=query, keys=keys)
    scale, bias = numbers(query, logit_scale=logit_scale, logit_bias=logit_bias)
    rows, mates = towers(query, keys, scale, normalize=normalize)
    rows = rows._replace(bias=jnp.broadcast_to(bias, query.shape[:1]))
    own = softplus(-own_logits(rows, mates))
    one_device = axis_name is None and not is_sharded(query, 0)
    if chunk_size is not None and one_device and adds_up(reduction):
        counts = unit_weights(own, where, weights)
        fixed: Any = dict(shown=where, chunk_size=chunk_size)
        total = weighted_softplus(counts, rows, mates, **fixed) + jnp.sum(counts * own)
        return of_sums(total, jnp.sum(counts), reduction)
    options: Any = dict(shown=where, chunk_size=chunk_size, axis_name=axis_name)
    (others,), _ = contrast((Term("softplus", "others"),), rows, mates, **options)
    return reduce(own + others, where=where, weights=weights, reduction=reduction)


_PAIRS = dict(query=draw_normal("B D"), keys=draw_normal("B D"))
# Two classes, of which each mask of the laws leaves two samples or none: all have positives.
_LABELLED = dict(embeddings=draw_normal("B D"), labels=draw_halves("B"))
_QUEUE = np.random.default_rng(5).standard_normal((5, 6), np.float32)
_LAWS = {
    "microbatches": "the negatives are those of the whole batch",
    "weight_two": "a sample seen twice is also a negative twice",
}
_coupled = partial(Case, coupled=True, without=_LAWS)

CASES = (
    _coupled(info_nce, _PAIRS, dict(temperature=0.4)),
    Case(info_nce, _PAIRS, dict(temperature=0.6, negative_keys=_QUEUE), label="queue"),
    _coupled(nt_xent, _LABELLED, dict(temperature=0.4)),
    _coupled(sup_con_loss, _LABELLED, dict(temperature=0.4)),
    _coupled(clip_loss, _PAIRS, dict(logit_scale=3.0)),
    _coupled(clip_loss, _PAIRS, dict(logit_scale=3.0, chunk_size=3), label="chunked"),
    _coupled(siglip_loss, _PAIRS, dict(logit_scale=3.0, logit_bias=-2.0)),
    _coupled(
        siglip_loss, _PAIRS, dict(logit_scale=3.0, logit_bias=-2.0, chunk_size=3), label="chunked"
    ),
)
