"""Losses of tokens from logits over a vocabulary, and their log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, Shaped

from .._core.case import Case, draw_labels, draw_normal, draw_probs
from .._core.checks import (
    check_float,
    check_integer,
    check_min_rank,
    check_shape,
    check_where,
    require,
)
from .._core.compiled import compiled
from .._core.labels import class_vectors, poison, prepare, valid
from .._core.lengths import fold_lengths
from .._core.numerics import numbers, safe_div, safe_mul, soft_capped, widen
from .._core.reduce import mask, reduce
from .._core.sharding import pick
from .._core.softmax import cross_entropy, log_sum_exp, top_and_others
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "dft_loss",
    "multi_token_prediction_loss",
    "previous_token_candidates",
    "sequence_cross_entropy",
    "sequence_log_probs",
    "soft_cap",
    "token_log_probs",
    "unlikelihood_loss",
    "z_loss",
]


@compiled()
def sequence_cross_entropy(
    logits: Float[Array, "*batch time vocabulary"],
    labels: Integer[Array, "*batch time"] | Shaped[Array, "*batch time vocabulary"],
    *,
    ignore_index: int | None = None,
    lengths: Integer[Array, "*batch"] | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    softcap: Number | None = None,
    class_weights: Float[ArrayLike, " vocabulary"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy of each token, in nats, from 0 up, for batches of unequal sequences.

    $$ \ell = \log Z - (1 - s)\, z'_y - \tfrac{s}{V} \sum_k z'_k + \lambda \log^2 Z, \quad
       Z = \sum_k \exp z'_k, \quad z' = c \tanh(z / c) $$

    for $V$ classes, label smoothing $s$, z-loss coefficient $\lambda$ and soft cap $c$ (without
    one, $z' = z$). Class weights scale the terms of their classes, not the z-loss. `labels[t]` is
    the target of `logits[t]`: shifting is the caller's. An integer label outside
    `[0, vocabulary)` makes its token NaN. With integer labels and any options, value and gradient
    need no second copy of float32 logits.

    Args:
        logits: Unnormalised log-probabilities `(*batch, time, vocabulary)`.
        labels: Integers `(*batch, time)`, or target probabilities of the shape of `logits`.
        ignore_index: Integer label whose tokens are left out, as by `where`.
        lengths: Number of tokens of each sequence; those beyond are left out.
        label_smoothing: Share of the target that is spread evenly over all classes.
        z_loss: Coefficient of the squared log-normaliser, such as 1e-4.
        softcap: Bound on the logits, applied first; logits of -inf are then at `-softcap`.
        class_weights: Scales the cost of each class; the mean still divides by the tokens. For a
            class that counts as often as its weight, pass `weights=class_weights[labels]`.

    One unit per token; see `jaxloss.reduce`, and `sequence_mean` and its relatives for other
    denominators.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        Smoothing by Szegedy et al., Rethinking the Inception Architecture, CVPR 2016; z-loss by
        Chowdhery et al., PaLM, JMLR 2023; soft cap by Gemma Team, Gemma 2, 2024. Equals torch's
        `cross_entropy`, whose mean of no tokens is NaN. T5X spreads the smoothing over the other
        classes and subtracts the entropy of the target: use `label_smoothing=s * V / (V - 1)`.

    >>> logits, labels = jnp.zeros((1, 3, 2)), jnp.array([[1, 0, 9]])
    >>> sequence_cross_entropy(logits, labels, ignore_index=9)  # log 2
    Array(0.6931472, dtype=float32)
    """
    where = _tokens(logits, where, lengths)
    logits, labels, where = prepare(
        logits, labels, where=where, ignore_index=ignore_index, wide=False
    )
    if class_weights is not None:
        (class_weights,) = class_vectors(logits, class_weights=class_weights)
    values = cross_entropy(
        logits,
        labels,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        z_loss=z_loss,
        softcap=softcap,
    )
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def z_loss(
    logits: Float[Array, "*batch vocabulary"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared logarithm of the softmax normaliser, from 0 up; keeps logits from drifting.

    $$ \ell = \log^2 \sum_k \exp z_k $$

    The coefficient, such as 1e-4, is the caller's. `sequence_cross_entropy` adds the same term in
    one pass over the logits.

    Args:
        logits: Unnormalised log-probabilities, classes last.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, JMLR 2023. The same as
        Liger's `lse_square_scale`, Levanter's `logsumexp_weight` and axlearn's `z_loss_scale`;
        where a trainer returns it as a second output, that one often has no gradient of its own.

    >>> z_loss(jnp.array([[1.0, -jnp.inf], [2.0, -jnp.inf]]))  # (1 + 4) / 2
    Array(2.5, dtype=float32)
    """
    check_float(logits=logits)
    check_min_rank(1, logits=logits)
    (logits,) = mask(where, logits)
    values = jnp.square(log_sum_exp(logits))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def soft_cap(logits: Float[Array, "*shape"], cap: Number) -> Float[Array, "*shape"]:
    r"""Logits bent smoothly into `(-cap, cap)`; not a loss.

    $$ z' = c \tanh(z / c) $$

    Cap first, then softmax and z-loss. The gradient keeps its digits where the cap is reached.

    Args:
        logits: Numbers of any size and shape.
        cap: Bound on the result, above 0.

    Returns:
        Float32 of the same shape.

    Reference:
        Gemma Team, Gemma 2: Improving Open Language Models at a Practical Size, 2024; there 30 for
        the head and 50 for attention.

    >>> soft_cap(jnp.array([0.0, 1e6]), 30.0)
    Array([ 0., 30.], dtype=float32)
    """
    check_float(logits=logits)
    (logits,) = widen(logits)
    (cap,) = numbers(logits, cap=cap)
    require(lambda: cap > 0, "cap", "a value above 0")
    return soft_capped(logits, cap)


@compiled()
def token_log_probs(
    logits: Float[Array, "*batch time vocabulary"],
    labels: Integer[Array, "*batch time"],
    *,
    ignore_index: int | None = None,
    softcap: Number | None = None,
    temperature: Number = 1.0,
    where: Where | None = None,
) -> Float[Array, "*batch time"]:
    r"""Log-probability of each token, in nats, from 0 down; not a loss.

    $$ \log p_y = z'_y - \log \sum_k \exp z'_k, \quad z' = c \tanh(z / c) / \tau $$

    Gathered before it is normalised: no log-softmax of the vocabulary is kept. Shifting is the
    caller's. An integer label outside `[0, vocabulary)` makes its token NaN.

    Args:
        logits: Unnormalised log-probabilities `(*batch, time, vocabulary)`.
        labels: Integers `(*batch, time)`.
        ignore_index: Label whose tokens get 0, as by `where`.
        softcap: Bound $c$ on the logits, applied first.
        temperature: Divides the logits.
        where: Bool array `(*batch, time)`; hidden tokens get 0.

    Returns:
        Float32 `(*batch, time)`.

    Reference:
        The `selective_log_softmax` of TRL, 2025, and `compute_logps` of tunix.

    >>> token_log_probs(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0]))  # log 1/4
    Array([-1.3862944], dtype=float32)
    """
    check_integer(labels=labels)
    _tokens(logits, where)
    logits, labels, where = prepare(
        logits, labels, where=where, ignore_index=ignore_index, wide=False
    )
    nll = cross_entropy(logits, labels, softcap=softcap, temperature=temperature)
    return -nll if where is None else jnp.where(where, -nll, 0)


@compiled("average")
def sequence_log_probs(
    logits: Float[Array, "*batch time vocabulary"],
    labels: Integer[Array, "*batch time"],
    *,
    ignore_index: int | None = None,
    average: bool = False,
    lengths: Integer[Array, "*batch"] | None = None,
    where: Where | None = None,
) -> Float[Array, "*batch"]:
    r"""Log-probability of each sequence, in nats, from 0 down; not a loss.

    $$ \log p = \sum_t \log \mathrm{softmax}(z_t)_{y_t} $$

    over the kept tokens, or their mean. A sequence without tokens has 0. Shifting is the caller's.

    Args:
        logits: Unnormalised log-probabilities `(*batch, time, vocabulary)`.
        labels: Integers `(*batch, time)`.
        ignore_index: Label whose tokens are left out, as by `where`.
        average: Divide by the number of kept tokens, as IPO, ORPO and SimPO ask for.
        lengths: Number of tokens of each sequence; those beyond are left out.
        where: Bool array `(*batch, time)` of the tokens that count, such as the completion.

    Returns:
        Float32 `*batch`.

    Reference:
        Rafailov et al., Direct Preference Optimization, NeurIPS 2023; the `get_batch_logps` of
        TRL, whose `average_log_prob` is `average`.

    >>> logits = jnp.log(jnp.array([[[0.25, 0.75], [0.5, 0.5]]]))
    >>> sequence_log_probs(logits, jnp.array([[0, 1]]))  # log 1/8
    Array([-2.0794415], dtype=float32)
    """
    check_integer(labels=labels)
    where = _tokens(logits, where, lengths)
    logits, labels, where = prepare(
        logits, labels, where=where, ignore_index=ignore_index, wide=False
    )
    nll = cross_entropy(logits, labels)
    kept = jnp.ones(nll.shape, bool) if where is None else where
    total = -jnp.sum(jnp.where(kept, nll, 0), axis=-1)
    return safe_div(total, jnp.sum(kept, axis=-1, dtype=nll.dtype)) if average else total


@compiled()
def dft_loss(
    logits: Float[Array, "*batch time vocabulary"],
    labels: Integer[Array, "*batch time"],
    *,
    ignore_index: int | None = None,
    lengths: Integer[Array, "*batch"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Dynamic fine-tuning: cross-entropy of each token times its probability, in `[0, 1/e]`.

    $$ \ell = -\mathrm{sg}(p_y) \log p_y $$

    The factor has no gradient (sg), so the gradient is that of cross-entropy, scaled down where the
    model finds the token unlikely. Shifting is the caller's. A label outside `[0, vocabulary)`
    makes its token NaN.

    Args:
        logits: Unnormalised log-probabilities `(*batch, time, vocabulary)`.
        labels: Integers `(*batch, time)`.
        ignore_index: Label whose tokens are left out, as by `where`.
        lengths: Number of tokens of each sequence; those beyond are left out.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        Wu et al., On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
        Rectification, 2025. The `dft` of TRL and `use_token_scaling` of Liger.

    >>> dft_loss(jnp.array([[0.0, 0.0]]), jnp.array([1]))  # log(2) / 2
    Array(0.3465736, dtype=float32)
    """
    check_integer(labels=labels)
    where = _tokens(logits, where, lengths)
    logits, labels, where = prepare(
        logits, labels, where=where, ignore_index=ignore_index, wide=False
    )
    nll = cross_entropy(logits, labels)
    values = safe_mul(jax.lax.stop_gradient(jnp.exp(-nll)), nll)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def multi_token_prediction_loss(
    logits: Float[Array, "*batch time heads vocabulary"],
    labels: Integer[Array, "*batch time"],
    *,
    ignore_index: int | None = None,
    lengths: Integer[Array, "*batch"] | None = None,
    segment_ids: Integer[Array, "*batch time"] | None = None,
    label_smoothing: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy of heads that each look one token further ahead, in nats, from 0 up.

    $$ \ell_{tk} = -\log \mathrm{softmax}(z_{tk})_{y_{t+k}} $$

    for head $k = 0, 1, \dots$; smoothed as in `sequence_cross_entropy`. A pair $(t, k)$ drops out
    where `t` or `t + k` is masked or `t + k` lies beyond the end. A label outside
    `[0, vocabulary)` makes the pairs that it is the target of NaN.

    Args:
        logits: Unnormalised log-probabilities `(*batch, time, heads, vocabulary)`.
        labels: Integers `(*batch, time)`, the targets of head 0.
        ignore_index: Label whose tokens are left out, as by `where`.
        lengths: Number of tokens of each sequence; those beyond are left out.
        segment_ids: In packed rows, which sequence each token belongs to; no head is scored
            against a token of another one.
        label_smoothing: Share of the target that is spread evenly over all classes.
        where: Bool array `(*batch, time)` of the tokens that count.

    One unit per token and head; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(*batch, time, heads)` if `reduction` is `"none"`.

    Reference:
        Gloeckle et al., Better & Faster Large Language Models via Multi-token Prediction, ICML
        2024. DeepSeek-V3 averages the means of the heads, times a factor: use `reduction="none"`.

    >>> logits = jnp.zeros((3, 2, 4))
    >>> multi_token_prediction_loss(logits, jnp.array([0, 1, 2]), reduction="sum")  # 5 log 4
    Array(6.931472, dtype=float32)
    """
    check_float(logits=logits)
    check_min_rank(3, logits=logits)
    check_integer(labels=labels)
    shape, heads = logits.shape[:-2], logits.shape[-2]
    check_shape(shape, labels=labels)
    labels, where = jnp.asarray(labels), fold_lengths(where, lengths, shape)
    kept = jnp.ones(shape, bool)
    if where is not None:
        check_where(where)
        check_shape(shape, where=where)
        kept &= jnp.asarray(where)
    target = jnp.stack([_ahead(labels, k) for k in range(heads)], axis=-1)  # (*batch, time, heads)
    both = jnp.stack([kept & _ahead(kept, k) for k in range(heads)], axis=-1)
    if segment_ids is not None:
        check_integer(segment_ids=segment_ids)
        check_shape(shape, segment_ids=segment_ids)
        ids = jnp.asarray(segment_ids)
        both &= jnp.stack([ids == _ahead(ids, k) for k in range(heads)], axis=-1)
    logits, target, both = prepare(
        logits, target, where=both, ignore_index=ignore_index, wide=False
    )
    values = cross_entropy(logits, target, label_smoothing=label_smoothing)
    return reduce(values, where=both, weights=weights, reduction=reduction)


@compiled()
def unlikelihood_loss(
    logits: Float[Array, "*batch time vocabulary"],
    negative_labels: Integer[Array, "*batch time candidates"],
    *,
    negative_where: Bool[Array, "*batch time candidates"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Unlikelihood of tokens that should not come, in nats, from 0 up.

    $$ \ell = -\sum_k \log(1 - p_{c_k}) $$

    for softmax probabilities $p$ and candidates $c_1, c_2, \dots$; one that is named twice counts
    twice. The complement comes from the other classes, so that value and gradient stay finite as
    $p \to 1$. A candidate outside `[0, vocabulary)` makes its token NaN.

    Args:
        logits: Unnormalised log-probabilities `(*batch, time, vocabulary)`.
        negative_labels: Integers `(*batch, time, candidates)`, such as those of
            `previous_token_candidates`.
        negative_where: Bool array of that shape: which candidates count; all if left out.
        where: Bool array `(*batch, time)` of the tokens that count.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        Welleck et al., Neural Text Generation with Unlikelihood Training, ICLR 2020. Add it to
        `sequence_cross_entropy`; fairseq clamps $1 - p$ at 1e-5.

    >>> unlikelihood_loss(jnp.zeros((1, 2)), jnp.array([[1]]))  # -log(1 - 1/2)
    Array(0.6931472, dtype=float32)
    """
    check_float(logits=logits)
    check_min_rank(2, logits=logits)
    check_integer(negative_labels=negative_labels)
    negative_labels = jnp.asarray(negative_labels)
    check_min_rank(1, negative_labels=negative_labels)
    shape = (*logits.shape[:-1], negative_labels.shape[-1])
    check_shape(shape, negative_labels=negative_labels)
    if negative_labels.dtype.itemsize < 4:
        negative_labels = negative_labels.astype(jnp.int32)
    if negative_where is not None:
        check_shape(shape, negative_where=negative_where)
        (negative_labels,) = mask(negative_where, negative_labels)
    logits, negative_labels = mask(where, *widen(logits), negative_labels)
    classes = logits.shape[-1]
    ok = valid(negative_labels, classes)
    require(lambda: ok, "negative_labels", f"values in [0, {classes})", where)
    values = _unlikelihoods(poison(logits, jnp.all(ok, axis=-1)[..., None]), negative_labels)
    if negative_where is not None:
        values = jnp.where(negative_where, values, 0)
    values = jnp.sum(values, axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def previous_token_candidates(
    labels: Integer[Array, "*batch time"],
    *,
    ignore_index: int | None = None,
    where: Where | None = None,
) -> tuple[Integer[Array, "*batch time time"], Bool[Array, "*batch time time"]]:
    """Earlier tokens of each position other than its own, each once, for `unlikelihood_loss`.

    Args:
        labels: Integers `(*batch, time)`.
        ignore_index: Label that is no candidate, as by `where`.
        where: Bool array `(*batch, time)` of the tokens that may be candidates.

    Returns:
        Candidates `(*batch, time, time)` and which of them count, of the same shape.

    Reference:
        Welleck et al., Neural Text Generation with Unlikelihood Training, ICLR 2020.

    >>> candidates, kept = previous_token_candidates(jnp.array([5, 5, 7]))
    >>> kept.astype(int)
    Array([[0, 0, 0],
           [0, 0, 0],
           [1, 0, 0]], dtype=int32)
    """
    check_integer(labels=labels)
    check_min_rank(1, labels=labels)
    labels = jnp.asarray(labels)
    kept = jnp.ones(labels.shape, bool)
    if where is not None:
        check_where(where)
        check_shape(labels.shape, where=where)
        kept = jnp.asarray(where)
    if ignore_index is not None:
        kept &= labels != jnp.asarray(ignore_index).astype(labels.dtype)
    time = jnp.arange(labels.shape[-1])
    earlier = time[:, None] > time
    same = labels[..., :, None] == labels[..., None, :]  # (*batch, time, time)
    seen = jnp.any(same & earlier & kept[..., None, :], axis=-1)
    counts = earlier & ~same & (kept & ~seen)[..., None, :]
    return jnp.where(counts, labels[..., None, :], 0), counts


def _tokens(logits: Array, where: Where | None, lengths: Array | None = None) -> Where | None:
    """Check that there is a time axis; `where` without what lies beyond the lengths."""
    check_float(logits=logits)
    check_min_rank(2, logits=logits)
    return fold_lengths(where, lengths, logits.shape[:-1])


def _ahead(x: Array, steps: int) -> Array:
    """The element `steps` later in time, and 0 or False beyond the end."""
    pad = jnp.zeros_like(x[..., : min(steps, x.shape[-1])])
    return jnp.concatenate([x[..., steps:], pad], axis=-1)


def _unlikelihoods(logits: Array, candidates: Array) -> Array:
    """-log(1 - p) of each candidate; for the likeliest class from the others, without a 1 - p."""
    top, largest, others = top_and_others(logits)
    above = jax.nn.softplus(others - largest)  # lse over the largest logit
    chosen = jax.vmap(pick, in_axes=(None, -1), out_axes=-1)(logits, candidates)
    is_top = candidates == top[..., None].astype(candidates.dtype)
    log_p = jnp.where(is_top, -jnp.inf, chosen) - (largest + above)[..., None]
    return jnp.where(is_top, (above + largest - others)[..., None], -jnp.log1p(-jnp.exp(log_p)))


_TOKENS = dict(logits=draw_normal("B T C", scale=2), labels=draw_labels("B T"))
_DENSE = dict(logits=draw_normal("B T C", scale=2), labels=draw_probs("B T C"))
_WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0], np.float32)
_IGNORED = {"reducing": "ignored units leave the denominator, which no array of units can show"}

CASES = (
    Case(sequence_cross_entropy, _TOKENS),
    Case(
        sequence_cross_entropy,
        _TOKENS,
        dict(label_smoothing=0.1, z_loss=0.01, softcap=5.0, class_weights=_WEIGHTS, ignore_index=2),
        label="all",
        without=_IGNORED,
    ),
    Case(
        sequence_cross_entropy,
        _DENSE,
        dict(label_smoothing=0.1, z_loss=0.01, softcap=5.0),
        label="dense",
    ),
    Case(
        sequence_cross_entropy, _TOKENS, dict(z_loss=0.01), sizes={"C": 1030, "T": 2}, label="many"
    ),
    Case(z_loss, dict(logits=draw_normal("B T C", scale=2))),
    Case(
        dft_loss,
        _TOKENS,
        without={"numerical": "the factor p has no gradient, so the slope is not the gradient"},
    ),
    Case(
        multi_token_prediction_loss,
        dict(logits=draw_normal("B T K C", scale=2), labels=draw_labels("B T")),
        dict(label_smoothing=0.1),
        positions="B T",
        sizes={"K": 3},
        without=_IGNORED,
    ),
    Case(
        unlikelihood_loss,
        dict(logits=draw_normal("B T C", scale=2), negative_labels=draw_labels("B T K")),
        sizes={"K": 2},
    ),
)
