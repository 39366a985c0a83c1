"""The softmax family's kernels: negative log-probabilities and cross-entropy of each row."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .labels import is_integer, label_values, poison, valid
from .numerics import numbers, safe_mul, widen
from .sharding import one_hot, pick

EXACT_CLASSES = 1024  # up to here probabilities near 1 keep every digit; above, speed wins


def neg_log_softmax(logits: Array) -> Array:
    """-log p over the last axis, accurate also where p is almost 1.

    The largest class is left out of the sum of exponentials and enters as log1p, so that neither
    value nor gradient cancels; with more than `EXACT_CLASSES` classes the plain form.
    """
    if logits.shape[-1] > EXACT_CLASSES:
        return -jax.nn.log_softmax(logits, axis=-1)
    top = one_hot(jnp.argmax(jax.lax.stop_gradient(logits), axis=-1), logits.shape[-1])
    largest = jnp.sum(jnp.where(top, logits, 0), axis=-1, keepdims=True)
    shifted = jnp.where(top, 0, logits - largest)
    rest = jnp.sum(jnp.where(top, 0, jnp.exp(shifted)), axis=-1, keepdims=True)
    return jnp.log1p(rest) - shifted


def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    label_smoothing: float | Array = 0.0,
    class_weights: Array | None = None,
) -> Array:
    """Cross-entropy of each row in float32 or wider: smooth first, then weight the classes.

    `-sum_k w_k ((1 - s) t_k + s / K) log p_k`; logits may still be 16-bit. `(*batch, K)` -> `(*batch,)`
    """
    classes = logits.shape[-1]
    plain = isinstance(label_smoothing, (int, float)) and label_smoothing == 0
    (like,) = widen(logits[..., :0])
    (smoothing,) = numbers(like, label_smoothing=label_smoothing)
    if is_integer(labels) and classes > EXACT_CLASSES:
        ok = valid(labels, classes)
        if plain and class_weights is None and logits.dtype == like.dtype:
            values = jax.nn.logsumexp(logits, axis=-1) - pick(logits, labels)
            return poison(values, ok)
        scale = 1 - smoothing
        if class_weights is not None:
            scale = scale * pick(jnp.broadcast_to(class_weights, logits.shape), labels)
        spread = smoothing / classes * (1 if class_weights is None else class_weights)
        scale = poison(jnp.broadcast_to(scale, labels.shape), ok)
        return _many_classes(logits, labels, scale, None if plain else spread)
    (logits,) = widen(logits)
    if is_integer(labels):
        logits = poison(logits, valid(labels, classes)[..., None])
    nll = neg_log_softmax(logits)
    if class_weights is not None:
        nll = safe_mul(jnp.broadcast_to(class_weights, nll.shape), nll)
    values = label_values(nll, labels)
    return values if plain else (1 - smoothing) * values + smoothing * jnp.mean(nll, axis=-1)


@jax.custom_jvp
def _many_classes(logits: Array, labels: Array, scale: Array, spread: Array | None) -> Array:
    """`scale (lse - z_y) + sum_k spread_k (lse - z_k)`; the gradient needs only logits and lse."""
    (z,) = widen(logits)
    lse = jax.nn.logsumexp(z, axis=-1)
    values = scale * (lse - pick(z, labels))
    if spread is not None:
        values += _total(spread, z) * lse - jnp.sum(spread * z, axis=-1)
    return values


def _total(spread: Array, z: Array) -> Array:
    return jnp.sum(jnp.broadcast_to(spread, z.shape[-1:]))


def _many_classes_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    logits, labels, scale, spread = primals
    logits_dot, _, scale_dot, spread_dot = tangents
    out = _many_classes(logits, labels, scale, spread)
    (z,) = widen(logits)
    lse = jax.nn.logsumexp(z, axis=-1)
    out_dot = jnp.zeros_like(out)
    if not isinstance(logits_dot, SymbolicZero):
        mass = scale if spread is None else scale + _total(spread, z)
        slope = jnp.exp(z - lse[..., None]) * mass[..., None]
        slope -= jnp.where(one_hot(labels, z.shape[-1]), scale[..., None], 0)
        slope = slope if spread is None else slope - spread
        out_dot += jnp.sum(slope * logits_dot.astype(z.dtype), axis=-1)
    if not isinstance(scale_dot, SymbolicZero):
        out_dot += scale_dot * (lse - pick(z, labels))
    if spread is not None and not isinstance(spread_dot, SymbolicZero):
        out_dot += _total(spread_dot, z) * lse - jnp.sum(spread_dot * z, axis=-1)
    return out, out_dot


_many_classes.defjvp(_many_classes_jvp, symbolic_zeros=True)
