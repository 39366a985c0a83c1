"""Eight host devices for the device law, quick compilation, and options that rewrite tables."""

import gc
import os
import sys
from importlib.metadata import version

import pytest

DONE = pytest.StashKey[int]()

FLAGS = ["--xla_force_host_platform_device_count=8"]
# Compiling is nearly all of what a test costs: unless FULL_OPTIMIZATION is set, it is done quickly.
# The laws ask for the usual optimisation themselves where it matters.
if not os.environ.get("FULL_OPTIMIZATION"):
    FLAGS += ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # gone from newer ones
        FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), *FLAGS])
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-readme", action="store_true", help="rewrite the README's tables")
    parser.addoption("--write-parity", action="store_true", help="rewrite tests/parity/README.md")


def pytest_configure(config: pytest.Config) -> None:
    """Collect garbage only between tests: tracing makes millions of objects, nearly all alive."""
    gc.disable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let a collection that a test asks for, as jax's leak check does, see its own objects only."""
    gc.freeze()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Forget compiled programs now and then: those of hundreds of laws would fill gigabytes."""
    done = item.config.stash.get(DONE, 0) + 1
    item.config.stash[DONE] = done
    if done % 60 == 0 and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.unfreeze()
        gc.collect()
