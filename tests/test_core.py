"""The decorator, the run-time checks, the safe numerics and the sharding helpers."""

import inspect
import pydoc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxloss
from jaxloss._core import numerics, sharding
from jaxloss._core.checks import check_axis, check_float, check_last, check_min_rank, naming
from jaxloss._core.compiled import compiled
from jaxloss._core.labels import poison

X, Y = jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0])


def test_an_eager_call_is_one_compiled_dispatch() -> None:
    jaxpr = jax.make_jaxpr(jaxloss.log_cosh)(X, Y)
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["jit"]


def test_signature_help_and_name_are_those_of_the_plain_function() -> None:
    loss = jaxloss.absolute_percentage_error
    assert list(inspect.signature(loss).parameters)[:3] == ["pred", "target", "floor"]
    assert inspect.isfunction(loss)
    assert loss.__module__ == "jaxloss.losses.regression"
    assert "Absolute error as a fraction" in pydoc.plain(pydoc.render_doc(loss))
    assert inspect.getsourcefile(inspect.unwrap(loss)).endswith("regression.py")


def test_a_new_number_does_not_compile_again_and_may_be_traced() -> None:
    loss = jaxloss.absolute_percentage_error
    loss(X, X, floor=0.1)
    before = loss.jitted._cache_size()
    loss(X, X, floor=0.2)
    assert loss.jitted._cache_size() == before
    assert jax.jit(lambda f: loss(X, Y, floor=f))(jnp.array(0.5)) == 3.0


def test_a_static_option_that_cannot_be_hashed_is_named() -> None:
    @compiled("axis")
    def loss(pred, *, axis=-1, reduction="mean"):
        return jnp.sum(pred, axis=axis)

    with pytest.raises(TypeError, match=r"loss: axis: expected a static option, got list"):
        loss(X, axis=[0])


def test_a_reduction_may_be_a_lambda_a_jitted_function_or_a_pytree() -> None:
    total = lambda values, weights: jnp.sum(values * weights)
    for reduction in (total, jax.jit(total), jaxloss.normalized_sum(1)):
        assert jaxloss.squared_error(X, Y, reduction=reduction) == 5


def test_numpy_arrays_python_numbers_and_integer_targets_are_accepted() -> None:
    assert jaxloss.squared_error(3.0, 1) == 4
    assert jaxloss.squared_error(np.array([3.0]), np.array([True])) == 4
    assert isinstance(jaxloss.squared_error(3.0, 1), jax.Array)
    assert not jaxloss.squared_error(3.0, 1).weak_type


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.jit(jax.grad(f))])
def test_a_bad_shape_raises_our_message_eagerly_and_under_jit(wrap) -> None:
    text = r"squared_error: target: expected shape \(4, 1\), got \(4,\)"
    with pytest.raises(ValueError, match=text):
        wrap(jaxloss.squared_error)(jnp.ones((4, 1)), jnp.ones(4))


def test_a_bad_shape_raises_our_message_under_vmap() -> None:
    with pytest.raises(
        ValueError, match=r"squared_error: target: expected shape \(4,\), got \(3,\)"
    ):
        jax.vmap(jaxloss.squared_error)(jnp.ones((2, 4)), jnp.ones((2, 3)))


def test_disabling_the_asserts_of_chex_changes_no_result() -> None:
    before = jaxloss.squared_error(X, Y)
    chex.disable_asserts()
    try:
        jax.clear_caches()
        assert jaxloss.squared_error(X, Y) == before
    finally:
        chex.enable_asserts()
        jax.clear_caches()


def test_checks_name_the_outermost_loss() -> None:
    with (
        naming("outer"),
        naming("inner"),
        pytest.raises(TypeError, match=r"^outer: pred: expected a"),
    ):
        check_float(pred=jnp.ones(2, int))


def test_each_check_says_what_was_expected() -> None:
    with pytest.raises(ValueError, match="boxes: expected a last axis of size 4, got shape"):
        check_last(4, boxes=X)
    with pytest.raises(ValueError, match="logits: expected at least 1 axis, got shape"):
        check_min_rank(1, logits=jnp.ones(()))
    with pytest.raises(ValueError, match="axis: expected an axis of an array of rank 2, got 2"):
        check_axis(2, 2)
    with pytest.raises(TypeError, match="axis: expected an integer, got True"):
        check_axis(True, 2)
    assert check_axis(-1, 2) == 1


def test_checked_raises_for_a_value_that_tracing_cannot_see() -> None:
    loss = jaxloss.checked(jaxloss.squared_logarithmic_error)
    assert loss(X, Y) == jaxloss.squared_logarithmic_error(X, Y)
    text = "squared_logarithmic_error: pred: expected values of at least -1, got 2 that are not"
    with pytest.raises(ValueError, match=text):
        loss(-2 * X, Y)


def test_checked_sees_through_jit_grad_scan_and_vmap_and_leaves_plain_calls_alone() -> None:
    jitted = jax.jit(jaxloss.squared_logarithmic_error)
    assert jnp.isnan(jitted(-2 * X, Y))
    rows = lambda p, t: jax.lax.scan(lambda c, x: (c + jitted(*x), None), 0.0, (p, t))[0]
    for function in (jitted, jax.value_and_grad(jitted), rows, jax.vmap(jitted)):
        with pytest.raises(ValueError, match="expected values of at least -1"):
            jaxloss.checked(function)(-2 * X, Y)
    assert jnp.isnan(jitted(-2 * X, Y))


def test_checked_ignores_hidden_values() -> None:
    loss = jaxloss.checked(jaxloss.squared_logarithmic_error)
    assert loss(jnp.array([-2.0, 0.0]), Y, where=jnp.array([False, True])) == 0


@settings(max_examples=50, deadline=None)
@given(st.floats(-(2.0**30), 2.0**30, width=32))
def test_safe_numerics_equal_the_plain_ones_away_from_the_edges(x) -> None:
    x = jnp.float32(x)
    assert numerics.absolute(x) == abs(x)
    if x > 0:
        np.testing.assert_allclose(numerics.safe_sqrt(x), jnp.sqrt(x), rtol=1e-6)
        np.testing.assert_allclose(numerics.safe_log(x), jnp.log(x), rtol=1e-6)
        np.testing.assert_allclose(numerics.xlogx(x), x * jnp.log(x), rtol=1e-6)
        np.testing.assert_allclose(numerics.safe_div(1.0, x), 1 / x, rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (numerics.absolute, 0),
        (numerics.safe_sqrt, 0),
        (numerics.safe_log, -jnp.inf),
        (numerics.xlogx, 0),
        (lambda x: numerics.safe_div(1.0, x), 0),
        (lambda x: numerics.safe_mul(x, jnp.float32(jnp.inf)), 0),
        (lambda x: numerics.safe_norm(x[None]), 0),
    ],
)
def test_safe_numerics_have_zero_gradient_and_curvature_at_zero(function, value) -> None:
    zero = jnp.zeros(())
    assert function(zero) == value
    assert jax.grad(function)(zero) == 0
    assert jax.grad(jax.grad(function))(zero) == 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_safe_norm_neither_overflows_nor_underflows(scale) -> None:
    x = jnp.array([3.0, 4.0]) * scale
    np.testing.assert_allclose(numerics.safe_norm(x), 5 * scale, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(numerics.safe_norm)(x), [0.6, 0.8], rtol=1e-6)
    assert jnp.isnan(numerics.safe_norm(jnp.array([jnp.nan, 1.0])))


@pytest.mark.parametrize("spec", [PartitionSpec("data", None), PartitionSpec(None, "data")])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_pick_needs_no_gather_whichever_axis_is_sharded(spec, kind) -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(kind,))
    values, labels = jnp.arange(32.0).reshape(4, 8), jnp.array([7, 0, 3, 3])
    with jax.set_mesh(mesh):
        put = jax.device_put(values, NamedSharding(mesh, spec))
        index = jax.device_put(labels, NamedSharding(mesh, PartitionSpec(spec[0])))
        lowered = jax.jit(sharding.pick).lower(put, index)
        np.testing.assert_array_equal(jax.jit(sharding.pick)(put, index), [7, 8, 19, 27])
    assert "all-gather" not in lowered.compile().as_text()


def test_unshard_replicates_the_named_axes_of_an_explicit_mesh_only() -> None:
    mesh = jax.make_mesh(
        (2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Explicit,)
    )
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((2, 2)), NamedSharding(mesh, PartitionSpec("data", None)))
        assert sharding.unshard(x, 1).sharding.spec == PartitionSpec("data", None)
        assert sharding.unshard(x, 0).sharding.spec == PartitionSpec(None, None)
    assert sharding.unshard(X) is X


def test_a_poisoned_row_stays_nan_through_an_exponential() -> None:
    ok = jnp.array([True, False, False])
    function = lambda z: jnp.exp(poison(z, ok[:, None]))
    slope = jax.grad(lambda z: function(z).sum())
    for rows in jax.jit(lambda z: (function(z), slope(z)))(jnp.ones((3, 2))):
        np.testing.assert_array_equal(np.isnan(rows), [[False] * 2, [True] * 2, [True] * 2])
