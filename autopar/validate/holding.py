"""Which decision of a plan costs its time: the search again with one decision held as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.errors import NoFeasiblePlan
from autopar.estimate import Estimate, Setting, to_arrays
from autopar.estimate.arrays import Bools, PlanArrays
from autopar.plan import Plan
from autopar.search.exhaustive import search
from autopar.search.space import Space
from autopar.validate.restrictions import Forbidden


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What a gap becomes if one decision is held: step of the plan over that of the best plan with this decision.

    ``ratio`` is None where the search finds nothing with it.
    """

    decision: str
    ratio: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decision:
    """Columns of PlanArrays that make it up, and what it leaves to look at as fields of Space."""

    name: str
    columns: tuple[str, ...]
    limits: Callable[[Plan], dict[str, Any]] = lambda plan: {}

    def same(self, one: Plan, other: Plan) -> bool:
        """Whether two plans decide alike."""
        both = to_arrays([one, other])
        return all(getattr(both, name)[0] == getattr(both, name)[1] for name in self.columns)


def _degrees(*axes: str) -> Callable[[Plan], dict[str, Any]]:
    return lambda plan: {"degrees": {axis: (getattr(plan.layout, axis),) for axis in axes}}


DECISIONS: tuple[_Decision, ...] = (
    _Decision(name="tp", columns=("tp",), limits=_degrees("tp")),
    _Decision(name="cp", columns=("cp",), limits=_degrees("cp")),
    _Decision(name="pp", columns=("pp",), limits=_degrees("pp")),
    _Decision(name="vp", columns=("vp",), limits=lambda plan: {"max_vp": plan.layout.vp}),
    _Decision(name="ep", columns=("ep", "etp"), limits=_degrees("ep", "etp")),
    _Decision(
        name="microbatch", columns=("microbatch",), limits=lambda plan: {"max_microbatch": plan.microbatch_size}
    ),
    _Decision(
        name="recomputation", columns=("recompute", "modules", "recompute_layers"),
        limits=lambda plan: {"recompute": (plan.recompute,), "partial_recompute": plan.recompute_layers > 0},
    ),
    _Decision(name="sharding", columns=("zero", "dp_replicate")),
)  # fmt: skip
"""A search does not price what ``limits`` leave out, and drops what differs in ``columns``."""


def held_ratios(
    setting: Setting, space: Space, forbidden: Forbidden, published: Estimate, best: Estimate
) -> tuple[Held, ...]:
    """For every decision, the published step over the best with that decision; ``best`` is that without any."""
    ratio = published.step_s / best.step_s
    found = []
    for decision in DECISIONS:
        if decision.name == "ep" and not setting.graph.num_experts:
            continue
        if not decision.same(best.plan, published.plan):
            found.append(_held(setting, space, forbidden, published, decision))
        else:
            found.append(Held(decision=decision.name, ratio=ratio))
    return tuple(found)


def _held(setting: Setting, space: Space, forbidden: Forbidden, published: Estimate, decision: _Decision) -> Held:
    wanted = to_arrays([published.plan])

    def other(plans: PlanArrays) -> Bools:
        unlike = np.zeros(len(plans), dtype=np.bool_)
        for name in decision.columns:
            unlike |= getattr(plans, name) != getattr(wanted, name)
        return unlike | forbidden(plans)

    limits = dataclasses.replace(space, **decision.limits(published.plan))
    try:
        found = search(setting, top=1, space=limits, forbidden=other)
    except NoFeasiblePlan:
        return Held(decision=decision.name, ratio=None)
    return Held(decision=decision.name, ratio=published.step_s / found.best[0].step_s)
