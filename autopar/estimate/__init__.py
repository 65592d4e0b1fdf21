"""Step time and memory of plans: one formula for one plan or for arrays of plans.

``estimate_many`` prices arrays (what the search optimises); ``estimate`` is the same on one plan, with everything
that a reader wants to see; ``timeline`` simulates the plan's passes. The closed form and the simulation agree where
the closed form is exact (tests/estimate); where ranks share processors it is not, and both use the simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from autopar.estimate.arrays import RECOMPUTE_CODES, Bools, Ints, PlanArrays, distinct, to_arrays
from autopar.estimate.memory import ITEMS, RankMemory, rank_memory
from autopar.estimate.pieces import Floats, Prices, combinations, price, sections
from autopar.estimate.result import Estimate
from autopar.estimate.setting import Setting
from autopar.estimate.stages import RankWork, place, rank_work, with_overheads
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

__all__ = [
    "FLOPS_CONVENTION",
    "Costs",
    "Estimate",
    "PlanArrays",
    "Setting",
    "estimate",
    "estimate_many",
    "estimates",
    "timeline",
    "to_arrays",
    "useful_flops",
]

AT_ONCE = 8192
"""Plans whose arrays stay in a processor's cache while they are priced."""
FLOPS_CONVENTION = "3 x forward: 6 per weight and token plus the whole attention matrix, no recomputation"


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Predictions for arrays of plans, each array [plans].

    Attributes:
        step_s: seconds of a step.
        terms: its parts, by the names of ``step.TERMS``.
        memory_bytes: peak of the fullest pipeline rank.
        memory: its items, by the names of ``memory.ITEMS``.
        host_bytes: in the host's memory, of the rank that has most there.
    """

    step_s: Floats
    terms: dict[str, Floats]
    memory_bytes: Floats
    memory: dict[str, Floats]
    host_bytes: Floats

    def fits(self, setting: Setting) -> Bools:
        """Whether devices and, where state is offloaded, their hosts have the memory, [plans]."""
        device = setting.cluster.device
        host = device.host.memory_bytes if device.host else 0.0
        return (self.memory_bytes <= device.memory_bytes) & (self.host_bytes <= host)


def estimate_many(setting: Setting, plans: PlanArrays, priced: tuple[Prices, Ints] | None = None) -> Costs:
    """Price arrays of plans that have no violations (see ``plan.violations``).

    ``priced``, if they are known already: prices of pieces and, for every plan, the index of its combination.
    """
    count = len(plans)
    if not count:
        return Costs(
            step_s=np.zeros(0), terms={name: np.zeros(0) for name in TERMS}, memory_bytes=np.zeros(0),
            memory={name: np.zeros(0) for name in ITEMS}, host_bytes=np.zeros(0),
        )  # fmt: skip
    prices, rows = priced if priced is not None else _price_plans(setting, plans)
    parts = [
        _price_part(setting, plans.select(part), (prices, rows[part]))
        for part in np.split(np.arange(count), range(AT_ONCE, count, AT_ONCE))
    ]
    if len(parts) == 1:
        return parts[0]
    return Costs(
        step_s=np.concatenate([part.step_s for part in parts]),
        terms={name: np.concatenate([part.terms[name] for part in parts]) for name in TERMS},
        memory_bytes=np.concatenate([part.memory_bytes for part in parts]),
        memory={name: np.concatenate([part.memory[name] for part in parts]) for name in ITEMS},
        host_bytes=np.concatenate([part.host_bytes for part in parts]),
    )


def _price_plans(setting: Setting, plans: PlanArrays) -> tuple[Prices, Ints]:
    degrees, rows = combinations(plans)
    selective = bool((plans.recompute == RECOMPUTE_CODES.index(Recompute.SELECTIVE)).any())
    return price(setting, degrees, sections(setting.graph), by_module=selective), rows


def _price_part(setting: Setting, plans: PlanArrays, priced: tuple[Prices, Ints]) -> Costs:
    terms, held = _evaluate(setting, plans, every_rank=False, priced=priced)
    count, fullest = len(plans), np.argmax(held.total, axis=1)
    items = {name: getattr(held, name)[np.arange(count), fullest] for name in ITEMS}
    return Costs(
        step_s=sum(terms.values(), np.zeros(count)),
        terms=terms,
        memory_bytes=sum(items.values(), np.zeros(count)),
        memory=items,
        host_bytes=held.host.max(axis=1),
    )


def _evaluate(
    setting: Setting, plans: PlanArrays, *, every_rank: bool, priced: tuple[Prices, Ints]
) -> tuple[dict[str, Floats], RankMemory]:
    """Terms [plans] and memory [plans, ranks].

    Plans whose passes are equal share them, and those whose pipelines are equal share the ends of these.
    """
    graph, stack = setting.graph, setting.stack
    every_rank = every_rank or stack.pipeline.serial_stages or bool(setting.cluster.sharing)
    by_sharding = any(name.startswith("fsdp.") for name in stack.overheads)
    parts = sections(graph)
    prices, rows = priced
    is_block = np.asarray([part.is_block(graph) for part in parts])
    is_end = np.asarray([part.is_end(graph) for part in parts])
    where = place(parts, graph.num_blocks, plans, stack, every_rank=every_rank)
    sharded = (plans.zero >= 2) & (plans.shards > 1) & by_sharding
    first, pass_of = distinct(rows, where.shape, plans.recompute, plans.modules, plans.recompute_layers, sharded)
    passes = plans.select(first)
    work = rank_work(prices, rows[first], where.take(first), is_block, is_end, passes, stack)
    work = with_overheads(work, passes, stack)
    m = setting.workload.global_batch / (plans.dp * plans.microbatch)
    edge = np.asarray(boundary_bytes(graph, plans, stack))
    first, pipeline_of = distinct(pass_of, plans.schedule, plans.dp, plans.stride("pp"))
    pipelines = plans.select(first)
    transfer = transfer_seconds(setting, pipelines, edge[first])
    ends = _pipeline_ends(setting, pipelines, work.take(pass_of[first]), m[first], transfer)
    work, ends, transfer = work.take(pass_of), ends.take(pipeline_of), transfer[pipeline_of]
    return step_terms(setting, plans, work, m, transfer, ends), rank_memory(setting, plans, work, m, edge)


def _pipeline_ends(setting: Setting, plans: PlanArrays, work: RankWork, m: Floats, transfer: Floats) -> PipelineEnds:
    alone = closed_form_ends(plans, work, m, transfer)
    if not setting.cluster.sharing:
        return alone
    slower = setting.cluster.slowdown(active_ranks(setting, plans)) - 1.0
    sharing = m[:, None] * slower * (work.forward + work.backward + work.recompute)
    ends = alone.ends + sharing
    for i in np.flatnonzero(plans.pp > 1):
        simulated = np.asarray([rank[-1].end for rank in timeline(setting, plans.plan(int(i))).ranks])
        ends[i] = simulated[work.ranks[i]]
        sharing[i] = np.maximum(ends[i] - alone.ends[i], 0.0)
    return PipelineEnds(ends=ends, sharing=sharing)


def estimates(setting: Setting, plans: Sequence[Plan]) -> tuple[Estimate, ...]:
    """``estimate`` of several plans, the pieces of all priced at once."""
    if not plans:
        return ()
    prices, rows = _price_plans(setting, to_arrays(plans))
    return tuple(estimate(setting, plan, (prices, rows[i : i + 1])) for i, plan in enumerate(plans))


def estimate(setting: Setting, plan: Plan, priced: tuple[Prices, Ints] | None = None) -> Estimate:
    """Predict one plan; ``priced`` as in ``estimate_many``.

    Raises PlanError if it violates the model, the workload or the cluster's size.
    """
    check_plan(plan, setting.graph, setting.workload, setting.cluster.world_size)
    plans = to_arrays([plan])
    found, held = _evaluate(setting, plans, every_rank=True, priced=priced or _price_plans(setting, plans))
    breakdown = {name: float(found[name][0]) for name in TERMS}
    step_s = float(sum((found[name] for name in TERMS), np.zeros(1))[0])
    fullest = int(np.argmax(held.total[0]))
    by_item = {name: getattr(held, name)[0].tolist() for name in ITEMS}
    per_rank = tuple(dict(zip(ITEMS, sizes, strict=True)) for sizes in zip(*by_item.values(), strict=True))
    device, precision = setting.cluster.device, setting.workload.precision.value
    world = setting.cluster.world_size
    flops = useful_flops(setting.graph) * setting.workload.global_batch
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
        host_bytes=float(held.host[0].max()),
        host_limit=device.host.memory_bytes if device.host else 0.0,
        tokens_per_s_per_gpu=setting.workload.tokens / step_s / world,
        model_flops_per_s_per_gpu=rate,
        mfu=rate / device.peak(precision),
        peak_flops=device.peak(precision),
        flops_convention=FLOPS_CONVENTION,
        assumptions=_assumptions(setting),
    )


@lru_cache(maxsize=256)
def useful_flops(graph: OpGraph) -> float:
    """FLOP of a sequence's forward and backward."""
    return 3 * graph.model_flops()[0] / graph.batch_size


@lru_cache(maxsize=256)
def _assumptions(setting: Setting) -> tuple[str, ...]:
    cluster, stack = setting.cluster, setting.stack
    sources = [(f"device {cluster.device.name}", cluster.device.origins)]
    sources += [(f"link {link.name}", link.origins) for link in cluster.links]
    sources.append((f"stack {stack.name}", stack.origins))
    return tuple(f"{owner}: {name}: {origin}" for owner, origins in sources for name, origin in origins.items())
