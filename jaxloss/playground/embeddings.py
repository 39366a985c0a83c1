"""What can be said of embeddings without training on: neighbours, a linear probe, a picture."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._core.pairwise import pairwise_cosine

CLASSES = 10
PENALTY = 0.1  # of the probe's weights, as a share of the number of examples it learns from


def split_classes(
    digits: np.ndarray,
    known: int,
    counts: Mapping[bool, tuple[int, ...]],
    rng: np.random.Generator,
) -> list[dict[str, np.ndarray]]:
    """Splits that hold so many examples of each class: of those that training knows, of the others.

    Classes are drawn at random; `label` counts them, those known first. `row` tells the examples.
    """
    parts = [[] for _ in counts[True]]
    for label, digit in enumerate(rng.permutation(CLASSES)):
        sizes = counts[label < known]
        rows = rng.permutation(np.flatnonzero(digits == digit))[: sum(sizes)]
        for part, chosen in zip(parts, np.split(rows, np.cumsum(sizes)[:-1]), strict=True):
            part += [(row, label, digit) for row in chosen]
    shuffled = (rng.permutation(part).T.astype(np.int32) for part in parts)
    return [
        dict(row=row, label=label, digit=digit, known=label < known)
        for row, label, digit in shuffled
    ]


def unit_rows(rows: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows of norm 1."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _ranked(rows: Array, labels: Array, where: Array) -> tuple[Array, Array]:
    """Whether the neighbours of each row, nearest first, are of its class, and how many can be."""
    other = where & ~jnp.eye(len(rows), dtype=bool)
    order = jnp.argsort(jnp.where(other, -pairwise_cosine(rows, rows), jnp.inf), axis=1)
    hit = (labels[:, None] == labels) & other
    return jnp.take_along_axis(hit, order, axis=1), jnp.sum(hit, axis=1)


def _per_cent(values: Array, where: Array) -> Array:
    return 100 * jnp.sum(jnp.where(where, values, 0)) / jnp.sum(where)


def recall_at_1(
    rows: Float[Array, "n d"], labels: Int[Array, " n"], where: Bool[Array, " n"]
) -> Float[Array, ""]:
    """Share of the kept rows whose nearest kept neighbour has their label, in per cent."""
    hit, _ = _ranked(rows, labels, where)
    return _per_cent(hit[:, 0], where)


def mean_average_precision(
    rows: Float[Array, "n d"], labels: Int[Array, " n"], where: Bool[Array, " n"]
) -> Float[Array, ""]:
    """Precision at each neighbour of the right class, averaged over those and rows, in per cent."""
    hit, count = _ranked(rows, labels, where)
    precision = jnp.cumsum(hit, axis=1) / jnp.arange(1, len(rows) + 1)
    return _per_cent(jnp.sum(hit * precision, axis=1) / jnp.maximum(count, 1), where)


def probe_accuracy(rows: Float[Array, "n d"], labels: Int[Array, " n"]) -> Float[Array, ""]:
    """Right answers of a linear classifier on the second half of the rows, in per cent.

    It is fitted to the first half in one step, by least squares with a penalty on its weights.
    """
    rows = (rows - jnp.mean(rows, axis=0)) / (jnp.std(rows, axis=0) + 1e-6)
    half = len(rows) // 2
    x, y = rows[:half], jax.nn.one_hot(labels[:half], CLASSES)
    ridge = PENALTY * half * jnp.eye(x.shape[1])
    weight = jnp.linalg.solve(x.T @ x + ridge, x.T @ (y - jnp.mean(y, axis=0)))
    answers = jnp.argmax(rows[half:] @ weight + jnp.mean(y, axis=0), axis=1)
    return 100 * jnp.mean(answers == labels[half:])


def draw_embeddings(
    figure: Any, rows: Mapping[str, np.ndarray], labels: np.ndarray, title: str
) -> None:
    """The plane in which the rows of each loss vary most, one dot per row, coloured by label."""
    from sklearn.decomposition import PCA

    names = sorted(set(labels.tolist()))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, (loss, values) in zip(panels, rows.items(), strict=True):
        plane = PCA(2, random_state=0)
        points = plane.fit_transform(np.nan_to_num(values))
        for name in names:
            chosen = points[labels == name]
            axes.scatter(*chosen.T, s=6, c=colors[name], alpha=0.7, linewidths=0, label=str(name))
        share = 100 * plane.explained_variance_ratio_.sum()
        axes.set(title=f"{loss}\n{share:.0f} % of the variance", xticks=[], yticks=[])
        axes.title.set_fontsize(9)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=len(names), markerscale=3)
    figure.suptitle(title)
