"""The order of nodes that leaves most bytes where they are.

A launcher numbers ranks node by node, in the order in which it is given the nodes. With K[p, j] the bytes that stay
when the machine that was node j becomes node p, its devices in the order they had, the best order is the assignment of
machines to places with the largest sum of K (Kuhn 1955; scipy's ``linear_sum_assignment``). Among bytes that move,
those from a neighbour count as much as those from afar.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.setting import Setting
from autopar.plan import Plan
from autopar.search.ownership import Ints, Rectangles
from autopar.search.reshard import held_kinds

CHUNK = 2**22
"""Overlaps that are computed at once."""


def node_order(setting: Setting, old: Plan, new: Plan, *, lost: Collection[int] = ()) -> Ints | None:
    """Old node at each node of the new plan, [nodes]; -1 for a machine without state. None: not whole nodes.

    A node that has lost some devices had them replaced; one that has lost all is a machine without state. Nodes keep
    their numbers (a smaller cluster drops the last ones) unless another order leaves more bytes where they are.
    """
    from scipy.optimize import linear_sum_assignment  # a tenth of a second that planning does not need

    size = setting.cluster.devices_per_node
    if old.layout.world_size % size or new.layout.world_size % size:
        return None
    stays = bytes_that_stay(setting, old, new, lost)
    places, machines = stays.shape
    gone = np.all(np.isin(np.arange(machines * size), sorted(lost)).reshape(machines, size), axis=1)
    present = np.flatnonzero(np.logical_not(gone))
    usual = np.full(places, -1, dtype=np.int64)
    kept = np.arange(machines) if places >= machines else present[:places]
    usual[: len(kept)] = np.where(gone[kept], -1, kept)
    rows, columns = linear_sum_assignment(stays[:, present], maximize=True)
    best = np.full(places, -1, dtype=np.int64)
    best[rows] = present[columns]
    return best if _total(stays, best) > _total(stays, usual) else usual


def _total(stays: NDArray[np.float64], order: Ints) -> float:
    taken = order >= 0
    return float(stays[np.flatnonzero(taken), order[taken]].sum())


def origins_of(order: Ints, devices_per_node: int, lost: Collection[int] = ()) -> Ints:
    """The old rank that each new rank was under an order of nodes, [ranks]; -1 for a device without state."""
    ranks = order[:, None] * devices_per_node + np.arange(devices_per_node)
    return np.where((order[:, None] < 0) | np.isin(ranks, sorted(lost)), -1, ranks).reshape(-1)


def bytes_that_stay(setting: Setting, old: Plan, new: Plan, lost: Collection[int] = ()) -> NDArray[np.float64]:
    """K[p, j] of the module's docstring, [new nodes, old nodes]; both plans use whole nodes."""
    size = setting.cluster.devices_per_node
    gone = np.isin(np.arange(old.layout.world_size), sorted(lost))
    found = np.zeros((new.layout.world_size // size, old.layout.world_size // size))
    alive = ~gone.reshape(-1, size)
    for part in held_kinds(setting, old, new):
        held, wanted = _by_node(part.held, size), _by_node(part.wanted, size)
        rows = np.flatnonzero(wanted.area.any(axis=1))
        columns = np.flatnonzero((held.area * alive).any(axis=1))
        there, sends = held.at(columns), alive[columns]
        scale = part.weights.count * part.width
        for some in np.array_split(rows, -(-len(rows) * len(columns) * size // CHUNK) or 1):
            overlap = wanted.at(some).at(np.s_[:, None]).overlap(there)
            found[np.ix_(some, columns)] += scale * (overlap * sends).sum(axis=2)
    return found


def _by_node(held: Rectangles, size: int) -> Rectangles:
    return held.at(np.arange(len(held.first)).reshape(-1, size))
