"""Losses for classes of very different frequency."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from .._core.case import Case, Draw, draw_binary, draw_labels, draw_normal, draw_probs, draw_uniform
from .._core.checks import check_array, check_integer, check_min_rank, require
from .._core.compiled import compiled
from .._core.labels import class_vectors, is_integer, poison, prepare
from .._core.numerics import box_cox, numbers, safe_div, safe_mul, widen
from .._core.reduce import reduce
from .._core.sharding import one_hot, pick
from .._core.sigmoid import prepare_binary, sigmoid_costs
from .._core.softmax import cross_entropy, neg_log_softmax
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "balanced_binary_cross_entropy",
    "class_balanced_weights",
    "ldam_loss",
    "logit_adjusted_cross_entropy",
    "seesaw_loss",
]


@compiled()
def class_balanced_weights(
    counts: Shaped[Array, "*batch classes"], *, beta: Number = 0.9999
) -> Float[Array, "*batch classes"]:
    r"""Class weights from the effective number of examples, with mean 1; not a loss.

    $$ w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}} $$

    At $\beta = 0$ all classes weigh the same, at $\beta = 1$ they weigh $1 / n_c$. A class without
    examples gets weight 0, and the sum over the classes is always their number.

    Args:
        counts: Examples $n_c$ of each class, whole or fractional, at least 0.
        beta: In `[0, 1]`; the nearer to 1, the more rare classes weigh.

    Returns:
        Weights of the shape of `counts`, for `class_weights`, or as `weights=result[labels]`.

    Reference:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019.

    >>> class_balanced_weights(jnp.array([1, 3]), beta=1.0)
    Array([1.5, 0.5], dtype=float32)
    """
    check_array(counts=counts)
    check_min_rank(1, counts=counts)
    (counts,) = widen(counts)
    (beta,) = numbers(counts, beta=beta)
    require(lambda: counts >= 0, "counts", "values of at least 0")
    require(lambda: (beta >= 0) & (beta <= 1), "beta", "a number in [0, 1]")
    rate = jnp.log(jnp.maximum(beta, jnp.finfo(counts.dtype).tiny))
    inverse = safe_div(jnp.ones_like(counts), box_cox(counts, rate))
    return safe_div(inverse, jnp.mean(inverse, axis=-1, keepdims=True))


@compiled()
def logit_adjusted_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    log_prior: Shaped[Array, " classes"],
    *,
    tau: Number = 1.0,
    ignore_index: int | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy after adding the log-prior of each class, in nats, from 0 up.

    $$ \ell = -\sum_k t_k \log \mathrm{softmax}(z + \tau \log \pi)_k $$

    Train with it and predict with plain `logits`: they then ignore how frequent the classes were.
    A class of log-prior -inf is left out, unless `tau` is 0. An integer label outside
    `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers, or target probabilities of the shape of `logits`.
        log_prior: Logarithm of the frequency or of the count of each class.
        tau: Strength of the adjustment; 0 is cross-entropy.
        ignore_index: Integer label whose units are left out, as by `where`.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Menon et al., Long-tail Learning via Logit Adjustment, ICLR 2021. With `tau=1` it is the
        balanced softmax of Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition,
        NeurIPS 2020.

    >>> log_prior = jnp.log(jnp.array([3.0, 1.0]))
    >>> logit_adjusted_cross_entropy(jnp.zeros((1, 2)), jnp.array([1]), log_prior)  # log 4
    Array(1.3862944, dtype=float32)
    """
    logits, labels, where = prepare(logits, labels, where=where, ignore_index=ignore_index)
    (log_prior,) = class_vectors(logits, log_prior=log_prior)
    (tau,) = numbers(logits, tau=tau)
    absent = log_prior == -jnp.inf
    shift = tau * jnp.where(absent, 0, log_prior)
    shift = jnp.broadcast_to(jnp.where(absent & (tau != 0), -jnp.inf, shift), logits.shape)
    values = cross_entropy(logits + shift, labels)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def ldam_loss(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"] | Shaped[Array, "*batch classes"],
    counts: Shaped[Array, " classes"],
    *,
    max_margin: Number = 0.5,
    scale: Number = 30.0,
    class_weights: Float[ArrayLike, " classes"] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Label-distribution-aware margin loss, in nats, from 0 up: rarer classes get wider margins.

    $$ \ell = -\sum_k w_k\, t_k \log \mathrm{softmax}(s (z - m t))_k, \quad
       m_c = M (\min_j n_j / n_c)^{1/4} $$

    for targets $t$ (one-hot for an integer label) and class weights $w$. A count of 0 is taken
    as 1. An integer label outside `[0, classes)` makes its unit NaN.

    Args:
        logits: Scores, best cosines in `[-1, 1]`, classes last.
        labels: Integers, or target probabilities of the shape of `logits`.
        counts: Training examples $n_c$ of each class.
        max_margin: Margin $M$ of the rarest class, in the unit of `logits`.
        scale: Inverse temperature $s$.
        class_weights: Scales the cost of each class; the mean still divides by the number of units.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS
        2019. Their code divides by the sum of the class weights: `weights=class_weights[labels]`.

    >>> logits, counts = jnp.array([[0.5, 0.0]]), jnp.array([1, 16])
    >>> ldam_loss(logits, jnp.array([0]), counts, scale=1.0)  # margin 0.5: log 2
    Array(0.6931472, dtype=float32)
    """
    logits, labels, where = prepare(logits, labels, where=where)
    (counts,) = class_vectors(logits, counts=counts)
    if class_weights is not None:
        (class_weights,) = class_vectors(logits, class_weights=class_weights)
    max_margin, scale = numbers(logits, max_margin=max_margin, scale=scale)
    counts = jnp.maximum(counts, 1)
    margins = max_margin * jnp.sqrt(jnp.sqrt(jnp.min(counts, initial=jnp.inf) / counts))
    targets = one_hot(labels, logits.shape[-1]) if is_integer(labels) else labels
    shift = jnp.broadcast_to(margins, logits.shape) * targets.astype(logits.dtype)
    values = cross_entropy(scale * (logits - shift), labels, class_weights=class_weights)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def seesaw_loss(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    counts: Shaped[Array, " classes"],
    *,
    p: Number = 0.8,
    q: Number = 2.0,
    eps: Number = 1e-2,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Seesaw loss, in nats, from 0 up: rare classes suffer less from frequent ones.

    $$ \ell = -\log \frac{e^{z_y}}{\sum_j S_{yj} e^{z_j}}, \quad
       S_{yj} = \min\left(1, \frac{N_j}{N_y}\right)^p
                \max\left(1, \frac{\sigma_j}{\max(\sigma_y, \varepsilon)}\right)^q $$

    for softmax probabilities $\sigma$, which carry no gradient, and $S_{yy} = 1$. The first factor
    spares rarer classes $j$, the second undoes it where $j$ is mistaken for the label. A count
    below 1 is taken as 1. A label outside `[0, classes)` makes its unit NaN.

    Args:
        logits: Unnormalised log-probabilities, classes last.
        labels: Integers.
        counts: Training examples $N_j$ of each class, so far or in all.
        p: Strength of the sparing; 0 turns it off.
        q: Strength of the compensation; 0 turns it off.
        eps: Smallest probability of the label in the compensation.

    One unit per row; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, CVPR 2021. mmdetection
        counts the labels in the module and adds two objectness logits.

    >>> seesaw_loss(jnp.zeros((1, 2)), jnp.array([0]), jnp.array([4, 1]), p=0.5)  # log(1 + 1/2)
    Array(0.4054651, dtype=float32)
    """
    check_integer(labels=labels)
    logits, labels, where = prepare(logits, labels, where=where)
    (counts,) = class_vectors(logits, counts=counts)
    p, q, eps = numbers(logits, p=p, q=q, eps=eps)
    require(lambda: eps > 0, "eps", "a number above 0")
    log_counts = jnp.broadcast_to(jnp.log(jnp.maximum(counts, 1)), logits.shape)
    rarer = jax.nn.relu(pick(log_counts, labels)[..., None] - log_counts)
    log_p = -neg_log_softmax(jax.lax.stop_gradient(logits))
    own = jnp.maximum(pick(log_p, labels)[..., None], jnp.log(eps))
    values = cross_entropy(logits - p * rarer + q * jax.nn.relu(log_p - own), labels)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def balanced_binary_cross_entropy(
    logits: Float[Array, " batch *space"],
    labels: Shaped[Array, " batch *space"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Binary cross-entropy that weighs both labels equally within each sample, from 0 up.

    $$ \ell = -b\, y \log \sigma(z) - (1 - b) (1 - y) \log(1 - \sigma(z)), \quad
       b = \frac{\sum (1 - y)}{\sum 1} $$

    with sums over the kept positions of the sample. A sample with one label only costs 0. An
    integer label other than 0 and 1 makes its sample NaN.

    Args:
        logits: Log-odds of label 1, `(batch, *space)` with at least one axis of space.
        labels: Same shape: integers 0 and 1, bools, or shares in `[0, 1]`.

    One unit per position; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch, *space)` if `reduction` is `"none"`.

    Reference:
        Xie and Tu, Holistically-Nested Edge Detection, ICCV 2015, who sum over the positions.
        pytorch-toolbelt's `balanced_binary_cross_entropy_with_logits` counts over the whole batch.

    >>> balanced_binary_cross_entropy(jnp.zeros((1, 4)), jnp.array([[1, 0, 0, 0]]))  # 3/8 log 2
    Array(0.2599302, dtype=float32)
    """
    check_min_rank(2, logits=logits)
    integer = is_integer(jnp.asarray(labels))
    logits, labels = prepare_binary(logits, labels, where)
    if integer:
        labels = poison(labels, (labels == 0) | (labels == 1))
    kept = jnp.ones_like(labels) if where is None else where.astype(labels.dtype)
    space = tuple(range(1, labels.ndim))
    total = lambda x: jnp.sum(x * kept, axis=space, keepdims=True)
    negative, positive = (safe_div(total(y), total(kept)) for y in (1 - labels, labels))
    cost_one, cost_zero = sigmoid_costs(logits)
    values = safe_mul(negative * labels, cost_one) + safe_mul(positive * (1 - labels), cost_zero)
    return reduce(values, where=where, weights=weights, reduction=reduction)


_COUNTS = Draw("C", lambda g, shape, _: g.integers(0, 1000, shape, np.int32), "fixed")
_CLASSES = dict(logits=draw_normal("B T C", scale=2), labels=draw_labels("B T"))
_DENSE = dict(logits=draw_normal("B T C", scale=2), labels=draw_probs("B T C"))
_LOG_PRIOR = dict(log_prior=draw_uniform("C", -5, 0))
_WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0], np.float32)
_PIXELS = dict(logits=draw_normal("B T C", scale=2), labels=draw_binary("B T C"))

CASES = (
    Case(logit_adjusted_cross_entropy, {**_CLASSES, **_LOG_PRIOR}, dict(tau=1.5)),
    Case(logit_adjusted_cross_entropy, {**_DENSE, **_LOG_PRIOR}, dict(tau=0.5), label="dense"),
    Case(
        logit_adjusted_cross_entropy,
        {**_CLASSES, **_LOG_PRIOR},
        dict(ignore_index=2),
        label="ignoring",
        without={
            "reducing": "ignored units leave the denominator, which no array of units can show"
        },
    ),
    Case(ldam_loss, dict(_CLASSES, counts=_COUNTS), dict(max_margin=0.3, scale=5.0)),
    Case(
        ldam_loss,
        dict(_DENSE, counts=_COUNTS),
        dict(scale=2.0, class_weights=_WEIGHTS),
        label="dense",
    ),
    Case(
        seesaw_loss,
        dict(_CLASSES, counts=_COUNTS),
        dict(p=0.5, q=1.5, eps=0.1),
        without={"numerical": "the factors S carry no gradient, by definition"},
    ),
    Case(seesaw_loss, dict(_CLASSES, counts=_COUNTS), dict(p=0.5, q=0.0), label="uncompensated"),
    Case(balanced_binary_cross_entropy, _PIXELS),
    Case(
        balanced_binary_cross_entropy,
        dict(_PIXELS, labels=draw_labels("B T C", classes="L")),
        label="integers",
        sizes={"L": 2},
    ),
)
