"""Depth losses against NumPy, torch, kornia and scikit-image."""

from typing import Any

import numpy as np
import pytest

from jaxloss.losses import depth, depth_structure
from jaxloss.testing import draw_normal, draw_uniform
from parity.peers import Row, check, peer

SIZES = ({"H": 4, "W": 5}, {"B": 1, "C": 1, "H": 3, "W": 4}, {"B": 5, "C": 3, "H": 9, "W": 6})
DEPTHS = dict(pred=draw_uniform("B H W", 0.5, 5), target=draw_uniform("B H W", 0.5, 5))
DISPARITIES = dict(pred=draw_normal("B H W"), target=draw_normal("B H W"))
VIEWS = dict(pred=draw_uniform("B H W C", 0, 1), target=draw_uniform("B H W C", 0, 1))
NORMALS = dict(pred=draw_normal("B H W 3"), target=draw_normal("B H W 3"))
GUIDED = dict(disparity=draw_normal("B H W"), image=draw_uniform("B H W C", 0, 1))
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


def units(loss: Any, *arrays: Any, **options: Any) -> Any:
    return loss(*arrays, reduction="none", **options)


def least_squares(lstsq: Any, pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    out = []
    for p, t in zip(pred, target, strict=True):
        columns = np.stack([p.ravel(), np.ones(p.size)], axis=1).astype(np.float64)
        _, left, _, _ = lstsq(columns, t.ravel(), rcond=None)
        out.append(left[0] / (2 * p.size))
    return np.array(out)


def fitted(lstsq: Any, pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    out = []
    for p, t in zip(pred, target, strict=True):
        columns = np.stack([p.ravel(), np.ones(p.size)], axis=1).astype(np.float64)
        out.append((columns @ lstsq(columns, t.ravel(), rcond=None)[0]).reshape(p.shape))
    return np.stack(out)


def trimmed(median: Any, pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    out = []
    for maps in zip(pred.astype(np.float64), target.astype(np.float64), strict=True):
        centered = [x - median(x) for x in maps]
        p, t = (x / np.abs(x).mean() for x in centered)
        error = np.sort(np.abs(p - t).ravel())
        out.append(error[: int(len(error) * (1 - 0.25))].sum() / (2 * len(error)))
    return np.array(out)


def slopes(diff: Any, pred: Any, target: Any) -> Any:
    total = 0
    for step in (1, 2):
        error = (pred - target)[:, ::step, ::step]
        count = error.shape[1] * error.shape[2]
        total = total + sum(diff(error, dim=i).abs().sum(dim=(1, 2)) / count for i in (1, 2))
    return total


def smoothness(function: Any, disparity: Any, image: Any) -> Any:
    return function(disparity[:, None], image.movedim(-1, 1))


def normalized(function: Any, disparity: Any, image: Any) -> Any:
    disparity = disparity / disparity.mean(dim=(1, 2), keepdim=True)
    return function(disparity[:, None], image.movedim(-1, 1))


def photometric(pool: Any, pred: Any, target: Any) -> Any:
    """The loss of Monodepth2, from means over windows."""
    import torch

    x, y = (
        torch.nn.functional.pad(i.movedim(-1, 1), (1, 1, 1, 1), "reflect") for i in (pred, target)
    )
    mean = lambda i: pool(i, 3, 1)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    lacking = ((1 - ssim) / 2).clamp(0, 1).mean(dim=1)
    return 0.85 * lacking + 0.15 * (pred - target).abs().mean(dim=-1)


def similarity(function: Any, pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    options = dict(win_size=3, data_range=1.0, use_sample_covariance=False, full=True)
    maps = [
        function(p.astype(np.float64), t.astype(np.float64), channel_axis=-1, **options)[1]
        for p, t in zip(pred, target, strict=True)
    ]
    return (1 - np.stack(maps)[:, 1:-1, 1:-1].mean(-1)) / 2


def normals(gradient: Any, z: np.ndarray, camera: np.ndarray) -> np.ndarray:
    v, u = np.mgrid[: z.shape[1], : z.shape[2]]
    pixels = np.stack([u, v, np.ones_like(u)], axis=-1)
    out = []
    for one, k in zip(z.astype(np.float64), camera.astype(np.float64), strict=True):
        matrix = np.triu(k)
        matrix[2, 2] = 1
        rays = pixels @ np.linalg.inv(matrix).T
        down, right = gradient(rays * one[..., None], axis=(0, 1))
        normal = np.cross(down, right)
        out.append(normal / np.linalg.norm(normal, axis=-1, keepdims=True))
    return np.stack(out)


ROWS = (
    row(
        depth.scale_shift_invariant_loss,
        "numpy.linalg.lstsq",
        units,
        least_squares,
        DISPARITIES,
        differentiate=(),
        note="half of what is left, over the number of pixels",
    ),
    row(
        depth.align_scale_shift,
        "numpy.linalg.lstsq",
        lambda f, p, t: f(p, t),
        fitted,
        DISPARITIES,
        differentiate=(),
        note="the fit itself",
    ),
    row(
        depth.scale_shift_invariant_absolute_error,
        "numpy.median",
        lambda f, p, t: f(p, t, trim=0.25, reduction="none"),
        trimmed,
        DISPARITIES,
        differentiate=(),
        note="of each side, and the mean absolute deviation from it",
    ),
    row(
        depth.scale_invariant_log_error,
        "torch.var",
        lambda f, p, t: units(f, p, t, variance_focus=1.0),
        lambda f, p, t: f(p.log() - t.log(), dim=(1, 2), correction=0),
        DEPTHS,
        note="of the logarithms of ratios, at `variance_focus=1`",
    ),
    row(
        depth.silog_loss,
        "torch.std",
        lambda f, p, t: units(f, p, t, variance_focus=1.0),
        lambda f, p, t: f(p.log() - t.log(), dim=(1, 2), correction=0),
        DEPTHS,
        note="of the logarithms of ratios, at `variance_focus=1`",
    ),
    row(
        depth.scale_invariant_log_error,
        f"{F}.mse_loss",
        lambda f, p, t: f(p, t, variance_focus=0.0),
        lambda f, p, t: f(p.log(), t.log()),
        DEPTHS,
        note="of logarithms, at `variance_focus=0`",
    ),
    row(
        depth.log_depth_error,
        f"{F}.mse_loss",
        units,
        lambda f, p, t: f(p.log(), t.log(), reduction="none"),
        DEPTHS,
        note="of logarithms",
    ),
    row(
        depth_structure.gradient_matching_loss,
        "torch.diff",
        lambda f, p, t: units(f, p, t, scales=2),
        slopes,
        DISPARITIES,
        sizes=({"H": 4, "W": 5}, {"B": 3, "H": 7, "W": 6}),
        note="absolute differences along both axes, over the pixels, added up over the scales",
    ),
    row(
        depth_structure.edge_aware_smoothness_loss,
        "kornia.losses.inverse_depth_smoothness_loss",
        lambda f, d, i: f(d, i),
        smoothness,
        GUIDED,
    ),
    row(
        depth_structure.edge_aware_smoothness_loss,
        "kornia.losses.inverse_depth_smoothness_loss",
        lambda f, d, i: f(d, i, normalize=True),
        normalized,
        dict(disparity=draw_uniform("B H W", 0.2, 3), image=GUIDED["image"]),
        label="normalized",
        note="`normalize` divides by the mean before, as Monodepth2 does",
    ),
    row(
        depth_structure.photometric_loss,
        f"{F}.avg_pool2d",
        units,
        photometric,
        VIEWS,
        note="means over windows: the loss of Monodepth2 is made of them",
        tolerance=dict(float32=2e-4),
    ),
    row(
        depth_structure.photometric_loss,
        "skimage.metrics.structural_similarity",
        lambda f, p, t: f(p, t, alpha=1.0, reduction="none")[:, 1:-1, 1:-1],
        similarity,
        VIEWS,
        differentiate=(),
        sizes=({"H": 5, "W": 6}, {"B": 2, "C": 3, "H": 7, "W": 5}),
        note="half of 1 - SSIM at `alpha=1`; the border is mirrored about another line there",
    ),
    row(
        depth_structure.normal_cosine_loss,
        f"{F}.cosine_similarity",
        units,
        lambda f, p, t: 1 - f(p, t, dim=-1),
        NORMALS,
    ),
    row(
        depth_structure.depth_to_normals,
        "numpy.gradient",
        lambda f, z, k: f(z, k),
        normals,
        dict(depth=draw_uniform("B H W", 1, 3), camera=draw_uniform("B 3 3", 0.5, 2)),
        differentiate=(),
        note="of points back-projected by the inverse of the matrix",
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
