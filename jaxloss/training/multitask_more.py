"""More ways to weigh several losses, or to make their gradients one step.

Gradients are pytrees with a leading axis of tasks, as for `pcgrad`; where nothing else is said, a
step is a combination of them whose coefficients follow from their inner products alone.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._core.checks import check_float, check_scalar, check_shape
from .._core.compiled import uncompiled
from .._core.numerics import safe_div, safe_log, safe_sqrt
from .._core.softmax import safe_log_sum_exp
from .._core.tasks import check_count, combine, gram, no_losses, on_simplex, stack
from .._core.typing import Number

__all__ = [
    "aligned_mtl",
    "fairgrad",
    "geometric_mean_loss",
    "graddrop",
    "gradvac",
    "imtl_g",
    "mgda",
    "nash_mtl",
    "random_loss_weights",
    "smooth_tchebycheff",
]

Tree = Any
Key = PRNGKeyArray | Array


@uncompiled
def random_loss_weights(num_tasks: int | Iterable[str], *, key: Key) -> Tree:
    r"""Weights drawn anew for each step, of sum 1: a baseline that any weighting has to beat.

    $$ w = \operatorname{softmax}(z), \qquad z_k \sim \mathcal{N}(0, 1) $$

    Args:
        num_tasks: How many losses there are, or their names.
        key: A new one for each step.

    Returns:
        An array `(tasks,)`, or scalars by name.

    Reference:
        Lin et al., Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
        Learning, TMLR 2022.

    >>> weights = random_loss_weights(["depth", "edges"], key=jax.random.key(0))
    >>> weights["depth"] + weights["edges"]
    Array(1., dtype=float32)
    """
    form, (zeros,) = stack(num_tasks=no_losses(num_tasks))
    return form(jax.nn.softmax(jax.random.normal(key, zeros.shape)))


@uncompiled
def geometric_mean_loss(losses: Any, *, eps: Number = 0.0) -> Float[Array, ""]:
    r"""Geometric mean of losses, whose gradient does not depend on the unit of any of them.

    $$ \prod_k (L_k + \epsilon)^{1 / K} $$

    by logarithms, so that no product overflows.

    Args:
        losses: Not negative; `(tasks,)`, or scalars by name.
        eps: $\epsilon$. Without it a loss of 0 makes the mean 0, with zero gradient.

    Returns:
        A float32 scalar.

    Reference:
        Chennupati et al., MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy
        for Multi-Task Learning, CVPR Workshops 2019.

    >>> geometric_mean_loss({"depth": jnp.array(1.0), "edges": jnp.array(1.0)})
    Array(1., dtype=float32)
    """
    check_scalar(eps=eps)
    _, (values,) = stack(losses=losses)
    return jnp.exp(jnp.mean(safe_log(values + jnp.asarray(eps).astype(values.dtype))))


@uncompiled
def smooth_tchebycheff(losses: Any, *, reference: Any, mu: Number = 1.0) -> Float[Array, ""]:
    r"""A smooth maximum of losses relative to reference values, on a logarithmic scale.

    $$ \mu \log \sum_k e^{\log(L_k / R_k) / \mu} $$

    Args:
        losses: Not negative; `(tasks,)`, or scalars by name.
        reference: $R$, positive, in the form of the losses: what each is good for, such as its
            value early in training. It carries no gradient.
        mu: $\mu$, positive; the smaller, the closer to the largest alone.

    Returns:
        A float32 scalar; minus infinity with zero gradient where all losses are 0.

    Reference:
        Lin et al., Smooth Tchebycheff Scalarization for Multi-Objective Optimization, ICML 2024,
        of the losses' logarithms.

    >>> ones = jnp.ones(2)
    >>> smooth_tchebycheff(jnp.array([3.0, 1.0]), reference=ones)  # log(3 + 1)
    Array(1.3862944, dtype=float32)
    """
    check_scalar(mu=mu)
    _, (values, known) = stack(losses=losses, reference=reference)
    mu = jnp.asarray(mu).astype(values.dtype)
    logs = safe_log(values) - jnp.log(jax.lax.stop_gradient(known))
    return mu * safe_log_sum_exp(logs / mu)


@uncompiled
def mgda(grads: Tree, *, iterations: int = 20) -> Tree:
    r"""The shortest vector that is a mean of the tasks' gradients: no task loses along it.

    $$ d = \sum_k w_k g_k, \qquad w = \arg\min_{w \ge 0,\; \sum_k w_k = 1}
        \Big\| \sum_k w_k g_k \Big\| $$

    Args:
        grads: Pytree of arrays whose first axis counts the tasks.
        iterations: As in `cagrad`.

    Returns:
        A pytree without the first axis, in the gradients' dtypes.

    Reference:
        Désidéri, Multiple-Gradient Descent Algorithm, CRAS 2012; Sener and Koltun, Multi-Task
        Learning as Multi-Objective Optimization, NeurIPS 2018.

    >>> mgda(jnp.array([[2.0, 0.0], [0.0, 2.0]]))
    Array([1., 1.], dtype=float32)
    """
    products = gram(grads)
    products = safe_div(products, jnp.trace(products) / len(products))
    flat, one = jnp.zeros_like(products[0]), jnp.ones((), products.dtype)
    return combine(on_simplex(products, flat, one, iterations), grads)


@uncompiled
def imtl_g(grads: Tree) -> Tree:
    r"""The combination of sum 1 that leads equally far along the gradients of all tasks.

    $$ d = \sum_k a_k g_k, \qquad d \cdot \frac{g_i}{\|g_i\|} = d \cdot \frac{g_j}{\|g_j\|} $$

    Args:
        grads: Pytree of arrays whose first axis counts the tasks. A gradient of 0 takes no part.

    Returns:
        A pytree without the first axis, in the gradients' dtypes.

    Reference:
        Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021; solved for all coefficients at
        once, where the authors single the first task out.

    >>> imtl_g(jnp.array([[1.0, 0.0], [0.0, 3.0]]))  # 3 / 4 of the first and 1 / 4 of the second
    Array([0.75, 0.75], dtype=float32)
    """
    products = gram(grads)
    cosines, lengths = _cosines(products)
    values, vectors = jnp.linalg.eigh(cosines)
    kept = values > len(values) * jnp.finfo(values.dtype).eps * values[-1]
    inverse = safe_div(kept.astype(values.dtype), jnp.where(kept, values, 0))
    aim = vectors.T @ (lengths > 0).astype(values.dtype)
    parts = safe_div(vectors @ (inverse * aim), lengths)
    return combine(safe_div(parts, jnp.sum(parts)), grads)


@uncompiled
def aligned_mtl(grads: Tree) -> Tree:
    r"""The sum of the gradients after their principal directions were made equally long.

    $$ d = \sigma_{\min} \sum_k \big( G^{-1/2} \big)_k g, \qquad G_{ij} = g_i \cdot g_j $$

    with $\sigma_{\min}$ the smallest singular value of the gradients that is not 0.

    Args:
        grads: Pytree of arrays whose first axis counts the tasks. A principal direction shorter
            than about a thousandth of the longest counts as none.

    Returns:
        A pytree without the first axis, in the gradients' dtypes.

    Reference:
        Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, with
        equal weights.

    >>> aligned_mtl(jnp.array([[1.0, 0.0], [0.0, 3.0]]))
    Array([1., 1.], dtype=float32)
    """
    products = gram(grads)
    products = safe_div(products, jnp.trace(products) / len(products))
    values, vectors = jnp.linalg.eigh(products)
    kept = values > len(values) * jnp.finfo(values.dtype).eps * values[-1]
    least = jnp.min(jnp.where(kept, values, jnp.inf))
    scale = safe_sqrt(jnp.where(kept, least / jnp.where(kept, values, 1), 0))
    return combine(vectors @ (scale * jnp.sum(vectors, axis=0)), grads)


@uncompiled
def graddrop(grads: Tree, *, key: Key, leak: Number = 0.0) -> Tree:
    r"""The sum, in each entry, of gradients of one sign only, drawn by how much of it there is.

    $$ P(+) = \frac{1}{2} \Big( 1 + \frac{\sum_k g_k}{\sum_k |g_k|} \Big) $$

    Args:
        grads: Pytree of arrays whose first axis counts the tasks.
        key: A new one for each step.
        leak: The share of the other sign's gradients that stays; 1 is the plain sum.

    Returns:
        A pytree without the first axis, in the gradients' dtypes.

    Reference:
        Chen et al., Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout,
        NeurIPS 2020, on parameters' gradients, with one leak for all tasks.

    >>> graddrop(jnp.array([[1.0, -2.0], [3.0, -1.0]]), key=jax.random.key(0))  # no conflict
    Array([ 4., -3.], dtype=float32)
    """
    check_scalar(leak=leak)
    products = jax.eval_shape(gram, grads)  # checks, and costs nothing
    leaves, form = jax.tree.flatten(grads)
    keys = jax.random.split(key, len(leaves))

    def drop(key: Key, leaf: Any) -> Array:
        g = jnp.asarray(leaf).astype(jnp.promote_types(leaf.dtype, products.dtype))
        up = (1 + safe_div(jnp.sum(g, axis=0), jnp.sum(jnp.abs(g), axis=0))) / 2
        rises = jax.random.uniform(key, up.shape, g.dtype) < up
        kept = jnp.where(rises, g > 0, g < 0)
        share = jnp.where(kept, 1, jnp.asarray(leak).astype(g.dtype))
        return jnp.sum(share * g, axis=0).astype(leaf.dtype)

    return jax.tree.unflatten(form, list(map(drop, keys, leaves)))


@uncompiled
def gradvac(
    grads: Tree, state: Float[Array, "tasks tasks"], *, key: Key, beta: Number = 0.5
) -> tuple[Tree, Float[Array, "tasks tasks"]]:
    r"""Sum of gradients, each turned towards those it is less alike than it used to be.

    $$ g_i' \leftarrow g_i' + \frac{\|g_i'\| \big( \hat\rho \sqrt{1 - \rho^2}
        - \rho \sqrt{1 - \hat\rho^2} \big)}{\|g_j\| \sqrt{1 - \hat\rho^2}} g_j
        \quad \text{where} \quad \rho = \cos(g_i', g_j) < \hat\rho_{ij} $$

    over all $j \ne i$ in random order, with $\hat\rho$ a moving average of $\rho$. With
    $\hat\rho = 0$ it is `pcgrad`.

    Args:
        grads: Pytree of arrays whose first axis counts the tasks.
        state: $\hat\rho$, the cosines aimed at; zeros before the first step.
        key: A new one for each step.
        beta: Share of the new cosine in the average; the authors' is 0.01.

    Returns:
        A pytree without the first axis, in the gradients' dtypes, and the new state.

    Reference:
        Wang et al., Gradient Vaccine: Investigating and Improving Multi-Task Optimization in
        Massively Multilingual Models, ICLR 2021. The average moves at every pair, as in the paper;
        in LibMTL only where a gradient is turned.

    >>> grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> gradvac(grads, jnp.zeros((2, 2)), key=jax.random.key(0))[0]  # (1/2, 1/2) + (0, 1)
    Array([0.5, 1.5], dtype=float32)
    """
    check_scalar(beta=beta)
    products = gram(grads)
    tasks = len(products)
    check_float(state=state)
    check_shape((tasks, tasks), state=state)
    lengths = safe_sqrt(jnp.diag(products))
    beta, aims = (jnp.asarray(x).astype(products.dtype) for x in (beta, state))
    order = jax.vmap(lambda k: jax.random.permutation(k, tasks))(jax.random.split(key, tasks))

    def turn(carry: tuple[Array, Array], others: Array) -> tuple[tuple[Array, Array], None]:
        parts, aims = carry
        along = jnp.matmul(parts, products, precision="highest")
        mine = safe_sqrt(jnp.maximum(jnp.sum(along * parts, axis=1), 0))[:, None]
        cosine = jnp.clip(safe_div(along, mine * lengths), -1, 1)
        other = safe_sqrt(1 - aims**2)
        more = mine * safe_div(aims * safe_sqrt(1 - cosine**2) - cosine * other, lengths * other)
        seen = (jnp.arange(tasks) == others[:, None]) & ~jnp.eye(tasks, dtype=bool)
        parts = parts + jnp.where(seen & (cosine < aims), more, 0)
        return (parts, jnp.where(seen, (1 - beta) * aims + beta * cosine, aims)), None

    start = jnp.eye(tasks, dtype=products.dtype), aims
    (parts, aims), _ = jax.lax.scan(turn, start, order.T)
    return combine(jnp.sum(parts, axis=0), grads), aims.astype(jnp.asarray(state).dtype)


@uncompiled
def fairgrad(grads: Tree, *, alpha: Number = 1.0, iterations: int = 20) -> Tree:
    r"""The combination that is fair to the tasks in the sense of resource allocation.

    $$ d = \sum_k w_k g_k, \qquad g_k \cdot d = w_k^{-1 / \alpha} $$

    Args:
        grads: Pytree of arrays whose first axis counts the tasks; independent, or no step helps all
            of them and the solution grows with the iterations. A gradient of 0 takes no part.
        alpha: $\alpha$, positive: 1 is `nash_mtl`; the larger, the more the worst-off task counts.
        iterations: Newton steps. 20 are plenty up to $\alpha = 2$; beyond, gradients of very unlike
            lengths (1 to 10,000) take hundreds.

    Returns:
        A pytree without the first axis, in the gradients' dtypes.

    Reference:
        Ban and Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024. The authors solve
        for w on the host, by SciPy.

    >>> fairgrad(jnp.array([[2.0, 0.0], [0.0, 0.5]]))
    Array([1., 1.], dtype=float32)
    """
    check_scalar(alpha=alpha)
    check_count(iterations=iterations)
    products = gram(grads)
    alpha = jnp.asarray(alpha).astype(products.dtype)
    size = jnp.trace(products) / len(products)
    cosines, lengths = _cosines(safe_div(products, size))
    # With w = v / length the equation is C v = b / v^(1 / alpha), of a convex function's slope.
    here = lengths > 0
    cosines = jnp.where(jnp.eye(len(here), dtype=bool), 1, cosines)
    b = jnp.where(here, lengths, 1) ** (1 / alpha - 1)

    def newton(_: Any, v: Array) -> Array:
        force = b * v ** (-1 / alpha)
        slope = jnp.matmul(cosines, v, precision="highest") - force
        step = -jnp.linalg.solve(cosines + jnp.diag(force / v / alpha), slope)
        decrement = jnp.sqrt(jnp.maximum(-jnp.dot(step, slope), 0))
        near = jnp.where(decrement < 0.25, 1, 1 / (1 + decrement))
        most = jnp.max(-step / v)
        return v + jnp.minimum(near, 0.9 / jnp.maximum(most, 0.9)) * step

    v = jax.lax.fori_loop(0, iterations, newton, b ** (1 / (1 + 1 / alpha)))
    return combine(
        safe_div(v, lengths) * safe_div(jnp.ones(()), size ** (alpha / (1 + alpha))), grads
    )


@uncompiled
def nash_mtl(grads: Tree, *, iterations: int = 20) -> Tree:
    r"""The step on which the tasks would agree by bargaining; the units of losses do not matter.

    $$ d = \sum_k w_k g_k, \qquad g_k \cdot d = \frac{1}{w_k} $$

    Its length is the square root of the number of tasks, whatever that of the gradients.

    Args:
        grads: As in `fairgrad`.
        iterations: Newton steps.

    Returns:
        A pytree without the first axis, in the gradients' dtypes.

    Reference:
        Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022. The authors approximate w
        by convex programs on the host, and bound the step's length.

    >>> nash_mtl(jnp.array([[2.0, 0.0], [0.0, 0.5]]))
    Array([1., 1.], dtype=float32)
    """
    return fairgrad(grads, iterations=iterations)


def _cosines(products: Array) -> tuple[Array, Array]:
    """Gradients' cosines and lengths; 0 for a gradient of 0."""
    lengths = safe_sqrt(jnp.diag(products))
    return safe_div(safe_div(products, lengths[:, None]), lengths), lengths
