"""Cross-entropies, focal losses and margins against torch, optax, Keras and scikit-learn."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jaxloss import mean_over_count
from jaxloss.losses import classification, focal, margins, multilabel
from jaxloss.testing import (
    draw_binary,
    draw_labels,
    draw_log_probs,
    draw_normal,
    draw_probs,
    draw_signs,
    draw_uniform,
)
from parity.peers import Row, check, peer

REDUCTIONS = ("none", "mean", "sum")
MANY = ({"C": 1200, "T": 2},)
BINARY = dict(logits=draw_normal("B C", scale=2), labels=draw_binary("B C"))
SHARES = dict(logits=draw_normal("B C", scale=2), labels=draw_uniform("B C", 0.01, 0.99))
CLASSES = dict(logits=draw_normal("B C", scale=2), labels=draw_labels("B"))
SPATIAL = dict(logits=draw_normal("B C T", scale=2), labels=draw_labels("B T"))
DENSE = dict(logits=draw_normal("B C", scale=2), labels=draw_probs("B C"))
DENSE_SPATIAL = dict(logits=draw_normal("B C T", scale=2), labels=draw_uniform("B C T", 0, 1))
MILD = dict(logits=draw_normal("B C"), labels=draw_binary("B C"))
SCORES = dict(scores=draw_normal("B T"), labels=draw_signs("B T"))
MULTICLASS = dict(scores=draw_normal("B C"), labels=draw_labels("B"))
WEIGHTS = draw_uniform("C", 0.2, 2, kind="fixed")
bce, ce = classification.sigmoid_binary_cross_entropy, classification.softmax_cross_entropy


def torch_row(loss: Any, name: str, ours: Any, theirs: Any, draws: Any, **options: Any) -> Row:
    """A row against torch; `theirs` also gets torch's function."""
    function = peer(f"torch.nn.functional.{name}")
    options.setdefault("differentiate", (next(iter(draws)),))
    return Row(
        loss=loss.__name__,
        peer=f"torch.nn.functional.{name}",
        ours=lambda **arrays: ours(loss, **arrays),
        theirs=lambda **arrays: theirs(function, **arrays),
        draws=draws,
        **options,
    )


def direct_row(loss: Any, name: str, draws: Any, **options: Any) -> Row:
    """A row against a peer that takes the same arrays in the same order and returns units."""
    config = options.pop("config", {})
    theirs_config = options.pop("theirs_config", config)
    function = peer(name)
    return Row(
        loss=loss.__name__,
        peer=name,
        ours=lambda **arrays: loss(*arrays.values(), reduction="none", **config),
        theirs=lambda **arrays: function(*arrays.values(), **theirs_config),
        draws=draws,
        differentiate=(next(iter(draws)),),
        **options,
    )


def keras_row(loss: Any, name: str, draws: Any, **options: Any) -> Row:
    """A row against Keras, which takes the target first and averages over the last axis."""
    config, theirs_config = options.pop("config", {}), options.pop("theirs_config", {})
    mean = options.pop("mean", False)
    function = peer(f"keras.losses.{name}")

    def ours(**arrays: Any) -> Any:
        units = loss(*arrays.values(), reduction="none", **config)
        return units.mean(axis=-1) if mean else units

    def theirs(**arrays: Any) -> Any:
        prediction, target = arrays.values()
        return function(target, prediction, **theirs_config)

    return Row(
        loss=loss.__name__,
        peer=f"keras.losses.{name}",
        ours=ours,
        theirs=theirs,
        draws=draws,
        differentiate=(next(iter(draws)),),
        **options,
    )


def sklearn_row(loss: Any, name: str, ours: Any, theirs: Any, draws: Any, **options: Any) -> Row:
    function = peer(f"sklearn.metrics.{name}")
    return Row(
        loss=loss.__name__,
        peer=f"sklearn.metrics.{name}",
        ours=lambda **arrays: ours(loss, **arrays),
        theirs=lambda **arrays: theirs(function, **arrays),
        draws=draws,
        **options,
    )


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def f1_scores(function: Any, probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    average = None if probs.shape[1] > 1 else "binary"
    return 1 - function(labels, probs, average=average, zero_division=1)


def torch_binary(reduction: str) -> list[Row]:
    loss, name = bce, "binary_cross_entropy_with_logits"
    return [
        torch_row(
            loss,
            name,
            lambda f, logits, labels: f(logits, labels, reduction=reduction),
            lambda f, logits, labels: f(logits, labels, reduction=reduction),
            SHARES,
            label=f"shares, {reduction}",
            differentiate=("logits", "labels"),
        ),
        torch_row(
            loss,
            name,
            lambda f, w, **a: f(**a, pos_weight=w, reduction=reduction),
            lambda f, logits, labels, w: f(logits, labels, pos_weight=w, reduction=reduction),
            {**BINARY, "w": WEIGHTS},
            label=f"pos_weight, {reduction}",
        ),
        torch_row(
            loss,
            name,
            lambda f, w, **a: f(
                **a, weights=w, reduction=mean_over_count if reduction == "mean" else reduction
            ),
            lambda f, logits, labels, w: f(logits, labels, weight=w, reduction=reduction),
            {**BINARY, "w": draw_uniform("B C", 0.2, 2, kind="fixed")},
            label=f"weight, {reduction}",
            note="`weight` is `weights`; torch's mean divides by the count: `mean_over_count`",
        ),
    ]


def torch_cross_entropy(reduction: str) -> list[Row]:
    def weighted(f: Any, w: Any, labels: Any, **a: Any) -> Any:
        if reduction == "mean":  # torch's weighted mean counts a unit as often as its class weighs
            return f(**a, labels=labels, axis=1, weights=w[labels])
        return f(**a, labels=labels, axis=1, class_weights=w, reduction=reduction)

    rows = [
        torch_row(
            ce,
            "cross_entropy",
            lambda f, logits, labels: f(
                logits, labels, axis=1, label_smoothing=0.2, ignore_index=0, reduction=reduction
            ),
            lambda f, logits, labels: f(
                logits, labels, label_smoothing=0.2, ignore_index=0, reduction=reduction
            ),
            SPATIAL,
            label=f"smoothed and ignored, {reduction}",
            note="classes on axis 1; all labels ignored is 0, there NaN",
        ),
        torch_row(
            ce,
            "cross_entropy",
            weighted,
            lambda f, logits, labels, w: f(logits, labels, weight=w, reduction=reduction),
            {**SPATIAL, "w": WEIGHTS},
            label=f"weighted, {reduction}",
            note="`weight` is `class_weights`, its mean `weights=class_weights[labels]`",
        ),
        torch_row(
            ce,
            "cross_entropy",
            lambda f, w, **a: f(
                **a, axis=1, class_weights=w, label_smoothing=0.1, reduction=reduction
            ),
            lambda f, logits, labels, w: f(
                logits, labels, weight=w, label_smoothing=0.1, reduction=reduction
            ),
            {**DENSE_SPATIAL, "w": WEIGHTS},
            label=f"dense, weighted and smoothed, {reduction}",
            note="a dense mean divides by the count of units in both",
            differentiate=("logits", "labels"),
        ),
        torch_row(
            classification.nll_loss,
            "nll_loss",
            lambda f, log_probs, labels, w: f(
                log_probs,
                labels,
                ignore_index=0,
                **dict(weights=w[labels])
                if reduction == "mean"
                else dict(class_weights=w, reduction=reduction),
            ),
            lambda f, log_probs, labels, w: f(
                log_probs, labels, weight=w, ignore_index=0, reduction=reduction
            ),
            dict(log_probs=draw_log_probs("B C"), labels=draw_labels("B"), w=WEIGHTS),
            sizes=({}, {"B": 33, "C": 7}),
            label=f"weighted and ignored, {reduction}",
            note="`weight` is `class_weights`, its mean `weights=class_weights[labels]`",
        ),
    ]
    if reduction != "mean":
        rows.append(
            torch_row(
                ce,
                "cross_entropy",
                lambda f, logits, labels, w: f(
                    logits,
                    labels,
                    axis=1,
                    class_weights=w,
                    label_smoothing=0.2,
                    ignore_index=2,
                    reduction=reduction,
                ),
                lambda f, logits, labels, w: f(
                    logits,
                    labels,
                    weight=w,
                    label_smoothing=0.2,
                    ignore_index=2,
                    reduction=reduction,
                ),
                {**SPATIAL, "w": WEIGHTS},
                sizes=({}, {"B": 33, "C": 7, "T": 2}, *MANY),
                label=f"weighted, smoothed and ignored, {reduction}",
                note="smoothed first, then weighted, in both",
            )
        )
    return rows


def torch_margins(reduction: str) -> list[Row]:
    same = lambda f, **a: f(*a.values(), reduction=reduction)
    return [
        torch_row(
            multilabel.multilabel_soft_margin_loss,
            "multilabel_soft_margin_loss",
            lambda f, logits, labels, w: f(logits, labels, class_weights=w, reduction=reduction),
            lambda f, logits, labels, w: f(logits, labels, weight=w, reduction=reduction),
            {**BINARY, "w": WEIGHTS},
            label=f"weighted, {reduction}",
        ),
        torch_row(
            margins.soft_margin_loss,
            "soft_margin_loss",
            same,
            same,
            SCORES,
            label=reduction,
        ),
        *(
            torch_row(
                margins.multi_margin_loss,
                "multi_margin_loss",
                lambda f, scores, labels, w, p=p: f(
                    scores, labels, p=p, margin=0.7, class_weights=w, reduction=reduction
                ),
                lambda f, scores, labels, w, p=p: f(
                    scores, labels, p=p, margin=0.7, weight=w, reduction=reduction
                ),
                {**MULTICLASS, "w": WEIGHTS},
                label=f"p={p}, {reduction}",
            )
            for p in (1, 2)
        ),
    ]


def once(row: Row) -> Row:
    """Where only the reduction differs from another row, one shape will do."""
    return replace(row, sizes=({},), dtypes=("float32",))


TORCH = [
    row if reduction == "none" else once(row)
    for reduction in REDUCTIONS
    for rows in (torch_binary, torch_cross_entropy, torch_margins)
    for row in rows(reduction)
]

INTEGER_PEER = "optax.losses.softmax_cross_entropy_with_integer_labels"
OPTAX = [
    direct_row(bce, "optax.losses.sigmoid_binary_cross_entropy", SHARES),
    direct_row(ce, "optax.losses.softmax_cross_entropy", DENSE),
    direct_row(
        ce, "optax.losses.softmax_cross_entropy", DENSE, sizes=MANY, label="more than 1024 classes"
    ),
    direct_row(
        ce,
        INTEGER_PEER,
        CLASSES,
        note="a label outside the classes is NaN; there -1 wraps",
    ),
    direct_row(ce, INTEGER_PEER, CLASSES, sizes=MANY, label="more than 1024 classes"),
    direct_row(ce, INTEGER_PEER, SPATIAL, config=dict(axis=1), label="axis"),
    direct_row(focal.sigmoid_focal_loss, "optax.losses.sigmoid_focal_loss", BINARY),
    direct_row(
        focal.sigmoid_focal_loss,
        "optax.losses.sigmoid_focal_loss",
        SHARES,
        config=dict(alpha=0.25, gamma=1.5),
        label="alpha, shares",
    ),
    direct_row(
        classification.poly_loss_cross_entropy,
        "optax.losses.poly_loss_cross_entropy",
        DENSE,
        config=dict(epsilon=1.5),
    ),
    direct_row(margins.hinge_loss, "optax.losses.hinge_loss", SCORES, note="label 0 is NaN here"),
    direct_row(margins.multiclass_hinge_loss, "optax.losses.multiclass_hinge_loss", MULTICLASS),
]

LOGITS = dict(from_logits=True)
KERAS = [
    keras_row(
        bce,
        "binary_crossentropy",
        BINARY,
        config=dict(label_smoothing=0.1),
        theirs_config=dict(from_logits=True, label_smoothing=0.1),
        mean=True,
        note="the mean over the last axis",
    ),
    keras_row(
        ce,
        "categorical_crossentropy",
        DENSE,
        config=dict(label_smoothing=0.1),
        theirs_config=dict(from_logits=True, label_smoothing=0.1),
    ),
    keras_row(ce, "sparse_categorical_crossentropy", CLASSES, theirs_config=LOGITS),
    keras_row(
        ce,
        "sparse_categorical_crossentropy",
        CLASSES,
        config=dict(ignore_index=1),
        theirs_config=dict(from_logits=True, ignore_class=1),
        label="ignored",
        note="`ignore_class` is `ignore_index`",
    ),
    keras_row(
        focal.sigmoid_focal_loss,
        "binary_focal_crossentropy",
        MILD,
        config=dict(alpha=0.25, gamma=1.5),
        theirs_config=dict(from_logits=True, apply_class_balancing=True, alpha=0.25, gamma=1.5),
        mean=True,
        note="the mean over the last axis; probabilities are clipped there",
    ),
    keras_row(
        focal.softmax_focal_loss,
        "categorical_focal_crossentropy",
        dict(DENSE, logits=draw_normal("B C")),
        config=dict(gamma=1.5),
        theirs_config=dict(from_logits=True, alpha=1.0, gamma=1.5),
        note="probabilities are clipped there",
    ),
    keras_row(
        margins.squared_hinge_loss,
        "squared_hinge",
        SCORES,
        mean=True,
        note="the mean over the last axis; labels 0 are taken as -1 there",
    ),
]

SKLEARN = [
    sklearn_row(
        ce,
        "log_loss",
        lambda f, logits, labels: f(logits, labels),
        lambda f, logits, labels: f(labels, softmax(logits), labels=range(logits.shape[-1])),
        CLASSES,
        note="probabilities there, logits here",
    ),
    sklearn_row(
        bce,
        "log_loss",
        lambda f, logits, labels: f(logits, labels),
        lambda f, logits, labels: f(
            labels.ravel(), 1 / (1 + np.exp(-logits.ravel())), labels=[0, 1]
        ),
        BINARY,
        note="probabilities there, logits here",
    ),
    sklearn_row(
        margins.hinge_loss,
        "hinge_loss",
        lambda f, scores, labels: f(scores, labels),
        lambda f, scores, labels: f(labels.ravel(), scores.ravel(), labels=[-1, 1]),
        SCORES,
    ),
    sklearn_row(
        margins.multiclass_hinge_loss,
        "hinge_loss",
        lambda f, scores, labels: f(scores, labels),
        lambda f, scores, labels: f(labels, scores, labels=range(scores.shape[-1])),
        MULTICLASS,
        sizes=({}, {"B": 33, "C": 7}),
        note="from three classes on",
    ),
    sklearn_row(
        multilabel.soft_f1_loss,
        "f1_score",
        lambda f, probs, labels: f(probs, labels, reduction="none"),
        f1_scores,
        dict(probs=draw_binary("B C"), labels=draw_binary("B C")),
        note="one minus the score, `average=None` and `zero_division=1`",
    ),
]

ROWS = (*TORCH, *OPTAX, *KERAS, *SKLEARN)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
