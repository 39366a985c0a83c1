"""Criteria of detectors at the size of a training step: value and gradient for the heads."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.measure import Contender, Row, compiled
from jaxloss.criteria.detection import detr_loss, retinanet_loss, yolo_detection_loss
from jaxloss.losses.box_coding import distances_to_box, grid_points
from jaxloss.losses.detection import expected_bin
from jaxloss.losses.matching import detr_match_cost, hungarian_match, task_aligned_assign
from parity.peers import require_peer

Arrays = tuple[Any, ...]
IMAGES, OBJECTS, CLASSES, BINS = 8, 40, 80, 16
POINTS, STRIDES = grid_points([(80, 80), (40, 40), (20, 20)], [8, 16, 32])


def objects(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes in 640 by 640 pixels, labels, and which exist."""
    low = generator.uniform(0, 500, (IMAGES, OBJECTS, 2))
    boxes = np.concatenate([low, low + generator.uniform(10, 140, low.shape)], axis=-1)
    labels = generator.integers(0, CLASSES, (IMAGES, OBJECTS), np.int32)
    return boxes.astype(np.float32), labels, generator.random((IMAGES, OBJECTS)) < 0.5


def draw_yolo(generator: np.random.Generator) -> Arrays:
    shape = (IMAGES, len(POINTS))
    box_logits = generator.standard_normal((*shape, 4, BINS), np.float32)
    class_logits = generator.standard_normal((*shape, CLASSES), np.float32) - 4
    return box_logits, class_logits, *objects(generator)


def assign(box_logits: Any, class_logits: Any, boxes: Any, labels: Any, exists: Any) -> Arrays:
    pred = distances_to_box(expected_bin(box_logits) * STRIDES[:, None], POINTS)
    run = jax.vmap(task_aligned_assign, in_axes=(0, 0, None, 0, 0))
    return run(jax.nn.sigmoid(class_logits), pred, POINTS, boxes, labels, where=exists)[:3]


def yolo(box_logits: Any, class_logits: Any, *targets: Any) -> Any:
    arrays = box_logits, class_logits, POINTS, STRIDES, *targets
    return yolo_detection_loss(*arrays)[0]


def yolo_from_boxes(box_logits: Any, class_logits: Any, *truth: Any) -> Any:
    return yolo(box_logits, class_logits, *assign(box_logits, class_logits, *truth))


def torch_yolo(box_logits: Any, class_logits: Any, boxes: Any, scores: Any, fg: Any) -> Any:
    """The v8 criterion on a given assignment, gathering the foreground as ultralytics does."""
    points, strides = (torch.tensor(np.asarray(x)) for x in (POINTS, STRIDES[:, None]))
    total, anchor, true = max(scores.sum(), 1), points / strides, boxes / strides
    cls = F.binary_cross_entropy_with_logits(class_logits, scores, reduction="sum") / total
    d = box_logits.softmax(-1).matmul(torch.arange(BINS, dtype=torch.float))
    a, b = torch.cat([anchor - d[..., :2], anchor + d[..., 2:]], -1)[fg], true[fg]
    weight = scores.sum(-1)[fg]
    size, size_ref = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    inner = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    inter = inner.clamp(0).prod(-1)
    iou = inter / (size.prod(-1) + size_ref.prod(-1) - inter + 1e-7)
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    rho = (b[:, :2] + b[:, 2:] - a[:, :2] - a[:, 2:]).pow(2).sum(-1) / 4
    angle = lambda s: torch.atan(s[:, 0] / (s[:, 1] + 1e-7))
    v = (4 / torch.pi**2) * (angle(size_ref) - angle(size)).pow(2)
    with torch.no_grad():
        alpha = v / (v - iou + (1 + 1e-7))
    ciou = iou - rho / (hull.pow(2).sum(-1) + 1e-7) - v * alpha
    y = torch.cat([anchor - true[..., :2], true[..., 2:] - anchor], -1)
    y, logits = y.clamp(0, BINS - 1.01)[fg].reshape(-1), box_logits[fg].reshape(-1, BINS)
    left, ce = y.long(), partial(F.cross_entropy, logits, reduction="none")
    dfl = (ce(left) * (left + 1 - y) + ce(left + 1) * (y - left)).reshape(-1, 4).mean(-1)
    boxes_term, bins_term = ((1 - ciou) * weight).sum(), (dfl * weight).sum()
    return 7.5 * boxes_term / total + 0.5 * cls + 1.5 * bins_term / total


def torch_step(loss: Callable[..., Any], predictions: Arrays, *rest: Any) -> Contender:
    tensors = [torch.tensor(np.asarray(x), requires_grad=True) for x in predictions]
    others = [torch.tensor(np.asarray(x)) for x in rest]
    return Contender(lambda: torch.autograd.grad(loss(*tensors, *others), tensors))


def given(box_logits: Any, class_logits: Any, *truth: Any) -> Mapping[str, Contender]:
    targets = jax.jit(assign)(box_logits, class_logits, *truth)
    step = jax.value_and_grad(yolo, (0, 1))
    return {
        "jaxloss": compiled(step, box_logits, class_logits, *targets),
        "torch, ultralytics' form": torch_step(torch_yolo, (box_logits, class_logits), *targets),
    }


def whole(*arrays: Any) -> Mapping[str, Contender]:
    return {"jaxloss": compiled(jax.value_and_grad(yolo_from_boxes, (0, 1)), *arrays)}


def draw_retinanet(generator: np.random.Generator) -> Arrays:
    points, strides = (np.asarray(x) for x in grid_points([(40, 40), (20, 20)], [16, 32]))
    half = np.array([[2, 2], [1.4, 2.8], [2.8, 1.4]]) * strides[:, None, None]
    anchors = np.concatenate([points[:, None] - half, points[:, None] + half], axis=-1)
    anchors = anchors.reshape(-1, 4).astype(np.float32)
    shape = (IMAGES, len(anchors))
    class_logits = generator.standard_normal((*shape, CLASSES), np.float32) - 4
    deltas = generator.standard_normal((*shape, 4), np.float32)
    return class_logits, deltas, anchors, *objects(generator)


def retinanet(class_logits: Any, deltas: Any, anchors: Any, *truth: Any) -> Any:
    boxes, labels, exists = truth
    return retinanet_loss(class_logits, deltas, anchors, boxes, labels, where=exists)[0]


def against_torchvision(*arrays: Any) -> Mapping[str, Contender]:
    require_peer("torchvision")
    retina = importlib.import_module("torchvision.models.detection.retinanet")
    head = retina.RetinaNetHead(8, 1, CLASSES)
    matcher = retina.det_utils.Matcher(0.5, 0.4, allow_low_quality_matches=True)
    class_logits, deltas, anchors, boxes, labels, exists = arrays
    anchor = torch.tensor(anchors)
    targets = [
        dict(boxes=torch.tensor(b[w]), labels=torch.tensor(y[w]).long())
        for b, y, w in zip(boxes, labels, exists, strict=True)
    ]

    def theirs(class_logits: Any, deltas: Any) -> Any:
        index = [matcher(retina.box_ops.box_iou(t["boxes"], anchor)) for t in targets]
        outputs = dict(cls_logits=class_logits, bbox_regression=deltas)
        return sum(head.compute_loss(targets, outputs, [anchor] * IMAGES, index).values())

    return {
        "jaxloss": compiled(jax.value_and_grad(retinanet, (0, 1)), *arrays),
        "torchvision": torch_step(theirs, (class_logits, deltas)),
    }


def draw_detr(generator: np.random.Generator) -> Arrays:
    logits = generator.standard_normal((IMAGES, 100, CLASSES + 1), np.float32)
    boxes, labels, exists = objects(generator)
    pred = generator.uniform(0.05, 0.95, (IMAGES, 100, 4)).astype(np.float32)
    return logits, pred, labels, boxes / 640, exists


def detr(logits: Any, pred: Any, labels: Any, boxes: Any, exists: Any) -> Any:
    def match(logits: Any, pred: Any, labels: Any, boxes: Any, exists: Any) -> Any:
        return hungarian_match(detr_match_cost(logits, pred, labels, boxes), where=exists)

    found = jax.vmap(match)(logits, pred, labels, boxes, exists)
    return detr_loss(logits, pred, labels, boxes, found, where=exists)[0]


def matching(logits: Any, pred: Any, labels: Any, boxes: Any, exists: Any) -> Any:
    from scipy.optimize import linear_sum_assignment

    costs = np.asarray(jax.vmap(detr_match_cost)(logits, pred, labels, boxes))
    run = jax.vmap(lambda cost, exists: hungarian_match(cost, where=exists))
    kept = [cost[:, w] for cost, w in zip(costs, exists, strict=True)]
    return {
        "jaxloss": compiled(run, jnp.asarray(costs), exists),
        "scipy, without padding": Contender(lambda: [linear_sum_assignment(c) for c in kept]),
    }


def detr_step(*arrays: Any) -> Mapping[str, Contender]:
    return {"jaxloss": compiled(jax.value_and_grad(detr, (0, 1)), *arrays)}


SHAPE = f"{IMAGES} x {len(POINTS)} x (4 x {BINS} + {CLASSES})"
ROWS = (
    Row("yolo_loss", SHAPE, draw_yolo, given, {"torch, ultralytics' form": 1.0}, 6),
    Row("yolo_with_assignment", SHAPE, draw_yolo, whole, {}, 6),
    Row(
        "retinanet_loss",
        f"{IMAGES} x 6000 x {CLASSES}",
        draw_retinanet,
        against_torchvision,
        {"torchvision": 1.0},
        6,
    ),
    Row("hungarian_match", f"{IMAGES} x 100 x {OBJECTS}", draw_detr, matching, {}, 3),
    Row("detr_with_matching", f"{IMAGES} x 100 x {CLASSES}", draw_detr, detr_step, {}, 3),
)
