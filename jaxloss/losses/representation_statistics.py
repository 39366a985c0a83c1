"""Losses that shape the distribution of embeddings: spread, decorrelated, white or Gaussian."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import check_float, check_min_rank, check_same_shape, check_shape, message
from .._core.compiled import compiled
from .._core.moments import (
    centred,
    count_rows,
    diagonal,
    everyones,
    largest_entry,
    products,
    squares,
)
from .._core.numerics import cosine, numbers, safe_div, safe_norm, safe_pow, unit_vectors, widen
from .._core.pairwise import gather_rows, own_index, pairwise_distance
from .._core.reduce import mask, reduce
from .._core.sharding import unshard
from .._core.terms import Axis, add_up
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "alignment_loss",
    "mmcr_loss",
    "sigreg_loss",
    "tico_loss",
    "uniformity_loss",
    "w_mse_loss",
]


@compiled()
def alignment_loss(
    query: Float[Array, "*batch features"],
    keys: Shaped[Array, "*batch features"],
    *,
    alpha: Number = 2.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Distance of the two embeddings of a positive pair to a power, from 0 up.

    $$ \ell = |x - y|^\alpha $$

    Where both are equal the gradient is 0.

    Args:
        query: Embeddings of one view, `(*batch, features)`; the paper's have unit length.
        keys: Those of the other view; same shape.
        alpha: The power, above 0.

    One unit per pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Wang and Isola, Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere, ICML 2020. Equals the authors' `align_loss`.

    >>> alignment_loss(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0]]), alpha=1.0)
    Array(5., dtype=float32)
    """
    check_float(query=query)
    check_min_rank(1, query=query)
    check_same_shape(query=query, keys=keys)
    query, keys = mask(where, *widen(query, keys))
    if isinstance(alpha, (int, float)) and alpha == 2:
        values = jnp.sum(jnp.square(query - keys), axis=-1)
    else:
        values = safe_pow(safe_norm(query - keys), *numbers(query, alpha=alpha))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis_name")
def uniformity_loss(
    embeddings: Float[Array, "batch features"],
    *,
    t: Number = 2.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""How close embeddings crowd together, at most 0; on the unit sphere at least `-4 t`.

    $$ \ell = \log \frac{2}{n (n - 1)} \sum_{i < j} \exp(-t |x_i - x_j|^2) $$

    A batch of one row has no pair: it is no unit and costs 0. Memory: a few `batch x batch`
    matrices.

    Args:
        embeddings: One row per sample, `(batch, features)`; the paper's have unit length.
        t: Inverse width of the Gaussian.
        where: Bool array `(batch,)`; the other rows are in no pair.
        axis_name: Mapped axes over which the batch is split; pairs are then those of all of it and
            every device returns the same value.

    One unit per batch of at least two rows, a scalar; see `jaxloss.reduce`.

    Returns:
        A float32 scalar.

    Reference:
        Wang and Isola, Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere, ICML 2020. Equals the authors' `uniform_loss`.

    >>> uniformity_loss(jnp.array([[1.0, 0.0], [0.0, 1.0]]), t=0.5)  # -0.5 * 2
    Array(-1., dtype=float32)
    """
    (embeddings,) = _rows(where, embeddings=embeddings)
    (t,) = numbers(embeddings, t=t)
    kept = jnp.full(embeddings.shape[:1], True) if where is None else jnp.asarray(where)
    keys, shown = (unshard(x, 0) for x in gather_rows(axis_name, embeddings, kept) if x is not None)
    own = own_index(kept.shape[0], axis_name)[:, None] == own_index(shown.shape[0], None)[None]
    pairs = kept[:, None] & shown[None] & ~own
    exponents = -t * jnp.where(pairs, pairwise_distance(embeddings, keys, squared=True), 0)
    largest = jnp.max(
        jnp.where(pairs, jax.lax.stop_gradient(exponents), -jnp.inf), initial=-jnp.inf
    )
    largest = largest if axis_name is None else jax.lax.pmax(largest, axis_name)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    powers = jnp.where(pairs, jnp.exp(jnp.where(pairs, exponents - largest, 0)), 0)
    count = count_rows(embeddings, where, axis_name)
    total, exists = add_up(jnp.sum(powers), axis_name), count > 1
    mean = jnp.where(exists, total, 1) / jnp.where(exists, count * (count - 1), 1)
    return reduce(jnp.log(mean) + largest, where=exists, weights=weights, reduction=reduction)


@compiled("axis_name")
def tico_loss(
    query: Float[Array, "batch features"],
    keys: Shaped[Array, "batch features"],
    state: Shaped[Array, "features features"],
    *,
    beta: Number = 0.9,
    rho: Number = 8.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> tuple[Array, Float[Array, "features features"]]:
    r"""Invariance of two views and contrast with the covariance of past batches, from 0 up.

    $$ \ell = 1 - \mathrm{mean}\, q \cdot k + \rho\, \mathrm{mean}\, q^T C q, \quad
       C = \beta C_{\mathrm{old}} + (1 - \beta)\, \mathrm{mean}\, q q^T $$

    with rows of unit length. The old matrix carries no gradient. Memory: two matrices of
    `features x features`.

    Args:
        query: Embeddings of one view, `(batch, features)`; they need not be normalised.
        keys: Those of the other view by the momentum encoder; same shape.
        state: The matrix $C$ of the last step, zeros at the beginning.
        beta: Share of the old matrix.
        rho: Weight of the contrast.
        where: Bool array `(batch,)`; the other rows enter neither loss nor matrix.
        axis_name: Mapped axes over which the batch is split; means are then those of all of it and
            every device returns the same value.

    One unit per batch, a scalar; see `jaxloss.reduce`.

    Returns:
        The loss, a float32 scalar, and the new matrix.

    Reference:
        Zhu et al., TiCo: Transformation Invariance and Covariance Contrast for Self-Supervised
        Visual Representation Learning, 2022. lightly takes the mean off the rows first, and its
        $\rho$ is 20.

    >>> rows = jnp.eye(2)
    >>> tico_loss(rows, rows, jnp.zeros((2, 2)), beta=0.0, rho=4.0)[0]  # 4 / 2
    Array(2., dtype=float32)
    """
    query, keys = _rows(where, query=query, keys=keys)
    check_shape((query.shape[1],) * 2, state=state)
    beta, rho = numbers(query, beta=beta, rho=rho)
    state = jax.lax.stop_gradient(jnp.asarray(state).astype(query.dtype))
    count = count_rows(query, where, axis_name)
    rows, exists = jnp.maximum(count, 1), count > 0
    _, apart = cosine(query, keys)
    (apart,) = mask(where, apart)
    unit = unit_vectors(query)
    moment = products(unit, unit, axis_name) / rows  # (d, d)
    matrix = beta * state + (1 - beta) * moment
    value = add_up(jnp.sum(apart), axis_name) / rows + rho * jnp.sum(matrix * moment)
    loss = reduce(value, where=exists, weights=weights, reduction=reduction)
    return loss, jax.lax.stop_gradient(jnp.where(exists, matrix, state))


@compiled("axis_name")
def w_mse_loss(
    query: Float[Array, "batch features"],
    keys: Shaped[Array, "batch features"],
    *,
    eps: Number = 1e-3,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Squared distance of the directions of two whitened views, in `[0, 4]`.

    $$ \ell = 2 - 2 \cos(L_q^{-1} (q - \bar q),\, L_k^{-1} (k - \bar k)), \quad
       L L^T = (1 - \epsilon)\, \Sigma + \epsilon\, \frac{\mathrm{tr}\, \Sigma}{d} I $$

    with mean and covariance $\Sigma$ (divided by $n - 1$) of each view over the batch. A batch of
    one row has none: it has no unit. The samples are coupled: the mean over microbatches is another
    loss.

    Args:
        query: Embeddings of one view, not normalised, `(batch, features)`.
        keys: Those of the other view; same shape.
        eps: Shrinks the covariance, so that there may be as many features as rows, or more.
        where: Bool array `(batch,)`; the other rows enter no statistic.
        axis_name: Mapped axes over which the batch is split; covariances are then those of all of
            it.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Ermolov et al., Whitening for Self-Supervised Representation Learning, ICML 2021. Equals
        the authors' loss with one sub-batch and `eps=0`; their shrinkage has no trace.

    >>> views = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    >>> w_mse_loss(views, views @ jnp.array([[3.0, 0.0], [0.0, -1.0]]))  # the last two turn
    Array(2., dtype=float32)
    """
    query, keys = _rows(where, query=query, keys=keys)
    (eps,) = numbers(query, eps=eps)
    count = count_rows(query, where, axis_name)
    features = max(query.shape[1], 1)

    def whitened(x: Array) -> Array:
        x = centred(x, where, count, axis_name)
        largest = largest_entry(x, axis_name)  # the length of a whitened row does not matter
        x = x / jnp.where(largest == 0, 1, largest)
        trace = jnp.sum(squares(x, axis_name))
        one = diagonal(features).astype(x.dtype)
        shift = jnp.where(largest == 0, 1, eps * trace / features) * one
        matrix = (1 - eps) * products(x, x, axis_name) + shift
        root = jax.lax.linalg.cholesky(matrix)
        inverse = jax.lax.linalg.triangular_solve(root, one, left_side=True, lower=True)
        return jnp.einsum("bd,ed->be", x, inverse, precision="highest")

    _, apart = cosine(whitened(query), whitened(keys))
    kept = jnp.full(apart.shape, True) if where is None else jnp.asarray(where)
    return reduce(2 * apart, where=kept & (count > 1), weights=weights, reduction=reduction)


@compiled("axis_name")
def mmcr_loss(
    embeddings: Float[Array, "views batch features"],
    *,
    local_weight: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Maximum manifold capacity: negative nuclear norm of the samples' mean embeddings.

    $$ \ell = -\Vert C \Vert_* + \frac{\lambda}{n} \sum_b \Vert Z_b \Vert_*, \quad
       c_b = \mathrm{mean}_v\, z_{vb} $$

    with rows $z$ of unit length, the matrix $C$ of the means $c_b$ and the matrices $Z_b$ of the
    views of a sample. Gradient: of singular values that are 0, none. Memory: with `axis_name` every
    device holds the means of all.

    Args:
        embeddings: Embeddings of all views, `(views, batch, features)`; they need not be
            normalised.
        local_weight: Weight $\lambda$ of the spread of the views of one sample.
        where: Bool array `(batch,)`; the other samples are left out.
        axis_name: Mapped axes over which the batch is split; $C$ then holds all of it and every
            device returns the same value.

    One unit per batch, a scalar; see `jaxloss.reduce`.

    Returns:
        A float32 scalar.

    Reference:
        Yerxa et al., Learning Efficient Coding of Natural Images with Maximum Manifold Capacity
        Representations, NeurIPS 2023. lightly's `MMCRLoss` has $\lambda$ 0.005 and leaves the
        normalisation to the caller.

    >>> views = jnp.array([[[2.0, 0.0], [0.0, 1.0]]])
    >>> mmcr_loss(views)  # singular values 1 and 1
    Array(-2., dtype=float32)
    """
    check_float(embeddings=embeddings)
    if jnp.ndim(embeddings) != 3:
        expected = "shape (views, batch, features)"
        raise ValueError(message("embeddings", expected, f"shape {jnp.shape(embeddings)}"))
    if where is not None:
        check_shape(embeddings.shape[1:2], where=where)
    (rows,) = widen(embeddings)
    (rows,) = mask(where, jnp.swapaxes(rows, 0, 1))
    (weight,) = numbers(rows, local_weight=local_weight)
    spread = not (isinstance(local_weight, (int, float)) and local_weight == 0)
    rows = unit_vectors(rows)  # (batch, views, features)
    means = everyones(jnp.sum(rows, axis=1) / max(rows.shape[1], 1), axis_name)
    count = count_rows(rows, where, axis_name)
    value = -_nuclear_norm(means)
    if spread:
        local = add_up(jnp.sum(_nuclear_norm(rows)), axis_name) / jnp.maximum(count, 1)
        value += weight * local
    return reduce(value, where=count > 0, weights=weights, reduction=reduction)


@compiled("slices", "points", "axis_name")
def sigreg_loss(
    embeddings: Float[Array, "batch features"],
    *,
    key: ArrayLike,
    slices: int = 256,
    points: int = 17,
    t_max: Number = 3.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Sketched isotropic Gaussian regularisation, the Epps-Pulley statistic of LeJEPA, from 0 up.

    $$ \ell = n\, \mathrm{mean}_a \int_{-t_m}^{t_m} \left| \frac{1}{n} \sum_b e^{i t a \cdot x_b}
       - e^{-t^2 / 2} \right|^2 e^{-t^2 / 2}\, dt $$

    over random directions $a$ of length 1: small if the embeddings are distributed like a standard
    Gaussian. The integral is a trapezoidal sum. Memory: a few `batch x slices` matrices. Sine and
    cosine lose digits where embeddings are far from unit variance.

    Args:
        embeddings: Not normalised, `(batch, features)`.
        key: A key of `jax.random`, on all devices the same; draw a new one for each step.
        slices: Number of directions.
        points: Points of the sum from 0 to `t_max`, at least 2; the integrand is even.
        t_max: End of the integral.
        where: Bool array `(batch,)`; the other rows are left out.
        axis_name: Mapped axes over which the batch is split; the statistic is then that of all of
            it and every device returns the same value.

    One unit per batch, a scalar; see `jaxloss.reduce`.

    Returns:
        A float32 scalar.

    Reference:
        Balestriero and LeCun, LeJEPA: Provable and Scalable Self-Supervised Learning Without the
        Heuristics, 2025. Equals the authors' `EppsPulley` of random slices; the listing in the
        paper has `points=9, t_max=5.0`.

    >>> zero = jnp.zeros((4, 3))  # 4 (1 - exp(-1 / 2))^2 exp(-1 / 2)
    >>> sigreg_loss(zero, key=jax.random.key(0), points=2, t_max=1.0)
    Array(0.37560773, dtype=float32)
    """
    (embeddings,) = _rows(where, embeddings=embeddings)
    for name, value, least in (("slices", slices, 1), ("points", points, 2)):
        if not isinstance(value, int) or value < least:
            raise ValueError(message(name, f"an integer of at least {least}", repr(value)))
    (t_max,) = numbers(embeddings, t_max=t_max)
    count = count_rows(embeddings, where, axis_name)
    rows = jnp.maximum(count, 1)
    directions = jax.random.normal(key, (slices, embeddings.shape[1]), jnp.float32)
    directions = unit_vectors(directions).astype(embeddings.dtype)
    along = jnp.einsum("bd,sd->bs", embeddings, directions, precision="highest")
    steps = np.arange(points) / (points - 1)
    t = t_max * jnp.asarray(steps, along.dtype)

    @jax.checkpoint
    def waves(t: Array) -> tuple[Array, Array]:
        phase = t * along
        real, imaginary = mask(where, jnp.cos(phase), jnp.sin(phase))
        return jnp.sum(real, axis=0), jnp.sum(imaginary, axis=0)

    real, imaginary = (add_up(x, axis_name) / rows for x in jax.lax.map(waves, t))  # (points, s)
    normal = jnp.exp(-0.5 * jnp.square(t))[:, None]
    error = jnp.square(real - normal) + jnp.square(imaginary)
    width = np.where(np.arange(points) % (points - 1) == 0, 1, 2) / (points - 1)  # both sides
    area = t_max * jnp.asarray(width, along.dtype)[:, None] * normal
    value = count * jnp.sum(area * error) / slices
    return reduce(value, where=count > 0, weights=weights, reduction=reduction)


def _rows(where: Any, **arrays: Any) -> tuple[Array, ...]:
    """Arrays `(batch, features)` of one shape, checked, masked and widened."""
    (name, first), *_ = arrays.items()
    check_float(**{name: first})
    if jnp.ndim(first) != 2:
        raise ValueError(message(name, "shape (batch, features)", f"shape {jnp.shape(first)}"))
    check_same_shape(**arrays)
    if where is not None:
        check_shape(jnp.shape(first)[:1], where=where)
    return mask(where, *widen(*arrays.values()))


@jax.custom_jvp
def _nuclear_norm(x: Array) -> Array:
    """The sum of the singular values of the last two axes."""
    return jnp.sum(jnp.linalg.svd(x, compute_uv=False), axis=-1)


@_nuclear_norm.defjvp
def _nuclear_norm_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (moved,) = primals, tangents
    return _nuclear_norm(x), jnp.sum(_polar(x) * moved, axis=(-2, -1))


@jax.custom_jvp
def _polar(x: Array) -> Array:
    """The product U V^T of the singular vectors whose value is not 0."""
    u, _, v = _singular(x)
    return _matmul(u, v)


@_polar.defjvp
def _polar_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # With W = U^T dX V the turn within both spaces is (W - W^T)_ij / (s_i + s_j): unlike the
    # derivatives of the vectors themselves it does not mind equal singular values.
    (x,), (moved,) = primals, tangents
    u, s, v = _singular(x)
    ut, vt = jnp.swapaxes(u, -1, -2), jnp.swapaxes(v, -1, -2)
    inverse = safe_div(jnp.ones_like(s), s)
    w = _matmul(_matmul(ut, moved), vt)
    turn = safe_div(w - jnp.swapaxes(w, -1, -2), s[..., :, None] + s[..., None, :])
    left = (_matmul(moved, vt) - _matmul(u, w)) * inverse[..., None, :]
    right = (_matmul(ut, moved) - _matmul(w, v)) * inverse[..., :, None]
    return _polar(x), _matmul(left, v) + _matmul(u, right + _matmul(turn, v))


def _singular(x: Array) -> tuple[Array, Array, Array]:
    """U, s and V^T; what belongs to a value that is 0 up to rounding is 0."""
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    largest = jnp.max(s, axis=-1, keepdims=True, initial=0)
    kept = s > max(x.shape[-2:]) * jnp.finfo(x.dtype).eps * largest
    cut = lambda y, kept: jnp.where(kept, y, 0)
    return cut(u, kept[..., None, :]), cut(s, kept), cut(v, kept[..., :, None])


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


_VIEWS = dict(query=draw_normal("B D"), keys=draw_normal("B D"))
_ONE = dict(embeddings=draw_normal("B D", scale=0.5))
_MOMENT = Draw("D D", lambda g, shape, _: g.integers(-8, 9, shape) / 8, "fixed")
_WHOLE = {"microbatches": "the statistics are those of the whole batch"}
_BATCH: dict[str, Any] = dict(positions="B", coupled=True)

CASES = (
    Case(alignment_loss, _VIEWS, zero_at_target=True),
    Case(alignment_loss, _VIEWS, dict(alpha=1.5), label="power", zero_at_target=True),
    Case(uniformity_loss, _ONE, dict(t=1.5), without=_WHOLE, **_BATCH),
    Case(tico_loss, dict(_VIEWS, state=_MOMENT), dict(beta=0.7, rho=3.0), without=_WHOLE, **_BATCH),
    Case(
        w_mse_loss,
        _VIEWS,
        dict(eps=0.1),
        sizes=dict(D=3),
        without=dict(_WHOLE, weight_two="a sample seen twice enters the covariance twice"),
        **_BATCH,
    ),
    Case(
        mmcr_loss,
        dict(embeddings=draw_normal("V B D")),
        dict(local_weight=0.5),
        sizes=dict(V=3, D=2),
        without=_WHOLE,
        **_BATCH,
    ),
    Case(
        sigreg_loss,
        dict(embeddings=draw_normal("B D", scale=0.05)),
        dict(key=np.array([0, 7], np.uint32), slices=5, points=4, t_max=1.5),
        without=_WHOLE,
        **_BATCH,
    ),
)
