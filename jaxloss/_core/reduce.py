"""Masking before and reducing after: the first and the last line of every loss."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from .checks import check_array, check_reduction, check_where, message, naming
from .numerics import safe_div, widen
from .typing import Reduction, Values, Where


def mask(where: Where | None, *arrays: Array, fill: float = 0) -> tuple[Array, ...]:
    """Replace what `where` hides by `fill`, before anything is computed from it.

    `where` covers the leading axes of each array.
    """
    if where is None:
        return arrays
    check_where(where)
    where = jnp.asarray(where)
    for array in arrays:
        if where.shape != array.shape[: where.ndim]:
            expected = f"shape {array.shape} or its leading axes"
            raise ValueError(message("where", expected, f"shape {where.shape}"))
    over = lambda a: where.reshape(where.shape + (1,) * (a.ndim - where.ndim))
    return tuple(jnp.where(over(a), a, jnp.asarray(fill, a.dtype)) for a in arrays)


def reduce(
    values: Values,
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Any:
    """Reduce unit values the way every loss does.

    Args:
        values: One value per unit.
        where: Bool array of the same shape; True keeps a unit. A hidden unit counts as deleted.
        weights: Array of the same shape: how often a unit counts. Weight 2 is the unit seen twice.
            A weight of 0 does not hide a NaN; `where` does.
        reduction: `"mean"` divides by the sum of the weights and is 0 when that is 0; `"sum"`;
            `"none"` keeps the units, multiplied by their weights; or a callable of
            `(values, weights)`, where both have the shape of the units, hidden units have value
            and weight 0, and weights are 1 where none were given.

    Returns:
        A scalar, the units, or whatever the callable returns.

    >>> reduce(jnp.array([1.0, 4.0, 9.0]), where=jnp.array([True, True, False]))
    Array(2.5, dtype=float32)
    >>> reduce(jnp.array([1.0, 4.0]), weights=jnp.array([1.0, 3.0]))
    Array(3.25, dtype=float32)
    """
    with naming("reduce"):
        (values,) = widen(values)
        if where is not None:
            _check_units("where", where, values)
            check_where(where)
            where = jnp.asarray(where)
            values = jnp.where(where, values, 0)
        if weights is not None:
            _check_units("weights", weights, values)
            weights = jnp.asarray(weights).astype(values.dtype)
            weights = weights if where is None else jnp.where(where, weights, 0)
        check_reduction(reduction)
        if isinstance(reduction, str):
            return _named(values, where, weights, reduction)
        if weights is None:
            weights = jnp.ones_like(values) if where is None else where.astype(values.dtype)
        return reduction(values, weights)


def unit_weights(like: Values, where: Where | None, weights: Values | None) -> Array:
    """How often each unit counts, in the shape of `like`; 0 for a hidden one."""
    ones = jnp.ones_like(like)
    return reduce(ones, where=where, weights=weights, reduction=lambda _, weights: weights)


def _check_units(name: str, array: Any, values: Array) -> None:
    check_array(**{name: array})
    if jnp.shape(array) != values.shape:
        raise ValueError(message(name, f"shape {values.shape}", jnp.shape(array)))


def _named(values: Array, where: Array | None, weights: Array | None, reduction: str) -> Array:
    weighted = values if weights is None else values * weights
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return jnp.sum(weighted)
    if weights is not None:
        return safe_div(jnp.sum(weighted), jnp.sum(weights))
    if where is not None:
        return safe_div(jnp.sum(weighted), jnp.sum(where, dtype=values.dtype))
    return jnp.sum(values) / max(values.size, 1)
