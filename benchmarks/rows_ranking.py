"""Pairwise ranking: the sums over all pairs of a list against rax."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Contender, Row, compiled
from jaxloss.losses.ranking_pairwise import pairwise_hinge_loss, pairwise_logistic_loss
from parity.peers import peer, require_peer


def draw(lists: int, items: int) -> Callable[[np.random.Generator], Any]:
    def sample(generator: np.random.Generator) -> tuple[jax.Array, jax.Array]:
        scores = generator.standard_normal((lists, items), np.float32)
        return jnp.asarray(scores), jnp.asarray(generator.integers(0, 5, scores.shape, np.int32))

    return sample


def against_rax(
    ours: Callable[..., Any], name: str, scores: jax.Array, relevance: jax.Array
) -> Mapping[str, Contender]:
    require_peer("rax")
    grades = relevance.astype(jnp.float32)
    return {
        "jaxloss": compiled(jax.value_and_grad(ours), scores, relevance),
        "rax": compiled(jax.value_and_grad(peer(f"rax.{name}")), scores, grades),
    }


HINGE = partial(against_rax, pairwise_hinge_loss, "pairwise_hinge_loss")
LOGISTIC = partial(against_rax, pairwise_logistic_loss, "pairwise_logistic_loss")

ROWS = (
    Row("rank_hinge", "32 x 1000", draw(32, 1000), HINGE, {"rax": 0.35}, 10),
    Row("rank_logistic", "32 x 1000", draw(32, 1000), LOGISTIC, {"rax": 0.45}, 10),
    Row("rank_hinge_short", "1024 x 20", draw(1024, 20), HINGE, {"rax": 1.0}, 4),
    Row("rank_logistic_short", "1024 x 20", draw(1024, 20), LOGISTIC, {"rax": 1.0}, 4),
)
