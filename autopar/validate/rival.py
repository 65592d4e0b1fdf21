"""The prediction to beat: FLOPs over a constant share of the peak, times the pipeline's bubble.

The share is the best one in hindsight, the median of each source's own runs, so that the rival has seen what it is
judged on. It knows the model's FLOPs, recomputation, the bubble and the peak of the precision; nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autopar.fit.problem import Problem
from autopar.plan import Recompute

Floats = NDArray[np.float64]


def ideal_seconds(problem: Problem) -> Floats:
    """Seconds of a step at the peak, [cases]: F/(n P) (1 + (p - 1)/(m v)); NaN where a case cannot be priced.

    F counts 3 forwards, 4 under full recomputation; n devices, P dense peak, p stages, m microbatches, v virtual
    stages.
    """
    found = np.full(len(problem.cases), np.nan)
    for group in problem.groups:
        forward = group.graph.model_flops()[0] / group.graph.batch_size * group.workload.global_batch
        for index in group.indices:
            case = problem.cases[index]
            layout, plan = case.plan.layout, case.plan
            passes = 4 if plan.recompute is Recompute.FULL else 3
            peak = case.cluster.device.peak(case.workload.precision.value)
            bubble = (layout.pp - 1) / max(1, plan.num_microbatches(case.workload)) / layout.vp
            found[index] = passes * forward / (case.cluster.world_size * peak) * (1 + bubble)
    return found


def constant_efficiency(ideal: Floats, measured: Floats, sources: Sequence[str]) -> Floats:
    """The rival's seconds, [cases]: ``ideal`` times the median of measured / ideal of the case's source."""
    result = np.full(len(ideal), np.nan)
    for source in dict.fromkeys(sources):
        chosen = np.asarray([s == source for s in sources]) & np.isfinite(ideal)
        known = chosen & np.isfinite(measured)
        if known.any():
            result[chosen] = ideal[chosen] * np.median(measured[known] / ideal[known])
    return result
