"""Triplet losses of a labelled batch: the hardest, the semi-hard, or all triplets."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .._core.case import Case, draw_halves, draw_normal
from .._core.checks import check_array, check_float, check_shape, message
from .._core.compiled import compiled
from .._core.labels import poison
from .._core.mining import hardest, semi_hard, violations
from .._core.numerics import absolute, numbers, safe_div, safe_norm, widen
from .._core.pairwise import (
    check_labels,
    gather_rows,
    own_index,
    pairwise_distance,
    power_of_two,
    similarities,
)
from .._core.reduce import mask, reduce
from .._core.runs import in_chunks
from .._core.sharding import is_sharded, unshard
from .._core.terms import Axis, add_up
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["batch_all_triplet_loss", "batch_hard_triplet_loss", "batch_semi_hard_triplet_loss"]

Distance = Callable[[Array, Array], Array]
BLOCK = 2**22  # triplets at once of a soft sum over all of them


@compiled("soft", "chunk_size", "axis_name", functions=("distance",))
def batch_hard_triplet_loss(
    embeddings: Float[Array, "batch features"],
    labels: Integer[Array, " batch"],
    *,
    margin: Number = 0.2,
    soft: bool = False,
    distance: Distance | None = None,
    chunk_size: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Triplet loss of each sample with its farthest positive and its nearest negative, from 0.

    $$ \ell_a = \max\left(0, \max_{y_p = y_a} d(a, p) - \min_{y_n \ne y_a} d(a, n) + m\right) $$

    Nothing is normalised. Partners are chosen by distances made of dot products, without a
    gradient; the two distances that count are then exact, with gradient 0 at coincident points.
    Memory: one array `batch x batch`, or `chunk_size x batch`, and none of them for the gradient.

    Args:
        embeddings: Vectors `(batch, features)`.
        labels: One label for each vector: equal ones belong together.
        margin: By how much $m$ the negative should be farther, in the unit of the distance.
        soft: Softplus in place of the hinge; with `margin=0` this is the paper's soft margin.
        distance: Used in place of the Euclidean distance: a function of two arrays `(n, features)`
            and `(m, features)` that returns `(n, m)`, such as `pairwise_distance` with another `p`;
            each entry must depend on its two vectors alone. A call that passes one is not compiled.
        chunk_size: Samples whose partners are sought at once; all if None.
        axis_name: Mapped axes over which the batch is split; partners come from all of it.

    One unit per sample that has a positive and a negative; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification,
        arXiv 2017. With `reduction=nonzero_mean` and unit vectors it equals
        pytorch-metric-learning's `TripletMarginLoss` after `BatchHardMiner`. TensorFlow Addons
        ignores the margin if `soft`.

    >>> embeddings = jnp.array([[0.0], [1.0], [1.5]])
    >>> batch_hard_triplet_loss(embeddings, jnp.array([0, 0, 1]), reduction="none")
    Array([0. , 0.7, 0. ], dtype=float32)
    """
    anchors, keys, finite = _sides(embeddings, labels, where, axis_name)
    (margin,) = numbers(anchors.rows, margin=margin)
    near, far = _hardest(anchors, keys, distance, chunk_size)
    units = (near >= 0) & (far >= 0)
    # What is no unit is set apart, for the sake of distances without a gradient at 0.
    (own,) = mask(units, anchors.rows, fill=1)
    to = lambda index, fill: mask(units, _take(keys.rows, index, own), fill=fill)[0]
    measure = _euclidean if distance is None else _each(distance)
    gap = measure(own, to(near, 2)) - measure(own, to(far, 3))
    values = poison(_cost(gap + margin, soft), finite)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled("soft", "chunk_size", "axis_name", functions=("distance",))
def batch_semi_hard_triplet_loss(
    embeddings: Float[Array, "batch features"],
    labels: Integer[Array, " batch"],
    *,
    margin: Number = 0.2,
    soft: bool = False,
    distance: Distance | None = None,
    chunk_size: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Triplet loss of each positive pair with its nearest negative that is farther, from 0.

    $$ \ell_{ap} = \max\left(0, d(a, p) - d(a, n) + m\right), \quad
       n = \arg\min_{d(a, n) > d(a, p)} d(a, n) $$

    over the negatives of $a$; if none is farther than $p$, the farthest of them. Nothing is
    normalised. The choice has no gradient. Memory: a few arrays `batch x batch`, or with a
    `chunk_size` a few `chunk_size x batch` beside the units.

    Args:
        embeddings: Vectors `(batch, features)`.
        labels: One label for each vector: equal ones belong together.
        margin: By how much $m$ the negative should be farther, in the unit of the distance.
        soft: Softplus in place of the hinge.
        distance: Used in place of `pairwise_distance`: a function of two arrays `(n, features)` and
            `(m, features)` that returns `(n, m)`, with finite gradient where two vectors are equal.
            A call that passes one is not compiled.
        chunk_size: Samples taken at once, and again for the gradient; all if None.
        axis_name: Mapped axes over which the batch is split; partners come from all of it.
        where: Bool array `(batch,)`; a hidden sample has no pairs and is no negative.
        weights: One for each pair, `(batch, batch)`.

    One unit per ordered pair of positives with a negative; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, batch)` if `reduction` is `"none"`, the second axis over all
        devices.

    Reference:
        Schroff, Kalenichenko and Philbin, FaceNet, CVPR 2015. Equals TensorFlow Addons'
        `triplet_semihard_loss` on unit vectors.

    >>> embeddings, labels = jnp.array([[-2.0], [-1.0], [1.0], [2.0]]), jnp.array([0, 0, 1, 2])
    >>> batch_semi_hard_triplet_loss(embeddings, labels, margin=3.0)  # 1 - 3 + 3 and 1 - 2 + 3
    Array(1.5, dtype=float32)
    """
    anchors, keys, finite = _sides(embeddings, labels, where, axis_name)
    (margin,) = numbers(anchors.rows, margin=margin)
    matrix, anchors, keys = _matrix(distance, anchors, keys)

    def units(*side: Array) -> tuple[Array, Array]:
        anchors = _Side(*side)
        positives, negatives = _pairs(anchors, keys)
        distances = matrix(anchors.rows, keys.rows)  # (c, m)
        index = semi_hard(jax.lax.stop_gradient(distances), positives, negatives)
        far = jnp.take_along_axis(distances, jnp.maximum(index, 0), axis=1, mode="clip")
        return _cost(distances - far + margin, soft), index >= 0

    values, kept = in_chunks(units, chunk_size, *anchors)
    return reduce(poison(values, finite), where=kept, weights=weights, reduction=reduction)


@compiled("soft", "chunk_size", "axis_name", functions=("distance",))
def batch_all_triplet_loss(
    embeddings: Float[Array, "batch features"],
    labels: Integer[Array, " batch"],
    *,
    margin: Number = 0.2,
    soft: bool = False,
    distance: Distance | None = None,
    chunk_size: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Mean over all triplets of a batch that violate the margin, from 0; 0 if none does.

    $$ \ell = \frac{1}{|T|} \sum_{(a, p, n) \in T} d(a, p) - d(a, n) + m, \quad
       T = \{d(a, n) < d(a, p) + m\} $$

    for $y_p = y_a \ne y_n$. Nothing is normalised. Sorting the distances tells in how many triplets
    of $T$ each pair is, which gives the exact sum from a few arrays `batch x batch`, or
    `chunk_size x batch`. A softplus is a sum over all triplets, made in chunks of samples and once
    more for the gradient; all of them count.

    Args:
        embeddings: Vectors `(batch, features)`.
        labels: One label for each vector: equal ones belong together.
        margin: By how much $m$ the negative should be farther, in the unit of the distance.
        soft: Softplus of $d(a, p) - d(a, n) + m$, averaged over all triplets.
        distance: Used in place of `pairwise_distance`: a function of two arrays `(n, features)` and
            `(m, features)` that returns `(n, m)`, with finite gradient where two vectors are equal.
            A call that passes one is not compiled.
        chunk_size: Samples taken at once, and again for the gradient. None takes all, with `soft`
            as many as have about four million triplets.
        axis_name: Mapped axes over which the batch is split; the triplets are those of all of it.
        where: Bool array `(batch,)`; a hidden sample is in no triplet.
        weights: A scalar.

    The unit is one, the batch; see `jaxloss.reduce`.

    Returns:
        A float32 scalar.

    Reference:
        Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification,
        arXiv 2017. Equals pytorch-metric-learning's `TripletMarginLoss` on unit vectors.

    >>> embeddings, labels = jnp.array([[0.0], [1.0], [1.5]]), jnp.array([0, 0, 1])
    >>> batch_all_triplet_loss(embeddings, labels, margin=1.0)  # (1 - 1.5 + 1 + 1 - 0.5 + 1) / 2
    Array(1., dtype=float32)
    """
    anchors, keys, finite = _sides(embeddings, labels, where, axis_name)
    (margin,) = numbers(anchors.rows, margin=margin)
    matrix, anchors, keys = _matrix(distance, anchors, keys)
    add = _soft_sum if soft else _hinge_sum

    def sums(*side: Array) -> tuple[Array, Array]:
        anchors = _Side(*side)
        distances = matrix(anchors.rows, keys.rows)  # (c, m)
        return add(distances, margin, *_pairs(anchors, keys))

    if soft and chunk_size is None:
        chunk_size = max(1, BLOCK // max(1, len(keys.rows)) ** 2)
    found = in_chunks(sums, chunk_size, *anchors)
    total, count = (add_up(poison(x, finite), axis_name) for x in found)
    value = safe_div(total, jax.lax.stop_gradient(count))
    return reduce(value, weights=weights, reduction=reduction)


class _Side(NamedTuple):
    """Anchors or keys: vectors, labels, place in the whole batch, and which are kept."""

    rows: Array
    labels: Array
    place: Array
    shown: Array


def _sides(
    embeddings: Array, labels: Any, where: Where | None, axis_name: Axis
) -> tuple[_Side, _Side, Array]:
    """The samples of this device, those of all, and whether all these are finite."""
    check_float(embeddings=embeddings)
    if jnp.ndim(embeddings) != 2:
        raise ValueError(message("embeddings", "two axes", f"shape {jnp.shape(embeddings)}"))
    count = len(embeddings)
    check_labels(count, labels, where)
    (rows,) = mask(where, *widen(embeddings))
    shown = jnp.ones(count, bool) if where is None else jnp.asarray(where)
    anchors = _Side(rows, jnp.asarray(labels), own_index(count, axis_name), shown)
    whole = gather_rows(axis_name, anchors.rows, anchors.labels, anchors.place, anchors.shown)
    keys = _Side(*(unshard(x, 0) for x in whole if x is not None))
    return anchors, keys, jnp.all(jnp.isfinite(keys.rows))


def _pairs(anchors: _Side, keys: _Side) -> tuple[Array, Array]:
    """Which key is a positive and which a negative of each anchor."""
    both = anchors.shown[:, None] & keys.shown[None]
    same = anchors.labels[:, None] == keys.labels[None]
    return both & same & (anchors.place[:, None] != keys.place[None]), both & ~same


def _hardest(
    anchors: _Side, keys: _Side, distance: Distance | None, chunk_size: int | None
) -> tuple[Array, Array]:
    """Index of the farthest positive and of the nearest negative, `(n,)`; -1 for none."""
    anchors, keys = jax.lax.stop_gradient((anchors, keys))
    if distance is None:
        anchors, keys, _ = _normal(anchors, keys)
        sizes = jnp.sum(jnp.square(keys.rows), axis=1)[None]
        score = lambda x: sizes - 2 * similarities(x, keys.rows)  # in the order of the distances
    else:
        score = lambda x: _checked(distance, x, keys.rows)
    find = lambda *side: hardest(score(side[0]), *_pairs(_Side(*side), keys))
    return in_chunks(find, chunk_size, *anchors)


def _matrix(
    distance: Distance | None, anchors: _Side, keys: _Side
) -> tuple[Distance, _Side, _Side]:
    """A function that gives all distances, and the samples it takes."""
    if distance is not None:
        return partial(_checked, distance), anchors, keys
    anchors, keys, scale = _normal(anchors, keys)
    return lambda x, y: scale * pairwise_distance(x, y), anchors, keys


def _normal(anchors: _Side, keys: _Side) -> tuple[_Side, _Side, Array]:
    """Samples around their mean and over a power of two, so that no square leaves the floats."""
    fixed = jax.lax.stop_gradient(keys.rows)
    centre = safe_div(jnp.sum(fixed, axis=0), jnp.sum(keys.shown, dtype=fixed.dtype))
    moved = lambda side: jnp.where(side.shown[:, None], side.rows - centre[None], 0)
    scale = power_of_two(moved(keys))
    over = lambda side: side._replace(rows=moved(side) / scale)
    return over(anchors), over(keys), scale


def _checked(distance: Distance, x: Array, y: Array) -> Array:
    found = distance(x, y)
    check_array(distance=found)
    check_shape((len(x), len(y)), distance=found)
    return widen(found)[0]


def _each(distance: Distance) -> Distance:
    """The same distance of rows in pairs, `(n,)`."""
    one = lambda x, y: _checked(distance, x[None], y[None])[0, 0]
    return jax.vmap(one)


def _euclidean(x: Array, y: Array) -> Array:
    return safe_norm(x - y)


def _take(rows: Array, index: Array, like: Array) -> Array:
    """`rows[index]`, with rows and index not sharded; the first row for an index of -1."""
    if not len(rows):
        return like
    found = jnp.take(rows, jnp.maximum(index, 0), axis=0, mode="clip")
    if is_sharded(like, 0):
        return jax.sharding.reshard(found, jax.typeof(like).sharding)
    return found


def _cost(gap: Array, soft: bool) -> Array:
    return jax.nn.softplus(gap) if soft else jax.nn.relu(gap)


def _hinge_sum(
    distances: Array, margin: Array, positives: Array, negatives: Array
) -> tuple[Array, Array]:
    """Sum of hinges over triplets, and how many are above 0."""
    fixed = jax.lax.stop_gradient((distances, margin))
    times = violations(*fixed, positives, negatives).astype(distances.dtype)  # (c, m)
    # Positives and negatives of an anchor are counted equally often: any centre may be taken off.
    weight = jnp.sum(times, axis=1, keepdims=True)
    centre = safe_div(jnp.sum(times * fixed[0], axis=1, keepdims=True), weight)
    signed = jnp.where(positives, times, -times)
    count = jnp.sum(jnp.where(positives, times, 0))
    total = jnp.sum(signed * jnp.where(times == 0, 0, distances - centre))
    return total + margin * count, count


def _soft_sum(
    distances: Array, margin: Array, positives: Array, negatives: Array
) -> tuple[Array, Array]:
    """Sum of softplus over triplets, and how many there are."""
    gap = distances[:, :, None] - distances[:, None, :] + margin  # (c, m, m)
    triplets = positives[:, :, None] & negatives[:, None, :]
    total = jnp.sum(jnp.where(triplets, jax.nn.softplus(gap), 0))
    number = lambda x: jnp.sum(x, axis=1, dtype=distances.dtype)
    return total, jnp.sum(number(positives) * number(negatives))


def _manhattan(x: Array, y: Array) -> Array:
    return jnp.sum(absolute(x[:, None] - y[None]), axis=-1)


_BATCH = dict(embeddings=draw_normal("B D"), labels=draw_halves("B"))
_COUPLED = {
    "microbatches": "partners come from the whole batch",
    "weight_two": "a sample of weight 0 still is a partner of others",
}
_PAIRS = {**_COUPLED, "reducing": "most pairs are no units, which no array of units can show"}
_ONE = {"microbatches": "the mean is that of all triplets, across the parts"}

CASES = (
    Case(
        batch_hard_triplet_loss,
        _BATCH,
        dict(margin=2.5),
        coupled=True,
        without=_COUPLED,
    ),
    Case(
        batch_hard_triplet_loss,
        _BATCH,
        dict(margin=0.5, soft=True, distance=_manhattan),
        label="soft",
        coupled=True,
        without=_COUPLED,
    ),
    Case(
        batch_semi_hard_triplet_loss,
        _BATCH,
        dict(margin=0.5),
        positions="B",
        coupled=True,
        without=_PAIRS,
    ),
    Case(
        batch_all_triplet_loss,
        _BATCH,
        dict(margin=0.5),
        positions="B",
        coupled=True,
        without=_ONE,
    ),
    Case(
        batch_all_triplet_loss,
        _BATCH,
        dict(margin=0.5, soft=True),
        label="soft",
        positions="B",
        coupled=True,
        without=_ONE,
    ),
)
