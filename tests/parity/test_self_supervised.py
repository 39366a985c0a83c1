"""Self-supervised losses against pytorch-metric-learning and torch."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxloss.losses import representation_statistics, self_distillation, self_supervised
from jaxloss.testing import Draw, draw_normal
from parity.peers import Row, check, peer, require_peer

F = "torch.nn.functional"
VIEWS = dict(query=draw_normal("B D"), keys=draw_normal("B D"))
PAIR = dict(pred=draw_normal("B T D"), target=draw_normal("B T D"))
PATCHES = dict(pred=draw_normal("B T D", scale=2), patches=draw_normal("B T D", scale=3))
TEACHER = dict(
    student=draw_normal("B T C"), teacher=draw_normal("B T C"), center=draw_normal("C", scale=0.3)
)
CROPS = dict(
    student=draw_normal("S B C"), teacher=draw_normal("V B C"), center=draw_normal("C", scale=0.3)
)
SIZES = ({}, {"B": 2, "D": 3, "T": 1}, {"B": 33, "D": 17, "T": 4})
MULTICROP = ({"S": 4, "V": 2}, {"S": 2, "V": 2, "B": 1, "C": 9}, {"S": 3, "V": 1, "B": 5, "C": 2})


def row(
    loss: Any,
    name: str,
    ours: Any,
    theirs: Any,
    draws: dict[str, Draw],
    *,
    first: bool = False,
    **options: Any,
) -> Row:
    """`ours(loss, *arrays)` against `theirs(peer, *arrays)`.

    Both are differentiated in all arrays, or in the `first` one where the rest is a teacher's.
    """
    return Row(
        loss=loss.__name__,
        peer=name,
        ours=lambda **arrays: ours(loss, *arrays.values()),
        theirs=lambda **arrays: theirs(peer(name), *arrays.values()),
        draws=draws,
        differentiate=tuple(draws)[:1] if first else tuple(draws),
        **{"sizes": SIZES, **options},
    )


def units(loss: Any, *arrays: Any) -> Any:
    return loss(*arrays, reduction="none")


def correlation(norm: Any, query: Any, keys: Any, weight: float) -> Any:
    """The authors' Barlow Twins from torch's batch normalisation."""
    query, keys = (norm(x, None, None, training=True, eps=1e-3) for x in (query, keys))
    cross = query.T @ keys / len(query)
    diagonal = cross.diagonal()
    off = (cross**2).sum() - (diagonal**2).sum()
    return ((1 - diagonal) ** 2).sum() + weight * off


def distance(norm: Any, pred: Any, target: Any) -> Any:
    """BYOL's squared distance of normalised vectors."""
    return ((norm(pred, dim=-1) - norm(target, dim=-1)) ** 2).sum(-1)


def patches_error(mse: Any, pred: Any, patches: Any) -> Any:
    """The authors' masked autoencoder with `norm_pix_loss`."""
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return mse(pred, (patches - mean) / (var + 1e-3) ** 0.5, reduction="none").mean(-1)


def tokens(entropy: Any, student: Any, teacher: Any, center: Any) -> Any:
    """iBOT's cost of each patch from cross-entropy with soft targets."""
    probs = ((teacher - center) / 0.3).softmax(-1)
    costs = entropy(student.flatten(0, 1) / 0.5, probs.flatten(0, 1), reduction="none")
    return costs.unflatten(0, student.shape[:2])


def crops(entropy: Any, student: Any, teacher: Any, center: Any) -> Any:
    """DINO's mean over the pairs of different views."""
    probs = ((teacher - center) / 0.3).softmax(-1)
    pairs = [(t, s) for t in range(len(teacher)) for s in range(len(student)) if s != t]
    costs = [entropy(student[s] / 0.5, probs[t], reduction="none") for t, s in pairs]
    return sum(costs) / len(costs)


def crowding(pdist: Any, x: Any, t: float) -> Any:
    """The authors' uniformity."""
    return pdist(x).pow(2).mul(-t).exp().mean().log()


def capacity(norm: Any, views: Any) -> Any:
    """MMCR from torch's nuclear norms."""
    rows = views / views.norm(dim=-1, keepdim=True)
    return -norm(rows.mean(0), ord="nuc") + 0.1 * norm(rows.movedim(1, 0), ord="nuc").mean()


def white(cholesky: Any, query: Any, keys: Any) -> Any:
    """W-MSE of one sub-batch."""

    def unit(x: Any) -> Any:
        x = x - x.mean(0)
        x = (cholesky(x.T.cov()).inverse() @ x.T).T
        return x / x.norm(dim=-1, keepdim=True)

    return 2 - 2 * (unit(query) * unit(keys)).sum(-1)


TEMPERATURES: dict[str, Any] = dict(student_temperature=0.5, teacher_temperature=0.3)

ROWS = (
    row(
        self_supervised.vicreg_loss,
        "pytorch_metric_learning.losses.VICRegLoss",
        lambda loss, q, k: loss(q, k)[0],
        lambda f, q, k: f()(q, ref_emb=k),
        VIEWS,
    ),
    row(
        self_supervised.vicreg_loss,
        "pytorch_metric_learning.losses.VICRegLoss",
        lambda loss, q, k: loss(q, k, invariance=3.0, variance=20.0, covariance=2.0, eps=1e-2)[0],
        lambda f, q, k: f(invariance_lambda=3.0, variance_mu=20.0, covariance_v=2.0, eps=1e-2)(
            q, ref_emb=k
        ),
        dict(query=draw_normal("B D", scale=0.5), keys=draw_normal("B D", scale=0.5)),
        label="options",
    ),
    row(
        self_supervised.barlow_twins_loss,
        f"{F}.batch_norm",
        lambda loss, q, k: loss(q, k, off_diagonal_weight=0.1, eps=1e-3),
        lambda f, q, k: correlation(f, q, k, 0.1),
        VIEWS,
        note="on what it returns, the loss of the authors without its scale",
    ),
    row(
        self_supervised.negative_cosine_loss,
        f"{F}.cosine_similarity",
        units,
        lambda f, p, t: -f(p, t.detach(), dim=-1, eps=1e-12),
        PAIR,
        first=True,
        note="its negative, of a detached target",
    ),
    row(
        self_supervised.byol_loss,
        f"{F}.normalize",
        units,
        distance,
        PAIR,
        first=True,
        note="squared distance of what it returns",
    ),
    row(
        self_supervised.mae_loss,
        f"{F}.mse_loss",
        lambda loss, *arrays: loss(*arrays, eps=1e-3, reduction="none"),
        patches_error,
        PATCHES,
        sizes=({}, {"B": 2, "D": 3, "T": 1}),
        note="of standardised patches, mean over their numbers",
    ),
    row(
        self_supervised.mae_loss,
        f"{F}.mse_loss",
        lambda loss, *arrays: loss(*arrays, normalize_patches=False),
        lambda f, p, x: f(p, x),
        PATCHES,
        label="plain",
    ),
    row(
        self_distillation.ibot_loss,
        f"{F}.cross_entropy",
        lambda loss, *arrays: units(lambda *a, **o: loss(*a, **TEMPERATURES, **o)[0], *arrays),
        tokens,
        TEACHER,
        first=True,
        note="with the teacher's probabilities as target",
    ),
    row(
        self_distillation.dino_loss,
        f"{F}.cross_entropy",
        lambda loss, *arrays: units(lambda *a, **o: loss(*a, **TEMPERATURES, **o)[0], *arrays),
        crops,
        CROPS,
        first=True,
        sizes=MULTICROP,
        note="with the teacher's probabilities as target, mean over pairs of views",
    ),
    row(
        representation_statistics.alignment_loss,
        "torch.linalg.vector_norm",
        lambda loss, *arrays: loss(*arrays, alpha=1.5, reduction="none"),
        lambda f, q, k: f(q - k, dim=-1) ** 1.5,
        VIEWS,
        note="its power",
    ),
    row(
        representation_statistics.uniformity_loss,
        f"{F}.pdist",
        lambda loss, x: loss(x, t=1.5),
        lambda f, x: crowding(f, x, 1.5),
        dict(embeddings=draw_normal("B D", scale=0.5)),
        note="log of the mean of Gaussians of what it returns",
    ),
    row(
        representation_statistics.mmcr_loss,
        "torch.linalg.matrix_norm",
        lambda loss, views: loss(views, local_weight=0.1),
        capacity,
        dict(embeddings=draw_normal("V B D")),
        sizes=({"V": 2}, {"V": 4, "B": 3, "D": 5}),
        note='`ord="nuc"`, of unit rows',
    ),
    row(
        representation_statistics.w_mse_loss,
        "torch.linalg.cholesky",
        lambda loss, q, k: loss(q, k, eps=0.0, reduction="none"),
        white,
        VIEWS,
        sizes=({"B": 16, "D": 3}, {"B": 33, "D": 5}),
        tolerance={"float32": 1e-4},
        note="the authors' loss, no shrinkage; float32: a factorisation and its inverse",
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)


def test_vicreg_of_one_row_is_zero_where_pytorch_metric_learning_is_nan() -> None:
    torch = require_peer("torch")
    one = np.ones((1, 3), np.float32)
    with pytest.warns(UserWarning, match="degrees of freedom"):
        theirs = peer("pytorch_metric_learning.losses.VICRegLoss")()(
            torch.tensor(one), ref_emb=torch.tensor(2 * one)
        )
    assert theirs.isnan()
    (value, _), slope = jax.value_and_grad(self_supervised.vicreg_loss, has_aux=True)(one, 2 * one)
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
