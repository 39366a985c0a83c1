"""Weights of several tasks, from their losses: learnt, carried as state, or in closed form.

Losses come as an array `(tasks,)` or as scalars by name; variances, weights and states then have
the same form.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._core.checks import check_scalar
from .._core.compiled import uncompiled
from .._core.numerics import absolute, safe_div, safe_pow, standardized
from .._core.tasks import kept_tasks, names_of, no_losses, stack
from .._core.terms import logged
from .._core.typing import Number

__all__ = [
    "dwa_init",
    "dynamic_weight_average",
    "famo_init",
    "famo_update",
    "famo_weights",
    "gradnorm_loss",
    "uncertainty_weighting",
]

Tasks = Float[Array, " tasks"] | Mapping[str, Float[Array, ""]]
Tree = Any
TINY = 1e-8  # keeps the logarithm of a loss at its floor finite, and Adam from dividing by 0
_BETA, _BETA2 = 0.9, 0.999  # of Adam


@uncompiled
def uncertainty_weighting(
    losses: Tasks,
    log_variances: Tasks,
    *,
    min_log_variance: Number | None = None,
    where: Tree | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""Sum of losses over twice a variance that is learnt for each, in nats of a Gaussian.

    $$ \frac{1}{2} \sum_k \left( e^{-s_k} L_k + s_k \right) $$

    which $s_k = \log L_k$ minimises, so that tasks weigh by the inverse of their losses. Without
    the second part all variances would grow for ever.

    Args:
        losses: $L$, squared errors; give twice a cross-entropy for the paper's form of it.
        log_variances: $s$, parameters that the model's optimiser trains too; begin with zeros.
        min_log_variance: A smaller $s$ counts as this one, and its gradient only leads back to it.
            Without a bound, a loss of 0 draws $s$ to minus infinity.
        where: Bools in the form of the losses; a task of False is left out with both its parts.

    Returns:
        The total, and the losses by name, `"0"`, `"1"`, ... for those of an array, which carry no
        gradient and are 0 for a task left out.

    Reference:
        Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
        Semantics, CVPR 2018. Equals LibMTL's `UW`, which begins with -0.5.

    >>> total, terms = uncertainty_weighting(jnp.array([4.0, 1.0]), jnp.zeros(2))
    >>> total
    Array(2.5, dtype=float32)
    >>> log_variances = {"depth": jnp.log(4.0), "edges": jnp.array(0.0)}
    >>> total, terms = uncertainty_weighting(
    ...     {"depth": jnp.array(4.0), "edges": jnp.array(1.0)}, log_variances
    ... )
    >>> total, terms["depth"]  # (1 + log 4 + 1 + 0) / 2
    (Array(1.6931472, dtype=float32), Array(4., dtype=float32))
    """
    _, (values, s) = stack(losses=losses, log_variances=log_variances)
    kept = jnp.ones(values.shape, bool) if where is None else kept_tasks(where, losses)
    values, s = jnp.where(kept, values, 0), jnp.where(kept, s, 0)
    if min_log_variance is not None:
        check_scalar(min_log_variance=min_log_variance)
        least = jnp.asarray(min_log_variance).astype(s.dtype)
        back = jax.lax.stop_gradient(standardized(values, least) > 1)
        held = least + jnp.where(back, s - jax.lax.stop_gradient(s), 0)
        s = jnp.where(kept & (s < least), held, s)
    parts = (standardized(values, s) + s) / 2
    names = names_of(losses) or [str(k) for k in range(len(values))]
    by_name = lambda rows: dict(zip(names, rows, strict=True))
    return jnp.sum(parts), logged(by_name(values), lambda: by_name(parts))


class _Epochs(NamedTuple):
    """The losses of the last epoch, and how many epochs there were."""

    losses: Tree
    epochs: Int[Array, ""]


@uncompiled
def dwa_init(num_tasks: int | Iterable[str]) -> _Epochs:
    """The state of `dynamic_weight_average` before the first epoch.

    Args:
        num_tasks: How many losses there are, or their names.

    Returns:
        The state.

    >>> dwa_init(["depth", "edges"]).epochs
    Array(0, dtype=int32)
    """
    return _Epochs(no_losses(num_tasks), jnp.zeros((), jnp.int32))


@uncompiled
def dynamic_weight_average(
    losses: Tasks, state: _Epochs, *, temperature: Number = 2.0
) -> tuple[Tree, _Epochs]:
    r"""Weights for the next epoch: more for a loss that fell by a smaller factor in the last one.

    $$ w_k = K \frac{e^{r_k / T}}{\sum_j e^{r_j / T}}, \qquad r_k = \frac{L_k(t - 1)}{L_k(t - 2)} $$

    Args:
        losses: $L(t - 1)$, positive, averaged over the epoch that has ended.
        state: From `dwa_init` or the epoch before.
        temperature: $T$; the larger, the closer the weights are to one another.

    Returns:
        Weights of sum $K$ in the form of the losses, without a gradient, and the new state. They
        are 1 after the first epoch; so should they be in it. Where a loss was 0, $r$ is 1.

    Reference:
        Liu et al., End-to-End Multi-Task Learning with Attention, CVPR 2019.

    >>> weights, state = dynamic_weight_average(jnp.array([4.0, 2.0]), dwa_init(2))
    >>> weights
    Array([1., 1.], dtype=float32)
    >>> weights, state = dynamic_weight_average(jnp.array([2.0, 1.0]), state)
    >>> weights  # both losses are half of what they were
    Array([1., 1.], dtype=float32)
    """
    check_scalar(temperature=temperature)
    form, (new, last) = stack(losses=losses, state=state.losses)
    new = jax.lax.stop_gradient(new)
    ratio = jnp.where(last == 0, 1, safe_div(new, last))
    weights = len(new) * jax.nn.softmax(ratio / jnp.asarray(temperature).astype(ratio.dtype))
    weights = jnp.where(state.epochs == 0, 1, weights)
    known = _cast(form(new), state.losses)
    return form(weights), _Epochs(known, state.epochs + 1)


@uncompiled
def gradnorm_loss(
    log_weights: Tasks,
    gradient_norms: Tasks,
    losses: Tasks,
    initial_losses: Tasks,
    *,
    alpha: Number = 1.5,
) -> Float[Array, ""]:
    r"""How far weighted gradient lengths are from where slow tasks have the longer ones.

    $$ \sum_k \left| w_k G_k - \frac{r_k^\alpha}{K} \sum_j w_j G_j \right|, \qquad
        r_k = \frac{L_k / L_k(0)}{\frac{1}{K} \sum_j L_j / L_j(0)}, \qquad
        w = K \operatorname{softmax}(v) $$

    To be minimised over $v$ alone, beside the weighted losses over the model: the second part of
    each difference and everything but $v$ carry no gradient.

    Args:
        log_weights: $v$, trained by an optimiser of their own; begin with zeros.
        gradient_norms: $G$, the length of each unweighted loss's gradient in the last shared layer.
        losses: $L$ of this step.
        initial_losses: $L(0)$ of the first step, positive; $\log C$ for a cross-entropy of C
            classes.
        alpha: $\alpha$, how strongly training rates are pulled together; 0 makes all weighted
            lengths alike.

    Returns:
        A float32 scalar.

    Reference:
        Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
        Networks, ICML 2018. The softmax, as in LibMTL, stands for the authors' rescaling to sum K.

    >>> ones = jnp.ones(2)
    >>> gradnorm_loss(jnp.zeros(2), jnp.array([3.0, 1.0]), ones, ones)  # |3 - 2| + |1 - 2|
    Array(2., dtype=float32)
    """
    check_scalar(alpha=alpha)
    _, (v, *data) = stack(
        log_weights=log_weights,
        gradient_norms=gradient_norms,
        losses=losses,
        initial_losses=initial_losses,
    )
    norms, now, first = jax.lax.stop_gradient(data)
    weighted = len(v) * jax.nn.softmax(v) * norms
    share = safe_div(now, first)
    rate = safe_pow(safe_div(share, jnp.mean(share)), jnp.asarray(alpha).astype(share.dtype))
    aim = jax.lax.stop_gradient(jnp.mean(weighted) * rate)
    return jnp.sum(absolute(weighted - aim))


class _Famo(NamedTuple):
    """Logits of the tasks, the moments and steps of Adam, and what was seen before the step."""

    logits: Tree
    mean: Tree
    square: Tree
    steps: Int[Array, ""]
    log_gaps: Tree
    floor: Tree
    learning_rate: Float[Array, ""]
    weight_decay: Float[Array, ""]


@uncompiled
def famo_init(
    num_tasks: int | Iterable[str], *, learning_rate: Number = 0.025, weight_decay: Number = 1e-3
) -> _Famo:
    """The state of `famo_weights`.

    Args:
        num_tasks: How many losses there are, or their names.
        learning_rate: Of the logits.
        weight_decay: Draws the logits back to equal ones; the authors' code has 0.01.

    Returns:
        The state, in which all tasks are alike.

    >>> famo_init(2).logits
    Array([0., 0.], dtype=float32)
    """
    check_scalar(learning_rate=learning_rate, weight_decay=weight_decay)
    rates = (jnp.array(x, jnp.float32) for x in (learning_rate, weight_decay))
    zeros = no_losses(num_tasks)
    new = lambda: jax.tree.map(jnp.copy, zeros)  # buffers of their own, which can be donated
    return _Famo(zeros, new(), new(), jnp.zeros((), jnp.int32), new(), new(), *rates)


@uncompiled
def famo_weights(losses: Tasks, state: _Famo, *, floor: Any = 0.0) -> tuple[Tree, _Famo]:
    r"""Weights under which one step lowers all losses at about the same relative rate.

    $$ w_k = \frac{1}{c} \frac{z_k}{L_k - b_k + 10^{-8}}, \qquad
        c = \sum_j \frac{z_j}{L_j - b_j + 10^{-8}}, \qquad z = \operatorname{softmax}(v) $$

    Step on the weighted sum, then give the same batch's new losses to `famo_update`. It takes one
    gradient, whatever the number of tasks.

    Args:
        losses: $L$ before the step.
        state: $v$, from `famo_init` or `famo_update`.
        floor: $b$, the least value of each loss: a number, or numbers in the form of the losses. A
            loss below its floor counts as at it.

    Returns:
        Weights of sum 1 in the form of the losses, without a gradient, and the state to be updated.

    Reference:
        Liu et al., FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023, as in the authors'
        code.

    >>> weights, state = famo_weights(jnp.array([1.0, 3.0]), famo_init(2))
    >>> weights  # 1 / 1 to 1 / 3
    Array([0.75, 0.25], dtype=float32)
    """
    if not isinstance(floor, Mapping) and jnp.ndim(floor) == 0:
        check_scalar(floor=floor)
        floor = jax.tree.map(lambda x: jnp.full(jnp.shape(x), floor, jnp.float32), losses)
    form, (values, least, logits) = stack(losses=losses, floor=floor, state=state.logits)
    gaps = _gaps(values, least)
    parts = jax.nn.softmax(jax.lax.stop_gradient(logits)) / gaps
    known = _cast((form(jnp.log(gaps)), form(least)), (state.log_gaps, state.floor))
    return form(parts / jnp.sum(parts)), state._replace(log_gaps=known[0], floor=known[1])


@uncompiled
def famo_update(new_losses: Tasks, state: _Famo) -> _Famo:
    r"""Shift weight to the tasks whose losses fell least in the step just made.

    $$ \delta_k = \log(L_k - b_k + 10^{-8}) - \log(L'_k - b_k + 10^{-8}), \qquad
        g = J^T \delta + \lambda v $$

    with $J$ the Jacobian of the softmax at the logits $v$, which then take a step of Adam along
    $g$.

    Args:
        new_losses: $L'$, of the same batch after the step.
        state: From `famo_weights` at this step.

    Returns:
        The new state.

    Reference:
        Liu et al., FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023. The decay is part of
        the gradient, as in torch's Adam and the authors' code, not of the step, as in AdamW.

    >>> _, state = famo_weights(jnp.array([1.0, 1.0]), famo_init(2))
    >>> famo_update(jnp.array([0.5, 1.0]), state).logits  # the first task fell by half
    Array([-0.025,  0.025], dtype=float32)
    """
    form, (new, before, least, logits) = stack(
        new_losses=new_losses, state=state.log_gaps, floor=state.floor, logits=state.logits
    )
    change = before - jnp.log(_gaps(new, least))
    _, pull_back = jax.vjp(jax.nn.softmax, logits)
    (slope,) = pull_back(change.astype(logits.dtype))
    slope = _cast(form(slope + state.weight_decay * logits), state.logits)
    steps = state.steps + 1
    mean = jax.tree.map(lambda m, g: _BETA * m + (1 - _BETA) * g, state.mean, slope)
    square = jax.tree.map(lambda q, g: _BETA2 * q + (1 - _BETA2) * g**2, state.square, slope)
    seen, seen2 = (-jnp.expm1(steps * math.log(beta)) for beta in (_BETA, _BETA2))
    walk = lambda v, m, q: (
        v - (state.learning_rate * (m / seen) / (jnp.sqrt(q / seen2) + TINY)).astype(v.dtype)
    )
    logits = jax.tree.map(walk, state.logits, mean, square)
    return state._replace(logits=logits, mean=mean, square=square, steps=steps)


def _gaps(values: Array, floor: Array) -> Array:
    return jnp.maximum(jax.lax.stop_gradient(values) - floor, 0) + TINY


def _cast(tree: Tree, like: Tree) -> Tree:
    """In the dtypes of the state, so that it can be carried."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
