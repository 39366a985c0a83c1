"""Contrastive losses in chunks against the whole matrix written out, optax and torch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from pytorch_metric_learning.losses import NTXentLoss

from benchmarks.measure import Contender, Row, compiled
from jaxloss.losses import contrastive

Arrays = tuple[Any, ...]


def draw_pairs(n: int, d: int) -> Callable[[np.random.Generator], Arrays]:
    def sample(generator: np.random.Generator) -> Arrays:
        draw = lambda: jnp.asarray(generator.standard_normal((n, d), np.float32))
        return draw(), draw()

    return sample


def draw_views(n: int, d: int) -> Callable[[np.random.Generator], Arrays]:
    def sample(generator: np.random.Generator) -> Arrays:
        embeddings = jnp.asarray(generator.standard_normal((n, d), np.float32))
        return embeddings, jnp.asarray(np.tile(np.arange(n // 2, dtype=np.int32), 2))

    return sample


def cosines(query: jax.Array, keys: jax.Array) -> jax.Array:
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
    return unit(query) @ unit(keys).T


def naive_clip(query: jax.Array, keys: jax.Array) -> jax.Array:
    z = 14.285714 * cosines(query, keys)
    both = jax.nn.logsumexp(z, axis=0) + jax.nn.logsumexp(z, axis=1)
    return jnp.mean(both / 2 - jnp.diagonal(z))


def naive_siglip(query: jax.Array, keys: jax.Array) -> jax.Array:
    z = 10 * cosines(query, keys) - 10
    signs = 2 * jnp.eye(z.shape[0]) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * z)) / z.shape[0]


def torch_clip(z: torch.Tensor) -> torch.Tensor:
    labels = torch.arange(z.shape[0])
    ce = torch.nn.functional.cross_entropy
    return (ce(14.285714 * z, labels) + ce(14.285714 * z.T, labels)) / 2


def torch_siglip(z: torch.Tensor) -> torch.Tensor:
    signs = 2 * torch.eye(z.shape[0]) - 1
    return -torch.nn.functional.logsigmoid(signs * (10 * z - 10)).sum() / z.shape[0]


def pairs(
    loss: Callable[..., Any], naive: Callable[..., Any], theirs: Callable[..., Any]
) -> Callable[..., Mapping[str, Contender]]:
    """Ours in chunks, the whole matrix in jax and in torch, each with the gradient of both."""

    def build(query: jax.Array, keys: jax.Array) -> Mapping[str, Contender]:
        step = lambda loss: compiled(jax.value_and_grad(loss, (0, 1)), query, keys)
        q, k = (torch.tensor(np.asarray(x)).requires_grad_() for x in (query, keys))
        unit = partial(torch.nn.functional.normalize, dim=1)

        def in_torch() -> Any:
            return torch.autograd.grad(theirs(unit(q) @ unit(k).T), (q, k))

        return {
            "jaxloss": step(partial(loss, chunk_size=256)),
            "naive": step(naive),
            "torch": Contender(in_torch),
        }

    return build


def views(embeddings: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    step = lambda loss: compiled(jax.value_and_grad(loss), embeddings, labels)
    return {"jaxloss": step(contrastive.nt_xent), "optax": step(optax.losses.ntxent)}


def few_views(embeddings: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    x = torch.tensor(np.asarray(embeddings)).requires_grad_()
    y = torch.tensor(np.asarray(labels))
    theirs = NTXentLoss(temperature=0.07)
    peer = Contender(lambda: torch.autograd.grad(theirs(x, y), x))
    return {**views(embeddings, labels), "pytorch-metric-learning": peer}


ROWS = (
    Row(
        "clip",
        "8192 x 512",
        draw_pairs(8192, 512),
        pairs(contrastive.clip_loss, naive_clip, torch_clip),
        {"naive": 1.05},
        20,
    ),
    Row(
        "siglip",
        "8192 x 512",
        draw_pairs(8192, 512),
        pairs(contrastive.siglip_loss, naive_siglip, torch_siglip),
        {"naive": 0.85},
        20,
    ),
    Row("nt_xent", "1024 x 256", draw_views(1024, 256), views, {"optax": 0.02}, 20),
    Row("nt_xent_few", "256 x 128", draw_views(256, 128), few_views, {"optax": 0.1}, 10),
)
