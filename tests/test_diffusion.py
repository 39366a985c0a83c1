"""Diffusion losses: forms and their weights, ends of the schedule, robust and masked forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss import normalized_sum
from jaxloss.losses.diffusion import (
    consistency_loss,
    diffusion_loss,
    epsilon_from_x0,
    masked_diffusion_loss,
    pseudo_huber_diffusion_loss,
    velocity_target,
    x0_from_epsilon,
    x0_from_velocity,
)
from jaxloss.losses.diffusion_weights import (
    cosmap_weight,
    edm_weight,
    logit_normal_density_weight,
    min_snr_epsilon_weight,
    min_snr_velocity_weight,
    min_snr_x0_weight,
    p2_epsilon_weight,
    sigma_sqrt_weight,
)

NONE = dict(reduction="none")
ANGLES = np.linspace(0.1, 1.4, 5)


def draw(*shape, count=2, seed=0, dtype=np.float32):
    g = np.random.default_rng(seed)
    return tuple(g.standard_normal(shape).astype(dtype) for _ in range(count))


def test_conversions_invert_one_another():
    x0, noise = draw(5, 2, 3, dtype=np.float64)
    schedule = dict(alpha=1.3 * np.cos(ANGLES), sigma=1.3 * np.sin(ANGLES))
    alpha, sigma = (a[:, None, None] for a in schedule.values())
    x_t = alpha * x0 + sigma * noise
    with jax.enable_x64(True):
        velocity = velocity_target(x0, noise, **schedule)
        np.testing.assert_allclose(velocity, alpha * noise - sigma * x0, rtol=1e-14)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
        close(x0_from_velocity(x_t, velocity, **schedule), x0)
        close(x0_from_epsilon(x_t, noise, **schedule), x0)
        close(epsilon_from_x0(x_t, x0, **schedule), noise)
        close(epsilon_from_x0(x_t, x0_from_epsilon(x_t, noise, **schedule), **schedule), noise)
        close(x0_from_epsilon(x_t[0], noise[0], alpha=0.6, sigma=0.8), (x_t - 0.8 * noise)[0] / 0.6)


def test_the_ends_of_a_schedule_divide_by_nothing():
    x, prediction = draw(2, 3)
    ends = dict(alpha=np.float32([0, 1]), sigma=np.float32([1, 0]))
    for convert, row in ((x0_from_epsilon, 0), (epsilon_from_x0, 1)):
        total = lambda *a, convert=convert: convert(*a, **ends).sum()
        value, slopes = jax.value_and_grad(total, argnums=(0, 1))(x, prediction)
        assert np.isfinite(value)
        np.testing.assert_array_equal(convert(x, prediction, **ends)[row], 0)
        for slope in slopes:
            np.testing.assert_array_equal(slope[row], 0)
    # The velocity tells the clean sample at both ends: -v of noise alone, x itself without noise.
    got = x0_from_velocity(x, prediction, **ends)
    np.testing.assert_array_equal(got, [-prediction[0], x[1]])


def test_a_schedule_is_one_number_or_one_for_each_sample():
    x, prediction = draw(3, 4)
    with pytest.raises(ValueError, match=r"x0_from_epsilon: alpha: expected a scalar or shape \(3"):
        x0_from_epsilon(x, prediction, alpha=np.ones(4, np.float32), sigma=1.0)
    with pytest.raises(ValueError, match="velocity_target: noise: expected shape"):
        velocity_target(x, prediction[:1], alpha=1.0, sigma=1.0)
    for bad in (np.ones(2, np.float32), np.ones((3, 1), np.float32)):
        with pytest.raises(ValueError, match="diffusion_loss: timestep_weight: expected a scalar"):
            diffusion_loss(x, prediction, timestep_weight=bad)
    with pytest.raises(ValueError, match=r"diffusion_loss: where: expected shape \(3,\)"):
        diffusion_loss(x, prediction, where=np.ones((3, 4), bool))
    with pytest.raises(ValueError, match="diffusion_loss: pred: expected at least 2 axes"):
        diffusion_loss(x[0], prediction[0])


def test_the_three_forms_of_one_error_agree_under_their_min_snr_weights():
    x0, noise, guess = draw(5, 6, count=3, dtype=np.float64)
    schedule = dict(alpha=np.cos(ANGLES), sigma=np.sin(ANGLES))
    snr = (schedule["alpha"] / schedule["sigma"]) ** 2
    assert snr.min() < 2 < snr.max()
    with jax.enable_x64(True):
        x_t = schedule["alpha"][:, None] * x0 + schedule["sigma"][:, None] * noise
        epsilon = epsilon_from_x0(x_t, guess, **schedule)
        velocity = velocity_target(guess, epsilon, **schedule)
        target = velocity_target(x0, noise, **schedule)
        of = lambda weight, a, b: diffusion_loss(a, b, timestep_weight=weight, **NONE)
        x0_form = of(min_snr_x0_weight(snr, gamma=2.0), guess, x0)
        epsilon_form = of(min_snr_epsilon_weight(snr, gamma=2.0), epsilon, noise)
        velocity_form = of(min_snr_velocity_weight(snr, gamma=2.0), velocity, target)
        np.testing.assert_allclose(epsilon_form, x0_form, rtol=1e-11)
        np.testing.assert_allclose(velocity_form, x0_form, rtol=1e-11)


def test_a_sample_is_averaged_first_and_then_weighted():
    pred, target = draw(3, 4, 2)
    where = np.array([[True] * 4, [True, False, False, False], [False] * 4])
    weight = np.float32([2, 3, np.nan])  # of a sample that is hidden
    units = np.array(
        [2 * ((pred - target)[0] ** 2).mean(), 3 * ((pred - target)[1, 0] ** 2).mean()]
    )
    value, slope = jax.value_and_grad(diffusion_loss)(
        pred, target, timestep_weight=weight, where=where
    )
    np.testing.assert_allclose(value, units.mean(), rtol=1e-6)  # not divided by 2 + 3
    np.testing.assert_array_equal(slope[~where], 0)
    assert np.all(np.isfinite(slope))
    got = diffusion_loss(pred, target, weights=np.float32([2, 3, 1]), where=where)
    np.testing.assert_allclose(got, units.sum() / 5, rtol=1e-6)  # weights are


def test_a_bfloat16_prediction_is_compared_in_float32():
    pred, target = draw(4, 5, 3)
    low = jnp.asarray(pred, jnp.bfloat16)
    got, slope = jax.value_and_grad(diffusion_loss)(low, target)
    exact = ((np.asarray(low, np.float64) - target) ** 2).mean()
    np.testing.assert_allclose(got, exact, rtol=1e-6)
    assert (got.dtype, slope.dtype) == (jnp.float32, jnp.bfloat16)


def test_min_snr_weights_are_the_formula_and_one_at_zero_terminal_snr():
    snr = np.float32([0, 1e-30, 1e-3, 1, 5, 80, 1e30, np.inf])
    wide = snr[1:-1].astype(float)
    capped = np.minimum(wide, 5)
    inner = lambda weight: weight(snr)[1:-1]
    np.testing.assert_allclose(inner(min_snr_epsilon_weight), capped / wide, rtol=3e-7)
    np.testing.assert_allclose(inner(min_snr_x0_weight), capped, rtol=3e-7)
    np.testing.assert_allclose(inner(min_snr_velocity_weight), capped / (wide + 1), rtol=3e-7)
    ends = [
        np.asarray(weight(snr))[[0, -1]]
        for weight in (
            min_snr_epsilon_weight,
            min_snr_x0_weight,
            min_snr_velocity_weight,
            p2_epsilon_weight,
        )
    ]
    np.testing.assert_array_equal(ends, [[1, 0], [0, 5], [0, 0], [1, 0]])
    for weight in (min_snr_epsilon_weight, min_snr_x0_weight, min_snr_velocity_weight):
        slope = jax.grad(lambda s, weight=weight: weight(s)[:-1].sum())(snr)
        assert np.all(np.isfinite(slope[:-1]))
    np.testing.assert_array_equal(min_snr_epsilon_weight(snr, gamma=np.inf), 1)  # no weighting


def test_p2_and_edm_weights_are_their_formulas():
    grid = np.geomspace(2e-3, 80, 9).astype(np.float32)
    wide = grid.astype(float)
    got = p2_epsilon_weight(grid, k=0.5, gamma=0.7)
    np.testing.assert_allclose(got, (0.5 + wide) ** -0.7, rtol=1e-6)
    np.testing.assert_array_equal(p2_epsilon_weight(grid, gamma=0.0), 1)
    data = 0.5
    got = edm_weight(grid, sigma_data=data)
    np.testing.assert_allclose(got, (wide**2 + data**2) / (wide * data) ** 2, rtol=5e-7)
    # It makes the loss of EDM's network, whose output is scaled by c_out, one of unit weight.
    c_out = wide * data / np.sqrt(wide**2 + data**2)
    np.testing.assert_allclose(got * c_out**2, 1, rtol=5e-7)


def test_weights_of_stable_diffusion_3_are_those_of_diffusers():
    sigma = np.linspace(0.02, 1, 11).astype(np.float32)
    wide = sigma.astype(float)
    np.testing.assert_allclose(sigma_sqrt_weight(sigma), wide**-2.0, rtol=5e-7)
    bottom = 1 - 2 * wide + 2 * wide**2
    np.testing.assert_allclose(cosmap_weight(sigma), 2 / (math.pi * bottom), rtol=5e-7)


def test_the_logit_normal_density_integrates_to_one_and_vanishes_at_both_ends():
    t = (np.arange(4000) + 0.5) / 4000
    with jax.enable_x64(True):
        for mean, std in ((0.0, 1.0), (-0.8, 0.6)):
            density = np.asarray(logit_normal_density_weight(t, mean=mean, std=std))
            np.testing.assert_allclose(density.mean(), 1, rtol=1e-6)
            logit = np.log(t / (1 - t))
            np.testing.assert_allclose((density * logit).mean(), mean, atol=1e-6)
            np.testing.assert_allclose((density * (logit - mean) ** 2).mean(), std**2, rtol=1e-6)
    ends, slope = jax.vmap(jax.value_and_grad(logit_normal_density_weight))(np.float32([0, 1]))
    np.testing.assert_array_equal([ends, slope], 0)


def test_weights_keep_shape_and_dtype_rules():
    for weight in (min_snr_epsilon_weight, edm_weight, cosmap_weight, logit_normal_density_weight):
        out = weight(jnp.full((2, 1), 0.5, jnp.float16))
        assert (out.shape, out.dtype) == ((2, 1), jnp.float32)
    with pytest.raises(TypeError, match="edm_weight: sigma: expected a floating dtype"):
        edm_weight(jnp.ones(2, int))
    with pytest.raises(ValueError, match="min_snr_x0_weight: gamma: expected a scalar"):
        min_snr_x0_weight(jnp.ones(2), gamma=jnp.ones(2))


def test_pseudo_huber_becomes_the_diffusion_loss_for_large_c_and_nothing_at_zero():
    pred, target = draw(3, 2, 4)
    plain = diffusion_loss(pred, target, **NONE)
    for c in (1e6, 1e30, np.inf):
        got = pseudo_huber_diffusion_loss(pred, target, c=c, **NONE)
        np.testing.assert_allclose(got, plain, rtol=1e-6)
    value, slope = jax.value_and_grad(pseudo_huber_diffusion_loss)(pred, target, c=0.0)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def test_pseudo_huber_takes_a_c_of_each_sample_and_keeps_its_digits():
    pred, target = draw(4, 3)
    target[1] = pred[1] + 1e-4 * target[1]
    target[2] = pred[2] + 1e4 * target[2]
    c = np.float32([0.1, 0.5, 2, 1])
    error, wide = (pred - target).astype(float), c.astype(float)[:, None]
    root = np.sqrt(error**2 + wide**2)
    exact = (2 * wide * error**2 / (root + wide)).mean(1)
    loss = lambda p, c: pseudo_huber_diffusion_loss(p, target, c=c, **NONE)
    np.testing.assert_allclose(loss(pred, c), exact, rtol=5e-7)
    of_pred, of_c = jax.grad(lambda *a: loss(*a).sum(), argnums=(0, 1))(pred, c)
    np.testing.assert_allclose(of_pred, 2 * wide * error / root / 3, rtol=1e-6)
    np.testing.assert_allclose(of_c, (2 * (root - wide) ** 2 / root).mean(1), rtol=1e-4)
    bend = jax.hessian(lambda p: pseudo_huber_diffusion_loss(p[None], p[None] * 0, c=0.3))
    np.testing.assert_allclose(bend(jnp.zeros(2)), np.eye(2), rtol=1e-6)  # 2 / D


def test_consistency_is_the_norm_at_c_zero_and_smooth_above():
    student, teacher = draw(3, 2, 4)
    norm = np.linalg.norm((student - teacher).astype(float).reshape(3, -1), axis=1)
    c = 0.00054 * math.sqrt(8)
    got = [consistency_loss(student, teacher, c=x, **NONE) for x in (0.0, c)]
    np.testing.assert_allclose(got, [norm, np.sqrt(norm**2 + c**2) - c], rtol=5e-7)
    weight = np.float32([1, 2, 3])
    got = consistency_loss(student, teacher, timestep_weight=weight)
    np.testing.assert_allclose(got, (weight * norm).mean(), rtol=5e-7)


def test_consistency_at_equality_has_gradient_zero_and_a_finite_hessian():
    point = jnp.float32([1, -2])
    for c in (0.0, 0.25):
        loss = lambda s, c=c: consistency_loss(s[None], point[None], c=c)
        np.testing.assert_array_equal(jax.grad(loss)(point), 0)
        np.testing.assert_allclose(jax.hessian(loss)(point), np.eye(2) / c if c else 0, rtol=1e-6)


def test_the_teacher_carries_no_gradient_and_hidden_positions_no_distance():
    student, teacher = draw(2, 3, 4)
    where = np.array([[True, False, True], [False] * 3])
    student[~where] = np.nan
    value, slopes = jax.value_and_grad(consistency_loss, argnums=(0, 1))(
        student, teacher, c=0.5, where=where
    )
    norm = np.linalg.norm((student - teacher)[0, [0, 2]])
    np.testing.assert_allclose(value, np.sqrt(norm**2 + 0.25) - 0.5, rtol=1e-6)
    np.testing.assert_array_equal(slopes[1], 0)
    np.testing.assert_array_equal(slopes[0][~where], 0)


def test_large_samples_do_not_overflow_the_norm():
    far = np.full((1, 3), 1e25, np.float32)
    value, slope = jax.value_and_grad(consistency_loss)(far, 0 * far, c=1.0)
    np.testing.assert_allclose(value, 1e25 * math.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(slope, 1 / math.sqrt(3), rtol=1e-6)


TOKENS = dict(mask_id=3, alpha_derivative=-1.0)


def exact_nll(logits, tokens, mask_id):
    kept = np.delete(logits.astype(float), mask_id, axis=-1)
    own = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return np.log(np.exp(kept).sum(-1)) - own


def test_masked_diffusion_is_the_exact_likelihood_in_expectation_for_one_token():
    logits, _ = draw(1, 1, 5)
    tokens = np.array([[1]])
    shown, masked = (np.full((1, 1), m) for m in (False, True))
    for alpha in (0.1, 0.5, 0.9):  # masked with probability 1 - alpha
        hit, missed = (
            masked_diffusion_loss(logits, tokens, alpha=alpha, where=w, **TOKENS)
            for w in (masked, shown)
        )
        assert missed == 0
        expectation = (1 - alpha) * hit + alpha * missed
        np.testing.assert_allclose(expectation, exact_nll(logits, tokens, 3)[0, 0], rtol=1e-6)


def test_a_sequence_without_a_masked_token_still_counts_as_a_unit():
    logits, _ = draw(4, 3, 5)
    tokens = np.random.default_rng(1).integers(0, 3, (4, 3))
    where = np.array([[True, False, True], [False] * 3, [True] * 3, [False] * 3])
    alpha = np.float32([0.5, 1, 0.25, np.nan])
    loss = lambda logits, **tail: masked_diffusion_loss(
        logits, tokens, alpha=alpha, where=where, **TOKENS, **tail
    )
    costs = np.where(where, exact_nll(logits, tokens, 3), 0).sum(1)
    units = [costs[0] / 0.5, 0, costs[2] / 0.75, 0]
    np.testing.assert_allclose(loss(logits, **NONE), units, rtol=1e-6)
    value, slope = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, np.sum(units) / 4, rtol=1e-6)
    np.testing.assert_array_equal(slope[~where], 0)
    got = loss(logits, weights=np.float32([1, 1, 1, 0]))  # the last one is padding
    np.testing.assert_allclose(got, np.sum(units) / 3, rtol=1e-6)
    np.testing.assert_allclose(loss(logits, reduction=normalized_sum(4)), value, rtol=1e-6)


def test_nothing_is_masked_at_time_zero_and_nothing_divides_by_zero():
    logits, _ = draw(2, 3, 5)
    tokens = np.zeros((2, 3), int)
    value, slope = jax.value_and_grad(masked_diffusion_loss)(
        logits, tokens, alpha=1.0, where=np.zeros((2, 3), bool), **TOKENS
    )
    assert value == 0
    np.testing.assert_array_equal(slope, 0)


def test_the_class_of_the_mask_has_no_probability_and_is_no_token():
    logits, _ = draw(1, 2, 4)
    tokens = np.array([[2, 1]])
    options = dict(alpha=0.5, alpha_derivative=-0.5)
    both = lambda *a, **o: jax.value_and_grad(masked_diffusion_loss)(*a, **options, **o)
    value, slope = both(logits, tokens, mask_id=0)
    less, of_less = both(logits[..., 1:], tokens - 1, mask_id=None)
    np.testing.assert_allclose(value, less, rtol=1e-6)
    np.testing.assert_array_equal(slope[..., 0], 0)
    np.testing.assert_allclose(slope[..., 1:], of_less, rtol=1e-6)
    for bad in (0, 4, -1):
        assert np.isnan(both(logits, np.array([[2, bad]]), mask_id=0)[0])
        value, slope = both(
            logits, np.array([[2, bad]]), mask_id=0, where=np.array([[True, False]])
        )
        assert np.isfinite(value)
        np.testing.assert_array_equal(slope[:, 1], 0)
        hidden = dict(mask_id=0, where=np.array([[True, False]]), **options)
        bend = jax.hessian(
            lambda x, t=np.array([[2, bad]]), o=hidden: masked_diffusion_loss(x, t, **o)
        )
        assert np.all(np.isfinite(bend(logits)))


def test_a_mask_that_is_no_class_is_an_error():
    logits, tokens = jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int)
    call = lambda tokens=tokens, **o: masked_diffusion_loss(
        logits, tokens, alpha=0.5, alpha_derivative=-1.0, **o
    )
    with pytest.raises(ValueError, match=r"mask_id: expected a class in \[0, 4\), got 4"):
        call(mask_id=4)
    with pytest.raises(TypeError, match="mask_id: expected an integer or None"):
        call(mask_id=1.0)
    with pytest.raises(TypeError, match="tokens: expected an integer dtype"):
        call(mask_id=3, tokens=jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"where: expected shape \(1, 2\)"):
        call(mask_id=3, where=np.ones(1, bool))
