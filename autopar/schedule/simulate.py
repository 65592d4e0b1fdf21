"""Event simulation of a schedule: when every action starts and ends, and what activations a rank holds meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from autopar.errors import PlanError
from autopar.schedule.notation import Action, Direction, Pair, Schedule, Steps, dependencies, flat, provides
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


def duration_table(durations: Durations, num_stages: int) -> Floats:
    """Seconds [stages, 4] in the order of DIRECTIONS; 0 for a pass that is not given, but B is I and W."""
    table = np.zeros((num_stages, len(DIRECTIONS)))
    for (stage, direction), duration in durations.items():
        table[stage, DIRECTIONS.index(direction)] = duration.total
    whole, halves = DIRECTIONS.index(Direction.BACKWARD), (Direction.BACKWARD_INPUT, Direction.BACKWARD_WEIGHT)
    for stage in range(num_stages):
        if (stage, Direction.BACKWARD) not in durations:
            table[stage, whole] = sum(table[stage, DIRECTIONS.index(half)] for half in halves)
    return table


def simulate(schedule: Schedule | Steps, durations: Durations, transfer: float = 0.0, hidden: float = 0.0) -> Timeline:
    """Time a schedule on processors of its own.

    A rank takes its actions in order, each as soon as its dependencies have ended and, where they lie on another
    rank, ``transfer`` seconds have passed; transfers occupy no rank. The two actions of a pair start together when
    both can, and end together ``hidden`` seconds sooner than one after the other. Cost: O(actions).

    Raises:
        PlanError: the schedule waits for itself.
    """
    waves = to_waves(schedule)
    starts, ends = step_ends(waves, duration_table(durations, waves.num_stages), transfer, hidden)
    rows = []
    for row, steps in zip(schedule, waves.of_rank, strict=True):
        timed: list[TimedAction] = []
        for step, start, end in zip(row, starts[steps].tolist(), ends[steps].tolist(), strict=True):
            parts = step if isinstance(step, Pair) else (step,)
            timed.extend(TimedAction(action, start, end) for action in parts)
        rows.append(tuple(timed))
    return Timeline(tuple(rows))


def rank_ends(waves: Waves, seconds: Floats, transfer: Floats | float = 0.0, hidden: Floats | float = 0.0) -> Floats:
    """End of every rank's last action [ranks, ...] for many plans of one schedule at once; see ``step_ends``."""
    _, ends = step_ends(waves, seconds, transfer, hidden)
    return np.stack([ends[steps[-1]] for steps in waves.of_rank])


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
                duration = _duration(durations, action)
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


def _duration(durations: Durations, action: Action) -> Duration:
    """Of an action; a whole backward that is not given is its two halves."""
    found = durations.get((action.stage, action.direction))
    if found is None and action.direction is Direction.BACKWARD:
        halves = [durations[action.stage, half] for half in (Direction.BACKWARD_INPUT, Direction.BACKWARD_WEIGHT)]
        return Duration(sum(h.compute for h in halves), sum(h.communication for h in halves))
    return durations[action.stage, action.direction] if found is None else found
