"""Advantages from rewards: groups of samples, leave-one-out, and generalised over time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from .._core.case import Case
from .._core.checks import (
    check_array,
    check_axis,
    check_float,
    check_min_rank,
    check_same_shape,
    check_shape,
    message,
)
from .._core.compiled import compiled
from .._core.numerics import numbers, safe_div, safe_sqrt, widen
from .._core.reduce import mask
from .._core.typing import Number

__all__ = ["gae", "group_advantages", "rloo_advantages"]


@compiled("group_axis", "scale_by_std", "ddof")
def group_advantages(
    rewards: Shaped[Array, "*groups"],
    *,
    group_axis: int = -1,
    scale_by_std: bool = True,
    ddof: int = 1,
    eps: Number = 1e-4,
    where: Bool[Array, "*groups"] | None = None,
) -> Array:
    r"""How much better each sample of a group is than the group, as in GRPO; no gradient.

    $$ A_i = \frac{r_i - \bar r}{\operatorname{std}(r) + \epsilon} $$

    A group of one sample, or of equal rewards, has advantages of exactly 0.

    Args:
        rewards: One for each sample; integers and bools are taken as numbers.
        group_axis: Axis along which the samples of a group lie.
        scale_by_std: Whether to divide; Dr. GRPO only subtracts the mean.
        ddof: Taken from the count in the variance: 1 is unbiased, 0 the variance of the sample.
        eps: Added to the standard deviation, in the unit of the rewards.
        where: Bool array of the samples that exist; the others get 0.

    Returns:
        A float32 array of the shape of `rewards`.

    Reference:
        Shao et al., DeepSeekMath, 2024; without the division: Liu et al., Understanding
        R1-Zero-Like Training, 2025. `eps` is 1e-4 in TRL, 1e-6 in verl and tunix, as is `ddof=1`.

    >>> group_advantages(jnp.array([[1.0, 0.0, 0.0, 1.0]]), scale_by_std=False)
    Array([[ 0.5, -0.5, -0.5,  0.5]], dtype=float32)
    """
    if isinstance(ddof, bool) or not isinstance(ddof, int) or ddof < 0:
        raise ValueError(message("ddof", "an integer of at least 0", repr(ddof)))
    axis, rewards, kept, count = _groups(rewards, group_axis, where)
    (eps,) = numbers(rewards, eps=eps)
    shifted = _shifted(rewards, kept, axis)
    mean = safe_div(jnp.sum(shifted, axis=axis, keepdims=True), count)
    gap = jnp.where(kept, shifted - mean, 0)
    if scale_by_std:
        freedom = jnp.maximum(count - ddof, 0)
        variance = safe_div(jnp.sum(gap * gap, axis=axis, keepdims=True), freedom)
        gap = safe_div(gap, jnp.where(variance > 0, safe_sqrt(variance) + eps, 0))
    return gap


@compiled("group_axis")
def rloo_advantages(
    rewards: Shaped[Array, "*groups"],
    *,
    group_axis: int = -1,
    where: Bool[Array, "*groups"] | None = None,
) -> Array:
    r"""Reward of each sample minus the mean of the others of its group; no gradient.

    $$ A_i = r_i - \frac{1}{n - 1} \sum_{j \neq i} r_j $$

    A group of one sample has an advantage of 0.

    Args:
        rewards: One for each sample; integers and bools are taken as numbers.
        group_axis: Axis along which the samples of a group lie.
        where: Bool array of the samples that exist; the others get 0.

    Returns:
        A float32 array of the shape of `rewards`.

    Reference:
        Ahmadian et al., Back to Basics: Revisiting REINFORCE-Style Optimization, ACL 2024. Equals
        verl's `rloo`.

    >>> rloo_advantages(jnp.array([[1.0, 0.0, 0.0]]))
    Array([[ 1. , -0.5, -0.5]], dtype=float32)
    """
    axis, rewards, kept, count = _groups(rewards, group_axis, where)
    shifted = _shifted(rewards, kept, axis)
    others = jnp.sum(shifted, axis=axis, keepdims=True) - shifted
    gap = shifted - safe_div(others, jnp.maximum(count - 1, 0))
    return jnp.where(kept & (count > 1), gap, 0)


def _groups(rewards: Any, axis: int, where: Any) -> tuple[int, Array, Array, Array]:
    """The axis, masked rewards, which of them exist, and how many in each group."""
    check_array(rewards=rewards)
    rewards = jnp.asarray(rewards)
    axis = check_axis(axis, rewards.ndim)
    if where is not None:
        check_same_shape(rewards=rewards, where=where)
    (rewards,) = mask(where, *widen(jax.lax.stop_gradient(rewards)))
    kept = jnp.ones(rewards.shape, bool) if where is None else jnp.asarray(where)
    return axis, rewards, kept, jnp.sum(kept, axis=axis, keepdims=True, dtype=rewards.dtype)


def _shifted(rewards: Array, kept: Array, axis: int) -> Array:
    """Rewards less the largest of the group, so that equal ones are exactly 0."""
    known = jnp.where(kept, rewards, -jnp.inf)
    largest = jnp.max(known, axis=axis, keepdims=True, initial=-jnp.inf)
    return jnp.where(kept, rewards - largest, 0)


@compiled()
def gae(
    rewards: Shaped[Array, "*batch time"],
    values: Shaped[Array, "*batch time"],
    bootstrap_value: Shaped[Array, "*batch"],
    discounts: Shaped[Array, "*discounts"],
    *,
    gae_lambda: Number = 0.95,
    where: Bool[Array, "*batch time"] | None = None,
) -> tuple[Array, Array]:
    r"""Generalised advantage estimates and the returns they imply; no gradient.

    $$ \delta_t = r_t + \gamma_t v_{t+1} - v_t, \quad
       A_t = \delta_t + \gamma_t \lambda A_{t+1}, \quad R_t = A_t + v_t $$

    A step that `where` hides does not exist: it carries advantage and return of the next kept one,
    and the steps before it are not discounted for it. Whitening is left to the caller.

    Args:
        rewards: Reward after each step, time last.
        values: Value before each step.
        bootstrap_value: Value after the last step; 0 where the episode has ended.
        discounts: Discount after each step, 0 where the episode ends; or one scalar for all.
        gae_lambda: 0 trusts the values, 1 the rewards.
        where: Bool array of the steps that exist.

    Returns:
        The advantages and the returns, float32 arrays of the shape of `rewards`.

    Reference:
        Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage Estimation,
        ICLR 2016. Equals rlax's `truncated_generalized_advantage_estimation`, which takes the
        values with the last one appended, and verl's before it whitens.

    >>> advantages, returns = gae(
    ...     jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]), jnp.array(0.0), 1.0, gae_lambda=1.0
    ... )
    >>> advantages
    Array([0.5, 0.5], dtype=float32)
    """
    check_float(values=values)
    check_min_rank(1, values=values)
    check_same_shape(values=values, rewards=rewards)
    check_shape(jnp.shape(values)[:-1], bootstrap_value=bootstrap_value)
    check_array(discounts=discounts)
    if jnp.shape(discounts) not in ((), jnp.shape(values)):
        expected = f"a scalar or shape {jnp.shape(values)}"
        raise ValueError(message("discounts", expected, f"shape {jnp.shape(discounts)}"))
    if where is not None:
        check_same_shape(values=values, where=where)
    arrays = widen(values, rewards, bootstrap_value, discounts)
    values, rewards, last, discounts = jax.lax.stop_gradient(arrays)
    discounts = jnp.broadcast_to(discounts, values.shape)
    values, rewards, discounts = mask(where, values, rewards, discounts)
    kept = jnp.ones(values.shape, bool) if where is None else jnp.asarray(where)
    (decay,) = numbers(values, gae_lambda=jax.lax.stop_gradient(gae_lambda))

    def step(later: tuple[Array, Array], now: tuple[Array, ...]) -> tuple[Any, Any]:
        advantage, next_value = later
        reward, value, discount, real = now
        delta = reward + discount * next_value - value
        advantage = jnp.where(real, delta + discount * decay * advantage, advantage)
        carry = advantage, jnp.where(real, value, next_value)
        return carry, carry

    steps = tuple(jnp.moveaxis(x, -1, 0) for x in (rewards, values, discounts, kept))
    _, (advantages, carried) = jax.lax.scan(step, (jnp.zeros_like(last), last), steps, reverse=True)
    advantages, carried = jnp.moveaxis(advantages, 0, -1), jnp.moveaxis(carried, 0, -1)
    return advantages, advantages + carried


CASES: tuple[Case, ...] = ()
