"""Losses of rankings: exact average precision, loops in float64, degenerate batches, chunks."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.metrics import average_precision_score

from jaxloss.losses.average_precision import (
    fast_ap_loss,
    histogram_loss,
    ranked_list_loss,
    smooth_ap_loss,
)

N, D = 9, 4
LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 1, 3], np.int32)  # 2 and 3 are alone
LOSSES = (smooth_ap_loss, fast_ap_loss, histogram_loss, ranked_list_loss)
PAIRED = np.isin(LABELS, (0, 1))


def draw(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, D))


def cosines(x: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit @ unit.T


def partners(a: int) -> tuple[list[int], list[int]]:
    others = [i for i in range(N) if i != a]
    near = [i for i in others if LABELS[i] == LABELS[a]]
    return near, [i for i in others if i not in near]


@pytest.mark.parametrize("seed", range(3))
def test_at_temperature_zero_the_smooth_loss_is_one_minus_the_average_precision(seed) -> None:
    scores = cosines(draw(seed))
    with jax.enable_x64(True):
        units = smooth_ap_loss(draw(seed), LABELS, temperature=1e-7, reduction="none")
    for a in range(N):
        exact = 1 - average_precision_score(LABELS[a] == LABELS, scores[a])
        np.testing.assert_allclose(units[a], exact if PAIRED[a] else 0, atol=1e-12)


def test_histogram_losses_are_their_sums_over_pairs() -> None:
    s, bins = cosines(draw()), 7
    share = lambda x, low, width: np.maximum(
        0, 1 - np.abs(x - low - width * np.arange(bins + 1)) / width
    )
    with jax.enable_x64(True):
        units = fast_ap_loss(draw(), LABELS, num_bins=bins, reduction="none")
        value = histogram_loss(draw(), LABELS, num_bins=bins)
    positive, negative, pairs = np.zeros(bins + 1), np.zeros(bins + 1), [0, 0]
    for a in range(N):
        near, far = partners(a)
        h, g = (
            sum((share(2 - 2 * s[a, i], 0, 4 / bins) for i in group), np.zeros(bins + 1))
            for group in (near, far)
        )
        both = np.cumsum(h + g)
        precision = np.cumsum(h) / np.where(both > 0, both, 1)
        expected = 1 - np.sum(h * precision) / len(near) if near else 0
        np.testing.assert_allclose(units[a], expected, atol=1e-13)
        positive += sum((share(s[a, i], -1, 2 / bins) for i in near), np.zeros(bins + 1))
        negative += sum((share(s[a, i], -1, 2 / bins) for i in far), np.zeros(bins + 1))
        pairs = [pairs[0] + len(near), pairs[1] + len(far)]
    expected = np.sum(negative / pairs[1] * np.cumsum(positive / pairs[0]))
    np.testing.assert_allclose(value, expected, rtol=1e-13)


def test_with_many_bins_the_histogram_loss_counts_negatives_more_alike_than_positives() -> None:
    s = cosines(draw(3))
    same = (LABELS[:, None] == LABELS) & ~np.eye(N, dtype=bool)
    worse = np.mean(s[LABELS[:, None] != LABELS][:, None] > s[same])
    # Not one pair of pairs in a hundred may stand differently, which takes a tie within a bin.
    np.testing.assert_allclose(
        histogram_loss(draw(3).astype(np.float32), LABELS, num_bins=20_000), worse, atol=0.01
    )


def test_the_ranked_list_loss_is_its_loop_and_counts_coincident_negatives() -> None:
    x, margin, alpha, t_p, t_n, share = draw(), 0.5, 1.3, 0.7, 4.0, 0.3
    x[6] = 2 * x[0]  # a negative of 0, 1, 2 and 3 at distance 0 of the first
    d = np.sqrt(np.maximum(2 - 2 * cosines(x), 0))
    d[0, 6] = d[6, 0] = 0
    options = dict(
        margin=margin,
        alpha=alpha,
        positive_temperature=t_p,
        negative_temperature=t_n,
        imbalance=share,
    )
    with jax.enable_x64(True):
        loss = lambda x: ranked_list_loss(x, LABELS, **options, reduction="none")
        units, pull = jax.vjp(loss, x)
        assert np.all(np.isfinite(pull(jnp.ones(N))[0]))
    mean = lambda values, t: (
        np.average(values, weights=np.exp(t * np.asarray(values))) if values else 0
    )
    for a in range(N):
        near, far = partners(a)
        pulled = [d[a, i] - (alpha - margin) for i in near if d[a, i] > alpha - margin]
        pushed = [alpha - d[a, i] for i in far if d[a, i] < alpha]
        expected = (1 - share) * mean(pulled, t_p) + share * mean(pushed, t_n)
        np.testing.assert_allclose(units[a], expected if near else 0, atol=1e-12)


def test_a_large_temperature_of_negatives_does_not_overflow() -> None:
    loss = lambda x: ranked_list_loss(x, LABELS, negative_temperature=1e4)
    value, gradient = jax.value_and_grad(loss)(draw().astype(np.float32))
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize(
    "labels", [np.zeros(N, np.int32), np.arange(N, dtype=np.int32)], ids=["one class", "no pair"]
)
def test_a_batch_without_negatives_or_without_positives_costs_no_ranking(labels) -> None:
    for loss in LOSSES:
        value, gradient = jax.value_and_grad(loss)(draw().astype(np.float32), labels)
        if loss is ranked_list_loss and not labels.any():
            assert value > 0  # the positives should be near all the same
        else:
            assert value == 0
            np.testing.assert_array_equal(gradient, 0)
        assert np.all(np.isfinite(gradient))


def test_equal_and_zero_rows_have_finite_gradients() -> None:
    x = draw().astype(np.float32)
    x[1], x[5], x[6], x[7] = x[0], 0, x[0], -x[0]
    for loss in LOSSES:
        value, gradient = jax.value_and_grad(loss)(x, LABELS)
        assert jnp.isfinite(value)
        assert jnp.all(jnp.isfinite(gradient))
        np.testing.assert_array_equal(gradient[5], 0)


def test_a_sample_that_is_no_number_makes_the_loss_nan() -> None:
    x = draw().astype(np.float32)
    x[8, 0] = np.nan
    for loss in LOSSES:
        assert jnp.isnan(loss(x, LABELS))
        assert jnp.isfinite(loss(x, LABELS, where=np.arange(N) != 8))


def test_chunks_of_queries_change_nothing_on_one_device_and_on_eight() -> None:
    x = np.random.default_rng(0).standard_normal((32, D)).astype(np.float32)
    labels = (np.arange(32) * 7 % 5).astype(np.int32)
    step = lambda **options: jax.jit(
        jax.value_and_grad(lambda x, y: smooth_ap_loss(x, y, temperature=0.1, **options))
    )
    expected = step()(x, labels)
    spec = PartitionSpec("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = [jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, labels)]
        explicit = step(chunk_size=8)(*put)
    for value, gradient in (step(chunk_size=5)(x, labels), explicit):
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        np.testing.assert_allclose(jax.device_get(gradient), expected[1], atol=1e-7)


def temporaries(loss: Any, batch: int, **options: Any) -> float:
    """MiB that value and gradient need beside the embeddings and their gradient."""
    x = jax.ShapeDtypeStruct((batch, 64), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda x, y: loss(x, y, **options)))
    return step.lower(x, labels).compile().memory_analysis().temp_size_in_bytes / 2**20


def test_no_ranking_needs_a_cube_of_floats() -> None:
    matrix, cube = 512**2 * 4 / 2**20, 512**3 * 4 / 2**20
    assert temporaries(smooth_ap_loss, 512) < cube / 6
    assert temporaries(smooth_ap_loss, 512, chunk_size=2) < 16 * matrix
    for loss in (fast_ap_loss, histogram_loss, ranked_list_loss):
        assert temporaries(loss, 512) < 12 * matrix, loss.__name__


def test_options_out_of_range_raise() -> None:
    x = draw().astype(np.float32)
    with pytest.raises(ValueError, match="fast_ap_loss: num_bins: expected at least 1, got 0"):
        fast_ap_loss(x, LABELS, num_bins=0)
    with pytest.raises(TypeError, match="histogram_loss: num_bins: expected an integer"):
        histogram_loss(x, LABELS, num_bins=math.pi)
    with pytest.raises(ValueError, match="smooth_ap_loss: chunk_size: expected at least 1"):
        smooth_ap_loss(x, LABELS, chunk_size=0)
