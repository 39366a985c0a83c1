"""Advantages against loops, estimates of KL against enumeration, and the entropy of a policy."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from oracle import units_off
from scipy import stats

from jaxloss.losses.advantages import gae, group_advantages, rloo_advantages
from jaxloss.losses.policy_kl import (
    approx_kl_k1,
    approx_kl_k2,
    approx_kl_k3,
    approx_kl_k3_straight_through,
    policy_entropy,
)


def test_group_advantages_are_scores_against_the_group():
    rewards = np.random.default_rng(0).standard_normal((3, 6))
    gap = rewards - rewards.mean(-1, keepdims=True)
    with jax.enable_x64(True):
        for ddof in (0, 1):
            expected = gap / (rewards.std(-1, ddof=ddof, keepdims=True) + 1e-4)
            np.testing.assert_allclose(group_advantages(rewards, ddof=ddof), expected, rtol=1e-12)
        np.testing.assert_allclose(group_advantages(rewards, scale_by_std=False), gap, rtol=1e-10)
        other_way = group_advantages(rewards.T, group_axis=0)
        np.testing.assert_allclose(other_way.T, group_advantages(rewards), rtol=1e-12)


@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_equal_rewards_and_groups_of_one_have_no_advantage(eps):
    for rewards in (np.full((2, 7), 0.1), np.full((2, 3), 1e8 / 3), np.array([[5.0], [7.0]])):
        rewards = rewards.astype(np.float32)
        for scale in (True, False):
            got = group_advantages(rewards, scale_by_std=scale, eps=eps)
            assert not got.any()
        assert not rloo_advantages(rewards).any()


def test_a_small_difference_on_a_large_offset_keeps_its_advantage():
    rewards = np.float32(1e6) + np.array([[0.0, 1.0, 0.0, 1.0]], np.float32)
    got = group_advantages(rewards, ddof=0, eps=0.0)
    np.testing.assert_allclose(got, [[-1, 1, -1, 1]], rtol=1e-6)


def test_samples_that_do_not_exist_get_nothing_and_change_nothing():
    rewards = np.array([[1.0, 2.0, np.nan, 4.0], [3.0, np.inf, np.nan, np.nan], [np.nan] * 4])
    where = np.isfinite(rewards)
    for function in (group_advantages, rloo_advantages):
        got = function(rewards.astype(np.float32), where=where)
        alone = function(np.array([[1.0, 2.0, 4.0]], np.float32))
        np.testing.assert_allclose(got[0][where[0]], alone[0], rtol=1e-6)
        assert not got[~where].any()
        assert not got[1:].any()


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    rewards = np.random.default_rng(1).standard_normal((3, 6))
    with jax.enable_x64(True):
        got = rloo_advantages(rewards)
    for row, ours in zip(rewards, got, strict=True):
        for i in range(6):
            np.testing.assert_allclose(ours[i], row[i] - np.delete(row, i).mean(), rtol=1e-10)


@pytest.mark.parametrize("rewards", [np.array([[1, 0, 0, 1]]), np.array([[True, False]])])
def test_verifiable_rewards_may_be_integers_or_bools(rewards):
    got = group_advantages(rewards, scale_by_std=False)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, rewards - 0.5)


def test_advantages_have_no_gradient():
    rewards = jnp.array([[1.0, 2.0, 4.0]])
    assert not jax.jacobian(group_advantages)(rewards).any()
    assert not jax.jacobian(rloo_advantages)(rewards).any()
    both = lambda r, v, d: sum(map(jnp.sum, gae(r, v, jnp.ones(1), d)))
    slopes = jax.grad(both, argnums=(0, 1, 2))(rewards, 2 * rewards, 0.9)
    assert not any(np.any(slope) for slope in slopes)


def test_wrong_axes_and_corrections_are_refused():
    with pytest.raises(ValueError, match="group_advantages: axis: expected an axis"):
        group_advantages(jnp.ones((2, 3)), group_axis=2)
    with pytest.raises(ValueError, match="group_advantages: ddof: expected an integer"):
        group_advantages(jnp.ones((2, 3)), ddof=-1)


def loop(rewards, values, last, discounts, decay, where):
    """Backwards over time, one sequence at a time; hidden steps are skipped."""
    advantages, carried = np.zeros_like(rewards), np.zeros_like(rewards)
    for b in range(len(rewards)):
        advantage, value = 0.0, last[b]
        for t in reversed(range(rewards.shape[1])):
            if where[b, t]:
                delta = rewards[b, t] + discounts[b, t] * value - values[b, t]
                advantage = delta + discounts[b, t] * decay * advantage
                value = values[b, t]
            advantages[b, t], carried[b, t] = advantage, value
    return advantages, advantages + carried


def rollout(seed=2):
    rng = np.random.default_rng(seed)
    rewards, values = rng.standard_normal((2, 4, 7))
    return rewards, values, rng.standard_normal(4), 0.9 * (rng.random((4, 7)) < 0.8)


def test_gae_runs_backwards_and_skips_hidden_steps():
    rewards, values, last, discounts = rollout()
    where = np.random.default_rng(3).random(rewards.shape) < 0.7
    dirty = lambda x: np.where(where, x, np.nan)
    with jax.enable_x64(True):
        everywhere = gae(rewards, values, last, discounts, gae_lambda=0.8)
        some = gae(dirty(rewards), dirty(values), last, dirty(discounts), where=where)
    expected = loop(rewards, values, last, discounts, 0.8, np.ones_like(where))
    np.testing.assert_allclose(everywhere, expected, rtol=1e-10)
    expected = loop(rewards, values, last, discounts, 0.95, where)
    np.testing.assert_allclose(some, expected, rtol=1e-10)


def test_lambda_one_gives_discounted_returns_and_lambda_zero_one_step_ones():
    rewards, values, last, _ = rollout(4)
    with jax.enable_x64(True):
        _, returns = gae(rewards, values, last, 0.9, gae_lambda=1.0)
        short, _ = gae(rewards, values, last, 0.9, gae_lambda=0.0)
    expected = rewards @ 0.9 ** np.arange(7)[:, None] + 0.9**7 * last[:, None]
    np.testing.assert_allclose(returns[:, :1], expected, rtol=1e-10)
    following = np.concatenate([values[:, 1:], last[:, None]], -1)
    np.testing.assert_allclose(short, rewards + 0.9 * following - values, rtol=1e-10)


def test_discounts_are_a_scalar_or_one_for_each_step():
    rewards, values, last, _ = rollout(5)
    whole = gae(rewards, values, last, np.full((4, 7), 0.9))
    np.testing.assert_array_equal(gae(rewards, values, last, 0.9), whole)
    with pytest.raises(ValueError, match="gae: discounts: expected a scalar or shape"):
        gae(rewards, values, last, np.full(7, 0.9))
    with pytest.raises(ValueError, match="gae: bootstrap_value: expected shape"):
        gae(rewards, values, np.zeros(3), 0.9)


# Estimates of the divergence


def test_over_all_samples_the_estimates_are_the_divergence_and_so_are_two_gradients():
    rng = np.random.default_rng(6)
    logits, ref = rng.standard_normal((2, 3))
    with jax.enable_x64(True):
        log_ref = jax.nn.log_softmax(ref)
        p = jax.nn.softmax(logits)

        def kl(z, reverse=False):
            a, b = jax.nn.log_softmax(z), log_ref
            a, b = (b, a) if reverse else (a, b)
            return jnp.sum(jnp.exp(a) * (a - b))

        def estimate(z, loss):
            return jnp.sum(p * loss(jax.nn.log_softmax(z), log_ref, reduction="none"))

        for loss in (approx_kl_k1, approx_kl_k3, approx_kl_k3_straight_through):
            np.testing.assert_allclose(estimate(logits, loss), kl(logits), rtol=1e-12)
        slope = lambda loss: jax.grad(estimate)(logits, loss)
        for loss in (approx_kl_k2, approx_kl_k3_straight_through):
            np.testing.assert_allclose(slope(loss), jax.grad(kl)(logits), rtol=1e-10)
        np.testing.assert_allclose(slope(approx_kl_k1), np.zeros(3), atol=1e-15)
        backward = jax.grad(kl)(logits, reverse=True)
        np.testing.assert_allclose(slope(approx_kl_k3), backward, rtol=1e-10)


def test_k3_keeps_every_digit_of_a_tiny_log_ratio_and_is_never_negative():
    x = [-19.0, -1.0, -0.6, -0.4, -1e-2, -1e-5, -1e-12, 1e-12, 1e-7, 1e-3, 0.4, 0.6, 3.0, 19.0]
    off = units_off(approx_kl_k3, lambda p, r: mp.expm1(r - p) - (r - p), np.zeros(len(x)), x)
    assert off["value"][0] <= 4, off
    assert off["slope 0"][0] <= 4, off
    values = approx_kl_k3(jnp.zeros(len(x)), jnp.array(x), reduction="none")
    assert np.all(values > 0)
    assert approx_kl_k3(jnp.ones(1), jnp.ones(1)) == 0


def test_k3_beyond_the_clamp_is_finite_without_gradient():
    value, slope = jax.value_and_grad(approx_kl_k3)(jnp.array([-1e4]), jnp.array([0.0]))
    np.testing.assert_allclose(value, np.expm1(20) - 20, rtol=1e-6)
    assert slope == 0


def test_the_straight_through_estimate_differentiates_k2_in_both_modes_and_twice():
    loss = lambda x: approx_kl_k3_straight_through(x, jnp.array([1.0]))
    x, one = jnp.array([-0.5]), jnp.ones(1)
    assert jax.grad(loss)(x) == -1.5
    assert jax.jvp(loss, (x,), (one,))[1] == -1.5
    assert jax.hessian(loss)(x) == 1


def test_the_reference_has_no_gradient_in_any_estimate():
    for loss in (approx_kl_k1, approx_kl_k2, approx_kl_k3, approx_kl_k3_straight_through):
        assert not jax.grad(loss, argnums=1)(jnp.ones(2), jnp.zeros(2)).any()


# Entropy


def test_the_entropy_is_scipys_and_impossible_classes_add_nothing():
    logits = np.random.default_rng(7).standard_normal((5, 6)) * 3
    logits[:, 2] = -np.inf
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    with jax.enable_x64(True):
        got = policy_entropy(logits, reduction="none")
        slope = jax.grad(policy_entropy)(logits)
        curve = jax.jvp(jax.grad(policy_entropy), (logits,), (np.ones_like(logits),))[1]
    np.testing.assert_allclose(got, stats.entropy(p, axis=-1), rtol=1e-12)
    assert np.all(np.isfinite(slope))
    assert not slope[:, 2].any()
    np.testing.assert_allclose(curve, 0, atol=1e-12)


def test_the_entropy_of_an_almost_certain_policy_keeps_its_digits():
    gap = np.array([3.0, 8.0, 14.0, 20.0, 60.0], np.float32)
    exact = lambda z: mp.log1p(mp.exp(-z)) + z / (1 + mp.exp(z))
    loss = lambda z, **options: policy_entropy(jnp.stack([z, 0 * z], -1), **options)
    off = units_off(loss, exact, gap)
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_a_uniform_policy_has_the_largest_entropy():
    logits = jnp.zeros((1, 7))
    np.testing.assert_allclose(policy_entropy(logits), np.log(7), rtol=1e-6)
    assert np.max(np.abs(jax.grad(policy_entropy)(logits))) < 1e-7
