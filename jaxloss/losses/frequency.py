"""Losses between the spectra of images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal
from .._core.checks import check_float, check_min_rank, check_same_shape, check_shape, check_where
from .._core.compiled import compiled
from .._core.numerics import absolute, numbers, safe_div, safe_norm, safe_pow, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "fft_l1_loss",
    "focal_frequency_loss",
    "spectral_amplitude_loss",
]


@compiled()
def focal_frequency_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    alpha: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared distance of spectra, weighted by how badly each frequency is met, from 0.

    $$ \ell = \frac{1}{N} \sum_u w(u) |F(u)|^2, \quad
    w(u) = \left( \frac{|F(u)|}{\max_v |F(v)|} \right)^{\alpha} $$

    averaged over channels; F is the Fourier transform of `pred - target` over the space axes, of
    norm 1, and no gradient flows through the weights w. Equal images cost 0 with gradient 0.

    Args:
        pred: Images `(batch, *space, channels)` with one to three space axes.
        target: Same shape and range as `pred`; the loss is symmetric.
        alpha: How sharply the weights fall; 0 leaves the mean squared error.
        where: Bool array `(batch,)`: a spectrum knows no single pixels.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Jiang et al., Focal frequency loss for image reconstruction and synthesis, ICCV 2021. Equals
        the package `focal-frequency-loss` under its defaults.

    >>> pred, target = jnp.array([1.0, 0, 0, 0]).reshape(1, 4, 1), jnp.zeros((1, 4, 1))
    >>> focal_frequency_loss(pred, target)  # every frequency has |F|^2 = 1/4 and so w = 1
    Array(0.25, dtype=float32)
    """
    pred, target = _images(where, pred, target)
    (alpha,) = numbers(pred, alpha=alpha)
    size = safe_norm(_parts(jnp.fft.fftn, pred - target))
    space = tuple(range(1, size.ndim - 1))
    share = safe_div(size, jnp.broadcast_to(jnp.max(size, space, keepdims=True), size.shape))
    focus = jax.lax.stop_gradient(safe_pow(share, alpha))
    return _mean(focus * size**2, where, weights, reduction)


@compiled()
def fft_l1_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean absolute difference of spectra, over real and imaginary parts, from 0.

    $$ \ell = \frac{1}{2 N} \sum_u |\operatorname{Re} F(u)| + |\operatorname{Im} F(u)| $$

    averaged over channels; F is the Fourier transform of `pred - target` over the space axes, of
    norm 1, with the half of the last axis that a real image determines.

    Args:
        pred: Images `(batch, *space, channels)` with one to three space axes.
        target: Same shape and range as `pred`; the loss is symmetric.
        where: Bool array `(batch,)`: a spectrum knows no single pixels.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Cho et al., Rethinking coarse-to-fine approach in single image deblurring, ICCV 2021. Equals
        torch's `l1_loss` of the parts of `rfft2(norm="ortho")`.

    >>> pred, target = jnp.array([[2.0], [2.0]])[None], jnp.zeros((1, 2, 1))
    >>> fft_l1_loss(pred, target)  # parts 4 / sqrt(2), 0, 0, 0
    Array(0.70710677, dtype=float32)
    """
    pred, target = _images(where, pred, target)
    values = absolute(_parts(jnp.fft.rfftn, pred - target))
    return _mean(jnp.mean(values, axis=-1), where, weights, reduction)


@compiled()
def spectral_amplitude_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean squared difference of spectral amplitudes, blind to phase, from 0.

    $$ \ell = \frac{1}{N} \sum_u (|\hat F(u)| - |F(u)|)^2 $$

    averaged over channels; the Fourier transforms of both images over the space axes have norm 1.
    The gradient at an amplitude of 0 is 0.

    Args:
        pred: Images `(batch, *space, channels)` with one to three space axes.
        target: Same shape and range as `pred`; the loss is symmetric.
        where: Bool array `(batch,)`: a spectrum knows no single pixels.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Dhariwal et al., Jukebox: a generative model for music, arXiv 2005.00341, 2020. Equals
        MONAI's `JukeboxLoss` for one channel; MONAI transforms the channel axis too.

    >>> image = jnp.array([[0.0], [3.0]])[None]
    >>> spectral_amplitude_loss(image, image[:, ::-1])  # a shift changes phases only
    Array(0., dtype=float32)
    """
    pred, target = _images(where, pred, target)
    p, t = (_parts(jnp.fft.fftn, x) for x in (pred, target))
    # |p| - |t| without rounding where they are equal.
    gap = safe_div(jnp.sum((p - t) * (p + t), axis=-1), safe_norm(p) + safe_norm(t))
    return _mean(gap**2, where, weights, reduction)


def _images(where: Where | None, pred: Array, target: Array) -> tuple[Array, Array]:
    check_float(pred=pred)
    check_min_rank(3, pred=pred)
    check_same_shape(pred=pred, target=target)
    if where is not None:
        check_where(where)
        check_shape(pred.shape[:1], where=where)
    pred, target = mask(where, *widen(pred, target))
    return pred, target


def _parts(transform: Callable[..., Array], x: Array) -> Array:
    """Real and imaginary parts of the spectrum over the space axes, on a new last axis."""
    spectrum = transform(x, axes=tuple(range(1, x.ndim - 1)), norm="ortho")
    return jnp.stack([spectrum.real, spectrum.imag], axis=-1)


def _mean(
    values: Array, where: Where | None, weights: Values | None, reduction: Reduction
) -> Array:
    values = jnp.mean(values, axis=tuple(range(1, values.ndim)))
    return reduce(values, where=where, weights=weights, reduction=reduction)


_PAIR = dict(pred=draw_normal("B H W C"), target=draw_normal("B H W C"))
_SIZES = dict(H=4, W=5, C=2)

CASES = (
    Case(
        focal_frequency_loss,
        _PAIR,
        dict(alpha=1.5),
        positions="B",
        sizes=_SIZES,
        zero_at_target=True,
        without={"numerical": "no gradient flows through the weights of the frequencies"},
    ),
    Case(fft_l1_loss, _PAIR, positions="B", sizes=_SIZES, zero_at_target=True),
    Case(
        fft_l1_loss,
        dict(pred=draw_normal("B T C"), target=draw_normal("B T C")),
        label="signal",
        positions="B",
        zero_at_target=True,
    ),
    Case(
        spectral_amplitude_loss,
        _PAIR,
        positions="B",
        sizes=dict(H=4, W=4, C=2),
        zero_at_target=True,
    ),
)
