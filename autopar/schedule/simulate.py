"""Event simulation of a schedule: when every action starts and ends, and what activations a rank holds meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from autopar.errors import PlanError
from autopar.schedule.notation import (
    Action,
    Direction,
    Schedule,
    Step,
    Steps,
    actions_of,
    dependencies,
    flat,
    has_pairs,
    provides,
)
from autopar.schedule.waves import DIRECTIONS, Floats, Waves, step_ends, to_waves


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds of an action: computing (slowed where ranks share processors) and waiting for communication."""

    compute: float
    communication: float = 0.0

    @property
    def total(self) -> float:
        """Seconds on processors of its own."""
        return self.compute + self.communication


class TimedAction(NamedTuple):
    """An action with its place in time, seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Timed actions of every pipeline rank, in order."""

    ranks: tuple[tuple[TimedAction, ...], ...]

    @property
    def end(self) -> float:
        """Seconds from the first start to the last end."""
        return max(actions[-1].end for actions in self.ranks)

    def idle(self, rank: int) -> float:
        """Seconds in which a rank takes no action."""
        return self.end - busy_seconds(self.ranks[rank])


def busy_seconds(actions: tuple[TimedAction, ...]) -> float:
    """Seconds in which a rank takes an action, or two at once."""
    busy = clock = 0.0
    for timed in actions:
        busy += max(0.0, timed.end - max(timed.start, clock))
        clock = max(clock, timed.end)
    return busy


Durations = Mapping[tuple[int, Direction], Duration]
"""By virtual stage and direction; every microbatch takes the same."""


def with_halves(durations: Durations, weight_share: float = 0.5) -> Durations:
    """Whole backwards taken apart as well: this share of each is the gradients of weights, the rest those of inputs.

    Half is the share of matrix products with weights; attention, norms and communication have no such part.
    """
    found = dict(durations)
    halves = ((Direction.BACKWARD_INPUT, 1 - weight_share), (Direction.BACKWARD_WEIGHT, weight_share))
    for (stage, direction), whole in durations.items():
        if direction is Direction.BACKWARD:
            for half, share in halves:
                found.setdefault((stage, half), Duration(whole.compute * share, whole.communication * share))
    return found


def _duration(durations: Durations, stage: int, direction: Direction) -> Duration:
    """Of a pass; a whole backward that is not given is its two halves. Raises PlanError."""
    found = durations.get((stage, direction))
    if found is None and direction is Direction.BACKWARD:
        halves = [_duration(durations, stage, d) for d in (Direction.BACKWARD_INPUT, Direction.BACKWARD_WEIGHT)]
        found = Duration(sum(h.compute for h in halves), sum(h.communication for h in halves))
    if found is None:
        raise PlanError(f"no duration is given for {direction} of virtual stage {stage}")
    return found


def duration_table(durations: Durations, waves: Waves) -> Floats:
    """Seconds [stages, 4] in the order of DIRECTIONS, 0 for passes that the schedule does not have."""
    table = np.zeros((waves.num_stages, len(DIRECTIONS)))
    used = np.zeros(table.shape, dtype=bool)
    used[waves.stage[0], waves.code[0]] = True
    second = waves.code[1] >= 0
    used[waves.stage[1, second], waves.code[1, second]] = True
    for stage, code in np.argwhere(used).tolist():
        table[stage, code] = _duration(durations, stage, DIRECTIONS[code]).total
    return table


def simulate(schedule: Schedule | Steps, durations: Durations, transfer: float = 0.0, hidden: float = 0.0) -> Timeline:
    """Time a schedule on processors of its own.

    A rank takes its actions in order, each as soon as its dependencies have ended and, where they lie on another
    rank, ``transfer`` seconds have passed; transfers occupy no rank. The two actions of a pair start together when
    both can, and end together ``hidden`` seconds sooner than one after the other. Cost: O(actions).

    Raises:
        PlanError: the schedule waits for itself, or a duration is missing.
    """
    waves = to_waves(schedule)
    starts, ends = step_ends(waves, duration_table(durations, waves), transfer, hidden)
    rows = []
    for row, steps in zip(schedule, waves.of_rank, strict=True):
        rows.append(_timed(row, starts[steps], ends[steps]))
    return Timeline(tuple(rows))


def _timed(row: tuple[Step, ...], starts: Floats, ends: Floats) -> tuple[TimedAction, ...]:
    if has_pairs(row):
        counts = [len(actions_of(step)) for step in row]
        (actions,), starts, ends = flat((row,)), np.repeat(starts, counts), np.repeat(ends, counts)
    else:
        actions = cast(tuple[Action, ...], row)
    return tuple(map(TimedAction._make, zip(actions, starts.tolist(), ends.tolist(), strict=True)))


def simulate_shared(
    schedule: Schedule | Steps, durations: Durations, transfer: float, slowdown: Callable[[int], float]
) -> Timeline:
    """Time a schedule whose ranks share processors.

    Like ``simulate``, but while ``n`` ranks compute at once each advances at the rate 1 / slowdown(n). Communication
    advances at its own rate and slows nobody. A pair's actions come one after the other. Cost: O(actions x ranks).
    """
    schedule = flat(schedule)
    rank_of = {provides(action): rank for rank, actions in enumerate(schedule) for action in actions}
    num_stages = 1 + max(action.stage for action in rank_of)
    ends: dict[Action, float] = {}
    timed: list[list[TimedAction]] = [[] for _ in schedule]
    position = [0] * len(schedule)
    running: dict[int, _Running] = {}
    clock = 0.0
    while True:
        wake = None
        for rank, actions in enumerate(schedule):
            if rank in running or position[rank] == len(actions):
                continue
            action = actions[position[rank]]
            needs = dependencies(action, num_stages)
            if any(need not in ends for need in needs):
                continue
            start = max([0.0, *(ends[need] + (transfer if rank_of[need] != rank else 0.0) for need in needs)])
            if start <= clock:
                duration = _duration(durations, action.stage, action.direction)
                running[rank] = _Running(action, clock, duration.compute, duration.communication)
            else:
                wake = start if wake is None else min(wake, start)
        if not running and wake is None:
            break
        active = sum(1 for run in running.values() if run.compute > 0)
        rate = 1.0 / slowdown(active) if active else 1.0
        steps = [run.compute / rate if run.compute > 0 else run.communication for run in running.values()]
        step = min([*steps, *([wake - clock] if wake is not None else [])])
        for rank, run in list(running.items()):
            was_computing = run.compute > 0
            run.advance(step, rate)
            if run.compute <= 0 and (run.communication <= 0 or (not was_computing and run.communication <= 1e-15)):
                ends[provides(run.action)] = clock + step
                timed[rank].append(TimedAction(run.action, run.start, clock + step))
                position[rank] += 1
                del running[rank]
        clock += step
    if any(done < len(actions) for done, actions in zip(position, schedule, strict=True)):
        raise PlanError("the schedule waits for itself")
    return Timeline(tuple(tuple(actions) for actions in timed))


@dataclass(slots=True)
class _Running:
    """An action under way: what is left of it."""

    action: Action
    start: float
    compute: float
    communication: float

    def advance(self, step: float, rate: float) -> None:
        if self.compute > 0:
            left = self.compute - step * rate
            self.compute = left if left > 1e-12 * max(1.0, self.compute) else 0.0
        else:
            self.communication = max(0.0, self.communication - step)
