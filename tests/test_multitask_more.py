"""More weightings of losses and combinations of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from jaxloss.training.gradient_surgery import pcgrad
from jaxloss.training.multitask_more import (
    aligned_mtl,
    fairgrad,
    geometric_mean_loss,
    graddrop,
    gradvac,
    imtl_g,
    mgda,
    nash_mtl,
    random_loss_weights,
    smooth_tchebycheff,
)

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(4, 3, 9)).astype(np.float32)  # four draws of three tasks' gradients
ROWS[1] *= np.array([[0.01], [1], [100]], np.float32)
ROWS[2, 1] = 0.3 * ROWS[2, 1] - ROWS[2, 0]
LOSSES = np.array([2.0, 0.3, 7.0], np.float32)
COMBINED = [mgda, imtl_g, aligned_mtl, nash_mtl]


def assert_close(got, expected, tolerance=1e-5):
    scale = np.max(np.abs(expected)) or 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


def over_draws(surgery, rows=ROWS):
    """The step of each draw, with what it was made of in float64."""
    return zip(np.asarray(jax.jit(jax.vmap(surgery))(rows), float), rows.astype(float), strict=True)


def test_random_weights_are_positive_of_sum_one_and_new_for_each_key():
    draw = jax.jit(jax.vmap(lambda key: random_loss_weights(3, key=key)))
    weights = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.mean(weights, axis=0), 1 / 3, atol=0.02)
    logs = np.log(weights) - np.log(weights).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(np.std(logs), np.sqrt(2 / 3), rtol=0.03)
    key = jax.random.key(1)
    named = random_loss_weights(["b", "a"], key=key)
    assert_close([named["a"], named["b"]], random_loss_weights(2, key=key))


def test_the_geometric_mean_is_that_of_logarithms_and_does_not_overflow():
    value, grad = jax.jit(jax.value_and_grad(geometric_mean_loss))(LOSSES)
    expected = np.prod(LOSSES.astype(float)) ** (1 / 3)
    assert_close(value, expected)
    assert_close(grad, expected / (3 * LOSSES))
    assert_close(geometric_mean_loss(LOSSES, eps=0.5), np.prod(LOSSES + 0.5) ** (1 / 3))
    large = geometric_mean_loss(np.full(3, 1e30, np.float32))  # whose product is 1e90
    assert_close(large, 1e30, 2e-5)


def test_a_loss_of_zero_ends_neither_mean_nor_maximum_in_nan():
    losses, ones = np.float32([0, 2]), np.ones(2, np.float32)
    value, grad = jax.jit(jax.value_and_grad(geometric_mean_loss))(losses)
    assert value == 0
    assert np.all(grad == 0)
    both = jax.jit(jax.value_and_grad(lambda x: smooth_tchebycheff(x, reference=ones)))
    value, grad = both(losses)
    assert_close(value, np.log(2.0))
    assert_close(grad, [0.0, 0.5])
    value, grad = both(0 * losses)
    assert value == -np.inf
    assert np.all(grad == 0)


@pytest.mark.parametrize("mu", [0.01, 1.0])
def test_smooth_tchebycheff_is_the_formula_and_near_its_limit_the_largest_ratio(mu):
    reference = np.array([1.0, 2.0, 3.0], np.float32)
    value = smooth_tchebycheff(LOSSES, reference=reference, mu=mu)
    logs = np.log(LOSSES.astype(float) / reference)
    assert_close(value, mu * logsumexp(logs / mu))
    if mu == 0.01:
        assert value == pytest.approx(max(logs), abs=0.01)


def test_mgda_is_the_shortest_vector_of_the_hull():
    for got, rows in over_draws(mgda):
        products = rows @ rows.T / np.trace(rows @ rows.T)
        total = {"type": "eq", "fun": lambda w: 1 - w.sum()}
        found = minimize(
            lambda w, g=products: w @ g @ w * 1e3,
            np.full(3, 1 / 3),
            bounds=[(0, 1)] * 3,
            constraints=total,
            tol=1e-15,
        )
        assert np.linalg.norm(got) <= np.linalg.norm(found.x @ rows) * (1 + 1e-5)
        noise = 1e-5 * np.max(np.linalg.norm(rows, axis=1)) * np.linalg.norm(got)
        assert min(rows @ got) >= got @ got - noise  # the condition of the optimum
    a, b = np.array([1.0, 0.0], np.float32), np.array([-1.0, 2.0], np.float32)
    share = np.clip((b - a) @ b / ((a - b) @ (a - b)), 0, 1)
    assert_close(jax.jit(mgda)(np.stack([a, b])), share * a + (1 - share) * b)


def test_imtl_leads_equally_far_along_all_gradients_by_coefficients_of_sum_one():
    for got, rows in over_draws(imtl_g):
        along = rows @ got / np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(along, along[0], rtol=1e-4)
        coefficients = np.linalg.lstsq(rows.T, got, rcond=None)[0]
        assert coefficients.sum() == pytest.approx(1, rel=1e-4)


def test_aligned_gradients_have_equal_singular_values():
    for got, rows in over_draws(aligned_mtl, ROWS[[0, 2, 3]]):  # the other is singular in float32
        left, sizes, right = np.linalg.svd(rows, full_matrices=False)
        assert_close(got, np.sum(sizes[-1] * left @ right, axis=0), 1e-4)


def test_nash_bargains_to_the_inverse_of_the_weights_whatever_the_units():
    for got, rows in over_draws(nash_mtl):
        weights = np.linalg.lstsq(rows.T, got, rcond=None)[0]
        np.testing.assert_allclose(rows @ got * weights, 1, rtol=2e-4)
        assert np.linalg.norm(got) == pytest.approx(np.sqrt(3), rel=1e-4)
    scaled = ROWS[0] * np.array([[1e-3], [1.0], [1e3]], np.float32)
    one, other = jax.jit(jax.vmap(nash_mtl))(np.stack([scaled, ROWS[0]]))
    assert_close(one, other, 1e-4)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 5.0])
def test_fair_steps_solve_their_equation(alpha):
    draws = ROWS if alpha <= 2 else ROWS[[0, 2, 3]]  # the other takes hundreds of iterations
    for got, rows in over_draws(lambda g: fairgrad(g, alpha=alpha), draws):
        weights = np.linalg.lstsq(rows.T, got, rcond=None)[0]
        np.testing.assert_allclose((rows @ got) ** alpha * weights, 1, rtol=1e-3)  # of 20 steps


def test_where_there_is_no_conflict_sign_dropout_is_the_sum_and_with_one_sign_it_is_kept():
    grads = {"w": np.abs(ROWS[0]), "b": -np.abs(ROWS[3, :, 0])}
    drop = jax.jit(graddrop)
    out = drop(grads, key=jax.random.key(0))
    assert_close(out["w"], grads["w"].sum(axis=0))
    assert_close(out["b"], grads["b"].sum())
    zero = drop(np.zeros((2, 3), np.float32), key=jax.random.key(0))
    assert np.all(zero == 0)


def test_sign_dropout_keeps_one_sign_in_proportion_to_how_much_of_it_there_is():
    rows = np.array([[3.0], [-1.0]], np.float32)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: graddrop(rows, key=key)))(keys))
    assert set(np.unique(drawn)) == {-1.0, 3.0}
    assert np.mean(drawn == 3.0) == pytest.approx(0.75, abs=0.03)
    leaked = jax.jit(graddrop)(rows, key=jax.random.key(0), leak=1.0)
    assert leaked == 2


def gradvac_oracle(rows, aims, orders, beta):
    """The paper's loops."""
    rows, aims = rows.astype(float), aims.astype(float).copy()
    norm, total = np.linalg.norm, 0
    for i, order in enumerate(orders):
        mine = rows[i].copy()
        for j in order:
            if i != j:
                rho, aim = mine @ rows[j] / norm(mine) / norm(rows[j]), aims[i, j]
                if rho < aim:
                    more = aim * np.sqrt(1 - rho**2) - rho * np.sqrt(1 - aim**2)
                    mine = mine + norm(mine) * more / norm(rows[j]) / np.sqrt(1 - aim**2) * rows[j]
                aims[i, j] = (1 - beta) * aim + beta * rho
        total = total + mine
    return total, aims


def test_gradient_vaccine_is_the_paper_s_loops_and_carries_its_averages_through_scan():
    key = jax.random.key(5)
    keys = jax.random.split(key, 3)
    orders = [np.asarray(jax.random.permutation(k, 3)) for k in jax.random.split(key, 3)]
    aims = np.array([[0, 0.3, -0.2], [0.1, 0, 0.5], [0.6, 0.2, 0]], np.float32)
    step = jax.jit(gradvac)
    for rows in ROWS:
        got, after = step(rows, aims, key=key, beta=0.25)
        total, expected = gradvac_oracle(rows, aims, orders, 0.25)
        assert_close(got, total, 2e-5)
        off = ~np.eye(3, dtype=bool)
        assert_close(after[off], expected[off], 2e-5)
    run = lambda aims: jax.lax.scan(lambda s, k: gradvac(ROWS[0], s, key=k)[::-1], aims, keys)
    scanned, _ = jax.jit(run)(aims)
    assert scanned.dtype == np.float32


def test_gradient_vaccine_that_aims_at_right_angles_is_pcgrad():
    rows = ROWS[2, :2]
    got, _ = jax.jit(gradvac)(rows, np.zeros((2, 2), np.float32), key=jax.random.key(0))
    assert_close(got, jax.jit(pcgrad)(rows))


def test_zero_identical_and_opposite_gradients_end_in_no_nan():
    g = ROWS[0, 0]
    rows = np.stack([[g, 0 * g], [0 * g, 0 * g], [g, g], [g, -g], [g, -0.2 * g]])
    for surgery in COMBINED:
        found = np.asarray(jax.jit(jax.vmap(surgery))(rows))
        assert np.all(np.isfinite(found)), surgery.__name__
        assert np.all(found[1] == 0)
        if surgery is mgda:
            assert_close(found[2], g)
            assert np.abs(found[4]).max() < 1e-5 * np.abs(g).max()
    vaccinate = lambda r: gradvac(r, jnp.zeros((2, 2)), key=jax.random.key(0))
    got, _ = jax.jit(jax.vmap(vaccinate))(rows)
    assert np.all(np.isfinite(got))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: mgda(np.ones(()), iterations=3),
            ValueError,
            "mgda: grads: expected arrays with on",
        ),
        (lambda: graddrop({}, key=jax.random.key(0)), ValueError, "graddrop: grads: expected"),
        (lambda: nash_mtl(ROWS[0], iterations=0), ValueError, "nash_mtl: iterations: expected"),
        (
            lambda: gradvac(ROWS[0], np.zeros((2, 2)), key=jax.random.key(0)),
            ValueError,
            r"gradvac: state: expected shape \(3, 3\)",
        ),
        (
            lambda: smooth_tchebycheff(LOSSES, reference=np.ones(2)),
            ValueError,
            "smooth_tchebycheff: reference: expected shape",
        ),
    ],
    ids=["scalar", "none", "iterations", "state", "reference"],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
