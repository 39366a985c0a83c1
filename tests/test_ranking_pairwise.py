"""Pairwise ranking: sums without an array of pairs, packed lists, pair weights, memory."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxloss import across, checked, sum_and_weight
from jaxloss._core import list_pairs
from jaxloss._core.lists import Lists
from jaxloss._core.reductions import per_list_mean
from jaxloss.losses.ranking_lambda import (
    dcg2_pair_weight,
    dcg_pair_weight,
    label_difference_pair_weight,
    lambda_loss,
    mrr_pair_weight,
    precision_pair_weight,
)
from jaxloss.losses.ranking_pairwise import (
    pairwise_hinge_loss,
    pairwise_logistic_loss,
    pairwise_quantile_loss,
    pairwise_soft_zero_one_loss,
    pairwise_squared_loss,
)
from jaxloss.losses.ranking_pointwise import (
    margin_ranking_loss,
    ordinal_loss,
    pointwise_sigmoid_loss,
    pointwise_squared_loss,
)

PAIRWISE = dict(
    logistic=pairwise_logistic_loss,
    hinge=pairwise_hinge_loss,
    soft_zero_one=pairwise_soft_zero_one_loss,
    squared=pairwise_squared_loss,
    quantile=partial(pairwise_quantile_loss, tau=0.3),
    quantile_squared=partial(pairwise_quantile_loss, tau=0.3, squared=True),
)
WEIGHTS = dict(
    dcg=dcg_pair_weight,
    dcg2=dcg2_pair_weight,
    label_difference=label_difference_pair_weight,
    mrr=mrr_pair_weight,
    precision=precision_pair_weight,
)
PATHS = [("logistic", 5), ("logistic", 20), ("hinge", 520), ("squared", 20)]  # ways to add up


def draw(lists: int, items: int, seed: int = 0, grades: int = 4) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((lists, items))
    relevance = generator.integers(0, grades, (lists, items), np.int32)
    return scores, relevance, generator.random((lists, items)) < 0.8


def added_up(values: Any, weights: Any) -> Any:
    """The sum, as a reduction that wants to see every pair."""
    return jnp.sum(weights * values)


@pytest.mark.parametrize(
    ("name", "items"),  # the circle of items closes differently for odd and even
    [
        ("logistic", 17),
        ("logistic", 24),
        ("hinge", 9),
        ("soft_zero_one", 10),
        ("squared", 9),
        ("quantile", 9),
        ("quantile_squared", 10),
    ],
)
def test_sums_a_few_pairs_at_a_time_have_every_derivative_of_the_sum_of_units(
    name: str, items: int
) -> None:
    scores, relevance, where = draw(2, items)
    segments = np.random.default_rng(1).integers(0, 3, scores.shape, np.int32)
    direction = np.random.default_rng(2).standard_normal(scores.shape)

    def both(scores: Any, relevance: Any, where: Any, segments: Any, direction: Any) -> Any:
        def under(reduction: Any) -> Any:
            packed = dict(segments=segments, num_segments=3) if items % 2 else {}
            options = dict(where=where, reduction=reduction, **packed)
            loss = lambda s: PAIRWISE[name](s, relevance, **options)
            return jax.jvp(jax.value_and_grad(loss), (scores,), (direction,))

        return under("sum"), under(added_up)

    with jax.enable_x64(True):
        short, plain = jax.jit(both)(scores, relevance, where, segments, direction)
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12 * max(np.max(np.abs(b)), 1))
    assert not np.any(short[0][1][~where])


@jax.jit
def hinges(scores: Any, relevance: Any, lists: Lists, margin: Any) -> Any:
    """Sum, number of pairs and gradients, by sorting and by the definition, of each row."""

    def plain(scores: Any, margin: Any, relevance: Any, lists: Lists) -> Any:
        pairs = list_pairs.all_pairs(scores, relevance, lists)
        values = jax.nn.relu(margin + pairs.gap)
        return jnp.sum(pairs.sum(values)), jnp.sum(pairs.kept)

    def short(scores: Any, margin: Any, relevance: Any, lists: Lists) -> Any:
        return list_pairs.sorted_hinge(scores, relevance, lists, margin)

    def of_row(function: Any, scores: Any, relevance: Any, lists: Lists) -> Any:
        both = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
        return both(scores, margin, relevance, lists)

    rows = lambda function: jax.vmap(partial(of_row, function))(scores, relevance, lists)
    return rows(short), rows(plain)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_hinge_by_sorting_is_that_of_all_pairs_also_at_kinks_and_ties(packed: bool) -> None:
    generator = np.random.default_rng(0)
    rows, items = 200, 13
    scores = generator.integers(-3, 4, (rows, items)).astype(float)
    scores[::2] = generator.standard_normal((rows // 2, items))
    scores[::5] *= 1e4
    levels = generator.integers(1, 9, (rows, 1))  # from one level to as many as items
    relevance = generator.integers(-5, 5 * levels - 5, (rows, items)) / 2
    relevance[::7] = generator.standard_normal((len(relevance[::7]), items))
    where = generator.random((rows, items)) < generator.random((rows, 1)) + 0.2
    segments = generator.integers(-4, 4, (rows, items), np.int32) if packed else None
    scores, relevance = scores * where, relevance * where
    with jax.enable_x64(True):
        lists = Lists(where, segments)
        for margin in (1.0, 0.3, 0.0, -1.0):
            short, plain = hinges(scores, relevance, lists, margin)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-9), short, plain)


@pytest.mark.parametrize("items", [512, 700])
def test_long_lists_have_the_hinge_of_short_ones_side_by_side(items: int) -> None:
    scores, relevance, where = draw(2, items)
    scores = 1e4 + scores  # digits are those of the gaps

    def both(scores: Any, relevance: Any, where: Any) -> Any:
        loss = lambda s, reduction: pairwise_hinge_loss(
            s, relevance, where=where, reduction=reduction
        )
        return [jax.value_and_grad(loss)(scores, r) for r in ("mean", per_mean)]

    def per_mean(values: Any, weights: Any) -> Any:
        return jnp.sum(weights * values) / jnp.sum(weights)

    single = scores.astype(np.float32)
    short, plain = jax.jit(both)(single, relevance, where)
    np.testing.assert_allclose(short[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(short[1], plain[1], rtol=0, atol=1e-6 * np.max(np.abs(plain[1])))


def test_packed_lists_have_the_units_and_gradients_of_padded_ones() -> None:
    sizes = (3, 1, 2, 2)
    scores, relevance, _ = draw(1, sum(sizes))
    owner = np.repeat(np.arange(4), sizes)
    mixed = np.random.default_rng(3).permutation(sum(sizes))
    padded = np.full((4, max(sizes)), -1)
    for i in range(4):
        padded[i, : sizes[i]] = np.flatnonzero(owner[mixed] == i)
    where = padded >= 0
    scores, relevance, segments = scores[:, mixed], relevance[:, mixed], owner[mixed][None]

    def alone(loss: Any, scores: Any) -> Any:
        return loss(scores[0, padded], relevance[0, padded], where=where)

    def together(loss: Any, scores: Any) -> Any:
        return loss(scores, relevance, segments=segments, num_segments=4)

    @jax.jit
    def found(scores: Any) -> Any:
        losses = {name: PAIRWISE[name] for name in ("logistic", "squared")}
        for name in ("dcg", "precision"):
            options = dict(pair_weight=WEIGHTS[name], top_n=2, reduction="none")
            losses[f"lambda {name}"] = partial(lambda_loss, **options)

        def both(loss: Any) -> Any:
            ways = [lambda s, way=way: jnp.ravel(way(loss, s)) for way in (alone, together)]
            return [gradient_and_units(way, scores) for way in ways]

        return {name: both(loss) for name, loss in losses.items()}

    with jax.enable_x64(True):
        for name, (first, second) in found(scores).items():
            for a, b in zip(second, first, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-12, err_msg=name)


def test_an_item_of_no_list_makes_its_row_nan() -> None:
    scores, relevance, _ = draw(2, 4)
    segments = np.array([[0, 1, 0, 1], [0, 2, 0, 1]])
    loss = partial(lambda_loss, segments=segments, num_segments=2, reduction="none")
    units = np.asarray(loss(scores, relevance, where=np.ones((2, 4), bool)))
    assert np.all(np.isfinite(units[0]))
    assert np.all(np.isnan(units[1, :1]))
    shown = segments < 2
    assert np.all(np.isfinite(loss(scores, relevance, where=shown)))
    hinge = partial(pairwise_hinge_loss, scores, relevance, segments=segments)
    assert np.isnan(hinge(num_segments=2))
    assert np.isfinite(hinge())  # any name will do where nothing counts the lists
    with pytest.raises(ValueError, match=r"segments: expected values in \[0, 2\), got 1 "):
        checked(loss)(scores, relevance)
    with pytest.raises(ValueError, match="num_segments: expected the number of lists in a row"):
        lambda_loss(scores, relevance, segments=segments)


@partial(jax.jit, static_argnums=0)
def mean(name: str, scores: Any, relevance: Any, where: Any) -> Any:
    """Value and gradient of the mean."""
    return jax.value_and_grad(PAIRWISE[name])(scores, relevance, where=where)


@pytest.mark.parametrize(("name", "items"), PATHS)
def test_lists_of_equal_relevance_cost_nothing_whatever_their_scores(name, items) -> None:
    scores, _, where = draw(2, items)
    scores[0, 0], where[0, 0] = np.nan, True  # in no pair
    if name != "squared":
        value, gradient = mean(name, scores, np.full(scores.shape, 2.0), where)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(("name", "items"), PATHS)
def test_what_is_no_number_never_vanishes_and_is_harmless_under_the_mask(name, items) -> None:
    scores, relevance, where = draw(2, items)
    where[:, :3] = True, True, False
    relevance = relevance.astype(float)
    relevance[:, :2] = 0, 1
    clean = mean(name, scores, relevance, where)
    assert np.all(np.isfinite(clean[1]))
    for bad in (np.nan, np.inf, -np.inf):
        hidden = [np.where(where, x, bad) for x in (scores, relevance)]
        jax.tree.map(np.testing.assert_array_equal, mean(name, *hidden, where), clean)
    marked = (np.arange(items) == 1) & (np.arange(2)[:, None] == 0)
    broken = np.where(marked, np.nan, scores), np.where(marked, np.nan, relevance)
    assert np.isnan(mean(name, broken[0], relevance, where)[0])
    assert np.isnan(mean(name, scores, broken[1], where)[0])


@pytest.mark.parametrize(("name", "items"), PATHS)
def test_infinite_scores_in_the_right_order_cost_nothing(name, items) -> None:
    scores, relevance, where = np.zeros((2, items)), np.ones((2, items)), np.ones((2, items), bool)
    scores[:, :2] = np.inf, -np.inf
    relevance[:, :2] = 2, 0
    if name != "squared":
        value, gradient = mean(name, scores, relevance, where)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)
        assert mean(name, -scores, relevance, where)[0] == np.inf


def test_a_pair_that_is_surely_right_keeps_the_digits_of_its_cost() -> None:
    step = jax.jit(jax.value_and_grad(pairwise_logistic_loss))
    for items in (2, 40):  # all pairs at once, and a product of eight factors
        gaps = np.float32(np.linspace(20, 60, items))
        scores = np.where(np.arange(items) == 0, gaps, 0)[None].astype(np.float32)
        relevance = (np.arange(items) == 0)[None].astype(int)
        value, gradient = step(scores, relevance)
        exact = np.exp(-np.float64(scores[0, 0]))
        np.testing.assert_allclose(value, exact, rtol=1e-6)
        np.testing.assert_allclose(gradient[0, 0], -exact, rtol=1e-6)


def test_per_list_mean_averages_each_list_first() -> None:
    scores, relevance, where = draw(4, 6)
    relevance[2] = 1  # no pair, no list
    where[3] = False
    value = pairwise_logistic_loss(scores, relevance, where=where, reduction=per_list_mean)
    rows = [pairwise_logistic_loss(scores[i], relevance[i], where=where[i]) for i in (0, 1)]
    np.testing.assert_allclose(value, np.mean(rows), rtol=1e-6)


def dcg_by_hand(relevance: Any, ranks: Any, top_n: int) -> float:
    pairs = [(y, r) for y, r in zip(relevance, ranks, strict=True) if 0 < r <= top_n]
    return sum((2.0**y - 1) / np.log2(1 + r) for y, r in pairs)


def ranks_by_hand(scores: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Rank of each real item, equal scores by position; 0 for hidden ones."""
    order = [i for i in np.argsort(-scores, kind="stable") if where[i]]
    ranks = np.zeros(len(scores), int)
    ranks[order] = 1 + np.arange(len(order))
    return ranks


@pytest.mark.parametrize("top_n", [None, 3])
def test_pair_weights_are_what_a_metric_changes_by_when_two_items_change_places(top_n) -> None:
    scores, relevance, where = draw(3, 7, seed=4, grades=3)
    scores[:, 4:] = np.round(scores[:, 4:])  # ties
    binary = (relevance > 1).astype(int)
    binary[:] = np.arange(7) == np.argmax(np.where(where, binary, -1), axis=1)[:, None]
    with jax.enable_x64(True):
        call = lambda f, y, **kw: np.asarray(f(scores, y, where=where, top_n=top_n, **kw))
        got = {n: call(dcg_pair_weight, relevance, normalize=n) for n in (False, True)}
        reciprocal = call(mrr_pair_weight, binary)
        share = call(precision_pair_weight, relevance) if top_n else None
    cut = top_n or 7
    for row in range(3):
        y, keep = relevance[row], where[row]
        ranks = ranks_by_hand(scores[row], keep)
        ideal = dcg_by_hand(y, ranks_by_hand(y + 0.0, keep), cut)
        hits = min(np.sum(y[keep] > 0), cut)
        for i, j in itertools.product(range(7), range(7)):
            if not (keep[i] and keep[j]):
                assert got[True][row, i, j] == reciprocal[row, i, j] == 0
                continue
            swapped = ranks.copy()
            swapped[[i, j]] = ranks[[j, i]]
            change = abs(dcg_by_hand(y, swapped, cut) - dcg_by_hand(y, ranks, cut))
            np.testing.assert_allclose(got[False][row, i, j], change, atol=1e-12)
            np.testing.assert_allclose(got[True][row, i, j], change / (ideal or 1), atol=1e-12)
            mrr = lambda r, y: sum((1 / r)[(r > 0) & (r <= cut) & (y > 0)])
            with np.errstate(divide="ignore"):
                change = abs(mrr(swapped, binary[row]) - mrr(ranks, binary[row]))
            np.testing.assert_allclose(reciprocal[row, i, j], change, atol=1e-12)
            if share is not None:
                found = lambda r, y=y: np.sum((r > 0) & (r <= cut) & (y > 0))
                change = abs(found(swapped) - found(ranks)) / max(hits, 1)
                np.testing.assert_allclose(share[row, i, j], change, atol=1e-12)


def gradient_and_units(units: Any, scores: Any) -> Any:
    """The gradient of the sum of the units, and they."""

    def total(scores: Any) -> Any:
        values = units(scores)
        return jnp.sum(values), values

    return jax.grad(total, has_aux=True)(scores)


def test_lambda_loss_is_the_loop_over_pairs_and_its_weights_have_no_gradient() -> None:
    scores, relevance, where = draw(4, 6, seed=5)
    relevance[1], where[2] = 0, False  # no gain; no item
    both = lambda *a, **kw: 10 * dcg2_pair_weight(*a, **kw) + dcg_pair_weight(*a, **kw)
    names = {**WEIGHTS, "loss2++": both}

    @jax.jit
    def found(scores: Any) -> Any:
        out = {}
        for name, weight in names.items():
            options = dict(where=where, top_n=3)
            loss = partial(
                lambda_loss, relevance=relevance, pair_weight=weight, reduction="none", **options
            )
            fixed = weight(scores, relevance, **options)
            out[name] = *gradient_and_units(loss, scores), fixed
        return out

    with jax.enable_x64(True):
        results = jax.device_get(found(scores))
    for name, (gradient, units, weight) in results.items():
        expected, slope = np.zeros(4), np.zeros_like(scores)
        for row, i, j in itertools.product(range(4), range(6), range(6)):
            if where[row, i] and where[row, j] and relevance[row, i] > relevance[row, j]:
                gap = scores[row, j] - scores[row, i]
                expected[row] += weight[row, i, j] * np.log1p(np.exp(gap))
                step = weight[row, i, j] / (1 + np.exp(-gap))
                slope[row, i] -= step
                slope[row, j] += step
        np.testing.assert_allclose(units, expected, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(gradient, slope, atol=1e-12, err_msg=name)
        assert units[1] == units[2] == 0, name
        assert np.any(units), name
    pair = lambda_loss(scores, relevance, where=where, reduction=sum_and_weight)
    assert pair.weight == 3  # a list without gain is a unit, one without items is none


def test_lambda_loss_of_a_known_weight_is_that_of_the_array_it_returns() -> None:
    scores, relevance, where = draw(2, 9)
    segments = np.random.default_rng(1).integers(0, 3, scores.shape, np.int32)
    options = dict(segments=segments, num_segments=3, where=where, reduction="none")

    @jax.jit
    def found(scores: Any) -> Any:
        out = {}
        for name in ("dcg", "precision"):
            known = WEIGHTS[name]
            given = lambda *a, known=known, **kw: known(*a, **kw)
            both = [
                lambda s, w=weight: lambda_loss(s, relevance, pair_weight=w, top_n=4, **options)
                for weight in (known, given)
            ]
            out[name] = [gradient_and_units(f, scores) for f in both]
        return out

    with jax.enable_x64(True):
        for name, (short, plain) in found(scores).items():
            for a, b in zip(short, plain, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-12, err_msg=name)


def test_neighbours_far_down_a_long_list_keep_the_digits_of_their_weight() -> None:
    scores = -np.arange(600.0)
    relevance = np.arange(600) % 2
    for weight in (dcg_pair_weight, dcg2_pair_weight):
        row = np.asarray(weight(scores.astype(np.float32), relevance, normalize=False))[-1]
        rank = np.arange(1, 601.0)
        first, second = (rank, 600.0) if weight is dcg_pair_weight else (600 - rank, 601 - rank)
        with np.errstate(divide="ignore"):
            exact = np.abs(1 / np.log2(1 + first) - 1 / np.log2(1 + second))
        kept = relevance == 0
        np.testing.assert_allclose(row[kept], exact[kept], rtol=2e-6)


def test_gain_and_discount_can_be_given() -> None:
    scores, relevance = np.array([2.0, 1.0, 0.0], np.float32), np.array([0, 2, 1])
    own = partial(dcg_pair_weight, gain=lambda y: y, discount=lambda r: 1 / r, normalize=False)
    weight = jax.jit(own)(scores, relevance)
    np.testing.assert_allclose(weight[1], [2 * 0.5, 0, 1 * (1 / 2 - 1 / 3)], rtol=1e-6)
    with pytest.raises(
        ValueError, match="precision_pair_weight: top_n: expected a count, got None"
    ):
        precision_pair_weight(scores, relevance)
    with pytest.raises(ValueError, match="lambda_loss: top_n: expected at least 1, got 0"):
        lambda_loss(scores, relevance, top_n=0)
    with pytest.raises(ValueError, match=r"pair_weight: expected shape \(3, 3\), got \(3,\)"):
        lambda_loss(scores, relevance, pair_weight=lambda s, y, **_: s)


def largest_temporary(loss: Any, items: int, *arrays: Any) -> int:
    shape = jax.ShapeDtypeStruct((1, items), np.float32)
    both = jax.jit(jax.value_and_grad(loss))
    return both.lower(shape, shape, *arrays).compile().memory_analysis().temp_size_in_bytes


def test_sums_over_the_pairs_of_4096_items_need_no_array_of_them() -> None:
    pairs = 4096**2  # as bools
    assert largest_temporary(pairwise_hinge_loss, 4096) < pairs / 16
    assert largest_temporary(pairwise_logistic_loss, 4096) < pairs / 16
    assert largest_temporary(lambda_loss, 4096) < pairs / 16


def test_sums_over_pairs_are_the_same_on_sharded_lists() -> None:
    assert jax.device_count() == 8
    scores, relevance, where = draw(8, 20)
    scores = scores.astype(np.float32)

    def losses(scores: Any, relevance: Any, where: Any, reduction: Any = "mean") -> Any:
        lists = Lists(where)
        total, count = list_pairs.sorted_hinge(scores * where, relevance * 1.0, lists, 1.0)
        if callable(reduction):
            total, count = jax.lax.psum((total, count), "data")
        return [
            pairwise_logistic_loss(scores, relevance, where=where, reduction=reduction),
            total / count,
        ]

    expected = jax.jit(losses)(scores, relevance, where)
    rows = PartitionSpec("data")
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        put = lambda x, mesh=mesh: jax.device_put(x, NamedSharding(mesh, rows))
        with jax.set_mesh(mesh):
            arrays = tuple(map(put, (scores, relevance, where)))
            got = [jax.jit(losses)(*arrays)]
            if kind is AxisType.Auto:
                local = partial(losses, reduction=across("data"))
                mapped = jax.shard_map(local, in_specs=rows, out_specs=PartitionSpec())
                got.append(jax.jit(mapped)(*arrays))
        for values in got:
            np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_pointwise_sigmoid_keeps_the_tail() -> None:
    scores = np.array([-20.0, 30.0, -60.0], np.float32)
    relevance = np.array([0, 1, 0])
    values = pointwise_sigmoid_loss(scores, relevance, reduction="none")
    np.testing.assert_allclose(values, np.log1p(np.exp(-np.abs(np.float64(scores)))), rtol=1e-6)


def test_relevance_out_of_range_makes_its_own_item_nan() -> None:
    scores = np.zeros(4, np.float32)
    values = pointwise_sigmoid_loss(scores, np.array([0.0, 2.0, -0.5, 1.0]), reduction="none")
    np.testing.assert_array_equal(np.isnan(values), [False, True, True, False])
    grade = lambda s: ordinal_loss(s, np.array([0, 3, -1, 2]), reduction="none")
    np.testing.assert_array_equal(np.isnan(grade(np.zeros((4, 2)))), [False, True, True, False])
    with pytest.raises(ValueError, match=r"relevance: expected values in \[0, 1\], got 1 "):
        checked(pointwise_sigmoid_loss)(scores, np.array([0, 1, 2, 1]))
    order = np.array([1.0, -1.0, 0.0])
    values = margin_ranking_loss(scores[:3], scores[:3], order, reduction="none")
    np.testing.assert_array_equal(np.isnan(values), [False, False, True])


def test_relevance_gets_no_gradient() -> None:
    scores, relevance, _ = draw(2, 5)
    losses = (*PAIRWISE.values(), lambda_loss, pointwise_squared_loss)
    run = jax.jit(lambda y: [jax.grad(partial(loss, scores))(y) for loss in losses])
    for gradient in run(relevance + 0.5):
        np.testing.assert_array_equal(gradient, 0)


def test_ordinal_loss_of_one_threshold_is_the_pointwise_one() -> None:
    scores, relevance, _ = draw(2, 5, grades=2)
    ours = ordinal_loss(scores[..., None], relevance, reduction="none")
    np.testing.assert_allclose(
        ours, pointwise_sigmoid_loss(scores, relevance, reduction="none"), rtol=1e-6
    )


def test_hinges_have_no_gradient_at_the_kink() -> None:
    scores = np.array([2.0, 1.0], np.float32)
    first, order = np.ones(1, np.float32), np.ones(1)

    @jax.jit
    def run(scores: Any, first: Any) -> Any:
        margin = jax.grad(margin_ranking_loss)(first, first - 1, order, margin=1.0)
        return jax.grad(pairwise_hinge_loss)(scores, np.array([1, 0])), margin

    assert not any(np.any(slope) for slope in run(scores, first))
