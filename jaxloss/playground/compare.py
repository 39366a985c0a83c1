"""`python -m jaxloss compare`: train one small model once per loss and show what came of it."""

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from . import tasks
from .task import Task


def add_command(commands: argparse._SubParsersAction) -> None:
    """Give the command line its `compare`."""
    parser = commands.add_parser(
        "compare",
        help="train a small model once per loss on real data",
        description="Train the same small model once per loss on real data with damaged training "
        "labels; print a table and draw the curves.",
    )
    parser.add_argument(
        "--task",
        default=",".join(tasks.DEFAULT),
        metavar="A,B",
        help="tasks, or 'all' (default: %(default)s)",
    )
    parser.add_argument("--losses", metavar="A,B", help="losses (default: all the task offers)")
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help="training steps (default: the task's)"
    )
    parser.add_argument(
        "--seeds", type=_positive, default=4, metavar="N", help="runs per loss (default: 4)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder of the pictures (default: out)"
    )
    parser.add_argument("--list", action="store_true", help="print tasks and losses, then stop")
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        if arguments.list:
            _print_list()
            return 0
        chosen = _choose(parser, arguments.task, arguments.losses)
        _check_writable(parser, arguments.out)
        _compare(chosen, arguments.steps, arguments.seeds, arguments.out)
    except ModuleNotFoundError as missing:
        package = (missing.name or "jaxloss").split(".")[0]
        if package == "jaxloss":
            raise
        parser.error(f"{package} is not installed: pip install 'jaxloss[demo]'")
    return 0


def _compare(chosen: dict[str, Task], steps: int | None, seeds: int, out: Path) -> None:
    from . import report
    from .train import baselines, evaluation_steps, load, train

    total = {name: steps or task.steps for name, task in chosen.items()}
    for name, task in chosen.items():
        splits, histories = load(task, seeds), {}
        stops = len(evaluation_steps(total[name], task.evaluations))
        with report.progress() as bar:
            for loss, function in task.losses.items():
                row = bar.add_task(f"{name}: {loss}", total=stops)
                histories[loss] = train(
                    task,
                    function,
                    splits,
                    steps=total[name],
                    on_evaluation=lambda row=row: bar.advance(row),
                )
        report.print_table(task, histories, baselines(task, splits))
        path = out / f"{name}.png"
        report.draw(task, histories, path)
        print(f"wrote {path}\n")


def _choose(parser: argparse.ArgumentParser, names: str, losses: str | None) -> dict[str, Task]:
    """The tasks by name, each with the losses asked for; a task that offers none is left out."""
    known = tasks.names()
    wanted = known if names == "all" else _unique(names)
    _check_names(parser, "--task", wanted, known)
    chosen = {name: tasks.find(name) for name in wanted}
    if losses is None:
        return chosen
    offered = dict.fromkeys(loss for task in chosen.values() for loss in task.losses)
    wanted = _unique(losses)
    _check_names(parser, "--losses", wanted, offered)
    narrow = lambda task: {loss: task.losses[loss] for loss in wanted if loss in task.losses}
    narrowed = {name: replace(task, losses=narrow(task)) for name, task in chosen.items()}
    return {name: task for name, task in narrowed.items() if task.losses}


def _unique(names: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in names.split(",")))


def _check_names(
    parser: argparse.ArgumentParser, option: str, got: Sequence[str], known: Iterable[str]
) -> None:
    for name in got:
        if name not in known:
            parser.error(f"{option}: expected names among {', '.join(known)}, got {name!r}")


def _check_writable(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Fail before the training rather than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as reason:
        parser.error(f"--out: expected a writable folder, got '{folder}' ({reason.strerror})")


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:  # more would not fit an int32
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _print_list() -> None:
    for name in tasks.names():
        task = tasks.find(name)
        print(task.title)
        print(*(f"  {loss}" for loss in task.losses), sep="\n")
