"""Learned vectors of classes: checks, angles to the own class, cross-entropy against the others."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from .checks import check_float, check_shape, message, require
from .labels import poison, valid
from .numerics import safe_sqrt, widen
from .pairwise import check_labels
from .reduce import mask
from .sharding import one_hot, unshard
from .sigmoid import sigmoid_costs
from .softmax import safe_log_sum_exp
from .typing import Where


def prepare_prototypes(
    embeddings: Any, prototypes: Any, labels: Any, where: Where | None = None, *, rank: int = 2
) -> tuple[Array, Array, Array]:
    """Check, mask and widen; prototypes are `(classes, features)`, or with centres between."""
    check_float(embeddings=embeddings, prototypes=prototypes)
    for name, array, axes in (("embeddings", embeddings, 2), ("prototypes", prototypes, rank)):
        if jnp.ndim(array) != axes:
            raise ValueError(message(name, f"{axes} axes", f"shape {jnp.shape(array)}"))
    rows, features = jnp.shape(embeddings)
    classes = jnp.shape(prototypes)[0]
    check_shape((*jnp.shape(prototypes)[:-1], features), prototypes=prototypes)
    check_labels(rows, labels, where)
    labels = jnp.asarray(labels)
    labels = labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)
    embeddings, prototypes = widen(embeddings, prototypes)
    embeddings, labels = mask(where, embeddings, labels)
    require(lambda: valid(labels, classes), "labels", f"values in [0, {classes})", where)
    return embeddings, unshard(prototypes, 0), labels


def own_angle(embeddings: Array, prototypes: Array, labels: Array) -> tuple[Array, Array]:
    """`1 - cos` and `sin` of the angle between unit rows and the unit prototype of their label.

    Near 0 and pi they come from the difference and the sum of both vectors, so that no digit is
    lost; where these vanish the sine has gradient 0. A zero vector is at a right angle to all.
    """
    own = jnp.take(prototypes, unshard(labels), axis=0, mode="clip")
    embeddings = jnp.expand_dims(embeddings, tuple(range(1, own.ndim - 1)))
    cosine = jnp.sum(embeddings * own, axis=-1)
    half_square = lambda x: jnp.sum(jnp.square(x), axis=-1) / 2
    gap = jnp.where(cosine < 0.5, 1 - cosine, half_square(embeddings - own))
    rest = jnp.where(cosine > -0.5, 1 + cosine, half_square(embeddings + own))
    return gap, safe_sqrt(gap * rest)


def with_own(logits: Array, own: Array, labels: Array) -> Array:
    """The logits with that of the label replaced by `own`; a bad label makes its row NaN."""
    classes = logits.shape[-1]
    logits = jnp.where(one_hot(labels, classes), own[:, None], logits)
    return poison(logits, valid(labels, classes)[:, None])


def against_others(logits: Array, own: Array, labels: Array) -> Array:
    """Cross-entropy of `with_own(logits, own, labels)`, with every digit, without a copy of them.

    The gradient in `own` is one number for each row, not a column picked from a matrix.
    """
    classes = logits.shape[-1]
    others = jnp.where(one_hot(labels, classes), -jnp.inf, logits)
    _, values = sigmoid_costs(safe_log_sum_exp(others) - own)
    return poison(values, valid(labels, classes))
