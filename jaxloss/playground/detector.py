"""A small detector for canvases of digits: the network, and boxes from what it says."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import sigmoid
from jaxtyping import Array, Float, PRNGKeyArray

from jaxloss import cxcywh_to_xyxy, decode_deltas, distances_to_box, expected_bin, pairwise_box_iou

from .scenes import Detections
from .task import Layer, convolve, init_layers

SIDE, STRIDE, CLASSES, BINS = 48, 8, 3, 4
CELLS = (SIDE // STRIDE) ** 2
GRID = np.stack(np.meshgrid(*[np.arange(SIDE // STRIDE)] * 2), axis=-1).reshape(-1, 2)
# NumPy arrays, since nothing here may ask for a device at import.
POINTS: Any = ((GRID + 0.5) * STRIDE).astype(np.float32)
STRIDES: Any = np.full(CELLS, STRIDE, np.float32)
LEVELS: Any = np.zeros(CELLS, np.int32)
HALF = np.array([5, 7], np.float32)
ANCHORS: Any = np.concatenate([POINTS - HALF, POINTS + HALF], axis=1)
NEAR = np.log(POINTS / (SIDE - POINTS))
START = np.concatenate([NEAR, np.full_like(NEAR, -1.3)], axis=1)  # logits of (cx, cy, w, h)


class Heads(NamedTuple):
    """What the network says in each cell; each criterion reads a box in its own way."""

    bins: Float[Array, "n cells 4 bins"]
    classes: Float[Array, "n cells classes"]
    nothing: Float[Array, "n cells 1"]
    center: Float[Array, "n cells"]

    @property
    def sides(self) -> Float[Array, "n cells 4"]:
        """Four numbers for those who do without bins."""
        return self.bins[..., 0]


def init(key: PRNGKeyArray) -> list[Layer]:
    """Three convolutions and the heads; classes begin improbable, as Lin et al. (2017) do."""
    outputs = 4 * BINS + CLASSES + 2
    *hidden, (weight, bias) = init_layers(key, [(144, 48), (432, 64), (576, 64), (64, outputs)])
    return [*hidden, (0.3 * weight, bias.at[4 * BINS : 4 * BINS + CLASSES].set(-3))]


def apply(params: Any, canvases: Float[Array, "n side side"]) -> Heads:
    """Patches of 4 x 4 pixels, a convolution, cells pooled by four, two more convolutions."""
    n, cells = len(canvases), SIDE // 4
    first, second, third, (weight, bias) = params
    x = canvases.reshape(n, cells, 4, cells, 4).swapaxes(2, 3).reshape(n, cells, cells, 16)
    x = jax.nn.relu(convolve(first, x - 0.3))
    x = x.reshape(n, cells // 2, 2, cells // 2, 2, -1).max((2, 4))
    x = jax.nn.relu(convolve(third, jax.nn.relu(convolve(second, x))))
    out = (x @ weight + bias).reshape(n, CELLS, -1)
    ends = np.cumsum([4 * BINS, CLASSES, 1])
    bins, classes, nothing, center = jnp.split(out, ends, axis=-1)
    return Heads(bins.reshape(n, CELLS, 4, BINS), classes, nothing, center[..., 0])


def binned_boxes(heads: Heads) -> Array:
    """Distances to the sides as expectations over bins."""
    return distances_to_box(STRIDE * expected_bin(heads.bins), POINTS)


def decode(heads: Heads, criterion: str) -> Detections:
    """The boxes that the network means if trained by this criterion."""
    probs = sigmoid(heads.classes)
    if criterion == "yolo_detection_loss":
        return _detect(binned_boxes(heads), probs)
    if criterion == "retinanet_loss":
        return _detect(decode_deltas(heads.sides, ANCHORS), probs)
    if criterion == "fcos_loss":
        boxes = distances_to_box(STRIDE * jnp.exp(heads.sides), POINTS)
        return _detect(boxes, jnp.sqrt(probs * sigmoid(heads.center)[..., None]))
    probs = jax.nn.softmax(jnp.concatenate([heads.classes, heads.nothing], axis=-1))
    boxes = SIDE * cxcywh_to_xyxy(sigmoid(heads.sides + START))
    return _detect(boxes, probs[..., :CLASSES], unique=True)


def _detect(boxes: Array, probs: Array, *, unique: bool = False, most: int = 8) -> Detections:
    """The most confident boxes of each canvas, without repetitions unless they are `unique`."""

    def choose(boxes: Array, probs: Array) -> Detections:
        found = Detections(boxes, jnp.argmax(probs, axis=-1), jnp.max(probs, axis=-1))
        found = found if unique else _suppress(found)
        order = jax.lax.top_k(found.scores, most)[1]
        return Detections(*(x[order] for x in found))

    return jax.vmap(choose)(boxes, probs)


def _suppress(found: Detections, overlap: float = 0.5) -> Detections:
    """Greedy non-maximum suppression: what repeats a better box of its class scores 0."""
    order = jnp.argsort(-found.scores)
    found = Detections(*(x[order] for x in found))
    place = jnp.arange(len(order))
    repeats = (found.labels[:, None] == found.labels) & (place[:, None] < place)
    repeats &= pairwise_box_iou(found.boxes, found.boxes) > overlap
    drop = lambda i, kept: kept & ~(kept[i] & repeats[i])
    kept = jax.lax.fori_loop(0, len(order), drop, place >= 0)
    return found._replace(scores=jnp.where(kept, found.scores, 0))
