"""A queue of embeddings of earlier batches, as negatives or as a cross-batch memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from .._core.checks import check_float, check_integer, check_shape, check_where, message
from .._core.compiled import compiled
from .._core.moments import everyones
from .._core.reduce import mask
from .._core.terms import Axis
from .._core.typing import Where

__all__ = ["MemoryQueue", "queue_init", "queue_push", "queue_read"]


class MemoryQueue(NamedTuple):
    """A ring buffer of static shape; a pytree, to be carried from step to step.

    Attributes:
        embeddings: The rows, `(size, features)`.
        labels: Their labels, -1 for a row pushed without one, `(size,)`.
        position: Where the next row goes.
        filled: How many rows hold something.
    """

    embeddings: Float[Array, "size features"]
    labels: Integer[Array, " size"]
    position: Integer[Array, ""]
    filled: Integer[Array, ""]


@compiled("size", "dim", "dtype")
def queue_init(size: int, dim: int, *, dtype: Any = jnp.float32) -> MemoryQueue:
    """An empty queue, whose rows are 0 until they are pushed.

    Push random rows first, as MoCo does, where a loss that takes all rows as negatives would mind
    the zeros.

    Args:
        size: How many rows it holds.
        dim: Length of a row.
        dtype: Floating dtype in which rows are kept.

    Returns:
        The state, for `queue_push` and `queue_read`.

    Reference:
        He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020;
        Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020.

    >>> queue_init(4, 2).embeddings.shape
    (4, 2)
    """
    for name, value in (("size", size), ("dim", dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(message(name, "an integer of at least 1", repr(value)))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(message("dtype", "a floating dtype", dtype))
    return MemoryQueue(
        embeddings=jnp.zeros((size, dim), dtype),
        labels=jnp.full(size, -1, jnp.int32),
        position=jnp.zeros((), jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


@compiled("axis_name")
def queue_push(
    state: MemoryQueue,
    embeddings: Float[Array, "batch features"],
    labels: Integer[Array, " batch"] | None = None,
    *,
    where: Where | None = None,
    axis_name: Axis = None,
) -> MemoryQueue:
    """The queue with these rows in the places of its oldest ones; without a gradient.

    Of more rows than the queue holds the last ones stay. To let a compiled step write in place,
    donate the state: `jax.jit(step, donate_argnums=...)`.

    Args:
        state: A queue of `queue_init`, on all devices the same.
        embeddings: Rows to keep, such as the keys of this batch.
        labels: Their labels, for a cross-batch memory.
        where: Bool array `(batch,)`; the other rows are not pushed.
        axis_name: Mapped axes over which the batch is split; the rows of all devices are pushed,
            in their order, so that all have the same queue.

    Returns:
        The new state.

    Reference:
        He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020;
        Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020.

    >>> state = queue_push(queue_init(2, 1), jnp.array([[1.0], [2.0], [3.0]]))
    >>> queue_read(state)[0][:, 0]  # the last two
    Array([3., 2.], dtype=float32)
    """
    _check(state)
    size, dim = state.embeddings.shape
    check_float(embeddings=embeddings)
    check_shape((*jnp.shape(embeddings)[:1], dim), embeddings=embeddings)
    shape = embeddings.shape[:1]
    if labels is None:
        labels = jnp.full(shape, -1, state.labels.dtype)
    check_integer(labels=labels)
    check_shape(shape, labels=labels)
    if where is not None:
        check_where(where)
        check_shape(shape, where=where)
    kept = jnp.ones(shape, jnp.int32) if where is None else where.astype(jnp.int32)
    rows = jax.lax.stop_gradient(embeddings).astype(state.embeddings.dtype)
    rows, labels = mask(where, rows, labels.astype(state.labels.dtype))
    rows, labels, kept = (everyones(x, axis_name) for x in (rows, labels, kept))
    rank, pushed = jnp.cumsum(kept) - 1, jnp.sum(kept)
    stays = (kept > 0) & (rank >= pushed - size)
    place = jnp.where(stays, (state.position + rank) % size, size)  # size: nowhere
    return MemoryQueue(
        embeddings=jax.lax.stop_gradient(state.embeddings).at[place].set(rows, mode="drop"),
        labels=state.labels.at[place].set(labels, mode="drop"),
        position=(state.position + pushed) % size,
        filled=jnp.minimum(state.filled + pushed, size),
    )


@compiled()
def queue_read(
    state: MemoryQueue,
) -> tuple[Float[Array, "size features"], Integer[Array, " size"], Bool[Array, " size"]]:
    """The rows of a queue in the order of their places, not of their age; without a gradient.

    Args:
        state: A queue of `queue_push`.

    Returns:
        Embeddings `(size, features)` and, as the last one, which rows are filled, `(size,)`: the
        `negative_keys` and `negative_where` of `info_nce`; between them labels `(size,)`.

    Reference:
        He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020.

    >>> queue_read(queue_push(queue_init(2, 1), jnp.array([[5.0]]), jnp.array([7])))
    (Array([[5.],
           [0.]], dtype=float32), Array([ 7, -1], dtype=int32), Array([ True, False], dtype=bool))
    """
    _check(state)
    valid = jnp.arange(state.labels.shape[0], dtype=state.filled.dtype) < state.filled
    return jax.lax.stop_gradient(state.embeddings), state.labels, valid


def _check(state: Any) -> None:
    if not isinstance(state, MemoryQueue):
        raise TypeError(message("state", "a queue of queue_init", type(state).__name__))


CASES = ()
