"""Region losses over label maps: Dice, Tversky, focal and Lovász, value and gradient."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from monai.losses import DiceLoss

from benchmarks.measure import Contender, Row, compiled
from jaxloss.losses import focal, segmentation, segmentation_lovasz

Arrays = tuple[jax.Array, jax.Array]


def draw(*shape: int, probs: bool = True) -> Callable[[np.random.Generator], Arrays]:
    """Random maps, with labels in square patches as images have them."""

    def sample(generator: np.random.Generator) -> Arrays:
        logits = jnp.asarray(2 * generator.standard_normal(shape, np.float32))
        batch, height, width, classes = shape
        patches = generator.integers(0, classes, (batch, height // 16, width // 16), np.int32)
        labels = jnp.asarray(patches.repeat(16, axis=1).repeat(16, axis=2))
        return (jax.nn.softmax(logits) if probs else logits), labels

    return sample


def torch_step(loss: Callable[..., Any], values: jax.Array, labels: jax.Array) -> Contender:
    """Value and gradient in torch, classes first as there is usual."""
    x = torch.tensor(np.moveaxis(np.asarray(values), -1, 1).copy(), requires_grad=True)
    y = torch.tensor(np.asarray(labels), dtype=torch.int64)
    return Contender(lambda: torch.autograd.grad(loss(x, y), x))


def dice(probs: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    def theirs(probs: jax.Array, labels: jax.Array) -> jax.Array:
        truth = jax.nn.one_hot(labels, probs.shape[-1])
        shared, both = jnp.sum(probs * truth, (1, 2)), jnp.sum(probs + truth, (1, 2))
        return jnp.mean(1 - (2 * shared + 1) / (both + 1))

    monai = DiceLoss(smooth_nr=1, smooth_dr=1, to_onehot_y=True)
    return {
        "jaxloss": compiled(jax.value_and_grad(segmentation.dice_loss), probs, labels),
        "MONAI": torch_step(lambda x, y: monai(x, y[:, None]), probs, labels),
        "plain one-hot": compiled(jax.value_and_grad(theirs), probs, labels),
    }


def focal_loss(logits: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    def theirs(logits: jax.Array, labels: jax.Array) -> jax.Array:
        truth = jax.nn.one_hot(labels, logits.shape[-1])
        return jnp.mean(optax.losses.sigmoid_focal_loss(logits, truth, gamma=2.0))

    def ours(logits: jax.Array, labels: jax.Array) -> jax.Array:
        truth = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        return focal.sigmoid_focal_loss(logits, truth)

    return {
        "jaxloss": compiled(jax.value_and_grad(ours), logits, labels),
        "optax": compiled(jax.value_and_grad(theirs), logits, labels),
    }


def argsort_lovasz(probs: jax.Array, labels: jax.Array) -> jax.Array:
    """The published algorithm as it is usually written in JAX."""
    classes = probs.shape[-1]
    p = jnp.moveaxis(probs.reshape(len(probs), -1, classes), -1, 1)
    truth = (labels.reshape(len(labels), 1, -1) == jnp.arange(classes)[:, None]).astype(p.dtype)
    errors = jnp.abs(truth - p)
    order = jnp.argsort(-jax.lax.stop_gradient(errors), axis=-1)
    errors, truth = (jnp.take_along_axis(x, order, axis=-1) for x in (errors, truth))
    total = jnp.sum(truth, axis=-1, keepdims=True)
    jaccard = 1 - (total - jnp.cumsum(truth, -1)) / (total + jnp.cumsum(1 - truth, -1))
    return jnp.mean(jnp.sum(errors * jnp.diff(jaccard, prepend=0.0, axis=-1), axis=-1))


def lovasz(probs: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    ours = jax.value_and_grad(segmentation_lovasz.lovasz_softmax_loss)
    return {
        "jaxloss": compiled(ours, probs, labels),
        "plain argsort": compiled(jax.value_and_grad(argsort_lovasz), probs, labels),
        "torch": torch_step(torch_lovasz, probs, labels),
    }


def torch_lovasz(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The published code, sorting one image and class at a time."""
    losses = []
    for probs, labels in zip(x, y, strict=True):
        for c in range(len(probs)):
            truth = (labels == c).float().flatten()
            errors, order = (truth - probs[c].flatten()).abs().sort(descending=True)
            truth = truth[order]
            left = truth.sum() - truth.cumsum(0)
            jaccard = 1 - left / (truth.sum() + (1 - truth).cumsum(0))
            losses.append(errors @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    return torch.stack(losses).mean()


MAP, SMALL = (4, 512, 512, 21), (2, 256, 256, 21)
ROWS = (
    Row("dice", "4 x 512 x 512 x 21", draw(*MAP), dice, {"MONAI": 0.8}, 8),
    Row(
        "focal",
        "4 x 512 x 512 x 21",
        draw(*MAP, probs=False),
        focal_loss,
        {"optax": 0.4},
        8,
    ),
    Row(
        "lovasz",
        "2 x 256 x 256 x 21",
        draw(*SMALL),
        lovasz,
        {"plain argsort": 0.5, "torch": 1.0},
        8,
    ),
)
