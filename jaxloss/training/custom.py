"""A user's own elementwise function under the contract of every loss in jaxloss."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax.numpy as jnp

from .._core.checks import check_float, check_same_shape, check_scalar, message, naming
from .._core.compiled import uncompiled
from .._core.numerics import widen
from .._core.reduce import mask, reduce

__all__ = ["make_loss", "masked"]

TAIL = {"where": None, "weights": None, "reduction": "mean"}


@uncompiled
def make_loss(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A loss out of an elementwise function, with masks, weights and every reduction.

    Garbage under the mask reaches neither value nor gradient, masking equals deleting, the mean
    divides by the sum of the weights, and the result is float32 or wider. `jaxloss.testing.
    check_loss` runs the laws on it.

    Args:
        fn: `(pred, target, **options) -> units`: arrays of one shape, given in float32 or wider,
            to an array of the same shape. Its parameters without a default are the arrays, by any
            names and of any number; those with a default become keyword-only options, scalars where
            the default is a number.

    Returns:
        A loss `(pred, target, *, where=None, weights=None, reduction="mean", **options)`, called as
        it stands: compile it with `jax.jit`, or as a part of a training step.

    Raises:
        TypeError: `fn` takes no array, or any number of them by `*args`.
        ValueError: An option of `fn` has the name of an option that all losses have.

    >>> @make_loss
    ... def quartic(pred, target, *, scale=1.0):
    ...     return ((pred - target) / scale) ** 4
    >>> pred, target = jnp.array([3.0, jnp.nan]), jnp.array([1.0, 1.0])
    >>> quartic(pred, target, scale=2.0, where=jnp.array([True, False]))
    Array(1., dtype=float32)
    """
    return masked(fn)


@uncompiled
def masked(fn: Callable[..., Any], *, fill: float = 0.0) -> Callable[..., Any]:
    """`make_loss` for a function that must not see 0 where an element is hidden.

    What `where` hides is replaced by `fill` in every array before `fn` is called, and costs nothing
    afterwards. At `fill` both `fn` and its derivatives have to be finite for the gradient of
    options that are learned, and for `jax.debug_nans`; the gradient of the arrays is 0 there
    anyway.

    Args:
        fn: As in `make_loss`.
        fill: What hidden elements are set to, such as 1 before a logarithm or a division.

    Returns:
        A loss, as from `make_loss`.

    Raises:
        TypeError: As in `make_loss`.
        ValueError: As in `make_loss`.

    >>> log_ratio = masked(lambda pred, target: jnp.log(pred / target) ** 2, fill=1.0)
    >>> log_ratio(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]), where=jnp.array([True, False]))
    Array(0., dtype=float32)
    """
    if not callable(fn):
        raise TypeError(message("fn", "a function of arrays of one shape", type(fn).__name__))
    check_scalar(fill=fill)
    signature, arrays = _signature(fn)
    is_number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
    numbers = [name for name, p in signature.parameters.items() if is_number(p.default)]

    @wraps(fn)
    def loss(*args: Any, **kwargs: Any) -> Any:
        with naming(loss.__name__):
            bound = signature.bind(*args, **kwargs)
            given = {name: bound.arguments[name] for name in arrays}
            tail = {name: bound.kwargs.get(name, TAIL[name]) for name in TAIL}
            options = {name: x for name, x in bound.kwargs.items() if name not in TAIL}
            first = arrays[0]
            check_float(**{first: given[first]})
            check_same_shape(**given)
            check_scalar(**{name: options[name] for name in numbers if name in options})
            wide = mask(tail["where"], *widen(*given.values()), fill=fill)
            units = fn(*wide, **options)
            what = f"{loss.__name__}({', '.join(arrays)})"
            check_float(**{what: units})
            if jnp.shape(units) != wide[0].shape:
                expected = f"shape {wide[0].shape}, as the arrays have"
                raise ValueError(message(what, expected, f"shape {jnp.shape(units)}"))
            return reduce(units, **tail)

    if loss.__name__ == "<lambda>":
        loss.__name__ = loss.__qualname__ = "custom_loss"
    loss.__dict__["__signature__"] = signature
    loss.__dict__["jitted"] = None
    return loss


def _signature(fn: Callable[..., Any]) -> tuple[inspect.Signature, list[str]]:
    """The signature of the loss that `fn` becomes, and the names of its arrays."""
    kinds = inspect.Parameter
    arrays: list[inspect.Parameter] = []
    options: list[inspect.Parameter] = []
    rest: list[inspect.Parameter] = []
    for parameter in inspect.signature(fn).parameters.values():
        if parameter.kind is kinds.VAR_POSITIONAL:
            expected = "a function with a parameter for each array"
            raise TypeError(message("fn", expected, f"*{parameter.name}"))
        if parameter.name in TAIL:
            expected = f"options other than {', '.join(TAIL)}"
            raise ValueError(message("fn", expected, parameter.name))
        if parameter.kind is kinds.VAR_KEYWORD:
            rest.append(parameter)
        elif parameter.kind is kinds.KEYWORD_ONLY or parameter.default is not kinds.empty:
            options.append(parameter.replace(kind=kinds.KEYWORD_ONLY))
        else:
            arrays.append(parameter.replace(kind=kinds.POSITIONAL_OR_KEYWORD))
    if not arrays:
        raise TypeError(message("fn", "a function of at least one array", "none"))
    tail = [kinds(name, kinds.KEYWORD_ONLY, default=default) for name, default in TAIL.items()]
    return inspect.Signature([*arrays, *options, *tail, *rest]), [a.name for a in arrays]
