"""Routing losses: loads counted by hand, padding, dropped slots, devices, 16-bit logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxloss import checked
from jaxloss.losses.routing import expert_bias_update, load_balancing_loss, router_z_loss

EXPERTS, SLOTS = 4, 2


def draw(shape: tuple[int, ...] = (3, 8)) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(0)
    probs = generator.dirichlet(np.ones(EXPERTS), shape).astype(np.float32)
    index = np.argsort(-probs, axis=-1)[..., :SLOTS].astype(np.int32)
    index[generator.random(index.shape) < 0.2] = -1  # dropped
    return probs, index, generator.random(shape) < 0.7


def loop(probs: Any, index: Any, where: Any) -> float:
    """One set of tokens, one at a time."""
    counts, mass = np.zeros(EXPERTS), np.zeros(EXPERTS)
    for p, slots, kept in zip(probs.astype(np.float64), index, where, strict=True):
        if kept:
            mass += p
            for slot in slots:
                if slot >= 0:
                    counts[slot] += 1
    return EXPERTS * np.sum(counts / max(counts.sum(), 1) * mass / max(where.sum(), 1))


def test_balancing_counts_kept_tokens_and_slots_only() -> None:
    probs, index, where = draw()
    expected = [loop(*row) for row in zip(probs, index, where, strict=True)]
    garbage = np.where(where[..., None], probs, np.nan), np.where(where[..., None], index, 99)
    got = load_balancing_loss(*garbage, where=where, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    whole = load_balancing_loss(
        probs.reshape(-1, EXPERTS), index.reshape(-1, SLOTS), where=where.reshape(-1)
    )
    flat = loop(probs.reshape(-1, EXPERTS), index.reshape(-1, SLOTS), where.reshape(-1))
    np.testing.assert_allclose(whole, flat, rtol=1e-6)


def test_even_routing_costs_one_for_any_number_of_slots() -> None:
    probs = jnp.full((EXPERTS, EXPERTS), 1 / EXPERTS)
    every = np.arange(EXPERTS)
    for slots in range(1, EXPERTS + 1):
        index = (every[:, None] + np.arange(slots)) % EXPERTS
        np.testing.assert_allclose(load_balancing_loss(probs, index), 1, rtol=1e-6)
    one = jax.nn.one_hot(jnp.zeros(5, int), EXPERTS)
    assert load_balancing_loss(one, np.zeros((5, 1), int)) == EXPERTS


def test_sets_without_tokens_leave_the_mean_and_nothing_at_all_costs_zero() -> None:
    probs, index, where = draw()
    where[1] = False
    got = load_balancing_loss(probs, index, where=where)
    expected = np.mean([loop(probs[i], index[i], where[i]) for i in (0, 2)])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    nothing = lambda p: load_balancing_loss(p, index, where=np.zeros_like(where))
    value, gradient = jax.value_and_grad(nothing)(np.full_like(probs, np.nan))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    assert load_balancing_loss(probs, np.full_like(index, -1)) == 0  # every slot dropped


def test_shares_have_no_gradient_and_means_have_that_of_a_constant() -> None:
    probs, index, _ = draw((8,))
    counts = np.sum(index[..., None] == np.arange(EXPERTS), axis=(0, 1))
    gradient = jax.grad(load_balancing_loss)(probs, index)
    row = EXPERTS * counts / counts.sum() / 8
    np.testing.assert_allclose(gradient, np.tile(row, (8, 1)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_an_unknown_expert_makes_its_set_nan(dtype: Any) -> None:
    probs = jnp.full((2, 3, EXPERTS), 0.25)
    index = np.array([[[0], [1], [2]], [[0], [1], [EXPERTS]]]).astype(dtype)
    units = load_balancing_loss(probs, index, reduction="none")
    np.testing.assert_array_equal(np.isnan(units), [False, True])
    with pytest.raises(ValueError, match=r"expert_index: expected values in \[-1, 4\), got 1"):
        checked(load_balancing_loss)(probs, index)


def test_shares_and_means_are_those_of_all_devices_before_they_are_multiplied() -> None:
    probs, index, where = draw((8,))
    where[:2] = False  # a device without a token
    expected = loop(probs, index, where)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")

    def mapped(probs: Any, index: Any, where: Any) -> Any:
        call = lambda p, i, w: load_balancing_loss(p, i, where=w, axis_name="data")
        run = jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 3, out_specs=PartitionSpec())
        return run(probs, index, where)

    value, gradient = jax.jit(jax.value_and_grad(mapped))(probs, index, where)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    whole = jax.grad(lambda p: load_balancing_loss(p, index, where=where))(probs)
    np.testing.assert_allclose(gradient, whole, rtol=1e-6)
    parts = [loop(*(x[i : i + 2] for x in (probs, index, where))) for i in range(2, 8, 2)]
    assert abs(np.mean(parts) - expected) > 0.01  # what a mean of products would have given


def test_router_logits_of_sixteen_bits_are_summed_in_float32() -> None:
    logits = 1000 + 8 * np.random.default_rng(0).standard_normal((5, EXPERTS))
    for dtype in (jnp.bfloat16, jnp.float16):
        rounded = jnp.asarray(logits, dtype)
        wide = np.asarray(rounded, np.float64)
        lse = np.log(np.sum(np.exp(wide - 1000), axis=-1)) + 1000
        units = router_z_loss(rounded, reduction="none")
        assert units.dtype == jnp.float32
        np.testing.assert_allclose(units, lse**2, rtol=5e-7)


def test_the_bias_moves_towards_the_mean_load() -> None:
    _, index, where = draw()
    counts = np.sum(
        (index[..., None] == np.arange(EXPERTS)) & where[..., None, None], axis=(0, 1, 2)
    )
    bias = np.linspace(-1, 1, EXPERTS).astype(np.float32)
    got = expert_bias_update(bias, index, rate=0.25, where=where)
    np.testing.assert_array_equal(got, bias + 0.25 * np.sign(counts.mean() - counts))
    even = expert_bias_update(bias, np.arange(EXPERTS)[:, None])
    np.testing.assert_array_equal(even, bias)
    gradient = jax.grad(lambda b: jnp.sum(expert_bias_update(b, index)))(bias)
    np.testing.assert_array_equal(gradient, 0)


def test_the_bias_counts_the_tokens_of_all_devices() -> None:
    _, index, _ = draw((4, 2))
    bias = np.zeros(EXPERTS, np.float32)
    local = lambda i: expert_bias_update(bias, i, axis_name="data")
    got = jax.vmap(local, axis_name="data")(index)
    np.testing.assert_array_equal(got, np.tile(expert_bias_update(bias, index), (4, 1)))


def test_a_bias_repeated_over_steps_evens_out_the_loads() -> None:
    scores = np.random.default_rng(0).standard_normal((64, EXPERTS)) + np.arange(EXPERTS)
    choose = lambda bias: jax.lax.top_k(scores + bias, 1)[1]

    def step(bias: Any, _: Any) -> Any:
        return expert_bias_update(bias, choose(bias), rate=0.05), None

    bias, _ = jax.lax.scan(step, jnp.zeros(EXPERTS), length=200)
    loads = np.bincount(np.asarray(choose(bias))[:, 0], minlength=EXPERTS)
    assert loads.max() <= 24
    assert np.bincount(np.asarray(choose(0 * bias))[:, 0], minlength=EXPERTS).max() > 32


def test_shapes_are_named_in_errors() -> None:
    probs = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"expert_index: expected shape \(2, 1\), got \(3, 1\)"):
        load_balancing_loss(probs, jnp.zeros((3, 1), int))
    with pytest.raises(TypeError, match="expert_index: expected an integer dtype"):
        load_balancing_loss(probs, probs)
    with pytest.raises(ValueError, match=r"bias: expected shape \(experts,\)"):
        expert_bias_update(probs, jnp.zeros((3, 1), int))
