"""Ranked probability scores: against integrals and all pairs, ties, one member, memory."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_off, value_and_gradients
from scipy import integrate, stats

from jaxloss import checked
from jaxloss.losses.crps import (
    crps_ensemble,
    crps_gaussian,
    crps_gaussian_mixture,
    crps_laplace,
    crps_logistic,
    crps_quantile,
)
from jaxloss.losses.quantiles import multi_quantile_loss

GENERATOR = np.random.default_rng(0)
N, M = 40, 7
LOC, TARGET = GENERATOR.normal(size=(2, N))
LOC[:4], TARGET[:4] = 1.25, [1.25, 1.2500001, 900, -900]
SCALE = np.exp(GENERATOR.uniform(-4, 4, N))
SAMPLES = GENERATOR.normal(size=(N, M))
NUMBERS = st.integers(-64, 64).map(lambda n: n / 8)


def gaussian(m, s, y):
    z = (y - m) / s
    density = mp.exp(-(z**2) / 2) / mp.sqrt(2 * mp.pi)
    return s * (z * mp.erf(z / mp.sqrt(2)) + 2 * density - 1 / mp.sqrt(mp.pi))


def logistic(m, s, y):
    z = (y - m) / s
    return s * (z + 2 * mp.log1p(mp.exp(-z)) - 1)


def laplace(m, s, y):
    z = abs(y - m) / s
    return s * (z + mp.exp(-z) - mp.mpf(3) / 4)


CLOSED = {
    "gaussian": (crps_gaussian, gaussian, stats.norm),
    "logistic": (crps_logistic, logistic, stats.logistic),
    "laplace": (crps_laplace, laplace, stats.laplace),
}


@partial(jax.jit, static_argnames="fair")
def all_pairs(samples, target, fair):
    """The definition, with its table of all pairs."""
    count = samples.shape[-1]
    pairs = jnp.abs(samples[..., :, None] - samples[..., None, :]).sum((-2, -1))
    divisor = count * (count - 1) if fair and count > 1 else count**2
    return jnp.abs(samples - target[..., None]).mean(-1) - pairs / (2 * divisor)


def integral(cdf, y, lower, upper):
    """Of the squared distance between a distribution function and the step at the target."""
    below, _ = integrate.quad(lambda x: cdf(x) ** 2, lower, y, limit=500)
    above, _ = integrate.quad(lambda x: (1 - cdf(x)) ** 2, y, upper, limit=500)
    return below + above


@pytest.mark.parametrize("name", CLOSED)
def test_value_and_slopes_match_eighty_digits(name):
    loss, exact, _ = CLOSED[name]
    off = units_off(loss, exact, LOC, SCALE, TARGET)
    assert max(worst for worst, _ in off.values()) <= 4, off


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_are_the_integral_that_defines_the_score(name):
    loss, _, distribution = CLOSED[name]
    for y in (-2.0, 0.4, 3.0):
        expected = integral(distribution(0.3, 1.7).cdf, y, -70, 70)
        np.testing.assert_allclose(loss(*np.float32([0.3, 1.7, y])), expected, rtol=1e-6)


@pytest.mark.parametrize("name", CLOSED)
def test_a_scale_that_vanishes_leaves_the_absolute_error_and_learns_no_more(name):
    loss, *_ = CLOSED[name]
    for scale in (0.0, -1.0, 1e-9):
        value, slopes = value_and_gradients(loss, *np.float32([1, scale, 3.5]), min_scale=1e-6)
        np.testing.assert_allclose(value, 2.5, rtol=1e-6)
        np.testing.assert_array_equal(slopes, [-1, 0, 1])


@pytest.mark.parametrize("name", CLOSED)
def test_a_nan_scale_is_not_hidden_by_the_floor_but_by_a_mask(name):
    loss, *_ = CLOSED[name]
    one, scale = np.ones(2, np.float32), np.float32([0.5, np.nan])
    np.testing.assert_array_equal(np.isnan(loss(one, scale, one, reduction="none")), [False, True])
    value, slopes = value_and_gradients(loss, one, scale, one, where=np.array([True, False]))
    assert np.isfinite(value)
    assert slopes[1][1] == 0


def test_checked_names_a_least_scale_that_is_not_positive():
    for loss, *_ in CLOSED.values():
        zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
        with pytest.raises(ValueError, match=f"{loss.__name__}: min_scale"):
            checked(loss)(zero, one, zero, min_scale=0.0)


# Mixtures


def test_a_mixture_is_the_integral_that_defines_the_score():
    logits, means, scales = np.array([[0.3, -1, 0.5], [-2, 3, 0.8], [0.4, 1.5, 2]])
    p = np.exp(logits) / np.exp(logits).sum()
    cdf = lambda x: np.sum(p * stats.norm.cdf(x, means, scales))
    with jax.enable_x64(True):
        for y in (-2.5, 0.7, 4.0):
            got = crps_gaussian_mixture(logits, means, scales, np.array(y))
            np.testing.assert_allclose(got, integral(cdf, y, -30, 30), rtol=1e-7)


def test_equal_components_and_components_of_weight_zero_leave_one_gaussian():
    loc, scale, target = (np.float32(x)[:, None] for x in (LOC, SCALE, TARGET))
    expected = crps_gaussian(loc[:, 0], scale[:, 0], target[:, 0], reduction="none")
    twice = np.repeat(loc, 2, -1), np.repeat(scale, 2, -1)
    strange = np.concatenate([loc, loc + 9], -1), np.concatenate([scale, 3 * scale], -1)
    for logits, (means, scales) in (([0.3, -1.2], twice), ([0.0, -np.inf], strange)):
        given = np.broadcast_to(np.float32(logits), means.shape)
        got = crps_gaussian_mixture(given, means, scales, target[:, 0], reduction="none")
        np.testing.assert_allclose(got, expected, rtol=3e-5, atol=1e-6)


def test_components_may_be_of_any_sizes_beside_one_another():
    logits, means = np.float32([0, 0.3, -1e4]), np.float32([1e25, 0, 3])
    scales = np.float32([1e25, 0, 1e-25])
    parts = value_and_gradients(crps_gaussian_mixture, logits, means, scales, np.float32(1))
    assert all(np.all(np.isfinite(part)) for part in jax.tree.leaves(parts))


def test_a_mixture_of_spikes_is_an_ensemble():
    samples, target = np.float32(SAMPLES), np.float32(TARGET)
    got = crps_gaussian_mixture(
        np.zeros_like(samples), samples, np.zeros_like(samples), target, reduction="none"
    )
    expected = crps_ensemble(samples, target, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# Ensembles


@pytest.mark.parametrize("fair", [False, True])
@pytest.mark.parametrize("count", [2, M])
def test_value_and_slopes_are_those_of_all_pairs(count, fair):
    samples = SAMPLES[:, :count]
    with jax.enable_x64(True):
        ours = partial(crps_ensemble, fair=fair, reduction="none")
        plain = partial(all_pairs, fair=fair)
        slopes = lambda f, *a: jax.grad(lambda *a: jnp.sum(f(*a)), (0, 1))(*a)
        run = lambda *a: [(f(*a), *slopes(f, *a)) for f in (ours, plain)]
        (units, *slope), (exact, *true) = jax.jit(run)(samples, TARGET)
    np.testing.assert_allclose(units, exact, rtol=1e-12, atol=1e-14)
    for got, expected in zip(slope, true, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-14)


def test_an_ensemble_is_the_integral_over_its_steps():
    for samples, y in zip(SAMPLES[4:10], TARGET[4:10], strict=True):
        edges = np.sort(np.append(samples, y))
        middles = (edges[1:] + edges[:-1]) / 2
        cdf = np.mean(samples <= middles[:, None], axis=-1)
        expected = np.sum(np.diff(edges) * (cdf - (middles > y)) ** 2)
        got = crps_ensemble(np.float32(samples), np.float32(y))
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("fair", [False, True])
def test_one_member_costs_its_absolute_error(fair):
    # The fair estimator divides by M (M - 1).
    value, slopes = value_and_gradients(
        crps_ensemble, np.float32([[3], [1]]), np.float32([1, 1]), fair=fair
    )
    assert value == 1
    np.testing.assert_array_equal(slopes[0], [[0.5], [0]])
    np.testing.assert_array_equal(slopes[1], [-0.5, 0])


def test_the_fair_score_is_that_of_the_distribution_on_average_and_the_other_is_not():
    # all ensembles of three fair coins; the score of the coin itself is p (1 - p)
    draws = np.float32(list(product([0, 1], repeat=3)))
    for y in (0.0, 1.0):
        score = lambda fair, y=y: float(crps_ensemble(draws, np.full(8, y, np.float32), fair=fair))
        np.testing.assert_allclose(score(True), 0.25, rtol=1e-6)
        np.testing.assert_allclose(score(False), 0.25 + 0.25 / 3, rtol=1e-6)


@pytest.mark.parametrize("fair", [False, True])
def test_equal_members_share_their_slope_evenly(fair):
    samples, target = np.float32([[2, 0, 2, 2, -1]]), np.zeros(1, np.float32)
    _, ((slope,), _) = value_and_gradients(crps_ensemble, samples, target, fair=fair)
    others = 4 if fair else 5
    # sign(x - y) / M, less (those below - those above) / (M others); the second hits the target
    expected = np.array([1, 0, 1, 1, -1]) / 5 - np.array([2, -2, 2, 2, -4]) / (5 * others)
    np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-7)
    _, (same, _) = value_and_gradients(crps_ensemble, 0 * samples, target, fair=fair)
    np.testing.assert_array_equal(same, 0)


def test_second_derivatives_are_zero_and_forward_mode_agrees():
    @jax.jit
    def run(*point):
        both = (0, 1)
        curve = jax.hessian(crps_ensemble)(*point)
        return curve, jax.jacfwd(crps_ensemble, both)(*point), jax.grad(crps_ensemble, both)(*point)

    curve, forward, reverse = run(np.float32(SAMPLES[4, :4]), np.float32(TARGET[4]))
    np.testing.assert_array_equal(curve, 0)
    for got, expected in zip(forward, reverse, strict=True):
        np.testing.assert_allclose(got, expected)


@settings(deadline=None)
@given(arrays(np.float32, (3, 5), elements=NUMBERS), arrays(np.float32, (3,), elements=NUMBERS))
def test_order_does_not_matter_and_the_score_has_the_unit_of_the_target(samples, target):
    value = crps_ensemble(samples, target, reduction="none")
    assert np.all(value >= 0)
    np.testing.assert_array_equal(value, crps_ensemble(samples[:, ::-1], target, reduction="none"))
    np.testing.assert_allclose(
        crps_ensemble(8 - 4 * samples, 8 - 4 * target, reduction="none"),
        4 * value,
        rtol=1e-6,
        atol=1e-5,
    )


@pytest.mark.parametrize("offset", [0.0, 3000.0, 1e25])
def test_members_far_from_zero_and_close_together_keep_their_digits(offset):
    samples = np.float32(offset + SAMPLES * max(1, offset * 1e-3))
    target = np.float32(samples[:, 0] * 1.0001)
    with jax.enable_x64(True):
        expected = all_pairs(samples.astype(float), target.astype(float), False)
    got = crps_ensemble(samples, target, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@pytest.mark.parametrize("fair", [False, True])
def test_no_array_of_all_pairs_is_made(fair):
    rows, members = 4, 8192
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, members), (rows,))]
    step = jax.jit(jax.value_and_grad(lambda x, y: crps_ensemble(x, y, fair=fair)))
    found = step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert found <= 12 * rows * members * 4


# Quantiles


def test_quantiles_cost_twice_their_mean_pinball_loss():
    levels = np.linspace(0.1, 0.9, M).astype(np.float32)
    pred, target = np.float32(SAMPLES), np.float32(TARGET)
    for ours, half in zip(
        *(
            jax.jit(jax.value_and_grad(loss))(pred, target, levels)
            for loss in (crps_quantile, multi_quantile_loss)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(ours, 2 * half, rtol=1e-6)


def test_dense_quantiles_tend_to_the_score_of_the_distribution():
    levels = (np.arange(1000) + 0.5) / 1000
    pred = np.broadcast_to(stats.norm.ppf(levels), (3, 1000)).astype(np.float32)
    target, zeros = np.float32([-2, 0.1, 1.3]), np.zeros(3, np.float32)
    got = crps_quantile(pred, target, levels.astype(np.float32), reduction="none")
    expected = crps_gaussian(zeros, zeros + 1, target, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-3)  # the tails beyond the last of 1000


def test_levels_fit_the_last_axis_and_lie_between_zero_and_one():
    with pytest.raises(ValueError, match=r"crps_quantile: quantiles: expected shape \(3,\)"):
        crps_quantile(np.zeros((2, 3)), np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match="crps_quantile: quantiles"):
        checked(crps_quantile)(np.zeros((2, 1)), np.zeros(2), np.array([1.5]))
