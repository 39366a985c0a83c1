"""Handwritten digits to find on canvases: one small network, the criteria of four detectors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn import sigmoid
from jaxtyping import Array

import jaxloss

from ..detector import (
    ANCHORS,
    LEVELS,
    POINTS,
    SIDE,
    START,
    STRIDE,
    STRIDES,
    Heads,
    apply,
    binned_boxes,
    decode,
    init,
)
from ..scenes import Objects, average_precision, draw_scenes, mean_iou, middle, paste
from ..task import Criterion, Examples, Metric, Splits, Task

SHAPES = (0, 1, 4)
CANVASES = (400, 120, 120)


def load(seed: int) -> Splits:
    """Canvases of up to four digits; each part is made of other handwritten ones."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.flatnonzero(np.isin(digits, SHAPES)))
    images, labels = images[chosen] / 16, np.searchsorted(SHAPES, digits[chosen])
    parts = zip(((0, 360), (360, 450), (450, None)), CANVASES, strict=True)
    make = lambda a, b, n: Examples(*paste(images[a:b], labels[a:b], rng, n, SIDE))
    return Splits(*(make(*ends, n) for ends, n in parts))


def yolo(heads: Heads, truth: Objects) -> Any:
    """Targets from the alignment of scores and boxes."""
    assign = jax.vmap(jaxloss.task_aligned_assign, in_axes=(0, 0, None, 0, 0))
    pred = sigmoid(heads.classes), binned_boxes(heads)
    targets = assign(*pred, POINTS, truth.boxes, truth.labels, where=truth.exists)[:3]
    return jaxloss.yolo_detection_loss(heads.bins, heads.classes, POINTS, STRIDES, *targets)


def retinanet(heads: Heads, truth: Objects) -> Any:
    """One anchor per cell; the matching is inside."""
    arrays = heads.classes, heads.sides, ANCHORS, truth.boxes, truth.labels
    return jaxloss.retinanet_loss(*arrays, where=truth.exists)


def fcos(heads: Heads, truth: Objects) -> Any:
    """Targets from the points near the centre of an object."""
    assign = partial(jaxloss.fcos_assign, POINTS, STRIDES, LEVELS, ranges=((0, SIDE),))
    index = jax.vmap(lambda boxes, exists: assign(boxes, where=exists))(truth.boxes, truth.exists)
    own = lambda x, i: jnp.take_along_axis(x, i, axis=1, mode="clip")
    target = jaxloss.box_to_distances(own(truth.boxes, index[..., None]), POINTS) / STRIDE
    arrays = heads.classes, jnp.exp(heads.sides), heads.center, own(truth.labels, index), target
    return jaxloss.fcos_loss(*arrays, index >= 0)


def detr(heads: Heads, truth: Objects) -> Any:
    """One cell for each object, by the cheapest matching."""

    def match(logits: Array, pred: Array, labels: Array, boxes: Array, exists: Array) -> Array:
        cost = jaxloss.detr_match_cost(logits, pred, labels, boxes)
        return jaxloss.hungarian_match(cost, where=exists)

    logits = jnp.concatenate([heads.classes, heads.nothing], axis=-1)
    boxes = jaxloss.xyxy_to_cxcywh(truth.boxes / SIDE)
    arrays = logits, sigmoid(heads.sides + START), truth.labels, boxes
    index = jax.vmap(match)(*arrays, truth.exists)
    return jaxloss.detr_loss(*arrays, index, where=truth.exists)


CRITERIA = {
    "yolo_detection_loss": yolo,
    "retinanet_loss": retinanet,
    "fcos_loss": fcos,
    "detr_loss": detr,
}
TASK = Task(
    title="detection: up to four digits (0, 1, 4) on 48 x 48 canvases, each part with its own",
    load=load,
    init=init,
    apply=apply,
    losses={
        name: Criterion(evaluate, partial(decode, criterion=name))
        for name, evaluate in CRITERIA.items()
    },
    metrics=[
        Metric("AP@0.5", "%", partial(average_precision, classes=len(SHAPES)), True, 3.0),
        Metric("mean IoU", "%", mean_iou, True, 2.0),
    ],
    optimizer=optax.adam(2e-3),
    batch_size=32,
    steps=300,
    evaluations=10,
    predict=lambda params, inputs: decode(apply(params, inputs), "yolo_detection_loss"),
    baselines={"middle": partial(middle, side=SIDE)},
    picture=partial(draw_scenes, names=SHAPES),
)
