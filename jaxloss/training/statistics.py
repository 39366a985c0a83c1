"""Statistics carried from step to step as explicit state: pytrees, fit for jit, scan and saving."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .._core.checks import (
    check_float,
    check_integer,
    check_scalar,
    check_shape,
    check_where,
    message,
)
from .._core.compiled import uncompiled
from .._core.labels import poison, valid
from .._core.numerics import safe_div, widen
from .._core.sharding import one_hot
from .._core.terms import Axis, add_up
from .._core.typing import Number, Where

__all__ = [
    "class_counts_init",
    "class_counts_update",
    "ema_init",
    "ema_update",
    "ema_value",
    "running_mean_init",
    "running_mean_update",
]

Tree = Any


class _Average(NamedTuple):
    """An average so far, in float32 or wider, and the weight of what went into it."""

    mean: Tree
    weight: Float[Array, ""]


@uncompiled
def ema_init(value: Tree) -> _Average:
    """The state of an exponential moving average that has seen nothing.

    Args:
        value: Pytree of floating arrays; only its structure, shapes and dtypes count.

    Returns:
        The state, for `ema_update` and `ema_value`.

    >>> ema_value(ema_init(jnp.ones(2)))
    Array([0., 0.], dtype=float32)
    """
    check_float(**{f"value{k}": leaf for k, leaf in _leaves(value)})
    zeros = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), widen(x)[0].dtype), value)
    return _Average(zeros, jnp.zeros(()))


@uncompiled
def ema_update(
    state: _Average,
    value: Tree,
    *,
    decay: Number = 0.99,
    weight: Number = 1.0,
    axis_name: Axis = None,
) -> _Average:
    r"""One step of an exponential moving average.

    $$ m \leftarrow \beta^w m + (1 - \beta^w) x $$

    Args:
        state: From `ema_init` or an earlier step.
        value: What is averaged; it carries no gradient.
        decay: $\beta$.
        weight: $w$: 2 is the same value twice, 0 leaves the state exactly as it was.
        axis_name: Mapped axis over whose devices values are averaged first, by their weights; the
            step then has their mean weight.

    Returns:
        The new state.

    Raises:
        ValueError: `value` has another structure or other shapes than the state.

    >>> state = ema_update(ema_init(jnp.zeros(())), jnp.array(4.0), decay=0.9)
    >>> ema_value(state), ema_value(state, debias=False)
    (Array(4., dtype=float32), Array(0.4, dtype=float32))
    """
    check_scalar(decay=decay, weight=weight)
    mean, weight = _over_devices(state, value, weight, axis_name)
    if axis_name is not None:
        weight = weight / jax.lax.psum(1, axis_name)
    kept = jnp.asarray(decay, jnp.float32) ** weight
    blend = lambda m, x: jnp.where(weight == 0, m, kept * m + (1 - kept) * x)
    return _Average(jax.tree.map(blend, state.mean, mean), blend(state.weight, jnp.ones(())))


@uncompiled
def ema_value(state: _Average, *, debias: bool = True) -> Tree:
    """The moving average.

    Args:
        state: From `ema_update`.
        debias: Whether to divide by the weight seen so far, as Adam does, so that the first value
            counts wholly; otherwise the average starts from 0.

    Returns:
        A pytree like the values, in float32 or wider; 0 before the first one.

    Reference:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015, section 3.

    >>> ema_value(ema_update(ema_init(jnp.zeros(())), jnp.array(4.0)))
    Array(4., dtype=float32)
    """
    return jax.tree.map(lambda m: safe_div(m, state.weight) if debias else m, state.mean)


@uncompiled
def running_mean_init(shape: tuple[int, ...] = ()) -> _Average:
    """The state of a mean of everything seen, such as that of an epoch.

    Args:
        shape: Of the values.

    Returns:
        The state, whose `mean` is 0 and whose `weight` is 0.

    >>> running_mean_init().mean
    Array(0., dtype=float32)
    """
    return _Average(jnp.zeros(shape), jnp.zeros(()))


@uncompiled
def running_mean_update(
    state: _Average, value: Float[Array, "..."], *, weight: Number = 1.0, axis_name: Axis = None
) -> _Average:
    r"""Add a value to a mean.

    $$ m \leftarrow m + \frac{w}{W + w} (x - m), \qquad W \leftarrow W + w $$

    For the exact mean of an epoch give the mean and the weight of a `SumAndWeight` of each batch.

    Args:
        state: From `running_mean_init` or an earlier step.
        value: Of the shape of the state; it carries no gradient.
        weight: $w$; 0 leaves the state exactly as it was.
        axis_name: Mapped axis whose devices each have a value and a weight.

    Returns:
        The new state; its `mean` is the result.

    >>> state = running_mean_update(running_mean_init(), jnp.array(4.0), weight=3.0)
    >>> running_mean_update(state, jnp.array(8.0)).mean  # (3 * 4 + 8) / 4
    Array(5., dtype=float32)
    """
    check_scalar(weight=weight)
    value, weight = _over_devices(state, value, weight, axis_name)
    total = state.weight + weight
    share = safe_div(weight, total).astype(state.mean.dtype)
    mean = jnp.where(weight == 0, state.mean, state.mean + share * (value - state.mean))
    return _Average(mean, total)


@uncompiled
def class_counts_init(num_classes: int) -> Float[Array, " classes"]:
    """Counts of classes that have seen nothing.

    Args:
        num_classes: How many classes there are.

    Returns:
        Zeros, in float32: a count beyond 2^24 is rounded, not wrapped around.

    >>> class_counts_init(3)
    Array([0., 0., 0.], dtype=float32)
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        expected = "an integer of at least 1"
        raise ValueError(message("num_classes", expected, repr(num_classes)))
    return jnp.zeros(num_classes)


@uncompiled
def class_counts_update(
    counts: Float[Array, " classes"],
    labels: Integer[Array, "*shape"],
    *,
    where: Where | None = None,
    axis_name: Axis = None,
) -> Float[Array, " classes"]:
    """Counts of classes with those of a batch added.

    Args:
        counts: From `class_counts_init` or an earlier batch.
        labels: Integer labels of any shape. A kept one outside the classes makes all counts NaN.
        where: Bool array of the same shape; True keeps a label.
        axis_name: Mapped axis whose devices each hold a part of the batch.

    Returns:
        The new counts, such as `class_counts` of the losses for imbalanced classes.

    >>> class_counts_update(class_counts_init(3), jnp.array([0, 2, 2]))
    Array([1., 0., 2.], dtype=float32)
    """
    check_float(counts=counts)
    check_integer(labels=labels)
    classes = jnp.size(counts)
    check_shape((classes,), counts=counts)
    labels = jnp.asarray(labels)
    kept = jnp.ones(labels.shape, bool)
    if where is not None:
        check_where(where)
        check_shape(labels.shape, where=where)
        kept = jnp.asarray(where)
    hits = one_hot(labels, classes) & kept[..., None]
    new = jnp.sum(hits, axis=tuple(range(labels.ndim)), dtype=jnp.float32)
    bad = add_up(jnp.sum(kept & ~valid(labels, classes)), axis_name)
    return poison(jnp.asarray(counts) + add_up(new, axis_name), bad == 0)


def _over_devices(
    state: _Average, value: Tree, weight: Number, axis_name: Axis
) -> tuple[Tree, Array]:
    """Value and weight without gradients, those of several devices put together."""
    if jax.tree.structure(value) != jax.tree.structure(state.mean):
        expected = f"the structure {jax.tree.structure(state.mean)}"
        raise ValueError(message("value", expected, jax.tree.structure(value)))
    for (name, x), m in zip(_leaves(value), jax.tree.leaves(state.mean), strict=True):
        check_float(**{f"value{name}": x})
        check_shape(m.shape, **{f"value{name}": x})
    weight = jnp.asarray(weight, jnp.float32)
    value = jax.tree.map(lambda x: jax.lax.stop_gradient(widen(x)[0]), value)
    weight = jax.lax.stop_gradient(weight)
    if axis_name is None:
        return value, weight
    total = add_up(weight, axis_name)
    part = lambda x: safe_div(add_up(jnp.where(weight == 0, 0, weight * x), axis_name), total)
    return jax.tree.map(part, value), total


def _leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Leaves by where they are in the tree."""
    return [(jax.tree_util.keystr(k), x) for k, x in jax.tree_util.tree_leaves_with_path(tree)]
