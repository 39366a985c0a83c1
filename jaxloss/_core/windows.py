"""Sliding windows over `batch *space channels` arrays: means, variances and SSIM of each window.

A window counts only where it lies wholly inside the image, so n pixels have n - window + 1 of them.
"""

import functools
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .checks import (
    check_float,
    check_min_rank,
    check_same_shape,
    check_shape,
    check_where,
    message,
)
from .numerics import safe_div, widen
from .reduce import mask
from .typing import Where

_Moments: TypeAlias = tuple[Array, ...]
BLOCK = 64  # outputs of one banded matrix product: bounds the work for each pixel


def prepare_images(where: Where | None, **images: Array) -> tuple[Array, ...]:
    """Check, mask and widen one or more images `batch *space channels` of equal shape."""
    first = next(iter(images))
    check_float(**{first: images[first]})
    check_min_rank(3, **{first: images[first]})
    check_same_shape(**images)
    if where is not None:
        check_where(where)
        check_shape(images[first].shape[:-1], where=where)
    return mask(where, *widen(*images.values()))


def check_window(window: int) -> None:
    """A window is a positive integer."""
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(message("window", "an integer", repr(window)))
    if window < 1:
        raise ValueError(message("window", "at least 1 pixel", window))


def check_sides(smallest: int, **images: Array) -> None:
    """No space axis of an image is shorter than `smallest`."""
    for name, image in images.items():
        if min(image.shape[1:-1]) < smallest:
            expected = f"sides of at least {smallest} pixels"
            raise ValueError(message(name, expected, f"shape {image.shape}"))


def gaussian_taps(window: int, sigma: Array) -> Array:
    """Gaussian weights of a window, with sum 1; `sigma`, in pixels, may be traced."""
    offset = jnp.arange(window, dtype=sigma.dtype) - (window - 1) / 2
    return jax.nn.softmax(-0.5 * (offset / sigma) ** 2)


def box_taps(window: int, like: Array) -> Array:
    """Equal weights of a window, with sum 1."""
    return jnp.full((window,), 1 / window, like.dtype)


def window_mean(x: Array, taps: Array) -> Array:
    """Weighted mean of each window, with the same `taps` along every space axis.

    `batch *space channels -> batch *windows channels`. One matrix product for each axis and block
    of pixels: on CPU several times faster than convolutions or sums of slices, backwards too.
    """
    for axis in range(1, x.ndim - 1):
        x = _along(x, taps, axis)
    return x


def _along(x: Array, taps: Array, axis: int) -> Array:
    halo = taps.shape[0] - 1
    outputs = x.shape[axis] - halo
    block = max(BLOCK, halo)
    if outputs <= block:
        return _product(x, taps, axis)
    blocks = math.ceil(outputs / block)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, (blocks + 1) * block - x.shape[axis])
    tiles = jnp.pad(x, padding).reshape(*before, blocks + 1, block, *after)
    take = lambda a, low, high, axis: jax.lax.slice_in_dim(a, low, high, axis=axis)
    ahead = take(take(tiles, 1, blocks + 1, axis), 0, halo, axis + 1)
    tiles = jnp.concatenate([take(tiles, 0, blocks, axis), ahead], axis + 1)
    means = _product(tiles, taps, axis + 1).reshape(*before, blocks * block, *after)
    return take(means, 0, outputs, axis)


def _product(x: Array, taps: Array, axis: int) -> Array:
    window, pixels = taps.shape[0], x.shape[axis]
    outputs = pixels - window + 1
    # Rows of pixels + 1 entries, laid end to end and cut into rows of pixels: each moves by one.
    row = jnp.pad(taps, (0, pixels + 1 - window))
    band = jnp.broadcast_to(row, (outputs, pixels + 1)).reshape(-1)
    band = jax.lax.slice_in_dim(band, 0, outputs * pixels).reshape(outputs, pixels)
    out = jax.lax.dot_general(band, x, (((1,), (axis,)), ((), ())), precision="highest")
    return jnp.moveaxis(out, 0, axis)


def center(x: Array) -> tuple[Array, Array]:
    """`x` minus the mean of its image and channel, and that mean: squares then lose few digits."""
    mean = jnp.mean(jax.lax.stop_gradient(x), tuple(range(1, x.ndim - 1)), keepdims=True)
    return x - mean, mean


def window_moments(x: Array, taps: Array) -> tuple[Array, Array]:
    """Mean and (biased) variance of each window; a variance is never negative."""
    x, shift = center(x)
    mean = window_mean(x, taps)
    variance = jax.nn.relu(window_mean(x * x, taps) - mean * mean)
    return mean + shift, variance


def ssim_terms(
    pred: Array, target: Array, taps: Array, c1: Array, c2: Array
) -> tuple[Array, Array]:
    """What each window lacks in luminance and in contrast-structure: SSIM is `(1 - l) (1 - c)`.

    In sum s and difference d of the images, `1 - l = (ms^2 - md^2 + 2 c1) / (ms^2 + md^2 + 2 c1)`
    and alike with variances: bounded by 1 whatever is rounded, four means instead of five, and
    exact for nearly equal images. Both terms are in [0, 2], and 0 where the windows are equal.
    """
    (mean_sum, var_sum), (mean_diff, var_diff) = (
        window_moments(a, taps) for a in (pred + target, pred - target)
    )
    mean_sum, mean_diff = mean_sum**2, mean_diff**2
    luminance = safe_div(2 * mean_diff, mean_sum + mean_diff + 2 * c1)
    return luminance, safe_div(2 * var_diff, var_sum + var_diff + 2 * c2)


def whole_windows(where: Array, window: int) -> Array:
    """Windows whose pixels are all kept: `batch *space -> batch *windows`, both bool."""
    hidden = (~where).astype(jnp.float32)[..., None]
    return window_mean(hidden, jnp.ones((window,), jnp.float32))[..., 0] == 0


def pad_reflect(x: Array, pixels: int) -> Array:
    """Mirror the space axes of `batch *space channels` at their first and last pixels."""
    widths = [(0, 0), *[(pixels, pixels)] * (x.ndim - 2), (0, 0)]
    return jnp.pad(x, widths, mode="reflect")


def space_mean(values: Array, kept: Array | None) -> Array:
    """Mean over the space axes of `batch *space channels`, where kept: `batch channels`."""
    axes = tuple(range(1, values.ndim - 1))
    if kept is None:
        return jnp.sum(values, axes) / max(math.prod(values.shape[1:-1]), 1)
    count = jnp.sum(kept, axes, dtype=values.dtype)[:, None]
    total = jnp.sum(jnp.where(kept[..., None], values, 0), axes)
    return safe_div(total, jnp.broadcast_to(count, total.shape))


def any_kept(*kept: Array | None) -> Array | None:
    """Images of which something is kept in one of the masks: `batch`."""
    found = [jnp.any(k, tuple(range(1, k.ndim))) for k in kept if k is not None]
    return functools.reduce(jnp.logical_or, found) if found else None


def shifted(x: Array, axis: int, *offsets: int) -> tuple[Array, ...]:
    """`x` moved back by each offset along an axis, cut to the pixels that all of them have."""
    size = x.shape[axis] - max(offsets)
    return tuple(jax.lax.slice_in_dim(x, k, k + size, axis=axis) for k in offsets)


def halve(x: Array) -> Array:
    """Means of 2 pixels along each space axis; an odd side first repeats its first row.

    `batch *space channels`, or a mask `batch *space`, of which both pixels must be kept.
    """
    join = jnp.logical_and if x.dtype == bool else lambda a, b: (a + b) / 2
    take = lambda a, axis, *bounds: jax.lax.slice_in_dim(a, *bounds, axis=axis)
    for axis in range(1, x.ndim - (x.dtype != bool)):
        if x.shape[axis] % 2:
            x = jnp.concatenate([take(x, axis, 0, 1), x], axis)
        x = join(take(x, axis, 0, None, 2), take(x, axis, 1, None, 2))
    return x


def box_moments(x: Array, y: Array, window: int) -> tuple[Array, Array, Array]:
    """Variances of `x` and of `y` and their covariance in each box window, all biased.

    Windows are merged from halves by the update of Chan, Golub and LeVeque (1983): nothing cancels,
    so a constant window has variance exactly 0, and n pixels take log n steps.
    """
    state: _Moments = (center(x)[0], center(y)[0], *[jnp.zeros_like(x)] * 3)
    for axis in range(1, x.ndim - 1):
        size, whole, count = 1, None, 0
        for bit in reversed(bin(window)[2:]):
            if bit == "1":
                whole = state if whole is None else _merged(whole, count, state, size, axis)
                count += size
            if count < window:
                state = _merged(state, size, state, size, axis)
                size *= 2
        state = whole or state
    return state[2], state[3], state[4]


def _merged(a: _Moments, count_a: int, b: _Moments, count_b: int, axis: int) -> _Moments:
    """Moments of windows of `count_a` pixels joined with those of `count_b` pixels behind them."""
    size = min(a[0].shape[axis], b[0].shape[axis] - count_a)
    cut = lambda x, low: jax.lax.slice_in_dim(x, low, low + size, axis=axis)
    a, b = tuple(cut(x, 0) for x in a), tuple(cut(x, count_a) for x in b)
    share = count_b / (count_a + count_b)
    mixed = [p + share * (q - p) for p, q in zip(a, b, strict=True)]
    dx, dy = b[0] - a[0], b[1] - a[1]
    spread = share * (1 - share)
    between = (spread * dx * dx, spread * dy * dy, spread * dx * dy)
    return (mixed[0], mixed[1], *[m + s for m, s in zip(mixed[2:], between, strict=True)])
