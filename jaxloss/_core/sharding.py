"""Forms that trace and stay cheap when arrays are sharded, on Auto and on Explicit meshes."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def one_hot(labels: Array, classes: int) -> Array:
    """True at the label; fuses into what reads it. `(*batch,) -> (*batch, classes)`."""
    shape = (*labels.shape, classes)
    return jax.lax.broadcasted_iota(labels.dtype, shape, labels.ndim) == labels[..., None]


def pick(values: Array, labels: Array) -> Array:
    """`values[..., label]`; for a label out of range some value of the row, to be poisoned.

    A gather where the class axis is whole, a fused comparison where it is sharded on an Explicit
    mesh, which has no rule for such a gather.
    """
    if is_sharded(values, -1):
        return jnp.sum(jnp.where(one_hot(labels, values.shape[-1]), values, 0), axis=-1)
    return jnp.take_along_axis(values, labels[..., None], axis=-1, mode="clip")[..., 0]


def lookup(vector: Array, labels: Array) -> Array:
    """`vector[label]` for a replicated vector and labels of any sharding."""
    if any(is_sharded(labels, axis) for axis in range(labels.ndim)):
        table = jnp.broadcast_to(vector, (*labels.shape, vector.shape[0]))
        return jnp.sum(jnp.where(one_hot(labels, vector.shape[0]), table, 0), axis=-1)
    return jnp.take(vector, labels, mode="clip")


def is_sharded(x: Array, axis: int) -> bool:
    """Whether this axis is split over an Explicit mesh."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return False
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    return spec[axis] is not None


def unshard(x: Array, *axes: int) -> Array:
    """Replicate `axes` (all if none is named) of an array on an Explicit mesh; elsewhere no-op."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if sharding is None or sharding.mesh.empty:
        return x
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    chosen = [axis % x.ndim for axis in (axes or range(x.ndim))]
    if all(spec[axis] is None for axis in chosen):
        return x
    for axis in chosen:
        spec[axis] = None
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def shards(x: Array) -> int:
    """Over how many devices of an Explicit mesh the first axis is split."""
    if not is_sharded(x, 0):
        return 1
    sharding = jax.typeof(x).sharding
    names = sharding.spec[0]
    size = 1
    for name in names if isinstance(names, tuple) else (names,):
        size *= sharding.mesh.shape[name]
    return size
