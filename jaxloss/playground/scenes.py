"""Handwritten digits on canvases: pictures with exact boxes, and how well boxes are found."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxloss import pairwise_box_iou

from .task import Examples


class Objects(NamedTuple):
    """The digits of a canvas: boxes (x0, y0, x1, y1) in pixels, labels, and which exist."""

    boxes: Float[Array, "*batch t 4"]
    labels: Int[Array, "*batch t"]
    exists: Bool[Array, "*batch t"]


class Detections(NamedTuple):
    """What a detector says of a canvas, the most confident first."""

    boxes: Float[Array, "*batch k 4"]
    labels: Int[Array, "*batch k"]
    scores: Float[Array, "*batch k"]


def paste(
    images: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    count: int,
    side: int,
    *,
    sizes: tuple[int, int] = (10, 18),
    most: int = 4,
) -> tuple[np.ndarray, Objects]:
    """`count` square canvases with up to `most` digits that do not overlap, on noisy ground.

    Glyphs of 8 x 8 are enlarged to `sizes` pixels by repetition; a box is what their ink covers.
    """
    canvases = rng.uniform(0, 0.2, (count, side, side)).astype(np.float32)
    boxes, exists = np.zeros((count, most, 4), np.float32), np.zeros((count, most), bool)
    chosen = rng.integers(0, len(images), (count, most))
    wanted = rng.integers(0, most + 1, count)
    for canvas, box, shown, glyphs, n in zip(canvases, boxes, exists, chosen, wanted, strict=True):
        free = np.ones((side, side), bool)
        for t in range(n):
            size = rng.integers(sizes[0], sizes[1] + 1)
            rows = np.arange(size) * 8 // size
            glyph = images[glyphs[t]].reshape(8, 8)[np.ix_(rows, rows)]
            y, x = rng.integers(0, side - size + 1, 2)
            place = (slice(y, y + size), slice(x, x + size))
            if not free[place].all():
                continue
            free[place] = False
            canvas[place] = np.maximum(canvas[place], glyph)
            (top, *_, bottom), (left, *_, right) = (
                np.flatnonzero((glyph > 0).any(axis)) for axis in (1, 0)
            )
            box[t] = x + left, y + top, x + right + 1, y + bottom + 1
            shown[t] = True
    truth: Any = boxes, labels[chosen].astype(np.int32), exists
    return canvases, Objects(*truth)


def middle(canvases: Float[Array, "n side side"], side: int) -> Detections:
    """Without looking: one box of the usual size in the middle."""
    box, n = jnp.array([side / 2 - 4, side / 2 - 7, side / 2 + 4, side / 2 + 7]), len(canvases)
    return Detections(jnp.tile(box, (n, 1, 1)), jnp.zeros((n, 1), int), jnp.ones((n, 1)))


def mean_iou(found: Detections, truth: Objects) -> Float[Array, ""]:
    """Mean over objects of their best IoU with as many detections as the canvas has objects."""
    iou = jax.vmap(pairwise_box_iou)(truth.boxes, found.boxes)
    first = jnp.arange(iou.shape[-1]) < jnp.sum(truth.exists, axis=-1, keepdims=True)
    best = jnp.max(jnp.where(first[:, None], iou, 0), axis=-1)
    return 100 * jnp.sum(jnp.where(truth.exists, best, 0)) / jnp.maximum(jnp.sum(truth.exists), 1)


def average_precision(
    found: Detections, truth: Objects, *, classes: int, overlap: float = 0.5
) -> Float[Array, ""]:
    """Area under the envelope of precision over recall, in per cent, mean over classes.

    A detection is right if it has the class of an object that no more confident one has taken, and
    at least this IoU with it.
    """
    right = jax.vmap(_right, in_axes=(0, 0, None))(found, truth, overlap).ravel()
    order = jnp.argsort(-found.scores.ravel())
    of_class = (found.labels.ravel()[order] == jnp.arange(classes)[:, None]) & (
        found.scores.ravel()[order] > 0
    )
    hits = jnp.cumsum(of_class & right[order], axis=1)
    precision = hits / jnp.maximum(jnp.cumsum(of_class, axis=1), 1)
    envelope = jax.lax.cummax(precision, axis=1, reverse=True)
    exists = truth.exists.ravel()
    objects = jnp.sum((truth.labels.ravel() == jnp.arange(classes)[:, None]) & exists, axis=1)
    gained = jnp.where(of_class & right[order], envelope, 0)
    return 100 * jnp.mean(jnp.sum(gained, axis=1) / jnp.maximum(objects, 1))


def _right(found: Detections, truth: Objects, overlap: float) -> Bool[Array, " k"]:
    iou = pairwise_box_iou(found.boxes, truth.boxes)
    fits = (iou >= overlap) & (found.labels[:, None] == truth.labels) & truth.exists
    iou = jnp.where(fits, iou, 0)

    def take(free: Array, row: Array) -> tuple[Array, Array]:
        row = jnp.where(free, row, 0)
        mine = (jnp.arange(len(row)) == jnp.argmax(row)) & (jnp.max(row) > 0)
        return free & ~mine, jnp.any(mine)

    return jax.lax.scan(take, truth.exists, iou)[1]  # the most confident one takes first


def draw_scenes(
    figure: Any,
    predictions: Mapping[str, Detections],
    test: Examples,
    *,
    names: Sequence[Any],
    sure: float = 0.3,
) -> None:
    """The fullest test canvases: true boxes in green and, row by row, what each detector says."""
    from matplotlib.patches import Rectangle

    def frame(panel: Any, box: Any, text: str = "", **style: Any) -> None:
        corner, size = box[:2] - 0.5, box[2:] - box[:2]
        panel.add_patch(Rectangle(corner, *size, fill=False, **style))
        panel.text(*corner, text, color=style["edgecolor"], fontsize=8, va="bottom")

    shown = np.argsort(-test.target.exists.sum(axis=-1), kind="stable")[:10]
    grid = figure.subplots(len(predictions), len(shown), squeeze=False)
    for axes, (name, found) in zip(grid, predictions.items(), strict=True):
        axes[0].set_ylabel(name)
        for i, panel in zip(shown, axes, strict=True):
            panel.imshow(test.inputs[i], cmap="gray_r", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
            for box, exists in zip(test.target.boxes[i], test.target.exists[i], strict=True):
                frame(panel, box, edgecolor="tab:green", lw=2.5 * exists)
            for box, label, score in zip(*(x[i] for x in found), strict=True):
                if score > sure:
                    frame(panel, box, str(names[label]), edgecolor="tab:red", lw=1)
    figure.suptitle(f"Test canvases of the first run: true boxes green, scores over {sure} red")
