"""Cox's partial likelihood: risk sets one by one, ties, strata, far hazards, devices, memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxloss import across, checked
from jaxloss.losses.survival import cox_ph_efron_loss, cox_ph_loss

N = 9
GENERATOR = np.random.default_rng(0)
HAZARDS = GENERATOR.standard_normal(N) * 2
TIMES = GENERATOR.integers(1, 4, N).astype(np.float64)
EVENTS = GENERATOR.random(N) < 0.7
STRATA = GENERATOR.integers(-1, 2, N, np.int32)
WHERE = np.arange(N) % 5 != 2
LOSSES = dict(breslow=cox_ph_loss, efron=cox_ph_efron_loss)
TIE_PATTERNS = {
    "no ties": np.arange(N)[::-1] * 0.5,
    "some ties": TIMES,
    "all tied": np.full(N, 3.0),
}


def risk_sets(time: Any, event: Any, strata: Any, where: Any) -> Any:
    """Of each event, how much every subject counts in the sums of both losses, and their shares."""
    breslow = np.eye(N)  # who has no event is alone, which costs nothing
    efron, shares = np.tile(breslow[:, None], (1, N, 1)), np.zeros((N, N))
    shares[:, 0] = 1
    for i in np.flatnonzero(event & where):
        mine = where & (strata == strata[i])
        risk = mine & (time >= time[i])
        tied = mine & (time == time[i]) & event
        d = int(tied.sum())
        breslow[i] = risk
        efron[i, :d] = risk - np.arange(d)[:, None] / d * tied
        shares[i, :d] = 1 / d
    return breslow, efron, shares


def by_definition(h: Any, breslow: Any, efron: Any, shares: Any) -> dict[str, Any]:
    total = lambda mass: jax.nn.logsumexp(jnp.broadcast_to(h, mass.shape), axis=-1, b=mass)
    return dict(breslow=total(breslow) - h, efron=jnp.sum(shares * total(efron), axis=1) - h)


def every(h: Any, *arrays: Any, **options: Any) -> dict[str, Any]:
    options = dict(reduction="none") | options
    return {name: loss(h, *arrays, **options) for name, loss in LOSSES.items()}


@jax.jit
def ours(h: Any, moved: Any, time: Any, event: Any, strata: Any, where: Any) -> Any:
    return derivatives(lambda h: every(h, time, event, strata=strata, where=where), h, moved)


@jax.jit
def plain(h: Any, moved: Any, sets: Any) -> Any:
    return derivatives(lambda h: by_definition(h, *sets), h, moved)


def derivatives(units: Any, h: Any, moved: Any) -> Any:
    """Units, gradients, forward derivatives and Hessian-vector products."""
    out = {"units": units(h)}
    for name in LOSSES:
        gradient = jax.grad(lambda h, name=name: jnp.sum(units(h)[name] ** 2))
        forward = jax.jvp(lambda h, name=name: units(h)[name], (h,), (moved,))[1]
        out[name] = gradient(h), forward, jax.jvp(gradient, (h,), (moved,))[1]
    return out


@pytest.mark.parametrize("name", TIE_PATTERNS)
def test_units_and_their_derivatives_are_those_of_the_loop_over_risk_sets(name: str) -> None:
    time, moved = TIE_PATTERNS[name], GENERATOR.standard_normal(N)
    arrays = time, EVENTS, STRATA, WHERE
    with jax.enable_x64(True):
        got = ours(HAZARDS, moved, *arrays)
        expected = plain(HAZARDS, moved, risk_sets(*arrays))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, expected)


def test_thousands_of_subjects_keep_their_digits() -> None:
    count = 64 * 64 + 9
    g = np.random.default_rng(1)
    h = (30 * np.sin(np.arange(count) / 300) + g.standard_normal(count)).astype(np.float32)
    time, event = (np.arange(count) // 3)[::-1].astype(np.float32), g.random(count) < 0.5
    at_risk = np.unique(time)[:, None] <= time
    heights = np.where(at_risk, np.float64(h), -np.inf)
    risk = np.logaddexp.reduce(heights, axis=1)[np.searchsorted(np.unique(time), time)]

    @jax.jit
    def units_and_gradient(h: Any) -> Any:
        units, pull = jax.vjp(lambda h: cox_ph_loss(h, time, event, reduction="none"), h)
        return units, pull(jnp.ones_like(units))[0]

    units, gradient = units_and_gradient(h)
    np.testing.assert_allclose(units, np.where(event, risk - h, 0), rtol=2e-6)
    events = np.bincount(time.astype(int), event)[:, None]
    level = np.logaddexp.reduce(heights, axis=1)[:, None]
    exact = np.sum(events * np.exp(heights - level), axis=0) - event
    np.testing.assert_allclose(gradient, exact, rtol=2e-6, atol=2e-6 * np.abs(exact).max())


def test_without_ties_efron_and_breslow_agree() -> None:
    units = every(HAZARDS, TIE_PATTERNS["no ties"], EVENTS)
    np.testing.assert_allclose(units["efron"], units["breslow"], rtol=1e-6, atol=1e-7)


def test_the_order_of_tied_subjects_does_not_matter() -> None:
    """Pycox sorts by time alone, so that its loss depends on the order of the rows."""
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(N)
        for name, units in every(HAZARDS, TIMES, EVENTS).items():
            moved = LOSSES[name](HAZARDS[order], TIMES[order], EVENTS[order], reduction="none")
            np.testing.assert_allclose(moved, np.asarray(units)[order], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_batch_without_events_and_a_single_subject_cost_nothing(loss: Any) -> None:
    h, step = HAZARDS.astype(np.float32), jax.jit(jax.value_and_grad(loss))
    for count, events in ((N, False), (1, True), (1, False), (0, False)):
        event = np.full(count, events)
        value, gradient = step(h[:count], TIMES[:count], event)
        np.testing.assert_array_equal(value, 0)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_risk_sets_far_below_the_largest_hazard_are_not_lost(loss: Any) -> None:
    """A shift by the maximum of the batch gives log(0 + 1e-7) where pycox has such a set."""
    h = np.float32([0, -70, -71, -1000, -1000])
    time, event = np.arange(5.0), np.array([True, True, True, True, False])
    units = loss(h, time, event, reduction="none")
    exact = [np.exp(-70.0) * (1 + np.exp(-1)), np.log1p(np.exp(-1)), 0, np.log(2), 0]
    np.testing.assert_allclose(units, exact, rtol=1e-5)
    gradient = jax.jit(jax.grad(partial(loss, reduction="sum")))(h, time, event)
    share = 1 / (1 + np.exp(1))
    exact = [-exact[0], exact[0] - share, share, -0.5, 0.5]
    np.testing.assert_allclose(gradient, exact, rtol=1e-5)


def test_adding_a_constant_to_all_hazards_changes_nothing() -> None:
    for name, units in every(HAZARDS, TIMES, EVENTS).items():
        shifted = LOSSES[name](HAZARDS + 512, TIMES, EVENTS, reduction="none")
        rounded = np.float32(HAZARDS + 512) - np.float32(512)
        same = LOSSES[name](rounded, TIMES, EVENTS, reduction="none")
        np.testing.assert_allclose(shifted, same, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(shifted, units, rtol=1e-3, atol=1e-3)


def test_strata_are_separate_risk_sets_whose_sums_add_up() -> None:
    for name, loss in LOSSES.items():
        total = partial(loss, HAZARDS, TIMES, EVENTS, reduction="sum")
        whole = total(strata=STRATA, where=np.ones(N, bool))
        parts = [total(strata=0 * STRATA, where=stratum == STRATA) for stratum in (-1, 0, 1)]
        np.testing.assert_allclose(whole, sum(parts), rtol=1e-6, err_msg=name)


def test_times_may_be_integers_negative_or_infinite_and_both_zeros_are_one_time() -> None:
    h, event = np.float32([1, 2, 3]), np.array([True, True, False])
    loss = partial(cox_ph_loss, reduction="none")
    first = np.asarray(loss(h, np.float32([0.0, -0.0, 5]), event))
    np.testing.assert_allclose(first[:2], np.logaddexp.reduce(h) - h[:2], rtol=1e-6)
    np.testing.assert_array_equal(first, loss(h, np.int32([-7, -7, 2**31 - 1]), event))
    np.testing.assert_array_equal(first, loss(h, np.float32([-np.inf, -np.inf, np.inf]), event))
    np.testing.assert_array_equal(first, loss(h, np.uint8([3, 3, 255]), event.astype(int)))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_bad_event_or_time_is_not_a_number_in_value_and_gradient(loss: Any) -> None:
    event, time = EVENTS.astype(np.float32), TIMES.astype(np.float32)
    bad_event, bad_time = event.copy(), time.copy()
    bad_event[3], bad_time[3] = 2, np.nan
    h = HAZARDS.astype(np.float32)
    both = jax.jit(lambda *arrays, where: jax.value_and_grad(loss)(h, *arrays, where=where))
    for arrays in ((time, bad_event), (bad_time, np.ones_like(event))):
        value, gradient = both(*arrays, where=np.ones(N, bool))
        assert np.isnan(value)
        assert np.isnan(gradient).any()
        value, gradient = both(*arrays, where=np.arange(N) != 3)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
    name = loss.__name__
    with pytest.raises(ValueError, match=f"{name}: event: expected 0 or 1"):
        checked(loss)(HAZARDS, time, bad_event)
    with pytest.raises(ValueError, match=f"{name}: time: expected numbers"):
        checked(loss)(HAZARDS, bad_time, event)


def test_subjects_split_over_devices_have_the_risk_sets_of_all() -> None:
    mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    split = PartitionSpec("data")
    arrays = TIMES, EVENTS, STRATA, WHERE

    def local(loss: Any, h: Any, time: Any, event: Any, strata: Any, where: Any) -> Any:
        options = dict(strata=strata, where=where, axis_name="data", reduction=across("data"))
        return loss(h, time, event, **options)

    def both(h: Any) -> Any:
        out = {}
        for name, loss in LOSSES.items():
            over = jax.shard_map(
                partial(local, loss), mesh=mesh, in_specs=(split,) * 5, out_specs=PartitionSpec()
            )
            whole = lambda h, f=loss: f(h, TIMES, EVENTS, strata=STRATA, where=WHERE)
            out[name] = [jax.value_and_grad(f)(h) for f in (lambda h, f=over: f(h, *arrays), whole)]
        return out

    with jax.enable_x64(True):
        for got, expected in jax.device_get(jax.jit(both)(jnp.asarray(HAZARDS))).values():
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), got, expected)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_memory_grows_with_the_subjects_not_with_their_pairs(loss: Any) -> None:
    count = 2**14
    arrays = [jax.ShapeDtypeStruct((count,), kind) for kind in (jnp.float32, jnp.float32, bool)]
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * 4 * count  # all pairs: 1 GiB
