"""ArcFace over many classes, value and gradient in embeddings and prototypes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.measure import Contender, Row, compiled
from jaxloss.losses.prototypes import arcface_loss
from parity.peers import peer, require_peer

SIZE, FEATURES, CLASSES = 512, 128, 20000
MARGIN, SCALE = 0.5, 64.0


def draw(generator: np.random.Generator) -> tuple[Any, ...]:
    embeddings = generator.standard_normal((SIZE, FEATURES), np.float32)
    prototypes = generator.standard_normal((CLASSES, FEATURES), np.float32)
    labels = generator.integers(0, CLASSES, SIZE, np.int32)
    return tuple(map(jnp.asarray, (embeddings, prototypes, labels)))


def by_arccos(embeddings: jax.Array, prototypes: jax.Array, labels: jax.Array) -> jax.Array:
    """As it is usually written: the angle by arccos, the own logit put in by a one-hot mask."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit(embeddings) @ unit(prototypes).T
    own = jnp.take_along_axis(cosines, labels[:, None], axis=1)[:, 0]
    angle = jnp.arccos(jnp.clip(own, -1, 1))
    turned = jnp.cos(angle + MARGIN)
    turned = jnp.where(angle <= jnp.pi - MARGIN, turned, own - MARGIN * jnp.sin(MARGIN))
    hit = jax.nn.one_hot(labels, CLASSES)
    logits = SCALE * (cosines + hit * (turned - own)[:, None])
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


def in_torch(embeddings: jax.Array, prototypes: jax.Array, labels: jax.Array) -> Contender:
    require_peer("pytorch_metric_learning")
    build = peer("pytorch_metric_learning.losses.ArcFaceLoss")
    loss = build(CLASSES, FEATURES, margin=np.degrees(MARGIN), scale=SCALE)
    loss.W.data = torch.tensor(np.asarray(prototypes)).T.contiguous()
    x = torch.tensor(np.asarray(embeddings), requires_grad=True)
    y = torch.tensor(np.asarray(labels), dtype=torch.int64)
    return Contender(lambda: torch.autograd.grad(loss(x, y), (x, loss.W)))


def arcface(*arrays: jax.Array) -> Mapping[str, Contender]:
    step = lambda loss: compiled(jax.value_and_grad(loss, (0, 1)), *arrays)
    return {
        "jaxloss": step(arcface_loss),
        "arccos and one-hot": step(by_arccos),
        "pytorch-metric-learning": in_torch(*arrays),
    }


ROWS = (
    Row(
        "arcface",
        f"{SIZE} x {FEATURES} x {CLASSES}",
        draw,
        arcface,
        {"arccos and one-hot": 0.75, "pytorch-metric-learning": 0.4},
        8,
    ),
)
