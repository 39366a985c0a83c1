"""Losses of rotated boxes (cx, cy, w, h, theta), taken as Gaussians, and of their angles."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from .._core.boxes import power_of_two, share
from .._core.case import Case, Draw, draw_uniform
from .._core.checks import check_float, check_last, check_same_shape, require
from .._core.compiled import compiled
from .._core.numerics import numbers, safe_div, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "gwd_loss",
    "kfiou_loss",
    "kld_loss",
    "probiou_loss",
    "rotated_angle_loss",
]


@compiled()
def gwd_loss(
    pred: Float[Array, "*batch 5"],
    target: Shaped[Array, "*batch 5"],
    *,
    tau: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Wasserstein distance of rotated boxes taken as Gaussians, squeezed into `[1 - 1/tau, 1)`.

    $$ \begin{aligned} \ell &= 1 - \frac{1}{\tau + \log(1 + W_2^2)} \\
       W_2^2 &= |d|^2 + \mathrm{tr}\left(\Sigma_1 + \Sigma_2
       - 2 (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2}\right) \end{aligned} $$

    with $d$ the difference of the centres and $\Sigma_i = R_i\, \mathrm{diag}(w_i^2, h_i^2)\,
    R_i^\top / 4$. Not free of scale. A box and its turn by a right angle with width and height
    exchanged are one.

    Args:
        pred: Boxes `(*batch, 5)`: centre, width, height, and angle in radians.
        target: Boxes of the same shape.
        tau: The constant $\tau$, at least 1; with 1 equal boxes cost 0.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Yang et al., Rethinking Rotated Object Detection with Gaussian Wasserstein Distance Loss,
        ICML 2021. mmrotate's `gwd_loss` takes the root of the squared distance and, by default,
        divides it by the size of the boxes.

    >>> pred = jnp.array([[0.0, 0.0, 2.0, 1.0, 0.0]])
    >>> target = jnp.array([[3.0, 4.0, 2.0, 1.0, 0.0]])
    >>> gwd_loss(pred, target)  # 1 - 1 / (1 + log 26)
    Array(0.7651532, dtype=float32)
    """
    pred, target = _prepare(pred, target, where)
    (tau,) = numbers(pred, tau=tau)
    pair = _pair(pred, target)
    width, height = pair.size[..., 0], pair.size[..., 1]
    width_ref, height_ref = pair.size_ref[..., 0], pair.size_ref[..., 1]
    along, across = width * width_ref + height * height_ref, width * height_ref + height * width_ref
    root = safe_sqrt(pair.cosine**2 * along**2 + pair.sine**2 * across**2)
    turn = 0.5 * safe_div(_bend(pair), along + root)
    shape = 0.25 * jnp.sum((pair.size - pair.size_ref) ** 2, axis=-1)
    distance = (jnp.sum(pair.way**2, axis=-1) + shape + turn) * pair.unit**2
    values = _squeezed(distance, tau)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def kfiou_loss(
    pred: Float[Array, "*batch 5"],
    target: Shaped[Array, "*batch 5"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""One minus the overlap of two rotated boxes taken as centred Gaussians, in `[2/3, 1]`.

    $$ \ell = 1 - \frac{V_3}{V_1 + V_2 - V_3}, \quad V_i = \sqrt{|\Sigma_i|}, \quad
       \Sigma_3 = \Sigma_1 (\Sigma_1 + \Sigma_2)^{-1} \Sigma_2 $$

    with $\Sigma_1$ and $\Sigma_2$ the covariances of the boxes. Sizes and angles alone count: add a
    loss of the centres. Equal boxes cost 2/3; a box without area costs 1.

    Args:
        pred: Boxes `(*batch, 5)`: centre, width, height, and angle in radians.
        target: Boxes of the same shape.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Yang et al., The KFIoU Loss for Rotated Object Detection, ICLR 2023. Equals the part of
        mmrotate's `kfiou_loss(fun=None)` that does not depend on the centres.

    >>> pred = jnp.array([[0.0, 0.0, 2.0, 1.0, 0.0]])
    >>> target = jnp.array([[3.0, 4.0, 2.0, 1.0, 0.0]])
    >>> kfiou_loss(pred, target)  # 1 - 0.5 / (1 + 1 - 0.5)
    Array(0.6666667, dtype=float32)
    """
    pred, target = _prepare(pred, target, where)
    pair = _pair(pred, target)
    total, bend = _sum_of_squares(pair)
    area, area_ref = _area(pair.size), _area(pair.size_ref)
    both = safe_div(area * area_ref, safe_sqrt(total + bend))
    values = jnp.where(area + area_ref == 0, 1, share(area + area_ref - 2 * both, both))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def kld_loss(
    pred: Float[Array, "*batch 5"],
    target: Shaped[Array, "*batch 5"],
    *,
    tau: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Divergence of rotated boxes taken as Gaussians, squeezed into `[1 - 1/tau, 1]`.

    $$ \begin{aligned} \ell &= 1 - \frac{1}{\tau + \log(1 + D)} \\
       D &= \tfrac{1}{2} \left(d^\top \Sigma_2^{-1} d + \mathrm{tr}(\Sigma_2^{-1} \Sigma_1) - 2
       + \log \frac{|\Sigma_2|}{|\Sigma_1|}\right) \end{aligned} $$

    with $d$ the difference of the centres and $\Sigma_i = R_i\, \mathrm{diag}(w_i^2, h_i^2)\,
    R_i^\top / 4$ of the prediction (1) and the target (2): $D$ is the divergence of the prediction
    from the target. A box without area has loss 1 and gradient 0.

    Args:
        pred: Boxes `(*batch, 5)`: centre, width, height, and angle in radians.
        target: Boxes of the same shape.
        tau: The constant $\tau$, at least 1; with 1 equal boxes cost 0.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Yang et al., Learning High-Precision Bounding Box for Rotated Object Detection via
        Kullback-Leibler Divergence, NeurIPS 2021. mmrotate's `kld_loss` has the two boxes the other
        way round, and by default takes the root of the divergence.

    >>> pred = jnp.array([[0.0, 0.0, 2.0, 2.0, 0.0]])
    >>> target = jnp.array([[3.0, 4.0, 2.0, 2.0, 0.0]])
    >>> kld_loss(pred, target)  # 1 - 1 / (1 + log(1 + 25 / 2))
    Array(0.72242963, dtype=float32)
    """
    pred, target = _prepare(pred, target, where)
    (tau,) = numbers(pred, tau=tau)
    flat, pred, target = _solid(pred, target)
    pair = _pair(pred, target)
    growth = (pair.size - pair.size_ref) / pair.size_ref
    shape = jnp.sum(0.5 * growth * (2 + growth) - _log_ratio(pair), axis=-1)
    turn = -0.5 * pair.sine**2 * _slim(pair.size) * _slim(1 / pair.size_ref)
    steps = _along(pair, target) / (target[..., 2:4] / pair.unit[..., None])
    shift = 2 * jnp.sum(jnp.clip(steps, -1e15, 1e15) ** 2, axis=-1)  # squares stay finite
    values = jnp.where(flat, 1, _squeezed(shift + shape + turn, tau))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def probiou_loss(
    pred: Float[Array, "*batch 5"],
    target: Shaped[Array, "*batch 5"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hellinger distance of two rotated boxes taken as Gaussians, in `[0, 1]`.

    $$ \ell = \sqrt{1 - e^{-D}}, \quad
       D = \tfrac{1}{8} d^\top \Sigma^{-1} d
       + \tfrac{1}{2} \log \frac{|\Sigma|}{\sqrt{|\Sigma_1| |\Sigma_2|}}, \quad
       \Sigma = \frac{\Sigma_1 + \Sigma_2}{2} $$

    with $d$ the difference of the centres and $\Sigma_i = R_i\, \mathrm{diag}(w_i^2, h_i^2)\,
    R_i^\top / 12$, the covariance of the uniform distribution in the box. The gradient at equality
    is 0; a box without area has loss 1 and gradient 0.

    Args:
        pred: Boxes `(*batch, 5)`: centre, width, height, and angle in radians.
        target: Boxes of the same shape.

    One unit per box; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Murrugarra-Llerena et al., Gaussian Bounding Boxes and Probabilistic Intersection-over-Union
        for Object Detection, 2021. Equals one minus ultralytics' `probiou`, which clips $D$ and
        adds 1e-7 under the root, so that equal boxes cost 4.5e-4 there.

    >>> pred = jnp.array([[0.0, 0.0, 2.0, 1.0, 0.0]])
    >>> target = jnp.array([[2.0, 0.0, 2.0, 1.0, 0.0]])
    >>> probiou_loss(pred, target)  # D = 12 / 8
    Array(0.8814022, dtype=float32)
    """
    pred, target = _prepare(pred, target, where)
    flat, pred, target = _solid(pred, target)
    pair = _pair(pred, target)
    total, bend = _sum_of_squares(pair)
    stretch = 0.5 * (pair.size - pair.size_ref) ** 2 / (pair.size * pair.size_ref)
    shape = 0.5 * (jnp.sum(jnp.log1p(stretch), axis=-1) + jnp.log1p(bend / total))
    shift = 3 * (_spread(pair, pred) + _spread(pair, target)) / (total + bend)
    values = jnp.where(flat, 1, safe_sqrt(-jnp.expm1(-shift - shape)))
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _prepare(pred: Array, target: Any, where: Where | None) -> tuple[Array, Array]:
    """Check, mask and widen a pair of rotated boxes."""
    check_float(pred=pred)
    check_last(5, pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    for name, boxes in (("pred", pred), ("target", target)):
        ok = lambda b=boxes: jnp.all(b[..., 2:4] >= 0, axis=-1)
        require(ok, name, "boxes whose width and height are not negative", where)
    return pred, target


def _solid(pred: Array, target: Array) -> tuple[Bool[Array, "*batch"], Array, Array]:
    """Where one of two boxes has no area, and the boxes with another pair in its place."""
    flat = jnp.any((pred[..., 2:4] <= 0) | (target[..., 2:4] <= 0), axis=-1)
    keep = lambda boxes: jnp.where(flat[..., None], 1, boxes)
    return flat, keep(pred), keep(target)


class _Pair(NamedTuple):
    """Two boxes in a unit near their largest side, `(*batch, 2)`, and the angle between them.

    Width and height of the second may be exchanged and the angle turned by a right angle, which
    describes the same box: the longer sides of both stand in the same place, so that no sum below
    has terms of different sign.
    """

    unit: Array
    way: Array
    size: Array
    size_ref: Array
    cosine: Array
    sine: Array


def _pair(a: Array, b: Array) -> _Pair:
    size, size_ref = a[..., 2:4], b[..., 2:4]
    longest = jnp.max(jnp.maximum(size, size_ref), axis=-1, keepdims=True)
    unit = power_of_two(longest)
    size, size_ref = size / unit, size_ref / unit
    way = jnp.clip((a[..., :2] - b[..., :2]) / unit, -1e9, 1e9)  # squares stay finite
    slim = (size[..., 0] - size[..., 1]) * (size_ref[..., 0] - size_ref[..., 1])
    crossed = slim < 0
    size_ref = jnp.where(crossed[..., None], size_ref[..., ::-1], size_ref)
    cosine, sine = _turn(a[..., 4], b[..., 4])
    cosine, sine = jnp.where(crossed, sine, cosine), jnp.where(crossed, cosine, sine)
    return _Pair(unit[..., 0], way, size, size_ref, cosine, sine)


def _turn(a: Array, b: Array) -> tuple[Array, Array]:
    """Cosine and sine of a - b, with the digits that the difference loses to rounding."""
    difference = a - b
    back = difference - a
    lost = jax.lax.stop_gradient((a - (difference - back)) - (b + back))
    cosine, sine = jnp.cos(difference), jnp.sin(difference)
    return cosine - lost * sine, sine + lost * cosine


def _area(size: Array) -> Array:
    return size[..., 0] * size[..., 1]


def _slim(size: Array) -> Array:
    """Squared width minus squared height."""
    return (size[..., 0] - size[..., 1]) * (size[..., 0] + size[..., 1])


def _bend(pair: _Pair) -> Array:
    """What the angle adds to the determinant of the sum of squared boxes; at least 0."""
    return pair.sine**2 * _slim(pair.size) * _slim(pair.size_ref)


def _sum_of_squares(pair: _Pair) -> tuple[Array, Array]:
    """|S_1 + S_2| for S = R diag(w^2, h^2) R^T, as its value without an angle and `_bend`."""
    return _area(pair.size**2 + pair.size_ref**2), _bend(pair)


def _along(pair: _Pair, boxes: Array) -> Array:
    """The way between the centres along width and height of one box."""
    cosine, sine = jnp.cos(boxes[..., 4]), jnp.sin(boxes[..., 4])
    x, y = pair.way[..., 0], pair.way[..., 1]
    return jnp.stack([cosine * x + sine * y, cosine * y - sine * x], axis=-1)


def _spread(pair: _Pair, boxes: Array) -> Array:
    """|S| d^T S^-1 d for S = R diag(w^2, h^2) R^T of one box and the way between the centres."""
    across = boxes[..., 3:1:-1] / pair.unit[..., None]
    return jnp.sum((across * _along(pair, boxes)) ** 2, axis=-1)


def _log_ratio(pair: _Pair) -> Array:
    """log(size / size_ref), with every digit near 0 and far out."""
    growth = (pair.size - pair.size_ref) / pair.size_ref
    near = jnp.abs(growth) < 0.5
    far = jnp.log(jnp.where(near, 1, pair.size / pair.size_ref))
    return jnp.where(near, jnp.log1p(jnp.where(near, growth, 0)), far)


def _squeezed(distance: Array, tau: Array) -> Array:
    """1 - 1 / (tau + log(1 + distance))."""
    return share(tau - 1 + jnp.log1p(distance), jnp.ones_like(distance))


@compiled()
def rotated_angle_loss(
    pred_theta: Float[Array, "*shape"],
    target_theta: Shaped[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared sine of twice the difference of angles, in `[0, 1]`: a right angle costs nothing.

    $$ \ell = \sin^2(2 (\hat\theta - \theta)) $$

    Args:
        pred_theta: Angles in radians.
        target_theta: Same shape.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Jocher et al., Ultralytics YOLO, 2023: the angle term of its oriented boxes, which weights
        it by the quality of the match and by the aspect ratio.

    >>> rotated_angle_loss(jnp.array([jnp.pi / 4]), jnp.array([0.0]))
    Array(1., dtype=float32)
    """
    check_float(pred_theta=pred_theta)
    check_same_shape(pred_theta=pred_theta, target_theta=target_theta)
    pred_theta, target_theta = mask(where, *widen(pred_theta, target_theta))
    _, sine = _turn(2 * pred_theta, 2 * target_theta)
    values = sine**2
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _sample_boxes(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
    scale = np.array([10, 10, 8, 8, 2 * np.pi])
    return g.uniform(np.array([0, 0, 1, 1, -np.pi]), scale, shape)


def _ends(boxes: np.ndarray) -> tuple[np.ndarray, ...]:
    of = lambda *factors: boxes * np.array(factors, boxes.dtype)
    return of(0, 0, 0, 0, 0), of(1, 1, 0, 1, 1), of(1e6, 1e6, 1, 1, 1)


_BOXES = Draw("B 5", _sample_boxes, "bounded", _ends)
_PAIR = dict(pred=_BOXES, target=_BOXES)
_ANGLE = draw_uniform("B", -3, 3)

CASES = (
    Case(gwd_loss, _PAIR, zero_at_target=True),
    Case(gwd_loss, _PAIR, dict(tau=2.0), label="tau", minimum=True),
    Case(kfiou_loss, _PAIR, minimum=True),
    Case(kld_loss, _PAIR, zero_at_target=True),
    Case(kld_loss, _PAIR, dict(tau=2.0), label="tau", minimum=True),
    Case(probiou_loss, _PAIR, zero_at_target=True),
    Case(rotated_angle_loss, dict(pred_theta=_ANGLE, target_theta=_ANGLE), zero_at_target=True),
)
