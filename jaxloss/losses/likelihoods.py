"""Negative log-likelihoods of a number under a predicted distribution, in nats."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_counts, draw_normal
from .._core.checks import check_float, check_option, check_same_shape, require
from .._core.compiled import compiled
from .._core.numerics import absolute, horner, log1p_square, numbers, safe_mul, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "gaussian_nll_loss",
    "laplace_nll_loss",
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
    values = 0.5 * (log_var + _standardized(mean - target, 0.5 * log_var) ** 2)
    if full:
        values += 0.5 * math.log(2 * math.pi)
    if not (isinstance(beta, (int, float)) and beta == 0):
        values *= jnp.exp(strength * jax.lax.stop_gradient(log_var))
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
    values = math.log(2) + log_scale + absolute(_standardized(loc - target, log_scale))
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
    z = _standardized(loc - target, log_scale)
    tail = 0.5 * (df + 1) * log1p_square(z / jnp.sqrt(df))
    return reduce(
        log_scale + _log_normalizer(df) + tail, where=where, weights=weights, reduction=reduction
    )


def _standardized(error: Array, log_scale: Array) -> Array:
    """Error / exp(log_scale); an error of 0 stays 0 however small the scale."""
    largest = 0.99 * math.log(jnp.finfo(error.dtype).max)  # its exponential is finite
    return error * jnp.exp(jnp.minimum(-log_scale, largest))


def _log_normalizer(df: Array) -> Array:
    """Log B(1/2, df/2) + log(df) / 2, which tends to log(2 pi) / 2 for large df."""
    # A difference of two lgamma cancels. Each step from v to v + 1 adds a small positive term;
    # after 16 of them the asymptotic series of lgamma(v) - lgamma(v + 1/2) is exact.
    v = 0.5 * df
    steps = v + jnp.arange(16, dtype=df.dtype)
    total = 0.5 * jnp.sum(jnp.log1p(0.25 / (steps * (steps + 1))))
    inverse = 1 / (v + 16)
    series = horner((1 / 8, -1 / 192, 1 / 640, -17 / 14336, 31 / 18432), inverse**2)
    return 0.5 * math.log(2 * math.pi) + (total + inverse * series)


def _poisson_deviation(log_rate: Array, y: Array) -> Array:
    """e^log_rate - y log_rate + lgamma(y + 1), without the cancellation of its large terms."""
    # Loader, Fast and accurate computation of binomial probabilities, 2000: with
    # d = log_rate - log y this is y (e^d - 1 - d) + log(2 pi y) / 2 + Stirling's error.
    small = y < 1
    count = jnp.where(small, y + 1, y)
    log_count = jnp.log(count)
    constant = 0.5 * (math.log(2 * math.pi) + log_count) + _stirling_error(count)
    d = jnp.where(small, 0, log_rate) - log_count
    close = jnp.abs(d) < 1
    middle = jnp.where(close, d, 0)
    apart = jnp.exp(log_rate) - count - count * jnp.where(close, 0, d)
    large = jnp.where(close, count * (jnp.expm1(middle) - middle), apart) + constant
    factorial = constant + count * (log_count - 1) - jnp.log1p(jnp.where(small, y, 0))
    factorial -= jax.lax.stop_gradient(jnp.where(y == 0, factorial, 0))  # exactly 0 there
    return jnp.where(small, jnp.exp(log_rate) - safe_mul(y, log_rate) + factorial, large)


def _stirling_error(y: Array) -> Array:
    """lgamma(y + 1) - (y + 1/2) log y + y - log(2 pi) / 2, for y >= 1."""
    steps = [y + k for k in range(7)]
    total = sum((z + 0.5) * jnp.log1p(1 / z) - 1 for z in steps)
    inverse = 1 / (y + 7)
    terms = (
        1 / 12,
        -1 / 360,
        1 / 1260,
        -1 / 1680,
        1 / 1188,
        -691 / 360360,
        1 / 156,
        -3617 / 122400,
    )
    return total + inverse * horner(terms, inverse**2)


def _draw_log(low: float, high: float, *, largest: float) -> Draw:
    """A logarithm between `low` and `high`, and as far as float32 carries its exponential."""
    ends = lambda x: (jnp.full_like(x, -largest), jnp.full_like(x, largest))
    return Draw("B C", lambda g, shape, _: g.uniform(low, high, shape), "bounded", ends)


_COUNTS = dict(log_rate=_draw_log(0, 3, largest=80), target=draw_counts("B C"))
_GAUSSIAN = dict(
    mean=draw_normal("B C"),
    log_var=_draw_log(-3, 3, largest=60),
    target=draw_normal("B C"),
)
_SCALED = dict(
    loc=draw_normal("B C"),
    log_scale=_draw_log(-3, 3, largest=60),
    target=draw_normal("B C"),
)

CASES = (
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
