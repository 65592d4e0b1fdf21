"""Published plans against the best that the search finds, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopar.report.style import GRID, INK, MUTED, legend_above, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP, LEAST = 4.0, 32.0
"""Places between groups, and that a group takes at least, so that its name finds room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dots:
    """Rows of one source, and the name and colour of each row's kind."""

    title: str
    ratios: tuple[float, ...]
    kinds: tuple[str, ...]


def recipe_ratios(groups: Sequence[Dots], colors: dict[str, str], *, near: float, title: str) -> Figure:
    """Ratios of published to best step times, the largest of each source first, with the line of ``near``."""
    with styled():
        figure = new_figure(4.6, width=11.0)
        axes = figure.subplots()
        place, ticks = 0.0, []
        for group in groups:
            order = sorted(range(len(group.ratios)), key=lambda i: -group.ratios[i])
            width = max(float(len(order)), LEAST)
            xs = [place + (i + 0.5) * width / len(order) for i in range(len(order))]
            for kind, color in colors.items():
                chosen = [i for i, row in enumerate(order) if group.kinds[row] == kind]
                axes.scatter(
                    [xs[i] for i in chosen], [group.ratios[order[i]] for i in chosen], s=17, color=color,
                    linewidths=0, zorder=3,
                )  # fmt: skip
            share = sum(ratio <= near for ratio in group.ratios) / len(group.ratios)
            ticks.append((place + width / 2, f"{group.title}\n{share:.0%} of {len(order)}"))
            place += width + GAP
            if group is not groups[-1]:
                axes.axvline(place - GAP / 2, color=GRID, linewidth=1.0)
        axes.axhline(1.0, color=MUTED, linewidth=0.8)
        axes.axhline(near, color=INK, linewidth=1.1, linestyle=(0, (6, 3)))
        axes.text(place - 0.5, near, f" +{near - 1:.0%}", va="center", ha="left", color=INK)
        axes.set_yscale("log")
        top = max([near, *(ratio for group in groups for ratio in group.ratios)])
        marks = [mark for mark in (0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0) if mark <= 1.15 * top]
        axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
        axes.minorticks_off()
        axes.grid(axis="y")
        axes.set_xlim(-GAP / 2, place - GAP / 2)
        axes.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("predicted step, published / best")
        for kind, color in colors.items():
            axes.scatter([], [], s=30, color=color, label=kind)
        legend_above(axes, len(colors))
        axes.set_title(title, pad=34)
    return figure
