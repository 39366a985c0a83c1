"""The README's generated parts, each between two comments."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def between(mark: str) -> str:
    """What stands between the comments of this name."""
    return README.read_text().split(f"<!-- {mark} -->\n")[1].split(f"<!-- /{mark} -->")[0]


def replace(mark: str, new: str) -> None:
    """Put `new` between the comments of this name."""
    before, _, rest = README.read_text().partition(f"<!-- {mark} -->\n")
    after = rest.partition(f"<!-- /{mark} -->")[2]
    README.write_text(f"{before}<!-- {mark} -->\n{new}<!-- /{mark} -->{after}")
