"""What losses of language models share: masked log-ratios, their costs, and clipped ratios."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .checks import check_array, check_float, check_min_rank, check_same_shape, check_shape, message
from .numerics import safe_div, safe_mul, widen
from .reduce import mask
from .sigmoid import sigmoid_costs
from .typing import Where


def pair_log_ratios(where: Where | None, **log_probs: Any) -> tuple[Array, Array]:
    """Log-ratios of the chosen and the rejected answers to a reference without a gradient.

    The arrays come in the order chosen, rejected, reference of the chosen, of the rejected.
    """
    first = next(iter(log_probs))
    check_float(**{first: log_probs[first]})
    check_same_shape(**log_probs)
    chosen, rejected, *reference = mask(where, *widen(*log_probs.values()))
    ref_chosen, ref_rejected = jax.lax.stop_gradient(reference)
    return chosen - ref_chosen, rejected - ref_rejected


def smoothed_cost(x: Array, label_smoothing: Array) -> Array:
    """`-(1 - e) log sigmoid(x) - e log sigmoid(-x)`: the cost of a preference that errs with e."""
    preferred, _ = sigmoid_costs(x)
    return preferred + safe_mul(label_smoothing, x)


def sigmoids(x: Array) -> tuple[Array, Array]:
    """`sigmoid(x)` and `sigmoid(-x)`; neither cancels, nor do their derivatives."""
    one, zero = sigmoid_costs(x)
    return jnp.exp(-one), jnp.exp(-zero)


def token_inputs(
    log_probs: Array, old_log_probs: Any, advantages: Any, where: Where | None
) -> tuple[Array, Array, Array]:
    """Check, mask and widen what a policy loss takes, all as `(*batch, time)`.

    Old log-probabilities and advantages have no gradient; one advantage may serve a sequence.
    """
    check_tokens(log_probs, old_log_probs, where)
    check_array(advantages=advantages)
    shape, once = log_probs.shape, (*log_probs.shape[:-1], 1)
    if jnp.shape(advantages) not in (shape, once):
        raise ValueError(message("advantages", f"shape {shape} or {once}", jnp.shape(advantages)))
    log_probs, old, advantages = widen(log_probs, old_log_probs, advantages)
    log_probs, old, advantages = mask(
        where, log_probs, old, jnp.broadcast_to(advantages, log_probs.shape)
    )
    return log_probs, *jax.lax.stop_gradient((old, advantages))


def sequence_inputs(
    log_probs: Array, old_log_probs: Any, advantages: Any, where: Where | None
) -> tuple[Array, Array, Array, Where | None]:
    """The same with one advantage for each sequence, and which sequences have a kept token."""
    check_tokens(log_probs, old_log_probs, where)
    check_shape(log_probs.shape[:-1], advantages=advantages)
    log_probs, old, advantages = widen(log_probs, old_log_probs, advantages)
    log_probs, old = mask(where, log_probs, old)
    units = None if where is None else jnp.any(where, axis=-1)
    (advantages,) = mask(units, advantages)
    return log_probs, *jax.lax.stop_gradient((old, advantages)), units


def check_tokens(log_probs: Array, other: Any, where: Where | None) -> None:
    """Log-probabilities `(*batch, time)` of one shape, and a mask of that shape."""
    check_float(log_probs=log_probs)
    check_min_rank(1, log_probs=log_probs)
    check_same_shape(log_probs=log_probs, old_log_probs=other)
    if where is not None:
        check_same_shape(log_probs=log_probs, where=where)


def token_count(log_probs: Array, where: Where | None) -> Array:
    """Number of kept tokens of each sequence."""
    if where is None:
        return jnp.full(log_probs.shape[:-1], log_probs.shape[-1], log_probs.dtype)
    return jnp.sum(where, axis=-1, dtype=log_probs.dtype)


def mean_over_time(x: Array, where: Where | None) -> Array:
    """Mean over the kept tokens of what is 0 on the others."""
    return safe_div(jnp.sum(x, axis=-1), token_count(x, where))


def clamp(x: Array, bound: Array) -> Array:
    """`x` within `+-bound`; its gradient is 1 up to the bound and 0 beyond."""
    return jnp.where(jnp.abs(x) > bound, jnp.sign(x) * bound, x)


def clipped_surrogate(
    ratio: Array,
    advantages: Array,
    clip_low: Array,
    clip_high: Array,
    *,
    max_ratio: Array | None = None,
    dual_clip: Array | None = None,
) -> Array:
    """`-min(rho A, clip(rho) A)`; where both agree the gradient is that of `rho`, whole.

    `max_ratio` caps the first ratio; `dual_clip` the ratio of a negative advantage.
    """
    near = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    first = ratio if max_ratio is None else jnp.where(ratio > max_ratio, max_ratio, ratio)
    negative = advantages < 0
    ratio = jnp.where(jnp.where(negative, first >= near, first <= near), first, near)
    if dual_clip is not None:
        ratio = jnp.where(negative & (ratio > dual_clip), dual_clip, ratio)
    return -advantages * ratio
