"""Survival in intervals of time: likelihoods of hazards and of event times, and their ranking."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, Draw, draw_labels, draw_normal, draw_uniform
from .._core.checks import (
    check_float,
    check_integer,
    check_min_rank,
    check_same_shape,
    check_shape,
    check_where,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison, valid
from .._core.numerics import numbers, widen
from .._core.pairwise import gather_rows, similarities
from .._core.reduce import mask, reduce
from .._core.sharding import one_hot, unshard
from .._core.sigmoid import sigmoid_costs
from .._core.softmax import safe_log_sum_exp
from .._core.terms import Axis
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "deephit_ranking_loss",
    "discrete_hazard_nll",
    "mtlr_nll",
    "piecewise_hazard_nll",
    "pmf_nll",
]


@compiled()
def discrete_hazard_nll(
    logits: Float[Array, "*batch intervals"],
    time_index: Integer[Array, "*batch"],
    event: Shaped[Array, "*batch"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of hazards of successive intervals (Nnet-survival), in nats.

    $$ \ell = -\sum_{k < t} \log (1 - \lambda_k)
       - \delta \log \lambda_t - (1 - \delta) \log (1 - \lambda_t), \quad
       \lambda_k = \sigma(z_k) $$

    A subject censored in an interval is taken to have survived it.

    Args:
        logits: Logit of the probability of an event in each interval, having survived so far.
        time_index: Interval $t$ of the event or of the censoring; one outside turns its unit into
            NaN.
        event: $\delta$, bool or 0 and 1; 1 where the event was seen.

    One unit per subject (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Gensheimer and Narasimhan, A scalable discrete-time survival model for neural networks,
        PeerJ 2019. Equals pycox's `nll_logistic_hazard`.

    >>> both = jnp.array([True, False])
    >>> discrete_hazard_nll(jnp.zeros((2, 3)), jnp.array([1, 1]), both)  # log 2 each for two
    Array(1.3862944, dtype=float32)
    """
    logits, index, event = _prepare(where, logits, time_index, event)
    died, lived = sigmoid_costs(logits)
    interval = jnp.arange(logits.shape[-1], dtype=index.dtype)
    interval = interval.reshape((1,) * index.ndim + interval.shape)
    costs = jnp.where((interval == index[..., None]) & event[..., None], died, lived)
    lasted = (interval <= index[..., None]) | (index < 0)[..., None]  # below 0 all are NaN
    values = jnp.sum(jnp.where(lasted, costs, 0), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def pmf_nll(
    logits: Float[Array, "*batch intervals"],
    time_index: Integer[Array, "*batch"],
    event: Shaped[Array, "*batch"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of the interval of an event, in nats; censored, of a later one.

    $$ \ell = -\delta \log p_t - (1 - \delta) \log \sum_{k > t} p_k, \quad
       p = \mathrm{softmax}(z_0, \ldots, z_{K-1}, 0) $$

    where the last class, of logit 0, is to survive all intervals.

    Args:
        logits: Logits of an event in each interval.
        time_index: Interval $t$ of the event or of the censoring; one outside turns its unit into
            NaN.
        event: $\delta$, bool or 0 and 1; 1 where the event was seen.

    One unit per subject (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Kvamme and Borgan, Continuous and discrete-time survival prediction with neural networks,
        Lifetime Data Analysis 2021; the likelihood of Lee et al., DeepHit, AAAI 2018, for one risk.
        Equals pycox's `nll_pmf`.

    >>> both = jnp.array([True, False])
    >>> pmf_nll(jnp.zeros((2, 3)), jnp.array([0, 1]), both, reduction="none")  # log 4 and log 2
    Array([1.3862944, 0.6931472], dtype=float32)
    """
    logits, index, event = _prepare(where, logits, time_index, event)
    values = _pmf_values(_with_survival(logits), index, event)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def mtlr_nll(
    logits: Float[Array, "*batch intervals"],
    time_index: Integer[Array, "*batch"],
    event: Shaped[Array, "*batch"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of multi-task logistic regression (MTLR), in nats.

    $$ \ell = -\delta \log p_t - (1 - \delta) \log \sum_{k > t} p_k, \quad
       p = \mathrm{softmax}(\phi_0, \ldots, \phi_{K-1}, 0), \quad \phi_k = \sum_{j \ge k} z_j $$

    It is `pmf_nll` of these sums: each interval's score speaks for an event in it or earlier.

    Args:
        logits: One score for each interval.
        time_index: Interval of the event or of the censoring; one outside turns its unit into NaN.
        event: Bool or 0 and 1; 1 where the event was seen.

    One unit per subject (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Yu et al., Learning Patient-Specific Cancer Survival Distributions as a Sequence of
        Dependent Regressors, NIPS 2011; Fotso, Deep Neural Networks for Survival Analysis Based on
        a Multi-Task Framework, 2018. Equals pycox's `nll_mtlr`.

    >>> both = jnp.array([True, False])
    >>> mtlr_nll(jnp.zeros((2, 3)), jnp.array([0, 1]), both, reduction="none")  # log 4 and log 2
    Array([1.3862944, 0.6931472], dtype=float32)
    """
    logits, index, event = _prepare(where, logits, time_index, event)
    values = _pmf_values(_sums_of_later(logits), index, event)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def piecewise_hazard_nll(
    logits: Float[Array, "*batch intervals"],
    time_index: Integer[Array, "*batch"],
    event: Shaped[Array, "*batch"],
    fraction: Shaped[Array, "*batch"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Negative log-likelihood of a hazard that is constant within each interval, in nats.

    $$ \ell = \sum_{k < t} \eta_k + \rho\, \eta_t - \delta \log \eta_t, \quad
       \eta_k = \log (1 + e^{z_k}) $$

    with the hazard $\eta_k$ per interval, so that times may be continuous.

    Args:
        logits: Softplus of these are the hazards, in units of one interval.
        time_index: Interval $t$ of the event or of the censoring; one outside turns its unit into
            NaN.
        event: $\delta$, bool or 0 and 1; 1 where the event was seen.
        fraction: $\rho$ in `[0, 1]`: how much of that interval had passed.

    One unit per subject (position of `*batch`); see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Kvamme and Borgan, Continuous and discrete-time survival prediction with neural networks,
        Lifetime Data Analysis 2021. Equals pycox's `nll_pc_hazard_loss`, which adds 1e-7 inside the
        logarithm.

    >>> one = jnp.log(jnp.expm1(jnp.ones((1, 3))))  # a hazard of 1
    >>> piecewise_hazard_nll(one, jnp.array([2]), jnp.array([True]), jnp.array([0.5]))
    Array(2.5, dtype=float32)
    """
    logits, index, event = _prepare(where, logits, time_index, event)
    check_shape(index.shape, fraction=fraction)
    (fraction,) = mask(where, *widen(fraction))
    fraction = fraction.astype(logits.dtype)
    require(lambda: (fraction >= 0) & (fraction <= 1), "fraction", "values in [0, 1]", where)
    interval = jnp.arange(logits.shape[-1], dtype=index.dtype)
    interval = interval.reshape((1,) * index.ndim + interval.shape)
    own = one_hot(index, logits.shape[-1])
    share = jnp.where(own, fraction[..., None], (interval < index[..., None]).astype(logits.dtype))
    passed = jnp.sum(share * sigmoid_costs(logits)[1], axis=-1)
    at_event = jnp.sum(jnp.where(own, _log_softplus(logits), 0), axis=-1)
    values = passed - jnp.where(event, at_event, 0)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis_name")
def deephit_ranking_loss(
    logits: Float[Array, "n intervals"],
    time_index: Integer[Array, " n"],
    event: Shaped[Array, " n"],
    *,
    sigma: Number = 0.1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""DeepHit's ranking: who has the event earlier shall have had it with more probability.

    $$ \ell_{ij} = \exp \frac{F_j(t_i) - F_i(t_i)}{\sigma} \quad \text{if } \delta_i = 1
       \text{ and } t_i < t_j $$

    with the distribution functions $F$ of the probabilities of `pmf_nll`, to which it is added.

    Args:
        logits: Logits of an event in each interval.
        time_index: Interval of the event or of the censoring; one outside turns its pairs into NaN.
        event: Bool or 0 and 1; 1 where the event was seen.
        sigma: How fast a pair's cost falls with the difference.
        where: Bool array `(n,)`; a hidden subject is in no pair.
        axis_name: Mapped axes over which the subjects are split; each device then compares its own
            with all.

    One unit per pair of that kind; see `jaxloss.reduce`. Memory: `n x n`.

    Returns:
        A float32 scalar, or `(n, n)` if `reduction` is `"none"`.

    Reference:
        Lee et al., DeepHit: A Deep Learning Approach to Survival Analysis with Competing Risks,
        AAAI 2018. pycox's `rank_loss_deephit_single` also compares with those censored in the same
        interval, and divides by all pairs: `reduction="sum"` over $n^2$.

    >>> early = jnp.log(jnp.array([[0.6, 0.3], [0.2, 0.7]]) / 0.1)
    >>> both = jnp.array([True, True])
    >>> deephit_ranking_loss(early, jnp.array([0, 1]), both, sigma=0.4)  # exp -1
    Array(0.3678794, dtype=float32)
    """
    logits, index, event = _prepare(where, logits, time_index, event)
    if logits.ndim != 2:
        raise ValueError(message("logits", "shape (n, intervals)", f"shape {logits.shape}"))
    (sigma,) = numbers(logits, sigma=sigma)
    z = _with_survival(logits)
    later = jax.lax.cumlogsumexp(z, axis=1, reverse=True)[:, 1:]
    died, _ = sigmoid_costs(later - jax.lax.cumlogsumexp(z, axis=1)[:, :-1])
    after = jnp.exp(-died)  # P(T > k), (n, intervals)
    kept = jnp.ones_like(event) if where is None else jnp.asarray(where)
    everyone = [x for x in gather_rows(axis_name, after, index, kept) if x is not None]
    afters, indices, shown = (unshard(x, 0) for x in everyone)
    own = one_hot(index, logits.shape[-1]).astype(logits.dtype)
    gap = jnp.sum(own * after, axis=-1)[:, None] - similarities(own, afters)  # S_i - S_j at t_i
    pairs = (kept & event)[:, None] & shown[None]
    pairs &= (index[:, None] < indices[None]) | jnp.isnan(gap)
    values = jnp.exp(jnp.where(pairs, gap, 0) / sigma)
    return reduce(values, where=pairs, weights=weights, reduction=reduction)


def _prepare(
    where: Where | None, logits: Array, time_index: Any, event: Any
) -> tuple[Array, Array, Array]:
    """Check, mask and widen; a bad interval or event turns its logits into NaN."""
    check_float(logits=logits)
    check_min_rank(1, logits=logits)
    check_integer(time_index=time_index)
    batch, count = logits.shape[:-1], logits.shape[-1]
    check_shape(batch, time_index=time_index)
    check_same_shape(time_index=time_index, event=event)
    if where is not None:
        check_where(where)
        check_shape(batch, where=where)
    index = jnp.asarray(time_index)
    index = index if index.dtype.itemsize >= 4 else index.astype(jnp.int32)
    (index,) = mask(where, index)
    logits, event = mask(where, *widen(logits, event))
    good = (event == 0) | (event == 1)
    require(lambda: valid(index, count), "time_index", f"values in [0, {count})", where)
    require(lambda: good, "event", "0 or 1", where)
    return poison(logits, (valid(index, count) & good)[..., None]), index, event == 1


def _with_survival(logits: Array) -> Array:
    """The logits with that of surviving all intervals, 0, behind."""
    return jnp.concatenate([logits, jnp.zeros_like(logits[..., :1])], axis=-1)


def _sums_of_later(scores: Array) -> Array:
    """Logits of MTLR, up to a constant: sums from each interval on, and 0 for survival.

    They are summed outwards from the largest, so that those near it have all their digits.
    """
    later = jnp.cumsum(jax.lax.stop_gradient(scores)[..., ::-1], axis=-1)[..., ::-1]
    top = jnp.argmax(_with_survival(later), axis=-1)[..., None]
    interval = jax.lax.broadcasted_iota(top.dtype, scores.shape, scores.ndim - 1)
    below = jnp.cumsum(jnp.where(interval < top, scores, 0)[..., ::-1], axis=-1)[..., ::-1]
    above = jnp.cumsum(jnp.where(interval < top, 0, scores), axis=-1)
    none = jnp.zeros_like(above[..., :1])
    return _with_survival(below) - jnp.concatenate([none, above], axis=-1)


def _pmf_values(logits: Array, index: Array, event: Array) -> Array:
    classes = jnp.arange(logits.shape[-1], dtype=index.dtype)
    classes = classes.reshape((1,) * index.ndim + classes.shape)
    own = classes == index[..., None]
    return _cost(jnp.where(event[..., None], own, classes > index[..., None]), logits)


def _cost(inside: Array, logits: Array) -> Array:
    """Minus the logarithm of the probability of some classes, with every digit."""
    within = safe_log_sum_exp(jnp.where(inside, logits, -jnp.inf))
    without = safe_log_sum_exp(jnp.where(inside, -jnp.inf, logits))
    return sigmoid_costs(without - within)[1]


def _log_softplus(x: Array) -> Array:
    """log(log(1 + exp x)), which is x far below 0."""
    low = x < -15
    near = jnp.where(low, 0, x)
    tiny = jnp.exp(jnp.where(low, x, -15))
    return jnp.where(low, x - tiny / 2, jnp.log(sigmoid_costs(near)[1]))


def _draw_events(dims: str) -> Draw:
    """Events and censored subjects by turns."""
    return Draw(
        dims, lambda _, shape, __: np.arange(np.prod(shape)).reshape(shape) % 2 == 0, "fixed"
    )


_SUBJECTS = dict(
    logits=draw_normal("B T C"), time_index=draw_labels("B T"), event=_draw_events("B T")
)

CASES = (
    Case(discrete_hazard_nll, _SUBJECTS),
    Case(pmf_nll, _SUBJECTS),
    Case(mtlr_nll, _SUBJECTS),
    Case(piecewise_hazard_nll, dict(_SUBJECTS, fraction=draw_uniform("B T", 0.1, 0.9))),
    Case(
        deephit_ranking_loss,
        dict(logits=draw_normal("B C"), time_index=draw_labels("B"), event=_draw_events("B")),
        dict(sigma=0.7),
        positions="B",
        coupled=True,
        without={
            "microbatches": "pairs are those of the whole batch",
            "weight_two": "a subject seen twice is in twice as many pairs",
            "reducing": "only some pairs are units",
        },
    ),
)
