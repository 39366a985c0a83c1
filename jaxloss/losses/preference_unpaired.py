"""Losses of single completions that are desirable or not, and rewards implied by a policy."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import check_float, check_same_shape, check_shape, message
from .._core.compiled import compiled
from .._core.log_ratios import pair_log_ratios, sigmoids
from .._core.numerics import numbers, safe_div, widen
from .._core.reduce import mask, reduce
from .._core.sigmoid import sigmoid_costs
from .._core.terms import Axis, add_up
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "bco_init",
    "bco_loss",
    "bco_pair_loss",
    "implicit_reward",
    "kto_loss",
    "kto_reference_kl",
]


@compiled()
def implicit_reward(
    log_probs: Float[Array, "*shape"],
    ref_log_probs: Shaped[Array, "*shape"],
    *,
    beta: Number = 0.1,
) -> Array:
    """Reward that a policy implies, for logging: `beta` times its log-ratio; no gradient.

    Args:
        log_probs: Log-probability of each completion under the policy.
        ref_log_probs: The same under the reference.
        beta: As in the loss.

    Returns:
        A float32 array of the shape of `log_probs`.

    Reference:
        Rafailov et al., Direct Preference Optimization, NeurIPS 2023, up to a term of the prompt.

    >>> implicit_reward(jnp.array([-3.0]), jnp.array([-5.0]))
    Array([0.2], dtype=float32)
    """
    check_float(log_probs=log_probs)
    check_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs)
    log_probs, ref = widen(log_probs, ref_log_probs)
    (beta,) = numbers(log_probs, beta=beta)
    return jax.lax.stop_gradient(beta * (log_probs - ref))


@compiled()
def kto_loss(
    log_probs: Float[Array, "*batch"],
    ref_log_probs: Shaped[Array, "*batch"],
    desirable: Bool[Array, "*batch"],
    kl: Number,
    *,
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Kahneman-Tversky optimisation: losses are felt against what the policy does on average.

    $$ \ell = \begin{cases}
       \lambda_D (1 - \sigma(\beta (d - z))) & \text{desirable} \\
       \lambda_U (1 - \sigma(\beta (z - d))) & \text{otherwise}
       \end{cases}, \quad d = \log \pi - \log \pi_{\text{ref}} $$

    Each value lies between 0 and its $\lambda$.

    Args:
        log_probs: Log-probability of each completion under the policy, summed over its tokens.
        ref_log_probs: The same under the reference; no gradient.
        desirable: Bool array: whether the completion is a good one.
        kl: The reference point $z$, a scalar from `kto_reference_kl`; no gradient.
        beta: How fast the loss saturates.
        desirable_weight: $\lambda_D$.
        undesirable_weight: $\lambda_U$.

    One unit per completion; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, ICML 2024.
        Equals TRL's KTO and, with both weights 1, Liger's.

    >>> log_probs, ref = jnp.array([-1.0, -1.0]), jnp.array([-1.0, -1.0])
    >>> kto_loss(log_probs, ref, jnp.array([True, False]), 10.0, reduction="none")
    Array([0.7310586, 0.2689414], dtype=float32)
    """
    log_probs, ref = _masked(log_probs, ref_log_probs, desirable, where)
    beta, good, bad, kl = numbers(
        log_probs,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        kl=kl,
    )
    gain = beta * (log_probs - ref - jax.lax.stop_gradient(kl))
    _, missed = sigmoids(jnp.where(desirable, gain, -gain))
    values = jnp.where(desirable, good, bad) * missed
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis_name")
def kto_reference_kl(
    log_probs: Float[Array, "*batch"],
    ref_log_probs: Shaped[Array, "*batch"],
    *,
    where: Where | None = None,
    axis_name: Axis = None,
) -> Array:
    """Reference point of `kto_loss`: mean log-ratio of mismatched pairs, at least 0; no gradient.

    Args:
        log_probs: Log-probability under the policy of completions of *other* prompts of the batch,
            summed over the tokens.
        ref_log_probs: The same under the reference.
        where: Bool array of the pairs that count; without any the result is 0.
        axis_name: Mapped axes over which the batch is split; the mean then runs over all of it.

    Returns:
        A float32 scalar.

    Reference:
        Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, ICML 2024. TRL
        averages the means of its devices, which differs where their counts do.

    >>> kto_reference_kl(jnp.array([-1.0, -2.0]), jnp.array([-2.0, -5.0]))
    Array(2., dtype=float32)
    """
    check_float(log_probs=log_probs)
    check_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs)
    if where is not None:
        check_same_shape(log_probs=log_probs, where=where)
    log_probs, ref = mask(where, *widen(log_probs, ref_log_probs))
    total, count = _total(jax.lax.stop_gradient(log_probs - ref), where, axis_name)
    return jnp.maximum(safe_div(total, count), 0)


def bco_init() -> Array:
    """The state of `bco_loss` before any batch: a sum of rewards and a count.

    Returns:
        Float32 zeros `(2,)`.

    >>> bco_init()
    Array([0., 0.], dtype=float32)
    """
    return jnp.zeros(2, jnp.float32)


@compiled("axis_name")
def bco_loss(
    log_probs: Float[Array, "*batch"],
    ref_log_probs: Shaped[Array, "*batch"],
    desirable: Bool[Array, "*batch"],
    state: Float[Array, "2"],
    *,
    beta: Number = 0.1,
    momentum: Number | None = 0.9,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> tuple[Array, Array]:
    r"""Binary classifier optimisation, in nats, from 0 up, of rewards against their running mean.

    $$ \ell = \begin{cases}
       -\log \sigma(r - \delta) & \text{desirable} \\
       -\log \sigma(\delta - r) & \text{otherwise}
       \end{cases}, \quad r = \beta (\log \pi - \log \pi_{\text{ref}}) $$

    The mean $\delta$ of the rewards is updated with this batch first and has no gradient: sums and
    counts of earlier batches fade by `momentum`. Weights leave it alone.

    Args:
        log_probs: Log-probability of each completion under the policy, summed over its tokens.
        ref_log_probs: The same under the reference; no gradient.
        desirable: Bool array: whether the completion is a good one.
        state: From `bco_init` or the call before.
        beta: Scales the log-ratios.
        momentum: How much of the past stays at each batch; None keeps all of it.
        axis_name: Mapped axes over which the batch is split; the mean then runs over all of it.

    One unit per completion; see `jaxloss.reduce`.

    Returns:
        The loss, a float32 scalar or `*batch` if `reduction` is `"none"`, and the new state.

    Reference:
        Jung et al., Binary Classifier Optimization for Large Language Model Alignment, ACL 2025.
        `momentum=None` equals TRL's `bco`; the paper takes the mean of both classes' means.

    >>> log_probs, desirable = jnp.array([10.0, -10.0]), jnp.array([True, False])
    >>> loss, state = bco_loss(log_probs, jnp.zeros(2), desirable, bco_init())
    >>> loss  # -log sigmoid(1), as the mean reward is 0
    Array(0.3132617, dtype=float32)
    """
    log_probs, ref = _masked(log_probs, ref_log_probs, desirable, where)
    check_float(state=state)
    check_shape((2,), state=state)
    (beta,) = numbers(log_probs, beta=beta)
    rewards = beta * (log_probs - ref)
    past = jax.lax.stop_gradient(jnp.asarray(state).astype(rewards.dtype))
    if momentum is not None:
        past = past * jax.lax.stop_gradient(numbers(rewards, momentum=momentum)[0])
    seen = past + jnp.stack(_total(jax.lax.stop_gradient(rewards), where, axis_name))
    gap = rewards - safe_div(seen[0], seen[1])
    values, _ = sigmoid_costs(jnp.where(desirable, gap, -gap))
    loss = reduce(values, where=where, weights=weights, reduction=reduction)
    return loss, seen.astype(jnp.asarray(state).dtype)


@compiled()
def bco_pair_loss(
    chosen_log_probs: Float[Array, "*batch"],
    rejected_log_probs: Shaped[Array, "*batch"],
    ref_chosen_log_probs: Shaped[Array, "*batch"],
    ref_rejected_log_probs: Shaped[Array, "*batch"],
    *,
    beta: Number = 0.1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Binary classifier optimisation of pairs, in nats, from 0 up; rewards are compared with 0.

    $$ \ell = -\log \sigma(r_w) - \log \sigma(-r_l), \quad
       r = \beta (\log \pi - \log \pi_{\text{ref}}) $$

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the
            preferred completion under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Scales the log-ratios.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Jung et al., Binary Classifier Optimization for Large Language Model Alignment, ACL 2025.
        Equals TRL's `bco_pair`; `bco_loss` shifts the rewards.

    >>> zero = jnp.zeros(1)
    >>> bco_pair_loss(jnp.array([10.0]), zero, zero, zero)  # -log sigmoid(1) + log 2
    Array(1.0064089, dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    (beta,) = numbers(chosen, beta=beta)
    values = sigmoid_costs(beta * chosen)[0] + sigmoid_costs(beta * rejected)[1]
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _masked(
    log_probs: Array, ref_log_probs: Any, desirable: Any, where: Where | None
) -> tuple[Array, Array]:
    check_float(log_probs=log_probs)
    check_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs, desirable=desirable)
    if not jnp.issubdtype(jnp.result_type(desirable), jnp.bool_):
        raise TypeError(message("desirable", "a bool array", jnp.result_type(desirable)))
    if where is not None:
        check_same_shape(log_probs=log_probs, where=where)
    log_probs, ref = mask(where, *widen(log_probs, ref_log_probs))
    return log_probs, jax.lax.stop_gradient(ref)


def _total(x: Array, where: Where | None, axis_name: Axis) -> tuple[Array, Array]:
    """Sum and count of the kept entries over all devices; hidden ones are 0 already."""
    count = x.size if where is None else jnp.sum(where)
    total, count = jnp.sum(x), jnp.asarray(count, x.dtype)
    return add_up(total, axis_name), add_up(count, axis_name)


def _fixed(dims: str, low: int = -16) -> Draw:
    return Draw(dims, lambda g, shape, _: g.integers(low, 17, shape) / 8, "fixed")


_LABELLED = dict(
    log_probs=draw_normal("B"),
    ref_log_probs=_fixed("B"),
    desirable=Draw("B", lambda g, shape, _: g.random(shape) < 0.5, "fixed"),
)
_PAIR = dict(
    chosen_log_probs=draw_normal("B"),
    rejected_log_probs=draw_normal("B"),
    ref_chosen_log_probs=_fixed("B"),
    ref_rejected_log_probs=_fixed("B"),
)

CASES = (
    Case(
        kto_loss,
        {**_LABELLED, "kl": _fixed("", 1)},
        dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.75),
    ),
    Case(
        bco_loss,
        {
            **_LABELLED,
            "state": Draw("2", lambda g, shape, _: g.integers(8, 33, shape) / 8, "fixed"),
        },
        dict(beta=0.3, momentum=0.75),
        coupled=True,
        without={
            "microbatches": "the mean reward is that of the whole batch",
            "weight_two": "weights leave the mean reward alone",
            "numerical": "the mean reward counts as a constant in the gradient",
        },
    ),
    Case(bco_pair_loss, _PAIR, dict(beta=0.3)),
)
