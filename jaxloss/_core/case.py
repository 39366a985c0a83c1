"""Cases: plain data that tells tests, gallery, benchmarks and tables how to call a loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

SIZES = MappingProxyType({"B": 8, "T": 5, "C": 4, "D": 6, "V": 3})

Kind = Literal["real", "bounded", "fixed"]


@dataclass(frozen=True)
class Draw:
    """How to draw one array.

    Attributes:
        dims: Names of the axes, such as `"B C"`; equal names have equal sizes in a case. `B` is the
            axis along which examples are stacked.
        sample: `(generator, shape, sizes) -> numpy array`.
        kind: `"real"` values may be anything, so laws set them to 0 and +-1e4; `"bounded"` floats
            must stay in their range; `"fixed"` values are labels, weights of classes and the like,
            in which no law differentiates.
        ends: Extreme legal values of a `"bounded"` draw, as `(array) -> arrays`.
    """

    dims: str
    sample: Callable[[np.random.Generator, tuple[int, ...], Mapping[str, int]], Any]
    kind: Kind = "real"
    ends: Callable[[Any], tuple[Any, ...]] | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape under these sizes; a number as a name stands for itself."""
        return tuple(int(d) if d.isdigit() else sizes[d] for d in self.dims.split())


@dataclass(frozen=True, eq=False)
class Case:
    """One loss with drawn arrays and a configuration, on which every law is run.

    Attributes:
        loss: The public function.
        arrays: A draw for each array argument, in the order of the signature.
        config: Further keyword arguments. Numbers must also be accepted as traced arrays.
        label: Tells two cases of one loss apart.
        positions: Axes that `where` covers; the shape of the units if empty.
        sizes: Sizes of axes that differ from the defaults.
        zero_at_target: Whether the loss is 0 where the first two arrays are equal.
        minimum: Whether it is smallest there.
        coupled: Whether examples of a batch influence one another's units.
        without: Laws the loss cannot keep, each with its reason; a test confirms that they fail.
        functions: Functions of the caller, such as a critic, that stand before the arrays.
    """

    loss: Callable[..., Any]
    arrays: Mapping[str, Draw]
    config: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    positions: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    zero_at_target: bool = False
    minimum: bool = False
    coupled: bool = False
    without: Mapping[str, str] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the loss, with the label of the case behind it."""
        return f"{self.loss.__name__}-{self.label}" if self.label else self.loss.__name__

    def draw(self, seed: int = 0, dtype: Any = np.float32, **sizes: int) -> dict[str, np.ndarray]:
        """The arrays of one draw; floating ones in `dtype`."""
        generator = np.random.default_rng(seed)
        merged = {**SIZES, **self.sizes, **sizes}
        drawn = {}
        for name, draw in self.arrays.items():
            array = np.asarray(draw.sample(generator, draw.shape(merged), merged))
            drawn[name] = array.astype(dtype) if array.dtype.kind == "f" else array
        return drawn


def draw_normal(dims: str, *, scale: float = 1.0) -> Draw:
    """Any real number."""
    return Draw(dims, lambda g, shape, _: scale * g.standard_normal(shape))


def draw_uniform(dims: str, low: float, high: float, *, kind: Kind = "bounded") -> Draw:
    """A number between `low` and `high`."""
    return Draw(dims, lambda g, shape, _: g.uniform(low, high, shape), kind)


def draw_log(dims: str, low: float, high: float, *, largest: float) -> Draw:
    """A logarithm between `low` and `high`, and as far as float32 carries its exponential."""
    ends = lambda x: (np.full_like(x, -largest), np.full_like(x, largest))
    return Draw(dims, lambda g, shape, _: g.uniform(low, high, shape), "bounded", ends)


def draw_counts(dims: str, *, high: int = 20) -> Draw:
    """Whole numbers from 0, as floats."""
    return Draw(dims, lambda g, shape, _: g.integers(0, high, shape).astype(float), "bounded")


def draw_labels(dims: str, *, classes: str = "C") -> Draw:
    """Integer class labels."""
    return Draw(
        dims, lambda g, shape, sizes: g.integers(0, sizes[classes], shape, np.int32), "fixed"
    )


def draw_halves(dims: str) -> Draw:
    """Labels of two classes, each one half of the batch."""

    def sample(_: np.random.Generator, shape: tuple[int, ...], __: Any) -> np.ndarray:
        return np.arange(shape[0], dtype=np.int32) * 2 // max(shape[0], 1)

    return Draw(dims, sample, "fixed")


def draw_groups(dims: str) -> Draw:
    """Labels of two classes by turns and, the last one, of a third: positives for all but one."""

    def sample(_: np.random.Generator, shape: tuple[int, ...], __: Any) -> np.ndarray:
        labels = np.arange(shape[0], dtype=np.int32) % 2
        labels[-1:] = 2
        return labels

    return Draw(dims, sample, "fixed")


def draw_binary(dims: str) -> Draw:
    """Labels 0 and 1, as floats."""
    return Draw(dims, lambda g, shape, _: g.integers(0, 2, shape).astype(float), "fixed")


def draw_signs(dims: str) -> Draw:
    """Labels -1 and +1, as integers."""
    return Draw(dims, lambda g, shape, _: g.integers(0, 2, shape, np.int32) * 2 - 1, "fixed")


def draw_unit(dims: str) -> Draw:
    """Probabilities, each for itself, in (0, 1)."""
    return Draw(
        dims,
        lambda g, shape, _: g.uniform(0.02, 0.98, shape),
        "bounded",
        lambda p: (np.zeros_like(p), np.ones_like(p)),
    )


def draw_probs(dims: str) -> Draw:
    """Distributions over the last axis."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        return g.dirichlet(np.ones(shape[-1]), shape[:-1])

    return Draw(dims, sample, "bounded", lambda p: (_one_hot(p, 0), _one_hot(p, -1)))


def draw_log_probs(dims: str) -> Draw:
    """Logarithms of distributions over the last axis."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        return np.log(g.dirichlet(np.ones(shape[-1]), shape[:-1]))

    return Draw(dims, sample, "bounded")


def _one_hot(p: np.ndarray, index: int) -> np.ndarray:
    out = np.zeros_like(p)
    out[..., index] = 1
    return out


def draw_boxes(dims: str, *, overlapping: bool = False) -> Draw:
    """Boxes of 4 or 6 numbers, low corner first; all with a common point if `overlapping`."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        corner = (*shape[:-1], shape[-1] // 2)
        low = g.uniform(0, 4 if overlapping else 10, corner)
        high = g.uniform(5, 12, corner) if overlapping else low + g.uniform(1, 8, corner)
        return np.concatenate([low, high], axis=-1)

    def ends(boxes: np.ndarray) -> tuple[np.ndarray, ...]:
        low, high = np.split(boxes, 2, axis=-1)
        points = np.concatenate([low, low], axis=-1)
        lines = np.concatenate([low, low[..., :1], high[..., 1:]], axis=-1)
        return 0 * boxes, points, lines, boxes + np.asarray(1e6, boxes.dtype)

    return Draw(dims, sample, "bounded", None if overlapping else ends)
