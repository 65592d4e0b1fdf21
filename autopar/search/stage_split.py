"""Layers over unlike pipeline stages: the split that minimises the time of all stages plus the slowest one's.

Stage s of a split of n items in order holds items [i, j). Minimise  sum_s time[s, i, j] + max_s pace[s, i, j]  over
0 = b_0 < b_1 < ... < b_p = n. With time the passes of one microbatch and pace those of the others this is the length of
a pipeline's longest path but for ties (``search.mixed``); with unlike devices the slowest stage and the sum pull apart.

For a bound C on the pace, the least sum is a shortest path,  S_C[s, i] = min_j time[s, i, j] + S_C[s+1, j]  over j with
pace[s, i, j] <= C  (``_least_sums``); the optimum is the least C + S_C over the values C that paces take
(``split_front``). Arrays time and pace are [stages, n+1, n+1]; infinite where a stage may not hold [i, j).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSplit:
    """One split: items of every stage, the sum of times, the slowest pace."""

    items: tuple[int, ...]
    time: float
    pace: float

    @property
    def cost(self) -> float:
        """What is minimised."""
        return self.time + self.pace


def split_front(time: Floats, pace: Floats, slack: float = 0.0) -> tuple[StageSplit, ...]:
    """Splits none of which another beats in both sum and pace, by ascending pace; empty if no split is allowed.

    Args:
        time, pace: see the module.
        slack: splits that cost more than 1 + slack times the best are left out; the best is always among them.
    """
    paces = np.where(np.isfinite(time), pace, np.inf)
    slowest = _least_paces(paces)[0, 0]
    if not np.isfinite(slowest):
        return ()
    free = _least_sums(time, paces, np.inf)[0, 0]
    values = np.unique(paces[np.isfinite(paces)])
    found: list[StageSplit] = []
    best = np.inf
    for bound in values[values >= slowest]:
        if bound + free > best * (1 + slack):
            break
        sums = _least_sums(time, paces, float(bound))
        if found and sums[0, 0] >= found[-1].time:
            continue
        items = _follow(time, paces, float(bound), sums)
        found.append(StageSplit(items=items, time=float(sums[0, 0]), pace=_pace(paces, items)))
        best = min(best, found[-1].cost)
        if sums[0, 0] <= free:
            break
    return tuple(split for split in found if split.cost <= best * (1 + slack))


def splits_below(time: Floats, pace: Floats, limit: float, most: int) -> Ints | None:
    """All splits that cost less than ``limit``, [splits, stages]; None if there are more than ``most`` on the way.

    Stage by stage; a beginning is dropped if its sum and pace with the least of either that can follow reach the limit.
    """
    stages, size = time.shape[:2]
    paces = np.where(np.isfinite(time), pace, np.inf)
    sums, least = _least_sums(time, paces, np.inf), _least_paces(paces)
    begun = np.zeros((1, 1), dtype=np.int64)
    spent, slowest = np.zeros(1), np.zeros(1)
    for s in range(stages):
        here = begun[:, -1]
        total = spent[:, None] + time[s, here]
        worst = np.maximum(slowest[:, None], paces[s, here])
        alive = total + sums[s + 1] + np.maximum(worst, least[s + 1]) < limit
        rows, ends = np.nonzero(alive)
        if len(rows) > most:
            return None
        begun = np.concatenate([begun[rows], ends[:, None]], axis=1)
        spent, slowest = total[rows, ends], worst[rows, ends]
    assert size > stages or not len(begun), "every stage holds an item"
    return np.diff(begun, axis=1)


def _least_sums(time: Floats, paces: Floats, bound: float) -> Floats:
    """[stages + 1, n + 1] least sum from stage s and item i on, with paces within the bound."""
    stages, size = time.shape[:2]
    sums = np.full((stages + 1, size), np.inf)
    sums[stages, size - 1] = 0.0
    for s in range(stages - 1, -1, -1):
        sums[s] = (np.where(paces[s] <= bound, time[s], np.inf) + sums[s + 1]).min(axis=1)
    return sums


def _least_paces(paces: Floats) -> Floats:
    """[stages + 1, n + 1] least slowest pace from stage s and item i on."""
    stages, size = paces.shape[:2]
    least = np.full((stages + 1, size), np.inf)
    least[stages, size - 1] = 0.0
    for s in range(stages - 1, -1, -1):
        least[s] = np.maximum(paces[s], least[s + 1]).min(axis=1)
    return least


def _follow(time: Floats, paces: Floats, bound: float, sums: Floats) -> tuple[int, ...]:
    """A split with the least sum; among equals the one whose earlier stages hold more."""
    items, i = [], 0
    for s in range(len(time)):
        costs = np.where(paces[s, i] <= bound, time[s, i], np.inf) + sums[s + 1]
        j = int(np.flatnonzero(costs <= costs.min())[-1])
        items.append(j - i)
        i = j
    return tuple(items)


def _pace(paces: Floats, items: tuple[int, ...]) -> float:
    bounds = np.concatenate([[0], np.cumsum(items)])
    return float(max(paces[s, bounds[s], bounds[s + 1]] for s in range(len(items))))
