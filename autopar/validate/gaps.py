"""Why a published plan is predicted to be slower than the best one, and what its makers changed later."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from autopar.validate.recipes import NEAR, Recipe

CHANGED = 0.05
"""Predicted change of the step from which a later release's plan counts as another one."""


class Kind(StrEnum):
    """Of a cause."""

    LACKING = "we lack"
    PURPOSE = "not a recipe"
    DECISION = "decision"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """Why a row is beyond 15 percent."""

    kind: Kind
    text: str


# (pattern of the caveats, what the program has no word for)
LACKING: tuple[tuple[str, str], ...] = (
    (r"drop tokens", "experts are padded to a capacity, so that nothing waits for counts of tokens"),
    (r"offloads to the host", "activations of some blocks lie on the host"),
    (r"known regression", "a regression of that release"),
)


def cause_of(row: Recipe) -> Cause:
    """What explains the gap: what the engine does that the program has no setting for, else the costliest decision."""
    for pattern, text in LACKING:
        if any(re.search(pattern, caveat) for caveat in row.caveats):
            return Cause(kind=Kind.LACKING, text=text)
    if re.search(r"asynctp", row.source, re.IGNORECASE):
        return Cause(kind=Kind.PURPOSE, text="measures overlapped tensor parallelism at a fixed tp")
    known = [held for held in row.held if held.ratio is not None]
    if not known:
        return Cause(kind=Kind.DECISION, text="no plan with any one decision as published was found")
    least = min(known, key=lambda held: (held.ratio or 0.0, held.decision))
    left = (least.ratio or 0.0) - 1
    rest = "explains it" if left + 1 <= NEAR else f"held, {left:.0%} stay"
    return Cause(kind=Kind.DECISION, text=f"{least.decision}: {rest}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Successor:
    """Plans of two releases for one question: how much faster the later was measured, and is predicted to be.

    Attributes:
        measured, predicted: seconds of the earlier over those of the later.
    """

    title: str
    earlier: Recipe
    later: Recipe
    measured: float
    predicted: float

    @property
    def agrees(self) -> bool:
        """Whether both are in one direction."""
        return (self.measured > 1) == (self.predicted > 1)


def successors(rows: Sequence[Recipe]) -> tuple[Successor, ...]:
    """Changes of plan from one release to the next that runs another plan, where both were measured."""
    groups: dict[object, list[Recipe]] = {}
    for row in rows:
        if row.read and row.measured_s and row.release:
            groups.setdefault(row.question, []).append(row)
    found = []
    for members in groups.values():
        ordered = sorted(members, key=lambda row: row.release)
        for earlier, later in pairwise(ordered):
            predicted = earlier.published_s / later.published_s
            if earlier.slug != later.slug and abs(predicted - 1) > CHANGED:
                measured = (earlier.measured_s or 0.0) / (later.measured_s or 1.0)
                found.append(
                    Successor(title=earlier.title, earlier=earlier, later=later, measured=measured, predicted=predicted)
                )
    return tuple(found)
