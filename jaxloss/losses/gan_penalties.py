"""Penalties on the gradients of critics and generators, which are functions of the caller."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import (
    check_float,
    check_min_rank,
    check_same_shape,
    check_shape,
    check_where,
    message,
    require,
)
from .._core.compiled import uncompiled
from .._core.numerics import numbers, safe_div, safe_sqrt, widen
from .._core.reduce import mask, reduce, unit_weights
from .._core.samples import draw_like, over, sample_sum
from .._core.terms import Axis, add_up
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "dragan_penalty",
    "gradient_penalty",
    "path_length_penalty",
    "r1_penalty",
    "r2_penalty",
]

Critic = Callable[[Array], Array]


@uncompiled
def gradient_penalty(
    critic: Critic,
    real: Float[Array, "batch ..."],
    fake: Shaped[Array, "batch ..."],
    *,
    key: ArrayLike,
    target: Number = 1.0,
    one_sided: bool = False,
    eps: Number = 1e-10,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""How far the slope of a critic is from 1 between real and generated samples, from 0 up.

    $$ \ell = \left( \frac{\sqrt{|\nabla_x D(x)|^2 + \epsilon}}{t} - 1 \right)^2, \quad
       x = x_r + u (x_f - x_r) $$

    with u uniform in `[0, 1]`, one for each sample. The paper adds 10 times this to the critic's
    loss. For a slope of 0 as target take `r1_penalty`.

    Args:
        critic: From samples to scores `(batch,)` or `(batch, ...)`, which are added up. Each sample
            by itself: no batch normalisation in training mode, no statistics of the minibatch. It
            is given float32 or wider, whose gradient is not rounded, and called as it stands, never
            compiled here: parameters that it closes over get gradients. Dropout in it needs a key
            of its own.
        real: Real samples `(batch, ...)`.
        fake: Generated samples; same shape.
        key: Random key of the places between. Give each microbatch, and each device inside
            `shard_map`, its own.
        target: The slope that costs nothing, above 0.
        one_sided: Whether smaller slopes cost nothing either.
        eps: Keeps the root smooth where the critic is flat; 1e-10 moves a slope of 1 by 5e-11.
        where: Bool array `(batch,)`; the critic sees zeros in place of a hidden sample.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Gulrajani et al., Improved Training of Wasserstein GANs, NeurIPS 2017. Equals TF-GAN's
        `wasserstein_gradient_penalty` without its key.

    >>> critic = lambda x: 3 * x[:, 0] + 4 * x[:, 1]
    >>> real, fake = jnp.zeros((1, 2)), jnp.ones((1, 2))
    >>> gradient_penalty(critic, real, fake, key=jax.random.key(0))  # (5 - 1)^2
    Array(16., dtype=float32)
    """
    real, fake = _samples(where, real=real, fake=fake)
    target, eps = numbers(real, target=target, eps=eps)
    require(lambda: target > 0, "target", "a value above 0")
    if not isinstance(one_sided, bool):
        raise TypeError(message("one_sided", "a bool", repr(one_sided)))
    u = over(draw_like(_uniform, key, _first(real)), real)
    slopes = _slopes(critic, real + u * (fake - real))
    excess = safe_sqrt(slopes + eps) / target - 1
    values = (jax.nn.relu(excess) if one_sided else excess) ** 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


@uncompiled
def r1_penalty(
    critic: Critic,
    real: Float[Array, "batch ..."],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Half the squared slope of a discriminator at real samples, from 0 up.

    $$ \ell = \tfrac{1}{2} |\nabla_x D(x)|^2 $$

    Multiply by gamma, and by the interval where it is taken in some steps only.

    Args:
        critic: From samples to logits `(batch,)` or `(batch, ...)`, which are added up; see
            `gradient_penalty`.
        real: Real samples `(batch, ...)`.
        where: Bool array `(batch,)`; the critic sees zeros in place of a hidden sample.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Mescheder, Geiger and Nowozin, Which Training Methods for GANs do actually Converge?, ICML
        2018. StyleGAN2 and R3GAN multiply by gamma, as here; some codes have no factor 1/2.

    >>> critic = lambda x: 3 * x[:, 0] + 4 * x[:, 1]
    >>> r1_penalty(critic, jnp.zeros((1, 2)))  # 25 / 2
    Array(12.5, dtype=float32)
    """
    values = 0.5 * _slopes(critic, *_samples(where, real=real))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@uncompiled
def r2_penalty(
    critic: Critic,
    fake: Float[Array, "batch ..."],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Half the squared slope of a discriminator at generated samples, from 0 up.

    $$ \ell = \tfrac{1}{2} |\nabla_x D(x)|^2 $$

    Args:
        critic: As in `gradient_penalty`.
        fake: Generated samples `(batch, ...)`; stop their gradient where only the critic is to
            learn.
        where: Bool array `(batch,)`; the critic sees zeros in place of a hidden sample.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Mescheder, Geiger and Nowozin, Which Training Methods for GANs do actually Converge?, ICML
        2018; Huang et al., The GAN is dead; long live the GAN! (R3GAN), NeurIPS 2024.

    >>> r2_penalty(lambda x: 0.5 * (x**2).sum(1), jnp.array([[3.0, 4.0]]))  # 25 / 2
    Array(12.5, dtype=float32)
    """
    values = 0.5 * _slopes(critic, *_samples(where, fake=fake))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@uncompiled
def dragan_penalty(
    critic: Critic,
    real: Float[Array, "batch ..."],
    *,
    key: ArrayLike,
    scale: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""How far the slope of a critic is from 1 near real samples, from 0 up.

    $$ \ell = \left( \sqrt{|\nabla_x D(x)|^2 + 10^{-10}} - 1 \right)^2, \quad
       x = x_r + u\, c\, \mathrm{std}(x_r)\, \delta $$

    with u, one for each sample, and $\delta$, one for each number, uniform in `[0, 1]`, and the
    standard deviation of all numbers of the batch.

    Args:
        critic: As in `gradient_penalty`.
        real: Real samples `(batch, ...)`.
        key: Random key. Give each microbatch its own; devices of `axis_name` draw apart.
        scale: How far the points lie from the samples, in standard deviations: c.
        where: Bool array `(batch,)`; the critic sees zeros in place of a hidden sample, which
            does not enter the standard deviation.
        axis_name: Mapped axes over which the batch is split, for the standard deviation.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Kodali et al., On Convergence and Stability of GANs (DRAGAN), 2017: the authors' code; the
        text has normal noise instead.

    >>> critic = lambda x: 3 * x[:, 0] + 4 * x[:, 1]
    >>> dragan_penalty(critic, jnp.zeros((1, 2)), key=jax.random.key(0))  # (5 - 1)^2
    Array(16., dtype=float32)
    """
    (real,) = _samples(where, real=real)
    (scale,) = numbers(real, scale=scale)
    along, across = jax.random.split(key)
    noise = draw_like(_uniform, across, real, axis_name)
    u = over(draw_like(_uniform, along, _first(real), axis_name), real)
    points = real + u * (scale * _deviation(real, where, axis_name)) * noise
    values = (safe_sqrt(_slopes(critic, points) + 1e-10) - 1) ** 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _deviation(x: Array, where: Where | None, axis_name: Axis) -> Array:
    """Standard deviation of all numbers that are kept."""
    kept = jnp.ones(x.shape[:1], x.dtype) if where is None else jnp.asarray(where).astype(x.dtype)
    count = add_up(jnp.sum(kept), axis_name) * max(math.prod(x.shape[1:]), 1)
    mean = safe_div(add_up(jnp.sum(x), axis_name), count)
    (apart,) = mask(where, x - mean)
    return safe_sqrt(safe_div(add_up(jnp.sum(apart**2), axis_name), count))


@uncompiled
def path_length_penalty(
    generator: Callable[[Array], Array],
    latents: Float[Array, "batch ... features"],
    state: Float[Array, ""],
    *,
    key: ArrayLike,
    decay: Number = 0.01,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> tuple[Array, Float[Array, ""]]:
    r"""How much the stretch of a generator varies between latents, from 0 up.

    $$ \ell_i = (|J_i^T y_i| - a)^2, \quad a = (1 - d)\, a_{\mathrm{old}}
       + d\, \mathrm{mean}_i\, |J_i^T y_i| $$

    with the Jacobian J of the generator at each latent and images y of normal noise over the root
    of the number of their pixels. The old mean carries no gradient.

    Args:
        generator: From latents to images `(batch, ...)`, channels last, each by itself. It is given
            float32 or wider, whose gradient is not rounded, and called as it stands, never compiled
            here: parameters that it closes over get gradients.
        latents: Points of the latent space, `(batch, features)`, or `(batch, layers, features)` if
            the layers have each their own: the root is then of the mean over layers.
        state: The mean length $a$ so far, a scalar; 0 at first.
        key: Random key of the noise. Give each microbatch its own; devices of `axis_name` draw
            apart.
        decay: Share d of the new mean.
        where: Bool array `(batch,)`; the generator sees zeros in place of a hidden latent.
        axis_name: Mapped axes over which the batch is split: the mean is that of all devices.

    One unit per latent; see `jaxloss.reduce`. The mean counts `weights`.

    Returns:
        The loss, a float32 scalar, or `(batch,)` if `reduction` is `"none"`; and the new state.

    Reference:
        Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020. Equals the
        authors' code on one device; theirs keeps a mean on each device.

    >>> latents, state = jnp.ones((1, 2)), jnp.float32(0.25)
    >>> path_length_penalty(jnp.zeros_like, latents, state, key=jax.random.key(0), decay=0.5)
    (Array(0.015625, dtype=float32), Array(0.125, dtype=float32))
    """
    (points,) = _samples(where, latents=latents)
    if points.ndim not in (2, 3):
        expected = "shape (batch, features) or (batch, layers, features)"
        raise ValueError(message("latents", expected, f"shape {points.shape}"))
    check_float(state=state)
    check_shape((), state=state)
    (decay,) = numbers(points, decay=decay)
    old = jax.lax.stop_gradient(jnp.asarray(state).astype(points.dtype))

    def shown(points: Array) -> Array:
        images = generator(points)
        _check_batch(points, **{"generator(latents)": images})
        return images.astype(points.dtype)

    images, pull = jax.vjp(shown, points)
    pixels = max(math.prod(images.shape[1:-1]), 1)
    (slopes,) = pull(draw_like(_normal, key, images, axis_name) / math.sqrt(pixels))
    layers = max(math.prod(points.shape[1:-1]), 1)
    lengths = safe_sqrt(sample_sum(slopes**2) / layers)
    counts = unit_weights(lengths, where, weights)
    total = add_up(jnp.sum(counts), axis_name)
    mean = safe_div(add_up(jnp.sum(counts * lengths), axis_name), total)
    new = old + decay * jnp.where(total == 0, 0, mean - old)
    loss = reduce((lengths - new) ** 2, where=where, weights=weights, reduction=reduction)
    return loss, jax.lax.stop_gradient(new)


def _samples(where: Where | None, **samples: Array) -> tuple[Array, ...]:
    """Checked, hidden and widened; the mask covers the batch."""
    name, first = next(iter(samples.items()))
    check_float(**{name: first})
    check_min_rank(1, **{name: first})
    check_same_shape(**samples)
    if where is not None:
        check_where(where)
        check_shape(jnp.shape(first)[:1], where=where)
    return mask(where, *widen(*samples.values()))


def _slopes(critic: Critic, x: Array) -> Array:
    """Squared length of the gradient of each sample's score in that sample."""

    def total(x: Array) -> Array:
        scores = critic(x)
        _check_batch(x, **{"critic(x)": scores})
        return jnp.sum(scores)

    return sample_sum(jax.grad(total)(x) ** 2)


def _check_batch(x: Array, **outputs: Array) -> None:
    for name, array in outputs.items():
        check_float(**{name: array})
        check_min_rank(1, **{name: array})
        if array.shape[0] != x.shape[0]:
            raise ValueError(message(name, f"a batch of {x.shape[0]}", f"shape {array.shape}"))


def _first(x: Array) -> Array:
    """One number of each sample, for its place."""
    return sample_sum(jnp.zeros_like(x))


_uniform = partial(jax.random.uniform, dtype=np.float32)
_normal = partial(jax.random.normal, dtype=np.float32)


def _plane(x: Array) -> Array:
    return 2 * jnp.sum(x, axis=1)


def _bowl(x: Array) -> Array:
    return jnp.sum(x**2 + 0.5 * x * jnp.roll(x, 1, axis=1), axis=1)


def _bend(latents: Array) -> Array:
    return latents + 0.125 * jnp.roll(latents, 1, axis=-1) ** 2


_BOTH = dict(real=draw_normal("B D"), fake=draw_normal("B D"))
_REAL = dict(real=draw_normal("B D"))
_KEY = np.array([0, 7], np.uint32)
_SIZES = dict(D=2, T=2)
_BY_PLACE: dict[str, str] = dict.fromkeys(
    ("deleting", "microbatches", "weight_two", "permutation", "devices"),
    "each sample draws by its place in the batch",
)
_MEAN = Draw("", lambda g, shape, _: np.asarray(g.integers(4, 12, shape) / 8), "fixed")

CASES = (
    Case(
        gradient_penalty,
        _BOTH,
        dict(key=_KEY, target=0.8, eps=1e-3),
        sizes=_SIZES,
        functions=dict(critic=_plane),
    ),
    Case(
        gradient_penalty,
        _BOTH,
        dict(key=_KEY, target=1.5, one_sided=True),
        label="curved",
        sizes=_SIZES,
        functions=dict(critic=_bowl),
        without=_BY_PLACE,
    ),
    Case(r1_penalty, _REAL, sizes=_SIZES, functions=dict(critic=_bowl)),
    Case(r2_penalty, dict(fake=draw_normal("B D")), sizes=_SIZES, functions=dict(critic=_bowl)),
    Case(
        dragan_penalty,
        _REAL,
        dict(key=_KEY, scale=0.7),
        sizes=_SIZES,
        functions=dict(critic=_plane),
    ),
    Case(
        dragan_penalty,
        _REAL,
        dict(key=_KEY, scale=0.7),
        label="curved",
        sizes=_SIZES,
        coupled=True,
        functions=dict(critic=_bowl),
        without=_BY_PLACE,
    ),
    Case(
        path_length_penalty,
        dict(latents=draw_normal("B T D"), state=_MEAN),
        dict(key=_KEY, decay=0.125),
        sizes=_SIZES,
        coupled=True,
        functions=dict(generator=_bend),
        without=_BY_PLACE,
    ),
)
