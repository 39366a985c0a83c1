"""Generative losses against torch, Keras, optax and ott."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses import (
    diffusion,
    flow_matching,
    gan,
    gan_penalties,
    gan_variants,
    score_matching,
    variational,
)
from jaxloss.testing import Draw, draw_labels, draw_normal, draw_uniform, draw_unit
from parity.peers import Row, check, peer, require_peer

F = "torch.nn.functional"
BOTH = dict(real_logits=draw_normal("B T", scale=3), fake_logits=draw_normal("B T", scale=3))
FAKE = dict(fake_logits=draw_normal("B T", scale=3))
PAIR = dict(pred=draw_normal("B T C"), target=draw_normal("B T C"))
CRITIC = dict(w=draw_normal("C D", scale=0.7))
REAL = dict(real=draw_normal("B C"), **CRITIC)
KEY = np.array([0, 7], np.uint32)
SMALL = ({}, {"B": 1, "C": 3, "D": 2}, {"B": 17, "C": 2, "D": 5})


def row(
    loss: Any, name: str, ours: Any, theirs: Any, draws: dict[str, Draw], **options: Any
) -> Row:
    """`ours(loss, *arrays)` against `theirs(peer, *arrays)`, differentiated in all floats."""
    floats = tuple(n for n, draw in draws.items() if draw.kind != "fixed")
    return Row(
        loss=loss.__name__,
        peer=name,
        ours=lambda **arrays: ours(loss, *arrays.values()),
        theirs=lambda **arrays: theirs(peer(name), *arrays.values()),
        draws=draws,
        **{"differentiate": floats, **options},
    )


def units(loss: Any, *arrays: Any, **options: Any) -> Any:
    return loss(*arrays, reduction="none", **options)


def cross_entropy(f: Any, logits: Any, target: float) -> Any:
    return f(logits, logits.detach() * 0 + target, reduction="none")


def torch_model(w: Any) -> Any:
    """The critic, score and generator of the rows with a function, for torch."""
    return lambda x: (x @ w).tanh() @ w.T


def jax_model(w: Any) -> Any:
    return lambda x: jnp.tanh(jnp.dot(x, w, precision="highest")) @ w.T


def drawn(sampler: Any, like: Any, key: Any = KEY) -> Any:
    """What a loss draws for these samples, as a tensor."""
    import torch

    return torch.tensor(np.array(sampler(key, like.shape, np.float32))).to(like.dtype)


def slope(grad: Any, x: Any, w: Any) -> Any:
    """Length of the gradient of each score in its sample, itself differentiable."""
    if not x.requires_grad:
        x = x.requires_grad_()
    (found,) = grad(torch_model(w)(x).sum(), x, create_graph=True)
    return found


def between(grad: Any, real: Any, fake: Any, w: Any) -> Any:
    u = drawn(jax.random.uniform, real[:, 0])[:, None]
    length = (slope(grad, real + u * (fake - real), w).square().sum(1) + 1e-10).sqrt()
    return (length / 1.5 - 1) ** 2


def around(grad: Any, real: Any, w: Any) -> Any:
    along, across = jax.random.split(KEY)
    noise = drawn(jax.random.uniform, real, across) * 0.7 * real.std(correction=0)
    u = drawn(jax.random.uniform, real[:, 0], along)[:, None]
    return ((slope(grad, real + u * noise, w).square().sum(1) + 1e-10).sqrt() - 1) ** 2


def paths(grad: Any, latents: Any, w: Any) -> Any:
    """StyleGAN2's penalty; images of two pixels."""
    images = torch_model(w)(latents).unflatten(1, (2, -1))
    noise = drawn(jax.random.normal, images) / 2**0.5
    (pulled,) = grad((images * noise).sum(), latents, create_graph=True)
    lengths = pulled.square().sum(1).sqrt()
    mean = 0.4 + 0.3 * (lengths.mean() - 0.4)
    return (lengths - mean) ** 2


def path_units(loss: Any, latents: Any, w: Any) -> Any:
    generator = lambda z: jax_model(w)(z).reshape(z.shape[0], 2, -1)
    state = jnp.asarray(0.4, latents.dtype)
    return loss(generator, latents, state, key=KEY, decay=0.3, reduction="none")[0]


def traces(jacrev: Any, x: Any, w: Any) -> Any:
    """Trace and square from the whole Jacobian of each sample."""
    import torch

    score = torch_model(w)
    each = torch.func.vmap(lambda x: jacrev(score)(x).trace())
    return each(x) + 0.5 * score(x).square().sum(1)


def projections(jvp: Any, x: Any, w: Any) -> Any:
    import torch

    drawn = jax.random.bernoulli(KEY, np.float32(0.5), x.shape)
    v = torch.tensor(2.0 * np.array(drawn) - 1).to(x.dtype)
    s, moved = jvp(torch_model(w), x, v, create_graph=True)
    return (v * moved).sum(1) + 0.5 * (v * s).sum(1) ** 2


def bound(normal: Any, mean: Any, log_std: Any, x: Any) -> Any:
    """KL and log-likelihood from torch's distributions, at the mean of the posterior."""
    import torch

    posterior = normal(mean, log_std.exp())
    prior = torch.distributions.Normal(0 * mean, 1 + 0 * mean)
    kl = torch.distributions.kl_divergence(posterior, prior).sum(1)
    nll = -torch.distributions.Normal(mean, 0.5).log_prob(x).sum(1)
    return nll + 0.3 * kl


def our_bound(loss: Any, mean: Any, log_std: Any, x: Any) -> Any:
    kl = 0.5 * jnp.sum(mean**2 + jnp.expm1(2 * log_std) - 2 * log_std, axis=1)
    nll = jnp.sum(2 * (x - mean) ** 2 + 0.5 * np.log(2 * np.pi * 0.25), axis=1)
    return units(loss, nll, kl, beta=0.3)[0]


def commitment(mse: Any, encoded: Any, quantized: Any) -> Any:
    parts = (
        mse(encoded.detach(), quantized, reduction="none"),
        mse(encoded, quantized.detach(), reduction="none"),
    )
    return (parts[0] + 0.4 * parts[1]).mean(-1)


def masked_tokens(entropy: Any, logits: Any, tokens: Any, alpha: Any) -> Any:
    """MDLM's cost of masked tokens; the last class is the mask."""
    costs = entropy(logits[..., :-1].transpose(1, 2), tokens, reduction="none").sum(1)
    return 0.7 / (1 - alpha) * costs


ROWS = (
    row(
        gan.nonsaturating_generator_loss,
        f"{F}.binary_cross_entropy_with_logits",
        units,
        lambda f, fake: cross_entropy(f, fake, 1.0),
        FAKE,
        note="with targets 1",
    ),
    row(
        gan.nonsaturating_generator_loss,
        "optax.sigmoid_binary_cross_entropy",
        units,
        lambda f, fake: f(fake, jnp.ones_like(fake)),
        FAKE,
        note="with targets 1",
    ),
    row(
        gan.minimax_generator_loss,
        f"{F}.binary_cross_entropy_with_logits",
        units,
        lambda f, fake: -cross_entropy(f, fake, 0.0),
        FAKE,
        note="minus it, with targets 0",
    ),
    row(
        gan.gan_discriminator_loss,
        f"{F}.binary_cross_entropy_with_logits",
        units,
        lambda f, real, fake: cross_entropy(f, real, 1.0) + cross_entropy(f, fake, 0.0),
        BOTH,
    ),
    row(
        gan.gan_discriminator_loss,
        f"{F}.binary_cross_entropy_with_logits",
        lambda loss, *arrays: units(loss, *arrays, label_smoothing=0.1),
        lambda f, real, fake: cross_entropy(f, real, 0.9) + cross_entropy(f, fake, 0.0),
        BOTH,
        label="smoothed",
        note="with targets 0.9 and 0",
    ),
    row(
        gan.gan_discriminator_loss,
        "keras.losses.BinaryCrossentropy",
        lambda loss, *arrays: loss(*arrays, label_smoothing=0.125),
        lambda f, real, fake: (
            f(from_logits=True, label_smoothing=0.25)(jnp.ones_like(real), real)
            + f(from_logits=True)(jnp.zeros_like(fake), fake)
        ),
        BOTH,
        label="smoothed towards 1/2",
        note="`label_smoothing` of the real samples is twice that here, as in TF-GAN",
    ),
    row(
        gan.gan_hinge_discriminator_loss,
        f"{F}.relu",
        units,
        lambda f, real, fake: f(1 - real) + f(1 + fake),
        BOTH,
    ),
    row(
        gan_variants.least_squares_generator_loss,
        f"{F}.mse_loss",
        units,
        lambda f, fake: 0.5 * f(fake, fake.detach() * 0 + 1, reduction="none"),
        FAKE,
        note="half of it",
    ),
    row(
        gan_variants.least_squares_discriminator_loss,
        f"{F}.mse_loss",
        lambda loss, *arrays: loss(*arrays, fake_label=-1.0),
        lambda f, real, fake: (
            0.5 * (f(real, real.detach() * 0 + 1) + f(fake, fake.detach() * 0 - 1))
        ),
        BOTH,
        note="half the sum of two",
    ),
    row(
        gan_variants.relativistic_generator_loss,
        f"{F}.softplus",
        units,
        lambda f, real, fake: f(real - fake),
        BOTH,
        tolerance={"float64": 1e-8},
        note="torch is linear above 20, off by 2e-9 there",
    ),
    row(
        gan_variants.relativistic_discriminator_loss,
        "jax.nn.softplus",
        units,
        lambda f, real, fake: f(fake - real),
        BOTH,
    ),
    row(
        gan_variants.cycle_consistency_loss,
        f"{F}.l1_loss",
        units,
        lambda f, pred, target: f(pred, target, reduction="none").mean((1, 2)),
        PAIR,
        note="mean of each sample",
    ),
    row(
        gan_variants.feature_matching_loss,
        f"{F}.l1_loss",
        lambda loss, a, b: loss([a, a[..., 0]], [b, b[..., 0]]),
        lambda f, a, b: (f(a, b) + f(a[..., 0], b[..., 0])) / 2,
        PAIR,
        differentiate=("pred",),
        note="mean over layers",
    ),
    row(
        gan_penalties.gradient_penalty,
        "torch.autograd.grad",
        lambda loss, real, fake, w: units(
            partial(loss, jax_model(w), key=KEY, target=1.5), real, fake
        ),
        between,
        dict(real=draw_normal("B C"), fake=draw_normal("B C"), **CRITIC),
        sizes=SMALL,
        note="of the critic with `create_graph`, at the same points",
    ),
    row(
        gan_penalties.r1_penalty,
        "torch.autograd.grad",
        lambda loss, real, w: units(partial(loss, jax_model(w)), real),
        lambda grad, real, w: 0.5 * slope(grad, real, w).square().sum(1),
        REAL,
        sizes=SMALL,
        note="half its square, with `create_graph`",
    ),
    row(
        gan_penalties.dragan_penalty,
        "torch.autograd.grad",
        lambda loss, real, w: units(partial(loss, jax_model(w), key=KEY, scale=0.7), real),
        around,
        REAL,
        sizes=SMALL[::2],
        note="of the critic with `create_graph`, at the same points",
    ),
    row(
        gan_penalties.path_length_penalty,
        "torch.autograd.grad",
        path_units,
        paths,
        dict(latents=draw_normal("B C"), **CRITIC),
        sizes=({}, {"B": 5, "C": 2, "D": 3}),
        note="StyleGAN2's code on the same noise",
    ),
    row(
        score_matching.implicit_score_matching_loss,
        "torch.func.jacrev",
        lambda loss, x, w: units(partial(loss, jax_model(w)), x),
        traces,
        dict(x=draw_normal("B C"), **CRITIC),
        sizes=SMALL,
        note="its trace, and half the square",
    ),
    row(
        score_matching.sliced_score_matching_loss,
        "torch.autograd.functional.jvp",
        lambda loss, x, w: units(partial(loss, jax_model(w), key=KEY), x),
        projections,
        dict(x=draw_normal("B C"), **CRITIC),
        sizes=SMALL,
        note="along the same signs",
    ),
    row(
        score_matching.denoising_score_matching_loss,
        f"{F}.mse_loss",
        lambda loss, score, noise: loss(score, noise, sigma=0.6),
        lambda f, score, noise: 0.5 * 0.36 * f(score, -noise / 0.6),
        dict(score=draw_normal("B T C"), noise=draw_normal("B T C")),
        note="half of it, times `sigma^2`, with target `-noise / sigma`",
    ),
    row(
        diffusion.diffusion_loss,
        f"{F}.mse_loss",
        lambda loss, pred, target, weight: loss(pred, target, timestep_weight=weight),
        lambda f, pred, target, weight: (
            f(pred, target, reduction="none").mean((1, 2)) * weight
        ).mean(),
        dict(**PAIR, weight=draw_uniform("B", 0.5, 2)),
        note="mean of each sample, then its weight, as in diffusers",
    ),
    row(
        diffusion.consistency_loss,
        "torch.linalg.vector_norm",
        units,
        lambda f, student, teacher: f(student - teacher, dim=(1, 2)),
        PAIR,
        differentiate=("pred",),
    ),
    row(
        diffusion.masked_diffusion_loss,
        f"{F}.cross_entropy",
        lambda loss, logits, tokens, alpha: units(
            loss, logits, tokens, alpha=alpha, alpha_derivative=-0.7, mask_id=logits.shape[-1] - 1
        ),
        masked_tokens,
        dict(
            logits=draw_normal("B T C", scale=3),
            tokens=draw_labels("B T", classes="V"),
            alpha=draw_unit("B"),
        ),
        sizes=({}, {"B": 1, "C": 5, "V": 4, "T": 3}),
        note="summed over masked tokens, without the logit of the mask, and weighted",
    ),
    row(
        flow_matching.flow_matching_loss,
        "ott.neural.methods.flow_matching.interpolate_samples",
        lambda loss, velocity, start, end: loss(velocity, start, end),
        lambda f, velocity, start, end: ((velocity - f(KEY, start, end)["v_t"]) ** 2).mean(),
        {name: draw_normal("B D") for name in ("velocity", "start", "end")},
        note="mean square to its `v_t`, as in `flow_matching_step`",
    ),
    row(
        flow_matching.linear_interpolation,
        "ott.neural.methods.flow_matching.interpolate_samples",
        lambda loss, start, end, time: loss(start, end, time),
        lambda f, start, end, time: f(KEY, start, end, time_sampler=lambda *_: time)["x_t"],
        dict(start=draw_normal("B D"), end=draw_normal("B D"), time=draw_unit("B")),
        note="its `x_t`",
    ),
    row(
        variational.elbo_loss,
        "torch.distributions.Normal",
        our_bound,
        bound,
        dict(mean=draw_normal("B D"), log_std=draw_normal("B D"), x=draw_normal("B D")),
        note="negative log-likelihood and 0.3 times `kl_divergence`",
    ),
    row(
        variational.importance_weighted_elbo,
        "torch.logsumexp",
        units,
        lambda f, weights: np.log(weights.shape[-1]) - f(weights, -1),
        dict(log_weights=draw_normal("B T", scale=9)),
        note="minus it, less the logarithm of the number",
    ),
    row(
        variational.vq_commitment_loss,
        f"{F}.mse_loss",
        lambda loss, *arrays: units(loss, *arrays, beta=0.4),
        commitment,
        dict(encoded=draw_normal("B D"), quantized=draw_normal("B D")),
        note="twice, each with one side detached",
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_generative_losses_agree_with_their_peers(row: Row) -> None:
    check(row)


def test_the_loss_of_a_flow_matching_step_of_ott_is_ours() -> None:
    require_peer("ott")
    flow = peer("ott.neural.methods.flow_matching.flow_matching_step")
    nnx = require_peer("flax.nnx").nnx
    optax = require_peer("optax")
    g = np.random.default_rng(0)
    start, end = (jnp.asarray(g.standard_normal((6, 3)), jnp.float32) for _ in range(2))
    time = jnp.asarray(g.random(6), jnp.float32)

    class Field(nnx.Module):
        def __init__(self) -> None:
            self.gain = nnx.Param(jnp.float32(0.7))

        def __call__(self, t: Any, x: Any, cond: Any, rngs: Any = None) -> Any:
            return jnp.tanh(self.gain[...] * x) + t[:, None]

    field = Field()
    x = flow_matching.linear_interpolation(start, end, time)
    expected = flow_matching.flow_matching_loss(field(time, x, None), start, end)
    batch = {"t": time, "x_t": x, "v_t": end - start}
    with warnings.catch_warnings():  # it calls what optax has deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        step = flow(field, nnx.Optimizer(field, optax.sgd(0.1), wrt=nnx.Param), batch)
    np.testing.assert_allclose(step["loss"], expected, rtol=1e-6)
