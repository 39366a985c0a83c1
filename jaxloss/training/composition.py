"""Several terms as one objective: weights, schedules, and every term on its own for the log."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.checks import check_float, check_scalar, message
from .._core.compiled import uncompiled
from .._core.numerics import safe_div, widen
from .._core.reductions import SumAndWeight
from .._core.terms import Weight, logged, weigh
from .._core.typing import Number

__all__ = ["cyclical_ramp", "detached_ratio_weights", "ramp", "weighted_sum"]

Terms = dict[str, Array]


@uncompiled
def weighted_sum(
    terms: Mapping[str, Any],
    *,
    weights: Mapping[str, Weight] | None = None,
    step: Number | None = None,
) -> tuple[Array, Terms]:
    r"""One objective out of named terms: their weighted sum, and each of them for the log.

    $$ L = \sum_k w_k(t) L_k $$

    Made for `jax.value_and_grad(objective, has_aux=True)`.

    Args:
        terms: By name a scalar, a `SumAndWeight`, whose mean enters, or the `(total, terms)` of
            another composite, whose total enters and whose terms are named `"name/term"`.
        weights: By name a number, traced or not, or a schedule, which is called with `step`. A name
            that is missing weighs 1. The Python number 0 leaves its term out of the total, even one
            that is NaN, and still reports it; a traced 0 cannot.
        step: Training step; needed by schedules. It may be traced, so that all steps share one
            compilation.

    Returns:
        The total, and the unweighted terms, which carry no gradient.

    Raises:
        ValueError: No terms, a weight of an unknown name, two terms of one name, a schedule without
            a step, or a term that is no scalar.

    >>> terms = {"rank": jnp.array(2.0), "accuracy": jnp.array(0.5)}
    >>> total, log = weighted_sum(terms, weights={"rank": 0.1})
    >>> total  # 0.1 * 2 + 0.5
    Array(0.7, dtype=float32)
    >>> sorted(log)
    ['accuracy', 'rank']
    """
    weights = {} if weights is None else weights
    if not isinstance(terms, Mapping):
        raise TypeError(message("terms", "a mapping of names to terms", type(terms).__name__))
    if not terms:
        raise ValueError(message("terms", "at least one term", "none"))
    unknown = [name for name in weights if name not in terms]
    if unknown:
        raise ValueError(message("weights", f"names among {sorted(terms)}", repr(unknown[0])))
    log: Terms = {}
    shares: Terms = {}
    summands: list[Array] = []
    for name, term in terms.items():
        value, parts = _read(name, term)
        weight = weigh(name, weights.get(name, 1.0), step)
        for part, found in parts.items():
            if part in log:
                raise ValueError(message("terms", "names that differ", f"{part!r} twice"))
            log[part] = found
            shares[part] = jnp.zeros_like(found) if weight is None else _times(weight, found)
        if weight is not None:
            summands.append(_times(weight, value))
    total = sum(summands[1:], summands[0]) if summands else jnp.zeros((), jnp.float32)
    return total, logged(log, lambda: shares)


@uncompiled
def ramp(
    step: Number, *, start: Number, end: Number, low: Number = 0.0, high: Number = 1.0
) -> Float[Array, ""]:
    """A weight that is `low` until `start`, `high` from `end` on, and linear between.

    Args:
        step: Where the training is.
        start: Last step at `low`.
        end: First step at `high`; equal to `start` for a jump after it.
        low: Value before.
        high: Value after.

    Returns:
        A float32 scalar, differentiable in `low` and `high`.

    >>> ramp(15, start=10, end=20)
    Array(0.5, dtype=float32)
    """
    step, start, end, low, high = _numbers(step=step, start=start, end=end, low=low, high=high)
    climbs = end > start
    done = jnp.where(climbs, (step - start) / jnp.where(climbs, end - start, 1), step > start)
    return low + (high - low) * jnp.clip(done, 0, 1)


@uncompiled
def cyclical_ramp(
    step: Number, *, period: Number, ratio: Number = 0.5, high: Number = 1.0
) -> Float[Array, ""]:
    """A weight that climbs from 0 to `high` in the first part of each period and stays there.

    Args:
        step: Where the training is.
        period: Steps of one cycle.
        ratio: Share of the period that climbs, in `(0, 1]`.
        high: Value at the end of the climb.

    Returns:
        A float32 scalar.

    Reference:
        Fu et al., Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing,
        NAACL 2019.

    >>> cyclical_ramp(125, period=100)  # a quarter into the second cycle
    Array(0.5, dtype=float32)
    """
    step, period, ratio, high = _numbers(step=step, period=period, ratio=ratio, high=high)
    return high * jnp.clip(jnp.mod(step, period) / (period * ratio), 0, 1)


@uncompiled
def detached_ratio_weights(
    terms: Mapping[str, Array], *, targets: Mapping[str, Number]
) -> dict[str, Array]:
    r"""Weights under which each term has a given value, whatever it is just now.

    $$ w_k = \frac{s_k}{\bar L_k} $$

    with $\bar L_k$ the term without its gradient, and 0 for a term that is 0.

    Args:
        terms: Scalars by name.
        targets: What each weighted term is to be, by the same names; their ratios balance the
            terms.

    Returns:
        Weights by name, without a gradient, for `weighted_sum`.

    >>> detached_ratio_weights({"a": jnp.array(4.0)}, targets={"a": 1.0})
    {'a': Array(0.25, dtype=float32)}
    """
    if set(targets) != set(terms):
        raise ValueError(message("targets", f"the names {sorted(terms)}", sorted(targets)))
    check_scalar(**terms, **{f"targets[{name!r}]": value for name, value in targets.items()})
    check_float(**terms)
    values = {name: jax.lax.stop_gradient(widen(jnp.asarray(x))[0]) for name, x in terms.items()}
    return {k: safe_div(jnp.asarray(targets[k]).astype(v.dtype), v) for k, v in values.items()}


def _read(name: str, term: Any) -> tuple[Array, Terms]:
    """What enters the sum, and what is reported under which names."""
    if not isinstance(name, str):
        raise TypeError(message("terms", "names that are strings", repr(name)))
    if isinstance(term, tuple) and len(term) == 2 and isinstance(term[1], Mapping):
        total, parts = term
        value, _ = _read(name, total)
        found = {f"{name}/{part}": _read(part, x)[0] for part, x in parts.items()}
        return value, found or {name: value}
    value = term.mean() if isinstance(term, SumAndWeight) else term
    check_float(**{name: value})
    check_scalar(**{name: value})
    (value,) = widen(jnp.asarray(value))
    return value, {name: value}


def _times(weight: Any, value: Array) -> Array:
    return jnp.asarray(weight).astype(value.dtype) * value


def _numbers(**values: Any) -> list[Array]:
    check_scalar(**values)
    return [jnp.asarray(value, jnp.float32) for value in values.values()]
