"""Contrastive losses: formulas by loops, chunks, rings of devices, degenerate batches, memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import logsumexp

import jaxloss
from jaxloss._core.reductions import across, sum_and_weight
from jaxloss.losses.contrastive import clip_loss, info_nce, nt_xent, siglip_loss, sup_con_loss
from jaxloss.losses.contrastive_variants import (
    decoupled_contrastive_loss,
    koleo_loss,
    n_pair_loss,
    negative_mises_fisher_weights,
)

MIB = 2**20
N, D = 10, 4
LABELS = np.array([0, 1, 0, 2, 1, 0, 3, 2, 1, 4], np.int32)  # 3 and 4 are alone
WHERE = np.arange(N) != 5


def draw(n: int = N, d: int = D, dtype: Any = np.float64) -> tuple[Any, Any]:
    query, keys = np.random.default_rng(0).standard_normal((2, n, d)).astype(dtype)
    return query, keys + query  # partners are alike


def close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = np.max(np.abs(b), initial=1e-30)
        assert np.max(np.abs(a - b), initial=0) <= tolerance * scale, f"{a}\nagainst\n{b}"


# The formulas, by loops over the samples that are kept


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_loops(value: Callable[[int, list[int]], float], kept: Any = WHERE) -> Any:
    """`value(i, others)` of each kept sample, None standing for no unit; 0 elsewhere."""
    out = np.zeros(len(kept))
    for i in np.flatnonzero(kept):
        out[i] = value(i, [j for j in np.flatnonzero(kept) if j != i]) or 0
    return out


def partners(i: int, others: list[int]) -> tuple[list[int], list[int]]:
    same = [j for j in others if LABELS[j] == LABELS[i]]
    return same, [j for j in others if LABELS[j] != LABELS[i]]


def formulas(query: Any, keys: Any) -> dict[str, Any]:
    """Units of each loss with the options of `OURS`."""
    cos, within, back = (a @ b.T for a, b in zip(*_sides(query, keys), strict=True))
    z = within / 0.3

    def nt(i: int, others: list[int]) -> float:
        same, different = partners(i, others)
        one = lambda p: logsumexp(z[i][[p, *different]]) - z[i, p]
        return float(np.mean([one(p) for p in same])) if same else 0

    def supervised(i: int, others: list[int]) -> float:
        same, _ = partners(i, others)
        return float(np.mean([logsumexp(z[i][others]) - z[i, p] for p in same])) if same else 0

    def decoupled(i: int, others: list[int]) -> float:
        ways = [(cos[i], within[i]), (cos[:, i], back[i])]
        both = [np.concatenate([a[others], b[others]]) / 0.3 for a, b in ways]
        return float(np.mean([logsumexp(b) for b in both]) - cos[i, i] / 0.3)

    def nearest(i: int, others: list[int]) -> float:
        rows = unit(query)
        return -np.log(min(np.linalg.norm(rows[i] - rows[j]) for j in others) + 1e-3)

    def products(i: int, others: list[int]) -> float:
        p = query @ keys.T
        size = np.sum(query[i] ** 2 + keys[i] ** 2)
        return logsumexp(p[i][[i, *others]]) - p[i, i] + 0.2 / 4 * size

    def sigmoids(i: int, others: list[int]) -> float:
        cost = lambda x: np.logaddexp(0, x)
        return cost(-(3 * cos[i, i] - 2)) + sum(cost(3 * cos[i, j] - 2) for j in others)

    def clip(i: int, others: list[int]) -> float:
        ways = (3 * cos[i][[i, *others]], 3 * cos[:, i][[i, *others]])
        return sum(map(logsumexp, ways)) / 2 - 3 * cos[i, i]

    ce = lambda i, others: logsumexp(cos[i][[i, *others]] / 0.3) - cos[i, i] / 0.3
    values = dict(
        info_nce=ce,
        clip_loss=clip,
        siglip_loss=sigmoids,
        nt_xent=nt,
        sup_con_loss=supervised,
        decoupled_contrastive_loss=decoupled,
        n_pair_loss=products,
        koleo_loss=nearest,
    )
    return {name: by_loops(value) for name, value in values.items()}


def _sides(query: Any, keys: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    q, k = unit(query), unit(keys)
    return (q, q, k), (k, q, k)


# Ours, as functions of a dict of floats: both arrays and the numbers


def ours(name: str, floats: Any, **options: Any) -> Any:
    q, k = floats["query"], floats["keys"]
    calls = dict(
        info_nce=lambda **o: info_nce(q, k, temperature=floats["temperature"], **o),
        nt_xent=lambda **o: nt_xent(q, LABELS, temperature=floats["temperature"], **o),
        sup_con_loss=lambda **o: sup_con_loss(q, LABELS, temperature=floats["temperature"], **o),
        clip_loss=lambda **o: clip_loss(q, k, logit_scale=floats["scale"], **o),
        siglip_loss=lambda **o: siglip_loss(
            q, k, logit_scale=floats["scale"], logit_bias=floats["bias"], **o
        ),
        decoupled_contrastive_loss=lambda **o: decoupled_contrastive_loss(
            q, k, temperature=floats["temperature"], **o
        ),
        n_pair_loss=lambda **o: n_pair_loss(q, k, l2_weight=0.2, **o),
        koleo_loss=lambda **o: koleo_loss(q, eps=1e-3, **o),
    )
    return calls[name](**options)


CHUNKED = ("info_nce", "clip_loss", "siglip_loss", "nt_xent", "sup_con_loss")
DENSE = ("decoupled_contrastive_loss", "n_pair_loss", "koleo_loss")


def floats() -> dict[str, Any]:
    query, keys = draw()
    return dict(query=query, keys=keys, temperature=0.3, scale=3.0, bias=-2.0)


def test_units_are_those_of_the_formulas_by_loops() -> None:
    @jax.jit
    def run(floats: Any) -> Any:
        units = partial(ours, floats=floats, where=WHERE, reduction="none")
        whole = {name: units(name) for name in CHUNKED + DENSE}
        return whole, {name: units(name, chunk_size=4) for name in CHUNKED}

    query, keys = draw()
    expected = formulas(query, keys)
    with jax.enable_x64(True):
        whole, chunked = jax.device_get(run(floats()))
    for name in whole:
        close(whole[name], expected[name], 1e-13)
    for name in chunked:
        close(chunked[name], expected[name], 1e-13)


def derivatives(loss: Callable[[Any], Any], floats: Any) -> dict[str, Callable[[], Any]]:
    """Value and jvp, and Hessian-vector products both ways."""
    direction = jax.tree.map(lambda x: jnp.cos(17 * x), floats)
    gradient = jax.grad(loss)
    pairs = lambda *trees: zip(*map(jax.tree.leaves, trees), strict=True)
    dot = lambda a, b: sum(jnp.sum(x * y) for x, y in pairs(a, b))
    return dict(
        jvp=lambda: jax.jvp(loss, (floats,), (direction,)),
        forward=lambda: jax.jvp(gradient, (floats,), (direction,))[1],
        reverse=lambda: jax.grad(lambda f: dot(gradient(f), direction))(floats),
    )


DERIVATIVES = {  # the laws hold others in chunks to those of a numerical oracle
    "clip_loss": ("jvp", "reverse"),
    "siglip_loss": ("jvp", "reverse"),
    "nt_xent": ("jvp", "forward"),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_in_chunks_every_derivative_is_that_of_the_whole(name: str) -> None:
    def loss(floats: Any, **options: Any) -> Any:
        return ours(name, floats, where=WHERE, weights=floats["weights"], **options)

    @jax.jit
    def run(floats: Any) -> Any:
        ways = (derivatives(partial(loss, chunk_size=size), floats) for size in (None, 4))
        return [[way[part]() for part in DERIVATIVES[name]] for way in ways]

    with jax.enable_x64(True):
        weights = np.linspace(0.2, 2, N)
        whole, chunked = jax.device_get(run(dict(floats(), weights=weights)))
    close(chunked, whole)


def test_any_chunk_size_gives_the_same_value_and_gradient() -> None:
    @jax.jit
    def run(floats: Any) -> Any:
        step = lambda name, size: jax.value_and_grad(partial(ours, name, chunk_size=size))(floats)
        sizes = dict(info_nce=(None, 1, 100), sup_con_loss=(None, 3))
        return {name: [step(name, size) for size in sizes[name]] for name in sizes}

    with jax.enable_x64(True):
        for whole, *chunked in jax.device_get(run(floats())).values():
            for got in chunked:
                close(got, whole)


@pytest.mark.parametrize("name", CHUNKED[1:])  # the first is half of the second
def test_a_ring_of_devices_is_one_device(name: str) -> None:
    split, same = PartitionSpec("data"), PartitionSpec()
    specs = dict(query=split, keys=split, temperature=same, scale=same, bias=same)
    step = jax.value_and_grad
    whole = partial(ours, name, where=WHERE)
    ring = lambda floats: _ring(name, specs)(floats, LABELS, WHERE)

    @jax.jit
    def run(floats: Any) -> Any:
        return step(whole)(floats), step(ring)(floats)

    with jax.enable_x64(True):
        expected, got = jax.device_get(run(jax.tree.map(jnp.asarray, floats())))
    close(got, expected)


def test_a_ring_is_differentiated_forward_and_lives_in_a_vmap() -> None:
    split, same = PartitionSpec("data"), PartitionSpec()
    specs = dict(query=split, keys=split, temperature=same, scale=same, bias=same)

    def mapped(floats: Any) -> Any:
        cut = lambda x: x.reshape(5, 2, *x.shape[1:]) if jnp.ndim(x) else x
        axes = {key: 0 if specs[key] == split else None for key in specs}
        local = partial(_local, "clip_loss")
        each = jax.vmap(local, in_axes=(axes, 0, 0), axis_name="data")
        return each(jax.tree.map(cut, floats), cut(LABELS), cut(WHERE))[0]

    @jax.jit
    def run(floats: Any) -> Any:
        whole = partial(ours, "clip_loss", where=WHERE)
        ring = lambda floats: _ring("clip_loss", specs)(floats, LABELS, WHERE)
        direction = jax.tree.map(jnp.ones_like, floats)
        moved = jax.jvp(ring, (floats,), (direction,))
        return moved, [jax.value_and_grad(f)(floats) for f in (mapped, whole)]

    with jax.enable_x64(True):
        moved, (got, expected) = jax.device_get(run(jax.tree.map(jnp.asarray, floats())))
    close(got, expected)
    value, slopes = expected
    close(moved, (value, sum(np.sum(slope) for slope in slopes.values())))


def _ring(name: str, specs: Any) -> Callable[..., Any]:
    mesh = jax.make_mesh((5,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:5])
    split, same = PartitionSpec("data"), PartitionSpec()
    local = partial(_local, name)
    return jax.shard_map(local, mesh=mesh, in_specs=(specs, split, split), out_specs=same)


def _local(name: str, floats: Any, labels: Any, where: Any) -> Any:
    options = dict(where=where, axis_name="data", chunk_size=1)
    return _with_labels(name, floats, labels, **options, reduction=across("data"))


def _with_labels(name: str, floats: Any, labels: Any, **options: Any) -> Any:
    if name in ("nt_xent", "sup_con_loss"):
        loss = nt_xent if name == "nt_xent" else sup_con_loss
        return loss(floats["query"], labels, temperature=floats["temperature"], **options)
    return ours(name, floats, **options)


def test_chunks_of_arrays_split_over_an_explicit_mesh_gather_no_keys() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", "y")))
    query, keys = draw(16, 4, np.float32)
    step = jax.jit(jax.value_and_grad(partial(clip_loss, chunk_size=1), (0, 1)))
    expected = jax.jit(jax.value_and_grad(clip_loss, (0, 1)))(query, keys)
    with jax.set_mesh(mesh):
        arrays = put(query), put(keys)
        compiled = step.lower(*arrays).compile()
        got = compiled(*arrays)
    close(jax.device_get(got), jax.device_get(expected), 1e-6)
    assert got[1][0].sharding.is_equivalent_to(arrays[0].sharding, 2)
    assert "f32[16,4]" not in compiled.as_text()


def test_chunks_of_arrays_split_over_an_auto_mesh_leave_the_rows_where_they_are() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    shape = jax.ShapeDtypeStruct((128, 16), jnp.float32, sharding=rows)
    step = jax.value_and_grad(partial(clip_loss, chunk_size=32), (0, 1))
    compiled = jax.jit(step).lower(shape, shape).compile()
    for slope in compiled.output_shardings[1]:
        assert slope.is_equivalent_to(rows, 2)
    text = compiled.as_text()
    assert "f32[16,32]" in text  # a block of the rows of one device with a run of keys
    assert "f32[128,32]" not in text


def test_negatives_of_each_query_or_of_all_are_the_same_where_they_are_equal() -> None:
    query, keys = draw()
    negatives = np.random.default_rng(1).standard_normal((6, D))

    @jax.jit
    def run(query: Any, keys: Any, negatives: Any) -> Any:
        def loss(query: Any, keys: Any, negatives: Any, own: bool, **options: Any) -> Any:
            met = jnp.broadcast_to(negatives, (N, *negatives.shape)) if own else negatives
            return info_nce(query, keys, negative_keys=met, where=WHERE, **options)

        ways = [dict(own=True), dict(own=False), dict(own=False, chunk_size=4)]
        ways += [dict(own=True, normalize=False), dict(own=False, normalize=False, chunk_size=4)]
        step = lambda **o: jax.value_and_grad(partial(loss, **o), (0, 1, 2))(query, keys, negatives)
        return [step(**way) for way in ways]

    with jax.enable_x64(True):
        own, shared, chunked, raw, raw_chunked = jax.device_get(run(query, keys, negatives))
    z = np.concatenate(
        [np.sum(unit(query) * unit(keys), 1)[:, None], unit(query) @ unit(negatives).T], 1
    )
    close(own[0], np.mean((logsumexp(10 * z, 1) - 10 * z[:, 0])[WHERE]))
    close(shared, own)
    close(chunked, own)
    close(raw_chunked, raw)
    assert not np.allclose(raw[0], own[0])


def test_a_queue_that_is_not_full_holds_only_what_was_pushed() -> None:
    query, keys = draw()
    pushed = np.random.default_rng(1).standard_normal((3, D)).astype(np.float32)
    state = jaxloss.queue_push(jaxloss.queue_init(5, D), pushed)
    stored, _, valid = jaxloss.queue_read(state)
    stored, valid = np.asarray(stored), np.asarray(valid)
    poisoned = np.where(valid[:, None], stored, np.float32(np.nan))

    @jax.jit
    def run(query: Any, poisoned: Any, valid: Any) -> Any:
        def loss(query: Any, met: Any, where: Any, **options: Any) -> Any:
            return info_nce(query, keys, negative_keys=met, negative_where=where, **options)

        each, own = jnp.broadcast_to(poisoned, (N, 5, D)), jnp.broadcast_to(valid, (N, 5))
        ways = [(poisoned, valid, {}), (poisoned, valid, dict(chunk_size=2)), (each, own, {})]
        slopes = jax.value_and_grad(loss, argnums=(0, 1))
        expected = slopes(query, jnp.asarray(pushed), None)
        return expected, [slopes(query, met, where, **o) for met, where, o in ways]

    (value, (slope, of_pushed)), found = jax.device_get(run(query, poisoned, valid))
    for one, (in_query, in_met) in found:
        close(one, value, 1e-6)
        close(in_query, slope, 1e-6)
        total = in_met.sum(0) if in_met.ndim == 3 else in_met
        close(total[:3], of_pushed, 1e-6)
        np.testing.assert_array_equal(total[3:], 0)
    for nothing in jax.tree.leaves(run(query, poisoned, valid & False)[1]):
        np.testing.assert_array_equal(nothing, 0)
    with pytest.raises(ValueError, match=r"info_nce: negative_where: expected shape \(5,\)"):
        info_nce(query, keys, negative_keys=stored, negative_where=valid[:2])
    with pytest.raises(ValueError, match="info_nce: negative_where: expected None"):
        info_nce(query, keys, negative_where=valid)


def test_a_ring_with_a_queue_meets_the_queue_of_each_device_and_no_other() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    query, keys = draw(dtype=np.float32)
    queue = query[:3] + 1
    local = lambda q, k, n, size: info_nce(
        q, k, negative_keys=n, chunk_size=size, axis_name="data", reduction=across("data")
    )
    split = PartitionSpec("data")
    over = lambda size: jax.shard_map(
        partial(local, size=size),
        mesh=mesh,
        in_specs=(split, split, PartitionSpec()),
        out_specs=PartitionSpec(),
    )

    @jax.jit
    def run(queue: Any) -> Any:
        whole = lambda n: info_nce(query, keys, negative_keys=n)
        rings = [lambda n, f=over(size): f(query, keys, n) for size in (None, 2)]
        return [jax.value_and_grad(f)(queue) for f in (whole, *rings)]

    expected, *found = jax.device_get(run(queue))
    for got in found:
        close(got, expected, 1e-6)


# Degenerate batches


@jax.jit
def labelled(x: Any, labels: Any) -> Any:
    """Value and gradient of NT-Xent and of SupCon, each whole and in chunks."""
    step = lambda loss, size: jax.value_and_grad(partial(loss, chunk_size=size))(x, labels)
    return [[step(loss, size) for size in (None, 4)] for loss in (nt_xent, sup_con_loss)]


def test_all_labels_distinct_is_zero_with_zero_gradient_where_optax_is_nan() -> None:
    x, labels = draw(dtype=np.float32)[0], np.arange(N, dtype=np.int32)
    assert np.isnan(jax.jit(optax.losses.ntxent)(x, labels))
    assert not any(np.any(part) for part in jax.tree.leaves(labelled(x, labels)))


def test_a_batch_of_one_class_is_finite_and_nothing_is_left_to_separate() -> None:
    x, labels = draw(dtype=np.float32)[0], np.zeros(N, np.int32)
    nothing, spread = jax.device_get(labelled(x, labels))
    assert not any(np.any(part) for part in jax.tree.leaves(nothing))
    assert all(0 < value < 100 for value, _ in spread)
    for value, slope in jax.device_get(labelled(np.ones_like(x), labels))[1]:
        assert np.allclose(value, np.log(N - 1), rtol=1e-6)  # all others are as likely
        assert np.max(np.abs(slope)) < 1e-6


def test_zero_rows_have_similarity_zero_and_no_gradient() -> None:
    query, keys = draw(dtype=np.float32)

    @jax.jit
    def run(query: Any) -> Any:
        ways = [(loss, size) for loss in (info_nce, siglip_loss) for size in (None, 4)]
        step = lambda loss, size: jax.value_and_grad(partial(loss, chunk_size=size), (0, 1))
        return [step(*way)(query, keys) for way in ways]

    for value, slopes in jax.device_get(run(np.where(np.arange(N)[:, None] == 2, 0, query))):
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(s)) for s in slopes)
        assert not np.any(slopes[0][2])
    for value, _ in run(0 * query)[:2]:
        assert np.allclose(value, np.log(N), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_rows_of_any_size_are_normalised(size: float) -> None:
    query, keys = draw(dtype=np.float32)
    for chunk in (None, 4):
        got = clip_loss(np.float32(size) * query, keys / np.float32(size), chunk_size=chunk)
        assert np.allclose(got, clip_loss(query, keys), rtol=1e-5)


def test_one_sample_alone_costs_nothing_or_is_no_unit() -> None:
    @jax.jit
    def run(one: Any) -> Any:
        paired = info_nce(one, -one), clip_loss(one, -one, chunk_size=4), siglip_loss(one, one)
        lonely = [partial(decoupled_contrastive_loss, one), koleo_loss]
        step = lambda loss: jax.value_and_grad(partial(loss, reduction=_weight_and_sum))(one)
        return paired, [step(loss) for loss in lonely]

    (found, both_ways, sigmoid), lonely = run(np.ones((1, D), np.float32))
    assert found == 0
    assert both_ways == 0
    assert np.allclose(sigmoid, np.log(2), rtol=1e-6)
    for total, slope in lonely:
        assert total == 0
        assert not np.any(slope)


def _weight_and_sum(values: Any, weights: Any) -> Any:
    return jnp.sum(weights) + jnp.sum(values)


def test_an_empty_batch_is_zero_in_chunks_too() -> None:
    none = np.zeros((0, D), np.float32)
    assert clip_loss(none, none, chunk_size=4) == 0
    assert nt_xent(none, np.zeros(0, np.int32), chunk_size=4) == 0


def test_equal_neighbours_cost_the_logarithm_of_eps_and_stay() -> None:
    def equal(x: Any) -> Any:
        units = koleo_loss(x, eps=1e-4, reduction="none")
        return jnp.sum(units[:2]), units

    x = np.array([[1.0, 2.0], [1.0, 2.0], [-3.0, 0.5]], np.float32)
    (_, units), slope = jax.jit(jax.value_and_grad(equal, has_aux=True))(x)
    assert np.allclose(np.asarray(units)[:2], -np.log(1e-4), rtol=1e-6)
    assert not np.any(slope)


# Accuracy


def test_a_positive_that_wins_clearly_keeps_the_digits_of_its_small_loss() -> None:
    angles = 2 * np.pi * np.arange(3) / 3
    query = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = np.tile(np.arange(3, dtype=np.int32), 2)
    both = np.concatenate([query, query])

    @jax.jit
    def run(query: Any, both: Any) -> Any:
        losses = [
            partial(nt_xent, both, labels, temperature=0.05),
            partial(sup_con_loss, both, labels, temperature=0.05, chunk_size=4),
            partial(clip_loss, query, query, logit_scale=20.0, chunk_size=2),
            partial(info_nce, query, query, temperature=0.05),
        ]
        return [loss() for loss in losses]

    got = np.array(run(*(x.astype(np.float32) for x in (query, both))), np.float64)
    # The cosine with the partner is 1, with the four or two others -1/2.
    exact = np.log1p(np.array([4, 4, 2, 2]) * np.exp(-1.5 / 0.05))
    assert np.all(exact < 1e-11)
    assert np.max(np.abs(got / exact - 1)) < 2e-5  # 20 times the rounding of the logits


def test_a_scale_of_a_hundred_neither_overflows_nor_loses_rows_far_below_it() -> None:
    query, keys = draw(32, 64, np.float32)
    keys = np.random.default_rng(3).standard_normal(keys.shape).astype(np.float32)

    @jax.jit
    def run(query: Any, keys: Any) -> Any:
        loss = partial(clip_loss, logit_scale=300.0)
        step = lambda size: jax.value_and_grad(partial(loss, chunk_size=size), (0, 1))(query, keys)
        return [step(size) for size in (None, 8)]

    wide = query.astype(np.float64), keys.astype(np.float64)
    q, k = map(unit, wide)
    z = 300 * q @ k.T
    ways = [logsumexp(z, axis=axis, keepdims=True) for axis in (0, 1)]
    value = np.mean(sum(map(np.ravel, ways))) / 2 - np.mean(np.diag(z))
    pull = 300 * (sum(np.exp(z - way) for way in ways) / 2 - np.eye(32)) / 32
    across_unit = lambda x, u, slope: (
        (slope - np.sum(slope * u, 1, keepdims=True) * u) / np.linalg.norm(x, axis=1, keepdims=True)
    )
    slopes = across_unit(wide[0], q, pull @ k), across_unit(wide[1], k, pull.T @ q)
    for got in jax.device_get(run(query, keys)):
        close(got, (value, slopes), 1e-4)


# What the losses promise


def test_clip_is_symmetric_and_a_bias_cancels() -> None:
    query, keys = draw(dtype=np.float32)
    assert np.allclose(clip_loss(query, keys), clip_loss(keys, query), rtol=1e-6)
    value, slope = jax.value_and_grad(lambda b: clip_loss(query, keys, logit_bias=b))(3.0)
    assert value == clip_loss(query, keys)
    assert slope == 0


def test_decoupled_is_symmetric_and_nt_xent_without_the_positive_below() -> None:
    query, keys = draw()
    both, labels = np.concatenate([query, keys]), np.tile(np.arange(N, dtype=np.int32), 2)
    run = partial(decoupled_contrastive_loss, temperature=0.5, reduction="none")
    with jax.enable_x64(True):
        units = np.asarray(nt_xent(both, labels, temperature=0.5, reduction="none"))
        decoupled, turned = np.asarray(run(query, keys)), np.asarray(run(keys, query))
    assert np.allclose(decoupled, turned, rtol=1e-12)
    # NT-Xent is log(1 + exp(negatives - positive)) of the same difference, for each view.
    assert np.allclose(decoupled, np.log(np.expm1(units)).reshape(2, N).mean(axis=0), rtol=1e-10)


def test_weights_of_pairs_follow_lightly_and_may_close_over_anything() -> None:
    query, keys = draw(dtype=np.float32)
    cosines = np.sum(unit(query) * unit(keys), axis=1)
    powers = np.exp(cosines / 0.5)
    weights = 2 - N * powers / powers.sum()
    assert np.allclose(negative_mises_fisher_weights(jnp.asarray(cosines)), weights, rtol=1e-5)
    units = partial(decoupled_contrastive_loss, query, keys, temperature=0.5, reduction="none")

    @jax.jit
    def run(factor: Any) -> Any:
        def weighted(sigma: Any) -> Any:
            weigh = lambda s: factor * negative_mises_fisher_weights(s, sigma=sigma)
            return units(weight_fn=weigh)

        return units(), *jax.jvp(weighted, (0.5,), (1.0,))

    for factor in (1.0, 2.0):
        plain, got, slopes = jax.device_get(run(factor))
        expected = plain - (factor * weights - 1) * cosines / 0.5
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert np.all(np.isfinite(slopes))
        assert np.sum(slopes) != 0


def test_hidden_pairs_do_not_move_the_weights_of_the_others() -> None:
    query, keys = draw(dtype=np.float32)
    weigh = partial(negative_mises_fisher_weights, where=WHERE)
    cosines = np.sum(unit(query) * unit(keys), axis=1)

    @jax.jit
    def run(cosines: Any, query: Any) -> Any:
        hidden = decoupled_contrastive_loss(query, keys, weight_fn=weigh, where=WHERE)
        kept = [x[WHERE] for x in draw(dtype=np.float32)]
        alone = decoupled_contrastive_loss(*kept, weight_fn=negative_mises_fisher_weights)
        return weigh(cosines), negative_mises_fisher_weights(cosines[WHERE]), hidden, alone

    shown = np.where(WHERE, cosines, np.float32(np.nan))
    poisoned = np.where(WHERE[:, None], query, np.float32(np.nan))
    got, expected, hidden, alone = jax.device_get(run(shown, poisoned))
    assert np.allclose(got[WHERE], expected, rtol=1e-6)
    assert np.allclose(np.mean(got[WHERE]), 1, rtol=1e-6)
    assert np.allclose(hidden, alone, rtol=1e-5)


def test_sums_of_a_chunked_siglip_add_up_over_any_reduction() -> None:
    query, keys = draw(dtype=np.float32)

    @jax.jit
    def run(query: Any, keys: Any) -> Any:
        loss = partial(siglip_loss, query, keys, where=WHERE, weights=np.linspace(0, 1, N))
        chunked = partial(loss, chunk_size=4)
        pair, whole = (f(reduction=sum_and_weight) for f in (chunked, loss))
        return pair, whole, chunked(reduction="sum"), chunked(), whole.mean()

    pair, whole, total, mean, expected = run(query, keys)
    close(pair, whole, 1e-6)
    close(total, whole.sum, 1e-6)
    close(mean, expected, 1e-6)


def test_wrong_arguments_are_named() -> None:
    query, keys = draw(dtype=np.float32)
    for size in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="clip_loss: chunk_size: expected a positive integer"):
            clip_loss(query, keys, chunk_size=size)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"info_nce: negative_keys: expected shape \(3, 4\)"):
        info_nce(query, keys, negative_keys=np.ones((3, 5), np.float32))
    with pytest.raises(ValueError, match=r"info_nce: negative_keys: expected shape \(10, 3, 4\)"):
        info_nce(query, keys, negative_keys=np.ones((1, 3, 4), np.float32))
    with pytest.raises(ValueError, match=r"info_nce: query: expected shape \(n, features\)"):
        info_nce(query[0], keys[0])
    with pytest.raises(ValueError, match=r"nt_xent: labels: expected shape \(10,\)"):
        nt_xent(query, LABELS[:-1])
    with pytest.raises(ValueError, match="decoupled_contrastive_loss: weight_fn: expected shape"):
        decoupled_contrastive_loss(query, keys, weight_fn=jnp.sum)


# Memory, read from XLA


def temporaries(loss: Callable[..., Any], *shapes: tuple[int, ...], over: Any = 0) -> float:
    """MiB that value and gradient need beside arrays and gradients."""
    kind = lambda shape: jnp.float32 if len(shape) > 1 else jnp.int32
    arrays = [jax.ShapeDtypeStruct(shape, kind(shape)) for shape in shapes]
    compiled = jax.jit(jax.value_and_grad(loss, over)).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes / MIB


def test_nt_xent_needs_a_hundredth_of_the_memory_of_a_broadcast() -> None:
    shapes = (1024, 256), (1024,)
    broadcast = temporaries(optax.losses.ntxent, *shapes)
    assert broadcast > 3000
    assert temporaries(nt_xent, *shapes) < 30
    assert temporaries(partial(nt_xent, chunk_size=128), *shapes) < 10


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss], ids=lambda f: f.__name__)
def test_eight_thousand_pairs_in_chunks_stay_within_sixty_four_mebibytes(loss: Any) -> None:
    pairs = (8192, 512), (8192, 512)
    assert temporaries(partial(loss, chunk_size=256), *pairs, over=(0, 1)) < 64


def test_negatives_of_each_query_are_not_copied() -> None:
    loss = lambda q, k, n: info_nce(q, k, negative_keys=n)
    shapes = (256, 128), (256, 128), (256, 64, 128)
    assert temporaries(loss, *shapes, over=(0, 1)) < 1  # the negatives are 8 MiB


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss], ids=lambda f: f.__name__)
def test_no_device_of_a_ring_holds_the_keys_of_all(loss: Any) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("data")
    local = partial(loss, chunk_size=64, axis_name="data", reduction=across("data"))
    over = jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=PartitionSpec())
    rows = jax.ShapeDtypeStruct((4096, 512), jnp.float32, sharding=NamedSharding(mesh, split))
    compiled = jax.jit(jax.value_and_grad(over, (0, 1))).lower(rows, rows).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 512 * 4
    assert "all-gather" not in compiled.as_text()
    assert "f32[4096,512]" not in compiled.as_text()
