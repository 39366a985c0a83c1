"""Ratios of energies between waveforms, in the time domain."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal
from .._core.checks import check_float, check_min_rank, naming
from .._core.compiled import compiled
from .._core.numerics import numbers, safe_div, widen
from .._core.reduce import reduce
from .._core.typing import Number, Reduction, Values, Where
from .._core.waveforms import (
    any_sample,
    centered,
    decibels,
    energy,
    level,
    mean,
    prepare_waves,
    snr_values,
)

__all__ = [
    "dc_loss",
    "esr_loss",
    "pre_emphasis",
    "sd_sdr_loss",
    "si_sdr",
    "si_sdr_loss",
    "snr",
    "snr_loss",
]

Waves = Shaped[Array, "*items time"]


@compiled("zero_mean")
def si_sdr(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    zero_mean: bool = True,
    eps: Number = 1e-8,
    min_energy: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Scale-invariant signal-to-distortion ratio, a score in decibels: higher is better.

    $$ 10 \log_{10} \left( \frac{\lVert \alpha y \rVert^2}{\lVert \alpha y - \hat y \rVert^2
       + \epsilon} + \epsilon \right), \quad
       \alpha = \frac{\langle \hat y, y \rangle}{\lVert y \rVert^2 + \epsilon} $$

    A silent prediction or target is at -80 dB, for the default `eps`. Multiplying the prediction
    changes nothing but the weight of `eps`, which is not relative.

    Args:
        pred: Waveforms `(*items, time)`.
        target: Same shape as `pred`.
        zero_mean: Whether to take the mean over the kept samples off both first.
        eps: Bounds the ratio at both ends.
        min_energy: Items whose target, with the mean taken off if `zero_mean`, has less energy (sum
            of squares) are no units: silence teaches nothing.
        where: Bool array of the shape of `pred`; hidden samples count as deleted.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Le Roux et al., SDR: half-baked or well done?, ICASSP 2019. Equals torchmetrics'
        score of the same meaning but for the place of `eps`.

    >>> target = jnp.array([1.0, 1.0, -1.0, -1.0])
    >>> si_sdr(target + jnp.array([1.0, -1.0, 1.0, -1.0]) / 2, target)  # 10 log10(4 / 1)
    Array(6.0206, dtype=float32)
    """
    values, units = _si_sdr(pred, target, zero_mean, eps, min_energy, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled("zero_mean")
def si_sdr_loss(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    zero_mean: bool = True,
    eps: Number = 1e-8,
    min_energy: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative scale-invariant signal-to-distortion ratio, in decibels.

    $$ -10 \log_{10} \left( \frac{\lVert \alpha y \rVert^2}{\lVert \alpha y - \hat y \rVert^2
       + \epsilon} + \epsilon \right), \quad
       \alpha = \frac{\langle \hat y, y \rangle}{\lVert y \rVert^2 + \epsilon} $$

    A silent prediction or target is at +80 dB, for the default `eps`. Multiplying the prediction
    changes nothing but the weight of `eps`, which is not relative.

    Args:
        pred: Waveforms `(*items, time)`.
        target: Same shape as `pred`.
        zero_mean: Whether to take the mean over the kept samples off both first.
        eps: Bounds the ratio at both ends.
        min_energy: Items whose target, with the mean taken off if `zero_mean`, has less energy (sum
            of squares) are no units: silence teaches nothing.
        where: Bool array of the shape of `pred`; hidden samples count as deleted.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Le Roux et al., SDR: half-baked or well done?, ICASSP 2019. Equals auraloss's
        `SISDRLoss` and asteroid's negative SI-SDR.

    >>> target = jnp.array([1.0, 1.0, -1.0, -1.0])
    >>> si_sdr_loss(target + jnp.array([1.0, -1.0, 1.0, -1.0]) / 2, target)
    Array(-6.0206, dtype=float32)
    """
    values, units = _si_sdr(pred, target, zero_mean, eps, min_energy, where)
    return reduce(-values, where=units, weights=weights, reduction=reduction)


def _si_sdr(
    pred: Array,
    target: Array,
    zero_mean: bool,
    eps: Number,
    min_energy: Number,
    where: Where | None,
) -> tuple[Array, Array | None]:
    pred, target = _prepare(where, pred, target, zero_mean)
    eps, least = numbers(pred, eps=eps, min_energy=min_energy)
    units = any_sample(where)
    if not (isinstance(min_energy, (int, float)) and min_energy <= 0):
        enough = jax.lax.stop_gradient(energy(target)) >= least
        units = enough if units is None else units & enough
    pred, unit, signal = _projected(pred, target, eps)
    return decibels(energy(signal), energy(signal - pred), eps, unit), units


def _prepare(
    where: Where | None, pred: Array, target: Array, zero_mean: bool
) -> tuple[Array, Array]:
    pred, target = prepare_waves(where, pred, target)
    return (centered(pred, where), centered(target, where)) if zero_mean else (pred, target)


def _projected(pred: Array, target: Array, eps: Array) -> tuple[Array, Array, Array]:
    """The prediction in multiples of a unit, that unit, and what of it lies along the target."""
    unit, scale = level(pred), level(target)
    pred, target = pred / unit[..., None], target / scale[..., None]
    gain = safe_div(jnp.sum(pred * target, axis=-1), energy(target) + eps / scale / scale)
    return pred, unit, gain[..., None] * target


@compiled("zero_mean")
def snr(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    zero_mean: bool = True,
    eps: Number = 1e-8,
    soft_max: Number | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Signal-to-noise ratio, a score in decibels: higher is better.

    $$ 10 \log_{10} \left( \frac{\lVert y \rVert^2}{\lVert y - \hat y \rVert^2
       + \tau \lVert y \rVert^2 + \epsilon} + \epsilon \right), \quad
       \tau = 10^{-\text{soft\_max} / 10} $$

    with $\tau = 0$ by default.

    Args:
        pred: Waveforms `(*items, time)`.
        target: Same shape as `pred`.
        zero_mean: Whether to take the mean over the kept samples off both first.
        eps: Bounds the ratio at both ends.
        soft_max: A share of the signal this many decibels below it counts as noise too, so that
            items near this ratio lose their pull on a model; none if None.
        where: Bool array of the shape of `pred`; hidden samples count as deleted.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Le Roux et al., SDR: half-baked or well done?, ICASSP 2019. The bound:
        Wisdom et al., Unsupervised sound separation using mixture invariant training, NeurIPS 2020.

    >>> snr(jnp.array([0.5, -0.5]), jnp.array([1.0, -1.0]))  # 10 log10(2 / 0.5)
    Array(6.0206, dtype=float32)
    """
    values = _snr(pred, target, zero_mean, eps, soft_max, where)
    return reduce(values, where=any_sample(where), weights=weights, reduction=reduction)


@compiled("zero_mean")
def snr_loss(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    zero_mean: bool = True,
    eps: Number = 1e-8,
    soft_max: Number | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative signal-to-noise ratio, in decibels.

    $$ -10 \log_{10} \left( \frac{\lVert y \rVert^2}{\lVert y - \hat y \rVert^2
       + \tau \lVert y \rVert^2 + \epsilon} + \epsilon \right), \quad
       \tau = 10^{-\text{soft\_max} / 10} $$

    with $\tau = 0$ by default.

    Args:
        pred: Waveforms `(*items, time)`.
        target: Same shape as `pred`.
        zero_mean: Whether to take the mean over the kept samples off both first.
        eps: Bounds the ratio at both ends.
        soft_max: A share of the signal this many decibels below it counts as noise too, so that
            items near this ratio lose their pull on a model; none if None.
        where: Bool array of the shape of `pred`; hidden samples count as deleted.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Le Roux et al., SDR: half-baked or well done?, ICASSP 2019. Equals auraloss's
        `SNRLoss` without `soft_max`, for which see Wisdom et al., Unsupervised sound separation
        using mixture invariant training, NeurIPS 2020.

    >>> snr_loss(jnp.array([0.5, -0.5]), jnp.array([1.0, -1.0]))
    Array(-6.0206, dtype=float32)
    >>> snr_loss(jnp.array([8.0, -8.0]), jnp.array([8.0, -8.0]), soft_max=20.0)
    Array(-20., dtype=float32)
    """
    values = _snr(pred, target, zero_mean, eps, soft_max, where)
    return reduce(-values, where=any_sample(where), weights=weights, reduction=reduction)


def _snr(
    pred: Array,
    target: Array,
    zero_mean: bool,
    eps: Number,
    soft_max: Number | None,
    where: Where | None,
) -> Array:
    pred, target = _prepare(where, pred, target, zero_mean)
    (eps,) = numbers(pred, eps=eps)
    if soft_max is None:
        return snr_values(pred, target, eps)
    (soft_max,) = numbers(pred, soft_max=soft_max)
    return snr_values(pred, target, eps, 10 ** (-soft_max / 10))


@compiled("zero_mean")
def sd_sdr_loss(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    zero_mean: bool = True,
    eps: Number = 1e-8,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative scale-dependent signal-to-distortion ratio, in decibels.

    $$ -10 \log_{10} \left( \frac{\lVert \alpha y \rVert^2}{\lVert y - \hat y \rVert^2
       + \epsilon} + \epsilon \right), \quad
       \alpha = \frac{\langle \hat y, y \rangle}{\lVert y \rVert^2 + \epsilon} $$

    Args:
        pred: Waveforms `(*items, time)`.
        target: Same shape as `pred`.
        zero_mean: Whether to take the mean over the kept samples off both first.
        eps: Bounds the ratio at both ends.
        where: Bool array of the shape of `pred`; hidden samples count as deleted.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Le Roux et al., SDR: half-baked or well done?, ICASSP 2019. Equals auraloss's `SDSDRLoss`.

    >>> sd_sdr_loss(jnp.array([0.5, -0.5]), jnp.array([1.0, -1.0]))  # alpha is 1/2: 0.5 over 0.5
    Array(-0., dtype=float32)
    """
    pred, target = _prepare(where, pred, target, zero_mean)
    (eps,) = numbers(pred, eps=eps)
    scaled, unit, signal = _projected(pred, target, eps)
    whole = jnp.maximum(unit, level(target))
    ratio = (unit / whole)[..., None]
    error = target / whole[..., None] - ratio * scaled
    values = -decibels(energy(ratio * signal), energy(error), eps, whole)
    return reduce(values, where=any_sample(where), weights=weights, reduction=reduction)


@compiled()
def esr_loss(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    eps: Number = 1e-8,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Error-to-signal ratio, the energy of the error over that of the target, from 0.

    $$ \ell = \frac{\sum_t (y_t - \hat y_t)^2}{\sum_t y_t^2 + \epsilon} $$

    Args:
        pred: Waveforms `(*items, time)`.
        target: Same shape as `pred`.
        eps: Added to the energy of the target.
        where: Bool array of the shape of `pred`; hidden samples count as deleted.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Wright and Välimäki, Perceptual loss function for neural modeling of audio systems, ICASSP
        2020, after `pre_emphasis`. Equals auraloss's `ESRLoss`.

    >>> esr_loss(jnp.array([0.5, -1.0]), jnp.array([1.0, -1.0]))  # 0.25 / 2
    Array(0.125, dtype=float32)
    """
    pred, target = prepare_waves(where, pred, target)
    (eps,) = numbers(pred, eps=eps)
    target, error, eps = _error(pred, target, eps)
    values = _over(energy(error), energy(target) + eps)
    return reduce(values, where=any_sample(where), weights=weights, reduction=reduction)


@compiled()
def dc_loss(
    pred: Float[Array, "*items time"],
    target: Waves,
    *,
    eps: Number = 1e-8,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared offset of the error over the mean square of the target, from 0.

    $$ \ell = \frac{\left( \frac{1}{T} \sum_t y_t - \hat y_t \right)^2}
       {\frac{1}{T} \sum_t y_t^2 + \epsilon} $$

    Args:
        pred: Waveforms `(*items, time)`.
        target: Same shape as `pred`.
        eps: Added to the mean square of the target.
        where: Bool array of the shape of `pred`; hidden samples count as deleted.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Wright and Välimäki, Perceptual loss function for neural modeling of audio systems, ICASSP
        2020. Equals auraloss's `DCLoss`.

    >>> dc_loss(jnp.array([1.5, -0.5]), jnp.array([1.0, -1.0]))  # 0.5^2 / 1
    Array(0.25, dtype=float32)
    """
    pred, target = prepare_waves(where, pred, target)
    (eps,) = numbers(pred, eps=eps)
    target, error, eps = _error(pred, target, eps)
    values = _over(mean(error, where) ** 2, mean(target * target, where) + eps)
    return reduce(values, where=any_sample(where), weights=weights, reduction=reduction)


def _error(pred: Array, target: Array, eps: Array) -> tuple[Array, Array, Array]:
    """Target, error and `eps` in a unit whose square is a float."""
    unit = jnp.maximum(level(pred), level(target))
    target = target / unit[..., None]
    return target, target - pred / unit[..., None], eps / unit / unit


def _over(error: Array, signal: Array) -> Array:
    return error / jnp.maximum(signal, jnp.finfo(signal.dtype).tiny)


def pre_emphasis(
    x: Float[Array, "*items time"], *, coefficient: Number = 0.97
) -> Float[Array, "*items time"]:
    r"""Waveforms with their high frequencies raised: a filter before a loss, not a loss.

    $$ y_0 = x_0, \quad y_t = x_t - c\, x_{t-1} $$

    Args:
        x: Waveforms.
        coefficient: How much c of the last sample is taken off.

    Returns:
        Waveforms of the shape of `x`, in float32.

    Reference:
        Wright and Välimäki, Perceptual loss function for neural modeling of audio systems, ICASSP
        2020, with 0.85 there. Equals scipy's `lfilter([1, -c], 1, x)`. auraloss's
        `FIRFilter("hp")` runs over time reversed.

    >>> pre_emphasis(jnp.array([1.0, 1.0, 3.0]), coefficient=0.5)
    Array([1. , 0.5, 2.5], dtype=float32)
    """
    with naming("pre_emphasis"):
        check_float(x=x)
        check_min_rank(1, x=x)
        (x,) = widen(x)
        (coefficient,) = numbers(x, coefficient=coefficient)
    last = jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., :-1]], axis=-1)
    return x - coefficient * last


_PAIR = dict(pred=draw_normal("B T", scale=2.0), target=draw_normal("B T"))
_TIME = dict(T=7)

CASES = (
    Case(
        si_sdr,
        _PAIR,
        dict(zero_mean=False, eps=1e-6, min_energy=0.01),
        positions="B T",
        sizes=_TIME,
    ),
    Case(si_sdr_loss, _PAIR, positions="B T", sizes=_TIME),
    Case(snr, _PAIR, positions="B T", sizes=_TIME),
    Case(
        snr_loss,
        _PAIR,
        dict(zero_mean=False, eps=1e-6, soft_max=15.0),
        positions="B T",
        sizes=_TIME,
        minimum=True,
    ),
    Case(sd_sdr_loss, _PAIR, dict(eps=1e-6), positions="B T", sizes=_TIME),
    Case(esr_loss, _PAIR, dict(eps=1e-3), positions="B T", sizes=_TIME, zero_at_target=True),
    Case(dc_loss, _PAIR, dict(eps=1e-3), positions="B T", sizes=_TIME, zero_at_target=True),
)
