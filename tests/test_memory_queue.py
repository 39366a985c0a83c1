"""The memory queue against a deque: wrap-around, masks, large pushes, donation, devices."""

from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxloss.losses.contrastive import info_nce
from jaxloss.losses.memory_queue import MemoryQueue, queue_init, queue_push, queue_read

SIZE, DIM = 5, 2
PUSH = jax.jit(queue_push, donate_argnums=0)


def rows(first: int, count: int) -> Any:
    labels = np.arange(first, first + count, dtype=np.int32)
    return np.stack([labels, -labels], axis=-1).astype(np.float32), labels


def in_order(state: MemoryQueue) -> list[tuple[float, float, int]]:
    """Filled rows from the oldest to the newest."""
    embeddings, labels, valid = (np.roll(x, -state.position, axis=0) for x in queue_read(state))
    return [
        (*map(float, e), int(y)) for e, y, v in zip(embeddings, labels, valid, strict=True) if v
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_the_queue_holds_what_a_deque_of_that_length_holds(masked: bool) -> None:
    generator = np.random.default_rng(0)
    state, exact, first = queue_init(SIZE, DIM), deque(maxlen=SIZE), 0
    for count in (2, 2, 3, 0, 5, 1, 12, 4, 12):  # below, at and above the size
        embeddings, labels = rows(first, count)
        where = generator.random(count) < 0.6 if masked else None
        kept = np.ones(count, bool) if where is None else where
        hidden = np.where(kept[:, None], embeddings, np.nan)
        state = PUSH(state, hidden, np.where(kept, labels, 2**31 - 1), where=where)
        exact.extend(zip(*embeddings[kept].T.tolist(), labels[kept].tolist(), strict=True))
        assert in_order(state) == list(exact)
        assert state.filled == len(exact)
        first += count


def test_rows_that_are_all_hidden_do_not_move_the_pointer() -> None:
    state = queue_push(queue_init(SIZE, DIM), *rows(0, 3))
    after = queue_push(state, np.full((7, DIM), np.nan, np.float32), where=np.zeros(7, bool))
    for a, b in zip(after, state, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_empty_queue_has_no_valid_row_and_a_row_without_a_label_has_minus_one() -> None:
    state = queue_init(SIZE, DIM)
    assert not queue_read(state)[2].any()
    _, labels, valid = queue_read(queue_push(state, rows(7, 2)[0]))
    np.testing.assert_array_equal(labels, -1)
    np.testing.assert_array_equal(valid, np.arange(SIZE) < 2)


def test_a_donated_queue_is_written_in_place() -> None:
    state = queue_init(SIZE, DIM)
    address = state.embeddings.unsafe_buffer_pointer()
    after = PUSH(state, *rows(0, 3))
    assert state.embeddings.is_deleted()
    assert after.embeddings.unsafe_buffer_pointer() == address
    before = PUSH._cache_size()
    PUSH(after, *rows(3, 3))
    assert PUSH._cache_size() == before


def test_nothing_that_goes_through_the_queue_has_a_gradient() -> None:
    embeddings, labels = rows(1, 3)

    def total(embeddings: Any, old: Any) -> Any:
        state = queue_init(SIZE, DIM)._replace(embeddings=old)
        pushed = queue_push(state, embeddings, labels)
        return jnp.sum(queue_read(pushed)[0] ** 2) + jnp.sum(queue_read(state)[0] ** 2)

    old = np.ones((SIZE, DIM), np.float32)
    for slope in jax.grad(total, argnums=(0, 1))(embeddings, old):
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_queue_keeps_its_dtype(dtype: Any) -> None:
    state = queue_push(queue_init(SIZE, DIM, dtype=dtype), rows(0, 3)[0])
    assert state.embeddings.dtype == dtype
    assert queue_read(state)[0].dtype == dtype


def test_a_queue_is_a_carry_of_scan() -> None:
    embeddings, labels = rows(0, 8)
    batches = embeddings.reshape(4, 2, DIM), labels.reshape(4, 2)
    step = lambda state, batch: (queue_push(state, *batch), None)
    state, _ = jax.lax.scan(step, queue_init(SIZE, DIM), batches)
    assert [label for *_, label in in_order(state)] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("size", [11, 40])
def test_the_rows_of_all_devices_are_pushed_in_their_order(size: int) -> None:
    """The result leaves `shard_map` as one array for all devices."""
    embeddings, labels = rows(0, 16)
    where = np.arange(16) % 3 > 0
    hidden = np.where(where[:, None], embeddings, np.nan)
    expected = queue_push(queue_init(size, DIM), hidden, labels, where=where)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    one, split = PartitionSpec(), PartitionSpec("data")
    call = jax.shard_map(
        lambda s, e, y, w: queue_push(s, e, y, where=w, axis_name="data"),
        mesh=mesh,
        in_specs=(one, split, split, split),
        out_specs=one,
    )
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    got = [jax.jit(call)(queue_init(size, DIM), hidden, labels, where)]
    with jax.set_mesh(explicit):
        put = lambda x: jax.device_put(x, NamedSharding(explicit, split))
        sharded = (put(x) for x in (hidden, labels))
        got.append(queue_push(queue_init(size, DIM), *sharded, where=put(where)))
    for state in got:
        for a, b in zip(state, expected, strict=True):
            np.testing.assert_array_equal(jax.device_get(a), b)


def test_a_full_queue_serves_as_negative_keys() -> None:
    generator = np.random.default_rng(0)
    query, keys, old = (generator.standard_normal((3, DIM)).astype(np.float32) for _ in range(3))
    state = queue_push(queue_init(3, DIM), old)
    loss = info_nce(query, keys, negative_keys=queue_read(state)[0], normalize=False)
    own, others = np.sum(query * keys, axis=1, keepdims=True) / 0.1, query @ old.T / 0.1
    exact = np.log(np.exp(np.c_[own, others] - own).sum(1)).mean()
    np.testing.assert_allclose(loss, exact, rtol=1e-5)


def test_wrong_arguments_raise() -> None:
    state, (embeddings, labels) = queue_init(SIZE, DIM), rows(0, 3)
    for call, error, text in (
        (lambda: queue_init(0, DIM), ValueError, "queue_init: size: expected an integer of at le"),
        (lambda: queue_init(SIZE, 2.0), ValueError, "queue_init: dim: expected an integer"),
        (lambda: queue_init(1, 1, dtype=jnp.int32), TypeError, "queue_init: dtype: expected a fl"),
        (
            lambda: queue_push(state, embeddings[:, :1]),
            ValueError,
            r"embeddings: .* shape \(3, 2\)",
        ),
        (lambda: queue_push(state, embeddings.astype(int)), TypeError, "embeddings: expected a fl"),
        (lambda: queue_push(state, embeddings, labels[:2]), ValueError, r"labels: .* shape \(3,\)"),
        (lambda: queue_push(state, embeddings, embeddings[:, 0]), TypeError, "labels: expected an"),
        (lambda: queue_push(state, embeddings, where=labels), TypeError, "where: expected a bool"),
        (lambda: queue_push(tuple(state), embeddings), TypeError, "state: expected a queue of"),
        (lambda: queue_read(tuple(state)), TypeError, "queue_read: state: expected a queue of"),
    ):
        with pytest.raises(error, match=text):
            call()
