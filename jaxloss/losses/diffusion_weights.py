"""Weights of noise levels, to pass as `timestep_weight`: one number for each entry."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._core.checks import check_float, require
from .._core.compiled import compiled
from .._core.numerics import numbers, widen
from .._core.typing import Number

__all__ = [
    "cosmap_weight",
    "edm_weight",
    "logit_normal_density_weight",
    "min_snr_epsilon_weight",
    "min_snr_velocity_weight",
    "min_snr_x0_weight",
    "p2_epsilon_weight",
    "sigma_sqrt_weight",
]


@compiled()
def min_snr_epsilon_weight(snr: Float[Array, "*shape"], *, gamma: Number = 5.0) -> Array:
    r"""Min-SNR weight of a loss on predicted noise, in `(0, 1]`.

    $$ w = \min(\mathrm{SNR}, \gamma) / \mathrm{SNR} $$

    At SNR 0, the end of a schedule of zero terminal SNR, it is the limit 1.

    Args:
        snr: `alpha^2 / sigma^2`, from 0 to infinity.
        gamma: SNR above which the weight falls.

    Returns:
        The shape of `snr`, in float32 or wider.

    Reference:
        Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, ICCV 2023.
        diffusers' training scripts compute 0/0 at SNR 0.

    >>> min_snr_epsilon_weight(jnp.array([0.0, 2.0, 10.0]))
    Array([1. , 1. , 0.5], dtype=float32)
    """
    snr, gamma = _prepare(snr, gamma=gamma)
    above = snr > gamma
    return jnp.where(above, gamma / jnp.where(above, snr, 1), 1)


@compiled()
def min_snr_x0_weight(snr: Float[Array, "*shape"], *, gamma: Number = 5.0) -> Array:
    r"""Min-SNR weight of a loss on the predicted clean sample, in `[0, gamma]`.

    $$ w = \min(\mathrm{SNR}, \gamma) $$

    Args:
        snr: `alpha^2 / sigma^2`, from 0 to infinity.
        gamma: Largest weight.

    Returns:
        The shape of `snr`, in float32 or wider.

    Reference:
        Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, ICCV 2023.

    >>> min_snr_x0_weight(jnp.array([0.0, 2.0, 10.0]))
    Array([0., 2., 5.], dtype=float32)
    """
    snr, gamma = _prepare(snr, gamma=gamma)
    return jnp.where(snr > gamma, gamma, snr)


@compiled()
def min_snr_velocity_weight(snr: Float[Array, "*shape"], *, gamma: Number = 5.0) -> Array:
    r"""Min-SNR weight of a loss on the predicted velocity, in `[0, 1)`.

    $$ w = \min(\mathrm{SNR}, \gamma) / (\mathrm{SNR} + 1) $$

    Args:
        snr: `alpha^2 / sigma^2` of a schedule whose squares add up to 1, from 0 to infinity.
        gamma: SNR above which the weight falls.

    Returns:
        The shape of `snr`, in float32 or wider.

    Reference:
        Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, ICCV 2023.

    >>> min_snr_velocity_weight(jnp.array([0.0, 3.0, 19.0]))  # 0, 3 / 4, 5 / 20
    Array([0.  , 0.75, 0.25], dtype=float32)
    """
    snr, gamma = _prepare(snr, gamma=gamma)
    return jnp.where(snr > gamma, gamma, snr) / (snr + 1)


@compiled()
def p2_epsilon_weight(
    snr: Float[Array, "*shape"], *, k: Number = 1.0, gamma: Number = 1.0
) -> Array:
    r"""Perception-prioritised weight of a loss on predicted noise: less for clean samples.

    $$ w = 1 / (k + \mathrm{SNR})^\gamma $$

    Args:
        snr: `alpha^2 / sigma^2`, from 0 to infinity.
        k: Keeps the weight finite at SNR 0; above 0.
        gamma: How fast it falls; 0 is no weight.

    Returns:
        The shape of `snr`, in float32 or wider.

    Reference:
        Choi et al., Perception Prioritized Training of Diffusion Models, CVPR 2022.

    >>> p2_epsilon_weight(jnp.array([0.0, 1.0, 3.0]))
    Array([1.  , 0.5 , 0.25], dtype=float32)
    """
    snr, k, gamma = _prepare(snr, k=k, gamma=gamma)
    return (k + snr) ** -gamma


@compiled()
def edm_weight(sigma: Float[Array, "*shape"], *, sigma_data: Number = 0.5) -> Array:
    r"""Weight of EDM of a loss on the predicted clean sample, above `1 / sigma_data^2`.

    $$ w = \frac{\sigma^2 + \sigma_d^2}{(\sigma \sigma_d)^2} $$

    Args:
        sigma: Standard deviation of the noise that is added to the sample, above 0.
        sigma_data: Standard deviation of the data.

    Returns:
        The shape of `sigma`, in float32 or wider.

    Reference:
        Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, NeurIPS
        2022.

    >>> edm_weight(jnp.array([0.5, 1.0]))  # 4 + 4, 1 + 4
    Array([8., 5.], dtype=float32)
    """
    sigma, sigma_data = _prepare(sigma, "sigma", sigma_data=sigma_data)
    return (1 / sigma) ** 2 + (1 / sigma_data) ** 2


@compiled()
def sigma_sqrt_weight(sigma: Float[Array, "*shape"]) -> Array:
    r"""Weight of a flow matching loss that is even in the predicted clean sample.

    $$ w = \sigma^{-2} $$

    Args:
        sigma: Share of the noise, in `(0, 1]`.

    Returns:
        The shape of `sigma`, in float32 or wider.

    Reference:
        Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, ICML
        2024. Equals `"sigma_sqrt"` of diffusers' `compute_loss_weighting_for_sd3`.

    >>> sigma_sqrt_weight(jnp.array([0.5, 1.0]))
    Array([4., 1.], dtype=float32)
    """
    (sigma,) = _prepare(sigma, "sigma")
    return (1 / sigma) ** 2


@compiled()
def cosmap_weight(sigma: Float[Array, "*shape"]) -> Array:
    r"""Weight of a flow matching loss as under a cosine schedule, in `[2/pi, 4/pi]`.

    $$ w = \frac{2}{\pi (1 - 2 \sigma + 2 \sigma^2)} $$

    Args:
        sigma: Share of the noise, in `[0, 1]`.

    Returns:
        The shape of `sigma`, in float32 or wider.

    Reference:
        Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, ICML
        2024. Equals `"cosmap"` of diffusers' `compute_loss_weighting_for_sd3`.

    >>> cosmap_weight(jnp.array([0.0, 0.5])) * jnp.pi
    Array([2., 4.], dtype=float32)
    """
    (sigma,) = _prepare(sigma, "sigma")
    return (2 / math.pi) / ((1 - sigma) ** 2 + sigma**2)


@compiled()
def logit_normal_density_weight(
    t: Float[Array, "*shape"], *, mean: Number = 0.0, std: Number = 1.0
) -> Array:
    r"""Density of times whose logit is normal: uniform times under it are times drawn from it.

    $$ w = \frac{1}{s \sqrt{2 \pi}}\, \frac{1}{t (1 - t)}
       \exp \left( -\frac{(\mathrm{logit}(t) - m)^2}{2 s^2} \right) $$

    At times 0 and 1 it is 0, with zero gradient.

    Args:
        t: Times in `[0, 1]`.
        mean: Mean of the logit.
        std: Its standard deviation.

    Returns:
        The shape of `t`, in float32 or wider.

    Reference:
        Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, ICML
        2024. Use it or draw times so, not both.

    >>> logit_normal_density_weight(jnp.array([0.0, 0.5]))  # 0, 4 / sqrt(2 pi)
    Array([0.       , 1.5957692], dtype=float32)
    """
    t, mean, std = _prepare(t, "t", mean=mean, std=std)
    require(lambda: (t >= 0) & (t <= 1), "t", "values in [0, 1]")
    inside = (t > 0) & (t < 1)
    t = jnp.where(inside, t, 0.5)
    z = (jnp.log(t) - jnp.log1p(-t) - mean) / std
    density = jnp.exp(-0.5 * z**2) / (std * math.sqrt(2 * math.pi)) / (t * (1 - t))
    return jnp.where(inside, density, 0)


def _prepare(x: Array, name: str = "snr", **options: Number) -> tuple[Array, ...]:
    check_float(**{name: x})
    (x,) = widen(x)
    require(lambda: x >= 0, name, "values of at least 0")
    return x, *numbers(x, **options)


CASES = ()
