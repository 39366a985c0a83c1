"""Numbers written by hand, read column by column as a recogniser hears speech frame by frame."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import jaxloss

from ..strips import BLANK, FRAMES, HEIGHT, best_path, draw_readings, draw_strips, edit_distance
from ..task import Layer, Metric, Splits, Task, Tree, init_layers

CLASSES, REACH = 11, 2  # the blank and ten digits; columns seen to either side of a frame
COUNTS = (1500, 200, 300)


def load(seed: int) -> Splits:
    """Strips for training, validation and test, each of digits of its own."""
    from sklearn.datasets import load_digits

    (pixels, digits), rng = load_digits(return_X_y=True), np.random.default_rng(seed)
    parts = np.split(rng.permutation(len(digits)), (1100, 1400))
    images, digits = pixels.reshape(-1, HEIGHT, 8) / 16, np.asarray(digits)
    return Splits(
        *(draw_strips(images[p], digits[p], n, rng) for p, n in zip(parts, COUNTS, strict=True))
    )


def init(key: PRNGKeyArray) -> list[Layer]:
    """Two layers over neighbouring columns, and the logits."""
    width = 2 * REACH + 1
    return init_layers(key, [(HEIGHT * width, 48), (48 * width, 48), (48, CLASSES)])


def apply(params: list[Layer], inputs: Tree) -> Tree:
    """Logits of each frame, and which frames there are."""
    *hidden, (weight, bias) = params
    x = inputs["image"]
    for w, b in hidden:
        padded = jnp.pad(x, ((0, 0), (REACH, REACH), (0, 0)))
        near = [padded[:, i : i + FRAMES] for i in range(2 * REACH + 1)]
        x = jax.nn.relu(jnp.concatenate(near, axis=-1) @ w + b)
    return dict(logits=x @ weight + bias, length=inputs["length"])


def ctc(prediction: Tree, target: Tree, **options: Any) -> Array:
    """Labels in their order, at no known place."""
    return jaxloss.ctc_loss(
        prediction["logits"],
        target["labels"],
        lengths=prediction["length"],
        label_lengths=target["count"],
        **options,
    )


def ctc_per_label(prediction: Tree, target: Tree) -> Array:
    """Each sequence divided by its number of labels first, as torch's "mean" does."""
    return jnp.mean(ctc(prediction, target, reduction="none") / target["count"])


def even_alignment(prediction: Tree, target: Tree) -> Array:
    """Cross-entropy against labels spread evenly over the frames, as if all were equally wide."""
    length, count = prediction["length"][:, None], target["count"][:, None]
    place = jnp.minimum(jnp.arange(FRAMES) * count // length, count - 1)
    labels = jnp.take_along_axis(target["labels"], place, axis=1)
    return jaxloss.sequence_cross_entropy(prediction["logits"], labels, lengths=length[:, 0])


def known_alignment(prediction: Tree, target: Tree) -> Array:
    """Cross-entropy against what each column shows, which a real recording would not tell."""
    return jaxloss.sequence_cross_entropy(
        prediction["logits"], target["frames"], lengths=prediction["length"]
    )


def errors(prediction: Tree, target: Tree) -> Float[Array, ""]:
    """Edit distance between read and written digits, in per cent of those written."""
    inside = jnp.arange(FRAMES) < prediction["length"][:, None]
    path, new = best_path(prediction["logits"], inside)
    wrong = edit_distance(path, new, target["labels"], target["count"])
    return 100 * jnp.sum(wrong) / jnp.sum(target["count"])


def silence(inputs: Tree) -> Tree:
    """The blank everywhere: every digit is missed."""
    logits = jnp.broadcast_to(jax.nn.one_hot(BLANK, CLASSES), (*inputs["image"].shape[:2], CLASSES))
    return dict(logits=logits, length=inputs["length"])


TASK = Task(
    title="speech: strips of two to five handwritten digits, read column by column with noise",
    load=load,
    init=init,
    apply=apply,
    losses={
        "ctc_loss": ctc,
        "ctc_loss_per_label": ctc_per_label,
        "even_alignment": even_alignment,
        "known_alignment": known_alignment,
    },
    metrics=[Metric("digit error rate", "%", errors, higher_is_better=False, tolerance=2.0)],
    optimizer=optax.adam(2e-3),
    batch_size=32,
    steps=600,
    evaluations=25,
    baselines={"silence": silence},
    picture=draw_readings,
)
