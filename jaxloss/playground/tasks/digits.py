"""Handwritten digits of which many carry a wrong label: which loss does not learn them by heart?"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import jaxloss

from ..task import Examples, Metric, Splits, Task, apply_mlp, init_mlp, split

WRONG = 0.4
CLASSES = 10


def load(seed: int) -> Splits:
    """8 x 8 images in `[0, 1]`; two in five training labels are another class, drawn uniformly."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    train, *clean = split(Examples(images, labels), (1000, 397, 400), rng)
    wrong = rng.permutation(len(train.target)) < WRONG * len(train.target)
    other = (train.target + rng.integers(1, CLASSES, len(wrong))) % CLASSES
    return Splits(train._replace(target=np.where(wrong, other, train.target)), *clean)


def accuracy(logits: Float[Array, "n c"], labels: Int[Array, " n"]) -> Float[Array, ""]:
    """Share of right answers, in per cent."""
    return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def draw_answers(figure: Any, predictions: Mapping[str, Array], test: Examples) -> None:
    """Test digits on which the losses disagree most, and what each loss made of them."""
    answers = np.stack([np.argmax(logits, axis=-1) for logits in predictions.values()])
    right = answers == np.asarray(test.target)
    shown = np.argsort(np.abs(right.mean(axis=0) - 0.5), kind="stable")[:34]
    axes = figure.subplots()
    for column, i in enumerate(shown):
        box = (column - 0.45, column + 0.45, -0.55, -1.45)
        axes.imshow(np.reshape(test.inputs[i], (8, 8)), cmap="gray_r", extent=box, aspect="equal")
        for row in range(len(answers)):
            color, weight = ("tab:green", "normal") if right[row, i] else ("tab:red", "bold")
            style = {"color": color, "weight": weight, "ha": "center", "va": "center"}
            axes.text(column, row, str(answers[row, i]), **style)
    axes.set(xlim=(-0.5, len(shown) - 0.5), ylim=(len(answers) - 0.5, -1.5), xticks=[])
    axes.set_yticks(range(len(answers)), list(predictions))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(
        "Test digits of the first run on which losses disagree: right in green, wrong in red"
    )


TASK = Task(
    title="digits: 8 x 8 images, 40 % of the training labels wrong, validation and test clean",
    load=load,
    init=partial(init_mlp, sizes=(64, 128, CLASSES)),
    apply=apply_mlp,
    losses={
        "softmax_cross_entropy": jaxloss.softmax_cross_entropy,
        "label_smoothing": partial(jaxloss.softmax_cross_entropy, label_smoothing=0.1),
        "softmax_focal_loss": jaxloss.softmax_focal_loss,
        "generalized_cross_entropy": jaxloss.generalized_cross_entropy,
        "symmetric_cross_entropy": jaxloss.symmetric_cross_entropy,
        "bi_tempered_logistic_loss": partial(jaxloss.bi_tempered_logistic_loss, t1=0.8, t2=1.2),
    },
    metrics=[Metric("accuracy", "%", accuracy, higher_is_better=True, tolerance=1.0)],
    optimizer=optax.adam(2e-3),
    batch_size=128,
    steps=1000,
    picture=draw_answers,
)
