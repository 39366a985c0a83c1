"""Penalties on parameters as matrices: how far from orthogonal they are, and how much they stretch.

Kernels of more than two axes count as matrices of their last axis, `[k, k, in, out]` as
`[k k in, out]`; leaves of fewer axes are passed over.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._core.checks import check_float, check_option, check_shape, message
from .._core.compiled import uncompiled
from .._core.leaves import Select, chosen
from .._core.numerics import absolute, unit_vectors, widen

__all__ = ["orthogonal_penalty", "spectral_penalty"]

FORMS = ("soft", "double", "off_diagonal", "spectral")
Tree = Any
Vectors = tuple[Array, ...]


@uncompiled
def orthogonal_penalty(
    params: Tree, *, form: str = "soft", select: Select | None = None
) -> Float[Array, ""]:
    r"""How far the columns, or the rows if they are fewer, are from orthonormal, from 0 up.

    $$ \|W^T W - I\|_F^2 $$

    for the smaller of the two Gram matrices: the larger one cannot be the identity.

    Args:
        params: Pytree of arrays.
        form: `"soft"` as above; `"double"` the sum over both Gram matrices, which is at least the
            difference of the sides; `"off_diagonal"` without the diagonal, so that lengths are
            free; `"spectral"` the largest size of an eigenvalue of the difference, not squared,
            at the cost of an eigenvalue problem of the smaller side.
        select: `(path, leaf) -> bool`; all matrices without one.

    Returns:
        A float32 scalar, the sum over the matrices.

    Reference:
        Brock et al., Neural Photo Editing with Introspective Adversarial Networks, ICLR 2017;
        Bansal, Chen and Wang, Can We Gain More from Orthogonality Regularizations in Training Deep
        CNNs?, NeurIPS 2018: their SO, DSO and SRIP, which they find by two steps of a power
        iteration. Without the diagonal: Brock, Donahue and Simonyan, ICLR 2019.

    >>> orthogonal_penalty({"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]])})  # (4 - 1)^2
    Array(9., dtype=float32)
    """
    check_option(FORMS, form=form)
    total = jnp.zeros(())
    for w in _matrices(params, select):
        rows, columns = w.shape
        narrow = w if columns <= rows else w.T
        excess = _excess(narrow)
        if form == "spectral":
            total += jnp.max(absolute(jnp.linalg.eigvalsh(excess)), initial=0)
            continue
        if form == "off_diagonal":
            excess = jnp.where(jnp.eye(excess.shape[0], dtype=bool), 0, excess)
        total += jnp.sum(jnp.square(excess))
        if form == "double":
            total += jnp.sum(jnp.square(_excess(narrow.T)))
    return total


@uncompiled
def spectral_penalty(
    params: Tree,
    state: Vectors | None,
    *,
    key: ArrayLike | None = None,
    iterations: int = 1,
    select: Select | None = None,
) -> tuple[Float[Array, ""], Vectors]:
    r"""Sum of the squared largest singular values: a network that amplifies little is stable.

    $$ \sum_W \sigma(W)^2, \quad \sigma(W) = u^T W v $$

    for singular vectors of a power iteration that goes on from step to step.

    Args:
        params: Pytree of arrays.
        state: From the last call, one vector for each matrix, saved like any other state; None for
            the first call.
        key: Random key, needed by the first call alone.
        iterations: Steps of the power iteration in each call; more in the first one start nearer.
        select: `(path, leaf) -> bool`; all matrices without one.

    Returns:
        The penalty, a float32 scalar, whose gradient takes the vectors as fixed; and the new state.

    Raises:
        ValueError: Neither a state nor a key, or a state of other matrices.

    Reference:
        Yoshida and Miyato, Spectral Norm Regularization for Improving the Generalizability of Deep
        Learning, 2017, who multiply by half a coefficient.

    >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
    >>> value, state = spectral_penalty(params, None, key=jax.random.key(0), iterations=20)
    >>> value
    Array(9., dtype=float32)
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(message("iterations", "an integer of at least 1", repr(iterations)))
    matrices = _matrices(params, select)
    if state is None:
        if key is None:
            raise ValueError(message("key", "a random key, for a first call without state", "None"))
        keys = jax.random.split(key, max(len(matrices), 1))
        draw = lambda w, k: jax.random.normal(k, w.shape[1:], jnp.float32).astype(w.dtype)
        state = tuple(draw(w, k) for w, k in zip(matrices, keys, strict=False))
    if not isinstance(state, tuple) or len(state) != len(matrices):
        got = len(state) if isinstance(state, tuple) else type(state).__name__
        raise ValueError(message("state", f"{len(matrices)} vectors, one for each matrix", got))
    total, vectors = jnp.zeros(()), []
    for i, (w, old) in enumerate(zip(matrices, state, strict=True)):
        check_float(**{f"state[{i}]": old})
        check_shape(w.shape[1:], **{f"state[{i}]": old})
        u, v = _iterate(*jax.lax.stop_gradient((w, jnp.asarray(old).astype(w.dtype))), iterations)
        total += jnp.square(jnp.sum(u * _dot(w, v)))
        vectors.append(v)
    return total, tuple(vectors)


def _matrices(params: Tree, select: Select | None) -> list[Array]:
    """The chosen leaves of two axes or more, as matrices in float32 or wider."""
    leaves = [widen(*leaf)[0] for leaf in chosen(params, select)]
    return [w.reshape(-1, w.shape[-1]) for w in leaves if w.ndim > 1]


def _iterate(w: Array, v: Array, iterations: int) -> tuple[Array, Array]:
    """Steps towards the first singular vectors; a matrix of zeros leaves the right one as it is."""

    def step(_: Any, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        u = unit_vectors(_dot(w, pair[1]))
        new = unit_vectors(_dot(w.T, u))
        return u, jnp.where(jnp.any(new != 0), new, pair[1])

    return jax.lax.fori_loop(0, iterations, step, (_dot(w, v), v))


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _excess(w: Array) -> Array:
    """The Gram matrix of the columns minus the identity."""
    return _dot(w.T, w) - jnp.eye(w.shape[1], dtype=w.dtype)
