"""Neighbours, views and normals: pairs under a mask, flat areas, windows, planes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses.depth import align_scale_shift
from jaxloss.losses.depth_structure import (
    depth_to_normals,
    edge_aware_smoothness_loss,
    gradient_matching_loss,
    normal_cosine_loss,
    photometric_loss,
    virtual_normal_loss,
)
from jaxloss.losses.similarity import cosine_distance

KEY = np.array([0, 3], np.uint32)


def draw(*shape, seed=0, count=2):
    g = np.random.default_rng(seed)
    return tuple(g.uniform(0, 1, shape).astype(np.float32) for _ in range(count))


def test_a_ramp_costs_its_slope_at_every_scale():
    rows, columns = np.mgrid[:8, :9].astype(np.float32)
    error = (3 * columns - 2 * rows)[None]
    value = gradient_matching_loss(error, 0 * error, scales=3)
    expected = 0
    for step, height, width in ((1, 8, 9), (2, 4, 5), (4, 2, 3)):
        pairs = 3 * height * (width - 1) + 2 * (height - 1) * width
        expected += step * pairs / (height * width)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_a_constant_error_costs_nothing():
    (x,) = draw(2, 16, 17, count=1)
    value, slope = jax.jit(jax.value_and_grad(gradient_matching_loss))(x, x)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
    np.testing.assert_allclose(gradient_matching_loss(x + 4, x), 0, atol=2e-5)


def matched(error, kept, scales):
    total = 0
    for step in (2**k for k in range(scales)):
        e, m = error[::step, ::step], kept[::step, ::step]
        for axis in (0, 1):
            both = np.take(m, range(1, m.shape[axis]), axis) & np.take(
                m, range(m.shape[axis] - 1), axis
            )
            total += np.abs(np.diff(e, axis=axis))[both].sum() / max(m.sum(), 1)
    return total


def test_a_slope_counts_where_both_neighbours_are_kept():
    pred, target = draw(3, 9, 11)
    where = np.random.default_rng(1).random(pred.shape) < 0.6
    where[1] = False
    where[1, 1, 1] = True  # no pair, and no pixel at the second scale: a unit that costs 0
    error = (pred - target).astype(np.float64)
    pred[~where], target[~where] = np.nan, np.inf
    loss = lambda p: gradient_matching_loss(p, target, scales=3, where=where, reduction="none")
    expected = [matched(e, w, 3) for e, w in zip(error, where, strict=True)]
    np.testing.assert_allclose(loss(pred), expected, rtol=1e-5)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(loss(p))))(pred)
    assert np.all(slope[~where] == 0)
    assert np.all(np.isfinite(slope))


def test_the_gradients_of_an_aligned_map_ignore_scale_and_shift():
    pred, target = draw(2, 8, 8)
    where = np.random.default_rng(1).random(pred.shape) < 0.8

    def loss(p):
        aligned = align_scale_shift(p, target, where=where)
        return gradient_matching_loss(aligned, target, scales=2, where=where)

    both = jax.jit(jax.value_and_grad(loss))
    np.testing.assert_allclose(both(5 * pred - 3)[0], float(both(pred)[0]), rtol=1e-5)
    assert np.all(np.isfinite(both(np.where(where, pred, np.nan))[1]))


@pytest.mark.parametrize(
    ("scales", "error", "text"),
    [
        (4, ValueError, "pred: expected sides of at least 16 pixels"),
        (0, ValueError, "scales: expected at least 1"),
        (2.0, TypeError, "scales: expected an integer"),
    ],
)
def test_maps_must_be_large_enough_for_the_scales(scales, error, text):
    with pytest.raises(error, match=text):
        gradient_matching_loss(jnp.ones((1, 15, 20)), jnp.ones((1, 15, 20)), scales=scales)


def test_edges_of_the_image_forgive_those_of_the_disparity():
    disparity = np.float32([[[0, 0, 1]] * 2])
    edge = np.float32([[[0, 0, 5]] * 2])[..., None]
    plain = edge_aware_smoothness_loss(disparity, 0 * edge)
    np.testing.assert_allclose(plain, 0.5)  # one of two horizontal pairs
    np.testing.assert_allclose(
        edge_aware_smoothness_loss(disparity, edge), 0.5 * np.exp(-5), rtol=1e-6
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_flat_areas_have_slope_zero(normalize):
    (image,) = draw(2, 4, 5, 3, count=1)
    flat = np.full((2, 4, 5), 0.3, np.float32)
    loss = partial(edge_aware_smoothness_loss, normalize=normalize)
    value, slope = jax.jit(jax.value_and_grad(loss))(flat, image)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def test_normalizing_takes_the_mean_of_the_kept_pixels():
    disparity, _ = draw(2, 4, 5)
    (image,) = draw(2, 4, 5, 3, count=1, seed=1)
    where = np.ones(disparity.shape, bool)
    where[:, 1:3, 2] = False
    holes = np.where(where, disparity, np.nan)
    loss = lambda d, **options: edge_aware_smoothness_loss(d, image, where=where, **options)
    value, slope = jax.value_and_grad(loss)(holes, normalize=True)
    means = np.array([d[w].mean() for d, w in zip(disparity, where, strict=True)])[:, None, None]
    np.testing.assert_allclose(value, loss(disparity / means), rtol=1e-6)
    np.testing.assert_allclose(loss(7 * holes, normalize=True), value, rtol=1e-6)
    assert np.all(np.isfinite(slope))
    zero_mean = disparity - means
    zero_mean[0] = 0
    value, slope = jax.value_and_grad(edge_aware_smoothness_loss)(
        0 * zero_mean, image, normalize=True
    )
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def test_disparities_with_holes_count_their_own_pairs():
    disparity, _ = draw(3, 4, 5)
    (image,) = draw(3, 4, 5, 2, count=1, seed=1)
    where = np.random.default_rng(1).random(disparity.shape) < 0.7
    units = edge_aware_smoothness_loss(disparity, image, where=where, reduction="none")
    for d, i, w, got in zip(disparity.astype(np.float64), image, where, units, strict=True):
        expected = 0
        for axis in (0, 1):
            slope = np.abs(np.diff(d, axis=axis)) * np.exp(-np.abs(np.diff(i, axis=axis)).mean(-1))
            both = np.logical_and(*(np.delete(w, end, axis) for end in (0, -1)))
            expected += slope[both].mean()
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_pixel_is_seen_only_if_its_whole_window_is():
    pred, target = draw(1, 5, 6, 3)
    where = np.ones((1, 5, 6), bool)
    where[0, 0, 0] = where[0, 3, 4] = False
    clean = np.asarray(photometric_loss(pred, target, reduction="none"))  # done before pred changes
    pred[~where] = np.nan
    loss = lambda p: photometric_loss(p, target, where=where, reduction="none")
    kept = np.ones((1, 5, 6), bool)
    kept[0, :2, :2] = kept[0, 2:5, 3:6] = False
    np.testing.assert_allclose(loss(pred), np.where(kept, clean, 0), rtol=1e-5, atol=1e-7)
    mean = photometric_loss(pred, target, where=where)
    np.testing.assert_allclose(mean, clean[kept].mean(), rtol=1e-5)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(loss(p))))(pred)
    assert np.all(slope[~where] == 0)
    assert np.all(np.isfinite(slope))


def test_a_perfect_view_costs_nothing_and_black_against_white_nearly_all():
    (image,) = draw(2, 4, 5, 3, count=1)
    value, slope = jax.jit(jax.value_and_grad(photometric_loss))(image, image)
    assert value == 0
    np.testing.assert_allclose(slope, 0, atol=1e-7)
    black, white = (np.full((1, 3, 3, 1), x, np.float32) for x in (0, 1))
    c1 = 0.01**2
    expected = 0.85 * (1 - c1 / (1 + c1)) / 2 + 0.15
    np.testing.assert_allclose(photometric_loss(black, white), expected, rtol=1e-6)


def test_opposite_views_stay_within_one():
    rows, columns = np.mgrid[:6, :6]
    board = ((rows + columns) % 2).astype(np.float32)[None, ..., None]
    units = photometric_loss(board, 1 - board, alpha=1.0, reduction="none")
    assert np.all((units > 0.9) & (units <= 1))


def test_views_need_two_pixels_along_each_side_and_a_batch():
    with pytest.raises(ValueError, match="pred: expected sides of at least 2"):
        photometric_loss(jnp.ones((1, 1, 4, 3)), jnp.ones((1, 1, 4, 3)))
    with pytest.raises(ValueError, match="pred: expected shape"):
        photometric_loss(jnp.ones((4, 4, 3)), jnp.ones((4, 4, 3)))


def test_normals_are_compared_by_their_cosine():
    g = np.random.default_rng(0)
    pred, target = (g.standard_normal((2, 4, 5, 3)).astype(np.float32) for _ in range(2))
    target[0, 0, 0] = pred[0, 0, 0] * (1 + 1e-6)
    pred[0, 0, 1] = 0
    units = normal_cosine_loss(pred, target, reduction="none")
    expected = cosine_distance(pred, target, reduction="none")
    np.testing.assert_array_equal(units, expected)
    assert units[0, 0, 1] == 1
    assert np.all(np.isfinite(jax.jit(jax.grad(normal_cosine_loss))(pred, target)))


def test_every_pixel_of_a_plane_has_its_normal_facing_the_camera():
    camera = np.array([[50, 2, 8], [0, 60, 5], [0, 0, 1]], np.float32)
    normal = np.array([0.3, -0.2, -0.9])
    normal /= np.linalg.norm(normal)
    v, u = np.mgrid[:10, :16]
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(camera).T
    plane = (-2.5 / (rays @ normal))[None].astype(np.float32)
    assert np.all(plane > 0)
    got = depth_to_normals(plane, camera)
    np.testing.assert_allclose(got, np.broadcast_to(normal, got.shape), atol=2e-4)
    np.testing.assert_array_equal(got, depth_to_normals(plane, camera[None]))
    slope = jax.jit(jax.grad(lambda z: jnp.sum(depth_to_normals(z, camera))))(plane)
    assert np.all(np.isfinite(slope))
    with pytest.raises(ValueError, match=r"intrinsics: expected shape \(1, 3, 3\)"):
        depth_to_normals(plane, camera[None, None])


def test_a_depth_of_zero_has_no_normal_and_a_finite_gradient():
    zero, camera = np.zeros((1, 3, 3), np.float32), np.eye(3, dtype=np.float32)
    np.testing.assert_array_equal(depth_to_normals(zero, camera), 0)
    slope = jax.jit(jax.grad(lambda z: jnp.sum(depth_to_normals(z, camera))))(zero)
    assert np.all(np.isfinite(slope))


def test_virtual_normals_forgive_scale_and_shift_but_not_bends():
    g = np.random.default_rng(0)
    (target,) = (g.standard_normal((2, 30, 3)).astype(np.float32),)
    same = virtual_normal_loss(4 * target + 3, target, key=KEY, samples=200)
    np.testing.assert_allclose(same, 0, atol=1e-4)
    bent = target + np.array([0, 0, 0.5], np.float32) * target[..., :1] ** 2
    assert virtual_normal_loss(bent, target, key=KEY, samples=200) > 0.05


def test_triples_are_picked_among_the_kept_points_of_each_image():
    g = np.random.default_rng(0)
    pred, target = (g.standard_normal((2, 40, 3)).astype(np.float32) for _ in range(2))
    where = np.stack([g.permutation(40) < 9 for _ in range(2)])
    loss = lambda p, t, w: virtual_normal_loss(p, t, key=KEY, samples=50, where=w, reduction="none")
    units = loss(np.where(where[..., None], pred, np.nan), target, where)
    kept = lambda x: x[where].reshape(2, 9, 3)
    np.testing.assert_allclose(units, loss(kept(pred), kept(target), None), rtol=1e-6)
    assert np.all(units > 0)


def test_points_on_a_line_or_too_close_make_no_plane():
    g = np.random.default_rng(0)
    line = g.standard_normal((1, 20, 1)).astype(np.float32) * np.array([1, 2, 3], np.float32)
    free = g.standard_normal((1, 20, 3)).astype(np.float32)
    cluster = 1e-3 * free[:, ::-1]
    both = jax.jit(jax.value_and_grad(partial(virtual_normal_loss, key=KEY, samples=50)))
    for target in (line, cluster):
        value, slope = both(free, target)
        assert value == 0
        np.testing.assert_array_equal(slope, 0)
    value, slope = both(0 * free, free)  # a prediction without planes
    assert value > 0
    assert np.all(np.isfinite(slope))
    assert virtual_normal_loss(free, cluster, key=KEY, samples=50, min_distance=0.0) > 0


@pytest.mark.parametrize(("samples", "error"), [(0, ValueError), (2.5, TypeError)])
def test_the_number_of_triples_is_a_positive_integer(samples, error):
    with pytest.raises(error, match="samples: expected"):
        virtual_normal_loss(jnp.ones((1, 4, 3)), jnp.ones((1, 4, 3)), key=KEY, samples=samples)
