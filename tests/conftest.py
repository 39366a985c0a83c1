"""Eight host devices for the device law, and the options that rewrite published tables."""

import os
import sys

import pytest

DONE = pytest.StashKey[int]()

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-readme", action="store_true", help="rewrite the README's tables")
    parser.addoption("--write-parity", action="store_true", help="rewrite tests/parity/README.md")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Forget compiled programs now and then: those of hundreds of laws would fill gigabytes."""
    done = item.config.stash.get(DONE, 0) + 1
    item.config.stash[DONE] = done
    if done % 60 == 0 and "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
