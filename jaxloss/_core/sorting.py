"""Sorting floats as integers, which XLA does several times faster, and finding one's place."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def sort_keys(x: Array) -> Array:
    """Unsigned integers in the order of the floats, equal for equal ones; NaN comes at the ends."""
    integer = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), integer)  # -0 is 0
    top = jnp.asarray(1 << (jnp.iinfo(integer).bits - 1), integer)
    return jnp.where(bits >= top, ~bits, bits | top)


def from_keys(keys: Array) -> Array:
    """The floats of `sort_keys`."""
    bits = jnp.iinfo(keys.dtype).bits
    top = jnp.asarray(1 << (bits - 1), keys.dtype)
    floats = jnp.float64 if bits == 64 else jnp.float32
    return jax.lax.bitcast_convert_type(jnp.where(keys >= top, keys ^ top, ~keys), floats)


def first_place(ordered: Array, keys: Array) -> Array:
    """Where in its ascending row each key first stands, by bisection: how many are smaller."""
    count, axis = keys.shape[-1], keys.ndim - 1
    bits = count.bit_length()

    def halve(i: Array, found: Array) -> Array:
        ahead = found + (1 << (bits - 1 - i))
        index = jnp.minimum(ahead, count) - 1
        seen = jnp.take_along_axis(ordered, index, axis=axis, mode="clip")
        return jnp.where((ahead <= count) & (seen < keys), ahead, found)

    return jax.lax.fori_loop(0, bits, halve, (keys & 0).astype(jnp.int32))


def balance(ordered: Array, keys: Array) -> Array:
    """How many of its ascending row are smaller than each key, less how many are larger."""
    count, axis = keys.shape[-1], keys.ndim - 1
    place = jnp.arange(1, count, dtype=jnp.int32).reshape((1,) * axis + (max(count - 1, 0),))
    same = (ordered[..., 1:] == ordered[..., :-1]).astype(jnp.int32)
    ends = place + same * (count - place)  # no select: places are not sharded as keys are
    ends = jnp.concatenate([ends, jnp.full_like(ordered[..., :1], count, jnp.int32)], axis=axis)
    ends = jax.lax.cummin(ends, axis=axis, reverse=True)  # of the run of equal keys
    first = first_place(ordered, keys)
    last = jnp.take_along_axis(ends, first, axis=axis, mode="clip")
    return first + last - count
