"""Windows of a weekly series with gaps, and the forecasts of them drawn as fans."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from .task import Examples

PAST, AHEAD = 104, 26  # weeks seen, weeks to foretell
PPM = 5.0  # parts per million in one unit of the model, which sees differences to the last week
FIRST, PER_YEAR = 1958.24, 52.18


def draw_windows(period: tuple[int, int], count: int, rng: np.random.Generator) -> Examples:
    """Windows of the carbon dioxide over Mauna Loa from some years.

    Inputs are `(n, past)` with gaps filled by straight lines; targets `value (n, ahead)` and
    `known (n, ahead)`, whether the week was measured.
    """
    from statsmodels.datasets import co2

    dataset: Any = co2.load_pandas()
    series = dataset.data["co2"].to_numpy(np.float64)
    weeks, known = np.arange(len(series)), np.isfinite(series)
    filled = np.interp(weeks, weeks[known], series[known])
    year = FIRST + weeks / PER_YEAR
    inside = weeks[(year >= period[0]) & (year < period[1])]
    start = rng.choice(inside[: len(inside) - PAST - AHEAD + 1], count, replace=False)
    rows = start[:, None] + np.arange(PAST + AHEAD)
    last = filled[rows[:, PAST - 1]][:, None]
    scaled = ((filled[rows] - last) / PPM).astype(np.float32)
    return Examples(scaled[:, :PAST], dict(value=scaled[:, PAST:], known=known[rows[:, PAST:]]))


def draw_fans(figure: Any, predictions: Mapping[str, Array], test: Examples) -> None:
    """One window of the test period: median and outer quantiles of each loss."""
    axes = figure.subplots(1, len(predictions), sharex=True, sharey=True, squeeze=False)[0]
    weeks, (value, known) = np.arange(AHEAD) + 1, (test.target[k][0] for k in ("value", "known"))
    for panel, (name, quantiles) in zip(axes, predictions.items(), strict=True):
        low, middle, high = (PPM * quantiles[0, :, i] for i in (0, quantiles.shape[-1] // 2, -1))
        panel.fill_between(weeks, low, high, color="tab:blue", alpha=0.25, lw=0)
        panel.plot(weeks, middle, color="tab:blue", lw=1.5)
        panel.plot(weeks[known], PPM * value[known], "k.", ms=4)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("weeks ahead")
    axes[0].set_ylabel("change (ppm)")
    figure.suptitle("A window of the test period: measurements, median and 90 % interval")
