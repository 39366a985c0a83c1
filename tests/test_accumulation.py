"""Sums over microbatches and devices: exactly the whole batch, whatever the masks leave."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxloss
from jaxloss import accumulate, accumulate_by_weight, sum_and_weight, value_and_grad_global

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 5)).astype(np.float32)
Y = RNG.normal(size=16).astype(np.float32)
WHERE = np.arange(16) % 4 >= np.array([3, 2, 0, 0]).repeat(4)  # 1, 2, 4 and 4 of each four rows
PARAMS = dict(w=RNG.normal(size=5).astype(np.float32), b=np.float32(0.3))
WEIGHTS = {"plain": optax.linear_schedule(0.0, 1.0, 10)}
BATCH = (X, Y, WHERE)


def masked(params, x, y, where):
    """One term, hidden in part."""
    return jaxloss.squared_error(
        x @ params["w"] + params["b"], y, where=where, reduction=sum_and_weight
    )


def two_terms(params, x, y, where):
    """Terms of different denominators."""
    pred = x @ params["w"] + params["b"]
    plain = jaxloss.huber_loss(pred, y, reduction=sum_and_weight)
    return {"masked": masked(params, x, y, where), "plain": plain}


def whole(fn, weights=None, step=None):
    def objective(params):
        found = fn(params, *BATCH)
        named = found if isinstance(found, dict) else {"loss": found}
        return jaxloss.weighted_sum(named, weights=weights, step=step)

    return jax.device_get(jax.jit(jax.value_and_grad(objective, has_aux=True))(PARAMS))


def assert_close(got, expected, tolerance=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-6), got, expected
    )


@pytest.mark.parametrize("microbatches", [1, 4, 16])
@pytest.mark.parametrize(
    ("fn", "weights"), [(masked, None), (two_terms, WEIGHTS)], ids=["one", "two"]
)
def test_microbatches_give_the_value_terms_and_gradient_of_the_whole_batch(
    fn, weights, microbatches
):
    step = jax.jit(accumulate(fn, microbatches=microbatches, weights=weights, step=3))
    assert_close(step(PARAMS, *BATCH), whole(fn, weights, 3))


def test_a_mean_of_the_microbatches_means_would_be_far_off():
    (_, terms), exact = jax.jit(accumulate(masked, microbatches=4))(PARAMS, *BATCH)
    rows = [tuple(a[4 * i : 4 * i + 4] for a in BATCH) for i in range(4)]
    mean = lambda p: sum(masked(p, *part).mean() for part in rows) / 4
    naive = jax.jit(jax.grad(mean))(PARAMS)
    off = optax.tree.norm(optax.tree.sub(naive, exact)) / optax.tree.norm(exact)
    assert off > 0.1
    assert terms["loss"] == pytest.approx(float(masked(PARAMS, *BATCH).mean()), rel=1e-6)


def test_weights_that_sum_to_less_than_one_are_not_rounded_up_to_one():
    weights = np.full(16, 0.006, np.float32)
    fn = lambda p, x, y, w: jaxloss.squared_error(
        x @ p["w"] + p["b"], y, weights=w, reduction=sum_and_weight
    )
    (total, _), grads = jax.jit(accumulate(fn, microbatches=4))(PARAMS, X, Y, weights)
    plain = lambda p: jaxloss.squared_error(X @ p["w"] + p["b"], Y)
    assert_close((total, grads), jax.jit(jax.value_and_grad(plain))(PARAMS))


def test_a_batch_that_is_hidden_wholly_costs_nothing_and_has_no_gradient():
    hidden = (np.full_like(X, np.nan), Y, np.zeros(16, bool))
    masked_inputs = lambda p, x, y, where: masked(p, jnp.where(where[:, None], x, 0), y, where)
    (total, terms), grads = jax.jit(accumulate(masked_inputs, microbatches=4))(PARAMS, *hidden)
    assert total == terms["loss"] == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads))


def test_gradients_come_in_the_dtype_of_the_parameters_and_are_added_up_in_float32():
    fn = lambda p, x: jaxloss.SumAndWeight(p.astype(jnp.float32) * jnp.sum(x), jnp.sum(x))
    step = jax.jit(accumulate(fn, microbatches=512))
    _, grad = step(np.array(1, jnp.bfloat16), np.ones(512, np.float32))
    assert grad.dtype == jnp.bfloat16
    assert grad == 1  # in bfloat16, 256 + 1 is 256: it would be a half


def test_a_term_of_static_weight_zero_is_reported_and_left_out_even_as_nan():
    broken = lambda p, *batch: {
        **two_terms(p, *batch),
        "lost": jaxloss.SumAndWeight(jnp.sum(p["w"]) * jnp.nan, jnp.ones(())),
    }
    step = jax.jit(accumulate(broken, microbatches=4, weights={"lost": 0}))
    (total, terms), grads = step(PARAMS, *BATCH)
    assert np.isnan(terms["lost"])
    (expected, _), exact = whole(two_terms)
    assert_close((total, grads), (expected, exact))


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_in_shard_map_every_device_gets_the_global_value_and_gradient(check, microbatches):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = accumulate(
        two_terms, microbatches=microbatches, weights=WEIGHTS, step=3, axis_name="data"
    )
    specs = (P(), P("data"), P("data"), P("data"))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)
    assert_close(jax.jit(mapped)(PARAMS, *BATCH), whole(two_terms, WEIGHTS, 3))


@pytest.mark.parametrize("over", [jax.vmap, jax.pmap])
def test_under_vmap_and_pmap_with_a_named_axis_too(over):
    step = value_and_grad_global(two_terms, "data", weights=WEIGHTS, step=3)
    parts = [a.reshape(8, 2, *a.shape[1:]) for a in BATCH]
    mapped = over(step, in_axes=(None, 0, 0, 0), axis_name="data")
    found = jax.device_get((jax.jit(mapped) if over is jax.vmap else mapped)(PARAMS, *parts))
    expected = whole(two_terms, WEIGHTS, 3)
    for device in (0, 7):
        assert_close(jax.tree.map(lambda x, i=device: x[i], found), expected)


def test_a_schedule_compiles_once_for_all_steps():
    @jax.jit
    def train(params, step):
        return accumulate(two_terms, microbatches=4, weights=WEIGHTS, step=step)(params, *BATCH)

    (first, _), _ = train(PARAMS, 0)
    (last, _), _ = train(PARAMS, 10)
    assert train._cache_size() == 1
    assert last > first


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(microbatches=5), ValueError, "accumulate: microbatches: expected a divisor of 16"),
        (dict(microbatches=0), ValueError, "accumulate: microbatches: expected an integer"),
        (dict(fn=lambda p, x, *_: jnp.mean(x @ p["w"])), TypeError, "reduction=sum_and_weight"),
        (dict(batch=(X, Y[:4], WHERE)), ValueError, "accumulate: batch: expected arrays with one"),
    ],
    ids=["no divisor", "none", "a mean", "two sizes"],
)
def test_bad_input_is_named(change, error, text):
    options = dict(fn=masked, microbatches=4, batch=BATCH) | change
    with pytest.raises(error, match=text):
        accumulate(options["fn"], microbatches=options["microbatches"])(PARAMS, *options["batch"])


@jax.jit
def of_part(params, *part):
    """Weight of a microbatch, and gradient of its mean."""
    grads = jax.grad(lambda p: masked(p, *part).mean())(params)
    return masked(params, *part).weight, grads


def by_microbatch(transformation, weighted):
    """Updates of the fourth of four microbatches of unequal weight."""
    state, update = jax.jit(transformation.init)(PARAMS), jax.jit(transformation.update)
    for i in range(4):
        part = tuple(a[4 * i : 4 * i + 4] for a in BATCH)
        weight, grads = of_part(PARAMS, *part)
        extra = dict(weight=weight) if weighted else {}
        updates, state = update(grads, state, PARAMS, **extra)
        if i < 3:
            assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    return updates, state


def test_an_optimiser_called_by_microbatch_steps_as_by_the_whole_batch():
    _, exact = whole(masked)
    adam = optax.adam(0.1)
    expected, _ = adam.update(exact, adam.init(PARAMS), PARAMS)
    updates, state = by_microbatch(accumulate_by_weight(adam, every=4), weighted=True)
    assert_close(updates, expected, 1e-5)
    assert state.calls == state.weight == 0


def test_multi_steps_of_optax_are_far_off_where_microbatches_are_unequally_full():
    _, exact = whole(masked)
    plain, _ = by_microbatch(optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation(), False)
    ours, _ = by_microbatch(accumulate_by_weight(optax.sgd(1.0), every=4), weighted=True)
    off = lambda u: optax.tree.norm(optax.tree.add(u, exact)) / optax.tree.norm(exact)
    assert off(ours) < 1e-6
    assert off(plain) > 0.1


def test_a_microbatch_of_weight_zero_adds_nothing_though_its_gradient_be_nan():
    transformation = accumulate_by_weight(optax.sgd(1.0), every=2)
    update = jax.jit(transformation.update)
    state = transformation.init(jnp.zeros(2))
    _, state = update(jnp.array([1.0, 2.0]), state, weight=3.0)
    updates, state = update(jnp.full(2, jnp.nan), state, weight=0.0)
    np.testing.assert_array_equal(updates, [-1.0, -2.0])


def test_a_round_of_weight_zero_leaves_the_optimiser_untouched():
    transformation = accumulate_by_weight(optax.adam(1.0), every=1)
    state = transformation.init(jnp.zeros(2))
    updates, after = transformation.update(jnp.full(2, jnp.nan), state, weight=0.0)
    assert np.all(updates == 0)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_extra_arguments_reach_the_optimiser_inside():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    transformation = accumulate_by_weight(optax.chain(optax.sgd(1.0), plateau), every=1)
    state = transformation.init(jnp.zeros(1))
    for _ in range(4):
        updates, state = transformation.update(
            jnp.ones(1), state, jnp.zeros(1), weight=2.0, value=1.0
        )
    assert updates[0] > -1.0  # the plateau was seen


def test_the_number_of_calls_per_step_must_be_a_positive_integer():
    with pytest.raises(ValueError, match="accumulate_by_weight: every: expected an integer"):
        accumulate_by_weight(optax.sgd(1.0), every=0)
