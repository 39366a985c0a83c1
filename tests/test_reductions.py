"""`reduce`, `mask` and every reduction: closed forms, limits, and what adds up over parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType, PartitionSpec

import jaxloss
from jaxloss._core.reduce import mask

VALUES = np.array([1, 5, 3, 2], np.float32)
ONES = np.ones(4, np.float32)
positive = st.floats(0.125, 8, width=32)


@partial(jax.jit, static_argnames="reduction")
def reduced(values, where=None, weights=None, reduction="mean"):
    return jaxloss.reduce(values, where=where, weights=weights, reduction=reduction)


@partial(jax.jit, static_argnames="reduction")
def with_slope(values, where=None, reduction="mean"):
    mean = lambda v: jaxloss.reduce(v, where=where, reduction=reduction)
    return jax.value_and_grad(mean)(values)


def test_the_mean_divides_by_the_sum_of_the_weights() -> None:
    error, weights = np.float32([1, 2]), np.float32([1, 3])
    assert jaxloss.squared_error(error, 0 * error, weights=weights) == 3.25
    assert jaxloss.absolute_error(error, 0 * error, weights=weights) == 1.75


def test_the_mean_of_nothing_is_zero_with_zero_gradient() -> None:
    value, slope = with_slope(VALUES, np.zeros(4, bool))
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
    assert reduced(np.zeros(0, np.float32)) == 0


def test_weights_that_sum_to_a_fraction_are_not_replaced_by_one() -> None:
    weights = np.float32([0, 0.096, 0, 0])
    assert reduced(VALUES, weights=weights) == pytest.approx(5)


def test_none_keeps_units_weighted_and_hidden_ones_zero() -> None:
    where, weights = np.array([True, False, True, True]), np.float32([2, 9, 1, 0.5])
    units = reduced(VALUES, where=where, weights=weights, reduction="none")
    np.testing.assert_array_equal(units, [2, 0, 3, 1])


def test_a_mask_covers_leading_axes_and_keeps_dtypes() -> None:
    rows = np.full((2, 3), np.nan, np.float32)
    labels = np.array([7, 2**31 - 1], np.int32)
    rows, labels = jax.jit(mask)(np.array([True, False]), rows, labels)
    np.testing.assert_array_equal(rows[1], 0)
    assert np.all(np.isnan(rows[0]))
    assert labels.dtype == jnp.int32
    assert labels[1] == 0


def test_a_callable_gets_hidden_units_with_weight_zero() -> None:
    seen = {}

    def keep(values, weights):
        seen.update(values=values, weights=weights)
        return jnp.sum(values)

    jaxloss.reduce(VALUES, where=np.array([True, False, True, False]), reduction=keep)
    np.testing.assert_array_equal(seen["weights"], [1, 0, 1, 0])
    np.testing.assert_array_equal(seen["values"], [1, 0, 3, 0])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(reduction="median"), ValueError, "reduce: reduction: expected 'mean', 'sum'"),
        (dict(reduction=7), TypeError, "reduce: reduction: expected 'mean', 'sum'"),
        (dict(where=np.ones((4, 1), bool)), ValueError, r"reduce: where: expected shape \(4,\)"),
        (dict(where=ONES), TypeError, "reduce: where: expected a bool array, got float32"),
        (
            dict(weights=np.ones(1, np.float32)),
            ValueError,
            r"reduce: weights: expected shape \(4,\), got \(1,\)",
        ),
        (dict(weights=[1.0] * 4), TypeError, "reduce: weights: expected an array, got list"),
    ],
)
def test_bad_arguments_are_named(options, error, text) -> None:
    with pytest.raises(error, match=text):
        jaxloss.reduce(VALUES, **options)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jaxloss.top_k(0), "top_k: amount: expected a count of at least 1, got 0"),
        (lambda: jaxloss.top_k(1.5), r"top_k: amount: expected a share in \(0, 1\], got 1.5"),
    ],
)
def test_a_reduction_checks_its_own_parameter(make, text) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_pairs_add_up_over_microbatches_where_means_of_means_do_not() -> None:
    first, second = np.float32([4]), np.float32([1, 1, 1])
    pairs = [reduced(v, reduction=jaxloss.sum_and_weight) for v in (first, second)]
    assert sum(pairs).mean() == 1.75
    assert (np.mean(first) + np.mean(second)) / 2 == 2.5


def test_a_pair_passes_through_scan_and_jit() -> None:
    def step(carry, row):
        return carry + jaxloss.reduce(row, reduction=jaxloss.sum_and_weight), None

    start = jaxloss.SumAndWeight(np.float32(0), np.float32(0))
    total, _ = jax.jit(lambda x: jax.lax.scan(step, start, x))(VALUES.reshape(2, 2))
    assert total.mean() == np.mean(VALUES)
    assert start.mean() == 0


def test_the_gradient_of_an_empty_pair_is_zero() -> None:
    mean = lambda s: jaxloss.SumAndWeight(s, np.float32(0)).mean()
    assert jax.jit(jax.grad(mean))(np.float32(3)) == 0


def test_equal_reductions_compile_once() -> None:
    loss = jaxloss.squared_error
    loss(VALUES, VALUES, reduction=jaxloss.top_k(0.7))
    before = loss.jitted._cache_size()
    loss(VALUES, VALUES, reduction=jaxloss.top_k(0.7))
    loss(VALUES, VALUES, reduction=jaxloss.cvar(0.5))
    grown = loss.jitted._cache_size()
    loss(VALUES, VALUES, reduction=jaxloss.cvar(0.9))
    assert grown == before + 1 == loss.jitted._cache_size()


def test_a_traced_normaliser_travels_inside_the_reduction() -> None:
    @jax.jit
    def step(count):
        return jaxloss.squared_error(VALUES, 0 * VALUES, reduction=jaxloss.normalized_sum(count))

    assert step(np.float32(13)) == 3.0


@pytest.mark.parametrize("axes", [(AxisType.Auto,), (AxisType.Explicit,)])
@pytest.mark.parametrize(
    "reduction", [jaxloss.top_k(0.5), jaxloss.cvar(0.5), jaxloss.ohem(min_kept=3)]
)
def test_sorting_reductions_see_all_units_of_a_sharded_array(axes, reduction) -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=axes)
    values = np.arange(8, dtype=np.float32)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(values, jax.NamedSharding(mesh, PartitionSpec("data")))
        got, slope = jax.device_get(with_slope(sharded, reduction=reduction))
    expected, plain = with_slope(values, reduction=reduction)
    assert got == expected
    np.testing.assert_array_equal(slope, plain)


def test_across_is_the_global_mean_under_vmap_and_shard_map() -> None:
    where = np.arange(8).reshape(4, 2) > 4
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    expected, plain = with_slope(values, where)
    local = lambda v, w: jaxloss.reduce(v, where=w, reduction=jaxloss.across("i"))
    np.testing.assert_allclose(jax.jit(jax.vmap(local, axis_name="i"))(values, where), expected)
    mesh = jax.make_mesh((4,), ("i",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    spec = PartitionSpec("i")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec())
    value, slope = jax.jit(jax.value_and_grad(mapped))(values, where)
    np.testing.assert_allclose(value, expected)
    np.testing.assert_allclose(slope, plain)


def test_top_k_counts_shares_of_the_kept_units() -> None:
    where = np.array([True, False, True, True])
    top = lambda amount: jax.jit(partial(jaxloss.reduce, reduction=jaxloss.top_k(amount)))(
        VALUES, where=where
    )
    assert top(1) == 3
    assert top(2) == 2.5
    assert top(100) == 2
    assert top(0.34) == 3
    assert top(1.0) == 2
    assert reduced(VALUES, reduction=jaxloss.top_k(0.7)) == pytest.approx(10 / 3)


def test_a_compiled_loss_tells_a_count_of_one_from_a_share_of_one() -> None:
    values = [
        jaxloss.absolute_error(VALUES, 0 * VALUES, reduction=jaxloss.top_k(n)) for n in (1, 1.0)
    ]
    assert values == [5, 2.75]
    assert jaxloss.top_k(1) != jaxloss.top_k(1.0) == jaxloss.top_k(1.0)


def test_top_k_of_nothing_is_zero_with_zero_gradient() -> None:
    for reduction in (jaxloss.top_k(2), jaxloss.top_k(0.5), jaxloss.cvar(0.5), jaxloss.ohem()):
        value, slope = with_slope(VALUES, np.zeros(4, bool), reduction=reduction)
        assert value == 0
        np.testing.assert_array_equal(slope, 0)
        assert reduced(np.zeros(0, np.float32), reduction=reduction) == 0


def test_top_k_never_chooses_a_hidden_unit_even_if_all_losses_are_negative() -> None:
    where = np.array([True, True, False, False])
    assert reduced(-VALUES, where, reduction=jaxloss.top_k(3)) == -3


def test_a_nan_unit_shows_in_every_reduction() -> None:
    values = np.where(VALUES == 1, np.float32(np.nan), VALUES)
    for reduction in (
        "mean",
        jaxloss.top_k(1),
        jaxloss.top_k(0.25),
        jaxloss.cvar(0.75),
        jaxloss.ohem(min_kept=1),
        jaxloss.nonzero_mean,
        jaxloss.mean_over_count,
    ):
        assert np.isnan(reduced(values, reduction=reduction)), reduction


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, 12, elements=positive), arrays(bool, 12), st.integers(0, 12))
def test_ohem_keeps_what_a_sort_keeps(values, where, min_kept) -> None:
    got = reduced(values, where, reduction=jaxloss.ohem(0.3, min_kept))
    kept = values[where]
    hard = kept[kept > -np.log(np.float32(0.3))]
    if min_kept and kept.size:
        border = np.sort(kept)[::-1][min(min_kept, kept.size) - 1]
        hard = kept[(kept > -np.log(np.float32(0.3))) | (kept >= border)]
    np.testing.assert_allclose(got, hard.mean() if hard.size else 0, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, 6, elements=positive), arrays(np.int32, 6, elements=st.integers(0, 3)))
def test_cvar_with_whole_weights_is_cvar_of_repeated_units(values, weights) -> None:
    got = reduced(values, weights=weights, reduction=jaxloss.cvar(0.5))
    repeated = np.sort(np.repeat(values, weights).astype(np.float64))[::-1]
    mass = repeated.size / 2
    share = np.clip(mass - np.arange(repeated.size), 0, 1)
    expected = np.sum(share * repeated) / mass if mass else 0
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_cvar_at_level_zero_is_the_mean_and_near_one_the_maximum() -> None:
    assert reduced(VALUES, reduction=jaxloss.cvar(0.0)) == np.mean(VALUES)
    assert reduced(VALUES, reduction=jaxloss.cvar(0.999)) == pytest.approx(5)


def test_nonzero_mean_leaves_satisfied_units_out() -> None:
    values = np.float32([0, 0, 2, 4])
    assert reduced(values, reduction=jaxloss.nonzero_mean) == 3
    assert reduced(0 * values, reduction=jaxloss.nonzero_mean) == 0


def test_mean_over_count_divides_by_units_as_torch_huber_does() -> None:
    error, weights = np.float32([1, 2]), np.float32([1, 3])
    got = jaxloss.l2_loss(error, 0 * error, weights=weights, reduction=jaxloss.mean_over_count)
    assert got == (0.5 + 3 * 2) / 2


TOKENS = np.float32([[4, 9, 9], [1, 2, 3], [9, 9, 9]])
KEPT = np.array([[True, False, False], [True, True, True], [False, False, False]])


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("mean", 10 / 4),
        (jaxloss.sequence_mean, (4 + 2) / 2),
        (jaxloss.sequence_sum, (4 + 6) / 2),
        (jaxloss.sequence_sum_scaled(10), 0.5),
        (jaxloss.normalized_sum(20), 0.5),
    ],
)
def test_sequence_reductions_leave_empty_sequences_out(reduction, expected) -> None:
    assert reduced(TOKENS, KEPT, reduction=reduction) == expected


@pytest.mark.parametrize(
    "reduction",
    ["mean", jaxloss.sequence_mean, jaxloss.sequence_sum, jaxloss.sequence_sum_scaled(7)],
)
def test_packed_rows_reduce_like_the_unpacked_sequences(reduction) -> None:
    packed, ids = np.float32([[4, 1, 2, 3, 99]]), np.array([[1, 2, 2, 2, 0]], np.int32)
    call = lambda v, w: reduction(v, w) if callable(reduction) else jaxloss.reduce(v, weights=w)
    segmented = partial(jaxloss.segmented, call, num_segments=3)
    run = lambda v, ids: jaxloss.reduce(v, where=ids > 0, reduction=segmented(ids))
    assert jax.jit(run)(packed, ids) == reduced(TOKENS, KEPT, reduction=reduction)


def test_a_segment_id_out_of_range_shows_as_nan_unless_masked() -> None:
    values, ids = np.ones((1, 3), np.float32), np.array([[1, 2, 3]], np.int32)
    packed = jaxloss.segmented(jaxloss.sequence_mean, ids, num_segments=2)
    run = jax.jit(lambda where: jaxloss.reduce(values, where=where, reduction=packed))
    assert np.isnan(run(np.ones((1, 3), bool)))
    assert run(np.array([[True, True, False]])) == 1
    with pytest.raises(TypeError, match="segment_ids: expected an integer dtype"):
        jaxloss.reduce(values, reduction=jaxloss.segmented(jaxloss.sequence_mean, values, 2))
