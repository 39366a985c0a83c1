"""Which leaves of a pytree of parameters count: plain functions of a leaf's path and the leaf."""

import re
from typing import Any

import jax.numpy as jnp

from .._core.checks import message
from .._core.compiled import uncompiled
from .._core.leaves import Select

__all__ = ["all_of", "any_of", "matrices_only", "not_", "path_matches"]


def matrices_only(path: str, leaf: Any) -> bool:  # noqa: ARG001 (a selector is given both)
    """Leaves of at least two axes: kernels and embeddings, neither biases nor scales.

    Args:
        path: Where the leaf is; it does not count.
        leaf: An array or a number.

    Returns:
        Whether it is picked.

    >>> matrices_only("dense/kernel", jnp.ones((2, 3))), matrices_only("dense/bias", jnp.ones(3))
    (True, False)
    """
    return jnp.ndim(leaf) > 1


@uncompiled
def path_matches(pattern: str) -> Select:
    """Leaves whose path holds a match of a regular expression.

    Args:
        pattern: Searched for in the path, whose keys are joined by `/`: `"decoder/.*kernel"`.

    Returns:
        A selector.

    Raises:
        ValueError: The pattern is no regular expression.

    >>> path_matches("kernel|embedding")("decoder/0/kernel", jnp.ones(3))
    True
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as reason:
        expected = "a regular expression"
        raise ValueError(message("pattern", expected, f"{pattern!r} ({reason})")) from None
    return lambda path, leaf: compiled.search(path) is not None  # noqa: ARG005


def not_(select: Select) -> Select:
    """Leaves that a selector leaves out.

    Args:
        select: `(path, leaf) -> bool`.

    Returns:
        A selector.

    >>> not_(matrices_only)("dense/bias", jnp.ones(3))
    True
    """
    return lambda path, leaf: not select(path, leaf)


def any_of(*selectors: Select) -> Select:
    """Leaves that one of the selectors picks, or more of them.

    Args:
        selectors: Functions `(path, leaf) -> bool`.

    Returns:
        A selector.

    >>> any_of(matrices_only, path_matches("bias"))("dense/bias", jnp.ones(3))
    True
    """
    return lambda path, leaf: any(select(path, leaf) for select in selectors)


def all_of(*selectors: Select) -> Select:
    """Leaves that every one of the selectors picks.

    Args:
        selectors: Functions `(path, leaf) -> bool`.

    Returns:
        A selector.

    >>> all_of(matrices_only, path_matches("bias"))("dense/bias", jnp.ones(3))
    False
    """
    return lambda path, leaf: all(select(path, leaf) for select in selectors)
