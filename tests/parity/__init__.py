"""Parity tests against published peers; every module holds a tuple `ROWS`."""

import importlib
from pathlib import Path
from typing import Any


def rows() -> list[Any]:
    """All rows of all modules of this folder."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    modules = [importlib.import_module(f"parity.{name}") for name in names]
    return [row for module in modules for row in getattr(module, "ROWS", ())]
