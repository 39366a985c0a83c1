"""Penalties on pytrees of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloss
from jaxloss import all_of, any_of, matrices_only, not_, path_matches
from parity.peers import require_peer

RNG = np.random.default_rng(0)
PARAMS = {
    "encoder": [
        {"kernel": RNG.normal(size=(3, 4)).astype(np.float32), "bias": np.ones(4, np.float32)}
    ],
    "scale": np.float32(2.0),
    "steps": np.int32(7),
    "nothing": None,
}
KERNEL = PARAMS["encoder"][0]["kernel"].astype(np.float64)
EVERY = np.concatenate([KERNEL.ravel(), np.ones(4), [2.0]])
PENALTIES = {
    "l1": (jaxloss.l1_penalty, np.abs(EVERY).sum()),
    "l2": (jaxloss.l2_penalty, (EVERY**2).sum() / 2),
    "elastic net": (jaxloss.elastic_net_penalty, np.abs(EVERY).sum() / 2 + (EVERY**2).sum() / 4),
    "lp": (lambda p, **k: jaxloss.lp_penalty(p, p=1.5, **k), (np.abs(EVERY) ** 1.5).sum()),
    "group lasso": (
        jaxloss.group_lasso_penalty,
        np.linalg.norm(KERNEL, axis=0).sum() + 6.0,
    ),
    "max norm": (
        lambda p, **k: jaxloss.max_norm_penalty(p, limit=0.5, **k),
        (np.maximum(np.linalg.norm(KERNEL, axis=0) - 0.5, 0) ** 2).sum() + 4 * 0.25 + 1.5**2,
    ),
}
each = pytest.mark.parametrize(("penalty", "expected"), PENALTIES.values(), ids=PENALTIES)


@each
def test_a_penalty_adds_up_over_all_leaves_that_hold_floats(penalty, expected):
    value = penalty(PARAMS)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(expected, rel=1e-6)


@each
def test_a_penalty_of_no_leaf_is_zero(penalty, expected):
    assert penalty({"steps": np.int32(7), "nothing": None}) == 0
    assert penalty(PARAMS, select=lambda path, leaf: False) == 0


@each
def test_zeros_have_no_gradient_and_no_nan(penalty, expected):
    grads = jax.jit(jax.grad(penalty))({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)})
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads))


@each
def test_gradients_have_the_dtype_of_their_leaf(penalty, expected):
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.float16)}
    grads = jax.grad(penalty)(params)
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda p: p.dtype, params)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (matrices_only, np.abs(KERNEL).sum()),
        (path_matches("bias$"), 4),
        (path_matches(r"encoder/0/"), np.abs(KERNEL).sum() + 4),
        (not_(matrices_only), 6),
        (any_of(matrices_only, path_matches("scale")), np.abs(KERNEL).sum() + 2),
        (all_of(not_(matrices_only), path_matches("encoder")), 4),
    ],
    ids=["matrices", "bias", "path", "not", "any", "all"],
)
def test_selectors_pick_leaves_by_path_and_shape(select, expected):
    assert float(jaxloss.l1_penalty(PARAMS, select=select)) == pytest.approx(expected, rel=1e-6)


def test_paths_are_the_same_words_in_flax_state_and_in_dicts():
    require_peer("flax")
    from flax import nnx

    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(layer, nnx.Param)
    plain = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    for select in (path_matches("kernel"), path_matches("bias"), matrices_only):
        assert jaxloss.l2_penalty(state, select=select) == jaxloss.l2_penalty(plain, select=select)


def test_under_sgd_half_the_squares_are_weight_decay_and_under_adam_they_are_not():
    params = {"small": jnp.array([0.01]), "large": jnp.array([10.0])}
    grads = jax.grad(lambda p: 0.1 * jaxloss.l2_penalty(p))(params)
    decayed, _ = optax.add_decayed_weights(0.1).update(
        jax.tree.map(jnp.zeros_like, params), optax.EmptyState(), params
    )
    assert grads == decayed
    adam = optax.scale_by_adam()
    steps, _ = adam.update(grads, adam.init(params), params)
    np.testing.assert_allclose([steps["small"][0], steps["large"][0]], 1.0, rtol=1e-4)


def test_a_million_small_bfloat16_parameters_are_added_up_in_float32():
    small = jnp.full(10**6, 0.01, jnp.bfloat16)
    assert float(jaxloss.l1_penalty(small)) == pytest.approx(1e6 * float(small[0]), rel=1e-4)


def test_the_elastic_net_runs_from_ridge_to_lasso():
    ends = [float(jaxloss.elastic_net_penalty(PARAMS, l1_ratio=r)) for r in (0.0, 1.0)]
    assert ends == pytest.approx(
        [float(jaxloss.l2_penalty(PARAMS)), float(jaxloss.l1_penalty(PARAMS))]
    )


def test_groups_lie_along_the_named_axis():
    value = jaxloss.group_lasso_penalty(KERNEL.astype(np.float32), axis=-1)
    assert float(value) == pytest.approx(np.linalg.norm(KERNEL, axis=1).sum(), rel=1e-6)
    with pytest.raises(ValueError, match="group_lasso_penalty: axis: expected an axis"):
        jaxloss.group_lasso_penalty(KERNEL, axis=2)


def test_the_proximal_penalty_pulls_back_by_precision():
    anchor = jax.tree.map(lambda p: p if p.ndim == 0 else 0 * p, PARAMS)
    precision = jax.tree.map(lambda p: 0 * p + 3, PARAMS)
    penalty = lambda p, a, f: jaxloss.proximal_penalty(p, a, precision=f)
    moved = (KERNEL**2).sum() + 4
    assert float(penalty(PARAMS, anchor, precision)) == pytest.approx(1.5 * moved, rel=1e-6)
    assert float(jaxloss.proximal_penalty(PARAMS, anchor)) == pytest.approx(moved / 2, rel=1e-6)
    w = jnp.array([1.0, -2.0])
    grads = jax.grad(penalty, argnums=(0, 1, 2))(w, 0 * w, jnp.array([3.0, 0.5]))
    np.testing.assert_allclose(grads, [[3.0, -1.0], [0.0, 0.0], [0.0, 0.0]])


def test_an_anchor_of_another_structure_or_shape_is_refused():
    with pytest.raises(ValueError, match="proximal_penalty: anchor: expected the structure"):
        jaxloss.proximal_penalty({"w": jnp.ones(2)}, {"v": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"precision: expected shape \(2,\), as in params"):
        jaxloss.proximal_penalty(jnp.ones(2), jnp.ones(2), precision=jnp.ones(3))


def test_a_selector_that_is_no_function_or_no_pattern_is_named():
    with pytest.raises(TypeError, match="l1_penalty: select: expected a function"):
        jaxloss.l1_penalty(PARAMS, select="kernel")
    with pytest.raises(ValueError, match="path_matches: pattern: expected a regular expression"):
        path_matches("(")
