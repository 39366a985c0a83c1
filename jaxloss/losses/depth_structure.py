"""What neighbouring pixels of a depth map tell: its edges, its views, its normals."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from .._core.case import Case, draw_normal, draw_uniform
from .._core.checks import (
    check_float,
    check_last,
    check_min_rank,
    check_option,
    check_same_shape,
    check_shape,
    check_where,
    message,
)
from .._core.compiled import compiled
from .._core.numerics import absolute, numbers, safe_div, safe_norm, unit_vectors, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where
from .._core.windows import (
    box_taps,
    check_sides,
    pad_reflect,
    prepare_images,
    shifted,
    ssim_terms,
    whole_windows,
)

__all__ = [
    "depth_to_normals",
    "edge_aware_smoothness_loss",
    "gradient_matching_loss",
    "normal_cosine_loss",
    "photometric_loss",
    "virtual_normal_loss",
]


@compiled("scales")
def gradient_matching_loss(
    pred: Float[Array, "batch height width"],
    target: Shaped[Array, "batch height width"],
    *,
    scales: int = 4,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Difference of the slopes of two depth maps at several scales, in the target's unit.

    $$ \ell = \sum_{k=0}^{K-1} \frac{1}{N_k} \sum_i \left( |\partial_x R^k_i|
       + |\partial_y R^k_i| \right), \qquad R = \hat y - y $$

    where $R^k$ holds every $2^k$-th pixel of $R$, counted from the first, and $N_k$ is the number
    of its kept pixels. A difference of two neighbours counts if both are kept. A constant error
    costs 0.

    Args:
        pred: Predicted disparities or depths, aligned by the caller if need be; see
            `align_scale_shift`.
        target: Measured ones of the same shape; `where` hides invalid pixels.
        scales: Number $K$ of scales; no side may be shorter than $2^K$ pixels.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `batch` if `reduction` is `"none"`.

    Reference:
        Li and Snavely, MegaDepth: Learning Single-View Depth Prediction from Internet Photos,
        CVPR 2018; Ranftl et al., Towards Robust Monocular Depth Estimation: Mixing Datasets for
        Zero-shot Cross-dataset Transfer, TPAMI 2020.

    >>> ramp = jnp.array([[[0.0, 3.0], [0.0, 3.0]]])
    >>> gradient_matching_loss(ramp, jnp.zeros((1, 2, 2)), scales=1)  # (3 + 3) / 4
    Array(1.5, dtype=float32)
    """
    if isinstance(scales, bool) or not isinstance(scales, int):
        raise TypeError(message("scales", "an integer", repr(scales)))
    if scales < 1:
        raise ValueError(message("scales", "at least 1", scales))
    kept = _check_map("pred", pred, where)
    check_same_shape(pred=pred, target=target)
    if min(pred.shape[1:]) < 2**scales:
        raise ValueError(message("pred", f"sides of at least {2**scales} pixels", pred.shape[1:]))
    pred, target = mask(kept, *widen(pred, target))
    values = jnp.zeros(pred.shape[:1], pred.dtype)
    for step in (2**k for k in range(scales)):
        error, seen = (x[:, ::step, ::step] for x in (pred - target, kept))
        total = jnp.zeros_like(values)
        for axis in (1, 2):
            slope, both = _slope(error, axis), _both(seen, axis)
            total += jnp.sum(jnp.where(both, slope, 0), axis=(1, 2))
        values += safe_div(total, jnp.sum(seen, axis=(1, 2), dtype=pred.dtype))
    return reduce(values, where=jnp.any(kept, (1, 2)), weights=weights, reduction=reduction)


@compiled("normalize")
def edge_aware_smoothness_loss(
    disparity: Float[Array, "batch height width"],
    image: Shaped[Array, "batch height width channels"],
    *,
    normalize: bool = False,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Slopes of a disparity map, less where the image has an edge, in the unit of the disparity.

    $$ \ell = \mathrm{mean} \left( |\partial_x d| \, e^{-|\partial_x I|} \right)
       + \mathrm{mean} \left( |\partial_y d| \, e^{-|\partial_y I|} \right) $$

    where $|\partial I|$ is the mean over the channels. A difference of two neighbours counts if
    both are kept. Where the map is flat the gradient is 0.

    Args:
        disparity: Predicted disparities, or inverse depths.
        image: The image they belong to, usually in `[0, 1]`.
        normalize: Whether to divide the disparities by their mean over the kept pixels first, so
            that shrinking them does not help. A mean of 0 gives 0.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `batch` if `reduction` is `"none"`.

    Reference:
        Godard et al., Unsupervised Monocular Depth Estimation with Left-Right Consistency, CVPR
        2017; `normalize`: Godard et al., Digging Into Self-Supervised Monocular Depth Estimation,
        ICCV 2019, whose code adds 1e-7 to the mean. Equals kornia's
        `inverse_depth_smoothness_loss`.

    >>> disparity, image = jnp.array([[[1.0, 3.0]]]), jnp.ones((1, 1, 2, 3))
    >>> edge_aware_smoothness_loss(disparity, image)  # no edge in the image
    Array(2., dtype=float32)
    """
    check_option((False, True), normalize=normalize)
    kept = _check_map("disparity", disparity, where)
    check_min_rank(4, image=image)
    check_shape((*disparity.shape, image.shape[-1]), image=image)
    disparity, image = mask(kept, *widen(disparity, image))
    values = jnp.zeros(disparity.shape[:1], disparity.dtype)
    for axis in (1, 2):
        slope, both = _slope(disparity, axis), _both(kept, axis)
        edge = jnp.mean(_slope(image, axis), axis=-1)
        total = jnp.sum(jnp.where(both, slope * jnp.exp(-edge), 0), axis=(1, 2))
        values += safe_div(total, jnp.sum(both, axis=(1, 2), dtype=total.dtype))
    if normalize:  # after the slopes: a rounded quotient would have slopes where the map is flat
        count = jnp.sum(kept, axis=(1, 2), dtype=values.dtype)
        values = safe_div(values, absolute(safe_div(jnp.sum(disparity, axis=(1, 2)), count)))
    return reduce(values, where=jnp.any(kept, (1, 2)), weights=weights, reduction=reduction)


@compiled()
def photometric_loss(
    pred: Float[Array, "batch height width channels"],
    target: Shaped[Array, "batch height width channels"],
    *,
    alpha: Number = 0.85,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Structural dissimilarity and absolute error of each pixel of a warped image, in `[0, 1]`.

    $$ \ell = \alpha \, \tfrac{1}{2} (1 - \mathrm{SSIM}) + (1 - \alpha) \, |\hat I - I| $$

    averaged over the channels, where SSIM looks at the 3 x 3 pixels around the pixel, each of the
    same weight, with $C_1 = 0.01^2$ and $C_2 = 0.03^2$. The border is mirrored.

    Args:
        pred: The image seen from another camera, warped into this one, in `[0, 1]`.
        target: This image, in `[0, 1]`.
        alpha: Weight of the dissimilarity.
        where: Bool array `batch height width` that hides pixels outside the other view, which may
            hold anything. A pixel counts if all pixels of its window are kept.

    One unit per pixel; see `jaxloss.reduce`. The smallest loss over several views is
    `jnp.minimum` of `reduction="none"`.

    Returns:
        A float32 scalar, or `batch height width` if `reduction` is `"none"`.

    Reference:
        Godard et al., Digging Into Self-Supervised Monocular Depth Estimation, ICCV 2019, whose
        code this equals; Wang et al., Image Quality Assessment: From Error Visibility to
        Structural Similarity, IEEE Transactions on Image Processing 2004.

    >>> black, white = jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1))
    >>> photometric_loss(black, white)  # SSIM is 0.01^2 / (1 + 0.01^2)
    Array(0.5749575, dtype=float32)
    """
    pred, target = prepare_images(where, pred=pred, target=target)
    if pred.ndim != 4:
        raise ValueError(message("pred", "shape (batch, height, width, channels)", pred.shape))
    check_sides(2, pred=pred)
    (alpha,) = numbers(pred, alpha=alpha)
    taps, constants = box_taps(3, pred), numbers(pred, c1=0.01**2, c2=0.03**2)
    luminance, structure = ssim_terms(
        pad_reflect(pred, 1), pad_reflect(target, 1), taps, *constants
    )
    lacking = luminance + structure - luminance * structure  # 1 - SSIM, in [0, 2]
    values = 0.5 * alpha * lacking + (1 - alpha) * absolute(pred - target)
    units = None
    if where is not None:
        padded = pad_reflect(jnp.asarray(where)[..., None], 1)
        units = whole_windows(padded[..., 0], 3)
    return reduce(jnp.mean(values, -1), where=units, weights=weights, reduction=reduction)


@compiled()
def normal_cosine_loss(
    pred: Float[Array, "*batch 3"],
    target: Shaped[Array, "*batch 3"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus the cosine of the angle between two surface normals, in `[0, 2]`.

    $$ \ell = 1 - \frac{\hat n \cdot n}{|\hat n| \, |n|} $$

    Nearly parallel normals keep full accuracy. A zero vector has loss 1 and gradient 0.

    Args:
        pred: Predicted normals of any length, such as `batch height width 3`.
        target: Measured normals of the same shape; `where` hides invalid pixels.

    One unit per pixel; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Eigen and Fergus, Predicting Depth, Surface Normals and Semantic Labels with a Common
        Multi-scale Convolutional Architecture, ICCV 2015. Equals `cosine_distance`.

    >>> normal_cosine_loss(jnp.array([[0.0, 0.0, 2.0]]), jnp.array([[0.0, 3.0, 4.0]]))  # 1 - 4 / 5
    Array(0.2, dtype=float32)
    """
    check_float(pred=pred)
    check_last(3, pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    pred, target = unit_vectors(pred), unit_vectors(target)
    dot = jnp.sum(pred * target, axis=-1)
    gap = 0.5 * jnp.sum((pred - target) ** 2, axis=-1)  # the same, exact for parallel normals
    values = jnp.where(dot > 0.5, gap, 1 - dot)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def depth_to_normals(
    depth: Float[Array, "batch height width"], intrinsics: Shaped[Array, "*batch 3 3"]
) -> Array:
    r"""Unit normals of the surface behind each pixel, towards the camera: `batch height width 3`.

    $$ n \propto \partial_v P \times \partial_u P, \qquad P = z \, K^{-1} (u, v, 1)^\top $$

    with central differences, and one-sided ones at the border. Axes are those of the camera: x to
    the right, y down, z forward. The normal of a pixel depends on its four neighbours: where one
    of them is invalid, hide it. A normal that is not determined is 0.

    Args:
        depth: Depths along z; both sides have at least 2 pixels.
        intrinsics: Matrix $K$ of the camera, `3 3` or one for each image; upper triangular, in
            pixels. The first pixel is at (0, 0).

    Returns:
        Float32 vectors of length 1 or 0.

    >>> wall = jnp.full((1, 2, 2), 3.0)
    >>> depth_to_normals(wall, jnp.eye(3))[0, 0, 0]
    Array([ 0.,  0., -1.], dtype=float32)
    """
    _check_map("depth", depth, None)
    if min(depth.shape[1:]) < 2:
        raise ValueError(message("depth", "sides of at least 2 pixels", depth.shape[1:]))
    check_min_rank(2, intrinsics=intrinsics)
    check_shape((*depth.shape[:1], 3, 3)[-jnp.ndim(intrinsics) :], intrinsics=intrinsics)
    depth, camera = widen(depth, intrinsics)
    camera = jnp.broadcast_to(camera, (depth.shape[0], 3, 3))
    fx, skew, cx, fy, cy = (
        camera[:, i, j, None, None] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2))
    )
    v, u = (jax.lax.broadcasted_iota(depth.dtype, (1, *depth.shape[1:]), i) for i in (1, 2))
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    points = jnp.stack([x * depth, y * depth, depth], axis=-1)
    return unit_vectors(jnp.cross(_differences(points, 1), _differences(points, 2)))


@compiled("samples")
def virtual_normal_loss(
    pred_points: Float[Array, "batch points 3"],
    target_points: Shaped[Array, "batch points 3"],
    *,
    key: ArrayLike,
    samples: int = 1000,
    min_distance: Number = 0.01,
    max_cosine: Number = 0.867,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Difference of the normals of planes through random triples of points, in `[0, 2 sqrt(3)]`.

    $$ \ell = \frac{1}{|S|} \sum_{s \in S} |\hat n_s - n_s|_1 $$

    where $n_s$ is the unit normal of the plane through triple $s$. A triple counts if in the
    target no two of its points are closer than `min_distance` and no two of its sides are nearly
    parallel. All images get the same random numbers, each picks among its kept points.

    Args:
        pred_points: Points reconstructed from the predicted depth, `batch points 3`.
        target_points: Points of the measured depth, in the same order; `where`, of shape
            `batch points`, hides invalid ones.
        key: A key of `jax.random`; draw a new one for each step.
        samples: Number of triples to draw for each image.
        min_distance: Shortest side of a triple, in the unit of the points.
        max_cosine: Largest cosine of the angle, or of its supplement, between two sides.

    One unit per image; see `jaxloss.reduce`. An image without a triple that counts is no unit.

    Returns:
        A float32 scalar, or `batch` if `reduction` is `"none"`.

    Reference:
        Yin et al., Enforcing Geometric Constraints of Virtual Normal for Depth Prediction, ICCV
        2019. The code of the paper also drops the quarter of the triples with the smallest loss,
        and calls points close if they are so along each axis.

    >>> square = jnp.array([[[0.0, 0, 0], [1.0, 0, 0], [0.0, 1, 0], [1.0, 1, 0]]])
    >>> upright = square[..., ::-1]  # every normal (0, 0, 1) becomes (-1, 0, 0), or both negative
    >>> virtual_normal_loss(upright, square, key=jax.random.key(0), samples=50)
    Array(2., dtype=float32)
    """
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(message("samples", "an integer", repr(samples)))
    if samples < 1:
        raise ValueError(message("samples", "at least 1", samples))
    check_float(pred_points=pred_points)
    check_last(3, pred_points=pred_points)
    if pred_points.ndim != 3:
        raise ValueError(message("pred_points", "shape (batch, points, 3)", pred_points.shape))
    check_same_shape(pred_points=pred_points, target_points=target_points)
    kept = jnp.ones(pred_points.shape[:2], bool) if where is None else where
    check_where(kept)
    check_shape(pred_points.shape[:2], where=kept)
    pred, target = mask(kept, *widen(pred_points, target_points))
    nearest, steepest = numbers(pred, min_distance=min_distance, max_cosine=max_cosine)
    chosen = _triples(key, samples, jnp.asarray(kept))
    corners, true_corners = (_corners(x, chosen) for x in (pred, target))
    sides = jnp.roll(true_corners, -1, axis=2) - true_corners  # (batch, samples, 3 sides, 3)
    lengths, sides = safe_norm(sides), unit_vectors(sides)
    cosines = jnp.abs(jnp.sum(sides * jnp.roll(sides, 1, axis=2), axis=-1))
    good = jnp.all((cosines <= steepest) & (lengths >= nearest) & (lengths > 0), axis=-1)
    error = jnp.sum(absolute(_normals(corners) - _normals(true_corners)), axis=-1)
    error = jnp.where(jnp.all(corners == true_corners, axis=(-2, -1)), 0, error)  # no rounding
    count = jnp.sum(good, axis=-1, dtype=error.dtype)
    values = safe_div(jnp.sum(jnp.where(good, error, 0), axis=-1), count)
    return reduce(values, where=count > 0, weights=weights, reduction=reduction)


def _check_map(name: str, x: Array, where: Where | None) -> Array:
    """Check a map `batch height width`; which of its pixels are kept."""
    check_float(**{name: x})
    if x.ndim != 3:
        raise ValueError(message(name, "shape (batch, height, width)", x.shape))
    if where is None:
        return jnp.ones(x.shape, bool)
    check_where(where)
    check_shape(x.shape, where=where)
    return jnp.asarray(where)


def _slope(x: Array, axis: int) -> Array:
    """Absolute differences of neighbours along an axis."""
    here, ahead = shifted(x, axis, 0, 1)
    return absolute(ahead - here)


def _both(kept: Array, axis: int) -> Array:
    """Whether both neighbours along an axis are kept."""
    here, ahead = shifted(kept, axis, 0, 1)
    return here & ahead


def _differences(x: Array, axis: int) -> Array:
    """The next pixel less the one before; at the border one of them is the pixel itself."""
    size = x.shape[axis]
    take = lambda low, high: jax.lax.slice_in_dim(x, low, high, axis=axis)
    ahead = jnp.concatenate([take(1, size), take(size - 1, size)], axis)
    return ahead - jnp.concatenate([take(0, 1), take(0, size - 1)], axis)


def _triples(key: ArrayLike, samples: int, kept: Array) -> Array:
    """Indices of random kept points, `batch 3 * samples`."""
    points = kept.shape[1]
    index = jax.lax.broadcasted_iota(jnp.int32, kept.shape, 1)
    ordered = jnp.sort(jnp.where(kept, index, points), axis=1)  # the kept ones first
    count = jnp.sum(kept, axis=1, keepdims=True)
    share = jax.random.uniform(key, (1, 3 * samples), jnp.float32)
    rank = jnp.floor(share * count.astype(jnp.float32)).astype(jnp.int32)
    rank = jnp.clip(rank, 0, jnp.maximum(count - 1, 0).astype(jnp.int32))
    return jnp.take_along_axis(ordered, rank, axis=1, mode="clip")


def _corners(points: Array, chosen: Array) -> Array:
    """The points of each triple, `batch samples 3 3`."""
    corners = jnp.take_along_axis(points, chosen[..., None], axis=1, mode="clip")
    return corners.reshape(points.shape[0], chosen.shape[1] // 3, 3, 3)


def _normals(corners: Array) -> Array:
    """Unit normals of the planes through triples of points."""
    one, two = (unit_vectors(corners[:, :, i] - corners[:, :, 0]) for i in (1, 2))
    return unit_vectors(jnp.cross(one, two))


_MAPS = dict(pred=draw_normal("B H W"), target=draw_normal("B H W"))
_VIEWS = dict(pred=draw_uniform("B H W C", 0, 1), target=draw_uniform("B H W C", 0, 1))
_NORMALS = dict(pred=draw_normal("B T 3"), target=draw_normal("B T 3"))
_POINTS = dict(pred_points=draw_normal("B T 3"), target_points=draw_normal("B T 3"))
_SIZES = dict(H=4, W=5, C=2)

CASES = (
    Case(
        gradient_matching_loss,
        _MAPS,
        dict(scales=2),
        positions="B H W",
        sizes=_SIZES,
        zero_at_target=True,
    ),
    Case(
        edge_aware_smoothness_loss,
        dict(disparity=draw_normal("B H W"), image=draw_uniform("B H W C", 0, 1)),
        positions="B H W",
        sizes=_SIZES,
    ),
    Case(
        edge_aware_smoothness_loss,
        dict(disparity=draw_uniform("B H W", 0.1, 2), image=draw_uniform("B H W C", 0, 1)),
        dict(normalize=True),
        "normalized",
        positions="B H W",
        sizes=_SIZES,
    ),
    Case(
        photometric_loss,
        _VIEWS,
        dict(alpha=0.6),
        sizes=_SIZES,
        zero_at_target=True,
        without={"reducing": "a window with a hidden pixel hides its unit too"},
    ),
    Case(normal_cosine_loss, _NORMALS, minimum=True),
    Case(
        virtual_normal_loss,
        _POINTS,
        dict(key=np.array([0, 7], np.uint32), samples=40, min_distance=0.3, max_cosine=0.8),
        positions="B T",
        sizes=dict(T=9),
        zero_at_target=True,
    ),
)
