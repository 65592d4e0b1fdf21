"""Every plan of a space with its price, or the reason against it: what front and map of cells are read from.

The space is the plain one (``space.PLAIN``) where nothing else is said: the whole of it cannot be listed on large
clusters, and has its optimum found by ``exhaustive.search``, which prices by the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.estimate import PlanArrays, Setting, estimate_many
from autopar.estimate.arrays import Bools, Ints
from autopar.search.rules import plan_rules
from autopar.search.space import PLAIN, Space, enumerate_plans

Floats = NDArray[np.float64]
FEASIBLE = -1
MEMORY = "memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class Priced:
    """A space, arrays [plans].

    Attributes:
        plans: all of them, feasible or not.
        reasons: names of what rules plans out; ``memory`` is the last.
        reason: index of the reason against a plan, ``FEASIBLE`` where there is none.
        step_s, memory_bytes: prices; infinite where a plan was ruled out before it was priced.
        memory_limit: bytes that a device offers.
    """

    plans: PlanArrays
    reasons: tuple[str, ...]
    reason: Ints
    step_s: Floats
    memory_bytes: Floats
    memory_limit: float

    @property
    def feasible(self) -> Bools:
        """Whom nothing rules out."""
        return np.asarray(self.reason == FEASIBLE)

    def counts(self, among: Bools | None = None) -> dict[str, int]:
        """Plans ruled out, by reason; reasons that hit none are left out."""
        found = self.reason if among is None else self.reason[among]
        numbers = np.bincount(found[found >= 0], minlength=len(self.reasons)).tolist()
        return {name: number for name, number in zip(self.reasons, numbers, strict=True) if number}

    def fastest(self, among: Bools | None = None) -> int | None:
        """Index of the fastest feasible plan; ties go to less memory, then to the slug's order. None if there is none.

        Args:
            among: whom to look at; None means all.
        """
        indices = np.flatnonzero(self.feasible if among is None else self.feasible & among)
        if not len(indices):
            return None
        step, memory = self.step_s[indices], self.memory_bytes[indices]
        tied = indices[step == step.min()]
        memory = self.memory_bytes[tied]
        tied = tied[memory == memory.min()]
        return min((int(index) for index in tied), key=lambda index: self.plans.plan(index).slug)

    def smallest(self, among: Bools | None = None) -> int | None:
        """Index of the priced plan that needs the least memory, feasible or not; None if all are ruled out before."""
        priced = np.isfinite(self.memory_bytes)
        indices = np.flatnonzero(priced if among is None else priced & among)
        return int(indices[np.argmin(self.memory_bytes[indices])]) if len(indices) else None

    def faster_than(self, step_s: float) -> int:
        """Feasible plans that are faster."""
        return int(np.count_nonzero(self.feasible & (self.step_s < step_s)))


def price_space(setting: Setting, space: Space | None = None) -> Priced:
    """Price every plan that nothing rules out, in the order of ``enumerate_plans``."""
    space = space or PLAIN
    plans = enumerate_plans(setting, space)
    reason = np.full(len(plans), FEASIBLE, dtype=np.int64)
    rules = plan_rules(setting, plans, space)
    for index, hit in enumerate(rules.values()):
        reason[(reason == FEASIBLE) & hit] = index
    alive = np.flatnonzero(reason == FEASIBLE)
    step, memory = np.full((2, len(plans)), np.inf)
    costs = estimate_many(setting, plans.select(alive))
    step[alive], memory[alive] = costs.step_s, costs.memory_bytes
    limit = setting.cluster.device.memory_bytes
    reason[(reason == FEASIBLE) & (memory > limit)] = len(rules)
    return Priced(
        plans=plans, reasons=(*rules, MEMORY), reason=reason, step_s=step, memory_bytes=memory, memory_limit=limit
    )
