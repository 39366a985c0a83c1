"""The table and the picture of a comparison."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
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


def print_table(task: Task, histories: Mapping[str, History]) -> None:
    """One row per loss: mean and standard deviation over seeds, the best test metric in bold."""
    lead = task.metrics[0]
    table = Table("loss", title=task.title, title_justify="left", box=None, pad_edge=False)
    for header in (
        "train loss",
        "validation loss",
        f"validation {lead.label}, best",
        f"validation {lead.label}, last",
        "overfits from step",
        *(f"test {metric.label}" for metric in task.metrics),
    ):
        table.add_column(header, justify="right", no_wrap=False)
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
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    seeds, steps = next(iter(histories.values())).train.shape[1], _steps(histories)[-1]
    console.print(
        f"After {steps} steps, mean ± standard deviation over {seeds} seeds (split, damage, weights "
        f"and batches differ; every loss sees the same).\nEach loss has its own unit: compare the "
        f"columns of the {lead.name}. 'Overfits from' is the step of the best validation "
        f"{lead.name},\nif the last one is worse by more than {lead.tolerance:g} {lead.unit}.",
        style="dim",
    )


def draw(task: Task, histories: Mapping[str, History], path: Path) -> None:
    """Curves of loss and metric for every loss, and below them the task's own picture."""
    columns = min(len(histories), PANELS_PER_ROW)
    rows = -(-len(histories) // columns)
    heights = [5.2 * rows] + [3.6] * (task.picture is not None)
    figure = Figure(figsize=(max(2.9 * columns, 9), sum(heights)), layout="constrained", dpi=110)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_curves(parts[0], task.metrics[0], histories, (rows, columns))
    parts[0].suptitle(task.title, fontsize=13)
    if task.picture is not None:
        predictions = {name: history.predictions for name, history in histories.items()}
        task.picture(parts[1], predictions, next(iter(histories.values())).examples)
    figure.savefig(path)


def _draw_curves(
    figure: Any, lead: Metric, histories: Mapping[str, History], shape: tuple[int, int]
) -> None:
    """Losses above in their own units, the metric below on one scale, the other losses in grey."""
    rows, columns = shape
    grid = figure.subplots(2 * rows, columns, squeeze=False, sharex=True)
    steps = _steps(histories)
    curves = {name: history.metrics[lead.name] for name, history in histories.items()}
    for place, (name, history) in enumerate(histories.items()):
        row, column = divmod(place, columns)
        above, below = grid[2 * row, column], grid[2 * row + 1, column]
        _line(above, steps, history.train, "tab:orange", "training loss (damaged labels)")
        _line(above, steps, history.validation, "tab:blue", "validation loss (clean labels)")
        for other in curves.values():
            below.plot(steps, other.mean(axis=1), color="0.85", lw=1, zorder=1)
        _line(below, steps, curves[name], "tab:blue", None)
        overfit = history.overfits_from(lead)
        if overfit is not None:
            for panel in (above, below):
                panel.axvline(overfit, color="tab:red", lw=1, ls="--", label="overfits from here")
        above.set_title(name, fontsize=10)
        below.set(xlabel="step")
    for unused in range(len(histories), rows * columns):
        row, column = divmod(unused, columns)
        grid[2 * row, column].set_visible(False)
        grid[2 * row + 1, column].set_visible(False)
    _share_scale(grid[1::2].ravel(), curves)
    for row in range(rows):
        grid[2 * row, 0].set_ylabel("loss (its own unit)")
        grid[2 * row + 1, 0].set_ylabel(f"validation {lead.label}")
    handles = {h.get_label(): h for panel in grid[0::2].ravel() for h in panel.get_lines()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)


def _line(panel: Any, steps: np.ndarray, values: np.ndarray, color: str, label: str | None) -> None:
    mean, std = values.mean(axis=1), values.std(axis=1)
    panel.plot(steps, mean, color=color, lw=1.6, label=label)
    panel.fill_between(steps, mean - std, mean + std, color=color, alpha=0.2, lw=0)


def _share_scale(panels: Any, curves: Mapping[str, np.ndarray]) -> None:
    """One scale for the metric that leaves the first steps out: they would flatten the rest."""
    late = np.concatenate([values[len(values) // 10 :].ravel() for values in curves.values()])
    late = late[np.isfinite(late)]
    if late.size:
        margin = 0.05 * np.ptp(late) or 1
        for panel in panels:
            panel.set_ylim(late.min() - margin, late.max() + margin)


def _steps(histories: Mapping[str, History]) -> np.ndarray:
    return next(iter(histories.values())).steps


def _winner(histories: Mapping[str, History], lead: Metric) -> str:
    worst = -np.inf if lead.higher_is_better else np.inf
    test = {name: history.test[lead.name].mean() for name, history in histories.items()}
    best = max if lead.higher_is_better else min
    return best(test, key=lambda name: np.nan_to_num(test[name], nan=worst))


def _spread(values: np.ndarray) -> str:
    """Mean and standard deviation with three digits of the mean; the mean alone for one seed."""
    mean, std = float(values.mean()), float(values.std())
    size = np.log10(abs(mean)) if np.isfinite(mean) and mean else 0
    digits = int(np.clip(2 - np.floor(size), 0, 4))
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if len(values) > 1 else "")
