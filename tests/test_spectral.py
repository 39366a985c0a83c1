"""Spectra of waveforms against numpy, and what masks, silence, loops and devices do to them."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import value_and_gradients

from jaxloss._core import spectra
from jaxloss._core.spectra import Resolution, scaled_gap, stft
from jaxloss.losses.spectral import (
    complex_spectral_loss,
    mel_filterbank,
    mel_spectrogram_loss,
    multi_resolution_stft_loss,
    multi_scale_mel_loss,
    stft_loss,
)

SIZE = dict(fft_size=32, hop_size=8, window_size=24)
MANY = dict(fft_sizes=(32, 24), hop_sizes=(8, 7), window_sizes=(20, 12))
TWO = dict(fft_sizes=(16, 8), hop_sizes=(8, 5), window_sizes=(12, 8))
MELS = dict(sample_rate=8000, num_mels=6)
LOSSES = {
    "stft": partial(stft_loss, phase=0.5, linear_magnitude=0.3, **SIZE),
    "many": partial(multi_resolution_stft_loss, phase=0.5, **MANY),
    "mel": partial(mel_spectrogram_loss, **SIZE, **MELS),
    "mels": partial(multi_scale_mel_loss, sample_rate=8000, fft_sizes=(16, 32), num_mels=(4, 6)),
    "complex": partial(complex_spectral_loss, **SIZE),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def draw(*shape, seed=0):
    g = np.random.default_rng(seed)
    target = g.standard_normal(shape)
    return tuple(x.astype(np.float32) for x in (target + 0.5 * g.standard_normal(shape), target))


def spectrum(x, fft, hop, window):
    """Centred frames of a mirrored waveform, by a loop in float64."""
    x = np.pad(np.float64(x), fft // 2, mode="reflect")
    taps = np.zeros(fft)
    left = (fft - window) // 2
    taps[left : left + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    starts = range(0, len(x) - fft + 1, hop)
    return np.stack([np.fft.rfft(x[s : s + fft] * taps) for s in starts])


def floored(z, eps=1e-8):
    return np.sqrt(np.maximum(np.abs(z) ** 2, eps))


def stft_by_formula(p, t, fft, hop, window, gains, kept=slice(None)):
    x, y = (spectrum(a, fft, hop, window)[kept] for a in (p, t))
    a, b = floored(x), floored(y)
    terms = (
        np.linalg.norm(b - a) / np.linalg.norm(b),
        np.mean(np.abs(np.log(a) - np.log(b))),
        np.mean(np.abs(a - b)),
        np.mean(1 - np.cos(np.angle(x) - np.angle(y))),
    )
    return sum(g * term for g, term in zip(gains, terms, strict=True))


@pytest.mark.parametrize(
    ("fft", "hop", "window"), [(32, 8, 32), (32, 7, 20), (31, 5, 30), (16, 24, 9), (8, 1, 8)]
)
def test_a_spectrum_is_that_of_numpy_but_for_one_phase(fft, hop, window):
    (x, _) = draw(2, 50)
    got = np.asarray(jax.jit(stft, static_argnums=1)(x, Resolution(fft, hop, window)))
    left = (fft - window) // 2
    turn = np.exp(-2j * np.pi * left * np.arange(fft // 2 + 1) / fft)
    for row, wave in zip(got, x, strict=True):
        np.testing.assert_allclose(row * turn, spectrum(wave, fft, hop, window), atol=2e-5)


def test_all_terms_follow_their_formula_with_one_norm_for_each_item():
    p, t = draw(2, 3, 100)
    t[0, 1] *= 50  # a loud item, which changes no other one
    gains = dict(spectral_convergence=0.8, log_magnitude=0.6, linear_magnitude=0.4, phase=0.2)
    got = stft_loss(p, t, **SIZE, **gains, reduction="none")
    expected = [
        stft_by_formula(*pair, *SIZE.values(), gains.values())
        for pair in zip(p.reshape(6, -1), t.reshape(6, -1), strict=True)
    ]
    np.testing.assert_allclose(np.ravel(got), expected, rtol=2e-5)


def test_several_resolutions_are_averaged_in_a_loop_and_out_of_it():
    p, t = draw(2, 60)
    sizes = list(zip(*MANY.values(), strict=True))
    one = lambda *pair: [stft_by_formula(*pair, *size, (1, 1, 0, 0.5)) for size in sizes]
    expected = [np.mean(one(*pair)) for pair in zip(p, t, strict=True)]
    for small in (0, 10**6):
        with mock.patch.object(spectra, "SMALL", small):
            got = jax.jit(lambda *a: LOSSES["many"](*a, reduction="none"))(p, t)
            jax.clear_caches()
        np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_the_loop_over_resolutions_has_all_derivatives_of_the_plain_sum():
    p, t = draw(3, 2, 30, seed=2)
    where = np.arange(30) < np.array([[30, 21], [1, 9], [25, 0]])[..., None]
    moved = draw(3, 2, 30, seed=3)

    def everything(p, t, gain, eps, moved, where):
        def f(p, t, gain, eps):
            options = dict(log_magnitude=gain, eps=eps, where=where)
            return multi_resolution_stft_loss(p, t, **TWO, **options, weights=jnp.array([1.0, 2]))

        grad = jax.grad(f, (0, 1, 2, 3))
        args = p, t, gain, eps
        direction = (*moved, 0.3 * jnp.ones_like(gain), 0.001 * jnp.ones_like(eps))
        along = jax.jvp(f, args, direction)
        forward_over_reverse = jax.jvp(grad, args, direction)
        reverse = jax.grad(lambda p: jnp.sum(jax.grad(f)(p, *args[1:]) * moved[0]))(p)
        return along, forward_over_reverse, reverse

    args = p, t, np.float32(0.7), np.float32(1e-2), moved, where
    axes = (0, 0, None, None, 0, 0)
    with jax.enable_x64(True):
        args = jax.tree.map(lambda x: x if x.dtype == bool else np.float64(x), args)
        with mock.patch.object(spectra, "SMALL", 0):
            looped = jax.jit(jax.vmap(everything, axes))(*args)
        jax.clear_caches()
        with mock.patch.object(spectra, "SMALL", 10**6):
            run = jax.jit(everything)
            take = lambda x, axis, i: x if axis is None else jax.tree.map(lambda leaf: leaf[i], x)
            plain = [
                run(*(take(x, a, i) for x, a in zip(args, axes, strict=True))) for i in range(3)
            ]
    jax.clear_caches()
    plain = jax.tree.map(lambda *rows: np.stack(rows), *plain)
    for a, b in zip(*map(jax.tree.leaves, (looped, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_loop_runs_over_a_sharded_batch_and_is_local_inside_shard_map():
    p, t = draw(8, 700)
    # Without bins near 0, whose pull has no digits.
    loss = lambda p, t: LOSSES["many"](p, t, eps=0.1, reduction="none")
    step = jax.value_and_grad(lambda p, t: jnp.sum(loss(p, t)))
    spec, quick = PartitionSpec("data"), {"xla_backend_optimization_level": 0}
    expected = jax.jit(step)(p, t)
    assert p.size > spectra.SMALL
    auto, explicit = (
        jax.make_mesh((8,), ("data",), axis_types=(kind,))
        for kind in (AxisType.Auto, AxisType.Explicit)
    )
    mapped = jax.shard_map(loss, mesh=auto, in_specs=(spec, spec), out_specs=spec)
    local = jax.value_and_grad(lambda p, t: jnp.sum(mapped(p, t)))
    for mesh, function in ((auto, local), (explicit, step)):
        put = lambda x, mesh=mesh: jax.device_put(x, NamedSharding(mesh, spec))
        with jax.set_mesh(mesh):
            lowered = jax.jit(function, compiler_options=quick).lower(put(p), put(t))
            compiled = lowered.compile()
            got = compiled(put(p), put(t))
        assert (function is step) or ("all-gather" not in compiled.as_text())
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, expected)


def test_the_loop_can_be_exported():
    p, t = draw(8, 700)
    step = jax.jit(jax.value_and_grad(LOSSES["many"]))
    exported = jax.export.export(step)(p, t)
    for a, b in zip(exported.call(p, t), step(p, t), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@each_loss
def test_equal_waves_and_silence_cost_nothing_and_pull_nowhere(loss):
    p, _ = draw(2, 320)
    for wave in (p, np.zeros_like(p)):
        value, slopes = value_and_gradients(loss, wave, wave)
        assert value == 0
        for slope in slopes:
            np.testing.assert_array_equal(slope, 0)


@each_loss
def test_silence_against_sound_is_finite_with_finite_derivatives(loss):
    p, _ = draw(2, 320)
    for pair in ((p, 0 * p), (0 * p, p)):
        value, slopes = value_and_gradients(loss, *pair)
        assert np.isfinite(value)
        assert value > 0
        assert np.all(np.isfinite(slopes))


@each_loss
@pytest.mark.parametrize("scale", [1e-25, 1e10, 1e25])
def test_values_and_gradients_are_finite_at_any_level(loss, scale):
    p, t = ((x.astype(np.float64) * scale).astype(np.float32) for x in draw(2, 320))
    value, slopes = value_and_gradients(loss, p, t)
    if not (loss is LOSSES["stft"] and scale > 1e20):  # its linear term is as large as the waves
        assert np.isfinite(value)
    assert np.all(np.isfinite(slopes))


def test_a_level_changes_no_ratio():
    p, t = draw(2, 320)
    got, _ = value_and_gradients(LOSSES["many"], np.float32(2.0**70) * p, np.float32(2.0**70) * t)
    np.testing.assert_allclose(got, value_and_gradients(LOSSES["many"], p, t)[0], rtol=1e-6)


@each_loss
def test_float16_waves_are_compared_in_float32(loss):
    p, t = (100 * x.astype(np.float16) for x in draw(2, 320))
    got = loss(p, t)
    assert got.dtype == jnp.float32
    expected, _ = value_and_gradients(loss, p.astype(np.float32), t.astype(np.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@each_loss
def test_a_wave_shorter_than_the_transform_raises(loss):
    short = np.ones((2, 20), np.float32)
    with pytest.raises(ValueError, match=r"pred: expected at least 32 samples \(fft_size"):
        loss(short, short)


def test_a_phase_just_around_pi_is_a_small_error():
    # The plain difference of angles is almost 2 pi there.
    time = np.arange(64)
    a, b = (np.cos(2 * np.pi * time / 8 + phase)[None].astype(np.float32) for phase in (3.1, 3.18))
    only = dict(spectral_convergence=0.0, log_magnitude=0.0, phase=1.0)
    near = stft_loss(a, b, fft_size=8, hop_size=8, window_size=8, eps=1.0, **only)
    far = stft_loss(a, -b, fft_size=8, hop_size=8, window_size=8, eps=1.0, **only)
    assert near < 0.01 < 0.5 < far


@each_loss
def test_hiding_the_end_of_a_wave_cuts_it_off_but_for_frames_over_the_cut(loss):
    p, t = draw(2, 400)
    where = np.tile(np.arange(400) < 320, (2, 1))
    t[:, 320:], p[:, 320:] = np.nan, np.inf
    value, slope = value_and_gradients(loss, p, t, where=where)
    for part in slope:
        np.testing.assert_array_equal(part[:, 320:], 0)
    cut, _ = value_and_gradients(loss, p[:, :320], t[:, :320])
    assert abs(value - cut) < 0.2 * cut  # at most 4 of 40 frames differ


def test_frames_without_a_kept_sample_leave_the_mean():
    p, t = draw(1, 100)
    where = (np.arange(100) >= 30) & (np.arange(100) < 50)
    fft, hop, window = SIZE.values()
    first = np.arange(13) * hop - window // 2  # of the window of each frame
    kept = [np.any(where[max(f, 0) : max(f + window, 0)]) for f in first]
    kept[0] = False
    gains = (1, 1, 0, 0)
    expected = stft_by_formula(p[0] * where, t[0] * where, fft, hop, window, gains, np.array(kept))
    np.testing.assert_allclose(stft_loss(p, t, **SIZE, where=where[None]), expected, rtol=2e-5)


def test_hidden_samples_between_kept_ones_are_zero():
    p, t = draw(2, 400)
    where = np.random.default_rng(0).random((2, 400)) < 0.8
    zeroed = (np.where(where, x, np.float32(0)) for x in (p, t))
    expected, _ = value_and_gradients(LOSSES["many"], *zeroed, where=np.ones_like(where))
    got, _ = value_and_gradients(LOSSES["many"], p, t, where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_filters_are_triangles_of_equal_area_and_some_of_them_empty_at_small_sizes():
    filters = np.asarray(mel_filterbank(sample_rate=16000, fft_size=4096, num_mels=20))
    np.testing.assert_allclose(filters.sum(1) * 16000 / 4096, 1, rtol=0.01)
    small = np.asarray(mel_filterbank(sample_rate=44100, fft_size=32, num_mels=20))
    assert np.any(small.sum(1) == 0)
    p, t = draw(1, 64)
    options = dict(sample_rate=44100, fft_size=32, hop_size=8, window_size=32, num_mels=20)
    value, slope = jax.jit(jax.value_and_grad(partial(mel_spectrogram_loss, **options)))(p, t)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))


def test_mel_losses_follow_their_formula():
    p, t = draw(2, 100)

    def by_formula(p, t, fft, hop, window, mels, log):
        filters = np.asarray(mel_filterbank(sample_rate=8000, fft_size=fft, num_mels=mels), float)
        x, y = (floored(spectrum(a, fft, hop, window)) @ filters.T for a in (p, t))
        if log:
            x, y = (np.log(np.maximum(a, 1e-5)) for a in (x, y))
        return np.mean(np.abs(x - y))

    for log in (True, False):
        expected = [by_formula(*pair, 32, 8, 24, 6, log) for pair in zip(p, t, strict=True)]
        got = mel_spectrogram_loss(p, t, **SIZE, **MELS, log_scale=log, reduction="none")
        np.testing.assert_allclose(got, expected, rtol=2e-5)
    expected = [
        np.mean([by_formula(*pair, 16, 4, 16, 4, True), by_formula(*pair, 32, 8, 32, 6, True)])
        for pair in zip(p, t, strict=True)
    ]
    np.testing.assert_allclose(LOSSES["mels"](p, t, reduction="none"), expected, rtol=2e-5)


def test_compressed_spectra_follow_their_formula():
    p, t = draw(1, 100)
    x, y = (spectrum(a[0], *SIZE.values()) for a in (p, t))
    a, b = floored(x) ** 0.3, floored(y) ** 0.3
    phased = np.abs(a * np.exp(1j * np.angle(x)) - b * np.exp(1j * np.angle(y))) ** 2
    expected = np.mean(0.3 * phased + 0.7 * (a - b) ** 2)
    np.testing.assert_allclose(complex_spectral_loss(p, t, **SIZE), expected, rtol=2e-5)


def test_a_weak_spectrum_beside_a_strong_one_keeps_the_digits_of_both():
    g = np.random.default_rng(0)
    x, y = (g.standard_normal(50) + 1j * g.standard_normal(50) for _ in range(2))
    for weak in (1e-4, 1, 1e4):
        pair = [z.astype(np.complex64) for z in (weak * x, y)]
        scales = [np.abs(z).astype(np.float32) ** np.float32(-0.7) for z in pair]
        a, b = (np.complex128(z) * s for z, s in zip(pair, scales, strict=True))
        got = scaled_gap(pair[0], scales[0], pair[1], scales[1])
        np.testing.assert_allclose(got, np.abs(a - b) ** 2, rtol=3e-6)


def temporaries(loss):
    wave = jax.ShapeDtypeStruct((4, 16000), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(wave, wave).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_that_of_the_largest_resolution_not_of_their_sum():
    sizes = dict(
        fft_sizes=(1024, 2048, 512), hop_sizes=(120, 240, 50), window_sizes=(600, 1200, 240)
    )

    def of(*which):
        picked = {name: tuple(row[i] for i in which) for name, row in sizes.items()}
        return temporaries(partial(multi_resolution_stft_loss, **picked))

    assert of(0, 1, 2) < 1.05 * of(2)
    scales = partial(multi_scale_mel_loss, sample_rate=16000)
    assert temporaries(scales) < 1.2 * temporaries(
        partial(scales, fft_sizes=(2048,), num_mels=(320,))
    )


def test_one_resolution_needs_the_memory_of_two_spectra_and_as_much_again():
    spectrum = 8 * 4 * (1 + 16000 // 256) * 513
    assert temporaries(stft_loss) < 4 * spectrum


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(hop_size=0), "hop_size: expected an integer of at least 1"),
        (dict(window_size=64), "window_size: expected at most the size 32"),
        (dict(fft_size=2.0), "fft_size: expected an integer of at least 1"),
    ],
)
def test_sizes_that_make_no_transform_raise(options, message):
    wave = np.ones((1, 64), np.float32)
    with pytest.raises(ValueError, match=message):
        stft_loss(wave, wave, **{**SIZE, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            partial(multi_resolution_stft_loss, fft_sizes=(32,), hop_sizes=(8, 8)),
            r"hop_sizes: expected 1 sizes, as fft_sizes, got \(8, 8\)",
        ),
        (
            partial(multi_scale_mel_loss, sample_rate=8000, fft_sizes=(32, 16), num_mels=(4,)),
            r"num_mels: expected 2 sizes, as fft_sizes, got \(4,\)",
        ),
        (
            partial(mel_spectrogram_loss, sample_rate=8000, f_max=5000.0, **SIZE),
            "f_max: expected 0 <= f_min < f_max <= 4000",
        ),
        (partial(mel_spectrogram_loss, sample_rate=0, **SIZE), "sample_rate: expected a positive"),
    ],
    ids=["hops", "mels", "band", "rate"],
)
def test_options_that_do_not_fit_together_raise(call, message):
    wave = np.ones((1, 64), np.float32)
    with pytest.raises(ValueError, match=message):
        call(wave, wave)
