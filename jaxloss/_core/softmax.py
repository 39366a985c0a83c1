"""The softmax family's kernels: negative log-probabilities and cross-entropy of each row."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .labels import is_integer, label_values, poison, valid
from .numerics import numbers, safe_mul, widen
from .sharding import lookup, one_hot, pick

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

    `-sum_k w_k ((1 - s) t_k + s / K) log p_k`, `(*batch, K) -> (*batch,)`. Logits may still be
    16-bit: with integer labels they are never copied in float32.
    """
    classes = logits.shape[-1]
    plain = isinstance(label_smoothing, (int, float)) and label_smoothing == 0
    (like,) = widen(logits[..., :0])
    (smoothing,) = numbers(like, label_smoothing=label_smoothing)
    if not is_integer(labels):
        nll = neg_log_softmax(*widen(logits))
        if class_weights is not None:
            nll = safe_mul(jnp.broadcast_to(class_weights, nll.shape), nll)
        values = label_values(nll, labels)
        spread = safe_mul(jnp.broadcast_to(smoothing, nll.shape), nll)
        return values if plain else (1 - smoothing) * values + jnp.mean(spread, axis=-1)
    ok = valid(labels, classes)
    if plain and class_weights is None and logits.dtype == like.dtype and classes > EXACT_CLASSES:
        largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        largest = jnp.where(jnp.isfinite(largest), largest, 0)
        total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        return poison(jnp.log(total) + largest - pick(logits, labels), ok)
    scale = poison(jnp.broadcast_to(1 - smoothing, labels.shape), ok)
    spread = smoothing / classes
    if class_weights is not None:
        scale = scale * lookup(class_weights, labels)
        spread = spread * class_weights.reshape((1,) * labels.ndim + (classes,))
    return _rows(logits, labels, scale, None if plain else spread)


@jax.custom_jvp
def _rows(logits: Array, labels: Array, scale: Array, spread: Array | None) -> Array:
    """`scale nll + sum_k spread_k (lse - z_k)`; the gradient keeps only logits and row sums."""
    largest, _, rest, gap = _parts(logits, labels)
    nll = _nll(rest, gap)
    if spread is None:
        return scale * nll
    (z,) = widen(logits)
    finite = jnp.sum(spread * _spread_over(spread, z), axis=-1)
    return scale * nll + _total(spread, z) * (nll + gap + largest) - finite


def _parts(logits: Array, labels: Array) -> tuple[Array, Array, Array, Array]:
    """Maximum, exponentials, their sum without the label's, and the label's logit over the maximum.

    Leaving the label out of the sum keeps 1 - p exact when p is almost 1.
    """
    hit = one_hot(labels, logits.shape[-1])
    (own,) = widen(pick(logits, labels))
    # Where XLA computes the logits twice, `own` may miss their maximum by an ulp; with few classes
    # the maximum is taken over `own` and the others, with many that would cost a copy.
    exact = logits.shape[-1] <= EXACT_CLASSES
    (others,) = widen(jnp.max(jnp.where(hit, -jnp.inf, logits) if exact else logits, axis=-1))
    largest = jax.lax.stop_gradient(jnp.maximum(own, others))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    powers = jnp.exp(widen(logits)[0] - largest[..., None])
    return largest, powers, jnp.sum(jnp.where(hit, 0, powers), axis=-1), own - largest


def _nll(rest: Array, gap: Array) -> Array:
    return jnp.log1p(rest + jnp.expm1(gap)) - gap


def _spread_over(spread: Array, z: Array) -> Array:
    """Logits, with 0 for an infinite one over which nothing is spread."""
    return jnp.where((spread == 0) & ~jnp.isfinite(z), 0, z)


def _total(spread: Array, z: Array) -> Array:
    return jnp.sum(spread) * (1 if spread.ndim else z.shape[-1])


def _rows_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    logits, labels, scale, spread = primals
    logits_dot, _, scale_dot, spread_dot = tangents
    out = _rows(logits, labels, scale, spread)
    largest, powers, rest, gap = _parts(logits, labels)
    hit = one_hot(labels, logits.shape[-1])
    norm = rest + jnp.exp(gap)
    nll = _nll(rest, gap)
    log_norm = jnp.log(norm)
    (z,) = widen(logits)
    out_dot = jnp.zeros_like(out)
    if isinstance(logits_dot, SymbolicZero):
        pass
    elif spread is None and logits.dtype == z.dtype:  # the exponentials become the gradient
        others = jnp.sum(jnp.where(hit, 0, powers) * logits_dot, axis=-1)
        out_dot += scale / norm * (others - rest * pick(logits_dot, labels))
    else:  # recomputed from the logits: cheaper than a float32 copy
        share = -scale * rest / norm
        mass = scale
        if spread is not None:
            mass = scale + _total(spread, z)
            share += (mass - scale) * jnp.exp(gap) / norm
        slope = jnp.exp((z - largest[..., None]) - log_norm[..., None]) * mass[..., None]
        slope = jnp.where(hit, share[..., None], slope)
        slope = slope if spread is None else slope - spread
        out_dot += jnp.sum(slope * widen(logits_dot)[0], axis=-1)
    if not isinstance(scale_dot, SymbolicZero):
        out_dot += scale_dot * nll
    if spread is not None and not isinstance(spread_dot, SymbolicZero):
        moved = jnp.sum(spread_dot * _spread_over(spread, z), axis=-1)
        out_dot += _total(spread_dot, z) * (largest + log_norm) - moved
    return out, out_dot


_rows.defjvp(_rows_jvp, symbolic_zeros=True)
