"""Alpha, Rényi and related divergences, and those of Gaussians: limits, zeros, digits, floors."""

from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxloss import checked
from jaxloss.losses import divergences_alpha
from jaxloss.losses.divergences import kl_divergence
from jaxloss.losses.divergences_alpha import (
    alpha_divergence,
    bhattacharyya_distance,
    chi_squared_divergence,
    hellinger_distance,
    renyi_divergence,
)
from jaxloss.losses.divergences_gaussian import gaussian_kl, multivariate_gaussian_kl

GENERATOR = np.random.default_rng(0)
P, Q = (GENERATOR.dirichlet(np.ones(5), 6).astype(np.float32) for _ in range(2))
LOG_Q = np.log(Q)
LOSSES = dict(
    alpha=alpha_divergence,
    renyi=renyi_divergence,
    hellinger=hellinger_distance,
    chi_squared=chi_squared_divergence,
    bhattacharyya=bhattacharyya_distance,
)
ALPHAS = (-2.0, -1e-3, 0.0, 1e-3, 0.3, 0.5, 0.999, 1.0, 1.001, 2.0, 6.0)


def power_sum(p: Any, log_q: Any, alpha: Any) -> Any:
    return mpmath.fsum(
        mpmath.mpf(a) ** alpha * mpmath.exp(mpmath.mpf(b) * (1 - alpha))
        for a, b in zip(map(float, p), map(float, log_q), strict=True)
    )


def alpha_oracle(p: Any, log_q: Any, alpha: float) -> float:
    """With the terms that add up to 0 for normalised rows; rounded ones are not quite."""
    with mpmath.workdps(60):
        a = mpmath.mpf(float(np.float32(alpha)))
        a += mpmath.mpf(10) ** -25 * (a in (0, 1))
        masses = a * mpmath.fsum(map(float, p))
        masses += (1 - a) * mpmath.fsum(mpmath.exp(float(b)) for b in log_q)
        return float((power_sum(p, log_q, a) - masses) / (a * (a - 1)))


def renyi_oracle(p: Any, log_q: Any, alpha: float) -> float:
    with mpmath.workdps(60):
        a = mpmath.mpf(float(np.float32(alpha)))
        a += mpmath.mpf(10) ** -25 * (a == 1)
        p, log_q = map(float, p), map(float, log_q)
        p, log_q = [mpmath.mpf(x) for x in p], [mpmath.mpf(x) for x in log_q]
        p, q = ([x / mpmath.fsum(row) for x in row] for row in (p, list(map(mpmath.exp, log_q))))
        total = mpmath.fsum(x**a * y ** (1 - a) for x, y in zip(p, q, strict=True))
        return float(mpmath.log(total) / (a - 1))


def every_alpha(log_q: Any, p: Any, alphas: Any) -> Any:
    """Units and gradients of both families for many alphas at once, at most eleven."""
    found = jax.device_get(eleven_alphas(log_q, p, np.resize(np.float32(alphas), 11)))
    return jax.tree.map(lambda x: x[: len(alphas)], found)


@jax.jit
def eleven_alphas(log_q: Any, p: Any, alphas: Any) -> Any:
    def one(alpha: Any) -> Any:
        out = {}
        for name in ("alpha", "renyi"):
            total = lambda *x, f=LOSSES[name]: f(*x, alpha=alpha, reduction="sum")
            units = LOSSES[name](log_q, p, alpha=alpha, reduction="none")
            out[name] = units, jax.grad(total, (0, 1))(log_q, p)
        return out

    return jax.vmap(one)(alphas)


def test_values_are_those_of_the_definition_for_every_alpha_near_and_at_zero_and_one() -> None:
    found = every_alpha(LOG_Q, P, ALPHAS)
    for i, alpha in enumerate(ALPHAS):
        exact = [alpha_oracle(p, q, alpha) for p, q in zip(P, LOG_Q, strict=True)]
        np.testing.assert_allclose(found["alpha"][0][i], exact, rtol=4e-6, err_msg=str(alpha))
        if alpha > 0:
            exact = [renyi_oracle(p, q, alpha) for p, q in zip(P, LOG_Q, strict=True)]
            np.testing.assert_allclose(found["renyi"][0][i], exact, rtol=4e-6, err_msg=str(alpha))


def test_at_alpha_one_both_are_the_kullback_leibler_divergence_and_at_zero_its_reverse() -> None:
    units, gradients = every_alpha(LOG_Q, P, [1.0, 0.999, 1.001, 0.0])["alpha"]
    log_q, p = np.float64(LOG_Q), np.float64(P)
    forward = np.sum(p * (np.log(p) - log_q) + np.exp(log_q) - p, axis=1)
    backward = np.sum(np.exp(log_q) * (log_q - np.log(p)) - np.exp(log_q) + p, axis=1)
    np.testing.assert_allclose(units[0], forward, rtol=2e-6)
    np.testing.assert_allclose(units[3], backward, rtol=2e-6)
    np.testing.assert_allclose(kl_divergence(LOG_Q, P, reduction="none"), units[0], rtol=1e-5)
    np.testing.assert_allclose(units[1:3], units[:1].repeat(2, 0), rtol=5e-3)  # 0.001 away
    np.testing.assert_allclose((units[1] + units[2]) / 2, units[0], rtol=1e-4)
    for gradient in gradients:
        np.testing.assert_allclose((gradient[1] + gradient[2]) / 2, gradient[0], atol=1e-4)
    renyi = every_alpha(LOG_Q, P, [1.0, 0.999, 1.001])["renyi"][0]
    np.testing.assert_allclose(renyi[0], units[0], rtol=2e-6)
    np.testing.assert_allclose((renyi[1] + renyi[2]) / 2, renyi[0], rtol=1e-4)


def test_equal_distributions_cost_exactly_nothing_and_have_finite_derivatives() -> None:
    log_p = np.log(P)
    p, ones = np.exp(log_p), np.ones((1, 1), np.float32)

    @jax.jit
    def derivatives(log_p: Any, p: Any, zeros: Any, ones: Any) -> Any:
        out = {}
        for name, loss in LOSSES.items():
            both, curve = jax.value_and_grad(loss, (0, 1)), jax.hessian(loss, (0, 1))
            out[name] = both(log_p, p), curve(log_p[:1], p[:1]), both(zeros, ones)
        return out

    for name, found in derivatives(log_p, p, 0 * ones, ones).items():
        (value, gradient), curve, of_one_class = found
        assert 0 <= value < 1e-6, name
        for x in (*gradient, *jax.tree.leaves(curve)):
            assert np.isfinite(x).all(), name
        for x in jax.tree.leaves(of_one_class):
            np.testing.assert_array_equal(x, 0, name)


def test_near_equality_all_digits_and_the_sign_are_kept() -> None:
    log_q = (np.log(P) + GENERATOR.uniform(-1e-3, 1e-3, P.shape)).astype(np.float32)
    for alpha in (-1.0, 0.5, 1.0, 3.0):
        units = alpha_divergence(log_q, P, alpha=alpha, reduction="none")
        exact = [alpha_oracle(p, q, alpha) for p, q in zip(P, log_q, strict=True)]
        spread = np.sum(np.abs(np.exp(log_q) - P) * np.spacing(np.abs(log_q)), axis=1)
        assert np.all(np.abs(units - np.asarray(exact)) <= 4 * (spread + np.spacing(units)))
        assert np.all(units >= 0)


def test_the_named_distances_are_members_of_the_family() -> None:
    units = {name: np.asarray(f(LOG_Q, P, reduction="none")) for name, f in LOSSES.items()}
    two = alpha_divergence(LOG_Q, P, alpha=2.0, reduction="none")
    np.testing.assert_allclose(units["chi_squared"], 2 * two, rtol=1e-6)
    np.testing.assert_allclose(units["hellinger"], np.sqrt(units["alpha"]) / 2, rtol=1e-6)
    np.testing.assert_allclose(units["bhattacharyya"], units["renyi"] / 2, rtol=1e-6)
    p, q = np.float64(P), np.exp(np.float64(LOG_Q))
    overlap = np.sum(np.sqrt(p * q), axis=1)
    np.testing.assert_allclose(units["hellinger"], np.sqrt(1 - overlap), rtol=1e-5)
    np.testing.assert_allclose(units["bhattacharyya"], -np.log(overlap), rtol=1e-5)
    np.testing.assert_allclose(units["chi_squared"], np.sum(p * p / q, axis=1) - 1, rtol=1e-5)


@jax.jit
def of_alpha(log_q: Any, p: Any, alpha: Any) -> Any:
    """Value and gradients of the alpha divergence."""
    return jax.value_and_grad(alpha_divergence, (0, 1))(log_q, p, alpha=alpha)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 1.0, 2.0])
def test_zero_probabilities_cost_what_the_formula_says(alpha) -> None:
    one, half = np.float32([[1, 0]]), np.float32([[0.5, 0.5]])
    with np.errstate(divide="ignore"):
        rows = {"missed": (np.log(one), half), "invented": (np.log(half), one)}
        rows["disjoint"] = np.log(one), one[:, ::-1]
        rows["both"] = np.log(one), one
    power = 0.5**alpha
    exact = dict(missed=power, invented=0.5 ** (1 - alpha), disjoint=0.0, both=1.0)
    for name, (log_q, p) in rows.items():
        endless = alpha >= 1 if name == "missed" else alpha <= 0 if name == "invented" else False
        endless |= name == "disjoint" and not 0 < alpha < 1
        value, gradient = of_alpha(log_q, np.ascontiguousarray(p), np.float32(alpha))
        if endless:
            assert value == np.inf
        elif alpha != 1:
            np.testing.assert_allclose(value, (exact[name] - 1) / (alpha * (alpha - 1)), atol=1e-7)
        assert all(np.isfinite(g).all() for g in gradient), name
    if alpha > 0:
        assert renyi_divergence(*rows["disjoint"], alpha=alpha) == np.inf


def test_distributions_without_a_common_class_are_at_distance_one() -> None:
    log_q = np.float32([[0, -np.inf, -1e4, -np.inf]])
    p = np.float32([[0, 1, 0, 0]])
    for loss, exact in ((hellinger_distance, 1), (bhattacharyya_distance, np.inf)):
        value, gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))(log_q, p)
        assert value == exact
        assert all(np.isfinite(g).all() for g in gradient)
    assert chi_squared_divergence(log_q, p) == np.inf


def test_predictions_of_a_saturated_softmax_are_finite() -> None:
    log_q = np.float32([[0.0, -1e4, -300.0]])
    p = np.float32([[0.2, 0.8, 0.0]])
    call = lambda z, alpha: alpha_divergence(jax.nn.log_softmax(z), p, alpha=alpha)
    both = jax.jit(jax.value_and_grad(call))
    for alpha in (0.01, 0.5, 0.99):
        value, gradient = both(log_q, alpha)
        np.testing.assert_allclose(value, (0.2**alpha - 1) / (alpha * (alpha - 1)), rtol=1e-5)
        assert np.isfinite(gradient).all()
    value = renyi_divergence(log_q, p, alpha=0.5)
    np.testing.assert_allclose(value, -np.log(0.2), rtol=1e-6)


def test_the_rule_has_every_derivative_of_the_plain_terms() -> None:
    with jax.enable_x64(True):
        arrays = np.float64(LOG_Q), np.float64(P), np.float64(0.3)
        moved = tuple(GENERATOR.standard_normal(np.shape(x)) for x in arrays)

        def derivatives(terms: Any) -> Any:
            total = lambda *x: jnp.sum(terms(*x) ** 2)
            gradient = jax.grad(total, (0, 1, 2))
            return jax.jvp(total, arrays, moved), jax.jvp(gradient, arrays, moved)

        kinds = divergences_alpha._alpha_terms, divergences_alpha._plain_terms
        got, expected = (jax.tree.leaves(jax.jit(derivatives, static_argnums=0)(f)) for f in kinds)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@given(p=arrays(np.float32, (6, 5), elements=st.floats(0, 1, width=16)), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_no_unit_is_below_zero_for_any_masses(p: Any, seed: int) -> None:
    log_q = np.random.default_rng(seed).uniform(-30, 0, p.shape).astype(np.float32)
    units = every_alpha(log_q, p, ALPHAS)["alpha"][0]
    assert not np.any(np.asarray(units) < 0)


def test_the_renyi_divergence_rises_with_its_order() -> None:
    alphas = [0.1, 0.5, 0.9, 1.0, 1.5, 4.0]
    units = np.asarray(every_alpha(LOG_Q, P, alphas)["renyi"][0])
    assert np.all(np.diff(units, axis=0) > 0)


def test_bad_targets_and_orders_are_named_by_checked() -> None:
    with pytest.raises(ValueError, match="hellinger_distance: target: expected values of at least"):
        checked(hellinger_distance)(LOG_Q, -P)
    with pytest.raises(ValueError, match="renyi_divergence: alpha: expected a number above 0"):
        checked(renyi_divergence)(LOG_Q, P, alpha=-1.0)


# Gaussians


def test_latents_are_summed_not_averaged() -> None:
    mean, log_variance = (GENERATOR.standard_normal((4, 1)).astype(np.float32) for _ in range(2))
    one = gaussian_kl(mean, log_variance)
    two = gaussian_kl(np.tile(mean, 2), np.tile(log_variance, 2))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_extreme_variances_are_finite_and_exact() -> None:
    log_variance = np.float32([[-80.0], [80.0], [1e-4], [-1e-4]])
    mean = np.zeros_like(log_variance)
    units = gaussian_kl(mean, log_variance, reduction="none")
    with mpmath.workdps(60):
        exact = [
            float((mpmath.expm1(v) - v) / 2)
            for v in map(mpmath.mpf, map(float, log_variance[:, 0]))
        ]
    np.testing.assert_allclose(units, exact, rtol=3e-7)
    gradient = jax.jit(jax.grad(gaussian_kl, (0, 1)))(mean, log_variance)
    assert all(np.isfinite(g).all() for g in gradient)
    far = dict(prior_log_variance=-300.0)
    assert (
        gaussian_kl(mean, log_variance - 300 * (log_variance < 0) - 380 * (log_variance > 0), **far)
        >= 0
    )


def test_the_prior_itself_costs_exactly_nothing() -> None:
    mean, log_variance = (GENERATOR.standard_normal((4, 3)).astype(np.float32) for _ in range(2))
    prior = dict(prior_mean=mean, prior_log_variance=log_variance)
    both = jax.value_and_grad(gaussian_kl, (0, 1))
    (value, gradient), curve = jax.jit(
        lambda *x, **prior: (both(*x, **prior), jax.hessian(gaussian_kl)(*x, **prior))
    )(mean, log_variance, **prior)
    np.testing.assert_array_equal([value, *map(np.max, map(np.abs, gradient))], 0)
    assert np.isfinite(curve).all()


def test_free_bits_floor_each_latent_and_stop_its_gradient() -> None:
    mean, log_variance = np.float32([[0.1, 2.0]]), np.zeros((1, 2), np.float32)
    call = lambda m, v: gaussian_kl(m, v, free_bits=0.5)
    value, gradient = jax.jit(jax.value_and_grad(call, (0, 1)))(mean, log_variance)
    np.testing.assert_allclose(value, 0.5 + 2.0, rtol=1e-6)
    np.testing.assert_allclose(gradient[0], [[0, 2]], rtol=1e-6)


def test_priors_hidden_by_the_mask_may_be_anything() -> None:
    mean, log_variance = (GENERATOR.standard_normal((2, 3)).astype(np.float32) for _ in range(2))
    where = np.array([True, False])
    bad = np.where(where[:, None], np.full((2, 3), 0.3), np.nan).astype(np.float32)
    call = lambda m, **prior: gaussian_kl(m, log_variance, where=where, **prior)
    both = jax.jit(jax.value_and_grad(call))
    value, gradient = both(mean, prior_mean=bad, prior_log_variance=bad)
    np.testing.assert_allclose(value, call(mean, prior_mean=0.3, prior_log_variance=0.3), rtol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0)
    with pytest.raises(ValueError, match=r"prior_mean: expected a scalar or shape \(2, 3\)"):
        gaussian_kl(mean, log_variance, prior_mean=np.zeros(3))


def test_a_diagonal_covariance_is_the_diagonal_divergence() -> None:
    mean, log_variance = (GENERATOR.standard_normal((4, 3)).astype(np.float32) for _ in range(2))
    factor = np.exp(log_variance / 2)[:, None] * np.eye(3, dtype=np.float32)
    upper = np.triu(np.full((3, 3), np.nan, np.float32), 1)  # never read
    got = multivariate_gaussian_kl(mean, factor + upper, reduction="none")
    np.testing.assert_allclose(got, gaussian_kl(mean, log_variance, reduction="none"), rtol=1e-5)
    prior = multivariate_gaussian_kl(mean, factor, prior_mean=mean, prior_scale_tril=factor)
    np.testing.assert_allclose(prior, 0, atol=1e-12)
    where = np.array([True, False, True, True])
    bad = np.where(where[:, None, None], factor, np.nan)
    call = lambda f: multivariate_gaussian_kl(mean, f, prior_scale_tril=f, where=where)
    value, gradient = jax.jit(jax.value_and_grad(call))(bad)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], 0)
