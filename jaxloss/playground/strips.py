"""Handwritten numbers as sequences: strips of real digits, read column by column."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from .task import Examples, Tree

BLANK, HEIGHT, FRAMES, LONGEST = 0, 8, 48, 5


def draw_strips(
    images: np.ndarray, digits: np.ndarray, count: int, rng: np.random.Generator
) -> Examples:
    """Strips of two to five digits with gaps of up to three columns, and noise over all.

    Inputs are `image (n, frames, height)` and `length (n)`; targets `labels (n, longest)`, a digit
    being its value plus one, `count (n)`, and `frames (n, frames)`: what each column shows.
    """
    image = np.zeros((count, FRAMES, HEIGHT), np.float32)
    frames = np.zeros((count, FRAMES), np.int32)
    labels = np.full((count, LONGEST), -1, np.int32)
    counts, lengths = rng.integers(2, LONGEST + 1, count), np.zeros(count, np.int32)
    for i, n in enumerate(counts):
        at = rng.integers(0, 3)
        for j, k in enumerate(rng.integers(len(images), size=n)):
            labels[i, j] = digits[k] + 1
            image[i, at : at + 8] = images[k].T
            frames[i, at : at + 8] = digits[k] + 1
            at += 8 + rng.integers(0, 2 if j < n - 1 else 3)
        lengths[i] = min(at, FRAMES)
    image += rng.normal(0, 0.2, image.shape).astype(np.float32)
    target = dict(labels=labels, count=counts.astype(np.int32), frames=frames)
    return Examples(dict(image=image, length=lengths), target)


def best_path(logits: Array, inside: Bool[Array, "n t"]) -> tuple[Array, Bool[Array, "n t"]]:
    """The likeliest class of each frame, and whether it begins a new digit."""
    path = jnp.where(inside, jnp.argmax(logits, axis=-1), BLANK)
    before = jnp.pad(path[:, :-1], ((0, 0), (1, 0)), constant_values=BLANK)
    return path, (path != BLANK) & (path != before)


def edit_distance(
    path: Int[Array, "n t"], new: Bool[Array, "n t"], labels: Int[Array, "n m"], count: Array
) -> Int[Array, " n"]:
    """Insertions, deletions and replacements between the new entries of a path and the labels."""
    places = jnp.arange(labels.shape[-1] + 1)

    def row(above: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
        symbol, counts = entry
        replaced = above[:, :-1] + (labels != symbol[:, None])
        below = jnp.minimum(above + 1, jnp.pad(replaced, ((0, 0), (1, 0)), constant_values=99))
        below = jax.lax.cummin(below - places, axis=1) + places  # insertions of any number
        return jnp.where(counts[:, None], below, above), None

    first = jnp.broadcast_to(places, (len(labels), len(places)))
    last, _ = jax.lax.scan(row, first, (path.T, new.T))
    return jnp.take_along_axis(last, count[:, None], axis=1)[:, 0]


def draw_readings(figure: Any, predictions: Mapping[str, Tree], test: Examples) -> None:
    """Four test strips, and what the model of each loss reads in them: right in green."""
    inside = jnp.arange(FRAMES) < jnp.asarray(test.inputs["length"])[:, None]
    found = {name: best_path(p["logits"], inside) for name, p in predictions.items()}
    for i, axes in enumerate(figure.subplots(1, 4)):
        axes.imshow(test.inputs["image"][i].T, cmap="gray_r", vmin=0, vmax=1)
        written = test.target["labels"][i, : test.target["count"][i]] - 1
        axes.set_axis_off()
        for row, (name, (path, new)) in enumerate(found.items()):
            read = np.asarray(path[i])[np.asarray(new[i])] - 1
            color = "tab:green" if np.array_equal(read, written) else "tab:red"
            text = f"{''.join(map(str, read)):.12}   {name}"
            style = dict(color=color, fontsize=9, in_layout=False)
            axes.text(0, HEIGHT + 4 + 5 * row, text, **style)
        axes.set_ylim(HEIGHT + 5 * len(found), -0.5)
    figure.suptitle("What each model reads in four test strips, best path: right in green")
