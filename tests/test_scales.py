"""One loss at several depths and scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloss
from jaxloss.training.scales import average_pool, deep_supervision, multi_scale

RNG = np.random.default_rng(0)
SIZES = [(8, 6), (4, 3), (2, 2)]
PREDS = [RNG.normal(size=(2, *size, 3)).astype(np.float32) for size in SIZES]
LABELS = RNG.integers(0, 3, (2, 8, 6))
IMAGES, TARGETS = RNG.normal(size=(2, 2, 8, 8, 3)).astype(np.float32)


def nearest(array, size):
    """The pixel under the centre of each new one, by hand."""
    rows, columns = (
        [int((i + 0.5) * n / m) for i in range(m)]
        for n, m in zip(array.shape[1:3], size, strict=True)
    )
    return array[:, rows][:, :, columns]


def cross_entropy(logits, labels):
    shifted = logits.astype(np.float64)
    log_sum = np.log(np.exp(shifted).sum(-1))
    return np.mean(log_sum - np.take_along_axis(shifted, labels[..., None], -1)[..., 0])


def test_deep_supervision_is_the_loop_over_outputs_and_resized_labels():
    expected = [cross_entropy(p, nearest(LABELS, s)) for p, s in zip(PREDS, SIZES, strict=True)]
    total, terms = deep_supervision(jaxloss.softmax_cross_entropy, PREDS, LABELS)
    np.testing.assert_allclose([terms[k] for k in "012"], expected, rtol=1e-6)
    np.testing.assert_allclose(total, np.dot([1, 0.5, 0.25], expected), rtol=1e-6)


def test_the_powers_stop_at_the_floor_and_may_be_traced():
    ones = [jnp.ones((1, 1, 1))] * 4
    total = lambda **k: deep_supervision(jaxloss.squared_error, ones, 0 * ones[0], **k)[0]
    assert total(decay=0.5, floor=0.25) == 1 + 0.5 + 0.25 + 0.25
    assert jax.jit(total)(decay=0.5, floor=0.25) == 2
    assert total(scale_weights=[1, 2, 3, 0]) == 6


def test_weights_as_in_nnunet_leave_the_coarsest_output_out_also_if_it_is_nan():
    broken = [*PREDS[:2], np.full_like(PREDS[2], np.nan)]
    total, terms = deep_supervision(
        jaxloss.softmax_cross_entropy, broken, LABELS, scale_weights=[2 / 3, 1 / 3, 0]
    )
    assert np.isfinite(total)
    assert np.isnan(terms["2"])


def test_masks_and_weights_are_read_at_the_pixels_of_the_labels():
    where = RNG.random((2, 8, 6)) < 0.6
    weights = RNG.uniform(0.5, 2, (2, 8, 6)).astype(np.float32)
    garbage = np.where(where, LABELS, 99)
    _, terms = deep_supervision(
        jaxloss.softmax_cross_entropy, PREDS, garbage, where=where, weights=weights
    )
    for i, size in enumerate(SIZES):
        alone = jaxloss.softmax_cross_entropy(
            PREDS[i],
            nearest(LABELS, size),
            where=nearest(where, size),
            weights=nearest(weights, size),
        )
        assert float(terms[str(i)]) == pytest.approx(float(alone), rel=1e-6)


def test_targets_may_be_a_list_or_resized_by_a_function():
    pooled = [TARGETS, average_pool(TARGETS)]
    preds = [IMAGES, IMAGES[:, ::2, ::2]]
    listed = deep_supervision(jaxloss.squared_error, preds, pooled)
    by_function = deep_supervision(
        jaxloss.squared_error, preds, TARGETS, resize=lambda target, space: average_pool(target)
    )
    assert listed == by_function
    assert listed[0] != deep_supervision(jaxloss.squared_error, preds, TARGETS)[0]


def test_a_criterion_and_losses_of_whole_images_work_at_every_depth():
    total, terms = deep_supervision(
        lambda p, t: jaxloss.weighted_sum(
            {
                "ce": jaxloss.softmax_cross_entropy(p, t),
                "dice": jaxloss.dice_loss(jax.nn.softmax(p), t),
            }
        ),
        PREDS,
        LABELS,
    )
    assert sorted(terms) == ["0/ce", "0/dice", "1/ce", "1/dice", "2/ce", "2/dice"]
    expected = sum(
        w * (terms[f"{i}/ce"] + terms[f"{i}/dice"]) for i, w in enumerate([1, 0.5, 0.25])
    )
    assert float(total) == pytest.approx(float(expected), rel=1e-6)


def test_what_does_not_fit_is_named():
    loss = jaxloss.squared_error
    with pytest.raises(ValueError, match="deep_supervision: preds: expected a list of outputs"):
        deep_supervision(loss, PREDS[0], LABELS)
    with pytest.raises(ValueError, match="target: expected one for each of 3 outputs, got 2"):
        deep_supervision(loss, PREDS, [LABELS, LABELS])
    with pytest.raises(ValueError, match="scale_weights: expected 3 weights, got 1"):
        deep_supervision(jaxloss.softmax_cross_entropy, PREDS, LABELS, scale_weights=[1.0])
    with pytest.raises(ValueError, match="0: expected a scalar"):
        deep_supervision(jaxloss.softmax_cross_entropy, PREDS, LABELS, reduction="none")
    with pytest.raises(TypeError, match="multi_scale: target: expected a floating dtype"):
        multi_scale(jaxloss.softmax_cross_entropy, PREDS[0], LABELS)
    with pytest.raises(ValueError, match="multi_scale: pred: expected sides of at least 16"):
        multi_scale(loss, IMAGES, TARGETS, scales=5)
    with pytest.raises(ValueError, match="multi_scale: scales"):
        multi_scale(loss, IMAGES, TARGETS, scales=0)


def halved(x):
    return x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))


def test_multi_scale_is_the_loop_over_halved_images():
    a, b = IMAGES.astype(np.float64), TARGETS.astype(np.float64)
    expected = []
    for _ in range(4):
        expected.append(np.mean((a - b) ** 2))
        if a.shape[1] > 1:
            a, b = halved(a), halved(b)
    total, terms = multi_scale(jaxloss.squared_error, IMAGES, TARGETS)
    np.testing.assert_allclose([terms[k] for k in "0123"], expected, rtol=1e-5)
    np.testing.assert_allclose(total, np.sum(expected), rtol=1e-5)
    weighted, _ = multi_scale(jaxloss.squared_error, IMAGES, TARGETS, scale_weights=[1, 0, 0, 2.0])
    np.testing.assert_allclose(weighted, expected[0] + 2 * expected[3], rtol=1e-5)


def test_odd_sides_repeat_their_first_row():
    image = np.arange(5, dtype=np.float32)[None, :, None]
    np.testing.assert_array_equal(average_pool(image)[0, :, 0], [0, 1.5, 3.5])
    _, terms = multi_scale(jaxloss.absolute_error, image, 0 * image, scales=3)
    np.testing.assert_allclose([terms["1"], terms["2"]], [5 / 3, (0 + 2.5) / 2], rtol=1e-6)


@pytest.mark.parametrize("channels", [False, True], ids=["positions", "elements"])
def test_a_small_pixel_is_the_mean_of_the_kept_ones_and_weighs_their_share(channels):
    where = RNG.random(IMAGES.shape if channels else IMAGES.shape[:-1]) < 0.4
    kept = (where if channels else where[..., None]) * np.ones(3)
    garbage = np.where(kept, IMAGES, np.nan).astype(np.float32)
    loss = jaxloss.squared_error if channels else jaxloss.cosine_distance
    _, terms = multi_scale(loss, garbage, TARGETS, scales=2, where=where)
    part = halved(kept)
    with np.errstate(invalid="ignore"):
        a, b = (
            np.where(part > 0, halved(kept * x.astype(np.float64)) / part, 0)
            for x in (IMAGES, TARGETS)
        )
    square = (a - b) ** 2
    expected = np.sum(square * part) / np.sum(part)
    if not channels:
        norm = lambda x: np.sqrt(np.sum(x**2, axis=-1))
        apart = 1 - np.sum(a * b, -1) / np.where(part[..., 0] > 0, norm(a) * norm(b), 1)
        expected = np.sum(apart * part[..., 0]) / np.sum(part[..., 0])
    np.testing.assert_allclose(terms["1"], expected, rtol=1e-5)
    grad = jax.grad(lambda x: multi_scale(loss, x, TARGETS, scales=2, where=where)[0])(garbage)
    assert np.all(np.asarray(grad)[kept == 0] == 0)
    assert np.all(np.isfinite(grad))


def test_weights_of_pixels_are_pooled_and_weights_of_images_are_not():
    weights = RNG.uniform(0.5, 2, IMAGES.shape).astype(np.float32)
    _, terms = multi_scale(jaxloss.squared_error, IMAGES, TARGETS, scales=2, weights=weights)
    w, square = halved(weights), (halved(IMAGES) - halved(TARGETS)) ** 2
    np.testing.assert_allclose(terms["1"], np.sum(w * square) / np.sum(w), rtol=1e-5)
    per_image = lambda a, b, **tail: jaxloss.reduce(jnp.mean((a - b) ** 2, (1, 2, 3)), **tail)
    _, terms = multi_scale(per_image, IMAGES, TARGETS, scales=2, weights=np.array([1.0, 3.0]))
    units = np.mean(square, axis=(1, 2, 3))
    np.testing.assert_allclose(terms["1"], (units[0] + 3 * units[1]) / 4, rtol=1e-5)


def test_both_compile_and_differentiate():
    both = lambda preds: deep_supervision(jaxloss.softmax_cross_entropy, preds, LABELS)
    _, grads = jax.jit(jax.value_and_grad(both, has_aux=True))(PREDS)
    assert all(np.any(np.asarray(g) != 0) for g in grads)
    slopes = jax.grad(lambda preds: both(preds)[1]["0"])(PREDS)
    assert all(np.all(np.asarray(g) == 0) for g in slopes)
