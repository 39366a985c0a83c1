"""Losses out of a user's own elementwise function."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloss
from jaxloss.testing import Case, check_loss, draw_normal, draw_uniform
from jaxloss.training.custom import make_loss, masked

RNG = np.random.default_rng(0)
PRED, TARGET = RNG.normal(size=(2, 5, 3)).astype(np.float32)
WHERE = RNG.random((5, 3)) < 0.6
WEIGHTS = RNG.uniform(0, 2, (5, 3)).astype(np.float32)


@make_loss
def squares(pred, target):
    return (pred - target) ** 2


@make_loss
def scaled(pred, target, *, scale=1.0, power=2):
    return ((pred - target) / scale) ** power


log_ratio = masked(lambda pred, target: jnp.log(pred / target) ** 2, fill=1.0)


def test_a_custom_loss_keeps_every_law():
    pair = dict(pred=draw_normal("B C"), target=draw_normal("B C"))
    check_loss(scaled, Case(scaled, pair, dict(scale=1.5), zero_at_target=True))
    pair = {name: draw_uniform("B C", 0.5, 2.0) for name in ("pred", "target")}
    check_loss(log_ratio, Case(log_ratio, pair, zero_at_target=True))


@pytest.mark.parametrize("where", [None, WHERE], ids=["all", "masked"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_it_equals_the_squared_error_of_the_library_with_every_option(where, weights):
    def everything(loss, pred):
        tail = dict(where=where, weights=weights)
        reductions = ("mean", "sum", "none", jaxloss.sum_and_weight, jaxloss.top_k(2))
        values = [loss(pred, TARGET, **tail, reduction=r) for r in reductions]
        return values, jax.grad(lambda p: loss(p, TARGET, **tail))(pred)

    ours, theirs = (everything(loss, PRED) for loss in (squares, jaxloss.squared_error))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), ours, theirs)


def test_sixteen_bit_inputs_are_widened_and_their_gradient_is_not():
    pred = jnp.asarray([300.0], jnp.float16)
    value, grad = jax.value_and_grad(squares)(pred, 0 * pred)
    assert value == 90_000  # not inf, as in float16
    assert value.dtype == jnp.float32
    assert grad.dtype == jnp.float16


def test_a_masked_element_costs_nothing_and_leaves_the_denominator():
    """MONAI's MaskedLoss zeroes the inputs and still averages over all of them."""
    softplus = make_loss(lambda logits: jax.nn.softplus(logits))
    logits = jnp.array([2.0, -1.0, 7.0])
    where = jnp.array([True, True, False])
    expected = np.mean(np.log1p(np.exp([2.0, -1.0])))
    assert float(softplus(logits, where=where)) == pytest.approx(expected, rel=1e-6)


def test_learned_options_get_a_finite_gradient_where_the_filling_value_is_fit():
    def both(loss):
        total = lambda power: loss(jnp.array([4.0, jnp.nan]), power=power, where=where)
        return jax.value_and_grad(total)(jnp.array(2.0))

    where = jnp.array([True, False])
    value, slope = both(masked(lambda x, *, power=1.0: jnp.exp(power * jnp.log(x)), fill=1.0))
    np.testing.assert_allclose([value, slope], [16, 16 * np.log(4)], rtol=1e-6)
    value, slope = both(make_loss(lambda x, *, power=1.0: jnp.exp(power * jnp.log(x))))
    assert value == pytest.approx(16)
    assert np.isnan(slope)  # log 0 under the mask: what `fill` is for


def test_the_signature_tells_arrays_options_and_the_usual_tail():
    expected = "(pred, target, *, scale=1.0, power=2, where=None, weights=None, reduction='mean')"
    assert str(inspect.signature(scaled)) == expected
    positional = make_loss(lambda p, t, margin=1.0: jax.nn.relu(margin - p * t))
    assert str(inspect.signature(positional)).startswith("(p, t, *, margin=1.0, where=None")
    assert positional(jnp.array([0.25]), jnp.array([1.0]), margin=0.5) == 0.25
    assert positional.__name__ == "custom_loss"


def test_options_may_be_traced_and_functions_may_close_over_tracers():
    @jax.jit
    def outer(scale):
        inner = make_loss(lambda pred, target: ((pred - target) / scale) ** 2)
        return inner(PRED, TARGET), scaled(PRED, TARGET, scale=scale)

    one, other = outer(2.0)
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_function_that_changes_the_shape_is_refused():
    for function in (lambda pred, target: jnp.mean(pred - target), lambda p, t: (p - t)[:1]):
        with pytest.raises(ValueError, match=r"custom_loss: .*expected shape \(5, 3\)"):
            make_loss(function)(PRED, TARGET)
    with pytest.raises(TypeError, match="expected an array, got list"):
        make_loss(lambda pred: [1.0])(PRED)
    with pytest.raises(ValueError, match="scaled: scale: expected a scalar"):
        scaled(PRED, TARGET, scale=jnp.ones(3))


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        (3, TypeError, "fn: expected a function"),
        (lambda *arrays: arrays[0], TypeError, r"a parameter for each array, got \*arrays"),
        (lambda *, scale=1.0: scale, TypeError, "at least one array"),
        (lambda pred, where: pred, ValueError, "options other than where, weights, reduction"),
    ],
    ids=["number", "any number", "no array", "tail"],
)
def test_what_is_no_elementwise_function_is_named(function, error, text):
    with pytest.raises(error, match=f"make_loss: .*{text}"):
        make_loss(function)
