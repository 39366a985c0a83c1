"""Maximum mean discrepancy: the double loop, masks, chunks, devices, close points, bandwidths."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.spatial.distance import pdist

from jaxloss.losses.kernels import imq, median_bandwidth, mmd_loss, polynomial, rbf, rbf_mixture

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((6, 3)).astype(np.float32)
Y = (0.5 + GENERATOR.standard_normal((4, 3))).astype(np.float32)
KEPT, Y_KEPT = np.arange(6) != 1, np.arange(4) != 3
square = lambda a, b: float(np.sum((np.float64(a) - b) ** 2))
gaussian = lambda a, b, scale: np.exp(-square(a, b) / (2 * scale**2))
KERNELS: dict[str, Any] = {
    "default": (None, lambda a, b: np.mean([gaussian(a, b, s) for s in (0.2, 0.5, 0.9, 1.3)])),
    "rbf": (rbf(1.5), lambda a, b: gaussian(a, b, 1.5)),
    "polynomial": (polynomial(2, 0.7, 0.3), lambda a, b: (0.7 * np.dot(a, b) + 0.3) ** 2),
    "imq": (imq(0.8, 0.7), lambda a, b: (1 + square(a, b) / 0.64) ** -0.7),
    "function": (lambda a, b: a @ b.T, lambda a, b: float(np.dot(np.float64(a), b))),
}


def by_loop(kernel: Any, x: Any, y: Any, unbiased: bool) -> float:
    def mean(x: Any, y: Any, skip: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (skip and i == j)]
        return float(np.mean([kernel(x[i], y[j]) for i, j in pairs]))

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


@pytest.mark.parametrize(("kernel", "plain"), KERNELS.values(), ids=KERNELS)
def test_values_are_those_of_the_double_loop_over_the_points_that_count(kernel, plain) -> None:
    hidden = lambda a, kept: np.where(kept[:, None], a, np.nan)
    for unbiased in (False, True):
        options = dict(kernel=kernel, unbiased=unbiased)
        whole = mmd_loss(X, Y, **options)
        np.testing.assert_allclose(whole, by_loop(plain, X, Y, unbiased), rtol=2e-5, atol=1e-6)
        call = lambda x, y, o=options: mmd_loss(x, y, where=KEPT, y_where=Y_KEPT, **o)
        both = jax.jit(jax.value_and_grad(call, (0, 1)))
        value, gradient = both(hidden(X, KEPT), hidden(Y, Y_KEPT))
        exact = by_loop(plain, X[KEPT], Y[Y_KEPT], unbiased)
        np.testing.assert_allclose(value, exact, rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(gradient[0][1], 0)
        np.testing.assert_array_equal(gradient[1][3], 0)
        assert all(np.isfinite(g).all() for g in gradient)


def test_a_linear_kernel_compares_means_and_a_polynomial_one_moments() -> None:
    gap = np.mean(X, 0) - np.mean(Y, 0)
    np.testing.assert_allclose(mmd_loss(X, Y, kernel=polynomial(1)), gap @ gap / 3, rtol=1e-5)
    shuffled = np.float32([[1, 0], [-1, 0], [0, 1], [0, -1]])
    turned = shuffled @ np.float32([[0.8, 0.6], [-0.6, 0.8]])  # the same first two moments
    value = mmd_loss(shuffled, turned, kernel=polynomial(2))
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert mmd_loss(shuffled, turned, kernel=polynomial(4)) > 1e-3


@pytest.mark.parametrize("features", [2, 200], ids=["differences", "products"])
def test_equal_and_very_close_samples_far_from_zero_are_not_below_zero(features) -> None:
    """A squared distance by products may be negative, and so exceed the largest similarity."""
    kernels = None, rbf(0.1), imq()
    call = lambda kernel, x, y: mmd_loss(x, y, kernel=kernel)
    both = jax.jit(jax.value_and_grad(call, (1, 2)), static_argnums=0)
    x = 1e3 + GENERATOR.standard_normal((8, features)).astype(np.float32)
    for near in (x, x[::-1], x + np.float32(1e-3)):
        for kernel in kernels:
            value, gradient = both(kernel, x, np.ascontiguousarray(near))
            assert 0 <= value < 1e-3
            assert all(np.isfinite(g).all() for g in gradient)


def test_small_samples_have_a_value_or_are_no_unit() -> None:
    one = X[:1]
    kernel, plain = KERNELS["rbf"]
    value = mmd_loss(one, Y, kernel=kernel)
    np.testing.assert_allclose(value, by_loop(plain, one, Y, False), rtol=1e-5)
    value, gradient = jax.jit(jax.value_and_grad(partial(mmd_loss, unbiased=True)))(one, Y)
    np.testing.assert_array_equal([value, *np.ravel(gradient)], 0)
    pairs = np.stack([X, X]), np.stack([Y, Y])
    where = np.stack([np.arange(6) < 1, np.ones(6, bool)])
    units = mmd_loss(*pairs, where=where, unbiased=True, reduction="none")
    mean = mmd_loss(*pairs, where=where, unbiased=True)
    assert units[0] == 0
    assert mean == units[1] == mmd_loss(X, Y, unbiased=True)


def test_the_unbiased_statistic_may_be_below_zero_and_has_mean_zero() -> None:
    samples = GENERATOR.standard_normal((2, 400, 10, 2)).astype(np.float32)
    units = mmd_loss(*samples, kernel=rbf(1.0), unbiased=True, reduction="none")
    assert np.min(units) < 0
    assert abs(np.mean(units)) < 4 * np.std(units) / 20
    assert np.min(mmd_loss(*samples, kernel=rbf(1.0), reduction="none")) > 0


def test_chunks_and_devices_have_value_and_gradient_of_the_whole() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = PartitionSpec("data")

    masks = dict(where=KEPT, y_where=Y_KEPT, unbiased=True)

    def local(x: Any, y: Any, where: Any, y_where: Any) -> Any:
        options = dict(masks, where=where, y_where=y_where, chunk_size=2, axis_name="data")
        return mmd_loss(x, y, **options)

    def all_of(x: Any, y: Any) -> Any:
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(split,) * 4, out_specs=PartitionSpec())
        whole, parts = partial(mmd_loss, **masks), partial(mmd_loss, chunk_size=4, **masks)
        functions = (whole, parts, lambda x, y: mapped(x, y, KEPT, Y_KEPT))
        return [jax.value_and_grad(f, (0, 1))(x, y) for f in functions]

    with jax.enable_x64(True):
        whole, *others = jax.device_get(jax.jit(all_of)(np.float64(X), np.float64(Y)))
    for other in others:
        compare = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
        jax.tree.map(compare, other, whole)


def test_bandwidths_may_be_learned() -> None:
    with jax.enable_x64(True):
        x, y = np.float64(X), np.float64(Y)
        for make in (rbf, imq, lambda s: rbf_mixture((0.5, s)), lambda s: polynomial(2, s)):
            call = lambda s, f=make: mmd_loss(x, y, kernel=f(s))
            both = jax.jit(jax.value_and_grad(call))
            slope = (both(0.9 + 1e-5)[0] - both(0.9 - 1e-5)[0]) / 2e-5
            np.testing.assert_allclose(both(0.9)[1], slope, rtol=1e-6)


def test_the_short_rule_of_gaussians_has_all_derivatives() -> None:
    def plain(x: Any, y: Any) -> Any:
        far = jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)
        return sum(jnp.exp(-far / (2 * s**2)) for s in (0.2, 0.5, 0.9, 1.3)) / 4

    with jax.enable_x64(True):
        x, y = np.float64(X), np.float64(Y)
        moved = GENERATOR.standard_normal(x.shape)

        def all_of(kernel: Any) -> Any:
            gradient = jax.grad(lambda x: mmd_loss(x, y, kernel=kernel))
            return gradient(x), jax.jvp(gradient, (x,), (moved,))[1]

        got, expected = jax.jit(lambda: (all_of(rbf_mixture()), all_of(plain)))()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), got, expected)


def test_the_median_bandwidth_is_that_of_all_pairs_and_has_no_gradient() -> None:
    exact = np.median(pdist(np.concatenate([X, Y])))
    np.testing.assert_allclose(median_bandwidth(X, Y), exact, rtol=1e-6)
    hidden = np.where(KEPT[:, None], X, np.nan)
    found = median_bandwidth(hidden, Y, where=KEPT, y_where=Y_KEPT)
    exact = np.median(pdist(np.concatenate([X[KEPT], Y[Y_KEPT]])))
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(jax.grad(median_bandwidth))(X, Y), 0)
    same = np.ones((3, 2), np.float32)
    assert median_bandwidth(same, same) == 1
    assert median_bandwidth(X[:1], Y[:0]) == 1
    with pytest.raises(ValueError, match=r"median_bandwidth: x: expected shape \(n, features\)"):
        median_bandwidth(X[0], Y)


def test_options_of_kernels_are_checked_by_name() -> None:
    with pytest.raises(ValueError, match=r"mmd_loss: kernel: expected shape \(6, 6\)"):
        mmd_loss(X, Y, kernel=lambda x, y: jnp.zeros(3))
    with pytest.raises(ValueError, match="polynomial: degree: expected at least 1, got 0"):
        polynomial(0)(X, Y)
    with pytest.raises(ValueError, match="rbf: bandwidth: expected"):
        rbf(np.ones(2))(X, Y)
    with pytest.raises(ValueError, match=r"mmd_loss: y_where: expected shape \(4,\)"):
        mmd_loss(X, Y, y_where=KEPT)
    with pytest.raises(ValueError, match="mmd_loss: y: expected shape"):
        mmd_loss(X, Y[:, :2])


def test_memory_is_a_few_matrices_of_pairs_or_chunks_of_them() -> None:
    count, features = 1024, 64
    samples = [jax.ShapeDtypeStruct((count, features), jnp.float32)] * 2

    def matrices(**options: Any) -> float:
        call = partial(mmd_loss, **options)
        found = jax.jit(jax.value_and_grad(call, (0, 1))).lower(*samples).compile()
        return found.memory_analysis().temp_size_in_bytes / (4 * count**2)

    assert matrices() <= 14  # one of all features: 64
    assert matrices(chunk_size=128) < 4
