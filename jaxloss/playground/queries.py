"""Search among handwritten digits: lists of unequal length, graded relevance, NDCG."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .task import Examples, Tree

LONGEST, SHORTEST, GRADES = 20, 5, 4  # documents of a query, the best grade


def draw_queries(
    images: np.ndarray, digits: np.ndarray, count: int, rng: np.random.Generator
) -> Examples:
    """Queries by image; a document is the better the nearer its number is to that of the query.

    Inputs are `query (n, 64)`, `documents (n, longest, 64)` and `real (n, longest)`; targets
    `grade`, 4 for the number itself, 3 for its neighbours, down to 0, and `real`.
    """
    query = rng.integers(0, len(images), count)
    rows = rng.integers(0, len(images), (count, LONGEST))
    real = np.arange(LONGEST) < rng.integers(SHORTEST, LONGEST + 1, (count, 1))
    distance = np.abs(digits[query][:, None] - digits[rows])
    grade = np.maximum(GRADES - distance, 0).astype(np.float32)
    documents = images[rows] * real[..., None]
    inputs = dict(query=images[query], documents=documents, real=real)
    return Examples(inputs, dict(grade=grade * real, real=real))


def hurried(examples: Examples, share: float, rng: np.random.Generator) -> Examples:
    """A share of the grades replaced by any grade, as judges in a hurry give them."""
    grade, real = examples.target["grade"], examples.target["real"]
    wrong = rng.random(grade.shape) < share
    guess = rng.integers(0, GRADES + 1, grade.shape).astype(np.float32) * real
    return examples._replace(target=dict(grade=np.where(wrong, guess, grade), real=real))


def ndcg(
    scores: Float[Array, "n l"], grade: Float[Array, "n l"], real: Bool[Array, "n l"], top: int
) -> Array:
    """Normalised discounted cumulative gain of the first documents, in percent."""
    discount = 1 / jnp.log2(jnp.arange(top) + 2.0)

    def gain(by: Array) -> Array:
        order = jnp.argsort(jnp.where(real, -by, jnp.inf), axis=-1)[:, :top]
        return jnp.sum(discount * (2 ** jnp.take_along_axis(grade * real, order, -1) - 1), -1)

    best = gain(grade)
    return 100 * jnp.sum(gain(scores) / jnp.where(best > 0, best, 1)) / jnp.sum(best > 0)


def draw_lists(figure: Any, predictions: Mapping[str, Tree], test: Examples) -> None:
    """The first documents that each loss finds for three queries, and how good they are."""
    shown, first = 3, 8
    grid = figure.subplots(shown, len(predictions), squeeze=False)
    for column, (name, pred) in enumerate(predictions.items()):
        for row in range(shown):
            real = np.asarray(test.inputs["real"][row])
            order = np.argsort(np.where(real, -np.asarray(pred["score"][row]), np.inf))[:first]
            tiles = [test.inputs["query"][row], *test.inputs["documents"][row][order]]
            panel = grid[row, column]
            image = np.concatenate([np.pad(t.reshape(8, 8), 1) for t in tiles], axis=1)
            panel.imshow(1 - image, cmap="gray", vmin=0, vmax=1)
            panel.axvline(9.5, color="tab:red", lw=2)
            grades = test.target["grade"][row][order].astype(int)
            panel.set_xlabel("grades " + " ".join(map(str, grades[real[order]])), fontsize=8)
            panel.set_xticks([])
            panel.set_yticks([])
        grid[0, column].set_title(name, fontsize=9)
    figure.suptitle("Three test queries (left of the line) and the first documents found")
