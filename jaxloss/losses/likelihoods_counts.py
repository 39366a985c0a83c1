"""Negative log-likelihoods of counts and of amounts with zeros, in nats."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_counts, draw_log, draw_normal, draw_uniform
from .._core.checks import check_float, check_same_shape, require
from .._core.compiled import compiled
from .._core.gamma import bounded_log, count_parts, stirling_error
from .._core.numerics import expm1, expm1_excess, numbers, safe_div, safe_mul, widen
from .._core.reduce import mask, reduce
from .._core.sigmoid import sigmoid_costs
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["negative_binomial_nll_loss", "tweedie_loss", "zero_inflated_nll_loss"]


@compiled()
def negative_binomial_nll_loss(
    log_mean: Float[Array, "*shape"],
    log_dispersion: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of a count whose variance exceeds its mean, in nats.

    $$ \ell = -\log \frac{\Gamma(y + r)}{\Gamma(r)\, y!}
       - r \log \frac{r}{r + \mu} - y \log \frac{\mu}{r + \mu} $$

    The mean is $\mu$, the variance $\mu + \mu^2 / r$: the larger $r$, the nearer to
    `poisson_nll_loss(full=True)`. Large counts and large $r$ keep their digits.

    Args:
        log_mean: Logarithm of the predicted mean; $-\infty$, a mean of 0, is legal.
        log_dispersion: Logarithm of $r$. Beyond +-79 it has no effect and no gradient.
        target: Counts of the same shape, at least 0.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Hilbe, Negative Binomial Regression, 2011; the form without cancellation: Loader, Fast and
        Accurate Computation of Binomial Probabilities, 2000. Equals minus scipy's
        `nbinom.logpmf(y, r, r / (r + mean))` and torch's `NegativeBinomial(r,
        logits=log_mean - log_dispersion)`.

    >>> zero = jnp.zeros(1)
    >>> negative_binomial_nll_loss(zero, zero, jnp.array([2.0]))  # 3 log 2
    Array(2.0794415, dtype=float32)
    """
    check_float(log_mean=log_mean, log_dispersion=log_dispersion)
    check_same_shape(log_mean=log_mean, log_dispersion=log_dispersion, target=target)
    log_mean, log_dispersion, target = mask(where, *widen(log_mean, log_dispersion, target))
    require(lambda: target >= 0, "target", "counts of at least 0", where)
    values = _negative_binomial(log_mean, bounded_log(log_dispersion), target)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def tweedie_loss(
    log_mean: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    power: Number = 1.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cost of an amount that is often exactly 0, such as rain or claims, from 0 up.

    $$ \ell = \frac{y\, \mu^{1 - p}}{p - 1} + \frac{\mu^{2 - p}}{2 - p} $$

    This is minus what the Tweedie log-likelihood of unit dispersion owes to the mean; the variance
    is $\mu^p$. Smallest at $\mu = y$, where it is not 0.

    Args:
        log_mean: Logarithm of the predicted mean.
        target: Amounts of the same shape, at least 0.
        power: $p$ between 1 (Poisson) and 2 (gamma), both excluded.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Jørgensen, Exponential Dispersion Models, JRSS B 1987. Half of scikit-learn's
        `mean_tweedie_deviance`, but for the part without the mean. LightGBM's and XGBoost's
        `tweedie` objectives are the same.

    >>> tweedie_loss(jnp.zeros(1), jnp.array([3.0]))  # a mean of 1: 3 / 0.5 + 1 / 0.5
    Array(8., dtype=float32)
    """
    check_float(log_mean=log_mean)
    check_same_shape(log_mean=log_mean, target=target)
    log_mean, target = mask(where, *widen(log_mean, target))
    (power,) = numbers(log_mean, power=power)
    require(lambda: (power > 1) & (power < 2), "power", "a value between 1 and 2")
    require(lambda: target >= 0, "target", "values of at least 0", where)
    nothing = (target == 0) & (log_mean == -jnp.inf)
    inverse = target * jnp.exp((1 - power) * jnp.where(nothing, 0, log_mean)) / (power - 1)
    values = inverse + jnp.exp((2 - power) * log_mean) / (2 - power)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def zero_inflated_nll_loss(
    nll: Float[Array, "*shape"],
    zero_nll: Float[Array, "*shape"],
    gate_logits: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of a count that is 0 more often than its distribution says, in nats.

    $$ \ell = \begin{cases} -\log\left(\pi + (1 - \pi)\, e^{-n_0}\right) & y = 0 \\
       n - \log(1 - \pi) & y > 0 \end{cases}, \qquad \pi = \sigma(g) $$

    with the negative log-likelihoods $n$ of the target and $n_0$ of a zero under the distribution
    itself, such as a Poisson one, and $\pi$ the probability of an extra zero.

    Args:
        nll: Negative log-likelihood of the target, from any loss with `reduction="none"`; where the
            target is 0 it may be anything.
        zero_nll: The same of a target of 0; used only where the target is 0.
        gate_logits: Logit of an extra zero.
        target: What was counted; only whether it is 0 matters.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Lambert, Zero-Inflated Poisson Regression, Technometrics 1992. Its gate is 0 for a
        distribution without extra zeros: pass `-jnp.inf`.

    >>> nll, zero_nll = jnp.array([9.0, 2.0]), jnp.array([jnp.inf, 9.0])
    >>> zero_inflated_nll_loss(nll, zero_nll, jnp.zeros(2), jnp.array([0, 4]), reduction="none")
    Array([0.6931472, 2.6931472], dtype=float32)
    """
    check_float(nll=nll, zero_nll=zero_nll, gate_logits=gate_logits)
    check_same_shape(nll=nll, zero_nll=zero_nll, gate_logits=gate_logits, target=target)
    nll, zero_nll, gate, target = mask(where, *widen(nll, zero_nll, gate_logits, target))
    zero = target == 0
    no_extra = sigmoid_costs(gate)[1]
    of_zero = _zero_or_extra(jnp.where(zero, zero_nll, 0), gate)
    values = jnp.where(zero, of_zero, no_extra + jnp.where(zero, 0, nll))
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _zero_or_extra(zero_nll: Array, gate: Array) -> Array:
    """-log(p + (1 - p) exp(-zero_nll)) for p = sigmoid(gate), accurate also where it is near 0."""
    extra, none = sigmoid_costs(gate)
    share = jax.lax.stop_gradient(jnp.exp(-none) * jnp.expm1(-zero_nll))
    near = (share > -0.5) & (share < 1)
    share = jnp.exp(-none) * expm1(jnp.where(near, -zero_nll, 0))
    more, less = sigmoid_costs(jnp.where(near, 0, -zero_nll - gate))  # log-odds of the two zeros
    apart = jnp.where(-zero_nll > gate, none + zero_nll - more, extra - less)
    return jnp.where(near, -jnp.log1p(jnp.where(near, share, 0)), apart)


def _negative_binomial(log_mean: Array, log_r: Array, y: Array) -> Array:
    """Minus the log-probability in parts of one sign; counts below 1 in a form smooth at 0."""
    small = y < 1
    r = jnp.exp(log_r)
    _, log_count, excess, factorial = count_parts(y)
    errors = stirling_error(r, log_r) - stirling_error(r + y)
    spread = 0.5 * sigmoid_costs(log_count - log_r)[1]
    large = _deviation(jnp.where(small, 1, y), log_mean, log_r) + (excess + spread + errors)
    # below 1: -log of Gamma(r + y) / (Gamma(r) r^y), of y! and of the two powers
    y = jnp.where(small, y, 0)
    log_ratio = jnp.log1p(y * jnp.exp(-log_r))
    few = _log1p_times(log_mean, log_r) - safe_mul(y, log_mean) + factorial
    few += y * sigmoid_costs(log_mean - log_r)[1] + y - (r + y - 0.5) * log_ratio + errors
    return jnp.where(small, few, large)


@jax.custom_jvp
def _deviation(count: Array, log_mean: Array, log_r: Array) -> Array:
    """Y log(y / mean) - (y + r) log((y + r) / (mean + r)), at least 0, for y >= 1."""
    return _deviation_jvp((count, log_mean, log_r), (count, log_mean, log_r))[0]


@_deviation.defjvp
def _deviation_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    (count, log_mean, log_r), (count_dot, mean_dot, r_dot) = primals, tangents
    u, v = _log_shares(count, log_mean, log_r)
    of_r = jnp.exp(log_r) * expm1_excess(-v)
    slope = u * count_dot + count * expm1(-u) * mean_dot + of_r * r_dot
    return count * expm1_excess(-u) + of_r, slope


def _log_shares(count: Array, log_mean: Array, log_r: Array) -> tuple[Array, Array]:
    """Log of y (r + mean) / ((r + y) mean), and of (r + mean) / (r + y); 0 where mean = y."""
    log_count = jnp.log(count)
    x, d = log_count - log_r, log_count - log_mean
    less, more = sigmoid_costs(x)  # minus the logs of y / (y + r) and r / (y + r)
    positive = log_r > log_mean
    tail = jnp.log1p(jnp.exp(jnp.where(positive, log_mean - log_r, log_r - log_mean)))
    u = jnp.where(positive, d - more, -less) + tail
    v = jnp.where(positive, -more, -d - less) + tail
    return _near(jnp.exp(-more) * jnp.expm1(d), u), _near(jnp.exp(-less) * jnp.expm1(-d), v)


def _near(moved: Array, log_ratio: Array) -> Array:
    """The logarithm of 1 + moved: from `moved` where that is small."""
    near = (moved > -0.5) & (moved < 1)
    return jnp.where(near, jnp.log1p(jnp.where(near, moved, 0)), log_ratio)


@jax.custom_jvp
def _log1p_times(log_mean: Array, log_r: Array) -> Array:
    """R log(1 + mean / r), which tends to the mean."""
    return _log1p_times_jvp((log_mean, log_r), (log_mean, log_r))[0]


@_log1p_times.defjvp
def _log1p_times_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (log_mean, log_r), (mean_dot, r_dot) = primals, tangents
    log_ratio = sigmoid_costs(log_mean - log_r)[1]
    r, mean = jnp.exp(log_r), jnp.exp(log_mean)
    few = log_mean < log_r
    ratio = jnp.exp(jnp.where(few, log_mean - log_r, 0))
    value = jnp.where(few, mean * safe_div(jnp.log1p(ratio), ratio), r * log_ratio)
    value = jnp.where(ratio == 0, mean, value)
    share = jnp.exp(log_mean - log_ratio)  # r mean / (r + mean)
    return value, share * mean_dot + r * expm1_excess(-log_ratio) * r_dot


_NEGATIVE_BINOMIAL = dict(
    log_mean=draw_log("B C", 0, 3, largest=60),
    log_dispersion=draw_log("B C", -1, 3, largest=60),
    target=draw_counts("B C"),
)
_AMOUNTS = dict(
    log_mean=draw_log("B C", -2, 3, largest=60),
    target=Draw(
        "B C", lambda g, shape, _: g.uniform(0, 9, shape) * g.integers(0, 2, shape), "bounded"
    ),
)
_ZEROS = dict(
    nll=draw_uniform("B C", 0.1, 5),
    zero_nll=draw_normal("B C"),
    gate_logits=draw_normal("B C"),
    target=Draw("B C", lambda g, shape, _: g.integers(0, 3, shape).astype(np.int32), "fixed"),
)

CASES = (
    Case(negative_binomial_nll_loss, _NEGATIVE_BINOMIAL),
    Case(tweedie_loss, _AMOUNTS, dict(power=1.4)),
    Case(zero_inflated_nll_loss, _ZEROS),
)
