"""Losses of preference pairs against a frozen reference model."""

import jax
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import require
from .._core.compiled import compiled
from .._core.log_ratios import pair_log_ratios, smoothed_cost
from .._core.numerics import numbers
from .._core.reduce import reduce
from .._core.sigmoid import sigmoid_costs
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "dpo_hinge_loss",
    "dpo_length_normalized_loss",
    "dpo_loss",
    "ipo_loss",
    "nca_pair_loss",
    "robust_dpo_loss",
    "sppo_hard_loss",
]


@compiled()
def dpo_loss(
    chosen_log_probs: Float[Array, "*batch"],
    rejected_log_probs: Shaped[Array, "*batch"],
    ref_chosen_log_probs: Shaped[Array, "*batch"],
    ref_rejected_log_probs: Shaped[Array, "*batch"],
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Direct preference optimisation, in nats, from 0 up: a logistic loss of the log-ratios.

    $$ \ell = -(1 - \epsilon) \log \sigma(\beta d) - \epsilon \log \sigma(-\beta d), \quad
       d = (\log \pi_w - \log \pi^{\text{ref}}_w) - (\log \pi_l - \log \pi^{\text{ref}}_l) $$

    Also known as `dpo_length_normalized_loss`, to be given averages over the tokens.

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the
            preferred completion under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Strength of the pull towards the reference: scales the log-ratios.
        label_smoothing: Share of pairs taken to be labelled the wrong way round.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Rafailov et al., Direct Preference Optimization, NeurIPS 2023; smoothing (cDPO): Mitchell, A
        note on DPO with noisy preferences, 2023. Equals TRL's `sigmoid`, which ignores its label
        smoothing, and its `sigmoid_norm` on averages; what Liger calls cDPO is `robust_dpo_loss`.

    >>> zero = jnp.zeros(1)
    >>> dpo_loss(jnp.array([10.0]), zero, zero, zero)  # -log sigmoid(1)
    Array(0.3132617, dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    beta, label_smoothing = numbers(chosen, beta=beta, label_smoothing=label_smoothing)
    values = smoothed_cost(beta * (chosen - rejected), label_smoothing)
    return reduce(values, where=where, weights=weights, reduction=reduction)


dpo_length_normalized_loss = dpo_loss


@compiled()
def robust_dpo_loss(
    chosen_log_probs: Float[Array, "*batch"],
    rejected_log_probs: Shaped[Array, "*batch"],
    ref_chosen_log_probs: Shaped[Array, "*batch"],
    ref_rejected_log_probs: Shaped[Array, "*batch"],
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 0.1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""DPO without the bias of flipped labels, in nats; unbounded below.

    $$ \ell = \frac{-(1 - \epsilon) \log \sigma(\beta d) + \epsilon \log \sigma(-\beta d)}
       {1 - 2 \epsilon}, \quad
       d = (\log \pi_w - \log \pi^{\text{ref}}_w) - (\log \pi_l - \log \pi^{\text{ref}}_l) $$

    On average over labels flipped with probability $\epsilon$ this is `dpo_loss` on the true ones.

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the
            preferred completion under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Strength of the pull towards the reference: scales the log-ratios.
        label_smoothing: Probability of a flipped label, below 1/2.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Chowdhury et al., Provably Robust DPO, ICML 2024. Equals `robust` of TRL and of Liger.

    >>> zero = jnp.zeros(1)
    >>> robust_dpo_loss(jnp.array([10.0]), zero, zero, zero)  # -log sigmoid(1) - 1 / 8
    Array(0.18826169, dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    beta, label_smoothing = numbers(chosen, beta=beta, label_smoothing=label_smoothing)
    require(lambda: label_smoothing < 0.5, "label_smoothing", "a value below 1/2")
    x = beta * (chosen - rejected)
    preferred, _ = sigmoid_costs(x)
    values = preferred - label_smoothing / (1 - 2 * label_smoothing) * x
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def dpo_hinge_loss(
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
    r"""Hinge loss of the log-ratios, from 0 up: pairs beyond the margin are done with.

    $$ \ell = \max(0, 1 - \beta d), \quad
       d = (\log \pi_w - \log \pi^{\text{ref}}_w) - (\log \pi_l - \log \pi^{\text{ref}}_l) $$

    The gradient at the kink, $\beta d = 1$, is 0.

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the
            preferred completion under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Inverse of the difference of log-ratios that suffices.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Zhao et al., SLiC-HF, 2023; Liu et al., Statistical Rejection Sampling Improves Preference
        Optimization, ICLR 2024. Equals TRL's `hinge`.

    >>> zero = jnp.zeros(1)
    >>> dpo_hinge_loss(jnp.array([10.0]), zero, zero, zero)  # 1 - 0.1 * 10
    Array(0., dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    (beta,) = numbers(chosen, beta=beta)
    values = jax.nn.relu(1 - beta * (chosen - rejected))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def ipo_loss(
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
    r"""Identity preference optimisation: squared distance of the log-ratios from a fixed gap.

    $$ \ell = \left( d - \frac{1}{2 \beta} \right)^2, \quad
       d = (\log \pi_w - \log \pi^{\text{ref}}_w) - (\log \pi_l - \log \pi^{\text{ref}}_l) $$

    Give averages over the tokens: with sums the loss grows with the length of the completions.

    Args:
        chosen_log_probs: Log-probability, averaged over the tokens, of the
            preferred completion under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Strength of the pull towards the reference; half its inverse is the gap aimed at.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences,
        AISTATS 2024. Equals TRL's `ipo`, which divides each log-ratio by its number of tokens; the
        authors do so too, though the paper does not say it.

    >>> zero = jnp.zeros(1)
    >>> ipo_loss(jnp.array([10.0]), zero, zero, zero)  # 10 - 1 / 0.2 is 5
    Array(25., dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    (beta,) = numbers(chosen, beta=beta)
    values = (chosen - rejected - 0.5 / beta) ** 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def nca_pair_loss(
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
    r"""Noise contrastive alignment of a pair, in nats, from 0 up; keeps the chosen one likely.

    $$ \ell = -\log \sigma(r_w) - \tfrac{1}{2} \log \sigma(-r_w) - \tfrac{1}{2} \log \sigma(-r_l),
       \quad r = \beta (\log \pi - \log \pi^{\text{ref}}) $$

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
        Chen et al., Noise Contrastive Alignment of Language Models with Explicit Rewards, NeurIPS
        2024. Equals TRL's `nca_pair`.

    >>> zero = jnp.zeros(1)
    >>> nca_pair_loss(jnp.array([10.0]), zero, zero, zero)  # 0.3133 + 0.5 * (1.3133 + 0.6931)
    Array(1.3164661, dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    (beta,) = numbers(chosen, beta=beta)
    (one, zero), (_, other) = sigmoid_costs(beta * chosen), sigmoid_costs(beta * rejected)
    values = one + 0.5 * (zero + other)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def sppo_hard_loss(
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
    r"""Self-play preference optimisation with hard labels: squared distances from two rewards.

    $$ \ell = \left( d_w - \frac{1}{2 \beta} \right)^2 + \left( d_l + \frac{1}{2 \beta} \right)^2,
       \quad d = \log \pi - \log \pi^{\text{ref}} $$

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the
            preferred completion under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Strength of the pull towards the reference; half its inverse is the
            log-ratio aimed at.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Wu et al., Self-Play Preference Optimization for Language Model Alignment, 2024.
        Equals TRL's `sppo_hard`.

    >>> zero = jnp.zeros(1)
    >>> sppo_hard_loss(jnp.array([10.0]), zero, zero, zero)  # 5^2 + 5^2
    Array(50., dtype=float32)
    """
    chosen, rejected = pair_log_ratios(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    (beta,) = numbers(chosen, beta=beta)
    values = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


_FIXED = Draw("B", lambda g, shape, _: g.integers(-16, 17, shape) / 8, "fixed")
_PAIR = dict(
    chosen_log_probs=draw_normal("B"),
    rejected_log_probs=draw_normal("B"),
    ref_chosen_log_probs=_FIXED,
    ref_rejected_log_probs=_FIXED,
)

CASES = (
    Case(dpo_loss, _PAIR, dict(beta=0.3)),
    Case(dpo_loss, _PAIR, dict(label_smoothing=0.2), label="smoothed"),
    Case(robust_dpo_loss, _PAIR, dict(beta=0.3, label_smoothing=0.2)),
    Case(dpo_hinge_loss, _PAIR, dict(beta=0.3)),
    Case(ipo_loss, _PAIR, dict(beta=0.3)),
    Case(nca_pair_loss, _PAIR, dict(beta=0.3)),
    Case(sppo_hard_loss, _PAIR, dict(beta=0.3)),
)
