"""One training run per loss: the same model, data, batches and optimiser, several seeds at once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .task import Criterion, Examples, Metric, Splits, State, Task, Tree, descend


@dataclass(frozen=True)
class Cost:
    """Loss and gradient of one batch: temporaries in MiB, and the median time in milliseconds."""

    memory: float
    time: float


@dataclass(frozen=True)
class History:
    """What one loss did.

    Losses, validation metrics and the validation loss's terms are `(evaluations, seeds)`, test
    metrics `(seeds,)`; predictions and examples are those of the first seed's test set.
    """

    steps: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    metrics: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    predictions: Tree
    examples: Examples
    terms: dict[str, np.ndarray] = field(default_factory=dict)
    cost: "Cost | None" = None

    @property
    def seeds(self) -> int:
        """How many runs the curves are a mean of."""
        return self.train.shape[1]

    def best(self, metric: Metric) -> int:
        """Index of the best mean validation metric over seeds; the first one of a tie."""
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
    drawn = [task.load(seed) for seed in range(seeds)]
    return jax.device_put(jax.tree.map(lambda *arrays: np.stack(arrays), *drawn))


def evaluation_steps(steps: int, evaluations: int = 50) -> np.ndarray:
    """Steps to stop and look at, the first and the last included."""
    return np.unique(np.linspace(0, steps, min(steps, evaluations) + 1).round().astype(int))


def train(
    task: Task,
    loss: Callable[[Tree, Tree], Array],
    splits: Splits,
    *,
    steps: int,
    on_evaluation: Callable[[], None] = lambda: None,
) -> History:
    """Train with one loss on every seed of `splits`, side by side under one `vmap`."""
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(splits)[0]))
    advance, look, test = _programs(task, loss)
    params, memory = jax.vmap(task.init)(keys), ()
    if isinstance(loss, Criterion):
        memory = loss.memory()
    per_seed = lambda x: jnp.broadcast_to(x, (len(keys), *jnp.shape(x)))
    state = State(params, jax.vmap(task.optimizer.init)(params), jax.tree.map(per_seed, memory))
    seen, stops = [], evaluation_steps(steps, task.evaluations)
    for begin, end in pairwise([0, *stops.tolist()]):
        state = advance(state, begin, end, keys, splits.train)
        seen.append(jax.device_get(look(state, keys, splits)))
        on_evaluation()
    train_loss, validation_loss, metrics, terms = jax.tree.map(lambda *a: np.stack(a), *seen)
    (test_metrics, predictions), examples = jax.device_get((test(state, splits.test), splits.test))
    first = jax.tree.map(lambda a: a[0], (predictions, examples))
    cost = measure_cost(task, loss, splits) if task.costs else None
    return History(
        stops, train_loss, validation_loss, metrics, test_metrics, *first, terms=terms, cost=cost
    )


def measure_cost(task: Task, loss: Callable[[Tree, Tree], Array], splits: Splits) -> Cost:
    """Memory and time of the loss and its gradient on one batch of the first seed."""
    params = task.init(jax.random.key(0))
    batch = jax.tree.map(lambda a: a[0, : task.batch_size], splits.train)
    objective = lambda p, b: loss(task.apply(p, b.inputs), b.target)
    step = jax.jit(jax.value_and_grad(objective)).lower(params, batch).compile()
    times = []
    for _ in range(11):
        begin = perf_counter()
        jax.block_until_ready(step(params, batch))
        times.append(perf_counter() - begin)
    analysis = step.memory_analysis()
    memory = analysis.temp_size_in_bytes / 2**20 if analysis else np.nan  # some backends have none
    return Cost(memory, 1000 * float(np.median(times)))


def baselines(task: Task, splits: Splits) -> dict[str, dict[str, np.ndarray]]:
    """Test metrics, `(seeds,)`, of the untrained model and of what needs no training."""
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(splits)[0]))
    untrained = lambda key, inputs: (task.predict or task.apply)(task.init(key), inputs)
    fixed = {name: lambda _, inputs, f=f: f(inputs) for name, f in task.baselines.items()}

    def measure(key: PRNGKeyArray, test: Examples) -> dict[str, dict[str, Array]]:
        found = {}
        for name, predict in {"untrained": untrained, **fixed}.items():
            pred = predict(key, test.inputs)
            found[name] = {m.name: m.measure(pred, test.target) for m in task.metrics}
        return found

    found = jax.device_get(jax.jit(jax.vmap(measure))(keys, splits.test))
    return {name: found[name] for name in ("untrained", *fixed)}


def _programs(task: Task, loss: Callable[[Tree, Tree], Array]) -> tuple[Any, Any, Any]:
    """Train between two steps, evaluate, predict: each compiled over all seeds."""
    predict, evaluate = task.predict or task.apply, lambda *both: (loss(*both), {})
    take = loss.step if isinstance(loss, Criterion) else descend
    if isinstance(loss, Criterion):
        predict, evaluate = lambda *both: loss.decode(task.apply(*both)), loss.evaluate

    def objective(params: Tree, key: PRNGKeyArray, examples: Examples) -> Any:
        examples = task.prepare(key, examples)
        return evaluate(task.apply(params, examples.inputs), examples.target)

    def measure(params: Tree, examples: Examples) -> tuple[dict[str, Array], Tree]:
        pred = predict(params, examples.inputs)
        return {m.name: m.measure(pred, examples.target) for m in task.metrics}, pred

    def advance(state: State, begin: int, end: int, key: PRNGKeyArray, examples: Examples) -> State:
        size = len(jax.tree.leaves(examples)[0])

        def step(i: Array, state: State) -> State:
            draw, noise = jax.random.split(jax.random.fold_in(key, i))
            rows = jax.random.randint(draw, (task.batch_size,), 0, size)
            batch = jax.tree.map(lambda a: a[rows], examples)
            return take(lambda params: objective(params, noise, batch), task.optimizer, state)

        # Traced bounds, where a scan would compile once more for a last stretch of another length.
        return jax.lax.fori_loop(begin, end, step, state)

    def look(
        state: State, key: PRNGKeyArray, splits: Splits
    ) -> tuple[Array, Array, dict[str, Array], dict[str, Array]]:
        params, (seen, unseen, _) = state.params, splits
        seen = jax.tree.map(lambda a: a[: task.evaluated], seen)
        metrics, _ = measure(params, unseen)
        (fitted, _), (total, terms) = (objective(params, key, part) for part in (seen, unseen))
        return fitted, total, metrics, terms

    def test(state: State, examples: Examples) -> tuple[dict[str, Array], Tree]:
        return measure(state.params, examples)

    over_seeds = jax.vmap(advance, in_axes=(0, None, None, 0, 0))
    return jax.jit(over_seeds), jax.jit(jax.vmap(look)), jax.jit(jax.vmap(test))
