"""Miners: which pairs and triplets of a labelled batch are worth a loss; none has a gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from .._core.checks import check_float, check_shape, message, require
from .._core.compiled import compiled
from .._core.mining import hardest, semi_hard
from .._core.numerics import numbers, widen
from .._core.pairwise import check_labels, label_masks, similarities
from .._core.reduce import mask
from .._core.sharding import unshard
from .._core.typing import Number, Where

__all__ = [
    "angular_triplet_mask",
    "distance_weighted_sample",
    "hard_negative_index",
    "hard_positive_index",
    "multi_similarity_mask",
    "pair_margin_mask",
    "semi_hard_negative_index",
    "triplet_mask",
]


@compiled()
def hard_positive_index(
    distances: Float[Array, "n n"], labels: Integer[Array, " n"], *, where: Where | None = None
) -> Integer[Array, " n"]:
    """Index of the farthest positive of each sample, the first of equal ones; not a loss.

    Args:
        distances: Distance of every sample to every sample, `(n, n)`.
        labels: One label for each sample, `(n,)`.
        where: True keeps a sample; a hidden one neither has nor is a positive.

    Returns:
        Integers `(n,)`; -1 for a sample without a positive. `result >= 0` is a mask for `where`.

    Reference:
        Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification,
        arXiv 2017.

    >>> x = jnp.array([0.0, 1.0, 3.0, 4.0])
    >>> distances = abs(x[:, None] - x)
    >>> hard_positive_index(distances, jnp.array([0, 0, 0, 1]))
    Array([ 2,  2,  0, -1], dtype=int32)
    """
    return hardest(*_distances(distances, labels, where))[0]


@compiled()
def hard_negative_index(
    distances: Float[Array, "n n"], labels: Integer[Array, " n"], *, where: Where | None = None
) -> Integer[Array, " n"]:
    """Index of the nearest negative of each sample, the first of equal ones; not a loss.

    Args:
        distances: Distance of every sample to every sample, `(n, n)`.
        labels: One label for each sample, `(n,)`.
        where: True keeps a sample; a hidden one neither has nor is a negative.

    Returns:
        Integers `(n,)`; -1 for a sample without a negative. `result >= 0` is a mask for `where`.

    Reference:
        Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification,
        arXiv 2017.

    >>> x = jnp.array([0.0, 1.0, 3.0, 4.0])
    >>> distances = abs(x[:, None] - x)
    >>> hard_negative_index(distances, jnp.array([0, 0, 1, 1]))
    Array([2, 2, 1, 1], dtype=int32)
    """
    return hardest(*_distances(distances, labels, where))[1]


@compiled()
def semi_hard_negative_index(
    distances: Float[Array, "n n"], labels: Integer[Array, " n"], *, where: Where | None = None
) -> Integer[Array, "n n"]:
    """Index of the semi-hard negative of each pair of positives; not a loss.

    It is the nearest negative that is farther from the first sample than the second one is, or the
    farthest negative if none is.

    Args:
        distances: Distance of every sample to every sample, `(n, n)`.
        labels: One label for each sample, `(n,)`.
        where: True keeps a sample; a hidden one has no pairs and is no negative.

    Returns:
        Integers `(n, n)`; -1 where two samples are no positives or have no negative.

    Reference:
        Schroff, Kalenichenko and Philbin, FaceNet, CVPR 2015, with the fallback of TensorFlow
        Addons' `triplet_semihard_loss`.

    >>> x = jnp.array([0.0, 1.0, 1.5, 3.0])
    >>> distances = abs(x[:, None] - x)
    >>> semi_hard_negative_index(distances, jnp.array([0, 0, 1, 2]))[:2]
    Array([[-1,  2, -1, -1],
           [ 3, -1, -1, -1]], dtype=int32)
    """
    return semi_hard(*_distances(distances, labels, where))


@compiled()
def triplet_mask(
    labels: Integer[Array, " n"], *, where: Where | None = None
) -> Bool[Array, "n n n"]:
    """Which samples make a triplet of anchor, positive and negative; not a loss.

    For small batches: `batch_all_triplet_loss` needs no such array.

    Args:
        labels: One label for each sample, `(n,)`.
        where: True keeps a sample; a hidden one is in no triplet.

    Returns:
        Bools `(n, n, n)`.

    Reference:
        Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification,
        arXiv 2017.

    >>> jnp.argwhere(triplet_mask(jnp.array([0, 0, 1])))
    Array([[0, 1, 2],
           [1, 0, 2]], dtype=int32)
    """
    check_labels(np.size(labels), labels, where)
    return _triplets(*label_masks(unshard(jnp.asarray(labels)), _replicated(where)))


@compiled()
def pair_margin_mask(
    distances: Float[Array, "n n"],
    labels: Integer[Array, " n"],
    *,
    positive_margin: Number = 0.2,
    negative_margin: Number = 0.8,
    where: Where | None = None,
) -> tuple[Bool[Array, "n n"], Bool[Array, "n n"]]:
    """Positives farther than a margin, and negatives nearer than another; not a loss.

    Args:
        distances: Distance of every sample to every sample, `(n, n)`.
        labels: One label for each sample, `(n,)`.
        positive_margin: Distance above which positives are chosen.
        negative_margin: Distance below which negatives are chosen.
        where: True keeps a sample; a hidden one is in no pair.

    Returns:
        Two arrays of bools `(n, n)`: chosen positives, chosen negatives.

    Reference:
        Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR
        2006. Equals pytorch-metric-learning's `PairMarginMiner` on unit vectors.

    >>> distances = jnp.array([[0.0, 0.5, 0.7], [0.5, 0.0, 0.9], [0.7, 0.9, 0.0]])
    >>> positives, negatives = pair_margin_mask(distances, jnp.array([0, 0, 1]))
    >>> positives[0], negatives[0]
    (Array([False,  True, False], dtype=bool), Array([False, False,  True], dtype=bool))
    """
    distances, positives, negatives = _distances(distances, labels, where)
    low, high = numbers(distances, positive_margin=positive_margin, negative_margin=negative_margin)
    return positives & (distances > low), negatives & (distances < high)


@compiled()
def multi_similarity_mask(
    similarities: Float[Array, "n n"],
    labels: Integer[Array, " n"],
    *,
    epsilon: Number = 0.1,
    where: Where | None = None,
) -> tuple[Bool[Array, "n n"], Bool[Array, "n n"]]:
    r"""Pairs that are informative beside the other pairs of their sample; not a loss.

    A positive is chosen if $s_{ap} - \varepsilon < \max_n s_{an}$, a negative if
    $s_{an} + \varepsilon > \min_p s_{ap}$.

    Args:
        similarities: Similarity of every sample to every sample, `(n, n)`.
        labels: One label for each sample, `(n,)`.
        epsilon: Slack $\varepsilon$, in the unit of the similarities.
        where: True keeps a sample; a hidden one is in no pair.

    Returns:
        Two arrays of bools `(n, n)`: chosen positives, chosen negatives.

    Reference:
        Wang et al., Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning,
        CVPR 2019. Equals pytorch-metric-learning's `MultiSimilarityMiner` on unit vectors.

    >>> similarities = jnp.array([[1.0, 0.5, 0.45, 0.3], *[[0.0, 0.0, 0.0, 0.0]] * 3])
    >>> positives, negatives = multi_similarity_mask(similarities, jnp.array([0, 0, 1, 1]))
    >>> positives[0]  # 0.5 - 0.1 < 0.45
    Array([False,  True, False, False], dtype=bool)
    >>> negatives[0]  # 0.45 + 0.1 > 0.5, but 0.3 + 0.1 < 0.5
    Array([False, False,  True, False], dtype=bool)
    """
    similarities, positives, negatives = _distances(similarities, labels, where, "similarities")
    (epsilon,) = numbers(similarities, epsilon=epsilon)
    extreme = lambda find, mask, low: find(
        similarities, axis=1, keepdims=True, initial=low, where=mask
    )
    nearest = extreme(jnp.max, negatives, -jnp.inf)
    farthest = extreme(jnp.min, positives, jnp.inf)
    chosen = positives & (similarities - epsilon < nearest)
    return chosen, negatives & (similarities + epsilon > farthest)


@compiled()
def angular_triplet_mask(
    embeddings: Float[Array, "n features"],
    labels: Integer[Array, " n"],
    *,
    angle: Number = 0.349,
    where: Where | None = None,
) -> Bool[Array, "n n n"]:
    r"""Triplets in which the negative sees the positives under a wide angle; not a loss.

    Chosen where $\arctan \frac{|a - p|}{2 |n - c|} > \alpha$, with the middle $c$ of $a$ and $p$.

    Args:
        embeddings: Vectors `(n, features)`, usually of length 1.
        labels: One label for each vector, `(n,)`.
        angle: Angle $\alpha$ in radians; the default is 20 degrees.
        where: True keeps a sample; a hidden one is in no triplet.

    Returns:
        Bools `(n, n, n)` over anchor, positive and negative.

    Reference:
        Wang et al., Deep Metric Learning with Angular Loss, ICCV 2017. Equals
        pytorch-metric-learning's `AngularMiner`, whose angle is in degrees.

    >>> embeddings = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    >>> mask = angular_triplet_mask(embeddings, jnp.array([0, 0, 1, 2]), angle=0.7)
    >>> mask[0, 1]  # 45 degrees and 18 degrees
    Array([False, False,  True, False], dtype=bool)
    """
    check_float(embeddings=embeddings)
    if jnp.ndim(embeddings) != 2:
        raise ValueError(message("embeddings", "two axes", f"shape {jnp.shape(embeddings)}"))
    check_labels(len(embeddings), labels, where)
    (x,) = jax.lax.stop_gradient(mask(where, *widen(embeddings)))
    (angle,) = numbers(x, angle=angle)
    x, labels = unshard(x), unshard(jnp.asarray(labels))
    gram = similarities(x, x)
    sizes = jnp.diagonal(gram)
    apart = sizes[:, None] + sizes[None] - 2 * gram  # |a - p|^2
    middle = (sizes[:, None] + sizes[None] + 2 * gram) / 4  # |c|^2
    onto = (gram[:, None, :] + gram[None, :, :]) / 2  # c n
    away = middle[:, :, None] + sizes[None, None] - 2 * onto  # |n - c|^2
    wide = apart[:, :, None] > 4 * jnp.tan(angle) ** 2 * away
    return wide & _triplets(*label_masks(labels, _replicated(where)))


@compiled("features")
def distance_weighted_sample(
    distances: Float[Array, "n n"],
    labels: Integer[Array, " n"],
    *,
    key: Array,
    features: int,
    cutoff: Number = 0.5,
    nonzero_cutoff: Number = 1.4,
    where: Where | None = None,
) -> Integer[Array, " n"]:
    r"""A random negative for each sample, of any distance alike; not a loss.

    $$ P(n \mid a) \propto \frac{1}{q(\max(d_{an}, d_0))}, \quad
       q(d) = d^{D - 2} \left(1 - \tfrac14 d^2\right)^{(D - 3) / 2} $$

    among the negatives with $d_{an} < d_1$: $q$ is the density of the distance of random points on
    the unit sphere. Other distances than Euclidean ones of unit vectors make no sense here.

    Args:
        distances: Distance of every sample to every sample, `(n, n)`, in `[0, 2]`.
        labels: One label for each sample, `(n,)`.
        key: A key of `jax.random`; map over several keys for several negatives.
        features: Dimension $D$ of the vectors.
        cutoff: Distance $d_0$ below which all negatives weigh the same.
        nonzero_cutoff: Distance $d_1$ from which no negative is chosen.
        where: True keeps a sample; a hidden one gets no negative and is none.

    Returns:
        Integers `(n,)`; -1 for a sample without a negative nearer than `nonzero_cutoff`.

    Reference:
        Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017.
        pytorch-metric-learning's `DistanceWeightedMiner` draws from the same distribution.

    >>> distances = jnp.array([[0.0, 1.0, 1.5], [1.0, 0.0, 1.5], [1.5, 1.5, 0.0]])
    >>> key = jax.random.key(0)
    >>> distance_weighted_sample(distances, jnp.array([0, 1, 1]), key=key, features=8)
    Array([ 1,  0, -1], dtype=int32)
    """
    distances, _, negatives = _distances(distances, labels, where)
    if isinstance(features, bool) or not isinstance(features, (int, np.integer)) or features < 2:
        raise ValueError(message("features", "an integer of at least 2", repr(features)))
    low, high = numbers(distances, cutoff=cutoff, nonzero_cutoff=nonzero_cutoff)
    require(lambda: (distances >= 0) & (distances <= 2.001), "distances", "values in [0, 2]")
    allowed = negatives & (distances < high) & (distances < 2)
    d = jnp.where(allowed, jnp.maximum(distances, low), 1)
    log_density = (features - 2) * jnp.log(d) + (features - 3) / 2 * jnp.log1p(-jnp.square(d) / 4)
    noise = jax.random.gumbel(key, d.shape, d.dtype)
    return hardest(noise - log_density, allowed, allowed)[0]


def _distances(
    distances: Array, labels: Any, where: Where | None, name: str = "distances"
) -> tuple[Array, Array, Array]:
    """Checked, without a gradient, with the masks of positives and negatives."""
    check_float(**{name: distances})
    count = np.size(labels)
    check_shape((count, count), **{name: distances})
    check_labels(count, labels, where)
    (distances,) = widen(distances)
    masks = label_masks(unshard(jnp.asarray(labels)), _replicated(where))
    return unshard(jax.lax.stop_gradient(distances)), *masks


def _replicated(where: Where | None) -> Array | None:
    return None if where is None else unshard(jnp.asarray(where))


def _triplets(positives: Array, negatives: Array) -> Array:
    return positives[:, :, None] & negatives[:, None, :]


CASES = ()
