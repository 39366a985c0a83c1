"""A gradient for each example, for clipping and noise, influence, or gradient statistics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core.checks import message, naming
from .._core.compiled import uncompiled

__all__ = ["per_example_grads"]

Tree = Any


@uncompiled
def per_example_grads(
    fn: Callable[..., Any], *, chunk_size: int | None = None
) -> Callable[..., Tree]:
    r"""The gradients of the examples of a batch, each on its own.

    $$ g_i = \nabla_\theta f(\theta, x_i) $$

    For losses that do not couple examples: the mean of these gradients, weighted as the loss weighs
    its units, is then the gradient of the mean.

    Args:
        fn: `(params, *example) -> scalar` of one example, without its batch axis. An example that a
            mask hides has gradient 0.
        chunk_size: Examples that are differentiated at a time; it need not divide the batch. All at
            once without it.

    Returns:
        `g(params, *batch) -> grads` in the structure of params, with a leading axis for the
        examples; batch is pytrees whose arrays share their first axis. Fit for
        `optax.contrib.differentially_private_aggregate`. Memory: a gradient for each example, and
        the activations of a chunk.

    Raises:
        ValueError: `fn` does not return a scalar, or the arrays of the batch differ in length.

    Reference:
        Abadi et al., Deep Learning with Differential Privacy, CCS 2016.

    >>> fn = lambda params, x, y: (params * x - y) ** 2
    >>> per_example_grads(fn)(jnp.float32(1.0), jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0]))
    Array([2., 8.], dtype=float32)
    """
    is_integer = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and (not is_integer or chunk_size < 1):
        expected = "an integer of at least 1, or None"
        raise ValueError(message("chunk_size", expected, repr(chunk_size)))

    def grads(params: Tree, *batch: Tree) -> Tree:
        with naming("per_example_grads"):
            sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
            if len(sizes) != 1 or () in sizes:
                expected = "arrays with one leading axis"
                raise ValueError(message("batch", expected, f"sizes {sorted(sizes)}"))

            def value(params: Tree, example: Tree) -> Any:
                found = fn(params, *example)
                if jnp.shape(found) != ():
                    expected = "a scalar for one example"
                    raise ValueError(message("fn", expected, f"shape {jnp.shape(found)}"))
                return found

            one = lambda example: jax.grad(value)(params, example)
            ((count,),) = sizes
            if chunk_size is None or chunk_size >= count:
                return jax.vmap(one)(batch)
            return jax.lax.map(one, batch, batch_size=chunk_size)

    return grads
