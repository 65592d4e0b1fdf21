"""Step time and memory of plans: one formula for one plan or for arrays of plans.

``estimate_many`` prices arrays (what the search optimises); ``estimate`` is the same on one plan, with everything
that a reader wants to see; ``timeline`` simulates the plan's passes. The closed form and the simulation agree where
the closed form is exact (tests/estimate); where ranks share processors it is not, and both use the simulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autopar.estimate.arrays import RECOMPUTE_CODES, Ints, PlanArrays, to_arrays
from autopar.estimate.memory import ITEMS, RankMemory, rank_memory
from autopar.estimate.pieces import Floats, combinations, price, sections
from autopar.estimate.result import Estimate
from autopar.estimate.setting import Setting
from autopar.estimate.stages import RankWork, rank_work, section_counts, stage_groups, with_overheads
from autopar.estimate.step import (
    TERMS,
    PipelineEnds,
    active_ranks,
    closed_form_ends,
    step_terms,
    transfer_seconds,
)
from autopar.estimate.timeline import timeline
from autopar.graph import OpGraph
from autopar.plan import Plan, Recompute, check_plan
from autopar.shard import boundary_bytes

__all__ = ["Costs", "Estimate", "PlanArrays", "Setting", "estimate", "estimate_many", "timeline", "to_arrays"]

FLOPS_CONVENTION = "3 x forward: 6 per weight and token plus the whole attention matrix, no recomputation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Predictions for arrays of plans, each array [plans].

    Attributes:
        step_s: seconds of a step.
        terms: its parts, by the names of ``step.TERMS``.
        memory_bytes: peak of the fullest pipeline rank.
        memory: its items, by the names of ``memory.ITEMS``.
    """

    step_s: Floats
    terms: dict[str, Floats]
    memory_bytes: Floats
    memory: dict[str, Floats]


def estimate_many(setting: Setting, plans: PlanArrays) -> Costs:
    """Price arrays of plans that have no violations (see ``plan.violations``)."""
    count = len(plans)
    terms = {name: np.zeros(count) for name in TERMS}
    items = {name: np.zeros(count) for name in ITEMS}
    for indices, found, held in _evaluate(setting, plans):
        fullest = np.argmax(held.total, axis=1)[:, None]
        for name in TERMS:
            terms[name][indices] = found[name]
        for name in ITEMS:
            items[name][indices] = np.take_along_axis(getattr(held, name), fullest, axis=1)[:, 0]
    return Costs(
        step_s=sum(terms.values(), np.zeros(count)),
        terms=terms,
        memory_bytes=sum(items.values(), np.zeros(count)),
        memory=items,
    )


def _evaluate(setting: Setting, plans: PlanArrays) -> Iterator[tuple[Ints, dict[str, Floats], RankMemory]]:
    """Terms [plans] and memory [plans, ranks] for each group of plans that divides the blocks alike."""
    graph = setting.graph
    parts = sections(graph)
    degrees, rows = combinations(plans)
    selective = bool((plans.recompute == RECOMPUTE_CODES.index(Recompute.SELECTIVE)).any())
    prices = price(setting, degrees, parts, by_module=selective)
    boundary = np.asarray(boundary_bytes(graph, degrees, setting.stack))
    is_block = np.asarray([part.is_block(graph) for part in parts])
    is_end = np.asarray([part.is_end(graph) for part in parts])
    for (pp, vp, v_shaped, blocks), indices in stage_groups(plans):
        group = plans.select(indices)
        counts = section_counts(parts, graph.num_blocks, pp, vp, blocks, setting.stack, v_shaped=v_shaped)
        work = rank_work(prices, rows[indices], counts, is_block, is_end, group, setting.stack)
        work = with_overheads(work, group, setting.stack)
        m = np.asarray(setting.workload.global_batch / (group.dp * group.microbatch))
        edge = boundary[rows[indices]]
        transfer = transfer_seconds(setting, group, edge)
        ends = _pipeline_ends(setting, group, work, m, transfer)
        yield indices, step_terms(setting, group, work, m, transfer, ends), rank_memory(setting, group, work, m, edge)


def _pipeline_ends(setting: Setting, plans: PlanArrays, work: RankWork, m: Floats, transfer: Floats) -> PipelineEnds:
    alone = closed_form_ends(plans, work, m, transfer)
    if not setting.cluster.sharing:
        return alone
    if work.parameters.shape[1] == 1:
        slower = setting.cluster.slowdown(active_ranks(setting, plans)) - 1.0
        sharing = m[:, None] * slower * (work.forward + work.backward + work.recompute)
        return PipelineEnds(ends=alone.ends + sharing, sharing=sharing)
    ends = np.asarray([[rank[-1].end for rank in timeline(setting, plans.plan(i)).ranks] for i in range(len(plans))])
    return PipelineEnds(ends=ends, sharing=np.maximum(ends - alone.ends, 0.0))


def estimate(setting: Setting, plan: Plan) -> Estimate:
    """Predict one plan. Raises PlanError if it violates the model, the workload or the cluster's size."""
    check_plan(plan, setting.graph, setting.workload, setting.cluster.world_size)
    [(_, found, held)] = list(_evaluate(setting, to_arrays([plan])))
    breakdown = {name: float(found[name][0]) for name in TERMS}
    step_s = float(sum((found[name] for name in TERMS), np.zeros(1))[0])
    fullest = int(np.argmax(held.total[0]))
    by_item = {name: getattr(held, name)[0].tolist() for name in ITEMS}
    per_rank = tuple(dict(zip(ITEMS, sizes, strict=True)) for sizes in zip(*by_item.values(), strict=True))
    device, precision = setting.cluster.device, setting.workload.precision.value
    world = setting.cluster.world_size
    flops = _useful_flops(setting.graph) * setting.workload.global_batch
    rate = flops / step_s / world
    return Estimate(
        plan=plan,
        stack=setting.stack.name,
        device=device.name,
        experts=setting.graph.top_k > 0,
        step_s=step_s,
        breakdown=breakdown,
        memory=per_rank[fullest],
        memory_per_rank=tuple(held.total[0].tolist()),
        memory_items_per_rank=per_rank,
        memory_limit=device.memory_bytes,
        tokens_per_s_per_gpu=setting.workload.tokens / step_s / world,
        model_flops_per_s_per_gpu=rate,
        mfu=rate / device.peak(precision),
        peak_flops=device.peak(precision),
        flops_convention=FLOPS_CONVENTION,
        assumptions=_assumptions(setting),
    )


@lru_cache(maxsize=256)
def _useful_flops(graph: OpGraph) -> float:
    """FLOP of a sequence's forward and backward."""
    return 3 * graph.model_flops()[0] / graph.batch_size


@lru_cache(maxsize=256)
def _assumptions(setting: Setting) -> tuple[str, ...]:
    cluster, stack = setting.cluster, setting.stack
    sources = [(f"device {cluster.device.name}", cluster.device.origins)]
    sources += [(f"link {link.name}", link.origins) for link in (cluster.node_link, cluster.network_link)]
    sources.append((f"stack {stack.name}", stack.origins))
    return tuple(f"{owner}: {name}: {origin}" for owner, origins in sources for name, origin in origins.items())
