"""The Pareto front of step time, free memory and GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autopar.report.names import degrees_name
from autopar.report.style import INK, MUTED, PAPER, new_figure, styled
from autopar.search.pareto import Front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pareto_plot(front: Front, title: str) -> Figure:
    """Throughput per GPU over the number of GPUs; every point is on the front, its colour says how much memory is free.

    A line joins the fastest of each size; level would be perfect scaling of the same global batch.
    """
    points = sorted(front.points, key=lambda p: (p.world_size, -p.estimate.step_s))
    fastest = {p.world_size: p for p in points}
    sizes = list(fastest)
    with styled():
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, StrMethodFormatter

        shades = LinearSegmentedColormap.from_list("free", ["#d55e00", "#f0a830", "#a9d3f5", "#1f5fa8", "#123a68"])
        figure = new_figure(5.2, width=10.0)
        axes = figure.add_subplot()
        rates = [fastest[size].estimate.tokens_per_s_per_gpu for size in sizes]
        axes.plot(sizes, rates, color=MUTED, linewidth=1.2, zorder=1)
        drawn = axes.scatter(
            [p.world_size for p in points],
            [p.estimate.tokens_per_s_per_gpu for p in points],
            c=[p.headroom for p in points], cmap=shades, vmin=0.0, vmax=1.0, s=58, edgecolors=PAPER,
            linewidths=0.8, zorder=3,
        )  # fmt: skip
        crowded = len(sizes) > 4
        for size, rate in zip(sizes, rates, strict=True):
            axes.annotate(
                degrees_name(fastest[size].estimate.plan), (size, rate), xytext=(0, 9), textcoords="offset points",
                ha="left" if crowded else "center", rotation=32 if crowded else 0, rotation_mode="anchor", fontsize=9.5,
                color=INK,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        # Of the sizes that are too small the largest says why.
        small = sorted(size for size in front.unfit if size < min(sizes))
        shown = [size for size in front.considered if size not in small[:-1]]
        axes.xaxis.set_major_locator(FixedLocator(shown))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.set_xlim(min(shown) / 1.5, max(shown) * (1.9 if crowded else 1.5))
        axes.set_ylim(0, (1.3 if crowded else 1.14) * max(rates))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set(xlabel="GPUs", ylabel="tokens/s per GPU")
        axes.grid(axis="y")
        _unfit(axes, {size: reason for size, reason in front.unfit.items() if size in shown})
        bar = figure.colorbar(drawn, ax=axes, pad=0.015, aspect=28)
        bar.set_label("free memory of a GPU")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        bar.outline.set_visible(False)
        axes.set_title(f"{title}: nothing is faster, roomier and smaller at once")
    return figure


def _unfit(axes: Axes, unfit: Mapping[int, str]) -> None:
    """Sizes on which nothing fits, with the reason, on the axis."""
    for size, reason in unfit.items():
        axes.annotate(
            f"nothing fits: {reason}", (size, 0), xytext=(0, 8), textcoords="offset points", ha="center", va="bottom",
            fontsize=9.5, color=MUTED, rotation=90,
        )  # fmt: skip
        axes.plot([size], [0], marker="x", color=MUTED, markersize=7, clip_on=False, zorder=4)
