"""The plans in the running of a search, and the step time that another one has to beat."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.arrays import Ints, PlanArrays
from autopar.plan import Plan
from autopar.search.bounds import SLACK
from autopar.search.distinct import distinct_codes

Floats = NDArray[np.float64]


class Ranking:
    """Keeps plans that fit, by step time.

    Attributes:
        threshold: seconds above which a plan cannot be returned any more.
        feasible: plans that were added.
    """

    def __init__(self, top: int, distinct: bool) -> None:
        self.threshold, self.feasible = float("inf"), 0
        self._top, self._distinct = top, distinct
        self._parts: list[tuple[PlanArrays, Floats, Floats, Ints]] = []

    def add(self, plans: PlanArrays, step_s: Floats, memory: Floats) -> None:
        """Add plans that fit, with seconds and bytes."""
        self.feasible += len(plans)
        near = step_s <= self.threshold
        if not near.any():
            return
        plans, step_s, memory = plans.select(near), step_s[near], memory[near]
        codes = distinct_codes(plans) if self._distinct else np.zeros(len(plans), dtype=np.int64)
        self._parts.append((plans, step_s, memory, codes))
        fastest = self._fastest()
        if len(fastest) >= self._top:
            self.threshold = float(fastest[self._top - 1]) * (1 + SLACK)

    def _column(self, place: int) -> NDArray[Any]:
        return np.concatenate([part[place] for part in self._parts])

    def _fastest(self) -> Floats:
        """Step times of what may be returned, ascending: of all plans, or of the best of each answer."""
        step_s: Floats = self._column(1)
        order = np.argsort(step_s, kind="stable")
        if not self._distinct:
            return step_s[order]
        _, first = np.unique(self._column(3)[order], return_index=True)
        return step_s[order][np.sort(first)]

    def best(self) -> list[Plan]:
        """The plans to return, in the order of rank: by seconds, then bytes, then slug."""
        if not self._parts:
            return []
        step_s, memory, codes = self._column(1), self._column(2), self._column(3)
        starts = np.cumsum([0, *(len(part[0]) for part in self._parts)])
        order = np.lexsort((memory, step_s))
        order = order[step_s[order] <= self.threshold]
        found: list[Plan] = []
        seen: set[int] = set()
        at = 0
        while at < len(order) and len(found) < self._top:
            # Plans that tie in seconds and bytes go by slug.
            tied = at + 1
            while tied < len(order) and (step_s[order[tied]], memory[order[tied]]) == (
                step_s[order[at]], memory[order[at]]
            ):  # fmt: skip
                tied += 1
            same = []
            for index in order[at:tied].tolist():
                part = int(np.searchsorted(starts, index, side="right")) - 1
                plan = self._parts[part][0].plan(index - int(starts[part]))
                same.append((plan.slug, plan, int(codes[index])))
            for _, plan, code in sorted(same, key=lambda row: row[0]):
                if not (self._distinct and code in seen):
                    seen.add(code)
                    found.append(plan)
            at = tied
        return found[: self._top]
