"""Each layer its own strategy under one limit of memory: the optimum and its proof.

The problem. Layer l takes a strategy s_l. Minimise

    sum_l time[l, s_l] + sum_l transition[s_l, s_(l+1)]   subject to   sum_l memory[l, s_l] <= memory_limit,

a shortest path through layers with one knapsack constraint (Handler and Zang 1980). Who implements what:

- one strategy per layer, and neighbours pay for their transition: ``hops.shortest_path``, ``labels._extend``;
- the memory limit, relaxed: ``relaxation.relax``; exactly: ``labels._settle`` (what cannot fit any more) and
  ``labels._join`` (what fits together);
- forbidden strategies and transitions are infinite: ``chain.chain_of``;
- optimality: ``exact.close_gap``.

The relaxation. For y >= 0 the value  v(y) = min (cost + y memory) - y limit  is a lower bound: a choice within the
limit pays at most its cost. It is a shortest path, and concave in y; ``relax`` finds its maximum.

The labels. A partial choice of the first layers is a label (cost T, memory W) at its last strategy s. Dropped are
- labels with  W + least memory of the rest > limit: nothing completes them;
- labels with  T + y (W - limit) + h_y(s) > threshold  for some y of a few, h_y the cheapest priced completion: the same
  relaxation of what is left, so none of their completions costs less than the threshold;
- labels with no less cost and no less memory than another one whose strategy has equal transitions to the next layer:
  what completes the one completes the other.
Labels from both ends meet in the middle. The threshold starts at the best choice known. Where more labels would stay
than a pass may keep, it sinks to the bound of the best one left out: all choices below it are still looked at. Passes
widen until the best choice found is not above what was looked at. If all numbers are integers, a better choice is
better by their greatest common divisor (``chain.grid``), which the threshold uses.

Equal layers. In a long run of them nearly all layers walk round one or two cheap cycles of strategies, mostly a
strategy that repeats itself. ``peel`` takes most rounds out, the short chain is solved exactly, and the rounds are put
back (``restore``): the arcs of a walk less some rounds of a cycle of which each arc is left once are a walk again
(Euler). ``proves`` shows by a bound that no better choice has fewer rounds; else more layers stay, in the end all.

Rounding. Sums are exact to a relative 1e-12: a memory limit that equals a sum of memories is met whatever the order of
summation, and costs that differ by less are equal. ``cost`` and ``memory`` are correctly rounded sums.

Ties. A found choice gives way only to one that costs less by more than rounding. In the end no layer can take, alone,
another strategy that costs and needs no more and is better in one of the two or has a lower number. The same arrays
always give the same choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from autopar.errors import InputError, NoFeasiblePlan
from autopar.search.layerwise.chain import ROUNDING, Chain, Ints, chain_of, grid
from autopar.search.layerwise.exact import Solution, close_gap
from autopar.search.layerwise.hops import shortest_path
from autopar.search.layerwise.relaxation import Path, Relaxation, path_of, relax
from autopar.search.layerwise.rounds import peel, proves, restore

__all__ = ["DEFAULT_EFFORT", "LayerwiseChoice", "solve"]

DEFAULT_EFFORT = 20_000_000
"""Labels after which a search ends without proof: some seconds."""
KEPT_LAYERS = (16, 48, 144)
"""Layers that stay in a long run for each cycle, in turn, until the short chain decides the long one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerwiseChoice:
    """A strategy for each layer.

    Attributes:
        choice: indices of strategies, [layers].
        cost: sum of times and transitions.
        memory: sum of memories.
        bound: no choice within the limit costs less. Equal to ``cost`` where the optimum is proved; below it only if
            the labels allowed did not suffice (times that are a constant less memory, to nine digits and more).
        states: labels looked at.
    """

    choice: Ints
    cost: float
    memory: float
    bound: float
    states: int


def solve(
    time: ArrayLike,
    memory: ArrayLike,
    transition: ArrayLike,
    memory_limit: float,
    *,
    effort: int = DEFAULT_EFFORT,
) -> LayerwiseChoice:
    """Choose a strategy for each layer: least sum of times and transitions within a sum of memories.

    Args:
        time: of each layer under each strategy, [layers, strategies]; inf forbids one.
        memory: likewise.
        transition: between a layer under strategy a and the next under b, [strategies, strategies], or
            [layers - 1, strategies, strategies]; inf forbids the pair.
        memory_limit: of the sum of memories.
        effort: labels to look at before the best choice found is returned with its bound.

    Raises:
        InputError: arrays that do not fit together, or contain nan.
        NoFeasiblePlan: nothing fits; the message names the least memory that would do.
    """
    chain, limit = chain_of(time, memory, transition), float(memory_limit)
    if math.isnan(limit):
        raise InputError("layerwise: memory_limit is nan; give a number, or inf for no limit")
    light = _lightest(chain)
    slack = ROUNDING * max(abs(limit), chain.magnitude(light.choice)[1])
    if light.memory > limit + slack:
        raise NoFeasiblePlan(
            f"no choice of strategies fits in memory_limit={limit!r}: the least that would do is {light.memory!r}"
        )
    _, fastest = shortest_path(chain, chain.time)
    heavy = path_of(chain, fastest)
    if heavy.memory <= limit + slack:
        found = Solution(path=heavy, bound=heavy.cost, states=0)
    else:
        found = _solve_tight(chain, limit, slack, light, heavy, effort)
    path = path_of(chain, _settle_ties(chain, found.path.choice))
    bound = path.cost if found.bound >= found.path.cost else found.bound
    return LayerwiseChoice(
        choice=path.choice, cost=path.cost, memory=path.memory, bound=bound, states=found.states
    )  # fmt: skip


def _lightest(chain: Chain) -> Path:
    """The allowed choice of least memory."""
    weights = np.where(np.isfinite(chain.time), chain.memory, np.inf)
    closed = np.where(np.isfinite(chain.transition[:1]), 0.0, np.inf)
    if chain.num_layers > 1 and chain.transition.strides[0]:
        closed = np.where(np.isfinite(chain.transition), 0.0, np.inf)
    moves = np.broadcast_to(closed, chain.transition.shape) if chain.num_layers > 1 else chain.transition
    value, choice = shortest_path(chain, weights, transition=moves)
    if not math.isfinite(value):
        raise NoFeasiblePlan("no choice of strategies is allowed: each has an infinite time, memory or transition")
    return path_of(chain, choice)


def _solve_tight(chain: Chain, limit: float, slack: float, light: Path, heavy: Path, effort: int) -> Solution:
    """The optimum where the fastest choice is too large."""
    step = grid(chain.memory)
    if step:
        limit = step * math.floor(limit / step * (1 + ROUNDING))
    relaxation = relax(chain, limit, slack, light, heavy)
    best, states = relaxation.light, 0
    for keep in KEPT_LAYERS:
        shorter = peel(chain, limit, relaxation, keep)
        if shorter is None:
            break
        found = _solve_short(shorter.chain, shorter.limit, slack, effort // 8)
        if found is None:
            continue
        states += found.states
        restored = restore(shorter, found.path.choice)
        if restored is None or found.bound < found.path.cost:
            continue
        path = path_of(chain, restored)
        rounding = 2 * ROUNDING * chain.magnitude(restored)[0]
        if proves(chain, limit, shorter, relaxation, path, rounding):
            return Solution(path=path, bound=path.cost, states=states)
        best = path if path.cost < best.cost else best
    known = Relaxation(price=relaxation.price, bound=relaxation.bound, light=best, heavy=relaxation.heavy)
    found = close_gap(chain, limit, slack, known, effort - states)
    return Solution(path=found.path, bound=found.bound, states=found.states + states)


def _solve_short(chain: Chain, limit: float, slack: float, effort: int) -> Solution | None:
    """The optimum of what is left of a chain; None if nothing fits."""
    light = _lightest(chain)
    if light.memory > limit + slack:
        return None
    _, fastest = shortest_path(chain, chain.time)
    heavy = path_of(chain, fastest)
    if heavy.memory <= limit + slack:
        return Solution(path=heavy, bound=heavy.cost, states=0)
    return close_gap(chain, limit, slack, relax(chain, limit, slack, light, heavy), effort)


def _settle_ties(chain: Chain, choice: Ints) -> Ints:
    """Exchange single strategies until none can be had for less cost, memory or number at no more of the others."""
    settled, changed = choice.copy(), True
    while changed:
        changed = False
        for layer, current in enumerate(settled.tolist()):
            cost = chain.time[layer]
            if layer:
                cost = cost + chain.transition[layer - 1, settled[layer - 1]]
            if layer + 1 < chain.num_layers:
                cost = cost + chain.transition[layer, :, settled[layer + 1]]
            memory = chain.memory[layer]
            no_worse = np.flatnonzero((cost <= cost[current]) & (memory <= memory[current]))
            if len(no_worse) > 1:
                order = np.lexsort((no_worse, memory[no_worse], cost[no_worse]))
                settled[layer] = no_worse[order[0]]
                changed |= bool(settled[layer] != current)
    return settled
