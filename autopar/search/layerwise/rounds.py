"""Long runs of equal layers: most of them walk round a cycle of strategies, and only the number of rounds is open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from autopar.search.layerwise.chain import Chain, Floats, Ints, without_layers
from autopar.search.layerwise.hops import LONG_RUN, runs, shortest_path
from autopar.search.layerwise.relaxation import Path, Relaxation

PRICE_STEPS = (0.01, 0.003, 0.001, 0.0003, 0.03, 0.1, 0.3, 1.0)
"""How far, relative to the best price, a price is moved to bound the rounds of a cycle, in the order of trying."""
REFINEMENTS = 4
"""Halvings of the distance to the neighbouring steps where none of the steps suffices."""

Cycle = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """Rounds of a cycle that a run is shortened by.

    Attributes:
        start: first layer of the run, in the long chain.
        shorter_start, shorter_length: of what is left of the run, in the short chain.
        cycle: strategies in their order; one strategy repeats itself.
        number: rounds.
        heavy: the cycle was met on the path above the limit.
    """

    heavy: bool
    start: int
    shorter_start: int
    shorter_length: int
    cycle: Cycle
    number: int

    @property
    def arcs(self) -> list[tuple[int, int]]:
        """Pairs of neighbours that a round walks through."""
        return list(zip(self.cycle, self.cycle[1:] + self.cycle[:1], strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Peeled:
    """A chain with fewer layers.

    Attributes:
        chain: what is left.
        limit: of its memory.
        rounds: taken out.
    """

    chain: Chain
    limit: float
    rounds: tuple[Rounds, ...]


def peel(chain: Chain, limit: float, relaxation: Relaxation, keep: int) -> Peeled | None:
    """Take out all rounds but about ``keep`` layers of each cycle that the relaxed paths walk in a long run.

    The two paths, mixed so that they use the limit, say how many rounds to expect. None if there is nothing to take.
    """
    light, heavy = relaxation.light, relaxation.heavy
    share = (limit - light.memory) / (heavy.memory - light.memory)
    kept = np.ones(chain.num_layers, dtype=np.bool_)
    taken: list[Rounds] = []
    for start, length in runs(chain):
        if length < LONG_RUN:
            continue
        walks = [Counter(_cycles(path.choice[start : start + length])) for path in (light, heavy)]
        frequent = {walk.most_common(1)[0][0]: walk is walks[1] for walk in walks if walk}
        room = length - 2
        for cycle, is_heavy in frequent.items():
            expected = (1 - share) * walks[0][cycle] + share * walks[1][cycle]
            number = min(int(expected - keep / len(cycle)), room // len(cycle))
            if number <= 0:
                continue
            before = start - int(np.count_nonzero(~kept[:start]))
            taken.append(
                Rounds(heavy=is_heavy, start=start, shorter_start=before, shorter_length=0, cycle=cycle, number=number)
            )
            room -= number * len(cycle)
            limit -= number * float(chain.memory[start, list(cycle)].sum())
        kept[start + room + 2 : start + length] = False
    if not taken:
        return None
    left = {start: int(np.count_nonzero(kept[start : start + length])) for start, length in runs(chain)}
    rounds = tuple(
        Rounds(
            heavy=one.heavy, start=one.start, shorter_start=one.shorter_start, shorter_length=left[one.start],
            cycle=one.cycle, number=one.number,
        )
        for one in taken
    )  # fmt: skip
    return Peeled(chain=without_layers(chain, kept), limit=limit, rounds=rounds)


def _cycles(walk: Ints) -> Iterator[Cycle]:
    """Simple cycles into which a walk falls apart, each from its lowest strategy on."""
    stack: list[int] = []
    place: dict[int, int] = {}
    for node in walk.tolist():
        if node in place:
            cycle = tuple(stack[place[node] :])
            del stack[place[node] :]
            for left in cycle:
                del place[left]
            lowest = cycle.index(min(cycle))
            yield cycle[lowest:] + cycle[:lowest]
        place[node] = len(stack)
        stack.append(node)


def restore(peeled: Peeled, choice: Ints) -> Ints | None:
    """The choice with its rounds walked again; None if it does not come past some cycle."""
    inserted: dict[int, list[int]] = {}
    for rounds in peeled.rounds:
        run = choice[rounds.shorter_start : rounds.shorter_start + rounds.shorter_length]
        past = np.flatnonzero(np.isin(run, rounds.cycle))
        if not len(past):
            return None
        at = int(past[0])
        turn = rounds.cycle.index(int(run[at]))
        round_ = [*rounds.cycle[turn + 1 :], *rounds.cycle[: turn + 1]]
        inserted.setdefault(rounds.shorter_start + at, []).extend(round_ * rounds.number)
    pieces: list[int] = []
    for layer, strategy in enumerate(choice.tolist()):
        pieces.append(strategy)
        pieces.extend(inserted.get(layer, ()))
    return np.asarray(pieces, dtype=np.int64)


def proves(chain: Chain, limit: float, peeled: Peeled, relaxation: Relaxation, best: Path, rounding: float) -> bool:
    """Whether every choice cheaper than ``best`` walks each arc of the cycles once more than was taken out.

    Then the rounds can be taken out of it and what remains is one walk (Euler), a choice of the peeled chain. A choice
    with at most q passes of an arc costs at least  min over choices of cost + y (memory - limit) + z (passes - q)  for
    any y, z >= 0: if that exceeds the best cost, no better choice is left out.

    Where a strategy that repeats itself can be ``gathered``, its layers count instead of its arcs: all but those at the
    run's two ends come together without cost, so q + 3 layers hold q + 1 neighbouring ones.
    """
    passes: dict[tuple[int, Cycle], tuple[int, bool]] = {}
    for rounds in peeled.rounds:
        if len(rounds.cycle) == 1 and gathers(chain.transition[rounds.start], rounds.cycle[0]):
            passes[rounds.start, rounds.cycle] = rounds.number + 2, rounds.heavy
            continue
        for arc in rounds.arcs:
            before, _ = passes.get((rounds.start, arc), (0, False))
            passes[rounds.start, arc] = before + rounds.number, rounds.heavy
    enough = best.cost - rounding
    for (start, counted), (number, heavy) in passes.items():
        if not _reaches(chain, limit, relaxation.price, start, counted, number, enough, -1.0 if heavy else 1.0):
            return False
    return True


def _reaches(
    chain: Chain, limit: float, price: float, start: int, counted: Cycle, number: int, enough: float, sign: float
) -> bool:
    """Whether the bound of few passes reaches ``enough`` at some price: it is concave, so its top is near the best."""
    bounds: dict[float, float] = {}

    def reaches(step: float) -> bool:
        bounds[step] = _bound_of_few(chain, limit, price * (1 + sign * step), start, counted, number)
        return bounds[step] >= enough

    if any(reaches(step) for step in PRICE_STEPS):
        return True
    ratio = 3.0
    for _ in range(REFINEMENTS):
        top, ratio = max(bounds, key=bounds.__getitem__), ratio**0.5
        if any(reaches(step) for step in (top * ratio, top / ratio) if step < 1):
            return True
    return False


def gathers(moves: Floats, strategy: int) -> bool:
    """Whether a layer of this strategy between any two others costs no less there than beside another of its own.

    c[i, s] + c[s, j] >= c[i, j] + c[s, s]: the triangle inequality where staying is free. ``moves`` is c.
    """
    around = moves[:, strategy, None] + moves[None, strategy, :]
    return bool((around >= moves + moves[strategy, strategy]).all())


def _bound_of_few(chain: Chain, limit: float, price: float, start: int, counted: Cycle, number: int) -> float:
    """Lower bound on the cost of choices with at most ``number`` of what is counted in the run at ``start``.

    ``counted`` is an arc, or a strategy whose layers count but for the run's first. The penalty is what one of them
    saves on average at this price: with it, paths that have many cost as much as those that have none.
    """
    length = dict(runs(chain))[start]
    priced = chain.time + price * chain.memory
    value, choice = shortest_path(chain, priced)
    run = choice[start : start + length]
    hit = run[1:] == counted[-1]
    if len(counted) == 2:
        hit &= run[:-1] == counted[0]
    used = int(np.count_nonzero(hit))
    if used <= number:
        return value - price * limit
    where = counted if len(counted) == 2 else (slice(None), counted[0])
    table = np.zeros((chain.num_strategies, chain.num_strategies))
    table[where] = np.inf
    without, _ = shortest_path(chain, priced, {start: table})
    penalty = (min(without, value + abs(value)) - value) / used
    table[where] = penalty
    value, _ = shortest_path(chain, priced, {start: table})
    return value - penalty * number - price * limit
