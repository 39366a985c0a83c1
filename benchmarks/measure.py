"""Interleaved timing and compiled memory of one row: ours and its peers on the same arrays."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

MIB = 2**20


@dataclass(frozen=True)
class Contender:
    """One implementation: how to run it once, and its compiled temporaries in bytes if known."""

    run: Callable[[], Any]
    temporaries: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: As in the table of targets.
        shape: The size, in words.
        build: `(arrays) -> contenders by name`; the first one is ours.
        draw: Makes the arrays once.
        targets: Peer -> largest ratio of our median to the peer's that counts as reached.
        seconds: Roughly how long to keep measuring.
    """

    name: str
    shape: str
    draw: Callable[[np.random.Generator], tuple[Any, ...]]
    build: Callable[..., Mapping[str, Contender]]
    targets: Mapping[str, float]
    seconds: float = 6.0


@dataclass(frozen=True)
class Result:
    """Medians in seconds, ratios of ours to each peer, temporaries in MiB."""

    row: Row
    medians: Mapping[str, float]
    temporaries: Mapping[str, float | None]

    @property
    def ratios(self) -> dict[str, float]:
        """Our median over each peer's."""
        ours, *peers = self.medians
        return {peer: self.medians[ours] / self.medians[peer] for peer in peers}

    def verdict(self, peer: str) -> str:
        """Timings drift, so a target counts as missed only beyond 1.3 times its value."""
        target = self.row.targets.get(peer)
        if target is None:
            return ""
        ratio = self.ratios[peer]
        return "reached" if ratio <= target else "near" if ratio <= 1.3 * target else "above target"


def compiled(function: Callable[..., Any], *arrays: Any) -> Contender:
    """A jax function as one compiled program, with the memory it needs beside its arrays."""
    program = jax.jit(function).lower(*arrays).compile()
    memory = program.memory_analysis()
    return Contender(
        lambda: jax.block_until_ready(program(*arrays)),
        None if memory is None else memory.temp_size_in_bytes,
    )


def eager(function: Callable[..., Any], *arrays: Any) -> Contender:
    """A jax function called as a user calls it outside jit."""
    return Contender(lambda: jax.block_until_ready(function(*arrays)))


def measure(row: Row, rounds: int = 5) -> Result:
    """Run all contenders of a row in turn, at least `rounds` times each, and take medians."""
    contenders = row.build(*row.draw(np.random.default_rng(0)))
    repeats = {}
    for name, contender in contenders.items():  # warm up, and find how often to repeat
        contender.run()
        start = time.perf_counter()
        contender.run()
        repeats[name] = max(1, int(2e-3 / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.disable()
    begin = time.perf_counter()
    while min(map(len, times.values())) < rounds or time.perf_counter() - begin < row.seconds:
        for name, contender in contenders.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                contender.run()
            times[name].append((time.perf_counter() - start) / repeats[name])
    gc.enable()
    return Result(
        row,
        {name: statistics.median(found) for name, found in times.items()},
        {
            name: None if c.temporaries is None else c.temporaries / MIB
            for name, c in contenders.items()
        },
    )
