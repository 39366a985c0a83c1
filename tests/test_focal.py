"""Focal losses: the two-class view, saturated logits, soft labels and the clip."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_and_gradient

from jaxloss import checked
from jaxloss.losses.focal import (
    asymmetric_loss,
    asymmetric_softmax_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)

GENERATOR = np.random.default_rng(0)
LOGITS = (3 * GENERATOR.standard_normal((6, 5))).astype(np.float32)
BITS = GENERATOR.integers(0, 2, (6, 5), np.int32)
SHARES = GENERATOR.uniform(0, 1, (6, 5)).astype(np.float32)
CLASSES = GENERATOR.integers(0, 5, 6, np.int32)
BINARY = (sigmoid_focal_loss, asymmetric_loss)


def probability(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))


def softmax(logits):
    z = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


# Formulas in float64, written from the definitions and from the peers without a package here


@pytest.mark.parametrize("labels", [BITS, SHARES], ids=["bits", "shares"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_sigmoid_focal_loss_follows_torchvision(labels, gamma: float, alpha: float | None) -> None:
    p, y = probability(LOGITS), labels.astype(np.float64)
    cross_entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    expected = cross_entropy * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
    if alpha is not None:
        expected = (alpha * y + (1 - alpha) * (1 - y)) * expected
    got = sigmoid_focal_loss(LOGITS, labels, alpha=alpha, gamma=gamma, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=4e-6)


def test_softmax_focal_loss_follows_monai_times_the_classes() -> None:
    p, y, w = softmax(LOGITS), np.eye(5)[CLASSES], np.array([0.75, 0.25, 0.25, 0.25, 0.25])
    monai = -w * (1 - p) ** 1.5 * np.log(p) * y  # alpha = 0.25; the mean is over classes too
    got = softmax_focal_loss(LOGITS, CLASSES, gamma=1.5, class_weights=w.astype(np.float32))
    np.testing.assert_allclose(got, 5 * monai.mean(), rtol=1e-6)


@pytest.mark.parametrize("classes", [5, 1500])
def test_softmax_focal_loss_weighs_every_class_of_a_dense_label(classes: int) -> None:
    logits = (3 * np.random.default_rng(1).standard_normal((4, classes))).astype(np.float32)
    t = np.random.default_rng(2).dirichlet(np.ones(classes), 4).astype(np.float32)
    w = np.linspace(0, 2, classes, dtype=np.float32)
    p = softmax(logits)
    expected = -np.sum(w * t * (1 - p) ** 0.5 * np.log(p), axis=-1)
    got = softmax_focal_loss(logits, t, gamma=0.5, class_weights=w, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@pytest.mark.parametrize("clip", [0.0, 0.05, 0.3])
@pytest.mark.parametrize(("gamma_pos", "gamma_neg"), [(1.0, 4.0), (0.0, 0.0), (0.5, 0.5)])
def test_asymmetric_loss_follows_timm(clip: float, gamma_pos: float, gamma_neg: float) -> None:
    p, y = probability(LOGITS), BITS
    q = np.minimum(1 - p + clip, 1)
    log_likelihood = y * np.log(p) + (1 - y) * np.log(q)
    easing = (1 - (p * y + q * (1 - y))) ** (gamma_pos * y + gamma_neg * (1 - y))
    expected = -log_likelihood * easing
    options = dict(gamma_pos=gamma_pos, gamma_neg=gamma_neg, clip=clip)
    got = asymmetric_loss(LOGITS, BITS, reduction="none", **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7 * expected.max())
    soft = asymmetric_loss(LOGITS, SHARES, reduction="none", **options)
    ends = [
        asymmetric_loss(LOGITS, np.full_like(BITS, bit), reduction="none", **options)
        for bit in (0, 1)
    ]
    np.testing.assert_allclose(soft, (1 - SHARES) * ends[0] + SHARES * ends[1], rtol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_asymmetric_softmax_loss_follows_timm(eps: float) -> None:
    p, y = softmax(LOGITS), np.eye(5)[CLASSES]
    easing = np.where(y == 1, (1 - p) ** 1.5, p**3)
    expected = -np.sum((y * (1 - eps) + eps / 5) * easing * np.log(p), axis=-1)
    got = asymmetric_softmax_loss(
        LOGITS, CLASSES, gamma_pos=1.5, gamma_neg=3.0, label_smoothing=eps, reduction="none"
    )
    np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_stopped_weights_keep_the_value_and_the_slope_of_the_logarithms() -> None:
    options = dict(gamma_pos=1.0, gamma_neg=2.0, clip=0.1)
    plain, _ = units_and_gradient(asymmetric_loss, LOGITS, BITS, **options)
    stopped, slope = units_and_gradient(
        asymmetric_loss, LOGITS, BITS, **options, stop_gradient_weights=True
    )
    np.testing.assert_array_equal(stopped, plain)
    p = probability(LOGITS)
    shifted = np.maximum(p - 0.1, 0)
    expected = np.where(BITS, -((1 - p) ** 2), shifted**2 * p * (1 - p) / (1 - shifted))
    np.testing.assert_allclose(slope, expected, rtol=2e-5, atol=1e-7)


# Limits


@pytest.mark.parametrize("labels", [BITS, SHARES], ids=["bits", "shares"])
def test_without_powers_the_binary_losses_are_cross_entropy(labels) -> None:
    p = probability(LOGITS)
    expected, slope = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)), p - labels
    for loss, options in (
        (sigmoid_focal_loss, dict(gamma=0.0)),
        (asymmetric_loss, dict(gamma_pos=0.0, gamma_neg=0.0, clip=0.0)),
    ):
        units, gradient = units_and_gradient(loss, LOGITS, labels, **options)
        np.testing.assert_allclose(units, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-7)


def test_without_powers_the_softmax_losses_are_cross_entropy() -> None:
    log_p, one_hot = np.log(softmax(LOGITS)), np.eye(5)[CLASSES]
    for labels in (CLASSES, one_hot.astype(np.float32)):
        np.testing.assert_allclose(
            softmax_focal_loss(LOGITS, labels, gamma=0.0, reduction="none"),
            -np.sum(one_hot * log_p, axis=-1),
            rtol=1e-6,
        )
    np.testing.assert_allclose(
        asymmetric_softmax_loss(LOGITS, CLASSES, gamma_pos=0.0, gamma_neg=0.0, reduction="none"),
        -np.sum((0.9 * one_hot + 0.1 / 5) * log_p, axis=-1),
        rtol=1e-6,
    )


def test_two_classes_are_a_binary_problem() -> None:
    both = np.stack([0 * LOGITS, LOGITS], axis=-1)
    for gamma in (0.5, 2.0):
        np.testing.assert_allclose(
            softmax_focal_loss(both, BITS, gamma=gamma, reduction="none"),
            sigmoid_focal_loss(LOGITS, BITS, alpha=None, gamma=gamma, reduction="none"),
            rtol=1e-6,
        )


@pytest.mark.parametrize("classes", [5, 1500])
def test_integer_labels_equal_one_hot_labels(classes: int) -> None:
    generator = np.random.default_rng(4)
    logits = (6 * generator.standard_normal((5, classes))).astype(np.float32)
    labels = np.append(logits[:2].argmax(-1), generator.integers(0, classes, 3)).astype(np.int32)
    integer = units_and_gradient(softmax_focal_loss, logits, labels, gamma=0.7)
    hot = units_and_gradient(
        softmax_focal_loss, logits, np.eye(classes, dtype=np.float32)[labels], gamma=0.7
    )
    for a, b in zip(integer, hot, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Edges


@partial(jax.jit, static_argnums=0)
def derivatives(loss, logits, labels, options):
    """Value, slopes in the logits and the options, and second derivatives along both."""
    total = lambda x, o: loss(x, labels, reduction="sum", **o)
    first = jax.value_and_grad(total, (0, 1))(logits, options)
    moved = jnp.ones_like(logits), options
    return first, jax.jvp(jax.grad(total), (logits, options), moved)[1]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("size", [20.0, 60.0, 1e2, 1e4, np.inf])
def test_powers_have_finite_derivatives_at_saturated_logits(gamma: float, size: float) -> None:
    z, y = np.array([size, -size], np.float32), np.array([1, 0])
    rows = np.array([[0, size], [size, 0]] if np.isinf(size) else [[0, size], [0, -size]])
    rows = rows.astype(np.float32)
    for loss, logits, labels, options in (
        (sigmoid_focal_loss, z, y, dict(gamma=gamma)),
        (asymmetric_loss, z, y, dict(gamma_pos=gamma, gamma_neg=gamma, clip=0.05)),
        (asymmetric_loss, z, y, dict(gamma_pos=gamma, gamma_neg=gamma, clip=0.0)),
        (softmax_focal_loss, rows, y, dict(gamma=gamma)),
        (softmax_focal_loss, rows, np.eye(2, dtype=np.float32)[y], dict(gamma=gamma)),
    ):
        for leaf in jax.tree.leaves(derivatives(loss, logits, labels, options)):
            assert np.isfinite(leaf).all(), (loss.__name__, options)
            assert np.abs(leaf).max() < 1e-3


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
def test_wrong_saturated_logits_cost_their_size(gamma: float) -> None:
    z, y = np.array([1e4, -1e4], np.float32), np.array([0, 1])
    for loss, options in (
        (sigmoid_focal_loss, dict(gamma=gamma)),
        (asymmetric_loss, dict(gamma_pos=gamma, gamma_neg=gamma, clip=0.0)),
        (asymmetric_loss, dict(gamma_pos=1.0, gamma_neg=4.0, clip=0.0)),
    ):
        units, gradient = units_and_gradient(loss, z, y, **options)
        np.testing.assert_array_equal(units, [1e4, 1e4])
        np.testing.assert_array_equal(gradient, [1, -1])
    units, gradient = units_and_gradient(
        softmax_focal_loss, np.array([[1e4, 0]], np.float32), np.array([1]), gamma=gamma
    )
    np.testing.assert_array_equal(units, [1e4])
    np.testing.assert_array_equal(gradient, [[1, -1]])


def test_confident_examples_keep_every_digit() -> None:
    q = 1 / (1 + np.exp(20.0))  # of the wrong class
    expected, z = -(q**2) * np.log1p(-q), np.array([20, -20], np.float32)
    got = sigmoid_focal_loss(z, np.array([1, 0]), reduction="none")
    np.testing.assert_allclose(got, [expected, expected], rtol=8e-6)
    rows = np.array([[0, 20], [20, 0]], np.float32)
    for labels in (np.array([1, 0]), np.array([[0, 1], [1, 0]], np.float32)):
        got = softmax_focal_loss(rows, labels, reduction="none")
        np.testing.assert_allclose(got, [expected, expected], rtol=8e-6)


@jax.jit
def slope_in_label(labels, logits, gamma):
    return jax.grad(lambda y: sigmoid_focal_loss(logits, y, gamma=gamma, reduction="sum"))(labels)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_slope_in_the_label_is_right_at_both_ends(gamma: float) -> None:
    z = np.array([-3.0, -0.5, 0.0, 2.0])
    with jax.enable_x64(True):
        for end, inside in ((0.0, 1e-6), (1.0, 1 - 1e-6)):
            at_end, near = (slope_in_label(np.full(4, y), z, gamma) for y in (end, inside))
            np.testing.assert_allclose(at_end, near, rtol=1e-4)


def test_alpha_is_linear_in_a_smoothed_label() -> None:
    z, label = np.zeros(1, np.float32), np.array([0.9], np.float32)
    got = sigmoid_focal_loss(z, label, alpha=0.25, gamma=0.0)
    np.testing.assert_allclose(got, (0.25 * 0.9 + 0.75 * 0.1) * np.log(2), rtol=1e-6)


def test_negatives_below_the_clip_are_free() -> None:
    p = np.array([0.04, 0.0499])
    z = np.log(p / (1 - p)).astype(np.float32)
    for gamma in (0.0, 4.0):
        units, gradient = units_and_gradient(asymmetric_loss, z, np.array([0, 0]), gamma_neg=gamma)
        np.testing.assert_array_equal(units, 0)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("classes", [5, 1500])
@pytest.mark.parametrize("loss", [softmax_focal_loss, asymmetric_softmax_loss])
def test_a_class_ruled_out_is_a_class_removed(loss, classes: int) -> None:
    logits = (3 * np.random.default_rng(3).standard_normal((6, classes))).astype(np.float32)
    logits[:, 3] = -np.inf
    without, labels = np.delete(logits, 3, axis=1), np.array([0, 1, 2, 0, 1, 2])
    options = dict(label_smoothing=0.0) if loss is asymmetric_softmax_loss else dict(gamma=0.5)
    units, gradient = units_and_gradient(loss, logits, labels, **options)
    expected, slope = units_and_gradient(loss, without, labels, **options)
    np.testing.assert_allclose(units, expected, rtol=1e-6)
    np.testing.assert_allclose(np.delete(gradient, 3, axis=1), slope, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, 3], 0)


def test_one_class_is_always_right() -> None:
    for loss in (softmax_focal_loss, asymmetric_softmax_loss):
        units, gradient = units_and_gradient(loss, np.float32([[3]]), np.array([0]))
        assert units == 0
        assert gradient == 0


def test_labels_that_name_nothing_make_their_unit_nan_and_no_other() -> None:
    bits = np.array([0, 1, 2, -1])
    for loss in BINARY:
        units, gradient = units_and_gradient(loss, np.zeros(4, np.float32), bits)
        np.testing.assert_array_equal(np.isnan(units), [False, False, True, True])
        np.testing.assert_array_equal(np.isnan(gradient), [False, False, True, True])
    for loss in (softmax_focal_loss, asymmetric_softmax_loss):
        for classes in (3, 1500):
            logits, labels = np.zeros((3, classes), np.float32), np.array([-1, classes, 0])
            run = partial(units_and_gradient, loss, logits, labels)
            units, gradient = run(where=np.ones(3, bool))
            np.testing.assert_array_equal(np.isnan(units), [True, True, False])
            np.testing.assert_array_equal(np.isnan(gradient).all(1), [True, True, False])
            hidden, gradient = run(where=labels == 0)
            np.testing.assert_array_equal(hidden, [0, 0, np.asarray(units)[2]])
            np.testing.assert_array_equal(np.asarray(gradient)[:2], 0)
        with pytest.raises(ValueError, match=r"labels: expected values in \[0, 3\)"):
            checked(loss)(np.zeros((1, 3), np.float32), np.array([3]))
    zeros = np.zeros((1, 3), np.float32)
    assert softmax_focal_loss(zeros, np.array([-1]), ignore_index=-1) == 0


def test_asymmetric_softmax_loss_takes_integer_labels_alone() -> None:
    with pytest.raises(TypeError, match="labels: expected an integer dtype, got float32"):
        asymmetric_softmax_loss(np.zeros((2, 3)), np.zeros((2, 3), np.float32))


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.float32, (6, 5), elements=st.floats(-50, 50, width=32)),
    arrays(np.int32, (6, 5), elements=st.integers(0, 1)),
    st.floats(0, 5, width=32),
)
def test_focal_loss_is_symmetric_never_negative_and_falls_with_gamma(z, y, gamma) -> None:
    focal = partial(sigmoid_focal_loss, alpha=None, gamma=gamma, reduction="none")
    units = np.asarray(focal(z, y))
    assert np.all(units >= 0)
    np.testing.assert_array_equal(units, focal(-z, 1 - y))
    cross_entropy = np.logaddexp(0, np.where(y == 1, -1, 1) * z.astype(np.float64))
    assert np.all(units <= cross_entropy * (1 + 1e-6))
    labels = y.argmax(-1)
    assert np.all(softmax_focal_loss(z, labels, gamma=gamma, reduction="none") >= 0)
