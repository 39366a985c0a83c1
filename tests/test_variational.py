"""Variational losses: bounds and where they touch, sums over latents, and who learns from what."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from jaxloss import sum_and_weight
from jaxloss.losses.divergences_gaussian import gaussian_kl
from jaxloss.losses.variational import (
    balanced_kl,
    elbo_loss,
    importance_weighted_elbo,
    vq_commitment_loss,
)

NONE = dict(reduction="none")


def draw(*shape, count=1, seed=0):
    g = np.random.default_rng(seed)
    arrays = tuple(g.standard_normal(shape) for _ in range(count))
    return arrays if count > 1 else arrays[0]


def gaussian_model(x, mean, variance, noise=0.7):
    """Expected NLL and KL under q = N(mean, variance) of z ~ N(0, 1), x ~ N(z, noise)."""
    nll = 0.5 * np.log(2 * np.pi * noise) + ((x - mean) ** 2 + variance) / (2 * noise)
    return nll, 0.5 * (mean**2 + variance - 1 - np.log(variance))


def test_the_elbo_is_below_the_evidence_and_reaches_it_at_the_exact_posterior():
    noise, x = 0.7, draw(6)
    evidence = -0.5 * np.log(2 * np.pi * (1 + noise)) - x**2 / (2 * (1 + noise))
    exact = x / (1 + noise), np.full_like(x, noise / (1 + noise))
    with jax.enable_x64(True):
        at = lambda m, v: np.asarray(elbo_loss(*gaussian_model(x, m, v), **NONE)[0])
        np.testing.assert_allclose(-at(*exact), evidence, rtol=1e-13)
        for shift, scale in ((0.1, 1.0), (0.0, 1.3), (-0.5, 0.2)):
            assert np.all(-at(exact[0] + shift, exact[1] * scale) < evidence)


def test_twice_as_many_latents_have_twice_the_kl():
    mean, log_var = (a.astype(np.float32) for a in draw(3, 4, count=2))
    twice = gaussian_kl(np.tile(mean, 2), np.tile(log_var, 2), reduction="none")
    once = gaussian_kl(mean, log_var, reduction="none")
    of_one, of_both = (elbo_loss(0 * once, kl)[0] for kl in (once, twice))
    np.testing.assert_allclose(of_both, 2 * of_one, rtol=1e-6)


def test_the_terms_are_reduced_like_the_total_and_carry_no_gradient():
    nll, kl = (a.astype(np.float32) for a in draw(4, count=2))
    where, weights = np.array([True, True, False, True]), np.float32([1, 2, 3, 4])
    tail = dict(where=where, weights=weights)
    total, terms = elbo_loss(nll, kl, beta=0.3, **tail)
    np.testing.assert_allclose(total, terms["reconstruction"] + 0.3 * terms["kl"], rtol=1e-6)
    pair, pairs = elbo_loss(nll, kl, beta=0.3, reduction=sum_and_weight, **tail)
    np.testing.assert_allclose(pair.mean(), total, rtol=1e-6)
    np.testing.assert_allclose(pairs["kl"].mean(), terms["kl"], rtol=1e-6)
    units, parts = elbo_loss(nll, kl, **NONE)
    np.testing.assert_allclose(units, parts["reconstruction"] + parts["kl"], rtol=1e-6)
    slope = jax.grad(lambda kl: sum(elbo_loss(nll, kl)[1].values()))(kl)
    np.testing.assert_array_equal(slope, 0)


def test_beta_may_be_a_traced_schedule():
    nll, kl = (a.astype(np.float32) for a in draw(4, count=2))
    value, slope = jax.jit(jax.value_and_grad(lambda b: elbo_loss(nll, kl, beta=b)[0]))(0.5)
    np.testing.assert_allclose(value, nll.mean() + 0.5 * kl.mean(), rtol=1e-5)
    np.testing.assert_allclose(slope, kl.mean(), rtol=1e-5)


def unit_kl(posterior, prior):
    return 0.5 * jnp.sum((posterior["mean"] - prior["mean"]) ** 2, axis=-1)


def test_balanced_kl_keeps_the_value_and_shares_out_the_gradient():
    posterior, prior = ({"mean": a.astype(np.float32)} for a in draw(3, 2, count=2))
    total = lambda fn: lambda q, p: fn(q, p).sum()
    balanced = jax.jit(
        lambda alpha: jax.value_and_grad(
            total(lambda q, p: balanced_kl(unit_kl, q, p, alpha=alpha)), argnums=(0, 1)
        )(posterior, prior)
    )
    value, plain = jax.value_and_grad(total(unit_kl), argnums=(0, 1))(posterior, prior)
    for alpha in (0.8, 1.0):
        got, (of_posterior, of_prior) = balanced(alpha)
        np.testing.assert_allclose(got, value, rtol=1e-6)
        np.testing.assert_allclose(
            of_posterior["mean"], (1 - alpha) * plain[0]["mean"], rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(of_prior["mean"], alpha * plain[1]["mean"], rtol=1e-6)


def test_a_divergence_that_is_no_array_is_named_in_the_error():
    with pytest.raises(TypeError, match=r"balanced_kl: kl_fn\(posterior, prior\): expected an arr"):
        balanced_kl(lambda q, p: [q, p], jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="balanced_kl: alpha: expected a scalar"):
        balanced_kl(lambda q, p: q - p, jnp.ones(2), jnp.ones(2), alpha=jnp.ones(2))


def test_one_importance_weight_is_the_elbo_and_more_draws_tighten_the_bound():
    log_weights = draw(5, 6).astype(np.float32)
    bound = lambda w: importance_weighted_elbo(w, **NONE)
    np.testing.assert_allclose(bound(log_weights[:, :1]), -log_weights[:, 0])
    halves = bound(log_weights.reshape(5, 3, 2))  # Jensen: all draws beat the mean of parts
    assert np.all(bound(log_weights) <= np.mean(halves, axis=1))


def test_the_importance_weighted_bound_keeps_its_digits_near_zero_and_far_out():
    rows = np.float32(
        [[1e-4, -2e-4, 3e-5], [2e-6, 0, 1e-6], [90, -90, 0], [-300, -310, -295], [0.5, -3, -0.9]]
    )
    exact = [-mpmath.log(sum(mpmath.exp(float(w)) for w in row) / 3) for row in rows]
    got = importance_weighted_elbo(rows, **NONE)
    np.testing.assert_allclose(got, np.array(exact, float), rtol=4e-7)
    slope = jax.grad(lambda w: importance_weighted_elbo(w, reduction="sum"))(rows)
    shares = np.exp(rows - rows.max(1, keepdims=True).astype(float))
    np.testing.assert_allclose(slope, -shares / shares.sum(1, keepdims=True), rtol=1e-5, atol=1e-30)


def test_draws_of_weight_zero_count_as_draws():
    rows = np.float32([[0, -np.inf], [-np.inf, -np.inf]])
    value, slope = jax.value_and_grad(lambda w: importance_weighted_elbo(w, **NONE)[0])(rows)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(slope[0], [-1, 0])
    assert importance_weighted_elbo(rows, **NONE)[1] == np.inf
    np.testing.assert_array_equal(
        jax.grad(lambda w: importance_weighted_elbo(w, **NONE)[1])(rows), 0
    )
    with pytest.raises(
        ValueError, match="importance_weighted_elbo: log_weights: expected at least"
    ):
        importance_weighted_elbo(jnp.ones((2, 0)))


def test_codebook_and_encoder_learn_from_one_term_each():
    encoded, quantized = (a.astype(np.float32) for a in draw(3, 4, count=2))
    beta = 0.4
    value, (of_encoder, of_codebook) = jax.value_and_grad(
        lambda e, q: vq_commitment_loss(e, q, beta=beta, reduction="sum"), argnums=(0, 1)
    )(encoded, quantized)
    gap = encoded - quantized
    np.testing.assert_allclose(value, (1 + beta) * (gap**2).mean(1).sum(), rtol=1e-6)
    np.testing.assert_allclose(of_encoder, beta * 2 * gap / 4, rtol=1e-5)
    np.testing.assert_allclose(of_codebook, -2 * gap / 4, rtol=1e-5)


def test_the_straight_through_recipe_hands_the_decoders_gradient_to_the_encoder():
    encoded, quantized = (a.astype(np.float32) for a in draw(3, 4, count=2))
    through = lambda e: e + jax.lax.stop_gradient(quantized - e)
    np.testing.assert_allclose(through(encoded), quantized, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda e: through(e).sum())(encoded), 1)
