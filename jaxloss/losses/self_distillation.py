"""Losses of a student that tells the cluster a teacher gave to another view of the same image."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import (
    check_array,
    check_float,
    check_min_rank,
    check_same_shape,
    check_shape,
    check_where,
    message,
)
from .._core.compiled import compiled
from .._core.moments import count_rows
from .._core.numerics import numbers, safe_mul, unit_vectors, widen, xlogx
from .._core.reduce import mask, reduce
from .._core.sinkhorn import check_iterations, largest_of_columns, log_sinkhorn
from .._core.softmax import RowNorm, neg_log_softmax, normalized, row_norm
from .._core.terms import Axis, Criterion, add_up, total
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["dino_loss", "ibot_loss", "msn_loss", "sinkhorn_knopp", "swav_loss"]


@compiled("axis_name")
def dino_loss(
    student_logits: Float[Array, "student_views batch classes"],
    teacher_logits: Shaped[Array, "teacher_views batch classes"],
    center: Shaped[Array, " classes"],
    *,
    student_temperature: Number = 0.1,
    teacher_temperature: Number = 0.04,
    center_momentum: Number = 0.9,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> tuple[Array, Float[Array, " classes"]]:
    r"""Self-distillation with no labels: cross-entropy to a teacher's other views, in nats.

    $$ \ell = -\frac{1}{|P|} \sum_{(t, s) \in P} \sum_k p_{tk} \log q_{sk}, \quad
       p = \mathrm{softmax}\, \frac{z^{\mathrm{teacher}} - c}{\tau_t}, \quad
       q = \mathrm{softmax}\, \frac{z^{\mathrm{student}}}{\tau_s} $$

    over the pairs $P$ of a teacher's and a student's view that differ. The center used is the one
    that comes in; the one that goes out is $m c + (1 - m)\, \mathrm{mean}\, z^{\mathrm{teacher}}$
    over the views and kept samples of this batch. Teacher and center carry no gradient.

    Args:
        student_logits: Output of the student for all views, `(views, batch, classes)`.
        teacher_logits: Output of the teacher for the first views of these, in the same order.
        center: Running mean of the teacher's logits, zeros at the beginning.
        student_temperature: Temperature $\tau_s$.
        teacher_temperature: Temperature $\tau_t$; it may follow a schedule.
        center_momentum: Share $m$ of the center that stays.
        where: Bool array `(batch,)`; the other samples do not move the center either.
        axis_name: Mapped axes over which the batch is split; the center is then moved by all of it.

    One unit per sample, the mean over its pairs; see `jaxloss.reduce`.

    Returns:
        The loss, a float32 scalar, or `(batch,)` if `reduction` is `"none"`, and the new center.

    Raises:
        ValueError: If there are no two views, or more of the teacher than of the student.

    Reference:
        Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021. Equals
        the authors' `DINOLoss` and lightly's.

    >>> student = jnp.log(jnp.array([[[0.5, 0.5]], [[0.8, 0.2]]]))
    >>> teacher = jnp.array([[[0.0, 8.0]]])  # the first view, of the second class
    >>> options = dict(student_temperature=1.0, center_momentum=0.75)
    >>> dino_loss(student, teacher, jnp.zeros(2), **options)  # -log 0.2; a quarter of the way
    (Array(1.609438, dtype=float32), Array([0., 2.], dtype=float32))
    """
    student, teacher = _views(where, student_logits=student_logits, teacher_logits=teacher_logits)
    check_shape(student.shape[2:], center=center)
    student_temperature, teacher_temperature, center_momentum = numbers(
        student,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        center_momentum=center_momentum,
    )
    center = _fixed(center, student)
    probs = _teacher(teacher, center, teacher_temperature)
    values = _mean_over_pairs(probs, student / student_temperature)
    count = teacher.shape[0] * count_rows(student[0], where, axis_name)
    seen = add_up(jnp.sum(teacher, axis=(0, 1)), axis_name)
    loss = reduce(values, where=where, weights=weights, reduction=reduction)
    return loss, _moved(center, seen, count, center_momentum)


@compiled("axis_name")
def ibot_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Shaped[Array, "*batch classes"],
    center: Shaped[Array, " classes"],
    *,
    student_temperature: Number = 0.1,
    teacher_temperature: Number = 0.04,
    center_momentum: Number = 0.9,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> tuple[Array, Float[Array, " classes"]]:
    r"""Self-distillation of masked patches: cross-entropy to the teacher's tokens, in nats.

    $$ \ell = -\sum_k p_k \log q_k, \quad
       p = \mathrm{softmax}\, \frac{z^{\mathrm{teacher}} - c}{\tau_t}, \quad
       q = \mathrm{softmax}\, \frac{z^{\mathrm{student}}}{\tau_s} $$

    The center used is the one that comes in; the one that goes out is
    $m c + (1 - m)\, \mathrm{mean}\, z^{\mathrm{teacher}}$ over the kept patches of this batch.
    Teacher and center carry no gradient.

    Args:
        student_logits: Output of the student, which saw the image without the masked patches,
            classes last, such as `(batch, patches, classes)`.
        teacher_logits: Output of the teacher, which saw all of it; same shape.
        center: Running mean of the teacher's logits, zeros at the beginning.
        student_temperature: Temperature $\tau_s$.
        teacher_temperature: Temperature $\tau_t$; it may follow a schedule.
        center_momentum: Share $m$ of the center that stays.
        where: Bool array of the masked patches, `*batch`; the others do not move the center either.
        axis_name: Mapped axes over which the batch is split; the center is then moved by all of it.

    One unit per patch; see `jaxloss.reduce`. With `reduction=sequence_mean` every image with a
    masked patch counts the same.

    Returns:
        The loss, a float32 scalar, or `*batch` if `reduction` is `"none"`, and the new center.

    Reference:
        Zhou et al., iBOT: Image BERT Pre-Training with Online Tokenizer, ICLR 2022. Equals
        lightly's and DINOv2's loss with `reduction=sequence_mean`, as long as every image has a
        masked patch; iBOT's own code moves the center by all patches.

    >>> teacher = jnp.array([[[0.0, 8.0]]])
    >>> ibot_loss(jnp.zeros((1, 1, 2)), teacher, jnp.zeros(2), center_momentum=0.75)  # log 2
    (Array(0.6931472, dtype=float32), Array([0., 2.], dtype=float32))
    """
    check_float(student_logits=student_logits)
    check_min_rank(1, student_logits=student_logits)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    batch, classes = student_logits.shape[:-1], student_logits.shape[-1]
    if where is not None:
        check_where(where)
        check_shape(batch, where=where)
    check_shape((classes,), center=center)
    student, teacher = mask(where, *widen(student_logits, teacher_logits))
    student_temperature, teacher_temperature, center_momentum = numbers(
        student,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        center_momentum=center_momentum,
    )
    center = _fixed(center, student)
    probs = _teacher(teacher, center, teacher_temperature)
    student = student / student_temperature
    values = _cross_entropy(probs, 1, student, row_norm(student))
    kept = jnp.full(batch, True) if where is None else jnp.asarray(where)
    count = add_up(jnp.sum(kept, dtype=student.dtype), axis_name)
    seen = add_up(jnp.sum(teacher, axis=tuple(range(len(batch)))), axis_name)
    loss = reduce(values, where=where, weights=weights, reduction=reduction)
    return loss, _moved(center, seen, count, center_momentum)


@compiled("iterations", "axis_name")
def swav_loss(
    student_scores: Float[Array, "student_views batch prototypes"],
    teacher_scores: Shaped[Array, "teacher_views batch prototypes"],
    *,
    temperature: Number = 0.1,
    epsilon: Number = 0.05,
    iterations: int = 3,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Swapped prediction: each view tells the balanced codes of the other views, in nats.

    $$ \ell = -\frac{1}{|P|} \sum_{(t, s) \in P} \sum_k Q_{tk} \log p_{sk}, \quad
       p = \mathrm{softmax}\, \frac{s}{\tau} $$

    over the pairs $P$ of different views, with the codes $Q$ that `sinkhorn_knopp` makes of each
    view of the teacher. They carry no gradient, and they couple the samples: the mean over
    microbatches is another loss.

    Args:
        student_scores: Cosines of all views with the prototypes, `(views, batch, prototypes)`.
        teacher_scores: Those of the first views of these, which supply the codes: in SwAV
            `student_scores[:2]`, the two large crops.
        temperature: Temperature $\tau$ of the predictions.
        epsilon: Temperature of the codes, in the unit of the scores.
        iterations: Iterations of the Sinkhorn-Knopp algorithm, at least 1.
        where: Bool array `(batch,)`; the other samples take no part in the balance.
        axis_name: Mapped axes over which the batch is split; codes are then balanced over all of
            it.

    One unit per sample, the mean over its pairs; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Raises:
        ValueError: If there are no two views, or more of the teacher than of the student.

    Reference:
        Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments,
        NeurIPS 2020. Equals the authors' loss without a queue, and lightly's.

    >>> scores = jnp.array([[[1.0, 0.0], [0.0, 1.0]]] * 2)
    >>> swav_loss(scores, scores, temperature=1.0)  # log(1 + 1 / e)
    Array(0.3132617, dtype=float32)
    """
    student, teacher = _views(where, student_scores=student_scores, teacher_scores=teacher_scores)
    temperature, epsilon = numbers(student, temperature=temperature, epsilon=epsilon)
    codes = _codes(teacher, epsilon, check_iterations(iterations), where, axis_name)
    values = _mean_over_pairs(codes, student / temperature)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("iterations", "axis_name")
def msn_loss(
    anchors: Float[Array, "*views batch features"],
    targets: Shaped[Array, "batch features"],
    prototypes: Shaped[Array, "prototypes features"],
    *,
    temperature: Number = 0.1,
    sharpen: Number = 0.25,
    entropy_weight: Number = 1.0,
    iterations: int = 3,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Criterion:
    r"""Masked siamese networks: masked views tell the cluster of the whole image, in nats.

    $$ \ell = -\mathrm{mean} \sum_k t_k \log p_k
       + \lambda \Big( \log K + \sum_k \bar p_k \log \bar p_k \Big), \quad
       p = \mathrm{softmax}\, \frac{\cos(a, c_k)}{\tau} $$

    with the mean $\bar p$ over all views and samples, whose entropy is to be large. The targets
    $t$ are the same softmax of `targets`, with temperature $T \tau$, balanced as by
    `sinkhorn_knopp`; they carry no gradient, neither to the targets nor to the prototypes.

    Args:
        anchors: Embeddings of the masked views, `(batch, features)` or
            `(views, batch, features)`; they need not be normalised.
        targets: Embeddings of the same samples by the target network.
        prototypes: Learned prototypes $c_k$; they need not be normalised.
        temperature: Temperature $\tau$.
        sharpen: Factor $T$ that makes the targets sharper; 1 leaves them as they are.
        entropy_weight: Weight $\lambda$ of the entropy's distance from its maximum.
        iterations: Iterations of the Sinkhorn-Knopp algorithm; 0 leaves the targets unbalanced.
        where: Bool array `(batch,)`; the other samples enter no statistic.
        axis_name: Mapped axes over which the batch is split; the statistics are then those of all
            of it and every device returns the same value.

    One unit per batch, a scalar; see `jaxloss.reduce`.

    Returns:
        The total, and its terms `cross_entropy` and `entropy` before the weight.

    Reference:
        Assran et al., Masked Siamese Networks for Label-Efficient Learning, ECCV 2022. Equals
        lightly's `MSNLoss` on one device.

    >>> axes = jnp.eye(2)
    >>> loss, terms = msn_loss(axes, axes, axes, temperature=1.0, sharpen=0.05)
    >>> loss, terms["entropy"]  # log(1 + 1 / e): each its own prototype, both equally often
    (Array(0.3132617, dtype=float32), Array(0., dtype=float32))
    """
    check_float(anchors=anchors)
    check_min_rank(2, anchors=anchors)
    batch, features = anchors.shape[-2:]
    check_shape((batch, features), targets=targets)
    check_array(prototypes=prototypes)
    if jnp.ndim(prototypes) != 2 or jnp.shape(prototypes)[1] != features:
        expected = f"shape (prototypes, {features})"
        raise ValueError(message("prototypes", expected, f"shape {jnp.shape(prototypes)}"))
    if where is not None:
        check_where(where)
        check_shape((batch,), where=where)
    spread = None if where is None else jnp.broadcast_to(where, anchors.shape[:-1])
    anchors, targets, prototypes = widen(anchors, targets, prototypes)
    (anchors,), (targets,) = mask(spread, anchors), mask(where, targets)
    temperature, sharpen = numbers(anchors, temperature=temperature, sharpen=sharpen)
    anchors, targets, prototypes = map(unit_vectors, (anchors, targets, prototypes))
    cosines = lambda x: jnp.einsum("...bd,kd->...bk", x, prototypes, precision="highest")
    aims = jax.lax.stop_gradient(cosines(targets) / (temperature * sharpen))
    aims = jax.nn.log_softmax(aims, axis=-1)
    if check_iterations(iterations, 0):
        aims = _codes(aims, jnp.ones_like(temperature), iterations, where, axis_name)
    else:
        aims = jnp.exp(aims)
    costs = neg_log_softmax(cosines(anchors) / temperature)  # (*views, batch, prototypes)
    aims = jnp.broadcast_to(aims, costs.shape)
    probs, costs = mask(spread, jnp.exp(-costs), jnp.sum(aims * costs, axis=-1))
    count = (anchors.size // max(batch * features, 1)) * count_rows(targets, where, axis_name)
    clusters = probs.shape[-1]
    mean = add_up(jnp.sum(probs, axis=tuple(range(probs.ndim - 1))), axis_name)
    mean = clusters * mean / jnp.maximum(count, 1)  # 1 where all are alike
    terms = dict(
        cross_entropy=add_up(jnp.sum(costs), axis_name) / jnp.maximum(count, 1),
        entropy=jnp.sum(_excess(mean)) / max(clusters, 1),
    )
    value, terms = total(terms, cross_entropy=1.0, entropy=entropy_weight)
    return reduce(value, where=count > 0, weights=weights, reduction=reduction), terms


@compiled("iterations", "axis_name")
def sinkhorn_knopp(
    scores: Float[Array, "batch prototypes"],
    *,
    epsilon: Number = 0.05,
    iterations: int = 3,
    where: Where | None = None,
    axis_name: Axis = None,
) -> Float[Array, "batch prototypes"]:
    r"""Soft codes of samples that use all prototypes equally often; without a gradient.

    $$ Q = \mathrm{diag}(u) \exp(S / \epsilon)\, \mathrm{diag}(v) $$

    Each iteration scales the columns of the matrix to equal sums, then the rows to a sum of 1; it
    is done on logarithms, so that scores of any size are fine.

    Args:
        scores: How well each sample fits each prototype, such as cosines.
        epsilon: Temperature, in the unit of the scores; a small one makes the codes sharp.
        iterations: Number of iterations, at least 1; the more, the better the balance.
        where: Bool array `(batch,)`; the other samples take no part and have code 0.
        axis_name: Mapped axes over which the batch is split; columns then have equal sums over
            all of it.

    Returns:
        Codes of the shape of `scores` in float32; each kept row sums to 1.

    Reference:
        Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, NIPS 2013; Caron et
        al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS
        2020, whose code overflows from scores of 4.5 on.

    >>> sinkhorn_knopp(jnp.array([[1.0, 0.0], [1.0, 0.0]]))  # alike, so each is half of both
    Array([[0.5, 0.5],
           [0.5, 0.5]], dtype=float32)
    """
    check_float(scores=scores)
    if jnp.ndim(scores) != 2:
        raise ValueError(message("scores", "shape (batch, prototypes)", f"shape {scores.shape}"))
    if where is not None:
        check_where(where)
        check_shape(scores.shape[:1], where=where)
    (scores,) = mask(where, *widen(scores))
    (epsilon,) = numbers(scores, epsilon=epsilon)
    return _codes(scores, epsilon, check_iterations(iterations), where, axis_name)


def _codes(
    scores: Array, epsilon: Array, iterations: int, where: Where | None, axis_name: Axis
) -> Array:
    """Balanced codes of the last two axes; hidden rows hold numbers and get code 0."""
    scores, epsilon = jax.lax.stop_gradient((scores, epsilon))
    rows = None if where is None else jnp.broadcast_to(where, scores.shape[:-1])
    # What a column has in common goes away in the first step; taken off before the division it
    # costs no digits.
    scores = scores - largest_of_columns(scores, rows, axis_name)
    return jnp.exp(log_sinkhorn(scores / epsilon, iterations, rows=rows, axis_name=axis_name))


@jax.custom_jvp
def _excess(ratio: Array) -> Array:
    """`r log r - r + 1`; where the ratios have mean 1 their mean is that of r log r.

    Its derivative log r is small near 1, that of r log r is not and would have to cancel.
    """
    return xlogx(ratio) - (ratio - 1)


@_excess.defjvp
def _excess_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (ratio,), (moved,) = primals, tangents
    zero = ratio == 0
    return _excess(ratio), jnp.where(zero, 0, jnp.log(jnp.where(zero, 1, ratio))) * moved


def _views(where: Where | None, **arrays: Any) -> tuple[Array, Array]:
    """Outputs of student and teacher, checked, masked and widened; the teacher's is fixed."""
    (first, student), (second, teacher) = arrays.items()
    check_float(**{first: student})
    if jnp.ndim(student) != 3:
        raise ValueError(message(first, "shape (views, batch, classes)", f"shape {student.shape}"))
    views, batch, classes = student.shape
    if views < 2:
        raise ValueError(message(first, "at least two views", f"shape {student.shape}"))
    check_array(**{second: teacher})
    shape = jnp.shape(teacher)
    check_shape((*shape[:1], batch, classes), **{second: teacher})
    if not 1 <= shape[0] <= views:
        raise ValueError(message(second, f"1 to {views} views", f"shape {shape}"))
    if where is not None:
        check_where(where)
        check_shape((batch,), where=where)
    student, teacher = widen(student, teacher)
    student, teacher = (
        mask(None if where is None else jnp.broadcast_to(where, x.shape[:2]), x)[0]
        for x in (student, teacher)
    )
    return student, jax.lax.stop_gradient(teacher)


def _fixed(center: Any, like: Array) -> Array:
    return jax.lax.stop_gradient(jnp.asarray(center).astype(like.dtype))


def _teacher(logits: Array, center: Array, temperature: Array) -> Array:
    """Probabilities of the teacher; its largest logit goes before the division costs digits."""
    logits, temperature = jax.lax.stop_gradient((logits, temperature))
    x = logits - center.reshape((1,) * (logits.ndim - 1) + center.shape)
    return jax.nn.softmax((x - jnp.max(x, axis=-1, keepdims=True)) / temperature, axis=-1)


def _mean_over_pairs(probs: Array, logits: Array) -> Array:
    """Cross-entropy, mean over the pairs of views that differ, `(t, b, k), (s, b, k) -> (b,)`."""
    norm = row_norm(logits)
    total, pairs = jnp.zeros_like(norm.above[0]), 0
    for s in range(logits.shape[0]):
        others = [probs[t] for t in range(probs.shape[0]) if t != s]
        if others:
            row = jax.tree.map(lambda x, s=s: x[s], norm)
            summed = sum(others[1:], others[0])
            total += _cross_entropy(summed, len(others), logits[s], row)
            pairs += len(others)
    return total / pairs


def _cross_entropy(probs: Array, mass: int, logits: Array, norm: RowNorm) -> Array:
    """`-sum_k probs_k log_softmax(logits)_k` of probabilities that add up to `mass`.

    Taken apart like this a gradient needs no copy of the logits.
    """
    below = normalized(logits, norm._replace(above=jnp.zeros_like(norm.above)))
    return mass * norm.above - jnp.sum(safe_mul(probs, below), axis=-1)


def _moved(center: Array, seen: Array, count: Array, momentum: Array) -> Array:
    """The center after a batch with this sum of teacher's logits."""
    mean = seen / jnp.maximum(count, 1)
    moved = momentum * center + (1 - momentum) * mean
    return jax.lax.stop_gradient(jnp.where(count > 0, moved, center))


def _draw_fixed(dims: str) -> Draw:
    return Draw(dims, lambda g, shape, _: g.integers(-16, 17, shape) / 8, "fixed")


_SIZES = {"S": 3, "V": 2}
_LOGITS = dict(
    student_logits=draw_normal("S B C"),
    teacher_logits=_draw_fixed("V B C"),
    center=_draw_fixed("C"),
)
_TEMPERATURES = dict(student_temperature=0.5, teacher_temperature=0.3, center_momentum=0.7)
_COUPLED = {"microbatches": "codes are balanced over the whole batch"}

CASES = (
    Case(dino_loss, _LOGITS, _TEMPERATURES, positions="B", sizes=_SIZES),
    Case(
        ibot_loss,
        dict(
            student_logits=draw_normal("B T C"),
            teacher_logits=_draw_fixed("B T C"),
            center=_draw_fixed("C"),
        ),
        _TEMPERATURES,
    ),
    Case(
        swav_loss,
        dict(student_scores=draw_normal("S B C"), teacher_scores=_draw_fixed("V B C")),
        dict(temperature=0.5, epsilon=0.4, iterations=4),
        positions="B",
        sizes=_SIZES,
        coupled=True,
        without=dict(_COUPLED, weight_two="a sample seen twice is balanced as two samples"),
    ),
    Case(
        msn_loss,
        dict(
            anchors=draw_normal("V B D"),
            targets=_draw_fixed("B D"),
            prototypes=draw_normal("K D"),
        ),
        dict(temperature=0.6, sharpen=0.5, entropy_weight=2.0, iterations=2),
        positions="B",
        sizes=dict(V=2, K=3),
        coupled=True,
        without=dict(
            _COUPLED,
            numerical="targets carry no gradient to the prototypes",
        ),
    ),
)
