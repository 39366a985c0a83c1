"""Time and memory of jaxloss against its peers, side by side in one process."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # how to import a peer: parity.peers
