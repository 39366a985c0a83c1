"""Statistics of embeddings: far and equal rows, past batches, white views, singular values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from oracle import units_and_gradient

from jaxloss._core.reductions import across
from jaxloss.losses.representation_statistics import (
    alignment_loss,
    mmcr_loss,
    sigreg_loss,
    tico_loss,
    uniformity_loss,
    w_mse_loss,
)

N, D = 16, 3
GENERATOR = np.random.default_rng(0)
QUERY = GENERATOR.standard_normal((N, D)).astype(np.float32)
KEYS = (QUERY + 0.3 * GENERATOR.standard_normal((N, D))).astype(np.float32)
VIEWS = np.stack([QUERY, KEYS])
WHERE = GENERATOR.random(N) < 0.7
WHERE[0] = False
KEY = np.array([3, 4], np.uint32)


def hidden(x: Any, axis: int = 0) -> Any:
    return np.where(np.expand_dims(WHERE, [i for i in range(x.ndim) if i != axis]), x, np.nan)


def unit(x: Any) -> Any:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Alignment and uniformity


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
def test_alignment_is_the_power_of_the_distance_and_flat_at_equality(alpha: float) -> None:
    exact = np.linalg.norm(QUERY.astype(np.float64) - KEYS, axis=-1) ** alpha
    units, _ = units_and_gradient(alignment_loss, QUERY, KEYS, alpha=alpha)
    np.testing.assert_allclose(units, exact, rtol=1e-6)
    units, slope = units_and_gradient(alignment_loss, QUERY, QUERY, alpha=alpha)
    np.testing.assert_array_equal(units, 0)
    np.testing.assert_array_equal(slope, 0)
    np.testing.assert_allclose(
        alignment_loss(QUERY, KEYS), alignment_loss(QUERY, KEYS, alpha=jnp.float32(2)), rtol=1e-6
    )


def uniformity(x: Any, t: float = 2.0) -> float:
    x = np.asarray(x, np.float64)
    squares = np.sum((x[:, None] - x) ** 2, -1)[np.triu_indices(len(x), 1)]
    return np.log(np.mean(np.exp(-t * (squares - squares.min())))) - t * squares.min()


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e4])
def test_rows_far_apart_do_not_underflow_to_minus_infinity(scale: float) -> None:
    """The authors' `exp().mean().log()` is -inf from a distance of about 7 on."""
    far = (scale * QUERY).astype(np.float32)
    value, slope = jax.value_and_grad(uniformity_loss)(far)
    np.testing.assert_allclose(value, uniformity(far), rtol=1e-5)
    assert np.all(np.isfinite(slope))


def test_uniformity_of_masked_equal_and_single_rows() -> None:
    got = uniformity_loss(hidden(QUERY), t=0.7, where=WHERE)
    np.testing.assert_allclose(got, uniformity(QUERY[WHERE], 0.7), rtol=1e-5)
    equal = np.tile(QUERY[:1], (4, 1))
    for rows in (equal, equal[:1]):  # no distance at all; no pair at all
        value, slope = jax.value_and_grad(uniformity_loss)(rows)
        assert value == 0
        np.testing.assert_array_equal(slope, 0)


# TiCo


def test_two_steps_of_tico_pass_on_the_covariance_and_stop_the_old_one() -> None:
    state, exact = np.zeros((D, D), np.float32), np.zeros((D, D))
    for step in range(2):
        query, keys = QUERY[step:], KEYS[step:]
        where = WHERE[step:]
        kept, others = unit(query)[where], unit(keys)[where]
        moment = kept.T @ kept / len(kept)
        exact = 0.9 * exact + 0.1 * moment
        expected = 1 - np.mean(np.sum(kept * others, -1)) + 8 * np.sum(exact * moment)
        loss, state = tico_loss(hidden(QUERY)[step:], hidden(KEYS)[step:], state, where=where)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(state, exact, rtol=1e-5, atol=1e-8)
    total = lambda state: sum(map(jnp.sum, tico_loss(QUERY, KEYS, state)))
    np.testing.assert_array_equal(jax.grad(total)(state), 0)
    loss, same = tico_loss(QUERY, KEYS, state, where=np.zeros(N, bool))
    assert loss == 0
    np.testing.assert_array_equal(same, state)


# W-MSE


def w_mse(query: Any, keys: Any) -> Any:
    """The authors' formula with one sub-batch and without shrinkage."""

    def white(x: Any) -> Any:
        x = np.asarray(x, np.float64)
        root = np.linalg.cholesky(np.cov(x.T))
        return np.linalg.solve(root, (x - x.mean(0)).T).T

    return 2 - 2 * np.sum(unit(white(query)) * unit(white(keys)), -1)


def test_white_views_are_those_of_the_authors_and_keep_nothing_of_scale_or_offset() -> None:
    got = w_mse_loss(hidden(QUERY), hidden(KEYS), eps=0.0, where=WHERE, reduction="none")
    exact = w_mse(QUERY[WHERE], KEYS[WHERE])
    np.testing.assert_allclose(got[WHERE], exact, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(got[~WHERE], 0)
    turned = QUERY @ np.array([[2, 1, -1], [0, 0.5, 3], [0, 0, 4]], np.float32) + 10
    np.testing.assert_allclose(
        w_mse_loss(turned, KEYS, eps=0.0), w_mse_loss(QUERY, KEYS, eps=0.0), rtol=1e-4
    )


@pytest.mark.parametrize("scale", [0.0, 1e-10, 1.0, 1e8])
def test_more_features_than_rows_constant_features_and_single_rows_are_finite(scale: float) -> None:
    wide = (scale * GENERATOR.standard_normal((2, 4, 9))).astype(np.float32)
    wide[..., 2] = 0.1
    for rows in (wide, wide[:, :1]):
        value, slope = jax.value_and_grad(w_mse_loss)(*rows)
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))
    assert w_mse_loss(*wide[:, :1]) == 0  # one row has no covariance


# MMCR


def test_mmcr_is_made_of_nuclear_norms_of_means_and_of_views() -> None:
    rows = unit(VIEWS[:, WHERE])
    nuclear = lambda x: np.linalg.svd(x, compute_uv=False).sum(-1)
    exact = -nuclear(rows.mean(0)) + 0.2 * nuclear(rows.swapaxes(0, 1)).mean()
    got = mmcr_loss(hidden(VIEWS, 1), local_weight=0.2, where=WHERE)
    np.testing.assert_allclose(got, exact, rtol=1e-5)


def test_equal_and_vanishing_singular_values_have_finite_exact_derivatives() -> None:
    """The derivatives of singular vectors, by which autodiff would go, are NaN there."""
    equal = np.eye(4, 3, dtype=np.float32)[None]  # three values 1, and a zero row
    flat = np.tile(np.array([3, 4, 0], np.float32), (1, 4, 1))  # one value
    zero = np.zeros((1, 4, 3), np.float32)
    for x in (equal, flat, zero):
        slope = jax.grad(mmcr_loss)(x)
        curve = jax.jvp(jax.grad(mmcr_loss), (x,), (np.ones_like(x),))[1]
        assert np.all(np.isfinite(slope))
        assert np.all(np.isfinite(curve))
    with jax.enable_x64(True):
        x = equal + 0.0 * np.ones((1, 4, 3))
        x[0, 3] = [1.0, 2.0, 2.0]
        x = np.concatenate([x, np.roll(x, 1, axis=-1)])
        step = 1e-6 * GENERATOR.standard_normal(x.shape)
        both = jax.value_and_grad(lambda x: mmcr_loss(x, local_weight=0.3))
        (up, ahead), (down, behind) = both(x + step), both(x - step)
        _, slope = both(x)
        np.testing.assert_allclose((up - down) / 2, np.sum(slope * step), rtol=1e-7)
        curve = jax.jvp(lambda x: both(x)[1], (x,), (step,))[1]
        np.testing.assert_allclose(curve, (ahead - behind) / 2, atol=1e-5 * np.abs(curve).max())


# SIGReg


def sigreg(x: Any, directions: Any, t: Any) -> float:
    """The listing in the paper, with a trapezoidal sum over all of `t`."""
    phases = (np.asarray(x, np.float64) @ directions)[..., None] * t
    normal = np.exp(-(t**2) / 2)
    error = np.abs(np.exp(1j * phases).mean(0) - normal) ** 2 * normal
    return len(x) * np.mean(np.sum((error[:, 1:] + error[:, :-1]) / 2, -1) * (t[1] - t[0]))


@pytest.mark.parametrize(("points", "t_max"), [(17, 3.0), (9, 5.0)])
def test_sigreg_is_the_statistic_of_the_paper(points: int, t_max: float) -> None:
    directions = np.asarray(jax.random.normal(KEY, (8, D), jnp.float32))
    t = np.linspace(-t_max, t_max, 2 * points - 1)
    got = sigreg_loss(hidden(QUERY), key=KEY, slices=8, points=points, t_max=t_max, where=WHERE)
    np.testing.assert_allclose(got, sigreg(QUERY[WHERE], unit(directions).T, t), rtol=1e-5)


def test_sigreg_prefers_gaussian_rows_to_collapsed_and_to_scaled_ones() -> None:
    rows = np.random.default_rng(1).standard_normal((512, 8)).astype(np.float32)
    gaussian, *others = (sigreg_loss(rows * s, key=KEY) for s in np.float32([1, 0, 0.5, 2]))
    assert gaussian < 2
    assert min(others) > 10 * gaussian


def test_sigreg_does_not_keep_the_waves_of_all_points() -> None:
    rows, slices, points = 256, 128, 33
    call = lambda x: sigreg_loss(x, key=KEY, slices=slices, points=points)
    array = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(call)).lower(array).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * rows * slices * 4


# Devices, shapes


def test_statistics_are_those_of_all_devices() -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    where = WHERE.copy()
    where[:4] = False  # a device without a row
    state = np.eye(D, dtype=np.float32)

    def call(query: Any, keys: Any, where: Any, **options: Any) -> Any:
        tail = {k: v for k, v in options.items() if k != "reduction"}
        views = jnp.stack([query, keys])
        return dict(
            uniformity=uniformity_loss(query, where=where, **tail),
            tico=tico_loss(query, keys, state, where=where, **tail),
            w_mse=w_mse_loss(query, keys, where=where, **options),
            mmcr=mmcr_loss(views, local_weight=0.1, where=where, **tail),
            sigreg=sigreg_loss(query, key=KEY, slices=4, points=5, where=where, **tail),
        )

    rows = PartitionSpec("data")
    local = lambda *args: call(*args, axis_name="data", reduction=across("data"))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 3, out_specs=PartitionSpec())
    got, expected = jax.jit(mapped)(QUERY, KEYS, where), jax.jit(call)(QUERY, KEYS, where)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_wrong_shapes_and_options_raise() -> None:
    for call, text in (
        (lambda: uniformity_loss(VIEWS), r"embeddings: expected shape \(batch, features\)"),
        (lambda: mmcr_loss(QUERY), r"embeddings: expected shape \(views, batch, features\)"),
        (lambda: mmcr_loss(VIEWS, where=WHERE[:2]), r"where: expected shape \(16,\)"),
        (lambda: tico_loss(QUERY, KEYS, np.eye(2)), r"state: expected shape \(3, 3\)"),
        (lambda: w_mse_loss(QUERY, KEYS[:1]), r"keys: expected shape \(16, 3\)"),
        (lambda: sigreg_loss(QUERY, key=KEY, slices=0), "slices: expected an integer of at least"),
        (lambda: sigreg_loss(QUERY, key=KEY, points=1), "points: expected an integer of at least"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
