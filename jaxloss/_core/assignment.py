"""The cheapest one-to-one assignment of rows to columns, with padding and costs of any kind."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .numerics import absolute

UNMATCHED = -1


def match_columns(cost: Array, exists: Array | None = None) -> Array:
    """For every existing column its row in the cheapest matching of `(n, m)`, else `UNMATCHED`."""
    n, m = cost.shape
    if not n * m:
        return jnp.full(m, UNMATCHED, jnp.int32)
    if exists is None:
        exists = (cost[0] < jnp.inf) | True  # mapped and sharded as the costs are
    cost, dear = finite_costs(cost, exists)
    rows = jnp.concatenate([cost.T, jnp.broadcast_to(dear, (m, max(m - n, 0)))], axis=1)
    hit = _shortest_paths(rows, exists)[None, :n] == indices(m)[:, None]  # (m, n)
    return jnp.where(jnp.any(hit, axis=1), argmax(hit, axis=1), UNMATCHED)


def finite_costs(cost: Array, exists: Array) -> tuple[Array, Array]:
    """Costs `(n, m)` whose hidden, NaN and infinite entries are dearer than any detour; the price.

    It is no larger than that has to be: float32 has 24 bits.
    """
    known = exists[None] & jnp.isfinite(cost)
    high = jnp.max(jnp.where(known, cost, -jnp.inf), initial=-jnp.inf)
    low = jnp.min(jnp.where(known, cost, jnp.inf), initial=jnp.inf)
    gap = (cost.shape[1] + 1) * (high - low)
    gap = jnp.where(high > low, gap, jnp.maximum(absolute(high), 1))
    dear = jnp.where(high >= low, high + gap, 1)
    return jnp.where(known, cost, dear), dear


def _shortest_paths(rows: Array, exists: Array) -> Array:
    """The row that owns each column in the cheapest matching of all existing rows.

    Rows come one by one. Each grows the tree of cheapest detours over owned columns (Dijkstra, with
    prices that keep all lengths at least 0) until it meets a free one, then owners move along it.
    """
    m, n = rows.shape
    columns = indices(n)
    none = -(rows[0] < jnp.inf).astype(jnp.int32)  # -1, mapped and sharded as the costs are

    def enter(state: Any, entry: Any) -> Any:
        price, owner = state
        target, row, kept = entry
        target = target + none[0] + 1

        def grow(tree: Any) -> Any:
            column, row, offset, length, before, seen, _ = tree
            through = offset + row - price
            shorter = ~seen & (through < length)
            length = jnp.where(shorter, through, length)
            before = jnp.where(shorter, column, before)
            column = argmax(jnp.where(seen, -jnp.inf, -length), axis=0)
            seen |= columns == column
            row = rows[owner[column]]
            offset = length[column] - (row[column] - price[column])
            return column, row, offset, length, before, seen, owner[column] < 0

        def move(path: Any) -> Any:
            column, owner = path
            source = before[column]
            heir = jnp.where(source < 0, target, owner[source])
            return source, jnp.where(columns == column, heir, owner)

        begin = none[0], row, 0 * row[0], jnp.inf - 0 * row, none, none >= 0, ~kept
        end, _, _, length, before, seen, _ = jax.lax.while_loop(lambda t: ~t[-1], grow, begin)
        price = jnp.where(seen, price + length - length[end], price)
        path = jnp.where(kept, end, -1), owner
        return (price, jax.lax.while_loop(lambda p: p[0] >= 0, move, path)[1]), None

    return jax.lax.scan(enter, (0 * rows[0], none), (indices(m), rows, exists))[0][1]


def indices(n: int) -> Array:
    """0 to n - 1, int32 in any mode."""
    return jnp.arange(n, dtype=jnp.int32)


def argmax(x: Array, axis: int) -> Array:
    """The first of the largest, int32 in any mode."""
    return jax.lax.argmax(x, axis, jnp.int32)
