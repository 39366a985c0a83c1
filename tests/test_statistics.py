"""Statistics carried from step to step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloss
from jaxloss import (
    class_counts_init,
    class_counts_update,
    ema_init,
    ema_update,
    ema_value,
    running_mean_init,
    running_mean_update,
)

VALUES = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def averaged(values, **options):
    state = ema_init(values[0])
    for value in values:
        state = ema_update(state, value, **options)
    return state


def test_a_moving_average_is_that_of_optax_with_and_without_its_bias():
    for debias in (True, False):
        peer = optax.ema(0.9, debias=debias)
        state = peer.init(VALUES[0])
        for value in VALUES:
            expected, state = peer.update(value, state)
        got = ema_value(averaged(VALUES, decay=0.9), debias=debias)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_weight_two_is_the_same_value_twice_and_weight_zero_is_exactly_nothing():
    state = averaged(VALUES, decay=0.9)
    twice = ema_update(ema_update(state, VALUES[0], decay=0.9), VALUES[0], decay=0.9)
    weighted = ema_update(state, VALUES[0], decay=0.9, weight=2.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), weighted, twice)
    nothing = jax.jit(ema_update)(state, np.full(3, np.nan, np.float32), weight=0.0)
    jax.tree.map(np.testing.assert_array_equal, nothing, state)
    seen = running_mean_update(running_mean_init((3,)), VALUES[0])
    nothing = jax.jit(running_mean_update)(seen, np.full(3, np.nan, np.float32), weight=0.0)
    jax.tree.map(np.testing.assert_array_equal, nothing, seen)


def test_a_running_mean_over_uneven_batches_is_the_mean_of_the_epoch():
    sizes, state, rows = (1, 7, 3), running_mean_init(), []
    for size in sizes:
        pred = np.random.default_rng(size).normal(size=size).astype(np.float32)
        pair = jaxloss.squared_error(pred, 0 * pred, reduction=jaxloss.sum_and_weight)
        state = running_mean_update(state, pair.mean(), weight=pair.weight)
        rows.append(pred)
    assert float(state.mean) == pytest.approx(np.mean(np.concatenate(rows) ** 2), rel=1e-6)
    assert state.weight == 11


@pytest.mark.parametrize("update", [ema_update, running_mean_update])
def test_devices_put_their_values_together_by_weight(update):
    weights = jnp.array([0.0, 1.0, 3.0])
    values = jnp.array([jnp.nan, 4.0, 8.0])
    state = running_mean_init()
    on = lambda v, w: update(state, v, weight=w, axis_name="data")
    found = jax.vmap(on, axis_name="data")(values, weights)
    mean = found.mean if update is running_mean_update else found.mean / found.weight
    np.testing.assert_allclose(mean, 7.0, rtol=1e-6)


def test_values_carry_no_gradient_and_states_pass_through_a_scan():
    slope = jax.grad(lambda x: jnp.sum(ema_value(ema_update(ema_init(x), x))))(VALUES[0])
    assert np.all(slope == 0)
    step = lambda state, x: (ema_update(state, x, decay=0.9), None)
    state, _ = jax.jit(lambda: jax.lax.scan(step, ema_init(VALUES[0]), VALUES))()
    expected = averaged(VALUES, decay=0.9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, expected)


def test_a_bfloat16_value_is_averaged_in_float32_over_trees():
    tree = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros((), jnp.float16)}
    state = ema_update(ema_init(tree), tree, decay=0.999)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(ema_value(state)["a"], 1.0, rtol=1e-5)


def test_labels_are_counted_hidden_ones_are_not_and_bad_ones_poison():
    labels = np.array([[0, 2, 2], [1, -1, 7]])
    where = np.array([[True, True, True], [True, False, False]])
    counts = jax.jit(class_counts_update)(class_counts_init(3), labels, where=where)
    np.testing.assert_array_equal(counts, [1, 1, 2])
    np.testing.assert_array_equal(class_counts_update(counts, labels[:, :1]), [2, 2, 2])
    assert np.all(np.isnan(class_counts_update(class_counts_init(3), labels)))
    parts = jax.vmap(lambda part: class_counts_update(counts, part, axis_name="d"), axis_name="d")
    np.testing.assert_array_equal(parts(np.array([[0, 1], [2, 2]])), [[2, 2, 4]] * 2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: ema_update(ema_init(VALUES), VALUES[0]),
            ValueError,
            "ema_update: value: expected sh",
        ),
        (
            lambda: ema_update(ema_init({"a": 1.0}), 1.0),
            ValueError,
            "value: expected the structure",
        ),
        (lambda: ema_init(np.arange(3)), TypeError, "ema_init: value: expected a floating dtype"),
        (
            lambda: class_counts_init(0),
            ValueError,
            "class_counts_init: num_classes: expected an int",
        ),
        (
            lambda: class_counts_update(class_counts_init(3), VALUES),
            TypeError,
            "class_counts_update: labels: expected an integer dtype",
        ),
        (
            lambda: class_counts_update(
                class_counts_init(3), np.zeros(4, int), where=np.ones(3, bool)
            ),
            ValueError,
            r"where: expected shape \(4,\)",
        ),
    ],
    ids=["shape", "structure", "integers", "no classes", "float labels", "where"],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
