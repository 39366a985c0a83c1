"""Several terms as one objective."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloss
from jaxloss import SumAndWeight, cyclical_ramp, detached_ratio_weights, ramp, weighted_sum

A, B = jnp.array(2.0), jnp.array(0.5)


def test_the_total_is_the_weighted_sum_and_its_gradient_that_of_the_terms():
    def objective(x):
        return weighted_sum({"a": x**2, "b": 3 * x}, weights={"a": 0.5, "b": jnp.array(2.0)})

    (total, terms), grad = jax.value_and_grad(objective, has_aux=True)(jnp.array(4.0))
    assert total == 0.5 * 16 + 2 * 12
    assert grad == 0.5 * 8 + 2 * 3
    assert terms == {"a": 16, "b": 12}


def test_terms_in_the_log_carry_no_gradient():
    assert jax.grad(lambda x: weighted_sum({"a": x})[1]["a"])(A) == 0


def test_pairs_enter_by_their_mean_and_composites_by_their_total():
    pair = SumAndWeight(jnp.array(6.0), jnp.array(4.0))
    inner = weighted_sum({"x": A, "y": B}, weights={"y": 4.0})
    total, terms = weighted_sum({"pair": pair, "inner": inner})
    assert total == 1.5 + 4
    assert terms == {"pair": 1.5, "inner/x": 2, "inner/y": 0.5}


def test_a_criterion_of_jaxloss_is_a_composite():
    scores, relevance = jnp.array([[1.0, -1.0]]), jnp.array([[1.0, 0.0]])
    ranking = jaxloss.regression_compatible_ranking_loss(scores, relevance)
    total, terms = weighted_sum({"rating": ranking})
    assert total == ranking[0]
    assert sorted(terms) == sorted(f"rating/{name}" for name in ranking[1])


def test_schedules_are_called_with_the_step_and_compile_once():
    @jax.jit
    def objective(x, step):
        return weighted_sum({"a": x}, weights={"a": optax.linear_schedule(0, 1, 10)}, step=step)[0]

    assert [float(objective(A, step)) for step in (0, 5, 10)] == [0, 1, 2]
    assert objective._cache_size() == 1


def test_hyper_parameters_follow_schedules_in_one_compilation_too():
    logits, labels = jnp.array([[1.0, -1.0], [0.5, 2.0]]), jnp.array([0, 0])
    gamma, smoothing = optax.linear_schedule(0.0, 2.0, 10), optax.cosine_decay_schedule(0.2, 10)

    @jax.jit
    def objective(logits, step):
        return weighted_sum(
            {
                "focal": jaxloss.softmax_focal_loss(logits, labels, gamma=gamma(step)),
                "main": jaxloss.softmax_cross_entropy(
                    logits, labels, label_smoothing=smoothing(step)
                ),
            }
        )

    for step in (0, 5, 10):
        _, terms = objective(logits, step)
        now = dict(gamma=float(gamma(step))), dict(label_smoothing=float(smoothing(step)))
        focal, main = jaxloss.softmax_focal_loss, jaxloss.softmax_cross_entropy
        np.testing.assert_allclose(terms["focal"], focal(logits, labels, **now[0]), rtol=1e-6)
        np.testing.assert_allclose(terms["main"], main(logits, labels, **now[1]), rtol=1e-6)
    assert objective._cache_size() == 1


def test_a_term_of_weight_zero_is_left_out_of_the_total_and_reported():
    total, terms = weighted_sum({"a": A, "lost": jnp.array(jnp.nan)}, weights={"lost": 0})
    assert total == 2
    assert np.isnan(terms["lost"])
    assert weighted_sum({"a": A}, weights={"a": 0.0})[0] == 0


@pytest.mark.parametrize(
    ("terms", "options", "error", "text"),
    [
        ({}, {}, ValueError, "terms: expected at least one term"),
        ([A], {}, TypeError, "terms: expected a mapping"),
        ({"a": jnp.ones(3)}, {}, ValueError, r"a: expected a scalar, got shape \(3,\)"),
        ({"a": 1}, {}, TypeError, "a: expected a floating dtype"),
        ({"a": A}, dict(weights={"b": 1.0}), ValueError, "weights: expected names among"),
        ({"a": A}, dict(weights={"a": lambda step: step}), ValueError, "step: expected a number"),
        ({"a": A}, dict(weights={"a": jnp.ones(2)}), ValueError, "expected a scalar"),
        ({"a/b": A, "a": (A, {"b": B})}, {}, ValueError, "'a/b' twice"),
        ({1: A}, {}, TypeError, "names that are strings"),
    ],
    ids=["none", "list", "array", "integer", "unknown", "no step", "weights", "twice", "number"],
)
def test_bad_terms_and_weights_are_named(terms, options, error, text):
    with pytest.raises(error, match=f"weighted_sum: .*{text}"):
        weighted_sum(terms, **options)


def test_a_ramp_is_linear_between_its_ends_and_may_be_a_jump():
    at = lambda step: float(ramp(step, start=10, end=20, low=1.0, high=3.0))
    assert [at(step) for step in (0, 10, 15, 20, 99)] == [1, 1, 2, 3, 3]
    assert [float(ramp(step, start=5, end=5)) for step in (5, 6)] == [0, 1]
    linear = optax.linear_schedule(1.0, 3.0, 10, transition_begin=10)
    for step in range(25):
        assert at(step) == pytest.approx(float(linear(step)), abs=1e-6)


def test_a_cyclical_ramp_starts_again_each_period():
    at = [float(cyclical_ramp(step, period=10, ratio=0.5, high=2.0)) for step in range(20)]
    assert at[:10] == at[10:]
    np.testing.assert_allclose(at[:6], [0, 0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    assert set(at[5:10]) == {2.0}


def test_ratio_weights_give_every_term_its_share_without_a_gradient():
    terms = {"a": jnp.array(4.0), "b": jnp.array(0.5), "none": jnp.array(0.0)}
    weights = detached_ratio_weights(terms, targets={"a": 1.0, "b": 2.0, "none": 1.0})
    assert weights == {"a": 0.25, "b": 4.0, "none": 0.0}
    slope = jax.grad(lambda x: detached_ratio_weights({"a": x}, targets={"a": 1.0})["a"])(A)
    assert slope == 0
    with pytest.raises(ValueError, match="targets: expected the names"):
        detached_ratio_weights(terms, targets={"a": 1.0})
