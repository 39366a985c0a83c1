"""Evidential losses: the marginal of the prior, huge evidence, Monte Carlo, kinks."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from oracle import units_off
from scipy import stats

from jaxloss import checked
from jaxloss.losses.evidential import (
    evidential_classification_loss,
    evidential_regression_loss,
)

GENERATOR = np.random.default_rng(0)
N = 24
GAMMA, TARGET = GENERATOR.normal(size=(2, N))
NU, BETA = np.exp(GENERATOR.uniform(-3, 3, (2, N)))
ALPHA = np.concatenate([1 + np.exp(GENERATOR.uniform(-3, 3, N - 4)), [1e5, 1e5, 30, 1e7]])
NIG = tuple(x.astype(np.float32) for x in (GAMMA, NU, ALPHA, BETA, TARGET))


def test_the_first_part_is_minus_the_log_density_of_student():
    gamma, nu, alpha, beta, target = (x.astype(float) for x in NIG)
    scale = np.sqrt(beta * (1 + nu) / (nu * alpha))
    expected = -stats.t.logpdf(target, 2 * alpha, gamma, scale)
    got = evidential_regression_loss(*NIG, regularization=0.0, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_value_and_slopes_match_eighty_digits_at_a_shape_of_ten_million():
    def exact(gamma, nu, alpha, beta, y):
        omega = 2 * beta * (1 + nu)
        whole = mp.log(mp.pi / nu) / 2 - alpha * mp.log(omega)
        whole += (alpha + mp.mpf(1) / 2) * mp.log(nu * (y - gamma) ** 2 + omega)
        whole += mp.loggamma(alpha) - mp.loggamma(alpha + mp.mpf(1) / 2)
        return whole + abs(y - gamma) * (2 * nu + alpha)

    off = units_off(evidential_regression_loss, exact, *NIG)
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_the_penalty_vanishes_at_equality_and_may_leave_the_mean_alone():
    arrays = [jnp.asarray(x) for x in NIG]
    slope = lambda **options: jax.grad(
        lambda g: evidential_regression_loss(g, *arrays[1:], reduction="sum", **options)
    )(arrays[0])
    np.testing.assert_allclose(
        slope(stop_error_gradient=True), slope(regularization=0.0), rtol=1e-6
    )
    assert np.max(np.abs(slope() - slope(regularization=0.0))) > 1
    equal = jax.grad(evidential_regression_loss)(*[jnp.ones(1)] * 5)
    np.testing.assert_array_equal(equal, 0)


def by_definition(evidence, y, weight):
    """The formula, with lgamma and digamma of mpmath."""
    with mp.workdps(60):
        alpha = [1 + mp.mpf(float(e)) for e in evidence]
        total = sum(alpha)
        value = sum(
            (t - a / total) ** 2 + a * (total - a) / (total**2 * (total + 1))
            for t, a in zip(y, alpha, strict=True)
        )
        left = [t + (1 - t) * a for t, a in zip(y, alpha, strict=True)]
        whole = sum(left)
        kl = mp.loggamma(whole) - mp.loggamma(len(left))
        kl += sum((a - 1) * (mp.psi(0, a) - mp.psi(0, whole)) - mp.loggamma(a) for a in left)
        return float(value + weight * kl)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e5])
def test_classification_follows_the_formula_from_no_evidence_to_much(size):
    evidence = (size * GENERATOR.uniform(0, 1, (6, 4))).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 0, 1])
    for weight in (0.0, 1.0):
        got = evidential_classification_loss(evidence, labels, kl_weight=weight, reduction="none")
        expected = [
            by_definition(e, np.eye(4)[t], weight) for e, t in zip(evidence, labels, strict=True)
        ]
        np.testing.assert_allclose(got, expected, rtol=2e-6)
    dense = np.eye(4, dtype=np.float32)[labels]
    for part in zip(
        jax.value_and_grad(evidential_classification_loss)(evidence, labels),
        jax.value_and_grad(evidential_classification_loss)(evidence, dense),
        strict=True,
    ):
        np.testing.assert_allclose(*part, rtol=1e-6)


def test_sure_and_right_costs_almost_nothing_with_every_digit():
    evidence = jnp.array([[1e6, 0.0, 0.0]])
    value, slope = jax.value_and_grad(evidential_classification_loss)(evidence, jnp.array([0]))
    np.testing.assert_allclose(value, by_definition(evidence[0], [1, 0, 0], 1.0), rtol=1e-6)
    assert 0 < value < 1e-11
    assert slope[0, 0] < 0
    assert np.all(slope[0, 1:] > 0)


def test_evidence_for_wrong_classes_is_punished_and_for_the_right_one_is_not():
    kl = lambda evidence: (
        evidential_classification_loss(evidence, jnp.array([0]))
        - evidential_classification_loss(evidence, jnp.array([0]), kl_weight=0.0)
    )
    assert kl(jnp.array([[50.0, 0.0, 0.0]])) == 0
    assert kl(jnp.array([[50.0, 3.0, 0.0]])) > 0.5


def test_the_squared_error_is_its_expectation_under_the_dirichlet():
    evidence = np.array([2.0, 0.5, 4.0])
    draws = stats.dirichlet(1 + evidence).rvs(200_000, random_state=1)
    errors = np.sum((np.array([0, 1, 0]) - draws) ** 2, axis=-1)
    got = evidential_classification_loss(
        jnp.asarray(evidence, jnp.float32)[None], jnp.array([1]), kl_weight=0.0
    )
    np.testing.assert_allclose(got, errors.mean(), atol=5 * errors.std() / len(errors) ** 0.5)


def test_a_bad_label_is_nan_and_one_class_costs_nothing():
    values = evidential_classification_loss(jnp.ones((2, 3)), jnp.array([3, 0]), reduction="none")
    np.testing.assert_array_equal(np.isnan(values), [True, False])
    assert evidential_classification_loss(jnp.ones((2, 1)), jnp.zeros(2, int)) == 0


def test_checked_names_the_parameter_out_of_range():
    arrays = dict(zip(("gamma", "nu", "alpha", "beta"), [jnp.ones(1)] * 4, strict=True))
    for name in ("nu", "alpha", "beta"):
        with pytest.raises(ValueError, match=f"evidential_regression_loss: {name}"):
            checked(evidential_regression_loss)(
                *{**arrays, name: jnp.zeros(1)}.values(), jnp.ones(1)
            )
    with pytest.raises(ValueError, match="evidential_classification_loss: evidence"):
        checked(evidential_classification_loss)(-jnp.ones((1, 2)), jnp.array([0]))
    with pytest.raises(ValueError, match=r"evidential_classification_loss: target.*\[0, 2\)"):
        checked(evidential_classification_loss)(jnp.ones((1, 2)), jnp.array([2]))
