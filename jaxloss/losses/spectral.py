"""Losses between short-time spectra of waveforms: STFT, mel and complex ones."""

import functools
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw
from .._core.checks import message, naming
from .._core.compiled import compiled
from .._core.numerics import absolute, numbers, safe_div, safe_sqrt
from .._core.reduce import reduce
from .._core.spectra import (
    Resolution,
    check_count,
    check_resolution,
    floored_power,
    frame_mean,
    kept_frames,
    magnitude,
    mel_filters,
    scaled_gap,
    stft,
    sum_in_turn,
)
from .._core.typing import Number, Reduction, Values, Where
from .._core.waveforms import any_sample, level, prepare_waves

__all__ = [
    "complex_spectral_loss",
    "mel_filterbank",
    "mel_spectrogram_loss",
    "multi_resolution_stft_loss",
    "multi_scale_mel_loss",
    "stft_loss",
]

Waves = Shaped[Array, "*items time"]
Sizes = tuple[int, ...]
FLOOR = 1e-8  # of squared magnitudes, where a loss has no option for it


@compiled("fft_size", "hop_size", "window_size")
def stft_loss(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    fft_size: int = 1024,
    hop_size: int = 256,
    window_size: int = 1024,
    spectral_convergence: Number = 1.0,
    log_magnitude: Number = 1.0,
    linear_magnitude: Number = 0.0,
    phase: Number = 0.0,
    eps: Number = 1e-8,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Distance of the short-time spectra of two waveforms, from 0, without a unit.

    $$ \ell = g_s \frac{\lVert Y - X \rVert_F}{\lVert Y \rVert_F}
       + \frac{1}{N} \sum_{fk} \left( g_l |\log X - \log Y| + g_m |X - Y|
       + g_p (1 - \cos(\varphi_X - \varphi_Y)) \right) $$

    for the magnitudes X of the prediction and Y of the target in N frames and bins, each at least
    $\sqrt{\text{eps}}$ with zero gradient below it, and natural logarithms. Frames are centred on
    every `hop_size`-th sample, with the waveform mirrored at its ends, under a periodic Hann
    window. The gradient at equality is 0. A phasor below the floor counts with its size over it.

    Args:
        pred: Waveforms `(*items, time)` of at least `fft_size` samples.
        target: Same shape and range as `pred`.
        fft_size: Samples of the transform; a shorter window is centred in it.
        hop_size: Samples from frame to frame.
        window_size: Samples of the window.
        spectral_convergence: Gain of the relative distance, one norm for each item.
        log_magnitude: Gain of the distance of logarithms.
        linear_magnitude: Gain of the distance of magnitudes.
        phase: Gain of the distance of phases.
        eps: Smallest squared magnitude.
        where: Bool array of the shape of `pred`. Hidden samples are 0, and frames whose window
            covers no kept one are left out: hiding the end of a waveform equals cutting it off,
            but for the frames that reach over the cut.

    One unit per item; see `jaxloss.reduce`. Memory: one complex spectrum of each waveform and as
    much again, without phases. Of a batch that is sharded under plain `jit` XLA gathers the frames
    before it transforms them, with every spectral loss here; inside `shard_map` nothing is
    gathered.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Arik et al., Fast spectrogram inversion using multi-head convolutional neural networks, IEEE
        SPL 2019; Engel et al., DDSP: differentiable digital signal processing, ICLR 2020. Equals
        auraloss's `STFTLoss` of one item; auraloss takes one norm over all items of a batch, and
        the squared difference of angles for the phase, which jumps at pi.

    >>> wave = jnp.array([1.0, 0.0, -1.0, 0.0])
    >>> stft_loss(wave / 2, wave, fft_size=4, hop_size=2, window_size=4, log_magnitude=0.0)
    Array(0.5, dtype=float32)
    """
    pred, target = prepare_waves(where, pred, target)
    sizes = _resolutions(pred, (fft_size,), (hop_size,), (window_size,), "")
    gains = (spectral_convergence, log_magnitude, linear_magnitude, phase)
    return _stft(sizes, pred, target, gains, eps, where, weights, reduction)


@compiled("fft_sizes", "hop_sizes", "window_sizes")
def multi_resolution_stft_loss(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    fft_sizes: Sizes = (1024, 2048, 512),
    hop_sizes: Sizes = (120, 240, 50),
    window_sizes: Sizes = (600, 1200, 240),
    spectral_convergence: Number = 1.0,
    log_magnitude: Number = 1.0,
    linear_magnitude: Number = 0.0,
    phase: Number = 0.0,
    eps: Number = 1e-8,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean distance of short-time spectra over several resolutions, from 0, without a unit.

    $$ \ell = \frac{1}{R} \sum_r \ell_r $$

    for the values of `stft_loss` with the sizes of each resolution r.

    Args:
        pred: Waveforms `(*items, time)` of at least as many samples as the largest transform.
        target: Same shape and range as `pred`.
        fft_sizes: Samples of each transform.
        hop_sizes: Samples from frame to frame, for each resolution.
        window_sizes: Samples of each window; a shorter one is centred in its transform.
        spectral_convergence: Gain of the relative distance, one norm for each item.
        log_magnitude: Gain of the distance of logarithms.
        linear_magnitude: Gain of the distance of magnitudes.
        phase: Gain of the distance of phases.
        eps: Smallest squared magnitude.
        where: Bool array of the shape of `pred`; see `stft_loss`.

    One unit per item; see `jaxloss.reduce`. Memory: that of the largest resolution alone, for the
    gradient too.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Yamamoto et al., Parallel WaveGAN, ICASSP 2020. Equals auraloss's `MultiResolutionSTFTLoss`
        of one item; auraloss takes one norm over all items of a batch.

    >>> wave = jnp.sin(jnp.arange(16.0))
    >>> sizes = dict(fft_sizes=(4, 8), hop_sizes=(1, 2), window_sizes=(4, 8))
    >>> multi_resolution_stft_loss(wave / 2, wave, **sizes, log_magnitude=0.0)
    Array(0.5, dtype=float32)
    """
    pred, target = prepare_waves(where, pred, target)
    sizes = _resolutions(pred, fft_sizes, hop_sizes, window_sizes, "s")
    gains = (spectral_convergence, log_magnitude, linear_magnitude, phase)
    return _stft(sizes, pred, target, gains, eps, where, weights, reduction)


def _stft(
    sizes: list[Resolution],
    pred: Array,
    target: Array,
    gains: Sequence[Number],
    eps: Number,
    where: Where | None,
    weights: Values | None,
    reduction: Reduction,
) -> Array:
    names = ("spectral_convergence", "log_magnitude", "linear_magnitude", "phase")
    used = tuple(not (isinstance(gain, (int, float)) and gain == 0) for gain in gains)
    options = numbers(pred, **dict(zip(names, gains, strict=True)), eps=eps)
    kernels = [partial(_stft_distance, size, used) for size in sizes]
    return _reduced(sizes, kernels, pred, target, options, where, weights, reduction)


def _stft_distance(
    size: Resolution,
    used: tuple[bool, ...],
    pred: Array,
    target: Array,
    options: tuple[Array, ...],
    where: Where | None,
) -> Array:
    unit, *gains, eps = options
    convergence, logarithms, magnitudes, phases = gains
    floor = (eps / unit / unit)[..., None, None]
    kept = kept_frames(where, size)
    x, y = stft(pred, size), stft(target, size)  # (*items, frames, bins)
    x_power, y_power = floored_power(x, floor), floored_power(y, floor)
    gap = safe_sqrt(x_power) - safe_sqrt(y_power)
    total = jnp.zeros_like(unit)
    if used[0]:
        whole = safe_sqrt(frame_mean(y_power, kept))
        total += convergence * safe_div(safe_sqrt(frame_mean(gap * gap, kept)), whole)
    if used[1]:
        apart = absolute(jnp.log(x_power) - jnp.log(y_power))
        total += logarithms * 0.5 * frame_mean(apart, kept)
    if used[2]:
        total += magnitudes * unit * frame_mean(absolute(gap), kept)
    if used[3]:
        x_scale, y_scale = jax.lax.rsqrt(x_power), jax.lax.rsqrt(y_power)
        apart = scaled_gap(x, x_scale, y, y_scale)
        total += phases * 0.5 * frame_mean(apart, kept)  # 1 - cos, exact near 0
    return total


@compiled(
    "sample_rate", "fft_size", "hop_size", "window_size", "num_mels", "f_min", "f_max", "log_scale"
)
def mel_spectrogram_loss(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    sample_rate: int | float,
    fft_size: int = 1024,
    hop_size: int = 256,
    window_size: int = 1024,
    num_mels: int = 80,
    f_min: int | float = 0.0,
    f_max: int | float | None = None,
    log_scale: bool = True,
    eps: Number = 1e-5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean absolute difference of log mel spectrograms, from 0, in natural logarithms.

    $$ \ell = \frac{1}{N M} \sum_{fm} \left| \log \max(X_{fm}, \text{eps})
       - \log \max(Y_{fm}, \text{eps}) \right| $$

    for magnitudes of the spectra of `stft_loss`, summed by the filters of `mel_filterbank`, in N
    frames and M filters. Below `eps` the gradient is 0, and so it is at equality; an empty filter,
    as small transforms have, costs nothing.

    Args:
        pred: Waveforms `(*items, time)` of at least `fft_size` samples.
        target: Same shape and range as `pred`.
        sample_rate: Samples in a second.
        fft_size: Samples of the transform; a shorter window is centred in it.
        hop_size: Samples from frame to frame.
        window_size: Samples of the window.
        num_mels: Number of filters.
        f_min: Where the lowest filter begins, in hertz.
        f_max: Where the highest one ends; half the sample rate if None.
        log_scale: Whether to compare logarithms or the magnitudes themselves.
        eps: Smallest magnitude after the filters, if `log_scale`.
        where: Bool array of the shape of `pred`; see `stft_loss`.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Kong et al., HiFi-GAN, NeurIPS 2020, which multiplies by 45 and shifts the frames. Equals
        auraloss's `MelSTFTLoss(w_sc=0)` of the same number of filters where no magnitude is below
        `eps`; auraloss has no bound there.

    >>> wave = jnp.sin(jnp.arange(64.0))
    >>> options = dict(sample_rate=8000, fft_size=32, hop_size=8, window_size=32, num_mels=4)
    >>> mel_spectrogram_loss(2 * wave, wave, **options)  # log 2
    Array(0.69314724, dtype=float32)
    """
    pred, target = prepare_waves(where, pred, target)
    sizes = _resolutions(pred, (fft_size,), (hop_size,), (window_size,), "")
    check_count(num_mels=num_mels)
    _check_band(sample_rate, f_min, f_max)
    filters = [mel_filters(sample_rate, fft_size, num_mels, f_min, f_max)]
    return _mel(sizes, filters, log_scale, pred, target, eps, where, weights, reduction)


@compiled("sample_rate", "fft_sizes", "num_mels")
def multi_scale_mel_loss(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    sample_rate: int | float,
    fft_sizes: Sizes = (32, 64, 128, 256, 512, 1024, 2048),
    num_mels: Sizes = (5, 10, 20, 40, 80, 160, 320),
    eps: Number = 1e-5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean absolute difference of log mel spectrograms over several scales, from 0.

    $$ \ell = \frac{1}{R} \sum_r \ell_r $$

    for the values of `mel_spectrogram_loss` at each scale r, with windows as long as the transform
    and a hop of a quarter of it.

    Args:
        pred: Waveforms `(*items, time)` of at least as many samples as the largest transform.
        target: Same shape and range as `pred`.
        sample_rate: Samples in a second.
        fft_sizes: Samples of each transform and window, at least 4.
        num_mels: Number of filters of each scale.
        eps: Smallest magnitude after the filters.
        where: Bool array of the shape of `pred`; see `stft_loss`.

    One unit per item; see `jaxloss.reduce`. Memory: that of the largest scale alone, for the
    gradient too.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Kumar et al., High-fidelity audio compression with improved RVQGAN, NeurIPS 2023 (DAC),
        which adds the scales and takes base 10: its value is ours times their number over log 10.

    >>> wave = jnp.sin(jnp.arange(64.0))
    >>> options = dict(sample_rate=8000, fft_sizes=(16, 32), num_mels=(2, 4))
    >>> multi_scale_mel_loss(16 * wave, wave, **options)  # log 16
    Array(2.7725892, dtype=float32)
    """
    pred, target = prepare_waves(where, pred, target)
    hops = tuple(max(size // 4, 1) if isinstance(size, int) else size for size in fft_sizes)
    sizes = _resolutions(pred, fft_sizes, hops, fft_sizes, "s")
    _check_lengths(fft_sizes, num_mels=num_mels)
    _check_band(sample_rate, 0.0, None)
    for count in num_mels:
        check_count(num_mels=count)
    filters = [
        mel_filters(sample_rate, size, count, 0.0, None)
        for size, count in zip(fft_sizes, num_mels, strict=True)
    ]
    return _mel(sizes, filters, True, pred, target, eps, where, weights, reduction)


def _mel(
    sizes: list[Resolution],
    filters: list[np.ndarray],
    log_scale: bool,
    pred: Array,
    target: Array,
    eps: Number,
    where: Where | None,
    weights: Values | None,
    reduction: Reduction,
) -> Array:
    kernels = [
        partial(_mel_distance, *pair, log_scale) for pair in zip(sizes, filters, strict=True)
    ]
    options = numbers(pred, eps=eps)
    return _reduced(sizes, kernels, pred, target, options, where, weights, reduction)


def _mel_distance(
    size: Resolution,
    filters: np.ndarray,
    log_scale: bool,
    pred: Array,
    target: Array,
    options: tuple[Array, ...],
    where: Where | None,
) -> Array:
    unit, eps = options
    kept, taps = kept_frames(where, size), jnp.asarray(filters.T, pred.dtype)
    floor = (FLOOR / unit / unit)[..., None, None]
    least = (eps / unit)[..., None, None]

    def mel(wave: Array) -> Array:
        bands = jnp.matmul(magnitude(stft(wave, size), floor), taps, precision="highest")
        return jnp.log(jnp.where(bands > least, bands, least)) if log_scale else bands

    values = frame_mean(absolute(mel(pred) - mel(target)), kept)
    return values if log_scale else unit * values


@compiled("fft_size", "hop_size", "window_size")
def complex_spectral_loss(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    fft_size: int = 1024,
    hop_size: int = 256,
    window_size: int = 1024,
    power: Number = 0.3,
    magnitude_weight: Number = 0.7,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared distance of power-compressed spectra, with and without their phases, from 0.

    $$ \ell = \frac{1}{N} \sum_{fk} (1 - m) \left| X^c e^{i \varphi_X} - Y^c e^{i \varphi_Y}
       \right|^2 + m (X^c - Y^c)^2 $$

    for the magnitudes X and Y and the phases of `stft_loss`, the power c and the weight m, in N
    frames and bins. Magnitudes are at least 1e-4, with zero gradient below it.

    Args:
        pred: Waveforms `(*items, time)` of at least `fft_size` samples.
        target: Same shape and range as `pred`.
        fft_size: Samples of the transform; a shorter window is centred in it.
        hop_size: Samples from frame to frame.
        window_size: Samples of the window.
        power: Exponent of the magnitudes.
        magnitude_weight: Share of the term without phases.
        where: Bool array of the shape of `pred`; see `stft_loss`.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Braun and Tashev, A consolidated view of loss functions for supervised deep learning-based
        speech enhancement, TSP 2021, which first brings the target to unit level and adds frames
        and bins up.

    >>> wave = jnp.array([1.0, 0.0, -1.0, 0.0])
    >>> options = dict(fft_size=4, hop_size=4, window_size=4, magnitude_weight=1.0, power=1.0)
    >>> complex_spectral_loss(-wave, wave, **options)  # a sign is a phase
    Array(0., dtype=float32)
    """
    pred, target = prepare_waves(where, pred, target)
    sizes = _resolutions(pred, (fft_size,), (hop_size,), (window_size,), "")
    options = numbers(pred, power=power, magnitude_weight=magnitude_weight)
    kernels = [partial(_compressed_distance, size) for size in sizes]
    return _reduced(sizes, kernels, pred, target, options, where, weights, reduction)


def _compressed_distance(
    size: Resolution, pred: Array, target: Array, options: tuple[Array, ...], where: Where | None
) -> Array:
    unit, exponent, share = options
    kept, floor = kept_frames(where, size), (FLOOR / unit / unit)[..., None, None]

    x, y = stft(pred, size), stft(target, size)  # (*items, frames, bins)
    x_power, y_power = floored_power(x, floor), floored_power(y, floor)
    scale = lambda squared: squared ** ((exponent - 1) / 2)
    apart = (1 - share) * scaled_gap(x, scale(x_power), y, scale(y_power))
    apart += share * (x_power ** (exponent / 2) - y_power ** (exponent / 2)) ** 2
    return unit ** (2 * exponent) * frame_mean(apart, kept)


def mel_filterbank(
    *,
    sample_rate: int | float,
    fft_size: int,
    num_mels: int,
    f_min: int | float = 0.0,
    f_max: int | float | None = None,
) -> Float[Array, "num_mels bins"]:
    r"""Triangular filters that are equally wide on Slaney's mel scale, each of area 1 over hertz.

    Args:
        sample_rate: Samples in a second.
        fft_size: Samples of the transform, which has `fft_size // 2 + 1` bins.
        num_mels: Number of filters.
        f_min: Where the lowest filter begins, in hertz.
        f_max: Where the highest one ends; half the sample rate if None.

    Returns:
        One filter per row. Where filters are narrower than the bins are apart, some are empty.

    Reference:
        Slaney, Auditory Toolbox, 1998. Equals `librosa.filters.mel` under its defaults.

    >>> mel_filterbank(sample_rate=8, fft_size=4, num_mels=1)  # a triangle from 0 to 4 hertz
    Array([[0. , 0.5, 0. ]], dtype=float32)
    """
    with naming("mel_filterbank"):
        check_count(fft_size=fft_size, num_mels=num_mels)
        _check_band(sample_rate, f_min, f_max)
    return jnp.asarray(mel_filters(sample_rate, fft_size, num_mels, f_min, f_max))


def _reduced(
    sizes: list[Resolution],
    kernels: Sequence[Callable[..., Array]],
    pred: Array,
    target: Array,
    options: tuple[Array, ...],
    where: Where | None,
    weights: Values | None,
    reduction: Reduction,
) -> Array:
    """The mean of kernels of `(pred, target, (unit, *options), where)` over the resolutions."""
    unit = jnp.maximum(level(pred), level(target))
    pred, target = pred / unit[..., None], target / unit[..., None]
    values = sum_in_turn(kernels, pred, target, (unit, *options), where) / len(sizes)
    kept = (any_sample(kept_frames(where, size)) for size in sizes)
    found = [some for some in kept if some is not None]
    units = functools.reduce(jnp.logical_or, found) if found else None
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _resolutions(
    pred: Array, fft_sizes: Sizes, hop_sizes: Sizes, window_sizes: Sizes, plural: str
) -> list[Resolution]:
    _check_lengths(
        fft_sizes, **{f"hop_size{plural}": hop_sizes, f"window_size{plural}": window_sizes}
    )
    sizes = [Resolution(*row) for row in zip(fft_sizes, hop_sizes, window_sizes, strict=True)]
    for size in sizes:
        names = [name + plural for name in ("fft_size", "hop_size", "window_size")]
        check_resolution(pred.shape[-1], size, names)
    return sizes


def _check_lengths(fft_sizes: Sizes, **others: Sizes) -> None:
    for name, sizes in dict(fft_sizes=fft_sizes, **others).items():
        if not isinstance(sizes, tuple) or not sizes:
            raise ValueError(message(name, "a tuple of sizes", repr(sizes)))
        if len(sizes) != len(fft_sizes):
            raise ValueError(message(name, f"{len(fft_sizes)} sizes, as fft_sizes", repr(sizes)))


def _check_band(sample_rate: float, f_min: float, f_max: float | None) -> None:
    if not sample_rate > 0:
        raise ValueError(message("sample_rate", "a positive number", repr(sample_rate)))
    highest = sample_rate / 2 if f_max is None else f_max
    if not 0 <= f_min < highest <= sample_rate / 2:
        expected = f"0 <= f_min < f_max <= {sample_rate / 2}"
        raise ValueError(message("f_max", expected, f"{f_min} and {highest}"))


def _tones(generator: np.random.Generator, shape: tuple[int, ...], _: object) -> np.ndarray:
    """Waves with something in every bin: the derivatives at an empty one are of any size."""
    time = np.arange(shape[-1])
    gains = generator.uniform(0.5, 1.5, (4, *shape[:-1], 1))
    tones = [np.cos(2 * np.pi * rate * time) for rate in (0, 1 / 6, 1 / 3, 1 / 2)]
    return np.sum([gain * tone for gain, tone in zip(gains, tones, strict=True)], axis=0)


_PAIR = dict(pred=Draw("B T", _tones), target=Draw("B T", _tones))
_SIZE = dict(fft_size=6, hop_size=3, window_size=5)
_TIME = dict(T=11)

CASES = (
    Case(
        stft_loss,
        _PAIR,
        dict(spectral_convergence=0.5, linear_magnitude=0.7, phase=0.3, eps=1e-4, **_SIZE),
        positions="B T",
        sizes=_TIME,
        zero_at_target=True,
    ),
    Case(
        multi_resolution_stft_loss,
        _PAIR,
        dict(fft_sizes=(6, 5), hop_sizes=(3, 4), window_sizes=(5, 4)),
        positions="B T",
        sizes=_TIME,
        zero_at_target=True,
    ),
    Case(
        mel_spectrogram_loss,
        _PAIR,
        dict(sample_rate=8, num_mels=3, eps=1e-3, **_SIZE),
        positions="B T",
        sizes=_TIME,
        zero_at_target=True,
    ),
    Case(
        multi_scale_mel_loss,
        _PAIR,
        dict(sample_rate=8, fft_sizes=(9,), num_mels=(2,), eps=0.1),
        positions="B T",
        sizes=_TIME,
        zero_at_target=True,
    ),
    Case(
        complex_spectral_loss,
        _PAIR,
        dict(power=0.5, magnitude_weight=0.6, **_SIZE),
        positions="B T",
        sizes=_TIME,
        zero_at_target=True,
    ),
)
