"""What a loss made of its arguments: which mean it took, what is wrong, what weighs most."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._core.checked import join_arrays, split_arrays
from .._core.checks import NOTING, checking, message, naming, noted
from .._core.reductions import SumAndWeight
from .._core.terms import attributing

__all__ = ["Explanation", "explain"]

Index = tuple[int, ...]
MOST = 32  # entries that are tried one by one
SHOWN = 5
GIVEN = ("target", "label")  # how the names of what is not predicted begin
WIDEST = 60  # characters of an array in the table
CORNERS = "boxes whose high corner"  # how the check of such boxes begins


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be: where first, how often, and which value."""

    argument: str
    kind: str
    index: Index
    count: int
    value: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Contribution:
    """A unit: its value times its weight, and the share of it in the sum of all sizes."""

    index: Index
    value: float
    share: float


@dataclass(frozen=True)
class Term:
    """A term: its value, and length and share of the gradient of what it adds to the total."""

    name: str
    value: float
    norm: float
    share: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` found; printed, a short table.

    Attributes:
        name: Name of the loss.
        units: Shape of the units.
        kept: How many of them count: those of a weight other than 0.
        weight: The sum of their weights, by which the mean divides.
        total: Their weighted sum.
        mean: The value of the loss.
        problems: `(argument, kind, index, count, value)` of everything wrong: the first index, how
            many there are, and the value at the first.
        largest: `(index, value, share)` of the units that weigh most, up to five of them.
        terms: `(name, value, norm, share)` of each term of a composite, by the gradient.
        inputs: What the arguments hold at the first unit that is not finite, or at the largest.
        values: Every unit times its weight, as an array.
        gradients: The gradient of the mean, as an array for each in which it was taken.
    """

    name: str
    units: Index
    kept: int
    weight: float
    total: float
    mean: float
    problems: tuple[Problem, ...] = ()
    largest: tuple[Contribution, ...] = ()
    terms: tuple[Term, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    values: Any = None
    gradients: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        count = int(np.prod(self.units))
        lines = [
            f"{self.name}: mean {self.mean:.6g} = sum {self.total:.6g} / weight {self.weight:.6g}",
            f"units: {self.kept} of {count} count, shape {self.units}",
        ]
        problems = [
            (f"{p.argument}: {p.kind}", _place(p.index), p.count, _show(p.value))
            for p in self.problems
        ]
        table = _table(("problem", "first at", "count", "value"), problems)
        lines += table or ["problems: none"]
        if self.inputs:
            worst = [p.index for p in self.problems if p.argument == "units"]
            worst += [c.index for c in self.largest]
            holds = [f"{name} {_show(x)}" for name, x in self.inputs.items()]
            lines += ["", f"at unit {_place(worst[0])}: {', '.join(holds)}"]
        largest = [(_place(c.index), f"{c.value:.6g}", f"{c.share:.1%}") for c in self.largest]
        lines += _table(("largest units", "value", "share"), largest if self.units else [])
        terms = [(t.name, f"{t.value:.6g}", f"{t.norm:.6g}", f"{t.share:.1%}") for t in self.terms]
        lines += _table(("term", "value", "gradient norm", "share"), terms)
        return "\n".join(lines)


def explain(loss: Callable[..., Any], *args: Any, **options: Any) -> Explanation:
    """Why a loss has this value: which mean it is, what in the arguments is wrong, what dominates.

    One call instead of a search: it names NaN and infinite entries that the loss really sees,
    labels and other values that `jaxloss.checked` would refuse, zero vectors where only directions
    count, boxes without area, and units and gradients that are not finite. Garbage under a mask is
    no problem. For debugging, from Python: it runs the loss several times and compiles it anew.

    Args:
        loss: A loss; or any objective of arrays and pytrees that returns a scalar, an array of
            units, a `SumAndWeight`, or `(total, terms)` as `weighted_sum` does.
        args: What it would be called with.
        options: The same, by name; `reduction` is set aside.

    Returns:
        An `Explanation`; `problems` is empty where nothing is wrong. Gradients are taken in the
        first argument if it is a tree of parameters, else in all positional arrays but labels and
        targets. The share of a term is that of its weighted gradient, for composites made by
        `weighted_sum` and those of jaxloss; elsewhere it is NaN.

    Raises:
        TypeError: It is called inside `jax.jit`, `grad` or `vmap`, where arrays hold no values.

    >>> logits = jnp.array([[2.0, 0.0], [jnp.nan, 0.0], [0.0, 3.0]])
    >>> found = explain(jaxloss.softmax_cross_entropy, logits, jnp.array([0, 1, 2]))
    >>> print(found)
    softmax_cross_entropy: mean nan = sum nan / weight 3
    units: 3 of 3 count, shape (3,)
    <BLANKLINE>
    problem                            first at  count  value
    logits: nan                          (1, 0)      1    nan
    labels: expected values in [0, 2)       (2)      1      2
    units: nan                              (1)      2    nan
    gradient of logits: nan              (1, 0)      4    nan
    <BLANKLINE>
    at unit (1): logits [nan 0.], labels 1
    <BLANKLINE>
    largest units     value   share
    (0)            0.126928  100.0%
    """
    leaves = jax.tree.leaves((args, options))
    if any(isinstance(x, Tracer) for x in leaves) or _inside():
        with naming("explain"):
            expected = "arrays with values; call it outside jax.jit, grad and vmap"
            raise TypeError(message("args", expected, "a tracer"))
    return _Inquiry(loss, args, options).report()


class _Units(NamedTuple):
    """The reduction that gives everything back."""

    values: Any
    weights: Any


class _Inquiry:
    """A loss with its arguments: the arrays by name, and a compiled look at what it makes of them.

    Arrays are numpy arrays here, but for keys; `floats` and `moved` are the places of those that
    hold floats, and of those among them in which is differentiated: the positional ones that are
    not given by the data.
    """

    def __init__(self, loss: Callable[..., Any], args: Any, options: Mapping[str, Any]) -> None:
        self.loss = loss
        self.name = getattr(loss, "__name__", type(loss).__name__)
        parameters = _parameters(loss)
        self.reduces = "reduction" in parameters
        options = {k: v for k, v in options.items() if k != "reduction" or not self.reduces}
        arrays, self.static = split_arrays(args, options)
        self.arrays = [_plain(x) for x in arrays]
        self.names, positional = _names(args, options, parameters)
        self.floats = [i for i, x in enumerate(self.arrays) if _is_float(x)]
        self.positional = [i for i in self.floats if i in positional]
        predicted = [i for i in self.positional if not self.names[i].startswith(GIVEN)]
        self.moved = predicted or self.positional
        self.where, self.axis = options.get("where"), options.get("axis", -1)
        self.run = jax.jit(self._run)

    def _call(self, arrays: Sequence[Any], reduction: Any) -> tuple[Any, Any]:
        """What the loss returns, and its terms or state."""
        args, options = join_arrays(list(arrays), self.static)
        out = self.loss(*args, **options, **({"reduction": reduction} if self.reduces else {}))
        is_pair = isinstance(out, tuple) and len(out) == 2 and not isinstance(out, _Units)
        return out if is_pair else (out, None)

    def _mean(self, floats: Sequence[Any], arrays: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        mean, terms = self._call(_put(arrays, self.moved, floats), "mean")
        mean = jnp.asarray(mean.mean() if isinstance(mean, SumAndWeight) else mean)
        if not isinstance(terms, Mapping) or any(map(jnp.ndim, jax.tree.leaves(terms))):
            terms = {}  # there are none, or it is a state
        return jnp.mean(mean.astype(jnp.promote_types(mean.dtype, jnp.float32))), dict(terms)

    def _run(self, arrays: Sequence[Any]) -> dict[str, Any]:
        with checking(NOTING):
            found, _ = self._call(arrays, _Units)
        if self.reduces:
            total, _ = self._call(arrays, "sum")
        elif isinstance(found, SumAndWeight):
            total, found = found.sum, _Units(found.mean(), found.weight)
        else:
            found = _Units(jnp.asarray(found), jnp.ones(jnp.shape(found)))
            total = jnp.sum(found.values)
        floats = [arrays[i] for i in self.moved]
        (mean, terms), grads = jax.value_and_grad(self._mean, has_aux=True)(floats, arrays)
        return dict(units=found, total=total, mean=mean, terms=terms, grads=grads)

    def look(self, arrays: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
        """The results as numpy arrays, and what `require` noted about the arguments."""
        noted.clear()
        with jax.debug_nans(False):
            found = jax.device_get(self.run(list(arrays)))
        jax.effects_barrier()
        return found, list(noted)

    def units(self, arrays: Sequence[Any]) -> np.ndarray:
        return _wide(self.look(arrays)[0]["units"].values)

    def report(self) -> Explanation:
        found, notes = self.look(self.arrays)
        values, weights = (_wide(x) for x in found["units"])
        values = np.where(weights == 0, 0, values * weights)
        gradients = {self.names[i]: g for i, g in zip(self.moved, found["grads"], strict=True)}
        problems = [*self._in_arguments(notes, values.ndim), *_not_finite("units", values)]
        for name, gradient in gradients.items():
            problems += _not_finite(f"gradient of {name}", _wide(gradient))
        largest = tuple(_largest(values, weights))
        places = [p.index for p in problems if p.argument == "units"] + [c.index for c in largest]
        return Explanation(
            name=self.name,
            units=values.shape,
            kept=int(np.sum(weights != 0)),
            weight=float(weights.sum()),
            total=float(found["total"]),
            mean=float(found["mean"]),
            problems=tuple(problems),
            largest=largest,
            terms=tuple(self._terms(found)),
            inputs=self._at(places[0], values.shape) if places else {},
            values=values,
            gradients=gradients,
        )

    def _at(self, index: Index, shape: Index) -> dict[str, Any]:
        """The part of each array that belongs to a unit, where the units are its first axes."""
        named = zip(self.names, self.arrays, strict=True)
        parts = {name: x for name, x in named if shape and np.shape(x)[: len(shape)] == shape}
        return {name: np.asarray(x)[index] for name, x in parts.items() if _is_plain(x)}

    def _terms(self, found: dict[str, Any]) -> Iterator[Term]:
        """The terms, by the gradients of their parts of the total, which composites then return."""
        if not found["terms"]:
            return
        floats = [jnp.asarray(self.arrays[i]) for i in self.moved]
        norms = {}
        with attributing(True):
            for name in found["terms"]:  # one by one: 0 times the infinite slope of another is NaN
                part = lambda floats, name=name: self._mean(floats, self.arrays)[1][name]
                norms[name] = _norm(jax.grad(part)(floats))
        whole = sum(n for n in norms.values() if np.isfinite(n))
        unknown = whole == 0 and _norm(found["grads"]) > 0
        for name, value in found["terms"].items():
            share = np.nan if unknown else norms[name] / (whole or 1.0)
            yield Term(name, float(value), norms[name], share)

    def _in_arguments(self, notes: list[Any], rank: int) -> Iterator[Problem]:
        finite = [_cleaned(x) if i in self.floats else x for i, x in enumerate(self.arrays)]
        for i in self.floats:
            wide = _wide(self.arrays[i])
            kinds = {"nan": np.isnan(wide), "inf": wide == np.inf, "-inf": wide == -np.inf}
            for kind, bad in kinds.items():
                yield from self._seen(i, kind, bad, finite)
        first = {(argument, expected): bad for argument, expected, bad in reversed(notes)}
        for (argument, expected), bad in reversed(first.items()):
            if bad.any():
                yield self._problem(argument, f"expected {expected}", bad)
        nonzero = [
            _filled(x, self._axis(x)) if i in self.positional and np.ndim(x) > rank else x
            for i, x in enumerate(finite)
        ]
        for i in self.positional:
            array, axis = self.arrays[i], self._axis(self.arrays[i])
            if nonzero[i] is not finite[i] and self._directs(i, nonzero):
                zero = np.all(_wide(array) == 0, axis=axis)
                yield from self._seen(i, "zero vector", zero, nonzero, axis)
        boxes = {argument for argument, expected in first if expected.startswith(CORNERS)}
        for i in self.floats:
            if self.names[i] in boxes:
                low, high = np.split(_wide(self.arrays[i]), 2, axis=-1)
                unit = np.resize(np.repeat([0, 1], low.shape[-1]), self.arrays[i].shape)
                others = _put(finite, [i], [unit.astype(self.arrays[i].dtype)])
                flat = np.any(low == high, axis=-1)
                yield from self._seen(i, "box without area", flat, others, -1)

    def _axis(self, array: Any) -> int:
        """Where the rows of an array lie."""
        fits = isinstance(self.axis, int) and -np.ndim(array) <= self.axis < np.ndim(array)
        return self.axis if fits else -1

    def _directs(self, i: int, arrays: Sequence[Any]) -> bool:
        """Whether only the directions of the rows of an argument count, neither length nor rank."""
        draw = np.random.default_rng(0).normal(size=arrays[i].shape)
        look = lambda x: self.units(_put(arrays, [i], [x.astype(arrays[i].dtype)]))
        one, twice, moved = look(draw), look(2 * draw), look(draw + 1)
        # Loosely: of 16-bit arguments too, and what is no direction is off by far more.
        same = lambda x: np.allclose(x, one, rtol=1e-3, atol=1e-3 * np.max(np.abs(one), initial=0))
        return bool(np.all(np.isfinite(one))) and same(twice) and not same(moved)

    def _seen(
        self, i: int, kind: str, bad: np.ndarray, fine: Sequence[Any], axis: int | None = None
    ) -> Iterator[Problem]:
        """Marked entries of an array, or its rows along `axis`, unless the loss does not see them.

        Those under `where` are hidden; so are those that, put back one by one among arrays in which
        all is well, change nothing.
        """
        array = self.arrays[i]
        wholly = lambda marks: marks if axis is None else np.expand_dims(marks, axis)
        hidden = self._hidden(array)
        bad = bad & ~(hidden if axis is None else np.all(hidden, axis=axis))
        if not bad.any():
            return
        base = self.look(fine)[0]

        def changes(marks: np.ndarray) -> bool:
            mixed = np.where(wholly(marks), array, fine[i]).astype(array.dtype)
            now = self.look(_put(fine, [i], [mixed]))[0]
            return any(
                not np.array_equal(_wide(a), _wide(b), equal_nan=True)
                for a, b in zip(*map(jax.tree.leaves, (now, base)), strict=True)
            )

        if np.all(np.isfinite(_wide(base["units"].values))):  # else nothing can be told
            places = np.argwhere(bad)[:MOST] if changes(bad) else []
            seen = bad if len(places) else np.zeros_like(bad)
            for place in places if len(places) > 1 else []:
                alone = np.zeros_like(bad)
                alone[tuple(place)] = True
                seen[tuple(place)] = changes(alone)
            bad = seen
        if bad.any():
            yield self._problem(self.names[i], kind, bad, axis)

    def _hidden(self, array: np.ndarray) -> np.ndarray:
        """What `where` hides of an array, if it covers its first axes."""
        hidden = np.zeros(array.shape, bool)
        rows = np.moveaxis(hidden, self._axis(array), -1) if array.ndim else hidden
        if self.where is not None:
            kept = np.asarray(self.where)
            for view in (hidden, rows):
                if kept.shape == view.shape[: kept.ndim]:
                    view[~kept] = True
                    break
        return hidden

    def _problem(
        self, argument: str, kind: str, bad: np.ndarray, axis: int | None = None
    ) -> Problem:
        """The first of the marked places, and what is there."""
        first = tuple(int(k) for k in np.argwhere(bad)[0])
        value = None
        if argument in self.names:
            array = self.arrays[self.names.index(argument)]
            array = array if axis is None else np.moveaxis(array, axis, -1)
            value = _item(array[first]) if np.shape(array)[: bad.ndim] == bad.shape else None
        return Problem(argument, kind, first, int(bad.sum()), value)


def _parameters(loss: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(loss).parameters)
    except (TypeError, ValueError):
        return []


def _names(args: Any, options: Any, parameters: Sequence[str]) -> tuple[list[str], set[int]]:
    """A name for each array, by parameter and path, and the places of those to differentiate in.

    These are the arrays of the first argument if it is a tree of them, else all positional ones.
    """
    names, first, positional = [], [], []
    for (side, key, *rest), leaf in jax.tree_util.tree_leaves_with_path((args, options)):
        if not hasattr(leaf, "__array__"):
            continue
        if side.idx == 0:
            positional.append(len(names))
            if key.idx == 0 and rest:
                first.append(len(names))
            known = key.idx < len(parameters)
            start = parameters[key.idx] if known else f"args[{key.idx}]"
        else:
            start = key.key
        inner = jax.tree_util.keystr(tuple(rest), simple=True, separator="/")
        names.append(f"{start}/{inner}" if inner else start)
    return names, set(first or positional)


def _inside() -> bool:
    return isinstance(jnp.zeros(()) + jnp.ones(()), Tracer)


def _plain(x: Any) -> Any:
    return np.asarray(x) if _is_plain(x) else x


def _is_plain(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jax.dtypes.extended)  # a key


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _put(arrays: Sequence[Any], places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    arrays = list(arrays)
    for i, x in zip(places, new, strict=True):
        arrays[i] = x
    return arrays


def _cleaned(array: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(_wide(array)), array, np.zeros((), array.dtype))


def _filled(array: np.ndarray, axis: int) -> np.ndarray:
    """The same array, or one in which rows of zeros are drawn at random."""
    zero = np.all(_wide(array) == 0, axis=axis, keepdims=True)
    if not zero.any() or array.shape[axis] < 2:
        return array
    draw = np.random.default_rng(1).normal(size=array.shape).astype(array.dtype)
    return np.where(zero, draw, array)


def _largest(values: np.ndarray, weights: np.ndarray) -> Iterator[Contribution]:
    """The units that weigh most, of those that are finite."""
    finite = np.where(np.isfinite(values), values, 0)
    sizes = np.abs(finite).ravel()
    counts = (np.isfinite(values) & (weights != 0)).ravel()
    whole = float(sizes.sum()) or 1.0
    for i in [i for i in np.argsort(-sizes, kind="stable") if counts[i]][:SHOWN]:
        index = tuple(int(k) for k in np.unravel_index(i, values.shape))
        yield Contribution(index, float(finite.ravel()[i]), float(sizes[i]) / whole)


def _not_finite(argument: str, array: np.ndarray) -> Iterator[Problem]:
    for kind, bad in (("nan", np.isnan(array)), ("inf", np.isinf(array))):
        if bad.any():
            index = tuple(int(k) for k in np.argwhere(bad)[0])
            yield Problem(argument, kind, index, int(bad.sum()), _item(array[index]))


def _item(value: Any) -> Any:
    return value if np.ndim(value) else value.item()


def _norm(tree: Any) -> float:
    return float(np.sqrt(sum(float(np.sum(_wide(x) ** 2)) for x in jax.tree.leaves(tree))))


def _show(value: Any) -> str:
    if value is None:
        return ""
    text = np.array2string(np.asarray(value), precision=4, threshold=6, edgeitems=2, separator=" ")
    text = " ".join(text.split())
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _place(index: Index) -> str:
    return "(" + ", ".join(map(str, index)) + ")"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of columns, the first to the left and the others to the right; none without rows."""
    if not rows:
        return []
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    line = lambda row: "  ".join(
        cell.rjust(width) if k else cell.ljust(width)
        for k, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return ["", *(line(row).rstrip() for row in cells)]
