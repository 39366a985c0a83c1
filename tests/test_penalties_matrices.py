"""Penalties on matrices of parameters, and on activations, certainty and slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import entropy

import jaxloss
from jaxloss.losses.output_penalties import (
    activity_penalty,
    entropy_loss,
    information_maximization_loss,
    input_gradient_penalty,
    pseudo_label,
)
from jaxloss.training.penalties_matrices import orthogonal_penalty, spectral_penalty

RNG = np.random.default_rng(0)
W = RNG.normal(size=(5, 3)).astype(np.float32)
KERNEL = RNG.normal(size=(2, 2, 3, 4)).astype(np.float32)
PARAMS = {"dense": {"kernel": W, "bias": np.ones(3, np.float32)}, "conv": KERNEL, "step": 3}
FORMS = ("soft", "double", "off_diagonal", "spectral")
KEY = jax.random.key(0)


def by_hand(w, form):
    w = w.reshape(-1, w.shape[-1]).astype(np.float64)
    w = w if w.shape[1] <= w.shape[0] else w.T
    small, large = (a.T @ a - np.eye(a.shape[1]) for a in (w, w.T))
    if form == "spectral":
        return np.max(np.abs(np.linalg.eigvalsh(small)))
    if form == "off_diagonal":
        small = small - np.diag(np.diag(small))
    return np.sum(small**2) + (np.sum(large**2) if form == "double" else 0)


@pytest.mark.parametrize("form", FORMS)
def test_the_orthogonal_penalty_is_the_formula_on_the_smaller_side_of_every_matrix(form):
    expected = by_hand(W, form) + by_hand(KERNEL, form)
    assert float(orthogonal_penalty(PARAMS, form=form)) == pytest.approx(expected, rel=1e-5)
    assert float(orthogonal_penalty(W.T, form=form)) == pytest.approx(by_hand(W, form), rel=1e-5)
    only = orthogonal_penalty(PARAMS, form=form, select=jaxloss.path_matches("dense"))
    assert float(only) == pytest.approx(by_hand(W, form), rel=1e-5)


def test_orthonormal_columns_cost_nothing_and_have_no_gradient():
    q = np.linalg.qr(RNG.normal(size=(6, 4)))[0]
    with jax.enable_x64(True):
        for form in ("soft", "off_diagonal", "spectral"):
            value, grad = jax.value_and_grad(lambda w, f=form: orthogonal_penalty(w, form=f))(q)
            assert float(value) == pytest.approx(0, abs=1e-14)
            assert np.all(np.isfinite(grad))
        assert float(orthogonal_penalty(q, form="double")) == pytest.approx(6 - 4)  # what is left
        assert float(orthogonal_penalty(3 * q, form="off_diagonal")) == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_formula_and_finite_at_matrices_without_rank(form):
    grad = jax.jit(jax.grad(lambda w: orthogonal_penalty(w, form=form)))
    with jax.enable_x64(True):
        step, moved = 1e-6, RNG.normal(size=W.shape)
        wide = W.astype(np.float64)
        slope = (by_hand(wide + step * moved, form) - by_hand(wide - step * moved, form)) / 2e-6
        assert float(jnp.sum(grad(wide) * moved)) == pytest.approx(slope, rel=1e-6)
    for flat in (np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)):
        assert np.all(np.isfinite(grad(flat)))


def test_gradients_of_sixteen_bit_leaves_have_their_dtype_and_no_matrix_costs_nothing():
    grads = jax.grad(orthogonal_penalty)({"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2)})
    assert grads["w"].dtype == jnp.bfloat16
    assert np.all(grads["b"] == 0)
    assert orthogonal_penalty({"b": jnp.ones(3)}) == 0
    assert spectral_penalty({"b": jnp.ones(3)}, None, key=KEY) == (0, ())


def largest(w):
    return np.linalg.svd(w.reshape(-1, w.shape[-1]).astype(np.float64))[1][0]


def test_the_spectral_penalty_goes_on_from_step_to_step_to_the_largest_singular_value():
    expected = largest(W) ** 2 + largest(KERNEL) ** 2
    step = jax.jit(lambda p, state: spectral_penalty(p, state, iterations=5))
    first, state = spectral_penalty(PARAMS, None, key=KEY)
    assert float(first) < expected * (1 + 1e-6)
    for _ in range(60):
        value, state = step(PARAMS, state)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    at_once, _ = spectral_penalty(PARAMS, None, key=KEY, iterations=300)
    assert float(at_once) == pytest.approx(expected, rel=1e-5)


def test_its_gradient_is_that_of_the_squared_singular_value_with_the_vectors_stopped():
    _, state = spectral_penalty(W, None, key=KEY, iterations=300)
    grad, moved = jax.grad(spectral_penalty, has_aux=True)(W, state)
    u, s, v = np.linalg.svd(W.astype(np.float64))
    np.testing.assert_allclose(grad, 2 * s[0] * np.outer(u[:, 0], v[0]), rtol=1e-4, atol=1e-4)
    slope = jax.grad(lambda w: sum(jnp.sum(x) for x in spectral_penalty(w, state)[1]))(W)
    assert np.all(np.asarray(slope) == 0)
    np.testing.assert_allclose(np.abs(moved[0]), np.abs(v[0]), rtol=1e-3)


def test_a_matrix_of_zeros_costs_nothing_and_its_vector_survives():
    (value, state), grad = jax.value_and_grad(
        lambda w: spectral_penalty(w, None, key=KEY), has_aux=True
    )(jnp.zeros((3, 2)))
    assert value == 0
    assert np.all(np.asarray(grad) == 0)
    value, _ = spectral_penalty(W[:3, :2], state, iterations=60)
    assert float(value) == pytest.approx(largest(W[:3, :2]) ** 2, rel=1e-4)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="orthogonal_penalty: form: expected one of"):
        orthogonal_penalty(PARAMS, form="hard")
    with pytest.raises(ValueError, match="spectral_penalty: key: expected a random key"):
        spectral_penalty(PARAMS, None)
    with pytest.raises(ValueError, match="state: expected 2 vectors, one for each matrix, got 1"):
        spectral_penalty(PARAMS, (jnp.ones(3),))
    with pytest.raises(ValueError, match=r"state\[0\]: expected shape \(3,\)"):
        spectral_penalty(W, (jnp.ones(4),))
    with pytest.raises(ValueError, match="iterations: expected an integer of at least 1"):
        spectral_penalty(W, None, key=KEY, iterations=0)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_entropy_loss_is_that_of_scipy_and_minus_the_confidence_penalty():
    logits = RNG.normal(size=(4, 5)).astype(np.float32) * 3
    expected = entropy(softmax(logits.astype(np.float64)), axis=-1)
    np.testing.assert_allclose(entropy_loss(logits, reduction="none"), expected, rtol=1e-5)
    assert entropy_loss(logits) == -jaxloss.confidence_penalty(logits)


def test_the_entropy_of_a_certain_row_and_of_forbidden_classes_has_a_finite_gradient():
    rows = jnp.array([[1e4, 0.0, 0.0], [0.0, -jnp.inf, 0.0], [50.0, 0.0, -50.0]])
    units = entropy_loss(rows, reduction="none")
    np.testing.assert_allclose(units, [0, np.log(2), 51 * 2 * np.exp(-50) / 2], rtol=1e-5)
    grad = np.asarray(jax.grad(lambda x: entropy_loss(x, reduction="sum"))(rows))
    assert np.all(np.isfinite(grad))
    assert np.all(grad[0] == 0)


def test_information_is_the_mean_entropy_minus_the_entropy_of_the_mean():
    logits = RNG.normal(size=(6, 4)).astype(np.float32) * 3
    weights = RNG.uniform(0.5, 2, 6).astype(np.float32)
    p, w = softmax(logits.astype(np.float64)), weights / weights.sum()
    expected = np.sum(w * entropy(p, axis=-1)) - entropy(w @ p)
    got = information_maximization_loss(logits, weights=weights)
    assert float(got) == pytest.approx(expected, rel=1e-5)
    alike = np.tile(logits[:1], (6, 1))
    np.testing.assert_allclose(information_maximization_loss(alike), 0, atol=1e-7)
    with pytest.raises(ValueError, match=r"logits: expected shape \(n, classes\)"):
        information_maximization_loss(logits[0])


def test_the_input_gradient_penalty_of_a_linear_function_is_its_slope():
    slope = RNG.normal(size=3)
    x = RNG.normal(size=(4, 3))
    with jax.enable_x64(True):
        units = input_gradient_penalty(lambda x: x @ slope, x, reduction="none")
        np.testing.assert_allclose(units, np.sum(slope**2), rtol=1e-14)
        critic = lambda x: jnp.sum(jnp.sin(x), axis=1)
        both = input_gradient_penalty(critic, x), jaxloss.r1_penalty(critic, x)
        assert float(both[0]) == pytest.approx(2 * float(both[1]), rel=1e-14)
        grad = jax.grad(lambda s: input_gradient_penalty(lambda x: x @ s, x))(slope)
        np.testing.assert_allclose(grad, 2 * slope, rtol=1e-14)


def test_a_function_that_mixes_up_its_batch_is_named():
    with pytest.raises(ValueError, match=r"fn\(x\): expected a batch of 4, got shape \(3,\)"):
        input_gradient_penalty(lambda x: jnp.sum(x, axis=0), jnp.ones((4, 3)))


def test_the_activity_penalty_has_no_slope_at_silence():
    for order in (1, 2):
        assert (
            jax.grad(lambda a, q=order: activity_penalty(a, order=q))(jnp.zeros(3)).tolist()
            == [0] * 3
        )
    with pytest.raises(ValueError, match="order: expected one of"):
        activity_penalty(jnp.ones(3), order=3)


def test_pseudo_labels_count_where_the_likeliest_class_is_likely_enough():
    logits = np.log(np.array([[0.96, 0.04], [0.06, 0.94], [0.5, 0.5]], np.float32))
    labels, where = pseudo_label(logits)
    assert (labels[:2].tolist(), where.tolist()) == ([0, 1], [True, False, False])
    assert pseudo_label(logits, threshold=0.9)[1].tolist() == [True, True, False]
    assert pseudo_label(logits.T, axis=0)[1].tolist() == [True, False, False]
    assert pseudo_label(jnp.full((1, 2), jnp.nan))[1].tolist() == [False]
    student = RNG.normal(size=(3, 2)).astype(np.float32)
    loss = jaxloss.softmax_cross_entropy(student, labels, where=where)
    assert float(loss) == pytest.approx(-np.log(softmax(student)[0, 0]), rel=1e-5)
