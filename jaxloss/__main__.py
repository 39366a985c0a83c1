"""The command line: `python -m jaxloss compare`."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .playground import compare


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on stderr and status 2: the usage is a `--help` away."""
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = _Parser(prog="jaxloss", description="Tools around the losses of jaxloss.")
    commands = parser.add_subparsers(required=True, metavar="command")
    compare.add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
