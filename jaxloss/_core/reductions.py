"""Reductions to pass as `reduction=`: callables of `(values, weights)`.

Those with a parameter are frozen dataclasses and pytrees, equal by value, so that writing
`top_k(0.7)` twice compiles once. Hidden units arrive with value and weight 0.
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .checks import check_integer, check_shape, message, naming
from .numerics import safe_div
from .sharding import unshard

__all__ = [
    "SumAndWeight",
    "across",
    "cvar",
    "mean_over_count",
    "nonzero_mean",
    "normalized_sum",
    "ohem",
    "per_list_mean",
    "segmented",
    "sequence_mean",
    "sequence_sum",
    "sequence_sum_scaled",
    "sum_and_weight",
    "top_k",
]

T = TypeVar("T")


def _reduction(*, data: tuple[str, ...] = ()) -> Any:
    """Frozen dataclass and pytree: fields named in `data` may be arrays, the others are static."""

    def decorate(cls: type[T]) -> type[T]:
        cls = dataclass(frozen=True)(cls)
        if not data:
            return jax.tree_util.register_static(cls)
        meta = [f.name for f in fields(cls) if f.name not in data]  # pyright: ignore[reportArgumentType]
        return jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=meta)

    return decorate


@partial(jax.tree_util.register_dataclass, data_fields=["sum", "weight"], meta_fields=[])
@dataclass(frozen=True)
class SumAndWeight:
    """A weighted sum and its weight: add pairs over microbatches or devices, divide once.

    >>> first = SumAndWeight(jnp.float32(4), jnp.float32(1))
    >>> second = SumAndWeight(jnp.float32(3), jnp.float32(3))
    >>> (first + second).mean()
    Array(1.75, dtype=float32)
    """

    sum: Array
    weight: Array

    def __add__(self, other: "SumAndWeight | int") -> "SumAndWeight":
        if isinstance(other, SumAndWeight):
            return SumAndWeight(self.sum + other.sum, self.weight + other.weight)
        return self if isinstance(other, int) and other == 0 else NotImplemented

    __radd__ = __add__

    def mean(self) -> Array:
        """Sum over weight; 0 with zero gradient when the weight is 0."""
        return safe_div(jnp.asarray(self.sum), jnp.asarray(self.weight))

    def psum(self, axis_name: str | tuple[str, ...]) -> "SumAndWeight":
        """The pair added up over a mapped axis; the weight carries no gradient."""
        weight = jax.lax.psum(jax.lax.stop_gradient(self.weight), axis_name)
        return SumAndWeight(jax.lax.psum(self.sum, axis_name), weight)


def sum_and_weight(values: Array, weights: Array) -> SumAndWeight:
    """The weighted sum and the sum of weights, kept apart so that they add up exactly.

    >>> sum_and_weight(jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])).mean()
    Array(1.75, dtype=float32)
    """
    return SumAndWeight(jnp.sum(weights * values), jnp.sum(weights))


@_reduction()
class across:  # noqa: N801
    """The mean over all devices of a mapped axis: both sums are added up, then divided.

    For `shard_map`, `pmap` and `vmap(axis_name=...)`. Take the gradient outside the mapped
    function. Under plain `jit` with sharded arrays `"mean"` already is the global mean.
    """

    axis_name: str | tuple[str, ...]

    def __call__(self, values: Array, weights: Array) -> Array:
        return sum_and_weight(values, weights).psum(self.axis_name).mean()


@_reduction()
class top_k:  # noqa: N801
    """Mean of the largest units: a count if `amount` is an int, a share of them if a float.

    A share is one of the kept units, rounded to the nearest count, at least one. Fewer kept units
    than asked for are all used. Units of weight 0 are never chosen; the chosen ones are averaged
    with their weights.
    This is online hard example mining (Shrivastava et al., CVPR 2016).

    >>> top_k(2)(jnp.array([1.0, 5.0, 3.0]), jnp.ones(3))
    Array(4., dtype=float32)
    """

    amount: int | float

    def __post_init__(self) -> None:
        share = isinstance(self.amount, float)
        if not (0 < self.amount <= 1 if share else self.amount >= 1):
            expected = "a share in (0, 1]" if share else "a count of at least 1"
            with naming("top_k"):
                raise ValueError(message("amount", expected, self.amount))

    def __eq__(self, other: object) -> bool:
        """A count of 1 is not a share of 1.0: a compiled loss must tell them apart."""
        return isinstance(other, top_k) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __call__(self, values: Array, weights: Array) -> Array:
        values, weights = (unshard(x).reshape(-1) for x in (values, weights))
        if not values.size:
            return jnp.sum(values)
        share = self.amount if isinstance(self.amount, float) else None
        most = math.ceil(share * values.size) if share else min(int(self.amount), values.size)
        keys = jax.lax.stop_gradient(jnp.where(weights == 0, -jnp.inf, values))
        _, chosen = jax.lax.top_k(keys, most)
        weights = weights[chosen]
        if share:
            kept = jnp.sum(keys > -jnp.inf) + jnp.sum(jnp.isnan(keys))
            count = jnp.maximum(jnp.round(share * kept), 1)
            weights = jnp.where(jnp.arange(most) < count, weights, 0)
        return sum_and_weight(jnp.where(weights == 0, 0, values[chosen]), weights).mean()


@_reduction(data=("threshold",))
class ohem:  # noqa: N801
    """Online hard example mining for cross-entropy: mean over the units that are still hard.

    Kept are units whose loss exceeds `-log(threshold)`, the loss of a true class of that
    probability, and in any case all whose loss is at least the `min_kept`-th largest.
    Shrivastava et al., Training Region-based Object Detectors with OHEM, CVPR 2016.

    >>> ohem(threshold=0.5, min_kept=1)(jnp.array([0.1, 1.0, 3.0]), jnp.ones(3))
    Array(2., dtype=float32)
    """

    threshold: float | Array = 0.7
    min_kept: int = 100_000

    def __call__(self, values: Array, weights: Array) -> Array:
        keys = jax.lax.stop_gradient(jnp.where(weights == 0, -jnp.inf, values))
        flat = unshard(keys).reshape(-1)
        kept = keys > -jnp.log(jnp.asarray(self.threshold, values.dtype))
        count = min(self.min_kept, flat.size)
        if count > 0:
            kept |= keys >= jax.lax.top_k(flat, count)[0][-1]
        kept = (kept & (weights != 0)) | jnp.isnan(keys)
        return sum_and_weight(jnp.where(kept, values, 0), jnp.where(kept, weights, 0)).mean()


@_reduction(data=("level",))
class cvar:  # noqa: N801
    """Conditional value at risk: mean of the worst `1 - level` of the total weight.

    The unit on the border counts with the part of its weight that still fits, so weight 2 is
    exactly the unit seen twice; level 0 is the mean. Rockafellar and Uryasev, Optimization of
    Conditional Value-at-Risk, Journal of Risk 2000.

    >>> cvar(0.5)(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.ones(4))
    Array(3.5, dtype=float32)
    """

    level: float | Array

    def __call__(self, values: Array, weights: Array) -> Array:
        values, weights = (unshard(x).reshape(-1) for x in (values, weights))
        worst_first = jnp.argsort(-jax.lax.stop_gradient(values))
        values, weights = values[worst_first], weights[worst_first]
        filled = jnp.cumsum(weights)
        mass = (1 - jnp.asarray(self.level, values.dtype)) * jnp.sum(weights)
        return sum_and_weight(values, jnp.clip(mass - (filled - weights), 0, weights)).mean()


def nonzero_mean(values: Array, weights: Array) -> Array:
    """Mean over the units whose value is not 0; hinge-like losses then ignore satisfied units.

    >>> nonzero_mean(jnp.array([0.0, 2.0, 4.0]), jnp.ones(3))
    Array(3., dtype=float32)
    """
    return safe_div(jnp.sum(weights * values), jnp.sum(jnp.where(values == 0, 0, weights)))


def mean_over_count(values: Array, weights: Array) -> Array:
    """Weighted sum over the number of units of non-zero weight, not over the sum of the weights.

    >>> mean_over_count(jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0]))
    Array(3.5, dtype=float32)
    """
    return safe_div(jnp.sum(weights * values), jnp.sum(weights != 0, dtype=values.dtype))


def per_list_mean(values: Array, weights: Array) -> Array:
    """Mean over lists of the mean over a list's pairs (the last two axes); without pairs, none.

    >>> per_list_mean(jnp.array([[[4.0, 1.0], [1.0, 9.0]]]), jnp.array([[[0.0, 1.0], [0.0, 1.0]]]))
    Array(5., dtype=float32)
    """
    weight = jnp.sum(weights, axis=(-2, -1))
    total = jnp.sum(weights * values, axis=(-2, -1))
    return _over_sequences(safe_div(total, weight), weight)


def sequence_mean(values: Array, weights: Array) -> Array:
    """Mean over sequences of the mean over time (the last axis); empty sequences drop out.

    >>> sequence_mean(jnp.array([[4.0, 0.0], [1.0, 3.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    Array(3., dtype=float32)
    """
    weight = jnp.sum(weights, axis=-1)
    return _over_sequences(safe_div(jnp.sum(weights * values, axis=-1), weight), weight)


def sequence_sum(values: Array, weights: Array) -> Array:
    """Mean over non-empty sequences of the sum over time (the last axis).

    >>> sequence_sum(jnp.array([[4.0, 0.0], [1.0, 3.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    Array(4., dtype=float32)
    """
    return _over_sequences(jnp.sum(weights * values, axis=-1), jnp.sum(weights, axis=-1))


def _over_sequences(values: Array, weight: Array) -> Array:
    return safe_div(jnp.sum(values), jnp.sum(weight != 0, dtype=values.dtype))


@_reduction(data=("length",))
class sequence_sum_scaled:  # noqa: N801
    """`sequence_sum` over a constant length, such as the longest completion allowed (Dr. GRPO).

    >>> sequence_sum_scaled(8)(jnp.array([[4.0, 0.0], [1.0, 3.0]]), jnp.ones((2, 2)))
    Array(0.5, dtype=float32)
    """

    length: int | float | Array

    def __call__(self, values: Array, weights: Array) -> Array:
        return sequence_sum(values, weights) / jnp.asarray(self.length, values.dtype)


@_reduction(data=("normalizer",))
class normalized_sum:  # noqa: N801
    """Sum over a given count: the tokens of the whole optimiser step, over all microbatches.

    >>> normalized_sum(8)(jnp.array([1.0, 3.0]), jnp.ones(2))
    Array(0.5, dtype=float32)
    """

    normalizer: int | float | Array

    def __call__(self, values: Array, weights: Array) -> Array:
        return safe_div(jnp.sum(weights * values), jnp.asarray(self.normalizer, values.dtype))


def adds_up(reduction: Any) -> bool:
    """Whether a reduction looks at nothing but the weighted sum and the sum of the weights."""
    named = isinstance(reduction, str) and reduction in ("mean", "sum")
    return named or reduction is sum_and_weight or isinstance(reduction, (across, normalized_sum))


def of_sums(total: Array, weight: Array, reduction: Any) -> Any:
    """What a reduction that adds up makes of these two sums."""
    if isinstance(reduction, str):
        return safe_div(total, weight) if reduction == "mean" else total
    # One unit of the whole sum, and one that holds the rest of the weight, are the same to it.
    one = jnp.ones_like(total)
    return reduction(jnp.stack([total, 0 * one]), jnp.stack([one, weight - one]))


@_reduction(data=("segment_ids",))
class segmented:  # noqa: N801
    """A sequence reduction over packed rows: each segment of each row is a sequence.

    `segment_ids` has the shape of the units: 0 is padding, segments count from 1 to the static
    `num_segments`. A kept unit with another id makes the result NaN.

    >>> ids = jnp.array([[1, 2, 2, 0]])
    >>> segmented(sequence_mean, ids, 2)(jnp.array([[4.0, 1.0, 3.0, 9.0]]), jnp.ones((1, 4)))
    Array(3., dtype=float32)
    """

    reduction: Any
    segment_ids: Array
    num_segments: int

    def __call__(self, values: Array, weights: Array) -> Any:
        ids = self.segment_ids
        with naming("segmented"):
            check_integer(segment_ids=ids)
            check_shape(values.shape, segment_ids=ids)
        bad = (weights != 0) & ((ids < 0) | (ids > self.num_segments))
        values = values * jnp.where(bad, jnp.nan, 1)
        member = ids[..., None, :] == jnp.arange(1, self.num_segments + 1, dtype=ids.dtype)[:, None]
        member |= bad[..., None, :]
        weight = jnp.sum(jnp.where(member, weights[..., None, :], 0), axis=-1)
        total = jnp.sum(jnp.where(member, (weights * values)[..., None, :], 0), axis=-1)
        return self.reduction(safe_div(total, weight)[..., None], weight[..., None])
