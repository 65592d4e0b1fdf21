"""Why not this plan: which limit it breaks, by how much, and what would mend it; or what it loses against the best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.errors import PlanError
from autopar.estimate import Estimate, Setting, estimate, estimate_many, to_arrays
from autopar.plan import Plan, Rejected, parse_slug, violations
from autopar.search.exhaustive import SearchResult
from autopar.search.neighbours import Neighbour, neighbours
from costmodels.units import GIB

MOST_PAIRS = 6000
"""Plans two decisions away that are priced where no single decision mends a plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """A plan near the refused one that fits: what it changes, and its price."""

    words: str
    estimate: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class WhyNot:
    """The answer about one plan.

    Attributes:
        plan: asked about.
        rejections: everything that forbids it; empty if it can be used.
        estimate: its price; None where it is forbidden before memory and time are looked at.
        remedies: plans one decision away that can be used (two where one is not enough), the fastest first; one for
            each kind of decision.
        best: the fastest plan of the search.
        rank: place among all plans by step time; None below those that the search returned.
        looked_at: how many it returned.
    """

    plan: Plan
    rejections: tuple[Rejected, ...]
    estimate: Estimate | None
    remedies: tuple[Remedy, ...]
    best: Estimate
    rank: int | None
    looked_at: int

    @property
    def slower(self) -> float | None:
        """How much longer a step takes than with the best plan, as a share; None if it has no step."""
        return None if self.estimate is None else self.estimate.step_s / self.best.step_s - 1


def why_not(setting: Setting, plan: Plan, found: SearchResult) -> WhyNot:
    """Say why ``plan`` is not the answer.

    Args:
        found: search of the setting over raw ranks (all variants), the more of them the further ranks are known.
    """
    refused = forbidden(setting, plan)
    price = None if refused else estimate(setting, plan)
    if price is not None and not price.fits:
        refused = (_memory(price),)
    rank = None
    if price is not None and not refused:
        faster = sum(e.step_s < price.step_s for e in found.best)
        rank = faster + 1 if faster < len(found.best) or len(found.best) == found.feasible else None
    return WhyNot(
        plan=plan,
        rejections=refused,
        estimate=price,
        remedies=_remedies(setting, plan) if refused else (),
        best=found.best[0],
        rank=rank,
        looked_at=len(found.best),
    )


def forbidden(setting: Setting, plan: Plan) -> tuple[Rejected, ...]:
    """Everything that rules a plan out before it is priced: the model, the batch, the ranks, the engine."""
    found = violations(plan, setting.graph, setting.workload, setting.cluster.world_size)
    stages = setting.stack.data.shardable
    if plan.zero_stage not in stages:
        known = ", ".join(f"z{stage}" for stage in stages)
        refused = Rejected(
            reason="engine",
            detail=f"{setting.stack.name} has no ZeRO stage {plan.zero_stage}: use {known}",
            numbers={"zero": plan.zero_stage},
        )
        found = (*found, refused)
    return found


def _memory(price: Estimate) -> Rejected:
    if price.memory_bytes <= price.memory_limit:
        return Rejected(
            reason="host memory",
            detail=f"offloaded state needs {price.host_bytes / GIB:.1f} GiB of host memory; a device has "
            f"{price.host_limit / GIB:.1f} GiB of it",
            numbers={"need_gib": price.host_bytes / GIB, "limit_gib": price.host_limit / GIB},
        )
    over = price.memory_bytes - price.memory_limit
    items = sorted(price.memory.items(), key=lambda item: -item[1])
    largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in items[:3])
    return Rejected(
        reason="memory",
        detail=f"needs {price.memory_gib:.1f} GiB on the fullest rank, {over / GIB:.1f} GiB more than the "
        f"{price.memory_limit / GIB:.1f} GiB of a device (largest: {largest})",
        numbers={
            "need_gib": price.memory_gib,
            "limit_gib": price.memory_limit / GIB,
            "over_gib": over / GIB,
            **{f"{name}_gib": size / GIB for name, size in items},
        },
    )


def _remedies(setting: Setting, plan: Plan) -> tuple[Remedy, ...]:
    single = neighbours(setting, plan)
    found = _cheapest(setting, [(n.kind, n.words, n.plan) for n in single])
    if found:
        return found
    # Where a violated plan has neighbours that only lack memory, these lead on; otherwise all do.
    starts = [n for n in single if not forbidden(setting, n.plan)] or list(single)
    return _cheapest(setting, _pairs(setting, plan, starts))[:4]


def _pairs(setting: Setting, plan: Plan, starts: Sequence[Neighbour]) -> list[tuple[str, str, Plan]]:
    pairs: dict[str, tuple[str, str, Plan]] = {}
    for first in starts:
        for second in neighbours(setting, first.plan):
            if second.kind == first.kind or second.plan == plan or second.plan.slug in pairs:
                continue
            kinds = " and ".join(sorted((first.kind, second.kind)))
            pairs[second.plan.slug] = (kinds, f"{first.words} and {second.words}", second.plan)
            if len(pairs) == MOST_PAIRS:
                return list(pairs.values())
    return list(pairs.values())


def _cheapest(setting: Setting, candidates: Iterable[tuple[str, str, Plan]]) -> tuple[Remedy, ...]:
    """The fastest that can be used of every kind, the fastest kind first."""
    allowed = [candidate for candidate in candidates if not forbidden(setting, candidate[2])]
    if not allowed:
        return ()
    costs = estimate_many(setting, to_arrays([plan for _, _, plan in allowed]))
    fits = costs.fits(setting)
    chosen: dict[str, int] = {}
    for index in np.lexsort((costs.memory_bytes, costs.step_s)).tolist():
        if fits[index]:
            chosen.setdefault(allowed[index][0], index)
    return tuple(
        Remedy(words=allowed[index][1], estimate=estimate(setting, allowed[index][2])) for index in chosen.values()
    )


def waterfall(other: Estimate, best: Estimate, *, smallest: float = 0.0) -> dict[str, float]:
    """Seconds that ``other`` takes longer than ``best``, by term of the step; they add up to the whole difference.

    Args:
        smallest: terms that differ by less than this share of the best step are joined as ``other``.
    """
    difference = {name: other.breakdown[name] - best.breakdown[name] for name in best.breakdown}
    shown = {name: value for name, value in difference.items() if abs(value) > smallest * best.step_s}
    rest = sum(value for name, value in difference.items() if name not in shown)
    return {**shown, "other": rest} if rest else shown


def whole_slug(text: str, world_size: int) -> Plan:
    """Parse a slug that names a plan whole. Raises PlanError that completes it where parts are missing."""
    keys = {part.rstrip("0123456789") for part in text.strip().split(".")}
    missing = [key for key in ("dp", "mb") if key not in keys]
    if not missing:
        return parse_slug(text)
    plan = parse_slug(text if "mb" in keys else f"{text}.mb1")
    layout = plan.layout
    ranks = layout.tp * layout.cp * layout.pp
    if missing == ["dp"] and ranks == world_size:
        return plan
    dp = max(1, world_size // ranks) if "dp" in missing else layout.dp
    parts = [f"dp{dp}" if key == "dp" else "mb1" for key in missing]
    if "dp" in missing and ranks == world_size:
        missing, parts = ["mb"], ["mb1"]
    raise PlanError(
        f"plan '{text}' is not whole, {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing: for "
        f"{world_size} ranks for example {'.'.join([text.strip(), *parts])}"
    )
