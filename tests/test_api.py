"""Laws of names and signatures: what every public loss looks like."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

import jaxloss
from jaxloss import criteria, losses, training
from jaxloss.testing import Case, all_cases

FAMILIES = [
    importlib.import_module(f"{package.__name__}.{info.name}")
    for package in (losses, criteria, training)
    for info in pkgutil.iter_modules(package.__path__)
]
CASES = all_cases()
LOSSES = [
    (family, name)
    for family in FAMILIES
    for name in family.__all__
    if callable(getattr(family, name))
    and "reduction" in inspect.signature(getattr(family, name)).parameters
]
HELPERS = [
    (family, name)
    for family in FAMILIES
    for name in family.__all__
    if inspect.isfunction(getattr(family, name)) and (family, name) not in LOSSES
]
SOURCES = sorted(Path(jaxloss.__file__).parent.rglob("*.py"))
FLOORS = [
    path for path in SOURCES if path.parent.name in {"losses", "criteria", "training", "_core"}
]


def ids(value: Any) -> str:
    return value.__name__.split(".")[-1] if isinstance(value, ModuleType) else str(value)


@pytest.mark.parametrize("family", FAMILIES, ids=ids)
def test_a_family_lists_its_public_names_in_order_and_the_package_exports_them(
    family: ModuleType,
) -> None:
    assert list(family.__all__) == sorted(family.__all__)
    public = {
        name
        for name, value in vars(family).items()
        if inspect.isfunction(value) and value.__module__ == family.__name__ and name[0] != "_"
    }
    assert public <= set(family.__all__), f"{family.__file__}: add to __all__"
    for name in family.__all__:
        exported = getattr(jaxloss, name, None)
        assert exported is getattr(family, name), f"jaxloss/__init__.py does not export {name}"


def test_no_two_families_use_one_name() -> None:
    names = [name for family in FAMILIES for name in family.__all__]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("family", FAMILIES, ids=ids)
def test_every_loss_has_a_case(family: ModuleType) -> None:
    covered = {case.loss for case in getattr(family, "CASES", ())}
    missing = [name for f, name in LOSSES if f is family and getattr(f, name) not in covered]
    assert not missing, f"add a Case for each of {missing} to CASES in {family.__file__}"


def test_case_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


def test_every_opt_out_has_a_reason() -> None:
    for case in CASES:
        for law, reason in case.without.items():
            assert len(reason.split()) >= 3, f"{case.name}: say why {law} cannot hold"


@pytest.mark.parametrize(("family", "name"), LOSSES, ids=ids)
def test_the_signature_follows_the_contract(family: ModuleType, name: str) -> None:
    loss = getattr(family, name)
    parameters = inspect.signature(loss).parameters
    tail = ["where", "weights", "reduction"]
    tail += ["axis_name"] if "axis_name" in parameters else []
    assert list(parameters)[-len(tail) :] == tail
    for parameter in parameters.values():
        positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert positional or parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.annotation is not parameter.empty
        if positional:
            assert parameter.default is parameter.empty
    assert hasattr(loss, "jitted"), f"{name}: decorate it with @compiled()"


@pytest.mark.parametrize(("family", "name"), LOSSES, ids=ids)
def test_the_docstring_tells_formula_units_source_and_an_example(
    family: ModuleType, name: str
) -> None:
    doc = inspect.getdoc(getattr(family, name))
    assert doc is not None
    first = doc.splitlines()[0]
    assert first.endswith(".")
    assert len(first) <= 96
    for part in ("Args:", "Returns:", "Reference:", ">>> ", "see `jaxloss.reduce`"):
        assert part in doc, f"{name}: the docstring lacks {part!r}"
    assert re.search(r"One unit per [\w-]+|[Uu]nits? ", doc)
    assert re.search(r"\b(1[6-9]|20)\d\d\b", doc), f"{name}: the reference lacks a year"
    assert "$$" in doc, f"{name}: the docstring lacks a formula"
    parameters = inspect.signature(getattr(family, name)).parameters
    documented = re.findall(r"^ {4}(\w+)(?:, (\w+))?(?:, (\w+))?:", doc, re.MULTILINE)
    named = {word for match in documented for word in match if word}
    for parameter in parameters:
        if parameter not in ("where", "weights", "reduction"):
            assert parameter in named, f"{name}: Args lacks {parameter}"


@pytest.mark.parametrize(("family", "name"), HELPERS, ids=ids)
def test_what_is_no_loss_is_documented_with_an_example_too(family: ModuleType, name: str) -> None:
    function = getattr(family, name)
    doc = inspect.getdoc(function) or ""
    documented = re.findall(r"^ {4}(\w+)(?:, (\w+))?(?:, (\w+))?:", doc, re.MULTILINE)
    named = {word for match in documented for word in match if word}
    for parameter in inspect.signature(function).parameters:
        assert parameter in named, f"{name}: Args lacks {parameter}"
    for part in ("Returns:", ">>> "):
        assert part in doc, f"{name}: the docstring lacks {part!r}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_annotations_hold_on_every_case(case: Case) -> None:
    typed: Callable[..., Any] = jaxtyped(typechecker=beartype)(inspect.unwrap(case.loss))
    functions = case.functions.values()
    jax.eval_shape(lambda *a: typed(*functions, *a, **case.config), *case.draw().values())


@pytest.mark.parametrize("family", [f for f in FAMILIES if hasattr(f, "CASES")], ids=ids)
def test_every_case_can_be_exported(family: ModuleType) -> None:
    cases = {case.name: case for case in family.CASES}

    def call(arrays: dict[str, Any]) -> list[Any]:
        return [
            case.loss(*case.functions.values(), *arrays[name], **case.config)
            for name, case in cases.items()
        ]

    drawn = {name: tuple(case.draw().values()) for name, case in cases.items()}
    exported = jax.export.export(jax.jit(call))(drawn)
    made = exported.out_tree.unflatten(exported.out_avals)
    for name, out in zip(cases, made, strict=True):
        assert jax.tree.leaves(out)[0].shape == (), name


@pytest.mark.parametrize("path", FLOORS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_losses_touch_neither_files_nor_network_nor_other_processes(path: Path) -> None:
    banned_modules = {
        "pickle",
        "ctypes",
        "subprocess",
        "socket",
        "urllib",
        "os",
        "shutil",
        "requests",
    }
    banned_calls = {"eval", "exec", "open", "__import__", "compile"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & banned_modules
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in banned_modules
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in banned_calls


@pytest.mark.parametrize("family", FAMILIES, ids=ids)
def test_a_family_file_stays_small(family: ModuleType) -> None:
    functions = {getattr(family, name) for name in family.__all__}
    assert len(functions) <= 10, f"{family.__file__}: split it by topic"
    assert family.__file__ is not None
    assert len(Path(family.__file__).read_text().splitlines()) <= 600


def test_importing_is_light_and_touches_no_device() -> None:
    script = """
import sys, jax, optax
before = set(sys.modules)
config = dict(jax.config.values)
import jaxloss
from jax._src import xla_bridge
heavy = {"flax", "keras", "torch", "equinox", "matplotlib", "sklearn", "rich", "pytest", "scipy"}
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & heavy, new & heavy
assert not xla_bridge._backends, "a device was asked for"
assert dict(jax.config.values) == config, "the configuration was changed"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
