"""Weights of several tasks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import softmax

from jaxloss import weighted_sum
from jaxloss.training.multitask import (
    dwa_init,
    dynamic_weight_average,
    famo_init,
    famo_update,
    famo_weights,
    gradnorm_loss,
    uncertainty_weighting,
)

LOSSES = np.array([2.0, 0.3, 7.0], np.float32)
NAMES = ["depth", "edges", "class"]
TRACE = np.random.default_rng(0).uniform(0.1, 3.0, size=(4, 3)).astype(np.float32)


def named(values):
    return dict(zip(NAMES, values, strict=True))


def values(tree):
    return np.array([tree[name] for name in NAMES])


def assert_close(got, expected, tolerance=1e-6):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=1e-7)


def test_uncertainty_weighting_is_the_formula_and_its_gradients_those_of_the_formula():
    s = np.array([-0.5, 0.2, 1.5], np.float32)
    (total, terms), (by_loss, by_s) = jax.value_and_grad(
        uncertainty_weighting, argnums=(0, 1), has_aux=True
    )(LOSSES, s)
    assert_close(total, np.sum(np.exp(-s.astype(float)) * LOSSES + s) / 2)
    assert_close(by_loss, np.exp(-s) / 2)
    assert_close(by_s, (1 - np.exp(-s) * LOSSES) / 2)
    assert_close([terms[str(k)] for k in range(3)], LOSSES)
    twice, _ = uncertainty_weighting(2 * LOSSES, s)  # the form for classification
    assert_close(twice, np.sum(np.exp(-s.astype(float)) * LOSSES + s / 2))


def test_uncertainty_weights_are_learnt_to_the_log_of_the_losses():
    tx = optax.adam(0.1)
    start = named(np.zeros(3, np.float32)), tx.init(named(np.zeros(3, np.float32)))
    gradient = jax.grad(lambda s: uncertainty_weighting(named(LOSSES), s)[0])

    def step(_, state):
        s, moments = state
        updates, moments = tx.update(gradient(s), moments)
        return optax.apply_updates(s, updates), moments

    s, _ = jax.jit(lambda: jax.lax.fori_loop(0, 500, step, start))()
    assert_close(values(s), np.log(LOSSES), 1e-3)
    best, _ = uncertainty_weighting(named(LOSSES), named(np.log(LOSSES)))
    assert_close(best, np.sum(1 + np.log(LOSSES)) / 2)


def test_a_task_left_out_leaves_with_both_its_parts_whatever_its_loss():
    losses, s = LOSSES.copy(), np.array([0.5, 40.0, -1.0], np.float32)
    losses[1] = np.nan
    where = np.array([True, False, True])
    fn = lambda losses, s: uncertainty_weighting(losses, s, min_log_variance=-0.5, where=where)
    (total, terms), grads = jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)(losses, s)
    expected, _ = uncertainty_weighting(losses[where], s[where], min_log_variance=-0.5)
    assert_close(total, expected)
    assert terms["1"] == 0
    assert all(grad[1] == 0 and np.all(np.isfinite(grad)) for grad in grads)
    by_name, _ = uncertainty_weighting(
        named(losses), named(s), min_log_variance=-0.5, where=named(where)
    )
    assert_close(by_name, expected)


def test_a_bound_holds_the_variance_of_a_loss_of_zero_and_lets_go_when_the_loss_returns():
    slope = jax.grad(lambda s, x: uncertainty_weighting(x, s, min_log_variance=-3.0)[0])
    one = lambda s, x: slope(jnp.array([s]), jnp.array([x]))[0]
    assert one(-2.0, 0.0) == 0.5  # drawn down
    assert one(-4.0, 0.0) == 0  # and held
    assert_close(one(-4.0, 2.0), (1 - np.exp(3.0) * 2) / 2)  # and back
    bounded, _ = uncertainty_weighting(jnp.ones(1), jnp.array([-50.0]), min_log_variance=-3.0)
    assert_close(bounded, (np.exp(3.0) - 3) / 2)
    free = jax.grad(lambda s: uncertainty_weighting(jnp.zeros(1), s)[0])(jnp.array([-500.0]))
    assert free == 0.5


def test_an_inverse_variance_without_its_logarithm_would_collapse():
    """Known defect: the first part alone has no minimum; ours has one at log L."""
    first = lambda s: np.exp(-s) * 2.0 / 2
    assert first(20.0) < first(5.0) < first(0.0)
    ours = [uncertainty_weighting(jnp.array([2.0]), jnp.array([s]))[0] for s in (0.0, 0.7, 5.0)]
    assert ours[1] == min(ours)


def test_terms_carry_no_gradient_and_feed_a_log():
    grad = jax.grad(lambda x: uncertainty_weighting(x, jnp.zeros(3))[1]["0"])(LOSSES)
    assert np.all(grad == 0)


def dwa_oracle(trace, temperature):
    """The weights after each epoch."""
    out = [np.ones(trace.shape[1])]
    for last, new in zip(trace.astype(float), trace[1:].astype(float), strict=False):
        out.append(trace.shape[1] * softmax(new / last / temperature))
    return np.array(out)


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_dynamic_weights_follow_the_ratios_of_the_last_two_epochs(temperature):
    average = jax.jit(dynamic_weight_average)
    state, by_name = dwa_init(3), dwa_init(NAMES)
    for losses, expected in zip(TRACE, dwa_oracle(TRACE, temperature), strict=True):
        weights, state = average(losses, state, temperature=temperature)
        assert_close(weights, expected)
        weights, by_name = average(named(losses), by_name, temperature=temperature)
        assert_close(values(weights), expected)
    assert state.epochs == 4
    assert average._cache_size() == 2


def test_dynamic_weights_enter_a_weighted_sum_by_name_and_carry_no_gradient():
    _, state = dynamic_weight_average(named(TRACE[0]), dwa_init(NAMES))

    def objective(losses):
        weights, _ = dynamic_weight_average(losses, state)
        return weighted_sum(losses, weights=weights)[0]

    grads = jax.grad(objective)(named(TRACE[1]))
    assert_close(values(grads), dwa_oracle(TRACE, 2.0)[1])


def test_a_loss_that_was_zero_counts_as_unchanged():
    _, state = dynamic_weight_average(jnp.array([0.0, 1.0]), dwa_init(2))
    weights, _ = dynamic_weight_average(jnp.array([3.0, 1.0]), state)
    assert_close(weights, [1.0, 1.0])


def gradnorm_oracle(v, norms, losses, initial, alpha):
    """Value and gradient."""
    v, norms, losses, initial = (np.asarray(x, float) for x in (v, norms, losses, initial))
    w = len(v) * softmax(v)
    rate = losses / initial
    aim = np.mean(w * norms) * (rate / rate.mean()) ** alpha
    sign = np.sign(w * norms - aim)
    pulled = sign * norms
    return np.abs(w * norms - aim).sum(), w * (pulled - np.dot(w, pulled) / len(v))


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_is_the_formula_with_a_gradient_for_the_weights_alone(alpha):
    v, norms = np.array([0.3, -0.2, 0.1], np.float32), np.array([3.0, 0.5, 1.0], np.float32)
    fn = partial(gradnorm_loss, alpha=alpha)
    arrays = (v, norms, LOSSES, TRACE[0])
    value, grads = jax.jit(jax.value_and_grad(fn, argnums=(0, 1, 2, 3)))(*arrays)
    expected, slope = gradnorm_oracle(*arrays, alpha)
    assert_close(value, expected)
    assert_close(grads[0], slope, 1e-5)
    assert all(np.all(grad == 0) for grad in grads[1:])
    assert_close(fn(*(named(x) for x in arrays)), expected)


def test_gradnorm_of_lengths_and_rates_alike_is_at_rest_and_a_loss_of_zero_is_fine():
    value, grad = jax.value_and_grad(gradnorm_loss)(jnp.zeros(2), *jnp.ones((3, 2)))
    assert value == 0
    assert np.all(grad == 0)
    for losses in ([0.0, 1.0], [0.0, 0.0]):
        value, grad = jax.value_and_grad(gradnorm_loss)(
            jnp.zeros(2), jnp.ones(2), jnp.array(losses), jnp.ones(2)
        )
        assert np.isfinite(value)
        assert np.all(np.isfinite(grad))


class FamoOracle:
    """The authors' code in float64, with torch's Adam written out."""

    def __init__(self, tasks, rate=0.025, decay=1e-3, floor=0.0):
        self.v, self.m, self.q, self.t = np.zeros(tasks), np.zeros(tasks), np.zeros(tasks), 0
        self.rate, self.decay, self.floor = rate, decay, floor

    def weights(self, losses):
        self.gap = losses.astype(float) - self.floor + 1e-8
        z = softmax(self.v)
        return z / self.gap / np.sum(z / self.gap)

    def update(self, new):
        delta = np.log(self.gap) - np.log(new.astype(float) - self.floor + 1e-8)
        z = softmax(self.v)
        g = z * (delta - np.dot(z, delta)) + self.decay * self.v
        self.t += 1
        self.m, self.q = 0.9 * self.m + 0.1 * g, 0.999 * self.q + 0.001 * g**2
        scaled = self.m / (1 - 0.9**self.t) / (np.sqrt(self.q / (1 - 0.999**self.t)) + 1e-8)
        self.v = self.v - self.rate * scaled


@pytest.mark.parametrize("options", [{}, dict(learning_rate=0.1, weight_decay=0.5)], ids=str)
def test_famo_follows_the_authors_code_over_several_steps(options):
    oracle = FamoOracle(3, *options.values(), floor=0.05)
    weigh, update = jax.jit(famo_weights), jax.jit(famo_update)
    state, by_name = famo_init(3, **options), famo_init(NAMES, **options)
    for before, after in zip(TRACE, TRACE[::-1], strict=True):
        expected = oracle.weights(before)
        oracle.update(after)
        weights, state = weigh(before, state, floor=0.05)
        assert_close(weights, expected, 3e-6)
        state = update(after, state)
        assert_close(state.logits, oracle.v, 1e-5)
        weights, by_name = weigh(named(before), by_name, floor=named([0.05] * 3))
        by_name = update(named(after), by_name)
        assert_close(values(weights), expected, 3e-6)
        assert_close(values(by_name.logits), oracle.v, 1e-5)


def test_famo_weights_are_the_gradient_of_the_paper_s_objective_with_c_stopped():
    state = famo_update(TRACE[0], famo_weights(LOSSES, famo_init(3))[1])
    z = softmax(np.asarray(state.logits, float))
    c = np.sum(z / LOSSES)
    weights, _ = famo_weights(LOSSES, state)
    objective = lambda x: jnp.sum(z * jnp.log(x)) / c
    assert_close(weights, jax.grad(objective)(LOSSES), 3e-6)
    free = jax.grad(lambda x: jnp.sum(famo_weights(x, state)[0] * LOSSES))(LOSSES)
    assert np.all(free == 0)


def test_famo_stays_finite_at_losses_of_zero_below_their_floor_and_in_float16():
    losses = np.array([0.0, -1.0, 1.0], np.float16)
    weights, state = famo_weights(losses, famo_init(3))
    assert weights.dtype == np.float32
    assert_close(weights, [0.5, 0.5, 0.0], 1e-5)
    assert np.all(np.isfinite(famo_update(losses[::-1], state).logits))


def famo_run(trace, rate):
    """All weights of a run, by scan."""

    def step(state, losses):
        weights, state = famo_weights(losses, state)
        return famo_update(losses / (1 + weights), state), weights

    return jax.lax.scan(step, famo_init(3, learning_rate=rate), trace)[1]


def test_states_pass_through_scan_and_vmap_over_rates():
    rates = np.array([0.01, 0.1], np.float32)
    found = jax.jit(jax.vmap(famo_run, in_axes=(None, 0)))(TRACE, rates)
    assert_close(found[1], jax.jit(famo_run)(TRACE, rates[1]))
    assert not np.allclose(found[0][-1], found[1][-1])
    state, weights = jax.lax.scan(
        lambda s, x: dynamic_weight_average(x, s)[::-1], dwa_init(3), TRACE
    )
    assert_close(weights, dwa_oracle(TRACE, 2.0))
    assert_close(state.losses, TRACE[-1])


@pytest.mark.parametrize(
    ("init", "step"),
    [
        (dwa_init, lambda s, x: dynamic_weight_average(x, s)[1]),
        (famo_init, lambda s, x: famo_update(x / 2, famo_weights(x, s)[1])),
    ],
    ids=["dwa", "famo"],
)
def test_states_can_be_donated(init, step):
    donated = jax.jit(step, donate_argnums=0)
    plain, given = init(3), init(3)
    for losses in TRACE:
        plain, given = step(plain, losses), donated(given, losses)
    jax.tree.map(assert_close, given, plain)


def test_double_precision_stays():
    with jax.enable_x64(True):
        total, _ = uncertainty_weighting(LOSSES.astype(float), np.zeros(3))
        assert total.dtype == np.float64
        assert famo_weights(LOSSES.astype(float), famo_init(3))[0].dtype == np.float64


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: uncertainty_weighting(LOSSES, np.zeros(2)),
            ValueError,
            r"log_variances: .*\(3,\)",
        ),
        (
            lambda: uncertainty_weighting(LOSSES, named(LOSSES)),
            ValueError,
            "log_variances: .*shape",
        ),
        (
            lambda: uncertainty_weighting(named(LOSSES), {"depth": LOSSES[0]}),
            ValueError,
            r"log_variances: expected the names \['class', 'depth', 'edges'\], got \['depth'\]",
        ),
        (
            lambda: uncertainty_weighting(LOSSES[0], LOSSES[0]),
            ValueError,
            "losses: expected one ax",
        ),
        (lambda: uncertainty_weighting({}, {}), ValueError, "losses: expected at least one task"),
        (
            lambda: uncertainty_weighting(LOSSES, LOSSES, where=np.ones(3)),
            TypeError,
            "where: expected a bool array",
        ),
        (
            lambda: uncertainty_weighting(named([LOSSES] * 3), named(LOSSES)),
            ValueError,
            r"losses\['depth'\]: expected a scalar",
        ),
        (lambda: dwa_init(0), ValueError, "dwa_init: num_tasks: expected an integer of at least 1"),
        (lambda: famo_init("abc"), ValueError, "famo_init: num_tasks: expected an integer"),
        (
            lambda: dynamic_weight_average(LOSSES, dwa_init(2)),
            ValueError,
            r"state: expected shape \(3,\)",
        ),
        (
            lambda: famo_weights(np.arange(3), famo_init(3)),
            TypeError,
            "losses: expected a floating dtype",
        ),
        (
            lambda: famo_weights(LOSSES, famo_init(3), floor=np.zeros(2)),
            ValueError,
            "floor: expected",
        ),
        (lambda: gradnorm_loss(*[LOSSES] * 3, LOSSES[:2]), ValueError, "initial_losses: expected"),
    ],
    ids=[
        *("size", "form", "names", "scalar", "none", "where", "no scalar", "no tasks", "word"),
        *("state", "integers", "floor", "initial"),
    ],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
