"""Lovász losses: ties, absent classes, rows of any length, and the memory of sorting."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxloss.losses.segmentation import class_present, jaccard_loss
from jaxloss.losses.segmentation_lovasz import lovasz_hinge_loss, lovasz_softmax_loss

GENERATOR = np.random.default_rng(0)
PROBS = GENERATOR.dirichlet(np.ones(4), (3, 5, 6)).astype(np.float32)
LABELS = GENERATOR.integers(0, 4, (3, 5, 6), np.int32)
cases = settings(max_examples=40, deadline=None)


def lovasz(errors: np.ndarray, truth: np.ndarray) -> tuple[float, np.ndarray]:
    """The extension of one set and its slope in each error, in float64, by sorting."""
    order = np.argsort(-errors, kind="stable")
    hit = truth[order].astype(np.float64)
    left = hit.sum() - np.cumsum(hit)
    jaccard = 1 - left / (hit.sum() + np.cumsum(1 - hit))
    steps = np.empty_like(jaccard)
    steps[order] = np.diff(jaccard, prepend=0.0)
    return float(errors @ steps), steps


def test_lovasz_softmax_is_the_textbook_sum_over_sorted_errors() -> None:
    units = lovasz_softmax_loss(PROBS, LABELS, reduction="none")
    slope = jax.grad(lambda p: lovasz_softmax_loss(p, LABELS, reduction="sum"))(PROBS)
    for b in range(3):
        for c in range(4):
            truth = (LABELS[b] == c).ravel()
            p = PROBS[b, ..., c].ravel().astype(np.float64)
            value, steps = lovasz(np.abs(truth - p), truth)
            np.testing.assert_allclose(units[b, c], value, rtol=1e-6)
            expected = np.where(truth, -steps, steps)
            np.testing.assert_allclose(slope[b, ..., c].ravel(), expected, rtol=1e-5, atol=1e-7)


def test_lovasz_hinge_is_the_textbook_sum_over_sorted_errors() -> None:
    logits = (2 * GENERATOR.standard_normal((3, 30))).astype(np.float32)
    labels = GENERATOR.integers(0, 2, (3, 30))
    units = lovasz_hinge_loss(logits, labels, reduction="none")
    for z, y, unit in zip(logits.astype(np.float64), labels, units, strict=True):
        value, _ = lovasz(np.maximum(1 - z * (2 * y - 1), 0), y == 1)
        np.testing.assert_allclose(unit, value, rtol=1e-6)


@cases
@given(
    arrays(np.float32, (2, 9, 3), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])),
    arrays(np.int32, (2, 9), elements=st.integers(0, 2)),
)
def test_tied_errors_keep_the_value_and_share_their_slope(
    probs: np.ndarray, labels: np.ndarray
) -> None:
    units = lovasz_softmax_loss(probs, labels, reduction="none")
    slope = np.asarray(jax.grad(lambda p: lovasz_softmax_loss(p, labels, reduction="sum"))(probs))
    for b in range(2):
        for c in range(3):
            truth = labels[b] == c
            errors = np.abs(truth - probs[b, :, c].astype(np.float64))
            value, steps = lovasz(errors, truth)
            np.testing.assert_allclose(units[b, c], value, rtol=1e-5, atol=1e-7)
            size = np.abs(slope[b, :, c])
            for error in np.unique(errors):
                tied = errors == error
                total = size[tied].sum()
                np.testing.assert_allclose(total, steps[tied].sum(), rtol=1e-5, atol=1e-6)
                for side in (tied & truth, tied & ~truth):
                    assert len(np.unique(size[side])) <= 1


@cases
@given(
    arrays(np.float32, (1, 8, 2), elements=st.sampled_from([0.0, 1.0])),
    arrays(np.int32, (1, 8), elements=st.integers(0, 1)),
)
def test_lovasz_of_hard_masks_is_the_jaccard_loss(probs: np.ndarray, labels: np.ndarray) -> None:
    got = lovasz_softmax_loss(probs, labels, reduction="none")
    expected = jaccard_loss(probs, labels, smooth=0.0, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_an_absent_class_costs_its_largest_error_and_can_be_left_out() -> None:
    probs = jnp.array([[[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]]])
    labels = jnp.zeros((1, 3), int)
    units, back = jax.vjp(lambda p: lovasz_softmax_loss(p, labels, reduction="none"), probs)
    np.testing.assert_allclose(units[0, 1], 0.6)
    np.testing.assert_array_equal(back(jnp.array([[0.0, 1.0]]))[0][0, :, 1], [0, 1, 0])
    shown = class_present(labels, 2)
    np.testing.assert_allclose(lovasz_softmax_loss(probs, labels, weights=shown), units[0, 0])


def test_uniform_probabilities_push_every_pixel_alike() -> None:
    labels = jnp.array([[0, 0, 1, 1, 1, 2]])
    slope = jax.grad(lovasz_softmax_loss)(jnp.full((1, 6, 3), 1 / 3), labels)
    for c in range(3):
        for group in (labels[0] == c, labels[0] != c):
            assert len(np.unique(slope[0, group, c])) == 1


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1000])
def test_rows_of_any_length_are_searched_to_their_ends(size: int) -> None:
    logits = GENERATOR.standard_normal((2, size)).astype(np.float32)
    labels = GENERATOR.integers(0, 2, (2, size))
    slope = jax.grad(lambda z: lovasz_hinge_loss(z, labels, reduction="sum"))(logits)
    for z, y, s in zip(logits.astype(np.float64), labels, slope, strict=True):
        errors = np.maximum(1 - z * (2 * y - 1), 0)
        steps = lovasz(errors, y == 1)[1]
        expected = np.where(errors > 0, -steps * (2 * y - 1), 0)
        np.testing.assert_allclose(s, expected, rtol=1e-4, atol=1e-7)


def test_lovasz_stands_probabilities_a_rounding_error_above_one() -> None:
    probs = np.full((1, 4, 1), np.nextafter(np.float32(1), np.float32(2)))
    value, slope = jax.value_and_grad(lovasz_softmax_loss)(probs, np.zeros((1, 4), np.int32))
    assert abs(value) < 1e-6
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("label", [-1, 4, 2**31 - 1])
def test_a_bad_label_makes_its_sample_nan_and_no_other(label: int) -> None:
    labels = LABELS.copy()
    labels[1, 2, 3] = label
    total = lambda p: lovasz_softmax_loss(p, labels, reduction="none")
    units, back = jax.vjp(total, jnp.asarray(PROBS))
    assert np.all(np.isnan(units[1]))
    assert not np.any(np.isnan(units[::2]))
    assert np.any(np.isnan(back(jnp.ones_like(units))[0][1]))
    ignored = lovasz_softmax_loss(PROBS, labels, ignore_index=label)
    np.testing.assert_array_equal(
        ignored, lovasz_softmax_loss(PROBS, LABELS, where=labels != label)
    )
    binary = jnp.array([[0, 1], [1, label]])
    hinge = lovasz_hinge_loss(jnp.ones((2, 2)), binary, reduction="none")
    np.testing.assert_array_equal(np.isnan(hinge), [False, True])


def test_float64_errors_are_told_apart_beyond_float32() -> None:
    with jax.enable_x64(True):
        logits = jnp.array([[0.0, 1e-12, -1e-12]], jnp.float64)
        slope = jax.grad(lovasz_hinge_loss)(logits, jnp.array([[0, 0, 0]]))
        np.testing.assert_array_equal(slope, [[0, 1, 0]])


def sorted_temporaries(loss: Any) -> float:
    probs = jax.ShapeDtypeStruct((2, 64, 64, 21), jnp.float32)
    labels = jax.ShapeDtypeStruct((2, 64, 64), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(probs, labels).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (2 * 64 * 64 * 21 * 4)


def test_lovasz_holds_no_more_than_six_arrays_of_its_size() -> None:
    assert sorted_temporaries(lovasz_softmax_loss) < 6
