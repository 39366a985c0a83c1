"""Distillation: formulas, accuracy near the teacher, ends of the mixture, top classes, memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_and_gradient

from jaxloss import checked
from jaxloss._core.logit_divergences import jsd_of_logits, kl_of_logits
from jaxloss.losses.distillation import (
    distillation_loss,
    generalized_jsd,
    reverse_distillation_loss,
    top_k_distillation_loss,
    top_k_distillation_loss_renormalized,
    top_k_distillation_loss_with_tail,
    total_variation_distance,
)

FEW, MANY = 7, 1500  # on either side of the number of classes at which the kernel changes
EPS = np.finfo(np.float32).eps
DENSE = (distillation_loss, reverse_distillation_loss, generalized_jsd)
TOP = (
    top_k_distillation_loss,
    top_k_distillation_loss_renormalized,
    top_k_distillation_loss_with_tail,
)
named = lambda loss: loss.__name__


def draw(classes: int, rows: int = 6, scale: float = 3.0) -> tuple[Any, Any]:
    generator = np.random.default_rng(classes)
    return tuple(
        (scale * generator.standard_normal((rows, classes))).astype(np.float32) for _ in range(2)
    )


def log_softmax(z: Any) -> np.ndarray:
    z = np.asarray(z, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    p = np.exp(log_p)
    ratio = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=p > 0)
    return np.sum(p * ratio, axis=-1)


def formula(
    loss: Any, student: Any, teacher: Any, temperature: float, beta: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Units, and their gradients in the student, in float64."""
    log_s, log_t = (
        log_softmax(np.asarray(z, np.float64) / temperature) for z in (student, teacher)
    )
    s, t = np.exp(log_s), np.exp(log_t)
    if loss is distillation_loss:
        return temperature**2 * kl(log_t, log_s), temperature * (s - t)
    if loss is reverse_distillation_loss:
        units = kl(log_s, log_t)
        slope = s * (log_s - log_t - units[..., None])
        return temperature**2 * units, temperature * slope
    log_m = np.log(beta * t + (1 - beta) * s)
    slope = s * (log_s - log_m - kl(log_s, log_m)[..., None])
    units = beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)
    return units, (1 - beta) * slope / temperature


def close(got: Any, expected: Any, ulps: float = 8, eps: float = EPS) -> None:
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, rtol=0, atol=ulps * eps * scale
    )


def with_numbers(
    loss: Any, student: Any, teacher: Any, temperature: float = 1.0, beta: float = 0.5
) -> tuple[Any, Any]:
    options = dict(beta=beta) if loss is generalized_jsd else {}
    return units_and_gradient(loss, student, teacher, temperature=temperature, **options)


@pytest.mark.parametrize("classes", [FEW, MANY])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("loss", DENSE, ids=named)
def test_units_and_gradients_follow_the_formula(loss: Any, dtype: Any, classes: int) -> None:
    student, teacher = (z.astype(dtype) for z in draw(classes))
    units, gradient = with_numbers(loss, student, teacher, 1.5, 0.25)
    wide = (z.astype(np.float64) for z in (student, teacher))
    exact, slope = formula(loss, *wide, 1.5, 0.25)
    close(units, exact)
    eps = max(EPS, float(jnp.finfo(dtype).eps) / 2)
    close(gradient, slope, 8, eps)


def plain_kl(a: Any, b: Any) -> Any:
    p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def plain_jsd(a: Any, b: Any, beta: Any) -> Any:
    p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    m = jnp.logaddexp(jnp.log(beta) + p, jnp.log(1 - beta) + q)
    first, second = (jnp.sum(jnp.exp(x) * (x - m), axis=-1) for x in (p, q))
    return beta * first + (1 - beta) * second


@pytest.mark.parametrize(
    ("rule", "plain", "numbers"),
    [(kl_of_logits, plain_kl, ()), (jsd_of_logits, plain_jsd, (0.3,))],
    ids=["kl", "jsd"],
)
def test_the_rules_differentiate_like_their_plain_twins(
    rule: Any, plain: Any, numbers: tuple[float, ...]
) -> None:
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        normal = lambda: generator.standard_normal((3, FEW))
        a = 2 * normal()
        b = a + normal() * np.array([[0.01], [0.3], [1]])  # near, between and far
        point = (a, b, *map(np.float64, numbers))
        direction = (normal(), normal(), *(np.float64(0.7) for _ in numbers))

        def everything(function: Callable[..., Any], point: Any, direction: Any) -> Any:
            total = lambda *p: jnp.sum(jnp.square(function(*p)))
            gradient = jax.grad(total, argnums=tuple(range(len(point))))
            mapped = jax.vmap(function, in_axes=(0, 0, *[None] * len(numbers)))
            return (
                function(*point),
                jax.jvp(total, point, direction)[1],
                jax.jvp(gradient, point, direction),
                mapped(*point),
            )

        run = lambda *arrays: [everything(function, *arrays) for function in (rule, plain)]
        ours, theirs = jax.jit(run)(point, direction)
        for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("classes", [FEW, MANY])
@pytest.mark.parametrize("loss", DENSE, ids=named)
def test_a_student_close_to_its_teacher_keeps_a_positive_loss_with_digits(
    loss: Any, classes: int
) -> None:
    teacher, noise = draw(classes)
    for size, tolerance in ((1e-3, 1e-2), (0.1, 1e-4)):
        student = teacher + np.float32(size) * noise
        exact, slope = formula(loss, student, teacher, 1.0)
        units, gradient = with_numbers(loss, student, teacher)
        np.testing.assert_allclose(units, exact, rtol=tolerance)
        scale = np.max(np.abs(slope))
        np.testing.assert_allclose(gradient, slope, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("loss", DENSE, ids=named)
def test_a_student_equal_to_its_teacher_costs_nothing_with_a_finite_curvature(loss: Any) -> None:
    teacher, direction = draw(FEW)
    units, gradient = with_numbers(loss, teacher, teacher, 3.0)
    np.testing.assert_array_equal(units, 0)
    np.testing.assert_array_equal(gradient, 0)
    slope = jax.grad(lambda z: loss(z, teacher))
    curved = jax.jit(lambda z: jax.jvp(slope, (z,), (direction,))[1])(teacher)
    p = np.exp(log_softmax(teacher))
    exact = p * (direction - np.sum(p * direction, axis=-1, keepdims=True)) / len(teacher)
    close(curved, exact / (4 if loss is generalized_jsd else 1), 32)


def test_the_teacher_has_no_gradient() -> None:
    student, teacher = draw(FEW)
    likeliest, indices = log_softmax(teacher)[:, :2].astype(np.float32), np.tile([0, 1], (6, 1))

    @jax.jit
    def run(student: Any, teacher: Any, likeliest: Any) -> Any:
        dense = [jax.grad(loss, argnums=1)(student, teacher) for loss in DENSE]
        return dense, [jax.grad(loss, argnums=1)(student, likeliest, indices) for loss in TOP]

    for gradient in jax.tree.leaves(run(student, teacher, likeliest)):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("classes", [FEW, MANY])
@pytest.mark.parametrize("loss", DENSE, ids=named)
def test_a_class_that_both_rule_out_is_a_class_removed(loss: Any, classes: int) -> None:
    student, teacher = draw(classes)
    fewer = [np.delete(z, 3, axis=-1) for z in (student, teacher)]
    for z in (student, teacher):
        z[:, 3] = -np.inf
    units, gradient = jax.device_get(with_numbers(loss, student, teacher, 2.0))
    expected, slope = formula(loss, *fewer, 2.0)
    close(units, expected)
    close(np.delete(gradient, 3, axis=-1), slope)
    np.testing.assert_array_equal(gradient[:, 3], 0)


def test_a_class_that_one_side_rules_out() -> None:
    full = np.zeros((6, FEW), np.float32)
    out = np.where(np.arange(FEW) == FEW - 1, -np.inf, full).astype(np.float32)
    log = np.log
    mixed = 0.5 * (log(14 / 13) + (6 * log(12 / 13) + log(2)) / 7)
    cases = [
        (distillation_loss, full, out, log(7 / 6)),
        (distillation_loss, out, full, np.inf),
        (reverse_distillation_loss, out, full, log(7 / 6)),
        (reverse_distillation_loss, full, out, np.inf),
        (generalized_jsd, full, out, mixed),
        (generalized_jsd, out, full, mixed),
    ]
    for loss, student, teacher, expected in cases:
        units, gradient = with_numbers(loss, student, teacher)
        np.testing.assert_allclose(units, expected, rtol=1e-6)
        if np.isfinite(expected):
            assert np.isfinite(gradient).all()


# The ends of the mixture


def test_a_traced_beta_does_not_jump_at_the_ends() -> None:
    student, teacher = draw(FEW, scale=1.0)
    value = jax.jit(lambda b: generalized_jsd(student, teacher, beta=b))
    forward, reverse = (
        np.mean(formula(loss, student, teacher, 1.0)[0])
        for loss in (distillation_loss, reverse_distillation_loss)
    )
    assert value(0.0) == value(1.0) == 0
    for beta in (1e-3, 1e-5):
        np.testing.assert_allclose(value(beta) / beta, forward, rtol=3e3 * beta)
        np.testing.assert_allclose(value(1 - beta) / beta, reverse, rtol=3e3 * beta + 0.01)
    assert value(1e-3) < 0.01 * forward
    slopes = jax.jit(jax.vmap(jax.grad(value)))(np.float32([0.0, 1.0]))
    np.testing.assert_allclose(slopes, [forward, -reverse], rtol=1e-5)


def test_the_mixture_is_symmetric_and_reaches_the_entropy_of_beta() -> None:
    student, teacher = draw(FEW)
    np.testing.assert_allclose(
        with_numbers(generalized_jsd, student, teacher, beta=0.2)[0],
        with_numbers(generalized_jsd, teacher, student, beta=0.8)[0],
        rtol=1e-6,
    )
    apart = np.float32([[1e4, -1e4], [200.0, 0.0]])
    for beta in (0.1, 0.5):
        units, gradient = units_and_gradient(generalized_jsd, apart, -apart, beta=beta)
        entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
        np.testing.assert_allclose(units, entropy, rtol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@jax.jit
def divergences(s: Any, t: Any, beta: Any) -> Any:
    none = dict(reduction="none")
    log_s, target = jax.nn.log_softmax(s), jax.nn.softmax(t)
    return (
        distillation_loss(s, t, **none),
        reverse_distillation_loss(s, t, **none),
        generalized_jsd(s, t, beta=beta, **none),
        total_variation_distance(log_s, target, **none),
    )


@settings(max_examples=50, deadline=None)
@given(
    *(arrays(np.float32, (4, 5), elements=st.floats(-40, 40, width=32)) for _ in range(2)),
    st.floats(0.0625, 0.9375, width=32),
)
def test_no_divergence_is_negative_or_above_its_bound(s: Any, t: Any, beta: float) -> None:
    forward, reverse, mixed, distance = jax.device_get(divergences(s, t, np.float32(beta)))
    assert np.all(np.asarray([forward, reverse, mixed]) >= 0)
    assert np.all(mixed <= np.log(2) * (1 + 1e-6))
    assert np.all((distance >= 0) & (distance <= 1 + 1e-6))
    assert np.all(2 * distance**2 <= forward + 1e-5)  # Pinsker


# The likeliest classes


def top(teacher: Any, k: int, temperature: float = 1.0) -> tuple[Any, Any]:
    log_probs = log_softmax(np.asarray(teacher, np.float64) / temperature)
    indices = np.argsort(-log_probs, axis=-1)[..., :k].astype(np.int32)
    return np.take_along_axis(log_probs, indices, axis=-1).astype(np.float32), indices


@pytest.mark.parametrize("loss", TOP, ids=named)
def test_all_classes_make_the_dense_divergence(loss: Any) -> None:
    student, teacher = draw(FEW)
    units, gradient = units_and_gradient(loss, student, *top(teacher, FEW, 1.5), temperature=1.5)
    expected, slope = formula(distillation_loss, student, teacher, 1.5)
    close(units, expected)
    close(gradient, slope)


@pytest.mark.parametrize("classes", [FEW, MANY])
def test_some_classes_follow_their_formulas(classes: int) -> None:
    student, teacher = draw(classes)
    log_t, indices = top(teacher, 3, 2.0)
    log_s = np.take_along_axis(log_softmax(student.astype(np.float64) / 2), indices, axis=-1)
    wide = log_t.astype(np.float64)
    t, s = np.exp(wide), np.exp(log_s)
    rest_t, rest_s = 1 - t.sum(axis=-1), 1 - s.sum(axis=-1)
    truncated = np.sum(t * (wide - log_s), axis=-1)
    exact = {
        top_k_distillation_loss: truncated,
        top_k_distillation_loss_renormalized: kl(log_softmax(wide), log_softmax(log_s)),
        top_k_distillation_loss_with_tail: truncated + rest_t * np.log(rest_t / rest_s),
    }
    for loss, units in exact.items():
        got = loss(student, log_t, indices, temperature=2.0, reduction="none")
        np.testing.assert_allclose(got, 4 * units, rtol=1e-5, atol=1e-6)


def test_a_class_named_twice_or_unknown_makes_its_row_nan_unless_hidden() -> None:
    student = np.zeros((4, 5), np.float32)
    log_t = np.full((4, 2), -1, np.float32)
    indices = np.array([[0, 1], [2, 2], [0, 5], [-1, 3]], np.int32)
    where = np.array([True, False, False, False])
    for loss in TOP:
        run = partial(units_and_gradient, loss, student, log_t, indices)
        units, gradient = jax.device_get(run(where=np.ones(4, bool)))
        np.testing.assert_array_equal(np.isnan(units), [False, True, True, True])
        np.testing.assert_array_equal(np.isnan(gradient).any(axis=-1), [False, True, True, True])
        hidden, slope = run(where=where)
        np.testing.assert_array_equal(hidden, [units[0], 0, 0, 0])
        np.testing.assert_array_equal(slope, np.where(where[:, None], gradient, 0))
    with pytest.raises(ValueError, match="teacher_indices: expected each class once, got 1"):
        checked(TOP[0])(student[:2], log_t[:2], indices[:2])
    with pytest.raises(ValueError, match=r"teacher_indices: expected values in \[0, 5\), got 2"):
        checked(TOP[0])(student, log_t, indices % 6)
    with pytest.raises(ValueError, match="teacher_indices: expected at most 5 classes, got 6"):
        TOP[0](student, np.zeros((4, 6), np.float32), np.zeros((4, 6), int))


def test_a_tail_of_almost_nothing_keeps_its_digits() -> None:
    student = np.float32([[20.0, 0.0, -1.0]])
    log_t, indices = np.float32([[-1e-7]]), np.array([[0]])
    rest_t = -np.expm1(-np.float64(np.float32(1e-7)))
    rest_s = 1 / (1 + np.exp(20) / (1 + np.exp(-1)))
    exact = np.exp(-1e-7) * (-1e-7 - np.log1p(-rest_s)) + rest_t * np.log(rest_t / rest_s)
    units, gradient = jax.device_get(units_and_gradient(TOP[2], student, log_t, indices))
    np.testing.assert_allclose(units, [exact], rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 0], rest_t - rest_s, rtol=1e-5)
    full, _ = units_and_gradient(TOP[2], student, 0 * log_t, indices)  # the teacher leaves nothing
    np.testing.assert_allclose(full, [-np.log1p(-rest_s)], rtol=1e-5)


# Total variation


def test_total_variation_is_half_the_sum_of_the_differences() -> None:
    generator = np.random.default_rng(0)
    p, t = (generator.dirichlet(np.ones(5), 6).astype(np.float32) for _ in range(2))
    got = total_variation_distance(np.log(p), t, reduction="none")
    np.testing.assert_allclose(got, np.abs(p - t).sum(axis=-1) / 2, rtol=1e-5)
    np.testing.assert_allclose(total_variation_distance(np.log(t), p), got.mean(), rtol=1e-5)
    half = np.log(np.float32([[0.5, 0.5]]))
    step = jax.jit(jax.value_and_grad(total_variation_distance))
    np.testing.assert_array_equal(step(half, np.exp(half))[1], 0)
    assert step(np.float32([[0.0, -np.inf]]), np.float32([[0.0, 1.0]]))[0] == 1


# Memory


@pytest.mark.parametrize(
    ("loss", "copies"),
    [(distillation_loss, 1), (reverse_distillation_loss, 1), (generalized_jsd, 3)],
    ids=["forward", "reverse", "mixture"],
)
def test_a_large_vocabulary_needs_little_beside_the_logits(loss: Any, copies: int) -> None:
    logits = jax.ShapeDtypeStruct((1024, 32768), jnp.float32)
    program = jax.jit(jax.value_and_grad(loss)).lower(logits, logits).compile()
    full = logits.size * 4
    assert program.memory_analysis().temp_size_in_bytes < (copies + 0.01) * full
