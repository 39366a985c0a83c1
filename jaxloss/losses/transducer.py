"""Transducers: labels emitted between frames, with a score for every pair of frame and label."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from .._core.case import Case, draw_labels, draw_normal, draw_uniform
from .._core.checks import check_float, check_integer, check_shape, message, require
from .._core.compiled import compiled, uncompiled
from .._core.labels import poison, valid
from .._core.lattice import (
    IMPOSSIBLE,
    LOG_ZERO,
    check_blank,
    check_rank,
    counts,
    kept,
    kept_first,
    merge,
    skew,
    split,
    unskew,
)
from .._core.numerics import expm1, numbers, widen
from .._core.reduce import mask, reduce
from .._core.sharding import pick
from .._core.softmax import neg_log_softmax
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "delay_penalized",
    "hat_log_probs",
    "rnnt_loss",
    "rnnt_loss_chunked",
    "rnnt_loss_from_log_probs",
]


@compiled()
def rnnt_loss_from_log_probs(
    blank_log_probs: Float[Array, "batch time nodes"],
    label_log_probs: Float[Array, "batch time labels"],
    *,
    fastemit_lambda: Number = 0.0,
    label_where: Where | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Transducer (RNN-T) loss from log-probabilities of the arcs, in nats per sequence.

    $$ \alpha_{t,u} = \log\left( e^{\alpha_{t-1,u} + b_{t-1,u}} + e^{\alpha_{t,u-1} + l_{t,u-1}}
    \right), \qquad \ell = -(\alpha_{T-1,U} + b_{T-1,U}) $$

    A blank, $b$, goes on to the next frame, a label, $l$, to the next label. Where no path exists
    the loss is infinite with gradient 0. Besides arrays and gradients it keeps a few lattices of
    `batch x (time + labels) x nodes` floats. All derivatives exist, forward and reverse.

    Args:
        blank_log_probs: At each frame after u labels the log-probability of no further label;
            one node more than there are labels.
        label_log_probs: At each frame after u labels the log-probability of label u + 1.
        fastemit_lambda: FastEmit: the gradient of the labels, not the value, times 1 + lambda.
        label_where: Mask of the labels, `(batch, labels)`. A hidden label is skipped, together
            with the node behind it.
        where: Mask of the frames, `(batch, time)`; a hidden frame is skipped.

    One unit per sequence with a kept frame; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Graves, Sequence Transduction with Recurrent Neural Networks, ICML workshop 2012; Yu et
        al., FastEmit, ICASSP 2021.

    One frame and one label: the label, then a blank.

    >>> blank, label = jnp.log(jnp.array([[[0.5, 0.25]]])), jnp.log(jnp.array([[[0.5]]]))
    >>> jnp.exp(-rnnt_loss_from_log_probs(blank, label))  # 0.5 * 0.25
    Array(0.125, dtype=float32)
    """
    check_float(blank_log_probs=blank_log_probs, label_log_probs=label_log_probs)
    check_rank("(batch, time, nodes)", blank_log_probs=blank_log_probs)
    batch, time, nodes = blank_log_probs.shape
    check_shape((batch, time, nodes - 1), label_log_probs=label_log_probs)
    where = kept((batch, time), where=where)
    label_where = kept((batch, nodes - 1), label_where=label_where)
    blank, label = mask(where, *widen(blank_log_probs, label_log_probs))
    count = counts(label_where, jnp.sum(label, axis=1))
    order = None if label_where is None else kept_first(label_where)
    label = _in_order(label, order)
    label = jnp.concatenate([label, jnp.full_like(blank[:, :, :1], -jnp.inf)], axis=2)
    (fastemit,) = numbers(blank, fastemit_lambda=fastemit_lambda)
    values = _arcs_loss(_in_order(blank, _nodes(order)), label, fastemit, count, where)
    return reduce(values, where=_exists(where), weights=weights, reduction=reduction)


@compiled("blank_id")
def rnnt_loss(
    logits: Float[Array, "batch time nodes classes"],
    labels: Integer[Array, "batch labels"],
    *,
    blank_id: int = 0,
    fastemit_lambda: Number = 0.0,
    lengths: Integer[Array, " batch"] | None = None,
    label_lengths: Integer[Array, " batch"] | None = None,
    label_where: Where | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Transducer (RNN-T) loss, in nats per sequence, from 0 up.

    $$ \ell = -\log \sum_{\pi} \prod_{(t,u,k) \in \pi} \mathrm{softmax}(z_{t,u})_k $$

    over all paths $\pi$ through the lattice of frames $t$ and emitted labels $u$ whose steps are
    blanks (to the next frame) and the labels in their order. No frame leaves no path: infinity
    with gradient 0. A blank or a number outside the classes among the labels makes its own sequence
    NaN.

    Neither log-probabilities nor anything else of the size of the logits is stored beside the
    logits and their gradient. All derivatives exist, forward and reverse.

    Args:
        logits: Raw scores of the classes at each frame, after 0, 1, ... labels.
        labels: Classes to be emitted, one less than there are nodes.
        blank_id: Class of the blank; -1 is the last one.
        fastemit_lambda: FastEmit: the gradient of the labels, not the value, times 1 + lambda.
        lengths: Number of frames of each sequence; the others are masked.
        label_lengths: Number of labels of each sequence; the others are masked.
        label_where: Mask of the labels. A hidden label is skipped, together with the node behind
            it.
        where: Mask of the frames, `(batch, time)`; a hidden frame is skipped.

    One unit per sequence with a kept frame; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Graves, Sequence Transduction with Recurrent Neural Networks, ICML workshop 2012; Yu et
        al., FastEmit, ICASSP 2021. torchaudio's `rnnt_loss` takes the last class for the blank,
        `blank_id=-1`.

    The paths over two frames emit the label at the first or at the second one:

    >>> rnnt_loss(jnp.zeros((1, 2, 2, 2)), jnp.array([[1]]))  # -log(2 * 0.5 ** 3)
    Array(1.3862944, dtype=float32)
    """
    logits, truth, where, blank = _prepare(
        logits, labels, blank_id, lengths, label_lengths, label_where, where
    )
    (fastemit,) = numbers(logits, fastemit_lambda=fastemit_lambda)
    values = _loss(logits, fastemit, *truth, where, blank)
    return reduce(values, where=_exists(where), weights=weights, reduction=reduction)


@uncompiled
def rnnt_loss_chunked(
    encoded: Float[Array, "batch time features"],
    predicted: Float[Array, "batch nodes channels"],
    labels: Integer[Array, "batch labels"],
    *,
    joint: Callable[[Array, Array], Array],
    blank_id: int = 0,
    chunk_size: int = 16,
    fastemit_lambda: Number = 0.0,
    label_where: Where | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Transducer loss whose logits exist for a few frames at a time, in nats per sequence.

    $$ \ell = -\log \sum_{\pi} \prod_{(t,u,k) \in \pi} \mathrm{softmax}(J(e_t, g_u))_k $$

    as in `rnnt_loss`, with logits $J(e_t, g_u)$ made from the outputs of encoder and prediction
    network and made again for the gradient: `batch x chunk_size x nodes x classes` floats in place
    of `batch x time x nodes x classes`.

    Args:
        encoded: Output of the encoder at each frame.
        predicted: Output of the prediction network after 0, 1, ... labels.
        labels: Classes to be emitted, one less than there are nodes.
        joint: The joint network, `(batch, features), (batch, nodes, channels) -> (batch, nodes,
            classes)`; its parameters get a gradient where it closes over them.
        blank_id: Class of the blank; -1 is the last one.
        chunk_size: Frames at a time; at least 1.
        fastemit_lambda: As in `rnnt_loss`.
        label_where: Mask of the labels, as in `rnnt_loss`.
        where: Mask of the frames, `(batch, time)`.

    One unit per sequence with a kept frame; see `jaxloss.reduce`. Not compiled on its own, since
    `joint` may close over anything: call it under `jax.jit`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Graves, Sequence Transduction with Recurrent Neural Networks, ICML workshop 2012. Equals
        `rnnt_loss` on the logits of all frames.

    >>> joint = lambda e, g: jnp.stack([0 * g[..., 0], e + g[..., 0]], axis=-1)
    >>> rnnt_loss_chunked(
    ...     jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1)), jnp.array([[1]]), joint=joint
    ... )  # -log(2 * 0.5 ** 3)
    Array(1.3862944, dtype=float32)
    """
    check_float(encoded=encoded, predicted=predicted)
    check_integer(labels=labels)
    check_rank("(batch, time, features)", encoded=encoded)
    check_rank("(batch, nodes, channels)", predicted=predicted)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(message("chunk_size", "an integer", repr(chunk_size)))
    if chunk_size < 1:
        raise ValueError(message("chunk_size", "at least 1", chunk_size))
    batch, time, _ = encoded.shape
    nodes = predicted.shape[1]
    check_shape((batch, nodes, predicted.shape[2]), predicted=predicted)
    check_shape((batch, nodes - 1), labels=labels)
    where = kept((batch, time), where=where)
    label_where = kept((batch, nodes - 1), label_where=label_where)
    (encoded,) = mask(where, encoded)
    reached = None if label_where is None else _reached(label_where)
    (predicted,) = mask(reached, predicted)
    frames = jnp.pad(jnp.moveaxis(encoded, 1, 0), [(0, -time % chunk_size), (0, 0), (0, 0)])
    made = lambda frame: joint(frame, predicted)
    logits = jax.eval_shape(lambda x: made(jnp.sum(x, axis=0)), frames)
    classes = logits.shape[-1]
    if logits.shape != (batch, nodes, classes):
        raise ValueError(message("joint", f"logits {(batch, nodes, 'classes')}", logits.shape))
    blank = check_blank(blank_id, classes)
    following, count, ok, order = _truth(jnp.asarray(labels), label_where, classes, blank)

    @jax.checkpoint
    def arcs(frames: Array) -> tuple[Array, Array]:
        (logits,) = widen(jnp.moveaxis(jax.vmap(made)(frames), 0, 1))
        return _arcs(logits, following, blank)[:2]

    chunks = frames.reshape(len(frames) // chunk_size, chunk_size, *frames.shape[1:])
    found = lax.map(arcs, chunks)  # (chunks, batch, chunk_size, nodes)
    whole = lambda x: jnp.moveaxis(x, 1, 0).reshape(batch, len(frames), nodes)[:, :time]
    arc_log_probs = [_in_order(whole(x), order) for x in found]
    (fastemit,) = numbers(arc_log_probs[0], fastemit_lambda=fastemit_lambda)
    values = poison(_arcs_loss(*arc_log_probs, fastemit, count, where), ok)
    return reduce(values, where=_exists(where), weights=weights, reduction=reduction)


@compiled("blank_id")
def hat_log_probs(
    logits: Float[Array, "batch time nodes classes"],
    labels: Integer[Array, "batch labels"],
    *,
    blank_id: int = 0,
) -> tuple[Array, Array]:
    r"""Log-probabilities of the hybrid autoregressive transducer, for `rnnt_loss_from_log_probs`.

    $$ b = \sigma(z_\varnothing), \qquad l_k = (1 - b) \, \mathrm{softmax}(z_{\ne
    \varnothing})_k $$

    The blank is a coin of its own and the labels share what it leaves, so that their part is a
    language model. A label outside the classes gives NaN.

    Args:
        logits: Raw scores at each frame, after 0, 1, ... labels.
        labels: Classes to be emitted, one less than there are nodes.
        blank_id: Class of the blank; -1 is the last one.

    Returns:
        Log-probabilities of blank and labels, `(batch, time, nodes)`, `(batch, time, labels)`.

    Reference:
        Variani et al., Hybrid Autoregressive Transducer, ICASSP 2020.

    >>> blank, label = hat_log_probs(jnp.zeros((1, 1, 2, 3)), jnp.array([[1]]))
    >>> jnp.exp(blank), jnp.exp(label)
    (Array([[[0.5, 0.5]]], dtype=float32), Array([[[0.25]]], dtype=float32))
    """
    check_float(logits=logits)
    check_integer(labels=labels)
    check_rank("(batch, time, nodes, classes)", logits=logits)
    batch, _, nodes, classes = logits.shape
    check_shape((batch, nodes - 1), labels=labels)
    blank_id = check_blank(blank_id, classes)
    (logits,) = widen(jnp.asarray(logits))
    labels = _truth(jnp.asarray(labels), None, classes, blank_id)[0][:, :-1]
    blank, before = logits[..., blank_id], logits[:, :, :-1]
    is_blank = lax.broadcasted_iota(jnp.int32, before.shape, 3) == blank_id
    nll = neg_log_softmax(jnp.where(is_blank, -jnp.inf, before))
    index = jnp.broadcast_to(jnp.maximum(labels, 0)[:, None], nll.shape[:-1])
    shown = -pick(nll, index) + jax.nn.log_sigmoid(-blank[:, :, :-1])
    return jax.nn.log_sigmoid(blank), poison(shown, (labels >= 0)[:, None])


@compiled()
def delay_penalized(
    label_log_probs: Float[Array, "batch time labels"],
    *,
    penalty: Number,
    where: Where | None = None,
) -> Array:
    r"""Scores of the labels with a bonus for early and a penalty for late frames.

    $$ l'_{t,u} = l_{t,u} + \lambda \left( \tfrac{T - 1}{2} - t \right) $$

    For `rnnt_loss_from_log_probs`: a transducer trained so emits its labels earlier.

    Args:
        label_log_probs: Log-probabilities of the labels.
        penalty: $\lambda$, in nats per frame; 0 changes nothing.
        where: Mask of the frames, `(batch, time)`; $T$ and $t$ count the kept ones.

    Returns:
        The scores, in the shape of `label_log_probs`; hidden frames are 0.

    Reference:
        Kang et al., Delay-Penalized Transducer for Low-Latency Streaming ASR, ICASSP 2023.

    >>> delay_penalized(jnp.zeros((1, 3, 1)), penalty=0.5)[0, :, 0]
    Array([ 0.5,  0. , -0.5], dtype=float32)
    """
    check_float(label_log_probs=label_log_probs)
    check_rank("(batch, time, labels)", label_log_probs=label_log_probs)
    where = kept(label_log_probs.shape[:2], where=where)
    (scores,) = mask(where, *widen(jnp.asarray(label_log_probs)))
    (penalty,) = numbers(scores, penalty=penalty)
    shown = jnp.ones(scores.shape[:2], bool) if where is None else where
    frame = jnp.cumsum(shown, axis=1, dtype=scores.dtype) - 1
    ahead = jnp.sum(shown, axis=1, keepdims=True, dtype=scores.dtype) / 2 - 0.5 - frame
    return scores + jnp.where(shown, penalty * ahead, 0)[:, :, None]


def _exists(where: Array | None) -> Array | None:
    return None if where is None else jnp.any(where, axis=1)


def _prepare(
    logits: Array,
    labels: Array,
    blank_id: int,
    lengths: Array | None,
    label_lengths: Array | None,
    label_where: Array | None,
    where: Array | None,
) -> tuple[Array, tuple[Array, Array, Array, Array | None], Array | None, int]:
    """Checked and masked logits in float32 or wider, truth, mask and blank.

    The truth: the label that follows each node (-1 behind the last one), the number of labels,
    whether all are classes, and the order of nodes with the kept ones first.
    """
    check_float(logits=logits)
    check_integer(labels=labels)
    check_rank("(batch, time, nodes, classes)", logits=logits)
    batch, time, nodes, classes = logits.shape
    check_shape((batch, nodes - 1), labels=labels)
    blank = check_blank(blank_id, classes)
    where = kept((batch, time), lengths, where=where)
    packed = label_where is not None
    label_where = kept(labels.shape, label_lengths, label_where=label_where)
    truth = _truth(jnp.asarray(labels), label_where, classes, blank, packed=packed)
    (logits,) = mask(where, *widen(jnp.asarray(logits)))
    if label_where is not None:
        logits = jnp.where(_reached(label_where)[:, None, :, None], logits, 0)
    return logits, truth, where, blank


def _reached(label_where: Array) -> Array:
    """Which nodes are there: the first, and those behind a kept label."""
    first = jnp.zeros_like(counts(label_where, label_where))[:, None] == 0
    return jnp.concatenate([first, label_where], axis=1)


def _truth(
    labels: Array, kept: Array | None, classes: int, blank: int, *, packed: bool = True
) -> tuple[Array, Array, Array, Array | None]:
    good = valid(labels, classes) & (labels != blank)
    require(lambda: good, "labels", f"values in [0, {classes}) other than {blank}", kept)
    ok = jnp.all(good if kept is None else good | ~kept, axis=1)
    good = good if kept is None else good & kept
    labels = jnp.where(good, labels, -1).astype(jnp.int32)
    count = counts(kept, labels)
    end = jnp.zeros_like(count)[:, None]
    if kept is None or not packed:
        return jnp.concatenate([labels, end - 1], axis=1), count, ok, None
    order = kept_first(kept)
    labels = jnp.concatenate([jnp.take_along_axis(labels, order, axis=1), end - 1], axis=1)
    rank = jnp.concatenate([end, jnp.cumsum(kept, axis=1, dtype=jnp.int32)], axis=1)
    return jnp.take_along_axis(labels, rank, axis=1), count, ok, _nodes(order)


def _nodes(order: Array | None) -> Array | None:
    """The order of nodes from that of labels: the first node, then the one behind each label."""
    if order is None:
        return None
    first = jnp.sum(jnp.zeros_like(order), axis=1, keepdims=True, dtype=order.dtype)
    return jnp.concatenate([first, order + 1], axis=1)


def _in_order(x: Array, order: Array | None) -> Array:
    """`x[..., order]`, with one order for each item of the batch."""
    if order is None:
        return x
    return jnp.take_along_axis(x, jnp.broadcast_to(order[:, None], x.shape), axis=2)


@partial(jax.custom_jvp, nondiff_argnums=(7,))
def _loss(
    logits: Array,
    _fastemit: Array,
    following: Array,
    count: Array,
    ok: Array,
    order: Array | None,
    where: Array | None,
    blank_id: int,
) -> Array:
    """The loss of each sequence; see `_loss_jvp` for its derivative."""
    blank, label, _ = _arcs(logits, following, blank_id)
    total, _ = _paths(_in_order(blank, order), _in_order(label, order), count, where)
    return poison(jnp.maximum(_nll(total), 0), ok)


@_loss.defjvp
def _loss_jvp(blank_id: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    logits, fastemit, following, count, ok, order, where = primals
    blank, label, parts = _arcs(logits, following, blank_id)
    total, shares = _shares(_in_order(blank, order), _in_order(label, order), count, where)
    values = poison(jnp.maximum(_nll(total), 0), ok)
    back = None if order is None else jnp.argsort(order, axis=1).astype(jnp.int32)
    blanks, emitted = (poison(_in_order(x, back), ok[:, None, None]) for x in shares)
    emitted = emitted * (1 + fastemit)
    # An arc of share s raises all logits of its node by s softmax and lowers its own by s; the
    # own share is written as s (softmax - 1), the sum over the others, where softmax is almost 1.
    largest, rest, own_blank, own_label = parts
    norm = rest + own_blank + own_label
    norm = jnp.where(norm == 0, 1, norm)
    of_blank = emitted * (own_blank / norm) - blanks * ((rest + own_label) / norm)
    of_label = blanks * (own_label / norm) - emitted * ((rest + own_blank) / norm)
    # Written unlike the exponentials of the sum, so that no part of either is kept for the other.
    probs = jnp.exp((logits + (-largest)[..., None]) - jnp.log(norm)[..., None])
    slope = probs * (blanks + emitted)[..., None]
    is_blank, is_label = _own(logits.shape, following, blank_id)
    slope = jnp.where(is_blank, of_blank[..., None], slope)
    slope = jnp.where(is_label, of_label[..., None], slope)
    return values, jnp.sum(slope * tangents[0], axis=(1, 2, 3))


def _own(shape: tuple[int, ...], following: Array, blank_id: int) -> tuple[Array, Array]:
    """Where the class of a node is the blank, and where it is the label behind the node."""
    classes = lax.broadcasted_iota(jnp.int32, shape, 3)
    return classes == blank_id, classes == following[:, None, :, None]


def _arcs(
    logits: Array, following: Array, blank_id: int
) -> tuple[Array, Array, tuple[Array, Array, Array, Array]]:
    """Log-probabilities of the blank and of the following label, each `(batch, time, nodes)`.

    Behind them the largest logit and the exponentials above it: of all other classes together, of
    the blank and of the label. Own classes stay out of the sum, so that probabilities close to 1
    keep their digits.
    """
    largest = lax.stop_gradient(jnp.max(logits, axis=-1))
    largest = jnp.where(jnp.isinf(largest), 0, largest)
    # Own classes leave the sum by a term of -inf, the same at all frames: XLA then fuses the sum
    # with its exponentials, which a selection would keep it from.
    is_blank, is_label = _own((len(logits), 1, *logits.shape[2:]), following, blank_id)
    away = jnp.where(is_blank | is_label, jnp.asarray(-jnp.inf, logits.dtype), 0)
    rest = jnp.sum(jnp.exp((logits + away) - largest[..., None]), axis=-1)
    blank = logits[..., blank_id] - largest
    index = jnp.broadcast_to(jnp.maximum(following, 0)[:, None], blank.shape)
    label = pick(logits, index) - largest
    label = jnp.where((following < 0)[:, None], -jnp.inf, label)
    own_blank, own_label = jnp.exp(blank), jnp.exp(label)
    log_prob = lambda own, other: own - jnp.log1p(rest + other + expm1(own))
    parts = (largest, rest, own_blank, own_label)
    return log_prob(blank, own_label), log_prob(label, own_blank), parts


@jax.custom_jvp
def _arcs_loss(
    blank: Array, label: Array, _fastemit: Array, count: Array, where: Array | None
) -> Array:
    """The loss of each sequence, whose derivatives are the shares of the arcs in all paths."""
    return _nll(_paths(blank, label, count, where)[0])


@_arcs_loss.defjvp
def _arcs_loss_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    blank, label, fastemit, count, where = primals
    total, (blanks, emitted) = _shares(blank, label, count, where)
    moved = blanks * tangents[0] + (1 + fastemit) * emitted * tangents[1]
    return _nll(total), -jnp.sum(moved, axis=(1, 2))


def _nll(total: Array) -> Array:
    return jnp.where(total < IMPOSSIBLE, jnp.inf, -total)


def _paths(
    blank: Array, label: Array, count: Array, where: Array | None, *, codes: bool = False
) -> tuple[Array, Array | None]:
    """The log weight of all paths, and the codes for `split` at each node.

    Arrays are `(batch, time, nodes)`. Nodes go along the anti-diagonals of a lattice with one
    frame more than there are: hidden frames hand on what they get, and behind the last frame
    nodes beyond the last label do so, so that all paths end in one corner.
    """
    dead = -jnp.inf
    place = lax.broadcasted_iota(jnp.int32, (1, 1, blank.shape[2]), 2)
    end = count[:, None, None]
    blank, label = jnp.where(place <= end, blank, dead), jnp.where(place < end, label, dead)
    if where is not None:
        shown = where[:, :, None]
        blank, label = jnp.where(shown, blank, 0), jnp.where(shown, label, dead)
    zero = (0 * end).astype(blank.dtype)
    free = jnp.where((place >= end) & (place < blank.shape[2] - 1), zero, dead)
    blank = jnp.concatenate([blank, free + dead], axis=1)
    label = jnp.concatenate([label, free], axis=1)
    steps = label.shape[1] + label.shape[2] - 2  # to the last node; none leads on from there
    arcs = [jnp.maximum(skew(x.T, steps), LOG_ZERO) for x in (blank, label)]
    alpha = jnp.where(place[0].T == 0, 0, LOG_ZERO) + zero[:, 0].T

    def step(alpha: Array, arcs: list[Array]) -> Any:
        stayed, moved = alpha + arcs[0], alpha + arcs[1]
        came = jnp.concatenate([jnp.full_like(moved[:1], LOG_ZERO), moved[:-1]])
        alpha, code = merge(stayed, came)
        largest = lax.stop_gradient(jnp.max(alpha, axis=0))
        return alpha - largest[None], (largest, code if codes else None)

    alpha, (factors, found) = lax.scan(step, alpha, arcs)
    return jnp.sum(factors, axis=0) + alpha[-1], found


def _shares(
    blank: Array, label: Array, count: Array, where: Array | None
) -> tuple[Array, tuple[Array, Array]]:
    """The log weight of all paths, and in which share of them each arc is.

    The whole flows back from the last node, divided as the arcs into each node contributed.
    """
    total, codes = _paths(blank, label, count, where, codes=True)
    time, nodes = blank.shape[1:]
    place = lax.broadcasted_iota(jnp.int32, (nodes, 1), 0)
    start = jnp.where(place == nodes - 1, jnp.ones_like(total)[None], 0)

    def step(share: Array, code: Array) -> Any:
        stayed, came = split(share, code)
        moved = jnp.concatenate([came[1:], jnp.zeros_like(came[:1])])
        return stayed + moved, (stayed, moved)

    _, arcs = lax.scan(step, start, codes, reverse=True)
    there = ~(total < IMPOSSIBLE)[:, None, None]  # NaN is to stay NaN
    if where is not None:
        there &= where[:, :, None]
    back = lambda x: jnp.where(there, unskew(x, time).T, 0)
    return total, (back(arcs[0]), back(arcs[1]))


_LATTICE = dict(
    blank_log_probs=draw_uniform("B T U", -3, -0.1, kind="real"),
    label_log_probs=draw_uniform("B T N", -3, -0.1, kind="real"),
)
_CASE = dict(logits=draw_normal("B T U V"), labels=draw_labels("B N", classes="C"))
_SIZES = dict(T=3, U=3, N=2, V=4, C=3)


def _joint(frame: Array, predicted: Array) -> Array:
    frame, predicted = widen(frame, predicted)
    return frame[:, None] + predicted


_PARTS = dict(encoded=draw_normal("B T V"), predicted=draw_normal("B U V"), labels=_CASE["labels"])
_NO_FUNCTION = "FastEmit changes the gradient and not the value"
CASES = (
    Case(rnnt_loss_from_log_probs, _LATTICE, positions="B T", sizes=_SIZES),
    Case(rnnt_loss, _CASE, dict(blank_id=-1), positions="B T", sizes=_SIZES),
    Case(
        rnnt_loss,
        _CASE,
        dict(blank_id=3, fastemit_lambda=0.2),
        label="fastemit",
        positions="B T",
        sizes=_SIZES,
        without=dict(numerical=_NO_FUNCTION, transforms=_NO_FUNCTION),
    ),
    Case(
        rnnt_loss_chunked,
        _PARTS,
        dict(joint=_joint, blank_id=-1, chunk_size=2),
        positions="B T",
        sizes=_SIZES,
    ),
)
