"""Focal losses: cross-entropy in which easy examples count less."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from .._core.case import Case, draw_binary, draw_labels, draw_normal, draw_probs, draw_unit
from .._core.checks import check_integer
from .._core.compiled import compiled
from .._core.labels import class_vectors, is_integer, prepare
from .._core.numerics import numbers, power_of_log, safe_log, safe_mul
from .._core.reduce import reduce
from .._core.sharding import lookup, one_hot
from .._core.sigmoid import binary_cross_entropy, prepare_binary, sigmoid_costs
from .._core.softmax import neg_log_softmax
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "asymmetric_loss",
    "asymmetric_softmax_loss",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
]


@compiled()
def sigmoid_focal_loss(
    logits: Float[Array, "*shape"],
    labels: Shaped[Array, "*shape"],
    *,
    alpha: Number | None = None,
    gamma: Number = 2.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Binary focal loss of a logit, in nats, from 0 up: easy elements count less.

    $$ \ell = \alpha_t (1 - p_t)^\gamma \, \mathrm{BCE}(z, y), \quad
       p_t = y p + (1 - y)(1 - p), \quad \alpha_t = \alpha y + (1 - \alpha)(1 - y) $$

    with $p = \sigma(z)$. An integer label other than 0 and 1 makes its unit NaN.

    Args:
        logits: Log-odds of label 1. Multi-label problems put their classes last.
        labels: Same shape: integers 0 and 1, bools, or shares in `[0, 1]`. Integers and bools take
            half the time and memory of shares.
        alpha: Weight of label 1, with `1 - alpha` for label 0; None weighs both with 1.
        gamma: How strongly easy elements are played down; 0 is binary cross-entropy.

    One unit per element; see `jaxloss.reduce`. Detectors divide the sum by the number of positives:
    `reduction="sum"`, then divide.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017. Equals
        `optax.losses.sigmoid_focal_loss` and torchvision's, whose `alpha` defaults to 0.25.

    >>> sigmoid_focal_loss(jnp.array([0.0]), jnp.array([1]))  # log(2) / 4
    Array(0.1732868, dtype=float32)
    """
    hard = not jnp.issubdtype(jnp.asarray(labels).dtype, jnp.floating)
    logits, labels = prepare_binary(logits, labels, where)
    (gamma,) = numbers(logits, gamma=gamma)
    if hard:
        values = _eased_cost(jnp.where(labels == 1, -logits, logits), gamma)
    else:
        easing = power_of_log(_log_miss(logits, labels), gamma)
        values = easing * binary_cross_entropy(logits, labels)
    if alpha is not None:
        (alpha,) = numbers(logits, alpha=alpha)
        values = values * (alpha * labels + (1 - alpha) * (1 - labels))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@jax.custom_jvp
def _eased_cost(margin: Array, gamma: Array) -> Array:
    """`sigmoid(m)^gamma softplus(m)`: the focal loss of a label the logit misses by `m`.

    Its rule keeps nothing but the margin: one exponential and one logarithm give all the rest.
    """
    _, _, log_miss, cost = _of_margin(margin)
    return power_of_log(log_miss, gamma) * cost


@_eased_cost.defjvp
def _eased_cost_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    margin, gamma = primals
    miss, hit, log_miss, cost = _of_margin(margin)
    easing = power_of_log(log_miss, gamma)
    value = easing * cost
    slope = easing * (gamma * safe_mul(hit, cost) + miss)
    return value, slope * tangents[0] + safe_mul(value, log_miss) * tangents[1]


def _of_margin(margin: Array) -> tuple[Array, Array, Array, Array]:
    """`sigmoid(m)`, `sigmoid(-m)`, `log sigmoid(m)` and `softplus(m)`."""
    positive = margin > 0
    ratio = jnp.exp(jnp.where(positive, -margin, margin))
    tail = jnp.log1p(ratio)
    share = 1 / (1 + ratio)
    miss, hit = jnp.where(positive, share, ratio * share), jnp.where(positive, ratio * share, share)
    return miss, hit, jnp.where(positive, 0, margin) - tail, jnp.where(positive, margin, 0) + tail


def _log_miss(logits: Array, labels: Array) -> Array:
    """log(1 - p_t), without a probability that could underflow.

    With r = exp(-|z|) and c the share of the label that the sign of the logit gets wrong,
    1 - p_t = (c + (1 - c) r) / (1 + r); at c = 0 its logarithm and slope are written out.
    """
    positive = logits > 0
    size = jnp.where(positive, logits, -logits)
    ratio = jnp.exp(-size)
    wrong = jnp.where(positive, 1 - labels, labels)
    right = wrong == 0
    mixed = jnp.log(jnp.where(right, 1, wrong + (1 - wrong) * ratio))
    hard = wrong * jnp.expm1(jnp.minimum(size, 80)) - size
    return jnp.where(right, hard, mixed) - jnp.log1p(ratio)


@compiled("axis")
def softmax_focal_loss(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    axis: int = -1,
    gamma: Number = 2.0,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Focal loss over softmax probabilities, in nats, from 0 up: easy examples count less.

    $$ \ell = -\sum_k w_k\, t_k (1 - p_k)^\gamma \log p_k $$

    for softmax probabilities $p$ and targets $t$ (one-hot for an integer label). An integer label
    outside `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes on `axis`.
        labels: Integers without the class axis, or target probabilities of the shape of `logits`.
        axis: Where the classes are, in `logits` and dense `labels`.
        gamma: How strongly easy examples are played down; 0 is cross-entropy.
        class_weights: Scales the cost of each class; the mean still divides by the number of units.
        ignore_index: Integer label whose units are left out, as by `where`.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017. Equals Keras'
        `CategoricalFocalCrossentropy` with `alpha=1` and `from_logits=True`, and the number of
        classes times MONAI's `FocalLoss` with `use_softmax=True`. A scalar `alpha` there means
        `class_weights=[1 - alpha, alpha, alpha, ...]`.

    >>> softmax_focal_loss(jnp.array([[0.0, 0.0]]), jnp.array([1]))  # log(2) / 4
    Array(0.1732868, dtype=float32)
    """
    logits, labels, where = prepare(
        logits, labels, axis=axis, where=where, ignore_index=ignore_index
    )
    (gamma,) = numbers(logits, gamma=gamma)
    if class_weights is not None:
        (class_weights,) = class_vectors(logits, class_weights=class_weights)
    if is_integer(labels):
        odds = _log_odds(logits, one_hot(labels, logits.shape[-1]))
        values = _focal(jnp.squeeze(odds, -1), gamma)
        values = values if class_weights is None else lookup(class_weights, labels) * values
    else:
        if class_weights is not None:
            labels = jnp.broadcast_to(class_weights, labels.shape) * labels
        odds = _all_log_odds(logits)
        odds = jnp.where((labels == 0) & jnp.isinf(odds), 0, odds)
        values = jnp.sum(labels * _focal(odds, gamma), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _focal(odds: Array, gamma: Array) -> Array:
    """-(1 - p)^gamma log p, from the log-odds of p."""
    cost, miss = sigmoid_costs(odds)
    return power_of_log(-miss, gamma) * cost


def _log_odds(logits: Array, chosen: Array) -> Array:
    """log(p / (1 - p)) of the one chosen class of each row, keeping the class axis.

    One class against all others is a binary problem: no logarithm of a rounded 1 - p is needed.
    """
    own = jnp.sum(jnp.where(chosen, logits, 0), axis=-1, keepdims=True)
    others = jnp.where(chosen, -jnp.inf, logits - own)
    alone = jnp.all(others == -jnp.inf, axis=-1, keepdims=True)
    rest = jax.nn.logsumexp(jnp.where(alone, 0, others), axis=-1, keepdims=True)
    return jnp.where(alone, jnp.inf, -rest)


def _all_log_odds(logits: Array) -> Array:
    """log(p / (1 - p)) of every class; all but the largest have p <= 1/2."""
    top = one_hot(jnp.argmax(jax.lax.stop_gradient(logits), axis=-1), logits.shape[-1])
    best = _log_odds(logits, top)
    largest = jnp.sum(jnp.where(top, logits, 0), axis=-1, keepdims=True)
    nll = jnp.where(top, 1, sigmoid_costs(best)[0] + (largest - logits))
    return jnp.where(top, best, -nll - jnp.log1p(-jnp.exp(-nll)))


@compiled("stop_gradient_weights")
def asymmetric_loss(
    logits: Float[Array, "*shape"],
    labels: Shaped[Array, "*shape"],
    *,
    gamma_pos: Number = 1.0,
    gamma_neg: Number = 4.0,
    clip: Number = 0.05,
    stop_gradient_weights: bool = False,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Asymmetric multi-label loss, in nats, from 0 up: easy negatives count less or not at all.

    $$ \ell = -y (1 - p)^{\gamma_+} \log p - (1 - y)\, p_m^{\gamma_-} \log(1 - p_m), \quad
       p_m = \max(p - c, 0) $$

    with $p = \sigma(z)$. A negative of probability at most the clip $c$ has loss and gradient 0.
    An integer label other than 0 and 1 makes its unit NaN.

    Args:
        logits: Log-odds of label 1, usually one for each class.
        labels: Same shape: integers 0 and 1, bools, or shares in `[0, 1]`.
        gamma_pos: How strongly easy positives are played down.
        gamma_neg: How strongly easy negatives are played down.
        clip: Probability that negatives may have for free.
        stop_gradient_weights: Whether the two powers count as constants in the gradient.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Ridnik et al., Asymmetric Loss For Multi-Label Classification, ICCV 2021. With
        `reduction="sum"` it equals the sum of timm's `AsymmetricLossMultiLabel` for labels 0 and 1;
        shares enter linearly here. Its `disable_torch_grad_focal_loss` is `stop_gradient_weights`.

    >>> asymmetric_loss(jnp.array([0.0]), jnp.array([1]))  # log(2) / 2
    Array(0.3465736, dtype=float32)
    """
    logits, labels = prepare_binary(logits, labels, where)
    gamma_pos, gamma_neg, clip = numbers(
        logits, gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip
    )
    cost_one, cost_zero = sigmoid_costs(logits)
    log_shifted, cost_shifted = _shifted(cost_one, cost_zero, clip)
    easing_one = power_of_log(-cost_zero, gamma_pos)
    easing_zero = power_of_log(log_shifted, gamma_neg)
    if stop_gradient_weights:
        easing_one, easing_zero = jax.lax.stop_gradient((easing_one, easing_zero))
    values = easing_one * safe_mul(labels, cost_one)
    values += easing_zero * safe_mul(1 - labels, cost_shifted)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _shifted(cost_one: Array, cost_zero: Array, clip: Array) -> tuple[Array, Array]:
    """Logarithms of p_m and, negated, of 1 - p_m; both 0 where p <= clip.

    log p_m = log p + log(1 - clip / p); 1 - p_m is 1 - p + clip, added as logarithms where that is
    the accurate way.
    """
    log_clip = jnp.maximum(safe_log(clip), -1e9)
    ratio = jnp.exp(jnp.minimum(log_clip + cost_one, 0))
    kept = ratio < 1
    log_shifted = jnp.where(kept, jnp.log1p(-jnp.where(kept, ratio, 0)) - cost_one, 0)
    shifted = jnp.exp(log_shifted)
    small = shifted < 0.5
    near = -jnp.log1p(-jnp.where(small, shifted, 0))
    far = -jnp.logaddexp(-cost_zero, jnp.broadcast_to(log_clip, cost_zero.shape))
    return log_shifted, jnp.where(kept, jnp.where(small, near, far), 0)


@compiled()
def asymmetric_softmax_loss(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    *,
    gamma_pos: Number = 1.0,
    gamma_neg: Number = 4.0,
    label_smoothing: Number = 0.1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Asymmetric loss over softmax probabilities, in nats, from 0 up, for one label a row.

    $$ \ell = -\left(1 - s + \tfrac{s}{K}\right) (1 - p_y)^{\gamma_+} \log p_y
       - \tfrac{s}{K} \sum_{k \ne y} p_k^{\gamma_-} \log p_k $$

    for $K$ classes and label smoothing $s$. A label outside `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers without the class axis.
        gamma_pos: How strongly easy examples are played down.
        gamma_neg: How strongly the other classes are played down where they are improbable.
        label_smoothing: Share of the target that is spread evenly over all classes.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Ridnik et al., Asymmetric Loss For Multi-Label Classification, ICCV 2021, in the form of its
        published code; equals timm's `AsymmetricLossSingleLabel`, whose `eps` is `label_smoothing`.

    >>> logits = jnp.array([[0.0, 0.0]])
    >>> asymmetric_softmax_loss(logits, jnp.array([1]), label_smoothing=0.0)  # log(2) / 2
    Array(0.3465736, dtype=float32)
    """
    check_integer(labels=labels)
    logits, labels, where = prepare(logits, labels, where=where)
    gamma_pos, gamma_neg, smoothing = numbers(
        logits, gamma_pos=gamma_pos, gamma_neg=gamma_neg, label_smoothing=label_smoothing
    )
    truth = one_hot(labels, logits.shape[-1])
    share = smoothing / logits.shape[-1]
    right = _focal(jnp.squeeze(_log_odds(logits, truth), -1), gamma_pos)
    nll = jnp.where(truth, 0, neg_log_softmax(logits))
    wrong = safe_mul(share * power_of_log(-nll, gamma_neg), nll)
    values = (1 - smoothing + share) * right + jnp.sum(wrong, axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


_BINARY = dict(logits=draw_normal("B C", scale=2), labels=draw_binary("B C"))
_SHARES = dict(logits=draw_normal("B C", scale=2), labels=draw_unit("B C"))
_CLASSES = dict(logits=draw_normal("B T C", scale=2), labels=draw_labels("B T"))
_DENSE = dict(logits=draw_normal("B C", scale=2), labels=draw_probs("B C"))
_WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0], np.float32)

CASES = (
    Case(sigmoid_focal_loss, _BINARY, dict(alpha=0.25, gamma=0.5)),
    Case(sigmoid_focal_loss, _SHARES, dict(gamma=1.5), label="shares"),
    Case(softmax_focal_loss, _CLASSES, dict(gamma=0.5)),
    Case(
        softmax_focal_loss,
        _CLASSES,
        dict(gamma=1.5, class_weights=_WEIGHTS, ignore_index=2),
        label="weighted",
        without={"reducing": "ignored units leave the denominator, which no array of units shows"},
    ),
    Case(softmax_focal_loss, _DENSE, dict(gamma=1.5, class_weights=_WEIGHTS), label="dense"),
    Case(asymmetric_loss, _BINARY, dict(gamma_pos=1.5, gamma_neg=3.0, clip=0.1)),
    Case(asymmetric_loss, _SHARES, dict(gamma_pos=0.5, gamma_neg=0.5), label="shares"),
    Case(asymmetric_loss, _BINARY, dict(clip=0.0), label="unclipped"),
    Case(
        asymmetric_loss,
        _BINARY,
        dict(stop_gradient_weights=True),
        label="stopped",
        without={"numerical": "the powers count as constants in the gradient"},
    ),
    Case(asymmetric_softmax_loss, _CLASSES, dict(gamma_pos=0.5, label_smoothing=0.2)),
)
