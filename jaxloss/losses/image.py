"""Pixel fidelity, gradients and smoothness of images."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from .._core.case import Case, draw_normal
from .._core.checks import check_shape
from .._core.compiled import compiled, uncompiled
from .._core.numerics import absolute, numbers, safe_div, safe_norm, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where
from .._core.windows import (
    any_kept,
    check_sides,
    halve,
    prepare_images,
    shifted,
    space_mean,
    whole_windows,
)

__all__ = [
    "gmsd_loss",
    "gradient_loss",
    "isotropic_total_variation_loss",
    "psnr",
    "psnr_loss",
    "sobel_loss",
    "sure_loss",
    "total_variation_loss",
]


@compiled()
def psnr(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    max_value: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Peak signal-to-noise ratio, a score in decibels, at most 100: higher is better.

    $$ 10 \log_{10} \frac{L^2}{\operatorname{MSE}(\hat y, y)} $$

    with the mean over the kept pixels and channels of each image. Below an error of `1e-5 L`, root
    mean squared, it stays at 100 dB with zero gradient, for equal images too.

    Args:
        pred: Images `(batch, *space, channels)`, with any number of space axes.
        target: Same shape and range as `pred`; the score is symmetric.
        max_value: The range L of the data: 1, 255, ...
        where: Bool array `(batch, *space)`.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Huynh-Thu and Ghanbari, Scope of validity of PSNR in image/video quality assessment,
        Electronics Letters 2008. Equals scikit-image's `peak_signal_noise_ratio` of each image.

    >>> psnr(jnp.full((1, 2, 2, 1), 0.1), jnp.zeros((1, 2, 2, 1)))  # 20 log10(1 / 0.1)
    Array(20., dtype=float32)
    """
    values, units = _psnr(pred, target, max_value, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def psnr_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    max_value: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative peak signal-to-noise ratio, in decibels, at least -100.

    $$ \ell = -10 \log_{10} \frac{L^2}{\operatorname{MSE}(\hat y, y)} $$

    with the mean over the kept pixels and channels of each image; see `psnr`.

    Args:
        pred: Images `(batch, *space, channels)`, with any number of space axes.
        target: Same shape and range as `pred`.
        max_value: The range L of the data: 1, 255, ...
        where: Bool array `(batch, *space)`.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Huynh-Thu and Ghanbari, Scope of validity of PSNR in image/video quality assessment,
        Electronics Letters 2008. Equals kornia's `psnr_loss` of one image; kornia pools a batch,
        and is infinite for equal images.

    >>> psnr_loss(jnp.full((1, 2, 2, 1), 0.1), jnp.zeros((1, 2, 2, 1)))
    Array(-20., dtype=float32)
    """
    values, units = _psnr(pred, target, max_value, where)
    return reduce(-values, where=units, weights=weights, reduction=reduction)


def _psnr(
    pred: Array, target: Array, max_value: Number, where: Where | None
) -> tuple[Array, Array | None]:
    pred, target = prepare_images(where, pred=pred, target=target)
    (max_value,) = numbers(pred, max_value=max_value)
    size = math.prod(pred.shape[1:])
    count = jnp.full(pred.shape[:1], size, pred.dtype)
    if where is not None:
        count = pred.shape[-1] * jnp.sum(where, tuple(range(1, where.ndim)), dtype=pred.dtype)
    error = safe_norm((pred - target).reshape(pred.shape[0], size))
    ratio = safe_div(error, jnp.sqrt(count)) / max_value
    floor = 1e-5
    decibels = -20 / math.log(10) * jnp.log(jnp.where(ratio > floor, ratio, floor))
    return decibels, any_kept(where)


@compiled()
def total_variation_loss(
    images: Float[Array, "batch *space channels"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Total variation: the mean absolute difference of neighbours, summed over the axes, from 0.

    $$ \ell = \sum_a \frac{1}{N_a} \sum_x |u(x + e_a) - u(x)| $$

    over the `N_a` pairs of neighbours along axis `a`, and averaged over channels. An axis of one
    pixel adds nothing.

    Args:
        images: `(batch, *space, channels)`, with any number of space axes.
        where: Bool array `(batch, *space)`; a pair counts only if both pixels are kept.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Rudin, Osher and Fatemi, Nonlinear total variation based noise removal algorithms, Physica D
        1992. Equals kornia's `total_variation(reduction="mean")`, averaged over channels; kornia's
        default adds the pairs.

    >>> total_variation_loss(jnp.array([[0.0, 1.0], [0.0, 3.0]])[None, ..., None])  # 2 / 2 + 4 / 2
    Array(3., dtype=float32)
    """
    (images,) = prepare_images(where, images=images)
    axes = range(1, images.ndim - 1)
    steps = [absolute(_step(images, axis)) for axis in axes]
    return _sum_of_means(steps, axes, where, weights, reduction)


def _step(x: Array, axis: int) -> Array:
    here, ahead = shifted(x, axis, 0, 1)
    return ahead - here


def _sum_of_means(
    steps: list[Array],
    axes: range,
    where: Where | None,
    weights: Values | None,
    reduction: Reduction,
) -> Array:
    """Sum over the axes of the mean over the pairs of which both pixels are kept."""
    kept = [None if where is None else jnp.logical_and(*shifted(where, a, 0, 1)) for a in axes]
    means = jnp.stack([space_mean(s, k) for s, k in zip(steps, kept, strict=True)])
    values = jnp.mean(jnp.sum(means, axis=0), axis=-1)
    return reduce(values, where=any_kept(*kept), weights=weights, reduction=reduction)


@compiled()
def isotropic_total_variation_loss(
    images: Float[Array, "batch *space channels"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Isotropic total variation: the mean length of the gradient, from 0.

    $$ \ell = \frac{1}{N} \sum_x \sqrt{\sum_a (u(x + e_a) - u(x))^2} $$

    over the N pixels that have a next neighbour along every axis, and averaged over channels. The
    gradient at a flat pixel is 0.

    Args:
        images: `(batch, *space, channels)`, with at least 2 pixels along every space axis.
        where: Bool array `(batch, *space)`; a pixel counts only if its next neighbours are kept.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Rudin, Osher and Fatemi, Nonlinear total variation based noise removal algorithms, Physica D
        1992.

    >>> isotropic_total_variation_loss(jnp.array([[0.0, 3.0], [4.0, 9.0]])[None, ..., None])
    Array(5., dtype=float32)
    """
    (images,) = prepare_images(where, images=images)
    check_sides(2, images=images)
    values = safe_norm(jnp.stack(_ahead(images, lambda here, next: next - here), axis=-1))
    kept = None
    if where is not None:
        kept = jnp.all(jnp.stack(_ahead(where[..., None], jnp.logical_and)), axis=0)[..., 0]
    values = jnp.mean(space_mean(values, kept), axis=-1)
    return reduce(values, where=any_kept(kept), weights=weights, reduction=reduction)


def _ahead(x: Array, join: Callable[[Array, Array], Array]) -> list[Array]:
    """Each pixel joined with the next one along each axis, where there is one along all axes."""
    axes = range(1, x.ndim - 1)
    out = []
    for axis in axes:
        pair = shifted(x, axis, 0, 1)
        for other in axes:
            if other != axis:
                pair = tuple(shifted(p, other, 0, 1)[0] for p in pair)
        out.append(join(*pair))
    return out


@compiled()
def gradient_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Gradient difference loss: how unlike the steps between neighbours are, whatever their sign.

    $$ \ell = \sum_a \frac{1}{N_a} \sum_x
    \bigl| |\hat y(x + e_a) - \hat y(x)| - |y(x + e_a) - y(x)| \bigr| $$

    over the `N_a` pairs of neighbours along axis `a`, and averaged over channels.

    Args:
        pred: Images `(batch, *space, channels)`, with any number of space axes.
        target: Same shape and range as `pred`.
        where: Bool array `(batch, *space)`; a pair counts only if both pixels are kept.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Mathieu, Couprie and LeCun, Deep multi-scale video prediction beyond mean square error,
        ICLR 2016, with exponent 1 and sums in place of means.

    >>> pred, target = jnp.array([[0.0], [3.0]]), jnp.array([[2.0], [1.0]])
    >>> gradient_loss(pred[None], target[None])  # | |3| - |-1| |
    Array(2., dtype=float32)
    """
    pred, target = prepare_images(where, pred=pred, target=target)
    axes = range(1, pred.ndim - 1)
    steps = [absolute(absolute(_step(pred, a)) - absolute(_step(target, a))) for a in axes]
    return _sum_of_means(steps, axes, where, weights, reduction)


@compiled()
def sobel_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Edge loss: mean absolute difference of Sobel derivatives, in units of the image per pixel.

    $$ \ell = \frac{1}{A N} \sum_a \sum_x |S_a * \hat y - S_a * y| $$

    over the A axes and N interior pixels, averaged over channels; `S_a` differentiates along axis
    `a` and averages with weights (1, 2, 1) / 4 along the others (in 2-D the Sobel kernels over 8).

    Args:
        pred: Images `(batch, *space, channels)`, with at least 3 pixels along every space axis.
        target: Same shape and range as `pred`.
        where: Bool array `(batch, *space)`; a pixel counts only if all its neighbours are kept.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Sobel and Feldman, A 3x3 isotropic gradient operator for image processing, 1968. kornia's
        `sobel` has the same kernels.

    >>> ramp = jnp.broadcast_to(jnp.arange(3.0)[:, None], (3, 3))[None, ..., None]
    >>> sobel_loss(2 * ramp, ramp)  # slopes 2 and 1 along one axis, 0 along the other
    Array(0.5, dtype=float32)
    """
    pred, target = prepare_images(where, pred=pred, target=target)
    check_sides(3, pred=pred)
    edges = jnp.stack(_edges(pred - target, (0.25, 0.5, 0.25)))
    values = jnp.mean(absolute(edges), axis=0)
    kept = None if where is None else whole_windows(where, 3)
    values = jnp.mean(space_mean(values, kept), axis=-1)
    return reduce(values, where=any_kept(kept), weights=weights, reduction=reduction)


def _edges(x: Array, smoothing: tuple[float, ...]) -> list[Array]:
    """The derivative along each space axis, smoothed along the others, at the interior pixels."""
    axes = range(1, x.ndim - 1)
    out = []
    for along in axes:
        edge = x
        for axis in axes:
            before, here, after = shifted(edge, axis, 0, 1, 2)
            mean = smoothing[0] * before + smoothing[1] * here + smoothing[2] * after
            edge = (after - before) / 2 if axis == along else mean
        out.append(edge)
    return out


@compiled()
def gmsd_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    max_value: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Gradient magnitude similarity deviation, from 0: how unevenly edges are distorted.

    $$ \ell = \sqrt{\frac{1}{N} \sum_x (s(x) - \bar s)^2}, \quad
    s = \frac{2 g_p g_t + c}{g_p^2 + g_t^2 + c}, \quad c = \frac{170}{255^2} L^2 $$

    of each channel, averaged over channels. `g` is the length of the Prewitt gradient after one
    halving by averages of 2 x 2 pixels. Equal images have loss 0 with gradient 0; a distortion that
    is the same everywhere costs 0 too.

    Args:
        pred: Images `(batch, *space, channels)`, with at least 5 pixels along every space axis;
            usually luminance alone.
        target: Same shape and range as `pred`; the loss is symmetric.
        max_value: The range L of the data: 1, 255, ...
        where: Bool array `(batch, *space)`; a coarse pixel counts only if all pixels under it and
            under its neighbours are kept.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Xue et al., Gradient magnitude similarity deviation, IEEE TIP 2014. piq's `gmsd` pads with
        zeros, which adds edges at the border, and turns colours into luminance.

    >>> flat, ramp = jnp.zeros((1, 6, 6, 1)), jnp.ones((1, 6, 6, 1)) * jnp.arange(6)[:, None]
    >>> gmsd_loss(flat, ramp)  # the same distortion everywhere
    Array(0., dtype=float32)
    """
    pred, target = prepare_images(where, pred=pred, target=target)
    check_sides(5, pred=pred)
    (max_value,) = numbers(pred, max_value=max_value)
    edges = jnp.stack([jnp.stack(_edges(halve(x), (1, 1, 1)), axis=-1) for x in (pred, target)])
    squares = jnp.sum(edges**2, axis=-1)  # of sums and half differences: c has both factors
    p, t = safe_sqrt(squares)
    c = 170 / 255**2 * 9 ** (pred.ndim - 3) / 4 * max_value**2
    lost = safe_div((p - t) ** 2, jnp.sum(squares, axis=0) + c)  # 1 - similarity
    kept = None if where is None else whole_windows(halve(where), 3)
    mean = space_mean(lost, kept)
    mean = mean.reshape(mean.shape[0], *[1] * (lost.ndim - 2), mean.shape[1])
    values = jnp.mean(safe_sqrt(space_mean((lost - mean) ** 2, kept)), axis=-1)
    return reduce(values, where=any_kept(kept), weights=weights, reduction=reduction)


@uncompiled
def sure_loss(
    noisy: Float[Array, "batch *space channels"],
    *,
    pred_fn: Callable[[Array], Array],
    sigma: Number,
    key: ArrayLike,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Stein's estimate of a denoiser's squared error, from noisy images alone; it may be negative.

    $$ \ell = \frac{1}{n} \|f(y) - y\|^2 - \sigma^2 + \frac{2 \sigma^2}{n} b^T J_f(y) b $$

    over the n kept pixels and channels of each image; b is one random vector of signs, so that
    `b^T J b` is on average the divergence of f, and exactly so where J is diagonal. The product is
    a forward-mode derivative, without a step size.

    Args:
        noisy: Images `(batch, *space, channels)` with Gaussian noise.
        pred_fn: The denoiser f, from images to images of the same shape, each by itself. It is
            given the dtype of `noisy` and called as it stands, never compiled here: what it closes
            over may be traced, and may change.
        sigma: Standard deviation of the noise.
        key: Random key of the signs.
        where: Bool array `(batch, *space)`; a hidden pixel is 0 for the denoiser and counts for
            nothing.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Stein, Estimation of the mean of a multivariate normal distribution, Annals of Statistics
        1981; Ramani, Blu and Unser, Monte-Carlo SURE, IEEE TIP 2008, with Gaussian vectors.
        MONAI's `SURELoss` multiplies the two terms.

    >>> noisy = jnp.ones((1, 2, 2, 1))
    >>> sure_loss(noisy, pred_fn=lambda y: y / 2, sigma=0.1, key=jax.random.key(0))  # 1 / 4
    Array(0.25, dtype=float32)
    """
    (images,) = prepare_images(where, noisy=noisy)
    (sigma,) = numbers(images, sigma=sigma)
    signs = jax.random.rademacher(key, images.shape, images.dtype)
    signs, *_ = mask(where, signs)
    clean, moved = jax.jvp(lambda y: _denoised(pred_fn, y, noisy), (images,), (signs,))
    (clean,) = mask(where, clean)
    values = (clean - images) ** 2 - sigma**2 + 2 * sigma**2 * signs * moved
    values = jnp.mean(space_mean(values, where), axis=-1)
    return reduce(values, where=any_kept(where), weights=weights, reduction=reduction)


def _denoised(pred_fn: Callable[[Array], Array], images: Array, like: Array) -> Array:
    out = pred_fn(images.astype(like.dtype))
    check_shape(images.shape, **{"pred_fn(noisy)": out})
    return out.astype(images.dtype)


def _shrink(noisy: Array) -> Array:
    return jnp.tanh(*widen(noisy))


_PAIR = dict(pred=draw_normal("B H W C"), target=draw_normal("B H W C"))
_IMAGES = dict(images=draw_normal("B H W C"))
_VOLUME = dict(images=draw_normal("B H W D C"))
_SIZES = dict(H=4, W=5, C=2)
_SMALL = dict(H=2, W=3, D=2, C=1)

CASES = (
    Case(psnr, _PAIR, dict(max_value=2.0), positions="B H W", sizes=_SIZES),
    Case(psnr_loss, _PAIR, dict(max_value=2.0), positions="B H W", sizes=_SIZES, minimum=True),
    Case(total_variation_loss, _IMAGES, positions="B H W", sizes=_SIZES),
    Case(total_variation_loss, _VOLUME, label="volume", positions="B H W D", sizes=_SMALL),
    Case(isotropic_total_variation_loss, _IMAGES, positions="B H W", sizes=_SIZES),
    Case(
        isotropic_total_variation_loss, _VOLUME, label="volume", positions="B H W D", sizes=_SMALL
    ),
    Case(gradient_loss, _PAIR, positions="B H W", sizes=_SIZES, zero_at_target=True),
    Case(sobel_loss, _PAIR, positions="B H W", sizes=_SIZES, zero_at_target=True),
    Case(
        gmsd_loss,
        _PAIR,
        dict(max_value=16.0),
        positions="B H W",
        sizes=dict(H=8, W=8, C=1),
        zero_at_target=True,
        without={"gradient_accuracy": "the deviation of ratios of lengths: some 9 ulps at worst"},
    ),
    Case(
        sure_loss,
        dict(noisy=draw_normal("B H W C")),
        dict(pred_fn=_shrink, sigma=0.5, key=np.array([0, 7], np.uint32)),
        positions="B H W",
        sizes=dict(H=2, W=3, C=2),
    ),
)
