"""What multi-task methods share: losses in one form, inner products of gradients."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from .checks import check_float, check_scalar, check_shape, check_where, message
from .numerics import widen
from .sharding import is_sharded
from .terms import Axis, add_up

Tree = Any
NEAR_ZERO = 1e-14  # squared length, as a part of the tasks' mean one, at which a direction is lost


def no_losses(num_tasks: int | Iterable[str]) -> Tree:
    """Nothing seen of any task, in the form of the losses."""
    if isinstance(num_tasks, Iterable) and not isinstance(num_tasks, str):
        names = list(num_tasks)
        if names and all(isinstance(name, str) for name in names):
            return {name: jnp.zeros(()) for name in names}
    elif isinstance(num_tasks, int) and not isinstance(num_tasks, bool) and num_tasks > 0:
        return jnp.zeros(num_tasks)
    raise ValueError(message("num_tasks", "an integer of at least 1, or names", repr(num_tasks)))


def names_of(tasks: Any) -> list[str]:
    """The names of tasks in an order that jit keeps; none for an array."""
    return sorted(tasks) if isinstance(tasks, Mapping) else []


def stack(**values: Any) -> tuple[Callable[[Array], Tree], list[Array]]:
    """Each argument as `(tasks,)`, float32 or wider, and what gives such an array the first's form.

    The first argument tells number or names of the tasks.
    """
    first, like = next(iter(values.items()))
    names = names_of(like)
    if isinstance(like, Mapping) and not names:
        raise ValueError(message(first, "at least one task", "none"))
    for name, value in values.items():
        _check_form(name, value, like)
        parts = {f"{name}[{k!r}]": value[k] for k in names} if names else {name: value}
        check_float(**parts)
    if not names:
        return lambda x: x, list(widen(*values.values()))
    rows = [jnp.stack(widen(*(value[name] for name in names))) for value in values.values()]
    form = lambda x: {name: x[names.index(name)] for name in like}
    return form, list(widen(*rows))


def _check_form(name: str, value: Any, like: Any) -> None:
    """An argument has the names or the shape of the losses."""
    if isinstance(like, Mapping):
        if not isinstance(value, Mapping) or set(value) != set(like):
            got = sorted(value) if isinstance(value, Mapping) else type(value).__name__
            raise ValueError(message(name, f"the names {sorted(like)}", got))
        check_scalar(**{f"{name}[{k!r}]": x for k, x in value.items()})
        return
    if isinstance(value, Mapping):
        raise ValueError(message(name, f"shape {jnp.shape(like)}", f"the names {sorted(value)}"))
    if jnp.ndim(like) != 1 or not jnp.size(like):
        expected = "one axis of tasks, or scalars by name"
        raise ValueError(message(name, expected, f"shape {jnp.shape(like)}"))
    check_shape(jnp.shape(like), **{name: value})


def kept_tasks(where: Any, like: Any) -> Array:
    """Which tasks are kept, in the order of `stack`."""
    _check_form("where", where, like)
    parts = [where[name] for name in names_of(like)] if isinstance(like, Mapping) else [where]
    for part in parts:
        check_where(part)
    return jnp.stack(parts) if isinstance(like, Mapping) else jnp.asarray(where)


def gram(grads: Tree, axis_name: Axis = None) -> Float[Array, "tasks tasks"]:
    """Inner products of every two tasks' gradients over the whole tree, in float32 or wider."""
    named = [(jax.tree_util.keystr(k), x) for k, x in jax.tree_util.tree_leaves_with_path(grads)]
    check_float(**{f"grads{name}": leaf for name, leaf in named})
    sizes = {jnp.shape(leaf)[:1] for _, leaf in named}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        expected = "arrays with one leading axis of tasks"
        raise ValueError(message("grads", expected, f"sizes {sorted(sizes)}"))
    parts = [_products(jnp.asarray(leaf)) for _, leaf in named]
    return add_up(sum(parts[1:], parts[0]), axis_name)


def _products(x: Array) -> Array:
    rest = tuple(range(1, x.ndim))
    split = any(is_sharded(x, axis) for axis in rest)
    whole = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(None, None)) if split else None
    return jax.lax.dot_general(
        x,
        x,
        ((rest, rest), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        out_sharding=whole,
    )


def combine(coefficients: Float[Array, " tasks"], grads: Tree) -> Tree:
    """The sum over tasks of coefficient times gradient, added up in float32 or wider."""

    def mix(x: Any) -> Array:
        x = jnp.asarray(x)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mixed = jnp.tensordot(coefficients.astype(wide.dtype), wide, 1, precision="highest")
        return mixed.astype(x.dtype)

    return jax.tree.map(mix, grads)


def on_simplex(
    products: Float[Array, "tasks tasks"],
    slope: Float[Array, " tasks"],
    radius: Float[Array, ""],
    iterations: int,
) -> Float[Array, " tasks"]:
    r"""Minimises $b \cdot w + r \sqrt{w^T G w}$ over weights of sum 1, none of them negative.

    Goes through all pairs of tasks `iterations` times, and moves weight from one to the other up to
    the minimum on that line, which is known in closed form.
    """
    check_count(iterations=iterations)
    tasks = len(products)
    first, second = jnp.triu_indices(tasks, 1)

    def move(n: Array, w: Array) -> Array:
        i, j = first[n % len(first)], second[n % len(first)]
        along = jnp.matmul(products, w, precision="highest")
        # With t moved from j to i the square is q t^2 + 2 p t + s, and the rest changes by a t.
        s, p = jnp.maximum(w @ along, 0) + NEAR_ZERO, along[i] - along[j]
        q = products[i, i] + products[j, j] - 2 * products[i, j]
        a = slope[i] - slope[j]
        room = radius**2 * q - a**2  # where none is left, the line goes down all along
        offset = jnp.sqrt(a**2 * jnp.maximum(s * q - p**2, 0) / jnp.where(room > 0, room, 1))
        to = (-jnp.sign(a) * offset - p) / jnp.where(q > 0, q, 1)
        t = jnp.where(room > 0, to, jnp.where(a > 0, -1, 1))
        t = jnp.where(q > 0, jnp.clip(t, -w[i], w[j]), 0)
        return w.at[i].add(t).at[j].add(-t)

    even = jnp.full(tasks, 1 / tasks, products.dtype)
    return jax.lax.fori_loop(0, iterations * len(first), move, even) if tasks > 1 else even


def square(w: Array, products: Array) -> Array:
    """The squared length of a combination; rounding does not make it negative."""
    return jnp.maximum(w @ jnp.matmul(products, w, precision="highest"), 0)


def check_count(**counts: Any) -> None:
    """Each argument is an integer of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(message(name, "an integer of at least 1", repr(count)))
