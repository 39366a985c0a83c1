"""The pinball cost that quantile losses and the CRPS of quantiles share."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from .checks import check_float, check_min_rank, check_shape, require
from .numerics import absolute, widen
from .reduce import mask
from .typing import Where


def pinball(short: Array, quantile: Array) -> Array:
    """Cost of falling short by this much, with gradient 0 at the kink."""
    over = (short < 0).astype(short.dtype)  # no select: levels are not sharded as the errors are
    return absolute(short) * (over + (1 - 2 * over) * quantile)  # 1 - q where over, else q


def mean_pinball(pred: Array, target: Any, quantiles: Any, where: Where | None) -> Array:
    """Mean over the predicted quantiles, the last axis of `pred`, after checks and mask."""
    check_float(pred=pred, quantiles=quantiles)
    check_min_rank(1, pred=pred)
    check_shape(jnp.shape(pred)[:-1], target=target)
    check_shape(jnp.shape(pred)[-1:], quantiles=quantiles)
    pred, target = mask(where, *widen(pred, target))
    quantiles = jnp.asarray(quantiles).astype(pred.dtype)
    require(lambda: (quantiles >= 0) & (quantiles <= 1), "quantiles", "values in [0, 1]")
    costs = pinball(target[..., None] - pred, jnp.broadcast_to(quantiles, pred.shape))
    return jnp.sum(costs, -1) / max(costs.shape[-1], 1)
