"""Strips of digits: the distance that the speech task reports, and what it draws."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxloss.playground import tasks
from jaxloss.playground.strips import FRAMES, best_path, edit_distance


def edits(read: list[int], written: list[int]) -> int:
    """The textbook table, filled cell by cell."""
    table = np.add.outer(np.arange(len(read) + 1), np.arange(len(written) + 1))
    for i, a in enumerate(read, 1):
        for j, b in enumerate(written, 1):
            ways = table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b)
            table[i, j] = min(ways)
    return table[-1, -1]


def test_the_edit_distance_of_padded_paths_is_the_textbooks() -> None:
    rng = np.random.default_rng(0)
    path, new = rng.integers(1, 4, (40, 9)), rng.random((40, 9)) < 0.6
    labels, count = rng.integers(1, 4, (40, 5)), rng.integers(0, 6, 40)
    expected = [
        edits(list(p[n]), list(y[:c])) for p, n, y, c in zip(path, new, labels, count, strict=True)
    ]
    np.testing.assert_array_equal(
        edit_distance(*map(jnp.asarray, (path, new, labels, count))), expected
    )


def test_a_best_path_merges_repeats_unless_a_blank_parts_them_and_ends_with_the_strip() -> None:
    classes = np.array([[2, 2, 0, 2, 3, 3, 1, 1]])
    path, new = best_path(jax.nn.one_hot(classes, 4), jnp.arange(8) < jnp.array([[6]]))
    assert np.asarray(path)[np.asarray(new)].tolist() == [2, 2, 3]


def test_strips_hold_their_digits_one_after_the_other_and_noise_beyond() -> None:
    inputs, target = tasks.find("speech").load(0).test
    frames, length = target["frames"], inputs["length"]
    assert np.all(frames[np.arange(FRAMES) >= length[:, None]] == 0)
    for row, labels, count in zip(frames, target["labels"], target["count"], strict=True):
        begins = np.flatnonzero(row)[::8]
        assert row[begins].tolist() == labels[:count].tolist()
        assert np.all(labels[count:] == -1)


def test_the_three_heads_of_the_language_task_agree_in_value_and_slope() -> None:
    task = tasks.find("language")
    params = task.init(jax.random.key(0))
    tokens, labels = jax.tree.map(lambda a: a[:2], task.load(0).test)

    def every(params: dict) -> dict:
        of = lambda loss: jax.value_and_grad(lambda p: loss(task.apply(p, tokens), labels))
        return {name: of(loss)(params) for name, loss in task.losses.items()}

    found = jax.jit(every)(params)
    plain = found.pop("plain_head")
    for value, slope in found.values():
        np.testing.assert_allclose(value, plain[0], rtol=1e-6)
        near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        jax.tree.map(near, slope, plain[1])
