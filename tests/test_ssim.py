"""SSIM against its definition, at constant and inverted images, under masks, over scales."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxloss._core.windows import box_moments, pad_reflect, whole_windows, window_mean
from jaxloss.losses.ssim import ms_ssim, ms_ssim_l1_loss, ms_ssim_loss, ssim, ssim_loss, ssim_map


def draw(*shape, seed=0, count=2, low=0.0, high=1.0):
    g = np.random.default_rng(seed)
    return tuple(g.uniform(low, high, shape).astype(np.float32) for _ in range(count))


def gaussian(window, sigma):
    offset = np.arange(window) - (window - 1) / 2
    taps = np.exp(-0.5 * (offset / sigma) ** 2)
    return taps / taps.sum()


def windows(x, window):
    """The pixels of every window: `batch *windows channels *window`."""
    axes = tuple(range(1, x.ndim - 1))
    return np.lib.stride_tricks.sliding_window_view(x, (window,) * len(axes), axis=axes)


def factors(pred, target, window, sigma, c1, c2):
    """Luminance and contrast-structure of each window, from the definition, in float64."""
    p, t = (windows(x.astype(np.float64), window) for x in (pred, target))
    space = pred.ndim - 2
    taps = np.ones(())
    for _ in range(space):
        taps = taps[..., None] * gaussian(window, sigma)
    axes = tuple(range(-space, 0))
    mean = lambda x: (taps * x).sum(axes)
    mp, mt = mean(p), mean(t)
    spread = lambda m: m.reshape(m.shape + (1,) * space)
    dp, dt = p - spread(mp), t - spread(mt)
    luminance = (2 * mp * mt + c1) / (mp**2 + mt**2 + c1)
    return luminance, (2 * mean(dp * dt) + c2) / (mean(dp**2) + mean(dt**2) + c2)


@pytest.mark.parametrize("shape", [(2, 25, 3), (2, 13, 14, 2), (1, 80, 11, 1), (1, 12, 11, 13, 1)])
def test_the_map_follows_the_definition_in_any_number_of_dimensions(shape):
    pred, target = draw(*shape)
    luminance, structure = factors(pred, target, 11, 1.5, 0.01**2, 0.03**2)
    got = ssim_map(pred, target)
    np.testing.assert_allclose(got, luminance * structure, rtol=1e-4, atol=2e-6)
    axes = tuple(range(1, got.ndim))
    units = ssim(pred, target, reduction="none")
    np.testing.assert_allclose(units, (luminance * structure).mean(axes), atol=1e-6)


def test_blocks_of_a_long_axis_leave_no_seams():
    pred, target = draw(1, 200, 12, 1)
    whole = np.asarray(ssim_map(pred, target))
    for start in (0, 55, 60, 120, 180):
        part = ssim_map(pred[:, start : start + 20], target[:, start : start + 20])
        np.testing.assert_allclose(whole[:, start : start + 10], part, rtol=1e-4, atol=1e-5)


def test_equal_images_have_the_best_score_exactly_and_gradient_zero():
    (image,) = draw(2, 12, 13, 2, count=1)
    over_scales = [partial(function, window=3) for function in (ms_ssim_loss, ms_ssim)]
    for functions, images in (
        ((ssim_loss, ssim), (image, image + 1000)),
        (over_scales, (np.tile(image, (1, 3, 3, 1)),)),
    ):
        run = jax.jit(lambda *x, f=functions: [jax.value_and_grad(function)(*x) for function in f])
        for x in images:
            for best, (value, slope) in enumerate(run(x, x)):
                assert value == best
                np.testing.assert_array_equal(slope, 0)


def test_a_bright_constant_image_with_tiny_noise_stays_in_range():
    g = np.random.default_rng(0)
    pred, target = (1000 + 1e-3 * g.standard_normal((2, 2, 16, 17, 1))).astype(np.float32)
    for window in (3, 11):
        sized = {"window": window}
        both = jax.jit(lambda *x, o=sized: (ssim_map(*x, **o), jax.grad(ssim_loss)(*x, **o)))
        got, slope = jax.device_get(both(pred, target))
        luminance, structure = factors(pred, target, window, 1.5, 0.01**2, 0.03**2)
        assert np.all((got >= -1) & (got <= 1))
        np.testing.assert_allclose(got, luminance * structure, atol=2e-4)
        assert np.all(np.isfinite(slope))


def test_the_loss_keeps_its_digits_where_images_are_nearly_equal():
    pred, _ = draw(1, 16, 16, 1)
    target = (pred + 1e-4 * draw(1, 16, 16, 1, seed=1)[0]).astype(np.float32)
    luminance, structure = factors(pred, target, 11, 1.5, 0.01**2, 0.03**2)
    exact = (1 - luminance * structure).mean()
    assert exact < 1e-6
    np.testing.assert_allclose(ssim_loss(pred, target), exact, rtol=1e-4)


def test_constant_images_differ_in_luminance_alone():
    a, b = 0.25, 0.75
    pred, target = (np.full((1, 11, 12, 1), x, np.float32) for x in (a, b))
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    np.testing.assert_allclose(ssim(pred, target), expected, rtol=1e-6)


def test_the_range_of_the_data_scales_the_constants():
    pred, target = draw(2, 12, 12, 1)
    expected = ssim(pred, target, reduction="none")
    got = ssim(255 * pred, 255 * target, max_value=255.0, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    assert not np.allclose(ssim(255 * pred, 255 * target, reduction="none"), expected, rtol=1e-3)


def test_the_loss_is_neither_halved_nor_clipped_nor_downsampled():
    board = np.indices((300, 300)).sum(0) % 2
    pred = board.astype(np.float32)[None, ..., None]
    loss = ssim_loss(pred, 1 - pred)
    np.testing.assert_allclose(loss, 1 - ssim(pred, 1 - pred), rtol=1e-6)
    assert 1.98 < loss <= 2


def test_a_window_is_kept_only_if_all_its_pixels_are():
    pred, target = draw(2, 8, 9, 2)
    where = np.ones((2, 8, 9), bool)
    where[0, 2, 3] = where[1, 7, 0] = False
    options = dict(window=3, sigma=1.0)
    kept = windows(where[..., None], 3).all((-1, -2))
    assert kept.sum() == 2 * 6 * 7 - 9 - 1
    np.testing.assert_array_equal(jax.jit(whole_windows, static_argnums=1)(where, 3), kept[..., 0])
    maps = np.asarray(ssim_map(pred, target, **options), np.float64)
    expected = [m[k[..., 0]].mean() for m, k in zip(maps, kept, strict=True)]
    got = ssim(pred, target, where=where, reduction="none", **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_an_image_without_a_whole_window_is_no_unit():
    pred, target = draw(2, 5, 5, 1)
    where = np.ones((2, 5, 5), bool)
    where[0, 2, 2] = False
    got = ssim_loss(pred, target, window=3, where=where)
    np.testing.assert_allclose(got, ssim_loss(pred[1:], target[1:], window=3), rtol=1e-6)
    assert ssim_loss(pred[:1], target[:1], window=3, where=where[:1]) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-3, 3), st.floats(0, 6))
def test_the_score_is_symmetric_and_bounded(seed, offset, decades):
    g = np.random.default_rng(seed)
    pred, target = (
        (10.0**offset + 10 ** (offset - decades) * g.standard_normal((1, 6, 7, 1))).astype("f4")
        for _ in range(2)
    )
    one, other = (ssim_map(*pair, window=3) for pair in ((pred, target), (target, pred)))
    np.testing.assert_array_equal(one, other)
    assert np.all(np.abs(one) <= 1)


def test_images_smaller_than_the_window_are_an_error():
    image = np.zeros((1, 5, 9, 1), np.float32)
    for loss in (ssim_loss, ms_ssim_loss, ssim_map):
        with pytest.raises(ValueError, match=f"{loss.__name__}: pred: expected sides of at least"):
            loss(image, image, window=6)
        with pytest.raises(ValueError, match=f"{loss.__name__}: window: expected at least 1"):
            loss(image, image, window=0)
        with pytest.raises(TypeError, match=f"{loss.__name__}: window: expected an integer"):
            loss(image, image, window=3.0)


def test_five_scales_need_161_pixels():
    shape = lambda n: jax.ShapeDtypeStruct((1, n, 200, 1), jnp.float32)
    assert jax.eval_shape(ms_ssim, shape(161), shape(161)).shape == ()
    with pytest.raises(ValueError, match="at least 161 pixels"):
        jax.eval_shape(ms_ssim, shape(160), shape(160))
    with pytest.raises(ValueError, match="power"):
        ms_ssim(np.ones((1, 11, 11, 1)), np.ones((1, 11, 11, 1)), power=())


def over_scales(pred, target, power, window, sigma, c1, c2):
    scores = 1.0
    for scale, exponent in enumerate(power):
        if scale:
            for axis in (1, 2):
                pair = []
                for x in (pred, target):
                    if x.shape[axis] % 2:
                        x = np.concatenate([x.take([0], axis), x], axis)
                    steps = (x.take(range(k, x.shape[axis], 2), axis) for k in (0, 1))
                    pair.append(sum(steps) / 2)
                pred, target = pair
        luminance, structure = factors(pred, target, window, sigma, c1, c2)
        value = luminance * structure if scale == len(power) - 1 else structure
        scores = scores * np.maximum(value.mean((1, 2)), 0) ** exponent
    return scores.mean(-1)


@pytest.mark.parametrize("size", [(24, 24), (19, 26)])
def test_scales_follow_the_definition_also_with_odd_sides(size):
    pred, noise = draw(2, *size, 2)
    target = 0.7 * pred + 0.3 * noise
    power = (0.2, 0.3, 0.5)
    exact = over_scales(pred.astype(float), target.astype(float), power, 5, 1.5, 1e-4, 9e-4)
    got = ms_ssim(pred, target, window=5, power=power, reduction="none")
    np.testing.assert_allclose(got, exact, rtol=3e-6)
    lost = ms_ssim_loss(pred, target, window=5, power=power, reduction="none")
    np.testing.assert_allclose(lost, 1 - exact, rtol=1e-5)


def test_one_scale_of_power_one_is_ssim():
    pred, noise = draw(2, 12, 12, 1)
    target = 0.7 * pred + 0.3 * noise
    got = ms_ssim_loss(pred, target, power=(1.0,))
    np.testing.assert_allclose(got, ssim_loss(pred, target), rtol=1e-5)


def test_negative_contrast_is_finite_over_scales():
    board = (np.indices((24, 24)).sum(0) % 2).astype(np.float32)[None, ..., None]
    value_and_slope = jax.jit(jax.value_and_grad(partial(ms_ssim_loss, window=5, power=(0.5, 0.5))))
    value, slope = value_and_slope(board, 1 - board)
    assert value == 1
    np.testing.assert_array_equal(slope, 0)
    for share in (0.4999, 0.5, 0.5001):  # contrast passes through zero
        value, slope = value_and_slope(board, share * board + (1 - share) * (1 - board))
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))


def test_a_coarse_pixel_is_kept_only_if_all_under_it_are():
    pred, noise = draw(1, 12, 12, 1)
    target = 0.7 * pred + 0.3 * noise
    where = np.ones((1, 12, 12), bool)
    where[0, :2, :] = False
    options = dict(window=3, power=(0.4, 0.6))
    got = ms_ssim(pred, target, where=where, **options)
    np.testing.assert_allclose(got, ms_ssim(pred[:, 2:], target[:, 2:], **options), rtol=1e-5)
    where[0, :, 4:8] = where[0, 4:8, :] = False  # nothing is left at the coarse scale
    assert ms_ssim(pred, target, where=where, **options) == 0


def test_exponents_may_be_traced_and_get_finite_gradients():
    pred, target = draw(1, 8, 8, 1)
    loss = lambda power: ms_ssim_loss(pred, target, window=3, power=power)
    slopes = jax.jit(jax.grad(loss))((0.4, 0.6))
    assert np.all(np.isfinite(slopes))


def test_the_mix_with_l1_is_another_function_than_multi_scale_ssim():
    pred, target = draw(2, 40, 41, 2)
    narrow = dict(sigmas=(1.0,), scale=1.0)
    blurred = windows(np.abs(pred - target).astype(float), 5)
    taps = np.multiply.outer(gaussian(5, 1.0), gaussian(5, 1.0))
    expected = (taps * blurred).sum((-1, -2)).mean((1, 2, 3))
    got = ms_ssim_l1_loss(pred, target, alpha=0.0, reduction="none", **narrow)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    got = ms_ssim_l1_loss(pred, target, alpha=1.0, **narrow)
    np.testing.assert_allclose(got, ssim_loss(pred, target, window=5, sigma=1.0), rtol=1e-5)
    mixed = ms_ssim_l1_loss(pred, target, alpha=0.25, **narrow)
    np.testing.assert_allclose(mixed, 0.25 * got + 0.75 * expected.mean(), rtol=1e-5)
    shuffled = ms_ssim_l1_loss(pred, target, sigmas=(8.0, 0.5, 2.0))
    np.testing.assert_array_equal(shuffled, ms_ssim_l1_loss(pred, target, sigmas=(0.5, 2.0, 8.0)))
    with pytest.raises(ValueError, match="at least 33 pixels"):
        ms_ssim_l1_loss(pred[:, :32], target[:, :32])
    with pytest.raises(ValueError, match="sigmas"):
        ms_ssim_l1_loss(pred, target, sigmas=())


@pytest.mark.parametrize("window", range(1, 10))
def test_box_moments_of_every_window_size_follow_the_definition(window):
    x, y = draw(2, 9, 11, 1, seed=window)
    offset = 1000 if window % 2 else 0
    p, t = (windows((v + np.float32(offset)).astype(float), window) for v in (x, y))
    axes = (-1, -2)
    centred = [v - v.mean(axes, keepdims=True) for v in (p, t)]
    pairs = ((0, 0), (1, 1), (0, 1))
    exact = [(centred[i] * centred[j]).mean(axes) for i, j in pairs]
    options = {"xla_backend_optimization_level": 3}  # rounding as users have it
    moments = jax.jit(box_moments, static_argnums=2, compiler_options=options)
    got = moments(x + np.float32(offset), y + np.float32(offset), window)
    for g, e in zip(got, exact, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-6, atol=3e-7)


def test_reflection_leaves_the_border_pixel_single():
    x, taps = np.arange(4, dtype=np.float32).reshape(1, 4, 1), np.float32([0.25, 0.75])
    both = jax.jit(lambda x: (pad_reflect(x, 2), window_mean(x, jnp.asarray(taps))))
    padded, means = jax.device_get(both(x))
    np.testing.assert_array_equal(padded[0, :, 0], [2, 1, 0, 1, 2, 3, 2, 1])
    np.testing.assert_allclose(means[0, :, 0], [0.75, 1.75, 2.75])
