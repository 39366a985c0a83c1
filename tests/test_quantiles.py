"""Quantiles, expectiles and insensitive tubes: minimisers, kinks and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxloss

SAMPLE = np.random.default_rng(0).standard_normal(201).astype(np.float32)


def minimiser(loss) -> float:
    """The constant prediction that costs least, by golden section in float64."""
    with jax.enable_x64(True):
        target = jnp.asarray(SAMPLE.astype(np.float64))
        cost = jax.jit(lambda c: loss(jnp.full_like(target, c), target))
        low, high, ratio = -4.0, 4.0, (5**0.5 - 1) / 2
        for _ in range(70):
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            low, high = (low, b) if cost(a) < cost(b) else (a, high)
        return (low + high) / 2


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_the_quantile_loss_is_smallest_at_the_quantile(q) -> None:
    found = minimiser(lambda p, t: jaxloss.quantile_loss(p, t, quantile=q))
    assert np.mean(found - 1e-6 > SAMPLE) <= q <= np.mean(found + 1e-6 >= SAMPLE)


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_the_expectile_loss_is_smallest_at_the_expectile(tau) -> None:
    found = minimiser(lambda p, t: jaxloss.expectile_loss(p, t, expectile=tau))
    np.testing.assert_allclose(found, stats.expectile(SAMPLE.astype(float), tau), atol=1e-6)


def test_the_median_loss_is_half_the_absolute_error_and_the_mean_loss_half_the_square() -> None:
    zero = jnp.zeros_like(SAMPLE)
    half = jaxloss.absolute_error(SAMPLE, zero) / 2
    np.testing.assert_allclose(jaxloss.quantile_loss(SAMPLE, zero), half, rtol=1e-6)
    half = jaxloss.squared_error(SAMPLE, zero) / 2
    np.testing.assert_allclose(jaxloss.expectile_loss(SAMPLE, zero), half, rtol=1e-6)


@pytest.mark.parametrize("loss", [jaxloss.quantile_loss, jaxloss.expectile_loss])
def test_the_gradient_of_a_hit_is_zero(loss) -> None:
    assert jax.grad(loss)(jnp.float32(2), jnp.float32(2)) == 0


def test_a_traced_quantile_gives_the_same_value_and_a_slope() -> None:
    loss = lambda q: jaxloss.quantile_loss(jnp.float32(1), jnp.float32(3), quantile=q)
    assert jax.jit(loss)(0.75) == 1.5
    assert jax.grad(loss)(jnp.float32(0.75)) == 2


def test_many_quantiles_cost_the_mean_of_each() -> None:
    quantiles = jnp.array([0.1, 0.5, 0.9])
    pred = jnp.asarray(np.random.default_rng(1).standard_normal((201, 3)), jnp.float32)
    each = [
        jaxloss.quantile_loss(pred[:, i], SAMPLE, quantile=q, reduction="none")
        for i, q in enumerate(quantiles)
    ]
    got = jaxloss.multi_quantile_loss(pred, SAMPLE, quantiles, reduction="none")
    np.testing.assert_allclose(got, np.mean(each, axis=0), rtol=1e-5)


def test_many_quantiles_must_match_the_last_axis() -> None:
    with pytest.raises(ValueError, match="multi_quantile_loss: "):
        jaxloss.multi_quantile_loss(jnp.ones((4, 3)), jnp.ones(4), jnp.array([0.1, 0.9]))


def test_checked_names_a_quantile_out_of_range() -> None:
    with pytest.raises(ValueError, match="quantile_loss: quantile: expected"):
        jaxloss.checked(jaxloss.quantile_loss)(jnp.ones(2), jnp.ones(2), quantile=jnp.float32(1.5))


@pytest.mark.parametrize(
    ("loss", "power"),
    [(jaxloss.epsilon_insensitive_loss, 1), (jaxloss.squared_epsilon_insensitive_loss, 2)],
)
def test_a_tube_costs_what_sticks_out_of_it(loss, power) -> None:
    error = jnp.array([0.0, 0.5, -0.5, 2.0, -3.0])
    got = loss(error, 0 * error, epsilon=0.5, reduction="none")
    np.testing.assert_allclose(got, np.array([0, 0, 0, 1.5, 2.5]) ** power)
    slope = jax.grad(lambda e: loss(e, jnp.zeros_like(e), epsilon=0.5, reduction="sum"))(error)
    outside = np.array([0, 0, 0, 1, -1]) * (1 if power == 1 else 2 * np.array([0, 0, 0, 1.5, 2.5]))
    np.testing.assert_allclose(slope, outside)


def test_a_tube_of_width_zero_is_the_absolute_error() -> None:
    zero = jnp.zeros_like(SAMPLE)
    got = jaxloss.epsilon_insensitive_loss(SAMPLE, zero, epsilon=0.0, reduction="none")
    np.testing.assert_array_equal(got, np.abs(SAMPLE))
    slope = jax.grad(lambda p: jaxloss.epsilon_insensitive_loss(p, 0 * zero[0], epsilon=0.0))
    assert slope(jnp.float32(0)) == 0
