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


def exact_distance(a, b):
    """Half the squared distance of the unit vectors, in extended precision."""
    a, b = (np.asarray(x, np.longdouble) for x in (a, b))
    unit = lambda x: x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
    return 0.5 * np.sum((unit(a) - unit(b)) ** 2, axis=-1)


@pytest.mark.parametrize("angle", [1e-5, 1e-3, 0.1, 1.0, 3.0])
def test_the_distance_of_nearly_parallel_vectors_keeps_its_digits(angle) -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((50, 6)).astype(np.float32)
    b = (a * 1.7 + angle * generator.standard_normal((50, 6))).astype(np.float32)
    exact = exact_distance(a, b).astype(np.float64)
    got = jaxloss.cosine_distance(a, b, reduction="none")
    # An ulp in the inputs turns the vectors by some 1e-7.
    np.testing.assert_allclose(got, exact, atol=2e-7 * np.sqrt(np.max(exact)))
    if angle == 1e-5:
        assert np.max(np.abs(got - exact)) < 1e-10 < np.max(exact)


@pytest.mark.parametrize("factor", [1.0, 0.3, 4.0])
def test_parallel_vectors_of_any_length_are_at_distance_zero(factor) -> None:
    a = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    value, slopes = jax.value_and_grad(jaxloss.cosine_distance, (0, 1))(a, np.float32(factor) * a)
    assert 0 <= value < 1e-13
    for slope in slopes:
        np.testing.assert_allclose(slope, 0, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(VECTORS, VECTORS)
def test_the_length_of_the_vectors_does_not_matter(a, b) -> None:
    a, b = np.round(8 * a) / 8, np.round(8 * b) / 8
    ab = jaxloss.cosine_similarity(a, b, reduction="none")
    scaled = jaxloss.cosine_similarity(1024 * a, b / 1024, reduction="none")
    np.testing.assert_allclose(scaled, ab, atol=1e-6)
    np.testing.assert_allclose(jaxloss.cosine_similarity(a, -b, reduction="none"), -ab, atol=1e-6)


def test_a_hidden_pair_with_a_bad_label_and_nan_leaves_no_trace() -> None:
    a, b = jnp.array([[3.0, 4.0], [1.0, 2.0]]), jnp.array([[1.0, 0.0], [2.0, 1.0]])
    where, labels = jnp.array([True, False]), jnp.array([-1, 7])
    loss = lambda a, b, labels: jaxloss.cosine_embedding_loss(a, b, labels, where=where)
    clean = jax.value_and_grad(loss, (0, 1))(a, b, jnp.array([-1, 1]))
    poisoned = jax.value_and_grad(loss, (0, 1))(a.at[1].set(jnp.nan), b.at[1].set(jnp.inf), labels)
    for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(poisoned), strict=True):
        np.testing.assert_array_equal(x, y)


def test_unlike_vectors_below_the_margin_and_on_it_are_not_pushed() -> None:
    a, b = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [0.0, 2.0]])
    for margin in (0.0, 0.5):
        value, slope = jax.value_and_grad(jaxloss.cosine_embedding_loss)(
            a, b, jnp.array([-1, -1]), margin=margin
        )
        assert value == 0
        np.testing.assert_array_equal(slope, 0)


def test_labels_may_be_floats_and_are_named_when_wrong() -> None:
    a, b = jnp.eye(2), jnp.ones((2, 2))
    whole = jaxloss.cosine_embedding_loss(a, b, jnp.array([1, -1]))
    assert jaxloss.cosine_embedding_loss(a, b, jnp.array([1.0, -1.0])) == whole
    with pytest.raises(ValueError, match="cosine_embedding_loss: labels: expected"):
        jaxloss.checked(jaxloss.cosine_embedding_loss)(a, b, jnp.array([0, 1]))
    with pytest.raises(ValueError, match=r"labels: expected shape \(2,\), got \(2, 1\)"):
        jaxloss.cosine_embedding_loss(a, b, jnp.ones((2, 1), int))


@pytest.mark.parametrize("loss", [jaxloss.cosine_similarity, jaxloss.cosine_distance])
def test_an_axis_that_is_not_there_raises(loss) -> None:
    with pytest.raises(ValueError, match="axis: expected an axis of an array of rank 2, got 2"):
        loss(jnp.ones((2, 3)), jnp.ones((2, 3)), axis=2)
    with pytest.raises(ValueError, match="a: expected at least 1 axis"):
        loss(jnp.float32(1), jnp.float32(1))
