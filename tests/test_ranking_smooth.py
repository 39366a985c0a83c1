"""Smooth ranking metrics: their limits, soft ranks without pairs, soft permutations."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from list_oracle import check_packed_like_padded, dcg, ndcg

from jaxloss.losses.ranking_smooth import (
    approx_mrr_loss,
    approx_ndcg_loss,
    neural_ndcg_loss,
    neural_sort,
)

LOSSES = dict(
    ndcg=partial(approx_ndcg_loss, temperature=0.6, top_n=2),
    mrr=partial(approx_mrr_loss, temperature=0.6),
    neural=partial(neural_ndcg_loss, temperature=0.6, sinkhorn_iterations=7),
)


SMOOTH = (approx_ndcg_loss, neural_ndcg_loss)


def draw(lists: int, items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    return g.standard_normal((lists, items)).astype(np.float32), g.integers(0, 5, (lists, items))


@cache
def step(name: str) -> Callable[..., Any]:
    """Units, and value and gradient of their mean."""
    loss = LOSSES[name]
    return jax.jit(lambda s, y: (loss(s, y, reduction="none"), jax.value_and_grad(loss)(s, y)))


@pytest.mark.parametrize("name", LOSSES)
def test_packed_lists_are_the_padded_ones(name: str) -> None:
    check_packed_like_padded(LOSSES[name])


def first_relevant(scores: np.ndarray, relevance: np.ndarray) -> float:
    return 1 / (1 + np.argmax(relevance[np.argsort(-scores)] > 0))


def test_as_the_temperature_falls_the_metrics_become_exact_and_hidden_items_outrank_nobody() -> (
    None
):
    scores, relevance = draw(4, 7)
    shown = np.random.default_rng(1).random((4, 7)) < 0.7
    relevance[np.arange(4), np.argmax(shown, axis=1)] = 3
    poisoned = np.where(shown, scores, 1e9)
    losses: list[tuple[Any, Any]] = [(approx_mrr_loss, first_relevant)]
    for top_n in (None, 2, 5):
        exact = partial(ndcg, top_n=top_n)
        losses += [(partial(f, top_n=top_n), exact) for f in SMOOTH]
    for loss, exact in losses:
        units = loss(poisoned, relevance, temperature=1e-4, where=shown, reduction="none")
        expected = [-exact(s[w], y[w]) for s, y, w in zip(scores, relevance, shown, strict=True)]
        np.testing.assert_allclose(units, expected, rtol=1e-6)


def test_equal_scores_have_the_rank_in_between() -> None:
    scores, relevance = np.float32([2, 1, 1, 9, 9, 9, 9]), np.array([0, 1, 0, 1, 1, 1, 1])
    row = partial(np.tile, reps=(4, 1))
    for loss, expected in (
        (approx_mrr_loss, 1 / 2.5),
        (partial(approx_ndcg_loss, top_n=None), 1 / np.log2(3.5)),
        # half of ranks 2 and 3 each
        (partial(neural_ndcg_loss, top_n=None), (1 / np.log2(3) + 1 / 2) / 2),
    ):
        options = dict(temperature=1e-3, where=row(np.arange(7) < 3), reduction="none")
        units = loss(row(scores), row(relevance), **options)
        np.testing.assert_allclose(units, -expected, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_without_a_relevant_item_is_no_unit(name: str) -> None:
    scores, relevance = draw(4, 7)
    relevance = relevance.astype(np.float32)
    relevance[1::2] = 0
    _, (value, gradient) = step(name)(scores, relevance)
    twice = np.array([0, 0, 2, 2])
    _, (expected, others) = step(name)(scores[twice], relevance[twice])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    others = np.asarray(others)
    np.testing.assert_allclose(gradient[::2], others[::2] + others[1::2], rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(gradient[1::2], 0)
    _, (nothing, zero) = step(name)(scores, 0 * relevance)
    assert nothing == 0
    np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_infinite_scores_are_first_and_last(name: str) -> None:
    scores = np.array([[np.inf, 0.3, -np.inf, -0.2, -np.inf, 0.1, 0.7]] * 4, np.float32)
    relevance = np.array([[0, 2, 1, 0, 3, 1, 0]] * 4, np.float32)
    _, (value, gradient) = step(name)(scores, relevance)
    _, (near, _) = step(name)(np.clip(scores, -1e4, 1e4), relevance)
    np.testing.assert_allclose(value, near, rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_relevance_that_is_no_number_makes_its_list_nan() -> None:
    scores, relevance = draw(4, 7)
    relevance = 1 + relevance.astype(np.float32)
    relevance[[0, 2], [6, 0]] = np.nan
    for name in LOSSES:
        units, _ = step(name)(scores, relevance)
        np.testing.assert_array_equal(np.isnan(units), [True, False, True, False])


@jax.jit
def plain(s, v, t, gains, together):
    """Value and both gradients at `s` and at `v`, and the second derivative along `v`, of -gain."""

    def loss(s, t):
        ahead = jax.nn.sigmoid((s[None, :] - s[:, None]) / t)
        ranks = 1 + jnp.sum(jnp.where(together & ~jnp.eye(len(s), dtype=bool), ahead, 0), -1)
        return -jnp.sum(gains / jnp.log2(1 + ranks))

    both = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), (0, None))(jnp.stack([s, v]), t)
    return *both, jax.jvp(lambda s: jax.grad(loss)(s, t), (s,), (v,))[1]


@pytest.mark.parametrize("segmented", [False, True], ids=["rows", "packed"])
def test_soft_ranks_without_pairs_have_the_derivatives_of_the_plain_formula(segmented) -> None:
    """Long rows, whose items are taken several at a time, and not a whole number of times."""
    size = 67
    scores, relevance = draw(1, size, 2)
    scores, v = 3 * scores[0].astype(float), np.random.default_rng(3).standard_normal(size)
    relevance, where = relevance[0], np.arange(size) % 9 != 4
    names = np.arange(size) % 2 if segmented else np.zeros(size, int)
    packed = dict(segments=names, num_segments=2) if segmented else {}
    together = where & where[:, None] & (names == names[:, None])
    gains = np.zeros(size)
    for name in np.unique(names):
        shown = where & (names == name)
        gains[shown] = 2.0 ** relevance[shown] - 1
        gains[shown] /= dcg(np.sort(gains[shown])[::-1])

    def ours(s, t):
        return approx_ndcg_loss(s, relevance, temperature=t, where=where, **packed, reduction="sum")

    @jax.jit
    def everything(s, v, t):
        return (
            ours(s, t),
            jax.jvp(ours, (s, t), (v, 1.0)),
            jax.jvp(jax.grad(ours), (s, t), (v, 0.0)),
            jax.grad(lambda s: jnp.vdot(jax.grad(ours)(s, t), v))(s),
            jax.vmap(jax.grad(ours, argnums=(0, 1)), (0, None))(jnp.stack([s, v]), t),
        )

    with jax.enable_x64(True):
        found = everything(scores, v, 0.8)
        (value, _), slopes, curved = jax.device_get(plain(scores, v, 0.8, gains, together))
    in_scores, in_temperature = slopes
    along = in_scores[0] @ v + in_temperature[0]
    expected = value, (value, along), (in_scores[0], curved), curved, slopes
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", [approx_ndcg_loss, approx_mrr_loss], ids=["ndcg", "mrr"])
def test_soft_ranks_never_hold_pairs_of_items(loss) -> None:
    row = jax.ShapeDtypeStruct((32, 1000), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss)).lower(row, row).compile()
    assert step.memory_analysis().temp_size_in_bytes < 16 * 32 * 1000 * 4


def test_as_many_as_there_are_at_the_top_are_all() -> None:
    scores, relevance = draw(4, 7)
    shown = np.arange(7) < np.array([[7], [5], [3], [2]])
    for loss in SMOOTH:
        options = dict(temperature=0.5, where=shown, reduction="none")
        whole, top = (loss(scores, relevance, top_n=n, **options) for n in (None, 7))
        np.testing.assert_allclose(top, whole, rtol=1e-6)
        top = loss(scores, relevance, top_n=5, **options)
        np.testing.assert_allclose(top[1:], whole[1:], rtol=1e-6)
        assert top[0] != whole[0]
    with pytest.raises(ValueError, match="approx_ndcg_loss: top_n: expected at least 1, got 0"):
        approx_ndcg_loss(scores, relevance, top_n=0)


def sort_by_hand(scores: np.ndarray, temperature: float) -> np.ndarray:
    s, n = scores.astype(float), len(scores)
    far = np.sum(np.abs(s[:, None] - s), axis=0)
    logits = ((n + 1 - 2 * np.arange(1, n + 1))[:, None] * s - far) / temperature
    powers = np.exp(logits - np.max(logits, axis=1, keepdims=True))
    return powers / np.sum(powers, axis=1, keepdims=True)


def test_neural_sort_is_its_formula_of_the_real_items() -> None:
    g = np.random.default_rng(4)
    scores = g.standard_normal((2, 3, 7)).astype(np.float32)
    scores[0, 0, :3] = 0.5  # ties
    shown = g.random((2, 3, 7)) < 0.7
    for scale in (1, 1e3):
        found = neural_sort(np.where(shown, scale * scores, np.nan), temperature=0.7, where=shown)
        assert found.shape == (2, 3, 7, 7)
        for i in np.ndindex(2, 3):
            count = np.sum(shown[i])
            expected = np.zeros((7, 7))
            expected[:count, shown[i]] = sort_by_hand(scale * scores[i][shown[i]], 0.7)
            np.testing.assert_allclose(found[i], expected, rtol=2e-4, atol=1e-6)
            np.testing.assert_allclose(np.sum(found[i], axis=1), np.arange(7) < count, rtol=1e-6)


def test_neural_sort_is_accurate_for_long_lists_of_large_scores() -> None:
    """The formula as it stands takes the difference of numbers near n max|s| there."""
    scores = (1e3 + np.random.default_rng(5).standard_normal(200)).astype(np.float32)
    found = neural_sort(scores, temperature=2.0)
    np.testing.assert_allclose(found, sort_by_hand(scores, 2.0), atol=2e-6)


def test_equal_scores_share_places_evenly_with_a_gradient_that_knows_no_position() -> None:
    @jax.jit
    def run(relevance):
        equal = jnp.zeros(4)
        loss = lambda s: neural_ndcg_loss(s, relevance, temperature=0.5)
        return neural_sort(equal), jax.grad(loss)(equal)

    relevance = np.float32([0, 1, 0, 2])
    (places, slope), (_, mirrored) = jax.device_get([run(relevance), run(relevance[::-1])])
    np.testing.assert_allclose(places, 0.25, rtol=1e-6)
    np.testing.assert_allclose(slope, mirrored[::-1], atol=1e-7)
    np.testing.assert_allclose(slope[0], slope[2], atol=1e-7)
    assert slope[3] < slope[1] < slope[0]


def neural_by_hand(scores, relevance, temperature, iterations, top_n=None) -> float:
    p, gains = sort_by_hand(scores, temperature), 2.0**relevance - 1
    for _ in range(iterations):
        p = p / np.sum(p, axis=0)
        p = p / np.sum(p, axis=1, keepdims=True)
    return dcg(p @ gains, top_n) / dcg(np.sort(gains)[::-1], top_n)


@pytest.mark.parametrize(("iterations", "top_n"), [(0, None), (4, None), (50, 2)])
def test_neural_ndcg_is_its_formula_after_a_fixed_number_of_scalings(iterations, top_n) -> None:
    scores, relevance = draw(4, 7, 6)
    relevance[:, 0] = 2
    shown = np.arange(7) < np.array([[7], [5], [4], [1]])
    units = neural_ndcg_loss(
        np.where(shown, scores, np.nan),
        np.where(shown, relevance, -9),
        temperature=0.8,
        sinkhorn_iterations=iterations,
        top_n=top_n,
        where=shown,
        reduction="none",
    )
    for i in range(4):
        s, y = scores[i][shown[i]], relevance[i][shown[i]]
        expected = neural_by_hand(s, y, 0.8, iterations, top_n)
        np.testing.assert_allclose(units[i], -expected, rtol=2e-6)


def test_fifty_scalings_have_the_gradient_of_differences_in_reverse_mode() -> None:
    scores, relevance = draw(1, 4, 8)
    relevance[0, 0] = 2
    by_hand = partial(neural_by_hand, relevance=relevance[0], temperature=0.8, iterations=50)
    step = 1e-6 * np.eye(4)
    slopes = [(by_hand(scores[0] + h) - by_hand(scores[0] - h)) / 2e-6 for h in step]
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(partial(neural_ndcg_loss, temperature=0.8)))(
            scores.astype(float), relevance
        )
    np.testing.assert_allclose(gradient[0], -np.array(slopes), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_without_items_is_no_unit(name: str) -> None:
    none, one = np.zeros((2, 0), np.float32), np.ones((2, 1), np.float32)
    run = jax.jit(lambda: (jax.value_and_grad(LOSSES[name])(none, none), LOSSES[name](one, one)))
    (value, gradient), alone = run()
    assert value == 0
    assert gradient.shape == (2, 0)
    np.testing.assert_allclose(alone, -1, rtol=1e-6)


def test_a_whole_number_of_scalings_is_asked_for() -> None:
    loss = partial(neural_ndcg_loss, jnp.zeros((1, 2)), jnp.ones((1, 2)))
    with pytest.raises(
        ValueError, match="neural_ndcg_loss: sinkhorn_iterations: expected at least"
    ):
        loss(sinkhorn_iterations=-1)
    for wrong in (2.5, True):
        with pytest.raises(TypeError, match="sinkhorn_iterations: expected an integer"):
            loss(sinkhorn_iterations=wrong)
