"""The gamma function without cancellation: Stirling's error, half steps, counts, Dirichlet KL."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .numerics import expm1_excess, horner, safe_div

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def bounded_log(log_x: Array) -> Array:
    """A logarithm whose exponential is finite, as is the inverse of that; gradient 0 beyond."""
    largest = 0.9 * math.log(jnp.finfo(log_x.dtype).max)
    return jnp.where(log_x > largest, largest, jnp.where(log_x < -largest, -largest, log_x))


def stirling_error(x: Array, log_x: Array | None = None) -> Array:
    """lgamma(x) - (x - 1/2) log x + x - log(2 pi) / 2 for x > 0: falls from infinity to 1 / (12 x).

    Value and derivatives keep every digit: all terms have one sign. A known log x saves one.
    """
    # From x to x + 1 it falls by (x + 1/2) log(1 + 1/x) - 1, which is atanh(s) / s - 1 with
    # s = 1 / (2 x + 1); a few steps further on its asymptotic series is exact.
    return _stirling(x, jnp.log(x) if log_x is None else jax.lax.stop_gradient(log_x))


@jax.custom_jvp
@jax.jit
def _stirling(x: Array, log_x: Array) -> Array:
    z, steps = jnp.where(x < 1, x + 1, x), _steps(x, 2, 7)
    inverse = 1 / (z + steps)
    total = inverse * horner(_STIRLING[: steps + 4], inverse**2)
    if x.dtype == jnp.float32:
        for k in range(steps):
            square = (1 / (2 * (z + k) + 1)) ** 2
            total += square * horner(_ATANH[: 9 - 3 * k], square)
    else:  # in double precision the digits that cancel can be spared
        total += _summed(lambda y: (y + 0.5) * jnp.log1p(1 / y) - 1, z, steps)
    return total + jnp.where(x < 1, (x + 0.5) * (jnp.log1p(x) - log_x) - 1, 0)


@jax.custom_jvp
@jax.jit
def _stirling_slope(x: Array, log_x: Array) -> Array:
    """Its derivative times x, from -1/2 at 0 to -1 / (12 x)."""
    z, steps = jnp.where(x < 1, x + 1, x), _steps(x, 2, 7)
    inverse = 1 / (z + steps)
    total = x * inverse * inverse * horner(_times(_STIRLING[: steps + 4], 1), inverse**2)
    if x.dtype == jnp.float32:
        for k in range(steps):
            s = 1 / (2 * (z + k) + 1)
            total += 4 * x * s * s * s * horner(_times(_ATANH[: 9 - 3 * k], 2, 0.5), s * s)
    else:
        term = lambda y: (y + 0.5) / (y * (y + 1)) - jnp.log1p(1 / y)
        total += x * _summed(term, z, steps)
    return jnp.where(x < 1, x * (jnp.log1p(x) - log_x) - (x + 0.5) / (x + 1), 0) - total


@jax.jit
def _stirling_bend(x: Array) -> Array:
    """Its second derivative times x^2."""
    z, steps = jnp.where(x < 1, x + 1, x), _steps(x, 2, 7)
    inverse = 1 / (z + steps)
    series = _times(_times(_STIRLING[: steps + 4], 1), 2)
    total = inverse * (x * inverse) ** 2 * horner(series, inverse**2)
    for k in range(steps):
        total += 0.5 * (x / ((z + k) * (z + k + 1))) ** 2
    return total + jnp.where(x < 1, 0.5 / (x + 1) ** 2, 0)


@_stirling.defjvp
def _stirling_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    (x, log_x), (moved, _) = primals, tangents
    return _stirling(x, log_x), _stirling_slope(x, log_x) * safe_div(moved, x)


@_stirling_slope.defjvp
def _slope_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    (x, log_x), (moved, _) = primals, tangents
    slope = _stirling_slope(x, log_x)
    return slope, (slope + _stirling_bend(x)) * safe_div(moved, x)


def half_step(x: Array) -> Array:
    """lgamma(x) - lgamma(x + 1/2) + log(x) / 2 for x > 0: falls from infinity to 1 / (8 x)."""
    # Each step from x to x + 1 adds a small positive term; after some of them the asymptotic
    # series is exact.
    steps = _steps(x, 6, 16)
    # no product in the denominator: the cube of a square would overflow
    total = _summed(lambda y: 0.5 * jnp.log1p(0.25 / y / (y + 1)), x, steps)
    inverse = 1 / (x + steps)
    return total + inverse * horner(_HALF_STEP, inverse**2)


def count_parts(y: Array) -> tuple[Array, Array, Array, Array]:
    """What likelihoods of a count y >= 0 need, to be chosen from by y < 1.

    A count n, y + 1 below 1 and else y; log n; lgamma(n + 1) - n log n + n; and for y < 1
    lgamma(y + 1), exactly 0 at 0 and smooth there.
    """
    small = y < 1
    count = jnp.where(small, y + 1, y)
    log_count = jnp.log(count)
    excess = HALF_LOG_TWO_PI + 0.5 * log_count + stirling_error(count)
    factorial = excess + count * (log_count - 1) - jnp.log1p(jnp.where(small, y, 0))
    factorial -= jax.lax.stop_gradient(jnp.where(y == 0, factorial, 0))
    return count, log_count, excess, factorial


@jax.custom_jvp
def dirichlet_kl(excess: Array) -> Array:
    """KL(Dir(1 + excess) || Dir(1)) over the last axis, for an excess of at least 0.

    Both where it is tiny, about the square of the excess, and where lgamma of it is huge.
    """
    # Sum_k J(1, e_k) - J(K, sum e) with J(c, e) = integral of t trigamma(c + t) over [0, e].
    classes = excess.shape[-1]
    total = jnp.sum(excess, axis=-1)
    near = jnp.sum(_integral(1, excess), axis=-1) - _integral(classes, total)
    far = jnp.sum(_less_linear(1, excess), axis=-1) - _less_linear(classes, total)
    return jnp.where(total < 2, near, far)


@dirichlet_kl.defjvp
def _dirichlet_kl_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (excess,), (moved,) = primals, tangents
    total = jnp.sum(excess, axis=-1, keepdims=True)
    slope = excess * trigamma(1 + excess) - total * trigamma(excess.shape[-1] + total)
    return dirichlet_kl(excess), jnp.sum(slope * moved, axis=-1)


def _integral(c: int, e: Array) -> Array:
    """J(c, e) as a sum of positive terms, each about the square of e."""
    # A step of trigamma adds 1 / z^2, so J(c, e) = J(c + 1, e) + L(e / c), where
    # L(u) = log(1 + u) - u / (1 + u); from Stirling's series comes the rest.
    steps = _steps(e, 3, 8)
    of_e = lambda y: expm1_excess(-jnp.log1p((e[..., None] if y.ndim > e.ndim else e) / y))
    total = _summed(of_e, jnp.full_like(e, c), steps)
    c += steps
    log_ratio = jnp.log1p(e / c)
    total += c * expm1_excess(log_ratio) + 0.5 * expm1_excess(-log_ratio)
    ratio = 1 / (1 + e / c)
    rest = jnp.zeros_like(e)
    # b / c^m less its tangent from c + e: (1 - r)^2 b / c^m times the sum of (i + 1) r^i
    for m, term in zip(range(1, 12, 2), _STIRLING[: _steps(e, 3, 6)], strict=False):
        rest += term / float(c) ** m * horner(range(1, m + 1), ratio)
    return total + (e * ratio / c) ** 2 * rest


def _less_linear(c: int, e: Array) -> Array:
    """J(c, e) - e, without what cancels where e is large."""
    x = c + e
    log_x = jnp.log(x)
    error = _stirling(x, log_x) - _stirling_slope(x, log_x) * (e / x)
    known = math.lgamma(c) - (c - 0.5) * math.log(c) + c - HALF_LOG_TWO_PI
    return (0.5 - c) * jnp.log1p(e / c) - 0.5 * e / x - error + known


def trigamma(x: Array) -> Array:
    """The second derivative of lgamma for x > 0, in terms of one sign."""
    steps = _steps(x, 3, 8)
    inverse = 1 / (x + steps)
    total = inverse + inverse * inverse * (0.5 + inverse * horner(_BERNOULLI, inverse**2))
    return total + _summed(lambda y: (1 / y) ** 2, x, steps)


def _summed(term: Callable[[Array], Array], x: Array, steps: int) -> Array:
    """Sum of the terms of x, x + 1, ...: unrolled in single precision, which is faster to run."""
    if x.dtype == jnp.float32:
        return sum((term(x + k) for k in range(steps)), jnp.zeros_like(x))
    places = jnp.arange(steps, dtype=x.dtype).reshape((1,) * x.ndim + (steps,))
    return jnp.sum(term(x[..., None] + places), axis=-1)  # and this to compile


def _steps(x: Array, single: int, double: int) -> int:
    return single if x.dtype == jnp.float32 else double


def _times(series: Sequence[float], first: int, factor: float = 1) -> list[float]:
    """The series with its terms times `factor` (first + 2 j)."""
    return [c * factor * (first + 2 * j) for j, c in enumerate(series)]


_ATANH = [1 / (2 * k + 3) for k in range(9)]
_STIRLING = (
    1 / 12,
    -1 / 360,
    1 / 1260,
    -1 / 1680,
    1 / 1188,
    -691 / 360360,
    1 / 156,
    -3617 / 122400,
)
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)
_HALF_STEP = (1 / 8, -1 / 192, 1 / 640, -17 / 14336, 31 / 18432)
