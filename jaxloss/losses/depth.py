"""Depth maps: logarithmic errors, and errors that do not depend on scale and shift."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal, draw_uniform
from .._core.checks import (
    check_float,
    check_same_shape,
    check_shape,
    check_where,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison
from .._core.numerics import absolute, numbers, safe_div, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "align_scale_shift",
    "berhu_loss",
    "log_depth_error",
    "scale_invariant_log_error",
    "scale_shift_invariant_absolute_error",
    "scale_shift_invariant_loss",
    "silog_loss",
]


@compiled()
def silog_loss(
    pred: Float[Array, "batch height width"],
    target: Shaped[Array, "batch height width"],
    *,
    variance_focus: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Scale-invariant logarithmic error of each image, from 0 up; it has no unit.

    $$ \ell = \sqrt{\tfrac{1}{N} \sum_i d_i^2 - \lambda \left( \tfrac{1}{N} \sum_i d_i \right)^2},
       \qquad d = \log \hat y - \log y $$

    over the kept pixels. At $\lambda = 1$ it is the standard deviation of $d$, which a factor on
    all predictions does not change. A kept depth that is not positive makes its image NaN; the
    gradient of a perfect image is 0.

    Args:
        pred: Predicted depths above 0.
        target: Measured depths above 0, in the same unit; `where` hides invalid pixels.
        variance_focus: $\lambda$, at most 1: how much of the error in scale is forgiven.

    One unit per image; see `jaxloss.reduce`. To pool the pixels of a batch, reshape it to one
    image.

    Returns:
        A float32 scalar, or `batch` if `reduction` is `"none"`.

    Reference:
        Eigen et al., Depth Map Prediction from a Single Image using a Multi-Scale Deep Network,
        NIPS 2014, without the root; Lee et al., From Big to Small: Multi-Scale Local Planar
        Guidance for Monocular Depth Estimation, arXiv 2019, whose code multiplies by 10, with 0.85
        and all pixels of the batch pooled. mmsegmentation's `SiLogLoss` adds 1e-6 to the depths.

    >>> pred, target = jnp.array([[[1.0, 4.0]]]), jnp.array([[[1.0, 1.0]]])
    >>> silog_loss(pred, target, variance_focus=1.0)  # the deviation of 0 and log 4: log 2
    Array(0.6931472, dtype=float32)
    """
    mean, variance, units = _log_moments(pred, target, where)
    (focus,) = numbers(mean, variance_focus=variance_focus)
    values = safe_sqrt(variance + (1 - focus) * mean**2)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def scale_invariant_log_error(
    pred: Float[Array, "batch height width"],
    target: Shaped[Array, "batch height width"],
    *,
    variance_focus: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Scale-invariant squared logarithmic error of each image, from 0 up; it has no unit.

    $$ \ell = \tfrac{1}{N} \sum_i d_i^2 - \lambda \left( \tfrac{1}{N} \sum_i d_i \right)^2,
       \qquad d = \log \hat y - \log y $$

    over the kept pixels: the square of `silog_loss`.

    Args:
        pred: Predicted depths above 0.
        target: Measured depths above 0, in the same unit; `where` hides invalid pixels.
        variance_focus: $\lambda$: 1 forgives any error in scale, 0 none.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `batch` if `reduction` is `"none"`.

    Reference:
        Eigen et al., Depth Map Prediction from a Single Image using a Multi-Scale Deep Network,
        NIPS 2014.

    >>> pred, target = jnp.array([[[1.0, 4.0]]]), jnp.array([[[1.0, 1.0]]])
    >>> scale_invariant_log_error(pred, target, variance_focus=1.0)  # (log 2)^2
    Array(0.480453, dtype=float32)
    """
    mean, variance, units = _log_moments(pred, target, where)
    (focus,) = numbers(mean, variance_focus=variance_focus)
    values = variance + (1 - focus) * mean**2
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def log_depth_error(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared difference of the logarithms of two depths, from 0 up; it has no unit.

    $$ \ell = (\log \hat y - \log y)^2 $$

    A depth of 0 costs infinity and a negative one is NaN, in its own unit alone.

    Args:
        pred: Predicted depths above 0.
        target: Measured depths above 0, in the same unit; `where` hides invalid pixels.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Eigen et al., Depth Map Prediction from a Single Image using a Multi-Scale Deep Network,
        NIPS 2014, whose "RMSE (log)" is its root. `squared_logarithmic_error` adds 1 to both.

    >>> log_depth_error(jnp.array([4.0]), jnp.array([2.0]))  # (log 2)^2
    Array(0.480453, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target), fill=1)
    require(lambda: pred > 0, "pred", "positive depths", where)
    require(lambda: target > 0, "target", "positive depths", where)
    values = _log_ratio(pred, target) ** 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def scale_shift_invariant_loss(
    pred: Float[Array, "batch height width"],
    target: Shaped[Array, "batch height width"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Half the mean squared error after the best scale and shift, in the target's unit squared.

    $$ \ell = \frac{1}{2 N} \sum_i (s \hat y_i + t - y_i)^2, \qquad
       (s, t) = \arg\min \sum_i (s \hat y_i + t - y_i)^2 $$

    over the kept pixels; the gradient flows through the fit. A prediction that is constant but for
    rounding, or fewer than two kept pixels, have scale 0 and the mean target as shift.

    Args:
        pred: Predicted disparities or depths, up to scale and shift.
        target: Measured ones of the same shape; `where` hides invalid pixels.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `batch` if `reduction` is `"none"`.

    Reference:
        Ranftl et al., Towards Robust Monocular Depth Estimation: Mixing Datasets for Zero-shot
        Cross-dataset Transfer, TPAMI 2020. Half of what NumPy's `linalg.lstsq` leaves, over the
        number of pixels. MiDaS' code skips an image only if its system is exactly singular.

    >>> pred, target = jnp.array([[[1.0, 2.0, 3.0]]]), jnp.array([[[5.0, 8.0, 5.0]]])
    >>> scale_shift_invariant_loss(pred, target)  # fits 6, so (1 + 4 + 1) / 6
    Array(1., dtype=float32)
    """
    pred, target, kept = _pixels(pred, target, where)
    fit, _, error = _fit(pred, target, kept)
    count = jnp.sum(kept, axis=-1, dtype=fit.dtype)
    values = safe_div(jnp.sum((fit - error) ** 2, axis=-1), 2 * count)
    return reduce(values, where=count > 0, weights=weights, reduction=reduction)


@compiled()
def scale_shift_invariant_absolute_error(
    pred: Float[Array, "batch height width"],
    target: Shaped[Array, "batch height width"],
    *,
    trim: Number = 0.2,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Trimmed absolute error after robust alignment of both sides, from 0 up; it has no unit.

    $$ \ell = \frac{1}{2 N} \sum_{i \in U} |a(\hat y)_i - a(y)_i|, \qquad
       a(x) = \frac{x - \mathrm{median}(x)}{\frac{1}{N} \sum_i |x_i - \mathrm{median}(x)|} $$

    over the $\lfloor (1 - \text{trim}) N \rfloor$ kept pixels $U$ of smallest error. The median of
    an even count is the mean of the two middle values. A side that is constant but for rounding
    becomes 0.

    Args:
        pred: Predicted disparities or depths, up to a positive scale and a shift.
        target: Measured ones of the same shape; `where` hides invalid pixels.
        trim: Share of the pixels, those of largest error, that does not count.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `batch` if `reduction` is `"none"`.

    Reference:
        Ranftl et al., Towards Robust Monocular Depth Estimation: Mixing Datasets for Zero-shot
        Cross-dataset Transfer, TPAMI 2020: "SSITrim". torch's median takes the lower middle value.

    >>> pred, target = jnp.array([[[0.0, 1.0, 2.0]]]), jnp.array([[[0.0, 1.0, 8.0]]])
    >>> scale_shift_invariant_absolute_error(pred, target, trim=0.0)  # (1.125 + 0 + 1.125) / 6
    Array(0.375, dtype=float32)
    """
    pred, target, kept = _pixels(pred, target, where)
    (trim,) = numbers(pred, trim=trim)
    require(lambda: (trim >= 0) & (trim < 1), "trim", "a share in [0, 1)")
    count = jnp.sum(kept, axis=-1, dtype=pred.dtype)
    pred, target = _robust(pred, kept), _robust(target, kept)
    rounding = 4 * jnp.finfo(pred.dtype).eps * jnp.abs(target)  # its sign would be noise
    equal = jnp.abs(pred - target) <= rounding
    error = jnp.where(equal, 0, absolute(pred - target))
    # A share of pixels that is a whole number but for rounding is that number.
    chosen = jnp.floor((1 - trim) * count + 1e-3)
    values = safe_div(_sum_of_smallest(error, kept, chosen), 2 * count)
    return reduce(values, where=count > 0, weights=weights, reduction=reduction)


@compiled()
def align_scale_shift(
    pred: Float[Array, "batch height width"],
    target: Shaped[Array, "batch height width"],
    *,
    where: Where | None = None,
) -> Array:
    r"""The prediction with the scale and shift of each image that fit the target best.

    $$ s \hat y + t, \qquad (s, t) = \arg\min \sum_i (s \hat y_i + t - y_i)^2 $$

    over the kept pixels. Hidden pixels, and whole images whose prediction is constant but for
    rounding, get the mean of the kept targets.

    Args:
        pred: Predicted disparities or depths, up to scale and shift.
        target: Measured ones of the same shape.
        where: Bool array of the same shape: the pixels of the fit.

    Returns:
        Aligned predictions, `batch height width`.

    >>> align_scale_shift(jnp.array([[[1.0, 2.0, 3.0]]]), jnp.array([[[7.0, 9.0, 11.0]]]))
    Array([[[ 7.,  9., 11.]]], dtype=float32)
    """
    shape = pred.shape
    pred, target, kept = _pixels(pred, target, where)
    fit, mean, _ = _fit(pred, target, kept)
    return (fit + mean).reshape(shape)


@compiled()
def berhu_loss(
    pred: Float[Array, "batch height width"],
    target: Shaped[Array, "batch height width"],
    *,
    threshold: Number = 0.2,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Reverse Huber: absolute value of small errors, square of large ones, in the target's unit.

    $$ \ell = \frac{1}{N} \sum_i \begin{cases} |e_i| & |e_i| \le c \\
       \frac{e_i^2 + c^2}{2 c} & \text{otherwise} \end{cases} \qquad
       c = \text{threshold} \cdot \max_i |e_i|, \quad e = \hat y - y $$

    over the kept pixels. The gradient takes the largest error as given and is 0 where the error
    is 0.

    Args:
        pred: Predicted depths.
        target: Measured depths of the same shape; `where` hides invalid pixels.
        threshold: Share above 0 of the largest error of the image at which the square begins.

    One unit per image; see `jaxloss.reduce`. For the largest error of a batch, as in the original,
    reshape it to one image.

    Returns:
        A float32 scalar, or `batch` if `reduction` is `"none"`.

    Reference:
        Laina et al., Deeper Depth Prediction with Fully Convolutional Residual Networks, 3DV 2016.

    >>> berhu_loss(jnp.array([[[1.0, 4.0]]]), jnp.zeros((1, 1, 2)), threshold=0.5)  # (1 + 5) / 2
    Array(3., dtype=float32)
    """
    pred, target, kept = _pixels(pred, target, where)
    (threshold,) = numbers(pred, threshold=threshold)
    require(lambda: threshold > 0, "threshold", "a positive value")
    size = absolute(pred - target)
    largest = jnp.max(jax.lax.stop_gradient(size), axis=-1, keepdims=True, initial=0)
    corner = jnp.broadcast_to(threshold * largest, size.shape)
    far = (size > corner) & (corner > 0)
    beyond = jnp.where(far, size, 0)
    square = 0.5 * (beyond * (beyond / jnp.where(far, corner, 1)) + corner)
    count = jnp.sum(kept, axis=-1, dtype=pred.dtype)
    values = safe_div(jnp.sum(jnp.where(far, square, size), axis=-1), count)
    return reduce(values, where=count > 0, weights=weights, reduction=reduction)


def _pixels(
    pred: Array, target: Any, where: Where | None, *, fill: float = 0
) -> tuple[Array, Array, Array]:
    """Checked, masked and widened maps with one axis of pixels, and which of those are kept."""
    check_float(pred=pred)
    if pred.ndim != 3:
        raise ValueError(message("pred", "shape (batch, height, width)", pred.shape))
    check_same_shape(pred=pred, target=target)
    if where is None:
        where = jnp.ones(pred.shape, bool)
    check_where(where)
    check_shape(pred.shape, where=where)
    pred, target = mask(where, *widen(pred, target), fill=fill)
    flat = lambda x: jnp.asarray(x).reshape(pred.shape[0], pred.shape[1] * pred.shape[2])
    return flat(pred), flat(target), flat(where)


def _mean(x: Array, kept: Array) -> Array:
    """Mean over the kept pixels, where `x` is 0 at the others."""
    count = jnp.sum(kept, axis=-1, keepdims=True, dtype=x.dtype)
    return safe_div(jnp.sum(x, axis=-1, keepdims=True), count)


def _log_ratio(pred: Array, target: Array) -> Array:
    """log(pred / target) with every digit where they are alike, and without overflow."""
    near = jnp.abs(pred - target) < 0.5 * target
    excess = safe_div(jnp.where(near, pred - target, 0), jnp.where(near, target, 1))
    apart = jnp.log(jnp.where(near, 1, pred)) - jnp.log(jnp.where(near, 1, target))
    return jnp.where(near, jnp.log1p(excess), apart)


def _log_moments(pred: Array, target: Any, where: Where | None) -> tuple[Array, Array, Array]:
    """Mean and variance of the logarithmic error of each image, and which images have pixels."""
    pred, target, kept = _pixels(pred, target, where, fill=1)
    require(lambda: pred > 0, "pred", "positive depths", kept)
    require(lambda: target > 0, "target", "positive depths", kept)
    error = _log_ratio(pred, target)
    mean = _mean(error, kept)
    variance = _mean(jnp.where(kept, error - mean, 0) ** 2, kept)
    return mean[:, 0], variance[:, 0], jnp.any(kept, axis=-1)


def _is_constant(spread: Array, x: Array) -> Array:
    """Whether a spread of `x` is but rounding."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    return (spread <= 4 * jnp.finfo(x.dtype).eps * largest) & jnp.isfinite(largest)


def _fit(pred: Array, target: Array, kept: Array) -> tuple[Array, Array, Array]:
    """Best fit less the mean target, that mean, and the target less it; 0 at hidden pixels."""
    mean = _mean(target, kept)
    p = jnp.where(kept, pred - _mean(pred, kept), 0)
    y = jnp.where(kept, target - mean, 0)
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(p)), axis=-1, keepdims=True, initial=0)
    constant = _is_constant(size, pred)
    p = jnp.where(constant, 0, p) / jnp.where(constant, 1, size)
    total = lambda x: jnp.sum(x, axis=-1, keepdims=True)
    return safe_div(total(p * y), total(p * p)) * p, mean, y


def _robust(x: Array, kept: Array) -> Array:
    """Kept pixels about their median, over their mean absolute deviation from it."""
    error = jnp.where(kept, x - _median(x, kept), 0)
    scale = _mean(absolute(error), kept)
    constant = _is_constant(scale, x)
    scale = poison(scale, jnp.isfinite(scale))
    return jnp.where(constant, 0, error) / jnp.where(constant, 1, scale)


def _median(x: Array, kept: Array) -> Array:
    """Median of the kept pixels: the mean of the two middle values if their count is even."""
    ordered = _sorted(x, kept)
    count = jnp.sum(kept, axis=-1)
    low, high = (_ordered_at(ordered, i, x, kept) for i in ((count - 1) // 2, count // 2))
    return 0.5 * low + 0.5 * high


def _sum_of_smallest(x: Array, kept: Array, count: Array) -> Array:
    """Sum of the `count` smallest kept pixels; equal ones share the gradient."""
    last = _ordered_at(_sorted(x, kept), count.astype(jnp.int32) - 1, x, kept)
    below = kept & (x < last)
    rest = count - jnp.sum(below, axis=-1, dtype=x.dtype)
    return jnp.sum(jnp.where(below, x, 0), axis=-1) + rest * last[:, 0]


def _sorted(x: Array, kept: Array) -> Array:
    return jnp.sort(jax.lax.stop_gradient(jnp.where(kept, x, jnp.inf)), axis=-1)


def _ordered_at(ordered: Array, index: Array, x: Array, kept: Array) -> Array:
    """The entry of that index in ascending order, with its gradient; 0 outside."""
    place = jax.lax.broadcasted_iota(index.dtype, ordered.shape, 1)
    value = jnp.sum(jnp.where(place == index[:, None], ordered, 0), axis=-1, keepdims=True)
    same = kept & (x == value)
    return value + _mean(jnp.where(same, x - jax.lax.stop_gradient(x), 0), same)


_DEPTHS = dict(pred=draw_uniform("B H W", 0.5, 5), target=draw_uniform("B H W", 0.5, 5))
_DISPARITIES = dict(pred=draw_normal("B H W"), target=draw_normal("B H W"))
_SIZES = dict(H=3, W=4)

CASES = (
    Case(
        silog_loss,
        _DEPTHS,
        dict(variance_focus=0.85),
        positions="B H W",
        sizes=_SIZES,
        zero_at_target=True,
    ),
    Case(
        scale_invariant_log_error,
        _DEPTHS,
        dict(variance_focus=0.85),
        positions="B H W",
        sizes=_SIZES,
        zero_at_target=True,
    ),
    Case(log_depth_error, _DEPTHS, sizes=_SIZES, zero_at_target=True),
    Case(scale_shift_invariant_loss, _DISPARITIES, positions="B H W", sizes=_SIZES),
    Case(
        scale_shift_invariant_absolute_error,
        _DISPARITIES,
        dict(trim=0.3),
        positions="B H W",
        sizes=_SIZES,
        zero_at_target=True,
    ),
    Case(
        berhu_loss,
        _DISPARITIES,
        dict(threshold=0.4),
        positions="B H W",
        sizes=_SIZES,
        zero_at_target=True,
        without={"numerical": "the largest error is held fixed in the gradient"},
    ),
)
