"""Which decision of a plan costs its time: the search again with one decision held as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autopar.errors import NoFeasiblePlan
from autopar.estimate import Estimate, Setting
from autopar.plan import Plan, Rejected
from autopar.search.exhaustive import search
from autopar.search.space import Space
from autopar.validate.restrictions import Unsupported


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What a gap becomes if one decision is held: step of the plan over that of the best plan with this decision.

    ``ratio`` is None where the search finds nothing with it.
    """

    decision: str
    ratio: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decision:
    name: str
    value: Callable[[Plan], Any]
    limits: Callable[[Plan], dict[str, Any]]


def _degrees(*axes: str) -> Callable[[Plan], dict[str, Any]]:
    return lambda plan: {"degrees": {axis: (getattr(plan.layout, axis),) for axis in axes}}


DECISIONS: tuple[_Decision, ...] = (
    _Decision(name="tp", value=lambda plan: plan.layout.tp, limits=_degrees("tp")),
    _Decision(name="cp", value=lambda plan: plan.layout.cp, limits=_degrees("cp")),
    _Decision(name="pp", value=lambda plan: plan.layout.pp, limits=_degrees("pp")),
    _Decision(name="vp", value=lambda plan: plan.layout.vp, limits=lambda plan: {"max_vp": plan.layout.vp}),
    _Decision(name="ep", value=lambda plan: (plan.layout.ep, plan.layout.etp), limits=_degrees("ep", "etp")),
    _Decision(
        name="microbatch", value=lambda plan: plan.microbatch_size,
        limits=lambda plan: {"max_microbatch": plan.microbatch_size},
    ),
    _Decision(
        name="recomputation", value=lambda plan: (plan.recompute, plan.recomputed_modules, plan.recompute_layers),
        limits=lambda plan: {"recompute": (plan.recompute,), "partial_recompute": plan.recompute_layers > 0},
    ),
    _Decision(
        name="sharding", value=lambda plan: (plan.zero_stage, plan.layout.dp_replicate > 1), limits=lambda plan: {},
    ),
)  # fmt: skip
"""With what each leaves to look at, so that a search does not price what would be vetoed."""


def held_ratios(
    setting: Setting, space: Space, unsupported: Unsupported, published: Estimate, best: Estimate
) -> tuple[Held, ...]:
    """For every decision, the published step over the best with that decision; ``best`` is that without any."""
    ratio = published.step_s / best.step_s
    found = []
    for decision in DECISIONS:
        if decision.name == "ep" and not setting.graph.num_experts:
            continue
        if decision.value(best.plan) != decision.value(published.plan):
            found.append(_held(setting, space, unsupported, published, decision))
        else:
            found.append(Held(decision=decision.name, ratio=ratio))
    return tuple(found)


def _held(
    setting: Setting, space: Space, unsupported: Unsupported, published: Estimate, decision: _Decision
) -> Held:
    wanted = decision.value(published.plan)

    def other(plan: Plan) -> tuple[Rejected, ...]:
        if decision.value(plan) != wanted:
            return (Rejected(reason=decision.name, detail=f"{decision.name} is held as published"),)
        return unsupported(plan)

    limits = dataclasses.replace(space, **decision.limits(published.plan))
    try:
        found = search(setting, top=1, space=limits, unsupported=other)
    except NoFeasiblePlan:
        return Held(decision=decision.name, ratio=None)
    return Held(decision=decision.name, ratio=published.step_s / found.best[0].step_s)
