"""Depth errors: perfect maps, holes of the sensor, fits that do not exist, medians under a mask."""

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

from jaxloss import checked
from jaxloss.losses import depth
from jaxloss.losses.depth import (
    align_scale_shift,
    berhu_loss,
    log_depth_error,
    scale_invariant_log_error,
    scale_shift_invariant_absolute_error,
    scale_shift_invariant_loss,
    silog_loss,
)

LOGARITHMIC = (silog_loss, scale_invariant_log_error, log_depth_error)
ALIGNED = (scale_shift_invariant_loss, scale_shift_invariant_absolute_error)
PER_IMAGE = (silog_loss, scale_invariant_log_error, *ALIGNED, berhu_loss)
ALL = (*PER_IMAGE, log_depth_error)
MAPS = arrays(np.float32, (3, 4, 5), elements=st.integers(1, 800).map(lambda n: n / 8))


def maps(*shape, seed=0):
    g = np.random.default_rng(seed)
    return tuple(g.uniform(0.5, 5, shape or (3, 4, 5)).astype(np.float32) for _ in range(2))


def finite(*trees):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(trees))


@pytest.mark.parametrize("loss", LOGARITHMIC)
def test_a_perfect_map_has_value_and_slope_zero(loss):
    x, _ = maps()
    both = jax.jit(lambda *xs: jax.jvp(jax.value_and_grad(loss), xs, xs))
    (value, slope), changes = both(x, x)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
    assert finite(changes)


@jax.jit
def logarithmic(pred, target, variance_focus):
    """Value and slope of the errors that forgive a scale."""
    losses = silog_loss, scale_invariant_log_error
    options = dict(variance_focus=variance_focus)
    return [jax.value_and_grad(loss)(pred, target, **options) for loss in losses]


@pytest.mark.parametrize("factor", [3.0, 0.1, 1e20])
def test_a_wrong_scale_alone_is_forgiven_by_full_focus_on_the_variance(factor):
    _, target = maps()
    found = logarithmic(np.float32(factor) * target, target, 1.0)
    for (value, slope), bound in zip(found, (1e-5, 1e-10), strict=True):
        assert 0 <= value < bound
        assert finite(slope)


def test_silog_matches_its_definition_in_float64():
    pred, target = maps(4, 6, 7)
    d = np.log(pred.astype(np.float64)) - np.log(target)
    for focus in (0.0, 0.5, 0.85, 1.0):
        squares = (d**2).mean((1, 2)) - focus * d.mean((1, 2)) ** 2
        options = dict(variance_focus=focus, reduction="none")
        np.testing.assert_allclose(
            scale_invariant_log_error(pred, target, **options), squares, rtol=1e-6
        )
        np.testing.assert_allclose(silog_loss(pred, target, **options), np.sqrt(squares), rtol=1e-6)


def test_nearly_equal_depths_keep_every_digit():
    near = [1.0, 1000.0, 1e-20, 1e20, 3.0, 1.5, 2.0, 0.4, 1e-3]
    far = [
        np.nextafter(np.float32(1), np.float32(2)),
        1000.01,
        1.001e-20,
        1.1e20,
        2.0,
        1.0,
        1.0,
        1.0,
        7.0,
    ]
    off = units_off(log_depth_error, lambda p, t: (mp.log(p) - mp.log(t)) ** 2, far, near)
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_depths_of_extreme_ratio_do_not_overflow():
    pred, target = (np.full((1, 1, 1), x, np.float32) for x in (1e30, 1e-30))
    both = jax.jit(jax.value_and_grad(log_depth_error, argnums=(0, 1)))
    value, slopes = jax.device_get(both(pred, target))
    np.testing.assert_allclose(value, (60 * np.log(10)) ** 2, rtol=1e-6)
    np.testing.assert_allclose(slopes[0] * 1e30, 120 * np.log(10), rtol=1e-5)
    np.testing.assert_allclose(slopes[1] * 1e-30, -120 * np.log(10), rtol=1e-5)


@pytest.mark.parametrize("depth", [0.0, -1.0])
@pytest.mark.parametrize("side", [0, 1])
def test_a_depth_that_is_not_positive_is_nan_in_its_own_image_alone(depth, side):
    both = maps()
    both[side][1, 2, 3] = depth
    for loss in (silog_loss, scale_invariant_log_error):
        units = loss(*both, reduction="none")
        np.testing.assert_array_equal(np.isnan(units), [False, True, False])
        with pytest.raises(ValueError, match="expected positive depths, got 1 that are not"):
            checked(loss)(*both)


@partial(jax.jit, static_argnums=0)
def under_mask(loss, pred, target, where):
    """Value and both slopes."""
    return jax.value_and_grad(loss, argnums=(0, 1))(pred, target, where=where)


@pytest.mark.parametrize("loss", ALL)
def test_holes_of_the_sensor_reach_neither_value_nor_slope(loss):
    pred, target = maps()
    where = np.ones(pred.shape, bool)
    where[:, 1, :4] = False
    both = lambda: jax.device_get(under_mask(loss, pred, target, where))
    other, expected = both()
    target[:, 1, :4] = 0, -1, np.nan, np.inf
    pred[0, 1, 2] = np.nan
    value, slopes = both()
    assert value == other
    for slope, same in zip(slopes, expected, strict=True):
        np.testing.assert_array_equal(slope, same)
        assert np.all(slope[~where] == 0)


@pytest.mark.parametrize("loss", PER_IMAGE)
def test_an_image_without_pixels_is_no_unit(loss):
    pred, target = maps()
    where = np.ones(pred.shape, bool)
    where[1] = False
    target[1] = np.nan
    value, (slope, _) = jax.device_get(under_mask(loss, pred, target, where))
    np.testing.assert_allclose(value, loss(pred[[0, 2]], target[[0, 2]]), rtol=1e-6)
    assert np.all(slope[1] == 0)
    value, slopes = jax.device_get(under_mask(loss, pred, target, where & False))
    assert value == 0
    np.testing.assert_array_equal(slopes, 0)


def test_sparse_pixels_are_fitted_as_a_dense_map_of_their_own():
    pred, target = maps(2, 6, 7)
    where = np.zeros(pred.shape, bool)
    where[:, ::2, 1::3] = True
    kept = lambda x: x[where].reshape(2, 1, -1)
    for loss in PER_IMAGE:
        np.testing.assert_allclose(
            loss(pred, target, where=where), loss(kept(pred), kept(target)), rtol=2e-6
        )


@pytest.mark.parametrize("loss", ALIGNED)
@pytest.mark.parametrize(("scale", "shift"), [(3.0, 7.0), (1e-3, -2.0), (1e25, 0.0), (1e-25, 0.0)])
def test_an_affine_change_of_the_prediction_changes_nothing(loss, scale, shift):
    pred, target = maps()
    np.testing.assert_allclose(loss(scale * pred + shift, target), loss(pred, target), rtol=2e-3)


def test_only_least_squares_forgives_a_negative_scale():
    pred, target = maps()
    plain, robust = ALIGNED
    np.testing.assert_allclose(plain(-2 * pred, target), plain(pred, target), rtol=1e-5)
    assert robust(-2 * target, target) > 0.1


@pytest.mark.parametrize("loss", ALIGNED)
def test_a_prediction_constant_but_for_rounding_has_scale_zero(loss):
    _, target = maps()
    g = np.random.default_rng(3)
    constants = np.ones(target.shape, np.float32)
    noisy = constants + (1e-7 * g.standard_normal(target.shape)).astype(np.float32)
    assert np.ptp(noisy) > 0
    for pred in (constants, noisy, np.float32(1e4) * noisy, 0 * constants):
        value, (slopes, _) = under_mask(loss, pred, target, np.ones(target.shape, bool))
        assert finite(slopes)
        np.testing.assert_array_equal(slopes, 0)
        assert value == loss(constants, target)
    variance = target.astype(np.float64).var((1, 2)).mean()
    np.testing.assert_allclose(scale_shift_invariant_loss(noisy, target), variance / 2, rtol=1e-6)


def test_a_single_pixel_fits_exactly():
    pred, target = maps()
    where = np.zeros(pred.shape, bool)
    where[0, 2, 3] = True
    for loss in ALIGNED:
        value, (slope, _) = under_mask(loss, pred, target, where)
        assert value == 0
        np.testing.assert_array_equal(slope, 0)


def test_the_loss_after_alignment_is_half_the_squared_error_of_the_aligned_map():
    pred, target = maps()
    where = np.random.default_rng(1).random(pred.shape) < 0.6
    aligned = np.asarray(align_scale_shift(pred, target, where=where))
    expected = [
        ((aligned - target)[i][where[i]].astype(np.float64) ** 2).mean() / 2 for i in range(3)
    ]
    units = scale_shift_invariant_loss(pred, target, where=where, reduction="none")
    np.testing.assert_allclose(units, expected, rtol=1e-5)
    for i in range(3):
        mean = target[i][where[i]].mean()
        np.testing.assert_allclose(aligned[i][~where[i]], mean, rtol=1e-6)


def test_an_aligned_map_takes_no_gradient_from_holes():
    pred, target = maps()
    where = np.ones(pred.shape, bool)
    where[0, 0, 0] = False
    pred[0, 0, 0] = target[0, 0, 0] = np.nan
    total = lambda p: jnp.sum(align_scale_shift(p, target, where=where) ** 2)
    assert finite(jax.jit(jax.value_and_grad(total))(pred))


def test_the_median_under_a_mask_does_not_count_zeros():
    x, kept = np.float32([[1, 2, 3, 100]]), np.array([[True, True, True, False]])
    median = jax.jit(depth._median)
    assert median(x, kept) == 2
    assert median(x, kept | True) == 2.5


@pytest.mark.parametrize("pixels", [1, 2, 5, 8])
def test_medians_share_their_gradient_among_the_middle_pixels(pixels):
    x = np.random.default_rng(0).permutation(pixels)[None].astype(np.float32)
    kept = np.ones(x.shape, bool)
    both = jax.jit(jax.value_and_grad(lambda x: depth._median(x, kept)[0, 0]))
    median, slope = both(x)
    np.testing.assert_allclose(median, np.median(x))
    middle = np.abs(x - np.median(x)) < 0.6
    np.testing.assert_allclose(slope, middle / middle.sum(), rtol=1e-6)
    _, tied = both(0 * x)
    np.testing.assert_allclose(tied, 1 / pixels, rtol=1e-6)


@pytest.mark.parametrize("trim", [0.0, 0.2, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("count", [5, 10, 20])
def test_trimming_drops_the_largest_errors(trim, count):
    pred, target = maps(2, 4, 5)
    where = np.zeros((2, 20), bool)
    where[:, :count] = True
    where = where.reshape(2, 4, 5)
    units = scale_shift_invariant_absolute_error(
        pred, target, trim=trim, where=where, reduction="none"
    )
    for i in range(2):
        sides = [x[i][where[i]].astype(np.float64) for x in (pred, target)]
        p, t = ((x - np.median(x)) / np.abs(x - np.median(x)).mean() for x in sides)
        errors = np.sort(np.abs(p - t))[: int((1 - trim) * count + 1e-9)]
        np.testing.assert_allclose(units[i], errors.sum() / (2 * count), rtol=1e-5, atol=1e-7)


def test_an_infinite_depth_that_is_kept_is_nan():
    pred, target = maps()
    target[1, 0, 0] = np.inf
    units = scale_shift_invariant_absolute_error(pred, target, reduction="none")
    np.testing.assert_array_equal(np.isnan(units), [False, True, False])


def reverse_huber(error, threshold):
    c = threshold * np.abs(error).max()
    return np.where(np.abs(error) <= c, np.abs(error), (error**2 + c**2) / (2 * c)).mean()


@pytest.mark.parametrize("threshold", [0.2, 0.5, 1.0])
def test_reverse_huber_matches_its_definition(threshold):
    pred, target = maps()
    expected = [reverse_huber(e.astype(np.float64), threshold) for e in pred - target]
    units = berhu_loss(pred, target, threshold=threshold, reduction="none")
    np.testing.assert_allclose(units, expected, rtol=1e-6)


def test_the_corner_of_reverse_huber_does_not_see_hidden_errors():
    pred, target = maps()
    where = np.ones(pred.shape, bool)
    where[:, 0, 0] = False
    pred[:, 0, 0] = 1e6
    units = berhu_loss(pred, target, where=where, reduction="none")
    expected = [
        reverse_huber((p - t)[w].astype(np.float64), 0.2)
        for p, t, w in zip(pred, target, where, strict=True)
    ]
    np.testing.assert_allclose(units, expected, rtol=1e-6)


berhu_of_two = jax.jit(jax.value_and_grad(berhu_loss))


def test_reverse_huber_of_a_perfect_map_is_zero_and_smooth_at_its_corner():
    x, _ = maps()
    value, (slope, _) = under_mask(berhu_loss, x, x, np.ones(x.shape, bool))
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
    sides = (np.float32([[[1, e]]]) for e in (0.5 - 1e-6, 0.5 + 1e-6))
    both = [berhu_of_two(e, np.zeros_like(e), threshold=0.5) for e in sides]
    np.testing.assert_allclose(both[0][0], both[1][0], rtol=1e-5)
    np.testing.assert_allclose(both[0][1], both[1][1], rtol=1e-5)


def test_reverse_huber_takes_the_largest_error_as_given():
    pred, target = np.float32([[[1, 4]]]), np.zeros((1, 1, 2), np.float32)
    _, slope = berhu_of_two(pred, target, threshold=0.5)
    np.testing.assert_allclose(slope, [[[1 / 2, 4 / 2 / 2]]])  # e / c with c = 2, over 2 pixels


@given(MAPS, MAPS)
@settings(deadline=None, max_examples=30)
def test_errors_are_never_negative_nor_nan(pred, target):
    for loss in ALL:
        units = loss(pred, target, reduction="none")
        assert np.all(np.asarray(units) >= 0)


@pytest.mark.parametrize("loss", PER_IMAGE)
def test_a_single_image_needs_its_batch_axis(loss):
    with pytest.raises(ValueError, match=r"pred: expected shape \(batch, height, width\)"):
        loss(np.ones((4, 5)), np.ones((4, 5)))
