"""Losses for classification with wrong labels: they bound, damp or doubt what a label can cost."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, draw_labels, draw_normal, draw_probs
from .._core.checks import require
from .._core.compiled import compiled
from .._core.labels import is_integer, label_values, prepare
from .._core.numerics import box_cox, expm1, numbers, power_of_log, safe_div, safe_log, safe_mul
from .._core.reduce import reduce
from .._core.sharding import one_hot, pick
from .._core.softmax import cross_entropy, neg_log_softmax
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "bootstrapped_cross_entropy",
    "classification_absolute_error",
    "generalized_cross_entropy",
    "hard_bootstrapped_cross_entropy",
    "normalized_cross_entropy",
    "normalized_softmax_focal_loss",
    "reverse_cross_entropy",
    "symmetric_cross_entropy",
]


@compiled()
def generalized_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    q: Number = 0.7,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Generalised cross-entropy, in `[0, 1/q]`: between cross-entropy and absolute error.

    $$ \ell = \frac{1 - p_y^q}{q} $$

    for softmax probabilities $p$; it is $-\log p_y$ at $q = 0$ and $1 - p_y$ at $q = 1$. Dense
    labels average it over the classes. An integer label outside `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers, or target probabilities of the shape of `logits`.
        q: In `[0, 1]`; the larger, the less an unlikely label counts.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with
        Noisy Labels, NeurIPS 2018. Equals Keras' `CategoricalGeneralizedCrossEntropy` of the
        softmax.

    >>> generalized_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]), q=1.0)  # 1 - 1/2
    Array(0.5, dtype=float32)
    """
    logits, labels, where = prepare(logits, labels, where=where)
    (q,) = numbers(logits, q=q)
    require(lambda: (q >= 0) & (q <= 1), "q", "a number in [0, 1]")
    values = _at_label(logits, labels, lambda nll: -box_cox(-nll, q))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def classification_absolute_error(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Probability missing at the label, in `[0, 1]`: half the absolute error of a one-hot target.

    $$ \ell = 1 - p_y $$

    for softmax probabilities $p$. Dense labels average it over the classes. An integer label
    outside `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers, or target probabilities of the shape of `logits`.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Ghosh et al., Robust Loss Functions under Label Noise for Deep Neural Networks, AAAI 2017,
        who do not halve. Equals half the sum over classes of torch's `l1_loss` of the softmax.

    >>> classification_absolute_error(jnp.zeros((1, 4)), jnp.array([1]))  # 1 - 1/4
    Array(0.75, dtype=float32)
    """
    logits, labels, where = prepare(logits, labels, where=where)
    values = _at_label(logits, labels, lambda nll: -expm1(-nll))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def reverse_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    log_zero: Number = -4.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy with prediction and target exchanged, in `[0, -log_zero]`.

    $$ \ell = -\sum_k p_k \max(\log t_k, A) $$

    for softmax probabilities $p$, targets $t$ and the number $A$ that stands for $\log 0$. For an
    integer label it is $-A (1 - p_y)$; one outside `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers, or target probabilities of the shape of `logits`.
        log_zero: $A$, a negative number.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, ICCV 2019. Code
        that clips targets at 1e-4 has `log_zero` log 1e-4, about -9.21.

    >>> reverse_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))  # 4 * (1 - 1/2)
    Array(2., dtype=float32)
    """
    logits, labels, where = prepare(logits, labels, where=where)
    (log_zero,) = numbers(logits, log_zero=log_zero)
    values = _reverse(logits, labels, log_zero)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def symmetric_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    alpha: Number = 0.1,
    beta: Number = 1.0,
    log_zero: Number = -4.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy plus reverse cross-entropy, from 0 up: learns fast and forgives wrong labels.

    $$ \ell = -\alpha \sum_k t_k \log p_k - \beta \sum_k p_k \max(\log t_k, A) $$

    for softmax probabilities $p$, targets $t$ (one-hot for an integer label) and the number $A$
    that stands for $\log 0$. An integer label outside `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers, or target probabilities of the shape of `logits`.
        alpha: Weight of the cross-entropy; smaller is more robust and learns more slowly.
        beta: Weight of the reverse cross-entropy.
        log_zero: $A$, a negative number.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, ICCV 2019. Code
        that clips targets at 1e-4 has `log_zero` log 1e-4, about -9.21.

    >>> symmetric_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))  # 0.1 log 2 + 4 / 2
    Array(2.0693147, dtype=float32)
    """
    logits, labels, where = prepare(logits, labels, where=where)
    alpha, beta, log_zero = numbers(logits, alpha=alpha, beta=beta, log_zero=log_zero)
    values = alpha * cross_entropy(logits, labels) + beta * _reverse(logits, labels, log_zero)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def normalized_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy as a share of what all labels together would cost, in `[0, 1]`.

    $$ \ell = \frac{\log p_y}{\sum_k \log p_k} $$

    for softmax probabilities $p$; equal logits cost $1 / K$. Dense labels average it over the
    classes. Classes of logit -inf are left out of the sum. An integer label outside
    `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers, or target probabilities of the shape of `logits`.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Ma et al., Normalized Loss Functions for Deep Learning with Noisy Labels, ICML 2020. Their
        active passive loss is a weighted sum of this one and `reverse_cross_entropy` or
        `classification_absolute_error`.

    >>> normalized_cross_entropy(jnp.zeros((1, 4)), jnp.array([1]))
    Array(0.25, dtype=float32)
    """
    logits, labels, where = prepare(logits, labels, where=where)
    values = _share(neg_log_softmax(logits), labels)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def normalized_softmax_focal_loss(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    gamma: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Focal loss as a share of what all labels together would cost, in `[0, 1]`.

    $$ \ell = \frac{(1 - p_y)^\gamma \log p_y}{\sum_k (1 - p_k)^\gamma \log p_k} $$

    for softmax probabilities $p$; equal logits cost $1 / K$. Dense labels average it over the
    classes. Classes of logit -inf are left out of the sum. An integer label outside
    `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers, or target probabilities of the shape of `logits`.
        gamma: At least 0; 0 is `normalized_cross_entropy`.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Ma et al., Normalized Loss Functions for Deep Learning with Noisy Labels, ICML 2020.

    >>> normalized_softmax_focal_loss(jnp.zeros((1, 4)), jnp.array([1]))
    Array(0.25, dtype=float32)
    """
    logits, labels, where = prepare(logits, labels, where=where)
    (gamma,) = numbers(logits, gamma=gamma)
    require(lambda: gamma >= 0, "gamma", "a number of at least 0")
    nll = neg_log_softmax(logits)
    impossible = nll == jnp.inf
    nll = jnp.where(impossible, 1, nll)
    costs = power_of_log(_log_others(nll, ~impossible), gamma) * nll
    values = _share(jnp.where(impossible, jnp.inf, costs), labels)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def bootstrapped_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    beta: Number = 0.95,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy with a target that partly believes the model, in nats, from 0 up.

    $$ \ell = -\sum_k (\beta\, t_k + (1 - \beta)\, p_k) \log p_k $$

    for softmax probabilities $p$ and targets $t$ (one-hot for an integer label): cross-entropy
    and entropy, mixed. The gradient flows through both $p$. An integer label outside
    `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers, or target probabilities of the shape of `logits`.
        beta: Trust in the labels, in `[0, 1]`; 1 is cross-entropy.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Reed et al., Training Deep Neural Networks on Noisy Labels with Bootstrapping, ICLR
        Workshop 2015. Some ports stop the gradient of the target.

    >>> bootstrapped_cross_entropy(jnp.zeros((1, 2)), jnp.array([1]))  # both parts are log 2
    Array(0.6931472, dtype=float32)
    """
    logits, labels, where = prepare(logits, labels, where=where)
    (beta,) = numbers(logits, beta=beta)
    nll = neg_log_softmax(logits)
    entropy = jnp.sum(safe_mul(jnp.exp(-nll), nll), axis=-1)
    values = beta * label_values(nll, labels) + (1 - beta) * entropy
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def hard_bootstrapped_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    beta: Number = 0.8,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy with a target that partly is the predicted class, in nats, from 0 up.

    $$ \ell = -\beta \sum_k t_k \log p_k - (1 - \beta) \max_k \log p_k $$

    for softmax probabilities $p$ and targets $t$ (one-hot for an integer label). Among equal
    logits the first is the predicted class. An integer label outside `[0, classes)` makes its
    unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers, or target probabilities of the shape of `logits`.
        beta: Trust in the labels, in `[0, 1]`; 1 is cross-entropy.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Reed et al., Training Deep Neural Networks on Noisy Labels with Bootstrapping, ICLR
        Workshop 2015.

    >>> hard_bootstrapped_cross_entropy(jnp.zeros((1, 2)), jnp.array([1]))  # both parts are log 2
    Array(0.6931472, dtype=float32)
    """
    logits, labels, where = prepare(logits, labels, where=where)
    (beta,) = numbers(logits, beta=beta)
    nll = neg_log_softmax(logits)
    predicted = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1)
    values = beta * label_values(nll, labels) + (1 - beta) * pick(nll, predicted)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _at_label(logits: Array, labels: Array, cost: Callable[[Array], Array]) -> Array:
    """`cost` of -log p at the label, or its mean under dense labels."""
    if is_integer(labels):
        return cost(cross_entropy(logits, labels))
    return label_values(cost(neg_log_softmax(logits)), labels)


def _reverse(logits: Array, labels: Array, log_zero: Array) -> Array:
    require(lambda: log_zero <= 0, "log_zero", "a number of at most 0")
    if is_integer(labels):
        return log_zero * expm1(-cross_entropy(logits, labels))
    nll = neg_log_softmax(logits)
    costs = -jnp.maximum(safe_log(labels), log_zero)
    # Relative to the cost of the likeliest class, the gradient does not cancel where p is almost 1.
    base = pick(costs, jnp.argmin(jax.lax.stop_gradient(nll), axis=-1))
    return base + jnp.sum(jnp.exp(-nll) * (costs - base[..., None]), axis=-1)


def _share(costs: Array, labels: Array) -> Array:
    """The cost of the label over the costs of all possible labels."""
    total = jnp.sum(jnp.where(costs == jnp.inf, 0, costs), axis=-1)
    return safe_div(label_values(costs, labels), total)


def _log_others(nll: Array, possible: Array) -> Array:
    """log(1 - p) of every class; that of the largest from the others, as 1 - p would cancel."""
    top = one_hot(jnp.argmin(jax.lax.stop_gradient(nll), axis=-1), nll.shape[-1])
    rest = jax.nn.logsumexp(-nll, axis=-1, keepdims=True, where=possible & ~top)
    return jnp.where(top, rest, jnp.log1p(-jnp.exp(-jnp.where(top, 1, nll))))


_CLASSES = dict(logits=draw_normal("B T C", scale=2), labels=draw_labels("B T"))
_DENSE = dict(logits=draw_normal("B T C", scale=2), labels=draw_probs("B T C"))

CASES = (
    Case(generalized_cross_entropy, _CLASSES, dict(q=0.6)),
    Case(generalized_cross_entropy, _DENSE, dict(q=0.3), label="dense"),
    Case(classification_absolute_error, _CLASSES),
    Case(classification_absolute_error, _DENSE, label="dense"),
    Case(reverse_cross_entropy, _CLASSES, dict(log_zero=-3.0)),
    Case(reverse_cross_entropy, _DENSE, dict(log_zero=-3.0), label="dense"),
    Case(symmetric_cross_entropy, _CLASSES, dict(alpha=0.5, beta=0.7, log_zero=-3.0)),
    Case(symmetric_cross_entropy, _DENSE, dict(alpha=0.5, beta=0.7), label="dense"),
    Case(normalized_cross_entropy, _CLASSES),
    Case(normalized_cross_entropy, _DENSE, label="dense"),
    Case(normalized_softmax_focal_loss, _CLASSES, dict(gamma=0.7)),
    Case(normalized_softmax_focal_loss, _DENSE, dict(gamma=2.0), label="dense"),
    Case(bootstrapped_cross_entropy, _CLASSES, dict(beta=0.7)),
    Case(bootstrapped_cross_entropy, _DENSE, dict(beta=0.7), label="dense"),
    Case(hard_bootstrapped_cross_entropy, _CLASSES, dict(beta=0.7)),
    Case(hard_bootstrapped_cross_entropy, _DENSE, dict(beta=0.7), label="dense"),
)
