"""The README is true: its code prints what it says and its tables list what exists."""

import contextlib
import importlib
import inspect
import io
import pkgutil
import re

import pytest
from readme import README, between, replace

import jaxloss
from jaxloss import losses

BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", re.DOTALL)


def families() -> str:
    """One line for each family: its first docstring line and its losses."""
    lines = ["| family | losses |", "|---|---|"]
    for info in pkgutil.iter_modules(losses.__path__):
        family = importlib.import_module(f"{losses.__name__}.{info.name}")
        names = [name for name in family.__all__ if getattr(family, name).__name__ == name]
        aliases = {
            name: getattr(family, name).__name__
            for name in family.__all__
            if getattr(family, name).__name__ != name
        }
        shown = [
            f"`{n}`" + "".join(f" (`{a}`)" for a, of in aliases.items() if of == n) for n in names
        ]
        lines.append(f"| **{info.name}**: {inspect.getdoc(family)} | {', '.join(shown)} |")
    return "\n".join(lines) + "\n"


def test_every_code_block_prints_what_the_readme_says() -> None:
    blocks = BLOCK.findall(README.read_text())
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), names)
        assert printed.getvalue() == expected


def test_the_families_table_lists_every_loss(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--write-readme"):
        replace("families", families())
    assert between("families") == families()


def test_every_name_in_the_use_table_exists() -> None:
    table = README.read_text().split("## You have X, use Y")[1].split("\n\n")[1]
    called = re.findall(r"`(\w+)\(", table) + re.findall(r"`(\w+)`", table)
    named = {name for name in called if name not in ("loss",)}
    assert len(named) > 15
    missing = {name for name in named if not hasattr(jaxloss, name)}
    assert not missing
