"""Alignment losses against torch, optax and Keras."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses import ctc, dtw, transducer
from jaxloss.testing import Draw, draw_normal
from parity.peers import Row, check, peer

SIZES = (dict(B=4, T=9, N=3, C=5), dict(B=3, T=14, N=5, C=4), dict(B=2, T=6, N=1, C=30))
LABELS = Draw("B N", lambda g, s, z: g.integers(1, z["C"], s, np.int32), "fixed")
FRAMES = Draw("B", lambda g, s, z: g.integers(2 * z["N"], z["T"] + 1, s, np.int32), "fixed")
COUNTS = Draw("B", lambda g, s, z: g.integers(0, z["N"] + 1, s, np.int32), "fixed")
DRAWS = dict(
    logits=draw_normal("B T C", scale=2), labels=LABELS, lengths=FRAMES, label_lengths=COUNTS
)
LATTICE = dict(logits=draw_normal("B T U C", scale=2), labels=LABELS)


def ours(logits: Any, labels: Any, lengths: Any, label_lengths: Any, **options: Any) -> Any:
    options = dict(reduction="none") | options
    return ctc.ctc_loss(logits, labels, lengths=lengths, label_lengths=label_lengths, **options)


def torch_ctc(reduction: str = "none", last: bool = False) -> Any:
    def call(logits: Any, labels: Any, lengths: Any, label_lengths: Any) -> Any:
        log_probs = logits.log_softmax(-1).transpose(0, 1)
        blank = logits.shape[-1] - 1 if last else 0
        labels = labels - 1 if last else labels
        return peer("torch.nn.functional.ctc_loss")(
            log_probs, labels, lengths, label_lengths, blank=blank, reduction=reduction
        )

    return call


def per_label(logits: Any, labels: Any, lengths: Any, label_lengths: Any) -> Any:
    """torch's mean: each loss over its number of labels, at least 1, first."""
    units = ours(logits, labels, lengths, label_lengths)
    return jnp.mean(units / jnp.maximum(label_lengths, 1).astype(units.dtype))


def padding(lengths: Any, size: int, dtype: Any) -> Any:
    """1 beyond the end."""
    return (jnp.arange(size) >= lengths[:, None]).astype(dtype)


def optax_ctc(logits: Any, labels: Any, lengths: Any, label_lengths: Any) -> Any:
    return peer("optax.losses.ctc_loss")(
        logits,
        padding(lengths, logits.shape[1], logits.dtype),
        labels,
        padding(label_lengths, labels.shape[1], logits.dtype),
    )


def keras_ctc(logits: Any, labels: Any, lengths: Any, label_lengths: Any) -> Any:
    return peer("keras.ops.ctc_loss")(labels, logits, label_lengths, lengths, mask_index=0)


def row(name: str, ours: Any, theirs: Any, label: str = "", **options: Any) -> Row:
    options = dict(loss="ctc_loss", draws=DRAWS, sizes=SIZES) | options
    return Row(
        peer=name, ours=ours, theirs=theirs, label=label, differentiate=("logits",), **options
    )


def torch_lattice(logits: Any, labels: Any) -> Any:
    """The transducer recursion, cell by cell, with torch's own logaddexp and autograd."""
    import torch

    log_probs = logits.log_softmax(-1)
    blank = log_probs[..., 0]
    index = labels[:, None, :, None].expand(-1, blank.shape[1], -1, 1)
    label = log_probs[:, :, :-1].gather(3, index)
    alpha: dict[tuple[int, int], Any] = {}
    for t in range(blank.shape[1]):
        for u in range(blank.shape[2]):
            ways = [alpha[t - 1, u] + blank[:, t - 1, u]] if t else []
            ways += [alpha[t, u - 1] + label[:, t, u - 1, 0]] if u else []
            start = blank.new_zeros(blank.shape[0])
            alpha[t, u] = torch.logsumexp(torch.stack(ways), 0) if ways else start
    return -(alpha[t, u] + blank[:, -1, -1])


def series(loss: str, debiased: bool) -> Row:
    """Series of numbers, one pair at a time there."""

    def theirs(pred: Any, target: Any) -> Any:
        cost = peer("ott.geometry.costs.SoftDTW")(gamma=0.5, debiased=debiased)
        return jax.vmap(lambda x, y: cost(x[:, 0], y[:, 0]))(pred, target)

    return Row(
        loss=loss,
        peer="ott.geometry.costs.SoftDTW",
        ours=lambda pred, target: getattr(dtw, loss)(pred, target, gamma=0.5, reduction="none"),
        theirs=theirs,
        draws=dict(pred=draw_normal("B T 1"), target=draw_normal("B S 1")),
        differentiate=("pred", "target"),
        sizes=(dict(B=3, T=7, S=5), dict(B=2, T=4, S=9)),
        label="debiased" if debiased else "",
        note="series of single numbers there, one pair at a time",
    )


NOTE = "on log_softmax there"
ROWS = (
    row("torch.nn.functional.ctc_loss", ours, torch_ctc(), note=NOTE),
    row(
        "torch.nn.functional.ctc_loss",
        lambda **a: ours(**a, precision="high"),
        torch_ctc(),
        "precision=high",
        note=NOTE,
    ),
    row(
        "torch.nn.functional.ctc_loss",
        lambda labels, **a: ours(labels=labels - 1, blank_id=-1, **a),
        torch_ctc(last=True),
        "last class blank",
        note=NOTE,
    ),
    row(
        "torch.nn.functional.ctc_loss",
        per_label,
        torch_ctc("mean"),
        "mean",
        note="mean there: each loss over its number of labels first",
    ),
    row("optax.losses.ctc_loss", ours, optax_ctc, note="paddings there are 1 where hidden"),
    row("keras.ops.ctc_loss", ours, keras_ctc, note="mask_index there is the blank"),
    row(
        "torch.logsumexp",
        lambda logits, labels: transducer.rnnt_loss(logits, labels, reduction="none"),
        torch_lattice,
        loss="rnnt_loss",
        draws=LATTICE,
        sizes=(dict(B=3, T=4, N=3, U=4, C=5),),
        note="the recursion written out cell by cell",
    ),
    series("soft_dtw_loss", debiased=False),
    series("soft_dtw_divergence", debiased=True),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
