"""Arithmetic whose value and gradient stay finite at the edges."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .checks import check_scalar


def widen(*arrays: Array) -> tuple[Array, ...]:
    """All arrays in float32, or in float64 as soon as one of them is float64."""
    arrays = tuple(jnp.asarray(a) for a in arrays)
    dtype = jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32
    return tuple(a.astype(dtype) for a in arrays)


def numbers(like: Array, **values: float | Array) -> tuple[Array, ...]:
    """Scalar hyper-parameters in the dtype of `like`, checked to be scalars; they may be traced."""
    check_scalar(**values)
    return tuple(jnp.asarray(v).astype(like.dtype) for v in values.values())


def absolute(x: Array) -> Array:
    """|x| with gradient 0 at 0."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


def safe_div(a: Array, b: Array) -> Array:
    """Quotient a / b, and 0 with zero gradient where b is 0."""
    zero = b == 0
    return jnp.where(zero, 0, _divide(a, jnp.where(zero, 1, b)))


@jax.custom_jvp
def _divide(a: Array, b: Array) -> Array:
    return a / b


def _divide_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    # Through the quotient: jax's own rule forms 1 / b^2, which leaves the range of floats. A part
    # that does not move is left out, since an infinite quotient times 0 is NaN.
    a, b = primals
    a_dot, b_dot = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    quotient = _divide(a, b)
    moved = jnp.zeros_like(quotient) if a_dot is None else a_dot / b
    return quotient, moved if b_dot is None else moved - quotient * (b_dot / b)


_divide.defjvp(_divide_jvp, symbolic_zeros=True)


def standardized(error: Array, log_scale: Array) -> Array:
    """Error / exp(log_scale); an error of 0 stays 0 however small the scale."""
    largest = 0.99 * math.log(jnp.finfo(error.dtype).max)  # its exponential is finite
    return error * jnp.exp(jnp.minimum(-log_scale, largest))


def safe_sqrt(x: Array) -> Array:
    """Square root of x >= 0 whose gradient at 0 is 0."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def safe_log(x: Array) -> Array:
    """Logarithm of x >= 0; at 0 it is -inf with zero gradient."""
    zero = x == 0
    return jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1, x)))


def safe_mul(weight: Array, x: Array) -> Array:
    """Weight * x with 0 * (infinite or NaN) = 0, also in both derivatives."""
    return weight * jnp.where((weight == 0) & ~jnp.isfinite(x), 0, x)


def safe_pow(x: Array, exponent: Array) -> Array:
    """Power of x >= 0; at 0 value and derivatives are 0, whatever the exponent."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.where(zero, 1, x) ** exponent)


def safe_norm(x: Array, axis: int = -1, *, keepdims: bool = False) -> Array:
    """Euclidean norm without overflow or underflow; 0 with zero gradient at the zero vector."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0))
    scale = jnp.where((largest == 0) | ~jnp.isfinite(largest), 1, largest)
    norm = safe_sqrt(jnp.sum(jnp.square(x / scale), axis=axis, keepdims=True)) * scale
    return norm if keepdims else jnp.squeeze(norm, axis)


def unit_vectors(x: Array, axis: int = -1) -> Array:
    """Vectors of any size over their norm; the zero vector stays 0, with zero gradient."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0))
    x = x / jnp.where((largest == 0) | ~jnp.isfinite(largest), 1, largest)
    return safe_div(x, safe_sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True)))


def cosine(a: Array, b: Array) -> tuple[Array, Array]:
    """Cosine of the angle over the last axis, and one minus it, exact for parallel vectors."""
    a, b = unit_vectors(a), unit_vectors(b)
    dot = jnp.sum(a * b, axis=-1)
    gap = 0.5 * jnp.sum((a - b) ** 2, axis=-1)  # the distance too
    near = dot > 0.5
    return jnp.where(near, 1 - gap, dot), jnp.where(near, gap, 1 - dot)


def power_of_two(length: Array) -> Array:
    """A power of two near each length, 1 for 0: dividing by it rounds nothing."""
    bits = int(jnp.finfo(length.dtype).nexp)
    power = jax.lax.reduce_precision(jax.lax.stop_gradient(length), bits, 0)
    return jnp.where(power == 0, 1, power)


def xlogx(x: Array) -> Array:
    """X log x for x >= 0, with value 0 and gradient 0 at 0."""
    zero = x == 0
    return jnp.where(zero, 0, x * jnp.log(jnp.where(zero, 1, x)))


@jax.custom_jvp
def expm1(x: Array) -> Array:
    """exp(x) - 1 with the derivative exp(x); that of `jnp.expm1` cancels for x far below 0."""
    return jnp.expm1(x)


@expm1.defjvp
def _expm1_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (moved,) = primals, tangents
    return expm1(x), jnp.exp(x) * moved


@jax.custom_jvp
def expm1_excess(x: Array) -> Array:
    """exp(x) - 1 - x with every digit, also near 0, where it is x^2 / 2; derivative exp(x) - 1."""
    near = jnp.abs(x) < 0.5
    small = jnp.where(near, x, 0)
    series = _EXCESS_OVER_SQUARE[: 8 if x.dtype == jnp.float32 else 13]
    return jnp.where(near, small * small * horner(series, small), jnp.expm1(x) - x)


@expm1_excess.defjvp
def _expm1_excess_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (moved,) = primals, tangents
    return expm1_excess(x), expm1(x) * moved


@jax.custom_jvp
def soft_capped(x: Array, cap: Array) -> Array:
    """Cap tanh(x / cap); its derivative keeps every digit where tanh is almost 1."""
    return cap * jnp.tanh(x / cap)


@soft_capped.defjvp
def _soft_capped_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, cap), (x_dot, cap_dot) = primals, tangents
    ratio = x / cap
    e = jnp.exp(-2 * jnp.where(ratio < 0, -ratio, ratio))
    slope = 4 * e / (1 + e) ** 2
    in_cap = jnp.tanh(ratio) - jnp.where(slope == 0, 0, ratio) * slope
    return soft_capped(x, cap), slope * x_dot + in_cap * cap_dot


def power_of_log(log_x: Array, exponent: Array) -> Array:
    """Power of x from log x; at x = 0 value and derivatives are 0, whatever the exponent."""
    zero = log_x == -jnp.inf
    return jnp.where(zero, 0, jnp.exp(exponent * jnp.where(zero, 0, log_x)))


def box_cox(log_x: Array, power: Array) -> Array:
    """(x ** power - 1) / power from log x: log x at power 0, and smooth in both there.

    At x = 0 it is -1 / power, or -inf where power <= 0, with zero gradient.
    """
    zero = log_x == -jnp.inf
    log_x = jnp.where(zero, 0, log_x)
    u = power * log_x
    near = jnp.abs(u) < 0.03
    series = horner(_EXPM1_OVER_X, jnp.where(near, u, 0)) * jnp.where(near, log_x, 0)
    exact = expm1(jnp.where(near, 0, u)) / jnp.where(near, 1, power)
    at_zero = jnp.where(power > 0, -1 / jnp.where(power > 0, power, 1), -jnp.inf)
    return jnp.where(zero, at_zero, jnp.where(near, series, exact))


def horner(coefficients: Sequence[float | Array], x: Array) -> Array:
    """The polynomial with these coefficients, the constant one first."""
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


_EXPM1_OVER_X = [1 / math.factorial(k + 1) for k in range(9)]
_EXCESS_OVER_SQUARE = [1 / math.factorial(k + 2) for k in range(13)]


def log1p_square(x: Array) -> Array:
    """log(1 + x^2) without overflow."""
    big = jnp.abs(x) > 1e9  # the 1 is below the last digit of a double there
    near = jnp.log1p(jnp.where(big, 1, x) ** 2)
    return jnp.where(big, 2 * jnp.log(jnp.abs(jnp.where(big, x, 1))), near)
