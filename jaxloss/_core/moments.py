"""Moments of the rows of a batch, over the rows of all devices of a mapped axis."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from .pairwise import own_index
from .reduce import mask
from .sharding import is_sharded, unshard
from .terms import Axis, add_up


def count_rows(x: Array, where: Array | None, axis_name: Axis) -> Array:
    """How many rows are kept, as a number of the dtype of `x`."""
    kept = jnp.full(x.shape[:1], True) if where is None else jnp.asarray(where)
    return add_up(jnp.sum(kept, dtype=x.dtype), axis_name)


def centred(x: Array, where: Array | None, count: Array, axis_name: Axis) -> Array:
    """Rows minus their mean, hidden ones 0 before and after.

    The mean is taken off twice: a large one is rounded the first time.
    """
    for rounded in (jax.lax.stop_gradient, lambda mean: mean):
        total = add_up(jnp.sum(x, axis=0, keepdims=True), axis_name)
        (x,) = mask(where, x - rounded(total / jnp.maximum(count, 1)))
    return x


def squares(x: Array, axis_name: Axis) -> Array:
    """The sum over the rows of the square of each feature, `(n, d) -> (d,)`."""
    return add_up(jnp.sum(jnp.square(x), axis=0), axis_name)


def largest_entry(x: Array, axis_name: Axis, axis: int | None = None) -> Array:
    """The largest absolute value, as a number without a gradient."""
    top = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axis, initial=0)
    return top if axis_name is None else jax.lax.pmax(top, axis_name)


def products(x: Array, y: Array, axis_name: Axis = None) -> Array:
    """The sum over the rows of x_i y_j, `(n, d), (n, e) -> (d, e)`; no rows are gathered."""
    sharded = is_sharded(x, 0) or is_sharded(y, 0)
    local = jax.lax.dot_general(
        x,
        y,
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=x.dtype,
        out_sharding=NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(None, None))
        if sharded
        else None,
    )
    return add_up(local, axis_name)


def diagonal(size: int) -> Array:
    """True on the diagonal, `(size, size)`; fuses into what reads it."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), i) for i in (0, 1))
    return row == column


def everyones(x: Array, axis_name: Axis) -> Array:
    """Rows of all devices of a mapped axis, in their order, and known to be the same on all.

    `gather_rows` needs half the traffic, but what is made of its result may not leave `shard_map`
    as one array for all devices.
    """
    if axis_name is None:
        return unshard(x, 0)
    devices = jax.lax.psum(1, axis_name)
    first = own_index(x.shape[0], axis_name)[0]
    whole = jnp.zeros((devices * x.shape[0], *x.shape[1:]), x.dtype)
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(whole, x, first, 0), axis_name)
