"""Losses of a labelled batch from the cosines of all its pairs: similar within, apart between."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from .._core.case import Case, draw_groups, draw_normal
from .._core.compiled import compiled
from .._core.numerics import numbers, safe_div, safe_log, safe_sqrt
from .._core.pairwise import gather_rows, prepare_batch, similarities
from .._core.reduce import reduce
from .._core.sharding import unshard
from .._core.sigmoid import sigmoid_costs
from .._core.softmax import log1p_sum_exp, safe_log_sum_exp
from .._core.terms import Axis, add_up
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "angular_loss",
    "circle_loss",
    "multi_similarity_loss",
    "threshold_consistent_margin_loss",
    "tuplet_margin_loss",
]


def _log_sum(kept: Array, x: Array) -> Array:
    """Log-sum-exp of the kept elements of each row; -inf with zero gradient for none."""
    return safe_log_sum_exp(jnp.where(kept, x, -jnp.inf))


def _softplus(x: Array) -> Array:
    return sigmoid_costs(x)[1]


@compiled("axis_name")
def circle_loss(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    margin: Number = 0.4,
    gamma: Number = 80.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Positives against negatives, each cosine weighted by its distance from its optimum, from 0.

    $$ \ell = \log\Big(1 +
       \sum_n e^{\gamma a_n (s_n - m)} \sum_p e^{-\gamma a_p (s_p - 1 + m)}\Big), \quad
       a_n = \max(0, s_n + m), \; a_p = \max(0, 1 + m - s_p) $$

    Embeddings are normalised; the weights $a$ carry no gradient. Memory: a few `n x n` arrays.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        labels: Integers `(n,)`: equal ones belong together.
        margin: Relaxation $m$: radius of the decision circle, in cosines.
        gamma: Inverse temperature $\gamma$.
        where: Bool array `(n,)`; a hidden sample is no partner either.
        axis_name: Mapped axes over which the samples are split; partners come from all devices.

    One unit per sample that has a positive and a negative; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, CVPR 2020.
        pytorch-metric-learning's `CircleLoss` averages over the losses above 0: `nonzero_mean`.
        Keras' `Circle` neither normalises nor stops the gradient of the weights.

    >>> embeddings = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    >>> circle_loss(embeddings, jnp.array([0, 0, 1]), margin=0.0, gamma=1.0)  # log(1 + 1 * 1)
    Array(0.6931472, dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name, unit=True)
    margin, gamma = numbers(batch.rows, margin=margin, gamma=gamma)
    s = similarities(batch.rows, batch.keys)  # (n, m)
    a_n = jax.nn.relu(jax.lax.stop_gradient(s + margin))
    a_p = jax.nn.relu(jax.lax.stop_gradient(1 + margin - s))
    far = _log_sum(batch.negatives, gamma * a_n * (s - margin))
    near = _log_sum(batch.positives, -gamma * a_p * (s - 1 + margin))
    values = _softplus(far + near)
    return reduce(values, where=batch.both(), weights=weights, reduction=reduction)


@compiled("axis_name")
def multi_similarity_loss(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    alpha: Number = 2.0,
    beta: Number = 50.0,
    base: Number = 0.5,
    mining_epsilon: Number | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""How far positives lie below, and negatives above, a cosine; hard pairs weigh more; from 0.

    $$ \ell = \tfrac{1}{\alpha} \log\Big(1 + \sum_p e^{-\alpha (s_p - \lambda)}\Big) +
       \tfrac{1}{\beta} \log\Big(1 + \sum_n e^{\beta (s_n - \lambda)}\Big) $$

    Embeddings are normalised. A sample without positives or negatives counts: an empty sum is 0.
    Memory: a few `n x n` arrays.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        labels: Integers `(n,)`: equal ones belong together.
        alpha: Inverse temperature $\alpha$ of the positives.
        beta: Inverse temperature $\beta$ of the negatives.
        base: Cosine $\lambda$ that should separate them.
        mining_epsilon: If given, only informative pairs count: positives less than this above the
            nearest negative, and negatives less than this below the farthest positive.
        where: Bool array `(n,)`; a hidden sample is no partner either.
        axis_name: Mapped axes over which the samples are split; partners come from all devices.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Wang et al., Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning,
        CVPR 2019. Equals pytorch-metric-learning's `MultiSimilarityLoss`, with its
        `MultiSimilarityMiner` for `mining_epsilon`.

    >>> embeddings, labels = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0])
    >>> multi_similarity_loss(embeddings, labels, alpha=1.0, base=0.0)  # log(1 + e^0) for each
    Array(0.6931472, dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name, unit=True)
    alpha, beta, base = numbers(batch.rows, alpha=alpha, beta=beta, base=base)
    s = similarities(batch.rows, batch.keys)  # (n, m)
    positives, negatives = batch.positives, batch.negatives
    if mining_epsilon is not None:
        (epsilon,) = numbers(s, mining_epsilon=mining_epsilon)
        fixed = jax.lax.stop_gradient(s)
        nearest = jnp.max(
            jnp.where(negatives, fixed, -jnp.inf), axis=1, keepdims=True, initial=-jnp.inf
        )
        farthest = jnp.min(
            jnp.where(positives, fixed, jnp.inf), axis=1, keepdims=True, initial=jnp.inf
        )
        positives &= fixed - epsilon < nearest
        negatives &= fixed + epsilon > farthest
    near = log1p_sum_exp(jnp.where(positives, alpha * (base - s), -jnp.inf)) / alpha
    far = log1p_sum_exp(jnp.where(negatives, beta * (s - base), -jnp.inf)) / beta
    return reduce(near + far, where=where, weights=weights, reduction=reduction)


@compiled("axis_name")
def angular_loss(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    alpha: Number = 0.698,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Angle at the negative of each triangle with a positive pair against a bound, from 0 up.

    $$ \ell_{ap} = \log\Big(1 + \sum_n e^{4 \tan^2\!\alpha\, (x_a + x_p) \cdot x_n -
       2 (1 + \tan^2\!\alpha)\, x_a \cdot x_p}\Big) $$

    Embeddings are normalised. The sum over all triplets is one product of two `n x n` arrays.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        labels: Integers `(n,)`: equal ones belong together.
        alpha: Upper bound $\alpha$ of the angle, in radians, up to about 1.1; 0.698 are 40 degrees.
        where: Bool array `(n,)`; a hidden sample is no partner either.
        weights: One for each ordered pair, `(n, n)`.
        axis_name: Mapped axes over which the samples are split; partners come from all devices.

    One unit per ordered pair of positives with a negative; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n, n)` if `reduction` is `"none"`.

    Reference:
        Wang et al., Deep Metric Learning with Angular Loss, ICCV 2017. Equals
        pytorch-metric-learning's `AngularLoss` of unit rows, whose angle is in degrees; it leaves
        the negatives as they are.

    >>> embeddings = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    >>> angular_loss(embeddings, jnp.array([0, 0, 1]), alpha=jnp.pi / 4)  # log(1 + e^(0 - 4))
    Array(0.01814993, dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name, unit=True)
    (alpha,) = numbers(batch.rows, alpha=alpha)
    square = jnp.tan(alpha) ** 2
    s = similarities(batch.rows, batch.keys)  # (n, m)
    z = jnp.where(batch.negatives, 4 * square * s, -jnp.inf)
    top = jnp.max(jax.lax.stop_gradient(z), axis=1, initial=-jnp.inf)
    top = jnp.where(top == -jnp.inf, 0, top)
    # A positive pair has the same negatives, so e^(z_an + z_pn) sums up to a matrix product.
    powers = jnp.exp(z - top[:, None])
    powers_keys, top_keys = gather_rows(axis_name, powers, top)
    assert powers_keys is not None
    assert top_keys is not None
    tops = top[:, None] + unshard(top_keys, 0)[None]
    level = safe_log(similarities(powers, powers_keys)) + tops - 2 * (1 + square) * s
    units = batch.positives & batch.both()[:, None]
    return reduce(_softplus(level), where=units, weights=weights, reduction=reduction)


@compiled("axis_name")
def tuplet_margin_loss(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    margin: Number = 0.1,
    scale: Number = 64.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Each positive pair, its angle made smaller by a margin, against all negatives, from 0 up.

    $$ \ell_{ap} = \log\Big(1 + \sum_n e^{s (\cos\theta_{an} - \cos(\theta_{ap} - m))}\Big) $$

    Embeddings are normalised. The margin spares pairs that differ for good reasons. Pairs closer
    than a thousandth of a radian count as parallel; their gradient is finite. Memory: a few
    `n x n` arrays.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        labels: Integers `(n,)`: equal ones belong together.
        margin: Slack $m$ of the angle between positives, in radians.
        scale: Inverse temperature $s$ of the cosines.
        where: Bool array `(n,)`; a hidden sample is no partner either.
        weights: One for each ordered pair, `(n, n)`.
        axis_name: Mapped axes over which the samples are split; partners come from all devices.

    One unit per ordered pair of positives with a negative; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(n, n)` if `reduction` is `"none"`.

    Reference:
        Yu and Tao, Deep Metric Learning with Tuplet Margin Loss, ICCV 2019. Equals
        pytorch-metric-learning's `TupletMarginLoss`, whose margin is in degrees (5.73 by default)
        and whose gradient is NaN for equal embeddings.

    >>> embeddings = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    >>> tuplet_margin_loss(embeddings, jnp.array([0, 0, 1]), margin=0.0, scale=1.0)  # log(1 + 1/e)
    Array(0.3132617, dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name, unit=True)
    margin, scale = numbers(batch.rows, margin=margin, scale=scale)
    s = similarities(batch.rows, batch.keys)  # (n, m)
    square = (1 - s) * (1 + s)
    sine = safe_sqrt(jnp.where(square <= 8 * jnp.finfo(s.dtype).eps, 0, square))
    own = scale * (s * jnp.cos(margin) + sine * jnp.sin(margin))
    values = _softplus(_log_sum(batch.negatives, scale * s)[:, None] - own)
    units = batch.positives & batch.both()[:, None]
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled("axis_name")
def threshold_consistent_margin_loss(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    positive_margin: Number = 0.9,
    negative_margin: Number = 0.5,
    positive_weight: Number = 1.0,
    negative_weight: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Mean shortfall of hard positives, and mean excess of hard negatives, of a cosine; from 0.

    $$ \ell = \lambda^+ \operatorname{mean}_{s_p \le m^+} (m^+ - s_p) +
       \lambda^- \operatorname{mean}_{s_n \ge m^-} (s_n - m^-) $$

    over all positive and negative pairs; a mean of nothing is 0. Added to another loss, it lets one
    threshold on the cosine suit all classes. Embeddings are normalised. Memory: a few `n x n`
    arrays.

    Args:
        embeddings: Rows of any length, `(n, features)`.
        labels: Integers `(n,)`: equal ones belong together.
        positive_margin: Cosine $m^+$ up to which a positive pair is hard.
        negative_margin: Cosine $m^-$ from which a negative pair is hard.
        positive_weight: Weight $\lambda^+$ of the first mean.
        negative_weight: Weight $\lambda^-$ of the second mean.
        where: Bool array `(n,)` of the samples that count.
        weights: A scalar.
        axis_name: Mapped axes over which the samples are split; all devices get the loss of the
            whole batch.

    One unit per batch that has a pair; see `jaxloss.reduce`.

    Returns:
        A float32 scalar.

    Reference:
        Zhang et al., Threshold-Consistent Margin Loss for Open-World Deep Metric Learning, ICLR
        2024. Equals pytorch-metric-learning's `ThresholdConsistentMarginLoss`.

    >>> embeddings = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> labels = jnp.array([0, 0, 1])
    >>> threshold_consistent_margin_loss(embeddings, labels)  # (0.9 - 0) + (1 - 0.5)
    Array(1.4, dtype=float32)
    """
    batch = prepare_batch(embeddings, labels, where, axis_name, unit=True)
    high, low, first, second = numbers(
        batch.rows,
        positive_margin=positive_margin,
        negative_margin=negative_margin,
        positive_weight=positive_weight,
        negative_weight=negative_weight,
    )
    s = similarities(batch.rows, batch.keys)  # (n, m)
    total = lambda x: add_up(jnp.sum(x, dtype=s.dtype), axis_name)
    mean = lambda kept, x: safe_div(total(jnp.where(kept, x, 0)), total(kept))
    value = first * mean(batch.positives & (s <= high), high - s)
    value += second * mean(batch.negatives & (s >= low), s - low)
    pairs = total(batch.positives | batch.negatives)
    return reduce(value, where=pairs > 0, weights=weights, reduction=reduction)


_BATCH = dict(embeddings=draw_normal("B D"), labels=draw_groups("B"))
_COUPLED = {
    "microbatches": "partners come from the whole batch",
    "weight_two": "a sample seen twice is a new partner of the others",
}
_ONE = {"microbatches": "the means are over the pairs of the whole batch"}
_SOME = {**_COUPLED, "reducing": "samples without partners leave the denominator"}

CASES = (
    Case(
        circle_loss,
        _BATCH,
        dict(margin=0.3, gamma=4.0),
        coupled=True,
        without={**_SOME, "numerical": "the weights carry no gradient, by definition"},
    ),
    Case(
        multi_similarity_loss,
        _BATCH,
        dict(alpha=1.5, beta=4.0, base=0.3),
        coupled=True,
        without=_COUPLED,
    ),
    Case(
        multi_similarity_loss,
        _BATCH,
        dict(beta=4.0, mining_epsilon=0.2),
        label="mining",
        coupled=True,
        without=_COUPLED,
    ),
    Case(angular_loss, _BATCH, dict(alpha=0.4), positions="B", coupled=True, without=_SOME),
    Case(
        tuplet_margin_loss,
        _BATCH,
        dict(margin=0.2, scale=2.0),
        positions="B",
        coupled=True,
        without=_SOME,
    ),
    Case(
        threshold_consistent_margin_loss,
        _BATCH,
        dict(positive_margin=0.8, negative_margin=0.1, positive_weight=1.5),
        positions="B",
        coupled=True,
        without=_ONE,
    ),
)
