"""Boxes, their losses and dense detection losses against torchvision, MONAI, kornia and torch."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from jaxloss._core.case import draw_boxes
from jaxloss.losses import box_coding, box_formats, box_scores, boxes, detection
from jaxloss.testing import Draw, draw_binary, draw_normal, draw_uniform
from parity.peers import SIZES, Row, check, peer

PAIR = dict(pred=draw_boxes("B 4"), target=draw_boxes("B 4"))
SETS = dict(a=draw_boxes("B 4"), b=draw_boxes("T 4"))
VOLUMES = dict(a=draw_boxes("B 6"), b=draw_boxes("T 6"))
VOLUME_PAIR = dict(pred=draw_boxes("B 6"), target=draw_boxes("B 6"))
ONE = dict(boxes=draw_boxes("B 4"))
DELTAS = dict(deltas=draw_normal("B 4"), anchors=draw_boxes("B 4"))
BITS = dict(logits=draw_normal("B C", scale=2), bits=draw_binary("B C"))
NONE = dict(reduction="none")
SINGLE = dict(dtypes=("float32",))
LOOSE = dict(tolerance={"float64": 1e-6})
EPS = "adds 1e-7 to the denominators"


def row(
    module: ModuleType,
    name: str,
    loss: str,
    theirs: Callable[..., Any],
    draws: dict[str, Draw],
    *,
    config: dict[str, Any] | None = None,
    plain: bool = False,
    **options: Any,
) -> Row:
    """A row in which `theirs` gets the peer's function and the arrays; `plain` has no gradient."""
    function = peer(name)
    return Row(
        loss=loss,
        peer=name,
        ours=lambda **arrays: getattr(module, loss)(*arrays.values(), **(config or {})),
        theirs=lambda **arrays: theirs(function, *arrays.values()),
        draws=draws,
        differentiate=() if plain else tuple(n for n in draws if n != "bits"),
        **options,
    )


def diagonal(f: Callable[..., Any], a: Any, b: Any) -> Any:
    return f(a, b).diagonal()


T = "torchvision.ops"
LOSSES = [
    row(
        boxes,
        f"{T}.{name}",
        ours,
        lambda f, p, t, r=reduction: f(p, t, reduction=r, eps=0),
        PAIR,
        config=dict(reduction=reduction),
        label=reduction,
        note=EPS if ours == "ciou_loss" else "`eps=0`, in place of 1e-7",
        tolerance={"float64": 1e-6} if ours == "ciou_loss" else None,
        sizes=sizes,
    )
    for name, ours in (
        ("generalized_box_iou_loss", "giou_loss"),
        ("distance_box_iou_loss", "diou_loss"),
        ("complete_box_iou_loss", "ciou_loss"),
    )
    for reduction, sizes in (("mean", ({},)), ("sum", ({},)), ("none", SIZES))
]
SCORES = [
    row(box_scores, f"{T}.box_area", "box_area", lambda f, b: f(b), ONE),
    row(box_scores, f"{T}.box_iou", "pairwise_box_iou", lambda f, a, b: f(a, b), SETS),
    row(
        box_scores,
        f"{T}.generalized_box_iou",
        "pairwise_generalized_box_iou",
        lambda f, a, b: f(a, b),
        SETS,
    ),
    row(box_scores, f"{T}.box_iou", "box_iou", diagonal, PAIR, note="all pairs"),
    row(
        box_scores,
        f"{T}.generalized_box_iou",
        "generalized_box_iou",
        diagonal,
        PAIR,
        note="all pairs",
    ),
    *(
        row(box_scores, f"{T}.{name}", name, diagonal, PAIR, note=f"all pairs; {EPS}", **LOOSE)
        for name in ("distance_box_iou", "complete_box_iou")
    ),
    row(
        boxes, f"{T}.box_iou", "iou_loss", lambda f, p, t: 1 - diagonal(f, p, t), PAIR, config=NONE
    ),
]
FORMATS = [
    row(
        box_formats,
        f"{T}.box_convert",
        f"{there}_to_{back}",
        lambda f, b, there=there, back=back: f(b, there, back),
        ONE,
        note="`in_fmt`, `out_fmt`",
    )
    for there, back in (
        ("cxcywh", "xyxy"),
        ("xyxy", "cxcywh"),
        ("xywh", "xyxy"),
        ("xyxy", "xywh"),
    )
]
CODER = "torchvision.models.detection._utils.BoxCoder"
CODING = [
    row(
        box_coding,
        CODER,
        "encode_deltas",
        lambda f, b, a: f((10.0, 10.0, 5.0, 5.0)).encode_single(b, a),
        dict(boxes=draw_boxes("B 4"), anchors=draw_boxes("B 4")),
        config=dict(scales=(10, 10, 5, 5)),
        note="`weights=` are `scales`",
    ),
    row(
        box_coding,
        CODER,
        "decode_deltas",
        lambda f, d, a: f((1.0, 1.0, 0.5, 0.5)).decode_single(d, a),
        DELTAS,
        config=dict(scales=(1.0, 1.0, 0.5, 0.5)),
        note="`weights=` are `scales`",
    ),
]
MONAI = [
    row(
        boxes,
        "monai.losses.BoxGIoULoss",
        "giou_loss",
        lambda f, p, t: f(reduction="none")(p, t),
        draws,
        config=NONE,
        label=label,
        note="boxes of six numbers" if label else "",
        **SINGLE,
    )
    for draws, label in ((PAIR, ""), (VOLUME_PAIR, "volumes"))
] + [
    row(
        box_scores,
        f"monai.data.box_utils.{name}",
        ours,
        lambda f, a, b: f(a, b),
        draws,
        label=label,
        note="boxes of six numbers" if label else "",
        **SINGLE,
    )
    for name, ours in (
        ("box_iou", "pairwise_box_iou"),
        ("box_giou", "pairwise_generalized_box_iou"),
    )
    for draws, label in ((SETS, ""), (VOLUMES, "volumes"))
]
KORNIA = [
    row(
        box_scores,
        "kornia.metrics.mean_iou_bbox",
        "pairwise_box_iou",
        lambda f, a, b: f(a, b),
        SETS,
    )
]


def two_bins(f: Callable[..., Any], logits: Any, target: Any) -> Any:
    """The two cross-entropies of the distribution focal loss."""
    lower = target.detach().floor().long()
    below, above = (f(logits, lower + k, reduction="none") for k in (0, 1))
    return (lower + 1 - target) * below + (target - lower) * above


F = "torch.nn.functional"
DENSE = [
    row(
        boxes,
        f"{F}.l1_loss",
        "box_l1_loss",
        lambda f, p, t: f(p, t, reduction="none").sum(-1),
        PAIR,
        config=NONE,
        note="`.sum(-1)`",
    ),
    row(
        detection,
        f"{F}.cross_entropy",
        "distribution_focal_loss",
        two_bins,
        dict(logits=draw_normal("B 6"), target=draw_uniform("B", 0, 4.9)),
        config=NONE,
        note="twice, once for each neighbouring bin",
    ),
    *(
        row(
            detection,
            f"{T}.sigmoid_focal_loss",
            name,
            lambda f, z, b: f(z, b, alpha=-1, gamma=1.5, reduction="none"),
            BITS,
            config={**NONE, **config},
            note="where all targets are 0 or 1",
        )
        for name, config in (
            ("quality_focal_loss", dict(beta=1.5)),
            ("gaussian_focal_loss", dict(alpha=1.5)),
        )
    ),
]
ROWS = (*LOSSES, *SCORES, *FORMATS, *CODING, *MONAI, *KORNIA, *DENSE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
