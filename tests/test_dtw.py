"""Soft-DTW: all alignments enumerated, limits, bands, masks on both sides, memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss import checked
from jaxloss.losses.dtw import soft_dtw_divergence, soft_dtw_from_cost, soft_dtw_loss

MIB = 2**20


@partial(jax.jit, static_argnames="bandwidth")
def units_and_gradient(cost: Any, **options: Any) -> tuple[Any, Any]:
    call = lambda c, reduction: soft_dtw_from_cost(c, reduction=reduction, **options)
    return call(cost, "none"), jax.grad(call)(cost, "sum")


def alignments(time: int, steps: int) -> list[list[tuple[int, int]]]:
    """All monotone paths from the first pair of steps to the last."""
    if not time or not steps:
        return []
    found, whole = [[(0, 0)]], []
    while found:
        path = found.pop()
        i, j = path[-1]
        if (i, j) == (time - 1, steps - 1):
            whole.append(path)
            continue
        moves = [(i + 1, j), (i, j + 1), (i + 1, j + 1)]
        found += [[*path, (a, b)] for a, b in moves if a < time and b < steps]
    return whole


def enumerated(
    cost: np.ndarray, gamma: float, bandwidth: int | None = None
) -> tuple[float, np.ndarray]:
    """The soft minimum over all alignments and the expected alignment, in float64."""
    cost = np.asarray(cost, np.float64)
    time, steps = cost.shape
    low, high = min(0, time - steps), max(0, time - steps)
    inside = lambda path: (
        bandwidth is None or all(low - bandwidth <= i - j <= high + bandwidth for i, j in path)
    )
    paths = [path for path in alignments(time, steps) if inside(path)]
    totals = np.array([sum(cost[pair] for pair in path) for path in paths])
    if not np.any(np.isfinite(totals)):
        return np.inf, np.zeros(cost.shape)
    weights = np.exp(-(totals - totals.min()) / gamma)
    expected = np.zeros(cost.shape)
    for path, weight in zip(paths, weights / weights.sum(), strict=True):
        for pair in path:
            expected[pair] += weight
    return totals.min() - gamma * np.log(weights.sum()), expected


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 4, shape).astype(np.float32)


@pytest.mark.parametrize("bandwidth", [None, 0, 1])
def test_value_and_gradient_are_those_of_all_alignments_enumerated(bandwidth: int | None) -> None:
    cost = draw(6, 4, 3)
    where, target_where = np.ones((6, 4), bool), np.ones((6, 3), bool)
    where[1, [0, 2]] = where[2, 3] = where[3, :2] = False
    target_where[2, 1] = target_where[3, 0] = target_where[4, 2] = False
    target_where[5] = False
    shown = where[:, :, None] & target_where[:, None]
    for gamma in (0.5, 5.0):
        values, slopes = units_and_gradient(
            np.where(shown, cost, np.nan),
            gamma=gamma,
            bandwidth=bandwidth,
            where=where,
            target_where=target_where,
        )
        for i in range(6):
            inside = np.ix_(where[i], target_where[i])
            value, expected = enumerated(cost[i][inside], gamma, bandwidth)
            np.testing.assert_allclose(values[i], value, rtol=2e-6, atol=2e-6)
            np.testing.assert_allclose(np.asarray(slopes)[i][inside], expected, atol=2e-6)
            assert not np.any(np.asarray(slopes)[i][~shown[i]])


def test_small_gamma_gives_plain_dynamic_time_warping() -> None:
    cost = draw(5, 4, 4, seed=1)
    right = [min(sum(c[p] for p in path) for path in alignments(4, 4)) for c in cost]
    for gamma in (1e-4, 1e-6, 1e-12):
        values, slopes = units_and_gradient(cost, gamma=gamma)
        np.testing.assert_allclose(values, right, rtol=1e-6)
        assert np.isin(slopes, [0, 1]).all()


def test_forbidden_pairs_are_avoided_and_a_forbidden_corner_is_infinite() -> None:
    cost = draw(2, 3, 3, seed=2)
    cost[0, 1, 1] = cost[1, 2, 2] = np.inf
    values, slopes = units_and_gradient(cost)
    value, expected = enumerated(cost[0], 1.0)
    np.testing.assert_allclose(values[0], value, rtol=1e-6)
    np.testing.assert_allclose(slopes[0], expected, atol=1e-6)
    assert values[1] == np.inf
    assert not np.any(slopes[1])


def test_a_target_without_steps_is_infinite_for_its_own_unit_only() -> None:
    pred, target = draw(3, 4, 2, seed=3), draw(3, 5, 2, seed=4)
    target_where = np.ones((3, 5), bool)
    target_where[1] = False
    for loss in (soft_dtw_loss, soft_dtw_divergence):
        call = lambda x, r, f=loss: f(x, target, target_where=target_where, reduction=r)
        values, slopes = call(pred, "none"), jax.grad(call)(pred, "sum")
        alone = loss(pred, target, reduction="none")
        assert values[1] == np.inf
        assert not np.any(slopes[1])
        np.testing.assert_allclose(values[::2], alone[::2], rtol=1e-5)
        assert np.isfinite(slopes).all()


def test_the_divergence_is_no_less_than_zero_and_zero_for_equal_series() -> None:
    generator = np.random.default_rng(5)
    pred = generator.normal(size=(64, 5, 2)).astype(np.float32)
    near = pred + generator.normal(size=pred.shape).astype(np.float32) * 1e-3
    loss = jax.jit(partial(soft_dtw_divergence, reduction="none"))
    assert np.all(loss(pred, near) >= 0)
    assert not np.any(loss(pred, pred))
    where = generator.random((64, 5)) < 0.8
    masked = jax.jit(lambda x, y: soft_dtw_divergence(x, y, where=where, target_where=where))
    assert masked(pred, pred) == 0


def test_the_derivatives_are_those_of_the_plain_sum_over_alignments() -> None:
    """Value, gradient, jvp, Hessian-vector products, also in gamma, against plain autodiff."""
    with jax.enable_x64(True):
        cost = draw(4, 3, seed=6).astype(np.float64)
        moved = (np.cos(np.arange(12.0)).reshape(4, 3), 0.3)
        visits = np.zeros((len(alignments(4, 3)), 4, 3))
        for p, path in enumerate(alignments(4, 3)):
            visits[(p, *np.transpose(path))] = 1

        def plain(cost: Any, gamma: Any) -> Any:
            return -gamma * jax.nn.logsumexp(-jnp.einsum("ij,pij->p", cost, visits) / gamma)

        def everything(loss: Any, cost: Any, gamma: Any, v: Any) -> Any:
            at = (cost, gamma)
            both = jax.jvp(jax.grad(loss, (0, 1)), at, v)
            dot = lambda a: sum(map(jnp.vdot, jax.grad(loss, (0, 1))(*a), v))
            return loss(*at), jax.jvp(loss, at, v)[1], both, jax.grad(dot)(at)

        ours = lambda c, g: soft_dtw_from_cost(c[None], gamma=g)
        right = jax.jit(partial(everything, plain))(cost, 0.8, moved)
        got = jax.jit(partial(everything, ours))(cost, 0.8, moved)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, right)


def test_float32_holds_over_long_series() -> None:
    generator = np.random.default_rng(7)
    pred, target = (generator.normal(size=(2, n, 3)).cumsum(1) / 10 for n in (200, 150))

    def run(pred: Any, target: Any) -> Any:
        loss = lambda x, r: soft_dtw_loss(x, target, gamma=0.1, reduction=r)
        return loss(pred, "none"), jax.grad(loss)(pred, "sum")

    values, slopes = jax.jit(run)(pred.astype(np.float32), target.astype(np.float32))
    with jax.enable_x64(True):
        exact, right = jax.jit(run)(
            pred.astype(np.float32).astype(np.float64), target.astype(np.float32).astype(np.float64)
        )
    np.testing.assert_allclose(values, exact, rtol=2e-6)
    np.testing.assert_allclose(slopes, right, atol=1e-4 * np.max(np.abs(right)))


def test_wrong_options_raise() -> None:
    cost = draw(1, 2, 2)
    with pytest.raises(ValueError, match="soft_dtw_from_cost: bandwidth: expected"):
        soft_dtw_from_cost(cost, bandwidth=-1)
    with pytest.raises(TypeError, match="soft_dtw_from_cost: bandwidth: expected an integer"):
        soft_dtw_from_cost(cost, bandwidth=0.5)
    with pytest.raises(ValueError, match="soft_dtw_loss: target: expected shape"):
        soft_dtw_loss(cost, cost[..., :1])
    with pytest.raises(ValueError, match="gamma: expected a value above 0"):
        checked(soft_dtw_from_cost)(jnp.asarray(cost), gamma=-1.0)


def test_memory_is_a_few_lattices_without_a_feature_axis() -> None:
    size, time, steps, dim = 8, 128, 96, 64
    pred = jax.ShapeDtypeStruct((size, time, dim), jnp.float32)
    target = jax.ShapeDtypeStruct((size, steps, dim), jnp.float32)
    step = jax.value_and_grad(soft_dtw_loss, argnums=(0, 1))
    memory = jax.jit(step).lower(pred, target).compile().memory_analysis()
    lattice = size * (time + steps) * (time + 1) * 4
    assert memory.temp_size_in_bytes < 6 * lattice
