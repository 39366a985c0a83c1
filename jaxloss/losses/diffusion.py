"""Diffusion and consistency models: losses of what a network predicts, and its three forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, Draw, draw_labels, draw_normal
from .._core.checks import (
    check_float,
    check_integer,
    check_min_rank,
    check_same_shape,
    check_shape,
    check_where,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.labels import valid
from .._core.lattice import check_rank
from .._core.numerics import numbers, safe_div, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.samples import PerSample, over, per_sample, prepare_samples, sample_mean, sample_sum
from .._core.sharding import one_hot
from .._core.softmax import cross_entropy
from .._core.typing import Number, Reduction, Values, Where
from .._core.windows import any_kept

__all__ = [
    "consistency_loss",
    "diffusion_loss",
    "epsilon_from_x0",
    "masked_diffusion_loss",
    "pseudo_huber_diffusion_loss",
    "velocity_target",
    "x0_from_epsilon",
    "x0_from_velocity",
]


@compiled()
def diffusion_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    timestep_weight: PerSample = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared error of a denoiser, the mean of each sample times the weight of its noise level.

    $$ \ell = \frac{w}{D} \sum_i (\hat y_i - y_i)^2 $$

    over the D kept positions and channels of a sample. The target says what the network predicts:
    the noise, the clean sample, or `velocity_target`.

    Args:
        pred: Output of the network, `(batch, *space, channels)`.
        target: What it should be; same shape.
        timestep_weight: One number, or one for each sample, `(batch,)`, such as
            `min_snr_epsilon_weight(snr)`. Unlike `weights` it is not divided out again by the mean.
        where: Bool array `(batch, *space)`; a sample with nothing kept is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, NeurIPS 2020: with noise as
        target, its simple loss. diffusers' training scripts take the mean of each sample, then the
        weight, as here.

    >>> pred, noise = jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 0.0]])
    >>> diffusion_loss(pred, noise, timestep_weight=jnp.array([0.5]))  # 0.5 (1 + 9) / 2
    Array(2.5, dtype=float32)
    """
    pred, target = prepare_samples(where, pred=pred, target=target)
    (weight,) = per_sample(pred, where, timestep_weight=timestep_weight)
    values = weight * sample_mean((pred - target) ** 2, where)
    return reduce(values, where=any_kept(where), weights=weights, reduction=reduction)


@compiled()
def pseudo_huber_diffusion_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    c: PerSample = 0.1,
    timestep_weight: PerSample = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Diffusion loss that grows like the error, not its square, where that is above `c`.

    $$ \ell = \frac{w}{D} \sum_i 2 c \left( \sqrt{(\hat y_i - y_i)^2 + c^2} - c \right) $$

    over the D kept positions and channels of a sample. As `c` grows it becomes `diffusion_loss`.

    Args:
        pred: Output of the network, `(batch, *space, channels)`.
        target: What it should be; same shape.
        c: Error around which square turns into absolute: one number above 0, or one for each
            sample, such as a schedule of the noise level.
        timestep_weight: One number, or one for each sample, `(batch,)`.
        where: Bool array `(batch, *space)`; a sample with nothing kept is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Khrapov et al., Improving Diffusion Models's Data-Corruption Resistance using Scheduled
        Pseudo-Huber Loss, 2024. Equals `loss_type="huber"` of diffusers' training scripts; divide
        by `c` for their `"smooth_l1"`.

    >>> pred, noise = jnp.array([[4.0]]), jnp.array([[0.0]])
    >>> pseudo_huber_diffusion_loss(pred, noise, c=3.0)  # 6 (5 - 3)
    Array(12., dtype=float32)
    """
    pred, target = prepare_samples(where, pred=pred, target=target)
    weight, width = per_sample(pred, where, timestep_weight=timestep_weight, c=c)
    costs = _pseudo_huber(pred - target, jnp.broadcast_to(over(width, pred), pred.shape))
    values = weight * sample_mean(costs, where)
    return reduce(values, where=any_kept(where), weights=weights, reduction=reduction)


@jax.custom_jvp
def _pseudo_huber(error: Array, c: Array) -> Array:
    """2 c (sqrt(e^2 + c^2) - c); also where c is 0 or large, without cancellation."""
    cost = 2 * error * (error / (jnp.sqrt(1 + safe_div(error, c) ** 2) + 1))
    return jnp.where(c == 0, 0, cost)


@_pseudo_huber.defjvp
def _pseudo_huber_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (error, c), (error_dot, c_dot) = primals, tangents
    ratio = safe_div(error, c)
    root = jnp.sqrt(1 + ratio**2)
    slope = jnp.where(c == 0, 0, 2 * error / root)
    in_c = 2 * error * (ratio / root) * (ratio / (root + 1)) ** 2
    return _pseudo_huber(error, c), slope * error_dot + in_c * c_dot


@compiled()
def consistency_loss(
    student: Float[Array, "batch *space channels"],
    teacher: Shaped[Array, "batch *space channels"],
    *,
    c: Number = 0.0,
    timestep_weight: PerSample = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Distance of the outputs at two neighbouring noise levels, from 0 up; not squared.

    $$ \ell = w \left( \sqrt{|f_\theta - \mathrm{sg}(f')|^2 + c^2} - c \right) $$

    with the norm over all kept positions and channels of a sample. The teacher carries no gradient.
    At `c=0` it is the plain norm, whose gradient at equality is 0.

    Args:
        student: Output at the higher noise level, `(batch, *space, channels)`.
        teacher: Output at the lower one; same shape.
        c: Distance below which the loss is a square, from 0 up; `0.00054 sqrt(D)` in the paper, for
            samples of D numbers.
        timestep_weight: One number, or one for each sample, `(batch,)`; the paper's is
            `1 / (t_{n+1} - t_n)`.
        where: Bool array `(batch, *space)`; a sample with nothing kept is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Song and Dhariwal, Improved Techniques for Training Consistency Models, ICLR 2024. Song et
        al., Consistency Models, ICML 2023, use the squared norm: `diffusion_loss` times D.

    >>> student, teacher = jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 0.0]])
    >>> consistency_loss(student, teacher)  # sqrt(9 + 16)
    Array(5., dtype=float32)
    """
    student, teacher = prepare_samples(where, student=student, teacher=teacher)
    (c,) = numbers(student, c=c)
    require(lambda: c >= 0, "c", "a value of at least 0")
    (weight,) = per_sample(student, where, timestep_weight=timestep_weight)
    error = student - jax.lax.stop_gradient(teacher)
    values = weight * _norm_above(error, c)
    return reduce(values, where=any_kept(where), weights=weights, reduction=reduction)


def _norm_above(x: Array, c: Array) -> Array:
    """sqrt(|x|^2 + c^2) - c of each sample, without overflow or cancellation."""
    largest = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), initial=0)
    largest = jax.lax.stop_gradient(jnp.maximum(largest, c))
    scale = jnp.where((largest == 0) | ~jnp.isfinite(largest), 1, largest)
    square, width = sample_sum((x / over(scale, x)) ** 2), c / scale
    return scale * safe_div(square, safe_sqrt(square + width**2) + width)


@compiled("mask_id")
def masked_diffusion_loss(
    logits: Float[Array, "batch time classes"],
    tokens: Integer[Array, "batch time"],
    *,
    alpha: PerSample,
    alpha_derivative: PerSample,
    mask_id: int | None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Bound on the negative log-likelihood of a masked diffusion model, in nats per sequence.

    $$ \ell = -\frac{\alpha'_t}{1 - \alpha_t} \sum_{i\,\mathrm{masked}} -\log p_i(x_i) $$

    where each token is masked with probability $1 - \alpha_t$; its expectation over masks and a
    uniform time is the bound. A sequence without a masked token costs 0 and counts as a unit, or
    the mean over a batch would be biased; to leave out a sequence give it weight 0.

    Args:
        logits: Scores of the tokens at each place, `(batch, time, classes)`.
        tokens: The clean tokens, `(batch, time)`. A kept one outside `[0, classes)`, or equal to
            `mask_id`, makes its sequence NaN.
        alpha: Probability that a token is not masked at the time of the sequence: one number, or
            one for each sequence, `(batch,)`.
        alpha_derivative: Its derivative in time, at most 0; the same.
        mask_id: Class of the mask, which gets probability 0; None if `logits` has no such class.
        where: Bool array `(batch, time)` of the masked tokens; leave out padding. All, if None.

    One unit per sequence; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Shi et al., Simplified and Generalized Masked Diffusion for Discrete Data, NeurIPS 2024
        (MD4); Sahoo et al., Simple and Effective Masked Diffusion Language Models, NeurIPS 2024
        (MDLM).

    The third of these classes is the mask, so the loss is `2 (log 2 + log 2)`:

    >>> logits, tokens = jnp.zeros((1, 2, 3)), jnp.array([[0, 1]])
    >>> masked_diffusion_loss(logits, tokens, alpha=0.5, alpha_derivative=-1.0, mask_id=2)
    Array(2.7725887, dtype=float32)
    """
    logits, tokens, where = _masked_tokens(logits, tokens, mask_id, where)
    (like,) = widen(logits[..., :0])
    alpha, alpha_derivative = per_sample(
        like, where, alpha=alpha, alpha_derivative=alpha_derivative
    )
    require(lambda: (alpha >= 0) & (alpha <= 1), "alpha", "values in [0, 1]")
    costs = cross_entropy(logits, tokens)
    total = sample_sum(costs if where is None else jnp.where(where, costs, 0))
    return reduce(
        safe_div(-alpha_derivative, 1 - alpha) * total, weights=weights, reduction=reduction
    )


def _masked_tokens(
    logits: Array, tokens: Array, mask_id: int | None, where: Where | None
) -> tuple[Array, Array, Array | None]:
    """Checked and masked; the class of the mask has logit -inf and is no legal token."""
    check_float(logits=logits)
    check_rank("(batch, time, classes)", logits=logits)
    check_integer(tokens=tokens)
    check_shape(logits.shape[:-1], tokens=tokens)
    classes = logits.shape[-1]
    if mask_id is not None:
        if isinstance(mask_id, bool) or not isinstance(mask_id, (int, np.integer)):
            raise TypeError(message("mask_id", "an integer or None", repr(mask_id)))
        if not 0 <= mask_id < classes:
            raise ValueError(message("mask_id", f"a class in [0, {classes})", mask_id))
    if where is not None:
        check_where(where)
        check_shape(tokens.shape, where=where)
    harmless = 1 if mask_id == 0 else 0
    tokens = jnp.asarray(tokens)
    tokens = tokens.astype(jnp.int32) if tokens.dtype.itemsize < 4 else tokens
    (logits,), (tokens,) = mask(where, jnp.asarray(logits)), mask(where, tokens, fill=harmless)
    require(lambda: valid(tokens, classes), "tokens", f"values in [0, {classes})", where)
    if mask_id is not None:
        require(lambda: tokens != mask_id, "tokens", f"clean tokens, not mask_id {mask_id}", where)
        hit = one_hot(jnp.full((1, 1), mask_id, tokens.dtype), classes)
        logits = jnp.where(hit, jnp.asarray(-jnp.inf, logits.dtype), logits)
        tokens = jnp.where(tokens == mask_id, jnp.asarray(-1, tokens.dtype), tokens)
    return logits, tokens, None if where is None else jnp.asarray(where)


@compiled()
def velocity_target(
    x0: Float[Array, "*shape"],
    noise: Shaped[Array, "*shape"],
    *,
    alpha: PerSample,
    sigma: PerSample,
) -> Array:
    r"""What a network of v-prediction predicts: the derivative of the noisy sample in its angle.

    $$ v = \alpha \epsilon - \sigma x_0, \quad x_t = \alpha x_0 + \sigma \epsilon $$

    Args:
        x0: Clean samples, `(batch, ...)`.
        noise: Standard normal noise; same shape.
        alpha: How much of the sample is in `x_t`: one number, or one for each sample, `(batch,)`.
        sigma: How much of the noise is; the same.

    Returns:
        The shape of `x0`, in float32 or wider.

    Reference:
        Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, ICLR 2022.

    >>> velocity_target(jnp.array([[1.0]]), jnp.array([[2.0]]), alpha=0.8, sigma=0.6)  # 1.6 - 0.6
    Array([[1.]], dtype=float32)
    """
    x0, noise, alpha, sigma = _noisy(alpha, sigma, x0=x0, noise=noise)
    return alpha * noise - sigma * x0


@compiled()
def x0_from_epsilon(
    x_t: Float[Array, "*shape"],
    prediction: Shaped[Array, "*shape"],
    *,
    alpha: PerSample,
    sigma: PerSample,
) -> Array:
    r"""The clean sample, from the noisy one and a prediction of its noise.

    $$ x_0 = (x_t - \sigma \epsilon) / \alpha $$

    Where `alpha` is 0 the noisy sample tells nothing of it: 0, with zero gradient.

    Args:
        x_t: Noisy samples `alpha x0 + sigma noise`, `(batch, ...)`.
        prediction: Predicted noise; same shape.
        alpha: One number, or one for each sample, `(batch,)`.
        sigma: The same.

    Returns:
        The shape of `x_t`, in float32 or wider.

    Reference:
        Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, ICLR 2022.

    >>> x0_from_epsilon(jnp.array([[2.0]]), jnp.array([[2.0]]), alpha=0.5, sigma=0.75)
    Array([[1.]], dtype=float32)
    """
    x_t, epsilon, alpha, sigma = _noisy(alpha, sigma, x_t=x_t, prediction=prediction)
    return safe_div(x_t - sigma * epsilon, alpha)


@compiled()
def epsilon_from_x0(
    x_t: Float[Array, "*shape"],
    prediction: Shaped[Array, "*shape"],
    *,
    alpha: PerSample,
    sigma: PerSample,
) -> Array:
    r"""The noise, from the noisy sample and a prediction of the clean one.

    $$ \epsilon = (x_t - \alpha x_0) / \sigma $$

    Where `sigma` is 0 there is no noise to be seen: 0, with zero gradient.

    Args:
        x_t: Noisy samples `alpha x0 + sigma noise`, `(batch, ...)`.
        prediction: Predicted clean samples; same shape.
        alpha: One number, or one for each sample, `(batch,)`.
        sigma: The same.

    Returns:
        The shape of `x_t`, in float32 or wider.

    Reference:
        Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, ICLR 2022.

    >>> epsilon_from_x0(jnp.array([[2.0]]), jnp.array([[1.0]]), alpha=0.5, sigma=0.75)
    Array([[2.]], dtype=float32)
    """
    x_t, x0, alpha, sigma = _noisy(alpha, sigma, x_t=x_t, prediction=prediction)
    return safe_div(x_t - alpha * x0, sigma)


@compiled()
def x0_from_velocity(
    x_t: Float[Array, "*shape"],
    prediction: Shaped[Array, "*shape"],
    *,
    alpha: PerSample,
    sigma: PerSample,
) -> Array:
    r"""The clean sample, from the noisy one and a prediction of `velocity_target`.

    $$ x_0 = (\alpha x_t - \sigma v) / (\alpha^2 + \sigma^2) $$

    Args:
        x_t: Noisy samples `alpha x0 + sigma noise`, `(batch, ...)`.
        prediction: Predicted velocities; same shape.
        alpha: One number, or one for each sample, `(batch,)`; 0 is no exception.
        sigma: The same.

    Returns:
        The shape of `x_t`, in float32 or wider.

    Reference:
        Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, ICLR 2022,
        for schedules whose squares add up to 1.

    >>> x0_from_velocity(jnp.array([[2.0]]), jnp.array([[1.0]]), alpha=0.8, sigma=0.6)  # 1.6 - 0.6
    Array([[1.]], dtype=float32)
    """
    x_t, velocity, alpha, sigma = _noisy(alpha, sigma, x_t=x_t, prediction=prediction)
    return safe_div(alpha * x_t - sigma * velocity, alpha**2 + sigma**2)


def _noisy(alpha: PerSample, sigma: PerSample, **samples: Array) -> tuple[Array, ...]:
    """Two arrays of samples in one dtype; the numbers of the schedule in the shape of those."""
    check_float(**samples)
    check_min_rank(1, **samples)
    check_same_shape(**samples)
    first, second = widen(*samples.values())
    schedule = per_sample(first, alpha=alpha, sigma=sigma)
    return first, second, *(jnp.broadcast_to(over(x, first), first.shape) for x in schedule)


_PAIR = dict(pred=draw_normal("B H W C"), target=draw_normal("B H W C"))
_FIXED = Draw("B H W C", lambda g, shape, _: g.integers(-16, 17, shape) / 8, "fixed")
_SPACE: dict[str, Any] = dict(positions="B H W", sizes=dict(H=2, W=3, C=2))
_TOKENS = dict(logits=draw_normal("B T C"), tokens=draw_labels("B T", classes="V"))

CASES = (
    Case(diffusion_loss, _PAIR, zero_at_target=True, **_SPACE),
    Case(
        diffusion_loss,
        dict(pred=draw_normal("B C"), target=draw_normal("B C")),
        dict(timestep_weight=0.7),
        label="vectors",
        zero_at_target=True,
    ),
    Case(pseudo_huber_diffusion_loss, _PAIR, dict(c=0.3), zero_at_target=True, **_SPACE),
    Case(
        consistency_loss,
        dict(student=draw_normal("B H W C"), teacher=_FIXED),
        dict(c=0.4, timestep_weight=0.7),
        **_SPACE,
    ),
    Case(
        consistency_loss,
        dict(student=draw_normal("B C"), teacher=draw_normal("B C")),
        label="norm",
        zero_at_target=True,
        without={"numerical": "the teacher carries no gradient"},
    ),
    Case(
        masked_diffusion_loss,
        _TOKENS,
        dict(alpha=0.4, alpha_derivative=-0.9, mask_id=3),
        positions="B T",
        without={"deleting": "a sequence without a masked token is a unit that costs 0"},
    ),
)
