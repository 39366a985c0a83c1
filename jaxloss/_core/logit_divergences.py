"""Divergences between two rows of logits, accurate near equality and lean in memory.

The rules are `custom_jvp`: a gradient makes the probabilities again, a pass at a time, so that one
or a few copies of the logits are all that a large vocabulary needs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .numerics import horner, safe_mul
from .softmax import RowNorm, normalized, row_norm

Norms = tuple[RowNorm, RowNorm]


@jax.custom_jvp
def kl_of_logits(a: Array, b: Array) -> Array:
    """KL(softmax a || softmax b) of each row; every class contributes at least 0.

    The summand is p (exp(x) - 1 - x) with x = log(q / p); the extra terms add up to 0.
    """
    return _kl_values(a, b, (row_norm(a), row_norm(b)))


def _kl_values(a: Array, b: Array, norms: Norms) -> Array:
    p, q, x, near, bend = _compare(a, b, norms)
    return jnp.sum(jnp.where(near, p * bend, q - p - safe_mul(p, x)), axis=-1)


def _kl_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (a, b), (a_dot, b_dot) = primals, tangents
    norms = row_norm(a), row_norm(b)
    out = _kl_values(a, b, norms)
    out_dot = jnp.zeros_like(out)
    if not isinstance(a_dot, SymbolicZero):
        norms = _later(norms, out)
        p, _, x, *_ = _compare(a, b, norms)
        centre = out - jnp.sum(safe_mul(p, x + out[..., None]), axis=-1)  # -sum p x, once more
        norms = _later(norms, centre)
        p, _, x, *_ = _compare(a, b, norms)
        out_dot -= jnp.sum(safe_mul(p, x + centre[..., None]) * a_dot, axis=-1)
    if not isinstance(b_dot, SymbolicZero):
        p, q, x, near, bend = _compare(a, b, _later(norms, out))
        out_dot += jnp.sum(jnp.where(near, p * (x + bend), q - p) * b_dot, axis=-1)
    return out, out_dot


kl_of_logits.defjvp(_kl_jvp, symbolic_zeros=True)


def _later(norms: Norms, done: Array) -> Norms:
    """The same numbers, but not before `done`: probabilities are made again, not kept."""
    numbers, _ = jax.lax.optimization_barrier(([norm[:2] for norm in norms], done))
    one, two = (n._replace(largest=m[0], above=m[1]) for n, m in zip(norms, numbers, strict=True))
    return one, two


def _compare(a: Array, b: Array, norms: Norms) -> tuple[Array, ...]:
    """Probabilities p and q, x = log(q / p), whether it is small, and exp(x) - 1 - x there.

    Where p is 0, x is 0 and counts as large.
    """
    log_p, log_q = (normalized(z, norm) for z, norm in zip((a, b), norms, strict=True))
    possible = log_p > -jnp.inf
    x = jnp.where(possible | jnp.isnan(log_p), log_q - log_p, 0)
    near = possible & (jnp.abs(x) < 0.25)
    return jnp.exp(log_p), jnp.exp(log_q), x, near, _bend(jnp.where(near, x, 0))


def _bend(x: Array) -> Array:
    """The difference exp(x) - 1 - x for |x| < 1/4, at least 0 and with every digit."""
    terms = 12 if x.dtype == jnp.float64 else 6
    return x * x * horner([1 / math.factorial(k + 2) for k in range(terms)], x)


@jax.custom_jvp
def jsd_of_logits(a: Array, b: Array, beta: Array) -> Array:
    """The mean beta KL(p || m) + (1 - beta) KL(q || m) of softmaxes p, q and their mixture m.

    The summand is beta p f((1 - beta)(q / p - 1)) + (1 - beta) q f(beta (p / q - 1)) with
    f(u) = u - log(1 + u); the extra terms cancel in each class.
    """
    return _jsd_values(a, b, beta, (row_norm(a), row_norm(b)))


def _jsd_values(a: Array, b: Array, beta: Array, norms: Norms) -> Array:
    (p, over_p), (q, over_q), near, lack_p, lack_q = _mixture(a, b, beta, norms)
    p, q = beta * p, (1 - beta) * q
    return jnp.sum(jnp.where(near, p * lack_p + q * lack_q, p * over_p + q * over_q), axis=-1)


def _jsd_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    a, b, beta = primals
    norms = row_norm(a), row_norm(b)
    out = _jsd_values(a, b, beta, norms)
    out_dot, done = jnp.zeros_like(out), out
    for i, dot in enumerate(tangents[:2]):
        if not isinstance(dot, SymbolicZero):
            norms = _later(norms, done)
            part, over = _mixture(a, b, beta, norms)[i]
            done = jnp.sum(part * over, axis=-1)
            norms = _later(norms, done)
            part, over = _mixture(a, b, beta, norms)[i]
            slope = part * (over - done[..., None])
            out_dot += (1 - beta if i else beta) * jnp.sum(slope * dot, axis=-1)
    if not isinstance(tangents[2], SymbolicZero):
        (p, over_p), (q, over_q), *_ = _mixture(a, b, beta, _later(norms, done))
        out_dot += jnp.sum(p * over_p - q * over_q, axis=-1) * tangents[2]
    return out, out_dot


jsd_of_logits.defjvp(_jsd_jvp, symbolic_zeros=True)


def _mixture(
    a: Array, b: Array, beta: Array, norms: Norms
) -> tuple[tuple[Array, Array], tuple[Array, Array], Array, Array, Array]:
    """Pairs p, log(p / m) and q, log(q / m); whether both are alike, and there u - log(1 + u).

    This u is m / p - 1, then m / q - 1. A ratio beyond exp(80) is cut: it multiplies a probability
    below exp(-80).
    """
    log_p, log_q = (normalized(z, norm) for z, norm in zip((a, b), norms, strict=True))
    neither = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    x = jnp.clip(jnp.where(neither, 0, log_q - log_p), -80, 80)
    near = jnp.abs(x) < 0.25
    small, r = jnp.where(near, x, 0), jnp.exp(jnp.where(near, 0, x))
    up = small + _bend(small)  # q / p - 1
    log_up, lack_up = _log1p((1 - beta) * up)
    log_down, lack_down = _log1p(-beta * up / (1 + up))
    over_p = jnp.where(near, -log_up, -jnp.log(beta + (1 - beta) * r))
    over_q = jnp.where(near, -log_down, -jnp.log(beta / r + (1 - beta)))
    return (jnp.exp(log_p), over_p), (jnp.exp(log_q), over_q), near, lack_up, lack_down


def _log1p(u: Array) -> tuple[Array, Array]:
    """The logarithm log(1 + u) and u - log(1 + u), for |u| < 0.3 and with every digit."""
    y = u / (2 + u)  # u = 2 y / (1 - y), log(1 + u) = 2 artanh y
    terms = 10 if u.dtype == jnp.float64 else 4
    cubic = 2 * y * y * y * horner([1 / (2 * k + 3) for k in range(terms)], y * y)
    return 2 * y + cubic, 2 * y * y / (1 - y) - cubic
