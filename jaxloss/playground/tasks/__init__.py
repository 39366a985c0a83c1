"""Tasks, one per module, found by looking: a module here with a `TASK` is a task of its name."""

import importlib
import pkgutil

from ..task import Task

DEFAULT = ("digits", "diabetes")


def names() -> list[str]:
    """Names of all tasks, the default ones first."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return [*DEFAULT, *sorted(found.difference(DEFAULT))]


def find(name: str) -> Task:
    """The task of that name."""
    return importlib.import_module(f"{__name__}.{name}").TASK
