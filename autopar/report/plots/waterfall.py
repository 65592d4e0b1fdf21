"""Where a plan loses its time against the best: a waterfall of named terms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.estimate import Estimate
from autopar.report.answer_tables import LABELS, SMALLEST
from autopar.report.names import short_names
from autopar.report.numbers import percent, signed_percent, significant
from autopar.report.style import GRID, INK, MUTED, PAPER, TERM_COLORS, new_figure, styled, time_scale
from autopar.search.why_not import waterfall

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.42
WHOLE = "#3d4859"
"""Colour of the two whole steps."""


def step_waterfall(other: Estimate, best: Estimate) -> Figure:
    """From the best plan's step to the other's, one floating bar per term: losses first, then gains."""
    steps = waterfall(other, best, smallest=max(SMALLEST, 2e-3))
    names = sorted(steps, key=lambda name: (name == "other", -steps[name]))
    scale, unit = time_scale(best.step_s)
    plans = short_names([best.plan, other.plan])
    starts, levels = [], [best.step_s / scale]
    for name in names:
        starts.append(levels[-1])
        levels.append(levels[-1] + steps[name] / scale)
    low, high = min(levels), max(levels)
    span = max(high - low, 0.02 * high)
    left = 0.0 if low < 1.5 * span else low - 0.45 * span
    with styled():
        figure = new_figure(1.7 + ROW * (len(names) + 2))
        axes = figure.add_subplot()
        _whole(axes, 0, best.step_s / scale, left)
        for row, (name, start) in enumerate(zip(names, starts, strict=True), start=1):
            width = steps[name] / scale
            axes.barh(
                row, width, left=start, height=0.66, color=TERM_COLORS.get(name, GRID), edgecolor=PAPER, linewidth=0.8,
                hatch="////" if name == "pipeline_bubble" else None,
            )  # fmt: skip
            axes.plot([start, start], [row - 1.33, row + 0.33], color=MUTED, linewidth=0.8, zorder=1)
            end = max(start, start + width)
            _note(axes, end, row, signed_percent(steps[name] / best.step_s))
        last = len(names) + 1
        axes.plot([levels[-1]] * 2, [last - 1.33, last + 0.33], color=MUTED, linewidth=0.8, zorder=1)
        _whole(axes, last, other.step_s / scale, left)
        _note(axes, other.step_s / scale, last, signed_percent(other.step_s / best.step_s - 1), strong=True)
        ends = (f"best: {plans[best.plan.slug]}", f"this: {plans[other.plan.slug]}")
        labels = [ends[0], *(LABELS[name] for name in names), ends[1]]
        axes.set_yticks(range(last + 1), labels)
        for tick in (axes.get_yticklabels()[0], axes.get_yticklabels()[-1]):
            tick.set_fontweight("bold")
        axes.set_ylim(last + 0.6, -0.6)
        axes.set_xlim(left, high + 0.12 * (high - left))
        axes.set_xlabel(f"step time [{unit}]" + (f", from {significant(left)} {unit}" if left else ""))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        slower = other.step_s / best.step_s - 1
        axes.set_title(
            f"{percent(abs(slower))} {'slower' if slower >= 0 else 'faster'} than the best plan: where it goes"
        )
    return figure


def _whole(axes: Axes, row: int, end: float, left: float) -> None:
    """A whole step; slanted strokes where the bar does not begin at nothing."""
    axes.barh(row, end - left, left=left, height=0.66, color=WHOLE, edgecolor=PAPER, linewidth=0.8)
    if left:
        axes.annotate(
            "//", (left, row), xytext=(9, 0), textcoords="offset points", ha="center", va="center", color=PAPER,
            fontsize=15, fontweight="bold",
        )  # fmt: skip


def _note(axes: Axes, end: float, row: int, text: str, *, strong: bool = False) -> None:
    axes.annotate(
        text, (end, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=10.5,
        color=INK if strong else MUTED, fontweight="bold" if strong else "normal",
    )  # fmt: skip
