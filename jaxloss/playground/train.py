"""One training run per loss: the same model, data, batches and optimiser, several seeds at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from .task import Examples, Metric, Splits, Task, Tree

EVALUATIONS = 50


@dataclass(frozen=True)
class History:
    """What one loss did.

    Losses and validation metrics are `(evaluations, seeds)`, test metrics `(seeds,)`; predictions
    and examples are those of the first seed's test set.
    """

    steps: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    metrics: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    predictions: Tree
    examples: Examples

    def best(self, metric: Metric) -> int:
        """Index of the best mean validation metric over seeds; the last one that ties."""
        return int(np.argmax(self._goodness(metric)))

    def overfits_from(self, metric: Metric) -> int | None:
        """Step after which the mean validation metric got worse for good, by more than noise."""
        good, best = self._goodness(metric), self.best(metric)
        worse = good[-1] < good[best] - metric.tolerance
        return int(self.steps[best]) if worse else None

    def _goodness(self, metric: Metric) -> np.ndarray:
        mean = self.metrics[metric.name].mean(axis=1)
        return np.nan_to_num(mean if metric.higher_is_better else -mean, nan=-np.inf)


def load(task: Task, seeds: int) -> Splits:
    """Splits of all seeds, stacked: a seed draws the split, the damage, the weights and batches."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *(task.load(i) for i in range(seeds)))


def evaluation_steps(steps: int) -> np.ndarray:
    """Steps to stop and look at, the first and the last included."""
    return np.unique(np.linspace(0, steps, min(steps, EVALUATIONS) + 1).round().astype(int))


def train(
    task: Task,
    loss: Callable[[Tree, Tree], Array],
    splits: Splits,
    *,
    steps: int,
    on_evaluation: Callable[[], None] = lambda: None,
) -> History:
    """Train with one loss on every seed of `splits`, side by side under one `vmap`."""
    seeds = len(jax.tree.leaves(splits)[0])
    keys = jax.random.split(jax.random.key(0), seeds)
    advance, look, test = _programs(task, loss)
    state = jax.vmap(lambda key: _start(task, key))(keys)
    stops, seen = evaluation_steps(steps), []
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        state = advance(state, start, stop, keys, splits.train)
        seen.append(jax.device_get(look(state[0], keys, splits)))
        on_evaluation()
    train_loss, validation_loss, metrics = jax.tree.map(lambda *a: np.stack(a), *seen)
    test_metrics, predictions = jax.device_get(test(state[0], splits.test))
    first = jax.tree.map(lambda a: np.asarray(a[0]), (predictions, splits.test))
    return History(stops, train_loss, validation_loss, metrics, test_metrics, *first)


def _start(task: Task, key: PRNGKeyArray) -> tuple[Tree, Tree]:
    params = task.init(key)
    return params, task.optimizer.init(params)


def _programs(task: Task, loss: Callable[[Tree, Tree], Array]) -> tuple[Any, Any, Any]:
    """Compiled over seeds: train between two steps, evaluate, predict the test set."""
    predict = task.predict or task.apply

    def objective(params, key, examples):
        examples = task.prepare(key, examples)
        return loss(task.apply(params, examples.inputs), examples.target)

    def measure(params, examples):
        pred = predict(params, examples.inputs)
        return {m.name: m.measure(pred, examples.target) for m in task.metrics}, pred

    def advance(state, start, stop, key, examples):
        def step(i, state):
            params, memory = state
            draw, noise = jax.random.split(jax.random.fold_in(key, i))
            size = len(jax.tree.leaves(examples)[0])
            rows = jax.random.randint(draw, (task.batch_size,), 0, size)
            batch = jax.tree.map(lambda a: a[rows], examples)
            updates, memory = task.optimizer.update(
                jax.grad(objective)(params, noise, batch), memory, params
            )
            return optax.apply_updates(params, updates), memory

        return jax.lax.fori_loop(start, stop, step, state)

    def look(params, key, splits):
        losses = (objective(params, key, part) for part in (splits.train, splits.validation))
        return (*losses, measure(params, splits.validation)[0])

    over_seeds = lambda f, axes=0: jax.jit(jax.vmap(f, axes))
    return over_seeds(advance, (0, None, None, 0, 0)), over_seeds(look), over_seeds(measure)
