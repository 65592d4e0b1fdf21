"""Blocks over the stages of one line: the fastest split that fits in memory, with a proof of how good it is.

The longest path of 1F1B from the first forward to the last backward is at least
    sum_s (f_s + b_s) + (m - 1) b_r + max(0, m - p + r) f_r + 2 (p - 1) c        for every stage r,
the first microbatch's way down to the last stage and back, and the other passes of stage r in between (p stages, m
microbatches, c seconds of a transfer, r from 0). What the first stage does after its passes comes on top. The splits
that minimise this bound (``stage_split``) are priced by ``estimate.mixed``; what has a bound below the best of them is
priced as well. So the result is the optimum, unless more than MOST_SPLITS are below: then ``bound_s`` says how far the
optimum can be.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.mixed import line_costs, line_terms, rows_of, stage_rows, straggler_share
from autopar.estimate.mixed_setting import MixedSetting, Shared
from autopar.estimate.stages import engine_split
from autopar.mixed_plan import Line
from autopar.search.stage_split import StageSplit, split_front, splits_below

Floats = NDArray[np.float64]

MOST_SPLITS = 4096
FRONT_SLACK = 0.02
"""Splits whose bound is that much above the least are priced at once."""
EXACT = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitLine:
    """A line with its blocks.

    Attributes:
        line: with ``blocks``.
        step_s: its step with the microbatches that it was asked for.
        memory_bytes: of its fullest stage.
        bound_s: no split of the line that fits is faster.
        priced: splits whose step was computed.
    """

    line: Line
    step_s: float
    memory_bytes: float
    bound_s: float
    priced: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Front:
    """The bound over all splits: splits that are best by it, its arrays (see ``_bounds``), and its least value."""

    splits: tuple[StageSplit, ...]
    time: Floats
    pace: Floats
    fixed: float
    share: float
    least_s: float


def split_line(
    setting: MixedSetting, line: Line, shared: Shared, num_microbatches: int, limit: float, even: bool = False
) -> SplitLine | None:
    """The fastest split of a line's blocks.

    Args:
        line: without blocks.
        num_microbatches: of the replica that has most.
        limit: a line whose step is not below it need not be solved: its ``step_s`` is then a bound, not below either.
        even: look at the engine's own split alone.

    Returns:
        None if no split fits in memory.
    """
    blocks, stages = setting.graph.num_blocks, line.num_stages
    if stages > blocks:
        return None
    if even or stages == 1:
        return _engines_own(setting, line, shared, num_microbatches)
    least = _least_seconds(setting, line, shared, num_microbatches)
    if least >= limit:
        return None if least == np.inf else SplitLine(line=line, step_s=least, memory_bytes=0, bound_s=least, priced=0)
    return _solved(setting, line, shared, num_microbatches)


@lru_cache(maxsize=100_000)
def _engines_own(setting: MixedSetting, line: Line, shared: Shared, num_microbatches: int) -> SplitLine | None:
    split = engine_split(setting.graph.num_blocks, line.num_stages, setting.stack)
    return _fastest(setting, line, shared, num_microbatches, [split])


@lru_cache(maxsize=100_000)
def _least_seconds(setting: MixedSetting, line: Line, shared: Shared, num_microbatches: int) -> float:
    return _front(setting, line, shared, num_microbatches).least_s


@lru_cache(maxsize=2)
def _front(setting: MixedSetting, line: Line, shared: Shared, num_microbatches: int) -> _Front:
    time, pace, fixed = _bounds(setting, line, shared, num_microbatches)
    share = 1 + straggler_share(setting, line, shared)
    splits = split_front(time, pace, FRONT_SLACK)
    least = (min((split.cost for split in splits), default=np.inf) + fixed) * share
    return _Front(splits=splits, time=time, pace=pace, fixed=fixed, share=share, least_s=least)


@lru_cache(maxsize=100_000)
def _solved(setting: MixedSetting, line: Line, shared: Shared, num_microbatches: int) -> SplitLine | None:
    front = _front(setting, line, shared, num_microbatches)
    known = [split.items for split in front.splits]
    best = _fastest(setting, line, shared, num_microbatches, known)
    assert best is not None, "splits of the front fit"
    bound = front.least_s if best.step_s > front.least_s * (1 + EXACT) else best.step_s
    if best.step_s > bound:
        below = best.step_s / front.share - front.fixed
        more = splits_below(front.time, front.pace, below, MOST_SPLITS)
        if more is not None:
            others = sorted({tuple(row) for row in more.tolist()} - set(known))
            again = _fastest(setting, line, shared, num_microbatches, others) if others else None
            best = min((s for s in (best, again) if s is not None), key=_rank)
            bound = best.step_s
    return dataclasses.replace(best, bound_s=bound)


def _rank(found: SplitLine) -> tuple[float, float, tuple[int, ...]]:
    """Faster, then less memory, then more blocks on earlier stages."""
    return (found.step_s, found.memory_bytes, tuple(-blocks for blocks in found.line.blocks))


def _fastest(
    setting: MixedSetting, line: Line, shared: Shared, num_microbatches: int, splits: list[tuple[int, ...]]
) -> SplitLine | None:
    """The fastest of some splits; None if none fits."""
    m = np.full(len(splits), num_microbatches, dtype=float)
    costs = line_costs(setting, line, shared, rows_of(setting.graph, splits), m)
    fits = (costs.memory_bytes <= _limits(setting, line)).all(axis=1)
    if not fits.any():
        return None
    steps = np.where(fits, sum(line_terms(setting, line, shared, costs).values(), np.zeros(len(splits))), np.inf)
    peaks = costs.memory_bytes.max(axis=1)
    ranked = [
        SplitLine(
            line=dataclasses.replace(line, blocks=splits[i]), step_s=float(steps[i]), memory_bytes=float(peaks[i]),
            bound_s=float(steps[i]), priced=len(splits),
        )
        for i in np.flatnonzero(steps == steps.min())
    ]  # fmt: skip
    return min(ranked, key=_rank)


def _limits(setting: MixedSetting, line: Line) -> Floats:
    limits = [setting.cluster.islands[segment.island].device.memory_bytes for segment in line.segments]
    return np.asarray(limits)[list(line.segment_of_stage)]


def _bounds(setting: MixedSetting, line: Line, shared: Shared, num_microbatches: int) -> tuple[Floats, Floats, float]:
    """(time, pace) of the bound for every run of blocks on every stage, [stages, blocks + 1, blocks + 1]; its rest."""
    rows, stages, m = stage_rows(setting.graph), line.num_stages, num_microbatches
    cases = np.repeat(np.arange(len(rows.counts))[:, None], stages, axis=1)
    costs = line_costs(setting, line, shared, cases, np.full(len(cases), m, dtype=float), passes=False)
    fits = costs.memory_bytes <= _limits(setting, line)
    time = np.where(fits, costs.forward + costs.backward, np.inf)
    if not setting.stack.pipeline.serial_stages:
        time[:, 0] += (costs.accumulation + costs.data + costs.update)[:, 0]
    others = np.maximum(m - stages + np.arange(stages), 0)
    pace = (m - 1) * costs.backward + others * costs.forward
    size = len(rows.row)
    starts, stops = np.arange(size)[:, None], np.arange(size)[None, :]
    out_time, out_pace = np.full((stages, size, size), np.inf), np.full((stages, size, size), np.inf)
    for s in range(stages):
        allowed = (stops > starts) & ((starts == 0) == (s == 0)) & ((stops == size - 1) == (s == stages - 1))
        out_time[s] = np.where(allowed, time[rows.row, s], np.inf)
        out_pace[s] = np.where(allowed, pace[rows.row, s], np.inf)
    fixed = 2 * (stages - 1) * float(costs.transfer[0]) + setting.stack.host.step_seconds
    return out_time, out_pace, fixed
