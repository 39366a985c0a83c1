"""Losses of examples that carry any number of labels."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from .._core.case import Case, draw_binary, draw_normal, draw_unit
from .._core.checks import check_min_rank, check_shape, check_where, message, require
from .._core.compiled import compiled
from .._core.labels import class_vectors
from .._core.numerics import numbers, safe_div, safe_mul
from .._core.reduce import reduce
from .._core.sigmoid import binary_cross_entropy, prepare_binary
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["multilabel_soft_margin_loss", "soft_f1_loss"]


@compiled("axis_name")
def soft_f1_loss(
    probs: Float[Array, "batch classes"],
    labels: Shaped[Array, "batch classes"],
    *,
    smooth: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""One minus the F1 score of each class over the batch, made differentiable, in `[0, 1]`.

    $$ \ell = 1 - \frac{2\,\mathrm{TP} + s}{2\,\mathrm{TP} + \mathrm{FN} + \mathrm{FP} + s}, \quad
       \mathrm{TP} = \sum_i y_i p_i, \; \mathrm{FN} = \sum_i y_i (1 - p_i), \;
       \mathrm{FP} = \sum_i (1 - y_i) p_i $$

    The sums run over the batch, so examples are coupled: the mean over microbatches is not the loss
    of the batch. A class that is neither present nor predicted costs 0. An integer label other than
    0 and 1 makes its class NaN.

    Args:
        probs: Probabilities of label 1, `(batch, classes)`.
        labels: Same shape: integers 0 and 1, bools, or shares in `[0, 1]`.
        smooth: Added above and below; draws rare classes towards 0.
        where: Bool array `(batch,)` of the examples that count.
        weights: One for each class.
        axis_name: Mapped axes over which the batch is split; the sums then run over all of it.

    Units are the classes; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(classes,)` if `reduction` is `"none"`.

    Reference:
        Pastor-Pellicer et al., F-measure as the error function to train neural networks, IWANN
        2013. On probabilities 0 and 1 it equals one minus scikit-learn's `f1_score` with
        `average=None` and `zero_division=1`.

    >>> probs = jnp.array([[1.0], [0.5], [0.0]])
    >>> soft_f1_loss(probs, jnp.array([[1], [1], [0]]))  # 1 - 3 / 3.5
    Array(0.14285715, dtype=float32)
    """
    check_min_rank(2, probs=probs)
    if probs.ndim != 2:
        raise ValueError(message("probs", "shape (batch, classes)", f"shape {probs.shape}"))
    if where is not None:
        check_where(where)
        check_shape(probs.shape[:1], where=where)
    probs, labels = prepare_binary(probs, labels, where, first="probs")
    require(lambda: (probs >= 0) & (probs <= 1), "probs", "values in [0, 1]", where)
    (smooth,) = numbers(probs, smooth=smooth)
    hits = jnp.sum(labels * probs, axis=0)  # (classes,)
    errors = jnp.sum(labels * (1 - probs) + (1 - labels) * probs, axis=0)
    if axis_name is not None:
        hits, errors = jax.lax.psum((hits, errors), axis_name)
    values = safe_div(errors, 2 * hits + errors + smooth)
    return reduce(values, weights=weights, reduction=reduction)


@compiled()
def multilabel_soft_margin_loss(
    logits: Float[Array, "*batch classes"],
    labels: Shaped[Array, "*batch classes"],
    *,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean over the classes of their binary cross-entropy, in nats, from 0 up.

    $$ \ell = -\tfrac{1}{C} \sum_c w_c \left( y_c \log \sigma(z_c)
       + (1 - y_c) \log (1 - \sigma(z_c)) \right) $$

    An integer label other than 0 and 1 makes its row NaN.

    Args:
        logits: Log-odds of each class, classes last.
        labels: Same shape: integers 0 and 1, bools, or shares in `[0, 1]`.
        class_weights: Scales the cost of each class; the mean still divides by their number.
        where: Bool array `*batch` of the rows that count.

    One unit per row; see `jaxloss.reduce`. `sigmoid_binary_cross_entropy` has one per element.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Good, Rational Decisions, JRSS B 1952, for each class. Equals torch's
        `multilabel_soft_margin_loss`, whose `weight` is `class_weights`.

    >>> multilabel_soft_margin_loss(jnp.array([[0.0, 0.0]]), jnp.array([[1, 0]]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    check_min_rank(1, logits=logits)
    if where is not None:
        check_where(where)
        check_shape(logits.shape[:-1], where=where)
    logits, labels = prepare_binary(logits, labels, where)
    costs = binary_cross_entropy(logits, labels)
    if class_weights is not None:
        (class_weights,) = class_vectors(logits, class_weights=class_weights)
        costs = safe_mul(jnp.broadcast_to(class_weights, costs.shape), costs)
    values = jnp.mean(costs, axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


_PROBS = dict(probs=draw_unit("B C"), labels=draw_binary("B C"))
_LOGITS = dict(logits=draw_normal("B T C", scale=2), labels=draw_binary("B T C"))
_WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0], np.float32)
_COUPLED = {"microbatches": "F1 is a ratio of sums over the batch, not a mean over examples"}

CASES = (
    Case(soft_f1_loss, _PROBS, positions="B", coupled=True, without=_COUPLED),
    Case(
        soft_f1_loss,
        _PROBS,
        dict(smooth=0.5),
        label="smooth",
        positions="B",
        coupled=True,
        without=_COUPLED,
    ),
    Case(multilabel_soft_margin_loss, _LOGITS),
    Case(multilabel_soft_margin_loss, _LOGITS, dict(class_weights=_WEIGHTS), label="weighted"),
)
