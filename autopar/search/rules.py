"""What forbids plans before they are priced, as arrays; the conditions are those of ``plan.violations``."""

from __future__ import annotations

from typing import Any

import numpy as np

from autopar.estimate.arrays import SCHEDULE_CODES, Bools, Ints
from autopar.estimate.setting import Setting
from autopar.plan import fewest_microbatches
from autopar.search.space import Cores, Decisions, Space


def core_rules(setting: Setting, cores: Cores) -> dict[str, Bools]:
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
    m = num_microbatches[:, None]
    stages = pp * decided.pipe_vp[pipes]
    empty = np.asarray([split.count(0) for split in decided.splits])[decided.pipe_split[pipes]]
    fewest = _fewest_microbatches(pp)[decided.pipe_schedule[pipes]]
    everywhere = np.zeros((len(num_microbatches), 1), dtype=np.bool_)
    return {
        "stages": (stages > setting.graph.num_blocks + empty) | everywhere,
        "microbatches": m < fewest,
        "pipeline too empty": ((pp > 1) & (m < space.min_microbatches)) | np.zeros(len(pipes), dtype=np.bool_),
    }


def _fewest_microbatches(pp: int) -> Ints:
    """By schedule code, see ``plan.fewest_microbatches``."""
    return np.asarray([fewest_microbatches(name, pp) for name in SCHEDULE_CODES])
