"""Counts and amounts: large counts, large dispersions, zeros, and what ties them together."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from oracle import units_off
from scipy import stats

from jaxloss import checked
from jaxloss.losses.likelihoods import poisson_nll_loss
from jaxloss.losses.likelihoods_counts import (
    negative_binomial_nll_loss,
    tweedie_loss,
    zero_inflated_nll_loss,
)

GENERATOR = np.random.default_rng(0)
COUNT = np.concatenate([np.arange(12.0), [0.3, 0.9, 1.5], np.exp(GENERATOR.uniform(1, 13.8, 15))])
COUNT = np.concatenate([COUNT, [1e6, 1e6, 0.0, 3.0]])
NEAR = np.tile([1e-3, 0.1, 0.5, 3], 9)[: COUNT.size]
LOG_MEAN = np.log(COUNT + 0.5) + GENERATOR.normal(size=COUNT.size) * NEAR
LOG_R = np.concatenate([GENERATOR.uniform(-3, 8, COUNT.size - 6), [11.5, 30, 16, -20, 70, 30]])


def negative_binomial(a, b, y):
    mean, r = mp.exp(a), mp.exp(b)
    whole = mp.loggamma(r) + mp.loggamma(y + 1) - mp.loggamma(y + r)
    return whole + (y + r) * mp.log(r + mean) - r * b - y * a


def zero_inflated(nll, zero_nll, gate, y):
    p = 1 / (1 + mp.exp(-gate))
    return -mp.log(p + (1 - p) * mp.exp(-zero_nll)) if y == 0 else nll - mp.log(1 - p)


def test_negative_binomial_value_and_slopes_match_eighty_digits_up_to_a_million():
    off = units_off(negative_binomial_nll_loss, negative_binomial, LOG_MEAN, LOG_R, COUNT)
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_tweedie_value_and_slopes_match_eighty_digits():
    exact = lambda a, y: y * mp.exp(-a / 2) * 2 + 2 * mp.exp(a / 2)
    off = units_off(tweedie_loss, exact, np.append(LOG_MEAN, [60, -60]), np.append(COUNT, [2, 2]))
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_zero_inflated_value_and_slopes_match_eighty_digits():
    gate = np.tile([-60.0, -20, -3, -0.4, 0, 0.7, 4, 20], 12)
    zero_nll = np.repeat([1e-6, 0.01, 0.3, 2.0, 20, 80, -0.5, -3, -20, -1e-4, 5, 1], 8)
    nll = GENERATOR.uniform(0, 5, gate.size)
    for y in (0.0, 2.0):
        loss = lambda n, z, g, y=y, **tail: zero_inflated_nll_loss(
            n, z, g, jnp.full_like(n, y), **tail
        )
        exact = lambda n, z, g, y=y: zero_inflated(n, z, g, y)
        off = units_off(loss, exact, nll, zero_nll, gate)
        assert max(worst for worst, _ in off.values()) <= 4, off


def test_a_million_counts_near_their_mean_keep_their_digits():
    count, log_mean, r = np.float32(1e6), np.float32(np.log(1.001e6)), 50.0
    log_r = np.float32(np.log(r))
    expected = float(negative_binomial(*map(mp.mpf, map(float, (log_mean, log_r, count)))))
    got = negative_binomial_nll_loss(*(jnp.array([x]) for x in (log_mean, log_r, count)))
    np.testing.assert_allclose(got, expected, rtol=3e-7)


@pytest.mark.parametrize(("log_r", "tolerance"), [(12.0, 2e-4), (40.0, 1e-6), (200.0, 1e-6)])
def test_a_large_dispersion_parameter_is_poisson(log_r, tolerance):
    count, log_mean = jnp.arange(20.0), jnp.linspace(0, 3, 20)
    part = lambda loss, *a, **options: jax.value_and_grad(loss)(log_mean, *a, count, **options)
    theirs = part(poisson_nll_loss, full=True)
    for ours, expected in zip(
        part(negative_binomial_nll_loss, jnp.full(20, log_r)), theirs, strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=1e-7)


def test_the_probabilities_of_all_counts_add_up_to_one():
    count = jnp.arange(400.0)
    for log_r in (-2.0, 1.0):
        nll = negative_binomial_nll_loss(
            jnp.full(400, 1.7), jnp.full(400, log_r), count, reduction="none"
        )
        np.testing.assert_allclose(jnp.sum(jnp.exp(-nll)), 1, rtol=2e-3 if log_r < 0 else 1e-6)


def test_a_mean_of_zero_explains_no_event_and_is_free_without_one():
    log_mean, zero = jnp.full(2, -jnp.inf), jnp.zeros(2)
    values = negative_binomial_nll_loss(log_mean, zero, jnp.array([0.0, 2.0]), reduction="none")
    np.testing.assert_array_equal(values, [0, np.inf])
    slope = jax.grad(negative_binomial_nll_loss, (0, 1))(log_mean[:1], zero[:1], zero[:1])
    np.testing.assert_array_equal(slope, 0)


def test_mean_and_variance_are_what_the_names_say():
    log_mean, log_r = np.log(6.0), np.log(2.5)
    count = np.arange(300)
    p = np.exp(
        -np.asarray(
            negative_binomial_nll_loss(
                jnp.full(300, log_mean), jnp.full(300, log_r), count, reduction="none"
            )
        )
    )
    mean = np.sum(p * count)
    np.testing.assert_allclose(mean, 6, rtol=1e-5)
    np.testing.assert_allclose(np.sum(p * (count - mean) ** 2), 6 + 36 / 2.5, rtol=1e-5)


# Tweedie


def test_the_tweedie_loss_is_smallest_where_the_mean_is_the_target():
    target = jnp.array([0.2, 1.0, 30.0])
    for power in (1.01, 1.5, 1.99):
        slope = jax.grad(tweedie_loss)(jnp.log(target), target, power=power)
        np.testing.assert_allclose(slope / target, 0, atol=1e-6)


def test_no_amount_and_no_mean_cost_nothing():
    value, slope = jax.value_and_grad(tweedie_loss)(jnp.array([-jnp.inf]), jnp.zeros(1))
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
    assert np.isposinf(tweedie_loss(jnp.array([-jnp.inf]), jnp.ones(1)))


def test_checked_names_a_power_outside_one_and_two():
    for power in (1.0, 2.0):
        with pytest.raises(ValueError, match="tweedie_loss: power: expected a value between"):
            checked(tweedie_loss)(jnp.zeros(1), jnp.zeros(1), power=power)
    with pytest.raises(ValueError, match="negative_binomial_nll_loss: target"):
        checked(negative_binomial_nll_loss)(jnp.zeros(1), jnp.zeros(1), jnp.array([-1.0]))


# Zero-inflated


def test_a_closed_gate_leaves_the_distribution_as_it_is():
    count = jnp.arange(8.0)
    log_rate = jnp.full(8, 0.7)
    nll = poisson_nll_loss(log_rate, count, full=True, reduction="none")
    zero_nll = jnp.exp(log_rate)
    got = zero_inflated_nll_loss(nll, zero_nll, jnp.full(8, -jnp.inf), count, reduction="none")
    np.testing.assert_allclose(got, nll, rtol=1e-6)


def test_the_probabilities_of_a_zero_inflated_poisson_add_up_to_one():
    count = np.arange(60)
    nll = poisson_nll_loss(jnp.full(60, 1.7), count, full=True, reduction="none")
    gate = jnp.full(60, 0.4)
    got = zero_inflated_nll_loss(nll, jnp.exp(jnp.full(60, 1.7)), gate, count, reduction="none")
    expected = stats.poisson.pmf(count, np.exp(1.7)) * (1 - 1 / (1 + np.exp(-0.4)))
    expected[0] += 1 / (1 + np.exp(-0.4))
    np.testing.assert_allclose(np.exp(-got), expected, rtol=2e-5, atol=1e-12)


def test_what_a_count_does_not_need_may_be_anything():
    nll, zero_nll = jnp.array([jnp.nan, 1.0]), jnp.array([jnp.inf, jnp.nan])
    value, slopes = jax.value_and_grad(
        lambda *a: zero_inflated_nll_loss(*a, jnp.array([0, 3]), reduction="sum"), (0, 1, 2)
    )(nll, zero_nll, jnp.zeros(2))
    np.testing.assert_allclose(value, 1 + 2 * np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(slopes[0], [0, 1])
    assert np.all(np.isfinite(slopes))
