"""Divergences of the powers of two distributions: alpha, Rényi, Hellinger, chi-squared."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_probs
from .._core.checks import check_float, check_min_rank, check_same_shape, require
from .._core.compiled import compiled
from .._core.numerics import box_cox, expm1, horner, numbers, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.softmax import safe_log_sum_exp
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "alpha_divergence",
    "bhattacharyya_distance",
    "chi_squared_divergence",
    "hellinger_distance",
    "renyi_divergence",
]


@compiled()
def alpha_divergence(
    log_probs: Float[Array, "*batch classes"],
    target: Shaped[Array, "*batch classes"],
    *,
    alpha: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Alpha divergence of a prediction from a target distribution, in nats, from 0 up.

    $$ \ell = \frac{\sum_k p_k^\alpha q_k^{1 - \alpha} - 1}{\alpha (\alpha - 1)} $$

    At $\alpha = 1$ it is $\mathrm{KL}(p \| q)$, at 0 $\mathrm{KL}(q \| p)$, at 1/2 symmetric; large
    $\alpha$ punish a prediction that misses a class, small ones a prediction that invents one. The
    sum is taken of terms of at least 0, $p^\alpha q^{1 - \alpha} - \alpha p - (1 - \alpha) q$ over
    $\alpha (\alpha - 1)$, which add up to the same: no digits are lost near equality nor near
    $\alpha = 0$ or 1. The derivative with respect to a target of 0 is taken as 0.

    Args:
        log_probs: Log-probabilities $\log q$, classes last; they are not normalised again.
        target: Probabilities $p$ of the same shape.
        alpha: Any real number $\alpha$; below 1 the divergence is finite for any prediction if
            also above 0.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Cichocki and Amari, Families of Alpha- Beta- and Gamma- Divergences, Entropy 2010; Li and
        Turner, Rényi Divergence Variational Inference, NIPS 2016.

    >>> log_q = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> alpha_divergence(log_q, jnp.array([[1.0, 0.0]]), alpha=2.0)  # (1 / 0.5 - 1) / 2
    Array(0.5, dtype=float32)
    """
    log_q, p = _prepare(where, log_probs, target)
    (alpha,) = numbers(p, alpha=alpha)
    values = jnp.sum(_alpha_terms(log_q, p, alpha), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def renyi_divergence(
    log_probs: Float[Array, "*batch classes"],
    target: Shaped[Array, "*batch classes"],
    *,
    alpha: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Rényi divergence of a prediction from a target distribution, in nats, from 0 up.

    $$ \ell = \frac{1}{\alpha - 1} \log \sum_k p_k^\alpha q_k^{1 - \alpha} $$

    At $\alpha = 1$ it is $\mathrm{KL}(p \| q)$; it rises with $\alpha$. The derivative with respect
    to a target of 0 is taken as 0.

    Args:
        log_probs: Log-probabilities $\log q$, classes last; they are not normalised again.
        target: Probabilities $p$ of the same shape.
        alpha: Order $\alpha > 0$.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`; inf for distributions without a
        common class.

    Reference:
        Rényi, On Measures of Entropy and Information, Berkeley Symposium 1961; van Erven and
        Harremoës, Rényi Divergence and Kullback-Leibler Divergence, IEEE Transactions on
        Information Theory 2014.

    >>> log_q = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> renyi_divergence(log_q, jnp.array([[1.0, 0.0]]), alpha=2.0)  # log 2
    Array(0.6931472, dtype=float32)
    """
    log_q, p = _prepare(where, log_probs, target)
    (alpha,) = numbers(p, alpha=alpha)
    require(lambda: alpha > 0, "alpha", "a number above 0")
    return reduce(_renyi(log_q, p, alpha), where=where, weights=weights, reduction=reduction)


@compiled()
def hellinger_distance(
    log_probs: Float[Array, "*batch classes"],
    target: Shaped[Array, "*batch classes"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hellinger distance of two distributions, in `[0, 1]`; symmetric.

    $$ \ell = \sqrt{1 - \sum_k \sqrt{p_k q_k}}
       = \sqrt{\tfrac{1}{2} \sum_k (\sqrt{p_k} - \sqrt{q_k})^2} $$

    Its gradient at $p = q$ is taken as 0, and so is the derivative with respect to a target of 0.

    Args:
        log_probs: Log-probabilities $\log q$, classes last; they are not normalised again.
        target: Probabilities $p$ of the same shape.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Hellinger, Neue Begründung der Theorie quadratischer Formen, Crelle's Journal 1909. Some
        leave out the 1/2.

    >>> log_q = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> hellinger_distance(log_q, jnp.array([[1.0, 0.0]]))  # sqrt(1 - 0.5)
    Array(0.70710677, dtype=float32)
    """
    log_q, p = _prepare(where, log_probs, target)
    half = jnp.asarray(0.5, p.dtype)
    values = 0.5 * safe_sqrt(jnp.sum(_alpha_terms(log_q, p, half), axis=-1))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def chi_squared_divergence(
    log_probs: Float[Array, "*batch classes"],
    target: Shaped[Array, "*batch classes"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Pearson's chi-squared divergence of a prediction from a target distribution, from 0 up.

    $$ \ell = \sum_k \frac{p_k^2}{q_k} - 1 = \sum_k \frac{(p_k - q_k)^2}{q_k} $$

    Args:
        log_probs: Log-probabilities $\log q$, classes last; they are not normalised again.
        target: Probabilities $p$ of the same shape.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`; inf where a class of the target
        has no probability.

    Reference:
        Pearson, On the criterion that a given system of deviations can be reasonably supposed to
        have arisen from random sampling, Philosophical Magazine 1900. Twice `alpha_divergence` with
        `alpha=2.0`.

    >>> log_q = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> chi_squared_divergence(log_q, jnp.array([[1.0, 0.0]]))  # 1 / 0.25 - 1
    Array(3., dtype=float32)
    """
    log_q, p = _prepare(where, log_probs, target)
    values = 2 * jnp.sum(_alpha_terms(log_q, p, jnp.asarray(2.0, p.dtype)), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def bhattacharyya_distance(
    log_probs: Float[Array, "*batch classes"],
    target: Shaped[Array, "*batch classes"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Bhattacharyya distance of two distributions, in nats, from 0 up; symmetric.

    $$ \ell = -\log \sum_k \sqrt{p_k q_k} $$

    The derivative with respect to a target of 0 is taken as 0.

    Args:
        log_probs: Log-probabilities $\log q$, classes last; they are not normalised again.
        target: Probabilities $p$ of the same shape.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`; inf for distributions without a
        common class.

    Reference:
        Bhattacharyya, On a measure of divergence between two statistical populations, Bulletin of
        the Calcutta Mathematical Society 1943. Half the `renyi_divergence` with `alpha=0.5`.

    >>> log_q = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> bhattacharyya_distance(log_q, jnp.array([[1.0, 0.0]]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    log_q, p = _prepare(where, log_probs, target)
    values = 0.5 * _renyi(log_q, p, jnp.asarray(0.5, p.dtype))
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _prepare(where: Where | None, log_probs: Array, target: Any) -> tuple[Array, Array]:
    check_float(log_probs=log_probs)
    check_min_rank(1, log_probs=log_probs)
    check_same_shape(log_probs=log_probs, target=target)
    log_probs, target = mask(where, *widen(log_probs, target))
    require(lambda: target >= 0, "target", "values of at least 0", where)
    return log_probs, target


def _renyi(log_q: Array, p: Array, alpha: Array) -> Array:
    """From the alpha divergence where the sum is near 1, else the logarithm of the sum itself."""
    below = jnp.sum(_alpha_terms(log_q, p, alpha), axis=-1) * alpha
    infinite = below == jnp.inf
    below = jnp.where(infinite, 0, below)
    u = (alpha - 1) * below  # the sum of p^a q^(1 - a), minus 1
    near = jnp.abs(u) < 0.5
    close = jnp.where(near, below, 0) * _log1p_over(jnp.where(near, u, 0))
    far = ~near[..., None] & (p > 0) & (log_q > -jnp.inf)
    powers = alpha * jnp.log(jnp.where(far, p, 1)) + (1 - alpha) * jnp.where(far, log_q, 0)
    log_sum = safe_log_sum_exp(jnp.where(far, powers, -jnp.inf))
    values = jnp.where(near, close, log_sum / jnp.where(near, 1, alpha - 1))
    return jnp.where(infinite, jnp.inf, values)


@jax.custom_jvp
def _alpha_terms(log_q: Array, p: Array, alpha: Array) -> Array:
    """`(p^a q^(1 - a) - a p - (1 - a) q) / (a (a - 1))`, each at least 0.

    Its derivatives are short, and neither they nor the value cancel.
    """
    return _plain_terms(log_q, p, alpha)


def _plain_terms(log_q: Array, p: Array, alpha: Array) -> Array:
    """With x and y exchanged where a > 1/2, the terms are `y f(d)` of `d = log x - log y`.

    `f(d) = ((e^d - 1) - (e^(a d) - 1) / a) / (1 - a)`, near 0 a power series.
    """
    positive, possible, log_p, log_q_ = _logarithms(log_q, p)
    present = positive & possible
    q, p_ = jnp.exp(log_q_), jnp.where(present, p, 1)
    swap = alpha > 0.5
    a = jnp.where(swap, 1 - alpha, alpha)
    exchange = lambda one, other: (jnp.where(swap, other, one), jnp.where(swap, one, other))
    (x, y), (log_x, log_y) = exchange(p_, q), exchange(log_p, log_q_)
    d = log_x - log_y
    near = (jnp.abs(d) < 0.5) & (jnp.abs(a * d) < 0.5)
    close = y * _bend(jnp.where(near, d, 0), a)
    far = (x - y - _times_box_cox(log_y, jnp.where(near, 1, d), a)) / (1 - a)
    # Without a prediction, or without a target, one of the three parts is left.
    missed = jnp.where(alpha < 1, p / jnp.where(alpha < 1, 1 - alpha, 1), jnp.inf)
    invented = jnp.where(alpha > 0, jnp.exp(log_q) / jnp.where(alpha > 0, alpha, 1), jnp.inf)
    rest = jnp.where(positive, missed, jnp.where(possible, invented, 0))
    return jnp.where(present, jnp.where(near, close, far), rest)


def _alpha_terms_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    log_q, p, alpha = primals
    in_log_q, in_p, in_alpha = tangents
    terms = _alpha_terms(log_q, p, alpha)
    moved = jnp.zeros_like(terms)
    positive, possible, log_p, log_q_ = _logarithms(log_q, p)
    present = positive & possible
    d = log_p - log_q_
    if not isinstance(in_log_q, SymbolicZero):
        slope = jnp.where(alpha > 0, jnp.exp(log_q) / jnp.where(alpha > 0, alpha, 1), 0)
        slope = jnp.where(present, -_times_box_cox(log_q_, d, alpha), slope)
        moved += jnp.where(possible, slope, 0) * in_log_q
    if not isinstance(in_p, SymbolicZero):
        slope = jnp.where(alpha < 1, 1 / jnp.where(alpha < 1, 1 - alpha, 1), 0)
        slope = jnp.where(present, box_cox(d, alpha - 1), slope)
        moved += jnp.where(positive, slope, 0) * in_p
    if not isinstance(in_alpha, SymbolicZero):
        moved += jax.jvp(lambda a: _plain_terms(log_q, p, a), (alpha,), (in_alpha,))[1]
    return terms, moved


_alpha_terms.defjvp(_alpha_terms_jvp, symbolic_zeros=True)


def _logarithms(log_q: Array, p: Array) -> tuple[Array, Array, Array, Array]:
    """Where target and prediction are above 0, and their logarithms, 0 where one is not."""
    positive, possible = p > 0, log_q > -jnp.inf
    present = positive & possible
    log_p = jnp.log(jnp.where(present, p, 1))
    return positive, possible, log_p, jnp.where(present, log_q, 0)


def _times_box_cox(log_y: Array, d: Array, a: Array) -> Array:
    """`y (e^(a d) - 1) / a`, without overflow where only the power overflows."""
    u = a * d
    flat = jnp.abs(u) < 0.03
    u_ = jnp.where(flat, 1, u)
    falls = u_ < 0
    y = jnp.exp(log_y)
    down = y * expm1(jnp.where(falls, u_, -1))
    up = -jnp.exp(log_y + jnp.where(falls, 1, u_)) * expm1(-jnp.where(falls, 1, u_))
    far = jnp.where(falls, down, up) / jnp.where(flat, 1, a)
    return jnp.where(flat, y * d * horner(_EXPM1_OVER, jnp.where(flat, u, 0)), far)


def _bend(d: Array, a: Array) -> Array:
    """`((e^d - 1) - (e^(a d) - 1) / a) / (1 - a)` for |d| and |a d| below 1/2, at least 0."""
    e, h, power = a * d, jnp.ones_like(d), jnp.ones_like(d)
    total = h / 2
    for k in range(3, 14):  # h: the sum of all products of k - 2 factors d or e
        power = power * e
        h = d * h + power
        total = total + h * (1 / math.factorial(k))
    return d * d * total


def _log1p_over(u: Array) -> Array:
    """`log(1 + u) / u` for |u| up to 1/2."""
    near = jnp.abs(u) < 0.03
    series = horner(_LOG1P_OVER, jnp.where(near, u, 0))
    return jnp.where(near, series, jnp.log1p(u) / jnp.where(near, 1, u))


_EXPM1_OVER = [1 / math.factorial(k + 1) for k in range(9)]
_LOG1P_OVER = [(-1) ** k / (k + 1) for k in range(11)]


def _draw_smooth(dims: str, *, log: bool = False) -> Draw:
    """Distributions of which no class is so rare that numerical derivatives fail."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        probs = 0.8 * g.dirichlet(np.ones(shape[-1]), shape[:-1]) + 0.2 / shape[-1]
        return np.log(probs) if log else probs

    return Draw(dims, sample, "bounded", None if log else draw_probs(dims).ends)


_PAIR = dict(log_probs=_draw_smooth("B C", log=True), target=_draw_smooth("B C"))
_NEGATIVE = {"finite": "log-probabilities in place of the target are no distribution"}

CASES = (
    Case(alpha_divergence, _PAIR, dict(alpha=0.3)),
    Case(alpha_divergence, _PAIR, dict(alpha=-0.5), label="negative", without=_NEGATIVE),
    Case(renyi_divergence, _PAIR, dict(alpha=1.7), without=_NEGATIVE),
    Case(hellinger_distance, _PAIR),
    Case(chi_squared_divergence, _PAIR),
    Case(bhattacharyya_distance, _PAIR, without=_NEGATIVE),
)
