"""Separation of sources whose order is not known: permutations, mixtures and clusters."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

from .._core.assignment import argmax, finite_costs, match_columns
from .._core.case import Case, draw_binary, draw_normal
from .._core.checks import (
    check_array,
    check_float,
    check_min_rank,
    check_shape,
    check_where,
    message,
    naming,
)
from .._core.compiled import compiled
from .._core.numerics import numbers, safe_div, widen
from .._core.reduce import mask, reduce
from .._core.sharding import one_hot
from .._core.sinkhorn import check_iterations, log_scaled
from .._core.typing import Number, Reduction, Values, Where
from .._core.waveforms import any_sample, centered, snr_values

__all__ = [
    "best_permutation",
    "deep_clustering_loss",
    "mixit_loss",
    "pairwise_items",
    "permutation_invariant",
    "sinkhorn_pit_loss",
]

Pairwise = Float[Array, "*items s s"]
Sources = Bool[Array, "*items s"]
LISTED = 4  # up to so many sources all permutations are tried


def pairwise_items(
    loss_fn: Callable[..., Array],
    pred: Float[Array, "*items n time"],
    target: Shaped[Array, "*items s time"],
    *,
    where: Where | None = None,
    **options: Any,
) -> Float[Array, "*items n s"]:
    r"""A loss of every estimate against every source, for `permutation_invariant`.

    $$ C_{ij} = \ell(\hat y_i, y_j) $$

    One source after the other, with nothing kept of it for the backward pass: the memory is that of
    the estimates against one source, never `n s time`. Gram matrices, `n s` alone, would lose the
    digits of all ratios above some 60 dB.

    Args:
        loss_fn: From `(*items, n, time)` twice to `(*items, n)`: a loss of waveforms that does not
            reduce, such as `partial(si_sdr_loss, reduction="none")`.
        pred: Estimates.
        target: Sources.
        where: Bool array of the samples that exist, `(*items, time)`, or of those of each source,
            `(*items, s, time)`; given to `loss_fn` as its `where`. A source without samples costs 0
            and may hold anything.
        options: Further arguments of `loss_fn`.

    Returns:
        Costs, the estimate before the source.

    Reference:
        Yu et al., Permutation invariant training of deep models for speaker-independent
        multi-talker speech separation, ICASSP 2017.

    >>> energies = lambda pred, target: jnp.sum((pred - target) ** 2, axis=-1)
    >>> pairwise_items(energies, jnp.array([[1.0], [2.0]]), jnp.array([[0.0], [2.0]]))
    Array([[1., 1.],
           [4., 0.]], dtype=float32)
    """
    with naming("pairwise_items"):
        check_float(pred=pred)
        check_array(target=target)
        check_min_rank(2, pred=pred, target=target)
        pred, target = jnp.asarray(pred), jnp.asarray(target)
        expected = (*pred.shape[:-2], target.shape[-2], pred.shape[-1])
        check_shape(expected, target=target)
        if where is not None:
            check_where(where)
            whole = jnp.ndim(where) < pred.ndim
            check_shape(pred.shape[:-2] + pred.shape[-1:] if whole else expected, where=where)
            where = jnp.asarray(where)
            where = jnp.broadcast_to(where[..., None, :], expected) if whole else where

        def against(entry: tuple[Array, Array | None]) -> Array:
            source, kept = (
                None if x is None else jnp.broadcast_to(x[..., None, :], pred.shape) for x in entry
            )
            shown = {} if kept is None else dict(where=kept)
            cost = loss_fn(pred, source, **shown, **options)
            check_shape(pred.shape[:-1], **{"loss_fn(pred, target)": cost})
            return cost

        rows = (jnp.moveaxis(target, -2, 0), None if where is None else jnp.moveaxis(where, -2, 0))
        return jnp.moveaxis(jax.lax.map(jax.checkpoint(against), rows), 0, -1)


def best_permutation(
    pairwise: Pairwise, *, source_where: Sources | None = None
) -> Integer[Array, "*items s"]:
    r"""For every source the estimate that stands for it in the cheapest order, without a gradient.

    $$ \arg\min_\pi \sum_j C_{\pi(j) j} $$

    Up to 4 sources by trying all orders, above by an exact assignment. NaN and infinite costs count
    as a price above that of any other order. Of equal ones one is chosen.

    Args:
        pairwise: Costs of estimates (rows) against sources (columns).
        source_where: Which sources exist; the estimates that are left go to the others.

    Returns:
        Indices, int32, a permutation; `jnp.take_along_axis(pred, index[..., None], -2)` are the
        estimates in the order of the sources.

    Reference:
        Kuhn, The Hungarian method for the assignment problem, 1955.

    >>> best_permutation(jnp.array([[5.0, 1.0], [2.0, 4.0]]))  # estimate 1 is source 0
    Array([1, 0], dtype=int32)
    """
    with naming("best_permutation"):
        pairwise, _ = _prepare(pairwise, source_where)
        return _best(pairwise)


@compiled()
def permutation_invariant(
    pairwise: Pairwise,
    *,
    source_where: Sources | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean loss over the sources in the order that suits the estimates best, in the loss's unit.

    $$ \ell = \min_\pi \frac{1}{S} \sum_j C_{\pi(j) j} $$

    The gradient flows through the chosen costs alone; of equally good orders one gets it all.

    Args:
        pairwise: Costs of estimates (rows) against sources (columns), as of `pairwise_items`.
        source_where: Which sources exist; the others, and the estimates that are left, are free of
            cost, and S counts what exists. An item without sources is no unit.
        where: Bool array `*items`.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Yu et al., Permutation invariant training of deep models for speaker-independent
        multi-talker speech separation, ICASSP 2017; Kolbaek et al., Multitalker speech separation
        with utterance-level permutation invariant training, TASLP 2017.

    >>> permutation_invariant(jnp.array([[5.0, 1.0], [2.0, 4.0]]))  # (1 + 2) / 2
    Array(1.5, dtype=float32)
    """
    pairwise, source_where = _prepare(pairwise, source_where, where)
    chosen = jnp.swapaxes(one_hot(_best(pairwise), pairwise.shape[-1]), -1, -2)
    if source_where is not None:
        chosen &= source_where[..., None, :]
    values = jnp.sum(jnp.where(chosen, pairwise, 0), axis=(-2, -1))
    return _mean_source(values, source_where, pairwise.shape[-1], where, weights, reduction)


@compiled("iterations")
def sinkhorn_pit_loss(
    pairwise: Pairwise,
    *,
    temperature: Number = 1.0,
    iterations: int = 50,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean loss over the sources under a soft permutation, in the unit of the costs.

    $$ \ell = \frac{1}{S} \sum_{ij} P_{ij} (C_{ij} + T \log P_{ij}) $$

    for the matrix P of row and column sums 1 that Sinkhorn's algorithm makes of $e^{-C / T}$. It
    lies about $T \log S$ below `permutation_invariant` at most and approaches it as T falls to 0:
    anneal T.

    Args:
        pairwise: Costs of estimates (rows) against sources (columns), as of `pairwise_items`.
        temperature: T, in the unit of the costs.
        iterations: How often both sums are brought to 1.
        where: Bool array `*items`.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Tachibana, Towards listening to 10 people simultaneously: an efficient permutation invariant
        training of audio source separation using Sinkhorn's algorithm, ICASSP 2021, with
        beta = 1 / T and twice the `iterations`.

    >>> sinkhorn_pit_loss(jnp.zeros((2, 2)), temperature=2.0)  # all entries 1/2: -2 log 2
    Array(-1.3862944, dtype=float32)
    """
    check_iterations(iterations)
    pairwise, _ = _prepare(pairwise, None, where)
    (temperature,) = numbers(pairwise, temperature=temperature)
    cost = jnp.swapaxes(pairwise, -1, -2)  # every source ends with a sum of 1
    none = jnp.zeros_like(cost[..., 0])
    share, sources, estimates = log_scaled(-cost / temperature, none, none, iterations)
    # T log P = -C + T (f + g) with exact sums of rows: no large costs are left to cancel.
    total = jnp.sum(sources, axis=-1) + jnp.sum(estimates * jnp.sum(jnp.exp(share), -2), axis=-1)
    values = temperature * total
    return _mean_source(values, None, pairwise.shape[-1], where, weights, reduction)


@compiled(functions=("loss_fn",))
def mixit_loss(
    pred: Float[Array, "*items s time"],
    mixtures: Shaped[Array, "*items m time"],
    *,
    loss_fn: Callable[..., Array] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mixture invariant training: the loss of sums of estimates against mixtures, as `loss_fn`.

    $$ \ell = \min_A \frac{1}{M} \sum_m L\Big( \sum_s A_{ms} \hat y_s, x_m \Big) $$

    over the `M^S` ways A of giving each estimate to one mixture. The gradient flows through the
    best one alone, the others are tried one after the other and keep nothing: the memory is that
    of a single one.

    Args:
        pred: Estimates of the sources of the sum of all mixtures.
        mixtures: At least one, of waveforms without a reference of their sources.
        loss_fn: From `(*items, m, time)` twice, sums of estimates first, to `(*items, m)`; called
            with `where` too if it is given. None is the negative signal-to-noise ratio in decibels,
            `snr_loss`; with `partial(snr_loss, soft_max=30.0, reduction="none")` it is bounded, as
            in the paper.
        where: Bool array `(*items, time)` of the samples that exist.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Wisdom et al., Unsupervised sound separation using mixture invariant training, NeurIPS 2020.

    >>> energy = lambda pred, mixture: jnp.sum((pred - mixture) ** 2, axis=-1)
    >>> sources = jnp.array([[1.0], [2.0], [4.0]])
    >>> mixit_loss(sources, jnp.array([[5.0], [3.0]]), loss_fn=energy)  # 1 + 4 and 2: (0 + 1) / 2
    Array(0.5, dtype=float32)
    """
    check_float(pred=pred)
    check_min_rank(2, pred=pred, mixtures=mixtures)
    count, mixed = pred.shape[-2], jnp.shape(mixtures)[-2]
    check_shape((*pred.shape[:-2], mixed, pred.shape[-1]), mixtures=mixtures)
    if not count * mixed:
        raise ValueError(message("pred", "at least one source and mixture", f"{count}, {mixed}"))
    pred, mixtures = widen(pred, mixtures)
    shown = {}
    if where is not None:
        check_where(where)
        check_shape(pred.shape[:-2] + pred.shape[-1:], where=where)
        over = lambda x: jnp.broadcast_to(jnp.asarray(where)[..., None, :], x.shape)
        pred, mixtures = (jnp.where(over(x), x, 0) for x in (pred, mixtures))
        shown = dict(where=over(mixtures))
    find = loss_fn or _negative_snr

    def of(pred: Array, given: Array) -> Array:
        """The loss where estimate s is given to mixture `given[..., s]`."""
        member = jnp.swapaxes(one_hot(given, mixed), -1, -2).astype(pred.dtype)
        sums = jnp.einsum("...ms,...st->...mt", member, pred, precision="highest")
        values = find(sums, mixtures, **shown)
        check_shape(mixtures.shape[:-1], **{"loss_fn(pred, mixture)": values})
        return jnp.sum(values, axis=-1) / mixed

    fixed = jax.lax.stop_gradient(pred)
    ways = jnp.asarray(list(itertools.product(range(mixed), repeat=count)), jnp.int32)
    losses = jax.lax.map(lambda way: of(fixed, jnp.broadcast_to(way, pred.shape[:-1])), ways)
    best = one_hot(argmax(-jnp.moveaxis(losses, 0, -1), axis=pred.ndim - 2), len(ways))
    given = jnp.sum(jnp.where(best[..., None], jnp.broadcast_to(ways, (*best.shape, count)), 0), -2)
    values = of(pred, given)
    return reduce(values, where=any_sample(where), weights=weights, reduction=reduction)


def _negative_snr(pred: Array, target: Array, where: Where | None = None) -> Array:
    (eps,) = numbers(pred, eps=1e-8)
    return -snr_values(centered(pred, where), centered(target, where), eps)


@compiled()
def deep_clustering_loss(
    embeddings: Float[Array, "*items bins dim"],
    labels: Shaped[Array, "*items bins s"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared distance of the affinities of embeddings from those of sources, summed, from 0.

    $$ \ell = \lVert V V^T - Y Y^T \rVert_F^2
       = \lVert V^T V \rVert_F^2 - 2 \lVert V^T Y \rVert_F^2 + \lVert Y^T Y \rVert_F^2 $$

    No matrix of bins by bins is ever formed.

    Args:
        embeddings: V, for each bin of a spectrum, usually of length 1 (`unit_vectors`).
        labels: Y, 1 for the source of the bin and else 0; `jax.nn.one_hot` makes it of integers.
        where: Bool array `(*items, bins)`; silent bins are usually left out.

    One unit per item; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*items` if `reduction` is `"none"`.

    Reference:
        Hershey et al., Deep clustering: discriminative embeddings for segmentation and separation,
        ICASSP 2016. Many implementations divide by the number of pairs of bins.

    >>> deep_clustering_loss(jnp.array([[1.0], [1.0]]), jnp.eye(2))  # two affinities are 1, not 0
    Array(2., dtype=float32)
    """
    check_float(embeddings=embeddings)
    check_min_rank(2, embeddings=embeddings, labels=labels)
    check_shape((*embeddings.shape[:-1], jnp.shape(labels)[-1]), labels=labels)
    if where is not None:
        check_shape(embeddings.shape[:-1], where=where)
    v, y = mask(where, *widen(embeddings, labels))
    values = _affinity(v, v) - 2 * _affinity(v, y) + _affinity(y, y)
    return reduce(values, where=any_sample(where), weights=weights, reduction=reduction)


def _affinity(a: Array, b: Array) -> Array:
    """Squared Frobenius norm of `a^T b`, of each item."""
    product = jnp.einsum("...nd,...ne->...de", a, b, precision="highest")
    return jnp.sum(product * product, axis=(-2, -1))


def _prepare(
    pairwise: Array, source_where: Sources | None, where: Where | None = None
) -> tuple[Array, Array | None]:
    """Costs, 0 where the item is hidden or the source does not exist."""
    check_float(pairwise=pairwise)
    check_min_rank(2, pairwise=pairwise)
    pairwise = jnp.asarray(pairwise)
    check_shape((*pairwise.shape[:-1], pairwise.shape[-2]), pairwise=pairwise)
    if where is not None:
        check_shape(pairwise.shape[:-2], where=where)
    (pairwise,) = mask(where, *widen(pairwise))
    if source_where is None:
        return pairwise, None
    check_where(source_where, "source_where")
    check_shape(pairwise.shape[:-1], source_where=source_where)
    source_where = jnp.asarray(source_where)
    return jnp.where(source_where[..., None, :], pairwise, 0), source_where


def _best(pairwise: Array) -> Array:
    find = _listed if pairwise.shape[-1] <= LISTED else match_columns
    for _ in range(pairwise.ndim - 2):
        find = jax.vmap(find)
    return find(jax.lax.stop_gradient(pairwise))


def _listed(pairwise: Array) -> Array:
    orders = jnp.asarray(list(itertools.permutations(range(len(pairwise)))), jnp.int32)
    chosen = jnp.swapaxes(one_hot(orders, len(pairwise)), -1, -2)  # (orders, s, s)
    cost, _ = finite_costs(pairwise, jnp.ones(len(pairwise), bool))
    cost = jnp.broadcast_to(cost, chosen.shape)
    best = argmax(-jnp.sum(jnp.where(chosen, cost, 0), axis=(1, 2)), axis=0)
    best = jnp.broadcast_to(one_hot(best, len(orders))[:, None], orders.shape)
    return jnp.sum(jnp.where(best, orders, 0), axis=0)


def _mean_source(
    values: Array,
    source_where: Array | None,
    count: int,
    where: Where | None,
    weights: Values | None,
    reduction: Reduction,
) -> Array:
    """Sums over sources divided by how many exist, and reduced."""
    if source_where is None:
        return reduce(values / max(count, 1), where=where, weights=weights, reduction=reduction)
    values = safe_div(values, jnp.sum(source_where, axis=-1, dtype=values.dtype))
    some = jnp.any(source_where, axis=-1)
    units = some if where is None else some & where
    return reduce(values, where=units, weights=weights, reduction=reduction)


_COSTS = dict(pairwise=draw_normal("B S S"))

CASES = (
    Case(permutation_invariant, _COSTS, positions="B", sizes=dict(S=3)),
    Case(permutation_invariant, _COSTS, label="assigned", positions="B", sizes=dict(S=5)),
    Case(
        sinkhorn_pit_loss,
        _COSTS,
        dict(temperature=8.0, iterations=5),
        positions="B",
        sizes=dict(S=3),
    ),
    Case(
        mixit_loss,
        dict(pred=draw_normal("B S T"), mixtures=draw_normal("B M T")),
        positions="B T",
        sizes=dict(S=3, M=2, T=6),
    ),
    Case(
        deep_clustering_loss,
        dict(embeddings=draw_normal("B T D"), labels=draw_binary("B T S")),
        positions="B T",
        sizes=dict(T=4, D=3, S=2),
    ),
)
