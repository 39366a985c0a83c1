"""Heat maps and coordinate bins of keypoints: squared errors, adaptive wing, DSNT and SimCC."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal, draw_uniform, draw_unit
from .._core.checks import (
    check_array,
    check_float,
    check_last,
    check_min_rank,
    check_same_shape,
    check_shape,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.numerics import (
    absolute,
    expm1,
    numbers,
    safe_div,
    safe_mul,
    safe_norm,
    safe_pow,
    widen,
)
from .._core.reduce import mask, reduce
from .._core.softmax import neg_log_softmax
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "adaptive_wing_loss",
    "combined_target_mse_loss",
    "draw_gaussian_heatmap",
    "dsnt_coordinates",
    "dsnt_loss",
    "heatmap_mse_loss",
    "ohkm_mse_loss",
    "simcc_kl_loss",
]


@compiled("shape", "subpixel")
def draw_gaussian_heatmap(
    centers: Float[Array, "*batch joints 2"],
    sigma: Number | Float[Array, "*batch joints"],
    *,
    shape: tuple[int, int],
    subpixel: bool = False,
) -> Array:
    r"""Heat maps with a Gaussian of height 1 at each joint: `*batch height width joints`.

    $$ h(u) = \exp \left( -\frac{|u - c|^2}{2 \sigma^2} \right) $$

    Args:
        centers: Joints as (x, y) in cells, `*batch joints 2`; x runs along the width. A joint
            outside shows only the part of its Gaussian that is inside.
        sigma: Width above 0 in cells, a number or one for each joint.
        shape: Height and width of the maps.
        subpixel: Whether the Gaussian stands at the joint itself, where perhaps no cell reaches 1,
            rather than at its nearest cell.

    Returns:
        Float32 heights in [0, 1].

    >>> draw_gaussian_heatmap(jnp.array([[1.2, 0.0]]), 1.0, shape=(1, 3))[0, :, 0]
    Array([0.60653067, 1.        , 0.60653067], dtype=float32)
    """
    check_float(centers=centers)
    check_min_rank(2, centers=centers)
    check_last(2, centers=centers)
    check_array(sigma=sigma)
    (centers,) = widen(centers)
    if jnp.ndim(sigma):
        check_shape(centers.shape[:-1], sigma=sigma)
    if not subpixel:
        centers = jnp.floor(centers + 0.5)
    sigma = jnp.asarray(sigma).astype(centers.dtype)
    require(lambda: sigma > 0, "sigma", "positive values")
    width = jnp.broadcast_to(sigma, centers.shape[:-1])[..., None]
    bell = lambda i, size: jnp.exp(
        -0.5 * ((_cells(size, width) - centers[..., i, None]) / width) ** 2
    )
    rows, columns = bell(1, shape[0]), bell(0, shape[1])
    return jnp.moveaxis(rows[..., :, None] * columns[..., None, :], -3, -1)


@compiled()
def heatmap_mse_loss(
    pred: Float[Array, "batch *space joints"],
    target: Shaped[Array, "batch *space joints"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean squared error of the heat map of each joint, from 0 up.

    $$ \ell = \frac{1}{N} \sum_u (\hat h(u) - h(u))^2 $$

    over the $N$ cells of the map.

    Args:
        pred: Predicted heat maps, joints last.
        target: Same shape as `pred`. Maps that `where`, of shape `batch joints`, hides may hold
            anything.

    One unit per joint; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `batch joints` if `reduction` is `"none"`.

    Reference:
        Tompson et al., Joint Training of a Convolutional Network and a Graphical Model for Human
        Pose Estimation, NIPS 2014. Equals torch's `mse_loss` while all joints are visible. mmpose's
        `KeypointMSELoss` divides by all joints, also by invisible ones, so that its value shrinks
        with their number; its `skip_empty_channel` is `where=(target != 0).any(space)`.

    >>> heatmap_mse_loss(jnp.array([[[0.0], [4.0]]]), jnp.array([[[0.0], [1.0]]]))  # 9 / 2
    Array(4.5, dtype=float32)
    """
    values = _map_errors(pred, target, where)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("k")
def ohkm_mse_loss(
    pred: Float[Array, "batch *space joints"],
    target: Shaped[Array, "batch *space joints"],
    *,
    k: int = 8,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean of the `k` largest heat map errors among the visible joints of an example, from 0 up.

    $$ \ell = \frac{1}{|K|} \sum_{j \in K} \frac{1}{N} \sum_u (\hat h_j(u) - h_j(u))^2 $$

    where $K$ holds the $k$ joints of largest error, or all where fewer are visible.

    Args:
        pred: Predicted heat maps, joints last.
        target: Same shape as `pred`. Maps that `where`, of shape `batch joints`, hides may hold
            anything.
        k: How many joints count.

    One unit per example; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `batch` if `reduction` is `"none"`.

    Reference:
        Chen et al., Cascaded Pyramid Network for Multi-Person Pose Estimation, CVPR 2018. mmpose's
        `KeypointOHKMMSELoss` always divides by `k`; the code of HRNet adds a factor 1/2.

    >>> ohkm_mse_loss(jnp.array([[[1.0, 3.0, 2.0]]]), jnp.zeros((1, 1, 3)), k=2)  # (9 + 4) / 2
    Array(6.5, dtype=float32)
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        error = ValueError if isinstance(k, int) else TypeError
        raise error(message("k", "an integer of at least 1", repr(k)))
    values = _map_errors(pred, target, where)  # (batch, joints)
    visible = jnp.ones(values.shape, bool) if where is None else jnp.asarray(where)
    this, other = values[:, :, None], values[:, None, :]
    earlier = jnp.tri(values.shape[-1], k=-1, dtype=bool)[None]
    ahead = (other > this) | ((other == this) & earlier)
    rank = jnp.sum(ahead & visible[:, None, :], axis=-1)
    chosen = visible & (rank < k)
    total = jnp.sum(jnp.where(chosen, values, 0), axis=-1)
    values = safe_div(total, jnp.sum(chosen, axis=-1, dtype=total.dtype))
    return reduce(values, where=jnp.any(visible, -1), weights=weights, reduction=reduction)


@compiled()
def combined_target_mse_loss(
    pred: Float[Array, "batch *space joints channels"],
    target: Shaped[Array, "batch *space joints channels"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared error of a heat map and, inside it, of the offsets to the joint, from 0 up.

    $$ \ell = \frac{1}{2 N} \sum_u \left( (\hat h - h)^2 + h^2 (\hat o_x - o_x)^2
       + h^2 (\hat o_y - o_y)^2 \right) $$

    Args:
        pred: Predicted maps; the channels of each joint are the heat map and one offset for each
            axis of the space, so 3 for images. From mmpose's layout, joints times channels:
            `reshape(*batch_and_space, joints, 3)`.
        target: Same shape as `pred`.

    One unit per joint; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `batch joints` if `reduction` is `"none"`.

    Reference:
        Huang et al., The Devil Is in the Details: Delving Into Unbiased Data Processing for Human
        Pose Estimation, CVPR 2020. Equals mmpose's `CombinedTargetMSELoss` while all joints are
        visible.

    >>> pred = jnp.array([1.0, 6.0, 4.0]).reshape(1, 1, 1, 1, 3)
    >>> target = jnp.array([0.5, 2.0, 2.0]).reshape(1, 1, 1, 1, 3)
    >>> combined_target_mse_loss(pred, target)  # (1/4 + 16/4 + 4/4) / 2
    Array(2.625, dtype=float32)
    """
    check_float(pred=pred)
    check_min_rank(4, pred=pred)
    check_last(pred.ndim - 2, pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *(jnp.moveaxis(x, -2, 1) for x in widen(pred, target)))
    heat = jnp.where(_cells(pred.shape[-1], target) == 0, 1, target[..., :1])
    total = jnp.sum((heat * (pred - target)) ** 2, axis=tuple(range(2, pred.ndim)))
    values = total / (2 * math.prod(pred.shape[2:-1]))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def adaptive_wing_loss(
    pred: Float[Array, "*shape"],
    target: Shaped[Array, "*shape"],
    *,
    alpha: Number = 2.1,
    omega: Number = 14.0,
    epsilon: Number = 1.0,
    theta: Number = 0.5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Wing loss of a heat map: sharp where the target is high, smooth where it is low, from 0 up.

    $$ \ell = \begin{cases} \omega \log(1 + (d / \epsilon)^{\alpha - y}) & d < \theta \\
       A (d - \theta) + \omega \log(1 + (\theta / \epsilon)^{\alpha - y}) & \text{otherwise}
       \end{cases} \qquad d = |\hat y - y| $$

    with the $A$ that makes the slope continuous at $\theta$. The gradient at $d = 0$ is 0.

    Args:
        pred: Predicted heat maps, of any layout.
        target: Heat maps of the same shape, in `[0, 1]`.
        alpha: Exponent at a target of 0, above the largest target.
        omega: Factor of the logarithm.
        epsilon: Error above 0 at which the logarithm is $\omega \log 2$.
        theta: Error above 0 at which the loss becomes linear.

    One unit per element; see `jaxloss.reduce`. The weight map of the paper multiplies the cells
    around a joint by 11: pass it as `weights`, with `reduction=jaxloss.mean_over_count` for the
    mean of the paper, which divides by the number of cells.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Wang et al., Adaptive Wing Loss for Robust Face Alignment via Heatmap Regression, ICCV
        2019. Its mean equals mmpose's `AdaptiveWingLoss`.

    >>> value = adaptive_wing_loss(jnp.array([0.25]), jnp.array([0.0]), alpha=2.0, omega=1.0)
    >>> value  # log(1 + 1 / 16)
    Array(0.06062462, dtype=float32)
    """
    check_float(pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    alpha, omega = numbers(pred, alpha=alpha, omega=omega)
    epsilon, theta = numbers(pred, epsilon=epsilon, theta=theta)
    require(lambda: target < alpha, "target", "values below alpha", where)
    require(lambda: epsilon > 0, "epsilon", "a positive value")
    require(lambda: theta > 0, "theta", "a positive value")
    size, exponent = absolute(pred - target), alpha - target
    near = size < theta
    ratio = jnp.where(near, size, theta) / epsilon
    curve = omega * jnp.log1p(safe_pow(ratio, exponent))
    slope = omega * exponent / theta * jax.nn.sigmoid(exponent * jnp.log(theta / epsilon))
    values = curve + jnp.where(near, 0, slope * (size - theta))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def dsnt_coordinates(heat_logits: Float[Array, "batch *space joints"]) -> Array:
    r"""Expected coordinates of each joint under the softmax of its heat map, in `(-1, 1)`.

    $$ \mu = \sum_u p(u) \, \frac{2 u + 1 - n}{n} $$

    for cells $u = 0, \ldots, n - 1$ along each axis: the centre of cell $i$ is at
    $(2 i + 1) / n - 1$.

    Args:
        heat_logits: Unnormalised log-probabilities, joints last.

    Returns:
        `batch joints dim` in the order (x, y[, z]); x runs along the last axis of the space.

    >>> dsnt_coordinates(jnp.array([0.0, 0.0, -jnp.inf, -jnp.inf]).reshape(1, 1, 4, 1))
    Array([[[-0.5,  0. ]]], dtype=float32)
    """
    check_float(heat_logits=heat_logits)
    check_min_rank(3, heat_logits=heat_logits)
    (heat_logits,) = widen(jnp.moveaxis(heat_logits, -1, 1))
    return _expected(_neg_log_map(heat_logits))


@compiled()
def dsnt_loss(
    heat_logits: Float[Array, "batch *space joints"],
    target: Shaped[Array, "batch joints dim"],
    *,
    sigma: Number = 1.0,
    regularization: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Distance from the expected coordinates of a heat map, plus a pull towards a Gaussian.

    $$ \ell = |\mu - y|_2 + \lambda \, \mathrm{JS}(p \,\|\, \mathcal{N}(y, \sigma^2)) $$

    with the softmax $p$ of the heat map, its expected coordinates $\mu$ in `[-1, 1]` and the
    Jensen-Shannon divergence in nats. The Gaussian is normalised over the cells.

    Args:
        heat_logits: Unnormalised log-probabilities, joints last.
        target: Coordinates (x, y[, z]) in `[-1, 1]`; x runs along the last axis of the space and
            the centre of cell `i` of `n` is at `(2 i + 1) / n - 1`.
        sigma: Width of the Gaussian above 0, in cells.
        regularization: Factor $\lambda$ of the divergence.

    One unit per joint; see `jaxloss.reduce`. For another distance apply a regression loss to
    `dsnt_coordinates(heat_logits)`.

    Returns:
        A float32 scalar, or `batch joints` if `reduction` is `"none"`.

    Reference:
        Nibali et al., Numerical Coordinate Regression with Convolutional Neural Networks, arXiv
        2018.

    >>> flat = jnp.zeros((1, 2, 2, 1))
    >>> dsnt_loss(flat, jnp.array([[[0.3, 0.4]]]), regularization=0.0)  # the mean is the centre
    Array(0.5, dtype=float32)
    """
    check_float(heat_logits=heat_logits)
    check_min_rank(3, heat_logits=heat_logits)
    batch, *space, joints = heat_logits.shape
    check_shape((batch, joints, len(space)), target=target)
    heat_logits, target = widen(jnp.moveaxis(heat_logits, -1, 1), target)
    heat_logits, target = mask(where, heat_logits, target)
    sigma, factor = numbers(target, sigma=sigma, regularization=regularization)
    require(lambda: sigma > 0, "sigma", "a positive value")
    nlp = _neg_log_map(heat_logits)  # (batch, joints, *space)
    distance = safe_norm(_expected(nlp) - target)
    nlq = jnp.zeros_like(nlp)
    for axis, size in enumerate(space):
        center = ((target[..., -1 - axis] + 1) * size - 1) / 2
        along = [size if i == axis else 1 for i in range(len(space))]
        nlq += _neg_log_gaussian(center, size, sigma).reshape(batch, joints, *along)
    divergence = jnp.sum(_js_terms(nlp, nlq), axis=tuple(range(2, nlp.ndim)))
    values = distance + factor * divergence
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def simcc_kl_loss(
    logits_x: Float[Array, "*batch joints bins_x"],
    logits_y: Float[Array, "*batch joints bins_y"],
    target: Shaped[Array, "*batch joints 2"],
    *,
    sigma: Number | tuple[Number, Number] = 6.0,
    temperature: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Divergence of classified coordinates from a Gaussian around the joint, in nats, from 0 up.

    $$ \ell = \tfrac{1}{2} \sum_{a \in \{x, y\}} \mathrm{KL}\left(
       \mathcal{N}(y_a, \sigma^2) \,\big\|\, \mathrm{softmax}(z_a / T) \right) $$

    with the Gaussian normalised over the bins. A target outside the image puts all of it into the
    first or last bin: hide such joints.

    Args:
        logits_x: Scores of the bins along the width.
        logits_y: Scores of the bins along the height.
        target: Coordinates (x, y) in bins: pixels times the bins for each pixel.
        sigma: Width of the Gaussian above 0 in bins, a number or a pair for (x, y).
        temperature: $T$; RTMPose's factor `beta` is its inverse.

    One unit per joint; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch joints` if `reduction` is `"none"`.

    Reference:
        Li et al., SimCC: a Simple Coordinate Classification Perspective for Human Pose
        Estimation, ECCV 2022. mmpose's `KLDiscretLoss(beta=1 / temperature)` averages over the
        bins what is added up here, and adds up the axes.

    >>> sure = jnp.array([[0.0, -1e4, -1e4, -1e4]])
    >>> flat, target = jnp.zeros((1, 4)), jnp.array([[0.0, 0.0]])
    >>> simcc_kl_loss(sure, flat, target, sigma=0.1)  # (0 + log 4) / 2
    Array(0.6931472, dtype=float32)
    """
    check_float(logits_x=logits_x, logits_y=logits_y)
    check_min_rank(2, logits_x=logits_x, logits_y=logits_y)
    check_shape((*logits_x.shape[:-1], logits_y.shape[-1]), logits_y=logits_y)
    check_shape((*logits_x.shape[:-1], 2), target=target)
    if isinstance(sigma, tuple) and len(sigma) != 2:
        raise ValueError(message("sigma", "a number or a pair", f"{len(sigma)} numbers"))
    logits_x, logits_y, target = mask(where, *widen(logits_x, logits_y, target))
    (temperature,) = numbers(target, temperature=temperature)
    require(lambda: temperature > 0, "temperature", "a positive value")
    values = jnp.zeros(target.shape[:-1], target.dtype)
    for i, logits in enumerate((logits_x, logits_y)):
        (width,) = numbers(target, sigma=sigma[i] if isinstance(sigma, tuple) else sigma)
        require(lambda width=width: width > 0, "sigma", "a positive value")
        nlq = _neg_log_gaussian(target[..., i], logits.shape[-1], width)
        values += 0.5 * jnp.sum(_kl_terms(nlq, neg_log_softmax(logits / temperature)), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _map_errors(pred: Array, target: Any, where: Where | None) -> Array:
    """Mean squared error of each map: `batch *space joints -> batch joints`."""
    check_float(pred=pred)
    check_min_rank(3, pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *(jnp.moveaxis(x, -1, 1) for x in widen(pred, target)))
    total = jnp.sum((pred - target) ** 2, axis=tuple(range(2, pred.ndim)))
    return total / math.prod(pred.shape[2:])


def _cells(size: int, like: Array) -> Array:
    """0 to `size` - 1 along the last axis, of the rank and dtype of `like`."""
    return jax.lax.broadcasted_iota(like.dtype, (1,) * (like.ndim - 1) + (size,), like.ndim - 1)


def _neg_log_map(logits: Array) -> Array:
    """-log p over all cells of each map, `batch joints *space`."""
    flat = neg_log_softmax(logits.reshape(*logits.shape[:2], math.prod(logits.shape[2:])))
    return flat.reshape(logits.shape)


def _expected(nlp: Array) -> Array:
    """Mean coordinates (x, y[, z]) of each map, in units of half the image."""
    probs, space = jnp.exp(-nlp), nlp.shape[2:]
    means = []
    for axis, size in enumerate(space):
        place = (2 * jnp.arange(size, dtype=probs.dtype) + (1 - size)) / size
        others = tuple(2 + i for i in range(len(space)) if i != axis)
        share = jnp.sum(probs, axis=others)
        means.append(jnp.sum(share * place.reshape(1, 1, size), axis=-1))
    return jnp.stack(means[::-1], axis=-1)


def _neg_log_gaussian(center: Array, size: int, sigma: Array) -> Array:
    """-log of a Gaussian normalised over cells 0 to `size` - 1, also with a far away center."""
    center = center[..., None]
    cells = _cells(size, center)
    nearest = jax.lax.stop_gradient(jnp.clip(jnp.round(center), 0, size - 1))
    # (cell - center)^2 less that of the nearest cell, as a product, which neither cancels nor
    # overflows.
    excess = (cells - nearest) * ((cells - center) + (nearest - center))
    excess *= 0.5 / sigma**2
    others = jnp.where(cells == nearest, 0, jnp.exp(-excess))
    return excess + jnp.log1p(jnp.sum(others, axis=-1, keepdims=True))


def _kl_terms(nlq: Array, nlp: Array) -> Array:
    """The terms q log(q / p) - q + p, at least 0 up to rounding; the added terms have sum 0."""
    ratio = nlp - nlq
    near = jnp.abs(ratio) < 0.5
    small = jnp.where(near, ratio, 0)
    close = small + expm1(-small)
    apart = safe_mul(jnp.exp(-nlq), jnp.where(near, 0, ratio) - 1) + jnp.exp(-nlp)
    return jnp.where(near, jnp.exp(-nlq) * close, apart)


def _js_terms(nlp: Array, nlq: Array) -> Array:
    """(p log(p / m) + q log(q / m)) / 2 with m = (p + q) / 2, each at least 0."""
    # With u = log(p / q) this is m (u tanh(u / 2) - 2 log cosh(u / 2)) / 2.
    p, q = jnp.exp(-nlp), jnp.exp(-nlq)
    impossible = nlp == jnp.inf
    u = jnp.where(impossible, jnp.inf, nlq - jnp.where(impossible, 0, nlp))
    near = jnp.abs(u) < 1
    half = jnp.where(near, u, 0) / 2
    bend = 2 * half * jnp.tanh(half) - 2 * jnp.log1p(2 * jnp.sinh(half / 2) ** 2)
    size = jnp.where(near | (jnp.abs(u) > 800), 800, absolute(u))
    tail = jnp.exp(-size)
    apart = 2 * math.log(2) - 2 * jnp.log1p(tail) - 2 * size * tail / (1 + tail)
    return (p + q) / 4 * jnp.where(near, bend, apart)


_MAPS = dict(pred=draw_normal("B H W T"), target=draw_normal("B H W T"))
_UNIT_MAPS = dict(pred=draw_unit("B H T"), target=draw_unit("B H T"))
_SIZES = dict(H=3, W=4, T=3)

CASES = (
    Case(heatmap_mse_loss, _MAPS, positions="B T", sizes=_SIZES, zero_at_target=True),
    Case(ohkm_mse_loss, _MAPS, dict(k=2), positions="B T", sizes=_SIZES, zero_at_target=True),
    Case(
        combined_target_mse_loss,
        dict(pred=draw_normal("B H W T 3"), target=draw_normal("B H W T 3")),
        positions="B T",
        sizes=_SIZES,
        zero_at_target=True,
    ),
    Case(adaptive_wing_loss, _UNIT_MAPS, sizes=_SIZES, zero_at_target=True),
    Case(
        adaptive_wing_loss,
        dict(pred=draw_normal("B H T"), target=draw_unit("B H T")),
        dict(alpha=1.8, omega=2.0, epsilon=0.7, theta=0.4),
        "options",
        sizes=_SIZES,
    ),
    Case(
        dsnt_loss,
        dict(heat_logits=draw_normal("B H W T"), target=draw_uniform("B T 2", -1, 1)),
        dict(sigma=0.8, regularization=0.5),
        positions="B T",
        sizes=_SIZES,
    ),
    Case(
        simcc_kl_loss,
        dict(
            logits_x=draw_normal("B T W"),
            logits_y=draw_normal("B T H"),
            target=draw_uniform("B T 2", 0, 3),
        ),
        dict(sigma=1.3, temperature=0.7),
        sizes=_SIZES,
    ),
)
