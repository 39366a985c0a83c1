"""Cox's partial likelihood of survival times: Breslow's and Efron's treatment of ties, strata."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import (
    check_float,
    check_integer,
    check_min_rank,
    check_same_shape,
    check_where,
    require,
)
from .._core.compiled import compiled
from .._core.labels import is_integer, poison
from .._core.numerics import safe_log, widen
from .._core.reduce import mask, reduce
from .._core.sharding import unshard
from .._core.sigmoid import sigmoid_costs
from .._core.softmax import safe_log_sum_exp
from .._core.sorting import sort_keys
from .._core.terms import Axis
from .._core.typing import Reduction, Values, Where

__all__ = ["cox_ph_efron_loss", "cox_ph_loss"]


@compiled("axis_name")
def cox_ph_loss(
    log_hazard: Float[Array, "*batch n"],
    time: Shaped[Array, "*batch n"],
    event: Shaped[Array, "*batch n"],
    *,
    strata: Integer[Array, "*batch n"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Cox's negative log partial likelihood with Breslow's ties, in nats per event, from 0 up.

    $$ \ell_i = \log \sum_{j: t_j \ge t_i} e^{h_j} - h_i $$

    for each subject with an event: how surprising it is that of all at risk it was this one. Tied
    events share one risk set. Censored subjects are in risk sets but are no units, so the mean is
    over events and a batch without an event costs 0. By sorting and a running log-sum-exp, in
    memory of order n, exact for log hazards that lie thousands apart.

    Args:
        log_hazard: Predicted log hazard ratios $h$, subjects last.
        time: Time of the event or of the censoring of each subject.
        event: Bool or 0 and 1; 1 where the event was seen, 0 where censored.
        strata: Integers of the same shape; only subjects of one stratum are compared.
        where: Bool array of the same shape; a hidden subject is in no risk set.
        axis_name: Mapped axes over which the subjects are split: those of all devices make up the
            risk sets.

    One unit per event; see `jaxloss.reduce`. Weights do not weigh the risk sets.

    Returns:
        A float32 scalar, or `(*batch, n)` if `reduction` is `"none"`, 0 for censored subjects.

    Reference:
        Cox, Regression Models and Life-Tables, JRSS B 1972; Breslow, Covariance Analysis of
        Censored Survival Data, Biometrics 1974. With `reduction="sum"` minus the log-likelihood of
        statsmodels' `PHReg(ties="breslow")` and of scikit-survival; pycox's `cox_ph_loss` breaks
        ties by order.

    >>> event = jnp.array([True, True, False])
    >>> cox_ph_loss(jnp.zeros(3), jnp.array([1.0, 2.0, 2.0]), event)  # (log 3 + log 2) / 2
    Array(0.89587975, dtype=float32)
    """
    values, units = _values(_breslow, log_hazard, time, event, strata, where, axis_name)
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled("axis_name")
def cox_ph_efron_loss(
    log_hazard: Float[Array, "*batch n"],
    time: Shaped[Array, "*batch n"],
    event: Shaped[Array, "*batch n"],
    *,
    strata: Integer[Array, "*batch n"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Cox's negative log partial likelihood with Efron's ties, in nats per event.

    $$ \ell_i = \frac{1}{d} \sum_{l=0}^{d-1} \log \Big( \sum_{j: t_j \ge t_i} e^{h_j}
       - \frac{l}{d} \sum_{j \in D_i} e^{h_j} \Big) - h_i $$

    with the $d$ events $D_i$ at the time of event $i$: of tied events the later ones no longer
    compete with the earlier ones, in each order equally. Without ties it is `cox_ph_loss`; with
    many, it is nearer to the exact likelihood. A unit may be below 0.

    Args:
        log_hazard: Predicted log hazard ratios $h$, subjects last.
        time: Time of the event or of the censoring of each subject.
        event: Bool or 0 and 1; 1 where the event was seen, 0 where censored.
        strata: Integers of the same shape; only subjects of one stratum are compared.
        where: Bool array of the same shape; a hidden subject is in no risk set.
        axis_name: Mapped axes over which the subjects are split: those of all devices make up the
            risk sets.

    One unit per event; see `jaxloss.reduce`. Weights do not weigh the risk sets.

    Returns:
        A float32 scalar, or `(*batch, n)` if `reduction` is `"none"`, 0 for censored subjects.

    Reference:
        Efron, The Efficiency of Cox's Likelihood Function for Censored Data, JASA 1977. With
        `reduction="sum"` minus the log-likelihood of lifelines' `CoxPHFitter` and of statsmodels'
        `PHReg(ties="efron")`.

    >>> event = jnp.array([True, True])
    >>> cox_ph_efron_loss(jnp.zeros(2), jnp.array([1.0, 1.0]), event)  # (log 2 + log 1) / 2
    Array(0.3465736, dtype=float32)
    """
    values, units = _values(_efron, log_hazard, time, event, strata, where, axis_name)
    return reduce(values, where=units, weights=weights, reduction=reduction)


class _Ordered(NamedTuple):
    """Subjects by stratum and falling time, at one time the censored ones first; `(n,)` each."""

    log_hazard: Array  # -inf for hidden ones, which come last
    stratum: Array  # whether the first of its stratum
    tie: Array  # whether the first of its time
    event: Array


def _values(
    kind: Callable[[_Ordered], Array],
    log_hazard: Array,
    time: Any,
    event: Any,
    strata: Any,
    where: Where | None,
    axis_name: Axis,
) -> tuple[Array, Array]:
    """The cost of each subject as an event, and which subjects are units."""
    check_float(log_hazard=log_hazard)
    check_min_rank(1, log_hazard=log_hazard)
    check_same_shape(log_hazard=log_hazard, time=time, event=event)
    if strata is not None:
        check_integer(strata=strata)
        check_same_shape(log_hazard=log_hazard, strata=strata)
    if where is not None:
        check_where(where)
        check_same_shape(log_hazard=log_hazard, where=where)
    kept = jnp.ones_like(log_hazard, bool) if where is None else jnp.asarray(where)
    time, (h, event) = jnp.asarray(time), mask(where, *widen(log_hazard, event))
    (time,) = mask(where, time if is_integer(time) else widen(time)[0])
    require(lambda: (event == 0) | (event == 1), "event", "0 or 1", where)
    require(lambda: time == time, "time", "numbers", where)
    h = poison(h, ((event == 0) | (event == 1)) & (time == time))
    seen = event == 1
    units = kept & ((event != 0) | jnp.isnan(event))
    group = jnp.zeros_like(h, jnp.int32) if strata is None else mask(where, jnp.asarray(strata))[0]
    count = h.shape[-1]
    if not count:
        return h, units
    arrays = [unshard(x, -1) for x in (h, ~_keys(time), seen, group, kept)]
    if axis_name is not None:
        gather = partial(jax.lax.all_gather, axis_name=axis_name, axis=h.ndim - 1, tiled=True)
        arrays = [gather(x) for x in arrays]
    one = partial(_in_order, kind)
    for _ in range(h.ndim - 1):
        one = jax.vmap(one)
    values = one(*arrays)
    if axis_name is not None:
        first = jax.lax.axis_index(axis_name) * count
        values = jax.lax.dynamic_slice_in_dim(values, first, count, axis=h.ndim - 1)
    return values, units


def _keys(time: Array) -> Array:
    """Integers in the order of the times."""
    return time if is_integer(time) else sort_keys(time)


def _in_order(
    kind: Callable[[_Ordered], Array], h: Array, key: Array, event: Array, group: Array, kept: Array
) -> Array:
    place = _place(key)
    hidden = (~kept).astype(jnp.int32)
    h = jnp.where(kept, h, -jnp.inf)
    keys = (hidden, group, key, event.astype(jnp.int32))
    *keys, order = jax.lax.sort((*keys, place), num_keys=len(keys))
    inverse = jax.lax.sort((order, place), num_keys=1)[1]
    stratum = _changes(keys[0]) | _changes(keys[1])
    tie = stratum | _changes(keys[2])
    ordered = _Ordered(_take(h, order), stratum, tie, keys[3] == 1)
    return _take(kind(ordered), inverse)


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index, axis=0, mode="clip")


def _changes(x: Array) -> Array:
    """Whether each entry differs from the one before."""
    return jnp.concatenate([jnp.ones_like(x[:1], bool), x[1:] != x[:-1]])


def _breslow(subjects: _Ordered) -> Array:
    h = subjects.log_hazard
    top, rest = _around(h, subjects.stratum, after=subjects.tie)
    before, after = top - _finite(h)[None] + rest
    return sigmoid_costs(_log_add(before, after))[1]  # log(1 + exp x)


def _efron(subjects: _Ordered) -> Array:
    h = subjects.log_hazard
    first = subjects.tie | (subjects.event & _changes(subjects.event))  # of each set of tied events
    place = _place(first)
    start = _prefixes(jnp.maximum, jnp.where(first, place, 0))
    each = lambda x: _take(jax.ops.segment_sum(x, start, h.shape[0]), start)
    size = each(jnp.ones_like(h))
    gone = (place - start).astype(h.dtype) / size
    top, rest = _around(h, subjects.stratum, first, after=first)
    # Of the risk set without the tied events, and of the other tied events.
    top, rest = (jnp.concatenate([_take(x[0], start)[None], x[1:]]) for x in (top, rest))
    h = _finite(h)
    outside, before, after = top - h[None] + rest
    ratio = _log_add(outside, _log_add(before, after) + jnp.log1p(-gone))
    much = ratio > 0
    little = jnp.exp(jnp.where(much, 0, ratio)) - gone
    more = ratio + jnp.log1p((1 - gone) * jnp.exp(-jnp.where(much, ratio, 0)))
    values = jnp.where(much, more, jnp.log1p(little))  # log(1 - gone + exp(ratio))
    h -= jax.lax.stop_gradient(_take(h, start))  # of no effect but on the digits
    return each(values) / size + (each(h) / size - h)


def _place(like: Array) -> Array:
    """0, 1, ..., sharded as `like` is."""
    return jnp.zeros_like(like, jnp.int32) + jnp.arange(like.shape[0], dtype=jnp.int32)


def _finite(h: Array) -> Array:
    return jnp.where(h == -jnp.inf, 0, h)


def _last(first: Array) -> Array:
    """Where segments end, from where they begin."""
    return jnp.concatenate([first[1:], jnp.ones_like(first[:1])])


def _log_add(a: Array, b: Array) -> Array:
    return safe_log_sum_exp(jnp.stack([a, b], axis=-1))


def _around(h: Array, *before: Array, after: Array) -> tuple[Array, Array]:
    """Sums, as of `_running`, of all before each entry in segments of several kinds, then after."""
    first = jnp.stack([*before, jnp.flip(_last(after))])
    top, rest = _running(jnp.stack([h] * len(before) + [jnp.flip(h)]), first)
    top, rest = _shifted(top, 0), jnp.where(first, -jnp.inf, _shifted(rest, -jnp.inf))
    back = lambda x: jnp.concatenate([x[:-1], jnp.flip(x[-1:], axis=1)])
    return back(top), back(rest)


def _shifted(x: Array, fill: float) -> Array:
    return jnp.concatenate([jnp.full_like(x[:, :1], fill), x[:, :-1]], axis=1)


def _prefixes(join: Callable[[Any, Any], Any], xs: Any) -> Any:
    """Each entry joined with those before it on the last axis: runs of 64, then their ends.

    Loops of few steps, which compile much sooner than `jax.lax.associative_scan` and keep no more.
    """
    count = jax.tree.leaves(xs)[0].shape[-1]
    runs = -(-count // _RUN)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, runs * _RUN - count)])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], runs, _RUN), -1, 0)

    if runs == 1:
        steps = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), xs)
    else:
        steps = jax.tree.map(cut, xs)
    first, later = jax.tree.map(lambda x: x[0], steps), jax.tree.map(lambda x: x[1:], steps)
    both = lambda before, x: (join(before, x),) * 2
    end, found = jax.lax.scan(both, first, later)
    found = jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest]), first, found)
    if runs > 1:
        before = jax.tree.map(lambda x: x[..., :-1], _prefixes(join, end))
        rest = join(before, jax.tree.map(lambda x: x[..., 1:], found))
        found = jax.tree.map(lambda x, y: jnp.concatenate([x[..., :1], y], -1), found, rest)
        back = lambda x: x.reshape(*x.shape[:-2], -1)[..., :count]
    else:
        back = lambda x: x
    return jax.tree.map(lambda x: back(jnp.moveaxis(x, 0, -1)), found)


_RUN = 64


@jax.custom_jvp
def _running(h: Array, first: Array) -> tuple[Array, Array]:
    """Log-sum-exp of each entry and those before it in its segment, `(k, n)`, in two parts.

    It is the largest of them plus the logarithm of the sum relative to it: none is lost below a
    later one, and no digits below a large one. All of the derivative, a running mean made the same
    way, is that of the second part.
    """
    nothing = h == -jnp.inf

    def join(a: Any, b: Any) -> Any:
        top = jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))
        own = b[2] * jnp.exp(b[1] - top)
        total = jnp.where(b[0], own, a[2] * jnp.exp(a[1] - top) + own)
        return a[0] | b[0], top, total

    lowest = jnp.where(nothing, jnp.finfo(h.dtype).min, h)
    start = (first, lowest, jnp.where(nothing, 0, jnp.ones_like(h)))
    _, top, total = _prefixes(join, start)
    return top, safe_log(total)


@_running.defjvp
def _running_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (h, first), (moved, _) = primals, tangents
    top, rest = _running(h, first)
    level = _finite(rest)
    earlier = _shifted(top, 0) - top + (_shifted(rest, -jnp.inf) - level)
    kept = jnp.exp(jnp.where(first, -jnp.inf, earlier))
    share = jnp.exp(h - top - level) * moved
    join = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
    if jax.__version_info__ < (0, 10):  # cannot transpose these scans
        rest_dot = jax.lax.associative_scan(join, (kept, share), axis=-1)[1]
    else:
        rest_dot = _prefixes(join, (kept, share))[1]
    return (top, rest), (jnp.zeros_like(top), rest_dot)


def _draw_times(dims: str, *, ties: int = 1) -> Draw:
    """Whole numbers in random order, each `ties` times."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        return 0.5 + g.permuted(np.broadcast_to(np.arange(shape[-1]) // ties, shape), axis=-1)

    return Draw(dims, sample, "fixed")


def _draw_events(dims: str, *, censored: bool = False) -> Draw:
    """Events, every third one censored if so asked."""

    def sample(_: np.random.Generator, shape: tuple[int, ...], __: Any) -> np.ndarray:
        return np.broadcast_to((np.arange(shape[-1]) % 3 != 1) | (not censored), shape)

    return Draw(dims, sample, "fixed")


def _subjects(dims: str, *, ties: int = 1, censored: bool = False) -> dict[str, Draw]:
    return dict(
        log_hazard=draw_normal(dims),
        time=_draw_times(dims, ties=ties),
        event=_draw_events(dims, censored=censored),
    )


_COUPLED = {
    "microbatches": "the risk sets are those of the whole batch",
    "weight_two": "a subject seen twice is also twice in the risk sets",
}

CASES = (
    Case(
        cox_ph_loss,
        _subjects("B T"),
        sizes=dict(T=4),
        without={"devices": "`axis_name` splits the subjects, not the batch"},
    ),
    Case(
        cox_ph_loss,
        _subjects("B", ties=2, censored=True),
        label="ties",
        coupled=True,
        without=dict(_COUPLED, reducing="a censored subject is no unit"),
    ),
    Case(
        cox_ph_efron_loss,
        _subjects("B", ties=3),
        label="ties",
        coupled=True,
        without=_COUPLED,
    ),
)
