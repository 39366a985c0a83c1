"""The laws every loss keeps, as a public check: `check_loss(loss, case)`.

One compiled call evaluates a case on a stack of probes (clean, poisoned, permuted, extreme, ...),
one in float64 serves as the oracle, one holds all that is no accuracy check; each law then compares
plain numbers.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache, cached_property, partial
from typing import Any, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from . import criteria, losses, training
from ._core.case import (
    Case,
    Draw,
    draw_binary,
    draw_counts,
    draw_labels,
    draw_log_probs,
    draw_normal,
    draw_probs,
    draw_signs,
    draw_uniform,
    draw_unit,
)
from ._core.reduce import reduce
from ._core.reductions import across, sum_and_weight

__all__ = [
    "LAWS",
    "Case",
    "Draw",
    "all_cases",
    "broken_laws",
    "check_loss",
    "draw_binary",
    "draw_counts",
    "draw_labels",
    "draw_log_probs",
    "draw_normal",
    "draw_probs",
    "draw_signs",
    "draw_uniform",
    "draw_unit",
]

Arrays = dict[str, Any]
Law = Callable[["_Trial"], Iterator[str]]
EPS = float(np.finfo(np.float32).eps)
DELETED = (1, 3, 4, 6)  # examples that the masks of the probes hide
EMITTERS = "xla_cpu_use_fusion_emitters"  # slow to compile; newer jaxlib knows no other way


@cache
def _quickly() -> dict[str, Any]:
    """Compiler options for programs whose accuracy no law looks at."""
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    try:
        jax.jit(lambda: 0, compiler_options={EMITTERS: True}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return options
    return {**options, EMITTERS: False}


def all_cases() -> list[Case]:
    """The cases of every loss in jaxloss, found by looking into its modules."""
    found = [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for package in (losses, criteria, training)
        for info in pkgutil.iter_modules(package.__path__)
    ]
    return [case for module in found for case in getattr(module, "CASES", ())]


def check_loss(
    loss: Callable[..., Any], case: Case, *, laws: Collection[str] | None = None
) -> None:
    """Run every law on `loss`, or those named, with the arrays and configuration of `case`.

    A law named in `case.without` must really fail, or the opt-out is reported as needless. The
    device law runs where at least eight devices exist
    (`XLA_FLAGS=--xla_force_host_platform_device_count=8` on CPU).

    Args:
        loss: The function to check.
        case: How to call it.
        laws: Names from `LAWS`; all of them if left out.

    Raises:
        AssertionError: One line for each broken law, with what differed and by how much.

    >>> def cubic(pred, target, *, where=None, weights=None, reduction="mean"):
    ...     return jaxloss.reduce(
    ...         abs(pred - target) ** 3, where=where, weights=weights, reduction=reduction
    ...     )
    >>> case = Case(cubic, dict(pred=draw_normal("B C"), target=draw_normal("B C")))
    >>> check_loss(cubic, case)
    Traceback (most recent call last):
    AssertionError: cubic breaks 4 laws
      errors: ...
    """
    laws = LAWS if laws is None else laws
    broken = broken_laws(loss, case, laws=laws)
    lines = [f"  {law}: {why}" for law, why in broken.items() if law not in case.without]
    needless = [law for law in case.without if law in laws and law not in broken]
    lines += [f"  {law}: opted out of, yet it holds" for law in needless]
    lines += [
        f"  {law}: no such law"
        for law in {**case.without, **dict.fromkeys(laws)}
        if law not in LAWS
    ]
    if lines:
        raise AssertionError("\n".join([f"{case.name} breaks {len(lines)} laws", *lines]))


def broken_laws(
    loss: Callable[..., Any], case: Case, *, laws: Collection[str] | None = None
) -> dict[str, str]:
    """The laws that `loss` breaks on `case`, each with the first thing that went wrong."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        trial = _Trial(loss, case)
        broken = {}
        for name, law in LAWS.items():
            if laws is not None and name not in laws:
                continue
            complaints = law(trial)
            try:
                first = next(complaints, None)
            except Exception as error:  # a law that cannot even be evaluated is broken
                first = f"{type(error).__name__}: {error}"
            if first:
                broken[name] = first
        return broken


class _Trial:
    """One loss on one case: how to call it, the probes, and their compiled evaluations."""

    def __init__(self, loss: Callable[..., Any], case: Case) -> None:
        self.loss, self.case = loss, case
        # A loss with a state returns (loss, state).
        self.stateful = get_origin(inspect.signature(loss).return_annotation) is tuple
        self.arrays: Arrays = case.draw()
        self.floats = [
            name
            for name, draw in case.arrays.items()
            if draw.kind != "fixed" and self.arrays[name].dtype.kind == "f"
        ]
        first = next(iter(case.arrays))
        self.units = jax.eval_shape(partial(self.call, reduction="none"), self.arrays).shape
        self.positions = (
            case.positions.split() or case.arrays[first].dims.split()[: len(self.units)]
        )
        self.batch = self.size("B")
        self.per_example = bool(self.units) and self.units[0] == self.batch
        self.kept = [i for i in range(self.batch) if i not in DELETED]
        self.numbers = {k: v for k, v in case.config.items() if isinstance(v, float)}

    def size(self, axis: str) -> int:
        for name, draw in self.case.arrays.items():
            if axis in draw.dims.split():
                return int(self.arrays[name].shape[draw.dims.split().index(axis)])
        raise ValueError(f"{self.case.name}: no array has an axis {axis}")

    def call(self, arrays: Arrays, **options: Any) -> Any:
        ordered = [arrays[name] for name in self.case.arrays]  # jax sorts the keys of a dict
        ordered = [*self.case.functions.values(), *ordered]
        out = self.loss(*ordered, **{**self.case.config, **options})
        return out[0] if self.stateful else out

    def mean(self, floats: Arrays, arrays: Arrays, **options: Any) -> Any:
        return self.call({**arrays, **floats}, **options)

    def differentiable(self, arrays: Arrays) -> Arrays:
        return {name: arrays[name] for name in self.floats}

    def evaluate(self, arrays: Arrays, where: Any, weights: Any) -> dict[str, Any]:
        """What the laws look at, for one probe."""
        tail = dict(where=where, weights=weights, reduction=_every_part)
        of_floats = jax.value_and_grad(self.mean, has_aux=True)
        (mean, (none, pair)), grad = of_floats(self.differentiable(arrays), arrays, **tail)
        return dict(mean=mean, grad=grad, none=none, pair=pair)

    def along_batch(self, arrays: Arrays, index: Any) -> Arrays:
        """The arrays with `index` applied along their batch axis."""
        return {
            name: np.take(array, index, self.case.arrays[name].dims.split().index("B"))
            if "B" in self.case.arrays[name].dims.split()
            else array
            for name, array in arrays.items()
        }

    def shared_axis(self, name: str) -> int | None:
        """Axis along which another array must be of the same size: B, or else the first."""
        dims = self.case.arrays[name].dims.split()
        others = [set(d.dims.split()) for n, d in self.case.arrays.items() if n != name]
        axis = dims.index("B") if "B" in dims else 0
        return axis if dims and any(dims[axis] in other for other in others) else None

    def units_of(self, index: Any, units: Any) -> Any:
        """The units of some examples; along both axes where a unit is a pair of examples."""
        if not self.per_example:
            return units
        units = np.take(units, index, 0)
        pairs = self.case.coupled and self.units[1:] == (self.batch,)
        return np.take(units, index, 1) if pairs else units

    def map_real(self, change: Callable[[Any, int], Any]) -> Arrays:
        """The arrays with `change(array, position)` applied to those that may hold any number."""
        return {
            name: change(array, i).astype(array.dtype)
            if self.case.arrays[name].kind == "real"
            else array
            for i, (name, array) in enumerate(self.arrays.items())
        }

    def poisoned(self, where: Any, number: float, label: int) -> Arrays:
        """The arrays with garbage wherever `where` is False."""
        out = {}
        for name, array in self.arrays.items():
            dims = self.case.arrays[name].dims.split()
            if not set(self.positions) <= set(dims):
                out[name] = array
                continue
            order = sorted(range(len(self.positions)), key=lambda i: dims.index(self.positions[i]))
            kept = np.transpose(where, order)
            present = sorted(dims.index(p) for p in self.positions)
            shape = [array.shape[i] if i in present else 1 for i in range(array.ndim)]
            garbage = number if array.dtype.kind == "f" else label
            out[name] = np.where(kept.reshape(shape), array, np.asarray(garbage, array.dtype))
        return out

    def value_and_grad(self, arrays: Arrays, where: Any) -> Any:
        return jax.value_and_grad(self.mean)(self.differentiable(arrays), arrays, where=where)

    @cached_property
    def masks(self) -> dict[str, Any]:
        """Masks over the positions and weights over the units that the probes use."""
        shape = tuple(self.size(axis) for axis in self.positions)
        generator = np.random.default_rng(7)
        keep = generator.random(shape) < 0.7
        keep[(0,) * len(shape)], keep[(-1,) * len(shape)] = True, False
        deleted = np.ones(shape, bool)
        np.moveaxis(deleted, self.positions.index("B"), 0)[list(DELETED)] = False
        weights = generator.uniform(0.5, 2, self.units).astype(np.float32)
        return dict(all=np.ones(shape, bool), keep=keep, deleted=deleted, weights=weights)

    @cached_property
    def probes(self) -> dict[str, tuple[Arrays, Any, Any]]:
        """Variations of the case: name -> (arrays, where, weights)."""
        a, m = self.arrays, self.masks
        everything, keep = m["all"], m["keep"]
        ones, weights = np.ones(self.units, np.float32), m["weights"]
        twice = np.zeros_like(ones)
        if self.per_example:
            twice[self.kept[:-1]] = 1
            twice[self.kept[0]] = 2
        order = np.random.default_rng(3).permutation(self.batch)
        probes = {
            "clean": (a, everything, ones),
            "weighted": (a, everything, weights),
            "kept": (a, keep, ones),
            "masked": (a, keep, weights),
            "nan": (self.poisoned(keep, np.nan, 2**31 - 1), keep, weights),
            "inf": (self.poisoned(keep, np.inf, -1), keep, weights),
            "nothing": (self.poisoned(~everything, np.nan, -1), ~everything, weights),
            "deleted": (a, m["deleted"], ones),
            "twice": (a, everything, twice),
            "permuted": (self.along_batch(a, order), everything, ones),
            "hard": (self.map_real(lambda x, _: 20 * x), everything, ones),
            "zeros": (self.map_real(lambda x, _: 0 * x), everything, ones),
            "huge": (self.map_real(lambda x, _: np.full_like(x, 1e4)), everything, ones),
            "negative": (self.map_real(lambda x, _: np.full_like(x, -1e4)), everything, ones),
            "opposite": (self.map_real(lambda x, i: 0 * x + 1e4 * (-1) ** i), everything, ones),
            "saturated": (self.map_real(lambda x, _: 1e4 * np.sign(x)), everything, ones),
            "equal": (self.equal(), everything, ones),
        }
        for name, draw in self.case.arrays.items():
            for i, end in enumerate(draw.ends(a[name]) if draw.ends else ()):
                probes[f"end {i} of {name}"] = ({**a, name: end}, everything, ones)
        for dtype in HALF:
            probes[dtype] = (self.rounded(dtype), keep, weights)
        return probes

    def equal(self) -> Arrays:
        """The arrays with the second one set to the first where they are of one shape and kind."""
        (first, a), (second, b) = (*self.arrays.items(), *self.arrays.items())[:2]
        alike = a.shape == b.shape and a.dtype == b.dtype
        alike = alike and self.case.arrays[second].kind == self.case.arrays[first].kind
        return {**self.arrays, second: a} if alike else self.arrays

    def rounded(self, dtype: str) -> Arrays:
        return {
            n: a.astype(jnp.dtype(dtype)).astype(a.dtype) if a.dtype.kind == "f" else a
            for n, a in self.arrays.items()
        }

    @cached_property
    def probed(self) -> dict[str, Any]:
        """The probes in float32, compiled as everything else in this process is."""
        run = jax.jit(jax.vmap(self.evaluate))
        return _unstack(jax.device_get(run(*_stack(list(self.probes.values())))), self.probes)

    @cached_property
    def values(self) -> dict[str, Any]:
        """Everything else in float32, compiled quickly."""
        half, subset = np.arange(self.batch // 2), self.kept
        m, ones = self.masks, np.ones(self.units, np.float32)
        axis = self.positions.index("B")

        def part(index: Any, where: Any, weights: Any) -> tuple[Arrays, Any, Any]:
            arrays = self.along_batch(self.arrays, index)
            return arrays, np.take(where, index, axis), self.units_of(index, weights)

        smaller = {
            "subset": part(subset, m["all"], ones),
            "repeated": part([subset[0], *subset[:-1]], m["all"], ones),
            "earlier": part(half, m["keep"], m["weights"]),
            "later": part(half + len(half), m["keep"], m["weights"]),
        }
        named = _stack([self.probes[n] for n in NAMED])
        inputs = dict(
            named=named,
            small=_stack(list(smaller.values())),
            empty=part(half[:0], m["keep"], m["weights"]),
            half={d: {n: named[0][n].astype(d) for n in self.floats} for d in HALF},
            curved=_stack([self.probes[n][0] for n in ("clean", "equal", "zeros")]),
            direction=_directions(self.differentiable(self.arrays), np.float32),
            numbers={k: np.float32(v) for k, v in self.numbers.items()},
        )
        refused = None
        try:
            values = self.compiled(inputs)
        except Exception as error:
            if not self.numbers:
                raise
            refused, values = error, self.compiled({**inputs, "numbers": {}})
        for name in ("named", *HALF):
            values[name] = _unstack(values[name], NAMED)
        values["small"] = _unstack(values["small"], smaller)
        return {**values, "direction": inputs["direction"], "refused": refused}

    def compiled(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return jax.device_get(jax.jit(self.run, compiler_options=_quickly())(inputs))

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What no accuracy depends on; arrays are arguments, so that nothing is folded away."""

        def curve(carry: Any, arrays: Arrays) -> Any:
            of_numbers = lambda f, n: self.mean(f, arrays, **n)
            both = jax.value_and_grad(jax.checkpoint(of_numbers), (0, 1))
            floats = self.differentiable(arrays)
            of_floats = lambda f: both(f, inputs["numbers"])
            return carry, jax.jvp(of_floats, (floats,), (inputs["direction"],))

        def named(arrays: Arrays, where: Any, weights: Any) -> Any:
            by_name = partial(self.call, arrays, where=where, weights=weights)
            return {name: by_name(reduction=name) for name in ("none", "sum")}

        def half(floats: Arrays, arrays: Arrays, where: Any, weights: Any) -> Any:
            of_floats = jax.value_and_grad(self.mean)
            return of_floats(floats, arrays, where=where, weights=weights)

        _, (flat, (slope, (curvature, _))) = jax.lax.scan(curve, None, inputs["curved"])
        mean, (grad, by_number) = jax.tree.map(lambda x: x[0], flat)
        return dict(
            small=jax.vmap(self.evaluate)(*inputs["small"]),
            empty=self.evaluate(*inputs["empty"]),
            plain=dict(mean=mean, grad=grad, numbers=by_number),
            curve=(slope, curvature),
            named=jax.vmap(named)(*inputs["named"]),
            **{d: jax.vmap(half)(floats, *inputs["named"]) for d, floats in inputs["half"].items()},
        )

    @cached_property
    def oracle(self) -> dict[str, Any]:
        """The same loss in float64: values, gradients and differences for the accuracy laws."""
        with jax.enable_x64(True):
            wide = {name: _wide(self.probes[name][0]) for name in ("clean", "hard")}
            floats = self.differentiable(wide["clean"])
            direction = _directions(floats, np.float64)
            for sign, name in ((1, "ahead"), (-1, "behind")):
                moved = {n: floats[n] + sign * STEP * direction[n] for n in floats}
                wide[name] = {**wide["clean"], **moved}

            def point(arrays: Arrays, direction: Arrays) -> Any:
                mean = partial(self.mean, arrays=arrays)
                both = jax.value_and_grad(partial(mean, reduction=_every_part), has_aux=True)
                floats = self.differentiable(arrays)
                ((value, (none, _)), grad), (_, curve) = jax.jvp(both, (floats,), (direction,))
                slope = jax.jvp(mean, (floats,), (direction,))[1]
                return dict(mean=value, none=none, grad=grad, slope=slope, curve=curve)

            run = jax.jit(jax.vmap(point, (0, None)), compiler_options=_quickly())
            values = jax.device_get(run(_stack(list(wide.values())), direction))
        return dict(points=_unstack(values, wide), direction=direction)


def _every_part(values: Any, weights: Any) -> Any:
    """The mean, and beside it the units and the pair."""
    return reduce(values, weights=weights), (values, sum_and_weight(values, weights))


HALF = ("bfloat16", "float16")
NAMED = ("nan", "nothing")
STEP = 1e-6


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _unstack(tree: Any, names: Any) -> dict[str, Any]:
    return {n: jax.tree.map(lambda x, i=i: x[i], tree) for i, n in enumerate(names)}


def _wide(arrays: Arrays) -> Arrays:
    return {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in arrays.items()}


def _directions(arrays: Arrays, dtype: Any) -> Arrays:
    generator = np.random.default_rng(11)
    return {n: generator.uniform(-1, 1, a.shape).astype(dtype) for n, a in arrays.items()}


def _dot(a: Any, b: Any) -> float:
    return sum(float(np.sum(x * y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def _differs(what: str, got: Any, expected: Any, tolerance: float = 16 * EPS) -> Iterator[str]:
    """A complaint if two trees differ by more than `tolerance` times the largest value."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if x.shape != y.shape:
            yield f"{what}: shape {x.shape} against {y.shape}"
        elif x.size:
            scale = np.max(np.abs(y), initial=0, where=np.isfinite(y))
            near = np.abs(x - y) <= tolerance * scale
            if not np.all(near | (x == y) | (np.isnan(x) & np.isnan(y))):
                yield f"{what}: {_show(x)} against {_show(y)}"


def _show(x: Any) -> str:
    return np.array2string(np.asarray(x).ravel()[:4], precision=9, separator=", ")


def _same(what: str, got: Any, expected: Any) -> Iterator[str]:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if not np.array_equal(x, y, equal_nan=True):
            yield f"{what}: not bitwise the same: {_show(x)} against {_show(y)}"


def _infinite(what: str, tree: Any) -> Iterator[str]:
    for leaf in jax.tree.leaves(tree):
        if not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            yield f"{what}: not finite: {_show(leaf)}"


def _nonzero(what: str, tree: Any) -> Iterator[str]:
    for leaf in jax.tree.leaves(tree):
        if np.any(np.asarray(leaf) != 0):
            yield f"{what}: expected 0, got {_show(leaf)}"


def _abstract(t: _Trial) -> Iterator[str]:
    with jax.checking_leaks():
        out, _ = jax.eval_shape(t.value_and_grad, t.arrays, None)
    if out.shape != () or out.dtype != jnp.float32:
        yield f"expected a float32 scalar, got {out}"


def _signature(t: _Trial) -> Iterator[str]:
    parameters = inspect.signature(t.loss).parameters
    positional = [*t.case.functions, *t.case.arrays]
    for name, parameter in parameters.items():
        array = name in positional
        if array != (parameter.kind is parameter.POSITIONAL_OR_KEYWORD):
            yield f"{name}: arrays are positional, everything else is keyword-only"
        if array and parameter.default is not parameter.empty:
            yield f"{name}: an array has no default"
    tail = [name for name in parameters if name != "axis_name"][-3:]
    if tail != ["where", "weights", "reduction"]:
        yield f"the tail is where, weights, reduction; got {tail}"
    if list(parameters)[: len(positional)] != positional:
        yield "the arrays of the case are not in the order of the signature"


def _eager(t: _Trial) -> Iterator[str]:
    """A compiled loss is one program in every mode; others are run operation by operation."""
    mixed = [a if i % 2 else jnp.asarray(a) for i, a in enumerate(t.arrays.values())]
    eager = t.call(dict(zip(t.arrays, mixed, strict=True)), reduction="none")
    if not isinstance(eager, jax.Array) or eager.aval.weak_type:
        yield f"expected a strongly typed jax array, got {type(eager).__name__}"
    yield from _differs("eager against jit", eager, t.probed["clean"]["none"])
    if getattr(t.loss, "jitted", None) is None:
        with jax.disable_jit():
            slow = t.call(t.arrays, reduction="none")
        yield from _differs("without jit against jit", slow, t.probed["clean"]["none"])


def _vmap(t: _Trial) -> Iterator[str]:
    clean, plain = t.probed["clean"], t.values["plain"]
    yield from _differs("mean", clean["mean"], plain["mean"])
    for name in ("subset", "later"):
        yield from _infinite(name, t.values["small"][name]["mean"])


def _transforms(t: _Trial) -> Iterator[str]:
    grad, direction = t.probed["clean"]["grad"], t.values["direction"]
    yield from _differs("checkpoint in a scan", t.values["plain"]["grad"], grad)
    slope, slopes = _dot(grad, direction), t.values["curve"][0]
    size = _dot(*(jax.tree.map(np.abs, x) for x in (grad, direction)))
    if not abs(slope - slopes[0]) <= 16 * EPS * size:
        yield f"jvp {slopes[0]} against gradient {slope}"
    yield from _infinite("second derivative", t.values["curve"])


def _garbage(t: _Trial) -> Iterator[str]:
    probes, keep = t.probed, t.masks["keep"]
    for name in ("nan", "inf"):
        for part in ("none", "mean", "pair", "grad"):
            yield from _same(
                f"{part} with {name} under the mask", probes[name][part], probes["masked"][part]
            )
    hidden = t.poisoned(keep, np.nan, 0)
    for name in t.floats:
        under = np.isnan(hidden[name])
        yield from _nonzero(
            f"gradient of {name} under the mask", probes["nan"]["grad"][name][under]
        )


def _deleting(t: _Trial) -> Iterator[str]:
    masked, deleted = t.probed["deleted"], t.values["small"]["subset"]
    for part in ("mean", "pair"):
        yield from _differs(part, masked[part], deleted[part])
    for name in t.floats:
        part = t.along_batch({name: masked["grad"][name]}, t.kept)
        yield from _differs(f"gradient of {name}", part[name], deleted["grad"][name])


def _nothing(t: _Trial) -> Iterator[str]:
    for reduction, value in t.values["named"]["nothing"].items():
        yield from _nonzero(f"all hidden: {reduction!r}", value)
    for dtype in HALF:
        yield from _nonzero(f"all hidden: mean and gradient of {dtype}", t.values[dtype]["nothing"])
    for name, value in (
        ("all hidden", t.probed["nothing"]),
        ("no example", t.values["empty"]),
    ):
        if name == "no example" and not t.per_example:
            value = {k: value[k] for k in ("mean", "grad")}
        for part in value:
            yield from _nonzero(
                f"{name}: {part}", value[part].sum if part == "pair" else value[part]
            )


def _reducing(t: _Trial) -> Iterator[str]:
    keep, masked = t.masks["keep"], t.probed["masked"]
    named = t.values["named"]["nan"]
    yield from _differs("'none'", named["none"], masked["none"] * t.masks["weights"])
    yield from _differs("'sum'", named["sum"], masked["pair"].sum)
    for name, where in (("weighted", np.ones_like(keep)), ("masked", keep)):
        value = t.probed[name]
        yield from _differs("mean of the pair", np.asarray(value["pair"].mean()), value["mean"])
        if name == "masked" and keep.shape != t.units:
            continue  # which units are left, only the loss knows
        weights = t.masks["weights"] * (where if where.shape == t.units else 1)
        total = np.sum(value["none"] * weights, dtype=np.float64)
        yield from _differs("sum of the pair", value["pair"].sum, total)
        yield from _differs("mean", value["mean"], total / np.sum(weights, dtype=np.float64))
        yield from _differs("weight of the pair", value["pair"].weight, np.sum(weights))


def _microbatches(t: _Trial) -> Iterator[str]:
    whole = t.probed["masked"]
    parts = t.values["small"]["earlier"]["pair"] + t.values["small"]["later"]["pair"]
    yield from _differs("sum and weight", parts, whole["pair"])
    yield from _differs("mean", np.asarray(parts.mean()), whole["mean"])


def _weight_two(t: _Trial) -> Iterator[str]:
    if t.per_example:
        repeated = t.values["small"]["repeated"]
        yield from _differs("mean", t.probed["twice"]["mean"], repeated["mean"])


def _permutation(t: _Trial) -> Iterator[str]:
    order = np.random.default_rng(3).permutation(t.batch)
    clean, permuted = t.probed["clean"], t.probed["permuted"]
    yield from _differs("mean", permuted["mean"], clean["mean"])
    if t.per_example:
        yield from _differs("units", permuted["none"], t.units_of(order, clean["none"]))


def _at_target(t: _Trial) -> Iterator[str]:
    equal = t.probed["equal"]
    if t.case.zero_at_target:
        yield from _nonzero("value at the target", equal["none"])
    if t.case.zero_at_target or t.case.minimum:
        first = next(iter(t.case.arrays))
        if np.max(np.abs(equal["grad"][first])) > 16 * EPS:
            yield f"gradient at the target: {_show(equal['grad'][first])}"
        if np.any(t.probed["clean"]["mean"] < equal["mean"]):
            yield "the target is no minimum"


def _finite(t: _Trial) -> Iterator[str]:
    skipped = {"masked", "nan", "inf", "nothing", *HALF}
    for name, value in t.probed.items():
        if name not in skipped:
            for part in ("none", "mean", "grad"):
                yield from _infinite(f"{part} at {name}", value[part])


def _half(t: _Trial) -> Iterator[str]:
    for dtype in HALF:
        (value, grad), expected = t.values[dtype]["nan"], t.probed[dtype]
        if value.dtype != np.float32:
            yield f"{dtype}: expected a float32 result, got {value.dtype}"
        yield from _differs(f"{dtype} value", value, expected["mean"])
        for name in t.floats:
            if grad[name].dtype != jnp.dtype(dtype):
                yield f"gradient of {name}: expected {dtype}, got {grad[name].dtype}"
            eps = float(jnp.finfo(dtype).eps)
            yield from _differs(
                f"{dtype} gradient of {name}", grad[name], expected["grad"][name], eps
            )


def _double(t: _Trial) -> Iterator[str]:
    for part, leaf in jax.tree.leaves_with_path(t.oracle["points"]["clean"]):
        if np.asarray(leaf).dtype != np.float64:
            yield f"{jax.tree_util.keystr(part)} is {np.asarray(leaf).dtype}, expected float64"


def _accuracy(t: _Trial) -> Iterator[str]:
    """Value within four units, a unit being an ulp of the result and of what an input ulp moves."""
    for name in ("clean", "hard"):
        exact, got = t.oracle["points"][name], t.probed[name]
        units = exact["none"].size
        spread = np.zeros((t.batch,) if t.per_example and not t.case.coupled else ())
        for n in t.floats:
            moved = units * np.abs(exact["grad"][n]) * np.spacing(np.abs(t.probes[name][0][n]))
            axes = t.case.arrays[n].dims.split()
            if spread.ndim and "B" in axes:
                spread += np.moveaxis(moved, axes.index("B"), 0).reshape(t.batch, -1).sum(1)
            else:
                spread += moved.sum()
        ulps = np.spacing(np.abs(exact["none"]).astype(np.float32)).astype(np.float64)
        error = np.abs(got["none"] - exact["none"])
        spread = (
            spread.reshape(spread.shape + (1,) * (error.ndim - spread.ndim))
            if spread.ndim
            else spread
        )
        ratio = np.max(error / (ulps + spread), initial=0)
        if not ratio <= 4:
            values = f"{_show(got['none'])} against {_show(exact['none'])}"
            yield f"{name}: {ratio:.1f} units off: {values}"


def _gradient_accuracy(t: _Trial) -> Iterator[str]:
    for name in ("clean", "hard"):
        exact, got = t.oracle["points"][name]["grad"], t.probed[name]["grad"]
        for n in t.floats:
            largest = np.spacing(np.float32(np.max(np.abs(exact[n]), initial=0)))
            error = np.max(np.abs(got[n] - exact[n]), initial=0) / largest
            if not error <= 4:
                yield f"{name}, {n}: {error:.1f} ulps of the largest gradient off"


def _numerical(t: _Trial) -> Iterator[str]:
    points, direction = t.oracle["points"], t.oracle["direction"]
    ahead, behind = points["ahead"], points["behind"]
    clean = points["clean"]
    size = max(_dot(*(jax.tree.map(np.abs, x) for x in (clean["grad"], direction))), 1e-3)
    numeric = float(ahead["mean"] - behind["mean"]) / (2 * STEP)
    for mode, slope in (
        ("reverse", _dot(clean["grad"], direction)),
        ("forward", float(clean["slope"])),
    ):
        if not abs(slope - numeric) <= 1e-6 * size:
            yield f"{mode} {slope} against numerical {numeric}"
    numeric = jax.tree.map(lambda a, b: (a - b) / (2 * STEP), ahead["grad"], behind["grad"])
    scale = max(float(np.max(np.abs(x), initial=0)) for x in jax.tree.leaves(numeric)) or 1.0
    for n in t.floats:
        error = np.max(np.abs(clean["curve"][n] - numeric[n]), initial=0)
        if not error <= 1e-5 * max(scale, 1e-3):
            yield f"second order in {n}: {_show(clean['curve'][n])} against {_show(numeric[n])}"


def _numbers(t: _Trial) -> Iterator[str]:
    if not t.numbers:
        return
    if t.values["refused"] is not None:
        raise t.values["refused"]
    yield from _differs("traced numbers", t.values["plain"]["mean"], t.probed["clean"]["mean"])
    yield from _infinite("gradient of the numbers", t.values["plain"]["numbers"])
    jitted = getattr(t.loss, "jitted", None)
    if jitted is not None:
        t.call(t.arrays, reduction="none")
        before = jitted._cache_size()
        t.call(t.arrays, reduction="none", **{k: v * 1.25 for k, v in t.numbers.items()})
        if jitted._cache_size() != before:
            yield "a new Python number compiled again"


def _errors(t: _Trial) -> Iterator[str]:
    wrong: list[tuple[str, Arrays, dict[str, Any], type[Exception]]] = []
    for i, (name, array) in enumerate(t.arrays.items()):
        if len(t.arrays) > 1:
            wrong.append((f"{name} with a trailing axis", {name: array[..., None]}, {}, ValueError))
            axis = t.shared_axis(name)
            if axis is not None:
                cut = {name: np.take(array, [0], axis)}
                wrong.append((f"{name} cut to size one", cut, {}, ValueError))
        if array.dtype.kind == "f":
            wrong.append((f"complex {name}", {name: array.astype(complex)}, {}, TypeError))
        if i == 0:
            wrong.append((f"integer {name}", {name: np.ones(array.shape, int)}, {}, TypeError))
        wrong.append((f"{name} as a list", {name: [1.0]}, {}, TypeError))
    m = t.masks
    wrong += [
        ("where with a trailing axis", {}, dict(where=m["all"][..., None]), ValueError),
        ("where of one example", {}, dict(where=m["all"][:1]), ValueError),
        ("float where", {}, dict(where=m["all"].astype(np.float32)), TypeError),
        ("weights with a trailing axis", {}, dict(weights=m["weights"][..., None]), ValueError),
        ("complex weights", {}, dict(weights=m["weights"].astype(complex)), TypeError),
        ("unknown reduction", {}, dict(reduction="median"), ValueError),
        ("reduction that is no callable", {}, dict(reduction=3), TypeError),
    ]
    wrong += [
        (f"{k} of shape (2,)", {}, {k: np.ones(2, np.float32)}, ValueError) for k in t.numbers
    ]
    for what, change, options, error in wrong:
        try:
            jax.eval_shape(lambda a, o=options: t.call(a, **o), {**t.arrays, **change})
        except error as raised:
            if not str(raised).startswith(f"{t.loss.__name__}: "):
                yield f"{what}: the message does not begin with the loss: {raised}"
        except Exception as raised:
            yield f"{what}: expected {error.__name__}, got {type(raised).__name__}: {raised}"
        else:
            yield f"{what}: expected {error.__name__}, nothing was raised"


def _devices(t: _Trial) -> Iterator[str]:
    if jax.device_count() < t.batch:
        return
    spec = lambda dims: PartitionSpec(*["data" if d == "B" else None for d in dims])
    specs = {n: spec(draw.dims.split()) for n, draw in t.case.arrays.items()}
    where, mask_spec = t.masks["keep"], spec(t.positions)
    axis = {"axis_name": "data"} if "axis_name" in inspect.signature(t.loss).parameters else {}
    options = {**axis, "reduction": across("data")} if t.per_example else axis
    kept = t.probed["kept"]
    auto, explicit = (
        jax.make_mesh((t.batch,), ("data",), axis_types=(kind,))
        for kind in (AxisType.Auto, AxisType.Explicit)
    )
    local = jax.shard_map(
        lambda arrays, where: t.call(arrays, where=where, **options),
        mesh=auto,
        in_specs=(specs, mask_spec),
        out_specs=PartitionSpec(),
    )

    def mapped(arrays: Arrays, where: Any) -> Any:
        over = lambda floats: local({**arrays, **floats}, where)
        return jax.value_and_grad(over)(t.differentiable(arrays))

    modes = {"Auto mesh": t.value_and_grad, "shard_map": mapped}
    together = lambda *args: {mode: function(*args) for mode, function in modes.items()}
    for mesh, function in (
        (auto, together),
        (explicit, lambda *args: {"Explicit mesh": t.value_and_grad(*args)}),
    ):
        put = lambda x, s, mesh=mesh: jax.device_put(x, NamedSharding(mesh, s))
        arrays = {n: put(a, specs[n]) for n, a in t.arrays.items()}
        with jax.set_mesh(mesh):
            got = jax.jit(function, compiler_options=_quickly())(arrays, put(where, mask_spec))
        for mode, pair in jax.device_get(got).items():
            yield from _differs(mode, pair, (kept["mean"], kept["grad"]))


LAWS: Mapping[str, Law] = {
    "signature": _signature,
    "abstract": _abstract,
    "errors": _errors,
    "eager": _eager,
    "vmap": _vmap,
    "transforms": _transforms,
    "garbage": _garbage,
    "deleting": _deleting,
    "nothing": _nothing,
    "reducing": _reducing,
    "microbatches": _microbatches,
    "weight_two": _weight_two,
    "permutation": _permutation,
    "at_target": _at_target,
    "finite": _finite,
    "half": _half,
    "double": _double,
    "accuracy": _accuracy,
    "gradient_accuracy": _gradient_accuracy,
    "numerical": _numerical,
    "numbers": _numbers,
    "devices": _devices,
}
