"""Eight host devices for the device law, quick compilation, and options that rewrite tables."""

import gc
import os
from functools import cache
from importlib.metadata import version

import pytest

FLAGS = ["--xla_force_host_platform_device_count=8"]
# Compiling is nearly all of what a test costs: unless FULL_OPTIMIZATION is set, it is done quickly.
if not os.environ.get("FULL_OPTIMIZATION"):
    FLAGS += ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # gone from newer ones
        FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *FLAGS])
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")  # no test reads a trace, thousands raise


import jax  # noqa: E402  (the environment comes first)
from jax._src.interpreters import mlir  # noqa: E402

COMPILED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-readme", action="store_true", help="rewrite the README's tables")
    parser.addoption("--write-parity", action="store_true", help="rewrite tests/parity/README.md")
    parser.addoption("--laws", help="the laws that test_laws.py runs, with commas")


def pytest_configure(config: pytest.Config) -> None:
    """Collect garbage only between tests: tracing makes millions of objects, nearly all alive.

    Lower programs in one MLIR context too: a fresh one takes longer to load than most to fill.
    """
    gc.disable()
    compiled = config.stash[COMPILED] = []

    def note(event: str, *_: object, **__: object) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    if hasattr(mlir, "make_ir_context"):  # private: some jax may be without it
        mlir.make_ir_context = cache(mlir.make_ir_context)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let a collection that a test asks for, as jax's leak check does, see its own objects only."""
    gc.freeze()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Forget compiled programs now and then: those of hundreds of laws would fill gigabytes."""
    compiled = item.config.stash[COMPILED]
    if len(compiled) > 1500:
        compiled.clear()
        jax.clear_caches()
        getattr(mlir.make_ir_context, "cache_clear", lambda: None)()
        gc.unfreeze()
        gc.collect()
