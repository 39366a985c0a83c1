"""Losses between the distributions of a student and a teacher over a vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, Draw, draw_log_probs, draw_normal, draw_probs
from .._core.checks import (
    check_float,
    check_integer,
    check_min_rank,
    check_same_shape,
    check_shape,
    check_where,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison, valid
from .._core.logit_divergences import jsd_of_logits, kl_of_logits
from .._core.numerics import absolute, numbers, safe_log, safe_mul, widen
from .._core.reduce import mask, reduce
from .._core.sharding import one_hot, pick
from .._core.softmax import normalized, row_norm, safe_log_sum_exp
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "distillation_loss",
    "generalized_jsd",
    "reverse_distillation_loss",
    "top_k_distillation_loss",
    "top_k_distillation_loss_renormalized",
    "top_k_distillation_loss_with_tail",
    "total_variation_distance",
]


@compiled()
def distillation_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Knowledge distillation: divergence of the student from the teacher, in nats, from 0 up.

    $$ \ell = \tau^2\, \mathrm{KL}(t \| s), \quad t = \mathrm{softmax}(z^t / \tau), \;
       s = \mathrm{softmax}(z^s / \tau) $$

    The teacher has no gradient; a class of teacher logit -inf costs nothing. Each class contributes
    at least 0, so the value keeps its digits as the student nears the teacher. The mix with a loss
    of hard labels is a sum of the caller's. Value and gradient need one float32 copy of the logits
    beside what comes in and goes out, from 16-bit logits two.

    Args:
        student_logits: Unnormalised log-probabilities, classes last.
        teacher_logits: The same of the teacher.
        temperature: Divides both logits; its square keeps the size of the gradient.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015. Equals torch's
        `kl_div` of log-softmaxes with `log_target=True, reduction="batchmean"`, times the squared
        temperature, which TRL and Liger leave out.

    >>> student, teacher = jnp.zeros((1, 2)), jnp.array([[0.0, -jnp.inf]])
    >>> distillation_loss(student, teacher)  # log 2
    Array(0.6931472, dtype=float32)
    """
    student, teacher, (temperature,) = _pair(
        student_logits, teacher_logits, where, temperature=temperature
    )
    values = jnp.square(temperature) * kl_of_logits(teacher / temperature, student / temperature)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def reverse_distillation_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Distillation that seeks a mode: divergence of the teacher from the student, from 0 up.

    $$ \ell = \tau^2\, \mathrm{KL}(s \| t), \quad t = \mathrm{softmax}(z^t / \tau), \;
       s = \mathrm{softmax}(z^s / \tau) $$

    The teacher has no gradient. A class that the teacher rules out and the student does not costs
    infinity.

    Args:
        student_logits: Unnormalised log-probabilities, classes last.
        teacher_logits: The same of the teacher.
        temperature: Divides both logits; its square keeps the size of the gradient.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, ICLR 2024. TRL's and
        Liger's generalised divergence at `beta=1`, which has no squared temperature.

    >>> student, teacher = jnp.array([[0.0, -jnp.inf]]), jnp.zeros((1, 2))
    >>> reverse_distillation_loss(student, teacher)  # log 2
    Array(0.6931472, dtype=float32)
    """
    student, teacher, (temperature,) = _pair(
        student_logits, teacher_logits, where, temperature=temperature
    )
    values = jnp.square(temperature) * kl_of_logits(student / temperature, teacher / temperature)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def generalized_jsd(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    beta: Number = 0.5,
    temperature: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Generalised Jensen-Shannon divergence of student and teacher, in nats, in `[0, log 2]`.

    $$ \ell = \beta\, \mathrm{KL}(t \| m) + (1 - \beta)\, \mathrm{KL}(s \| m), \quad
       m = \beta\, t + (1 - \beta)\, s $$

    for $t = \mathrm{softmax}(z^t / \tau)$ and $s$ likewise. The teacher has no gradient. As
    $\beta \to 0$ the value goes to 0 and $\ell / \beta$ to the forward divergence, and towards 1
    to the reverse one; for the ends themselves call `distillation_loss` and
    `reverse_distillation_loss`. Value and gradient need three float32 copies of the logits.

    Args:
        student_logits: Unnormalised log-probabilities, classes last.
        teacher_logits: The same of the teacher.
        beta: Weight of the teacher, between 0 and 1; at both ends the loss is 0.
        temperature: Divides both logits; not squared into the value.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Agarwal et al., On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes, ICLR 2024. TRL and Liger take `beta` 0 and 1 for the forward and the reverse
        divergence, so that their value jumps there. At 1/2 it is the square of SciPy's
        `jensenshannon`.

    >>> student, teacher = jnp.array([[0.0, -jnp.inf]]), jnp.array([[-jnp.inf, 0.0]])
    >>> generalized_jsd(student, teacher)  # log 2
    Array(0.6931472, dtype=float32)
    """
    student, teacher, (temperature, beta) = _pair(
        student_logits, teacher_logits, where, temperature=temperature, beta=beta
    )
    require(lambda: (beta >= 0) & (beta <= 1), "beta", "a value in [0, 1]")
    values = jsd_of_logits(teacher / temperature, student / temperature, beta)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def top_k_distillation_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_log_probs: Float[Array, "*batch k"],
    teacher_indices: Integer[Array, "*batch k"],
    *,
    temperature: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Distillation from the teacher's likeliest classes alone, in nats, from `-1/e` up.

    $$ \ell = \tau^2 \sum_{k \in K} t_k (\log t_k - \log s_k), \quad
       s = \mathrm{softmax}(z^s / \tau) $$

    Neither distribution is renormalised to the classes $K$, so the value is less than 0 where the
    student puts more on them than the teacher. The teacher has no gradient. An index that is named
    twice or lies outside `[0, classes)` makes its row NaN.

    Args:
        student_logits: Unnormalised log-probabilities, all classes, last.
        teacher_log_probs: Log-probabilities $\log t_k$ of some classes, at the same temperature.
        teacher_indices: Which classes these are, integers of the same shape.
        temperature: Divides the student's logits; its square keeps the size of the gradient.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, cut to some
        classes as in verl. With all classes it equals `distillation_loss`.

    >>> teacher = jnp.array([[jnp.log(0.5)]])
    >>> top_k_distillation_loss(jnp.zeros((1, 4)), teacher, jnp.array([[2]]))  # log(2) / 2
    Array(0.3465736, dtype=float32)
    """
    student, log_t, indices, (temperature,) = _top_k(
        student_logits, teacher_log_probs, teacher_indices, where, temperature=temperature
    )
    log_s = _log_probs_at(student / temperature, indices)
    values = jnp.square(temperature) * jnp.sum(_cross(log_t, log_s), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def top_k_distillation_loss_renormalized(
    student_logits: Float[Array, "*batch classes"],
    teacher_log_probs: Float[Array, "*batch k"],
    teacher_indices: Integer[Array, "*batch k"],
    *,
    temperature: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Distillation among the teacher's likeliest classes, both renormalised, from 0 up.

    $$ \ell = \tau^2\, \mathrm{KL}(t \| s), \quad t \propto t_k, \; s \propto \exp(z^s_k / \tau), \;
       k \in K $$

    The student's other classes have no gradient. Nor has the teacher. An index that is named twice
    or lies outside `[0, classes)` makes its row NaN.

    Args:
        student_logits: Unnormalised log-probabilities, all classes, last.
        teacher_log_probs: Log-probabilities of some classes, up to a constant, at the same
            temperature.
        teacher_indices: Which classes these are, integers of the same shape.
        temperature: Divides the student's logits; its square keeps the size of the gradient.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, cut to some
        classes as in tunix and maxtext. With all classes it equals `distillation_loss`.

    >>> teacher, indices = jnp.array([[0.0, -jnp.inf]]), jnp.array([[2, 0]])
    >>> top_k_distillation_loss_renormalized(jnp.zeros((1, 4)), teacher, indices)  # log 2
    Array(0.6931472, dtype=float32)
    """
    student, log_t, indices, (temperature,) = _top_k(
        student_logits, teacher_log_probs, teacher_indices, where, temperature=temperature
    )
    values = jnp.square(temperature) * kl_of_logits(
        log_t, _pick_all(student, indices) / temperature
    )
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def top_k_distillation_loss_with_tail(
    student_logits: Float[Array, "*batch classes"],
    teacher_log_probs: Float[Array, "*batch k"],
    teacher_indices: Integer[Array, "*batch k"],
    *,
    temperature: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Distillation from the teacher's likeliest classes and one bucket for the rest, from 0 up.

    $$ \ell = \tau^2 \Big( \sum_{k \in K} t_k \log \frac{t_k}{s_k} +
       \bar t \log \frac{\bar t}{\bar s} \Big), \quad \bar t = 1 - \sum_{k \in K} t_k, \;
       \bar s = \sum_{k \notin K} s_k $$

    The student's tail is summed from its own classes, so it keeps its digits where $K$ holds nearly
    everything. The teacher has no gradient. An index that is named twice or lies outside
    `[0, classes)` makes its row NaN.

    Args:
        student_logits: Unnormalised log-probabilities, all classes, last.
        teacher_log_probs: Log-probabilities $\log t_k$ of some classes, at the same temperature.
        teacher_indices: Which classes these are, integers of the same shape.
        temperature: Divides the student's logits; its square keeps the size of the gradient.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, with the
        classes beyond the first taken as one. With all classes it equals `distillation_loss`.

    >>> teacher = jnp.log(jnp.array([[0.5]]))
    >>> loss = top_k_distillation_loss_with_tail
    >>> loss(jnp.zeros((1, 4)), teacher, jnp.array([[2]]))  # (log(2) - log(3 / 2)) / 2
    Array(0.14384103, dtype=float32)
    """
    student, log_t, indices, (temperature,) = _top_k(
        student_logits, teacher_log_probs, teacher_indices, where, temperature=temperature
    )
    student = student / temperature
    rest = jnp.where(_named(indices, student.shape[-1]), -jnp.inf, student)
    bucket = jnp.stack([safe_log(_tail(log_t)), safe_log_sum_exp(rest)])[..., None]
    log_t = jnp.concatenate([log_t, bucket[0]], axis=-1)
    some = jnp.concatenate([_pick_all(student, indices), bucket[1]], axis=-1)
    values = jnp.square(temperature) * kl_of_logits(log_t, some)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def total_variation_distance(
    log_probs: Float[Array, "*batch classes"],
    target: Shaped[Array, "*batch classes"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Total variation distance of a prediction from a target distribution, in `[0, 1]`.

    $$ \ell = \tfrac{1}{2} \sum_k |p_k - t_k| $$

    The gradient is 0 at a class on which both agree.

    Args:
        log_probs: Log-probabilities $\log p$, classes last; they are not normalised again.
        target: Probabilities $t$ of the same shape.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Gibbs and Su, On Choosing and Bounding Probability Metrics, International Statistical Review
        2002. Liger's `tvd` for distillation.

    >>> total_variation_distance(jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[1.0, 0.0]]))
    Array(0.5, dtype=float32)
    """
    check_float(log_probs=log_probs)
    check_min_rank(1, log_probs=log_probs)
    check_same_shape(log_probs=log_probs, target=target)
    log_probs, target = mask(where, *widen(log_probs, target))
    require(lambda: target >= 0, "target", "values of at least 0", where)
    values = jnp.sum(absolute(jnp.exp(log_probs) - target), axis=-1) / 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _pair(
    student: Array, teacher: Array, where: Where | None, **options: Any
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Check, mask and widen the logits; the teacher's without a gradient."""
    check_float(student_logits=student, teacher_logits=teacher)
    check_min_rank(1, student_logits=student)
    check_same_shape(student_logits=student, teacher_logits=teacher)
    student, teacher = mask(where, *widen(student, teacher))
    values = numbers(student, **options)
    require(lambda: values[0] > 0, "temperature", "a value above 0")
    return student, jax.lax.stop_gradient(teacher), values


def _top_k(
    student: Array, log_probs: Array, indices: Array, where: Where | None, **options: Any
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """Check, mask and widen; the student is poisoned where an index is bad or named twice."""
    check_float(student_logits=student, teacher_log_probs=log_probs)
    check_min_rank(1, student_logits=student, teacher_log_probs=log_probs)
    classes, k = student.shape[-1], log_probs.shape[-1]
    check_shape((*student.shape[:-1], k), teacher_log_probs=log_probs)
    check_integer(teacher_indices=indices)
    check_same_shape(teacher_log_probs=log_probs, teacher_indices=indices)
    if k > classes:
        raise ValueError(message("teacher_indices", f"at most {classes} classes", f"{k}"))
    indices = jnp.asarray(indices)
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)
    if where is not None:
        check_where(where)
        check_shape(student.shape[:-1], where=where)
        student, log_probs = mask(where, student, log_probs)
        spare = jnp.broadcast_to(jnp.arange(k, dtype=indices.dtype), indices.shape)
        indices = jnp.where(jnp.asarray(where)[..., None], indices, spare)
    student, log_probs = widen(student, log_probs)
    in_order = jnp.sort(indices, axis=-1)
    twice = jnp.any(in_order[..., 1:] == in_order[..., :-1], axis=-1)
    ok = jnp.all(valid(indices, classes), axis=-1)
    require(lambda: ok, "teacher_indices", f"values in [0, {classes})", where)
    require(lambda: ~twice, "teacher_indices", "each class once", where)
    values = numbers(student, **options)
    require(lambda: values[0] > 0, "temperature", "a value above 0")
    student = poison(student, (ok & ~twice)[..., None])
    return student, jax.lax.stop_gradient(log_probs), indices, values


def _pick_all(values: Array, indices: Array) -> Array:
    return jax.vmap(pick, in_axes=(None, -1), out_axes=-1)(values, indices)


def _log_probs_at(logits: Array, indices: Array) -> Array:
    """Log-probabilities of some classes."""
    return normalized(_pick_all(logits, indices), row_norm(logits), indices)


def _tail(log_probs: Array) -> Array:
    """What some probabilities lack to 1, at least 0; exact also where one of them is almost 1."""
    hit = one_hot(jnp.argmax(log_probs, axis=-1), log_probs.shape[-1])
    largest = jnp.max(log_probs, axis=-1, initial=-jnp.inf)
    rest = jnp.sum(jnp.where(hit, 0, jnp.exp(log_probs)), axis=-1)
    return jnp.maximum(-jnp.expm1(largest) - rest, 0)


def _named(indices: Array, classes: int) -> Array:
    """Which classes each row names: `(*batch, k) -> (*batch, classes)`."""
    mark = lambda row: jnp.zeros(classes, bool).at[row].set(True, mode="drop")
    for _ in range(indices.ndim - 1):
        mark = jax.vmap(mark)
    return mark(indices)


def _cross(log_a: Array, log_b: Array) -> Array:
    """The product a (log a - log b), and 0 where a is 0."""
    return safe_mul(jnp.exp(log_a), jnp.where(log_a == -jnp.inf, 0, log_a - log_b))


def _draw_top(dims: str) -> Draw:
    """Log-probabilities of some of the classes, together less than 1; 16 bits hold them."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        log_probs = np.log(g.dirichlet(np.ones(shape[-1] + 1), shape[:-1])[..., :-1])
        return np.floor(8 * np.maximum(log_probs, -15)) / 8

    return Draw(dims, sample, "fixed")


def _draw_indices(dims: str) -> Draw:
    """Different classes."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], sizes: Any) -> np.ndarray:
        every = np.argsort(g.random((*shape[:-1], sizes["C"])), axis=-1)
        return every[..., : shape[-1]].astype(np.int32)

    return Draw(dims, sample, "fixed")


_LOGITS = dict(
    student_logits=draw_normal("B T C", scale=2), teacher_logits=draw_normal("B T C", scale=2)
)
_TOP = dict(
    student_logits=draw_normal("B T C", scale=2),
    teacher_log_probs=_draw_top("B T K"),
    teacher_indices=_draw_indices("B T K"),
)
_STOPPED = {"numerical": "the teacher moves the value, yet has no gradient"}

CASES = (
    Case(distillation_loss, _LOGITS, dict(temperature=2.5), zero_at_target=True, without=_STOPPED),
    Case(
        reverse_distillation_loss,
        _LOGITS,
        dict(temperature=2.5),
        zero_at_target=True,
        without=_STOPPED,
    ),
    Case(
        generalized_jsd,
        _LOGITS,
        dict(beta=0.3, temperature=1.5),
        zero_at_target=True,
        without=_STOPPED,
    ),
    Case(top_k_distillation_loss, _TOP, dict(temperature=1.5), sizes={"K": 2}),
    Case(top_k_distillation_loss_renormalized, _TOP, dict(temperature=1.5), sizes={"K": 2}),
    Case(top_k_distillation_loss_with_tail, _TOP, dict(temperature=1.5), sizes={"K": 2}),
    Case(
        total_variation_distance,
        dict(log_probs=draw_log_probs("B T C"), target=draw_probs("B T C")),
    ),
)
