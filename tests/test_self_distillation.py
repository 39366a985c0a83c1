"""Students and teachers: pairs of views, centers over two steps, codes of any size, devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxloss._core.reductions import across, sequence_mean
from jaxloss.losses.self_distillation import (
    dino_loss,
    ibot_loss,
    msn_loss,
    sinkhorn_knopp,
    swav_loss,
)

VIEWS, LARGE, N, K, D = 4, 2, 8, 5, 3
GENERATOR = np.random.default_rng(0)
STUDENT = GENERATOR.standard_normal((VIEWS, N, K)).astype(np.float32)
TEACHER = GENERATOR.standard_normal((LARGE, N, K)).astype(np.float32)
CENTER = (0.3 * GENERATOR.standard_normal(K)).astype(np.float32)
WHERE = np.array([True, False, True, True, False, True, True, True])
ANCHORS = GENERATOR.standard_normal((VIEWS, N, D)).astype(np.float32)
TARGETS = GENERATOR.standard_normal((N, D)).astype(np.float32)
PROTOTYPES = GENERATOR.standard_normal((K, D)).astype(np.float32)


def softmax(x: Any) -> Any:
    x = np.asarray(x, np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def pairs(probs: Any, student: Any, temperature: float) -> Any:
    """The loops of the authors of DINO and SwAV, without the mean over the samples."""
    log_q = np.log(softmax(np.asarray(student, np.float64) / temperature))
    total, count = 0.0, 0
    for t in range(len(probs)):
        for s in range(len(log_q)):
            if s != t:
                total, count = total - np.sum(probs[t] * log_q[s], -1), count + 1
    return total / count


def dino(student: Any, teacher: Any, center: Any, temperature: float = 0.04) -> tuple[Any, Any]:
    """Units and new center, in float64."""
    teacher = np.asarray(teacher, np.float64)
    units = pairs(softmax((teacher - center) / temperature), student, 0.1)
    return units, 0.9 * np.asarray(center, np.float64) + 0.1 * teacher.mean((0, 1))


def garbage(x: Any, where: Any, axis: int) -> Any:
    shape = [len(where) if i == axis else 1 for i in range(x.ndim)]
    return np.where(where.reshape(shape), x, np.nan)


# DINO


def test_two_steps_of_dino_use_the_old_center_and_pass_on_the_new_one() -> None:
    center, exact = np.zeros(K, np.float32), np.zeros(K)
    for step in range(2):
        student, teacher = STUDENT + step, TEACHER[:, ::-1] * (1 + step)
        loss, center = dino_loss(student, teacher, center)
        units, exact = dino(student, teacher, exact)
        np.testing.assert_allclose(loss, units.mean(), rtol=1e-5)
        np.testing.assert_allclose(center, exact, rtol=1e-5, atol=1e-7)


def test_masked_samples_enter_neither_the_loss_nor_the_center() -> None:
    hidden = garbage(STUDENT, WHERE, 1), garbage(TEACHER, WHERE, 1)
    loss, center = dino_loss(*hidden, CENTER, where=WHERE)
    units, exact = dino(STUDENT[:, WHERE], TEACHER[:, WHERE], CENTER)
    np.testing.assert_allclose(loss, units.mean(), rtol=1e-5)
    np.testing.assert_allclose(center, exact, rtol=1e-5)
    for nothing in (
        dino_loss(*hidden, CENTER, where=np.zeros(N, bool)),
        dino_loss(STUDENT[:, :0], TEACHER[:, :0], CENTER),
        ibot_loss(STUDENT[0], STUDENT[1], CENTER, where=np.zeros(N, bool)),
    ):
        assert nothing[0] == 0
        np.testing.assert_array_equal(nothing[1], CENTER)  # nothing seen, nothing moved


@pytest.mark.parametrize("large", [1, 2, 4])
def test_a_view_is_never_compared_with_itself(large: int) -> None:
    teacher = np.resize(TEACHER, (large, N, K))
    units, _ = dino_loss(STUDENT, teacher, CENTER, reduction="none")
    np.testing.assert_allclose(units, dino(STUDENT, teacher, CENTER)[0], rtol=1e-5)
    if large == 1:  # the first view of the student is in no pair
        slope = jax.grad(lambda s: dino_loss(s, teacher, CENTER)[0])(STUDENT)
        np.testing.assert_array_equal(slope[0], 0)
        assert np.all(np.any(slope[1:] != 0, axis=-1))


def test_teachers_centers_and_targets_are_stopped() -> None:
    def total(fixed: Any) -> Any:
        teacher, center, scores, targets = fixed
        dino, moved = dino_loss(STUDENT, teacher, center)
        ibot, _ = ibot_loss(STUDENT[0], teacher[0], center)
        msn, _ = msn_loss(ANCHORS, targets, PROTOTYPES)
        codes = jnp.sum(sinkhorn_knopp(scores[0]) ** 2)
        return dino + ibot + jnp.sum(moved) + msn + swav_loss(STUDENT, scores) + codes

    for leaf in jax.tree.leaves(jax.grad(total)((TEACHER, CENTER, TEACHER, TARGETS))):
        np.testing.assert_array_equal(leaf, 0)
    aims = lambda p: msn_loss(ANCHORS, TARGETS, p, temperature=0.5, iterations=0)[0]
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    fixed = jax.nn.softmax(unit(TARGETS) @ unit(PROTOTYPES).T / 0.125, axis=-1)

    def again(p: Any) -> Any:  # with the targets as numbers
        log_p = jax.nn.log_softmax(unit(ANCHORS) @ unit(p).T / 0.5, axis=-1)
        mean = jnp.exp(log_p).mean((0, 1))
        return -jnp.mean(jnp.sum(fixed * log_p, -1)) + jnp.log(K) + jnp.sum(mean * jnp.log(mean))

    np.testing.assert_allclose(jax.grad(aims)(PROTOTYPES), jax.grad(again)(PROTOTYPES), atol=1e-6)


def test_a_class_that_the_student_excludes_costs_nothing_if_the_teacher_does_too() -> None:
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[..., 2] = teacher[..., 2] = -np.inf
    both = jax.value_and_grad(lambda s: dino_loss(s, teacher, CENTER)[0])
    value, slope = both(student)
    rest = [0, 1, 3, 4]
    units, _ = dino(student[..., rest], teacher[..., rest], CENTER[rest])
    np.testing.assert_allclose(value, units.mean(), rtol=1e-5)
    assert np.all(np.isfinite(slope))


def test_a_confident_student_keeps_the_digits_of_a_small_loss() -> None:
    student = np.tile(np.array([20.0, 0, 0], np.float32), (2, 1, 1))
    teacher = np.tile(np.array([9.0, 0, 0], np.float32), (2, 1, 1))  # exp(-225) elsewhere
    loss, _ = dino_loss(student, teacher, np.zeros(3), student_temperature=1.0)
    np.testing.assert_allclose(loss, np.log1p(2 * np.exp(-20.0)), rtol=1e-6)


def test_many_classes_need_few_copies_of_the_logits() -> None:
    views, batch, classes = 8, 8, 4096
    shapes = (views, batch, classes), (2, batch, classes), (classes,)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    step = jax.jit(jax.value_and_grad(dino_loss, has_aux=True))
    peak = step.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert peak < 2.5 * views * batch * classes * 4  # one for each pair would be 14


# iBOT


def test_ibot_with_a_mean_over_images_is_the_loss_of_lightly_and_dinov2() -> None:
    g = np.random.default_rng(1)
    student, teacher = (g.standard_normal((3, 6, K)).astype(np.float32) for _ in range(2))
    masked = g.random((3, 6)) < 0.5
    masked[:, 0] = True
    probs = softmax((teacher.astype(np.float64) - CENTER) / 0.04)
    costs = -np.sum(probs * np.log(softmax(student / np.float64(0.1))), -1)
    share = masked / masked.sum(1, keepdims=True)
    hidden = (np.where(masked[..., None], x, np.nan) for x in (student, teacher))
    loss, center = ibot_loss(*hidden, CENTER, where=masked, reduction=sequence_mean)
    np.testing.assert_allclose(loss, np.sum(costs * share) / 3, rtol=1e-5)
    expected = 0.9 * CENTER.astype(np.float64) + 0.1 * teacher[masked].astype(np.float64).mean(0)
    np.testing.assert_allclose(center, expected, rtol=1e-5, atol=1e-7)
    tokens = ibot_loss(student[masked], teacher[masked], CENTER)  # as DINOv2 passes them
    np.testing.assert_allclose(tokens[0], costs[masked].mean(), rtol=1e-5)
    np.testing.assert_allclose(tokens[1], center, rtol=1e-6)


# Sinkhorn and SwAV


def sinkhorn(scores: Any, epsilon: float = 0.05, iterations: int = 3) -> Any:
    """The authors' loop in extended precision, whose exponent does not overflow here."""
    q = np.exp(np.asarray(scores, np.longdouble) / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T.astype(np.float64)


@pytest.mark.parametrize("iterations", [1, 3, 7])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_codes_are_those_of_the_authors_loop(iterations: int, epsilon: float) -> None:
    scores = np.tanh(STUDENT[0])
    codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations)
    np.testing.assert_allclose(codes, sinkhorn(scores, epsilon, iterations), rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("size", [4.5, 5.0, 30.0, 300.0, 1000.0, 1e5])
def test_codes_of_large_scores_do_not_overflow(size: float) -> None:
    scores = (size * np.tanh(STUDENT[0])).astype(np.float32)
    scores[0, 0] = size
    codes = sinkhorn_knopp(scores)
    assert np.all(np.isfinite(codes))
    np.testing.assert_allclose(np.sum(codes, axis=-1), 1, rtol=1e-6)
    if size > 4.5:
        with np.errstate(over="ignore"):
            assert np.isinf(np.exp(scores / np.float32(0.05)).max())  # what the authors compute
    if size < 500:  # the extended exponent holds up to 11356
        np.testing.assert_allclose(codes, sinkhorn(scores), atol=1e-4)


def test_codes_become_balanced_and_do_not_see_masked_rows() -> None:
    scores = np.tanh(STUDENT[0])
    codes = sinkhorn_knopp(scores, epsilon=0.5, iterations=200)
    np.testing.assert_allclose(np.sum(codes, axis=0), N / K, rtol=1e-5)
    got = sinkhorn_knopp(garbage(scores, WHERE, 0), where=WHERE)
    np.testing.assert_array_equal(got[~WHERE], 0)
    np.testing.assert_allclose(got[WHERE], sinkhorn(scores[WHERE]), rtol=2e-5, atol=1e-12)
    nothing = sinkhorn_knopp(garbage(scores, ~WHERE | WHERE, 0) * np.nan, where=np.zeros(N, bool))
    np.testing.assert_array_equal(nothing, 0)


def test_an_excluded_prototype_gets_no_share() -> None:
    scores = np.tanh(STUDENT[0])
    scores[:, 1] = -np.inf
    rest = [0, 2, 3, 4]
    codes = sinkhorn_knopp(scores)
    np.testing.assert_array_equal(codes[:, 1], 0)
    np.testing.assert_allclose(codes[:, rest], sinkhorn(scores[:, rest]), rtol=2e-5, atol=1e-12)


def test_swav_swaps_the_codes_of_the_large_crops() -> None:
    scores = np.tanh(STUDENT)
    kept = scores[:, WHERE]
    codes = [sinkhorn(view) for view in kept[:LARGE]]
    expected = pairs(codes, kept, 0.1)
    hidden = garbage(scores, WHERE, 1)
    got = swav_loss(hidden, hidden[:LARGE], where=WHERE, reduction="none")
    np.testing.assert_allclose(got[WHERE], expected, rtol=1e-5)
    np.testing.assert_array_equal(got[~WHERE], 0)


# MSN


def msn(anchors: Any, targets: Any, iterations: int = 3, weight: float = 1.0) -> tuple[Any, Any]:
    """lightly's formulas in float64, with views along the first axis."""
    unit = lambda x: x / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    probs = softmax(unit(anchors) @ unit(PROTOTYPES).T / 0.1)
    aims = softmax(unit(targets) @ unit(PROTOTYPES).T / 0.1) ** 4
    aims /= aims.sum(-1, keepdims=True)
    aims = sinkhorn(np.log(aims), 1.0, iterations) if iterations else aims
    mean = probs.reshape(-1, K).mean(0)
    cross = -np.sum(aims * np.log(probs), -1).mean()
    return cross + weight * (np.log(K) + np.sum(mean * np.log(mean))), cross


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_msn_is_cross_entropy_to_balanced_targets_and_the_entropy_of_the_mean(
    iterations: int,
) -> None:
    hidden = garbage(ANCHORS, WHERE, 1), garbage(TARGETS, WHERE, 0)
    options: Any = dict(where=WHERE, entropy_weight=2.0, iterations=iterations)
    loss, terms = msn_loss(*hidden, PROTOTYPES, **options)
    expected, cross = msn(ANCHORS[:, WHERE], TARGETS[WHERE], iterations, 2.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(terms["cross_entropy"], cross, rtol=1e-5)
    np.testing.assert_allclose(terms["entropy"], (expected - cross) / 2, rtol=1e-4)
    one = msn_loss(ANCHORS[0], TARGETS, PROTOTYPES)[0]  # a single view needs no axis
    np.testing.assert_allclose(one, msn(ANCHORS[:1], TARGETS)[0], rtol=1e-5)
    zero = np.zeros_like(TARGETS)
    slope = jax.grad(lambda a: msn_loss(a, zero, PROTOTYPES)[0])(np.zeros_like(ANCHORS))
    np.testing.assert_array_equal(slope, 0)


# Devices and shapes


def mapped(call: Callable[..., Any], specs: Any, out: Any) -> Callable[..., Any]:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=out))


def test_centers_codes_and_means_are_those_of_all_devices() -> None:
    whole, rows, views = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")
    where = WHERE.copy()
    where[:2] = False  # a device without a sample
    options: Any = dict(axis_name="data", reduction=across("data"))

    def call(student: Any, teacher: Any, anchors: Any, targets: Any, where: Any) -> Any:
        return dict(
            dino=dino_loss(student, teacher, CENTER, where=where, **options),
            ibot=ibot_loss(student[0], teacher[0], CENTER, where=where, **options),
            swav=swav_loss(student, teacher, where=where, **options),
            msn=msn_loss(anchors, targets, PROTOTYPES, where=where, axis_name="data"),
        )

    got = mapped(call, (views, views, views, rows, rows), whole)(
        STUDENT, TEACHER, ANCHORS, TARGETS, where
    )
    expected = dict(
        dino=dino_loss(STUDENT, TEACHER, CENTER, where=where),
        ibot=ibot_loss(STUDENT[0], TEACHER[0], CENTER, where=where),
        swav=swav_loss(STUDENT, TEACHER, where=where),
        msn=msn_loss(ANCHORS, TARGETS, PROTOTYPES, where=where),
    )
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)
    codes = mapped(lambda s, w: sinkhorn_knopp(s, where=w, axis_name="data"), (rows, rows), rows)
    exact = sinkhorn_knopp(STUDENT[0], where=where)
    np.testing.assert_allclose(codes(STUDENT[0], where), exact, rtol=2e-6, atol=1e-12)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "one view": (
        lambda: dino_loss(STUDENT[:1], TEACHER[:1], CENTER),
        r"dino_loss: student_logits: expected at least two views, got shape \(1, 8, 5\)",
    ),
    "the wrong way round": (
        lambda: swav_loss(TEACHER, STUDENT),
        r"swav_loss: teacher_scores: expected 1 to 2 views, got shape \(4, 8, 5\)",
    ),
    "no teacher": (
        lambda: dino_loss(STUDENT, TEACHER[:0], CENTER),
        "dino_loss: teacher_logits: expected 1 to 4 views",
    ),
    "no axis of views": (
        lambda: dino_loss(STUDENT[0], TEACHER[0], CENTER),
        r"dino_loss: student_logits: expected shape \(views, batch, classes\)",
    ),
    "another batch": (
        lambda: swav_loss(STUDENT, TEACHER[:, :1]),
        r"swav_loss: teacher_scores: expected shape \(2, 8, 5\), got \(2, 1, 5\)",
    ),
    "another center": (
        lambda: dino_loss(STUDENT, TEACHER, CENTER[:1]),
        r"dino_loss: center: expected shape \(5,\)",
    ),
    "a mask of views": (
        lambda: dino_loss(STUDENT, TEACHER, CENTER, where=np.ones(LARGE, bool)),
        r"dino_loss: where: expected shape \(8,\)",
    ),
    "other targets": (
        lambda: msn_loss(ANCHORS, TARGETS[:1], PROTOTYPES),
        r"msn_loss: targets: expected shape \(8, 3\)",
    ),
    "other prototypes": (
        lambda: msn_loss(ANCHORS, TARGETS, PROTOTYPES[:, :1]),
        r"msn_loss: prototypes: expected shape \(prototypes, 3\)",
    ),
    "no iteration": (
        lambda: sinkhorn_knopp(STUDENT[0], iterations=0),
        "sinkhorn_knopp: iterations: expected an integer of at least 1, got 0",
    ),
    "a share of an iteration": (
        lambda: swav_loss(STUDENT, TEACHER, iterations=2.5),  # pyright: ignore[reportArgumentType]
        "swav_loss: iterations: expected an integer",
    ),
    "several batches": (
        lambda: sinkhorn_knopp(STUDENT),
        r"sinkhorn_knopp: scores: expected shape \(batch, prototypes\)",
    ),
    "several temperatures": (
        lambda: dino_loss(STUDENT, TEACHER, CENTER, teacher_temperature=np.ones(2)),
        "dino_loss: teacher_temperature: expected a scalar",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_shapes_and_options_raise(what: str) -> None:
    call, text = BAD[what]
    with pytest.raises(ValueError, match=text):
        call()


def test_logits_are_floating() -> None:
    for call in (
        lambda: dino_loss(STUDENT.astype(int), TEACHER, CENTER),
        lambda: swav_loss(STUDENT.astype(int), TEACHER),
        lambda: msn_loss(ANCHORS.astype(int), TARGETS, PROTOTYPES),
        lambda: sinkhorn_knopp(STUDENT[0].astype(int)),
        lambda: dino_loss(STUDENT, TEACHER, CENTER, where=np.ones(N)),
    ):
        with pytest.raises(TypeError, match=r"expected a (floating dtype|bool array)"):
            call()
