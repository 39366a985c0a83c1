"""Cosine losses at zero vectors, extreme lengths and bad labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import jaxloss

VECTORS = arrays(np.float32, (3, 4), elements=st.floats(-8, 8, width=32))


def test_a_zero_vector_has_similarity_zero_and_a_zero_gradient() -> None:
    a, b = jnp.array([[0.0, 0.0], [3.0, 4.0]]), jnp.array([[1.0, 0.0], [3.0, 4.0]])
    np.testing.assert_array_equal(jaxloss.cosine_similarity(a, b, reduction="none"), [0, 1])
    for slope in jax.grad(jaxloss.cosine_distance, (0, 1))(a, b):
        np.testing.assert_array_equal(slope[0], 0)
        np.testing.assert_allclose(slope[1], 0, atol=1e-7)
    for leaf in jax.tree.leaves(jax.hessian(jaxloss.cosine_distance, (0, 1))(a, b)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_neither_tiny_nor_huge_vectors_lose_the_angle(scale) -> None:
    a, b = jnp.array([3.0, 4.0]) * scale, jnp.array([4.0, 3.0])
    np.testing.assert_allclose(jaxloss.cosine_similarity(a, b), 0.96, rtol=1e-6)
    slope = jax.grad(jaxloss.cosine_similarity)(a, b) * scale
    np.testing.assert_allclose(slope, np.array([28, -21]) / 625, rtol=1e-5)


def test_float16_norms_do_not_overflow() -> None:
    a = jnp.full((1, 64), 1e4, jnp.float16)
    np.testing.assert_allclose(jaxloss.cosine_similarity(a, a), 1, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(VECTORS, VECTORS)
def test_similarity_is_symmetric_and_bounded(a, b) -> None:
    ab = jaxloss.cosine_similarity(a, b, reduction="none")
    np.testing.assert_allclose(ab, jaxloss.cosine_similarity(b, a, reduction="none"), atol=1e-6)
    assert np.all(np.abs(ab) <= 1 + 1e-6)
    distance = jaxloss.cosine_distance(a, b, reduction="none")
    np.testing.assert_allclose(distance, 1 - ab, atol=1e-6)


def test_axis_moves_the_features() -> None:
    a, b = (np.random.default_rng(i).standard_normal((5, 3)).astype(np.float32) for i in (0, 1))
    got = jaxloss.cosine_distance(a, b, axis=0, reduction="none")
    np.testing.assert_array_equal(got, jaxloss.cosine_distance(a.T, b.T, reduction="none"))


def test_embedding_labels_other_than_one_and_minus_one_are_nan() -> None:
    a, b = jnp.eye(3), jnp.eye(3)
    got = jaxloss.cosine_embedding_loss(a, b, jnp.array([1, -1, 0]), margin=0.25, reduction="none")
    np.testing.assert_allclose(got[:2], [0, 0.75], atol=1e-7)
    assert jnp.isnan(got[2])
    slope = jax.grad(jaxloss.cosine_embedding_loss)(a, b, jnp.array([1, -1, 0]))
    assert jnp.all(jnp.isnan(slope[2]))


def test_a_zero_vector_costs_one_under_label_one() -> None:
    zero = jnp.zeros((1, 2))
    assert jaxloss.cosine_embedding_loss(zero, zero + 1, jnp.array([1])) == 1
    assert jaxloss.cosine_embedding_loss(zero, zero + 1, jnp.array([-1])) == 0
