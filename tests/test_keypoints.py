"""Coordinates of keypoints: scaling by the object, kinks at 0, tiny scales, hidden joints."""

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

from jaxloss import checked, sequence_mean
from jaxloss.losses.keypoints import (
    COCO_SIGMAS,
    gaussian_rle_loss,
    oks_loss,
    rle_loss,
    soft_wing_loss,
    wing_loss,
)

ERRORS = [1e-12, 1e-6, 1e-3, 0.1, 0.4, 0.69, 0.71, 1.0, 3.0, 9.9, 10.1, 40.0, 1e4, 1e25]
PAIRS = ([*ERRORS, *(-e for e in ERRORS), 2.5, 3.5], [0.0] * (2 * len(ERRORS)) + [2.25, 3.75])
NUMBERS = arrays(np.float32, (6,), elements=st.integers(-800, 800).map(lambda n: n / 8))


def exactly(x):
    """The number that float32 makes of x."""
    return mp.mpf(float(np.float32(x)))


def wing(width, curvature):
    w, c = exactly(width), exactly(curvature)

    def exact(p, t):
        e = abs(p - t)
        return w * mp.log1p(e / c) if e < w else e - w + w * mp.log1p(w / c)

    return exact


def soft_wing(inner, outer, curvature):
    a, b, c = exactly(inner), exactly(outer), exactly(curvature)

    def exact(p, t):
        e = abs(p - t)
        return e if e < a else b * (mp.log1p(e / c) - mp.log1p(a / c)) + a

    return exact


def oks_of_one_joint(pred, target, area, *, reduction):
    values = oks_loss(
        pred[:, None, None], target[:, None, None], area, jnp.array([0.25]), reduction=reduction
    )
    return values if reduction == "sum" else values[:, 0]


@pytest.mark.parametrize(
    ("loss", "exact", "options"),
    [
        (wing_loss, wing(10, 2), {}),
        (wing_loss, wing(0.7, 0.3), dict(width=0.7, curvature=0.3)),
        (wing_loss, wing(10, 100), dict(curvature=100.0)),
        (soft_wing_loss, soft_wing(2, 20, 0.5), {}),
        (
            soft_wing_loss,
            soft_wing(0.7, 3, 0.2),
            dict(inner=0.7, outer=3.0, curvature=0.2),
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_value_and_slopes_match_fifty_digits(loss, exact, options):
    off = units_off(loss, exact, *PAIRS, **options)
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_similarity_of_near_joints_matches_fifty_digits():
    points = (
        [1e-6, 0.1, -0.7, 1.0, 2.0, 1.25, 0.5],
        [0.0, 0.0, 0.2, 0.25, 0.5, 1.0, 0.5001],
        [2.0, 0.5, 1.0, 3.0, 4.0, 1e-3, 1e-6],
    )
    off = units_off(
        oks_of_one_joint,
        lambda p, t, a: -mp.expm1(-((p - t) ** 2) / (2 * a * mp.mpf(0.25))),
        *points,
    )
    assert max(worst for worst, _ in off.values()) <= 4, off


@pytest.mark.parametrize("loss", [wing_loss, soft_wing_loss])
def test_wing_losses_have_slope_and_curvature_zero_at_equality(loss):
    x = jnp.array([0.0, 2.5, -7.0])
    np.testing.assert_array_equal(jax.grad(loss)(x, x), 0)
    np.testing.assert_array_equal(jax.hessian(loss)(x, x), 0)


def test_wing_loss_bends_at_its_width_without_a_jump():
    width = np.float32(10)
    below, above = np.nextafter(width, np.float32(0)), width
    near, far = (wing_loss(jnp.array(e), jnp.zeros(())) for e in (below, above))
    np.testing.assert_allclose(near, far, rtol=3e-7)
    slopes = [jax.grad(wing_loss)(jnp.array(e), jnp.zeros(())) for e in (below, above)]
    np.testing.assert_allclose(slopes, [10 / 12, 1], rtol=1e-6)


def test_a_wide_wing_is_a_logarithm_and_a_narrow_one_an_absolute_error():
    error = jnp.array([0.5, -3.0, 70.0])
    wide = wing_loss(error, jnp.zeros(3), width=1e6, curvature=4.0, reduction="none")
    np.testing.assert_allclose(wide, 1e6 * np.log1p(np.abs(error) / 4), rtol=1e-6)
    narrow = wing_loss(error, jnp.zeros(3), width=1e-9, reduction="none")
    np.testing.assert_allclose(narrow, np.abs(error), rtol=1e-6)


@given(NUMBERS, NUMBERS)
@settings(deadline=None)
def test_wing_losses_are_symmetric_and_grow_with_the_error(pred, target):
    for loss in (wing_loss, soft_wing_loss):
        values = loss(pred, target, reduction="none")
        np.testing.assert_array_equal(values, loss(target, pred, reduction="none"))
        order = np.argsort(np.abs(pred - target))
        assert np.all(np.diff(np.asarray(values)[order]) >= -1e-5)


def test_coco_has_seventeen_joints_whose_tolerance_doubles_from_eyes_to_wrists():
    assert len(COCO_SIGMAS) == 17
    pairs = np.array(COCO_SIGMAS[1:]).reshape(8, 2)
    np.testing.assert_array_equal(pairs[:, 0], pairs[:, 1])  # left and right
    assert COCO_SIGMAS[9] > 2 * COCO_SIGMAS[1]


def people(seed=0):
    g = np.random.default_rng(seed)
    target = g.uniform(0, 100, (4, 17, 2)).astype(np.float32)
    pred = target + g.normal(0, 5, target.shape).astype(np.float32)
    visible = g.random((4, 17)) < 0.6
    return pred, target, g.uniform(500, 5000, 4).astype(np.float32), visible


def test_one_minus_the_loss_of_a_person_is_the_similarity_of_the_benchmark():
    pred, target, area, visible = people()
    loss = oks_loss(
        pred, target, area, jnp.array(COCO_SIGMAS), where=visible, reduction=sequence_mean
    )
    squares = ((pred - target) ** 2).sum(-1).astype(np.float64)
    e = squares / (2 * np.array(COCO_SIGMAS)) ** 2 / area[:, None] / 2
    scores = [np.exp(-e[i][visible[i]]).mean() for i in range(4)]
    np.testing.assert_allclose(1 - loss, np.mean(scores), rtol=1e-5)


def test_the_mean_over_people_is_that_of_yolo_pose():
    pred, target, area, visible = people(1)
    sigmas = np.full(17, 1 / 17, np.float32)
    squares = ((pred - target) ** 2).sum(-1).astype(np.float64)
    factor = 17 / (visible.sum(1) + 1e-9)
    e = squares / ((2 * sigmas) ** 2 * (area[:, None] + 1e-9) * 2)
    theirs = (factor[:, None] * (1 - np.exp(-e)) * visible).mean()
    ours = oks_loss(pred, target, area, sigmas, where=visible, reduction=sequence_mean)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_person_without_a_visible_joint_costs_nothing_whatever_it_holds():
    pred, target, area, visible = people()
    visible[1] = False
    pred[1], target[1], area[1] = np.nan, np.inf, np.nan
    sigmas = jnp.array(COCO_SIGMAS)
    loss = lambda p, a, w: oks_loss(p, target, a, sigmas, where=w, reduction=sequence_mean)
    value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(pred, area, visible)
    others = [0, 2, 3]
    alone = oks_loss(
        pred[others],
        target[others],
        area[others],
        sigmas,
        where=visible[others],
        reduction=sequence_mean,
    )
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    assert np.all(np.isfinite(slopes[0]))
    assert np.all(slopes[0][1] == 0)
    assert slopes[1][1] == 0
    value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(pred, area, np.zeros_like(visible))
    assert value == 0
    assert all(np.all(s == 0) for s in slopes)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e6])
def test_similarity_does_not_depend_on_the_unit_if_the_area_is_in_the_same_one(scale):
    pred, target, area, _ = people()
    sigmas = jnp.array(COCO_SIGMAS)
    scaled = oks_loss(pred * scale, target * scale, area * scale**2, sigmas)
    np.testing.assert_allclose(scaled, oks_loss(pred, target, area, sigmas), rtol=1e-5)


def test_an_object_without_area_allows_no_error():
    pred, target = jnp.array([[[1.0, 2.0], [3.0, 4.0]]]), jnp.array([[[1.0, 2.0], [3.0, 4.5]]])
    loss = lambda p, a: oks_loss(p, target, a, jnp.ones(2), reduction="none")
    np.testing.assert_array_equal(loss(pred, jnp.zeros(1)), [[0, 1]])
    slopes = jax.grad(lambda *x: jnp.sum(loss(*x)), argnums=(0, 1))(pred, jnp.zeros(1))
    assert all(np.all(s == 0) for s in slopes)


@pytest.mark.parametrize("distance", [1e3, 1e20, 1e30])
def test_a_joint_far_off_has_loss_one_and_slope_zero(distance):
    pred = jnp.array([[[distance, 0.0]]])
    loss = lambda p: oks_loss(p, jnp.zeros((1, 1, 2)), jnp.ones(1), jnp.ones(1))
    value, slope = jax.value_and_grad(loss)(pred)
    assert value == 1
    np.testing.assert_array_equal(slope, 0)


def test_a_negative_area_is_nan_and_checked_says_so():
    pred, area = jnp.ones((2, 1, 2)), jnp.array([-1.0, 1.0])
    values = oks_loss(pred, 0 * pred, area, jnp.ones(1), reduction="none")
    np.testing.assert_array_equal(np.isnan(values), [[True], [False]])
    with pytest.raises(ValueError, match="area: expected values of at least 0, got 1 that are not"):
        checked(oks_loss)(pred, 0 * pred, area, jnp.ones(1))


def residuals(seed=0):
    g = np.random.default_rng(seed)
    pred, target, flow = (g.standard_normal((3, 4, 2)).astype(np.float32) for _ in range(3))
    return pred, g.uniform(-2, 1, (3, 4, 2)).astype(np.float32), target, flow


@pytest.mark.parametrize(
    ("loss", "residual"), [(rle_loss, stats.laplace), (gaussian_rle_loss, stats.norm)]
)
def test_residual_likelihood_adds_the_flow_and_the_scale_to_a_plain_one(loss, residual):
    pred, log_sigma, target, flow = residuals()
    plain = residual.logpdf(target, pred.astype(np.float64), np.exp(log_sigma.astype(np.float64)))
    expected = np.sum(log_sigma - flow - plain, axis=-1)
    values = loss(pred, log_sigma, target, flow, reduction="none")
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_one_density_for_a_joint_is_subtracted_once_for_each_coordinate():
    pred, log_sigma, target, flow = residuals()
    joint = flow[..., 0]
    repeated = np.repeat(joint[..., None], 2, axis=-1)
    np.testing.assert_array_equal(
        rle_loss(pred, log_sigma, target, joint), rle_loss(pred, log_sigma, target, repeated)
    )
    with pytest.raises(ValueError, match=r"flow_log_prob: expected shape \(3, 4, 2\)"):
        rle_loss(pred, log_sigma, target, joint[0, 0])


@pytest.mark.parametrize("loss", [rle_loss, gaussian_rle_loss])
@pytest.mark.parametrize("log_sigma", [-30.0, 30.0, -1e4])
def test_tiny_and_huge_scales_leave_a_perfect_joint_finite(loss, log_sigma):
    x = jnp.ones((1, 1, 2))
    scale = jnp.full_like(x, log_sigma)
    value, slope = jax.value_and_grad(loss, argnums=1)(x, scale, x, 0 * x)
    assert np.isfinite(value)
    np.testing.assert_allclose(slope, 2)


def test_a_tiny_scale_keeps_an_error_finite():
    x = jnp.full((1, 1, 2), 0.5)
    value, slopes = jax.value_and_grad(rle_loss, argnums=(0, 1))(x, 0 * x - 30, 0 * x, 0 * x)
    np.testing.assert_allclose(value, 2 * (-60 + np.log(2) + 0.5 * np.exp(30)), rtol=1e-6)
    np.testing.assert_allclose(slopes[0], np.exp(30), rtol=1e-6)
    np.testing.assert_allclose(slopes[1], 2 - 0.5 * np.exp(30), rtol=1e-6)


def test_the_flow_gets_its_gradient_through_its_own_argument_only():
    pred, log_sigma, target, flow = residuals()
    slope = jax.grad(rle_loss, argnums=3)(pred, log_sigma, target, flow)
    np.testing.assert_allclose(slope, -1 / 12, rtol=1e-6)
    for other in (flow, 3 * flow):
        slopes = jax.grad(rle_loss, argnums=(0, 1, 2))(pred, log_sigma, target, other)
        plain = jax.grad(rle_loss, argnums=(0, 1, 2))(pred, log_sigma, target, 0 * flow)
        for a, b in zip(slopes, plain, strict=True):
            np.testing.assert_array_equal(a, b)
