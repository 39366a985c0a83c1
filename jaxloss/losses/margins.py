"""Hinge losses and their smooth relatives: how far a score is on the right side."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from .._core.case import Case, draw_labels, draw_normal, draw_signs
from .._core.checks import (
    check_float,
    check_integer,
    check_option,
    check_same_shape,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.labels import class_vectors, poison, prepare
from .._core.numerics import numbers, widen
from .._core.reduce import mask, reduce
from .._core.sharding import lookup, one_hot, pick
from .._core.sigmoid import sigmoid_costs
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "hinge_loss",
    "multi_margin_loss",
    "multiclass_hinge_loss",
    "soft_margin_loss",
    "squared_hinge_loss",
]


@compiled()
def hinge_loss(
    scores: Float[Array, "*shape"],
    labels: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hinge loss of a score, from 0 up: 0 as soon as the score is right by a margin of 1.

    $$ \ell = \max(0, 1 - y s) $$

    The gradient at the kink $y s = 1$ is 0. A label other than -1 and +1 (0 too) makes its unit
    NaN.

    Args:
        scores: Real scores; their sign is the prediction.
        labels: Same shape: -1 and +1, integers or floats.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Cortes and Vapnik, Support-Vector Networks, Machine Learning 1995. Equals
        `optax.losses.hinge_loss` and scikit-learn's `hinge_loss`.

    >>> hinge_loss(jnp.array([0.5, -2.0]), jnp.array([1, -1]))  # (0.5 + 0) / 2
    Array(0.25, dtype=float32)
    """
    values = jax.nn.relu(1 - _agreement(scores, labels, where))
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _agreement(scores: Array, labels: Any, where: Where | None) -> Array:
    """The score times its label of -1 or +1, NaN for any other label."""
    check_float(scores=scores)
    check_same_shape(scores=scores, labels=labels)
    if jnp.issubdtype(jnp.result_type(labels), jnp.bool_):
        raise TypeError(message("labels", "-1 and +1", "dtype bool"))
    scores, labels = widen(scores, labels)
    (scores,), (labels,) = mask(where, scores), mask(where, labels, fill=1)
    ok = jnp.abs(labels) == 1
    require(lambda: ok, "labels", "-1 or +1", where)
    return poison(scores, ok) * labels


@compiled()
def squared_hinge_loss(
    scores: Float[Array, "*shape"],
    labels: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared hinge loss of a score, from 0 up, with a continuous gradient.

    $$ \ell = \max(0, 1 - y s)^2 $$

    A label other than -1 and +1 (0 too) makes its unit NaN.

    Args:
        scores: Real scores; their sign is the prediction.
        labels: Same shape: -1 and +1, integers or floats.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Lee and Mangasarian, SSVM: A Smooth Support Vector Machine for Classification, Computational
        Optimization and Applications 2001. Equals Keras' `SquaredHinge` on labels -1 and +1.

    >>> squared_hinge_loss(jnp.array([0.5, -2.0]), jnp.array([1, -1]))  # (0.25 + 0) / 2
    Array(0.125, dtype=float32)
    """
    values = jax.nn.relu(1 - _agreement(scores, labels, where)) ** 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def soft_margin_loss(
    scores: Float[Array, "*shape"],
    labels: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Logistic loss of a score, in nats, from 0 up: a hinge without a kink.

    $$ \ell = \log(1 + e^{-y s}) $$

    A label other than -1 and +1 (0 too) makes its unit NaN.

    Args:
        scores: Log-odds of label +1.
        labels: Same shape: -1 and +1, integers or floats.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Friedman, Hastie and Tibshirani, Additive logistic regression: a statistical view of
        boosting, Annals of Statistics 2000. Equals torch's `soft_margin_loss`, and
        `sigmoid_binary_cross_entropy` with the labels `(1 + y) / 2`.

    >>> soft_margin_loss(jnp.array([0.0]), jnp.array([-1]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    values, _ = sigmoid_costs(_agreement(scores, labels, where))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def multiclass_hinge_loss(
    scores: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    *,
    margin: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""How much the true class falls short of beating its strongest rival by a margin, from 0 up.

    $$ \ell = \max\left(0, \; m + \max_{j \ne y} s_j - s_y\right) $$

    The gradient at the kink is 0; rivals of equal score share theirs. A label outside
    `[0, classes)` makes its unit NaN.

    Args:
        scores: Real scores, classes last.
        labels: Integers without the class axis.
        margin: Lead over the strongest rival from which the loss is 0, in the unit of the scores.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Crammer and Singer, On the Algorithmic Implementation of Multiclass Kernel-based Vector
        Machines, JMLR 2001. Equals `optax.losses.multiclass_hinge_loss` at margin 1. Keras'
        `CategoricalHinge` takes no rival score below 0.

    >>> multiclass_hinge_loss(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([1]))  # 3 + 1 - 2
    Array(2., dtype=float32)
    """
    check_integer(labels=labels)
    scores, labels, where = prepare(scores, labels, where=where, first="scores")
    (margin,) = numbers(scores, margin=margin)
    rivals = jnp.where(one_hot(labels, scores.shape[-1]), -jnp.inf, scores)
    lead = pick(scores, labels) - jnp.max(rivals, axis=-1)
    return reduce(jax.nn.relu(margin - lead), where=where, weights=weights, reduction=reduction)


@compiled("p")
def multi_margin_loss(
    scores: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    *,
    margin: Number = 1.0,
    p: int = 1,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hinges of the true class against every other class, over the number of classes, from 0 up.

    $$ \ell = \frac{w_y}{C} \sum_{j \ne y} \max(0, \; m + s_j - s_y)^p $$

    The gradient at each kink is 0. A label outside `[0, classes)` makes its unit NaN.

    Args:
        scores: Real scores, classes last.
        labels: Integers without the class axis.
        margin: Lead over a rival from which it costs nothing, in the unit of the scores.
        p: 1 for hinges, 2 for squared hinges.
        class_weights: Scales the loss of each true class.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Weston and Watkins, Multi-class Support Vector Machines, technical report, Royal Holloway
        1998. Equals torch's `multi_margin_loss`, whose `weight` is `class_weights`.

    >>> multi_margin_loss(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([1]))  # (0 + 2) / 3
    Array(0.6666667, dtype=float32)
    """
    check_option((1, 2), p=p)
    check_integer(labels=labels)
    scores, labels, where = prepare(scores, labels, where=where, first="scores")
    (margin,) = numbers(scores, margin=margin)
    lead = pick(scores, labels)[..., None] - scores
    rival = ~one_hot(labels, scores.shape[-1])
    values = jnp.mean(jax.nn.relu(jnp.where(rival, margin - lead, 0)) ** p, axis=-1)
    if class_weights is not None:
        (class_weights,) = class_vectors(scores, class_weights=class_weights)
        values *= lookup(class_weights, labels)
    return reduce(values, where=where, weights=weights, reduction=reduction)


_SIGNED = dict(scores=draw_normal("B T"), labels=draw_signs("B T"))
_CLASSES = dict(scores=draw_normal("B T C"), labels=draw_labels("B T"))
_WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0], np.float32)

CASES = (
    Case(hinge_loss, _SIGNED),
    Case(squared_hinge_loss, _SIGNED),
    Case(soft_margin_loss, _SIGNED),
    Case(multiclass_hinge_loss, _CLASSES, dict(margin=0.7)),
    Case(multi_margin_loss, _CLASSES, dict(margin=0.7)),
    Case(multi_margin_loss, _CLASSES, dict(p=2, class_weights=_WEIGHTS), label="squared"),
)
