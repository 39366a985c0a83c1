"""Adversarial losses: saturation, smoothing of one side, factors, kinks, pairs and features."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from oracle import units_off

from jaxloss.losses.gan import (
    gan_discriminator_loss,
    gan_hinge_discriminator_loss,
    gan_hinge_generator_loss,
    minimax_generator_loss,
    nonsaturating_generator_loss,
    wasserstein_critic_loss,
    wasserstein_generator_loss,
)
from jaxloss.losses.gan_variants import (
    cycle_consistency_loss,
    feature_matching_loss,
    least_squares_discriminator_loss,
    least_squares_generator_loss,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
)

NONE = dict(reduction="none")
HARD = [-1e4, -90, -30, -8, -1e-3, 0, 1e-6, 0.7, 12, 40, 95, 1e4]


def draw(*shape, count=2, seed=0):
    g = np.random.default_rng(seed)
    return tuple(g.standard_normal(shape).astype(np.float32) for _ in range(count))


def softplus(x):
    return mpmath.log1p(mpmath.exp(x)) if x < 50 else x + mpmath.log1p(mpmath.exp(-x))


def test_saturated_logits_keep_every_digit_of_value_and_slope():
    cases = (
        (nonsaturating_generator_loss, lambda f: softplus(-f), (HARD,)),
        (minimax_generator_loss, lambda f: -softplus(f), (HARD,)),
        (
            gan_discriminator_loss,
            lambda r, f: softplus(-r) + softplus(f),
            (HARD, HARD[::-1]),
        ),
        (relativistic_generator_loss, lambda r, f: softplus(r - f), (HARD, [0.0] * 12)),
    )
    with mpmath.workdps(60):
        for loss, exact, columns in cases:
            for part, (off, at) in units_off(loss, exact, *columns).items():
                assert off <= 4, (loss.__name__, part, at)


def test_the_minimax_gradient_vanishes_where_the_other_one_does_not():
    sure_of_a_fake = jnp.float32(-30)
    assert abs(jax.grad(minimax_generator_loss)(sure_of_a_fake)) < 1e-12
    np.testing.assert_allclose(jax.grad(nonsaturating_generator_loss)(sure_of_a_fake), -1)


def test_the_minimax_game_adds_up_to_zero_in_the_generated_samples():
    real, fake = draw(4, 3)
    of_fake = gan_discriminator_loss(real, fake) - nonsaturating_generator_loss(real)
    np.testing.assert_allclose(of_fake, -minimax_generator_loss(fake), rtol=1e-5)


def cross_entropy(logits, target):
    p = 1 / (1 + np.exp(-logits.astype(float)))
    return -(target * np.log(p) + (1 - target) * np.log1p(-p))


def test_smoothing_moves_the_target_of_real_samples_only_and_twice_as_far_as_tf_gan():
    real, fake = draw(4, 3)
    expected = cross_entropy(real, 0.9) + cross_entropy(fake, 0.0)
    got = gan_discriminator_loss(real, fake, label_smoothing=0.1, **NONE)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    tf_gan = cross_entropy(real, 1 - 0.25 / 2) + cross_entropy(fake, 0.0)  # its default, 0.25
    got = gan_discriminator_loss(real, fake, label_smoothing=0.125, **NONE)
    np.testing.assert_allclose(got, tf_gan, rtol=1e-5)


def test_hinge_costs_nothing_beyond_the_margins_and_has_no_slope_at_them():
    real, fake = jnp.float32([2, 1, 0.5, -3]), jnp.float32([-2, -1, -0.5, 3])
    units = gan_hinge_discriminator_loss(real, fake, **NONE)
    np.testing.assert_array_equal(units, [0, 0, 1, 8])
    slopes = jax.grad(gan_hinge_discriminator_loss, argnums=(0, 1))(real, fake)
    np.testing.assert_array_equal(slopes[0], [0, 0, -0.25, -0.25])
    np.testing.assert_array_equal(slopes[1], [0, 0, 0.25, 0.25])
    got = gan_hinge_discriminator_loss(real, fake, margin=0.25, **NONE)
    np.testing.assert_array_equal(got, [0, 0, 0, 6.5])
    np.testing.assert_array_equal(gan_hinge_generator_loss(fake, **NONE), -fake)


def test_generator_and_critic_of_wasserstein_play_against_each_other():
    real, fake = draw(4, 3)
    np.testing.assert_allclose(wasserstein_critic_loss(real, fake), (fake - real).mean(), rtol=1e-5)
    np.testing.assert_allclose(wasserstein_generator_loss(fake), -fake.mean(), rtol=1e-5)
    shifted = wasserstein_critic_loss(real + 3, fake + 3)
    np.testing.assert_allclose(shifted, wasserstein_critic_loss(real, fake), rtol=1e-4)


def test_least_squares_have_the_factor_one_half_of_paper_and_tf_gan():
    real, fake = draw(4, 3)
    half = lambda x, label: 0.5 * ((x.astype(float) - label) ** 2)
    got = least_squares_discriminator_loss(real, fake, **NONE)
    np.testing.assert_allclose(got, half(real, 1) + half(fake, 0), rtol=1e-6)
    got = least_squares_generator_loss(fake, **NONE)
    np.testing.assert_allclose(got, half(fake, 1), rtol=1e-6)
    # With labels -1, 1 and 0 the pair minimises a Pearson divergence.
    got = least_squares_discriminator_loss(real, fake, fake_label=-1.0, **NONE)
    np.testing.assert_allclose(got, half(real, 1) + half(fake, -1), rtol=1e-6)
    np.testing.assert_allclose(
        least_squares_generator_loss(fake, real_label=0.0, **NONE), half(fake, 0), rtol=1e-6
    )


def test_relativistic_losses_see_only_differences_within_pairs():
    real, fake = draw(4, 3)
    loss = relativistic_discriminator_loss(real, fake, **NONE)
    np.testing.assert_allclose(loss, np.log1p(np.exp((fake - real).astype(float))), rtol=1e-6)
    np.testing.assert_array_equal(relativistic_generator_loss(fake, real, **NONE), loss)
    np.testing.assert_array_equal(
        relativistic_discriminator_loss(2 * real, 2 * real, **NONE), np.float32(np.log(2))
    )
    average = np.log1p(np.exp(-(real - fake.mean()))) + np.log1p(np.exp(fake - real.mean()))
    assert np.abs(average.mean() - loss.mean()) > 0.1  # TF-GAN's is another loss


def test_real_and_generated_outputs_never_broadcast():
    real, fake = draw(4, 1)
    for loss, name in (
        (gan_discriminator_loss, "fake_logits"),
        (wasserstein_critic_loss, "fake_scores"),
        (relativistic_generator_loss, "fake_logits"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \(4, 1\), got \(4,\)"):
            loss(real, fake[:, 0])


def layers(seed):
    a, b = draw(3, 4, 2, seed=seed)
    return {"first": a, "rest": [b[..., 0], a[:, 0, 0]]}


def test_feature_matching_is_the_mean_over_layers_and_others_are_multiples_of_it():
    fake, real = layers(0), layers(1)
    mean = lambda f, r: np.abs((f - r).astype(float)).reshape(3, -1).mean(1)
    each = [mean(f, r) for f, r in zip(jax.tree.leaves(fake), jax.tree.leaves(real), strict=True)]
    got = feature_matching_loss(fake, real, **NONE)
    np.testing.assert_allclose(got, np.mean(each, axis=0), rtol=1e-6)
    np.testing.assert_allclose(3 * got, sum(each), rtol=1e-6)  # pix2pixHD
    hifi_gan = 2 * sum(np.mean(units) for units in each)
    np.testing.assert_allclose(2 * 3 * feature_matching_loss(fake, real), hifi_gan, rtol=1e-6)


def test_features_of_real_samples_carry_no_gradient_and_hidden_ones_no_loss():
    fake, real = layers(0), layers(1)
    hide = lambda x: np.concatenate([x[:2], np.full_like(x[2:], np.nan)])
    where = np.array([True, True, False])
    got, (of_fake, of_real) = jax.value_and_grad(feature_matching_loss, argnums=(0, 1))(
        jax.tree.map(hide, fake), jax.tree.map(hide, real), where=where
    )
    kept = [jax.tree.map(lambda x: x[:2], tree) for tree in (fake, real)]
    np.testing.assert_allclose(got, feature_matching_loss(*kept), rtol=1e-6)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(of_real))
    for slope in jax.tree.leaves(of_fake):
        np.testing.assert_array_equal(slope[2], 0)
        assert np.all(slope[:2] != 0)


def test_features_of_another_structure_are_named_in_the_error():
    fake = layers(0)
    with pytest.raises(TypeError, match="feature_matching_loss: real_features: expected the struc"):
        feature_matching_loss(fake, fake["first"])
    with pytest.raises(TypeError, match="fake_features: expected an array"):
        feature_matching_loss([], [])
    with pytest.raises(ValueError, match=r"real_features\['first'\]: expected shape \(3, 4, 2\)"):
        feature_matching_loss(fake, {**fake, "first": fake["first"][:, :1]})
    short = {**fake, "first": fake["first"][:1]}
    with pytest.raises(ValueError, match=r"fake_features\['rest'\]\[0\]: expected a batch of 1"):
        feature_matching_loss(short, short)
    with pytest.raises(ValueError, match=r"where: expected shape \(3,\)"):
        feature_matching_loss(fake, fake, where=np.ones(2, bool))


def test_a_cycle_costs_the_mean_absolute_difference_of_each_sample():
    pred, target = draw(3, 4, 2)
    where = np.array([[True] * 4, [False, True, True, False], [False] * 4])
    apart = np.abs((pred - target).astype(float))
    got = cycle_consistency_loss(pred, target, where=where)
    np.testing.assert_allclose(got, (apart[0].mean() + apart[1, 1:3].mean()) / 2, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(cycle_consistency_loss)(pred, pred), 0)
