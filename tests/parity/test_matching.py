"""Assigners, the matcher and the criteria of detectors against torchvision, scipy and torch."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.criteria.detection import detr_loss, fcos_loss, retinanet_loss, yolo_detection_loss
from jaxloss.losses.box_coding import box_to_distances, grid_points
from jaxloss.losses.matching import fcos_assign, hungarian_match, max_iou_assign
from jaxloss.testing import Draw, draw_labels, draw_normal, draw_uniform
from parity.peers import Row, check, peer

DETECTION = "torchvision.models.detection"
POINTS, STRIDES = (np.asarray(x) for x in grid_points([(6, 6), (3, 3)], [8, 16]))
P, BINS = len(POINTS), 6
SIZES: tuple[dict[str, int], ...] = (
    {"N": 60, "P": P, "T": 5, "C": 3},
    {"N": 30, "P": P, "T": 1, "C": 2, "B": 2},
)


def draw_objects(dims: str, high: float = 40) -> Draw:
    """Boxes of every size in a frame of 48 by 48."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        low = g.uniform(0, 36, (*shape[:-1], 2))
        return np.concatenate([low, low + g.uniform(4, high, low.shape)], axis=-1)

    return Draw(dims, sample, "fixed")


def draw_foreground(dims: str) -> Draw:
    return Draw(dims, lambda g, shape, _: g.random(shape) < 0.4, "fixed")


def draw_match(dims: str) -> Draw:
    """A different query of each image for each object."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        return np.stack([g.permutation(12)[: shape[1]] for _ in range(shape[0])]).astype(np.int32)

    return Draw(dims, sample, "fixed")


def index_of(anchors: Any, boxes: Any, **options: Any) -> Any:
    return 1.0 * max_iou_assign(anchors, boxes, **options)  # the harness differentiates numbers


def matched(anchors: Any, boxes: Any, high: float, low: float, *, forced: bool = True) -> Any:
    """What torchvision's `Matcher` says of one image."""
    iou = peer("torchvision.ops.boxes.box_iou")(boxes, anchors)
    return peer(f"{DETECTION}._utils.Matcher")(high, low, allow_low_quality_matches=forced)(iou)


def ssd_matched(anchors: Any, boxes: Any) -> Any:
    iou = peer("torchvision.ops.boxes.box_iou")(boxes, anchors)
    return peer(f"{DETECTION}._utils.SSDMatcher")(0.5)(iou)


def scipy_price(cost: Any) -> Any:
    return cost[peer("scipy.optimize.linear_sum_assignment")(cost)].sum()


def price(cost: Any) -> Any:
    rows = hungarian_match(cost)
    taken = jnp.take_along_axis(cost, rows[None], axis=0, mode="clip")[0]
    return jnp.sum(jnp.where(rows >= 0, taken, 0))


def torch_retinanet(class_logits: Any, deltas: Any, anchors: Any, boxes: Any, labels: Any) -> Any:
    head = peer(f"{DETECTION}.retinanet.RetinaNetHead")(8, 1, class_logits.shape[-1])
    targets = [dict(boxes=b, labels=y) for b, y in zip(boxes, labels, strict=True)]
    index = [matched(anchors, b, 0.5, 0.4) for b in boxes]
    outputs = dict(cls_logits=class_logits, bbox_regression=deltas)
    return sum(head.compute_loss(targets, outputs, [anchors] * len(boxes), index).values())


def retinanet(class_logits: Any, deltas: Any, anchors: Any, boxes: Any, labels: Any) -> Any:
    def one(*arrays: Any) -> Any:
        class_logits, deltas, boxes, labels = (a[None] for a in arrays)
        return retinanet_loss(class_logits, deltas, anchors, boxes, labels, beta=0.0)[0]

    return jnp.mean(jax.vmap(one)(class_logits, deltas, boxes, labels))


def torch_fcos(
    class_logits: Any, distances: Any, centerness_logits: Any, boxes: Any, labels: Any
) -> Any:
    import torch

    points, half = (torch.tensor(x, dtype=boxes.dtype) for x in (POINTS, STRIDES[:, None] / 2))
    anchors = [torch.cat([points - half, points + half], dim=1)] * len(boxes)
    outputs = dict(
        cls_logits=class_logits,
        bbox_regression=distances,
        bbox_ctrness=centerness_logits[..., None],
    )
    head = peer(f"{DETECTION}.fcos.FCOSHead")(32, 1, class_logits.shape[-1])
    model = SimpleNamespace(center_sampling_radius=1.5, head=head)
    targets = [dict(boxes=b, labels=y) for b, y in zip(boxes, labels, strict=True)]
    run = peer(f"{DETECTION}.fcos.FCOS.compute_loss")
    return sum(run(model, targets, outputs, anchors, [36, 9]).values())


def fcos(class_logits: Any, distances: Any, centerness_logits: Any, boxes: Any, labels: Any) -> Any:
    levels = jnp.repeat(jnp.arange(2), np.array([36, 9]), total_repeat_length=P)
    assign = partial(fcos_assign, ranges=((0, 64), (64, np.inf)))
    index = jax.vmap(lambda b: assign(POINTS, STRIDES, levels, b))(boxes)
    found = jnp.take_along_axis(boxes, index[..., None], axis=1, mode="clip")
    target = box_to_distances(found, POINTS) / STRIDES[:, None]
    own = jnp.take_along_axis(labels, index, axis=1, mode="clip")
    arrays = class_logits, distances, centerness_logits, own, target, index >= 0
    return fcos_loss(*arrays, weight_by_centerness=False)[0]


ROWS = (
    *(
        Row(
            "max_iou_assign",
            f"{DETECTION}._utils.Matcher",
            partial(index_of, **options),
            partial(matched, **theirs),
            dict(anchors=draw_objects("N 4"), boxes=draw_objects("T 4")),
            note,
            sizes=SIZES,
            label=label,
        )
        for label, options, theirs, note in (
            ("forced", {}, dict(high=0.5, low=0.4), "IoU matrix in, `allow_low_quality_matches`"),
            (
                "bounds",
                dict(positive=0.7, negative=0.3, force_match=False),
                dict(high=0.7, low=0.3, forced=False),
                "IoU matrix in",
            ),
        )
    ),
    Row(
        "max_iou_assign",
        f"{DETECTION}._utils.SSDMatcher",
        partial(index_of, positive=0.5, negative=0.5, reassign=True),
        ssd_matched,
        dict(anchors=draw_objects("N 4"), boxes=draw_objects("T 4")),
        "IoU matrix in; `positive=negative=0.5, reassign=True`",
        sizes=SIZES,
    ),
    Row(
        "hungarian_match",
        "scipy.optimize.linear_sum_assignment",
        price,
        scipy_price,
        dict(cost=draw_normal("N T")),
        "total cost compared; rows of targets here, pairs there",
        sizes=(*SIZES, {"N": 3, "T": 7}),
    ),
    Row(
        "retinanet_loss",
        f"{DETECTION}.retinanet.RetinaNetHead",
        retinanet,
        torch_retinanet,
        dict(
            class_logits=draw_normal("B N C"),
            deltas=draw_normal("B N 4"),
            anchors=draw_objects("N 4"),
            boxes=draw_objects("B T 4"),
            labels=draw_labels("B T"),
        ),
        "`compute_loss` after `Matcher(0.5, 0.4, True)`: `beta=0`, mean of single images",
        differentiate=("class_logits", "deltas"),
        sizes=SIZES,
    ),
    Row(
        "fcos_loss",
        f"{DETECTION}.fcos.FCOS",
        fcos,
        torch_fcos,
        dict(
            class_logits=draw_normal("B P C"),
            distances=draw_uniform("B P 4", 0.2, 3),
            centerness_logits=draw_normal("B P"),
            boxes=draw_objects("B T 4"),
            labels=draw_labels("B T"),
        ),
        "`compute_loss`, assignment included: `fcos_assign`, `weight_by_centerness=False`; areas"
        " within 8 tie there in float32, and 1e-7 is added to denominators",
        differentiate=("class_logits", "distances", "centerness_logits"),
        sizes=SIZES,
        dtypes=("float64",),
        tolerance={"float64": 1e-8},
    ),
)


# Peers that cannot be installed, restated with torch's own parts


def torch_detr(logits: Any, pred_boxes: Any, labels: Any, boxes: Any, match: Any) -> Any:
    """SetCriterion of facebookresearch/detr, with losses labels and boxes."""
    import torch

    corners = lambda b: torch.cat([b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2], -1)
    classes = logits.shape[-1] - 1
    rows = torch.arange(len(logits))[:, None].expand_as(match)
    truth = torch.full(logits.shape[:2], classes)
    truth[rows, match] = labels
    weight = torch.ones(classes + 1, dtype=logits.dtype)
    weight[-1] = 0.1
    cls = torch.nn.functional.cross_entropy(logits.transpose(1, 2), truth, weight)
    pred = pred_boxes[rows, match].reshape(-1, 4)
    true = boxes.reshape(-1, 4)
    pairs = peer("torchvision.ops.boxes.generalized_box_iou")(corners(pred), corners(true))
    l1 = torch.nn.functional.l1_loss(pred, true, reduction="none").sum() / len(true)
    return cls + 5 * l1 + 2 * (1 - torch.diag(pairs)).sum() / len(true)


def torch_yolo(box_logits: Any, class_logits: Any, boxes: Any, scores: Any, foreground: Any) -> Any:
    """v8DetectionLoss on a given assignment, with its 1e-7 and its clamps."""
    import torch
    import torch.nn.functional as F

    points, strides = (torch.tensor(x, dtype=boxes.dtype) for x in (POINTS, STRIDES[:, None]))
    scores = scores * foreground[..., None]
    total = max(scores.sum(), 1)
    cls = F.binary_cross_entropy_with_logits(class_logits, scores, reduction="none").sum() / total
    anchor = points / strides
    d = box_logits.softmax(-1) @ torch.arange(BINS, dtype=boxes.dtype)
    pred = torch.cat([anchor - d[..., :2], anchor + d[..., 2:]], -1)
    true = boxes / strides
    weight = scores.sum(-1)[foreground]
    a, b = pred[foreground], true[foreground]
    (w1, h1), (w2, h2) = ((c[:, 2:] - c[:, :2] + torch.tensor([0, 1e-7])).T for c in (a, b))
    inner = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    inter = inner.clamp(0).prod(-1)
    iou = inter / (w1 * h1 + w2 * h2 - inter + 1e-7)
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    rho = ((b[:, :2] + b[:, 2:] - a[:, :2] - a[:, 2:]) ** 2).sum(-1) / 4
    v = (4 / torch.pi**2) * (torch.atan(w2 / h2) - torch.atan(w1 / h1)).pow(2)
    with torch.no_grad():
        alpha = v / (v - iou + (1 + 1e-7))
    ciou = iou - (rho / (hull.pow(2).sum(-1) + 1e-7) + v * alpha)
    box = ((1 - ciou) * weight).sum() / total
    y = torch.cat([anchor - true[..., :2], true[..., 2:] - anchor], -1).clamp(0, BINS - 1.01)
    y, logits = y[foreground].reshape(-1), box_logits[foreground].reshape(-1, BINS)
    left = y.long()
    ce = partial(F.cross_entropy, logits, reduction="none")
    dfl = (ce(left) * (left + 1 - y) + ce(left + 1) * (y - left)).reshape(-1, 4).mean(-1)
    return 7.5 * box + 0.5 * cls + 1.5 * (dfl * weight).sum() / total


def yolo(box_logits: Any, class_logits: Any, boxes: Any, scores: Any, foreground: Any) -> Any:
    scores = jnp.where(foreground[..., None], scores, 0)
    return yolo_detection_loss(
        box_logits, class_logits, POINTS, STRIDES, boxes, scores, foreground
    )[0]


RESTATED = (
    Row(
        "detr_loss",
        "torchvision.SetCriterion",
        lambda **arrays: detr_loss(*arrays.values())[0],
        torch_detr,
        dict(
            logits=draw_normal("B 12 5"),
            pred_boxes=draw_uniform("B 12 4", 0.1, 0.9),
            labels=draw_labels("B T"),
            boxes=draw_uniform("B T 4", 0.1, 0.9, kind="fixed"),
            match=draw_match("B T"),
        ),
        differentiate=("logits", "pred_boxes"),
        sizes=SIZES,
    ),
    Row(
        "yolo_detection_loss",
        "torch.v8DetectionLoss",
        yolo,
        torch_yolo,
        dict(
            box_logits=draw_normal(f"B P 4 {BINS}"),
            class_logits=draw_normal("B P C"),
            boxes=draw_objects("B P 4"),
            scores=draw_uniform("B P C", 0, 1, kind="fixed"),
            foreground=draw_foreground("B P"),
        ),
        differentiate=("box_logits", "class_logits"),
        sizes=SIZES,
        tolerance={"float64": 1e-6},  # the 1e-7 in its denominators
    ),
)


@pytest.mark.parametrize("row", [*ROWS, *RESTATED], ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
