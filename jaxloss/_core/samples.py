"""Losses of whole samples, `batch *space channels`: what is kept of each, and random numbers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped

from .checks import check_array, check_float, check_min_rank, check_same_shape, check_where, message
from .numerics import safe_div, widen
from .reduce import mask
from .sharding import is_sharded
from .terms import Axis
from .typing import Number, Where
from .windows import any_kept

PerSample = Number | Shaped[Array, " batch"]


def prepare_samples(where: Where | None, **arrays: Array) -> tuple[Array, ...]:
    """Check `batch *space channels`, hide the positions `batch *space` where not kept, widen."""
    name, first = next(iter(arrays.items()))
    check_float(**{name: first})
    check_min_rank(2, **{name: first})
    check_same_shape(**arrays)
    if where is not None:
        check_where(where)
        if jnp.shape(where) != jnp.shape(first)[:-1]:
            expected = f"shape {jnp.shape(first)[:-1]}"
            raise ValueError(message("where", expected, f"shape {jnp.shape(where)}"))
    return mask(where, *widen(*arrays.values()))


def per_sample(like: Array, where: Where | None = None, **values: Any) -> tuple[Array, ...]:
    """Options that are one number, or one for each sample: in the dtype of `like`, 0 where hidden.

    A number stays a scalar.
    """
    found = []
    for name, value in values.items():
        check_array(**{name: value})
        shape = jnp.shape(value)
        if shape not in ((), like.shape[:1]):
            raise ValueError(message(name, f"a scalar or shape {like.shape[:1]}", f"shape {shape}"))
        number = jnp.asarray(value).astype(like.dtype)
        found += mask(any_kept(where), number) if shape else (number,)
    return tuple(found)


def over(values: Array, like: Array) -> Array:
    """One number for each sample beside samples of any rank."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1)) if values.ndim else values


def sample_sum(values: Array) -> Array:
    """Sum over all axes but the batch."""
    return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def sample_mean(values: Array, where: Where | None) -> Array:
    """Mean over kept positions and channels, of values that are 0 where not kept: `batch`."""
    if where is None:
        return sample_sum(values) / max(math.prod(values.shape[1:]), 1)
    count = sample_sum(jnp.asarray(where).astype(values.dtype)) * max(values.shape[-1], 1)
    return safe_div(sample_sum(values), count)


def draw_like(sampler: Any, key: ArrayLike, like: Array, axis_name: Axis = None) -> Array:
    """Random numbers in shape, dtype and sharding of `like`, from a sampler of `jax.random`.

    They are drawn in float32, so that they are the same in every precision. The devices of a mapped
    axis draw different ones.
    """
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    split = any(is_sharded(like, axis) for axis in range(like.ndim))
    explicit = {"out_sharding": jax.typeof(like).sharding} if split else {}
    return sampler(key, shape=like.shape, **explicit).astype(like.dtype)
