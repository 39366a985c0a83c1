"""Auxiliary losses of mixtures of experts: even loads and small router logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, draw_labels, draw_normal, draw_probs
from .._core.checks import (
    check_array,
    check_float,
    check_integer,
    check_min_rank,
    check_shape,
    check_where,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison
from .._core.numerics import numbers, safe_div, widen
from .._core.reduce import mask, reduce
from .._core.sharding import one_hot
from .._core.softmax import log_sum_exp
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["expert_bias_update", "load_balancing_loss", "router_z_loss"]


@compiled("axis_name")
def load_balancing_loss(
    router_probs: Float[Array, "*batch tokens experts"],
    expert_index: Integer[Array, "*batch tokens slots"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: str | tuple[str, ...] | None = None,
) -> Array:
    r"""How unevenly tokens are sent to experts: 1 when both shares are even, up to the experts.

    $$ \ell = E \sum_e f_e P_e $$

    where $f_e$ is the share of all (token, slot) pairs that go to expert $e$ and $P_e$ the mean of
    its router probability. The shares $f$ have no gradient. Tokens are coupled: the mean over parts
    of the tokens is not the loss of all.

    Args:
        router_probs: Probabilities over the experts, `(*batch, tokens, experts)`.
        expert_index: Experts chosen for each token, integers `(*batch, tokens, slots)`; -1 is a
            slot that was dropped and does not count. Any other index outside `[0, experts)` makes
            its unit NaN.
        where: Bool array `(*batch, tokens)` of the tokens that count, such as those not padding.
        weights: One for each set of tokens, `*batch`.
        axis_name: Mapped axes over which the tokens are split; shares and means are then those of
            all devices.

    One unit per set of tokens (position of `*batch`) with a token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Fedus, Zoph and Shazeer, Switch Transformers, JMLR 2022; Lepikhin et al., GShard, ICLR 2021.
        Hugging Face and maxtext let $f$ sum to the number of slots: multiply by it.

    >>> probs = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> load_balancing_loss(probs, jnp.array([[0], [1]]))  # 2 (1/2 1/2 + 1/2 1/2)
    Array(1., dtype=float32)
    """
    check_float(router_probs=router_probs)
    check_min_rank(2, router_probs=router_probs)
    shape, experts = router_probs.shape[:-1], router_probs.shape[-1]
    expert_index = _slots(expert_index, where, shape)
    (probs,) = mask(where, *widen(router_probs))
    ok = (expert_index >= -1) & (expert_index < experts)
    require(lambda: ok, "expert_index", f"values in [-1, {experts})")
    kept = jnp.ones(shape, bool) if where is None else jnp.asarray(where)
    counts = jnp.sum(one_hot(expert_index, experts), axis=(-3, -2), dtype=probs.dtype)
    total = jnp.sum(probs, axis=-2)  # (*batch, experts)
    tokens = jnp.sum(kept, axis=-1, dtype=probs.dtype)
    bad = jnp.sum(~ok, axis=(-2, -1), dtype=probs.dtype)
    if axis_name is not None:
        counts, total, tokens, bad = jax.lax.psum((counts, total, tokens, bad), axis_name)
    shares = safe_div(counts, jnp.sum(counts, axis=-1, keepdims=True))
    means = safe_div(total, jnp.broadcast_to(tokens[..., None], total.shape))
    values = experts * jnp.sum(shares * means, axis=-1)
    exists = None if where is None else tokens > 0
    return reduce(poison(values, bad == 0), where=exists, weights=weights, reduction=reduction)


@compiled()
def router_z_loss(
    router_logits: Float[Array, "*batch experts"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared logarithm of the router's normaliser, from 0 up; keeps its logits small.

    $$ \ell = \log^2 \sum_e \exp z_e $$

    The coefficient, such as 1e-3, is the caller's.

    Args:
        router_logits: Logits over the experts, last; 16-bit ones are summed in float32.

    One unit per token; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Zoph et al., ST-MoE: Designing Stable and Transferable Sparse Expert Models, 2022. The
        values of `z_loss`.

    >>> router_z_loss(jnp.array([[3.0, -jnp.inf]]))
    Array(9., dtype=float32)
    """
    check_float(router_logits=router_logits)
    check_min_rank(1, router_logits=router_logits)
    (logits,) = mask(where, router_logits)
    values = jnp.square(log_sum_exp(logits))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis_name")
def expert_bias_update(
    bias: Float[Array, " experts"],
    expert_index: Integer[Array, "*batch slots"],
    *,
    rate: Number = 1e-3,
    where: Where | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, " experts"]:
    r"""Routing bias after one step of balancing without a loss; has no gradient.

    $$ b_e \leftarrow b_e + \rho\, \mathrm{sign}(\bar c - c_e) $$

    for the number $c_e$ of slots that went to expert $e$ and the mean $\bar c$ over the experts.
    The bias is added to the router's scores to choose experts, not to weigh them.

    Args:
        bias: Biases of the experts before the step.
        expert_index: Experts chosen for each token, integers `(*batch, slots)`; those outside
            `[0, experts)`, such as -1 for a dropped slot, do not count.
        rate: Size $\rho$ of a step.
        where: Bool array `*batch` of the tokens that count.
        axis_name: Mapped axes over which the tokens are split.

    Returns:
        Float32 biases of the same shape.

    Reference:
        Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, 2024;
        DeepSeek-V3, 2024.

    >>> expert_bias_update(jnp.zeros(2), jnp.array([[0], [0], [1]]), rate=0.5)
    Array([-0.5,  0.5], dtype=float32)
    """
    check_float(bias=bias)
    if bias.ndim != 1:
        raise ValueError(message("bias", "shape (experts,)", f"shape {bias.shape}"))
    check_integer(expert_index=expert_index)
    check_min_rank(1, expert_index=expert_index)
    expert_index = _slots(expert_index, where, jnp.shape(expert_index)[:-1])
    (bias,) = widen(bias)
    (rate,) = numbers(bias, rate=rate)
    hits = one_hot(expert_index, bias.shape[0])
    counts = jnp.sum(hits, axis=tuple(range(hits.ndim - 1)), dtype=bias.dtype)
    if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
    return jax.lax.stop_gradient(bias + rate * jnp.sign(jnp.mean(counts) - counts))


def _slots(expert_index: Shaped[Array, "*batch slots"], where: Where | None, shape: tuple) -> Array:
    """The indices as int32 or wider, and -1 where their token is hidden."""
    check_integer(expert_index=expert_index)
    check_array(expert_index=expert_index)
    check_min_rank(1, expert_index=expert_index)
    expert_index = jnp.asarray(expert_index)
    check_shape((*shape, expert_index.shape[-1]), expert_index=expert_index)
    if expert_index.dtype.itemsize < 4:
        expert_index = expert_index.astype(jnp.int32)
    if where is None:
        return expert_index
    check_where(where)
    check_shape(shape, where=where)
    return mask(where, expert_index, fill=-1)[0]


_SIZES = {"C": 4, "K": 2}
_COUPLED = {"microbatches": "shares and means over all tokens are multiplied"}

CASES = (
    Case(
        load_balancing_loss,
        dict(router_probs=draw_probs("B C"), expert_index=draw_labels("B K")),
        positions="B",
        sizes=_SIZES,
        coupled=True,
        without=_COUPLED,
    ),
    Case(
        load_balancing_loss,
        dict(router_probs=draw_probs("V B C"), expert_index=draw_labels("V B K")),
        label="sets",
        positions="V B",
        sizes=_SIZES,
        coupled=True,
        without=_COUPLED,
    ),
    Case(router_z_loss, dict(router_logits=draw_normal("B T C", scale=2))),
)
