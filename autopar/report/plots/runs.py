"""Published runs, predicted and measured: a panel for each source, all errors side by side, errors against goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autopar.report.plots.labels import place_labels
from autopar.report.style import ACCENT, GRID, INK, MUTED, PAPER, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Floats = NDArray[np.float64]

WARM, GREEN = "#d55e00", "#23814c"
BAND = 0.1
CLIP = 40.0
"""Percent beyond which errors are drawn at the edge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """Runs of one source: equally long arrays, in one unit.

    Attributes:
        title: of the panel.
        labels: short name of each run.
        measured, predicted: as shipped.
        left_out: predicted by a fit that had not seen the model; NaN where there is none.
        unit: of the numbers.
    """

    title: str
    labels: tuple[str, ...]
    measured: Floats
    predicted: Floats
    left_out: Floats
    unit: str = "s"

    @property
    def unseen(self) -> Floats:
        """Left-out predictions, those as shipped where there are none."""
        return np.where(np.isfinite(self.left_out), self.left_out, self.predicted)

    @property
    def errors(self) -> Floats:
        """Percent, of ``unseen``."""
        return 100 * (self.unseen / self.measured - 1)


def runs_scatter(points: Points, *, worst: int = 4, what: str = "step time") -> Figure:
    """One source: predicted against measured on logarithmic axes; the runs that are furthest off carry their names."""
    with styled():
        figure = new_figure(6.4, width=7.0)
        axes = figure.add_subplot()
        limits = _panel(axes, points)
        axes.set_xlabel(f"measured {what} [{points.unit}]")
        axes.set_ylabel(f"predicted {what} [{points.unit}]")
        axes.set_title(points.title)
        axes.annotate(
            "band: \u00b110%", (0.98, 0.03), xycoords="axes fraction", ha="right", fontsize=10, color=MUTED
        )  # fmt: skip
        off = np.argsort(-np.abs(points.errors), kind="stable")[:worst]
        off = off[np.abs(points.errors[off]) > 100 * BAND / 2]
        rest = np.setdiff1d(np.arange(len(points.measured)), off)
        diagonal = np.geomspace(*limits, 120)[:, None].repeat(2, axis=1)
        avoid = np.vstack([np.column_stack([points.measured, points.unseen])[rest], diagonal])
        labels = [f"{points.labels[i]}  {points.errors[i]:+.0f}%".replace("-", "\u2212") for i in off]
        x, y = points.measured[off], points.unseen[off]
        place_labels(axes, x, y, labels, strong=[False] * len(off), whiskers=(x, x), avoid=avoid)
    return figure


def runs_overview(panels: Sequence[Points], *, columns: int = 4, title: str = "") -> Figure:
    """All sources in small panels, one scale a panel, each with its mean absolute error."""
    rows = -(-len(panels) // columns)
    with styled():
        figure = new_figure(2.75 * rows + 0.6, width=2.75 * columns)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=13.5, fontweight="bold")
        for index, points in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            _panel(axes, points, size=16)
            axes.set_title(points.title, fontsize=10.5, pad=5)
            axes.tick_params(labelsize=8.5)
            error = float(np.mean(np.abs(points.errors)))
            axes.annotate(
                f"{error:.1f}%, {len(points.measured)} runs", (0.04, 0.96), xycoords="axes fraction", va="top",
                fontsize=9.5, color=INK,
            )  # fmt: skip
        figure.supxlabel(f"measured [{panels[0].unit}]", fontsize=11)
        figure.supylabel(f"predicted [{panels[0].unit}]", fontsize=11)
    return figure


def _panel(axes: Axes, points: Points, *, size: float = 40) -> tuple[float, float]:
    both = np.concatenate([points.measured, points.unseen])
    low, high = float(both.min()) / 1.25, float(both.max()) * 1.25
    ends = np.asarray([low, high])
    axes.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color=GRID, alpha=0.8, linewidth=0, zorder=0)
    axes.plot(ends, ends, color=MUTED, linewidth=1.0, zorder=1)
    far = np.abs(points.errors) > 100 * BAND
    for chosen, color in ((~far, ACCENT), (far, WARM)):
        axes.scatter(
            points.measured[chosen], points.unseen[chosen], s=size, color=color, edgecolors=PAPER,
            linewidths=0.7 if size > 20 else 0.3, alpha=0.85, zorder=3,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_aspect("equal")
    _plain_ticks(axes, high / low)
    return low, high


def _plain_ticks(axes: Axes, ratio: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    subs: Sequence[float] = (1.0,) if ratio > 300 else (1.0, 3.0) if ratio > 30 else (1.0, 2.0, 5.0)
    if ratio < 12:
        subs = (1.0, 2.0, 3.0, 5.0) if ratio > 4 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def error_strips(panels: Sequence[Points], goals: Sequence[float | None], *, title: str) -> Figure:
    """Signed errors of every run, a strip a source: points, their quartiles, and the goal as a grey box around zero.

    Errors beyond CLIP are diamonds at the edge.
    """
    rng = np.random.default_rng(1)
    with styled():
        figure = new_figure(0.52 * len(panels) + 1.5)
        axes = figure.add_subplot()
        for place, (points, goal) in enumerate(zip(panels, goals, strict=True)):
            y = len(panels) - 1 - place
            if goal is not None:
                axes.fill_betweenx([y - 0.36, y + 0.36], -goal, goal, color=GRID, linewidth=0, zorder=0)
            errors = np.clip(points.errors, -CLIP, CLIP)
            beyond = np.abs(points.errors) > CLIP
            scatter = y + rng.uniform(-0.24, 0.24, len(errors))
            alpha = 0.75 if len(errors) < 150 else 0.3
            for chosen, marker, color in ((~beyond, "o", ACCENT), (beyond, "D", WARM)):
                axes.scatter(
                    errors[chosen], scatter[chosen], s=20, marker=marker, color=color, edgecolors="none", alpha=alpha,
                    zorder=3, clip_on=False,
                )  # fmt: skip
            low, middle, high = np.quantile(errors, (0.25, 0.5, 0.75))
            axes.plot([low, high], [y, y], color=INK, linewidth=2.2, solid_capstyle="butt", zorder=4)
            axes.plot([middle, middle], [y - 0.3, y + 0.3], color=INK, linewidth=2.2, zorder=5)
        axes.axvline(0, color=MUTED, linewidth=1.0, zorder=1)
        axes.set_yticks(range(len(panels)), [f"{p.title}  ({len(p.measured)})" for p in reversed(panels)])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set(xlim=(-CLIP - 2, CLIP + 2), ylim=(-0.6, len(panels) - 0.4))
        axes.grid(axis="x", zorder=0)
        axes.set_xlabel("predicted / measured \u2212 1 [%]")
        axes.set_title(title)
    return figure


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorLine:
    """Mean absolute errors of one source, percent; None where there is none."""

    title: str
    shipped: float | None
    model_out: float | None
    source_out: float | None
    rival: float | None
    goal: float | None


def errors_and_goals(lines: Sequence[ErrorLine]) -> Figure:
    """Mean absolute errors by source: as shipped, model and source left out, the rival, and the goal."""
    with styled():
        figure = new_figure(0.46 * len(lines) + 1.9)
        axes = figure.add_subplot()
        for place, line in enumerate(lines):
            y = len(lines) - 1 - place
            known = [v for v in (line.shipped, line.model_out, line.source_out) if v is not None]
            if known:
                axes.plot([min(known), max(known)], [y, y], color=GRID, linewidth=5, solid_capstyle="round", zorder=1)
            if line.goal is not None:
                axes.plot([line.goal] * 2, [y - 0.34, y + 0.34], color=WARM, linewidth=2.4, zorder=2)
            for value, face, edge, marker, size in (
                (line.rival, MUTED, MUTED, "x", 7),
                (line.source_out, PAPER, GREEN, "s", 6.5),
                (line.shipped, PAPER, ACCENT, "o", 7),
                (line.model_out, ACCENT, ACCENT, "o", 8),
            ):
                if value is not None:
                    axes.plot(
                        [value], [y], linestyle="none", marker=marker, markersize=size, markerfacecolor=face,
                        markeredgecolor=edge, markeredgewidth=1.7, zorder=4,
                    )  # fmt: skip
        handles = _legend_handles()
        axes.set_yticks(range(len(lines)), [line.title for line in reversed(lines)])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set(xscale="log", ylim=(-0.6, len(lines) - 0.4))
        axes.grid(axis="x", zorder=0)
        _percent_ticks(axes)
        axes.set_xlabel("mean absolute error of the step time [%]")
        figure.suptitle("Step time: errors by source", x=0.01, ha="left", fontsize=13.5, fontweight="bold")
        figure.legend(handles=handles, loc="outside lower center", ncols=5, columnspacing=1.4, handletextpad=0.4)
    return figure


def _percent_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend_handles() -> list[Line2D]:
    from matplotlib.lines import Line2D

    def dot(label: str, marker: str, face: str, edge: str) -> Line2D:
        return Line2D(
            [], [], linestyle="none", marker=marker, markersize=7.5, markerfacecolor=face, markeredgecolor=edge,
            markeredgewidth=1.7, label=label,
        )  # fmt: skip

    return [
        dot("model left out", "o", ACCENT, ACCENT),
        dot("as shipped", "o", PAPER, ACCENT),
        dot("source left out", "s", PAPER, GREEN),
        dot("constant efficiency", "x", MUTED, MUTED),
        Line2D([], [], color=WARM, linewidth=2.4, label="goal"),
    ]
