"""Stacked bars per plan: parts of the predicted step and items of predicted memory, with what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autopar.estimate import Estimate
from autopar.report.names import MEMORY_LABELS, TERM_LABELS
from autopar.report.numbers import signed_percent
from autopar.report.style import (
    INK,
    MEMORY_COLORS,
    MUTED,
    PAPER,
    TERM_COLORS,
    legend_above,
    memory_scale,
    new_figure,
    styled,
    time_scale,
)
from autopar.validate import Validation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.46
"""Inches per bar."""


def step_breakdown(estimates: Sequence[Estimate], names: Mapping[str, str], validation: Validation | None) -> Figure:
    """Parts of the predicted step in the order of execution, one bar per plan, fastest first.

    With a validation: the measured median as a line across the bar, its quartiles as whiskers, the error beside it.
    """
    rows = sorted(estimates, key=lambda e: (e.step_s, e.memory_bytes, e.plan.slug))
    scale, unit = time_scale(rows[0].step_s)
    with styled():
        figure, axes = _canvas(len(rows))
        stack_bars(axes, [e.breakdown for e in rows], scale, TERM_COLORS, TERM_LABELS)
        ends = [e.step_s / scale for e in rows]
        notes = [""] * len(rows)
        if validation is not None:
            found = [validation.of(e.plan.slug) for e in rows]
            middle = [c.measured_step_s / scale for c in found]
            low = [m - c.measured_low_s / scale for m, c in zip(middle, found, strict=True)]
            high = [c.measured_high_s / scale - m for m, c in zip(middle, found, strict=True)]
            _markers(axes, middle, (low, high))
            ends = [max(e, m + h) for e, m, h in zip(ends, middle, high, strict=True)]
            notes = [signed_percent(c.error, 0) for c in found]
        finish_bars(axes, [names[e.plan.slug] for e in rows], ends, notes, f"step time [{unit}]")
        axes.set_title(
            "Predicted step by its parts" + (", and the measured step" if validation else ""), pad=_title_pad(axes)
        )
    return figure


def memory_items(estimates: Sequence[Estimate], names: Mapping[str, str], validation: Validation | None) -> Figure:
    """Items of the predicted peak of the fullest rank, one bar per plan, with the measured peak."""
    rows = sorted(estimates, key=lambda e: (e.step_s, e.memory_bytes, e.plan.slug))
    scale, unit = memory_scale(max(e.memory_bytes for e in rows))
    with styled():
        figure, axes = _canvas(len(rows))
        stack_bars(axes, [e.memory for e in rows], scale, MEMORY_COLORS, MEMORY_LABELS)
        ends = [e.memory_bytes / scale for e in rows]
        notes = [""] * len(rows)
        if validation is not None:
            found = [validation.of(e.plan.slug) for e in rows]
            peaks = [c.measured_memory_bytes / scale for c in found]
            _markers(axes, peaks, None)
            ends = [max(e, p) for e, p in zip(ends, peaks, strict=True)]
            notes = [signed_percent(c.memory_error, 1) for c in found]
        finish_bars(axes, [names[e.plan.slug] for e in rows], ends, notes, f"peak of the fullest rank [{unit}]")
        axes.set_title(
            "Predicted memory by its items" + (", and the measured peak" if validation else ""), pad=_title_pad(axes)
        )
    return figure


def _canvas(rows: int) -> tuple[Figure, Axes]:
    figure = new_figure(1.75 + ROW * rows)
    axes = figure.add_subplot()
    axes.set_ylim(rows - 0.45, -0.55)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    return figure, axes


def stack_bars(
    axes: Axes, rows: Sequence[Mapping[str, float]], scale: float, colors: Mapping[str, str], labels: Mapping[str, str]
) -> None:
    """A stacked bar per row; what is too small to be seen anywhere needs no entry in the legend."""
    left = [0.0] * len(rows)
    whole = max(sum(row.values()) for row in rows)
    for name, color in colors.items():
        widths = [max(0.0, row[name]) / scale for row in rows]
        if max(widths) * scale < 2e-3 * whole:
            continue
        axes.barh(
            range(len(rows)), widths, left=left, height=0.66, color=color, edgecolor=PAPER, linewidth=0.8,
            label=labels[name], hatch="////" if name == "pipeline_bubble" else None,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]


def _markers(axes: Axes, middle: Sequence[float], whiskers: tuple[list[float], list[float]] | None) -> None:
    rows = range(len(middle))
    axes.vlines(
        middle, [row - 0.43 for row in rows], [row + 0.43 for row in rows], color=PAPER, linewidth=4.2, zorder=4
    )
    axes.vlines(
        middle, [row - 0.43 for row in rows], [row + 0.43 for row in rows], color=INK, linewidth=2.2, zorder=5,
        label="measured" if whiskers is None else "measured (median, quartiles)",
    )  # fmt: skip
    if whiskers is not None:
        axes.errorbar(middle, rows, xerr=whiskers, fmt="none", ecolor=INK, elinewidth=1.3, capsize=3.5, zorder=5)


def finish_bars(axes: Axes, names: Sequence[str], ends: Sequence[float], notes: Sequence[str], label: str) -> None:
    """Names of the bars, a note at the end of each, limits and legend."""
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(label)
    axes.set_xlim(0, max(ends) * (1.09 if any(notes) else 1.02))
    for row, (end, note) in enumerate(zip(ends, notes, strict=True)):
        axes.annotate(
            note, (end, row), xytext=(7, 0), textcoords="offset points", va="center", fontsize=10.5, color=MUTED
        )
    legend_above(axes, 4)


def _title_pad(axes: Axes) -> float:
    lines = -(-len(axes.get_legend_handles_labels()[0]) // 4)
    return 10.0 + 17.5 * lines
