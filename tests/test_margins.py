"""Hinge losses: kinks, labels that are no signs, and the textbook examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_and_gradient

from jaxloss import checked
from jaxloss.losses.classification import sigmoid_binary_cross_entropy
from jaxloss.losses.margins import (
    hinge_loss,
    multi_margin_loss,
    multiclass_hinge_loss,
    soft_margin_loss,
    squared_hinge_loss,
)

SIGNED = (hinge_loss, squared_hinge_loss, soft_margin_loss)
MULTICLASS = (multiclass_hinge_loss, multi_margin_loss)
by_name = lambda loss: loss.__name__
SCORES = arrays(np.float32, (4, 5), elements=st.integers(-40, 40).map(lambda n: n / 8))


def test_the_gradient_at_the_kink_is_zero() -> None:
    kink, sign = jnp.array([1.0, -1.0]), jnp.array([1, -1])
    for loss in (hinge_loss, squared_hinge_loss):
        units, gradient = units_and_gradient(loss, kink, sign)
        np.testing.assert_array_equal(units, 0)
        np.testing.assert_array_equal(gradient, 0)
    scores = jnp.array([[2.0, 1.0, 0.0]])
    for loss in MULTICLASS:
        units, gradient = units_and_gradient(loss, scores, jnp.array([0]))
        np.testing.assert_array_equal(units, 0)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("loss", SIGNED, ids=by_name)
@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.float32])
def test_a_label_that_is_no_sign_makes_its_unit_nan_and_no_other(loss, dtype: type) -> None:
    scores, labels = jnp.array([5.0, 0.5, 5.0, 0.5]), np.array([0, 1, 2, -1], dtype)
    units, gradient = units_and_gradient(loss, scores, labels)
    np.testing.assert_array_equal(np.isnan(units), [True, False, True, False])
    np.testing.assert_array_equal(np.isnan(gradient), [True, False, True, False])
    alone = loss(scores[1:2], labels[1:2])
    np.testing.assert_array_equal(units[1], alone)  # the batch around it does not matter
    hidden = jax.value_and_grad(loss)(scores, labels, where=jnp.array([False, True, False, False]))
    np.testing.assert_array_equal(hidden[0], alone)
    np.testing.assert_array_equal(hidden[1][jnp.array([0, 2, 3])], 0)
    with pytest.raises(ValueError, match=r"labels: expected -1 or \+1, got 2 that"):
        checked(loss)(scores, labels)


@pytest.mark.parametrize("loss", SIGNED, ids=by_name)
def test_bool_labels_are_an_error(loss) -> None:
    with pytest.raises(TypeError, match=r"labels: expected -1 and \+1, got dtype bool"):
        loss(jnp.zeros(2), jnp.array([True, False]))


@pytest.mark.parametrize("loss", MULTICLASS, ids=by_name)
def test_a_label_outside_the_classes_makes_its_unit_nan_and_no_other(loss) -> None:
    units, gradient = units_and_gradient(loss, jnp.zeros((4, 3)), jnp.array([-1, 3, 1, -100]))
    np.testing.assert_array_equal(np.isnan(units), [True, True, False, True])
    np.testing.assert_array_equal(np.isnan(gradient).all(1), [True, True, False, True])
    with pytest.raises(TypeError, match="labels: expected an integer dtype, got float32"):
        loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)))


def test_textbook_examples() -> None:
    scores, label = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([1])
    assert multiclass_hinge_loss(scores, label) == 2  # 3 + 1 - 2
    assert multiclass_hinge_loss(scores, label, margin=0.5) == 1.5
    np.testing.assert_allclose(multi_margin_loss(scores, label), 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(multi_margin_loss(scores, label, p=2), 4 / 3, rtol=1e-6)
    weighted = multi_margin_loss(scores, label, class_weights=jnp.array([9.0, 3.0, 9.0]))
    np.testing.assert_allclose(weighted, 2, rtol=1e-6)


def test_rivals_of_equal_score_share_the_gradient() -> None:
    _, gradient = units_and_gradient(multiclass_hinge_loss, jnp.zeros((1, 3)), jnp.array([0]))
    np.testing.assert_array_equal(gradient, [[-1, 0.5, 0.5]])


def test_one_class_and_classes_ruled_out_cost_nothing() -> None:
    for loss in MULTICLASS:
        for scores in (jnp.array([[3.0]]), jnp.array([[3.0, -jnp.inf]])):
            units, gradient = units_and_gradient(loss, scores, jnp.array([0]))
            np.testing.assert_array_equal(units, 0)
            np.testing.assert_array_equal(gradient, 0)


def test_the_power_is_one_or_two() -> None:
    with pytest.raises(ValueError, match=r"p: expected one of \[1, 2\], got 3"):
        multi_margin_loss(jnp.zeros((1, 3)), jnp.array([0]), p=3)


def test_the_soft_margin_is_binary_cross_entropy_of_the_score() -> None:
    scores, labels = jnp.array([-1e4, -20.0, 0.0, 20.0, 1e4]), jnp.array([1, -1, 1, 1, -1])
    got = units_and_gradient(soft_margin_loss, scores, labels)
    expected = units_and_gradient(sigmoid_binary_cross_entropy, scores, (1 + labels) // 2)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=4e-7)


@settings(max_examples=50, deadline=None)
@given(SCORES, arrays(np.int32, (4,), elements=st.integers(0, 4)))
def test_multiclass_losses_follow_their_definitions(scores, labels) -> None:
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    lead = own - scores[np.arange(5) != labels[:, None]].reshape(4, 4)
    hinges = np.maximum(0, 1 - lead)
    units = multiclass_hinge_loss(scores, labels, reduction="none")
    np.testing.assert_allclose(units, hinges.max(axis=1), rtol=1e-6)
    for p in (1, 2):
        units = multi_margin_loss(scores, labels, p=p, reduction="none")
        np.testing.assert_allclose(units, np.sum(hinges**p, axis=1) / 5, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(SCORES, arrays(np.int32, (4, 5), elements=st.sampled_from([-1, 1])))
def test_binary_losses_depend_on_label_times_score_alone(scores, labels) -> None:
    for loss, formula in (
        (hinge_loss, lambda z: np.maximum(0, 1 - z)),
        (squared_hinge_loss, lambda z: np.maximum(0, 1 - z) ** 2),
        (soft_margin_loss, lambda z: np.logaddexp(0, -z)),
    ):
        units = loss(scores, labels, reduction="none")
        np.testing.assert_allclose(units, formula((scores * labels).astype(float)), rtol=1e-6)
        np.testing.assert_array_equal(units, loss(-scores, -labels, reduction="none"))


@settings(max_examples=50, deadline=None)
@given(SCORES, st.integers(-80, 80).map(lambda n: n / 8))
def test_a_shift_of_all_scores_changes_no_multiclass_margin(scores, shift) -> None:
    labels = np.array([0, 1, 2, 3])
    for loss in MULTICLASS:
        np.testing.assert_array_equal(
            loss(scores, labels, reduction="none"),
            loss((scores + shift).astype(np.float32), labels, reduction="none"),
        )
