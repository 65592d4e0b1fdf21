"""Strategies, cluster sizes and the map over tp and pp on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autopar.report.columns import Column, terminal_table
from autopar.report.numbers import percent, signed_percent, significant
from autopar.report.style import time_scale
from autopar.search.strategies import Cell, ScalePoint, StrategyComparison

if TYPE_CHECKING:
    from rich.console import RenderableType


def strategy_columns(found: StrategyComparison) -> list[Column]:
    """The best plan of each strategy against the best of all."""
    rows = found.strategies
    steps = [s.estimate.step_s for s in rows if s.estimate is not None]
    best = min(steps, default=1.0)
    scale, unit = time_scale(best)
    prices = [s.estimate for s in rows]
    return [
        Column(header="strategy", cells=tuple(s.name for s in rows), text=True),
        Column(header=f"step {unit}", cells=tuple("-" if e is None else significant(e.step_s / scale) for e in prices)),
        Column(
            header="against best",
            cells=tuple("-" if e is None else signed_percent(e.step_s / best - 1) for e in prices),
        ),
        Column(header="MFU", cells=tuple("-" if e is None else percent(e.mfu) for e in prices)),
        Column(header="GiB", cells=tuple("-" if e is None else f"{e.memory_gib:.1f}" for e in prices)),
        Column(
            header="plan",
            cells=tuple(s.why_not if s.estimate is None else s.estimate.plan.slug for s in rows),
            text=True, code=True,
        ),
    ]  # fmt: skip


def scaling_efficiency(points: tuple[ScalePoint, ...]) -> list[float | None]:
    """Throughput per device of each size against the smallest size on which anything fits."""
    first = next((p.best for p in points if p.best is not None), None)
    return [
        None if p.best is None or first is None else p.best.tokens_per_s_per_gpu / first.tokens_per_s_per_gpu
        for p in points
    ]


def scaling_columns(found: StrategyComparison) -> list[Column]:
    """Throughput by cluster size."""
    rows = found.scaling
    shares = scaling_efficiency(rows)
    scale, unit = time_scale(min((p.best.step_s for p in rows if p.best is not None), default=1.0))

    prices = [point.best for point in rows]
    losses = [p.thumb.step_s / p.best.step_s - 1 if p.best and p.thumb else None for p in rows]
    rates = [p.best.tokens_per_s_per_gpu * p.world_size if p.best else None for p in rows]

    def cells(values: Sequence[float | None], words: Callable[[float], str]) -> tuple[str, ...]:
        return tuple("-" if value is None else words(value) for value in values)

    return [
        Column(header="GPUs", cells=tuple(str(p.world_size) for p in rows)),
        Column(header=f"step {unit}", cells=cells([e.step_s / scale if e else None for e in prices], significant)),
        Column(header="tokens/s", cells=cells(rates, significant)),
        Column(header="MFU", cells=cells([e.mfu if e else None for e in prices], percent)),
        Column(header="of ideal", cells=cells(shares, percent)),
        Column(header="rule of thumb", cells=cells(losses, signed_percent)),
        Column(
            header="plan",
            cells=tuple(p.why_not if p.best is None else p.best.plan.slug for p in rows),
            text=True, code=True, drop=1,
        ),
    ]  # fmt: skip


def cell_text(cell: Cell | None, scale: float) -> str:
    """What a cell of the map says: its step, or why there is none."""
    if cell is None:
        return ""
    if cell.step_s is not None:
        return significant(cell.step_s / scale)
    if cell.reason == "memory" and cell.memory_ratio is not None:
        return f"{significant(cell.memory_ratio, 2)}x mem"
    return cell.reason.removeprefix("key-value ").removeprefix("query ")


def grid(found: StrategyComparison) -> tuple[list[int], list[int], dict[tuple[int, int], Cell]]:
    """(degrees of tp, degrees of pp, cells by both); degrees at which no cell was priced are left out."""
    useful = [cell for cell in found.cells if cell.step_s is not None or cell.memory_ratio is not None]
    reach_tp, reach_pp = max((c.tp for c in useful), default=1), max((c.pp for c in useful), default=1)
    shown = [cell for cell in found.cells if cell.tp <= 2 * reach_tp and cell.pp <= 2 * reach_pp]
    by = {(cell.tp, cell.pp): cell for cell in shown}
    return sorted({tp for tp, _ in by}), sorted({pp for _, pp in by}), by


def map_columns(found: StrategyComparison) -> list[Column]:
    """The best step of each tp and pp, or why there is none; tp goes down, pp across."""
    tps, pps, by = grid(found)
    scale, unit = time_scale(min((c.step_s for c in by.values() if c.step_s is not None), default=1.0))
    return [
        Column(header=f"step {unit}", cells=tuple(f"tp{tp}" for tp in tps), text=True),
        *(Column(header=f"pp{pp}", cells=tuple(cell_text(by.get((tp, pp)), scale) for tp in tps)) for pp in pps),
    ]


def comparison_table(found: StrategyComparison, *, width: int = 120, title: str = "") -> RenderableType:
    """Strategies, sizes and the map."""
    from rich.console import Group
    from rich.text import Text

    strong = (len(found.strategies) - 1,)
    return Group(
        terminal_table(strategy_columns(found), width, title=title, strong=strong),
        Text(),
        terminal_table(scaling_columns(found), width, title="Cluster size, the global batch as it is"),
        Text(),
        terminal_table(
            map_columns(found),
            width,
            title="Best step by tp and pp (2x mem: twice a device's memory)",
        ),
        Text(),
        Text(f"{found.considered:,} plans on the whole cluster."),
    )
