"""Losses of a labelled batch from the distances of all its pairs: near within, far between."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .._core.case import Case, draw_groups, draw_normal
from .._core.compiled import compiled
from .._core.numerics import numbers
from .._core.pairwise import gather_rows, pairwise_distance, prepare_batch
from .._core.reduce import reduce
from .._core.sharding import unshard
from .._core.sigmoid import sigmoid_costs
from .._core.softmax import safe_log_sum_exp
from .._core.terms import Axis
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "generalized_lifted_structure_loss",
    "lifted_structure_loss",
    "margin_loss",
    "nca_loss",
]


def _log_sum(kept: Array, x: Array) -> Array:
    """Log-sum-exp of the kept elements of each row; -inf with zero gradient for none."""
    return safe_log_sum_exp(jnp.where(kept, x, -jnp.inf))


@compiled("axis_name")
def lifted_structure_loss(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    negative_margin: Number = 1.0,
    positive_margin: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Squared hinge of each positive pair against the negatives of both its ends, from 0 up.

    $$ \ell_{ij} = \tfrac{1}{2} \max\Big(0, \log\Big(\sum_{n \in N_i} e^{m - d_{in}} +
       \sum_{n \in N_j} e^{m - d_{jn}}\Big) + d_{ij} - m^+\Big)^2 $$

    for Euclidean distances; embeddings are not normalised. The gradient at the kink is 0. Memory: a
    few `n x n` arrays.

    Args:
        embeddings: Rows `(n, features)`.
        labels: Integers `(n,)`: equal ones belong together.
        negative_margin: Distance $m$ that negatives should keep.
        positive_margin: Distance $m^+$ that positives may keep.
        where: Bool array `(n,)`; a hidden sample is no partner either.
        weights: One for each ordered pair, `(n, n)`.
        axis_name: Mapped axes over which the samples are split; partners come from all devices.

    One unit per ordered pair of positives with a negative; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n, n)` if `reduction` is `"none"`.

    Reference:
        Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016. Equals
        pytorch-metric-learning's `LiftedStructureLoss`, which normalises by default.

    >>> embeddings, labels = jnp.array([[0.0], [0.0], [3.0]]), jnp.array([0, 0, 1])
    >>> lifted_structure_loss(embeddings, labels, negative_margin=3.0)  # (log 2)^2 / 2
    Array(0.2402265, dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name)
    above, below = numbers(
        batch.rows, negative_margin=negative_margin, positive_margin=positive_margin
    )
    d = pairwise_distance(batch.rows, batch.keys)  # (n, m)
    units = batch.positives & batch.both()[:, None]
    near = jnp.any(batch.negatives, axis=1)
    far = jnp.where(near, _log_sum(batch.negatives, above - d), 0)
    (far_keys,) = gather_rows(axis_name, far)
    assert far_keys is not None
    hinge = jnp.logaddexp(far[:, None], unshard(far_keys, 0)[None]) + d - below
    values = jax.nn.relu(hinge) ** 2 / 2
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled("axis_name")
def generalized_lifted_structure_loss(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    negative_margin: Number = 1.0,
    positive_margin: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Hinge of each sample between all its positives and all its negatives, from 0 up.

    $$ \ell_i = \max\Big(0, \log \sum_{p \in P_i} e^{d_{ip} - m^+} +
       \log \sum_{n \in N_i} e^{m - d_{in}}\Big) $$

    for Euclidean distances; embeddings are not normalised. The gradient at the kink is 0. Memory: a
    few `n x n` arrays.

    Args:
        embeddings: Rows `(n, features)`.
        labels: Integers `(n,)`: equal ones belong together.
        negative_margin: Distance $m$ that negatives should keep.
        positive_margin: Distance $m^+$ that positives may keep.
        where: Bool array `(n,)`; a hidden sample is no partner either.
        axis_name: Mapped axes over which the samples are split; partners come from all devices.

    One unit per sample that has a positive and a negative; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, 2017. Equals
        pytorch-metric-learning's `GeneralizedLiftedStructureLoss`, which normalises by default and
        counts samples without positives.

    >>> embeddings, labels = jnp.array([[0.0], [0.0], [3.0]]), jnp.array([0, 0, 1])
    >>> generalized_lifted_structure_loss(embeddings, labels, negative_margin=4.0)  # 0 + 4 - 3
    Array(1., dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name)
    above, below = numbers(
        batch.rows, negative_margin=negative_margin, positive_margin=positive_margin
    )
    d = pairwise_distance(batch.rows, batch.keys)  # (n, m)
    hinge = _log_sum(batch.positives, d - below) + _log_sum(batch.negatives, above - d)
    units = batch.both()
    values = jax.nn.relu(jnp.where(units, hinge, 0))
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled("axis_name")
def margin_loss(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    margin: Number = 0.2,
    beta: Number = 1.2,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Hinge of each pair around one boundary between near and far, from 0 up.

    $$ \ell_{ij} = \max(0, m + d_{ij} - \beta) \text{ for equal labels, else }
       \max(0, m + \beta - d_{ij}) $$

    for Euclidean distances; embeddings are not normalised. The boundary may be learned. The
    gradient at the kink is 0. Memory: a few `n x n` arrays.

    Args:
        embeddings: Rows `(n, features)`; unit rows suit the default `beta`.
        labels: Integers `(n,)`: equal ones belong together.
        margin: Distance $m$ from the boundary from which a pair costs nothing.
        beta: The boundary $\beta$, a distance.
        where: Bool array `(n,)`; a hidden sample is no partner either.
        weights: One for each ordered pair, `(n, n)`.
        axis_name: Mapped axes over which the samples are split; partners come from all devices.

    One unit per ordered pair of samples; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n, n)` if `reduction` is `"none"`.

    Reference:
        Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017, who average over the
        losses above 0: `nonzero_mean`. pytorch-metric-learning's `MarginLoss` does so over triplets
        of unit rows: a pair then weighs as many times as it stands in one.

    >>> embeddings, labels = jnp.array([[0.0], [1.0], [1.5]]), jnp.array([0, 0, 1])
    >>> margin_loss(embeddings, labels, margin=0.5, beta=1.0)  # (0.5 + 0 + 1) / 3
    Array(0.5, dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name)
    margin, beta = numbers(batch.rows, margin=margin, beta=beta)
    beyond = pairwise_distance(batch.rows, batch.keys) - beta  # (n, m)
    values = jax.nn.relu(margin + jnp.where(batch.positives, beyond, -beyond))
    units = batch.positives | batch.negatives
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled("axis_name")
def nca_loss(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    scale: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Neighbourhood components analysis: log-chance of a neighbour of another class, in nats.

    $$ \ell_i = -\log \frac{\sum_{p \in P_i} e^{-s\, d_{ip}^2}}{\sum_{j \ne i} e^{-s\, d_{ij}^2}} $$

    for Euclidean distances; embeddings are not normalised. Memory: a few `n x n` arrays.

    Args:
        embeddings: Rows `(n, features)`.
        labels: Integers `(n,)`: equal ones belong together.
        scale: Inverse temperature $s$ of the squared distances.
        where: Bool array `(n,)`; a hidden sample is no partner either.
        axis_name: Mapped axes over which the samples are split; partners come from all devices.

    One unit per sample that has a positive; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Goldberger et al., Neighbourhood Components Analysis, NeurIPS 2004, who also maximise the
        sum of the probabilities themselves. Equals pytorch-metric-learning's `NCALoss`, which
        normalises by default.

    >>> embeddings, labels = jnp.array([[0.0], [0.0], [1.0]]), jnp.array([0, 0, 1])
    >>> nca_loss(embeddings, labels)  # log(1 + e^-1)
    Array(0.3132617, dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name)
    (scale,) = numbers(batch.rows, scale=scale)
    z = -scale * pairwise_distance(batch.rows, batch.keys, squared=True)  # (n, m)
    units = jnp.any(batch.positives, axis=1)
    near = jnp.where(units, _log_sum(batch.positives, z), 0)
    values = sigmoid_costs(_log_sum(batch.negatives, z) - near)[1]
    return reduce(values, where=units, weights=weights, reduction=reduction)


_BATCH = dict(embeddings=draw_normal("B D"), labels=draw_groups("B"))
_SOME = {
    "microbatches": "partners come from the whole batch",
    "weight_two": "a sample seen twice is a new partner of the others",
    "reducing": "samples without partners leave the denominator",
}

CASES = (
    Case(
        lifted_structure_loss,
        _BATCH,
        dict(negative_margin=3.0, positive_margin=0.5),
        positions="B",
        coupled=True,
        without=_SOME,
    ),
    Case(
        generalized_lifted_structure_loss,
        _BATCH,
        dict(negative_margin=3.0, positive_margin=0.5),
        coupled=True,
        without=_SOME,
    ),
    Case(
        margin_loss,
        _BATCH,
        dict(margin=0.6, beta=3.0),
        positions="B",
        coupled=True,
        without=_SOME,
    ),
    Case(nca_loss, _BATCH, dict(scale=0.3), coupled=True, without=_SOME),
)
