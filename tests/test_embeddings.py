"""What the retrieval and pre-training tasks measure, against scikit-learn, and that they learn."""

from dataclasses import replace

import jax
import numpy as np
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from jaxloss.playground import tasks
from jaxloss.playground.embeddings import (
    CLASSES,
    PENALTY,
    mean_average_precision,
    probe_accuracy,
    recall_at_1,
)
from jaxloss.playground.train import baselines, load, train


def draw(n: int = 40, d: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, n)
    rows = rng.standard_normal((n, d)) + np.eye(4, d)[labels]
    return rows.astype(np.float32), labels, rng.random(n) < 0.8


def test_recall_and_precision_of_the_kept_rows_are_those_of_scikit_learn() -> None:
    rows, labels, where = draw()
    kept, names = rows[where], labels[where]
    found = NearestNeighbors(n_neighbors=2, metric="cosine").fit(kept)
    nearest = found.kneighbors(kept, return_distance=False)[:, 1]
    recall = 100 * np.mean(names[nearest] == names)
    got = jax.jit(lambda *x: (recall_at_1(*x), mean_average_precision(*x)))(rows, labels, where)
    np.testing.assert_allclose(got[0], recall, rtol=1e-6)
    unit = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    scores, other = unit @ unit.T, ~np.eye(len(kept), dtype=bool)
    precision = [
        average_precision_score((names == names[i])[other[i]], scores[i][other[i]])
        for i in range(len(kept))
    ]
    np.testing.assert_allclose(got[1], 100 * np.mean(precision), rtol=1e-5)


def test_the_probe_is_a_ridge_regression_on_the_first_half() -> None:
    rows, labels, _ = draw(80)
    x = StandardScaler().fit_transform(rows)
    ridge = Ridge(alpha=PENALTY * 40).fit(x[:40] - x[:40].mean(0), np.eye(CLASSES)[labels[:40]])
    # The probe leaves the mean of the first half in its rows, which moves the answers slightly.
    answers = np.argmax(x[40:] @ ridge.coef_.T + np.eye(CLASSES)[labels[:40]].mean(0), axis=1)
    theirs = 100 * np.mean(answers == labels[40:])
    assert abs(float(jax.jit(probe_accuracy)(rows, labels)) - theirs) <= 5


def learnt(name: str, loss: str, metric: str, steps: int) -> tuple[float, float]:
    """A test metric after training, and the best one without; both are means over two seeds."""
    task = tasks.find(name)
    only = [m for m in task.metrics if m.name == metric]
    optimizer = task.optimizer._replace(init=jax.jit(task.optimizer.init))
    task = replace(task, init=jax.jit(task.init), optimizer=optimizer)
    task = replace(task, metrics=only, evaluations=1, evaluated=20)
    splits = load(task, 2)
    splits = splits._replace(validation=jax.tree.map(lambda a: a[:, -20:], splits.validation))
    found = train(task, task.losses[loss], splits, steps=steps).test[metric].mean()
    return found, max(values[metric].mean() for values in baselines(task, splits).values())


def test_a_search_among_new_classes_gets_better_than_that_of_pixels() -> None:
    found, without = learnt("retrieval", "proxy_anchor_loss", "mean average precision", 80)
    assert found > 3 + without


def test_a_probe_reads_more_from_features_learnt_without_labels() -> None:
    found, without = learnt("pretrain", "nt_xent", "probe accuracy", 100)
    assert found > 1 + without
