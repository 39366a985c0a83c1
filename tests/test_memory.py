"""Peaks and communication that a compiled program must not exceed: read from XLA, never timed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxloss

MIB = 2**20
ROWS, CLASSES = 1024, 32768
FULL = ROWS * CLASSES * 4 / MIB  # one float32 copy of the logits


def temporaries(loss: Callable[..., Any], dtype: Any, classes: int = CLASSES) -> float:
    """MiB that value and gradient need beside the logits and their gradient."""
    logits = jax.ShapeDtypeStruct((ROWS, classes), dtype)
    labels = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(logits, labels).compile()
    return compiled.memory_analysis().temp_size_in_bytes / MIB


OPTIONS = {
    "plain": {},
    "smoothed": dict(label_smoothing=0.1),
    "weighted": dict(class_weights=jnp.ones(CLASSES)),
    "all": dict(label_smoothing=0.1, class_weights=jnp.ones(CLASSES), ignore_index=-100),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cross_entropy_in_float32_needs_no_copy_of_the_logits(options) -> None:
    loss = lambda z, y: jaxloss.softmax_cross_entropy(z, y, **options)
    assert temporaries(loss, jnp.float32) < 0.01 * FULL


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cross_entropy_in_bfloat16_needs_half_of_what_a_float32_cast_needs(options) -> None:
    def cast(z, y):
        units = optax.losses.softmax_cross_entropy_with_integer_labels
        return jnp.mean(units(z.astype(jnp.float32), y))

    loss = lambda z, y: jaxloss.softmax_cross_entropy(z, y, **options)
    assert temporaries(loss, jnp.bfloat16) < 0.52 * temporaries(cast, jnp.bfloat16)


def test_cross_entropy_of_few_classes_is_exact_without_a_copy() -> None:
    small = ROWS * 1000 * 4 / MIB
    assert temporaries(jaxloss.softmax_cross_entropy, jnp.float32, 1000) < 0.05 * small


@pytest.mark.parametrize("classes", [1000, 4096])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_cross_entropy_over_sharded_classes_gathers_nothing(kind, classes) -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    logits = jax.random.normal(jax.random.key(0), (16, classes))
    labels = jnp.arange(16) * 61 % classes
    step = jax.jit(jax.value_and_grad(jaxloss.softmax_cross_entropy))
    expected, slope = step(logits, labels)
    with jax.set_mesh(mesh):
        sharded = put(logits, None, "model")
        lowered = step.lower(sharded, put(labels))
        value, gradient = step(sharded, put(labels))
    assert "all-gather" not in lowered.compile().as_text()
    assert gradient.sharding.is_equivalent_to(sharded.sharding, 2)
    assert jnp.allclose(value, expected, rtol=1e-6)
    assert jnp.allclose(jax.device_get(gradient), slope, rtol=1e-5, atol=1e-8)


def test_the_global_mean_of_a_sharded_batch_is_one_all_reduce() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    arrays = put(jnp.ones((16, 4))), put(jnp.zeros((16, 4))), put(jnp.ones((16, 4), bool))
    loss = lambda p, t, w: jaxloss.squared_error(p, t, where=w)
    text = jax.jit(loss).lower(*arrays).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    assert "all-gather" not in text
