"""Gradients of several tasks made into one step, from their inner products alone.

Gradients are pytrees with a leading axis of tasks, as `jax.jacrev` gives of a function that returns
an array of losses. What is computed is a `(tasks, tasks)` matrix of inner products in float32, and
from it one coefficient for each task: memory is that of the gradients and of their combination.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from .._core.checks import check_option, check_scalar, naming
from .._core.compiled import uncompiled
from .._core.numerics import safe_div, safe_sqrt
from .._core.sharding import one_hot
from .._core.tasks import NEAR_ZERO, check_count, combine, gram, on_simplex, square
from .._core.terms import Axis
from .._core.typing import Number

__all__ = ["cagrad", "cagrad_transform", "pcgrad", "pcgrad_transform"]

Tree = Any
Key = PRNGKeyArray | Array


@uncompiled
def pcgrad(
    grads: Tree, *, key: Key | None = None, eps: Number = 1e-12, axis_name: Axis = None
) -> Tree:
    r"""Sum of the tasks' gradients, each without the part that works against another task.

    $$ d = \sum_i g_i', \qquad
        g_i' \leftarrow g_i' - \frac{\min(g_i' \cdot g_j, 0)}{\|g_j\|^2 + \epsilon} g_j $$

    over all $j \ne i$ in turn, where $g_j$ is the gradient as it came. Without a conflict the plain
    sum.

    Args:
        grads: Pytree of arrays whose first axis counts the tasks.
        key: Draws for each task the order of the others, as in the paper: a new one for each step.
            Without a key they come in the order of the axis.
        eps: $\epsilon$, which a squared length should exceed by far. Lengths beyond about 1e19 are
            out of the range of a float32 square.
        axis_name: Mapped axis whose devices each hold other entries of the gradients.

    Returns:
        A pytree without the first axis, in the gradients' dtypes.

    Reference:
        Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020. LibMTL takes 1e-8 for eps
        and visits j = i too.

    >>> pcgrad(jnp.array([[1.0, 0.0], [-1.0, 1.0]]))  # (1/2, 1/2) + (0, 1)
    Array([0.5, 1.5], dtype=float32)
    """
    check_scalar(eps=eps)
    products = gram(grads, axis_name)
    tasks = len(products)
    order = jnp.tile(jnp.arange(tasks), (tasks, 1))
    if key is not None:
        order = jax.vmap(lambda k: jax.random.permutation(k, tasks))(jax.random.split(key, tasks))
    lengths = jnp.diag(products) + jnp.asarray(eps).astype(products.dtype)

    def project(parts: Array, others: Array) -> tuple[Array, None]:
        along = jnp.matmul(parts, products, precision="highest")  # g_i' . g_j
        seen = one_hot(others, tasks) & ~jnp.eye(tasks, dtype=bool)
        return parts - jnp.where(seen, safe_div(jnp.minimum(along, 0), lengths), 0), None

    parts, _ = jax.lax.scan(project, jnp.eye(tasks, dtype=products.dtype), order.T)
    return combine(jnp.sum(parts, axis=0), grads)


class _Draws(NamedTuple):
    """The key of the next step."""

    key: Key


def pcgrad_transform(
    *, key: Key | None = None, eps: Number = 1e-12
) -> optax.GradientTransformation:
    """`pcgrad` as an optax transformation, to stand first in a chain.

    Args:
        key: As in `pcgrad`; each step draws with a new one, kept in the state.
        eps: As in `pcgrad`.

    Returns:
        A transformation whose updates come in with a leading axis of tasks and go out without it.

    Reference:
        Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020.

    >>> tx = optax.chain(pcgrad_transform(), optax.sgd(0.5))
    >>> params = jnp.array([2.0, 1.0])
    >>> losses = lambda w: jnp.stack([w[0], w[1] - w[0]])
    >>> updates, state = tx.update(jax.jacrev(losses)(params), tx.init(params))
    >>> updates
    Array([-0.25, -0.75], dtype=float32)
    """
    with naming("pcgrad_transform"):
        check_scalar(eps=eps)

    def init(params: Tree) -> Any:  # noqa: ARG001
        return optax.EmptyState() if key is None else _Draws(key)

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:  # noqa: ARG001
        with naming("pcgrad_transform"):
            if key is None:
                return pcgrad(updates, eps=eps), state
            now, later = jax.random.split(state.key)
            return pcgrad(updates, key=now, eps=eps), _Draws(later)

    return optax.GradientTransformation(init, update)


@uncompiled
def cagrad(
    grads: Tree,
    *,
    c: Number = 0.4,
    iterations: int = 20,
    rescale: int = 1,
    axis_name: Axis = None,
) -> Tree:
    r"""The step near the mean gradient that helps the task it helps least as much as it can.

    $$ d = g_0 + \sqrt{\varphi} \frac{g_w}{\|g_w\|}, \qquad g_w = \sum_k w_k g_k, \qquad
        \sqrt{\varphi} = c \|g_0\| $$

    where $g_0$ is the mean of the gradients and $w$ minimises
    $g_w \cdot g_0 + \sqrt{\varphi} \|g_w\|$ on the simplex. Then $d$ maximises
    $\min_k g_k \cdot d$ within $c \|g_0\|$ of $g_0$. It has the scale of the mean, where `pcgrad`
    has that of the sum.

    Args:
        grads: Pytree of arrays whose first axis counts the tasks. Lengths beyond about 1e19 are
            out of the range of a float32 square.
        c: How far to go from the mean, in `[0, 1)`; 0 is the mean gradient.
        iterations: How often $w$ is improved along every pair of tasks, each time exactly: one is
            enough for two tasks, 20 for as many as dimensions.
        rescale: 1 divides $d$ by $1 + c^2$, 2 by $1 + c$, 0 by nothing.
        axis_name: Mapped axis whose devices each hold other entries of the gradients.

    Returns:
        A pytree without the first axis, in the gradients' dtypes.

    Reference:
        Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021. The
        authors solve for w on the host, by SciPy.

    >>> cagrad(jnp.array([[2.0, 0.0], [0.0, 2.0]]), c=0.5, rescale=0)  # (1, 1) times 1 + c
    Array([1.5, 1.5], dtype=float32)
    """
    check_scalar(c=c)
    check_option((0, 1, 2), rescale=rescale)
    products = gram(grads, axis_name)
    tasks = len(products)
    products = safe_div(products, jnp.trace(products) / tasks)  # of size 1; w does not change
    c = jnp.asarray(c).astype(products.dtype)
    radius = c * safe_sqrt(jnp.maximum(jnp.mean(products), 0))
    shares = on_simplex(products, jnp.mean(products, axis=1), radius, iterations)
    length = jnp.sqrt(square(shares, products) + NEAR_ZERO)
    by = {0: 1.0, 1: 1 + c**2, 2: 1 + c}[rescale]
    return combine((1 / tasks + radius / length * shares) / by, grads)


def cagrad_transform(
    *, c: Number = 0.4, iterations: int = 20, rescale: int = 1
) -> optax.GradientTransformation:
    """`cagrad` as an optax transformation, to stand first in a chain.

    Args:
        c: As in `cagrad`.
        iterations: As in `cagrad`.
        rescale: As in `cagrad`.

    Returns:
        A transformation whose updates come in with a leading axis of tasks and go out without it.

    Reference:
        Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021.

    >>> tx = cagrad_transform(c=0.5, rescale=0)
    >>> updates, _ = tx.update(jnp.array([[2.0, 0.0], [0.0, 2.0]]), tx.init(jnp.zeros(2)))
    >>> updates
    Array([1.5, 1.5], dtype=float32)
    """
    with naming("cagrad_transform"):
        check_scalar(c=c)
        check_option((0, 1, 2), rescale=rescale)
        check_count(iterations=iterations)

    def update(updates: Tree, params: Tree = None) -> Tree:  # noqa: ARG001
        with naming("cagrad_transform"):
            return cagrad(updates, c=c, iterations=iterations, rescale=rescale)

    return optax.stateless(update)
