"""Transducer losses: all paths enumerated, masks, certainty, FastEmit, chunks and memory."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss import checked
from jaxloss.losses.transducer import (
    delay_penalized,
    hat_log_probs,
    rnnt_loss,
    rnnt_loss_chunked,
    rnnt_loss_from_log_probs,
)

MIB = 2**20


def units_and_gradient(logits: Any, labels: Any, **options: Any) -> tuple[Any, Any]:
    return jax.device_get(_units_and_gradient(logits, labels, **options))


@partial(jax.jit, static_argnames="blank_id")
def _units_and_gradient(logits: Any, labels: Any, **options: Any) -> tuple[Any, Any]:
    call = lambda z, reduction: rnnt_loss(z, labels, reduction=reduction, **options)
    return call(logits, "none"), jax.grad(call)(logits, "sum")


def arcs_and_gradient(blank: Any, label: Any, **options: Any) -> tuple[Any, Any]:
    return jax.device_get(_arcs_and_gradient(blank, label, **options))


@jax.jit
def _arcs_and_gradient(blank: Any, label: Any, **options: Any) -> tuple[Any, Any]:
    call = lambda arcs, r: rnnt_loss_from_log_probs(*arcs, reduction=r, **options)
    return call((blank, label), "none"), jax.grad(call)((blank, label), "sum")


def enumerated(blank: np.ndarray, label: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """-log of the sum over all monotone paths, and the gradient of both arrays, in float64."""
    blank, label = np.asarray(blank, np.float64), np.asarray(label, np.float64)
    time, nodes = blank.shape
    total, blanks, labels = 0.0, np.zeros(blank.shape), np.zeros(label.shape)
    # A path is fixed by the frame at which each label is emitted.
    for frames in itertools.combinations_with_replacement(range(time), nodes - 1):
        steps = [(t, sum(f <= t for f in frames)) for t in range(time)]
        weight = np.exp(
            sum(blank[t, u] for t, u in steps) + sum(label[t, u] for u, t in enumerate(frames))
        )
        total += weight
        for t, u in steps:
            blanks[t, u] += weight
        for u, t in enumerate(frames):
            labels[t, u] += weight
    if not total or not time:
        return (0.0 if nodes == 1 else np.inf), blanks, labels
    return -np.log(total), -blanks / total, -labels / total


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = np.asarray(z, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def from_logits(z: np.ndarray, labels: Any, blank: int = 0, boost: float = 1.0) -> tuple[Any, Any]:
    """Value and gradient in the logits; `boost` scales the gradient of the labels."""
    log_probs = log_softmax(z)
    nodes = np.arange(len(labels))
    value, of_blank, of_label = enumerated(log_probs[..., blank], log_probs[:, nodes, labels])
    slope = np.zeros(z.shape)
    slope[..., blank] = of_blank
    slope[:, nodes, labels] += boost * of_label
    return value, slope - np.exp(log_probs) * slope.sum(axis=-1, keepdims=True)


def batch(time: int, length: int, classes: int, size: int, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (size, time, length + 1, classes)).astype(np.float32)
    return logits, generator.integers(1, classes, (size, length)).astype(np.int32)


@pytest.mark.parametrize("blank", [0, 3])
def test_value_and_gradient_are_those_of_all_paths_enumerated(blank: int) -> None:
    logits, labels = batch(4, 3, 4, 12)
    labels = (labels + blank) % 4
    label_lengths = np.array([3, 2, 1, 0] * 3, np.int32)
    lengths = np.array([4, 4, 4, 4, 3, 3, 3, 3, 2, 1, 1, 0], np.int32)
    keep = np.arange(4) < lengths[:, None]
    reached = np.arange(4) <= label_lengths[:, None]
    poisoned = np.where((keep[:, :, None] & reached[:, None])[..., None], logits, np.nan)
    poisoned_labels = np.where(np.arange(3) < label_lengths[:, None], labels, 9)
    values, slopes = units_and_gradient(
        poisoned,
        poisoned_labels,
        blank_id=blank if blank == 0 else -1,
        lengths=lengths,
        label_lengths=label_lengths,
    )
    for i in range(11):
        t, u = lengths[i], label_lengths[i]
        value, slope = from_logits(logits[i, :t, : u + 1], labels[i, :u], blank)
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        np.testing.assert_allclose(slopes[i, :t, : u + 1], slope, atol=5e-7)
        assert not np.any(slopes[i, t:])
        assert not np.any(slopes[i, :, u + 1 :])
    assert values[11] == 0  # no frame is no sequence


def test_hidden_frames_and_labels_count_as_deleted_wherever_they_stand() -> None:
    logits, labels = batch(4, 4, 5, 3, seed=1)
    where = np.array([[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]], bool)
    label_where = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 1]], bool)
    reached = np.concatenate([np.ones((3, 1), bool), label_where], axis=1)
    poisoned = np.where((where[:, :, None] & reached[:, None])[..., None], logits, np.inf)
    hidden = np.where(label_where, labels, -7)
    values, slopes = units_and_gradient(poisoned, hidden, where=where, label_where=label_where)
    blank, label = (x.astype(np.float32) for x in (logits[..., 0], logits[:, :, 1:, 1]))
    arcs, arc_slopes = arcs_and_gradient(
        np.where(where[:, :, None] & reached[:, None], blank, np.nan),
        np.where(where[:, :, None] & label_where[:, None], label, np.nan),
        where=where,
        label_where=label_where,
    )
    for i in range(3):
        inside = np.ix_(where[i], reached[i])
        value, slope = from_logits(logits[i][inside], labels[i][label_where[i]])
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        np.testing.assert_allclose(slopes[i][inside], slope, atol=5e-7)
        kept = np.zeros(slopes[i].shape, bool)
        kept[inside] = True
        assert not np.any(slopes[i][~kept])
        of_labels = np.ix_(where[i], label_where[i])
        value, of_blank, of_label = enumerated(blank[i][inside], label[i][of_labels])
        np.testing.assert_allclose(arcs[i], value, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(arc_slopes[0][i][inside], of_blank, atol=1e-6)
        np.testing.assert_allclose(arc_slopes[1][i][of_labels], of_label, atol=1e-6)
        assert not np.any(arc_slopes[0][i][~kept[..., 0]])


def test_one_bad_or_infeasible_sequence_does_not_touch_the_others() -> None:
    logits, labels = batch(3, 2, 4, 6, seed=2)
    alone, slope = units_and_gradient(logits, labels)
    labels[1], labels[2, 0], labels[3, 1] = 0, 4, -1
    logits[4, :, :, 1:] = -np.inf  # no label can ever be emitted
    values, slopes = units_and_gradient(logits, labels)
    assert np.isnan(values[1:4]).all()
    assert np.isnan(slopes[1:4]).all()
    assert values[4] == np.inf
    assert not np.any(slopes[4])
    for i in (0, 5):
        assert values[i] == alone[i]
        assert np.array_equal(slopes[i], slope[i])


def test_without_frames_only_no_labels_can_be_emitted() -> None:
    for nodes, expected in ((1, 0.0), (3, np.inf)):
        value, slopes = arcs_and_gradient(np.zeros((1, 0, nodes)), np.zeros((1, 0, nodes - 1)))
        assert value[0] == expected
        assert slopes[0].shape == (1, 0, nodes)


def test_a_near_certain_path_costs_almost_nothing_and_never_less() -> None:
    logits = np.zeros((6, 3, 3, 4), np.float32)
    gaps = np.array([5.0, 10.0, 15.0, 20.0, 30.0, 40.0])
    for t, u, k in ((0, 0, 1), (0, 1, 0), (1, 1, 2), (1, 2, 0), (2, 2, 0)):
        logits[:, t, u, k] = gaps
    labels = np.array([[1, 2]] * 6, np.int32)
    values, slopes = units_and_gradient(logits, labels)
    with jax.enable_x64(True):
        exact, right = units_and_gradient(logits.astype(np.float64), labels)
    assert np.all(values >= 0)
    np.testing.assert_allclose(values, exact, rtol=2e-6)
    for got, expected in zip(slopes, right, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6 * np.max(np.abs(expected)))


def test_fastemit_scales_the_gradient_of_the_labels_and_not_the_value() -> None:
    logits, labels = batch(3, 2, 4, 6, seed=3)
    plain, _ = units_and_gradient(logits, labels)
    values, slopes = units_and_gradient(logits, labels, fastemit_lambda=0.5)
    np.testing.assert_array_equal(values, plain)
    for i in range(6):
        _, slope = from_logits(logits[i], labels[i], boost=1.5)
        np.testing.assert_allclose(slopes[i], slope, atol=1e-6)


def test_the_derivatives_are_those_of_the_plain_sum_over_paths() -> None:
    """Value, gradient, jvp and Hessian-vector products against plain autodiff."""
    with jax.enable_x64(True):
        logits, labels = batch(3, 2, 4, 2, seed=4)
        logits = logits.astype(np.float64)
        moved = np.cos(np.arange(logits.size)).reshape(logits.shape)
        choices = list(itertools.combinations_with_replacement(range(3), 2))
        visits = np.zeros((2, len(choices), *logits.shape[1:]))
        for p, frames in enumerate(choices):
            for t in range(3):
                visits[:, p, t, sum(f <= t for f in frames), 0] = 1
            for u, t in enumerate(frames):
                visits[np.arange(2), p, t, u, labels[:, u]] = 1

        def plain(z: Any) -> Any:
            scores = jnp.einsum("btuk,bptuk->bp", jax.nn.log_softmax(z), visits)
            return -jnp.sum(jax.nn.logsumexp(scores, axis=1))

        def everything(loss: Any, z: Any, v: Any) -> Any:
            both = jax.jvp(jax.grad(loss), (z,), (v,))
            back = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), v))(z)
            return loss(z), jax.jvp(loss, (z,), (v,))[1], both, back

        both = jax.jit(lambda z, v: jax.jvp(jax.value_and_grad(plain), (z,), (v,)))
        (value, slope), (along, curved) = jax.device_get(both(logits, moved))
        right = value, along, (slope, curved), curved
        ours = lambda z: rnnt_loss(z, labels, reduction="sum")
        got = jax.jit(partial(everything, ours))(logits, moved)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, right)


def test_chunks_give_what_the_whole_lattice_gives_with_gradients_of_the_joint() -> None:
    generator = np.random.default_rng(5)
    encoded, predicted = (generator.normal(size=(2, n, 3)).astype(np.float32) for n in (5, 4))
    kernel = generator.normal(size=(3, 6)).astype(np.float32)
    labels = generator.integers(1, 6, (2, 3)).astype(np.int32)
    where = np.array([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]], bool)
    label_where = np.array([[1, 0, 1], [1, 1, 0]], bool)
    masks = dict(where=where, label_where=label_where, fastemit_lambda=0.1)

    def whole(encoded: Any, predicted: Any, kernel: Any) -> Any:
        logits = jnp.tanh(encoded[:, :, None] + predicted[:, None]) @ kernel
        return rnnt_loss(logits, labels, **masks)

    def chunked(encoded: Any, predicted: Any, kernel: Any) -> Any:
        joint = lambda e, g: jnp.tanh(e[:, None] + g) @ kernel
        return rnnt_loss_chunked(encoded, predicted, labels, joint=joint, chunk_size=2, **masks)

    parts = (encoded, predicted, kernel)
    right = jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(*parts)
    got = jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(*parts)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, right)


def test_chunked_logits_need_memory_for_one_chunk() -> None:
    time, nodes, classes, chunk = 128, 32, 512, 8
    shapes = [(4, time, 16), (4, nodes, 16), (16, classes)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((4, nodes - 1), jnp.int32)

    def loss(encoded: Any, predicted: Any, kernel: Any, labels: Any) -> Any:
        joint = lambda e, g: (e[:, None] + g) @ kernel
        return rnnt_loss_chunked(encoded, predicted, labels, joint=joint, chunk_size=chunk)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arrays, labels).compile()
    one = 4 * chunk * nodes * classes * 4
    assert step.memory_analysis().temp_size_in_bytes < 4 * one


def test_nothing_of_the_size_of_the_logits_is_stored() -> None:
    logits = jax.ShapeDtypeStruct((4, 128, 32, 512), jnp.float32)
    labels = jax.ShapeDtypeStruct((4, 31), jnp.int32)
    step = jax.jit(jax.value_and_grad(rnnt_loss)).lower(logits, labels).compile()
    assert step.memory_analysis().temp_size_in_bytes < 0.05 * 4 * 128 * 32 * 512 * 4


def test_hat_shares_out_what_the_blank_leaves() -> None:
    logits, labels = batch(3, 2, 4, 2, seed=6)
    blank, label = jax.device_get(hat_log_probs(logits, labels))
    total = np.exp(blank[:, :, :2])
    for k in range(1, 4):
        _, other = hat_log_probs(logits, np.full((2, 2), k, np.int32))
        total = total + np.exp(other)
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    z = logits[:, :, :2].astype(np.float64)
    shown = np.take_along_axis(log_softmax(z[..., 1:]), labels[:, None, :, None] - 1, 3)[..., 0]
    np.testing.assert_allclose(label, shown - np.logaddexp(0, z[..., 0]), rtol=1e-5)
    bad = np.asarray(hat_log_probs(logits, np.array([[0, 1], [1, 4]], np.int32))[1])
    assert np.isnan(bad[0, :, 0]).all()
    assert np.isnan(bad[1, :, 1]).all()
    assert np.isfinite(bad[0, :, 1]).all()


def test_a_delay_penalty_of_zero_changes_nothing_and_hidden_frames_do_not_count() -> None:
    _, label = np.random.default_rng(7).normal(size=(2, 2, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(delay_penalized(label, penalty=0.0), label)
    where = np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    hidden = np.where(where[..., None], label, np.nan)
    got = np.asarray(delay_penalized(hidden, penalty=0.5, where=where))
    bonus = (got - label)[0, [0, 2, 3]]
    np.testing.assert_allclose(bonus, [[0.5] * 3, [0] * 3, [-0.5] * 3], atol=1e-6)
    assert not np.any(got[0, [1, 4]])


def test_wrong_options_raise() -> None:
    logits, labels = batch(2, 1, 3, 1)
    with pytest.raises(ValueError, match="rnnt_loss: blank_id: expected"):
        rnnt_loss(logits, labels, blank_id=3)
    with pytest.raises(ValueError, match="rnnt_loss_from_log_probs: label_log_probs: expected"):
        rnnt_loss_from_log_probs(np.zeros((1, 2, 3), np.float32), np.zeros((1, 2, 3), np.float32))
    with pytest.raises(ValueError, match="rnnt_loss_chunked: chunk_size: expected"):
        rnnt_loss_chunked(logits[:, :, 0], logits[:, 0], labels, joint=jnp.add, chunk_size=0)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 3\) other than 0"):
        checked(rnnt_loss)(jnp.asarray(logits), jnp.zeros((1, 1), int))
