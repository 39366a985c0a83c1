"""From noise to digits: samples along straight paths, how they compare with real ones, grids."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import jaxloss

from .task import Examples

PIXELS, STEPS = 64, 40  # of an image; of Euler's method from noise to image


def integrate(
    velocity: Callable[[Array, Array], Array], count: int, key: PRNGKeyArray
) -> Float[Array, "count pixels"]:
    """Images at the end of paths that begin at time 0 with noise; `velocity` is of (x, time)."""
    noise = jax.random.normal(key, (count, PIXELS))

    def step(i: Array, x: Array) -> Array:
        return x + velocity(x, jnp.full((count, 1), (i + 0.5) / STEPS)) / STEPS

    return jax.lax.fori_loop(0, STEPS, step, noise)


def towards(image: Array, x: Array, time: Array) -> Array:
    """Velocity that leads to an image at time 1; one beyond black or white is not gone to."""
    return (jnp.clip(image, -1, 1) - x) / (1 - time)


def gaussian(x: Array) -> Array:
    """Samples of the normal distribution with the mean and covariance of these images."""
    draw = jax.random.multivariate_normal
    return draw(jax.random.key(2), x.mean(axis=0), jnp.cov(x.T), (len(x),), method="svd")


def distance(samples: Array, real: Array) -> Array:
    """Sliced Wasserstein distance to digits never trained on, root mean square of grey levels."""
    squared = jaxloss.sliced_wasserstein(samples, real, key=jax.random.key(0), projections=256)
    return 16 * jnp.sqrt(squared / 2)  # images reach from -1 to 1, grey levels from 0 to 16


def nearest(samples: Array, real: Array) -> Array:
    """Mean distance from a sample to the nearest digit never trained on, in grey levels."""
    gaps = jaxloss.pairwise_distance(samples, real)
    return 8 * jnp.mean(jnp.min(gaps, axis=-1)) / np.sqrt(PIXELS)


def draw_grids(figure: Any, predictions: Mapping[str, Array], test: Examples) -> None:
    """Samples of each loss, and real digits beside them."""
    side = 8
    shown = {**predictions, "real digits": test.target}
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, (name, images) in zip(axes, shown.items(), strict=True):
        tiles = np.asarray(images)[: side * side].reshape(side, side, 8, 8)
        grid = np.pad(tiles, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=-1)
        panel.imshow(-grid.swapaxes(1, 2).reshape(side * 10, -1), cmap="gray", vmin=-1, vmax=1)
        panel.set_title(name, fontsize=10)
        panel.axis("off")
    figure.suptitle("Samples of the first run")
