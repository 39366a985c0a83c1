"""Losses for wrong labels: their limits, their bounds, and the tempered normaliser."""

from itertools import pairwise
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
from jaxloss.losses.bi_tempered import (
    _log_tempered_softmax,
    _normaliser,
    bi_tempered_logistic_loss,
)
from jaxloss.losses.classification import softmax_cross_entropy
from jaxloss.losses.noisy_labels import (
    bootstrapped_cross_entropy,
    classification_absolute_error,
    generalized_cross_entropy,
    hard_bootstrapped_cross_entropy,
    normalized_cross_entropy,
    normalized_softmax_focal_loss,
    reverse_cross_entropy,
    symmetric_cross_entropy,
)

GENERATOR = np.random.default_rng(0)
LOGITS = (2 * GENERATOR.standard_normal((7, 5))).astype(np.float32)
LABELS = GENERATOR.integers(0, 5, 7, np.int32)
ONE_HOT = np.eye(5, dtype=np.float32)[LABELS]
SOFT = GENERATOR.dirichlet(np.ones(5), 7).astype(np.float32)
LOSSES = (
    bootstrapped_cross_entropy,
    classification_absolute_error,
    generalized_cross_entropy,
    hard_bootstrapped_cross_entropy,
    normalized_cross_entropy,
    normalized_softmax_focal_loss,
    reverse_cross_entropy,
    symmetric_cross_entropy,
    bi_tempered_logistic_loss,
)
BOUNDED = {  # the largest value over any logits and labels
    classification_absolute_error: 1.0,
    generalized_cross_entropy: 1 / 0.7,
    normalized_cross_entropy: 1.0,
    normalized_softmax_focal_loss: 1.0,
    reverse_cross_entropy: 4.0,
}
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
cases = settings(max_examples=30, deadline=None)
rows = arrays(np.float32, 12, elements=st.floats(-30, 30, width=32))
rows = rows.map(lambda x: np.resize(x, (7, 5)))
names = arrays(np.int32, 7, elements=st.integers(0, 4))


def softmax(logits: Any) -> np.ndarray:
    z = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return z / z.sum(axis=-1, keepdims=True)


def total(loss: Any, labels: Any, **options: Any) -> Any:
    return lambda logits: loss(logits, labels, reduction="sum", **options)


# Formulas in float64, for integer and for dense labels


def at_labels(costs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.sum(costs * labels, axis=-1)


ORACLES = {
    generalized_cross_entropy: lambda p, t: at_labels((1 - p**0.7) / 0.7, t),
    classification_absolute_error: lambda p, t: at_labels(1 - p, t),
    reverse_cross_entropy: lambda p, t: -np.sum(p * np.log(np.maximum(t, np.exp(-4))), -1),
    symmetric_cross_entropy: lambda p, t: (
        -0.1 * at_labels(np.log(p), t) - np.sum(p * np.log(np.maximum(t, np.exp(-4))), -1)
    ),
    normalized_cross_entropy: lambda p, t: at_labels(np.log(p), t) / np.log(p).sum(-1),
    normalized_softmax_focal_loss: lambda p, t: (
        at_labels((1 - p) ** 0.5 * np.log(p), t) / np.sum((1 - p) ** 0.5 * np.log(p), -1)
    ),
    bootstrapped_cross_entropy: lambda p, t: -at_labels(np.log(p), 0.95 * t + 0.05 * p),
    hard_bootstrapped_cross_entropy: lambda p, t: (
        -0.8 * at_labels(np.log(p), t) - 0.2 * np.log(p).max(-1)
    ),
}


def oracle_of(loss: Any, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    if loss is bi_tempered_logistic_loss:
        return bi_tempered(logits, targets, 1.0, 1.0)
    return ORACLES[loss](softmax(logits), targets)


@pytest.mark.parametrize("loss", ORACLES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("labels", [LABELS, ONE_HOT, SOFT], ids=["integer", "one-hot", "soft"])
def test_the_loss_follows_its_formula_in_double_precision(loss: Any, labels: np.ndarray) -> None:
    targets = ONE_HOT if labels.ndim == 1 else labels
    with jax.enable_x64(True):
        logits = LOGITS.astype(np.float64)
        wide = labels if labels.ndim == 1 else labels.astype(np.float64)
        units, gradient = units_and_gradient(loss, logits, wide)
        direction = np.random.default_rng(1).standard_normal(logits.shape)
        slope = np.sum(gradient * direction)
    oracle = lambda z: ORACLES[loss](softmax(z), targets.astype(np.float64))
    np.testing.assert_allclose(units, oracle(logits), rtol=1e-13)
    ahead, behind = (oracle(logits + h * direction).sum() for h in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-7)


@every_loss
def test_integer_labels_cost_what_their_one_hot_vectors_cost(loss: Any) -> None:
    integer, dense = (units_and_gradient(loss, LOGITS, t) for t in (LABELS, ONE_HOT))
    for got, expected in zip(dense, integer, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-7)


@every_loss
@pytest.mark.parametrize("label", [-1, -100, 5, 2**31 - 1])
def test_a_bad_label_makes_value_and_gradient_of_its_unit_nan(loss: Any, label: int) -> None:
    labels = LABELS.copy()
    labels[2] = label
    units, gradient = units_and_gradient(loss, LOGITS, labels)
    bad = np.arange(7) == 2
    np.testing.assert_array_equal(np.isnan(units), bad)
    np.testing.assert_array_equal(np.isnan(gradient).all(axis=-1), bad)
    with pytest.raises(ValueError, match=rf"{loss.__name__}: labels: expected values in \[0, 5\)"):
        checked(loss)(LOGITS, labels)


@every_loss
def test_a_class_of_logit_minus_infinity_is_as_good_as_deleted(loss: Any) -> None:
    logits, fewer = LOGITS.copy(), LOGITS[:, :4].astype(np.float64)
    logits[:, 4] = -np.inf
    soft = SOFT / (1 - SOFT[:, 4:])
    soft[:, 4] = 0
    for labels, targets in ((LABELS % 4, np.eye(5)[LABELS % 4]), (soft, soft)):
        oracle = lambda z, t=np.float64(targets[:, :4]): oracle_of(loss, z, t)
        units, gradient = units_and_gradient(loss, logits, labels)
        np.testing.assert_allclose(units, oracle(fewer), rtol=1e-6)
        slopes = [oracle(fewer + 1e-5 * step) - oracle(fewer - 1e-5 * step) for step in np.eye(4)]
        slopes = np.stack(slopes, axis=-1) / 2e-5
        np.testing.assert_allclose(gradient[:, :4], slopes, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(gradient[:, 4], 0)


@every_loss
def test_a_single_class_has_finite_value_and_gradient(loss: Any) -> None:
    units, gradient = units_and_gradient(loss, np.ones((2, 1), np.float32), np.zeros(2, np.int32))
    assert np.isfinite(units).all()
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("loss", BOUNDED, ids=lambda loss: loss.__name__)
@given(logits=rows, labels=names)
@cases
def test_the_bounded_losses_stay_in_their_range(loss: Any, logits: Any, labels: Any) -> None:
    units, _ = units_and_gradient(loss, logits, labels)
    assert np.all((units >= 0) & (units <= BOUNDED[loss] * (1 + 2e-7)))


@every_loss
@given(logits=rows, labels=names, shift=st.floats(-8, 8, width=16))
@cases
def test_adding_a_number_to_all_logits_changes_nothing(
    loss: Any, logits: Any, labels: Any, shift: float
) -> None:
    moved, _ = units_and_gradient(loss, logits + np.float32(shift), labels)
    expected, _ = units_and_gradient(loss, logits, labels)
    np.testing.assert_allclose(moved, expected, rtol=2e-5, atol=2e-5)


# Generalised cross-entropy and absolute error


def test_generalized_cross_entropy_is_cross_entropy_at_q_zero_and_absolute_error_at_one() -> None:
    for q, limit in ((0.0, softmax_cross_entropy), (1.0, classification_absolute_error)):
        for labels in (LABELS, SOFT):
            got = units_and_gradient(generalized_cross_entropy, LOGITS, labels, q=q)
            for a, b in zip(got, units_and_gradient(limit, LOGITS, labels), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)


def test_a_traced_q_of_zero_has_the_right_derivative() -> None:
    run = lambda q: generalized_cross_entropy(LOGITS, LABELS, q=q, reduction="sum")
    value_and_slope = jax.jit(jax.value_and_grad(run))
    log_p = np.log(softmax(LOGITS)[np.arange(7), LABELS])
    small, slopes = zip(*(value_and_slope(q) for q in (0.0, 1e-20, 1e-6)), strict=True)
    np.testing.assert_allclose(slopes[0], -np.sum(log_p**2) / 2, rtol=1e-6)
    np.testing.assert_allclose(small, small[0], rtol=1e-5)


@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0])
def test_small_probabilities_keep_their_digits_on_both_sides(gap: float) -> None:
    # The derivative of jnp.expm1 is expm1 + 1, which is rounding noise here.
    logits = np.array([[gap, 0.0]], np.float32)
    small = float(mpmath.exp(-gap) / (1 + mpmath.exp(-gap)))
    for label in (0, 1):
        units, gradient = units_and_gradient(
            classification_absolute_error, logits, np.array([label], np.int32)
        )
        np.testing.assert_allclose(units, [small if label == 0 else 1 - small], rtol=4e-7)
        slope = small * (1 - small) * (-1 if label == 0 else 1)
        np.testing.assert_allclose(gradient, [[slope, -slope]], rtol=4e-7)


def test_an_impossible_label_costs_one_over_q_and_pulls_no_more() -> None:
    logits = np.array([[1e4, -1e4]], np.float32)
    for q in (0.3, 1.0):
        units, gradient = units_and_gradient(
            generalized_cross_entropy, logits, np.array([1], np.int32), q=q
        )
        np.testing.assert_allclose(units, 1 / q, rtol=1e-6)
        np.testing.assert_array_equal(gradient, 0)


def test_q_outside_its_range_is_named_by_checked() -> None:
    with pytest.raises(ValueError, match="generalized_cross_entropy: q: expected a number in"):
        checked(generalized_cross_entropy)(LOGITS, LABELS, q=1.5)


# Reverse and symmetric cross-entropy


def test_reverse_cross_entropy_of_an_integer_label_is_four_times_the_absolute_error() -> None:
    reverse, _ = units_and_gradient(reverse_cross_entropy, LOGITS, LABELS)
    missing, _ = units_and_gradient(classification_absolute_error, LOGITS, LABELS)
    np.testing.assert_array_equal(reverse, 4 * missing)


def test_symmetric_cross_entropy_is_the_sum_of_its_parts() -> None:
    for labels in (LABELS, SOFT):
        options = dict(alpha=0.3, beta=0.6, log_zero=-7.0)
        both, _ = units_and_gradient(symmetric_cross_entropy, LOGITS, labels, **options)
        forward, _ = units_and_gradient(softmax_cross_entropy, LOGITS, labels)
        backward, _ = units_and_gradient(reverse_cross_entropy, LOGITS, labels, log_zero=-7.0)
        np.testing.assert_allclose(both, 0.3 * forward + 0.6 * backward, rtol=1e-6)


def test_clipping_targets_as_public_code_does_is_a_choice_of_log_zero() -> None:
    p, clipped = softmax(LOGITS), np.clip(ONE_HOT, 1e-4, 1).astype(np.float64)
    expected = -np.sum(p * np.log(clipped), -1)
    got, _ = units_and_gradient(reverse_cross_entropy, LOGITS, LABELS, log_zero=np.log(1e-4))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_reverse_cross_entropy_is_flat_in_targets_below_its_floor() -> None:
    target = np.array([[1.0, 0.0, 0.0]], np.float32)
    gradient = jax.grad(reverse_cross_entropy, 1)(LOGITS[:1, :3], target)
    np.testing.assert_allclose(gradient, [[-softmax(LOGITS[:1, :3])[0, 0], 0, 0]], rtol=1e-6)


# Normalised losses


@pytest.mark.parametrize("loss", [normalized_cross_entropy, normalized_softmax_focal_loss])
def test_normalized_losses_sum_to_one_over_the_labels_and_start_even(loss: Any) -> None:
    each = [units_and_gradient(loss, LOGITS, np.full(7, k, np.int32))[0] for k in range(5)]
    np.testing.assert_allclose(np.sum(each, axis=0), 1, rtol=1e-6)
    even, _ = units_and_gradient(loss, np.zeros((7, 5), np.float32), LABELS)
    np.testing.assert_allclose(even, 1 / 5, rtol=1e-6)


def test_the_normalized_focal_loss_of_gamma_zero_is_normalized_cross_entropy() -> None:
    got = units_and_gradient(normalized_softmax_focal_loss, LOGITS, LABELS, gamma=0.0)
    expected = units_and_gradient(normalized_cross_entropy, LOGITS, LABELS)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_the_normalized_focal_loss_is_smooth_where_a_class_is_almost_certain() -> None:
    gaps, labels = np.array([10.0, 60, 95, 120, 2e4], np.float32), np.arange(3, dtype=np.int32)
    rows = np.stack([gaps, 0 * gaps, 0 * gaps + 1], axis=-1)
    one = lambda z, label: normalized_softmax_focal_loss(z, label, gamma=0.3)
    curve = jax.jit(jax.vmap(jax.vmap(jax.hessian(one), (None, 0)), (0, None)))(rows, labels)
    assert np.isfinite(curve).all()


# Bootstrapping


def test_bootstrapping_with_full_trust_is_cross_entropy() -> None:
    for loss in (bootstrapped_cross_entropy, hard_bootstrapped_cross_entropy):
        for labels in (LABELS, SOFT):
            got = units_and_gradient(loss, LOGITS, labels, beta=1.0)
            expected = units_and_gradient(softmax_cross_entropy, LOGITS, labels)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_the_gradient_flows_through_the_soft_target() -> None:
    p = softmax(LOGITS)
    entropy = -np.sum(p * np.log(p), axis=-1, keepdims=True)
    expected = 0.6 * (p - ONE_HOT) - 0.4 * p * (np.log(p) + entropy)
    _, gradient = units_and_gradient(bootstrapped_cross_entropy, LOGITS, LABELS, beta=0.6)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-6)


def test_hard_bootstrapping_pulls_towards_the_first_of_equal_logits() -> None:
    _, gradient = units_and_gradient(
        hard_bootstrapped_cross_entropy,
        np.zeros((1, 2), np.float32),
        np.array([1], np.int32),
        beta=0.0,
    )
    np.testing.assert_array_equal(gradient, [[-0.5, 0.5]])


# Bi-tempered loss: oracle by bisection in float64, from the definition


def log_t(u: np.ndarray, t: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(u) if t == 1 else (u ** (1 - t) - 1) / (1 - t)


def exp_t(x: np.ndarray, t: float) -> np.ndarray:
    return np.exp(x) if t == 1 else np.maximum(1 + (1 - t) * x, 0) ** (1 / (1 - t))


def tempered_softmax(logits: Any, t: float) -> np.ndarray:
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    low = np.zeros((*z.shape[:-1], 1))
    high = low - log_t(np.float64(1 / z.shape[-1]), t)
    for _ in range(200):
        middle = (low + high) / 2
        above = exp_t(z - middle, t).sum(axis=-1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return exp_t(z - (low + high) / 2, t)


def bi_tempered(logits: Any, targets: Any, t1: float, t2: float) -> np.ndarray:
    y, p = np.asarray(targets, np.float64), tempered_softmax(logits, t2)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(y > 0, y * (log_t(np.where(y > 0, y, 1), t1) - log_t(p, t1)), 0)
    return np.sum(logs - (y ** (2 - t1) - p ** (2 - t1)) / (2 - t1), axis=-1)


TEMPERATURES = [(0.2, 4.0), (0.8, 1.4), (1.0, 1.0), (0.5, 1.0), (1.0, 2.5), (0.9, 1.0001)]
NARROW = [(0.7, 0.3), (0.0, 0.0), (0.3, 0.95)]
SPREAD = 4 * LOGITS.astype(np.float64)


def bi_tempered_units(logits: Any, labels: Any, **options: float) -> Any:
    options = dict(t1=1.0, t2=1.0, label_smoothing=0.0) | options
    return units_and_gradient(bi_tempered_logistic_loss, logits, labels, **options)


@pytest.mark.parametrize(("t1", "t2"), TEMPERATURES + NARROW)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_bi_tempered_loss_follows_its_definition(
    t1: float, t2: float, smoothing: float
) -> None:
    for labels, targets in ((LABELS, ONE_HOT), (SOFT.astype(np.float64), SOFT)):
        smooth = (1 - smoothing) * targets.astype(np.float64) + smoothing / 5
        for logits in (LOGITS.astype(np.float64), SPREAD):
            options = dict(t1=t1, t2=t2, label_smoothing=smoothing)
            with jax.enable_x64(True):
                wide = bi_tempered_logistic_loss(logits, labels, **options, reduction="none")
            single, _ = bi_tempered_units(np.float32(logits), labels, **options)
            expected = bi_tempered(logits, smooth, t1, t2)
            np.testing.assert_allclose(wide, expected, rtol=1e-11, atol=1e-13)
            np.testing.assert_allclose(single, expected, rtol=2e-5, atol=1e-6)


@jax.jit
def derivatives(z: Any, direction: Any, t1: Any, t2: Any) -> dict[str, Any]:
    one = jnp.ones((), z.dtype)
    loss = lambda h, a, b: bi_tempered_logistic_loss(
        z + h * direction, LABELS, t1=a, t2=b, reduction="sum"
    )
    slope = lambda f: lambda h: jax.jvp(f, (h,), (one,))[1]
    pull = lambda h: jax.grad(loss, (0, 1, 2))(h, t1, t2)
    (reverse, by_t1, by_t2), (mixed, *_) = jax.jvp(pull, (0 * one,), (one,))
    along = slope(lambda h: loss(h, t1, t2))
    twice = lambda h: jax.jvp(along, (h,), (one,))
    (forward, second), (_, third) = jax.jvp(twice, (0 * one,), (one,))
    return dict(
        reverse=reverse,
        forward=forward,
        mixed=mixed,
        second=second,
        third=third,
        by_t1=by_t1,
        by_t2=by_t2,
    )


@pytest.mark.parametrize(("t1", "t2"), [*TEMPERATURES, (0.7, 0.3), (0.3, 0.95)])
def test_derivatives_of_any_order_are_those_of_the_definition(t1: float, t2: float) -> None:
    direction = np.random.default_rng(1).standard_normal(LOGITS.shape)
    with jax.enable_x64(True):
        z = LOGITS.astype(np.float64)
        numbers = direction, np.float64(t1), np.float64(t2)
        at = lambda h: jax.device_get(derivatives(z + h * direction, *numbers))
        got, (ahead, behind) = at(0.0), (at(1e-5), at(-1e-5))
    oracle = lambda h, a, b: bi_tempered(LOGITS + h * direction, ONE_HOT, a, b).sum()
    slope = lambda ahead, behind, step: (ahead - behind) / (2 * step)
    expected = dict(
        reverse=slope(oracle(1e-5, t1, t2), oracle(-1e-5, t1, t2), 1e-5),
        forward=got["reverse"],
        mixed=got["second"],
        second=slope(ahead["forward"], behind["forward"], 1e-5),
        third=slope(ahead["second"], behind["second"], 1e-5),
        by_t1=slope(oracle(0, t1 + 1e-4, t2), oracle(0, t1 - 1e-4, t2), 1e-4),
        by_t2=slope(oracle(0, t1, t2 + 1e-4), oracle(0, t1, t2 - 1e-4), 1e-4),
    )
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_at_temperatures_one_it_is_cross_entropy_minus_the_entropy_of_the_target() -> None:
    for labels, smoothing in ((LABELS, 0.0), (LABELS, 0.1), (SOFT, 0.0)):
        targets = ONE_HOT if labels.ndim == 1 else labels
        t = (1 - smoothing) * targets.astype(np.float64) + smoothing / 5
        entropy = -np.sum(np.where(t > 0, t * np.log(np.where(t > 0, t, 1)), 0), axis=-1)
        got = bi_tempered_units(LOGITS, labels, label_smoothing=smoothing)
        expected = units_and_gradient(softmax_cross_entropy, LOGITS, t.astype(np.float32))
        np.testing.assert_allclose(got[0], expected[0] - entropy, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[1], expected[1], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0])
def test_a_confident_right_answer_keeps_every_digit(gap: float) -> None:
    with mpmath.workdps(60):
        for t1 in (0.2, 0.8, 1.0):
            p = 1 / (1 + mpmath.exp(-gap))
            t = mpmath.mpf(float(np.float32(t1)))
            log_t1 = mpmath.log(p) if t == 1 else (p ** (1 - t) - 1) / (1 - t)
            pieces = (1 - p ** (2 - t)) / (2 - t) - (1 - p) ** (2 - t) / (2 - t)
            exact = float(-log_t1 - pieces)
            got = bi_tempered_logistic_loss(
                np.array([[gap, 0.0]], np.float32), np.array([0], np.int32), t1=t1
            )
            np.testing.assert_allclose(got, exact, rtol=1e-5)


@pytest.mark.parametrize("classes", [2, 30, 1000])
def test_the_probabilities_sum_to_one(classes: int) -> None:
    logits = np.random.default_rng(classes).standard_normal((4, classes)).astype(np.float32)
    c = 1 - np.array([0.0, 0.5, 0.9, 1.0, 1.1, 2.0, 4.0], np.float32)
    scaled = np.array([0.1, 3.0, 1e3], np.float32)[:, None, None] * logits
    log_p = jax.jit(jax.vmap(lambda c: _log_tempered_softmax(scaled, c, 10)))(c)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, atol=1e-5)


def test_newton_steps_come_from_one_side_and_ten_are_enough() -> None:
    with jax.enable_x64(True):
        z = np.array([0.1, 3.0, 1e4])[:, None, None] * np.random.default_rng(3).standard_normal(
            (6, 500)
        )
        z = z - z.max(axis=-1, keepdims=True)
        c = 1 - np.array([0.0, 0.3, 0.9, 1.0, 1.3, 2.0, 6.0])
        solve = lambda z, c: [
            jax.vmap(lambda c, n=n: _normaliser(z, c, n))(c) for n in (1, 2, 3, 10, 40)
        ]
        roots = jax.device_get(jax.jit(solve)(z, c))
    for before, after in pairwise(roots):
        assert np.all(after >= before * (1 - 1e-12))
    np.testing.assert_allclose(roots[-2], roots[-1], rtol=1e-12, atol=1e-15)


def test_one_step_is_exact_at_temperature_one() -> None:
    units = bi_tempered_logistic_loss(LOGITS, LABELS, num_iters=1, reduction="none")
    expected, _ = units_and_gradient(softmax_cross_entropy, LOGITS, LABELS)
    np.testing.assert_allclose(units, expected, rtol=2e-6)


def test_a_wrong_label_costs_at_most_one_over_one_minus_t1() -> None:
    logits = np.where(ONE_HOT > 0, np.float32(1e4), np.float32(-1e4))
    for t1, t2 in ((0.5, 1.5), (0.0, 1.0), (0.8, 0.5)):
        units, gradient = bi_tempered_units(logits, (LABELS + 1) % 5, t1=t1, t2=t2)
        assert np.all(0.8 / (1 - t1) < units)
        assert np.all(units <= (1 + 1e-6) / (1 - t1))
        assert np.isfinite(gradient).all()


@given(logits=rows, labels=names, t1=st.floats(0, 1.5, width=16), t2=st.floats(0, 4, width=16))
@cases
def test_the_bi_tempered_loss_is_never_negative_nor_nan(
    logits: Any, labels: Any, t1: float, t2: float
) -> None:
    units, gradient = bi_tempered_units(logits, labels, t1=t1, t2=t2, label_smoothing=0.1)
    assert np.all(units >= 0)
    assert not np.isnan(gradient).any()


@jax.jit
def slope_in_target(target: Any, t1: Any, t2: Any) -> Any:
    loss = lambda y: bi_tempered_logistic_loss(LOGITS, y, t1=t1, t2=t2, reduction="sum")
    return jax.grad(loss)(target)


@pytest.mark.parametrize(("t1", "t2"), [(0.5, 1.5), (0.8, 0.7), (1.0, 1.0)])
def test_the_derivative_with_respect_to_a_target_is_finite_at_zero(t1: float, t2: float) -> None:
    gradient = np.asarray(slope_in_target(ONE_HOT, t1, t2))
    assert np.isfinite(gradient).all()
    if t1 < 1:  # log_t of a vanishing target has the limit -1 / (1 - t)
        slope, none = -log_t(tempered_softmax(LOGITS, t2), t1) - 1 / (1 - t1), ONE_HOT == 0
        np.testing.assert_allclose(gradient[none], slope[none], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_iters", [0, -3, 2.5, True])
def test_num_iters_must_be_a_positive_integer(num_iters: Any) -> None:
    with pytest.raises(ValueError, match="num_iters: expected a positive integer"):
        bi_tempered_logistic_loss(LOGITS, LABELS, num_iters=num_iters)


def test_temperatures_outside_their_range_are_named_by_checked() -> None:
    for name, value in (("t1", 2.0), ("t1", -0.1), ("t2", -1.0)):
        with pytest.raises(ValueError, match=f"bi_tempered_logistic_loss: {name}: expected"):
            checked(bi_tempered_logistic_loss)(LOGITS, LABELS, **{name: value})
