"""Exact search: price every plan of the space that nothing rules out, and rank those that fit in memory.

Minimise step_s(x) over x in X with memory(x) <= limit; X is enumerated (space.enumerate_plans), step_s and memory are
``estimate_many``, the very functions that ``estimate`` prints. Ties go to less memory, then to the slug's order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from autopar.errors import NoFeasiblePlan
from autopar.estimate import Costs, Estimate, Setting, estimate, estimate_many
from autopar.estimate.arrays import PlanArrays
from autopar.plan import Plan, Rejected
from autopar.search.space import Space, enumerate_plans, rule_out
from costmodels.units import GIB

Unsupported = Callable[[Plan], tuple[Rejected, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: estimates in the order of rank.
        considered: plans of the space.
        feasible: plans that fit.
        rejected: plans ruled out, by reason; with ``feasible`` they add up to ``considered``.
        seconds: of the search.
    """

    best: tuple[Estimate, ...]
    considered: int
    feasible: int
    rejected: Mapping[str, int]
    seconds: float


def search(
    setting: Setting, *, top: int = 10, space: Space | None = None, unsupported: Unsupported | None = None
) -> SearchResult:
    """Find the ``top`` fastest plans.

    Args:
        setting: what is given.
        top: how many plans to return.
        space: limits on what is looked at.
        unsupported: asks a runtime what it cannot run; such plans are rejected as ``runtime``.

    Raises:
        NoFeasiblePlan: nothing fits; the message names the nearest miss with its numbers.
    """
    start = time.perf_counter()
    space = space or Space()
    plans = enumerate_plans(setting, space)
    alive = np.ones(len(plans), dtype=np.bool_)
    rejected: dict[str, int] = {}
    for reason, hit in rule_out(setting, plans, space).items():
        rejected[reason] = int(np.count_nonzero(alive & hit))
        alive &= ~hit
    if unsupported is not None:
        refused = np.asarray([bool(alive[i]) and bool(unsupported(plans.plan(i))) for i in range(len(plans))])
        rejected["runtime"] = int(np.count_nonzero(refused))
        alive &= ~refused
    candidates = plans.select(alive)
    costs = estimate_many(setting, candidates)
    limit = setting.cluster.device.memory_bytes
    fits = costs.memory_bytes <= limit
    rejected["memory"] = int(np.count_nonzero(~fits))
    if not fits.any():
        raise NoFeasiblePlan(_nearest_miss(setting, candidates, costs, rejected))
    order = _ranked(candidates.select(fits), costs.step_s[fits], costs.memory_bytes[fits], top)
    return SearchResult(
        best=tuple(estimate(setting, plan) for plan in order),
        considered=len(plans),
        feasible=int(np.count_nonzero(fits)),
        rejected={reason: number for reason, number in rejected.items() if number},
        seconds=time.perf_counter() - start,
    )


def _ranked(plans: PlanArrays, step_s: np.ndarray, memory: np.ndarray, top: int) -> list[Plan]:
    order = np.lexsort((memory, step_s))[: 4 * top]
    named = sorted(((step_s[i], memory[i], plans.plan(i).slug, i) for i in order.tolist()), key=lambda row: row[:3])
    return [plans.plan(row[3]) for row in named[:top]]


def _nearest_miss(setting: Setting, plans: PlanArrays, costs: Costs, rejected: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{number} by {reason}" for reason, number in rejected.items() if number)
    if not len(plans):
        return (
            f"no layout of {setting.cluster.world_size} ranks fits the model and the batch of "
            f"{setting.workload.global_batch} ({reasons}): change the number of devices or the global batch"
        )
    nearest = int(np.argmin(costs.memory_bytes))
    need, limit = costs.memory_bytes[nearest] / GIB, setting.cluster.device.memory_bytes / GIB
    items = sorted(((costs.memory[name][nearest] / GIB, name) for name in costs.memory), reverse=True)
    largest = ", ".join(f"{name} {size:.1f}" for size, name in items[:3])
    return (
        f"no plan fits in memory ({reasons}). The nearest miss, {plans.plan(nearest).slug}, needs {need:.1f} GiB of "
        f"{limit:.1f} GiB per device ({largest}): use more devices, devices with more memory or a smaller model"
    )
