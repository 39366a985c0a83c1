"""Losses between features of images: given, or computed by a network of the caller's.

Features are pytrees of arrays `batch *space channels`; one array is the smallest such tree.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from .._core.case import Case, draw_normal, draw_uniform
from .._core.checks import (
    check_float,
    check_min_rank,
    check_same_shape,
    check_scalar,
    check_shape,
)
from .._core.compiled import compiled, uncompiled
from .._core.layers import check_batch, feature_layers, paired
from .._core.numerics import safe_div, safe_norm, unit_vectors, widen
from .._core.reduce import mask, reduce
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "dists_loss",
    "feature_loss",
    "gram_style_loss",
    "lpips_loss",
    "perceptual_loss",
]


@compiled()
def feature_loss(
    pred_features: PyTree[Float[Array, "..."]],
    target_features: PyTree[Shaped[Array, "..."]],
    *,
    layer_weights: PyTree[Number] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared distance of features, a weighted sum over layers of means, from 0.

    $$ \ell = \sum_l \lambda_l \frac{1}{N_l} \sum_i (\hat\phi_{l,i} - \phi_{l,i})^2 $$

    Gradients flow into both sides; stop those of the target by `jax.lax.stop_gradient`.

    Args:
        pred_features: A pytree of layers `(batch, *space, channels)`.
        target_features: The same structure and shapes.
        layer_weights: The same structure, one number for each layer; 1 if None.
        where: Bool array `(batch,)`: layers of several sizes share no single pixels.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Johnson, Alahi and Fei-Fei, Perceptual losses for real-time style transfer and
        super-resolution, ECCV 2016.

    >>> pred, target = {"relu1": jnp.ones((1, 4))}, {"relu1": jnp.zeros((1, 4))}
    >>> feature_loss(pred, target, layer_weights={"relu1": 0.5})
    Array(0.5, dtype=float32)
    """
    both = dict(pred_features=pred_features, target_features=target_features)
    layers = feature_layers(where, rank=2, **both)
    values = _sum([_mean((p - t) ** 2) for p, t in layers], layer_weights, pred_features)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@uncompiled
def perceptual_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    feature_fn: Callable[[Array], Any],
    layer_weights: PyTree[Number] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared distance of the features that a network finds in two images, from 0.

    $$ \ell = \sum_l \lambda_l \frac{1}{N_l} \sum_i (\phi_{l,i}(\hat y) - \phi_{l,i}(y))^2 $$

    Args:
        pred: Images `(batch, *space, channels)`, in the range that `feature_fn` expects.
        target: Same shape and range as `pred`.
        feature_fn: From images to a pytree of layers `(batch, *space, channels)`. It is given the
            dtype of the images and called as it stands, never compiled here: parameters that it
            closes over get gradients, and may change between calls. Call the loss under `jax.jit`.
        layer_weights: The structure of the features, one number for each layer; 1 if None.
        where: Bool array `(batch,)`; the network sees zeros in place of a hidden image.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Johnson, Alahi and Fei-Fei, Perceptual losses for real-time style transfer and
        super-resolution, ECCV 2016. No network comes with this library.

    >>> brightness = lambda images: images.mean((1, 2))
    >>> pred, target = jnp.full((1, 8, 8, 3), 0.5), jnp.zeros((1, 8, 8, 3))
    >>> perceptual_loss(pred, target, feature_fn=brightness)
    Array(0.25, dtype=float32)
    """
    check_float(pred=pred)
    check_min_rank(3, pred=pred)
    check_same_shape(pred=pred, target=target)
    check_batch(where, pred.shape[0])
    pred, target = mask(where, jnp.asarray(pred), jnp.asarray(target).astype(pred.dtype))
    return feature_loss(
        feature_fn(pred),
        feature_fn(target),
        layer_weights=layer_weights,
        where=where,
        weights=weights,
        reduction=reduction,
    )


@compiled()
def gram_style_loss(
    pred_features: PyTree[Float[Array, "..."]],
    target_features: PyTree[Shaped[Array, "..."]],
    *,
    layer_weights: PyTree[Number] | None = None,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Style loss: squared distance of the correlations between channels, from 0.

    $$ \ell = \sum_l \lambda_l \frac{1}{C_l^2} \|\hat G_l - G_l\|_F^2, \quad
    G_l = \frac{F_l^T F_l}{C_l N_l} $$

    for features `F` of N pixels and C channels. Both sides may have different numbers of pixels.

    Args:
        pred_features: A pytree of layers `(batch, *space, channels)`.
        target_features: The same structure, batch and channels.
        layer_weights: The same structure, one number for each layer; 1 if None.
        where: Bool array `(batch,)`: layers of several sizes share no single pixels.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Gatys, Ecker and Bethge, Image style transfer using convolutional neural networks, CVPR
        2016. For the paper's `1 / (4 N^2 M^2)` (N channels, M pixels) of the sum of squares, pass
        weights of `C^2 / 4`.

    >>> pred, target = jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 5, 3, 1))
    >>> gram_style_loss(pred, target)  # (4 / 4 - 0)^2
    Array(1., dtype=float32)
    """
    both = dict(pred_features=pred_features, target_features=target_features)
    layers = feature_layers(where, rank=2, same_space=False, **both)
    values = [_mean(_gram_gap(p, t) ** 2) for p, t in layers]
    values = _sum(values, layer_weights, pred_features)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _gram_gap(p: Array, t: Array) -> Array:
    """Gram matrix of `p` minus that of `t`; of features of one size by one product, exactly 0
    where they are equal.
    """
    if p.shape != t.shape:
        return _products(p, p) - _products(t, t)
    twice = _products(p - t, p + t)
    return (twice + jnp.swapaxes(twice, 1, 2)) / 2


def _products(a: Array, b: Array) -> Array:
    a, b = (x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]) for x in (a, b))
    products = jnp.einsum("bni,bnj->bij", a, b, precision="highest")
    return products / max(math.prod(a.shape[1:]), 1)


@compiled()
def lpips_loss(
    pred_features: PyTree[Float[Array, "..."]],
    target_features: PyTree[Shaped[Array, "..."]],
    linear_weights: PyTree[Shaped[Array, " channels"]],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Learned perceptual image patch similarity, a distance of directions, from 0.

    $$ \ell = \sum_l \frac{1}{N_l} \sum_x \sum_c w_{l,c}
    \left( \frac{\hat\phi_{l,c}(x)}{\|\hat\phi_l(x)\|} - \frac{\phi_{l,c}(x)}{\|\phi_l(x)\|}
    \right)^2 $$

    A zero vector stays 0, with gradient 0.

    Args:
        pred_features: A pytree of layers `(batch, *space, channels)`, such as those of AlexNet.
        target_features: The same structure and shapes.
        linear_weights: The same structure, vectors `(channels,)` of weights from 0 up, such as the
            published ones; none come with this library.
        where: Bool array `(batch,)`: layers of several sizes share no single pixels.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Zhang et al., The unreasonable effectiveness of deep features as a perceptual metric, CVPR
        2018. The package `lpips` adds 1e-10 to the norms.

    >>> pred, target = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 2.0]])
    >>> lpips_loss(pred, target, jnp.array([1.0, 0.5]))  # 1 * 1^2 + 0.5 * 1^2
    Array(1.5, dtype=float32)
    """
    both = dict(pred_features=pred_features, target_features=target_features)
    layers = feature_layers(where, rank=2, **both)
    vectors = _vectors(layers, pred_features, linear_weights=linear_weights)
    values = [
        _mean(jnp.sum(_over_space(w, p) * _turn(p, t) ** 2, axis=-1))
        for (p, t), (w,) in zip(layers, vectors, strict=True)
    ]
    return reduce(
        _sum(values, None, pred_features), where=where, weights=weights, reduction=reduction
    )


def _turn(p: Array, t: Array) -> Array:
    """Unit vector of `p` minus that of `t`, exactly 0 where they are equal."""
    norms = safe_norm(p, keepdims=True), safe_norm(t, keepdims=True)
    empty = (norms[0] == 0) | (norms[1] == 0)
    total = jnp.broadcast_to(norms[0] + norms[1], p.shape)
    longer = jnp.sum((p - t) * safe_div(p + t, total), axis=-1, keepdims=True)  # |p| - |t|
    u, v = unit_vectors(p), unit_vectors(t)
    return jnp.where(empty, u - v, safe_div(2 * (p - t) - longer * (u + v), total))


@compiled()
def dists_loss(
    pred_features: PyTree[Float[Array, "..."]],
    target_features: PyTree[Shaped[Array, "..."]],
    texture_weights: PyTree[Shaped[Array, " channels"]],
    structure_weights: PyTree[Shaped[Array, " channels"]],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Deep image structure and texture similarity, as a loss, from 0.

    $$ \ell = 1 - \sum_{l,c} \left( \alpha_{lc}
    \frac{2 \hat\mu \mu + \epsilon}{\hat\mu^2 + \mu^2 + \epsilon} + \beta_{lc}
    \frac{2 \hat\sigma_{\times} + \epsilon}{\hat\sigma^2 + \sigma^2 + \epsilon} \right) $$

    with means, variances and covariance of each channel over its pixels, `epsilon = 1e-6`, and
    weights divided by the sum of all of them.

    Args:
        pred_features: A pytree of layers `(batch, *space, channels)`; the image is one of them.
        target_features: The same structure and shapes.
        texture_weights: The same structure, vectors `(channels,)` from 0 up: alpha.
        structure_weights: The same structure, vectors `(channels,)` from 0 up: beta.
        where: Bool array `(batch,)`: layers of several sizes share no single pixels.

    One unit per image; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Ding et al., Image quality assessment: unifying structure and texture similarity, IEEE TPAMI
        2020. Equals piq's `DISTS` given its features and weights.

    >>> pred, target = jnp.array([[[0.0], [2.0]]]), jnp.array([[[2.0], [0.0]]])
    >>> one = jnp.ones(1)
    >>> dists_loss(pred, target, one, one)  # the same texture, structure upside down: (0 + 2) / 2
    Array(0.9999995, dtype=float32)
    """
    both = dict(pred_features=pred_features, target_features=target_features)
    layers = feature_layers(where, rank=2, **both)
    vectors = _vectors(
        layers,
        pred_features,
        texture_weights=texture_weights,
        structure_weights=structure_weights,
    )
    total = sum(jnp.sum(a) + jnp.sum(b) for a, b in vectors)
    values = []
    for (p, t), (alpha, beta) in zip(layers, vectors, strict=True):
        (mean_p, var_p), (mean_t, var_t), (apart, var_apart) = map(_moments, (p, t, p - t))
        texture = safe_div(apart**2, mean_p**2 + mean_t**2 + 1e-6)
        structure = safe_div(var_apart, var_p + var_t + 1e-6)
        lost = _over_space(alpha, texture) * texture + _over_space(beta, texture) * structure
        values.append(jnp.sum(lost, axis=-1))
    values = safe_div(_sum(values, None, pred_features), jnp.broadcast_to(total, values[0].shape))
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean and variance of each channel over space: `batch channels`."""
    x = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    mean = jnp.mean(x, axis=1)
    return mean, jnp.mean((x - mean[:, None]) ** 2, axis=1)


def _vectors(layers: list[tuple[Array, Array]], like: Any, **trees: Any) -> list[tuple[Array, ...]]:
    """Vectors over the channels of each layer, in its dtype."""
    found = []
    for (pred, _), row in zip(layers, paired(like, **trees), strict=True):
        check_shape(pred.shape[-1:], **dict(row))
        found.append(tuple(jnp.asarray(v).astype(pred.dtype) for _, v in row))
    return found


def _over_space(vector: Array, like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _mean(values: Array) -> Array:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _sum(values: list[Array], layer_weights: Any, like: Any) -> Array:
    """Sum over layers, weighted by one number for each."""
    (*values,) = widen(*values)
    if layer_weights is not None:
        rows = paired(like, layer_weights=layer_weights)
        check_scalar(**{name: number for ((name, number),) in rows})
        weights = [jnp.asarray(number).astype(values[0].dtype) for ((_, number),) in rows]
        values = [w * v for w, v in zip(weights, values, strict=True)]
    return jnp.sum(jnp.stack(values), axis=0)


def _two_layers(images: Array) -> list[Array]:
    (images,) = widen(images)
    return [images, jnp.tanh(jnp.mean(images, axis=2))]


_PAIR = dict(pred_features=draw_normal("B H W C"), target_features=draw_normal("B H W C"))
_POSITIVE = dict(
    pred_features=draw_uniform("B H W C", 0, 1, kind="real"),
    target_features=draw_uniform("B H W C", 0, 1, kind="real"),
)
_SIZES = dict(H=2, W=3, C=3)

CASES = (
    Case(
        feature_loss,
        _PAIR,
        dict(layer_weights=0.75),
        positions="B",
        sizes=_SIZES,
        zero_at_target=True,
    ),
    Case(
        perceptual_loss,
        dict(pred=draw_normal("B H W C"), target=draw_normal("B H W C")),
        dict(feature_fn=_two_layers, layer_weights=[0.5, 2.0]),
        positions="B",
        sizes=_SIZES,
        zero_at_target=True,
    ),
    Case(
        gram_style_loss,
        _PAIR,
        dict(layer_weights=0.75),
        positions="B",
        sizes=_SIZES,
        zero_at_target=True,
    ),
    Case(
        lpips_loss,
        {**_POSITIVE, "linear_weights": draw_uniform("C", 0, 1)},
        positions="B",
        sizes=_SIZES,
        zero_at_target=True,
    ),
    Case(
        dists_loss,
        {
            **_POSITIVE,
            "texture_weights": draw_uniform("C", 0.1, 1),
            "structure_weights": draw_uniform("C", 0.1, 1),
        },
        positions="B",
        sizes=dict(H=4, W=4, C=2),
        zero_at_target=True,
    ),
)
