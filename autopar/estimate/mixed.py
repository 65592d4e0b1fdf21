"""Step time and memory of mixed plans, from the formulas that ``estimate`` uses.

Stage by stage: each stage's work, memory and optimizer are priced on its own island; the line's passes follow from all
stages (1F1B with unequal stages, transfers at the pace of the slowest boundary); data parallel groups that reach other
islands have the link between islands as their outermost level. The step is that of the line that is last, which waits
for nobody; what it reduces is counted at the pace of its own island. With equal islands this is ``estimate``, bit for
bit (tests/search/test_mixed.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.arrays import Ints, PlanArrays, to_arrays
from autopar.estimate.dataparallel import copy_seconds, exposed_data_parallel
from autopar.estimate.memory import ITEMS, rank_memory
from autopar.estimate.mixed_setting import (
    MixedSetting,
    Shared,
    across_islands,
    among_lines,
    pipeline_plan,
    segment_plan,
)
from autopar.estimate.pieces import Floats, combinations, price, sections
from autopar.estimate.setting import Setting
from autopar.estimate.stages import Placement, RankWork, rank_work, with_overheads
from autopar.estimate.step import (
    STRAGGLER_DEVICES,
    TERMS,
    _accumulation,
    _update,
    closed_form_ends,
    transfer_seconds,
)
from autopar.graph import OpGraph
from autopar.layout import Layout
from autopar.mixed_plan import Line
from autopar.plan import Plan
from autopar.shard import boundary_bytes
from costmodels.pipeline import pipeline_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRows:
    """Distinct stages of a model: runs of blocks [i, j) with the model's ends where they belong.

    Attributes:
        row: [blocks + 1, blocks + 1] number of the stage [i, j); -1 where j <= i.
        counts: [rows, sections] pieces of each section that it holds.
    """

    row: Ints
    counts: Floats


@lru_cache(maxsize=64)
def stage_rows(graph: OpGraph) -> StageRows:
    """Stages that hold equal pieces are one row."""
    parts, total = sections(graph), graph.num_blocks
    below = np.zeros((total + 1, len(parts)))
    ends = np.zeros((2, len(parts)))
    for column, part in enumerate(parts):
        for block in part.blocks:
            if 0 <= block < total:
                below[block + 1, column] += 1
            else:
                ends[int(block >= total), column] += 1
    below = np.cumsum(below, axis=0)
    starts, stops = np.triu_indices(total + 1, 1)
    held = below[stops] - below[starts]
    held += np.where(starts == 0, 1.0, 0.0)[:, None] * ends[0] + np.where(stops == total, 1.0, 0.0)[:, None] * ends[1]
    keys = np.concatenate([held, (starts == 0)[:, None], (stops == total)[:, None]], axis=1)
    _, first, index = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    row = np.full((total + 1, total + 1), -1, dtype=np.int64)
    row[starts, stops] = index.reshape(-1)
    return StageRows(row=row, counts=held[first])


def rows_of(graph: OpGraph, splits: Sequence[Sequence[int]]) -> Ints:
    """Rows of the stages of splits, [splits, stages]."""
    bounds = np.concatenate([np.zeros((len(splits), 1), dtype=np.int64), np.cumsum(splits, axis=1)], axis=1)
    return np.asarray(stage_rows(graph).row[bounds[:, :-1], bounds[:, 1:]])


@lru_cache(maxsize=2048)
def stage_table(setting: Setting, plan: Plan) -> RankWork:
    """Work of every row on one island, [rows, 1]; ``plan`` says tp, cp, sp, microbatch, recomputation, and pp."""
    counts = stage_rows(setting.graph).counts
    if plan.layout.pp == 1:
        row = stage_rows(setting.graph).row[0, setting.graph.num_blocks]
        counts = np.where(np.arange(len(counts))[:, None] == row, counts, 0.0)
    return _row_work(setting, [plan], counts)


def stage_seconds(setting: Setting, plans: Sequence[Plan], rows: Ints) -> tuple[Floats, Floats, Floats]:
    """Seconds of a microbatch's forward and backward on the device, and of waiting for launches, [plans, rows] each."""
    work = _row_work(setting, plans, stage_rows(setting.graph).counts[rows])
    forward = work.forward + work.forward_communication
    backward = work.backward + work.recompute + work.backward_communication
    whole, back, stall = (x.reshape(len(plans), len(rows)) for x in (forward, backward, work.stall))
    return whole, back, stall


def _row_work(setting: Setting, plans: Sequence[Plan], counts: Floats) -> RankWork:
    """Work of ranks with ``counts`` [rows, sections] under every plan, [plans * rows, 1]."""
    arrays = to_arrays(plans)
    parts = sections(setting.graph)
    degrees, combination = combinations(arrays)
    each = np.repeat(np.arange(len(plans)), len(counts))
    shape = np.tile(np.arange(len(counts)), len(plans))
    is_block = np.asarray([part.is_block(setting.graph) for part in parts])
    is_end = np.asarray([part.is_end(setting.graph) for part in parts])
    rank = np.full((len(counts), 1), min(plans[0].layout.pp - 1, 1))
    place = Placement(shape=shape, counts=counts[:, None, :], ranks=rank, like=np.zeros_like(rank))
    prices = price(setting, degrees, parts)
    return rank_work(prices, combination[each], place, is_block, is_end, arrays.select(each), setting.stack)


@dataclass(frozen=True, kw_only=True, slots=True)
class LineCosts:
    """Costs of one line for several splits or batches, arrays [cases, stages], seconds and bytes.

    Attributes:
        forward, backward: of a microbatch, as the schedule counts them.
        ends: of the passes.
        accumulation, data, update: what follows; see ``step.step_terms``.
        memory: items of ``memory.ITEMS``.
        work, transfer: what they come from.
        num_microbatches: [cases].
    """

    forward: Floats
    backward: Floats
    ends: Floats
    accumulation: Floats
    data: Floats
    update: Floats
    memory: dict[str, Floats]
    work: RankWork
    transfer: Floats
    num_microbatches: Floats

    @property
    def memory_bytes(self) -> Floats:
        """Peak of every stage."""
        return sum(self.memory.values(), np.zeros_like(self.ends))

    @property
    def finished(self) -> Floats:
        """When every stage has done its step."""
        return self.ends + self.data + self.update + self.accumulation


def line_costs(
    setting: MixedSetting, line: Line, shared: Shared, rows: Ints, num_microbatches: Floats, *, passes: bool = True
) -> LineCosts:
    """Price a line whose stages hold ``rows`` [cases, stages] (see ``stage_rows``), each case with its microbatches.

    Without ``passes`` stages are priced one by one, ``ends`` are 0, and a case need not be a whole model.
    """
    cases, m = len(rows), num_microbatches
    plans = [_arrays(segment_plan(setting, line, segment, shared), cases) for segment in line.segments]
    where = line.segment_of_stage
    work = _assembled(setting, line, shared, rows, plans)
    transfer = np.full(cases, line_transfer(setting, line, shared))
    ends = closed_form_ends(plans[0], work, m, transfer).ends if passes else np.zeros(rows.shape)
    own = seen = _own(setting, line)
    if shared.lines > 1:
        sizes = [line.replicas * segment.tp * segment.cp for segment in line.segments]
        seen = [among_lines(setting, s.island, size) for s, size in zip(line.segments, sizes, strict=True)]

    def of_segments(formula: Callable[[int], Floats]) -> Floats:
        return _columns([formula(k) for k in range(len(line.segments))], where)

    sent = [_boundary_bytes(s, pipeline_plan(line, g, shared)) for s, g in zip(own, line.segments, strict=True)]
    boundaries = [np.full(cases, size) for size in sent]
    held = [rank_memory(own[k], plans[k], work, m, boundaries[k]) for k in range(len(own))]
    return LineCosts(
        forward=work.forward_seconds,
        backward=work.backward_seconds,
        ends=ends,
        accumulation=of_segments(lambda k: _accumulation(own[k], plans[k], work, m)),
        data=of_segments(
            lambda k: exposed_data_parallel(seen[k], plans[k], work, m) + copy_seconds(own[k], plans[k], work, m)
        ),
        update=of_segments(lambda k: _update(own[k], plans[k], work)),
        memory={name: _columns([getattr(h, name) for h in held], where) for name in ITEMS},
        work=work,
        transfer=transfer,
        num_microbatches=m,
    )


def line_terms(setting: MixedSetting, line: Line, shared: Shared, costs: LineCosts) -> dict[str, Floats]:
    """Parts of the step of each case, [cases], named as in TERMS; as ``step.step_terms`` has them."""
    work, m = costs.work, costs.num_microbatches
    last, slowest = np.argmax(costs.finished, axis=1)[:, None], np.argmax(work.pass_seconds, axis=1)[:, None]

    def of(quantity: Floats, stage: NDArray[np.intp]) -> Floats:
        return np.take_along_axis(quantity, stage, axis=1)[:, 0]

    terms = {
        "forward": m * of(work.forward, slowest),
        "backward": m * of(work.backward, slowest),
        "recompute": m * of(work.recompute, slowest),
        "tensor_parallel": m * of(work.tensor, slowest),
        "context_parallel": m * of(work.context, slowest),
        "expert_parallel": m * of(work.expert, slowest),
        "launch_bound": m * of(work.stall, slowest),
    }
    busy = sum(terms.values(), np.zeros_like(m))
    moved = pipeline_seconds(0.0, 0.0, line.num_stages, m, 1, costs.transfer)
    finished = of(costs.ends, last)
    terms["pipeline_transfer"] = np.minimum(moved, np.maximum(finished - busy, 0.0))
    terms["processor_sharing"] = np.zeros_like(m)
    bubble = finished - busy - terms["pipeline_transfer"]
    terms["pipeline_bubble"] = bubble if line.num_stages > 1 else np.zeros_like(m)
    terms["gradient_accumulation"] = of(costs.accumulation, last)
    terms["data_parallel"] = of(costs.data, last)
    terms["optimizer"] = of(costs.update, last)
    terms["step_overhead"] = np.full_like(m, setting.stack.host.step_seconds)
    together = sum(terms.values(), np.zeros_like(m))
    terms["stragglers"] = straggler_share(setting, line, shared) * together
    return {name: terms[name] for name in TERMS}


def straggler_share(setting: MixedSetting, line: Line, shared: Shared) -> float:
    """Longer step by stragglers, by the machines and the replicas of the plan."""
    clusters = setting.cluster.islands
    machines = sum(c.world_size / max(STRAGGLER_DEVICES, c.domain) for c in clusters)
    replicas = shared.replicas * max(segment.cp for segment in line.segments)
    return float(setting.stack.straggler * np.log2(np.maximum(np.minimum(machines, replicas), 1.0)))


def line_transfer(setting: MixedSetting, line: Line, shared: Shared) -> float:
    """Seconds of one transfer between neighbouring stages, at the slowest boundary."""
    plans = [pipeline_plan(line, segment, shared) for segment in line.segments]
    sizes = [_boundary_bytes(s, plan) for s, plan in zip(_own(setting, line), plans, strict=True)]
    found = [0.0]
    for k, segment in enumerate(line.segments):
        if segment.stages > 1:
            found.append(_send_seconds(setting.islands[segment.island], plans[k], sizes[k]))
        for other in {k - 1, k + 1} & set(range(len(plans))):
            size = line.replicas * segment.tp * segment.cp
            outside = across_islands(setting, segment.island, size)
            found.append(_send_seconds(outside, plans[k], max(sizes[k], sizes[other])))
    return max(found)


def _own(setting: MixedSetting, line: Line) -> list[Setting]:
    return [setting.islands[segment.island] for segment in line.segments]


@lru_cache(maxsize=8192)
def _send_seconds(setting: Setting, plan: Plan, num_bytes: float) -> float:
    return float(transfer_seconds(setting, to_arrays([plan]), np.full(1, num_bytes))[0])


@lru_cache(maxsize=8192)
def _boundary_bytes(setting: Setting, plan: Plan) -> float:
    degrees, _ = combinations(to_arrays([plan]))
    return float(np.asarray(boundary_bytes(setting.graph, degrees, setting.stack))[0])


def _arrays(plan: Plan, cases: int) -> PlanArrays:
    return to_arrays([plan]).select(np.zeros(cases, dtype=np.int64))


def _columns(found: Sequence[Floats], where: Sequence[int]) -> Floats:
    """Of arrays [cases, stages] as priced on each segment's island, every stage from its own."""
    if len(found) == 1:
        return found[0]
    merged = np.array(np.broadcast_arrays(*found)[0])
    for stage, segment in enumerate(where):
        merged[:, stage] = found[segment][:, stage]
    return merged


def _assembled(setting: MixedSetting, line: Line, shared: Shared, rows: Ints, plans: Sequence[PlanArrays]) -> RankWork:
    """Work of all stages, each from the table of its island."""
    cases, stages = rows.shape
    tables = []
    for segment in line.segments:
        layout = Layout(tp=segment.tp, cp=segment.cp, pp=min(stages, 2))
        alone = Plan(
            layout=layout, microbatch_size=line.microbatch_size, recompute=segment.recompute,
            sequence_parallel=shared.sequence_parallel and segment.tp > 1,
        )  # fmt: skip
        tables.append(stage_table(setting.islands[segment.island], alone))
    names = [f.name for f in dataclasses.fields(RankWork) if f.name != "place"]
    columns = {name: np.empty((cases, stages)) for name in names}
    for stage, k in enumerate(line.segment_of_stage):
        for name in names:
            columns[name][:, stage] = getattr(tables[k], name)[rows[:, stage], 0]
    numbers = np.broadcast_to(np.arange(stages), (cases, stages))
    place = Placement(
        shape=np.arange(cases), counts=stage_rows(setting.graph).counts[rows], ranks=numbers, like=numbers
    )
    work = RankWork(**columns, place=place)
    dressed = [with_overheads(work, p, setting.stack) for p in plans]
    return dataclasses.replace(
        work,
        forward=_columns([w.forward for w in dressed], line.segment_of_stage),
        backward=_columns([w.backward for w in dressed], line.segment_of_stage),
    )
