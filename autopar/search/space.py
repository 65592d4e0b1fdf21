"""Every layout of a cluster as arrays, and the reasons that rule some out before they are priced.

The space: tp cp pp dp over all ordered factorisations of the ranks; vp over what divides the blocks evenly; sharding
stages of the stack, over all data parallel ranks or over those of a node; microbatch over the divisors of a rank's
batch; sequence parallelism where tp > 1; recomputation none, selective, full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.arrays import RECOMPUTE_CODES, SCHEDULE_CODES, PlanArrays
from autopar.estimate.setting import Setting
from autopar.plan import Recompute, default_schedule

MAX_MICROBATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Limits on what is looked at.

    Attributes:
        max_cp: largest context parallel degree.
        min_microbatches: of a pipeline (fewer leave most of it idle).
        recompute: settings to try.
        max_vp: most virtual stages per rank.
    """

    max_cp: int = 64
    min_microbatches: int = 1
    recompute: tuple[Recompute, ...] = RECOMPUTE_CODES
    max_vp: int = 16


def divisors(number: int) -> tuple[int, ...]:
    """Divisors in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Ordered tuples of ``parts`` factors with this product."""
    if parts == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in factorisations(number // first, parts - 1):
            yield (first, *rest)


def enumerate_plans(setting: Setting, space: Space | None = None) -> PlanArrays:
    """All plans of the space, feasible or not; each multiplies to the cluster's ranks."""
    space = space or Space()
    rows: list[tuple[int, ...]] = []
    recompute = [RECOMPUTE_CODES.index(setting_) for setting_ in space.recompute]
    for tp, cp, pp, dp in factorisations(setting.cluster.world_size, 4):
        if cp > space.max_cp:
            continue
        microbatches = _microbatches(setting.workload.global_batch, dp)
        shardings = _shardings(setting, tp, cp, dp)
        sequence = (0, 1) if tp > 1 else (0,)
        virtual = _virtual(setting.graph.num_blocks, pp, space.max_vp)
        rows.extend(
            (tp, cp, pp, vp, replicas, shards, microbatch, zero, sp, again)
            for vp, (zero, replicas, shards), microbatch, sp, again in product(
                virtual, shardings, microbatches, sequence, recompute
            )
        )
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, 10).T
    tp_, cp_, pp_, vp_, replicas_, shards_, microbatch_, zero_, sp_, again_ = columns
    ones = np.ones_like(tp_)
    plain, interleaved = (SCHEDULE_CODES.index(default_schedule(virtual)) for virtual in (1, 2))
    schedule = np.where(vp_ > 1, interleaved, plain)
    return PlanArrays(
        tp=tp_, cp=cp_, pp=pp_, vp=vp_, dp_replicate=replicas_, dp_shard=shards_, microbatch=microbatch_, zero=zero_,
        sp=sp_.astype(np.bool_), recompute=again_, schedule=schedule, ep=ones, etp=ones, modules=0 * ones,
        recompute_layers=0 * ones, order=0 * ones, split=0 * ones, offload=np.zeros(len(ones), dtype=np.bool_),
    )  # fmt: skip


def _microbatches(global_batch: int, dp: int) -> tuple[int, ...]:
    """Sizes that divide a rank's batch; one candidate where the batch itself does not divide, to be rejected."""
    if global_batch % dp:
        return (1,)
    return tuple(size for size in divisors(global_batch // dp) if size <= MAX_MICROBATCH)


def _shardings(setting: Setting, tp: int, cp: int, dp: int) -> list[tuple[int, int, int]]:
    """(ZeRO stage, replicas, shards) for ``dp`` data parallel ranks that lie ``tp * cp`` ranks apart."""
    if dp * cp == 1:
        return [(0, 1, 1)]
    found = []
    in_node = max(1, setting.cluster.devices_per_node // (tp * cp))
    for zero in setting.stack.data.shardable:
        if zero == 0:
            found.append((0, dp, 1))
            continue
        found.append((zero, 1, dp))
        if 1 < in_node < dp and dp % in_node == 0:
            found.append((zero, dp // in_node, in_node))
    return found


def _virtual(num_blocks: int, pp: int, max_vp: int) -> tuple[int, ...]:
    if pp == 1 or num_blocks % pp:
        return (1,)
    return tuple(vp for vp in divisors(num_blocks // pp) if vp <= max_vp)


def rule_out(setting: Setting, plans: PlanArrays, space: Space | None = None) -> dict[str, NDArray[np.bool_]]:
    """Reasons against plans, in the order in which they count; each array says whom it hits, [plans].

    The reasons and their conditions are those of ``plan.violations`` (tests/search holds the two together), and the
    limits of the space.
    """
    space = space or Space()
    graph, workload = setting.graph, setting.workload
    attention = graph.attention
    nobody = np.zeros(len(plans), dtype=np.bool_)
    per_pass = plans.dp * plans.microbatch
    undivided = workload.global_batch % per_pass != 0
    m = workload.global_batch // per_pass

    def indivisible(number: int, by: Any) -> NDArray[np.bool_]:
        return np.asarray(number % by != 0)

    sequence = indivisible(workload.seq_len, np.where(plans.sp, plans.tp, 1))
    sequence |= indivisible(workload.seq_len, np.where(plans.cp > 1, 2 * plans.cp, 1))
    stages = plans.pp * plans.vp
    return {
        "query heads": indivisible(attention.num_heads, plans.tp) if attention else nobody,
        "key-value heads": indivisible(attention.num_kv_heads, plans.tp) if attention else nobody,
        "sequence": sequence,
        "stages": stages > graph.num_blocks,
        "batch": undivided,
        "microbatches": (plans.vp > 1) & (m < plans.pp) & ~undivided,
        "pipeline too empty": (plans.pp > 1) & (m < space.min_microbatches) & ~undivided,
    }
