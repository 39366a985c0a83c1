"""The README is true: its code prints what it says and its tables list what exists."""

import contextlib
import importlib
import inspect
import io
import pkgutil
import re
from types import ModuleType

import pytest
from readme import README, between, replace

import jaxloss
from jaxloss import criteria, losses, training

BLOCK = re.compile(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", re.DOTALL)


def _title(family: ModuleType) -> str:
    return (inspect.getdoc(family) or "").splitlines()[0]


def families() -> str:
    """One line for each family: its first docstring line and its losses."""
    lines = ["| family | losses |", "|---|---|"]
    for package in (losses, criteria, training):
        for info in pkgutil.iter_modules(package.__path__):
            family = importlib.import_module(f"{package.__name__}.{info.name}")
            title = family.__name__.removeprefix("jaxloss.").removeprefix("losses.")
            public = {name: getattr(family, name) for name in family.__all__}
            of = {name: getattr(value, "__name__", name) for name, value in public.items()}
            shown = [
                f"`{name}`" + "".join(f" (`{a}`)" for a in of if of[a] == name != a)
                for name in of
                if of[name] == name
            ]
            lines.append(f"| **{title}**: {_title(family)} | {', '.join(shown)} |")
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
