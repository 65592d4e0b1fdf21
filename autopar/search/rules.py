"""What forbids plans before they are priced, as arrays; the conditions are those of ``plan.violations``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autopar.estimate.arrays import SCHEDULE_CODES, Bools, Ints, PlanArrays
from autopar.estimate.setting import Setting
from autopar.plan import fewest_microbatches
from autopar.search.space import Cores, Decisions, Space


def plan_rules(setting: Setting, plans: PlanArrays, space: Space) -> dict[str, Bools]:
    """Reasons against plans one by one, in the order in which they count; each array says whom it hits, [plans]."""
    found = core_rules(setting, plans)
    m = setting.workload.global_batch // (plans.dp * plans.microbatch)
    found |= _pipe_rules(setting, space, plans.splits, plans.pp, plans.vp, plans.schedule, plans.split, m)
    # How many microbatches there are is only a question where the batch divides.
    found["microbatches"] = found["microbatches"] & ~found["batch"]
    found["offload"] = plans.offload & (plans.zero == 0) & (plans.dp * plans.cp > 1)
    return found


def core_rules(setting: Setting, cores: Cores | PlanArrays) -> dict[str, Bools]:
    """Reasons against cores, in the order in which they count; each array says whom it hits, [cores]."""
    graph, workload, attention = setting.graph, setting.workload, setting.graph.attention

    def indivisible(number: int, by: Any) -> Bools:
        return np.asarray(number % by != 0)

    sequence = indivisible(workload.seq_len, np.where(cores.sp, cores.tp, 1))
    sequence |= indivisible(workload.seq_len, np.where(cores.cp > 1, 2 * cores.cp, 1))
    found: dict[str, Bools] = {}
    if attention is not None:
        found["query heads"] = indivisible(attention.num_heads, cores.tp)
        found["key-value heads"] = indivisible(attention.num_kv_heads, cores.tp)
    elif not any(op.parameters for op in graph.block_ops(0)):
        found["tensor parallel"] = cores.tp > 1
    if graph.num_experts:
        found["experts"] = indivisible(graph.num_experts, cores.ep)
        found["expert width"] = indivisible(graph.expert_width, cores.etp)
    found["sequence"] = sequence
    found["batch"] = workload.global_batch % (cores.dp * cores.microbatch) != 0
    return found


def pipe_rules(
    setting: Setting, space: Space, decided: Decisions, pp: int, num_microbatches: Ints, pipes: Ints
) -> dict[str, Bools]:
    """Reasons against pipes of ``pp`` ranks, [cores, pipes]; ``num_microbatches`` are [cores]."""
    return _pipe_rules(
        setting, space, decided.splits, np.asarray(pp), decided.pipe_vp[pipes], decided.pipe_schedule[pipes],
        decided.pipe_split[pipes], num_microbatches[:, None],
    )  # fmt: skip


def _pipe_rules(
    setting: Setting, space: Space, splits: Sequence[tuple[int, ...]], pp: Ints, vp: Ints, schedule: Ints, split: Ints,
    m: Ints,
) -> dict[str, Bools]:  # fmt: skip
    """Of arrays that broadcast: pipeline ranks, virtual stages, codes of schedules and splits, microbatches."""
    empty = np.asarray([blocks.count(0) for blocks in splits])[split]
    shape = np.broadcast_shapes(np.shape(pp), vp.shape, m.shape)
    degrees = np.unique(pp)
    fewest = np.asarray([[fewest_microbatches(name, int(p)) for name in SCHEDULE_CODES] for p in degrees])
    least = fewest[np.searchsorted(degrees, pp), schedule]
    stages = pp * vp > setting.graph.num_blocks + empty
    return {
        "stages": np.broadcast_to(stages, shape),
        "microbatches": np.broadcast_to(m < least, shape),
        "pipeline too empty": np.broadcast_to((pp > 1) & (m < space.min_microbatches), shape),
    }
