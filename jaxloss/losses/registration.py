"""Losses of image registration: similarity of the warped image, smoothness of the displacement."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal, draw_unit
from .._core.checks import check_last, message
from .._core.compiled import compiled
from .._core.numerics import horner, numbers, safe_div, xlogx
from .._core.reduce import reduce
from .._core.typing import Number, Reduction, Values, Where
from .._core.windows import (
    any_kept,
    box_moments,
    check_sides,
    check_window,
    prepare_images,
    shifted,
    space_mean,
    whole_windows,
)

__all__ = [
    "bending_energy",
    "diffusion_energy",
    "local_ncc_loss",
    "mutual_information_loss",
    "normalized_mutual_information_loss",
]


@compiled("window")
def local_ncc_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    window: int = 9,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Local normalised cross-correlation, squared and negated, in `[-1, 0]`.

    $$ \ell = -\frac{1}{W} \sum_w
    \frac{c_w^2}{\max(v_w^p, 10^{-5}) \max(v_w^t, 10^{-5})}, \quad
    c_w = \sum_{i \in w} (p_i - \bar p_w)(t_i - \bar t_w) $$

    over box windows and channels, v being c of an image with itself. -1 where one image is a linear
    function of the other in every window, whatever its sign; a constant window counts 0.

    Args:
        pred: Images `(batch, *space, channels)`, with any number of space axes.
        target: Same shape as `pred`, not necessarily the same range; the loss is symmetric.
        window: Pixels along each side of the window.
        where: Bool array `(batch, *space)`; a window is kept only if all its pixels are.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Avants et al., Symmetric diffeomorphic image registration with cross-correlation, Medical
        Image Analysis 2008; Balakrishnan et al., VoxelMorph, IEEE TMI 2019. Equals MONAI's
        `LocalNormalizedCrossCorrelationLoss` where no window leaves the image; its default window
        is 3.

    >>> images = jnp.array([[1.0], [3.0], [2.0]])[None]
    >>> local_ncc_loss(images, 5 - 2 * images, window=3)
    Array(-1., dtype=float32)
    """
    pred, target = prepare_images(where, pred=pred, target=target)
    check_window(window)
    check_sides(window, pred=pred)
    pixels = window ** (pred.ndim - 2)
    var_pred, var_target, cross = (pixels * m for m in box_moments(pred, target, window))
    values = (cross / jnp.maximum(var_pred, 1e-5)) * (cross / jnp.maximum(var_target, 1e-5))
    kept = None if where is None else whole_windows(where, window)
    values = -jnp.mean(space_mean(values, kept), axis=-1)
    return reduce(values, where=any_kept(kept), weights=weights, reduction=reduction)


@compiled("bins")
def mutual_information_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    bins: int = 23,
    sigma_ratio: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative mutual information of two images' intensities, in nats, from `-log(bins)` to 0.

    $$ \ell = -\sum_{ab} p_{ab} \log \frac{p_{ab}}{p_a p_b} $$

    Each pixel spreads over bin centres, evenly spaced from 0 to 1, with Gaussian weights of sum 1;
    `p_ab` is the mean of their products over pixels and channels. Two images that tell nothing
    about each other cost 0, and so does a constant one. Memory: 4 copies of pixels x `bins`.

    Args:
        pred: Images `(batch, *space, channels)` with values in [0, 1]; others count as the nearest.
        target: Same shape as `pred`; the loss is symmetric.
        bins: Number of bin centres, at least 2.
        sigma_ratio: Standard deviation of the Gaussian, in distances between centres.
        where: Bool array `(batch, *space)`.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Viola and Wells, Alignment by maximization of mutual information, IJCV 1997. Equals MONAI's
        `GlobalMutualInformationLoss(kernel_type="gaussian")`, which adds 1e-7 inside.

    >>> images = jnp.array([[0.0], [1.0]])[None]
    >>> mutual_information_loss(images, 1 - images, bins=2, sigma_ratio=0.1)  # -log 2
    Array(-0.6931472, dtype=float32)
    """
    information, _, units = _information(pred, target, bins, sigma_ratio, where)
    return reduce(-information, where=units, weights=weights, reduction=reduction)


@compiled("bins")
def normalized_mutual_information_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    bins: int = 23,
    sigma_ratio: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative normalised mutual information, from -2 (one image tells the other) to -1.

    $$ \ell = -\frac{H_a + H_b}{H_{ab}} $$

    with the entropies of `mutual_information_loss`; 0 where both images are constant.

    Args:
        pred: Images `(batch, *space, channels)` with values in [0, 1]; others count as the nearest.
        target: Same shape as `pred`; the loss is symmetric.
        bins: Number of bin centres, at least 2.
        sigma_ratio: Standard deviation of the Gaussian, in distances between centres.
        where: Bool array `(batch, *space)`.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Studholme, Hill and Hawkes, An overlap invariant entropy measure of 3D medical image
        alignment, Pattern Recognition 1999.

    >>> images = jnp.array([[0.0], [1.0]])[None]
    >>> normalized_mutual_information_loss(images, 1 - images, bins=2, sigma_ratio=0.1)
    Array(-2., dtype=float32)
    """
    information, joint, units = _information(pred, target, bins, sigma_ratio, where)
    values = jnp.where(joint == 0, 0, -1 - safe_div(information, joint))
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _information(
    pred: Array, target: Array, bins: int, sigma_ratio: Number, where: Where | None
) -> tuple[Array, Array, Array | None]:
    """Mutual information, joint entropy, and the images with a kept pixel."""
    pred, target = prepare_images(where, pred=pred, target=target)
    if not isinstance(bins, int) or bins < 2:
        raise ValueError(message("bins", "an integer of at least 2", repr(bins)))
    (sigma,) = numbers(pred, sigma_ratio=sigma_ratio)
    weight = jnp.ones(pred.shape, pred.dtype)
    if where is not None:
        weight = jnp.broadcast_to(where[..., None], pred.shape).astype(pred.dtype)
    weight = weight.reshape(*pred.shape[:1], math.prod(pred.shape[1:]))
    weight = safe_div(weight, jnp.broadcast_to(jnp.sum(weight, 1, keepdims=True), weight.shape))
    weight = weight[..., None]  # (b, n, 1)
    (p, a), (t, b) = (_centred(_soft_bins(x, bins, sigma), weight) for x in (pred, target))
    together = jnp.einsum("bni,bnj->bij", weight * p, t, precision="highest")
    apart = jnp.swapaxes(a, 1, 2) * b  # (b, bins, bins)
    information = jnp.sum(apart * _excess(safe_div(together, apart)), axis=(1, 2))
    cells = bins * bins  # entropy against the flat histogram: its gradient then cancels less
    against_flat = jnp.mean(xlogx(cells * jax.nn.relu(apart + together)), axis=(1, 2))
    return information, math.log(cells) - against_flat, any_kept(where)


def _centred(x: Array, weight: Array) -> tuple[Array, Array]:
    """`x` minus its weighted mean over pixels, and the mean: what is left tells of dependence."""
    mean = jnp.sum(weight * x, axis=1, keepdims=True)
    return x - mean, mean


def _excess(over: Array) -> Array:
    """`r log r - r + 1` of `r = 1 + over`, which is p log(p / q) / q up to terms of sum 0."""
    near = jnp.abs(over) < 0.1
    ratio = jax.nn.relu(jnp.where(near, 0, 1 + over))
    over = jnp.where(near, over, 0)
    return jnp.where(near, over**2 * horner(_EXCESS, over), xlogx(ratio) - (ratio - 1))


_EXCESS = [(-1) ** k / ((k + 1) * (k + 2)) for k in range(14)]


def _soft_bins(x: Array, bins: int, sigma: Array) -> Array:
    """Weights of each pixel over the bins: `batch *space channels -> batch pixels bins`."""
    x = jnp.where(x < 0, 0, jnp.where(x > 1, 1, x)).reshape(x.shape[0], math.prod(x.shape[1:]))
    centre = jnp.arange(bins, dtype=x.dtype).reshape(1, 1, bins)
    offset = (x[..., None] * (bins - 1) - centre) / sigma
    return jax.nn.softmax(-0.5 * offset**2, axis=-1)


@compiled()
def bending_energy(
    displacement: Float[Array, "batch *space dim"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Bending energy of a displacement field: its mean squared second derivatives, from 0.

    $$ \ell = \frac{1}{N D} \sum_{x, c} \sum_{i, j}
    \left( \frac{\partial^2 u_c}{\partial x_i \partial x_j} \right)^2 $$

    Second differences over three pixels, mixed ones over four, in the interior. 0 for every affine
    displacement.

    Args:
        displacement: Vectors `(batch, *space, dim)` in pixels, as many components as space axes.
        where: Bool array `(batch, *space)`; a pixel is kept only if all its neighbours are.

    One unit per field; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Rueckert et al., Nonrigid registration using free-form deformations, IEEE TMI 1999. Equals
        MONAI's `BendingEnergyLoss`.

    >>> bending_energy(jnp.array([[0.0], [1.0], [4.0]])[None])  # (0 - 2 + 4)^2
    Array(4., dtype=float32)
    """
    displacement, kept = _field(displacement, where)
    axes = range(1, displacement.ndim - 1)
    energy = jnp.zeros((), displacement.dtype)
    for i in axes:
        for j in axes:
            if i <= j:
                second = _interior(displacement, i, j)
                energy = energy + (1 if i == j else 2) * second**2
    values = jnp.mean(space_mean(energy, kept), axis=-1)
    return reduce(values, where=any_kept(kept), weights=weights, reduction=reduction)


@compiled()
def diffusion_energy(
    displacement: Float[Array, "batch *space dim"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Diffusion energy of a displacement field: its mean squared first derivatives, from 0.

    $$ \ell = \frac{1}{N D} \sum_{x, c} \sum_i
    \left( \frac{\partial u_c}{\partial x_i} \right)^2 $$

    Central differences, in the interior. 0 for a translation.

    Args:
        displacement: Vectors `(batch, *space, dim)` in pixels, as many components as space axes.
        where: Bool array `(batch, *space)`; a pixel is kept only if all its neighbours are.

    One unit per field; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Balakrishnan et al., VoxelMorph, IEEE TMI 2019, with forward differences there. Equals
        MONAI's `DiffusionLoss`.

    >>> diffusion_energy(jnp.array([[0.0], [1.0], [4.0]])[None])  # ((4 - 0) / 2)^2
    Array(4., dtype=float32)
    """
    displacement, kept = _field(displacement, where)
    axes = range(1, displacement.ndim - 1)
    energy = sum((_interior(displacement, i) ** 2 for i in axes), jnp.zeros((), displacement.dtype))
    values = jnp.mean(space_mean(energy, kept), axis=-1)
    return reduce(values, where=any_kept(kept), weights=weights, reduction=reduction)


def _field(displacement: Array, where: Where | None) -> tuple[Array, Array | None]:
    (displacement,) = prepare_images(where, displacement=displacement)
    check_last(displacement.ndim - 2, displacement=displacement)
    check_sides(3, displacement=displacement)
    return displacement, None if where is None else whole_windows(where, 3)


def _interior(x: Array, *derivatives: int) -> Array:
    """The derivative along these axes at the pixels that have neighbours along every axis."""
    for axis in range(1, x.ndim - 1):
        before, here, after = shifted(x, axis, 0, 1, 2)
        order = derivatives.count(axis)
        x = (here, (after - before) / 2, after - 2 * here + before)[order]
    return x


_IMAGES = dict(pred=draw_normal("B H W C"), target=draw_normal("B H W C"))
_UNIT = dict(pred=draw_unit("B H W C"), target=draw_unit("B H W C"))
_SIZES = dict(H=4, W=4, C=2)

CASES = (
    Case(local_ncc_loss, _IMAGES, dict(window=3), positions="B H W", sizes=_SIZES, minimum=True),
    Case(
        local_ncc_loss,
        dict(pred=draw_normal("B H W D C"), target=draw_normal("B H W D C")),
        dict(window=2),
        label="volume",
        positions="B H W D",
        sizes=dict(H=3, W=2, D=3, C=1),
        minimum=True,
    ),
    Case(
        mutual_information_loss,
        _UNIT,
        dict(bins=4, sigma_ratio=0.75),
        positions="B H W",
        sizes=_SIZES,
    ),
    Case(
        normalized_mutual_information_loss,
        _UNIT,
        dict(bins=4, sigma_ratio=0.75),
        positions="B H W",
        sizes=dict(H=5, W=5, C=1),
    ),
    Case(
        bending_energy,
        dict(displacement=draw_normal("B H W 2")),
        positions="B H W",
        sizes=dict(H=4, W=5),
    ),
    Case(
        diffusion_energy,
        dict(displacement=draw_normal("B H W 2")),
        positions="B H W",
        sizes=dict(H=4, W=5),
    ),
)
