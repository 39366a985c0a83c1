"""Rotated boxes: Gaussians in 50 digits, equal, turned, flat and far boxes."""

from functools import cache, partial

import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from oracle import units_and_gradient, units_off

from jaxloss import checked
from jaxloss.losses.rotated_boxes import (
    gwd_loss,
    kfiou_loss,
    kld_loss,
    probiou_loss,
    rotated_angle_loss,
)

LOSSES = (gwd_loss, kfiou_loss, kld_loss, probiou_loss)
DISTANCES = (gwd_loss, kld_loss, probiou_loss)
POINTS = [
    (0, 0, 3, 1, 0.3, 0.5, -0.25, 2, 1.5, -0.4),
    (0, 0, 3, 1, 0.3, 0.5, -0.25, 1.5, 2, -0.4),  # the longer side is the other one
    (5, 4, 2, 1, 0.7, 5 + 1e-4, 4 - 3e-4, 2 - 2e-4, 1 + 1e-4, 0.7 + 2e-4),  # almost equal
    (5, 4, 2, 1, 0.7, 5.125, 4, 2, 1.125, -2.3),  # half a turn
    (0, 0, 3, 1, 0, 0.125, 0.25, 1, 3, 1.5),  # a right angle, sides exchanged
    (0, 0, 20, 0.125, 1, 3, 0.25, 25, 0.25, 1.25),  # slim
    (1e5, 1e5, 2, 1, 0.3, 1e5 + 1, 1e5 + 0.5, 2, 3, 0.5),
]


def boxes(count, seed=0):
    g = np.random.default_rng(seed)
    return g.uniform([0, 0, 1, 1, -3], [6, 6, 5, 5, 3], (count, 5)).astype(np.float32)


@cache
def gaussian(box, share):
    """Centre, and covariance R diag(w^2, h^2) R^T times `share`, in objects of mpmath."""
    x, y, w, h, theta = box
    cos, sin = mp.cos_sin(theta)
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.array([x, y]), share * (turn * [w**2, h**2]) @ turn.T


def det(m):
    return m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]


def inverse(m):
    return np.array([[m[1, 1], -m[0, 1]], [-m[1, 0], m[0, 0]]]) / det(m)


def probiou(p, t):
    (m1, s1), (m2, s2) = (gaussian(b, mp.mpf(1) / 12) for b in (p, t))
    s, d = (s1 + s2) / 2, m1 - m2
    square = d @ inverse(s) @ d
    ratio = det(s) / mp.sqrt(det(s1) * det(s2))
    return mp.sqrt(1 - mp.exp(-square / 8 - mp.log(ratio) / 2))


def gwd(p, t):
    (m1, s1), (m2, s2) = (gaussian(b, mp.mpf(1) / 4) for b in (p, t))
    root = mp.sqrt(np.trace(s1 @ s2) + 2 * mp.sqrt(det(s1) * det(s2)))
    d = m1 - m2
    return 1 - 1 / (1 + mp.log(1 + d @ d + np.trace(s1 + s2) - 2 * root))


def kld(p, t):
    (m1, s1), (m2, s2) = (gaussian(b, mp.mpf(1) / 4) for b in (p, t))
    precision, d = inverse(s2), m1 - m2
    total = d @ precision @ d + np.trace(precision @ s1) - 2 + mp.log(det(s2) / det(s1))
    return 1 - 1 / (1 + mp.log(1 + total / 2))


def kfiou(p, t):
    (_, s1), (_, s2) = (gaussian(b, mp.mpf(1) / 4) for b in (p, t))
    s3 = s1 - s1 @ inverse(s1 + s2) @ s1
    v1, v2, v3 = (mp.sqrt(det(s)) for s in (s1, s2, s3))
    return 1 - v3 / (v1 + v2 - v3)


@pytest.mark.parametrize(
    ("loss", "exact"),
    [(gwd_loss, gwd), (kfiou_loss, kfiou), (kld_loss, kld), (probiou_loss, probiou)],
    ids=lambda x: x.__name__,
)
def test_value_and_slopes_match_fifty_digits(loss, exact) -> None:
    def split(*numbers, reduction):
        return loss(jnp.stack(numbers[:5], -1), jnp.stack(numbers[5:], -1), reduction=reduction)

    off = units_off(split, lambda *x: exact(x[:5], x[5:]), *zip(*POINTS, strict=True))
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_the_angle_loss_matches_fifty_digits() -> None:
    points = ([0.1, 1.5, 3.0, -0.7, 2.0], [0.1 + 1e-5, -1.2, -3.1, -0.6, 0.5])
    off = units_off(rotated_angle_loss, lambda a, b: mp.sin(2 * (a - b)) ** 2, *points)
    assert max(worst for worst, _ in off.values()) <= 4, off


@pytest.mark.parametrize("loss", DISTANCES)
def test_equal_boxes_cost_nothing_without_gradient(loss) -> None:
    # ultralytics' probiou costs 4.5e-4 there
    pred = boxes(16)
    value, gradient = units_and_gradient(loss, pred, pred)
    assert not np.any(value)
    assert not np.any(gradient)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_right_angle_with_exchanged_sides_is_the_same_box(loss) -> None:
    pred, target = boxes(16), boxes(16, 1)
    turned = np.concatenate([target[:, :2], target[:, 3:1:-1], target[:, 4:] + np.pi / 2], -1)
    value, gradient = units_and_gradient(loss, pred, target)
    other = units_and_gradient(loss, pred, turned.astype(np.float32))
    np.testing.assert_allclose(other[0], value, rtol=1e-5)
    np.testing.assert_allclose(other[1], gradient, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_angle_of_a_square_does_not_matter(loss) -> None:
    pred, target = boxes(16), boxes(16, 1)
    target[:, 3] = target[:, 2]
    other = target + np.float32([0, 0, 0, 0, 0.5])
    value, gradient = units_and_gradient(loss, pred, target)
    turned = units_and_gradient(loss, pred, other)
    np.testing.assert_allclose(turned[0], value, rtol=1e-5)
    np.testing.assert_allclose(turned[1], gradient, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_flat_and_far_boxes_have_finite_values_and_gradients(loss) -> None:
    kinds = np.array(
        [
            (1, 1, 3, 2, 0.5),
            (1, 1, 0, 2, 0.5),
            (1, 1, 0, 0, 0.5),
            (0, 0, 0, 0, 0),
            (1e7, -1e7, 3, 2, 0.5),
            (1, 1, 1e-12, 2e-12, 0.5),
        ],
        np.float32,
    )
    pred, target = np.repeat(kinds, 6, 0), np.tile(kinds, (6, 1))
    value, gradient = units_and_gradient(loss, pred, target)
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("loss", [kfiou_loss, kld_loss, probiou_loss])
def test_the_scale_of_a_pair_does_not_matter(loss) -> None:
    pred, target = boxes(16), boxes(16, 1)
    value = loss(pred, target, reduction="none")
    for scale in (2.0**-84, 2.0**80):
        factors = np.float32([scale, scale, scale, scale, 1])
        np.testing.assert_allclose(
            loss(factors * pred, factors * target, reduction="none"), value, rtol=1e-6
        )


def test_a_box_without_area_is_no_gaussian() -> None:
    line, solid = np.float32([[1, 1, 0, 2, 0]]), np.float32([[1, 1, 2, 2, 0]])
    for loss in (kld_loss, probiou_loss):
        value, gradient = units_and_gradient(loss, line, solid)
        assert value == 1
        assert not np.any(gradient)
    assert 0 < gwd_loss(line, solid) < 1
    assert kfiou_loss(line, solid) == 1


def test_kfiou_sees_no_centres_and_ends_at_two_thirds() -> None:
    pred = boxes(16)
    moved = pred + np.float32([3, 4, 0, 0, 0])
    np.testing.assert_allclose(kfiou_loss(pred, moved, reduction="none"), 2 / 3, rtol=1e-6)
    others = kfiou_loss(pred, boxes(16, 1), reduction="none")
    assert np.all((others > 2 / 3) & (others <= 1))


def test_tau_lifts_and_flattens() -> None:
    pred, target = boxes(16), boxes(16, 1)
    for loss in (gwd_loss, kld_loss):
        distance = 1 / (1 - loss(pred, target, reduction="none")) - 1
        lifted = loss(pred, target, tau=2.0, reduction="none")
        np.testing.assert_allclose(lifted, 1 - 1 / (2 + distance), rtol=1e-5)


def test_probiou_is_a_symmetric_distance() -> None:
    a, b, c = (boxes(64, seed) for seed in range(3))
    units = partial(probiou_loss, reduction="none")
    np.testing.assert_allclose(units(a, b), units(b, a), rtol=1e-5)
    assert np.all(units(a, c) <= units(a, b) + units(b, c) + 1e-6)


def test_angles_a_right_angle_apart_cost_nothing() -> None:
    value = rotated_angle_loss(jnp.array([0.3 + jnp.pi / 2]), jnp.array([0.3]))
    assert value < 1e-12


def test_checked_finds_negative_sizes() -> None:
    pred = boxes(2)
    bad = pred * np.float32([1, 1, -1, 1, 1])
    with pytest.raises(ValueError, match=r"^probiou_loss: target: expected boxes whose width"):
        checked(probiou_loss)(pred, bad)


def test_a_rotated_box_has_five_numbers() -> None:
    with pytest.raises(ValueError, match=r"^kld_loss: pred: expected a last axis of size 5"):
        kld_loss(jnp.ones((2, 4)), jnp.ones((2, 4)))
