"""What composite criteria share: sums over one count, and a total of named terms."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .numerics import numbers
from .typing import Number

Axis = str | tuple[str, ...] | None
Criterion = tuple[Array, dict[str, Array]]


def add_up(x: Array, axis_name: Axis) -> Array:
    """The sum over the devices of a mapped axis, if one is named."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def per_count(sums: dict[str, Array], count: Array, axis_name: Axis) -> dict[str, Array]:
    """Sums over a count that carries no gradient, or over 1; both added up over devices first."""
    known = lambda like: add_up(jax.lax.stop_gradient(count.astype(like.dtype)), axis_name)
    return {
        name: add_up(value, axis_name) / jnp.maximum(known(value), 1)
        for name, value in sums.items()
    }


def total(terms: dict[str, Array], **gains: Number) -> Criterion:
    """The sum of gain times term, both in the same order, and the terms without a gradient."""
    values = list(terms.values())
    first, *rest = (g * v for g, v in zip(numbers(values[0], **gains), values, strict=True))
    return sum(rest, first), jax.lax.stop_gradient(terms)
