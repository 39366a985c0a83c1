"""Negative log-likelihoods: normalisation, limits, tiny scales and rates, large counts."""

from functools import partial

import jax
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_and_gradient, units_off, value_and_gradients
from scipy import integrate, stats

from jaxloss import checked
from jaxloss.losses.likelihoods import (
    gaussian_nll_loss,
    gaussian_variance_nll_loss,
    laplace_nll_loss,
    multivariate_gaussian_nll_loss,
    poisson_nll_loss,
    student_t_nll_loss,
)
from jaxloss.losses.regression import absolute_error, l2_loss

SCALED = (gaussian_nll_loss, laplace_nll_loss, student_t_nll_loss)
NUMBERS = arrays(np.float32, (6,), elements=st.integers(-64, 64).map(lambda n: n / 8))
GENERATOR = np.random.default_rng(0)
LOC, TARGET = GENERATOR.normal(size=(2, 40))
LOG_SCALE = np.concatenate([3 * GENERATOR.normal(size=30), np.linspace(-40, 40, 10)])
COUNT = np.concatenate([np.arange(20.0), np.exp(GENERATOR.uniform(0, 12, 20))])
LOG_RATE = np.log(COUNT + 0.5) + GENERATOR.normal(size=40) * np.tile([1e-3, 0.1, 0.3, 3], 10)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def ones(*shape):
    return np.ones(shape, np.float32)


def standard(loc, log_scale, target):
    return (target - loc) * mp.exp(-log_scale)


def student(loc, log_scale, target, df):
    df = mp.mpf(float(np.float32(df)))
    constant = log_scale + mp.log(mp.beta(0.5, df / 2)) + mp.log(df) / 2
    return constant + (df + 1) / 2 * mp.log1p(standard(loc, log_scale, target) ** 2 / df)


@pytest.mark.parametrize(
    ("loss", "exact", "columns", "options"),
    [
        (poisson_nll_loss, lambda r, y: mp.exp(r) - y * r, (LOG_RATE, COUNT), {}),
        (
            poisson_nll_loss,
            lambda r, y: mp.exp(r) - y * r + mp.loggamma(y + 1),
            (LOG_RATE, COUNT),
            dict(full=True),
        ),
        (
            gaussian_nll_loss,
            lambda m, v, y: (v + standard(m, v / 2, y) ** 2) / 2,
            (LOC, 2 * LOG_SCALE, TARGET),
            {},
        ),
        (
            gaussian_nll_loss,
            lambda m, v, y: (v + standard(m, v / 2, y) ** 2 + mp.log(2 * mp.pi)) / 2,
            (LOC, 2 * LOG_SCALE, TARGET),
            dict(full=True),
        ),
        (
            laplace_nll_loss,
            lambda m, s, y: mp.log(2) + s + abs(standard(m, s, y)),
            (LOC, LOG_SCALE, TARGET),
            {},
        ),
        (student_t_nll_loss, lambda *a: student(*a, 3), (LOC, LOG_SCALE, TARGET), {}),
        (student_t_nll_loss, lambda *a: student(*a, 1e6), (LOC, LOG_SCALE, TARGET), dict(df=1e6)),
    ],
    ids=["poisson", "poisson-full", "gaussian", "gaussian-full", "laplace", "t", "t-1e6"],
)
def test_value_and_slopes_match_fifty_digits(loss, exact, columns, options):
    off = units_off(loss, exact, *columns, **options)
    assert max(worst for worst, _ in off.values()) <= 4, off


@pytest.mark.parametrize("loss", SCALED)
@pytest.mark.parametrize("log_scale", [-0.7, 0.0, 1.2])
def test_the_densities_integrate_to_one(loss, log_scale):
    options = dict(full=True) if loss is gaussian_nll_loss else {}
    with jax.enable_x64(True):
        nll = lambda y: loss(np.float64(0.3), np.float64(log_scale), np.float64(y), **options)
        total, _ = integrate.quad(lambda y: float(np.exp(-nll(y))), -np.inf, np.inf)
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_the_probabilities_of_all_counts_add_up_to_one():
    rate, count = np.full(60, 1.7, np.float32), np.arange(60, dtype=np.float32)
    nll = poisson_nll_loss(rate, count, full=True, reduction="none")
    np.testing.assert_allclose(np.sum(np.exp(-nll)), 1, rtol=1e-6)


@pytest.mark.parametrize("loss", SCALED)
@settings(deadline=None)
@given(NUMBERS, NUMBERS)
def test_twice_the_error_at_twice_the_scale_costs_log_two_more(loss, loc, target):
    log_scale = np.full_like(loc, 0.5)
    step = 2 * np.log(2) if loss is gaussian_nll_loss else np.log(2)
    more = loss(2 * loc, log_scale + np.float32(step), 2 * target, reduction="none")
    np.testing.assert_allclose(
        more, np.asarray(loss(loc, log_scale, target, reduction="none")) + np.log(2), rtol=1e-5
    )


# Poisson


def test_an_impossible_count_costs_infinity_and_a_zero_rate_explains_no_event():
    log_rate, count = np.float32([-np.inf, -np.inf]), np.float32([0, 2])
    for full in (False, True):
        values = poisson_nll_loss(log_rate, count, full=full, reduction="none")
        np.testing.assert_array_equal(values, [0, np.inf])
    _, (slope, _) = value_and_gradients(poisson_nll_loss, log_rate[:1], count[:1])
    np.testing.assert_array_equal(slope, 0)


def test_a_masked_rate_that_overflows_is_invisible():
    log_rate, count = np.float32([0.5, 100]), np.float32([0, -1])
    where = np.array([True, False])
    value, slopes = value_and_gradients(poisson_nll_loss, log_rate, count, where=where, full=True)
    np.testing.assert_allclose(value, np.exp(0.5), rtol=1e-6)
    for slope in slopes:
        assert np.isfinite(slope[0])
        assert slope[1] == 0
    assert np.isposinf(poisson_nll_loss(np.float32([100]), np.float32([1])))


def test_a_full_likelihood_differs_by_a_constant_of_the_count_alone():
    log_rate = np.linspace(-3, 5, 9, dtype=np.float32)
    for count in (0.0, 1.0, 7.0, 30.0):
        target = np.full(9, count, np.float32)
        (whole, slope), (rest, bare) = (
            units_and_gradient(poisson_nll_loss, log_rate, target, full=full)
            for full in (True, False)
        )
        constant = np.asarray(whole) - np.asarray(rest)
        np.testing.assert_allclose(constant, float(mp.loggamma(count + 1)), atol=3e-5)
        np.testing.assert_allclose(slope, bare, rtol=1e-5, atol=1e-5)


def test_the_full_poisson_loss_is_minus_the_log_probability():
    counts = np.arange(40)
    log_rate = LOC.astype(np.float32)
    expected = -stats.poisson.logpmf(counts, np.exp(log_rate.astype(float)))
    got = poisson_nll_loss(log_rate, counts, full=True, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_well_predicted_large_count_keeps_its_digits():
    count = np.float32(1e6)
    log_rate = np.log(count)
    expected = -stats.poisson.logpmf(1e6, np.exp(np.float64(log_rate)))
    np.testing.assert_allclose(
        poisson_nll_loss(log_rate[None], count[None], full=True), expected, rtol=1e-6
    )


def test_counts_between_whole_numbers_follow_the_gamma_function():
    count = np.linspace(0, 3, 61)
    with jax.enable_x64(True):
        values = poisson_nll_loss(np.zeros(61), count, full=True, reduction="none")
    expected = [1 + float(mp.loggamma(y + 1)) for y in count]
    np.testing.assert_allclose(values, expected, rtol=1e-13)


def test_integer_counts_are_numbers_and_full_is_a_choice_of_two():
    assert poisson_nll_loss(zeros(1), np.array([3])) == 1
    with pytest.raises(ValueError, match="poisson_nll_loss: full: expected one of"):
        poisson_nll_loss(zeros(1), zeros(1), full="yes")
    with pytest.raises(ValueError, match="poisson_nll_loss: target"):
        checked(poisson_nll_loss)(zeros(2), np.float32([1, -1]))


# Gaussian, Laplace and Student


@pytest.mark.parametrize("loss", SCALED)
def test_a_perfect_prediction_of_tiny_scale_is_finite(loss):
    parts = value_and_gradients(loss, ones(2), np.float32([-100, -1e4]), ones(2))
    for part in jax.tree.leaves(parts):
        assert np.all(np.isfinite(part))
    np.testing.assert_array_equal(parts[1][0], 0)


@pytest.mark.parametrize("loss", SCALED)
def test_a_masked_nan_in_the_scale_is_invisible(loss):
    where, log_scale = np.array([True, False]), np.float32([0.3, np.nan])
    value, slopes = value_and_gradients(loss, ones(2), log_scale, zeros(2), where=where)
    assert np.isfinite(value)
    for slope in slopes:
        assert np.isfinite(slope[0])
        assert slope[1] == 0


def test_a_perfect_prediction_of_tiny_variance_costs_half_its_logarithm():
    value, slopes = value_and_gradients(gaussian_nll_loss, *np.float32([1, -100, 1]))
    assert value == -50
    np.testing.assert_array_equal(slopes, [0, 0.5, 0])


def test_at_unit_scale_gaussian_and_laplace_are_the_plain_errors():
    loc, zero, target = np.float32(LOC), zeros(40), np.float32(TARGET)
    np.testing.assert_allclose(
        gaussian_nll_loss(loc, zero, target), l2_loss(loc, target), rtol=1e-6
    )
    expected = np.asarray(absolute_error(loc, target)) + np.log(2)
    np.testing.assert_allclose(laplace_nll_loss(loc, zero, target), expected, rtol=1e-6)


def test_the_mean_comes_before_the_variance_and_the_target_last():
    mean, log_var, target = (np.float32([x]) for x in (1, 0.4, 3))
    expected = -stats.norm.logpdf(3, 1, np.exp(0.2))
    np.testing.assert_allclose(
        gaussian_nll_loss(mean, log_var, target, full=True), expected, rtol=1e-6
    )


def test_beta_weights_by_a_power_of_the_variance_without_gradient():
    mean, log_var, target = (np.float32(x) for x in (LOC, LOG_SCALE[:40] / 4, TARGET))
    summed = partial(gaussian_nll_loss, reduction="sum")
    slope = lambda **options: value_and_gradients(summed, mean, log_var, target, **options)[1][:2]
    plain = slope()
    for beta in (0.5, 1.0):
        for weighted, bare in zip(slope(beta=beta), plain, strict=True):
            expected = np.asarray(bare) * np.exp(beta * log_var)
            np.testing.assert_allclose(weighted, expected, rtol=1e-5)
    for traced, bare in zip(slope(beta=np.float32(0)), plain, strict=True):
        np.testing.assert_allclose(traced, bare, rtol=1e-6)
    np.testing.assert_allclose(slope(beta=1.0)[0], mean - target, rtol=1e-5)


def test_the_gradient_of_a_laplace_likelihood_at_equality_is_zero_in_its_location():
    _, slopes = value_and_gradients(laplace_nll_loss, ones(1), zeros(1), ones(1))
    np.testing.assert_array_equal(slopes[:2], [[0], [1]])


@pytest.mark.parametrize("df", [0.5, 3.0, 30.0, 1e3])
def test_the_student_loss_is_minus_the_log_density(df):
    loc, log_scale, target = (np.float32(x) for x in (LOC, LOG_SCALE, TARGET))
    expected = -stats.t.logpdf(target.astype(float), df, loc, np.exp(log_scale.astype(float)))
    got = student_t_nll_loss(loc, log_scale, target, df=df, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_student_with_one_degree_of_freedom_is_cauchy():
    values = student_t_nll_loss(LOC, LOG_SCALE, TARGET, df=1.0, reduction="none")
    expected = -stats.cauchy.logpdf(TARGET, LOC, np.exp(LOG_SCALE))
    np.testing.assert_allclose(values, expected, rtol=2e-5)


@pytest.mark.parametrize(("df", "tolerance"), [(1e3, 1e-2), (1e6, 1e-5), (1e9, 1e-6)])
def test_student_tends_to_the_gaussian(df, tolerance):
    loc, log_scale, target = (np.float32(x) for x in (LOC, 0.01 * LOG_SCALE, TARGET))
    gaussian = gaussian_nll_loss(loc, 2 * log_scale, target, full=True)
    np.testing.assert_allclose(
        student_t_nll_loss(loc, log_scale, target, df=df), gaussian, rtol=tolerance
    )


@jax.jit
@jax.grad
def slope_in_df(df):
    return student_t_nll_loss(np.float32([1.5]), zeros(1), zeros(1), df=df)


@pytest.mark.parametrize("df", [0.01, 0.5, 3.0, 30.0])
def test_degrees_of_freedom_may_be_learned(df):
    slope = slope_in_df(np.float32(df))
    with mp.workdps(40):
        zero, error = mp.mpf(0), mp.mpf(1.5)
        exact = lambda d: (
            mp.log(mp.beta(0.5, d / 2)) + mp.log(d) / 2 + (d + 1) / 2 * mp.log1p(error**2 / d)
        )
        expected = mp.diff(exact, mp.mpf(float(np.float32(df)))) + zero
    np.testing.assert_allclose(float(slope), float(expected), rtol=1e-5)


def test_an_error_of_any_size_is_finite_under_student():
    error = np.float32([1e-25, 1e10, 1e25, -1e25])
    parts = value_and_gradients(student_t_nll_loss, error, zeros(4), zeros(4))
    for part in jax.tree.leaves(parts):
        assert np.all(np.isfinite(part))


def test_checked_names_degrees_of_freedom_that_are_not_positive():
    with pytest.raises(ValueError, match="student_t_nll_loss: df"):
        checked(student_t_nll_loss)(zeros(1), zeros(1), zeros(1), df=0.0)


# A variance itself, and covariances


def test_below_the_floor_no_gradient_reaches_the_variance():
    # torch's clamp stands outside its graph: its gradient there is about -5e11.
    variance = np.float32([1e-9, 0, -1, 0.5])
    summed = partial(gaussian_variance_nll_loss, reduction="sum")
    value, slopes = value_and_gradients(summed, ones(4), variance, zeros(4))
    assert np.isfinite(value)
    np.testing.assert_array_equal(slopes[1], [0, 0, 0, 0.5 * (1 / 0.5 - 1 / 0.25)])
    np.testing.assert_allclose(slopes[0], [1e6, 1e6, 1e6, 2], rtol=1e-6)


def test_a_variance_and_its_logarithm_cost_the_same():
    mean, log_var, target = (np.float32(x) for x in (LOC, LOG_SCALE / 4, TARGET))
    for options in ({}, dict(full=True), dict(beta=0.5)):
        ours = gaussian_variance_nll_loss(
            mean, np.exp(log_var), target, min_variance=1e-12, reduction="none", **options
        )
        expected = gaussian_nll_loss(mean, log_var, target, reduction="none", **options)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_value_and_slopes_of_a_variance_match_fifty_digits():
    exact = lambda m, v, y: (mp.log(v) + (y - m) ** 2 / v) / 2
    off = units_off(
        lambda *a, **tail: gaussian_variance_nll_loss(*a, min_variance=1e-30, **tail),
        exact,
        LOC,
        np.exp(LOG_SCALE),
        TARGET,
    )
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_a_nan_variance_is_not_hidden_by_the_floor():
    assert np.isnan(gaussian_variance_nll_loss(zeros(1), np.float32([np.nan]), zeros(1)))


def test_a_diagonal_covariance_is_a_sum_of_gaussians():
    mean, scale, target = (GENERATOR.normal(size=(5, 3)).astype(np.float32) for _ in range(3))
    scale = np.exp(scale)
    factor = scale[..., None] * np.eye(3, dtype=np.float32)
    expected = gaussian_nll_loss(mean, 2 * np.log(scale), target, full=True, reduction="none")
    got = multivariate_gaussian_nll_loss(mean, factor, target, reduction="none")
    np.testing.assert_allclose(got, np.sum(expected, axis=-1), rtol=1e-5)


def test_what_stands_above_the_diagonal_is_ignored():
    factor, clean = np.float32([[1, np.nan], [0.5, 2]]), np.float32([[1, 0], [0.5, 2]])
    value, (_, slope, _) = value_and_gradients(
        multivariate_gaussian_nll_loss, zeros(2), factor, ones(2)
    )
    expected, _ = value_and_gradients(multivariate_gaussian_nll_loss, zeros(2), clean, ones(2))
    assert value == expected
    assert slope[0, 1] == 0
    assert np.all(np.isfinite(slope))


def test_checked_names_a_diagonal_that_is_not_positive():
    with pytest.raises(ValueError, match="multivariate_gaussian_nll_loss: scale_tril"):
        checked(multivariate_gaussian_nll_loss)(zeros(2), -np.eye(2, dtype=np.float32), zeros(2))
    with pytest.raises(ValueError, match="gaussian_variance_nll_loss: min_variance"):
        checked(gaussian_variance_nll_loss)(*[ones(1)] * 3, min_variance=0.0)
