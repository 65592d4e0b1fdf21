"""The simulated step of one plan: every action of every pipeline rank on a common clock."""

from __future__ import annotations

import numpy as np

from autopar.estimate.arrays import PlanArrays, to_arrays
from autopar.estimate.pieces import combinations, price, sections
from autopar.estimate.setting import Setting
from autopar.estimate.stages import placement, rank_work, section_counts, with_overheads
from autopar.estimate.step import transfer_seconds
from autopar.plan import Plan
from autopar.schedule.actions import Direction, build_schedule
from autopar.schedule.simulate import Duration, Durations, Timeline, simulate, simulate_shared, with_halves
from autopar.shard import boundary_bytes


def stage_durations(setting: Setting, plan: Plan) -> Durations:
    """Seconds of a microbatch's forward and backward in every virtual stage, recomputation in backward."""
    plans = to_arrays([plan])
    parts = sections(setting.graph)
    degrees, rows = combinations(plans)
    counts = section_counts(parts, setting.graph.num_blocks, plan.num_stages, 1, plan.stage_blocks, setting.stack)
    where = placement([counts], np.zeros(1, dtype=np.int64), every_rank=True)
    is_block = np.asarray([part.is_block(setting.graph) for part in parts])
    is_end = np.asarray([part.is_end(setting.graph) for part in parts])
    work = rank_work(price(setting, degrees, parts), rows, where, is_block, is_end, plans, setting.stack)
    work = with_overheads(work, plans, setting.stack)
    durations = {}
    for stage in range(plan.num_stages):
        durations[stage, Direction.FORWARD] = Duration(
            float(work.forward[0, stage] + work.stall[0, stage] / 3), float(work.forward_communication[0, stage])
        )
        durations[stage, Direction.BACKWARD] = Duration(
            float(work.backward[0, stage] + work.recompute[0, stage] + work.stall[0, stage] * (2 / 3)),
            float(work.backward_communication[0, stage]),
        )
    return with_halves(durations)


def boundary_transfer(setting: Setting, plans: PlanArrays) -> float:
    """Seconds of one transfer between the pipeline neighbours of a single plan."""
    degrees, rows = combinations(plans)
    boundary = np.asarray(boundary_bytes(setting.graph, degrees, setting.stack))[rows]
    return float(transfer_seconds(setting, plans, boundary)[0])


def timeline(setting: Setting, plan: Plan) -> Timeline:
    """Simulate the passes of one plan. On a shared machine, ranks that compute at once slow each other."""
    plans = to_arrays([plan])
    schedule = build_schedule(plan.schedule, plan.layout.pp, plan.num_microbatches(setting.workload), plan.layout.vp)
    durations, transfer = stage_durations(setting, plan), boundary_transfer(setting, plans)
    cluster = setting.cluster
    if not cluster.sharing:
        return simulate(schedule, durations, transfer)
    replicas = plan.layout.world_size // plan.layout.pp
    machine = cluster.ranks_per_machine or cluster.devices_per_node
    return simulate_shared(
        schedule, durations, transfer, lambda active: cluster.slowdown(min(active * replicas, machine))
    )
