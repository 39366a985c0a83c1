"""Policy losses: published formulas, ties at ratio 1, clips, denominators and what is constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss import normalized_sum, sequence_mean, sequence_sum_scaled
from jaxloss.losses.policy import (
    cispo_loss,
    clipped_value_loss,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    policy_stats,
    ppo_clip_loss,
)
from jaxloss.losses.policy_kl import approx_kl_k3
from jaxloss.losses.policy_variants import (
    dro_loss,
    gmpo_loss,
    luspo_loss,
    reinforce_loss,
    sapo_loss,
    vespo_loss,
)

NONE = dict(reduction="none")
TOKENS = {
    "ppo": ppo_clip_loss,
    "gspo_token": gspo_token_loss,
    "cispo": cispo_loss,
    "sapo": sapo_loss,
    "vespo": vespo_loss,
    "dro": lambda lp, old, a, **tail: dro_loss(lp, old, a, beta=0.3, **tail),
    "reinforce": lambda lp, old, a, **tail: reinforce_loss(lp, a, **tail),
}
SEQUENCES = {"gspo": gspo_loss, "gmpo": gmpo_loss, "luspo": luspo_loss}


def draws(seed=0, batch=4, time=5):
    generator = np.random.default_rng(seed)
    log_probs, old, ref = -generator.random((3, batch, time)) * 2
    advantages = generator.standard_normal((batch, time))
    where = generator.random((batch, time)) < 0.6
    where[0] = [True] + [False] * (time - 1)
    where[1] = False
    return log_probs, old, ref, advantages, where


@jax.jit
def evaluate(log_probs, old, advantages, where=None):
    """Units of every loss, and the gradients of their sums in all arrays."""

    def both(loss, advantages):
        total = lambda *a: ((units := loss(*a, where=where, reduction="none")).sum(), units)
        gradient = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
        (_, units), slopes = gradient(log_probs, old, advantages)
        return units, slopes

    out = {name: both(loss, advantages) for name, loss in TOKENS.items()}
    return out | {name: both(loss, advantages[..., 0]) for name, loss in SEQUENCES.items()}


def ppo(ratio, advantages, low=0.2, high=0.2):
    return -np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)


def masked_mean(x, where):
    return (x * where).sum(-1) / np.maximum(where.sum(-1), 1)


def test_every_policy_loss_is_its_published_formula_in_float64():
    log_probs, old, _, a, where = draws()
    x = log_probs - old
    ratio, once = np.exp(x), a[:, 0]
    hidden = lambda array: np.where(where, array, np.nan)
    sequence = np.exp(masked_mean(x, where))
    sign = np.sign(once)[:, None]
    clamped = sign * np.minimum(sign * x, sign * np.clip(x, -0.4, 0.4))
    tau = np.where(a > 0, 1.0, 1.05)
    w = np.exp(np.clip((x * where).sum(-1), np.log(1e-8), 20))[:, None]
    k, rate = np.where(a >= 0, 2.0, 3.0), np.where(a >= 0, 3.0, 2.0)
    gspo = ppo(sequence, once, 3e-4, 4e-4)
    expected = {
        "ppo": ppo(ratio, a),
        "gspo_token": ppo(sequence[:, None], a, 3e-4, 4e-4),
        "cispo": -np.minimum(ratio, 5) * a * log_probs,
        "sapo": -4 / tau / (1 + np.exp(-tau * (ratio - 1))) * a,
        "vespo": -np.exp(rate) * w**k * np.exp(-rate * w) * a * log_probs,
        "dro": -(log_probs * a - 0.15 * x**2),
        "reinforce": -log_probs * a,
        "gspo": gspo,
        "gmpo": -once * np.exp(masked_mean(clamped, where)),
        "luspo": gspo * where.sum(-1),
    }
    with jax.enable_x64(True):
        got = jax.device_get(evaluate(hidden(log_probs), hidden(old), a, where))
    for name, value in expected.items():
        kept = where if value.ndim == 2 else where.any(-1)
        value = np.where(kept, value, 0)
        np.testing.assert_allclose(got[name][0], value, rtol=1e-11, atol=1e-14, err_msg=name)


def test_at_ratio_one_every_policy_gradient_is_minus_the_advantage():
    log_probs, _, _, a, _ = draws(1)
    a[:] = a[:, :1]
    with jax.enable_x64(True):
        got = jax.device_get(evaluate(log_probs, log_probs, a))
    for name in TOKENS:
        np.testing.assert_allclose(got[name][1][0], -a, rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(got["luspo"][1][0], -a, rtol=1e-12)
    for name in ("gspo", "gmpo"):
        np.testing.assert_allclose(got[name][1][0], -a / a.shape[-1], rtol=1e-12, err_msg=name)


def test_old_log_probabilities_and_advantages_have_no_gradient():
    log_probs, old, _, a, where = draws(2)
    for name, (_, (_, *others)) in jax.device_get(evaluate(log_probs, old, a, where)).items():
        assert not any(slope.any() for slope in others), name


def test_log_ratios_of_any_size_leave_values_and_gradients_finite():
    log_probs, _, _, a, _ = draws(3)
    far = np.array([1e4, -1e4, 30, -30, 0], np.float32) + np.zeros_like(log_probs, np.float32)
    for pair in ((far, 0 * far), (0 * far, far), (far, -far)):
        for name, tree in jax.device_get(evaluate(*pair, a.astype(np.float32))).items():
            for leaf in jax.tree.leaves(tree):
                assert np.all(np.isfinite(leaf)), name


def test_nan_under_the_mask_is_not_seen_even_in_a_shared_advantage():
    log_probs, old, _, a, where = draws(4)
    once = np.where(where.any(-1, keepdims=True), a[:, :1], np.nan)
    dirty = np.where(where, log_probs, np.nan)
    loss = lambda lp: ppo_clip_loss(lp, old, once, where=where)
    value, slope = jax.value_and_grad(loss)(dirty)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))
    assert not slope[~where].any()
    sequence = lambda lp: gspo_loss(lp, old, once[:, 0], where=where)
    assert np.all(np.isfinite(jax.value_and_grad(sequence)(dirty)[1]))


def test_one_advantage_for_a_sequence_is_the_same_as_one_for_each_token():
    log_probs, old, _, a, _ = draws(5)
    everywhere = np.broadcast_to(a[:, :1], a.shape)
    once = ppo_clip_loss(log_probs, old, a[:, :1])
    np.testing.assert_array_equal(once, ppo_clip_loss(log_probs, old, everywhere))
    with pytest.raises(ValueError, match=r"advantages: expected shape \(4, 5\) or \(4, 1\), got"):
        ppo_clip_loss(log_probs, old, a[:, 0])
    with pytest.raises(ValueError, match=r"advantages: expected shape \(4,\), got \(4, 1\)"):
        gspo_loss(log_probs, old, a[:, :1])


# PPO


def test_the_clip_takes_the_gradient_only_where_the_advantage_pushes_further():
    ratio = np.array([0.5, 0.5, 1.5, 1.5, 0.9, 1.1, 1.1])
    a = np.array([1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 0.0])
    with jax.enable_x64(True):
        loss = lambda lp: ppo_clip_loss(lp, 0 * lp, a, reduction="sum")
        slope = jax.grad(loss)(np.log(ratio))
    np.testing.assert_allclose(slope, [-0.5, 0, 0, 1.5, 0.9, -1.1, 0], rtol=1e-12)


def test_with_no_room_the_gradient_at_ratio_one_is_still_whole():
    slope = jax.grad(ppo_clip_loss)(jnp.zeros(1), jnp.zeros(1), jnp.ones(1), clip_high=0.0)
    assert slope == -1


def test_dual_clip_bounds_the_loss_of_negative_advantages_alone():
    lp, a = np.log([8.0, 8.0, 2.0]), np.array([-2.0, 2.0, -2.0])
    loss = lambda lp, **o: ppo_clip_loss(lp, 0 * lp, a, dual_clip=3.0, **o)
    np.testing.assert_allclose(loss(lp, **NONE), [6, -2.4, 4], rtol=1e-6)
    slope = jax.grad(lambda lp: loss(lp, reduction="sum"))(lp.astype(np.float32))
    np.testing.assert_allclose(slope, [0, 0, 4], rtol=1e-6)


def test_max_ratio_is_the_two_sided_clip_of_trl():
    rng = np.random.default_rng(6)
    lp, a = rng.standard_normal(50), rng.standard_normal(50)
    ratio = np.exp(lp)
    expected = -np.minimum(np.minimum(ratio, 1.5) * a, np.clip(ratio, 0.8, 1.2) * a)
    with jax.enable_x64(True):
        got = ppo_clip_loss(lp, 0 * lp, a, max_ratio=1.5, **NONE)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_the_log_ratio_is_clamped_with_no_gradient_beyond():
    value, slope = jax.value_and_grad(ppo_clip_loss)(jnp.array([25.0]), jnp.zeros(1), -jnp.ones(1))
    np.testing.assert_allclose(value, np.exp(20), rtol=1e-6)
    assert slope == 0


def test_policy_stats_are_plain_means_over_kept_tokens_without_gradient():
    log_probs, old, _, a, where = draws(7)
    ratio, count = np.exp(log_probs - old), where.sum()
    expected = dict(
        clip_fraction_low=((a < 0) & (ratio < 0.9) & where).sum() / count,
        clip_fraction_high=((a > 0) & (ratio > 1.3) & where).sum() / count,
        log_ratio=((log_probs - old) * where).sum() / count,
        entropy=-(log_probs * where).sum() / count,
    )
    dirty = np.where(where, log_probs, np.nan)
    stats = lambda lp: policy_stats(lp, old, a, clip_low=0.1, clip_high=0.3, where=where)
    got = stats(dirty)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
    slopes = jax.jacobian(stats)(jnp.asarray(log_probs))
    assert not any(slope.any() for slope in slopes.values())
    empty = policy_stats(log_probs, old, a, where=np.zeros_like(where))
    assert all(value == 0 for value in empty.values())


# Values


def test_the_clipped_value_loss_is_half_the_larger_of_two_squares():
    rng = np.random.default_rng(8)
    v, old, returns = rng.standard_normal((3, 60))
    clipped = np.clip(v, old - 0.2, old + 0.2)
    expected = np.maximum((v - returns) ** 2, (clipped - returns) ** 2) / 2
    with jax.enable_x64(True):
        got = clipped_value_loss(v, old, returns, **NONE)
        slope = jax.grad(lambda v: clipped_value_loss(v, old, returns, reduction="sum"))(v)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    moves = (np.abs(v - old) <= 0.2) | (np.abs(v - returns) >= np.abs(clipped - returns))
    np.testing.assert_allclose(slope, np.where(moves, v - returns, 0), rtol=1e-12)


def test_equal_values_give_the_whole_gradient_and_targets_none():
    v, returns = jnp.array([1.0, 1.25]), jnp.array([3.0, 3.0])
    loss = lambda *a: clipped_value_loss(*a, clip=0.25, reduction="sum")
    in_values, in_old, in_returns = jax.grad(loss, argnums=(0, 1, 2))(v, jnp.ones(2), returns)
    np.testing.assert_array_equal(in_values, v - returns)
    assert not in_old.any()
    assert not in_returns.any()


# GRPO, GSPO, CISPO


def test_grpo_is_ppo_plus_the_third_estimate_of_kl():
    log_probs, old, ref, a, where = draws(9)
    with jax.enable_x64(True):
        tail = dict(where=where, **NONE)
        parts = ppo_clip_loss(log_probs, old, a, **tail) + 0.1 * approx_kl_k3(
            log_probs, ref, **tail
        )
        whole = grpo_loss(log_probs, old, ref, a, beta=0.1, **tail)
        slope = jax.grad(lambda ref: grpo_loss(log_probs, old, ref, a))(ref)
    np.testing.assert_allclose(whole, parts, rtol=1e-12)
    assert not slope.any()


def test_the_reductions_give_the_denominators_of_grpo_dapo_and_dr_grpo():
    log_probs, old, ref, a, where = draws(10)
    x = ref - log_probs
    units = where * (ppo(np.exp(log_probs - old), a) + 0.04 * (np.exp(x) - x - 1))
    lengths = where.sum(-1)
    kept = lengths > 0
    expected = {
        "mean": units.sum() / where.sum(),
        sequence_mean: (units.sum(-1)[kept] / lengths[kept]).mean(),
        sequence_sum_scaled(16): units.sum(-1).sum() / (16 * kept.sum()),
        normalized_sum(100): units.sum() / 100,
    }
    with jax.enable_x64(True):
        for reduction, value in expected.items():
            got = grpo_loss(log_probs, old, ref, a, where=where, reduction=reduction)
            np.testing.assert_allclose(got, value, rtol=1e-12)


def test_gspo_by_token_has_value_and_gradient_of_gspo_when_advantages_agree():
    log_probs, old, _, a, where = draws(11)
    old = log_probs + 0.05 * (old + 1)
    options = dict(clip_low=0.02, clip_high=0.03, where=where)
    tokens = lambda lp: gspo_token_loss(lp, old, a[:, :1], reduction=sequence_mean, **options)
    sequences = lambda lp: gspo_loss(lp, old, a[:, 0], **options)
    with jax.enable_x64(True):
        one, other = (jax.value_and_grad(f)(log_probs) for f in (tokens, sequences))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-12)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-12, atol=1e-15)


def test_a_sequence_without_tokens_is_no_unit_of_gspo():
    log_probs, old, _, a, where = draws(12)
    kept = where.any(-1)
    part = lambda x: x[kept]
    whole = gspo_loss(log_probs, old, a[:, 0], where=where)
    rest = gspo_loss(part(log_probs), part(old), part(a[:, 0]), where=part(where))
    np.testing.assert_allclose(whole, rest, rtol=1e-6)


def test_the_weight_of_cispo_is_clipped_on_both_sides_and_constant():
    ratio, a = np.array([0.1, 2.0, 9.0]), np.array([1.0, -1.0, 1.0])
    lp = np.log(ratio).astype(np.float32)
    loss = lambda lp: cispo_loss(lp, jnp.zeros(3), a, min_ratio=0.8, max_ratio=1.2, reduction="sum")
    np.testing.assert_allclose(jax.grad(loss)(lp), [-0.8, 1.2, -1.2], rtol=1e-6)
    np.testing.assert_allclose(loss(lp), -(np.clip(ratio, 0.8, 1.2) * a * lp).sum(), rtol=1e-6)


# Further losses


def test_sapo_tends_to_the_unclipped_gradient_of_ppo_as_its_gates_widen():
    lp, a = np.log([0.8, 1.3]), np.array([1.0, -2.0])
    loss = lambda lp: sapo_loss(lp, 0 * lp, a, tau_pos=1e-4, tau_neg=1e-4, reduction="sum")
    with jax.enable_x64(True):
        slope = jax.grad(loss)(lp)
    np.testing.assert_allclose(slope, -np.exp(lp) * a, rtol=1e-6)


def test_sapo_keeps_the_digits_of_the_gradient_of_unlikely_tokens():
    lp = np.array([-18.0, -15.0, -5.0], np.float32)
    slope = jax.grad(lambda lp: sapo_loss(lp, 0 * lp, jnp.ones(3), reduction="sum"))(lp)
    gate = 1 / (1 + np.exp(-np.expm1(lp.astype(float))))
    np.testing.assert_allclose(slope, -4 * gate * (1 - gate) * np.exp(lp.astype(float)), rtol=2e-6)


def test_gmpo_clips_single_tokens_of_a_sequence():
    lp = np.array([[1.0, 0.1, -1.0]], np.float32)
    up = jax.grad(lambda lp: gmpo_loss(lp, 0 * lp, jnp.ones(1)))(lp)
    down = jax.grad(lambda lp: gmpo_loss(lp, 0 * lp, -jnp.ones(1)))(lp)
    np.testing.assert_allclose(up, -np.exp((0.4 + 0.1 - 1) / 3) / 3 * np.array([[0, 1, 1]]), 1e-6)
    np.testing.assert_allclose(down, np.exp((1 + 0.1 - 0.4) / 3) / 3 * np.array([[1, 1, 0]]), 1e-6)


def test_the_weight_of_vespo_is_largest_where_the_ratio_is_k_over_lambda():
    log_w = np.linspace(-2, 2, 401)
    lp = np.stack([log_w, 0 * log_w], -1)
    with jax.enable_x64(True):
        weight = -jax.grad(lambda lp: vespo_loss(lp, 0 * lp, np.ones((401, 1)), reduction="sum"))(
            lp
        )
    assert abs(log_w[np.argmax(weight[:, 0])] - np.log(2 / 3)) < 0.01


def test_the_optimum_of_dro_moves_the_log_ratio_by_advantage_over_beta():
    lp, a = jnp.array([-1.0 + 0.5 / 2.0]), jnp.array([0.5])
    assert jax.grad(dro_loss)(lp, jnp.array([-1.0]), a, beta=2.0) == 0
