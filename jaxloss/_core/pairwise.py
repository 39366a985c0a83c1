"""Every row against every row: similarities, distances, masks by label, rows of other devices."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from .checks import check_float, check_integer, check_shape, check_where, message
from .compiled import compiled
from .numerics import absolute, safe_sqrt, unit_vectors, widen
from .reduce import mask
from .sharding import unshard
from .terms import Axis
from .typing import Where

__all__ = ["negative_mask", "pairwise_cosine", "pairwise_distance", "positive_mask"]


FEW_FEATURES = 8


def similarities(x: Array, y: Array) -> Array:
    """Dot products in float32 or wider, `(n, d), (m, d) -> (n, m)`; only `y` is gathered."""
    dtype = jnp.float64 if jnp.float64 in (x.dtype, y.dtype) else jnp.float32
    return jax.lax.dot_general(
        x,
        unshard(y, 0),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )


@compiled()
def pairwise_cosine(x: Float[Array, "n features"], y: Float[Array, "m features"]) -> Array:
    """Cosine of the angle between every two rows, `(n, m)`; 0 for a zero row.

    Args:
        x: Rows `(n, features)`.
        y: Rows `(m, features)`.

    >>> pairwise_cosine(jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    Array([[0.6, 0. ]], dtype=float32)
    """
    x, y = _rows(x, y)
    return similarities(unit_vectors(x), unit_vectors(y))


@compiled("p", "squared")
def pairwise_distance(
    x: Float[Array, "n features"],
    y: Float[Array, "m features"],
    *,
    p: float = 2,
    squared: bool = False,
) -> Array:
    r"""Distance of every row to every row, $|x_i - y_j|_p$, `(n, m)`, with gradient 0 at 0.

    Euclidean distances are made from dot products, without an `n x m x features` array: two rows
    closer than about a thousandth of their distance from the mean row count as one point. Other
    powers add up feature by feature, exactly.

    Args:
        x: Rows `(n, features)`.
        y: Rows `(m, features)`.
        p: Power of the norm, from 1 to `inf`; fixed while tracing.
        squared: Whether to return the square.

    >>> pairwise_distance(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    Array([[5., 0.]], dtype=float32)
    """
    x, y = _rows(x, y)
    if not p >= 1:
        raise ValueError(message("p", "a power of at least 1", p))
    if p == 2 and squared:
        return _squared_distance(x, y)
    if p == 2:
        scale = power_of_two(x, y)
        return scale * safe_sqrt(_squared_distance(x / scale, y / scale))
    norm = _minkowski(x, y, float(p))
    return jnp.square(norm) if squared else norm


def _rows(x: Any, y: Any) -> tuple[Array, Array]:
    check_float(x=x, y=y)
    if jnp.ndim(x) != 2:
        raise ValueError(message("x", "two axes", f"shape {jnp.shape(x)}"))
    check_shape((*jnp.shape(y)[:1], jnp.shape(x)[1]), y=y)
    x, y = widen(x, y)
    return x, y


def power_of_two(*arrays: Array) -> Array:
    """The one below the largest number: dividing by it is exact, and no square then overflows."""
    fixed = jax.lax.stop_gradient(arrays)
    largest = jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in fixed]).max()
    power = jax.lax.reduce_precision(largest, jnp.finfo(largest.dtype).nexp, 0)
    return jnp.where((power == 0) | ~jnp.isfinite(power), 1, power)


def _squared_distance(x: Array, y: Array) -> Array:
    y = unshard(y, 0)
    middle = jax.lax.stop_gradient(jnp.sum(y, axis=0, keepdims=True) / max(y.shape[0], 1))
    x, y = x - middle, y - middle  # what is common to all rows would only cost digits
    sizes = jnp.sum(jnp.square(x), axis=1)[:, None] + jnp.sum(jnp.square(y), axis=1)[None]
    square = sizes - 2 * similarities(x, y)
    return jnp.where(square <= 8 * jnp.finfo(x.dtype).eps * sizes, 0, square)


def squared_distances(x: Array, y: Array) -> Array:
    """Squared distance of every row to every row, `(n, m)`, without an `n x m x features` array.

    From the differences of up to `FEW_FEATURES` features, with every digit; else, faster, from
    products, see `pairwise_distance`.
    """
    x, y = widen(x, y)
    if not 0 < x.shape[1] <= FEW_FEATURES:
        return _squared_distance(x, y)
    y = unshard(y, 0)
    start = 0 * (x[:, :1] + y[None, :, 0])  # varies over devices as the rows do
    step = jax.checkpoint(lambda total, k: (total + (k[0][:, None] - k[1][None]) ** 2, None))
    return jax.lax.scan(step, start, (x.T, y.T))[0]


def _minkowski(x: Array, y: Array, p: float) -> Array:
    features = (x.T, unshard(y, 0).T)
    start = 0 * (x[:, :1] + y[None, :, 0])  # varies over devices as the rows do

    def farther(best: tuple[Array, Array], feature: Any) -> Any:
        k, (a, b) = feature
        gap = jnp.abs(a[:, None] - b[None])
        return (jnp.maximum(best[0], gap), jnp.where(gap > best[0], k, best[1])), None

    fixed = jax.lax.stop_gradient(features)
    first = jax.lax.stop_gradient(start)
    steps = jnp.arange(x.shape[1])
    (largest, which), _ = jax.lax.scan(farther, (first, first.astype(int)), (steps, fixed))
    if math.isinf(p):
        return absolute(jnp.take_along_axis(x, which, axis=1) - _chosen(y, which))
    scale = jnp.where(largest == 0, 1, largest)

    @jax.checkpoint
    def add(total: Array, feature: Any) -> Any:
        a, b = feature
        gap = absolute(a[:, None] - b[None]) / scale
        return total + (gap if p == 1 else jnp.where(gap == 0, 0, gap) ** p), None

    total, _ = jax.lax.scan(add, start, features)
    if p == 1:
        return scale * total
    zero = total == 0
    return jnp.where(zero, 0, scale * jnp.where(zero, 1, total) ** (1 / p))


def _chosen(y: Array, which: Array) -> Array:
    """`y[j, which[i, j]]`."""
    return jnp.take_along_axis(unshard(y, 0).T, which, axis=0)


def gather_rows(axis_name: Axis, *arrays: Array | None) -> tuple[Array | None, ...]:
    """The rows of all devices of a mapped axis, in their order, with gradient; None stays None."""
    if axis_name is None:
        return arrays
    gather = lambda x: jax.lax.all_gather(x, axis_name, axis=0, tiled=True)
    return tuple(x if x is None else gather(x) for x in arrays)


def own_index(rows: int, axis_name: Axis) -> Array:
    """Where each row of this device stands among the rows of all devices, `(rows,)`."""
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * rows
    return first + jnp.arange(rows, dtype=jnp.int32)


def label_masks(
    labels: Array, where: Array | None = None, axis_name: Axis = None
) -> tuple[Array, Array]:
    """Positives and negatives of each row among the rows of all devices, two `(n, m)` masks.

    A row is no positive of itself; a hidden row has neither and is neither.
    """
    keys, shown = gather_rows(axis_name, labels, where)
    assert keys is not None
    keys = unshard(keys, 0)
    same = labels[:, None] == keys[None]
    everyone = jnp.arange(keys.shape[0], dtype=jnp.int32)
    own = own_index(labels.shape[0], axis_name)[:, None] == everyone[None]
    if where is None or shown is None:
        return same & ~own, ~same
    both = where[:, None] & unshard(shown, 0)[None]
    return same & ~own & both, ~same & both


class Batch(NamedTuple):
    """A labelled batch: rows of this device, rows of all devices, and who is whose partner."""

    rows: Array
    keys: Array
    positives: Array  # (n, m)
    negatives: Array  # (n, m)

    def both(self) -> Array:
        """Which rows have a positive and a negative."""
        return jnp.any(self.positives, axis=1) & jnp.any(self.negatives, axis=1)


def prepare_batch(
    embeddings: Any, labels: Any, where: Any, axis_name: Axis, *, unit: bool = False
) -> Batch:
    """Check, mask, widen and gather a labelled batch; normalise its rows if `unit`."""
    check_float(embeddings=embeddings)
    if jnp.ndim(embeddings) != 2:
        raise ValueError(message("embeddings", "two axes", f"shape {jnp.shape(embeddings)}"))
    check_labels(jnp.shape(embeddings)[0], labels, where)
    labels, where = jnp.asarray(labels), None if where is None else jnp.asarray(where)
    (rows,) = mask(where, *widen(embeddings))
    rows = unit_vectors(rows) if unit else rows
    (keys,) = gather_rows(axis_name, rows)
    assert keys is not None
    return Batch(rows, keys, *label_masks(labels, where, axis_name))


def check_labels(rows: int, labels: Any, where: Any = None) -> None:
    """One integer label, and one flag if there is a mask, for each row."""
    check_integer(labels=labels)
    check_shape((rows,), labels=labels)
    if where is not None:
        check_where(where)
        check_shape((rows,), where=where)


@compiled()
def positive_mask(
    labels: Integer[Array, " n"], *, where: Where | None = None
) -> Bool[Array, "n n"]:
    """Which sample is a positive of which: another one with the same label.

    Args:
        labels: One label for each sample, `(n,)`.
        where: True keeps a sample; a hidden one neither has nor is a positive.

    >>> positive_mask(jnp.array([0, 1, 0]))[0]
    Array([False, False,  True], dtype=bool)
    """
    check_labels(np.size(labels), labels, where)
    return label_masks(jnp.asarray(labels), where)[0]


@compiled()
def negative_mask(
    labels: Integer[Array, " n"], *, where: Where | None = None
) -> Bool[Array, "n n"]:
    """Which sample is a negative of which: one with another label.

    Args:
        labels: One label for each sample, `(n,)`.
        where: True keeps a sample; a hidden one neither has nor is a negative.

    >>> negative_mask(jnp.array([0, 1, 0]))[0]
    Array([False,  True, False], dtype=bool)
    """
    check_labels(np.size(labels), labels, where)
    return label_masks(jnp.asarray(labels), where)[1]
