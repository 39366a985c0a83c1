"""Mixtures: against eighty digits, components of weight 0, large logits, one component."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from scipy import stats

from jaxloss.losses.likelihoods import gaussian_nll_loss
from jaxloss.losses.mixtures import gaussian_mixture_nll_loss, mixture_nll_loss

GENERATOR = np.random.default_rng(0)
K = 3
ROWS = {
    "plain": (GENERATOR.normal(size=(20, K)), GENERATOR.normal(size=(20, K))),
    "hard": (30 * GENERATOR.normal(size=(20, K)), 30 * GENERATOR.normal(size=(20, K))),
    "all alike": (GENERATOR.normal(size=(5, K)), np.full((5, K), 1e-5)),
    "nearly alike": (GENERATOR.normal(size=(5, K)), 1e-4 * GENERATOR.normal(size=(5, K))),
    "large logits": (1e4 + GENERATOR.normal(size=(5, K)), GENERATOR.normal(size=(5, K))),
    "a rare one is best": (np.array([[0.0, 0, -300]]), np.array([[0.0, 1, -350]])),
}


@jax.jit
def value_and_slopes(logits, nll):
    units = mixture_nll_loss(logits, nll, reduction="none")
    total = lambda *a: mixture_nll_loss(*a, reduction="sum")
    return units, jax.grad(total, (0, 1))(logits, nll)


@pytest.mark.parametrize("name", ROWS)
def test_value_and_slopes_match_eighty_digits(name):
    logits, nll = (x.astype(np.float32) for x in ROWS[name])
    value, slopes = value_and_slopes(logits, nll)
    exact, first, second = np.zeros(len(logits)), np.zeros_like(nll), np.zeros_like(nll)
    with mp.workdps(80):
        for i, (row, costs) in enumerate(zip(logits, nll, strict=True)):
            weights = [mp.exp(mp.mpf(float(z))) for z in row]
            p = [w / sum(weights) for w in weights]
            parts = [q * mp.exp(-mp.mpf(float(n))) for q, n in zip(p, costs, strict=True)]
            exact[i] = -mp.log(sum(parts))
            second[i] = [x / sum(parts) for x in parts]
            first[i] = [float(q - x / sum(parts)) for q, x in zip(p, parts, strict=True)]
    ulp = np.spacing(np.abs(exact).astype(np.float32))
    moved = (np.abs(first) * np.spacing(np.abs(logits)) + second * np.spacing(np.abs(nll))).sum(-1)
    assert np.max(np.abs(value - exact) / (ulp + moved)) <= 4
    for got, true in zip(slopes, (first, second), strict=True):
        assert np.max(np.abs(got - true)) <= 4 * np.spacing(np.max(np.abs(true)))


def test_a_component_of_weight_zero_may_have_any_cost():
    logits = jnp.array([[0.0, -jnp.inf]] * 3)
    for cost in (jnp.inf, -jnp.inf, jnp.nan):
        nll = jnp.array([[1.0, cost]] * 3)
        value, slopes = value_and_slopes(logits, nll)
        np.testing.assert_allclose(value, 1, rtol=1e-6)
        np.testing.assert_array_equal(slopes[1], [[1, 0]] * 3)
        assert np.all(np.isfinite(slopes[0]))


def test_an_impossible_target_costs_infinity_with_finite_slopes():
    value, slopes = value_and_slopes(jnp.zeros((1, 2)), jnp.full((1, 2), jnp.inf))
    assert np.isposinf(value)
    assert np.all(np.isfinite(slopes))


def test_one_component_is_itself():
    mean, log_scale, target = (GENERATOR.normal(size=9).astype(np.float32) for _ in range(3))
    zero = jnp.zeros((9, 1))
    got = gaussian_mixture_nll_loss(
        zero, mean[:, None], log_scale[:, None], target, reduction="none"
    )
    expected = gaussian_nll_loss(mean, 2 * log_scale, target, full=True, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_the_density_is_the_weighted_sum_of_gaussian_densities():
    logits, means, log_scales = (GENERATOR.normal(size=(20, K)) for _ in range(3))
    target = GENERATOR.normal(size=20)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    density = stats.norm.pdf(target[:, None], means, np.exp(log_scales))
    with jax.enable_x64(True):
        got = gaussian_mixture_nll_loss(logits, means, log_scales, target, reduction="none")
    np.testing.assert_allclose(got, -np.log(np.sum(p * density, -1)), rtol=1e-12)


def test_a_target_far_from_all_components_still_teaches_the_nearest():
    means = jnp.array([[0.0, 5.0]])
    slope = jax.grad(gaussian_mixture_nll_loss, 1)(
        jnp.zeros((1, 2)), means, jnp.zeros((1, 2)), jnp.array([1000.0])
    )
    np.testing.assert_allclose(slope, [[0, -995]], rtol=1e-6)
