"""Quantiles, expectiles and insensitive tubes: kinks, minimisers and limits in one another."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_off
from scipy import stats

from jaxloss import checked
from jaxloss.losses.huber import huber_loss
from jaxloss.losses.quantiles import (
    epsilon_insensitive_loss,
    expectile_loss,
    multi_quantile_loss,
    quantile_crossing_penalty,
    quantile_huber_loss,
    quantile_loss,
    squared_epsilon_insensitive_loss,
)
from jaxloss.losses.regression import absolute_error, squared_error

NUMBERS = arrays(np.float32, (6,), elements=st.integers(-800, 800).map(lambda n: n / 8))
LEVELS = st.integers(0, 16).map(lambda n: n / 16)
ERRORS = np.array([1e-12, 1e-4, 0.1, 0.3, 0.41, 1.0, 7.0, 300.0], np.float32)
PRED = np.concatenate([ERRORS, -ERRORS, 1.5 + ERRORS, 1.5 - ERRORS])
TARGET = np.concatenate([0 * ERRORS, 0 * ERRORS, 1.5 + 0 * ERRORS, 1.5 + 0 * ERRORS])
PAIRS = [pair for pair in zip(PRED, TARGET, strict=True) if pair[0] != pair[1]]
Q, EPSILON = (mp.mpf(float(np.float32(x))) for x in (0.8, 0.35))


def rounded(p, t):
    size = abs(t - p)
    tip = size**2 / (2 * EPSILON) if size <= EPSILON else size - EPSILON / 2
    return abs(Q - (p > t)) * tip


@pytest.mark.parametrize(
    ("loss", "exact", "options"),
    [
        (quantile_loss, lambda p, t: max(Q * (t - p), (Q - 1) * (t - p)), dict(quantile=0.8)),
        (quantile_huber_loss, rounded, dict(quantile=0.8, delta=0.35)),
        (expectile_loss, lambda p, t: abs(Q - (p > t)) * (p - t) ** 2, dict(expectile=0.8)),
        (
            epsilon_insensitive_loss,
            lambda p, t: max(0, abs(p - t) - EPSILON),
            dict(epsilon=0.35),
        ),
        (
            squared_epsilon_insensitive_loss,
            lambda p, t: max(0, abs(p - t) - EPSILON) ** 2,
            dict(epsilon=0.35),
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_value_and_slopes_match_fifty_digits(loss, exact, options):
    off = units_off(loss, exact, *zip(*PAIRS, strict=True), **options)
    assert max(worst for worst, _ in off.values()) <= 4, off


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 1.0])
def test_the_gradient_of_a_quantile_at_equality_is_zero(quantile):
    value = jnp.array([0.0, 2.0])
    for argnum in (0, 1):
        slope = jax.grad(lambda *a: quantile_loss(*a, quantile=quantile), argnum)(value, value)
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("loss", [quantile_loss, expectile_loss, epsilon_insensitive_loss])
def test_a_nan_that_no_mask_hides_reaches_value_and_gradient(loss):
    for pair in ((jnp.nan, 1.0), (1.0, jnp.nan)):
        assert np.all(np.isnan(jax.value_and_grad(loss)(*map(jnp.float32, pair))))


@given(NUMBERS, NUMBERS)
@settings(deadline=None)
def test_the_median_is_half_the_absolute_error(pred, target):
    np.testing.assert_array_equal(
        quantile_loss(pred, target, reduction="none"),
        absolute_error(pred, target, reduction="none") / 2,
    )


@given(NUMBERS, NUMBERS)
@settings(deadline=None)
def test_the_middle_expectile_is_half_the_squared_error(pred, target):
    np.testing.assert_array_equal(
        expectile_loss(pred, target, reduction="none"),
        squared_error(pred, target, reduction="none") / 2,
    )


@pytest.mark.parametrize(
    ("loss", "name"), [(quantile_loss, "quantile"), (expectile_loss, "expectile")]
)
@settings(deadline=None)
@given(NUMBERS, NUMBERS, LEVELS)
def test_mirroring_both_arrays_turns_a_level_into_its_complement(loss, name, pred, target, level):
    np.testing.assert_allclose(
        loss(pred, target, reduction="none", **{name: level}),
        loss(-pred, -target, reduction="none", **{name: 1 - level}),
        rtol=1e-6,
    )


@pytest.mark.parametrize("level", [0.1, 0.5, 0.75])
def test_the_best_constant_under_the_pinball_loss_is_the_quantile(level):
    sample = jnp.asarray(np.random.default_rng(0).gumbel(size=41), jnp.float32)
    cost = lambda c: quantile_loss(jnp.full_like(sample, c), sample, quantile=level)
    best = sample[jnp.argmin(jax.vmap(cost)(sample))]
    assert best == np.quantile(sample, level, method="inverted_cdf")


@pytest.mark.parametrize("level", [0.1, 0.5, 0.75])
def test_the_slope_of_the_expectile_loss_vanishes_at_scipys_expectile(level):
    sample = np.random.default_rng(0).gumbel(size=41)
    centre = stats.expectile(sample, alpha=level)
    slope = jax.grad(lambda c: expectile_loss(jnp.full(41, c), sample, expectile=level))
    with jax.enable_x64(True):
        assert abs(slope(centre)) < 1e-12


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_no_constant_costs_less_than_the_quantile_between_samples_either(level):
    sample = np.random.default_rng(1).normal(size=201).astype(np.float32)
    cost = lambda c: quantile_loss(jnp.full(201, c), sample, quantile=level)
    grid = np.linspace(-3, 3, 601, dtype=np.float32)
    best = np.quantile(sample, level, method="inverted_cdf")
    assert cost(best) <= np.min(jax.vmap(cost)(grid)) * (1 + 1e-6)


def test_several_quantiles_cost_the_mean_of_each():
    generator = np.random.default_rng(0)
    pred, target = generator.normal(size=(5, 2, 3)), generator.normal(size=(5, 2))
    levels = np.array([0.1, 0.5, 0.9])
    pred, target, levels = (x.astype(np.float32) for x in (pred, target, levels))
    each = [
        quantile_loss(pred[..., k], target, quantile=levels[k], reduction="none") for k in range(3)
    ]
    together = multi_quantile_loss(pred, target, levels, reduction="none")
    assert together.shape == (5, 2)
    np.testing.assert_allclose(together, np.mean(each, axis=0), rtol=1e-6)


@settings(deadline=None)
@given(NUMBERS, NUMBERS, LEVELS)
def test_the_rounded_pinball_is_weighted_huber_and_tends_to_the_pinball(pred, target, level):
    part = lambda loss, **options: loss(pred, target, reduction="none", **options)
    plain = part(quantile_loss, quantile=level)
    for delta in (0.0, 1e-6):
        got = part(quantile_huber_loss, quantile=level, delta=delta)
        np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-6)
    middle = part(quantile_huber_loss, quantile=0.5, delta=2.0)
    np.testing.assert_allclose(middle, part(huber_loss, delta=2.0) / 4, rtol=1e-6)


@pytest.mark.parametrize("delta", [0.0, 1e-30, 0.5])
def test_the_tip_of_the_rounded_pinball_has_no_slope_and_all_its_slopes_are_finite(delta):
    pred = jnp.array([0.0, 1e-10, -3.0, 1e25])
    slopes = jax.grad(
        lambda p, t, d: quantile_huber_loss(p, t, quantile=0.3, delta=d, reduction="sum"), (0, 1, 2)
    )(pred, jnp.zeros(4), jnp.float32(delta))
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    assert slopes[0][0] == slopes[1][0] == 0
    np.testing.assert_allclose(slopes[0][2:], [-0.3, 0.7], rtol=1e-6)


def test_quantiles_in_order_cost_nothing_and_crossed_ones_their_overlap():
    ordered = jnp.array([[0.0, 1.0, 1.0], [3.0, 2.0, 4.0], [5.0, 4.0, 1.0]])
    got = quantile_crossing_penalty(ordered, reduction="none")
    np.testing.assert_array_equal(got, [0, 0.5, 2])
    with_margin = quantile_crossing_penalty(ordered, margin=0.5, reduction="none")
    np.testing.assert_array_equal(with_margin, [0.25, 0.75, 2.5])
    slope = jax.grad(quantile_crossing_penalty)(ordered)
    np.testing.assert_array_equal(6 * slope, [[0, 0, 0], [1, -1, 0], [1, 0, -1]])
    assert quantile_crossing_penalty(jnp.ones((2, 1)), margin=1.0) == 0


def test_a_masked_row_of_quantiles_costs_nothing_under_a_margin():
    pred, where = jnp.array([[0.0, 1.0], [jnp.nan, 0.0]]), jnp.array([True, False])
    got = quantile_crossing_penalty(pred, margin=2.0, where=where, reduction="none")
    np.testing.assert_array_equal(got, [1, 0])


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (((5, 3), (5, 1), (3,)), r"target: expected shape \(5,\), got \(5, 1\)"),
        (((5, 3), (5,), (2,)), r"quantiles: expected shape \(3,\), got \(2,\)"),
        (((5, 3), (5,), ()), r"quantiles: expected shape \(3,\), got \(\)"),
    ],
)
def test_quantiles_fit_the_last_axis_and_targets_the_rest(shapes, text):
    with pytest.raises(ValueError, match=text):
        multi_quantile_loss(*(jnp.zeros(shape) for shape in shapes))


def test_the_level_may_be_traced_and_learned():
    pred, target = jnp.array([1.0, 5.0]), jnp.array([3.0, 4.0])
    value, slope = jax.jit(
        jax.value_and_grad(lambda q: quantile_loss(pred, target, quantile=q, reduction="sum"))
    )(0.75)
    assert value == 0.75 * 2 + 0.25 * 1
    assert slope == 2 - 1


@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        (epsilon_insensitive_loss, absolute_error),
        (squared_epsilon_insensitive_loss, squared_error),
    ],
)
def test_a_tube_of_width_zero_is_the_plain_error(loss, plain):
    part = lambda f, **options: jax.value_and_grad(f)(PRED, TARGET, **options)
    for epsilon in (0.0, jnp.float32(0)):
        for ours, theirs in zip(part(loss, epsilon=epsilon), part(plain), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("loss", [epsilon_insensitive_loss, squared_epsilon_insensitive_loss])
def test_inside_the_tube_and_on_its_border_nothing_pulls(loss):
    error = jnp.array([0.0, 0.25, -0.5, 0.5])
    value, slope = jax.value_and_grad(loss)(error, jnp.zeros(4), epsilon=0.5)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (quantile_loss, dict(quantile=1.5)),
        (quantile_huber_loss, dict(quantile=-0.5)),
        (quantile_huber_loss, dict(delta=-1.0)),
        (expectile_loss, dict(expectile=-0.5)),
        (epsilon_insensitive_loss, dict(epsilon=-1.0)),
        (squared_epsilon_insensitive_loss, dict(epsilon=-1.0)),
    ],
)
def test_checked_names_a_parameter_out_of_range(loss, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{loss.__name__}: {name}"):
        checked(loss)(jnp.ones(2), jnp.zeros(2), **options)
    with pytest.raises(ValueError, match="quantile_crossing_penalty: margin"):
        checked(quantile_crossing_penalty)(jnp.ones((2, 2)), margin=-1.0)
    with pytest.raises(ValueError, match="multi_quantile_loss: quantiles"):
        checked(multi_quantile_loss)(jnp.ones((2, 1)), jnp.zeros(2), jnp.array([1.5]))
