"""Triplet losses of a batch: ours against the formula in JAX and pytorch-metric-learning."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.measure import Contender, Row, compiled
from jaxloss._core.reductions import nonzero_mean
from jaxloss.losses.triplets import batch_all_triplet_loss, batch_hard_triplet_loss
from parity.peers import peer, require_peer

MARGIN = 0.2


def draw(batch: int, features: int, classes: int) -> Callable[[np.random.Generator], Any]:
    def sample(generator: np.random.Generator) -> tuple[jax.Array, jax.Array]:
        rows = generator.standard_normal((batch, features), np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return jnp.asarray(rows), jnp.asarray(generator.integers(0, classes, batch, np.int32))

    return sample


def distances(x: jax.Array) -> jax.Array:
    """What one writes by hand: dot products, and a root with a gradient of 0 at 0."""
    sizes = jnp.sum(x * x, axis=1)
    square = sizes[:, None] + sizes - 2 * x @ x.T
    apart = square > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)


def hardest_by_hand(x: jax.Array, labels: jax.Array) -> jax.Array:
    apart, same = distances(x), labels[:, None] == labels
    positives = same & ~jnp.eye(len(x), dtype=bool)
    far = jnp.max(jnp.where(positives, apart, 0), axis=1)
    near = jnp.min(jnp.where(same, jnp.inf, apart), axis=1)
    values = jnp.where(jnp.any(positives, axis=1), jax.nn.relu(far - near + MARGIN), 0)
    return jnp.sum(values) / jnp.maximum(jnp.sum(values > 0), 1)


def all_by_hand(x: jax.Array, labels: jax.Array) -> jax.Array:
    apart, same = distances(x), labels[:, None] == labels
    positives = same & ~jnp.eye(len(x), dtype=bool)
    triplets = positives[:, :, None] & ~same[:, None, :]
    values = jax.nn.relu(apart[:, :, None] - apart[:, None, :] + MARGIN)
    values = jnp.where(triplets, values, 0)
    return jnp.sum(values) / jnp.maximum(jnp.sum(values > 0), 1)


def torch_triplets(x: jax.Array, labels: jax.Array, miner: str | None) -> Contender:
    require_peer("pytorch_metric_learning")
    loss = peer("pytorch_metric_learning.losses.TripletMarginLoss")(margin=MARGIN)
    mine = miner and peer(f"pytorch_metric_learning.miners.{miner}")()
    rows = torch.tensor(np.asarray(x), requires_grad=True)
    names = torch.tensor(np.asarray(labels), dtype=torch.int64)

    def run() -> Any:
        triplets = mine(rows, names) if mine else None
        return torch.autograd.grad(loss(rows, names, triplets), rows)

    return Contender(run)


def hardest(x: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    ours = lambda x, y: batch_hard_triplet_loss(x, y, margin=MARGIN, reduction=nonzero_mean)
    return {
        "jaxloss": compiled(jax.value_and_grad(ours), x, labels),
        "naive": compiled(jax.value_and_grad(hardest_by_hand), x, labels),
        "pytorch-metric-learning": torch_triplets(x, labels, "BatchHardMiner"),
    }


def everything(x: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    ours = lambda x, y: batch_all_triplet_loss(x, y, margin=MARGIN)
    return {
        "jaxloss": compiled(jax.value_and_grad(ours), x, labels),
        "naive": compiled(jax.value_and_grad(all_by_hand), x, labels),
        "pytorch-metric-learning": torch_triplets(x, labels, None),
    }


ROWS = (
    Row(
        "batch_hard",
        "2048 x 128",
        draw(2048, 128, 256),
        hardest,
        {"naive": 0.45, "pytorch-metric-learning": 0.1},
        10,
    ),
    Row("all_triplets", "512 x 128", draw(512, 128, 64), everything, {"naive": 0.03}, 10),
)
