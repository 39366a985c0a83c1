"""Further policy losses: soft and geometric clips, sequence weights, plain policy gradients."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.compiled import compiled
from .._core.log_ratios import (
    clamp,
    clipped_surrogate,
    mean_over_time,
    sequence_inputs,
    sigmoids,
    token_count,
    token_inputs,
)
from .._core.numerics import expm1, numbers
from .._core.reduce import reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "dro_loss",
    "gmpo_loss",
    "luspo_loss",
    "reinforce_loss",
    "sapo_loss",
    "vespo_loss",
]


@compiled()
def sapo_loss(
    log_probs: Float[Array, "*batch time"],
    old_log_probs: Shaped[Array, "*batch time"],
    advantages: Shaped[Array, "*batch #time"],
    *,
    tau_pos: Number = 1.0,
    tau_neg: Number = 1.05,
    max_log_ratio: Number = 20.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Soft adaptive policy optimisation: a sigmoid in place of the clip.

    $$ \ell = -\frac{4}{\tau} \sigma(\tau (\rho - 1)) A, \quad
       \rho = \exp(\log \pi - \log \pi_{\text{old}}), \quad
       \tau = \tau_+ \text{ if } A > 0, \text{ else } \tau_- $$

    At ratio 1 the gradient is minus $A$; it fades on both sides.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled; no gradient.
        advantages: `(*batch, time)`, or `(*batch, 1)` for a whole sequence; no gradient.
        tau_pos: How fast it fades for positive advantages.
        tau_neg: The same for the others.
        max_log_ratio: The logarithm of the ratio is clamped to plus or minus this.
        where: Bool array of the completion tokens.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        Gao et al., Soft Adaptive Policy Optimization, 2025. Equals `sapo` of verl, and of TRL,
        which has no clamp; both with `reduction=sequence_mean`.

    >>> log_probs, old = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.5]))
    >>> sapo_loss(log_probs, old, jnp.array([3.0]))  # 4 * sigmoid(0) * 3
    Array(-6., dtype=float32)
    """
    log_probs, old, advantages = token_inputs(log_probs, old_log_probs, advantages, where)
    positive, negative, bound = numbers(
        log_probs, tau_pos=tau_pos, tau_neg=tau_neg, max_log_ratio=max_log_ratio
    )
    tau = jnp.where(advantages > 0, positive, negative)
    soft, _ = sigmoids(tau * expm1(clamp(log_probs - old, bound)))
    values = -4 / tau * soft * advantages
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def gmpo_loss(
    log_probs: Float[Array, "*batch time"],
    old_log_probs: Shaped[Array, "*batch time"],
    advantages: Shaped[Array, "*batch"],
    *,
    clip_low: Number = 0.4,
    clip_high: Number = 0.4,
    max_log_ratio: Number = 20.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Geometric-mean policy optimisation: one ratio for each sequence, clipped token by token.

    $$ \ell = -A \exp\left( \tfrac{1}{T} \sum_t y_t \right), \quad y_t =
       \begin{cases} \min(x_t, c_{\text{high}}) & A > 0 \\ \max(x_t, -c_{\text{low}}) & A < 0
       \end{cases}, \quad x = \log \pi - \log \pi_{\text{old}} $$

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled; no gradient.
        advantages: One for each sequence, `*batch`; no gradient.
        clip_low: How far a log-ratio counts below 0.
        clip_high: How far it counts above 0.
        max_log_ratio: The mean of the log-ratios is clamped to plus or minus this.
        where: Bool array of the completion tokens.

    One unit per sequence; see `jaxloss.reduce`. A sequence without a kept token is no unit.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Zhao et al., Geometric-Mean Policy Optimization, 2025. Equals verl's `geo_mean`, which has
        no clamp.

    >>> log_probs, old = jnp.log(jnp.array([[0.6, 0.3]])), jnp.log(jnp.array([[0.4, 0.2]]))
    >>> gmpo_loss(log_probs, old, jnp.array([-2.0]))  # the ratio is 1.5
    Array(3., dtype=float32)
    """
    log_probs, old, advantages, units = sequence_inputs(log_probs, old_log_probs, advantages, where)
    low, high, bound = numbers(
        log_probs, clip_low=clip_low, clip_high=clip_high, max_log_ratio=max_log_ratio
    )
    x, sign = log_probs - old, advantages[..., None]
    capped, floored = jnp.where(x > high, high, x), jnp.where(x < -low, -low, x)
    x = jnp.where(sign < 0, floored, capped)
    if where is not None:  # a clip beyond 0 would move hidden tokens
        x = jnp.where(where, x, 0)
    values = -advantages * jnp.exp(clamp(mean_over_time(x, where), bound))
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def luspo_loss(
    log_probs: Float[Array, "*batch time"],
    old_log_probs: Shaped[Array, "*batch time"],
    advantages: Shaped[Array, "*batch"],
    *,
    clip_low: Number = 3e-4,
    clip_high: Number = 4e-4,
    max_log_ratio: Number = 20.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Length-unbiased sequence policy optimisation: `gspo_loss` times the number of tokens.

    $$ \ell = -T \min(s A, \operatorname{clip}(s, 1 - c_{\text{low}}, 1 + c_{\text{high}}) A), \quad
       s = \exp\left( \tfrac{1}{T} \sum_t (\log \pi_t - \log \pi_{\text{old},t}) \right) $$

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled; no gradient.
        advantages: One for each sequence, `*batch`; no gradient.
        clip_low: How far the ratio counts below 1.
        clip_high: How far it counts above 1.
        max_log_ratio: The logarithm of the ratio is clamped to plus or minus this.
        where: Bool array of the completion tokens.

    One unit per sequence; see `jaxloss.reduce`. A sequence without a kept token is no unit.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Liu et al., Length-Unbiased Sequence Policy Optimization, 2026. Equals TRL's `luspo` with
        `importance_sampling_level="sequence"`.

    >>> log_probs, old = jnp.log(jnp.array([[0.6, 0.3]])), jnp.log(jnp.array([[0.4, 0.2]]))
    >>> luspo_loss(log_probs, old, jnp.array([-2.0]))  # 2 tokens, ratio 1.5
    Array(6., dtype=float32)
    """
    log_probs, old, advantages, units = sequence_inputs(log_probs, old_log_probs, advantages, where)
    low, high, bound = numbers(
        log_probs, clip_low=clip_low, clip_high=clip_high, max_log_ratio=max_log_ratio
    )
    ratio = jnp.exp(clamp(mean_over_time(log_probs - old, where), bound))
    values = token_count(log_probs, where) * clipped_surrogate(ratio, advantages, low, high)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def vespo_loss(
    log_probs: Float[Array, "*batch time"],
    old_log_probs: Shaped[Array, "*batch time"],
    advantages: Shaped[Array, "*batch #time"],
    *,
    k_pos: Number = 2.0,
    lambda_pos: Number = 3.0,
    k_neg: Number = 3.0,
    lambda_neg: Number = 2.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Policy gradient weighted by a gamma density of the sequence's ratio, in place of a clip.

    $$ \ell_t = -\bar \phi(w) A_t \log \pi_t, \quad \phi(w) = w^k e^{\lambda (1 - w)}, \quad
       w = \prod_t \pi_t / \pi_{\text{old},t} $$

    The weight counts as a constant and is 1 at ratio 1. Log-ratios of tokens are clamped to plus or
    minus 20, that of the sequence to between the logarithm of 1e-8 and 20.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled; no gradient.
        advantages: `(*batch, time)`, or `(*batch, 1)` for a whole sequence; no gradient.
        k_pos: $k$ where the advantage is at least 0.
        lambda_pos: $\lambda$ there.
        k_neg: $k$ where it is negative.
        lambda_neg: $\lambda$ there.
        where: Bool array of the completion tokens.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        Shen et al., VESPO: Variational Sequence-Level Soft Policy Optimization, 2026. Equals TRL's
        `vespo`.

    >>> log_probs, old = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.5, 0.5]]))
    >>> vespo_loss(log_probs, old, jnp.array([[1.0]]))  # -log(1 / 2)
    Array(0.6931472, dtype=float32)
    """
    log_probs, old, advantages = token_inputs(log_probs, old_log_probs, advantages, where)
    powers = numbers(log_probs, k_pos=k_pos, k_neg=k_neg)
    rates = numbers(log_probs, lambda_pos=lambda_pos, lambda_neg=lambda_neg)
    k, rate = (jnp.where(advantages >= 0, *pair) for pair in (powers, rates))
    tokens = jnp.clip(jax.lax.stop_gradient(log_probs) - old, -20, 20)
    log_w = jnp.clip(jnp.sum(tokens, axis=-1, keepdims=True), math.log(1e-8), 20)
    values = -jnp.exp(k * log_w - rate * expm1(log_w)) * advantages * log_probs
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def dro_loss(
    log_probs: Float[Array, "*batch time"],
    old_log_probs: Shaped[Array, "*batch time"],
    advantages: Shaped[Array, "*batch #time"],
    *,
    beta: Number,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Direct reward optimisation: a policy gradient with a quadratic pull to the old policy.

    $$ \ell = -A \log \pi + \tfrac{\beta}{2} (\log \pi - \log \pi_{\text{old}})^2 $$

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled; no gradient.
        advantages: `(*batch, time)`, or `(*batch, 1)` for a whole sequence; no gradient.
        beta: Strength of the pull.
        where: Bool array of the completion tokens.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        Richemond et al., Offline Regularised Reinforcement Learning for Large Language Models
        Alignment, 2024, with the value function taken as part of the advantage.

    >>> dro_loss(jnp.array([-1.0]), jnp.array([-3.0]), jnp.array([1.0]), beta=0.5)  # 1 + 0.25 * 4
    Array(2., dtype=float32)
    """
    log_probs, old, advantages = token_inputs(log_probs, old_log_probs, advantages, where)
    (beta,) = numbers(log_probs, beta=beta)
    values = 0.5 * beta * (log_probs - old) ** 2 - advantages * log_probs
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def reinforce_loss(
    log_probs: Float[Array, "*batch time"],
    advantages: Shaped[Array, "*batch #time"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Plain policy gradient: minus log-probability times advantage.

    $$ \ell = -A \log \pi $$

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        advantages: `(*batch, time)`, or `(*batch, 1)` for a whole sequence; no gradient.
        where: Bool array of the completion tokens.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        Williams, Simple statistical gradient-following algorithms, Machine Learning 1992. Equals
        verl's `gpg`.

    >>> reinforce_loss(jnp.array([-1.0, -2.0]), jnp.array([3.0, -1.0]), reduction="none")
    Array([ 3., -2.], dtype=float32)
    """
    log_probs, _, advantages = token_inputs(log_probs, log_probs, advantages, where)
    values = -advantages * log_probs
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _fixed(dims: str, low: int = -16) -> Draw:
    return Draw(dims, lambda g, shape, _: g.integers(low, 17, shape) / 8, "fixed")


_TOKENS = dict(
    log_probs=draw_normal("B T", scale=0.25),
    old_log_probs=_fixed("B T"),
    advantages=_fixed("B T", -6),
)
_SEQUENCES = {**_TOKENS, "advantages": _fixed("B", -6)}

CASES = (
    Case(sapo_loss, _TOKENS, dict(tau_pos=1.5, tau_neg=2.0, max_log_ratio=5.0)),
    Case(gmpo_loss, _SEQUENCES, dict(clip_low=0.3, clip_high=0.6), positions="B T"),
    Case(luspo_loss, _SEQUENCES, dict(clip_low=0.3, clip_high=0.6), positions="B T"),
    Case(
        vespo_loss,
        dict(
            log_probs=draw_normal("B T", scale=0.02),
            old_log_probs=Draw("B T", lambda g, s, _: g.integers(-8, 9, s) / 64, "fixed"),
            advantages=_fixed("B 1", -6),
        ),
        dict(k_pos=1.5, lambda_pos=2.5, k_neg=2.5, lambda_neg=1.5),
        positions="B T",
        without={"numerical": "the weights count as constants in the gradient"},
    ),
    Case(dro_loss, _TOKENS, dict(beta=0.3)),
    Case(reinforce_loss, dict(log_probs=draw_normal("B T"), advantages=_fixed("B T", -6))),
)
