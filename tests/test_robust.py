"""Huber-like and robust losses: their limits in one another, kinks, tails and extreme errors."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_off
from scipy import special
from scipy.optimize import least_squares

from jaxloss import checked
from jaxloss.losses.huber import (
    balanced_l1_loss,
    charbonnier_loss,
    huber_loss,
    pseudo_huber_loss,
    smooth_l1_loss,
)
from jaxloss.losses.regression import absolute_error, l2_loss
from jaxloss.losses.robust import (
    cauchy_loss,
    geman_mcclure_loss,
    general_robust_loss,
    tukey_biweight_loss,
    welsch_loss,
)

INF = math.inf
LINEAR = (huber_loss, smooth_l1_loss, charbonnier_loss, pseudo_huber_loss, balanced_l1_loss)
BOUNDED = (geman_mcclure_loss, welsch_loss, tukey_biweight_loss)
ALL = (*LINEAR, general_robust_loss, cauchy_loss, *BOUNDED)
NUMBERS = arrays(np.float32, (6,), elements=st.integers(-800, 800).map(lambda n: n / 8))
SIZES = [1e-25, 1e-12, 1e-7, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.65, 0.9, 1.1, 1.9, 2.1, 3.0, 4.6, 4.7]
SIZES += [8.0, 15.0, 30.0, 100.0, 1e3, 1e4, 1e7, 1e12, 1e18, 1e25]
ERRORS = np.array([*SIZES, *(-e for e in SIZES)], np.float32)
NEAR = np.array([e for e in ERRORS if abs(e) < 1e4] + [0.0], np.float32)


def exactly(x):
    """The number that float32 makes of x."""
    return mp.mpf(float(np.float32(x)))


def units(loss, error, **options):
    return loss(error, np.zeros_like(error), reduction="none", **options)


@partial(jax.jit, static_argnums=0)
def slopes(loss, error, **options):
    return jax.grad(lambda e: loss(e, jnp.zeros_like(e), reduction="sum", **options))(error)


A, B, C = exactly(0.3), exactly(0.7), exactly(4.685)


def balanced(e, alpha=0.5, gamma=1.5, beta=1.0):
    alpha, gamma, beta, e = exactly(alpha), exactly(gamma), exactly(beta), abs(e)
    b = mp.expm1(gamma / alpha)
    t = b * e / beta
    if e < beta:
        return alpha * beta / b * (1 + t) * mp.log1p(t) - alpha * e
    return gamma * e + gamma * beta / b - alpha * beta


def barron(x, alpha):
    """The definition, with its limits."""
    x = mp.mpf(x)
    if abs(alpha) == INF:
        return mp.expm1(math.copysign(1, alpha) * x**2 / 2) * math.copysign(1, alpha)
    if alpha in (0, 2):
        return mp.log1p(x**2 / 2) if alpha == 0 else x**2 / 2
    b = abs(mp.mpf(alpha) - 2)
    return b / alpha * ((x**2 / b + 1) ** (mp.mpf(alpha) / 2) - 1)


@pytest.mark.parametrize(
    ("loss", "exact", "options"),
    [
        (huber_loss, lambda e: e**2 / 2 if e < 1 else e - mp.mpf(0.5), {}),
        (
            huber_loss,
            lambda e: e**2 / 2 if e < B else B * (e - B / 2),
            dict(delta=0.7),
        ),
        (
            smooth_l1_loss,
            lambda e: e**2 / (2 * B) if e < B else e - B / 2,
            dict(beta=0.7),
        ),
        (charbonnier_loss, lambda e: mp.sqrt(e**2 + exactly(1e-3) ** 2), {}),
        (
            pseudo_huber_loss,
            lambda e: A**2 * (mp.sqrt(1 + (e / A) ** 2) - 1),
            dict(delta=0.3),
        ),
        (balanced_l1_loss, balanced, {}),
        (
            balanced_l1_loss,
            lambda e: balanced(e, 0.8, 1.2, 1.6),
            dict(alpha=0.8, gamma=1.2, beta=1.6),
        ),
        (cauchy_loss, lambda e: mp.log1p(e**2 / 2), {}),
        (geman_mcclure_loss, lambda e: 2 * e**2 / (e**2 + 4), {}),
        (welsch_loss, lambda e: -mp.expm1(-(min(e, mp.mpf(1e3)) ** 2) / 2), {}),
        (
            tukey_biweight_loss,
            lambda e: C**2 / 6 * (1 - (1 - min(e / C, 1) ** 2) ** 3),
            {},
        ),
        (general_robust_loss, lambda e: barron(e, 1), {}),
    ],
    ids=lambda x: getattr(x, "__name__", "").removesuffix("_loss"),
)
def test_value_and_slope_match_fifty_digits_in_every_region(loss, exact, options):
    off = units_off(loss, lambda p, t: exact(abs(p - t)), ERRORS, 0 * ERRORS, **options)
    assert max(worst for worst, _ in off.values()) <= 4, off


@pytest.mark.parametrize("loss", ALL)
def test_errors_of_any_size_give_finite_values_and_gradients(loss):
    assert np.all(np.isfinite(units(loss, ERRORS)))
    assert np.all(np.isfinite(slopes(loss, ERRORS)))


@pytest.mark.parametrize("loss", ALL)
def test_the_gradient_is_zero_and_the_curvature_finite_at_equality(loss):
    run = jax.jit(jax.value_and_grad(jax.grad(lambda e: loss(e, 0 * e))))
    slope, curve = run(np.float32(0))
    assert slope == 0
    assert np.isfinite(curve)


@pytest.mark.parametrize("loss", ALL)
@settings(deadline=None, max_examples=30)
@given(error=NUMBERS)
def test_every_loss_is_even_and_grows_with_the_error(loss, error):
    error = np.resize(np.sort(np.abs(error)), ERRORS.shape)
    values = np.asarray(units(loss, error))
    np.testing.assert_array_equal(values, units(loss, -error))
    assert np.all(np.diff(values[:6]) >= -1e-6 * np.max(values))


@settings(deadline=None, max_examples=30)
@given(NUMBERS)
def test_a_larger_alpha_never_costs_less(error):
    error = np.resize(error, NEAR.shape)
    chain = [
        np.asarray(units(general_robust_loss, error, alpha=a)) for a in (-INF, -2.0, 0.0, 1.0, 2.0)
    ]
    for lower, upper in itertools.pairwise(chain):
        assert np.all(lower <= upper * (1 + 1e-6))


# Huber


def test_huber_means_divide_by_the_sum_of_the_weights():
    error, zeros, weights = np.float32([1, 2]), np.zeros(2, np.float32), np.float32([1, 3])
    assert huber_loss(error, zeros, weights=weights) == (0.5 + 3 * 1.5) / 4


@pytest.mark.parametrize("loss", ALL)
def test_a_column_against_a_row_raises_instead_of_broadcasting(loss):
    with pytest.raises(ValueError, match=r"target: expected shape \(4, 1\), got \(4,\)"):
        loss(np.zeros((4, 1)), np.zeros(4))


@pytest.mark.parametrize("delta", [1e6, INF])
def test_huber_without_outliers_is_half_the_squared_error(delta):
    np.testing.assert_array_equal(units(huber_loss, NEAR, delta=delta), units(l2_loss, NEAR))
    np.testing.assert_array_equal(slopes(huber_loss, NEAR, delta=delta), NEAR)


def test_huber_of_a_small_delta_is_the_absolute_error_times_delta():
    values = units(huber_loss, NEAR, delta=1e-12) / np.float32(1e-12)
    np.testing.assert_allclose(values, np.abs(NEAR), rtol=1e-6, atol=1e-12)  # delta / 2


def test_huber_by_hand_and_against_scipy_with_a_traced_delta():
    delta = np.float32(0.5)
    assert jax.jit(lambda d: units(huber_loss, np.float32(2), delta=d))(delta) == 0.875
    np.testing.assert_allclose(
        units(huber_loss, NEAR, delta=delta),
        special.huber(0.5, NEAR.astype(float)),
        rtol=1e-6,
        atol=np.finfo(np.float32).tiny,
    )


def test_the_slope_of_huber_in_delta_is_the_excess_over_it():
    slope = jax.jit(jax.jacfwd(lambda d: units(huber_loss, NEAR, delta=d)))(np.float32(0.5))
    np.testing.assert_allclose(slope, np.maximum(np.abs(NEAR) - 0.5, 0), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_smooth_l1_is_huber_over_beta(beta):
    huber = np.asarray(units(huber_loss, NEAR, delta=beta)) / np.float32(beta)
    np.testing.assert_allclose(units(smooth_l1_loss, NEAR, beta=beta), huber, rtol=1e-6)
    assert units(smooth_l1_loss, np.float32(2), beta=0.5) == 1.75


@pytest.mark.parametrize("beta", [0.0, np.float32(0)])
def test_smooth_l1_of_width_zero_is_the_absolute_error(beta):
    np.testing.assert_array_equal(units(smooth_l1_loss, ERRORS, beta=beta), np.abs(ERRORS))
    error = np.array([0, 2, -3], np.float32)
    np.testing.assert_array_equal(slopes(smooth_l1_loss, error, beta=beta), [0, 1, -1])


@pytest.mark.parametrize(
    ("loss", "options", "kink", "slope"),
    [
        (smooth_l1_loss, dict(beta=0.25), 0.25, 1.0),
        (smooth_l1_loss, dict(beta=3.0), 3.0, 1.0),
        (huber_loss, dict(delta=3.0), 3.0, 3.0),
        (balanced_l1_loss, dict(beta=0.25), 0.25, 1.5),
        (balanced_l1_loss, dict(alpha=0.4, gamma=0.9, beta=3.0), 3.0, 0.9),
        (tukey_biweight_loss, dict(cutoff=3.0), 3.0, 0.0),
        (geman_mcclure_loss, {}, 2.0, 0.5),
    ],
)
def test_the_pieces_of_a_loss_meet_in_value_and_slope(loss, options, kink, slope):
    around = np.float32(kink) * np.array([1 - 1e-6, 1, 1 + 1e-6], np.float32)
    values = units(loss, around, **options)
    np.testing.assert_allclose(values, values[1], rtol=1e-5)
    np.testing.assert_allclose(slopes(loss, around, **options), slope, atol=1e-5)


def test_charbonnier_with_eps_zero_is_the_absolute_error_even_at_zero():
    np.testing.assert_array_equal(units(charbonnier_loss, ERRORS, eps=0.0), np.abs(ERRORS))
    np.testing.assert_array_equal(slopes(charbonnier_loss, np.zeros(2, np.float32), eps=0.0), 0)


def test_charbonnier_with_the_root_of_the_unsquared_eps_is_that_of_basicsr():
    error = NEAR.astype(np.float64)
    np.testing.assert_allclose(
        units(charbonnier_loss, NEAR, eps=math.sqrt(1e-12)), np.sqrt(error**2 + 1e-12), rtol=1e-6
    )


def test_pseudo_huber_keeps_small_errors_and_large_ones():
    values = units(pseudo_huber_loss, np.array([1e-4, 1e20], np.float32), delta=2.0)
    expected = [special.pseudo_huber(2, float(np.float32(1e-4))), 2e20]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert units(pseudo_huber_loss, np.float32(0), delta=0.0) == 0


def test_balanced_l1_at_beta_one_is_the_form_of_mmdetection():
    error = np.abs(NEAR).astype(np.float64)
    b = np.exp(1.5 / 0.5) - 1
    inside = 0.5 / b * (b * error + 1) * np.log(b * error / 1 + 1) - 0.5 * error
    expected = np.where(error < 1, inside, 1.5 * error + 1.5 / b - 0.5)
    np.testing.assert_allclose(units(balanced_l1_loss, NEAR), expected, rtol=1e-5, atol=1e-7)


# Bounded and redescending


def test_geman_mcclure_is_twice_the_textbook_form_of_double_the_scale():
    error = ERRORS[np.abs(ERRORS) < 1e12].astype(np.float64)
    textbook = error**2 / (error**2 + 3.0**2)
    values = units(geman_mcclure_loss, error.astype(np.float32), scale=1.5)
    np.testing.assert_allclose(values, 2 * textbook, rtol=1e-6, atol=1e-37)


def test_cauchy_is_that_of_scipy_least_squares_at_scale_f_over_root_two():
    error = np.array([0.3, -2.0, 40.0])
    fit = least_squares(
        lambda _: error, [0.0], jac="2-point", loss="cauchy", f_scale=1.7, max_nfev=1
    )
    values = units(cauchy_loss, error.astype(np.float32), scale=1.7 / math.sqrt(2))
    np.testing.assert_allclose(0.5 * 1.7**2 * values.sum(), fit.cost, rtol=1e-6)


def test_welsch_does_not_cancel_for_small_errors():
    np.testing.assert_allclose(units(welsch_loss, np.float32(1e-4)), 5e-9, rtol=1e-6)


def test_tukey_ignores_errors_beyond_the_cutoff():
    error = np.float32([2, 3.5, 1e20, -1e20])
    np.testing.assert_allclose(units(tukey_biweight_loss, error, cutoff=2.0), 4 / 6, rtol=1e-6)
    np.testing.assert_array_equal(slopes(tukey_biweight_loss, error, cutoff=2.0), 0)
    assert np.isnan(units(tukey_biweight_loss, np.float32([np.nan]))[0])


# Barron

ALPHAS = [-INF, -1e6, -10, -2, -1, -1e-3, -1e-6, 0, 1e-30, 1e-6, 1e-3, 0.5, 1, 1.5, 1.99]
ALPHAS += [2 - 1e-6, 2, 2 + 1e-6, 2.01, 3, 5, INF]
GRID = np.array([0, 1e-6, 1e-3, 0.01, 0.1, 0.5, 1, 1.5, 2, 3, 5, 8, 30, 100, 1e4, 1e8], np.float32)
FLOATS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 4e-6), (np.float64, 1e-14)], ids=["float32", "float64"]
)


def slope_in_alpha(x, alpha):
    """By differences, in digits enough for the step."""
    if abs(alpha) == INF:
        return mp.mpf(0)
    step = mp.mpf(10) ** -25 * min(1, abs(mp.mpf(alpha) - 2))
    return (barron(x, alpha + step) - barron(x, alpha - step)) / (2 * step)


def slope_in_x(x, alpha):
    if abs(alpha) == INF or alpha == 2:
        return mp.mpf(x) * (
            1 if alpha == 2 else mp.exp(math.copysign(1, alpha) * mp.mpf(x) ** 2 / 2)
        )
    return x * (mp.mpf(x) ** 2 / abs(mp.mpf(alpha) - 2) + 1) ** (mp.mpf(alpha) / 2 - 1)


@FLOATS
def test_barron_is_exact_for_every_alpha_in_value_and_both_slopes(dtype, tolerance):
    alphas = [float(dtype(a)) for a in ALPHAS]
    with jax.enable_x64(dtype == np.float64), mp.workdps(160):
        alpha, x = (
            np.ascontiguousarray(g)
            for g in np.meshgrid(np.array(alphas, dtype), GRID.astype(dtype))
        )
        zero = np.zeros_like(x)
        total = lambda x, a: general_robust_loss(x, zero, alpha=a, reduction="sum")
        got = (
            general_robust_loss(x, zero, alpha=alpha, reduction="none"),
            *jax.jit(jax.grad(total, (0, 1)))(x, alpha),
        )
        largest = float(np.finfo(dtype).max)
        for part, exact in zip(got, (barron, slope_in_x, slope_in_alpha), strict=True):
            for y, p, a in zip(*map(np.ravel, (part, x, alpha)), strict=True):
                if exact is slope_in_alpha and a == 2:  # infinite in truth, cut off here
                    assert np.isfinite(y)
                    continue
                true = exact(float(p), float(a))
                if true > largest:
                    assert np.isposinf(y), (exact.__name__, p, a, y)
                else:
                    # one factor of a product may be subnormal long before the product is
                    close = abs(y - true) <= tolerance * abs(true) + 100 * np.finfo(dtype).tiny
                    assert close, (exact.__name__, p, a, y, true)


@pytest.mark.parametrize(
    ("alpha", "special_case"),
    [
        (2.0, lambda x: l2_loss(x, 0 * x, reduction="none")),
        (1.0, lambda x: pseudo_huber_loss(x, 0 * x, reduction="none")),
        (0.0, lambda x: cauchy_loss(x, 0 * x, reduction="none")),
        (-2.0, lambda x: geman_mcclure_loss(x, 0 * x, reduction="none")),
        (-INF, lambda x: welsch_loss(x, 0 * x, reduction="none")),
    ],
)
@pytest.mark.parametrize("nudge", [0.0, 1e-6, -1e-6])
def test_barron_passes_through_its_special_cases(alpha, special_case, nudge):
    values = units(general_robust_loss, NEAR, alpha=np.float32(alpha + nudge))
    np.testing.assert_allclose(values, special_case(NEAR), rtol=1e-4 if nudge else 2e-6)


def test_barron_at_alpha_one_is_pseudo_huber_over_the_squared_scale():
    values = units(general_robust_loss, NEAR, scale=3.0)
    expected = units(pseudo_huber_loss, NEAR, delta=3.0) / 9
    np.testing.assert_allclose(values, expected, rtol=2e-6)


@jax.jit
def slope_of_alpha(error, alpha):
    return jax.grad(lambda a: general_robust_loss(error, 0 * error, alpha=a, reduction="sum"))(
        alpha
    )


@pytest.mark.parametrize("alpha", [2 + 1e-6, 3.0, 10.0, INF])
def test_barron_overflows_to_infinity_and_never_to_nan(alpha):
    x = np.array([0.0, 1.0, 40.0, 1e10, 1e25], np.float32)
    values, in_x = (
        units(general_robust_loss, x, alpha=alpha),
        slopes(general_robust_loss, x, alpha=alpha),
    )
    in_alpha = slope_of_alpha(x, np.float32(alpha))
    assert not any(np.any(np.isnan(part)) for part in (values, in_x, in_alpha))


def test_every_second_derivative_of_barron_is_finite():
    x, alpha = np.meshgrid([0.0, 1e-3, 1.0, 3.0], [-INF, -2.0, -1e-7, 0.0, 1.0, 2.0, 3.0])
    point = x.astype(np.float32), alpha.astype(np.float32)
    loss = lambda x, a: general_robust_loss(x, 0 * x, alpha=a, reduction="sum")
    along = jax.jit(lambda *move: jax.jvp(jax.grad(loss, (0, 1)), point, move)[1])
    one, zero = np.ones_like(point[0]), np.zeros_like(point[0])
    assert np.all(np.isfinite([along(one, zero), along(zero, one)]))


def test_the_curvature_of_barron_is_one_over_the_squared_scale_at_equality():
    loss = lambda e, alpha: general_robust_loss(e, 0 * e, alpha=alpha, scale=2.0)
    curvature = jax.jit(jax.hessian(loss))
    for alpha in (-INF, -2.0, 0.0, 1.0, 2.0, 3.0):
        np.testing.assert_allclose(curvature(np.float32(0), alpha), 0.25, rtol=1e-6)


def test_alpha_may_differ_from_element_to_element():
    x, alpha = np.float32([1, 2, 3]), np.float32([2, 0, -INF])
    together = units(general_robust_loss, x, alpha=alpha)
    apart = [np.asarray(units(general_robust_loss, x, alpha=alpha[i]))[i] for i in range(3)]
    np.testing.assert_allclose(together, apart, rtol=1e-6)
    with pytest.raises(ValueError, match=r"alpha: expected shape \(3,\), got \(2,\)"):
        units(general_robust_loss, x, alpha=alpha[:2])


def test_a_masked_alpha_is_invisible():
    where = np.array([True, False])
    loss = lambda x, a: general_robust_loss(x, 0 * x, alpha=a, where=where)
    both = jax.jit(jax.grad(loss, (0, 1)))
    clean = both(np.float32([1, 2]), np.float32([0.5, 1]))
    poisoned = both(np.float32([1, np.nan]), np.float32([0.5, np.nan]))
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(a, b)
        assert b[1] == 0


def test_a_learned_alpha_falls_when_there_are_outliers():
    error = np.float32([0.1, -0.2, 0.1, 50, 50])
    assert slope_of_alpha(error, np.float32(1)) > 0


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (huber_loss, dict(delta=-1.0)),
        (smooth_l1_loss, dict(beta=-1.0)),
        (pseudo_huber_loss, dict(delta=-1.0)),
        (balanced_l1_loss, dict(gamma=0.0)),
        (general_robust_loss, dict(scale=0.0)),
        (cauchy_loss, dict(scale=-1.0)),
        (geman_mcclure_loss, dict(scale=0.0)),
        (welsch_loss, dict(scale=0.0)),
        (tukey_biweight_loss, dict(cutoff=0.0)),
    ],
)
def test_checked_names_a_parameter_out_of_range(loss, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{loss.__name__}: {name}"):
        checked(loss)(np.ones(2, np.float32), np.zeros(2, np.float32), **options)
    checked(loss)(np.ones(2, np.float32), np.zeros(2, np.float32))


def test_smooth_l1_and_l1_agree_up_to_half_of_beta_far_out():
    error = np.float32([5, -7])
    np.testing.assert_allclose(
        units(absolute_error, error) - units(smooth_l1_loss, error, beta=0.5), 0.25
    )
