"""What composites share: sums over one count, a total of named terms, and their weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .checks import check_scalar, message
from .numerics import numbers
from .typing import Number

Axis = str | tuple[str, ...] | None
Weight = Number | Callable[[Any], Any]
Criterion = tuple[Array, dict[str, Array]]
attributing = jax.make_user_context(False)


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
    parts = [g * v for g, v in zip(numbers(values[0], **gains), values, strict=True)]
    return sum(parts[1:], parts[0]), logged(terms, lambda: dict(zip(terms, parts, strict=True)))


def logged(terms: dict[str, Any], parts: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Terms without a gradient; under `explain` what each adds to the total, with its gradient."""
    return parts() if attributing.value else jax.lax.stop_gradient(terms)


def weigh(name: str, weight: Any, step: Any) -> Any:
    """The number that a term is multiplied by; None for a Python 0, which leaves the term out."""
    if callable(weight):
        if step is None:
            raise ValueError(message("step", f"a number, for the schedule of {name!r}", "None"))
        weight = weight(step)
    check_scalar(**{f"weights[{name!r}]": weight})
    return None if isinstance(weight, (int, float)) and weight == 0 else weight
