"""Survival in intervals: definitions, the last interval, far logits, bad indices, ranking."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from jaxloss import checked
from jaxloss.losses.survival_discrete import (
    deephit_ranking_loss,
    discrete_hazard_nll,
    mtlr_nll,
    piecewise_hazard_nll,
    pmf_nll,
)

N, K = 8, 4
GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.standard_normal((N, K)) * 2
INDEX = np.arange(N, dtype=np.int32) % K
EVENT = np.arange(N) < N / 2 + 1
FRACTION = GENERATOR.uniform(0, 1, N)
ARRAYS = INDEX, EVENT
LOSSES = dict(
    hazard=discrete_hazard_nll, pmf=pmf_nll, mtlr=mtlr_nll, piecewise=piecewise_hazard_nll
)


def arguments(name: str, *arrays: Any) -> tuple[Any, ...]:
    return (*arrays, FRACTION) if name == "piecewise" else arrays


def by_definition(name: str, z: Any, index: Any, event: Any, fraction: Any) -> Any:
    """From the probabilities themselves, unit by unit; `z` may hold numbers of mpmath."""
    exp, log, count = mpmath.exp, mpmath.log, len(z)
    t, d = int(index), bool(event)
    if name == "hazard":
        hazards = [1 / (1 + exp(-x)) for x in z]
        alive = mpmath.fprod(1 - h for h in hazards[:t])
        return -log(alive * (hazards[t] if d else 1 - hazards[t]))
    if name == "piecewise":
        rates = [mpmath.log1p(exp(x)) for x in z]
        passed = mpmath.fsum(rates[:t]) + float(fraction) * rates[t]
        return passed - (log(rates[t]) if d else 0)
    z = [mpmath.fsum(z[k:]) for k in range(count)] if name == "mtlr" else list(z)
    masses = [exp(x) for x in [*z, mpmath.mpf(0)]]
    inside = masses[t] if d else mpmath.fsum(masses[t + 1 :])
    return -log(inside / mpmath.fsum(masses))


def exact(name: str, z: Any, index: Any, event: Any, fraction: Any) -> list[float]:
    with mpmath.workdps(300):
        rows = [[mpmath.mpf(float(x)) for x in row] for row in z]
        units = zip(rows, index, event, fraction, strict=True)
        return [float(by_definition(name, *unit)) for unit in units]


@pytest.mark.parametrize("name", LOSSES)
def test_units_are_those_of_the_definition_also_for_far_logits(name: str) -> None:
    with jax.enable_x64(True):
        units = LOSSES[name](LOGITS, *arguments(name, *ARRAYS), reduction="none")
        np.testing.assert_allclose(units, exact(name, LOGITS, *ARRAYS, FRACTION), rtol=1e-12)
    fraction = np.float32(FRACTION)
    both = jax.jit(
        lambda z: (
            LOSSES[name](z, *arguments(name, *ARRAYS), reduction="none"),
            jax.grad(lambda z: LOSSES[name](z, *arguments(name, *ARRAYS)))(z),
        )
    )
    for scale in (1, 15, 60):
        z = np.float32(scale * LOGITS)
        units, gradient = both(z)
        expected = exact(name, z, *ARRAYS, fraction)
        floor = 1e-5 if name == "mtlr" and scale > 1 else 0  # its sums are rounded
        np.testing.assert_allclose(units, expected, rtol=3e-6, atol=floor + 1e-37)
        assert np.isfinite(gradient).all()
    units, gradient = both(np.float32(1e4 * np.sign(LOGITS)))
    assert np.isfinite(units).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_slopes_of_the_definition(name: str) -> None:
    with jax.enable_x64(True):
        call = partial(LOSSES[name], reduction="sum")
        gradient = jax.grad(call)(LOGITS, *arguments(name, *ARRAYS))
    step = 1e-20
    with mpmath.workdps(60):
        for i, k in ((0, 0), (1, 3), (5, 1), (7, 3), (7, 0)):
            row = [mpmath.mpf(float(x)) for x in LOGITS[i]]
            near = [x + mpmath.mpf(step) * (j == k) for j, x in enumerate(row)]
            f = lambda z, i=i: by_definition(name, z, INDEX[i], EVENT[i], FRACTION[i])
            slope = float((f(near) - f(row)) / mpmath.mpf(step))
            np.testing.assert_allclose(gradient[i, k], slope, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_censored_in_the_last_interval_is_finite(name: str) -> None:
    z = np.float32([[0, 0, 0, 60], [0, 0, 0, -60]])
    index, event = np.array([3, 3]), np.array([False, False])
    arrays = (index, event, np.ones(2)) if name == "piecewise" else (index, event)
    value, gradient = jax.value_and_grad(LOSSES[name])(z, *arrays)
    units = LOSSES[name](z, *arrays, reduction="none")
    np.testing.assert_allclose(units, exact(name, z, index, event, np.ones(2)), rtol=1e-6)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_bad_interval_or_event_is_not_a_number_unless_hidden(name: str) -> None:
    loss, where = LOSSES[name], np.arange(N) != 2
    for low, high in ((INDEX, EVENT), (INDEX.astype(np.uint8), EVENT.astype(np.float32))):
        for bad in (K, -1, 2**31 - 1, "event"):
            index, event = low.astype(np.int64), high.astype(np.float32)
            if bad == "event":
                event[2] = 0.5
            else:
                index[2] = bad
            arrays = arguments(name, index.astype(np.int32), event)
            units = loss(np.float32(LOGITS), *arrays, reduction="none")
            np.testing.assert_array_equal(np.isnan(units), ~where)
        gradient = jax.grad(loss)(np.float32(LOGITS), *arrays)
        assert np.isnan(gradient[2]).any()
        value, gradient = jax.value_and_grad(loss)(np.float32(LOGITS), *arrays, where=where)
        assert np.isfinite(value)
        np.testing.assert_array_equal(gradient[2], 0)
    index = np.where(where, INDEX, K)
    with pytest.raises(ValueError, match=f"{loss.__name__}: time_index: expected values in"):
        checked(loss)(LOGITS, *arguments(name, index, EVENT))
    with pytest.raises(ValueError, match=f"{loss.__name__}: event: expected 0 or 1"):
        checked(loss)(LOGITS, *arguments(name, INDEX, 2 * EVENT))


def test_hazards_of_a_distribution_have_the_likelihood_of_the_distribution() -> None:
    mass = np.exp(np.c_[LOGITS, np.zeros(N)])
    later = np.cumsum(mass[:, ::-1], axis=1)[:, ::-1]
    hazards = np.log(mass[:, :-1] / later[:, 1:])
    one = pmf_nll(LOGITS, *ARRAYS, reduction="none")
    np.testing.assert_allclose(
        discrete_hazard_nll(hazards, *ARRAYS, reduction="none"), one, rtol=1e-5
    )


def test_mtlr_is_the_likelihood_of_sums_of_later_scores() -> None:
    sums = np.cumsum(LOGITS[:, ::-1], axis=1)[:, ::-1]
    one = pmf_nll(sums, *ARRAYS, reduction="none")
    np.testing.assert_allclose(mtlr_nll(LOGITS, *ARRAYS, reduction="none"), one, rtol=1e-5)


def test_a_cut_within_an_interval_changes_no_likelihood() -> None:
    """Censored at the end of an interval is censored at the begin of the next."""
    none = np.zeros(N - 1, bool)
    z, index = LOGITS[: N - 1], INDEX[: N - 1] % (K - 1)
    end = piecewise_hazard_nll(z, index, none, np.ones(N - 1))
    begin = piecewise_hazard_nll(z, index + 1, none, np.zeros(N - 1))
    np.testing.assert_allclose(end, begin, rtol=1e-6)
    with pytest.raises(ValueError, match="piecewise_hazard_nll: fraction: expected values in"):
        checked(piecewise_hazard_nll)(LOGITS, *ARRAYS, FRACTION + 1)


# Ranking


def ranked(z: np.ndarray, index: Any, event: Any, sigma: float, where: Any) -> np.ndarray:
    """The definition, pair by pair."""
    masses = np.exp(np.c_[z, np.zeros(len(z))])
    died = np.cumsum(masses / masses.sum(1, keepdims=True), axis=1)
    out = np.zeros((len(z), len(z)))
    for i in range(len(z)):
        for j in range(len(z)):
            if where[i] and where[j] and event[i] and index[i] < index[j]:
                out[i, j] = np.exp((died[j, index[i]] - died[i, index[i]]) / sigma)
    return out


def test_pairs_of_the_ranking_are_those_of_the_double_loop() -> None:
    where = np.arange(N) != 1
    hidden = np.where(where[:, None], LOGITS, np.nan)
    expected = ranked(LOGITS, INDEX, EVENT, 0.3, where)
    with jax.enable_x64(True):
        options = dict(sigma=0.3, where=where)
        units = deephit_ranking_loss(hidden, *ARRAYS, **options, reduction="none")
        np.testing.assert_allclose(units, expected, rtol=1e-12)
        mean = deephit_ranking_loss(hidden, *ARRAYS, **options)
        np.testing.assert_allclose(mean, expected.sum() / (expected > 0).sum(), rtol=1e-12)
        total = partial(deephit_ranking_loss, **options, reduction="sum")
        gradient = jax.grad(total)(hidden, *ARRAYS)
        assert np.isfinite(gradient).all()
        for i, k in ((0, 0), (3, 2), (7, 1)):
            step = 1e-6 * (np.arange(N) == i)[:, None] * (np.arange(K) == k)
            sides = [ranked(LOGITS + s, INDEX, EVENT, 0.3, where).sum() for s in (step, -step)]
            np.testing.assert_allclose(gradient[i, k], (sides[0] - sides[1]) / 2e-6, rtol=1e-5)


def test_the_sum_over_all_pairs_is_the_mean_of_other_libraries() -> None:
    """Pycox divides by n^2, whatever the number of comparable pairs."""
    event = np.ones(N, bool)  # with a censored subject it has more pairs
    value = deephit_ranking_loss(LOGITS, INDEX, event, sigma=0.5, reduction="sum") / N**2
    expected = ranked(LOGITS, INDEX, event, 0.5, np.ones(N, bool)).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_batch_without_comparable_pairs_costs_nothing() -> None:
    z = np.float32(LOGITS)
    for index, event in ((0 * INDEX, EVENT), (INDEX, 0 * EVENT)):
        value, gradient = jax.value_and_grad(deephit_ranking_loss)(z, index, event)
        np.testing.assert_array_equal([value, *np.ravel(gradient)], 0)
    with pytest.raises(ValueError, match=r"deephit_ranking_loss: logits: expected shape \(n, int"):
        deephit_ranking_loss(jnp.zeros((2, N, K)), np.stack([INDEX] * 2), np.stack([EVENT] * 2))
