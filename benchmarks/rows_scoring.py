"""Scores of ensembles: sorted members against tables of all pairs, and against scoringrules."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Contender, Row, compiled
from jaxloss.losses.crps import crps_ensemble
from jaxloss.losses.scoring_rules import energy_score
from parity.peers import peer, require_peer


def draw(*shape: int) -> Callable[[np.random.Generator], Any]:
    """Ensembles of this shape; the members of numbers stand on the last axis."""

    def sample(generator: np.random.Generator) -> tuple[jax.Array, jax.Array]:
        samples = generator.standard_normal(shape, np.float32)
        first = samples[:, 0] if len(shape) == 3 else samples[..., 0]
        return jnp.asarray(samples), jnp.asarray(generator.permutation(first))

    return sample


def all_pairs(samples: jax.Array, target: jax.Array) -> jax.Array:
    """The definition, with its table."""
    apart = jnp.abs(samples[..., :, None] - samples[..., None, :])
    return jnp.mean(jnp.abs(samples - target[..., None]).mean(-1) - 0.5 * apart.mean((-2, -1)))


def all_norms(samples: jax.Array, target: jax.Array) -> jax.Array:
    """The same of vectors, with the derivative of the norm of 0 taken care of."""
    norm = lambda x: jnp.linalg.norm(x, axis=-1)
    apart = samples[..., :, None, :] - samples[..., None, :, :]
    away = jnp.eye(samples.shape[-2], dtype=samples.dtype)
    pairs = (norm(apart + away[..., None]) * (1 - away)).mean((-2, -1))
    return jnp.mean(norm(samples - target[..., None, :]).mean(-1) - 0.5 * pairs)


def ranked(samples: jax.Array, target: jax.Array) -> Mapping[str, Contender]:
    """Value and gradient of the CRPS."""
    require_peer("scoringrules")
    score = peer("scoringrules.crps_ensemble")
    both = lambda function: compiled(jax.value_and_grad(function), samples, target)
    theirs = {
        f"scoringrules {estimator}": both(
            lambda x, y, e=estimator: jnp.mean(score(y, x, estimator=e, backend="jax"))
        )
        for estimator in ("qd", "nrg")
    }
    return {"jaxloss": both(crps_ensemble), "all pairs": both(all_pairs)} | theirs


def energetic(samples: jax.Array, target: jax.Array) -> Mapping[str, Contender]:
    """Value and gradient of the energy score; the gradient of scoringrules is NaN."""
    require_peer("scoringrules")
    score = partial(peer("scoringrules.es_ensemble"), backend="jax")
    both = lambda function: compiled(jax.value_and_grad(function), samples, target)
    return {
        "jaxloss": both(energy_score),
        "all pairs": both(all_norms),
        "scoringrules": both(lambda x, y: jnp.mean(score(y, x))),
    }


ROWS = (
    Row(
        "crps_ensemble",
        "64 x 1000",
        draw(64, 1000),
        ranked,
        {"all pairs": 0.02, "scoringrules qd": 0.3},
        10,
    ),
    Row("crps_ensemble_small", "8192 x 10", draw(8192, 10), ranked, {"all pairs": 1.0}, 6),
    Row("energy_score", "16 x 200 x 8", draw(16, 200, 8), energetic, {"all pairs": 0.7}, 8),
)
