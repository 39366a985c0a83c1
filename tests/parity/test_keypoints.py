"""Keypoint and pose losses against torch, smp (segmentation-models-pytorch), kornia and SciPy."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses import heatmaps, keypoints, pose
from jaxloss.testing import draw_normal, draw_uniform, draw_unit
from parity.peers import Row, check, peer

SIZES = ({"H": 4, "W": 5}, {"B": 1, "T": 2, "H": 3, "W": 2}, {"B": 5, "T": 7, "H": 6, "W": 3})
FULL = ({"T": 6, "D": 3}, {"B": 2, "T": 9, "D": 3}, {"B": 3, "T": 7, "D": 2})
PAIR = dict(pred=draw_normal("B T D", scale=3), target=draw_normal("B T D", scale=3))
MAPS = dict(pred=draw_normal("B H W T"), target=draw_unit("B H W T"))
FLOW = dict(
    pred=draw_normal("B T 2"),
    log_sigma=draw_uniform("B T 2", -2, 1),
    target=draw_normal("B T 2"),
    flow_log_prob=draw_normal("B T 2"),
)
LOGITS = dict(heat_logits=draw_normal("B H W T", scale=2), target=draw_uniform("B T 2", -1, 1))
BINS = dict(
    logits_x=draw_normal("B T W"), logits_y=draw_normal("B T H"), target=draw_uniform("B T 2", 0, 3)
)
F = "torch.nn.functional"


def row(loss: Any, name: str, ours: Any, theirs: Any, draws: Any, **options: Any) -> Row:
    """`ours(loss, *arrays)` against `theirs(peer, *arrays)`, differentiated in all arrays."""
    options.setdefault("differentiate", tuple(draws))
    options.setdefault("sizes", SIZES)
    return Row(
        loss=loss.__name__,
        peer=name,
        ours=lambda **arrays: ours(loss, *arrays.values()),
        theirs=lambda **arrays: theirs(peer(name), *arrays.values()),
        draws=draws,
        **options,
    )


def units(loss: Any, *arrays: Any) -> Any:
    return loss(*arrays, reduction="none")


def first(x: Any) -> Any:
    """Joints before space, as torch has them."""
    return x.movedim(-1, 1)


def gaussian(centers: Any, sigma: float, height: int, width: int) -> Any:
    """kornia's heat maps, normalised, of centers in cells: `batch joints height width`."""
    render = peer("kornia.geometry.subpix.render_gaussian2d")
    return render(centers, centers.new_full((2,), sigma), (height, width), False)


def in_cells(target: Any, height: int, width: int) -> Any:
    """From [-1, 1] with cells as parts of the image to indices of cells."""
    return ((target + 1) * target.new_tensor([width, height]) - 1) / 2


def bins_around(target: Any, size: int, sigma: float) -> Any:
    """Gaussian over the bins, of sum 1."""
    import torch

    place = torch.arange(size, dtype=target.dtype)
    return torch.softmax(-((place - target[..., None]) ** 2) / (2 * sigma**2), dim=-1)


def simcc(kl_div: Any, logits_x: Any, logits_y: Any, target: Any) -> Any:
    total = 0
    for i, logits in enumerate((logits_x, logits_y)):
        bins = bins_around(target[..., i], logits.shape[-1], (1.5, 0.8)[i])
        log_probs = (logits / 0.7).log_softmax(dim=-1)
        total = total + kl_div(log_probs, bins, reduction="none").sum(dim=-1)
    return total / 2


def regularizer(loss: Any, logits: Any, target: Any) -> Any:
    return loss(logits, target, sigma=0.9, reduction="none") - loss(
        logits, target, regularization=0.0, reduction="none"
    )


def divergence(js: Any, logits: Any, target: Any) -> Any:
    logits = first(logits)
    probs = logits.flatten(2).softmax(dim=-1).reshape(logits.shape)
    height, width = logits.shape[2:]
    return js(probs, gaussian(in_cells(target, height, width), 0.9, height, width), "none")


def expectation(function: Any, logits: Any) -> Any:
    logits = first(logits)
    probs = logits.flatten(2).softmax(dim=-1).reshape(logits.shape)
    cells = function(probs, normalized_coordinates=False)
    return (2 * cells + 1) / cells.new_tensor([*logits.shape[:1:-1]]) - 1


def drawn(function: Any, centers: Any) -> Any:
    heat = function(centers, sigma=1.2, shape=(4, 5), subpixel=True)
    return (heat / jnp.sum(heat, axis=(1, 2), keepdims=True)) ** 2


def likelihood(distribution: Any, pred: Any, log_sigma: Any, target: Any, flow: Any) -> Any:
    residual = distribution(pred, log_sigma.exp()).log_prob(target)
    return (log_sigma - flow - residual).sum(dim=-1)


def disparity(procrustes: Any, pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    """What is left after SciPy's alignment, in the unit of the target."""
    out = []
    for p, t in zip(pred.astype(np.float64), target.astype(np.float64), strict=True):
        if np.linalg.det((t - t.mean(0)).T @ (p - p.mean(0))) < 0:
            p = p * np.array([-1] + [1] * (p.shape[-1] - 1))  # SciPy's best map would mirror it
        there, here, _ = procrustes(t, p)
        out.append(np.linalg.norm(here - there, axis=-1) * np.linalg.norm(t - t.mean(0)))
    return np.stack(out)


def aligned(loss: Any, pred: Any, target: Any) -> Any:
    centered = [x - jnp.mean(x, axis=-2, keepdims=True) for x in (target, pred)]
    sign = jnp.sign(jnp.linalg.det(jnp.einsum("bji,bjk->bik", *centered)))
    flip = jnp.stack([sign] + [jnp.ones_like(sign)] * (pred.shape[-1] - 1), axis=-1)
    return loss(pred * flip[:, None, :], target, reduction="none")


ROWS = (
    *(
        row(
            keypoints.wing_loss,
            "segmentation_models_pytorch.losses._functional.wing_loss",
            lambda f, p, t, r=r: f(p, t, width=2.0, curvature=0.3, reduction=r),
            lambda f, p, t, r=r: f(p, t, width=2.0, curvature=0.3, reduction=r),
            PAIR,
            label=r,
            note="the defaults there are 5 and 0.5",
        )
        for r in ("none", "mean", "sum")
    ),
    row(
        keypoints.rle_loss,
        "torch.distributions.Laplace",
        units,
        likelihood,
        FLOW,
        note="the negative `log_prob`, plus the logarithm of the scale, less that of the flow",
    ),
    row(
        keypoints.gaussian_rle_loss,
        "torch.distributions.Normal",
        units,
        likelihood,
        FLOW,
        note="the negative `log_prob`, plus the logarithm of the scale, less that of the flow",
    ),
    row(
        heatmaps.heatmap_mse_loss,
        f"{F}.mse_loss",
        lambda f, p, t: f(p, t),
        lambda f, p, t: f(p, t),
        MAPS,
        label="mean",
    ),
    row(
        heatmaps.heatmap_mse_loss,
        f"{F}.mse_loss",
        units,
        lambda f, p, t: f(p, t, reduction="none").mean(dim=(1, 2)),
        MAPS,
        label="none",
        note="the mean over the space",
    ),
    row(
        heatmaps.simcc_kl_loss,
        f"{F}.kl_div",
        lambda f, *arrays: f(*arrays, sigma=(1.5, 0.8), temperature=0.7, reduction="none"),
        simcc,
        BINS,
        note="the mean of two calls with Gaussian targets",
    ),
    row(
        heatmaps.dsnt_coordinates,
        "kornia.geometry.subpix.spatial_expectation2d",
        lambda f, logits: f(logits),
        expectation,
        dict(heat_logits=LOGITS["heat_logits"]),
        note="of probabilities there; its own `normalized_coordinates` span the centres of cells",
    ),
    row(
        heatmaps.dsnt_loss,
        "kornia.losses.js_div_loss_2d",
        regularizer,
        divergence,
        LOGITS,
        note="the regulariser, with targets from kornia's `render_gaussian2d`",
        tolerance=dict(float32=3e-5),
    ),
    row(
        heatmaps.draw_gaussian_heatmap,
        "kornia.geometry.subpix.render_gaussian2d",
        drawn,
        lambda f, c: f(c, c.new_full((2,), 1.2), (4, 5), False).movedim(1, -1) ** 2,
        dict(centers=draw_uniform("B T 2", 0, 3)),
        note="of sum 1 there, of height 1 here; `subpixel=True`; squares are compared",
    ),
    row(
        pose.mpjpe_loss,
        f"{F}.pairwise_distance",
        units,
        lambda f, p, t: f(p, t, eps=0.0),
        PAIR,
        note="`eps=0`",
    ),
    row(
        pose.procrustes_mpjpe_loss,
        "scipy.spatial.procrustes",
        aligned,
        disparity,
        PAIR,
        differentiate=(),
        sizes=FULL,
        note="normalised there; where its best map is no reflection",
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
