"""Sinkhorn's algorithm on logarithms: matrices scaled to given sums of their rows and columns."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .checks import message
from .numerics import safe_log
from .softmax import safe_log_sum_exp
from .terms import Axis, add_up


def log_sinkhorn(
    log_matrix: Array,
    iterations: int,
    *,
    rows: Array | None = None,
    columns: Array | None = None,
    axis_name: Axis = None,
) -> Array:
    """Logarithm of a matrix whose rows, and nearly so columns, are scaled to sums of 1.

    Each iteration scales the columns, then the rows, so that rows sum to 1 to the last digits;
    transpose before and after to have that of the columns. Where not all rows and columns can have
    a sum of 1, those of the columns are equal instead.

    Args:
        log_matrix: Logarithms `(*batch, n, m)`; -inf is an entry of 0.
        iterations: How often, at least 1; see `check_iterations`.
        rows: Bool array `(*batch, n)` of the rows that take part.
        columns: The same for columns, `(*batch, m)`.
        axis_name: Mapped axes over which the rows are split.

    Returns:
        Logarithms of the shape of `log_matrix`; hidden entries, which may be NaN before, are -inf.
        A row or a column without a possible entry has none.
    """
    log_rows, log_columns = (jnp.zeros_like(jnp.sum(log_matrix, axis=i)) for i in (-1, -2))
    log_rows = log_rows if rows is None else jnp.where(rows, log_rows, -jnp.inf)
    log_columns = log_columns if columns is None else jnp.where(columns, log_columns, -jnp.inf)
    return log_scaled(log_matrix, log_rows, log_columns, iterations, axis_name).matrix


class Scaled(NamedTuple):
    """A scaled matrix in logarithms, and its factors beside the sums.

    `matrix = log_matrix + (log_rows + f) + (log_columns + g)`; f and g are -inf where there is
    nothing to scale.
    """

    matrix: Array  # (*batch, n, m)
    f: Array  # (*batch, n)
    g: Array  # (*batch, m)


def log_scaled(
    log_matrix: Array,
    log_rows: Array,
    log_columns: Array,
    iterations: int,
    axis_name: Axis = None,
    *,
    anneal: bool = False,
) -> Scaled:
    """Scale `exp(log_matrix)` to given sums of its rows and, nearly so, of its columns.

    `log_rows` `(*batch, n)` and `log_columns` `(*batch, m)` are the logarithms of these sums; -inf
    hides a row or a column. Reverse mode keeps two vectors for each iteration and no matrix. A
    matrix of one entry is scaled exactly.

    With `anneal` the first half of the iterations scales powers of the matrix, of an exponent that
    rises to 1: to the same limit, which steep matrices reach much sooner.
    """
    hidden = (log_rows == -jnp.inf)[..., None] | (log_columns == -jnp.inf)[..., None, :]
    x = jnp.where(hidden, -jnp.inf, log_matrix)
    # With the largest entry of each column, then row, taken off, factors of matrices of any size
    # are small numbers with all their digits. The first step begins where it would have.
    tops = largest_of_columns(x, None, axis_name)
    x = x - tops
    sides = _finite(jnp.max(jax.lax.stop_gradient(x), axis=-1, initial=-jnp.inf))
    x = x - sides[..., None]
    powers = _exponents(x, iterations, axis_name) if anneal else None

    @partial(jax.checkpoint, prevent_cse=False)
    def step(pair: tuple[Array, Array], power: Any) -> tuple[tuple[Array, Array], None]:
        f, _ = pair
        weighed = _weighed(x, log_rows[..., None], f[..., None], power)
        g = _missing(_column_sums(weighed, axis_name), power)
        weighed = _weighed(x, log_columns[..., None, :], g[..., None, :], power)
        return (_missing(safe_log_sum_exp(weighed), power), g), None

    tops = jnp.squeeze(tops, -2)
    (f, g), _ = jax.lax.scan(step, (sides, tops), powers, length=iterations)
    scaled = x + ((log_rows + f)[..., None] + (log_columns + g)[..., None, :])
    return Scaled(scaled, f - sides, g - tops)


def _exponents(x: Array, iterations: int, axis_name: Axis) -> Array:
    """From where entries are within a factor of e, up to 1, `(iterations, *batch)`."""
    lowest = jnp.where(x == -jnp.inf, 0, jax.lax.stop_gradient(x))
    lowest = jnp.min(lowest, axis=(-1, -2), initial=0)
    steepness = -(lowest if axis_name is None else jax.lax.pmin(lowest, axis_name))
    left = np.maximum(1 - np.arange(iterations) / max(iterations // 2, 1), 0)
    left[-1] = 0
    left = jnp.asarray(left, x.dtype).reshape((-1,) + (1,) * lowest.ndim)
    return jnp.exp(-left * jnp.log(jnp.maximum(steepness, 1))[None])


def _weighed(x: Array, log_mass: Array, factors: Array, power: Array | None) -> Array:
    if power is None:
        return x + (log_mass + factors)
    return power[..., None, None] * (x + factors) + log_mass


def _missing(log_sum: Array, power: Array | None) -> Array:
    """The factors that make these sums 1; -inf where there is nothing to scale."""
    missing = jnp.where(log_sum == -jnp.inf, -jnp.inf, -log_sum)
    return missing if power is None else missing / power[..., None]


def largest_of_columns(x: Array, rows: Array | None = None, axis_name: Axis = None) -> Array:
    """The largest entry of each column, `(*batch, 1, m)`, and 0 for one without any."""
    x = x if rows is None else jnp.where(rows[..., None], x, -jnp.inf)
    top = jnp.max(jax.lax.stop_gradient(x), axis=-2, keepdims=True, initial=-jnp.inf)
    return _finite(top if axis_name is None else jax.lax.pmax(top, axis_name))


def _finite(top: Array) -> Array:
    return jnp.where(jnp.isfinite(top), top, 0)


def _column_sums(x: Array, axis_name: Axis) -> Array:
    top = largest_of_columns(x, None, axis_name)
    sums = add_up(jnp.sum(jnp.exp(x - top), axis=-2), axis_name)
    return safe_log(sums) + jnp.squeeze(top, -2)


def check_iterations(iterations: Any, least: int = 1) -> int:
    """A static number of iterations."""
    whole = isinstance(iterations, (int, np.integer)) and not isinstance(iterations, bool)
    if not whole or iterations < least:
        expected = f"an integer of at least {least}"
        raise ValueError(message("iterations", expected, repr(iterations)))
    return int(iterations)
