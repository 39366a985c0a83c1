"""Criteria of detectors: laws that hold for all, oracles in float64, and what they train."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from beartype import beartype
from box_oracle import ciou, giou, iou
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import jaxtyped

from jaxloss import checked
from jaxloss.criteria.detection import (
    centernet_loss,
    detr_loss,
    fcos_loss,
    retinanet_loss,
    yolo_detection_loss,
)
from jaxloss.losses.box_coding import (
    box_to_distances,
    decode_deltas,
    distances_to_box,
    grid_points,
)
from jaxloss.losses.box_formats import cxcywh_to_xyxy, xyxy_to_cxcywh
from jaxloss.losses.detection import expected_bin
from jaxloss.losses.matching import (
    detr_match_cost,
    fcos_assign,
    hungarian_match,
    max_iou_assign,
    task_aligned_assign,
)

B, T, C, Q, BINS = 8, 4, 3, 6, 5
POINTS, STRIDES = (np.asarray(x) for x in grid_points([(3, 3), (2, 2)], [8, 16]))
P = len(POINTS)
HALVES = np.array([[6, 6], [9, 5]])
ANCHORS = np.concatenate([POINTS[:, None] - HALVES, POINTS[:, None] + HALVES], axis=-1)
ANCHORS = ANCHORS.reshape(-1, 4).astype(np.float32)
Arrays = dict[str, Any]


def hidden_by(where, array, garbage, label):
    """The array with garbage wherever `where` is False."""
    array = np.asarray(array)
    where = where.reshape(where.shape + (1,) * (array.ndim - where.ndim))
    fill = garbage if array.dtype.kind == "f" else label
    return np.where(where, array, np.asarray(fill, array.dtype))


@dataclass(frozen=True)
class Criterion:
    """One criterion with drawn arrays, and what the laws have to know of it."""

    loss: Callable[..., Any]
    draw: Callable[[np.random.Generator], Arrays]
    predictions: tuple[str, ...]
    gains: Mapping[str, float]
    hide: Callable[[Arrays, float, int], Arrays]
    empty: Callable[[Arrays], Arrays]
    options: Mapping[str, Any] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    classes: str = "cls"
    logits: str = "class_logits"
    smooth: Mapping[str, Any] = field(default_factory=dict)  # options without a stopped gradient

    def call(self, arrays: Arrays, **options: Any) -> Any:
        names = inspect.signature(self.loss).parameters
        ordered = [arrays[n] for n in names if n in arrays and n != "where"]
        tail = {"where": arrays["where"]} if "where" in arrays else {}
        return self.loss(*ordered, **tail, **{**self.options, **options})

    def split(self, arrays: Arrays) -> tuple[Arrays, Arrays]:
        chosen = {n: a for n, a in arrays.items() if n in self.predictions}
        return chosen, {n: a for n, a in arrays.items() if n not in chosen}

    def value_and_grad(self, arrays: Arrays, **options: Any) -> Any:
        predictions, rest = self.split(arrays)
        run = lambda predictions: self.call({**rest, **predictions}, **options)
        return jax.value_and_grad(run, has_aux=True)(predictions)

    def everything(self, arrays: Arrays, gains: Mapping[str, Any]) -> Any:
        """Total and terms, gradients by the predictions, and slopes by the gains."""
        predictions, rest = self.split(arrays)
        run = lambda predictions, gains: self.call({**rest, **predictions}, **gains)
        value, slopes = jax.value_and_grad(run, (0, 1), has_aux=True)(predictions, dict(gains))
        return value, *slopes

    def along_batch(self, arrays: Arrays, change: Callable[[Any], Any]) -> Arrays:
        return {n: a if n in self.shared else change(a) for n, a in arrays.items()}


def draw_targets(rng: np.random.Generator, *, crowded: float = 0.7) -> Arrays:
    low = rng.uniform(0, 20, (B, T, 2))
    boxes = np.concatenate([low, low + rng.uniform(4, 14, (B, T, 2))], axis=-1)
    where = rng.random((B, T)) < crowded
    where[0] = False
    return dict(
        boxes=boxes.astype(np.float32), labels=rng.integers(0, C, (B, T), np.int32), where=where
    )


def draw_dense(rng: np.random.Generator, bins: int = BINS) -> Arrays:
    around = rng.uniform(1, 20, (B, P, 4))
    boxes = np.concatenate([POINTS - around[..., :2], POINTS + around[..., 2:]], axis=-1)
    foreground = rng.random((B, P)) < 0.5
    foreground[0] = False
    scores = rng.uniform(0, 1, (B, P, C)) * foreground[..., None]
    shape = (B, P, 4, bins)
    logits = rng.standard_normal(shape) if bins > 1 else rng.uniform(0.2, 2, shape)
    arrays = dict(
        box_logits=logits,
        class_logits=rng.standard_normal((B, P, C)),
        points=POINTS,
        strides=STRIDES,
        target_boxes=boxes,
        target_scores=scores,
        foreground=foreground,
    )
    return {n: a.astype(np.float32) if a.dtype.kind == "f" else a for n, a in arrays.items()}


def hide_dense(names: tuple[str, ...], by: str) -> Callable[[Arrays, float, int], Arrays]:
    return lambda a, garbage, label: {
        **a,
        **{name: hidden_by(a[by], a[name], garbage, label) for name in names},
    }


def draw_anchored(rng: np.random.Generator) -> Arrays:
    n = len(ANCHORS)
    return dict(
        class_logits=rng.standard_normal((B, n, C), np.float32),
        deltas=rng.standard_normal((B, n, 4), np.float32),
        anchors=ANCHORS,
        **draw_targets(rng),
    )


def hide_anchored(a: Arrays, garbage: float, label: int) -> Arrays:
    a = hide_dense(("boxes", "labels"), "where")(a, garbage, label)
    assign = jax.jit(jax.vmap(lambda b, w: max_iou_assign(ANCHORS, b, where=w)))
    index = np.asarray(assign(a["boxes"], a["where"]))
    a["deltas"] = hidden_by(index >= 0, a["deltas"], garbage, label)
    return {**a, "class_logits": hidden_by(index > -2, a["class_logits"], garbage, label)}


def draw_points(rng: np.random.Generator) -> Arrays:
    foreground = rng.random((B, P)) < 0.5
    foreground[0] = False
    return dict(
        class_logits=rng.standard_normal((B, P, C), np.float32),
        distances=rng.uniform(0.1, 4, (B, P, 4)).astype(np.float32),
        centerness_logits=rng.standard_normal((B, P), np.float32),
        target_labels=rng.integers(0, C, (B, P), np.int32),
        target_distances=rng.uniform(0.1, 4, (B, P, 4)).astype(np.float32),
        foreground=foreground,
    )


def draw_cells(rng: np.random.Generator) -> Arrays:
    centers = rng.random((B, 4, 5)) < 0.3
    centers[0] = False
    heat = rng.uniform(0, 0.9, (B, 4, 5, C)).astype(np.float32)
    heat[..., 1][centers] = 1
    names = ("sizes", "offsets", "target_sizes", "target_offsets")
    numbers = {n: rng.uniform(0, 3, (B, 4, 5, 2)).astype(np.float32) for n in names}
    logits = rng.standard_normal((B, 4, 5, C), np.float32)
    return dict(heat_logits=logits, target_heatmap=heat, centers=centers, **numbers)


def draw_set(rng: np.random.Generator) -> Arrays:
    match = np.stack([rng.permutation(Q)[:T] for _ in range(B)]).astype(np.int32)
    match[1, 0] = -1
    targets = draw_targets(rng)
    return dict(
        logits=rng.standard_normal((B, Q, C + 1), np.float32),
        pred_boxes=rng.uniform(0.1, 0.9, (B, Q, 4)).astype(np.float32),
        match=match,
        **{**targets, "boxes": rng.uniform(0.1, 0.9, (B, T, 4)).astype(np.float32)},
    )


def nothing(name: str, **more: Any) -> Callable[[Arrays], Arrays]:
    return lambda a: {**a, name: np.zeros_like(a[name]), **{n: f(a[n]) for n, f in more.items()}}


YOLO_GAINS = dict(box_gain=7.5, class_gain=0.5, dfl_gain=1.5)
DENSE = ("box_logits", "target_boxes")
CRITERIA = {
    "yolo": Criterion(
        yolo_detection_loss,
        draw_dense,
        ("box_logits", "class_logits"),
        YOLO_GAINS,
        hide_dense(DENSE, "foreground"),
        nothing("foreground", target_scores=np.zeros_like),
        shared=("points", "strides"),
        smooth=dict(box_gain=0.0),  # CIoU stops the gradient of its alpha
    ),
    "yolo without bins": Criterion(
        yolo_detection_loss,
        partial(draw_dense, bins=1),
        ("box_logits", "class_logits"),
        YOLO_GAINS,
        hide_dense(DENSE, "foreground"),
        nothing("foreground", target_scores=np.zeros_like),
        options=dict(image_size=(32.0, 48.0)),
        shared=("points", "strides"),
        smooth=dict(box_gain=0.0),  # CIoU stops the gradient of its alpha
    ),
    "retinanet": Criterion(
        retinanet_loss,
        draw_anchored,
        ("class_logits", "deltas"),
        dict(box_gain=1.0),
        hide_anchored,
        nothing("where"),
        shared=("anchors",),
    ),
    "fcos": Criterion(
        fcos_loss,
        draw_points,
        ("class_logits", "distances", "centerness_logits"),
        {},
        hide_dense(
            ("distances", "centerness_logits", "target_labels", "target_distances"), "foreground"
        ),
        nothing("foreground"),
    ),
    "centernet": Criterion(
        centernet_loss,
        draw_cells,
        ("heat_logits", "sizes", "offsets"),
        dict(heat_gain=1.0, size_gain=0.1, offset_gain=1.0),
        hide_dense(("sizes", "offsets", "target_sizes", "target_offsets"), "centers"),
        nothing("centers", target_heatmap=lambda heat: np.minimum(heat, 0.9)),
        classes="heat",
        logits="heat_logits",
    ),
    "detr": Criterion(
        detr_loss,
        draw_set,
        ("logits", "pred_boxes"),
        dict(class_gain=1.0, l1_gain=5.0, giou_gain=2.0),
        hide_dense(("boxes", "labels", "match"), "where"),
        nothing("where"),
        logits="logits",
    ),
}
PROGRAMS = {name: jax.jit(c.everything) for name, c in CRITERIA.items()}
every = pytest.mark.parametrize("name", CRITERIA)
close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7))
equal = partial(jax.tree.map, np.testing.assert_array_equal)
GARBAGE = ((np.nan, 2**31 - 1), (np.inf, -1), (-np.inf, C), (1e30, 0))


def drawn(name: str, seed: int = 0) -> Arrays:
    return CRITERIA[name].draw(np.random.default_rng(seed))


def step(name: str, arrays: Arrays, gains: Mapping[str, float] | None = None) -> Any:
    """Total and terms, and gradients by the predictions."""
    return jax.device_get(PROGRAMS[name](arrays, gains or CRITERIA[name].gains)[:2])


def widened(arrays: Arrays) -> Arrays:
    return {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in arrays.items()}


@cache
def probes(name: str) -> dict[str, tuple[Arrays, Any]]:
    """Value, terms and gradients of many variations of one draw, from one compiled program."""
    c, arrays = CRITERIA[name], drawn(name)
    order = np.random.default_rng(1).permutation(B)
    varied = {"clean": arrays, "empty": c.empty(arrays)}
    varied["empty, garbage"] = c.hide(varied["empty"], np.nan, -1)
    varied |= {f"garbage {g}": c.hide(arrays, *g) for g in GARBAGE}
    varied["permuted"] = c.along_batch(arrays, lambda a: a[order])
    predictions, rest = c.split(arrays)
    for size in (0.0, 1e4, -1e4):
        everywhere = {n: np.full_like(a, size) for n, a in predictions.items()}
        varied[f"all {size}"] = {**rest, **everywhere}
    varied["saturated"] = {**rest, **{n: 1e4 * np.sign(a) for n, a in predictions.items()}}
    for box in (n for n in ("target_boxes", "boxes", "target_distances") if n in rest):
        varied[f"degenerate {box}"] = {**arrays, box: np.full_like(rest[box], 3)}
        varied[f"empty {box}"] = {**arrays, box: np.zeros_like(rest[box])}
    alike = dict(distances="target_distances", sizes="target_sizes", offsets="target_offsets")
    same = {n: arrays[of] for n, of in alike.items() if n in arrays}
    if name == "detr":
        index = np.maximum(arrays["match"], 0)[..., None]
        same = {"boxes": np.take_along_axis(arrays["pred_boxes"], index, 1)}
    varied["coincident"] = {**arrays, **same}
    return {key: (probe, step(name, probe)) for key, probe in varied.items()}


@every
def test_every_variation_has_a_finite_value_and_gradient(name) -> None:
    for key, (_, values) in probes(name).items():
        for leaf in jax.tree.leaves(values):
            assert np.all(np.isfinite(leaf)), key


@every
def test_garbage_under_the_padding_changes_no_bit(name) -> None:
    found = probes(name)
    for garbage in GARBAGE:
        equal(found[f"garbage {garbage}"][1], found[f"garbage {GARBAGE[0]}"][1])
    arrays, ((_, _), gradients) = found[f"garbage {GARBAGE[0]}"]
    for prediction, gradient in gradients.items():
        np.testing.assert_array_equal(gradient[np.isnan(arrays[prediction])], 0)
    equal(found["clean"][1], found[f"garbage {GARBAGE[0]}"][1])


@every
def test_a_batch_without_objects_has_only_classification(name) -> None:
    for key in ("empty", "empty, garbage"):
        _, ((total, terms), gradients) = probes(name)[key]
        classes = CRITERIA[name].classes
        assert terms[classes] > 0
        assert {n for n, term in terms.items() if term} == {classes}
        moved = {n for n, gradient in gradients.items() if np.any(gradient)}
        assert moved == {CRITERIA[name].logits}
        gain = CRITERIA[name].gains.get({"cls": "class_gain"}.get(classes, "heat_gain"), 1.0)
        np.testing.assert_allclose(total, gain * terms[classes], rtol=1e-6)


@every
def test_the_order_of_images_does_not_matter(name) -> None:
    (_, clean), (_, permuted) = probes(name)["clean"], probes(name)["permuted"]
    close(permuted[0], clean[0])
    order = np.random.default_rng(1).permutation(B)
    close(permuted[1], {n: g[order] for n, g in clean[1].items()})


@every
def test_the_total_is_the_sum_of_gain_times_term_and_terms_have_no_gradient(name) -> None:
    c, (arrays, ((total, terms), _)) = CRITERIA[name], probes(name)["clean"]
    gain_of = {"cls": "class_gain", "heat": "heat_gain", "size": "size_gain", "box": "box_gain"}
    gain_of |= {"dfl": "dfl_gain", "offset": "offset_gain", "l1": "l1_gain", "giou": "giou_gain"}
    gains = {term: c.gains.get(gain_of.get(term, ""), 1.0) for term in terms}
    np.testing.assert_allclose(total, sum(g * terms[t] for t, g in gains.items()), rtol=1e-6)
    predictions, rest = c.split(arrays)
    summed = lambda p: sum(jnp.sum(x) for x in c.call({**rest, **p})[1].values())
    for gradient in jax.jit(jax.grad(summed))(predictions).values():
        np.testing.assert_array_equal(gradient, 0)


@every
def test_gains_may_be_traced_and_do_not_compile_again(name) -> None:
    c, arrays = CRITERIA[name], drawn(name)
    if not c.gains:
        return
    first = c.call(arrays)
    compiled = c.loss.jitted._cache_size()
    c.call(arrays, **{n: 2 * g for n, g in c.gains.items()})
    c.call(arrays, **{n: 3 * g for n, g in c.gains.items()})
    assert c.loss.jitted._cache_size() == compiled + 1  # with and without, not once for each number
    *_, slopes = PROGRAMS[name](arrays, c.gains)
    assert len(slopes) == len(c.gains)
    np.testing.assert_allclose(
        sum(g * slopes[n] for n, g in c.gains.items())
        + (first[1]["cls"] if "class_gain" not in c.gains and "cls" in first[1] else 0),
        first[0],
        rtol=1e-5,
    )


@every
def test_nothing_changes_without_compilation(name) -> None:
    _, (value, _) = probes(name)["clean"]
    with jax.disable_jit():  # its operations one by one, as they meet plain NumPy arrays
        operations = jax.make_jaxpr(lambda: CRITERIA[name].call(drawn(name)), return_shape=True)()
    assert not {"jit", "pjit"} & {str(equation.primitive) for equation in operations[0].eqns}
    leaves, tree = jax.jit(jaxpr_as_fun(operations[0]))(), jax.tree.structure(operations[1])
    close(jax.tree.unflatten(tree, leaves), value)


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_comes_out_in_float32_with_gradients_in_its_own_dtype(name, dtype) -> None:
    c = CRITERIA[name]
    predictions, rest = c.split(drawn(name))
    half = {n: a.astype(dtype) for n, a in predictions.items()}
    wide = {n: a.astype(np.float32) for n, a in half.items()}
    (value, gradients), (expected, slopes) = (step(name, {**rest, **p}) for p in (half, wide))
    assert {leaf.dtype for leaf in jax.tree.leaves(value)} == {np.dtype("float32")}
    close(value, expected)
    for n, gradient in gradients.items():
        assert gradient.dtype == jnp.dtype(dtype)
        largest = np.max(np.abs(slopes[n]))
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(gradient.astype(np.float32), slopes[n], atol=2 * eps * largest)


@every
def test_values_and_gradients_agree_with_double_precision_and_with_differences(name) -> None:
    c = CRITERIA[name]
    with jax.enable_x64(True):
        arrays = widened(drawn(name))
        predictions, _ = c.split(arrays)
        rng = np.random.default_rng(5)
        toward = {n: rng.uniform(-1, 1, a.shape) for n, a in predictions.items()}
        moved = lambda by: {**arrays, **{n: predictions[n] + by * toward[n] for n in toward}}
        (expected, slopes), smooth = step(name, moved(0)), {**c.gains, **c.smooth}
        (_, gradients), ((ahead, _), _), ((behind, _), _) = (
            step(name, moved(by), smooth) for by in (0, 1e-6, -1e-6)
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(expected)} == {np.dtype("float64")}
    size = sum(np.sum(np.abs(g)) for g in gradients.values())
    found = sum(np.sum(gradients[n] * toward[n]) for n in toward)
    np.testing.assert_allclose(found, (ahead - behind) / 2e-6, atol=1e-7 * size)
    _, (value, gradients) = probes(name)["clean"]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), value, expected)
    for n, gradient in gradients.items():
        largest = np.abs(slopes[n]).max()
        np.testing.assert_allclose(gradient, slopes[n], rtol=0, atol=1e-6 * largest)


@every
def test_a_sharded_batch_gives_the_value_and_gradient_of_the_whole_one(name) -> None:
    c, (arrays, whole) = CRITERIA[name], probes(name)["clean"]
    specs = {n: PartitionSpec() if n in c.shared else PartitionSpec("data") for n in arrays}
    auto, explicit = (
        jax.make_mesh((8,), ("data",), axis_types=(kind,))
        for kind in (AxisType.Auto, AxisType.Explicit)
    )
    local = jax.shard_map(
        partial(c.call, axis_name="data"),
        mesh=auto,
        in_specs=(specs,),
        out_specs=PartitionSpec(),
    )

    def mapped(arrays):
        predictions, rest = c.split(arrays)
        return jax.value_and_grad(lambda p: local({**rest, **p}), has_aux=True)(predictions)

    for mesh, runs in ((auto, (mapped, c.value_and_grad)), (explicit, (c.value_and_grad,))):
        with jax.set_mesh(mesh):
            put = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in arrays.items()}
            all_of = lambda arrays, runs=runs: [run(arrays) for run in runs]
            program = jax.jit(all_of).lower(put).compile()
            for got in jax.device_get(program(put)):
                close(got, whole)
            assert "all-gather" not in program.as_text()


@every
def test_annotations_hold_and_promotion_may_be_strict(name) -> None:
    c, arrays = CRITERIA[name], drawn(name)
    typed = jaxtyped(typechecker=beartype)(inspect.unwrap(c.loss))
    checked_call = lambda a: Criterion.call(
        Criterion(typed, c.draw, c.predictions, c.gains, c.hide, c.empty, c.options), a
    )
    total, terms = jax.eval_shape(checked_call, arrays)
    assert total.shape == ()
    assert {x.shape for x in terms.values()} == {()}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        out, _ = jax.eval_shape(c.value_and_grad, arrays)
        several = {n: np.stack([a, a]) for n, a in arrays.items()}
        mapped, _ = jax.eval_shape(jax.vmap(c.value_and_grad), several)
        predictions, rest = c.split(arrays)
        jax.eval_shape(lambda p: jax.jvp(lambda p: c.call({**rest, **p}), (p,), (p,)), predictions)
    with jax.checking_leaks():
        jax.eval_shape(c.call, arrays)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(out))
    assert {x.shape for x in jax.tree.leaves(mapped)} == {(2,)}


@every
def test_wrong_shapes_and_dtypes_name_criterion_and_argument(name) -> None:
    c, arrays = CRITERIA[name], drawn(name)
    for n, array in arrays.items():
        wrong = [(array[..., None], ValueError), ([1.0], TypeError)]
        wrong += [(array[:1], ValueError)] if array.shape[0] > 1 else []
        wrong += [(array.astype(complex), TypeError)]
        wrong += [(np.ones(array.shape, int), TypeError)] if n in c.predictions else []
        for bad, error in wrong:
            with pytest.raises(error, match=rf"^{c.loss.__name__}: \w+: expected "):
                c.call({**arrays, n: bad})
    for gain in c.gains:
        with pytest.raises(ValueError, match=rf"^{c.loss.__name__}: {gain}: expected a scalar"):
            c.call(arrays, **{gain: np.ones(2)})


@pytest.mark.parametrize(
    "loss", list(dict.fromkeys(c.loss for c in CRITERIA.values())), ids=lambda f: f.__name__
)
def test_the_docstring_tells_formula_terms_source_and_an_example(loss) -> None:
    doc = inspect.getdoc(loss)
    for part in ("$$", "Args:", "Returns:", "Reference:", ">>> ", "; terms `"):
        assert part in doc
    documented = {line.strip().split(":")[0] for line in doc.splitlines() if ": " in line}
    assert set(inspect.signature(loss).parameters) <= documented


# Formulas, in loops over float64


def neg_log_sigmoid(z):
    return np.logaddexp(0, -np.float64(z))


def focal(z, truth, alpha=0.25, gamma=2.0):
    z = np.float64(z)
    one, zero = neg_log_sigmoid(z), neg_log_sigmoid(-z)
    return np.where(
        truth, alpha * np.exp(-gamma * zero) * one, (1 - alpha) * np.exp(-gamma * one) * zero
    )


def softmax(z):
    powers = np.exp(np.float64(z) - np.max(z, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def yolo_by_loops(a, image_size=None):
    bins = a["box_logits"].shape[-1]
    weights = a["target_scores"].sum(axis=-1, dtype=np.float64)
    one, zero = neg_log_sigmoid(a["class_logits"]), neg_log_sigmoid(-np.float64(a["class_logits"]))
    share = np.float64(a["target_scores"])
    sums = dict(box=0.0, cls=np.sum(share * one + (1 - share) * zero), dfl=0.0)
    for b, p in zip(*np.nonzero(a["foreground"]), strict=True):
        logits, point, stride = np.float64(a["box_logits"][b, p]), POINTS[p], STRIDES[p]
        box = np.float64(a["target_boxes"][b, p])
        probs = softmax(logits)
        d = probs @ np.arange(bins) if bins > 1 else logits[:, 0]
        pred = np.concatenate([point - d[:2] * stride, point + d[2:] * stride])
        y = np.concatenate([point - box[:2], box[2:] - point]) / stride
        if bins > 1:
            y = np.clip(y, 0, bins - 1.01)
            low = np.floor(y).astype(int)
            rows = range(4)
            cost = -(low + 1 - y) * np.log(probs[rows, low])
            cost -= (y - low) * np.log(probs[rows, low + 1])
        else:
            height, width = image_size or (stride, stride)
            cost = np.abs(d - y) * stride / np.array([width, height, width, height])
        sums["box"] += weights[b, p] * (1 - ciou(pred, box))
        sums["dfl"] += weights[b, p] * cost.mean()
    return {n: total / max(weights.sum(), 1) for n, total in sums.items()}


def smooth_l1(error, beta):
    error = np.abs(error)
    return np.where(error < beta, error**2 / (2 * beta or 1), error - beta / 2)


def retinanet_by_loops(a, positive=0.5, negative=0.4, beta=1 / 9):
    sums, positives = dict(cls=0.0, box=0.0), 0
    for b in range(B):
        objects = [t for t in range(T) if a["where"][b, t]]
        table = np.array([[iou(x, a["boxes"][b, t]) for t in objects] for x in ANCHORS])
        records = table.max(axis=0, initial=0) if objects else []
        for n, anchor in enumerate(ANCHORS):
            best = table[n].max(initial=0)
            forced = any(x == r > 0 for x, r in zip(table[n], records, strict=True))
            truth = np.zeros(C, bool)
            if best >= positive or forced:
                t = objects[int(np.argmax(table[n]))]
                truth[a["labels"][b, t]] = True
                positives += 1
                box, anchor = np.float64(a["boxes"][b, t]), np.float64(anchor)
                size, size_ref = box[2:] - box[:2], anchor[2:] - anchor[:2]
                shift = (box[:2] + box[2:] - anchor[:2] - anchor[2:]) / 2 / size_ref
                target = np.concatenate([shift, np.log(size / size_ref)])
                sums["box"] += smooth_l1(a["deltas"][b, n] - target, beta).sum()
            elif best >= negative:
                continue
            sums["cls"] += focal(a["class_logits"][b, n], truth).sum()
    return {n: total / max(positives, 1) for n, total in sums.items()}


def fcos_by_loops(a, weight_by_centerness=True):
    sums, weight, count = dict(cls=0.0, box=0.0, centerness=0.0), 0.0, 0
    for b, p in np.ndindex(B, P):
        truth = np.zeros(C, bool)
        if a["foreground"][b, p]:
            truth[a["target_labels"][b, p]] = True
            left, top, right, bottom = np.float64(a["target_distances"][b, p])
            c = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
            c, sign = np.sqrt(c), np.array([-1, -1, 1, 1])
            overlap = giou(sign * a["distances"][b, p], sign * a["target_distances"][b, p])
            w = c if weight_by_centerness else 1.0
            sums["box"] += w * (1 - overlap)
            z = np.float64(a["centerness_logits"][b, p])
            sums["centerness"] += c * neg_log_sigmoid(z) + (1 - c) * neg_log_sigmoid(-z)
            weight, count = weight + w, count + 1
        sums["cls"] += focal(a["class_logits"][b, p], truth).sum()
    over = dict(box=weight if weight_by_centerness else max(count, 1))
    return {n: total / over.get(n, max(count, 1)) for n, total in sums.items()}


def centernet_by_loops(a):
    z, heat = np.float64(a["heat_logits"]), np.float64(a["target_heatmap"])
    p, peak = 1 / (1 + np.exp(-z)), heat == 1
    cost = np.where(peak, -((1 - p) ** 2) * np.log(p), -((1 - heat) ** 4) * p**2 * np.log(1 - p))
    terms = dict(heat=cost.sum() / max(peak.sum(), 1))
    for n in ("size", "offset"):
        error = np.abs(np.float64(a[f"{n}s"]) - a[f"target_{n}s"]).mean(axis=-1)
        terms[n] = error[a["centers"]].sum() / max(a["centers"].sum(), 1)
    return terms


def corners(box):
    return np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])


def detr_by_loops(a, no_object_weight=0.1):
    sums, weight, cost, objects = dict(l1=0.0, giou=0.0), 0.0, 0.0, 0
    for b in range(B):
        truth = np.full(Q, C)
        for t in range(T):
            if not a["where"][b, t]:
                continue
            objects += 1
            if (q := a["match"][b, t]) >= 0:
                truth[q] = a["labels"][b, t]
                pred, box = np.float64(a["pred_boxes"][b, q]), np.float64(a["boxes"][b, t])
                sums["l1"] += np.abs(pred - box).sum()
                sums["giou"] += 1 - giou(corners(pred), corners(box))
        for q in range(Q):
            w = no_object_weight if truth[q] == C else 1.0
            cost -= w * np.log(softmax(a["logits"][b, q])[truth[q]])
            weight += w
    return dict(cls=cost / weight, **{n: total / max(objects, 1) for n, total in sums.items()})


FORMULAS = [
    ("yolo", yolo_by_loops, {}),
    ("yolo without bins", yolo_by_loops, {}),
    ("yolo without bins", yolo_by_loops, dict(image_size=None)),
    ("retinanet", retinanet_by_loops, {}),
    ("retinanet", retinanet_by_loops, dict(positive=0.6, negative=0.3, beta=0.0)),
    ("fcos", fcos_by_loops, {}),
    ("fcos", fcos_by_loops, dict(weight_by_centerness=False)),
    ("centernet", centernet_by_loops, {}),
    ("detr", detr_by_loops, {}),
    ("detr", detr_by_loops, dict(no_object_weight=0.4)),
]


@pytest.mark.parametrize(
    ("name", "formula", "options"), FORMULAS, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_every_term_is_its_formula(name, formula, options) -> None:
    for seed in (0, 1, 2):
        arrays = drawn(name, seed)
        _, terms = CRITERIA[name].call(arrays, **options)
        expected = formula(arrays, **{**CRITERIA[name].options, **options})
        assert terms.keys() == expected.keys()
        close(terms, expected)


# What is special


@pytest.mark.parametrize("label", [-1, C, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("name", ["retinanet", "fcos", "detr"])
def test_a_label_that_is_no_class_makes_the_total_nan(name, label) -> None:
    c, arrays = CRITERIA[name], drawn(name)
    labels = "labels" if "labels" in arrays else "target_labels"
    kept = arrays.get("where", arrays.get("foreground"))
    place = tuple(axis[-1] for axis in np.nonzero(kept))
    bad = arrays[labels].copy()
    bad[place] = label
    (total, terms), gradients = step(name, {**arrays, labels: bad})
    assert np.isnan(total)
    assert np.isnan(terms["cls"])
    image, *_ = place
    assert np.any(np.isnan(gradients[c.logits][image]))
    assert np.all(np.isfinite(np.delete(gradients[c.logits], image, axis=0)))
    expected = rf"{c.loss.__name__}: {labels}: expected values in \[0, 3\), got 1 that"
    with pytest.raises(ValueError, match=expected):
        checked(c.call)({**arrays, labels: bad})
    if name != "fcos":
        boxes = arrays["boxes"].copy()
        boxes[place] = np.nan
        assert np.isnan(step(name, {**arrays, "boxes": boxes})[0][0])


@pytest.mark.parametrize("match", [Q, 2**31 - 1, -2, "twice"])
def test_a_match_that_is_no_query_or_used_twice_makes_the_total_nan(match) -> None:
    arrays = drawn("detr")
    where = np.zeros_like(arrays["where"])
    where[2, :2] = True
    bad = arrays["match"].copy()
    bad[2, 0] = bad[2, 1] if match == "twice" else match
    assert np.isnan(step("detr", {**arrays, "where": where, "match": bad})[0][0])
    where[2, 0] = False
    assert np.isfinite(step("detr", {**arrays, "where": where, "match": bad})[0][0])


def test_targets_that_are_nan_make_the_yolo_total_nan() -> None:
    arrays = drawn("yolo")
    place = tuple(axis[0] for axis in np.nonzero(arrays["foreground"]))
    for name in ("target_scores", "target_boxes"):
        bad = arrays[name].copy()
        bad[place] = np.nan
        assert np.isnan(step("yolo", {**arrays, name: bad})[0][0])


def test_an_object_too_large_for_the_bins_is_fitted_as_well_as_they_allow() -> None:
    logits = np.full((1, 1, 4, BINS), -50, np.float32)
    logits[..., -1] = 50
    point, stride = np.full((1, 2), 50, np.float32), np.ones(1, np.float32)
    box, one = np.array([[[0, 0, 100, 100]]], np.float32), np.ones((1, 1, 1), np.float32)
    _, terms = yolo_detection_loss(logits, one, point, stride, box, one, one[..., 0] == 1)
    np.testing.assert_allclose(terms["dfl"], 0.01 * 100, rtol=1e-4)  # y is clamped to 3.99, rounded


def test_image_size_is_for_a_single_bin() -> None:
    with pytest.raises(ValueError, match=r"^yolo_detection_loss: image_size: expected None"):
        CRITERIA["yolo"].call(drawn("yolo"), image_size=(32, 32))


def test_no_image_no_point_and_no_place_for_objects_are_legal() -> None:
    for name, c in CRITERIA.items():
        arrays = drawn(name)
        empty = c.along_batch(arrays, lambda a: a[:0])
        assert np.all(np.asarray(c.call(empty)[0]) == 0), name
    for name in ("retinanet", "detr"):
        arrays = drawn(name)
        padded = CRITERIA[name].empty(arrays)
        without = {
            n: a[:, :0] if n in ("boxes", "labels", "match", "where") else a
            for n, a in arrays.items()
        }
        near = partial(np.testing.assert_allclose, rtol=1e-6)  # two programs round differently
        jax.tree.map(near, CRITERIA[name].call(without), CRITERIA[name].call(padded))


def test_retinanet_of_single_images_mapped_and_averaged_is_per_image_normalised() -> None:
    c, arrays = CRITERIA["retinanet"], drawn("retinanet")
    apart = {n: a if n in c.shared else a[:, None] for n, a in arrays.items()}
    axes = {n: None if n in c.shared else 0 for n in arrays}
    totals, _ = jax.vmap(c.call, in_axes=(axes,))(apart)
    one_by_one = [
        c.call({**{n: a[i : i + 1] for n, a in arrays.items()}, "anchors": ANCHORS})[0]
        for i in range(B)
    ]
    np.testing.assert_allclose(totals, one_by_one, rtol=1e-6)
    assert not np.allclose(np.mean(totals), c.call(arrays)[0])


# From raw ground truth to boxes: free predictions for two images, trained by each criterion


TRUE_BOXES = np.array(
    [[[2, 3, 13, 12], [16, 10, 30, 27], [0, 0, 0, 0]], [[5, 14, 21, 31], [0, 0, 0, 0], [0] * 4]],
    np.float32,
)
TRUE_LABELS = np.array([[2, 0, -1], [1, -1, -1]], np.int32)
EXISTS = TRUE_LABELS >= 0
HIDDEN = np.where(EXISTS[..., None], TRUE_BOXES, np.nan).astype(np.float32)


def fit(objective, params, steps=400, rate=0.05):
    optimizer = optax.adam(rate)

    def step(_, state):
        params, moments = state
        updates, moments = optimizer.update(jax.grad(objective)(params), moments)
        return optax.apply_updates(params, updates), moments

    run = lambda p: jax.lax.fori_loop(0, steps, step, (p, optimizer.init(p)))[0]
    return jax.device_get(jax.jit(run)(jax.tree.map(np.float32, params)))


def expit(z):
    return 1 / (1 + np.exp(-z))


def check_found(boxes, probs, exist_iou=0.8):
    """For every object some prediction of its class and place, and no confident one elsewhere."""
    boxes, probs = np.asarray(boxes), np.asarray(probs)
    for b in range(2):
        sure = probs[b].max(axis=-1) > 0.5
        for t in range(EXISTS[b].sum()):
            overlaps = [iou(box, TRUE_BOXES[b, t]) for box in boxes[b]]
            best = max(range(len(overlaps)), key=lambda i: overlaps[i] + sure[i])
            assert overlaps[best] > exist_iou
            assert probs[b, best].argmax() == TRUE_LABELS[b, t]
            assert sure[best]
        for i in np.flatnonzero(sure):
            assert max(iou(boxes[b, i], box) for box in TRUE_BOXES[b]) > 0.5


def test_yolo_learns_boxes_from_raw_ground_truth() -> None:
    assign = jax.vmap(partial(task_aligned_assign, small=(8.0, 16.0)), in_axes=(0, 0, None, 0, 0))
    decode = lambda logits: distances_to_box(expected_bin(logits) * STRIDES[:, None], POINTS)

    def objective(params):
        box_logits, class_logits = params
        boxes, probs = decode(box_logits), jax.nn.sigmoid(class_logits)
        targets = assign(probs, boxes, POINTS, HIDDEN, TRUE_LABELS, where=EXISTS)
        return yolo_detection_loss(box_logits, class_logits, POINTS, STRIDES, *targets[:3])[0]

    params = fit(objective, (np.zeros((2, P, 4, 6)), np.full((2, P, C), -2.0)))
    check_found(jax.jit(decode)(params[0]), expit(params[1]))


def test_retinanet_learns_boxes_from_raw_ground_truth() -> None:
    objective = lambda params: retinanet_loss(*params, ANCHORS, HIDDEN, TRUE_LABELS, where=EXISTS)[
        0
    ]
    n = len(ANCHORS)
    params = fit(objective, (np.full((2, n, C), -2.0), np.zeros((2, n, 4))))
    check_found(jax.jit(decode_deltas)(params[1], ANCHORS), expit(params[0]))


def test_fcos_learns_boxes_from_raw_ground_truth() -> None:
    levels = (STRIDES > 8).astype(np.int32)
    ranges = ((-1, 12), (12, np.inf))
    assign = lambda box, ok: fcos_assign(POINTS, STRIDES, levels, box, ranges=ranges, where=ok)
    index = np.asarray(jax.jit(jax.vmap(assign))(HIDDEN, EXISTS))
    chosen = np.maximum(index, 0)
    boxes = np.take_along_axis(HIDDEN, chosen[..., None], axis=1)
    labels = np.take_along_axis(TRUE_LABELS, chosen, axis=1)
    target = jax.jit(box_to_distances)(boxes, POINTS) / STRIDES[:, None]

    def objective(params):
        logits, raw, centerness = params
        return fcos_loss(logits, jnp.exp(raw), centerness, labels, target, index >= 0)[0]

    start = np.full((2, P, C), -2.0), np.zeros((2, P, 4)), np.zeros((2, P))
    logits, raw, _ = fit(objective, start)
    boxes = jax.jit(distances_to_box)(np.exp(raw) * STRIDES[:, None], POINTS)
    check_found(boxes, expit(logits))


def test_detr_learns_boxes_from_raw_ground_truth() -> None:
    true = np.where(EXISTS[..., None], jax.jit(xyxy_to_cxcywh)(TRUE_BOXES / 32), np.nan)

    def match(logits, boxes, labels, true, exists):
        return hungarian_match(detr_match_cost(logits, boxes, labels, true), where=exists)

    def objective(params):
        logits, boxes = params[0], jax.nn.sigmoid(params[1])
        found = jax.vmap(match)(logits, boxes, TRUE_LABELS, true, EXISTS)
        return detr_loss(logits, boxes, TRUE_LABELS, true, found, where=EXISTS)[0]

    rng = np.random.default_rng(0)
    start = np.zeros((2, Q, C + 1)), rng.normal(size=(2, Q, 4))
    logits, raw = fit(objective, start)
    boxes = 32 * np.asarray(jax.jit(cxcywh_to_xyxy)(expit(raw)))
    check_found(boxes, softmax(logits)[..., :C])
