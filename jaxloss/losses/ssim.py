"""Structural similarity of images and its multi-scale forms."""

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_uniform
from .._core.checks import message
from .._core.compiled import compiled
from .._core.numerics import absolute, expm1, numbers
from .._core.reduce import reduce
from .._core.typing import Number, Reduction, Values, Where
from .._core.windows import (
    any_kept,
    check_sides,
    check_window,
    gaussian_taps,
    halve,
    prepare_images,
    space_mean,
    ssim_terms,
    whole_windows,
    window_mean,
)

__all__ = [
    "ms_ssim",
    "ms_ssim_l1_loss",
    "ms_ssim_loss",
    "ssim",
    "ssim_loss",
    "ssim_map",
]

POWER = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003; the sum is 1.0001


@compiled("window")
def ssim(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    max_value: Number = 1.0,
    window: int = 11,
    sigma: Number = 1.5,
    k1: Number = 0.01,
    k2: Number = 0.03,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Structural similarity, a score in `[-1, 1]`: 1 for equal images.

    $$ \operatorname{SSIM} = \frac{(2 \mu_p \mu_t + C_1)(2 \sigma_{pt} + C_2)}
    {(\mu_p^2 + \mu_t^2 + C_1)(\sigma_p^2 + \sigma_t^2 + C_2)}, \quad C_i = (k_i L)^2 $$

    averaged over windows and channels. Moments are those of a Gaussian window that lies wholly
    inside the image; variances are biased (divided by the number of pixels).

    Args:
        pred: Images `(batch, *space, channels)`, with any number of space axes.
        target: Same shape and range as `pred`; the score is symmetric.
        max_value: The range L of the data: 1, 255, ...
        window: Pixels along each side of the window.
        sigma: Standard deviation of the window, in pixels.
        k1: Stabilises the luminance term.
        k2: Stabilises the contrast-structure term.
        where: Bool array `(batch, *space)`; a window is kept only if all its pixels are.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Wang et al., Image quality assessment: from error visibility to structural similarity, IEEE
        TIP 2004. Equals `kornia.metrics.ssim` with `padding="valid"`, averaged, and piq's `ssim`
        with `downsample=False`.

    >>> black, white = jnp.zeros((1, 11, 11, 1)), jnp.ones((1, 11, 11, 1))
    >>> ssim(black, white, k1=1.0)  # (0 + 1) / (1 + 1): no structure, only luminance
    Array(0.5, dtype=float32)
    """
    lost, units = _lost(pred, target, where, max_value, window, sigma, k1, k2)
    return reduce(1 - lost, where=units, weights=weights, reduction=reduction)


@compiled("window")
def ssim_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    max_value: Number = 1.0,
    window: int = 11,
    sigma: Number = 1.5,
    k1: Number = 0.01,
    k2: Number = 0.03,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Structural dissimilarity, in `[0, 2]`, with every digit also for nearly equal images.

    $$ \ell = 1 - \operatorname{SSIM}(\hat y, y) $$

    Args:
        pred: Images `(batch, *space, channels)`, with any number of space axes.
        target: Same shape and range as `pred`.
        max_value: The range L of the data: 1, 255, ...
        window: Pixels along each side of the window.
        sigma: Standard deviation of the window, in pixels.
        k1: Stabilises the luminance term.
        k2: Stabilises the contrast-structure term.
        where: Bool array `(batch, *space)`; a window is kept only if all its pixels are.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Wang et al., Image quality assessment: from error visibility to structural similarity, IEEE
        TIP 2004. Equals MONAI's `SSIMLoss`; `kornia.losses.ssim_loss` halves and clips it.

    >>> black, white = jnp.zeros((1, 11, 11, 1)), jnp.ones((1, 11, 11, 1))
    >>> ssim_loss(black, white, k1=1.0)
    Array(0.5, dtype=float32)
    """
    lost, units = _lost(pred, target, where, max_value, window, sigma, k1, k2)
    return reduce(lost, where=units, weights=weights, reduction=reduction)


def _lost(
    pred: Array,
    target: Array,
    where: Where | None,
    max_value: Number,
    window: int,
    sigma: Number,
    k1: Number,
    k2: Number,
) -> tuple[Array, Array | None]:
    """1 - SSIM of each image, and the images that have a kept window."""
    pred, target = prepare_images(where, pred=pred, target=target)
    check_window(window)
    check_sides(window, pred=pred)
    max_value, sigma, k1, k2 = numbers(pred, max_value=max_value, sigma=sigma, k1=k1, k2=k2)
    taps = gaussian_taps(window, sigma)
    luminance, structure = ssim_terms(
        pred, target, taps, (k1 * max_value) ** 2, (k2 * max_value) ** 2
    )
    kept = None if where is None else whole_windows(where, window)
    return jnp.mean(space_mean(_both(luminance, structure), kept), axis=-1), any_kept(kept)


def _both(a: Array, b: Array) -> Array:
    """`1 - (1 - a) (1 - b)` without cancellation."""
    return a + b - a * b


@compiled("window")
def ssim_map(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    max_value: Number = 1.0,
    window: int = 11,
    sigma: Number = 1.5,
    k1: Number = 0.01,
    k2: Number = 0.03,
) -> Array:
    r"""Structural similarity of each window and channel, as a picture of where images differ.

    Args:
        pred: Images `(batch, *space, channels)`, with any number of space axes.
        target: Same shape and range as `pred`.
        max_value: The range of the data: 1, 255, ...
        window: Pixels along each side of the window.
        sigma: Standard deviation of the window, in pixels.
        k1: Stabilises the luminance term.
        k2: Stabilises the contrast-structure term.

    Returns:
        `(batch, *windows, channels)` in float32, `window - 1` smaller along each space axis.

    Reference:
        Wang et al., Image quality assessment: from error visibility to structural similarity, IEEE
        TIP 2004.

    >>> images = jnp.ones((1, 12, 13, 3))
    >>> ssim_map(images, images).shape
    (1, 2, 3, 3)
    """
    pred, target = prepare_images(None, pred=pred, target=target)
    check_window(window)
    check_sides(window, pred=pred)
    max_value, sigma, k1, k2 = numbers(pred, max_value=max_value, sigma=sigma, k1=k1, k2=k2)
    taps = gaussian_taps(window, sigma)
    terms = ssim_terms(pred, target, taps, (k1 * max_value) ** 2, (k2 * max_value) ** 2)
    return 1 - _both(*terms)


@compiled("window")
def ms_ssim(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    max_value: Number = 1.0,
    window: int = 11,
    sigma: Number = 1.5,
    k1: Number = 0.01,
    k2: Number = 0.03,
    power: tuple[Number, ...] = POWER,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Multi-scale structural similarity, a score in `[0, 1]`: 1 for equal images.

    $$ \prod_{j < M} \max(0, \overline{cs}_j)^{w_j} \cdot
    \max(0, \overline{\operatorname{SSIM}}_M)^{w_M} $$

    of each channel, averaged over channels; `cs` is SSIM without its luminance factor, bars are
    means over windows, and each scale halves the one before by averages of 2 x 2 pixels. An odd
    side first repeats its first row. Where a factor is 0, so are the score and its gradient.

    Args:
        pred: Images `(batch, *space, channels)`, each side above `(window - 1) 2^(M - 1)`: 161
            pixels or more under the defaults.
        target: Same shape and range as `pred`; the score is symmetric.
        max_value: The range of the data: 1, 255, ...
        window: Pixels along each side of the window.
        sigma: Standard deviation of the window, in pixels.
        k1: Stabilises the luminance term.
        k2: Stabilises the contrast-structure term.
        power: The exponents w, one for each of the M scales, the finest first.
        where: Bool array `(batch, *space)`; a coarse pixel is kept only if all its pixels are, a
            window likewise, and an image only if it has a kept window at every scale.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Wang, Simoncelli and Bovik, Multi-scale structural similarity for image quality assessment,
        Asilomar 2003. Equals piq's `multi_scale_ssim` on square images, and pytorch-msssim's
        `ms_ssim` where every scale has even sides.

    >>> left, right = jnp.zeros((1, 6, 6, 1)), jnp.ones((1, 6, 6, 1))
    >>> ms_ssim(left, right, window=3, power=(0.5, 0.5), k1=1.0)  # sqrt(1 / 2) at the coarsest
    Array(0.7071068, dtype=float32)
    """
    lost, units = _lost_over_scales(
        pred, target, where, power, max_value=max_value, window=window, sigma=sigma, k1=k1, k2=k2
    )
    return reduce(1 - lost, where=units, weights=weights, reduction=reduction)


@compiled("window")
def ms_ssim_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    max_value: Number = 1.0,
    window: int = 11,
    sigma: Number = 1.5,
    k1: Number = 0.01,
    k2: Number = 0.03,
    power: tuple[Number, ...] = POWER,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Multi-scale structural dissimilarity, in `[0, 1]`.

    $$ \ell = 1 - \operatorname{MS-SSIM}(\hat y, y) $$

    Args:
        pred: Images `(batch, *space, channels)`, each side above `(window - 1) 2^(M - 1)`: 161
            pixels or more under the defaults.
        target: Same shape and range as `pred`.
        max_value: The range of the data: 1, 255, ...
        window: Pixels along each side of the window.
        sigma: Standard deviation of the window, in pixels.
        k1: Stabilises the luminance term.
        k2: Stabilises the contrast-structure term.
        power: The exponents, one for each of the M scales, the finest first.
        where: Bool array `(batch, *space)`; see `ms_ssim`.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Wang, Simoncelli and Bovik, Multi-scale structural similarity for image quality assessment,
        Asilomar 2003. Equals piq's `MultiScaleSSIMLoss` on square images. kornia's `MS_SSIMLoss` is
        another function: see `ms_ssim_l1_loss`.

    >>> left, right = jnp.zeros((1, 6, 6, 1)), jnp.ones((1, 6, 6, 1))
    >>> ms_ssim_loss(left, right, window=3, power=(0.5, 0.5), k1=1.0)  # 1 - sqrt(1 / 2)
    Array(0.2928932, dtype=float32)
    """
    lost, units = _lost_over_scales(
        pred, target, where, power, max_value=max_value, window=window, sigma=sigma, k1=k1, k2=k2
    )
    return reduce(lost, where=units, weights=weights, reduction=reduction)


def _lost_over_scales(
    pred: Array,
    target: Array,
    where: Where | None,
    power: tuple[Number, ...],
    *,
    window: int,
    **options: Number,
) -> tuple[Array, Array | None]:
    """1 - MS-SSIM of each image, and the images with a kept window at every scale."""
    pred, target = prepare_images(where, pred=pred, target=target)
    check_window(window)
    if not power:
        raise ValueError(message("power", "an exponent for each scale", repr(power)))
    check_sides((window - 1) * 2 ** (len(power) - 1) + 1, pred=pred)
    max_value, sigma, k1, k2 = numbers(pred, **options)
    powers = numbers(pred, **{f"power[{i}]": p for i, p in enumerate(power)})
    taps, c1, c2 = gaussian_taps(window, sigma), (k1 * max_value) ** 2, (k2 * max_value) ** 2
    units, log_score = None, jnp.zeros((), pred.dtype)
    dead = jnp.zeros((), bool)
    for scale, exponent in enumerate(powers):
        if scale:
            pred, target = halve(pred), halve(target)
            where = None if where is None else halve(where)
        luminance, structure = ssim_terms(pred, target, taps, c1, c2)
        last = scale == len(powers) - 1
        kept = None if where is None else whole_windows(where, window)
        lost = space_mean(_both(luminance, structure) if last else structure, kept)  # (b, c)
        gone = lost >= 1
        dead = dead | (gone & (exponent > 0))
        log_score = log_score + exponent * jnp.log1p(-jnp.where(gone, 0, lost))
        seen = any_kept(kept)
        units = seen if units is None or seen is None else units & seen
    lost = jnp.where(dead, 1, -expm1(jnp.where(dead, 0, log_score)))
    return jnp.mean(lost, axis=-1), units


@compiled("sigmas")
def ms_ssim_l1_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    max_value: Number = 1.0,
    alpha: Number = 0.025,
    scale: Number = 200.0,
    sigmas: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0),
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Structural dissimilarity under windows of several widths, mixed with the absolute error.

    $$ \ell = s \left( \alpha \Bigl(1 - \tfrac{1}{C} \sum_c l_M \prod_j cs_j \Bigr) +
    (1 - \alpha) \tfrac{1}{C} \sum_c \frac{G_M * |\hat y - y|}{L} \right) $$

    averaged over the windows. `l` and `cs` are the two factors of SSIM under a Gaussian window of
    each sigma, M is the widest; nothing is downsampled.

    Args:
        pred: Images `(batch, *space, channels)`, each side at least `4 max(sigmas) + 1` pixels: 33
            under the defaults.
        target: Same shape and range as `pred`.
        max_value: The range L of the data: 1, 255, ...
        alpha: The share of the structural term.
        scale: The factor s.
        sigmas: Standard deviations of the windows, in pixels.
        where: Bool array `(batch, *space)`; a window is kept only if all its pixels are.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Zhao et al., Loss functions for image restoration with neural networks, IEEE TCI 2017.
        Equals kornia's `MS_SSIMLoss` where no window leaves the image; the paper has `alpha=0.84`
        and `scale=1`.

    >>> left, right = jnp.zeros((1, 3, 3, 1)), jnp.ones((1, 3, 3, 1))
    >>> ms_ssim_l1_loss(left, right, alpha=0.0, scale=1.0, sigmas=(0.5,))
    Array(0.9999998, dtype=float32)
    """
    pred, target = prepare_images(where, pred=pred, target=target)
    if not isinstance(sigmas, tuple) or not sigmas or min(sigmas) <= 0:
        raise ValueError(message("sigmas", "a tuple of positive numbers", repr(sigmas)))
    window = 2 * math.floor(2 * max(sigmas)) + 1
    check_sides(window, pred=pred)
    max_value, alpha, scale = numbers(pred, max_value=max_value, alpha=alpha, scale=scale)
    c1, c2 = (0.01 * max_value) ** 2, (0.03 * max_value) ** 2
    taps = [gaussian_taps(window, jnp.asarray(s, pred.dtype)) for s in sorted(sigmas)]
    terms = [ssim_terms(pred, target, t, c1, c2) for t in taps]
    lost = functools.reduce(_both, [terms[-1][0], *[structure for _, structure in terms]])
    error = window_mean(absolute(pred - target), taps[-1]) / max_value
    values = scale * (alpha * lost + (1 - alpha) * error)
    kept = None if where is None else whole_windows(where, window)
    values = jnp.mean(space_mean(values, kept), axis=-1)
    return reduce(values, where=any_kept(kept), weights=weights, reduction=reduction)


_PAIR = dict(
    pred=draw_uniform("B H W C", 0, 1, kind="real"),
    target=draw_uniform("B H W C", 0, 1, kind="real"),
)
_VOLUME = dict(
    pred=draw_uniform("B H W D C", 0, 1, kind="real"),
    target=draw_uniform("B H W D C", 0, 1, kind="real"),
)
_OPTIONS = dict(window=3, sigma=0.75, max_value=2.0, k1=0.125, k2=0.25)
_SCALES = {**_OPTIONS, "k2": 4.0, "power": (0.375, 0.625)}
_SIZES = dict(H=5, W=6, C=2)

CASES = (
    Case(ssim, _PAIR, _OPTIONS, positions="B H W", sizes=_SIZES),
    Case(ssim_loss, _PAIR, _OPTIONS, positions="B H W", sizes=_SIZES, zero_at_target=True),
    Case(
        ssim_loss,
        _VOLUME,
        _OPTIONS,
        label="volume",
        positions="B H W D",
        sizes=dict(H=3, W=4, D=3, C=1),
        zero_at_target=True,
    ),
    Case(ms_ssim, _PAIR, _SCALES, positions="B H W", sizes=_SIZES),
    Case(ms_ssim_loss, _PAIR, _SCALES, positions="B H W", sizes=_SIZES, zero_at_target=True),
    Case(
        ms_ssim_l1_loss,
        _PAIR,
        dict(sigmas=(0.5, 1.0), max_value=2.0, alpha=0.25, scale=3.0),
        positions="B H W",
        sizes=_SIZES,
        zero_at_target=True,
    ),
)
