"""Losses of given pairs and triplets: hand checks, conventions of eps, kinks, coincident points."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss._core.pairwise import pairwise_distance
from jaxloss.losses.pair_distances import (
    contrastive_loss,
    hinge_embedding_loss,
    soft_triplet_loss,
    triplet_margin_loss,
    unsquared_contrastive_loss,
)

TRIPLET = tuple(np.random.default_rng(0).standard_normal((3, 5, 4)))


def norms(x: np.ndarray, p: float) -> np.ndarray:
    return np.linalg.norm(x, ord=p, axis=-1)


def test_absolute_distances_take_absolute_values() -> None:
    # Without them 0 - (-4) + 1 = 5: what optax gives.
    a, p, n = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, -1.0]]), jnp.array([[2.0, 2.0]])
    assert triplet_margin_loss(a, p, n, p=1, eps=0.0) == 0
    assert triplet_margin_loss(a, p, n, p=1, eps=0.0, margin=3.0) == 1


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
@pytest.mark.parametrize("swap", [False, True])
def test_every_norm_is_that_of_numpy_and_has_a_finite_gradient(p, swap) -> None:
    a, b, c = TRIPLET
    far = np.minimum(norms(a - c, p), norms(b - c, p)) if swap else norms(a - c, p)
    expected = np.maximum(norms(a - b, p) - far + 0.7, 0)
    with jax.enable_x64(True):
        loss = lambda *x: triplet_margin_loss(
            *x, margin=0.7, p=p, eps=0.0, swap=swap, reduction="none"
        )
        got, pull = jax.vjp(loss, *TRIPLET)
        np.testing.assert_allclose(got, expected, rtol=1e-13)
        assert all(np.all(np.isfinite(g)) for g in pull(jnp.ones_like(got)))


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_without_eps_the_gradient_at_coincident_points_is_zero(p) -> None:
    x = jnp.ones((2, 3))
    for loss in (triplet_margin_loss, soft_triplet_loss):
        value, gradients = jax.value_and_grad(loss, (0, 1, 2))(x, x, x, p=p, eps=0.0)
        np.testing.assert_allclose(value, 1 if loss is triplet_margin_loss else math.log(2))
        np.testing.assert_array_equal(gradients, 0)


def test_eps_is_added_to_every_difference() -> None:
    x, eps = jnp.zeros((1, 4)), 0.5
    far = jnp.full((1, 4), 10.0)
    got = triplet_margin_loss(x, x, far, margin=30.0, eps=eps)
    np.testing.assert_allclose(got, 4**0.5 * eps - 4**0.5 * 9.5 + 30, rtol=1e-6)
    slope = jax.grad(triplet_margin_loss)(x, x, far, margin=30.0, eps=eps)
    np.testing.assert_allclose(slope, 1.0, rtol=1e-6)  # 1/2 of each distance


def test_vectors_of_any_scale_have_a_distance() -> None:
    a, b, c = (x.astype(np.float32) for x in TRIPLET)
    for p in (1, 2, 3, math.inf):
        plain = triplet_margin_loss(a, b, c, p=p, eps=0.0, margin=1.0)
        for scale in (1e-25, 1e25):
            scaled = tuple(x * np.float32(scale) for x in (a, b, c))
            got = triplet_margin_loss(*scaled, p=p, eps=0.0, margin=scale)
            np.testing.assert_allclose(got, plain * scale, rtol=1e-5)


def test_a_power_below_one_and_a_distance_of_the_wrong_shape_raise() -> None:
    with pytest.raises(ValueError, match="soft_triplet_loss: p: expected a power of at least 1"):
        soft_triplet_loss(*TRIPLET, p=0.5)
    with pytest.raises(ValueError, match=r"distance: expected shape \(5,\), got \(5, 4\)"):
        triplet_margin_loss(*TRIPLET, distance=lambda x, y: x - y)


def test_hidden_triplets_do_not_reach_a_distance_without_a_gradient_at_zero() -> None:
    a, b, c = (jnp.asarray(x) for x in TRIPLET)
    naive = lambda x, y: jnp.sqrt(jnp.sum((x - y) ** 2, axis=-1))
    where = np.array([True, False, True, True, False])
    for loss in (triplet_margin_loss, soft_triplet_loss):
        gradient = jax.grad(lambda a, loss=loss: loss(a, b, c, distance=naive, where=where))(a)
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[~where], 0)


def test_a_traced_distance_may_close_over_arrays() -> None:
    a, b, c = TRIPLET

    def loss(scale):
        mine = lambda x, y: scale * jnp.sum(jnp.abs(x - y), axis=-1)
        return triplet_margin_loss(a, b, c, distance=mine)

    with jax.enable_x64(True):
        value, slope = jax.jit(jax.value_and_grad(loss))(2.0)
        gap = np.sum(np.abs(a - b), -1) - np.sum(np.abs(a - c), -1)
        np.testing.assert_allclose(value, np.mean(np.maximum(2 * gap + 1, 0)), rtol=1e-12)
        np.testing.assert_allclose(slope, np.mean(np.where(2 * gap + 1 > 0, gap, 0)), rtol=1e-12)


def test_kinks_of_contrastive_losses_have_gradient_zero() -> None:
    distances, same = jnp.array([0.5, 2.0]), jnp.array([True, False])
    for loss in (contrastive_loss, unsquared_contrastive_loss):
        options = dict(margin=2.0, positive_margin=0.5)
        value, slope = jax.value_and_grad(loss)(distances, same, **options)
        assert value == 0
        np.testing.assert_array_equal(slope, 0)


def test_coincident_embeddings_of_a_pair_have_gradient_zero() -> None:
    x, same = jnp.ones((3, 2)), jnp.eye(3, dtype=bool)
    for loss in (contrastive_loss, unsquared_contrastive_loss):
        pairs = lambda x, loss=loss: loss(pairwise_distance(x, x), same)
        np.testing.assert_array_equal(jax.grad(pairs)(x), 0)


def test_the_squared_loss_is_half_the_square_of_the_other() -> None:
    distances = np.linspace(0, 3, 50).astype(np.float32)
    for same in (True, False):
        options = dict(margin=1.5, positive_margin=0.3, reduction="none")
        pairs = np.full(50, same)
        once = unsquared_contrastive_loss(distances, pairs, **options)
        np.testing.assert_allclose(contrastive_loss(distances, pairs, **options), once**2 / 2)


def test_pairs_need_a_bool_and_labels_one_or_minus_one() -> None:
    with pytest.raises(TypeError, match="contrastive_loss: same: expected a bool array"):
        contrastive_loss(jnp.ones(2), jnp.array([0, 1]))
    loss = lambda d: hinge_embedding_loss(d, jnp.array([1, -1, 0]), reduction="none")
    units, pull = jax.vjp(loss, jnp.array([0.3, 0.3, 0.3]))
    np.testing.assert_allclose(units, [0.3, 0.7, np.nan], rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(3))[0], [1, -1, np.nan])


def test_the_soft_loss_lies_above_the_hinge_without_margin_by_at_most_log_two() -> None:
    soft = soft_triplet_loss(*TRIPLET, reduction="none")
    gap = soft - triplet_margin_loss(*TRIPLET, margin=0.0, reduction="none")
    assert np.all((gap > 0) & (gap <= math.log(2)))
