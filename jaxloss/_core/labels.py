"""Class labels, integer or dense: checks, masks, and what a bad label does."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from .checks import (
    check_array,
    check_axis,
    check_float,
    check_min_rank,
    check_shape,
    check_where,
    message,
    require,
)
from .numerics import safe_mul, widen
from .reduce import mask
from .sharding import pick
from .typing import Where


def is_integer(labels: Array) -> bool:
    """Integer labels name a class; floating or bool ones are dense targets."""
    return jnp.issubdtype(labels.dtype, jnp.integer)


def prepare(
    logits: Array,
    labels: Any,
    *,
    axis: int = -1,
    where: Where | None = None,
    ignore_index: int | Array | None = None,
    first: str = "logits",
    second: str = "labels",
    wide: bool = True,
) -> tuple[Array, Array, Array | None]:
    """Check, move classes last, fold `ignore_index` into `where`, mask and widen.

    Integer labels come back as int32 (or wider), with 0 where they are masked; `where` comes back
    with the ignored units hidden. A kept label outside the classes turns its logits into NaN, so
    that value and gradient of its unit are NaN. With `wide=False` the logits keep their dtype and
    are not poisoned; the caller does both.
    """
    check_float(**{first: logits})
    check_min_rank(1, **{first: logits})
    check_array(**{second: labels})
    labels = jnp.asarray(labels)
    axis = check_axis(axis, logits.ndim)
    logits = jnp.moveaxis(logits, axis, -1)
    if is_integer(labels):
        check_shape(logits.shape[:-1], **{second: labels})
        if labels.dtype.itemsize < 4:
            labels = labels.astype(jnp.int32)
        if ignore_index is not None:
            kept = labels != jnp.asarray(ignore_index).astype(labels.dtype)
            if where is not None:
                check_where(where)
                check_shape(labels.shape, where=where)
                kept &= where
            where = kept
        (labels,) = mask(where, labels)
        classes = logits.shape[-1]
        require(lambda: valid(labels, classes), second, f"values in [0, {classes})", where)
        (logits,) = mask(where, logits)
        if wide:
            (logits,) = widen(logits)
            logits = poison(logits, valid(labels, classes)[..., None])
        return logits, labels, where
    if ignore_index is not None:
        raise ValueError(message("ignore_index", "integer labels", f"dtype {labels.dtype}"))
    labels = jnp.moveaxis(labels, axis, -1) if labels.ndim == logits.ndim else labels
    check_shape(logits.shape, **{second: labels})
    logits, labels = mask(where, logits, *widen(labels))
    if wide:
        logits, labels = widen(logits, labels)
    require(lambda: jnp.abs(jnp.sum(labels, axis=-1) - 1) < 1e-3, second, "sums of 1", where)
    require(lambda: labels >= 0, second, "values of at least 0", where)
    return logits, labels, where


def valid(labels: Array, classes: int) -> Array:
    """Whether integer labels name one of the classes."""
    return (labels >= 0) & (labels < classes)


def poison(values: Array, ok: Array) -> Array:
    """`values` with NaN, in value and gradient, where `ok` is False."""
    # By inf and by 0: XLA's CPU compiler (0.8 to 0.12) takes what follows a NaN constant for
    # undefined, and an exponential of it returned memory that nothing had written.
    one = jnp.ones((), values.dtype)
    return values * jnp.where(ok, one, jnp.inf) * jnp.where(ok, one, 0)


def label_values(values: Array, labels: Array) -> Array:
    """`values` of the labelled class, or their mean under dense labels; bad labels give NaN.

    An infinite value of a class with target 0 does not count. `(*batch, classes) -> (*batch,)`
    """
    if is_integer(labels):
        return poison(pick(values, labels), valid(labels, values.shape[-1]))
    return jnp.sum(safe_mul(labels, values), axis=-1)


def class_vectors(logits: Array, **vectors: Any) -> tuple[Array, ...]:
    """Vectors with one entry for each class, in the dtype of the widened logits."""
    check_shape(logits.shape[-1:], **vectors)
    (wide,) = widen(logits)
    return tuple(jnp.asarray(v).astype(wide.dtype) for v in vectors.values())
