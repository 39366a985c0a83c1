"""One loss at several depths or scales of a network, as one objective."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .._core.checks import check_float, check_min_rank, check_scalar, check_shape, message
from .._core.compiled import uncompiled
from .._core.numerics import safe_div, widen
from .._core.reduce import mask
from .._core.terms import Criterion
from .._core.typing import Number
from .._core.windows import halve
from .composition import weighted_sum

__all__ = ["average_pool", "deep_supervision", "multi_scale"]


@uncompiled
def average_pool(images: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """Images of half the size: means of two pixels along each axis of space.

    Args:
        images: `(batch, *space, channels)`. A side of odd length first repeats its first row.

    Returns:
        `(batch, *(half the space), channels)`.

    >>> average_pool(jnp.array([[[1.0], [3.0], [5.0], [5.0]]]))[0, :, 0]
    Array([2., 5.], dtype=float32)
    """
    check_float(images=images)
    check_min_rank(2, images=images)
    return halve(jnp.asarray(images))


@uncompiled
def deep_supervision(
    loss_fn: Callable[..., Any],
    preds: Sequence[Float[Array, "batch ..."]],
    target: Any,
    *,
    scale_weights: Sequence[Number] | None = None,
    decay: Number = 0.5,
    floor: Number = 0.0625,
    resize: Callable[[Array, tuple[int, ...]], Array] | None = None,
    **options: Any,
) -> Criterion:
    r"""A loss on the outputs of several depths of a network, the finer ones weighing more.

    $$ L = \sum_i \max(\beta^i, f)\, L_i $$

    Args:
        loss_fn: A loss `(pred, target, **options)` that gives a scalar, a `SumAndWeight`, or
            `(total, terms)`.
        preds: Outputs `(batch, *space, channels)` from fine to coarse.
        target: One target for all of them, `(batch, *space)` for labels or `(batch, *space,
            channels)`, brought to the space of each output; or a list with one for each.
        scale_weights: A weight for each output in place of the powers. nnU-Net divides the powers
            by their sum and drops the coarsest output by a weight of 0.
        decay: $\beta$.
        floor: $f$, the least weight.
        resize: `(target, space) -> target`, such as an average for targets that are images. Without
            it each output reads the target at the pixels nearest to the centres of its own, so that
            labels stay labels.
        options: Passed to `loss_fn`. `where` and `weights` that cover the space of a single
            target are read at the same pixels.

    Returns:
        The total, and the loss of each output by its number, `"0"` the finest, before its weight
        and without a gradient.

    Raises:
        ValueError: No outputs, or not one target, or weight, for each.

    Reference:
        Lee et al., Deeply-Supervised Nets, AISTATS 2015; Isensee et al., nnU-Net, Nature Methods
        2021. Equals MONAI's `DeepSupervisionLoss` with its weights "exp".

    >>> preds = [jnp.zeros((1, 4, 1)), jnp.zeros((1, 2, 1))]
    >>> target = jnp.array([[[0.0], [1.0], [2.0], [3.0]]])
    >>> total, terms = deep_supervision(jaxloss.squared_error, preds, target)
    >>> terms["0"], terms["1"]  # (0 + 1 + 4 + 9) / 4, and of every second pixel (1 + 9) / 2
    (Array(3.5, dtype=float32), Array(5., dtype=float32))
    >>> total  # 3.5 + 5 / 2
    Array(6., dtype=float32)
    """
    if not isinstance(preds, (list, tuple)) or not preds:
        got = "none" if isinstance(preds, (list, tuple)) else type(preds).__name__
        raise ValueError(message("preds", "a list of outputs from fine to coarse", got))
    several = isinstance(target, (list, tuple))
    if several and len(target) != len(preds):
        raise ValueError(message("target", f"one for each of {len(preds)} outputs", len(target)))
    check_scalar(decay=decay, floor=floor)
    if scale_weights is None:
        scale_weights = [_power(decay, floor, i) for i in range(len(preds))]
    terms: dict[str, Any] = {}
    for i, pred in enumerate(preds):
        check_float(**{f"preds[{i}]": pred})
        check_min_rank(2, **{f"preds[{i}]": pred})
        here, space = dict(options), jnp.shape(pred)[1:-1]
        goal = target[i] if several else _resized(target, space, resize)
        for name in () if several else ("where", "weights"):
            if _covers(here.get(name), target, len(space)):
                here[name] = _resized(here[name], space, None)
        terms[str(i)] = loss_fn(pred, goal, **here)
    return weighted_sum(terms, weights=_by_name(scale_weights, len(preds)))


@uncompiled
def multi_scale(
    loss_fn: Callable[..., Any],
    pred: Float[Array, "batch ..."],
    target: Shaped[Array, "batch ..."],
    *,
    scales: int = 4,
    downsample: Callable[[Array], Array] = average_pool,
    scale_weights: Sequence[Number] | None = None,
    **options: Any,
) -> Criterion:
    r"""A loss on images and on ever smaller copies of them: coarse errors count, not only fine.

    $$ L = \sum_{i=0}^{S-1} w_i\, \ell(D^i(\hat y), D^i(y)) $$

    Args:
        loss_fn: A loss `(pred, target, **options)` that gives a scalar, a `SumAndWeight`, or
            `(total, terms)`.
        pred: Images `(batch, *space, channels)`.
        target: The same shape, floating: a map of labels has no average; take `deep_supervision`.
        scales: $S$, how many sizes, the full one included.
        downsample: $D$, a linear function from images to smaller ones.
        scale_weights: $w$, from the full size on; all 1 without them.
        options: Passed to `loss_fn`. A pixel of a smaller copy is the mean of the kept pixels
            under it, and hidden where there are none. `where` may cover `(batch, *space)` or also
            the channels. If the units are what it covers, each of them weighs as much as the share
            that is kept times the mean of its `weights`.

    Returns:
        The total, and the loss at each size by its number, `"0"` the full one, before its weight
        and without a gradient.

    Raises:
        ValueError: Fewer than one scale or not a weight for each, or an image of less than one
            pixel.

    Reference:
        Wang, Simoncelli and Bovik, Multi-Scale Structural Similarity for Image Quality Assessment,
        Asilomar 2003, for any loss and as a sum.

    >>> pred, target = jnp.array([[[3.0], [1.0]]]), jnp.zeros((1, 2, 1))
    >>> total, terms = multi_scale(jaxloss.squared_error, pred, target, scales=2)
    >>> terms["0"], terms["1"]  # (9 + 1) / 2, and the square of the mean
    (Array(5., dtype=float32), Array(4., dtype=float32))
    """
    if isinstance(scales, bool) or not isinstance(scales, int) or scales < 1:
        raise ValueError(message("scales", "an integer of at least 1", repr(scales)))
    check_float(pred=pred, target=target)
    check_min_rank(3, pred=pred)
    check_shape(jnp.shape(pred), target=target)
    shortest = min(jnp.shape(pred)[1:-1])
    if shortest < 2 ** (scales - 1):
        expected = f"sides of at least {2 ** (scales - 1)} for {scales} scales"
        raise ValueError(message("pred", expected, f"shape {jnp.shape(pred)}"))
    where, weights = options.pop("where", None), options.pop("weights", None)
    a, b = mask(where, *widen(pred, target))
    shape = _units(loss_fn, a, b, options)
    weighs = shape in (a.shape, a.shape[:-1]) and (where is None or jnp.shape(where) == shape)
    weighs &= where is not None or weights is not None
    kept = None if where is None else jnp.asarray(where).astype(a.dtype)
    if weighs:
        share = jnp.ones(shape, a.dtype) if weights is None else jnp.asarray(weights)
        weights = share.astype(a.dtype) if kept is None else share * kept
    terms: dict[str, Any] = {}
    for i in range(scales):
        if i:
            if kept is None:
                a, b = downsample(a), downsample(b)
            else:
                part = _pooled(kept, a.ndim, downsample)
                over = _like(part, a)
                a, b = (safe_div(downsample(x * _like(kept, x)), over) for x in (a, b))
                kept = (part > 0).astype(a.dtype)
            weights = _pooled(weights, a.ndim, downsample) if weighs else weights
        tail = {} if kept is None else dict(where=kept > 0)
        tail |= {} if weights is None else dict(weights=weights)
        terms[str(i)] = loss_fn(a, b, **options, **tail)
    weight = [1.0] * scales if scale_weights is None else scale_weights
    return weighted_sum(terms, weights=_by_name(weight, scales))


def _power(decay: Number, floor: Number, i: int) -> Number:
    if isinstance(decay, (int, float)) and isinstance(floor, (int, float)):
        return max(decay**i, floor)
    return jnp.maximum(jnp.asarray(decay, jnp.float32) ** i, floor)


def _by_name(weights: Sequence[Number], count: int) -> dict[str, Number]:
    if len(weights) != count:
        raise ValueError(message("scale_weights", f"{count} weights", len(weights)))
    return {str(i): weight for i, weight in enumerate(weights)}


def _covers(option: Any, target: Any, axes: int) -> bool:
    """Whether an option covers batch and space of the target."""
    return option is not None and jnp.shape(option)[: axes + 1] == jnp.shape(target)[: axes + 1]


def _resized(target: Any, space: tuple[int, ...], resize: Any) -> Array:
    """The target in another space, at the pixels nearest to the centres of the new ones."""
    target = jnp.asarray(target)
    if target.ndim <= len(space):
        expected = f"batch and {len(space)} axes of space"
        raise ValueError(message("target", expected, f"shape {target.shape}"))
    if target.shape[1 : 1 + len(space)] == space:
        return target
    if resize is not None:
        return resize(target, space)
    for axis, size in enumerate(space, 1):
        centres = (np.arange(size) + 0.5) * target.shape[axis] / size
        target = jnp.take(target, centres.astype(np.int32), axis=axis)
    return target


def _units(
    loss_fn: Callable[..., Any], pred: Array, target: Array, options: dict[str, Any]
) -> tuple[int, ...]:
    """The shape of the units of a loss; that of a scalar if it cannot be asked for them."""
    if "reduction" not in inspect.signature(loss_fn).parameters:
        return ()
    find = lambda a, b: loss_fn(a, b, **(options | dict(reduction="none")))
    return getattr(jax.eval_shape(find, pred, target), "shape", ())


def _like(array: Array, images: Array) -> Array:
    """What covers batch and space, with an axis for the channels."""
    return array if array.ndim == images.ndim else array[..., None]


def _pooled(array: Any, rank: int, downsample: Callable[[Array], Array]) -> Array:
    return downsample(array) if array.ndim == rank else downsample(array[..., None])[..., 0]
