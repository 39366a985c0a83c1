"""What a comparison needs to know of a task, and the parts that tasks share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

Tree = Any
Layer = tuple[Array, Array]
Objective = Callable[[Tree], tuple[Array, Mapping[str, Array]]]


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


class State(NamedTuple):
    """What a training step changes: parameters, the optimiser's state, and the criterion's own."""

    params: Tree
    moments: Tree
    memory: Tree = ()


def descend(objective: Objective, optimizer: optax.GradientTransformation, state: State) -> State:
    """One step along the gradient of the total."""
    grads, _ = jax.grad(objective, has_aux=True)(state.params)
    return move(grads, optimizer, state)


def move(grads: Tree, optimizer: optax.GradientTransformation, state: State) -> State:
    """One step of the optimiser with these gradients."""
    updates, moments = optimizer.update(grads, state.moments, state.params)
    return state._replace(params=optax.apply_updates(state.params, updates), moments=moments)


@dataclass(frozen=True)
class Criterion:
    """A loss made of named terms, which reads the output of the model in a way of its own.

    Args:
        evaluate: `(output, target) -> (total, terms)`, both scalars; the table shows the terms.
        decode: What metrics and picture look at, from the output trained this way.
        step: `(objective, optimizer, state) -> state`, where `objective` gives total and terms of
            the batch from parameters, for what is more than the gradient of the total.
        memory: Makes what the state's own part begins with.
    """

    evaluate: Callable[[Tree, Tree], tuple[Array, Mapping[str, Array]]]
    decode: Callable[[Tree], Tree]
    step: Callable[[Objective, optax.GradientTransformation, State], State] = descend
    memory: Callable[[], Tree] = tuple

    def __call__(self, prediction: Tree, target: Tree) -> Array:
        """The total alone, as of a plain loss."""
        return self.evaluate(prediction, target)[0]


@dataclass(frozen=True)
class Task:
    """One file in `playground/tasks`: data, model, metrics, the losses it offers, a picture.

    Args:
        title: One line on the data and its damage, above the table and the picture.
        load: Splits drawn with a seed, of the same shape for every seed. Imports what it needs.
        init: Parameters from a key.
        apply: `(params, inputs) -> prediction`, what losses look at.
        losses: `(prediction, target) -> scalar` by name; a `Criterion` also tells its terms.
        metrics: The first one leads: curves, overfitting and the ranking go by it.
        optimizer: Shared by all losses, so it should ignore their scale, as Adam does.
        batch_size: Training examples per step.
        steps: Default length of the training.
        evaluations: Looks at the training and validation examples on the way.
        evaluated: At how many of the training examples; None looks at all of them.
        costs: Whether to state the memory and time of one step with each loss.
        prepare: `(key, examples) -> examples` before each loss, for what is random: augmentation,
            noise levels, negatives.
        predict: `(params, inputs) -> prediction` for metrics and picture where it is more than
            `apply`: sampling, decoding of boxes, search.
        baselines: `inputs -> prediction` by name, without training: rows of the table beside that
            of the untrained model.
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
    evaluations: int = 50
    evaluated: int | None = None
    costs: bool = False
    prepare: Callable[[PRNGKeyArray, Examples], Examples] = _unchanged
    predict: Callable[[Tree, Tree], Tree] | None = None
    baselines: Mapping[str, Callable[[Tree], Tree]] = field(default_factory=dict)
    picture: Callable[[Any, Mapping[str, Tree], Examples], None] | None = None


def split(examples: Examples, sizes: tuple[int, int, int], rng: np.random.Generator) -> Splits:
    """Shuffled training, validation and test examples of the given sizes."""
    order = rng.permutation(len(jax.tree.leaves(examples)[0]))
    parts = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    return Splits(*(jax.tree.map(lambda array, i=part: array[i], examples) for part in parts))


def init_mlp(key: PRNGKeyArray, sizes: Sequence[int]) -> list[Layer]:
    """Parameters of a multilayer perceptron with these numbers of units."""
    return init_layers(key, list(pairwise(sizes)))


def init_layers(key: PRNGKeyArray, shapes: Sequence[tuple[int, int]]) -> list[Layer]:
    """Weights (He et al., 2015) and biases, one pair for each (inputs, outputs)."""
    return [
        (jax.random.normal(k, (n, m)) * np.sqrt(2 / n), jnp.zeros(m))
        for k, (n, m) in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


def apply_mlp(params: Sequence[Layer], x: Float[Array, "*batch n"]) -> Float[Array, "*batch m"]:
    """Layers with a ReLU between them."""
    *hidden, (weight, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ weight + bias


def convolve(
    layer: Layer, x: Float[Array, "*batch h w n"], *, step: int = 1
) -> Float[Array, "*batch h w m"]:
    """A 3 x 3 convolution of weights `(9 n, m)` over every `step`-th neighbour, zero outside.

    As one matrix product: under `vmap` over seeds that is the fastest form on CPU.
    """
    height, width = x.shape[-3:-1]
    padded = jnp.pad(x, [*[(0, 0)] * (x.ndim - 3), (step, step), (step, step), (0, 0)])
    near = lambda i, j: padded[..., i * step :, j * step :, :][..., :height, :width, :]
    patches = jnp.concatenate([near(i, j) for i in range(3) for j in range(3)], axis=-1)
    return patches @ layer[0] + layer[1]
