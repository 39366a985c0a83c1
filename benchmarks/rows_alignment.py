"""Alignment losses, value and gradient: CTC, transducer and soft-DTW."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.measure import Contender, Row, compiled
from jaxloss.losses import ctc, dtw, transducer


def draw_ctc(
    size: int, time: int, classes: int, length: int
) -> Callable[[np.random.Generator], tuple[Any, ...]]:
    def sample(generator: np.random.Generator) -> tuple[Any, ...]:
        logits = generator.standard_normal((size, time, classes), np.float32)
        return jnp.asarray(logits), jnp.asarray(generator.integers(1, classes, (size, length)))

    return sample


def ctc_losses(logits: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    def theirs(logits: jax.Array, labels: jax.Array) -> jax.Array:
        none = jnp.zeros(logits.shape[:2]), jnp.zeros(labels.shape)
        return jnp.mean(optax.losses.ctc_loss(logits, none[0], labels, none[1]))

    x = torch.tensor(np.asarray(logits)).transpose(0, 1).contiguous().requires_grad_()
    y = torch.tensor(np.asarray(labels), dtype=torch.int64)
    sizes = torch.full(y.shape[:1], x.shape[0]), torch.full(y.shape[:1], y.shape[1])

    def in_torch() -> Any:
        units = torch.nn.functional.ctc_loss(x.log_softmax(-1), y, *sizes, reduction="none")
        return torch.autograd.grad(units.mean(), x)

    high = partial(ctc.ctc_loss, precision="high")
    return {
        "jaxloss": compiled(jax.value_and_grad(ctc.ctc_loss), logits, labels),
        "torch": Contender(in_torch),
        "optax": compiled(jax.value_and_grad(theirs), logits, labels),
        "precision=high": compiled(jax.value_and_grad(high), logits, labels),
    }


def draw_lattice(generator: np.random.Generator) -> tuple[Any, ...]:
    size, time, length, classes = 8, 200, 50, 512
    logits = generator.standard_normal((size, time, length + 1, classes), np.float32)
    return jnp.asarray(logits), jnp.asarray(generator.integers(1, classes, (size, length)))


def rnnt_scan(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The recursion as it is usually written: log_softmax, frames in a scan, labels in another."""
    log_probs = jax.nn.log_softmax(logits)
    blank = log_probs[..., 0]
    index = jnp.broadcast_to(labels[:, None, :, None], (*blank.shape[:2], labels.shape[1], 1))
    label = jnp.take_along_axis(log_probs[:, :, :-1], index, axis=3)[..., 0]

    def along(above: jax.Array, label: jax.Array) -> jax.Array:
        def cell(left: jax.Array, column: Any) -> Any:
            new = jnp.logaddexp(column[0], left + column[1])
            return new, new

        _, rest = jax.lax.scan(cell, above[:, 0], (above[:, 1:].T, label.T))
        return jnp.concatenate([above[:, :1], rest.T], axis=1)

    first = jnp.cumsum(jnp.pad(label[:, 0], [(0, 0), (1, 0)]), axis=1)
    step = lambda alpha, frame: (along(alpha + frame[0], frame[1]), None)
    frames = jnp.moveaxis(blank[:, :-1], 1, 0), jnp.moveaxis(label[:, 1:], 1, 0)
    alpha, _ = jax.lax.scan(step, first, frames)
    return -jnp.mean(alpha[:, -1] + blank[:, -1, -1])


def rnnt(logits: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    return {
        "jaxloss": compiled(jax.value_and_grad(transducer.rnnt_loss), logits, labels),
        "plain scan": compiled(jax.value_and_grad(rnnt_scan), logits, labels),
    }


def draw_cost(generator: np.random.Generator) -> tuple[Any, ...]:
    return (jnp.asarray(generator.uniform(0, 4, (16, 256, 256)).astype(np.float32)),)


def dtw_scan(cost: jax.Array) -> jax.Array:
    """The recursion over anti-diagonals with autodiff through the soft minimum."""
    size, time, _ = cost.shape
    far = 1e10
    skewed = jnp.stack(
        [jnp.pad(cost[:, i], [(0, 0), (i, time - 1 - i)], constant_values=far) for i in range(time)]
    )

    def step(carry: Any, node: jax.Array) -> Any:
        last, before = carry
        left = jnp.concatenate([jnp.full((1, size), far), last[:-1]])
        corner = jnp.concatenate([jnp.full((1, size), far), before[:-1]])
        new = node - jax.nn.logsumexp(-jnp.stack([left, last, corner]), axis=0)
        return (new, last), None

    nothing = jnp.full((time, size), far)
    first = nothing.at[0].set(cost[:, 0, 0])
    (last, _), _ = jax.lax.scan(step, (first, nothing), jnp.moveaxis(skewed, 2, 0)[1:])
    return jnp.mean(last[-1])


def soft_dtw(cost: jax.Array) -> Mapping[str, Contender]:
    return {
        "jaxloss": compiled(jax.value_and_grad(dtw.soft_dtw_from_cost), cost),
        "plain scan": compiled(jax.value_and_grad(dtw_scan), cost),
    }


ROWS = (
    Row(
        "ctc_short",
        "32 x 500 x 128, 100 labels",
        draw_ctc(32, 500, 128, 100),
        ctc_losses,
        {"torch": 0.6, "optax": 0.6},
        8,
    ),
    Row(
        "ctc_long",
        "16 x 1500 x 128, 300 labels",
        draw_ctc(16, 1500, 128, 300),
        ctc_losses,
        {"torch": 0.7, "optax": 0.7},
        12,
    ),
    Row("rnnt", "8 x 200 x 50 x 512", draw_lattice, rnnt, {"plain scan": 0.45}, 10),
    Row("soft_dtw", "16 x 256 x 256", draw_cost, soft_dtw, {"plain scan": 0.35}, 6),
)
