"""Heat maps and coordinate bins: who divides by what, flat maps, exponents below 1, far targets."""

import jax
import mpmath as mp
import numpy as np
import pytest
from oracle import units_off, value_and_gradients
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, softmax

from jaxloss import checked
from jaxloss.losses.heatmaps import (
    adaptive_wing_loss,
    combined_target_mse_loss,
    draw_gaussian_heatmap,
    dsnt_coordinates,
    dsnt_loss,
    heatmap_mse_loss,
    ohkm_mse_loss,
    simcc_kl_loss,
)


def maps(*shape, seed=0):
    g = np.random.default_rng(seed)
    return tuple(g.standard_normal(shape).astype(np.float32) for _ in range(2))


def test_hiding_one_of_two_equal_joints_leaves_the_mean_as_it_was():
    pred = np.ones((3, 4, 5, 2), np.float32)
    target, where = 0 * pred, np.array([[True, False]] * 3)
    assert heatmap_mse_loss(pred, target) == heatmap_mse_loss(pred, target, where=where) == 1


def test_maps_of_invisible_joints_may_hold_anything():
    pred, target = maps(2, 3, 4, 3)
    target[:, :, :, 1] = np.nan
    where = np.array([[True, False, True]] * 2)
    for loss in (heatmap_mse_loss, ohkm_mse_loss):
        value, (slope, _) = jax.device_get(value_and_gradients(loss, pred, target, where=where))
        kept = [0, 2]
        np.testing.assert_allclose(value, loss(pred[..., kept], target[..., kept]), rtol=1e-6)
        assert np.all(np.isfinite(slope))
        assert np.all(slope[..., 1] == 0)


def test_empty_channels_are_skipped_by_a_mask():
    pred, target = maps(2, 3, 4, 3)
    target[0, :, :, 1] = 0
    units = heatmap_mse_loss(pred, target, where=(target != 0).any((1, 2)), reduction="none")
    expected = ((pred - target).astype(np.float64) ** 2).mean((1, 2))
    expected[0, 1] = 0
    np.testing.assert_allclose(units, expected, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_hard_joints_are_the_largest_of_the_visible_ones(k):
    pred, target = maps(5, 3, 4, 4)
    where = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0], [0] * 4], bool)
    errors = ((pred - target).astype(np.float64) ** 2).mean((1, 2))
    expected = [
        np.sort(e[w])[::-1][:k].mean() if w.any() else 0 for e, w in zip(errors, where, strict=True)
    ]
    units = ohkm_mse_loss(pred, target, k=k, where=where, reduction="none")
    np.testing.assert_allclose(units, expected, rtol=1e-6)
    mean = ohkm_mse_loss(pred, target, k=k, where=where)
    np.testing.assert_allclose(mean, np.mean(expected[:4]), rtol=1e-6)  # the last has no joint


def test_of_equally_hard_joints_exactly_k_learn():
    pred = np.ones((1, 2, 5), np.float32)
    _, (slope, _) = value_and_gradients(ohkm_mse_loss, pred, 0 * pred, k=2)
    np.testing.assert_allclose(np.asarray(slope)[0, 0], [0.5, 0.5, 0, 0, 0])


def test_a_joint_that_is_nan_is_a_hard_one():
    pred = np.float32([[[1, np.nan, 2]]])
    assert np.isnan(ohkm_mse_loss(pred, np.zeros_like(pred), k=1))


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (True, ValueError), (2.0, TypeError)])
def test_the_number_of_hard_joints_is_a_positive_integer(k, error):
    with pytest.raises(error, match="ohkm_mse_loss: k: expected an integer of at least 1"):
        ohkm_mse_loss(np.ones((1, 2, 3)), np.ones((1, 2, 3)), k=k)


def test_offsets_count_only_inside_the_target_heat_map():
    g = np.random.default_rng(0)
    pred, target = (g.standard_normal((2, 4, 5, 3, 3)).astype(np.float32) for _ in range(2))
    expected = np.zeros((2, 3))
    for joint in range(3):  # the loop of mmpose's loss, without its mean over the joints
        (h, x, y), (heat, dx, dy) = (np.moveaxis(a[..., joint, :], -1, 0) for a in (pred, target))
        for a, b in ((h, heat), (heat * x, heat * dx), (heat * y, heat * dy)):
            expected[:, joint] += 0.5 * ((a - b).astype(np.float64) ** 2).mean((1, 2))
    units = combined_target_mse_loss(pred, target, reduction="none")
    np.testing.assert_allclose(units, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="pred: expected a last axis of size 3"):
        combined_target_mse_loss(pred[..., :2], target[..., :2])


def test_a_drawn_joint_stands_on_its_nearest_cell():
    centers = np.float32([[[1.4, 2.6], [0.5, 0.49], [-0.6, 1.0], [9.0, 9.0]]])
    heat = np.asarray(draw_gaussian_heatmap(centers, 0.7, shape=(4, 5)))
    assert heat.shape == (1, 4, 5, 4)
    for joint, cell in enumerate([(3, 1), (0, 1)]):  # rows, columns; a half is rounded up
        assert heat[0, ..., joint][cell] == 1
        assert np.unravel_index(heat[0, ..., joint].argmax(), (4, 5)) == cell
    np.testing.assert_allclose(heat[0, 1, 0, 2], np.exp(-1 / (2 * 0.7**2)), rtol=1e-6)  # at -1
    assert heat[..., 3].max() < 1e-10


def test_a_subpixel_joint_is_not_rounded_and_may_have_its_own_width():
    centers, sigma = np.float32([[1.4, 2.6], [3, 0.25]]), np.float32([0.7, 2])
    heat = np.asarray(draw_gaussian_heatmap(centers, sigma, shape=(4, 5), subpixel=True))
    y, x = np.mgrid[:4, :5]
    for joint, ((cx, cy), s) in enumerate(zip(centers, sigma, strict=True)):
        exact = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * s**2))
        np.testing.assert_allclose(heat[..., joint], exact, rtol=2e-6)
    assert heat[..., 0].max() < 1
    with pytest.raises(ValueError, match=r"sigma: expected shape \(2,\)"):
        draw_gaussian_heatmap(centers, np.ones(3, np.float32), shape=(4, 5))


def adaptive(p, t, alpha=2.1, omega=14.0, epsilon=1.0, theta=0.5):
    alpha, omega, epsilon, theta = (
        mp.mpf(float(np.float32(x))) for x in (alpha, omega, epsilon, theta)
    )
    d, k = abs(p - t), alpha - t
    s = (theta / epsilon) ** k
    if d < theta:
        return omega * mp.log1p((d / epsilon) ** k)
    slope = omega * k * (theta / epsilon) ** (k - 1) / (epsilon * (1 + s))
    return slope * d - (theta * slope - omega * mp.log1p(s))


@pytest.mark.parametrize(
    "options", [{}, dict(alpha=1.9, omega=3.0, epsilon=0.3, theta=0.7)], ids=["default", "options"]
)
def test_adaptive_wing_matches_fifty_digits(options):
    targets = [0.0, 0.01, 0.1, 0.5, 0.9, 1.0]
    errors = [1e-5, 1e-3, 0.1, 0.45, 0.55, 0.72, 3.0, 1e4]
    points = list(
        zip(*[(t + s * e, t) for t in targets for e in errors for s in (1, -1)], strict=True)
    )
    off = units_off(adaptive_wing_loss, lambda p, t: adaptive(p, t, **options), *points, **options)
    assert max(worst for worst, _ in off.values()) <= 4, off


@jax.jit
def wing_slopes_and_curves(x):
    slopes = jax.grad(adaptive_wing_loss, (0, 1))(x, x)
    return slopes, [jax.hessian(adaptive_wing_loss, argnum)(x, x) for argnum in (0, 1)]


@pytest.mark.parametrize("target", [0.0, 1.0, 1.2, 2.0])
def test_adaptive_wing_of_a_perfect_cell_has_slope_zero_even_with_an_exponent_below_one(target):
    slopes, curves = wing_slopes_and_curves(np.float32([target]))
    np.testing.assert_array_equal(slopes, 0)
    assert np.all(np.isfinite(curves))


@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_adaptive_wing_turns_linear_without_a_jump_in_value_or_slope(target):
    theta = np.float32(0.5)
    below, above = np.nextafter(theta, np.float32(0)), np.nextafter(theta, np.float32(1))
    points = (np.float32(target + np.float64(e)) for e in (below, above))
    both = [value_and_gradients(adaptive_wing_loss, p, np.float32(target)) for p in points]
    for before, after in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(before, after, rtol=2e-6)


def test_checked_wants_targets_below_alpha():
    with pytest.raises(ValueError, match="target: expected values below alpha"):
        checked(adaptive_wing_loss)(np.zeros(2, np.float32), np.float32([0.5, 2.5]))


def expected_place(probs):
    """Mean coordinates (x, y) by loops: cell i of n is at (2 i + 1) / n - 1."""
    height, width = probs.shape
    x = sum(probs[i, j] * ((2 * j + 1) / width - 1) for i in range(height) for j in range(width))
    y = sum(probs[i, j] * ((2 * i + 1) / height - 1) for i in range(height) for j in range(width))
    return np.array([x, y])


def test_coordinates_are_means_over_the_centres_of_cells_with_x_along_the_width():
    logits, _ = maps(2, 3, 5, 4)
    got = np.asarray(dsnt_coordinates(logits))
    for b in range(2):
        for joint in range(4):
            probs = softmax(logits[b, ..., joint].astype(np.float64))
            np.testing.assert_allclose(got[b, joint], expected_place(probs), atol=1e-6)


def test_coordinates_in_space_come_in_the_order_x_y_z():
    logits = np.full((1, 2, 3, 4, 1), -1e4, np.float32)
    logits[0, 1, 0, 3, 0] = 0  # z, y, x
    np.testing.assert_allclose(dsnt_coordinates(logits), [[[3 / 4, -2 / 3, 1 / 2]]], rtol=1e-6)


def test_a_sure_map_on_its_target_leaves_only_the_width_of_the_gaussian():
    logits = np.full((1, 4, 5, 1), -np.inf, np.float32)
    logits[0, 2, 1, 0] = 0
    target = np.float32([[[-0.4, 0.25]]])  # that very cell
    values = [dsnt_loss(logits, target, sigma=s) for s in (0.01, 1.0)]
    np.testing.assert_allclose(values[0], 0, atol=1e-6)
    y, x = np.mgrid[:4, :5]
    other = softmax(-((x - 1) ** 2 + (y - 2) ** 2) / 2)
    sure = np.zeros((4, 5))
    sure[2, 1] = 1
    expected = jensenshannon(sure.ravel(), other.ravel()) ** 2
    np.testing.assert_allclose(values[1], expected, rtol=1e-6)
    assert np.all(np.isfinite(value_and_gradients(dsnt_loss, logits, target)[1][0]))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_pull_of_a_map_is_the_divergence_from_a_gaussian_in_cells(scale):
    logits, _ = maps(3, 4, 6, 2)
    logits *= scale
    target = np.random.default_rng(1).uniform(-1, 1, (3, 2, 2)).astype(np.float32)
    options = dict(sigma=0.8, reduction="none")
    far = np.asarray(dsnt_loss(logits, target, regularization=0.0, **options))
    pull = np.asarray(dsnt_loss(logits, target, **options)) - far
    distance = np.linalg.norm(np.asarray(dsnt_coordinates(logits)) - target, axis=-1)
    np.testing.assert_allclose(far, distance, rtol=1e-6)
    y, x = np.mgrid[:4, :6]
    for b, joint in np.ndindex(3, 2):
        tx, ty = target[b, joint].astype(np.float64)
        cx, cy = ((tx + 1) * 6 - 1) / 2, ((ty + 1) * 4 - 1) / 2
        bell = softmax(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 0.8**2))
        probs = softmax(logits[b, ..., joint].astype(np.float64))
        expected = jensenshannon(probs.ravel(), bell.ravel()) ** 2
        np.testing.assert_allclose(pull[b, joint], expected, atol=1e-6)


def test_flat_maps_and_ties_have_a_finite_gradient():
    flat = np.zeros((1, 4, 4, 1), np.float32)
    top, pair = np.zeros_like(flat), np.zeros_like(flat)
    top[0, 0], pair[0, 1, 1:3] = 3, 1e4
    centre, side = np.float32([[[0, 0]]]), np.float32([[[0.5, -1]]])
    for target in (centre, side):
        for logits in (flat, top, pair):
            value, (slope, _) = value_and_gradients(dsnt_loss, logits, target)
            assert np.isfinite(value)
            assert np.all(np.isfinite(slope))
    at_centre = dsnt_loss(flat, centre, regularization=0.0)
    np.testing.assert_allclose(at_centre, 0, atol=1e-7)


def test_a_map_that_is_the_gaussian_of_its_target_is_nearly_perfect():
    target = np.float32([[[0.125, -0.25]]])
    cells = (target + 1) * 8 / 2 - 0.5
    logits = np.log(draw_gaussian_heatmap(cells, 0.6, shape=(8, 8), subpixel=True))
    value = dsnt_loss(logits, target, sigma=0.6, regularization=1.0)
    assert 0 <= value < 1e-3  # the border cuts the Gaussian
    pull = value - dsnt_loss(logits, target, sigma=0.6, regularization=0.0)
    np.testing.assert_allclose(pull, 0, atol=1e-7)


def divergence_of_bins(logits, center, sigma, temperature):
    bins = np.arange(logits.shape[-1])
    log_q = log_softmax(-((bins - np.float64(center)[..., None]) ** 2) / (2 * sigma**2), axis=-1)
    log_p = log_softmax(logits.astype(np.float64) / temperature, axis=-1)
    return np.sum(np.exp(log_q) * (log_q - log_p), axis=-1)


def bins(seed=0):
    g = np.random.default_rng(seed)
    x, y = g.standard_normal((3, 4, 12)), g.standard_normal((3, 4, 9))
    target = g.uniform(0, 9, (3, 4, 2))
    return tuple(a.astype(np.float32) for a in (3 * x, 3 * y, target))


@pytest.mark.parametrize("sigma", [(2.0, 0.7), (6.0, 6.0)])
def test_bins_are_compared_with_a_gaussian_along_each_axis(sigma):
    x, y, target = bins()
    expected = 0.5 * (
        divergence_of_bins(x, target[..., 0], sigma[0], 0.1)
        + divergence_of_bins(y, target[..., 1], sigma[1], 0.1)
    )
    options = dict(temperature=0.1, reduction="none")
    np.testing.assert_allclose(
        simcc_kl_loss(x, y, target, sigma=sigma, **options), expected, rtol=1e-5
    )
    if sigma[0] == sigma[1]:
        np.testing.assert_array_equal(
            simcc_kl_loss(x, y, target, **options),
            simcc_kl_loss(x, y, target, sigma=sigma, **options),
        )
    with pytest.raises(ValueError, match="sigma: expected a number or a pair"):
        simcc_kl_loss(x, y, target, sigma=(1.0, 2.0, 3.0))


def test_rtmpose_multiplies_logits_and_averages_over_bins():
    x, y, target = bins()
    per_axis = [
        divergence_of_bins(z, target[..., i], 6.0, 1 / 10) / z.shape[-1]
        for i, z in enumerate((x, y))
    ]
    theirs = (per_axis[0] + per_axis[1]).sum() / 4  # divided by the joints
    units = [
        simcc_kl_loss(a, a, np.stack([t, t], -1), temperature=0.1, reduction="sum") / a.shape[-1]
        for a, t in ((x, target[..., 0]), (y, target[..., 1]))
    ]
    np.testing.assert_allclose(sum(units) / 4, theirs, rtol=1e-5)


def test_bins_that_are_the_gaussian_cost_nothing_and_never_less():
    target = np.float32([[3.3, 5]])
    place = np.arange(10, dtype=np.float32)
    x, y = (-((place - t) ** 2) / np.float32(2 * 1.7**2) + 4 for t in target[0])
    value, slopes = value_and_gradients(simcc_kl_loss, x[None], y[None], target, sigma=1.7)
    np.testing.assert_allclose(value, 0, atol=1e-9)
    np.testing.assert_allclose(slopes[:2], 0, atol=1e-7)


@pytest.mark.parametrize("place", [-40.0, 1e4, 1e25, -1e25])
def test_a_target_outside_the_image_stays_finite_and_a_hidden_one_vanishes(place):
    x, y, target = bins()
    target[1, 2, 0] = place
    value, slopes = value_and_gradients(simcc_kl_loss, x, y, target)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(s)) for s in slopes)
    where = np.ones((3, 4), bool)
    where[1, 2] = False
    target[1, 2] = np.nan
    value, slopes = jax.device_get(value_and_gradients(simcc_kl_loss, x, y, target, where=where))
    assert np.isfinite(value)
    assert all(np.all(s[1, 2] == 0) for s in slopes)
