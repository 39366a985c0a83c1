"""Negative log-likelihoods of positive numbers and of shares between 0 and 1, in nats."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_log, draw_uniform, draw_unit
from .._core.checks import check_float, check_same_shape, require
from .._core.compiled import compiled
from .._core.gamma import HALF_LOG_TWO_PI, bounded_log, stirling_error
from .._core.numerics import expm1, expm1_excess, numbers, widen
from .._core.reduce import mask, reduce
from .._core.sigmoid import sigmoid_costs
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["beta_distribution_nll_loss", "gamma_nll_loss"]


@compiled()
def gamma_nll_loss(
    log_mean: Float[Array, "*shape"],
    log_shape: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood under a gamma distribution of predicted mean and shape, in nats.

    $$ \ell = \log \Gamma(k) - k \log \frac{k}{\mu} - (k - 1) \log y + \frac{k y}{\mu} $$

    The variance is $\mu^2 / k$. A target of 0 costs $\infty$ if $k > 1$, $-\infty$ if $k < 1$ and
    $\log \mu$ if $k = 1$, without a gradient in `log_shape`.

    Args:
        log_mean: Logarithm of the predicted mean $\mu$.
        log_shape: Logarithm of the shape $k$. Beyond +-79 it has no effect and no gradient.
        target: Same shape, above 0.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        McCullagh and Nelder, Generalized Linear Models, 1989. Equals minus scipy's
        `gamma.logpdf(y, shape, scale=mean / shape)` and torch's `Gamma(shape, shape / mean)`.

    >>> zero = jnp.zeros(1)
    >>> gamma_nll_loss(zero, zero, jnp.array([3.0]))  # an exponential of mean 1
    Array(3., dtype=float32)
    """
    check_float(log_mean=log_mean, log_shape=log_shape)
    check_same_shape(log_mean=log_mean, log_shape=log_shape, target=target)
    log_mean, log_shape, target = mask(where, *widen(log_mean, log_shape, target))
    require(lambda: target >= 0, "target", "values of at least 0", where)
    zero = target == 0
    log_k = bounded_log(log_shape)
    k, log_target = jnp.exp(log_k), jnp.log(jnp.where(zero, 1, target))
    # k (y / mean - 1 - log(y / mean)) and lgamma(k) - k log k + k, neither of which cancels
    spread = k * expm1_excess(jnp.where(zero, 0, log_target - log_mean))
    constant = HALF_LOG_TWO_PI - 0.5 * log_k + stirling_error(k, log_k)
    at_zero = jnp.where(log_k == 0, log_mean, jnp.sign(log_k) * jnp.inf)
    values = jnp.where(zero, at_zero, spread + constant + log_target)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def beta_distribution_nll_loss(
    log_a: Float[Array, "*shape"],
    log_b: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    clip: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of a share under a predicted Beta distribution, in nats.

    $$ \ell = \log B(a, b) - (a - 1) \log y - (b - 1) \log(1 - y) $$

    The mean is $a / (a + b)$. A target of 0 costs $\infty$ if $a > 1$, $-\infty$ if $a < 1$ and
    $-\log b$ if $a = 1$; a target of 1 likewise with $b$. Pass `clip` to keep away from there. Not
    the beta-NLL, which is `gaussian_nll_loss(beta=...)`.

    Args:
        log_a: Logarithm of $a$. Beyond +-79 it has no effect and no gradient.
        log_b: Logarithm of $b$, likewise.
        target: Shares of the same shape, in `[0, 1]`.
        clip: Targets are moved into `[clip, 1 - clip]`; 1e-6 is a usual value, 1e-8 is lost beside
            a 1 in float32.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Ferrari and Cribari-Neto, Beta Regression for Modelling Rates and Proportions, Journal of
        Applied Statistics 2004. Equals minus scipy's `beta.logpdf` and torch's `Beta.log_prob`.

    >>> log_two = jnp.log(jnp.full(1, 2.0))
    >>> beta_distribution_nll_loss(log_two, log_two, jnp.array([0.5]))  # -log(6 / 4)
    Array(-0.40546513, dtype=float32)
    """
    check_float(log_a=log_a, log_b=log_b)
    check_same_shape(log_a=log_a, log_b=log_b, target=target)
    log_a, log_b, target = mask(where, *widen(log_a, log_b, target))
    (clip,) = numbers(log_a, clip=clip)
    require(lambda: (target >= 0) & (target <= 1), "target", "values in [0, 1]", where)
    require(lambda: (clip >= 0) & (clip < 0.5), "clip", "a value in [0, 0.5)")
    target = jnp.where(target < clip, clip, jnp.where(target > 1 - clip, 1 - clip, target))
    log_a, log_b = bounded_log(log_a), bounded_log(log_b)
    zero, one = target == 0, target == 1
    y = jnp.where(zero | one, 0.5, target)
    # with m = a / (a + b): (a + b) KL(m || y), the density's log y (1 - y), and lgamma(a) +
    # lgamma(b) - lgamma(a + b) without what Stirling's formula says of them
    values = _divergence(log_a, log_b, y) + jnp.log(y) + jnp.log1p(-y)
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    smaller = jnp.where(log_a > log_b, log_b, log_a)
    ratio = jnp.exp(jnp.where(log_a > log_b, log_b - log_a, log_a - log_b))
    errors = stirling_error(a, log_a) + stirling_error(b, log_b) - stirling_error(a + b)
    values += HALF_LOG_TWO_PI + 0.5 * (jnp.log1p(ratio) - smaller) + errors
    at_end = lambda own, other: jnp.where(own == 0, -other, jnp.sign(own) * jnp.inf)
    values = jnp.where(zero, at_end(log_a, log_b), jnp.where(one, at_end(log_b, log_a), values))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@jax.custom_jvp
def _divergence(log_a: Array, log_b: Array, y: Array) -> Array:
    """A log(m / y) + b log((1 - m) / (1 - y)) for m = a / (a + b): at least 0."""
    return _divergence_jvp((log_a, log_b, y), (log_a, log_b, y))[0]


@_divergence.defjvp
def _divergence_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    (log_a, log_b, y), (a_dot, b_dot, y_dot) = primals, tangents
    less, more = sigmoid_costs(log_a - log_b)  # -log m and -log(1 - m)
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    u, v = jnp.log(y) + less, jnp.log1p(-y) + more
    slope = a * expm1(u) / y - b * expm1(v) / (1 - y)
    moved = slope * y_dot - a * u * a_dot - b * v * b_dot
    return a * expm1_excess(u) + b * expm1_excess(v), moved


_GAMMA = dict(
    log_mean=draw_log("B C", -2, 3, largest=25),
    log_shape=draw_log("B C", -2, 3, largest=40),
    target=draw_uniform("B C", 0.1, 8),
)
_LOGS = dict(log_a=draw_log("B C", -2, 3, largest=40), log_b=draw_log("B C", -2, 3, largest=40))

CASES = (
    Case(gamma_nll_loss, _GAMMA),
    Case(beta_distribution_nll_loss, {**_LOGS, "target": draw_unit("B C")}, dict(clip=0.01)),
)
