"""What each pipeline rank sends in a step of one plan, under the names in which a run counts it.

These are the calls of autopar's own executor (the stacks ``autopar-*``): DTensor's collectives, FSDP2's gathers and
scatters per block and for the rest of the stage, DDP's buckets, pipeline messages. A run counts the same keys, so that
comparing them is a join.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from autopar.estimate.setting import Setting
from autopar.graph import Op, OpKind, Split
from autopar.measurement import CountedCollective
from autopar.plan import V_SCHEDULES, Plan, Recompute
from autopar.schedule.actions import Action, Direction, build_schedule
from autopar.schedule.notation import rank_of_stage
from autopar.shard import (
    Degrees,
    batch_scale,
    boundary_bytes,
    context_collectives,
    owned_parameters,
    parameter_share,
    tensor_collectives,
)
from costmodels.stack import Stack

Key = tuple[str, str, int]
LOSS_BYTES = 4
STATISTIC_BYTES = 4


class _Ledger:
    """Adds up calls and bytes by (kind, axis, group size)."""

    def __init__(self) -> None:
        self.calls: dict[Key, int] = {}
        self.sizes: dict[Key, int] = {}

    def add(self, kind: str, axis: str, group: int, calls: float, num_bytes: float) -> None:
        if group > 1 and calls > 0:
            key = (kind, axis, group)
            self.calls[key] = self.calls.get(key, 0) + round(calls)
            self.sizes[key] = self.sizes.get(key, 0) + round(num_bytes)

    def entries(self) -> tuple[CountedCollective, ...]:
        return tuple(
            CountedCollective(kind=kind, axis=axis, group_size=group, count=self.calls[key], num_bytes=self.sizes[key])
            for key in sorted(self.calls)
            for kind, axis, group in [key]
        )


def expected_collectives(setting: Setting, plan: Plan) -> tuple[tuple[CountedCollective, ...], ...]:
    """Collectives of one step, by rank; ranks that differ in other axes than the pipeline's do the same."""
    graph, layout = setting.graph, plan.layout
    blocks = plan.blocks_of_stages(graph.num_blocks)
    first_block = np.cumsum((0, *blocks))
    m = plan.num_microbatches(setting.workload)
    schedule = build_schedule(plan.schedule, layout.pp, m, layout.vp)
    entries = []
    for rank in range(layout.pp):
        ledger, partial = _Ledger(), 0.0
        for stage in sorted({action.stage for action in schedule[rank]}):
            held = range(first_block[stage], first_block[stage + 1])
            by_block = [graph.block_ops(block) for block in held]
            before = graph.block_ops(-1) if stage == 0 else ()
            after = graph.block_ops(graph.num_blocks) if stage == plan.num_stages - 1 else ()
            _count_tensor(ledger, setting, plan, by_block, (*before, *after), m)
            _count_context(ledger, setting, plan, by_block, m)
            partial += _partial_elements(setting, plan, (*before, *(op for ops in by_block for op in ops), *after))
            actions = [action for action in schedule[rank] if action.stage == stage]
            _count_data(ledger, setting, plan, (before, *by_block, after), actions)
            _count_pipeline(ledger, setting, plan, stage, m)
        ledger.add("all_reduce", "tp", layout.tp, 1 if partial else 0, partial * setting.gradient_bytes)
        # Context parallel ranks average the loss.
        ledger.add("all_reduce", "cp", layout.cp, 1, LOSS_BYTES)
        entries.append(ledger.entries())
    return tuple(entries[layout.coordinates(rank)["pp"]] for rank in range(layout.world_size))


def _degrees(plan: Plan) -> Degrees:
    return Degrees(tp=plan.layout.tp, cp=plan.layout.cp, sp=plan.sequence_parallel, microbatch=plan.microbatch_size)


def _count_tensor(
    ledger: _Ledger, setting: Setting, plan: Plan, by_block: Sequence[Sequence[Op]], ends: Sequence[Op], m: int
) -> None:
    graph, degrees, tp = setting.graph, _degrees(plan), plan.layout.tp
    for index, ops in enumerate((*by_block, ends)):
        recomputed = plan.recompute is Recompute.FULL and index < min(
            plan.recompute_layers or len(by_block), len(by_block)
        )
        # Nobody needs the result of the last product again: recomputation stops before it.
        last = next((op.name for op in reversed(ops) if op.split is Split.ROW), "")
        for found in tensor_collectives(ops, graph, degrees, setting.stack):
            times = m * (2 if recomputed and found.phase == "forward" and found.source != last else 1)
            ledger.add(found.kind, "tp", tp, times * float(found.count), times * float(found.num_bytes))
    if setting.stack.tensor.vocab_parallel:
        # A divided loss takes a maximum, a sum, and the target's share of every token over the ranks.
        tokens = graph.batch_size * graph.seq_len * float(batch_scale(graph, degrees)) / plan.layout.cp
        for op in ends:
            if op.kind is OpKind.LOSS:
                ledger.add("all_reduce", "tp", tp, 3 * m, 3 * m * tokens * STATISTIC_BYTES)


def _count_context(ledger: _Ledger, setting: Setting, plan: Plan, by_block: Sequence[Sequence[Op]], m: int) -> None:
    """Keys and values gathered in forward, gathered again in backward or in the forward that it recomputes; reduced."""
    for ops in by_block:
        for found in context_collectives(ops, setting.graph, _degrees(plan)):
            ledger.add(found.kind, "cp", plan.layout.cp, m * float(found.count), m * float(found.num_bytes))


def _partial_elements(setting: Setting, plan: Plan, ops: Iterable[Op]) -> float:
    """Weights that see a part of the tokens under sequence parallelism: their gradients are added up once a step."""
    if not plan.sequence_parallel:
        return 0.0
    positions = setting.stack.tensor.vocab_parallel
    seeing = (
        op for op in ops if _is_norm(op) or (positions and op.kind is OpKind.EMBEDDING and op.split is Split.NONE)
    )
    return sum(parameter.elements for parameter in owned_parameters(seeing))


def _is_norm(op: Op) -> bool:
    return op.kind is OpKind.NORMALIZATION and op.split is Split.TOKENS


def _count_data(
    ledger: _Ledger, setting: Setting, plan: Plan, parts: Sequence[Sequence[Op]], actions: Sequence[Action]
) -> None:
    """``parts``: operations before the blocks, of each block, and after them."""
    layout = plan.layout
    if plan.zero_stage == 0:
        whole = [size for ops in parts for size in parameter_elements(ops, plan, setting.stack)]
        sizes = [size * setting.reduce_bytes for size in whole]
        ledger.add("all_reduce", "dp", layout.dp * layout.cp, num_buckets(sizes, setting.stack), sum(sizes))
        return
    groups = [ops for ops in (*parts[1:-1], (*parts[0], *parts[-1])) if owned_parameters(ops)]
    axis = "dp_shard" if layout.dp_replicate > 1 else "dp"
    gathers, shards = num_gathers(actions, plan), layout.dp_shard * layout.cp
    for ops in groups:
        elements = sum(parameter_elements(ops, plan, setting.stack))
        ledger.add("all_gather", axis, shards, gathers, gathers * elements * setting.weight_bytes)
        ledger.add("reduce_scatter", axis, shards, 1, elements * setting.reduce_bytes)
        ledger.add("all_reduce", "dp_replicate", layout.dp_replicate, 1, elements * setting.reduce_bytes / shards)


def parameter_elements(ops: Iterable[Op], plan: Plan, stack: Stack) -> list[float]:
    """Weights of each parameter on a tensor parallel rank, in the order of the operations."""
    return [p.elements * float(parameter_share(p.split, _degrees(plan), stack)) for p in owned_parameters(ops)]


def num_buckets(sizes: Sequence[float], stack: Stack) -> int:
    """DDP's buckets: filled in the order in which gradients are ready, closed when they reach their size.

    Source: torch's compute_bucket_assignment_by_size; the first bucket is smaller.
    """
    buckets, filled, limit = 0, 0.0, stack.data.first_bucket_bytes
    for size in reversed(sizes):
        filled += size
        if filled >= limit:
            buckets, filled, limit = buckets + 1, 0.0, stack.data.bucket_bytes
    return buckets + (filled > 0)


def num_gathers(actions: Sequence[Action], plan: Plan) -> int:
    """All-gathers of a sharded group in one step of one stage.

    ZeRO-2 gathers once and keeps the weights until the last backward. ZeRO-3 lets them go after each forward; after a
    backward too, but in a pipeline, where they stay for the pass that follows.
    """
    if plan.zero_stage < 3:
        return 1
    gathers, gathered = 0, False
    for action in actions:
        gathers += not gathered
        gathered = action.direction is not Direction.FORWARD and plan.layout.pp > 1
    return gathers


def _rank_of(plan: Plan, stage: int) -> int:
    return rank_of_stage(stage, plan.layout.pp, plan.schedule in V_SCHEDULES)


def _count_pipeline(ledger: _Ledger, setting: Setting, plan: Plan, stage: int, m: int) -> None:
    size = m * float(boundary_bytes(setting.graph, _degrees(plan), setting.stack))
    for neighbour in (stage - 1, stage + 1):
        if 0 <= neighbour < plan.num_stages and _rank_of(plan, neighbour) != _rank_of(plan, stage):
            for kind in ("send", "recv"):
                ledger.add(kind, "pp", plan.layout.pp, m, size)
    if stage < plan.layout.pp:
        # The last stage tells the others the loss.
        ledger.add("broadcast", "pp", plan.layout.pp, 1, LOSS_BYTES)
