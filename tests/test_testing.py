"""The laws themselves: each one catches a planted fault, and a sound loss of a user passes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloss
from jaxloss._core.compiled import compiled
from jaxloss.testing import LAWS, Case, broken_laws, check_loss, draw_normal, draw_unit

PAIR = dict(pred=draw_normal("B C"), target=draw_normal("B C"))


def faulty(change: Callable[..., Any], **config: Any) -> tuple[Callable[..., Any], Case]:
    """A squared error whose units, or whose whole body, are replaced by `change`."""

    def loss(pred, target, *, where=None, weights=None, reduction="mean"):
        return change(pred, target, where, weights, reduction)

    return loss, Case(loss, PAIR, **config)


def squared(pred, target, where, weights, reduction):
    return jaxloss.squared_error(pred, target, where=where, weights=weights, reduction=reduction)


def masks_only_the_result(pred, target, where, weights, reduction):
    values = (pred - target) ** 2
    return jaxloss.reduce(values, where=where, weights=weights, reduction=reduction)


def divides_by_all(pred, target, where, weights, reduction):
    values = squared(pred, target, where, None, "none")
    return jaxloss.reduce(values, weights=weights, reduction=reduction)


def mean_of_nothing_is_nan(pred, target, where, weights, reduction):
    loss = squared(pred, target, where, weights, reduction)
    if reduction != "mean" or where is None:
        return loss
    return loss * (jnp.sum(where) / jnp.sum(where)).astype(loss.dtype)


def forgets_weights(pred, target, where, weights, reduction):
    return squared(pred, target, where, None, reduction)


def weight_counts_for_nothing(pred, target, where, weights, reduction):
    squares = None if weights is None else weights**2
    return squared(pred, target, where, squares, reduction)


def centred(pred, target, where, weights, reduction):
    return squared(pred - jnp.mean(pred, axis=0, keepdims=True), target, where, weights, reduction)


def by_position(pred, target, where, weights, reduction):
    rows = jnp.arange(pred.shape[0], dtype=jnp.float32).astype(pred.dtype)[:, None]
    return squared(pred * (1 + rows), target * (1 + rows), where, weights, reduction)


def biased(pred, target, where, weights, reduction):
    return squared(pred - jnp.ones((), pred.dtype) / 2, target, where, weights, reduction)


def overflows(pred, target, where, weights, reduction):
    grown = jnp.exp(jnp.abs(pred - target)) - 1
    return squared(grown, jnp.zeros_like(grown), where, weights, reduction)


def in_half_precision(pred, target, where, weights, reduction):
    low = (pred.astype(jnp.bfloat16) - target.astype(jnp.bfloat16)).astype(pred.dtype)
    return squared(low, jnp.zeros_like(low), where, weights, reduction)


def always_float32(pred, target, where, weights, reduction):
    narrow = lambda x: jnp.asarray(x).astype(jnp.float32)
    return squared(narrow(pred), narrow(target), where, weights, reduction)


def cancels(pred, target, where, weights, reduction):
    small = jnp.log(1 + ((pred - target) / 100) ** 2)
    return squared(small, jnp.zeros_like(small), where, weights, reduction)


def half_gradient(pred, target, where, weights, reduction):
    still = jax.lax.stop_gradient(pred)
    return squared((pred + still) / 2, target, where, weights, reduction)


def infinite_curvature(pred, target, where, weights, reduction):
    power = jnp.abs(pred - target) ** 0.75
    return squared(power, jnp.zeros_like(power), where, weights, reduction)


@jax.custom_vjp
def _reverse_only(x):
    return x


_reverse_only.defvjp(lambda x: (x, None), lambda _, g: (g,))


def reverse_mode_only(pred, target, where, weights, reduction):
    return squared(_reverse_only(pred), target, where, weights, reduction)


def refuses_vmap_of_one(pred, target, where, weights, reduction):
    if isinstance(pred, jax.core.Tracer):
        return squared(pred, target, where, weights, reduction)
    return squared(2 * pred, target, where, weights, reduction)


@jax.custom_batching.custom_vmap
def _half_again(x):
    return 0 * x


@_half_again.def_vmap
def _(axis_size, in_batched, x):
    return x / 2, in_batched[0]


def different_under_vmap(pred, target, where, weights, reduction):
    pred = pred + _half_again(jax.lax.stop_gradient(pred))
    return squared(pred, target, where, weights, reduction)


def broadcasts(pred, target, where, weights, reduction):
    pred, target = jnp.broadcast_arrays(pred, target)
    return squared(pred, target, where, weights, reduction)


def not_a_scalar(pred, target, where, weights, reduction):
    out = squared(pred, target, where, weights, reduction)
    return out[None] if reduction == "mean" else out


def gathers_rows(pred, target, where, weights, reduction):
    order = jnp.argsort(pred[:, 0], stable=True)
    back = jnp.argsort(order, stable=True)
    return squared(pred[order][back], target, where, weights, reduction)


FAULTS = {
    "garbage": masks_only_the_result,
    "deleting": divides_by_all,
    "nothing": mean_of_nothing_is_nan,
    "reducing": forgets_weights,
    "weight_two": weight_counts_for_nothing,
    "microbatches": centred,
    "permutation": by_position,
    "at_target": biased,
    "finite": overflows,
    "half": in_half_precision,
    "double": always_float32,
    "accuracy": cancels,
    "gradient_accuracy": cancels,
    "numerical": half_gradient,
    "transforms": infinite_curvature,
    "eager": refuses_vmap_of_one,
    "vmap": different_under_vmap,
    "errors": broadcasts,
    "abstract": not_a_scalar,
    "devices": gathers_rows,
}


@pytest.mark.parametrize("law", FAULTS)
def test_a_planted_fault_breaks_its_law(law: str) -> None:
    loss, case = faulty(FAULTS[law], zero_at_target=law == "at_target")
    assert law in broken_laws(loss, case)


def test_a_loss_without_forward_mode_breaks_the_numerical_law() -> None:
    assert "numerical" in broken_laws(*faulty(reverse_mode_only))


def test_positional_options_break_the_signature_law() -> None:
    def loss(pred, target, where=None, weights=None, reduction="mean"):
        return squared(pred, target, where, weights, reduction)

    assert "signature" in broken_laws(loss, Case(loss, PAIR))


def test_compiling_for_each_number_breaks_the_numbers_law() -> None:
    @compiled("scale")
    def loss(pred, target, *, scale=1.0, where=None, weights=None, reduction="mean"):
        return squared(
            pred * jnp.float32(scale).astype(pred.dtype), target, where, weights, reduction
        )

    assert "numbers" in broken_laws(loss, Case(loss, PAIR, dict(scale=2.0)))


def test_every_law_has_a_planted_fault() -> None:
    assert set(LAWS) == {*FAULTS, "signature", "numbers"}


def test_a_sound_loss_of_a_user_keeps_every_law() -> None:
    @compiled()
    def loss(pred, target, *, where=None, weights=None, reduction="mean"):
        return squared(pred, target, where, weights, reduction)

    check_loss(loss, Case(loss, PAIR, zero_at_target=True))


def test_a_needless_opt_out_is_reported() -> None:
    loss, case = (
        jaxloss.squared_error,
        Case(jaxloss.squared_error, PAIR, without={"permutation": "no reason at all"}),
    )
    with pytest.raises(AssertionError, match="permutation: opted out of, yet it holds"):
        check_loss(loss, case)


def test_an_opt_out_of_an_unknown_law_is_reported() -> None:
    case = Case(jaxloss.squared_error, PAIR, without={"gravity": "falls up"})
    with pytest.raises(AssertionError, match="gravity: no such law"):
        check_loss(jaxloss.squared_error, case)


def test_draws_repeat_for_a_seed_and_differ_between_seeds() -> None:
    case = Case(jaxloss.squared_error, dict(pred=draw_normal("B C"), target=draw_unit("B C")))
    first, again, other = case.draw(1), case.draw(1), case.draw(2)
    np.testing.assert_array_equal(first["pred"], again["pred"])
    assert not np.array_equal(first["pred"], other["pred"])
