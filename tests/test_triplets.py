"""Triplets of a batch: the triple loop in value and derivatives, ties, chunks, devices, memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxloss import across, nonzero_mean
from jaxloss._core.pairwise import pairwise_cosine
from jaxloss.losses.triplets import (
    batch_all_triplet_loss,
    batch_hard_triplet_loss,
    batch_semi_hard_triplet_loss,
)

N, D, MARGIN = 9, 3, 0.5
MIB = 2**20
ONES = np.ones(N, np.float32)
LOSSES = dict(
    hard=batch_hard_triplet_loss,
    semi_hard=batch_semi_hard_triplet_loss,
    all=batch_all_triplet_loss,
)
LABELS = {
    "three classes": [0, 1, 2, 0, 1, 2, 0, 1, 2],
    "a singleton": [0, 0, 0, 0, 5, 1, 1, 1, 1],
    "one class": [4] * 9,
    "no pair": [*range(9)],
}


def draw(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, D))


def every(labels: Any, **options: Any) -> dict[str, Callable[[Any], Any]]:
    """Units of all losses, with the hinge and with softplus, as functions of the embeddings."""
    options = dict(labels=labels, margin=MARGIN, reduction="none") | options
    return {
        f"{name}{' soft' * soft}": partial(loss, soft=soft, **options)
        for name, loss in LOSSES.items()
        for soft in (False, True)
    }


@partial(jax.jit, static_argnames="size")
def units_and_gradients(
    x: Any, labels: Any, where: Any, weights: Any, size: int | None = None
) -> Any:
    """Units, and the gradients of their sums, in which each column has one of the weights."""
    units, gradients = {}, {}
    for name, call in every(labels, where=where, chunk_size=size).items():
        units[name], pull = jax.vjp(call, x)
        ones = jnp.ones_like(units[name])
        (gradients[name],) = pull((ones.T * weights).T if ones.ndim else ones)
    return units, gradients


@jax.jit
def means_and_gradients(x: Any, labels: Any, margin: Any, where: Any) -> Any:
    call = lambda loss: lambda x: loss(x, labels, margin=margin, where=where)
    return [jax.value_and_grad(call(loss))(x) for loss in LOSSES.values()]


def by_loop(x: np.ndarray, labels: Any, where: np.ndarray) -> dict[str, np.ndarray]:
    """The definitions, one triplet after the other."""
    d = np.linalg.norm(x[:, None] - x, axis=-1)
    out = {}
    for soft in (False, True):
        cost = (lambda gap: np.log1p(np.exp(gap))) if soft else (lambda gap: max(gap, 0.0))
        hard, semi, found = np.zeros(N), np.zeros((N, N)), []
        for a in range(N):
            others = [i for i in range(N) if where[a] and where[i] and i != a]
            near = [p for p in others if labels[p] == labels[a]]
            far = [d[a, n] for n in others if labels[n] != labels[a]]
            if near and far:
                hard[a] = cost(max(d[a, p] for p in near) - min(far) + MARGIN)
            for p in near if far else ():
                farther = [y for y in far if y > d[a, p]]
                semi[a, p] = cost(d[a, p] - (min(farther) if farther else max(far)) + MARGIN)
                found += [cost(d[a, p] - y + MARGIN) for y in far]
        active = sum(value > 0 for value in found)
        for name, value in dict(hard=hard, semi_hard=semi, all=sum(found) / max(active, 1)).items():
            out[f"{name}{' soft' * soft}"] = np.asarray(value)
    return out


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_units_are_those_of_the_triple_loop(labels) -> None:
    labels = np.asarray(labels, np.int32)
    for seed in range(3):
        x, where = draw(seed), np.random.default_rng(seed).random(N) < 0.8
        with jax.enable_x64(True):
            units, gradients = units_and_gradients(x, labels, where, ONES)
        expected = by_loop(x, labels, where)
        for name in expected:
            np.testing.assert_allclose(units[name], expected[name], atol=1e-13, err_msg=name)
            assert np.all(np.isfinite(gradients[name])), name
            assert not np.any(gradients[name][~where]), name
            if not np.any(expected[name]):
                assert not np.any(gradients[name]), name


def test_ties_and_coincident_points_have_the_value_of_the_loop_and_finite_gradients() -> None:
    labels, where = np.asarray(LABELS["three classes"], np.int32), np.ones(N, bool)
    for seed in range(5):
        half = np.random.default_rng(seed).integers(0, 2, (N // 2, D))
        x = np.concatenate([half, -half, 0 * half[:1]]).astype(np.float64)  # no rounding: mean 0
        with jax.enable_x64(True):
            units, gradients = units_and_gradients(x, labels, where, ONES)
        expected = by_loop(x, labels, where)
        for name in expected:
            np.testing.assert_allclose(units[name], expected[name], atol=1e-13, err_msg=name)
            assert np.all(np.isfinite(gradients[name])), name


def test_a_batch_in_one_point_costs_the_margin_without_a_gradient() -> None:
    labels, where = np.asarray(LABELS["three classes"], np.int32), np.ones(N, bool)
    for point in (0.0, 1.0, -1e4):
        units, gradients = units_and_gradients(
            np.full((N, D), point, np.float32), labels, where, ONES
        )
        np.testing.assert_allclose(units["hard"], MARGIN)
        np.testing.assert_allclose(units["all"], MARGIN)
        for gradient in gradients.values():
            np.testing.assert_array_equal(gradient, 0)


def test_sums_by_counting_have_every_derivative_of_the_sum_over_triplets() -> None:
    labels = np.asarray(LABELS["a singleton"], np.int32)

    def plain(x, margin):
        square = jnp.sum((x[:, None] - x[None]) ** 2, axis=-1)
        d = jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
        same = labels[:, None] == labels
        triplets = (same & ~np.eye(N, dtype=bool))[:, :, None] & ~same[:, None, :]
        values = jnp.where(triplets, jax.nn.relu(d[:, :, None] - d[:, None, :] + margin), 0)
        return jnp.sum(values) / jnp.sum(values > 0)

    counted = lambda x, margin: batch_all_triplet_loss(x, labels, margin=margin)

    def derivatives(loss, x, margin, moved):
        gradient = jax.grad(loss, (0, 1))
        second = jax.jvp(gradient, (x, margin), (moved, margin))[1]
        return dict(first=gradient(x, margin), second=second, value=loss(x, margin))

    with jax.enable_x64(True):
        arrays = draw(1), np.float64(MARGIN), draw(2)
        got, expected = (
            jax.jit(derivatives, static_argnums=0)(f, *arrays) for f in (counted, plain)
        )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_the_mean_over_costly_anchors_is_the_mean_over_triplets_of_the_peers() -> None:
    labels = np.asarray(LABELS["three classes"], np.int32)
    x = (draw() + 2 * labels[:, None]).astype(np.float32)

    @jax.jit
    def run(x):
        loss = partial(batch_hard_triplet_loss, x, labels, margin=MARGIN)
        return [loss(reduction=reduction) for reduction in ("none", "mean", nonzero_mean)]

    units, mean, costly = jax.device_get(run(x))
    assert np.any(units == 0)
    assert np.any(units > 0)
    np.testing.assert_allclose(mean, np.mean(units), rtol=1e-6)
    np.testing.assert_allclose(costly, np.mean(units[units > 0]), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_embeddings_of_any_scale_are_in_range(scale) -> None:
    labels, x = np.asarray(LABELS["three classes"], np.int32), draw().astype(np.float32)
    both = lambda x, margin: means_and_gradients(x, labels, np.float32(margin), np.ones(N, bool))
    here, there = both(x, MARGIN), both(x * np.float32(scale), MARGIN * scale)
    for (value, gradient), (scaled, slope) in zip(here, there, strict=True):
        np.testing.assert_allclose(scaled, value * scale, rtol=1e-5)
        np.testing.assert_allclose(slope, gradient, rtol=1e-4, atol=1e-6)


def test_partners_of_shifted_embeddings_are_found_and_measured_exactly() -> None:
    labels = np.asarray(LABELS["three classes"], np.int32)
    x = (1000 + draw()).astype(np.float32)
    where = np.arange(N) != 4
    units = batch_hard_triplet_loss(x, labels, margin=MARGIN, where=where, reduction="none")
    expected = by_loop(x.astype(np.float64), labels, where)["hard"]
    np.testing.assert_allclose(units, expected, rtol=1e-6, atol=1e-6)


def test_a_sample_that_is_no_number_makes_the_loss_nan() -> None:
    x, labels = draw().astype(np.float32), np.asarray(LABELS["a singleton"], np.int32)
    for row in (0, 4):
        bad = x.copy()
        bad[row, 1] = np.nan
        means = partial(means_and_gradients, bad, labels, np.float32(1))
        assert all(np.isnan(value) for value, _ in means(np.ones(N, bool)))
        assert all(np.isfinite(value) for value, _ in means(np.arange(N) != row))


def test_chunks_change_neither_value_nor_gradient() -> None:
    labels = np.asarray(LABELS["three classes"], np.int32)
    weights = np.linspace(0.5, 2, N, dtype=np.float32)
    run = partial(units_and_gradients, draw(), labels, np.ones(N, bool), weights)
    with jax.enable_x64(True):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-13), run(size=4), run())


def test_chunks_over_devices_give_what_one_device_gives() -> None:
    x = np.random.default_rng(0).standard_normal((32, D)).astype(np.float32)
    labels = (np.arange(32) * 7 % 5).astype(np.int32)

    def total(x, labels, **options):
        return sum(loss(x, labels, **options) for loss in LOSSES.values())

    expected = jax.jit(jax.value_and_grad(total))(x, labels)
    chunked = jax.value_and_grad(partial(total, chunk_size=2))
    spec = PartitionSpec("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = [jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, labels)]
        explicit = jax.jit(chunked)(*put)

    def local(x, labels):
        mean = across("data")
        rest = dict(chunk_size=2, axis_name="data")
        return (
            batch_hard_triplet_loss(x, labels, reduction=mean, **rest)
            + batch_semi_hard_triplet_loss(x, labels, reduction=mean, **rest)
            + batch_all_triplet_loss(x, labels, **rest)
        )

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec())
    for got in (explicit, jax.jit(jax.value_and_grad(mapped))(x, labels)):
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(jax.device_get(got[1]), expected[1], atol=1e-6)


def test_a_distance_is_used_for_the_choice_and_for_the_cost() -> None:
    x, labels = draw().astype(np.float32), np.asarray(LABELS["three classes"], np.int32)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = lambda a, b: 1 - pairwise_cosine(a, b)
    squares = lambda a, b: 0.5 * jnp.sum((a[:, None] - b[None]) ** 2, axis=-1)

    @jax.jit
    def run(x, unit):
        calls = every(labels, distance=cosine), every(labels, distance=squares)
        return {name: (calls[0][name](x), calls[1][name](unit)) for name in calls[0]}

    for name, (value, same) in run(x, unit).items():
        np.testing.assert_allclose(value, same, atol=1e-6, err_msg=name)


def test_a_distance_without_a_gradient_at_zero_does_no_harm_where_nothing_coincides() -> None:
    x, labels = draw().astype(np.float32), np.asarray(LABELS["a singleton"], np.int32)
    naive = lambda a, b: jnp.sqrt(jnp.sum((a[:, None] - b[None]) ** 2, axis=-1))
    where = np.arange(N) != 2
    loss = lambda x, d: batch_hard_triplet_loss(x, labels, distance=d, where=where)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_allclose(gradient(x, naive), gradient(x, None), atol=1e-6)


def test_a_distance_of_the_wrong_shape_and_a_wrong_chunk_size_raise() -> None:
    x, labels = draw().astype(np.float32), np.asarray(LABELS["three classes"], np.int32)
    for name, loss in LOSSES.items():
        with pytest.raises(ValueError, match=r"distance: expected shape \(9, 9\), got \(9,\)"):
            loss(x, labels, distance=lambda a, _: a[:, 0])
        with pytest.raises(ValueError, match=f"batch_{name}.*chunk_size: expected at least 1"):
            loss(x, labels, chunk_size=0)
        with pytest.raises(TypeError, match="chunk_size: expected an integer"):
            loss(x, labels, chunk_size=2.5)


def temporaries(loss: Any, batch: int, features: int, **options: Any) -> float:
    """MiB that value and gradient need beside the embeddings and their gradient."""
    x = jax.ShapeDtypeStruct((batch, features), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda x, y: loss(x, y, **options)))
    return step.lower(x, labels).compile().memory_analysis().temp_size_in_bytes / MIB


def test_the_hardest_triplets_need_one_array_of_all_pairs_and_none_for_the_gradient() -> None:
    matrix = 2048**2 * 4 / MIB
    rows = 2048 * 128 * 4 / MIB
    assert temporaries(batch_hard_triplet_loss, 2048, 128) < matrix + 10 * rows
    assert temporaries(batch_hard_triplet_loss, 2048, 128, chunk_size=128) < matrix / 8 + 10 * rows


def test_all_triplets_need_a_few_arrays_of_all_pairs_and_no_cube() -> None:
    matrix, cube = 512**2 * 4 / MIB, 512**3 / MIB  # a cube of bools
    assert temporaries(batch_all_triplet_loss, 512, 64) < 12 * matrix < cube / 10
    assert temporaries(batch_semi_hard_triplet_loss, 512, 64) < 16 * matrix
    assert temporaries(batch_all_triplet_loss, 512, 64, chunk_size=64) < 6 * matrix
    assert temporaries(batch_all_triplet_loss, 512, 64, soft=True) < cube
    assert temporaries(batch_all_triplet_loss, 512, 64, soft=True, chunk_size=1) < 16 * matrix
