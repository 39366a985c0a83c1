"""Preference losses: TRL's formulas, certain and hopeless pairs, state, and their limits."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_off

from jaxloss import checked
from jaxloss.losses.preference import (
    dpo_hinge_loss,
    dpo_length_normalized_loss,
    dpo_loss,
    ipo_loss,
    nca_pair_loss,
    robust_dpo_loss,
    sppo_hard_loss,
)
from jaxloss.losses.preference_free import (
    alphapo_rewards,
    bradley_terry_loss,
    cpo_loss,
    f_divergence_scores,
    orpo_loss,
    plackett_luce_loss,
    simpo_loss,
)
from jaxloss.losses.preference_transport import aot_loss, aot_unpaired_loss
from jaxloss.losses.preference_unpaired import (
    bco_init,
    bco_loss,
    bco_pair_loss,
    implicit_reward,
    kto_loss,
    kto_reference_kl,
)
from jaxloss.losses.preference_variants import (
    apo_down_loss,
    apo_zero_loss,
    discopop_loss,
    exo_pair_loss,
)

BETA, E, TAU = 0.1, 0.2, 0.05


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def smoothed(x):
    return -(1 - E) * log_sigmoid(x) - E * log_sigmoid(-x)


def kl(q, p):
    return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))


PAIRS = {  # name: our loss, its options, the published formula of both log-ratios
    "dpo": (dpo_loss, {}, lambda w, v: -log_sigmoid(BETA * (w - v))),
    "cdpo": (dpo_loss, dict(label_smoothing=E), lambda w, v: smoothed(BETA * (w - v))),
    "robust": (
        robust_dpo_loss,
        dict(label_smoothing=E),
        lambda w, v: (
            (-(1 - E) * log_sigmoid(BETA * (w - v)) + E * log_sigmoid(-BETA * (w - v)))
            / (1 - 2 * E)
        ),
    ),
    "hinge": (dpo_hinge_loss, {}, lambda w, v: np.maximum(1 - BETA * (w - v), 0)),
    "ipo": (ipo_loss, {}, lambda w, v: (w - v - 1 / (2 * BETA)) ** 2),
    "exo": (
        exo_pair_loss,
        dict(label_smoothing=E),
        lambda w, v: kl(sigmoid(BETA * (w - v)), 1 - E),
    ),
    "nca": (
        nca_pair_loss,
        {},
        lambda w, v: (
            -log_sigmoid(BETA * w) - 0.5 * log_sigmoid(-BETA * w) - 0.5 * log_sigmoid(-BETA * v)
        ),
    ),
    "sppo": (
        sppo_hard_loss,
        {},
        lambda w, v: (w - 0.5 / BETA) ** 2 + (v + 0.5 / BETA) ** 2,
    ),
    "apo_zero": (apo_zero_loss, {}, lambda w, v: 1 - sigmoid(BETA * w) + sigmoid(BETA * v)),
    "apo_down": (
        apo_down_loss,
        {},
        lambda w, v: sigmoid(BETA * w) + 1 - sigmoid(BETA * (w - v)),
    ),
    "discopop": (
        discopop_loss,
        dict(tau=TAU),
        lambda w, v: (
            sigmoid(-BETA * (w - v) / TAU) * -log_sigmoid(BETA * (w - v))
            + sigmoid(BETA * (w - v) / TAU) * np.exp(-BETA * (w - v))
        ),
    ),
    "bco_pair": (
        bco_pair_loss,
        {},
        lambda w, v: -log_sigmoid(BETA * w) - log_sigmoid(-BETA * v),
    ),
}


@jax.jit
def evaluate(chosen, rejected, ref_chosen, ref_rejected, beta=BETA):
    """Units of every pair loss, and the gradients of their sums in all four arrays."""
    out = {}
    for name, (loss, options, _) in PAIRS.items():
        both = lambda *a, loss=loss, options=options: (
            (units := loss(*a, beta=beta, reduction="none", **options)).sum(),
            units,
        )
        gradient = jax.value_and_grad(both, argnums=(0, 1, 2, 3), has_aux=True)
        (_, units), slopes = gradient(chosen, rejected, ref_chosen, ref_rejected)
        out[name] = units, slopes
    return out


def draws(seed=0, scale=10.0):
    return scale * np.random.default_rng(seed).standard_normal((4, 6))


def test_every_pair_loss_is_its_published_formula_in_float64():
    chosen, rejected, ref_chosen, ref_rejected = data = draws()
    with jax.enable_x64(True):
        got = jax.device_get(evaluate(*data))
    for name, (_, _, formula) in PAIRS.items():
        expected = formula(chosen - ref_chosen, rejected - ref_rejected)
        np.testing.assert_allclose(got[name][0], expected, rtol=1e-12, err_msg=name)


def test_slopes_of_every_pair_loss_are_those_of_the_formula_and_the_reference_has_none():
    chosen, rejected, ref_chosen, ref_rejected = data = draws(1)
    with jax.enable_x64(True):
        got = jax.device_get(evaluate(*data))
    w, v, h = chosen - ref_chosen, rejected - ref_rejected, 1e-5
    for name, (_, _, formula) in PAIRS.items():
        _, (in_chosen, in_rejected, in_ref_chosen, in_ref_rejected) = got[name]
        slope_w = (formula(w + h, v) - formula(w - h, v)) / (2 * h)
        slope_l = (formula(w, v + h) - formula(w, v - h)) / (2 * h)
        np.testing.assert_allclose(in_chosen, slope_w, rtol=1e-6, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(in_rejected, slope_l, rtol=1e-6, atol=1e-8, err_msg=name)
        assert not in_ref_chosen.any(), name
        assert not in_ref_rejected.any(), name


@pytest.mark.parametrize("beta", [0.1, 1e3])
def test_log_ratios_of_any_size_leave_values_and_gradients_finite(beta):
    size = np.array([1e4, -1e4, 1e5, -1e5, 0, 1], np.float32) / np.float32(10 * beta)
    zero = np.zeros_like(size)
    for pair in ((size, zero), (zero, size), (size, -size)):
        got = jax.device_get(evaluate(*pair, zero, zero, beta=np.float32(beta)))
        for name, tree in got.items():
            for leaf in jax.tree.leaves(tree):
                assert np.all(np.isfinite(leaf)), name


def test_a_hopeless_pair_still_pulls_with_full_strength():
    far = np.full(6, -500, np.float32)
    got = jax.device_get(evaluate(far, 0 * far, 0 * far, 0 * far))
    assert got["dpo"][0][0] == 50
    assert got["dpo"][1][0][0] == -np.float32(BETA)


def test_discopop_far_on_the_wrong_side_is_logistic_and_not_nan():
    far = np.full(6, -1000, np.float32)
    units, (slope, *_) = jax.device_get(evaluate(far, 0 * far, 0 * far, 0 * far))["discopop"]
    assert units[0] == 100
    np.testing.assert_allclose(slope, -BETA, rtol=1e-6)


def test_the_hinge_has_no_slope_at_its_kink():
    edge, zero = np.full(6, 10, np.float32), np.zeros(6, np.float32)
    units, (slope, *_) = jax.device_get(evaluate(edge, zero, zero, zero))["hinge"]
    assert not units.any()
    assert not slope.any()


def test_robust_dpo_averaged_over_flipped_labels_is_dpo_on_the_true_ones():
    data = draws(2).astype(np.float32)
    flipped = data[[1, 0, 3, 2]]
    true, wrong = jax.device_get((evaluate(*data), evaluate(*flipped)))
    average = (1 - E) * true["robust"][0] + E * wrong["robust"][0]
    np.testing.assert_allclose(average, true["dpo"][0], rtol=1e-5)


def test_the_length_normalized_loss_is_dpo_itself():
    assert dpo_length_normalized_loss is dpo_loss


@pytest.mark.parametrize(
    ("loss", "exact"),
    [
        (exo_pair_loss, lambda x, e: kl_of_logits(x, mp.log(1 - e) - mp.log(e))),
        (apo_down_loss, None),
    ],
    ids=["exo", "apo_down"],
)
def test_losses_with_an_interior_optimum_keep_their_digits_around_it(loss, exact):
    logit = float(np.log1p(-1e-3) - np.log(1e-3))
    w = np.array([-30, -3, -0.1, -1e-3, 0, 1e-4, 0.2, 4, logit, logit + 1e-3, 12, 30], np.float32)
    v = np.linspace(-2, 2, len(w)).astype(np.float32) * (exact is None)
    call = lambda w, v, **options: loss(w, v, 0 * w, 0 * w, beta=1.0, **options)
    if exact is None:
        formula = lambda w, v: 1 / (1 + mp.exp(-w)) + 1 / (1 + mp.exp(w - v))
    else:
        formula = lambda w, v: exact(w - v, mp.mpf(float(np.float32(1e-3))))
    off = units_off(call, formula, w, v)
    assert off["value"][0] <= 8, off
    slopes = jax.grad(lambda w: call(w, jnp.asarray(v), reduction="sum"))(jnp.asarray(w))
    with mp.workdps(40):
        for x, y, slope in zip(w, v, np.asarray(slopes), strict=True):
            true = float(mp.diff(lambda t, y=y: formula(t, mp.mpf(float(y))), mp.mpf(float(x))))
            assert abs(slope - true) <= 1e-5 * abs(true) + 1e-9


def kl_of_logits(x, target):
    q, p = 1 / (1 + mp.exp(-x)), 1 / (1 + mp.exp(-target))
    rest = 1 / (1 + mp.exp(x))
    return q * mp.log(q / p) + rest * mp.log(rest * (1 + mp.exp(target)))


def test_apo_down_at_the_start_of_training_moves_only_the_rejected_one():
    zero = np.zeros(6, np.float32)
    _, (chosen, rejected, *_) = jax.device_get(evaluate(zero, zero, zero, zero))["apo_down"]
    assert not chosen.any()
    np.testing.assert_allclose(rejected, BETA / 4)


def test_wrong_smoothings_are_named_by_checked():
    one = jnp.ones(1)
    with pytest.raises(Exception, match="label_smoothing: expected a value below 1/2"):
        checked(robust_dpo_loss)(one, one, one, one, label_smoothing=0.5)
    with pytest.raises(Exception, match=r"label_smoothing: expected a value in \(0, 1\)"):
        checked(exo_pair_loss)(one, one, one, one, label_smoothing=0.0)


def test_the_implicit_reward_is_scaled_and_has_no_gradient():
    reward = lambda x: implicit_reward(x, jnp.array([-5.0, -1.0]), beta=0.5)
    np.testing.assert_allclose(reward(jnp.array([-3.0, -2.0])), [1, -0.5])
    assert not jax.jacobian(reward)(jnp.ones(2)).any()


# Ranks


def sorted_gaps(paired, w, v, ref_w, ref_v):
    """Both distributions in the order of their ranks."""
    if paired:
        return np.sort(w - v) - np.sort(ref_w - ref_v)
    return np.sort(w - ref_w) - np.sort(v - ref_v)


@pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
def test_optimal_transport_compares_ranks_of_the_pairs_that_count(loss):
    data = draws(14)
    kept = np.array([True, True, False, True, False, True])
    w, v, ref_w, ref_v = data[:, kept]
    gap = sorted_gaps(loss is aot_loss, w, v, ref_w, ref_v)
    dirty = np.where(kept, data, np.nan)
    with jax.enable_x64(True):
        units = loss(*dirty, where=kept, label_smoothing=E, reduction="none")
        mean, slopes = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*dirty, where=kept)
        units, mean, slopes = jax.device_get((units, mean, slopes))
    np.testing.assert_allclose(np.sort(units[kept]), np.sort(smoothed(BETA * gap)), rtol=1e-12)
    np.testing.assert_allclose(mean, -log_sigmoid(BETA * gap).mean(), rtol=1e-12)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    assert np.all(slopes[0][kept] < 0)
    assert np.all(slopes[1][kept] > 0)
    assert not any(slope.any() for slope in slopes[2:])


def test_unpaired_transport_does_not_see_which_completions_are_paired():
    w, v, ref_w, ref_v = draws(15)
    order = np.random.default_rng(0).permutation(6)
    apart = aot_unpaired_loss(w, v[order], ref_w, ref_v[order])
    np.testing.assert_allclose(apart, aot_unpaired_loss(w, v, ref_w, ref_v), rtol=1e-6)


def test_where_the_ranks_agree_optimal_transport_is_dpo():
    order = np.arange(6.0)
    data = (3 * order, 0 * order, order, 0 * order)
    np.testing.assert_allclose(aot_loss(*data), dpo_loss(*data), rtol=1e-6)


# Single completions


def test_kto_is_its_formula_with_both_weights():
    log_probs, ref = draws(3)[:2]
    good = np.array([True, False, True, True, False, False])
    d, z = log_probs - ref, 1.5
    expected = np.where(good, 2 * sigmoid(-BETA * (d - z)), 0.5 * sigmoid(-BETA * (z - d)))
    options = dict(desirable_weight=2.0, undesirable_weight=0.5, reduction="none")
    with jax.enable_x64(True):
        got = kto_loss(log_probs, ref, good, z, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("good", [True, False])
def test_kto_of_a_batch_with_one_class_is_finite(good):
    x = jnp.array([1.0, -2.0, 3e4])
    slope = jax.grad(kto_loss)(x, 0 * x, jnp.full(3, good), 0.0)
    assert np.all(np.isfinite(slope))
    assert np.any(slope != 0)


def test_the_reference_point_of_kto_is_at_least_zero_and_has_no_gradient():
    x = jnp.array([3.0, 1.0, jnp.nan])
    where = jnp.array([True, True, False])
    assert kto_reference_kl(x, jnp.zeros(3), where=where) == 2
    assert kto_reference_kl(-x, jnp.zeros(3), where=where) == 0
    assert kto_reference_kl(x, jnp.zeros(3), where=jnp.zeros(3, bool)) == 0
    assert not jax.grad(lambda x: kto_reference_kl(x, 0 * x))(jnp.ones(3)).any()
    loss = lambda z: kto_loss(jnp.ones(1), jnp.zeros(1), jnp.array([True]), z)
    assert jax.grad(loss)(1.0) == 0


def test_the_reference_point_of_kto_weighs_devices_by_their_pairs():
    x = jnp.array([[1.0, 2.0], [6.0, 0.0]])
    where = jnp.array([[True, True], [True, False]])
    over = jax.vmap(
        lambda x, w: kto_reference_kl(x, 0 * x, where=w, axis_name="data"), axis_name="data"
    )
    np.testing.assert_allclose(over(x, where), 3)


def test_desirable_must_be_bool():
    with pytest.raises(TypeError, match="kto_loss: desirable: expected a bool array, got int32"):
        kto_loss(jnp.ones(2), jnp.ones(2), jnp.array([0, 1]), 0.0)


def bco(batches, momentum):
    """Losses and rewards' mean after each batch, in numpy."""
    total = count = 0.0
    out = []
    for log_probs, good in batches:
        rewards = BETA * log_probs
        fade = 1 if momentum is None else momentum
        total, count = fade * total + rewards.sum(), fade * count + len(rewards)
        gap = rewards - total / count
        out.append(-log_sigmoid(np.where(good, gap, -gap)).mean())
    return out


@pytest.mark.parametrize("momentum", [0.75, None])
def test_bco_keeps_a_running_mean_of_all_rewards_over_several_batches(momentum):
    batches = list(zip(draws(4)[:3], np.random.default_rng(5).random((3, 6)) < 0.5, strict=True))
    with jax.enable_x64(True):
        state, losses = bco_init(), []
        for log_probs, good in batches:
            loss, state = bco_loss(log_probs, 0 * log_probs, good, state, momentum=momentum)
            losses.append(float(loss))
    assert state.dtype == jnp.float32
    np.testing.assert_allclose(losses, bco(batches, momentum), rtol=1e-6)


def test_the_running_mean_of_bco_ignores_hidden_completions_and_empty_batches():
    x, good = jnp.array([10.0, 30.0, jnp.nan]), jnp.array([True, False, True])
    kept = jnp.array([True, True, False])
    loss, state = bco_loss(x, jnp.zeros(3), good, bco_init(), where=kept)
    np.testing.assert_allclose(loss, np.logaddexp(0, 1), rtol=1e-6)
    np.testing.assert_allclose(state, [4, 2], rtol=1e-6)
    loss, after = bco_loss(x, jnp.zeros(3), good, state, where=jnp.zeros(3, bool), momentum=0.5)
    assert loss == 0
    np.testing.assert_allclose(after[0] / after[1], 2)


def test_bco_over_two_devices_is_that_of_the_whole_batch():
    x, good = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, False], [True, True]])
    whole = bco_loss(x.ravel(), jnp.zeros(4), good.ravel(), bco_init(), reduction="none")
    over = jax.vmap(
        lambda x, g: bco_loss(x, 0 * x, g, bco_init(), reduction="none", axis_name="data"),
        axis_name="data",
    )
    units, state = over(x, good)
    np.testing.assert_allclose(units.ravel(), whole[0], rtol=1e-6)
    np.testing.assert_allclose(state, np.stack([whole[1]] * 2), rtol=1e-6)


# Without a reference


def odds_cost(w, v):
    return mp.log1p(mp.exp(v - w) * mp.expm1(w) / mp.expm1(v))


def test_orpo_keeps_its_digits_up_to_probabilities_of_almost_one():
    w = [-1e-9, -1e-9, -2.0, -1e-9, -0.5, -1e-3, -20.0, -1e-3, -80.0, -1e-30, -0.7, -3.0]
    v = [-2.0, -1.0000001e-9, -1e-9, -3e-9, -0.5, -1e-3, -1e-3, -20.0, -3.0, -1e-12, -0.71, -80.0]
    call = lambda w, v, **options: orpo_loss(w, v, beta=1.0, nll_weight=0.0, **options)
    off = units_off(call, odds_cost, w, v)
    assert max(worst for worst, _ in off.values()) <= 8, off


def test_orpo_of_an_almost_certain_rejected_completion_is_large_and_finite():
    loss = lambda v: orpo_loss(jnp.array([jnp.log(0.5)]), v, beta=1.0, nll_weight=0.0)
    value, slope = jax.value_and_grad(loss)(jnp.array([-1e-9]))
    np.testing.assert_allclose(value, -np.log(1e-9), rtol=1e-6)
    np.testing.assert_allclose(slope, 1e9, rtol=1e-6)


def test_orpo_of_certain_completions_is_never_nan():
    w, v = jnp.array([0.0, 0.0, -1.0, 0.0]), jnp.array([-1.0, 0.0, 0.0, -jnp.inf])
    values = orpo_loss(w, v, beta=1.0, nll_weight=0.0, reduction="none")
    np.testing.assert_allclose(values, [0, np.log(2), np.inf, 0], rtol=1e-6)
    slopes = jax.grad(lambda w, v: orpo_loss(w, v, reduction="sum"), argnums=(0, 1))(w, v)
    assert np.all(np.isfinite(slopes))
    p = np.exp(-1)
    np.testing.assert_allclose(slopes[0][0], -1 - 0.1 * p / (1 - p), rtol=1e-6)


def test_the_odds_of_summed_log_probabilities_vanish_so_that_only_their_ratio_is_left():
    w, v = jnp.array([-100.0]), jnp.array([-98.0])
    odds = orpo_loss(w, v, beta=1.0, nll_weight=0.0)
    np.testing.assert_allclose(odds, cpo_loss(w, v, beta=1.0), rtol=1e-6)


def test_cpo_is_dpo_with_a_reference_of_zeros():
    w, v, *_ = draws(6).astype(np.float32)
    ours = cpo_loss(w, v, label_smoothing=0.2)
    np.testing.assert_allclose(ours, dpo_loss(w, v, 0 * w, 0 * w, label_smoothing=0.2), rtol=1e-6)


def test_simpo_is_the_form_of_trl_with_gamma_over_beta_inside():
    w, v = -np.random.default_rng(7).random((2, 6)) * 3
    inside = lambda beta, gamma: -log_sigmoid(beta * (w - v - gamma / beta)).mean()
    with jax.enable_x64(True):
        np.testing.assert_allclose(simpo_loss(w, v), inside(2, 1), rtol=1e-12)
        np.testing.assert_allclose(
            simpo_loss(w, v, beta=0.1, gamma=0.5), inside(0.1, 0.5), rtol=1e-12
        )


def test_alphapo_rewards_bend_from_the_log_probability_without_a_jump():
    v = -np.random.default_rng(8).random(6) * 3
    with jax.enable_x64(True):
        bent = alphapo_rewards(v, alpha=0.5)
        np.testing.assert_allclose(bent, (1 - np.exp(v) ** -0.5) / 0.5, rtol=1e-12)
        np.testing.assert_allclose(alphapo_rewards(v, alpha=1e-9), v, rtol=1e-8)
        np.testing.assert_allclose(alphapo_rewards(v, alpha=0.0), v, rtol=1e-12)
    assert np.all(np.isfinite(alphapo_rewards(jnp.array([-1e4, 0.0]))))


def test_bradley_terry_takes_a_margin_for_each_pair_and_centres():
    w, v = draws(9, 1.0)[:2]
    margin = np.arange(6) / 4
    expected = -log_sigmoid(w - v - margin) + 0.01 * (w + v) ** 2
    with jax.enable_x64(True):
        got = bradley_terry_loss(w, v, margin=margin, centering=0.01, reduction="none")
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="bradley_terry_loss: margin: expected a scalar or shape"):
        bradley_terry_loss(w, v, margin=np.ones(5))
    hidden = np.where(np.arange(6) == 2, np.nan, margin)
    assert np.isfinite(bradley_terry_loss(w, v, margin=hidden, where=np.arange(6) != 2))


def test_two_answers_of_plackett_luce_are_bradley_terry():
    w, v = draws(10, 30.0)[:2].astype(np.float32)
    ranked = plackett_luce_loss(np.stack([w, v], -1), reduction="none")
    np.testing.assert_allclose(ranked, bradley_terry_loss(w, v, reduction="none"), rtol=1e-6)


def test_plackett_luce_draws_one_answer_after_the_other_from_those_that_exist():
    rewards = draws(11, 3.0)
    kept = np.random.default_rng(12).random(rewards.shape) < 0.6
    kept[0] = False
    expected = []
    for row, exists in zip(rewards, kept, strict=True):
        left = row[exists]
        expected.append(sum(np.log(np.exp(left[i:]).sum()) - left[i] for i in range(len(left))))
    hidden = np.where(kept, rewards, np.nan)
    with jax.enable_x64(True):
        got = plackett_luce_loss(hidden, where=kept, reduction="none")
        mean = plackett_luce_loss(hidden, where=kept)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(mean, np.sum(expected) / 3, rtol=1e-12)


def test_plackett_luce_of_rewards_far_apart_is_exact():
    value, slope = jax.value_and_grad(plackett_luce_loss)(jnp.array([-1e4, 1e4, 0.0]))
    assert value == 2e4
    np.testing.assert_array_equal(slope, [-1, 1, 0])


def test_f_divergence_scores_are_the_slopes_of_the_divergences():
    d = draws(13, 1.0)[0]
    expected = {
        "reverse_kl": d,
        "forward_kl": -np.exp(-d),
        "js": log_sigmoid(d),
        "alpha": (np.exp(-0.5 * d) - 1) / -0.5,
    }
    with jax.enable_x64(True):
        for name, value in expected.items():
            got = f_divergence_scores(d, divergence=name)
            np.testing.assert_allclose(got, value, rtol=1e-12, err_msg=name)
        near = f_divergence_scores(d, divergence="alpha", alpha=1 + 1e-9)
        np.testing.assert_allclose(near, d, rtol=1e-8)
        at_one = f_divergence_scores(d, divergence="alpha", alpha=1.0)
        np.testing.assert_allclose(at_one, d, rtol=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_f_divergence_scores_of_any_log_ratio_are_finite_with_finite_slopes(divergence):
    d = jnp.array([1e4, -1e4, 300.0, -300.0, 0.0])
    total = lambda d: f_divergence_scores(d, divergence=divergence).sum()
    assert np.all(np.isfinite(jax.value_and_grad(total)(d)[1]))
    assert np.isfinite(total(d))


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="f_divergence_scores: divergence: expected one of"):
        f_divergence_scores(jnp.ones(1), divergence="hellinger")


LOG_RATIOS = arrays(np.float32, (6,), elements=st.integers(-400, 400).map(lambda n: n / 8))


@settings(deadline=None, max_examples=25)
@given(chosen=LOG_RATIOS, rejected=LOG_RATIOS, shift=st.integers(-40, 40))
def test_pair_losses_fall_in_the_margin_and_do_not_see_a_shift_of_both(chosen, rejected, shift):
    zero = np.zeros(6, np.float32)
    plain, moved = jax.device_get(
        (
            evaluate(chosen, rejected, zero, zero),
            evaluate(chosen + shift, rejected + shift, zero, zero),
        )
    )
    for name in ("dpo", "cdpo", "robust", "hinge", "ipo", "exo", "discopop"):
        np.testing.assert_array_equal(plain[name][0], moved[name][0])
    for name in ("dpo", "hinge"):
        assert np.all(plain[name][1][0] <= 0)
        assert np.all(plain[name][1][1] >= 0)
    for name in ("dpo", "cdpo", "hinge", "ipo", "exo", "nca", "sppo", "apo_zero", "apo_down"):
        assert np.all(plain[name][0] >= 0), name
