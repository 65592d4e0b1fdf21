"""Strategies side by side: the best plan of each, and what published recipes advise.

The rule of thumb is that of Narayanan et al. 2021 (SC'21, section 3, takeaways 1 and 2): tensor parallelism up to the
devices of a node, then pipeline parallelism until the model fits, data parallelism for the rest. What it leaves open
(microbatch, virtual stages, recomputation, sharding of the optimizer) is taken at its best, so that it is a strong
baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.estimate import Estimate, PlanArrays, Setting, estimate
from autopar.estimate.arrays import RECOMPUTE_CODES, Bools
from autopar.plan import Recompute
from autopar.search.pareto import part_of
from autopar.search.space import Space
from autopar.search.whole import Priced, price_space
from costmodels.hardware import Cluster
from costmodels.units import GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """The best plan of one strategy.

    Attributes:
        name: short.
        rule: what it may do.
        estimate: of its best plan; None if none can be used.
        why_not: then why.
    """

    name: str
    rule: str
    estimate: Estimate | None
    why_not: str = ""


def strategies(setting: Setting, priced: Priced) -> tuple[Strategy, ...]:
    """Strategies from the simplest to the best plan; of each its best plan in the space."""
    plans = priced.plans
    alone = {axis: getattr(plans, axis) == 1 for axis in ("tp", "pp", "cp")}
    families: list[tuple[str, str, Bools]] = [
        ("data", "tp = pp = cp = 1: replicas or sharded data parallelism", alone["tp"] & alone["pp"] & alone["cp"]),
        ("tensor + data", "pp = cp = 1", alone["pp"] & alone["cp"]),
        ("pipeline + data", "tp = cp = 1", alone["tp"] & alone["cp"]),
        ("rule of thumb", "tp up to the node, pp until it fits, data for the rest", rule_of_thumb(setting, priced)),
        ("best plan", "the whole space", np.ones(len(plans), dtype=np.bool_)),
    ]
    return tuple(_strategy(setting, priced, name, rule, among) for name, rule, among in families)


def _strategy(setting: Setting, priced: Priced, name: str, rule: str, among: Bools) -> Strategy:
    index = priced.fastest(among)
    if index is not None:
        return Strategy(name=name, rule=rule, estimate=estimate(setting, priced.plans.plan(index)))
    return Strategy(name=name, rule=rule, estimate=None, why_not=obstacle(priced, among))


def rule_of_thumb(setting: Setting, priced: Priced) -> Bools:
    """Plans that follow the rule of thumb, [plans]: its degrees, and anything beside them.

    tp is the most that a node allows and heads divide into, cp 1, pp the least with which such a plan fits: without
    full recomputation if any pp allows that (as recipes have it since Korthikanti et al. 2022), else with it.
    """
    plans = priced.plans
    in_node = (plans.tp <= setting.cluster.devices_per_node) & (plans.cp == 1)
    usable = in_node & np.isfinite(priced.memory_bytes)
    if not usable.any():
        return np.zeros(len(plans), dtype=np.bool_)
    tensor = usable & (plans.tp == plans.tp[usable].max())
    keeps = plans.recompute != RECOMPUTE_CODES.index(Recompute.FULL)
    for fits in (tensor & priced.feasible & keeps, tensor & priced.feasible, tensor):
        if fits.any():
            break
    return np.asarray(tensor & (plans.pp == plans.pp[fits].min()))


def obstacle(priced: Priced, among: Bools) -> str:
    """In a few words, why none of these plans can be used."""
    if not among.any():
        return "no such plan"
    smallest = priced.smallest(among)
    if smallest is not None:
        need, limit = priced.memory_bytes[smallest] / GIB, priced.memory_limit / GIB
        return f"memory: needs {need:.1f} of {limit:.1f} GiB"
    counts = priced.counts(among)
    return max(counts, key=counts.__getitem__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The best plan with these degrees, or why there is none.

    Attributes:
        step_s: of the best plan; None if none can be used.
        slug: of it.
        reason: what rules out all plans (``memory``, ``key-value heads``, ``stages``, ``batch``, ...), or empty.
        memory_ratio: least memory of any plan over what a device offers; None if none was priced.
    """

    tp: int
    pp: int
    step_s: float | None
    slug: str
    reason: str
    memory_ratio: float | None


def cells(priced: Priced) -> tuple[Cell, ...]:
    """One cell for each tp and pp of the space, whatever the other degrees."""
    plans: PlanArrays = priced.plans
    pairs = sorted({(tp, pp) for tp, pp in zip(plans.tp.tolist(), plans.pp.tolist(), strict=True)})
    return tuple(_cell(priced, tp, pp, (plans.tp == tp) & (plans.pp == pp)) for tp, pp in pairs)


def _cell(priced: Priced, tp: int, pp: int, among: Bools) -> Cell:
    best, smallest = priced.fastest(among), priced.smallest(among)
    counts = priced.counts(among)
    reason = "memory" if smallest is not None else max(counts, key=counts.__getitem__, default="")
    return Cell(
        tp=tp,
        pp=pp,
        step_s=None if best is None else float(priced.step_s[best]),
        slug="" if best is None else priced.plans.plan(best).slug,
        reason="" if best is not None else reason,
        memory_ratio=None if smallest is None else float(priced.memory_bytes[smallest] / priced.memory_limit),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalePoint:
    """One cluster size: the best plan and the rule of thumb; None where nothing fits, with the reason."""

    world_size: int
    best: Estimate | None
    thumb: Estimate | None
    why_not: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyComparison:
    """Strategies and cells on the whole cluster, and sizes up to it.

    Attributes:
        considered, feasible: plans of the whole cluster.
    """

    strategies: tuple[Strategy, ...]
    cells: tuple[Cell, ...]
    scaling: tuple[ScalePoint, ...]
    considered: int
    feasible: int


def scaling_sizes(cluster: Cluster) -> tuple[int, ...]:
    """Powers of two of nodes up to all of them; of devices, where there is one node."""
    unit = cluster.devices_per_node if cluster.num_nodes > 1 else 1
    whole = cluster.world_size // unit
    return tuple(sorted({unit * whole, *(unit << power for power in range(whole.bit_length()))}))


def compare_strategies(
    setting: Setting, *, space: Space | None = None, on_size: Callable[[int, int], None] | None = None
) -> StrategyComparison:
    """Price the space of every size once and read everything from it. The global batch is the same on all sizes.

    Args:
        on_size: told (sizes done, of how many) before each.
    """
    sizes = scaling_sizes(setting.cluster)
    scaling = []
    for done, size in enumerate(sizes):
        if on_size is not None:
            on_size(done, len(sizes))
        part = dataclasses.replace(setting, cluster=part_of(setting.cluster, size))
        priced = price_space(part, space)
        best, thumb = priced.fastest(), priced.fastest(rule_of_thumb(part, priced))
        scaling.append(
            ScalePoint(
                world_size=size,
                best=None if best is None else estimate(part, priced.plans.plan(best)),
                thumb=None if thumb is None else estimate(part, priced.plans.plan(thumb)),
                why_not=obstacle(priced, np.ones(len(priced.plans), dtype=np.bool_)) if best is None else "",
            )
        )
    return StrategyComparison(
        strategies=strategies(part, priced),
        cells=cells(priced),
        scaling=tuple(scaling),
        considered=len(priced.plans),
        feasible=int(np.count_nonzero(priced.feasible)),
    )
