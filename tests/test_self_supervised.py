"""Two views without negatives: float64 statistics, over devices, of constant and huge features."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import units_and_gradient

from jaxloss._core.reductions import sequence_mean
from jaxloss.losses.self_supervised import (
    barlow_twins_loss,
    byol_loss,
    mae_loss,
    negative_cosine_loss,
    vicreg_loss,
)

N, D = 16, 5
GENERATOR = np.random.default_rng(0)
QUERY = GENERATOR.standard_normal((N, D)).astype(np.float32)
KEYS = (QUERY + 0.5 * GENERATOR.standard_normal((N, D))).astype(np.float32)
WHERE = GENERATOR.random(N) < 0.7
LAMBDA, EPS = 0.1, 1e-3
STATISTICS: dict[str, Callable[..., Any]] = {
    "barlow": lambda q, k, **options: barlow_twins_loss(
        q, k, off_diagonal_weight=LAMBDA, eps=EPS, **options
    ),
    "vicreg": lambda q, k, **options: vicreg_loss(q, k, **options)[0],
}


def barlow(query: Any, keys: Any, weight: float = LAMBDA, eps: float = EPS) -> float:
    """The authors' code in float64: batch normalisation without scale, correlation, squares."""
    normal = lambda x: (x - x.mean(0)) / np.sqrt(x.var(0) + eps)
    query, keys = (normal(np.asarray(x, np.float64)) for x in (query, keys))
    cross = query.T @ keys / len(query)
    off = cross[~np.eye(len(cross), dtype=bool)]
    return np.sum((1 - np.diag(cross)) ** 2) + weight * np.sum(off**2)


def vicreg(query: Any, keys: Any, eps: float = 1e-4) -> tuple[float, float, float]:
    """The authors' terms in float64."""
    query, keys = (np.asarray(x, np.float64) for x in (query, keys))
    variance = covariance = 0.0
    for x in (query, keys):
        variance += np.mean(np.maximum(0, 1 - np.sqrt(x.var(0, ddof=1) + eps))) / 2
        matrix = np.cov(x.T).reshape(x.shape[1], x.shape[1])
        covariance += (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)) / x.shape[1]
    return np.mean((query - keys) ** 2), variance, covariance


ORACLES: dict[str, Callable[..., float]] = {
    "barlow": barlow,
    "vicreg": lambda q, k: float(np.dot([25, 25, 1], vicreg(q, k))),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_those_of_the_formula_over_the_kept_rows(name: str) -> None:
    loss, oracle = STATISTICS[name], ORACLES[name]
    np.testing.assert_allclose(loss(QUERY, KEYS), oracle(QUERY, KEYS), rtol=2e-6)
    hidden = np.where(WHERE[:, None], QUERY, np.nan), np.where(WHERE[:, None], KEYS, np.inf)
    got = loss(*hidden, where=WHERE)
    np.testing.assert_allclose(got, oracle(QUERY[WHERE], KEYS[WHERE]), rtol=2e-6)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_large_common_offset_costs_no_digits(name: str) -> None:
    shift = np.array([1e4, -3e4, 0, 1e5, 7], np.float32)
    query, keys = QUERY + shift, KEYS + shift  # rounded, and then taken as they are
    got = STATISTICS[name](query, keys)
    np.testing.assert_allclose(got, ORACLES[name](query, keys), rtol=1e-5)


def over_devices(loss: Callable[..., Any]) -> Callable[..., Any]:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    call = lambda q, k, w: loss(q, k, where=w, axis_name="data")
    return jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 3, out_specs=PartitionSpec())


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_over_devices_are_those_of_one_device_not_local_ones(name: str) -> None:
    """With local statistics, as in lightly's Barlow Twins, value and gradient would differ."""
    loss = STATISTICS[name]
    where = np.ones(N, bool)
    where[[0, 1, 2, 3, 5, 10]] = False  # the first device has no row
    both = jax.jit(jax.value_and_grad(over_devices(loss), argnums=(0, 1)))
    value, gradients = both(QUERY, KEYS, where)
    one = jax.jit(jax.value_and_grad(lambda q, k: loss(q, k, where=where), argnums=(0, 1)))
    expected, slopes = one(QUERY, KEYS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(got, slope, atol=2e-6 * np.abs(slope).max())
    parts = [np.flatnonzero(where[i : i + 4]) + i for i in (4, 8, 12)]
    local = np.mean([ORACLES[name](QUERY[part], KEYS[part]) for part in parts])
    assert abs(local - float(expected)) > 0.05 * abs(float(expected))


def test_correlations_of_locally_standardised_rows_are_another_loss() -> None:
    """lightly adds correlations up over devices, but standardises on each for itself."""
    whole = barlow_twins_loss(QUERY, KEYS, off_diagonal_weight=LAMBDA, eps=EPS)
    normal = lambda x: (x - x.mean(0)) / np.sqrt(x.var(0) + EPS)
    halves = [slice(0, N // 2), slice(N // 2, N)]
    cross = sum(normal(QUERY[h]).T @ normal(KEYS[h]) for h in halves) / N
    off = cross[~np.eye(D, dtype=bool)]
    lightly = np.sum((1 - np.diag(cross)) ** 2) + LAMBDA * np.sum(off**2)
    assert abs(lightly - float(whole)) > 0.02 * float(whole)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_is_never_gathered(name: str, kind: Any) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(STATISTICS[name])).lower(put(QUERY), put(KEYS))
    assert "all-gather" not in lowered.compile().as_text()


@pytest.mark.parametrize("name", STATISTICS)
def test_memory_is_a_few_matrices_of_features_by_features(name: str) -> None:
    rows, features = 32, 1024
    array = jax.ShapeDtypeStruct((rows, features), jnp.float32)
    both = jax.jit(jax.value_and_grad(STATISTICS[name], argnums=(0, 1)))
    peak = both.lower(array, array).compile().memory_analysis().temp_size_in_bytes
    matrices = {"barlow": 2, "vicreg": 4}[name]
    assert peak < matrices * features**2 * 4 + 12 * rows * features * 4


@pytest.mark.parametrize("name", STATISTICS)
def test_constant_features_and_extreme_scales_are_finite(name: str) -> None:
    constant = QUERY.copy()
    constant[:, 1] = 0.1
    zero = np.zeros_like(QUERY)
    pairs = [(constant, KEYS), (constant, constant), (zero, zero), (QUERY, zero)]
    if name == "barlow":  # a correlation does not change with the unit
        pairs += [(QUERY * np.float32(s), KEYS * np.float32(s)) for s in (1e-25, 1e25, 1e30)]
    both = jax.vmap(jax.value_and_grad(STATISTICS[name], argnums=(0, 1)))
    values, gradients = jax.jit(both)(*(np.stack(x) for x in zip(*pairs, strict=True)))
    for leaf in jax.tree.leaves((values, gradients)):
        assert np.all(np.isfinite(leaf))
    expected = [ORACLES[name](*pair) for pair in pairs]
    np.testing.assert_allclose(values, expected, rtol=2e-5)


def test_one_row_has_correlation_zero_and_no_variance() -> None:
    one = jax.value_and_grad(lambda q: barlow_twins_loss(q, KEYS[:1]))
    value, gradient = one(QUERY[:1])
    assert value == D
    np.testing.assert_array_equal(gradient, 0)
    out = jax.value_and_grad(vicreg_loss, has_aux=True)(QUERY[:1], KEYS[:1])
    for leaf in jax.tree.leaves(out):  # the total, its terms and the gradient
        np.testing.assert_array_equal(leaf, 0)
    alone = np.arange(N) == 3
    assert vicreg_loss(QUERY, KEYS, where=alone)[0] == 0


def test_two_equal_views_of_uncorrelated_features_cost_nothing() -> None:
    views = np.sqrt(8) * np.linalg.qr(np.c_[np.ones(8), np.eye(8)[:, :4]])[0][:, 1:]
    views = views.astype(np.float32)  # mean 0, variance 1, correlation 0
    assert barlow_twins_loss(views, views, eps=0.0) < 1e-11
    total, terms = vicreg_loss(views, views)
    assert terms["invariance"] == terms["variance"] == 0
    assert total == terms["covariance"] < 1e-11


def test_vicreg_terms_are_named_unweighted_and_carry_no_gradient() -> None:
    total, terms = vicreg_loss(QUERY, KEYS, invariance=2.0, variance=3.0, covariance=5.0)
    expected = dict(zip(("invariance", "variance", "covariance"), vicreg(QUERY, KEYS), strict=True))
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=2e-6)
    np.testing.assert_allclose(total, np.dot([2, 3, 5], list(expected.values())), rtol=2e-6)
    slope = jax.grad(lambda q: sum(vicreg_loss(q, KEYS)[1].values()))(QUERY)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("where", [np.ones((N, D), bool), np.ones(N - 1, bool)])
def test_a_mask_has_one_entry_for_each_row(where: Any) -> None:
    for name, loss in STATISTICS.items():
        with pytest.raises(ValueError, match=rf"{name}\w*_loss: where: expected shape \(16,\)"):
            loss(QUERY, KEYS, where=where)


# Cosines


def test_byol_is_twice_one_plus_the_negative_cosine_and_the_target_is_stopped() -> None:
    wide = KEYS.astype(np.float64) * QUERY
    norms = np.linalg.norm(KEYS, axis=-1) * np.linalg.norm(QUERY, axis=-1)
    cosines = wide.sum(-1) / norms
    near = negative_cosine_loss(QUERY, KEYS, reduction="none")
    np.testing.assert_allclose(near, -cosines, atol=1e-6)
    np.testing.assert_allclose(byol_loss(QUERY, KEYS, reduction="none"), 2 - 2 * cosines, atol=2e-6)
    for loss in (negative_cosine_loss, byol_loss):
        np.testing.assert_array_equal(jax.grad(loss, argnums=1)(QUERY, KEYS), 0)


@pytest.mark.parametrize("loss", [negative_cosine_loss, byol_loss])
def test_zero_vectors_have_cosine_zero_and_gradient_zero(loss: Any) -> None:
    pred, target = QUERY[:4].copy(), KEYS[:4].copy()
    pred[0] = target[1] = pred[2] = target[2] = 0
    units, gradient = units_and_gradient(loss, pred, target)
    expected = {negative_cosine_loss: 0, byol_loss: 2}[loss]
    np.testing.assert_array_equal(units[:3], expected)
    np.testing.assert_array_equal(gradient[:3], 0)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient[3] != 0)


def test_byol_keeps_its_digits_where_the_vectors_are_almost_parallel() -> None:
    angles = np.array([1e-2, 1e-3, 1e-4, 1e-5])
    pred = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    target = np.array([[1, 0]] * 4, np.float32)
    exact = np.hypot(*pred.astype(np.float64).T)  # of the rounded vectors
    exact = 2 - 2 * np.sqrt(1 - (pred[:, 1].astype(np.float64) / exact) ** 2)
    got = byol_loss(3 * pred, target, reduction="none")
    np.testing.assert_allclose(got[:2], exact[:2], rtol=1e-4)
    np.testing.assert_allclose(got, angles**2, rtol=1e-3)


# Masked patches


def test_only_masked_patches_are_scored_against_standardised_targets() -> None:
    g = np.random.default_rng(1)
    pred, patches = (g.standard_normal((3, 4, 12)).astype(np.float32) for _ in range(2))
    patches = 5 * patches + 100
    patches[0, 0] = 0.1  # constant: its target is 0
    masked = g.random((3, 4)) < 0.6
    masked[0, 0] = True
    wide = patches.astype(np.float64)
    scale = np.sqrt(wide.var(-1, ddof=1, keepdims=True) + 1e-6)
    exact = np.mean((pred - (wide - wide.mean(-1, keepdims=True)) / scale) ** 2, -1)
    np.testing.assert_allclose(mae_loss(pred, patches, where=masked), exact[masked].mean(), 3e-6)
    each = [row[kept].mean() for row, kept in zip(exact, masked, strict=True)]
    got = mae_loss(pred, patches, where=masked, reduction=sequence_mean)
    np.testing.assert_allclose(got, np.mean(each), rtol=3e-6)
    plain = mae_loss(pred, patches, normalize_patches=False)
    np.testing.assert_allclose(plain, np.mean((pred - wide) ** 2), rtol=1e-6)


def test_standardised_patches_do_not_change_with_contrast() -> None:
    pred, patches = QUERY, KEYS
    expected = mae_loss(pred, patches, eps=0.0)
    for scale in (1e-10, 1e10, 1e30):
        got = mae_loss(pred, patches * np.float32(scale), eps=0.0)
        np.testing.assert_allclose(got, expected, rtol=2e-6)
    single = mae_loss(pred[:, :1], patches[:, :1])  # one number has no variance
    np.testing.assert_allclose(single, np.mean(pred[:, 0] ** 2), rtol=1e-6)
    with pytest.raises(ValueError, match="mae_loss: normalize_patches: expected one of"):
        mae_loss(pred, patches, normalize_patches="yes")
