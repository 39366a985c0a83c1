"""Masks of objects and logits of neighbours: which channel, which window, what is hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from jaxloss.losses.classification import sigmoid_binary_cross_entropy, softmax_cross_entropy
from jaxloss.losses.segmentation_masks import mask_cross_entropy, neighbor_aware_margin_loss

GENERATOR = np.random.default_rng(0)
LOGITS = 2 * GENERATOR.standard_normal((3, 5, 6, 4)).astype(np.float32)
LABELS = GENERATOR.integers(0, 4, (3, 5, 6), np.int32)


def test_only_the_channel_of_the_label_counts() -> None:
    masks, labels = GENERATOR.random((3, 5, 6)) < 0.5, np.array([2, 0, 3])
    chosen = LOGITS[np.arange(3), ..., labels]
    units, back = jax.vjp(lambda z: mask_cross_entropy(z, masks, labels, reduction="none"), LOGITS)
    expected = sigmoid_binary_cross_entropy(chosen, masks, reduction="none").mean(axis=(1, 2))
    np.testing.assert_allclose(units, expected, rtol=1e-6)
    slope = np.asarray(back(jnp.ones(3))[0])
    for i, label in enumerate(labels):
        assert np.all(slope[i, ..., label] != 0)
        assert not np.any(np.delete(slope[i], label, axis=-1))


def test_a_mask_inside_its_box_is_a_mean_over_the_box() -> None:
    masks, labels = GENERATOR.random((3, 5, 6)) < 0.5, np.array([2, 0, 3])
    inside = np.zeros((3, 5, 6), bool)
    inside[:, 1:4, 2:5] = True
    spoiled = np.where(inside[..., None], LOGITS, np.nan)
    got = mask_cross_entropy(spoiled, masks, labels, where=inside, reduction="none")
    cut = mask_cross_entropy(LOGITS[:, 1:4, 2:5], masks[:, 1:4, 2:5], labels, reduction="none")
    np.testing.assert_allclose(got, cut, rtol=1e-6)


def test_a_bad_label_or_mask_makes_its_object_nan_and_no_other() -> None:
    masks = (GENERATOR.random((3, 5, 6)) < 0.5).astype(np.int32)
    got = mask_cross_entropy(LOGITS, masks, np.array([2, 4, -1]), reduction="none")
    np.testing.assert_array_equal(np.isnan(got), [False, True, True])
    masks[1, 2, 2] = 2
    got = mask_cross_entropy(LOGITS, masks, np.array([2, 1, 0]), reduction="none")
    np.testing.assert_array_equal(np.isnan(got), [False, True, False])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_margin_is_to_the_shares_of_a_window(size: int) -> None:
    truth = np.eye(4)[LABELS]
    shares = uniform_filter(truth, size=(1, size, size, 1), mode="constant")
    margin = np.abs(shares - LOGITS).mean(axis=-1)
    got = neighbor_aware_margin_loss(
        LOGITS, LABELS, kernel_size=size, margin_weight=0.3, reduction="none"
    )
    expected = softmax_cross_entropy(LOGITS, LABELS, reduction="none") + 0.3 * margin
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_hidden_neighbour_belongs_to_no_class() -> None:
    where = np.ones((3, 5, 6), bool)
    where[:, 2, 3] = False
    labels = np.where(where, LABELS, 99)
    got = neighbor_aware_margin_loss(LOGITS, labels, ignore_index=99, reduction="none")
    truth = np.eye(4)[LABELS] * where[..., None]
    margin = np.abs(uniform_filter(truth, (1, 3, 3, 1), mode="constant") - LOGITS).mean(axis=-1)
    expected = softmax_cross_entropy(LOGITS, LABELS, reduction="none") + 0.1 * margin
    np.testing.assert_allclose(got, np.where(where, expected, 0), rtol=1e-5)


def test_an_even_window_has_no_middle() -> None:
    with pytest.raises(ValueError, match=r"kernel_size: expected an odd"):
        neighbor_aware_margin_loss(LOGITS, LABELS, kernel_size=2)


def test_a_bad_label_makes_its_position_nan_and_no_other() -> None:
    labels = LABELS.copy()
    labels[1, 2, 3] = 4
    got = neighbor_aware_margin_loss(LOGITS, labels, reduction="none")
    np.testing.assert_array_equal(np.isnan(got), labels == 4)
