"""Flow and score matching: argument order, analytic minima, traces, draws and derivatives."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxloss.losses import score_matching
from jaxloss.losses.flow_matching import flow_matching_loss, linear_interpolation
from jaxloss.losses.score_matching import (
    denoising_score_matching_loss,
    implicit_score_matching_loss,
    sliced_score_matching_loss,
)

NONE = dict(reduction="none")
KEY = jax.random.key(3)


def draw(*shape, count=2, seed=0, dtype=np.float32):
    g = np.random.default_rng(seed)
    return tuple(g.standard_normal(shape).astype(dtype) for _ in range(count))


def test_from_start_zero_to_end_one_the_velocity_is_plus_one():
    zero, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    assert flow_matching_loss(one, zero, one) == 0
    assert flow_matching_loss(-one, zero, one) == 4
    assert flow_matching_loss(one, one, zero) == 4  # time reversed


def test_the_target_is_the_derivative_of_the_path_in_time():
    start, end = draw(3, 2, 4, dtype=np.float64)
    time = np.array([0.0, 0.3, 1.0])

    @jax.jit
    def run(sigma_min):
        path = lambda t: linear_interpolation(start, end, t, sigma_min=sigma_min)
        x, velocity = jax.jvp(path, (time,), (np.ones(3),))
        return x, flow_matching_loss(velocity, start, end, sigma_min=sigma_min), path(0.3)

    with jax.enable_x64(True):
        for sigma_min in (0.0, 0.1):
            x, loss, at = jax.device_get(run(sigma_min))
            np.testing.assert_allclose(loss, 0, atol=1e-28)
            np.testing.assert_array_equal(x[0], start[0])
            np.testing.assert_allclose(x[2], end[2] + sigma_min * start[2], rtol=1e-14)
            np.testing.assert_array_equal(at[1], x[1])


def test_flow_matching_averages_each_sample_over_what_is_kept():
    velocity, start, end = draw(3, 4, 2, count=3)
    where = np.array([[True] * 4, [True, False, False, False], [False] * 4])
    error = (velocity - (end - 0.9 * start)).astype(float) ** 2
    got = flow_matching_loss(
        velocity, start, end, sigma_min=0.1, timestep_weight=np.float32([2, 3, 4]), where=where
    )
    np.testing.assert_allclose(got, (2 * error[0].mean() + 3 * error[1, 0].mean()) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="flow_matching_loss: end: expected shape"):
        flow_matching_loss(velocity, start, end[:, :1])
    with pytest.raises(ValueError, match="linear_interpolation: time: expected a scalar or shape"):
        linear_interpolation(start, end, np.ones((3, 1), np.float32))


def gauss_hermite(points=24):
    """Nodes and weights of a mean under the standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(points)
    return x, w / w.sum()


def test_denoising_score_matching_is_least_at_the_score_of_the_noisy_data():
    spread, sigma = 0.8, 0.6  # data N(0, spread^2)
    x, w = gauss_hermite()
    data, noise = (a.reshape(-1, 1) for a in np.meshgrid(spread * x, x, indexing="ij"))
    weights = np.outer(w, w).ravel()
    total = spread**2 + sigma**2

    @jax.jit
    @jax.value_and_grad
    def loss(slope):
        score = slope * (data + sigma * noise)
        return denoising_score_matching_loss(score, noise, sigma=sigma, weights=weights)

    with jax.enable_x64(True):
        value, slope = loss(-1 / total)
        np.testing.assert_allclose(slope, 0, atol=1e-13)
        np.testing.assert_allclose(value, (1 - sigma**2 / total) / 2, rtol=1e-12)
        assert loss(-1.1 / total)[0] > value < loss(-0.9 / total)[0]


def test_denoising_score_matching_divides_by_no_sigma():
    score, noise = draw(3, 4)
    sigma = np.float32([0, 1e-20, 0.5])
    loss = lambda s: denoising_score_matching_loss(s, noise, sigma=sigma, reduction="sum")
    value, slope = jax.jit(jax.value_and_grad(loss))(score)
    error = sigma[:, None].astype(float) * score + noise
    np.testing.assert_allclose(value, 0.5 * (error**2).mean(1).sum(), rtol=1e-6)
    np.testing.assert_allclose(slope, sigma[:, None] * error / 4, rtol=1e-5)
    # The form of the paper, where it can be computed.
    plain = 0.5 * 0.25 * ((score[2] + noise[2] / 0.5) ** 2).mean()
    got = denoising_score_matching_loss(score[2:], noise[2:], sigma=0.5)
    np.testing.assert_allclose(got, plain, rtol=1e-6)


def test_implicit_score_matching_is_least_at_the_score_of_the_data():
    spread = 0.8
    x, weights = gauss_hermite()
    loss = lambda slope: implicit_score_matching_loss(
        lambda x: slope * x, spread * x[:, None], weights=weights
    )
    with jax.enable_x64(True):
        value, slope = jax.jit(jax.value_and_grad(loss))(-1 / spread**2)
        np.testing.assert_allclose(slope, 0, atol=1e-13)
        np.testing.assert_allclose(value, -0.5 / spread**2, rtol=1e-12)


def mixing(kernel):
    return lambda x: jnp.tanh(x @ kernel) - 0.5 * x


def exact(kernel, x):
    """Trace and score of `mixing` by hand."""
    inner = x @ kernel
    trace = np.einsum("bj,jj->b", 1 - np.tanh(inner) ** 2, kernel) - 0.5 * x.shape[1]
    return trace, np.tanh(inner) - 0.5 * x


def test_the_trace_is_exact_and_sliced_over_all_basis_vectors_equals_it():
    (kernel,) = draw(3, 3, count=1, dtype=np.float64)
    (x,) = draw(4, 3, count=1, dtype=np.float64)
    trace, score = exact(kernel, x)
    ways = np.array([*np.eye(3), *itertools.product([-1.0, 1.0], repeat=3)])

    @jax.jit
    def run(x, ways):
        along = jax.vmap(lambda v: score_matching._along(mixing(kernel), x, x, None, v))
        return implicit_score_matching_loss(mixing(kernel), x, **NONE), along(ways)

    with jax.enable_x64(True):
        got, along = jax.device_get(run(x, ways))
    np.testing.assert_allclose(got, trace + 0.5 * (score**2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(np.sum(along[:3], axis=0), got, rtol=1e-12)
    np.testing.assert_allclose(np.mean(along[3:], axis=0), got, rtol=1e-12)


def test_one_number_has_only_one_direction():
    x, _ = draw(5, 1)
    fn = lambda x: jnp.sin(x) - x

    @jax.jit
    def run(x):
        sliced = partial(sliced_score_matching_loss, fn, x, key=KEY, **NONE)
        exactly = implicit_score_matching_loss(fn, x, **NONE)
        return exactly, [sliced(projections=projections) for projections in (1, 3)]

    exactly, sliced = run(x)
    for got in sliced:
        np.testing.assert_allclose(got, exactly, rtol=1e-6)


def test_many_projections_come_near_the_trace():
    (kernel,) = draw(3, 3, count=1)
    x, _ = draw(2, 3)

    @jax.jit
    def run(x):
        fn = mixing(kernel)
        sliced = sliced_score_matching_loss(fn, x, key=KEY, projections=2000, **NONE)
        return sliced, implicit_score_matching_loss(fn, x, **NONE)

    got, expected = run(x)
    np.testing.assert_allclose(got, expected, atol=0.15)


def test_parameters_of_the_score_get_exact_gradients_also_of_second_order_under_jit():
    (kernel,) = draw(3, 3, count=1, dtype=np.float64)
    (x,) = draw(4, 3, count=1, dtype=np.float64)
    linear = lambda kernel: implicit_score_matching_loss(lambda x: x @ kernel, x)
    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(linear))(kernel)  # tr W + |x W|^2 / 2
        second = np.einsum("bi,bj->ij", x, x) / len(x)
        np.testing.assert_allclose(slope, np.eye(3) + second @ kernel, rtol=1e-12)
        sliced = lambda kernel: sliced_score_matching_loss(mixing(kernel), x, key=KEY)
        direction = np.linspace(-1, 1, 9).reshape(3, 3)
        grad = jax.jit(jax.grad(sliced))
        bend = jax.jit(lambda k: jax.jvp(jax.grad(sliced), (k,), (direction,))[1])(kernel)
        ahead, behind = (grad(kernel + s * 1e-6 * direction) for s in (1, -1))
        np.testing.assert_allclose(bend, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


def test_hidden_positions_are_no_dimensions():
    x, _ = draw(2, 3, 2)
    where = np.array([[True, False, True], [True, True, True]])
    x[~where] = np.nan
    fn = lambda x: jnp.sin(x) - x  # each number by itself

    @jax.jit
    def run(x):
        implicit = partial(implicit_score_matching_loss, fn, where=where)
        sliced = partial(sliced_score_matching_loss, fn, key=KEY, where=where)
        alone = implicit_score_matching_loss(fn, x[:1, np.array([0, 2])])
        return [jax.value_and_grad(f)(x) for f in (implicit, sliced)], implicit(x, **NONE), alone

    found, units, alone = jax.device_get(run(x))
    for value, slope in found:
        assert np.isfinite(value)
        np.testing.assert_array_equal(slope[~where], 0)
    np.testing.assert_allclose(units[0], alone, rtol=1e-6)


def test_draws_depend_neither_on_the_mask_nor_on_the_precision_nor_on_sharding():
    (kernel,) = draw(4, 4, count=1)
    x, _ = draw(8, 4)

    @jax.jit
    def loss(x, key=KEY, where=None):
        return sliced_score_matching_loss(mixing(kernel), x, key=key, where=where, **NONE)

    whole = np.asarray(loss(x))
    where = np.arange(8) != 2
    np.testing.assert_array_equal(np.asarray(loss(x, where=where))[where], whole[where])
    with jax.enable_x64(True):
        np.testing.assert_allclose(loss(x.astype(float)), whole, rtol=1e-5, atol=1e-5)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
            np.testing.assert_allclose(loss(split), whole, rtol=1e-5, atol=1e-6)
    old = jax.random.key_data(KEY)  # raw keys work too
    np.testing.assert_array_equal(loss(x, old), whole)


def test_what_is_no_score_function_is_named_in_the_error():
    x = jnp.ones((2, 3))
    with pytest.raises(
        ValueError, match=r"sliced_score_matching_loss: score_fn\(x\): expected shap"
    ):
        sliced_score_matching_loss(lambda x: x.sum(1), x, key=KEY)
    with pytest.raises(ValueError, match="projections: expected at least 1, got 0"):
        sliced_score_matching_loss(lambda x: x, x, key=KEY, projections=0)
    with pytest.raises(TypeError, match="projections: expected an integer"):
        sliced_score_matching_loss(lambda x: x, x, key=KEY, projections=1.5)
