"""Optimal transport between samples or histograms: in one dimension, sliced, and by Sinkhorn."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from .._core.case import Case, draw_normal, draw_probs
from .._core.checks import (
    check_array,
    check_float,
    check_integer,
    check_min_rank,
    check_same_shape,
    check_shape,
    check_where,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.numerics import absolute, numbers, safe_div, safe_log, safe_pow, unit_vectors, widen
from .._core.pairwise import squared_distances
from .._core.reduce import mask, reduce
from .._core.sharding import unshard
from .._core.sinkhorn import check_iterations, log_scaled
from .._core.sorting import sort_keys
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "wasserstein_1d",
    "wasserstein_1d_from_probs",
]


@compiled()
def wasserstein_1d(
    x: Float[Array, "*batch n"],
    y: Shaped[Array, "*batch n"],
    *,
    p: Number = 1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Wasserstein distance of two samples of numbers, to the power `p`, from 0 up.

    $$ \ell = \frac{1}{n} \sum_i |x_{(i)} - y_{(i)}|^p $$

    of both samples in ascending order; no root is taken. In memory of order n.

    Args:
        x: One sample on the last axis.
        y: The other sample, as large.
        p: Power of the distance, at least 1.
        where: Bool array of the shape of `x`: hides an entry of `x` and the same one of `y`.

    One unit per pair of samples (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Vallender, Calculation of the Wasserstein Distance Between Probability Distributions on the
        Line, Theory of Probability 1974. Equals SciPy's `wasserstein_distance` at `p=1`.

    >>> wasserstein_1d(jnp.array([0.0, 5.0]), jnp.array([6.0, 1.0]))  # 0 to 1, 5 to 6
    Array(1., dtype=float32)
    """
    check_float(x=x)
    check_min_rank(1, x=x)
    check_same_shape(x=x, y=y)
    if where is not None:
        check_where(where)
        check_same_shape(x=x, where=where)
    x, y = mask(where, *widen(x, y))
    units = jnp.any(_shown(x, where), axis=-1)
    values = _matched_costs(x, y, where, p)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def wasserstein_1d_from_probs(
    probs: Float[Array, "*batch bins"],
    target: Shaped[Array, "*batch bins"],
    *,
    bin_width: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Wasserstein distance of two histograms over the same evenly spaced bins, from 0 up.

    $$ \ell = w \sum_{k < K} \Big| \sum_{j \le k} p_j - t_j \Big| $$

    Also known as the earth mover's distance of ordered classes.

    Args:
        probs: Probabilities of the bins, bins last.
        target: Probabilities of the same shape.
        bin_width: Distance $w$ from one bin to the next.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Vallender, Calculation of the Wasserstein Distance Between Probability Distributions on the
        Line, Theory of Probability 1974. Equals SciPy's `wasserstein_distance` of the numbers of
        the bins, weighted.

    >>> wasserstein_1d_from_probs(jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 0.5, 0.5]))
    Array(1.5, dtype=float32)
    """
    check_float(probs=probs)
    check_min_rank(1, probs=probs)
    check_same_shape(probs=probs, target=target)
    probs, target = mask(where, *widen(probs, target))
    (bin_width,) = numbers(probs, bin_width=bin_width)
    require(lambda: probs >= 0, "probs", "values of at least 0", where)
    require(lambda: target >= 0, "target", "values of at least 0", where)
    # All of both lies up to the last bin: what is left there is rounding, and its sign noise.
    carried = jnp.cumsum(probs - target, axis=-1)[..., :-1]
    values = bin_width * jnp.sum(absolute(carried), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("projections")
def sliced_wasserstein(
    x: Float[Array, "*batch n features"],
    y: Shaped[Array, "*batch n features"],
    *,
    key: ArrayLike,
    projections: int = 128,
    p: Number = 2,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Sliced Wasserstein distance of two samples, to the power `p`, from 0 up.

    $$ \ell = \frac{1}{L} \sum_l W_p^p(\theta_l \cdot x, \theta_l \cdot y) $$

    over random directions $\theta_l$ of length 1, the same for all units; no root is taken. Memory:
    a few arrays `n x projections`.

    Args:
        x: One sample, points before features.
        y: The other sample, as large.
        key: A key of `jax.random`; draw a new one for each step.
        projections: Number $L$ of directions.
        p: Power of the distance, at least 1.
        where: Bool array `(*batch, n)`: hides a point of `x` and the same one of `y`.

    One unit per pair of samples (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Bonneel et al., Sliced and Radon Wasserstein Barycenters of Measures, JMIV 2015. Equals
        `sliced_wasserstein` of ott-jax, given its directions.

    >>> x = jnp.array([[0.0], [5.0]])  # in one dimension every direction is the same
    >>> sliced_wasserstein(x, x[::-1] + 2, key=jax.random.key(0))
    Array(4., dtype=float32)
    """
    check_float(x=x)
    check_min_rank(2, x=x)
    check_same_shape(x=x, y=y)
    check_integer(projections=projections)
    if projections < 1:
        raise ValueError(message("projections", "at least 1", projections))
    if where is not None:
        check_where(where)
        check_shape(x.shape[:-1], where=where)
    x, y = mask(where, *widen(x, y))
    units = jnp.any(_shown(x[..., 0], where), axis=-1) if x.shape[-1] else None
    directions = jax.random.normal(key, (projections, x.shape[-1]), jnp.float32)
    directions = unit_vectors(directions.astype(x.dtype))
    look = lambda a: jnp.einsum("...nd,pd->...pn", a, directions, precision="highest")
    if where is not None:
        where = jnp.asarray(where)[..., None, :]
        where = jnp.broadcast_to(where, (*x.shape[:-2], projections, x.shape[-2]))
    values = jnp.mean(_matched_costs(look(x), look(y), where, p), axis=-1)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled("iterations", functions=("cost",))
def sinkhorn_divergence(
    x: Float[Array, "*batch n features"],
    y: Shaped[Array, "*batch m features"],
    *,
    epsilon: Number = 0.05,
    iterations: int = 100,
    cost: Callable[[Array, Array], Array] | None = None,
    x_mass: Shaped[Array, "*batch n"] | None = None,
    y_mass: Shaped[Array, "*batch m"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Sinkhorn divergence: entropic transport of one sample to another without its bias.

    $$ \ell = \mathrm{OT}_\epsilon(x, y) - \tfrac{1}{2} \mathrm{OT}_\epsilon(x, x)
       - \tfrac{1}{2} \mathrm{OT}_\epsilon(y, y), \quad
       \mathrm{OT}_\epsilon = \min_P \sum_{ij} P_{ij} C_{ij}
       + \epsilon\, \mathrm{KL}(P \| a \otimes b) $$

    0 at equality and, for converged iterations, nowhere below. A large $\epsilon$ compares means
    like a kernel does, a small one transports. The iterations run on logarithms, the first half of
    them from a large $\epsilon$ down. The gradient is that of the transport plan found at the
    end; nothing is differentiated through the iterations.

    Memory: a few arrays `n x m`, `n x n` and `m x m`, however many iterations.

    Args:
        x: One sample, points before features.
        y: The other sample; it may have another number of points.
        epsilon: Strength $\epsilon$ of the entropy, in the unit of the cost.
        iterations: Number of iterations, at least 1; a smaller `epsilon` needs more.
        cost: From `(n, features)` and `(m, features)` to the costs `(n, m)`; the squared distance
            if None.
        x_mass: Mass of each point of `x`, at least 0, relative to their sum; equal if None.
        y_mass: The same for `y`; a point of mass 0 does not exist.
        where: Bool array `(*batch, n)` of the points of `x` that exist.

    One unit per pair of samples (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Cuturi, Sinkhorn Distances, NIPS 2013; Feydy et al., Interpolating between Optimal Transport
        and MMD using Sinkhorn Divergences, AISTATS 2019. Equals ott-jax's `sinkhorn_divergence`
        when both have converged; geomloss has half the squared distance.

    >>> x, y = jnp.array([[0.0]]), jnp.array([[3.0]])
    >>> sinkhorn_divergence(x, y)
    Array(9., dtype=float32)
    """
    check_float(x=x)
    check_min_rank(2, x=x)
    check_array(y=y)
    check_shape((*x.shape[:-2], *jnp.shape(y)[-2:-1], x.shape[-1]), y=y)
    iterations = check_iterations(iterations)
    if where is not None:
        check_where(where)
        check_shape(x.shape[:-1], where=where)
    x, y = widen(x, y)
    log_a, x_kept = _log_masses("x_mass", x_mass, x, where)
    log_b, y_kept = _log_masses("y_mass", y_mass, y, None)
    (x,), (y,) = mask(x_kept, x), mask(y_kept, y)
    (epsilon,) = numbers(x, epsilon=epsilon)
    require(lambda: epsilon > 0, "epsilon", "a number above 0")
    one = partial(_divergence, cost or squared_distances, iterations)
    for _ in range(x.ndim - 2):
        one = jax.vmap(one, in_axes=(0, 0, 0, 0, None))
    values = one(unshard(x, -2), unshard(y, -2), unshard(log_a, -1), unshard(log_b, -1), epsilon)
    units = jnp.any(x_kept, axis=-1) & jnp.any(y_kept, axis=-1)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _shown(x: Array, where: Where | None) -> Array:
    return jnp.ones_like(x, bool) if where is None else jnp.asarray(where)


def _matched_costs(x: Array, y: Array, where: Where | None, p: Any) -> Array:
    """Mean over the last axis of |x - y|^p of both in order; hidden entries are last."""
    x, y = (_ordered(a, where) for a in (x, y))
    kept = _shown(x, where)
    count = jnp.sum(kept, axis=-1, dtype=x.dtype)
    gap = absolute(x - y)
    if where is not None:
        place = jax.lax.broadcasted_iota(x.dtype, x.shape, x.ndim - 1)
        gap = jnp.where(place < count[..., None], gap, 0)
    if not isinstance(p, (int, float)):
        (power,) = numbers(x, p=p)
        gap = safe_pow(gap, power)
    elif p == 2:
        gap = jnp.square(gap)
    elif p != 1:
        gap = safe_pow(gap, jnp.asarray(p, x.dtype))
    return safe_div(jnp.sum(gap, axis=-1), count)


def _ordered(x: Array, where: Where | None) -> Array:
    keys = sort_keys(jax.lax.stop_gradient(x))
    if where is not None:
        keys = jnp.where(where, keys, jnp.asarray(jnp.iinfo(keys.dtype).max, keys.dtype))
    place = jnp.zeros_like(keys, jnp.int32)
    place = place + jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    _, order = jax.lax.sort((keys, place), dimension=x.ndim - 1, num_keys=1)
    return jnp.take_along_axis(x, order, axis=-1, mode="clip")


def _log_masses(name: str, mass: Any, x: Array, where: Where | None) -> tuple[Array, Array]:
    """Logarithms of masses of sum 1, -inf for points that do not exist, and which exist."""
    kept = _shown(x[..., 0], where) if x.shape[-1] else jnp.ones(x.shape[:-1], bool)
    if mass is None:
        mass = kept.astype(x.dtype)
    else:
        check_array(**{name: mass})
        check_shape(x.shape[:-1], **{name: mass})
        (mass,) = mask(where, jnp.asarray(mass).astype(x.dtype))
        require(lambda: mass >= 0, name, "values of at least 0", where)
        kept = mass != 0
    return safe_log(safe_div(mass, jnp.sum(mass, axis=-1, keepdims=True))), kept


def _divergence(
    cost: Callable[[Array, Array], Array],
    iterations: int,
    x: Array,
    y: Array,
    log_a: Array,
    log_b: Array,
    epsilon: Array,
) -> Array:
    def between(x: Array, y: Array, log_a: Array, log_b: Array) -> Array:
        costs = cost(x, y)
        check_shape((x.shape[0], y.shape[0]), cost=costs)
        return _transport(costs.astype(x.dtype), log_a, log_b, epsilon, iterations)

    return between(x, y, log_a, log_b) - 0.5 * (
        between(x, x, log_a, log_a) + between(y, y, log_b, log_b)
    )


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _transport(cost: Array, log_a: Array, log_b: Array, epsilon: Array, iterations: int) -> Array:
    """Entropic cost of transport. First derivatives are those of the plan: duals stay in place."""
    return _solved(cost, log_a, log_b, epsilon, iterations)[0]


@_transport.defjvp
def _transport_jvp(iterations: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    cost, log_a, log_b, epsilon = primals
    cost_dot, a_dot, b_dot, epsilon_dot = tangents
    value, plan, in_a, in_b = _solved(cost, log_a, log_b, epsilon, iterations)
    moved = jnp.sum(plan * cost_dot) + jnp.sum(in_a * a_dot) + jnp.sum(in_b * b_dot)
    entropy = (value - jnp.sum(plan * cost)) / epsilon
    return value, moved + entropy * epsilon_dot


def _solved(
    cost: Array, log_a: Array, log_b: Array, epsilon: Array, iterations: int
) -> tuple[Array, Array, Array, Array]:
    """The cost, the plan, and the derivatives in both logarithms of mass."""
    scaled = log_scaled(-cost / epsilon, log_a, log_b, iterations, anneal=True)
    # A factor is -inf where there is no mass.
    dual = lambda mass, f: epsilon * jnp.exp(mass) * jnp.where(mass == -jnp.inf, 0, f)
    in_a, in_b = dual(log_a, scaled.f), dual(log_b, scaled.g)
    return jnp.sum(in_a) + jnp.sum(in_b), jnp.exp(scaled.matrix), in_a, in_b


_SAMPLES = dict(x=draw_normal("B T V"), y=draw_normal("B M V"))
_NUMBERS = dict(x=draw_normal("B T"), y=draw_normal("B T"))

CASES = (
    Case(wasserstein_1d, _NUMBERS, positions="B T", zero_at_target=True, minimum=True),
    Case(wasserstein_1d, _NUMBERS, dict(p=1.5), label="power", positions="B T"),
    Case(
        wasserstein_1d_from_probs,
        dict(probs=draw_probs("B C"), target=draw_probs("B C")),
        dict(bin_width=0.3),
        zero_at_target=True,
        minimum=True,
    ),
    Case(
        sliced_wasserstein,
        dict(x=draw_normal("B T V"), y=draw_normal("B T V")),
        dict(key=np.array([0, 7], np.uint32), projections=4),
        positions="B T",
        zero_at_target=True,
        minimum=True,
    ),
    Case(
        sinkhorn_divergence,
        _SAMPLES,
        dict(epsilon=3.0, iterations=40),
        positions="B T",
        sizes=dict(T=4, M=3, V=2),
        without={"gradient_accuracy": "an ulp of a point moves a sharp plan by many of its own"},
    ),
)
