"""Feature losses: pytrees, functions of the caller, zero vectors, sizes and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses.perceptual import (
    dists_loss,
    feature_loss,
    gram_style_loss,
    lpips_loss,
    perceptual_loss,
)


def draw(*shape, count=2, seed=0):
    g = np.random.default_rng(seed)
    return tuple(g.standard_normal(shape).astype(np.float32) for _ in range(count))


def layers(seed):
    (a, b) = draw(2, 4, 3, seed=seed)
    return {"first": a, "rest": (b[..., :2], a[:, :2])}


def test_layers_of_a_pytree_add_up_by_their_weights():
    pred, target = layers(0), layers(1)
    weights = {"first": 0.5, "rest": (2.0, jnp.float32(3))}
    mean = lambda p, t: ((p - t).astype(float) ** 2).mean((1, 2))
    expected = 0.5 * mean(pred["first"], target["first"])
    expected = expected + 2 * mean(pred["rest"][0], target["rest"][0])
    expected = expected + 3 * mean(pred["rest"][1], target["rest"][1])
    got = feature_loss(pred, target, layer_weights=weights, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    slope = jax.grad(lambda w: feature_loss(pred, target, layer_weights=w))(weights)
    np.testing.assert_allclose(slope["first"], mean(pred["first"], target["first"]).mean())


def test_a_mask_hides_whole_images_in_every_layer():
    pred, target = layers(0), layers(1)
    broken = jax.tree.map(lambda x: np.concatenate([np.full_like(x[:1], np.nan), x[1:]]), pred)
    where = np.array([False, True])
    second = [jax.tree.map(lambda x: x[1:], tree) for tree in (pred, target)]
    for loss in (feature_loss, gram_style_loss):
        got, slope = jax.value_and_grad(loss)(broken, target, where=where)
        np.testing.assert_allclose(got, loss(*second), rtol=1e-6)
        assert all(np.all(leaf[0] == 0) for leaf in jax.tree.leaves(slope))


def test_trees_of_another_shape_are_named_in_the_error():
    pred = layers(0)
    with pytest.raises(TypeError, match="feature_loss: target_features: expected the structure"):
        feature_loss(pred, pred["first"])
    with pytest.raises(TypeError, match="feature_loss: layer_weights: expected the structure"):
        feature_loss(pred, pred, layer_weights=[1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="feature_loss: pred_features: expected an array"):
        feature_loss([], [])
    short = {**pred, "first": pred["first"][:1]}
    with pytest.raises(ValueError, match=r"target_features\['first'\]: expected shape \(2, 4, 3\)"):
        feature_loss(pred, short)
    with pytest.raises(ValueError, match=r"pred_features\['rest'\]\[0\]: expected a batch of 1"):
        feature_loss(short, short)
    with pytest.raises(TypeError, match=r"pred_features\[0\]: expected a floating dtype"):
        feature_loss([np.ones((2, 3), int)], [np.ones((2, 3))])
    with pytest.raises(ValueError, match=r"linear_weights\[0\]: expected shape \(3,\)"):
        lpips_loss([pred["first"]], [pred["first"]], [jnp.ones(2)])


def network(kernel):
    return lambda images: [images @ kernel, jax.nn.relu(images.mean(2) @ kernel)]


def test_parameters_in_the_closure_get_gradients_also_under_jit():
    pred, target = draw(2, 4, 4, 3)
    (kernel,) = draw(3, 5, count=1)

    def objective(kernel):
        return perceptual_loss(pred, target, feature_fn=network(kernel), layer_weights=[1.0, 0.5])

    def plain(kernel):
        return feature_loss(
            network(kernel)(pred), network(kernel)(target), layer_weights=[1.0, 0.5]
        )

    for change in (lambda f: f, jax.jit):
        slope = change(jax.grad(objective))(kernel)
        np.testing.assert_allclose(slope, jax.grad(plain)(kernel), rtol=1e-5)
    assert np.any(slope != 0)


class Network:
    """A network as an object whose parameters change in place: a bound method of equal hash."""

    def __init__(self, gain):
        self.gain = gain

    def features(self, images):
        return self.gain * images


def test_no_cache_keeps_the_parameters_of_the_first_call():
    pred, target = draw(1, 4, 4, 1)
    net = Network(1.0)
    before = perceptual_loss(pred, target, feature_fn=net.features)
    net.gain = 2.0
    after = perceptual_loss(pred, target, feature_fn=net.features)
    np.testing.assert_allclose(after, 4 * before, rtol=1e-6)

    def objective(gain):  # the same bound method sees another tracer in every trace
        net.gain = gain
        return perceptual_loss(pred, target, feature_fn=net.features)

    for _ in range(2):
        np.testing.assert_allclose(jax.jit(objective)(3.0), 9 * before, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(objective)(3.0), 6 * before, rtol=1e-5)
        gains = jnp.array([1.0, 2.0])
        np.testing.assert_allclose(jax.vmap(objective)(gains), gains**2 * before, rtol=1e-5)


def test_a_hidden_image_reaches_the_network_as_zeros():
    pred, target = draw(2, 4, 4, 1)
    pred[0] = np.nan
    seen = []
    loss = perceptual_loss(
        pred,
        target,
        feature_fn=lambda x: (seen.append(np.asarray(x)), x)[1],
        where=np.array([False, True]),
    )
    assert np.isfinite(loss)
    assert all(np.all(x[0] == 0) for x in seen)
    with pytest.raises(ValueError, match=r"perceptual_loss: where: expected shape \(2,\)"):
        perceptual_loss(pred, target, feature_fn=jnp.tanh, where=np.ones((2, 4, 4), bool))


def test_the_network_gets_the_dtype_of_the_images():
    (image,) = draw(1, 4, 4, 1, count=1)
    seen = []
    keep = lambda x: (seen.append(x.dtype), x)[1]
    loss = perceptual_loss(image.astype(jnp.bfloat16), image, feature_fn=keep)
    assert seen == [jnp.bfloat16, jnp.bfloat16]
    assert loss.dtype == jnp.float32


def test_style_compares_images_of_different_sizes():
    pred, target = draw(2, 6, 6, 4)[0], draw(2, 3, 7, 4)[0]
    gram = lambda x: np.einsum("bhwi,bhwj->bij", x, x, dtype=float) / x[0].size
    expected = ((gram(pred) - gram(target)) ** 2).mean((1, 2))
    got = gram_style_loss(pred, target, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    twice = np.concatenate([target, target], axis=1)
    np.testing.assert_allclose(gram_style_loss(twice, target), 0, atol=1e-12)


def test_style_keeps_its_digits_where_features_are_nearly_equal():
    pred, noise = draw(1, 5, 5, 3)
    target = (pred + 1e-4 * noise).astype(np.float32)
    gram = lambda x: np.einsum("bhwi,bhwj->bij", x.astype(float), x.astype(float)) / 75
    exact = ((gram(pred) - gram(target)) ** 2).mean()
    np.testing.assert_allclose(gram_style_loss(pred, target), exact, rtol=1e-4)


def test_float16_features_do_not_overflow():
    pred = jnp.full((1, 4, 4, 2), 300.0, jnp.float16)
    value, slope = jax.value_and_grad(gram_style_loss)(pred, 0 * pred)
    np.testing.assert_allclose(value, (300.0**2 / 2) ** 2, rtol=1e-5)
    assert slope.dtype == jnp.float16
    assert np.isfinite(feature_loss(pred, -pred))


def test_a_zero_vector_has_a_finite_gradient_and_a_full_distance():
    zero, other = jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3))
    weights = jnp.array([1.0, 2.0, 3.0])
    value, slopes = jax.value_and_grad(lpips_loss, (0, 1))(zero, other, weights)
    np.testing.assert_allclose(value, 6 / 3, rtol=1e-6)
    np.testing.assert_array_equal(slopes[0], 0)
    assert np.all(np.isfinite(slopes[1]))
    assert lpips_loss(zero, zero, weights) == 0
    assert np.all(jax.grad(lpips_loss)(zero, zero, weights) == 0)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e25])
def test_the_length_of_features_does_not_count(scale):
    pred, target = draw(2, 3, 4, 5)
    weights = jnp.arange(5.0)
    expected = lpips_loss(pred, target, weights)
    got = lpips_loss(np.float32(scale) * pred, target, weights)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_learned_distances_keep_their_digits_where_features_are_nearly_equal():
    pred, noise = draw(1, 4, 4, 5)
    target = (pred + 1e-4 * noise).astype(np.float32)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    weights = np.linspace(0.5, 1, 5)
    gap = unit(pred.astype(float)) - unit(target.astype(float))
    exact = (weights * gap**2).sum(-1).mean()
    got = lpips_loss(pred, target, weights.astype(np.float32))
    np.testing.assert_allclose(got, exact, rtol=1e-4)


def test_texture_is_blind_to_where_and_structure_is_not():
    (pred,) = draw(1, 5, 6, 2, count=1)
    shuffled = pred.reshape(1, 30, 2)[:, np.random.default_rng(0).permutation(30)]
    shuffled = shuffled.reshape(pred.shape)
    one, none = jnp.ones(2), jnp.zeros(2)
    np.testing.assert_allclose(dists_loss(shuffled, pred, one, none), 0, atol=1e-10)
    assert dists_loss(shuffled, pred, none, one) > 0.5
    both = dists_loss(shuffled, pred, one, one)
    np.testing.assert_allclose(both, dists_loss(shuffled, pred, 3 * one, 3 * one), rtol=1e-6)
    assert dists_loss(pred, shuffled, none, none) == 0
