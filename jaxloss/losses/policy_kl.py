"""Estimates of the KL divergence from samples of a policy, and the entropy of a policy."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import check_float, check_min_rank, check_same_shape
from .._core.compiled import compiled
from .._core.log_ratios import clamp
from .._core.numerics import expm1_excess, numbers, widen
from .._core.reduce import mask, reduce
from .._core.softmax import neg_log_softmax
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "approx_kl_k1",
    "approx_kl_k2",
    "approx_kl_k3",
    "approx_kl_k3_straight_through",
    "policy_entropy",
]


@compiled()
def approx_kl_k1(
    log_probs: Float[Array, "*shape"],
    ref_log_probs: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Unbiased estimate of `KL(policy || reference)`, in nats: the log-ratio.

    $$ \hat k_1 = \log \pi - \log \pi_{\text{ref}} $$

    On samples of the policy its mean is the divergence; single values may be negative. Its gradient
    is 0 on average: put it into the reward, not into the loss.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        ref_log_probs: The same under the reference; no gradient.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Schulman, Approximating KL divergence, 2020. Equals verl's `k1`.

    >>> approx_kl_k1(jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0]), reduction="none")
    Array([ 0.5, -1. ], dtype=float32)
    """
    x = _log_ratio(log_probs, ref_log_probs, where)
    return reduce(-x, where=where, weights=weights, reduction=reduction)


@compiled()
def approx_kl_k2(
    log_probs: Float[Array, "*shape"],
    ref_log_probs: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Estimate of `KL(policy || reference)`, in nats, from 0 up, whose gradient is unbiased.

    $$ \hat k_2 = \tfrac{1}{2} (\log \pi - \log \pi_{\text{ref}})^2 $$

    On samples of the policy the mean is biased while both differ much; the mean of the gradient is
    that of the divergence.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        ref_log_probs: The same under the reference; no gradient.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Schulman, Approximating KL divergence, 2020. Equals verl's `k2`.

    >>> approx_kl_k2(jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0]), reduction="none")
    Array([0.125, 0.5  ], dtype=float32)
    """
    x = _log_ratio(log_probs, ref_log_probs, where)
    return reduce(0.5 * x * x, where=where, weights=weights, reduction=reduction)


@compiled()
def approx_kl_k3(
    log_probs: Float[Array, "*shape"],
    ref_log_probs: Shaped[Array, "*shape"],
    *,
    max_log_ratio: Number = 20.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Unbiased estimate of `KL(policy || reference)`, in nats, from 0 up, of low variance.

    $$ \hat k_3 = e^x - x - 1, \quad x = \log \pi_{\text{ref}} - \log \pi $$

    On samples of the policy its mean is the divergence. The mean of its gradient is that of the
    reverse divergence, `KL(reference || policy)`.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        ref_log_probs: The same under the reference; no gradient.
        max_log_ratio: The log-ratio is clamped to plus or minus this, with gradient 0 beyond.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Schulman, Approximating KL divergence, 2020. Equals the penalty of TRL's GRPO, which has no
        clamp, and verl's `k3`, which also clamps the result to 10.

    >>> approx_kl_k3(jnp.log(jnp.array([0.25])), jnp.log(jnp.array([0.5])))  # 2 - log 2 - 1
    Array(0.30685282, dtype=float32)
    """
    x = _log_ratio(log_probs, ref_log_probs, where)
    (bound,) = numbers(x, max_log_ratio=max_log_ratio)
    values = expm1_excess(clamp(x, bound))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def approx_kl_k3_straight_through(
    log_probs: Float[Array, "*shape"],
    ref_log_probs: Shaped[Array, "*shape"],
    *,
    max_log_ratio: Number = 20.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""The value of `approx_kl_k3` with the gradient of `approx_kl_k2`: both unbiased, in nats.

    $$ \ell = \bar k_3 + \hat k_2 - \bar k_2 $$

    where what is barred counts as a constant.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        ref_log_probs: The same under the reference; no gradient.
        max_log_ratio: The log-ratio in the value is clamped to plus or minus this.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Schulman, Approximating KL divergence, 2020. Equals verl's `k3+`, which also clamps the
        value to 10.

    >>> loss = lambda x: approx_kl_k3_straight_through(x, jnp.array([-1.5]))
    >>> jax.grad(loss)(jnp.array([-1.0]))  # that of half the square of 0.5
    Array([0.5], dtype=float32)
    """
    x = _log_ratio(log_probs, ref_log_probs, where)
    (bound,) = numbers(x, max_log_ratio=max_log_ratio)
    values = _k3_with_slope_of_k2(x, expm1_excess(clamp(jax.lax.stop_gradient(x), bound)))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@jax.custom_jvp
def _k3_with_slope_of_k2(x: Array, value: Array) -> Array:
    del x
    return value


@_k3_with_slope_of_k2.defjvp
def _k3_with_slope_of_k2_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, value), (moved, _) = primals, tangents
    return _k3_with_slope_of_k2(x, value), x * moved


def _log_ratio(log_probs: Array, ref_log_probs: Any, where: Where | None) -> Array:
    """Reference over policy; the reference has no gradient."""
    check_float(log_probs=log_probs)
    check_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs)
    log_probs, ref = mask(where, *widen(log_probs, ref_log_probs))
    return jax.lax.stop_gradient(ref) - log_probs


@compiled()
def policy_entropy(
    logits: Float[Array, "*batch classes"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Entropy of the softmax of each row, in nats, from 0 to the logarithm of the classes.

    $$ H = -\sum_k p_k \log p_k = \log \sum_k e^{z_k} - \sum_k p_k z_k $$

    A class of logit minus infinity adds nothing. Higher is more random: subtract it from a loss.

    Args:
        logits: Scores of the policy, classes last.
        where: Bool array `*batch` of the rows that count.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Shannon, A Mathematical Theory of Communication, 1948. Equals the entropies logged by TRL
        and verl.

    >>> policy_entropy(jnp.array([[0.0, 0.0, -jnp.inf]]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    check_float(logits=logits)
    check_min_rank(1, logits=logits)
    (logits,) = mask(where, *widen(logits))
    return reduce(_entropy(logits), where=where, weights=weights, reduction=reduction)


@jax.custom_jvp
def _entropy(logits: Array) -> Array:
    p, cost = _probs_and_costs(logits)
    return jnp.sum(p * cost, axis=-1)


@_entropy.defjvp
def _entropy_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # By hand: autodiff adds and subtracts p itself, which hides the rest where p is almost 1.
    (logits,), (moved,) = primals, tangents
    p, cost = _probs_and_costs(logits)
    entropy = jnp.sum(p * cost, axis=-1)
    return _entropy(logits), jnp.sum(p * (cost - entropy[..., None]) * moved, axis=-1)


def _probs_and_costs(logits: Array) -> tuple[Array, Array]:
    """P and -log p, the latter 0 where p is 0."""
    cost = neg_log_softmax(logits)
    p = jnp.exp(-cost)
    return p, jnp.where(p == 0, 0, cost)


_PAIR = dict(
    log_probs=draw_normal("B T"),
    ref_log_probs=Draw("B T", lambda g, shape, _: g.integers(-32, 0, shape) / 8, "fixed"),
)

CASES = (
    Case(approx_kl_k1, _PAIR),
    Case(approx_kl_k2, _PAIR),
    Case(approx_kl_k3, _PAIR, dict(max_log_ratio=9.0)),
    Case(
        approx_kl_k3_straight_through,
        _PAIR,
        dict(max_log_ratio=9.0),
        without={"numerical": "the gradient is that of another estimate, on purpose"},
    ),
    Case(policy_entropy, dict(logits=draw_normal("B T V"))),
)
