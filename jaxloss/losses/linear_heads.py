"""Losses of a vocabulary head, from hidden states: tokens x vocabulary is never held in memory."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer

from .._core.case import Case, Draw, draw_labels, draw_normal
from .._core.checks import (
    check_float,
    check_integer,
    check_min_rank,
    check_option,
    check_shape,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.heads import Head, Plan, Rows, head_sum, head_values, kl_values, prefer_blocks
from .._core.labels import poison, valid
from .._core.lengths import fold_lengths
from .._core.numerics import numbers, safe_div, widen
from .._core.reduce import mask, reduce, unit_weights
from .._core.reductions import adds_up, of_sums
from .._core.sharding import lookup, unshard
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["linear_cross_entropy", "linear_distillation_loss", "linear_token_log_probs"]


@compiled("chunk_size", "implementation", "vocab_axis_name")
def linear_cross_entropy(
    hidden: Float[Array, "*batch features"],
    kernel: Float[Array, "features classes"],
    labels: Integer[Array, "*batch"],
    *,
    bias: Float[ArrayLike, " classes"] | None = None,
    chunk_size: int = 1024,
    implementation: Literal["auto", "tokens", "vocabulary"] = "auto",
    ignore_index: int | None = None,
    lengths: Integer[Array, "..."] | None = None,
    label_smoothing: Number = 0.0,
    z_loss: Number = 0.0,
    softcap: Number | None = None,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    vocab_axis_name: str | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy of a linear head over a vocabulary, in nats, without holding its logits.

    $$ \ell = -\sum_k w_k \left((1 - s)\, [k = y] + \tfrac{s}{V}\right) \log p_k + c\, L^2, \quad
       p = \mathrm{softmax}(z), \quad L = \log \sum_k e^{z_k} $$

    with the $V$ logits $z = a \tanh((h W + b) / a)$, or just $h W + b$ without soft cap $a$; class
    weights $w$, label smoothing $s$ and z-loss $c$. It equals `softmax_cross_entropy` of the
    logits, digit for digit as accurate, plus the z-loss. A kept label outside `[0, classes)` makes
    its unit, and the gradient of the kernel, NaN.

    Args:
        hidden: Hidden states `(*batch, features)`; the last axis of `*batch` is time.
        kernel: Weights of the head, `(features, classes)`; torch keeps the transpose.
        labels: The class of each token.
        bias: One number for each class.
        chunk_size: How many tokens, or under `"vocabulary"` how many classes, at a time.
        implementation: `"tokens"` works on runs of tokens and makes the gradients beside the value:
            three matrix products, temporaries of `2 chunk_size V` floats and, in float32, of one
            kernel. `"vocabulary"` works on blocks of classes: four products, temporaries of
            `2 N chunk_size + N D` floats for `N` tokens. `"auto"` takes `"tokens"` while a run has
            at most 2^26 logits and the tokens are not split over an Explicit mesh, where each run
            would sum the gradient of the kernel over the devices. Reductions that need a value for
            each token (`"none"` and callables other than `sum_and_weight`, `across` and
            `normalized_sum`) always go by blocks; their backward pass needs one more copy of the
            kernel.
        ignore_index: Label whose units are left out, as by `where`.
        lengths: How many tokens at the head of each time axis exist, as by `where`.
        label_smoothing: Share of the target that is spread evenly over all classes.
        z_loss: Coefficient of the squared log-partition, which keeps the logits from drifting.
        softcap: Bound of the logits; applied before everything else.
        class_weights: Scales the cost of each class, not the z-loss; the mean still divides by the
            number of units.
        vocab_axis_name: Name of the mapped axis over which `kernel`, `bias` and `class_weights` are
            split by classes; labels keep the numbers of the whole vocabulary. Take the gradient
            outside the mapped function.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, ICLR 2025; nothing is
        left out of the gradient here. Hsu et al., Liger Kernel, 2024. z-loss: Chowdhery et al.,
        PaLM, JMLR 2023. Soft cap: Gemma Team, Gemma 2, 2024. Equals
        `torch.nn.functional.linear_cross_entropy` of the transposed kernel; torch's weighted mean
        is `weights=class_weights[labels]`.

    >>> hidden, kernel = jnp.ones((2, 3)), jnp.zeros((3, 5))
    >>> linear_cross_entropy(hidden, kernel, jnp.array([0, 4]))  # log 5
    Array(1.609438, dtype=float32)
    """
    check_option(("auto", "tokens", "vocabulary"), implementation=implementation)
    hidden, kernel, labels, where, ok = _tokens(
        hidden, kernel, labels, ignore_index, lengths, where, vocab_axis_name
    )
    head = _head(hidden, kernel, bias=bias, softcap=softcap, z_loss=z_loss)
    scale = poison(jnp.ones_like(ok, dtype=_wide(hidden)), ok)
    if not _untouched(label_smoothing):
        (smoothing,) = numbers(scale, label_smoothing=label_smoothing)
        classes = kernel.shape[1] * _devices(vocab_axis_name)
        scale, head = (1 - smoothing) * scale, head._replace(spread=smoothing / classes)
    if class_weights is not None:
        (vector,) = _vectors(kernel, scale.dtype, class_weights=class_weights)
        scale *= _of_label(vector, labels, vocab_axis_name)
        head = head if head.spread is None else head._replace(spread=head.spread * vector)
    rows = Rows(_flat(hidden, 1), _flat(labels), _flat(scale))
    blocks = implementation == "vocabulary"
    if implementation == "auto":
        blocks = prefer_blocks(_size(chunk_size), rows, head)
    plan = Plan(_size(chunk_size), blocks, vocab_axis_name)
    if not adds_up(reduction):
        values = head_values(plan, rows, head).reshape(labels.shape)
        return reduce(values, where=where, weights=weights, reduction=reduction)
    counts = unit_weights(scale, where, weights)
    weight = jnp.sum(counts)
    one = jnp.ones_like(weight)
    norm = safe_div(one, weight) if reduction == "mean" else one
    total = head_sum(plan, rows, _flat(counts), norm, head)
    return total if isinstance(reduction, str) else of_sums(total, weight, reduction)


@compiled("chunk_size")
def linear_token_log_probs(
    hidden: Float[Array, "*batch features"],
    kernel: Float[Array, "features classes"],
    labels: Integer[Array, "*batch"],
    *,
    bias: Float[ArrayLike, " classes"] | None = None,
    chunk_size: int = 1024,
    softcap: Number | None = None,
    ignore_index: int | None = None,
    where: Where | None = None,
) -> Float[Array, "*batch"]:
    r"""Log-probability of each token under a linear head, in nats, without holding its logits.

    $$ \log p_y = z_y - \log \sum_k e^{z_k} $$

    with logits $z$ as in `linear_cross_entropy`. What preference and policy losses take. Forward
    and backward go by blocks of classes: temporaries of `2 N chunk_size + N D` floats for `N`
    tokens and, backward, of one kernel.

    Args:
        hidden: Hidden states `(*batch, features)`.
        kernel: Weights of the head, `(features, classes)`.
        labels: The class of each token; one outside `[0, classes)` makes its entry NaN.
        bias: One number for each class.
        chunk_size: How many classes at a time.
        softcap: Bound $a$ of the logits, `a tanh(z / a)`.
        ignore_index: Label whose tokens are hidden, as by `where`.
        where: Bool array `*batch`; hidden tokens have log-probability 0 and no gradient.

    Returns:
        A float32 array `*batch`.

    Reference:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, ICLR 2025. Equals the
        labelled entries of `jax.nn.log_softmax(hidden @ kernel + bias)`.

    >>> linear_token_log_probs(jnp.ones((1, 3)), jnp.zeros((3, 4)), jnp.array([2]))  # -log 4
    Array([-1.3862944], dtype=float32)
    """
    hidden, kernel, labels, where, ok = _tokens(
        hidden, kernel, labels, ignore_index, None, where, None
    )
    head = _head(hidden, kernel, bias=bias, softcap=softcap)
    scale = poison(-jnp.ones_like(ok, dtype=_wide(hidden)), ok)
    rows = Rows(_flat(hidden, 1), _flat(labels), _flat(scale))
    values = head_values(Plan(_size(chunk_size), blocks=True), rows, head)
    return reduce(values.reshape(labels.shape), where=where, reduction="none")


@compiled("chunk_size")
def linear_distillation_loss(
    student_hidden: Float[Array, "*batch student_features"],
    student_kernel: Float[Array, "student_features classes"],
    teacher_hidden: Float[Array, "*batch teacher_features"],
    teacher_kernel: Float[Array, "teacher_features classes"],
    *,
    temperature: Number = 1.0,
    chunk_size: int = 1024,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Divergence of a student's next token from a teacher's, in nats from 0 up, without logits.

    $$ \ell = T^2\, \mathrm{KL}\!\left(\mathrm{softmax}(h_t W_t / T) \,\|\,
       \mathrm{softmax}(h_s W_s / T)\right) $$

    with temperature $T$. The teacher gets no gradient. Runs of tokens are computed once more in
    the backward pass: temporaries of about `6 chunk_size V` floats and of two student kernels.

    Args:
        student_hidden: Hidden states `(*batch, features)` of the student.
        student_kernel: Weights of its head, `(features, classes)`.
        teacher_hidden: Hidden states of the teacher, of any width.
        teacher_kernel: Weights of its head, over the same classes.
        temperature: Above 1 it lays stress on the unlikely classes; $T^2$ keeps the gradient.
        chunk_size: How many tokens at a time.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015; fused as in Hsu et al.,
        Liger Kernel, 2024, which leaves out the factor $T^2$. Equals torch's `kl_div` of the
        log-softmax of both logits over `T`, summed over classes, times `T^2`.

    >>> hidden, kernel = jnp.ones((1, 1)), jnp.array([[0.0, 0.0]])
    >>> teacher = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> linear_distillation_loss(hidden, kernel, hidden, teacher)  # log 2 - H(1/4, 3/4)
    Array(0.13081196, dtype=float32)
    """
    student = _factors(student_hidden=student_hidden, student_kernel=student_kernel)
    teacher = _factors(teacher_hidden=teacher_hidden, teacher_kernel=teacher_kernel)
    units = student[0].shape[:-1]
    check_shape((*units, teacher[0].shape[-1]), teacher_hidden=teacher_hidden)
    check_shape((teacher[0].shape[-1], student[1].shape[1]), teacher_kernel=teacher_kernel)
    if where is not None:
        check_shape(units, where=where)
    hidden = mask(where, student[0], teacher[0])
    (temperature,) = numbers(widen(*student, *teacher)[0], temperature=temperature)
    flat = _flat(hidden[0], 1), _flat(hidden[1], 1)
    values = kl_values(_size(chunk_size), flat, (student[1], teacher[1]), temperature)
    return reduce(values.reshape(units), where=where, weights=weights, reduction=reduction)


def _tokens(
    hidden: Any,
    kernel: Any,
    labels: Any,
    ignore_index: int | None,
    lengths: Any,
    where: Where | None,
    axis_name: str | None,
) -> tuple[Array, Array, Array, Where | None, Array]:
    """Check and mask; one dtype for both factors, int32 labels, and whether each names a class."""
    hidden, kernel = _factors(hidden=hidden, kernel=kernel)
    check_integer(labels=labels)
    check_shape(hidden.shape[:-1], labels=labels)
    labels = jnp.asarray(labels)
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    where = fold_lengths(where, lengths, labels.shape)
    if where is not None:
        check_shape(labels.shape, where=where)
    if ignore_index is not None:
        (where,) = mask(where, labels != jnp.asarray(ignore_index).astype(labels.dtype))
    hidden, labels = mask(where, hidden, labels)
    classes = kernel.shape[1] * _devices(axis_name)
    require(lambda: valid(labels, classes), "labels", f"values in [0, {classes})", where)
    ok = valid(labels, classes)
    return hidden, kernel, jnp.where(ok, labels, 0).astype(jnp.int32), where, ok


def _factors(**arrays: Any) -> tuple[Array, Array]:
    """Hidden states and kernel, checked, in one dtype."""
    check_float(**arrays)
    (first, hidden), (second, kernel) = ((n, jnp.asarray(x)) for n, x in arrays.items())
    check_min_rank(1, **{first: hidden})
    if kernel.ndim != 2:
        expected = f"shape ({hidden.shape[-1]}, classes)"
        raise ValueError(message(second, expected, f"shape {kernel.shape}"))
    check_shape((hidden.shape[-1], kernel.shape[1]), **{second: kernel})
    if hidden.dtype != kernel.dtype:
        hidden, kernel = widen(hidden, kernel)
    return hidden, kernel


def _head(hidden: Array, kernel: Array, *, bias: Any, softcap: Any, z_loss: Any = 0) -> Head:
    (like,) = widen(hidden[..., :0])
    head = Head(kernel)
    if bias is not None:
        head = head._replace(bias=_vectors(kernel, like.dtype, bias=bias)[0])
    if not _untouched(z_loss):
        head = head._replace(z_loss=numbers(like, z_loss=z_loss)[0])
    if softcap is not None:
        head = head._replace(softcap=numbers(like, softcap=softcap)[0])
    return head


def _vectors(kernel: Array, dtype: Any, **vectors: Any) -> tuple[Array, ...]:
    check_shape(kernel.shape[1:], **vectors)
    return tuple(jnp.asarray(v).astype(dtype) for v in vectors.values())


def _of_label(vector: Array, labels: Array, axis_name: str | None) -> Array:
    if axis_name is None:
        return lookup(vector, labels)
    labels = labels - jax.lax.axis_index(axis_name) * vector.shape[0]
    inside = valid(labels, vector.shape[0])
    found = jnp.where(inside, lookup(vector, jnp.where(inside, labels, 0)), 0)
    return jax.lax.psum(found, axis_name)


def _flat(x: Array, features: int = 0) -> Array:
    """All tokens on one axis, before that of the features; only the first axis stays sharded."""
    axes = x.ndim - features
    x = unshard(x, *range(1, axes)) if axes > 1 else x
    return x.reshape(-1, *x.shape[axes:])


def _devices(axis_name: str | None) -> int:
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def _untouched(number: Any) -> bool:
    return isinstance(number, (int, float)) and number == 0


def _wide(x: Array) -> Any:
    return widen(x[..., :0])[0].dtype


def _size(chunk_size: Any) -> int:
    if (
        isinstance(chunk_size, bool)
        or not isinstance(chunk_size, (int, np.integer))
        or chunk_size < 1
    ):
        raise ValueError(message("chunk_size", "a positive integer", repr(chunk_size)))
    return int(chunk_size)


_HEAD = dict(hidden=draw_normal("B T D"), kernel=draw_normal("D C"), labels=draw_labels("B T"))


def _draw_eighths(dims: str) -> Draw:
    """A teacher, who has no gradient, in numbers that 16 bits hold."""
    return Draw(dims, lambda g, shape, _: np.round(8 * g.standard_normal(shape)) / 8, "fixed")


_IGNORED = {"reducing": "ignored units leave the denominator, which no array of units can show"}
_WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 1.5, 1.0, 3.0], np.float32)

CASES = (
    Case(
        linear_cross_entropy,
        _HEAD,
        dict(chunk_size=9, implementation="tokens"),
        sizes={"C": 7},
        label="tokens",
    ),
    Case(
        linear_cross_entropy,
        _HEAD,
        dict(chunk_size=3, implementation="vocabulary"),
        sizes={"C": 7},
        label="vocabulary",
    ),
    Case(
        linear_cross_entropy,
        _HEAD,
        dict(
            chunk_size=9,
            implementation="tokens",
            label_smoothing=0.1,
            z_loss=0.01,
            softcap=20.0,
            class_weights=_WEIGHTS,
            bias=_WEIGHTS,
            ignore_index=2,
        ),
        sizes={"C": 7},
        label="tokens with all options",
        without={
            **_IGNORED,
            "gradient_accuracy": "far beyond the cap slopes of exp(-2 |z| / cap) magnify rounding",
        },
    ),
    Case(
        linear_distillation_loss,
        dict(
            student_hidden=draw_normal("B T D"),
            student_kernel=draw_normal("D C"),
            teacher_hidden=_draw_eighths("B T V"),
            teacher_kernel=_draw_eighths("V C"),
        ),
        dict(temperature=1.5, chunk_size=9),
    ),
)
