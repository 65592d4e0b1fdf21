"""Exact search by branch and bound: the fastest plans of the whole space that fit in memory, and proof of it.

Minimise step_s(x) over x in X with memory(x) <= limit; X is ``space``, step_s and memory are ``estimate_many``, the very
functions that ``estimate`` prints. Cores are taken in the order of their lower bounds (``bounds``). A plan is left
unpriced only if a rule forbids it, a lower bound of its memory is above the limit, or a lower bound of its time is above
the time of the last plan to be returned; so nothing that is left out could have been returned. Ties go to less memory,
then to the slug's order.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from autopar.errors import NoFeasiblePlan
from autopar.estimate import Costs, Estimate, Setting, estimate, estimate_many
from autopar.estimate.arrays import Ints, PlanArrays
from autopar.estimate.pieces import Floats
from autopar.plan import Plan, Rejected
from autopar.search import bounds
from autopar.search.candidates import MEMORY, SLOWER, Candidates, Ground, candidates_of
from autopar.search.distinct import distinct_codes
from autopar.search.rules import core_rules
from autopar.search.space import Space, assemble, cores_of, decisions, number_of_plans
from costmodels.units import GIB

Unsupported = Callable[[Plan], tuple[Rejected, ...]]
FIRST_CORES, FIRST_CANDIDATES = 64, 256
"""Looked at before the others, to have a time to beat."""
MOST_CORES, MOST_CANDIDATES = 4096, 8192


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
        bound_s: no plan of the space that fits is faster than this: the least of the best step time and of the bounds
            by which others were left out.
        seconds: of the search.
    """

    best: tuple[Estimate, ...]
    considered: int
    priced: int
    feasible: int
    rejected: Mapping[str, int]
    bound_s: float
    seconds: float


class _Ranking:
    """Plans in the running, and the step time that another one has to beat."""

    def __init__(self, top: int, distinct: bool) -> None:
        self.top, self.distinct = top, distinct
        self.plans: list[PlanArrays] = []
        self.step_s, self.memory, self.codes = np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64)
        self.threshold = np.inf

    def add(self, plans: PlanArrays, step_s: Floats, memory: Floats) -> None:
        codes = distinct_codes(plans) if self.distinct else np.zeros(0, dtype=np.int64)
        self.plans.append(plans)
        self.step_s = np.concatenate([self.step_s, step_s])
        self.memory = np.concatenate([self.memory, memory])
        self.codes = np.concatenate([self.codes, codes])
        self._raise_the_bar()

    def _raise_the_bar(self) -> None:
        if self.distinct:
            order = np.argsort(self.step_s, kind="stable")
            _, first = np.unique(self.codes[order], return_index=True)
            best = np.sort(self.step_s[order][first])
        else:
            best = np.sort(self.step_s)
        if len(best) >= self.top:
            self.threshold = float(best[self.top - 1]) * (1 + bounds.SLACK)

    def ranked(self) -> list[Plan]:
        near = np.flatnonzero(self.step_s <= self.threshold)
        starts = np.cumsum([0, *(len(plans) for plans in self.plans)])
        order = near[np.lexsort((self.memory[near], self.step_s[near]))]
        found: list[tuple[float, float, str, Plan]] = []
        seen: set[int] = set()
        for place, index in enumerate(order.tolist()):
            full = len(found) >= self.top
            if full and (self.step_s[index], self.memory[index]) > found[-1][:2]:
                break
            part = int(np.searchsorted(starts, index, side="right")) - 1
            plan = self.plans[part].plan(index - int(starts[part]))
            found.append((float(self.step_s[index]), float(self.memory[index]), plan.slug, plan))
            del place
        found.sort(key=lambda row: row[:3])
        return self._differing([row[3] for row in found], seen)

    def _differing(self, plans: list[Plan], seen: set[int]) -> list[Plan]:
        return plans[: self.top]
