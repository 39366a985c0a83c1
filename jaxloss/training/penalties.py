"""Penalties on parameters: sums over those leaves of a pytree that a selector picks.

Their coefficient stands outside, as a weight of `weighted_sum`. Leaves that hold no floats are
passed over; a penalty of no leaf is 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.checks import check_axis, check_scalar, message
from .._core.compiled import uncompiled
from .._core.leaves import Select, chosen
from .._core.numerics import absolute, safe_norm, safe_pow, widen
from .._core.typing import Number

__all__ = [
    "elastic_net_penalty",
    "group_lasso_penalty",
    "l1_penalty",
    "l2_penalty",
    "lp_penalty",
    "max_norm_penalty",
    "proximal_penalty",
]

Tree = Any


@uncompiled
def l1_penalty(params: Tree, *, select: Select | None = None) -> Float[Array, ""]:
    r"""Sum of absolute parameters, which draws small ones to exactly 0.

    $$ \sum_i |w_i| $$

    with gradient 0 at 0, so that a parameter at rest there stays.

    Args:
        params: Pytree of arrays.
        select: `(path, leaf) -> bool`, such as `matrices_only`; all leaves without one.

    Returns:
        A float32 scalar.

    Reference:
        Tibshirani, Regression Shrinkage and Selection via the Lasso, JRSS B 1996.

    >>> l1_penalty({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([4.0])})
    Array(7., dtype=float32)
    """
    return _over(params, select, absolute)


@uncompiled
def l2_penalty(params: Tree, *, select: Select | None = None) -> Float[Array, ""]:
    r"""Half the sum of squared parameters; its gradient is the parameters themselves.

    $$ \frac{1}{2} \sum_i w_i^2 $$

    Under SGD the same as weight decay; under Adam not, which divides this gradient too by its own
    size, so that `optax.adamw` decays evenly where this penalty does not.

    Args:
        params: Pytree of arrays.
        select: `(path, leaf) -> bool`, such as `matrices_only`; all leaves without one.

    Returns:
        A float32 scalar.

    Reference:
        Hoerl and Kennard, Ridge Regression, Technometrics 1970. Keras' `L2` has no factor 1/2.

    >>> l2_penalty({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([4.0])})
    Array(10.5, dtype=float32)
    """
    return _over(params, select, lambda w: jnp.square(w) / 2)


@uncompiled
def elastic_net_penalty(
    params: Tree, *, l1_ratio: Number = 0.5, select: Select | None = None
) -> Float[Array, ""]:
    r"""A mixture of `l1_penalty` and `l2_penalty`.

    $$ \rho \sum_i |w_i| + \frac{1 - \rho}{2} \sum_i w_i^2 $$

    Args:
        params: Pytree of arrays.
        l1_ratio: $\rho$, the share of the absolute values.
        select: `(path, leaf) -> bool`, such as `matrices_only`; all leaves without one.

    Returns:
        A float32 scalar.

    Reference:
        Zou and Hastie, Regularization and Variable Selection via the Elastic Net, JRSS B 2005.
        Equals scikit-learn's `ElasticNet` with alpha 1.

    >>> elastic_net_penalty({"kernel": jnp.array([1.0, -2.0])})  # 3 / 2 + 5 / 4
    Array(2.75, dtype=float32)
    """
    check_scalar(l1_ratio=l1_ratio)
    absolutes, squares = l1_penalty(params, select=select), l2_penalty(params, select=select)
    ratio = jnp.asarray(l1_ratio).astype(absolutes.dtype)
    return ratio * absolutes + (1 - ratio) * squares


@uncompiled
def group_lasso_penalty(
    params: Tree, *, axis: int = -2, select: Select | None = None, eps: Number = 0.0
) -> Float[Array, ""]:
    r"""Sum of the lengths of groups of parameters, which draws whole groups to exactly 0.

    $$ \sum_g \sqrt{\|w_g\|^2 + \epsilon} $$

    with gradient 0 at a group of zeros.

    Args:
        params: Pytree of arrays; leaves of one axis are groups of one parameter each.
        axis: Axis along which a group lies: -2 makes each output of a kernel `(in, out)` a group.
        select: `(path, leaf) -> bool`, such as `matrices_only`; all leaves without one.
        eps: Rounds the tip of the norm off where it is positive.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: A leaf of two axes or more does not have `axis`.

    Reference:
        Yuan and Lin, Model Selection and Estimation in Regression with Grouped Variables, JRSS B
        2006, without their factor for the size of a group.

    >>> group_lasso_penalty({"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])})
    Array(5., dtype=float32)
    """
    check_scalar(eps=eps)
    total = jnp.zeros(())
    for leaf in chosen(params, select):
        (w,) = widen(*leaf)
        groups = w[None] if w.ndim < 2 else jnp.moveaxis(w, check_axis(axis, w.ndim), 0)
        more = jnp.sqrt(jnp.maximum(jnp.asarray(eps).astype(w.dtype), 0))
        grown = jnp.concatenate([groups, jnp.broadcast_to(more, groups[:1].shape)])
        total += jnp.sum(safe_norm(grown, axis=0))
    return total


@uncompiled
def lp_penalty(params: Tree, *, p: Number, select: Select | None = None) -> Float[Array, ""]:
    r"""Sum of the absolute parameters to a power.

    $$ \sum_i |w_i|^p $$

    with gradient 0 at 0 for every $p$.

    Args:
        params: Pytree of arrays.
        p: The power, greater than 0; below 1 it is sparser than the lasso and not convex.
        select: `(path, leaf) -> bool`, such as `matrices_only`; all leaves without one.

    Returns:
        A float32 scalar.

    Reference:
        Frank and Friedman, A Statistical View of Some Chemometrics Regression Tools, Technometrics
        1993.

    >>> lp_penalty({"kernel": jnp.array([2.0, -1.0])}, p=3)
    Array(9., dtype=float32)
    """
    check_scalar(p=p)
    return _over(params, select, lambda w: safe_pow(absolute(w), jnp.asarray(p).astype(w.dtype)))


@uncompiled
def max_norm_penalty(
    params: Tree, *, limit: Number, select: Select | None = None
) -> Float[Array, ""]:
    r"""Squared excess of each unit's incoming weights over a length; 0 below it.

    $$ \sum_j \max(\|w_{\cdot j}\| - c, 0)^2 $$

    Args:
        params: Pytree of arrays; the last axis counts the units, and leaves of one axis are units
            of one weight each.
        limit: $c$, the length that costs nothing.
        select: `(path, leaf) -> bool`, such as `matrices_only`; all leaves without one.

    Returns:
        A float32 scalar.

    Reference:
        Srebro et al., Maximum-Margin Matrix Factorization, NIPS 2004, as a penalty where they have
        a constraint.

    >>> max_norm_penalty({"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]])}, limit=3.0)
    Array(4., dtype=float32)
    """
    check_scalar(limit=limit)
    total = jnp.zeros(())
    for leaf in chosen(params, select):
        (w,) = widen(*leaf)
        lengths = safe_norm(w.reshape(-1, w.shape[-1] if w.ndim > 1 else w.size), axis=0)
        total += jnp.sum(jnp.square(jax.nn.relu(lengths - jnp.asarray(limit).astype(w.dtype))))
    return total


@uncompiled
def proximal_penalty(
    params: Tree, anchor: Tree, *, precision: Tree | None = None, select: Select | None = None
) -> Float[Array, ""]:
    r"""Half the squared distance of the parameters from earlier ones, each with its own stiffness.

    $$ \frac{1}{2} \sum_i F_i (w_i - w^0_i)^2 $$

    Args:
        params: Pytree of arrays.
        anchor: $w^0$, of the same structure and shapes; it carries no gradient.
        precision: $F$, of the same structure and shapes, without a gradient: the diagonal of the
            Fisher information for elastic weight consolidation; 1 without it, as in FedProx.
        select: `(path, leaf) -> bool` of the parameters; all leaves without one.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: Structures or shapes differ.

    Reference:
        Kirkpatrick et al., Overcoming Catastrophic Forgetting in Neural Networks, PNAS 2017; Li et
        al., Federated Optimization in Heterogeneous Networks, MLSys 2020.

    >>> proximal_penalty({"w": jnp.array([1.0, 3.0])}, {"w": jnp.array([0.0, 1.0])})
    Array(2.5, dtype=float32)
    """
    others = dict(anchor=anchor) | ({} if precision is None else dict(precision=precision))
    for name, other in others.items():
        _check_alike(params, name, other)
    total = jnp.zeros(())
    for leaf, *known in chosen(params, select, *others.values()):
        w, w0, *stiffness = widen(leaf, *jax.lax.stop_gradient(known))
        total += _quadratic(w - w0, *stiffness)
    return total


def _quadratic(move: Array, stiffness: Array | float = 1.0) -> Array:
    return jnp.sum(stiffness * jnp.square(move)) / 2


def _check_alike(params: Tree, name: str, other: Tree) -> None:
    """Another tree has the structure and the shapes of the parameters."""
    expected, got = jax.tree.structure(params), jax.tree.structure(other)
    if expected != got:
        raise ValueError(message(name, f"the structure of params, {expected}", got))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(message(name, f"shape {jnp.shape(a)}, as in params", jnp.shape(b)))


def _over(params: Tree, select: Select | None, cost: Callable[[Array], Array]) -> Float[Array, ""]:
    """The sum of an elementwise cost over the chosen leaves, in float32 or wider."""
    parts = [jnp.sum(cost(*widen(*leaf))) for leaf in chosen(params, select)]
    return sum(parts, jnp.zeros(()))
