"""Search by image: documents graded by how near their number is. Who puts the best ones first?"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

import jaxloss

from ..queries import GRADES, draw_lists, draw_queries, hurried, ndcg
from ..task import Criterion, Metric, Splits, Task, Tree, apply_mlp, init_mlp

WRONG = 0.3  # of the grades to train on
COUNTS = (1500, 200, 300)


def load(seed: int) -> Splits:
    """Queries for training, validation and test, each of digits of its own."""
    from sklearn.datasets import load_digits

    (pixels, digits), rng = load_digits(return_X_y=True), np.random.default_rng(seed)
    images, digits = (pixels / 16).astype(np.float32), np.asarray(digits)
    parts = np.split(rng.permutation(len(digits)), (1100, 1400))
    train, *clean = (
        draw_queries(images[p], digits[p], n, rng) for p, n in zip(parts, COUNTS, strict=True)
    )
    return Splits(hurried(train, WRONG, rng), *clean)


def init(key: PRNGKeyArray) -> Tree:
    """Features of an image, and a score of two images by their features."""
    first, second = jax.random.split(key)
    return dict(features=init_mlp(first, (64, 64, 24)), score=init_mlp(second, (72, 48, 1)))


def apply(params: Tree, inputs: Tree) -> Tree:
    """A score for each document of a query, and which documents there are."""
    query = apply_mlp(params["features"], inputs["query"])[:, None]
    documents = apply_mlp(params["features"], inputs["documents"])
    query = jnp.broadcast_to(query, documents.shape)
    both = jnp.concatenate([query, documents, jnp.abs(query - documents)], axis=-1)
    return dict(score=apply_mlp(params["score"], jax.nn.relu(both))[..., 0], real=inputs["real"])


def listed(loss: Callable[..., Array], **options: Any) -> Callable[[Tree, Tree], Array]:
    """A loss of scores and grades, which hides the places that hold no document."""
    return lambda prediction, target: loss(
        prediction["score"], target["grade"], where=target["real"], **options
    )


def chance(prediction: Tree, target: Tree) -> Array:
    """The grade alone, as a share of the best one, by cross-entropy: accuracy without ranking."""
    share = target["grade"] / GRADES
    return jaxloss.pointwise_sigmoid_loss(prediction["score"], share, where=target["real"])


def both(prediction: Tree, target: Tree) -> tuple[Array, Tree]:
    """Accuracy and ranking at once."""
    return jaxloss.regression_compatible_ranking_loss(
        prediction["score"], target["grade"] / GRADES, where=target["real"]
    )


def ndcg_at_5(prediction: Tree, target: Tree) -> Array:
    """How good the first five are, in percent."""
    return ndcg(prediction["score"], target["grade"], target["real"], 5)


def grade_error(prediction: Tree, target: Tree) -> Array:
    """Mean error of the grade that the sigmoid of a score stands for."""
    error = jnp.abs(GRADES * jax.nn.sigmoid(prediction["score"]) - target["grade"])
    return jnp.sum(error * target["real"]) / jnp.sum(target["real"])


def by_pixels(inputs: Tree) -> Tree:
    """Documents by how near their pixels are to those of the query."""
    distance = jnp.sum((inputs["query"][:, None] - inputs["documents"]) ** 2, axis=-1)
    return dict(score=-distance, real=inputs["real"])


TASK = Task(
    title="ranking: 5 to 20 digits for each query by image, graded by their number; 30 % of the "
    "grades to train on are guesses",
    load=load,
    init=init,
    apply=apply,
    losses={
        "pointwise_sigmoid_loss": chance,
        "regression_compatible_ranking_loss": Criterion(both, lambda prediction: prediction),
        "pairwise_hinge_loss": listed(jaxloss.pairwise_hinge_loss),
        "pairwise_logistic_loss": listed(jaxloss.pairwise_logistic_loss),
        "lambda_loss": listed(jaxloss.lambda_loss),
        "softmax_ranking_loss": listed(jaxloss.softmax_ranking_loss),
        "list_mle_loss": listed(jaxloss.list_mle_loss),
        "approx_ndcg_loss": listed(jaxloss.approx_ndcg_loss),
        "neural_ndcg_loss": listed(jaxloss.neural_ndcg_loss),
    },
    metrics=[
        Metric("NDCG@5", "%", ndcg_at_5, higher_is_better=True, tolerance=1.0),
        Metric("error of the grade", "", grade_error, higher_is_better=False, tolerance=0.05),
    ],
    optimizer=optax.adam(2e-3),
    batch_size=64,
    steps=400,
    evaluations=10,
    evaluated=300,
    baselines={"pixels": by_pixels},
    picture=draw_lists,
)
