"""Multi-label losses: F1 of hard predictions, empty classes, masks over rows and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec

from jaxloss import across, checked
from jaxloss.losses.classification import sigmoid_binary_cross_entropy
from jaxloss.losses.multilabel import multilabel_soft_margin_loss, soft_f1_loss

BITS = arrays(np.int32, (6, 3), elements=st.integers(0, 1))
GENERATOR = np.random.default_rng(0)
PROBS = GENERATOR.uniform(0, 1, (8, 3)).astype(np.float32)
LABELS = GENERATOR.integers(0, 2, (8, 3), np.int32)


@settings(max_examples=50, deadline=None)
@given(BITS, BITS)
def test_on_hard_predictions_it_is_one_minus_the_f1_score(prediction, labels) -> None:
    hits, wrong = np.sum(prediction & labels, axis=0), np.sum(prediction ^ labels, axis=0)
    expected = np.where(hits + wrong == 0, 0, wrong / np.maximum(2 * hits + wrong, 1))
    got = soft_f1_loss(prediction.astype(np.float32), labels, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_soft_f1_follows_its_formula(smooth: float) -> None:
    p, y = PROBS.astype(np.float64), LABELS
    numerator = 2 * np.sum(y * p, axis=0) + smooth
    expected = 1 - numerator / (np.sum(y, axis=0) + np.sum(p, axis=0) + smooth)
    np.testing.assert_allclose(
        soft_f1_loss(PROBS, LABELS, smooth=smooth, reduction="none"), expected, rtol=1e-6
    )


def test_a_class_that_is_neither_present_nor_predicted_costs_nothing() -> None:
    value, gradient = jax.value_and_grad(soft_f1_loss)(jnp.zeros((4, 2)), jnp.zeros((4, 2), int))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    nothing = soft_f1_loss(jnp.array(PROBS), LABELS, where=jnp.zeros(8, bool), smooth=1.0)
    assert nothing == 0


def test_nearly_perfect_classes_keep_every_digit() -> None:
    probs = jnp.array([[1 - 2.0**-20], [0.0]])
    error = 2.0**-20
    np.testing.assert_allclose(
        soft_f1_loss(probs, jnp.array([[1], [0]])), error / (2 - error), rtol=3e-7
    )


def test_f1_of_a_batch_is_not_the_mean_of_its_parts() -> None:
    probs, labels = jnp.ones((2, 1)), jnp.array([[1], [0]])
    halves = [float(soft_f1_loss(probs[i : i + 1], labels[i : i + 1])) for i in (0, 1)]
    assert halves == [0, 1]
    np.testing.assert_allclose(soft_f1_loss(probs, labels), 1 / 3, rtol=1e-6)


def test_sums_over_devices_give_the_f1_of_the_whole_batch() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, where = PartitionSpec("data"), np.arange(8) != 3
    local = jax.shard_map(
        lambda p, y, w: soft_f1_loss(p, y, where=w, axis_name="data"),
        mesh=mesh,
        in_specs=(rows, rows, rows),
        out_specs=PartitionSpec(),
    )
    got = jax.jit(jax.value_and_grad(local))(PROBS, LABELS, where)
    expected = jax.value_and_grad(soft_f1_loss)(PROBS, LABELS, where=where)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_a_bad_label_makes_its_class_nan_unless_it_is_hidden() -> None:
    labels = jnp.asarray(LABELS).at[2, 1].set(2)
    units = soft_f1_loss(PROBS, labels, reduction="none")
    np.testing.assert_array_equal(np.isnan(units), [False, True, False])
    assert np.isfinite(soft_f1_loss(PROBS, labels, where=jnp.arange(8) != 2))
    with pytest.raises(ValueError, match="labels: expected 0 or 1, got 1 that"):
        checked(soft_f1_loss)(PROBS, labels)
    with pytest.raises(ValueError, match=r"probs: expected values in \[0, 1\]"):
        checked(soft_f1_loss)(PROBS + 1, LABELS)


def test_soft_f1_takes_a_batch_of_classes_and_a_mask_over_the_batch() -> None:
    with pytest.raises(ValueError, match=r"probs: expected shape \(batch, classes\)"):
        soft_f1_loss(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"where: expected shape \(8,\), got \(8, 3\)"):
        soft_f1_loss(PROBS, LABELS, where=jnp.ones((8, 3), bool))


def test_soft_margin_is_the_mean_over_classes_of_weighted_cross_entropies() -> None:
    logits = np.log(PROBS) * 3
    costs = np.asarray(sigmoid_binary_cross_entropy(logits, LABELS, reduction="none"))
    for w in (None, np.array([0, 1, 2.5], np.float32)):
        units = multilabel_soft_margin_loss(logits, LABELS, class_weights=w, reduction="none")
        expected = np.mean(costs * (1 if w is None else w), axis=-1)
        np.testing.assert_allclose(units, expected, rtol=1e-6)


def test_a_mask_over_rows_hides_whole_rows() -> None:
    logits, where = PROBS.copy(), np.arange(8) < 5
    logits[6] = np.nan
    got = multilabel_soft_margin_loss(logits, LABELS, where=where)
    np.testing.assert_allclose(got, multilabel_soft_margin_loss(logits[:5], LABELS[:5]), rtol=1e-6)
    with pytest.raises(ValueError, match=r"where: expected shape \(8,\), got \(8, 3\)"):
        multilabel_soft_margin_loss(logits, LABELS, where=np.ones((8, 3), bool))


def test_infinite_logits_of_a_class_without_weight_cost_nothing() -> None:
    logits = jnp.array([[jnp.inf, 0.0]])
    loss = lambda z: multilabel_soft_margin_loss(
        z, jnp.array([[0, 1]]), class_weights=jnp.array([0.0, 1.0])
    )
    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, np.log(2) / 2, rtol=1e-6)
    np.testing.assert_array_equal(gradient, [[0, -0.25]])


def test_across_devices_the_soft_margin_is_an_ordinary_mean() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    local = jax.shard_map(
        lambda z, y: multilabel_soft_margin_loss(z, y, reduction=across("data")),
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=PartitionSpec(),
    )
    expected = multilabel_soft_margin_loss(PROBS, LABELS)
    np.testing.assert_allclose(jax.jit(local)(PROBS, LABELS), expected, rtol=1e-6)
