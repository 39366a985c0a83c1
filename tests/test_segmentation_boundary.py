"""Boundary, Hausdorff and centreline losses: exact distances, ties, edges and topology."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from jaxloss.losses.segmentation_boundary import (
    boundary_loss,
    hausdorff_dt_loss,
    hausdorff_er_loss,
    signed_distance_map,
    soft_cldice_loss,
)

GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(40,), (17, 23), (6, 7, 8), (1, 9)])
def test_signed_distances_are_exact(shape: tuple[int, ...]) -> None:
    masks = GENERATOR.random((3, *shape, 2)) < np.array([0.02, 0.6])
    masks[0, ..., 0], masks[1, ..., 1] = False, True
    got = np.asarray(signed_distance_map(masks))
    for b in range(3):
        for c in range(2):
            mask = masks[b, ..., c]
            expected = np.zeros(shape)
            if mask.any() and not mask.all():
                inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
                expected = np.where(mask, 1 - inside, outside)
            np.testing.assert_allclose(got[b, ..., c], expected, rtol=1e-6, atol=1e-6)


def test_a_prediction_inside_its_region_has_the_lowest_boundary_loss() -> None:
    square = np.zeros((1, 9, 9, 1), bool)
    square[:, 2:7, 2:7] = True
    distances = signed_distance_map(square)
    value = lambda p: float(boundary_loss(jnp.asarray(p, jnp.float32), distances))
    assert value(square) < 0 < value(~square)
    assert value(square) < value(np.ones_like(square))
    assert value(np.zeros_like(square)) == 0


def test_a_hidden_distance_does_not_count() -> None:
    probs, distances = jnp.ones((1, 4, 1)), jnp.array([[[1.0], [2.0], [np.nan], [np.inf]]])
    where = jnp.array([[True, True, False, False]])
    assert boundary_loss(probs, distances, where=where) == 1.5


def skeleton_loss(gap: bool) -> float:
    truth = np.zeros((1, 7, 15, 1), np.float32)
    truth[:, 2:5, 1:14] = 1
    probs = truth.copy()
    if gap:
        probs[:, :, 7] = 0
    else:
        probs[:, 2, 6:9] = 0  # as many pixels, on the rim
    return float(soft_cldice_loss(probs, truth, iterations=3))


def test_a_gap_costs_more_than_as_many_pixels_at_the_rim() -> None:
    assert skeleton_loss(True) > skeleton_loss(False) + 0.01


def test_a_perfect_tube_costs_nothing() -> None:
    truth = np.zeros((1, 5, 9, 1), np.float32)
    truth[:, 1:4, 1:8] = 1
    assert soft_cldice_loss(truth, truth) == 0
    labels = truth[..., 0].astype(np.int32)
    two = np.concatenate([1 - truth, truth], axis=-1)
    np.testing.assert_allclose(soft_cldice_loss(two, labels, reduction="none"), 0, atol=1e-6)


def test_beyond_the_edge_is_neither_object_nor_background() -> None:
    """Zero padding would erode a structure that touches the edge of the image."""
    full = jnp.ones((1, 6, 6, 1))
    value, slope = jax.value_and_grad(soft_cldice_loss)(full * 0.8, full)
    assert value == 0  # no skeleton at all: flat
    assert not np.any(slope)


@pytest.mark.parametrize("turn", [0, 1])
def test_tied_neighbours_share_the_slope_in_every_direction(turn: int) -> None:
    probs = np.full((1, 5, 5, 1), 0.5, np.float32)
    probs[0, 2] = 1.0
    probs[0, :, 2] = 1.0
    truth = np.zeros_like(probs)
    truth[0, 1:4, 1:4] = 1
    slope = np.asarray(jax.grad(soft_cldice_loss)(probs, truth))
    moved = np.swapaxes(slope, 1, 2) if turn else slope[:, ::-1, ::-1]
    np.testing.assert_allclose(moved, slope, atol=1e-7)
    assert np.any(slope)


def test_hidden_positions_are_background_of_the_skeleton() -> None:
    where = np.ones((1, 5, 7), bool)
    where[:, :, 3] = False
    probs = GENERATOR.random((1, 5, 7, 2)).astype(np.float32)
    truth = (GENERATOR.random((1, 5, 7, 2)) < 0.5).astype(np.float32)
    kept = where[..., None]
    got = soft_cldice_loss(np.where(kept, probs, np.nan), truth, where=where)
    np.testing.assert_array_equal(got, soft_cldice_loss(probs * kept, truth * kept))


@pytest.mark.parametrize("loss", [hausdorff_er_loss, soft_cldice_loss])
def test_a_bad_label_makes_its_sample_nan_and_no_other(loss) -> None:
    probs = GENERATOR.dirichlet(np.ones(3), (2, 4, 4)).astype(np.float32)
    labels = GENERATOR.integers(0, 3, (2, 4, 4))
    labels[1, 2, 2] = 3
    units, back = jax.vjp(lambda p: loss(p, labels, reduction="none"), probs)
    slope = back(jnp.ones_like(units))[0]
    for x in (units, slope):
        assert np.all(np.isnan(x[1]))
        assert np.all(np.isfinite(x[0]))


def test_thick_errors_outlast_scattered_ones_under_erosion() -> None:
    target = jnp.zeros((1, 9, 9, 1))
    blob, dust = target.at[0, 3:6, 3:6].set(1), target.at[0, ::3, ::3].set(1)
    value = lambda p: hausdorff_er_loss(p, target, iterations=3)
    assert np.sum(blob) == np.sum(dust)
    assert value(blob) > 0
    assert value(dust) == 0
    assert not np.any(jax.grad(value)(target))  # no range to stretch


def test_an_error_far_from_the_boundary_costs_with_the_power_of_its_distance() -> None:
    target, probs = jnp.zeros((1, 4, 1)), jnp.ones((1, 4, 1))
    far = jnp.arange(4.0).reshape(1, 4, 1)
    for alpha in (0.5, 2.0, 3.0):
        expected = 2 * np.mean(np.arange(4.0) ** alpha)
        value = hausdorff_dt_loss(probs, target, far, far, alpha=alpha)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert hausdorff_dt_loss(probs, target, far, far, alpha=0.0) == 2
    slope = jax.grad(lambda d: hausdorff_dt_loss(probs, target, d, far, alpha=0.5))(far)
    assert np.all(np.isfinite(slope))
