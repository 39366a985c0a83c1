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
    scores, relevance = jnp.zeros((2, 3)), jnp.ones((2, 3))
    segments = jnp.array([[0, 1, 5], [0, 1, 1]])
    loss = partial(softmax_ranking_loss, scores, relevance, segments=segments, num_segments=2)
    assert jnp.all(jnp.isnan(loss(reduction="none")[0]))
    assert jnp.all(jnp.isfinite(loss(reduction="none")[1]))
    assert jnp.isfinite(loss(where=segments < 2))
    with pytest.raises(ValueError, match=r"segments: expected values in \[0, 2\), got 1"):
        checked(softmax_ranking_loss)(scores, relevance, segments=segments, num_segments=2)
    with pytest.raises(ValueError, match="softmax_ranking_loss: num_segments: expected the number"):
        softmax_ranking_loss(scores, relevance, segments=segments)


def test_relevance_is_taken_as_it_is_or_normalised_by_hand() -> None:
    scores, relevance = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[2.0, 0.0, 1.0]])
    share = normalize_relevance(relevance)
    np.testing.assert_allclose(share, [[2 / 3, 0, 1 / 3]], rtol=1e-6)
    whole, part = (softmax_ranking_loss(scores, y) for y in (relevance, share))
    np.testing.assert_allclose(whole, 3 * part, rtol=1e-6)
    np.testing.assert_array_equal(normalize_relevance(jnp.zeros(3)), 0)
    packed = dict(segments=np.array([0, 1, 0, 2]), num_segments=3)
    shown = np.array([True, True, True, False])
    share = normalize_relevance(np.array([3, 5, 1, np.nan], np.float32), where=shown, **packed)
    np.testing.assert_array_equal(share, [0.75, 1, 0.25, 0])


def test_a_list_without_relevance_costs_nothing_and_stays_a_unit() -> None:
    scores, relevance = jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [1.0, 0.0]])
    for loss in (softmax_ranking_loss, poly1_softmax_ranking_loss, unique_softmax_ranking_loss):
        units = loss(scores, relevance, reduction="none")
        value, gradient = jax.value_and_grad(loss)(scores, relevance)
        assert units[0] == 0
        np.testing.assert_allclose(value, units[1] / 2, rtol=1e-6)
        np.testing.assert_array_equal(gradient[0], 0)


def test_an_item_of_score_minus_infinity_costs_only_if_it_is_relevant() -> None:
    scores = jnp.array([[1.0, -jnp.inf, 2.0, -jnp.inf]])
    useless, useful = jnp.array([[1.0, 0.0, 2.0, 0.0]]), jnp.array([[1.0, 3.0, 2.0, 0.0]])
    for loss in (
        softmax_ranking_loss,
        poly1_softmax_ranking_loss,
        unique_softmax_ranking_loss,
        list_mle_loss,
    ):
        value, gradient = jax.value_and_grad(loss)(scores, useless)
        without, expected = jax.value_and_grad(loss)(scores[:, ::2], useless[:, ::2])
        np.testing.assert_allclose(value, without, rtol=1e-6)
        np.testing.assert_allclose(gradient[:, ::2], expected, atol=1e-6)
        np.testing.assert_array_equal(gradient[:, 1::2], 0)
        assert loss(scores, useful) == jnp.inf


def mle_by_loop(scores: np.ndarray, order: np.ndarray, weight=lambda i: 1.0) -> float:
    s = np.asarray(scores, np.float64)[order]
    top = [np.max(s[i:]) for i in range(len(s))]
    tails = [top[i] + np.log(np.sum(np.exp(s[i:] - top[i]))) for i in range(len(s))]
    return sum(weight(i + 1) * (tails[i] - s[i]) for i in range(len(s)))


def test_list_mle_is_its_loop_at_any_gap() -> None:
    g = np.random.default_rng(2)
    for scale in (1, 30, 1e4):
        scores = (scale * g.standard_normal((3, 40))).astype(np.float32)
        relevance = g.integers(0, 5, (3, 40))
        discount = lambda place: 1 / jnp.sqrt(place)
        plain = list_mle_loss(scores, relevance, reduction="none")
        by_place = list_mle_loss(scores, relevance, discount=discount, reduction="none")
        for i in range(3):
            order = np.argsort(-relevance[i], kind="stable")
            np.testing.assert_allclose(plain[i], mle_by_loop(scores[i], order), rtol=3e-7)
            expected = mle_by_loop(scores[i], order, lambda i: i**-0.5)
            np.testing.assert_allclose(by_place[i], expected, rtol=3e-7)


def test_a_small_constant_in_the_logarithm_of_list_mle_would_be_wrong() -> None:
    scores, relevance = np.array([[40.0, 0.0, -1.0]], np.float32), np.array([[3, 2, 1]])
    value, gradient = jax.value_and_grad(list_mle_loss)(scores, relevance)
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
        s = s[order]
        return jnp.sum(jnp.stack([jax.nn.logsumexp(s[i:]) - s[i] for i in range(11)]))

    with jax.enable_x64(True):
        found, expected = (
            jax.jit(
                lambda s, v, f=f: (
                    jax.jvp(f, (s,), (v,)),
                    jax.grad(f)(s),
                    jax.jvp(jax.grad(f), (s,), (v,))[1],
                    jax.grad(lambda s: jnp.vdot(jax.grad(f)(s), v))(s),
                    jax.vmap(jax.grad(f))(jnp.stack([s, v])),
                )
            )(scores, v)
            for f in (lambda s: list_mle_loss(s, relevance), plain)
        )
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
    with jax.enable_x64(True):
        total, terms = regression_compatible_ranking_loss(
            scores, relevance, alpha=0.3, reduction="none"
        )
        slopes = jax.grad(lambda s, y, a: regression_compatible_ranking_loss(s, y, alpha=a)[0])
        matching = np.log(relevance / (1 - relevance))
        for alpha in (0.0, 0.3, 1.0):
            np.testing.assert_allclose(slopes(matching, relevance, alpha), 0, atol=1e-15)
    for i in range(2):
        accuracy, ranking = compatible_by_hand(scores[i], relevance[i])
        np.testing.assert_allclose(terms["accuracy"][i], accuracy, rtol=1e-13)
        np.testing.assert_allclose(terms["ranking"][i], ranking, rtol=1e-13)
        np.testing.assert_allclose(total[i], 0.7 * accuracy + 0.3 * ranking, rtol=1e-13)


def test_the_compatible_loss_stays_finite_and_rejects_what_is_no_probability() -> None:
    scores = jnp.array([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4]])
    relevance = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss = lambda s, y: regression_compatible_ranking_loss(s, y, reduction="none")
    (total, terms), pull = jax.vjp(lambda s: loss(s, relevance), scores)
    np.testing.assert_allclose(terms["accuracy"], [1e4 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(terms["ranking"], [math.log(2), 0], rtol=1e-6)
    assert jnp.all(jnp.isfinite(pull((jnp.ones(2), jax.tree.map(jnp.zeros_like, terms)))[0]))
    np.testing.assert_array_equal(jnp.isnan(loss(scores, 2 * relevance)[0]), [True, False])
    assert jnp.all(jnp.isfinite(total))


def test_gumbel_samples_are_drawn_from_the_softmax_and_leave_hidden_items_alone() -> None:
    scores, shown = jnp.array([[0.0, 1.0, jnp.nan, -0.5]]), jnp.array([[True, True, False, True]])
    samples = gumbel_samples(scores, key=jax.random.key(1), samples=20_000, where=shown)
    assert samples.shape == (20_000, 1, 4)
    np.testing.assert_array_equal(samples[..., 2], 0)
    first = jnp.argmax(jnp.where(shown, samples, -jnp.inf), axis=-1)[:, 0]
    share = np.bincount(first, minlength=4) / 20_000
    expected = jax.nn.softmax(jnp.where(shown, scores, -jnp.inf)[0])
    np.testing.assert_allclose(share, expected, atol=0.015)
    relevance = jnp.broadcast_to(jnp.array([[0.0, 1.0, 1.0, 2.0]]), samples.shape)
    every = jnp.broadcast_to(shown, samples.shape)
    stochastic = softmax_ranking_loss(samples, relevance, where=every)
    assert stochastic > softmax_ranking_loss(scores, relevance[0], where=shown)  # convexity
    slope = jax.grad(
        lambda b: gumbel_samples(scores[:, :2], key=jax.random.key(1), beta=b)[0, 0, 0]
    )
    assert jnp.isfinite(slope(0.0))
    with pytest.raises(ValueError, match="gumbel_samples: samples: expected at least 1, got 0"):
        gumbel_samples(scores, key=jax.random.key(1), samples=0)


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
