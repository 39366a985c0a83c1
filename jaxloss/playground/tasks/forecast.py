"""Carbon dioxide over Mauna Loa half a year ahead: who knows how far off the forecast may be?"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import jaxloss

from ..series import AHEAD, PAST, PPM, draw_fans, draw_windows
from ..task import Criterion, Metric, Splits, Task, Tree, apply_mlp, init_mlp

LEVELS = 19  # numbers for each week
QUANTILES = (np.arange(1, LEVELS + 1) / (LEVELS + 1)).astype(np.float32)  # the outer hold 90 %
YEARS, COUNTS = (1958, 1982, 1990, 2002), (900, 250, 300)


def load(seed: int) -> Splits:
    """Windows from three periods, one after the other."""
    rng = np.random.default_rng(seed)
    parts = zip(pairwise(YEARS), COUNTS, strict=True)
    return Splits(*(draw_windows(period, count, rng) for period, count in parts))


def apply(params: Any, past: Float[Array, "n past"]) -> Float[Array, "n ahead levels"]:
    """For each week ahead as many numbers as a loss may want."""
    return apply_mlp(params, past).reshape(-1, AHEAD, LEVELS)


def normal(pred: Array) -> tuple[Array, Array]:
    """The first two numbers as mean and logarithm of the standard deviation."""
    return pred[..., 0], pred[..., 1] - 2


def normal_quantiles(pred: Array) -> Array:
    """Quantiles of the normal distribution that the first two numbers stand for."""
    mean, log_scale = normal(pred)
    return mean[..., None] + jnp.exp(log_scale)[..., None] * jax.scipy.stats.norm.ppf(QUANTILES)


def of(loss: Callable[..., Array], decode: Callable[[Array], Array]) -> Criterion:
    """A loss of the weeks that were measured, and the quantiles its forecasts stand for."""
    evaluate = lambda pred, target: (loss(pred, target["value"], where=target["known"]), {})
    return Criterion(evaluate, decode)


def squared(pred: Array, target: Array, **options: Any) -> Array:
    """The mean alone, which is all that a squared error asks for."""
    return jaxloss.squared_error(pred[..., 0], target, **options)


def likelihood(pred: Array, target: Array, **options: Any) -> Array:
    """Mean and variance by the likelihood of what was measured."""
    mean, log_scale = normal(pred)
    return jaxloss.gaussian_nll_loss(mean, 2 * log_scale, target, **options)


def normal_crps(pred: Array, target: Array, **options: Any) -> Array:
    """Mean and standard deviation by a score in the unit of the series."""
    mean, log_scale = normal(pred)
    return jaxloss.crps_gaussian(mean, jnp.exp(log_scale), target, **options)


def by_quantiles(pred: Array, target: Array, **options: Any) -> Array:
    """Each number a quantile of its own."""
    return jaxloss.crps_quantile(pred, target, jnp.asarray(QUANTILES), **options)


def crps(quantiles: Array, target: Tree) -> Array:
    """Continuous ranked probability score by quantiles, in parts per million."""
    return PPM * by_quantiles(quantiles, target["value"], where=target["known"])


def coverage(quantiles: Array, target: Tree) -> Array:
    """Share of the measurements between the outer quantiles, in percent; 90 would be right."""
    value, known = target["value"], target["known"]
    inside = (value >= quantiles[..., 0]) & (value <= quantiles[..., -1])
    return 100 * jnp.sum(inside & known) / jnp.sum(known)


def year_before(past: Array) -> Array:
    """What the same weeks of the year before did, as if it were certain."""
    seen = past[:, PAST - 52 : PAST - 52 + AHEAD] - past[:, PAST - 53, None]
    return jnp.repeat(seen[..., None], LEVELS, axis=-1)


TASK = Task(
    title="forecast: weekly carbon dioxide over Mauna Loa, 26 weeks ahead; trained on 1958 to "
    "1981, tested on 1990 to 2001",
    load=load,
    init=partial(init_mlp, sizes=(PAST, 64, AHEAD * LEVELS)),
    apply=apply,
    losses={
        "squared_error": of(squared, lambda pred: jnp.repeat(pred[..., :1], LEVELS, axis=-1)),
        "gaussian_nll_loss": of(likelihood, normal_quantiles),
        "crps_gaussian": of(normal_crps, normal_quantiles),
        "crps_ensemble": of(jaxloss.crps_ensemble, partial(jnp.sort, axis=-1)),
        "crps_quantile": of(by_quantiles, lambda pred: pred),
    },
    metrics=[
        Metric("CRPS", "ppm", crps, higher_is_better=False, tolerance=0.02),
        Metric("coverage of the 90 % interval", "%", coverage, True, 2.0),
    ],
    optimizer=optax.adam(1e-3),
    batch_size=128,
    steps=1000,
    evaluations=20,
    baselines={"a year before": year_before},
    picture=draw_fans,
)
