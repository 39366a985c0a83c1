"""Features: the layers of two networks' outputs, pytrees of arrays with one batch, side by side."""

from typing import Any

import jax
from jaxtyping import Array

from .checks import (
    check_float,
    check_min_rank,
    check_same_shape,
    check_shape,
    check_where,
    message,
)
from .numerics import widen
from .reduce import mask
from .typing import Where


def paired(like: Any, **trees: Any) -> list[tuple[tuple[str, Any], ...]]:
    """Leaves of pytrees of one structure side by side, each with its name."""
    structure = jax.tree.structure(like)
    columns = []
    for name, tree in trees.items():
        if jax.tree.structure(tree) != structure or not structure.num_leaves:
            expected = f"the structure {structure}" if structure.num_leaves else "an array"
            raise TypeError(message(name, expected, jax.tree.structure(tree)))
        leaves = jax.tree.leaves_with_path(tree)
        columns.append([(name + jax.tree_util.keystr(path), leaf) for path, leaf in leaves])
    return list(zip(*columns, strict=True))


def feature_layers(
    where: Where | None, *, rank: int, same_space: bool = True, **both: Any
) -> list[tuple[Array, Array]]:
    """The layers of both trees in pairs: checked, masked and widened.

    Of at least `rank` axes. Without `same_space` the axes between batch and channels may differ.
    """
    layers, batch = [], None
    for (name, pred), (other, target) in paired(next(iter(both.values())), **both):
        check_float(**{name: pred})
        check_min_rank(rank, **{name: pred})
        if same_space:
            check_same_shape(**{name: pred, other: target})
        else:
            check_min_rank(rank, **{other: target})
            ends = (pred.shape[0], *target.shape[1:-1], pred.shape[-1])
            check_shape(ends, **{other: target})
        batch = pred.shape[0] if batch is None else batch
        if pred.shape[0] != batch:
            raise ValueError(message(name, f"a batch of {batch}", f"shape {pred.shape}"))
        check_batch(where, batch)
        pred, target = mask(where, *widen(pred, target))
        layers.append((pred, target))
    return layers


def check_batch(where: Where | None, batch: int) -> None:
    """`where` has one entry for each example."""
    if where is not None:
        check_where(where)
        check_shape((batch,), where=where)
