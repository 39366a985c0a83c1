"""Short training runs on real digits under every framework and optimiser, with our losses."""

import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloss
from jaxloss import softmax_cross_entropy
from jaxloss.training.glue import as_keras, as_value_fn
from jaxloss.training.per_example import per_example_grads
from parity.peers import require_peer

KEY = jax.random.key(0)


@cache
def digits():
    """The first 512 digits of scikit-learn, and every eighth one hidden."""
    require_peer("sklearn")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    where = np.arange(512) % 8 != 0
    return (images[:512] / 16).astype(np.float32), labels[:512].astype(np.int32), where


def linear(key=KEY):
    return {"kernel": 0.01 * jax.random.normal(key, (64, 10)), "bias": jnp.zeros(10)}


def logits_of(params, images):
    return images @ params["kernel"] + params["bias"]


def objective(params, images, labels, where=None):
    return jaxloss.weighted_sum(
        {
            "main": softmax_cross_entropy(logits_of(params, images), labels, where=where),
            "l2": jaxloss.l2_penalty(params, select=jaxloss.matrices_only),
        },
        weights={"l2": 1e-3},
    )


value_fn = as_value_fn(objective)


def train(tx, steps, params=None):
    """Full batches with the usual loop of optax."""
    params = linear() if params is None else params
    batch = digits()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        (total, terms), grads = jax.value_and_grad(objective, has_aux=True)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, total, terms

    losses = []
    for _ in range(steps):
        params, state, total, terms = step(params, state)
        losses.append(float(total))
    assert set(terms) == {"main", "l2"}
    assert step._cache_size() == 1
    return params, losses


def accuracy(params):
    images, labels, _ = digits()
    return np.mean(np.argmax(logits_of(params, images), -1) == labels)


def test_plain_optax_learns_digits():
    params, losses = train(optax.adam(0.03), 30)
    assert losses[0] == pytest.approx(np.log(10), rel=0.1)
    assert losses[-1] < 0.3 * losses[0]
    assert accuracy(params) > 0.9


def test_flax_nnx_learns_digits():
    require_peer("flax")
    from flax import nnx

    images, labels, where = digits()
    model = nnx.Sequential(
        nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 10, rngs=nnx.Rngs(1))
    )
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jaxloss.weighted_sum(
                {
                    "main": softmax_cross_entropy(model(images), labels, where=where),
                    "l2": jaxloss.l2_penalty(
                        nnx.state(model, nnx.Param), select=jaxloss.path_matches("kernel")
                    ),
                },
                weights={"l2": 1e-4},
            )

        (total, terms), grads = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, grads)
        return total, terms

    losses = [float(step(model, optimizer)[0]) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]


def test_flax_linen_learns_digits():
    require_peer("flax")
    from flax import linen
    from flax.training.train_state import TrainState

    images, labels, where = digits()
    model = linen.Dense(10)
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(KEY, images[:1])["params"], tx=optax.adam(0.03)
    )

    @jax.jit
    def step(state):
        def loss(params):
            logits = state.apply_fn({"params": params}, images)
            return softmax_cross_entropy(logits, labels, where=where)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(30):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]


def test_equinox_learns_digits():
    eqx = require_peer("equinox")
    images, labels, where = digits()
    model = eqx.nn.MLP(64, 10, 32, 1, key=KEY)
    tx = optax.adam(0.01)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        def loss(model):
            main = softmax_cross_entropy(jax.vmap(model)(images), labels, where=where)
            penalty = jaxloss.l2_penalty(model, select=jaxloss.path_matches("weight"))
            return jaxloss.weighted_sum({"main": main, "l2": penalty}, weights={"l2": 1e-4})

        (total, _), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state, total

    losses = []
    for _ in range(30):
        model, state, total = step(model, state)
        losses.append(float(total))
    assert losses[-1] < 0.3 * losses[0]


def test_haiku_learns_digits():
    hk = require_peer("haiku")
    images, labels, where = digits()
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 10])(x)))
    params = network.init(KEY, images[:1])
    tx = optax.adam(0.01)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss = lambda p: softmax_cross_entropy(network.apply(p, images), labels, where=where)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.3 * losses[0]


def test_keras_learns_digits_with_sample_weights_that_hide_examples():
    keras = require_peer("keras")
    images, labels, where = digits()
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((64,)), keras.layers.Dense(10)])
    model.compile(
        optimizer=keras.optimizers.Adam(0.03),
        loss=as_keras(softmax_cross_entropy, integer_labels=True),
    )
    fit = dict(batch_size=128, epochs=8, verbose=0, sample_weight=where.astype(np.float32))
    history = model.fit(images, labels[:, None], **fit).history["loss"]
    assert history[-1] < 0.4 * history[0]
    weights = np.random.default_rng(0).uniform(0, 2, 512).astype(np.float32)
    found = model.evaluate(images, labels, sample_weight=weights, batch_size=512, verbose=0)
    ours = softmax_cross_entropy(model.predict(images, verbose=0), labels, weights=weights)
    assert found == pytest.approx(float(ours), rel=1e-5)


def test_sample_weights_of_keras_are_our_weights_whatever_the_shape_of_the_units():
    """Keras' own mean_with_sample_weight divides by the weights of examples, not of their parts."""
    require_peer("keras")
    generator = np.random.default_rng(0)
    pred, target = generator.normal(size=(2, 4, 3)).astype(np.float32)
    weights = generator.uniform(0.5, 2, 4).astype(np.float32)
    parts = generator.uniform(0.5, 2, (4, 3)).astype(np.float32)
    wide = np.broadcast_to(weights[:, None], (4, 3))
    for loss in (jaxloss.squared_error, jaxloss.huber_loss):
        theirs = as_keras(loss)
        assert float(theirs(target, pred)) == pytest.approx(float(loss(pred, target)), rel=1e-6)
        for given, ours in ((weights, wide), (weights[:, None], wide), (parts, parts)):
            expected = float(loss(pred, target, weights=ours))
            assert float(theirs(target, pred, sample_weight=given)) == pytest.approx(
                expected, rel=1e-6
            )
    rows = as_keras(jaxloss.cosine_distance)
    expected = float(jaxloss.cosine_distance(pred, target, weights=weights))
    for given in (weights, weights[:, None]):
        assert float(rows(target, pred, sample_weight=given)) == pytest.approx(expected, rel=1e-5)


def test_masks_of_keras_layers_hide_what_they_hide():
    keras = require_peer("keras")
    model = keras.Sequential(
        [keras.layers.Input((3, 2)), keras.layers.Masking(-1.0), keras.layers.Dense(2)]
    )
    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    x[1, 2], x[3, 0] = -1, -1
    where = np.any(x != -1, axis=-1)
    target = np.zeros((4, 3, 2), np.float32)
    found = float(as_keras(jaxloss.squared_error)(target, model(x)))
    pred = np.asarray(model(x))
    ours = jaxloss.squared_error(pred, target, where=np.broadcast_to(where[..., None], pred.shape))
    assert found == pytest.approx(float(ours), rel=1e-5)


def test_labels_of_keras_are_floats_and_one_with_a_fraction_is_nan():
    require_peer("keras")
    loss = as_keras(softmax_cross_entropy, integer_labels=True, label_smoothing=0.1)
    logits = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    labels = np.array([0, 3, 1])
    expected = float(softmax_cross_entropy(logits, labels, label_smoothing=0.1))
    for given in (labels, labels[:, None], labels.astype(np.float32)):
        assert float(loss(given, logits)) == pytest.approx(expected, rel=1e-6)
    units = loss.call(np.array([0.0, 2.5, 1.0], np.float32), logits)
    assert np.isnan(units).tolist() == [False, True, False]
    assert np.isnan(loss.call(np.array([0.0, np.nan, 9.0], np.float32), logits)).tolist() == [
        False,
        True,
        True,
    ]


def cubic(pred, target, *, scale=1.0, reduction="mean"):
    return jaxloss.reduce(scale * jnp.abs(pred - target) ** 3, reduction=reduction)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own
def test_a_saved_keras_model_keeps_its_loss_and_options(tmp_path):
    keras = require_peer("keras")
    keras.saving.register_keras_serializable(package="tests")(cubic)
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    labels = np.array([0, 1, 1, 0, 1, 0])
    weights = np.array([0.3, 2.0], np.float32)
    smooth = dict(class_weights=weights, label_smoothing=0.2)
    for loss, target in (
        (as_keras(softmax_cross_entropy, integer_labels=True, **smooth), labels[:, None]),
        (as_keras(jaxloss.huber_loss, delta=0.3, name="clipped"), x[:, :2]),
        (as_keras(cubic, scale=0.5), x[:, :2]),
    ):
        model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
        model.compile(optimizer="sgd", loss=loss)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.loss.name == loss.name
        again, before = (m.evaluate(x, target, verbose=0) for m in (loaded, model))
        assert again == before == pytest.approx(float(loss(target, model(x))))
    model.compile(optimizer="sgd", loss=as_keras(partial(cubic, scale=2.0), name="half"))
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="as_keras: half: expected a function"):
        keras.models.load_model(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras", compile=False)


def test_a_loss_without_units_along_the_batch_is_no_loss_for_keras():
    require_peer("keras")
    whole = lambda pred, target, reduction: jnp.mean((pred - target) ** 2)
    with pytest.raises(ValueError, match="as_keras: whole: expected units along a batch of 4"):
        as_keras(whole, name="whole")(np.ones((4, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="as_keras: options: expected sample_weight"):
        as_keras(jaxloss.squared_error, weights=np.ones(4))


def test_lbfgs_with_its_line_search_learns_digits_in_a_few_steps():
    images, labels, where = digits()
    tx = optax.lbfgs()
    params = linear()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        batch = dict(images=images, labels=labels, where=where)
        value, grads = optax.value_and_grad_from_state(value_fn)(params, state=state, **batch)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=value_fn, **batch
        )
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(12):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.2 * losses[0]
    assert np.all(np.diff(losses) <= 1e-6)


def test_a_value_function_keeps_the_signature_and_takes_every_kind_of_objective():
    import inspect

    assert inspect.signature(value_fn) == inspect.signature(objective)
    pair = as_value_fn(lambda x: jaxloss.SumAndWeight(jnp.sum(x), jnp.float32(4)))
    assert pair(jnp.ones(2)) == 0.5
    assert as_value_fn(lambda x: x * 2)(3.0) == 6
    value, grad = jax.value_and_grad(value_fn)(linear(), *digits())
    (total, _), expected = jax.value_and_grad(objective, has_aux=True)(linear(), *digits())
    assert value == total
    jax.tree.map(np.testing.assert_array_equal, grad, expected)
    with pytest.raises(ValueError, match=r"as_value_fn: fn: expected a scalar, got shape \(2,\)"):
        as_value_fn(lambda x: x)(jnp.ones(2))


def example_loss(params, image, label, kept):
    return softmax_cross_entropy(logits_of(params, image), label, where=kept)


@pytest.mark.parametrize("chunk_size", [None, 7, 64])
def test_gradients_of_examples_are_those_of_a_loop_and_their_mean_is_the_gradient(chunk_size):
    batch = tuple(x[:20] for x in digits())
    grads = per_example_grads(example_loss, chunk_size=chunk_size)(linear(), *batch)
    for i in (0, 3, 19):
        alone = jax.grad(example_loss)(linear(), *(x[i] for x in batch))
        jax.tree.map(
            lambda g, a, i=i: np.testing.assert_allclose(g[i], a, rtol=1e-4, atol=1e-6),
            grads,
            alone,
        )
    assert np.all(np.asarray(grads["kernel"])[~batch[2]] == 0)
    whole = jax.grad(
        lambda p: softmax_cross_entropy(logits_of(p, batch[0]), batch[1], where=batch[2])
    )
    mean = jax.tree.map(lambda g: jnp.sum(g, axis=0) / batch[2].sum(), grads)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6), mean, whole(linear())
    )


def test_what_is_no_loss_of_one_example_is_named():
    batch = digits()
    with pytest.raises(
        ValueError, match="per_example_grads: fn: expected a scalar for one example"
    ):
        per_example_grads(lambda p, x: x)(linear(), batch[0])
    with pytest.raises(ValueError, match="batch: expected arrays with one leading axis"):
        per_example_grads(example_loss)(linear(), batch[0], batch[1][:3], batch[2])
    with pytest.raises(ValueError, match="per_example_grads: chunk_size: expected an integer"):
        per_example_grads(example_loss, chunk_size=0)


def test_differential_privacy_learns_digits_from_gradients_of_examples():
    private = optax.contrib.differentially_private_aggregate(1.0, 0.05, 0)
    tx = optax.chain(private, optax.sgd(2.0))
    params, batch = linear(), digits()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = per_example_grads(example_loss, chunk_size=128)(params, *batch)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    before = float(value_fn(params, *batch))
    for _ in range(40):
        params, state = step(params, state)
    assert float(value_fn(params, *batch)) < 0.5 * before


def test_sharpness_aware_minimisation_learns_digits():
    tx = optax.contrib.sam(optax.sgd(0.5), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))
    _, losses = train(tx, 60)
    assert losses[-1] < 0.5 * losses[0]


def test_the_total_drives_a_schedule_that_waits_for_plateaus():
    tx = optax.chain(
        optax.sgd(0.5), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, atol=1e9)
    )
    params, batch = linear(), digits()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        (total, _), grads = jax.value_and_grad(objective, has_aux=True)(params, *batch)
        updates, state = tx.update(grads, state, params, value=total)
        return optax.apply_updates(params, updates), state, total

    losses = []
    for _ in range(20):
        params, state, total = step(params, state)
        losses.append(float(total))
    assert losses[-1] < losses[0]
    assert float(optax.tree.get(state, "scale")) < 1


def test_importing_jaxloss_imports_no_framework():
    script = """
import sys
import jaxloss
frameworks = {"flax", "keras", "equinox", "haiku", "torch", "tensorflow", "sklearn", "matplotlib"}
found = frameworks & {name.split(".")[0] for name in sys.modules}
assert not found, found
"""
    subprocess.run([sys.executable, "-c", script], check=True)
