"""Negative log-likelihoods under predicted mixtures of distributions, in nats."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_log, draw_normal
from .._core.checks import check_float, check_min_rank, check_same_shape, check_shape
from .._core.compiled import compiled
from .._core.gamma import HALF_LOG_TWO_PI
from .._core.numerics import expm1, standardized, widen
from .._core.reduce import mask, reduce
from .._core.sharding import one_hot
from .._core.softmax import neg_log_softmax
from .._core.typing import Reduction, Values, Where

__all__ = ["gaussian_mixture_nll_loss", "mixture_nll_loss"]


@compiled()
def mixture_nll_loss(
    logits: Float[Array, "*batch k"],
    component_nll: Float[Array, "*batch k"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood under a mixture of any distributions, in nats.

    $$ \ell = -\log \sum_k \pi_k\, e^{-n_k}, \qquad \pi = \mathrm{softmax}(\text{logits}) $$

    for the negative log-likelihood $n_k$ of the target under each component. A component whose
    weight is 0, or whose $n_k$ is infinite, does not count; if none is left the loss is infinite.

    Args:
        logits: Logits of the weights of the components, on the last axis.
        component_nll: Of each component, from any loss with `reduction="none"`; same shape.

    One unit per mixture; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Bishop, Mixture Density Networks, technical report, Aston University 1994. Equals minus
        torch's `MixtureSameFamily.log_prob`.

    >>> mixture_nll_loss(jnp.zeros((1, 2)), jnp.array([[0.0, jnp.inf]]))  # -log(1 / 2)
    Array(0.6931472, dtype=float32)
    """
    check_float(logits=logits, component_nll=component_nll)
    check_min_rank(1, logits=logits)
    check_same_shape(logits=logits, component_nll=component_nll)
    logits, component_nll = mask(where, *widen(logits, component_nll))
    values = _mixture(logits, component_nll)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def gaussian_mixture_nll_loss(
    logits: Float[Array, "*batch k"],
    means: Float[Array, "*batch k"],
    log_scales: Float[Array, "*batch k"],
    target: Shaped[Array, "*batch"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of a number under a predicted mixture of Gaussians, in nats.

    $$ \ell = -\log \sum_k \frac{\pi_k}{\sigma_k \sqrt{2 \pi}}
       \exp\left(-\frac{(y - \mu_k)^2}{2 \sigma_k^2}\right) $$

    This is the head of a mixture density network.

    Args:
        logits: Logits of the weights of the components, on the last axis.
        means: Their means, in the unit of the target; same shape.
        log_scales: Logarithms of their standard deviations; same shape.
        target: One value for each row of `logits`.

    One unit per target; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Bishop, Mixture Density Networks, technical report, Aston University 1994. Equals
        scoringrules' `logs_mixnorm`.

    >>> zero = jnp.zeros((1, 2))
    >>> gaussian_mixture_nll_loss(zero, zero, zero, jnp.array([1.0]))  # (1 + log(2 pi)) / 2
    Array(1.4189385, dtype=float32)
    """
    check_float(logits=logits, means=means, log_scales=log_scales)
    check_min_rank(1, logits=logits)
    check_same_shape(logits=logits, means=means, log_scales=log_scales)
    check_shape(jnp.shape(logits)[:-1], target=target)
    arrays = mask(where, *widen(logits, means, log_scales, target))
    logits, means, log_scales, target = arrays
    z = standardized(means - target[..., None], log_scales)
    values = _mixture(logits, HALF_LOG_TWO_PI + log_scales + 0.5 * z**2)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _mixture(logits: Array, nll: Array) -> Array:
    """-log sum p_k exp(-nll_k) for p = softmax(logits), with every digit also near 0."""
    nll = jnp.where(logits == -jnp.inf, jnp.inf, nll)
    cost = neg_log_softmax(logits)
    likeliest = jnp.argmin(jax.lax.stop_gradient(cost + nll), axis=-1)
    top = one_hot(likeliest, logits.shape[-1])
    of_top = lambda x: jnp.sum(jnp.where(top, x, 0), axis=-1)
    alive = jnp.isfinite(of_top(nll))
    nll = jnp.where(alive[..., None], nll, 0)
    dead = top | ~jnp.isfinite(nll)
    # log of p_k exp(-nll_k) over that of the likeliest; large logits and costs may cancel in it
    score, error = _difference(logits, jnp.where(dead & ~top, 0, nll))
    over_top = lambda x: jnp.where(dead, 0, x - of_top(x)[..., None])
    ratio = over_top(score) + over_top(error)
    odds = jnp.where(dead, 0, jnp.exp(ratio))
    apart = of_top(cost) + of_top(nll) - jnp.log1p(jnp.sum(odds, axis=-1))
    # the same as nll_top - log(1 + sum p_k expm1(nll_top - nll_k))
    p = jnp.exp(-cost)
    gap = jnp.where(dead, 0, of_top(nll)[..., None] - nll)
    close = jnp.abs(gap) < 1
    terms = jnp.where(close, p * expm1(jnp.where(close, gap, 0)), of_top(p)[..., None] * odds - p)
    moved = jnp.sum(jnp.where(top, 0, jnp.where(dead, -p, terms)), axis=-1)
    near = moved > -0.5
    close_up = of_top(nll) - jnp.log1p(jnp.where(near, moved, 0))
    return jnp.where(alive, jnp.where(near, close_up, apart), jnp.inf)


def _difference(a: Array, b: Array) -> tuple[Array, Array]:
    """The difference a - b and what rounding took from it, which has no derivative."""
    difference = a - b
    part = difference - a
    error = (a - (difference - part)) - (b + part)
    return difference, jax.lax.stop_gradient(jnp.where(jnp.isfinite(difference), error, 0))


_MIXTURE = dict(logits=draw_normal("B C V"), component_nll=draw_normal("B C V"))
_GAUSSIANS = dict(
    logits=draw_normal("B C V"),
    means=draw_normal("B C V"),
    log_scales=draw_log("B C V", -1, 1, largest=30),
    target=draw_normal("B C"),
)

CASES = (
    Case(mixture_nll_loss, _MIXTURE),
    Case(gaussian_mixture_nll_loss, _GAUSSIANS),
)
