"""Does the choice of a plan survive errors of the fitted numbers behind it, and if not, what to measure to decide?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.estimate import Estimate, Setting, estimate, estimate_many, to_arrays
from autopar.plan import Plan
from autopar.search.distinct import distinct_key
from autopar.search.exhaustive import search
from autopar.search.neighbours import neighbours
from autopar.search.obstacle import best_of
from autopar.search.space import Space
from autopar.search.why_not import forbidden
from autopar.validate.doubts import Doubt, doubts

ERROR = 0.1
"""Relative error of a number that a choice should survive."""
ANSWERS = 10
"""Answers whose prices tell which numbers matter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One number off by a factor, and everything searched anew.

    Attributes:
        doubt: the number.
        factor: that it is multiplied by.
        chosen: the chosen plan's price then.
        best: the fastest plan then; None where nothing fits.
    """

    doubt: Doubt
    factor: float
    chosen: Estimate
    best: Estimate | None

    @property
    def fits(self) -> bool:
        """Whether the chosen plan fits in memory then."""
        return self.chosen.fits

    @property
    def regret(self) -> float | None:
        """How much longer the chosen plan's step is than the best one's then; None where either does not fit."""
        return self.chosen.step_s / self.best.step_s - 1 if self.fits and self.best is not None else None

    @property
    def survives(self) -> bool:
        """Whether the answer stays the same (see search.distinct), variants aside."""
        return (
            self.fits and self.best is not None and distinct_key(self.best.plan) == distinct_key(self.chosen.plan)
        )  # fmt: skip

    @property
    def same_plan(self) -> bool:
        """Whether even the plan stays the same."""
        return self.best is not None and self.best.plan == self.chosen.plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """What ``sensitivity`` found.

    Attributes:
        chosen: the best plan.
        runner_up: the next answer; None where there is none.
        trials: of every number both signs.
        error: relative error that was tried.
    """

    chosen: Estimate
    runner_up: Estimate | None
    trials: tuple[Trial, ...]
    error: float

    @property
    def changes(self) -> tuple[Trial, ...]:
        """Trials in which another answer wins, the costliest first."""
        lost = [trial for trial in self.trials if not trial.survives]
        return tuple(sorted(lost, key=lambda t: -(t.regret if t.regret is not None else float("inf"))))

    @property
    def worst_regret(self) -> float:
        """The most that the chosen plan loses in any trial in which it fits."""
        return max((trial.regret or 0.0 for trial in self.trials), default=0.0)

    @property
    def margin(self) -> float | None:
        """How much longer a step of the runner-up takes."""
        return None if self.runner_up is None else self.runner_up.step_s / self.chosen.step_s - 1

    @property
    def told_apart(self) -> bool:
        """Whether the runner-up lies beyond the band around the chosen plan's step time.

        Errors that both plans share cancel in their ratio, so that plans inside the band may still be in the right
        order; beyond it they are even if errors were independent of each other.
        """
        return self.runner_up is None or self.runner_up.step_s > self.chosen.step_band.high

    @property
    def fits_at_high(self) -> bool:
        """Whether the chosen plan fits at the upper end of its memory band."""
        return self.chosen.memory_bands["total"].high <= self.chosen.memory_limit


def sensitivity(
    setting: Setting,
    *,
    error: float = ERROR,
    space: Space | None = None,
    on_trial: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Search anew with every fitted number ``error`` too high and as much too low.

    Numbers that move neither the price of an answer nor of a neighbour of the best plan are left out.

    Args:
        space: of all searches.
        on_trial: told (trials done, of how many) before each.
    """
    answers = search(setting, top=ANSWERS, space=space, distinct=True).best
    chosen, runner_up = answers[0], answers[1] if len(answers) > 1 else None
    moving = _moving(setting, [answer.plan for answer in answers])
    cases = [(doubt, factor) for doubt in moving for factor in (1 + error, 1 - error)]
    trials = []
    for done, (doubt, factor) in enumerate(cases):
        if on_trial is not None:
            on_trial(done, len(cases))
        changed = doubt.changed(factor)
        trials.append(
            Trial(doubt=doubt, factor=factor, chosen=estimate(changed, chosen.plan), best=best_of(changed, space))
        )
    return Sensitivity(chosen=chosen, runner_up=runner_up, trials=tuple(trials), error=error)


def _moving(setting: Setting, plans: list[Plan]) -> list[Doubt]:
    """Doubts that matter to any of these plans, or to one a decision away from the first."""
    near = [n.plan for n in neighbours(setting, plans[0]) if not forbidden(setting, n.plan)]
    arrays = to_arrays([*plans, *near])
    now = estimate_many(setting, arrays)

    def moves(doubt: Doubt) -> bool:
        then = estimate_many(doubt.changed(1 + ERROR), arrays)
        return not (np.array_equal(now.step_s, then.step_s) and np.array_equal(now.memory_bytes, then.memory_bytes))

    return [doubt for doubt in doubts(setting) if moves(doubt)]
