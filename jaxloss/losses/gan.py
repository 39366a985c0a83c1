"""Adversarial losses of generators and discriminators: original, hinge and Wasserstein."""

import jax
from jaxtyping import Array, Float

from .._core.case import Case, draw_normal
from .._core.checks import check_float, check_same_shape, require
from .._core.compiled import compiled
from .._core.numerics import numbers, widen
from .._core.reduce import mask, reduce
from .._core.sigmoid import binary_cross_entropy, sigmoid_costs
from .._core.typing import Number, Reduction, Values, Where

__all__ = [
    "gan_discriminator_loss",
    "gan_hinge_discriminator_loss",
    "gan_hinge_generator_loss",
    "minimax_generator_loss",
    "nonsaturating_generator_loss",
    "wasserstein_critic_loss",
    "wasserstein_generator_loss",
]


@compiled()
def nonsaturating_generator_loss(
    fake_logits: Float[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Non-saturating loss of a generator: its samples should pass for real, in nats, from 0 up.

    $$ \ell = -\log D(G(z)) = \log(1 + e^{-f}) $$

    Args:
        fake_logits: Logits of the discriminator for generated samples, of any shape.

    One unit per logit; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Goodfellow et al., Generative Adversarial Nets, NeurIPS 2014. Equals TF-GAN's
        `modified_generator_loss`.

    >>> nonsaturating_generator_loss(jnp.array([0.0]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    (fake,) = _prepare(where, fake_logits=fake_logits)
    return reduce(sigmoid_costs(fake)[0], where=where, weights=weights, reduction=reduction)


@compiled()
def minimax_generator_loss(
    fake_logits: Float[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Loss of a generator in the minimax game, in nats, at most 0.

    $$ \ell = \log(1 - D(G(z))) = -\log(1 + e^f) $$

    Its gradient vanishes where the discriminator is sure of a fake; see
    `nonsaturating_generator_loss`.

    Args:
        fake_logits: Logits of the discriminator for generated samples, of any shape.

    One unit per logit; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Goodfellow et al., Generative Adversarial Nets, NeurIPS 2014. TF-GAN's
        `minimax_generator_loss` adds a term of the real samples, constant for the generator.

    >>> minimax_generator_loss(jnp.array([0.0]))  # -log 2
    Array(-0.6931472, dtype=float32)
    """
    (fake,) = _prepare(where, fake_logits=fake_logits)
    return reduce(-sigmoid_costs(fake)[1], where=where, weights=weights, reduction=reduction)


@compiled()
def gan_discriminator_loss(
    real_logits: Float[Array, "*shape"],
    fake_logits: Float[Array, "*shape"],
    *,
    label_smoothing: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Cross-entropy of a discriminator between real and generated samples, in nats, from 0 up.

    $$ \ell = -(1 - \epsilon) \log D(x) - \epsilon \log(1 - D(x)) - \log(1 - D(G(z))) $$

    Args:
        real_logits: Logits for real samples, of any shape.
        fake_logits: Logits for generated ones; same shape.
        label_smoothing: The target of real samples is one minus this, that of generated ones stays
            0: smoothing of one side.

    One unit per pair of logits, the sum of both terms; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Goodfellow et al., Generative Adversarial Nets, NeurIPS 2014; smoothing: Salimans et al.,
        Improved Techniques for Training GANs, NeurIPS 2016. TF-GAN's `label_smoothing`, 0.25 unless
        told, moves the target half as far, towards 1/2: it is twice the one here.

    >>> gan_discriminator_loss(jnp.array([0.0]), jnp.array([0.0]))  # 2 log 2
    Array(1.3862944, dtype=float32)
    """
    real, fake = _prepare(where, real_logits=real_logits, fake_logits=fake_logits)
    if isinstance(label_smoothing, (int, float)) and label_smoothing == 0:
        of_real = sigmoid_costs(real)[0]
    else:
        (smoothing,) = numbers(real, label_smoothing=label_smoothing)
        require(lambda: (smoothing >= 0) & (smoothing <= 1), "label_smoothing", "values in [0, 1]")
        of_real = binary_cross_entropy(real, 1 - smoothing)
    values = of_real + sigmoid_costs(fake)[1]
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def gan_hinge_generator_loss(
    fake_logits: Float[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Loss of a generator against a discriminator trained by the hinge; any number.

    $$ \ell = -f $$

    Args:
        fake_logits: Outputs of the discriminator for generated samples, of any shape.

    One unit per output; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Lim and Ye, Geometric GAN, 2017; Miyato et al., Spectral Normalization for Generative
        Adversarial Networks, ICLR 2018.

    >>> gan_hinge_generator_loss(jnp.array([1.5]))
    Array(-1.5, dtype=float32)
    """
    (fake,) = _prepare(where, fake_logits=fake_logits)
    return reduce(-fake, where=where, weights=weights, reduction=reduction)


@compiled()
def gan_hinge_discriminator_loss(
    real_logits: Float[Array, "*shape"],
    fake_logits: Float[Array, "*shape"],
    *,
    margin: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Hinge loss of a discriminator: real above the margin, generated below minus it; from 0 up.

    $$ \ell = \max(0, m - r) + \max(0, m + f) $$

    The gradient at a margin is 0.

    Args:
        real_logits: Outputs for real samples, of any shape.
        fake_logits: Outputs for generated ones; same shape.
        margin: How far from 0 an output has to be.

    One unit per pair of outputs, the sum of both terms; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Lim and Ye, Geometric GAN, 2017; Miyato et al., Spectral Normalization for Generative
        Adversarial Networks, ICLR 2018.

    >>> gan_hinge_discriminator_loss(jnp.array([0.25]), jnp.array([-2.0]))
    Array(0.75, dtype=float32)
    """
    real, fake = _prepare(where, real_logits=real_logits, fake_logits=fake_logits)
    (margin,) = numbers(real, margin=margin)
    values = jax.nn.relu(margin - real) + jax.nn.relu(margin + fake)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def wasserstein_generator_loss(
    fake_scores: Float[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Loss of a generator against a Wasserstein critic; any number.

    $$ \ell = -f $$

    Args:
        fake_scores: Scores of the critic for generated samples, of any shape.

    One unit per score; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Arjovsky, Chintala and Bottou, Wasserstein Generative Adversarial Networks, ICML 2017.

    >>> wasserstein_generator_loss(jnp.array([1.5]))
    Array(-1.5, dtype=float32)
    """
    (fake,) = _prepare(where, fake_scores=fake_scores)
    return reduce(-fake, where=where, weights=weights, reduction=reduction)


@compiled()
def wasserstein_critic_loss(
    real_scores: Float[Array, "*shape"],
    fake_scores: Float[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Loss of a Wasserstein critic: minus an estimate of the distance; any number.

    $$ \ell = f - r $$

    The critic has to be Lipschitz: add `gradient_penalty`, or clip its parameters.

    Args:
        real_scores: Scores of real samples, of any shape.
        fake_scores: Scores of generated ones; same shape.

    One unit per pair of scores; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Arjovsky, Chintala and Bottou, Wasserstein Generative Adversarial Networks, ICML 2017.
        Equals TF-GAN's `wasserstein_discriminator_loss`.

    >>> wasserstein_critic_loss(jnp.array([2.0]), jnp.array([0.5]))
    Array(-1.5, dtype=float32)
    """
    real, fake = _prepare(where, real_scores=real_scores, fake_scores=fake_scores)
    return reduce(fake - real, where=where, weights=weights, reduction=reduction)


def _prepare(where: Where | None, **outputs: Array) -> tuple[Array, ...]:
    check_float(**outputs)
    check_same_shape(**outputs)
    return mask(where, *widen(*outputs.values()))


_FAKE = dict(fake_logits=draw_normal("B T"))
_BOTH = dict(real_logits=draw_normal("B T"), fake_logits=draw_normal("B T"))

CASES = (
    Case(nonsaturating_generator_loss, _FAKE),
    Case(minimax_generator_loss, _FAKE),
    Case(gan_discriminator_loss, _BOTH),
    Case(gan_discriminator_loss, _BOTH, dict(label_smoothing=0.1), label="smooth"),
    Case(gan_hinge_generator_loss, _FAKE),
    Case(gan_hinge_discriminator_loss, _BOTH, dict(margin=0.7)),
    Case(wasserstein_generator_loss, dict(fake_scores=draw_normal("B T"))),
    Case(
        wasserstein_critic_loss,
        dict(real_scores=draw_normal("B T"), fake_scores=draw_normal("B T")),
    ),
)
