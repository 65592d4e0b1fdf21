"""Exact search by branch and bound: the fastest plans of the whole space that fit in memory, and proof of it.

Minimise step_s(x) over x in X with memory(x) <= limit; X is ``space``, step_s and memory are ``estimate_many``, the
very functions that ``estimate`` prints. Cores are taken in the order of their lower bounds (``bounds``). A plan is left
unpriced only if a rule forbids it, a lower bound of its memory is above the limit, or a lower bound of its time is
above the time of the last plan to be returned; so nothing that is left out could have been returned. Ties go to less
memory, then to the slug's order.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from autopar.errors import NoFeasiblePlan
from autopar.estimate import Estimate, Setting, estimate, estimate_many, estimates
from autopar.estimate.arrays import Bools, Ints, PlanArrays
from autopar.estimate.pieces import Floats
from autopar.plan import Plan, Rejected, violations
from autopar.search.bounds import Shapes, core_bounds, price_pieces, weight_bytes
from autopar.search.candidates import MEMORY, SLOWER, Candidates, Ground, candidates_of
from autopar.search.ranking import Ranking
from autopar.search.rules import core_rules
from autopar.search.space import Cores, Decisions, Space, assemble, cores_of, decisions, listed, number_of_plans
from costmodels.units import GIB

Unsupported = Callable[[Plan], tuple[Rejected, ...]]
Forbidden = Callable[[PlanArrays], Bools]
FIRST_CORES, MOST_CORES = 64, 16384
"""Looked at before the others, to have a time to beat, and at once after that."""
SMALLEST_CORES = 4
"""Looked at in search of the nearest miss, where nothing fits."""
FIRST_CANDIDATES, MOST_CANDIDATES = 256, 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: estimates in the order of rank.
        considered: plans of the space.
        priced: of these, plans whose time and memory were computed one by one.
        feasible: of these, plans that fit.
        rejected: plans ruled out, by reason; with ``feasible`` they add up to ``considered``. ``memory`` are too large,
            by their price or by a bound; ``slower`` cannot be as fast as the last of ``best``, by a bound.
        bound_s: every plan that was left out as ``slower`` takes at least this long; infinite if none was left out.
        seconds: of the search.
    """

    best: tuple[Estimate, ...]
    considered: int
    priced: int
    feasible: int
    rejected: Mapping[str, int]
    bound_s: float
    seconds: float


def search(
    setting: Setting,
    *,
    top: int = 10,
    space: Space | None = None,
    unsupported: Unsupported | None = None,
    forbidden: Forbidden | None = None,
    distinct: bool = False,
) -> SearchResult:
    """Find the ``top`` fastest plans.

    Args:
        setting: what is given.
        top: how many plans to return.
        space: limits on what is looked at.
        unsupported: asks a runtime what it cannot run; such plans are rejected as ``runtime``.
        forbidden: says of arrays of plans whom a condition of the user's hits, [plans]; rejected as ``forbidden``.
        distinct: return the best of each answer alone, see ``search.distinct``.

    Raises:
        NoFeasiblePlan: nothing fits; the message names the nearest miss with its numbers.
    """
    start = time.perf_counter()
    space = space or Space()
    decided = decisions(setting, space)
    cores = cores_of(setting, space, decided)
    numbers = number_of_plans(cores, decided)
    considered, tally = int(numbers.sum()), Counter[str]()
    alive = np.ones(len(cores), dtype=np.bool_)
    for reason, hit in core_rules(setting, cores).items():
        tally[reason] += int(numbers[alive & hit].sum())
        alive &= ~hit
    cores, numbers = cores.select(alive), numbers[alive]
    ranking = Ranking(top, distinct)
    found = _Walk(setting, space, decided, unsupported, forbidden, ranking, tally)
    found.all(cores, numbers)
    if not ranking.feasible:
        raise _no_plan(setting, decided, cores, tally)
    return SearchResult(
        best=estimates(setting, ranking.best()),
        considered=considered,
        priced=found.priced,
        feasible=ranking.feasible,
        rejected={reason: number for reason, number in tally.items() if number},
        bound_s=ranking.threshold if tally[SLOWER] else float("inf"),
        seconds=time.perf_counter() - start,
    )


class _Walk:
    """Takes cores in the order of their bounds until no bound is below the time to beat."""

    def __init__(
        self, setting: Setting, space: Space, decided: Decisions, unsupported: Unsupported | None,
        forbidden: Forbidden | None, ranking: Ranking, tally: Counter[str],
    ) -> None:  # fmt: skip
        self.setting, self.space, self.decided, self.unsupported = setting, space, decided, unsupported
        self.forbidden, self.ranking, self.tally = forbidden, ranking, tally
        self.priced = 0
        self.shapes: dict[int, Shapes] = {}

    def all(self, cores: Cores, numbers: Ints) -> None:
        """Look at every core, or prove that it is too large or too slow. ``numbers`` [cores] are the plans of each."""
        weights = weight_bytes(self.setting, cores, self.decided)
        bound = core_bounds(self.setting, cores, weights)
        room = bound.memory <= self.setting.cluster.device.memory_bytes
        self.tally[MEMORY] += int(numbers[~room].sum())
        order = np.flatnonzero(room)[np.argsort(bound.seconds[room], kind="stable")]
        step = FIRST_CORES
        while len(order):
            soon = int(np.searchsorted(bound.seconds[order], self.ranking.threshold, side="right"))
            self.tally[SLOWER] += int(numbers[order[soon:]].sum())
            now, order = order[: min(step, soon)], order[min(step, soon) : soon]
            if len(now):
                ground = self._ground(cores.select(now), (weights[0][now], weights[1][now]))
                self._look_at(ground, candidates_of(ground, self.ranking.threshold, self.tally))
            step = min(16 * step, MOST_CORES)

    def _ground(self, cores: Cores, weights: tuple[Floats, Floats]) -> Ground:
        return Ground(
            setting=self.setting, space=self.space, decided=self.decided, cores=cores,
            pieces=price_pieces(self.setting, cores, self.decided), weights=weights,
            around=cores.holdings.sum(axis=1), shapes=self.shapes,
        )  # fmt: skip

    def _look_at(self, ground: Ground, candidates: Candidates) -> None:
        """Price candidates in the order of their bounds."""
        candidates = candidates.select(np.argsort(candidates.seconds, kind="stable"))
        step = FIRST_CANDIDATES
        while len(candidates):
            soon = int(np.searchsorted(candidates.seconds, self.ranking.threshold, side="right"))
            self.tally[SLOWER] += int(ground.around[candidates.core[soon:]].sum())
            now = min(step, soon)
            self._price(ground, candidates.select(np.arange(now)))
            candidates, step = candidates.select(np.arange(now, soon)), min(4 * step, MOST_CANDIDATES)

    def _price(self, ground: Ground, chosen: Candidates) -> None:
        """Price candidates with every way of holding state."""
        row, holding = np.nonzero(ground.cores.holdings[chosen.core])
        core = chosen.core[row]
        plans = assemble(
            self.setting, ground.cores, self.decided, core, chosen.pipe[row], chosen.recompute[row], holding
        )
        rows = ground.pieces.rows[core]
        if self.forbidden is not None:
            allowed = ~self.forbidden(plans)
            self.tally["forbidden"] += int(np.count_nonzero(~allowed))
            plans, rows = plans.select(allowed), rows[allowed]
        if self.unsupported is not None:
            runs = np.asarray([not self.unsupported(plans.plan(i)) for i in range(len(plans))], dtype=np.bool_)
            self.tally["runtime"] += int(np.count_nonzero(~runs))
            plans, rows = plans.select(runs), rows[runs]
        if not len(plans):
            return
        costs = estimate_many(self.setting, plans, (ground.pieces.prices, rows))
        self.priced += len(plans)
        device = costs.memory_bytes <= self.setting.cluster.device.memory_bytes
        fits = costs.fits(self.setting)
        self.tally[MEMORY] += int(np.count_nonzero(~device))
        self.tally["host memory"] += int(np.count_nonzero(device & ~fits))
        self.ranking.add(plans.select(fits), costs.step_s[fits], costs.memory_bytes[fits])


def _no_plan(setting: Setting, decided: Decisions, cores: Cores, tally: Mapping[str, int]) -> NoFeasiblePlan:
    reasons = ", ".join(f"{number} by {reason}" for reason, number in tally.items() if number)
    world, batch = setting.cluster.world_size, setting.workload.global_batch
    smallest = _smallest(setting, decided, cores) if len(cores) else None
    if smallest is None:
        return NoFeasiblePlan(
            f"no layout of {world} ranks fits the model and the batch of {batch} ({reasons}): change the number of "
            "devices or the global batch",
            rejected=tally,
        )
    device = setting.cluster.device
    need, limit = smallest.memory_bytes / GIB, device.memory_bytes / GIB
    items = sorted(((size / GIB, name) for name, size in smallest.memory.items()), reverse=True)
    largest = ", ".join(f"{name} {size:.1f}" for size, name in items[:3])
    return NoFeasiblePlan(
        f"no plan fits in memory ({reasons}). The nearest miss, {smallest.plan.slug}, needs {need:.1f} GiB of "
        f"{limit:.1f} GiB per device ({largest}): use more devices, devices with more memory or a smaller model",
        rejected=tally,
        least_bytes=smallest.memory_bytes,
    )


def _smallest(setting: Setting, decided: Decisions, cores: Cores) -> Estimate | None:
    """Of the cores whose bound of memory is least, the plan that needs the least."""
    weights = weight_bytes(setting, cores, decided)
    fewest = np.argsort(core_bounds(setting, cores, weights).memory, kind="stable")[:SMALLEST_CORES]
    cores = cores.select(fewest)
    plans = listed(setting, cores, decided)
    alive = np.ones(len(plans), dtype=np.bool_)
    for index in range(len(plans)):
        plan = plans.plan(index)
        alive[index] = not violations(plan, setting.graph, setting.workload, setting.cluster.world_size)
    plans = plans.select(alive)
    if not len(plans):
        return None
    memory = estimate_many(setting, plans).memory_bytes
    return estimate(setting, plans.plan(int(np.argmin(memory))))
