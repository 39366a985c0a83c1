"""Training steps with several losses: their weights, or their gradients, made into one.

The objective's terms are the losses, with their gradients; the parameters that tasks share stand
under `"trunk"`, a list of layers.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import jaxloss

from .task import Objective, State, Tree, move

Optimizer = optax.GradientTransformation
Method = dict[str, Callable[..., Any]]  # what a `Criterion` is given beside its loss


def surgery(combine: Callable[[Tree], Tree]) -> Method:
    """Along what `combine` makes of the tasks' gradients in the trunk; elsewhere their sum."""

    def step(objective: Objective, optimizer: Optimizer, state: State) -> State:
        grads = _jacobian(objective, state.params)
        merged = jax.tree.map(lambda g: jnp.sum(g, axis=0), grads)
        return move(merged | {"trunk": combine(grads["trunk"])}, optimizer, state)

    return dict(step=step)


def famo(names: Iterable[str]) -> Method:
    """Along the weighted gradient; the new losses of the batch then move the weights."""

    def step(objective: Objective, optimizer: Optimizer, state: State) -> State:
        weights, memory = jaxloss.famo_weights(objective(state.params)[1], state.memory)
        state = move(_gradient(objective, state.params, weights), optimizer, state)
        return state._replace(memory=jaxloss.famo_update(objective(state.params)[1], memory))

    return dict(step=step, memory=lambda: jaxloss.famo_init(names))


def dynamic_weights(names: Iterable[str], *, epoch: int) -> Method:
    """Along the weighted gradient; the mean losses of an epoch of so many steps move weights."""

    def memory() -> Any:
        zeros, ones = ({name: jnp.full((), x) for name in names} for x in (0.0, 1.0))
        return jnp.zeros((), jnp.int32), zeros, ones, jaxloss.dwa_init(names)

    def step(objective: Objective, optimizer: Optimizer, state: State) -> State:
        steps, means, *known = state.memory
        means = {k: means[k] + x / epoch for k, x in objective(state.params)[1].items()}
        state = move(_gradient(objective, state.params, known[0]), optimizer, state)
        ends = steps + 1 == epoch
        after = [*jaxloss.dynamic_weight_average(means, known[1])]
        known = jax.tree.map(lambda new, old: jnp.where(ends, new, old), after, known)
        means = {k: jnp.where(ends, 0, x) for k, x in means.items()}
        return state._replace(memory=((steps + 1) % epoch, means, *known))

    return dict(step=step, memory=memory)


def gradnorm(names: Iterable[str], *, rate: float) -> Method:
    """Along the weighted gradient; the lengths of the losses' gradients move the weights."""

    def step(objective: Objective, optimizer: Optimizer, state: State) -> State:
        logs, first = state.memory
        losses = jnp.stack([*objective(state.params)[1].values()])
        first = jnp.where(first == 0, losses, first)
        grads = _jacobian(objective, state.params)
        norms = jax.vmap(optax.tree.norm)(grads["trunk"][-1])
        weights = len(logs) * jax.nn.softmax(logs)
        slope = jax.grad(jaxloss.gradnorm_loss)(logs, norms, losses, first)
        slope = slope / jnp.mean(weights * norms)  # one rate then fits losses of any size
        merged = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), grads)
        return move(merged, optimizer, state)._replace(memory=(logs - rate * slope, first))

    return dict(step=step, memory=lambda: (jnp.zeros(len([*names])),) * 2)


def _jacobian(objective: Objective, params: Tree) -> Tree:
    """Gradients of all losses, with a leading axis of tasks."""
    return jax.jacrev(lambda p: jnp.stack([*objective(p)[1].values()]))(params)


def _gradient(objective: Objective, params: Tree, weights: dict[str, Array]) -> Tree:
    """The gradient of the weighted sum of the losses."""
    total = lambda p: sum(weights[name] * x for name, x in objective(p)[1].items())
    return jax.grad(total)(params)
