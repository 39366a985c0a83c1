"""Names for the types that stand in public signatures."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Shaped

Where: TypeAlias = Bool[Array, "..."]
Values: TypeAlias = Shaped[Array, "..."]
Number: TypeAlias = float | Float[Array, ""]
Reduction: TypeAlias = Literal["mean", "sum", "none"] | Callable[[jax.Array, jax.Array], Any]
