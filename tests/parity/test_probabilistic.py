"""Likelihoods, mixtures, evidential losses and scores against torch, SciPy, scoringrules, rlax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses.crps import (
    crps_ensemble,
    crps_gaussian,
    crps_gaussian_mixture,
    crps_laplace,
    crps_logistic,
    crps_quantile,
)
from jaxloss.losses.evidential import evidential_classification_loss, evidential_regression_loss
from jaxloss.losses.likelihoods import (
    gaussian_variance_nll_loss,
    laplace_nll_loss,
    multivariate_gaussian_nll_loss,
    poisson_nll_loss,
    student_t_nll_loss,
)
from jaxloss.losses.likelihoods_counts import (
    negative_binomial_nll_loss,
    tweedie_loss,
    zero_inflated_nll_loss,
)
from jaxloss.losses.likelihoods_positive import beta_distribution_nll_loss, gamma_nll_loss
from jaxloss.losses.mixtures import gaussian_mixture_nll_loss
from jaxloss.losses.quantiles import expectile_loss, quantile_huber_loss, quantile_loss
from jaxloss.losses.scoring_rules import (
    energy_score,
    interval_score,
    variogram_score,
    weighted_interval_score,
)
from jaxloss.testing import Draw, draw_counts, draw_labels, draw_normal, draw_uniform
from parity.peers import Row, check, peer

TORCH = "torch.distributions."
RULES = "scoringrules."
LOG_DENSITY = "minus the log-density"
FIRST = "takes the target first"


def normal(*names: str, dims: str = "B C") -> dict[str, Draw]:
    return {name: draw_normal(dims) for name in names}


def factor(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
    return np.tril(np.eye(shape[-1]) * g.uniform(1, 2, shape) + g.uniform(-0.5, 0.5, shape))


TARGET = draw_normal("B C")
COUNT, AMOUNT = draw_counts("B C"), draw_uniform("B C", 0.1, 5)
POSITIVE = draw_uniform("B C", 0.3, 3)
LOCATED = dict(loc=TARGET, scale=POSITIVE, target=TARGET)
SCALED = normal("loc", "log_scale", "target")
MIXED = dict(normal("logits", "means", "log_scales", dims="B C V"), target=TARGET)
SPREAD = dict(normal("logits", "means", dims="B C V"), scales=draw_uniform("B C V", 0.3, 3))
ENSEMBLE = dict(samples=draw_normal("B C V"), target=TARGET)
VECTORS = dict(samples=draw_normal("B C V"), target=draw_normal("B V"))
LEVELS = draw_uniform("V", 0.1, 0.9)


def row(
    loss: Callable[..., Any],
    name: str,
    theirs: Callable[..., Any],
    draws: dict[str, Draw],
    note: str = "",
    *,
    still: tuple[str, ...] = (),
    plain: bool = False,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Row:
    """A row in which `theirs` gets the peer's function and the arrays; `plain` has no gradient."""
    function = peer(name)
    whole = {n for n, draw in draws.items() if draw in (COUNT, LEVELS)}
    return Row(
        loss=loss.__name__,
        peer=name,
        ours=lambda **arrays: loss(*arrays.values(), reduction="none", **(config or {})),
        theirs=lambda **arrays: theirs(function, *arrays.values()),
        draws=draws,
        note=note,
        differentiate=() if plain else tuple(n for n in draws if n not in {*whole, *still}),
        **options,
    )


def negative_binomial(f: Any, m: Any, r: Any, y: Any) -> Any:
    return -f(r.exp(), logits=m - r).log_prob(y)


def mixture(f: Any, logits: Any, m: Any, s: Any, y: Any) -> Any:
    part = peer(f"{TORCH}Normal")(m, s.exp())
    return -f(peer(f"{TORCH}Categorical")(logits=logits), part).log_prob(y)


def marginal(f: Any, gamma: Any, nu: Any, alpha: Any, beta: Any, y: Any) -> Any:
    return -f(2 * alpha, gamma, (beta * (1 + nu) / (nu * alpha)).sqrt()).log_prob(y)


def dirichlet(f: Any, evidence: Any, y: Any) -> Any:
    truth = peer("torch.nn.functional.one_hot")(y, evidence.shape[-1])
    predicted = f(evidence + 1)
    error = (truth - predicted.mean) ** 2 + predicted.variance
    misplaced = f(truth + (1 - truth) * (evidence + 1))
    uniform = f(0 * evidence + 1)
    return error.sum(-1) + 0.3 * peer(f"{TORCH}kl_divergence")(misplaced, uniform)


NIG = dict(gamma=TARGET, nu=POSITIVE, alpha=draw_uniform("B C", 1.1, 6), beta=POSITIVE)
COUNTS = dict(normal("log_mean", "log_dispersion"), target=COUNT)
GAMMA = dict(normal("log_mean", "log_shape"), target=AMOUNT)
BETA = dict(normal("log_a", "log_b"), target=draw_uniform("B C", 0.05, 0.95))

LIKELIHOODS = (
    *(
        row(
            gaussian_variance_nll_loss,
            "torch.nn.functional.gaussian_nll_loss",
            lambda f, m, v, t, full=full: f(m, t, v, full=full, reduction="none"),
            dict(mean=TARGET, variance=POSITIVE, target=TARGET),
            "takes (mean, target, variance); its clamp lets the gradient through",
            config=dict(full=full),
            label="full" if full else "",
        )
        for full in (False, True)
    ),
    row(
        multivariate_gaussian_nll_loss,
        f"{TORCH}MultivariateNormal",
        lambda f, m, s, t: -f(m, scale_tril=s).log_prob(t),
        dict(mean=draw_normal("B V"), scale_tril=Draw("B V V", factor, "fixed"))
        | normal("target", dims="B V"),
        LOG_DENSITY,
    ),
    row(
        poisson_nll_loss,
        f"{TORCH}Poisson",
        lambda f, z, t: -f(z.exp()).log_prob(t),
        dict(normal("log_rate"), target=COUNT),
        f"{LOG_DENSITY}; takes the rate",
        config=dict(full=True),
    ),
    row(
        laplace_nll_loss,
        f"{TORCH}Laplace",
        lambda f, m, s, t: -f(m, s.exp()).log_prob(t),
        SCALED,
        LOG_DENSITY,
    ),
    row(
        student_t_nll_loss,
        f"{TORCH}StudentT",
        lambda f, m, s, t: -f(4.0, m, s.exp()).log_prob(t),
        SCALED,
        LOG_DENSITY,
        config=dict(df=4.0),
    ),
    row(
        negative_binomial_nll_loss,
        f"{TORCH}NegativeBinomial",
        negative_binomial,
        COUNTS,
        f"{LOG_DENSITY}; takes r and log(mean / r)",
    ),
    row(
        negative_binomial_nll_loss,
        "scipy.stats.nbinom.logpmf",
        lambda f, m, r, t: -f(t, np.exp(r), 1 / (1 + np.exp(m - r))),
        COUNTS,
        f"{LOG_DENSITY}; takes r and r / (r + mean)",
        plain=True,
    ),
    row(
        gamma_nll_loss,
        f"{TORCH}Gamma",
        lambda f, m, k, t: -f(k.exp(), (k - m).exp()).log_prob(t),
        GAMMA,
        f"{LOG_DENSITY}; takes shape and rate",
    ),
    row(
        gamma_nll_loss,
        "scipy.stats.gamma.logpdf",
        lambda f, m, k, t: -f(t, np.exp(k), scale=np.exp(m - k)),
        GAMMA,
        f"{LOG_DENSITY}; takes shape and scale",
        plain=True,
    ),
    row(
        beta_distribution_nll_loss,
        f"{TORCH}Beta",
        lambda f, a, b, t: -f(a.exp(), b.exp()).log_prob(t),
        BETA,
        LOG_DENSITY,
    ),
    row(
        beta_distribution_nll_loss,
        "scipy.stats.beta.logpdf",
        lambda f, a, b, t: -f(t, np.exp(a), np.exp(b)),
        BETA,
        LOG_DENSITY,
        plain=True,
    ),
    Row(
        loss="tweedie_loss",
        peer="sklearn.metrics.mean_tweedie_deviance",
        ours=lambda log_mean, target: (
            2 * (tweedie_loss(log_mean, target) - tweedie_loss(jnp.log(target), target))
        ),
        theirs=lambda log_mean, target: np.asarray(
            peer("sklearn.metrics.mean_tweedie_deviance")(
                target.ravel(), np.exp(log_mean.ravel()), power=1.5
            )
        ),
        draws=dict(normal("log_mean"), target=AMOUNT),
        note="twice ours, less the same at the target",
    ),
    Row(
        loss="zero_inflated_nll_loss",
        peer="statsmodels.distributions.discrete.zipoisson.logpmf",
        ours=lambda log_rate, gate, target: zero_inflated_nll_loss(
            poisson_nll_loss(log_rate, target, full=True, reduction="none"),
            jnp.exp(log_rate),
            gate,
            target,
            reduction="none",
        ),
        theirs=lambda log_rate, gate, target: (
            -peer("statsmodels.distributions.discrete.zipoisson.logpmf")(
                target, np.exp(log_rate.astype(float)), 1 / (1 + np.exp(-gate.astype(float)))
            )
        ),
        draws=dict(normal("log_rate", "gate"), target=COUNT),
        note=f"{LOG_DENSITY} of zero-inflated Poisson",
    ),
    row(gaussian_mixture_nll_loss, f"{TORCH}MixtureSameFamily", mixture, MIXED, LOG_DENSITY),
    row(
        evidential_regression_loss,
        f"{TORCH}StudentT",
        marginal,
        dict(NIG, target=TARGET),
        "its first part is minus the log-density of the marginal",
        config=dict(regularization=0.0),
    ),
    row(
        evidential_classification_loss,
        f"{TORCH}Dirichlet",
        dirichlet,
        dict(evidence=draw_uniform("B C", 0.1, 5), target=draw_labels("B")),
        "from its mean, variance and divergence, whose gradient there has nine digits",
        still=("target",),
        config=dict(kl_weight=0.3),
        tolerance={"float64": 1e-9},
    ),
)


def ruled(
    loss: Callable[..., Any], name: str, draws: dict[str, Draw], note: str = FIRST, **options: Any
) -> Row:
    """A row against scoringrules on jax, which takes the target before the forecast."""
    given = options.pop("given", {})
    order = lambda *a: (a[-1], *a[:-1])
    backend = "numpy" if options.get("plain") else "jax"
    call = lambda f, *a: f(*order(*a), backend=backend, **given)
    return row(loss, f"{RULES}{name}", options.pop("call", call), draws, note, **options)


SCORES = (
    ruled(crps_gaussian, "crps_normal", LOCATED),
    ruled(crps_logistic, "crps_logistic", LOCATED),
    ruled(crps_laplace, "crps_laplace", LOCATED),
    ruled(
        crps_gaussian_mixture,
        "crps_mixnorm",
        dict(SPREAD, target=TARGET),
        f"{FIRST}; takes weights, not logits",
        call=lambda f, z, m, s, t: f(t, m, s, jax.nn.softmax(z), backend="jax"),
    ),
    ruled(
        gaussian_mixture_nll_loss,
        "logs_mixnorm",
        MIXED,
        f"{FIRST}; takes weights and scales, not their logarithms",
        call=lambda f, z, m, s, t: f(t, m, jnp.exp(s), jax.nn.softmax(z), backend="jax"),
    ),
    *(
        ruled(
            crps_ensemble,
            "crps_ensemble",
            ENSEMBLE,
            f"{FIRST}; estimators 'nrg' and 'qd', fair: 'fair' and 'pwm'",
            given=dict(estimator=estimator),
            config=dict(fair=fair),
            label=estimator,
        )
        for estimator, fair in (("nrg", False), ("qd", False), ("fair", True), ("pwm", True))
    ),
    ruled(
        crps_quantile,
        "crps_quantile",
        dict(pred=draw_normal("B C V"), target=TARGET, quantiles=LEVELS),
        call=lambda f, p, t, q: f(t, p, q, backend="numpy"),
        plain=True,
    ),
    ruled(
        quantile_loss,
        "quantile_score",
        normal("pred", "target"),
        given=dict(alpha=0.8),
        config=dict(quantile=0.8),
        plain=True,
    ),
    ruled(
        interval_score,
        "interval_score",
        normal("lower", "upper", "target"),
        call=lambda f, lower, upper, t: f(t, lower, upper, 0.2, backend="jax").reshape(t.shape),
        config=dict(alpha=0.2),
    ),
    row(
        weighted_interval_score,
        f"{RULES}weighted_interval_score",
        lambda f, m, lower, upper, t, a: f(t, m, lower, upper, a, backend="numba"),
        dict(median=TARGET, lower=draw_normal("B C V"), upper=draw_normal("B C V"))
        | dict(target=TARGET, alpha=LEVELS),
        f"{FIRST}; only with numba, elsewhere the median stands for its error",
        plain=True,
    ),
    *(
        ruled(
            energy_score,
            "es_ensemble",
            VECTORS,
            f"{FIRST}; its gradient in the ensemble is NaN",
            given=dict(estimator=estimator),
            config=dict(fair=estimator == "fair"),
            label=estimator,
            still=("samples",),
        )
        for estimator in ("nrg", "fair")
    ),
    *(
        ruled(
            variogram_score,
            "vs_ensemble",
            VECTORS,
            given=dict(p=p),
            config=dict(p=p),
            label=f"p={p:g}",
        )
        for p in (1.0, 2.0)
    ),
    Row(
        loss="variogram_score",
        peer="scoringrules.vs_ensemble",
        ours=lambda samples, target, pair_weights: variogram_score(
            samples, target, p=1.5, pair_weights=pair_weights, reduction="none"
        ),
        theirs=lambda samples, target, pair_weights: peer("scoringrules.vs_ensemble")(
            target, samples, w=pair_weights, p=1.5, backend="numpy"
        ),
        draws=dict(VECTORS, pair_weights=draw_uniform("V V", 0.1, 1)),
        note=FIRST,
        label="weights",
    ),
)

PAIR = normal("pred", "target")
LEARNERS = (
    row(
        expectile_loss,
        "rlax.expectile_loss",
        lambda f, p, t: f(p, t, 0.3),
        PAIR,
        config=dict(expectile=0.3),
    ),
    Row(
        loss="quantile_huber_loss",
        peer="rlax.quantile_regression_loss",
        ours=lambda pred, target: (
            0.4 * quantile_huber_loss(pred[0], target[0], quantile=0.8, delta=0.4, reduction="sum")
        ),
        theirs=lambda pred, target: sum(
            peer("rlax.quantile_regression_loss")(p[None], jnp.full(1, 0.8, p.dtype), t[None], 0.4)
            for p, t in zip(pred[0], target[0], strict=True)
        ),
        draws=PAIR,
        note="`delta` times ours, over all pairs of quantile and sample",
        differentiate=("pred",),
    ),
)

ROWS = (*LIKELIHOODS, *SCORES, *LEARNERS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
