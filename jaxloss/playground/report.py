"""The table and the picture of a comparison."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .task import Metric, Task
from .train import History

PANELS_PER_ROW = 6


def progress() -> Progress:
    """A bar per loss on stderr, so that stdout holds nothing but results."""
    columns = (TextColumn("{task.description:42}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def print_table(
    task: Task,
    histories: Mapping[str, History],
    baselines: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """One row per loss: mean and standard deviation over seeds, the best test metric in bold.

    Below them stand the test metrics of the baselines.
    """
    lead, first = task.metrics[0], next(iter(histories.values()))
    table = Table(title=task.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("loss", no_wrap=True)
    for header in (
        "train loss",
        "validation loss",
        f"validation {lead.label}, best",
        f"validation {lead.label}, last",
        "overfits from step",
        *(f"test {metric.label}" for metric in task.metrics),
    ):
        table.add_column(header, justify="right", overflow="fold")
    winner = _winner(histories, lead)
    for name, history in histories.items():
        overfit = history.overfits_from(lead)
        table.add_row(
            name,
            _spread(history.train[-1]),
            _spread(history.validation[-1]),
            _spread(history.metrics[lead.name][history.best(lead)]),
            _spread(history.metrics[lead.name][-1]),
            "-" if overfit is None else str(overfit),
            *(_spread(history.test[metric.name]) for metric in task.metrics),
            style="bold" if name == winner else None,
        )
    for name, metrics in (baselines or {}).items():
        values = (_spread(metrics[metric.name]) for metric in task.metrics)
        table.add_row(f"({name})", *[""] * 5, *values, style="dim")
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    for name, history in histories.items():
        if history.terms:
            console.print(f"{name} on validation: {_terms(history)}", soft_wrap=True)
        if history.cost:
            cost = f"{history.cost.memory:.1f} MiB of temporaries, {history.cost.time:.0f} ms"
            console.print(f"{name}, loss and gradient of one batch: {cost}", soft_wrap=True)
    console.print(_note(lead, first), style="dim")


def _note(lead: Metric, history: History) -> str:
    margin = f"{lead.tolerance:g} {lead.unit}".strip()
    spread = f"mean ± standard deviation over {history.seeds} seeds"
    return (
        f"After {history.steps[-1]} steps, {spread if history.seeds > 1 else 'one seed'}. Losses "
        f"have different units, so compare the {lead.name} columns. 'Overfits from' is the step of "
        f"the best validation {lead.name}, given where the last one is worse by more than {margin}."
    )


def _terms(history: History) -> str:
    """The terms of the loss, before their gains, at the first and at the last step."""
    ends = {name: (_spread(v[0]), _spread(v[-1])) for name, v in history.terms.items()}
    return ", ".join(f"{name} {first} -> {last}" for name, (first, last) in ends.items())


def draw(task: Task, histories: Mapping[str, History], path: Path) -> None:
    """Curves of loss and metric for every loss, and below them the task's own picture."""
    first = next(iter(histories.values()))
    columns = min(len(histories), PANELS_PER_ROW)
    rows = -(-len(histories) // columns)
    heights = [5.4 * rows + 0.6] + [3.8] * (task.picture is not None)
    with rc_context({"font.size": 11, "axes.titlesize": 11, "figure.titlesize": 13}):
        figure = Figure((max(3 * columns, 9), sum(heights)), dpi=100, layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        runs = f"\nline and band: mean and standard deviation over {first.seeds} seeds"
        parts[0].suptitle(task.title + runs * (first.seeds > 1))
        _draw_curves(parts[0], task.metrics[0], histories, rows, columns)
        if task.picture is not None:
            predictions = {name: history.predictions for name, history in histories.items()}
            task.picture(parts[1], predictions, first.examples)
        figure.savefig(path)


def _draw_curves(
    figure: SubFigure, lead: Metric, histories: Mapping[str, History], rows: int, columns: int
) -> None:
    """Losses above in their own units, the metric below on one scale, the other losses in grey."""
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    panels = grid.reshape(rows, 2, columns).swapaxes(1, 2).reshape(-1, 2)
    for unused in panels[len(histories) :].ravel():
        unused.remove()
    panels = panels[: len(histories)]
    for (above, below), (name, history) in zip(panels, histories.items(), strict=True):
        _line(above, history.steps, history.train, "tab:orange", "training")
        _line(above, history.steps, history.validation, "tab:blue", "validation")
        for other in histories.values():
            if other is not history:
                mean = other.metrics[lead.name].mean(axis=1)
                below.plot(other.steps, mean, color="0.8", lw=1, label="validation, other losses")
        _line(below, history.steps, history.metrics[lead.name], "tab:blue", "validation")
        overfit = history.overfits_from(lead)
        for panel in (above, below) if overfit is not None else ():
            panel.axvline(overfit, color="tab:red", lw=1.2, ls="--", label="overfits from here")
        above.set_title(name)
        above.tick_params(labelbottom=False)
        below.tick_params(labelleft=False)
        below.set_xlabel("step")
    _share_scale(list(panels[:, 1]), [h.metrics[lead.name] for h in histories.values()], lead)
    for above, below in panels[::columns]:
        above.set_ylabel("loss, in its own unit")
        below.set_ylabel(f"validation\n{lead.label}")
        below.tick_params(labelleft=True)
    handles = {line.get_label(): line for panel in panels.ravel() for line in panel.get_lines()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)


def _line(panel: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    mean, std = values.mean(axis=1), _std(values)
    panel.plot(steps, mean, color=color, lw=1.6, label=label)
    panel.fill_between(steps, mean - std, mean + std, color=color, alpha=0.2, lw=0)


def _share_scale(panels: Sequence[Axes], curves: Sequence[np.ndarray], lead: Metric) -> None:
    """One scale that leaves out the first steps, and a logarithm for errors far apart."""
    late = np.concatenate([values[len(values) // 10 :].ravel() for values in curves])
    late = late[np.isfinite(late)]
    low, high = (late.min(), late.max()) if late.size else (0.0, 1.0)
    margin = 0.05 * (high - low) or 1.0
    for panel in panels:
        panel.set_ylim(low - margin, high + margin)
        if not lead.higher_is_better and 0 < 3 * low < high:
            panel.set_yscale("log")
            panel.set_ylim(low / 1.1, high * 1.1)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(ScalarFormatter())
            panel.yaxis.set_minor_formatter(NullFormatter())


def _winner(histories: Mapping[str, History], lead: Metric) -> str:
    worst = -np.inf if lead.higher_is_better else np.inf
    test = {name: history.test[lead.name].mean() for name, history in histories.items()}
    best = max if lead.higher_is_better else min
    return best(test, key=lambda name: np.nan_to_num(test[name], nan=worst))


def _std(values: np.ndarray) -> np.ndarray:
    """Standard deviation over seeds; that of a single one is 0."""
    return values.std(axis=-1, ddof=int(values.shape[-1] > 1))


def _spread(values: np.ndarray) -> str:
    """Mean and standard deviation with three digits of the mean; the mean alone for one seed."""
    mean, std = float(values.mean()), float(_std(values))
    size = np.log10(abs(mean)) if np.isfinite(mean) and mean else 0
    digits = int(np.clip(2 - np.floor(size), 0, 4))
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if len(values) > 1 else "")
