"""Strategies side by side, throughput over cluster size, and the map of step time over tp and pp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from autopar.plan import Plan
from autopar.report.names import TERM_LABELS, degrees_name, layout_name
from autopar.report.numbers import percent, signed_percent, significant
from autopar.report.plots.bars import ROW, finish_bars, stack_bars
from autopar.report.strategy_tables import grid
from autopar.report.style import (
    ACCENT,
    DASHES,
    GRID,
    INK,
    MUTED,
    PAPER,
    SERIES,
    TERM_COLORS,
    new_figure,
    styled,
    time_scale,
)
from autopar.search.strategies import Cell, ScalePoint, Strategy, StrategyComparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def strategy_bars(found: StrategyComparison, title: str) -> Figure:
    """Parts of the step of every strategy's best plan; strategies that cannot work say why."""
    rows = found.strategies
    prices = [strategy.estimate for strategy in rows]
    steps = [price.step_s for price in prices if price is not None]
    best = min(steps, default=1.0)
    scale, unit = time_scale(best)
    with styled():
        figure = new_figure(2.15 + 1.35 * ROW * len(rows))
        axes = figure.add_subplot()
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        nothing = dict.fromkeys(TERM_COLORS, 0.0)
        breakdowns = [nothing if price is None else price.breakdown for price in prices]
        stack_bars(axes, breakdowns, scale, TERM_COLORS, TERM_LABELS)
        notes = [_strategy_note(strategy, best) for strategy in rows]
        ends = [0.0 if price is None else price.step_s / scale for price in prices]
        labels = [
            s.name if s.estimate is None else f"{s.name}\n{_plan_name(s.estimate.plan)}" for s in rows
        ]  # fmt: skip
        finish_bars(axes, labels, ends, notes, f"step time [{unit}]")
        axes.set_xlim(0, 1.34 * max(ends, default=1.0))
        lines = -(-len(axes.get_legend_handles_labels()[0]) // 4)
        axes.set_title(f"{title}: the best plan of each strategy", pad=10.0 + 17.5 * lines)
    return figure


def _plan_name(plan: Plan) -> str:
    return layout_name(plan) + (" offload" if plan.offload_optimizer else "")


def _strategy_note(strategy: Strategy, best: float) -> str:
    if strategy.estimate is None:
        return f"  {strategy.why_not}"
    slower, share = strategy.estimate.step_s / best - 1, f"MFU {percent(strategy.estimate.mfu)}"
    return f"{signed_percent(slower)}, {share}" if slower else share


def scaling_curves(found: StrategyComparison, title: str) -> Figure:
    """Throughput and MFU over the number of GPUs: best plan, rule of thumb, and perfect scaling from the smallest."""
    points = [point for point in found.scaling if point.best is not None]
    with styled():
        from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

        figure = new_figure(4.6, width=10.5)
        left, right = figure.subplots(1, 2)
        if points:
            _throughput(left, points)
            _utilisation(right, points)
        sizes = [point.world_size for point in found.scaling]
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticklabels([f"{size}" for size in sizes], rotation=45 if len(sizes) > 7 else 0)
            axes.set_xlim(min(sizes) / 1.3, max(sizes) * (2.6 if axes is right and len(points) > 3 else 1.3))
            axes.set_xlabel("GPUs")
            axes.grid()
            for point in found.scaling:
                if point.best is None and axes is left:
                    reason = point.why_not.partition(":")[0]
                    axes.annotate(
                        f"nothing fits: {reason}", (point.world_size, 0), xycoords=("data", "axes fraction"),
                        xytext=(0, 5), textcoords="offset points", ha="center", va="bottom", rotation=90, fontsize=9.5,
                        color=MUTED,
                    )  # fmt: skip
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        left.set_title(f"{title}: throughput")
        right.set_title("Share of the peak (MFU)")
    return figure


def _throughput(axes: Axes, points: Sequence[ScalePoint]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    sizes = np.asarray([p.world_size for p in points], dtype=float)
    rate = np.asarray([p.best.tokens_per_s_per_gpu * p.world_size for p in points if p.best is not None])
    axes.plot(sizes, rate[0] * sizes / sizes[0], color=GRID, linewidth=7.0, label="linear from the smallest", zorder=1)
    axes.plot(sizes, rate, color=ACCENT, marker="o", linewidth=2.0, label="best plan")
    thumbs = [p for p in points if p.thumb is not None]
    axes.plot(
        [p.world_size for p in thumbs],
        [p.thumb.tokens_per_s_per_gpu * p.world_size for p in thumbs if p.thumb is not None],
        color=SERIES[1], marker="s", markersize=5, linestyle=DASHES[1], linewidth=1.6, label="rule of thumb",
    )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(LogLocator(base=10, subs=()))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.set_ylabel("tokens/s")
    axes.legend(loc="upper left")


def _count(value: float) -> str:
    for scale, unit in ((1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"


def _utilisation(axes: Axes, points: Sequence[ScalePoint]) -> None:
    best = [p.best for p in points if p.best is not None]
    sizes = [p.world_size for p in points]
    axes.plot(sizes, [e.mfu for e in best], color=ACCENT, marker="o", linewidth=2.0)
    thumbs = [(p.world_size, p.thumb.mfu) for p in points if p.thumb is not None]
    axes.plot(
        [size for size, _ in thumbs], [mfu for _, mfu in thumbs], color=SERIES[1], marker="s", markersize=5,
        linestyle=DASHES[1], linewidth=1.6,
    )  # fmt: skip
    crowded = len(sizes) > 3
    for size, estimate in zip(sizes, best, strict=True):
        axes.annotate(
            degrees_name(estimate.plan), (size, estimate.mfu), xytext=(0, 9), textcoords="offset points",
            ha="left" if crowded else "center", rotation=38 if crowded else 0, rotation_mode="anchor", fontsize=9,
            color=INK,
        )  # fmt: skip
    axes.set_ylim(0, (1.45 if crowded else 1.2) * max(e.mfu for e in best))
    axes.set_ylabel("MFU")


def degree_map(found: StrategyComparison, title: str) -> Figure:
    """The best step of each tp and pp, whatever the rest, and why there is none where there is none."""
    tps, pps, by = grid(found)
    steps = [cell.step_s for cell in by.values() if cell.step_s is not None]
    best = min(steps, default=1.0)
    scale, unit = time_scale(best)
    slower = np.full((len(tps), len(pps)), np.nan)
    for (tp, pp), cell in by.items():
        if cell.step_s is not None:
            slower[tps.index(tp), pps.index(pp)] = cell.step_s / best - 1
    with styled():
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm

        shades = LinearSegmentedColormap.from_list("steps", ["#0f4c8a", "#5b9bd5", "#cfe3f5", "#f7f3ec"])
        figure = new_figure(1.7 + 0.66 * len(tps), width=max(7.0, 2.4 + 1.15 * len(pps)))
        axes = figure.add_subplot()
        top = max(float(np.nanmax(slower)), 0.2) if steps else 1.0
        drawn = axes.imshow(slower, cmap=shades, norm=PowerNorm(0.6, 0.0, min(top, 2.0)), aspect="auto")
        for row, tp in enumerate(tps):
            for column, pp in enumerate(pps):
                _cell(axes, by.get((tp, pp)), row, column, best, scale, slower[row, column])
        axes.set_xticks(range(len(pps)), [f"{pp}" for pp in pps])
        axes.set_yticks(range(len(tps)), [f"{tp}" for tp in tps])
        axes.set(xlabel="pipeline stages (pp)", ylabel="tensor parallel ranks (tp)")
        axes.set_xticks(np.arange(-0.5, len(pps)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(tps)), minor=True)
        axes.grid(which="minor", color=PAPER, linewidth=2.0)
        axes.tick_params(which="both", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if steps:
            from matplotlib.ticker import PercentFormatter

            bar = figure.colorbar(drawn, ax=axes, pad=0.015, aspect=24)
            bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            bar.set_label("slower than the best")
            bar.outline.set_visible(False)
        axes.set_title(f"{title}: best step [{unit}] of each tp and pp")
    return figure


def _cell(axes: Axes, cell: Cell | None, row: int, column: int, best: float, scale: float, slower: float) -> None:
    from matplotlib.patches import Rectangle

    if cell is None:
        return
    if cell.step_s is None:
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="#eef0f3", edgecolor=GRID, hatch="////", linewidth=0)
        )
        text = cell.reason.replace(" ", "\n")
        if cell.reason == "memory" and cell.memory_ratio is not None:
            text = f"memory\n×{significant(cell.memory_ratio, 2)}"
        axes.text(column, row, text, ha="center", va="center", fontsize=9.5, color=MUTED)
        return
    dark = slower < 0.16
    is_best = cell.step_s == best
    axes.text(
        column, row, significant(cell.step_s / scale), ha="center", va="center", fontsize=11.5,
        color=PAPER if dark else INK, fontweight="bold" if is_best else "normal",
    )  # fmt: skip
    if is_best:
        axes.add_patch(
            Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor=SERIES[4], linewidth=2.6, zorder=5)
        )
