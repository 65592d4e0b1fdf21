"""What binds a plan: which resource its step waits for, and what more of each would buy.

A step T(r_1, ..., r_n) falls as rates r_i rise. Where all times are work over rates, T is homogeneous of degree -1, so
that by Euler's theorem T = sum_i s_i with s_i = -r_i dT/dr_i: the seconds of the step that resource i accounts for, its
elasticity. Where the model takes a maximum, only what is on the critical path counts, as it should. Each term of the
step divides in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autopar.estimate import Estimate, Setting, estimate
from autopar.plan import Plan
from autopar.search.obstacle import best_of
from autopar.search.resources import RATES, Resource, improved
from autopar.search.space import Space

NUDGE = 1e-3
"""Improvement by which elasticities are taken; small against the distance between kinks, large against rounding."""
WAITING = ("pipeline_bubble", "processor_sharing", "stragglers")
"""Terms in which ranks wait for others: shares of their own, whatever the others are busy with."""
FIXED = "fixed"

MORE = 0.1
"""How much more of a resource is tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Improvement:
    """What ``1 + MORE`` times a resource buys.

    Attributes:
        gain: of throughput with the same plan, as a share.
        replanned_gain: with the best plan of that setting; None where nothing was searched.
        replanned: that plan, None likewise.
    """

    resource: Resource
    gain: float
    replanned_gain: float | None
    replanned: Plan | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What binds one plan.

    Attributes:
        estimate: its price.
        by_term: seconds by term of the step and by resource (``FIXED``: what no rate changes); they add up to the
            step.
        shares: of the step by resource, by terms in which ranks wait, and ``FIXED``; they add up to 1.
        improvements: by resource, the most useful with the same plan first.
    """

    estimate: Estimate
    by_term: Mapping[str, Mapping[str, float]]
    shares: Mapping[str, float]
    improvements: tuple[Improvement, ...]

    @property
    def binding(self) -> str:
        """The resource, or the waiting, that takes the largest share of the step."""
        return max(self.shares, key=self.shares.__getitem__)

    @property
    def headroom(self) -> float:
        """Share of a device's memory that stays free on the fullest rank."""
        return 1 - self.estimate.memory_bytes / self.estimate.memory_limit


def seconds_by_term(setting: Setting, plan: Plan) -> dict[str, dict[str, float]]:
    """Seconds of each term of the step by resource, and ``FIXED``; terms without time are left out."""
    now = estimate(setting, plan)
    rows: dict[str, dict[str, float]] = {term: {} for term, seconds in now.breakdown.items() if seconds}
    for resource in RATES:
        faster = estimate(improved(setting, resource, 1 + NUDGE), plan)
        for term, row in rows.items():
            saved = (now.breakdown[term] - faster.breakdown[term]) * (1 + NUDGE) / NUDGE
            if abs(saved) > 1e-7 * now.step_s:
                row[resource.value] = saved
    for term, row in rows.items():
        fixed = now.breakdown[term] - sum(row.values())
        if abs(fixed) > 1e-5 * now.step_s:
            row[FIXED] = fixed
    return rows


def shares_of(by_term: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Shares of the step by resource; terms in which ranks wait are shares of their own."""
    seconds: dict[str, float] = {resource.value: 0.0 for resource in RATES}
    for term, row in by_term.items():
        for resource, value in row.items():
            name = term if term in WAITING else resource
            seconds[name] = seconds.get(name, 0.0) + value
    whole = sum(seconds.values())
    return {name: value / whole for name, value in seconds.items() if abs(value) > 1e-6 * whole}


def explain(
    setting: Setting,
    plan: Plan,
    *,
    replan: bool = True,
    space: Space | None = None,
    on_resource: Callable[[Resource], None] | None = None,
) -> Explanation:
    """Say what binds ``plan`` and what ``MORE`` of each resource would buy.

    Args:
        replan: search anew with each improvement.
        space: of these searches.
        on_resource: told each resource before it is looked at.
    """
    now = estimate(setting, plan)
    by_term = seconds_by_term(setting, plan)
    improvements = []
    for resource in Resource:
        if on_resource is not None:
            on_resource(resource)
        better = improved(setting, resource, 1 + MORE)
        gain = now.step_s / estimate(better, plan).step_s - 1
        best = best_of(better, space) if replan else None
        improvements.append(
            Improvement(
                resource=resource,
                gain=gain,
                replanned_gain=None if best is None else now.step_s / best.step_s - 1,
                replanned=None if best is None else best.plan,
            )
        )
    return Explanation(
        estimate=now,
        by_term=by_term,
        shares=shares_of(by_term),
        improvements=tuple(sorted(improvements, key=lambda i: (-i.gain, -(i.replanned_gain or 0.0)))),
    )
