"""Digits of classes never trained on: whose nearest neighbours are of their own class?"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import jaxloss

from .. import embeddings
from ..task import Examples, Metric, Splits, Task, Tree, convolve, init_layers
from ..views import distorted

KNOWN, FEATURES = 6, 32  # classes to train on, of ten; width of an embedding
COUNTS = {True: (120, 25, 25), False: (0, 70, 100)}  # of each class by split


def load(seed: int) -> Splits:
    """Six classes to train on; validation and test hold new digits of these and of four others."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    parts = embeddings.split_classes(np.asarray(digits), KNOWN, COUNTS, np.random.default_rng(seed))
    train, *rest = (Examples(images[part["row"]], part) for part in parts)
    return Splits(train, *(distorted(jax.random.key(seed), part) for part in rest))


def init(key: PRNGKeyArray) -> Tree:
    """Two convolutions and a layer; one prototype per class to train on, for losses that use it."""
    first, second = jax.random.split(key)
    prototypes = jax.random.normal(second, (KNOWN, FEATURES))
    layers = init_layers(first, [(9, 16), (144, 32), (512, FEATURES)])
    return dict(layers=layers, prototypes=prototypes)


def apply(params: Tree, images: Float[Array, "n 64"]) -> Tree:
    """One embedding for each image, beside the prototypes."""
    first, second, (weight, bias) = params["layers"]
    x = jax.nn.relu(convolve(first, images.reshape(-1, 8, 8, 1)))
    x = jax.nn.relu(convolve(second, x)).reshape(-1, 4, 2, 4, 2, 32).mean(axis=(2, 4))
    return dict(rows=x.reshape(-1, 512) @ weight + bias, prototypes=params["prototypes"])


def in_batch(loss: Any, **options: Any) -> Any:
    """A loss of embeddings and labels, which looks at the known classes alone."""
    return lambda prediction, target: loss(
        embeddings.unit_rows(prediction["rows"]), target["label"], where=target["known"], **options
    )


def by_prototypes(loss: Any, **options: Any) -> Any:
    """A loss of embeddings, prototypes and labels."""

    def call(prediction: Tree, target: Tree) -> Array:
        rows, prototypes = prediction["rows"], prediction["prototypes"]
        return loss(rows, prototypes, target["label"], where=target["known"], **options)

    return call


def pairs(prediction: Tree, target: Tree) -> Array:
    """All pairs of a batch: those of a class together, others a margin apart."""
    rows, labels, known = embeddings.unit_rows(prediction["rows"]), target["label"], target["known"]
    both = known[:, None] & known & ~jnp.eye(len(rows), dtype=bool)
    distances = jaxloss.pairwise_distance(rows, rows)
    return jaxloss.contrastive_loss(distances, labels[:, None] == labels, where=both)


def draw_planes(figure: Any, predictions: Mapping[str, Tree], test: Examples) -> None:
    """Test embeddings of the classes that no loss has seen."""
    new = ~np.asarray(test.target["known"])
    rows = {
        name: np.asarray(embeddings.unit_rows(p["rows"]))[new] for name, p in predictions.items()
    }
    title = "Test digits of classes never trained on, in the two principal components of each loss"
    embeddings.draw_embeddings(figure, rows, np.asarray(test.target["digit"])[new], title)


def among_new(measure: Any) -> Any:
    """A metric of the classes never trained on."""
    return lambda prediction, target: measure(prediction["rows"], target["label"], ~target["known"])


TASK = Task(
    title="retrieval: distorted digits, trained on six classes, searched among the four others",
    load=load,
    init=init,
    apply=apply,
    losses={
        "batch_all_triplet_loss": in_batch(jaxloss.batch_all_triplet_loss),
        "contrastive_loss": pairs,
        "nt_xent": in_batch(jaxloss.nt_xent, temperature=0.2),
        "sup_con_loss": in_batch(jaxloss.sup_con_loss, temperature=0.2),
        "multi_similarity_loss": in_batch(jaxloss.multi_similarity_loss),
        "circle_loss": in_batch(jaxloss.circle_loss),
        "arcface_loss": by_prototypes(jaxloss.arcface_loss, margin=0.3, scale=16.0),
        "proxy_anchor_loss": by_prototypes(jaxloss.proxy_anchor_loss),
    },
    metrics=[
        Metric(
            "mean average precision", "%", among_new(embeddings.mean_average_precision), True, 2.0
        ),
        Metric("recall at 1", "%", among_new(embeddings.recall_at_1), True, 2.0),
    ],
    optimizer=optax.adamw(1e-3, weight_decay=0.1),
    batch_size=100,
    steps=150,
    evaluations=10,
    evaluated=300,
    baselines={"pixels": lambda images: dict(rows=images)},
    prepare=distorted,
    picture=draw_planes,
)
