"""Two voices that hum at once: who tells them apart, though no order of the two is right?"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import jaxloss

from ..task import Layer, Metric, Splits, Task, init_layers
from ..voices import FRAME, draw_mixtures, draw_waves, spectra, waveforms

BINS, WIDTH = FRAME // 2 + 1, 96
COUNTS = (1500, 100, 200)


def load(seed: int) -> Splits:
    """Mixtures for training, validation and test."""
    rng = np.random.default_rng(seed)
    return Splits(*(draw_mixtures(count, rng) for count in COUNTS))


def init(key: Any) -> list[Layer]:
    """Two layers over three neighbouring frames each, and two masks."""
    return init_layers(key, [(3 * BINS, WIDTH), (3 * WIDTH, WIDTH), (WIDTH, 2 * BINS)])


def apply(params: list[Layer], mixture: Float[Array, "n samples"]) -> Float[Array, "n 2 samples"]:
    """Two parts of the mixture, each by a mask over its spectra."""
    spectrum = spectra(mixture)
    x = jnp.log(jnp.abs(spectrum) ** 2 + 1e-2)
    *hidden, (weight, bias) = params
    for w, b in hidden:
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        near = jnp.concatenate([padded[:, :-2], x, padded[:, 2:]], axis=-1)
        x = jax.nn.relu(near @ w + b)
    masks = jax.nn.sigmoid(x @ weight + bias).reshape(*x.shape[:2], 2, BINS)
    return waveforms(jnp.moveaxis(masks, 2, 1) * spectrum[:, None])


def any_order(loss: Callable[..., Array], **options: Any) -> Callable[[Array, Array], Array]:
    """A loss of one voice, for both in the better of their two orders."""
    each = partial(loss, reduction="none", **options)
    return lambda pred, target: jaxloss.permutation_invariant(
        jaxloss.pairwise_items(each, pred, target)
    )


def soft_order(pred: Array, target: Array) -> Array:
    """The same with orders that are weighed, not chosen."""
    each = partial(jaxloss.si_sdr_loss, reduction="none")
    return jaxloss.sinkhorn_pit_loss(jaxloss.pairwise_items(each, pred, target), temperature=1.0)


def ratio(pred: Array, target: Array) -> Array:
    """Scale-invariant signal-to-distortion ratio in the better order, in decibels."""
    return -any_order(jaxloss.si_sdr_loss)(pred, target)


def mixture_twice(mixture: Array) -> Array:
    """No separation at all."""
    return jnp.stack([mixture, mixture], axis=1)


TASK = Task(
    title="separate: two synthetic voices at once, a quarter of a second each; masks over spectra",
    load=load,
    init=init,
    apply=apply,
    losses={
        "si_sdr_loss_in_given_order": jaxloss.si_sdr_loss,
        "si_sdr_loss": any_order(jaxloss.si_sdr_loss),
        "snr_loss": any_order(jaxloss.snr_loss),
        "sinkhorn_pit_loss": soft_order,
        "multi_resolution_stft_loss": any_order(
            jaxloss.multi_resolution_stft_loss,
            fft_sizes=(64, 256),
            hop_sizes=(16, 64),
            window_sizes=(64, 256),
        ),
    },
    metrics=[Metric("SI-SDR", "dB", ratio, higher_is_better=True, tolerance=0.3)],
    optimizer=optax.adam(2e-3),
    batch_size=32,
    steps=400,
    evaluations=10,
    evaluated=200,
    baselines={"the mixture twice": mixture_twice},
    picture=draw_waves,
)
