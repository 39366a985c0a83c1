"""The main job: `python -m jaxloss compare`."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.__main__ import main
from jaxloss.playground import balance, compare, report, tasks
from jaxloss.playground.task import Metric
from jaxloss.playground.train import History, evaluation_steps, load, train

TASKS = tasks.names()
ERROR = Metric("error", "points", lambda pred, target: jnp.mean(pred - target), False, 1.0)


def history(*curve, seeds=2):
    """A made-up training whose validation error takes these values."""
    values = np.repeat(np.array(curve)[:, None], seeds, axis=1)
    steps = 10 * np.arange(len(curve))
    metrics = {ERROR.name: values}
    return History(steps, values, values, metrics, {ERROR.name: values[-1]}, None, None)


@cache
def drawn(task_load, seed):
    """What a task draws, once for all tests."""
    return task_load(seed)


def shortened(task, examples=24):
    """The task with few examples in each part and small batches, looked at twice."""
    few = lambda seed: jax.tree.map(lambda a: a[:examples], drawn(task.load, seed))
    optimizer = task.optimizer._replace(init=jax.jit(task.optimizer.init))
    task = replace(task, init=jax.jit(task.init), optimizer=optimizer)
    return replace(task, load=few, batch_size=4, evaluations=1)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_found_by_looking_prints_its_table_and_draws_its_curves(
    name, tmp_path, capsys, monkeypatch
):
    shown = {"generate": 64}.get(name, 24)
    task = shortened(tasks.find(name), shown)
    monkeypatch.setattr(tasks, "find", {name: task}.get)
    *_, loss = task.losses
    below = [f"({baseline})" for baseline in ("untrained", *task.baselines)]
    options = ["--losses", loss, "--steps", "3", "--seeds", "2"]
    assert main(["compare", "--task", name, *options, "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\([^)]*\)|\S+) +\S+ ±", printed, re.MULTILINE)
    assert rows == [loss, *below]
    for word in ("train loss", "validation loss", "overfits", "3 steps", "2 seeds"):
        assert word in printed
    picture = tmp_path / "new" / f"{name}.png"
    assert f"wrote {picture}" in printed.replace("\n", "")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("name", TASKS)
def test_every_loss_of_a_task_is_a_differentiable_scalar_of_prediction_and_target(name):
    task = tasks.find(name)
    key, examples = jax.random.key(0), drawn(task.load, 0).train
    params = jax.eval_shape(task.init, key)
    prepared = jax.eval_shape(task.prepare, key, examples)
    prediction = jax.eval_shape(task.apply, params, prepared.inputs)
    for loss in task.losses.values():
        both = jax.value_and_grad(loss, allow_int=True)  # a prediction may hold labels and masks
        value, _ = jax.eval_shape(both, prediction, prepared.target)
        assert value.shape == ()


@pytest.mark.parametrize("name", TASKS)
def test_a_task_draws_other_examples_of_the_same_shape_from_another_seed(name):
    task = tasks.find(name)
    once, again, other = drawn(task.load, 0), task.load(0), drawn(task.load, 1)
    shapes = lambda splits: jax.tree.map(np.shape, splits)
    equal = lambda a, b: all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))
    assert equal(once, again)
    assert not equal(once, other)
    assert shapes(once) == shapes(other)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_one_file_of_at_most_120_lines(name):
    assert len(Path(tasks.__file__).with_name(f"{name}.py").read_text().splitlines()) <= 120


def test_two_in_five_digits_to_train_on_carry_a_wrong_label_and_none_to_test_on():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    truth = {
        (image / 16).astype(np.float32).tobytes(): y
        for image, y in zip(images, labels, strict=True)
    }
    wrong = lambda part: np.mean([truth[x.tobytes()] != y for x, y in zip(*part, strict=True)])
    splits = drawn(tasks.find("digits").load, 0)
    assert [wrong(part) for part in splits] == [0.4, 0.0, 0.0]


def test_digits_are_learnt_despite_the_wrong_labels():
    task = replace(tasks.find("digits"), evaluations=1)
    splits = load(task, 2)
    loss = task.losses["generalized_cross_entropy"]
    accuracy = train(task, loss, splits, steps=300).metrics["accuracy"]
    assert np.all(accuracy[0] < 30)
    assert np.all(accuracy[-1] > 88)  # 93 to 96 over eight seeds


def test_outliers_mislead_squared_error_far_more_than_absolute_error():
    task = replace(tasks.find("diabetes"), evaluations=1)
    splits = load(task, 2)
    squared, absolute = (
        train(task, task.losses[name], splits, steps=200).test["mean absolute error"]
        for name in ("squared_error", "absolute_error")
    )
    assert np.all(absolute < squared / 2)  # 44 to 56 points against 132 to 173 over eight seeds


def test_a_criterion_s_own_step_that_adds_gradients_up_is_the_step_along_their_sum():
    task = shortened(tasks.find("multitask"))
    splits, fixed = load(task, 2), task.losses["fixed weights"]
    added = balance.surgery(lambda grads: jax.tree.map(lambda g: jnp.sum(g, axis=0), grads))
    plain, own, other = (
        train(task, loss, splits, steps=5).test["error"]
        for loss in (fixed, replace(fixed, **added), task.losses["pcgrad"])
    )
    np.testing.assert_allclose(own, plain, rtol=1e-4)
    assert np.all(np.abs(other / plain - 1) > 1e-3)


def test_the_same_command_prints_the_same_numbers(tmp_path, capsys):
    command = ["compare", "--task", "diabetes", "--losses", "huber_loss", "--steps", "5"]
    printed = []
    for _ in range(2):
        assert main([*command, "--seeds", "1", "--out", str(tmp_path)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "±" not in printed[0]  # one seed has no spread


def test_evaluations_include_the_first_and_the_last_step():
    assert list(evaluation_steps(1)) == [0, 1]
    assert evaluation_steps(1001)[[0, -1]].tolist() == [0, 1001]


def test_overfitting_begins_at_the_best_metric_if_it_got_worse_for_good():
    assert history(9.0, 5.0, 3.0, 6.0).overfits_from(ERROR) == 20


def test_a_model_that_keeps_improving_or_worsens_within_noise_does_not_overfit():
    assert history(9.0, 5.0, 3.0).overfits_from(ERROR) is None
    assert history(9.0, 5.0, 3.0, 3.9).overfits_from(ERROR) is None


def test_a_model_that_only_gets_worse_overfits_from_its_start():
    assert history(3.0, 5.0).overfits_from(ERROR) == 0


def test_a_training_that_ends_in_nan_is_reported_not_raised(capsys, tmp_path):
    nan = float("nan")
    lost = history(5.0, nan)
    assert lost.overfits_from(ERROR) == 0
    assert history(nan, nan).overfits_from(ERROR) is None
    histories = {"lost": lost, "never": history(nan, nan), "kept": history(5.0, 4.0)}
    task = replace(tasks.find("diabetes"), metrics=[ERROR], picture=None)
    report.print_table(task, histories)
    assert "nan" in capsys.readouterr().out
    report.draw(task, histories, tmp_path / "nan.png")


def test_list_prints_tasks_and_their_losses(capsys):
    assert main(["compare", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in TASKS:
        assert f"{name}: " in printed
        assert all(f"  {loss}\n" in printed for loss in tasks.find(name).losses)


def test_tasks_without_the_losses_asked_for_are_left_out(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(compare, "_compare", lambda chosen, *_: seen.update(chosen))
    assert main(["compare", "--losses", "log_cosh,huber_loss", "--out", str(tmp_path)]) == 0
    assert {name: list(task.losses) for name, task in seen.items()} == {
        "diabetes": ["log_cosh", "huber_loss"]
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--losses", "foo"], "--losses: expected names among softmax_cross_entropy, "),
        (["--losses", "huber_loss,"], "got ''"),
        (["--task", "digits", "--losses", "huber_loss"], "--losses: expected names among"),
        (["--task", "moons"], "--task: expected names among digits, diabetes"),
        (["--steps", "0"], "--steps: expected a positive integer, got '0'"),
        (["--steps", "-3"], "--steps: expected a positive integer, got '-3'"),
        (["--steps", "9" * 20], "--steps: expected a positive integer"),
        (["--seeds", "1.5"], "--seeds: expected a positive integer, got '1.5'"),
        (["--out", __file__], "--out: expected a writable folder, got "),
        (["--out", __file__ + "/below"], "--out: expected a writable folder, got "),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_bad_argument_gives_one_line_and_status_two(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("jaxloss")
    assert expected in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["contrast"]])
def test_a_missing_or_unknown_command_gives_one_line_and_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_missing_demo_package_gives_one_line_that_says_what_to_install(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--out", str(tmp_path)])
    assert stop.value.code == 2
    expected = "jaxloss compare: sklearn is not installed: pip install 'jaxloss[demo]'\n"
    assert capsys.readouterr().err == expected


def test_demo_packages_are_imported_only_when_a_comparison_runs():
    code = (
        "import sys, jaxloss.__main__\n"
        "jaxloss.__main__.main(['compare', '--list'])\n"
        "assert not {'sklearn', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
