"""Lengths of padded sequences, as masks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer

from .checks import check_integer, check_shape, check_where, naming, require
from .typing import Where


def lengths_to_where(lengths: Integer[Array, "*batch"], size: int) -> Bool[Array, "*batch size"]:
    """The mask of the first `lengths` of `size` positions, along a new last axis.

    Args:
        lengths: How many positions each sequence has; more than `size` are all of them.
        size: Number of positions, padding included.

    Returns:
        A bool array `(*batch, size)`.

    >>> lengths_to_where(jnp.array([1, 3]), 3)
    Array([[ True, False, False],
           [ True,  True,  True]], dtype=bool)
    """
    with naming("lengths_to_where"):
        check_integer(lengths=lengths)
        lengths = jnp.asarray(lengths)
        if lengths.dtype.itemsize < 4:
            lengths = lengths.astype(jnp.int32)
        require(lambda: (lengths >= 0) & (lengths <= size), "lengths", f"values in [0, {size}]")
    shape = (*lengths.shape, size)
    return jax.lax.broadcasted_iota(lengths.dtype, shape, lengths.ndim) < lengths[..., None]


def fold_lengths(
    where: Where | None, lengths: Integer[Array, "*batch"] | None, shape: Sequence[int]
) -> Where | None:
    """`where` over positions of this shape, time last, without what lies beyond `lengths`."""
    if lengths is None:
        return where
    check_shape(shape[:-1], lengths=lengths)
    inside = lengths_to_where(lengths, shape[-1])
    if where is None:
        return inside
    check_where(where)
    check_shape(shape, where=where)
    return inside & jnp.asarray(where)
