"""Objectives and losses in the form that optimisers and frameworks call."""

import importlib
from collections.abc import Callable, Mapping
from functools import cache, wraps
from types import FunctionType
from typing import Any

import jax.numpy as jnp

from .._core.checks import message, naming
from .._core.compiled import uncompiled
from .._core.reduce import reduce
from .._core.reductions import SumAndWeight

__all__ = ["as_keras", "as_value_fn"]


@uncompiled
def as_value_fn(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same objective with nothing but the scalar that is differentiated.

    For `optax.lbfgs` and line searches, which call a `value_fn` and hand it the keyword arguments
    that its signature names; the signature is kept.

    Args:
        fn: Returns `(total, terms)`, a `SumAndWeight`, or a scalar.

    Returns:
        A function of the same signature that returns the total, the mean of the pair, or the
        scalar.

    Raises:
        ValueError: What it returns is no scalar.

    >>> objective = lambda x: weighted_sum({"square": x**2, "linear": x}, weights={"linear": 0.5})
    >>> jax.value_and_grad(as_value_fn(objective))(jnp.float32(2.0))  # 4 + 1, and 4 + 0.5
    (Array(5., dtype=float32), Array(4.5, dtype=float32))
    """

    @wraps(fn)
    def value(*args: Any, **kwargs: Any) -> Any:
        found: Any = fn(*args, **kwargs)
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
            found, _ = found
        found = found.mean() if isinstance(found, SumAndWeight) else found
        with naming("as_value_fn"):
            if not hasattr(found, "shape") and not isinstance(found, (int, float)):
                expected = "a scalar, a SumAndWeight or (total, terms)"
                raise ValueError(message("fn", expected, type(found).__name__))
            if jnp.shape(found) != ():
                raise ValueError(message("fn", "a scalar", f"shape {jnp.shape(found)}"))
        return found

    return value


@uncompiled
def as_keras(
    loss: Callable[..., Any],
    *,
    integer_labels: bool = False,
    name: str | None = None,
    **options: Any,
) -> Any:
    """A loss as `keras.losses.Loss`, for `model.compile` of Keras 3 on JAX.

    Keras calls `(y_true, y_pred)` with a target in float32, weighs each unit by `sample_weight` and
    divides by the sum of the weights, as `weights=` does here. A saved model keeps the loss and its
    options; call `as_keras` once, with any loss, before `keras.models.load_model`. A loss of your
    own comes back if `keras.saving.register_keras_serializable` knows it.

    Args:
        loss: `(pred, target, **options)` with units along the batch.
        integer_labels: Whether targets are class labels: a last axis of size 1 is dropped and they
            become integers, exact below 2^24. A label with a fraction makes its unit NaN.
        name: Shown by Keras; the name of the loss without it.
        options: Passed to `loss`, but for `where`, `weights` and `reduction`.

    Returns:
        A `keras.losses.Loss`.

    Raises:
        ImportError: Keras is not installed.
        ValueError: Keras runs on another backend, or, when called, the units of the loss have no
            batch axis.

    >>> import os, importlib.util
    >>> if importlib.util.find_spec("keras") and os.environ.get("KERAS_BACKEND") == "jax":
    ...     loss = as_keras(softmax_cross_entropy, integer_labels=True)
    ...     assert loss.name == "softmax_cross_entropy"
    """
    taken = sorted({"where", "weights", "reduction"} & set(options))
    if taken:
        raise ValueError(message("options", "sample_weight of Keras in its place", taken[0]))
    keras = importlib.import_module("keras")
    if keras.backend.backend() != "jax":
        raise ValueError(message("keras", "its backend jax", keras.backend.backend()))
    title = getattr(loss, "__name__", type(loss).__name__) if name is None else name
    return _keras_class()(loss, title, integer_labels, options)


@cache
def _keras_class() -> Any:
    """The class that Keras sees, made and registered once, since Keras is no dependency."""
    keras = importlib.import_module("keras")
    public = importlib.import_module("jaxloss")

    @keras.saving.register_keras_serializable(package="jaxloss")
    class Loss(keras.losses.Loss):
        """A loss of jaxloss under the protocol of Keras."""

        def __init__(
            self, loss: Callable[..., Any], name: str, integer_labels: bool, options: dict[str, Any]
        ) -> None:
            super().__init__(name=name, reduction="mean_with_sample_weight")
            self.loss, self.integer_labels, self.options = loss, integer_labels, options

        def call(self, y_true: Any, y_pred: Any) -> Any:
            target = _labels(y_true, y_pred) if self.integer_labels else y_true
            units = self.loss(y_pred, target, reduction="none", **self.options)
            if jnp.shape(units)[:1] != jnp.shape(y_pred)[:1] or not jnp.ndim(units):
                with naming("as_keras"):
                    expected = f"units along a batch of {jnp.shape(y_pred)[0]}"
                    raise ValueError(message(self.name, expected, f"shape {jnp.shape(units)}"))
            return units

        def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            # Keras divides by the sum of the weights as they come; here every unit has its own,
            # also where an example has several.
            masked = getattr(y_pred, "_keras_mask", None)
            convert = lambda y: keras.ops.convert_to_tensor(y, dtype=self.dtype)
            y_true, y_pred = keras.tree.map_structure(convert, (y_true, y_pred))
            units = self.call(y_true, y_pred)
            where = None if masked is None else _spread(masked, units.shape)
            weights = None if sample_weight is None else _spread(sample_weight, units.shape)
            return reduce(units, where=where, weights=weights)

        def get_config(self) -> dict[str, Any]:
            known = getattr(self.loss, "__name__", "")
            found: Any = known if getattr(public, known, None) is self.loss else None
            if found is None and isinstance(self.loss, FunctionType):
                found = keras.saving.serialize_keras_object(self.loss)
            return {
                "loss": found,
                "name": self.name,
                "integer_labels": self.integer_labels,
                "options": keras.saving.serialize_keras_object(self.options),
            }

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            loss, options = config["loss"], config["options"]
            if loss is None:
                with naming("as_keras"):
                    expected = "a function, or load_model(..., compile=False)"
                    raise ValueError(message(config["name"], expected, "another callable"))
            if isinstance(loss, str):
                loss = getattr(public, loss)
            else:
                loss = keras.saving.deserialize_keras_object(loss)
            options = keras.saving.deserialize_keras_object(options)
            return cls(loss, config["name"], config["integer_labels"], options)

    return Loss


def _spread(weight: Any, shape: tuple[int, ...]) -> Any:
    """A weight, or a mask, of each unit out of those of the examples, or of their parts."""
    weight = jnp.asarray(weight)
    while weight.ndim > len(shape) and weight.shape[-1] == 1:
        weight = weight[..., 0]
    weight = weight.reshape(weight.shape + (1,) * (len(shape) - weight.ndim))
    return jnp.broadcast_to(weight, shape)


def _labels(y_true: Any, y_pred: Any) -> Any:
    """Integer labels out of floats; what is no integer becomes a label of no class."""
    if jnp.ndim(y_true) == jnp.ndim(y_pred) and jnp.shape(y_true)[-1] == 1:
        y_true = y_true[..., 0]
    y_true = jnp.asarray(y_true)
    whole = (y_true == jnp.round(y_true)) & (jnp.abs(y_true) < 2**24)
    return jnp.where(whole, y_true, -(2**31)).astype(jnp.int32)
