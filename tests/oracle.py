"""Values and gradients of a loss, and how far they are from a formula in 50 digits."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np

TINY = float(np.finfo(np.float32).tiny)


def units_and_gradient(loss: Callable[..., Any], *arrays: Any, **options: Any) -> tuple[Any, Any]:
    """The units, and the gradient of their sum in the first array, from one compiled call."""
    fixed, traced = _sorted_out(options)
    return _units_and_gradient(loss, fixed)(*arrays, **traced)


def value_and_gradients(loss: Callable[..., Any], *arrays: Any, **options: Any) -> tuple[Any, Any]:
    """The value, and its gradient in every array, from one compiled call."""
    fixed, traced = _sorted_out(options)
    return _value_and_gradients(loss, fixed)(*arrays, **traced)


def _sorted_out(options: dict[str, Any]) -> tuple[tuple[tuple[str, Any], ...], dict[str, Any]]:
    """Options that a program is compiled for, and those that it is called with."""
    numbers = float | np.generic | np.ndarray | jax.Array
    traced = {k: v for k, v in options.items() if isinstance(v, numbers)}
    return tuple((k, v) for k, v in options.items() if k not in traced), traced


@cache
def _units_and_gradient(
    loss: Callable[..., Any], fixed: tuple[tuple[str, Any], ...]
) -> Callable[..., tuple[Any, Any]]:
    def both(first: Any, *rest: Any, **traced: Any) -> tuple[Any, Any]:
        call = lambda x: loss(x, *rest, reduction="none", **dict(fixed), **traced)
        units, pull = jax.vjp(call, first)
        return units, pull(jnp.ones_like(units))[0]

    return jax.jit(both)


@cache
def _value_and_gradients(
    loss: Callable[..., Any], fixed: tuple[tuple[str, Any], ...]
) -> Callable[..., tuple[Any, Any]]:
    def both(*arrays: Any, **traced: Any) -> tuple[Any, Any]:
        call = lambda *arrays: loss(*arrays, **dict(fixed), **traced)
        return jax.value_and_grad(call, range(len(arrays)))(*arrays)

    return jax.jit(both)


def units_off(
    loss: Callable[..., Any], exact: Callable[..., Any], *columns: Sequence[float], **options: Any
) -> dict[str, tuple[float, tuple[float, ...]]]:
    """Worst error of the value and of each derivative, and where it is.

    A unit is an ulp of the exact result plus what one ulp of every input changes in it. The points
    are the rows of `columns`; the loss sees them as arrays, the formula as mpmath numbers.
    """
    exact = cache(exact)
    points = [tuple(float(np.float32(x)) for x in row) for row in zip(*columns, strict=True)]
    arrays = tuple(jnp.asarray(np.asarray(column, np.float32)) for column in columns)
    values = loss(*arrays, reduction="none", **options)
    total = lambda *args: loss(*args, reduction="sum", **options)
    slopes = jax.grad(total, argnums=tuple(range(len(arrays))))(*arrays)
    off = {"value": _worst(values, exact, points)}
    for i, slope in enumerate(slopes):
        derivative = lambda *args, i=i: _slope(exact, args, i)
        off[f"slope {i}"] = _worst(slope, derivative, points)
    return off


def _slope(function: Callable[..., Any], point: Sequence[Any], index: int) -> Any:
    step = (abs(point[index]) or mpmath.mpf(1e-9)) * mpmath.mpf(10) ** (-mpmath.mp.dps // 4)
    moved = lambda by: function(*point[:index], point[index] + by, *point[index + 1 :])
    return (moved(step) - moved(-step)) / (2 * step)


def _worst(
    got: Any, exact: Callable[..., Any], points: Sequence[tuple[float, ...]]
) -> tuple[float, tuple[float, ...]]:
    worst = (0.0, points[0])
    with mpmath.workdps(80):
        for y, point in zip(np.asarray(got, np.float64), points, strict=True):
            row = [mpmath.mpf(x) for x in point]
            true = exact(*row)
            moved = sum(abs(_slope(exact, row, i)) * _ulp(x) for i, x in enumerate(point))
            error = abs(mpmath.mpf(float(y)) - true) / (_ulp(float(true)) + moved)
            worst = max(worst, (float(error) if np.isfinite(y) else np.inf, point))
    return worst


def _ulp(x: float) -> float:
    return max(float(np.spacing(np.float32(abs(x)))), TINY)
