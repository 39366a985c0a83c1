"""Image losses against MONAI, kornia, piq, scikit-image, SciPy, torch and focal-frequency-loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.losses import frequency, image, perceptual, registration, ssim
from jaxloss.testing import Draw, draw_normal, draw_uniform
from parity.peers import Row, check, peer, require_peer

WIDE = ({"H": 12, "W": 13}, {"B": 1, "C": 1, "H": 11, "W": 80})
SMALL = ({"H": 5, "W": 6}, {"B": 1, "C": 1, "H": 7, "W": 4}, {"B": 3, "C": 3, "H": 9, "W": 8})
UNIT = dict(pred=draw_uniform("B H W C", 0, 1), target=draw_uniform("B H W C", 0, 1))
VOLUME = dict(pred=draw_uniform("B H W D C", 0, 1), target=draw_uniform("B H W D C", 0, 1))
PAIR = dict(pred=draw_normal("B H W C"), target=draw_normal("B H W C"))
ONE = dict(images=draw_normal("B H W C"))
F = "torch.nn.functional"


def row(
    loss: str,
    name: str,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    draws: dict[str, Draw],
    *,
    plain: bool = False,
    **options: Any,
) -> Row:
    """`ours(*arrays)` against `theirs(peer, *arrays)`; a `plain` row has no gradient.

    torch peers see channels behind the batch. SSIM is compared on related images, since that of
    unrelated ones is almost 0.
    """
    options.setdefault("sizes", SMALL)
    mix = (lambda p, t: (p, (p + t) / 2)) if "ssim" in loss else lambda *arrays: arrays

    def first(x: Any) -> Any:
        return x.movedim(-1, 1) if hasattr(x, "movedim") and x.ndim > 2 else x

    return Row(
        loss=loss,
        peer=name,
        ours=lambda **arrays: ours(*mix(*arrays.values())),
        theirs=lambda **arrays: theirs(peer(name), *mix(*map(first, arrays.values()))),
        draws=draws,
        differentiate=() if plain else tuple(draws),
        **options,
    )


def units(loss: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda *arrays: loss(*arrays, reduction="none", **options)


def each(metric: Callable[..., Any], pred: Any, target: Any, **options: Any) -> Any:
    """A NumPy metric of single images, over a batch."""
    pairs = zip(pred.astype(np.float64), target.astype(np.float64), strict=True)
    return np.array([metric(p, t, **options) for p, t in pairs])


def crop(x: Any, by: int) -> Any:
    """Without a border along every axis behind the second."""
    return x[(slice(None), slice(None), *[slice(by, -by)] * (x.ndim - 2))]


def mean_units(x: Any) -> Any:
    return x.flatten(1).mean(1)


MONAI: dict[str, Any] = dict(tolerance={"float64": 1e-5}, note="its Gaussian is built in float32")

SSIM = [
    row(
        "ssim_loss",
        "monai.losses.SSIMLoss",
        units(ssim.ssim_loss, max_value=2.0),
        lambda f, p, t: f(spatial_dims=2, data_range=2.0, reduction="none")(p, t)[:, 0],
        UNIT,
        sizes=WIDE,
        **MONAI,
    ),
    row(
        "ssim_loss",
        "monai.losses.SSIMLoss",
        units(ssim.ssim_loss, window=5, sigma=0.8, k1=0.02, k2=0.05),
        lambda f, p, t: f(
            spatial_dims=3, win_size=5, kernel_sigma=0.8, k1=0.02, k2=0.05, reduction="none"
        )(p, t)[:, 0],
        VOLUME,
        sizes=({"B": 2, "H": 5, "W": 6, "D": 7, "C": 2},),
        label="volume",
        **MONAI,
    ),
    row(
        "ssim",
        "kornia.metrics.ssim.ssim",
        units(ssim.ssim),
        lambda f, p, t: mean_units(f(p, t, window_size=11, eps=0.0, padding="valid")),
        UNIT,
        sizes=WIDE,
        note='`padding="valid"`, its mean over the map',
    ),
    row(
        "ssim_map",
        "kornia.metrics.ssim.ssim",
        ssim.ssim_map,
        lambda f, p, t: f(p, t, window_size=11, eps=0.0, padding="valid").movedim(1, -1),
        UNIT,
        sizes=WIDE[:1],
        note='`padding="valid"`',
    ),
    row(
        "ssim_loss",
        "kornia.losses.ssim_loss",
        lambda p, t: 0.5 * ssim.ssim_loss(p, t),
        lambda f, p, t: f(p, t, window_size=11, eps=0.0, padding="valid"),
        UNIT,
        sizes=WIDE[:1],
        note='`padding="valid"`; theirs is half of ours',
    ),
    row(
        "ssim",
        "piq.ssim.ssim",
        units(ssim.ssim, window=7, sigma=1.2),
        lambda f, p, t: f(
            p, t, kernel_size=7, kernel_sigma=1.2, downsample=False, reduction="none"
        ),
        UNIT,
        sizes=WIDE,
        note="`downsample=False`",
    ),
    row(
        "ssim",
        "skimage.metrics.structural_similarity",
        units(ssim.ssim),
        lambda f, p, t: each(
            f,
            p,
            t,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=-1,
        ),
        UNIT,
        plain=True,
        sizes=WIDE,
        note="Gaussian weights, population covariance",
    ),
    *[
        row(
            loss,
            f"piq.{name}",
            units(getattr(ssim, loss), window=3, k2=0.4, power=(0.3, 0.3, 0.4)),
            (
                lambda f, p, t: f(
                    p,
                    t,
                    kernel_size=3,
                    k2=0.4,
                    scale_weights=p.new_tensor([0.3, 0.3, 0.4]),
                    reduction="none",
                )
            )
            if loss == "ms_ssim"
            else lambda f, p, t: f(
                kernel_size=3,
                k2=0.4,
                scale_weights=p.new_tensor([0.3, 0.3, 0.4]),
                reduction="none",
            )(p, t),
            UNIT,
            sizes=({"H": 24, "W": 24}, {"B": 2, "C": 2, "H": 21, "W": 21}),
            note="square images",
        )
        for loss, name in (("ms_ssim", "multi_scale_ssim"), ("ms_ssim_loss", "MultiScaleSSIMLoss"))
    ],
    row(
        "ms_ssim_l1_loss",
        "kornia.losses.MS_SSIMLoss",
        units(ssim.ms_ssim_l1_loss, sigmas=(0.5, 1.0, 2.0), alpha=0.3, max_value=2.0),
        lambda f, p, t: (
            f(sigmas=(0.5, 1.0, 2.0), alpha=0.3, data_range=2.0, reduction="none").to(p)(p, t)
        )[:, 4:-4, 4:-4].mean((1, 2)),
        UNIT,
        sizes=({"H": 11, "W": 12}, {"B": 1, "C": 1, "H": 9, "W": 14}),
        tolerance={"float32": 1e-4, "float64": 1e-5},
        note="its interior; its Gaussians are built in float32",
    ),
]

PIXELS = [
    row(
        "psnr_loss",
        "kornia.losses.psnr_loss",
        units(image.psnr_loss, max_value=2.0),
        lambda f, p, t: sum_of(p, [f(p[i], t[i], 2.0) for i in range(len(p))]),
        PAIR,
        note="one image at a time",
    ),
    row(
        "psnr",
        "piq.psnr.psnr",
        units(image.psnr),
        lambda f, p, t: f(p, t, reduction="none"),
        UNIT,
        note="it adds 1e-8 to the mean square",
        tolerance={"float32": 1e-5, "float64": 1e-6},
    ),
    row(
        "psnr",
        "skimage.metrics.peak_signal_noise_ratio",
        units(image.psnr, max_value=2.0),
        lambda f, p, t: each(f, p, t, data_range=2.0),
        PAIR,
        plain=True,
    ),
    row(
        "total_variation_loss",
        "kornia.losses.total_variation.total_variation",
        units(image.total_variation_loss),
        lambda f, x: f(x, reduction="mean").mean(1),
        ONE,
        note='`reduction="mean"`, averaged over channels',
    ),
    row(
        "sobel_loss",
        "kornia.filters.spatial_gradient",
        units(image.sobel_loss),
        lambda f, p, t: mean_units((f(p) - f(t)).abs()[..., 1:-1, 1:-1]),
        PAIR,
        note="the mean absolute difference of its interior",
    ),
    row(
        "sobel_loss",
        "scipy.ndimage.sobel",
        units(image.sobel_loss),
        lambda f, p, t: np.mean([edges(f, p - t, axis) for axis in (0, 1)])[None],
        PAIR,
        plain=True,
        sizes=({"B": 1, "C": 1, "H": 5, "W": 6},),
        note="an eighth of the mean absolute difference of its interior",
    ),
    row(
        "gradient_loss",
        f"{F}.l1_loss",
        units(image.gradient_loss),
        lambda f, p, t: sum(
            mean_units(f(p.diff(dim=a).abs(), t.diff(dim=a).abs(), reduction="none"))
            for a in (2, 3)
        ),
        PAIR,
        note="of absolute differences of neighbours, summed over the axes",
    ),
    row(
        "isotropic_total_variation_loss",
        "torch.linalg.vector_norm",
        units(image.isotropic_total_variation_loss),
        lambda f, x: mean_units(
            f(
                stacked(x.diff(dim=2)[..., :-1], x.diff(dim=3)[..., :-1, :]),
                dim=0,
            )
        ),
        ONE,
        note="of the differences to both next neighbours, averaged",
    ),
    row(
        "gmsd_loss",
        "piq.functional.gradient_map",
        units(image.gmsd_loss, max_value=2.0),
        lambda f, p, t: deviation(f, p / 2, t / 2),
        UNIT,
        sizes=({"H": 10, "W": 8}, {"B": 1, "C": 1, "H": 12, "W": 10}),
        note="`piq.gmsd` of one channel without its zero border",
    ),
]


def stacked(*tensors: Any) -> Any:
    import torch

    return torch.stack(tensors)


def sum_of(like: Any, values: list[Any]) -> Any:
    return stacked(*values).to(like)


def edges(sobel: Callable[..., Any], images: Any, axis: int) -> Any:
    return np.mean(np.abs(sobel(images[0, ..., 0].astype(np.float64), axis)[1:-1, 1:-1])) / 8


def deviation(gradient_map: Callable[..., Any], pred: Any, target: Any) -> Any:
    import torch
    from piq.functional import prewitt_filter, similarity_map

    kernel = prewitt_filter(dtype=pred.dtype)
    kernels = torch.stack([kernel, kernel.transpose(-1, -2)])
    values = []
    for channel in range(pred.shape[1]):
        pair = (
            torch.nn.functional.avg_pool2d(x[:, channel : channel + 1], 2) for x in (pred, target)
        )
        p, t = (gradient_map(x, kernels)[..., 1:-1, 1:-1] for x in pair)
        gms = similarity_map(p, t, constant=170 / 255**2)
        values.append(gms.flatten(1).std(1, correction=0))
    return torch.stack(values).mean(0)


SPECTRA = [
    *[
        row(
            "focal_frequency_loss",
            "focal_frequency_loss.FocalFrequencyLoss",
            lambda p, t, alpha=alpha: frequency.focal_frequency_loss(p, t, alpha=alpha),
            lambda f, p, t, alpha=alpha: f(alpha=alpha)(p, t),
            PAIR,
            label=f"alpha={alpha}",
        )
        for alpha in (1.0, 0.5)
    ],
    row(
        "fft_l1_loss",
        "torch.fft.rfft2",
        frequency.fft_l1_loss,
        lambda f, p, t: (parts(f(p, norm="ortho")) - parts(f(t, norm="ortho"))).abs().mean(),
        PAIR,
        note="mean absolute difference of real and imaginary parts",
    ),
    row(
        "spectral_amplitude_loss",
        "monai.losses.JukeboxLoss",
        frequency.spectral_amplitude_loss,
        lambda f, p, t: f(spatial_dims=2)(p, t),
        PAIR,
        sizes=({"C": 1, "H": 5, "W": 6}, {"B": 1, "C": 1, "H": 7, "W": 4}),
        note="one channel: MONAI transforms the channel axis too",
    ),
]


def parts(spectrum: Any) -> Any:
    return stacked(spectrum.real, spectrum.imag)


def convolved(kernel: Any) -> Callable[[Any], Any]:
    """Two layers of one convolution each, channels last."""
    numbers = ("NHWC", "OIHW", "NHWC")
    step = lambda x: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=numbers
    )

    def features(x: Any) -> list[Any]:
        first = jax.nn.relu(step(x))
        return [first, step(first)]

    return features


def torch_layers(mse: Callable[..., Any], pred: Any, target: Any, kernel: Any) -> Any:
    import torch

    total, step = 0.0, torch.nn.functional.conv2d
    kernel = kernel.movedim(1, -1)  # as drawn
    for weight in (0.5, 2.0):
        pred, target = step(pred, kernel), step(target, kernel)
        if weight == 0.5:
            pred, target = pred.relu(), target.relu()
        total = total + weight * mean_units(mse(pred, target, reduction="none"))
    return total


FEATURES = [
    row(
        "feature_loss",
        f"{F}.mse_loss",
        units(perceptual.feature_loss),
        lambda f, p, t: mean_units(f(p, t, reduction="none")),
        PAIR,
    ),
    row(
        "perceptual_loss",
        f"{F}.mse_loss",
        lambda p, t, kernel: perceptual.perceptual_loss(
            p, t, feature_fn=convolved(kernel), layer_weights=[0.5, 2.0], reduction="none"
        ),
        torch_layers,
        {**PAIR, "kernel": draw_normal("C C 2 3")},
        sizes=SMALL[::2],
        note="of two convolutions' outputs",
    ),
    row(
        "gram_style_loss",
        "piq.StyleLoss.gram_matrix",
        units(perceptual.gram_style_loss),
        lambda f, p, t: mean_units(((f(p) - f(t)) / p[0].numel()) ** 2),
        PAIR,
        note="its matrices over channels x pixels, mean squared difference",
    ),
    row(
        "lpips_loss",
        "piq.LPIPS.normalize",
        units(perceptual.lpips_loss),
        lambda f, p, t, w: ((f(p) - f(t)) ** 2 * w[:, None, None]).mean((2, 3)).sum(1),
        {**PAIR, "linear_weights": draw_uniform("C", 0, 1)},
        sizes=SMALL[::2],
        note="of its unit vectors, for one layer; it adds 1e-10 to the norms",
        tolerance={"float64": 1e-8},
    ),
    row(
        "dists_loss",
        "piq.DISTS.compute_distance",
        units(perceptual.dists_loss),
        lambda f, p, t, a, b: (
            1
            - sum(
                (w * d[..., 0, 0]).sum(1) / (a.sum() + b.sum())
                for w, d in zip((a, b), f(None, [p], [t]), strict=True)
            )
        ),
        {
            **UNIT,
            "texture_weights": draw_uniform("C", 0.1, 1),
            "structure_weights": draw_uniform("C", 0.1, 1),
        },
        note="given one layer of features and its weights",
    ),
]

MOVED = dict(displacement=draw_normal("B H W 2"))
MOVED_3D = dict(displacement=draw_normal("B H W D 3"))
INFORMATION = dict(
    kernel_type="gaussian", num_bins=5, sigma_ratio=0.7, smooth_nr=1e-12, smooth_dr=1e-12
)

MAPS = [
    row(
        "local_ncc_loss",
        "monai.losses.LocalNormalizedCrossCorrelationLoss",
        units(registration.local_ncc_loss, window=window),
        lambda f, p, t, dims=dims, window=window: mean_units(
            crop(f(spatial_dims=dims, kernel_size=window, reduction="none")(p, t), window // 2)
        ),
        draws,
        sizes=sizes,
        label=f"{dims}-D",
        note="its interior",
    )
    for dims, window, draws, sizes in (
        (2, 5, UNIT, SMALL[2:]),
        (3, 3, VOLUME, ({"B": 2, "H": 4, "W": 5, "D": 6, "C": 2},)),
    )
]
MAPS += [
    row(
        "mutual_information_loss",
        "monai.losses.GlobalMutualInformationLoss",
        units(registration.mutual_information_loss, bins=5, sigma_ratio=0.7),
        lambda f, p, t: f(reduction="none", **INFORMATION).to(p)(p, t),
        UNIT,
        tolerance={"float32": 1e-4, "float64": 1e-6},
        note="Gaussian kernel; it cancels in float32, and its bins are built in float32",
    ),
    *[
        row(
            loss,
            f"monai.losses.{name}",
            units(getattr(registration, loss)),
            lambda f, u: mean_units(f(reduction="none")(u)),
            draws,
            sizes=sizes,
            label=label,
        )
        for loss, name in (
            ("bending_energy", "BendingEnergyLoss"),
            ("diffusion_energy", "DiffusionLoss"),
        )
        for label, draws, sizes in (
            ("2-D", MOVED, SMALL[:2]),
            ("3-D", MOVED_3D, ({"B": 2, "H": 4, "W": 5, "D": 3},)),
        )
    ],
]

ROWS = tuple(SSIM + PIXELS + SPECTRA + FEATURES + MAPS)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # in MONAI
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_image_losses_agree(row: Row) -> None:
    check(row)


def test_kornia_psnr_of_equal_images_is_infinite_where_ours_is_not() -> None:
    torch = require_peer("torch")
    x = torch.ones(3, 4, requires_grad=True)
    theirs = peer("kornia.losses.psnr_loss")(x, x.detach(), 1.0)
    theirs.backward()
    assert torch.isinf(theirs)
    assert not torch.isfinite(x.grad).all()
    value, slope = jax.value_and_grad(image.psnr_loss)(
        jnp.ones((1, 3, 4, 1)), jnp.ones((1, 3, 4, 1))
    )
    assert np.isfinite(value)
    np.testing.assert_array_equal(slope, 0)
