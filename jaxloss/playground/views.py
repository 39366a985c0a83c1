"""Two distorted views of each small image, and a network that embeds, predicts and assigns them."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, PRNGKeyArray

from .task import Examples, Tree, apply_mlp, init_mlp

FEATURES, PROJECTED, ASSIGNED = 64, 32, 30  # widths of features and projections; prototypes


def distort(key: PRNGKeyArray, image: Float[Array, " 64"]) -> Float[Array, " 64"]:
    """Turned, scaled, moved, of another contrast, with noise."""
    turn, size, move, contrast, noise = jax.random.split(key, 5)
    angle = jax.random.uniform(turn, minval=-0.35, maxval=0.35)
    scale = jax.random.uniform(size, minval=0.8, maxval=1.25)
    grid = jnp.mgrid[:8, :8].reshape(2, 64) - 3.5
    matrix = scale * jnp.array(
        [[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]
    )
    at = matrix @ grid + 3.5 + jax.random.uniform(move, (2, 1), minval=-1, maxval=1)
    view = map_coordinates(image.reshape(8, 8), list(at), order=1)
    view = view * jax.random.uniform(contrast, minval=0.6, maxval=1.4)
    return view + 0.1 * jax.random.normal(noise, (64,))


@jax.jit
def distort_all(key: PRNGKeyArray, images: Float[Array, "n 64"]) -> Float[Array, "n 64"]:
    """Every image, each in its own way."""
    return jax.vmap(distort)(jax.random.split(key, len(images)), images)


def distorted(key: PRNGKeyArray, examples: Examples) -> Examples:
    """The same examples with every image distorted."""
    return examples._replace(inputs=distort_all(key, examples.inputs))


def two_views(key: PRNGKeyArray, examples: Examples) -> Examples:
    """Every image twice, `(n, 2, 64)`, each time distorted at random."""
    views = [distort_all(k, examples.inputs) for k in jax.random.split(key)]
    return examples._replace(inputs=jnp.stack(views, axis=1))


def init(key: PRNGKeyArray) -> Tree:
    """Encoder, projector, predictor (for SimSiam) and prototypes (for SwAV)."""
    sizes = dict(
        encoder=(64, 128, FEATURES),
        projector=(FEATURES, 64, PROJECTED),
        predictor=(PROJECTED, 64, PROJECTED),
        prototypes=(PROJECTED, ASSIGNED),
    )
    keys = jax.random.split(key, len(sizes))
    return {name: init_mlp(k, s) for k, (name, s) in zip(keys, sizes.items(), strict=True)}


def features(params: Tree, images: Float[Array, "*batch 64"]) -> Array:
    """What is kept after pre-training, and what the probe looks at."""
    return jax.nn.relu(apply_mlp(params["encoder"], images))


def apply(params: Tree, views: Float[Array, "n 2 64"]) -> Tree:
    """Projection, prediction and scores of both views, views first."""
    projected = _standardised(apply_mlp(params["projector"], features(params, views)))
    unit = projected / jnp.linalg.norm(projected, axis=-1, keepdims=True)
    [(prototypes, _)] = params["prototypes"]
    out = dict(
        projected=projected,
        predicted=apply_mlp(params["predictor"], projected),
        scores=unit @ (prototypes / jnp.linalg.norm(prototypes, axis=0)),
    )
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), out)


def _standardised(x: Array) -> Array:
    """Batch normalisation without parameters."""
    mean = jnp.mean(x, axis=(0, 1))
    return (x - mean) * jax.lax.rsqrt(jnp.mean((x - mean) ** 2, axis=(0, 1)) + 1e-4)
