"""Policy optimisation on tokens and sequences: clipped surrogates of PPO, GRPO, GSPO and CISPO."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import check_float, check_same_shape
from .._core.compiled import compiled
from .._core.log_ratios import (
    clamp,
    clipped_surrogate,
    mean_over_time,
    sequence_inputs,
    token_inputs,
)
from .._core.numerics import expm1_excess, numbers, safe_div, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "cispo_loss",
    "clipped_value_loss",
    "grpo_loss",
    "gspo_loss",
    "gspo_token_loss",
    "policy_stats",
    "ppo_clip_loss",
]


@compiled()
def ppo_clip_loss(
    log_probs: Float[Array, "*batch time"],
    old_log_probs: Shaped[Array, "*batch time"],
    advantages: Shaped[Array, "*batch #time"],
    *,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
    dual_clip: Number | None = None,
    max_ratio: Number | None = None,
    max_log_ratio: Number = 20.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Clipped surrogate of proximal policy optimisation; its gradient at ratio 1 is minus $A$.

    $$ \ell = -\min(\rho A, \operatorname{clip}(\rho, 1 - c_{\text{low}}, 1 + c_{\text{high}}) A),
       \quad \rho = \exp(\log \pi - \log \pi_{\text{old}}) $$

    Beyond the clip range the gradient is 0 where the advantage would push further. Up to the range,
    its ends included, the gradient is that of $\rho A$, whole.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled; no gradient.
        advantages: `(*batch, time)`, or `(*batch, 1)` for a whole sequence; no gradient.
        clip_low: How far the ratio counts below 1.
        clip_high: How far it counts above 1.
        dual_clip: Largest ratio of a token of negative advantage, above 1; None has none.
        max_ratio: Largest ratio in the unclipped term (two-sided clipping); None has none.
        max_log_ratio: The logarithm of the ratio is clamped to plus or minus this.
        where: Bool array of the completion tokens.

    One unit per token; see `jaxloss.reduce`, and `sequence_mean`, `sequence_sum_scaled` and
    `normalized_sum` for other denominators.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        Schulman et al., Proximal Policy Optimization Algorithms, 2017; dual clip: Ye et al.,
        Mastering Complex Control in MOBA Games, AAAI 2020; two clip ranges: Yu et al., DAPO, 2025.
        Equals rlax's `clipped_surrogate_pg_loss`, which takes the ratio, and verl's vanilla loss
        with `dual_clip=3`; TRL's `delta` is `max_ratio`, and it has no clamp.

    >>> log_probs, old = jnp.log(jnp.array([0.6, 0.1])), jnp.log(jnp.array([0.4, 0.2]))
    >>> ppo_clip_loss(log_probs, old, jnp.array([1.0, 1.0]), reduction="none")  # 1.5 counts as 1.2
    Array([-1.2, -0.5], dtype=float32)
    """
    log_probs, old, advantages = token_inputs(log_probs, old_log_probs, advantages, where)
    values = _ppo_values(
        log_probs - old, advantages, clip_low, clip_high, dual_clip, max_ratio, max_log_ratio
    )
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _ppo_values(
    log_ratio: Array,
    advantages: Array,
    clip_low: Number,
    clip_high: Number,
    dual_clip: Number | None,
    max_ratio: Number | None,
    max_log_ratio: Number,
) -> Array:
    low, high, bound = numbers(
        log_ratio, clip_low=clip_low, clip_high=clip_high, max_log_ratio=max_log_ratio
    )
    caps = {
        name: numbers(log_ratio, **{name: cap})[0]
        for name, cap in (("dual_clip", dual_clip), ("max_ratio", max_ratio))
        if cap is not None
    }
    return clipped_surrogate(jnp.exp(clamp(log_ratio, bound)), advantages, low, high, **caps)


@compiled()
def policy_stats(
    log_probs: Float[Array, "*batch time"],
    old_log_probs: Shaped[Array, "*batch time"],
    advantages: Shaped[Array, "*batch #time"],
    *,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
    where: Where | None = None,
) -> dict[str, Array]:
    """What to log beside `ppo_clip_loss`: means over the kept tokens, without a gradient.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled.
        advantages: `(*batch, time)`, or `(*batch, 1)` for a whole sequence.
        clip_low: As in the loss.
        clip_high: As in the loss.
        where: Bool array of the completion tokens.

    Returns:
        `clip_fraction_low` and `clip_fraction_high`, the shares of tokens whose gradient the clip
        takes away at either end; `log_ratio`, the mean of new minus old; `entropy`, the mean of
        minus the log-probabilities of the sampled tokens.

    >>> stats = policy_stats(jnp.log(jnp.array([0.6, 0.3])), jnp.log(jnp.array([0.3, 0.3])),
    ...                      jnp.array([1.0, 1.0]))
    >>> stats["clip_fraction_high"]
    Array(0.5, dtype=float32)
    """
    log_probs, old, advantages = token_inputs(log_probs, old_log_probs, advantages, where)
    low, high = numbers(log_probs, clip_low=clip_low, clip_high=clip_high)
    log_ratio = log_probs - old
    ratio = jnp.exp(log_ratio)
    count = jnp.asarray(log_probs.size if where is None else jnp.sum(where), log_probs.dtype)
    kept = True if where is None else where
    share = lambda hit: safe_div(jnp.sum(hit & kept, dtype=log_probs.dtype), count)
    return jax.lax.stop_gradient(
        dict(
            clip_fraction_low=share((advantages < 0) & (ratio < 1 - low)),
            clip_fraction_high=share((advantages > 0) & (ratio > 1 + high)),
            log_ratio=safe_div(jnp.sum(log_ratio), count),
            entropy=safe_div(-jnp.sum(log_probs), count),
        )
    )


@compiled()
def clipped_value_loss(
    values: Float[Array, "*shape"],
    old_values: Shaped[Array, "*shape"],
    returns: Shaped[Array, "*shape"],
    *,
    clip: Number = 0.2,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Half the squared error of a value, or of the value near its old one if that is larger.

    $$ \ell = \tfrac{1}{2} \max\left( (v - R)^2, (v_c - R)^2 \right), \quad
       v_c = \operatorname{clip}(v, v_{\text{old}} - c, v_{\text{old}} + c) $$

    Where both errors agree the gradient is that of the unclipped one, whole.

    Args:
        values: Predicted values.
        old_values: Predictions when the returns were collected; no gradient.
        returns: What the values should be; no gradient.
        clip: How far a value counts as moving from the old one, in its own unit.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Engstrom et al., Implementation Matters in Deep Policy Gradients, ICLR 2020. Equals the
        value losses of TRL, tunix and verl, the factor 1/2 included.

    >>> clipped_value_loss(jnp.array([2.0]), jnp.array([1.0]), jnp.array([2.0]), clip=0.5)
    Array(0.125, dtype=float32)
    """
    check_float(values=values)
    check_same_shape(values=values, old_values=old_values, returns=returns)
    values, old, returns = mask(where, *widen(values, old_values, returns))
    old, returns = jax.lax.stop_gradient((old, returns))
    (clip,) = numbers(values, clip=clip)
    error = values - returns
    clipped = old + jnp.clip(values - old, -clip, clip) - returns
    outside = jnp.abs(values - old) > clip
    error = jnp.where(outside & (jnp.abs(clipped) > jnp.abs(error)), clipped, error)
    return reduce(0.5 * error**2, where=where, weights=weights, reduction=reduction)


@compiled()
def grpo_loss(
    log_probs: Float[Array, "*batch time"],
    old_log_probs: Shaped[Array, "*batch time"],
    ref_log_probs: Shaped[Array, "*batch time"],
    advantages: Shaped[Array, "*batch #time"],
    *,
    beta: Number = 0.04,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
    dual_clip: Number | None = None,
    max_ratio: Number | None = None,
    max_log_ratio: Number = 20.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Group relative policy optimisation: `ppo_clip_loss` plus a KL penalty on each token.

    $$ \ell = \ell_{\text{PPO}} + \beta (e^x - x - 1), \quad
       x = \log \pi_{\text{ref}} - \log \pi $$

    The reduction tells the variants apart: `sequence_mean` is the paper, `"mean"` averages over
    tokens (DAPO), `sequence_sum_scaled(longest)` is Dr. GRPO, and `normalized_sum(tokens)` divides
    by the tokens of a whole optimiser step. Advantages come from `group_advantages`.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled; no gradient.
        ref_log_probs: The same under the reference; no gradient.
        advantages: `(*batch, time)`, or `(*batch, 1)` for a whole sequence; no gradient.
        beta: Weight of the KL penalty, `approx_kl_k3`.
        clip_low: How far the ratio counts below 1.
        clip_high: How far it counts above 1.
        dual_clip: Largest ratio of a token of negative advantage, above 1; None has none.
        max_ratio: Largest ratio in the unclipped term; None has none.
        max_log_ratio: The logarithms of both ratios are clamped to plus or minus this.
        where: Bool array of the completion tokens.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        Shao et al., DeepSeekMath, 2024; denominators: Yu et al., DAPO, 2025; Liu et al.,
        Understanding R1-Zero-Like Training, 2025. TRL's default is `beta=0`, without clamps.

    >>> log_probs = jnp.log(jnp.array([[0.5, 0.2]]))
    >>> grpo_loss(log_probs, log_probs, log_probs, jnp.array([[1.0]]))
    Array(-1., dtype=float32)
    """
    check_float(log_probs=log_probs)
    check_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs)
    log_probs, ref = widen(log_probs, ref_log_probs)
    log_probs, old, advantages = token_inputs(log_probs, old_log_probs, advantages, where)
    (ref,) = mask(where, jax.lax.stop_gradient(ref))
    beta, bound = numbers(log_probs, beta=beta, max_log_ratio=max_log_ratio)
    values = _ppo_values(
        log_probs - old, advantages, clip_low, clip_high, dual_clip, max_ratio, max_log_ratio
    )
    values = values + beta * expm1_excess(clamp(ref - log_probs, bound))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def gspo_loss(
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
    r"""Group sequence policy optimisation: the clipped surrogate on one ratio for each sequence.

    $$ \ell = -\min(s A, \operatorname{clip}(s, 1 - c_{\text{low}}, 1 + c_{\text{high}}) A), \quad
       s = \exp\left( \tfrac{1}{T} \sum_t (\log \pi_t - \log \pi_{\text{old},t}) \right) $$

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled; no gradient.
        advantages: One for each sequence, `*batch`; no gradient.
        clip_low: How far the ratio counts below 1.
        clip_high: How far it counts above 1.
        max_log_ratio: The logarithm of the ratio is clamped to plus or minus this.
        where: Bool array `(*batch, time)` of the completion tokens.

    One unit per sequence; see `jaxloss.reduce`. A sequence without a kept token is no unit.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Zheng et al., Group Sequence Policy Optimization, 2025. Equals TRL's
        `importance_sampling_level="sequence"` with its loss type `grpo`.

    >>> log_probs = jnp.log(jnp.array([[0.6, 0.3]]))
    >>> old = jnp.log(jnp.array([[0.4, 0.2]]))
    >>> gspo_loss(log_probs, old, jnp.array([-2.0]))  # the ratio is 1.5
    Array(3., dtype=float32)
    """
    log_probs, old, advantages, units = sequence_inputs(log_probs, old_log_probs, advantages, where)
    low, high, bound = numbers(
        log_probs, clip_low=clip_low, clip_high=clip_high, max_log_ratio=max_log_ratio
    )
    ratio = jnp.exp(clamp(mean_over_time(log_probs - old, where), bound))
    values = clipped_surrogate(ratio, advantages, low, high)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def gspo_token_loss(
    log_probs: Float[Array, "*batch time"],
    old_log_probs: Shaped[Array, "*batch time"],
    advantages: Shaped[Array, "*batch #time"],
    *,
    clip_low: Number = 3e-4,
    clip_high: Number = 4e-4,
    max_log_ratio: Number = 20.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""GSPO with an advantage for each token: values of the sequence's ratio, gradients by token.

    $$ \ell_t = -\min(s_t A_t, \operatorname{clip}(s_t, 1 - c_{\text{low}}, 1 + c_{\text{high}})
       A_t), \quad s_t = \bar s \, \pi_t / \bar \pi_t $$

    with $s$ as in `gspo_loss`; what is barred counts as a constant. With `sequence_mean` and one
    advantage for a sequence, value and gradient are those of `gspo_loss`.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled; no gradient.
        advantages: `(*batch, time)`, or `(*batch, 1)` for a whole sequence; no gradient.
        clip_low: How far the ratio counts below 1.
        clip_high: How far it counts above 1.
        max_log_ratio: The logarithm of the ratio is clamped to plus or minus this.
        where: Bool array of the completion tokens.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        Zheng et al., Group Sequence Policy Optimization, 2025, section 4.3. verl's `gspo` with
        `reduction=sequence_mean`; it clamps the log-ratio at 10 from above only.

    >>> log_probs = jnp.log(jnp.array([[0.6, 0.3]]))
    >>> old = jnp.log(jnp.array([[0.4, 0.2]]))
    >>> gspo_token_loss(log_probs, old, jnp.array([[-2.0]]), reduction="none")
    Array([[3., 3.]], dtype=float32)
    """
    log_probs, old, advantages = token_inputs(log_probs, old_log_probs, advantages, where)
    low, high, bound = numbers(
        log_probs, clip_low=clip_low, clip_high=clip_high, max_log_ratio=max_log_ratio
    )
    constant = jax.lax.stop_gradient(log_probs)
    ratio = jnp.exp(clamp(mean_over_time(constant - old, where), bound))
    values = clipped_surrogate(
        ratio[..., None] * jnp.exp(log_probs - constant), advantages, low, high
    )
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def cispo_loss(
    log_probs: Float[Array, "*batch time"],
    old_log_probs: Shaped[Array, "*batch time"],
    advantages: Shaped[Array, "*batch #time"],
    *,
    max_ratio: Number = 5.0,
    min_ratio: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Policy gradient whose importance weights are clipped: every token keeps a gradient.

    $$ \ell = -\operatorname{clip}(\bar \rho, \rho_{\min}, \rho_{\max}) A \log \pi, \quad
       \rho = \exp(\log \pi - \log \pi_{\text{old}}) $$

    The weight $\bar \rho$ counts as a constant.

    Args:
        log_probs: Log-probability of each sampled token under the policy.
        old_log_probs: The same when it was sampled; no gradient.
        advantages: `(*batch, time)`, or `(*batch, 1)` for a whole sequence; no gradient.
        max_ratio: Largest weight.
        min_ratio: Smallest weight.
        where: Bool array of the completion tokens.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(*batch, time)` if `reduction` is `"none"`.

    Reference:
        MiniMax, MiniMax-M1: Scaling Test-Time Compute Efficiently, 2025. TRL's `epsilon_high` is
        `max_ratio`; verl's clip ranges are `max_ratio - 1` and `1 - min_ratio`.

    >>> log_probs, old = jnp.array([-1.0]), jnp.array([-3.0])
    >>> cispo_loss(log_probs, old, jnp.array([1.0]))  # the ratio, 7.4, counts as 5
    Array(5., dtype=float32)
    """
    log_probs, old, advantages = token_inputs(log_probs, old_log_probs, advantages, where)
    high, low = numbers(log_probs, max_ratio=max_ratio, min_ratio=min_ratio)
    ratio = jnp.clip(jnp.exp(jax.lax.stop_gradient(log_probs) - old), low, high)
    values = -ratio * advantages * log_probs
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _fixed(dims: str, low: int = -16) -> Draw:
    return Draw(dims, lambda g, shape, _: g.integers(low, 17, shape) / 8, "fixed")


_TOKENS = dict(
    log_probs=draw_normal("B T"), old_log_probs=_fixed("B T"), advantages=_fixed("B T", -6)
)
_ONCE = {**_TOKENS, "advantages": _fixed("B 1", -6)}
_NEAR = {**_TOKENS, "log_probs": draw_normal("B T", scale=0.25)}
_SEQUENCES = {**_NEAR, "advantages": _fixed("B", -6)}
_REFERENCE = dict(
    log_probs=draw_normal("B T"),
    old_log_probs=_fixed("B T"),
    ref_log_probs=_fixed("B T"),
    advantages=_fixed("B T", -6),
)
_CONSTANT = {"numerical": "the importance weights count as constants in the gradient"}

CASES = (
    Case(ppo_clip_loss, _TOKENS, dict(clip_low=0.3, clip_high=0.4)),
    Case(
        ppo_clip_loss,
        _ONCE,
        dict(dual_clip=2.5, max_ratio=3.0, max_log_ratio=15.0),
        label="capped",
        positions="B T",
    ),
    Case(
        clipped_value_loss,
        dict(values=draw_normal("B T"), old_values=_fixed("B T"), returns=_fixed("B T")),
        dict(clip=0.3),
    ),
    Case(grpo_loss, _REFERENCE, dict(beta=0.1, clip_low=0.3, clip_high=0.4)),
    Case(
        gspo_loss,
        _SEQUENCES,
        dict(clip_low=0.3, clip_high=0.4, max_log_ratio=15.0),
        positions="B T",
    ),
    Case(
        gspo_token_loss,
        {**_NEAR, "advantages": _fixed("B 1", -6)},
        dict(clip_low=0.3, clip_high=0.4),
        positions="B T",
        without=_CONSTANT,
    ),
    Case(cispo_loss, _TOKENS, dict(max_ratio=4.0, min_ratio=0.25), without=_CONSTANT),
)
