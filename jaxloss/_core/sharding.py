"""Forms that trace and stay cheap when arrays are sharded, on Auto and on Explicit meshes."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def one_hot(labels: Array, classes: int) -> Array:
    """Bool array that is True at the label; fuses into what reads it. `(*batch,) -> (*batch, classes)`."""
    shape = (*labels.shape, classes)
    return jax.lax.broadcasted_iota(labels.dtype, shape, labels.ndim) == labels[..., None]


def pick(values: Array, labels: Array) -> Array:
    """`values[..., label]` without a gather, so that classes may be sharded."""
    return jnp.sum(jnp.where(one_hot(labels, values.shape[-1]), values, 0), axis=-1)


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
