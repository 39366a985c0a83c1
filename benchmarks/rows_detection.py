"""Box losses of many pairs, value and gradient: ours against torchvision and the formula in JAX."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxloss.losses.boxes
from benchmarks.measure import Contender, Row, compiled
from parity.peers import peer, require_peer

PAIRS = 100_000


def draw(generator: np.random.Generator) -> tuple[jax.Array, jax.Array]:
    def boxes() -> jax.Array:
        low = generator.uniform(0, 600, (PAIRS, 2))
        high = low + generator.uniform(4, 200, (PAIRS, 2))
        return jnp.asarray(np.concatenate([low, high], axis=-1), jnp.float32)

    return boxes(), boxes()


def by_formula(pred: jax.Array, target: jax.Array) -> jax.Array:
    """Complete IoU as torchvision writes it."""
    eps = 1e-7
    (x0, y0, x1, y1), (u0, v0, u1, v1) = (jnp.moveaxis(b, -1, 0) for b in (pred, target))
    width, height = (
        jnp.minimum(x1, u1) - jnp.maximum(x0, u0),
        jnp.minimum(y1, v1) - jnp.maximum(y0, v0),
    )
    both = jnp.where((width > 0) & (height > 0), width * height, 0)
    iou = both / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - both + eps)
    diagonal = (jnp.maximum(x1, u1) - jnp.minimum(x0, u0)) ** 2
    diagonal += (jnp.maximum(y1, v1) - jnp.minimum(y0, v0)) ** 2
    way = ((x0 + x1 - u0 - u1) / 2) ** 2 + ((y0 + y1 - v0 - v1) / 2) ** 2
    turn = jnp.arctan((u1 - u0) / (v1 - v0)) - jnp.arctan((x1 - x0) / (y1 - y0))
    v = 4 / np.pi**2 * turn**2
    alpha = jax.lax.stop_gradient(v / (1 - iou + v + eps))
    return jnp.mean(1 - iou + way / (diagonal + eps) + alpha * v)


def ciou(pred: jax.Array, target: jax.Array) -> Mapping[str, Contender]:
    require_peer("torchvision")
    theirs = peer("torchvision.ops.complete_box_iou_loss")
    p, t = (torch.tensor(np.asarray(boxes)) for boxes in (pred, target))
    p.requires_grad_()

    def run() -> Any:
        return torch.autograd.grad(theirs(p, t, reduction="mean"), p)

    ours = jaxloss.losses.boxes.ciou_loss
    return {
        "jaxloss": compiled(jax.value_and_grad(ours), pred, target),
        "torchvision": Contender(run),
        "formula in jax": compiled(jax.value_and_grad(by_formula), pred, target),
    }


ROWS = (Row("ciou", "100000 pairs", draw, ciou, {"torchvision": 1.0, "formula in jax": 2.0}, 4),)
