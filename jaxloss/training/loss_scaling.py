"""Scaling of float16 losses, so that small gradients do not vanish, as explicit state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._core.checks import check_float, check_scalar
from .._core.compiled import uncompiled
from .._core.numerics import widen
from .._core.terms import Axis, add_up
from .._core.typing import Number

__all__ = ["loss_scale_init", "scale_loss", "unscale_grads"]

Tree = Any


class _LossScale(NamedTuple):
    """The factor of the loss, and the finite steps since it last changed."""

    scale: Float[Array, ""]
    finite_steps: Int[Array, ""]


@uncompiled
def loss_scale_init(*, scale: Number = 2.0**16) -> _LossScale:
    """The state of a loss scale that has seen no step.

    Args:
        scale: Factor to begin with; with powers of two no gradient is rounded.

    Returns:
        The state, whose `scale` is a float32 scalar.

    >>> loss_scale_init().scale
    Array(65536., dtype=float32)
    """
    check_scalar(scale=scale)
    return _LossScale(jnp.array(scale, jnp.float32), jnp.zeros((), jnp.int32))


@uncompiled
def scale_loss(loss: Float[Array, ""], state: _LossScale) -> Float[Array, ""]:
    """The loss times the scale, to be differentiated where activations are in float16.

    Gradients below about 6e-8 are 0 in float16; those of the scaled loss are large enough. bfloat16
    has the range of float32 and needs no scale.

    Args:
        loss: A scalar; terms for the log stay unscaled.
        state: From `loss_scale_init` or `unscale_grads`.

    Returns:
        A float32 scalar.

    >>> scale_loss(jnp.array(0.5, jnp.float16), loss_scale_init(scale=1024.0))
    Array(512., dtype=float32)
    """
    check_float(loss=loss)
    check_scalar(loss=loss)
    (loss,) = widen(loss)
    return loss * jax.lax.stop_gradient(state.scale).astype(loss.dtype)


@uncompiled
def unscale_grads(
    grads: Tree,
    state: _LossScale,
    *,
    growth: Number = 2.0,
    backoff: Number = 0.5,
    interval: Number = 2000,
    minimum: Number = 1.0,
    axis_name: Axis = None,
) -> tuple[Tree, Bool[Array, ""], _LossScale]:
    r"""Gradients of the loss itself, whether all are finite, and the scale of the next step.

    $$ s \leftarrow \begin{cases} \max(b s, s_{\min}) & \text{where a gradient is not finite} \\
        g s & \text{at a finite step after } n \text{ finite ones} \\ s & \text{else} \end{cases} $$

    Where `finite` is False the step is to be skipped: keep parameters and optimiser state, by
    `jnp.where` leaf by leaf or by `jax.lax.cond`.

    Args:
        grads: Pytree of gradients of the scaled loss.
        state: The one that scaled it.
        growth: $g$; the scale stops at the largest float32.
        backoff: $b$.
        interval: $n$, the finite steps in a row after which the next one lets the scale grow.
        minimum: $s_{\min}$.
        axis_name: Mapped axis whose devices must all have finite gradients; the gradients
            themselves are not added up.

    Returns:
        The gradients over the scale, in float32; a bool scalar; the new state.

    Reference:
        Micikevicius et al., Mixed Precision Training, ICLR 2018. Equals Flax's `DynamicScale`
        without its mean over devices.

    >>> state = loss_scale_init(scale=8.0)
    >>> grads, finite, after = unscale_grads({"w": jnp.array([8.0, 16.0])}, state)
    >>> grads["w"], finite, after.scale
    (Array([1., 2.], dtype=float32), Array(True, dtype=bool), Array(8., dtype=float32))
    >>> _, finite, after = unscale_grads({"w": jnp.array([8.0, jnp.inf])}, state)
    >>> finite, after.scale
    (Array(False, dtype=bool), Array(4., dtype=float32))
    """
    named = jax.tree_util.tree_leaves_with_path(grads)
    check_float(**{f"grads{jax.tree_util.keystr(path)}": leaf for path, leaf in named})
    check_scalar(growth=growth, backoff=backoff, interval=interval, minimum=minimum)
    scale, steps = state
    unscale = lambda g: g / scale.astype(g.dtype)
    grads = jax.tree.map(lambda g: unscale(widen(g)[0]), grads)
    lost = sum((jnp.sum(~jnp.isfinite(g)) for g in jax.tree.leaves(grads)), jnp.zeros((), int))
    finite = add_up((lost > 0).astype(jnp.int32), axis_name) == 0
    grown = finite & (steps >= interval)
    growth, backoff, minimum = (
        jnp.asarray(x).astype(scale.dtype) for x in (growth, backoff, minimum)
    )
    larger = jnp.minimum(scale * growth, jnp.finfo(scale.dtype).max)
    kept = jnp.where(finite, scale, jnp.maximum(scale * backoff, minimum))
    after = _LossScale(
        jnp.where(grown, larger, kept), jnp.where(finite & ~grown, steps + 1, 0).astype(steps.dtype)
    )
    return grads, finite, after
