"""Times to an event: survival from the logits of bins, concordance, curves of groups."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .task import Examples, Tree


def of_hazards(pred: Array) -> Array:
    """Chance to be well after each bin, from the logits of a relapse in it."""
    return jnp.exp(jnp.cumsum(jax.nn.log_sigmoid(-pred), axis=-1))


def of_rates(pred: Array) -> Array:
    """The same from hazards that are constant within a bin."""
    return jnp.exp(-jnp.cumsum(jax.nn.softplus(pred), axis=-1))


def of_masses(pred: Array) -> Array:
    """The same from logits of the bins; one more stands for never."""
    padded = jnp.pad(pred, [(0, 0)] * (pred.ndim - 1) + [(0, 1)])
    return 1 - jnp.cumsum(jax.nn.softmax(padded, axis=-1), axis=-1)[..., :-1]


def of_tasks(pred: Array) -> Array:
    """The same from logits that add up from the last bin."""
    return of_masses(jnp.cumsum(pred[..., ::-1], axis=-1)[..., ::-1])


def concordance(risk: Array, target: Tree) -> Array:
    """Pairs known to be in this order that the risks put in it, in percent; ties count half."""
    time, event = target["time"], target["event"]
    known = event[:, None] & (time[:, None] < time)
    right = jnp.where(risk[:, None] == risk, 0.5, risk[:, None] > risk)
    return 100 * jnp.sum(right * known) / jnp.sum(known)


def draw_thirds(figure: Any, predictions: Mapping[str, Array], test: Examples) -> None:
    """Kaplan-Meier curves of the test patients in three groups of predicted risk."""
    axes = figure.subplots(1, len(predictions), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (name, risk) in zip(axes, predictions.items(), strict=True):
        thirds = np.array_split(np.argsort(risk), 3)
        colors = ("tab:green", "tab:orange", "tab:red")
        for rows, color in zip(thirds, colors, strict=True):
            time, event = test.target["time"][rows], test.target["event"][rows]
            order = np.argsort(time)
            well = np.cumprod(1 - event[order] / np.arange(len(rows), 0, -1))
            panel.step(time[order] / 365.25, 100 * well, where="post", color=color)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("years")
    axes[0].set_ylabel("without relapse (%)")
    figure.suptitle("Test patients in thirds of predicted risk")
