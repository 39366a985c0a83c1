"""Preference losses of whole batches: one distribution of rewards above another, rank by rank."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import check_float, check_same_shape, message
from .._core.compiled import compiled
from .._core.log_ratios import smoothed_cost
from .._core.numerics import numbers, widen
from .._core.reduce import mask, reduce
from .._core.sharding import unshard
from .._core.terms import Axis
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["aot_loss", "aot_unpaired_loss"]


@compiled("axis_name")
def aot_loss(
    chosen_log_probs: Float[Array, " batch"],
    rejected_log_probs: Shaped[Array, " batch"],
    ref_chosen_log_probs: Shaped[Array, " batch"],
    ref_rejected_log_probs: Shaped[Array, " batch"],
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Alignment by optimal transport, in nats: margins of the policy above the reference's.

    $$ \ell_i = -(1 - \epsilon) \log \sigma(x_i) - \epsilon \log \sigma(-x_i), \quad
       x_i = \beta (m_i - m^{\text{ref}}_{(i)}), \quad m = \log \pi_w - \log \pi_l $$

    where $m^{\text{ref}}_{(i)}$ has the rank among the margins of the reference that $m_i$ has
    among those of the policy. Pairs are coupled: the mean over microbatches is another loss.

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the preferred completion
            under the policy.
        rejected_log_probs: The same of the other completion.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Scales the differences.
        label_smoothing: Share of pairs taken to be labelled the wrong way round.
        where: Bool array of the pairs that count; the others have no rank.
        axis_name: Mapped axes over which the batch is split; ranks are then those in all of it.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, NeurIPS
        2024. Equals TRL's `aot`, whose units stand in the order of their ranks.

    >>> margins, ref, zero = jnp.array([10.0, -20.0]), jnp.array([-30.0, 0.0]), jnp.zeros(2)
    >>> aot_loss(margins, zero, ref, zero, reduction="none")  # both are 10 above
    Array([0.3132617, 0.3132617], dtype=float32)
    """
    chosen, rejected, ref_chosen, ref_rejected = _inputs(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    beta, label_smoothing = numbers(chosen, beta=beta, label_smoothing=label_smoothing)
    margin = chosen - rejected
    gap = margin - _same_rank(margin, ref_chosen - ref_rejected, where, axis_name)
    values = smoothed_cost(beta * gap, label_smoothing)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis_name")
def aot_unpaired_loss(
    chosen_log_probs: Float[Array, " batch"],
    rejected_log_probs: Shaped[Array, " batch"],
    ref_chosen_log_probs: Shaped[Array, " batch"],
    ref_rejected_log_probs: Shaped[Array, " batch"],
    *,
    beta: Number = 0.1,
    label_smoothing: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Alignment by optimal transport without pairs, in nats: chosen above rejected rewards.

    $$ \ell_i = -(1 - \epsilon) \log \sigma(x_i) - \epsilon \log \sigma(-x_i), \quad
       x_i = \beta (w_i - l_{(i)}), \quad w, l = \log \pi - \log \pi^{\text{ref}} $$

    where $l_{(i)}$ has the rank among the rejected log-ratios of the batch that $w_i$ has among the
    chosen ones: which completion is paired with which does not matter, but their numbers are equal.
    They are coupled: the mean over microbatches is another loss.

    Args:
        chosen_log_probs: Log-probability, summed over the tokens, of the preferred completion
            under the policy.
        rejected_log_probs: The same of the rejected completions.
        ref_chosen_log_probs: The preferred completion under the reference; no gradient.
        ref_rejected_log_probs: The other completion under the reference; no gradient.
        beta: Scales the differences.
        label_smoothing: Share of labels taken to be labelled the wrong way round.
        where: Bool array of the pairs that count; the others have no rank.
        axis_name: Mapped axes over which the batch is split; ranks are then those in all of it.

    One unit per chosen completion; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, NeurIPS
        2024. Equals TRL's `aot_unpaired`, whose units stand in the order of their ranks.

    >>> chosen, rejected, zero = jnp.array([10.0, -20.0]), jnp.array([-30.0, 0.0]), jnp.zeros(2)
    >>> aot_unpaired_loss(chosen, rejected, zero, zero, reduction="none")  # both are 10 above
    Array([0.3132617, 0.3132617], dtype=float32)
    """
    chosen, rejected, ref_chosen, ref_rejected = _inputs(
        where,
        chosen_log_probs=chosen_log_probs,
        rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs,
        ref_rejected_log_probs=ref_rejected_log_probs,
    )
    beta, label_smoothing = numbers(chosen, beta=beta, label_smoothing=label_smoothing)
    good, bad = chosen - ref_chosen, rejected - ref_rejected
    gap = good - _same_rank(good, bad, where, axis_name)
    values = smoothed_cost(beta * gap, label_smoothing)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _inputs(where: Where | None, **log_probs: Any) -> tuple[Array, ...]:
    first = next(iter(log_probs))
    check_float(**{first: log_probs[first]})
    if jnp.ndim(log_probs[first]) != 1:
        raise ValueError(message(first, "shape (batch,)", f"shape {jnp.shape(log_probs[first])}"))
    check_same_shape(**log_probs)
    if where is not None:
        check_same_shape(**{first: log_probs[first]}, where=where)
    chosen, rejected, *reference = mask(where, *widen(*log_probs.values()))
    return chosen, rejected, *jax.lax.stop_gradient(reference)


def _same_rank(x: Array, others: Array, where: Where | None, axis_name: Axis) -> Array:
    """For each entry of `x` that of `others` of the same rank; hidden ones rank last in both."""
    kept = jnp.ones(x.shape, bool) if where is None else jnp.asarray(where)
    whole = tuple(unshard(a) for a in (x, others, kept))
    if axis_name is not None:
        whole = jax.lax.all_gather(whole, axis_name, tiled=True)
    keys, others, kept = whole
    order = lambda a: jnp.argsort(jnp.where(kept, jax.lax.stop_gradient(a), jnp.inf))
    rank = jnp.argsort(order(keys))
    if axis_name is not None:
        rank = jax.lax.dynamic_slice_in_dim(
            rank, jax.lax.axis_index(axis_name) * x.shape[0], x.shape[0]
        )
    return others[order(others)][rank]


_FIXED = Draw("B", lambda g, shape, _: g.integers(-16, 17, shape) / 8, "fixed")
_PAIR = dict(
    chosen_log_probs=draw_normal("B"),
    rejected_log_probs=draw_normal("B"),
    ref_chosen_log_probs=_FIXED,
    ref_rejected_log_probs=_FIXED,
)
_COUPLED = {
    "microbatches": "the ranks are those in the whole batch",
    "weight_two": "a unit seen twice takes two ranks",
}

CASES = (
    Case(aot_loss, _PAIR, dict(beta=0.3, label_smoothing=0.2), coupled=True, without=_COUPLED),
    Case(
        aot_unpaired_loss,
        _PAIR,
        dict(beta=0.3, label_smoothing=0.2),
        coupled=True,
        without=_COUPLED,
    ),
)
