"""Expected risk over a list of hypotheses, such as the n-best list of a recogniser."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import check_float, check_min_rank, check_same_shape, require
from .._core.compiled import compiled
from .._core.numerics import numbers, widen
from .._core.reduce import mask, reduce
from .._core.sharding import one_hot
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["minimum_risk_loss"]


@compiled()
def minimum_risk_loss(
    log_probs: Float[Array, "*batch hypotheses"],
    risks: Shaped[Array, "*batch hypotheses"],
    *,
    temperature: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Expected risk of a list of hypotheses, in the unit of the risks.

    $$ \ell = \sum_i p_i r_i, \qquad p = \mathrm{softmax}(\log P / \tau) $$

    The risks, such as word errors, carry no gradient. A risk that is the same for all hypotheses
    changes the value alone, so there is no baseline to choose. A hypothesis listed twice counts
    twice.

    Args:
        log_probs: Log-probability of each hypothesis under the model.
        risks: What each of them costs.
        temperature: $\tau > 0$; large values spread the weight over all hypotheses.

    One unit per list with a kept hypothesis; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Shen et al., Minimum Risk Training for Neural Machine Translation, ACL 2016, whose sharpness
        is 1 / temperature; Prabhavalkar et al., Minimum Word Error Rate Training, ICASSP 2018.

    >>> minimum_risk_loss(jnp.log(jnp.array([[0.2, 0.6]])), jnp.array([[4.0, 0.0]]))
    Array(1., dtype=float32)
    """
    check_float(log_probs=log_probs)
    check_min_rank(1, log_probs=log_probs)
    check_same_shape(log_probs=log_probs, risks=risks)
    log_probs, risks = mask(where, *widen(log_probs, risks))
    (temperature,) = numbers(log_probs, temperature=temperature)
    require(lambda: temperature > 0, "temperature", "a value above 0")
    shown = jnp.ones_like(log_probs, dtype=bool) if where is None else jnp.asarray(where)
    values = _expected(log_probs, jax.lax.stop_gradient(risks), temperature, shown)
    return reduce(values, where=jnp.any(shown, axis=-1), weights=weights, reduction=reduction)


def _expected(log_probs: Array, risks: Array, temperature: Array, shown: Array) -> Array:
    """The risk of the likeliest hypothesis, and how much the others add to it.

    In this form nothing cancels where one hypothesis is almost certain.
    """
    if not log_probs.shape[-1]:
        return jnp.sum(log_probs, axis=-1)
    shown &= log_probs > -jnp.inf
    keys = jax.lax.stop_gradient(jnp.where(shown, log_probs, -jnp.inf))
    best = one_hot(jnp.argmax(keys, axis=-1), log_probs.shape[-1])
    others = shown & ~best
    at_best = lambda x: jnp.sum(jnp.where(best, x, 0), axis=-1, keepdims=True)
    lead = jnp.where(others, log_probs - at_best(jnp.where(shown, log_probs, 0)), 0)
    ratio = jnp.where(others, jnp.exp(lead / temperature), 0)
    more = jnp.where(others, risks - at_best(risks), 0)
    added = jnp.sum(ratio * more, axis=-1) / (1 + jnp.sum(ratio, axis=-1))
    return at_best(risks)[..., 0] + added


_ERRORS = Draw("B N", lambda g, shape, _: g.integers(0, 5, shape, np.int32), "fixed")
_CASE = dict(log_probs=draw_normal("B N", scale=0.5), risks=_ERRORS)
CASES = (Case(minimum_risk_loss, _CASE, dict(temperature=0.7), positions="B N", sizes=dict(N=4)),)
