"""Planted faults, each found by argument and index; and calls in which nothing is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxloss
from jaxloss._core.terms import total
from jaxloss.training.explanation import Explanation, explain

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1, 0])
BOXES = np.array([[0, 0, 2, 2], [1, 1, 4, 3], [0, 2, 3, 5]], np.float32)


def faults(explanation):
    """Problems in arguments: what is wrong with units and gradients follows from them."""
    return [
        (p.argument, p.kind, p.index, p.count)
        for p in explanation.problems
        if p.argument != "units" and not p.argument.startswith("gradient of ")
    ]


def planted(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


CLEAN = {
    "cross-entropy": (jaxloss.softmax_cross_entropy, (LOGITS, LABELS), {}),
    "dense targets": (
        jaxloss.softmax_cross_entropy,
        (LOGITS, np.eye(3, dtype=np.float32)[LABELS]),
        {},
    ),
    "squared error at zero": (jaxloss.squared_error, (0 * LOGITS, 0 * LOGITS), {}),
    "boxes": (jaxloss.giou_loss, (BOXES, BOXES[::-1]), {}),
    "contrastive": (jaxloss.sup_con_loss, (LOGITS, np.array([0, 0, 1, 1])), {}),
    "ctc": (
        jaxloss.ctc_loss,
        (RNG.normal(size=(2, 6, 4)).astype(np.float32), np.array([[1, 2], [3, 0]])),
        dict(label_where=np.array([[True, True], [True, False]])),
    ),
    "dice": (
        jaxloss.dice_loss,
        (jax.nn.softmax(RNG.normal(size=(2, 5, 3))), RNG.integers(0, 3, (2, 5))),
        {},
    ),
    "a list without anything relevant": (
        jaxloss.pairwise_logistic_loss,
        (LOGITS, np.array([[1, 0, 0], [0, 0, 0], [2, 1, 0], [1, 1, 0]], np.float32)),
        {},
    ),
}


@pytest.mark.parametrize(("loss", "args", "options"), CLEAN.values(), ids=CLEAN)
def test_a_clean_call_has_no_problem_and_the_numbers_of_the_loss(loss, args, options):
    found = explain(loss, *args, **options)
    assert found.problems == ()
    units = loss(*args, **options, reduction="none")
    assert found.units == units.shape
    np.testing.assert_allclose(found.values, units, rtol=1e-5, atol=1e-6)
    assert found.mean == pytest.approx(float(loss(*args, **options)), rel=1e-5, abs=1e-6)
    assert found.total == pytest.approx(float(jnp.sum(units)), rel=1e-5, abs=1e-6)
    assert "problems: none" in str(found)


def test_which_mean_it_is_stands_beside_the_sum_and_the_weight():
    where, weights = np.array([True, True, True, False]), np.array([1, 0, 0.5, 9], np.float32)
    found = explain(jaxloss.softmax_cross_entropy, LOGITS, LABELS, where=where, weights=weights)
    assert (found.units, found.kept, found.weight) == ((4,), 2, 1.5)
    assert found.mean == pytest.approx(found.total / 1.5)
    assert "sum" in str(found)
    assert "2 of 4 count" in str(found)


def test_a_bad_label_is_named_with_its_place_and_value():
    found = explain(jaxloss.softmax_cross_entropy, LOGITS, planted(LABELS, 2, 7))
    assert faults(found) == [("labels", "expected values in [0, 3)", (2,), 1)]
    assert found.problems[0].value == 7
    units = next(p for p in found.problems if p.argument == "units")
    assert (units.kind, units.index, units.count) == ("nan", (2,), 1)
    assert found.inputs["labels"] == 7
    assert np.isnan(found.mean)
    assert "expected values in [0, 3)" in str(found)


def test_a_bad_label_of_a_loss_with_lists_is_named_too():
    logits = RNG.normal(size=(2, 6, 4)).astype(np.float32)
    found = explain(jaxloss.ctc_loss, logits, np.array([[1, 2], [9, 3]]))
    ((argument, kind, index, count),) = faults(found)
    assert (argument, index, count) == ("labels", (1, 0), 1)
    assert "[" in kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "value"), [("nan", np.nan), ("inf", np.inf), ("-inf", -np.inf)])
def test_an_entry_that_is_not_finite_is_named_in_every_precision(dtype, kind, value):
    logits = jnp.asarray(planted(LOGITS, (1, 2), value), dtype)
    found = explain(jaxloss.softmax_cross_entropy, logits, LABELS)
    assert faults(found) == [("logits", kind, (1, 2), 1)]


def test_faults_in_one_unit_are_all_found():
    logits, target = planted(LOGITS, (3, 0), np.nan), planted(LOGITS, (3, 0), np.inf)
    found = explain(jaxloss.squared_error, logits, target)
    assert faults(found) == [("pred", "nan", (3, 0), 1), ("target", "inf", (3, 0), 1)]


def test_garbage_under_a_mask_is_no_problem_and_beside_it_it_is():
    where = np.array([True, False, True, True])
    logits, labels = planted(LOGITS, 1, np.nan), planted(LABELS, 1, 99)
    assert explain(jaxloss.softmax_cross_entropy, logits, labels, where=where).problems == ()
    logits = planted(logits, (2, 0), np.nan)
    found = explain(jaxloss.softmax_cross_entropy, logits, labels, where=where)
    assert faults(found) == [("logits", "nan", (2, 0), 1)]
    assert explain(jaxloss.softmax_cross_entropy, logits.T, labels, axis=0, where=where).problems


def test_garbage_hidden_by_other_means_than_where_is_no_problem():
    logits = planted(LOGITS, 1, np.nan)
    ignored = explain(
        jaxloss.softmax_cross_entropy, logits, planted(LABELS, 1, -1), ignore_index=-1
    )
    assert ignored.problems == ()
    seen = explain(
        jaxloss.softmax_cross_entropy,
        planted(logits, (3, 1), np.nan),
        planted(LABELS, 1, -1),
        ignore_index=-1,
    )
    assert faults(seen) == [("logits", "nan", (3, 1), 1)]


def test_of_garbage_beyond_the_lengths_and_a_nan_before_them_the_nan_is_named():
    logits = planted(RNG.normal(size=(2, 6, 4)).astype(np.float32), (1, slice(4, 6)), np.nan)
    args, lengths = (np.array([[1, 2], [3, 2]]),), np.array([6, 4])
    assert explain(jaxloss.ctc_loss, logits, *args, lengths=lengths).problems == ()
    logits = planted(logits, (1, 2, 1), np.nan)
    assert faults(explain(jaxloss.ctc_loss, logits, *args, lengths=lengths)) == [
        ("logits", "nan", (1, 2, 1), 1)
    ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_zero_vector_is_named_where_only_directions_count(dtype):
    a = jnp.asarray(planted(LOGITS, 2, 0), dtype)
    found = explain(jaxloss.cosine_distance, a, jnp.asarray(LOGITS[::-1], dtype))
    assert faults(found) == [("a", "zero vector", (2,), 1)]
    assert explain(jaxloss.squared_error, a, jnp.asarray(LOGITS, dtype)).problems == ()
    where = np.array([True, True, False, True])
    assert explain(jaxloss.cosine_distance, a, 0 * a + 1, where=where).problems == ()


def test_a_zero_vector_among_embeddings_that_a_batch_couples_is_named():
    embeddings = planted(RNG.normal(size=(6, 5)).astype(np.float32), 4, 0)
    labels = np.array([0, 0, 1, 1, 2, 2])
    found = explain(jaxloss.sup_con_loss, embeddings, labels)
    assert faults(found) == [("embeddings", "zero vector", (4,), 1)]


def test_crossed_boxes_and_boxes_without_area_are_named():
    pred, target = planted(BOXES, 1, [4, 1, 1, 3]), planted(BOXES, 2, [1, 1, 1, 5])
    found = explain(jaxloss.giou_loss, pred, target)
    crossed = "expected boxes whose high corner is not below the low one"
    assert faults(found) == [
        ("pred", crossed, (1,), 1),
        ("target", "box without area", (2,), 1),
    ]
    assert (
        explain(jaxloss.giou_loss, pred, target, where=np.array([True, False, False])).problems
        == ()
    )


def test_an_infinite_loss_of_finite_arguments_shows_what_its_unit_holds():
    apart = planted(BOXES, 0, [8, 8, 9, 9])
    found = explain(jaxloss.log_iou_loss, apart, BOXES)
    (problem,) = found.problems
    assert (problem.argument, problem.kind, problem.index) == ("units", "inf", (0,))
    np.testing.assert_array_equal(found.inputs["pred"], [8, 8, 9, 9])
    assert "pred [8. 8. 9. 9.]" in str(found)


def test_faults_of_options_are_named():
    weights = np.array([1, np.nan, 1, 1], np.float32)
    found = explain(jaxloss.softmax_cross_entropy, LOGITS, LABELS, weights=weights)
    assert faults(found) == [("weights", "nan", (1,), 1)]


def test_a_gradient_that_is_not_finite_is_named_by_its_argument():
    root = lambda x: jnp.sqrt(x)
    found = explain(root, np.array([1.0, 0.0], np.float32))
    (problem,) = found.problems
    assert (problem.argument, problem.kind, problem.index) == ("gradient of x", "inf", (1,))


def test_the_largest_units_come_first_with_their_share():
    pred = np.array([1.0, -3.0, 0.0, 2.0], np.float32)
    found = explain(jaxloss.squared_error, pred, 0 * pred)
    assert [(c.index, c.value) for c in found.largest] == [
        ((1,), 9),
        ((3,), 4),
        ((0,), 1),
        ((2,), 0),
    ]
    assert [c.share for c in found.largest] == pytest.approx([9 / 14, 4 / 14, 1 / 14, 0])
    np.testing.assert_allclose(found.gradients["pred"], pred / 2)


def objective(params, x, *, scale=1.0):
    pred = x @ params["dense"]["kernel"]
    return jaxloss.weighted_sum(
        {
            "error": jaxloss.squared_error(pred, jnp.ones_like(pred)),
            "l2": jaxloss.l2_penalty(params),
        },
        weights={"l2": 0.5 * scale},
    )


def test_terms_of_a_sum_have_their_share_of_the_gradient():
    kernel, x = np.array([[1.0], [2.0]], np.float32), np.array([[1.0, 1.0], [0.0, 2.0]], np.float32)
    found = explain(objective, {"dense": {"kernel": kernel}}, x, scale=2.0)
    error = x @ kernel - 1
    for_params = x.T @ (2 * error / 2)
    norms = [np.linalg.norm(for_params), np.linalg.norm(kernel)]
    assert [t.name for t in found.terms] == ["error", "l2"]
    assert [t.value for t in found.terms] == pytest.approx([np.mean(error**2), 2.5])
    assert [t.norm for t in found.terms] == pytest.approx(norms, rel=1e-6)
    assert sum(t.share for t in found.terms) == pytest.approx(1)
    assert "gradient norm" in str(found)
    assert set(found.gradients) == {"params/dense/kernel"}


def test_terms_of_nested_composites_and_schedules_have_their_share():
    def nested(x):
        inner = jaxloss.weighted_sum({"a": x**2, "b": 3 * x}, weights={"b": 2.0, "a": 0})
        weights = {"inner": optax.linear_schedule(0, 1, 10)}
        return jaxloss.weighted_sum({"inner": inner, "c": x}, weights=weights, step=5)

    found = explain(nested, np.float32(2))
    assert {t.name: (t.value, t.norm) for t in found.terms} == {
        "inner/a": (4, 0),
        "inner/b": (6, 3),
        "c": (2, 1),
    }


def test_composites_of_the_library_have_their_share():
    nll, kl = np.array([3.0, 1.0], np.float32), np.array([2.0, 4.0], np.float32)
    found = explain(jaxloss.elbo_loss, nll, kl, beta=2.0)
    assert found.units == (2,)
    assert {t.name: (t.value, t.share) for t in found.terms} == {
        "reconstruction": (2, pytest.approx(1 / 3)),
        "kl": (3, pytest.approx(2 / 3)),
    }


def test_gains_of_a_criterion_count_in_the_share():
    criterion = lambda x: total({"a": x**2, "b": 3 * x}, a=2.0, b=0.5)
    found = explain(criterion, np.float32(2))
    assert [(t.name, t.value, t.norm) for t in found.terms] == [("a", 4, 8), ("b", 6, 1.5)]
    assert found.mean == 11


def test_terms_whose_gradient_is_unknown_have_no_share():
    plain = lambda x: (x**2, {"a": jax.lax.stop_gradient(x)})
    (term,) = explain(plain, np.float32(3)).terms
    assert np.isnan(term.share)


def test_a_term_that_is_lost_is_seen_among_the_others():
    broken = lambda x: jaxloss.weighted_sum({"fine": 3 * x, "lost": jnp.log(x)})
    terms = {t.name: t for t in explain(broken, np.float32(0)).terms}
    assert (terms["lost"].value, terms["lost"].norm) == (-np.inf, np.inf)
    assert (terms["fine"].norm, terms["fine"].share) == (3, 1)


def test_faults_in_a_tree_of_parameters_are_named_by_path():
    params = {"dense": {"kernel": np.array([[1.0], [np.nan]], np.float32)}}
    found = explain(objective, params, np.ones((2, 2), np.float32))
    assert faults(found) == [("params/dense/kernel", "nan", (1, 0), 1)]


def test_pairs_of_sum_and_weight_and_penalties_are_explained_too():
    pair = lambda pred: jaxloss.squared_error(pred, 0 * pred, reduction=jaxloss.sum_and_weight)
    found = explain(pair, np.array([1.0, 3.0], np.float32))
    assert (found.total, found.weight, found.mean) == (10, 2, 5)
    assert explain(jaxloss.l2_penalty, {"w": np.ones(4, np.float32)}).mean == 2


def test_losses_with_a_critic_a_key_or_a_state_are_explained():
    critic = lambda x: jnp.sum(x**2, axis=1)
    real, fake = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    found = explain(
        jaxloss.gradient_penalty, critic, real, planted(fake, (1, 1), np.nan), key=jax.random.key(0)
    )
    assert faults(found) == [("fake", "nan", (1, 1), 1)]
    state = np.float32(0.5)
    found = explain(jaxloss.path_length_penalty, lambda z: z, real, state, key=jax.random.key(0))
    assert found.problems == ()
    assert found.units == (4,)


def test_no_argument_is_altered_and_nothing_is_left_behind():
    logits, labels = planted(LOGITS, (1, 2), np.nan), planted(LABELS, 0, 5)
    before = logits.copy(), labels.copy()
    explain(jaxloss.softmax_cross_entropy, logits, labels)
    np.testing.assert_array_equal(logits, before[0])
    np.testing.assert_array_equal(labels, before[1])
    _, terms = jaxloss.elbo_loss(jnp.ones(2), jnp.ones(2), beta=3.0)
    assert terms["kl"] == 1  # unweighted again
    jaxloss.checked(jaxloss.softmax_cross_entropy)(LOGITS, LABELS)


def test_inside_a_transformation_it_says_where_it_belongs():
    text = "explain: args: expected arrays with values; call it outside jax.jit"
    for transform in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(TypeError, match=text):
            transform(lambda x: explain(jaxloss.squared_error, x, x).mean)(
                jnp.ones(3) if transform is not jax.grad else 1.0
            )
    with pytest.raises(TypeError, match=text):
        jax.jit(lambda: explain(jaxloss.squared_error, np.ones(3), np.ones(3)).mean)()


def test_errors_of_the_loss_keep_its_name():
    with pytest.raises(ValueError, match="squared_error: target: expected shape"):
        explain(jaxloss.squared_error, LOGITS, LOGITS[:1])


def test_the_table_is_short_also_for_many_problems():
    found = explain(
        jaxloss.squared_error, np.full((100, 9), np.nan, np.float32), np.ones((100, 9), np.float32)
    )
    assert faults(found) == [("pred", "nan", (0, 0), 900)]
    assert len(str(found).splitlines()) < 20
    assert isinstance(found, Explanation)
