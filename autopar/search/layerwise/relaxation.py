"""The relaxed problem: memory has a price instead of a limit, and the best choice is a shortest path."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.search.layerwise.chain import ROUNDING, Chain, Floats, Ints
from autopar.search.layerwise.hops import shortest_path

PRICE_FACTORS = (1.0, 0.97, 1.03, 0.9, 1.1, 0.75, 1.33, 0.5, 2.0, 0.0)
"""Prices around the best one at which completions are bounded; the best one comes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """A choice with its cost and memory."""

    choice: Ints
    cost: float
    memory: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Relaxation:
    """The best lower bound that a price of memory gives.

    Attributes:
        price: cost per byte that maximises the bound.
        bound: no choice within the limit costs less.
        light, heavy: cheapest paths at this price, within the limit and above it.
    """

    price: float
    bound: float
    light: Path
    heavy: Path


def path_of(chain: Chain, choice: Ints) -> Path:
    """A choice with its sums."""
    cost, memory = chain.totals(choice)
    return Path(choice=choice, cost=cost, memory=memory)


def relax(chain: Chain, limit: float, slack: float, light: Path, heavy: Path) -> Relaxation:
    """Maximise over y >= 0 the bound  min over choices of cost + y (memory - limit).

    Each path is a line in y, the bound their concave lower envelope. Two paths around the limit meet at a price; its
    cheapest path replaces one of them or proves that the envelope's top is there (Handler and Zang 1980).

    Args:
        limit: of the memory.
        slack: by which rounding may exceed it.
        light: a path within the limit.
        heavy: the cheapest path of all, above the limit.
    """
    while True:
        price = max(light.cost - heavy.cost, 0.0) / (heavy.memory - light.memory)
        value, choice = shortest_path(chain, chain.time + price * chain.memory)
        found = path_of(chain, choice)
        known = heavy.cost + price * heavy.memory
        if value >= known - ROUNDING * max(abs(known), abs(heavy.cost)):
            return Relaxation(price=price, bound=value - price * limit, light=light, heavy=heavy)
        if found.memory <= limit + slack:
            light = found
        else:
            heavy = found


def least_before(cost: Floats, transition: Floats) -> Floats:
    """Least cost of all that comes before a node and of the way to it, [..., layers, strategies]; its own excluded."""
    before = np.zeros_like(cost)
    for layer in range(1, cost.shape[-2]):
        arrived = before[..., layer - 1, :] + cost[..., layer - 1, :]
        before[..., layer, :] = (arrived[..., None] + transition[layer - 1]).min(axis=-2)
    return before


def nearby_path(chain: Chain, price: float, before: Floats, after: Floats, room: float) -> Path | None:
    """The cheapest path within ``room`` among the shortest priced paths through each pair of neighbours.

    Args:
        before, after: least priced cost before and after each node, [layers, strategies].
    """
    layers, strategies = chain.time.shape
    nodes = np.arange(strategies)
    priced = chain.time + price * chain.memory
    came, goes = np.zeros((layers, strategies), dtype=np.int64), np.zeros((layers, strategies), dtype=np.int64)
    sums = np.stack([chain.time, chain.memory])
    left, right = sums.copy(), np.zeros_like(sums)
    for layer in range(1, layers):
        moves = chain.transition[layer - 1]
        came[layer] = ((before[layer - 1] + priced[layer - 1])[:, None] + moves).argmin(axis=0)
        left[:, layer] += left[:, layer - 1, came[layer]]
        left[0, layer] += moves[came[layer], nodes]
    best, pair = np.inf, None
    for layer in range(layers - 2, -1, -1):
        moves = chain.transition[layer]
        ahead = sums[:, layer + 1] + right[:, layer + 1]
        memory = left[1, layer][:, None] + ahead[1]
        cost = np.where(memory <= room, left[0, layer][:, None] + moves + ahead[0], np.inf)
        least = int(cost.argmin())
        if cost.flat[least] < best:
            best, pair = float(cost.flat[least]), (layer, *divmod(least, strategies))
        goes[layer] = (moves + (priced[layer + 1] + after[layer + 1])).argmin(axis=1)
        right[:, layer] = ahead[:, goes[layer]]
        right[0, layer] += moves[nodes, goes[layer]]
    if pair is None:
        return None
    split, first, second = pair
    choice = np.empty(layers, dtype=np.int64)
    choice[split], choice[split + 1] = first, second
    for layer in range(split, 0, -1):
        choice[layer - 1] = came[layer, choice[layer]]
    for layer in range(split + 1, layers - 1):
        choice[layer + 1] = goes[layer, choice[layer]]
    return path_of(chain, choice)
