"""Listwise losses: packed lists, orders by loops, gaps of any size, infinite scores, samples."""

import math
from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from list_oracle import check_packed_like_padded

from jaxloss._core.checked import checked
from jaxloss.losses.ranking_listwise import (
    gumbel_samples,
    list_mle_loss,
    normalize_relevance,
    poly1_softmax_ranking_loss,
    regression_compatible_ranking_loss,
    softmax_ranking_loss,
    unique_softmax_ranking_loss,
)
from jaxloss.training.composition import weighted_sum

LOSSES = dict(
    softmax=softmax_ranking_loss,
    poly1=partial(poly1_softmax_ranking_loss, epsilon=0.6),
    unique=unique_softmax_ranking_loss,
    list_mle=list_mle_loss,
    compatible=lambda s, y, **o: regression_compatible_ranking_loss(s, y / 3, **o)[0],
)


@pytest.mark.parametrize("name", LOSSES)
def test_packed_lists_are_the_padded_ones(name: str) -> None:
    check_packed_like_padded(LOSSES[name])


def test_a_real_item_of_no_list_makes_its_row_nan_and_a_hidden_one_does_not() -> None:
    scores, relevance = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    segments = np.array([[0, 1, 5], [0, 1, 1]])
    packed = dict(segments=segments, num_segments=2, reduction="none")
    loss = partial(softmax_ranking_loss, scores, relevance, **packed)
    units = np.asarray(loss(where=np.ones((2, 3), bool)))
    assert np.all(np.isnan(units[0]))
    assert np.all(np.isfinite(units[1]))
    assert np.all(np.isfinite(loss(where=segments < 2)))
    with pytest.raises(ValueError, match=r"segments: expected values in \[0, 2\), got 1"):
        checked(softmax_ranking_loss)(scores, relevance, segments=segments, num_segments=2)
    with pytest.raises(ValueError, match="softmax_ranking_loss: num_segments: expected the number"):
        softmax_ranking_loss(scores, relevance, segments=segments)


def test_relevance_is_taken_as_it_is_or_normalised_by_hand() -> None:
    scores, relevance = np.float32([[0.3, -1.0, 2.0]]), np.float32([[2.0, 0.0, 1.0]])
    share = normalize_relevance(relevance)
    np.testing.assert_allclose(share, [[2 / 3, 0, 1 / 3]], rtol=1e-6)
    whole, part = (softmax_ranking_loss(scores, y) for y in (relevance, share))
    np.testing.assert_allclose(whole, 3 * part, rtol=1e-6)
    np.testing.assert_array_equal(normalize_relevance(0 * relevance), 0)
    packed = dict(segments=np.array([0, 1, 0, 2]), num_segments=3)
    shown = np.array([True, True, True, False])
    share = normalize_relevance(np.array([3, 5, 1, np.nan], np.float32), where=shown, **packed)
    np.testing.assert_array_equal(share, [0.75, 1, 0.25, 0])


def test_a_list_without_relevance_costs_nothing_and_stays_a_unit() -> None:
    losses = (softmax_ranking_loss, poly1_softmax_ranking_loss, unique_softmax_ranking_loss)

    @jax.jit
    def run(s, y):
        return [(loss(s, y, reduction="none"), jax.value_and_grad(loss)(s, y)) for loss in losses]

    scores, relevance = np.float32([[0, 1], [0, 0]]), np.float32([[0, 0], [1, 0]])
    for units, (value, gradient) in jax.device_get(run(scores, relevance)):
        assert units[0] == 0
        np.testing.assert_allclose(value, units[1] / 2, rtol=1e-6)
        np.testing.assert_array_equal(gradient[0], 0)


def test_an_item_of_score_minus_infinity_costs_only_if_it_is_relevant() -> None:
    scores = np.float32([[1, -np.inf, 2, -np.inf]])
    useless, useful = np.float32([[1, 0, 2, 0]]), np.float32([[1, 3, 2, 0]])
    losses = (
        softmax_ranking_loss,
        poly1_softmax_ranking_loss,
        unique_softmax_ranking_loss,
        list_mle_loss,
    )
    run = jax.jit(lambda s, y: [jax.value_and_grad(loss)(s, y) for loss in losses])
    ways = (scores, useless), (scores[:, ::2], useless[:, ::2]), (scores, useful)
    found = jax.device_get([run(*way) for way in ways])
    for (value, gradient), (without, expected), (costly, _) in zip(*found, strict=True):
        np.testing.assert_allclose(value, without, rtol=1e-6)
        np.testing.assert_allclose(gradient[:, ::2], expected, atol=1e-6)
        np.testing.assert_array_equal(gradient[:, 1::2], 0)
        assert costly == np.inf


def mle_by_loop(scores: np.ndarray, order: np.ndarray, weight=lambda i: 1.0) -> float:
    s = np.asarray(scores, np.float64)[order]
    top = [np.max(s[i:]) for i in range(len(s))]
    tails = [top[i] + np.log(np.sum(np.exp(s[i:] - top[i]))) for i in range(len(s))]
    return sum(weight(i + 1) * (tails[i] - s[i]) for i in range(len(s)))


def test_list_mle_is_its_loop_at_any_gap() -> None:
    @jax.jit
    def run(scores, relevance):
        discount = lambda place: 1 / jnp.sqrt(place)
        units = partial(list_mle_loss, scores, relevance, reduction="none")
        return units(), units(discount=discount)

    g = np.random.default_rng(2)
    for scale in (1, 30, 1e4):
        scores = (scale * g.standard_normal((3, 40))).astype(np.float32)
        relevance = g.integers(0, 5, (3, 40))
        plain, by_place = jax.device_get(run(scores, relevance))
        for i in range(3):
            order = np.argsort(-relevance[i], kind="stable")
            np.testing.assert_allclose(plain[i], mle_by_loop(scores[i], order), rtol=3e-7)
            expected = mle_by_loop(scores[i], order, lambda i: i**-0.5)
            np.testing.assert_allclose(by_place[i], expected, rtol=3e-7)


def test_a_small_constant_in_the_logarithm_of_list_mle_would_be_wrong() -> None:
    scores, relevance = np.array([[40.0, 0.0, -1.0]], np.float32), np.array([[3, 2, 1]])
    value, gradient = jax.jit(jax.value_and_grad(list_mle_loss))(scores, relevance)
    exact = math.log1p(math.exp(-40) + math.exp(-41)) + math.log1p(math.exp(-1))
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    shifted = np.exp(scores[0] - 40.0)  # what allRank computes
    sums = np.cumsum(shifted[::-1])[::-1]
    assert np.sum(np.log(sums + 1e-10) - (scores[0] - 40)) > exact + 10
    p = 1 / (1 + math.e)
    np.testing.assert_allclose(gradient, [[-math.exp(-40) * (1 + 1 / math.e), -p, p]], rtol=1e-5)


def test_the_derivatives_of_list_mle_are_those_of_the_plain_formula() -> None:
    g = np.random.default_rng(3)
    scores, v, relevance = *g.standard_normal((2, 11)), g.permutation(11)
    order = np.argsort(-relevance)

    def plain(s):
        tails = jnp.broadcast_to(s[order], (11, 11)), np.triu(np.ones((11, 11), bool))
        return jnp.sum(jax.nn.logsumexp(tails[0], axis=1, where=tails[1])) - jnp.sum(s)

    ours = lambda s: list_mle_loss(s, relevance)

    @jax.jit
    def run(s, v):
        return (
            jax.jvp(ours, (s,), (v,)),
            jax.grad(ours)(s),
            jax.jvp(jax.grad(ours), (s,), (v,))[1],
            jax.grad(lambda s: jnp.vdot(jax.grad(ours)(s), v))(s),
            jax.vmap(jax.grad(ours))(jnp.stack([s, v])),
        )

    both = jax.jit(lambda s, v: jax.jvp(jax.value_and_grad(plain), (s,), (v,)))
    with jax.enable_x64(True):
        found = run(scores, v)
        (value, slope), (along, curved) = jax.device_get(both(scores, v))
        (_, at_v), _ = jax.device_get(both(v, scores))
    expected = (value, along), slope, curved, curved, np.stack([slope, at_v])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_a_key_puts_equally_relevant_items_in_every_order_and_none_keeps_theirs() -> None:
    scores, relevance = np.array([0.5, 3.0, -1.0, 1.0], np.float32), np.array([1, 0, 1, 1])
    values = {
        round(mle_by_loop(scores, np.array([*first, 1])), 4) for first in permutations((0, 2, 3))
    }
    given = mle_by_loop(scores, np.array([0, 2, 3, 1]))
    np.testing.assert_allclose(list_mle_loss(scores, relevance), given, rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), 600)
    drawn = jax.jit(jax.vmap(lambda key: list_mle_loss(scores, relevance, key=key)))(keys)
    found, counts = np.unique(np.round(np.asarray(drawn, np.float64), 4), return_counts=True)
    np.testing.assert_allclose(found, sorted(values), atol=2e-4)
    assert np.all(abs(counts - 100) < 40)  # four standard deviations


def test_list_mle_needs_memory_for_its_items_only() -> None:
    row = jax.ShapeDtypeStruct((32, 1000), jnp.float32)
    step = jax.jit(jax.value_and_grad(list_mle_loss)).lower(row, row).compile()
    assert step.memory_analysis().temp_size_in_bytes < 24 * 32 * 1000 * 4


def compatible_by_hand(s: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    p = 1 / (1 + np.exp(-s))
    accuracy = -np.mean(y * np.log(p) + (1 - y) * np.log1p(-p))
    return accuracy, -np.sum(y * np.log(p / np.sum(p))) / np.sum(y)


def test_the_compatible_loss_is_the_formula_of_its_paper_and_both_terms_want_the_same() -> None:
    g = np.random.default_rng(4)
    scores, relevance = g.standard_normal((2, 6)), g.uniform(0.05, 0.95, (2, 6))
    matching = np.log(relevance / (1 - relevance))

    @jax.jit
    def run(alpha):
        loss = partial(regression_compatible_ranking_loss, relevance=relevance, alpha=alpha)
        return loss(scores, reduction="none"), jax.grad(lambda s: loss(s)[0])(matching)

    with jax.enable_x64(True):
        for alpha in (0.0, 1.0, 0.3):
            (total, terms), slopes = jax.device_get(run(alpha))
            np.testing.assert_allclose(slopes, 0, atol=1e-15)
    for i in range(2):
        accuracy, ranking = compatible_by_hand(scores[i], relevance[i])
        np.testing.assert_allclose(terms["accuracy"][i], accuracy, rtol=1e-13)
        np.testing.assert_allclose(terms["ranking"][i], ranking, rtol=1e-13)
        np.testing.assert_allclose(total[i], 0.7 * accuracy + 0.3 * ranking, rtol=1e-13)


def test_the_compatible_loss_stays_finite_and_rejects_what_is_no_probability() -> None:
    scores = np.float32([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4]])
    relevance = np.float32([[1, 0, 0], [0, 0, 0]])

    @jax.jit
    def run(s, y):
        loss = lambda s: regression_compatible_ranking_loss(s, y, reduction="none")
        total, pull, terms = jax.vjp(loss, s, has_aux=True)
        return total, terms, pull(jnp.ones(2))

    total, terms, slopes = jax.device_get(run(scores, relevance))
    np.testing.assert_allclose(terms["accuracy"], [1e4 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(terms["ranking"], [math.log(2), 0], rtol=1e-6)
    assert np.all(np.isfinite(slopes))
    np.testing.assert_array_equal(np.isnan(run(scores, 2 * relevance)[0]), [True, False])
    assert np.all(np.isfinite(total))


def test_gumbel_samples_are_drawn_from_the_softmax_and_leave_hidden_items_alone() -> None:
    scores, shown = np.float32([[0, 1, np.nan, -0.5]]), np.array([[True, True, False, True]])
    key = jax.random.key(1)

    @jax.jit
    def run(beta):
        samples = gumbel_samples(scores, key=key, samples=20_000, where=shown)
        relevance = jnp.broadcast_to(jnp.array([[0.0, 1.0, 1.0, 2.0]]), samples.shape)
        every = jnp.broadcast_to(shown, samples.shape)
        stochastic = softmax_ranking_loss(samples, relevance, where=every)
        single = softmax_ranking_loss(scores, relevance[0], where=shown)
        first = jax.grad(lambda b: gumbel_samples(scores[:, :2], key=key, beta=b)[0, 0, 0])
        return samples, stochastic, single, first(beta)

    samples, stochastic, single, slope = jax.device_get(run(0.0))
    assert samples.shape == (20_000, 1, 4)
    np.testing.assert_array_equal(samples[..., 2], 0)
    first = np.argmax(np.where(shown, samples, -np.inf), axis=-1)[:, 0]
    share = np.bincount(first, minlength=4) / 20_000
    powers = np.exp(np.where(shown, scores, -np.inf)[0])
    # a standard error of at most 0.5 / sqrt(20000) = 0.0035
    np.testing.assert_allclose(share, powers / np.sum(powers), atol=0.015)
    assert stochastic > single  # convexity
    assert np.isfinite(slope)
    with pytest.raises(ValueError, match="gumbel_samples: samples: expected at least 1, got 0"):
        gumbel_samples(scores, key=key, samples=0)


def test_a_rating_model_learns_order_and_ratings_from_a_weighted_sum() -> None:
    """Ranking alone leaves the ratings' level free; the squared error pins it."""
    g = np.random.default_rng(5)
    features = g.standard_normal((16, 6, 3)).astype(np.float32)
    ratings = (features @ np.array([1.0, -0.5, 0.3]) + 3).astype(np.float32)

    def objective(params):
        scores = features @ params["w"] + params["b"]
        rank = softmax_ranking_loss(scores, normalize_relevance(jnp.exp(ratings)))
        terms = {"rank": rank, "accuracy": jnp.mean((scores - ratings) ** 2)}
        return weighted_sum(terms, weights={"rank": 1.0, "accuracy": 0.1})

    def step(params, _):
        (_, log), slope = jax.value_and_grad(objective, has_aux=True)(params)
        return jax.tree.map(lambda p, d: p - 0.5 * d, params, slope), log

    start = dict(w=jnp.zeros(3), b=jnp.zeros(()))
    fitted, log = jax.jit(lambda p: jax.lax.scan(step, p, None, length=200))(start)
    np.testing.assert_allclose(fitted["w"], [1.0, -0.5, 0.3], atol=1e-3)
    np.testing.assert_allclose(fitted["b"], 3, atol=1e-3)
    assert log["accuracy"][-1] < 1e-4 * log["accuracy"][0]
