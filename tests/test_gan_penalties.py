"""Penalties: critics by hand, flat critics, gradients of gradients, draws, masks and devices."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxloss import across
from jaxloss.losses import gan_penalties
from jaxloss.losses.gan_penalties import (
    dragan_penalty,
    gradient_penalty,
    path_length_penalty,
    r1_penalty,
    r2_penalty,
)

NONE = dict(reduction="none")
KEY = jax.random.key(3)


def draw(*shape, count=2, seed=0, dtype=np.float32):
    g = np.random.default_rng(seed)
    return tuple(g.standard_normal(shape).astype(dtype) for _ in range(count))


def penalties(critic, real, fake, **tail):
    """All of the four on one critic."""
    return {
        "gradient": gradient_penalty(critic, real, fake, key=KEY, **tail),
        "dragan": dragan_penalty(critic, real, key=KEY, **tail),
        "r1": r1_penalty(critic, real, **tail),
        "r2": r2_penalty(critic, fake, **tail),
    }


def test_a_linear_critic_costs_its_slope_alone_wherever_the_points_lie():
    real, fake = draw(4, 3, dtype=np.float64)
    slope = np.array([0.5, -1.5, 2.0])
    length = np.linalg.norm(slope)
    with jax.enable_x64(True):
        got = jax.jit(lambda *a: penalties(lambda x: x @ slope, *a, **NONE))(real, fake)
    for name in ("gradient", "dragan"):
        np.testing.assert_allclose(got[name], (length - 1) ** 2, rtol=1e-9)
    for name in ("r1", "r2"):
        np.testing.assert_allclose(got[name], length**2 / 2, rtol=1e-14)


def test_a_constant_critic_has_a_finite_penalty_and_finite_derivatives_of_all_orders():
    real, fake = draw(4, 3)
    flat = lambda gain: lambda x: gain * jnp.sum(x**2, axis=1)

    def total(gain):
        return penalties(flat(gain), real, fake)

    @jax.jit
    def derivatives(gain):
        gradient = jax.jacrev(total)
        return total(gain), gradient(gain), jax.jacfwd(gradient)(gain)

    constant = jax.jit(lambda *a, **kw: gradient_penalty(lambda x: 0 * x[:, 0], *a, key=KEY, **kw))
    with jax.enable_x64(True):
        value = constant(real.astype(float), fake.astype(float))
        np.testing.assert_allclose(value, (1e-5 - 1) ** 2, rtol=1e-12)
    assert all(np.isfinite(x) for x in jax.tree.leaves(derivatives(0.0)))
    assert constant(real, fake, eps=0.0) == 1


def test_a_quadratic_critic_by_hand():
    (matrix,) = draw(3, 3, count=1, dtype=np.float64)
    (x,) = draw(4, 3, count=1, dtype=np.float64)
    matrix = matrix + matrix.T
    bowl = lambda x: 0.5 * jnp.einsum("bi,ij,bj->b", x, matrix, x)
    slopes = np.linalg.norm(x @ matrix, axis=1)
    ways = ((1.0, False), (3.0, False), (3.0, True))

    @jax.jit
    def run(x):
        # Between a sample and itself lies the sample, whatever is drawn.
        between = [
            gradient_penalty(
                bowl, x, x, key=KEY, target=target, one_sided=one_sided, eps=1e-30, **NONE
            )
            for target, one_sided in ways
        ]
        return r1_penalty(bowl, x, **NONE), r2_penalty(bowl, x, **NONE), between

    with jax.enable_x64(True):
        at_real, at_fake, between = jax.device_get(run(x))
    np.testing.assert_allclose(at_real, slopes**2 / 2, rtol=1e-13)
    np.testing.assert_array_equal(at_fake, at_real)
    for (target, one_sided), got in zip(ways, between, strict=True):
        excess = slopes / target - 1
        expected = np.maximum(excess, 0) ** 2 if one_sided else excess**2
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-30)
        assert np.any(expected == 0) == one_sided


def test_the_points_lie_between_real_and_generated_samples_one_place_for_each():
    real, fake = (a.astype(np.float32) for a in (np.ones((500, 2)), np.ones((500, 2)) * [2, 4]))
    # D = x_0^2 / 2 tells where its first number lies: its slope is x_0.
    bowl = lambda i: lambda x: 0.5 * x[:, i] ** 2
    run = lambda i: gradient_penalty(bowl(i), real, fake, key=KEY, eps=0.0, **NONE)
    at = [1 + np.sqrt(units) for units in jax.jit(lambda: (run(0), run(1)))()]
    share = at[0] - 1
    np.testing.assert_allclose((at[1] - 1) / 3, share, rtol=1e-4, atol=1e-5)
    assert share.min() >= 0
    assert share.max() <= 1
    np.testing.assert_allclose([share.mean(), share.std()], [0.5, math.sqrt(1 / 12)], atol=0.04)


def network(params, x):
    """A critic of two layers with one score for each of two patches."""
    return jnp.tanh(x @ params["w"]) @ params["v"]


def params(dtype=np.float64):
    w, _ = draw(3, 4, dtype=dtype)
    v, _ = draw(4, 2, seed=1, dtype=dtype)
    return {"w": w, "v": v}


def test_critic_parameters_get_exact_gradients_inside_jit_and_once_more():
    real, fake = draw(4, 3, dtype=np.float64)
    direction = {"w": np.cos(np.arange(12.0)).reshape(3, 4), "v": np.ones((4, 2))}

    def total(params):
        found = penalties(lambda x: network(params, x), real, fake)
        return jnp.stack(list(found.values()))

    with jax.enable_x64(True):
        along = lambda t: total(jax.tree.map(lambda p, d: p + t * d, params(), direction))
        slope = jax.jacrev(along)
        run = jax.jit(lambda t: (along(t), slope(t), jax.jacfwd(slope)(t)))
        (_, first, second), ahead, behind = jax.device_get([run(t) for t in (0.0, 1e-5, -1e-5)])
        np.testing.assert_allclose(first, (ahead[0] - behind[0]) / 2e-5, rtol=1e-7)
        np.testing.assert_allclose(second, (ahead[1] - behind[1]) / 2e-5, rtol=1e-7)


def test_scores_of_patches_are_added_up_for_each_sample():
    real, _ = draw(4, 3)
    p = params(np.float32)
    critics = (lambda x: network(p, x), lambda x: network(p, x).sum(1))
    got, summed = jax.jit(lambda x: [r1_penalty(critic, x, **NONE) for critic in critics])(real)
    np.testing.assert_allclose(got, summed)


def test_a_target_scales_the_critic():
    real, fake = draw(4, 3)
    p = params(np.float32)
    critic, scaled = lambda x: network(p, x), lambda x: network(p, x) / 2.5

    @jax.jit
    def run(*arrays):
        got = gradient_penalty(critic, *arrays, key=KEY, target=2.5)
        return got, gradient_penalty(scaled, *arrays, key=KEY)

    got, expected = run(real, fake)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_hidden_sample_reaches_the_critic_as_zeros_and_changes_no_draw():
    real, fake = draw(4, 3)
    p = params(np.float32)
    where = np.array([True, False, True, True])
    critic = lambda x: network(p, x)
    units = jax.jit(lambda *a, **tail: penalties(critic, *a, **tail, **NONE))
    whole = jax.device_get(units(real, fake, where=where | True))
    hidden = [np.where(where[:, None], a, np.float32(np.nan)) for a in (real, fake)]
    got = jax.device_get(units(*hidden, where=where))
    for name in ("gradient", "r1", "r2"):
        np.testing.assert_array_equal(got[name][where], whole[name][where])
    assert all(kind[1] == 0 for kind in got.values())

    def total(p, x):
        return sum(penalties(lambda x: network(p, x), x, hidden[1], where=where).values())

    slopes = jax.device_get(jax.jit(jax.grad(total, argnums=(0, 1)))(p, hidden[0]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes[0]))
    np.testing.assert_array_equal(slopes[1][1], 0)


def test_penalties_are_the_same_on_split_batches():
    real, fake = draw(8, 3)
    p = params(np.float32)
    loss = lambda p, *a: sum(penalties(lambda x: network(p, x), *a).values())
    whole = jax.jit(jax.value_and_grad(loss))(p, real, fake)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            put = lambda a, mesh=mesh: jax.device_put(a, NamedSharding(mesh, PartitionSpec("data")))
            got = jax.jit(jax.value_and_grad(loss))(p, put(real), put(fake))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, whole)


def test_the_deviation_of_dragan_is_that_of_kept_samples_on_all_devices():
    x, _ = draw(8, 3)
    where = np.arange(8) % 3 > 0
    expected = x[where].astype(float).std()
    hidden = np.where(where[:, None], x, 0).astype(np.float32)

    @jax.jit
    def run(x, where):
        part = jax.vmap(lambda x, w: gan_penalties._deviation(x, w, "data"), axis_name="data")
        flat = jax.grad(lambda x: gan_penalties._deviation(x, None, None))(jnp.ones((2, 3)))
        split = part(x.reshape(4, 2, 3), where.reshape(4, 2))
        return gan_penalties._deviation(x, where, None), split, flat

    whole, parts, flat = run(hidden, where)
    np.testing.assert_allclose(whole, expected, rtol=1e-6)
    np.testing.assert_allclose(parts, expected, rtol=1e-6)
    assert np.max(flat) == 0


def test_the_points_of_dragan_lie_above_the_samples_by_at_most_half_a_deviation():
    real = np.linspace(1.5, 3.5, 400, dtype=np.float32)[:, None]
    units = partial(dragan_penalty, lambda x: 0.5 * x[:, 0] ** 2, key=KEY, **NONE)
    got = np.asarray(units(real))
    moved = 1 + np.sqrt(got) - real[:, 0]
    bound = 0.5 * real.std()
    assert moved.min() >= -1e-6
    assert moved.max() <= bound * (1 + 1e-6)
    np.testing.assert_allclose(moved.mean(), bound / 4, rtol=0.1)  # two uniform numbers
    split = np.full((2, 3, 1), 2, np.float32)
    split[0, 0] = 3
    mapped = jax.vmap(partial(units, axis_name="data"), axis_name="data")
    devices = np.asarray(jax.jit(mapped)(split))
    assert devices[0, 1] != devices[1, 1]  # each draws for itself


def test_critics_of_other_shapes_are_named_in_the_error():
    real, fake = draw(4, 3)
    with pytest.raises(ValueError, match=r"gradient_penalty: critic\(x\): expected a batch of 4"):
        gradient_penalty(lambda x: x[:2, 0], real, fake, key=KEY)
    with pytest.raises(ValueError, match=r"r1_penalty: critic\(x\): expected at least 1 axis"):
        r1_penalty(lambda x: x.sum(), real)
    with pytest.raises(TypeError, match="gradient_penalty: one_sided: expected a bool"):
        gradient_penalty(lambda x: x[:, 0], real, fake, key=KEY, one_sided=1.0)
    with pytest.raises(ValueError, match=r"r2_penalty: where: expected shape \(4,\)"):
        r2_penalty(lambda x: x[:, 0], fake, where=np.ones((4, 3), bool))


def test_the_critic_sees_float32_and_the_samples_get_gradients_of_their_dtype():
    real = np.ones((2, 3), jnp.bfloat16)
    seen = []
    critic = lambda x: (seen.append(x.dtype), jnp.sum(x**3, axis=1))[1]
    value, slope = jax.jit(jax.value_and_grad(lambda x: r1_penalty(critic, x)))(real)
    assert seen[0] == jnp.float32
    assert (value.dtype, slope.dtype) == (jnp.float32, jnp.bfloat16)


def lengths_by_hand(matrix, key, batch, pixels):
    """|A^T y| of a linear generator, with the noise that the penalty draws."""
    noise = jax.random.normal(key, (batch, *pixels), np.float32)
    noise = np.asarray(noise, float) / math.sqrt(math.prod(pixels[:-1]))
    return np.linalg.norm(noise.reshape(batch, -1) @ matrix, axis=1)


def test_the_path_length_of_a_linear_generator_by_hand():
    (latents,) = draw(5, 3, count=1, dtype=np.float64)
    (matrix,) = draw(12, 3, count=1, dtype=np.float64)
    generator = lambda z: (z @ matrix.T).reshape(-1, 2, 3, 2)
    lengths = lengths_by_hand(matrix, KEY, 5, (2, 3, 2))
    with jax.enable_x64(True):
        state = jnp.float64(0.4)
        units, new = path_length_penalty(generator, latents, state, key=KEY, decay=0.1, **NONE)
        mean = 0.9 * 0.4 + 0.1 * lengths.mean()
        np.testing.assert_allclose(new, mean, rtol=1e-12)
        np.testing.assert_allclose(units, (lengths - mean) ** 2, rtol=1e-11)
        where, weights = np.array([True, True, False, True, True]), np.array([1.0, 2, 3, 0, 1])
        value, new = path_length_penalty(
            generator, latents, state, key=KEY, decay=0.1, where=where, weights=weights
        )
        counts = np.where(where, weights, 0) / 4
        mean = 0.9 * 0.4 + 0.1 * (counts * lengths).sum()
        np.testing.assert_allclose(new, mean, rtol=1e-12)
        np.testing.assert_allclose(value, (counts * (lengths - mean) ** 2).sum(), rtol=1e-11)


def test_latents_of_layers_take_the_root_of_the_mean_over_layers():
    (latents,) = draw(3, 2, 4, count=1)
    (matrix,) = draw(6, 8, count=1, dtype=np.float64)
    generator = lambda z: z.reshape(3, 8) @ matrix.astype(np.float32).T
    lengths = lengths_by_hand(matrix, KEY, 3, (6,)) / math.sqrt(2)
    units, new = path_length_penalty(generator, latents, jnp.float32(0), key=KEY, **NONE)
    np.testing.assert_allclose(new, 0.01 * lengths.mean(), rtol=1e-5)
    np.testing.assert_allclose(units, (lengths - 0.01 * lengths.mean()) ** 2, rtol=1e-5)


def test_the_mean_length_runs_on_and_carries_no_gradient_into_the_past():
    (latents,) = draw(4, 3, count=1)
    step = jax.jit(
        lambda gain, state, key: path_length_penalty(
            lambda z: gain * z, latents, state, key=key, decay=0.2
        )
    )
    state = jnp.float32(0)
    for i in range(60):
        _, state = step(2.0, state, jax.random.fold_in(KEY, i))
    mean_norm = math.sqrt(2) * math.gamma(2) / math.gamma(1.5)  # of three normal numbers
    np.testing.assert_allclose(state, 2 * mean_norm, rtol=0.2)

    @jax.jit
    def slopes(gain, state):
        of_loss = jax.grad(lambda state: step(gain, state, KEY)[0])(state)
        return of_loss, jax.grad(lambda gain: step(gain, state, KEY)[1])(gain)

    assert slopes(2.0, state) == (0, 0)


def test_a_batch_without_latents_leaves_the_mean_as_it_was():
    latents, _ = draw(4, 3)
    value, state = path_length_penalty(
        jnp.sin, latents, jnp.float32(0.7), key=KEY, where=np.zeros(4, bool)
    )
    assert value == 0
    assert state == np.float32(0.7)


def test_a_generator_without_slope_has_finite_derivatives():
    latents, _ = draw(4, 3)
    penalty = partial(path_length_penalty, latents=latents, state=np.float32(0.5), key=KEY)
    loss = lambda gain: penalty(lambda z: gain * z)[0]
    slope = jax.grad(loss)
    for derivative in jax.jit(lambda gain: (loss(gain), slope(gain), jax.grad(slope)(gain)))(0.0):
        assert np.isfinite(derivative)


def test_path_lengths_are_the_same_on_split_batches():
    latents, _ = draw(8, 3)
    loss = lambda z: path_length_penalty(jnp.sin, z, jnp.float32(0.5), key=KEY, decay=0.3)
    whole = jax.jit(loss)(latents)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            split = jax.device_put(latents, NamedSharding(mesh, PartitionSpec("data")))
            np.testing.assert_allclose(jax.jit(loss)(split), whole, rtol=1e-5)
    # Inside a mapped axis every device draws for itself and all agree on the mean.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    options = dict(key=KEY, decay=1.0, axis_name="data", reduction=across("data"))
    mapped = jax.shard_map(
        lambda z: path_length_penalty(jnp.sin, z, jnp.float32(0.5), **options),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    value, mean = jax.jit(mapped)(np.zeros((8, 3), np.float32))  # the lengths of the noise
    keys = [jax.random.fold_in(KEY, device) for device in range(8)]
    lengths = [np.linalg.norm(jax.random.normal(key, (1, 3))) for key in keys]
    np.testing.assert_allclose([mean, value], [np.mean(lengths), np.var(lengths)], rtol=1e-5)


def test_a_critic_with_statistics_of_the_batch_mixes_its_samples():
    real, _ = draw(4, 3)
    spread = lambda x, mean: jnp.sum((x - mean) ** 2, axis=1) * np.float32([1, 2, 3, 4])
    mean = real.mean(0, keepdims=True)  # as in inference: no coupling
    centred, alone = lambda x: spread(x, x.mean(0, keepdims=True)), lambda x: spread(x, mean)
    units = jax.jit(lambda x: [r1_penalty(critic, x, **NONE) for critic in (centred, alone)])
    together, fixed = jax.device_get(units(real))
    assert np.all(np.abs(together - fixed) > 1e-3)
    assert "batch normalisation" in str(gradient_penalty.__doc__)


def test_other_latents_and_states_are_errors():
    latents, _ = draw(4, 3)
    call = lambda z=latents, s=jnp.float32(0), **o: path_length_penalty(jnp.sin, z, s, key=KEY, **o)
    with pytest.raises(
        ValueError, match=r"path_length_penalty: latents: expected shape \(batch, f"
    ):
        call(z=latents[0])
    with pytest.raises(ValueError, match=r"path_length_penalty: state: expected shape \(\)"):
        call(s=jnp.zeros(4))
    with pytest.raises(ValueError, match="path_length_penalty: decay: expected a scalar"):
        call(decay=jnp.ones(4))
