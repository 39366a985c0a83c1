"""Three tasks on one narrow trunk: who keeps one of them from drowning out the others?"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import jaxloss

from .. import balance
from ..readings import HEADS, draw_pixels, error, mean_error
from ..task import Criterion, Examples, Metric, Splits, Task, Tree, apply_mlp, init_mlp, split

WIDTH = 24


def load(seed: int) -> Splits:
    """8 x 8 images in `[0, 1]`; what they show as a class, as a number, and as they are."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    target = {"class": digits.astype(np.int32), "value": digits[:, None].astype(np.float32)}
    examples = Examples(images, target | {"pixels": images})
    return split(examples, (600, 397, 800), np.random.default_rng(seed))


def init(key: PRNGKeyArray) -> Tree:
    """A trunk, a head for each task, a trunk of its own for each task, and log-variances."""
    keys = dict(zip(("trunk", *HEADS), jax.random.split(key, 1 + len(HEADS)), strict=True))
    trunk = init_mlp(keys["trunk"], (64, 64, WIDTH))
    heads = {name: init_mlp(keys[name], (WIDTH, size)) for name, size in HEADS.items()}
    zeros = dict.fromkeys(HEADS, jnp.zeros(()))
    return dict(trunk=trunk, heads=heads, alone=dict.fromkeys(HEADS, trunk), log_variances=zeros)


def apply(params: Tree, images: Float[Array, "n 64"]) -> Tree:
    """What the heads make of the shared trunk, and of their own ones."""
    feature = lambda trunk: jax.nn.relu(apply_mlp(trunk, images))
    head = lambda name, x: apply_mlp(params["heads"][name], x)
    shared = {name: head(name, feature(params["trunk"])) for name in HEADS}
    alone = {name: head(name, feature(params["alone"][name])) for name in HEADS}
    return dict(shared=shared, alone=alone, log_variances=params["log_variances"])


def losses(out: Tree, target: Tree) -> dict[str, Array]:
    """Each in its own unit: nats, squared digits, squared grey values."""
    return {
        "class": jaxloss.softmax_cross_entropy(out["class"], target["class"]),
        "value": jaxloss.squared_error(out["value"], target["value"]),
        "pixels": jaxloss.squared_error(out["pixels"], target["pixels"]),
    }


def plain(out: Tree, target: Tree, *, trunk: str = "shared") -> tuple[Array, Tree]:
    """The sum of the losses."""
    terms = losses(out[trunk], target)
    return sum(terms.values(), jnp.zeros(())), terms


def learnt(out: Tree, target: Tree) -> tuple[Array, Tree]:
    """Weights are parameters."""
    return jaxloss.uncertainty_weighting(losses(out["shared"], target), out["log_variances"])


def shared(evaluate: Any = plain, **more: Any) -> Criterion:
    """One trunk for all three."""
    return Criterion(evaluate, lambda out: out["shared"], **more)


TASK = Task(
    title="multitask: class, value, pixels of digits from 24 features; errors in % of guessing",
    load=load,
    init=init,
    apply=apply,
    losses={
        "three models": Criterion(partial(plain, trunk="alone"), lambda out: out["alone"]),
        "fixed weights": shared(),
        "uncertainty_weighting": shared(learnt),
        "dynamic_weight_average": shared(**balance.dynamic_weights(HEADS, epoch=5)),
        "gradnorm_loss": shared(**balance.gradnorm(HEADS, rate=0.025)),
        "famo_weights": shared(**balance.famo(HEADS)),
        "pcgrad": shared(**balance.surgery(jaxloss.pcgrad)),
        "cagrad": shared(**balance.surgery(jaxloss.cagrad)),
    },
    metrics=[
        Metric("error", "", mean_error, higher_is_better=False, tolerance=1.0),
        *(Metric(k, "", partial(error, task=k), False, 1.0) for k in HEADS),
    ],
    optimizer=optax.adam(4e-3),
    batch_size=128,
    steps=600,
    evaluations=25,
    predict=lambda params, images: apply(params, images)["shared"],
    picture=draw_pixels,
)
