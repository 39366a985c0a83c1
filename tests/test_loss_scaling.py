"""Scaling of float16 losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxloss.training.loss_scaling import loss_scale_init, scale_loss, unscale_grads
from parity.peers import require_peer

INPUTS = np.array([1.0, 2.0, 3.0, 1e3, 0.5, 0.25, 2.0, 1.0], np.float32)  # the fourth overflows


def loss(w, x):
    """In float16 on the way, as activations are."""
    return (w.astype(jnp.float16) * x.astype(jnp.float16)).astype(jnp.float32) ** 2


def ours(trace, **options):
    """Gradient, finiteness and scale at each step."""

    def step(state, x):
        grads = jax.grad(lambda w: scale_loss(loss(w, x), state))(jnp.float32(0.5))
        grads, finite, state = unscale_grads(grads, state, **options)
        return state, (grads, finite, state.scale)

    return jax.lax.scan(step, loss_scale_init(scale=1024.0), trace)


def test_the_scale_and_the_gradients_are_those_of_flax_over_a_trace_with_an_overflow():
    require_peer("flax")
    from flax.training.dynamic_scale import DynamicScale

    options = dict(growth=4.0, backoff=0.25, interval=2, minimum=2.0)
    peer = DynamicScale(
        growth_factor=4.0, backoff_factor=0.25, growth_interval=2, scale=1024.0, minimum_scale=2.0
    )
    state, (grads, finite, scales) = jax.jit(lambda t: ours(t, **options))(INPUTS)
    seen = []
    for x, grad, ok, scale in zip(INPUTS, grads, finite, scales, strict=True):
        peer, is_finite, _, expected = peer.value_and_grad(lambda w, x=x: loss(w, x))(
            jnp.float32(0.5)
        )
        assert ok == is_finite
        assert scale == peer.scale
        np.testing.assert_array_equal(grad, expected)
        seen.append(bool(ok))
    assert state.finite_steps == peer.fin_steps
    assert not all(seen)
    assert sum(seen) >= 5


def test_a_small_gradient_survives_float16_with_the_scale_and_not_without():
    w = jnp.array(1.0, jnp.float16)
    small = lambda w: w * jnp.float16(1e-3) * jnp.float16(1e-5)
    objective = lambda w: small(w).astype(jnp.float32)
    assert jax.grad(objective)(w) == 0
    state = loss_scale_init(scale=1024.0)
    scaled = jax.grad(lambda w: scale_loss(objective(w), state))(w)
    grads, finite, _ = unscale_grads(scaled, state)
    assert grads.dtype == jnp.float32
    np.testing.assert_allclose(grads, 1e-8, rtol=1e-2)  # float16 has few digits at 1e-5
    assert finite


def test_a_float16_loss_is_scaled_in_float32():
    scaled = scale_loss(jnp.array(3.0, jnp.float16), loss_scale_init())
    assert scaled.dtype == jnp.float32
    assert scaled == 3 * 2.0**16


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_entry_anywhere_lowers_the_scale_down_to_its_minimum(bad):
    grads = {"w": np.ones((2, 3), np.float32), "b": np.array([1.0, bad], np.float16)}
    state = loss_scale_init(scale=4.0)
    scales = []
    for _ in range(3):
        _, finite, state = unscale_grads(grads, state, minimum=1.5)
        assert not finite
        scales.append(float(state.scale))
    assert scales == [2.0, 1.5, 1.5]
    assert state.finite_steps == 0


def test_the_scale_grows_after_an_interval_of_finite_steps_and_stops_at_the_largest_float():
    state, scales = loss_scale_init(scale=2.0**126), []
    for _ in range(8):
        _, _, state = unscale_grads(jnp.ones(()), state, interval=1)
        scales.append(float(state.scale))
    largest = float(jnp.finfo(jnp.float32).max)
    assert scales == [2.0**126, 2.0**127, 2.0**127, *[largest] * 5]


def test_the_scale_carries_no_gradient_and_a_training_step_skips_where_it_should():
    slope = jax.grad(lambda s: scale_loss(jnp.float32(2.0), loss_scale_init(scale=s)))(4.0)
    assert slope == 0

    @jax.jit
    def step(w, state, x):
        grad = jax.grad(lambda w: scale_loss(loss(w, x), state))(w)
        grad, finite, state = unscale_grads(grad, state)
        return jnp.where(finite, w - 0.1 * grad, w), state

    w, state = step(jnp.float32(0.5), loss_scale_init(), 1e3)
    assert w == 0.5
    assert state.scale == 2.0**15


def test_the_state_can_be_donated_and_compiles_once():
    step = jax.jit(lambda state, g: unscale_grads(g, state)[1:], donate_argnums=0)
    state = loss_scale_init()
    for value in (1.0, np.inf, 1.0):
        _, state = step(state, np.float32(value))
    assert state.scale == 2.0**15
    assert step._cache_size() == 1


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_an_overflow_on_one_device_is_known_on_all_of_them(check):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = lambda g, state: unscale_grads(g, state, axis_name="data")
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P(), P()), check_vma=check
    )
    grads = np.arange(8, dtype=np.float32)
    grads[5] = np.inf
    out, finite, state = jax.jit(mapped)(grads, loss_scale_init(scale=8.0))
    assert not finite
    assert state.scale == 4
    np.testing.assert_array_equal(out, grads / 8)
    over = jax.vmap(step, in_axes=(0, None), axis_name="data")
    _, finite, state = over(grads, loss_scale_init(scale=8.0))
    assert not np.any(finite)
    assert np.all(state.scale == 4)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda s: scale_loss(np.ones(2), s), ValueError, "scale_loss: loss: expected a scalar"),
        (lambda s: scale_loss(1, s), TypeError, "scale_loss: loss: expected a floating dtype"),
        (
            lambda s: unscale_grads({"w": np.arange(2)}, s),
            TypeError,
            r"unscale_grads: grads\['w'\]: expected a floating dtype",
        ),
        (
            lambda s: unscale_grads({}, s, growth=np.ones(2)),
            ValueError,
            "growth: expected a scalar",
        ),
        (lambda _: loss_scale_init(scale=np.ones(2)), ValueError, "loss_scale_init: scale: exp"),
    ],
    ids=["array", "integer", "integers", "growth", "scale"],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(loss_scale_init())
