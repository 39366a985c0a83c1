"""Waveforms `(*items, time)`: what every audio loss does first, and ratios of energies."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .checks import check_float, check_min_rank, check_same_shape
from .numerics import power_of_two, safe_div, safe_log, widen
from .reduce import mask
from .typing import Where

LOUD = 2.0**30  # samples above it are brought near 1, so that no square leaves the floats


def prepare_waves(where: Where | None, pred: Array, target: Array) -> tuple[Array, Array]:
    """Checked waveforms of one shape, 0 where hidden."""
    check_float(pred=pred)
    check_min_rank(1, pred=pred)
    check_same_shape(pred=pred, target=target)
    if where is not None:
        check_same_shape(pred=pred, where=where)
    pred, target = mask(where, *widen(pred, target))
    return pred, target


def any_sample(where: Where | None) -> Array | None:
    """Items of which a sample is kept."""
    return None if where is None else jnp.any(where, axis=-1)


def centered(wave: Array, where: Where | None) -> Array:
    """The waveform minus the mean of its kept samples."""
    return mask(where, wave - mean(wave, where)[..., None])[0]


def mean(wave: Array, where: Where | None) -> Array:
    """Mean of the kept samples of each item, the others being 0."""
    if where is None:
        return jnp.sum(wave, axis=-1) / max(wave.shape[-1], 1)
    return safe_div(jnp.sum(wave, axis=-1), jnp.sum(where, axis=-1, dtype=wave.dtype))


def level(wave: Array) -> Array:
    """For each item 1, or where it is too loud for squares a power of two near its peak."""
    peak = jnp.max(jnp.abs(jax.lax.stop_gradient(wave)), axis=-1, initial=0)
    loud = (peak > LOUD) & jnp.isfinite(peak)
    return power_of_two(jnp.where(loud, peak, 1))


def energy(wave: Array) -> Array:
    """Sum of squares of each item."""
    return jnp.sum(wave * wave, axis=-1)


def decibels(signal: Array, error: Array, eps: Array, unit: Array) -> Array:
    """10 log10(S / (E + eps) + eps) of the energies of waveforms given in multiples of `unit`.

    Loud waveforms without error are taken to have so much of it that the quotient is a float.
    """
    noise = error + eps / unit / unit
    noise = jnp.maximum(noise, 1e8 * jnp.finfo(noise.dtype).tiny)
    return 10 / math.log(10) * safe_log(safe_div(signal, noise) + eps)


def snr_values(pred: Array, target: Array, eps: Array, share: Array | float = 0.0) -> Array:
    """Signal-to-noise ratio of each item in decibels; `share` of the signal counts as noise too."""
    unit = jnp.maximum(level(pred), level(target))
    pred, target = pred / unit[..., None], target / unit[..., None]
    signal, noise = energy(target), energy(target - pred)
    if not (isinstance(share, (int, float)) and share == 0):
        noise += share * signal
    return decibels(signal, noise, eps, unit)
