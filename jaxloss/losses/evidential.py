"""Evidential losses: a network predicts a distribution over distributions, and so what it knows."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_labels, draw_normal, draw_probs, draw_uniform
from .._core.checks import check_float, check_option, check_same_shape, require
from .._core.compiled import compiled
from .._core.gamma import dirichlet_kl, half_step
from .._core.labels import is_integer, prepare
from .._core.numerics import absolute, log1p_square, numbers, safe_mul, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.sharding import one_hot
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["evidential_classification_loss", "evidential_regression_loss"]


@compiled("stop_error_gradient")
def evidential_regression_loss(
    gamma: Float[Array, "*shape"],
    nu: Float[Array, "*shape"],
    alpha: Float[Array, "*shape"],
    beta: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    regularization: Number = 1.0,
    stop_error_gradient: bool = False,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Likelihood of a number under a predicted normal-inverse-gamma prior, and a penalty, in nats.

    $$ \ell = \tfrac{1}{2} \log \frac{\pi}{\nu} - \alpha \log \Omega
       + (\alpha + \tfrac{1}{2}) \log(\nu (y - \gamma)^2 + \Omega)
       + \log \frac{\Gamma(\alpha)}{\Gamma(\alpha + \frac{1}{2})}
       + \lambda\, |y - \gamma| (2 \nu + \alpha), \qquad \Omega = 2 \beta (1 + \nu) $$

    The first part is minus the log-density of Student's t with $2 \alpha$ degrees of freedom, the
    last one takes evidence away where the error is large. The expected variance of the target is
    $\beta / (\alpha - 1)$, the variance of its mean $\beta / (\nu (\alpha - 1))$.

    Args:
        gamma: Predicted mean, in the unit of the target.
        nu: How many observations the mean is worth, above 0.
        alpha: Shape of the prior of the variance, above 0; above 1 its mean exists.
        beta: Its scale, above 0, in the squared unit of the target.
        target: Same shape and unit as `gamma`.
        regularization: Weight $\lambda$ of the penalty.
        stop_error_gradient: Whether the penalty teaches the evidence only, not the mean.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Amini et al., Deep Evidential Regression, NeurIPS 2020.

    >>> one = jnp.ones(1)
    >>> evidential_regression_loss(one, one, one, one, one)  # log 4
    Array(1.3862944, dtype=float32)
    """
    check_float(gamma=gamma, nu=nu, alpha=alpha, beta=beta)
    check_same_shape(gamma=gamma, nu=nu, alpha=alpha, beta=beta, target=target)
    check_option((False, True), stop_error_gradient=stop_error_gradient)
    gamma, target = mask(where, *widen(gamma, target))
    nu, alpha, beta = mask(where, *widen(nu, alpha, beta), fill=1)
    gamma, nu, alpha, beta, target = widen(gamma, nu, alpha, beta, target)
    (strength,) = numbers(gamma, regularization=regularization)
    for name, value in dict(nu=nu, alpha=alpha, beta=beta).items():
        require(lambda value=value: value > 0, name, "positive values", where)
    # As Student's t: log of its scale, and (df + 1) / 2 log(1 + z^2 / df)
    share = nu / (1 + nu)
    z = (target - gamma) * safe_sqrt(0.5 * share / beta)
    nll = 0.5 * (math.log(2 * math.pi) + jnp.log(beta / alpha) - jnp.log(share))
    nll += half_step(alpha) + (alpha + 0.5) * log1p_square(z)
    error = absolute(target - gamma)
    error = jax.lax.stop_gradient(error) if stop_error_gradient else error
    values = nll + strength * (error * (2 * nu + alpha))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def evidential_classification_loss(
    evidence: Float[Array, "*batch classes"],
    target: Shaped[Array, "*batch"] | Float[Array, "*batch classes"],
    *,
    kl_weight: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Expected squared error under a predicted Dirichlet, and a penalty on misplaced evidence.

    $$ \ell = \sum_k (y_k - m_k)^2 + \frac{m_k (1 - m_k)}{S + 1}
       + \lambda\, \mathrm{KL}(\mathrm{Dir}(\tilde\alpha) \,\|\, \mathrm{Dir}(1)), \quad
       \alpha = e + 1,\ S = \sum_k \alpha_k,\ m = \alpha / S,\
       \tilde\alpha = y + (1 - y) \alpha $$

    From 0 up. Both parts keep their digits from no evidence to 1e10 of it. An integer target out of
    range makes its unit NaN.

    Args:
        evidence: Evidence for each class, at least 0, such as the softplus of logits.
        target: Integer labels `*batch`, or floating distributions `*batch classes`.
        kl_weight: $\lambda$; usually raised from 0 to 1 over the first epochs.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Sensoy et al., Evidential Deep Learning to Quantify Classification Uncertainty, NeurIPS
        2018, which sums over the batch and anneals `kl_weight` over ten epochs.

    >>> evidential_classification_loss(jnp.zeros((1, 2)), jnp.array([0]))  # 1/2 + 2 / (4 * 3)
    Array(0.6666667, dtype=float32)
    """
    evidence, target, where = prepare(
        evidence, target, where=where, first="evidence", second="target"
    )
    (strength,) = numbers(evidence, kl_weight=kl_weight)
    require(lambda: evidence >= 0, "evidence", "values of at least 0", where)
    classes = evidence.shape[-1]
    if is_integer(target):
        target = one_hot(target, classes).astype(evidence.dtype)
    alpha = 1 + evidence
    total = jnp.sum(alpha, axis=-1, keepdims=True)
    # S - alpha, whose digits would cancel for the class that holds most
    top = one_hot(jnp.argmax(jax.lax.stop_gradient(alpha), axis=-1), classes)
    without_top = jnp.sum(jnp.where(top, 0, alpha), axis=-1, keepdims=True)
    rest = jnp.where(top, without_top, total - alpha) / total
    share = alpha / total
    error = target * rest - (1 - target) * share
    values = jnp.sum(error**2 + share * rest / (total + 1), axis=-1)
    values += strength * dirichlet_kl(safe_mul(1 - target, evidence))
    return reduce(values, where=where, weights=weights, reduction=reduction)


_NIG = dict(
    gamma=draw_normal("B C"),
    nu=draw_uniform("B C", 0.2, 4),
    alpha=draw_uniform("B C", 1.1, 9),
    beta=draw_uniform("B C", 0.2, 3),
    target=draw_normal("B C"),
)
_EVIDENCE = draw_uniform("B C", 0.05, 6)

CASES = (
    Case(evidential_regression_loss, _NIG, dict(regularization=0.1)),
    Case(
        evidential_regression_loss,
        _NIG,
        dict(regularization=0.3, stop_error_gradient=True),
        "stopped",
        without={"numerical": "no gradient flows through the error of the penalty"},
    ),
    Case(evidential_classification_loss, dict(evidence=_EVIDENCE, target=draw_labels("B"))),
    Case(
        evidential_classification_loss,
        dict(evidence=draw_uniform("B C", 0.05, 0.95), target=draw_probs("B C")),
        dict(kl_weight=0.3),
        "dense",
    ),
)
