"""Sums over the paths of a lattice, and the share of each arc in them, without exp of a total."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from .checks import check_array, check_integer, check_shape, message
from .lengths import lengths_to_where

LOG_ZERO = -1e30  # absorbs any log weight, yet differences of two of them are no NaN
IMPOSSIBLE = LOG_ZERO / 2  # below it, a path went over an arc of weight 0


@jax.custom_jvp
def merge(a: Array, b: Array) -> tuple[Array, Array]:
    """log(e^a + e^b), and the lesser share of the two: negative (also -0) if it is that of `a`.

    Small shares keep all their digits. `split` divides something by the shares.
    """
    ratio = jnp.exp(-jnp.abs(a - b))
    lesser = ratio / (1 + ratio)
    return jnp.maximum(a, b) + jnp.log1p(ratio), jnp.where(a < b, -lesser, lesser)


def split(amount: Array, code: Array) -> tuple[Array, Array]:
    """`amount` divided between the two arguments of `merge`, in their order."""
    first = jnp.signbit(code)
    lesser = amount * jnp.where(first, -code, code)
    greater = amount - lesser
    return jnp.where(first, lesser, greater), jnp.where(first, greater, lesser)


@merge.defjvp
def _merge_jvp(primals: Any, tangents: Any) -> Any:
    total, code = merge(*primals)
    of_a, of_b = split(jnp.ones_like(code), code)
    a, b = tangents
    return (total, code), (of_a * a + of_b * b, of_a * of_b * (b - a))


class Arithmetic(NamedTuple):
    """How sums of path weights are held; `best` keeps only the best path instead of the sum.

    Attributes:
        enter: A log weight as a number.
        merge: The sum of two numbers, and the code for `split`.
        times: The product with a number that `enter` made.
        rescale: Divides arrays of numbers by a common factor for each item (the last axis); with
            the logarithm of that factor.
        log: The logarithm, far below `IMPOSSIBLE` for 0.
    """

    enter: Callable[[Array], Any]
    merge: Callable[[Any, Any], tuple[Any, Array]]
    times: Callable[[Any, Any], Any]
    rescale: Callable[[Any], tuple[Any, Array]]
    log: Callable[[Any], Array]


def _bounded(log_weight: Array) -> Array:
    return jnp.maximum(log_weight, LOG_ZERO)


def _add(a: Array, b: Array) -> Array:
    return a + b


def _by_the_largest(numbers: Any) -> tuple[Any, Array]:
    peak = lambda x: jnp.max(x, axis=0, initial=LOG_ZERO)
    leaves = jax.tree.leaves(numbers)
    largest = peak(leaves[0])
    for leaf in leaves[1:]:
        largest = jnp.maximum(largest, peak(leaf))
    largest = lax.stop_gradient(largest)
    return jax.tree.map(lambda x: x - largest[None], numbers), largest


def _same(x: Array) -> Array:
    return x


def _better(a: Array, b: Array) -> tuple[Array, Array]:
    return jnp.maximum(a, b), jnp.where(a < b, -jnp.zeros_like(a), jnp.zeros_like(a))


LOGARITHMS = Arithmetic(_bounded, merge, _add, _by_the_largest, _same)
BEST = Arithmetic(_bounded, _better, _add, _by_the_largest, _same)


# Extended floats: a mantissa in [1, 2) and an integer exponent of 2. Their sums and products are as
# accurate as those of floats at any size; a logarithm loses a digit for each one before its point.


class Extended(NamedTuple):
    """The number `mantissa * 2 ** exponent`."""

    mantissa: Array
    exponent: Array


ZERO_EXPONENT = -(2**30)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440054690583e-4  # the high part has ten bits


def _layout(dtype: Any) -> tuple[Any, int, int]:
    """The integer of the same width, bits of the mantissa, bias of the exponent."""
    return (jnp.int64, 52, 1023) if dtype == jnp.float64 else (jnp.int32, 23, 127)


def _power_of_two(exponent: Array, dtype: Any) -> Array:
    """2 ** exponent for an exponent of at most 0; 0 where it would underflow."""
    integer, bits, bias = _layout(dtype)
    shifted = jnp.maximum(exponent + bias, 0).astype(integer)
    return lax.bitcast_convert_type(shifted << integer(bits), dtype)


def _enter_extended(log_weight: Array) -> Extended:
    impossible = log_weight < -1e8
    x = jnp.where(impossible, 0, log_weight)
    exponent = jnp.round(x * 1.4426950408889634)
    mantissa = jnp.exp((x - exponent * _LN2_HIGH) - exponent * _LN2_LOW)
    return Extended(mantissa, jnp.where(impossible, ZERO_EXPONENT, exponent.astype(jnp.int32)))


def _merge_extended(a: Extended, b: Extended) -> tuple[Extended, Array]:
    exponent = jnp.maximum(a.exponent, b.exponent)
    part = lambda x: x.mantissa * _power_of_two(x.exponent - exponent, x.mantissa.dtype)
    first, second = part(a), part(b)
    total = first + second
    lesser = jnp.minimum(first, second) / total
    return Extended(total, exponent), jnp.where(first < second, -lesser, lesser)


def _times_extended(a: Extended, b: Extended) -> Extended:
    product = a.mantissa * b.mantissa
    integer, bits, bias = _layout(product.dtype)
    raw = lax.bitcast_convert_type(product, integer)
    one = integer(bias << bits)
    mantissa = lax.bitcast_convert_type((raw & integer(2**bits - 1)) | one, product.dtype)
    moved = ((raw >> integer(bits)) - integer(bias)).astype(jnp.int32)
    return Extended(mantissa, jnp.maximum(a.exponent + b.exponent + moved, ZERO_EXPONENT))


def _as_it_is(numbers: Any) -> tuple[Any, Array]:
    first = jax.tree.leaves(numbers)[0]
    return numbers, jnp.zeros_like(first[0])


def _log_extended(number: Extended) -> Array:
    exponent = number.exponent.astype(number.mantissa.dtype)
    log = jnp.log(number.mantissa) + exponent * _LN2_LOW + exponent * _LN2_HIGH
    return jnp.where(number.exponent < ZERO_EXPONENT // 2, LOG_ZERO, log)


EXTENDED = Arithmetic(_enter_extended, _merge_extended, _times_extended, _as_it_is, _log_extended)


def skew(x: Array, steps: int, fill: float = -jnp.inf) -> Array:
    """Anti-diagonals first: `out[i + j, i] = x[i, j]` for the first `steps` of them.

    By padding and reshaping alone, `(rows, columns, *batch) -> (steps, rows, *batch)`; `fill`
    stands where no node is. Without loss there are `rows + columns - 1` steps.
    """
    rows, columns, *batch = x.shape
    rest = [(0, 0)] * len(batch)
    padded = jnp.pad(x, [(0, 0), (0, steps + 1 - columns), *rest], constant_values=fill)
    flat = padded.reshape(rows * (steps + 1), *batch)[: rows * steps]
    return flat.reshape(rows, steps, *batch).swapaxes(0, 1)


def unskew(x: Array, columns: int) -> Array:
    """The inverse of `skew` without loss, `(steps, rows, *batch) -> (rows, columns, *batch)`."""
    steps, rows, *batch = x.shape
    flat = x.swapaxes(0, 1).reshape(rows * steps, *batch)
    padded = jnp.pad(flat, [(0, rows), *[(0, 0)] * len(batch)])
    return padded.reshape(rows, steps + 1, *batch)[:, :columns]


def check_blank(blank_id: Any, classes: int) -> int:
    """The class of the blank, counted from 0."""
    if isinstance(blank_id, bool) or not isinstance(blank_id, (int, np.integer)):
        raise TypeError(message("blank_id", "an integer", repr(blank_id)))
    if not -classes <= blank_id < classes:
        raise ValueError(message("blank_id", f"a class in [0, {classes}) or -1", blank_id))
    return int(blank_id) % classes


def check_rank(expected: str, **arrays: Any) -> None:
    """Each argument has the axes that `expected` lists, such as `"(batch, time)"`."""
    for name, array in arrays.items():
        if jnp.ndim(array) != expected.count(",") + 1:
            raise ValueError(message(name, f"shape {expected}", f"shape {jnp.shape(array)}"))


def kept(
    shape: tuple[int, ...], lengths: Array | None = None, **masks: Array | None
) -> Array | None:
    """One mask of this shape from the mask given by name and from `lengths`; None keeps all."""
    ((name, mask),) = masks.items()
    if mask is not None:
        check_array(**{name: mask})
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(message(name, "a bool array", jnp.result_type(mask)))
        check_shape(shape, **{name: mask})
        mask = jnp.asarray(mask)
    if lengths is None:
        return mask
    other = "lengths" if name == "where" else name.replace("where", "lengths")
    check_integer(**{other: lengths})
    check_shape(shape[:-1], **{other: lengths})
    inside = lengths_to_where(lengths, shape[-1])
    return inside if mask is None else inside & mask


def kept_first(mask: Array) -> Array:
    """Positions along the last axis, the kept ones first."""
    return jnp.argsort(~mask, axis=-1, stable=True).astype(jnp.int32)


def counts(mask: Array | None, like: Array) -> Array:
    """Number of kept positions along the last axis of `like`."""
    mask = jnp.ones_like(like, dtype=bool) if mask is None else mask
    return jnp.sum(mask, axis=-1, dtype=jnp.int32)
