"""Recommendation losses: extreme scores, samplers, loops, and what becomes of masked negatives."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax

from jaxloss._core.checked import checked
from jaxloss.losses.contrastive import info_nce
from jaxloss.losses.recommendation import (
    adaptive_hinge_loss,
    bpr_loss,
    in_batch_log_q,
    linear_sampled_softmax_loss,
    sampled_softmax_loss,
    warp_loss,
)

N, K = 6, 5


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    positive, negative = g.standard_normal(N), g.standard_normal((N, K))
    return positive.astype(np.float32), negative.astype(np.float32)


def kept(seed: int = 1) -> np.ndarray:
    """Which negatives there are; the first row has none, the second all."""
    there = np.random.default_rng(seed).random((N, K)) < 0.6
    there[:2] = [[False] * K, [True] * K]
    return there


def with_pull(loss: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """Units, and the gradients of their sum, from one compiled call."""

    @jax.jit
    def run(*arrays: Any) -> Any:
        units, pull = jax.vjp(loss, *arrays)
        return units, pull(jnp.ones_like(units))

    return jax.device_get(run(*arrays))


def test_bpr_keeps_value_and_gradient_far_on_the_wrong_side() -> None:
    difference = np.array([-50, -1e4, 50, 0], np.float32)
    loss = lambda d: bpr_loss(d, jnp.zeros(4), reduction="none")
    value, (slope,) = with_pull(loss, difference)
    exact = np.log1p(np.exp(-difference.astype(float), where=difference > -700, out=np.ones(4)))
    exact[1] = 1e4
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    np.testing.assert_allclose(slope, [-1, -1, -math.exp(-50), -0.5], rtol=1e-6)
    eps = -np.log(1e-10 + expit(difference))  # what RecBole computes
    assert eps[0] < 24


def test_bpr_takes_several_negatives_for_each_positive_but_never_guesses() -> None:
    positive, negative = draw()
    several = np.asarray(bpr_loss(positive[:, None], negative, reduction="none"))
    for k in range(K):
        np.testing.assert_allclose(
            several[:, k], bpr_loss(positive, negative[:, k], reduction="none"), rtol=1e-7
        )
    with pytest.raises(ValueError, match="bpr_loss: negative_scores: expected shape"):
        bpr_loss(positive[:1], negative[0])
    with pytest.raises(ValueError, match="bpr_loss: negative_scores: expected shape"):
        bpr_loss(positive, negative)
    with pytest.raises(ValueError, match="bpr_loss: negative_scores: expected shape"):
        bpr_loss(positive[:, None], negative[:1])


def warp_by_loop(positive, negative, there, items: int, margin: float) -> np.ndarray:
    values = np.zeros(N)
    for n in range(N):
        for tried, score in enumerate(negative[n][there[n]].astype(float), 1):
            if score > positive[n] - margin:
                weight = math.log(max(1, (items - 1) // tried))
                values[n] = weight * (margin - positive[n] + score)
                break
    return values


@pytest.mark.parametrize("margin", [0.2, 2.0])
def test_warp_is_its_loop_in_which_missing_negatives_are_not_counted(margin: float) -> None:
    (positive, negative), there = draw(), kept()
    poisoned = np.where(there, negative, np.nan)
    loss = lambda p: warp_loss(
        p, poisoned, num_items=12, margin=margin, negative_where=there, reduction="none"
    )
    value, (gradient,) = with_pull(loss, positive)
    expected = warp_by_loop(positive, negative, there, 12, margin)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
    slope = np.where(expected > 0, expected / np.where(expected > 0, value, 1), 0)
    assert value[0] == 0
    assert np.all((gradient < 0) == (slope > 0))


def test_the_weight_of_warp_has_no_gradient_and_counts_large_catalogues_exactly() -> None:
    step = jax.jit(jax.value_and_grad(lambda p, n, items: warp_loss(p, n, num_items=items)))
    one = np.ones(1, np.float32)
    for items, tried in ((2**31 - 1, 1), (10**9 + 8, 7), (2, 1), (1, 1), (4, 3), (4, 4)):
        negative = np.where(np.arange(8) == tried - 1, 1, -9)[None].astype(np.float32)
        value, slope = step(one, negative, items)
        weight = math.log(max(1, (items - 1) // tried))
        np.testing.assert_allclose(value, weight, rtol=1e-7)
        np.testing.assert_allclose(slope, [-weight], rtol=1e-7)
    with pytest.raises(TypeError, match="warp_loss: num_items: expected an integer dtype"):
        warp_loss(one, negative, num_items=5.0)
    with pytest.raises(ValueError, match="warp_loss: num_items: expected at least 1"):
        checked(warp_loss)(one, negative, num_items=np.array(0))


def test_the_adaptive_hinge_takes_the_highest_negative_there_is() -> None:
    (positive, negative), there = draw(), kept()
    poisoned = np.where(there, negative, np.nan)
    loss = lambda p, n: adaptive_hinge_loss(
        p, n, margin=0.5, negative_where=there, reduction="none"
    )
    value, (_, of_negative) = with_pull(loss, positive, poisoned)
    highest = np.max(np.where(there, negative, -np.inf), axis=1)
    np.testing.assert_allclose(value, np.maximum(0, 0.5 + highest - positive), rtol=1e-6)
    np.testing.assert_array_equal(of_negative[0], 0)
    assert np.all(np.isfinite(of_negative))
    np.testing.assert_array_equal(np.sum(of_negative, axis=1), np.asarray(value) > 0)


@pytest.mark.parametrize("loss", ["adaptive_hinge_loss", "warp_loss", "sampled_softmax_loss"])
def test_a_score_that_is_no_number_makes_its_unit_nan(loss: str) -> None:
    functions = dict(
        adaptive_hinge_loss=adaptive_hinge_loss,
        warp_loss=lambda *a, **o: warp_loss(*a, num_items=9, **o),
        sampled_softmax_loss=sampled_softmax_loss,
    )
    positive, negative = draw()
    negative[2, 0] = np.nan
    values = functions[loss](positive, negative, reduction="none")
    np.testing.assert_array_equal(np.isnan(values), np.arange(N) == 2)


def test_all_other_items_as_sample_make_the_full_softmax() -> None:
    logits = 5 * np.random.default_rng(3).standard_normal((N, 9)).astype(np.float32)
    labels = np.arange(N) % 9
    others = np.array([[j for j in range(9) if j != y] for y in labels])

    def sampled(logits):
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return sampled_softmax_loss(own, jnp.take_along_axis(logits, others, axis=1))

    full = lambda z: -jnp.mean(jax.nn.log_softmax(z)[np.arange(N), labels])
    run = jax.jit(lambda z: [jax.value_and_grad(f)(z) for f in (sampled, full)])
    ours, theirs = run(logits)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-7)


def test_the_formula_of_tensorflow_with_accidental_hits() -> None:
    """Scores less log expected counts, hits at -1e37 or so, softmax cross-entropy of class 0."""
    positive, negative = draw(4)
    g = np.random.default_rng(5)
    own_q, shared_q = np.log(g.uniform(0.1, 2, N)), np.log(g.uniform(0.1, 2, K))
    hits = g.random((N, K)) < 0.3
    hits[1] = True
    z = np.concatenate([(positive - own_q)[:, None], negative - shared_q], axis=1)
    z[:, 1:][hits] -= 1e300
    expected = np.log(np.sum(np.exp(z), axis=1)) - z[:, 0]
    own_q, shared_q = own_q.astype(np.float32), shared_q.astype(np.float32)
    options = dict(positive_log_q=own_q, accidental_hits=hits, reduction="none")
    for log_q in (shared_q, np.broadcast_to(shared_q, (N, K))):
        value = sampled_softmax_loss(positive, negative, negative_log_q=log_q, **options)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert value[1] == 0


def test_when_every_negative_is_a_hit_nothing_is_learned_even_from_nan() -> None:
    positive, negative = draw()
    loss = lambda p, n: sampled_softmax_loss(p, n, accidental_hits=np.ones((N, K), bool))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, gradients = step(positive, np.nan * negative)
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_the_corrected_gradient_estimates_that_of_the_full_softmax() -> None:
    logits = np.float32([1.0, 0.5, -0.3, 2.0, 0.0])
    q = np.array([0.1, 0.4, 0.2, 0.2, 0.1], np.float32)
    draws = 40_000
    sample = np.random.default_rng(0).choice(5, draws, p=q / np.sum(q, dtype=float))

    def loss(z):  # item 0 is chosen; the sampler draws with replacement
        return sampled_softmax_loss(
            z[:1],
            z[sample][None],
            positive_log_q=np.zeros(1, np.float32),
            negative_log_q=np.log(draws * q)[sample],
            accidental_hits=(sample == 0)[None],
        )

    exact = softmax(logits) - np.eye(5)[0]
    # item 3, of probability 0.55 and drawn by 0.2, has the largest standard error, 0.0025
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(logits), exact, atol=0.01)


def test_info_nce_with_one_more_feature_is_the_corrected_two_tower_loss() -> None:
    g = np.random.default_rng(6)
    query, keys = (g.standard_normal((N, 4)).astype(np.float32) for _ in range(2))
    items, temperature = np.array([3, 1, 3, 0, 1, 3], np.int32), 0.4
    log_q = np.asarray(in_batch_log_q(items))
    np.testing.assert_allclose(log_q, np.log([3, 2, 3, 1, 2, 3]), rtol=1e-6)
    z = query @ keys.T / temperature - log_q
    expected = -np.diagonal(log_softmax(z, axis=1))
    others = np.array([[j for j in range(N) if j != i] for i in range(N)])
    wide = lambda x, last: np.concatenate([x, last[:, None]], axis=1)
    by_info_nce = info_nce(
        wide(query, np.full(N, temperature, np.float32)),
        wide(keys, -log_q),
        temperature=temperature,
        normalize=False,
        reduction="none",
    )
    s = query @ keys.T / temperature
    sampled = sampled_softmax_loss(
        np.diagonal(s),
        np.take_along_axis(s, others, axis=1),
        positive_log_q=log_q,
        negative_log_q=log_q[others],
        reduction="none",
    )
    for value in (by_info_nce, sampled):
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)


def test_counts_in_the_batch_leave_hidden_rows_out_and_span_devices() -> None:
    items = np.array([3, 1, 3, 0, 1, 3], np.int32)
    shown = np.array([True, True, False, False, True, True])
    expected = [np.log(2), np.log(2), np.log(2), -np.inf, np.log(2), np.log(2)]
    np.testing.assert_allclose(in_batch_log_q(items, where=shown), expected, rtol=1e-6)
    halves = jax.vmap(lambda i: in_batch_log_q(i, axis_name="data"), axis_name="data")
    found = np.asarray(jax.jit(halves)(items.reshape(2, 3)))
    np.testing.assert_array_equal(found.ravel(), in_batch_log_q(items))
    with pytest.raises(TypeError, match="in_batch_log_q: item_ids: expected an integer dtype"):
        in_batch_log_q(items.astype(np.float32))
    with pytest.raises(ValueError, match="in_batch_log_q: item_ids: expected one axis"):
        in_batch_log_q(items[None])


def linear_case() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    g = np.random.default_rng(7)
    query, table = g.standard_normal((N, 3)), g.standard_normal((9, 3))
    chosen, sampled = g.integers(0, 9, N, np.int32), g.integers(0, 9, K, np.int32)
    sampled[0] = chosen[2]
    return query.astype(np.float32), table.astype(np.float32), chosen, sampled


def test_the_linear_form_is_the_gathered_dense_one_without_accidental_hits() -> None:
    query, table, chosen, sampled = linear_case()
    own_q, log_q = np.full(N, 0.3, np.float32), np.linspace(-1, 1, K).astype(np.float32)
    options = dict(positive_log_q=own_q, negative_log_q=log_q, reduction="none")

    def dense(query, table):
        positive = jnp.sum(query * table[chosen], axis=1)
        hits = chosen[:, None] == sampled
        return sampled_softmax_loss(
            positive, query @ table[sampled].T, accidental_hits=hits, **options
        )

    linear = lambda q, t: linear_sampled_softmax_loss(q, t, chosen, sampled, **options)
    (ours, slopes), (theirs, expected) = (with_pull(f, query, table) for f in (linear, dense))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for a, b in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("bad", [-1, 9, 2**31 - 1])
def test_an_index_outside_the_table_makes_its_row_or_as_a_sample_all_rows_nan(bad: int) -> None:
    query, table, chosen, sampled = linear_case()
    worse = np.where(np.arange(N) == 1, np.int32(bad), chosen)
    values = linear_sampled_softmax_loss(query, table, worse, sampled, reduction="none")
    np.testing.assert_array_equal(np.isnan(values), np.arange(N) == 1)
    others = np.arange(N) != 1
    assert np.isfinite(linear_sampled_softmax_loss(query, table, worse, sampled, where=others))
    worse = np.where(np.arange(K) == 1, np.int32(bad), sampled)
    assert np.isnan(linear_sampled_softmax_loss(query, table, chosen, worse))
    with pytest.raises(ValueError, match=r"negative_index: expected values in \[0, 9\), got 1"):
        checked(linear_sampled_softmax_loss)(query, table, chosen, worse)


def test_only_the_rows_that_are_needed_are_read_from_the_table() -> None:
    n, k, items, features = 64, 32, 200_000, 16
    shape = jax.ShapeDtypeStruct
    arrays = (
        shape((n, features), jnp.bfloat16),
        shape((items, features), jnp.bfloat16),
        shape((n,), jnp.int32),
        shape((k,), jnp.int32),
    )
    floats = 4 * ((n + k) * features + n * k)
    forward = jax.jit(linear_sampled_softmax_loss).lower(*arrays).compile()
    assert forward.memory_analysis().temp_size_in_bytes < 6 * floats
    step = jax.jit(jax.grad(linear_sampled_softmax_loss, argnums=0)).lower(*arrays).compile()
    assert step.memory_analysis().temp_size_in_bytes < 8 * floats


def test_shapes_that_do_not_belong_together_raise() -> None:
    positive, negative = draw()
    with pytest.raises(ValueError, match="accidental_hits: expected shape"):
        sampled_softmax_loss(positive, negative, accidental_hits=np.ones(K, bool))
    with pytest.raises(ValueError, match="negative_log_q: expected shape"):
        sampled_softmax_loss(positive, negative, negative_log_q=np.zeros(N, np.float32))
    with pytest.raises(TypeError, match="negative_where: expected a bool array"):
        warp_loss(positive, negative, num_items=3, negative_where=np.ones((N, K)))
    with pytest.raises(ValueError, match="negative_scores: expected shape"):
        adaptive_hinge_loss(positive, negative[:1])
    with pytest.raises(ValueError, match="query: expected two axes"):
        linear_sampled_softmax_loss(positive, negative, np.zeros(N, int), np.zeros(K, int))
