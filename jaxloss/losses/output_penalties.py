"""Penalties on what a network puts out: its activations, how sure it is, and its slope."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._core.case import Case, draw_normal
from .._core.checks import (
    check_axis,
    check_float,
    check_min_rank,
    check_option,
    check_shape,
    check_where,
    message,
)
from .._core.compiled import compiled, uncompiled
from .._core.numerics import absolute, expm1, expm1_excess, numbers, safe_div, safe_mul, widen
from .._core.reduce import mask, reduce, unit_weights
from .._core.samples import sample_sum
from .._core.softmax import neg_log_softmax
from .._core.terms import Axis, add_up
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "activity_penalty",
    "entropy_loss",
    "information_maximization_loss",
    "input_gradient_penalty",
    "pseudo_label",
]


@compiled("order")
def activity_penalty(
    activations: Float[Array, "*shape"],
    *,
    order: int = 2,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Square, or size, of each activation, from 0 up: keeps hidden layers small or sparse.

    $$ \ell = |a|^q $$

    Args:
        activations: Outputs of a layer, of any shape.
        order: $q$: 2 for the square; 1 for the size, with gradient 0 at 0.

    One unit per element; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Merity, McCann and Socher, Revisiting Activation Regularization for Language RNNs, ICML
        Workshop 2017. Keras' `ActivityRegularization` adds up over all but the batch.

    >>> activity_penalty(jnp.array([1.0, -3.0])), activity_penalty(jnp.array([1.0, -3.0]), order=1)
    (Array(5., dtype=float32), Array(2., dtype=float32))
    """
    check_float(activations=activations)
    check_option((1, 2), order=order)
    (a,) = mask(where, *widen(activations))
    values = absolute(a) if order == 1 else jnp.square(a)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis")
def entropy_loss(
    logits: Float[Array, "*batch classes"],
    *,
    axis: int = -1,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Entropy of the softmax, in nats, in `[0, log classes]`: draws predictions to certainty.

    $$ \ell = -\sum_k p_k \log p_k $$

    For examples without labels. It has gradient 0 both where all classes are alike and where one of
    them is certain.

    Args:
        logits: Unnormalised log-probabilities, classes on `axis`. A class of -inf costs nothing.
        axis: Where the classes are.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Grandvalet and Bengio, Semi-supervised Learning by Entropy Minimization, NIPS 2004. Minus
        `confidence_penalty`.

    >>> entropy_loss(jnp.zeros((1, 2)))  # log 2
    Array(0.6931472, dtype=float32)
    """
    nll = neg_log_softmax(_rows(logits, axis, where))
    values = jnp.sum(safe_mul(jnp.exp(-nll), nll), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis_name")
def information_maximization_loss(
    logits: Float[Array, "n classes"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
    axis_name: Axis = None,
) -> Array:
    r"""Minus the information that predictions hold about which example it is, in nats, at most 0.

    $$ \ell_i = -\mathrm{KL}(p_i \| \bar p), \quad \bar p = \frac{\sum_i w_i p_i}{\sum_i w_i} $$

    Its mean is the mean entropy of the predictions minus the entropy of their mean, and at least
    minus log classes: each prediction is to be certain, and all classes are to be used alike.

    Args:
        logits: Unnormalised log-probabilities, classes last. A class of -inf has probability 0.
        axis_name: Mapped axis whose devices hold parts of the batch; their predictions are averaged
            too.

    One unit per example; see `jaxloss.reduce`. The mean prediction counts `weights`.

    Returns:
        A float32 scalar, or `(n,)` if `reduction` is `"none"`.

    Reference:
        Krause, Perona and Gomes, Discriminative Clustering by Regularized Information Maximization,
        NIPS 2010; Liang, Hu and Feng, Do We Really Need to Access the Source Data?, ICML 2020.

    >>> information_maximization_loss(jnp.array([[1e4, 0.0], [0.0, 1e4]]))  # 0 - log 2
    Array(-0.6931472, dtype=float32)
    """
    check_float(logits=logits)
    if jnp.ndim(logits) != 2:
        raise ValueError(message("logits", "shape (n, classes)", f"shape {jnp.shape(logits)}"))
    nll = neg_log_softmax(_rows(logits, -1, where))
    counts = unit_weights(nll[:, 0], where, weights)[:, None]
    p = jnp.exp(-nll)
    over_all = lambda x: add_up(jnp.sum(x, axis=0, keepdims=True), axis_name)
    mean = safe_div(over_all(counts * p), over_all(counts))
    values = -jnp.sum(_divergences(nll, p, mean), axis=-1)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@uncompiled
def input_gradient_penalty(
    fn: Callable[[Array], Array],
    x: Float[Array, "batch ..."],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared length of the gradient of a function in its inputs, from 0 up: flat is robust.

    $$ \ell = |\nabla_x f(x)|^2 $$

    Args:
        fn: From inputs to a score or a loss of each, `(batch,)` or `(batch, ...)`, which are added
            up; each input by itself. It is given float32 or wider, and called as it stands, never
            compiled here: parameters that it closes over get gradients.
        x: Inputs `(batch, ...)`.
        where: Bool array `(batch,)`; `fn` sees zeros in place of a hidden input.

    One unit per input; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Drucker and LeCun, Improving Generalization Performance Using Double Backpropagation, IEEE
        Transactions on Neural Networks 1992. Twice `r1_penalty`.

    >>> input_gradient_penalty(lambda x: 3 * x[:, 0] + 4 * x[:, 1], jnp.zeros((1, 2)))
    Array(25., dtype=float32)
    """
    check_float(x=x)
    check_min_rank(1, x=x)
    if where is not None:
        check_where(where)
        check_shape(jnp.shape(x)[:1], where=where)

    def total(x: Array) -> Array:
        scores = fn(x)
        check_float(**{"fn(x)": scores})
        if jnp.shape(scores)[:1] != x.shape[:1]:
            expected = f"a batch of {x.shape[0]}"
            raise ValueError(message("fn(x)", expected, f"shape {jnp.shape(scores)}"))
        return jnp.sum(scores)

    values = sample_sum(jnp.square(jax.grad(total)(*mask(where, *widen(x)))))
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled("axis")
def pseudo_label(
    logits: Float[Array, "*batch classes"], *, threshold: Number = 0.95, axis: int = -1
) -> tuple[Int[Array, "*batch"], Bool[Array, "*batch"]]:
    """The likeliest class of each row, and whether it is likely enough to learn from.

    Args:
        logits: Unnormalised log-probabilities, classes on `axis`.
        threshold: The probability from which on a row counts.
        axis: Where the classes are.

    Returns:
        Integer labels and a mask, without a gradient, for any loss that takes `labels` and `where`.
        A row that holds a NaN does not count.

    Reference:
        Lee, Pseudo-Label, ICML Workshop 2013; with a threshold as in Sohn et al., FixMatch, NeurIPS
        2020, whose `squared_error` or cross-entropy is that of another view of the same example.

    >>> pseudo_label(jnp.array([[0.0, 9.0], [0.0, 1.0]]))
    (Array([1, 1], dtype=int32), Array([ True, False], dtype=bool))
    """
    rows = jax.lax.stop_gradient(_rows(logits, axis, None))
    (threshold,) = numbers(rows, threshold=threshold)
    labels = jnp.argmax(rows, axis=-1).astype(jnp.int32)
    return labels, jnp.exp(-jnp.min(neg_log_softmax(rows), axis=-1)) >= threshold


def _rows(logits: Array, axis: int, where: Where | None) -> Array:
    """Logits checked, classes last, masked and widened."""
    check_float(logits=logits)
    check_min_rank(1, logits=logits)
    axis = check_axis(axis, jnp.ndim(logits))
    (wide,) = widen(logits)
    (rows,) = mask(where, jnp.moveaxis(wide, axis, -1))
    return rows


def _divergences(nll: Array, p: Array, mean: Array) -> Array:
    """Terms p log(p / m) - p + m of the divergence of each row from the mean, each at least 0."""
    seen = (nll < jnp.inf) & (mean > 0)
    log_mean = jnp.log(jnp.where(mean > 0, mean, 1))
    r = jnp.where(seen, -jnp.where(seen, nll + log_mean, 0), 0)  # log(p / m)
    near = jnp.abs(r) < 0.5
    close = p * expm1_excess(-jnp.where(near, r, 0))
    far = mean * (r * jnp.exp(r) - expm1(r))
    return jnp.where(seen, jnp.where(near, close, far), mean)


def _bowl(x: Array) -> Array:
    return jnp.sum(x**2 + 0.5 * x * jnp.roll(x, 1, axis=1), axis=1)


_LOGITS = dict(logits=draw_normal("B T C", scale=2))

CASES = (
    Case(activity_penalty, dict(activations=draw_normal("B D"))),
    Case(activity_penalty, dict(activations=draw_normal("B D")), dict(order=1), label="sizes"),
    Case(entropy_loss, _LOGITS),
    Case(entropy_loss, _LOGITS, dict(axis=1), label="axis", positions="B C"),
    Case(
        information_maximization_loss,
        dict(logits=draw_normal("B C", scale=2)),
        coupled=True,
        without={"microbatches": "the mean prediction is that of the whole batch"},
    ),
    Case(
        input_gradient_penalty,
        dict(x=draw_normal("B D")),
        sizes=dict(D=2),
        functions=dict(fn=_bowl),
    ),
)
