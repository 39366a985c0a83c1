"""Losses of two views of one image without negatives, and of masked patches."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import (
    check_float,
    check_min_rank,
    check_option,
    check_same_shape,
    check_shape,
    message,
)
from .._core.compiled import compiled
from .._core.moments import centred, count_rows, diagonal, largest_entry, products, squares
from .._core.numerics import cosine, numbers, safe_div, safe_sqrt, widen
from .._core.reduce import mask, reduce
from .._core.terms import Axis, Criterion, add_up, total
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "barlow_twins_loss",
    "byol_loss",
    "mae_loss",
    "negative_cosine_loss",
    "vicreg_loss",
]


@compiled("axis_name")
def barlow_twins_loss(
    query: Float[Array, "batch features"],
    keys: Shaped[Array, "batch features"],
    *,
    off_diagonal_weight: Number = 5e-3,
    eps: Number = 1e-5,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""How far the cross-correlation of two views is from the identity, from 0 up.

    $$ \ell = \sum_i (1 - C_{ii})^2 + \lambda \sum_{i \ne j} C_{ij}^2, \quad
       C_{ij} = \frac{1}{n} \sum_b \hat q_{bi} \hat k_{bj}, \quad
       \hat x = \frac{x - \mathrm{mean}\, x}{\sqrt{\mathrm{var}\, x + \epsilon}} $$

    with mean and biased variance over the batch. A feature that is constant has correlation 0, and
    so has a batch of one row. Memory: two matrices of `features x features`.

    Args:
        query: Embeddings of one view, not normalised, `(batch, features)`.
        keys: Those of the other view; same shape.
        off_diagonal_weight: Weight $\lambda$ of the redundancy between features.
        eps: Added to the variance, as in batch normalisation.
        where: Bool array `(batch,)`; the other rows enter no statistic.
        axis_name: Mapped axes over which the batch is split; the statistics are then those of all
            of it and every device returns the same value.

    One unit per batch, a scalar; see `jaxloss.reduce`.

    Returns:
        A float32 scalar.

    Reference:
        Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021.
        Equals the authors' code without its scale of the whole loss; lightly's takes mean and
        variance on each device for itself.

    >>> query = jnp.array([[1.0, 1.0], [-1.0, -1.0]])  # both features tell the same
    >>> barlow_twins_loss(query, query, off_diagonal_weight=0.5, eps=0.0)
    Array(1., dtype=float32)
    """
    query, keys = _two_views(query, keys, where)
    off_diagonal_weight, eps = numbers(query, off_diagonal_weight=off_diagonal_weight, eps=eps)
    count = count_rows(query, where, axis_name)
    rows = jnp.maximum(count, 1)

    def standardized(x: Array) -> Array:
        x = centred(x, where, count, axis_name)
        scale = _scale(largest_entry(x, axis_name, axis=0))
        x = x / scale[None]
        variance = squares(x, axis_name) / rows + eps / jnp.square(scale)
        return safe_div(x, safe_sqrt(variance)[None])

    cross = products(standardized(query), standardized(keys), axis_name) / rows
    off = off_diagonal_weight * jnp.square(cross)
    value = jnp.sum(jnp.where(diagonal(cross.shape[0]), jnp.square(1 - cross), off))
    return reduce(value, where=count > 0, weights=weights, reduction=reduction)


@compiled("axis_name")
def vicreg_loss(
    query: Float[Array, "batch features"],
    keys: Shaped[Array, "batch features"],
    *,
    invariance: Number = 25.0,
    variance: Number = 25.0,
    covariance: Number = 1.0,
    eps: Number = 1e-4,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Criterion:
    r"""Variance-invariance-covariance regularisation of two views, from 0 up.

    $$ \ell = \lambda\, \mathrm{mean}\, (q - k)^2 + \sum_{x \in \{q, k\}} \Big(
       \frac{\mu}{2} \mathrm{mean}_i \max(0, 1 - \sqrt{\mathrm{var}\, x_i + \epsilon})
       + \frac{\nu}{d} \sum_{i \ne j} \mathrm{cov}(x_i, x_j)^2 \Big) $$

    with variances and covariances over the batch, divided by $n - 1$. A batch of one row has none:
    it is no unit and costs 0. Memory: four matrices of `features x features`.

    Args:
        query: Embeddings of one view, not normalised, `(batch, features)`.
        keys: Those of the other view; same shape.
        invariance: Weight $\lambda$ of the distance between the views.
        variance: Weight $\mu$ of what the standard deviations lack to 1.
        covariance: Weight $\nu$ of the covariances.
        eps: Added to the variance inside the root.
        where: Bool array `(batch,)`; the other rows enter no statistic.
        axis_name: Mapped axes over which the batch is split; the statistics are then those of all
            of it and every device returns the same value.

    One unit per batch of at least two rows, a scalar; see `jaxloss.reduce`.

    Returns:
        The total, and its terms `invariance`, `variance` and `covariance` before their weights.

    Reference:
        Bardes, Ponce and LeCun, VICReg: Variance-Invariance-Covariance Regularization for
        Self-Supervised Learning, ICLR 2022. Equals pytorch-metric-learning's `VICRegLoss`, which
        is NaN for one row.

    >>> query, keys = jnp.array([[2.0], [-2.0]]), jnp.array([[2.0], [0.0]])
    >>> vicreg_loss(query, keys)[0]  # 25 (0 + 4) / 2
    Array(50., dtype=float32)
    """
    query, keys = _two_views(query, keys, where)
    gains = dict(invariance=invariance, variance=variance, covariance=covariance)
    (eps,) = numbers(query, eps=eps)
    count = count_rows(query, where, axis_name)
    features, exists = max(query.shape[1], 1), count > 1
    rows, freedom = jnp.maximum(count, 1), jnp.maximum(count - 1, 1)
    apart = add_up(jnp.sum(jnp.square(query - keys)), axis_name)
    terms = dict(invariance=apart / (features * rows), variance=0.0, covariance=0.0)
    for x in (query, keys):
        x = centred(x, where, count, axis_name)
        lacking = jax.nn.relu(1 - safe_sqrt(squares(x, axis_name) / freedom + eps))
        off = jnp.where(diagonal(features), 0, products(x, x, axis_name))  # (d, d)
        terms["variance"] += 0.5 * jnp.sum(lacking) / features
        terms["covariance"] += jnp.sum(jnp.square(off)) / (features * jnp.square(freedom))
    value, terms = total({name: jnp.where(exists, t, 0) for name, t in terms.items()}, **gains)
    return reduce(value, where=exists, weights=weights, reduction=reduction), terms


@compiled()
def negative_cosine_loss(
    pred: Float[Array, "*batch features"],
    target: Shaped[Array, "*batch features"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative cosine of prediction and target as in SimSiam, in `[-1, 1]`.

    $$ \ell = -\frac{p \cdot z}{|p| \, |z|} $$

    The target carries no gradient. A zero vector has cosine 0 and gradient 0. For the symmetric
    loss call it with both views in both roles and take half the sum.

    Args:
        pred: Output of the predictor, `(*batch, features)`.
        target: Output of the encoder for the other view; same shape.

    One unit per pair of vectors; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Chen and He, Exploring Simple Siamese Representation Learning, CVPR 2021. Equals the
        negative of torch's `cosine_similarity` with a detached target.

    >>> negative_cosine_loss(jnp.array([[3.0, 4.0]]), jnp.array([[2.0, 0.0]]))
    Array(-0.6, dtype=float32)
    """
    similarity, _ = cosine(*_towards(pred, target, where))
    return reduce(-similarity, where=where, weights=weights, reduction=reduction)


@compiled()
def byol_loss(
    pred: Float[Array, "*batch features"],
    target: Shaped[Array, "*batch features"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared distance of the directions of prediction and target as in BYOL, in `[0, 4]`.

    $$ \ell = 2 - 2\, \frac{p \cdot z}{|p| \, |z|} $$

    The target carries no gradient. A zero vector has cosine 0 and gradient 0; nearly parallel
    vectors keep full accuracy. For the symmetric loss call it with both views in both roles and
    take the sum.

    Args:
        pred: Output of the online network's predictor, `(*batch, features)`.
        target: Projection of the other view by the target network; same shape.

    One unit per pair of vectors; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Grill et al., Bootstrap your own latent, NeurIPS 2020.

    >>> byol_loss(jnp.array([[3.0, 4.0]]), jnp.array([[-4.0, 3.0]]))  # a right angle
    Array(2., dtype=float32)
    """
    _, distance = cosine(*_towards(pred, target, where))
    return reduce(2 * distance, where=where, weights=weights, reduction=reduction)


@compiled("normalize_patches")
def mae_loss(
    pred: Float[Array, "*batch features"],
    patches: Shaped[Array, "*batch features"],
    *,
    normalize_patches: bool = True,
    eps: Number = 1e-6,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean squared error of the patches that a masked autoencoder had to guess, from 0 up.

    $$ \ell = \frac{1}{d} \sum_i (\hat x_i - z_i)^2, \quad
       z = \frac{x - \mathrm{mean}\, x}{\sqrt{\mathrm{var}\, x + \epsilon}} $$

    with mean and variance over the numbers of the patch, the variance divided by $d - 1$. A
    constant patch has target 0.

    Args:
        pred: Predicted patches, features last, such as `(batch, patches, features)`.
        patches: The true ones; same shape.
        normalize_patches: Whether each patch is standardised as above; else the target is $x$.
        eps: Added to the variance.
        where: Bool array of the patches to score, such as `(batch, patches)`: those that were
            masked out of the input.

    One unit per patch; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022. Equals the authors'
        loss with `norm_pix_loss`.

    >>> mae_loss(jnp.zeros((1, 3)), jnp.array([[1.0, 3.0, 5.0]]), eps=0.0)  # target -1, 0, 1
    Array(0.6666667, dtype=float32)
    """
    check_float(pred=pred)
    check_min_rank(1, pred=pred)
    check_same_shape(pred=pred, patches=patches)
    check_option((True, False), normalize_patches=normalize_patches)
    pred, target = mask(where, *widen(pred, patches))
    (eps,) = numbers(pred, eps=eps)
    if normalize_patches:
        target = _standardized(target, eps)
    values = jnp.mean(jnp.square(pred - target), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _two_views(query: Array, keys: Any, where: Any) -> tuple[Array, Array]:
    check_float(query=query)
    if jnp.ndim(query) != 2:
        raise ValueError(message("query", "shape (batch, features)", f"shape {jnp.shape(query)}"))
    check_same_shape(query=query, keys=keys)
    if where is not None:
        check_shape(jnp.shape(query)[:1], where=where)
    query, keys = mask(where, *widen(query, keys))
    return query, keys


def _towards(pred: Array, target: Any, where: Where | None) -> tuple[Array, Array]:
    check_float(pred=pred)
    check_min_rank(1, pred=pred)
    check_same_shape(pred=pred, target=target)
    pred, target = mask(where, *widen(pred, target))
    return pred, jax.lax.stop_gradient(target)


def _standardized(x: Array, eps: Array) -> Array:
    """Zero mean and unit variance over the last axis."""
    for rounded in (jax.lax.stop_gradient, lambda mean: mean):
        x = x - rounded(jnp.mean(x, axis=-1, keepdims=True))
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True, initial=0)
    scale = _scale(largest)
    x = x / scale
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    variance = square / max(x.shape[-1] - 1, 1) + eps / jnp.square(scale)
    return safe_div(x, safe_sqrt(variance))


def _scale(largest: Array) -> Array:
    """1, unless squares would leave the range of floats."""
    return jnp.where((largest > 1e15) & jnp.isfinite(largest), largest, 1)


_VIEWS = dict(query=draw_normal("B D"), keys=draw_normal("B D"))
_STATISTICS = {"microbatches": "the statistics are those of the whole batch"}
_STOPPED = {"numerical": "the target carries no gradient"}
_FIXED = Draw("B D", lambda g, shape, _: g.integers(-16, 17, shape) / 8, "fixed")
_PATCHES = dict(pred=draw_normal("B T D"), patches=draw_normal("B T D"))

CASES = (
    Case(
        barlow_twins_loss,
        _VIEWS,
        dict(off_diagonal_weight=0.2, eps=1e-2),
        positions="B",
        coupled=True,
        without=_STATISTICS,
    ),
    Case(
        vicreg_loss,
        _VIEWS,
        dict(invariance=3.0, variance=5.0, covariance=2.0, eps=1e-2),
        positions="B",
        coupled=True,
        without=_STATISTICS,
    ),
    Case(negative_cosine_loss, dict(pred=draw_normal("B D"), target=_FIXED)),
    Case(
        byol_loss,
        dict(pred=draw_normal("B D"), target=draw_normal("B D")),
        minimum=True,
        without=_STOPPED,
    ),
    Case(mae_loss, _PATCHES, dict(eps=1e-3)),
    Case(mae_loss, _PATCHES, dict(normalize_patches=False), label="plain", zero_at_target=True),
)
