"""The softmax family's kernels: negative log-probabilities and cross-entropy of each row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .labels import is_integer, label_values, poison, valid
from .numerics import numbers, safe_log, safe_mul, soft_capped, widen
from .sharding import lookup, one_hot, pick
from .terms import Axis, add_up

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


@jax.custom_jvp
def log_sum_exp(logits: Array) -> Array:
    """Log-sum-exp over the last axis in float32 or wider, without a wide copy of 16-bit logits."""
    largest, powers = _powers(logits)
    return jnp.log(jnp.sum(powers, axis=-1)) + largest


@log_sum_exp.defjvp
def _log_sum_exp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (logits,), (moved,) = primals, tangents
    out = log_sum_exp(logits)
    largest, powers = _powers(logits)
    if logits.dtype == out.dtype:
        return out, jnp.sum(powers * moved, axis=-1) / jnp.sum(powers, axis=-1)
    finite = jnp.where(jnp.isfinite(out), out, largest)
    p = jnp.exp(widen(logits)[0] - finite[..., None])
    return out, jnp.sum(p * widen(moved)[0], axis=-1)


def _powers(logits: Array) -> tuple[Array, Array]:
    (largest,) = widen(jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    return largest, jnp.exp(widen(logits)[0] - largest[..., None])


def top_and_others(logits: Array) -> tuple[Array, Array, Array]:
    """The likeliest class of each row, its logit, and the log-sum-exp of all the others.

    `others - top` is the logit of any other class: from it 1 - p keeps its digits as p goes to 1.
    """
    top = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1)
    hit = one_hot(top, logits.shape[-1])
    largest = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
    return top, largest, safe_log_sum_exp(jnp.where(hit, -jnp.inf, logits))


class RowNorm(NamedTuple):
    """Largest logit of each row, how far the log-sum-exp lies above it, and whose it is.

    The class is None above `EXACT_CLASSES`, where p = 1 need not be exact.
    """

    largest: Array
    above: Array
    top: Array | None


def row_norm(logits: Array) -> RowNorm:
    """What turns logits into log-probabilities by `normalized`."""
    if logits.shape[-1] > EXACT_CLASSES:
        largest, powers = _powers(logits)
        return RowNorm(largest, jnp.log(jnp.sum(powers, axis=-1)), None)
    top = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1)
    hit = one_hot(top, logits.shape[-1])
    largest = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
    below = jnp.where(hit, 0, logits - largest[..., None])
    above = jnp.log1p(jnp.sum(jnp.where(hit, 0, jnp.exp(below)), axis=-1))
    return RowNorm(largest, above, top)


def normalized(logits: Array, norm: RowNorm, classes: Array | None = None) -> Array:
    """Log-probabilities of all classes, or of the given ones `(*batch, k)`.

    Where XLA computes the logits twice they may differ by an ulp; at the top that would show.
    """
    below = logits - norm.largest[..., None]
    if norm.top is not None:
        if classes is None:
            hit = one_hot(norm.top, logits.shape[-1])
        else:
            hit = classes == norm.top[..., None].astype(classes.dtype)
        below = jnp.where(hit, 0, below)
    return below - norm.above[..., None]


def safe_log_sum_exp(logits: Array) -> Array:
    """Log-sum-exp over the last axis; -inf with zero gradient where all are -inf, or none is."""
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    return safe_log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)) + largest


def log1p_sum_exp(logits: Array, axis: int = -1, axis_name: Axis = None) -> Array:
    """log(1 + sum of exponentials), with every digit; 0 with zero gradient where all are -inf.

    `axis_name` adds up over the devices of a mapped axis too.
    """
    top = jnp.max(jax.lax.stop_gradient(logits), axis=axis, initial=0, keepdims=True)
    top = top if axis_name is None else jax.lax.pmax(top, axis_name)
    top = jnp.where(top == jnp.inf, 0, top)
    total = add_up(jnp.sum(jnp.exp(logits - top), axis=axis), axis_name)
    top = jnp.squeeze(top, axis)
    return top + jnp.log1p(total + jnp.expm1(-top))


def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    label_smoothing: float | Array = 0.0,
    class_weights: Array | None = None,
    z_loss: float | Array = 0.0,
    softcap: float | Array | None = None,
    temperature: float | Array = 1.0,
) -> Array:
    """Cross-entropy of each row in float32 or wider: smooth first, then weight the classes.

    `-sum_k w_k ((1 - s) t_k + s / K) log p_k + z_loss lse^2`, `(*batch, K) -> (*batch,)`, of logits
    `softcap tanh(z / softcap) / temperature`. Logits may still be 16-bit: with integer labels they
    are never copied in float32.
    """
    classes = logits.shape[-1]
    plain, unsquared = _is(label_smoothing, 0), _is(z_loss, 0)
    (like,) = widen(logits[..., :0])
    smoothing, square, temperature_ = numbers(
        like, label_smoothing=label_smoothing, z_loss=z_loss, temperature=temperature
    )
    cap = None if softcap is None else numbers(like, softcap=softcap)[0]
    bends = (cap, None if _is(temperature, 1) else temperature_)
    if not is_integer(labels):
        z = _bent(logits, bends)
        nll = neg_log_softmax(z)
        if class_weights is not None:
            nll = safe_mul(jnp.broadcast_to(class_weights, nll.shape), nll)
        values = label_values(nll, labels)
        spread = safe_mul(jnp.broadcast_to(smoothing, nll.shape), nll)
        values = values if plain else (1 - smoothing) * values + jnp.mean(spread, axis=-1)
        return values if unsquared else values + square * jnp.square(log_sum_exp(z))
    ok = valid(labels, classes)
    bare = plain and unsquared and class_weights is None and bends == (None, None)
    if bare and logits.dtype == like.dtype and classes > EXACT_CLASSES:
        largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        largest = jnp.where(jnp.isfinite(largest), largest, 0)
        total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        return poison(jnp.log(total) + largest - pick(logits, labels), ok)
    scale = poison(jnp.broadcast_to(1 - smoothing, labels.shape), ok)
    spread = smoothing / classes
    if class_weights is not None:
        scale = scale * lookup(class_weights, labels)
        spread = spread * class_weights.reshape((1,) * labels.ndim + (classes,))
    spread, square = None if plain else spread, None if unsquared else square
    return _rows(logits, labels, scale, spread, square, bends)


def _is(value: Any, number: float) -> bool:
    """Whether an option is this plain number, so that what it asks for can be left out."""
    return isinstance(value, (int, float)) and value == number


Bends = tuple[Array | None, Array | None]  # soft cap and temperature, where there are any


def _bent(logits: Array, bends: Bends) -> Array:
    """The logits after soft cap and temperature, in float32 or wider."""
    cap, temperature = bends
    (z,) = widen(logits)
    z = z if cap is None else soft_capped(z, cap)
    return z if temperature is None else z / temperature


@jax.custom_jvp
def _rows(
    logits: Array,
    labels: Array,
    scale: Array,
    spread: Array | None,
    square: Array | None,
    bends: Bends,
) -> Array:
    """`scale nll + sum_k spread_k (lse - z_k) + square lse^2`.

    The gradient keeps only logits and row sums.
    """
    return _row_values(_parts(logits, labels, spread, bends), scale, spread, square)


def _row_values(
    parts: tuple[Array, ...], scale: Array, spread: Array | None, square: Array | None
) -> Array:
    largest, powers, rest, gap, finite = parts
    nll = _nll(rest, gap)
    values = scale * nll
    if spread is not None:
        values += _total(spread, powers) * (nll + gap + largest) - finite
    return values if square is None else values + square * jnp.square(nll + gap + largest)


def _parts(
    logits: Array, labels: Array, spread: Array | None, bends: Bends
) -> tuple[Array, Array, Array, Array, Array]:
    """Maximum, exponentials, their sum without the label's, the label's logit over the maximum.

    Leaving the label out of the sum keeps 1 - p exact when p is almost 1. Last the sum of the
    logits, weighted by `spread`.
    """
    hit = one_hot(labels, logits.shape[-1])
    own = _bent(pick(logits, labels), bends)
    # Where XLA computes the logits twice, `own` may miss their maximum by an ulp; with few classes
    # the maximum is taken over `own` and the others, with many that would cost a copy.
    exact = logits.shape[-1] <= EXACT_CLASSES
    others = jnp.max(jnp.where(hit, -jnp.inf, logits) if exact else logits, axis=-1)
    largest = jax.lax.stop_gradient(jnp.maximum(own, _bent(others, bends)))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    z = _bent(logits, bends)
    finite = jnp.zeros_like(own)
    if spread is not None:
        finite = jnp.sum(spread * _spread_over(spread, z), axis=-1)
        z = _bent(logits, _later(bends, finite))
    powers = jnp.exp(z - largest[..., None])
    return largest, powers, jnp.sum(jnp.where(hit, 0, powers), axis=-1), own - largest, finite


def _later(bends: Bends, done: Array) -> Bends:
    """The same numbers, but not before `done`: the bent logits are made again, not kept."""
    return bends if bends == (None, None) else jax.lax.optimization_barrier((bends, done))[0]


def _nll(rest: Array, gap: Array) -> Array:
    return jnp.log1p(rest + jnp.expm1(gap)) - gap


def _spread_over(spread: Array, z: Array) -> Array:
    """Logits, with 0 for an infinite one over which nothing is spread."""
    return jnp.where((spread == 0) & ~jnp.isfinite(z), 0, z)


def _total(spread: Array, z: Array) -> Array:
    return jnp.sum(spread) * (1 if spread.ndim else z.shape[-1])


def _rows_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    logits, labels, scale, spread, square, bends = primals
    logits_dot, _, scale_dot, spread_dot, square_dot, bends_dot = tangents
    parts = _parts(logits, labels, spread, bends)
    out = _row_values(parts, scale, spread, square)
    largest, powers, rest, gap, _ = parts
    hit = one_hot(labels, logits.shape[-1])
    norm = rest + jnp.exp(gap)
    log_norm = jnp.log(norm)
    lse = largest + log_norm
    out_dot = jnp.zeros_like(out)
    pull = jnp.zeros_like(lse)  # how much the row moves with lse alone
    if spread is not None:
        pull += _total(spread, powers)
    if square is not None:
        pull += 2 * square * lse
    share = (pull * jnp.exp(gap) - scale * rest) / norm
    if _still(logits_dot, bends_dot):
        pass
    elif bends == (None, None) and logits.dtype == out.dtype:
        # The exponentials become the gradient.
        others = jnp.sum(jnp.where(hit, 0, powers) * logits_dot, axis=-1)
        out_dot += (scale + pull) / norm * others + share * pick(logits_dot, labels)
        if spread is not None:
            out_dot -= jnp.sum(spread * logits_dot, axis=-1)
    else:  # recomputed from the logits: cheaper than a float32 copy
        z, z_dot = _bent_jvp(logits, _later(bends, lse), logits_dot, bends_dot)
        slope = jnp.exp((z - largest[..., None]) - log_norm[..., None]) * (scale + pull)[..., None]
        slope = jnp.where(hit, share[..., None], slope)
        slope = slope if spread is None else slope - spread
        out_dot += jnp.sum(slope * z_dot, axis=-1)
    if not _still(scale_dot):
        out_dot += scale_dot * _nll(rest, gap)
    if spread is not None and not _still(spread_dot):
        z = _bent(logits, bends)
        moved = jnp.sum(spread_dot * _spread_over(spread, z), axis=-1)
        out_dot += _total(spread_dot, z) * lse - moved
    if square is not None and not _still(square_dot):
        out_dot += square_dot * jnp.square(lse)
    return out, out_dot


def _bent_jvp(logits: Array, bends: Bends, logits_dot: Any, bends_dot: Any) -> tuple[Array, Array]:
    if bends == (None, None):
        return widen(logits)[0], widen(logits_dot)[0]
    moved = jax.tree.map(_instantiate, (logits_dot, bends_dot), is_leaf=_is_zero)
    return jax.jvp(_bent, (logits, bends), moved)


def _still(*tangents: Any) -> bool:
    return all(map(_is_zero, jax.tree.leaves(tangents, is_leaf=_is_zero)))


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _instantiate(tangent: Any) -> Array:
    return jnp.zeros(tangent.shape, tangent.dtype) if _is_zero(tangent) else tangent


_rows.defjvp(_rows_jvp, symbolic_zeros=True)
