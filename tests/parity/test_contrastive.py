"""Contrastive losses against optax, torch and pytorch-metric-learning."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses.contrastive import clip_loss, info_nce, nt_xent, siglip_loss, sup_con_loss
from jaxloss.losses.contrastive_variants import n_pair_loss
from jaxloss.testing import Draw, draw_labels, draw_normal
from parity.peers import Row, check, peer

CE = "torch.nn.functional.cross_entropy"
BCE = "torch.nn.functional.binary_cross_entropy_with_logits"
PML = "pytorch_metric_learning.losses."
cross_entropy, binary = peer(CE), peer(BCE)
normalized, arange = peer("torch.nn.functional.normalize"), peer("torch.arange")
eye, cat, einsum = peer("torch.eye"), peer("torch.cat"), peer("torch.einsum")
dot_product = peer("pytorch_metric_learning.distances.DotProductSimilarity")

PAIRS = dict(query=draw_normal("B D"), keys=draw_normal("B D"))
QUEUE = dict(PAIRS, negatives=draw_normal("V D"))
OWN = dict(PAIRS, negatives=draw_normal("B V D"))
LABELLED = dict(embeddings=draw_normal("B D"), labels=draw_labels("B"))
TWO_VIEWS = dict(
    embeddings=draw_normal("B D"),
    labels=Draw("B", lambda _, shape, __: np.tile(np.arange(shape[0] // 2), 2), "fixed"),
)
EVEN = ({}, {"B": 2}, {"B": 32, "D": 9})
BATCHES = ({}, {"B": 33, "D": 9})
BY_HAND = "of logits made by hand from unit rows"
BY_PAIRS = "averages over pairs: weights=number of positives, here 1 each"
SMALL = "adds the smallest normal number inside the logarithm"


def ce(z: Any) -> Any:
    return cross_entropy(z, arange(z.shape[0]))


def cosines(query: Any, keys: Any) -> Any:
    return normalized(query) @ normalized(keys).T


def with_queue(query: Any, keys: Any, negatives: Any) -> Any:
    """MoCo: the positive is class 0."""
    own = einsum("nd,nd->n", normalized(query), normalized(keys))[:, None]
    z = cat([own, cosines(query, negatives)], dim=1) / 0.2
    return cross_entropy(z, 0 * arange(z.shape[0]))


def with_own(query: Any, keys: Any, negatives: Any) -> Any:
    both = cat([keys[:, None], negatives], dim=1)
    z = einsum("nd,nkd->nk", query, both) / 2
    return cross_entropy(z, 0 * arange(z.shape[0]))


def clip(query: Any, keys: Any) -> Any:
    z = 5 * cosines(query, keys)
    return (ce(z) + ce(z.T)) / 2


def siglip(query: Any, keys: Any) -> Any:
    z = 4 * cosines(query, keys) - 3
    return binary(z, eye(z.shape[0], dtype=z.dtype), reduction="sum") / z.shape[0]


def n_pair(query: Any, keys: Any) -> Any:
    size = (query**2).sum(1) + (keys**2).sum(1)
    return ce(query @ keys.T) + 0.3 / 4 * size.mean()


def positives(labels: Any) -> Any:
    return jnp.sum(labels[:, None] == labels[None], axis=1) - 1


def row(loss: str, peer: str, ours: Any, theirs: Any, draws: Any, note: str, **more: Any) -> Row:
    """A row that also compares the gradients of all its rows."""
    moving = tuple(name for name in draws if name != "labels")
    return Row(loss, peer, ours, theirs, draws, note, moving, **more)


ROWS = (
    *(
        row(
            "info_nce",
            CE,
            lambda query, keys, s=size: info_nce(query, keys, temperature=0.2, chunk_size=s),
            lambda query, keys: ce(cosines(query, keys) / 0.2),
            PAIRS,
            BY_HAND,
            label="" if size is None else "chunked",
        )
        for size in (None, 3)
    ),
    row(
        "info_nce",
        CE,
        lambda query, keys: info_nce(query, keys, temperature=0.7, normalize=False),
        lambda query, keys: ce(query @ keys.T / 0.7),
        PAIRS,
        "of products divided by the temperature",
        label="products",
    ),
    row(
        "info_nce",
        CE,
        lambda query, keys, negatives: info_nce(
            query, keys, negative_keys=negatives, temperature=0.2
        ),
        with_queue,
        QUEUE,
        "of logits made by hand, as MoCo does",
        label="queue",
    ),
    row(
        "info_nce",
        CE,
        lambda query, keys, negatives: info_nce(
            query, keys, negative_keys=negatives, temperature=2.0, normalize=False
        ),
        with_own,
        OWN,
        "of products made by hand",
        label="own negatives",
    ),
    *(
        row(
            "clip_loss",
            CE,
            lambda query, keys, s=size: clip_loss(query, keys, logit_scale=5.0, chunk_size=s),
            clip,
            PAIRS,
            "mean of both ways, " + BY_HAND,
            label="" if size is None else "chunked",
        )
        for size in (None, 3)
    ),
    *(
        row(
            "siglip_loss",
            BCE,
            lambda query, keys, s=size: siglip_loss(
                query, keys, logit_scale=4.0, logit_bias=-3.0, chunk_size=s
            ),
            siglip,
            PAIRS,
            "summed and divided by n, " + BY_HAND,
            label="" if size is None else "chunked",
        )
        for size in (None, 3)
    ),
    row(
        "n_pair_loss",
        CE,
        lambda query, keys: n_pair_loss(query, keys, l2_weight=0.3),
        n_pair,
        PAIRS,
        "of products made by hand",
    ),
    row(
        "n_pair_loss",
        PML + "NPairsLoss",
        lambda embeddings: n_pair_loss(*jnp.split(embeddings, 2)),
        lambda embeddings: peer(PML + "NPairsLoss")(
            distance=dot_product(normalize_embeddings=False)
        )(embeddings, arange(embeddings.shape[0]) % (embeddings.shape[0] // 2)),
        dict(embeddings=TWO_VIEWS["embeddings"]),
        "without normalising; one pair for each label",
        sizes=EVEN,
    ),
    row(
        "nt_xent",
        "optax.losses.ntxent",
        lambda embeddings, labels: nt_xent(embeddings, labels),
        peer("optax.losses.ntxent"),
        TWO_VIEWS,
        BY_PAIRS,
        sizes=EVEN,
    ),
    row(
        "nt_xent",
        "optax.losses.ntxent",
        lambda embeddings, labels: nt_xent(
            embeddings, labels, temperature=0.3, weights=positives(labels), chunk_size=5
        ),
        lambda embeddings, labels: peer("optax.losses.ntxent")(embeddings, labels, 0.3),
        LABELLED,
        "classes of any size: weights=number of positives",
        label="any classes, chunked",
        sizes=BATCHES,
    ),
    row(
        "nt_xent",
        PML + "NTXentLoss",
        lambda embeddings, labels: nt_xent(
            embeddings, labels, temperature=0.3, weights=positives(labels)
        ),
        lambda embeddings, labels: peer(PML + "NTXentLoss")(temperature=0.3)(embeddings, labels),
        LABELLED,
        "averages over pairs: weights=number of positives; " + SMALL,
        sizes=BATCHES,
    ),
    *(
        row(
            "sup_con_loss",
            PML + "SupConLoss",
            lambda embeddings, labels, s=size: sup_con_loss(
                embeddings, labels, temperature=0.2, chunk_size=s
            ),
            lambda embeddings, labels: peer(PML + "SupConLoss")(temperature=0.2)(
                embeddings, labels
            ),
            TWO_VIEWS,
            "leaves units of exactly 0 out of the mean; 0 for a batch without negatives",
            label="" if size is None else "chunked",
            sizes=({}, {"B": 32, "D": 9}),
        )
        for size in (None, 5)
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_value_and_gradient_agree(row: Row) -> None:
    check(row)
