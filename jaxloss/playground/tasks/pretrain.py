"""Digits without labels: which loss of two distorted views makes features that labels can use?"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import jaxloss

from ..embeddings import draw_embeddings, probe_accuracy, recall_at_1
from ..task import Examples, Metric, Splits, Task, Tree, split
from ..views import apply, features, init, two_views


def load(seed: int) -> Splits:
    """8 x 8 images in `[0, 1]`; their labels are for the metrics alone."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    examples = Examples((images / 16).astype(np.float32), labels.astype(np.int32))
    return split(examples, (997, 400, 400), np.random.default_rng(seed))


def both(loss: Any, **options: Any) -> Any:
    """A loss of the two projections, row by row a pair; of `(total, terms)` the total."""

    def call(prediction: Tree, _: Tree) -> Array:
        out = loss(*prediction["projected"], **options)
        return out[0] if isinstance(out, tuple) else out

    return call


def sim_clr(prediction: Tree, target: Tree) -> Array:
    """Each view has one positive, the other view of its image."""
    rows = jnp.concatenate(list(prediction["projected"]))
    return jaxloss.nt_xent(rows, jnp.tile(jnp.arange(len(target)), 2), temperature=0.3)


def sim_siam(prediction: Tree, _: Tree) -> Array:
    """Each view predicts the projection of the other, which stands still."""
    (a, b), (p, q) = prediction["projected"], prediction["predicted"]
    return (jaxloss.negative_cosine_loss(p, b) + jaxloss.negative_cosine_loss(q, a)) / 2


def swav(prediction: Tree, _: Tree) -> Array:
    """Each view predicts to which prototypes the other one is assigned."""
    return jaxloss.swav_loss(prediction["scores"], prediction["scores"])


def neighbours(rows: Array, labels: Array) -> Float[Array, ""]:
    """Share of images whose nearest neighbour shows the same digit."""
    return recall_at_1(rows, labels, jnp.ones(len(labels), bool))


def draw_planes(figure: Any, predictions: Mapping[str, Array], test: Examples) -> None:
    """Test images in the plane of their features."""
    rows = {name: np.asarray(p) for name, p in predictions.items()}
    title = "Test digits in the two principal components of the features; labels were never shown"
    draw_embeddings(figure, rows, np.asarray(test.target), title)


TASK = Task(
    title="pretrain: two distorted views of digits, no labels; then a linear probe of the features",
    load=load,
    init=init,
    apply=apply,
    losses={
        "nt_xent": sim_clr,
        "decoupled_contrastive_loss": both(jaxloss.decoupled_contrastive_loss, temperature=0.3),
        "barlow_twins_loss": both(partial(jaxloss.barlow_twins_loss, off_diagonal_weight=0.02)),
        "vicreg_loss": both(jaxloss.vicreg_loss),
        "negative_cosine_loss": sim_siam,
        "swav_loss": swav,
    },
    metrics=[
        Metric("probe accuracy", "%", probe_accuracy, higher_is_better=True, tolerance=1.0),
        Metric("nearest neighbour accuracy", "%", neighbours, higher_is_better=True, tolerance=1.0),
    ],
    optimizer=optax.adam(1e-3),
    batch_size=128,
    steps=500,
    evaluations=20,
    evaluated=400,
    prepare=two_views,
    predict=features,
    baselines={"pixels": lambda images: images},
    picture=draw_planes,
)
