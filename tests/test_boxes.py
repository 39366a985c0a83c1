"""Boxes: formulas in 50 digits, degenerate and far boxes, what peers get wrong, notations."""

from functools import partial

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import units_and_gradient, units_off

from jaxloss import checked
from jaxloss.losses.box_coding import (
    box_to_distances,
    decode_deltas,
    distances_to_box,
    encode_deltas,
    grid_points,
)
from jaxloss.losses.box_formats import (
    cxcywh_to_xyxy,
    scale_boxes,
    xywh_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
    yxyx_to_xyxy,
)
from jaxloss.losses.box_scores import (
    box_area,
    box_iou,
    complete_box_iou,
    distance_box_iou,
    generalized_box_iou,
    pairwise_box_iou,
    pairwise_generalized_box_iou,
)
from jaxloss.losses.box_variants import (
    alpha_iou_loss,
    bounded_iou_loss,
    extended_iou_loss,
    inner_iou_loss,
    mpd_iou_loss,
    nwd_loss,
    shape_iou_loss,
    wise_iou_loss,
)
from jaxloss.losses.boxes import (
    box_l1_loss,
    ciou_loss,
    diou_loss,
    eiou_loss,
    giou_loss,
    iou_loss,
    log_iou_loss,
    siou_loss,
    squared_iou_loss,
)


def mpd_in_an_image(pred, target, **options):
    return mpd_iou_loss(pred, target, image_size=(480, 640), **options)


FREE_OF_SCALE = (
    iou_loss,
    squared_iou_loss,
    giou_loss,
    diou_loss,
    ciou_loss,
    eiou_loss,
    siou_loss,
    alpha_iou_loss,
    bounded_iou_loss,
    extended_iou_loss,
    inner_iou_loss,
    shape_iou_loss,
    wise_iou_loss,
)
EVERY = (*FREE_OF_SCALE, nwd_loss, box_l1_loss, mpd_in_an_image)
FULL = dict(stop_gradient_alpha=False)
together = partial(zip, strict=True)
GENERATOR = np.random.default_rng(0)


def named(loss):
    return getattr(loss, "__name__", "")


def boxes(count, generator=GENERATOR):
    low = generator.uniform(0, 10, (count, 2))
    return np.concatenate([low, low + generator.uniform(0.5, 8, (count, 2))], -1).astype(np.float32)


def box(*numbers, count=1):
    return np.tile(np.array([numbers], np.float32), (count, 1))


pairs = partial(box, count=36)  # of the shape of `boxes(36)`: they share one program


# Formulas in 50 digits, each side by side with the paper; `p` and `t` are (x0, y0, x1, y1)


def sizes(p):
    return p[2] - p[0], p[3] - p[1]


def area(p):
    w, h = sizes(p)
    return w * h


def both(p, t):
    w = min(p[2], t[2]) - max(p[0], t[0])
    h = min(p[3], t[3]) - max(p[1], t[1])
    return max(w, 0) * max(h, 0)


def hull(p, t):
    return min(p[0], t[0]), min(p[1], t[1]), max(p[2], t[2]), max(p[3], t[3])


def iou(p, t):
    return both(p, t) / (area(p) + area(t) - both(p, t))


def way(p, t):
    return (p[0] + p[2] - t[0] - t[2]) / 2, (p[1] + p[3] - t[1] - t[3]) / 2


def giou(p, t):
    outer = area(hull(p, t))
    return iou(p, t) - (outer - area(p) - area(t) + both(p, t)) / outer


def distance(p, t, qx=1, qy=1):
    (dx, dy), (cw, ch) = way(p, t), sizes(hull(p, t))
    return (qx * dx**2 + qy * dy**2) / (cw**2 + ch**2)


def ciou(p, t):
    v = 4 / mp.pi**2 * (mp.atan2(*sizes(t)) - mp.atan2(*sizes(p))) ** 2
    score = iou(p, t)
    return score - distance(p, t) - v**2 / (1 - score + v)


def eiou(p, t):
    terms = [(a - b) ** 2 / c**2 for a, b, c in together(sizes(p), sizes(t), sizes(hull(p, t)))]
    return iou(p, t) - distance(p, t) - sum(terms)


def siou(p, t, theta):
    dx, dy = way(p, t)
    angle = mp.sin(2 * mp.asin(abs(dy) / mp.sqrt(dx**2 + dy**2)))
    shares = [(d / c) ** 2 for d, c in together((dx, dy), sizes(hull(p, t)))]
    delta = sum(1 - mp.exp(-(2 - angle) * share) for share in shares)
    omega = sum(
        (1 - mp.exp(-abs(a - b) / max(a, b))) ** theta for a, b in together(sizes(p), sizes(t))
    )
    return 1 - iou(p, t) + (delta + omega) / 2


def smooth_l1(u, beta):
    return u**2 / (2 * beta) if u < beta else u - beta / 2


def bounded(p, t, beta):
    shifts = [max((c - 2 * abs(d)) / (c + 2 * abs(d)), 0) for d, c in together(way(p, t), sizes(t))]
    ratios = [min(a / b, b / a) for a, b in together(sizes(p), sizes(t))]
    return sum(smooth_l1(1 - x, beta) for x in shifts + ratios)


def extended(p, t, s):
    x, y = hull(p, t)[:2]
    x0, y0 = max(p[0], t[0]) - x, max(p[1], t[1]) - y
    x1, y1 = min(p[2], t[2]) - x, min(p[3], t[3]) - y
    signed = x1 * y1 + min(x0, x1) * min(y0, y1) - x0 * max(y0, y1) - max(x0, x1) * y0
    return smooth_l1(1 - signed / (area(p) + area(t) - signed), s)


def scaled(p, ratio):
    (w, h), x, y = sizes(p), (p[0] + p[2]) / 2, (p[1] + p[3]) / 2
    return x - ratio * w / 2, y - ratio * h / 2, x + ratio * w / 2, y + ratio * h / 2


def shape(p, t, s):
    w, h = (side**s for side in sizes(t))
    qw, qh = 2 * w / (w + h), 2 * h / (w + h)
    omega = sum(
        (1 - mp.exp(-q * abs(a - b) / max(a, b))) ** 4
        for q, a, b in together((qh, qw), sizes(p), sizes(t))
    )
    return 1 - iou(p, t) + distance(p, t, qh, qw) + omega / 2


def wasserstein(p, t):
    halves = [(a - b) / 2 for a, b in together(sizes(p), sizes(t))]
    return mp.sqrt(sum(x**2 for x in (*way(p, t), *halves)))


MEETING = [
    (0, 0, 2, 1, 1, 0.25, 4, 3),  # overlapping
    (1, 1, 2, 2.5, 0, 0, 4, 3),  # inside
    (3.1, 4.2, 5.3, 8.4, 3.1 + 1e-5, 4.2 - 2e-5, 5.3 + 1e-5, 8.4 - 3e-5),  # almost equal
    (1e6, 1e6, 1e6 + 1, 1e6 + 1.5, 1e6 + 0.25, 1e6 - 0.125, 1e6 + 1.125, 1e6 + 1.125),
    (0, 0, 3e-12, 1e-12, 1e-12, -1e-12, 2.5e-12, 7e-12),  # tiny
    (0, 0.5, 100, 0.75, -1, 0.25, 120, 0.875),  # slim
]
APART = [
    (0, 0, 2, 1, 3, 0.25, 4, 3),  # beside
    (0, 0, 1, 1, 2000, 1001, 2002, 1003),  # far away
]
FORMULAS = [
    (iou_loss, lambda p, t: 1 - iou(p, t), {}),
    (log_iou_loss, lambda p, t: -mp.log(iou(p, t)), {}),
    (squared_iou_loss, lambda p, t: 1 - iou(p, t) ** 2, {}),
    (giou_loss, lambda p, t: 1 - giou(p, t), {}),
    (diou_loss, lambda p, t: 1 - iou(p, t) + distance(p, t), {}),
    (ciou_loss, lambda p, t: 1 - ciou(p, t), FULL),
    (eiou_loss, lambda p, t: 1 - eiou(p, t), {}),
    (siou_loss, lambda p, t: siou(p, t, 4), {}),
    (box_l1_loss, lambda p, t: sum(abs(a - b) for a, b in together(p, t)), {}),
    (alpha_iou_loss, lambda p, t: 1 - iou(p, t) ** 3, {}),
    (bounded_iou_loss, lambda p, t: bounded(p, t, mp.mpf(1) / 5), {}),
    (extended_iou_loss, lambda p, t: extended(p, t, mp.mpf(1) / 10), {}),
    (inner_iou_loss, lambda p, t: 1 - iou(scaled(p, 0.75), scaled(t, 0.75)), {}),
    (
        mpd_iou_loss,
        lambda p, t: 1 - iou(p, t) + sum((a - b) ** 2 for a, b in together(p, t)) / 25,
        dict(image_size=(3, 4)),
    ),
    (nwd_loss, lambda p, t: 1 - mp.exp(-wasserstein(p, t) / 4), dict(constant=4.0)),
    (shape_iou_loss, lambda p, t: shape(p, t, 1.5), dict(scale=1.5)),
]


@pytest.mark.parametrize(("loss", "exact", "options"), FORMULAS, ids=named)
def test_value_and_slopes_match_fifty_digits(loss, exact, options) -> None:
    points = MEETING if loss is log_iou_loss else MEETING + APART

    def split(*numbers, reduction):
        pred, target = jnp.stack(numbers[:4], -1), jnp.stack(numbers[4:], -1)
        return loss(pred, target, reduction=reduction, **options)

    off = units_off(split, lambda *x: exact(x[:4], x[4:]), *together(*points))
    assert max(worst for worst, _ in off.values()) <= 4, off


def test_wise_iou_holds_the_diagonal_constant() -> None:
    pred, target = boxes(36), boxes(36)
    low, high = np.minimum(pred, target)[:, :2], np.maximum(pred, target)[:, 2:]
    squared = np.sum((high - low) ** 2, axis=-1)

    def plain(pred, target, *, reduction):
        gap = (pred[:, :2] + pred[:, 2:] - target[:, :2] - target[:, 2:]) / 2
        away = jnp.exp(jnp.sum(gap**2, axis=-1) / squared)
        values = away * iou_loss(pred, target, reduction="none")
        return jnp.sum(values) if reduction == "sum" else values

    for got, expected in together(
        units_and_gradient(wise_iou_loss, pred, target), units_and_gradient(plain, pred, target)
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


# What peers get wrong


def test_a_point_inside_its_target_has_a_finite_ciou() -> None:
    # torchvision: atan(0 / 0). The angle of a point is 0, that of a square pi/4: v = 1/4.
    pred, target = pairs(1, 1, 1, 1), pairs(0, 0, 2, 2)
    value, gradient = units_and_gradient(ciou_loss, pred, target)
    np.testing.assert_allclose(value, 1 + 0.25**2 / (1 + 0.25), rtol=1e-6)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("options", [{}, FULL], ids=["stopped", "full"])
def test_coincident_boxes_have_ciou_zero_and_a_finite_gradient(options) -> None:
    pred = boxes(36)
    value, gradient = units_and_gradient(ciou_loss, pred, pred, **options)
    assert not np.any(value)
    assert np.max(np.abs(gradient)) < 1e-6
    slope = jax.grad(lambda x: ciou_loss(x, pred, **options))
    assert np.all(np.isfinite(jax.jit(lambda x: jax.jvp(slope, (x,), (x,))[1])(pred)))


def test_the_aspect_term_of_ciou_squares_the_angles_alone() -> None:
    # keras_cv squares 4 / pi^2 too. Same centre, 1:1 inside 2:1, IoU 1/2.
    pred, target = pairs(-1, -1, 1, 1), pairs(-2, -1, 2, 1)
    v = 4 / np.pi**2 * (np.arctan(2) - np.arctan(1)) ** 2
    value, _ = units_and_gradient(ciou_loss, pred, target)
    np.testing.assert_allclose(value, 0.5 + v**2 / (0.5 + v), rtol=1e-6)


def test_the_gradient_of_alpha_is_stopped_unless_asked_for() -> None:
    pred, target = boxes(36), boxes(36)
    stopped = units_and_gradient(ciou_loss, pred, target)
    whole = units_and_gradient(ciou_loss, pred, target, **FULL)
    plain = [ciou_loss(pred, target, reduction="none", **options) for options in ({}, FULL)]
    np.testing.assert_array_equal(*plain)
    assert np.max(np.abs(stopped[1] - whole[1])) > 1e-2 * np.max(np.abs(whole[1]))


def test_ciou_leaves_out_the_aspect_up_to_the_threshold() -> None:
    pred, target = pairs(-1, -1, 1, 1), pairs(-2, -1, 2, 1)  # IoU 1/2
    units = lambda loss, **options: units_and_gradient(loss, pred, target, **options)[0]
    for threshold, expected in ((0.5, diou_loss), (0.49, ciou_loss)):
        got = units(ciou_loss, alpha_threshold=threshold)
        np.testing.assert_array_equal(got, units(expected))


def test_siou_costs_more_the_farther_the_centres_are_apart() -> None:
    # mmdetection's default has the sign of the exponent reversed.
    target = pairs(0, 0, 2, 2)
    by = np.linspace(0, 8, 36, dtype=np.float32)[:, None]
    costs, _ = units_and_gradient(siou_loss, target + by, target)
    assert np.all(np.diff(costs) > 0)


@pytest.mark.parametrize("by", [0.0, 1e-30, 1e-6])
@pytest.mark.parametrize("way", [(1, 0), (0, 1), (1, 1)])
def test_siou_is_smooth_where_the_centres_meet(by: float, way: tuple[int, int]) -> None:
    pred = pairs(-1, -1, 1, 1) + np.float32(by) * np.array([[*way, *way]], np.float32)
    value, gradient = units_and_gradient(siou_loss, pred, pairs(-2, -2, 2, 2))
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(gradient))


def test_log_iou_of_disjoint_boxes_is_infinite_without_gradient() -> None:
    value, gradient = units_and_gradient(log_iou_loss, box(0, 0, 1, 1), box(5, 5, 6, 6))
    assert value == np.inf
    assert not np.any(gradient)


@pytest.mark.parametrize("loss", [iou_loss, giou_loss, diou_loss, ciou_loss])
def test_a_hundred_thousand_pairs_need_memory_for_pairs_alone(loss) -> None:
    # keras_cv compares all with all and takes the diagonal: 40 GB.
    pairs = jax.ShapeDtypeStruct((100_000, 4), jnp.float32)
    program = jax.jit(jax.value_and_grad(loss)).lower(pairs, pairs).compile()
    assert program.memory_analysis().temp_size_in_bytes < 100_000 * 4 * 60


def test_boxes_are_columns_first() -> None:
    # tf-addons takes rows first; ultralytics takes centre and size by default.
    wide, tall = (0, 0, 4, 1), (0, 0, 1, 4)
    np.testing.assert_array_equal(yxyx_to_xyxy(box(*wide)), box(*tall))
    score = box_iou(np.array([wide, tall], np.float32), box(3, 0, 4, 1, count=2))
    np.testing.assert_array_equal(score, [0.25, 0])


@pytest.mark.parametrize("loss", FREE_OF_SCALE, ids=named)
def test_unit_boxes_a_million_pixels_away_lose_no_digit(loss) -> None:
    near, by = np.array([[0, 0, 1, 1.5], [0.25, -0.125, 1.125, 1.125]], np.float32), 2**20
    pred, target = np.repeat(near[:1], 36, 0), np.repeat(near[1:], 36, 0)
    here = units_and_gradient(loss, pred, target)
    there = units_and_gradient(loss, pred + by, target + by)
    np.testing.assert_array_equal(there[0], here[0])
    np.testing.assert_array_equal(there[1], here[1])


@pytest.mark.parametrize("loss", [ciou_loss, siou_loss, mpd_in_an_image], ids=named)
def test_areas_beyond_float16_are_finite(loss) -> None:
    pred, target = boxes(36) * 3000, boxes(36) * 3000
    value, gradient = units_and_gradient(loss, pred.astype(np.float16), target.astype(np.float16))
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(gradient))


# Degenerate, touching and far boxes


@pytest.mark.parametrize("loss", EVERY, ids=named)
def test_degenerate_pairs_have_finite_values_and_gradients(loss) -> None:
    solid, point, line = (1, 1, 3, 2), (2, 1.5, 2, 1.5), (1, 1, 1, 2)
    crossed, far, nothing = (3, 2, 1, 1), (1e7, 1e7, 1e7 + 2, 1e7 + 2), (0, 0, 0, 0)
    kinds = np.array([solid, point, line, crossed, far, nothing], np.float32)
    pred, target = np.repeat(kinds, 6, 0), np.tile(kinds, (6, 1))
    value, gradient = units_and_gradient(loss, pred, target)
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("loss", FREE_OF_SCALE, ids=named)
def test_the_scale_of_a_pair_does_not_matter(loss) -> None:
    pred, target = boxes(36, np.random.default_rng(1)), boxes(36, np.random.default_rng(2))
    value, gradient = units_and_gradient(loss, pred, target)
    for scale in np.float32([2.0**-84, 2.0**80]):
        scaled = units_and_gradient(loss, scale * pred, scale * target)
        np.testing.assert_allclose(scaled[0], value, rtol=1e-6)
        np.testing.assert_allclose(scaled[1] * scale, gradient, rtol=1e-4, atol=1e-6)


def test_two_boxes_without_area_have_iou_zero() -> None:
    point = box(1, 1, 1, 1, count=2)
    assert not np.any(box_iou(point, point))
    assert np.all(iou_loss(point, point, reduction="none") == 1)
    assert not np.any(generalized_box_iou(point, point))


def test_touching_boxes_of_one_size_have_giou_loss_one() -> None:
    value, _ = units_and_gradient(giou_loss, pairs(0, 0, 1, 1), pairs(1, 0, 2, 1))
    assert np.all(value == 1)


def test_disjoint_boxes_attract_one_another_under_giou_but_not_under_iou() -> None:
    pred, target = pairs(0, 0, 1, 1), pairs(5, 0, 6, 1)
    assert not np.any(units_and_gradient(iou_loss, pred, target)[1])
    gradient = units_and_gradient(giou_loss, pred, target)[1]
    assert np.all(gradient[:, 2] < 0)  # the side that faces the target moves to the right


def test_extended_iou_tells_distances_of_disjoint_boxes_apart() -> None:
    by = np.linspace(1, 4, 36)[:, None] * [1, 0, 1, 0]
    target = pairs(0, 0, 1, 1) + by.astype(np.float32)
    costs, gradient = units_and_gradient(extended_iou_loss, pairs(0, 0, 1, 1), target)
    assert np.all(np.diff(costs) > 0)
    assert np.all(gradient[1:, 2] < 0)  # the first pair touches


def test_nwd_is_flat_at_equality() -> None:
    same = boxes(36)
    value, gradient = units_and_gradient(nwd_loss, same, same)
    assert not np.any(value)
    assert not np.any(gradient)


def test_a_bounded_shift_stops_at_half_the_target() -> None:
    target = pairs(0, 0, 2, 2)
    for beyond in (1, 9):
        pred = target + np.float32([[beyond, 0, beyond, 0]])
        value, _ = units_and_gradient(bounded_iou_loss, pred, target)
        np.testing.assert_array_equal(value, np.float32(1 - 0.1))
    assert not np.any(units_and_gradient(bounded_iou_loss, target + np.float32(9), target)[1])


def test_alpha_iou_runs_through_iou_and_squared_iou() -> None:
    pred, target = boxes(36), boxes(36)
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    for alpha, loss in ((1.0, iou_loss), (2.0, squared_iou_loss)):
        got = units_and_gradient(alpha_iou_loss, pred, target, alpha=alpha)
        expected = units_and_gradient(loss, pred, target)
        close(got[0], expected[0])
        close(got[1], expected[1], atol=1e-7)


def test_inner_iou_with_ratio_one_is_iou() -> None:
    pred, target = boxes(36), boxes(36)
    inner = inner_iou_loss(pred, target, ratio=1.0, reduction="none")
    expected, _ = units_and_gradient(iou_loss, pred, target)
    np.testing.assert_allclose(inner, expected, rtol=1e-6)


@given(
    arrays(np.float32, (2, 4), elements=st.integers(0, 64).map(lambda n: n / 8)),
    arrays(np.float32, (2, 4), elements=st.integers(0, 64).map(lambda n: n / 8)),
)
@settings(max_examples=40, deadline=None)
def test_scores_are_symmetric_ordered_and_in_their_ranges(a, b) -> None:
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    score, general, away, complete = (
        np.asarray(f(a, b))
        for f in (box_iou, generalized_box_iou, distance_box_iou, complete_box_iou)
    )
    assert np.all((score >= 0) & (score <= 1))
    assert np.all((general >= -1) & (general <= score + 1e-6))
    assert np.all((away >= -1) & (away <= score))
    assert np.all(complete <= away)
    np.testing.assert_allclose(box_iou(b, a), score, rtol=1e-6)
    np.testing.assert_allclose(generalized_box_iou(b, a), general, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(iou_loss(a, b, reduction="none"), 1 - score, rtol=1e-5, atol=1e-6)


def test_pairwise_scores_are_the_scores_of_all_pairs() -> None:
    a, b = boxes(3), boxes(4)
    left, right = np.repeat(a, 4, 0), np.tile(b, (3, 1))
    for pairwise, score in (
        (pairwise_box_iou, box_iou),
        (pairwise_generalized_box_iou, generalized_box_iou),
    ):
        np.testing.assert_allclose(
            pairwise(a, b), score(left, right).reshape(3, 4), rtol=1e-6, atol=1e-7
        )
    assert pairwise_box_iou(a[:0], b).shape == (0, 4)


def test_boxes_of_whole_pixels_have_scores() -> None:
    pixels = np.array([[0, 0, 2, 2]])
    assert box_iou(pixels, pixels)[0] == 1
    assert box_area(np.array([[0, 0, 0, 2, 3, 4]]))[0] == 24


# Values only `checked` sees, shapes


@pytest.mark.parametrize("name", ["pred", "target"])
def test_checked_finds_crossed_boxes(name: str) -> None:
    pair = dict(pred=box(0, 0, 1, 1), target=box(0, 0, 1, 1))
    pair[name] = box(1, 0, 0, 1)
    with pytest.raises(ValueError, match=f"^giou_loss: {name}: expected boxes"):
        checked(giou_loss)(pair["pred"], pair["target"])
    checked(giou_loss)(pair["pred"], pair["target"], where=np.array([False]))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ciou_loss(jnp.ones((2, 6)), jnp.ones((2, 6))), "pred: expected a last axis of"),
        (lambda: giou_loss(jnp.ones((2, 5)), jnp.ones((2, 5))), "size 4 or 6, got shape"),
        (lambda: box_iou(jnp.ones((2, 4)), jnp.ones((1, 4))), "b: expected shape"),
        (lambda: pairwise_box_iou(jnp.ones((2, 4)), jnp.ones((2, 6))), "b: expected a last axis"),
        (lambda: pairwise_box_iou(jnp.ones(4), jnp.ones((2, 4))), "a: expected two axes"),
        (lambda: scale_boxes(jnp.ones(4), (1.0,)), "factors: expected two numbers"),
        (lambda: encode_deltas(jnp.ones((3, 4)), jnp.ones((2, 4))), "anchors: expected shape"),
        (lambda: decode_deltas(jnp.ones(4), jnp.ones(4), scales=(1, 1)), "scales: expected four"),
        (lambda: box_to_distances(jnp.ones((3, 4)), jnp.ones((2, 2))), "points: expected shape"),
        (lambda: grid_points([(1, 2)], [8, 16]), "strides: expected one stride"),
        (
            lambda: mpd_iou_loss(jnp.ones((2, 4)), jnp.ones((2, 4)), image_size=(1, 2, 3)),
            "image_size: expected two numbers",
        ),
    ],
)
def test_wrong_shapes_say_what_was_expected(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


# Notations


def test_notations_go_there_and_back() -> None:
    corners = boxes(7)
    for there, back in (
        (xyxy_to_cxcywh, cxcywh_to_xyxy),
        (xyxy_to_xywh, xywh_to_xyxy),
        (yxyx_to_xyxy, yxyx_to_xyxy),
    ):
        np.testing.assert_allclose(back(there(corners)), corners, rtol=1e-6)


def test_scaling_takes_traced_factors() -> None:
    half = jax.jit(lambda f: scale_boxes(box(2, 4, 6, 8), (f, 2 * f)))(0.5)
    np.testing.assert_array_equal(half, box(1, 4, 3, 8))


@pytest.mark.parametrize("scales", [(1, 1, 1, 1), (10.0, 10.0, 5.0, 5.0)])
def test_deltas_go_there_and_back_for_anchors_shared_by_images(scales) -> None:
    anchors, targets = boxes(5), np.stack([boxes(5), boxes(5)])
    deltas = encode_deltas(targets, anchors, scales=scales)
    decoded = decode_deltas(deltas, anchors, scales=scales)
    np.testing.assert_allclose(decoded, targets, rtol=1e-5, atol=1e-5)
    center = (targets[..., 2:] + targets[..., :2] - anchors[..., 2:] - anchors[..., :2]) / 2
    size = anchors[..., 2:] - anchors[..., :2]
    expected = np.concatenate(
        [center / size, np.log((targets[..., 2:] - targets[..., :2]) / size)], -1
    )
    np.testing.assert_allclose(deltas, expected * np.array(scales), rtol=1e-4, atol=1e-5)


def test_a_decoded_size_stops_at_the_clip() -> None:
    deltas = box(0, 0, 100, 1)
    decoded, gradient = jax.value_and_grad(lambda d: decode_deltas(d, box(0, 0, 16, 16))[0, 2])(
        deltas
    )
    np.testing.assert_allclose(decoded, 8 + 500, rtol=1e-6)
    assert gradient[0, 2] == 0


def test_an_empty_box_has_an_infinite_delta_without_gradient() -> None:
    anchor = box(0, 0, 2, 2)
    deltas = encode_deltas(box(1, 1, 1, 1), anchor)
    np.testing.assert_array_equal(deltas, box(0, 0, -np.inf, -np.inf))
    gradient = jax.grad(lambda x: encode_deltas(x, anchor)[0, 0])(box(1, 1, 1, 1))
    assert np.all(np.isfinite(gradient))


def test_distances_go_there_and_back() -> None:
    points = GENERATOR.uniform(0, 10, (6, 2)).astype(np.float32)
    corners = np.stack([boxes(6), boxes(6)])
    distances = box_to_distances(corners, points)
    np.testing.assert_array_equal(distances[..., 0], points[:, 0] - corners[..., 0])
    np.testing.assert_array_equal(distances[..., 3], corners[..., 3] - points[:, 1])
    np.testing.assert_allclose(distances_to_box(distances, points), corners, rtol=1e-5, atol=1e-6)


def test_grid_points_run_level_by_level_and_rows_first() -> None:
    points, strides = grid_points([(2, 3), (1, 1)], [8, 16])
    expected = [(x, y) for y in (4, 12) for x in (4, 12, 20)] + [(8, 8)]
    np.testing.assert_array_equal(points, expected)
    np.testing.assert_array_equal(strides, [8] * 6 + [16])
    np.testing.assert_array_equal(grid_points([(1, 2)], [4], offset=0)[0], [(0, 0), (4, 0)])
    assert grid_points([], [])[0].shape == (0, 2)
