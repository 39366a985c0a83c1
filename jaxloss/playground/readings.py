"""What several heads read off images of digits: errors on one scale, and a picture."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .task import Examples, Tree

HEADS = {"class": 10, "value": 1, "pixels": 64}  # outputs of each


def error(pred: Tree, target: Tree, *, task: str) -> Float[Array, ""]:
    """In per cent of that of a guess: some class, or the mean of value or pixels."""
    if task == "class":
        return 100 / 0.9 * jnp.mean(jnp.argmax(pred["class"], axis=-1) != target["class"])
    guess = jnp.mean(target[task], axis=0)
    share = lambda x: jnp.mean(jnp.square(x - target[task]))
    return 100 * share(pred[task]) / share(guess)


def mean_error(pred: Tree, target: Tree) -> Float[Array, ""]:
    """The geometric mean of the errors: halving any of them counts the same."""
    logs = [jnp.log(jnp.maximum(error(pred, target, task=name), 1e-3)) for name in HEADS]
    return jnp.exp(sum(logs, jnp.zeros(())) / len(logs))


def draw_pixels(figure: Any, predictions: Mapping[str, Tree], test: Examples) -> None:
    """Test digits as each model sees them, with the number it reads off."""
    axes = figure.subplots()
    rows = {"test images": {"pixels": test.inputs}, **predictions}
    for row, pred in enumerate(rows.values()):
        for column in range(22):
            box = (column - 0.45, column + 0.15, row + 0.45, row - 0.45)
            pixels = np.reshape(pred["pixels"][column], (8, 8))
            axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1, extent=box, aspect="auto")
            if "class" in pred:
                right = np.argmax(pred["class"][column]) == test.target["class"][column]
                style = dict(color="tab:green" if right else "tab:red", size=8, va="center")
                axes.text(column + 0.18, row, f"{pred['value'][column, 0]:.1f}", **style)
    axes.set(xlim=(-0.5, 21.6), ylim=(len(rows) - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle("Pixels and value by the first run's models; green where the class is right")
