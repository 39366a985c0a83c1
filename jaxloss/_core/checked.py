"""Run-time checks of values, for debugging: what tracing cannot see."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax
from jax.experimental import checkify

from .checks import checking

F = TypeVar("F", bound=Callable[..., Any])


def checked(function: F) -> F:
    """The same function, raising `ValueError` for values that no loss inside it can accept.

    Labels outside the classes, targets that do not sum to one, quantiles outside (0, 1) and the
    like turn a unit into NaN or into a silent nonsense in compiled code. Wrapped by `checked`, a
    loss, a whole objective or `jax.value_and_grad(objective)` says which argument and what range.
    Slower, since it traces at every call; call it from Python, not inside `jax.jit`.

    Args:
        function: A loss, or any function that calls losses, jitted or not.

    Returns:
        A function with the signature and results of `function`.

    Raises:
        ValueError: Naming loss, argument, expected range and the number of bad values.

    >>> loss = checked(softmax_cross_entropy)
    >>> loss(jnp.zeros((2, 3)), jnp.array([0, 3]))
    Traceback (most recent call last):
    ValueError: softmax_cross_entropy: labels: expected values in [0, 3), got 1 that are not
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        arrays, static = split_arrays(args, kwargs)

        def run(arrays: list[Any]) -> Any:
            whole, keywords = join_arrays(arrays, static)
            return function(*whole, **keywords)

        with checking(True):
            error, out = checkify.checkify(run)(arrays)
        text = error.get()
        if text is not None:
            raise ValueError(text.removesuffix(" (`check` failed)"))
        return out

    return cast(F, call)


def split_arrays(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """Arrays that checkify may trace, and everything else."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [leaf for leaf in leaves if isinstance(leaf, jax.Array) or hasattr(leaf, "__array__")]
    rest = [None if isinstance(x, jax.Array) or hasattr(x, "__array__") else (x,) for x in leaves]
    return traced, (tree, rest)


def join_arrays(arrays: list[Any], static: Any) -> Any:
    tree, rest = static
    queue = iter(arrays)
    return jax.tree.unflatten(tree, [next(queue) if x is None else x[0] for x in rest])
