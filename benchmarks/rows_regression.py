"""Elementwise losses: value and gradient over a million elements, and small eager calls."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F

import jaxloss
from benchmarks.measure import Contender, Row, compiled, eager

Pair = tuple[jax.Array, jax.Array]
Loss = Callable[..., Any]


def draw(*shape: int) -> Callable[[np.random.Generator], Pair]:
    def sample(generator: np.random.Generator) -> Pair:
        return tuple(jnp.asarray(generator.standard_normal(shape, np.float32)) for _ in range(2))

    return sample


def against(
    ours: Loss, theirs: Loss, torchs: Loss | None
) -> Callable[..., Mapping[str, Contender]]:
    def build(pred: jax.Array, target: jax.Array) -> Mapping[str, Contender]:
        mean = lambda p, t: jnp.mean(theirs(p, t))
        contenders = {
            "jaxloss": compiled(jax.value_and_grad(ours), pred, target),
            "optax": compiled(jax.value_and_grad(mean), pred, target),
        }
        if torchs is not None:
            x = torch.tensor(np.asarray(pred), requires_grad=True)
            y = torch.tensor(np.asarray(target))
            contenders["torch"] = Contender(lambda: torch.autograd.grad(torchs(x, y), x))
        return contenders

    return build


def outside_jit(pred: jax.Array, target: jax.Array) -> Mapping[str, Contender]:
    return {
        "jaxloss": eager(jaxloss.huber_loss, pred, target),
        "optax": eager(lambda p, t: jnp.mean(optax.huber_loss(p, t)), pred, target),
    }


LARGE = draw(1024, 1024)
ROWS = (
    Row(
        "squared_error",
        "1024 x 1024",
        LARGE,
        against(jaxloss.squared_error, optax.squared_error, F.mse_loss),
        {"optax": 1.05},
        3,
    ),
    Row(
        "huber_loss",
        "1024 x 1024",
        LARGE,
        against(jaxloss.huber_loss, optax.huber_loss, F.huber_loss),
        {"optax": 1.05},
        3,
    ),
    Row("log_cosh", "1024 x 1024", LARGE, against(jaxloss.log_cosh, optax.log_cosh, None), {}, 3),
    Row(
        "binary_cross_entropy",
        "1024 x 1024",
        LARGE,
        against(
            lambda p, t: jaxloss.sigmoid_binary_cross_entropy(p, jax.nn.sigmoid(t)),
            lambda p, t: optax.sigmoid_binary_cross_entropy(p, jax.nn.sigmoid(t)),
            lambda p, t: F.binary_cross_entropy_with_logits(p, t.sigmoid()),
        ),
        {"optax": 1.05},
        3,
    ),
    Row("eager_huber", "128 x 10", draw(128, 10), outside_jit, {"optax": 0.2}, 2),
)
