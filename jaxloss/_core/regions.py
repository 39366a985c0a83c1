"""The overlap family's kernel: label maps and memberships, and sums of them over space."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .checks import (
    check_array,
    check_float,
    check_min_rank,
    check_shape,
    check_where,
    message,
    require,
)
from .labels import is_integer, poison, valid
from .numerics import widen
from .sharding import is_sharded, one_hot
from .typing import Where

BLOCK = 2**16  # elements that a block on CPU sums at once: they stay in the cache

Terms = Callable[..., tuple[Array, ...]]


def prepare_regions(
    probs: Array,
    target: Any,
    *,
    where: Where | None = None,
    ignore_index: int | Array | None = None,
    first: str = "probs",
    second: str = "target",
) -> tuple[Array, Array, Array | None]:
    """Check a map of probabilities and its labels or memberships; fold `ignore_index` in `where`.

    Nothing is masked, widened or poisoned yet: `region_sums` does that on the way.
    """
    check_float(**{first: probs})
    check_min_rank(2, **{first: probs})
    check_array(**{second: target})
    target = jnp.asarray(target)
    integer = is_integer(target)
    check_shape(probs.shape[:-1] if integer else probs.shape, **{second: target})
    where = kept_positions(probs.shape[:-1], target, where, ignore_index, second)
    if integer:
        classes = probs.shape[-1]
        require(lambda: valid(target, classes), second, f"values in [0, {classes})", where)
    else:
        require(lambda: (target >= 0) & (target <= 1), second, "values in [0, 1]", where)
    return probs, target, where


def kept_positions(
    shape: tuple[int, ...],
    labels: Array,
    where: Any,
    ignore_index: int | Array | None = None,
    name: str = "labels",
) -> Array | None:
    """`where`, checked, without the positions of the ignored label."""
    if where is not None:
        check_where(where)
        check_shape(shape, where=where)
        where = jnp.asarray(where)
    if ignore_index is None:
        return where
    if not is_integer(labels):
        raise ValueError(message("ignore_index", f"integer {name}", f"dtype {labels.dtype}"))
    kept = labels != jnp.asarray(ignore_index).astype(labels.dtype)
    return kept if where is None else kept & where


def region_values(
    values: Array, probs: Array, target: Array, where: Array | None
) -> tuple[Array, Array | None]:
    """Values of the units `(batch,)` or `(batch, classes)`, and which units exist.

    A kept label that names no class turns its sample into NaN, in value and gradient: at the very
    end, since XLA may drop a NaN that goes through an exponential. A sample with no kept position
    does not exist.
    """
    if is_integer(target):
        ok = whole_samples(valid(target, probs.shape[-1]), where)
        values = poison(values, ok.reshape(-1, *(1,) * (values.ndim - 1)))
    return values, region_units(where, values)


def whole_samples(ok: Array, where: Array | None) -> Array:
    """Samples of which every kept position is `ok`; `(batch,)`."""
    return jnp.all(ok if where is None else ok | ~where, axis=tuple(range(1, ok.ndim)))


def region_units(where: Array | None, values: Array) -> Array | None:
    """Units of samples with a kept position, in the shape of `values`."""
    if where is None:
        return None
    some = jnp.any(where, axis=tuple(range(1, where.ndim)))
    return jnp.broadcast_to(some.reshape(-1, *(1,) * (values.ndim - 1)), values.shape)


def region_sums(
    terms: Terms, probs: Array, target: Array, where: Array | None, *, fill: int = 0
) -> tuple[Array, ...]:
    """Sums over space of `terms(p, hit)` for labels or `terms(p, g)` for memberships.

    Each is `(batch, classes)`. `hit` is a bool of the shape of `p`, False everywhere for a label
    that names no class; hidden positions have p = g = fill.
    """
    arrays = (probs, target) if where is None else (probs, target, where)
    return space_sums(terms, fill, *arrays)


def space_sums(terms: Terms, fill: int, *arrays: Array) -> tuple[Array, ...]:
    """What `terms` makes of `(p, target[, where])`, summed over the space axes.

    No term is ever held for the whole batch. Accelerators fuse the comparison with the labels
    into the sums; XLA's CPU backend does not, so there the sums run over blocks of positions.
    """
    probs = arrays[0]
    space = probs.shape[1:-1]
    size = max(1, BLOCK // max(1, probs.shape[0] * probs.shape[-1]))
    small = probs.size <= 2 * BLOCK or math.prod(space) < 2 * size
    if small or any(is_sharded(probs, 1 + i) for i in range(len(space))):
        return _at_once(terms, fill, *arrays)
    return _large(terms, fill, size, *arrays)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _large(terms: Terms, fill: int, size: int, *arrays: Array) -> tuple[Array, ...]:
    blocks = partial(_in_blocks, terms, fill, size)
    return jax.lax.platform_dependent(*arrays, cpu=blocks, default=partial(_at_once, terms, fill))


@_large.defjvp
def _large_jvp(terms: Terms, fill: int, size: int, primals: Any, tangents: Any) -> Any:
    # Linear in the tangents and without a loop: its transpose is one fused elementwise gradient.
    at_once = jax.checkpoint(partial(_at_once, terms, fill), prevent_cse=False)
    return _large(terms, fill, size, *primals), jax.jvp(at_once, primals, tangents)[1]


def _at_once(terms: Terms, fill: int, *arrays: Array) -> tuple[Array, ...]:
    axes = tuple(range(1, arrays[0].ndim - 1))
    return tuple(jnp.sum(x, axis=axes) for x in _evaluate(terms, fill, *arrays))


def _in_blocks(terms: Terms, fill: int, size: int, *arrays: Array) -> tuple[Array, ...]:
    rank, kinds = arrays[0].ndim - 1, [x.dtype for x in arrays]
    flat = [_bits(x).reshape(x.shape[0], -1, *x.shape[rank:]) for x in arrays]
    count = flat[0].shape[1] // size
    back = lambda x, kind: x if x.dtype == kind else jax.lax.bitcast_convert_type(x, kind)
    take = lambda xs: _at_once(terms, fill, *map(back, xs, kinds))
    cut = lambda i: [jax.lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in flat]
    add = lambda i, sums: jax.tree.map(jnp.add, sums, take(cut(i)))
    return jax.lax.fori_loop(0, count, add, take([x[:, count * size :] for x in flat]))


def _bits(x: Array) -> Array:
    """16-bit floats as integers: XLA would widen a whole array of floats before the loop."""
    if x.dtype.itemsize == 2 and jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(x, jnp.uint16)
    return x


def _evaluate(
    terms: Terms, fill: int, probs: Array, target: Array, where: Array | None = None
) -> tuple[Array, ...]:
    integer = is_integer(target)
    if integer:
        (probs,) = widen(probs)
        hit = one_hot(target, probs.shape[-1])
        if is_sharded(probs, -1):
            hit = jax.sharding.reshard(hit, jax.typeof(probs).sharding)
    else:
        probs, hit = widen(probs, target)
    if where is not None:
        kept = where[..., None]
        probs = jnp.where(kept, probs, fill)
        hit = jnp.where(kept, hit, jnp.asarray(fill, hit.dtype))
    return terms(probs, hit)


def mismatch(p: Array, g: Array) -> tuple[Array, Array]:
    """|p - g| and p + g."""
    if g.dtype == bool:
        return jnp.where(g, 1 - p, p), jnp.where(g, 1 + p, p)
    return side(p, g) * (p - g), p + g


def squared_mismatch(p: Array, g: Array) -> tuple[Array, Array]:
    """(p - g)^2 and p^2 + g^2."""
    if g.dtype == bool:
        return jnp.where(g, 1 - p, p) ** 2, jnp.where(g, 1 + p**2, p**2)
    return (p - g) ** 2, p**2 + g**2


def confusion(p: Array, g: Array) -> tuple[Array, Array, Array]:
    """Shares of true positives, false positives and false negatives: min(p, g) and what is left."""
    if g.dtype == bool:
        return jnp.where(g, p, 0), jnp.where(g, 0, p), jnp.where(g, 1 - p, 0)
    more = side(p, g)
    shared = 0.5 * ((1 - more) * p + (1 + more) * g)
    return shared, jnp.maximum(more, 0) * (p - g), jnp.maximum(-more, 0) * (g - p)


def both_absent(p: Array, g: Array) -> tuple[Array]:
    """Share of true negatives, 1 - max(p, g); hidden positions need the fill 1."""
    if g.dtype == bool:
        return (jnp.where(g, 0, 1 - p),)
    more = side(p, g)
    return (1 - 0.5 * ((1 + more) * p + (1 - more) * g),)


def area(p: Array, g: Array) -> tuple[Array]:
    """The target itself."""
    return (g.astype(p.dtype),)


def side(p: Array, g: Array) -> Array:
    """Sign of p - g, constant; at equality 0, or the one side that [0, 1] leaves open.

    With it a target 0 or 1 has the derivatives of sum p g, those of an integer label.
    """
    p, g = jax.lax.stop_gradient((p, g))
    inside = jnp.where(g <= 0, 1, jnp.where(g >= 1, -1, jnp.zeros((), p.dtype)))
    return jnp.where(p == g, inside, jnp.sign(p - g))
