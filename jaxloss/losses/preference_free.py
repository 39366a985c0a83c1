"""Preference losses without a reference model, losses of reward models, and transformed scores."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal, draw_uniform
from .._core.checks import (
    check_array,
    check_float,
    check_min_rank,
    check_option,
    check_same_shape,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.log_ratios import smoothed_cost
from .._core.numerics import box_cox, expm1, numbers, safe_div, widen
from .._core.reduce import mask, reduce
from .._core.sigmoid import sigmoid_costs
from .._core.softmax import cross_entropy
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "alphapo_rewards",
    "bradley_terry_loss",
    "cpo_loss",
    "f_divergence_scores",
    "orpo_loss",
    "plackett_luce_loss",
    "simpo_loss",
]


@compiled()
def orpo_loss(
    average_chosen_log_probs: Float[Array, "*batch"],
    average_rejected_log_probs: Shaped[Array, "*batch"],
    *,
    beta: Number = 0.1,
    nll_weight: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Odds ratio preference optimisation, in nats, from 0 up: likelihood plus log-odds ratio.

    $$ \ell = -w \, l_w - \beta \log \sigma\left( \log \frac{\mathrm{odds}_w}{\mathrm{odds}_l}
       \right), \quad \mathrm{odds} = \frac{e^l}{1 - e^l} $$

    The odds keep every digit up to probabilities of almost 1. If the rejected completion is certain
    the loss is infinite, with a gradient of 0 there; two equal ones have odds ratio 1. A
    log-probability above 0, as rounding makes it, counts as 0 in the odds.

    Args:
        average_chosen_log_probs: Log-probability of the preferred completion, averaged over its
            tokens: sums would make the odds of long completions vanish.
        average_rejected_log_probs: The same of the other completion.
        beta: Weight of the odds ratio, the paper's lambda.
        nll_weight: Weight of the negative log-likelihood of the preferred completion.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, EMNLP 2024.
        TRL and Liger average the likelihood over the tokens of all preferred completions: set
        `nll_weight=0` and add that.

    >>> log_probs = jnp.log(jnp.array([0.5]))
    >>> orpo_loss(log_probs, log_probs, beta=1.0)  # 2 log 2
    Array(1.3862944, dtype=float32)
    """
    chosen, rejected = _pair(
        where,
        average_chosen_log_probs=average_chosen_log_probs,
        average_rejected_log_probs=average_rejected_log_probs,
    )
    require(lambda: chosen <= 1e-6, "average_chosen_log_probs", "values of at most 0", where)
    require(lambda: rejected <= 1e-6, "average_rejected_log_probs", "values of at most 0", where)
    beta, nll_weight = numbers(chosen, beta=beta, nll_weight=nll_weight)
    values = beta * _odds_cost(chosen, rejected) - nll_weight * chosen
    return reduce(values, where=where, weights=weights, reduction=reduction)


@jax.custom_jvp
def _odds_cost(chosen: Array, rejected: Array) -> Array:
    """`log(1 + odds_l / odds_w)` from log-probabilities."""
    miss_w, miss_l = _miss(chosen), _miss(rejected)
    even = (chosen == rejected) | ((miss_w == 0) & (miss_l == 0))
    log_odds = (chosen - rejected) - jnp.log(miss_w / jnp.where(even, 1, miss_l))
    return sigmoid_costs(jnp.where(even, 0, log_odds))[0]


@_odds_cost.defjvp
def _odds_cost_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    # By hand: the slopes of both logarithms are infinite at p = 1, their share of the loss is not.
    (chosen, rejected), (chosen_dot, rejected_dot) = primals, tangents
    miss_w, miss_l = _miss(chosen), _miss(rejected)
    both = miss_w + jnp.exp(chosen - rejected) * miss_l
    down = safe_div(jnp.ones_like(both), both)
    moved = safe_div(miss_w, miss_l * both) * rejected_dot - down * chosen_dot
    return _odds_cost(chosen, rejected), moved


def _miss(log_prob: Array) -> Array:
    """`1 - p`, and no negative zero."""
    return jnp.abs(expm1(jnp.minimum(log_prob, 0)))


@compiled()
def cpo_loss(
    chosen_log_probs: Float[Array, "*batch"],
    rejected_log_probs: Shaped[Array, "*batch"],
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Contrastive preference optimisation, in nats, from 0 up: DPO with a uniform reference.

    $$ \ell = -(1 - \epsilon) \log \sigma(x) - \epsilon \log \sigma(-x), \quad
       x = \beta (\log \pi_w - \log \pi_l) $$

    The likelihood of the preferred completions, part of the paper's objective, is yours to add.

    Args:
        chosen_log_probs: Log-probability of the preferred completion, summed over its tokens.
        rejected_log_probs: The same of the other completion.
        beta: Scales the log-ratio.
        label_smoothing: Share of pairs taken to be labelled the wrong way round.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Xu et al., Contrastive Preference Optimization, ICML 2024. Equals TRL's `sigmoid` loss of
        CPO; Liger adds the likelihood.

    >>> cpo_loss(jnp.array([-5.0]), jnp.array([-15.0]))  # -log sigmoid(1)
    Array(0.3132617, dtype=float32)
    """
    chosen, rejected = _pair(
        where, chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs
    )
    beta, label_smoothing = numbers(chosen, beta=beta, label_smoothing=label_smoothing)
    values = smoothed_cost(beta * (chosen - rejected), label_smoothing)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def simpo_loss(
    average_chosen_log_probs: Float[Array, "*batch"],
    average_rejected_log_probs: Shaped[Array, "*batch"],
    *,
    beta: Number = 2.0,
    gamma: Number = 1.0,
    label_smoothing: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Simple preference optimisation, in nats, from 0 up: average log-probabilities and a margin.

    $$ \ell = -(1 - \epsilon) \log \sigma(x) - \epsilon \log \sigma(-x), \quad
       x = \beta (l_w - l_l) - \gamma $$

    Args:
        average_chosen_log_probs: Log-probability of the preferred completion, averaged over its
            tokens.
        average_rejected_log_probs: The same of the other completion.
        beta: Scales the difference; 2 to 2.5 in the paper.
        gamma: Margin of the rewards; 0.3 to 0.5 of `beta` in the paper.
        label_smoothing: Share of pairs taken to be labelled the wrong way round.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward, NeurIPS
        2024. Equals TRL's `simpo`, whose defaults are `beta=0.1` and `gamma=0.5`.

    >>> simpo_loss(jnp.array([-1.0]), jnp.array([-2.0]))  # 2 - 1 is 1: -log sigmoid(1)
    Array(0.3132617, dtype=float32)
    """
    chosen, rejected = _pair(
        where,
        average_chosen_log_probs=average_chosen_log_probs,
        average_rejected_log_probs=average_rejected_log_probs,
    )
    beta, gamma, label_smoothing = numbers(
        chosen, beta=beta, gamma=gamma, label_smoothing=label_smoothing
    )
    values = smoothed_cost(beta * (chosen - rejected) - gamma, label_smoothing)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def bradley_terry_loss(
    chosen_rewards: Float[Array, "*batch"],
    rejected_rewards: Shaped[Array, "*batch"],
    *,
    margin: Number | Shaped[Array, "*batch"] = 0.0,
    centering: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood that the chosen answer wins, for reward models, in nats.

    $$ \ell = -\log \sigma(r_w - r_l - m) + c \, (r_w + r_l)^2 $$

    Args:
        chosen_rewards: Reward of the preferred answer.
        rejected_rewards: Reward of the other one.
        margin: How much larger the reward should be: a scalar, or one for each pair.
        centering: Weight of the squared sum, which holds the rewards around 0; 0.01 is common.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Bradley and Terry, Rank Analysis of Incomplete Block Designs, Biometrika 1952; Ouyang et
        al., Training language models to follow instructions, NeurIPS 2022; centering: Eisenstein
        et al., Helping or Herding?, COLM 2024. Equals the loss of TRL's reward trainer.

    >>> bradley_terry_loss(jnp.array([2.0]), jnp.array([1.0]))  # -log sigmoid(1)
    Array(0.3132617, dtype=float32)
    """
    check_float(chosen_rewards=chosen_rewards)
    check_array(margin=margin)
    if jnp.shape(margin) not in ((), jnp.shape(chosen_rewards)):
        expected = f"a scalar or shape {jnp.shape(chosen_rewards)}"
        raise ValueError(message("margin", expected, f"shape {jnp.shape(margin)}"))
    chosen, rejected = _pair(
        where, chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
    )
    (margin,) = mask(where, jnp.broadcast_to(margin, chosen.shape).astype(chosen.dtype))
    (centering,) = numbers(chosen, centering=centering)
    values, _ = sigmoid_costs(chosen - rejected - margin)
    values = values + centering * (chosen + rejected) ** 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def plackett_luce_loss(
    rewards: Float[Array, "*batch answers"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of a ranking of several answers, best first, in nats.

    $$ \ell = \sum_i \Big( \log \sum_{j \geq i} e^{r_j} - r_i \Big) $$

    Each answer is drawn from those that are left; two answers make `bradley_terry_loss`. Keeps an
    array of answers by answers for each ranking: meant for tens of answers.

    Args:
        rewards: Reward of each answer, in the order of preference.
        where: Bool array `(*batch, answers)` of the answers that exist.

    One unit per ranking; see `jaxloss.reduce`. A ranking without an answer is no unit.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Plackett, The Analysis of Permutations, JRSS C 1975; Rafailov et al., Direct Preference
        Optimization, NeurIPS 2023, appendix. Equals `list_mle_loss` with the order given.

    >>> plackett_luce_loss(jnp.array([[0.0, 0.0, 0.0]]))  # log 3 + log 2
    Array(1.7917595, dtype=float32)
    """
    check_float(rewards=rewards)
    check_min_rank(1, rewards=rewards)
    if where is not None:
        check_same_shape(rewards=rewards, where=where)
    (rewards,) = mask(where, *widen(rewards))
    answers = rewards.shape[-1]
    kept = jnp.ones(rewards.shape, bool) if where is None else jnp.asarray(where)
    square = (*rewards.shape, answers)  # (*batch, drawn, left)
    drawn = jax.lax.broadcasted_iota(jnp.int32, rewards.shape, rewards.ndim - 1)
    later = jax.lax.broadcasted_iota(jnp.int32, square, rewards.ndim) >= drawn[..., None]
    others = jnp.where(later & kept[..., None, :], rewards[..., None, :], -jnp.inf)
    rows = jnp.where(kept[..., None], others, 0)
    values = jnp.sum(jnp.where(kept, cross_entropy(rows, drawn), 0), axis=-1)
    units = None if where is None else jnp.any(where, axis=-1)
    return reduce(values, where=units, weights=weights, reduction=reduction)


Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@compiled("divergence")
def f_divergence_scores(
    log_ratio: Float[Array, "*shape"], *, divergence: Divergence, alpha: Number = 0.5
) -> Array:
    r"""Scores that replace log-ratios in a pair loss, so that another f-divergence is kept small.

    $$ s(d) = f'(e^d): \quad d, \quad -e^{-d}, \quad \log \sigma(d), \quad
       \frac{e^{(\alpha - 1) d} - 1}{\alpha - 1} $$

    for reverse KL, forward KL, Jensen-Shannon and the alpha family, up to constants that a pair
    cancels. The exponents are capped at 80. Alpha 1 is reverse KL, without a jump.

        score = lambda log_probs, ref: f_divergence_scores(log_probs - ref, divergence="js")
        dpo_loss(score(chosen, ref_chosen), score(rejected, ref_rejected), zeros, zeros)

    Args:
        log_ratio: Log-probability under the policy minus that under the reference.
        divergence: `"reverse_kl"`, `"forward_kl"`, `"js"` or `"alpha"`.
        alpha: Member of the alpha family.

    Returns:
        A float32 array of the shape of `log_ratio`.

    Reference:
        Wang et al., Beyond Reverse KL, ICLR 2024. Equals TRL's `f_divergence_type`, whose alpha
        scores lack the constant.

    >>> f_divergence_scores(jnp.array([0.0]), divergence="forward_kl")
    Array([-1.], dtype=float32)
    """
    check_option(("reverse_kl", "forward_kl", "js", "alpha"), divergence=divergence)
    check_float(log_ratio=log_ratio)
    (d,) = widen(log_ratio)
    (power,) = numbers(d, alpha=alpha)
    if divergence == "forward_kl":
        return -jnp.exp(jnp.minimum(-d, 80))
    if divergence == "js":
        return -sigmoid_costs(d)[0]
    if divergence == "alpha":
        return _bent(d, power - 1)
    return d


@compiled()
def alphapo_rewards(log_probs: Float[Array, "*shape"], *, alpha: Number = 0.25) -> Array:
    r"""Average log-probabilities bent for `simpo_loss`: steeper where unlikely if `alpha > 0`.

    $$ r = \frac{1 - e^{-\alpha l}}{\alpha} $$

    Alpha 0 leaves them as they are, without a jump. The exponent is capped at 80.

    Args:
        log_probs: Log-probability of each completion, averaged over its tokens.
        alpha: How much they are bent.

    Returns:
        A float32 array of the shape of `log_probs`.

    Reference:
        Gupta et al., AlphaPO: Reward Shape Matters for LLM Alignment, ICML 2025. Equals what TRL's
        CPO does with `alpha`.

    >>> alphapo_rewards(jnp.log(jnp.array([0.5])), alpha=1.0)  # 1 - 2
    Array([-1.], dtype=float32)
    """
    check_float(log_probs=log_probs)
    (log_probs,) = widen(log_probs)
    (alpha,) = numbers(log_probs, alpha=alpha)
    return _bent(log_probs, -alpha)


def _bent(log_x: Array, power: Array) -> Array:
    """`(x ** power - 1) / power` with the exponent capped at 80."""
    over = power * log_x > 80
    return box_cox(jnp.where(over, 80 / jnp.where(power == 0, 1, power), log_x), power)


def _pair(where: Where | None, **arrays: Any) -> tuple[Array, Array]:
    """Two arrays of one shape, masked and widened."""
    (first, chosen), (_, rejected) = arrays.items()
    check_float(**{first: chosen})
    check_same_shape(**arrays)
    chosen, rejected = mask(where, *widen(chosen, rejected), fill=-1)
    return chosen, rejected


_AVERAGES = dict(
    average_chosen_log_probs=draw_uniform("B", -4, -0.1),
    average_rejected_log_probs=draw_uniform("B", -4, -0.1),
)
_SUMS = dict(chosen_log_probs=draw_normal("B"), rejected_log_probs=draw_normal("B"))
_REWARDS = dict(chosen_rewards=draw_normal("B"), rejected_rewards=draw_normal("B"))

CASES = (
    Case(orpo_loss, _AVERAGES, dict(beta=0.3, nll_weight=0.5)),
    Case(cpo_loss, _SUMS, dict(beta=0.3, label_smoothing=0.2)),
    Case(simpo_loss, _AVERAGES, dict(beta=1.5, gamma=0.5, label_smoothing=0.2)),
    Case(bradley_terry_loss, _REWARDS, dict(margin=0.3, centering=0.1)),
    Case(plackett_luce_loss, dict(rewards=draw_normal("B T")), positions="B T"),
)
