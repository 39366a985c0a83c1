"""The sigmoid family's kernels: binary labels and the two costs of a logit."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from .checks import check_float, check_same_shape, require
from .labels import is_integer, poison
from .numerics import safe_mul, widen
from .reduce import mask
from .typing import Where


def prepare_binary(
    logits: Array, labels: Any, where: Where | None = None, *, first: str = "logits"
) -> tuple[Array, Array]:
    """Check, mask and widen binary labels: integers 0 and 1, bools, or shares in [0, 1].

    An integer label that is neither 0 nor 1 turns its logit into NaN, so that value and gradient
    of its unit are NaN.
    """
    check_float(**{first: logits})
    check_same_shape(**{first: logits}, labels=labels)
    labels = jnp.asarray(labels)
    integer = is_integer(labels)
    logits, labels = mask(where, *widen(logits, labels))
    ok = lambda: (labels >= 0) & (labels <= 1)
    require(ok, "labels", "0 or 1" if integer else "values in [0, 1]", where)
    if integer:
        logits = poison(logits, (labels == 0) | (labels == 1))
    return logits, labels


def sigmoid_costs(logits: Array) -> tuple[Array, Array]:
    """`-log p` and `-log(1 - p)` of a logit: what labels 1 and 0 cost, with every digit.

    Both share one exponential; all derivatives are those of the smooth function, also at 0.
    """
    positive = logits > 0
    tail = jnp.log1p(jnp.exp(jnp.where(positive, -logits, logits)))
    return jnp.where(positive, 0, -logits) + tail, jnp.where(positive, logits, 0) + tail


def binary_cross_entropy(logits: Array, labels: Array) -> Array:
    """`-(y log p + (1 - y) log(1 - p))` of each element; an infinite cost of a label 0 is 0."""
    one, zero = sigmoid_costs(logits)
    return safe_mul(labels, one) + safe_mul(1 - labels, zero)
