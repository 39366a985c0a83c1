"""The bi-tempered logistic loss: a bounded cost of the label, a heavy-tailed softmax."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from .._core.case import Case, draw_labels, draw_normal, draw_probs
from .._core.checks import message, require
from .._core.compiled import compiled
from .._core.labels import is_integer, prepare
from .._core.numerics import absolute, box_cox, expm1, horner, numbers, power_of_log
from .._core.reduce import reduce
from .._core.sharding import one_hot
from .._core.typing import Number, Reduction, Values, Where

__all__ = ["bi_tempered_logistic_loss"]


@compiled("num_iters")
def bi_tempered_logistic_loss(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    *,
    t1: Number = 1.0,
    t2: Number = 1.0,
    label_smoothing: Number = 0.0,
    num_iters: int = 10,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Bi-tempered logistic loss, from 0 up; bounded by `1 / (1 - t1)` for `t1` below 1.

    $$ \ell = \sum_k y_k (\log_{t_1} y_k - \log_{t_1} p_k)
       - \frac{y_k^{2 - t_1} - p_k^{2 - t_1}}{2 - t_1}, \quad
       p_k = \exp_{t_2}(z_k - \lambda), \quad \sum_k p_k = 1 $$

    with $\log_t u = (u^{1 - t} - 1) / (1 - t)$, its inverse $\exp_t$, and $y$ the target (one-hot
    for an integer label) smoothed to $(1 - s)\, y + s / K$. Temperature 1 is the logarithm:
    $t_1 = t_2 = 1$ is softmax cross-entropy minus the entropy of the target. A wrong label far
    from the boundary costs little more as $t_1$ falls below 1, and one near it pulls less as
    $t_2$ rises above 1. An integer label outside `[0, classes)` makes its unit NaN.

    Derivatives of every order come from the equation that defines $\lambda$, not from its solver.
    Where the derivative with respect to a target of 0 is infinite, for `t1` from 1 up, it is taken
    as 0.

    Args:
        logits: Activations $z$, classes last. A class of -inf has probability 0.
        labels: Integers, or target probabilities of the shape of `logits`.
        t1: Temperature of the loss, in `[0, 2)`; below 1 the loss is bounded.
        t2: Temperature of the softmax, at least 0; above 1 it has heavy tails, below 1 it gives
            unlikely classes probability 0.
        label_smoothing: Share of every target that is spread evenly over all classes.
        num_iters: Newton steps of the solver. They converge from one side; 5 are enough for `t2`
            between 0.8 and 1.5, 10 for any other and some thousand classes.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Raises:
        ValueError: If `num_iters` is not a positive integer.

    Reference:
        Amid et al., Robust Bi-Tempered Logistic Loss Based on Bregman Divergences, NeurIPS 2019.
        The authors' code solves by fixed point and bisection, in more steps; its `label_smoothing`
        is ours times (K - 1) / K.

    >>> logits, labels = jnp.array([[0.0, 0.0]]), jnp.array([1])
    >>> bi_tempered_logistic_loss(logits, labels, t1=0.0, t2=2.0)  # 1/2 - 3/8 + 1/8
    Array(0.25, dtype=float32)
    """
    if isinstance(num_iters, bool) or not isinstance(num_iters, (int, np.integer)) or num_iters < 1:
        raise ValueError(message("num_iters", "a positive integer", repr(num_iters)))
    logits, labels, where = prepare(logits, labels, where=where)
    t1, t2, smoothing = numbers(logits, t1=t1, t2=t2, label_smoothing=label_smoothing)
    require(lambda: (t1 >= 0) & (t1 < 2), "t1", "a number in [0, 2)")
    require(lambda: t2 >= 0, "t2", "a number of at least 0")
    if is_integer(labels):
        labels = one_hot(labels, logits.shape[-1]).astype(logits.dtype)
    labels = (1 - smoothing) * labels + smoothing / logits.shape[-1]
    log_p = _log_tempered_softmax(logits, 1 - t2, int(num_iters))
    values = jnp.sum(_divergence(labels, log_p, 1 - t1), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _log_tempered_softmax(logits: Array, c: Array, num_iters: int) -> Array:
    """Tempered softmax of temperature 1 - c as log p, from logits relative to the largest."""
    top = _top(logits)
    largest = jnp.sum(jnp.where(top, logits, 0), axis=-1, keepdims=True)
    z = jnp.where(top, 0, logits - largest)
    return _log_exp(z - _normaliser(z, c, num_iters), c)[0]


def _top(z: Array) -> Array:
    return one_hot(jnp.argmax(jax.lax.stop_gradient(z), axis=-1), z.shape[-1])


def _log_exp(x: Array, c: Array) -> tuple[Array, Array]:
    """For t = 1 - c, log exp_t(x) = log(1 + c x) / c (x at c = 0), and its derivative in x.

    Where 1 + c x <= 0 the logarithm is -inf and the derivative is taken as 0.
    """
    gone = (x == -jnp.inf) | (c * x <= -1)
    x = jnp.where(gone, 0, x)
    u = c * x
    near = jnp.abs(u) < 0.01
    series = horner(_LOG1P_OVER_X, jnp.where(near, u, 0)) * jnp.where(near, x, 0)
    exact = jnp.log1p(jnp.where(near, 0, u)) / jnp.where(near, 1, c)
    value = jnp.where(near, series, exact)
    return jnp.where(gone, -jnp.inf, value), jnp.where(gone, 0, 1 / (1 + u))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _normaliser(z: Array, c: Array, num_iters: int) -> Array:
    """The root of sum_k exp_t(z_k - lambda) = 1 for logits whose largest is 0.

    Newton's method on log_t of the sum. It is convex and falling in lambda, so that the steps
    from 0 never overshoot, and straight for equal logits and for t = 1, where one step is exact.
    """

    def step(_: Any, root: Array) -> Array:
        excess, slope = _sums(z, c, root)
        log_sum = jnp.log1p(excess)
        return root + box_cox(log_sum, c) * jnp.exp((1 - c) * log_sum) / slope

    return jax.lax.fori_loop(0, num_iters, step, jnp.max(z, axis=-1, keepdims=True))


@_normaliser.defjvp
def _normaliser_jvp(num_iters: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    z, c = primals
    root = _normaliser(z, c, num_iters)
    (_, slope), (moved, _) = jax.jvp(lambda z, c: _sums(z, c, root), primals, tangents)
    return root, moved / slope


def _sums(z: Array, c: Array, root: Array) -> tuple[Array, Array]:
    """For p = exp_t(z - root), sum(p) - 1 and sum(p^t), how fast the former falls in the root.

    The largest enters by expm1, so that nothing cancels where it is almost 1.
    """
    top = _top(z)
    log_p, growth = _log_exp(z - root, c)
    p = jnp.exp(log_p)
    largest = jnp.sum(jnp.where(top, log_p, 0), axis=-1, keepdims=True)
    others = jnp.sum(jnp.where(top, 0, p), axis=-1, keepdims=True)
    return others + expm1(largest), jnp.sum(p * growth, axis=-1, keepdims=True)


def _divergence(y: Array, log_p: Array, c: Array) -> Array:
    """For t = 1 - c, y (log_t y - log_t p) - (y^(1 + c) - p^(1 + c)) / (1 + c), at least 0.

    With r = log p - log y it is y^(1 + c) times the integral of exp(c s) (exp(s) - 1) from 0 to
    r, which does not cancel near r = 0; seen from p instead of y it does not overflow for r > 0.
    """
    absent = y == 0
    log_y = jnp.log(jnp.where(absent, 1, y))
    r = jnp.where(absent, 0, log_p - log_y)
    from_y, from_p = jnp.exp((1 + c) * log_y), power_of_log(log_p, 1 + c)
    near = jnp.abs(r) < 0.5
    series = from_y * _integral(jnp.where(near, r, 0), c)
    size = -jnp.where(near, 1, absolute(r))
    a, b = box_cox(size, c), box_cox(size, 1 + c)
    far = jnp.where(r > 0, from_p * (jnp.exp(size) * a - b), from_y * (b - a))
    # At y = 0 the derivative in y is -p^c / c; it is infinite, and taken as 0, where c <= 0.
    steep = c <= 0
    slope = jnp.where(steep, 0, -power_of_log(log_p, c) / jnp.where(steep, 1, c))
    return jnp.where(absent, from_p / (1 + c) + y * slope, jnp.where(near, series, far))


def _integral(r: Array, c: Array) -> Array:
    """The integral of exp(c s) (exp(s) - 1) from 0 to r for |r| < 1/2, as a series."""
    coefficients, difference, power = [], jnp.ones_like(c), c  # (1 + c)^n - c^n and c^n
    for n in range(2, 20):
        coefficients.append(difference / float(math.factorial(n)))
        difference, power = (1 + c) * difference + power, power * c
    return r * r * horner(coefficients, r)


_LOG1P_OVER_X = [(-1) ** k / (k + 1) for k in range(10)]

_CLASSES = dict(logits=draw_normal("B T C", scale=2), labels=draw_labels("B T"))
_DENSE = dict(logits=draw_normal("B T C", scale=2), labels=draw_probs("B T C"))

CASES = (
    Case(bi_tempered_logistic_loss, _CLASSES, dict(t1=0.8, t2=1.4)),
    Case(bi_tempered_logistic_loss, _CLASSES, dict(t1=1.0, t2=1.0), label="at_one"),
    Case(
        bi_tempered_logistic_loss,
        _DENSE,
        dict(t1=0.3, t2=0.6, label_smoothing=0.1),
        label="narrow",
    ),
)
