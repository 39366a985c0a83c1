"""Token losses over a vocabulary: every option in one pass, and distillation."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.measure import Contender, Row, compiled
from benchmarks.rows_classification import BF16, CAST, F32, draw, torch_step
from jaxloss.losses import distillation, tokens

SMOOTHING, Z = 0.1, 1e-4


def smooth_z(logits: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    where = labels % 4 != 0

    def ours(logits: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
        return tokens.sequence_cross_entropy(
            logits, labels, label_smoothing=SMOOTHING, z_loss=Z, where=where
        )

    def theirs(logits: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), SMOOTHING)
        units = optax.softmax_cross_entropy(logits, targets)
        units += Z * jax.nn.logsumexp(logits, axis=-1) ** 2
        return jnp.mean(units, where=where)

    ignored = jnp.where(where, labels, -100)
    peer = "optax" if logits.dtype == F32 else CAST
    return {
        "jaxloss": compiled(jax.value_and_grad(ours), logits, labels, where),
        peer: compiled(jax.value_and_grad(theirs), logits, labels, where),
        "torch, without z-loss": torch_step(logits, ignored, label_smoothing=SMOOTHING),
    }


def capped(logits: jax.Array, labels: jax.Array) -> Mapping[str, Contender]:
    def ours(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return tokens.sequence_cross_entropy(logits, labels, softcap=30.0)

    def theirs(logits: jax.Array, labels: jax.Array) -> jax.Array:
        bent = 30 * jnp.tanh(logits.astype(jnp.float32) / 30)
        return optax.losses.softmax_cross_entropy_with_integer_labels(bent, labels).mean()

    return {
        "jaxloss": compiled(jax.value_and_grad(ours), logits, labels),
        "optax" if logits.dtype == F32 else CAST: compiled(
            jax.value_and_grad(theirs), logits, labels
        ),
    }


def pair(generator: np.random.Generator) -> tuple[jax.Array, jax.Array]:
    student, teacher = generator.standard_normal((2, 1024, 32768), np.float32)
    return jnp.asarray(student), jnp.asarray(teacher)


def distil(student: jax.Array, teacher: jax.Array) -> Mapping[str, Contender]:
    def plain(student: jax.Array, teacher: jax.Array) -> jax.Array:
        s, t = (jax.nn.log_softmax(z / 2, axis=-1) for z in (student, teacher))
        return 4 * jnp.mean(optax.losses.kl_divergence_with_log_targets(s, t))

    s, t = (torch.tensor(np.asarray(z)) for z in (student, teacher))
    s.requires_grad_()

    def run() -> Any:
        logs = ((z / 2).log_softmax(dim=-1) for z in (s, t))
        loss = torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")
        return torch.autograd.grad(4 * loss, s)

    loss = lambda s, t: distillation.distillation_loss(s, t, temperature=2.0)
    return {
        "jaxloss": compiled(jax.value_and_grad(loss), student, teacher),
        "optax": compiled(jax.value_and_grad(plain), student, teacher),
        "torch": Contender(run),
    }


def mixture(student: jax.Array, teacher: jax.Array) -> Mapping[str, Contender]:
    def plain(student: jax.Array, teacher: jax.Array) -> jax.Array:
        s, t = (jax.nn.log_softmax(z, axis=-1) for z in (student, teacher))
        m = jnp.logaddexp(s, t) - jnp.log(2.0)
        kl = optax.losses.kl_divergence_with_log_targets
        return jnp.mean(kl(m, s) + kl(m, t)) / 2

    return {
        "jaxloss": compiled(jax.value_and_grad(distillation.generalized_jsd), student, teacher),
        "optax": compiled(jax.value_and_grad(plain), student, teacher),
    }


SHAPE = "2048 x 32768"
ROWS = (
    Row("ce_smooth_z_mask_f32", SHAPE, draw(2048, 32768, F32), smooth_z, {"optax": 0.5}, 10),
    Row("ce_smooth_z_mask_bf16", SHAPE, draw(2048, 32768, BF16), smooth_z, {CAST: 0.6}, 10),
    Row("ce_softcap_f32", SHAPE, draw(2048, 32768, F32), capped, {}, 8),
    Row("ce_softcap_bf16", SHAPE, draw(2048, 32768, BF16), capped, {}, 8),
    Row("distillation_f32", "1024 x 32768", pair, distil, {}, 8),
    Row("generalized_jsd_f32", "1024 x 32768", pair, mixture, {}, 8),
)
