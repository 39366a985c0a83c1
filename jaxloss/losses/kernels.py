"""Maximum mean discrepancy of two samples, and the kernels it is taken with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal
from .._core.checks import (
    check_array,
    check_float,
    check_integer,
    check_min_rank,
    check_shape,
    check_where,
    message,
    naming,
)
from .._core.compiled import compiled
from .._core.numerics import numbers, safe_div, widen
from .._core.pairwise import (
    gather_rows,
    own_index,
    pairwise_distance,
    similarities,
    squared_distances,
)
from .._core.reduce import mask, reduce
from .._core.runs import in_chunks
from .._core.sharding import unshard
from .._core.terms import Axis, add_up
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["imq", "median_bandwidth", "mmd_loss", "polynomial", "rbf", "rbf_mixture"]

Kernel = Callable[[Array, Array], Array]


@compiled("unbiased", "chunk_size", "axis_name", functions=("kernel",))
def mmd_loss(
    x: Float[Array, "*batch n features"],
    y: Shaped[Array, "*batch m features"],
    *,
    kernel: Kernel | None = None,
    unbiased: bool = False,
    chunk_size: int | None = None,
    y_where: Where | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Squared maximum mean discrepancy of two samples, from 0 up.

    $$ \ell = \frac{1}{n^2} \sum_{ij} k(x_i, x_j) + \frac{1}{m^2} \sum_{ij} k(y_i, y_j)
       - \frac{2}{n m} \sum_{ij} k(x_i, y_j) $$

    `unbiased` leaves out the pairs $i = j$ of one sample and divides by $n (n - 1)$ and
    $m (m - 1)$; it may then be below 0. Samples of fewer than two points are then no unit.

    Memory: with the gradient up to 14 arrays `n x m`, or in chunks of `chunk_size x m`; never one
    of `n x m x features`.

    Args:
        x: One sample, points before features.
        y: The other sample; it may have another number of points.
        kernel: Positive definite kernel, from `(n, features)` and `(m, features)` to `(n, m)`: one
            of `rbf`, `rbf_mixture`, `polynomial`, `imq`, or a function; `rbf_mixture()` if None.
        unbiased: Whether to take the U-statistic rather than the V-statistic.
        chunk_size: Points of one sample at a time.
        y_where: Bool array `(*batch, m)`; the other points of `y` do not exist.
        where: Bool array `(*batch, n)`, the same for `x`.
        axis_name: Mapped axes over which the points of both samples are split; the value is then
            that of all of them, on every device.

    One unit per pair of samples (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Gretton et al., A Kernel Two-Sample Test, JMLR 2012.

    >>> x, y = jnp.array([[0.0]]), jnp.array([[2.0]])
    >>> mmd_loss(x, y, kernel=rbf(1.0))  # 2 - 2 exp(-2)
    Array(1.7293295, dtype=float32)
    """
    check_float(x=x)
    check_min_rank(2, x=x)
    check_array(y=y)
    points = jnp.shape(y)[-2:-1]
    check_shape((*x.shape[:-2], *points, x.shape[-1]), y=y)
    for name, kept, of in (("where", where, x), ("y_where", y_where, y)):
        if kept is not None:
            check_where(kept, name)
            check_shape(jnp.shape(of)[:-1], **{name: kept})
    x, y = widen(x, y)
    (x,), (y,) = mask(where, x), mask(y_where, y)
    kept = [
        jnp.ones_like(a[..., 0], bool) if w is None else jnp.asarray(w)
        for a, w in ((x, where), (y, y_where))
    ]
    one = partial(_discrepancy, kernel or rbf_mixture(), unbiased, chunk_size, axis_name)
    for _ in range(x.ndim - 2):
        one = jax.vmap(one)
    values, units = one(x, y, *kept)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _discrepancy(
    kernel: Kernel,
    unbiased: bool,
    chunk_size: int | None,
    axis_name: Axis,
    x: Array,
    y: Array,
    x_kept: Array,
    y_kept: Array,
) -> tuple[Array, Array]:
    """The discrepancy of two samples, and whether both have points enough."""
    samples = []
    for a, kept in ((x, x_kept), (y, y_kept)):
        everyone = [unshard(b, 0) for b in gather_rows(axis_name, a, kept) if b is not None]
        own = own_index(a.shape[0], axis_name)
        count = add_up(jnp.sum(kept, dtype=a.dtype), axis_name)
        samples.append((a, kept, own, everyone, count))

    def total(rows: Any, others: Any, *, apart: bool) -> Array:
        a, kept, own, _, _ = rows
        _, _, _, (keys, shown), _ = others
        place = jnp.arange(keys.shape[0], dtype=jnp.int32)

        def find(a: Array, kept: Array, own: Array) -> Array:
            similar = kernel(a, keys)
            check_shape((a.shape[0], keys.shape[0]), kernel=similar)
            pairs = kept[:, None] & shown[None]
            pairs = pairs & (own[:, None] != place[None]) if apart else pairs
            return jnp.sum(jnp.where(pairs, similar.astype(keys.dtype), 0))

        return add_up(in_chunks(find, chunk_size, a, kept, own), axis_name)

    first, second = samples
    n, m = first[-1], second[-1]
    less = 1 if unbiased else 0
    value = (
        safe_div(total(first, first, apart=unbiased), n * (n - less))
        + safe_div(total(second, second, apart=unbiased), m * (m - less))
        - 2 * safe_div(total(first, second, apart=False), n * m)
    )
    if not unbiased:  # what lies below 0 is rounding
        value = jnp.where(value < 0, value - jax.lax.stop_gradient(value), value)
    return value, (n > less) & (m > less)


def _kernel(*data: str, static: tuple[str, ...] = ()) -> Callable[[type], Any]:
    """Frozen dataclass and pytree, so that a call with it is compiled and its numbers traced."""

    def decorate(cls: type) -> Any:
        return jax.tree_util.register_dataclass(
            dataclass(frozen=True)(cls), data_fields=list(data), meta_fields=list(static)
        )

    return decorate


@_kernel("bandwidth")
class rbf:  # noqa: N801
    """The Gaussian kernel `exp(-|x - y|^2 / (2 bandwidth^2))`, a callable of two sets of points.

    scikit-learn's `rbf_kernel` with `gamma = 1 / (2 bandwidth^2)`.

    >>> rbf(2.0)(jnp.zeros((1, 1)), jnp.array([[0.0], [2.0]]))  # 1 and exp(-1 / 2)
    Array([[1.        , 0.60653067]], dtype=float32)
    """

    bandwidth: Number = 1.0

    def __call__(self, x: Array, y: Array) -> Array:
        """Similarity of every point of `x` to every point of `y`, `(n, m)`."""
        square = squared_distances(x, y)
        return _gaussians(square, _rates(square, self.bandwidth))


@_kernel("scales")
class rbf_mixture:  # noqa: N801
    """The mean of `rbf` kernels of several bandwidths.

    >>> rbf_mixture((1.0, 1e4))(jnp.zeros((1, 1)), jnp.array([[100.0]]))  # (0 + 1) / 2
    Array([[0.499975]], dtype=float32)
    """

    scales: tuple[Number, ...] = (0.2, 0.5, 0.9, 1.3)

    def __call__(self, x: Array, y: Array) -> Array:
        """Similarity of every point of `x` to every point of `y`, `(n, m)`."""
        square = squared_distances(x, y)
        return _gaussians(square, _rates(square, *self.scales))


@_kernel("gamma", "offset", static=("degree",))
class polynomial:  # noqa: N801
    """The kernel `(gamma x . y + offset)^degree`: it compares moments up to that degree.

    `gamma` is one over the number of features if None, as in scikit-learn's `polynomial_kernel`,
    which says `coef0` for the offset.

    >>> polynomial(2, gamma=1.0)(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]]))  # (5 + 1)^2
    Array([[36.]], dtype=float32)
    """

    degree: int = 3
    gamma: Number | None = None
    offset: Number = 1.0

    def __call__(self, x: Array, y: Array) -> Array:
        """Similarity of every point of `x` to every point of `y`, `(n, m)`."""
        with naming("polynomial"):
            check_integer(degree=self.degree)
            if self.degree < 1:
                raise ValueError(message("degree", "at least 1", self.degree))
            x, y = widen(x, y)
            gamma = 1 / max(x.shape[-1], 1) if self.gamma is None else self.gamma
            gamma, offset = numbers(x, gamma=gamma, offset=self.offset)
        return (gamma * similarities(x, y) + offset) ** int(self.degree)


@_kernel("scale", "power")
class imq:  # noqa: N801
    """The inverse multiquadric kernel `(1 + |x - y|^2 / scale^2)^-power`, with heavy tails.

    With `power=1.0` that of Wasserstein autoencoders, whose `C` is the square of the scale.

    >>> imq()(jnp.zeros((1, 1)), jnp.array([[0.0], [3.0]]))[0, 1] ** -2  # 1 + 9
    Array(10., dtype=float32)
    """

    scale: Number = 1.0
    power: Number = 0.5

    def __call__(self, x: Array, y: Array) -> Array:
        """Similarity of every point of `x` to every point of `y`, `(n, m)`."""
        square = squared_distances(x, y)
        with naming("imq"):
            scale, power = numbers(square, scale=self.scale, power=self.power)
        return jnp.exp(-power * jnp.log1p(square / scale**2))


@compiled()
def median_bandwidth(
    x: Float[Array, "n features"],
    y: Shaped[Array, "m features"],
    *,
    where: Where | None = None,
    y_where: Where | None = None,
) -> Array:
    """The median distance of two points among both samples, a usual bandwidth; without a gradient.

    Args:
        x: One sample.
        y: The other sample.
        where: Bool array `(n,)` of the points of `x` that count.
        y_where: Bool array `(m,)` of those of `y`.

    Returns:
        A float32 scalar; 1 where it would be 0 or there are no two points. Memory: `(n + m)^2`.

    Reference:
        Gretton et al., A Kernel Two-Sample Test, JMLR 2012.

    >>> median_bandwidth(jnp.array([[0.0], [1.0]]), jnp.array([[3.0]]))  # of 1, 2 and 3
    Array(2., dtype=float32)
    """
    check_float(x=x)
    if jnp.ndim(x) != 2:
        raise ValueError(message("x", "shape (n, features)", f"shape {jnp.shape(x)}"))
    check_array(y=y)
    check_shape((*jnp.shape(y)[:1], x.shape[1]), y=y)
    x, y = jax.lax.stop_gradient(widen(x, y))
    (x,), (y,) = mask(where, x), mask(y_where, y)
    kept = [
        jnp.ones_like(a[:, 0], bool) if w is None else jnp.asarray(w)
        for a, w in ((x, where), (y, y_where))
    ]
    z, kept = (jnp.concatenate([unshard(a) for a in pair]) for pair in ((x, y), kept))
    distances = pairwise_distance(z, z)
    place = jnp.arange(z.shape[0])
    pairs = kept[:, None] & kept[None] & (place[:, None] < place[None])
    ordered = jnp.sort(jnp.where(pairs, distances, jnp.inf).reshape(-1))
    count = jnp.sum(pairs)
    middle = jnp.stack([(count - 1) // 2, count // 2])
    middle = jnp.clip(middle, 0, max(ordered.size - 1, 0))
    found = jnp.mean(ordered[middle]) if ordered.size else jnp.ones((), x.dtype)
    return jnp.where((count > 0) & (found > 0), found, 1)


def _rates(square: Array, *bandwidths: Any) -> tuple[Array, ...]:
    with naming("rbf"):
        scales = [numbers(square, bandwidth=b)[0] for b in bandwidths]
    return tuple(0.5 / scale**2 for scale in scales)


@jax.custom_jvp
def _gaussians(square: Array, rates: tuple[Array, ...]) -> Array:
    """The mean of exp(-rate square); its gradient keeps one array, however many rates."""
    return _mean([jnp.exp(-rate * square) for rate in rates])


def _gaussians_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (square, rates), (moved, rates_moved) = primals, tangents
    powers = [jnp.exp(-rate * square) for rate in rates]
    out_dot = jnp.zeros_like(square)
    if not isinstance(moved, SymbolicZero):
        slope = _mean([rate * power for rate, power in zip(rates, powers, strict=True)])
        out_dot -= slope * moved
    for power, rate_moved in zip(powers, rates_moved, strict=True):
        if not isinstance(rate_moved, SymbolicZero):
            out_dot -= square * power * rate_moved / len(rates)
    return _mean(powers), out_dot


_gaussians.defjvp(_gaussians_jvp, symbolic_zeros=True)


def _mean(arrays: list[Array]) -> Array:
    return sum(arrays[1:], arrays[0]) / len(arrays)


_SAMPLES = dict(x=draw_normal("B D"), y=draw_normal("M D"))
_SIZES = dict(D=2, M=5)
_COUPLED = {"microbatches": "points are compared with all of the batch"}
_EVERYWHERE = {"devices": "the law gives every device all of `y`, which then counts once for each"}

CASES = (
    Case(mmd_loss, _SAMPLES, positions="B", sizes=_SIZES, coupled=True, without=_COUPLED),
    Case(
        mmd_loss,
        dict(_SAMPLES, y=draw_normal("M D", scale=3)),
        dict(kernel=imq(0.8, 1.0), unbiased=True, chunk_size=3),
        label="unbiased",
        positions="B",
        sizes=_SIZES,
        coupled=True,
        without=dict(_COUPLED, **_EVERYWHERE),
    ),
)
