"""A schedule as arrays: its steps in waves, each step of a wave ready once the waves before it are done.

With the order of waves known, timing a schedule is a maximum and a sum per wave, for one plan or for many at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.errors import PlanError
from autopar.schedule.notation import Action, Direction, Pair, Schedule, Steps, has_pairs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DIRECTIONS = tuple(Direction)
_CODES = {direction: code for code, direction in enumerate(DIRECTIONS)}
_CODE_OF_LETTER = np.asarray([next((c for d, c in _CODES.items() if ord(d) == i), -1) for i in range(128)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Waves:
    """Steps of a schedule, numbered by wave; arrays over steps unless said otherwise.

    Attributes:
        num_ranks, num_stages: of the schedule.
        first: number of the first step of each wave, and the number of steps at the end.
        before: the step that the rank takes before, or -1.
        needs: [2, steps], steps whose results are waited for, or -1.
        crosses: [2, steps], whether these results come from another rank.
        stage, code: virtual stage and index in DIRECTIONS, [2, steps]; the second row is a pair's backward, -1 if none.
        of_rank: for each rank its steps in order.
    """

    num_ranks: int
    num_stages: int
    first: Ints
    before: Ints
    needs: Ints
    crosses: NDArray[np.bool_]
    stage: Ints
    code: Ints
    of_rank: tuple[Ints, ...]


def to_waves(schedule: Schedule | Steps) -> Waves:
    """Order the steps.

    Raises:
        PlanError: the schedule waits for itself, lacks an action that another needs, or has one twice.
    """
    rows = list(schedule)
    width = max(len(row) for row in rows)
    forward, backward = _fields(rows)
    num_stages = 1 + int(max(forward[0].max(), backward[0].max()))
    num_microbatches = 1 + int(max(forward[2].max(), backward[2].max()))
    cells = num_stages * num_microbatches
    lengths = np.asarray([len(row) for row in rows])
    # A step by rank and place; results by what they are: outputs of forwards, then gradients of inputs.
    place = np.full((len(rows), width), -1)
    place[np.arange(width) < lengths[:, None]] = np.arange(lengths.sum())
    rank = np.repeat(np.arange(len(rows)), lengths)
    made_by = np.full(2 * cells + 1, -1)
    for stage, code, microbatch in (forward, backward):
        result = _result(stage, code, microbatch, num_microbatches, cells)
        _refuse_twice(result[result < 2 * cells], made_by)
        made_by[result] = np.arange(len(result))
    made_by[-1] = -1
    wants = np.stack([_needed(fields, num_stages, num_microbatches, cells) for fields in (forward, backward)])
    needs = np.where(wants >= 0, made_by[wants], -1)
    missing = (wants >= 0) & (needs < 0)
    own = _own(forward, backward, made_by, num_microbatches, cells)
    if missing.any() or (own == -2).any():
        raise PlanError("the schedule lacks an action that another one needs")
    steps = np.arange(lengths.sum())
    before = np.where(np.isin(steps, place[:, 0]), -1, steps - 1)
    if (own >= steps).any() or ((own >= 0) & (rank[own] != rank)).any():
        raise PlanError("the schedule takes a backward before its forward, or on another rank")
    order, first = _order(place, lengths, needs)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))

    def renumber(steps: Ints) -> Ints:
        return np.where(steps >= 0, number[steps], -1)[..., order]

    return Waves(
        num_ranks=len(rows), num_stages=num_stages, first=first, before=renumber(before), needs=renumber(needs),
        crosses=((needs >= 0) & (rank[needs] != rank))[:, order],
        stage=np.stack([forward[0], backward[0]])[:, order], code=np.stack([forward[1], backward[1]])[:, order],
        of_rank=tuple(number[place[r, : lengths[r]]] for r in range(len(rows))),
    )  # fmt: skip


def step_ends(waves: Waves, seconds: Any, transfer: Any = 0.0, hidden: Any = 0.0) -> tuple[Floats, Floats]:
    """When every step starts and ends, arrays [steps, ...].

    Args:
        waves: of the schedule.
        seconds: [stages, 4, ...] by virtual stage and direction (in the order of DIRECTIONS), any further axes.
        transfer: seconds from one rank to another, of the further axes' shape; they occupy no rank.
        hidden: seconds that a pair saves over its two actions one after the other.
    """
    table = np.asarray(seconds, dtype=float)
    extra = table.shape[2:]
    lag = np.broadcast_to(np.asarray(transfer, dtype=float), extra)
    second = waves.code[1] >= 0
    each = table[waves.stage[0], waves.code[0]]
    each[second] += table[waves.stage[1, second], waves.code[1, second]] - np.asarray(hidden, dtype=float)
    starts, ends = np.zeros((len(each), *extra)), np.zeros((len(each) + 1, *extra))
    ends[-1] = -np.inf
    first = waves.first.tolist()
    waits = [crosses.reshape(-1, *[1] * len(extra)) * lag for crosses in waves.crosses]
    paired = bool(second.any())
    for a, b in pairwise(first):
        start = np.maximum(ends[waves.before[a:b]], ends[waves.needs[0, a:b]] + waits[0][a:b])
        if paired:
            start = np.maximum(start, ends[waves.needs[1, a:b]] + waits[1][a:b])
        start = np.maximum(start, 0.0, out=start)
        starts[a:b] = start
        ends[a:b] = start + each[a:b]
    return starts, ends[:-1]


def _fields(rows: Sequence[Sequence[Action | Pair]]) -> tuple[Ints, Ints]:
    """Stage, code and microbatch of every step and of a pair's backward, each [3, steps]; -1 where there is none."""
    steps = [step for row in rows for step in row]
    paired = has_pairs(steps)
    pairs = [(i, step) for i, step in enumerate(steps) if isinstance(step, Pair)] if paired else []
    one = [step.forward if isinstance(step, Pair) else step for step in steps] if paired else steps
    stages, directions, microbatches = zip(*one, strict=True)
    letters = np.frombuffer("".join(directions).encode(), dtype=np.uint8)
    forward = np.stack([np.asarray(stages), _CODE_OF_LETTER[letters], np.asarray(microbatches)])
    backward = np.full((3, len(steps)), -1, dtype=np.int64)
    for i, step in pairs:
        backward[:, i] = step.backward.stage, _CODES[step.backward.direction], step.backward.microbatch
    return forward, backward


def _result(stage: Ints, code: Ints, microbatch: Ints, num_microbatches: int, cells: int) -> Ints:
    """Where a result is kept; the last place for what nobody else waits for."""
    cell = stage * num_microbatches + microbatch
    gradient = (code == _CODES[Direction.BACKWARD]) | (code == _CODES[Direction.BACKWARD_INPUT])
    return np.where(code == _CODES[Direction.FORWARD], cell, np.where(gradient, cells + cell, 2 * cells))


def _refuse_twice(results: Ints, made_by: Ints) -> None:
    if np.bincount(results, minlength=1).max() > 1 or (made_by[results] >= 0).any():
        raise PlanError("the schedule has an action twice")


def _needed(fields: Ints, num_stages: int, num_microbatches: int, cells: int) -> Ints:
    """The neighbour's result that each action waits for, -1 if none."""
    stage, code, microbatch = fields
    cell = stage * num_microbatches + microbatch
    gradient = (code == _CODES[Direction.BACKWARD]) | (code == _CODES[Direction.BACKWARD_INPUT])
    ahead = np.where((code == _CODES[Direction.FORWARD]) & (stage > 0), cell - num_microbatches, -1)
    return np.where(gradient & (stage < num_stages - 1), cells + cell + num_microbatches, ahead)


def _own(forward: Ints, backward: Ints, made_by: Ints, num_microbatches: int, cells: int) -> Ints:
    """The step of the same stage and microbatch that must come first on the same rank; -1 none, -2 missing."""
    found = np.full(forward.shape[1], -1)
    for stage, code, microbatch in (forward, backward):
        cell = stage * num_microbatches + microbatch
        weight = code == _CODES[Direction.BACKWARD_WEIGHT]
        back = (code >= 0) & (code != _CODES[Direction.FORWARD])
        source = made_by[np.where(back, cell + np.where(weight, cells, 0), -1)]
        found = np.where(back, np.where(source < 0, -2, np.maximum(found, source)), found)
    return found


def _order(place: Ints, lengths: Ints, needs: Ints) -> tuple[Ints, Ints]:
    """Steps by wave, and where each wave begins: each rank takes one step of a wave, if what it needs is done."""
    ranks = np.arange(len(lengths))
    done = np.zeros(needs.shape[1] + 1, dtype=bool)
    done[-1] = True
    position, waves, first = np.zeros_like(lengths), [], [0]
    total = 0
    while total < needs.shape[1]:
        at_work = ranks[position < lengths]
        steps = place[at_work, position[at_work]]
        ready = done[needs[0, steps]] & done[needs[1, steps]]
        taken = steps[ready]
        if not len(taken):
            raise PlanError("the schedule waits for itself")
        done[taken] = True
        position[at_work[ready]] += 1
        waves.append(taken)
        total += len(taken)
        first.append(total)
    return np.concatenate(waves), np.asarray(first)
