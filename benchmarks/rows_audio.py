"""Multi-resolution STFT loss: ours against the formula in JAX and auraloss; pairs of SI-SDR."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.measure import Contender, Row, compiled
from jaxloss.losses.separation import pairwise_items, permutation_invariant
from jaxloss.losses.spectral import multi_resolution_stft_loss
from jaxloss.losses.waveforms import si_sdr_loss
from parity.peers import peer, require_peer

SIZES = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
EPS = 1e-8


def draw(*shape: int) -> Callable[[np.random.Generator], Any]:
    def sample(generator: np.random.Generator) -> tuple[jax.Array, jax.Array]:
        target = generator.standard_normal(shape, np.float32)
        noise = generator.standard_normal(shape, np.float32)
        return jnp.asarray(target + 0.3 * noise), jnp.asarray(target)

    return sample


def magnitudes(x: jax.Array, fft: int, hop: int, window: int) -> jax.Array:
    """What ports of the PyTorch recipe do: gathered frames of the whole transform."""
    x = jnp.pad(x, ((0, 0), (fft // 2, fft // 2)), mode="reflect")
    at = np.arange(0, x.shape[1] - fft + 1, hop)[:, None] + np.arange(fft)
    left = (fft - window) // 2
    taps = np.zeros(fft, np.float32)
    taps[left : left + window] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    z = jnp.fft.rfft(x[:, at] * taps)
    return jnp.sqrt(jnp.maximum(z.real**2 + z.imag**2, EPS))


def by_hand(pred: jax.Array, target: jax.Array) -> jax.Array:
    total = jnp.zeros(())
    for size in SIZES:
        x, y = magnitudes(pred, *size), magnitudes(target, *size)
        total += jnp.linalg.norm(y - x) / jnp.linalg.norm(y)
        total += jnp.mean(jnp.abs(jnp.log(x) - jnp.log(y)))
    return total / len(SIZES)


def in_torch(pred: jax.Array, target: jax.Array) -> Contender:
    require_peer("auraloss")
    loss = peer("auraloss.freq.MultiResolutionSTFTLoss")()
    x = torch.tensor(np.asarray(pred)[:, None], requires_grad=True)
    y = torch.tensor(np.asarray(target)[:, None])
    return Contender(lambda: torch.autograd.grad(loss(x, y), x))


def resolutions(pred: jax.Array, target: jax.Array) -> Mapping[str, Contender]:
    return {
        "jaxloss": compiled(jax.value_and_grad(multi_resolution_stft_loss), pred, target),
        "naive": compiled(jax.value_and_grad(by_hand), pred, target),
        "auraloss": in_torch(pred, target),
    }


def all_pairs(pred: jax.Array, target: jax.Array) -> jax.Array:
    shape = (*pred.shape[:2], *target.shape[1:])
    pred = jnp.broadcast_to(pred[:, :, None], shape)
    return si_sdr_loss(pred, jnp.broadcast_to(target[:, None], shape), reduction="none")


def pairs(pred: jax.Array, target: jax.Array) -> Mapping[str, Contender]:
    one_by_one = partial(pairwise_items, partial(si_sdr_loss, reduction="none"))
    ways = {"jaxloss": one_by_one, "all pairs at once": all_pairs}
    step = lambda way: jax.value_and_grad(lambda p, t: permutation_invariant(way(p, t)))
    return {name: compiled(step(way), pred, target) for name, way in ways.items()}


ROWS = (
    Row(
        "multi_resolution_stft",
        "8 x 32000",
        draw(8, 32000),
        resolutions,
        {"naive": 1.0, "auraloss": 0.5},
        10,
    ),
    Row("pit_si_sdr", "4 x 6 x 16000", draw(4, 6, 16000), pairs, {"all pairs at once": 1.2}, 5),
)
