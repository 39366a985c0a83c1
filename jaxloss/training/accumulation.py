"""The gradient of a mean over more examples than fit at once, or than one device holds."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from .._core.checks import check_scalar, message, naming
from .._core.compiled import uncompiled
from .._core.numerics import safe_div
from .._core.reductions import SumAndWeight
from .._core.terms import Weight, weigh
from .._core.typing import Number
from .composition import weighted_sum

__all__ = ["accumulate", "accumulate_by_weight", "value_and_grad_global"]

Tree = Any
Step = Callable[..., tuple[tuple[Array, dict[str, Array]], Tree]]


@uncompiled
def accumulate(
    fn: Callable[..., Any],
    *,
    microbatches: int,
    weights: Mapping[str, Weight] | None = None,
    step: Number | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Step:
    r"""Value and gradient of the whole batch, computed a microbatch at a time.

    $$ L = \sum_k w_k \frac{\sum_i S_{ki}}{\sum_i W_{ki}} $$

    for the sums and weights of the terms $k$ over the microbatches $i$. A mean of the microbatches'
    means would be another number wherever masks leave them unequally full.

    Args:
        fn: `(params, *batch) -> SumAndWeight`, or several of them by name: call losses with
            `reduction=sum_and_weight`. It must be a sum over examples, so neither a mean nor a
            loss that couples the examples of a batch. It reduces over no mapped axis itself.
        microbatches: How many parts a batch is split into; it divides the number of examples. An
            example and the ones next to it go into different parts.
        weights: As in `weighted_sum`.
        step: As in `weighted_sum`.
        axis_name: Mapped axis whose devices hold parts of the batch, in `shard_map`, `pmap` or
            `vmap(axis_name=...)`, with params replicated over it. Under plain `jit` with sharded
            arrays no name is needed.

    Returns:
        `g(params, *batch) -> ((total, terms), grads)`, as `jax.value_and_grad(has_aux=True)` gives
        of `weighted_sum`; a term that has no name is called `"loss"`. Memory: one microbatch, and
        one gradient. Terms of several names cost `fn` a second time, without its gradient, to learn
        their weights; what the weights do not need of it is left out.

    Raises:
        ValueError: `microbatches` does not divide the batch.
        TypeError: `fn` returns something else, such as a mean.

    >>> def fn(params, x, where):
    ...     return jaxloss.squared_error(
    ...         params * x, x, where=where, reduction=jaxloss.sum_and_weight
    ...     )
    >>> x, where = jnp.arange(4.0), jnp.array([True, True, True, False])
    >>> (total, terms), grad = accumulate(fn, microbatches=2)(jnp.array(0.0), x, where)
    >>> total, grad  # (0 + 1 + 4) / 3, and -2 of it
    (Array(1.6666666, dtype=float32), Array(-3.3333333, dtype=float32))
    """
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        expected = "an integer of at least 1"
        raise ValueError(message("microbatches", expected, repr(microbatches)))

    weights = {} if weights is None else weights

    def value_and_grad(params: Tree, *batch: Tree) -> tuple[tuple[Array, dict[str, Array]], Tree]:
        with naming("accumulate"):
            parts = _strided(batch, microbatches)
            over = lambda function: _add_up(function, parts, axis_name)
            local = params if axis_name is None else _vary(params, axis_name)
            pairs = lambda *part: _pairs(fn(local, *part))
            names = list(jax.eval_shape(lambda: pairs(*_first(parts))))
            scales = {name: weigh(name, weights.get(name, 1.0), step) for name in names}
            scales = {name: scale for name, scale in scales.items() if scale is not None}
            if len(names) > 1:
                known = over(lambda *part: {n: p.weight for n, p in pairs(*part).items()})
                shares = {
                    n: safe_div(jnp.asarray(w, jnp.float32), known[n]) for n, w in scales.items()
                }
            else:  # one denominator, by which all can be divided in the end
                shares = dict.fromkeys(scales, jnp.ones(()))

            def objective(params: Tree, part: Tree) -> tuple[Array, dict[str, SumAndWeight]]:
                found = _pairs(fn(params, *part))
                values = [shares[name] * found[name].sum for name in shares]
                return sum(values, jnp.zeros(())), found

            gradient = jax.grad(objective, has_aux=True)
            grads, found = over(lambda *part: _widened(*gradient(local, part)))
            if len(names) == 1:
                scale = [
                    safe_div(jnp.asarray(w, jnp.float32), found[n].weight)
                    for n, w in scales.items()
                ]
                grads = jax.tree.map(lambda g: g * sum(scale, jnp.zeros(())), grads)
            grads = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), grads, params)
            return weighted_sum(found, weights=weights, step=step), grads

    return value_and_grad


def value_and_grad_global(
    fn: Callable[..., Any],
    axis_name: str | tuple[str, ...],
    *,
    weights: Mapping[str, Weight] | None = None,
    step: Number | None = None,
) -> Step:
    """Value and gradient over the devices of a mapped axis, the same on each of them.

    Right in `shard_map`, with and without `check_vma`, in `pmap` and in `vmap(axis_name=...)`: the
    local sum is differentiated, then sums, weights and gradients are added up, then divided. A mean
    over devices of their masked means would be another number.

    Args:
        fn: As in `accumulate`.
        axis_name: The mapped axis or axes, over which params are replicated.
        weights: As in `weighted_sum`.
        step: As in `weighted_sum`.

    Returns:
        As `accumulate` with one microbatch.

    >>> fn = lambda params, x: jaxloss.squared_error(
    ...     params * x, x, reduction=jaxloss.sum_and_weight
    ... )
    >>> step = jax.vmap(value_and_grad_global(fn, "data"), in_axes=(None, 0), axis_name="data")
    >>> (total, terms), grad = step(jnp.array(0.0), jnp.arange(4.0).reshape(2, 2))
    >>> total  # (0 + 1 + 4 + 9) / 4 on both
    Array([3.5, 3.5], dtype=float32)
    """
    return accumulate(fn, microbatches=1, weights=weights, step=step, axis_name=axis_name)


class _Accumulated(NamedTuple):
    """Weighted gradients and weights since the last step, and the state of the transformation."""

    grads: Tree
    weight: Array
    calls: Array
    inner: Tree


def accumulate_by_weight(
    inner: optax.GradientTransformation, *, every: int
) -> optax.GradientTransformationExtraArgs:
    r"""An optax transformation that steps once per `every` microbatches, by their exact mean.

    $$ g = \frac{\sum_i w_i g_i}{\sum_i w_i} $$

    for gradients $g_i$ of the microbatches' means and weights $w_i$, the `weight` of
    `sum_and_weight`. `optax.MultiSteps` weighs all microbatches alike.

    Args:
        inner: What the mean is given to.
        every: Calls of `update` per step; the others update nothing.

    Returns:
        A transformation whose `update(grads, state, params, weight=w, **extra)` needs the weight
        and passes `extra` on. A microbatch of weight 0 adds nothing, be its gradient NaN; when all
        were of weight 0, `inner` is not asked.

    Reference:
        The transformation in optax that it corrects is `optax.MultiSteps`.

    >>> tx = accumulate_by_weight(optax.sgd(1.0), every=2)
    >>> state = tx.init(jnp.array(0.0))
    >>> updates, state = tx.update(jnp.array(1.0), state, weight=3.0)
    >>> updates, state = tx.update(jnp.array(5.0), state, weight=1.0)
    >>> updates  # minus (3 * 1 + 1 * 5) / 4
    Array(-2., dtype=float32)
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        with naming("accumulate_by_weight"):
            raise ValueError(message("every", "an integer of at least 1", repr(every)))
    extended = optax.with_extra_args_support(inner)

    def init(params: Tree) -> _Accumulated:
        zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), _wide(p)), params)
        return _Accumulated(zeros, jnp.zeros(()), jnp.zeros((), jnp.int32), extended.init(params))

    def update(
        grads: Tree, state: _Accumulated, params: Tree = None, *, weight: Any, **extra: Any
    ) -> tuple[Tree, _Accumulated]:
        with naming("accumulate_by_weight"):
            check_scalar(weight=weight)
        weight = jnp.asarray(weight, jnp.float32)
        add = lambda a, g: a + jnp.where(weight == 0, 0, weight.astype(a.dtype) * g.astype(a.dtype))
        sums, mass = jax.tree.map(add, state.grads, grads), state.weight + weight
        mean = jax.tree.map(
            lambda s, g: safe_div(s, mass.astype(s.dtype)).astype(g.dtype), sums, grads
        )
        nothing = jax.tree.map(jnp.zeros_like, mean)
        full = state.calls + 1 == every
        updates, after = jax.lax.cond(
            full & (mass != 0),
            lambda: extended.update(mean, state.inner, params, **extra),
            lambda: (nothing, state.inner),
        )
        empty = lambda x: jnp.where(full, jnp.zeros_like(x), x)
        kept = jax.tree.map(empty, sums)
        return updates, _Accumulated(kept, empty(mass), empty(state.calls + 1), after)

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def _pairs(found: Any) -> dict[str, SumAndWeight]:
    """What `fn` returned, by name."""
    named = found if isinstance(found, Mapping) else {"loss": found}
    for pair in named.values():
        if not isinstance(pair, SumAndWeight):
            expected = "a SumAndWeight, as reduction=sum_and_weight gives, or several by name"
            raise TypeError(message("fn", expected, f"{type(pair).__name__}; means do not add up"))
    return dict(named)


def _strided(batch: Tree, microbatches: int) -> Tree:
    """Microbatches along a new first axis; every one takes examples from all over the batch."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(message("batch", "arrays with one leading axis", f"sizes {sorted(sizes)}"))
    (((size,),),) = (sizes,)
    if size % microbatches:
        raise ValueError(message("microbatches", f"a divisor of {size} examples", microbatches))
    split = lambda x: jnp.moveaxis(
        jnp.reshape(x, (size // microbatches, microbatches, *jnp.shape(x)[1:])), 1, 0
    )
    return jax.tree.map(split, batch)


def _first(parts: Tree) -> Tree:
    return jax.tree.map(lambda x: x[0], parts)


def _add_up(function: Callable[..., Tree], parts: Tree, axis_name: Any) -> Tree:
    """The sum of a function over the microbatches, and over the devices of a mapped axis."""
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        total = function(*_first(parts))
    else:
        zero = jax.tree.map(
            lambda like: jnp.zeros(like.shape, like.dtype),
            jax.eval_shape(lambda: function(*_first(parts))),
        )
        zero = zero if axis_name is None else _vary(zero, axis_name)
        step = lambda sums, part: (jax.tree.map(jnp.add, sums, function(*part)), None)
        total, _ = jax.lax.scan(step, zero, parts)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _widened(grads: Tree, found: Tree) -> Tree:
    """Gradients in float32 or wider, in which they are added up."""
    return jax.tree.map(lambda g: g.astype(_wide(g)), grads), found


def _wide(x: Any) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _vary(tree: Tree, axis_name: str | tuple[str, ...]) -> Tree:
    """The same values, of which every device may have a gradient of its own."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    manual = jax.sharding.get_abstract_mesh().manual_axes  # those of shard_map

    def vary(x: Any) -> Array:
        x = jnp.asarray(x)
        kind = getattr(jax.typeof(x), "manual_axis_type", jax.typeof(x))  # where jax 0.10 keeps it
        held = getattr(kind, "varying", getattr(kind, "vma", frozenset()))
        missing = tuple(name for name in names if name in manual and name not in held)
        if not missing:
            return x
        pcast = getattr(jax.lax, "pcast", None)  # since jax 0.9
        if pcast is None:
            return getattr(jax.lax, "pvary")(x, missing)  # noqa: B009 (unknown to newer stubs)
        return pcast(x, missing, to="varying")

    return jax.tree.map(vary, tree)
