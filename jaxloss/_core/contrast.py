"""Contrast of rows with keys: sums over the keys of all devices, at once or piece by piece.

Piece by piece, all rows of this device meet one run of keys after the other, as in an online
log-sum-exp, and the keys of other devices come round in a ring. Derivatives go over the pieces once
more, so that memory stays linear in the batch and no device holds the keys of all.
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import and_
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from .checks import check_float, check_same_shape, check_shape, check_where, message
from .numerics import safe_div, safe_log, safe_norm, widen
from .pairwise import gather_rows, own_index, similarities
from .reduce import mask
from .sharding import is_sharded, unshard
from .sigmoid import sigmoid_costs
from .terms import Axis
from .typing import Where

LOWEST = -1e37  # where a running maximum starts; finite, so that differences of two are numbers


class Term(NamedTuple):
    """What to sum over those keys that stand in a relation to a row: another row, a label.

    `log_sum_exp` and the sums of `softplus` of the logits, of the logits as they are (`value`), of
    1 (`count`) and of softplus(L - logit), L being the first term (`below`). With `columns` also
    over the rows, for each key.
    """

    kind: Literal["log_sum_exp", "softplus", "value", "count", "below"]
    relation: Literal["all", "others", "positives", "negatives"]
    columns: bool = False


class Side(NamedTuple):
    """Rows, or the keys that they meet, with what makes logits of their products."""

    vectors: Array  # (n, d)
    factor: Array | None = None  # (n,), of keys: scales the vectors, a piece at a time
    bias: Array | None = None  # (n,), of rows: added to all their logits
    level: Array | None = None  # (n,), of rows: L of `below`


class Marks(NamedTuple):
    """What relations look at: the number of a row in the whole batch, its label, its mask."""

    number: Array | None = None
    labels: Array | None = None
    shown: Array | None = None


class Found(NamedTuple):
    """One sum for each term; of exponentials, over the exponential of the top."""

    sums: tuple[Array, ...]
    tops: tuple[Array, ...]


class _Plan(NamedTuple):
    """How to go about it; all of it static."""

    terms: tuple[Term, ...]
    size: int
    axis_name: Axis = None


Both = tuple[Marks, Marks]  # of rows and of keys
Out = tuple[tuple[Array, ...], tuple[Array, ...]]  # of each row, and of each key


def prepare(where: Where | None, **arrays: Any) -> tuple[Array, ...]:
    """Check, mask and widen matrices of one shape, a row for each sample."""
    check_float(**arrays)
    name, first = next(iter(arrays.items()))
    if jnp.ndim(first) != 2:
        raise ValueError(message(name, "shape (n, features)", f"shape {jnp.shape(first)}"))
    check_same_shape(**arrays)
    if where is not None:
        check_where(where)
        check_shape(jnp.shape(first)[:1], where=where)
    return tuple(unshard(x, 1) for x in mask(where, *widen(*arrays.values())))


def towers(query: Array, keys: Array, scale: Array, *, normalize: bool) -> tuple[Side, Side]:
    """Two sides whose logits are the scaled cosines, or products, of their rows."""
    if not normalize:
        return Side(query * scale), Side(keys)
    return Side(query * (scale * unit_factor(query))[:, None]), Side(keys, unit_factor(keys))


def unit_factor(vectors: Array) -> Array:
    """What brings each vector to length 1; 0 for a zero vector."""
    norm = safe_norm(vectors)
    norm = jnp.where(norm < jnp.finfo(norm.dtype).tiny, 0, norm)
    return safe_div(jnp.ones_like(norm), norm)


def softplus(x: Array) -> Array:
    """log(1 + exp x), with value and gradient 0 at -inf."""
    return sigmoid_costs(x)[1]


def own_logits(rows: Side, keys: Side) -> Array:
    """The logit of each row with the key of its own number."""
    z = jnp.sum(rows.vectors * _vectors(keys), axis=1)
    return z if rows.bias is None else z + rows.bias


def contrast(
    terms: tuple[Term, ...],
    rows: Side,
    keys: Side,
    *,
    labels: Array | None = None,
    shown: Array | None = None,
    known: Array | None = None,
    chunk_size: int | None = None,
    axis_name: Axis = None,
) -> Out:
    """The terms of each row over the keys of all devices, and of each key over all rows.

    `labels` and `shown` belong to rows and keys alike; keys that have other numbers than the rows
    are met under the relation `all` only, and are not gathered. `known` shows which of those exist.
    """
    if all(term.relation == "all" for term in terms):
        known = None if known is None else jnp.asarray(known)
        axis_name, both = None, (Marks(), Marks(shown=known))
    else:
        marks = _marks(rows, labels, shown, axis_name)
        both = marks, marks
    if chunk_size is None:
        return _at_once(terms, rows, keys, both, axis_name)
    return _by_pieces(_Plan(terms, _size(chunk_size), axis_name), rows, keys, both)


def weighted_softplus(
    weight: Array, rows: Side, keys: Side, *, shown: Array | None, chunk_size: int
) -> Array:
    """The sum of weight times `softplus` over the others, its gradient made beside the value.

    Three matrix products where `contrast` takes four; for the keys of one device.
    """
    marks = _marks(rows, None, shown)
    plan = _Plan((Term("softplus", "others"),), _size(chunk_size))
    keys, both = _filled(plan, keys, (marks, marks))
    rows, keys, both = _alike(None, (rows, keys, both))
    return _total(plan, weight, rows, keys, *both)


def _marks(rows: Side, labels: Any, shown: Any, axis_name: Axis = None) -> Marks:
    given = (None if x is None else jnp.asarray(x) for x in (labels, shown))
    return Marks(own_index(rows.vectors.shape[0], axis_name), *given)


def _size(chunk_size: int) -> int:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(message("chunk_size", "a positive integer or None", repr(chunk_size)))
    return chunk_size


# A block of logits


def _vectors(side: Side) -> Array:
    return side.vectors if side.factor is None else side.vectors * side.factor[:, None]


def _logits(rows: Side, keys: Side) -> Array:
    z = similarities(_vectors(rows), _vectors(keys))
    return z if rows.bias is None else z + rows.bias[:, None]


def _kept(relation: str, both: Both) -> Array | None:
    """Which row and key stand in the relation, both shown; None if all do."""
    rows, keys = both
    parts = []
    if relation in ("others", "positives") and rows.number is not None and keys.number is not None:
        parts.append(rows.number[:, None] != keys.number[None])
    if relation == "positives" and rows.labels is not None and keys.labels is not None:
        parts.append(rows.labels[:, None] == keys.labels[None])
    if relation == "negatives" and rows.labels is not None and keys.labels is not None:
        parts.append(rows.labels[:, None] != keys.labels[None])
    if rows.shown is not None:
        parts.append(rows.shown[:, None])
    if keys.shown is not None:
        parts.append(keys.shown[None])
    return reduce(and_, parts) if parts else None


def _where(kept: Array | None, x: Array, other: float) -> Array:
    return x if kept is None else jnp.where(kept, x, other)


def _elements(term: Term, z: Array, both: Both, top: Any, level: Any) -> Array:
    """What is to be summed; 0 where row and key do not stand in the relation."""
    kept = _kept(term.relation, both)
    if term.kind == "value":
        return _where(kept, z, 0)
    if term.kind == "count":
        return _where(kept, jnp.ones_like(z), 0)
    if term.kind == "log_sum_exp":
        return jnp.exp(_where(kept, z - top, -jnp.inf))
    x = level[:, None] - z if term.kind == "below" else z
    return softplus(_where(kept, x, -jnp.inf))


def _tops(terms: tuple[Term, ...], z: Array, both: Both, axis: int) -> tuple[Array, ...]:
    z = jax.lax.stop_gradient(z)
    return tuple(
        jnp.max(_where(_kept(term.relation, both), z, LOWEST), axis=axis, initial=LOWEST)
        for term in terms
        if term.kind == "log_sum_exp" and (axis == 1 or term.columns)
    )


def _sums(
    terms: tuple[Term, ...], z: Array, both: Both, tops: Any, key_tops: Any, level: Array | None
) -> Out:
    """Sums of each row over the keys of a block, and of each key over its rows."""
    tops, key_tops = iter(tops), iter(key_tops)
    of_rows, of_keys = [], []
    for term in terms:
        exponential = term.kind == "log_sum_exp"
        top = next(tops)[:, None] if exponential else None
        of_rows.append(jnp.sum(_elements(term, z, both, top, level), axis=1))
        if term.columns:
            top = next(key_tops)[None] if exponential else None
            of_keys.append(jnp.sum(_elements(term, z, both, top, level), axis=0))
    return tuple(of_rows), tuple(of_keys)


def _finished(terms: tuple[Term, ...], found: Found) -> tuple[Array, ...]:
    tops = iter(found.tops)
    return tuple(
        safe_log(x) + next(tops) if term.kind == "log_sum_exp" else x
        for term, x in zip(terms, found.sums, strict=True)
    )


def _columns(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    return tuple(term for term in terms if term.columns)


def _stages(terms: tuple[Term, ...]) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Terms to find first, and those that need the first one's result."""
    below = tuple(term for term in terms if term.kind == "below")
    return tuple(term for term in terms if term.kind != "below"), below


# At once


def _at_once(terms: tuple[Term, ...], rows: Side, keys: Side, both: Both, axis_name: Axis) -> Out:
    """All logits of the rows of this device in one block, by plain differentiation."""
    split = axis_name is not None or is_sharded(rows.vectors, 0)
    first, second = _stages(tuple(t._replace(columns=t.columns and not split) for t in terms))
    whole = lambda side: None if side is None else unshard(side, 0)
    gather = lambda x: type(x)(*map(whole, gather_rows(axis_name, *x)))
    met = both[0], gather(both[1])
    z = _logits(rows, gather(keys))
    tops, key_tops = (_tops(first, z, met, axis) for axis in (1, 0))
    of_rows, of_keys = _sums(first, z, met, tops, key_tops, None)
    of_rows = _finished(first, Found(of_rows, tops))
    of_rows += _sums(second, z, met, (), (), of_rows[0])[0] if second else ()
    if split and _columns(terms):  # the keys' own block, rather than a sum over devices
        turned = tuple(term._replace(columns=False) for term in _columns(terms))
        return of_rows, _at_once(turned, keys, rows, (both[1], both[0]), axis_name)[0]
    return of_rows, _finished(_columns(first), Found(of_keys, key_tops))


# Piece by piece


def _by_pieces(plan: _Plan, rows: Side, keys: Side, both: Both) -> Out:
    if plan.axis_name is None and is_sharded(rows.vectors, 0):
        return _on_mesh(plan, rows, keys, both)
    first, second = _stages(plan.terms)
    count = keys.vectors.shape[0]
    keys, both = _filled(plan, keys, both)
    rows, keys, both = _alike(plan.axis_name, (rows, keys, both))
    out, key_out = pair_sums(plan._replace(terms=first), rows, keys, *both)
    of_rows, of_keys = _finished(first, out), _finished(_columns(first), key_out)
    of_keys = tuple(x[:count] for x in of_keys)
    if second:
        rows = rows._replace(level=of_rows[0])
        of_rows += pair_sums(plan._replace(terms=second), rows, keys, *both)[0].sums
    return of_rows, of_keys


def _on_mesh(plan: _Plan, rows: Side, keys: Side, both: Both) -> Out:
    """The same on each device of an Explicit mesh over which the rows are split."""
    sharding = jax.typeof(rows.vectors).sharding
    split = PartitionSpec(sharding.spec[0])
    own = plan._replace(axis_name=sharding.spec[0])
    put = lambda x: jax.sharding.reshard(x, NamedSharding(sharding.mesh, split))
    paired = both[0].number is not None
    local = partial(_by_pieces, own if paired else plan)
    keys_spec = split if paired else PartitionSpec()
    spread = (jax.tree.map(put, rows), jax.tree.map(put if paired else unshard, keys))
    specs = (split, keys_spec, (split, keys_spec))
    mapped = jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=(split, split))
    return mapped(*spread, jax.tree.map(put, both))


def _alike(axis_name: Axis, arrays: Any) -> Any:
    """The arrays, taken to vary over all mapped axes over which any does, and over `axis_name`."""
    never = _nothing(arrays) != 0
    never = never if axis_name is None else never | (jax.lax.axis_index(axis_name) < 0)
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), arrays)


def _filled(plan: _Plan, keys: Side, both: Both) -> tuple[Side, Both]:
    """The keys filled up with hidden ones to runs of one length."""
    count = keys.vectors.shape[0]
    more = -count % _width(plan, count)
    if not more:
        return keys, both
    rows, marks = both
    shown = jnp.ones(count, bool) if marks.shown is None else marks.shown
    fill = lambda x: jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))
    keys, marks = jax.tree.map(fill, (keys, marks._replace(shown=shown)))
    return keys, (rows, marks)


def _width(plan: _Plan, count: int) -> int:
    runs = max(-(-count // plan.size), 1)
    return max(-(-count // runs), 1)


def _over_keys(
    plan: _Plan,
    step: Callable[[Any, Any], tuple[Any, Any]],
    own: Any,
    guests: Any,
    merge: Callable[[Any, Any], Any],
    gifts: Any,
) -> tuple[Any, Any]:
    """`own, found = step(own, guests)` over all runs of keys of all devices.

    `guests` belong to the keys; what is found for them is merged into `gifts`, which travel along.
    """

    def over_runs(own: Any, guests: Any) -> tuple[Any, Any]:
        count = jax.tree.leaves(guests)[0].shape[0]
        width = _width(plan, count)
        if width >= count:
            return step(own, guests)
        cut = lambda x: x.reshape(count // width, width, *x.shape[1:])
        own, found = jax.lax.scan(step, own, jax.tree.map(cut, guests))
        return own, jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), found)

    if plan.axis_name is None:
        return over_runs(own, guests)
    devices = jax.lax.axis_size(plan.axis_name)
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    pass_on = partial(jax.lax.ppermute, axis_name=plan.axis_name, perm=ring)

    def hop(carry: Any, _: None) -> Any:
        own, guests, gifts = carry
        own, found = over_runs(own, guests)
        return (own, *jax.tree.map(pass_on, (guests, merge(gifts, found)))), None

    (own, _, gifts), _ = jax.lax.scan(hop, (own, guests, gifts), None, length=devices)
    return own, gifts


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _nothing(near: Any) -> Array:
    """A zero that varies over the mapped axes over which anything in `near` does."""
    first, *rest = (jnp.sum(x[..., None][..., :0]) for x in jax.tree.leaves(near))
    return sum((x.astype(first.dtype) for x in rest), first)


def _zeros(like: Any, *near: Any) -> Any:
    zero = _nothing(near)
    return jax.tree.map(lambda x: jnp.zeros_like(x) + zero.astype(x.dtype), like)


# Running maxima


def _rescaled(terms: tuple[Term, ...], found: Found, tops: tuple[Array, ...]) -> tuple[Array, ...]:
    """The sums with other maxima taken off."""
    pairs = zip(found.tops, tops, strict=True)
    return tuple(
        x * jnp.exp(jnp.subtract(*next(pairs))) if term.kind == "log_sum_exp" else x
        for term, x in zip(terms, found.sums, strict=True)
    )


def _merged(terms: tuple[Term, ...], a: Found, b: Found) -> Found:
    tops = tuple(map(jnp.maximum, a.tops, b.tops))
    return Found(_add(_rescaled(terms, a, tops), _rescaled(terms, b, tops)), tops)


def _start(terms: tuple[Term, ...], zero: Array) -> Found:
    tops = tuple(zero + LOWEST for term in terms if term.kind == "log_sum_exp")
    return Found((zero,) * len(terms), tops)


# Rules


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def pair_sums(
    plan: _Plan, rows: Side, keys: Side, row_marks: Marks, key_marks: Marks
) -> tuple[Found, Found]:
    """What is found for each row and, of terms with `columns`, for each key.

    The tops are free: whatever is taken off, the log-sum-exp is the same, so they have no
    derivative.
    """
    columns = _columns(plan.terms)

    def step(own: Found, guests: tuple[Side, Marks]) -> tuple[Found, Found]:
        keys, marks = guests
        z, both = _logits(rows, keys), (row_marks, marks)
        tops = tuple(map(jnp.maximum, own.tops, _tops(plan.terms, z, both, 1)))
        key_tops = _tops(plan.terms, z, both, 0)
        sums, key_sums = _sums(plan.terms, z, both, tops, key_tops, rows.level)
        sums = _add(sums, _rescaled(plan.terms, own, tops))
        return Found(sums, tops), Found(key_sums, key_tops)

    everything = rows, keys, row_marks, key_marks
    own = _start(plan.terms, _zeros(rows.vectors[:, 0], everything))
    gifts = _start(columns, _zeros(keys.vectors[:, 0], everything))
    return _over_keys(plan, step, own, (keys, key_marks), partial(_merged, columns), gifts)


def _pair_sums_jvp(plan: _Plan, primals: Any, tangents: Any) -> Any:
    rows, keys, row_marks, key_marks = primals
    out, key_out = pair_sums(plan, *primals)
    tops, key_tops = jax.lax.stop_gradient((out.tops, key_out.tops))
    guests = keys, key_marks, key_tops

    def sums(guest: Any, rows: Side, keys: Side) -> Out:
        both, z = (row_marks, guest[1]), _logits(rows, keys)
        return _sums(plan.terms, z, both, tops, guest[2], rows.level)

    def forward(dots: tuple[Side, Side]) -> Out:
        def step(moved: Any, guest: Any) -> tuple[Any, Any]:
            *guest, dot = guest
            points = rows, guest[0]
            found, key_found = jax.jvp(partial(sums, guest), points, (dots[0], dot))[1]
            return _add(moved, found), key_found

        start = _zeros((out.sums, key_out.sums), primals)
        return _over_keys(plan, step, start[0], (*guests, dots[1]), _add, start[1])

    def backward(cotangents: Out) -> tuple[Side, Side]:
        def step(slopes: Side, guest: Any) -> tuple[Side, Side]:
            *guest, pull = guest
            points = rows, guest[0]
            found, key_found = jax.vjp(partial(sums, guest), *points)[1]((cotangents[0], pull))
            return _add(slopes, found), key_found

        start = _zeros((rows, keys), primals)
        return _over_keys(plan, step, start[0], (*guests, cotangents[1]), _add, start[1])

    dots, key_dots = _linear(forward, backward, primals[:2], tangents[:2], (out.sums, key_out.sums))
    still = lambda tops: tuple(map(jnp.zeros_like, tops))
    moved = Found(dots, still(tops)), Found(key_dots, still(key_tops))
    return (out, key_out), moved


pair_sums.defjvp(_pair_sums_jvp)


def _linear(forward: Any, backward: Any, fixed: Any, x: Any, like: Any) -> Any:
    """`forward(x)`, a linear map whose transpose is `backward` rather than what jax would derive.

    jax would keep the keys of every stop of the ring. As the lower half of the solution of a
    triangular system, `[[1, 0], [-forward, 1]] (x, y) = (x, 0)`, the map can bring its transpose.
    The map depends on `fixed`.
    """
    # jax asks that each part of the right side, and each row of the system, depends on something
    # if any of them does: so they do, to no effect.
    right = _depending(x, (x, jax.tree.map(jnp.zeros_like, like)))
    one = _depending(fixed, jnp.ones((), jax.tree.leaves(like)[0].dtype))
    times_one = partial(jax.tree.map, lambda leaf: one * leaf)
    subtract = partial(jax.tree.map, jnp.subtract)
    return jax.lax.custom_linear_solve(
        lambda v: (times_one(v[0]), subtract(times_one(v[1]), forward(v[0]))),
        right,
        lambda _, v: (v[0], _add(v[1], forward(v[0]))),
        lambda _, v: (_add(v[0], backward(v[1])), v[1]),
    )[1]


def _depending(on: Any, what: Any) -> Any:
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(on))
    return jax.tree.map(lambda x: jnp.where(jnp.zeros(x.shape, bool), total, x), what)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(
    plan: _Plan, weight: Array, rows: Side, keys: Side, row_marks: Marks, key_marks: Marks
) -> Array:
    return jnp.sum(weight * pair_sums(plan, rows, keys, row_marks, key_marks)[0].sums[0])


def _total_jvp(plan: _Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    weight, rows, keys, row_marks, key_marks = primals

    def step(own: Any, guests: tuple[Side, Marks]) -> tuple[Any, Side]:
        def sums(rows: Side, keys: Side) -> tuple[Array, ...]:
            z, both = _logits(rows, keys), (row_marks, guests[1])
            return _sums(plan.terms, z, both, (), (), None)[0]

        (found,), pull = jax.vjp(sums, rows, guests[0])
        slopes, key_slopes = pull((weight,))
        return _add(own, (found, slopes)), key_slopes

    start = _zeros((weight, rows), primals)
    (sums, slopes), key_slopes = _over_keys(plan, step, start, (keys, key_marks), _add, None)
    dots = jax.tree.map(lambda a, b: jnp.sum(a * b), (sums, slopes, key_slopes), tangents[:3])
    return jnp.sum(weight * sums), sum(jax.tree.leaves(dots), jnp.zeros((), weight.dtype))


_total.defjvp(_total_jvp)
