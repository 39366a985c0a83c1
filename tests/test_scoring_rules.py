"""Scores of intervals and of ensembles of vectors: definitions, limits, kinks, memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import value_and_gradients

from jaxloss import checked
from jaxloss.losses.crps import crps_ensemble, crps_quantile
from jaxloss.losses.quantiles import quantile_loss
from jaxloss.losses.scoring_rules import (
    energy_score,
    interval_score,
    variogram_score,
    weighted_interval_score,
)

GENERATOR = np.random.default_rng(0)
B, M, D = 5, 6, 3
SAMPLES, TARGET = GENERATOR.normal(size=(B, M, D)), GENERATOR.normal(size=(B, D))
NUMBERS = arrays(np.float32, (6,), elements=st.integers(-64, 64).map(lambda n: n / 8))


def energy(samples, target, fair=False):
    """The definition, with its table of all pairs."""
    count = samples.shape[-2]
    norm = lambda x: jnp.sqrt(jnp.sum(x * x, -1))
    apart = samples[..., :, None, :] - samples[..., None, :, :]
    away = jnp.eye(count)[..., None]  # keeps the root of 0 out of the derivative
    pairs = (norm(apart + away) * (1 - jnp.eye(count))).sum((-2, -1))
    divisor = count * (count - 1) if fair and count > 1 else count**2
    return norm(samples - target[..., None, :]).mean(-1) - pairs / (2 * divisor)


@partial(jax.jit, static_argnums=(0, 1))
def units_and_slopes(score, plain, samples, target):
    """Of the score and of its definition, their units and the gradients of their sums."""
    units = partial(score, reduction="none")
    slopes = lambda f: jax.grad(lambda *a: jnp.sum(f(*a)), (0, 1))(samples, target)
    return [(f(samples, target), *slopes(f)) for f in (units, plain)]


def variogram(samples, target, p, pair_weights):
    apart = lambda x: jnp.abs(x[..., :, None] - x[..., None, :] + jnp.eye(D)) ** p
    error = apart(target) - apart(samples).mean(-3)
    return (pair_weights * error**2).sum((-2, -1))


# Intervals


@settings(deadline=None)
@given(NUMBERS, NUMBERS, NUMBERS, st.sampled_from([0.1, 0.5, 1.0]))
def test_an_interval_costs_what_its_two_quantiles_cost(lower, upper, target, alpha):
    sides = zip((lower, upper), (alpha / 2, 1 - alpha / 2), strict=True)
    pinballs = sum(quantile_loss(x, target, quantile=level, reduction="none") for x, level in sides)
    got = interval_score(lower, upper, target, alpha=alpha, reduction="none")
    np.testing.assert_allclose(got, 2 / alpha * pinballs, rtol=1e-4, atol=1e-4)


def test_a_target_on_an_end_is_inside_and_pulls_at_nothing():
    lower, upper = np.zeros(2, np.float32), np.full(2, 2, np.float32)
    score = partial(interval_score, reduction="sum")
    value, slopes = value_and_gradients(score, lower, upper, np.array([0, 2], np.float32))
    assert value == 4
    np.testing.assert_array_equal(slopes, [[-1, -1], [1, 1], [0, 0]])


def test_the_error_of_the_median_counts_and_not_the_median():
    # By hand: (0.9 + 1.1 + 1.75) / 2.5; scoringrules without numba says 1.18.
    numbers = [0.2], [[-1.0, -0.5]], [[1.0, 0.5]], [2.0]
    for shift, rtol in ((0, 1e-6), (100, 1e-4)):
        moved = (np.float32(x) + np.float32(shift) for x in numbers)
        got = weighted_interval_score(*moved, np.array([0.1, 0.5], np.float32))
        np.testing.assert_allclose(got, 1.5, rtol=rtol)


def test_median_and_intervals_are_the_crps_of_their_quantiles():
    alpha = np.array([0.1, 0.4, 0.8], np.float32)
    levels = np.concatenate([alpha / 2, [0.5], 1 - alpha[::-1] / 2]).astype(np.float32)
    pred = np.sort(GENERATOR.normal(size=(8, 7)).astype(np.float32), axis=-1)
    target = GENERATOR.normal(size=8).astype(np.float32)
    units = lambda x: weighted_interval_score(
        x[:, 3], x[:, :3], x[:, :3:-1], target, alpha, reduction="none"
    )
    np.testing.assert_allclose(
        units(pred), crps_quantile(pred, target, levels, reduction="none"), rtol=1e-5
    )


def test_without_intervals_the_error_of_the_median_is_left():
    zeros = lambda *shape: np.zeros(shape, np.float32)
    none, target = zeros(2, 0), np.array([1, -3], np.float32)
    got = weighted_interval_score(zeros(2), none, none, target, zeros(0))
    assert got == 2


def test_checked_names_a_share_out_of_range():
    one = np.ones(1, np.float32)
    for alpha in (0.0, 1.5):
        with pytest.raises(ValueError, match="interval_score: alpha"):
            checked(interval_score)(one, one, one, alpha=alpha)
        with pytest.raises(ValueError, match="weighted_interval_score: alpha"):
            checked(weighted_interval_score)(
                one, one[None], one[None], one, np.array([alpha], np.float32)
            )


# Vectors


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("count", [1, 5, 6])
def test_the_energy_score_and_its_slopes_are_those_of_all_pairs(count, fair):
    samples = SAMPLES[:, :count]
    with jax.enable_x64(True):
        score, plain = (partial(f, fair=fair) for f in (energy_score, energy))
        (units, *slopes), (exact, *expected) = units_and_slopes(score, plain, samples, TARGET)
    np.testing.assert_allclose(units, exact, rtol=1e-12)
    for got, slope in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(got, slope, atol=1e-13)


@pytest.mark.parametrize("fair", [False, True])
def test_with_one_coordinate_the_energy_score_is_the_crps(fair):
    samples, target = np.float32(SAMPLES[..., :1]), np.float32(TARGET[..., :1])
    np.testing.assert_allclose(
        energy_score(samples, target, fair=fair, reduction="none"),
        crps_ensemble(samples[..., 0], target[..., 0], fair=fair, reduction="none"),
        rtol=2e-5,
        atol=1e-6,
    )


def test_equal_members_and_a_hit_have_finite_slopes():
    samples, target = np.ones((2, 3, 2), np.float32), np.ones((2, 2), np.float32)
    value, slopes = value_and_gradients(energy_score, samples, target)
    assert value == 0
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0)
    for p in (0.5, 1.0, 2.0):
        value, slopes = value_and_gradients(variogram_score, samples, target, p=p)
        assert value == 0
        for slope in slopes:
            np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_energy_score_has_no_range_of_its_own(size):
    samples, target = (np.float32(size * x) for x in (SAMPLES, TARGET))
    with jax.enable_x64(True):
        expected = np.mean(jax.jit(energy)(samples.astype(float), target.astype(float)))
    value, (slope, _) = value_and_gradients(energy_score, samples, target)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    _, (plain, _) = value_and_gradients(energy_score, np.float32(SAMPLES), np.float32(TARGET))
    np.testing.assert_allclose(slope, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("p", [0.5, 2.0])
def test_the_variogram_score_and_its_slopes_are_those_of_all_pairs(p):
    pair_weights = GENERATOR.uniform(0, 1, (D, D))
    for given_weights in (None, pair_weights):
        table = np.ones((D, D)) if given_weights is None else given_weights
        with jax.enable_x64(True):
            score = partial(variogram_score, p=p, pair_weights=given_weights)
            plain = lambda *a, w=table: variogram(*a, p, w)
            (units, *slopes), (exact, *expected) = units_and_slopes(score, plain, SAMPLES, TARGET)
        np.testing.assert_allclose(units, exact, rtol=1e-11)
        for got, slope in zip(slopes, expected, strict=True):
            np.testing.assert_allclose(got, slope, rtol=1e-10, atol=1e-12)


def test_the_variogram_score_is_blind_to_a_common_shift_and_sees_correlation():
    samples, target = np.float32(SAMPLES), np.float32(TARGET)
    np.testing.assert_allclose(
        variogram_score(samples + 2, target), variogram_score(samples, target), rtol=1e-4
    )
    draws = GENERATOR.multivariate_normal([0, 0], [[1, 0.9], [0.9, 1]], 400).astype(np.float32)
    apart = np.stack([draws[:, 0], GENERATOR.permutation(draws[:, 1])], axis=-1)
    targets = GENERATOR.multivariate_normal([0, 0], [[1, 0.9], [0.9, 1]], 50).astype(np.float32)
    score = lambda ensemble: variogram_score(
        np.broadcast_to(ensemble, (50, *ensemble.shape)), targets
    )
    assert score(draws) < 0.9 * score(apart)


def test_one_coordinate_has_no_variogram_and_shapes_are_checked():
    assert variogram_score(np.ones((2, 3, 1), np.float32), np.zeros((2, 1), np.float32)) == 0
    with pytest.raises(ValueError, match=r"variogram_score: pair_weights: expected shape \(2, 2\)"):
        variogram_score(np.ones((3, 2)), np.ones(2), pair_weights=np.ones(2))
    with pytest.raises(ValueError, match=r"energy_score: target: expected shape \(4, 2\)"):
        energy_score(np.ones((4, 3, 2)), np.ones(2))
    with pytest.raises(ValueError, match="variogram_score: p"):
        checked(variogram_score)(np.ones((3, 2)), np.ones(2), p=0.0)


@pytest.mark.parametrize(
    ("loss", "members", "size"), [(energy_score, 512, 8), (variogram_score, 8, 512)]
)
def test_the_table_of_all_pairs_is_never_held(loss, members, size):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, members, size), (2, size))]
    step = jax.jit(jax.value_and_grad(loss))
    found = step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert found <= 20 * 2 * members * size * 4
