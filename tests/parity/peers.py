"""The harness of the parity tests: one `Row` compares one of our losses with one published peer.

Value and gradient are compared for several shapes and dtypes on fresh random arrays. The rows also
make the table in `README.md` beside this file.
"""

import importlib
import math
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.testing import Case, Draw

TABLE = Path(__file__).parent / "README.md"
SIZES: tuple[dict[str, int], ...] = ({}, {"B": 1, "C": 2, "T": 3}, {"B": 33, "C": 7, "T": 2})
DIFFERENCES: dict[tuple[str, str], float] = {}
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
NEED_TORCHVISION = ("torchvision", "segmentation_models_pytorch", "piq")
ON_TORCH = (
    "torch",
    "monai",
    "kornia",
    "focal_frequency_loss",
    "pytorch_metric_learning",
    "auraloss",
    *NEED_TORCHVISION,
)


@dataclass(frozen=True)
class Row:
    """One loss of ours against one peer.

    Attributes:
        peer: Dotted name of the peer, such as `"torch.nn.functional.mse_loss"`.
        ours: Takes the arrays of `draws` by name; returns a scalar or an array.
        theirs: The same with the peer's arrays (torch tensors, jax or numpy arrays).
        draws: How to draw the arrays.
        note: What differs in names, order, defaults or conventions, for the table.
        loss: Our public name.
        differentiate: Names of the arrays whose gradients are compared too; none for numpy peers.
        sizes: Shapes to try; in float64 the first one.
        dtypes: Dtypes to try.
        tolerance: Widened only with a reason in `note`, relative to the largest value.
    """

    loss: str
    peer: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    draws: Mapping[str, Draw]
    note: str = ""
    differentiate: tuple[str, ...] = ()
    sizes: tuple[dict[str, int], ...] = SIZES
    dtypes: tuple[str, ...] = ("float32", "float64")
    tolerance: Mapping[str, float] | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.peer}" + (f"-{self.label}" if self.label else "")


def require_peer(peer: str) -> Any:
    """Import the package of a peer: absent in CI is a failure, elsewhere a skip with a reason."""
    package = peer.split(".")[0]
    if package in NEED_TORCHVISION:
        _declare_torchvision_operators()
    if package == "rax":
        _give_back_wraps()
    if package == "rlax":
        _stand_in_for_distrax()
    if os.environ.get("CI"):
        with warnings.catch_warnings():  # of what it imports; importorskip passes over them too
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    return pytest.importorskip(package, reason=f"{package} is not installed: uv/pip group 'peers'")


@cache
def _declare_torchvision_operators() -> None:
    """Let torchvision be imported beside a CPU build of torch.

    Its wheel holds compiled operators for CUDA only; the losses and matchers compared here are
    plain Python, but the import asks for the names of two operators.
    """
    torch = importlib.import_module("torch")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with suppress(RuntimeError):  # a build for this machine has them
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)  # an operator lives as long as the library that declares it


_KEPT: list[Any] = []


def _give_back_wraps() -> None:
    """Let the transformations of rax run: they ask for `jax.util.wraps`, which newer jax lacks."""
    if not hasattr(jax, "util"):
        jax.util = SimpleNamespace(wraps=lambda function, **_: wraps(function))


class _Absent(ModuleType):
    """Stands for a module that is imported, and not needed by what is compared here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def _stand_in_for_distrax() -> None:
    """Let rlax be imported: TensorFlow Probability, which distrax needs, rejects recent jax."""
    if "rlax" not in sys.modules and "distrax" not in sys.modules:
        sys.modules["distrax"] = _Absent("distrax")
        with suppress(ImportError):  # then `require_peer` says what is missing
            importlib.import_module("rlax")
        del sys.modules["distrax"]


def peer(dotted: str) -> Callable[..., Any]:
    """The function of this name, imported when it is first called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return pkgutil.resolve_name(dotted)(*args, **kwargs)

    return call


def check(row: Row) -> None:
    """Compare value and gradient of a row on every shape and dtype."""
    require_peer(row.peer)
    run = _torch if row.peer.split(".")[0] in ON_TORCH else _numpy
    if row.peer.startswith(("optax", "keras", "jax", "rlax", "ott", "rax")):
        run = _jax
    if row.peer.startswith("scoringrules") and row.differentiate:  # it runs on jax too
        run = _jax
    tolerance = {**TOLERANCE, **(row.tolerance or {})}
    single = row.peer.startswith("keras")  # Keras casts what it is given to float32
    for dtype in ("float32",) if single else row.dtypes:
        for seed, sizes in enumerate(row.sizes if dtype == "float32" else row.sizes[:1]):
            arrays = Case(row.ours, row.draws).draw(seed, np.dtype(dtype), **sizes)
            with jax.enable_x64(dtype == "float64"):
                ours = _jax(row.ours, arrays, row.differentiate)
                theirs = run(row.theirs, arrays, row.differentiate)
            for part in ours:
                difference = _difference(ours[part], theirs[part], f"{row.name} {dtype} {part}")
                key = (row.name, dtype)
                DIFFERENCES[key] = max(DIFFERENCES.get(key, 0.0), difference)
                assert difference <= tolerance[dtype], (
                    f"{row.name}, {dtype}, {sizes}, {part}: differs by {difference:.2e}\n"
                    f"ours   {ours[part]}\ntheirs {theirs[part]}"
                )


def _difference(a: Any, b: Any, what: str) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, f"{what}: shape {a.shape} against {b.shape}"
    scale = np.max(np.abs(b), initial=0)
    return float(np.max(np.abs(a - b), initial=0) / (scale or 1))


def _jax(function: Callable[..., Any], arrays: dict[str, Any], names: tuple[str, ...]) -> Any:
    order = tuple(arrays)  # jax sorts the keys of a dict

    def both(arrays: dict[str, Any]) -> Any:
        def total(floats: dict[str, Any]) -> Any:
            mixed = {**arrays, **floats}
            value = function(**{name: mixed[name] for name in order})
            return jnp.sum(value), value

        floats = {name: arrays[name] for name in names}
        (_, value), gradients = jax.value_and_grad(total, has_aux=True)(floats)
        return {"value": value, **gradients}

    return jax.device_get(jax.jit(both)(arrays))


def _torch(function: Callable[..., Any], arrays: dict[str, Any], names: tuple[str, ...]) -> Any:
    import torch

    tensors = {
        name: torch.tensor(array, dtype=torch.int64 if array.dtype.kind in "iu" else None)
        for name, array in arrays.items()
    }
    for name in names:
        tensors[name].requires_grad_()
    value = function(**tensors)
    out = {"value": value.detach().numpy()}
    if names:
        gradients = torch.autograd.grad(value.sum(), [tensors[name] for name in names])
        out |= {n: g.numpy() for n, g in zip(names, gradients, strict=True)}
    return out


def _numpy(function: Callable[..., Any], arrays: dict[str, Any], names: tuple[str, ...]) -> Any:
    assert not names, "a numpy peer has no gradient"
    return {"value": function(**arrays)}


def write_table() -> None:
    """Write every measured row of this run into the published table."""
    from parity import rows

    lines = [
        "# Parity with other libraries",
        "",
        "Every row is a test in this folder: value and, where the peer has one, gradient, on",
        "random arrays of several shapes. The difference is the largest over all of them,",
        "relative to the largest entry, rounded up to a power of ten. Written by",
        "`pytest tests/parity --write-parity`.",
        "",
        "| there | here | convention | float32 | float64 |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows(), key=lambda r: (r.peer, r.loss, r.label)):
        found = [_bound(DIFFERENCES.get((row.name, dtype))) for dtype in ("float32", "float64")]
        here = f"`{row.loss}`" + (f" ({row.label})" if row.label else "")
        lines.append(f"| `{row.peer}` | {here} | {row.note} | {found[0]} | {found[1]} |")
    TABLE.write_text("\n".join(lines) + "\n")


def _bound(difference: float | None) -> str:
    if difference is None:
        return "-"
    return "0" if difference == 0 else f"1e{math.ceil(math.log10(difference))}"
