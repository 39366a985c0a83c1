"""Pairs of items of unequal relevance: their units, and their sums without an array of pairs."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .labels import poison
from .lists import Lists, count_ahead, place_of, take_items
from .reduce import reduce
from .reductions import adds_up, of_sums
from .sorting import first_place, sort_keys
from .typing import Reduction, Values

RUN = 8  # partners of each item that are compared with it at once
DENSE_TO = 8  # items up to which all pairs of a list are compared at once
SORTED_FROM = 512  # items from which a hinge by sorting is faster than by comparing all pairs


class Pairs(NamedTuple):
    """Pairs of a more relevant item i and another one j, in any layout.

    Attributes:
        gap: `s_j - s_i`, by how much the wrong item is ahead; 0 where there is no pair.
        apart: `y_i - y_j`, above 0; 1 where there is no pair.
        kept: Where there is a pair.
        weight: What the pair counts, if that is asked for.
    """

    gap: Array
    apart: Array
    kept: Array
    weight: Array | None = None

    def sum(self, values: Array) -> Array:
        """The values of pairs, 0 elsewhere."""
        return jnp.where(self.kept, values, 0)


Cost = Callable[[Array, Array], Array]  # of (gap, apart), entry by entry
Fold = Callable[[Sequence[Pairs]], Array]  # the costs of some pairs of each item, added up
Items = tuple[Array, ...]


class Weigh(NamedTuple):
    """What a pair counts: a symmetric function of what is known of its two items, `[..., L]`."""

    items: Items
    of: Callable[[Items, Items], Array]

    def all(self) -> Array:
        """The weights of every two items, `[..., L, L]`."""
        over = lambda x, axis: jnp.broadcast_to(jnp.expand_dims(x, axis), (*x.shape, x.shape[-1]))
        first, second = (tuple(over(x, axis) for x in self.items) for axis in (-1, -2))
        return self.of(first, second)


def over_pairs(
    cost: Cost,
    scores: Array,
    relevance: Array,
    lists: Lists,
    *,
    weights: Values | None,
    reduction: Reduction,
    sums: Callable[[], tuple[Array, Array]] | None = None,
) -> Any:
    """Reduce the costs of all pairs, units `[..., L, L]` with the more relevant item first.

    Without weights, and for a reduction that needs only the sum and the number of units, `sums`
    says both for lists of more than `DENSE_TO` items; by default it goes through all pairs, a few
    at a time.
    """
    if weights is None and adds_up(reduction) and scores.shape[-1] > DENSE_TO:
        total, count = (sums or (lambda: summed(each(cost), scores, relevance, lists)))()
        return of_sums(total, count, reduction)
    pairs = all_pairs(scores, relevance, lists)
    values = cost(pairs.gap, pairs.apart)
    return reduce(values, where=pairs.kept, weights=weights, reduction=reduction)


def all_pairs(scores: Array, relevance: Array, lists: Lists) -> Pairs:
    """Every item with every other one of its list that is less relevant, `[..., L, L]`."""
    difference = lambda x: x[..., :, None] - x[..., None, :]
    apart = difference(relevance)
    # What is not a number would else be in no pair, and go unnoticed.
    kept = lists.pairs(scores) & ~(relevance[..., :, None] <= relevance[..., None, :])
    return Pairs(jnp.where(kept, -difference(scores), 0), jnp.where(kept, apart, 1), kept)


def each(cost: Cost) -> Fold:
    """The fold that adds up the costs of single pairs."""
    return lambda run: sum(pairs.sum(cost(pairs.gap, pairs.apart)) for pairs in run)  # pyright: ignore[reportReturnType]


def softplus(run: Sequence[Pairs]) -> Array:
    """The fold of `log(1 + exp(gap))`: an exponential for each pair, a logarithm for each run.

    The product of all `1 + x` is carried without its 1, so that what is far below 1 is not lost.
    """
    linear = excess = jnp.zeros_like(run[0].gap)
    for gap, _, kept, _ in run:
        positive = gap > 0
        linear += jnp.where(positive, gap, 0)
        x = jnp.where(kept, jnp.exp(jnp.where(positive, -gap, gap)), 0)
        excess += x * (1 + excess)
    return linear + jnp.log1p(excess)


def summed(fold: Fold, scores: Array, relevance: Array, lists: Lists) -> tuple[Array, Array]:
    """The sum over all pairs and their number, by `streamed`."""
    total, count = streamed(fold, scores, relevance, lists)
    return _sum(total), _sum(count)


def streamed(
    fold: Fold, scores: Array, relevance: Array, lists: Lists, weigh: Weigh | None = None
) -> tuple[Array, Array]:
    """The sum over pairs and their number, with memory for a few arrays `[..., L]`.

    Both `[..., L]`: each pair is counted at one of its two items.

    Items stand in a circle: with the next L / 2 of each, every two meet once, in whichever order
    their relevance says. All derivatives are those of the plain sum; each goes through the pairs
    again.
    """
    size = scores.shape[-1]
    run = min(RUN, max(size // 2, 1))
    runs = -(-(size // 2) // run)
    group = max(math.isqrt(runs), 1)  # sums of sums: rounding grows with their number
    place = place_of(scores)
    (hidden,) = lists.hide(relevance, fill=jnp.nan)  # compares with nothing
    groups = None if lists.segments is None else _twice(lists.segments)
    twice = _twice(hidden)
    items = () if weigh is None else weigh.items
    items_twice = tuple(map(_twice, items))

    def meet(scores: Array, around: Array, step: Array) -> Pairs:
        along = lambda x: jax.lax.dynamic_slice_in_dim(x, step, size, axis=-1)
        apart = hidden - along(twice)
        kept = (apart != 0) & (apart == apart)
        kept &= (2 * step < size) | ((2 * step == size) & (place < step))
        if groups is not None:
            kept &= lists.segments == along(groups)
        gap = along(around) - scores
        gap = jnp.where(kept, jnp.where(apart > 0, gap, -gap), 0)
        weight = weigh and weigh.of(items, tuple(map(along, items_twice)))
        return Pairs(gap, jnp.where(kept, jnp.abs(apart), 1), kept, weight)

    def part(scores: Array, around: Array, first: Array) -> tuple[Array, Array]:
        found = [meet(scores, around, first + i) for i in range(run)]
        count = sum(pairs.kept.astype(scores.dtype) for pairs in found)
        return fold(found), jnp.asarray(count)

    def add(sums: tuple[Array, Array], first: Array) -> Any:
        more = jax.checkpoint(part, prevent_cse=False)(scores, _twice(scores), first)
        return jax.tree.map(jnp.add, sums, more), None

    def add_up(sums: tuple[Array, Array], firsts: Array) -> Any:
        more, _ = jax.lax.scan(add, start, firsts)
        return jax.tree.map(jnp.add, sums, more), None

    nothing = ((scores != scores) & False).astype(scores.dtype)  # varies over devices as they do
    start = (nothing, nothing)
    firsts = 1 + run * jnp.arange(-(-runs // group) * group, dtype=jnp.int32)
    (total, count), _ = jax.lax.scan(add_up, start, firsts.reshape(-1, group))
    return poison(total, ~jnp.isnan(relevance)), jax.lax.stop_gradient(count)


def sorted_hinge(
    scores: Array, relevance: Array, lists: Lists, margin: Array
) -> tuple[Array, Array]:
    """The sum of `max(0, margin + gap)` over all pairs and their number, in O(L log L).

    The sum is linear in scores and margin as long as no pair comes to or leaves its kink: how many
    pairs each item is in, on either side, are its coefficients.
    """
    fixed, least = jax.lax.stop_gradient((scores, margin))
    order = lists.order(fixed)
    spans = lists.spans(order)
    (ordered,) = take_items(order, fixed)
    counts = _counts(fixed, ordered, order, relevance, least, spans)
    worse, better, first, second = lists.hide(*counts)
    (middle,) = take_items((spans[0] + spans[1]) // 2, ordered)  # digits of the gaps, not of scores
    scores = scores - jnp.where(jnp.isfinite(middle), middle, 0)
    slope = (better - worse).astype(scores.dtype)
    idle = ((slope == 0) & jnp.isinf(scores)) | (first + second == 0)
    real = lambda x: _sum(x.astype(scores.dtype))
    total = margin * real(worse) + _sum(slope * jnp.where(idle, 0, scores))
    return poison(total, ~jnp.any(jnp.isnan(relevance))), real(first)


def _counts(
    scores: Array,
    ordered: Array,
    order: Array,
    relevance: Array,
    margin: Array,
    spans: tuple[Array, Array],
) -> tuple[Array, ...]:
    """In how many pairs with `s_j > s_i - margin` each item is i, and j, and in how many at all.

    A wavelet matrix: with the levels of relevance in the order of the scores, each bit of a level,
    the highest first, divides every part of the order in two, and the levels of two items part at
    exactly one bit. There an item with bit 1 counts the zeros ahead of its threshold, and one with
    bit 0 the ones whose threshold is behind it. One pass over the items for each bit.
    """
    begin, end = spans
    threshold = scores - margin
    reach = begin + count_ahead(ordered, begin, end, lambda seen: seen > threshold)
    safe = begin + count_ahead(ordered - margin, begin, end, lambda seen: seen >= scores)
    level = _levels(relevance)
    place, size = place_of(scores), jnp.asarray(scores.shape[-1], jnp.int32)

    def divide(state: Any) -> Any:
        bit, levels, places, counts = state
        ones = (levels >> bit) & 1
        before = jnp.cumsum(ones, axis=-1)
        zeros = [x - jnp.where(x > 0, take_items(x - 1, before)[0], 0) for x in places]
        high = ((level >> bit) & 1) == 1
        zeros_in = lambda a, b: jnp.where(high, zeros[b] - zeros[a], 0)
        ones_in = lambda a, b: jnp.where(high, 0, places[b] - places[a] - zeros[b] + zeros[a])
        more = (zeros_in(0, 2), ones_in(3, 1), zeros_in(0, 1), ones_in(0, 1))
        behind = size - before[..., -1:]
        places = [
            jnp.where(high, behind + x - zero, zero) for x, zero in zip(places, zeros, strict=True)
        ]
        keys = (ones.astype(jnp.uint32) << 31) | place.astype(jnp.uint32)
        stable = (jnp.sort(keys, axis=-1) & jnp.uint32(2**31 - 1)).astype(jnp.int32)
        (levels,) = take_items(stable, levels)
        return bit - 1, levels, places, [a + b for a, b in zip(counts, more, strict=True)]

    highest = 31 - jax.lax.clz(jnp.max(level, initial=0))
    (levels,) = take_items(order, level)
    state = (highest, levels, [begin, end, reach, safe], [begin & 0] * 4)
    return tuple(jax.lax.while_loop(lambda state: state[0] >= 0, divide, state)[-1])


def _levels(values: Array) -> Array:
    """Which of the distinct values of its row each one is, int32, 0 the lowest."""
    keys = sort_keys(values)
    ordered = jnp.sort(keys, axis=-1)
    new = jnp.concatenate(
        [jnp.zeros_like(ordered[..., :1], bool), ordered[..., 1:] != ordered[..., :-1]], axis=-1
    )
    return take_items(first_place(ordered, keys), jnp.cumsum(new.astype(jnp.int32), axis=-1))[0]


def _twice(x: Array) -> Array:
    return jnp.concatenate([x, x], axis=-1)


def _sum(x: Array) -> Array:
    """The sum of all, list by list: more exact than one after the other."""
    return jnp.sum(jnp.sum(x, axis=-1))
