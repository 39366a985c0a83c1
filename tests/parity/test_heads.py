"""Fused vocabulary heads against torch's fused head and its cross-entropy of the logits."""

from typing import Any

import jax.numpy as jnp
import pytest

from jaxloss.losses import linear_heads
from jaxloss.testing import draw_labels, draw_normal, draw_uniform
from parity.peers import Row, check, peer

HEAD = dict(
    hidden=draw_normal("B D"),
    kernel=draw_normal("D C"),
    bias=draw_normal("C"),
    labels=draw_labels("B"),
)
WEIGHTED = dict(HEAD, class_weights=draw_uniform("C", 0.2, 2, kind="fixed"))
SPACE = dict(hidden=draw_normal("B T D"), kernel=draw_normal("D C"), labels=draw_labels("B T"))
TEACHER = dict(
    student_hidden=draw_normal("B D"),
    student_kernel=draw_normal("D C"),
    teacher_hidden=draw_normal("B V"),
    teacher_kernel=draw_normal("V C"),
)
WAYS = ("tokens", "vocabulary")
REDUCTIONS = ("none", "mean", "sum")
FUSED = "torch.nn.functional.linear_cross_entropy"
PLAIN = "torch.nn.functional.cross_entropy"
TRANSPOSED = "the kernel is transposed"
BY_WEIGHT = "a weighted mean is `weights=class_weights[labels]`"
ce = linear_heads.linear_cross_entropy
fused, plain, kl_div = peer(FUSED), peer(PLAIN), peer("torch.nn.functional.kl_div")
log_softmax = peer("torch.nn.functional.log_softmax")


def head(peer: str, ours: Any, theirs: Any, draws: Any, **options: Any) -> Row:
    """A row with the gradients of the hidden states, the kernel and the bias."""
    moving = tuple(name for name in ("hidden", "kernel", "bias") if name in draws)
    options = {"loss": "linear_cross_entropy", "differentiate": moving, **options}
    return Row(peer=peer, ours=ours, theirs=theirs, draws=draws, **options)


def distilled(student_hidden: Any, student_kernel: Any, teacher_hidden: Any, teacher_kernel: Any):
    logs = (
        log_softmax(hidden @ kernel / 2, -1)
        for hidden, kernel in ((student_hidden, student_kernel), (teacher_hidden, teacher_kernel))
    )
    return 4 * kl_div(*logs, log_target=True, reduction="batchmean")


ROWS = (
    *(
        head(
            FUSED,
            lambda hidden, kernel, bias, labels, w=way, r=reduction: ce(
                hidden, kernel, labels, bias=bias, chunk_size=3, implementation=w, reduction=r
            ),
            lambda hidden, kernel, bias, labels, r=reduction: fused(
                hidden, kernel.T, labels, linear_bias=bias, reduction=r
            ),
            HEAD,
            note=TRANSPOSED,
            label=f"{way}, {reduction}",
        )
        for way in WAYS
        for reduction in REDUCTIONS
        if (way, reduction) != ("tokens", "none")
    ),
    *(
        head(
            FUSED,
            lambda hidden, kernel, bias, labels, class_weights, w=way: ce(
                hidden,
                kernel,
                labels,
                bias=bias,
                chunk_size=3,
                implementation=w,
                class_weights=class_weights,
                label_smoothing=0.2,
                ignore_index=1,
                reduction="sum",
            ),
            lambda hidden, kernel, bias, labels, class_weights: fused(
                hidden,
                kernel.T,
                labels,
                linear_bias=bias,
                weight=class_weights,
                label_smoothing=0.2,
                ignore_index=1,
                reduction="sum",
            ),
            WEIGHTED,
            note=TRANSPOSED,
            label=f"{way}, all options",
        )
        for way in WAYS
    ),
    head(
        PLAIN,
        lambda hidden, kernel, bias, labels, class_weights: ce(
            hidden, kernel, labels, bias=bias, chunk_size=3, weights=jnp.take(class_weights, labels)
        ),
        lambda hidden, kernel, bias, labels, class_weights: plain(
            hidden @ kernel + bias, labels, weight=class_weights
        ),
        WEIGHTED,
        note=BY_WEIGHT,
        label="weighted mean of a head",
    ),
    head(
        PLAIN,
        lambda hidden, kernel, labels: ce(
            hidden, kernel, labels, chunk_size=2, softcap=3.0, ignore_index=1
        ),
        lambda hidden, kernel, labels: plain(
            (3 * (hidden @ kernel / 3).tanh()).movedim(-1, 1), labels, ignore_index=1
        ),
        SPACE,
        note="classes last",
        label="capped",
    ),
    head(
        PLAIN,
        lambda hidden, kernel, labels: linear_heads.linear_token_log_probs(
            hidden, kernel, labels, chunk_size=2
        ),
        lambda hidden, kernel, labels: (
            -plain((hidden @ kernel).movedim(-1, 1), labels, reduction="none")
        ),
        SPACE,
        note="the negative of it",
        loss="linear_token_log_probs",
    ),
    Row(
        loss="linear_distillation_loss",
        peer="torch.nn.functional.kl_div",
        ours=lambda **arrays: linear_heads.linear_distillation_loss(
            *arrays.values(), temperature=2.0, chunk_size=3
        ),
        theirs=distilled,
        draws=TEACHER,
        note="`batchmean` of log-softmax over T, times T^2",
        differentiate=("student_hidden", "student_kernel"),
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
