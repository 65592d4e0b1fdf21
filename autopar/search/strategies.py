"""Strategies side by side: the best plan of each, and what published recipes advise.

The rule of thumb is that of Narayanan et al. 2021 (SC'21, section 3, takeaways 1 and 2): tensor parallelism up to the
devices of a node, then pipeline parallelism until the model fits, data parallelism for the rest. What it leaves open
(microbatch, virtual stages, recomputation, sharding of the optimizer) is taken at its best, so that it is a strong
baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from autopar.estimate import Estimate, Setting
from autopar.plan import Recompute
from autopar.search.obstacle import Obstacle, best_or_obstacle, with_degrees
from autopar.search.pareto import part_of
from autopar.search.space import Space, cores_of, decisions, divisors, number_of_plans
from costmodels.hardware import Cluster


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


def strategies(setting: Setting, space: Space | None = None) -> tuple[Strategy, ...]:
    """Strategies from the simplest to the best plan; of each its best plan in the space."""
    one = (1,)
    families: list[tuple[str, str, Estimate | Obstacle]] = []
    for name, rule, degrees in (
        ("data", "tp = pp = cp = 1: replicas or sharded data parallelism", {"tp": one, "pp": one, "cp": one}),
        ("tensor + data", "pp = cp = 1", {"pp": one, "cp": one}),
        ("pipeline + data", "tp = cp = 1", {"tp": one, "cp": one}),
    ):
        families.append((name, rule, best_or_obstacle(setting, with_degrees(space, degrees))))
    families.append(("rule of thumb", "tp up to the node, pp until it fits, data for the rest", thumb(setting, space)))
    families.append(("best plan", "the whole space", best_or_obstacle(setting, space)))
    return tuple(
        Strategy(name=name, rule=rule, estimate=None, why_not=found.words)
        if isinstance(found, Obstacle)
        else Strategy(name=name, rule=rule, estimate=found)
        for name, rule, found in families
    )


def thumb(setting: Setting, space: Space | None = None) -> Estimate | Obstacle:
    """The best plan that follows the rule of thumb.

    tp is the most that a node allows and heads divide into, cp 1, pp the least with which such a plan fits with its
    optimizer on the device: without full recomputation if any pp allows that (as recipes have it since Korthikanti et
    al. 2022), else with it.
    """
    last: Estimate | Obstacle | None = None
    for part in _thumb_spaces(setting, space or Space()):
        last = best_or_obstacle(setting, part)
        if isinstance(last, Estimate):
            return last
    return last or Obstacle(reason="no such layout", need=None, limit=setting.cluster.device.memory_bytes)


def _thumb_spaces(setting: Setting, space: Space) -> Iterator[Space]:
    """Spaces of the rule in the order in which they are tried."""
    world, attention = setting.cluster.world_size, setting.graph.attention
    heads = (attention.num_heads, attention.num_kv_heads) if attention else (1,)
    tp = max(
        degree
        for degree in divisors(world)
        if degree <= setting.cluster.devices_per_node and all(number % degree == 0 for number in heads)
    )
    keeps = tuple(kind for kind in space.recompute if kind is not Recompute.FULL)
    for recompute, partial in ((keeps, False), (space.recompute, space.partial_recompute)):
        for pp in divisors(world // tp):
            if recompute and pp <= setting.graph.num_blocks:
                fixed = dataclasses.replace(space, recompute=recompute, partial_recompute=partial, offload=False)
                yield with_degrees(fixed, {"tp": (tp,), "pp": (pp,), "cp": (1,)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The best plan with these degrees, or why there is none.

    Attributes:
        step_s: of the best plan; None if none can be used.
        slug: of it.
        reason: what rules out all plans (``memory``, ``key-value heads``, ``stages``, ``batch``, ...), or empty.
        memory_ratio: memory of that plan over what a device offers, of the plan that needs the least where none fits;
            None if all are ruled out before.
    """

    tp: int
    pp: int
    step_s: float | None
    slug: str
    reason: str
    memory_ratio: float | None


def cells(setting: Setting, space: Space | None = None) -> tuple[Cell, ...]:
    """One cell for each tp and pp that divide the ranks, whatever the other degrees."""
    world = setting.cluster.world_size
    pairs = [(tp, pp) for tp in divisors(world) for pp in divisors(world // tp)]
    return tuple(_cell(setting, tp, pp, space) for tp, pp in pairs)


def _cell(setting: Setting, tp: int, pp: int, space: Space | None) -> Cell:
    found = best_or_obstacle(setting, with_degrees(space, {"tp": (tp,), "pp": (pp,)}))
    if isinstance(found, Obstacle):
        ratio = None if found.need is None else found.need / found.limit
        return Cell(tp=tp, pp=pp, step_s=None, slug="", reason=found.reason, memory_ratio=ratio)
    ratio = found.memory_bytes / found.memory_limit
    return Cell(tp=tp, pp=pp, step_s=found.step_s, slug=found.plan.slug, reason="", memory_ratio=ratio)


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
        considered: plans of the whole cluster.
    """

    strategies: tuple[Strategy, ...]
    cells: tuple[Cell, ...]
    scaling: tuple[ScalePoint, ...]
    considered: int


def scaling_sizes(cluster: Cluster) -> tuple[int, ...]:
    """Powers of two of nodes up to all of them; of devices, where there is one node."""
    unit = cluster.devices_per_node if cluster.num_nodes > 1 else 1
    whole = cluster.world_size // unit
    return tuple(sorted({unit * whole, *(unit << power for power in range(whole.bit_length()))}))


def compare_strategies(
    setting: Setting, *, space: Space | None = None, on_size: Callable[[int, int], None] | None = None
) -> StrategyComparison:
    """Search every size, strategy and cell. The global batch is the same on all sizes.

    Args:
        on_size: told (sizes done, of how many) before each.
    """
    sizes = scaling_sizes(setting.cluster)
    scaling = []
    for done, size in enumerate(sizes):
        if on_size is not None:
            on_size(done, len(sizes) + 1)
        part = dataclasses.replace(setting, cluster=part_of(setting.cluster, size))
        best, advised = best_or_obstacle(part, space), thumb(part, space)
        scaling.append(
            ScalePoint(
                world_size=size,
                best=None if isinstance(best, Obstacle) else best,
                thumb=None if isinstance(advised, Obstacle) else advised,
                why_not=best.words if isinstance(best, Obstacle) else "",
            )
        )
    if on_size is not None:
        on_size(len(sizes), len(sizes) + 1)
    return StrategyComparison(
        strategies=strategies(setting, space),
        cells=cells(setting, space),
        scaling=tuple(scaling),
        considered=_considered(setting, space),
    )


def _considered(setting: Setting, space: Space | None) -> int:
    """Plans of the space."""
    space = space or Space()
    decided = decisions(setting, space)
    return int(number_of_plans(cores_of(setting, space, decided), decided).sum())
