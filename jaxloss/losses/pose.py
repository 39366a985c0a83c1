"""Poses in two or three dimensions: position, velocity, bones, and position after alignment."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from .._core.case import Case, Draw, draw_normal
from .._core.checks import (
    check_float,
    check_integer,
    check_min_rank,
    check_option,
    check_same_shape,
    check_shape,
    check_where,
    message,
    require,
)
from .._core.compiled import compiled
from .._core.labels import poison, valid
from .._core.numerics import absolute, safe_div, safe_norm, unit_vectors, widen
from .._core.reduce import mask, reduce
from .._core.sharding import one_hot
from .._core.typing import Reduction, Values, Where

__all__ = ["bone_length_loss", "mpjpe_loss", "procrustes_mpjpe_loss", "velocity_loss"]


@compiled()
def mpjpe_loss(
    pred: Float[Array, "*batch joints dim"],
    target: Shaped[Array, "*batch joints dim"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean per joint position error: the distance to the target, in the unit of the coordinates.

    $$ \ell = |\hat y - y|_2 $$

    A perfect joint has gradient 0.

    Args:
        pred: Predicted coordinates.
        target: Coordinates of the same shape; `where` hides invisible joints.

    One unit per joint; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch joints` if `reduction` is `"none"`.

    Reference:
        Ionescu et al., Human3.6M: Large Scale Datasets and Predictive Methods for 3D Human Sensing
        in Natural Environments, TPAMI 2014. Equals mmpose's `MPJPELoss` while all joints are
        visible.

    >>> mpjpe_loss(jnp.array([[[3.0, 4.0]]]), jnp.zeros((1, 1, 2)))
    Array(5., dtype=float32)
    """
    pred, target = _poses(pred, target, where, rank=2)
    return reduce(safe_norm(pred - target), where=where, weights=weights, reduction=reduction)


@compiled()
def velocity_loss(
    pred: Float[Array, "*batch time joints dim"],
    target: Shaped[Array, "*batch time joints dim"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Distance between predicted and true velocity of each joint, in coordinates per frame.

    $$ \ell_t = |(\hat y_{t+1} - \hat y_t) - (y_{t+1} - y_t)|_2 $$

    A pair of frames counts if the joint is visible in both. A perfect velocity has gradient 0.

    Args:
        pred: Predicted coordinates.
        target: Coordinates of the same shape; `where`, of shape `*batch time joints`, hides
            invisible joints.

    One unit per joint and pair of frames, `*batch time-1 joints`; see `jaxloss.reduce`.

    Returns:
        A float32 scalar, or `*batch time-1 joints` if `reduction` is `"none"`.

    Reference:
        Pavllo et al., 3D human pose estimation in video with temporal convolutions and
        semi-supervised training, CVPR 2019, whose `mean_velocity_error` this is.

    >>> pred, target = jnp.array([[[0.0]], [[5.0]]]), jnp.array([[[1.0]], [[2.0]]])
    >>> velocity_loss(pred, target)  # 5 against 1
    Array(4., dtype=float32)
    """
    pred, target = _poses(pred, target, where, rank=3)
    error = pred - target
    values = safe_norm(error[..., 1:, :, :] - error[..., :-1, :, :])
    units = None if where is None else where[..., 1:, :] & where[..., :-1, :]
    return reduce(values, where=units, weights=weights, reduction=reduction)


@compiled()
def bone_length_loss(
    pred: Float[Array, "*batch joints dim"],
    target: Shaped[Array, "*batch joints dim"],
    parents: Int[Array, " joints"],
    *,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Mean absolute error of the lengths of the bones, in the unit of the coordinates.

    $$ \ell = \frac{1}{|B|} \sum_{(j, p) \in B}
       \left| |\hat y_j - \hat y_p| - |y_j - y_p| \right| $$

    over the bones $B$, from joint $j$ to its parent $p$, of which both ends are visible.

    Args:
        pred: Predicted coordinates.
        target: Coordinates of the same shape; `where`, of shape `*batch joints`, hides invisible
            joints.
        parents: Index of the parent of each joint; a root is its own parent and no bone. An index
            outside the joints makes every pose NaN in which its joint is visible.

    One unit per pose; see `jaxloss.reduce`. A pose without a visible bone is no unit.

    Returns:
        A float32 scalar, or `*batch` if `reduction` is `"none"`.

    Reference:
        Sun et al., Compositional Human Pose Regression, ICCV 2017, for bones instead of joints.
        mmpose's `BoneLoss` and Pavllo et al., CVPR 2019, compare the lengths after averaging them
        over the batch.

    >>> pred, target = jnp.array([[0.0, 0.0], [3.0, 4.0]]), jnp.array([[0.0, 0.0], [2.0, 0.0]])
    >>> bone_length_loss(pred, target, jnp.array([0, 0]))  # 5 against 2
    Array(3., dtype=float32)
    """
    check_integer(parents=parents)
    pred, target = _poses(pred, target, where, rank=2)
    joints = pred.shape[-2]
    check_shape((joints,), parents=parents)
    ok = valid(parents, joints)
    require(lambda: ok, "parents", f"values in [0, {joints})")
    visible = jnp.ones(pred.shape[:-1], bool) if where is None else jnp.asarray(where)
    over = lambda x: x.reshape((1,) * (visible.ndim - 1) + x.shape)
    link = over(one_hot(parents, joints))  # from each joint to its parent
    child = over(parents != jnp.arange(joints, dtype=parents.dtype))
    loose = visible & ~over(ok)
    bone = (visible & child & jnp.any(link & visible[..., None, :], axis=-1)) | loose
    vectors = [_bones(x, link, bone) for x in (pred, target)]
    error = absolute(safe_norm(vectors[0]) - safe_norm(vectors[1]))
    error = jnp.where(jnp.all(vectors[0] == vectors[1], axis=-1), 0, error)  # no rounding there
    error = poison(error, ~loose)
    count = jnp.sum(bone, axis=-1, dtype=pred.dtype)
    values = safe_div(jnp.sum(error, axis=-1), count)
    return reduce(values, where=count > 0, weights=weights, reduction=reduction)


@compiled("stop_gradient_transform")
def procrustes_mpjpe_loss(
    pred: Float[Array, "*batch joints dim"],
    target: Shaped[Array, "*batch joints dim"],
    *,
    stop_gradient_transform: bool = True,
    where: Where | None = None,
    weights: Values | None = None,
    reduction: Reduction = "mean",
) -> Array:
    r"""Distance of each joint after the best rotation, scaling and shift of the pose (PA-MPJPE).

    $$ \ell_j = |a R \hat y_j + t - y_j|_2, \qquad
       (a, R, t) = \arg\min \sum_j |a R \hat y_j + t - y_j|^2 $$

    over the visible joints, with $\det R = 1$: a mirrored pose does not fit. A pose whose visible
    joints coincide is scaled by 0. In three dimensions, visible joints on one line leave the
    rotation about it free, which changes no distance.

    Args:
        pred: Predicted coordinates in two or three dimensions.
        target: Coordinates of the same shape; `where` hides invisible joints.
        stop_gradient_transform: Whether the gradient takes the transform as given. Otherwise it
            flows through it, except through a rotation that the joints hardly determine.

    One unit per joint; see `jaxloss.reduce`. `weights` do not change the transform.

    Returns:
        A float32 scalar, or `*batch joints` if `reduction` is `"none"`.

    Reference:
        Horn, Closed-form solution of absolute orientation using unit quaternions, JOSA A 1987;
        Pavllo et al., 3D human pose estimation in video with temporal convolutions and
        semi-supervised training, CVPR 2019, whose `p_mpjpe` allows no gradient. Equals what
        SciPy's `procrustes` leaves, up to its normalisation, where its best map is no reflection.

    >>> target = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> pred = 3 * target @ jnp.array([[0.0, 1.0], [-1.0, 0.0]]) + 5  # turned, grown and moved
    >>> bool(procrustes_mpjpe_loss(pred, target) < 1e-6)
    True
    """
    check_option((False, True), stop_gradient_transform=stop_gradient_transform)
    pred, target = _poses(pred, target, where, rank=2)
    if pred.shape[-1] not in (2, 3):
        raise ValueError(message("pred", "2 or 3 coordinates", f"shape {pred.shape}"))
    visible = jnp.ones(pred.shape[:-1], bool) if where is None else jnp.asarray(where)
    visible = visible[..., None]
    fixed = jax.lax.stop_gradient if stop_gradient_transform else lambda x: x
    (x, mean, size), (y, target_mean, target_size) = (
        _centered(fixed(a), visible) for a in (pred, target)
    )
    rotation = _best_rotation(_product("...ji,...jk->...ik", y, x))
    turn = lambda x: _product("...ik,...jk->...ji", rotation, x)
    overlap = jnp.sum(turn(x) * y, axis=(-2, -1), keepdims=True)
    scale = safe_div(overlap, jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    aligned = target_size * scale * turn((pred - mean) / size) + target_mean
    error = jnp.where(visible, aligned - target, 0)
    values = safe_norm(jnp.where(_is_rounding(error, aligned, target), 0, error))
    return reduce(values, where=where, weights=weights, reduction=reduction)


def _poses(pred: Array, target: Any, where: Where | None, rank: int) -> tuple[Array, Array]:
    """Checked, masked and widened; `where` covers all axes but the last."""
    check_float(pred=pred)
    check_min_rank(rank, pred=pred)
    check_same_shape(pred=pred, target=target)
    if where is not None:
        check_where(where)
        check_shape(pred.shape[:-1], where=where)
    pred, target = mask(where, *widen(pred, target))
    return pred, target


def _bones(x: Array, link: Array, bone: Array) -> Array:
    """The vector to each joint from its parent, 0 where there is no bone."""
    parent = jnp.sum(jnp.where(link[..., None], x[..., None, :, :], 0), axis=-2)
    return jnp.where(bone[..., None], x - parent, 0)


def _centered(x: Array, visible: Array) -> tuple[Array, Array, Array]:
    """Visible joints about their mean and of largest coordinate 1, that mean and that size."""
    count = jnp.sum(visible, axis=-2, keepdims=True, dtype=x.dtype)
    mean = safe_div(jnp.sum(x, axis=-2, keepdims=True), count)
    x = jnp.where(visible, x - mean, 0)
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=(-2, -1), keepdims=True, initial=0)
    size = jnp.where((largest == 0) | ~jnp.isfinite(largest), 1, largest)
    return x / size, mean, size


def _is_rounding(error: Array, *places: Array) -> Array:
    """Whether an error of a joint is what rounding leaves of an exact fit, whose slope is noise."""
    size = sum(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0) for x in places)
    small = 8 * jnp.finfo(error.dtype).eps * jnp.asarray(size)
    return jnp.all(jnp.abs(error) <= small, axis=-1, keepdims=True)


def _best_rotation(moments: Array) -> Array:
    """The rotation R of largest trace(R^T M), for matrices of two or three dimensions."""
    if moments.shape[-1] == 2:
        m = moments
        vector = jnp.stack([m[..., 0, 0] + m[..., 1, 1], m[..., 1, 0] - m[..., 0, 1]], axis=-1)
        cos, sin = jnp.moveaxis(unit_vectors(vector), -1, 0)
        return jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    return _rotation(moments)


@jax.custom_jvp
def _rotation(moments: Array) -> Array:
    """Three dimensions: from the quaternion that is the leading eigenvector of Horn's matrix."""
    horn = _product("abij,...ij->...ab", _QUATERNION, moments)
    size = jnp.sum(jnp.abs(horn), axis=(-2, -1), keepdims=True)
    power = safe_div(horn, size) + _eye(horn)

    def square(_: int, power: Array) -> Array:
        power = _product("...ab,...bc->...ac", power, power)
        return power / jnp.max(jnp.abs(power), axis=(-2, -1), keepdims=True)

    power = jax.lax.fori_loop(0, 40, square, power)  # projects onto the leading eigenvectors
    best = one_hot(jnp.argmax(jnp.diagonal(power, axis1=-2, axis2=-1), axis=-1), 4)
    q = unit_vectors(jnp.sum(jnp.where(best[..., None, :], power, 0), axis=-1))
    rotation = _product("abij,...a,...b->...ij", _QUATERNION, q, q)
    p = _product("...ki,...kj->...ij", rotation, moments)
    return rotation + _turned(rotation, p, p)  # a step of Newton's method towards symmetric p


@_rotation.defjvp
def _rotation_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (moments,), (moved,) = primals, tangents
    rotation = _rotation(moments)
    p, q = (_product("...ki,...kj->...ij", rotation, m) for m in (moments, moved))
    return rotation, _turned(rotation, p, q)


def _turned(rotation: Array, p: Array, change: Array) -> Array:
    """How R moves when P = R^T M, which it keeps symmetric, would otherwise change by `change`.

    dR = R [w] with (trace(P) - P) w = axis(change - change^T); 0 where that hardly has a solution.
    """
    trace = jnp.trace(p, axis1=-2, axis2=-1)[..., None, None]
    a = trace * _eye(p) - 0.5 * (p + jnp.swapaxes(p, -1, -2))
    a2 = _product("...ij,...jk->...ik", a, a)
    a2_trace = jnp.trace(a2, axis1=-2, axis2=-1)[..., None, None]
    adjugate = a2 - 2 * trace * a + (2 * trace**2 - 0.5 * a2_trace) * _eye(p)
    determinant = jnp.sum(a * adjugate, axis=(-2, -1)) / 3
    free = determinant <= 32 * jnp.finfo(p.dtype).eps * trace[..., 0, 0] ** 3
    w = _product("...ij,jkl,...kl->...i", adjugate, -_CROSS, change)
    w = jnp.where(free[..., None], 0, w / jnp.where(free, 1, determinant)[..., None])
    return _product("...ij,jkl,...l->...ik", rotation, -_CROSS, w)


def _eye(like: Array) -> Array:
    """The unit matrix, of the rank, size and dtype of `like`."""
    size = like.shape[-1]
    return jnp.eye(size, dtype=like.dtype).reshape((1,) * (like.ndim - 2) + (size, size))


def _product(form: str, *factors: Any) -> Array:
    """An `einsum` in full precision, with constants in the dtype of the last factor."""
    factors = tuple(jnp.asarray(f, factors[-1].dtype) for f in factors)
    return jnp.einsum(form, *factors, precision="highest")


_CROSS = np.zeros((3, 3, 3))  # [w] = -_CROSS w
_CROSS[(0, 1, 2), (1, 2, 0), (2, 0, 1)] = 1
_CROSS[(0, 2, 1), (2, 1, 0), (1, 0, 2)] = -1
_QUATERNION = np.zeros((4, 4, 3, 3))  # R = sum over a, b of q_a q_b _QUATERNION[a, b]
_QUATERNION[1:, 1:] = np.einsum("ki,lj->klij", np.eye(3), np.eye(3))
_QUATERNION[1:, 1:] += np.einsum("kj,li->klij", np.eye(3), np.eye(3))
_QUATERNION[1:, 1:] -= np.einsum("kl,ij->klij", np.eye(3), np.eye(3))
_QUATERNION[0, 0] = np.eye(3)
_QUATERNION[0, 1:] = _QUATERNION[1:, 0] = -np.moveaxis(_CROSS, -1, 0)


def _tree(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
    return np.array([0, *(g.integers(0, i) for i in range(1, shape[0]))], np.int32)


def _skeleton(spread: float) -> Draw:
    """One pose with joints `spread` beside their places: nearly, not exactly, a fit of another."""

    def sample(g: np.random.Generator, shape: tuple[int, ...], _: Any) -> np.ndarray:
        axes = np.eye(shape[-1])
        moves = g.standard_normal(shape)
        moves *= spread / np.linalg.norm(moves, axis=-1, keepdims=True)
        return 2 * np.resize([axes, -axes], shape[-2:]) + moves

    return Draw("B T D", sample)


_MAGNIFIED = "the direction of a short residual magnifies the rounding of the fit"
_ALIKE = dict(pred=_skeleton(1.5), target=_skeleton(0.3))
_POSES = dict(pred=draw_normal("B T D"), target=draw_normal("B T D"))
_VIDEOS = dict(pred=draw_normal("B T V D"), target=draw_normal("B T V D"))

CASES = (
    Case(mpjpe_loss, _POSES, sizes=dict(D=3), zero_at_target=True),
    Case(velocity_loss, _VIDEOS, positions="B T V", sizes=dict(T=4, D=2), zero_at_target=True),
    Case(
        bone_length_loss,
        dict(**_POSES, parents=Draw("T", _tree, "fixed")),
        positions="B T",
        sizes=dict(D=3),
        zero_at_target=True,
    ),
    Case(
        procrustes_mpjpe_loss,
        _ALIKE,
        sizes=dict(T=8, D=3),
        without={
            "numerical": "no gradient flows through the transform",
            "gradient_accuracy": _MAGNIFIED,
        },
    ),
    Case(
        procrustes_mpjpe_loss,
        _ALIKE,
        dict(stop_gradient_transform=False),
        "flowing",
        sizes=dict(T=8, D=3),
        without={"gradient_accuracy": _MAGNIFIED},
    ),
)
