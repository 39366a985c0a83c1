"""Overlap losses: empty masks, memberships, limits between them, and what is never held."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import units_and_gradient

from jaxloss import checked
from jaxloss._core import regions
from jaxloss.criteria.segmentation import cross_entropy_iou_loss
from jaxloss.losses.segmentation import (
    class_present,
    dice_loss,
    focal_tversky_loss,
    generalized_dice_loss,
    jaccard_loss,
    log_cosh_dice_loss,
    mcc_loss,
    tversky_loss,
)

GENERATOR = np.random.default_rng(0)
PROBS = GENERATOR.dirichlet(np.ones(4), (3, 5, 6)).astype(np.float32)
LABELS = GENERATOR.integers(0, 4, (3, 5, 6), np.int32)
ONE_HOT = np.eye(4, dtype=np.float32)[LABELS]
SOFT = GENERATOR.random((3, 5, 6, 4)).astype(np.float32)
LOSSES = (
    dice_loss,
    tversky_loss,
    jaccard_loss,
    focal_tversky_loss,
    generalized_dice_loss,
    log_cosh_dice_loss,
    mcc_loss,
)
each = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
some = pytest.mark.parametrize(
    "loss", [dice_loss, generalized_dice_loss, mcc_loss], ids=lambda f: f.__name__
)
cases = settings(max_examples=30, deadline=None)
members = arrays(np.float32, (2, 6, 3), elements=st.sampled_from([0.0, 0.125, 0.5, 0.875, 1.0]))


def assert_same(got: Any, expected: Any, **tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or dict(rtol=2e-6, atol=5e-7)))


softmax = jax.jit(jax.nn.softmax)


def counts(probs: Any, onehot: Any) -> tuple[np.ndarray, ...]:
    """True positives, false positives, false negatives and true negatives in float64."""
    p, g = np.asarray(probs, np.float64), np.asarray(onehot, np.float64)
    total = lambda x: x.reshape(len(x), -1, x.shape[-1]).sum(axis=1)
    return total(p * g), total(p * (1 - g)), total((1 - p) * g), total((1 - p) * (1 - g))


def test_each_loss_is_its_textbook_formula_on_labels() -> None:
    tp, fp, fn, tn = counts(PROBS, ONE_HOT)
    dice = 1 - (2 * tp + 1) / (2 * tp + fp + fn + 1)
    tversky = 1 - (tp + 0.5) / (tp + 0.2 * fp + 0.9 * fn + 0.5)
    weight = 1 / (tp + fn) ** 2
    shared, both = (weight * 2 * tp).sum(-1), (weight * (2 * tp + fp + fn)).sum(-1)
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    options = dict(alpha=0.2, beta=0.9, smooth=0.5)
    for units, expected in (
        (dice_loss(PROBS, LABELS, reduction="none"), dice),
        (tversky_loss(PROBS, LABELS, reduction="none", **options), tversky),
        (jaccard_loss(PROBS, LABELS, reduction="none"), 1 - (tp + 1) / (tp + fp + fn + 1)),
        (
            focal_tversky_loss(PROBS, LABELS, gamma=1.7, reduction="none", **options),
            tversky ** (1 / 1.7),
        ),
        (
            generalized_dice_loss(PROBS, LABELS, smooth=0.01, reduction="none"),
            1 - (shared + 0.01) / (both + 0.01),
        ),
        (log_cosh_dice_loss(PROBS, LABELS, reduction="none"), np.log(np.cosh(dice))),
        (mcc_loss(PROBS, LABELS, reduction="none"), 1 - (tp * tn - fp * fn) / root),
    ):
        np.testing.assert_allclose(units, expected, rtol=2e-6)


@each
def test_labels_and_one_hot_memberships_agree_in_value_and_gradient(loss: Any) -> None:
    where = GENERATOR.random((3, 5, 6)) < 0.5
    got = units_and_gradient(loss, PROBS, LABELS, where=where)
    assert_same(got, units_and_gradient(loss, PROBS, ONE_HOT, where=where))


@some
def test_labels_and_one_hot_memberships_agree_where_probabilities_are_saturated(loss: Any) -> None:
    hard = np.eye(4, dtype=np.float32)[GENERATOR.integers(0, 4, LABELS.shape)]
    got = units_and_gradient(loss, hard, LABELS)
    assert_same(got, units_and_gradient(loss, hard, ONE_HOT))


@each
def test_a_perfect_membership_costs_nothing_and_has_no_slope(loss: Any) -> None:
    units, slope = units_and_gradient(loss, SOFT, SOFT)
    assert not np.any(units)
    assert not np.any(slope)


def test_the_plain_product_form_would_prefer_a_wrong_answer_for_fractional_targets() -> None:
    half, ones = np.full((1, 8, 1), 0.5, np.float32), np.ones((1, 8, 1), np.float32)
    product = lambda p: 1 - 2 * np.sum(p * half) / np.sum(p + half)
    assert product(ones) < product(half)
    assert dice_loss(half, half) == 0
    assert dice_loss(ones, half) > 0.3


@some
@cases
@given(probs=members, target=members)
def test_losses_of_memberships_lie_between_none_and_all(
    loss: Any, probs: np.ndarray, target: np.ndarray
) -> None:
    units = np.asarray(loss(probs, target, reduction="none"))
    assert np.all(units >= 0)
    assert np.all(units <= (2.000001 if loss is mcc_loss else 1.000001))


@cases
@given(probs=members, target=members)
def test_dice_jaccard_and_mcc_do_not_tell_prediction_from_truth(
    probs: np.ndarray, target: np.ndarray
) -> None:
    for loss in (dice_loss, jaccard_loss, mcc_loss):
        a, b = loss(probs, target, reduction="none"), loss(target, probs, reduction="none")
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_tversky_holds_dice_and_jaccard_as_ends() -> None:
    for target in (LABELS, SOFT):
        half = units_and_gradient(tversky_loss, PROBS, target, smooth=0.3)
        assert_same(half, units_and_gradient(dice_loss, PROBS, target, smooth=0.6))
        whole = units_and_gradient(tversky_loss, PROBS, target, alpha=1.0, beta=1.0, smooth=0.3)
        assert_same(whole, units_and_gradient(jaccard_loss, PROBS, target, smooth=0.3))
        focal = units_and_gradient(focal_tversky_loss, PROBS, target, gamma=1.0)
        plain = units_and_gradient(tversky_loss, PROBS, target, alpha=0.3, beta=0.7, smooth=1.0)
        assert_same(focal, plain)


def test_alpha_weighs_false_positives_and_beta_false_negatives() -> None:
    probs, target = np.array([[[1.0], [0.0]]], np.float32), np.ones((1, 2, 1), np.float32)
    assert tversky_loss(probs, target, alpha=1.0, beta=0.0, smooth=0.0) == 0
    assert tversky_loss(probs, target, alpha=0.0, beta=1.0, smooth=0.0) == 0.5


def test_squared_dice_of_hard_masks_is_plain_dice() -> None:
    hard = (SOFT > 0.5).astype(np.float32)
    plain, squared = (dice_loss(hard, ONE_HOT, squared=s, reduction="none") for s in (False, True))
    np.testing.assert_array_equal(plain, squared)


@each
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_a_class_neither_there_nor_predicted_agrees(loss: Any, smooth: float) -> None:
    nothing = np.zeros((1, 4, 1), np.float32)
    options = {} if loss is mcc_loss else dict(smooth=smooth)
    units, slope = units_and_gradient(loss, nothing, nothing, **options)
    assert not np.any(units)
    assert np.all(np.isfinite(slope))
    if smooth == 0:
        assert not np.any(slope)


def test_an_absent_class_costs_what_is_predicted_of_it() -> None:
    probs, nothing = np.full((1, 4, 1), 0.25, np.float32), np.zeros((1, 4, 1), np.float32)
    assert dice_loss(probs, nothing) == 0.5  # 1 - 1 / (1 + 1)
    assert dice_loss(probs, nothing, smooth=0.0) == 1
    assert mcc_loss(probs, nothing) == 1
    assert generalized_dice_loss(np.ones((1, 4, 1), np.float32), nothing) > 0.99999
    shown = class_present(np.zeros((1, 4), int), 2)
    two = np.concatenate([1 - probs, probs], axis=-1)
    alone = dice_loss(two[..., :1], np.ones((1, 4, 1), np.float32))
    np.testing.assert_allclose(dice_loss(two, np.zeros((1, 4), int), weights=shown), alone)


def test_a_rare_class_weighs_in_generalised_dice_as_a_ratio_of_sums() -> None:
    labels = np.array([[0, 0, 0, 1]])
    probs = np.tile(np.array([0.6, 0.3, 0.1], np.float32), (1, 4, 1))
    weight = np.array([1 / 9, 1, 1])
    overlap, sizes = np.array([1.8, 0.3, 0]), np.array([2.4 + 3, 1.2 + 1, 0.4])
    expected = 1 - 2 * (weight * overlap).sum() / (weight * sizes).sum()
    got = generalized_dice_loss(probs, labels, smooth=0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_generalised_dice_stands_classes_of_any_size() -> None:
    target = np.array([[[1e-12, 1.0]], [[1e-30, 1e-25]]], np.float32)
    value, slope = units_and_gradient(
        generalized_dice_loss, target * np.float32(0.5), target, power=3.0
    )
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(slope))
    even = generalized_dice_loss(PROBS, SOFT, power=0.0, smooth=0.0, reduction="none")
    flat = lambda x: x.reshape(3, -1, 1)
    together = dice_loss(flat(PROBS), flat(SOFT), smooth=0.0, reduction="none")[:, 0]
    np.testing.assert_allclose(even, together, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 10**9])
def test_mcc_keeps_its_digits_near_perfection_and_at_a_billion_positions(size: int) -> None:
    """Counts stand for many positions: 4 x 30000 squares exceed float32 when multiplied."""
    from jaxloss.losses.segmentation import _one_minus_mcc

    for row in ((3.0, 1e-6, 2e-6, 5.0), (1e-4, 2.0, 3.0, 4.0), (0.0, 2.0, 3.0, 4.0)):
        tp, fp, fn, tn = (mpmath.mpf(x) for x in row)
        root = mpmath.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        expected = 1 - (tp * tn - fp * fn) / root
        got = jax.jit(_one_minus_mcc)(*(np.float32(x * size) for x in row))
        np.testing.assert_allclose(got, float(expected), rtol=5e-7)


def test_mcc_is_one_without_information_and_two_when_all_is_wrong() -> None:
    truth = np.array([[[1.0], [0.0], [0.0]]], np.float32)
    for probs in (np.zeros_like(truth), np.ones_like(truth)):
        value, slope = units_and_gradient(mcc_loss, probs, truth)
        assert value == 1
        assert np.all(np.isfinite(slope))
    np.testing.assert_allclose(mcc_loss(1 - truth, truth), 2, rtol=1e-6)


def test_the_focal_root_has_no_slope_at_a_perfect_class_and_a_steep_one_beside_it() -> None:
    truth = np.array([[[1.0], [0.0]]], np.float32)
    slope = jax.jit(jax.grad(lambda p: focal_tversky_loss(p, truth)))
    assert not np.any(slope(truth))
    assert np.max(np.abs(np.asarray(slope(np.array([[[1.0], [1e-12]]], np.float32))))) > 100


def test_log_cosh_dice_keeps_small_losses() -> None:
    probs, target = (np.array([[[1.0], [x]]], np.float32) for x in (1e-5, 0.0))
    dice = mpmath.mpf(float(np.float32(1e-5))) / (3 + mpmath.mpf(float(np.float32(1e-5))))
    with mpmath.workdps(40):
        expected = mpmath.log(mpmath.cosh(dice))
    np.testing.assert_allclose(log_cosh_dice_loss(probs, target), float(expected), rtol=1e-6)


@some
@pytest.mark.parametrize("label", [-1, 4, 2**31 - 1])
def test_a_bad_label_makes_its_sample_nan_and_no_other(loss: Any, label: int) -> None:
    labels = LABELS.copy()
    labels[1, 2, 3] = label
    units, slope = jax.device_get(units_and_gradient(loss, PROBS, labels))
    assert np.all(np.isnan(units[1]))
    assert np.all(np.isnan(slope[1]))
    assert_same(
        (units[::2], slope[::2]),
        [np.asarray(x)[::2] for x in units_and_gradient(loss, PROBS, LABELS)],
    )
    with pytest.raises(ValueError, match=r"target: expected values in \[0, 4\), got 1"):
        checked(loss)(PROBS, labels)
    ignored = units_and_gradient(loss, PROBS, labels, ignore_index=label)
    hidden = units_and_gradient(loss, PROBS, LABELS, where=labels != label)
    assert_same(ignored, hidden, rtol=0)


@some
def test_ignored_pixels_leave_numerator_and_denominator(loss: Any) -> None:
    probs, labels = PROBS.reshape(1, -1, 4), LABELS.reshape(1, -1)
    kept = np.flatnonzero(labels[0] != 1)
    spoiled = np.where((labels == 1)[..., None], np.nan, probs)
    units, slope = jax.device_get(units_and_gradient(loss, spoiled, labels, ignore_index=1))
    expected, slopes = units_and_gradient(loss, probs[:, kept], labels[:, kept])
    assert_same((units, slope[:, kept]), (expected, slopes))
    assert not np.any(np.delete(slope, kept, axis=1))


@some
def test_ignoring_everything_costs_nothing(loss: Any) -> None:
    nothing = np.full((3, 5, 6), 4, np.int32)
    units, slope = units_and_gradient(loss, PROBS, nothing, ignore_index=4)
    assert not np.any(units)
    assert not np.any(slope)


@some
def test_samples_are_units_of_their_own(loss: Any) -> None:
    units = np.asarray(loss(PROBS, LABELS, reduction="none"))
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(
        loss(PROBS[order], LABELS[order], reduction="none"), units[order], rtol=1e-6
    )
    flat = loss(PROBS.reshape(3, 30, 4), LABELS.reshape(3, 30), reduction="none")
    np.testing.assert_allclose(flat, units, rtol=1e-6)
    deep = loss(PROBS.reshape(3, 5, 3, 2, 4), LABELS.reshape(3, 5, 3, 2), reduction="none")
    np.testing.assert_allclose(deep, units, rtol=1e-6)


@some
def test_compiled_and_mapped_calls_take_probabilities_that_sum_to_anything(loss: Any) -> None:
    units, _ = units_and_gradient(loss, SOFT, ONE_HOT)
    mapped = jax.jit(jax.vmap(loss))(SOFT[:, None], ONE_HOT[:, None])
    np.testing.assert_allclose(np.mean(mapped), np.mean(units), rtol=1e-6)


def test_one_binary_class_is_enough() -> None:
    probs, mask = SOFT[..., :1], ONE_HOT[..., :1].astype(bool)
    tp, fp, fn, _ = counts(probs, mask)
    expected = 1 - (2 * tp + 1) / (2 * tp + fp + fn + 1)
    np.testing.assert_allclose(dice_loss(probs, mask, reduction="none"), expected, rtol=1e-6)


def test_many_half_precision_ones_are_counted() -> None:
    ones = np.ones((1, 300, 1), jnp.bfloat16)
    np.testing.assert_allclose(dice_loss(ones, 0 * ones), 1 - 1 / 301, rtol=1e-6)


def test_class_present_sees_what_is_kept() -> None:
    labels = np.array([[0, 2, 2], [1, 1, 7]])
    shown = class_present(labels, 3)
    np.testing.assert_array_equal(shown, [[1, 0, 1], [0, 1, 0]])
    where = np.array([[True, False, False], [False, True, True]])
    np.testing.assert_array_equal(class_present(labels, 3, where=where), [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(class_present(ONE_HOT, 4), class_present(LABELS, 4))
    with pytest.raises(ValueError, match=r"class_present: target: expected shape"):
        class_present(ONE_HOT, 3)


LARGE = regions.BLOCK // 64 + 37  # positions of 2 samples of 64 classes: two blocks and a rest


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dense", [False, True])
def test_sums_over_blocks_are_the_plain_sums(dtype: Any, dense: bool) -> None:
    probs = GENERATOR.random((2, LARGE, 64), np.float32).astype(dtype)
    target = GENERATOR.integers(0, 64, (2, LARGE), np.int32)
    target = np.eye(64, dtype=np.float32)[target] * np.float32(0.75) if dense else target
    where = GENERATOR.random((2, LARGE)) < 0.5
    assert probs.size > 2 * regions.BLOCK
    blocks = lambda p, *rest: regions.region_sums(regions.confusion, p, target, *(rest or (None,)))
    plain = lambda p, *rest: regions._at_once(regions.confusion, 0, p, target, *rest)

    @partial(jax.jit, static_argnums=0)
    def all_of(sums: Any, probs: Any, where: Any) -> Any:
        square = lambda p: jnp.sum(sums(p, where)[1] ** 2)
        slope, forward = jax.grad(square)(probs), jax.jvp(square, (probs,), (probs,))[1]
        return [*sums(probs), *sums(probs, where)], slope, forward

    got, expected = (jax.device_get(all_of(sums, probs, where)) for sums in (blocks, plain))
    assert_same(got[0], expected[0], rtol=2e-6)
    assert_same(got[1:2], expected[1:2], rtol=8 * jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-5)


MIB = 2**20
SHAPE = (8, 512, 512, 21)
MAP_MIB = float(np.prod(SHAPE)) * 4 / MIB


def temporaries(loss: Any, *arrays: Any) -> float:
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes / MIB


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (dice_loss, "plain"),
        (dice_loss, "masked"),
        (dice_loss, "bfloat16"),
        (tversky_loss, "memberships"),
        (generalized_dice_loss, "plain"),
        (mcc_loss, "masked"),
    ],
)
def test_no_copy_of_the_batch_is_held_beside_the_gradient(loss: Any, kind: str) -> None:
    probs = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    target = jax.ShapeDtypeStruct(SHAPE[:-1], jnp.uint8 if kind == "masked" else jnp.int32)
    if kind == "memberships":
        target = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    if kind == "masked":
        masked = lambda p, t, w: loss(p, t, where=w, ignore_index=255)
        where = jax.ShapeDtypeStruct(SHAPE[:-1], jnp.bool_)
        assert temporaries(masked, probs, target, where) < 0.05 * MAP_MIB
    else:
        assert temporaries(loss, probs, target) < 0.02 * MAP_MIB


@cache
def whole_maps() -> tuple[Any, ...]:
    """Maps, their labels, what gives their Dice loss with its gradient, and what it gives."""
    probs = GENERATOR.random((8, 64, 40, 16)).astype(np.float32)
    labels = GENERATOR.integers(0, 16, (8, 64, 40), np.int32)
    run = jax.jit(jax.value_and_grad(dice_loss))
    return probs, labels, run, jax.device_get(run(probs, labels))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("data",), (None, "data"), (None, None, None, "data")])
def test_maps_sharded_over_samples_space_or_classes_give_the_same(kind: Any, spec: Any) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    probs, labels, run, expected = whole_maps()
    put = lambda x, s: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*s)))
    with jax.set_mesh(mesh):
        got = run(put(probs, spec), put(labels, spec[:3]))
    assert_same(jax.device_get(got), expected, rtol=1e-5, atol=1e-9)


def test_cross_entropy_and_iou_are_averaged_for_each_image() -> None:
    logits = 3 * GENERATOR.standard_normal((3, 5, 6, 4)).astype(np.float32)
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(axis=-1, keepdims=True)
    entropy = -np.mean(np.sum(ONE_HOT * np.log(probs), axis=-1), axis=(1, 2))
    tp, fp, fn, _ = counts(probs, ONE_HOT)
    overlap = np.mean(1 - (tp + 1) / (tp + fp + fn + 1), axis=-1)
    options = dict(ce_weight=0.3, iou_weight=2.0, reduction="none")
    volume = logits.reshape(3, 5, 3, 2, 4), LABELS.reshape(3, 5, 3, 2)
    for maps in ((logits, LABELS), volume):
        got = cross_entropy_iou_loss(*maps, **options)
        np.testing.assert_allclose(got, 0.3 * entropy + 2 * overlap, rtol=1e-6)


def test_masking_before_the_softmax_would_leak_and_masking_probabilities_does_not() -> None:
    where = GENERATOR.random((3, 5, 6)) < 0.5
    logits = 3 * GENERATOR.standard_normal((3, 5, 6, 4)).astype(np.float32)
    spoiled = np.where(where[..., None], logits, np.float32(1e4))
    clean, other = (dice_loss(softmax(z), LABELS, where=where) for z in (logits, spoiled))
    np.testing.assert_array_equal(other, clean)
