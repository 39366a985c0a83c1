"""Miners against loops over samples: ties, samples without partners, masks, random draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxloss.losses.mining import (
    angular_triplet_mask,
    distance_weighted_sample,
    hard_negative_index,
    hard_positive_index,
    multi_similarity_mask,
    pair_margin_mask,
    semi_hard_negative_index,
    triplet_mask,
)

N = 7
LABELS = np.array([0, 0, 1, 1, 1, 2, 0], np.int32)
WHERE = np.array([True, True, True, True, True, True, False])


def draw(seed: int, digits: int = 1) -> np.ndarray:
    return np.round(np.random.default_rng(seed).uniform(0, 1.2, (N, N)), digits).astype(np.float32)


@jax.jit
def mine(distances: Any, where: Any) -> dict[str, Any]:
    return dict(
        positive=hard_positive_index(distances, LABELS, where=where),
        negative=hard_negative_index(distances, LABELS, where=where),
        semi=semi_hard_negative_index(distances, LABELS, where=where),
        triplets=triplet_mask(LABELS, where=where),
        margin=pair_margin_mask(distances, LABELS, where=where),
        similar=multi_similarity_mask(-distances, LABELS, where=where),
    )


def partners(a: int, where: np.ndarray) -> tuple[list[int], list[int]]:
    shown = [i for i in range(N) if where[a] and where[i] and i != a]
    near = [i for i in shown if LABELS[i] == LABELS[a]]
    return near, [i for i in shown if i not in near]


@pytest.mark.parametrize("digits", [1, 6], ids=["ties", "no ties"])
@pytest.mark.parametrize("where", [WHERE, ~WHERE, WHERE | True], ids=["hidden", "one", "all"])
def test_indices_and_masks_are_those_of_a_loop(digits, where) -> None:
    for seed in range(5):
        d = draw(seed, digits)
        poisoned = np.where(where[:, None] & where, d, np.nan)
        got = mine(poisoned, where)
        for a in range(N):
            near, far = partners(a, where)
            first = lambda items, d: min(items, key=d.__getitem__) if items else -1
            assert got["positive"][a] == first(near, -d[a])
            assert got["negative"][a] == first(far, d[a])
            lowest = min((-d[a, p] for p in near), default=np.inf)
            highest = max((-d[a, n] for n in far), default=-np.inf)
            for i in range(N):
                farther = [n for n in far if d[a, n] > d[a, i]]
                best = min(d[a, n] for n in farther) if farther else max(d[a, far], default=None)
                semi = got["semi"][a, i]
                if i in near and far:
                    assert semi in far
                    assert d[a, semi] == best
                else:
                    assert semi == -1
                for n in range(N):
                    assert got["triplets"][a, i, n] == (i in near and n in far)
                assert got["margin"][0][a, i] == (i in near and d[a, i] > np.float32(0.2))
                assert got["margin"][1][a, i] == (i in far and d[a, i] < np.float32(0.8))
                slack = np.float32(0.1)
                assert got["similar"][0][a, i] == (i in near and -d[a, i] - slack < highest)
                assert got["similar"][1][a, i] == (i in far and -d[a, i] + slack > lowest)


def test_triplets_under_a_wide_angle_are_those_of_trigonometry() -> None:
    x = np.random.default_rng(0).standard_normal((N, 3))
    got = jax.jit(lambda x: angular_triplet_mask(x, LABELS, angle=0.6, where=WHERE))(
        np.where(WHERE[:, None], x, np.nan).astype(np.float32)
    )
    for a in range(N):
        near, far = partners(a, WHERE)
        for p in range(N):
            for n in range(N):
                away = np.linalg.norm(x[n] - (x[a] + x[p]) / 2)
                wide = np.arctan2(np.linalg.norm(x[a] - x[p]), 2 * away) > 0.6
                assert got[a, p, n] == (p in near and n in far and wide)


def test_random_negatives_follow_the_inverse_density_of_distances() -> None:
    features, keys = 6, jax.random.split(jax.random.key(0), 20_000)
    x = np.random.default_rng(1).standard_normal((N, features))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    d = np.linalg.norm(x[:, None] - x, axis=-1)
    d[0, 2] = 0.1  # below the cutoff
    sample = lambda key: distance_weighted_sample(
        d.astype(np.float32), LABELS, key=key, features=features, where=WHERE
    )
    drawn = jax.jit(jax.vmap(sample))(keys)  # (20000, n)
    for a in range(N):
        _, far = partners(a, WHERE)
        far = [n for n in far if d[a, n] < 1.4]
        weight = np.zeros(N)
        for n in far:
            e = max(d[a, n], 0.5)
            weight[n] = 1 / (e ** (features - 2) * (1 - e * e / 4) ** ((features - 3) / 2))
        if not far:
            np.testing.assert_array_equal(drawn[:, a], -1)
            continue
        share = np.bincount(np.asarray(drawn[:, a]), minlength=N) / len(keys)
        # Four standard deviations of a share in 20000 draws, 0.0035 each at most.
        np.testing.assert_allclose(share, weight / weight.sum(), atol=0.015)
        assert not np.any(share[weight == 0])


def test_a_negative_of_exactly_opposite_direction_never_counts_as_infinitely_likely() -> None:
    d = jnp.array([[0.0, 2.0, 1.0], [2.0, 0.0, 2.0], [1.0, 2.0, 0.0]])
    labels = np.array([0, 1, 2], np.int32)
    drawn = distance_weighted_sample(
        d, labels, key=jax.random.key(0), features=8, nonzero_cutoff=3.0
    )
    np.testing.assert_array_equal(drawn, [2, -1, 0])


def test_an_empty_batch_has_nothing_to_mine() -> None:
    none, labels = np.zeros((0, 0), np.float32), np.zeros(0, np.int32)
    for index in (hard_positive_index, hard_negative_index):
        assert index(none, labels).shape == (0,)
    assert semi_hard_negative_index(none, labels).shape == (0, 0)
    assert distance_weighted_sample(none, labels, key=jax.random.key(0), features=4).shape == (0,)
    assert multi_similarity_mask(none, labels)[0].shape == (0, 0)


def test_miners_stop_the_gradient_and_trace_on_an_explicit_mesh() -> None:
    x = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    labels = (np.arange(8) // 3).astype(np.int32)

    def total(x, labels):
        d = jnp.sum(jnp.abs(x[:, None] - jax.sharding.reshard(x, PartitionSpec())[None]), axis=-1)
        key = jax.random.key(0)
        found = (
            hard_positive_index(d, labels),
            hard_negative_index(d, labels),
            semi_hard_negative_index(d, labels),
            *multi_similarity_mask(d, labels),
            *pair_margin_mask(d, labels),
            angular_triplet_mask(x, labels),
            distance_weighted_sample(d, labels, key=key, features=8),
        )
        return sum(jnp.sum(f.astype(jnp.float32)) for f in found)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
        step = jax.jit(jax.value_and_grad(total))
        sharded = step(put(x, "data"), put(labels, "data"))
        whole = step(put(x), put(labels))
    assert sharded[0] == whole[0]
    np.testing.assert_array_equal(jax.device_get(sharded[1]), 0)


def test_wrong_shapes_and_dtypes_raise_with_the_name_of_the_miner() -> None:
    d = draw(0)
    with pytest.raises(ValueError, match=r"hard_positive_index: distances: expected shape"):
        hard_positive_index(d[:, :3], LABELS)
    with pytest.raises(TypeError, match=r"triplet_mask: labels: expected an integer dtype"):
        triplet_mask(LABELS.astype(np.float32))
    with pytest.raises(ValueError, match=r"distance_weighted_sample: features: expected"):
        distance_weighted_sample(d, LABELS, key=jax.random.key(0), features=1)
    with pytest.raises(ValueError, match=r"angular_triplet_mask: embeddings: expected two axes"):
        angular_triplet_mask(d[0], LABELS)
