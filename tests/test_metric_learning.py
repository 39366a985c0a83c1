"""Losses of all pairs: samples without partners, equal embeddings, formulas by loops, memory."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss._core.pairwise import pairwise_distance
from jaxloss._core.softmax import log1p_sum_exp, safe_log_sum_exp
from jaxloss.losses.metric_learning import (
    angular_loss,
    circle_loss,
    multi_similarity_loss,
    threshold_consistent_margin_loss,
    tuplet_margin_loss,
)
from jaxloss.losses.metric_learning_distances import (
    generalized_lifted_structure_loss,
    lifted_structure_loss,
    margin_loss,
    nca_loss,
)

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((9, 4)).astype(np.float32)
LABELS = np.array([0, 1, 0, 2, 1, 3, 0, 2, 0], np.int32)  # the 3 stands alone
KEPT = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0], bool)  # so does the first 1
LOSSES = (
    angular_loss,
    circle_loss,
    generalized_lifted_structure_loss,
    lifted_structure_loss,
    margin_loss,
    multi_similarity_loss,
    nca_loss,
    threshold_consistent_margin_loss,
    tuplet_margin_loss,
)
COSINES = {angular_loss, circle_loss, multi_similarity_loss, tuplet_margin_loss}
named = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


# The formulas of the papers, sample by sample in float64: units that exist, and the others as NaN.


def softplus(x: float) -> float:
    return float(np.logaddexp(0, x))


def log_sum(terms: list[float]) -> float:
    return float(np.logaddexp.reduce(terms))


def partners(kept: np.ndarray) -> Any:
    for i in np.flatnonzero(kept):
        others = [j for j in np.flatnonzero(kept) if j != i]
        yield (
            i,
            [j for j in others if LABELS[j] == LABELS[i]],
            [j for j in others if LABELS[j] != LABELS[i]],
        )


def cosines() -> np.ndarray:
    x = X / np.linalg.norm(X.astype(np.float64), axis=1, keepdims=True)
    return x @ x.T


def distances() -> np.ndarray:
    return np.linalg.norm(X[:, None].astype(np.float64) - X[None], axis=2)


def circle(kept: np.ndarray, margin: float, gamma: float) -> np.ndarray:
    s, out = cosines(), np.full(9, np.nan)
    weight = lambda x: max(x, 0)
    for i, near, far in partners(kept):
        if near and far:
            n = [gamma * weight(s[i, j] + margin) * (s[i, j] - margin) for j in far]
            p = [-gamma * weight(1 + margin - s[i, j]) * (s[i, j] - 1 + margin) for j in near]
            out[i] = softplus(log_sum(n) + log_sum(p))
    return out


def multi_similarity(
    kept: np.ndarray, alpha: float, beta: float, base: float, mining_epsilon: float = math.inf
) -> np.ndarray:
    s, out = cosines(), np.full(9, np.nan)
    mined = mining_epsilon < math.inf
    for i, near, far in partners(kept):
        if mined:
            top = max((s[i, j] for j in far), default=-math.inf)
            low = min((s[i, j] for j in near), default=math.inf)
            near = [j for j in near if s[i, j] - mining_epsilon < top]
            far = [j for j in far if s[i, j] + mining_epsilon > low]
        p = np.log1p(sum(math.exp(-alpha * (s[i, j] - base)) for j in near)) / alpha
        n = np.log1p(sum(math.exp(beta * (s[i, j] - base)) for j in far)) / beta
        out[i] = p + n
    return out


def lifted(kept: np.ndarray, negative_margin: float, positive_margin: float) -> np.ndarray:
    d, out = distances(), np.full((9, 9), np.nan)
    for i, near, far in partners(kept):
        for j in near:
            both = [negative_margin - d[k, n] for k in (i, j) for n in far]
            out[i, j] = max(0, log_sum(both) + d[i, j] - positive_margin) ** 2 / 2
    return out


def generalized(kept: np.ndarray, negative_margin: float, positive_margin: float) -> np.ndarray:
    d, out = distances(), np.full(9, np.nan)
    for i, near, far in partners(kept):
        if near and far:
            p = log_sum([d[i, j] - positive_margin for j in near])
            out[i] = max(0, p + log_sum([negative_margin - d[i, j] for j in far]))
    return out


def angular(kept: np.ndarray, alpha: float) -> np.ndarray:
    s, out, square = cosines(), np.full((9, 9), np.nan), math.tan(alpha) ** 2
    for i, near, far in partners(kept):
        for j in near:
            level = 2 * (1 + square) * s[i, j]
            out[i, j] = softplus(log_sum([4 * square * (s[i, n] + s[j, n]) - level for n in far]))
    return out


def margins(kept: np.ndarray, margin: float, beta: float) -> np.ndarray:
    d, out = distances(), np.full((9, 9), np.nan)
    for i, near, far in partners(kept):
        for j in near + far:
            sign = 1 if j in near else -1
            out[i, j] = max(0, margin + sign * (d[i, j] - beta))
    return out


def tuplet(kept: np.ndarray, margin: float, scale: float) -> np.ndarray:
    s, out = cosines(), np.full((9, 9), np.nan)
    for i, near, far in partners(kept):
        for j in near:
            own = math.cos(math.acos(s[i, j]) - margin)
            out[i, j] = softplus(log_sum([scale * (s[i, n] - own) for n in far]))
    return out


def nca(kept: np.ndarray, scale: float) -> np.ndarray:
    d, out = distances(), np.full(9, np.nan)
    for i, near, far in partners(kept):
        if near:
            chance = lambda group, i=i: sum(math.exp(-scale * d[i, j] ** 2) for j in group)
            out[i] = -math.log(chance(near) / chance(near + far))
    return out


FORMULAS = (
    (circle_loss, circle, dict(margin=0.3, gamma=10.0)),
    (circle_loss, circle, dict(margin=0.4, gamma=80.0)),
    (multi_similarity_loss, multi_similarity, dict(alpha=2.0, beta=50.0, base=0.5)),
    (
        multi_similarity_loss,
        multi_similarity,
        dict(alpha=1.5, beta=8.0, base=0.3, mining_epsilon=0.25),
    ),
    (lifted_structure_loss, lifted, dict(negative_margin=2.0, positive_margin=0.5)),
    (
        generalized_lifted_structure_loss,
        generalized,
        dict(negative_margin=2.0, positive_margin=0.5),
    ),
    (angular_loss, angular, dict(alpha=0.698)),
    (angular_loss, angular, dict(alpha=1.1)),
    (margin_loss, margins, dict(margin=0.7, beta=2.2)),
    (tuplet_margin_loss, tuplet, dict(margin=0.3, scale=10.0)),
    (nca_loss, nca, dict(scale=0.7)),
)


def test_units_follow_their_formulas_and_samples_without_partners_are_none() -> None:
    @jax.jit
    def run(x: Any, kept: Any) -> list[Any]:
        return [
            (
                loss(x, LABELS, where=kept, reduction="none", **options),
                loss(x, LABELS, where=kept, **options),
            )
            for loss, _, options in FORMULAS
        ]

    for kept in (np.ones(9, bool), KEPT):
        expected = [formula(kept, **options) for _, formula, options in FORMULAS]
        for (units, mean), exact in zip(run(X, kept), expected, strict=True):
            np.testing.assert_allclose(units, np.nan_to_num(exact), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(mean, np.nanmean(exact), rtol=1e-5)


def test_threshold_consistent_margins_average_over_hard_pairs_alone() -> None:
    s = cosines()
    same = (LABELS[:, None] == LABELS) & ~np.eye(9, dtype=bool)
    other = LABELS[:, None] != LABELS
    near, far = s[same & (s <= 0.4)], s[other & (s >= 0.2)]
    expected = 2 * np.mean(0.4 - near) + 0.5 * np.mean(far - 0.2)
    options = dict(positive_weight=2.0, negative_weight=0.5)
    loss = partial(threshold_consistent_margin_loss, X, LABELS, **options)
    got = loss(positive_margin=0.4, negative_margin=0.2)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert loss(positive_margin=-1.1, negative_margin=1.1) == 0


@named
def test_lonely_samples_one_class_and_equal_embeddings_have_finite_derivatives(loss) -> None:
    """A log-sum-exp over no negatives, the root of 0 and acos at 1 would give NaN."""
    equal = np.repeat(X[:1], 9, axis=0)
    twins = np.concatenate([X[:5], X[:4]])
    embeddings = np.stack([X, X, X, equal, twins, 0 * X, (1e15 if loss is nca_loss else 1e20) * X])
    alone, one = np.arange(9, dtype=np.int32), np.zeros(9, np.int32)
    labels = np.stack([alone, one, one, LABELS, LABELS, LABELS, alone])
    kept = np.ones((7, 9), bool)
    kept[2] = False

    @jax.jit
    @jax.vmap
    def look(x: Any, labels: Any, kept: Any) -> Any:
        both = jax.value_and_grad(lambda x: loss(x, labels, where=kept))
        return jax.jvp(both, (x,), (jnp.cos(jnp.arange(36.0)).reshape(9, 4),))

    found = look(embeddings, labels, kept)
    for leaf in jax.tree.leaves(found):
        assert np.isfinite(leaf).all()
    (value, slope), _ = found
    assert value[2] == 0
    assert not slope[2].any()
    if loss not in (margin_loss, multi_similarity_loss, threshold_consistent_margin_loss):
        np.testing.assert_array_equal(value[:2], 0)  # a partner of either kind is needed
        assert not slope[:2].any()


def test_the_weights_of_the_circle_carry_no_gradient() -> None:
    """Keras lets them have one."""
    margin, gamma = 0.3, 10.0

    def moving(x: Any, fixed: Any) -> Any:
        unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
        s, known = unit(x) @ unit(x).T, unit(fixed) @ unit(fixed).T
        same = LABELS[:, None] == LABELS
        positive, negative = same & ~np.eye(9, dtype=bool), ~same
        lse = lambda mask, z: jax.nn.logsumexp(jnp.where(mask, z, -1e9), axis=1)
        far = gamma * jnp.maximum(known + margin, 0) * (s - margin)
        near = -gamma * jnp.maximum(1 + margin - known, 0) * (s - 1 + margin)
        values = jax.nn.softplus(lse(negative, far) + lse(positive, near))
        return jnp.sum(jnp.where(positive.any(axis=1), values, 0))

    ours = lambda x: circle_loss(x, LABELS, margin=margin, gamma=gamma, reduction="sum")

    @jax.jit
    def run(x: Any) -> Any:
        value, (slope, through) = jax.value_and_grad(moving, (0, 1))(x, x)
        return jax.grad(ours)(x), slope, slope + through, value, ours(x)

    slope, expected, whole, value, same = jax.device_get(run(X))
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    assert np.max(np.abs(whole - slope)) > 0.1 * np.max(np.abs(slope))


def test_losses_of_cosines_ignore_norms_and_others_do_not() -> None:
    lengths = np.geomspace(1e-15, 1e15, 9).astype(np.float32)[:, None]

    @jax.jit
    def run(x: Any) -> dict[str, Any]:
        return {loss.__name__: loss(x, LABELS) for loss in LOSSES}

    scaled, plain, doubled = run(lengths * X), run(X), run(2 * X)
    for loss in LOSSES:
        name = loss.__name__
        if loss in COSINES or loss is threshold_consistent_margin_loss:
            np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-5)
        else:
            assert abs(doubled[name] / plain[name] - 1) > 1e-3


def test_one_triplet_ties_the_losses_to_plain_hinges() -> None:
    x = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.5]], np.float32)
    labels = np.array([0, 0, 1], np.int32)
    d_ap, d_an, d_pn = 1.0, 2.5, math.hypot(1, 2.5)
    options = dict(negative_margin=2.0, reduction="none")
    units = generalized_lifted_structure_loss(x, labels, **options)
    hinges = [d_ap - d_an + 2, max(0.0, d_ap - d_pn + 2), 0]
    np.testing.assert_allclose(units, hinges, rtol=1e-6)
    both = math.log(math.exp(2 - d_an) + math.exp(2 - d_pn)) + d_ap
    units = lifted_structure_loss(x, labels, **options)
    np.testing.assert_allclose(np.asarray(units)[0], [0, both**2 / 2, 0], rtol=1e-6)


def test_tuplet_margins_treat_nearly_parallel_pairs_as_parallel() -> None:
    angles = np.array([0.0, 1e-5, 1e-4, 3e-4])
    one = np.array([1.0, 0.0, 0.0])

    @jax.jit
    @jax.vmap
    def look(angle: Any) -> Any:
        other = jnp.stack([jnp.cos(angle), jnp.sin(angle), 0 * angle])
        x = jnp.stack([jnp.asarray(one, angle.dtype), other, jnp.array([0.0, 0.0, 1.0])])
        both = jax.value_and_grad(lambda x: tuplet_margin_loss(x, np.array([0, 0, 1]), scale=8.0))
        return both(x)

    value, slope = look(angles.astype(np.float32))
    np.testing.assert_allclose(value, math.log1p(math.exp(-8 * math.cos(0.1))), rtol=1e-3)
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() < 1


def test_sums_of_exponentials_keep_their_digits_and_may_be_empty() -> None:
    z = np.array([[-30, -29], [-1e-3, -40], [3, 2], [80, 90], [1e4, -1e4], [-np.inf, 0]])
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(log1p_sum_exp)))(z.astype(np.float32))
    top = np.maximum(z.max(axis=1), 0)
    exact = top + np.log1p(np.exp(z - top[:, None]).sum(axis=1) + np.expm1(-top))
    np.testing.assert_allclose(value, exact, rtol=3e-7)
    np.testing.assert_allclose(slope, np.exp(z - exact[:, None]), rtol=2e-5)

    @jax.jit
    def run(z: Any) -> Any:
        total = lambda z, f: jnp.sum(f(z))
        return [(f(z), jax.grad(total)(z, f)) for f in (log1p_sum_exp, safe_log_sum_exp)]

    for nothing in (np.zeros((2, 0), np.float32), np.full((2, 3), -np.inf, np.float32)):
        for (value, slope), empty in zip(run(nothing), (0, -np.inf), strict=True):
            assert (np.asarray(value) == empty).all()
            assert not np.any(slope)


@jax.jit
def distances_and_gradient(x: Any, size: Any) -> Any:
    total = lambda x: jnp.sum(jnp.sin(pairwise_distance(x, x) / size))
    return pairwise_distance(x, x), jax.grad(total)(x)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_distances_of_any_size_are_finite_and_in_proportion(size) -> None:
    x = (size * X.astype(np.float64)).astype(np.float32)
    found, slope = distances_and_gradient(x, np.float32(size))
    wide = x.astype(np.float64)
    exact = np.linalg.norm(wide[:, None] - wide[None], axis=2)
    np.testing.assert_allclose(found, exact, rtol=2e-6)
    assert np.isfinite(slope).all()


N = 512


@named
def test_peaks_are_a_few_matrices_and_never_all_triplets(loss) -> None:
    x = jax.ShapeDtypeStruct((N, 32), jnp.float32)
    labels = jax.ShapeDtypeStruct((N,), jnp.int32)
    step = jax.jit(jax.value_and_grad(loss)).lower(x, labels).compile()
    assert step.memory_analysis().temp_size_in_bytes < 11 * 4 * N * N


@named
def test_errors_name_the_loss_and_what_is_wrong(loss: Callable[..., Any]) -> None:
    for arguments, error, what in (
        ((X[0], LABELS), ValueError, "embeddings: expected two axes"),
        ((X, LABELS[:, None]), ValueError, "labels: expected shape"),
        ((X, X), TypeError, "labels: expected an integer dtype"),
    ):
        with pytest.raises(error, match=f"^{loss.__name__}: {what}"):
            jax.eval_shape(lambda a=arguments: loss(*a))
