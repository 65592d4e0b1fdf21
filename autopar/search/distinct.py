"""Which plans are the same answer: alternatives that a reader would want to see side by side, and which not.

Two plans of equally many ranks are the same answer if they have the same degrees (tp, cp, pp, ep, etp; dp follows)
and shard parameters alike: over data parallel ranks (ZeRO-3, FSDP) or not at all. Plans that differ only in
microbatch, schedule, virtual stages, recomputation, sequence parallelism, offload, order of axes, split of blocks or
in ZeRO 0, 1 and 2 are variants of one answer, of which the best stands for all.
"""

from __future__ import annotations

import numpy as np

from autopar.estimate.arrays import Ints, PlanArrays
from autopar.plan import Plan

DEGREES = ("tp", "cp", "pp", "ep", "etp")
BITS = 12
"""Of a code per degree; five degrees and one flag fit into the 63 bits of a positive code."""


def distinct_key(plan: Plan) -> tuple[int, ...]:
    """(tp, cp, pp, ep, etp, 1 if parameters are sharded): equal for plans that are the same answer."""
    layout = plan.layout
    sharded = plan.zero_stage == 3 and layout.dp_shard * layout.cp > 1
    return (*(getattr(layout, name) for name in DEGREES), int(sharded))


def distinct_codes(plans: PlanArrays) -> Ints:
    """A code for every plan, [plans]: codes are equal exactly where ``distinct_key`` is.

    A code depends on its plan alone, so that codes of several arrays can be compared. Raises OverflowError for a degree
    of 4,096 or more, which no model divides into.
    """
    codes = np.zeros(len(plans), dtype=np.int64)
    for name in DEGREES:
        degree: Ints = getattr(plans, name)
        if degree.max(initial=0) >> BITS:
            raise OverflowError(f"{name}={degree.max()} does not fit into {BITS} bits: take codes of feasible plans")
        codes = codes << BITS | degree
    sharded = (plans.zero == 3) & (plans.dp_shard * plans.cp > 1)
    return np.asarray(codes << 1 | sharded, dtype=np.int64)


def first_of_each(codes: Ints, top: int | None = None) -> Ints:
    """Indices of the first entry with each code, in order, the first ``top`` of them.

    For codes in the order of rank these are the plans to show: the best of every answer.
    """
    _, first = np.unique(codes, return_index=True)
    return np.sort(first)[:top].astype(np.int64)
