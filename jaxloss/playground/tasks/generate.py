"""Digits out of noise: the same small network, told to predict velocity, noise or image."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import jaxloss

from ..sampling import PIXELS, distance, draw_grids, gaussian, integrate, nearest, towards
from ..task import Criterion, Examples, Metric, Splits, Task, Tree, apply_mlp, init_mlp

FREQUENCIES, STEPS = 8, 4000
SPLIT = np.cumsum([1000, 199, 199, 199])  # those to train on, then four parts to compare with


def load(seed: int) -> Splits:
    """Images from -1 to 1; validation and test hold other real digits beside them."""
    from sklearn.datasets import load_digits

    images = (load_digits(return_X_y=True)[0] / 8 - 1).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(images))
    train, *rest = np.split(images[order][: SPLIT[-1] + 199], SPLIT)
    part = lambda x, real: Examples(dict(x=x, time=np.ones((len(x), 1), np.float32)), real)
    return Splits(part(train, train), part(*rest[:2]), part(*rest[2:]))


def noisy(key: PRNGKeyArray, examples: Examples) -> Examples:
    """A point of the way from noise to each image, at a time between 0 and 1."""
    first, second = jax.random.split(key)
    image = examples.inputs["x"]
    noise = jax.random.normal(first, image.shape)
    time = jax.random.uniform(second, (len(image), 1), minval=0.01, maxval=0.99)
    x = jaxloss.linear_interpolation(noise, image, time[:, 0])
    return Examples(dict(x=x, time=time), dict(noise=noise, image=image, time=time[:, 0]))


def init(key: PRNGKeyArray) -> Tree:
    """Three layers over pixels and time."""
    return init_mlp(key, (PIXELS + 2 * FREQUENCIES, 256, 256, PIXELS))


def network(params: Tree, x: Float[Array, "n pixels"], time: Float[Array, "n 1"]) -> Array:
    """Whatever the loss makes of it: velocity, noise or image."""
    angles = time * jnp.pi * 2.0 ** jnp.arange(-1, FREQUENCIES - 1)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return apply_mlp(params, jnp.concatenate([x, waves], axis=-1))


def apply(params: Tree, inputs: Tree) -> Tree:
    """The output, and the network itself, which sampling asks many times."""
    return dict(output=network(params, **inputs), params=params)


def samples(pred: Tree, velocity: Callable[[Array, Array, Array], Array]) -> Array:
    """As many images as there were inputs; `velocity` is of (output, x, time)."""
    flow = lambda x, time: velocity(network(pred["params"], x, time), x, time)
    return integrate(flow, len(pred["output"]), jax.random.key(1))


def flow(pred: Tree, target: Tree) -> tuple[Array, Tree]:
    """From noise at time 0 straight to the image at time 1."""
    return jaxloss.flow_matching_loss(pred["output"], target["noise"], target["image"]), {}


def diffusion(aim: Callable[..., Array], image: Callable[..., Array], weight: Any = None) -> Any:
    """A denoising loss: what to predict of (noise, image, time), and the image by (x, output)."""

    def evaluate(pred: Tree, target: Tree) -> tuple[Array, Tree]:
        time = target["time"]
        scale = 1.0 if weight is None else weight((time / (1 - time)) ** 2)
        return jaxloss.diffusion_loss(pred["output"], aim(**target), timestep_weight=scale), {}

    def velocity(output: Array, x: Array, time: Array) -> Array:
        alpha = time[:, 0]
        return towards(image(x, output, alpha=alpha, sigma=1 - alpha), x, time)

    return Criterion(evaluate, lambda pred: samples(pred, velocity))


def rotation(noise: Array, image: Array, time: Array) -> Array:
    """The velocity that diffusion models predict: across the way, not along it."""
    return jaxloss.velocity_target(image, noise, alpha=time, sigma=1 - time)


TASK = Task(
    title="generate: digits out of noise, by 40 steps along the way that a network has learnt",
    load=load,
    init=init,
    apply=apply,
    losses={
        "flow_matching_loss": Criterion(flow, lambda pred: samples(pred, lambda v, *_: v)),
        "diffusion_loss_of_velocity": diffusion(rotation, jaxloss.x0_from_velocity),
        "diffusion_loss_of_noise": diffusion(lambda noise, **_: noise, jaxloss.x0_from_epsilon),
        "diffusion_loss_of_image": diffusion(
            lambda image, **_: image, lambda _, image, **__: image, jaxloss.min_snr_x0_weight
        ),
    },
    metrics=[
        Metric("distance to unseen digits", "grey levels", distance, False, 0.05),
        Metric("distance to the nearest", "grey levels", nearest, False, 0.05),
    ],
    optimizer=optax.adam(optax.cosine_decay_schedule(2e-3, STEPS)),
    batch_size=128,
    steps=STEPS,
    evaluations=10,
    evaluated=200,
    prepare=noisy,
    predict=lambda params, inputs: samples(apply(params, inputs), lambda v, *_: v),
    baselines={
        "other real digits": lambda inputs: inputs["x"],
        "one normal distribution": lambda inputs: gaussian(inputs["x"]),
    },
    picture=draw_grids,
)
