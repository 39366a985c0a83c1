"""Which pairs and triplets of a batch to compare, from distances and two masks of one shape."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .sharding import unshard


def hardest(scores: Array, positives: Array, negatives: Array) -> tuple[Array, Array]:
    """Index of the highest positive and of the lowest negative of each row; -1 for none.

    Of equal ones the first; a NaN is the highest and the lowest. Both come out of one pass: an
    argmax and an argmin would read every row twice, and much more slowly on CPU.
    """
    none = jnp.int32(jnp.iinfo(jnp.int32).max)
    low = jnp.asarray(-jnp.inf, scores.dtype)
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)

    def marked(mask: Array, x: Array) -> tuple[Array, Array]:
        x = jnp.where(jnp.isnan(x), -low, x)
        return jnp.where(mask, x, low), jnp.where(mask, place, none)

    def larger(a: Any, b: Any) -> tuple[Array, Array]:
        index = jnp.where(a[0] > b[0], a[1], b[1])
        index = jnp.where(a[0] == b[0], jnp.minimum(a[1], b[1]), index)
        return jnp.where(a[0] >= b[0], a[0], b[0]), index

    _, positive, _, negative = jax.lax.reduce(
        (*marked(positives, scores), *marked(negatives, -scores)),
        (low, none, low, none),
        lambda a, b: (*larger(a[:2], b[:2]), *larger(a[2:], b[2:])),
        (1,),
    )
    positive, negative = unshard(positive), unshard(negative)
    some = lambda index: jnp.where(index == none, -1, index)
    return some(positive), some(negative)


def semi_hard(distances: Array, positives: Array, negatives: Array) -> Array:
    """For each positive pair the nearest negative that is farther, else the farthest; or -1."""
    keys = _sort_keys(distances, positives | negatives)
    place = jnp.where(negatives, jax.lax.broadcasted_iota(jnp.int32, keys.shape, 1), -1)
    last_key = jnp.asarray(jnp.iinfo(keys.dtype).max, keys.dtype)
    sort = lambda *x: jax.lax.sort(x, dimension=1, num_keys=1)
    ordered, index = sort(jnp.where(negatives, keys, last_key), place)
    last = jnp.sum(negatives, axis=1, dtype=jnp.int32, keepdims=True) - 1
    chosen = jnp.minimum(_count_below(ordered, keys + 1), last)
    found = jnp.take_along_axis(index, jnp.maximum(chosen, 0), axis=1, mode="clip")
    return jnp.where(positives & (last >= 0), found, -1)


def violations(distances: Array, margin: Array, positives: Array, negatives: Array) -> Array:
    """In how many triplets of its row with d(a, n) < d(a, p) + margin each pair is.

    Every pair becomes one integer, a positive at its distance plus the margin and before equal
    negatives; the integers are sorted, since XLA sorts floats and pairs several times slower.
    """
    kept = positives | negatives
    moved = jnp.where(positives, distances + margin, distances)
    keys = _sort_keys(moved, kept)
    keys = (keys << 1) | negatives.astype(keys.dtype)
    keys = jnp.where(kept, keys, jnp.asarray(jnp.iinfo(keys.dtype).max, keys.dtype))
    ordered = jnp.sort(keys, axis=1)
    positive = ((ordered & 1) == 0).astype(jnp.int32)
    seen = jnp.cumsum(positive, axis=1)
    rank = _count_below(ordered, keys)
    before = jnp.take_along_axis(seen - positive, rank, axis=1, mode="clip")
    counts = jnp.where(positives, rank - before, seen[:, -1:] - before)
    return jnp.where(kept, counts, 0)


def _sort_keys(values: Array, kept: Array) -> Array:
    """Unsigned integers below half their range, in the order of the kept values of each row."""
    lowest = jnp.min(values, axis=1, keepdims=True, initial=jnp.inf, where=kept)
    # XLA may compute the values once more here, and round them below their minimum: hence the sign.
    above = jnp.abs(jnp.where(kept, values - lowest, 0))
    integer = jnp.uint64 if values.dtype == jnp.float64 else jnp.uint32
    return jax.lax.bitcast_convert_type(above, integer)


def _count_below(ordered: Array, keys: Array) -> Array:
    """How many numbers of its ascending row are less than each key, by bisection."""
    count = keys.shape[1]
    bits = count.bit_length()

    def halve(i: Array, found: Array) -> Array:
        ahead = found + (1 << (bits - 1 - i))
        place = jnp.minimum(ahead, count) - 1
        seen = jnp.take_along_axis(ordered, place, axis=1, mode="clip")
        return jnp.where((ahead <= count) & (seen < keys), ahead, found)

    return jax.lax.fori_loop(0, bits, halve, (keys & 0).astype(jnp.int32))
