"""Short-time spectra of waveforms: frames, magnitudes, mel filters."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .checks import message
from .numerics import safe_div, safe_sqrt
from .typing import Where


class Resolution(NamedTuple):
    """Sizes of a short-time Fourier transform, in samples."""

    fft: int
    hop: int
    window: int

    def frames(self, samples: int) -> int:
        """How many frames a waveform has."""
        return 1 + (samples + 2 * (self.fft // 2) - self.fft) // self.hop


def check_resolution(samples: int, resolution: Resolution, names: Sequence[str]) -> None:
    """The sizes are counts, the window fits into the transform and that into the waveform."""
    for name, size in zip(names, resolution, strict=True):
        check_count(**{name: size})
    fft, _, window = resolution
    if window > fft:
        raise ValueError(message(names[2], f"at most the size {fft} of the transform", window))
    if samples < fft:
        raise ValueError(message("pred", f"at least {fft} samples ({names[0]})", samples))


def check_count(**counts: Any) -> None:
    """Each argument is an integer of at least 1."""
    for name, value in counts.items():
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < 1:
            raise ValueError(message(name, "an integer of at least 1", repr(value)))


def frames(x: Array, resolution: Resolution) -> Array:
    """What each window covers, `(*items, frames, window)`, of a waveform mirrored at its ends.

    Shifted rows of hops side by side: no gather, whose derivative would be a scatter.
    """
    fft, hop, window = resolution
    count = resolution.frames(x.shape[-1])
    pieces = -(-window // hop)
    pad = [(0, 0)] * (x.ndim - 1)
    x = jnp.pad(x, [*pad, (fft // 2, fft // 2)], mode="reflect")
    first = (fft - window) // 2
    x = x[..., first : first + (count - 1) * hop + window]
    length = (count - 1 + pieces) * hop
    x = jnp.pad(x, [*pad, (0, max(length - x.shape[-1], 0))])
    rows = [x[..., k * hop : (k + count) * hop] for k in range(pieces)]
    rows = [row.reshape(*x.shape[:-1], count, hop) for row in rows]
    return jnp.concatenate(rows, axis=-1)[..., :window]


def stft(x: Array, resolution: Resolution) -> Array:
    """Spectra `(*items, frames, fft // 2 + 1)` under a periodic Hann window.

    The window stands at the start of the transform instead of its centre: all spectra of one
    resolution are turned by one phase, which no magnitude and no difference of phases sees.
    """
    fft, _, window = resolution
    taps = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    parts = frames(x, resolution)
    return jnp.fft.rfft(parts * jnp.broadcast_to(jnp.asarray(taps, x.dtype), parts.shape), fft)


def kept_frames(where: Where | None, resolution: Resolution) -> Array | None:
    """Frames whose window covers a kept sample, `(*items, frames)`."""
    return None if where is None else jnp.any(frames(where, resolution), axis=-1)


def floored_power(spectrum: Array, floor: Array) -> Array:
    """Squared magnitudes, at least `floor`, with zero gradient below it."""
    square = spectrum.real**2 + spectrum.imag**2
    return jnp.where(square > floor, square, floor)


def magnitude(spectrum: Array, floor: Array) -> Array:
    """Root of `floored_power`."""
    return safe_sqrt(floored_power(spectrum, floor))


def scaled_gap(x: Array, x_scale: Array, y: Array, y_scale: Array) -> Array:
    """`|x x_scale - y y_scale|^2` of spectra and real scales, exactly 0 where they are equal.

    The gap of the spectra takes the smaller scale, usually that of the larger spectrum: under the
    other one its digits would go where the smaller spectrum is almost nothing.
    """
    first = x_scale > y_scale
    scale = jnp.where(first, y_scale, x_scale)
    rest = x_scale - y_scale
    re, im = (
        (a - b) * scale + jnp.where(first, a, b) * rest
        for a, b in ((x.real, y.real), (x.imag, y.imag))
    )
    return re * re + im * im


def mel_filters(
    sample_rate: float, fft_size: int, num_mels: int, f_min: float, f_max: float | None
) -> np.ndarray:
    """Triangles over Slaney's mel scale, each of area 1 over hertz, `(num_mels, bins)`."""
    highest = sample_rate / 2 if f_max is None else f_max
    ends = np.linspace(_mel(f_min), _mel(highest), num_mels + 2)
    hertz = np.where(ends < 15, ends * 200 / 3, 1000 * np.exp(_STEP * (ends - 15)))
    bins = np.arange(fft_size // 2 + 1) * sample_rate / fft_size
    width = np.diff(hertz)[:, None]
    slope = (bins - hertz[:, None])[None]
    rise, fall = slope[0, :-2] / width[:-1], -slope[0, 2:] / width[1:]
    area = (hertz[2:] - hertz[:-2])[:, None] / 2
    return np.maximum(np.minimum(rise, fall), 0) / area


_STEP = math.log(6.4) / 27  # 27 mels from 1000 to 6400 hertz, above a linear scale


def _mel(hertz: float) -> float:
    return 15 + math.log(hertz / 1000) / _STEP if hertz >= 1000 else hertz * 3 / 200


def frame_mean(values: Array, kept: Array | None) -> Array:
    """Mean over kept frames and all bins of `(*items, frames, bins)`."""
    if kept is None:
        return jnp.mean(values, axis=(-2, -1))
    count = values.shape[-1] * jnp.sum(kept, axis=-1, dtype=values.dtype)
    return safe_div(jnp.sum(jnp.where(kept[..., None], values, 0), axis=(-2, -1)), count)


SMALL = 2**12  # samples


def _plain_sum(functions: Sequence[Callable[..., Array]], *args: Any) -> Array:
    values = [function(*args) for function in functions]
    return sum(values[1:], values[0])


def _zeros(pred: Array, target: Array, numbers: Any, where: Where | None) -> Array:
    """Zeros of the shape of a waveform, mapped and sharded as all that a sum depends on."""
    known = (pred < jnp.inf) & (target < jnp.inf)
    for x in jax.tree.leaves(numbers):
        known &= x[..., None] < jnp.inf
    known = known if where is None else known & where
    return jnp.where(known, jnp.zeros((), pred.dtype), 0)


def sum_in_turn(
    functions: Sequence[Callable[..., Array]],
    pred: Array,
    target: Array,
    numbers: Any,
    where: Where | None,
) -> Array:
    """Sum of `f(pred, target, numbers, where)`, one value per item each, one after the other.

    A loop with a branch for each function, so that no two of them are in memory at once, which no
    barrier achieves; derivatives in the waveforms are taken on the way forward, and nothing else is
    kept for the backward pass. A loss of three resolutions takes the memory of one, and 0.7 times
    as long as with recomputation. All transforms work, of any order. Small waveforms take the plain
    way, which compiles faster.
    """
    if len(functions) == 1 or pred.size < SMALL:
        return _plain_sum(functions, pred, target, numbers, where)

    def loop(change: Callable[..., Any], start: Any, *args: Any) -> Any:
        branches = [partial(change, function) for function in functions]
        add = lambda total, k: (
            jax.tree.map(jnp.add, total, jax.lax.switch(k, branches, *args)),
            None,
        )
        return jax.lax.scan(add, start, jnp.arange(len(functions), dtype=jnp.int32))[0]

    def plain(*args: Any) -> Array:
        nothing = jnp.sum(_zeros(*args), axis=-1)
        return loop(lambda function, *args: function(*args), nothing, *args)

    total = jax.custom_jvp(plain)

    def rule(primals: Any, tangents: Any) -> tuple[Array, Array]:
        pred, target, numbers, where = primals
        moves = {i: t for i, t in enumerate(tangents[:2]) if not isinstance(t, SymbolicZero)}

        def slopes(function: Callable[..., Array], *waves: Array) -> Any:
            of = lambda moving: function(
                *(moving.get(i, wave) for i, wave in enumerate(waves)), numbers, where
            )
            value, pull = jax.vjp(of, {i: waves[i] for i in moves})
            return value, pull(jnp.ones_like(value))[0]

        zeros = _zeros(*primals)
        nothing = jnp.sum(zeros, axis=-1), dict.fromkeys(moves, zeros)
        value, slope = loop(slopes, nothing, pred, target)
        moved = sum((jnp.sum(slope[i] * moves[i], axis=-1) for i in moves), jnp.zeros_like(value))
        flat, tree = jax.tree.flatten(numbers)
        dots = jax.tree.leaves(tangents[2], is_leaf=lambda t: isinstance(t, SymbolicZero))
        if not all(isinstance(t, SymbolicZero) for t in dots):
            dots = [
                jnp.zeros_like(x) if isinstance(t, SymbolicZero) else t
                for x, t in zip(flat, dots, strict=True)
            ]
            of = lambda flat: plain(pred, target, jax.tree.unflatten(tree, flat), where)
            moved = moved + jax.jvp(of, (flat,), (dots,))[1]
        return value, moved

    total.defjvp(rule, symbolic_zeros=True)
    return total(pred, target, numbers, where)
