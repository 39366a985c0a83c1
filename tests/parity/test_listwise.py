"""Listwise and smooth ranking losses against rax, optax and scikit-learn."""

from functools import partial
from pkgutil import resolve_name
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses.ranking_listwise import (
    gumbel_samples,
    list_mle_loss,
    normalize_relevance,
    poly1_softmax_ranking_loss,
    softmax_ranking_loss,
    unique_softmax_ranking_loss,
)
from jaxloss.losses.ranking_smooth import approx_mrr_loss, approx_ndcg_loss, neural_ndcg_loss
from jaxloss.testing import Draw, draw_normal
from parity.peers import Row, check, peer


def draw_mask(dims: str) -> Draw:
    """The first item is real."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        return (g.random(shape) < 0.8) | (np.arange(shape[-1]) == 0)

    return Draw(dims, sample, "fixed")


def draw_grades(dims: str) -> Draw:
    """From 0 to 3, as floats; the first item is relevant."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        return np.maximum(g.integers(0, 4, shape), np.arange(shape[-1]) == 0).astype(float)

    return Draw(dims, sample, "fixed")


def draw_order(dims: str) -> Draw:
    """Different relevances, from 1 up."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        return 1 + np.argsort(g.random(shape), axis=-1).astype(float)

    return Draw(dims, sample, "fixed")


def draw_segments(dims: str) -> Draw:
    """Two lists in turns, each with its best item in front."""
    return Draw(dims, lambda _, shape, __: np.arange(np.prod(shape)).reshape(shape) % 2, "fixed")


LISTS = dict(scores=draw_normal("B L"), relevance=draw_grades("B L"), where=draw_mask("B L"))
UNTIED = dict(LISTS, relevance=draw_order("B L"))
PACKED = dict(scores=draw_normal("1 L"), relevance=draw_order("1 L"), segments=draw_segments("1 L"))
FULL = dict(scores=draw_normal("B L"), relevance=draw_grades("B L"))
SIZES = ({"B": 3, "L": 7}, {"B": 2, "L": 30})
MASKED, IN_ROWS = "with `where`", "packed lists; the mean over segments"
key = jax.random.key(3)


def row(loss: str, there: str, ours: Any, theirs: Any, draws: Any, note: str, **more: Any) -> Row:
    return Row(loss, there, ours, theirs, draws, note, **{"sizes": SIZES, **more})


def moving(*args: Any, **more: Any) -> Row:
    """A row that compares gradients too."""
    return row(*args, differentiate=("scores",), **more)


def padded_and_packed(
    ours: Any, there: str, draws: Any = LISTS, note: str = "", **options: Any
) -> tuple[Row, ...]:
    """Against a loss of rax that takes the same options, with `where` and with `segments`."""
    name, theirs = ours.__name__, partial(peer(there), **options)
    packed = dict(PACKED, relevance=Draw("1 L", draws["relevance"].sample, "fixed"))
    return (
        moving(
            name,
            there,
            lambda scores, relevance, where: ours(scores, relevance, where=where, **options),
            lambda scores, relevance, where: theirs(scores, relevance, where=where),
            draws,
            "; ".join(filter(None, (MASKED, note))),
        ),
        moving(
            name,
            there,
            lambda scores, relevance, segments: ours(
                scores, relevance, segments=segments, num_segments=2, **options
            ),
            lambda scores, relevance, segments: theirs(scores, relevance, segments=segments),
            packed,
            "; ".join(filter(None, (IN_ROWS, note))),
            label="packed",
            sizes=({"L": 9},),
        ),
    )


def smooth(metric: str, top_n: int | None, **arrays: Any) -> Any:
    """Minus the metric of rax, made smooth."""
    options = {} if top_n is None else {"topn": top_n}
    loss = peer("rax.approx_t12n")(resolve_name(f"rax.{metric}"), temperature=0.7)
    return loss(arrays.pop("scores"), arrays.pop("relevance"), **arrays, **options)


def sharp(loss: Any, top_n: int | None = None, **options: Any) -> Any:
    options = options if top_n is None else {**options, "top_n": top_n}
    return lambda scores, relevance: loss(scores, relevance, temperature=1e-4, **options)


NDCG, MRR, SKLEARN = "rax.ndcg_metric", "rax.mrr_metric", "sklearn.metrics.ndcg_score"
LIMIT = "minus the metric, at temperature 1e-4"

ROWS = (
    *padded_and_packed(softmax_ranking_loss, "rax.softmax_loss"),
    *padded_and_packed(
        poly1_softmax_ranking_loss,
        "rax.poly1_softmax_loss",
        note="lists without relevance differ",
        epsilon=0.6,
    ),
    *padded_and_packed(unique_softmax_ranking_loss, "rax.unique_softmax_loss"),
    moving(
        "list_mle_loss",
        "rax.listmle_loss",
        lambda scores, relevance, where: list_mle_loss(scores, relevance, where=where),
        lambda scores, relevance, where: peer("rax.listmle_loss")(scores, relevance, where=where),
        UNTIED,
        MASKED + "; without ties",
        sizes=SIZES[:1],
    ),
    moving(
        "softmax_ranking_loss",
        "rax.softmax_loss",
        lambda scores, relevance, where: softmax_ranking_loss(
            scores, normalize_relevance(relevance, where=where), where=where
        ),
        lambda scores, relevance, where: peer("rax.softmax_loss")(
            scores, relevance, where=where, label_fn=peer("rax.utils.normalize_probabilities")
        ),
        LISTS,
        "of normalised relevance; lists without relevance differ",
        label="normalised",
    ),
    moving(
        "softmax_ranking_loss",
        "optax.losses.ranking_softmax_loss",
        lambda scores, relevance, where: softmax_ranking_loss(scores, relevance, where=where),
        lambda scores, relevance, where: peer("optax.losses.ranking_softmax_loss")(
            scores, relevance, where=where
        ),
        LISTS,
        MASKED,
    ),
    *(
        moving(
            f"approx_{name}_loss",
            "rax.approx_t12n",
            lambda scores, relevance, f=ours, o=options: f(scores, relevance, temperature=0.7, **o),
            partial(smooth, f"{name}_metric", options.get("top_n")),
            FULL,
            f"of `rax.{name}_metric`; runs on jax 0.10 only with `jax.util.wraps` put back",
            label=name + (", top 3" if options else ""),
        )
        for name, ours, options in (
            ("ndcg", approx_ndcg_loss, {}),
            ("ndcg", approx_ndcg_loss, {"top_n": 3}),
            ("mrr", approx_mrr_loss, {}),
        )
    ),
    *(
        moving(
            f"approx_{name}_loss",
            "rax.approx_t12n",
            lambda scores, relevance, where, f=ours: f(
                scores, relevance, temperature=0.7, where=where
            ),
            partial(smooth, f"{name}_metric", None),
            LISTS,
            f"of `rax.{name}_metric`, {MASKED}",
            label=f"{name}, padded",
        )
        for name, ours in (("ndcg", approx_ndcg_loss), ("mrr", approx_mrr_loss))
    ),
    *(
        row(
            loss.__name__,
            there,
            sharp(loss, **options),
            lambda scores, relevance, p=there, o=options: (
                -peer(p)(scores, relevance, **({"topn": o["top_n"]} if o else {}))
            ),
            FULL,
            LIMIT,
            label="limit" + (", top 2" if options else ""),
        )
        for loss, there, options in (
            (approx_ndcg_loss, NDCG, {}),
            (approx_ndcg_loss, NDCG, {"top_n": 2}),
            (approx_mrr_loss, MRR, {}),
            (neural_ndcg_loss, NDCG, {}),
            (neural_ndcg_loss, NDCG, {"top_n": 2}),
        )
    ),
    *(
        row(
            loss.__name__,
            SKLEARN,
            sharp(loss, top_n=top_n),
            lambda scores, relevance, k=top_n: -peer(SKLEARN)(2**relevance - 1, scores, k=k),
            FULL,
            LIMIT + "; of gains 2^y - 1",
            label="limit" + ("" if top_n is None else f", top {top_n}"),
        )
        for loss, top_n in ((approx_ndcg_loss, None), (neural_ndcg_loss, 4))
    ),
    moving(
        "gumbel_samples",
        "rax.gumbel_t12n",
        lambda scores, relevance: softmax_ranking_loss(
            samples := gumbel_samples(scores, key=key, samples=5, beta=0.3),
            jnp.broadcast_to(relevance, samples.shape),
        ),
        lambda scores, relevance: peer("rax.gumbel_t12n")(
            resolve_name("rax.softmax_loss"), samples=5, beta=0.3
        )(scores, relevance, key=key),
        FULL,
        "of `rax.softmax_loss`, with the same key",
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_value_and_gradient_agree(row: Row) -> None:
    check(row)
