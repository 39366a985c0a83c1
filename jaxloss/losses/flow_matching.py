"""Flow matching: a velocity field along straight lines between two samples."""

from typing import Any

from jaxtyping import Array, Float, Shaped

from .._core.case import Case, draw_normal
from .._core.checks import check_float, check_min_rank, check_same_shape
from .._core.compiled import compiled
from .._core.numerics import numbers, widen
from .._core.reduce import reduce
from .._core.samples import PerSample, over, per_sample, prepare_samples, sample_mean
from .._core.typing import Number, Reduction, Values, Where
from .._core.windows import any_kept

__all__ = ["flow_matching_loss", "linear_interpolation"]


@compiled()
def flow_matching_loss(
    velocity: Float[Array, "batch *space channels"],
    start: Shaped[Array, "batch *space channels"],
    end: Shaped[Array, "batch *space channels"],
    *,
    sigma_min: Number = 0.0,
    timestep_weight: PerSample = 1.0,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Squared error of a velocity field on the line from one sample to another, from 0 up.

    $$ \ell = \frac{w}{D} \sum_i (v_i - u_i)^2, \quad u = x_1 - (1 - \sigma_{\min}) x_0 $$

    over the D kept positions and channels of a sample. The velocity is taken at
    `linear_interpolation(start, end, time)`, whose derivative in time it should be: the start is at
    time 0, whatever it is. Noise to data: `start=noise, end=data`. Stable Diffusion 3 and the
    rectified flow of diffusers, whose time 1 is noise: `start=data, end=noise`.

    Args:
        velocity: Output of the network, `(batch, *space, channels)`.
        start: The sample at time 0; same shape.
        end: The sample at time 1; same shape.
        sigma_min: How much of the start is left at time 1; the same number as given to
            `linear_interpolation`.
        timestep_weight: One number, or one for each sample, `(batch,)`, such as
            `logit_normal_density_weight(time)`. The mean does not divide by it.
        where: Bool array `(batch, *space)`; a sample with nothing kept is no unit.

    One unit per sample; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `(batch,)` if `reduction` is `"none"`.

    Reference:
        Lipman et al., Flow Matching for Generative Modeling, ICLR 2023; Liu, Gong and Liu, Flow
        Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, ICLR 2023.
        Equals the loss of ott's `flow_matching_step`.

    >>> velocity, start, end = jnp.array([[3.0]]), jnp.array([[0.0]]), jnp.array([[1.0]])
    >>> flow_matching_loss(velocity, start, end)  # the velocity should be 1
    Array(4., dtype=float32)
    """
    velocity, start, end = prepare_samples(where, velocity=velocity, start=start, end=end)
    (sigma_min,) = numbers(velocity, sigma_min=sigma_min)
    (weight,) = per_sample(velocity, where, timestep_weight=timestep_weight)
    error = velocity - (end - (1 - sigma_min) * start)
    values = weight * sample_mean(error**2, where)
    return reduce(values, where=any_kept(where), weights=weights, reduction=reduction)


@compiled()
def linear_interpolation(
    start: Float[Array, "*shape"],
    end: Shaped[Array, "*shape"],
    time: PerSample,
    *,
    sigma_min: Number = 0.0,
) -> Array:
    r"""The point between two samples at a time from 0, the start, to 1, the end.

    $$ x_t = (1 - (1 - \sigma_{\min}) t)\, x_0 + t\, x_1 $$

    Args:
        start: The sample at time 0, `(batch, ...)`.
        end: The sample at time 1; same shape.
        time: One number, or one for each sample, `(batch,)`.
        sigma_min: How much of the start is left at time 1.

    Returns:
        The shape of `start`, in float32 or wider.

    Reference:
        Lipman et al., Flow Matching for Generative Modeling, ICLR 2023.

    >>> linear_interpolation(jnp.array([[0.0]]), jnp.array([[4.0]]), jnp.array([0.25]))
    Array([[1.]], dtype=float32)
    """
    check_float(start=start)
    check_min_rank(1, start=start)
    check_same_shape(start=start, end=end)
    start, end = widen(start, end)
    (sigma_min,) = numbers(start, sigma_min=sigma_min)
    (time,) = per_sample(start, time=time)
    time = over(time, start)
    return (1 - (1 - sigma_min) * time) * start + time * end


_THREE = {name: draw_normal("B H W C") for name in ("velocity", "start", "end")}
_SPACE: dict[str, Any] = dict(positions="B H W", sizes=dict(H=2, W=3, C=2))

CASES = (
    Case(flow_matching_loss, _THREE, **_SPACE),
    Case(
        flow_matching_loss,
        {name: draw_normal("B D") for name in _THREE},
        dict(sigma_min=0.1, timestep_weight=0.7),
        label="vectors",
    ),
)
