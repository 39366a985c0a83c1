"""Build the wheel twice and check what users would get."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIMIT = 700_000  # some 550 documented functions at about 1.2 kB each


def build(folder: str) -> Path:
    """Build the wheel into a folder."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(Path(folder).glob("*.whl"))


def main() -> None:
    """Size, content and repeatability of the wheel."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        wheels = [build(first), build(second)]
        digests = {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}
        size = wheels[0].stat().st_size
        names = zipfile.ZipFile(wheels[0]).namelist()
    assert len(digests) == 1, "two builds differ"
    assert size < LIMIT, f"{size} bytes, limit {LIMIT}"
    assert "jaxloss/py.typed" in names, "py.typed is missing"
    strangers = [n for n in names if not n.startswith(("jaxloss/", "jaxloss-"))]
    strangers += [n for n in names if n.endswith((".ipynb", ".csv", ".png")) or "test_" in n]
    assert not strangers, f"not for users: {strangers}"
    print(f"{size} bytes, {len(names)} files, the same bytes twice")


if __name__ == "__main__":
    main()
