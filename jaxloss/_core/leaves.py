"""The leaves of a pytree of parameters that a selector picks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .checks import message

Select = Callable[[str, Any], bool]


def chosen(params: Any, select: Select | None, *others: Any) -> list[tuple[Array, ...]]:
    """The floating leaves that `select` picks, each with its partners in trees of like structure.

    All floating leaves without a selector.
    """
    if select is not None and not callable(select):
        expected = "a function of (path, leaf)"
        raise TypeError(message("select", expected, type(select).__name__))
    partners = [jax.tree.leaves(other) for other in others]
    found = []
    for i, (keys, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        if (is_float or isinstance(leaf, float)) and (select is None or select(path, leaf)):
            found.append(tuple(jnp.asarray(x) for x in (leaf, *(leaves[i] for leaves in partners))))
    return found
