"""Region losses against MONAI, kornia, smp (segmentation-models-pytorch), optax and others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxloss.criteria import segmentation as criteria
from jaxloss.losses import (
    classification,
    focal,
    segmentation,
    segmentation_boundary,
    segmentation_compound,
    segmentation_lovasz,
    segmentation_masks,
)
from jaxloss.testing import Draw, draw_binary, draw_labels, draw_normal, draw_probs, draw_unit
from parity.peers import Row, check, peer, require_peer

SIZES = ({"H": 4, "W": 5}, {"B": 1, "C": 2, "H": 3, "W": 2}, {"B": 5, "C": 7, "H": 6, "W": 3})
MAP = dict(probs=draw_probs("B H W C"), target=draw_labels("B H W"))
MASKS = dict(probs=draw_unit("B H W C"), target=draw_binary("B H W C"))
SOFT = dict(probs=draw_unit("B H W C"), target=draw_unit("B H W C"))
LOGITS = dict(logits=draw_normal("B H W C", scale=2), target=draw_labels("B H W"))
VOLUME = dict(probs=draw_probs("B H W T C"), target=draw_labels("B H W T"))


def every_class(g: np.random.Generator, shape: Any, sizes: Any) -> np.ndarray:
    """Labels among which each class occurs in each sample."""
    count = int(np.prod(shape[1:]))
    rows = [g.permutation(np.arange(count) % sizes["C"]) for _ in range(shape[0])]
    return np.stack(rows).reshape(shape).astype(np.int32)


PRESENT = Draw("B H W", every_class, "fixed")


def first(x: Any) -> Any:
    """Classes before space, as torch has them."""
    return x.movedim(-1, 1)


def row(loss: Any, name: str, ours: Any, theirs: Any, draws: Any = MAP, **options: Any) -> Row:
    """`ours(loss, a, b)` against `theirs(name, a, b)`, differentiated in the prediction."""
    options.setdefault("differentiate", (next(iter(draws)),))
    options.setdefault("sizes", SIZES)
    return Row(
        loss=loss.__name__,
        peer=name,
        ours=lambda **arrays: ours(loss, *arrays.values()),
        theirs=lambda **arrays: theirs(peer(name), *arrays.values()),
        draws=draws,
        **options,
    )


def monai(loss: Any, name: str, config: Any, theirs: Any, draws: Any = MAP, **options: Any) -> Row:
    """Units of both, (batch, classes) or (batch,), with the same arrays."""
    labels = draws["target"].dims.split()[-1] != "C"

    def call(function: Any, probs: Any, target: Any) -> Any:
        target = target[:, None] if labels else first(target)
        units = function(**theirs, to_onehot_y=labels, reduction="none")(first(probs), target)
        return units.reshape(units.shape[:2] if units.shape[1] > 1 else -1)

    return row(
        loss,
        f"monai.losses.{name}",
        lambda f, p, t: f(p, t, reduction="none", **config),
        call,
        draws,
        **options,
    )


def smooth(s: float) -> dict[str, float]:
    return dict(smooth_nr=s, smooth_dr=s)


dice, tversky, jaccard = (
    segmentation.dice_loss,
    segmentation.tversky_loss,
    segmentation.jaccard_loss,
)
generalized, mcc = segmentation.generalized_dice_loss, segmentation.mcc_loss
lovasz = segmentation_lovasz.lovasz_softmax_loss
hinge = segmentation_lovasz.lovasz_hinge_loss
present = segmentation.class_present
softmax = jax.nn.softmax
SINGLE = ("float32",)
SQUARED = dict(squared_pred=True)
WEIGHTED = dict(alpha=0.3, beta=0.8)

MONAI = [
    monai(dice, "DiceLoss", dict(smooth=0.5), smooth(0.5)),
    monai(dice, "DiceLoss", {}, smooth(1), VOLUME, label="3-D"),
    monai(
        dice,
        "DiceLoss",
        dict(squared=True),
        {**smooth(1), **SQUARED},
        label="squared",
        dtypes=SINGLE,
        note="float32 inside",
    ),
    monai(dice, "DiceLoss", {}, smooth(1), MASKS, label="masks"),
    monai(
        dice,
        "DiceLoss",
        {},
        dict(**smooth(1), soft_label=True),
        SOFT,
        label="memberships",
        note="`soft_label=True`",
    ),
    monai(
        jaccard,
        "DiceLoss",
        dict(smooth=0.5),
        dict(**smooth(1), jaccard=True),
        label="jaccard",
        note="`jaccard=True`; their smoothing is twice ours",
    ),
    row(
        dice,
        "monai.losses.DiceLoss",
        lambda f, p, t: f(p.reshape(1, -1, p.shape[-1]), t.reshape(1, -1), reduction="none")[0],
        lambda f, p, t: f(to_onehot_y=True, batch=True, **smooth(1), reduction="none")(
            first(p), t[:, None]
        ).flatten(),
        label="batch",
        note="`batch=True` is one sample of all positions",
    ),
    row(
        dice,
        "monai.losses.DiceLoss",
        lambda f, p, t: f(p[..., 1:], jax.nn.one_hot(t, p.shape[-1], dtype=p.dtype)[..., 1:]),
        lambda f, p, t: f(to_onehot_y=True, include_background=False, **smooth(1))(
            first(p), t[:, None]
        ),
        label="no background",
    ),
    row(
        dice,
        "monai.losses.MaskedDiceLoss",
        lambda f, p, t: f(p, t, where=p[..., 0] > 0.2, smooth=1.0),
        lambda f, p, t: f(to_onehot_y=False, **smooth(1))(
            first(p), hot(t, p), mask=(p[..., 0] > 0.2)[:, None]
        ),
        note="`where` hides positions",
    ),
    monai(tversky, "TverskyLoss", dict(WEIGHTED, smooth=0.5), {**WEIGHTED, **smooth(0.5)}),
    monai(
        tversky,
        "TverskyLoss",
        WEIGHTED,
        dict(**WEIGHTED, **smooth(1), soft_label=True),
        SOFT,
        label="memberships",
    ),
    *[
        monai(
            generalized,
            "GeneralizedDiceLoss",
            dict(power=power, smooth=0.1),
            dict(w_type=kind, **smooth(0.1)),
            label=kind,
            note=f'`w_type="{kind}"` is power {power:g}; float32 inside',
            dtypes=SINGLE,
        )
        for power, kind in ((2.0, "square"), (1.0, "simple"), (0.0, "uniform"))
    ],
    monai(mcc, "MCCLoss", {}, dict(smooth_nr=0.0, smooth_dr=1e-30), dict(MAP, target=PRESENT)),
    row(
        segmentation_boundary.boundary_loss,
        "monai.losses.BoundaryLoss",
        lambda f, p, t: f(
            p,
            segmentation_boundary.signed_distance_map(jax.nn.one_hot(t, p.shape[-1]) > 0),
            reduction="none",
        ),
        lambda f, p, t: f(to_onehot_y=True, reduction="none")(first(p), t[:, None]),
        note="the map comes from `signed_distance_map`",
    ),
    row(
        segmentation_boundary.soft_cldice_loss,
        "monai.losses.SoftclDiceLoss",
        lambda f, p, t: f(p, t, iterations=2, reduction="none")[:, 0],
        lambda f, p, t: f(iter_=2, smooth=1e-30, reduction="none")(first(p), first(t)),
        SOFT,
        sizes=tuple({**s, "C": 1} for s in SIZES),
        differentiate=("probs", "target"),
        note="one class; their `smooth` is 0",
    ),
]


def hot(target: Any, probs: Any) -> Any:
    """One-hot labels as torch has them."""
    torch = require_peer("torch")
    return first(torch.nn.functional.one_hot(target, probs.shape[-1])).to(probs.dtype)


def dice_ce(f: Any, logits: Any, target: Any) -> Any:
    probs = softmax(logits)
    return f(probs, target) + classification.softmax_cross_entropy(logits, target)


def with_focal(f: Any, logits: Any, target: Any, **options: Any) -> Any:
    onehot = jax.nn.one_hot(target, logits.shape[-1], dtype=logits.dtype)
    return f(softmax(logits), target, **options) + focal.sigmoid_focal_loss(logits, onehot)


RECIPES = [
    row(
        dice,
        "monai.losses.DiceCELoss",
        dice_ce,
        lambda f, z, t: f(softmax=True, to_onehot_y=True, **smooth(1))(first(z), t[:, None]),
        LOGITS,
        note="`dice_loss(probs, y) + softmax_cross_entropy(logits, y)`",
    ),
    row(
        dice,
        "monai.losses.DiceFocalLoss",
        with_focal,
        lambda f, z, t: f(softmax=True, to_onehot_y=True, **smooth(1))(first(z), t[:, None]),
        LOGITS,
        dtypes=SINGLE,
        note="`dice_loss(probs, y) + sigmoid_focal_loss(logits, onehot)`; float32 inside",
    ),
    row(
        generalized,
        "monai.losses.GeneralizedDiceFocalLoss",
        lambda f, z, t: with_focal(f, z, t, smooth=0.5),
        lambda f, z, t: f(softmax=True, to_onehot_y=True, **smooth(0.5))(first(z), t[:, None]),
        LOGITS,
        dtypes=SINGLE,
        note="with `sigmoid_focal_loss(logits, onehot)` added; float32 inside",
    ),
]


def torch_iou(_: Any, logits: Any, target: Any) -> Any:
    """Cross-entropy and soft Jaccard of each image, written out in torch."""
    torch = require_peer("torch")
    entropy = torch.nn.functional.cross_entropy(first(logits), target, reduction="none")
    probs, truth = first(logits).softmax(1).flatten(2), hot(target, logits).flatten(2)
    overlap = (probs * truth).sum(2)
    union = (probs + truth).sum(2) - overlap
    return 0.5 * entropy.flatten(1).mean(1) + 0.5 * (1 - (overlap + 1) / (union + 1)).mean(1)


OTHERS = [
    row(
        criteria.cross_entropy_iou_loss,
        "torch.nn.functional.cross_entropy",
        lambda f, z, t: f(z, t, reduction="none"),
        torch_iou,
        LOGITS,
        label="with IoU",
        note="half cross-entropy, half soft Jaccard, for each image",
    ),
    row(
        dice,
        "optax.losses.dice_loss",
        lambda f, z, t: f(softmax(z), t, smooth=1.0, reduction="none").mean(axis=-1),
        lambda f, z, t: f(z, jax.nn.one_hot(t, z.shape[-1], dtype=z.dtype), smooth=0.5),
        LOGITS,
        note="their `smooth` is half of ours",
    ),
    row(
        dice,
        "keras.losses.dice",
        lambda f, p, t: f(p.reshape(1, -1, 1), t.reshape(1, -1, 1), smooth=0.0),
        lambda f, p, t: f(t, p),
        MASKS,
        note="sums over everything; `smooth=0`",
    ),
    row(
        tversky,
        "keras.losses.tversky",
        lambda f, p, t: f(p, t, alpha=0.8, beta=0.3, smooth=0.0, reduction="none"),
        lambda f, p, t: f(t, p, alpha=0.3, beta=0.8, axis=(1, 2)),
        MASKS,
        note="`alpha` and `beta` exchanged; `smooth=0`",
    ),
    row(
        dice,
        "kornia.losses.dice_loss",
        lambda f, z, t: f(softmax(z), t, smooth=0.0),
        lambda f, z, t: f(first(z), t, average="macro", eps=0.0),
        dict(LOGITS, target=PRESENT),
        label="macro",
        note="`smooth=0`; absent classes are skipped there",
    ),
    row(
        tversky,
        "kornia.losses.tversky_loss",
        lambda f, z, t: f(softmax(z), t, alpha=0.3, beta=0.8, smooth=0.0),
        lambda f, z, t: f(first(z), t, alpha=0.3, beta=0.8, eps=0.0),
        dict(LOGITS, target=PRESENT),
        note="`smooth=0`; absent classes are skipped there",
    ),
    row(
        dice,
        "segmentation_models_pytorch.losses.DiceLoss",
        lambda f, p, t: one_sample(f, p, t, smooth=1.0),
        lambda f, p, t: f("multiclass", from_logits=False, smooth=0.5)(first(p), t),
        dict(MAP, target=PRESENT),
        note="the batch is one sample; their `smooth` is half; absent classes count 0 there",
    ),
    row(
        dice,
        "segmentation_models_pytorch.losses.DiceLoss",
        lambda f, p, t: one_sample(
            f, p, t, smooth=1.0, ignore_index=1, present=True, reduction="none"
        ).mean(),
        lambda f, p, t: f("multiclass", from_logits=False, smooth=0.5, ignore_index=1)(first(p), t),
        dict(MAP, target=PRESENT),
        label="ignoring",
        note="an absent class counts 0 there",
    ),
    row(
        jaccard,
        "segmentation_models_pytorch.losses.JaccardLoss",
        lambda f, p, t: one_sample(f, p, t, smooth=1.0),
        lambda f, p, t: f("multiclass", from_logits=False, smooth=1.0)(first(p), t),
        dict(MAP, target=PRESENT),
        note="the batch is one sample; absent classes count 0 there",
    ),
    row(
        tversky,
        "segmentation_models_pytorch.losses.TverskyLoss",
        lambda f, p, t: one_sample(f, p, t, smooth=0.5, alpha=0.3, beta=0.8),
        lambda f, p, t: f("multiclass", from_logits=False, smooth=0.5, alpha=0.3, beta=0.8)(
            first(p), t
        ),
        dict(MAP, target=PRESENT),
        note="the batch is one sample; absent classes count 0 there",
    ),
    row(
        segmentation.focal_tversky_loss,
        "segmentation_models_pytorch.losses.TverskyLoss",
        lambda f, p, t: f(p.reshape(1, -1, 1), t.reshape(1, -1, 1), smooth=0.5),
        lambda f, p, t: f("binary", from_logits=False, smooth=0.5, alpha=0.3, beta=0.7, gamma=0.75)(
            p.flatten()[None, None], t.flatten()[None, None]
        ),
        MASKS,
        label="gamma",
        note="their `gamma` is the power of the mean, the inverse of ours for one class",
    ),
    row(
        lovasz,
        "kornia.losses.lovasz_softmax_loss",
        lambda f, z, t: f(softmax(z), t),
        lambda f, z, t: f(first(z), t),
        LOGITS,
        note="takes logits",
    ),
    row(
        lovasz,
        "segmentation_models_pytorch.losses.LovaszLoss",
        lambda f, z, t: per_image(f, softmax(z), t),
        lambda f, z, t: f("multiclass", per_image=True)(first(z), t),
        LOGITS,
        dtypes=SINGLE,
        note="mean over the classes present, then over images",
    ),
    row(
        lovasz,
        "segmentation_models_pytorch.losses.LovaszLoss",
        lambda f, z, t: one_sample(f, softmax(z), t, ignore_index=1, present=True),
        lambda f, z, t: f("multiclass", per_image=False, ignore_index=1)(first(z), t),
        LOGITS,
        dtypes=SINGLE,
        label="batch, ignoring",
        note="`weights=class_present(...)` on one sample of all positions",
    ),
    row(
        hinge,
        "kornia.losses.lovasz_hinge_loss",
        lambda f, z, t: f(z, t),
        lambda f, z, t: f(z[:, None], t.long()),
        dict(logits=draw_normal("B H W", scale=2), target=draw_binary("B H W")),
    ),
    row(
        hinge,
        "segmentation_models_pytorch.losses.LovaszLoss",
        lambda f, z, t: f(z, t),
        lambda f, z, t: f("binary", per_image=True)(z, t),
        dict(logits=draw_normal("B H W", scale=2), target=draw_binary("B H W")),
        label="binary",
        dtypes=SINGLE,
    ),
    row(
        mcc,
        "sklearn.metrics.matthews_corrcoef",
        lambda f, p, t: 1 - f(p.reshape(1, -1, 1), t.reshape(1, -1, 1)),
        lambda f, p, t: np.float64(f(t.ravel(), p.ravel())),
        dict(probs=draw_binary("B H W"), target=draw_binary("B H W")),
        differentiate=(),
        note="of hard masks; ours is one minus it",
    ),
]


def to_boundary(masks: Any) -> Any:
    """MONAI's unsigned distances, from our signed ones: those inside count from 1."""
    signed = segmentation_boundary.signed_distance_map(masks)
    some = jnp.any(signed != 0, axis=(1, 2), keepdims=True) | jnp.any(
        masks != masks[:, :1, :1], axis=(1, 2), keepdims=True
    )
    return jnp.where(some, jnp.where(masks, 1 - signed, signed), 0)


def object_masks(f: Any, logits: Any, masks: Any, labels: Any) -> Any:
    torch = require_peer("torch")
    chosen = logits[torch.arange(len(labels)), ..., labels]
    return f(chosen, masks, reduction="none").flatten(1).mean(1)


METRIC = np.array([[0, 1, 1, 1], [1, 0, 0.2, 0.5], [1, 0.2, 0, 0.3], [1, 0.5, 0.3, 0]], np.float32)
FOUR = ({"H": 4, "W": 5}, {"B": 1, "H": 3, "W": 2})
TWO = tuple({**s, "C": 2} for s in SIZES)
dt, er = segmentation_boundary.hausdorff_dt_loss, segmentation_boundary.hausdorff_er_loss
unified = segmentation_compound.asymmetric_unified_focal_loss
wasserstein = segmentation_compound.generalized_wasserstein_dice_loss

RARER = [
    row(
        dt,
        "monai.losses.HausdorffDTLoss",
        lambda f, p, t: f(
            p, t, to_boundary(p > 0.5), to_boundary(t > 0.5), alpha=1.5, reduction="none"
        ),
        lambda f, p, t: f(alpha=1.5, include_background=True, reduction="none")(
            first(p), first(t)
        ).flatten(1),
        MASKS,
        dtypes=SINGLE,
        note="takes the distances; float32 inside",
    ),
    row(
        er,
        "kornia.losses.HausdorffERLoss",
        lambda f, p, t: f(p, t, alpha=1.5, iterations=3),
        lambda f, p, t: f(alpha=1.5, k=3)(first(p), t[:, None]),
        MAP,
        dtypes=SINGLE,
        tolerance={"float32": 1e-4},
        note="`k` is `iterations`; the stretch magnifies rounding",
    ),
    row(
        er,
        "kornia.losses.HausdorffERLoss3D",
        lambda f, p, t: f(p, t, iterations=2),
        lambda f, p, t: f(k=2)(first(p), t[:, None]),
        VOLUME,
        dtypes=SINGLE,
        tolerance={"float32": 1e-4},
        note="the stretch magnifies rounding",
    ),
    row(
        unified,
        "monai.losses.AsymmetricUnifiedFocalLoss",
        lambda f, p, t: f(p, t, weight=0.3, delta=0.6, gamma=0.4),
        lambda f, p, t: f(to_onehot_y=True, weight=0.3, delta=0.6, gamma=0.4)(first(p), t[:, None]),
        dict(MAP, target=PRESENT),
        sizes=TWO,
        dtypes=SINGLE,
        note="two classes; smoothing 1e-7",
    ),
    row(
        wasserstein,
        "monai.losses.GeneralizedWassersteinDiceLoss",
        lambda f, z, t: f(softmax(z), t, METRIC, smooth=0.1, reduction="none"),
        lambda f, z, t: f(METRIC, smooth_nr=0.1, smooth_dr=0.1, reduction="none")(
            first(z), t
        ).flatten(),
        LOGITS,
        sizes=FOUR,
        dtypes=SINGLE,
        note='`weighting_mode="default"`; takes logits',
    ),
    row(
        segmentation_masks.neighbor_aware_margin_loss,
        "monai.losses.NACLLoss",
        lambda f, z, t: f(z, t, kernel_size=3, margin_weight=0.3),
        lambda f, z, t: f(classes=z.shape[-1], dim=2, alpha=0.3)(first(z), t),
        LOGITS,
        dtypes=SINGLE,
        note='`kernel_ops="mean"`, `distance_type="l1"`',
    ),
    row(
        segmentation_masks.mask_cross_entropy,
        "torch.nn.functional.binary_cross_entropy_with_logits",
        lambda f, z, m, y: f(z, m, y, reduction="none"),
        object_masks,
        dict(
            logits=draw_normal("B H W C", scale=2),
            masks=draw_binary("B H W"),
            labels=draw_labels("B"),
        ),
        label="masks",
        note="of the labelled channel, averaged over each mask",
    ),
]


def one_sample(f: Any, probs: Any, target: Any, *, present: bool = False, **options: Any) -> Any:
    probs, target = probs.reshape(1, -1, probs.shape[-1]), target.reshape(1, -1)
    if present:
        kept = target != options["ignore_index"]
        options["weights"] = segmentation.class_present(target, probs.shape[-1], where=kept)
    return f(probs, target, **options)


def per_image(f: Any, probs: Any, target: Any) -> Any:
    shown = segmentation.class_present(target, probs.shape[-1])
    units = f(probs, target, weights=shown, reduction="none")
    return jnp.mean(units.sum(axis=-1) / shown.sum(axis=-1))


ROWS = (*MONAI, *RECIPES, *OTHERS, *RARER)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_values_and_gradients_agree(row: Row) -> None:
    check(row)
