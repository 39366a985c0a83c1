"""Synthetic voices that hum at once, and short spectra to take them apart with."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from .task import Examples

RATE, SAMPLES, HARMONICS = 4000, 1024, 12  # in hertz; a quarter of a second
FRAME, HOP = 128, 64
WINDOW = np.sin(np.pi * (np.arange(FRAME) + 0.5) / FRAME).astype(np.float32)  # twice it adds to 1


def hum(pitch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Harmonics of a gliding pitch, shaped by two resonances and a swell; of unit power."""
    count, seconds = len(pitch), np.arange(SAMPLES) / RATE
    glide = rng.uniform(-0.15, 0.15, (count, 1))
    frequency = pitch[:, None] * (1 + glide * seconds / seconds[-1])
    turns = np.cumsum(frequency, axis=-1) / RATE
    order = np.arange(1, HARMONICS + 1)
    places = rng.uniform((250, 900), (800, 1900), (count, 2))[:, :, None]
    sung = order * pitch[:, None]
    level = np.exp(-(((sung[:, None] - places) / 200) ** 2)).sum(axis=1) + 0.05
    level *= sung < 0.45 * RATE
    phase = rng.uniform(size=(count, HARMONICS))
    waves = np.sin(2 * np.pi * (order[:, None] * turns[:, None] + phase[..., None]))
    swell = 0.3 + np.sin(np.pi * (seconds / seconds[-1] + rng.uniform(size=(count, 1)))) ** 2
    voice = swell * np.sum(level[..., None] * waves, axis=1)
    return voice / np.sqrt(np.mean(voice**2, axis=-1, keepdims=True))


def draw_mixtures(count: int, rng: np.random.Generator) -> Examples:
    """Sums of two voices in no order; targets `(count, 2, samples)` are the voices themselves."""
    low = rng.uniform(90, 200, count)
    pitches = np.stack([low, low * rng.uniform(1.25, 1.6, count)], axis=1)
    pitches = rng.permuted(pitches, axis=1)
    sources = np.stack([hum(pitch, rng) for pitch in pitches.T], axis=1).astype(np.float32)
    noise = rng.normal(0, 0.02, (count, SAMPLES)).astype(np.float32)
    return Examples(sources.sum(axis=1) + noise, sources)


def spectra(x: Float[Array, "*n samples"]) -> Complex[Array, "*n frames bins"]:
    """Half-overlapping frames, windowed and transformed."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(HOP, HOP)])
    blocks = padded.reshape(*x.shape[:-1], -1, HOP)
    frames = jnp.concatenate([blocks[..., :-1, :], blocks[..., 1:, :]], axis=-1)
    return jnp.fft.rfft(WINDOW * frames)


def waveforms(spectra: Complex[Array, "*n frames bins"]) -> Float[Array, "*n samples"]:
    """What `spectra` came from."""
    frames = WINDOW * jnp.fft.irfft(spectra, FRAME)
    pad = [(0, 0)] * (frames.ndim - 2)
    first = jnp.pad(frames[..., :HOP], [*pad, (0, 1), (0, 0)])
    second = jnp.pad(frames[..., HOP:], [*pad, (1, 0), (0, 0)])
    return (first + second)[..., 1:-1, :].reshape(*frames.shape[:-2], -1)


def draw_waves(figure: Any, predictions: Mapping[str, Array], test: Examples) -> None:
    """A stretch of one test mixture: both voices, and what each loss took for them."""
    shown = slice(400, 520)
    axes = figure.subplots(2, len(predictions), sharex=True, sharey=True, squeeze=False)
    time = 1000 * np.arange(SAMPLES)[shown] / RATE
    for column, (name, voices) in enumerate(predictions.items()):
        sources, voices = test.target[0][:, shown], np.asarray(voices[0])[:, shown]
        straight, crossed = (np.sum(sources * v) for v in (voices, voices[::-1]))
        for panel, source, voice in zip(
            axes[:, column], sources, voices if straight > crossed else voices[::-1], strict=True
        ):
            panel.plot(time, source, color="0.6", lw=2)
            panel.plot(time, voice, color="tab:blue", lw=1)
        axes[0, column].set_title(name, fontsize=9)
        axes[1, column].set_xlabel("ms")
    figure.suptitle("A test mixture: the voices (grey) and what was taken for them (blue)")
