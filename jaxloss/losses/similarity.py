"""Cosine similarity and the losses made of it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal, draw_signs
from .._core.checks import (
    check_axis,
    check_float,
    check_min_rank,
    check_same_shape,
    check_shape,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison
from .._core.numerics import cosine, numbers, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["cosine_distance", "cosine_embedding_loss", "cosine_similarity"]


@compiled("axis")
def cosine_similarity(
    a: Float[Array, "*batch features"],
    b: Shaped[Array, "*batch features"],
    *,
    axis: int = -1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cosine of the angle between two vectors, in `[-1, 1]`; a score: higher is better.

    $$ s = \frac{a \cdot b}{|a| \, |b|} $$

    A zero vector has similarity 0 to everything and gradient 0.

    Args:
        a: Vectors `(*batch, features)`.
        b: Same shape as `a`.
        axis: The axis of the features.

    One unit per pair of vectors; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Salton and McGill, Introduction to Modern Information Retrieval, 1983. Equals torch's
        `cosine_similarity`; optax's is NaN at a zero vector unless its `epsilon` is set. Keras'
        loss of this name is the negative.

    >>> cosine_similarity(jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0]))
    Array(0.6, dtype=float32)
    """
    similarity, _ = cosine(*_vectors(a, b, axis, where))
    return reduce(similarity, where=where, weights=weights, reduction=reduction)


@compiled("axis")
def cosine_distance(
    a: Float[Array, "*batch features"],
    b: Shaped[Array, "*batch features"],
    *,
    axis: int = -1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus the cosine of the angle between two vectors, in `[0, 2]`.

    $$ \ell = 1 - \frac{a \cdot b}{|a| \, |b|} $$

    Nearly parallel vectors keep full accuracy. A zero vector has distance 1 and gradient 0.

    Args:
        a: Vectors `(*batch, features)`.
        b: Same shape as `a`.
        axis: The axis of the features.

    One unit per pair of vectors; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Salton and McGill, Introduction to Modern Information Retrieval, 1983. Equals SciPy's
        `distance.cosine`, and `optax.losses.cosine_distance` away from zero vectors.

    >>> cosine_distance(jnp.array([3.0, 4.0]), jnp.array([4.0, -3.0]))  # a right angle
    Array(1., dtype=float32)
    """
    _, distance = cosine(*_vectors(a, b, axis, where))
    return reduce(distance, where=where, weights=weights, reduction=reduction)


@compiled()
def cosine_embedding_loss(
    a: Float[Array, "*batch features"],
    b: Shaped[Array, "*batch features"],
    labels: Shaped[Array, "*batch"],
    *,
    margin: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Pulls vectors labelled +1 together and pushes those labelled -1 apart, in `[0, 2]`.

    $$ \ell = \begin{cases} 1 - \cos(a, b) & l = 1 \\
       \max(0, \cos(a, b) - \text{margin}) & l = -1 \end{cases} $$

    Any other label makes its unit NaN. A zero vector has cosine 0 and gradient 0.

    Args:
        a: Vectors `(*batch, features)`.
        b: Same shape as `a`.
        labels: +1 for a pair that belongs together, -1 for one that does not.
        margin: Cosine up to which unlike vectors cost nothing, in `[-1, 1]`.

    One unit per pair of vectors; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Bromley et al., Signature Verification using a Siamese Time Delay Neural Network, NIPS
        1993. Equals torch's `cosine_embedding_loss`, where unknown labels cost 0.

    >>> a, b = jnp.array([[3.0, 4.0]] * 2), jnp.array([[4.0, -3.0]] * 2)  # right angles
    >>> cosine_embedding_loss(a, b, jnp.array([1, -1]), margin=-0.5, reduction="none")
    Array([1. , 0.5], dtype=float32)
    """
    a, b = _vectors(a, b, -1, where)
    check_shape(a.shape[:-1], labels=labels)
    (margin,) = numbers(a, margin=margin)
    (labels,) = mask(where, jnp.asarray(labels), fill=1)
    same, other = labels == 1, labels == -1
    require(lambda: same | other, "labels", "values -1 or 1", where)
    similarity, distance = cosine(poison(a, (same | other)[..., None]), b)
    values = jnp.where(same, distance, jax.nn.relu(similarity - margin))
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _vectors(a: Array, b: Array, axis: int, where: Where | None) -> tuple[Array, Array]:
    """Checked and masked, with the features last."""
    check_float(a=a)
    check_min_rank(1, a=a)
    check_same_shape(a=a, b=b)
    a, b = widen(a, b)
    axis = check_axis(axis, a.ndim)
    a, b = mask(where, jnp.moveaxis(a, axis, -1), jnp.moveaxis(b, axis, -1))
    return a, b


_VECTORS = dict(a=draw_normal("B D"), b=draw_normal("B D"))
_COLUMNS = dict(a=draw_normal("D B"), b=draw_normal("D B"))
_LABELLED = dict(**_VECTORS, labels=draw_signs("B"))

CASES = (
    Case(cosine_similarity, _VECTORS),
    Case(cosine_similarity, _COLUMNS, dict(axis=0), "axis", "B"),
    Case(cosine_distance, _VECTORS, minimum=True),
    Case(cosine_distance, _COLUMNS, dict(axis=0), "axis", "B", minimum=True),
    Case(cosine_embedding_loss, _LABELLED),
    Case(cosine_embedding_loss, _LABELLED, dict(margin=0.3), "margin"),
)
