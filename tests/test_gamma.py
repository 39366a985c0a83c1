"""The gamma function's differences against eighty digits, in both precisions."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from scipy import stats

from jaxloss._core.gamma import dirichlet_kl, half_step, stirling_error, trigamma

POINTS = np.concatenate([10 ** np.linspace(-8, 8, 33), np.linspace(0.3, 3, 20)])
HALF = mp.mpf(1) / 2
FUNCTIONS = {  # each with its value, first and second derivative
    "stirling_error": (
        stirling_error,
        lambda x: mp.loggamma(x) - (x - HALF) * mp.log(x) + x - mp.log(2 * mp.pi) / 2,
        lambda x: mp.psi(0, x) - mp.log(x) + HALF / x,
        lambda x: mp.psi(1, x) - 1 / x - HALF / x**2,
    ),
    "half_step": (
        half_step,
        lambda x: mp.loggamma(x) - mp.loggamma(x + HALF) + mp.log(x) / 2,
        lambda x: mp.psi(0, x) - mp.psi(0, x + HALF) + HALF / x,
        lambda x: mp.psi(1, x) - mp.psi(1, x + HALF) - HALF / x**2,
    ),
    "trigamma": (trigamma, *(lambda x, n=n: mp.psi(n, x) for n in (1, 2, 3))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_value_and_derivatives_match_eighty_digits(name, wide):
    function, *exact = FUNCTIONS[name]

    @jax.jit
    def parts(x):
        slope = jax.grad(function)
        return tuple(jax.vmap(f)(x) for f in (function, slope, jax.grad(slope)))

    with jax.enable_x64(wide), mp.workdps(80):
        x = POINTS.astype(np.float64 if wide else np.float32)
        eps = float(np.finfo(x.dtype).eps)
        for order, part in enumerate(jax.device_get(parts(x))):
            for at, value in zip(map(float, x), map(float, part), strict=True):
                expected = exact[order](mp.mpf(at))
                # in double precision what is small beside 1 / x^n need not keep every digit
                scale = abs(expected) + (wide and name == "stirling_error") * at**-order
                assert abs(value - expected) <= 32 * eps * scale, (order, at)


@jax.jit
def divergence(excess):
    return dirichlet_kl(excess), jax.grad(lambda e: jnp.sum(dirichlet_kl(e)))(excess)


@pytest.mark.parametrize("classes", [1, 2, 10])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-3, 0.3, 1.0, 30.0, 1e5, 1e10])
def test_the_dirichlet_divergence_keeps_its_digits_at_any_evidence(classes, size):
    excess = np.float32(size * np.random.default_rng(0).uniform(0, 1, (3, classes)))
    excess[:, 0] = 0 if classes > 1 else size
    value, slope = jax.device_get(divergence(excess))
    with mp.workdps(50):
        for row, got, slopes in zip(excess, value, slope, strict=True):
            e = [mp.mpf(float(x)) for x in row]
            total = sum(e)
            whole = mp.loggamma(classes + total) - mp.loggamma(classes)
            whole += sum(
                x * (mp.psi(0, 1 + x) - mp.psi(0, classes + total)) - mp.loggamma(1 + x) for x in e
            )
            true = [x * mp.psi(1, 1 + x) - total * mp.psi(1, classes + total) for x in e]
            assert abs(float(got) - whole) <= 2e-6 * abs(whole) + (classes == 1) * 1e-6 * (1 + size)
            worst = max(abs(float(g) - t) for g, t in zip(slopes, true, strict=True))
            assert worst <= 1e-6 * max(map(abs, true)) + (classes == 1) * 1e-6


def test_the_dirichlet_divergence_is_what_samples_say():
    alpha = np.array([3.0, 1.5, 1.0])
    draws = stats.dirichlet(alpha).rvs(200_000, random_state=0)
    logs = stats.dirichlet(alpha).logpdf(draws.T) - stats.dirichlet(np.ones(3)).logpdf(draws.T)
    got, _ = divergence((alpha - 1).astype(np.float32))
    np.testing.assert_allclose(got, logs.mean(), atol=5 * logs.std() / len(logs) ** 0.5)
