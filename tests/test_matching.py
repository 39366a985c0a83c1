"""Assigners and the matcher against loops in float64, and what padding, ties and devices do."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from box_oracle import area, ciou, giou, iou
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from jaxloss import checked
from jaxloss.losses.box_coding import grid_points
from jaxloss.losses.matching import (
    detr_match_cost,
    fcos_assign,
    hungarian_match,
    max_iou_assign,
    task_aligned_assign,
)

T, C = 6, 3
POINTS, STRIDES = (np.asarray(x) for x in grid_points([(6, 6), (3, 3)], [8, 16]))
P = len(POINTS)
LEVELS = np.repeat([0, 1], [36, 9])
RANGES = ((-1, 12), (12, np.inf))


quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw_boxes(rng, n, side=40.0):
    low = rng.uniform(0, 48 - side / 4, (n, 2))
    return np.concatenate([low, low + rng.uniform(2, side, (n, 2))], axis=1)


def scene(seed, garbage=np.nan, label=2**31 - 1):
    """One image: predictions near the objects, with padding under which there is garbage."""
    rng = np.random.default_rng(seed)
    boxes = draw_boxes(rng, T)
    exists = rng.random(T) < 0.7
    labels = rng.integers(0, C, T)
    pred = boxes[rng.integers(0, T, P)] + rng.normal(0, 3, (P, 4))
    pred[:, 2:] = np.maximum(pred[:, 2:], pred[:, :2])
    scores = rng.uniform(0, 1, (P, C))
    boxes, pred, scores = (x.astype(np.float32) for x in (boxes, pred, scores))
    hidden = np.where(exists[:, None], boxes, np.float32(garbage))
    labels = np.where(exists, labels, label).astype(np.int32)
    return dict(boxes=hidden, labels=labels, where=exists), dict(scores=scores, pred_boxes=pred)


def distances(point, box):
    x, y = np.float64(point)
    return np.array([x - box[0], y - box[1], box[2] - x, box[3] - y], np.float64)


def check_on_scenes(ours, oracle, seeds=range(24)):
    """Compare on many images at once, in one compiled program."""
    scenes = [scene(seed) for seed in seeds]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *scenes)
    got = jax.device_get(quick(jax.vmap(ours))(*batch))
    for i, (truth, pred) in enumerate(scenes):
        mine = jax.tree.map(lambda x, i=i: x[i], got)
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), mine, oracle(truth, pred))


def existing(truth):
    return [t for t in range(T) if truth["where"][t]]


# IoU with anchors


ANCHORS = draw_boxes(np.random.default_rng(99), 40).astype(np.float32)


def assign_by_loops(truth, _, *, positive, negative, force_match=True, reassign=False):
    table = {(a, t): iou(ANCHORS[a], truth["boxes"][t]) for a in range(40) for t in existing(truth)}
    own = [max(existing(truth), key=lambda t: table[a, t], default=None) for a in range(40)]
    best = [0 if t is None else table[a, t] for a, t in enumerate(own)]
    index = np.array(
        [t if b >= positive else -1 if b < negative else -2 for t, b in zip(own, best, strict=True)]
    )
    for t in existing(truth) if force_match else ():
        record = max(table[a, t] for a in range(40))
        holders = [a for a in range(40) if table[a, t] == record > 0]
        if reassign:
            index[holders[:1]] = t
        else:
            index[holders] = [own[a] for a in holders]
    return index.astype(np.int32)


@pytest.mark.parametrize(
    "options",
    [
        dict(positive=0.5, negative=0.4),
        dict(positive=0.5, negative=0.4, force_match=False),
        dict(positive=0.4, negative=0.4, reassign=True),
        dict(positive=0.6, negative=0.2),
    ],
    ids=str,
)
def test_anchors_are_assigned_as_by_loops(options) -> None:
    ours = lambda truth, _: max_iou_assign(
        np.asarray(ANCHORS), truth["boxes"], where=truth["where"], **options
    )
    check_on_scenes(ours, partial(assign_by_loops, **options))


def test_all_anchors_that_tie_for_an_object_are_forced() -> None:
    anchors = np.array([[0.0, 0, 2, 2], [2, 0, 4, 2], [9, 9, 10, 10]])
    box = np.array([[1.0, 0, 3, 2]])  # IoU 1/3 with both
    assert max_iou_assign(anchors, box).tolist() == [0, 0, -1]
    assert max_iou_assign(anchors, box, reassign=True).tolist() == [0, -1, -1]
    assert max_iou_assign(anchors, box, force_match=False).tolist() == [-1, -1, -1]


def test_an_object_that_overlaps_no_anchor_claims_none() -> None:
    anchors, box = np.array([[0.0, 0, 2, 2]]), np.array([[5.0, 5, 6, 6], [5, 5, 5, 5]])
    assert max_iou_assign(anchors, box).tolist() == [-1]
    assert max_iou_assign(anchors, box, reassign=True).tolist() == [-1]


def test_a_forced_anchor_stays_with_its_own_best_object_unless_reassigned() -> None:
    anchor = np.array([[0.0, 0, 4, 4]])
    boxes = np.array([[0.0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 2, 4]])
    assert max_iou_assign(anchor, boxes).tolist() == [0]
    assert max_iou_assign(anchor, boxes, reassign=True).tolist() == [2]  # the last one


def test_an_iou_on_a_bound_counts_as_reaching_it() -> None:
    anchors = np.array([[0.0, 0, 3, 2], [0, 0, 5, 2]])
    box = np.array([[0.0, 0, 3, 1]])  # IoU 3/6 and 3/10
    options = dict(positive=0.5, negative=np.float32(3 / 10), force_match=False)
    assert max_iou_assign(anchors, box, **options).tolist() == [0, -2]


# Task-aligned assignment


def align_by_loops(truth, pred, *, k=10, k2=None, alpha=0.5, beta=6.0, small=None):
    inside, u, metric = (np.zeros((T, P)) for _ in range(3))
    for t, p in itertools.product(existing(truth), range(P)):
        box = truth["boxes"][t].astype(np.float64)
        sides, center = box[2:] - box[:2], (box[:2] + box[2:]) / 2
        if small is not None:
            sides = np.where(sides < small[0], small[1], sides)
        around = np.concatenate([center - sides / 2, center + sides / 2])
        if inside_ := distances(POINTS[p], around).min() > 0:
            u[t, p] = max(ciou(pred["pred_boxes"][p], box), 0)
            score = np.float64(pred["scores"][p, truth["labels"][t]])
            metric[t, p] = score**alpha * u[t, p] ** beta
        inside[t, p] = inside_
    claims = best_of(metric, k)
    for p in range(P):
        if claims[:, p].sum() > 1:
            claims[:, p] = False
            claims[max(existing(truth), key=lambda t: inside[t, p] * (1 + u[t, p])), p] = True
    if k2 is not None:
        claims = best_of(metric * claims, k2)
    boxes, scores, index = np.zeros((P, 4)), np.zeros((P, C)), np.full(P, -1, np.int32)
    for t, p in zip(*np.nonzero(claims), strict=True):
        boxes[p], index[p] = truth["boxes"][t], t
        best = metric[t, claims[t]].max()
        share = metric[t, p] / best if best else 0
        scores[p, truth["labels"][t]] = share * u[t, claims[t]].max()
    return boxes, scores, index >= 0, index


def best_of(metric, k):
    chosen = np.zeros_like(metric, bool)
    for row, out in zip(metric, chosen, strict=True):
        best = sorted(range(len(row)), key=lambda p: -row[p])[:k]
        out[[p for p in best if row[p] > 0]] = True
    return chosen


@pytest.mark.parametrize(
    "options",
    [{}, dict(k=3, alpha=1.0, beta=2.0), dict(k=7, k2=1), dict(k=4, k2=2, small=(16.0, 20.0))],
    ids=str,
)
def test_points_are_aligned_with_objects_as_by_loops(options) -> None:
    check_on_scenes(partial(run_aligned, **options), partial(align_by_loops, **options))


def align(scores, pred, points, boxes, labels=None, **options):
    boxes = np.asarray(boxes, np.float32)
    labels = np.zeros(len(boxes), int) if labels is None else labels
    arrays = (np.asarray(x, np.float32) for x in (scores, pred, points))
    return task_aligned_assign(*arrays, boxes, labels, **options)


def test_a_contested_point_goes_to_the_best_object_that_contains_it_claimer_or_not() -> None:
    # The third object has the largest overlap with the middle point, yet other points score higher.
    big, middle, other = [0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 9.5, 9.5]
    points = [[5, 5], [4, 4]]
    pred, scores = [[0, 0, 10, 9.6], other], [[0.9, 0.9, 1e-4], [1e-6, 1e-6, 1.0]]
    found = align(scores, pred, points, [big, middle, other], np.arange(3), k=1)
    assert found[3].tolist() == [0, 2]
    pred = [[0, 0, 9.6, 9.5], other]
    found = align(scores, pred, points, [big, middle, other], np.arange(3), k=1)
    assert found[3].tolist() == [2, 2]  # claimed by the first two, closest to the third


def test_fewer_points_inside_than_asked_for_are_all_taken() -> None:
    found = align([[0.5], [0.5]], [[0, 0, 4, 4]] * 2, [[2, 2], [9, 9]], [[0, 0, 4, 4]], k=13)
    assert found[2].tolist() == [True, False]


def test_points_of_metric_zero_are_never_claimed() -> None:
    far = [[50, 50, 60, 60]] * 2
    for scores, pred in ((np.zeros((2, 1)), [[0, 0, 4, 4]] * 2), (np.ones((2, 1)), far)):
        boxes, target, foreground, index = align(scores, pred, [[2, 2], [1, 1]], [[0, 0, 4, 4]])
        assert not np.any(boxes)
        assert not np.any(target)
        assert foreground.tolist() == [False, False]
        assert index.tolist() == [-1, -1]


def test_a_point_on_the_border_is_outside_and_equal_metrics_go_to_the_first() -> None:
    points = [[0, 2], [1, 2], [2, 2], [3, 2]]
    found = align(np.full((4, 1), 0.3), [[0, 0, 4, 4]] * 4, points, [[0, 0, 4, 4]], k=2)
    assert found[3].tolist() == [-1, 0, 0, -1]


def test_a_fresh_network_gets_targets_as_large_as_its_overlap() -> None:
    # The best metric is 5e-10 here: an epsilon of 1e-9 in the denominator would take 2/3 of it.
    target = np.asarray(align([[0.01]], [[0, 0, 10, 10]], [[2, 2]], [[0, 0, 3, 5]], beta=10.0)[1])
    assert 0 < target[0, 0] < 0.2
    np.testing.assert_allclose(target[0, 0], ciou([0, 0, 10, 10], [0, 0, 3, 5]), rtol=1e-5)


def test_small_objects_between_points_are_found_by_growing_them() -> None:
    box = [[9, 9, 11, 11]]
    none = align([[0.5]] * 2, box * 2, [[4, 4], [12, 12]], box)
    found = align([[0.5]] * 2, box * 2, [[4, 4], [12, 12]], box, small=(8.0, 16.0))
    assert none[3].tolist() == [-1, -1]
    assert found[3].tolist() == [0, 0]


@pytest.mark.parametrize("label", [-1, C, 2**31 - 1])
def test_a_bad_label_of_an_existing_object_makes_the_targets_nan(label) -> None:
    truth, pred = scene(0)
    labels = truth["labels"].copy()
    labels[np.argmax(truth["where"])] = label
    found = align(*pred.values(), POINTS, truth["boxes"], labels, where=truth["where"])
    assert np.all(np.isnan(found[1]))
    boxes = np.where(truth["where"][:, None], np.inf, truth["boxes"])
    labels = truth["labels"]
    assert np.all(np.isnan(align(*pred.values(), POINTS, boxes, labels, where=truth["where"])[1]))


# FCOS


def fcos_by_loops(truth, _, radius=1.5):
    index = np.full(P, -1, np.int32)
    for p, (x, y) in enumerate(POINTS):
        fits = {}
        for t in existing(truth):
            b = truth["boxes"][t].astype(np.float64)
            sides = distances((x, y), b)
            off = max(abs(x - (b[0] + b[2]) / 2), abs(y - (b[1] + b[3]) / 2))
            low, high = RANGES[LEVELS[p]]
            if sides.min() > 0 and off < radius * STRIDES[p] and low <= sides.max() <= high:
                fits[t] = area(b)
        if fits:
            index[p] = min(fits, key=fits.get)
    return index


@pytest.mark.parametrize("radius", [0.8, 1.5, np.inf])
def test_points_are_assigned_as_fcos_does_by_loops(radius) -> None:
    ours = lambda truth, _: fcos_assign(
        np.asarray(POINTS),
        np.asarray(STRIDES),
        np.asarray(LEVELS),
        truth["boxes"],
        radius=radius,
        ranges=RANGES,
        where=truth["where"],
    )
    check_on_scenes(ours, partial(fcos_by_loops, radius=radius))


def test_both_ends_of_a_range_belong_to_it_and_equal_areas_go_to_the_first() -> None:
    points, box = np.array([[2.0, 2.0]]), np.array([[0.0, 0, 6, 4], [0, 0, 4, 6]])
    one = lambda ranges: fcos_assign(points, np.ones(1), np.zeros(1, int), box, ranges=ranges)
    fit = partial(fcos_assign, points, np.full(1, 8), np.zeros(1, int), box)
    assert fit(ranges=((0, 4),)).tolist() == [0]
    assert fit(ranges=((4, 9),)).tolist() == [0]
    assert fit(ranges=((4.5, 9),)).tolist() == [-1]
    assert one(((0, 9),)).tolist() == [0]


def test_areas_that_differ_by_little_are_told_apart() -> None:
    # torchvision compares 1e8 - area in float32, where areas within 8 are one.
    boxes = np.array([[0.0, 0, 30, 30], [0, 0, 30, 29.9]])
    point, zero = np.array([[15.0, 15.0]]), np.zeros(1, int)
    assert fcos_assign(point, np.full(1, 8), zero, boxes, ranges=((0, 64),)).tolist() == [1]


# The matcher


def total(cost, rows):
    taken = rows >= 0
    return np.sum(cost.astype(np.float64)[rows[taken], np.flatnonzero(taken)])


def check_match(cost, where, rows):
    """As many pairs as possible, all different, at the price scipy finds in float64."""
    kept = np.flatnonzero(where)
    best, columns = linear_sum_assignment(cost[:, kept].astype(np.float64))
    assert np.all(rows[~where] == -1)
    assert np.sum(rows >= 0) == len(best)
    assert len(set(rows[rows >= 0])) == len(best)
    price = cost.astype(np.float64)[best, kept[columns]].sum()
    np.testing.assert_allclose(total(cost, rows), price, rtol=1e-6, atol=1e-5)


match_many = quick(jax.vmap(lambda c, w: hungarian_match(c, where=w)))


@pytest.mark.parametrize("shape", [(10, 6), (6, 6), (4, 9), (1, 3), (20, 15)], ids=str)
def test_matching_costs_what_scipy_finds_whatever_is_under_the_padding(shape) -> None:
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(40, *shape)).astype(np.float32)
    where = rng.random((40, shape[1])) < 0.6
    for garbage in (np.nan, -np.inf, 1e9, -1e30):
        hidden = np.where(where[:, None], cost, np.float32(garbage))
        for c, w, rows in zip(cost, where, np.asarray(match_many(hidden, where)), strict=True):
            check_match(c, w, rows)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (5, 4), elements=st.integers(-3, 3)), arrays(bool, 4))
def test_matching_of_many_ties_is_optimal(cost, where) -> None:
    check_match(cost, where, np.asarray(hungarian_match(cost, where=where)))


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (3, 6), elements=st.integers(-9, 9)), arrays(bool, 6))
def test_with_fewer_rows_than_targets_the_cheapest_targets_are_served(cost, where) -> None:
    check_match(cost, where, np.asarray(hungarian_match(cost, where=where)))


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e6, 1e25])
def test_matching_does_not_depend_on_the_scale_of_the_costs(scale) -> None:
    for shape in ((10, 6), (4, 9)):
        cost = np.random.default_rng(1).normal(size=(40, *shape)).astype(np.float32)
        scaled = (cost.astype(np.float64) * scale).astype(np.float32)
        everything = np.ones((40, shape[1]), bool)
        got, expected = match_many(scaled, everything), match_many(cost, everything)
        np.testing.assert_array_equal(got, expected)


def test_equal_costs_still_match_everything() -> None:
    for value in (0.0, -3.0, 1e20):
        wide, tall = (np.full(shape, value, np.float32) for shape in ((3, 6), (5, 4)))
        rows = np.asarray(hungarian_match(wide, where=np.ones(6, bool)))
        assert np.sum(rows >= 0) == 3
        assert np.all(np.asarray(hungarian_match(tall, where=np.ones(4, bool))) >= 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_cost_that_is_not_finite_is_paid_only_where_nothing_else_is_left(bad) -> None:
    assert hungarian_match(np.array([[bad, 1.0], [2.0, 100.0]])).tolist() == [1, 0]
    assert hungarian_match(np.array([[bad, bad], [2.0, 3.0]])).tolist() == [1, 0]
    assert sorted(hungarian_match(np.full((2, 2), bad)).tolist()) == [0, 1]


def test_matching_nothing_gives_nothing() -> None:
    assert hungarian_match(np.zeros((4, 0))).shape == (0,)
    assert hungarian_match(np.zeros((0, 2))).tolist() == [-1, -1]
    assert hungarian_match(np.zeros((4, 2)), where=np.zeros(2, bool)).tolist() == [-1, -1]


def cost_by_loops(logits, pred, labels, boxes, gains=(1.0, 5.0, 2.0)):
    corners = lambda b: np.concatenate([b[:2] - b[2:] / 2, b[:2] + b[2:] / 2])
    out = np.zeros((len(logits), len(labels)))
    for q, t in np.ndindex(*out.shape):
        probs = np.exp(logits[q] - logits[q].max())
        near = np.abs(pred[q] - boxes[t]).sum()
        overlap = giou(corners(pred[q]), corners(boxes[t]))
        out[q, t] = -gains[0] * probs[labels[t]] / probs.sum() + gains[1] * near
        out[q, t] -= gains[2] * overlap
    return out


def test_the_matching_cost_of_detr_is_its_formula() -> None:
    rng = np.random.default_rng(2)
    logits, pred = rng.normal(0, 3, (7, 5)), rng.uniform(0.1, 0.9, (7, 4))
    labels, boxes = rng.integers(0, 4, 6), rng.uniform(0.1, 0.9, (6, 4))
    got = detr_match_cost(*(np.asarray(x) for x in (logits, pred, labels, boxes)))
    np.testing.assert_allclose(got, cost_by_loops(logits, pred, labels, boxes), rtol=1e-5)
    gains = dict(class_gain=2.0, l1_gain=0.5, giou_gain=3.0)
    got = detr_match_cost(*(np.asarray(x) for x in (logits, pred, labels, boxes)), **gains)
    expected = cost_by_loops(logits, pred, labels, boxes, tuple(gains.values()))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_cost_of_a_label_that_is_no_class_is_nan_and_no_other() -> None:
    zeros = np.zeros((2, 4)), np.full((2, 4), 0.5)
    cost = detr_match_cost(*zeros, np.array([0, 3, -1, 2]), np.full((4, 4), 0.5))
    np.testing.assert_array_equal(np.isnan(np.asarray(cost)[0]), [False, True, True, False])


# What holds for all of them


def run_iou(truth, pred):
    return max_iou_assign(pred["pred_boxes"], truth["boxes"], where=truth["where"])


def run_aligned(truth, pred, **options):
    return task_aligned_assign(
        pred["scores"],
        pred["pred_boxes"],
        np.asarray(POINTS),
        truth["boxes"],
        truth["labels"],
        where=truth["where"],
        **options,
    )


def run_fcos(truth, _):
    points = np.asarray(POINTS), np.asarray(STRIDES), np.asarray(LEVELS)
    return fcos_assign(*points, truth["boxes"], ranges=RANGES, where=truth["where"])


def run_detr(truth, pred):
    logits, boxes = jnp.log(pred["scores"] + 0.1), pred["pred_boxes"] / 64
    cost = detr_match_cost(logits, boxes, truth["labels"], truth["boxes"] / 64)
    return hungarian_match(cost, where=truth["where"])


RUNS = dict(iou=run_iou, aligned=run_aligned, fcos=run_fcos, detr=run_detr)
COMPILED = {run: quick(run) for run in RUNS.values()}
MAPPED = {run: quick(jax.vmap(run)) for run in RUNS.values()}
BATCH = jax.tree.map(lambda *x: np.stack(x), *[scene(seed) for seed in range(8)])
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
same = partial(jax.tree.map, np.testing.assert_array_equal)
nearly = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=2e-5))


@every_run
def test_garbage_under_the_padding_changes_no_bit(run) -> None:
    first = COMPILED[run](*scene(3))
    for garbage, label in ((np.inf, -1), (-np.inf, 0), (3.0, 1), (1e30, C)):
        same(COMPILED[run](*scene(3, garbage, label)), first)


@every_run
def test_an_image_without_objects_has_only_background(run) -> None:
    truth, pred = scene(3)
    nobody = {**truth, "where": np.zeros(T, bool)}
    for empty in (nobody, {name: array[:0] for name, array in truth.items()}):
        *rest, index = map(np.asarray, jax.tree.leaves(COMPILED[run](empty, pred)))
        assert np.all(index == -1)
        assert not any(np.any(leaf) for leaf in rest)


@every_run
def test_mapped_over_images_is_one_by_one_and_nothing_has_a_gradient(run) -> None:
    mapped = jax.device_get(MAPPED[run](*BATCH))
    nearly(jax.tree.map(lambda x: x[5], mapped), COMPILED[run](*scene(5)))
    truth, pred = scene(5, 0.5, 0)

    def summed(pred, boxes):
        return sum(jnp.sum(x) * 1.0 for x in jax.tree.leaves(run({**truth, "boxes": boxes}, pred)))

    for gradient in jax.tree.leaves(quick(jax.grad(summed, (0, 1)))(pred, truth["boxes"])):
        np.testing.assert_array_equal(gradient, 0)


def test_nothing_changes_without_compilation_of_the_alignment() -> None:
    truth, pred = scene(5, 0.5, 0)
    with jax.disable_jit():  # its operations one by one, as they meet plain NumPy arrays
        operations = jax.make_jaxpr(lambda: run_aligned(truth, pred))()
    assert not {"jit", "pjit"} & {str(equation.primitive) for equation in operations.eqns}
    nearly(quick(jaxpr_as_fun(operations))(), [*COMPILED[run_aligned](truth, pred)])


def test_nothing_changes_without_compilation_of_the_matcher() -> None:
    truth, pred = scene(5, 0.5, 0)
    cost = np.random.default_rng(3).normal(size=(3, 3)).astype(np.float32)
    where = np.array([True, False, True])
    with jax.disable_jit():  # its loop in Python
        slow = hungarian_match(cost, where=where)
        operations = jax.make_jaxpr(lambda: run_detr(truth, pred))()
    np.testing.assert_array_equal(slow, hungarian_match(cost, where=where))
    nearly(quick(jaxpr_as_fun(operations))(), [COMPILED[run_detr](truth, pred)])


@every_run
def test_sharded_images_are_assigned_like_whole_ones(run) -> None:
    whole = jax.device_get(MAPPED[run](*BATCH))
    spec = PartitionSpec("data")
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            put = jax.device_put(BATCH, NamedSharding(mesh, spec))
            program = quick(jax.vmap(run)).lower(*put).compile()
            nearly(jax.device_get(program(*put)), whole)
            assert "all-gather" not in program.as_text()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda *a: jax.vmap(run)(*a), mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )
    nearly(jax.device_get(quick(mapped)(*BATCH)), whole)


@every_run
def test_precision_and_promotion_do_not_matter(run) -> None:
    truth, pred = scene(7, 0.5, 0)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        expected = jax.eval_shape(lambda *a: run(*a), truth, pred)
    with jax.enable_x64(True):
        assert jax.eval_shape(lambda *a: run(*a), truth, pred) == expected
        widen = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
        wide = jax.eval_shape(lambda *a: run(*a), *jax.tree.map(widen, (truth, pred)))
    for narrow, leaf in zip(jax.tree.leaves(expected), jax.tree.leaves(wide), strict=True):
        assert leaf.dtype == (np.float64 if narrow.dtype == np.float32 else narrow.dtype)


ZEROS = dict(
    anchors=np.zeros((3, 4)),
    boxes=np.zeros((2, 4)),
    labels=np.zeros(2, int),
    scores=np.zeros((3, 5)),
    pred_boxes=np.zeros((3, 4)),
    points=np.zeros((3, 2)),
    strides=np.ones(3),
    levels=np.zeros(3, int),
    logits=np.zeros((3, 5)),
    cost=np.zeros((3, 2)),
)


@pytest.mark.parametrize(
    ("function", "change", "error", "text"),
    [
        (max_iou_assign, dict(anchors=np.zeros((1, 3, 4))), ValueError, "vmap over a batch"),
        (max_iou_assign, dict(boxes=np.zeros((2, 5))), ValueError, r"shape \(n, 4\)"),
        (max_iou_assign, dict(where=np.ones(3, bool)), ValueError, r"shape \(2,\), got"),
        (max_iou_assign, dict(where=np.ones(2)), TypeError, "a bool array, got float32"),
        (task_aligned_assign, dict(scores=np.zeros((3, 5), int)), TypeError, "floating"),
        (task_aligned_assign, dict(labels=np.zeros(2)), TypeError, "integer dtype, got float32"),
        (task_aligned_assign, dict(labels=np.zeros(3, int)), ValueError, r"shape \(2,\), got"),
        (task_aligned_assign, dict(points=np.zeros((4, 2))), ValueError, r"shape \(3, 2\), got"),
        (task_aligned_assign, dict(k=0), ValueError, "a count of at least 1, got 0"),
        (task_aligned_assign, dict(k2=0), ValueError, "a count of at least 1, got 0"),
        (fcos_assign, dict(levels=np.zeros(3)), TypeError, "integer dtype"),
        (fcos_assign, dict(strides=np.ones((3, 1))), ValueError, r"shape \(3,\), got \(3, 1\)"),
        (detr_match_cost, dict(pred_boxes=np.zeros((2, 4))), ValueError, r"shape \(3, 4\), got"),
        (hungarian_match, dict(cost=np.zeros((3, 2), int)), TypeError, "floating"),
        (hungarian_match, dict(cost=np.zeros((1, 3, 2))), ValueError, "vmap over a batch"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_shape_or_dtype_is_named(function, change, error, text) -> None:
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    arrays = [{**ZEROS, **change}[name] for name in names]
    options = {name: value for name, value in change.items() if name not in names}
    (argument,) = change
    with pytest.raises(error, match=f"^{function.__name__}: {argument}: expected .*{text}"):
        function(*arrays, **options)


def test_checked_names_scores_that_are_no_probabilities() -> None:
    with pytest.raises(ValueError, match=r"scores: expected values in \[0, 1\], got 1 that"):
        checked(task_aligned_assign)(
            np.array([[2.0]]),
            np.ones((1, 4)),
            np.ones((1, 2)),
            np.ones((1, 4)),
            np.zeros(1, int),
        )
