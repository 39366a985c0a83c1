"""Fused vocabulary heads: equal to their logits written out, in every transform, in less memory."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxloss._core.reductions import normalized_sum, sum_and_weight
from jaxloss.losses.linear_heads import (
    linear_cross_entropy,
    linear_distillation_loss,
    linear_token_log_probs,
)

N, D, V = 10, 3, 7
MIB = 2**20
WAYS = {
    "tokens": dict(implementation="tokens"),
    "vocabulary": dict(implementation="vocabulary"),
    "units": dict(reduction=lambda values, weights: jnp.sum(values * weights) / jnp.sum(weights)),
}


def draw(dtype: Any = np.float64) -> dict[str, Any]:
    g = np.random.default_rng(0)
    return dict(
        hidden=g.standard_normal((N, D)).astype(dtype),
        kernel=g.standard_normal((D, V)).astype(dtype),
        bias=g.standard_normal(V).astype(dtype),
        class_weights=g.uniform(0.5, 2, V).astype(dtype),
        weights=g.uniform(0.5, 2, N).astype(dtype),
        label_smoothing=np.asarray(0.1, dtype),
        z_loss=np.asarray(0.05, dtype),
        softcap=np.asarray(4.0, dtype),
    )


LABELS = np.random.default_rng(1).integers(0, V, N, np.int32)


def fused(way: str, floats: dict[str, Any], **options: Any) -> Any:
    rest = {k: v for k, v in floats.items() if k not in ("hidden", "kernel")}
    options = {"chunk_size": 4, **WAYS[way], **rest, **options}
    return linear_cross_entropy(floats["hidden"], floats["kernel"], LABELS, **options)


def written_out(floats: dict[str, Any]) -> Any:
    z = floats["hidden"] @ floats["kernel"] + floats["bias"][None]
    z = floats["softcap"] * jnp.tanh(z / floats["softcap"])
    lse = jax.nn.logsumexp(z, axis=-1)
    cost = floats["class_weights"][None] * (lse[:, None] - z)
    s = floats["label_smoothing"]
    values = (1 - s) * cost[jnp.arange(N), LABELS] + s * jnp.mean(cost, axis=-1)
    values += floats["z_loss"] * lse**2
    return jnp.sum(floats["weights"] * values) / jnp.sum(floats["weights"])


@partial(jax.jit, static_argnums=0)
def hidden_by_three(way: str, floats: dict[str, Any], where: Any) -> Any:
    """Value and gradients with a mask, lengths and an ignored label."""

    def loss(part: Any) -> Any:
        options = dict(where=where, lengths=jnp.int32(8), ignore_index=LABELS[5])
        return fused(way, {**floats, **part}, **options)

    return jax.value_and_grad(loss)({n: floats[n] for n in ("hidden", "kernel", "bias")})


def everything(loss: Any, floats: Any, direction: Any) -> Any:
    """Value, jvp, Hessian-vector products both ways, and gradients at two points by vmap."""
    gradient = jax.grad(loss)
    dot = lambda a, b: sum(
        jnp.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    two = jax.tree.map(lambda x, d: jnp.stack([x, x + d]), floats, direction)
    return dict(
        jvp=jax.jvp(loss, (floats,), (direction,)),
        forward=jax.jvp(gradient, (floats,), (direction,))[1],
        reverse=jax.grad(lambda f: dot(gradient(f), direction))(floats),
        vmap=jax.vmap(jax.value_and_grad(loss))(two),
    )


def close(got: Any, expected: Any, tolerance: float) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        scale = np.max(np.abs(b), initial=1e-30)
        error = np.max(np.abs(np.asarray(a, np.float64) - b), initial=0) / scale
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


@pytest.fixture(scope="module")
def expected() -> Any:
    with jax.enable_x64(True):
        floats = draw()
        direction = jax.tree.map(lambda x: np.cos(17.0 * x), floats)
        found = jax.device_get(jax.jit(partial(everything, written_out))(floats, direction))
    return floats, direction, found


@pytest.mark.parametrize("way", WAYS)
def test_every_derivative_in_every_argument_is_that_of_the_logits_written_out(way, expected):
    floats, direction, found = expected
    with jax.enable_x64(True):
        got = jax.jit(partial(everything, partial(fused, way)))(floats, direction)
    close(jax.device_get(got), found, 1e-12)


def test_any_chunk_size_gives_the_same(expected) -> None:
    floats, _, found = expected
    with jax.enable_x64(True):
        for way in WAYS:
            for size in (1, 7, 1000):
                close(fused(way, floats, chunk_size=size), found["jvp"][0], 1e-13)
        close(fused("tokens", floats, implementation="auto"), found["jvp"][0], 1e-13)


def test_reductions_that_add_up_take_the_fused_sum(expected) -> None:
    floats, _, found = expected
    with jax.enable_x64(True):
        pair = fused("tokens", floats, reduction=sum_and_weight)
        close(pair.mean(), found["jvp"][0], 1e-13)
        close(pair.weight, np.sum(floats["weights"]), 1e-13)
        total = fused("vocabulary", floats, reduction=normalized_sum(8.0))
        close(total, pair.sum / 8, 1e-13)
        close(fused("tokens", floats, reduction="sum"), pair.sum, 1e-13)
        units = fused("tokens", floats, reduction="none")
        close(jnp.sum(units), pair.sum, 1e-13)


@pytest.mark.parametrize("way", WAYS)
def test_nan_in_hidden_rows_under_any_mask_reaches_nothing(way) -> None:
    floats = draw(np.float32)
    where, rows = np.arange(N) != 2, np.arange(N)
    bad = (rows >= 8) | ~where | (LABELS[5] == LABELS)
    poisoned = {**floats, "hidden": np.where(bad[:, None], np.nan, floats["hidden"])}
    clean, dirty = (jax.device_get(hidden_by_three(way, f, where)) for f in (floats, poisoned))
    assert all(map(np.array_equal, jax.tree.leaves(clean), jax.tree.leaves(dirty)))
    assert np.all(clean[1]["hidden"][bad] == 0)
    assert np.all(np.any(clean[1]["hidden"][~bad] != 0, axis=1))
    weights = np.where(bad, 0, floats["weights"]).astype(np.float32)
    kept = jax.jit(written_out)({**floats, "weights": weights})
    assert np.allclose(clean[0], kept, rtol=1e-6)


@pytest.mark.parametrize("way", ["tokens", "vocabulary"])
def test_nothing_left_is_zero_with_zero_gradient(way) -> None:
    value, slopes = hidden_by_three(way, draw(np.float32), np.zeros(N, bool))
    assert value == 0
    assert not any(np.any(slope) for slope in slopes.values())


slopes_of_chunks = jax.jit(jax.grad(partial(linear_cross_entropy, chunk_size=4), (0, 1)))


@pytest.mark.parametrize("label", [-1, V, -100, 2**31 - 1])
def test_a_kept_label_of_no_class_is_nan_in_its_unit_and_in_the_gradient(label) -> None:
    floats = draw(np.float32)
    labels = np.where(np.arange(N) == 3, np.int32(label), LABELS)
    loss = partial(linear_cross_entropy, chunk_size=4)
    units = loss(floats["hidden"], floats["kernel"], labels, reduction="none")
    assert np.array_equal(np.isnan(units), np.arange(N) == 3)
    slopes = slopes_of_chunks(floats["hidden"], floats["kernel"], labels)
    assert np.array_equal(np.isnan(slopes[0]).any(1), np.arange(N) == 3)
    assert np.isnan(slopes[1]).all()


def test_a_class_forbidden_by_an_infinite_bias_costs_nothing() -> None:
    floats = draw(np.float32)
    bias = np.where(np.arange(V) == 6, -np.inf, 0).astype(np.float32)
    labels = LABELS % 6
    without = linear_cross_entropy(floats["hidden"], floats["kernel"][:, :6], labels, chunk_size=4)
    for way in ("tokens", "vocabulary"):
        run = partial(linear_cross_entropy, chunk_size=4, implementation=way)
        got = jax.jit(jax.value_and_grad(partial(run, bias=bias), (0, 1)))
        value, slopes = got(floats["hidden"], floats["kernel"], labels)
        assert np.allclose(value, without, rtol=1e-6)
        assert not np.any(slopes[1][:, 6])
        assert all(np.isfinite(s).all() for s in slopes)


def test_bfloat16_is_as_accurate_as_its_inputs_and_sums_the_kernel_gradient_in_float32() -> None:
    g = np.random.default_rng(2)
    hidden = jnp.asarray(g.standard_normal((512, 16)), jnp.bfloat16)
    kernel = jnp.asarray(g.standard_normal((16, 50)), jnp.bfloat16)
    labels = g.integers(0, 50, 512, np.int32)
    wide = [np.asarray(x, np.float64) for x in (hidden, kernel)]
    with jax.enable_x64(True):
        mean = partial(linear_cross_entropy, implementation="tokens")
        value, exact = jax.device_get(jax.jit(jax.value_and_grad(mean, (0, 1)))(*wide, labels))
    for way in WAYS:
        run = partial(linear_cross_entropy, chunk_size=2, **WAYS[way])
        got, slopes = jax.jit(jax.value_and_grad(run, (0, 1)))(hidden, kernel, labels)
        assert got.dtype == jnp.float32
        assert abs(got - value) <= 1e-6 * value
        assert slopes[0].dtype == slopes[1].dtype == jnp.bfloat16
        close(slopes, exact, 2**-7)


def test_probabilities_below_two_to_the_minus_twelve_stay_in_the_gradient() -> None:
    hidden, kernel = np.ones((1, 1), np.float32), np.float32([[0, -10, -12]])
    for way in WAYS:
        run = partial(linear_cross_entropy, chunk_size=2, **WAYS[way])
        slope = jax.jit(jax.grad(run, 1))(hidden, kernel, np.int32([0]))
        others = np.exp([-10.0, -12.0])
        p = others / (1 + others.sum())
        assert np.allclose(slope[0], [-p.sum(), *p], rtol=1e-6)


def test_a_head_split_by_classes_over_devices_is_the_whole_head(expected) -> None:
    floats, *_ = expected
    names = ("hidden", "kernel", "bias")
    wide = lambda x, axis=-1: np.concatenate([x, x[..., :1] + 1], axis)  # 8 classes on 4 devices
    parts = {
        n: wide(floats[n]) if n in ("kernel", "bias", "class_weights") else floats[n]
        for n in floats
    }
    mesh = jax.make_mesh((4,), ("vocab",), axis_types=(AxisType.Auto,))
    spec = {n: PartitionSpec() for n in floats}
    spec |= dict(kernel=PartitionSpec(None, "vocab"), bias=PartitionSpec("vocab"))
    spec["class_weights"] = PartitionSpec("vocab")
    value_and_grad = lambda loss: jax.value_and_grad(lambda part: loss({**parts, **part}))
    part = {n: parts[n] for n in names}
    with jax.enable_x64(True):
        whole = jax.device_get(jax.jit(value_and_grad(partial(fused, "tokens")))(part))
        for way in WAYS:
            over = jax.shard_map(
                partial(fused, way, chunk_size=1, vocab_axis_name="vocab"),
                mesh=mesh,
                in_specs=(spec,),
                out_specs=PartitionSpec(),
            )
            with jax.set_mesh(mesh):
                close(jax.device_get(jax.jit(value_and_grad(over))(part)), whole, 1e-12)


@pytest.mark.parametrize("size", [1, 4])
def test_a_kernel_sharded_over_classes_is_not_gathered(size: int) -> None:
    floats = draw(np.float32)
    mesh = jax.make_mesh((4, 2), ("vocab", "data"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda x, *spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec(*spec)))
    kernel = np.concatenate([floats["kernel"], floats["kernel"][:, :1]], axis=1)
    step = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, chunk_size=size), (0, 1)))
    expected = step(floats["hidden"], kernel, LABELS)
    with jax.set_mesh(mesh):
        arrays = put(floats["hidden"], "data"), put(kernel, None, "vocab"), put(LABELS, "data")
        got = step(*arrays)
        text = step.lower(*arrays).compile().as_text()
    assert not re.search(rf"f32\[{D},8\][^ ]* all-gather", text)
    assert got[1][1].sharding.spec == PartitionSpec(None, "vocab")
    close(jax.device_get(got), jax.device_get(expected), 1e-6)


def test_wrong_options_are_named() -> None:
    hidden, kernel, labels = np.zeros((4, 3)), np.zeros((3, 5)), np.zeros(4, int)
    name = "linear_cross_entropy: "
    with pytest.raises(ValueError, match=name + "implementation: expected one of"):
        linear_cross_entropy(hidden, kernel, labels, implementation="rows")  # pyright: ignore
    with pytest.raises(ValueError, match=name + "chunk_size: expected a positive integer, got 0"):
        linear_cross_entropy(hidden, kernel, labels, chunk_size=0)
    with pytest.raises(ValueError, match=name + r"kernel: expected shape \(3, 3\)|kernel"):
        linear_cross_entropy(hidden, kernel.T, labels)
    with pytest.raises(ValueError, match=name + r"bias: expected shape \(5,\)"):
        linear_cross_entropy(hidden, kernel, labels, bias=np.zeros(3))
    with pytest.raises(TypeError, match=name + "labels: expected an integer dtype"):
        linear_cross_entropy(hidden, kernel, np.zeros(4))


def test_token_log_probs_are_the_labelled_log_softmax_and_zero_where_hidden() -> None:
    floats = draw(np.float32)
    where = np.arange(N) % 3 != 0
    options = dict(bias=floats["bias"], softcap=5.0, where=where, chunk_size=3)

    def ours(hidden: Any, kernel: Any) -> Any:
        return linear_token_log_probs(hidden, kernel, LABELS, **options)

    def theirs(hidden: Any, kernel: Any) -> Any:
        z = 5 * jnp.tanh((hidden @ kernel + floats["bias"]) / 5)
        return jnp.where(where, jax.nn.log_softmax(z)[jnp.arange(N), LABELS], 0)

    coefficients = np.linspace(-1, 2, N, dtype=np.float32)
    both = lambda f: jax.jit(lambda *x: (f(*x), jax.vjp(f, *x)[1](coefficients)))
    close(
        jax.device_get(both(ours)(floats["hidden"], floats["kernel"])),
        jax.device_get(both(theirs)(floats["hidden"], floats["kernel"])),
        1e-6,
    )
    hidden = np.where(where[:, None], floats["hidden"], np.nan)
    assert np.array_equal(ours(hidden, floats["kernel"]), ours(floats["hidden"], floats["kernel"]))


def test_distillation_is_the_divergence_of_the_logits_and_teaches_only_the_student() -> None:
    g = np.random.default_rng(3)
    with jax.enable_x64(True):
        arrays = [g.standard_normal(shape) for shape in ((N, D), (D, V), (N, 2), (2, V))]

        def ours(h: Any, w: Any, h2: Any, w2: Any, t: Any) -> Any:
            return linear_distillation_loss(h, w, h2, w2, temperature=t, chunk_size=4)

        def theirs(h: Any, w: Any, h2: Any, w2: Any, t: Any) -> Any:
            p, q = (jax.nn.log_softmax(z / t) for z in (h @ w, jax.lax.stop_gradient(h2 @ w2)))
            return t**2 * jnp.mean(jnp.sum(jnp.exp(q) * (q - p), axis=-1))

        got, want = (
            jax.device_get(jax.jit(jax.value_and_grad(f, (0, 1, 2, 3, 4)))(*arrays, 2.0))
            for f in (ours, theirs)
        )
        close(got, want, 1e-12)
        assert not np.any(got[1][2])
        assert not np.any(got[1][3])
        assert 0 <= linear_distillation_loss(*arrays[:2], *arrays[:2]) < 1e-15


def test_a_class_the_teacher_forbids_adds_nothing_to_the_divergence() -> None:
    one = np.ones((1, 1), np.float32)
    student, teacher = np.float32([[0, 0, 0]]), np.float32([[0, 0, -np.inf]])
    both = jax.jit(jax.value_and_grad(linear_distillation_loss, 1))
    value, slope = both(one, student, one, teacher)
    assert np.allclose(value, np.log(3 / 2), rtol=1e-6)
    assert np.allclose(slope, [[-1 / 6, -1 / 6, 1 / 3]], rtol=1e-6)


def lowered(loss: Any, n: int, d: int, v: int, dtype: Any = jnp.float32) -> Any:
    shapes = [((n, d), dtype), ((d, v), dtype), ((n,), jnp.int32)]
    arrays = [jax.ShapeDtypeStruct(*s) for s in shapes]
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()


def units_mean(*args: Any, **options: Any) -> Any:
    return jnp.mean(linear_cross_entropy(*args, reduction="none", **options))


PEAKS = {  # MiB beside the arrays and their gradients; the logits alone are 250
    "tokens": (linear_cross_entropy, dict(implementation="tokens"), 160),
    "vocabulary": (linear_cross_entropy, dict(implementation="vocabulary"), 20),
    "units": (units_mean, {}, 50),
    "tokens with all options": (
        linear_cross_entropy,
        dict(implementation="tokens", label_smoothing=0.1, z_loss=1e-4, softcap=30.0),
        160,
    ),
}


@pytest.mark.parametrize("way", PEAKS)
def test_the_logits_of_all_tokens_are_never_there(way) -> None:
    n, d, v = 2048, 256, 32000
    loss, options, most = PEAKS[way]
    program = lowered(partial(loss, chunk_size=256, **options), n, d, v)
    assert program.memory_analysis().temp_size_in_bytes <= most * MIB
    assert f"[{n},{v}]" not in program.as_text()
    assert f"[{v},{n}]" not in program.as_text()


def test_blocks_in_bfloat16_make_no_float32_copy_of_the_kernel_or_of_its_gradient() -> None:
    n, d, v = 512, 1024, 32000
    loss = partial(linear_cross_entropy, chunk_size=512, implementation="vocabulary")
    program = lowered(loss, n, d, v, jnp.bfloat16)
    assert f"f32[{d},{v}]" not in program.as_text()
    # On CPU one 16-bit copy, since there floats of 16 bits are cut out and put in as integers.
    assert program.memory_analysis().temp_size_in_bytes <= 1.3 * 2 * d * v


def test_a_large_vocabulary_takes_blocks_by_itself() -> None:
    n, d, v = 8192, 512, 131072
    program = lowered(linear_cross_entropy, n, d, v)
    assert program.memory_analysis().temp_size_in_bytes <= 2 * n * v * 4 / 50
    assert f"[{n},{v}]" not in program.as_text()


def test_distillation_holds_six_runs_of_logits_and_two_kernels_at_most() -> None:
    n, d, v, size = 2048, 256, 32000, 256
    shapes = ((n, d), (d, v), (n, d), (d, v))
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    loss = jax.value_and_grad(partial(linear_distillation_loss, chunk_size=size), (0, 1))
    program = jax.jit(loss).lower(*arrays).compile()
    most = 6 * size * v + 2 * d * v
    assert program.memory_analysis().temp_size_in_bytes <= 4 * most
    assert f"[{n},{v}]" not in program.as_text()
