"""Similarity under linear changes and in flat windows, entropies, and smooth displacements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses.registration import (
    bending_energy,
    diffusion_energy,
    local_ncc_loss,
    mutual_information_loss,
    normalized_mutual_information_loss,
)


def draw(*shape, count=2, seed=0):
    g = np.random.default_rng(seed)
    return tuple(g.uniform(0, 1, shape).astype(np.float32) for _ in range(count))


def exact_ncc(pred, target, window):
    axes = tuple(range(1, pred.ndim - 1))
    view = lambda x: np.lib.stride_tricks.sliding_window_view(
        x.astype(np.float64), (window,) * len(axes), axis=axes
    )
    inner = tuple(range(-len(axes), 0))
    p, t = (view(x) - view(x).mean(inner, keepdims=True) for x in (pred, target))
    floor = lambda v: np.maximum(v, 1e-5)
    cross, var_p, var_t = ((a * b).sum(inner) for a, b in ((p, t), (p, p), (t, t)))
    return -(cross**2 / (floor(var_p) * floor(var_t))).reshape(len(pred), -1).mean(1)


@pytest.mark.parametrize(("shape", "window"), [((2, 11, 12, 2), 9), ((1, 5, 6, 7, 1), 4)])
def test_correlation_follows_the_definition(shape, window):
    pred, target = draw(*shape)
    got = local_ncc_loss(pred, target, window=window, reduction="none")
    np.testing.assert_allclose(got, exact_ncc(pred, target, window), rtol=1e-5)


def test_correlation_keeps_its_digits_in_bright_and_almost_flat_images():
    pred, noise = draw(1, 12, 13, 1)
    pred = (0.9 + 0.01 * pred).astype(np.float32)
    pred[:, :, :6] -= np.float32(0.9)  # and one dark half
    target = (pred + 0.005 * noise).astype(np.float32)
    exact = exact_ncc(pred, target, 5)
    np.testing.assert_allclose(local_ncc_loss(pred, target, window=5), exact[0], rtol=1e-5)
    with jax.enable_x64(True):
        wide = jax.grad(lambda p, t: local_ncc_loss(p, t, window=5))
        exact = wide(pred.astype(float), target.astype(float))
    slope = jax.grad(lambda p: local_ncc_loss(p, target, window=5))(pred)
    np.testing.assert_allclose(slope, exact, atol=2e-5 * np.abs(exact).max())


@pytest.mark.parametrize("level", [0.0, 0.7, 1000.3])
def test_constant_windows_count_zero_with_gradient_zero(level):
    (image,) = draw(1, 10, 10, 1, count=1)
    flat = jnp.full_like(image, level)
    for pair in ((flat, image), (image, flat), (flat, flat)):
        value, slopes = jax.value_and_grad(local_ncc_loss, (0, 1))(*pair)
        assert value == 0
        for slope in slopes:
            np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_a_linear_change_of_range_is_a_perfect_match():
    (image,) = draw(2, 11, 10, 1, count=1)
    for gain, offset in ((3.0, 0.0), (-0.5, 7.0)):
        value, slope = jax.value_and_grad(local_ncc_loss)(image, gain * image + offset)
        np.testing.assert_allclose(value, -1, rtol=1e-6)
        np.testing.assert_allclose(slope, 0, atol=1e-5)


def test_correlation_leaves_out_windows_with_a_hidden_pixel():
    pred, target = draw(1, 12, 12, 1)
    where = np.ones((1, 12, 12), bool)
    where[0, 0, :] = where[0, :, 11] = False
    got = local_ncc_loss(pred, target, where=where)
    expected = local_ncc_loss(pred[:, 1:, :11], target[:, 1:, :11])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_constant_image_tells_nothing():
    (image,) = draw(2, 6, 6, 1, count=1)
    flat = jnp.full_like(image, 0.37)
    for pair in ((flat, image), (image, flat), (flat, flat)):
        np.testing.assert_allclose(mutual_information_loss(*pair), 0, atol=1e-10)
        for slope in jax.grad(mutual_information_loss, (0, 1))(*pair):
            assert np.all(np.isfinite(slope))
    np.testing.assert_allclose(normalized_mutual_information_loss(image, flat), -1, rtol=1e-6)


def test_sharp_bins_give_the_entropy_of_the_labels():
    labels = np.array([0, 0, 0, 1, 1, 2, 3, 3]).reshape(1, 8, 1)
    image = (labels / 3).astype(np.float32)
    share = np.array([3, 2, 1, 2]) / 8
    sharp = dict(bins=4, sigma_ratio=0.05)
    got = mutual_information_loss(image, 1 - image, **sharp)
    np.testing.assert_allclose(got, (share * np.log(share)).sum(), rtol=1e-6)
    got = normalized_mutual_information_loss(image, 1 - image, **sharp)
    np.testing.assert_allclose(got, -2, rtol=1e-6)
    where = labels[..., 0] < 2
    got = mutual_information_loss(image, image, where=where, **sharp)
    np.testing.assert_allclose(got, 0.6 * np.log(0.6) + 0.4 * np.log(0.4), rtol=1e-6)


def test_normalised_information_follows_the_entropies():
    pred, target = draw(2, 5, 6, 1)
    bins, centres = 5, np.linspace(0, 1, 5)

    def soft(x):
        w = np.exp(-0.5 * ((x.astype(float).reshape(2, -1, 1) - centres) / (0.5 * 0.25)) ** 2)
        return w / w.sum(-1, keepdims=True)

    joint = np.einsum("bni,bnj->bij", soft(pred), soft(target)) / 30
    entropy = lambda p: -(p * np.log(p)).reshape(2, -1).sum(1)
    a, b, ab = (entropy(p) for p in (joint.sum(2), joint.sum(1), joint))
    options = dict(bins=bins, reduction="none")
    got = normalized_mutual_information_loss(pred, target, **options)
    np.testing.assert_allclose(got, -(a + b) / ab, rtol=1e-6)
    np.testing.assert_allclose(
        mutual_information_loss(pred, target, **options), ab - a - b, rtol=1e-4
    )
    with pytest.raises(ValueError, match="bins: expected an integer of at least 2, got 1"):
        mutual_information_loss(pred, target, bins=1)


def test_affine_displacements_do_not_bend_and_translations_do_not_diffuse():
    at = jnp.stack(jnp.indices((4, 5, 6)), axis=-1).astype(jnp.float32)[None]
    matrix = jnp.array([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0], [4.0, 0.0, 1.0]])
    affine = jnp.einsum("...i,ij->...j", at, matrix) + 7
    assert bending_energy(affine) == 0
    np.testing.assert_allclose(diffusion_energy(affine), (matrix**2).sum() / 3, rtol=1e-6)
    assert diffusion_energy(jnp.zeros_like(at) + 7) == 0
    np.testing.assert_array_equal(jax.grad(bending_energy)(affine), 0)


def test_a_quadratic_displacement_bends_by_its_second_derivatives():
    y, x = jnp.indices((5, 6)).astype(jnp.float32)
    field = jnp.stack([x * x + 3 * x * y, 2 * y * y], axis=-1)[None]
    expected = ((2**2 + 2 * 3**2) + 4**2) / 2  # a mean over components
    np.testing.assert_allclose(bending_energy(field), expected, rtol=1e-6)


def test_a_field_has_as_many_components_as_axes():
    with pytest.raises(ValueError, match="displacement: expected a last axis of size 2"):
        bending_energy(jnp.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="displacement: expected sides of at least 3 pixels"):
        diffusion_energy(jnp.zeros((1, 2, 4, 2)))
