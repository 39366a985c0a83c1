"""Expected risk: the formula in float64, certainty, hidden and repeated hypotheses."""

from functools import partial
from typing import Any

import jax
import numpy as np

from jaxloss.losses.risk import minimum_risk_loss


@jax.jit
def units_and_gradient(log_probs: Any, risks: Any, **options: Any) -> tuple[Any, Any]:
    call = lambda x, reduction: minimum_risk_loss(x, risks, reduction=reduction, **options)
    return call(log_probs, "none"), jax.grad(call)(log_probs, "sum")


def formula(log_probs: Any, risks: Any, temperature: float) -> tuple[Any, Any]:
    """Expectation and gradient in float64, the latter from pairwise differences of risks."""
    z = log_probs.astype(np.float64) / temperature
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    differences = risks[..., :, None] - risks[..., None, :]
    slope = p * np.sum(p[..., None, :] * differences, axis=-1) / temperature
    return np.sum(p * risks, axis=-1), slope


def draw(*shape: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    return generator.normal(0, 3, shape).astype(np.float32), generator.uniform(0, 5, shape).astype(
        np.float32
    )


def test_value_and_gradient_are_those_of_the_formula_even_near_certainty() -> None:
    log_probs, risks = draw(32, 5)
    log_probs[16:] *= 20
    risks[24:, :] -= np.take_along_axis(risks, log_probs.argmax(-1)[:, None], 1)[24:]
    for temperature in (0.5, 200.0):
        values, slopes = units_and_gradient(log_probs, risks, temperature=temperature)
        right, slope = formula(log_probs, risks, temperature)
        np.testing.assert_allclose(values, right, rtol=3e-5, atol=1e-30)
        scale = np.max(np.abs(slope), axis=-1, keepdims=True)
        assert np.all(np.abs(slopes - slope) <= 3e-5 * scale + 1e-30)


def test_hidden_hypotheses_are_deleted_and_an_empty_list_is_no_unit() -> None:
    log_probs, risks = draw(3, 4)
    where = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
    poisoned = np.where(where, log_probs, np.nan), np.where(where, risks, np.inf)
    values, slopes = units_and_gradient(*poisoned, where=where)
    for i in (0, 2):
        right, _ = formula(log_probs[i][where[i]], risks[i][where[i]], 1.0)
        np.testing.assert_allclose(values[i], right, rtol=1e-6)
    assert values[1] == 0
    assert not np.any(np.asarray(slopes)[~where])
    mean = minimum_risk_loss(*poisoned, where=where)
    np.testing.assert_allclose(mean, (values[0] + values[2]) / 2, rtol=1e-6)


def test_a_common_risk_changes_the_value_alone() -> None:
    log_probs, risks = draw(4, 3)
    values, slopes = units_and_gradient(log_probs, risks)
    more, same = units_and_gradient(log_probs, risks + 2)
    np.testing.assert_allclose(more, values + 2, rtol=1e-6)
    np.testing.assert_allclose(same, slopes, atol=2e-6)


def test_an_impossible_hypothesis_and_one_listed_twice() -> None:
    loss = partial(minimum_risk_loss, reduction="none")
    twice = loss(np.zeros((1, 3), np.float32), np.array([[3.0, 3.0, 0.0]]))
    np.testing.assert_allclose(twice, 2, rtol=1e-6)
    value, slope = units_and_gradient(np.array([[0.0, -np.inf]]), np.array([[1.0, 9.0]]))
    assert value[0] == 1
    assert not np.any(slope)


def test_risks_carry_no_gradient() -> None:
    log_probs, risks = draw(2, 3)
    assert not np.any(jax.grad(minimum_risk_loss, argnums=1)(log_probs, risks))
