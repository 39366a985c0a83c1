"""Pairs, triplets, miners and rankings against torch, optax and pytorch-metric-learning."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss import nonzero_mean
from jaxloss._core.numerics import unit_vectors
from jaxloss._core.pairwise import negative_mask, pairwise_distance, positive_mask
from jaxloss.losses.average_precision import (
    fast_ap_loss,
    histogram_loss,
    ranked_list_loss,
    smooth_ap_loss,
)
from jaxloss.losses.mining import (
    angular_triplet_mask,
    hard_negative_index,
    hard_positive_index,
    multi_similarity_mask,
    pair_margin_mask,
    triplet_mask,
)
from jaxloss.losses.pair_distances import (
    hinge_embedding_loss,
    soft_triplet_loss,
    triplet_margin_loss,
    unsquared_contrastive_loss,
)
from jaxloss.losses.triplets import (
    batch_all_triplet_loss,
    batch_hard_triplet_loss,
    batch_semi_hard_triplet_loss,
)
from jaxloss.testing import Draw, draw_normal, draw_signs, draw_uniform
from parity.peers import Row, check, peer

TORCH, OPTAX, PML = "torch.nn.functional", "optax.losses", "pytorch_metric_learning"
NAMES = ("anchor", "positive", "negative")
TRIPLETS = {name: draw_normal("B D") for name in NAMES}
GROUPS = Draw("B", lambda _, shape, sizes: np.arange(shape[0]) * 5 % sizes["C"], "fixed")
BATCH = dict(embeddings=draw_normal("B D"), labels=GROUPS)
SIZES = ({"C": 3}, {"B": 5, "C": 2}, {"B": 20, "C": 4, "D": 16})
SORTED = Draw("B", lambda _, shape, __: np.arange(shape[0]) // math.isqrt(shape[0]), "fixed")
SQUARES = ({"B": 9}, {"B": 4}, {"B": 25, "D": 16})


def of_torch(label: str = "", note: str = "", **options: Any) -> Row:
    return Row(
        loss="triplet_margin_loss",
        peer=f"{TORCH}.triplet_margin_loss",
        ours=partial(triplet_margin_loss, **options),
        theirs=partial(peer(f"{TORCH}.triplet_margin_loss"), **options),
        draws=TRIPLETS,
        differentiate=NAMES,
        label=label,
        note=note,
    )


def manhattan(x: Any, y: Any) -> Any:
    return abs(x - y).sum(-1)


def root_of_sum_and_eps(x: Any, y: Any) -> Any:
    return jnp.sqrt(jnp.sum((x - y) ** 2, axis=-1) + 1e-3)


def optax_triplets(anchor: Any, positive: Any, negative: Any) -> Any:
    return peer(f"{OPTAX}.triplet_margin_loss")(anchor, positive, negative, margin=2.0, eps=1e-3)


def of_batch(
    loss: str,
    name: str,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    *,
    differentiate: tuple[str, ...] = ("embeddings",),
    draws: dict[str, Draw] = BATCH,
    sizes: tuple[dict[str, int], ...] = SIZES,
    **options: Any,
) -> Row:
    return Row(
        loss=loss,
        peer=f"{PML}.{name}",
        ours=ours,
        theirs=theirs,
        draws=draws,
        differentiate=differentiate,
        sizes=sizes,
        **options,
    )


def unit_rows(loss: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda embeddings, labels: loss(unit_vectors(embeddings), labels, **options)


def triplets(miner: str | None = None, **options: Any) -> Callable[..., Any]:
    """Its triplet loss over all triplets, or those of one of its miners."""

    def call(embeddings: Any, labels: Any) -> Any:
        mined = miner and peer(f"{PML}.miners.{miner}")()(embeddings, labels)
        return peer(f"{PML}.losses.TripletMarginLoss")(**options)(embeddings, labels, mined)

    return call


def both_kinds_of_pairs(embeddings: Any, labels: Any) -> Any:
    rows = unit_vectors(embeddings)
    distances, same = pairwise_distance(rows, rows), labels[:, None] == labels[None]
    options = dict(margin=1.2, positive_margin=0.5, reduction=nonzero_mean)
    return sum(
        unsquared_contrastive_loss(distances, same, where=mask, **options)
        for mask in (positive_mask(labels), negative_mask(labels))
    )


def farther_partners(embeddings: Any, labels: Any) -> Any:
    """Sum over pairs with a negative that is farther: only these cost less than the margin."""
    return batch_semi_hard_triplet_loss(
        unit_vectors(embeddings),
        labels,
        margin=0.3,
        reduction=lambda values, _: jnp.sum(jnp.where(values < 0.3, values, 0)),
    )


def nearest_of_the_semi_hard(embeddings: Any, labels: Any) -> Any:
    """The sum over pairs of the largest loss among its semi-hard triplets."""
    mined = peer(f"{PML}.miners.TripletMarginMiner")(margin=0.3, type_of_triplets="semihard")
    a, p, n = mined(embeddings, labels)
    distances = peer(f"{PML}.distances.LpDistance")()(embeddings)
    values = embeddings.new_zeros(distances.shape)
    for i, j, k in zip(a.tolist(), p.tolist(), n.tolist(), strict=True):
        cost = distances[i, j] - distances[i, k] + 0.3
        if cost > values[i, j]:
            values[i, j] = cost
    return values.sum()


def soft_of_given(anchor: Any, positive: Any, negative: Any) -> Any:
    import torch

    count = len(anchor)
    rows = torch.cat([anchor, positive, negative])
    index = tuple(torch.arange(count) + k * count for k in range(3))
    loss = peer(f"{PML}.losses.TripletMarginLoss")(margin=0, smooth_loss=True)
    return loss(rows, None, index)


def pairs_of(name: str, **options: Any) -> Callable[..., Any]:
    """Positives and negatives that its miner chooses, as two masks."""

    def call(embeddings: Any, labels: Any) -> Any:
        a, p, b, n = peer(f"{PML}.miners.{name}")(**options)(embeddings, labels)
        masks = embeddings.new_zeros((2, len(labels), len(labels)))
        masks[0, a, p] = 1
        masks[1, b, n] = 1
        return masks

    return call


def triplets_of(name: str, **options: Any) -> Callable[..., Any]:
    def call(embeddings: Any, labels: Any) -> Any:
        found = peer(f"{PML}.miners.{name}")(**options)(embeddings, labels)
        mask = embeddings.new_zeros((len(labels),) * 3)
        mask[found] = 1
        return mask

    return call


def hardest_indices(embeddings: Any, labels: Any) -> Any:
    rows = unit_vectors(embeddings)
    distances = pairwise_distance(rows, rows)
    index = (hard_positive_index(distances, labels), hard_negative_index(distances, labels))
    return jnp.stack(index).astype(float)


def indices_of_batch_hard(embeddings: Any, labels: Any) -> Any:
    import torch

    a, p, n = peer(f"{PML}.miners.BatchHardMiner")()(embeddings, labels)
    found = torch.full((2, len(labels)), -1)
    found[0, a], found[1, a] = p, n
    return found


def masks_of_distances(embeddings: Any, labels: Any) -> Any:
    rows = unit_vectors(embeddings)
    distances = pairwise_distance(rows, rows)
    options = dict(positive_margin=1.2, negative_margin=1.4)
    return jnp.stack(pair_margin_mask(distances, labels, **options)).astype(float)


def masks_of_cosines(embeddings: Any, labels: Any) -> Any:
    rows = unit_vectors(embeddings)
    masks = multi_similarity_mask(rows @ rows.T, labels, epsilon=0.2)
    return jnp.stack(masks).astype(float)


def plain(name: str, **options: Any) -> Callable[..., Any]:
    def call(embeddings: Any, labels: Any) -> Any:
        with warnings.catch_warnings():  # HistogramLoss indexes with lists
            warnings.simplefilter("ignore", UserWarning)
            return peer(f"{PML}.losses.{name}")(**options)(embeddings, labels)

    return call


NORMALISED = "normalises unless its distance is told not to"
ABOVE_ZERO = f"{NORMALISED}; a mean over losses above 0: `nonzero_mean`"
CHOSEN = "returns tuples of indices"

ROWS = (
    of_torch(),
    of_torch("absolute", p=1, margin=3.0, eps=0.01),
    of_torch("cubic", p=3, margin=3.0, eps=0.01),
    of_torch("largest", p=math.inf, margin=3.0),
    of_torch("swap", swap=True, margin=2.0),
    Row(
        loss="triplet_margin_loss",
        peer=f"{TORCH}.triplet_margin_with_distance_loss",
        ours=partial(triplet_margin_loss, distance=manhattan, swap=True, margin=2.0),
        theirs=lambda anchor, positive, negative: peer(
            f"{TORCH}.triplet_margin_with_distance_loss"
        )(anchor, positive, negative, distance_function=manhattan, swap=True, margin=2.0),
        draws=TRIPLETS,
        differentiate=NAMES,
        note="its `distance_function` is `distance`",
    ),
    Row(
        loss="triplet_margin_loss",
        peer=f"{OPTAX}.triplet_margin_loss",
        ours=lambda **x: triplet_margin_loss(
            **x, distance=root_of_sum_and_eps, margin=2.0, reduction="none"
        ),
        theirs=optax_triplets,
        draws=TRIPLETS,
        differentiate=NAMES,
        note="adds eps under the root; wrong for odd powers",
    ),
    Row(
        loss="hinge_embedding_loss",
        peer=f"{TORCH}.hinge_embedding_loss",
        ours=partial(hinge_embedding_loss, margin=0.8),
        theirs=lambda distances, labels: peer(f"{TORCH}.hinge_embedding_loss")(
            distances, labels, margin=0.8
        ),
        draws=dict(distances=draw_uniform("B C", 0, 2), labels=draw_signs("B C")),
        differentiate=("distances",),
    ),
    Row(
        loss="soft_triplet_loss",
        peer=f"{PML}.losses.TripletMarginLoss",
        ours=lambda **x: soft_triplet_loss(**{k: unit_vectors(v) for k, v in x.items()}, eps=0.0),
        theirs=soft_of_given,
        draws=TRIPLETS,
        differentiate=NAMES,
        sizes=({}, {"B": 2, "D": 3}, {"B": 8, "D": 16}),
        note=f"{NORMALISED}; `margin=0, smooth_loss=True`",
    ),
    of_batch(
        "unsquared_contrastive_loss",
        "losses.ContrastiveLoss",
        both_kinds_of_pairs,
        plain("ContrastiveLoss", pos_margin=0.5, neg_margin=1.2),
        note=f"{NORMALISED}; adds the means of positives and negatives above 0",
    ),
    of_batch(
        "batch_all_triplet_loss",
        "losses.TripletMarginLoss",
        unit_rows(batch_all_triplet_loss, margin=0.3),
        triplets(margin=0.3),
        note=NORMALISED,
    ),
    of_batch(
        "batch_all_triplet_loss",
        "losses.TripletMarginLoss",
        unit_rows(batch_all_triplet_loss, margin=0.3, soft=True),
        triplets(margin=0.3, smooth_loss=True),
        note=NORMALISED,
        label="soft",
    ),
    of_batch(
        "batch_hard_triplet_loss",
        "losses.TripletMarginLoss",
        unit_rows(batch_hard_triplet_loss, margin=0.3, reduction=nonzero_mean),
        triplets("BatchHardMiner", margin=0.3),
        note=f"after BatchHardMiner; {ABOVE_ZERO}",
    ),
    of_batch(
        "batch_hard_triplet_loss",
        "losses.TripletMarginLoss",
        unit_rows(batch_hard_triplet_loss, margin=0.3, soft=True),
        triplets("BatchHardMiner", margin=0.3, smooth_loss=True),
        note=f"after BatchHardMiner; {NORMALISED}",
        label="soft",
    ),
    of_batch(
        "batch_semi_hard_triplet_loss",
        "miners.TripletMarginMiner",
        farther_partners,
        nearest_of_the_semi_hard,
        note="the nearest of its semi-hard negatives; no farthest one where there are none",
    ),
    of_batch(
        "hard_positive_index",
        "miners.BatchHardMiner",
        hardest_indices,
        indices_of_batch_hard,
        differentiate=(),
        note=f"{CHOSEN}, with those of `hard_negative_index`",
    ),
    of_batch(
        "pair_margin_mask",
        "miners.PairMarginMiner",
        masks_of_distances,
        pairs_of("PairMarginMiner", pos_margin=1.2, neg_margin=1.4),
        differentiate=(),
        note=f"{CHOSEN}; {NORMALISED}",
    ),
    of_batch(
        "multi_similarity_mask",
        "miners.MultiSimilarityMiner",
        masks_of_cosines,
        pairs_of("MultiSimilarityMiner", epsilon=0.2),
        differentiate=(),
        note=f"{CHOSEN}; {NORMALISED}",
    ),
    of_batch(
        "angular_triplet_mask",
        "miners.AngularMiner",
        lambda embeddings, labels: angular_triplet_mask(embeddings, labels, angle=0.6).astype(
            float
        ),
        triplets_of("AngularMiner", angle=math.degrees(0.6)),
        differentiate=(),
        note=f"{CHOSEN}; degrees",
    ),
    of_batch(
        "triplet_mask",
        "miners.TripletMarginMiner",
        lambda embeddings, labels: triplet_mask(labels).astype(float),
        triplets_of("TripletMarginMiner", margin=100, type_of_triplets="all"),
        differentiate=(),
        note=f"{CHOSEN}; with a margin that all triplets violate",
    ),
    of_batch(
        "smooth_ap_loss",
        "losses.SmoothAPLoss",
        partial(smooth_ap_loss, temperature=0.1),
        plain("SmoothAPLoss", temperature=0.1),
        draws={**BATCH, "labels": SORTED},
        sizes=SQUARES,
        note="as many classes as samples of each, in order; averages in float32",
        tolerance={"float64": 1e-7},
    ),
    of_batch(
        "fast_ap_loss",
        "losses.FastAPLoss",
        partial(fast_ap_loss, num_bins=6),
        plain("FastAPLoss", num_bins=6),
    ),
    of_batch(
        "histogram_loss",
        "losses.HistogramLoss",
        partial(histogram_loss, num_bins=20),
        plain("HistogramLoss", n_bins=20),
        note="num_bins is `n_bins`; places its bins in float32",
        tolerance={"float64": 1e-5},
    ),
    of_batch(
        "ranked_list_loss",
        "losses.RankedListLoss",
        partial(
            ranked_list_loss,
            margin=0.5,
            alpha=1.3,
            positive_temperature=0.5,
            negative_temperature=3.0,
            imbalance=0.4,
        ),
        plain("RankedListLoss", margin=0.5, alpha=1.3, Tp=0.5, Tn=3, imbalance=0.4),
        note="adds 1e-5 to every weight; temperatures are `Tp`, `Tn`",
        tolerance={"float32": 1e-4, "float64": 1e-4},
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
