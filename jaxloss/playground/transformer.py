"""A small causal transformer without dropout, as plain functions over trees of arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .task import Tree

HEADS = 4


def init_transformer(
    key: PRNGKeyArray, *, vocabulary: int, width: int, layers: int, length: int
) -> Tree:
    """Token and place embeddings, and for each layer attention and a hidden layer of 4 widths."""
    draw = lambda key, *shape: jax.random.normal(key, shape) * shape[0] ** -0.5
    embed, place, *keys = jax.random.split(key, 2 + layers)
    blocks = []
    for k in keys:
        mix, out, rise, fall = jax.random.split(k, 4)
        blocks.append(
            dict(
                mix=draw(mix, width, 3 * width),
                out=draw(out, width, width),
                rise=draw(rise, width, 4 * width),
                fall=draw(fall, 4 * width, width),
            )
        )
    scale = width**-0.5
    return dict(
        embed=scale * jax.random.normal(embed, (vocabulary, width)),
        place=scale * jax.random.normal(place, (length, width)),
        blocks=blocks,
    )


def apply_transformer(params: Tree, tokens: Int[Array, "n t"]) -> Float[Array, "n t d"]:
    """Hidden states from which the next token is told."""
    x = params["embed"][tokens] + params["place"]
    for block in params["blocks"]:
        x = x + _attend(_normalize(x) @ block["mix"]) @ block["out"]
        x = x + jax.nn.gelu(_normalize(x) @ block["rise"]) @ block["fall"]
    return _normalize(x)


def _attend(mixed: Float[Array, "n t e"]) -> Float[Array, "n t d"]:
    n, t, _ = mixed.shape
    query, key, value = jnp.split(mixed.reshape(n, t, HEADS, -1), 3, axis=-1)
    return jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(n, t, -1)


def _normalize(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Root mean square 1 (Zhang and Sennrich, 2019)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
