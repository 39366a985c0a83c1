"""Margin softmaxes and proxies: angles 0 and pi, zero vectors, bad labels, limits, memory."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxloss import checked
from jaxloss.losses.classification import softmax_cross_entropy
from jaxloss.losses.prototypes import (
    arcface_logits,
    arcface_loss,
    cosface_logits,
    cosface_loss,
    normalized_softmax_loss,
    p2s_grad_loss,
    sphereface_logits,
    sphereface_loss,
    subcenter_arcface_logits,
    subcenter_arcface_loss,
)
from jaxloss.losses.proxies import proxy_anchor_loss, proxy_nca_loss, soft_triple_loss

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((7, 6)).astype(np.float32)
W = GENERATOR.standard_normal((5, 6)).astype(np.float32)
CENTERS = GENERATOR.standard_normal((5, 3, 6)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, 0, 2], np.int32)
KEPT = np.array([True, True, False, True, False, True, True])
ONE_EACH = (arcface_loss, cosface_loss, sphereface_loss, normalized_softmax_loss, p2s_grad_loss)
SEVERAL = (subcenter_arcface_loss, soft_triple_loss)
PER_ROW = (*ONE_EACH, proxy_nca_loss, *SEVERAL)
LOSSES = (*PER_ROW, proxy_anchor_loss)
named = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def prototypes_of(loss: Callable[..., Any]) -> np.ndarray:
    return CENTERS if loss in SEVERAL else W


@named
def test_parallel_opposite_and_zero_vectors_have_finite_derivatives(loss) -> None:
    """Through acos the gradient is NaN at cosine 1."""
    w = prototypes_of(loss)
    own = (w if w.ndim == 2 else w[:, 1])[LABELS]
    some = np.where(np.arange(7)[:, None] % 2 == 0, own, 0)
    without = np.where(np.arange(5).reshape(-1, *[1] * (w.ndim - 1)) % 2 == 0, w, 0)
    ones = np.ones_like
    embeddings = np.stack([own, 3 * own, -own, 0 * own, some, own, ones(own), 0 * own])
    prototypes = np.stack([w, w, w, w, w, without, ones(w), 0 * w])

    @jax.jit
    @jax.vmap
    def look(x: Any, w: Any) -> Any:
        both = jax.value_and_grad(lambda x, w: loss(x, w, LABELS), (0, 1))
        return jax.jvp(both, (x, w), (jnp.cos(jnp.arange(42.0)).reshape(7, 6), jnp.sin(w)))

    for leaf in jax.tree.leaves(look(embeddings, prototypes)):
        assert np.isfinite(leaf).all()


def test_arcface_and_sphereface_keep_their_digits_at_every_angle() -> None:
    """A sine from 1 - cos^2 has lost half of them at a thousandth of a radian."""
    near = np.concatenate([[0], np.geomspace(1e-6, 1, 25)])
    angles = np.concatenate([near, np.linspace(0.8, 2.4, 9), math.pi - near])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    theta = np.abs(np.arctan2(x[:, 1].astype(np.float64), x[:, 0].astype(np.float64)))
    w = np.array([[1, 0]], np.float32)
    labels = np.zeros(len(x), np.int32)

    def look(logits: Any, margin: Any) -> Any:
        own = lambda x: jnp.sum(logits(x, w, labels, margin=margin, scale=1.0))
        return logits(x, w, labels, margin=margin, scale=1.0)[:, 0], jax.grad(own)(x)

    run = jax.jit(lambda: [look(arcface_logits, 0.5), look(sphereface_logits, 4)])
    (arc, arc_slope), (sphere, sphere_slope) = jax.device_get(run())
    k = np.minimum(np.floor(theta * 4 / math.pi), 3)
    size = np.linalg.norm(x.astype(np.float64), axis=1)
    psi = (-1) ** k * np.cos(4 * theta) - 2 * k
    past = theta > math.pi - 0.5
    turned = np.where(past, np.cos(theta) - 0.5 * math.sin(0.5), np.cos(theta + 0.5))
    np.testing.assert_allclose(arc, turned, rtol=0, atol=3e-7)
    np.testing.assert_allclose(sphere, size * psi, rtol=4e-7, atol=1.5e-6)
    inside = (x[:, 1] != 0) & (theta > 1e-5)
    tangent = np.stack([-x[:, 1], x[:, 0]], axis=1) / size[:, None] ** 2  # slope of the angle
    slope = np.where(past, -np.sin(theta), -np.sin(theta + 0.5))[:, None] * tangent
    np.testing.assert_allclose(arc_slope[inside], slope[inside], rtol=0, atol=5e-7)
    slope = (-1) ** k * -4 * np.sin(4 * theta) * size
    slope = slope[:, None] * tangent + (psi / size)[:, None] * x
    np.testing.assert_allclose(sphere_slope[inside], slope[inside], rtol=0, atol=1e-5)


def test_losses_are_limits_of_one_another() -> None:
    single = CENTERS[:, :1]
    doubled = np.concatenate([W[:, None], W[:, None]], axis=1)

    @jax.jit
    def pairs() -> list[tuple[Any, Any]]:
        none = dict(reduction="none")
        units = X / jnp.linalg.norm(X, axis=1, keepdims=True)
        return [
            (
                arcface_loss(X, W, LABELS, margin=0.0, scale=5.0, **none),
                normalized_softmax_loss(X, W, LABELS, temperature=0.2, **none),
            ),
            (
                cosface_loss(X, W, LABELS, margin=0.0, scale=5.0, **none),
                normalized_softmax_loss(X, W, LABELS, temperature=0.2, **none),
            ),
            (
                proxy_nca_loss(X, W, LABELS, scale=2.5, **none),
                normalized_softmax_loss(X, W, LABELS, temperature=0.2, **none),
            ),
            (
                sphereface_loss(units, W, LABELS, margin=1, scale=5.0, **none),
                normalized_softmax_loss(X, W, LABELS, temperature=0.2, **none),
            ),
            (
                subcenter_arcface_loss(X, single, LABELS, scale=5.0, **none),
                arcface_loss(X, single[:, 0], LABELS, scale=5.0, **none),
            ),
            (
                subcenter_arcface_loss(X, doubled, LABELS, scale=5.0, **none),
                arcface_loss(X, W, LABELS, scale=5.0, **none),
            ),
            (
                soft_triple_loss(X, single, LABELS, scale=5.0, margin=0.1, **none),
                cosface_loss(X, single[:, 0], LABELS, scale=5.0, margin=0.1, **none),
            ),
            (
                soft_triple_loss(X, CENTERS, LABELS, scale=5.0, gamma=1e-4, margin=0.0, **none),
                subcenter_arcface_loss(X, CENTERS, LABELS, scale=5.0, margin=0.0, **none),
            ),
        ]

    for ours, limit in pairs():
        np.testing.assert_allclose(ours, limit, rtol=3e-6)


def test_the_loss_is_the_cross_entropy_of_its_logits() -> None:
    @jax.jit
    def both() -> list[Any]:
        out = []
        for loss, logits, w, options in (
            (arcface_loss, arcface_logits, W, dict(margin=0.3, scale=7.0)),
            (subcenter_arcface_loss, subcenter_arcface_logits, CENTERS, dict(scale=7.0)),
            (cosface_loss, cosface_logits, W, dict(margin=0.1, scale=7.0)),
            (sphereface_loss, sphereface_logits, W, dict(margin=3)),
        ):
            labels = jnp.where(KEPT, LABELS, -1)
            x = jnp.where(KEPT[:, None], X, jnp.nan)
            ours = partial(loss, labels=labels, where=KEPT, **options)

            def theirs(x: Any, w: Any, logits=logits, labels=labels, options=options) -> Any:
                z = logits(x, w, labels, where=KEPT, **options)
                return softmax_cross_entropy(z, labels, where=KEPT)

            out.append([jax.value_and_grad(f, (0, 1))(x, w) for f in (ours, theirs)])
        return out

    for ours, theirs in both():
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-7)


def test_bad_labels_make_their_units_nan_and_nothing_else() -> None:
    bad = np.array([-1, 1, 5, 3, 2**31 - 1, 0, 2], np.int32)
    broken = np.array([True, False, True, False, True, False, False])

    @jax.jit
    def look() -> list[Any]:
        out = []
        for loss in PER_ROW:
            w = prototypes_of(loss)
            good = loss(X, w, LABELS, reduction="none")
            units = loss(X, w, bad, reduction="none")
            total = lambda x, loss=loss, w=w: loss(x, w, bad, reduction="sum")
            out.append((good, units, jax.grad(total)(X)))
        logits = [
            f(X, CENTERS if f is subcenter_arcface_logits else W, bad)
            for f in (arcface_logits, subcenter_arcface_logits, cosface_logits, sphereface_logits)
        ]
        return [
            out,
            logits,
            proxy_anchor_loss(X, W, bad),
            proxy_anchor_loss(X, W, bad, where=~broken),
        ]

    rows, logits, whole, rest = look()
    for good, units, slopes in rows:
        np.testing.assert_array_equal(np.isnan(units), broken)
        np.testing.assert_allclose(units[~broken], good[~broken], rtol=1e-6)
        np.testing.assert_array_equal(np.isnan(slopes).any(axis=1), broken)
    for z in logits:
        np.testing.assert_array_equal(np.isnan(z).all(axis=1), broken)
        assert np.isfinite(z[~broken]).all()
    assert np.isnan(whole)
    assert np.isfinite(rest)
    with pytest.raises(
        ValueError, match=r"cosface_loss: labels: expected values in \[0, 5\), got 3"
    ):
        checked(cosface_loss)(X, W, bad)


@named
def test_errors_name_the_loss_and_what_is_wrong(loss) -> None:
    w = prototypes_of(loss)
    for arguments, error, what in (
        ((X[0], w, LABELS), ValueError, "embeddings: expected 2 axes"),
        ((X, w[0], LABELS), ValueError, f"prototypes: expected {w.ndim} axes"),
        ((X[:, :5], w, LABELS), ValueError, "prototypes: expected shape"),
        ((X, w, LABELS[:1]), ValueError, "labels: expected shape"),
        ((X, w, LABELS[:, None]), ValueError, "labels: expected shape"),
        ((X, w, X), TypeError, "labels: expected an integer dtype"),
        ((X.astype(int), w, LABELS), TypeError, "embeddings: expected a floating dtype"),
        ((X, w.astype(complex), LABELS), TypeError, "prototypes: expected a real dtype"),
    ):
        with pytest.raises(error, match=f"^{loss.__name__}: {what}"):
            jax.eval_shape(lambda a=arguments: loss(*a))


@pytest.mark.parametrize(
    ("margin", "error"), [(2.0, TypeError), (True, TypeError), (0, ValueError)]
)
def test_sphereface_multiplies_the_angle_by_a_whole_number(margin, error) -> None:
    with pytest.raises(error, match="sphereface_loss: margin: expected an integer"):
        sphereface_loss(X, W, LABELS, margin=margin)


def test_the_own_logit_falls_with_the_angle() -> None:
    angles = np.linspace(0, math.pi, 400)
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    w, labels = np.array([[1, 0], [0, 1]], np.float32), np.zeros(400, np.int32)
    for logits, options in (
        (arcface_logits, dict(margin=0.5)),
        (arcface_logits, dict(margin=2.0)),
        (sphereface_logits, dict(margin=2)),
        (sphereface_logits, dict(margin=5)),
    ):
        own = np.asarray(logits(x, w, labels, scale=1.0, **options)[:, 0])
        steps = np.diff(own)
        assert (steps < 3e-6).all()
        if logits is sphereface_logits:  # without jumps, from 1 to 1 - 2 m
            np.testing.assert_allclose(own[[0, -1]], [1, 1 - 2 * options["margin"]], atol=1e-5)
            assert (steps > -0.05).all()


@settings(max_examples=20, deadline=None)
@given(st.floats(-20, 20), st.floats(-20, 20), st.integers(0, 2**31))
def test_norms_and_the_order_of_classes_do_not_matter(big, small, seed) -> None:
    generator = np.random.default_rng(seed)
    order = generator.permutation(5)
    x, w = X * np.float32(10.0**big), W * np.float32(10.0**small)
    moved = np.argsort(order)[LABELS].astype(np.int32)
    for loss in (arcface_loss, cosface_loss, p2s_grad_loss, proxy_nca_loss, proxy_anchor_loss):
        expected = loss(X, W, LABELS)
        np.testing.assert_allclose(loss(x, w, LABELS), expected, rtol=3e-5)
        np.testing.assert_allclose(loss(X, W[order], moved), expected, rtol=3e-5)


def test_proxy_anchor_follows_its_formula_for_absent_classes_and_a_batch_of_one_class() -> None:
    for labels, kept in (
        (np.array([0, 0, 1, 1, 3, 3, 3], np.int32), np.ones(7, bool)),
        (np.array([0, 0, 1, 1, 3, 3, 3], np.int32), KEPT),
        (np.full(7, 4, np.int32), np.ones(7, bool)),
    ):
        x, w = (a / np.linalg.norm(a.astype(float), axis=1, keepdims=True) for a in (X, W))
        s, y = (x @ w.T)[kept], labels[kept]
        present = set(y.tolist())
        near = [np.log1p(np.exp(-6 * (s[y == c, c] - 0.2)).sum()) for c in present]
        far = [np.log1p(np.exp(6 * (s[y != c, c] + 0.2)).sum()) for c in range(5)]
        got = proxy_anchor_loss(X, W, labels, margin=0.2, alpha=6.0, where=kept)
        np.testing.assert_allclose(got, np.mean(near) + np.mean(far), rtol=2e-6)


def test_one_class_costs_nothing() -> None:
    labels = np.zeros(7, np.int32)
    for loss in (arcface_loss, cosface_loss, soft_triple_loss):
        w = prototypes_of(loss)[:1]
        value, slope = jax.value_and_grad(loss)(X, w, labels)
        assert value == 0
        assert not slope.any()


ROWS, CLASSES, FEATURES = 256, 20000, 128
MATRIX, TABLE = 4 * ROWS * CLASSES, 4 * CLASSES * FEATURES


def temporaries(loss: Callable[..., Any], *shape: int) -> float:
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((ROWS, FEATURES), shape)]
    labels = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return step.lower(*arrays, labels).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("loss", [*ONE_EACH, proxy_nca_loss], ids=lambda loss: loss.__name__)
def test_one_matrix_of_cosines_is_all_that_is_kept(loss) -> None:
    """Beside it only the unit prototypes."""
    assert temporaries(loss, CLASSES, FEATURES) < 1.02 * MATRIX + 1.1 * TABLE


@pytest.mark.parametrize("centers", [3, 6])
def test_each_centre_costs_one_matrix_of_cosines(centers) -> None:
    peak = temporaries(subcenter_arcface_loss, CLASSES, centers, FEATURES)
    assert peak < centers * (1.1 * MATRIX + 2.1 * TABLE)


def test_soft_triples_do_not_keep_every_step_of_their_softmax() -> None:
    assert temporaries(soft_triple_loss, CLASSES, 3, FEATURES) < 3 * (3.2 * MATRIX + TABLE)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_prototypes_may_be_split_over_devices(kind) -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    w = GENERATOR.standard_normal((16, 6)).astype(np.float32)
    centers = GENERATOR.standard_normal((16, 2, 6)).astype(np.float32)
    labels = LABELS * 3

    @jax.jit
    def steps(w: Any, centers: Any) -> Any:
        return [
            jax.value_and_grad(loss, (0, 1))(X, table, labels)
            for loss, table in (
                (arcface_loss, w),
                (subcenter_arcface_loss, centers),
                (proxy_anchor_loss, w),
            )
        ]

    expected = jax.device_get(steps(w, centers))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("model")))
    with jax.set_mesh(mesh):
        got = jax.device_get(steps(put(w), put(centers)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
