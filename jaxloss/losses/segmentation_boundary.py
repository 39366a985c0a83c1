"""Losses of regions by distance and topology: boundary, Hausdorff and centreline losses."""

import functools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

from .._core.case import (
    Case,
    draw_labels,
    draw_normal,
    draw_probs,
    draw_uniform,
    draw_unit,
)
from .._core.checks import check_float, check_min_rank, check_same_shape, check_where
from .._core.compiled import compiled
from .._core.labels import is_integer
from .._core.numerics import absolute, numbers, safe_div, safe_pow, widen
from .._core.reduce import mask, reduce
from .._core.regions import kept_positions, prepare_regions, region_units, region_values
from .._core.sharding import one_hot
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "boundary_loss",
    "hausdorff_dt_loss",
    "hausdorff_er_loss",
    "signed_distance_map",
    "soft_cldice_loss",
]


@compiled()
def boundary_loss(
    probs: Float[Array, " batch *space classes"],
    distance_map: Float[Array, " batch *space classes"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Boundary loss of each class: mean signed distance of what is predicted, any sign.

    $$ \ell = \frac{1}{N} \sum_i p_i\, d_i $$

    over the $N$ kept positions of a sample, with $d$ the distance to the true boundary, negative
    inside. It grows with the probability outside the region and with that distance.

    Args:
        probs: Probabilities, classes last, any number of axes of space.
        distance_map: Same shape, as from `signed_distance_map`, in any unit of length.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Kervadec et al., Boundary Loss for Highly Unbalanced Segmentation, MIDL 2019. Equals MONAI's
        `BoundaryLoss`, which makes the map itself.

    >>> probs, distances = jnp.array([[[1.0], [0.5]]]), jnp.array([[[0.0], [2.0]]])
    >>> boundary_loss(probs, distances)
    Array(0.5, dtype=float32)
    """
    check_float(probs=probs)
    check_min_rank(2, probs=probs)
    check_same_shape(probs=probs, distance_map=distance_map)
    where = kept_positions(probs.shape[:-1], jnp.zeros((), int), where)
    probs, distance_map = mask(where, *widen(probs, distance_map))
    values = _mean(probs * distance_map, where)
    units = region_units(where, values)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def signed_distance_map(
    masks: Bool[Array, " batch *space classes"],
) -> Float[Array, " batch *space classes"]:
    """Euclidean distance to the other side of the boundary, negative inside; not a loss.

    Outside a mask it is the distance to the nearest position inside, from 1 up; inside it is minus
    the distance to the nearest position outside, plus 1, so 0 next to the boundary. Empty and full
    masks have no boundary: all 0. Exact, in positions; takes as many rounds over the array as the
    largest distance along an axis.

    Args:
        masks: True inside, `(batch, *space, classes)`; each sample and class for itself.

    Returns:
        Float32 array of the shape of `masks`, for `boundary_loss`.

    Reference:
        Kervadec et al., Boundary Loss for Highly Unbalanced Segmentation, MIDL 2019; the transform
        by Huang and Mitchell, A Euclidean Distance Transform Using Grayscale Morphology
        Decomposition, TPAMI 1994.

    >>> signed_distance_map(jnp.array([[[True], [True], [False], [False]]]))[0, :, 0]
    Array([-1.,  0.,  1.,  2.], dtype=float32)
    """
    check_where(masks)
    check_min_rank(2, masks=masks)
    masks = jnp.asarray(masks)
    outside, inside = (_squared_distance(x) for x in (masks, ~masks))
    bounded = (outside < _FAR) & (inside < _FAR)
    root = lambda x: jnp.sqrt(x.astype(jnp.float32))
    return jnp.where(bounded, jnp.where(masks, 1 - root(inside), root(outside)), 0)


_FAR = 2**30


def _squared_distance(sites: Array) -> Array:
    """Squared distance to the nearest True, `_FAR` and more where there is none.

    Axis by axis the minimum over j of f(x + j) + j^2, as steps of one position that cost 1, 3, 5,
    ... in turn, until a round changes nothing.
    """
    squares = jnp.where(sites, 0, _FAR)
    for axis in range(1, sites.ndim - 1):

        def spread(state: tuple[Array, ...], axis: int = axis) -> tuple[Array, ...]:
            step, nearest, _ = state
            least = jnp.minimum(nearest, jnp.minimum(*_neighbours(nearest, axis, _FAR)) + step)
            return step + 2, least, jnp.any(least < nearest)

        start = (jnp.ones((), jnp.int32), squares, jnp.any(squares >= 0))
        squares = jax.lax.while_loop(lambda state: state[2], spread, start)[1]
    return squares


@compiled()
def hausdorff_dt_loss(
    probs: Float[Array, " batch *space classes"],
    target: Shaped[Array, " batch *space classes"],
    pred_distance: Float[Array, " batch *space classes"],
    target_distance: Float[Array, " batch *space classes"],
    *,
    alpha: Number = 2.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hausdorff loss of each class by distance transforms: far errors cost most; from 0 up.

    $$ \ell = \frac{1}{N} \sum_i (p_i - g_i)^2 (d_{p,i}^\alpha + d_{g,i}^\alpha) $$

    over the $N$ kept positions of a sample, with $d$ the unsigned distance to the boundary of the
    predicted and of the true region. The power of distance 0 is 0, and 1 for `alpha` 0.

    Args:
        probs: Probabilities, classes last, any number of axes of space.
        target: Same shape: masks or memberships in `[0, 1]`.
        pred_distance: Same shape; distances to the boundary of `probs > 0.5`, inside and outside.
        target_distance: Same shape; distances to the boundary of the target.
        alpha: How much more a distant error costs.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Karimi and Salcudean, Reducing the Hausdorff Distance in Medical Image Segmentation with
        CNNs, IEEE TMI 2020. Equals MONAI's `HausdorffDTLoss`, which makes the maps itself.

    >>> probs, target = jnp.array([[[0.5], [1.0]]]), jnp.array([[[0.0], [1.0]]])
    >>> far = jnp.array([[[2.0], [1.0]]])
    >>> hausdorff_dt_loss(probs, target, far, far)  # (1/4 (4 + 4) + 0) / 2
    Array(1., dtype=float32)
    """
    check_float(probs=probs)
    check_min_rank(2, probs=probs)
    maps = dict(pred_distance=pred_distance, target_distance=target_distance)
    check_same_shape(probs=probs, target=target, **maps)
    where = kept_positions(probs.shape[:-1], jnp.zeros((), int), where)
    p, g, far_p, far_g = mask(where, *widen(probs, target, *maps.values()))
    (alpha,) = numbers(p, alpha=alpha)
    power = lambda d: jnp.where(alpha == 0, 1, safe_pow(absolute(d), alpha))
    values = _mean((p - g) ** 2 * (power(far_p) + power(far_g)), where)
    units = region_units(where, values)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled("iterations")
def hausdorff_er_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    alpha: Number = 2.0,
    iterations: int = 10,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hausdorff loss of each class by erosion: thick errors survive longest and cost most.

    $$ \ell = \frac{1}{N} \sum_{k=1}^{K} k^\alpha \sum_i b^{(k)}_i, \quad b^{(0)} = (p - g)^2 $$

    where a round averages each position of $b$ with its neighbours along the axes (0 beyond the
    edge), takes the part above 1/2 and stretches it to `[0, 1]`, over the $N$ kept positions of a
    sample. A label outside `[0, classes)` makes its sample NaN.

    Args:
        probs: Probabilities, classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        alpha: How much more a thick error costs.
        iterations: Number of erosions $K$.
        where: Bool array `(batch, *space)`; hidden positions are no errors, and a sample with no
            kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Karimi and Salcudean, Reducing the Hausdorff Distance in Medical Image Segmentation with
        CNNs, IEEE TMI 2020. Equals kornia's `HausdorffERLoss` and, for volumes,
        `HausdorffERLoss3D`.

    >>> probs = jnp.array([[[1.0], [1.0], [1.0]]])  # averages 2/3, 1, 2/3: stretched 0, 1, 0
    >>> hausdorff_er_loss(probs, jnp.zeros((1, 3, 1)), iterations=1)
    Array(0.33333334, dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where)
    p, g = _memberships(probs, target, where)
    (alpha,) = numbers(p, alpha=alpha)
    space = range(1, p.ndim - 1)

    def erode(state: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], None]:
        bound, total = state
        around = [bound, *(n for axis in space for n in _neighbours(bound, axis, 0))]
        core = jax.nn.relu(functools.reduce(jnp.add, around) / len(around) - 0.5)
        low, high = (_one_of(core, f) for f in (jnp.argmin, jnp.argmax))
        core = jnp.where(high == low, core, safe_div(core - low, high - low))
        return (core, total + core * k**alpha), None

    bound = (p - g) ** 2
    steps = jnp.arange(1, iterations + 1, dtype=p.dtype)
    total = jax.lax.scan(erode, (bound, 0 * bound), steps)[0][1] if bound.size else bound
    values, units = region_values(_mean(total, where), probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _one_of(x: Array, which: Callable[..., Array]) -> Array:
    """The smallest or largest value over space, by its place.

    The gradient of `jnp.min` compares values, which XLA may round twice in two ways: then none is
    equal to the minimum and the gradient is NaN.
    """
    flat = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
    place = which(jax.lax.stop_gradient(flat), axis=1, keepdims=True)
    found = jnp.take_along_axis(flat, place, axis=1, mode="clip")
    return found.reshape(len(x), *(1,) * (x.ndim - 2), x.shape[-1])


def _memberships(probs: Array, target: Array, where: Array | None) -> tuple[Array, Array]:
    """Probabilities and memberships, masked and wide."""
    p, target = mask(where, *widen(probs), target)
    g = one_hot(target, p.shape[-1]) if is_integer(target) else target
    (g,) = mask(where, g.astype(p.dtype))
    return p, g


def _mean(values: Array, where: Array | None) -> Array:
    """Mean over the kept positions, `(batch, *space, classes) -> (batch, classes)`."""
    space = tuple(range(1, values.ndim - 1))
    kept = jnp.ones(values.shape[:-1], bool) if where is None else where
    count = jnp.sum(kept, axis=space, dtype=values.dtype)[:, None]
    return safe_div(jnp.sum(jnp.where(kept[..., None], values, 0), axis=space), count)


@compiled("iterations")
def soft_cldice_loss(
    probs: Float[Array, " batch *space classes"],
    target: Integer[Array, " batch *space"] | Shaped[Array, " batch *space classes"],
    *,
    iterations: int = 3,
    smooth: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Soft centreline Dice loss of each class, in `[0, 1]`: thin structures must stay connected.

    $$ \ell = 1 - \frac{2\, T_P T_S}{T_P + T_S}, \quad
       T_P = \frac{\sum S(p)\, g + s}{\sum S(p) + s}, \quad
       T_S = \frac{\sum S(g)\, p + s}{\sum S(g) + s} $$

    The soft skeleton $S(x)$ collects $(x - \mathrm{open}(x))_+$ of $x$ and of its `iterations`
    erosions, where an erosion is the smallest neighbour along each axis and an opening is an
    erosion and the largest of the $3^d$ neighbours of it. Equal neighbours share their slope. A
    label outside `[0, classes)` makes its sample NaN.

    Args:
        probs: Probabilities, classes last, any number of axes of space.
        target: Integer labels without the class axis, or memberships in `[0, 1]`.
        iterations: Half the width, in positions, of the thickest structure.
        smooth: Added to both sides of both quotients, in positions.
        where: Bool array `(batch, *space)`; hidden positions are background, and a sample with no
            kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`. The authors add `dice_loss`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Shit et al., clDice, a Novel Topology-Preserving Loss Function for Tubular Structure
        Segmentation, CVPR 2021. Equals MONAI's `SoftclDiceLoss` for one class, up to the 1e-4 that
        it adds to the last denominator; it sums over the classes, too.

    >>> line = jnp.ones((1, 5, 1))
    >>> soft_cldice_loss(line, jnp.zeros((1, 5, 1)), iterations=0)  # nothing to lose: flat
    Array(0., dtype=float32)
    """
    probs, target, where = prepare_regions(probs, target, where=where)
    p, g = _memberships(probs, target, where)
    (smooth,) = numbers(p, smooth=smooth)
    axes = tuple(range(1, p.ndim - 1))
    share = lambda s, x: safe_div(
        jnp.sum(s * x, axis=axes) + smooth, jnp.sum(s, axis=axes) + smooth
    )
    precision, recall = share(_skeleton(p, iterations), g), share(_skeleton(g, iterations), p)
    values = 1 - safe_div(2 * precision * recall, precision + recall)
    values, units = region_values(values, probs, target, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _skeleton(x: Array, iterations: int) -> Array:
    def peel(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        x, skeleton = state
        eroded = _erode(x)
        rest = jax.nn.relu(x - _dilate(eroded))
        return (eroded, skeleton + jax.nn.relu(rest - skeleton * rest)), None

    return jax.lax.scan(peel, (x, 0 * x), None, length=iterations + 1)[0][1]


def _erode(x: Array) -> Array:
    """The smallest of a position and its neighbours along each axis of space."""
    return _extreme(x, tuple(range(1, x.ndim - 1)), "min")


def _dilate(x: Array) -> Array:
    """The largest within one step along every axis of space."""
    for axis in range(1, x.ndim - 1):
        x = _extreme(x, (axis,), "max")
    return x


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _extreme(x: Array, axes: tuple[int, ...], which: str) -> Array:
    """Minimum or maximum of a position and its neighbours along some axes."""
    pick, beyond = (jnp.minimum, jnp.inf) if which == "min" else (jnp.maximum, -jnp.inf)
    return functools.reduce(pick, [x, *(n for a in axes for n in _neighbours(x, a, beyond))])


@_extreme.defjvp
def _extreme_jvp(
    axes: tuple[int, ...], which: str, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (x,), (moved,) = primals, tangents
    found = _extreme(x, axes, which)
    views = lambda y: [y, *(n for a in axes for n in _neighbours(y, a, 0))]
    equal = [found == x, *(found == n for a in axes for n in _neighbours(x, a, jnp.nan))]
    total = [jnp.where(hit, y, 0) for hit, y in zip(equal, views(moved), strict=True)]
    count = [hit.astype(x.dtype) for hit in equal]
    return found, functools.reduce(jnp.add, total) / functools.reduce(jnp.add, count)


def _neighbours(x: Array, axis: int, beyond: float) -> tuple[Array, Array]:
    """The array moved by one position along an axis, both ways, with `beyond` where it ends."""
    fill = jnp.asarray(beyond, x.dtype)
    shift = lambda by: [(by, -by, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    return jax.lax.pad(x, fill, shift(1)), jax.lax.pad(x, fill, shift(-1))


_MEMBERS = dict(probs=draw_unit("B H W C"), target=draw_unit("B H W C"))
_LINES = dict(probs=draw_probs("B T C"), target=draw_labels("B T"))
_DISTANCES = dict(probs=draw_probs("B H W C"), distance_map=draw_normal("B H W C", scale=3))
_FIELDS = dict(
    pred_distance=draw_uniform("B H W C", 0.5, 5),
    target_distance=draw_uniform("B H W C", 0.5, 5),
)
_MARKS = dict(probs=draw_unit("B H W C"), target=draw_labels("B H W"))
_ALL, _SIZES = "B H W", dict(H=3, W=4, C=3)

CASES = (
    Case(boundary_loss, _DISTANCES, positions=_ALL, sizes=_SIZES),
    Case(
        hausdorff_dt_loss,
        {**_MEMBERS, **_FIELDS},
        dict(alpha=1.5),
        positions=_ALL,
        sizes=_SIZES,
        zero_at_target=True,
    ),
    Case(
        hausdorff_er_loss,
        _MARKS,
        dict(alpha=1.5, iterations=1),
        positions=_ALL,
        sizes=dict(H=5, W=4, C=2),
        without={
            "gradient_accuracy": "one ulp of an average just above 1/2 moves the stretch by more"
        },
    ),
    Case(
        soft_cldice_loss,
        _MEMBERS,
        dict(iterations=2, smooth=0.5),
        positions=_ALL,
        sizes=dict(H=5, W=4, C=2),
    ),
    Case(
        soft_cldice_loss,
        _LINES,
        dict(iterations=1, smooth=0.5),
        label="labels",
        positions="B T",
        sizes=dict(T=7, C=2),
    ),
)
