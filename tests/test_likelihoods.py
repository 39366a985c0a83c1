"""Negative log-likelihoods against SciPy's densities, at their edges and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxloss

G = np.random.default_rng(0)
LOC, LOG_SCALE, TARGET = (G.standard_normal(64).astype(np.float32) for _ in range(3))


def test_a_hidden_poisson_rate_that_overflows_leaves_no_trace() -> None:
    log_rate, target = jnp.array([1.0, 1000.0]), jnp.array([2.0, 0.0])
    loss = lambda r: jaxloss.poisson_nll_loss(r, target, where=jnp.array([True, False]))
    value, slope = jax.value_and_grad(loss)(log_rate)
    np.testing.assert_allclose(value, np.e - 2, rtol=1e-6)
    np.testing.assert_allclose(slope, [np.e - 2, 0], rtol=1e-6)
    assert jaxloss.poisson_nll_loss(jnp.float32(1000), jnp.float32(0)) == jnp.inf


def test_the_full_poisson_loss_is_minus_the_log_probability() -> None:
    counts = np.arange(64)
    got = jaxloss.poisson_nll_loss(LOC, counts, full=True, reduction="none")
    expected = -stats.poisson.logpmf(counts, np.exp(LOC.astype(float)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_perfect_prediction_of_tiny_variance_is_finite() -> None:
    arrays = jnp.float32(1), jnp.float32(-100), jnp.float32(1)
    value, slopes = jax.value_and_grad(jaxloss.gaussian_nll_loss, (0, 1, 2))(*arrays)
    assert value == -50
    np.testing.assert_array_equal(slopes, [0, 0.5, 0])


def test_the_gaussian_loss_with_unit_variance_is_the_l2_loss() -> None:
    got = jaxloss.gaussian_nll_loss(LOC, jnp.zeros(64), TARGET)
    np.testing.assert_allclose(got, jaxloss.l2_loss(LOC, TARGET), rtol=1e-6)


def test_beta_weighs_by_the_variance_without_a_gradient() -> None:
    plain = jaxloss.gaussian_nll_loss(LOC, LOG_SCALE, TARGET, reduction="none")
    got = jaxloss.gaussian_nll_loss(LOC, LOG_SCALE, TARGET, beta=0.5, reduction="none")
    factor = np.exp(0.5 * LOG_SCALE)
    np.testing.assert_allclose(got, plain * factor, rtol=2e-6, atol=1e-6)
    total = lambda v, b: jaxloss.gaussian_nll_loss(LOC, v, TARGET, beta=b, reduction="sum")
    slope, unweighted = jax.grad(total)(LOG_SCALE, 0.5), jax.grad(total)(LOG_SCALE, 0.0)
    np.testing.assert_allclose(slope, unweighted * factor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("df", [1.0, 3.0, 30.0])
def test_the_student_loss_is_minus_the_log_density(df) -> None:
    got = jaxloss.student_t_nll_loss(LOC, LOG_SCALE, TARGET, df=df, reduction="none")
    expected = -stats.t.logpdf(TARGET.astype(float), df, LOC, np.exp(LOG_SCALE.astype(float)))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("df", [1e3, 1e6])
def test_the_student_loss_of_many_degrees_is_the_gaussian(df) -> None:
    got = jaxloss.student_t_nll_loss(LOC, LOG_SCALE, TARGET, df=df)
    gaussian = jaxloss.gaussian_nll_loss(LOC, 2 * LOG_SCALE, TARGET, full=True)
    exact = -stats.t.logpdf(TARGET.astype(float), df, LOC, np.exp(LOG_SCALE)).mean()
    np.testing.assert_allclose(got, exact, rtol=1e-5)
    if df == 1e6:
        np.testing.assert_allclose(got, gaussian, rtol=1e-3)


def test_the_laplace_loss_is_the_absolute_error_and_a_constant_at_unit_scale() -> None:
    got = jaxloss.laplace_nll_loss(LOC, jnp.zeros(64), TARGET)
    np.testing.assert_allclose(got, jaxloss.absolute_error(LOC, TARGET) + np.log(2), rtol=1e-6)
    assert jax.grad(jaxloss.laplace_nll_loss)(jnp.float32(1), jnp.float32(0), jnp.float32(1)) == 0


@pytest.mark.parametrize("loss", [jaxloss.poisson_nll_loss])
def test_full_must_be_a_bool(loss) -> None:
    with pytest.raises((ValueError, TypeError), match="full: expected"):
        loss(jnp.ones(2), jnp.ones(2), full="yes")
