"""Token, distillation and router losses against torch, optax, Keras, SciPy and trainers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import jaxloss
from jaxloss.losses import distillation, routing, tokens
from jaxloss.testing import draw_labels, draw_normal, draw_probs, draw_uniform
from parity.peers import Row, check, peer

SIZES = ({}, {"B": 1, "C": 2, "T": 3}, {"B": 9, "C": 1200, "T": 2})
ONCE = dict(sizes=({},), dtypes=("float32",))
TOKENS = dict(logits=draw_normal("B T C", scale=2), labels=draw_labels("B T"))
DENSE = dict(logits=draw_normal("B T C", scale=2), labels=draw_probs("B T C"))
WEIGHTS = draw_uniform("C", 0.2, 2, kind="fixed")
PAIR = dict(student=draw_normal("B C", scale=2), teacher=draw_normal("B C", scale=2))
ROWS_OF_LOGITS = dict(logits=draw_normal("B T C", scale=2))
SEQUENCE = tokens.sequence_cross_entropy
CLASSES_SECOND = "torch takes classes on axis 1"


def torch_tokens(ours: Any, theirs: Any, draws: Any = TOKENS, **options: Any) -> Row:
    """A row against torch's cross-entropy, which takes the classes on axis 1."""
    function = peer("torch.nn.functional.cross_entropy")

    def call(logits: Any, labels: Any, **arrays: Any) -> Any:
        dense = labels.ndim == logits.ndim
        labels = labels.movedim(-1, 1) if dense else labels
        return theirs(function, logits.movedim(-1, 1), labels, **arrays)

    options = {"note": CLASSES_SECOND, "sizes": SIZES, **options}
    return Row(
        loss="sequence_cross_entropy",
        peer="torch.nn.functional.cross_entropy",
        ours=ours,
        theirs=call,
        draws=draws,
        differentiate=("logits",),
        **options,
    )


def total(weights: Any, labels: Any, ignore: int) -> Any:
    return (weights[labels] * (labels != ignore)).sum()


TORCH = [
    torch_tokens(
        lambda logits, labels: SEQUENCE(
            logits, labels, label_smoothing=0.2, ignore_index=0, reduction="none"
        ),
        lambda f, z, y: f(z, y, label_smoothing=0.2, ignore_index=0, reduction="none"),
        label="smoothed and ignored",
    ),
    torch_tokens(
        lambda logits, labels: SEQUENCE(logits, labels, label_smoothing=0.2, ignore_index=0),
        lambda f, z, y: f(z, y, label_smoothing=0.2, ignore_index=0),
        label="smoothed and ignored, mean",
        note="all labels ignored is 0, there NaN",
        **ONCE,
    ),
    torch_tokens(
        lambda logits, labels, w: SEQUENCE(logits, labels, weights=w[labels], ignore_index=1),
        lambda f, z, y, w: f(z, y, weight=w, ignore_index=1),
        {**TOKENS, "w": WEIGHTS},
        label="weighted, mean",
        note="torch's weighted mean is `weights=class_weights[labels]`",
    ),
    torch_tokens(
        lambda logits, labels, w: SEQUENCE(
            logits,
            labels,
            class_weights=w,
            label_smoothing=0.1,
            ignore_index=1,
            reduction=jaxloss.normalized_sum(total(w, labels, 1)),
        ),
        lambda f, z, y, w: f(z, y, weight=w, label_smoothing=0.1, ignore_index=1),
        {**TOKENS, "w": WEIGHTS},
        label="weighted and smoothed, mean",
        note="torch divides by the weights of the labels: `normalized_sum`",
        **ONCE,
    ),
    torch_tokens(
        lambda logits, labels, w: SEQUENCE(
            logits, labels, class_weights=w, label_smoothing=0.1, reduction="none"
        ),
        lambda f, z, y, w: f(z, y, weight=w, label_smoothing=0.1, reduction="none"),
        {**DENSE, "w": WEIGHTS},
        label="dense, weighted and smoothed",
    ),
    Row(
        loss="token_log_probs",
        peer="torch.nn.functional.log_softmax",
        ours=lambda logits, labels: tokens.token_log_probs(logits, labels, temperature=0.7),
        theirs=lambda logits, labels: (
            peer("torch.nn.functional.log_softmax")(logits / 0.7, dim=-1)
            .gather(-1, labels[..., None])
            .squeeze(-1)
        ),
        draws=TOKENS,
        note="gathered at the label; `temperature` divides the logits",
        differentiate=("logits",),
        sizes=SIZES,
    ),
    *(
        Row(
            loss=loss.__name__,
            peer="torch.logsumexp",
            ours=lambda logits, loss=loss: loss(logits, reduction="none"),
            theirs=lambda logits: peer("torch.logsumexp")(logits, dim=-1) ** 2,
            draws=ROWS_OF_LOGITS,
            note="its square",
            differentiate=("logits",),
            sizes=SIZES,
        )
        for loss in (tokens.z_loss, routing.router_z_loss)
    ),
]


def divergence(
    loss: Any, order: Callable[[Any, Any], tuple[Any, Any]], temperature: float, **options: Any
) -> Row:
    """A row against torch's `kl_div` of log-softmaxes; `order` says which one is the input."""

    def theirs(student: Any, teacher: Any) -> Any:
        log = lambda z: (z / temperature).log_softmax(dim=-1)
        inputs = order(log(student), log(teacher))
        function = peer("torch.nn.functional.kl_div")
        return temperature**2 * function(*inputs, log_target=True, reduction="batchmean")

    return Row(
        loss=loss.__name__,
        peer="torch.nn.functional.kl_div",
        ours=lambda student, teacher: loss(student, teacher, temperature=temperature),
        theirs=theirs,
        draws=PAIR,
        note='`reduction="batchmean"` of log-softmaxes, times the squared temperature',
        differentiate=("student",),
        sizes=({}, {"B": 1, "C": 2}, {"B": 9, "C": 1200}),
        **options,
    )


TORCH += [
    divergence(distillation.distillation_loss, lambda s, t: (s, t), 2.5),
    divergence(distillation.reverse_distillation_loss, lambda s, t: (t, s), 2.5),
]

OPTAX = [
    Row(
        loss="sequence_cross_entropy",
        peer="optax.losses.softmax_cross_entropy_with_integer_labels",
        ours=lambda logits, labels: SEQUENCE(logits, labels, reduction="none"),
        theirs=peer("optax.losses.softmax_cross_entropy_with_integer_labels"),
        draws=TOKENS,
        note="a label outside the classes is NaN; there -1 wraps",
        differentiate=("logits",),
        sizes=SIZES,
    ),
]


def keras_tokens(name: str, config: Any, theirs: Any, draws: Any, **options: Any) -> Row:
    function = peer(f"keras.losses.{name}")
    return Row(
        loss="sequence_cross_entropy",
        peer=f"keras.losses.{name}",
        ours=lambda logits, labels: SEQUENCE(logits, labels, reduction="none", **config),
        theirs=lambda logits, labels: function(labels, logits, from_logits=True, **theirs),
        draws=draws,
        differentiate=("logits",),
        **options,
    )


KERAS = [
    keras_tokens(
        "sparse_categorical_crossentropy",
        dict(ignore_index=1),
        dict(ignore_class=1),
        TOKENS,
        note="`ignore_class` is `ignore_index`; its mean divides by all tokens",
    ),
    keras_tokens(
        "categorical_crossentropy", dict(label_smoothing=0.1), dict(label_smoothing=0.1), DENSE
    ),
]


def jensen_shannon(student: Any, teacher: Any) -> np.ndarray:
    function = peer("scipy.spatial.distance.jensenshannon")
    softmax = lambda z: np.exp(z - z.max(-1, keepdims=True))  # SciPy divides by the sum itself
    return function(softmax(student), softmax(teacher), axis=-1) ** 2


def total_variation(log_probs: Any, target: Any) -> np.ndarray:
    function = peer("scipy.spatial.distance.cityblock")
    pairs = zip(np.exp(log_probs), target, strict=True)
    return np.array([function(p, t) / 2 for p, t in pairs])


SCIPY = [
    Row(
        loss="generalized_jsd",
        peer="scipy.spatial.distance.jensenshannon",
        ours=lambda student, teacher: distillation.generalized_jsd(
            student, teacher, reduction="none"
        ),
        theirs=jensen_shannon,
        draws=PAIR,
        note="the square of that distance, from logits",
        sizes=({}, {"B": 1, "C": 2}, {"B": 9, "C": 1200}),
    ),
    Row(
        loss="total_variation_distance",
        peer="scipy.spatial.distance.cityblock",
        ours=lambda log_probs, target: distillation.total_variation_distance(
            log_probs, target, reduction="none"
        ),
        theirs=total_variation,
        draws=dict(log_probs=draw_normal("B C"), target=draw_probs("B C")),
        note="half of that distance, from log-probabilities",
        sizes=({}, {"B": 9, "C": 3}),
    ),
]

ROWS = (*TORCH, *OPTAX, *KERAS, *SCIPY)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)


# Losses that live inside trainers, restated in float64


def draw(shape: tuple[int, ...] = (3, 5, 7)) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(0)
    logits = (2 * generator.standard_normal(shape)).astype(np.float32)
    labels = generator.integers(0, shape[-1], shape[:-1])
    return logits, labels, generator.random(shape[:-1]) < 0.7


def log_softmax(z: Any) -> np.ndarray:
    z = np.asarray(z, np.float64)
    return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))


def test_liger_cross_entropy_with_smoothing_square_scale_and_soft_cap() -> None:
    logits, labels, where = draw()
    z = 3 * np.tanh(logits.astype(np.float64) / 3)
    lse = np.log(np.sum(np.exp(z), axis=-1))
    own = np.take_along_axis(z, labels[..., None], axis=-1)[..., 0]
    spread = (0.1 / 7) * np.sum(lse[..., None] - z, axis=-1)
    units = 0.9 * (lse - own) + spread + 1e-3 * lse**2
    got = SEQUENCE(
        logits,
        np.where(where, labels, -100),
        ignore_index=-100,
        label_smoothing=0.1,
        z_loss=1e-3,
        softcap=3.0,
    )
    np.testing.assert_allclose(got, units[where].mean(), rtol=1e-6)


def test_trl_sequence_log_probs_and_dynamic_fine_tuning() -> None:
    logits, labels, where = draw()
    per_token = np.take_along_axis(log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    ignored = np.where(where, labels, -100)
    summed, averaged = (
        tokens.sequence_log_probs(logits, ignored, ignore_index=-100, average=average)
        for average in (False, True)
    )
    np.testing.assert_allclose(summed, (per_token * where).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(averaged, (per_token * where).sum(-1) / where.sum(-1), rtol=1e-6)
    dft = -(np.exp(per_token) * per_token)[where].mean()
    got = tokens.dft_loss(logits, ignored, ignore_index=-100)
    np.testing.assert_allclose(got, dft, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_trl_generalised_divergence_switches_loss_at_the_ends(beta: float) -> None:
    student, _, where = draw()
    teacher = np.random.default_rng(1).standard_normal(student.shape).astype(np.float32)
    s, t = (log_softmax(z.astype(np.float64) / 1.5) for z in (student, teacher))
    kl = lambda p, q: np.sum(np.exp(p) * (p - q), axis=-1)
    if beta in (0.0, 1.0):
        loss = distillation.reverse_distillation_loss if beta else distillation.distillation_loss
        theirs = kl(s, t) if beta else kl(t, s)
        got = loss(student, teacher, temperature=1.5, where=where) / 1.5**2
        assert distillation.generalized_jsd(student, teacher, beta=beta) == 0
    else:
        mixture = np.logaddexp(s + np.log1p(-beta), t + np.log(beta))
        theirs = beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)
        got = distillation.generalized_jsd(
            student, teacher, beta=beta, temperature=1.5, where=where
        )
    np.testing.assert_allclose(got, theirs[where].mean(), rtol=1e-6)


def test_hugging_face_balancing_is_ours_times_the_number_of_slots() -> None:
    logits, _, where = draw((1, 12, 5))
    probs = np.exp(log_softmax(logits)).astype(np.float32)
    index = np.argsort(-probs, axis=-1)[..., :2]
    hot, kept = index[0][where[0]][..., None] == np.arange(5), probs[0][where[0]]
    theirs = 5 * np.sum(hot.mean(axis=0) * kept.mean(axis=0, dtype=np.float64)[None])
    got = routing.load_balancing_loss(probs, index, where=where)
    np.testing.assert_allclose(2 * got, theirs, rtol=1e-6)


def test_trl_denominators_are_sequence_reductions() -> None:
    logits, labels, where = draw()
    where[:, 0] = True
    units = -np.take_along_axis(log_softmax(logits), labels[..., None], axis=-1)[..., 0] * where
    theirs = {
        "mean": units.sum() / where.sum(),  # bnpo, dapo
        jaxloss.sequence_mean: (units.sum(-1) / where.sum(-1)).mean(),  # grpo
        jaxloss.sequence_sum_scaled(5): units.sum() / (len(units) * 5),  # dr_grpo
        jaxloss.normalized_sum(100): units.sum() / 100,  # num_items_in_batch
    }
    for reduction, expected in theirs.items():
        got = SEQUENCE(logits, labels, where=where, reduction=reduction)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
