"""Token losses: every option against its formula, wrong and hidden labels, reductions, memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracle import units_and_gradient

import jaxloss
from jaxloss import checked
from jaxloss._core.softmax import cross_entropy, top_and_others
from jaxloss.losses.tokens import (
    dft_loss,
    multi_token_prediction_loss,
    previous_token_candidates,
    sequence_cross_entropy,
    sequence_log_probs,
    soft_cap,
    token_log_probs,
    unlikelihood_loss,
    z_loss,
)

FEW, MANY = 7, 1500  # on either side of the number of classes at which the kernel changes
EPS = np.finfo(np.float32).eps
MIB = 2**20


def draw(classes: int, shape: tuple[int, ...] = (2, 4), seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    logits = (3 * generator.standard_normal((*shape, classes))).astype(np.float32)
    return logits, generator.integers(0, classes, shape, np.int32)


def log_softmax(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and log-normalisers in float64."""
    z = np.asarray(z, np.float64)
    largest = z.max(axis=-1, keepdims=True)
    lse = largest + np.log(np.exp(z - largest).sum(axis=-1, keepdims=True))
    return z - lse, lse[..., 0]


def formula(
    logits: Any,
    labels: Any,
    *,
    smoothing: float = 0.0,
    class_weights: Any = 1.0,
    z: float = 0.0,
    cap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Units and their gradients in float64, straight from the definition."""
    logits = np.asarray(logits, np.float64)
    bent = logits if cap is None else cap * np.tanh(logits / cap)
    log_p, lse = log_softmax(bent)
    classes = logits.shape[-1]
    target = labels if labels.ndim == logits.ndim else labels[..., None] == np.arange(classes)
    target = class_weights * ((1 - smoothing) * target + smoothing / classes)
    units = -np.sum(target * log_p, axis=-1) + z * lse**2
    mass = target.sum(axis=-1) + 2 * z * lse
    slope = mass[..., None] * np.exp(log_p) - target
    return units, slope if cap is None else slope * (1 - np.tanh(logits / cap) ** 2)


def close(got: Any, expected: Any, ulps: float = 8, eps: float = EPS) -> None:
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, rtol=0, atol=ulps * eps * scale
    )


# Cross-entropy


@pytest.mark.parametrize("classes", [FEW, MANY])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("soft", [False, True], ids=["integer", "dense"])
def test_all_options_together_follow_the_formula(classes: int, dtype: Any, soft: bool) -> None:
    logits, labels = draw(classes)
    logits = logits.astype(dtype)
    w = np.random.default_rng(1).uniform(0, 2, classes).astype(np.float32)
    given_labels = np.eye(classes, dtype=np.float32)[labels] if soft else labels
    options = dict(label_smoothing=0.25, z_loss=0.125, softcap=4.0)
    units, gradient = units_and_gradient(
        sequence_cross_entropy, logits, given_labels, class_weights=w, **options
    )
    exact, slope = formula(
        logits.astype(np.float32), labels, smoothing=0.25, class_weights=w, z=0.125, cap=4
    )
    close(units, exact)
    close(gradient.astype(np.float32), slope, 8, max(EPS, float(jnp.finfo(dtype).eps) / 2))


def plain(logits: Any, labels: Any, s: Any, z: Any, cap: Any, temperature: Any) -> Any:
    """The twin of the kernel, without its rules."""
    bent = cap * jnp.tanh(logits / cap) / temperature
    lse = jax.nn.logsumexp(bent, axis=-1)
    own = jnp.take_along_axis(bent, labels[..., None], axis=-1)[..., 0]
    return lse - (1 - s) * own - s * jnp.mean(bent, axis=-1) + z * lse**2


def kernel(logits: Any, labels: Any, s: Any, z: Any, cap: Any, temperature: Any) -> Any:
    return cross_entropy(
        logits, labels, label_smoothing=s, z_loss=z, softcap=cap, temperature=temperature
    )


def test_the_rule_of_the_kernel_differentiates_like_its_plain_twin() -> None:
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        logits = 2 * generator.standard_normal((2, 3, FEW))
        labels = generator.integers(0, FEW, (2, 3))
        point = (logits, *map(np.float64, (0.1, 0.01, 5.0, 0.7)))
        direction = (generator.standard_normal(logits.shape), *map(np.float64, (0.3, 2, -1, 0.5)))

        def everything(
            function: Callable[..., Any], point: Any, direction: Any, labels: Any
        ) -> Any:
            total = lambda *p: jnp.sum(jnp.square(function(p[0], labels, *p[1:])))
            gradient = jax.grad(total, argnums=range(5))
            mapped = jax.vmap(function, in_axes=(0, 0, None, None, None, None))
            return (
                function(point[0], labels, *point[1:]),
                jax.jvp(total, point, direction)[1],
                jax.jvp(gradient, point, direction),
                mapped(point[0], labels, *point[1:]),
            )

        run = lambda *arrays: [everything(function, *arrays) for function in (kernel, plain)]
        ours, theirs = jax.jit(run)(point, direction, labels)
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_smoothing_over_the_other_classes_is_a_larger_smoothing_minus_an_entropy() -> None:
    logits, labels = draw(FEW)
    log_p, _ = log_softmax(logits)
    eps = 0.1
    target = np.where(np.eye(FEW, dtype=bool)[labels], 1 - eps, eps / (FEW - 1))
    t5x = -np.sum(target * log_p, axis=-1) + np.sum(target * np.log(target), axis=-1)
    ours = sequence_cross_entropy(
        logits, labels, label_smoothing=eps * FEW / (FEW - 1), reduction="none"
    )
    entropy = -np.sum(target * np.log(target), axis=-1)
    np.testing.assert_allclose(ours - entropy, t5x, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [3, 200, MANY])
def test_a_label_outside_the_vocabulary_is_nan_whatever_the_options(classes: int) -> None:
    logits = np.tile(np.arange(classes, dtype=np.float32) / np.float32(classes), (5, 1))
    labels = np.array([-1, -100, classes, 2**31 - 1, 1], np.int32)
    bad = np.arange(5) < 4
    for options in ({}, dict(label_smoothing=0.1, z_loss=0.1, softcap=2.0)):
        units, gradient = jax.device_get(
            units_and_gradient(sequence_cross_entropy, logits, labels, **options)
        )
        np.testing.assert_array_equal(np.isnan(units), bad)
        np.testing.assert_array_equal(np.isnan(gradient).all(axis=1), bad)
        assert np.isfinite(gradient[4]).all()
    np.testing.assert_array_equal(np.isnan(token_log_probs(logits, labels)), bad)
    assert jnp.isnan(sequence_log_probs(logits, labels))


def test_nothing_but_ignored_labels_costs_zero_with_zero_gradient() -> None:
    logits, labels = draw(FEW)
    logits[0] = np.nan
    logits[1] = -np.inf
    options = dict(ignore_index=-100, label_smoothing=0.1, z_loss=0.1, softcap=3.0)
    reductions = (
        "mean",
        jaxloss.sequence_mean,
        jaxloss.sequence_sum,
        jaxloss.sequence_sum_scaled(7),
        jaxloss.normalized_sum(0),
    )

    @jax.jit
    def run(logits: Any) -> Any:
        loss = lambda z, r: sequence_cross_entropy(z, 0 * labels - 100, **options, reduction=r)
        return [jax.value_and_grad(loss)(logits, reduction) for reduction in reductions]

    for value, gradient in run(logits):
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_bfloat16_logits_of_a_large_vocabulary_are_normalised_in_float32() -> None:
    logits, labels = draw(32_000, (1, 4))
    logits = logits.astype(jnp.bfloat16)
    exact, _ = formula(logits.astype(np.float32), labels, z=1e-4)
    units = sequence_cross_entropy(logits, labels, z_loss=1e-4, reduction="none")
    np.testing.assert_allclose(units, exact, rtol=1e-6)
    np.testing.assert_allclose(
        token_log_probs(logits, labels), log_softmax(logits.astype(np.float32))[0][
            0, np.arange(4), labels[0]
        ][None], rtol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("classes", [FEW, MANY])
def test_a_class_of_logit_minus_infinity_is_a_class_removed(classes: int) -> None:
    logits, labels = draw(classes)
    labels = np.where(labels == 3, 4, labels)
    ruled_out = logits.copy()
    ruled_out[..., 3] = -np.inf
    fewer, left = labels - (labels > 3), np.delete(logits, 3, axis=-1)
    units, slope = formula(left, fewer)
    p = np.exp(-units)
    exact = {
        sequence_cross_entropy: formula(left, fewer, z=0.1),
        dft_loss: (p * units, p[..., None] * slope),
    }
    for loss, (expected, slope) in exact.items():
        options = dict(z_loss=0.1) if loss is sequence_cross_entropy else {}
        units, gradient = jax.device_get(units_and_gradient(loss, ruled_out, labels, **options))
        close(units, expected)
        close(np.delete(gradient, 3, axis=-1), slope)
        np.testing.assert_array_equal(gradient[..., 3], 0)


def test_lengths_hide_what_lies_beyond_them() -> None:
    logits, labels = draw(FEW, (3, 4))
    lengths = np.array([2, 0, 4])
    inside = np.arange(4) < lengths[:, None]
    where = np.random.default_rng(0).random((3, 4)) < 0.6
    garbage = np.where(inside, labels, 99), np.where(inside[..., None], logits, np.nan)
    units, _ = formula(logits, labels)

    @jax.jit
    def run(labels: Any, logits: Any, **options: Any) -> Any:
        options = dict(lengths=lengths, **options)
        summed, mean = (
            sequence_log_probs(logits, labels, average=average, **options)
            for average in (False, True)
        )
        return sequence_cross_entropy(logits, labels, **options), summed, mean

    for kept, options in ((inside, {}), (inside & where, dict(where=where))):
        got, summed, mean = run(*garbage, **options)
        np.testing.assert_allclose(got, units[kept].mean(), rtol=1e-6)
        np.testing.assert_allclose(summed, -np.sum(units * kept, axis=-1), rtol=2e-6)
        expected = -np.sum(units * kept, axis=-1) / np.maximum(kept.sum(axis=-1), 1)
        np.testing.assert_allclose(mean, expected, rtol=2e-6)
    with pytest.raises(ValueError, match=r"lengths: expected shape \(3,\), got \(1,\)"):
        sequence_cross_entropy(logits, labels, lengths=lengths[:1])
    with pytest.raises(ValueError, match=r"lengths: expected values in \[0, 4\]"):
        checked(sequence_cross_entropy)(logits, labels, lengths=lengths + 1)


# Reductions


def test_the_token_mean_is_no_mean_of_means() -> None:
    logits = np.float32([[[-3.0, 3.0]] * 3, [[0.0, 0.0]] * 3])
    labels = np.array([[0, 9, 9], [1, 1, 1]])
    call = lambda r: sequence_cross_entropy(logits, labels, ignore_index=9, reduction=r)
    first, rest = np.logaddexp(0, 6), np.log(2)
    np.testing.assert_allclose(call("mean"), (first + 3 * rest) / 4, rtol=1e-6)
    np.testing.assert_allclose(call(jaxloss.sequence_mean), (first + rest) / 2, rtol=1e-6)
    np.testing.assert_allclose(call(jaxloss.sequence_sum), (first + 3 * rest) / 2, rtol=1e-6)


def test_packed_rows_cost_what_the_unpacked_sequences_cost() -> None:
    logits, labels = draw(FEW, (3, 4))
    lengths = np.array([3, 1, 4])
    kept = np.arange(4) < lengths[:, None]
    packed = lambda x: np.concatenate([x[kept], x[2, :1]])[None]  # one token of padding
    ids = np.repeat([1, 2, 3, 0], [*lengths, 1])[None].astype(np.int32)
    reductions = jaxloss.sequence_mean, jaxloss.sequence_sum, jaxloss.sequence_sum_scaled(10)

    @jax.jit
    def run(logits: Any, packed_logits: Any) -> Any:
        rows = lambda r: sequence_cross_entropy(
            packed_logits, packed(labels), where=ids > 0, reduction=jaxloss.segmented(r, ids, 3)
        )
        whole = lambda r: sequence_cross_entropy(logits, labels, lengths=lengths, reduction=r)
        return [(rows(r), whole(r)) for r in reductions]

    for one, other in run(logits, packed(logits)):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_microbatches_of_unequal_token_counts_add_up_to_the_full_batch() -> None:
    logits, labels = draw(FEW, (4, 5))
    lengths = np.array([5, 1, 2, 3])

    @jax.jit
    def both(logits: Any) -> Any:
        call = lambda z, part, r: sequence_cross_entropy(
            z[part], labels[part], lengths=lengths[part], reduction=r
        )
        halves = (slice(0, 2), slice(2, 4))
        whole = lambda z: call(z, slice(0, 4), "mean")
        counted = lambda z: sum(call(z, h, jaxloss.normalized_sum(11)) for h in halves)
        paired = lambda z: sum(call(z, h, jaxloss.sum_and_weight) for h in halves).mean()
        averaged = lambda z: sum(call(z, h, "mean") for h in halves) / 2
        return [jax.value_and_grad(f)(logits) for f in (whole, counted, paired, averaged)]

    whole, counted, paired, averaged = both(logits)
    for parts in (counted, paired):
        np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
        close(parts[1], np.asarray(whole[1]))
    assert abs(averaged[0] - whole[0]) > 0.01


# z-loss and soft cap


def test_z_loss_does_not_overflow_and_its_slope_is_twice_lse_times_p() -> None:
    huge = np.full((2, 3), 6e4, np.float16)
    value, slope = jax.jit(jax.value_and_grad(lambda z: z_loss(z) * 1e-5))(huge)
    np.testing.assert_allclose(value, 1e-5 * (6e4 + np.log(3)) ** 2, rtol=1e-6)
    assert np.isfinite(slope).all()
    for dtype in (np.float32, jnp.bfloat16):
        logits = draw(MANY, (3,))[0].astype(dtype)
        log_p, lse = log_softmax(logits.astype(np.float32))
        units, gradient = units_and_gradient(z_loss, logits)
        close(units, lse**2)
        eps = max(EPS, float(jnp.finfo(dtype).eps) / 2)
        close(gradient.astype(np.float32), 2 * lse[:, None] * np.exp(log_p), 8, eps)


def test_a_hidden_row_of_minus_infinities_leaves_no_trace() -> None:
    logits = np.float32([[-np.inf, -np.inf], [1.0, -np.inf]])
    where = np.array([False, True])
    value, gradient = jax.jit(jax.value_and_grad(lambda z: z_loss(z, where=where)))(logits)
    assert value == 1
    np.testing.assert_array_equal(gradient, [[0, 0], [2, 0]])


def test_the_soft_cap_comes_first_and_keeps_its_slope_where_it_is_reached() -> None:
    x = np.linspace(-400, 400, 101).astype(np.float32)
    value, gradient = jax.jit(
        lambda x, c: (soft_cap(x, c), jax.grad(lambda y: jnp.sum(soft_cap(y, c)))(x))
    )(x, 30.0)
    wide = x.astype(np.float64) / 30
    np.testing.assert_allclose(value, 30 * np.tanh(wide), rtol=1e-6)
    np.testing.assert_allclose(gradient, 1 / np.cosh(wide) ** 2, rtol=1e-5)
    logits, labels = draw(FEW)
    capped = 5 * np.tanh(2 * logits)
    options = dict(label_smoothing=0.1, z_loss=0.1)
    np.testing.assert_allclose(
        sequence_cross_entropy(10 * logits, labels, softcap=5.0, **options),
        sequence_cross_entropy(capped, labels, **options),
        rtol=1e-6,
    )
    assert soft_cap(np.ones(2, jnp.bfloat16), 2.0).dtype == jnp.float32
    with pytest.raises(ValueError, match="cap: expected a value above 0"):
        checked(soft_cap)(x, 0.0)


# Log-probabilities


def test_token_log_probs_are_log_softmax_at_the_label() -> None:
    logits, labels = draw(MANY)
    labels[0, 1] = -100
    got = token_log_probs(logits, labels, ignore_index=-100, temperature=0.5, softcap=5.0)
    log_p, _ = log_softmax(5 * np.tanh(logits.astype(np.float64) / 5) / 0.5)
    expected = np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(got, np.where(labels == -100, 0, expected), rtol=1e-6)

    @jax.jit
    def run(logits: Any) -> Any:
        hidden, pull = jax.vjp(lambda z: token_log_probs(z, labels, where=labels >= 0), logits)
        return hidden, pull(jnp.ones_like(hidden))[0]

    hidden, gradient = jax.device_get(run(logits))
    assert hidden[0, 1] == 0
    np.testing.assert_array_equal(gradient[0, 1], 0)


def test_a_sequence_without_tokens_has_log_probability_zero() -> None:
    logits, labels = draw(FEW)
    none = np.zeros(2, int)
    call = lambda z, a: jnp.sum(sequence_log_probs(z, labels, average=a, lengths=none))
    run = jax.jit(lambda z: [jax.value_and_grad(call)(z, a) for a in (False, True)])
    for value, gradient in run(np.full_like(logits, np.nan)):
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_token_log_probs_take_integer_labels_only() -> None:
    with pytest.raises(TypeError, match="token_log_probs: labels: expected an integer dtype"):
        token_log_probs(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))


# Relatives


def test_dft_scales_the_gradient_of_cross_entropy_by_the_probability() -> None:
    logits, labels = draw(FEW)
    units, slope = formula(logits, labels)
    p = np.exp(-units)
    got, gradient = units_and_gradient(dft_loss, logits, labels)
    close(got, p * units)
    close(gradient, p[..., None] * slope)
    far = np.float32([[1e4, -1e4]])
    value, gradient = jax.jit(jax.value_and_grad(dft_loss))(far, np.array([1]))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_each_head_is_scored_against_a_later_token_of_its_own_sequence() -> None:
    logits, labels = draw(FEW, (2, 6, 3))
    labels = labels[..., 0]
    where = np.array([[True] * 6, [True, True, False, True, True, False]])
    ids = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2]])
    for segment_ids in (None, ids):
        got = multi_token_prediction_loss(
            logits,
            np.where(where, labels, -100),
            ignore_index=-100,
            segment_ids=segment_ids,
            where=where,
            reduction="none",
        )
        expected = np.zeros((2, 6, 3))
        kept = np.zeros((2, 6, 3), bool)
        for b, t, k in np.ndindex(2, 6, 3):
            alike = t + k < 6 and (segment_ids is None or ids[b, t] == ids[b, t + k])
            if alike and where[b, t] and where[b, t + k]:
                kept[b, t, k] = True
                expected[b, t, k] = -log_softmax(logits[b, t, k])[0][labels[b, t + k]]
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)
        mean = multi_token_prediction_loss(logits, labels, segment_ids=segment_ids, where=where)
        np.testing.assert_allclose(mean, expected[kept].mean(), rtol=1e-6)


def test_more_heads_than_tokens_leave_the_first_ones() -> None:
    logits = np.zeros((2, 5, 4), np.float32)
    got = multi_token_prediction_loss(logits, np.array([0, 1]), reduction="none")
    np.testing.assert_allclose(
        got, np.log(4) * (np.arange(2)[:, None] + np.arange(5) < 2), rtol=1e-6
    )


def test_one_head_is_sequence_cross_entropy() -> None:
    logits, labels = draw(FEW)
    one = multi_token_prediction_loss(logits[..., None, :], labels, label_smoothing=0.1)
    np.testing.assert_allclose(
        one, sequence_cross_entropy(logits, labels, label_smoothing=0.1), rtol=1e-6
    )


@pytest.mark.parametrize("gap", [0.0, 5.0, 20.0, 1e4])
def test_unlikelihood_of_a_certain_token_is_large_and_finite(gap: float) -> None:
    logits = np.float32([[gap, 0.0, -1.0]])
    units, gradient = jax.device_get(units_and_gradient(unlikelihood_loss, logits, np.array([[0]])))
    rest = np.log1p(np.exp(-1.0))
    exact = np.logaddexp(0, gap - rest)
    np.testing.assert_allclose(units, [exact], rtol=1e-6)
    slope = 1 / (1 + np.exp(np.minimum(rest - gap, 700)))
    np.testing.assert_allclose(gradient[0, 0], slope, rtol=1e-6)
    np.testing.assert_allclose(gradient.sum(), 0, atol=1e-6)


@pytest.mark.parametrize("classes", [FEW, MANY])
def test_unlikelihood_follows_the_closed_form(classes: int) -> None:
    logits, labels = draw(classes, (2, 4, 3))
    logits = logits[:, :, 0]
    labels[0, 0] = [5, 5, 1]  # one of them twice
    kept = np.random.default_rng(0).random(labels.shape) < 0.7
    p = np.exp(log_softmax(logits)[0])
    chosen = np.take_along_axis(p, labels, axis=-1)
    exact = np.sum(-np.log1p(-chosen) * kept, axis=-1)
    hot = np.eye(classes)[labels] * kept[..., None]
    lift = (hot * (chosen / (1 - chosen))[..., None]).sum(axis=-2)
    slope = lift - p * lift.sum(axis=-1, keepdims=True)
    garbage = np.where(kept, labels, -100)
    units, gradient = units_and_gradient(unlikelihood_loss, logits, garbage, negative_where=kept)
    np.testing.assert_allclose(units, exact, rtol=2e-6, atol=1e-7)
    close(gradient, slope, 16)
    bad = unlikelihood_loss(logits, np.where(labels == 5, classes, labels), reduction="none")
    np.testing.assert_array_equal(np.isnan(bad), (labels == 5).any(axis=-1))


def test_a_negative_class_that_is_ruled_out_costs_nothing() -> None:
    logits = np.float32([[-np.inf, 0.0, 0.0]])
    units, gradient = units_and_gradient(unlikelihood_loss, logits, np.array([[0]]))
    np.testing.assert_array_equal(units, 0)
    np.testing.assert_array_equal(gradient, 0)
    _, largest, others = jax.jit(top_and_others)(np.ones((1, 1), np.float32))
    assert largest == 1
    assert others == -jnp.inf


def test_previous_tokens_are_candidates_once_and_never_the_current_one() -> None:
    labels = np.array([[3, 1, 3, 2, 1, 3], [4, 4, 4, -1, 4, 0]])
    where = np.ones_like(labels, bool)
    where[0, 3] = False
    candidates, kept = previous_token_candidates(labels, ignore_index=-1, where=where)
    for b, t in np.ndindex(labels.shape):
        earlier = {int(x) for x, w in zip(labels[b, :t], where[b, :t], strict=True) if w}
        expected = sorted(earlier - {int(labels[b, t]), -1})
        assert sorted(np.asarray(candidates)[b, t][np.asarray(kept)[b, t]].tolist()) == expected
    logits, kept = np.zeros((2, 6, 5), np.float32), np.asarray(kept)
    got = unlikelihood_loss(logits, candidates, negative_where=kept, reduction="none")
    np.testing.assert_allclose(got, kept.sum(axis=-1) * np.log(5 / 4), rtol=1e-6)


@jax.jit
def neutral_and_combined(z: Any, shift: Any) -> Any:
    labels = np.array([0, 1, 2, 3])
    units = lambda **options: sequence_cross_entropy(z, labels, reduction="none", **options)
    zero = 0 * shift
    neutral = units(label_smoothing=zero, z_loss=zero, softcap=zero + 1e6)
    summed = units() + shift * z_loss(z, reduction="none")
    return units(), neutral, token_log_probs(z, labels), summed, units(z_loss=shift)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (4, 5), elements=st.floats(-30, 30, width=32)), st.floats(0, 0.5))
def test_options_at_their_neutral_values_change_nothing(z: Any, shift: float) -> None:
    base, neutral, log_probs, summed, both = neutral_and_combined(z, np.float32(shift))
    np.testing.assert_allclose(neutral, base, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(-log_probs, base, rtol=1e-6)
    np.testing.assert_allclose(both, summed, rtol=1e-5, atol=1e-5)


# Memory and communication

TOKENS, VOCABULARY = 1024, 32768
FULL = TOKENS * VOCABULARY * 4 / MIB
CLASS_WEIGHTS = np.ones(VOCABULARY, np.float32)
ALL = dict(label_smoothing=0.1, z_loss=1e-4, softcap=30.0, class_weights=CLASS_WEIGHTS)
LEAN: dict[str, Callable[..., Any]] = {
    "smoothing and z-loss": lambda z, y: sequence_cross_entropy(
        z, y, label_smoothing=0.1, z_loss=1e-4, ignore_index=-100
    ),
    "soft cap": lambda z, y: sequence_cross_entropy(z, y, softcap=30.0),
    "all": lambda z, y: sequence_cross_entropy(z, y, ignore_index=-100, **ALL),
    "z_loss": lambda z, y: z_loss(z, where=y > 0),
    "token_log_probs": lambda z, y: jnp.sum(token_log_probs(z, y, temperature=0.7, softcap=30.0)),
    "sequence_log_probs": lambda z, y: jnp.sum(sequence_log_probs(z, y, average=True)),
}


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize(("dtype", "copies"), [(jnp.float32, 0), (jnp.bfloat16, 1)])
def test_no_option_needs_a_second_copy_of_the_logits(name: str, dtype: Any, copies: int) -> None:
    logits = jax.ShapeDtypeStruct((TOKENS, VOCABULARY), dtype)
    labels = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    program = jax.jit(jax.value_and_grad(LEAN[name])).lower(logits, labels).compile()
    temporaries = program.memory_analysis().temp_size_in_bytes / MIB
    assert temporaries < (copies + 0.01) * FULL


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_vocabulary_split_over_devices_is_not_gathered(kind: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    logits, labels = draw(1600, (2, 3))
    options = dict(label_smoothing=0.1, z_loss=0.1, softcap=5.0)
    step = jax.jit(jax.value_and_grad(lambda z, y: sequence_cross_entropy(z, y, **options)))
    expected, slope = formula(logits, labels, smoothing=0.1, z=0.1, cap=5)
    with jax.set_mesh(mesh):
        arguments = put(logits, None, None, "model"), put(labels)
        compiled = step.lower(*arguments).compile()
        value, gradient = compiled(*arguments)
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-6)
    close(jax.device_get(gradient), slope / 6, 16)
