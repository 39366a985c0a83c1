"""Every example in a docstring is run, with `jax`, `jnp` and all of jaxloss at hand."""

import doctest
import importlib
import pkgutil
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

import jaxloss

NAMES = ["jaxloss"] + [
    info.name
    for info in pkgutil.walk_packages(jaxloss.__path__, "jaxloss.")
    if "playground" not in info.name and "__main__" not in info.name
]


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings_print_what_they_say(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    at_hand = {**vars(jaxloss), "jaxloss": jaxloss, "jax": jax, "jnp": jnp, **vars(module)}
    result = doctest.testmod(module, extraglobs=at_hand, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
