"""Pointwise and pairwise ranking losses against rax and torch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import pytest

from jaxloss._core.reductions import mean_over_count
from jaxloss.losses.ranking_lambda import (
    dcg2_pair_weight,
    dcg_pair_weight,
    label_difference_pair_weight,
    lambda_loss,
)
from jaxloss.losses.ranking_pairwise import (
    pairwise_hinge_loss,
    pairwise_logistic_loss,
    pairwise_quantile_loss,
    pairwise_soft_zero_one_loss,
    pairwise_squared_loss,
)
from jaxloss.losses.ranking_pointwise import (
    margin_ranking_loss,
    ordinal_loss,
    pointwise_sigmoid_loss,
    pointwise_squared_loss,
)
from jaxloss.testing import Draw, draw_labels, draw_normal, draw_signs, draw_uniform, draw_unit
from parity.peers import Row, check, peer

MARGIN = "torch.nn.functional.margin_ranking_loss"
BCE = "torch.nn.functional.binary_cross_entropy_with_logits"
LOGISTIC = "rax.pairwise_logistic_loss"
torch_margin, torch_bce, torch_arange = peer(MARGIN), peer(BCE), peer("torch.arange")
rax_logistic = peer(LOGISTIC)


def draw_mask(dims: str) -> Draw:
    return Draw(dims, lambda g, shape, _: g.random(shape) < 0.8, "fixed")


def draw_grades(dims: str) -> Draw:
    return Draw(dims, lambda g, shape, _: g.integers(0, 4, shape).astype(float), "fixed")


LISTS = dict(scores=draw_normal("B L"), relevance=draw_grades("B L"), where=draw_mask("B L"))
PACKED = dict(LISTS, segments=draw_labels("B L", classes="S"))
WEIGHTED = dict(LISTS, item_weights=draw_uniform("B L", 0.5, 2, kind="fixed"))
SHARES = dict(LISTS, relevance=draw_unit("B L"))
SHORT, LONG, LONGEST = {"B": 3, "L": 7, "S": 3}, {"B": 2, "L": 11, "S": 4}, {"B": 1, "L": 540}
OF_LISTS = "with `where`; the mean over all pairs"


def row(loss: str, there: str, ours: Any, theirs: Any, draws: Any, note: str, **more: Any) -> Row:
    return Row(loss, there, ours, theirs, draws, note, ("scores",), **more)


def padded(ours: Any, there: str, label: str = "", *more: dict[str, int], **options: Any) -> Row:
    """The mean over padded lists, short ones and long ones."""
    return row(
        ours.__name__,
        there,
        lambda scores, relevance, where: ours(scores, relevance, where=where, **options),
        lambda scores, relevance, where: peer(there)(scores, relevance, where=where, **options),
        LISTS,
        OF_LISTS,
        sizes=(SHORT, LONG, *more),
        label=label,
    )


def packed(ours: Any, there: str, *sizes: dict[str, int]) -> Row:
    """The sum over lists that are packed several to a row, in no order."""
    return row(
        ours.__name__,
        there,
        lambda scores, relevance, where, segments: ours(
            scores, relevance, where=where, segments=segments, reduction="sum"
        ),
        lambda scores, relevance, where, segments: peer(there)(
            scores, relevance, where=where, segments=segments, reduce_fn=jnp.sum
        ),
        PACKED,
        "with `segments`; the sum",
        sizes=sizes or (LONG,),
        dtypes=("float32",),
        label="packed",
    )


def lambdas(name: str, ours: Callable[..., Any], label: str, **options: Any) -> Row:
    """The sum of rax over the length of its rows, where its weights have that factor.

    Packed lists where nothing is normalised: rax divides only the first item of a segment.
    """
    ranked = name != "labeldiff"
    theirs = {"topn": options["top_n"], "normalize": options["normalize"]} if ranked else {}
    weight = partial(peer(f"rax.{name}_lambdaweight"), **theirs)
    unpacked = options.get("normalize", False)

    def here(scores: Any, relevance: Any, where: Any, **packed: Any) -> Any:
        packed = dict(packed, num_segments=4) if packed else {}
        return lambda_loss(
            scores,
            relevance,
            pair_weight=ours,
            where=where,
            reduction="sum",
            **packed,
            **options,
        )

    def there(scores: Any, relevance: Any, where: Any, **packed: Any) -> Any:
        total = rax_logistic(
            scores, relevance, where=where, lambdaweight_fn=weight, reduce_fn=jnp.sum, **packed
        )
        return total / (scores.shape[-1] if ranked else 1)

    return row(
        "lambda_loss",
        LOGISTIC,
        here,
        there,
        LISTS if unpacked else PACKED,
        f"`{name}_lambdaweight`" + (", which multiplies by the length of a row" * ranked),
        sizes=(LONG,),
        label=label,
    )


def by_items(scores: Any, relevance: Any, where: Any, item_weights: Any) -> Any:
    """What rax makes of item weights: those of the first of each pair, over the number of pairs."""
    pairs = jnp.broadcast_to(item_weights[..., None], (*scores.shape, scores.shape[-1]))
    return pairwise_hinge_loss(
        scores, relevance, where=where, weights=pairs, reduction=mean_over_count
    )


ROWS = (
    row(
        "pointwise_sigmoid_loss",
        "rax.pointwise_sigmoid_loss",
        lambda scores, relevance, where: pointwise_sigmoid_loss(scores, relevance, where=where),
        lambda scores, relevance, where: peer("rax.pointwise_sigmoid_loss")(
            scores, relevance, where=where
        ),
        SHARES,
        "clips relevance to [0, 1]",
        sizes=(SHORT,),
    ),
    row(
        "pointwise_squared_loss",
        "rax.pointwise_mse_loss",
        lambda scores, relevance, where: pointwise_squared_loss(scores, relevance, where=where),
        lambda scores, relevance, where: peer("rax.pointwise_mse_loss")(
            scores, relevance, where=where
        ),
        LISTS,
        "",
        sizes=(SHORT,),
    ),
    row(
        "ordinal_loss",
        BCE,
        lambda scores, relevance: ordinal_loss(scores, relevance, reduction="none"),
        lambda scores, relevance: torch_bce(
            scores,
            (relevance[..., None] > torch_arange(scores.shape[-1])).to(scores.dtype),
            reduction="none",
        ).sum(-1),
        dict(scores=draw_normal("B L K"), relevance=draw_labels("B L", classes="G")),
        "of `relevance > k`, added up over k",
        sizes=({"L": 5, "K": 3, "G": 4},),
    ),
    Row(
        "margin_ranking_loss",
        MARGIN,
        lambda first, second, order: margin_ranking_loss(first, second, order, margin=0.3),
        lambda first, second, order: torch_margin(first, second, order, margin=0.3),
        dict(first=draw_normal("B C"), second=draw_normal("B C"), order=draw_signs("B C")),
        "`target` is `order`",
        ("first", "second"),
    ),
    padded(pairwise_logistic_loss, LOGISTIC),
    packed(pairwise_logistic_loss, LOGISTIC),
    padded(pairwise_hinge_loss, "rax.pairwise_hinge_loss", "", LONGEST),
    packed(pairwise_hinge_loss, "rax.pairwise_hinge_loss", LONG, {**LONGEST, "S": 9}),
    padded(pairwise_soft_zero_one_loss, "rax.pairwise_soft_zero_one_loss"),
    padded(pairwise_squared_loss, "rax.pairwise_mse_loss"),
    packed(pairwise_squared_loss, "rax.pairwise_mse_loss"),
    padded(pairwise_quantile_loss, "rax.pairwise_qr_loss", tau=0.3),
    padded(pairwise_quantile_loss, "rax.pairwise_qr_loss", "squared", tau=0.3, squared=True),
    row(
        "pairwise_hinge_loss",
        "rax.pairwise_hinge_loss",
        by_items,
        lambda scores, relevance, where, item_weights: peer("rax.pairwise_hinge_loss")(
            scores, relevance, where=where, weights=item_weights
        ),
        WEIGHTED,
        "item weights are those of the first of each pair; the mean is over the number of pairs",
        sizes=(SHORT,),
        label="weights",
    ),
    lambdas("dcg", dcg_pair_weight, "dcg", top_n=None, normalize=False),
    lambdas("dcg", dcg_pair_weight, "dcg of the first", top_n=3, normalize=True),
    lambdas("dcg2", dcg2_pair_weight, "dcg2", top_n=None, normalize=True),
    lambdas("dcg2", dcg2_pair_weight, "dcg2 of the first", top_n=3, normalize=True),
    lambdas("labeldiff", label_difference_pair_weight, "label difference"),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_value_and_gradient_are_those_of_the_peer(row: Row) -> None:
    check(row)
