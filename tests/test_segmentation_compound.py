"""Compound region losses: their formulas in float64, their ends, and the limits between them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss import checked
from jaxloss.losses.segmentation import dice_loss
from jaxloss.losses.segmentation_compound import (
    asymmetric_unified_focal_loss,
    combo_loss,
    exp_log_loss,
    generalized_wasserstein_dice_loss,
    sensitivity_specificity_loss,
)

GENERATOR = np.random.default_rng(0)
PROBS = GENERATOR.dirichlet(np.ones(4), (3, 30)).astype(np.float32)
LABELS = GENERATOR.integers(0, 4, (3, 30), np.int32)
P, G = PROBS.astype(np.float64), np.eye(4)[LABELS]
TP, FP, FN = (P * G).sum(1), (P * (1 - G)).sum(1), ((1 - P) * G).sum(1)
DICE = (2 * TP + 0.5) / (2 * TP + FP + FN + 0.5)
FAR = np.array([[0, 1, 1, 1], [1, 0, 0.2, 0.5], [1, 0.2, 0, 0.3], [1, 0.5, 0.3, 0]])


def assert_close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("target", [LABELS, G.astype(np.float32)], ids=["labels", "one-hot"])
def test_each_loss_is_its_published_formula(target: np.ndarray) -> None:
    ours = dict(reduction="none")
    entropy = -(0.7 * G * np.log(P) + 0.3 * (1 - G) * np.log(1 - P)).mean(1)
    got = combo_loss(PROBS, target, alpha=0.4, beta=0.7, smooth=0.5, **ours)
    assert_close(got, 0.4 * entropy - 0.6 * DICE)

    inside = ((G - P) ** 2 * G).sum(1) / G.sum(1)
    outside = ((G - P) ** 2 * (1 - G)).sum(1) / (1 - G).sum(1)
    got = sensitivity_specificity_loss(PROBS, target, r=0.2, **ours)
    assert_close(got, 0.2 * inside + 0.8 * outside)

    weight = np.array([0.5, 2, 1, 3])
    entropy = (G * weight * (-np.log(P)) ** 0.4).sum(-1).mean(1)
    expected = 0.7 * ((-np.log(DICE)) ** 0.4).mean(1) + 0.5 * entropy
    options = dict(gamma=0.4, dice_weight=0.7, ce_weight=0.5, smooth=0.5)
    got = exp_log_loss(PROBS, target, **options, class_weights=weight.astype(np.float32), **ours)
    assert_close(got, expected)

    focus = np.concatenate([0.3 * (1 - P[..., :1]) ** 0.4, np.full_like(P[..., 1:], 0.7)], -1)
    tversky = TP / (TP + 0.3 * FP + 0.7 * FN)
    power = np.concatenate([1 - tversky[:, :1], (1 - tversky[:, 1:]) ** 0.6], -1)
    expected = 0.2 * (-focus * G * np.log(P)).mean((1, 2)) + 0.8 * power.mean(1)
    got = asymmetric_unified_focal_loss(PROBS, target, weight=0.2, gamma=0.4, **ours)
    assert_close(got, expected)


def test_wasserstein_dice_is_its_published_formula() -> None:
    distance = (FAR[LABELS] * P).sum(-1)
    tp = np.where(LABELS != 0, 1 - distance, 0).sum(1)
    expected = 1 - (2 * tp + 0.1) / (2 * tp + distance.sum(1) + 0.1)
    got = generalized_wasserstein_dice_loss(PROBS, LABELS, FAR, smooth=0.1, reduction="none")
    assert_close(got, expected)
    with pytest.raises(ValueError, match=r"distances: expected values in \[0, 1\], got 1 "):
        checked(generalized_wasserstein_dice_loss)(PROBS, LABELS, jnp.asarray(FAR).at[0, 1].set(2))


def test_wasserstein_dice_of_foreground_and_background_is_dice_of_the_foreground() -> None:
    probs, labels = PROBS[..., :2] / PROBS[..., :2].sum(-1, keepdims=True), LABELS % 2
    got = generalized_wasserstein_dice_loss(
        probs, labels, 1 - np.eye(2), smooth=0.5, reduction="none"
    )
    expected = dice_loss(probs, labels, smooth=0.5, reduction="none")[:, 1]
    assert_close(got, expected)


def test_combo_without_cross_entropy_is_the_negative_dice_score() -> None:
    got = combo_loss(PROBS, LABELS, alpha=0.0, reduction="none")
    assert_close(got, dice_loss(PROBS, LABELS, reduction="none") - 1)


def test_a_class_nowhere_or_everywhere_has_one_term() -> None:
    probs = jnp.full((1, 4, 1), 0.5)
    value = lambda g: sensitivity_specificity_loss(probs, jnp.full((1, 4, 1), g), r=0.2)
    assert_close(value(0.0), 0.8 * 0.25)
    assert_close(value(1.0), 0.2 * 0.25)


@pytest.mark.parametrize(
    "loss",
    [combo_loss, sensitivity_specificity_loss, exp_log_loss, asymmetric_unified_focal_loss],
)
def test_impossible_probabilities_cost_much_and_bad_labels_are_nan(loss: Any) -> None:
    wrong = jnp.asarray(np.eye(4, dtype=np.float32)[(LABELS + 1) % 4])
    value, slope = jax.value_and_grad(loss)(wrong, LABELS)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))
    labels = LABELS.copy()
    labels[1, 5] = 4
    units, back = jax.vjp(lambda p: loss(p, labels, reduction="none"), PROBS)
    slope = back(jnp.ones_like(units))[0]
    for x in (units, slope):
        assert np.all(np.isnan(x[1]))
        assert np.all(np.isfinite(x[::2]))
