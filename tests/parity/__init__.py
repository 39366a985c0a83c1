"""Parity tests against published peers; every module holds a tuple `ROWS`."""

import importlib
from pathlib import Path
from typing import Any


def rows() -> list[Any]:
    """All rows of all modules of this folder."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    modules = [importlib.import_module(f"parity.{name}") for name in names]
    return [row for module in modules for row in getattr(module, "ROWS", ())]


def migration() -> str:
    """The README's table: for each library, its names and ours."""
    pairs = {(row.peer, row.loss) for row in rows()}
    lines = ["| library | theirs -> ours |", "|---|---|"]
    for package in sorted({peer.split(".")[0] for peer, _ in pairs}):
        found = [
            f"`{peer.split('.')[-1]}` -> `{loss}`"
            for peer, loss in sorted(pairs, key=lambda pair: (pair[0].split(".")[-1], pair))
            if peer.split(".")[0] == package
        ]
        lines.append(f"| {package} | {', '.join(found)} |")
    return "\n".join(lines) + "\n"
