"""Softmax cross-entropy, from one small eager call to a vocabulary-sized head."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jaxloss
from benchmarks.measure import Contender, Row, compiled, eager

Arrays = tuple[jax.Array, jax.Array]


def draw(rows: int, classes: int, dtype: Any) -> Callable[[np.random.Generator], Arrays]:
    def sample(generator: np.random.Generator) -> Arrays:
        logits = generator.standard_normal((rows, classes), np.float32)
        labels = generator.integers(0, classes, rows, np.int32)
        return jnp.asarray(logits, dtype), jnp.asarray(labels)

    return sample


def optax_mean(logits: jax.Array, labels: jax.Array, dtype: Any = None) -> jax.Array:
    logits = logits if dtype is None else logits.astype(dtype)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def torch_step(logits: jax.Array, labels: jax.Array, **options: Any) -> Contender:
    wide = np.asarray(logits.astype(jnp.float32))
    x = torch.tensor(wide).to(torch.bfloat16 if logits.dtype == jnp.bfloat16 else torch.float32)
    y = torch.tensor(np.asarray(labels), dtype=torch.int64)
    x.requires_grad_()

    def run() -> Any:
        loss = torch.nn.functional.cross_entropy(x, y, **options)
        return torch.autograd.grad(loss, x)

    return Contender(run)


def plain(logits: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    peer = partial(optax_mean, dtype=jnp.float32) if logits.dtype != jnp.float32 else optax_mean
    name = "optax" if logits.dtype == jnp.float32 else "optax, cast to float32"
    return {
        "jaxloss": compiled(jax.value_and_grad(jaxloss.softmax_cross_entropy), logits, labels),
        name: compiled(jax.value_and_grad(peer), logits, labels),
        "torch": torch_step(logits, labels),
    }


def smooth(logits: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    where = labels % 4 != 0

    def ours(logits: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
        return jaxloss.softmax_cross_entropy(logits, labels, label_smoothing=0.1, where=where)

    def theirs(logits: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
        units = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
        return jnp.mean(units, where=where)

    ignored = jnp.where(where, labels, -100)
    return {
        "jaxloss": compiled(jax.value_and_grad(ours), logits, labels, where),
        "optax": compiled(jax.value_and_grad(theirs), logits, labels, where),
        "torch": torch_step(logits, ignored, label_smoothing=0.1),
    }


def outside_jit(logits: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    return {
        "jaxloss": eager(jaxloss.softmax_cross_entropy, logits, labels),
        "optax": eager(optax_mean, logits, labels),
    }


def gradient_outside_jit(logits: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    return {
        "jaxloss": eager(jax.value_and_grad(jaxloss.softmax_cross_entropy), logits, labels),
        "optax": eager(jax.value_and_grad(optax_mean), logits, labels),
    }


F32, BF16 = jnp.float32, jnp.bfloat16
CAST = "optax, cast to float32"
ROWS = (
    Row(
        "ce_int_f32",
        "4096 x 32768",
        draw(4096, 32768, F32),
        plain,
        {"optax": 1.05, "torch": 1.0},
        15,
    ),
    Row("ce_int_bf16", "4096 x 32768", draw(4096, 32768, BF16), plain, {CAST: 0.9}, 15),
    Row("ce_small_f32", "32 x 10", draw(32, 10, F32), plain, {"optax": 1.05}, 2),
    Row("ce_small_bf16", "32 x 10", draw(32, 10, BF16), plain, {CAST: 1.05}, 2),
    Row("ce_exact_f32", "32768 x 1000", draw(32768, 1000, F32), plain, {}, 5),
    Row("ce_smooth_mask_f32", "2048 x 32768", draw(2048, 32768, F32), smooth, {"optax": 0.5}, 10),
    Row("ce_smooth_mask_bf16", "2048 x 32768", draw(2048, 32768, BF16), smooth, {"optax": 0.6}, 10),
    Row("eager_ce", "128 x 10", draw(128, 10, F32), outside_jit, {"optax": 0.05}, 2),
    Row("eager_ce_grad", "128 x 10", draw(128, 10, F32), gradient_outside_jit, {"optax": 0.2}, 2),
)
