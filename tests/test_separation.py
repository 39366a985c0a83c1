"""Permutations, mixtures and clusters against brute force, and what padding and ties do."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from jaxloss.losses.separation import (
    best_permutation,
    deep_clustering_loss,
    mixit_loss,
    pairwise_items,
    permutation_invariant,
    sinkhorn_pit_loss,
)
from jaxloss.losses.spectral import stft_loss
from jaxloss.losses.waveforms import si_sdr_loss, snr_loss

units_of_si_sdr = partial(si_sdr_loss, reduction="none")
best_order = jax.jit(best_permutation)
pairs_of_si_sdr = jax.jit(partial(pairwise_items, units_of_si_sdr))


def costs(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def brute(cost, exists=None):
    """The cheapest mean over existing sources, by all orders in float64."""
    cost, s = np.float64(cost), len(cost)
    kept = np.arange(s) if exists is None else np.flatnonzero(exists)
    if not len(kept):
        return 0.0
    return min(np.mean([cost[p[j], j] for j in kept]) for p in itertools.permutations(range(s)))


@pytest.mark.parametrize("s", [1, 2, 3, 4, 5, 6])
def test_the_cheapest_order_is_that_of_brute_force_and_of_scipy(s):
    cost = costs(6, s, s)
    got = permutation_invariant(cost, reduction="none")
    np.testing.assert_allclose(got, [brute(c) for c in cost], rtol=2e-6, atol=1e-7)
    orders = np.asarray(best_order(cost))
    for c, order in zip(cost, orders, strict=True):
        assert sorted(order) == list(range(s))
        rows, columns = linear_sum_assignment(c)
        np.testing.assert_array_equal(order[columns], rows)


def test_many_sources_cost_what_scipy_finds():
    cost = costs(3, 2, 12, 12)
    expected = [[c[linear_sum_assignment(c)].mean() for c in row] for row in cost]
    got = permutation_invariant(cost, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@jax.jit
def padded(cost, exists):
    """Units, the slope of their sum, their mean and the orders."""
    options = dict(source_where=exists)
    units = lambda c: permutation_invariant(c, reduction="none", **options)
    slope = jax.grad(lambda c: jnp.sum(units(c)))(cost)
    mean, order = permutation_invariant(cost, **options), best_permutation(cost, **options)
    return units(cost), slope, mean, order


@pytest.mark.parametrize("s", [3, 6])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e30])
def test_padded_sources_and_one_estimate_for_each_are_free(s, garbage):
    cost, exists = costs(5, s, s), np.random.default_rng(1).random((5, s)) < 0.6
    exists[0], exists[1] = False, True
    hidden = np.where(exists[:, None], cost, np.float32(garbage))
    units, slope, mean, order = jax.device_get(padded(hidden, exists))
    expected = [brute(c, e) for c, e in zip(cost, exists, strict=True)]
    np.testing.assert_allclose(units, expected, rtol=2e-6, atol=1e-7)
    np.testing.assert_array_equal(slope.sum(1)[~exists], 0)
    np.testing.assert_allclose(slope.sum((1, 2)), exists.any(1), rtol=1e-6)
    kept = [e for e, some in zip(expected, exists.any(1), strict=True) if some]
    np.testing.assert_allclose(mean, np.mean(kept), rtol=1e-5)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(s), (5, 1)))


@pytest.mark.parametrize("s", [2, 4, 5])
def test_of_equally_good_orders_one_gets_the_whole_gradient(s):
    slope = np.asarray(jax.jit(jax.grad(permutation_invariant))(np.ones((s, s), np.float32)))
    np.testing.assert_allclose(np.sort(slope, axis=None)[-s:], 1 / s, rtol=1e-6)
    assert np.count_nonzero(slope) == s
    assert np.all(slope.sum(0) > 0)
    assert np.all(slope.sum(1) > 0)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (5, 5), elements=st.integers(-3, 3)))
def test_many_ties_are_solved_exactly_above_the_listed_orders(cost):
    rows, columns = linear_sum_assignment(cost)
    np.testing.assert_allclose(
        permutation_invariant(cost), cost[rows, columns].mean(), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("s", [2, 5])
def test_a_cost_that_is_no_number_is_paid_only_where_no_other_order_is_left(bad, s):
    cost = np.full((s, s), 9, np.float32)
    cost[0, 0] = bad
    assert permutation_invariant(cost) == 9
    cost[0] = bad
    assert not np.isfinite(permutation_invariant(cost))


def test_the_loss_does_not_depend_on_the_order_of_estimates_or_sources():
    cost = costs(4, 3, 3)
    value = permutation_invariant(cost, reduction="none")
    for axis in (1, 2):
        turned = np.roll(cost, 1, axis)
        got = permutation_invariant(turned, reduction="none")
        np.testing.assert_allclose(got, value, rtol=1e-6)


def test_an_item_without_sources_is_no_unit():
    cost, exists = costs(2, 3, 3), np.array([[False] * 3, [True] * 3])
    got = permutation_invariant(cost, source_where=exists)
    np.testing.assert_allclose(got, permutation_invariant(cost[1]), rtol=1e-6)
    assert permutation_invariant(np.zeros((2, 0, 0), np.float32)) == 0
    assert best_order(np.zeros((2, 0, 0), np.float32)).shape == (2, 0)


def test_the_best_order_sorts_the_estimates():
    target = costs(2, 3, 100)
    order = np.array([[2, 0, 1], [1, 2, 0]])
    pred = np.take_along_axis(target, order[..., None], 1) + 0.1 * costs(2, 3, 100, seed=1)
    pairwise = np.asarray(pairs_of_si_sdr(pred, target))
    found = np.asarray(best_order(pairwise))
    np.testing.assert_array_equal(np.take_along_axis(order, found, 1), [[0, 1, 2]] * 2)
    value = permutation_invariant(pairwise)
    np.testing.assert_allclose(
        value, si_sdr_loss(np.take_along_axis(pred, found[..., None], 1), target), rtol=1e-5
    )
    assert value < -15


@jax.jit
@jax.value_and_grad
def separated(pred, target):
    """Total of the best orders, and its slope."""
    pairwise = pairwise_items(units_of_si_sdr, pred, target)
    return permutation_invariant(pairwise, reduction="sum")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_separation_of_a_sharded_batch_equals_that_of_one_device(kind):
    pred, target = costs(8, 5, 20), costs(8, 5, 20, seed=1)
    expected = separated(pred, target)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        got = separated(put(pred), put(target))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, expected)


def test_pairs_hold_the_estimate_before_the_source():
    pred, target = costs(2, 3, 40), costs(2, 3, 40, seed=1)
    where = np.random.default_rng(2).random((2, 40)) < 0.7
    loss = jax.jit(partial(snr_loss, where=where, reduction="none", zero_mean=False))
    pairs = jax.jit(partial(pairwise_items, partial(snr_loss, zero_mean=False), reduction="none"))
    got = np.asarray(pairs(pred, target, where=where))
    for i, j in itertools.product(range(3), repeat=2):
        expected = loss(pred[:, i], target[:, j])
        np.testing.assert_allclose(got[:, i, j], expected, rtol=1e-6)


def test_any_loss_of_waveforms_makes_pairs_also_of_other_counts():
    pred, target = costs(3, 40), costs(2, 40, seed=1)
    loss = partial(stft_loss, fft_size=16, hop_size=8, window_size=16, reduction="none")
    got = np.asarray(jax.jit(partial(pairwise_items, loss))(pred, target))
    assert got.shape == (3, 2)
    np.testing.assert_allclose(got[2, 1], loss(pred[2], target[1]), rtol=1e-6)


def test_nan_in_a_padded_source_reaches_neither_value_nor_gradient():
    pred, target = costs(2, 3, 40), costs(2, 3, 40, seed=1)
    exists = np.array([[True, True, False], [True, True, True]])
    target[0, 2] = np.nan
    samples = np.broadcast_to(exists[..., None], target.shape)

    def loss(pred):
        pairwise = pairwise_items(units_of_si_sdr, pred, target, where=samples)
        return permutation_invariant(pairwise, source_where=exists)

    value, slope = jax.jit(jax.value_and_grad(loss))(pred)
    pairs = np.asarray(pairs_of_si_sdr(pred, np.nan_to_num(target)))
    expected = np.mean([brute(c, e) for c, e in zip(pairs, exists, strict=True)])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.all(np.isfinite(slope))


def test_pairs_need_the_memory_of_one_source_and_no_gram_matrix_loses_digits():
    batch, s, time = 2, 8, 8000
    wave = jax.ShapeDtypeStruct((batch, s, time), jnp.float32)
    loss = lambda p, t: permutation_invariant(pairwise_items(units_of_si_sdr, p, t))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(wave, wave).compile()
    one = 4 * batch * s * time
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * one  # all pairs at once: over 8
    target = costs(1, 4000)
    near = target + np.float32(1e-5) * costs(1, 4000, seed=1)
    ratio = np.asarray(pairs_of_si_sdr(near, target))[0, 0]
    assert ratio == pytest.approx(-100, abs=1)


def test_a_loss_that_reduces_makes_no_pairs():
    with pytest.raises(
        ValueError, match=r"pairwise_items: loss_fn\(pred, target\): expected shape"
    ):
        pairwise_items(si_sdr_loss, np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="pairwise_items: target: expected shape"):
        pairwise_items(units_of_si_sdr, np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="permutation_invariant: pairwise: expected shape"):
        permutation_invariant(np.ones((2, 3, 2)))
    with pytest.raises(TypeError, match="source_where: expected a bool array"):
        permutation_invariant(np.ones((2, 2)), source_where=np.ones(2))


# Sinkhorn


def test_a_cold_soft_permutation_is_the_hard_one():
    order = np.random.default_rng(0).permuted(np.tile(np.arange(5), (4, 1)), axis=1)
    cost = 0.3 * costs(4, 5, 5) - 2 * np.eye(5, dtype=np.float32)[order]
    hard = permutation_invariant(cost, reduction="none")
    cold = partial(sinkhorn_pit_loss, temperature=0.05)
    np.testing.assert_allclose(cold(cost, reduction="none"), hard, atol=1e-6)
    slopes = jax.jit(lambda c: (jax.grad(cold)(c), jax.grad(permutation_invariant)(c)))(cost)
    np.testing.assert_allclose(*slopes, atol=1e-6)
    warm = sinkhorn_pit_loss(cost, temperature=1.0, reduction="none")
    assert np.all(warm < hard)
    assert np.all(warm > hard - np.log(5))


def test_the_gradient_of_a_settled_soft_permutation_is_the_permutation():
    cost = costs(4, 4)
    slope = 4 * np.asarray(jax.jit(jax.grad(partial(sinkhorn_pit_loss, iterations=200)))(cost))
    np.testing.assert_allclose(slope.sum(0), 1, rtol=1e-4)
    np.testing.assert_allclose(slope.sum(1), 1, rtol=1e-4)
    assert np.all(slope > 0)


def test_a_soft_permutation_follows_its_formula():
    cost, t = costs(3, 3).astype(float), 0.5
    z = -cost.T / t
    for _ in range(7):
        z = z - np.log(np.exp(z).sum(0, keepdims=True))
        z = z - np.log(np.exp(z).sum(1, keepdims=True))
    expected = np.sum(np.exp(z) * (cost.T + t * z)) / 3
    got = sinkhorn_pit_loss(cost.astype(np.float32), temperature=t, iterations=7)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="iterations: expected an integer of at least 1"):
        sinkhorn_pit_loss(np.ones((2, 2)), iterations=0)


# Mixtures


@pytest.mark.parametrize(("s", "m"), [(4, 2), (3, 3), (2, 1)])
def test_mixtures_take_the_best_of_all_ways_to_share_out_the_estimates(s, m):
    pred, mixtures = costs(3, s, 30), costs(3, m, 30, seed=1)
    where = np.random.default_rng(2).random((3, 30)) < 0.8
    for kept in (np.ones_like(where), where):
        expected = []
        for i in range(3):
            ways = []
            for way in itertools.product(range(m), repeat=s):
                sums = np.stack([pred[i][np.array(way) == k].sum(0) for k in range(m)])
                x, y = (a[:, kept[i]].astype(float) for a in (sums, mixtures[i]))
                x, y = (a - a.mean(1, keepdims=True) for a in (x, y))
                ratio = (y**2).sum(1) / (((x - y) ** 2).sum(1) + 1e-8) + 1e-8
                ways.append(np.mean(-10 * np.log10(ratio)))
            expected.append(min(ways))
        got = mixit_loss(pred, mixtures, where=kept, reduction="none")
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_loss_for_mixtures_may_be_any_with_one_value_per_item():
    pred = costs(2, 3, 30)
    mixtures = np.stack([pred[:, 0] + pred[:, 2], pred[:, 1]], axis=1)
    bounded = partial(snr_loss, soft_max=30.0, reduction="none")
    value, slope = jax.jit(jax.value_and_grad(partial(mixit_loss, loss_fn=bounded)))(pred, mixtures)
    np.testing.assert_allclose(value, -30, atol=1e-3)
    assert np.all(np.isfinite(slope))
    with pytest.raises(ValueError, match=r"mixit_loss: loss_fn\(pred, mixture\): expected shape"):
        mixit_loss(pred, mixtures, loss_fn=snr_loss)
    with pytest.raises(ValueError, match="mixit_loss: mixtures: expected shape"):
        mixit_loss(pred, mixtures[:, :, :-1])


def test_ways_that_are_not_taken_keep_nothing():
    pred = jax.ShapeDtypeStruct((2, 6, 8000), jnp.float32)
    mixtures = jax.ShapeDtypeStruct((2, 2, 8000), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(mixit_loss)).lower(pred, mixtures).compile()
    estimates = 4 * 2 * 6 * 8000
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * estimates  # there are 64 ways


# Clusters


def test_affinities_are_those_of_the_dense_matrices():
    g = np.random.default_rng(0)
    v, y = g.standard_normal((2, 9, 4)), np.eye(3)[g.integers(0, 3, (2, 9))]
    where = g.random((2, 9)) < 0.7
    for kept in (np.ones((2, 9), bool), where):
        expected = []
        for vi, yi, k in zip(v, y, kept, strict=True):
            vi, yi = vi[k], yi[k]
            expected.append(np.sum((vi @ vi.T - yi @ yi.T) ** 2))
        got = deep_clustering_loss(v.astype(np.float32), y, where=kept, reduction="none")
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_embeddings_that_are_the_sources_cost_nothing():
    labels = np.eye(3, dtype=np.float32)[[0, 2, 1, 1, 0]]
    both = jax.jit(jax.value_and_grad(deep_clustering_loss))
    value, slope = both(labels, labels.astype(np.int32))
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def test_clusters_never_make_a_matrix_of_all_bins():
    v = jax.ShapeDtypeStruct((1, 20000, 20), jnp.float32)
    y = jax.ShapeDtypeStruct((1, 20000, 2), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(deep_clustering_loss)).lower(v, y).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * 20000 * 22
