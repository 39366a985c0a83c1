"""The canvases of the detection task, and the numbers by which detectors are compared."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.playground import tasks
from jaxloss.playground.detector import ANCHORS, CELLS, POINTS, Heads, decode
from jaxloss.playground.scenes import Detections, Objects, average_precision, mean_iou, middle

BOXES = jnp.array([[[0.0, 0, 10, 10], [20, 20, 30, 40]], [[5, 5, 9, 9], [0, 0, 0, 0]]])
TRUTH = Objects(BOXES, jnp.array([[0, 1], [1, 0]]), jnp.array([[True, True], [True, False]]))


def found(boxes=BOXES, labels=TRUTH.labels, scores=((0.9, 0.8), (0.7, 0.0))):
    return Detections(jnp.asarray(boxes), jnp.asarray(labels), jnp.asarray(scores))


precision = lambda detections: float(average_precision(detections, TRUTH, classes=2))


def test_perfect_detections_score_a_hundred() -> None:
    assert precision(found()) == 100
    assert float(mean_iou(found(), TRUTH)) == pytest.approx(100)


def test_no_detection_scores_nothing() -> None:
    assert precision(found(scores=np.zeros((2, 2)))) == 0
    assert precision(found(boxes=BOXES + 100)) == 0
    assert float(mean_iou(found(boxes=BOXES + 100), TRUTH)) == 0


def test_a_wrong_class_costs_precision_but_no_overlap() -> None:
    wrong = found(labels=[[0, 0], [1, 0]])
    assert precision(wrong) == pytest.approx((100 + 50) / 2)  # the second of two ones is missed
    assert float(mean_iou(wrong, TRUTH)) == pytest.approx(100)


def test_an_object_counts_once_and_confident_mistakes_cost_more() -> None:
    twice = np.asarray(BOXES)[:, [0, 0, 1]]
    labels = np.array([[0, 0, 1], [1, 1, 0]])
    repeated = found(twice, labels, [[0.9, 0.8, 0.7], [0.65, 0.6, 0.0]])
    assert precision(repeated) == 100  # all repetitions come after all that is right
    elsewhere = np.stack([twice[0], twice[1] + [[50], [0], [0]]])
    late = found(elsewhere, labels, [[0.9, 0.8, 0.7], [0.65, 0.6, 0.0]])
    assert precision(late) == pytest.approx((100 + (100 + 200 / 3) / 2) / 2)  # right, wrong, right
    early = found(elsewhere, labels, [[0.9, 0.8, 0.7], [0.75, 0.6, 0.0]])
    assert precision(early) == pytest.approx((100 + 200 / 3) / 2)  # wrong, right, right


def test_the_middle_box_is_what_one_gets_without_looking() -> None:
    box = middle(jnp.zeros((3, 48, 48)), 48)
    np.testing.assert_array_equal(box.boxes[0, 0], [20, 17, 28, 31])


def test_boxes_are_what_the_ink_covers_and_lie_on_the_canvas() -> None:
    canvases, truth = tasks.find("detection").load(0).train
    assert set(truth.exists.sum(axis=1)) == {0, 1, 2, 3, 4}
    assert set(truth.labels.ravel()) == {0, 1, 2}
    for canvas, boxes, exists in zip(canvases[:40], truth.boxes, truth.exists, strict=False):
        ink = canvas > 0.25
        for x0, y0, x1, y1 in boxes[exists].astype(int):
            assert 0 <= x0 < x1 <= 48
            assert 0 <= y0 < y1 <= 48
            assert ink[y0:y1, x0:x1].mean() > 0.2
            ink[y0:y1, x0:x1] = False
        assert not ink.any()  # no ink outside of the boxes


@pytest.mark.parametrize("criterion", tasks.find("detection").losses)
def test_a_confident_cell_becomes_one_box_around_it(criterion) -> None:
    classes = jnp.full((1, CELLS, 3), -9.0).at[0, 14, 1].set(9.0).at[0, 15, 1].set(5.0)
    zeros = jnp.zeros((1, CELLS, 1))
    bins = jnp.zeros((1, CELLS, 4, 4)).at[..., 3].set(9)
    heads = Heads(bins, classes, zeros, zeros[..., 0] + 9)
    best = decode(heads, criterion)
    assert best.labels[0, 0] == 1
    assert best.scores[0, 0] > 0.99
    low, high = best.boxes[0, 0, :2], best.boxes[0, 0, 2:]
    np.testing.assert_allclose((low + high) / 2, POINTS[14], rtol=1e-5)
    if criterion == "retinanet_loss":
        np.testing.assert_allclose(best.boxes[0, 0], ANCHORS[14], rtol=1e-6)
    if criterion == "yolo_detection_loss":  # the neighbour repeats it: IoU 40 / 56
        assert best.scores[0, 1] < 0.1
