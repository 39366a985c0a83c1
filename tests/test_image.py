"""Pixel losses at equal and flat images, at their kinks, under masks; denoising without targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxloss.losses.image import (
    gmsd_loss,
    gradient_loss,
    isotropic_total_variation_loss,
    psnr,
    psnr_loss,
    sobel_loss,
    sure_loss,
    total_variation_loss,
)


def draw(*shape, seed=0, count=2):
    g = np.random.default_rng(seed)
    return tuple(g.standard_normal(shape).astype(np.float32) for _ in range(count))


def test_equal_images_have_a_finite_ratio_and_gradient_zero():
    (image,) = draw(2, 3, 4, 2, count=1)
    value, slope = jax.value_and_grad(psnr_loss)(image, image)
    np.testing.assert_allclose(value, -100, rtol=1e-6)
    np.testing.assert_array_equal(slope, 0)
    off = image + np.float32(2e-6)  # still below the floor
    np.testing.assert_allclose(psnr(image, off), 100, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(psnr_loss)(image, off), 0)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_neither_tiny_nor_huge_values_lose_the_ratio(scale):
    pred, target = (x.astype(float) * scale for x in draw(2, 3, 4, 1))
    exact = 10 * np.log10((2 * scale) ** 2 / ((pred - target) ** 2).mean((1, 2, 3)))
    arrays = pred.astype(np.float32), target.astype(np.float32)
    got = psnr(*arrays, max_value=2 * scale, reduction="none")
    np.testing.assert_allclose(got, exact, rtol=1e-5)
    slope = jax.grad(lambda p: psnr(p, arrays[1], max_value=2 * scale))(arrays[0])
    assert np.all(np.isfinite(slope))


def test_each_image_of_a_batch_has_its_own_ratio():
    pred, target = draw(2, 3, 4, 1)
    pred[1] = 0.9 * target[1] + 0.1 * pred[1]
    single = [psnr(pred[i : i + 1], target[i : i + 1]) for i in (0, 1)]
    np.testing.assert_allclose(psnr(pred, target, reduction="none"), single, rtol=1e-6)


def test_ten_times_the_error_costs_twenty_decibels():
    pred, target = draw(1, 3, 4, 1)
    ten = target + 10 * (pred - target)
    np.testing.assert_allclose(psnr_loss(ten, target) - psnr_loss(pred, target), 20, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_total_variation_averages_pairs_of_which_both_pixels_are_kept(seed):
    g = np.random.default_rng(seed)
    images, where = g.standard_normal((2, 3, 4, 2)).astype("f4"), g.random((2, 3, 4)) < 0.8
    expected, units = [], []
    for image, kept in zip(images.astype(float), where, strict=True):
        means, counts = [], []
        for axis in (0, 1):
            both = np.diff(kept.astype(int), axis=axis) == 0
            both &= np.take(kept, range(kept.shape[axis] - 1), axis)
            steps = np.abs(np.diff(image, axis=axis))[both]
            means.append(steps.mean() if both.any() else 0)
            counts.append(both.sum())
        expected.append(sum(means))
        units.append(sum(counts) > 0)
    got = total_variation_loss(images, where=where, reduction="none")
    np.testing.assert_allclose(got, np.where(units, expected, 0), rtol=2e-6)


def test_total_variation_is_an_average_and_not_a_sum():
    small = jnp.indices((4, 4)).sum(0)[None, ..., None].astype(jnp.float32)
    large = jnp.indices((9, 9)).sum(0)[None, ..., None].astype(jnp.float32)
    assert total_variation_loss(small) == total_variation_loss(large) == 2


def test_an_axis_of_one_pixel_has_no_variation():
    (line,) = draw(1, 1, 5, 2, count=1)
    np.testing.assert_allclose(total_variation_loss(line), total_variation_loss(line[:, 0]))
    assert total_variation_loss(line[:, :, :1]) == 0


def test_isotropic_variation_does_not_depend_on_the_direction_of_an_edge():
    rows, columns = np.indices((6, 7)).astype(np.float32)
    ramp = lambda a: (np.cos(a) * rows + np.sin(a) * columns)[None, ..., None]
    for angle in (0.0, 0.4, 1.1, 2.5):
        value = isotropic_total_variation_loss(ramp(angle))
        np.testing.assert_allclose(value, 1, rtol=1e-6)
    value = total_variation_loss(ramp(np.float32(0.4)))
    np.testing.assert_allclose(value, np.cos(0.4) + np.sin(0.4), rtol=1e-6)


def test_a_flat_image_has_gradient_zero():
    flat = jnp.full((1, 4, 5, 1), 0.3)
    for loss in (total_variation_loss, isotropic_total_variation_loss):
        np.testing.assert_array_equal(jax.grad(loss)(flat), 0)
        assert np.all(np.isfinite(jax.hessian(loss)(flat)))


def test_gradients_ignore_brightness_and_sign():
    (image,) = draw(1, 4, 5, 1, count=1)
    np.testing.assert_allclose(gradient_loss(image + 3, image), 0, atol=1e-6)
    np.testing.assert_array_equal(gradient_loss(-image, image), 0)
    for loss in (gradient_loss, sobel_loss):
        np.testing.assert_array_equal(jax.grad(loss)(image, image), 0)


def test_the_slopes_of_ramps_are_met_exactly_in_three_dimensions():
    axes = jnp.indices((3, 4, 5)).astype(jnp.float32)
    ramp = (2 * axes[0] - 3 * axes[1] + 5 * axes[2])[None, ..., None]
    np.testing.assert_allclose(sobel_loss(ramp, 0 * ramp), (2 + 3 + 5) / 3, rtol=1e-6)


def test_a_hidden_pixel_takes_its_neighbours_out_of_the_edges():
    pred, target = draw(1, 6, 6, 1)
    where = np.ones((1, 6, 6), bool)
    where[0, :, 0] = False
    np.testing.assert_allclose(
        sobel_loss(pred, target, where=where),
        sobel_loss(pred[:, :, 1:], target[:, :, 1:]),
        rtol=1e-6,
    )


def test_deviation_of_equal_images_has_gradient_zero():
    (image,) = draw(2, 8, 9, 2, count=1)
    for other in (image, jnp.zeros_like(image)):
        value, slope = jax.value_and_grad(gmsd_loss)(other, other)
        assert value == 0
        np.testing.assert_array_equal(slope, 0)


def test_the_gradient_of_the_deviation_is_accurate_within_sixteen_ulps():
    pred, target = draw(4, 9, 10, 2)
    with jax.enable_x64(True):
        exact = jax.grad(gmsd_loss)(pred.astype(float), target.astype(float))
        exact = np.asarray(exact)
    got = np.asarray(jax.grad(gmsd_loss)(pred, target))
    assert np.max(np.abs(got - exact)) <= 16 * np.spacing(np.float32(np.max(np.abs(exact))))


def test_the_deviation_drops_what_a_hidden_pixel_reaches():
    pred, target = draw(1, 8, 12, 1)
    where = np.ones((1, 8, 12), bool)
    where[0, :, 1] = False  # of the first two columns, which make the first coarse one
    expected = gmsd_loss(pred[:, :, 2:], target[:, :, 2:])
    np.testing.assert_allclose(gmsd_loss(pred, target, where=where), expected, rtol=1e-5)


KEY = np.array([0, 7], np.uint32)


def test_the_risk_of_the_identity_is_the_noise_and_of_nothing_is_the_signal():
    (noisy,) = draw(3, 4, 5, 2, count=1)
    risk = lambda f: sure_loss(noisy, pred_fn=f, sigma=0.5, key=KEY, reduction="none")
    np.testing.assert_allclose(risk(lambda y: y), 0.25, rtol=1e-6)
    expected = (noisy.astype(float) ** 2).mean((1, 2, 3)) - 0.25
    np.testing.assert_allclose(risk(jnp.zeros_like), expected, rtol=1e-5)


def test_the_risk_estimates_the_error_against_the_clean_image():
    g = np.random.default_rng(0)
    clean = np.sin(np.arange(64) / 5)[None, :, None] * np.ones((200, 1, 1))
    noisy = (clean + 0.3 * g.standard_normal(clean.shape)).astype(np.float32)
    smooth = lambda y: (jnp.roll(y, 1, 1) + 2 * y + jnp.roll(y, -1, 1)) / 4
    estimate = sure_loss(noisy, pred_fn=smooth, sigma=0.3, key=KEY)
    error = np.mean((np.asarray(smooth(noisy)) - clean) ** 2)
    # 12800 noisy pixels and one random probe each: the estimate itself scatters by a few per cent.
    np.testing.assert_allclose(estimate, error, rtol=0.05)


def test_a_denoiser_gets_gradients_through_what_it_closes_over():
    (noisy,) = draw(2, 4, 5, 1, count=1)

    @jax.jit
    def objective(gain, sigma):
        return sure_loss(noisy, pred_fn=lambda y: gain * y, sigma=sigma, key=KEY)

    power = (noisy.astype(float) ** 2).mean()
    for gain in (0.3, 0.8):  # (g - 1)^2 y^2 - s^2 + 2 s^2 g
        slope, in_sigma = jax.grad(objective, (0, 1))(gain, 0.5)
        np.testing.assert_allclose(slope, 2 * (gain - 1) * power + 2 * 0.25, rtol=1e-5)
        np.testing.assert_allclose(in_sigma, -2 * 0.5 + 4 * 0.5 * gain, rtol=1e-5)


def test_a_denoiser_that_changes_the_shape_is_an_error():
    with pytest.raises(ValueError, match=r"sure_loss: pred_fn\(noisy\): expected shape"):
        sure_loss(jnp.ones((1, 4, 4, 1)), pred_fn=lambda y: y[:, 1:], sigma=1.0, key=KEY)
