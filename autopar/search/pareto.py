"""The Pareto front of step time, memory headroom and number of devices, over cluster sizes."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from autopar.errors import NoFeasiblePlan
from autopar.estimate import Estimate, Setting, estimate
from autopar.estimate.arrays import Bools
from autopar.search.exhaustive import search
from autopar.search.obstacle import obstacle_of
from autopar.search.space import Space, divisors
from costmodels.hardware import Cluster

LEVELS = 10
"""Memory limits at which the fastest plan is looked for."""


def pareto(points: ArrayLike) -> Bools:
    """Which points no other dominates, [points]; exact.

    Args:
        points: [points, 3], each objective to be made small. One point dominates another if it is nowhere larger and
            somewhere smaller; equal points do not dominate each other.

    Sorted by the first objective, a point is dominated exactly if an earlier one is not larger in the other two. The
    earlier ones that count form a staircase, the third objective falling as the second rises, which is searched and
    kept up in O(log n) each (Kung, Luccio and Preparata 1975).
    """
    given = np.asarray(points, dtype=float).reshape(-1, 3)
    unique, place = np.unique(given, axis=0, return_inverse=True)
    free = np.zeros(len(unique), dtype=np.bool_)
    second: list[float] = []
    third: list[float] = []
    for index, (_, y, z) in enumerate(unique.tolist()):
        position = bisect.bisect_right(second, y)
        if position and third[position - 1] <= z:
            continue
        free[index] = True
        start = position - 1 if position and second[position - 1] == y else position
        end = start
        while end < len(third) and third[end] >= z:
            end += 1
        second[start:end], third[start:end] = [y], [z]
    return np.asarray(free[place.reshape(-1)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Levels:
    """The fastest plans under falling memory limits, and how many plans the space has."""

    estimates: tuple[Estimate, ...]
    considered: int


def time_memory_front(setting: Setting, *, space: Space | None = None, levels: int = LEVELS) -> Levels:
    """The fastest plan under each memory limit, from all of a device downwards in ``levels`` even steps.

    The method of constraints (Haimes, Lasdon and Wismer 1971): each is on the front of step time and memory, since it
    is the fastest under its limit and of equally fast ones the smallest. Limits that a plan found before keeps as well
    are not searched again. Raises NoFeasiblePlan where nothing fits at all.
    """
    device = setting.cluster.device
    found = [search(setting, top=1, space=space)]
    for level in range(levels - 1, 0, -1):
        limit = device.memory_bytes * level / levels
        if found[-1].best[0].memory_bytes <= limit:
            continue
        tighter = dataclasses.replace(device, memory_bytes=limit)
        part = dataclasses.replace(setting, cluster=dataclasses.replace(setting.cluster, device=tighter))
        try:
            found.append(search(part, top=1, space=space))
        except NoFeasiblePlan:
            break
    return Levels(
        estimates=tuple(estimate(setting, result.best[0].plan) for result in found), considered=found[0].considered
    )


def part_of(cluster: Cluster, world_size: int) -> Cluster:
    """The same machines, fewer of them: whole nodes, or some devices of one node."""
    devices = cluster.devices_per_node
    if world_size >= devices:
        assert world_size % devices == 0, "a part of a cluster is whole nodes"
        return dataclasses.replace(cluster, num_nodes=world_size // devices)
    return dataclasses.replace(cluster, num_nodes=1, devices_per_node=world_size)


def sizes(cluster: Cluster) -> tuple[int, ...]:
    """Devices of every part of a cluster that is looked at: one device up to a node, one node up to all nodes.

    Of devices in a node and of nodes, the divisors and the powers of two.
    """

    def steps(number: int) -> set[int]:
        return {*divisors(number), *(1 << power for power in range(number.bit_length()))}

    in_node = steps(cluster.devices_per_node)
    nodes = {count * cluster.devices_per_node for count in steps(cluster.num_nodes)}
    return tuple(sorted(in_node | nodes))


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontPoint:
    """One answer: a plan on ``world_size`` devices."""

    world_size: int
    estimate: Estimate

    @property
    def headroom(self) -> float:
        """Share of a device's memory that stays free on the fullest rank."""
        return 1 - self.estimate.memory_bytes / self.estimate.memory_limit

    @property
    def tokens_per_s(self) -> float:
        """Of all devices together."""
        return self.estimate.tokens_per_s_per_gpu * self.world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Front:
    """What ``pareto_front`` found.

    Attributes:
        points: by size, the fastest of each first.
        considered: plans of each size.
        unfit: sizes on which nothing fits, with the reason.
    """

    points: tuple[FrontPoint, ...]
    considered: dict[int, int]
    unfit: dict[int, str]


def pareto_front(
    setting: Setting, *, space: Space | None = None, on_size: Callable[[int, int], None] | None = None
) -> Front:
    """Plans on any part of the cluster that none beats in step time, memory of the fullest rank and devices at once.

    Of every size the plans of ``time_memory_front``, without those that one of another size beats in all three.

    Args:
        on_size: told (sizes done, of how many) before each size.
    """
    candidates: list[FrontPoint] = []
    considered, unfit = {}, {}
    looked_at = sizes(setting.cluster)
    for done, world_size in enumerate(looked_at):
        if on_size is not None:
            on_size(done, len(looked_at))
        part = dataclasses.replace(setting, cluster=part_of(setting.cluster, world_size))
        try:
            found = time_memory_front(part, space=space)
        except NoFeasiblePlan as error:
            considered[world_size] = sum(error.rejected.values())
            unfit[world_size] = obstacle_of(error, part).reason
            continue
        considered[world_size] = found.considered
        candidates += [FrontPoint(world_size=world_size, estimate=price) for price in found.estimates]
    objectives = [(p.world_size, p.estimate.step_s, p.estimate.memory_bytes) for p in candidates]
    points = tuple(point for point, free in zip(candidates, pareto(objectives), strict=True) if free)
    return Front(points=points, considered=considered, unfit=unfit)


def spread(points: tuple[FrontPoint, ...], per_size: int) -> tuple[FrontPoint, ...]:
    """At most so many points of each size, among them the fastest and the roomiest, evenly spread over memory."""
    assert per_size >= 2
    chosen: list[FrontPoint] = []
    for size in dict.fromkeys(point.world_size for point in points):
        here = sorted((p for p in points if p.world_size == size), key=lambda p: p.estimate.step_s)
        if len(here) > per_size:
            memory = np.asarray([point.estimate.memory_bytes for point in here])
            wanted = np.linspace(memory[0], memory[-1], per_size)
            nearest = {int(np.argmin(np.abs(memory - goal))) for goal in wanted}
            here = [here[index] for index in sorted(nearest)]
        chosen += here
    return tuple(chosen)
