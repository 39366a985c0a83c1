"""Divergences and losses for wrong labels against torch, optax, Keras and SciPy."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxloss.losses import bi_tempered, divergences, noisy_labels
from jaxloss.testing import draw_labels, draw_log_probs, draw_normal, draw_probs
from parity.peers import Row, check, peer

PAIR = dict(log_probs=draw_log_probs("B C"), target=draw_probs("B C"))
LOG_PAIR = dict(log_probs=draw_log_probs("B C"), log_target=draw_log_probs("B C"))
SPATIAL = dict(log_probs=draw_log_probs("B T C"), target=draw_probs("B T C"))
MEASURES = dict(log_probs=draw_normal("B C"), target=draw_probs("B C"))
PROBS = dict(probs=draw_probs("B C"), target=draw_probs("B C"))
LOGITS = dict(logits=draw_normal("B C", scale=2))
CLASSES = dict(logits=draw_normal("B C", scale=2), labels=draw_labels("B"))
UNITS = dict(reduction="none")


def row(
    loss: Any, name: str, theirs: Any, draws: Any, *, config: Any = UNITS, **options: Any
) -> Row:
    """A row in which `theirs` gets the function of the peer and the arrays."""
    function = peer(name)
    return Row(
        loss=loss.__name__,
        peer=name,
        ours=lambda **arrays: loss(*arrays.values(), **config),
        theirs=lambda **arrays: theirs(function, *arrays.values()),
        draws=draws,
        **options,
    )


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


KL_DIV = "torch.nn.functional.kl_div"
BOTH = ("log_probs", "target")
TORCH = [
    row(
        divergences.kl_divergence,
        KL_DIV,
        lambda f, p, t: f(p, t, reduction="batchmean"),
        PAIR,
        config={},
        label="batchmean",
        differentiate=BOTH,
    ),
    row(
        divergences.kl_divergence,
        KL_DIV,
        lambda f, p, t: f(p, t, reduction="none").sum(-1),
        SPATIAL,
        label="none",
        differentiate=BOTH,
        note='`reduction="none"` there is one value for each class',
    ),
    row(
        divergences.kl_divergence_with_log_targets,
        KL_DIV,
        lambda f, p, t: f(p, t, reduction="batchmean", log_target=True),
        LOG_PAIR,
        config={},
        differentiate=("log_probs", "log_target"),
        note="`log_target=True`",
    ),
    row(
        noisy_labels.classification_absolute_error,
        "torch.nn.functional.l1_loss",
        lambda f, z, y: (
            f(
                z.softmax(-1),
                peer("torch.eye")(z.shape[-1])[y],
                reduction="none",
            ).sum(-1)
            / 2
        ),
        CLASSES,
        differentiate=("logits",),
        note="half the sum over the classes, of softmax and one-hot labels",
    ),
    row(
        bi_tempered.bi_tempered_logistic_loss,
        "torch.nn.functional.cross_entropy",
        lambda f, z, y: f(z, y, label_smoothing=0.0, reduction="none"),
        CLASSES,
        differentiate=("logits",),
        note="at the default temperatures",
    ),
]

OPTAX = [
    row(
        getattr(divergences, name),
        f"optax.losses.{name}",
        lambda f, *arrays: f(*arrays),
        draws,
        differentiate=tuple(draws),
    )
    for name, draws in {
        "kl_divergence": PAIR,
        "kl_divergence_with_log_targets": LOG_PAIR,
        "generalized_kl_divergence": MEASURES,
    }.items()
]
OPTAX.append(
    row(
        divergences.kl_divergence,
        "optax.losses.kl_divergence",
        lambda f, p, t: f(p, t, axis=1),
        SPATIAL,
        config=dict(axis=1, reduction="none"),
        label="axis",
        differentiate=BOTH,
    )
)

KERAS = [
    row(
        noisy_labels.generalized_cross_entropy,
        "keras.losses.categorical_generalized_cross_entropy",
        lambda f, z, y, q=q: f(y, jax.nn.softmax(z), q),
        CLASSES,
        config=dict(q=q, reduction="none"),
        label=f"q {q}",
        differentiate=("logits",),
        note="probabilities there, logits here",
    )
    for q in (0.1, 0.7, 1.0)
]
KERAS.append(
    row(
        divergences.kl_divergence,
        "keras.losses.kl_divergence",
        lambda f, log_p, t: f(t, jax.numpy.exp(log_p)),
        PAIR,
        differentiate=BOTH,
        note="probabilities there, clipped to [1e-7, 1]",
    )
)

SCIPY = [
    row(
        divergences.kl_divergence,
        "scipy.special.rel_entr",
        lambda f, log_p, t: f(t, np.exp(log_p)).sum(-1),
        PAIR,
        note="one value for each class there",
    ),
    row(
        divergences.generalized_kl_divergence,
        "scipy.special.kl_div",
        lambda f, log_p, t: f(t, np.exp(log_p)).sum(-1),
        MEASURES,
        note="one value for each class there",
    ),
    row(
        divergences.js_divergence,
        "scipy.spatial.distance.jensenshannon",
        lambda f, p, t: f(p, t, axis=-1) ** 2,
        PROBS,
        note="the root there",
    ),
    row(
        divergences.confidence_penalty,
        "scipy.stats.entropy",
        lambda f, z: -f(softmax(z), axis=-1),
        LOGITS,
        note="minus the entropy of the softmax",
    ),
    row(
        divergences.jsd_consistency_loss,
        "scipy.stats.entropy",
        lambda f, z: f(softmax(z).mean(0), axis=-1) - f(softmax(z), axis=-1).mean(0),
        dict(logits=draw_normal("V B T C", scale=2)),
        note="entropy of the mean minus mean entropy",
    ),
]

ROWS = (*TORCH, *OPTAX, *KERAS, *SCIPY)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
