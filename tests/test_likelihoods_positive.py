"""Gamma and Beta likelihoods: large shapes, the ends of the interval, limits in one another."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from oracle import units_off
from scipy import integrate

from jaxloss import checked
from jaxloss.losses.likelihoods_positive import beta_distribution_nll_loss, gamma_nll_loss

GENERATOR = np.random.default_rng(0)
N = 40
LOG_SHAPE = np.concatenate([GENERATOR.uniform(-5, 5, N - 6), [11.5, 11.5, 25, -20, 40, 0]])
LOG_MEAN = GENERATOR.normal(size=N) * 3
AWAY = GENERATOR.normal(size=N) * np.exp(np.minimum(-LOG_SHAPE / 2, 0.5))
AMOUNT = np.exp(LOG_MEAN + AWAY)
LOG_A = np.concatenate([GENERATOR.uniform(-5, 5, N - 6), [11.5, 11.6, 16, -20, 20, 1]])
LOG_B = np.concatenate([GENERATOR.uniform(-5, 5, N - 6), [11.5, 9.0, 16, 2, -10, 0]])
MEAN = 1 / (1 + np.exp(LOG_B - LOG_A))
WIDTH = np.sqrt(MEAN * (1 - MEAN) / (1 + np.exp(LOG_A) + np.exp(LOG_B)))
SHARE = np.clip(MEAN + WIDTH * GENERATOR.normal(size=N), 1e-4, 0.9999)


def gamma(m, k, y):
    shape = mp.exp(k)
    return mp.loggamma(shape) - shape * (k - m) - (shape - 1) * mp.log(y) + y * mp.exp(k - m)


def beta(a, b, y):
    first, second = mp.exp(a), mp.exp(b)
    whole = mp.loggamma(first) + mp.loggamma(second) - mp.loggamma(first + second)
    return whole - (first - 1) * mp.log(y) - (second - 1) * mp.log1p(-y)


@pytest.mark.parametrize(
    ("loss", "exact", "columns"),
    [
        (gamma_nll_loss, gamma, (LOG_MEAN, LOG_SHAPE, AMOUNT)),
        (beta_distribution_nll_loss, beta, (LOG_A, LOG_B, SHARE)),
    ],
    ids=["gamma", "beta"],
)
def test_value_and_slopes_match_eighty_digits_up_to_shapes_of_millions(loss, exact, columns):
    off = units_off(loss, exact, *columns)
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_a_large_shape_near_its_mean_keeps_its_digits():
    shape, share = np.float32(np.log(1e5)), np.float32(0.501)
    expected = float(beta(mp.mpf(float(shape)), mp.mpf(float(shape)), mp.mpf(float(share))))
    got = beta_distribution_nll_loss(*(jnp.array([x]) for x in (shape, shape, share)))
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@pytest.mark.parametrize("logs", [(-0.5, 0.4), (1.0, 1.2), (0.0, 0.0)])
def test_the_densities_integrate_to_one(logs):
    first, second = (jnp.array(x) for x in logs)
    with jax.enable_x64(True):
        for loss, end in ((gamma_nll_loss, np.inf), (beta_distribution_nll_loss, 1)):
            density = jax.jit(lambda y, loss=loss: jnp.exp(-loss(first, second, y)))
            total, _ = integrate.quad(lambda y, f=density: float(f(y)), 0, end, limit=200)
            np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_a_target_of_zero_costs_plus_or_minus_infinity_and_never_nan():
    log_shape, zero = jnp.array([0.5, -0.5, 0.0]), jnp.zeros(3)
    log_mean = jnp.array([0.3, 0.3, 0.7])
    values = gamma_nll_loss(log_mean, log_shape, zero, reduction="none")
    np.testing.assert_array_equal(values, [np.inf, -np.inf, np.float32(0.7)])
    other = jnp.full(3, 0.2)
    for end, first, second in ((0.0, log_shape, other), (1.0, other, log_shape)):
        values = beta_distribution_nll_loss(first, second, zero + end, reduction="none")
        np.testing.assert_array_equal(values, [np.inf, -np.inf, np.float32(-0.2)])
    for loss in (gamma_nll_loss, beta_distribution_nll_loss):
        for slope in jax.grad(loss, (0, 1, 2))(log_shape, log_shape, zero):
            assert np.all(np.isfinite(slope))


def test_clipped_targets_are_finite_and_others_untouched():
    logs, target = jnp.array([0.5, 0.5, 0.5]), jnp.array([0.0, 0.3, 1.0])
    values = beta_distribution_nll_loss(logs, logs, target, clip=0.01, reduction="none")
    moved = beta_distribution_nll_loss(logs, logs, jnp.array([0.01, 0.3, 0.99]), reduction="none")
    np.testing.assert_array_equal(values, moved)
    slope = jax.grad(lambda t: beta_distribution_nll_loss(logs, logs, t, clip=0.01))(target)
    np.testing.assert_array_equal(slope == 0, [True, False, True])


def test_uniform_and_exponential_are_special_cases():
    zero, share = jnp.zeros(5), jnp.linspace(0.1, 0.9, 5)
    np.testing.assert_allclose(
        beta_distribution_nll_loss(zero, zero, share, reduction="none"), 0, atol=2e-7
    )
    mean = jnp.log(jnp.linspace(0.5, 2, 5))
    np.testing.assert_allclose(
        gamma_nll_loss(mean, zero, share, reduction="none"), mean + share / jnp.exp(mean), rtol=1e-6
    )


def test_both_are_mirrored_or_scaled_as_their_distributions_are():
    a, b = (jnp.asarray(x[:20], jnp.float32) for x in (LOG_A, LOG_B))
    y = jnp.arange(1, 21) / jnp.float32(32)  # 1 - y is exact
    np.testing.assert_allclose(
        beta_distribution_nll_loss(a, b, y, reduction="none"),
        beta_distribution_nll_loss(b, a, 1 - y, reduction="none"),
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        gamma_nll_loss(a + np.log(2), b, 2 * y, reduction="none"),
        gamma_nll_loss(a, b, y, reduction="none") + np.log(2),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_shape_beyond_all_bounds_is_finite_and_no_longer_learns():
    for log_shape in (-300.0, 300.0):
        parts = jax.value_and_grad(gamma_nll_loss, (0, 1))(
            jnp.zeros(1), jnp.full(1, log_shape), jnp.ones(1)
        )
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(parts))
        assert parts[1][1] == 0


def test_checked_names_targets_out_of_range():
    with pytest.raises(ValueError, match="gamma_nll_loss: target"):
        checked(gamma_nll_loss)(jnp.zeros(1), jnp.zeros(1), jnp.array([-1.0]))
    with pytest.raises(ValueError, match=r"beta_distribution_nll_loss: target.*\[0, 1\]"):
        checked(beta_distribution_nll_loss)(jnp.zeros(1), jnp.zeros(1), jnp.array([1.5]))
    with pytest.raises(ValueError, match="beta_distribution_nll_loss: clip"):
        checked(beta_distribution_nll_loss)(jnp.zeros(1), jnp.zeros(1), jnp.ones(1), clip=0.7)
