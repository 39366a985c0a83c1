"""Spectral losses at equal images and empty spectra, and the theorems that tie them to pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses.frequency import fft_l1_loss, focal_frequency_loss, spectral_amplitude_loss

LOSSES = (focal_frequency_loss, fft_l1_loss, spectral_amplitude_loss)


def draw(*shape, count=2):
    g = np.random.default_rng(0)
    return tuple(g.standard_normal(shape).astype(np.float32) for _ in range(count))


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_images_and_black_ones_have_gradient_zero(loss):
    (image,) = draw(2, 4, 6, 2, count=1)
    for other in (image, jnp.zeros_like(image)):
        value, slope = jax.value_and_grad(loss)(other, other)
        assert value == 0
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_spectrum_has_a_finite_gradient(loss):
    (image,) = draw(1, 4, 6, 1, count=1)
    constant = jnp.ones_like(image)  # every frequency but one is 0
    for pair in ((constant, image), (image, constant), (constant, 2 * constant)):
        for slope in jax.grad(loss, (0, 1))(*pair):
            assert np.all(np.isfinite(slope))


def test_without_focus_the_frequencies_cost_what_the_pixels_cost():
    pred, target = draw(2, 4, 6, 3)
    expected = ((pred - target).astype(float) ** 2).mean((1, 2, 3))
    got = focal_frequency_loss(pred, target, alpha=0.0, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    focused = focal_frequency_loss(pred, target, alpha=2.0, reduction="none")
    assert np.all(focused < expected)


def test_the_focus_is_constant_for_the_gradient():
    pred, target = draw(1, 4, 6, 1)
    spectrum = np.fft.fft2((pred - target)[0, ..., 0].astype(float), norm="ortho")
    weights = np.abs(spectrum) / np.abs(spectrum).max()
    expected = 2 * np.fft.ifft2(weights * spectrum, norm="ortho").real / spectrum.size
    slope = jax.grad(focal_frequency_loss)(pred, target)[0, ..., 0]
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-7)


def test_amplitudes_are_blind_to_shifts():
    (image,) = draw(1, 4, 6, 1, count=1)
    np.testing.assert_allclose(
        spectral_amplitude_loss(jnp.roll(image, (1, 2), (1, 2)), image), 0, atol=1e-12
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_mask_covers_whole_images(loss):
    pred, target = draw(2, 4, 6, 1)
    broken = pred.copy()
    broken[0, 0, 0] = np.nan
    got = loss(broken, target, where=np.array([False, True]))
    np.testing.assert_allclose(got, loss(pred[1:], target[1:]), rtol=1e-6)
    with pytest.raises(ValueError, match=r"where: expected shape \(2,\)"):
        loss(pred, target, where=np.ones((2, 4, 6), bool))
