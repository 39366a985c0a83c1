"""Connectionist temporal classification: labels without a known alignment to the frames."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from .._core.case import Case, draw_labels, draw_normal
from .._core.checks import check_float, check_integer, check_option, check_shape, require
from .._core.compiled import compiled
from .._core.labels import poison, valid
from .._core.lattice import (
    BEST,
    EXTENDED,
    IMPOSSIBLE,
    LOGARITHMS,
    Arithmetic,
    check_blank,
    check_rank,
    counts,
    kept,
    kept_first,
    split,
)
from .._core.numerics import widen
from .._core.reduce import mask, reduce
from .._core.sharding import one_hot
from .._core.typing import Reduction, Values, Where

__all__ = ["ctc_alignment", "ctc_loss"]


@compiled("blank_id", "zero_infinity", "precision")
def ctc_loss(
    logits: Float[Array, "batch time classes"],
    labels: Integer[Array, "batch length"],
    *,
    blank_id: int = 0,
    zero_infinity: bool = False,
    precision: str = "default",
    lengths: Integer[Array, " batch"] | None = None,
    label_lengths: Integer[Array, " batch"] | None = None,
    label_where: Where | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Connectionist temporal classification (CTC) loss, in nats per sequence, from 0 up.

    $$ \ell = -\log \sum_{\pi \in \mathcal B^{-1}(y)} \prod_t \mathrm{softmax}(z_t)_{\pi_t} $$

    where $\mathcal B$ merges repeated classes of a path and then removes the blanks. Labels that
    do not fit into the frames (each label needs one, and one more between two equal ones) cost
    infinity with gradient 0. A blank or a number outside the classes among the labels makes its
    own sequence NaN.

    Value and gradient together keep two to three arrays of `batch x time x (2 length + 1)` floats
    and two of the size of the logits. All derivatives exist, forward and reverse; second ones keep
    what plain autodiff of the recursion keeps.

    Args:
        logits: Raw scores, one class of which is the blank; 16-bit ones are computed in float32.
        labels: Classes to be recognised, without blanks.
        blank_id: Class of the blank; -1 is the last one.
        zero_infinity: Count labels that do not fit as 0.
        precision: `"default"` sums in log space, exact for losses close to 0 too. `"high"` sums
            extended floats: the gradient over 1500 frames is ten times as accurate (2e-6).
        lengths: Number of frames of each sequence; the others are masked.
        label_lengths: Number of labels of each sequence; the others are masked.
        label_where: Mask of the labels; True keeps one. A hidden label is skipped.
        where: Mask of the frames, `(batch, time)`; a hidden frame is skipped.

    One unit per sequence with a kept frame; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Graves et al., Connectionist Temporal Classification, ICML 2006. Equals torch's `ctc_loss`
        on `log_softmax`, whose `"mean"` first divides each loss by its number of labels, and
        `optax.ctc_loss`, whose paddings are 1 where a mask is False.

    Two of the four paths over two frames, `a a`, `a -`, `- a` and `- -`, do not end in `b`:

    >>> ctc_loss(jnp.zeros((1, 2, 2)), jnp.array([[1]]))  # -log(3 / 4)
    Array(0.28768206, dtype=float32)
    """
    check_option(("default", "high"), precision=precision)
    check_option((False, True), zero_infinity=zero_infinity)
    logits, truth, _, where, blank = _prepare(
        logits, labels, blank_id, lengths, label_lengths, label_where, where
    )
    values = _values(logits, *truth, where, blank, precision)
    if zero_infinity:
        values = jnp.where(jnp.isposinf(values), 0, values)
    exists = None if where is None else jnp.any(where, axis=1)
    return reduce(values, where=exists, weights=weights, reduction=reduction)


@compiled("blank_id")
def ctc_alignment(
    logits: Float[Array, "batch time classes"],
    labels: Integer[Array, "batch length"],
    *,
    blank_id: int = 0,
    lengths: Integer[Array, " batch"] | None = None,
    label_lengths: Integer[Array, " batch"] | None = None,
    label_where: Where | None = None,
    where: Where | None = None,
) -> Integer[Array, "batch time"]:
    r"""The likeliest alignment of labels and frames under CTC: which label each frame shows.

    $$ \arg\max_{\pi \in \mathcal B^{-1}(y)} \prod_t \mathrm{softmax}(z_t)_{\pi_t} $$

    Not differentiable. Among equally likely alignments one is returned.

    Args:
        logits: As in `ctc_loss`.
        labels: As in `ctc_loss`.
        blank_id: Class of the blank; -1 is the last one.
        lengths: Number of frames of each sequence.
        label_lengths: Number of labels of each sequence.
        label_where: Mask of the labels; True keeps one.
        where: Mask of the frames, `(batch, time)`.

    Returns:
        For each frame the position in `labels` of the label it shows, int32 `(batch, time)`; -1 at
        a blank, at a hidden frame, and wherever no alignment exists.

    Reference:
        Graves et al., Connectionist Temporal Classification, ICML 2006; Viterbi, Error bounds for
        convolutional codes, IEEE Transactions on Information Theory 1967.

    >>> logits = jnp.array([[[0.0, 5.0], [5.0, 0.0], [0.0, 5.0]]])
    >>> ctc_alignment(logits, jnp.array([[1, 1]]))
    Array([[ 0, -1,  1]], dtype=int32)
    """
    logits, (labels, count, ok), order, where, blank_id = _prepare(
        logits, labels, blank_id, lengths, label_lengths, label_where, where
    )
    blank, label, _, _ = _emissions(logits, labels, blank_id)
    total, (_, shown) = _occupancy(BEST, blank, label, labels, count, where)
    found = (total > IMPOSSIBLE) & ok
    place = lax.broadcasted_iota(jnp.int32, shown.shape, 1)
    at = jnp.max(jnp.where((shown > 0) & found[None, None], place, -1), axis=1, initial=-1).T
    if order is None or not order.shape[1]:
        return at
    return jnp.where(at < 0, at, jnp.take_along_axis(order, jnp.maximum(at, 0), axis=1))


def _prepare(
    logits: Array,
    labels: Array,
    blank_id: int,
    lengths: Array | None,
    label_lengths: Array | None,
    label_where: Array | None,
    where: Array | None,
) -> tuple[Array, tuple[Array, Array, Array], Array | None, Array | None, int]:
    """Checked and masked logits in float32 or wider, labels, their order, mask and blank.

    Labels come with the kept ones first, -1 where they are no class, with their number and whether
    all of them are classes.
    """
    check_float(logits=logits)
    check_integer(labels=labels)
    check_rank("(batch, time, classes)", logits=logits)
    batch, time, classes = logits.shape
    check_rank("(batch, length)", labels=labels)
    check_shape((batch, labels.shape[1]), labels=labels)
    blank = check_blank(blank_id, classes)
    where = kept((batch, time), lengths, where=where)
    holes = kept(labels.shape, label_where=label_where)
    order = None if holes is None else kept_first(holes)
    label_where = kept(labels.shape, label_lengths, label_where=label_where)
    (logits,) = mask(where, *widen(jnp.asarray(logits)))
    labels = jnp.asarray(labels)
    good = valid(labels, classes) & (labels != blank)
    require(lambda: good, "labels", f"values in [0, {classes}) other than {blank}", label_where)
    ok = jnp.all(good if label_where is None else good | ~label_where, axis=1)
    labels = jnp.where(good, labels, -1).astype(jnp.int32)
    count = counts(label_where, labels)
    if order is not None:
        labels = jnp.take_along_axis(labels, order, axis=1)
    return logits, (labels, count, ok), order, where, blank


@partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _values(
    logits: Array,
    labels: Array,
    count: Array,
    ok: Array,
    where: Array | None,
    blank_id: int,
    precision: str,
) -> Array:
    """The loss of each sequence; its derivative is softmax less how often a path has each class."""
    arithmetic = EXTENDED if precision == "high" else LOGARITHMS
    blank, label, _, rest = _emissions(logits, labels, blank_id)
    total, _ = _forward(arithmetic, blank, label, labels, count, where)
    return _nll(total, rest, ok, where)


@_values.defjvp
def _values_jvp(blank_id: int, precision: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    logits, labels, count, ok, where = primals
    occupancy = _occupancy_high if precision == "high" else partial(_occupancy, LOGARITHMS)
    blank, label, shifted, rest = _emissions(logits, labels, blank_id)
    total, (blanks, shown) = occupancy(blank, label, labels, count, where)
    values = _nll(total, rest, ok, where)
    # Counts of all classes: labels by a product with their one-hot form, no larger than the
    # logits where a scatter would be slow; the blank on its own.
    classes = logits.shape[-1]
    truth = one_hot(labels, classes).astype(logits.dtype)
    counts = jnp.einsum("tnb,bnk->btk", shown, truth, precision=lax.Precision.HIGHEST)
    is_blank = lax.broadcasted_iota(jnp.int32, counts.shape, 2) == blank_id
    counts += jnp.where(is_blank, blanks.T[:, :, None], 0)
    slope = jnp.exp(shifted) / (1 + rest)[:, :, None] - counts
    # Softmax and counts both sum to 1: where the largest class is almost certain, the others tell
    # its slope without cancellation.
    top = _top(logits)
    slope = jnp.where(top, -jnp.sum(jnp.where(top, 0, slope), axis=2, keepdims=True), slope)
    there = (total > IMPOSSIBLE)[:, None, None]
    if where is not None:
        there &= where[:, :, None]
    slope = poison(jnp.where(there, slope, 0), ~jnp.isnan(values)[:, None, None])
    return values, jnp.sum(slope * tangents[0], axis=(1, 2))


def _nll(total: Array, rest: Array, ok: Array, where: Array | None) -> Array:
    frames = jnp.log1p(rest)
    frames = frames if where is None else jnp.where(where, frames, 0)
    values = jnp.maximum(jnp.sum(frames, axis=1) - total, 0)
    return poison(jnp.where(total > IMPOSSIBLE, values, values + jnp.inf), ok)


def _top(logits: Array) -> Array:
    return one_hot(jnp.argmax(lax.stop_gradient(logits), axis=-1), logits.shape[-1])


def _emissions(logits: Array, labels: Array, blank_id: int) -> tuple[Array, Array, Array, Array]:
    """Logits below the largest of each frame: of the blank, of the labels and of all classes.

    The last result is the sum of their exponentials without that of the largest. Frames come first
    and the batch last, where each step of the recursion reads whole rows:
    `(time, 1, batch)`, `(time, length, batch)`, `(batch, time, classes)`, `(batch, time)`.
    """
    top = _top(logits)
    largest = jnp.sum(jnp.where(top, logits, 0), axis=-1, keepdims=True)
    shifted = logits - jnp.where(jnp.isinf(largest), 0, largest)
    rest = jnp.sum(jnp.where(top, 0, jnp.exp(shifted)), axis=-1)
    index = jnp.broadcast_to(
        jnp.maximum(labels, 0)[:, None, :], (*logits.shape[:2], labels.shape[1])
    )
    label = jnp.take_along_axis(shifted, index, axis=2, mode="clip")
    blank = shifted[:, :, blank_id]
    return blank.T[:, None], jnp.transpose(label, (1, 2, 0)), shifted, rest


def _forward(
    arithmetic: Arithmetic,
    blank: Array,
    label: Array,
    labels: Array,
    count: Array,
    where: Array | None,
    *,
    codes: bool = False,
) -> tuple[Array, Any]:
    """The log weight of all paths, and what `_occupancy` needs to divide it among them.

    A path is after n labels in state n of `blanks` (a blank came last) or n - 1 of `tokens`.
    """
    plus, tree = arithmetic.merge, jax.tree.map
    zero = (0 * count).astype(label.dtype)[None]  # placed like the arrays of the batch
    places = jnp.arange(label.shape[1] + 1, dtype=jnp.int32)[:, None]
    nothing = arithmetic.enter(zero - jnp.inf)
    blanks = arithmetic.enter(jnp.where(places == 0, 0, -jnp.inf) + zero)
    tokens = arithmetic.enter(jnp.where(places[1:] > 0, -jnp.inf, 0) + zero)
    label = jnp.where((places[:-1] < count[None])[None], label, -jnp.inf)
    direct = _direct(labels)

    def step(states: Any, frame: Any) -> Any:
        blanks, tokens = states
        blank, label, keep = frame
        # State n goes on from the same state and from the label before; a label also from the
        # label before that one, unless they are equal.
        left = tree(lambda first, x: jnp.concatenate([first, x]), nothing, tokens)
        either, code = plus(blanks, left)
        before = tree(lambda x, y: jnp.where(direct, x[:-1], y[:-1]), either, blanks)
        entered, label_code = plus(tokens, before)
        moved = arithmetic.times(either, blank), arithmetic.times(entered, label)
        moved, factor = arithmetic.rescale(moved)
        if keep is not None:
            moved = tree(lambda new, old: jnp.where(keep[None], new, old), moved, states)
            factor = jnp.where(keep, factor, 0)
        return moved, (factor, (code, label_code) if codes else None)

    frames = (arithmetic.enter(blank), arithmetic.enter(label), None if where is None else where.T)
    (blanks, tokens), (factors, kept) = lax.scan(step, (blanks, tokens), frames)
    at = lambda x, place: jnp.sum(jnp.where(place == count[None], x, 0), axis=0, dtype=x.dtype)
    last = tree(lambda x: at(x, places), blanks)
    token = tree(lambda x, no: jnp.where(count > 0, at(x, places[1:]), no[0]), tokens, nothing)
    total, code = plus(last, token)
    return jnp.sum(factors, axis=0) + arithmetic.log(total), (kept, code)


def _direct(labels: Array) -> Array:
    """Whether a label may follow the one before without a blank. `(length, batch)`"""
    rows = labels.T
    return jnp.concatenate([rows[:1] != rows[:1], rows[1:] != rows[:-1]])


def _occupancy(
    arithmetic: Arithmetic,
    blank: Array,
    label: Array,
    labels: Array,
    count: Array,
    where: Array | None,
) -> tuple[Array, tuple[Array, Array]]:
    """The log weight of all paths, and the share of the paths that show a blank or each label.

    There is no backward recursion of sums: the whole flows back from the last frame, divided at
    each state as the states before it have contributed, so that no error grows.
    """
    total, (codes, code) = _forward(arithmetic, blank, label, labels, count, where, codes=True)
    places = jnp.arange(label.shape[1] + 1, dtype=jnp.int32)[:, None]
    direct = _direct(labels)
    last, token = split(jnp.ones_like(code), code)
    blanks = jnp.where(places == count[None], last[None], 0)
    tokens = jnp.where(places[1:] == count[None], token[None], 0)

    def step(states: Any, frame: Any) -> Any:
        blanks, tokens = states
        (code, label_code), keep = frame
        stayed, came = split(tokens, label_code)
        beyond = lambda x: jnp.concatenate([x, jnp.zeros_like(blanks[:1])])
        blank, left = split(blanks + beyond(jnp.where(direct, came, 0)), code)
        moved = blank + beyond(jnp.where(direct, 0, came)), stayed + left[1:]
        if keep is not None:
            moved = jax.tree.map(lambda new, old: jnp.where(keep[None], new, old), moved, states)
        return moved, (jnp.sum(blanks, axis=0), tokens)

    frames = codes, None if where is None else where.T
    _, (blanks, tokens) = lax.scan(step, (blanks, tokens), frames, reverse=True)
    if where is not None:
        blanks, tokens = jnp.where(where.T, blanks, 0), jnp.where(where.T[:, None], tokens, 0)
    return total, (blanks, tokens)


@jax.custom_jvp
def _occupancy_high(*args: Any) -> Any:
    return _occupancy(EXTENDED, *args)


@_occupancy_high.defjvp
def _occupancy_high_jvp(primals: Any, tangents: Any) -> Any:
    # The bits of extended floats have no derivative; that of the logarithms is the same.
    logarithms = lambda blank, label: _occupancy(LOGARITHMS, blank, label, *primals[2:])
    _, moved = jax.jvp(logarithms, primals[:2], tangents[:2])
    return _occupancy_high(*primals), moved


_LABELS = draw_labels("B N", classes="V")
_CASE = dict(logits=draw_normal("B T C"), labels=_LABELS)
CASES = (
    Case(
        ctc_loss,
        dict(logits=draw_normal("B T C", scale=0.5), labels=_LABELS),
        dict(blank_id=-1),
        positions="B T",
        sizes=dict(T=7, N=2),
    ),
    Case(
        ctc_loss,
        _CASE,
        dict(blank_id=-1, zero_infinity=True, precision="high"),
        label="high",
        positions="B T",
        sizes=dict(T=7, N=2),
    ),
)
