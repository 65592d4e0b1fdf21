"""A step of one plan over time, predicted above measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autopar.report.events import Event, Track
from autopar.report.names import TERM_LABELS
from autopar.report.style import GRID, INK, MUTED, PAPER, TERM_COLORS, new_figure, styled, time_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ON_LIGHT, ON_DARK = "#12233a", "#f4f9ff"
LABEL_INCHES = 0.11
"""Width that each digit of a label takes."""
MAX_RANKS = 8


def step_timeline(
    name: str, predicted: Sequence[Event], measured: Sequence[Event], *, median_s: float | None = None
) -> Figure:
    """Passes (with their microbatch), communication (thin) and optimizer of each rank over one step.

    Args:
        name: of the plan.
        predicted, measured: events; ranks that are in both are drawn, the first eight, or those predicted where
            nothing was measured.
        median_s: median of the timed steps, drawn beside the inspected one: inspection costs time.
    """
    ranks = sorted({event.rank for event in predicted} & ({e.rank for e in measured} or {e.rank for e in predicted}))
    ranks = ranks[:MAX_RANKS]
    panels = [("predicted", predicted)] + ([("measured", measured)] if measured else [])
    end = max(event.end_s for _, events in panels for event in events)
    scale, unit = time_scale(end)
    with styled():
        height = 1.5 + len(panels) * (0.55 + 0.42 * len(ranks))
        figure = new_figure(height, width=10.5)
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        used: dict[str, None] = {}
        for axes, (label, events) in zip(rows, panels, strict=True):
            drawn = [event for event in events if event.rank in ranks]
            _panel(axes, drawn, ranks, scale, end / scale, figure.get_size_inches()[0] * 0.88)
            used |= dict.fromkeys(event.term for event in drawn)
            last = max(event.end_s for event in drawn)
            text = f"{label}, {last / scale:.3g} {unit}"
            if label == "measured" and median_s is not None:
                text += f" in the inspected step, median of all {median_s / scale:.3g} {unit}"
            axes.set_title(text, fontsize=11.5, fontweight="normal", pad=4)
            axes.axvline(last / scale, color=MUTED, linewidth=1.0, linestyle=(0, (3, 2)), zorder=0)
        rows[-1].set_xlabel(f"time in the step [{unit}]")
        figure.suptitle(
            f"One step of {name}: numbers are microbatches, grey is waiting",
            x=0.01,
            ha="left",
            fontsize=13.5,
            fontweight="bold",
        )
        _legend(figure, [term for term in TERM_COLORS if term in used])
    return figure


def _panel(axes: Axes, events: Sequence[Event], ranks: Sequence[int], scale: float, end: float, inches: float) -> None:
    last = max(event.end_s for event in events) / scale
    for row in range(len(ranks)):
        axes.broken_barh([(0, last)], (row - 0.38, 0.64), facecolors=GRID, alpha=0.45, linewidth=0, zorder=0)
    for event in events:
        row = ranks.index(event.rank)
        thin = event.track is Track.COMMUNICATION
        top, height = (row + 0.31, 0.15) if thin else (row - 0.38, 0.64)
        left, width = event.start_s / scale, (event.end_s - event.start_s) / scale
        axes.broken_barh(
            [(left, width)], (top, height), facecolors=TERM_COLORS[event.term], edgecolors=PAPER, linewidth=0.5
        )
        label = str(event.args.get("microbatch", ""))
        if label and not thin and width / end * inches > LABEL_INCHES * len(label):
            axes.text(
                left + width / 2, row - 0.06, label, ha="center", va="center", fontsize=9, clip_on=True,
                color=ON_DARK if event.term == "backward" else ON_LIGHT,
            )  # fmt: skip
    axes.set_xlim(0, end * 1.005)
    axes.set_ylim(len(ranks) - 0.4, -0.55)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _legend(figure: Figure, terms: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=TERM_COLORS[term], label=TERM_LABELS[term]) for term in terms]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=len(handles) if len(handles) < 8 else 5,
        handlelength=1.1, handleheight=1.0, handletextpad=0.5, columnspacing=1.4, labelcolor=INK, fontsize=10,
    )  # fmt: skip
