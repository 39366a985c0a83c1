"""Elementwise regression losses: accuracy, kinks, masks under logarithms, what peers get wrong."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_off

from jaxloss import checked
from jaxloss.losses import regression
from jaxloss.losses.regression import (
    absolute_error,
    absolute_percentage_error,
    l2_loss,
    log_cosh,
    root_mean_squared_error,
    squared_error,
    squared_logarithmic_error,
    symmetric_absolute_percentage_error,
)

NUMBERS = arrays(np.float32, (6,), elements=st.integers(-800, 800).map(lambda n: n / 8))
POSITIVE = arrays(np.float32, (6,), elements=st.integers(1, 800).map(lambda n: n / 8))
ERRORS = [1e-12, 1e-7, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0, 9.0, 30.0, 100.0, 1e4]
SIGNED = [*ERRORS, *(-e for e in ERRORS)]
PAIRS = ([*SIGNED, *(1.5 + e for e in SIGNED)], [0.0] * len(SIGNED) + [1.5] * len(SIGNED))
COUNTS = ([0.0, 1e-4, 0.3, 2.0, 2.001, 50.0, 1e4], [1e-3, 2e-4, 0.8, 2.0, 2.0, 3.0, 9e3])


@pytest.mark.parametrize(
    ("loss", "exact", "points"),
    [
        (squared_error, lambda p, t: (p - t) ** 2, PAIRS),
        (l2_loss, lambda p, t: (p - t) ** 2 / 2, PAIRS),
        (absolute_error, lambda p, t: abs(p - t), PAIRS),
        (log_cosh, lambda p, t: mp.log(mp.cosh(p - t)), PAIRS),
        (squared_logarithmic_error, lambda p, t: (mp.log1p(p) - mp.log1p(t)) ** 2, COUNTS),
        (absolute_percentage_error, lambda p, t: abs(p - t) / abs(t), COUNTS),
        (
            symmetric_absolute_percentage_error,
            lambda p, t: 2 * abs(p - t) / (abs(p) + abs(t)),
            ([0.1, 2.0, 5.0, -3.0], [0.2, 2.001, 1.0, -2.0]),
        ),
    ],
    ids=lambda x: getattr(x, "__name__", "")[:40],
)
def test_value_and_slopes_match_fifty_digits(loss, exact, points):
    off = units_off(loss, exact, *points)
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_log_cosh_of_a_tiny_error_is_half_its_square():
    value = log_cosh(jnp.array([1e-4]), jnp.zeros(1))
    np.testing.assert_allclose(value, 0.5 * np.float64(np.float32(1e-4)) ** 2, rtol=2e-7)


def test_log_cosh_is_zero_with_curvature_one_at_equality():
    curve = jax.hessian(lambda x: log_cosh(x, 0.0))(jnp.float32(0))
    assert log_cosh(jnp.zeros(3), jnp.zeros(3)) == 0
    assert curve == 1


def test_log_cosh_in_float16_is_never_negative_and_reaches_the_largest_number():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    values = log_cosh(jnp.asarray(every), jnp.zeros_like(every), reduction="none")
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)


@given(NUMBERS, NUMBERS)
@settings(deadline=None)
def test_log_cosh_lies_between_its_two_asymptotes(pred, target):
    value = log_cosh(pred, target, reduction="none")
    size = np.abs(pred - target)
    assert np.all(value <= np.minimum(size, 0.5 * size**2) * (1 + 1e-6))
    assert np.all(value >= (size - np.log(2)) * (1 - 1e-6) - 1e-6)
    np.testing.assert_allclose(value, log_cosh(target, pred, reduction="none"), rtol=1e-6)


def test_weighted_means_divide_by_the_sum_of_the_weights():
    pred, zero, weights = jnp.array([1.0, 2.0]), jnp.zeros(2), jnp.array([1.0, 3.0])
    assert squared_error(pred, zero, weights=weights) == (1 * 1 + 3 * 4) / 4
    assert absolute_error(pred, zero, weights=weights) == (1 * 1 + 3 * 2) / 4


@pytest.mark.parametrize("loss", [regression.mse, regression.mae, log_cosh, regression.rmse])
def test_a_column_against_a_row_raises_instead_of_broadcasting(loss):
    with pytest.raises(ValueError, match=r"target: expected shape \(4, 1\), got \(4,\)"):
        loss(jnp.zeros((4, 1)), jnp.zeros(4))


@pytest.mark.parametrize(
    "loss", [absolute_error, absolute_percentage_error, symmetric_absolute_percentage_error]
)
@pytest.mark.parametrize("at", [0.0, 3.0])
def test_the_gradient_of_an_absolute_error_at_equality_is_zero(loss, at):
    value = jnp.full(2, at)
    for argnum in (0, 1):
        np.testing.assert_array_equal(jax.grad(loss, argnum)(value, value), 0)


@pytest.mark.parametrize(
    ("loss", "pred", "target"),
    [
        (absolute_percentage_error, [1.0, 0.0], [2.0, 0.0]),
        (squared_logarithmic_error, [1.0, -1.0], [2.0, 0.0]),
        (squared_logarithmic_error, [1.0, 0.0], [2.0, -3.0]),
    ],
)
def test_a_masked_singular_element_leaves_no_nan_in_the_gradient(loss, pred, target):
    where = jnp.array([True, False])
    pred, target = jnp.array(pred), jnp.array(target)
    for argnum in (0, 1):
        masked = jax.grad(loss, argnum)(pred, target, where=where)
        np.testing.assert_array_equal(masked, [jax.grad(loss, argnum)(pred[:1], target[:1])[0], 0])


def test_logarithmic_error_punishes_negative_predictions_only_in_their_own_unit():
    pred = jnp.array([-0.5, -1.0, -2.0, 3.0])
    values = squared_logarithmic_error(pred, jnp.zeros(4), reduction="none")
    np.testing.assert_allclose(values[0], np.log(0.5) ** 2, rtol=1e-6)
    assert np.isposinf(values[1])
    assert np.isnan(values[2])
    np.testing.assert_allclose(values[3], np.log(4) ** 2, rtol=1e-6)
    assert jax.grad(squared_logarithmic_error)(pred[:1], jnp.zeros(1))[0] < 0


def test_checked_names_the_argument_below_minus_one():
    with pytest.raises(ValueError, match="squared_logarithmic_error: pred"):
        checked(squared_logarithmic_error)(jnp.array([-2.0]), jnp.array([1.0]))


def test_half_precision_errors_are_squared_in_float32():
    error = jnp.full(4, 300, jnp.float16)
    assert squared_error(error, jnp.zeros_like(error)) == 300**2
    many = jnp.ones(4096, jnp.bfloat16)
    assert squared_error(many, jnp.zeros_like(many), reduction="sum") == 4096


def test_integer_targets_are_numbers_and_integer_predictions_are_refused():
    assert squared_error(jnp.array([1.5]), jnp.array([1])) == 0.25
    assert absolute_error(jnp.array([1.5]), np.array([True])) == 0.5
    with pytest.raises(TypeError, match="squared_error: pred"):
        squared_error(jnp.array([1]), jnp.array([1.5]))


@given(NUMBERS, NUMBERS)
@settings(deadline=None)
def test_twice_the_half_squared_error_is_the_squared_error(pred, target):
    whole = squared_error(pred, target, reduction="none")
    np.testing.assert_array_equal(2 * l2_loss(pred, target, reduction="none"), whole)


def test_short_names_are_the_same_functions():
    assert regression.mse is squared_error
    assert regression.mae is absolute_error
    assert regression.log_cosh_loss is log_cosh
    assert regression.msle is squared_logarithmic_error
    assert regression.mape is absolute_percentage_error
    assert regression.smape is symmetric_absolute_percentage_error
    assert regression.rmse is root_mean_squared_error


def test_percentage_of_a_zero_target_is_taken_of_the_floor():
    assert absolute_percentage_error(jnp.array([3.0]), jnp.zeros(1), floor=0.5) == 6
    assert absolute_percentage_error(jnp.zeros(1), jnp.zeros(1), floor=0.0) == 0


@given(NUMBERS, NUMBERS)
@settings(deadline=None)
def test_symmetric_percentage_is_symmetric_and_at_most_two(pred, target):
    values = symmetric_absolute_percentage_error(pred, target, reduction="none")
    assert np.all((values >= 0) & (values <= 2 * (1 + 1e-6)))
    swapped = symmetric_absolute_percentage_error(target, pred, reduction="none")
    np.testing.assert_allclose(values, swapped, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(values) == 0, pred == target)


@given(POSITIVE, POSITIVE)
@settings(deadline=None)
def test_percentages_do_not_depend_on_the_unit(pred, target):
    for loss in (absolute_percentage_error, symmetric_absolute_percentage_error):
        np.testing.assert_array_equal(
            loss(1024 * pred, 1024 * target, reduction="none"), loss(pred, target, reduction="none")
        )


def test_nothing_against_nothing_is_a_perfect_percentage():
    zero = jnp.zeros(3)
    value, slope = jax.value_and_grad(symmetric_absolute_percentage_error)(zero, zero)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_relative_errors_keep_their_gradient_at_extreme_scales(scale):
    pred, target = jnp.array([1.0, 2.0, -3.0]) * scale, jnp.array([2.0, 1.0, 1.0]) * scale
    slope = jax.grad(symmetric_absolute_percentage_error)(pred, target)
    size = (jnp.abs(pred) + jnp.abs(target)) / scale
    same = jnp.sign(pred) == jnp.sign(target)  # else the fraction is 2 and does not move
    expected = jnp.where(same, jnp.sign(pred - target) * 4 * target / scale / size**2, 0) / 3
    np.testing.assert_allclose(slope * scale, expected, atol=1e-6)


def test_root_mean_squared_error_of_a_perfect_row_has_gradient_zero():
    pred = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    target = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    slope = jax.grad(root_mean_squared_error)(pred, target)
    np.testing.assert_array_equal(slope[0], 0)
    np.testing.assert_allclose(slope[1], np.array([3, 4]) / (5 * np.sqrt(2)) / 2, rtol=1e-6)


def test_root_mean_squared_error_ignores_hidden_features_and_drops_empty_rows():
    pred = jnp.array([[3.0, jnp.nan, 4.0], [jnp.nan, jnp.inf, jnp.nan]])
    where = jnp.array([[True, False, True], [False, False, False]])
    loss = lambda p: root_mean_squared_error(p, jnp.zeros((2, 3)), where=where)
    value, slope = jax.value_and_grad(loss)(pred)
    np.testing.assert_allclose(value, 5 / np.sqrt(2), rtol=1e-6)
    assert np.all(np.isfinite(slope))
    with pytest.raises(ValueError, match="where: expected shape"):
        root_mean_squared_error(pred, pred, where=where[:, 0])


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_root_mean_squared_error_neither_overflows_nor_underflows(scale):
    row = jnp.array([[3.0, 4.0]]) * scale
    np.testing.assert_allclose(
        root_mean_squared_error(row, 0 * row), 5 * scale / np.sqrt(2), rtol=1e-6
    )


@given(NUMBERS, NUMBERS)
@settings(deadline=None)
def test_root_mean_squared_error_of_one_row_is_the_root_of_its_mean_squared_error(pred, target):
    np.testing.assert_allclose(
        root_mean_squared_error(pred, target), np.sqrt(squared_error(pred, target)), rtol=1e-6
    )
