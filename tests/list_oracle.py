"""Ranking lists for tests: packed rows beside the same lists padded, and metrics in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIZES = (5, 3, 1)


class Both(NamedTuple):
    """Lists packed into one row, mixed with one another and with padding, and one list a row."""

    scores: np.ndarray  # (L,)
    relevance: np.ndarray
    segments: np.ndarray
    where: np.ndarray
    rows: np.ndarray  # (lists, longest): index of each item in the packed row
    shown: np.ndarray

    def padded(self, packed: np.ndarray) -> np.ndarray:
        return np.asarray(packed)[self.rows]


def both(seed: int = 0, sizes: tuple[int, ...] = SIZES, padding: int = 2) -> Both:
    """The last segment name, `len(sizes)`, has no item."""
    g = np.random.default_rng(seed)
    names = np.repeat(np.arange(len(sizes) + 1), (*sizes, padding))
    names = names[g.permutation(len(names))]
    where = names < len(sizes)
    rows, shown = np.zeros((2, len(sizes), max(sizes)), int)
    for i, size in enumerate(sizes):
        rows[i, :size], shown[i, :size] = np.flatnonzero(names == i), 1
    scores = g.standard_normal(len(names)).astype(np.float32)
    relevance = g.integers(0, 4, len(names)).astype(np.float32)
    relevance[rows[:, 0]] = 1  # no list without
    segments = np.where(where, names, 77).astype(np.int32)
    return Both(np.where(where, scores, np.nan), relevance, segments, where, rows, shown == 1)


def dcg(gains: np.ndarray, top_n: int | None = None) -> float:
    """Of gains in the order of a ranking."""
    return float(np.sum((gains / np.log2(2 + np.arange(len(gains))))[:top_n]))


def ndcg(scores: np.ndarray, relevance: np.ndarray, top_n: int | None = None) -> float:
    """Of one list, equal scores in their order."""
    gains = 2.0**relevance - 1
    order = np.argsort(-scores, kind="stable")
    return dcg(gains[order], top_n) / dcg(np.sort(gains)[::-1], top_n)


def check_packed_like_padded(loss: Callable[..., Any]) -> None:
    """Values and gradients of packed lists are those of the same lists, one a row."""
    lists = both()

    @jax.jit
    def packed(scores):
        options = dict(segments=lists.segments, num_segments=len(SIZES) + 1, where=lists.where)
        units = lambda s: loss(s, lists.relevance, **options, reduction="none")
        mean = loss(scores, lists.relevance, **options)
        return mean, units(scores), jax.grad(lambda s: jnp.sum(units(s)))(scores)

    @jax.jit
    def padded(scores):
        relevance = lists.padded(lists.relevance)
        units = lambda s: loss(s, relevance, where=lists.shown, reduction="none")
        mean = loss(scores, relevance, where=lists.shown)
        return mean, units(scores), jax.grad(lambda s: jnp.sum(units(s)))(scores)

    mean, units, gradient = packed(lists.scores)
    expected = padded(lists.padded(lists.scores))
    np.testing.assert_allclose(mean, expected[0], rtol=1e-6)
    np.testing.assert_allclose(units[:-1], expected[1], rtol=1e-6)
    assert units[-1] == 0
    np.testing.assert_allclose(
        lists.padded(gradient)[lists.shown], expected[2][lists.shown], atol=1e-6
    )
    np.testing.assert_array_equal(gradient[~lists.where], 0)
