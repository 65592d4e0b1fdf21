"""Tables of mixed plans: ranked plans, and of the best one its islands, stages, shares of the batch, and what idles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from autopar.estimate.mixed_result import MixedEstimate, StageEstimate
from autopar.estimate.mixed_setting import MixedSetting
from autopar.mixed_plan import Line
from autopar.report.columns import Column, terminal_table
from autopar.report.names import TERM_LABELS
from autopar.report.numbers import percent, significant
from autopar.report.style import time_scale
from autopar.search.mixed import MixedSearchResult
from costmodels.units import GIB

if TYPE_CHECKING:
    from rich.console import RenderableType


def mixed_plan_columns(estimates: Sequence[MixedEstimate], setting: MixedSetting) -> list[Column]:
    """Columns of ranked plans, best first."""
    scale, unit = time_scale(min(e.step_s for e in estimates))
    names = [island.name for island in setting.cluster.islands]
    return [
        Column(header="#", cells=tuple(str(i) for i in range(1, len(estimates) + 1))),
        Column(header="pipelines", cells=tuple(_lines_text(e, names) for e in estimates), text=True, wraps=True),
        Column(header="sharding", cells=tuple(_sharding_text(e) for e in estimates), text=True, drop=1),
        Column(header=f"step {unit}", cells=tuple(significant(e.step_s / scale) for e in estimates)),
        Column(header="tok/s", cells=tuple(significant(e.tokens_per_s) for e in estimates), drop=2),
        Column(header="MFU", cells=tuple(percent(e.mfu) for e in estimates), drop=2),
        Column(header="GiB", cells=tuple(f"{e.memory_gib:.1f}" for e in estimates)),
    ]


def _lines_text(estimate: MixedEstimate, names: Sequence[str]) -> str:
    return " | ".join(
        f"{line.replicas} of " + " > ".join(f"{names[s.island]} tp{s.tp} pp{s.stages} cp{s.cp}" for s in line.segments)
        for line in estimate.plan.lines
    )


def _sharding_text(estimate: MixedEstimate) -> str:
    plan = estimate.plan
    return f"ZeRO-{plan.zero_stage} {plan.sharding}" if plan.zero_stage else "none"


def _runs(numbers: Sequence[int]) -> str:
    """``5, 5, 5, 4`` as ``3 x 5, 4``."""
    runs = [(number, len(list(alike))) for number, alike in groupby(numbers)]
    return ", ".join(f"{times} x {number}" if times > 1 else f"{number}" for number, times in runs)


def segment_columns(estimate: MixedEstimate, setting: MixedSetting) -> list[Column]:
    """Columns of one plan's islands: degrees, blocks, shares of the batch, how busy, memory. Idle islands come last."""
    islands, plan = setting.cluster.islands, estimate.plan
    rows = [(i, line, k) for i, line in enumerate(plan.lines) for k in range(len(line.segments))]
    idle = [island for island in islands if island.name in estimate.idle_devices]

    def stages(line: int, segment: int) -> list[StageEstimate]:
        return [s for s in estimate.stages if (s.line, s.segment) == (line, segment)]

    def column(header: str, cells: Sequence[str], empty: str, *, text: bool = False) -> Column:
        return Column(header=header, cells=(*cells, *(empty for _ in idle)), text=text)

    held = [stages(i, k) for i, _, k in rows]
    used = [islands[line.segments[k].island] for _, line, k in rows]
    peaks = [max(s.memory_bytes for s in group) / GIB for group in held]
    busy = [sum(_mean_busy(plan.lines[s.line], s) for s in group) / len(group) / estimate.step_s for group in held]
    return [
        Column(header="island", cells=tuple(island.name for island in (*used, *idle)), text=True),
        Column(
            header="devices",
            cells=tuple(f"{island.world_size} {island.device.name}" for island in (*used, *idle)), text=True,
        ),
        column("line", [str(i + 1) for i, _, _ in rows], "idle"),
        column("tp", [str(line.segments[k].tp) for _, line, k in rows], "-"),
        column("cp", [str(line.segments[k].cp) for _, line, k in rows], "-"),
        column("dp", [str(line.replicas) for _, line, _ in rows], "-"),
        column("blocks of stages", [_runs([s.blocks for s in group]) for group in held], "-", text=True),
        column("mb", [str(line.microbatch_size) for _, line, _ in rows], "-"),
        column("sequences of replicas", [_runs(line.batch) for _, line, _ in rows], "-", text=True),
        column("recompute", [str(line.segments[k].recompute) for _, line, k in rows], "-", text=True),
        column("busy", [percent(share) for share in busy], "0.0%"),
        column("GiB", [f"{p:.1f} of {g[0].memory_limit / GIB:.0f}" for p, g in zip(peaks, held, strict=True)], "-"),
    ]  # fmt: skip


def _mean_busy(line: Line, stage: StageEstimate) -> float:
    """Busy seconds over all replicas, some of which have fewer sequences."""
    return stage.busy_s * sum(line.batch) / (max(line.batch) * line.replicas)


def breakdown_line(estimate: MixedEstimate) -> str:
    """Where the step of the slowest line goes."""
    terms = sorted(((seconds, name) for name, seconds in estimate.breakdown.items() if seconds > 0), reverse=True)
    parts = ", ".join(f"{TERM_LABELS[name]} {percent(seconds / estimate.step_s)}" for seconds, name in terms)
    which = f"line {estimate.line_s.index(estimate.step_s) + 1}, the slowest: " if len(estimate.line_s) > 1 else ""
    return which + parts


def mixed_search_line(result: MixedSearchResult) -> str:
    """What the search looked at, and how far the best can be from the optimum."""
    refused = ", ".join(f"{number} by {why}" for why, number in result.rejected.items())
    gap = result.best[0].step_s / result.bound_s - 1
    proof = "the best is proven" if gap <= 0 else f"nothing is more than {percent(gap, 2)} faster"
    return (
        f"{result.considered} plans considered, {result.feasible} priced and feasible; others: {refused}; {proof}; "
        f"searched in {result.seconds:.2f} s"
    )


def mixed_plans_table(
    result: MixedSearchResult, setting: MixedSetting, *, width: int = 120, title: str = "Plans"
) -> RenderableType:
    """Ranked plans, the best one island by island, and what the search looked at."""
    from rich.console import Group
    from rich.text import Text

    best = result.best[0]
    return Group(
        terminal_table(mixed_plan_columns(result.best, setting), width, title=title, strong=(0,)),
        Text(),
        terminal_table(segment_columns(best, setting), width, title="The best plan, island by island"),
        Text(breakdown_line(best), style="dim"),
        Text(),
        Text(mixed_search_line(result)),
    )
