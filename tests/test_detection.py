"""Dense detection losses: formulas in 50 digits, whole bins, exact peaks, hard negatives."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_and_gradient, units_off

from jaxloss import checked
from jaxloss.losses.classification import softmax_cross_entropy
from jaxloss.losses.detection import (
    distribution_focal_loss,
    expected_bin,
    gaussian_focal_loss,
    hard_negative_mining,
    quality_focal_loss,
    varifocal_loss,
)
from jaxloss.losses.focal import sigmoid_focal_loss

GENERATOR = np.random.default_rng(0)
LOGITS = [-90.0, -20.0, -3.0, -0.1, 0.0, 0.7, 2.0, 14.0, 20.0, 90.0]
INSIDE = tuple(zip(*[(z, q) for z in LOGITS for q in (0.1, 0.5, 0.99)], strict=True))
BINS = np.float32(2 * GENERATOR.standard_normal((8, 6)))


def costs(z):
    return mp.log1p(mp.exp(-z)), mp.log1p(mp.exp(z))


def cross_entropy(z, q):
    one, zero = costs(z)
    return q * one + (1 - q) * zero


def sigmoid(z):
    return 1 / (1 + mp.exp(-z))


def quality_focal(z, q):
    return abs(q - sigmoid(z)) ** 2 * cross_entropy(z, q)


def varifocal(z, q):
    weight = q if q > 0 else mp.mpf(0.75) * sigmoid(z) ** 2
    return weight * cross_entropy(z, q)


def gaussian_focal(z, g):
    one, zero = costs(z)
    p = sigmoid(z)
    return (1 - p) ** 2 * one if g == 1 else (1 - g) ** 4 * p**2 * zero


@pytest.mark.parametrize(
    ("loss", "exact"),
    [
        (quality_focal_loss, quality_focal),
        (varifocal_loss, varifocal),
        (gaussian_focal_loss, gaussian_focal),
    ],
    ids=lambda x: x.__name__,
)
def test_value_and_slopes_match_fifty_digits(loss, exact) -> None:
    off = units_off(loss, exact, *INSIDE)
    assert max(worst for worst, _ in off.values()) <= 4, off
    for q in (0.0, 1.0):  # the slope in a target of 0 or 1 is one-sided
        fixed = lambda z, *, reduction, q=q: loss(z, jnp.full_like(z, q), reduction=reduction)
        off = units_off(fixed, lambda z, q=q: exact(z, q), LOGITS)
        assert max(worst for worst, _ in off.values()) <= 4, (q, off)


def test_distribution_focal_loss_is_two_cross_entropies() -> None:
    target = np.float32([0, 0.25, 1, 2.5, 3.75, 4, 4.5, 5])
    lower = np.minimum(np.floor(target), 4).astype(np.int32)
    below, above = (softmax_cross_entropy(BINS, lower + k, reduction="none") for k in (0, 1))
    expected = (lower + 1 - target) * below + (target - lower) * above
    got = distribution_focal_loss(BINS, target, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    slope = jax.grad(lambda y: distribution_focal_loss(BINS, y, reduction="sum"))(target)
    np.testing.assert_allclose(slope, above - below, rtol=1e-5, atol=1e-6)


def test_a_target_on_the_last_bin_is_its_cross_entropy() -> None:
    # Peers gather the bin behind the last one.
    last = np.full(8, 5, np.float32)
    value, gradient = units_and_gradient(distribution_focal_loss, BINS, last)
    np.testing.assert_allclose(value, jax.nn.logsumexp(BINS, -1) - BINS[:, -1], rtol=1e-6)
    probs = jax.nn.softmax(BINS) - np.eye(6)[5]
    np.testing.assert_allclose(gradient, probs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [-0.01, 5.01, np.nan, np.inf])
def test_a_target_outside_the_bins_poisons_its_unit_alone(bad: float) -> None:
    target = np.full(8, 2.5, np.float32)
    target[3] = bad
    value, gradient = units_and_gradient(distribution_focal_loss, BINS, target)
    assert np.array_equal(np.isnan(value), np.arange(8) == 3)
    assert np.array_equal(np.isnan(gradient).all(-1), np.arange(8) == 3)
    assert np.array_equal(np.isnan(gradient).any(-1), np.arange(8) == 3)
    with pytest.raises(ValueError, match=r"^distribution_focal_loss: target: expected values in"):
        checked(distribution_focal_loss)(BINS, target)


def test_one_bin_is_no_distribution() -> None:
    with pytest.raises(ValueError, match="at least 2 bins"):
        distribution_focal_loss(jnp.ones((2, 1)), jnp.zeros(2))


def test_the_expected_bin_is_the_mean_of_the_distribution() -> None:
    sharp = 1e4 * np.eye(6, dtype=np.float32)
    np.testing.assert_array_equal(expected_bin(sharp), np.arange(6))
    np.testing.assert_allclose(expected_bin(np.zeros((2, 16), np.float16)), 7.5)
    assert expected_bin(np.zeros((2, 16), np.float16)).dtype == jnp.float32
    p = np.asarray(jax.nn.softmax(BINS.astype(np.float64)))
    np.testing.assert_allclose(expected_bin(BINS), p @ np.arange(6), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_a_score_equal_to_the_quality_costs_nothing(beta: float) -> None:
    # |q - s|^beta has an infinite slope there for beta < 1.
    logits = np.float32([0.0, 0.0])
    value, gradient = units_and_gradient(
        quality_focal_loss, logits, np.float32([0.5, 0.5]), beta=beta
    )
    assert not np.any(value)
    assert not np.any(gradient)


@pytest.mark.parametrize("gamma", [0.5, 1.5, 2.0])
def test_hard_qualities_are_focal_loss(gamma: float) -> None:
    logits = np.float32(GENERATOR.standard_normal((6, 5)) * 3)
    bits = GENERATOR.integers(0, 2, (6, 5)).astype(np.float32)
    focal = units_and_gradient(sigmoid_focal_loss, logits, bits, gamma=gamma)
    for got in (
        units_and_gradient(quality_focal_loss, logits, bits, beta=gamma),
        units_and_gradient(gaussian_focal_loss, logits, bits, alpha=gamma, gamma=3.0),
    ):
        np.testing.assert_allclose(got[0], focal[0], rtol=2e-6)
        np.testing.assert_allclose(got[1], focal[1], rtol=1e-5, atol=1e-7)


def test_varifocal_negatives_are_focal_and_positives_weighted() -> None:
    logits = np.float32(GENERATOR.standard_normal((6, 5)) * 3)
    nothing = np.zeros((6, 5), np.float32)
    np.testing.assert_allclose(
        varifocal_loss(logits, nothing, alpha=0.6, gamma=1.5),
        0.6 * sigmoid_focal_loss(logits, nothing, gamma=1.5),
        rtol=1e-6,
    )
    one = varifocal_loss(logits, nothing + 1)
    np.testing.assert_allclose(one, np.mean(np.log1p(np.exp(-logits))), rtol=1e-6)


def test_stopped_varifocal_weights_leave_the_gradient_of_the_cross_entropy() -> None:
    logits = np.float32(LOGITS)
    value, gradient = units_and_gradient(
        varifocal_loss, logits, 0 * logits, stop_gradient_weights=True
    )
    s = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(value, varifocal_loss(logits, 0 * logits, reduction="none"))
    np.testing.assert_allclose(gradient, 0.75 * s**2 * s, rtol=1e-5, atol=1e-30)


def test_a_peak_survives_float16_and_nothing_else_is_one() -> None:
    # keras_cv takes cells above 0.99 as positives.
    heat = np.float32([1.0, 0.999, 0.9995]).astype(np.float16)
    logits = np.zeros(3, np.float16)
    value = gaussian_focal_loss(logits, heat, reduction="none")
    far = (1 - heat.astype(np.float64)) ** 4
    np.testing.assert_allclose(value[0], 0.25 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(value[1:], (0.25 * np.log(2) * far)[1:], rtol=1e-5)


def test_a_sure_and_wrong_cell_costs_its_logit() -> None:
    # Peers take log(1 - p + 1e-12) of a float32 p, which ends at 27.6 or at infinity.
    value, gradient = units_and_gradient(
        gaussian_focal_loss, np.float32([1e4, -1e4]), np.float32([0.0, 1.0])
    )
    np.testing.assert_array_equal(value, [1e4, 1e4])
    np.testing.assert_array_equal(gradient, [1, -1])


@pytest.mark.parametrize("loss", [quality_focal_loss, varifocal_loss, gaussian_focal_loss])
def test_checked_finds_targets_above_one(loss) -> None:
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got 1 that are not"):
        checked(loss)(jnp.zeros(2), jnp.array([0.5, 1.5]))


# Hard negatives


def mine(values, positives, ratio, where):
    """Sort and cut, image by image."""
    keep = np.zeros_like(positives)
    for i in range(len(values)):
        present = positives[i] & where[i]
        negative = np.flatnonzero(~positives[i] & where[i])
        order = sorted(negative, key=lambda k: (-values[i, k], k))
        keep[i, order[: int(ratio * present.sum())]] = True
        keep[i] |= present
    return keep


@given(
    arrays(np.float32, (3, 9), elements=st.integers(0, 6).map(float)),
    arrays(np.bool_, (3, 9), elements=st.sampled_from([False, False, False, True])),
    arrays(np.bool_, (3, 9)),
    st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_mining_keeps_the_worst_negatives_of_each_image(values, positives, where, ratio) -> None:
    hidden = np.where(where, values, np.nan)
    got = hard_negative_mining(hidden, positives, ratio=ratio, where=where)
    np.testing.assert_array_equal(got, mine(values, positives, ratio, where))


def test_an_image_without_positives_keeps_nothing() -> None:
    values = jnp.ones((2, 4))
    positives = jnp.array([[False] * 4, [True, False, False, False]])
    kept = hard_negative_mining(values, positives)
    assert not np.any(kept[0])
    assert np.all(kept[1])


def test_mining_has_no_gradient_and_takes_infinite_losses() -> None:
    positives = jnp.array([[True, False, False, False, False]])
    values = jnp.array([[0.0, -jnp.inf, 1.0, jnp.inf, 2.0]])
    kept = hard_negative_mining(values, positives, ratio=2)
    np.testing.assert_array_equal(kept, [[True, False, False, True, True]])
    masked = lambda v: jnp.sum(jnp.where(hard_negative_mining(v, positives), v, 0))
    np.testing.assert_array_equal(jax.grad(masked)(jnp.ones((1, 5))), [[1, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((jnp.ones(3), jnp.ones(3, bool)), ValueError, "values: expected two axes"),
        ((jnp.ones((2, 3)), jnp.ones((2, 2), bool)), ValueError, "positives: expected shape"),
        ((jnp.ones((2, 3)), jnp.ones((2, 3))), TypeError, "positives: expected a bool array"),
    ],
)
def test_mining_says_what_it_expected(arguments, error, text: str) -> None:
    with pytest.raises(error, match=f"^hard_negative_mining: {text}"):
        hard_negative_mining(*arguments)
