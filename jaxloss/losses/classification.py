"""Cross-entropy between logits and labels, binary and categorical, and its closest relatives."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from .._core.case import Case, draw_binary, draw_labels, draw_log_probs, draw_normal, draw_probs
from .._core.checks import check_array, require
from .._core.compiled import compiled
from .._core.labels import class_vectors, label_values, prepare
from .._core.numerics import expm1, numbers, safe_mul
from .._core.reduce import reduce
from .._core.sigmoid import prepare_binary, sigmoid_costs
from .._core.softmax import cross_entropy, neg_log_softmax
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "nll_loss",
    "poly_loss_cross_entropy",
    "sigmoid_binary_cross_entropy",
    "softmax_cross_entropy",
]


@compiled()
def sigmoid_binary_cross_entropy(
    logits: Float[Array, "*shape"],
    labels: Shaped[Array, "*shape"],
    *,
    pos_weight: Number | Float[ArrayLike, " classes"] | None = None,
    label_smoothing: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Binary cross-entropy (log loss) of a logit, in nats, from 0 up.

    $$ \ell = -w\, y \log \sigma(z) - (1 - y) \log(1 - \sigma(z)) $$

    with $y$ replaced by $(1 - a)\, y + a / 2$ under label smoothing $a$. An integer label other
    than 0 and 1 makes its unit NaN. Logits may be infinite: a cost of weight 0 is 0.

    Args:
        logits: Log-odds of label 1. Multi-label problems put their classes last.
        labels: Same shape: integers 0 and 1, bools, or shares in `[0, 1]`.
        pos_weight: How much label 1 costs relative to label 0: one number, or one for each class.
        label_smoothing: Share of every label that is moved to 1/2.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Good, Rational Decisions, JRSS B 1952. Equals torch's `binary_cross_entropy_with_logits`,
        `optax.sigmoid_binary_cross_entropy` and the mean of Keras' `BinaryCrossentropy` with
        `from_logits=True`. torch's `weight` divides by the count of units; `weights` here divides
        by its own sum.

    >>> sigmoid_binary_cross_entropy(jnp.array([0.0, 0.0]), jnp.array([1, 0]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    logits, labels = prepare_binary(logits, labels, where)
    ones, zeros = labels, 1 - labels
    if not (isinstance(label_smoothing, (int, float)) and label_smoothing == 0):
        (a,) = numbers(logits, label_smoothing=label_smoothing)
        ones, zeros = (1 - a) * ones + a / 2, (1 - a) * zeros + a / 2
    if pos_weight is not None:
        ones = ones * _pos_weight(logits, pos_weight)
    cost_one, cost_zero = sigmoid_costs(logits)
    values = safe_mul(ones, cost_one) + safe_mul(zeros, cost_zero)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _pos_weight(logits: Array, pos_weight: Any) -> Array:
    check_array(pos_weight=pos_weight)
    if jnp.ndim(pos_weight) == 0 or logits.ndim == 0:
        return numbers(logits, pos_weight=pos_weight)[0]
    return jnp.broadcast_to(class_vectors(logits, pos_weight=pos_weight)[0], logits.shape)


@compiled("axis")
def softmax_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    axis: int = -1,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    label_smoothing: Number = 0.0,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy between softmax probabilities and labels, in nats, from 0 up.

    $$ \ell = -\sum_k w_k \left((1 - s)\, t_k + \tfrac{s}{K}\right) \log \mathrm{softmax}(z)_k $$

    for $K$ classes with target probabilities $t$ (one-hot for an integer label), label smoothing
    $s$ and class weights $w$. An integer label outside `[0, classes)` makes its unit NaN. A class
    of logit -inf and target 0 costs nothing. Up to 1024 classes the value keeps every digit near
    0; with more, a value below 1e-6 is rounding noise.

    Args:
        logits: Unnormalised log-probabilities, classes on `axis`.
        labels: Integers without the class axis, or target probabilities of the shape of `logits`
            that sum to one.
        axis: Where the classes are, in `logits` and dense `labels`.
        class_weights: Scales the cost of each class; the mean still divides by the number of units.
            For a class that counts as often as its weight, pass `weights=class_weights[labels]`.
        label_smoothing: Share of the target that is spread evenly over all classes.
        ignore_index: Integer label whose units are left out, as by `where`.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Good, Rational Decisions, JRSS B 1952; smoothing by Szegedy et al., Rethinking the
        Inception Architecture, CVPR 2016. Equals `optax.softmax_cross_entropy` and, classes
        weighted or not, torch's `cross_entropy` with `reduction="none"`; torch's weighted mean
        over integer labels is `weights=class_weights[labels]`.

    >>> softmax_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    logits, labels, where = prepare(
        logits, labels, axis=axis, where=where, ignore_index=ignore_index, wide=False
    )
    if class_weights is not None:
        (class_weights,) = class_vectors(logits, class_weights=class_weights)
    values = cross_entropy(
        logits, labels, label_smoothing=label_smoothing, class_weights=class_weights
    )
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis")
def nll_loss(
    log_probs: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    axis: int = -1,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of labels under given log-probabilities, in nats, from 0 up.

    $$ \ell = -\sum_k w_k\, t_k \log p_k $$

    with $t$ one-hot for an integer label. From logits, `softmax_cross_entropy` is more accurate.
    An integer label outside `[0, classes)` makes its unit NaN. A class of probability 0 and target
    0 costs nothing.

    Args:
        log_probs: Normalised log-probabilities, classes on `axis`; they are not normalised again.
        labels: Integers without the class axis, or target probabilities of the shape of
            `log_probs`.
        axis: Where the classes are, in `log_probs` and dense `labels`.
        class_weights: Scales the cost of each class; the mean still divides by the number of units.
        ignore_index: Integer label whose units are left out, as by `where`.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Good, Rational Decisions, JRSS B 1952. Equals torch's `nll_loss` with `reduction="none"`;
        its weighted mean is `weights=class_weights[labels]`.

    >>> nll_loss(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0]))  # log 4
    Array(1.3862944, dtype=float32)
    """
    log_probs, labels, where = prepare(
        log_probs, labels, axis=axis, where=where, ignore_index=ignore_index, first="log_probs"
    )
    require(lambda: log_probs < 1e-3, "log_probs", "values of at most 0", where)
    nll = -log_probs
    if class_weights is not None:
        (class_weights,) = class_vectors(nll, class_weights=class_weights)
        nll = safe_mul(jnp.broadcast_to(class_weights, nll.shape), nll)
    values = label_values(nll, labels)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis")
def poly_loss_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    epsilon: Number = 2.0,
    axis: int = -1,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Poly-1 loss: cross-entropy plus a multiple of the missing probability, from 0 up.

    $$ \ell = \sum_k t_k \left(-\log p_k + \varepsilon (1 - p_k)\right) $$

    for softmax probabilities $p$ and targets $t$ (one-hot for an integer label). An integer label
    outside `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes on `axis`.
        labels: Integers without the class axis, or target probabilities of the shape of `logits`.
        epsilon: Weight of the linear term; 0 is cross-entropy and -1 removes the leading term of
            its expansion in `1 - p`.
        axis: Where the classes are, in `logits` and dense `labels`.
        ignore_index: Integer label whose units are left out, as by `where`.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Leng et al., PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions,
        ICLR 2022. Equals `optax.losses.poly_loss_cross_entropy`, which takes dense labels alone.

    >>> poly_loss_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]), epsilon=2.0)  # log 2 + 1
    Array(1.6931472, dtype=float32)
    """
    logits, labels, where = prepare(
        logits, labels, axis=axis, where=where, ignore_index=ignore_index
    )
    (epsilon,) = numbers(logits, epsilon=epsilon)
    nll = neg_log_softmax(logits)
    values = label_values(nll - epsilon * expm1(-nll), labels)
    return reduce(values, where=where, weights=weights, reduction=reduction)


_BINARY = dict(logits=draw_normal("B C", scale=2), labels=draw_binary("B C"))
_BITS = dict(_BINARY, labels=draw_labels("B C", classes="L"))
_CLASSES = dict(logits=draw_normal("B T C", scale=2), labels=draw_labels("B T"))
_DENSE = dict(logits=draw_normal("B C", scale=2), labels=draw_probs("B C"))
_LOG_PROBS = dict(log_probs=draw_log_probs("B C"), labels=draw_labels("B"))
_WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0], np.float32)
_IGNORED = {"reducing": "ignored units leave the denominator, which no array of units can show"}

CASES = (
    Case(sigmoid_binary_cross_entropy, _BINARY),
    Case(
        sigmoid_binary_cross_entropy,
        _BITS,
        dict(pos_weight=_WEIGHTS, label_smoothing=0.1),
        sizes={"L": 2},
        label="smoothed",
    ),
    Case(sigmoid_binary_cross_entropy, _BINARY, dict(pos_weight=3.0), label="weighted"),
    Case(softmax_cross_entropy, _CLASSES),
    Case(softmax_cross_entropy, _DENSE, label="dense"),
    Case(
        softmax_cross_entropy,
        _CLASSES,
        dict(class_weights=_WEIGHTS, label_smoothing=0.1, ignore_index=2),
        label="weighted",
        without=_IGNORED,
    ),
    Case(softmax_cross_entropy, _CLASSES, sizes={"C": 1030, "T": 2}, label="many"),
    Case(nll_loss, _LOG_PROBS),
    Case(
        nll_loss,
        _LOG_PROBS,
        dict(class_weights=_WEIGHTS, ignore_index=1),
        label="weighted",
        without=_IGNORED,
    ),
    Case(poly_loss_cross_entropy, _CLASSES, dict(epsilon=1.5)),
    Case(poly_loss_cross_entropy, _DENSE, dict(epsilon=-0.5), label="dense"),
)
