"""Audio losses against auraloss, torch, librosa and scipy."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses.regression import log_cosh
from jaxloss.losses.separation import permutation_invariant
from jaxloss.losses.spectral import (
    mel_filterbank,
    mel_spectrogram_loss,
    multi_resolution_stft_loss,
    stft_loss,
)
from jaxloss.losses.waveforms import (
    dc_loss,
    esr_loss,
    pre_emphasis,
    sd_sdr_loss,
    si_sdr_loss,
    snr_loss,
)
from jaxloss.testing import draw_normal
from parity.peers import Row, check, peer, require_peer

WAVES = dict(pred=draw_normal("B T"), target=draw_normal("B T"))
BOTH = tuple(WAVES)
LENGTHS = ({"T": 100}, {"B": 1, "T": 37}, {"B": 3, "T": 64})
STFT = dict(fft_size=32, hop_size=8, window_size=24)
MEL = dict(sample_rate=8000, num_mels=6, **STFT)
# A bin near 0 has a derivative of any size, of which float32 keeps few digits.
EPS = 1e-2
BY_ITEM = "of each item; one norm over all items there"
stack, hann, angle, norm = (
    peer(f"torch.{name}") for name in ("stack", "hann_window", "angle", "linalg.norm")
)


def by_item(make: Any, *options: Any, **more: Any) -> Any:
    """Auraloss's spectral losses on one item after the other, with windows of their dtype."""

    def theirs(pred: Any, target: Any) -> Any:
        loss = peer(make)(*options, **more)
        for part in getattr(loss, "stft_losses", [loss]):
            part.window = hann(part.win_length, dtype=pred.dtype)
            if hasattr(part, "fb"):
                filters = peer("librosa.filters.mel")(
                    sr=part.sample_rate, n_fft=part.fft_size, n_mels=part.n_bins, dtype=np.float64
                )
                part.fb = peer("torch.tensor")(filters, dtype=pred.dtype)
        return stack(
            [loss(p[None, None], t[None, None]) for p, t in zip(pred, target, strict=True)]
        )

    return theirs


def phases(pred: Any, target: Any) -> Any:
    """Linear magnitudes and phases from torch's transform."""
    x, y = (
        peer("torch.stft")(a, 32, 8, 24, hann(24, dtype=a.dtype), return_complex=True)
        for a in (pred, target)
    )
    gap = (x.abs() - y.abs()).abs()
    turned = 1 - (angle(x) - angle(y)).cos()
    return (0.5 * gap + 2 * turned).mean((1, 2))


def emphasised(pred: Any, target: Any) -> Any:
    """Auraloss's filter runs against time, and from half of its 101 taps before the waves."""
    taps = peer("auraloss.perceptual.FIRFilter")("hp", coef=0.75).to(pred.dtype)
    found = taps(*(peer("torch.flip")(x, [-1])[:, None] for x in (pred, target)))
    x, y = (x[:, 0, 50 : 50 + pred.shape[-1]] for x in found)
    return peer("auraloss.time.ESRLoss")(reduction="none")(x, y)


def sides(pred: Any, target: Any) -> Any:
    """The sum of two channels and their difference."""
    both = lambda x: jnp.stack([x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]], axis=1)
    sizes = dict(fft_sizes=(32, 16), hop_sizes=(8, 4), window_sizes=(24, 16))
    units = multi_resolution_stft_loss(both(pred), both(target), eps=EPS, reduction="none", **sizes)
    return units.mean(1)


def sides_there(pred: Any, target: Any) -> Any:
    loss = peer("auraloss.freq.SumAndDifferenceSTFTLoss")([32, 16], [8, 4], [24, 16], eps=EPS)
    for part in loss.mrstft.stft_losses:
        part.window = hann(part.win_length, dtype=pred.dtype)
    return stack([loss(p[None], t[None]) for p, t in zip(pred, target, strict=True)])


def assigned(pairwise: Any) -> Any:
    find = peer("scipy.optimize.linear_sum_assignment")
    return np.stack([cost[find(cost)].mean() for cost in pairwise])


def ratio(loss: Any, name: str, **options: Any) -> Row:
    ours = lambda pred, target: loss(pred, target, reduction="none", **options)
    theirs = lambda pred, target: peer(f"auraloss.time.{name}")(reduction="none", **options)(
        pred, target
    )
    label = ", ".join(f"{k}={v}" for k, v in options.items())
    where = f"auraloss.time.{name}"
    return Row(loss.__name__, where, ours, theirs, WAVES, "", BOTH, LENGTHS, label=label)


ROWS = (
    ratio(si_sdr_loss, "SISDRLoss"),
    ratio(si_sdr_loss, "SISDRLoss", zero_mean=False, eps=0.1),
    ratio(snr_loss, "SNRLoss"),
    ratio(snr_loss, "SNRLoss", zero_mean=False, eps=0.1),
    ratio(sd_sdr_loss, "SDSDRLoss"),
    ratio(sd_sdr_loss, "SDSDRLoss", zero_mean=False, eps=0.1),
    ratio(esr_loss, "ESRLoss", eps=0.1),
    ratio(dc_loss, "DCLoss", eps=0.1),
    Row(
        "esr_loss",
        "auraloss.perceptual.FIRFilter",
        lambda pred, target: esr_loss(
            *(pre_emphasis(x, coefficient=0.75) for x in (pred, target)), reduction="none"
        ),
        emphasised,
        WAVES,
        "hp, coef=0.75, of the reversed waves and cut to their length",
        BOTH,
        LENGTHS,
        label="pre-emphasis",
    ),
    Row(
        "log_cosh",
        "auraloss.time.LogCoshLoss",
        lambda pred, target: log_cosh(2 * pred, 2 * target, reduction="none").mean(-1) / 2,
        lambda pred, target: peer("auraloss.time.LogCoshLoss")(a=2.0, eps=0.0, reduction="none")(
            pred, target
        ),
        WAVES,
        "of samples times a, divided by a",
        BOTH,
        LENGTHS,
        label="a=2",
    ),
    Row(
        "stft_loss",
        "auraloss.freq.STFTLoss",
        lambda pred, target: stft_loss(
            pred, target, linear_magnitude=0.3, eps=EPS, reduction="none", **STFT
        ),
        by_item("auraloss.freq.STFTLoss", 32, 8, 24, w_lin_mag=0.3, eps=EPS),
        WAVES,
        BY_ITEM,
        BOTH,
        LENGTHS,
    ),
    Row(
        "stft_loss",
        "torch.stft",
        lambda pred, target: stft_loss(
            pred,
            target,
            spectral_convergence=0.0,
            log_magnitude=0.0,
            linear_magnitude=0.5,
            phase=2.0,
            eps=1e-12,
            reduction="none",
            **STFT,
        ),
        phases,
        WAVES,
        "of its transform by hand; near an empty bin float32 leaves few digits",
        BOTH,
        LENGTHS,
        label="phases",
        dtypes=("float64",),
    ),
    Row(
        "multi_resolution_stft_loss",
        "auraloss.freq.MultiResolutionSTFTLoss",
        lambda pred, target: multi_resolution_stft_loss(pred, target, eps=EPS, reduction="none"),
        by_item("auraloss.freq.MultiResolutionSTFTLoss", eps=EPS),
        WAVES,
        BY_ITEM + "; gradients of small bins of large transforms have fewer digits in float32",
        BOTH,
        ({"B": 2, "T": 4000},),
        tolerance=dict(float32=1e-4),
    ),
    Row(
        "multi_resolution_stft_loss",
        "auraloss.freq.SumAndDifferenceSTFTLoss",
        sides,
        sides_there,
        dict(pred=draw_normal("B C T"), target=draw_normal("B C T")),
        "mean of the sum and the difference of two channels, by hand; of each item",
        BOTH,
        ({"C": 2, "T": 100},),
        label="sum and difference",
    ),
    Row(
        "mel_spectrogram_loss",
        "auraloss.freq.MelSTFTLoss",
        lambda pred, target: mel_spectrogram_loss(pred, target, reduction="none", **MEL),
        by_item("auraloss.freq.MelSTFTLoss", 8000, 32, 8, 24, w_sc=0.0, n_mels=6),
        WAVES,
        "w_sc=0; no bound below the logarithm there",
        BOTH,
        LENGTHS,
    ),
    Row(
        "pre_emphasis",
        "scipy.signal.lfilter",
        lambda pred: pre_emphasis(pred, coefficient=0.9),
        lambda pred: peer("scipy.signal.lfilter")([1, -0.9], 1, pred),
        dict(pred=draw_normal("B T")),
        "coefficients [1, -c]",
    ),
    *(
        Row(
            "permutation_invariant",
            "scipy.optimize.linear_sum_assignment",
            lambda pairwise: permutation_invariant(pairwise, reduction="none"),
            assigned,
            dict(pairwise=draw_normal("B S S")),
            "mean of the assigned costs",
            sizes=({"S": s}, {"B": 3, "S": s}),
            label=f"{s} sources",
        )
        for s in (3, 9)
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_value_and_gradient_agree(row: Row) -> None:
    check(row)


@pytest.mark.parametrize(
    ("rate", "fft", "mels", "low", "high"),
    [(22050, 1024, 80, 0.0, None), (16000, 512, 40, 20.0, 7600.0), (44100, 64, 40, 0.0, None)],
)
def test_filters_are_those_of_librosa(rate, fft, mels, low, high) -> None:
    require_peer("librosa")
    options = dict(fmin=low, fmax=high, dtype=np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of empty filters
        expected = peer("librosa.filters.mel")(sr=rate, n_fft=fft, n_mels=mels, **options)
    got = mel_filterbank(sample_rate=rate, fft_size=fft, num_mels=mels, f_min=low, f_max=high)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9)


def test_losses_that_take_one_norm_over_a_batch_let_a_loud_item_change_the_others() -> None:
    require_peer("auraloss")
    tensor, g = peer("torch.tensor"), np.random.default_rng(0)
    pred, target = g.standard_normal((2, 2, 1, 200))
    loud = target.copy()
    loud[0] *= 100
    theirs = peer("auraloss.freq.STFTLoss")(32, 8, 24, w_log_mag=0.0)
    theirs.window = theirs.window.double()
    options = dict(log_magnitude=0.0, reduction="none", **STFT)
    ours = np.asarray(stft_loss(pred.astype(np.float32), loud.astype(np.float32), **options))
    before = np.asarray(stft_loss(pred.astype(np.float32), target.astype(np.float32), **options))
    assert ours[1, 0] == before[1, 0]
    together = float(theirs(tensor(pred), tensor(loud)))
    alone = [float(theirs(tensor(pred[i : i + 1]), tensor(loud[i : i + 1]))) for i in (0, 1)]
    np.testing.assert_allclose(ours[:, 0], alone, rtol=1e-5)
    assert abs(together - np.mean(alone)) > 0.05
