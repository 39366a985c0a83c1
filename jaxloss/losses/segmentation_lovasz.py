"""Lovász losses: the convex extension of the Jaccard loss, by sorting the errors of a region."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, draw_binary, draw_labels, draw_normal, draw_probs
from .._core.checks import check_float, check_integer, check_min_rank, check_same_shape
from .._core.compiled import compiled
from .._core.labels import poison
from .._core.numerics import safe_div, widen
from .._core.reduce import mask, reduce
from .._core.regions import (
    kept_positions,
    prepare_regions,
    region_units,
    region_values,
    whole_samples,
)
from .._core.sharding import one_hot
from .._core.sigmoid import prepare_binary
from .._core.sorting import first_place
from .._core.typing import Reduction, Values, Where

__all__ = ["lovasz_hinge_loss", "lovasz_softmax_loss"]


@compiled()
def lovasz_softmax_loss(
    probs: Float[Array, " batch *space classes"],
    labels: Integer[Array, " batch *space"],
    *,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Lovász-softmax loss of each class, in `[0, 1]`: a convex extension of the Jaccard loss.

    $$ \ell_c = \sum_i e_{(i)} \left(\Delta(i) - \Delta(i - 1)\right), \quad
       e_i = |1[y_i = c] - p_{ic}| $$

    with the errors of a sample in descending order and $\Delta(i)$ the Jaccard loss if the first
    $i$ positions were wrong. A class without positions costs its largest error. Equal errors share
    their slope evenly. A label outside `[0, classes)` makes its sample NaN. Needs some five times
    the memory of `probs` on the way.

    Args:
        probs: Probabilities, classes last, any number of axes of space.
        labels: Integer labels without the class axis.
        ignore_index: Label whose positions are left out, as by `where`.
        where: Bool array `(batch, *space)`; a sample with no kept position is no unit.

    One unit per sample and class; see `jaxloss.reduce`. As published, all images form one sample
    and absent classes are skipped: reshape to one sample and pass
    `weights=class_present(labels, classes)`.

    Returns:
        A float32 scalar, or `(batch, classes)` if `reduction` is `"none"`.

    Reference:
        Berman et al., The Lovász-Softmax Loss, CVPR 2018. The mean equals kornia's
        `lovasz_softmax_loss` on logits.

    >>> probs = jnp.array([[[0.5, 0.5], [0.25, 0.75]]])
    >>> lovasz_softmax_loss(probs, jnp.array([[0, 1]]), reduction="none")  # 1/2; (1/2 + 1/4) / 2
    Array([[0.5  , 0.375]], dtype=float32)
    """
    check_integer(labels=labels)
    probs, labels, where = prepare_regions(
        probs, labels, where=where, ignore_index=ignore_index, second="labels"
    )
    classes = probs.shape[-1]
    probs, ids = mask(where, *widen(probs), labels)
    hit = one_hot(ids, classes)
    size = math.prod(labels.shape[1:])
    by_class = lambda x: jnp.moveaxis(x.reshape(len(x), size, classes), -1, 1)
    errors = by_class(jnp.where(hit, 1 - probs, probs))
    kept = None if where is None else where.reshape(len(where), size)[:, None]
    values = _lovasz(errors, by_class(hit), kept)
    values, units = region_values(values, probs, labels, where)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def lovasz_hinge_loss(
    logits: Float[Array, " batch *space"],
    labels: Shaped[Array, " batch *space"],
    *,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Lovász hinge loss of each sample, from 0 up: a convex extension of the Jaccard loss.

    $$ \ell = \sum_i e_{(i)} \left(\Delta(i) - \Delta(i - 1)\right), \quad
       e_i = \max(0, 1 - z_i (2 y_i - 1)) $$

    with the hinge errors of a sample in descending order and $\Delta(i)$ the Jaccard loss if the
    first $i$ positions were wrong. Equal errors share their slope evenly; the slope at the hinge is
    0. A label other than 0 and 1 makes its sample NaN.

    Args:
        logits: Scores of the foreground, `(batch, *space)`.
        labels: Same shape: 0 or 1, of any dtype.
        ignore_index: Integer label whose positions are left out, as by `where`.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Berman et al., The Lovász-Softmax Loss, CVPR 2018. Equals kornia's `lovasz_hinge_loss`.

    >>> lovasz_hinge_loss(jnp.array([[0.0, 3.0]]), jnp.array([[1, 1]]))  # errors 1 and 0
    Array(0.5, dtype=float32)
    """
    check_float(logits=logits)
    check_min_rank(1, logits=logits)
    check_same_shape(logits=logits, labels=labels)
    labels = jnp.asarray(labels)
    where = kept_positions(logits.shape, labels, where, ignore_index)
    logits, labels = prepare_binary(logits, labels, where)
    ok = whole_samples((labels == 0) | (labels == 1), where)
    errors = jax.nn.relu(1 - logits * (2 * labels - 1))
    flat = lambda x: x.reshape(len(x), math.prod(x.shape[1:]))
    kept = None if where is None else flat(where)
    values = poison(_lovasz(flat(errors), flat(labels == 1), kept), ok)
    units = region_units(where, values)
    return reduce(values, where=units, weights=weights, reduction=reduction)


def _lovasz(errors: Array, hit: Array, kept: Array | None) -> Array:
    """Sum of errors over the last axis, each times its step of the Jaccard loss."""
    if not errors.shape[-1]:
        return jnp.sum(errors, axis=-1)
    if kept is not None:
        hit, errors = hit & kept, jnp.where(kept, errors, 0)
    steps = _steps(jax.lax.stop_gradient(errors), hit, kept)
    return jnp.sum(steps * jnp.where((steps == 0) & jnp.isinf(errors), 0, errors), axis=-1)


def _steps(errors: Array, hit: Array, kept: Array | None) -> Array:
    """How much the Jaccard loss grows when a position joins all those of larger error.

    With G positions of the class, of which a, and b others, come before: 1 / (G + b) for one of the
    class and (G - a) / ((G + b) (G + b + 1)) for another. Within equal errors the class comes
    first and the others share what they add. Only keys are sorted, as integers, in which error and
    class membership are packed: XLA sorts pairs and floats several times slower.
    """
    keys = _keys(errors, hit, kept)
    ordered = jax.lax.sort(keys, dimension=keys.ndim - 1)
    count, axis = keys.shape[-1], keys.ndim - 1
    place = jax.lax.broadcasted_iota(jnp.int32, keys.shape, axis)
    mine = (ordered & 1) == 0
    before = jnp.cumsum(mine, axis=axis, dtype=jnp.int32)
    new = jnp.concatenate(
        [jnp.ones_like(mine[..., :1]), ordered[..., 1:] != ordered[..., :-1]], axis=axis
    )
    starts = jnp.where(new, place, count)
    ends = jnp.concatenate([starts[..., 1:], jnp.full_like(starts[..., :1], count)], axis=axis)
    ends = jax.lax.cummin(ends, axis=axis, reverse=True)
    real = lambda x: x.astype(errors.dtype)
    a, total = real(before), real(before[..., -1:])
    first, last = real(place - before), real(ends - before)
    others = safe_div(total - a, (total + first) * (total + last))
    absent = jnp.where(first == 0, safe_div(jnp.ones_like(last), last), 0)
    others = jnp.where(total == 0, absent, others)
    steps = jnp.where(mine, safe_div(jnp.ones_like(a), total + first + 1), others)
    return jnp.take_along_axis(steps, first_place(ordered, keys), axis=axis, mode="clip")


def _keys(errors: Array, hit: Array, kept: Array | None) -> Array:
    """Unsigned integers in whose order large errors come first, and hidden positions last.

    Floats from 0 up are ordered as their bits are; the sign bit makes room for the membership.
    """
    integer = jnp.uint64 if errors.dtype == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(jnp.where(errors > 0, errors, 0), integer)
    keys = ((bits + 1) << 1) | hit.astype(integer)
    return ~(keys if kept is None else jnp.where(kept, keys, 0))


_LABELS = dict(probs=draw_probs("B H W C"), labels=draw_labels("B H W"))
_BINARY = dict(logits=draw_normal("B H W", scale=2), labels=draw_binary("B H W"))
_MARKED = dict(_BINARY, labels=draw_labels("B H W", classes="L"))
_ALL, _SIZES = "B H W", dict(H=3, W=4, C=3, L=3)

CASES = (
    Case(lovasz_softmax_loss, _LABELS, positions=_ALL, sizes=_SIZES),
    Case(
        lovasz_softmax_loss,
        _LABELS,
        dict(ignore_index=1),
        label="ignoring",
        positions=_ALL,
        sizes=_SIZES,
    ),
    Case(lovasz_hinge_loss, _BINARY, positions=_ALL, sizes=_SIZES),
    Case(
        lovasz_hinge_loss,
        _MARKED,
        dict(ignore_index=2),
        label="ignoring",
        positions=_ALL,
        sizes=_SIZES,
    ),
)
