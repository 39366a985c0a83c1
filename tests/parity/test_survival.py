"""Partial likelihoods of survival times against statsmodels, lifelines and scikit-survival."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxloss.losses.survival import cox_ph_efron_loss, cox_ph_loss
from jaxloss.testing import Draw, draw_normal
from parity.peers import Row, check, peer

LOSSES = dict(breslow=cox_ph_loss, efron=cox_ph_efron_loss)
TIES = Draw("B", lambda g, s, _: g.integers(1, 2 + s[0] // 2, s).astype(float), "fixed")
EVENTS = Draw("B", lambda g, s, _: g.random(s) < 0.7, "fixed")
STRATA = Draw("B", lambda g, s, _: g.integers(0, 3, s, np.int32), "fixed")
SUBJECTS = dict(log_hazard=draw_normal("B", scale=2), time=TIES, event=EVENTS)
SIZES = ({}, {"B": 33})


def statsmodels(ties: str, method: str) -> Any:
    """With a parameter for each subject, its score is the gradient."""
    hazards = peer("statsmodels.duration.hazard_regression.PHReg")

    def call(log_hazard: Any, time: Any, event: Any, strata: Any = None) -> Any:
        model = hazards(time, np.eye(len(time)), status=event, strata=strata, ties=ties)
        return -np.asarray(getattr(model, method)(log_hazard.astype(np.float64)))

    return call


def scikit_survival(ties: str) -> Any:
    optimizer = peer("sksurv.linear_model.coxph.CoxPHOptimizer")

    def call(log_hazard: Any, time: Any, event: Any) -> Any:
        found = optimizer(log_hazard[:, None].astype(float), event, time, np.zeros(1), ties)
        return np.asarray(found.nlog_likelihood(np.ones(1)) * len(time))

    return call


def lifelines(method: int, sign: int) -> Any:
    fitter = peer("lifelines.fitters.coxph_fitter.SemiParametricPHFitter")
    frame, series = peer("pandas.DataFrame"), peer("pandas.Series")

    def call(log_hazard: Any, time: Any, event: Any) -> Any:
        order = np.argsort(time, kind="stable")
        found = fitter()._get_efron_values_single(
            frame(np.eye(len(time))[order]),
            series(time[order]),
            series(event[order]),
            series(np.ones(len(time))),
            None,
            log_hazard.astype(np.float64),
        )
        return sign * np.asarray(found[method])

    return call


def total(ties: str) -> Any:
    return lambda log_hazard, time, event, **rest: LOSSES[ties](
        log_hazard, time, event, reduction="sum", **rest
    )


def gradient(ties: str) -> Any:
    return lambda log_hazard, **rest: jax.grad(total(ties))(log_hazard, **rest)


def row(ties: str, name: str, ours: Any, theirs: Any, **rest: Any) -> Row:
    note = "minus the log-likelihood: `reduction='sum'`"
    options = dict(draws=SUBJECTS, note=note, sizes=SIZES) | rest
    return Row(LOSSES[ties].__name__, name, ours, theirs, **options)


PHREG = "statsmodels.duration.hazard_regression.PHReg"
ROWS = (
    *(
        row(
            ties,
            PHREG,
            of(ties),
            statsmodels(ties, method),
            draws=SUBJECTS | strata,
            label=" ".join(["strata"] * bool(strata) + [method]),
        )
        for ties in LOSSES
        for method, of in (("loglike", total), ("score", gradient))
        for strata in ({}, dict(strata=STRATA))
    ),
    *(
        row(ties, "sksurv.linear_model.coxph.CoxPHOptimizer", total(ties), scikit_survival(ties))
        for ties in LOSSES
    ),
    *(
        row(
            "efron",
            "lifelines.fitters.coxph_fitter.SemiParametricPHFitter",
            ours,
            lifelines(method, -1),
            label=label,
        )
        for label, method, ours in (
            ("gradient", 1, gradient("efron")),
            ("value", 2, total("efron")),
        )
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parity(row: Row) -> None:
    check(row)
