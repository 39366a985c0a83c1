"""Tokens in runs of a bounded length, one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .checks import message
from .sharding import shards


def split_runs(most: int, *arrays: Array) -> tuple[Array, ...]:
    """`(N, ...)` to `(runs, tokens, ...)`, the last run filled up with zeros.

    Token i goes into run `i % runs`, so that each run holds a part of every device's tokens.
    """
    count, parts = arrays[0].shape[0], shards(arrays[0])
    runs = max(-(-count // most), 1)
    if parts > 1:  # a sharded axis cannot be padded
        local = count // parts
        runs = next((r for r in range(runs, local) if local % r == 0), local)
    size = -(-count // runs)
    out = []
    for array in arrays:
        if size * runs != count:
            array = jnp.pad(array, [(0, size * runs - count)] + [(0, 0)] * (array.ndim - 1))
        out.append(jnp.swapaxes(array.reshape(size, runs, *array.shape[1:]), 0, 1))
    return tuple(out)


def join_runs(array: Array, count: int) -> Array:
    """The inverse of `split_runs`."""
    array = jnp.swapaxes(array, 0, 1)
    array = array.reshape(-1, *array.shape[2:])
    return array if array.shape[0] == count else array[:count]


def over_runs(step: Callable[..., Any], carry: Any, runs: tuple[Array, ...]) -> Any:
    """A scan over the runs that keeps nothing of one for the backward pass."""
    if runs[0].shape[0] == 1:
        carry, out = step(carry, tuple(x[0] for x in runs))
        return carry, jax.tree.map(lambda x: x[None], out)
    return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, runs)


def in_chunks(find: Callable[..., Any], chunk_size: Any, *arrays: Array) -> Any:
    """What `find` makes of the rows of arrays, a chunk of them at a time; all at once if None.

    Its scalars are added up, its arrays joined. Nothing of a chunk is kept for the backward pass.
    """
    if chunk_size is None:
        return find(*arrays)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, np.integer)):
        raise TypeError(message("chunk_size", "an integer or None", repr(chunk_size)))
    if chunk_size < 1:
        raise ValueError(message("chunk_size", "at least 1", chunk_size))
    count = arrays[0].shape[0]
    if chunk_size >= count:
        return find(*arrays)
    step = lambda carry, run: (carry, find(*run))
    _, found = over_runs(step, None, split_runs(int(chunk_size), *arrays))
    return jax.tree.map(lambda x: jnp.sum(x) if x.ndim == 1 else join_runs(x, count), found)
