"""Divergences between distributions over classes, and regularisers of a single distribution."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_log_probs, draw_normal, draw_probs
from .._core.checks import check_axis, check_float, check_min_rank, check_same_shape, require
from .._core.compiled import compiled
from .._core.numerics import expm1, horner, safe_div, safe_mul, widen, xlogx
from .._core.reduce import mask, reduce
from .._core.softmax import neg_log_softmax
from .._core.typing import Reduction, Values, Where

__all__ = [
    "confidence_penalty",
    "generalized_kl_divergence",
    "js_divergence",
    "jsd_consistency_loss",
    "kl_divergence",
    "kl_divergence_with_log_targets",
]


@compiled("axis")
def kl_divergence(
    log_probs: Float[Array, "*batch classes"],
    target: Shaped[Array, "*batch classes"],
    *,
    axis: int = -1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Kullback-Leibler divergence of a prediction from a target distribution, in nats, from 0 up.

    $$ \ell = \sum_k t_k (\log t_k - \log p_k) $$

    A class of target 0 costs nothing, also at $\log p_k = -\infty$, and the derivative of
    $t \log t$ there is taken as 0.

    Args:
        log_probs: Log-probabilities $\log p$, classes on `axis`; they are not normalised again.
        target: Probabilities $t$ of the same shape.
        axis: Where the classes are.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Kullback and Leibler, On Information and Sufficiency, Annals of Mathematical Statistics
        1951. Equals `optax.losses.kl_divergence` and torch's `kl_div` with
        `reduction="batchmean"`; its `"mean"` also divides by the number of classes.

    >>> kl_divergence(jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[1.0, 0.0]]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    log_probs, target = _rows(axis, where, log_probs=log_probs, target=target)
    require(lambda: target >= 0, "target", "values of at least 0", where)
    values = jnp.sum(safe_mul(target, -_log_ratio(log_probs, target)), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis")
def kl_divergence_with_log_targets(
    log_probs: Float[Array, "*batch classes"],
    log_target: Float[Array, "*batch classes"],
    *,
    axis: int = -1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Kullback-Leibler divergence, in nats, from 0 up, of a target given as log-probabilities.

    $$ \ell = \sum_k t_k (\log t_k - \log p_k) $$

    A class of target 0, $\log t_k = -\infty$, costs nothing, also at $\log p_k = -\infty$.

    Args:
        log_probs: Log-probabilities $\log p$, classes on `axis`; they are not normalised again.
        log_target: Log-probabilities $\log t$ of the same shape.
        axis: Where the classes are.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Kullback and Leibler, On Information and Sufficiency, Annals of Mathematical Statistics
        1951. Equals `optax.losses.kl_divergence_with_log_targets` and torch's `kl_div` with
        `log_target=True, reduction="batchmean"`.

    >>> kl_divergence_with_log_targets(jnp.log(jnp.full((1, 2), 0.5)), jnp.array([[0.0, -jnp.inf]]))
    Array(0.6931472, dtype=float32)
    """
    check_float(log_target=log_target)
    log_probs, log_target = _rows(axis, where, log_probs=log_probs, log_target=log_target)
    absent = log_target == -jnp.inf
    log_ratio = jnp.where(absent, 0, log_target - log_probs)
    values = jnp.sum(jnp.exp(log_target) * log_ratio, axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis")
def generalized_kl_divergence(
    log_probs: Float[Array, "*batch classes"],
    target: Shaped[Array, "*batch classes"],
    *,
    axis: int = -1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Kullback-Leibler divergence of measures that need not sum to one, from 0 up.

    $$ \ell = \sum_k t_k (\log t_k - \log p_k) + p_k - t_k $$

    No class contributes less than 0. A class of target 0 costs $p_k$, and the derivative of
    $t \log t$ there is taken as 0.

    Args:
        log_probs: Logarithms $\log p$ of the predicted measure, classes on `axis`.
        target: The target measure $t$, at least 0, of the same shape.
        axis: Where the classes are.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Csiszár, Why Least Squares and Maximum Entropy?, Annals of Statistics 1991. Equals
        `optax.losses.generalized_kl_divergence`.

    >>> generalized_kl_divergence(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]]))
    Array(1., dtype=float32)
    """
    log_probs, target = _rows(axis, where, log_probs=log_probs, target=target)
    require(lambda: target >= 0, "target", "values of at least 0", where)
    log_ratio = _log_ratio(log_probs, target)
    near = (target > 0) & (jnp.abs(log_ratio) < 0.5)
    far = safe_mul(target, -jnp.where(near, 0, log_ratio)) + jnp.exp(log_probs) - target
    terms = jnp.where(near, target * _bend(jnp.where(near, log_ratio, 0)), far)
    values = jnp.sum(terms, axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis")
def js_divergence(
    probs: Float[Array, "*batch classes"],
    target: Shaped[Array, "*batch classes"],
    *,
    axis: int = -1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Jensen-Shannon divergence of two distributions, in nats, in `[0, log 2]`; symmetric.

    $$ \ell = \tfrac{1}{2} \mathrm{KL}(p \| m) + \tfrac{1}{2} \mathrm{KL}(t \| m), \quad
       m = \tfrac{1}{2} (p + t) $$

    Where a probability is 0, the derivative with respect to it is taken as 0.

    Args:
        probs: Probabilities $p$, classes on `axis`.
        target: Probabilities $t$ of the same shape.
        axis: Where the classes are.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Lin, Divergence Measures Based on the Shannon Entropy, IEEE Transactions on Information
        Theory 1991. Equals the square of SciPy's `jensenshannon`.

    >>> js_divergence(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    probs, target = _rows(axis, where, probs=probs, target=target)
    require(lambda: probs >= 0, "probs", "values of at least 0", where)
    require(lambda: target >= 0, "target", "values of at least 0", where)
    probs, target = (jnp.where(x == 0, 0, x) for x in (probs, target))
    values = jnp.sum(_js_terms(probs, target), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def jsd_consistency_loss(
    logits: Float[Array, "views *batch classes"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Jensen-Shannon divergence among the predictions for several views, in `[0, log views]`.

    $$ \ell = \frac{1}{V} \sum_v \mathrm{KL}(p_v \| m), \quad m = \frac{1}{V} \sum_v p_v $$

    for softmax probabilities $p_v$. It is 0 where all views agree.

    Args:
        logits: Unnormalised log-probabilities of each view, views first and classes last. A class
            of -inf has probability 0.

    One unit per example (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Hendrycks et al., AugMix: A Simple Data Processing Method to Improve Robustness and
        Uncertainty, ICLR 2020. timm's `JsdCrossEntropy` adds cross-entropy, multiplies by its
        `alpha` and clamps $m$ at 1e-7.

    >>> jsd_consistency_loss(jnp.array([[[0.0, -1e4]], [[-1e4, 0.0]]]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    check_float(logits=logits)
    check_min_rank(2, logits=logits)
    logits = jnp.moveaxis(logits, 0, -2)
    nll = neg_log_softmax(*widen(*mask(where, logits)))  # (*batch, views, classes)
    possible = nll < jnp.inf
    views = nll.shape[-2]
    log_sum = jax.nn.logsumexp(-nll, axis=-2, keepdims=True, where=possible | jnp.isnan(nll))
    log_mean = log_sum - jnp.log(jnp.asarray(views, nll.dtype))
    r = jnp.where(possible, -jnp.where(possible, nll + log_mean, 0), 0)
    # p log(p / m) - p + m: the extra terms add up to 0 over the views and leave no cancellation.
    near = jnp.abs(r) < 0.5
    far = jnp.where(possible, r * jnp.exp(r) - expm1(r), 1)
    terms = jnp.where(near & possible, jnp.exp(r) * _bend(jnp.where(near, -r, 0)), far)
    values = jnp.sum(jnp.exp(log_mean) * terms, axis=(-2, -1)) / views
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis")
def confidence_penalty(
    logits: Float[Array, "*batch classes"],
    *,
    axis: int = -1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative entropy of the softmax, in nats, in `[-log classes, 0]`: penalises certainty.

    $$ \ell = \sum_k p_k \log p_k $$

    Args:
        logits: Unnormalised log-probabilities, classes on `axis`. A class of -inf costs nothing.
        axis: Where the classes are.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output Distributions,
        ICLR Workshop 2017. Add it to cross-entropy, times a small factor.

    >>> confidence_penalty(jnp.zeros((1, 2)))  # -log 2
    Array(-0.6931472, dtype=float32)
    """
    (logits,) = _rows(axis, where, logits=logits)
    nll = neg_log_softmax(logits)
    values = -jnp.sum(safe_mul(jnp.exp(-nll), nll), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _rows(axis: int, where: Where | None, **arrays: Any) -> tuple[Array, ...]:
    """Check arrays of one shape, move their classes last, mask and widen them."""
    name, first = next(iter(arrays.items()))
    check_float(**{name: first})
    check_min_rank(1, **{name: first})
    check_same_shape(**arrays)
    axis = check_axis(axis, first.ndim)
    return mask(where, *(jnp.moveaxis(x, axis, -1) for x in widen(*arrays.values())))


def _log_ratio(log_probs: Array, target: Array) -> Array:
    """The difference log p - log t, and log p where t is 0."""
    return log_probs - jnp.log(jnp.where(target == 0, 1, target))


def _bend(x: Array) -> Array:
    """The difference exp(x) - 1 - x for |x| < 1/2, at least 0 and with every digit."""
    return x * x * horner([1 / math.factorial(k + 2) for k in range(15)], x)


def _js_terms(p: Array, t: Array) -> Array:
    """(p log(p / m) + t log(t / m)) / 2, each at least 0; with p = m (1 + d) and t = m (1 - d)."""
    m = (p + t) / 2
    d = safe_div(p - t, p + t)
    near = jnp.abs(d) < 0.5
    e = jnp.where(near, d, 0)
    close = m * (jnp.log1p(-e * e) / 2 + e * jnp.arctanh(e))
    safe_m = jnp.where(near, 1, m)
    apart = m * (xlogx(jnp.where(near, 1, p) / safe_m) + xlogx(jnp.where(near, 1, t) / safe_m)) / 2
    return jnp.where(near, close, apart)


_PAIR = dict(log_probs=draw_normal("B T C"), target=draw_probs("B T C"))
_LOGITS = dict(logits=draw_normal("B T C", scale=2))

CASES = (
    Case(kl_divergence, _PAIR),
    Case(kl_divergence, _PAIR, dict(axis=1), label="axis", positions="B C"),
    Case(
        kl_divergence_with_log_targets,
        dict(log_probs=draw_log_probs("B T C"), log_target=draw_log_probs("B T C")),
    ),
    Case(
        generalized_kl_divergence,
        _PAIR,
        without={"finite": "a predicted measure of exp(1e4) is no float"},
    ),
    Case(
        js_divergence, dict(probs=draw_probs("B C"), target=draw_probs("B C")), zero_at_target=True
    ),
    Case(jsd_consistency_loss, dict(logits=draw_normal("V B T C", scale=2)), positions="B T"),
    Case(confidence_penalty, _LOGITS),
    Case(confidence_penalty, _LOGITS, dict(axis=1), label="axis", positions="B C"),
)
