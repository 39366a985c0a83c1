"""More losses of preference pairs against a reference: reverse KL, anchors, discovered."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import require
from .._core.compiled import compiled
from .._core.log_ratios import pair_log_ratios, sigmoids
from .._core.numerics import expm1, expm1_excess, numbers
from .._core.reduce import reduce
from .._core.sigmoid import sigmoid_costs
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "apo_down_loss",
    "apo_zero_loss",
    "discopop_loss",
    "exo_pair_loss",
]


@compiled()
def exo_pair_loss(
    chosen_log_probs: Float[Array, "*batch"],
    rejected_log_probs: Shaped[Array, "*batch"],
    ref_chosen_log_probs: Shaped[Array, "*batch"],
    ref_rejected_log_probs: Shaped[Array, "*batch"],
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 1e-3,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Exact preference optimisation of a pair: reverse KL to smoothed labels, in nats.

    $$ \ell = q \log \frac{q}{1 - \epsilon} + (1 - q) \log \frac{1 - q}{\epsilon}, \quad
       q = \sigma(\beta d), \quad
       d = (\log \pi_w - \log \pi^{\text{ref}}_w) - (\log \pi_l - \log \pi^{\text{ref}}_l) $$

    It is 0 where $q = 1 - \epsilon$. Around it no digit is lost.

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the
            preferred completion under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Strength of the pull towards the reference: scales the log-ratios.
        label_smoothing: Probability that the other completion is the better one; above 0.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, ICML 2024.
        Equals TRL's `exo_pair`.

    >>> zero = jnp.zeros(1)
    >>> exo_pair_loss(jnp.array([10.0]), zero, zero, zero)  # the KL of 0.7311 to 0.999
    Array(1.2763097, dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    beta, label_smoothing = numbers(chosen, beta=beta, label_smoothing=label_smoothing)
    ok = lambda: (label_smoothing > 0) & (label_smoothing < 1)
    require(ok, "label_smoothing", "a value in (0, 1)")
    target = jnp.log1p(-label_smoothing) - jnp.log(label_smoothing)
    values = _binary_kl(beta * (chosen - rejected), target)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@jax.custom_jvp
def _binary_kl(x: Array, target: Array) -> Array:
    """KL divergence of a coin with log-odds `x` from one with log-odds `target`."""
    (one, zero), (target_one, target_zero) = sigmoid_costs(x), sigmoid_costs(target)
    first = target_one - one
    second = jnp.where(x > 0, first + (target - x), target_zero - zero)
    far = jnp.exp(-one) * first + jnp.exp(-zero) * second
    # With r the smaller side of x, s its change in log-odds and h(s) = exp(s) - 1 - s, the
    # divergence is r h(s) - h(log(1 + r (exp(s) - 1))): nothing cancels where s is small.
    rarer = jnp.exp(-jnp.where(x > 0, zero, one))
    step = jnp.where(x > 0, x - target, target - x)
    near = jnp.abs(step) < 1
    step = jnp.where(near, step, 0)
    close = rarer * expm1_excess(step) - expm1_excess(jnp.log1p(rarer * jnp.expm1(step)))
    return jnp.where(near, close, far)


@_binary_kl.defjvp
def _binary_kl_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    # By hand: what autodiff adds up cancels to this product.
    (x, target), (x_dot, target_dot) = primals, tangents
    (q, other), (p, missing) = sigmoids(x), sigmoids(target)
    moved = q * other * (x - target) * x_dot + (p * other - q * missing) * target_dot
    return _binary_kl(x, target), moved


@compiled()
def apo_zero_loss(
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
    r"""Anchored preference optimisation, in `[0, 2]`: chosen up, rejected down, each by itself.

    $$ \ell = 1 - \sigma(r_w) + \sigma(r_l), \quad r = \beta (\log \pi - \log \pi^{\text{ref}}) $$

    For completions better than what the model writes by itself; else `apo_down_loss`.

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the
            preferred completion under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Strength of the pull towards the reference: scales the log-ratios.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, TACL 2025.
        Equals TRL's `apo_zero`.

    >>> zero = jnp.zeros(1)
    >>> apo_zero_loss(jnp.array([10.0]), zero, zero, zero)  # 1 - sigmoid(1) + 1 / 2
    Array(0.7689414, dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    (beta,) = numbers(chosen, beta=beta)
    (_, missed), (kept, _) = sigmoids(beta * chosen), sigmoids(beta * rejected)
    values = missed + kept
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def apo_down_loss(
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
    r"""Anchored preference optimisation, in `[0, 2]`: both down, the rejected one further.

    $$ \ell = \sigma(r_w) + 1 - \sigma(r_w - r_l), \quad
       r = \beta (\log \pi - \log \pi^{\text{ref}}) $$

    For completions worse than what the model writes by itself; else `apo_zero_loss`.

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the
            preferred completion under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Strength of the pull towards the reference: scales the log-ratios.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, TACL 2025.
        Equals TRL's `apo_down`.

    >>> zero = jnp.zeros(1)
    >>> apo_down_loss(jnp.array([10.0]), zero, zero, zero)  # sigmoid(1) + 1 - sigmoid(1)
    Array(1., dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    (beta,) = numbers(chosen, beta=beta)
    values = _both_down(beta * chosen, beta * rejected)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@jax.custom_jvp
def _both_down(chosen: Array, rejected: Array) -> Array:
    return sigmoids(chosen)[0] + sigmoids(chosen - rejected)[1]


@_both_down.defjvp
def _both_down_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    # In the chosen reward two slopes s(1 - s) almost cancel: their difference is a product.
    (chosen, rejected), (chosen_dot, rejected_dot) = primals, tangents
    margin = chosen - rejected
    kept, missed = sigmoids(margin)
    slope = -_sigmoid_difference(chosen, margin) * _sigmoid_difference(chosen, -margin)
    return _both_down(chosen, rejected), slope * chosen_dot + kept * missed * rejected_dot


def _sigmoid_difference(a: Array, b: Array) -> Array:
    """`sigmoid(a) - sigmoid(b)` with every digit."""
    (p, other), (q, rest) = sigmoids(a), sigmoids(b)
    forward = a >= b
    share = -expm1(jnp.where(forward, b - a, a - b))
    return jnp.where(forward, p * rest, -q * other) * share


@compiled()
def discopop_loss(
    chosen_log_probs: Float[Array, "*batch"],
    rejected_log_probs: Shaped[Array, "*batch"],
    ref_chosen_log_probs: Shaped[Array, "*batch"],
    ref_rejected_log_probs: Shaped[Array, "*batch"],
    *,
    beta: Number = 0.1,
    tau: Number = 0.05,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Discovered preference optimisation: a blend of the logistic and the exponential loss.

    $$ \ell = (1 - m) (-\log \sigma(x)) + m e^{-x}, \quad m = \sigma(x / \tau), \quad x = \beta d,
       \quad d = (\log \pi_w - \log \pi^{\text{ref}}_w) - (\log \pi_l - \log \pi^{\text{ref}}_l) $$

    The exponential is taken once, of $\log m - x$, so that no pair overflows while $\tau \leq 1$.

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the
            preferred completion under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Strength of the pull towards the reference: scales the log-ratios.
        tau: Width of the change from one loss to the other.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Lu et al., Discovering Preference Optimization Algorithms with and for Large Language
        Models, NeurIPS 2024. Equals TRL's `discopop`.

    >>> zero = jnp.zeros(1)
    >>> discopop_loss(jnp.array([10.0]), zero, zero, zero)  # m is almost 1, so exp(-1)
    Array(0.36787945, dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    beta, tau = numbers(chosen, beta=beta, tau=tau)
    x = beta * (chosen - rejected)
    (logistic, _), (gate, rest) = sigmoid_costs(x), sigmoid_costs(x / tau)
    values = jnp.exp(-rest) * logistic + jnp.exp(-(gate + x))
    return reduce(values, where=where, weights=weights, reduction=reduction)


_FIXED = Draw("B", lambda g, shape, _: g.integers(-16, 17, shape) / 8, "fixed")
_PAIR = dict(
    chosen_log_probs=draw_normal("B"),
    rejected_log_probs=draw_normal("B"),
    ref_chosen_log_probs=_FIXED,
    ref_rejected_log_probs=_FIXED,
)

CASES = (
    Case(exo_pair_loss, _PAIR, dict(beta=0.3, label_smoothing=0.05)),
    Case(apo_zero_loss, _PAIR, dict(beta=0.3)),
    Case(apo_down_loss, _PAIR, dict(beta=0.3)),
    Case(discopop_loss, _PAIR, dict(beta=0.3, tau=0.2)),
)
