"""Poses: perfect joints, missing frames, bones without ends, and every hard case of alignment."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import value_and_gradients
from scipy.spatial.transform import Rotation

from jaxloss import checked
from jaxloss.losses import pose
from jaxloss.losses.pose import (
    bone_length_loss,
    mpjpe_loss,
    procrustes_mpjpe_loss,
    velocity_loss,
)

ROTATION = jax.jit(lambda m, moved: jax.jvp(pose._rotation, (m,), (moved,)))
PARENTS = np.array([0, 0, 1, 1, 3])
GIVEN, FLOWING = (
    partial(procrustes_mpjpe_loss, stop_gradient_transform=given) for given in (True, False)
)


def poses(*shape, seed=0, scale=1.0):
    g = np.random.default_rng(seed)
    return tuple((scale * g.standard_normal(shape)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize(
    "loss", [mpjpe_loss, velocity_loss, lambda p, t: bone_length_loss(p, t, PARENTS)]
)
def test_a_perfect_pose_has_value_slope_and_curvature_zero(loss):
    x, _ = poses(2, 3, 5, 3)
    both = jax.value_and_grad(loss)
    (value, slope), (_, curve) = jax.jit(lambda x: jax.jvp(both, (x, x), (x, x)))(x)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
    assert np.all(np.isfinite(curve))


def test_a_joint_that_coincides_with_its_parent_has_a_finite_slope():
    _, target = poses(1, 5, 3)
    _, (slope, _) = value_and_gradients(bone_length_loss, 0 * target, target, parents=PARENTS)
    assert np.all(np.isfinite(slope))


def test_a_moving_pose_that_is_always_off_by_the_same_has_the_right_velocity():
    _, target = poses(2, 4, 5, 3)
    np.testing.assert_allclose(velocity_loss(target + 7, target), 0, atol=1e-6)


def test_a_velocity_needs_both_frames():
    pred, target = poses(1, 4, 2, 3)
    where = np.array([[[1, 1], [0, 1], [1, 1], [1, 1]]], bool)
    pred[0, 1, 0] = np.nan
    moved = np.diff(pred - target, axis=1)
    expected = np.linalg.norm(moved.astype(np.float64), axis=-1)
    value, (slope, _) = value_and_gradients(velocity_loss, pred, target, where=where)
    np.testing.assert_allclose(value, np.mean([expected[0, 2, 0], *expected[0, :, 1]]), rtol=1e-6)
    assert np.all(np.isfinite(slope))
    assert np.all(slope[0, :2, 0] == 0)


def test_one_frame_has_no_velocity():
    pred, target = poses(2, 1, 5, 3)
    value, (slope, _) = value_and_gradients(velocity_loss, pred, target)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def lengths(x):
    children = [1, 2, 3, 4]
    return np.linalg.norm(x[..., children, :] - x[..., PARENTS[children], :], axis=-1)


def test_bones_run_from_each_joint_to_its_parent_and_a_root_is_none():
    pred, target = poses(6, 5, 3)
    expected = np.abs(lengths(pred.astype(np.float64)) - lengths(target.astype(np.float64))).mean(
        -1
    )
    units = bone_length_loss(pred, target, PARENTS, reduction="none")
    np.testing.assert_allclose(units, expected, rtol=1e-5)


def test_bones_do_not_feel_turns_and_moves():
    _, target = poses(6, 5, 3)
    turn = Rotation.random(6, random_state=1).as_matrix().astype(np.float32)
    moved = np.einsum("bij,bkj->bki", turn, target) + 3
    np.testing.assert_allclose(bone_length_loss(moved, target, PARENTS), 0, atol=2e-6)


def test_a_bone_needs_both_ends_and_a_pose_without_bones_is_no_unit():
    pred, target = poses(3, 5, 3)
    where = np.array([[1, 1, 0, 1, 1], [0, 1, 0, 0, 0], [1] * 5], bool)
    pred[~where] = np.nan
    units = bone_length_loss(pred, target, PARENTS, where=where, reduction="none")
    errors = np.abs(lengths(pred.astype(np.float64)) - lengths(target.astype(np.float64)))
    expected = [errors[0, [0, 2, 3]].mean(), 0, errors[2].mean()]
    np.testing.assert_allclose(units, expected, rtol=1e-5)
    mean = bone_length_loss(pred, target, PARENTS, where=where)
    np.testing.assert_allclose(mean, (expected[0] + expected[2]) / 2, rtol=1e-5)


@jax.jit
def bone_units(pred, target, parents, where):
    """Units and the gradient of their sum."""
    loss = lambda p: bone_length_loss(p, target, parents, where=where, reduction="none")
    units, pull = jax.vjp(loss, pred)
    return units, pull(jnp.ones_like(units))[0]


@pytest.mark.parametrize("parent", [-1, 5, 2**31 - 1])
def test_a_parent_that_does_not_exist_is_nan_where_its_joint_is_visible(parent):
    pred, target = poses(2, 5, 3)
    parents = PARENTS.copy()
    parents[2] = parent
    where = np.array([[1] * 5, [1, 1, 0, 1, 1]], bool)
    units, slope = bone_units(pred, target, parents, where)
    assert np.isnan(units[0])
    assert np.isfinite(units[1])
    assert np.any(np.isnan(slope[0]))
    assert np.all(np.isfinite(slope[1]))
    with pytest.raises(ValueError, match=r"parents: expected values in \[0, 5\), got 1"):
        checked(bone_length_loss)(pred, target, parents)
    with pytest.raises(TypeError, match="parents: expected an integer dtype"):
        bone_length_loss(pred, target, parents.astype(np.float32))


def similar(target, seed=0, mirrored=False):
    """The same poses turned, scaled and moved, and mirrored if asked."""
    g, dim = np.random.default_rng(seed), target.shape[-1]
    turn = Rotation.random(len(target), random_state=seed).as_matrix()
    if dim == 2:
        turn = Rotation.from_rotvec(g.uniform(-3, 3, (len(target), 1)) * [0, 0, 1]).as_matrix()
    scale = g.uniform(0.2, 5, (len(target), 1, 1))
    turned = scale * np.einsum("bij,bkj->bki", turn[:, :dim, :dim], target) + g.normal(size=dim)
    return (turned * ([-1] + [1] * (dim - 1)) if mirrored else turned).astype(np.float32)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("flowing", [False, True])
def test_turned_scaled_and_moved_poses_fit_exactly_and_mirrored_ones_do_not(dim, flowing):
    _, target = poses(20, 8, dim)
    loss = partial(FLOWING if flowing else GIVEN, reduction="none")
    np.testing.assert_allclose(np.mean(loss(similar(target), target)), 0, atol=1e-5)
    mirrored = loss(similar(target, mirrored=True), target)
    assert np.all(np.mean(mirrored, axis=-1) > 0.1)


@pytest.mark.parametrize("dim", [2, 3])
def test_two_visible_joints_always_fit_and_give_no_noise_as_gradient(dim):
    pred, target = poses(20, 5, dim)
    where = np.array([[1, 0, 0, 1, 0]] * 20, bool)
    pred[~where] = np.nan
    value, (slope, _) = value_and_gradients(procrustes_mpjpe_loss, pred, target, where=where)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def test_a_perfect_pose_has_no_noise_as_gradient():
    _, target = poses(20, 8, 3, scale=100.0)
    value, (slope, _) = value_and_gradients(procrustes_mpjpe_loss, target, target)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def fit(pred, target):
    """Scale, rotation and shift in float64, by the SVD."""
    p, t = pred - pred.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(t.T @ p)
    sign = np.ones(len(s))
    sign[-1] = np.linalg.det(u @ vt)
    turn = u @ (sign[:, None] * vt)
    scale = (s * sign).sum() / (p**2).sum()
    return scale, turn, target.mean(0) - scale * turn @ pred.mean(0)


def residual(pred, target, reference=None):
    scale, turn, shift = fit(*(x.astype(np.float64) for x in (reference or (pred, target))))
    return scale * pred.astype(np.float64) @ turn.T + shift - target


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("joints", [3, 8])
def test_distances_are_those_after_the_fit_by_singular_values(dim, joints):
    pred, target = poses(20, joints, dim)
    units = procrustes_mpjpe_loss(pred, target, reduction="none")
    for p, t, got in zip(pred, target, units, strict=True):
        np.testing.assert_allclose(got, np.linalg.norm(residual(p, t), axis=-1), atol=2e-5)


def test_the_rotation_is_that_of_align_vectors_also_for_mirrored_poses():
    pred, target = poses(50, 6, 3)
    moments = np.einsum("bki,bkj->bij", target, pred)
    got, _ = jax.vmap(ROTATION)(moments, moments)
    assert np.sum(np.linalg.det(moments) < 0) > 10
    for p, t, r in zip(pred, target, got, strict=True):
        expected, _ = Rotation.align_vectors(t, p)
        np.testing.assert_allclose(r, expected.as_matrix(), atol=1e-5)


@pytest.mark.parametrize(
    "moments",
    [
        np.zeros((3, 3)),
        np.diag([1.0, 0, 0]),
        np.outer([1, 2, 3], [3, 1, 2]),
        np.diag([1.0, 1, 0]),
        np.diag([1.0, 1, -1]),
        -np.eye(3),
        1e-30 * np.eye(3)[::-1],
    ],
    ids=["nothing", "line", "turned line", "plane", "mirror", "inversion", "tiny"],
)
def test_joints_that_leave_the_rotation_free_still_get_one_with_a_finite_derivative(moments):
    moments = moments.astype(np.float32)
    move = np.arange(9, dtype=np.float32).reshape(3, 3)
    turn, moved = map(np.asarray, ROTATION(moments, move))
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(turn), 1, atol=1e-6)
    s = np.linalg.svd(np.asarray(moments, np.float64))
    best = np.sum(s[1]) - (2 * s[1][-1] if np.linalg.det(s[0] @ s[2]) < 0 else 0)
    np.testing.assert_allclose(np.sum(turn * moments), best, rtol=1e-5)
    assert np.all(np.isfinite(moved))


@pytest.mark.parametrize("flowing", [False, True])
def test_joints_on_a_line_or_at_a_point_have_finite_values_and_slopes(flowing):
    g = np.random.default_rng(0)
    along = g.standard_normal((1, 6, 1)) * np.array([1.0, 2.0, -1.0])
    free = g.standard_normal((1, 6, 3))
    point = np.ones((1, 6, 3))
    loss = FLOWING if flowing else GIVEN
    for pred, target in (
        (along, free),
        (free, along),
        (along, 3 - along),
        (point, free),
        (free, point),
    ):
        value, slopes = value_and_gradients(
            loss, pred.astype(np.float32), target.astype(np.float32)
        )
        expected = (
            np.linalg.norm(residual(pred[0], target[0]), axis=-1).mean()
            if pred is not point
            else (np.linalg.norm(target - target.mean(1), axis=-1).mean())
        )
        np.testing.assert_allclose(value, expected, atol=1e-5)
        assert all(np.all(np.isfinite(s)) for s in slopes)


def test_hidden_joints_take_no_part_in_the_fit():
    pred, target = poses(4, 7, 3)
    where = np.array([[1, 1, 0, 1, 0, 1, 1]] * 4, bool)
    kept = where[0]
    pred[~where], target[~where] = np.nan, np.inf
    value, slopes = value_and_gradients(FLOWING, pred, target, where=where)
    alone, expected = value_and_gradients(FLOWING, pred[:, kept], target[:, kept])
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    for slope, part in zip(map(np.asarray, slopes), expected, strict=True):
        np.testing.assert_allclose(slope[:, kept], part, atol=1e-6)
        assert np.all(slope[:, ~kept] == 0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_alignment_works_at_every_scale(scale):
    pred, target = poses(4, 6, 3)
    plain = procrustes_mpjpe_loss(pred, target)
    np.testing.assert_allclose(procrustes_mpjpe_loss(pred * scale, target), plain, rtol=1e-5)
    np.testing.assert_allclose(
        procrustes_mpjpe_loss(pred, target * scale) / scale, plain, rtol=1e-5
    )


@pytest.mark.parametrize("dim", [2, 3])
def test_gradients_match_differences_with_and_without_a_given_transform(dim):
    with jax.enable_x64(True):
        pred, target = (x.astype(np.float64) for x in poses(1, 6, dim))
        move = np.random.default_rng(5).standard_normal(pred.shape)
        mean = lambda e: np.linalg.norm(e, axis=-1).mean()
        for flowing in (False, True) if dim == 3 else (True,):
            _, (slope, _) = value_and_gradients(FLOWING if flowing else GIVEN, pred, target)
            ahead, behind = (
                mean(
                    residual(
                        pred[0] + h * move[0],
                        target[0],
                        None if flowing else (pred[0], target[0]),
                    )
                )
                for h in (1e-5, -1e-5)
            )
            np.testing.assert_allclose(np.sum(slope * move), (ahead - behind) / 2e-5, rtol=1e-6)


def test_second_derivatives_through_the_fit_match_differences_of_gradients():
    with jax.enable_x64(True):
        pred, target = (x.astype(np.float64) for x in poses(1, 5, 3))
        move = np.random.default_rng(5).standard_normal(pred.shape)
        gradient = jax.grad(lambda p: FLOWING(p, target))
        both = jax.jit(lambda p: jax.jvp(gradient, (p,), (move,)))
        _, curve = both(pred)
        (ahead, _), (behind, _) = (jax.device_get(both(pred + h * move)) for h in (1e-5, -1e-5))
        numeric = (ahead - behind) / 2e-5
        np.testing.assert_allclose(curve, numeric, rtol=1e-5, atol=1e-8)


def test_float32_gradients_are_as_exact_as_the_last_digits_of_the_poses_allow():
    """Poses at random hardly fit, so that a digit of the input moves several of the gradient."""
    pred, target = poses(8, 6, 3)
    gradient = jax.jit(jax.grad(procrustes_mpjpe_loss))
    slope = gradient(pred, target)
    g = np.random.default_rng(1)
    with jax.enable_x64(True):
        wide = [x.astype(np.float64) for x in (pred, target)]
        exact = np.asarray(gradient(*wide))
        moved = np.zeros_like(exact)
        for _ in range(20):
            ulps = [
                x + np.spacing(np.abs(x.astype(np.float32))) * g.choice([-1, 1], x.shape)
                for x in wide
            ]
            moved = np.maximum(moved, np.abs(gradient(*ulps) - exact))
    unit = np.spacing(np.abs(exact).max().astype(np.float32)) + moved.max((1, 2), keepdims=True)
    assert np.max(np.abs(slope - exact) / unit) <= 4


def test_alignment_is_for_two_or_three_dimensions():
    with pytest.raises(ValueError, match="pred: expected 2 or 3 coordinates"):
        procrustes_mpjpe_loss(np.ones((2, 5, 4)), np.ones((2, 5, 4)))
