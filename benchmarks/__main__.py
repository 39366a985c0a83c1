"""`python -m benchmarks`: the table of ratios and memory, on screen and as JSON."""

import argparse
import importlib
import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Result, Row, measure


def rows() -> list[Row]:
    """The rows of every module of this folder that has a tuple `ROWS`."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("rows_*.py"))
    modules = [importlib.import_module(f"benchmarks.{name}") for name in names]
    return [row for module in modules for row in module.ROWS]


def table(results: list[Result]) -> Table:
    """One line for each row and peer."""
    view = Table(title="jaxloss against peers: ratio of medians, below 1 is faster")
    for column in (
        "row",
        "shape",
        "peer",
        "ours",
        "peer's",
        "ratio",
        "target",
        "",
        "temp",
        "peer's temp",
    ):
        view.add_column(column, justify="left" if column in ("row", "shape", "peer") else "right")
    for result in results:
        ours = next(iter(result.medians))
        for peer, ratio in result.ratios.items():
            view.add_row(
                result.row.name,
                result.row.shape,
                peer,
                _time(result.medians[ours]),
                _time(result.medians[peer]),
                f"{ratio:.3g}",
                f"{result.row.targets[peer]:g}" if peer in result.row.targets else "-",
                result.verdict(peer),
                _memory(result.temporaries[ours]),
                _memory(result.temporaries[peer]),
            )
    return view


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} us" if seconds < 1e-3 else f"{1e3 * seconds:.1f} ms"


def _memory(mebibytes: float | None) -> str:
    return "-" if mebibytes is None else f"{mebibytes:.1f} MiB"


def main() -> None:
    """Measure the chosen rows and print them."""
    everything = rows()
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--rows", help="names, comma-separated; all if left out")
    parser.add_argument("--seconds", type=float, help="time to spend on each row")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    names = [row.name for row in everything]
    chosen = options.rows.split(",") if options.rows else names
    for name in chosen:
        if name not in names:
            parser.error(f"--rows: expected names among {', '.join(names)}, got {name!r}")
    results = []
    console = Console(width=150)
    for row in everything:
        if row.name in chosen:
            with console.status(f"{row.name} {row.shape}"):
                row = row if options.seconds is None else replace(row, seconds=options.seconds)
                results.append(measure(row))
    console.print(table(results))
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    console.print(f"{machine}, jax {jax.__version__} on {jax.default_backend()}")
    if options.out:
        figures = [
            dict(name=r.row.name, shape=r.row.shape, medians=r.medians, temporaries=r.temporaries)
            for r in results
        ]
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
