"""Ratios of energies: silence, perfect estimates, levels, masks, and what float16 can hold."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import units_and_gradient, value_and_gradients

from jaxloss.losses.waveforms import (
    dc_loss,
    esr_loss,
    pre_emphasis,
    sd_sdr_loss,
    si_sdr,
    si_sdr_loss,
    snr,
    snr_loss,
)

RATIOS = (si_sdr_loss, snr_loss, sd_sdr_loss)
LOSSES = (*RATIOS, esr_loss, dc_loss)
EPS = 1e-8


def draw(*shape, seed=0, noise=0.5):
    g = np.random.default_rng(seed)
    target = g.standard_normal(shape)
    return (target + noise * g.standard_normal(shape)).astype(np.float32), target.astype(np.float32)


def by_formula(name, p, t, eps=EPS, zero_mean=True):
    """The catalogue's formulas in float64, on one item."""
    p, t = np.float64(p), np.float64(t)
    if name in ("esr_loss", "dc_loss"):
        ratio = lambda f: f(t - p) / ((t * t).sum() + eps * (1 if name == "esr_loss" else len(t)))
        return ratio(lambda e: (e * e).sum() if name == "esr_loss" else len(e) * e.mean() ** 2)
    if zero_mean:
        p, t = p - p.mean(), t - t.mean()
    a = p @ t / (t @ t + eps)
    signal, error = {
        "si_sdr_loss": (a * t, a * t - p),
        "snr_loss": (t, t - p),
        "sd_sdr_loss": (a * t, t - p),
    }[name]
    return -10 * np.log10(signal @ signal / (error @ error + eps) + eps)


@pytest.mark.parametrize("loss", LOSSES)
def test_values_follow_the_formula_and_hidden_samples_count_as_deleted(loss):
    p, t = draw(3, 50)
    where = np.random.default_rng(1).random((3, 50)) < 0.6
    where[2] = False

    @jax.jit
    def run(p, t):
        units = partial(loss, p, t, reduction="none")
        return units(where=where), loss(p, t, where=where), units()

    got, mean, every = run(p, t)
    kept = [by_formula(loss.__name__, *(x[i][where[i]] for x in (p, t))) for i in (0, 1)]
    np.testing.assert_allclose(got, [*kept, 0], rtol=3e-6)
    np.testing.assert_allclose(mean, np.mean(kept), rtol=3e-6)
    whole = [by_formula(loss.__name__, *x) for x in zip(p, t, strict=True)]
    np.testing.assert_allclose(every, whole, rtol=3e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_leading_axis_holds_items_of_their_own(loss):
    p, t = draw(2, 3, 20)
    loud = t.copy()
    loud[0, 0] *= 1000
    units = loss(p, t, reduction="none")
    assert units.shape == (2, 3)
    changed = loss(p, loud, reduction="none")
    np.testing.assert_array_equal(np.ravel(changed)[1:], np.ravel(units)[1:])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_perfect_estimate_has_a_finite_value_and_no_pull_but_to_be_louder(loss):
    _, t = draw(2, 40)
    value, slope = units_and_gradient(loss, t, t)
    assert np.all(np.isfinite(value))
    centred = np.float64(t) - np.mean(t, axis=1, keepdims=True, dtype=float)
    # Where the signal is a part of the estimate, the bound of the error is easier for a loud one.
    louder = -20 / np.log(10) * centred / np.sum(centred**2, axis=1, keepdims=True)
    expected = louder if loss in (si_sdr_loss, sd_sdr_loss) else 0
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("silent", ["pred", "target", "both"])
def test_silence_is_finite_with_a_finite_gradient(loss, silent):
    p, t = draw(2, 40)
    p, t = (p if silent == "target" else 0 * p), (t if silent == "pred" else 0 * t)
    value, slopes = value_and_gradients(loss, p, t)
    assert np.all(np.isfinite(slopes))
    expected = np.mean([by_formula(loss.__name__, *x) for x in zip(p, t, strict=True)])
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_a_silent_target_sits_at_eighty_decibels_unless_it_is_no_unit():
    p, t = draw(3, 40)
    t[1] = 0
    units = np.asarray(si_sdr_loss(p, t, reduction="none"))
    assert units[1] == pytest.approx(80)
    run = jax.jit(jax.value_and_grad(partial(si_sdr_loss, min_energy=1e-6)))
    kept, slope = jax.device_get(run(p, t))
    np.testing.assert_allclose(kept, (units[0] + units[2]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(slope[1], 0)
    assert run(p, 0 * t)[0] == 0


def test_energies_below_the_least_one_count_after_the_mean_is_gone():
    p, t = draw(1, 40)
    flat = np.full_like(t, 100) + np.float32(1e-3) * t
    assert si_sdr_loss(p, flat, min_energy=1.0) == 0
    assert si_sdr_loss(p, flat, zero_mean=False, min_energy=1.0) != 0


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_a_scaled_target_is_bounded_by_the_absolute_eps(scale):
    _, t = draw(1, 8000)
    got = si_sdr_loss(np.float32(scale) * t, t, zero_mean=False)
    expected = -(80 + 10 * math.log10(scale**2 * float(np.sum(t.astype(float) ** 2))))
    np.testing.assert_allclose(got, expected, atol=0.3)  # rounding of the product is an error too


def test_the_scale_of_an_estimate_matters_to_the_others_alone():
    p, t = draw(1, 500)
    np.testing.assert_allclose(si_sdr_loss(4 * p, t), si_sdr_loss(p, t), rtol=1e-5)
    for loss in (snr_loss, sd_sdr_loss):
        assert abs(loss(4 * p, t) - loss(p, t)) > 1


def test_scores_are_the_negated_losses():
    p, t = draw(2, 30)
    for score, loss in ((si_sdr, si_sdr_loss), (snr, snr_loss)):
        np.testing.assert_array_equal(score(p, t, reduction="none"), -loss(p, t, reduction="none"))


def test_the_bound_of_a_ratio_is_reached_by_a_perfect_estimate_and_takes_the_pull_near_it():
    p, t = draw(1, 200, noise=1e-3)
    assert snr_loss(t, t, soft_max=30.0) == pytest.approx(-30, abs=1e-4)
    bounded, free = (
        np.abs(jax.jit(jax.grad(partial(snr_loss, soft_max=bound)))(p, t)).max()
        for bound in (30.0, None)
    )
    assert bounded < 0.01 * free
    centred = [np.float64(x - x.mean()) for x in (p, t)]
    error, signal = ((x**2).sum() for x in (centred[1] - centred[0], centred[1]))
    expected = 10 * np.log10((error + 1e-3 * signal) / signal)
    np.testing.assert_allclose(snr_loss(p, t, soft_max=30.0), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1e-25, 1e-4, 1e4, 1e12, 1e25])
def test_values_and_gradients_are_finite_at_any_level(loss, scale):
    p, t = ((x.astype(np.float64) * scale).astype(np.float32) for x in draw(2, 40))
    value, slope = units_and_gradient(loss, p, t)
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(slope))
    if scale > 1 and loss is not dc_loss:
        np.testing.assert_allclose(value, units_and_gradient(loss, *draw(2, 40))[0], rtol=1e-4)
    mixed = units_and_gradient(loss, p, draw(2, 40)[1])
    assert all(np.all(np.isfinite(x)) for x in mixed[scale > 1e4 and loss in (esr_loss, dc_loss) :])


@pytest.mark.parametrize("loss", LOSSES)
def test_energies_beyond_float16_do_not_overflow(loss):
    p, t = (20 * x.astype(np.float16) for x in draw(1, 4000))
    assert float(np.sum(np.float64(t) ** 2)) > 65504
    wide = p.astype(np.float32), t.astype(np.float32)
    got, expected = jax.jit(lambda *pairs: [loss(*pair) for pair in pairs])((p, t), wide)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_an_offset_costs_nothing_without_the_mean_and_much_with_it():
    _, t = draw(1, 100)
    assert si_sdr_loss(t + 1, t) < -60
    assert snr_loss(t + 1, t) < -60
    assert abs(snr_loss(t + 1, t, zero_mean=False)) < 3
    np.testing.assert_allclose(dc_loss(t + 1, t), 1 / np.mean(t**2), rtol=1e-5)


def test_pre_emphasis_is_a_difference_with_the_sample_before():
    (x, _) = draw(2, 3, 10)
    expected = x - 0.9 * np.pad(x, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    np.testing.assert_allclose(pre_emphasis(x, coefficient=0.9), expected, rtol=1e-6, atol=1e-7)
    assert pre_emphasis(x.astype(np.float16)).dtype == jnp.float32
    with pytest.raises(TypeError, match="pre_emphasis: x: expected a floating dtype"):
        pre_emphasis(jnp.arange(3))
    with pytest.raises(ValueError, match="pre_emphasis: x: expected at least 1 axis"):
        pre_emphasis(jnp.float32(1))
