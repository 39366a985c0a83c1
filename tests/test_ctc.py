"""CTC: all paths enumerated, sequences without a path, certainty, masks, precision and memory."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss import checked
from jaxloss.losses import ctc
from jaxloss.losses.ctc import ctc_alignment, ctc_loss

MIB = 2**20


def units_and_gradient(logits: Any, labels: Any, **options: Any) -> tuple[Any, Any]:
    """Units and the gradient of their sum; infinite ones count in neither."""
    return jax.device_get(_units_and_gradient(logits, labels, **options))


@partial(jax.jit, static_argnames=("precision", "blank_id"))
def _units_and_gradient(logits: Any, labels: Any, **options: Any) -> tuple[Any, Any]:
    call = lambda z, reduction: ctc_loss(z, labels, reduction=reduction, **options)
    return call(logits, "none"), jax.grad(call)(logits, "sum")


def collapse(path: Any, blank: int) -> list[int]:
    return [k for k, _ in itertools.groupby(path) if k != blank]


def enumerated(logits: np.ndarray, labels: list[int], blank: int = 0) -> tuple[float, Any, Any]:
    """-log of the sum over all paths, its gradient, and the best path, in float64."""
    z = np.asarray(logits, np.float64)
    time, classes = z.shape
    with np.errstate(divide="ignore"):
        p = np.exp(z - z.max(axis=1, keepdims=True, initial=-np.inf)) if time else np.ones(z.shape)
    p = p / p.sum(axis=1, keepdims=True)
    total, counts, best, likeliest = 0.0, np.zeros_like(p), None, -1.0
    for path in itertools.product(range(classes), repeat=time):
        if collapse(path, blank) == list(labels):
            weight = float(np.prod([p[t, k] for t, k in enumerate(path)]))
            total += weight
            for t, k in enumerate(path):
                counts[t, k] += weight
            if weight > likeliest:
                best, likeliest = path, weight
    if not total:
        return np.inf, np.zeros_like(p), None
    return -np.log(total), p - counts / total, best


def positions(path: Any, blank: int = 0) -> list[int]:
    """The place in the labels that each frame of a path shows."""
    out, count, last = [], -1, blank
    for k in path:
        count += k not in (blank, last)
        out.append(-1 if k == blank else count)
        last = k
    return out


def batch(time: int, length: int, classes: int, size: int, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (size, time, classes)).astype(np.float32)
    return logits, generator.integers(1, classes, (size, length)).astype(np.int32)


@pytest.mark.parametrize("precision", ["default", "high"])
@pytest.mark.parametrize("blank", [0, 2])
def test_value_and_gradient_are_those_of_all_paths_enumerated(precision: str, blank: int) -> None:
    logits, labels = batch(4, 3, 3, 12)
    labels = (labels + blank) % 3
    label_lengths = np.array([3, 2, 1, 0] * 3, np.int32)
    lengths = np.array([4, 4, 4, 4, 3, 3, 3, 3, 2, 2, 1, 0], np.int32)
    values, slopes = units_and_gradient(
        logits,
        labels,
        blank_id=blank,
        precision=precision,
        lengths=lengths,
        label_lengths=label_lengths,
    )
    for i in range(11):
        value, slope, _ = enumerated(logits[i, : lengths[i]], labels[i, : label_lengths[i]], blank)
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        np.testing.assert_allclose(slopes[i, : lengths[i]], slope, atol=5e-7)
        assert not np.any(slopes[i, lengths[i] :])
    assert values[11] == 0  # no frame is no sequence


def test_the_alignment_is_the_likeliest_of_all_paths() -> None:
    logits, labels = batch(4, 2, 3, 16, seed=3)
    where = np.ones(labels.shape, bool)
    where[8:, 0] = False
    every = np.ones((16, 4), bool)
    shown = np.asarray(ctc_alignment(logits, labels, where=every, label_where=where))
    for i in range(16):
        kept = np.flatnonzero(where[i])
        _, _, best = enumerated(logits[i], labels[i][where[i]])
        assert best is not None
        expected = [-1 if k < 0 else kept[k] for k in positions(best)]
        assert shown[i].tolist() == expected


def test_the_alignment_shows_nothing_where_there_is_none_and_at_hidden_frames() -> None:
    logits, labels = batch(4, 2, 3, 16)
    labels[0], labels[1, 0] = 1, 7
    where = np.ones((16, 4), bool)
    where[0, :2] = where[2, 0] = False
    every = np.ones(labels.shape, bool)
    shown = np.asarray(ctc_alignment(logits, labels, where=where, label_where=every))
    assert (shown[:2] == -1).all()
    assert shown[2, 0] == -1
    assert {0, 1} <= set(shown[2].tolist())


def test_hidden_frames_and_labels_count_as_deleted_wherever_they_stand() -> None:
    logits, labels = batch(6, 4, 4, 3, seed=1)
    where = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]], bool)
    label_where = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 1]], bool)
    poisoned = np.where(where[..., None], logits, np.nan)
    hidden = np.where(label_where, labels, 99)
    values, slopes = units_and_gradient(poisoned, hidden, where=where, label_where=label_where)
    for i in range(3):
        value, slope, _ = enumerated(logits[i][where[i]], labels[i][label_where[i]])
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        np.testing.assert_allclose(slopes[i][where[i]], slope, atol=5e-7)
        assert not np.any(slopes[i][~where[i]])


@pytest.mark.parametrize("precision", ["default", "high"])
def test_one_bad_or_infeasible_sequence_does_not_touch_the_others(precision: str) -> None:
    logits, labels = batch(4, 3, 4, 6, seed=2)
    labels[:] = [1, 2, 3]
    alone, slope = units_and_gradient(logits, labels, precision=precision)
    labels[1] = [1, 1, 1]  # needs five frames
    labels[2] = [1, 0, 1]  # a blank
    labels[3] = [4, 1, 2]  # no class
    labels[4] = [-1, 1, 2]
    values, slopes = units_and_gradient(logits, labels, precision=precision)
    assert values[1] == np.inf
    assert not np.any(slopes[1])
    assert np.isnan(values[2:5]).all()
    assert np.isnan(slopes[2:5]).all()
    for i in (0, 5):
        assert values[i] == alone[i]
        assert np.array_equal(slopes[i], slope[i])


def test_zero_infinity_counts_what_does_not_fit_as_zero() -> None:
    logits, labels = batch(1, 2, 3, 2)

    @jax.jit
    def run(logits: Any) -> Any:
        loss = lambda z, p: ctc_loss(z, labels, zero_infinity=True, precision=p)
        step = jax.value_and_grad(loss)
        return ctc_loss(logits, labels), [step(logits, p) for p in ("default", "high")]

    plain, zeroed = run(logits)
    assert np.isposinf(plain)
    for value, slope in zeroed:
        assert value == 0
        assert not np.any(slope)


def test_a_near_certain_path_costs_almost_nothing_and_never_less() -> None:
    logits = np.zeros((6, 4, 4), np.float32)
    logits[:, [0, 1, 2, 3], [1, 2, 0, 1]] = np.array([5, 10, 15, 20, 30, 40])[:, None]
    labels = np.tile(np.array([1, 2, 1], np.int32), (6, 1))
    with jax.enable_x64(True):
        wide = logits.astype(np.float64)
        exact, right = units_and_gradient(wide, labels, precision="default")
    scale = np.max(np.abs(right), axis=(1, 2), keepdims=True)
    for precision in ("default", "high"):
        values, slopes = units_and_gradient(logits, labels, precision=precision)
        assert np.all(values >= 0)
        np.testing.assert_allclose(slopes / scale, right / scale, rtol=0, atol=4e-7)
        if precision == "default":
            np.testing.assert_allclose(values, exact, rtol=1e-6)


def test_impossible_classes_off_the_path_do_no_harm_and_on_it_forbid() -> None:
    logits, labels = batch(4, 3, 4, 6, seed=5)
    labels[:] = [1, 2, 1]
    logits[:, :, 3] = -np.inf
    logits[1, :, 2] = -np.inf
    for precision in ("default", "high"):
        values, slopes = units_and_gradient(logits, labels, precision=precision)
        value, slope, _ = enumerated(logits[0], labels[0])
        np.testing.assert_allclose(values[0], value, rtol=1e-6)
        np.testing.assert_allclose(slopes[0], slope, atol=5e-7)
        assert values[1] == np.inf
        assert not np.any(slopes[1])


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_float32_holds_over_long_sequences(scale: float) -> None:
    logits, labels = batch(800, 60, 8, 2, seed=4)
    logits *= scale / 2
    with jax.enable_x64(True):
        exact, right = units_and_gradient(logits.astype(np.float64), labels)
    bounds = {"default": 2e-4, "high": 8e-6}
    for precision, bound in bounds.items():
        values, slopes = units_and_gradient(logits, labels, precision=precision)
        np.testing.assert_allclose(values, exact, rtol=1e-6)
        np.testing.assert_allclose(slopes, right, atol=bound)


def test_both_precisions_agree_with_the_plain_recursion_in_every_derivative() -> None:
    """Value, gradient, jvp and Hessian-vector product against plain autodiff of the recursion."""
    with jax.enable_x64(True):
        logits, labels = batch(5, 2, 3, 2, seed=6)
        logits, moved = logits.astype(np.float64), np.cos(np.arange(30.0)).reshape(2, 5, 3)

        paths = np.array(list(itertools.product(range(3), repeat=5)))
        right_ones = np.array([[collapse(path, 0) == y for path in paths] for y in labels.tolist()])
        visits = np.eye(3)[paths]

        def plain(z: Any) -> Any:
            scores = jnp.einsum("btk,ptk->bp", jax.nn.log_softmax(z), visits)
            return -jnp.sum(jax.nn.logsumexp(scores, axis=1, where=right_ones))

        def everything(loss: Any, z: Any, v: Any) -> Any:
            both = jax.jvp(jax.grad(loss), (z,), (v,))
            back = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), v))(z)
            return jax.jvp(loss, (z,), (v,)), both, back

        both = jax.jit(lambda z, v: jax.jvp(jax.value_and_grad(plain), (z,), (v,)))
        (value, slope), (along, curved) = jax.device_get(both(logits, moved))
        right = (value, along), (slope, curved), curved
        for precision in ("default", "high"):
            ours = lambda z, p=precision: ctc_loss(z, labels, precision=p, reduction="sum")
            got = jax.jit(partial(everything, ours))(logits, moved)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, right)


def test_wrong_options_raise() -> None:
    logits, labels = batch(2, 1, 3, 1)
    for options in (dict(blank_id=3), dict(blank_id=-4), dict(precision="best")):
        with pytest.raises(ValueError, match=r"ctc_loss: (blank_id|precision): expected"):
            ctc_loss(logits, labels, **options)
    with pytest.raises(ValueError, match="label_lengths: expected"):
        ctc_loss(logits, labels, label_lengths=np.ones((1, 1), int))
    with pytest.raises(TypeError, match="label_where: expected a bool array"):
        ctc_loss(logits, labels, label_where=np.ones((1, 1), int))
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 3\) other than 0"):
        checked(ctc_loss)(logits, np.zeros((1, 1), int))


def temporaries(time: int, size: int, length: int, classes: int, precision: str) -> float:
    """MiB that value and gradient need beside the logits and their gradient."""
    logits = jax.ShapeDtypeStruct((size, time, classes), jnp.float32)
    labels = jax.ShapeDtypeStruct((size, length), jnp.int32)
    step = jax.value_and_grad(partial(ctc_loss, precision=precision))
    memory = jax.jit(step).lower(logits, labels).compile().memory_analysis()
    return memory.temp_size_in_bytes / MIB


@pytest.mark.parametrize("precision", ["default", "high"])
def test_memory_is_a_few_arrays_of_time_by_length(precision: str) -> None:
    time, size, length, classes = 512, 16, 256, 128
    states = size * time * (2 * length + 1) * 4 / MIB
    logits = size * time * classes * 4 / MIB
    assert temporaries(time, size, length, classes, precision) < 3 * states + 2 * logits


def test_the_cases_cover_both_precisions() -> None:
    assert {case.config.get("precision", "default") for case in ctc.CASES} == {"default", "high"}
