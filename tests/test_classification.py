"""Cross-entropies: accuracy near 0, labels that are wrong, ignored or soft, and many classes."""

from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_and_gradient

from jaxloss import checked
from jaxloss.losses.classification import (
    nll_loss,
    poly_loss_cross_entropy,
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
)

FEW, MANY = 7, 1500  # on either side of the number of classes at which the kernel changes
BOTH = pytest.mark.parametrize("classes", [FEW, MANY])
FAMILY = (softmax_cross_entropy, nll_loss, poly_loss_cross_entropy)
LOGITS = arrays(np.float32, (4, 5), elements=st.floats(-30, 30, width=32))
ONES = np.ones(4, np.float32)
BITS = arrays(np.int32, (4, 5), elements=st.integers(0, 1))


def draw(classes, rows=6, scale=3.0, seed=0):
    generator = np.random.default_rng(seed)
    logits = (scale * generator.standard_normal((rows, classes))).astype(np.float32)
    return logits, generator.integers(0, classes, rows, np.int32)


def dense(labels, classes):
    return np.eye(classes, dtype=np.float32)[labels]


def log_probs(logits):
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def formula(logits, target, smoothing=0.0, class_weights=1.0):
    """Units and their gradients in float64, straight from the definition."""
    logp = log_probs(logits)
    t = (1 - smoothing) * np.asarray(target, np.float64) + smoothing / logp.shape[-1]
    t = class_weights * t
    return -np.sum(t * logp, axis=-1), t.sum(axis=-1, keepdims=True) * np.exp(logp) - t


def close(got, expected, ulps=4):
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(got, expected, rtol=0, atol=ulps * np.finfo(np.float32).eps * scale)


# Accuracy


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0])
def test_confident_cross_entropy_keeps_every_digit_in_value_and_gradient(gap: float) -> None:
    with mpmath.workdps(40):
        exact = float(mpmath.log1p(mpmath.exp(-gap)))
        slope = float(1 / (1 + mpmath.exp(gap)))
    units, gradient = units_and_gradient(
        softmax_cross_entropy, np.array([[gap, 0]], np.float32), np.array([0])
    )
    np.testing.assert_allclose(units, [exact], rtol=3e-7)
    np.testing.assert_allclose(gradient, [[-slope, slope]], rtol=3e-7)
    units, gradient = units_and_gradient(
        sigmoid_binary_cross_entropy, np.array([-gap, gap], np.float32), np.array([0, 1])
    )
    np.testing.assert_allclose(units, [exact, exact], rtol=3e-7)
    np.testing.assert_allclose(gradient, [slope, -slope], rtol=3e-7)


def test_binary_cross_entropy_is_smooth_at_zero() -> None:
    loss = lambda z: sigmoid_binary_cross_entropy(z[None], np.array([1]))
    slope, curve = jax.jit(lambda z: (jax.grad(loss)(z), jax.hessian(loss)(z)))(0.0)
    assert slope == -0.5
    assert curve == 0.25


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_cost_their_size(size: float) -> None:
    z = np.array([size, -size], np.float32)
    np.testing.assert_array_equal(
        sigmoid_binary_cross_entropy(z, np.array([0, 1]), reduction="none"), np.abs(z)
    )
    units, gradient = units_and_gradient(
        softmax_cross_entropy, np.array([[size, 0, -size]], np.float32), np.array([1])
    )
    np.testing.assert_array_equal(units, np.array([size], np.float32))
    np.testing.assert_array_equal(gradient, [[1.0, -1.0, 0.0]])


def test_bfloat16_logits_of_a_large_vocabulary_lose_nothing_but_their_own_rounding() -> None:
    logits, labels = draw(32_768, rows=4, scale=4.0)
    logits = logits.astype(jnp.bfloat16)
    units, gradient = units_and_gradient(softmax_cross_entropy, logits, labels)
    exact, slope = formula(logits.astype(np.float32), labels[:, None] == np.arange(32_768))
    assert units.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(units, exact, rtol=1e-6)
    np.testing.assert_allclose(np.float32(gradient), slope, rtol=0, atol=2**-8)


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("soft", [False, True], ids=["integer", "dense"])
def test_smoothing_class_weights_and_ignored_labels_follow_the_formula_together(
    classes: int, dtype: type, soft: bool
) -> None:
    logits, labels = draw(classes)
    labels[2] = labels[4] = 1
    class_weights = np.random.default_rng(1).uniform(0, 2, classes).astype(np.float32)
    class_weights[0] = 0
    with jax.enable_x64(dtype == np.float64):
        z = logits.astype(dtype)
        kept = labels != 1
        options = dict(label_smoothing=0.2, class_weights=class_weights)
        options |= dict(where=kept) if soft else dict(ignore_index=1)
        target = dense(labels, classes)
        given_labels = target if soft else labels
        mean = softmax_cross_entropy(z, given_labels, **options)
        units, gradient = units_and_gradient(softmax_cross_entropy, z, given_labels, **options)
        smoothing = 0.2 if dtype == np.float64 else np.float64(np.float32(0.2))
        exact, slope = formula(
            z.astype(np.promote_types(np.float32, units.dtype)), target, smoothing, class_weights
        )
        eps = np.finfo(np.float64 if dtype == np.float64 else np.float32).eps
        np.testing.assert_allclose(
            units, np.where(kept, exact, 0), rtol=0, atol=8 * eps * exact.max()
        )
        np.testing.assert_allclose(mean, exact[kept].mean(), rtol=8 * eps)
        eps = max(eps, float(jnp.finfo(dtype).eps) / 2)
        np.testing.assert_allclose(
            np.asarray(gradient, np.float64),
            np.where(kept[:, None], slope, 0),
            rtol=0,
            atol=8 * eps * np.abs(slope).max(),
        )


@BOTH
def test_forward_mode_and_hessian_vector_products_follow_the_formula(classes: int) -> None:
    logits, labels = draw(classes, rows=3)
    direction = np.random.default_rng(5).standard_normal(logits.shape).astype(np.float32)
    total = lambda z: softmax_cross_entropy(z, labels, label_smoothing=0.1, reduction="sum")
    _, slope = formula(logits, np.eye(classes)[labels], 0.1)
    along = lambda function, z: jax.jvp(function, (z,), (direction,))[1]
    forward, outward, back = jax.jit(
        lambda z: (
            along(total, z),
            along(jax.grad(total), z),
            jax.grad(lambda z: jnp.sum(jax.grad(total)(z) * direction))(z),
        )
    )(logits)
    np.testing.assert_allclose(forward, np.sum(slope * direction), rtol=1e-5)
    p = np.exp(log_probs(logits))
    exact = p * (direction - np.sum(p * direction, axis=-1, keepdims=True))
    close(outward, exact, 16)
    close(back, exact, 16)


def test_both_kernels_agree_where_they_meet() -> None:
    logits, labels = draw(1024)
    wider = np.concatenate([logits, np.full((len(labels), 1), -np.inf, np.float32)], axis=1)
    few, few_slope = units_and_gradient(softmax_cross_entropy, logits, labels)
    many, many_slope = units_and_gradient(softmax_cross_entropy, wider, labels)
    np.testing.assert_allclose(many, few, rtol=1e-6)
    close(many_slope[:, :-1], few_slope, 8)
    np.testing.assert_array_equal(many_slope[:, -1], 0)


# Labels


@BOTH
@pytest.mark.parametrize("loss", FAMILY, ids=lambda loss: loss.__name__)
def test_integer_labels_equal_one_hot_labels(loss, classes: int) -> None:
    logits, labels = draw(classes)
    logits = log_probs(logits).astype(np.float32)
    integer = units_and_gradient(loss, logits, labels)
    for hot in (dense(labels, classes), dense(labels, classes).astype(bool)):
        for a, b in zip(integer, units_and_gradient(loss, logits, hot), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("loss", FAMILY, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("classes", [3, 120, MANY])
def test_a_label_outside_the_classes_makes_its_unit_nan_and_no_other(loss, classes, dtype) -> None:
    logits = np.tile((np.arange(classes) / classes).astype(dtype), (5, 1))
    labels = np.array([-1, -100, classes, 2**31 - 1, 1], np.int32)
    bad, capped = np.arange(5) < 4, np.minimum(labels, classes)

    @jax.jit
    def run(z):
        units, back = jax.vjp(lambda z: loss(z, labels, reduction="none"), z)
        mean = lambda z: loss(z, capped, where=labels >= 0, ignore_index=classes)
        return units, back(jnp.ones(5, units.dtype))[0], jax.value_and_grad(mean)(z)

    units, gradient, (value, slope) = jax.device_get(run(logits))
    np.testing.assert_array_equal(np.isnan(units), bad)
    np.testing.assert_array_equal(np.isnan(gradient).all(axis=1), bad)
    assert not np.isnan(gradient[4]).any()
    np.testing.assert_array_equal(value, units[4])
    np.testing.assert_array_equal(np.float32(slope[:4]), 0)


@pytest.mark.parametrize("loss", FAMILY, ids=lambda loss: loss.__name__)
@BOTH
def test_nothing_but_ignored_labels_costs_zero(loss, classes: int) -> None:
    logits, labels = draw(classes)
    run = jax.jit(jax.value_and_grad(partial(loss, ignore_index=-100)))
    value, gradient = run(logits, 0 * labels - 100)
    assert value == 0
    assert not np.any(gradient)
    value, gradient = run(logits[:0], labels[:0])
    assert value == 0
    assert gradient.shape == (0, classes)


@pytest.mark.parametrize(
    ("dtype", "index"), [(np.uint8, 255), (np.int8, -1), (np.int16, -100), (np.int32, 2)]
)
def test_ignored_labels_leave_the_mean_but_their_class_stays_a_rival(dtype, index) -> None:
    logits, labels = draw(5)
    labels = np.array([0, 1, 2, 3, 4, index]).astype(dtype)
    kept = labels != index
    exact, _ = formula(logits[kept], np.eye(5)[labels[kept]])
    class_weights = np.ones(5, np.float32)
    for options in ({}, dict(class_weights=class_weights)):
        value = softmax_cross_entropy(logits, labels, ignore_index=index, **options)
        np.testing.assert_allclose(value, exact.mean(), rtol=1e-6)


def test_ignore_index_is_for_integer_labels() -> None:
    with pytest.raises(ValueError, match="ignore_index: expected integer labels"):
        softmax_cross_entropy(jnp.zeros((2, 3)), jnp.zeros((2, 3)), ignore_index=0)


def test_shapes_that_would_broadcast_are_errors() -> None:
    with pytest.raises(ValueError, match=r"labels: expected shape \(4,\), got \(4, 1\)"):
        softmax_cross_entropy(np.zeros((4, 3)), np.zeros((4, 1), int))
    with pytest.raises(ValueError, match=r"labels: expected shape \(4, 1\), got \(4,\)"):
        sigmoid_binary_cross_entropy(np.zeros((4, 1)), np.zeros(4))
    with pytest.raises(ValueError, match=r"where"):  # there is no mask over classes
        softmax_cross_entropy(np.zeros((4, 3)), np.zeros(4, int), where=np.ones((4, 3), bool))
    with pytest.raises(ValueError, match=r"class_weights: expected shape \(3,\), got \(4,\)"):
        softmax_cross_entropy(np.zeros((4, 3)), np.zeros(4, int), class_weights=np.ones(4))
    with pytest.raises(ValueError, match=r"pos_weight: expected shape \(3,\), got \(4,\)"):
        sigmoid_binary_cross_entropy(np.zeros((4, 3)), np.zeros((4, 3)), pos_weight=np.ones(4))
    with pytest.raises(ValueError, match="axis: expected an axis of an array of rank 2, got 2"):
        softmax_cross_entropy(np.zeros((4, 3)), np.zeros(4, int), axis=2)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_integers_that_are_no_bits_make_their_unit_nan(dtype: type) -> None:
    labels = np.array([0, 1, 2, 255]).astype(dtype)
    units, gradient = units_and_gradient(sigmoid_binary_cross_entropy, ONES, labels)
    np.testing.assert_array_equal(np.isnan(units), [False, False, True, True])
    np.testing.assert_array_equal(np.isnan(gradient), [False, False, True, True])


def test_bools_integers_and_floats_are_the_same_labels() -> None:
    logits, bits = np.array([0.5, -2], np.float32), np.array([True, False])
    values = {
        float(sigmoid_binary_cross_entropy(logits, bits.astype(d))) for d in (bool, int, float)
    }
    assert len(values) == 1


def test_checked_names_the_bad_labels() -> None:
    zeros = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 3\), got 1 that"):
        checked(softmax_cross_entropy)(zeros, np.array([0, 3]))
    with pytest.raises(ValueError, match=r"labels: expected sums of 1"):
        checked(softmax_cross_entropy)(zeros, zeros)
    with pytest.raises(ValueError, match=r"labels: expected 0 or 1, got 2 that"):
        checked(sigmoid_binary_cross_entropy)(zeros[0], np.array([1, 2, -1]))
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 1\]"):
        checked(sigmoid_binary_cross_entropy)(zeros[0], np.array([1, 1.5, 0], np.float32))
    with pytest.raises(ValueError, match=r"log_probs: expected values of at most 0"):
        checked(nll_loss)(zeros + 1, np.array([0, 1]))
    where = np.array([True, False])
    assert checked(softmax_cross_entropy)(zeros, np.array([0, 3]), where=where) > 0
    assert checked(softmax_cross_entropy)(zeros, np.array([0, 3]), ignore_index=3) > 0


# Infinite logits


@BOTH
@pytest.mark.parametrize("loss", FAMILY, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("soft", [False, True], ids=["integer", "dense"])
def test_a_class_ruled_out_is_a_class_removed(loss, classes: int, soft: bool) -> None:
    logits, labels = draw(classes)
    labels[labels == 3] = 4
    logits[:, 3] = -np.inf
    without = np.delete(logits, 3, axis=1)
    fewer = labels - (labels > 3)
    if soft:
        labels, fewer = dense(labels, classes), dense(fewer, classes - 1)
    if loss is nll_loss:
        logits, without = (
            log_probs(logits).astype(np.float32),
            log_probs(without).astype(np.float32),
        )
    units, gradient = units_and_gradient(loss, logits, labels)
    expected, slope = units_and_gradient(loss, without, fewer)
    np.testing.assert_allclose(units, expected, rtol=1e-6)
    close(np.delete(gradient, 3, axis=1), np.asarray(slope), 8)
    np.testing.assert_array_equal(gradient[:, 3], 0)
    step = np.where(np.isfinite(logits), 1.0, 0.0).astype(np.float32)
    run = jax.value_and_grad(lambda z: loss(z, labels))
    slope, curve = jax.jit(lambda z: jax.jvp(run, (z,), (step,))[1])(logits)
    assert np.isfinite(slope)
    assert np.isfinite(curve).all()


@BOTH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("soft", [False, True], ids=["integer", "dense"])
def test_smoothing_spreads_nothing_to_a_class_of_share_or_weight_zero(classes, dtype, soft) -> None:
    logits = np.zeros((1, classes), dtype)
    logits[0, 3] = -np.inf
    labels = dense(np.zeros(1, int), classes) if soft else np.zeros(1, int)
    unsmoothed = softmax_cross_entropy(logits, labels, label_smoothing=np.float32(0))
    np.testing.assert_allclose(unsmoothed, np.log(classes - 1), rtol=1e-6)
    w = np.ones(classes, np.float32)
    w[3] = 0
    smoothed = softmax_cross_entropy(logits, labels, label_smoothing=0.1, class_weights=w)
    np.testing.assert_allclose(smoothed, np.log(classes - 1) * (1 - 0.1 / classes), rtol=1e-6)


def test_binary_logits_may_be_infinite_where_they_are_right() -> None:
    logits, labels = np.array([np.inf, -np.inf], np.float32), np.array([1, 0])
    for options in ({}, dict(pos_weight=2.0), dict(label_smoothing=0.0)):
        units, gradient = units_and_gradient(
            sigmoid_binary_cross_entropy, logits, labels, **options
        )
        np.testing.assert_array_equal(units, 0)
        np.testing.assert_array_equal(gradient, 0)
    assert sigmoid_binary_cross_entropy(logits, 1 - labels) == jnp.inf


def test_an_impossible_label_costs_infinity() -> None:
    log_p = np.array([[-np.inf, 0], [-np.log(2), -np.log(2)]], np.float32)
    units = nll_loss(log_p, np.array([0, 0]), reduction="none")
    np.testing.assert_array_equal(units, [np.inf, np.log(np.float32(2))])


# Weights, smoothing and relatives


def test_class_weights_scale_costs_and_weights_count_examples() -> None:
    logits, labels = draw(5)
    w = np.array([0.5, 1, 2, 3, 4], np.float32)
    units, _ = formula(logits, np.eye(5)[labels])
    scaled = softmax_cross_entropy(logits, labels, class_weights=w)
    np.testing.assert_allclose(scaled, np.mean(w[labels] * units), rtol=1e-6)
    counted = softmax_cross_entropy(logits, labels, weights=w[labels])
    np.testing.assert_allclose(counted, np.average(units, weights=w[labels]), rtol=1e-6)
    log_p = log_probs(logits).astype(np.float32)
    np.testing.assert_allclose(nll_loss(log_p, labels, class_weights=w), scaled, rtol=1e-6)
    np.testing.assert_allclose(nll_loss(log_p, labels, weights=w[labels]), counted, rtol=1e-6)


def test_pos_weight_scales_positives_only_per_class_or_for_all() -> None:
    logits, _ = draw(3, rows=4)
    labels = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]])
    plain = np.logaddexp(0, np.where(labels == 1, -1, 1) * logits.astype(np.float64))
    for w in (2.5, np.array([0.5, 1, 4], np.float32)):
        got = sigmoid_binary_cross_entropy(logits, labels, pos_weight=w, reduction="none")
        np.testing.assert_allclose(got, plain * np.where(labels == 1, w, 1), rtol=1e-6)


def test_binary_smoothing_moves_labels_towards_one_half() -> None:
    logits, _ = draw(3, rows=2)
    labels = np.array([[0, 1, 1], [1, 0, 0]])
    soft = (0.8 * labels + 0.1).astype(np.float32)
    np.testing.assert_allclose(
        sigmoid_binary_cross_entropy(logits, labels, label_smoothing=0.2, reduction="none"),
        sigmoid_binary_cross_entropy(logits, soft, reduction="none"),
        rtol=1e-6,
    )


@partial(jax.jit, static_argnums=0)
def along_axes(loss, logits, labels, options):
    """Units and the gradient of their sum with the classes on each axis."""
    parts = {}
    for axis in (0, 1, -2, -1):
        soft = labels.ndim == logits.ndim
        moved = jnp.moveaxis(labels, -1, axis) if soft else labels
        call = partial(loss, labels=moved, axis=axis, reduction="none", **options)
        units, pull = jax.vjp(call, jnp.moveaxis(logits, -1, axis))
        parts[axis] = units, pull(jnp.ones_like(units))[0]
    return parts


@pytest.mark.parametrize("soft", [False, True], ids=["integer", "dense"])
def test_the_class_axis_may_be_anywhere(soft: bool) -> None:
    generator = np.random.default_rng(2)
    logits = np.log(generator.dirichlet(np.ones(4), (2, 3))).astype(np.float32)
    labels = generator.dirichlet(np.ones(4), (2, 3)).astype(np.float32)
    labels = labels if soft else labels.argmax(-1)
    class_weights = np.array([1, 2, 3, 4], np.float32)
    for loss in FAMILY:
        options = {} if loss is poly_loss_cross_entropy else dict(class_weights=class_weights)
        parts = along_axes(loss, logits, labels, options)
        expected, slope = parts.pop(-1)
        for axis, (units, gradient) in parts.items():
            np.testing.assert_allclose(units, expected, rtol=1e-6)
            np.testing.assert_allclose(np.moveaxis(gradient, axis, -1), slope, atol=1e-6)


@BOTH
def test_nll_of_log_softmax_is_cross_entropy(classes: int) -> None:
    logits, labels = draw(classes)
    np.testing.assert_allclose(
        nll_loss(log_probs(logits).astype(np.float32), labels, reduction="none"),
        softmax_cross_entropy(logits, labels, reduction="none"),
        rtol=2e-6,
    )


@BOTH
def test_poly_loss_adds_the_missing_probability(classes: int) -> None:
    logits, labels = draw(classes)
    cost, _ = formula(logits, np.eye(classes)[labels])
    for epsilon in (-0.5, 0.0, 3.0):
        units = poly_loss_cross_entropy(logits, labels, epsilon=epsilon, reduction="none")
        np.testing.assert_allclose(units, cost + epsilon * (1 - np.exp(-cost)), rtol=2e-6)


# Properties


@settings(max_examples=50, deadline=None)
@given(LOGITS, st.floats(-100, 100, width=32))
def test_a_shift_of_all_logits_changes_little_and_no_loss_is_negative(z, shift) -> None:
    labels = np.array([0, 1, 2, 3])
    for loss in (softmax_cross_entropy, poly_loss_cross_entropy):
        plain = np.asarray(loss(z, labels, reduction="none"))
        assert np.all(plain >= 0)
        np.testing.assert_allclose(loss(z + shift, labels, reduction="none"), plain, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(LOGITS, BITS)
def test_binary_cross_entropy_is_the_two_class_softmax_and_symmetric(z, y) -> None:
    binary = sigmoid_binary_cross_entropy(z, y, reduction="none")
    both = softmax_cross_entropy(np.stack([0 * z, z], axis=-1), y, reduction="none")
    np.testing.assert_allclose(binary, both, rtol=4e-7)
    mirrored = sigmoid_binary_cross_entropy(-z, 1 - y, reduction="none")
    np.testing.assert_array_equal(binary, mirrored)


@settings(max_examples=50, deadline=None)
@given(LOGITS, st.permutations(range(5)))
def test_the_order_of_the_classes_does_not_matter(z, order) -> None:
    labels = np.array([0, 1, 2, 3])
    moved = np.argsort(order)[labels].astype(np.int64)
    np.testing.assert_allclose(
        softmax_cross_entropy(z, labels, label_smoothing=0.1, reduction="none"),
        softmax_cross_entropy(z[:, order], moved, label_smoothing=0.1, reduction="none"),
        rtol=1e-6,
    )
