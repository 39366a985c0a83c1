"""What a comparison needs to know of a task, and the parts that tasks share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

Tree = Any


class Examples(NamedTuple):
    """Inputs of the model and what its output is compared with.

    Both are arrays or trees of arrays whose leading axis counts examples.
    """

    inputs: Tree
    target: Tree


class Splits(NamedTuple):
    """Disjoint examples; a task spoils only the training part."""

    train: Examples
    validation: Examples
    test: Examples


@dataclass(frozen=True)
class Metric:
    """A number that means the same for every loss.

    `measure` takes all predictions and targets of a split. Getting worse by less than `tolerance`
    is taken for noise, not for overfitting.
    """

    name: str
    unit: str
    measure: Callable[[Tree, Tree], Array]
    higher_is_better: bool
    tolerance: float

    @property
    def label(self) -> str:
        """Name and unit, for a column or an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


def _unchanged(key: PRNGKeyArray, examples: Examples) -> Examples:  # noqa: ARG001
    return examples


@dataclass(frozen=True)
class Task:
    """One file in `playground/tasks`: data, model, metrics, the losses it offers, a picture.

    Args:
        title: One line on the data and its damage, above the table and the picture.
        load: Splits drawn with a seed, of the same shape for every seed. Imports what it needs.
        init: Parameters from a key.
        apply: `(params, inputs) -> prediction`, what losses look at.
        losses: `(prediction, target) -> scalar` by name.
        metrics: The first one leads: curves, overfitting and the ranking go by it.
        optimizer: Shared by all losses, so it should ignore their scale, as Adam does.
        batch_size: Training examples per step.
        steps: Default length of the training.
        prepare: `(key, examples) -> examples` before each loss, for what is random: augmentation,
            noise levels, negatives.
        predict: `(params, inputs) -> prediction` for metrics and picture where it is more than
            `apply`: sampling, decoding of boxes, search.
        picture: `(figure, predictions by loss, test examples)` draws into a matplotlib figure what
            the models of the first seed say.
    """

    title: str
    load: Callable[[int], Splits]
    init: Callable[[PRNGKeyArray], Tree]
    apply: Callable[[Tree, Tree], Tree]
    losses: Mapping[str, Callable[[Tree, Tree], Array]]
    metrics: Sequence[Metric]
    optimizer: optax.GradientTransformation
    batch_size: int
    steps: int
    prepare: Callable[[PRNGKeyArray, Examples], Examples] = _unchanged
    predict: Callable[[Tree, Tree], Tree] | None = None
    picture: Callable[[Any, Mapping[str, Tree], Examples], None] | None = None


def split(examples: Examples, sizes: tuple[int, int, int], rng: np.random.Generator) -> Splits:
    """Shuffled training, validation and test examples of the given sizes."""
    order = rng.permutation(len(jax.tree.leaves(examples)[0]))
    parts = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    return Splits(*(jax.tree.map(lambda array, i=part: array[i], examples) for part in parts))


def init_mlp(key: PRNGKeyArray, sizes: Sequence[int]) -> list[tuple[Array, Array]]:
    """Weights (He et al., 2015) and biases of a multilayer perceptron, one pair per layer."""
    pairs = list(pairwise(sizes))
    return [
        (jax.random.normal(k, (n, m)) * np.sqrt(2 / n), jnp.zeros(m))
        for k, (n, m) in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
    ]


def apply_mlp(
    params: Sequence[tuple[Array, Array]], x: Float[Array, "*batch n"]
) -> Float[Array, "*batch m"]:
    """Layers with a ReLU between them."""
    *hidden, (weight, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ weight + bias
