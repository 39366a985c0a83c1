"""Vocabulary heads: costs of `hidden @ kernel + bias` whose logits never exist all at once.

Two ways. Runs of tokens, each with all its classes: the gradient of a weighted sum is made while
its value is computed, in three matrix products. Blocks of classes, each with all tokens: row sums
first, then every block once more, in four products that leave little beside the gradient itself.
Both rules are `custom_jvp`: forward mode, `vmap` and second derivatives keep working.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .logit_divergences import kl_of_logits
from .numerics import soft_capped, widen
from .runs import join_runs, over_runs, split_runs
from .sharding import is_sharded, pick, shards


class Plan(NamedTuple):
    """How to go about it; all of it static."""

    size: int  # tokens of a run, or classes of a block
    blocks: bool
    axis_name: str | None = None  # the mapped axis over which the classes are split


class Head(NamedTuple):
    """What all tokens share; everything but the kernel in float32 or wider."""

    kernel: Array  # (D, V)
    bias: Array | None = None  # (V,)
    spread: Array | None = None  # () or (V,): the part of the target that lies on every class
    z_loss: Array | None = None
    softcap: Array | None = None


class Rows(NamedTuple):
    """What belongs to each of the tokens."""

    hidden: Array  # (N, D), of the dtype of the kernel
    labels: Array  # (N,), int32, of classes that exist
    scale: Array  # (N,): how much the label costs


class _Sums(NamedTuple):
    """Row sums over the classes: log-sum-exp is `largest + log(rest + exp(own - largest))`."""

    largest: Array
    rest: Array  # without the label, so that 1 - p keeps its digits when p is almost 1
    own: Array
    spread: Array | None


def _cost(sums: _Sums, scale: Array, head: Head, total: Any) -> tuple[Array, Array]:
    """Value and negative log-probability of each row."""
    gap = sums.own - sums.largest
    nll = jnp.log1p(sums.rest + jnp.expm1(gap)) - gap
    value = scale * nll
    if sums.spread is not None:
        value = value + total * (nll + sums.own) - sums.spread
    if head.z_loss is not None:
        value = value + head.z_loss * (nll + sums.own) ** 2
    return value, nll


def _raw(hidden: Array, head: Head) -> Array:
    z = _dot(hidden, head.kernel, 1, 0)
    return z if head.bias is None else z + head.bias[None]


def _capped(raw: Array, cap: Array | None) -> Array:
    return raw if cap is None else soft_capped(raw, cap)


def _sums(z: Array, labels: Array, hit: Array, head: Head) -> tuple[_Sums, Array]:
    """Row sums over the classes of `z`, of which the label need not be one, and what they sum."""
    largest = jax.lax.stop_gradient(jnp.max(z, axis=-1))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    # A zero for each row: a block of constants would be taken out of the loop and stored.
    powers = jnp.where(hit, 0 * largest[:, None], jnp.exp(z - largest[:, None]))
    rest = jnp.sum(powers, axis=-1)
    inside = (labels >= 0) & (labels < z.shape[-1])
    own = jnp.where(inside, pick(z, jnp.where(inside, labels, 0)), 0)
    if head.spread is None:
        return _Sums(largest, rest, own, None), powers
    spread = head.spread if head.spread.ndim == 0 else head.spread[None]
    finite = jnp.where((spread == 0) & ~jnp.isfinite(z), 0 * largest[:, None], z)  # 0 * inf = 0
    return _Sums(largest, rest, own, jnp.sum(spread * finite, axis=-1)), powers


def _merge(a: _Sums, b: _Sums) -> _Sums:
    largest = jnp.maximum(a.largest, b.largest)
    rest = a.rest * jnp.exp(a.largest - largest) + b.rest * jnp.exp(b.largest - largest)
    spread = None if a.spread is None or b.spread is None else a.spread + b.spread
    return _Sums(largest, rest, a.own + b.own, spread)


def _over_devices(plan: Plan, sums: _Sums) -> _Sums:
    if plan.axis_name is None:
        return sums
    add = partial(jax.lax.psum, axis_name=plan.axis_name)
    largest = jax.lax.pmax(jax.lax.stop_gradient(sums.largest), plan.axis_name)
    rest = add(sums.rest * jnp.exp(sums.largest - largest))
    return _Sums(largest, rest, add(sums.own), None if sums.spread is None else add(sums.spread))


def _total_spread(plan: Plan, head: Head) -> Array | None:
    """What is spread over all classes together."""
    if head.spread is None:
        return None
    total = jnp.sum(head.spread) * (1 if head.spread.ndim else head.kernel.shape[1])
    if plan.axis_name is None:
        return total
    if head.spread.ndim == 0:
        return total * jax.lax.axis_size(plan.axis_name)
    return jax.lax.psum(total, plan.axis_name)


def _slope(
    raw: Array,
    hit: Array,
    sums: _Sums,
    scale: Array,
    weight: Array | None,
    head: Head,
    total: Any,
    powers: tuple[Array, Array] | None = None,
) -> Array:
    """Derivative of each row's value, times its weight, with respect to the logits of a block.

    `powers` are the exponentials if they are at hand, and the number that was taken off before.
    """
    gap = sums.own - sums.largest
    power = jnp.exp(gap)
    norm = sums.rest + power
    log_norm = jnp.log(norm)
    share, mass, extra = -scale * (sums.rest / norm), scale, None
    if head.spread is not None:
        extra = total
    if head.z_loss is not None:
        curve = 2 * head.z_loss * (sums.largest + log_norm)
        extra = curve if extra is None else extra + curve
    if extra is not None:
        mass, share = mass + extra, share + extra * (power / norm)
    if weight is not None:
        mass, share = mass * weight, share * weight
    if powers is None:
        z = _capped(raw, head.softcap)
        slope = jnp.exp((z - sums.largest[:, None]) - log_norm[:, None]) * mass[:, None]
    else:
        slope = powers[0] * (jnp.exp(powers[1] - sums.largest) * (mass / norm))[:, None]
    slope = jnp.where(hit, share[:, None], slope)
    if head.spread is not None:
        spread = head.spread if head.spread.ndim == 0 else head.spread[None]
        slope = slope - (spread if weight is None else spread * weight[:, None])
    if head.softcap is not None:
        ebb = jnp.exp(-2 * jnp.abs(raw / head.softcap))
        slope = slope * (4 * ebb / (1 + ebb) ** 2)
    return slope


def _local(plan: Plan, labels: Array, head: Head) -> Array:
    """Labels as numbers of the classes that this device holds."""
    if plan.axis_name is None:
        return labels
    return labels - jax.lax.axis_index(plan.axis_name) * head.kernel.shape[1]


def _hit(labels: Array, classes: int) -> Array:
    # The comparison fuses; an iota of two axes would be taken out of the loop and stored.
    return labels[:, None] == jnp.arange(classes, dtype=labels.dtype)[None]


# Runs of tokens


def run_values(plan: Plan, rows: Rows, head: Head) -> Array:
    """`head_values` by runs of tokens and plain differentiation, each run computed twice."""
    total = _total_spread(plan, head)

    def step(carry: None, run: tuple[Array, ...]) -> tuple[None, Array]:
        part = Rows(*run)
        labels = _local(plan, part.labels, head)
        z = _capped(_raw(part.hidden, head), head.softcap)
        sums = _over_devices(plan, _sums(z, labels, _hit(labels, z.shape[1]), head)[0])
        return carry, _cost(sums, part.scale, head, total)[0]

    return join_runs(over_runs(step, None, split_runs(plan.size, *rows))[1], rows.labels.shape[0])


def _run_slopes(
    plan: Plan, rows: Rows, weight: Array, norm: Array, head: Head, needs: tuple[bool, ...]
) -> tuple[Array, Array, Array | None, Array | None, Array | None]:
    """Values, negative log-probabilities, and the needed gradients of hidden, kernel and bias."""
    total = _total_spread(plan, head)
    dtype = head.kernel.dtype

    def step(carry: Any, run: tuple[Array, ...]) -> tuple[Any, Any]:
        part, weight = Rows(*run[:-1]), run[-1]
        labels = _local(plan, part.labels, head)
        hit = _hit(labels, head.kernel.shape[1])
        raw = _raw(part.hidden, head)
        own, powers = _sums(_capped(raw, head.softcap), labels, hit, head)
        sums, at_hand = _over_devices(plan, own), (powers, own.largest)
        slope = _slope(raw, hit, sums, part.scale, weight, head, total, at_hand)
        kernel, bias = carry
        bias = None if bias is None else bias + jnp.sum(slope, axis=0)
        slope = slope.astype(dtype)
        if kernel is not None:
            kernel = kernel + _dot(part.hidden, slope, 0, 0, like=head.kernel)
        hidden = None
        if needs[0]:
            hidden = _dot(slope, head.kernel, 1, 1, like=part.hidden)
            hidden = (norm * hidden).astype(dtype)
        return (kernel, bias), (*_cost(sums, part.scale, head, total), hidden)

    carry = (
        _zeros(head.kernel, rows, head) if needs[1] else None,
        _zeros(head.bias, rows, head) if head.bias is not None and needs[2] else None,
    )
    (kernel, bias), out = over_runs(step, carry, split_runs(plan.size, *rows, weight))
    kernel = None if kernel is None else (norm * kernel).astype(dtype)
    bias = None if bias is None else norm * bias
    values, nll, hidden = jax.tree.map(lambda x: join_runs(x, rows.labels.shape[0]), out)
    return values, nll, hidden, kernel, bias


# Blocks of classes


def _by_blocks(plan: Plan, head: Head, step: Callable[..., Any], carry: Any, *along: Any) -> Any:
    """`carry = step(carry, start, width, *parts)` over blocks of classes, nearly all of one width.

    The parts are those of `along`, whose last axis is that of the classes.
    """
    width, full, left = _widths(plan, head)

    def advance(carry: Any, block: tuple[Any, ...], width: int = width) -> tuple[Any, None]:
        start, *parts = block
        return step(carry, start, width, *parts), None

    def cut(start: int, width: int) -> tuple[Any, ...]:
        part = lambda x: jax.lax.slice_in_dim(x, start, start + width, axis=-1)
        return start, *jax.tree.map(part, along)

    def stack(x: Array) -> Array:
        x = x[..., : full * width]
        return jnp.moveaxis(x.reshape(*x.shape[:-1], full, width), -2, 0)

    if full == 1:
        carry, _ = jax.checkpoint(advance)(carry, cut(0, width))
    else:
        blocks = (width * jnp.arange(full, dtype=jnp.int32), *jax.tree.map(stack, along))
        carry, _ = jax.lax.scan(jax.checkpoint(advance, prevent_cse=False), carry, blocks)
    if left:
        last = jax.checkpoint(partial(advance, width=left))
        carry, _ = last(carry, cut(full * width, left))
    return carry


def _widths(plan: Plan, head: Head) -> tuple[int, int, int]:
    classes = head.kernel.shape[1]
    size = classes if is_sharded(head.kernel, 1) else plan.size
    width = -(-classes // -(-classes // size))
    return width, classes // width, classes % width


def _cut(head: Head, start: Any, width: int) -> Head:
    """The head of a block of classes."""
    if width == head.kernel.shape[1]:
        return head
    take = lambda x: _take(x, start, width)
    spread = head.spread if head.spread is None or head.spread.ndim == 0 else take(head.spread)
    bias = None if head.bias is None else take(head.bias)
    return head._replace(kernel=take(head.kernel), bias=bias, spread=spread)


# XLA's CPU backend casts a whole array to float32 in order to cut 16-bit floats out of it or to put
# them in, block after block. As integers they are left alone, but integers have no derivative.


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _take(whole: Array, start: Any, width: int) -> Array:
    part = jax.lax.dynamic_slice_in_dim(_bits(whole), start, width, whole.ndim - 1)
    return _floats(part, whole.dtype)


@_take.defjvp
def _take_jvp(width: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (whole, start), (moved, _) = primals, tangents
    part = jax.lax.dynamic_slice_in_dim(moved, start, width, whole.ndim - 1)
    return _take(whole, start, width), part


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _block_sums(plan: Plan, rows: Rows, head: Head) -> _Sums:
    def step(sums: _Sums, start: Any, width: int) -> _Sums:
        part, labels = _cut(head, start, width), local - start
        z = _capped(_raw(rows.hidden, part), head.softcap)
        return _merge(sums, _sums(z, labels, _hit(labels, width), part)[0])

    local = _local(plan, rows.labels, head)
    zero = _zeros(rows.scale, rows, head)
    start = _Sums(zero - jnp.inf, zero, zero, None if head.spread is None else zero)
    return _over_devices(plan, _by_blocks(plan, head, step, start))


def _block_slopes(
    plan: Plan, rows: Rows, weight: Array, norm: Array, head: Head, needs: tuple[bool, ...]
) -> tuple[Array, Array, Array | None, Array | None, Array | None]:
    """Values, negative log-probabilities, and the needed gradients of hidden, kernel and bias."""
    sums = _block_sums(plan, rows, head)
    costs = _cost(sums, rows.scale, head, _total_spread(plan, head))
    return *costs, *_block_gradients((plan, needs), rows, weight, norm, head, sums)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _block_gradients(
    static: Any, rows: Rows, weight: Array, norm: Array, head: Head, sums: _Sums
) -> Any:
    return _gradients(static, rows, weight, norm, head, sums, as_bits=True)


@_block_gradients.defjvp
def _block_gradients_jvp(static: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    return jax.jvp(partial(_gradients, static), primals, tangents)


def _gradients(
    static: Any,
    rows: Rows,
    weight: Array,
    norm: Array,
    head: Head,
    sums: _Sums,
    *,
    as_bits: bool = False,
) -> tuple[Array | None, Array | None, Array | None]:
    plan, needs = static
    total = _total_spread(plan, head)
    dtype = head.kernel.dtype
    local = _local(plan, rows.labels, head)
    bits = _bits if as_bits else lambda x: x

    def step(carry: Any, start: Any, width: int) -> Any:
        hidden, kernel, bias = carry
        part = _cut(head, start, width)
        raw = _raw(rows.hidden, part)
        slope = _slope(raw, _hit(local - start, width), sums, rows.scale, weight, part, total)
        if bias is not None:
            bias = _put(bias, norm * jnp.sum(slope, axis=0), start)
        slope = slope.astype(dtype)
        if hidden is not None:
            hidden = hidden + _dot(slope, part.kernel, 1, 1, like=rows.hidden)
        if kernel is not None:
            found = (norm * _dot(rows.hidden, slope, 0, 0, like=part.kernel)).astype(dtype)
            kernel = _put(kernel, bits(found), start)
        return hidden, kernel, bias

    carry = (
        _zeros(rows.hidden, rows, head) if needs[0] else None,
        bits(_zeros(head.kernel, rows, head).astype(dtype)) if needs[1] else None,
        _zeros(head.bias, rows, head) if head.bias is not None and needs[2] else None,
    )
    hidden, kernel, bias = _by_blocks(plan, head, step, carry)
    hidden = None if hidden is None else (norm * hidden).astype(dtype)
    return hidden, None if kernel is None else _floats(kernel, dtype), bias


def _put(whole: Array, part: Array, start: Any) -> Array:
    if part.shape == whole.shape:
        return part
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, whole.ndim - 1)


# Distillation


def kl_values(
    size: int,
    hidden: tuple[Array, Array],
    kernels: tuple[Array, Array],
    temperature: Array,
) -> Array:
    """`T^2 KL(softmax(z_teacher / T) || softmax(z_student / T))` of each token, by runs of tokens.

    Both pairs are of student and teacher, who gets no gradient. Backward, each run is computed
    once more.
    """
    teacher = jax.lax.stop_gradient((hidden[1], kernels[1]))
    # Wide outside the loop and narrow inside, so that the gradient of the kernel is summed wide.
    (kernel,) = widen(kernels[0])

    def step(carry: None, run: tuple[Array, ...]) -> tuple[None, Array]:
        logits = _project(run[0], kernel.astype(kernels[0].dtype)), _dot(run[1], teacher[1], 1, 0)
        student, other = (z / temperature for z in widen(*logits))
        return carry, temperature**2 * kl_of_logits(other, student)

    runs = split_runs(size, hidden[0], teacher[0])
    return join_runs(over_runs(step, None, runs)[1], hidden[0].shape[0])


@jax.custom_jvp
def _project(hidden: Array, kernel: Array) -> Array:
    return _dot(hidden, kernel, 1, 0)


@_project.defjvp
def _project_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # Products in the dtype of the inputs, so that those of the transpose are too.
    (hidden, kernel), (hidden_dot, kernel_dot) = primals, tangents
    out = _project(hidden, kernel)
    moved = _dot(hidden_dot, kernel, 1, 0, wide=False).astype(out.dtype)
    return out, moved + _dot(hidden, kernel_dot, 1, 0, wide=False).astype(out.dtype)


# Rules


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def head_sum(plan: Plan, rows: Rows, weight: Array, norm: Array, head: Head) -> Array:
    """`norm * sum_i weight_i value_i`, with the gradient made beside the value."""
    if plan.blocks:
        total = _total_spread(plan, head)
        values = _cost(_block_sums(plan, rows, head), rows.scale, head, total)[0]
    else:
        values = run_values(plan, rows, head)
    return norm * jnp.sum(weight * values)


def _head_sum_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    rows, weight, norm, head = primals
    rows_dot, weight_dot, norm_dot, head_dot = tangents
    factors = (rows_dot.hidden, *head_dot[:2])
    needs = tuple(x is not None and _moves(x) for x in factors)
    slopes = _block_slopes if plan.blocks else _run_slopes
    values, nll, *gradients = slopes(plan, rows, weight, norm, head, needs)
    total = jnp.sum(weight * values)
    out_dot = jnp.zeros_like(total)
    for slope, dot in zip(gradients, factors, strict=True):
        if slope is not None:
            out_dot += jnp.sum(slope.astype(out_dot.dtype) * dot.astype(out_dot.dtype))
    if plan.axis_name is not None and any(needs):
        out_dot = jax.lax.psum(out_dot, plan.axis_name)
    if _moves(rows_dot.scale):
        out_dot += norm * jnp.sum(weight * nll * rows_dot.scale)
    if _moves(weight_dot):
        out_dot += norm * jnp.sum(values * weight_dot)
    if _moves(norm_dot):
        out_dot += norm_dot * total
    if any(x is not None and _moves(x) for x in head_dot[2:]):
        out_dot += norm * jnp.sum(weight * _option_tangents(plan, rows, head, head_dot))
    return norm * total, out_dot


head_sum.defjvp(_head_sum_jvp, symbolic_zeros=True)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def head_values(plan: Plan, rows: Rows, head: Head) -> Array:
    """`scale nll + sum_k spread_k (lse - z_k) + z_loss lse^2` of each token, by blocks of classes.

    Backward, each block is computed once more; the gradient of the kernel is made in blocks and
    then put together.
    """
    sums = _block_sums(plan, rows, head)
    return _cost(sums, rows.scale, head, _total_spread(plan, head))[0]


def _head_values_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (rows, head), (rows_dot, head_dot) = primals, tangents
    total = _total_spread(plan, head)
    sums = _block_sums(plan, rows, head)
    values, nll = _cost(sums, rows.scale, head, total)
    local = _local(plan, rows.labels, head)
    moving = lambda x: None if x is None or not _moves(x) else x
    kernel_dot, bias_dot = map(moving, head_dot[:2])
    hidden_dot = moving(rows_dot.hidden)
    if hidden_dot is not None:  # so that its cotangent is summed in float32
        (hidden_dot,) = widen(hidden_dot)

    def step(moved: Array, start: Any, width: int, kernel_dot: Any, bias_dot: Any) -> Array:
        part = _cut(head, start, width)
        raw = _raw(rows.hidden, part)
        slope = _slope(raw, _hit(local - start, width), sums, rows.scale, None, part, total)
        change = jnp.zeros_like(slope)
        # Products in the dtype of the inputs, so that those of the transpose are too.
        if hidden_dot is not None:
            narrow = hidden_dot.astype(rows.hidden.dtype)
            change += _dot(narrow, part.kernel, 1, 0, wide=False).astype(slope.dtype)
        if kernel_dot is not None:
            change += _dot(rows.hidden, kernel_dot, 1, 0, wide=False).astype(slope.dtype)
        if bias_dot is not None:
            change += bias_dot[None]
        return moved + jnp.sum(slope * change, axis=-1)

    out_dot = jnp.zeros_like(values)
    if any(x is not None for x in (hidden_dot, kernel_dot, bias_dot)):
        zero = _zeros(values, rows, head)
        moved = _by_blocks(plan, head, step, zero, kernel_dot, bias_dot)
        out_dot += moved if plan.axis_name is None else jax.lax.psum(moved, plan.axis_name)
    if _moves(rows_dot.scale):
        out_dot += nll * rows_dot.scale
    if any(x is not None and _moves(x) for x in head_dot[2:]):
        out_dot += _option_tangents(plan, rows, head, head_dot)
    return values, out_dot


head_values.defjvp(_head_values_jvp, symbolic_zeros=True)


def _option_tangents(plan: Plan, rows: Rows, head: Head, head_dot: Head) -> Array:
    """How the values change with spread, z-loss and soft cap: seldom asked for, one more pass."""
    options, dots = head[2:], head_dot[2:]
    dots = tuple(
        None if x is None else dot if _moves(dot) else jnp.zeros_like(x)
        for x, dot in zip(options, dots, strict=True)
    )
    change = lambda options: run_values(plan, rows, Head(*head[:2], *options))
    return jax.jvp(change, (options,), (dots,))[1]


def _moves(dot: Any) -> bool:
    return not isinstance(dot, SymbolicZero)


# Arrays


def prefer_blocks(size: int, rows: Rows, head: Head) -> bool:
    """Whether runs of tokens would hold too many logits, or sum over devices for each run."""
    if is_sharded(head.kernel, 1):
        return False
    most = min(size, rows.labels.shape[0]) * head.kernel.shape[1]
    return most > 2**26 or shards(rows.labels) > 1


def _dot(
    a: Array, b: Array, i: int, j: int, *, like: Array | None = None, wide: bool = True
) -> Array:
    """The product of two matrices over axis i of one and j of the other, summed in float32."""
    dtype = widen(a[:0])[0].dtype if wide else a.dtype
    sharding = None
    if like is not None and is_sharded(a, i):  # nothing else says where the sum should live
        sharding = jax.typeof(like).sharding
    return jax.lax.dot_general(
        a, b, (((i,), (j,)), ((), ())), preferred_element_type=dtype, out_sharding=sharding
    )


def _zeros(like: Array, *near: Any) -> Array:
    """Wide zeros that vary over the mapped axes over which anything in `near` does."""
    (zero,) = widen(jnp.zeros_like(like))
    nothing = [jnp.sum(x[..., None][..., :0]).astype(zero.dtype) for x in jax.tree.leaves(near)]
    return zero + sum(nothing)
