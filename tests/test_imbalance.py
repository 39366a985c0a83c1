"""Losses for rare classes: empty classes, equal counts, and the switches that turn parts off."""

from typing import Any

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
from jaxloss.losses.classification import sigmoid_binary_cross_entropy, softmax_cross_entropy
from jaxloss.losses.imbalance import (
    balanced_binary_cross_entropy,
    class_balanced_weights,
    ldam_loss,
    logit_adjusted_cross_entropy,
    seesaw_loss,
)

GENERATOR = np.random.default_rng(0)
LOGITS = (3 * GENERATOR.standard_normal((7, 5))).astype(np.float32)
LABELS = GENERATOR.integers(0, 5, 7, np.int32)
ONE_HOT = np.eye(5, dtype=np.float32)[LABELS]
SOFT = GENERATOR.dirichlet(np.ones(5), 7).astype(np.float32)
COUNTS = np.array([1000, 1, 30, 0, 200], np.int32)
FULL = np.array([1000, 1, 30, 7, 200], np.int32)
EVEN = np.full(5, 17, np.int32)
WEIGHTS = np.array([1.0, 0.0, 2.5, 0.5, 3.0], np.float32)
cases = settings(max_examples=30, deadline=None)


def log_softmax(logits: Any) -> np.ndarray:
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def assert_same(got: Any, expected: Any, **tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or dict(rtol=2e-6, atol=5e-7)))


PLAIN = units_and_gradient(softmax_cross_entropy, LOGITS, LABELS)


@pytest.mark.parametrize("label", [-1, 5, 2**31 - 1])
def test_a_bad_label_makes_value_and_gradient_of_its_unit_nan(label: int) -> None:
    labels, bad = LABELS.copy(), np.arange(7) == 2
    labels[2] = label
    for loss, rest in (
        (logit_adjusted_cross_entropy, np.log(FULL).astype(np.float32)),
        (ldam_loss, COUNTS),
        (seesaw_loss, COUNTS),
    ):
        units, gradient = units_and_gradient(loss, LOGITS, labels, rest)
        np.testing.assert_array_equal(np.isnan(units), bad)
        np.testing.assert_array_equal(np.isnan(gradient).all(axis=-1), bad)


@pytest.mark.parametrize("size", [1, 4, 6])
def test_counts_and_priors_have_one_entry_for_each_class(size: int) -> None:
    for loss, name in (
        (logit_adjusted_cross_entropy, "log_prior"),
        (ldam_loss, "counts"),
        (seesaw_loss, "counts"),
    ):
        with pytest.raises(ValueError, match=rf"{loss.__name__}: {name}: expected shape \(5,\)"):
            loss(LOGITS, LABELS, np.ones(size, np.float32))


# Class-balanced weights


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_class_balanced_weights_follow_their_formula(beta: float) -> None:
    with mpmath.workdps(40):
        b = mpmath.mpf(float(np.float32(beta)))
        raw = [(1 - b) / (1 - b ** int(n)) for n in FULL]
        expected = [float(5 * w / mpmath.fsum(raw)) for w in raw]
    np.testing.assert_allclose(class_balanced_weights(FULL, beta=beta), expected, rtol=1e-6)


def test_class_balanced_weights_are_even_at_beta_zero_and_inverse_counts_at_one() -> None:
    np.testing.assert_array_equal(class_balanced_weights(FULL, beta=0.0), 1)
    for beta in (1.0, jnp.float32(1.0)):
        inverse = 1 / FULL
        expected = 5 * inverse / inverse.sum()
        np.testing.assert_allclose(class_balanced_weights(FULL, beta=beta), expected, rtol=1e-6)
    slope = jax.jacfwd(lambda b: class_balanced_weights(FULL, beta=b))(1.0)
    assert np.isfinite(slope).all()


def test_an_empty_class_weighs_nothing_and_the_others_still_sum_to_all_classes() -> None:
    for beta in (0.0, 0.99, 1.0):
        weights = class_balanced_weights(COUNTS, beta=beta)
        assert weights[3] == 0
        np.testing.assert_allclose(jnp.sum(weights), 5, rtol=1e-6)
    np.testing.assert_array_equal(class_balanced_weights(np.zeros(3)), 0)


def test_class_balanced_weights_take_any_counts_and_reject_bad_ones() -> None:
    np.testing.assert_allclose(class_balanced_weights(EVEN), 1, rtol=1e-6)
    both = class_balanced_weights(np.stack([FULL, EVEN]))
    np.testing.assert_allclose(both[0], class_balanced_weights(FULL), rtol=1e-6)
    assert np.isfinite(class_balanced_weights(np.array([1, 2_000_000_000]))).all()
    with jax.enable_x64(True):
        assert class_balanced_weights(FULL.astype(np.float64)).dtype == jnp.float64
    with pytest.raises(ValueError, match="class_balanced_weights: counts: expected at least 1"):
        class_balanced_weights(3.0)
    with pytest.raises(ValueError, match="class_balanced_weights: beta: expected a scalar"):
        class_balanced_weights(FULL, beta=np.ones(2))
    with pytest.raises(ValueError, match="class_balanced_weights: counts: expected values"):
        checked(class_balanced_weights)(np.array([-1.0, 2.0]))


# Logit adjustment


def test_logit_adjustment_is_cross_entropy_on_shifted_logits() -> None:
    prior = np.log(FULL).astype(np.float32)
    for labels in (LABELS, SOFT):
        got = units_and_gradient(logit_adjusted_cross_entropy, LOGITS, labels, prior, tau=0.7)
        shifted = LOGITS + np.float32(0.7) * prior
        expected = units_and_gradient(softmax_cross_entropy, shifted, labels)
        assert_same(got, expected)


def test_tau_zero_and_equal_priors_change_nothing() -> None:
    with np.errstate(divide="ignore"):
        empty = np.log(COUNTS).astype(np.float32)
    assert_same(
        units_and_gradient(logit_adjusted_cross_entropy, LOGITS, LABELS, empty, tau=0.0), PLAIN
    )
    even = np.log(EVEN).astype(np.float32)
    assert_same(units_and_gradient(logit_adjusted_cross_entropy, LOGITS, LABELS, even), PLAIN)


def test_an_empty_class_is_left_out_with_finite_derivatives() -> None:
    with np.errstate(divide="ignore"):
        prior = np.log(COUNTS).astype(np.float32)
    labels, kept = np.where(LABELS == 3, 0, LABELS), [0, 1, 2, 4]
    units, gradient = units_and_gradient(logit_adjusted_cross_entropy, LOGITS, labels, prior)
    renamed = np.where(labels == 4, 3, labels)
    expected = units_and_gradient(
        logit_adjusted_cross_entropy, LOGITS[:, kept], renamed, prior[kept]
    )
    assert_same((units, gradient[:, kept]), expected)
    np.testing.assert_array_equal(gradient[:, 3], 0)
    slopes = jax.grad(
        lambda tau, prior: logit_adjusted_cross_entropy(LOGITS, labels, prior, tau=tau), (0, 1)
    )
    for tau in (0.0, 1.0):
        assert all(np.isfinite(slope).all() for slope in slopes(tau, prior))


def test_ignored_labels_leave_the_mean() -> None:
    prior = np.log(FULL).astype(np.float32)
    labels = np.where(np.arange(7) < 3, 255, LABELS)
    got = logit_adjusted_cross_entropy(LOGITS, labels, prior, ignore_index=255)
    np.testing.assert_allclose(
        got, logit_adjusted_cross_entropy(LOGITS[3:], LABELS[3:], prior), rtol=1e-6
    )
    nothing = np.full(7, 255, np.int32)
    value, gradient = jax.value_and_grad(logit_adjusted_cross_entropy)(
        LOGITS, nothing, prior, ignore_index=255
    )
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


# LDAM


def ldam_oracle(
    logits: Any, targets: Any, counts: Any, *, m: float, s: float, w: Any
) -> np.ndarray:
    n = np.maximum(np.asarray(counts, np.float64), 1)
    margins = m * n**-0.25 / np.max(n**-0.25)
    z = s * (np.asarray(logits, np.float64) - margins * targets)
    return -np.sum(w * targets * log_softmax(z), axis=-1)


@pytest.mark.parametrize("counts", [COUNTS, FULL, FULL.astype(np.float32)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_ldam_follows_its_definition(counts: np.ndarray, weights: Any) -> None:
    for labels, targets in ((LABELS, ONE_HOT), (SOFT.astype(np.float64), SOFT)):
        options = dict(m=0.3, s=7.0, w=1 if weights is None else weights.astype(np.float64))
        expected = ldam_oracle(LOGITS, targets.astype(np.float64), counts, **options)
        with jax.enable_x64(True):
            logits = LOGITS.astype(np.float64)
            units = ldam_loss(
                logits,
                labels,
                counts,
                max_margin=0.3,
                scale=7.0,
                class_weights=weights,
                reduction="none",
            )
        np.testing.assert_allclose(units, expected, rtol=1e-12, atol=1e-14)


def test_ldam_without_margin_and_scale_is_cross_entropy() -> None:
    got = units_and_gradient(ldam_loss, LOGITS, LABELS, COUNTS, max_margin=0.0, scale=1.0)
    assert_same(got, PLAIN)


def test_equal_counts_give_every_class_the_largest_margin() -> None:
    got = ldam_loss(LOGITS, LABELS, EVEN, scale=1.0, reduction="none")
    expected = softmax_cross_entropy(LOGITS - 0.5 * ONE_HOT, LABELS, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_class_weights_of_ldam_scale_units_and_weights_divide_by_their_sum() -> None:
    plain = np.asarray(ldam_loss(LOGITS, LABELS, COUNTS, reduction="none"), np.float64)
    w = WEIGHTS[LABELS]
    scaled = ldam_loss(LOGITS, LABELS, COUNTS, class_weights=WEIGHTS)
    np.testing.assert_allclose(scaled, np.mean(w * plain), rtol=1e-6)
    drawn = ldam_loss(LOGITS, LABELS, COUNTS, weights=w)
    np.testing.assert_allclose(drawn, np.sum(w * plain) / np.sum(w), rtol=1e-6)


# Seesaw


def seesaw_oracle(logits: Any, counts: Any, *, p: float, q: float, eps: float) -> np.ndarray:
    n, s = np.maximum(np.asarray(counts, np.float64), 1), np.exp(log_softmax(logits))
    out = []
    for z, scores, y in zip(np.asarray(logits, np.float64), s, LABELS, strict=True):
        mitigation = np.minimum(1, n / n[y]) ** p
        compensation = np.maximum(1, scores / max(scores[y], eps)) ** q
        factor = np.where(np.arange(5) == y, 1, mitigation * compensation)
        out.append(-np.log(np.exp(z[y]) / np.sum(factor * np.exp(z))))
    return np.array(out)


@pytest.mark.parametrize(("p", "q", "eps"), [(0.8, 2.0, 1e-2), (0.0, 1.0, 0.1), (1.5, 0.0, 1e-3)])
def test_seesaw_follows_its_definition(p: float, q: float, eps: float) -> None:
    options = dict(p=p, q=q, eps=eps)
    with jax.enable_x64(True):
        units = seesaw_loss(LOGITS.astype(np.float64), LABELS, COUNTS, reduction="none", **options)
    np.testing.assert_allclose(units, seesaw_oracle(LOGITS, COUNTS, **options), rtol=1e-12)


def test_seesaw_with_equal_counts_and_no_compensation_is_cross_entropy() -> None:
    assert_same(units_and_gradient(seesaw_loss, LOGITS, LABELS, EVEN, q=0.0), PLAIN)
    assert_same(units_and_gradient(seesaw_loss, LOGITS, LABELS, COUNTS, p=0.0, q=0.0), PLAIN)


def test_the_factors_of_seesaw_carry_no_gradient() -> None:
    n, s = np.maximum(COUNTS, 1), np.exp(log_softmax(LOGITS))
    own = np.take_along_axis(s, LABELS[:, None], axis=1)
    factor = np.minimum(1, n / n[LABELS][:, None]) ** 0.8
    factor = factor * np.maximum(1, s / np.maximum(own, 1e-2)) ** 2
    factor = np.where(ONE_HOT == 1, 1, factor)
    expected = np.exp(log_softmax(LOGITS + np.log(factor))) - ONE_HOT
    _, gradient = units_and_gradient(seesaw_loss, LOGITS, LABELS, COUNTS)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_seesaw_is_finite_for_saturated_logits_and_impossible_classes() -> None:
    logits = np.array([[1e4, -1e4, 0, 0, 0], [-np.inf, 0, 0, 0, 0]], np.float32)
    units, gradient = units_and_gradient(seesaw_loss, logits, np.array([1, 2], np.int32), COUNTS)
    assert np.isfinite(units).all()
    assert np.isfinite(gradient).all()
    assert gradient[1, 0] == 0


def test_seesaw_takes_integer_labels_alone() -> None:
    with pytest.raises(TypeError, match="seesaw_loss: labels: expected an integer dtype"):
        seesaw_loss(LOGITS, ONE_HOT, COUNTS)


# Balanced binary cross-entropy

PIXELS = (3 * GENERATOR.standard_normal((3, 4, 5))).astype(np.float32)
EDGES = (GENERATOR.random((3, 4, 5)) < 0.2).astype(np.int32)


def balanced_oracle(logits: Any, labels: Any, where: Any) -> np.ndarray:
    x, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    out = np.zeros(x.shape)
    for i in range(len(x)):
        b = np.sum((1 - y[i]) * where[i]) / np.sum(where[i])
        out[i] = b * y[i] * np.logaddexp(0, -x[i]) + (1 - b) * (1 - y[i]) * np.logaddexp(0, x[i])
    return out * where


def test_the_balance_is_counted_for_each_sample_over_kept_positions() -> None:
    where = GENERATOR.random(EDGES.shape) < 0.7
    shares = GENERATOR.uniform(0, 1, EDGES.shape).astype(np.float32)
    for labels in (EDGES, EDGES == 1, shares):
        for mask in (where, np.ones_like(where)):
            units = balanced_binary_cross_entropy(PIXELS, labels, where=mask, reduction="none")
            np.testing.assert_allclose(units, balanced_oracle(PIXELS, labels, mask), rtol=2e-6)


def test_a_sample_of_one_label_costs_nothing_and_has_no_gradient() -> None:
    for labels in (np.zeros_like(EDGES), np.ones_like(EDGES)):
        units, gradient = units_and_gradient(balanced_binary_cross_entropy, PIXELS, labels)
        np.testing.assert_array_equal(units, 0)
        np.testing.assert_array_equal(gradient, 0)


def test_as_many_positives_as_negatives_give_half_the_cross_entropy() -> None:
    labels = np.arange(20).reshape(1, 4, 5) % 2
    got = units_and_gradient(balanced_binary_cross_entropy, PIXELS[:1], labels)
    expected = units_and_gradient(sigmoid_binary_cross_entropy, PIXELS[:1], labels)
    assert_same(got, [0.5 * part for part in expected])


def test_both_labels_weigh_the_same_in_every_sample_at_zero_logits() -> None:
    units = balanced_binary_cross_entropy(0 * PIXELS, EDGES, reduction="none")
    ones, zeros = (np.sum(units * (label == EDGES), axis=(1, 2)) for label in (1, 0))
    np.testing.assert_allclose(ones, zeros, rtol=1e-6)


def test_a_bad_label_makes_its_whole_sample_nan() -> None:
    labels = EDGES.copy()
    labels[1, 2, 3] = 2
    units, gradient = units_and_gradient(balanced_binary_cross_entropy, PIXELS, labels)
    for part in (units, gradient):
        assert np.isnan(part[1]).all()
        assert np.isfinite(part[::2]).all()


def test_pixels_without_a_sample_axis_are_rejected() -> None:
    with pytest.raises(
        ValueError, match="balanced_binary_cross_entropy: logits: expected at least 2"
    ):
        balanced_binary_cross_entropy(jnp.zeros(4), jnp.zeros(4))


def test_infinite_logits_of_the_right_sign_cost_nothing() -> None:
    logits = np.where(EDGES == 1, np.inf, -np.inf).astype(np.float32)
    units, gradient = units_and_gradient(balanced_binary_cross_entropy, logits, EDGES)
    np.testing.assert_array_equal(units, 0)
    np.testing.assert_array_equal(gradient, 0)


@given(
    counts=arrays(np.int32, 5, elements=st.integers(0, 10_000)),
    logits=arrays(np.float32, (7, 5), elements=st.floats(-20, 20, width=32)),
)
@cases
def test_no_counts_make_any_loss_negative_or_infinite(counts: Any, logits: Any) -> None:
    for loss in (ldam_loss, seesaw_loss):
        units, gradient = units_and_gradient(loss, logits, LABELS, counts)
        assert np.all(units >= -1e-12)
        assert np.isfinite(units).all()
        assert np.isfinite(gradient).all()
