"""Ranking lists, padded or packed: who is compared with whom, ranks, gains, and sums over a list.

A loss calls `prepare_lists` and then works with items `[..., L]` and with what its `Lists` say.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .checks import (
    check_float,
    check_integer,
    check_min_rank,
    check_same_shape,
    check_where,
    message,
    require,
)
from .labels import poison, valid
from .numerics import safe_log, widen
from .reduce import mask
from .sorting import sort_keys
from .typing import Where


class Lists(NamedTuple):
    """Which items share a list: each row `[..., L]` is one, or `segments` packs several into it.

    What is said of each list has the shape `[...]`, of packed lists `[..., num_segments]`; below
    this is `*lists`. Made by `lists_of` or `prepare_lists`.

    Attributes:
        where: True for real items, `[..., L]`; None if all are.
        segments: Which list of its row an item belongs to, `[..., L]`, int32; None if rows are
            lists. A list need not stand side by side.
        num_segments: How many lists a row has room for; None for pairs, which need no number.
    """

    where: Array | None
    segments: Array | None = None
    num_segments: int | None = None

    def units(self) -> Array | None:
        """Which lists have a real item, bool `*lists`, for the `where` of `reduce`; None is all."""
        if self.segments is None:
            return None if self.where is None else jnp.any(self.where, axis=-1)
        return jnp.any(self._members(), axis=-1)

    def hide(self, *arrays: Array, fill: float = 0) -> tuple[Array, ...]:
        """The arrays with `fill` in place of items that are not real."""
        return mask(self.where, *arrays, fill=fill)

    def sum(self, values: Array) -> Array:
        """Sum over the real items of each list, `[..., L] -> *lists`; 0 for none."""
        if self.segments is None:
            return jnp.sum(*self.hide(values), axis=-1)
        return jnp.sum(jnp.where(self._members(), values[..., None, :], 0), axis=-1)

    def sizes(self, like: Array) -> Array:
        """How many real items each list has, `*lists`, in the shape and dtype of `like`'s rows."""
        return self.sum(jnp.ones_like(like))

    def max(self, values: Array, initial: float = -math.inf) -> Array:
        """Largest value of the real items of each list, `*lists`; `initial` for none."""
        start = jnp.asarray(initial, values.dtype)
        if self.segments is not None:
            values = jnp.where(self._members(), values[..., None, :], start)
        elif self.where is not None:
            values = jnp.where(self.where, values, start)
        return jnp.max(values, axis=-1, initial=initial)

    def spread(self, per_list: Array) -> Array:
        """What is said of each list, at its items: `*lists -> [..., L]`, or `[..., 1]` for rows."""
        if self.segments is None:
            return per_list[..., None]
        return jnp.take_along_axis(per_list, self.segments, axis=-1, mode="clip")

    def log_sum_exp(self, values: Array) -> Array:
        """Log-sum-exp over the real items of each list; -inf with zero gradient for none."""
        largest = self.max(jax.lax.stop_gradient(values))
        largest = jnp.where(jnp.isfinite(largest), largest, 0)
        (values,) = self.hide(values - self.spread(largest))
        return safe_log(self.sum(jnp.exp(values))) + largest

    def neg_log_softmax(self, scores: Array) -> Array:
        """-log p of each item in the softmax of its list, with every digit; 0 for hidden items.

        The best item is left out of the sum of exponentials, which log1p then completes: neither
        value nor gradient cancels where its p is almost 1.
        """
        (scores,) = self.hide(scores)
        return _neg_log_softmax(self.num_segments, scores, self.where, self.segments)

    def pairs(self, like: Array) -> Array:
        """Which two items, i along the last axis but one, are real and of one list, `[..., L, L]`.

        An item pairs with itself too. `like` is any array `[..., L]`.
        """
        real = jnp.ones_like(like, bool) if self.where is None else self.where
        together = real[..., :, None] & real[..., None, :]
        if self.segments is None:
            return together
        return together & (self.segments[..., :, None] == self.segments[..., None, :])

    def order(self, values: Array, key: Array | None = None) -> Array:
        """Indices `[..., L]` that put the items list by list, the largest value first.

        Equal values keep their order, or with a `key` get a random one; what is hidden comes last.
        """
        keys = [~sort_keys(jax.lax.stop_gradient(values))]
        last = jnp.asarray(jnp.iinfo(keys[0].dtype).max, keys[0].dtype)
        if self.where is not None:
            keys[0] = jnp.where(self.where, keys[0], last)
        if self.segments is not None:
            keys.insert(0, self._groups())
        if key is not None:
            keys.append(_zeros(values, jnp.uint32) | jax.random.bits(key, values.shape, jnp.uint32))
        operands, axis = (*keys, place_of(values)), values.ndim - 1
        return jax.lax.sort(operands, dimension=axis, num_keys=len(keys))[-1]

    def take(self, order: Array) -> "Lists":
        """The same lists after `take_items(order, ...)`."""
        where, segments = (
            None if x is None else take_items(order, x)[0] for x in (self.where, self.segments)
        )
        return Lists(where, segments, self.num_segments)

    def places(self, like: Array) -> Array:
        """1, 2, ... along each list, int32 `[..., L]`, of lists in an order made by `order`."""
        place = place_of(like)
        if self.segments is None or not like.shape[-1]:
            return place + 1
        groups = self._groups()
        new = jnp.concatenate(
            [jnp.ones_like(groups[..., :1], bool), groups[..., 1:] != groups[..., :-1]], axis=-1
        )
        return place + 1 - jax.lax.cummax(jnp.where(new, place, 0), axis=like.ndim - 1)

    def spans(self, order: Array) -> tuple[Array, Array]:
        """Where the list of each item begins and ends in an order made by `order`, `[..., L]`.

        The list takes the places `begin <= place < end`; what is hidden lies behind all lists.
        """
        place = place_of(order)
        if self.segments is None:
            real = jnp.ones_like(place) if self.where is None else self.where.astype(jnp.int32)
            return 0 * place, 0 * place + jnp.sum(real, axis=-1, keepdims=True, dtype=jnp.int32)
        groups = self._groups()
        (ordered,) = take_items(order, groups)
        everything = (0 * place, 0 * place + order.shape[-1])
        begin = count_ahead(ordered, *everything, lambda seen: seen < groups)
        return begin, count_ahead(ordered, *everything, lambda seen: seen <= groups)

    def ranks(self, values: Array, key: Array | None = None) -> Array:
        """Rank of each item in its list by decreasing value, int32 `[..., L]`, 1 the best.

        Equal values rank by position, or with a `key` at random. Ranks of hidden items mean
        nothing.
        """
        order = self.order(values, key)
        places = self.take(order).places(values)
        return jax.lax.sort((order, places), dimension=values.ndim - 1, num_keys=1)[1]

    def _members(self) -> Array:
        """Which items are real and of which list, `[..., num_segments, L]`."""
        assert self.segments is not None
        assert self.num_segments is not None
        names = jnp.arange(self.num_segments, dtype=self.segments.dtype)[:, None]
        names = names.reshape((1,) * (self.segments.ndim - 1) + names.shape)
        member = self.segments[..., None, :] == names
        return member if self.where is None else member & self.where[..., None, :]

    def _groups(self) -> Array:
        """The list of each item, and a last one of what is hidden."""
        assert self.segments is not None
        last = jnp.iinfo(self.segments.dtype).max
        return self.segments if self.where is None else jnp.where(self.where, self.segments, last)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _neg_log_softmax(
    num_segments: int | None, scores: Array, where: Array | None, segments: Array | None
) -> Array:
    lists = Lists(where, segments, num_segments)
    _, below, _, rest = _around_best(scores, lists)
    return lists.hide(lists.spread(jnp.log1p(rest)) - below)[0]


def _around_best(scores: Array, lists: Lists) -> tuple[Array, Array, Array, Array]:
    """The best item of each list, what all are below it, their exponentials and the sum of these.

    The exponential of the best item itself is taken as 0.
    """
    place = place_of(scores).astype(scores.dtype)
    fixed = jax.lax.stop_gradient(scores)
    best = fixed == lists.spread(lists.max(fixed))
    first = lists.max(jnp.where(best, -place, -jnp.inf))
    top = place == -lists.spread(first)
    below = scores - lists.spread(lists.sum(jnp.where(top, scores, 0)))
    below = jnp.where(top, 0, below)
    powers = jnp.where(top, 0, jnp.exp(below))
    return top, below, powers, lists.sum(powers)


@_neg_log_softmax.defjvp
def _neg_log_softmax_jvp(num_segments: int | None, primals: Any, tangents: Any) -> Any:
    # Slopes as written down, not as autodiff of the above has them: there the slope of the best
    # item is minus the sum of all others, with the rounding errors of as many numbers.
    (scores, where, segments), (moved, *_) = primals, tangents
    lists = Lists(where, segments, num_segments)
    top, _, powers, rest = _around_best(scores, lists)
    out = _neg_log_softmax(num_segments, scores, where, segments)
    others = lists.spread(lists.sum(powers * moved) / (1 + rest))
    best = lists.spread(lists.sum(jnp.where(top, moved, 0)) / (1 + rest))
    missed = lists.spread(rest / (1 + rest))
    (out_dot,) = lists.hide(others + jnp.where(top, -missed * moved, best - moved))
    return out, out_dot


def prepare_lists(
    scores: Any,
    relevance: Any,
    where: Where | None,
    segments: Any = None,
    num_segments: int | None = None,
    *,
    counted: bool = True,
) -> tuple[Array, Array, Lists]:
    """Check, mask (with 0) and widen scores and relevance of lists, and say what the lists are.

    Relevance is data: it comes back without a gradient. A real item whose segment is not one of
    the `num_segments` turns all scores of its row into NaN, one whose relevance is NaN its own.

    Args:
        scores: Floats `[..., L]`.
        relevance: Numbers `[..., L]`.
        where: True for real items.
        segments: See `Lists`.
        num_segments: See `Lists`.
        counted: Whether units are lists, so that `segments` needs `num_segments`.
    """
    check_float(scores=scores)
    check_min_rank(1, scores=scores)
    check_same_shape(scores=scores, relevance=relevance)
    lists = lists_of(scores, where, segments, num_segments, counted=counted)
    scores, relevance = lists.hide(*widen(scores, jax.lax.stop_gradient(relevance)))
    scores = poison(named_scores(scores, lists), ~jnp.isnan(relevance))
    return scores, relevance, lists


def lists_of(
    scores: Any,
    where: Where | None,
    segments: Any = None,
    num_segments: int | None = None,
    *,
    counted: bool = True,
) -> Lists:
    """Check the mask and the segments that belong to `scores`, `[..., L]`.

    Pass masked and widened scores through `named_scores`; `prepare_lists` does both.
    """
    scores = jnp.asarray(scores)
    if where is not None:
        check_where(where)
        check_same_shape(scores=scores, where=where)
        where = jnp.asarray(where)
    elif not scores.shape[-1]:
        where = jnp.zeros_like(scores, bool)  # a list without items is no unit
    if num_segments is not None:
        if isinstance(num_segments, bool) or not isinstance(num_segments, (int, np.integer)):
            raise TypeError(message("num_segments", "an integer or None", repr(num_segments)))
        if num_segments < 1:
            raise ValueError(message("num_segments", "at least 1", num_segments))
        if segments is None:
            raise ValueError(message("num_segments", "None without segments", num_segments))
        num_segments = int(num_segments)
    if segments is None:
        return Lists(where)
    check_integer(segments=segments)
    check_same_shape(scores=scores, segments=segments)
    if counted and num_segments is None:
        raise ValueError(message("num_segments", "the number of lists in a row", None))
    (segments,) = mask(where, jnp.asarray(segments).astype(jnp.int32))
    lists = Lists(where, segments, num_segments)
    if num_segments is not None:
        require(
            lambda: valid(segments, num_segments),
            "segments",
            f"values in [0, {num_segments})",
            where,
        )
    return lists


def named_scores(scores: Array, lists: Lists) -> Array:
    """The scores, all NaN in a row with an item of no list."""
    if lists.segments is None or lists.num_segments is None:
        return scores
    good = jnp.all(valid(lists.segments, lists.num_segments), axis=-1, keepdims=True)
    return poison(scores, good)


def take_items(order: Array, *arrays: Array) -> tuple[Array, ...]:
    """The items of each array `[..., L]` in this order, with gradient."""
    return tuple(jnp.take_along_axis(x, order, axis=-1, mode="clip") for x in arrays)


def count_ahead(ordered: Array, begin: Array, end: Array, ahead: Callable[[Array], Array]) -> Array:
    """How many of `ordered[begin:end]` are `ahead`, int32 `[..., L]`; those must come first.

    By bisection: every item asks for its own part of its row. `ahead` tells it of the values
    `[..., L]` that the items look at.
    """
    size = ordered.shape[-1]
    bits = size.bit_length()

    def halve(i: Array, found: Array) -> Array:
        more = found + (1 << (bits - 1 - i))
        (seen,) = take_items(jnp.minimum(begin + more, size) - 1, ordered)
        return jnp.where((begin + more <= end) & ahead(seen), more, found)

    return jax.lax.fori_loop(0, bits, halve, begin & 0)


def gains(relevance: Array, gain: Callable[[Array], Array] | None = None) -> Array:
    """`2^y - 1` of relevance, or what `gain` makes of it; exact for whole numbers."""
    if gain is not None:
        return gain(relevance)
    whole = jnp.round(relevance)
    power = jnp.ldexp(jnp.ones_like(relevance), whole.astype(jnp.int32))
    return power * jnp.expm1((relevance - whole) * math.log(2)) + (power - 1)


def discounts(
    ranks: Array,
    like: Array,
    discount: Callable[[Array], Array] | None = None,
    top_n: int | None = None,
) -> Array:
    """`1 / log2(1 + rank)`, or what `discount` makes of ranks from 1; 0 below the first `top_n`.

    Ranks may be integers; the result has the dtype of `like`.
    """
    real = ranks.astype(like.dtype)
    found = math.log(2) / jnp.log1p(real) if discount is None else discount(real)
    return found if top_n is None else jnp.where(real <= top_n, found, 0)


def dcg(
    gains: Array,
    ranks: Array,
    lists: Lists,
    *,
    discount: Callable[[Array], Array] | None = None,
    top_n: int | None = None,
) -> Array:
    """Discounted cumulative gain of each list, `*lists`, from gains and ranks of its items."""
    return lists.sum(gains * discounts(ranks, gains, discount, top_n))


def ideal_dcg(
    gains: Array,
    lists: Lists,
    *,
    discount: Callable[[Array], Array] | None = None,
    top_n: int | None = None,
) -> Array:
    """The DCG of each list, `*lists`, with its items by decreasing gain; one sort."""
    order = lists.order(gains)
    ordered = lists.take(order)
    (gains,) = take_items(order, *lists.hide(gains))
    return dcg(gains, ordered.places(gains), ordered, discount=discount, top_n=top_n)


def check_top_n(top_n: Any) -> None:
    """`top_n` is None or a count of at least one."""
    if top_n is None:
        return
    if isinstance(top_n, bool) or not isinstance(top_n, (int, np.integer)):
        raise TypeError(message("top_n", "an integer or None", repr(top_n)))
    if top_n < 1:
        raise ValueError(message("top_n", "at least 1", top_n))


def _zeros(like: Array, dtype: Any) -> Array:
    """Zeros sharded as `like` is: an Explicit mesh sorts nothing else beside it."""
    return jnp.zeros_like(like, dtype)


def place_of(like: Array) -> Array:
    """0, 1, ... along the last axis, int32 and sharded as `like` is."""
    return _zeros(like, jnp.int32) + jax.lax.broadcasted_iota(jnp.int32, like.shape, like.ndim - 1)
