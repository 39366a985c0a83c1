"""Every example in a docstring is run, with `jax`, `jnp` and all of jaxloss at hand."""

import doctest
import importlib
import pkgutil
import re
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxloss

NAMES = ["jaxloss"] + [
    info.name
    for info in pkgutil.walk_packages(jaxloss.__path__, "jaxloss.")
    if "playground" not in info.name and "__main__" not in info.name
]
NUMBER = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")


class Rounding(doctest.OutputChecker):
    """Accepts another last digit of a float: it differs between processors."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if super().check_output(want, got, optionflags):
            return True
        numbers = [[float(x) for x in NUMBER.findall(text)] for text in (want, got)]
        same_text = NUMBER.sub("#", want).split() == NUMBER.sub("#", got).split()
        return same_text and np.allclose(*numbers, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings_print_what_they_say(name: str) -> None:
    module: ModuleType = importlib.import_module(name)
    at_hand = {**vars(jaxloss), "jaxloss": jaxloss, "jax": jax, "jnp": jnp, **vars(module)}
    runner = doctest.DocTestRunner(Rounding(), optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder().find(module, extraglobs=at_hand):
        runner.run(example)
    assert runner.summarize().failed == 0
