"""The published parity table names every row that is tested."""

import pytest
from readme import between, replace

from parity import migration, peers, rows


def test_the_table_lists_exactly_the_tested_rows() -> None:
    text = peers.TABLE.read_text()
    listed = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| `")]
    expected = [
        [f"| `{r.peer}`", f"`{r.loss}`" + (f" ({r.label})" if r.label else ""), r.note]
        for r in sorted(rows(), key=lambda r: (r.peer, r.loss, r.label))
    ]
    assert listed == expected, "run: pytest tests/parity --write-parity"


def test_rows_are_named_apart() -> None:
    names = [row.name for row in rows()]
    assert len(names) == len(set(names))


def test_the_readme_lists_every_pair(pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--write-readme"):
        replace("migration", migration())
    assert between("migration") == migration(), "run: pytest tests/parity --write-readme"
