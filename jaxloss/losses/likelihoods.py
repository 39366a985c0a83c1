"""Negative log-likelihoods of a number under a predicted distribution, in nats."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_counts, draw_log, draw_normal
from .._core.checks import (
    check_float,
    check_min_rank,
    check_option,
    check_same_shape,
    check_shape,
    require,
)
from .._core.compiled import compiled
from .._core.gamma import HALF_LOG_TWO_PI, count_parts, half_step
from .._core.numerics import (
    absolute,
    expm1_excess,
    log1p_square,
    numbers,
    safe_div,
    safe_mul,
    standardized,
    widen,
)
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "gaussian_nll_loss",
    "gaussian_variance_nll_loss",
    "laplace_nll_loss",
    "multivariate_gaussian_nll_loss",
    "poisson_nll_loss",
    "student_t_nll_loss",
]


@compiled("full")
def poisson_nll_loss(
    log_rate: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    full: bool = False,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of a count under a Poisson distribution, in nats.

    $$ \ell = e^{\eta} - y \eta \quad (+ \log \Gamma(y + 1) \text{ if full}) $$

    for a predicted log rate $\eta$. A rate of 0, $\eta = -\infty$, is legal.

    Args:
        log_rate: Logarithm of the predicted rate; it overflows from 89 on.
        target: Counts of the same shape, at least 0.
        full: Whether to add the part that does not depend on the prediction.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Cameron and Trivedi, Regression Analysis of Count Data, 1998. Equals torch's
        `poisson_nll_loss(log_input=True)`; torch's `full` is Stirling's approximation, here it
        is exact. Keras' `Poisson` takes the rate, not its logarithm.

    >>> poisson_nll_loss(jnp.array([0.0]), jnp.array([3.0]))  # a rate of 1
    Array(1., dtype=float32)
    """
    check_float(log_rate=log_rate)
    check_same_shape(log_rate=log_rate, target=target)
    check_option((False, True), full=full)
    log_rate, target = mask(where, *widen(log_rate, target))
    require(lambda: target >= 0, "target", "counts of at least 0", where)
    kernel = _poisson_deviation if full else lambda rate, y: jnp.exp(rate) - safe_mul(y, rate)
    return reduce(kernel(log_rate, target), where=where, weights=weights, reduction=reduction)


@compiled("full")
def gaussian_nll_loss(
    mean: Float[Array, "*shape"],
    log_var: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    beta: Number = 0.0,
    full: bool = False,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood under a Gaussian of predicted mean and variance, in nats.

    $$ \ell = \tfrac{1}{2} \left( \log \sigma^2 + \frac{(y - \mu)^2}{\sigma^2} \right)
       \quad (+ \tfrac{1}{2} \log 2 \pi \text{ if full}) $$

    Where the variance shrinks faster than the error, the mean stops learning; `beta` counters that
    by multiplying each unit by $\sigma^{2 \beta}$, through which no gradient flows.

    Args:
        mean: Predicted mean, in the unit of the target.
        log_var: Logarithm of the predicted variance.
        target: Same shape and unit as `mean`.
        beta: 0 is the likelihood; at 1 the mean learns as under the squared error.
        full: Whether to add the constant.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Nix and Weigend, Estimating the mean and variance of the target probability distribution,
        ICNN 1994; `beta`: Seitzer et al., On the Pitfalls of Heteroscedastic Uncertainty
        Estimation with Probabilistic Neural Networks, ICLR 2022. Equals torch's
        `gaussian_nll_loss(mean, target, exp(log_var))` while the variance exceeds its `eps`.

    >>> zero = jnp.zeros(1)
    >>> gaussian_nll_loss(jnp.array([3.0]), zero, zero)
    Array(4.5, dtype=float32)
    """
    check_float(mean=mean, log_var=log_var)
    check_same_shape(mean=mean, log_var=log_var, target=target)
    check_option((False, True), full=full)
    mean, log_var, target = mask(where, *widen(mean, log_var, target))
    (strength,) = numbers(mean, beta=beta)
    values = 0.5 * (log_var + standardized(mean - target, 0.5 * log_var) ** 2)
    if full:
        values += HALF_LOG_TWO_PI
    if not (isinstance(beta, (int, float)) and beta == 0):
        values *= jnp.exp(strength * jax.lax.stop_gradient(log_var))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("full")
def gaussian_variance_nll_loss(
    mean: Float[Array, "*shape"],
    variance: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    min_variance: Number = 1e-6,
    beta: Number = 0.0,
    full: bool = False,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood under a Gaussian whose variance itself is predicted, in nats.

    $$ \ell = \tfrac{1}{2} \left( \log v + \frac{(y - \mu)^2}{v} \right)
       \quad (+ \tfrac{1}{2} \log 2 \pi \text{ if full}), \qquad v = \max(\sigma^2, v_0) $$

    Below the floor $v_0$ no gradient reaches the variance. `gaussian_nll_loss` takes its logarithm,
    which needs no floor.

    Args:
        mean: Predicted mean, in the unit of the target.
        variance: Predicted variance.
        target: Same shape and unit as `mean`.
        min_variance: The floor, above 0.
        beta: Power of the variance that multiplies each unit, without a gradient.
        full: Whether to add the constant.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Nix and Weigend, Estimating the mean and variance of the target probability distribution,
        ICNN 1994; `beta`: Seitzer et al., ICLR 2022. The value equals torch's
        `gaussian_nll_loss(mean, target, variance)`, whose gradient passes its clamp unchecked: a
        variance of 1e-9 receives one of some -5e11 there.

    >>> one = jnp.ones(1)
    >>> gaussian_variance_nll_loss(3 * one, 4 * one, one)  # (log 4 + 1) / 2
    Array(1.1931472, dtype=float32)
    """
    check_float(mean=mean, variance=variance)
    check_same_shape(mean=mean, variance=variance, target=target)
    check_option((False, True), full=full)
    mean, variance, target = mask(where, *widen(mean, variance, target))
    floor, strength = numbers(mean, min_variance=min_variance, beta=beta)
    require(lambda: floor > 0, "min_variance", "a positive value")
    variance = jnp.where(variance < floor, floor, variance)
    error = mean - target
    values = 0.5 * (jnp.log(variance) + safe_div(error, variance) * error)
    if full:
        values += HALF_LOG_TWO_PI
    if not (isinstance(beta, (int, float)) and beta == 0):
        values *= jax.lax.stop_gradient(variance) ** strength
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def multivariate_gaussian_nll_loss(
    mean: Float[Array, "*batch d"],
    scale_tril: Float[Array, "*batch d d"],
    target: Shaped[Array, "*batch d"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood under a Gaussian of predicted covariance $L L^\top$, in nats.

    $$ \ell = \tfrac{1}{2} \lVert L^{-1} (y - \mu) \rVert^2 + \sum_i \log L_{ii}
       + \tfrac{d}{2} \log 2 \pi $$

    Args:
        mean: Predicted means `(*batch, d)`, in the unit of the target.
        scale_tril: Lower triangular factor $L$ of the covariance, with a positive diagonal; what
            stands above the diagonal is ignored.
        target: Same shape and unit as `mean`.

    One unit per vector; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Dorta et al., Structured Uncertainty Prediction Networks, CVPR 2018. Equals minus torch's
        `MultivariateNormal(mean, scale_tril=scale_tril).log_prob(target)`.

    >>> scale = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> loss = multivariate_gaussian_nll_loss(jnp.zeros(2), scale, jnp.array([1.0, 5.0]))
    >>> print(f"{loss - jnp.log(2) - jnp.log(2 * jnp.pi):.4f}")  # (1^2 + (5 - 1)^2 / 2^2) / 2
    2.5000
    """
    check_float(mean=mean, scale_tril=scale_tril)
    check_min_rank(1, mean=mean)
    check_same_shape(mean=mean, target=target)
    check_shape((*jnp.shape(mean), jnp.shape(mean)[-1]), scale_tril=scale_tril)
    mean, scale_tril, target = mask(where, *widen(mean, scale_tril, target))
    size = mean.shape[-1]
    scales = jnp.stack([scale_tril[..., i, i] for i in range(size)], axis=-1)
    if where is not None:
        (hidden,) = mask(where, jnp.zeros_like(scales), fill=1)
        scales += hidden
    require(lambda: scales > 0, "scale_tril", "a positive diagonal", where)
    z = _forward_substitution(scale_tril, scales, target - mean)
    values = 0.5 * jnp.sum(z**2, -1) + jnp.sum(jnp.log(scales), -1) + size * HALF_LOG_TWO_PI
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def laplace_nll_loss(
    loc: Float[Array, "*shape"],
    log_scale: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood under a Laplace distribution of predicted scale, in nats.

    $$ \ell = \log 2 b + \frac{|y - \mu|}{b} $$

    The gradient with respect to `loc` at equality is 0.

    Args:
        loc: Predicted median, in the unit of the target.
        log_scale: Logarithm of the predicted scale $b$, the mean absolute error.
        target: Same shape and unit as `loc`.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Laplace, Mémoire sur la probabilité des causes, 1774. Equals
        `-scipy.stats.laplace.logpdf`.

    >>> zero = jnp.zeros(1)
    >>> laplace_nll_loss(jnp.array([3.0]), zero, zero)  # log 2 + 3
    Array(3.6931472, dtype=float32)
    """
    check_float(loc=loc, log_scale=log_scale)
    check_same_shape(loc=loc, log_scale=log_scale, target=target)
    loc, log_scale, target = mask(where, *widen(loc, log_scale, target))
    values = math.log(2) + log_scale + absolute(standardized(loc - target, log_scale))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def student_t_nll_loss(
    loc: Float[Array, "*shape"],
    log_scale: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    df: Number = 3.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood under Student's t distribution of predicted scale, in nats.

    $$ \ell = \log s + \log B(\tfrac{1}{2}, \tfrac{\nu}{2}) + \tfrac{1}{2} \log \nu
       + \tfrac{\nu + 1}{2} \log\left(1 + \frac{z^2}{\nu}\right), \qquad z = \frac{y - \mu}{s} $$

    Args:
        loc: Predicted location, in the unit of the target.
        log_scale: Logarithm of the predicted scale $s$.
        target: Same shape and unit as `loc`.
        df: Degrees of freedom $\nu > 0$: 1 is Cauchy, 1e6 nearly Gaussian. It may be learned.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Lange, Little and Taylor, Robust Statistical Modeling Using the t Distribution, JASA 1989.
        Equals `-scipy.stats.t.logpdf`.

    >>> zero = jnp.zeros(1)
    >>> student_t_nll_loss(jnp.array([1.0]), zero, zero, df=1.0)  # log(2 pi)
    Array(1.837877, dtype=float32)
    """
    check_float(loc=loc, log_scale=log_scale)
    check_same_shape(loc=loc, log_scale=log_scale, target=target)
    loc, log_scale, target = mask(where, *widen(loc, log_scale, target))
    (df,) = numbers(loc, df=df)
    require(lambda: df > 0, "df", "a positive value")
    z = standardized(loc - target, log_scale)
    tail = 0.5 * (df + 1) * log1p_square(z / jnp.sqrt(df))
    return reduce(
        log_scale + _log_normalizer(df) + tail, where=where, weights=weights, reduction=reduction
    )


def _forward_substitution(lower: Array, scales: Array, error: Array) -> Array:
    """Solves L z = error, column by column; the solver of XLA has no rule for Explicit meshes."""

    def step(rest: Array, column: tuple[Array, ...]) -> tuple[Array, Array]:
        below, scale, i = column
        z = jax.lax.dynamic_index_in_dim(rest, i, -1, keepdims=False) / scale
        return rest - below * z[..., None], z

    size = scales.shape[-1]
    below = jnp.tri(size, k=-1, dtype=lower.dtype).reshape((1,) * (lower.ndim - 2) + (size, size))
    below += jnp.zeros_like(lower)  # no tril: a mask is not sharded as the factors are
    lower = jnp.where(below > 0, lower, 0)
    columns = jnp.moveaxis(lower, -1, 0), jnp.moveaxis(scales, -1, 0), jnp.arange(size)
    return jnp.moveaxis(jax.lax.scan(step, error, columns)[1], 0, -1)


def _log_normalizer(df: Array) -> Array:
    """Log B(1/2, df/2) + log(df) / 2, which tends to log(2 pi) / 2 for large df."""
    return HALF_LOG_TWO_PI + half_step(0.5 * df)


def _poisson_deviation(log_rate: Array, y: Array) -> Array:
    """e^log_rate - y log_rate + lgamma(y + 1), without the cancellation of its large terms."""
    # Loader, Fast and accurate computation of binomial probabilities, 2000: with
    # d = log_rate - log y this is y (e^d - 1 - d) + log(2 pi y) / 2 + Stirling's error.
    small = y < 1
    count, log_count, excess, factorial = count_parts(y)
    d = jnp.where(small, 0, log_rate) - log_count
    close = jnp.abs(d) < 1
    apart = jnp.exp(log_rate) - count - count * jnp.where(close, 0, d)
    large = jnp.where(close, count * expm1_excess(jnp.where(close, d, 0)), apart) + excess
    return jnp.where(small, jnp.exp(log_rate) - safe_mul(y, log_rate) + factorial, large)


_COUNTS = dict(log_rate=draw_log("B C", 0, 3, largest=80), target=draw_counts("B C"))
_GAUSSIAN = dict(
    mean=draw_normal("B C"),
    log_var=draw_log("B C", -3, 3, largest=60),
    target=draw_normal("B C"),
)
_SCALED = dict(
    loc=draw_normal("B C"),
    log_scale=draw_log("B C", -3, 3, largest=60),
    target=draw_normal("B C"),
)

_VARIANCE = dict(
    mean=draw_normal("B C"),
    variance=Draw(
        "B C",
        lambda g, shape, _: g.uniform(0.2, 3, shape),
        "bounded",
        lambda x: (0 * x, 0 * x + 1e10),
    ),
    target=draw_normal("B C"),
)


def _draw_factor(dims: str) -> Draw:
    """Factors of covariances, with a number above the diagonal that does not count."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        return np.eye(shape[-1]) * g.uniform(1, 2, shape) + g.uniform(-0.3, 0.3, shape)

    return Draw(dims, sample, "bounded")


_VECTOR = dict(mean=draw_normal("B C V"), scale_tril=_draw_factor("B C V V"))
_VECTOR |= dict(target=draw_normal("B C V"))

CASES = (
    Case(gaussian_variance_nll_loss, _VARIANCE, dict(min_variance=0.01)),
    Case(
        gaussian_variance_nll_loss,
        _VARIANCE,
        dict(beta=0.5, full=True),
        "beta",
        without={"numerical": "no gradient flows through the weight variance^beta"},
    ),
    Case(multivariate_gaussian_nll_loss, _VECTOR),
    Case(poisson_nll_loss, _COUNTS),
    Case(poisson_nll_loss, _COUNTS, dict(full=True), "full"),
    Case(gaussian_nll_loss, _GAUSSIAN),
    Case(gaussian_nll_loss, _GAUSSIAN, dict(full=True), "full"),
    Case(
        gaussian_nll_loss,
        _GAUSSIAN,
        dict(beta=0.5),
        "beta",
        without={"numerical": "no gradient flows through the weight var^beta"},
    ),
    Case(laplace_nll_loss, _SCALED),
    Case(student_t_nll_loss, _SCALED, dict(df=2.5)),
)
