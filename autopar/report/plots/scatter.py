"""Predicted against measured, one point per plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from autopar.report.plots.labels import place_labels
from autopar.report.style import ACCENT, GRID, MUTED, PAPER, new_figure, styled, time_scale
from autopar.validate import Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BANDS = (0.2, 0.1)
"""Relative errors whose bands are shaded, the wider first."""

LOG_FROM = 4.0
"""Ratio of the slowest to the fastest from which the axes are logarithmic."""


def predicted_measured(validation: Validation, names: Mapping[str, str]) -> Figure:
    """Step time predicted against measured; the diagonal is a perfect prediction, bands are 10 and 20 percent.

    Points carry the plan's name and the error; whiskers are the quartiles of the measured steps; the star is the plan
    predicted fastest.
    """
    rows = sorted(validation.comparisons, key=lambda c: c.measured_step_s)
    scale, unit = time_scale(rows[0].measured_step_s)
    x = np.asarray([c.measured_step_s for c in rows]) / scale
    y = np.asarray([c.predicted_step_s for c in rows]) / scale
    low = x - np.asarray([c.measured_low_s for c in rows]) / scale
    high = np.asarray([c.measured_high_s for c in rows]) / scale - x
    with styled():
        figure = new_figure(6.2, width=7.0)
        axes = figure.add_subplot()
        limits = _limits(x, y)
        _bands(axes, limits)
        axes.errorbar(x, y, xerr=[low, high], fmt="none", ecolor=MUTED, elinewidth=1.0, capsize=0, zorder=3)
        chosen = np.asarray([c.slug == validation.chosen for c in rows])
        axes.scatter(x[~chosen], y[~chosen], s=52, color=ACCENT, edgecolors=PAPER, linewidths=1.0, zorder=4)
        axes.scatter(
            x[chosen], y[chosen], s=150, color="#d55e00", edgecolors=PAPER, linewidths=1.0, zorder=5, marker="*"
        )
        axes.set(
            xlim=limits, ylim=limits, xlabel=f"measured step time [{unit}]", ylabel=f"predicted step time [{unit}]"
        )
        if limits[1] / limits[0] > LOG_FROM:
            from matplotlib.ticker import LogLocator, ScalarFormatter

            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(ScalarFormatter())
                axis.minorticks_off()
        axes.set_aspect("equal")
        axes.set_title("Step time: predicted against measured")
        labels = [f"{names[c.slug]}  {_signed(c.error)}" for c in rows]
        diagonal = np.linspace(*limits, 150)[:, None].repeat(2, axis=1)
        place_labels(axes, x, y, labels, strong=chosen.tolist(), whiskers=(x - low, x + high), avoid=diagonal)
    return figure


def _signed(error: float) -> str:
    return f"{100 * error:+.0f}%".replace("-", "\u2212")


def _limits(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    smallest, largest = min(x.min(), y.min()), max(x.max(), y.max())
    if largest / smallest > LOG_FROM:
        return smallest / 1.25, largest * 1.25
    margin = max(0.15 * (largest - smallest), 0.08 * largest)
    return max(0.0, smallest - margin), largest + margin


def _bands(axes: Axes, limits: tuple[float, float]) -> None:
    ends = np.asarray(limits)
    for band, alpha in zip(BANDS, (0.45, 0.8), strict=True):
        axes.fill_between(ends, ends / (1 + band), ends * (1 + band), color=GRID, alpha=alpha, linewidth=0, zorder=0)
    axes.plot(ends, ends, color=MUTED, linewidth=1.2, zorder=1)
    axes.annotate(
        "bands: " + ", ".join(f"\u00b1{band:.0%}" for band in sorted(BANDS)), (1, 0), xycoords="axes fraction",
        xytext=(-6, 6), textcoords="offset points", ha="right", va="bottom", fontsize=10, color=MUTED,
    )  # fmt: skip
