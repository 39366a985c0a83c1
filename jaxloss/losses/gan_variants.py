"""More adversarial losses, least squares and relativistic, and what stands beside them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import check_float, check_same_shape
from .._core.compiled import compiled
from .._core.layers import feature_layers
from .._core.numerics import absolute, numbers, widen
from .._core.reduce import mask, reduce
from .._core.samples import prepare_samples, sample_mean
from .._core.sigmoid import sigmoid_costs
from .._core.typing import Number, Reduction, Values, Where
from .._core.windows import any_kept

__all__ = [
    "cycle_consistency_loss",
    "feature_matching_loss",
    "least_squares_discriminator_loss",
    "least_squares_generator_loss",
    "relativistic_discriminator_loss",
    "relativistic_generator_loss",
]


@compiled()
def least_squares_generator_loss(
    fake_logits: Float[Array, "*shape"],
    *,
    real_label: Number = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Half the squared distance of a discriminator's output from its label of real, from 0 up.

    $$ \ell = \tfrac{1}{2} (f - c)^2 $$

    Args:
        fake_logits: Outputs of the discriminator for generated samples, of any shape; no sigmoid.
        real_label: What the generator wants the output to be: c.

    One unit per output; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Mao et al., Least Squares Generative Adversarial Networks, ICCV 2017. The factor 1/2 is the
        paper's and TF-GAN's; many codes, such as CycleGAN's, have none.

    >>> least_squares_generator_loss(jnp.array([3.0]))
    Array(2., dtype=float32)
    """
    (fake,) = _prepare(where, fake_logits=fake_logits)
    (real_label,) = numbers(fake, real_label=real_label)
    values = 0.5 * (fake - real_label) ** 2
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def least_squares_discriminator_loss(
    real_logits: Float[Array, "*shape"],
    fake_logits: Float[Array, "*shape"],
    *,
    real_label: Number = 1.0,
    fake_label: Number = 0.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Half the squared distances of a discriminator's outputs from their labels, from 0 up.

    $$ \ell = \tfrac{1}{2} (r - b)^2 + \tfrac{1}{2} (f - a)^2 $$

    Args:
        real_logits: Outputs for real samples, of any shape; no sigmoid.
        fake_logits: Outputs for generated ones; same shape.
        real_label: Label of real samples: b.
        fake_label: Label of generated samples: a.

    One unit per pair of outputs, the sum of both terms; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Mao et al., Least Squares Generative Adversarial Networks, ICCV 2017. The factor 1/2 is the
        paper's and TF-GAN's; many codes, such as CycleGAN's, have none or another.

    >>> least_squares_discriminator_loss(jnp.array([3.0]), jnp.array([1.0]))  # (4 + 1) / 2
    Array(2.5, dtype=float32)
    """
    real, fake = _prepare(where, real_logits=real_logits, fake_logits=fake_logits)
    real_label, fake_label = numbers(real, real_label=real_label, fake_label=fake_label)
    values = 0.5 * ((real - real_label) ** 2 + (fake - fake_label) ** 2)
    return reduce(values, where=where, weights=weights, reduction=reduction)


@compiled()
def relativistic_generator_loss(
    real_logits: Float[Array, "*shape"],
    fake_logits: Float[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""A generated sample should look more real than a real one, pair by pair; in nats, from 0 up.

    $$ \ell = \log(1 + e^{r - f}) $$

    Args:
        real_logits: Logits of the discriminator for real samples, of any shape.
        fake_logits: Logits for generated ones; same shape.

    One unit per pair of logits; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Jolicoeur-Martineau, The relativistic discriminator, ICLR 2019: its RpGAN, as in Huang et
        al., The GAN is dead; long live the GAN! (R3GAN), NeurIPS 2024. The relativistic average
        GAN, in TF-GAN too, compares with the mean of the other side and adds a second term.

    >>> relativistic_generator_loss(jnp.array([0.7]), jnp.array([0.7]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    real, fake = _prepare(where, real_logits=real_logits, fake_logits=fake_logits)
    return reduce(sigmoid_costs(fake - real)[0], where=where, weights=weights, reduction=reduction)


@compiled()
def relativistic_discriminator_loss(
    real_logits: Float[Array, "*shape"],
    fake_logits: Float[Array, "*shape"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""A real sample should look more real than a generated one, pair by pair; in nats, from 0 up.

    $$ \ell = \log(1 + e^{f - r}) $$

    Args:
        real_logits: Logits of the discriminator for real samples, of any shape.
        fake_logits: Logits for generated ones; same shape.

    One unit per pair of logits; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*shape` if `reduction` is `"none"`.

    Reference:
        Jolicoeur-Martineau, The relativistic discriminator, ICLR 2019: its RpGAN, as in Huang et
        al., The GAN is dead; long live the GAN! (R3GAN), NeurIPS 2024, who add `r1_penalty` and
        `r2_penalty`.

    >>> relativistic_discriminator_loss(jnp.array([0.7]), jnp.array([0.7]))  # log 2
    Array(0.6931472, dtype=float32)
    """
    real, fake = _prepare(where, real_logits=real_logits, fake_logits=fake_logits)
    return reduce(sigmoid_costs(real - fake)[0], where=where, weights=weights, reduction=reduction)


@compiled()
def cycle_consistency_loss(
    pred: Float[Array, "batch *space channels"],
    target: Shaped[Array, "batch *space channels"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean absolute difference of a sample and its way there and back, in its unit, from 0 up.

    $$ \ell = \frac{1}{D} \sum_i |F(G(x))_i - x_i| $$

    over the D kept positions and channels of a sample. The gradient at equality is 0.

    Args:
        pred: The samples translated to the other domain and back, `(batch, *space, channels)`.
        target: The samples; same shape.
        where: Bool array `(batch, *space)`; a sample with nothing kept is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Zhu et al., Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks,
        ICCV 2017. The paper adds both directions, times 10.

    >>> cycle_consistency_loss(jnp.array([[1.0, -3.0]]), jnp.array([[0.0, 0.0]]))  # (1 + 3) / 2
    Array(2., dtype=float32)
    """
    pred, target = prepare_samples(where, pred=pred, target=target)
    values = sample_mean(absolute(pred - target), where)
    return reduce(values, where=any_kept(where), weights=weights, reduction=reduction)


@compiled()
def feature_matching_loss(
    fake_features: PyTree[Float[Array, "batch ..."]],
    real_features: PyTree[Shaped[Array, "batch ..."]],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean absolute difference of a discriminator's features, then the mean over layers; from 0.

    $$ \ell = \frac{1}{L} \sum_{l=1}^L \frac{1}{N_l} \sum_i |\phi_{l,i}(G(z)) - \phi_{l,i}(x)| $$

    The features of real samples carry no gradient.

    Args:
        fake_features: A pytree of layers `(batch, ...)` for generated samples.
        real_features: Those for the real samples in the same places; same structure and shapes.
        where: Bool array `(batch,)`.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Wang et al., High-Resolution Image Synthesis and Semantic Manipulation with Conditional
        GANs (pix2pixHD), CVPR 2018. pix2pixHD and HiFi-GAN add the layers up, multiply by their
        number; HiFi-GAN doubles the sum. Salimans et al., 2016, match the means of the batch.

    >>> fake, real = [jnp.ones((1, 4)), jnp.ones((1, 2))], [jnp.zeros((1, 4)), jnp.ones((1, 2))]
    >>> feature_matching_loss(fake, real)  # (1 + 0) / 2
    Array(0.5, dtype=float32)
    """
    both = dict(fake_features=fake_features, real_features=real_features)
    layers = [
        sample_mean(absolute(fake - jax.lax.stop_gradient(real)), None)
        for fake, real in feature_layers(where, rank=1, **both)
    ]
    (*layers,) = widen(*layers)
    values = jnp.mean(jnp.stack(layers), axis=0)
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _prepare(where: Where | None, **outputs: Array) -> tuple[Array, ...]:
    check_float(**outputs)
    check_same_shape(**outputs)
    return mask(where, *widen(*outputs.values()))


_FAKE = dict(fake_logits=draw_normal("B T"))
_BOTH = dict(real_logits=draw_normal("B T"), fake_logits=draw_normal("B T"))
_FIXED = Draw("B T D", lambda g, shape, _: g.integers(-16, 17, shape) / 8, "fixed")

CASES = (
    Case(least_squares_generator_loss, _FAKE, dict(real_label=0.9)),
    Case(least_squares_discriminator_loss, _BOTH, dict(real_label=0.9, fake_label=-0.2)),
    Case(relativistic_generator_loss, _BOTH),
    Case(relativistic_discriminator_loss, _BOTH),
    Case(
        cycle_consistency_loss,
        dict(pred=draw_normal("B H W C"), target=draw_normal("B H W C")),
        positions="B H W",
        sizes=dict(H=2, W=3, C=2),
        zero_at_target=True,
    ),
    Case(feature_matching_loss, dict(fake_features=draw_normal("B T D"), real_features=_FIXED)),
)
