"""Listwise ranking against rax; a sample of a large table against its formula."""

from collections.abc import Callable, Mapping
from functools import partial
from pkgutil import resolve_name
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Contender, Row, compiled
from jaxloss.losses.ranking_listwise import list_mle_loss
from jaxloss.losses.ranking_smooth import approx_ndcg_loss
from jaxloss.losses.recommendation import linear_sampled_softmax_loss
from parity.peers import require_peer


def draw(lists: int, items: int) -> Callable[[np.random.Generator], Any]:
    def sample(generator: np.random.Generator) -> tuple[jax.Array, jax.Array]:
        scores = generator.standard_normal((lists, items), np.float32)
        grades = generator.integers(0, 5, scores.shape).astype(np.float32)
        return jnp.asarray(scores), jnp.asarray(grades)

    return sample


def approx_ndcg(scores: jax.Array, grades: jax.Array) -> Mapping[str, Contender]:
    require_peer("rax")
    theirs = resolve_name("rax.approx_t12n")(resolve_name("rax.ndcg_metric"))
    return {
        "jaxloss": compiled(jax.value_and_grad(approx_ndcg_loss), scores, grades),
        "rax": compiled(jax.value_and_grad(lambda s, y: theirs(s, y)), scores, grades),
    }


def list_mle(scores: jax.Array, grades: jax.Array) -> Mapping[str, Contender]:
    require_peer("rax")
    theirs = resolve_name("rax.listmle_loss")
    return {
        "jaxloss": compiled(jax.value_and_grad(list_mle_loss), scores, grades),
        "rax": compiled(jax.value_and_grad(lambda s, y: theirs(s, y)), scores, grades),
    }


def draw_items(
    queries: int, negatives: int, items: int, features: int
) -> Callable[[np.random.Generator], Any]:
    def sample(generator: np.random.Generator) -> tuple[jax.Array, ...]:
        normal = lambda *shape: jnp.asarray(generator.standard_normal(shape, np.float32) / 8)
        index = lambda size: jnp.asarray(generator.integers(0, items, size, np.int32))
        return normal(queries, features), normal(items, features), index(queries), index(negatives)

    return sample


def by_hand(query: jax.Array, table: jax.Array, chosen: jax.Array, sampled: jax.Array) -> jax.Array:
    own = jnp.sum(query * table[chosen], axis=1, keepdims=True)
    others = jnp.where(chosen[:, None] == sampled, -1e9, query @ table[sampled].T)
    return -jnp.mean(jax.nn.log_softmax(jnp.concatenate([own, others], axis=1))[:, 0])


def sampled_softmax(*arrays: jax.Array) -> Mapping[str, Contender]:
    step = partial(jax.value_and_grad, argnums=(0, 1))
    return {
        "jaxloss": compiled(step(linear_sampled_softmax_loss), *arrays),
        "naive": compiled(step(by_hand), *arrays),
    }


ROWS = (
    Row("approx_ndcg", "32 x 1000", draw(32, 1000), approx_ndcg, {"rax": 0.75}, 10),
    Row("approx_ndcg_short", "1024 x 20", draw(1024, 20), approx_ndcg, {"rax": 1.0}, 4),
    Row("list_mle", "32 x 1000", draw(32, 1000), list_mle, {"rax": 0.75}, 6),
    Row("list_mle_short", "1024 x 20", draw(1024, 20), list_mle, {"rax": 1.0}, 4),
    Row(
        "sampled_softmax",
        "4096 x (1 + 1024) of 100k x 64",
        draw_items(4096, 1024, 100_000, 64),
        sampled_softmax,
        {"naive": 1.05},
        8,
    ),
)
