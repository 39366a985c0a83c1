"""Regression losses against torch, optax, Keras, scikit-learn and SciPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import jaxloss
from jaxloss.testing import Draw, draw_counts, draw_normal, draw_signs, draw_uniform
from parity.peers import Row, check, peer

PAIR = dict(pred=draw_normal("B C", scale=2), target=draw_normal("B C", scale=2))
POSITIVE = dict(pred=draw_uniform("B C", 0.1, 5), target=draw_uniform("B C", 0.1, 5))
COUNTS = dict(log_rate=draw_normal("B C"), target=draw_counts("B C"))
LOCATED = dict(loc=draw_normal("B C"), log_scale=draw_normal("B C"), target=draw_normal("B C"))
GAUSSIAN = dict(mean=draw_normal("B C"), log_var=draw_normal("B C"), target=draw_normal("B C"))
ROWS_OF = dict(a=draw_normal("B D"), b=draw_normal("B D"))
SIGNED = {**ROWS_OF, "labels": draw_signs("B")}
WEIGHTED = {**PAIR, "weights": draw_uniform("B C", 0.5, 2)}


def row(
    name: str,
    loss: str,
    theirs: Callable[..., Any],
    draws: dict[str, Draw],
    *,
    config: dict[str, Any] | None = None,
    plain: bool = False,
    **options: Any,
) -> Row:
    """A row in which `theirs` gets the peer's function and the arrays; `plain` has no gradient."""
    function = peer(name)
    free = [n for n in draws if n not in ("labels", "weights")]

    def ours(**arrays: Any) -> Any:
        weights = {"weights": arrays.pop("weights")} if "weights" in arrays else {}
        return getattr(jaxloss, loss)(*arrays.values(), **weights, **(config or {}))

    return Row(
        loss=loss,
        peer=name,
        ours=ours,
        theirs=lambda **arrays: theirs(function, *arrays.values()),
        draws=draws,
        differentiate=() if plain else tuple(free),
        **options,
    )


NONE = dict(reduction="none")
F = "torch.nn.functional"


def reductions(name: str, loss: str, options: dict[str, Any], ours: dict[str, Any]) -> list[Row]:
    """One row for each reduction that torch has."""
    return [
        row(
            f"{F}.{name}",
            loss,
            lambda f, p, t, r=r: f(p, t, reduction=r, **options),
            PAIR,
            config={**ours, "reduction": r},
            label=r,
        )
        for r in ("none", "mean", "sum")
    ]


TORCH = [
    *reductions("mse_loss", "squared_error", {}, {}),
    *reductions("l1_loss", "absolute_error", {}, {}),
    *reductions("huber_loss", "huber_loss", dict(delta=0.5), dict(delta=0.5)),
    *reductions("smooth_l1_loss", "smooth_l1_loss", dict(beta=0.5), dict(beta=0.5)),
    row(
        f"{F}.smooth_l1_loss",
        "smooth_l1_loss",
        lambda f, p, t: f(p, t, beta=0.0),
        PAIR,
        config=dict(beta=0.0),
        label="beta 0",
    ),
    row(
        f"{F}.mse_loss",
        "squared_error",
        lambda f, p, t, w: f(p, t, weight=w),
        WEIGHTED,
        label="weights",
        note="divides by the sum of the weights, as here",
    ),
    row(
        f"{F}.l1_loss",
        "absolute_error",
        lambda f, p, t, w: f(p, t, weight=w),
        WEIGHTED,
        label="weights",
        note="divides by the sum of the weights, as here",
    ),
    row(
        f"{F}.huber_loss",
        "huber_loss",
        lambda f, p, t, w: f(p, t, weight=w),
        WEIGHTED,
        config=dict(reduction=jaxloss.mean_over_count),
        label="weights",
        note="divides by the count: `reduction=mean_over_count`",
    ),
    row(
        f"{F}.poisson_nll_loss",
        "poisson_nll_loss",
        lambda f, p, t: f(p, t, log_input=True, full=False, reduction="none"),
        COUNTS,
        config=NONE,
        note="`full=True` there is Stirling's approximation, here exact",
    ),
    *(
        row(
            f"{F}.gaussian_nll_loss",
            "gaussian_nll_loss",
            lambda f, m, v, t, full=full: f(m, t, v.exp(), full=full, eps=1e-12, reduction="none"),
            GAUSSIAN,
            config=dict(full=full, reduction="none"),
            label="full" if full else "",
            note="takes (mean, target, variance) and clamps the variance at eps",
        )
        for full in (False, True)
    ),
    row(
        f"{F}.cosine_similarity", "cosine_similarity", lambda f, a, b: f(a, b), ROWS_OF, config=NONE
    ),
    *(
        row(
            f"{F}.cosine_embedding_loss",
            "cosine_embedding_loss",
            lambda f, a, b, y, r=r: f(a, b, y, margin=0.1, reduction=r),
            SIGNED,
            config=dict(margin=0.1, reduction=r),
            label=r,
        )
        for r in ("none", "mean", "sum")
    ),
]


def unreduced(name: str, loss: str, **options: Any) -> Row:
    """A peer of optax that returns one value for each element."""
    return row(name, loss, lambda f, p, t: f(p, t, **options), PAIR, config={**NONE, **options})


OPTAX = [
    unreduced("optax.losses.squared_error", "squared_error"),
    unreduced("optax.losses.l2_loss", "l2_loss"),
    unreduced("optax.losses.huber_loss", "huber_loss", delta=0.5),
    row(
        "optax.losses.log_cosh",
        "log_cosh",
        lambda f, p, t: f(p, t),
        PAIR,
        config=NONE,
        note="inaccurate there for errors below 0.01",
    ),
    row(
        "optax.losses.cosine_similarity",
        "cosine_similarity",
        lambda f, a, b: f(a, b),
        ROWS_OF,
        config=NONE,
        note="a zero vector gives NaN there, 0 here",
    ),
    row(
        "optax.losses.cosine_distance",
        "cosine_distance",
        lambda f, a, b: f(a, b),
        ROWS_OF,
        config=NONE,
        note="a zero vector gives NaN there, 1 here",
    ),
]

LAST = "takes (target, pred) and averages the last axis"


def keras(name: str, loss: str, draws: dict[str, Draw], factor: float = 1, **options: Any) -> Row:
    """A peer of Keras, which takes the target first and averages the last axis."""
    function = peer(f"keras.losses.{name}")
    config = options.pop("config", {})
    given = options.pop("given", {})
    return Row(
        loss=loss,
        peer=f"keras.losses.{name}",
        ours=lambda pred, target: (
            getattr(jaxloss, loss)(pred, target, reduction="none", **config).mean(-1) * factor
        ),
        theirs=lambda pred, target: function(target, pred, **given),
        draws=draws,
        differentiate=("pred",),
        **{"note": LAST, **options},
    )


KERAS = [
    keras("mean_squared_error", "squared_error", PAIR),
    keras("mean_absolute_error", "absolute_error", PAIR),
    keras("huber", "huber_loss", PAIR, config=dict(delta=0.5), given=dict(delta=0.5)),
    keras("log_cosh", "log_cosh", PAIR),
    keras("mean_squared_logarithmic_error", "squared_logarithmic_error", POSITIVE),
    keras(
        "mean_absolute_percentage_error",
        "absolute_percentage_error",
        POSITIVE,
        100,
        note=f"{LAST}; in percent",
    ),
    Row(
        loss="poisson_nll_loss",
        peer="keras.losses.poisson",
        ours=lambda log_rate, target: jaxloss.poisson_nll_loss(
            log_rate, target, reduction="none"
        ).mean(-1),
        theirs=lambda log_rate, target: peer("keras.losses.poisson")(target, np.e**log_rate),
        draws=COUNTS,
        note=f"{LAST}; takes the rate, and adds 1e-7 inside the logarithm",
    ),
    Row(
        loss="cosine_similarity",
        peer="keras.losses.cosine_similarity",
        ours=lambda a, b: -jaxloss.cosine_similarity(a, b, reduction="none"),
        theirs=lambda a, b: peer("keras.losses.cosine_similarity")(b, a),
        draws=ROWS_OF,
        differentiate=("a", "b"),
        note="minus the similarity",
    ),
]


def sklearn(name: str, loss: str, draws: dict[str, Draw], **options: Any) -> list[Row]:
    """A metric of scikit-learn, with and without sample weights."""
    given, config = options.pop("given", {}), options.pop("config", {})
    flat = lambda x: np.asarray(x).ravel()
    rows = []
    for weighted in (False, True):
        extra = {"weights": draw_uniform("B C", 0.5, 2)} if weighted else {}

        def theirs(f: Any, p: Any, t: Any, w: Any = None) -> Any:
            sample = {} if w is None else {"sample_weight": flat(w)}
            return f(flat(t), flat(p), **sample, **given)

        rows.append(
            row(
                f"sklearn.metrics.{name}",
                loss,
                theirs,
                {**draws, **extra},
                config=config,
                plain=True,
                label="weights" if weighted else "",
                **options,
            )
        )
    return rows


FIRST = "takes (target, pred)"
SKLEARN = [
    *sklearn("mean_squared_error", "squared_error", PAIR, note=FIRST),
    *sklearn("mean_absolute_error", "absolute_error", PAIR, note=FIRST),
    *sklearn(
        "mean_pinball_loss",
        "quantile_loss",
        PAIR,
        given=dict(alpha=0.8),
        config=dict(quantile=0.8),
        note=FIRST,
    ),
    *sklearn("mean_squared_log_error", "squared_logarithmic_error", POSITIVE, note=FIRST),
    *sklearn("mean_absolute_percentage_error", "absolute_percentage_error", POSITIVE, note=FIRST),
    row(
        "sklearn.metrics.root_mean_squared_error",
        "root_mean_squared_error",
        lambda f, p, t: f(t.T, p.T, multioutput="raw_values"),
        PAIR,
        config=NONE,
        plain=True,
        note=f"{FIRST}; one value for each column there, for each row here",
    ),
]
SCIPY = [
    row(
        "scipy.special.huber",
        "huber_loss",
        lambda f, p, t: f(0.5, p - t),
        PAIR,
        config=dict(delta=0.5, reduction="none"),
        plain=True,
        note="takes (delta, error)",
    ),
    row(
        "scipy.special.pseudo_huber",
        "pseudo_huber_loss",
        lambda f, p, t: f(0.5, p - t),
        PAIR,
        config=dict(delta=0.5, reduction="none"),
        plain=True,
        note="takes (delta, error)",
    ),
    row(
        "scipy.stats.poisson.logpmf",
        "poisson_nll_loss",
        lambda f, p, t: -f(t, np.exp(p.astype(np.float64))),
        COUNTS,
        config=dict(full=True, reduction="none"),
        plain=True,
        note="minus the log density",
    ),
    row(
        "scipy.stats.norm.logpdf",
        "gaussian_nll_loss",
        lambda f, m, v, t: -f(t, m, np.exp(v / 2)),
        GAUSSIAN,
        config=dict(full=True, reduction="none"),
        plain=True,
        note="minus the log density",
    ),
    row(
        "scipy.stats.laplace.logpdf",
        "laplace_nll_loss",
        lambda f, m, s, t: -f(t, m, np.exp(s)),
        LOCATED,
        config=NONE,
        plain=True,
        note="minus the log density",
    ),
    row(
        "scipy.stats.t.logpdf",
        "student_t_nll_loss",
        lambda f, m, s, t: -f(t, 4.0, m, np.exp(s)),
        LOCATED,
        config=dict(df=4.0, reduction="none"),
        plain=True,
        note="minus the log density",
    ),
    row(
        "scipy.spatial.distance.cosine",
        "cosine_distance",
        lambda f, a, b: np.array([f(x, y) for x, y in zip(a, b, strict=True)]),
        ROWS_OF,
        config=NONE,
        plain=True,
    ),
]
ROWS = (*TORCH, *OPTAX, *KERAS, *SKLEARN, *SCIPY)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
