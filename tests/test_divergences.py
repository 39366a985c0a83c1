"""Divergences: zeros in both arguments, accuracy near equality, ends and symmetry."""

from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxloss import checked
from jaxloss.losses.divergences import (
    confidence_penalty,
    generalized_kl_divergence,
    js_divergence,
    jsd_consistency_loss,
    kl_divergence,
    kl_divergence_with_log_targets,
)

GENERATOR = np.random.default_rng(0)
P, T = (GENERATOR.dirichlet(np.ones(5), 6).astype(np.float32) for _ in range(2))
LOGITS = (3 * GENERATOR.standard_normal((3, 6, 5))).astype(np.float32)
NEAR = GENERATOR.uniform(-1e-3, 1e-3, (6, 5)).astype(np.float32)
cases = settings(max_examples=30, deadline=None)
rows = arrays(np.float32, (4, 5), elements=st.floats(0, 1, width=16))


def softmax(logits: Any) -> np.ndarray:
    z = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)


def kl_oracle(t: Any, log_p: Any, *, extra: bool = False) -> list[float]:
    with mpmath.workdps(50):
        out = []
        for row, log_row in zip(np.float64(t), np.float64(log_p), strict=True):
            terms = [
                mpmath.mpf(a) * (mpmath.log(a) - mpmath.mpf(b)) + extra * (mpmath.exp(b) - a)
                for a, b in zip(row, log_row, strict=True)
            ]
            out.append(float(mpmath.fsum(terms)))
        return out


# Kullback-Leibler


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_target_of_zero_costs_nothing_even_where_the_prediction_is_zero() -> None:
    log_p = np.array([[np.log(0.5), np.log(0.5), -np.inf]], np.float32)
    target = np.array([[0.0, 1.0, 0.0]], np.float32)
    for loss, t in ((kl_divergence, target), (kl_divergence_with_log_targets, np.log(target))):
        value, gradient = jax.value_and_grad(loss, (0, 1))(log_p, t)
        np.testing.assert_allclose(value, np.log(2), rtol=1e-7)
        np.testing.assert_array_equal(gradient[0], [[0, -1, 0]])
        assert np.isfinite(gradient[1]).all()


def test_the_gradient_with_respect_to_a_target_of_zero_is_finite_unlike_optax() -> None:
    log_p, target = jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, 1.0])
    theirs = jax.grad(optax.losses.kl_divergence, 1)(log_p, target)
    assert np.isnan(theirs[0])
    ours = jax.grad(kl_divergence, 1)(log_p, target)
    np.testing.assert_allclose(ours, [np.log(2), 1 + np.log(2)], rtol=1e-6)


def test_an_impossible_prediction_of_a_possible_class_costs_infinity() -> None:
    log_p = np.array([[0.0, -np.inf]], np.float32)
    for loss in (kl_divergence, generalized_kl_divergence):
        assert loss(log_p, np.array([[0.5, 0.5]], np.float32)) == np.inf


def test_the_divergence_is_of_rows_not_of_elements_as_in_torch_mean() -> None:
    target = np.array([[0.9, 0.1]], np.float32)
    value = kl_divergence(np.log(np.full((1, 2), 0.5, np.float32)), target)
    np.testing.assert_allclose(value, np.log(2) - entropy(np.float64(target))[0], rtol=1e-6)


def test_equal_distributions_cost_exactly_nothing() -> None:
    log_t = jnp.log(T)
    for loss in (kl_divergence, generalized_kl_divergence):
        np.testing.assert_array_equal(loss(log_t, T, reduction="none"), 0)
    np.testing.assert_array_equal(kl_divergence_with_log_targets(log_t, log_t), 0)
    np.testing.assert_array_equal(js_divergence(T, T), 0)


def test_near_equality_the_generalized_divergence_keeps_its_digits_and_sign() -> None:
    log_p = (np.log(T) + NEAR).astype(np.float32)
    units = generalized_kl_divergence(log_p, T, reduction="none")
    # One ulp of log p moves the value by about |p - t| ulp(log p).
    scale = np.sum(np.abs(np.exp(np.float64(log_p)) - T) * np.spacing(np.abs(log_p)), axis=-1)
    error = np.abs(units - np.array(kl_oracle(T, log_p, extra=True)))
    assert np.all(error <= 4 * (scale + np.spacing(np.asarray(units))))
    assert np.all(units >= 0)


@given(t=rows, p=rows)
@cases
def test_the_generalized_divergence_is_never_negative_and_counts_missing_mass(
    t: Any, p: Any
) -> None:
    log_p = np.log(np.maximum(p, np.float32(1e-6)))
    units = generalized_kl_divergence(log_p, t, reduction="none")
    assert np.all(units >= 0)
    gaps = np.sum(np.exp(np.float64(log_p)) - np.float64(t), axis=-1)
    plain = kl_divergence(log_p, t, reduction="none")
    np.testing.assert_allclose(units, plain + gaps, rtol=1e-5, atol=1e-5)


def test_the_generalized_divergence_is_finite_where_prediction_or_target_vanishes() -> None:
    log_p = np.array([[-np.inf, 0.0, -200.0, 80.0]], np.float32)
    t = np.array([[0.0, 0.0, 1e-30, 1e-30]], np.float32)
    value, gradient = jax.value_and_grad(generalized_kl_divergence, (0, 1))(log_p, t)
    np.testing.assert_allclose(value, np.exp(80.0), rtol=1e-6)
    assert all(np.isfinite(g).all() for g in gradient)


def test_negative_targets_are_named_by_checked() -> None:
    bad = np.array([[1.5, -0.5]], np.float32)
    zeros = np.zeros((1, 2), np.float32)
    for loss in (kl_divergence, generalized_kl_divergence):
        with pytest.raises(ValueError, match=f"{loss.__name__}: target: expected values"):
            checked(loss)(zeros, bad)
    with pytest.raises(ValueError, match="js_divergence: probs: expected values"):
        checked(js_divergence)(bad, zeros)


def test_classes_may_be_on_any_axis() -> None:
    p, t = np.log(P).reshape(2, 3, 5), T.reshape(2, 3, 5)
    units = kl_divergence(p, t, reduction="none")
    for axis in (0, 1, -2):
        moved = [np.moveaxis(x, -1, axis) for x in (p, t)]
        np.testing.assert_array_equal(kl_divergence(*moved, axis=axis, reduction="none"), units)


# Jensen-Shannon


def js_oracle(p: Any, t: Any) -> float:
    with mpmath.workdps(50):
        total = mpmath.mpf(0)
        for a, b in zip(np.float64(p), np.float64(t), strict=True):
            a, b = mpmath.mpf(a), mpmath.mpf(b)
            m = (a + b) / 2
            total += sum(x * mpmath.log(x / m) for x in (a, b) if x > 0) / 2
        return float(total)


@pytest.mark.parametrize("step", [0.0, 1e-6, 1e-4, 1e-2, 0.3, 3.0])
def test_the_js_divergence_has_every_digit_also_near_equality(step: float) -> None:
    p = (T * np.exp(step * NEAR / 1e-3)).astype(np.float32)
    units = js_divergence(p, T, reduction="none")
    np.testing.assert_allclose(
        units, [js_oracle(a, b) for a, b in zip(p, T, strict=True)], rtol=2e-6
    )


@given(p=rows, t=rows)
@cases
def test_the_js_divergence_is_symmetric_and_at_most_log_two_of_the_mean_mass(
    p: Any, t: Any
) -> None:
    units = js_divergence(p, t, reduction="none")
    np.testing.assert_array_equal(units, js_divergence(t, p, reduction="none"))
    assert np.all(units >= 0)
    assert np.all(units <= np.log(2) * (p + t).sum(axis=-1) / 2 * (1 + 1e-6))


def test_disjoint_distributions_are_log_two_apart_with_finite_derivatives() -> None:
    p, t = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 1.0, 0.0]])
    value, gradient = jax.value_and_grad(js_divergence, (0, 1))(p, t)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-7)
    half = np.log(2) / 2
    np.testing.assert_allclose(gradient[0], [[half, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(gradient[1], [[0, half, 0]], rtol=1e-6)
    for point in (p, t):
        assert np.isfinite(jax.hessian(js_divergence)(p, point)).all()


def test_the_js_divergence_is_curved_like_a_quarter_of_chi_squared_at_equality() -> None:
    curve = jax.hessian(lambda p: js_divergence(p, T[0]))(T[0])
    np.testing.assert_allclose(curve, np.diag(1 / (4 * T[0])), rtol=1e-5)


# Consistency and confidence


def jsd_oracle(logits: Any) -> np.ndarray:
    p = softmax(logits)
    return entropy(p.mean(axis=0)) - entropy(p).mean(axis=0)


def test_the_consistency_loss_is_the_entropy_of_the_mean_minus_the_mean_entropy() -> None:
    with jax.enable_x64(True):
        wide = jsd_consistency_loss(LOGITS.astype(np.float64), reduction="none")
    np.testing.assert_allclose(wide, jsd_oracle(LOGITS), rtol=1e-12)
    single = jsd_consistency_loss(LOGITS, reduction="none")
    np.testing.assert_allclose(single, wide, rtol=2e-6)


def test_two_views_are_the_js_divergence_of_their_probabilities() -> None:
    units = jsd_consistency_loss(LOGITS[:2], reduction="none")
    p, t = softmax(LOGITS[:2]).astype(np.float32)
    np.testing.assert_allclose(units, js_divergence(p, t, reduction="none"), rtol=1e-5, atol=1e-7)


def test_agreeing_views_cost_nothing_and_almost_agreeing_ones_keep_their_digits() -> None:
    same = np.stack([LOGITS[0]] * 3)
    value, gradient = jax.value_and_grad(jsd_consistency_loss)(same)
    assert 0 <= value < 1e-12
    np.testing.assert_allclose(gradient, 0, atol=1e-8)
    close = same + np.stack([NEAR, -NEAR, 0 * NEAR])
    with jax.enable_x64(True):
        wide = np.asarray(jsd_consistency_loss(close.astype(np.float64), reduction="none"))
    single = jsd_consistency_loss(close, reduction="none")
    assert np.all(single > 0)
    np.testing.assert_allclose(single, wide, rtol=1e-3)  # the difference of entropies has none


def test_views_that_are_sure_of_different_classes_are_log_views_apart() -> None:
    logits = jnp.eye(3)[:, None] * 2e4
    value, gradient = jax.value_and_grad(jsd_consistency_loss)(logits)
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


def test_a_class_of_minus_infinity_in_some_or_all_views_is_finite() -> None:
    logits = LOGITS.copy()
    logits[:, :, 0], logits[1, :, 1] = -np.inf, -np.inf
    units = jsd_consistency_loss(logits, reduction="none")
    np.testing.assert_allclose(units, jsd_oracle(logits), rtol=2e-6)
    gradient = jax.grad(jsd_consistency_loss)(logits)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, :, 0], 0)


def test_the_mask_of_the_consistency_loss_covers_examples_not_views() -> None:
    logits, where = LOGITS.copy(), np.arange(6) != 2
    logits[:, 2] = np.nan
    expected = jsd_consistency_loss(np.delete(LOGITS, 2, axis=1))
    np.testing.assert_allclose(jsd_consistency_loss(logits, where=where), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="jsd_consistency_loss: logits: expected at least 2 axes"):
        jsd_consistency_loss(jnp.zeros(3))


def test_the_confidence_penalty_is_the_negative_entropy() -> None:
    units = confidence_penalty(LOGITS, reduction="none")
    np.testing.assert_allclose(units, -entropy(softmax(LOGITS)), rtol=2e-6)
    assert np.all((units <= 0) & (units >= -np.log(5) - 1e-6))


def test_a_class_of_minus_infinity_adds_no_entropy() -> None:
    logits = np.concatenate([LOGITS[0], np.full((6, 1), -np.inf, np.float32)], axis=-1)
    value, gradient = jax.value_and_grad(confidence_penalty)(logits)
    expected = jax.value_and_grad(confidence_penalty)(LOGITS[0])
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :5], expected[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[:, 5], 0)
