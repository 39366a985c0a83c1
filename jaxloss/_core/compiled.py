"""The one decorator of public losses: an eager call becomes a single compiled dispatch."""

import types
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import numpy as np

from .checks import check_reduction, message, naming

F = TypeVar("F", bound=Callable[..., Any])


class _Static:
    """A string or plain function that passes `jax.jit` as part of the tree, not as a leaf."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


jax.tree_util.register_static(_Static)


def compiled(*static: str, functions: Sequence[str] = ()) -> Callable[[F], F]:
    """Compile a loss with the options named in `static`, and `reduction`, fixed while tracing.

    Numbers stay traced, so a new value does not compile again. Reductions that are pytrees (the
    parametrised ones) travel as they are: arrays inside them are traced, the rest is compared by
    value. Signature, help, types and errors are those of the plain function. A call that passes one
    of the options named in `functions` runs as it stands, for the reason given at `uncompiled`,
    unless what it passes is a pytree of arrays, which travels like a reduction.
    """

    def decorate(loss: F) -> F:
        @wraps(loss)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with naming(loss.__name__):
                reduction = kwargs.get("reduction")
                if isinstance(reduction, _Static):
                    kwargs["reduction"] = reduction.value
                return loss(*args, **kwargs)

        jitted = jax.jit(traced, static_argnames=static)

        @wraps(loss)
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(not _is_tree(kwargs.get(name)) for name in functions):
                return traced(*args, **kwargs)
            if "reduction" in kwargs:
                kwargs["reduction"] = _carry(loss.__name__, kwargs["reduction"])
            for option in static:
                if option in kwargs and getattr(kwargs[option], "__hash__", None) is None:
                    with naming(loss.__name__):
                        raise TypeError(
                            message(option, "a static option", type(kwargs[option]).__name__)
                        )
            return jitted(*args, **kwargs)

        call.__dict__["jitted"] = jitted  # lets tests count compilations
        return cast(F, call)

    return decorate


def uncompiled(loss: F) -> F:
    """The decorator of a loss that calls a function of its caller: it only names errors.

    Such a function may close over arrays, tracers and objects that change; compiled here, a cache
    would keep those of the first call.
    """

    @wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Any:
        with naming(loss.__name__):
            return loss(*args, **kwargs)

    call.__dict__["jitted"] = None
    return cast(F, call)


def _is_tree(value: Any) -> bool:
    """Whether a value is None or a pytree that holds nothing but arrays and numbers."""
    numbers = (jax.Array, np.ndarray, np.generic, int, float)
    return all(isinstance(leaf, numbers) for leaf in jax.tree.leaves(value))


def _carry(name: str, reduction: Any) -> Any:
    with naming(name):
        check_reduction(reduction)
    if isinstance(reduction, (str, types.FunctionType)):
        return _Static(reduction)
    if jax.tree_util.all_leaves([reduction]):  # a callable that is no pytree
        return _Static(reduction)
    return reduction
