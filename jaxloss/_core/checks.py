"""Checks while tracing (chex inside) and, under `jaxloss.checked`, checks of values at run time.

Every message reads `loss: argument: expected ..., got ...`; `naming` provides the loss.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

_name: ContextVar[str] = ContextVar("name", default="")
checking = jax.make_user_context(False)
NOTING = "noting"  # the value of `checking` under which `require` notes what it finds
noted: list[tuple[str, str, np.ndarray]] = []  # argument, what was expected, where it is not so


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put `name` before every message raised inside; the outermost name wins."""
    token = _name.set(_name.get() or name)
    try:
        yield
    finally:
        _name.reset(token)


def message(argument: str, expected: str, got: object) -> str:
    """The one form of every error message."""
    return f"{_name.get()}: {argument}: expected {expected}, got {got}".removeprefix(": ")


def _assert(
    assertion: Callable[..., None], *args: Any, error: type[Exception], text: str, **kwargs: Any
) -> None:
    try:
        assertion(*args, exception_type=error, **kwargs)
    except error as reason:
        raise error(text) from reason


def check_array(**arrays: Any) -> None:
    """Each argument is an array or a number, and not complex."""
    for name, array in arrays.items():
        if not isinstance(array, (jax.Array, np.ndarray, np.generic, bool, int, float)):
            raise TypeError(message(name, "an array", type(array).__name__))
        if jnp.issubdtype(jnp.result_type(array), jnp.complexfloating):
            raise TypeError(message(name, "a real dtype", jnp.result_type(array)))


def check_float(**arrays: Any) -> None:
    """Each argument has a floating dtype: a prediction is never an integer."""
    check_array(**arrays)
    for name, array in arrays.items():
        text = message(name, "a floating dtype", jnp.result_type(array))
        _assert(chex.assert_type, jnp.asarray(array), float, error=TypeError, text=text)


def check_integer(**arrays: Any) -> None:
    """Each argument has an integer dtype."""
    check_array(**arrays)
    for name, array in arrays.items():
        text = message(name, "an integer dtype", jnp.result_type(array))
        _assert(chex.assert_type, jnp.asarray(array), int, error=TypeError, text=text)


def check_shape(shape: Sequence[int], **arrays: Any) -> None:
    """Each argument has exactly this shape."""
    check_array(**arrays)
    for name, array in arrays.items():
        text = message(name, f"shape {tuple(shape)}", jnp.shape(array))
        _assert(chex.assert_shape, array, tuple(shape), error=ValueError, text=text)


def check_same_shape(**arrays: Any) -> None:
    """All arguments have the shape of the first one."""
    check_array(**arrays)
    check_shape(jnp.shape(next(iter(arrays.values()))), **arrays)


def check_scalar(**values: Any) -> None:
    """Each argument is one real number, traced or not."""
    check_array(**values)
    for name, value in values.items():
        text = message(name, "a scalar", f"shape {jnp.shape(value)}")
        _assert(chex.assert_shape, value, (), error=ValueError, text=text)


def check_min_rank(rank: int, **arrays: Any) -> None:
    """Each argument has at least `rank` axes."""
    check_array(**arrays)
    for name, array in arrays.items():
        got = f"shape {jnp.shape(array)}"
        text = message(name, f"at least {rank} " + ("axis" if rank == 1 else "axes"), got)
        _assert(chex.assert_rank, array, set(range(rank, 64)), error=ValueError, text=text)


def check_last(size: int, **arrays: Any) -> None:
    """The last axis of each argument has this size."""
    check_min_rank(1, **arrays)
    for name, array in arrays.items():
        shape = jnp.shape(array)
        text = message(name, f"a last axis of size {size}", f"shape {shape}")
        _assert(chex.assert_axis_dimension, array, -1, size, error=ValueError, text=text)


def check_where(where: Any, name: str = "where") -> None:
    """A mask is a bool array."""
    check_array(**{name: where})
    text = message(name, "a bool array", jnp.result_type(where))
    _assert(chex.assert_type, jnp.asarray(where), bool, error=TypeError, text=text)


def check_reduction(reduction: Any) -> None:
    """A reduction is one of three names, or a callable."""
    named = isinstance(reduction, str)
    if reduction not in ("mean", "sum", "none") if named else not callable(reduction):
        expected = "'mean', 'sum', 'none' or a callable of (values, weights)"
        error = ValueError if named else TypeError
        raise error(message("reduction", expected, repr(reduction)))


def check_option(options: Sequence[Any], **values: Any) -> None:
    """A static option is one of the offered values."""
    for name, value in values.items():
        if value not in options:
            raise ValueError(message(name, f"one of {list(options)}", repr(value)))


def check_axis(axis: Any, rank: int) -> int:
    """`axis` as a non-negative integer below `rank`."""
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(message("axis", "an integer", repr(axis)))
    if not -rank <= axis < rank:
        raise ValueError(message("axis", f"an axis of an array of rank {rank}", axis))
    return int(axis) % rank


def require(ok: Callable[[], jax.Array], argument: str, expected: str, where: Any = None) -> None:
    """Under `jaxloss.checked`, values where `ok` is False raise; elsewhere this costs nothing.

    Under `explain` they are noted, also where all is well.
    """
    if checking.value:
        good = ok()
        if where is not None:
            hidden = ~where.reshape(where.shape + (1,) * (good.ndim - where.ndim))
            good = good | hidden
        if checking.value == NOTING:
            note = lambda bad: noted.append((argument, expected, np.asarray(bad)))
            jax.debug.callback(note, ~good)
        else:
            text = message(argument, expected, "{bad} that are not")
            checkify.debug_check(jnp.all(good), text, bad=jnp.sum(~good))
