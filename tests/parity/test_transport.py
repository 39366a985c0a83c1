"""Divergences, kernels and transport against SciPy, scikit-learn, torch and ott-jax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses import divergences, divergences_gaussian, kernels, transport
from jaxloss.testing import Draw, draw_log_probs, draw_normal, draw_probs, draw_uniform
from parity.peers import Row, check, peer

torch_kl = peer("torch.distributions.kl_divergence")
normal = peer("torch.distributions.Normal")
multivariate = peer("torch.distributions.MultivariateNormal")
independent = peer("torch.distributions.Independent")
distance = peer("scipy.stats.wasserstein_distance")

ROW = dict(log_probs=draw_log_probs("B C"), target=draw_probs("B C"))
BOTH = dict(probs=draw_probs("B C"), target=draw_probs("B C"))
NUMBERS = dict(x=draw_normal("B"), y=draw_normal("B"))
POINTS = dict(x=draw_normal("B V"), y=draw_normal("M V", scale=2))
SIZES = ({"V": 2, "M": 5}, {"B": 2, "V": 1, "M": 2}, {"B": 30, "V": 12, "M": 9})
SMALL = ({"V": 2, "M": 5}, {"B": 12, "V": 9, "M": 7})


def _factor(g: np.random.Generator, shape: Any, _: Any) -> np.ndarray:
    diagonal = np.eye(shape[-1]) * g.uniform(0.5, 2, shape)
    return np.tril(0.4 * g.standard_normal(shape), -1) + diagonal


def discrepancy(kernel: str, unbiased: bool, **options: Any) -> Any:
    """The definition, with a kernel of scikit-learn."""
    of = peer(f"sklearn.metrics.pairwise.{kernel}")

    def call(x: Any, y: Any) -> Any:
        total = lambda k: (k.sum() - unbiased * np.trace(k)) / (len(k) * (len(k) - unbiased))
        own = total(of(x, x, **options)) + total(of(y, y, **options))
        return own - 2 * np.mean(of(x, y, **options))

    return call


def sinkhorn(x: Any, y: Any, **masses: Any) -> Any:
    found, _ = peer("ott.tools.sinkhorn_divergence.sinkdiv")(
        x, y, epsilon=8.0, solve_kwargs=dict(threshold=1e-12, max_iterations=200), **masses
    )
    return found


def sinkhorn_of_masses(x: Any, y: Any) -> Any:
    return sinkhorn(x, y, **{name: softmax(z) for name, z in (("a", x), ("b", y))})


def softmax(x: Any) -> Any:
    return jax.nn.softmax(jax.lax.stop_gradient(x)[:, 0])


def sliced(x: Any, y: Any) -> Any:
    ways = jax.random.normal(jax.random.key(3), (16, x.shape[1]), jnp.float32).astype(x.dtype)
    ways = ways / jnp.linalg.norm(ways, axis=1, keepdims=True)
    return peer("ott.tools.sliced.sliced_wasserstein")(x, y, proj_fn=lambda z: z @ ways.T)[0]


MMD = "sklearn.metrics.pairwise."
ROWS = (
    Row(
        "kl_divergence",
        "torch.distributions.kl_divergence",
        lambda log_probs, target: divergences.kl_divergence(log_probs, target, reduction="none"),
        lambda log_probs, target: torch_kl(
            peer("torch.distributions.Categorical")(probs=target, validate_args=False),
            peer("torch.distributions.Categorical")(logits=log_probs),
        ),
        ROW,
        "of two `Categorical`, target first",
        tolerance={"float32": 2e-5},
    ),
    Row(
        "gaussian_kl",
        "torch.distributions.kl_divergence",
        lambda mean, log_variance: divergences_gaussian.gaussian_kl(
            mean, log_variance, prior_mean=0.5, prior_log_variance=-0.4, reduction="none"
        ),
        lambda mean, log_variance: torch_kl(
            independent(normal(mean, (log_variance / 2).exp()), 1),
            independent(normal(0 * mean + 0.5, (0 * mean - 0.2).exp()), 1),
        ),
        dict(mean=draw_normal("B D"), log_variance=draw_uniform("B D", -2, 2)),
        "of two independent `Normal`",
        differentiate=("mean", "log_variance"),
    ),
    Row(
        "multivariate_gaussian_kl",
        "torch.distributions.kl_divergence",
        lambda mean, scale_tril, prior: divergences_gaussian.multivariate_gaussian_kl(
            mean, scale_tril, prior_mean=mean + 1, prior_scale_tril=prior, reduction="none"
        ),
        lambda mean, scale_tril, prior: torch_kl(
            multivariate(mean, scale_tril=scale_tril.tril()),
            multivariate(mean + 1, scale_tril=prior.tril()),
        ),
        dict(
            mean=draw_normal("B V"),
            scale_tril=Draw("B V V", _factor, "bounded"),
            prior=Draw("B V V", _factor, "bounded"),
        ),
        "of two `MultivariateNormal`",
        differentiate=("mean", "scale_tril", "prior"),
    ),
    *(
        Row(
            "mmd_loss",
            MMD + name,
            lambda x, y, k=kernel, u=unbiased: kernels.mmd_loss(x, y, kernel=k, unbiased=u),
            discrepancy(name, unbiased, **options),
            POINTS,
            note,
            sizes=SIZES,
            label="unbiased" if unbiased else "",
            tolerance={"float32": 5e-5},
        )
        for unbiased in (False, True)
        for name, kernel, options, note in (
            ("rbf_kernel", kernels.rbf(1.5), dict(gamma=1 / 4.5), "gamma is 1 / (2 bandwidth^2)"),
            ("polynomial_kernel", kernels.polynomial(3), {}, "coef0 is the offset"),
        )
    ),
    Row(
        "wasserstein_1d",
        "scipy.stats.wasserstein_distance",
        lambda x, y: transport.wasserstein_1d(x, y),
        lambda x, y: np.asarray(distance(x, y)),
        NUMBERS,
    ),
    Row(
        "wasserstein_1d_from_probs",
        "scipy.stats.wasserstein_distance",
        lambda probs, target: transport.wasserstein_1d_from_probs(
            probs, target, bin_width=0.5, reduction="none"
        ),
        lambda probs, target: np.asarray(
            [
                distance(*[np.arange(p.size) / 2] * 2, p, t)
                for p, t in zip(probs, target, strict=True)
            ]
        ),
        BOTH,
        "of the numbers of the bins, weighted",
    ),
    Row(
        "sliced_wasserstein",
        "ott.tools.sliced.sliced_wasserstein",
        lambda x, y: transport.sliced_wasserstein(x, y, key=jax.random.key(3), projections=16),
        sliced,
        dict(x=draw_normal("B V"), y=draw_normal("B V")),
        "given the same directions",
        differentiate=("x", "y"),
        sizes=(dict(V=3), dict(B=33, V=2)),
    ),
    Row(
        "sinkhorn_divergence",
        "ott.tools.sinkhorn_divergence.sinkdiv",
        lambda x, y: transport.sinkhorn_divergence(x, y, epsilon=8.0, iterations=60),
        sinkhorn,
        POINTS,
        "both converged",
        differentiate=("x", "y"),
        sizes=SMALL,
        tolerance={"float32": 1e-4, "float64": 1e-7},
    ),
    Row(
        "sinkhorn_divergence",
        "ott.tools.sinkhorn_divergence.sinkdiv",
        lambda x, y: transport.sinkhorn_divergence(
            x, y, epsilon=8.0, iterations=60, x_mass=softmax(x), y_mass=softmax(y)
        ),
        sinkhorn_of_masses,
        POINTS,
        "both converged",
        sizes=SIZES[:1],
        label="masses",
        tolerance={"float32": 1e-4, "float64": 1e-7},
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
