"""Transport of samples and histograms, and Sinkhorn's algorithm: limits, masses, plans, memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from jaxloss import checked
from jaxloss._core.sinkhorn import check_iterations, log_scaled, log_sinkhorn
from jaxloss.losses.transport import (
    sinkhorn_divergence,
    sliced_wasserstein,
    wasserstein_1d,
    wasserstein_1d_from_probs,
)

GENERATOR = np.random.default_rng(0)
NUMBERS = GENERATOR.standard_normal((2, 7)).astype(np.float32)
POINTS = GENERATOR.standard_normal((6, 2)).astype(np.float32)
OTHERS = 1 + GENERATOR.standard_normal((5, 2)).astype(np.float32)
scaled_logs = jax.jit(log_sinkhorn, static_argnames=("iterations", "axis_name"))
FLOATS = arrays(np.float32, 7, elements=st.floats(-100, 100, width=16))


# In one dimension


@given(x=FLOATS, y=FLOATS, shift=st.integers(-9, 9))
@settings(max_examples=25, deadline=None)
def test_a_shifted_sample_is_as_far_as_the_shift_and_order_is_of_no_matter(
    x: Any, y: Any, shift: int
) -> None:
    for p in (1, 2, 3):
        value = wasserstein_1d(x[::-1], x + shift, p=p)
        np.testing.assert_allclose(value, abs(shift) ** p, rtol=1e-4, atol=1e-4)
    there = wasserstein_1d(x, y)
    assert there == wasserstein_1d(y, x) == wasserstein_1d(x[::-1], y)
    np.testing.assert_allclose(there, np.abs(np.sort(x) - np.sort(y)).mean(), rtol=1e-5)


def test_the_gradient_goes_to_the_entry_of_the_same_rank() -> None:
    x, y = NUMBERS
    for p in (1, 2, 1.5):
        slopes = jax.jit(jax.grad(lambda x, y, p=p: wasserstein_1d(x, y, p=p), (0, 1)))
        gradient = jax.device_get(slopes(x, y))
        gap = np.sort(x).astype(float) - np.sort(y)
        slope = p * np.abs(gap) ** (p - 1) * np.sign(gap) / 7
        np.testing.assert_allclose(gradient[0][np.argsort(x)], slope, rtol=1e-5)
        np.testing.assert_allclose(gradient[1][np.argsort(y)], -slope, rtol=1e-5)


def test_equal_samples_and_ties_have_no_gradient() -> None:
    x = np.float32([2, 2, -1, -0.0, 0.0])
    for p in (1, 1.5, 2, np.float32(1.5)):
        call = lambda x, y, p=p: wasserstein_1d(x, y, p=p)
        value, gradient = jax.jit(jax.value_and_grad(call, (0, 1)))(x, x[::-1].copy())
        np.testing.assert_array_equal([value, *np.ravel(gradient)], 0)


def test_hidden_entries_leave_both_samples() -> None:
    x, y = NUMBERS
    where = np.arange(7) % 3 != 1
    bad = lambda a, fill: np.where(where, a, np.float32(fill))
    for p in (1, 2.5):
        both = jax.jit(jax.value_and_grad(partial(wasserstein_1d, p=p)))
        value, gradient = jax.device_get(both(bad(x, np.nan), bad(y, -np.inf), where=where))
        expected, kept = both(x[where], y[where])
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient[where], kept, rtol=1e-6)
        np.testing.assert_array_equal(gradient[~where], 0)
    nothing = np.zeros_like(where)
    assert wasserstein_1d(x, y, where=nothing) == 0


def test_histograms_are_as_far_as_the_samples_they_count() -> None:
    places = GENERATOR.integers(0, 6, (2, 20))
    x, y = (np.bincount(row, minlength=6) / np.float32(20) for row in places)
    value = wasserstein_1d_from_probs(x, y, bin_width=0.5)
    np.testing.assert_allclose(value, wasserstein_1d(*np.float32(places / 2)), rtol=1e-6)


def test_what_rounding_leaves_in_the_last_bin_does_not_turn_the_gradient() -> None:
    probs, target = np.float32([0.1, 0.2, 0.7]), np.float32([0.2, 0.2, 0.6])
    slope = jax.jit(jax.grad(wasserstein_1d_from_probs))
    gradient = slope(probs, target)
    np.testing.assert_allclose(gradient, [-2, -1, 0])
    same = slope(probs, probs)
    np.testing.assert_array_equal(same, 0)
    with pytest.raises(ValueError, match="wasserstein_1d_from_probs: probs: expected values of"):
        checked(wasserstein_1d_from_probs)(-probs, target)


# Sliced


def test_in_one_dimension_every_slice_is_the_whole() -> None:
    x, y = NUMBERS[..., None]
    for p in (1, 2):
        value = sliced_wasserstein(x, y, key=jax.random.key(1), projections=5, p=p)
        np.testing.assert_allclose(value, wasserstein_1d(*NUMBERS, p=p), rtol=1e-6)


def test_the_square_of_a_shift_is_shared_by_all_dimensions() -> None:
    """The mean of (theta . c)^2 over directions is |c|^2 / D."""
    x, c = GENERATOR.standard_normal((20, 4)), np.array([1.0, -2, 0, 2])
    value = sliced_wasserstein(
        np.float32(x), np.float32(x + c), key=jax.random.key(0), projections=4096
    )
    np.testing.assert_allclose(value, c @ c / 4, rtol=0.05)


def test_old_and_new_keys_give_the_same_directions_and_the_batch_shares_them() -> None:
    x, y = np.stack([POINTS, POINTS]), np.stack([POINTS[::-1] + 1] * 2)
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    units = sliced_wasserstein(x, y, key=new, reduction="none")
    np.testing.assert_array_equal(units, sliced_wasserstein(x, y, key=old, reduction="none"))
    assert units[0] == units[1]
    other = sliced_wasserstein(x, y, key=jax.random.key(4), reduction="none")
    assert not np.array_equal(units, other)
    for projections in (0, 1.5, True):
        with pytest.raises((ValueError, TypeError), match="sliced_wasserstein: projections"):
            sliced_wasserstein(x, y, key=new, projections=projections)


# Sinkhorn


def test_a_small_epsilon_tends_to_the_best_assignment_a_large_one_to_the_gap_of_means() -> None:
    x, y = POINTS[:5], OTHERS
    costs = cdist(x, y, "sqeuclidean")
    exact = costs[linear_sum_assignment(costs)].mean()
    value = sinkhorn_divergence(x, y, epsilon=1e-3, iterations=400)
    np.testing.assert_allclose(value, exact, rtol=2e-3)
    gap = np.mean(x, 0) - np.mean(y, 0)
    value = sinkhorn_divergence(x, y, epsilon=3e3, iterations=400)
    np.testing.assert_allclose(value, gap @ gap, rtol=1e-2)


def test_it_is_nothing_at_equality_in_any_order_and_symmetric() -> None:
    call = partial(sinkhorn_divergence, epsilon=0.5, iterations=200)
    both = jax.jit(jax.value_and_grad(call, (0, 1)))
    value, gradient = both(POINTS, POINTS[::-1].copy())
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    np.testing.assert_allclose(call(POINTS, OTHERS), call(OTHERS, POINTS), rtol=1e-4)
    assert both(POINTS, POINTS + np.float32(0.1))[0] > 0


def test_points_of_no_mass_and_hidden_points_do_not_exist() -> None:
    where = np.arange(6) != 2
    mass = np.float32([2, 4, 0, 2, 2, 6])
    bad = np.where(where[:, None], POINTS, np.nan)
    call = partial(sinkhorn_divergence, epsilon=1.0, iterations=30)
    both = jax.jit(jax.value_and_grad(call))
    value, gradient = jax.device_get(both(bad, OTHERS, where=where))
    expected, kept = both(POINTS[where], OTHERS)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[where], kept, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(gradient[2], 0)
    value, gradient = jax.device_get(both(bad, OTHERS, x_mass=mass))
    np.testing.assert_array_equal(gradient[2], 0)
    repeated = np.repeat(POINTS, np.int32(mass / 2), axis=0)
    np.testing.assert_allclose(value, call(repeated, OTHERS), rtol=1e-5)
    np.testing.assert_allclose(value, both(POINTS, OTHERS, x_mass=10 * mass)[0], rtol=1e-5)
    assert both(POINTS, OTHERS, x_mass=0 * mass)[0] == 0


def by_unrolling(x: Any, y: Any, epsilon: Any, a: Any, b: Any, iterations: int) -> Any:
    """The definition with plain iterations that are differentiated."""

    def between(x: Any, y: Any, a: Any, b: Any) -> Any:
        cost = jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)

        def step(pair: Any, _: None) -> Any:
            f, _ = pair
            g = -epsilon * jax.nn.logsumexp((f[:, None] - cost) / epsilon, axis=0, b=a[:, None])
            f = -epsilon * jax.nn.logsumexp((g[None] - cost) / epsilon, axis=1, b=b[None])
            return (f, g), None

        (f, g), _ = jax.lax.scan(step, (0 * a, 0 * b), length=iterations)
        return a @ f + b @ g

    a, b = a / jnp.sum(a), b / jnp.sum(b)
    return between(x, y, a, b) - 0.5 * (between(x, x, a, a) + between(y, y, b, b))


def test_the_derivative_of_the_plan_is_that_of_converged_iterations() -> None:
    with jax.enable_x64(True):
        x, y = np.float64(POINTS), np.float64(OTHERS)
        a, b = GENERATOR.uniform(0.5, 2, 6), GENERATOR.uniform(0.5, 2, 5)
        inputs = x, y, np.float64(2.0), a, b
        moved = jax.tree.map(lambda v: GENERATOR.standard_normal(np.shape(v)), inputs)
        iterations = 60

        def ours(x: Any, y: Any, epsilon: Any, a: Any, b: Any) -> Any:
            options = dict(epsilon=epsilon, iterations=2 * iterations)
            return sinkhorn_divergence(x, y, x_mass=a, y_mass=b, **options)

        def all_of(f: Any) -> Any:
            return jax.jvp(jax.value_and_grad(f, (0, 1, 2, 3, 4)), inputs, moved)

        got = jax.jit(all_of, static_argnums=0)(ours)
        plain = partial(by_unrolling, iterations=iterations)
        expected = jax.jit(all_of, static_argnums=0)(plain)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9), got, expected)


def test_a_cost_may_be_any_function_of_the_right_shape() -> None:
    def street(x: Any, y: Any) -> Any:
        return jnp.sum(jnp.abs(x[:, None] - y[None]), axis=-1)

    run = partial(sinkhorn_divergence, cost=street, epsilon=1e-3, iterations=400)
    value = jax.jit(run)(POINTS[:5], OTHERS)
    costs = cdist(POINTS[:5], OTHERS, "cityblock")
    np.testing.assert_allclose(value, costs[linear_sum_assignment(costs)].mean(), rtol=5e-3)
    with pytest.raises(ValueError, match=r"sinkhorn_divergence: cost: expected shape \(6, 5\)"):
        sinkhorn_divergence(POINTS, OTHERS, cost=lambda x, y: jnp.zeros(3))


def test_options_of_transport_are_checked() -> None:
    for iterations in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="sinkhorn_divergence: iterations: expected"):
            sinkhorn_divergence(POINTS, OTHERS, iterations=iterations)
    with pytest.raises(ValueError, match="sinkhorn_divergence: epsilon: expected a number above"):
        checked(sinkhorn_divergence)(POINTS, OTHERS, epsilon=0.0)
    with pytest.raises(ValueError, match="sinkhorn_divergence: y_mass: expected values of at"):
        checked(sinkhorn_divergence)(POINTS, OTHERS, y_mass=-np.ones(5))
    with pytest.raises(ValueError, match="iterations: expected an integer of at least 2"):
        check_iterations(1, least=2)


def test_memory_holds_a_few_matrices_however_many_iterations() -> None:
    shapes = (512, 40), (384, 40)
    samples = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def temporaries(iterations: int) -> int:
        call = partial(sinkhorn_divergence, iterations=iterations)
        found = jax.jit(jax.value_and_grad(call, (0, 1))).lower(*samples).compile()
        return found.memory_analysis().temp_size_in_bytes

    few, many = temporaries(10), temporaries(1000)
    assert many < 1.1 * few
    assert many < 12 * 4 * 512 * 512  # the iterations alone would be 3000


# The scaling itself


def test_scaled_matrices_have_rows_and_nearly_columns_of_sum_one() -> None:
    scores = GENERATOR.normal(0, 3, (2, 5, 5)).astype(np.float32)
    found = np.exp(scaled_logs(scores, 200))
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.sum(-2), 1, rtol=1e-3)
    wide = np.exp(scaled_logs(scores[:, :3], 200))
    np.testing.assert_allclose(wide.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(wide.sum(-2), 3 / 5, rtol=1e-3)


def test_hidden_rows_and_columns_and_impossible_entries_have_no_part() -> None:
    scores = GENERATOR.standard_normal((4, 5)).astype(np.float32)
    rows, columns = np.array([True, True, False, True]), np.arange(5) != 1
    bad = np.where(rows[:, None] & columns, scores, np.nan)
    bad[0, 2] = -np.inf
    found = np.asarray(scaled_logs(bad, 9, rows=rows, columns=columns))
    kept = scaled_logs(bad[rows][:, columns], 9)
    np.testing.assert_allclose(found[rows][:, columns], kept, rtol=1e-5, atol=1e-6)
    assert np.all(found[2] == -np.inf)
    assert np.all(found[:, 1] == -np.inf)
    assert found[0, 2] == -np.inf
    total = lambda x: jnp.sum(jnp.exp(scaled_logs(x, 9, rows=rows, columns=columns)) ** 2)
    gradient = np.asarray(jax.jit(jax.grad(total))(bad))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2], 0)
    empty = np.asarray(scaled_logs(scores, 9, rows=np.zeros(4, bool), columns=columns))
    assert np.all(empty == -np.inf)


def test_extreme_entries_are_scaled_without_overflow() -> None:
    scores = np.float32(1e4) * GENERATOR.standard_normal((4, 4)).astype(np.float32)

    def call(x: Any) -> Any:
        found = jnp.exp(log_sinkhorn(x, 50))
        return jnp.sum(found * np.arange(4)), found

    (value, found), gradient = jax.jit(jax.value_and_grad(call, has_aux=True))(scores)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(np.sum(found, axis=1), 1, rtol=1e-5)


def test_derivatives_through_the_iterations_are_those_of_plain_ones() -> None:
    def plain(x: Any) -> Any:
        for _ in range(6):
            x = x - jax.nn.logsumexp(x, axis=0, keepdims=True)
            x = x - jax.nn.logsumexp(x, axis=1, keepdims=True)
        return x

    def all_of(f: Any) -> Any:
        total = lambda x: jnp.sum(f(x) ** 2)
        gradient = jax.grad(total)
        slope, curve = jax.jvp(gradient, (scores,), (moved,))
        return f(scores), slope, curve

    with jax.enable_x64(True):
        scores, moved = GENERATOR.standard_normal((2, 4, 4))
        run = jax.jit(lambda: [all_of(partial(log_sinkhorn, iterations=6)), all_of(plain)])
        got, expected = run()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), got, expected)


def test_rows_split_over_devices_are_scaled_as_one_matrix() -> None:
    scores = GENERATOR.standard_normal((6, 3)).astype(np.float32)
    rows = np.arange(6) != 4
    call = partial(scaled_logs, iterations=4)
    split = jax.jit(jax.vmap(lambda x, r: call(x, rows=r, axis_name="data"), axis_name="data"))
    found = split(scores.reshape(3, 2, 3), rows.reshape(3, 2)).reshape(6, 3)
    np.testing.assert_allclose(found, call(scores, rows=rows), rtol=1e-5, atol=1e-6)


def test_annealed_scaling_reaches_a_steep_limit_sooner() -> None:
    cost = cdist(np.float64(POINTS[:5]), np.float64(OTHERS), "sqeuclidean").astype(np.float32)
    mass = np.full(5, -np.log(5), np.float32)
    misses = []
    for anneal in (False, True):
        scale = jax.jit(partial(log_scaled, iterations=60, anneal=anneal))
        scaled = jax.device_get(scale(-cost / 0.02, mass, mass))
        misses.append(np.abs(np.exp(scaled.matrix).sum(0) - 0.2).max())
        parts = (mass + scaled.f)[:, None] + (mass + scaled.g)[None] - cost / 0.02
        np.testing.assert_allclose(scaled.matrix, parts, rtol=1e-4, atol=1e-3)
    assert misses[1] < misses[0]
