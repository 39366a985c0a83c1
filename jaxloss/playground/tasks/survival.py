"""Breast cancer patients, most still well at their last visit: whose disease returns sooner?"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import jaxloss

from .. import lifetimes
from ..task import Criterion, Examples, Metric, Splits, Task, Tree, apply_mlp, init_mlp, split

BINS, WIDTH = 12, 225.0  # bins of time, and the days in one
NODES = 4  # column of the positive lymph nodes


def load(seed: int) -> Splits:
    """Eight measurements of 686 patients; the days to relapse, or to the last visit without one."""
    from lifelines.datasets import load_gbsg2

    table = load_gbsg2()
    columns = [
        table["horTh"] == "yes",
        table["menostat"] == "Post",
        table["age"] / 10,
        table["tsize"] / 10,
        np.log1p(table["pnodes"]),
        np.log1p(table["progrec"]),
        np.log1p(table["estrec"]),
        table["tgrade"].str.len(),  # I, II or III
    ]
    inputs = np.stack([np.asarray(column, np.float32) for column in columns], axis=-1)
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    days = table["time"].to_numpy(np.float32)
    relapse = table["cens"].to_numpy().astype(bool)  # the package's name for an event
    bins = np.minimum(days // WIDTH, BINS - 1).astype(np.int32)
    target = dict(time=days, event=relapse, bin=bins, fraction=(days / WIDTH - bins).clip(0, 1))
    return split(Examples(inputs, target), (400, 116, 170), np.random.default_rng(seed))


def apply(params: Any, inputs: Float[Array, "n 8"]) -> Float[Array, "n bins"]:
    """A number for each bin of time; a proportional hazard is the first one alone."""
    return apply_mlp(params, inputs)


def log_hazard(pred: Array) -> Array:
    """The risk that a Cox model gives its patients."""
    return pred[..., 0]


def proportional(loss: Callable[..., Array]) -> Criterion:
    """A partial likelihood: only the order of the patients counts."""
    evaluate = lambda pred, target: (loss(log_hazard(pred), target["time"], target["event"]), {})
    return Criterion(evaluate, log_hazard)


def by_bins(
    loss: Callable[..., Array], survival: Callable[[Array], Array], *more: str
) -> Criterion:
    """A likelihood of the bin of the relapse; the risk is minus the expected number of bins."""

    def evaluate(pred: Array, target: Tree) -> tuple[Array, Tree]:
        return loss(pred, target["bin"], target["event"], *(target[name] for name in more)), {}

    return Criterion(evaluate, lambda pred: -jnp.sum(survival(pred), axis=-1))


TASK = Task(
    title="survival: 686 patients of the German breast cancer study, 299 relapses, others censored",
    load=load,
    init=partial(init_mlp, sizes=(8, 16, BINS)),
    apply=apply,
    losses={
        "cox_ph_loss": proportional(jaxloss.cox_ph_loss),
        "cox_ph_efron_loss": proportional(jaxloss.cox_ph_efron_loss),
        "discrete_hazard_nll": by_bins(jaxloss.discrete_hazard_nll, lifetimes.of_hazards),
        "piecewise_hazard_nll": by_bins(
            jaxloss.piecewise_hazard_nll, lifetimes.of_rates, "fraction"
        ),
        "pmf_nll": by_bins(jaxloss.pmf_nll, lifetimes.of_masses),
        "mtlr_nll": by_bins(jaxloss.mtlr_nll, lifetimes.of_tasks),
    },
    metrics=[
        Metric("concordance", "%", lifetimes.concordance, higher_is_better=True, tolerance=1.0)
    ],
    optimizer=optax.adamw(3e-3, weight_decay=1.0),
    batch_size=200,
    steps=300,
    evaluations=30,
    baselines={"lymph nodes": lambda inputs: inputs[:, NODES]},
    predict=lambda params, inputs: log_hazard(apply(params, inputs)),
    picture=lifetimes.draw_thirds,
)
