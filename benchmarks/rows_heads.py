"""Vocabulary heads: fused cross-entropy of hidden states against the logits written out."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.measure import Contender, Row, compiled
from jaxloss.losses.linear_heads import linear_cross_entropy

Arrays = tuple[Any, ...]


def draw(n: int, d: int, v: int, dtype: Any) -> Callable[[np.random.Generator], Arrays]:
    def sample(generator: np.random.Generator) -> Arrays:
        hidden = generator.standard_normal((n, d), np.float32)
        kernel = generator.standard_normal((d, v), np.float32) / d**0.5
        labels = generator.integers(0, v, n, np.int32)
        return jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), jnp.asarray(labels)

    return sample


def shapes(n: int, d: int, v: int, dtype: Any) -> Callable[[np.random.Generator], Arrays]:
    def sample(_: np.random.Generator) -> Arrays:
        floats = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((n, d), (d, v)))
        return *floats, jax.ShapeDtypeStruct((n,), jnp.int32)

    return sample


def naive(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """What one writes by hand: float32 logits of all tokens."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - own)


def jax_heads(hidden: Any, kernel: Any, labels: Any) -> Mapping[str, Contender]:
    step = lambda loss: compiled(jax.value_and_grad(loss, (0, 1)), hidden, kernel, labels)
    return {"jaxloss": step(linear_cross_entropy), "naive": step(naive)}


def with_torch(hidden: Any, kernel: Any, labels: Any) -> Mapping[str, Contender]:
    h, w = (torch.tensor(np.asarray(x), requires_grad=True) for x in (hidden, kernel.T))
    y = torch.tensor(np.asarray(labels), dtype=torch.int64)

    def run() -> Any:
        return torch.autograd.grad(torch.nn.functional.linear_cross_entropy(h, w, y), (h, w))

    return {**jax_heads(hidden, kernel, labels), "torch": Contender(run)}


def memory_alone(hidden: Any, kernel: Any, labels: Any) -> Mapping[str, Contender]:
    def compile_only(loss: Callable[..., jax.Array]) -> Contender:
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, kernel, labels)
        memory = lowered.compile().memory_analysis()
        return Contender(lambda: None, None if memory is None else memory.temp_size_in_bytes)

    return {"jaxloss": compile_only(linear_cross_entropy), "naive": compile_only(naive)}


F32, BF16 = jnp.float32, jnp.bfloat16
ROWS = (
    Row(
        "linear_ce_f32",
        "4096 x 512 x 32768",
        draw(4096, 512, 32768, F32),
        with_torch,
        {"naive": 1.05},
        20,
    ),
    Row(
        "linear_ce_bf16",
        "4096 x 512 x 32768",
        draw(4096, 512, 32768, BF16),
        jax_heads,
        {"naive": 0.85},
        20,
    ),
    Row(
        "linear_ce_large",
        "2048 x 512 x 131072",
        draw(2048, 512, 131072, F32),
        jax_heads,
        {"naive": 0.95},
        20,
    ),
    Row(
        "linear_ce_mem",
        "8192 x 512 x 131072, memory",
        shapes(8192, 512, 131072, F32),
        memory_alone,
        {},
        0.1,
    ),
)
