"""Coins, a cell and a horse, of which a thin outline is the rare class to find."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import jaxloss

from ..photographs import label_maps
from ..task import Examples, Layer, Metric, Splits, Task, convolve, init_layers

CLASSES = ("background", "inside", "outline")
SIDE, NOISE = 32, 0.15
COUNTS = (40, 12, 20)  # crops of each photograph


def load(seed: int) -> Splits:
    """Noisy crops around pixels of objects; each part comes from regions of its own."""
    rng, parts = np.random.default_rng(seed), []
    for part, count in enumerate(COUNTS):
        found = []
        for image, labels, regions in label_maps():
            image, labels = image[regions[part]], labels[regions[part]]
            objects = np.argwhere(labels)
            for _ in range(count):
                middle = objects[rng.integers(len(objects))] + rng.integers(-8, 9, 2)
                top, left = np.clip(middle - SIDE // 2, 0, np.subtract(image.shape, SIDE))
                window = np.s_[top : top + SIDE, left : left + SIDE]
                noisy = image[window] + rng.normal(0, NOISE, (SIDE, SIDE))
                found.append((noisy.astype(np.float32)[..., None], labels[window]))
        parts.append(Examples(*map(np.stack, zip(*found, strict=True))))
    return Splits(*parts)


def apply(params: list[Layer], images: Float[Array, "n h w 1"]) -> Float[Array, "n h w c"]:
    """Three convolutions over blocks of 2 x 2 pixels, the second one wide, and logits of each."""
    *hidden, (weight, bias) = params
    n, h, w, _ = images.shape
    x = images.reshape(n, h // 2, 2, w // 2, 2).swapaxes(2, 3).reshape(n, h // 2, w // 2, 4) - 0.5
    for layer, step in zip(hidden, (1, 2, 1), strict=True):
        x = jax.nn.relu(convolve(layer, x, step=step))
    blocks = (x @ weight + bias).reshape(n, h // 2, w // 2, 2, 2, len(CLASSES))
    return blocks.swapaxes(2, 3).reshape(n, h, w, len(CLASSES))


def ious(logits: Array, labels: Int[Array, "n h w"]) -> Float[Array, " classes"]:
    """Intersection over union of each class over all pixels, in per cent."""
    pred, true = (x[..., None] == jnp.arange(len(CLASSES)) for x in (logits.argmax(-1), labels))
    both, either = (jnp.sum(x, (0, 1, 2)) for x in (pred & true, pred | true))
    return 100 * both / jnp.maximum(either, 1)


def draw_masks(figure: Any, predictions: Mapping[str, Array], test: Examples) -> None:
    """Test crops, their true classes, and what each loss made of them."""
    shown = np.linspace(0, len(test.target) - 1, 12).astype(int)
    maps = {"truth": test.target} | {k: np.argmax(v, axis=-1) for k, v in predictions.items()}
    axes = figure.subplots(len(maps) + 1, len(shown), squeeze=False)
    for column, i in enumerate(shown):
        axes[0, column].imshow(test.inputs[i, ..., 0], cmap="gray")
        for row, found in enumerate(maps.values()):
            axes[row + 1, column].imshow(found[i], cmap="viridis", vmin=0, vmax=2)
    for panel in axes.ravel():
        panel.set(xticks=[], yticks=[])
    for panel, name in zip(axes[:, 0], ["image", *maps], strict=True):
        panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle("Test crops of the first run: background dark, inside green, outline yellow")


region = lambda loss, **options: lambda z, y: loss(jax.nn.softmax(z), y, **options)
ce = jaxloss.softmax_cross_entropy
TASK = Task(
    title="segmentation: coins, a cell and a horse in noise; inside and outline, unseen regions",
    load=load,
    init=partial(init_layers, shapes=[(36, 16), (144, 16), (144, 16), (16, 4 * len(CLASSES))]),
    apply=apply,
    losses={
        "softmax_cross_entropy": ce,
        "softmax_focal_loss": jaxloss.softmax_focal_loss,
        "dice_loss": region(jaxloss.dice_loss),
        "dice_and_cross_entropy": lambda z, y: region(jaxloss.dice_loss)(z, y) + ce(z, y),
        "cross_entropy_iou_loss": jaxloss.cross_entropy_iou_loss,
        "focal_tversky_loss": region(jaxloss.focal_tversky_loss),
        "lovasz_softmax_loss": region(jaxloss.lovasz_softmax_loss),
    },
    metrics=[
        Metric("mean IoU", "%", lambda z, y: jnp.mean(ious(z, y)), True, 1.0),
        Metric("outline IoU", "%", lambda z, y: ious(z, y)[2], True, 1.0),
    ],
    optimizer=optax.adam(4e-3),
    batch_size=16,
    steps=160,
    evaluations=25,
    baselines={
        "all_background": lambda x: jax.nn.one_hot(jnp.zeros(x.shape[:3], int), len(CLASSES)),
        "above_the_mean": lambda x: jax.nn.one_hot(
            (x > jnp.mean(x, (1, 2), keepdims=True))[..., 0].astype(int), len(CLASSES)
        ),
    },
    picture=draw_masks,
)
