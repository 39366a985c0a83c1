"""Soft dynamic time warping: distances between series of different speed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal, draw_uniform
from .._core.checks import check_array, check_float, check_min_rank, check_shape, message, require
from .._core.compiled import compiled
from .._core.lattice import IMPOSSIBLE, LOG_ZERO, kept, merge, skew, split, unskew
from .._core.numerics import numbers, safe_mul, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["soft_dtw_divergence", "soft_dtw_from_cost", "soft_dtw_loss"]


@compiled("bandwidth")
def soft_dtw_loss(
    pred: Float[Array, "*batch time dim"],
    target: Shaped[Array, "*batch steps dim"],
    *,
    gamma: Number = 1.0,
    bandwidth: int | None = None,
    target_where: Where | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Soft dynamic time warping distance of two series, in the squared unit of the target.

    $$ R_{ij} = |x_i - y_j|^2 - \gamma \log \sum_{k \in \{R_{i-1,j}, R_{i,j-1}, R_{i-1,j-1}\}}
    e^{-k / \gamma}, \qquad \ell = R_{TS} $$

    For $\gamma \to 0$ the cost of the best alignment; for larger $\gamma$ all alignments count,
    which makes it smooth, smaller, and possibly negative: `soft_dtw_divergence` is not. A series
    without a kept step has no alignment: infinity with gradient 0.

    Args:
        pred: The series to be trained.
        target: A series with the same features, of any length.
        gamma: Smoothing above 0, in the squared unit of the target.
        bandwidth: How far an alignment may leave the diagonal, in steps (Sakoe-Chiba); series of
            different length may leave it by the difference on top. None allows all.
        target_where: Mask of the target's steps, `(*batch, steps)`; a hidden step is skipped.
        where: Mask of the steps of `pred`, `(*batch, time)`.

    One unit per pair of series; see `jaxloss.reduce`. It keeps a few arrays of
    `batch x time x (time + steps)` floats, none with a feature axis. All derivatives exist, forward
    and reverse.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Cuturi and Blondel, Soft-DTW: a Differentiable Loss Function for Time-Series, ICML 2017.
        Equals `SoftDTW` of ott-jax without `debiased`, and tslearn's `soft_dtw`.

    One step against two:

    >>> soft_dtw_loss(jnp.array([[0.0]]), jnp.array([[1.0], [2.0]]))  # 1 + 4
    Array(5., dtype=float32)
    """
    pred, target, rows, columns = _prepare(pred, target, where, target_where)
    (gamma,) = numbers(pred, gamma=gamma)
    values = _distance(pred, target, gamma, rows, columns, bandwidth)
    exists = None if rows is None else jnp.any(rows, axis=-1)
    return reduce(values, where=exists, weights=weights, reduction=reduction)


@compiled("bandwidth")
def soft_dtw_divergence(
    pred: Float[Array, "*batch time dim"],
    target: Shaped[Array, "*batch steps dim"],
    *,
    gamma: Number = 1.0,
    bandwidth: int | None = None,
    target_where: Where | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Soft-DTW divergence of two series, from 0 up, in the squared unit of the target.

    $$ \ell = D_\gamma(x, y) - \tfrac{1}{2} D_\gamma(x, x) - \tfrac{1}{2} D_\gamma(y, y) $$

    with the soft-DTW distance $D_\gamma$ of `soft_dtw_loss`. It is 0 with gradient 0 for equal
    series.

    Args:
        pred: The series to be trained.
        target: A series with the same features, of any length.
        gamma: Smoothing above 0, in the squared unit of the target.
        bandwidth: As in `soft_dtw_loss`.
        target_where: Mask of the target's steps, `(*batch, steps)`; a hidden step is skipped.
        where: Mask of the steps of `pred`, `(*batch, time)`.

    One unit per pair of series; see `jaxloss.reduce`. Memory as for three `soft_dtw_loss`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Blondel et al., Differentiable Divergences Between Time Series, AISTATS 2021. Equals
        `SoftDTW(debiased=True)` of ott-jax.

    Two series of one step have a single alignment:

    >>> soft_dtw_divergence(jnp.array([[0.0]]), jnp.array([[3.0]]))
    Array(9., dtype=float32)
    """
    pred, target, rows, columns = _prepare(pred, target, where, target_where)
    (gamma,) = numbers(pred, gamma=gamma)
    values, *own = _pairs(pred, target, gamma, rows, columns, bandwidth)
    values = jnp.where(jnp.isfinite(values), values - (own[0] + own[1]) / 2, values)
    values += lax.stop_gradient(jax.nn.relu(-values))  # rounding alone makes it negative
    exists = None if rows is None else jnp.any(rows, axis=-1)
    return reduce(values, where=exists, weights=weights, reduction=reduction)


@compiled("bandwidth")
def soft_dtw_from_cost(
    cost: Float[Array, "*batch time steps"],
    *,
    gamma: Number = 1.0,
    bandwidth: int | None = None,
    target_where: Where | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Soft dynamic time warping over a given matrix of costs, in their unit.

    $$ R_{ij} = c_{ij} - \gamma \log \sum_{k \in \{R_{i-1,j}, R_{i,j-1}, R_{i-1,j-1}\}}
    e^{-k / \gamma}, \qquad \ell = R_{TS} $$

    The gradient is the expected alignment: how likely each pair of steps is on a path drawn with
    probability proportional to exp(-cost / gamma). An infinite cost forbids a pair.

    Args:
        cost: What it costs to align step i of the first series with step j of the second.
        gamma: Smoothing above 0, in the unit of the costs.
        bandwidth: As in `soft_dtw_loss`.
        target_where: Mask of the second series, `(*batch, steps)`; a hidden step is skipped.
        where: Mask of the first series, `(*batch, time)`.

    One unit per matrix; see `jaxloss.reduce`. Memory as for `soft_dtw_loss`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Cuturi and Blondel, Soft-DTW: a Differentiable Loss Function for Time-Series, ICML 2017.

    >>> soft_dtw_from_cost(jnp.array([[1.0, 4.0]]))
    Array(5., dtype=float32)
    """
    check_float(cost=cost)
    check_min_rank(2, cost=cost)
    *batch, time, steps = cost.shape
    rows = kept((*batch, time), where=where)
    columns = kept((*batch, steps), target_where=target_where)
    (gamma,) = numbers(*widen(cost), gamma=gamma)
    (cost,) = mask(rows, *widen(cost))
    cost = cost if columns is None else jnp.where(columns[..., None, :], cost, 0)
    require(lambda: gamma > 0, "gamma", "a value above 0")
    values = _warp(_in_band(cost, rows, columns, bandwidth), gamma, rows, columns)
    exists = None if rows is None else jnp.any(rows, axis=-1)
    return reduce(values, where=exists, weights=weights, reduction=reduction)


def _prepare(
    pred: Array, target: Array, where: Array | None, target_where: Array | None
) -> tuple[Array, Array, Array | None, Array | None]:
    """Checked, masked and widened series, and the masks of both."""
    check_float(pred=pred)
    check_array(target=target)
    check_min_rank(2, pred=pred, target=target)
    *batch, time, dim = pred.shape
    steps = jnp.shape(target)[-2]
    check_shape((*batch, steps, dim), target=target)
    rows = kept((*batch, time), where=where)
    columns = kept((*batch, steps), target_where=target_where)
    pred, target = widen(pred, target)
    (pred,), (target,) = mask(rows, pred), mask(columns, target)
    return pred, target, rows, columns


def _distance(
    pred: Array,
    target: Array,
    gamma: Array,
    rows: Array | None,
    columns: Array | None,
    bandwidth: int | None,
) -> Array:
    require(lambda: gamma > 0, "gamma", "a value above 0")
    cost = _squared_distances(pred, target)
    return _warp(_in_band(cost, rows, columns, bandwidth), gamma, rows, columns)


@jax.custom_jvp
def _squared_distances(x: Array, y: Array) -> Array:
    """`(*batch, time, dim), (*batch, steps, dim) -> (*batch, time, steps)`, from differences."""
    return jnp.sum((x[..., :, None, :] - y[..., None, :, :]) ** 2, axis=-1)


@_squared_distances.defjvp
def _squared_distances_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # By products of matrices: differences would be kept, with their feature axis, for the gradient.
    # A common offset of both series, which would only cancel, is taken out.
    (x, y), (moved_x, moved_y) = primals, tangents
    offset = lax.stop_gradient(jnp.mean(x, axis=-2, keepdims=True)) if x.shape[-2] else 0
    u, v = x - offset, y - offset
    times = lambda a, b: jnp.einsum("...id,...jd->...ij", a, b, precision=lax.Precision.HIGHEST)
    own = lambda a, b: jnp.sum(a * b, axis=-1)
    moved = own(u, moved_x)[..., :, None] + own(v, moved_y)[..., None, :]
    return _squared_distances(x, y), 2 * (moved - times(moved_x, v) - times(u, moved_y))


def _pairs(
    x: Array,
    y: Array,
    gamma: Array,
    rows: Array | None,
    columns: Array | None,
    bandwidth: int | None,
) -> tuple[Array, Array, Array]:
    """Distances of x and y, of x to itself and of y to itself."""
    if x.shape != y.shape:
        return (
            _distance(x, y, gamma, rows, columns, bandwidth),
            _distance(x, x, gamma, rows, rows, bandwidth),
            _distance(y, y, gamma, columns, columns, bandwidth),
        )
    # As one batch: the same instructions give the same result, 0 for equal series to the last bit.
    if rows is not None or columns is not None:
        everything = jnp.ones_like(jnp.sum(x, axis=-1), dtype=bool)
        rows = everything if rows is None else rows
        columns = everything if columns is None else columns
        rows, columns = jnp.stack([rows, rows, columns]), jnp.stack([columns, rows, columns])
    first, second = jnp.stack([x, x, y]), jnp.stack([y, x, y])
    xy, xx, yy = _distance(first, second, gamma, rows, columns, bandwidth)
    return xy, xx, yy


def _in_band(
    cost: Array, rows: Array | None, columns: Array | None, bandwidth: int | None
) -> Array:
    """Infinite costs further from the diagonal than `bandwidth`, counted in kept steps."""
    if bandwidth is None:
        return cost
    if isinstance(bandwidth, bool) or not isinstance(bandwidth, (int, np.integer)):
        raise TypeError(message("bandwidth", "an integer or None", repr(bandwidth)))
    if bandwidth < 0:
        raise ValueError(message("bandwidth", "a number from 0 up", bandwidth))
    batch = cost.shape[:-2]

    def place(mask: Array | None, size: int) -> Array:
        mask = jnp.ones(size, bool) if mask is None else mask
        return jnp.broadcast_to(jnp.cumsum(mask, axis=-1, dtype=jnp.int32), (*batch, size))

    i, j = place(rows, cost.shape[-2]), place(columns, cost.shape[-1])
    ahead = i[..., :, None] - j[..., None, :]
    longer = ahead[..., -1:, -1:]
    inside = ahead >= jnp.minimum(longer, 0) - bandwidth
    inside &= ahead <= jnp.maximum(longer, 0) + bandwidth
    return jnp.where(inside, cost, jnp.inf)


@jax.custom_jvp
def _warp(cost: Array, gamma: Array, rows: Array | None, columns: Array | None) -> Array:
    """The soft minimum over all alignments, `(*batch, time, steps) -> (*batch,)`."""
    return _value(_paths(cost, gamma, rows, columns)[0], gamma)


@_warp.defjvp
def _warp_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    cost, gamma, rows, columns = primals
    total, aligned = _aligned(cost, gamma, rows, columns)
    value = _value(total, gamma)
    moved = jnp.sum(aligned * tangents[0], axis=(-2, -1))
    # The value is the expected cost less gamma times the entropy of the alignments.
    expected = jnp.sum(safe_mul(aligned, cost), axis=(-2, -1))
    entropy = jnp.where(total < IMPOSSIBLE, 0, expected - value) / gamma
    return value, moved - entropy * tangents[1]


def _value(total: Array, gamma: Array) -> Array:
    return jnp.where(total < IMPOSSIBLE, jnp.inf, -gamma * total)


def _paths(
    cost: Array, gamma: Array, rows: Array | None, columns: Array | None, *, codes: bool = False
) -> tuple[Array, Any]:
    """The log weight of all alignments, and the codes for `split` at each node.

    Nodes go along anti-diagonals of a lattice with one row and one column more in front. A hidden
    row hands down what stands above it, a hidden column hands on what stands left of it.
    """
    batch = cost.shape[:-2]
    time, steps = cost.shape[-2:]
    weight = jnp.pad(
        _rows_first(-cost / gamma), [(1, 0), *[(0, 0)] * (1 + len(batch))], constant_values=-jnp.inf
    )
    across = down = None
    if columns is not None:
        across = jnp.broadcast_to(~jnp.moveaxis(columns, -1, 0)[None], weight.shape)
        weight = jnp.where(across, 0, weight)
        across = skew(across, time + steps, False)
    weight = jnp.maximum(skew(weight, time + steps), LOG_ZERO)
    if rows is not None:
        down = ~jnp.moveaxis(rows, -1, 0)
        down = jnp.concatenate([down[:1] & ~down[:1], down]) if time else down
        weight = jnp.where(down[None], 0, weight)
    zero = jnp.sum(jnp.zeros_like(cost), axis=(-2, -1))[None]
    first = lax.broadcasted_iota(jnp.int32, (time + 1, *[1] * len(batch)), 0) == 0
    start = jnp.where(first, 0, LOG_ZERO) + zero
    below = lambda x: jnp.concatenate([jnp.full_like(x[:1], LOG_ZERO), x[:-1]])

    def step(states: Any, node: Any) -> Any:
        last, before = states
        weight, across = node
        above = below(last)
        straight, code = merge(above, last)
        total, turn = merge(straight, below(before))
        if across is not None:
            total = jnp.where(across, last, total)
        if down is not None:
            total = jnp.where(down, above, total)
        total = total + weight
        largest = jnp.max(lax.stop_gradient(total), axis=0)
        largest = jnp.where(largest < IMPOSSIBLE, 0, largest)
        states = total - largest[None], last - largest[None]
        return states, (largest, (code, turn) if codes else None)

    nodes = weight, across
    (last, _), (factors, found) = lax.scan(step, (start, start * 0 + LOG_ZERO), nodes)
    return jnp.sum(factors, axis=0) + last[-1], (found, across, down)


def _aligned(
    cost: Array, gamma: Array, rows: Array | None, columns: Array | None
) -> tuple[Array, Array]:
    """The log weight of all alignments, and in which share of them each pair of steps is.

    The whole flows back from the last node, divided as the nodes before each contributed.
    """
    total, (codes, across, down) = _paths(cost, gamma, rows, columns, codes=True)
    time, steps = cost.shape[-2:]
    above = lambda x: jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])

    def step(shares: Any, node: Any) -> Any:
        share, later = shares
        (code, turn), across = node
        straight, diagonal = split(share, turn)
        vertical, horizontal = split(straight, code)
        if across is not None:
            vertical, diagonal = (jnp.where(across, 0, x) for x in (vertical, diagonal))
            horizontal = jnp.where(across, share, horizontal)
        if down is not None:
            horizontal, diagonal = (jnp.where(down, 0, x) for x in (horizontal, diagonal))
            vertical = jnp.where(down, share, vertical)
        return (later + above(vertical) + horizontal, above(diagonal)), share

    last = lax.broadcasted_iota(jnp.int32, (time + 1, *[1] * (cost.ndim - 2)), 0) == time
    start = jnp.where(last, jnp.ones_like(total)[None], 0)
    _, shares = lax.scan(step, (start, start * 0), (codes, across), reverse=True)
    aligned = jnp.moveaxis(unskew(shares, steps)[1:], (0, 1), (-2, -1))
    there = ~(total < IMPOSSIBLE)[..., None, None]  # NaN is to stay NaN
    if rows is not None:
        there &= rows[..., :, None]
    if columns is not None:
        there &= columns[..., None, :]
    return total, jnp.where(there, aligned, 0)


def _rows_first(x: Array) -> Array:
    return jnp.moveaxis(x, (-2, -1), (0, 1))


_SERIES = dict(pred=draw_normal("B T D"), target=draw_normal("B S D"))
_SIZES = dict(T=4, S=3, D=2)
CASES = (
    Case(soft_dtw_loss, _SERIES, dict(gamma=0.7), positions="B T", sizes=_SIZES),
    Case(
        soft_dtw_divergence,
        _SERIES,
        dict(gamma=0.4, bandwidth=1),
        positions="B T",
        sizes=dict(T=3, S=3, D=2),
        zero_at_target=True,
        without={"gradient_accuracy": "it weighs alignments by differences of large float32 costs"},
    ),
    Case(
        soft_dtw_from_cost,
        dict(cost=draw_uniform("B T S", 0, 1, kind="real")),
        dict(gamma=0.7, bandwidth=1),
        positions="B T",
        sizes=_SIZES,
    ),
)
