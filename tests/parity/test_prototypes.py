"""Margin softmaxes, proxies and losses of all pairs against pytorch-metric-learning and Keras."""

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss import nonzero_mean
from jaxloss._core.pairwise import negative_mask, positive_mask
from jaxloss.losses.metric_learning import (
    angular_loss,
    circle_loss,
    multi_similarity_loss,
    threshold_consistent_margin_loss,
    tuplet_margin_loss,
)
from jaxloss.losses.metric_learning_distances import (
    generalized_lifted_structure_loss,
    lifted_structure_loss,
    margin_loss,
    nca_loss,
)
from jaxloss.losses.prototypes import (
    arcface_loss,
    cosface_loss,
    normalized_softmax_loss,
    p2s_grad_loss,
    sphereface_loss,
    subcenter_arcface_loss,
)
from jaxloss.losses.proxies import proxy_anchor_loss, proxy_nca_loss, soft_triple_loss
from jaxloss.testing import Draw, draw_labels, draw_normal
from parity.peers import Row, check, peer

PML = "pytorch_metric_learning"
PROTOTYPES = dict(
    embeddings=draw_normal("B D"), prototypes=draw_normal("C D"), labels=draw_labels("B")
)
CENTERS = {**PROTOTYPES, "prototypes": draw_normal("C K D")}
COUNTS = ({"K": 3}, {"B": 1, "C": 2, "K": 2}, {"B": 33, "C": 7, "D": 16, "K": 3})
GROUPS = Draw("B", lambda _, shape, sizes: np.arange(shape[0]) * 5 % sizes["C"], "fixed")
PAIRS = dict(embeddings=draw_normal("B D"), labels=GROUPS)
BATCHES = ({"C": 3}, {"B": 5, "C": 2}, {"B": 20, "C": 4, "D": 16})


def unit_rows(generator: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
    x = generator.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pml(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{PML}.{module}"), name)


def with_prototypes(name: str, parameter: str, *, last: bool, **options: Any) -> Callable[..., Any]:
    """The peer with `prototypes` in place of its parameter, which has the classes last or first."""

    def call(embeddings: Any, prototypes: Any, labels: Any) -> Any:
        import torch

        flat = prototypes.reshape(-1, prototypes.shape[-1])
        sizes = dict(num_classes=len(prototypes), embedding_size=flat.shape[1])
        if name == "P2SGradLoss":
            sizes = dict(num_classes=len(prototypes), descriptors_dim=flat.shape[1])
        if name == "SubCenterArcFaceLoss":
            sizes["sub_centers"] = prototypes.shape[1]
        if name == "SoftTripleLoss":
            sizes["centers_per_class"] = prototypes.shape[1]
        with warnings.catch_warnings():  # SphereFace gives SciPy torch's integers
            warnings.simplefilter("ignore", DeprecationWarning)
            loss = pml("losses", name)(**sizes, **options)
        return torch.func.functional_call(
            loss, {parameter: flat.T if last else flat}, (embeddings, labels)
        )

    return call


def of_pairs(name: str, **options: Any) -> Callable[..., Any]:
    """The peer's mean over all its units, those of loss 0 too."""

    def call(embeddings: Any, labels: Any) -> Any:
        return pml("losses", name)(reducer=pml("reducers", "MeanReducer")(), **options)(
            embeddings, labels
        )

    return call


def of_distances(name: str, *, power: int = 1, **options: Any) -> Callable[..., Any]:
    def call(embeddings: Any, labels: Any) -> Any:
        plain = pml("distances", "LpDistance")(normalize_embeddings=False, power=power)
        return of_pairs(name, distance=plain, **options)(embeddings, labels)

    return call


def angular(embeddings: Any, labels: Any) -> Any:
    import torch

    unit = torch.nn.functional.normalize(embeddings)
    return of_pairs("AngularLoss", alpha=math.degrees(0.6))(unit, labels)


def mined(embeddings: Any, labels: Any) -> Any:
    pairs = pml("miners", "MultiSimilarityMiner")(epsilon=0.2)(embeddings, labels)
    return pml("losses", "MultiSimilarityLoss")(beta=10)(embeddings, labels, pairs)


def over_triplets(embeddings: Any, labels: Any) -> Any:
    """The mean over triplets: each pair as often as it stands in one."""
    positive, negative = positive_mask(labels), negative_mask(labels)
    count = lambda mask: jnp.sum(mask, axis=1, keepdims=True).astype(embeddings.dtype)
    weights = jnp.where(positive, count(negative), count(positive))
    return margin_loss(
        embeddings, labels, margin=0.5, beta=2.5, weights=weights, reduction=nonzero_mean
    )


def margin_of_triplets(embeddings: Any, labels: Any) -> Any:
    plain = pml("distances", "LpDistance")(normalize_embeddings=False)
    return pml("losses", "MarginLoss")(margin=0.5, beta=2.5, distance=plain)(embeddings, labels)


def of_prototypes(
    name: str,
    loss: Callable[..., Any],
    options: dict[str, Any],
    theirs: dict[str, Any],
    *,
    parameter: str = "W",
    last: bool = True,
    note: str = "",
    label: str = "",
    differentiate: tuple[str, ...] = ("embeddings", "prototypes"),
    tolerance: dict[str, float] | None = None,
) -> Row:
    centers = loss in (subcenter_arcface_loss, soft_triple_loss)
    return Row(
        loss=loss.__name__,
        peer=f"{PML}.losses.{name}",
        ours=lambda embeddings, prototypes, labels: loss(embeddings, prototypes, labels, **options),
        theirs=with_prototypes(name, parameter, last=last, **theirs),
        draws=CENTERS if centers else PROTOTYPES,
        note=note,
        label=label,
        differentiate=differentiate,
        tolerance=tolerance,
        sizes=COUNTS,
    )


def of_batch(
    name: str,
    loss: Callable[..., Any],
    options: dict[str, Any],
    theirs: Callable[..., Any],
    *,
    ours: Callable[..., Any] | None = None,
    note: str = "",
    label: str = "",
) -> Row:
    return Row(
        loss=loss.__name__,
        peer=f"{PML}.losses.{name}",
        ours=ours or (lambda embeddings, labels: loss(embeddings, labels, **options)),
        theirs=theirs,
        draws=PAIRS,
        note=note,
        label=label,
        differentiate=("embeddings",),
        sizes=BATCHES,
    )


DEGREES = "its margin is in degrees; NaN gradient at equal vectors"
NORMALISED = "normalises unless its distance is told not to"
HINGES = dict(negative_margin=3.0, positive_margin=0.5)

ROWS = (
    of_prototypes(
        "ArcFaceLoss",
        arcface_loss,
        dict(margin=0.5, scale=10.0),
        dict(margin=math.degrees(0.5), scale=10),
        note=DEGREES,
    ),
    of_prototypes(
        "ArcFaceLoss",
        arcface_loss,
        dict(margin=1.5, scale=64.0),
        dict(margin=math.degrees(1.5), scale=64),
        label="past pi",
        note=DEGREES,
    ),
    of_prototypes(
        "SubCenterArcFaceLoss",
        subcenter_arcface_loss,
        dict(margin=0.5, scale=10.0),
        dict(margin=math.degrees(0.5), scale=10),
        note=DEGREES,
    ),
    of_prototypes(
        "CosFaceLoss", cosface_loss, dict(margin=0.3, scale=10.0), dict(margin=0.3, scale=10)
    ),
    of_prototypes("SphereFaceLoss", sphereface_loss, {}, {}),
    of_prototypes(
        "SphereFaceLoss",
        sphereface_loss,
        dict(margin=3, scale=0.5),
        dict(margin=3, scale=0.5),
        label="odd margin",
    ),
    of_prototypes(
        "NormalizedSoftmaxLoss",
        normalized_softmax_loss,
        dict(temperature=0.2),
        dict(temperature=0.2),
    ),
    of_prototypes(
        "P2SGradLoss",
        p2s_grad_loss,
        {},
        {},
        parameter="weight",
        differentiate=("embeddings",),
        note="overwrites its prototypes with rows of norm 1 to 7 digits, which has no gradient",
        tolerance={"float64": 2e-7},
    ),
    of_prototypes(
        "SoftTripleLoss",
        soft_triple_loss,
        dict(scale=10.0, gamma=0.2, margin=0.05),
        dict(la=10, gamma=0.2, margin=0.05),
        parameter="fc",
        note="scale is `la`",
    ),
    of_prototypes(
        "ProxyNCALoss",
        proxy_nca_loss,
        dict(scale=3.0),
        dict(softmax_scale=3),
        parameter="proxies",
        last=False,
        note="scale is `softmax_scale`",
    ),
    of_prototypes(
        "ProxyAnchorLoss",
        proxy_anchor_loss,
        dict(margin=0.2, alpha=8.0),
        dict(margin=0.2, alpha=8),
        parameter="proxies",
        last=False,
    ),
    of_batch(
        "CircleLoss",
        circle_loss,
        dict(margin=0.3, gamma=10.0),
        of_pairs("CircleLoss", m=0.3, gamma=10),
        note="averages over losses above 0",
    ),
    of_batch(
        "MultiSimilarityLoss",
        multi_similarity_loss,
        dict(alpha=3.0, beta=10.0, base=0.4),
        of_pairs("MultiSimilarityLoss", alpha=3, beta=10, base=0.4),
    ),
    of_batch(
        "MultiSimilarityLoss",
        multi_similarity_loss,
        dict(beta=10.0, mining_epsilon=0.2),
        mined,
        label="mined",
        note="`mining_epsilon` is its MultiSimilarityMiner",
    ),
    of_batch(
        "LiftedStructureLoss",
        lifted_structure_loss,
        HINGES,
        of_distances("LiftedStructureLoss", neg_margin=3, pos_margin=0.5),
        note=NORMALISED,
    ),
    of_batch(
        "GeneralizedLiftedStructureLoss",
        generalized_lifted_structure_loss,
        HINGES,
        of_distances("GeneralizedLiftedStructureLoss", neg_margin=3, pos_margin=0.5),
        note=f"{NORMALISED}; counts samples without positives",
    ),
    of_batch(
        "AngularLoss",
        angular_loss,
        dict(alpha=0.6),
        angular,
        note="degrees; leaves the negatives as they are, so it is given unit rows",
    ),
    of_batch(
        "MarginLoss",
        margin_loss,
        {},
        margin_of_triplets,
        ours=over_triplets,
        note=f"{NORMALISED}; a mean over triplets: weights for pairs, and `nonzero_mean`",
    ),
    of_batch(
        "TupletMarginLoss",
        tuplet_margin_loss,
        dict(margin=0.2, scale=10.0),
        of_pairs("TupletMarginLoss", margin=math.degrees(0.2), scale=10),
        note=DEGREES,
    ),
    of_batch(
        "NCALoss",
        nca_loss,
        dict(scale=0.3),
        of_distances("NCALoss", power=2, softmax_scale=0.3),
        note=NORMALISED,
    ),
    of_batch(
        "ThresholdConsistentMarginLoss",
        threshold_consistent_margin_loss,
        dict(positive_margin=0.8, negative_margin=0.1, positive_weight=2.0, negative_weight=0.5),
        of_pairs(
            "ThresholdConsistentMarginLoss",
            margin_plus=0.8,
            margin_minus=0.1,
            lambda_plus=2,
            lambda_minus=0.5,
        ),
    ),
    Row(
        loss="circle_loss",
        peer="keras.losses.circle",
        ours=lambda embeddings, labels: circle_loss(
            embeddings, labels, margin=0.3, gamma=10.0, reduction="none"
        ),
        theirs=lambda embeddings, labels: peer("keras.losses.circle")(
            labels, embeddings, gamma=10, margin=0.3
        ),
        draws=dict(embeddings=Draw("B D", unit_rows), labels=GROUPS),
        note="takes (true, pred); needs unit rows, and lets the weights have a gradient",
        sizes=BATCHES,
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
