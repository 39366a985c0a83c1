"""Progression of diabetes where some training values slipped a decimal point: who is misled?"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import jaxloss

from ..task import Examples, Metric, Splits, Task, apply_mlp, init_mlp, split

WRONG = 0.1
# About the clean target's median and spread. Fixed, so that a metric can undo them.
CENTRE, SCALE = 140.0, 77.0
FRAME = (-100, 500)


def load(seed: int) -> Splits:
    """Ten measurements and the disease a year later; a tenth of the training scores times ten."""
    from sklearn.datasets import load_diabetes

    inputs, score = load_diabetes(return_X_y=True)
    rng = np.random.default_rng(seed)
    inputs = (inputs * np.sqrt(len(inputs))).astype(np.float32)  # comes with norm 1 per column
    train, *clean = split(Examples(inputs, score), (262, 90, 90), rng)
    wrong = rng.permutation(len(train.target)) < WRONG * len(train.target)
    spoilt = train._replace(target=np.where(wrong, 10 * train.target, train.target))
    scale = lambda part: part._replace(target=((part.target - CENTRE) / SCALE).astype(np.float32))
    return Splits(*(scale(part) for part in (spoilt, *clean)))


def apply(params: Any, inputs: Float[Array, "n 10"]) -> Float[Array, " n"]:
    """One number per patient."""
    return apply_mlp(params, inputs)[..., 0]


def mean_error(pred: Float[Array, " n"], target: Float[Array, " n"]) -> Float[Array, ""]:
    """Mean absolute error, in points of the score."""
    return SCALE * jnp.mean(jnp.abs(pred - target))


def median_error(pred: Float[Array, " n"], target: Float[Array, " n"]) -> Float[Array, ""]:
    """Median absolute error, in points of the score."""
    return SCALE * jnp.median(jnp.abs(pred - target))


def draw_scatter(figure: Any, predictions: Mapping[str, Array], test: Examples) -> None:
    """Prediction against truth: a loss that is misled lies above the line."""
    axes = figure.subplots(1, len(predictions), sharex=True, sharey=True, squeeze=False)[0]
    shown = lambda scaled: np.clip(CENTRE + SCALE * scaled, *FRAME)
    for panel, (name, pred) in zip(axes, predictions.items(), strict=True):
        panel.axline((150, 150), slope=1, color="0.6", lw=1)
        panel.scatter(shown(test.target), shown(pred), s=12, alpha=0.7, color="tab:blue", lw=0)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("true score (points)")
    axes[0].set_ylabel("predicted score (points)")
    figure.suptitle(
        "Test patients of the first run, ideally around the line (at the edge: beyond it)"
    )


TASK = Task(
    title="diabetes: 442 patients, 10 % of the training scores ten times too high, the rest clean",
    load=load,
    init=partial(init_mlp, sizes=(10, 32, 1)),
    apply=apply,
    losses={
        "squared_error": jaxloss.squared_error,
        "absolute_error": jaxloss.absolute_error,
        "huber_loss": jaxloss.huber_loss,
        "log_cosh": jaxloss.log_cosh,
        "cauchy_loss": jaxloss.cauchy_loss,
        # With 10 % of the values far too high, the clean median is the 45 % quantile of them all.
        "quantile_loss": partial(jaxloss.quantile_loss, quantile=0.45),
    },
    metrics=[
        Metric("mean absolute error", "points", mean_error, higher_is_better=False, tolerance=2.0),
        Metric(
            "median absolute error", "points", median_error, higher_is_better=False, tolerance=2.0
        ),
    ],
    optimizer=optax.adam(2e-3),
    batch_size=64,
    steps=1000,
    picture=draw_scatter,
)
