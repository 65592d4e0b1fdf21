"""Event simulation of a schedule: when every action starts and ends, and what activations a rank holds meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autopar.schedule.actions import Action, Direction, Schedule, dependencies


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds of an action: computing (slowed where ranks share processors) and waiting for communication."""

    compute: float
    communication: float = 0.0

    @property
    def total(self) -> float:
        """Seconds on processors of its own."""
        return self.compute + self.communication


@dataclass(frozen=True, slots=True)
class TimedAction:
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
        return self.end - sum(timed.end - timed.start for timed in self.ranks[rank])


Durations = Mapping[tuple[int, Direction], Duration]
"""By virtual stage and direction; every microbatch takes the same."""


def simulate(schedule: Schedule, durations: Durations, transfer: float = 0.0) -> Timeline:
    """Time a schedule on processors of its own.

    A rank takes its actions in order, each as soon as its dependencies have ended and, where they lie on another
    rank, ``transfer`` seconds have passed; transfers occupy no rank. Cost: O(actions).
    """
    rank_of = {action: rank for rank, actions in enumerate(schedule) for action in actions}
    num_stages = 1 + max(action.stage for action in rank_of)
    ends: dict[Action, float] = {}
    timed: list[list[TimedAction]] = [[] for _ in schedule]
    position = [0] * len(schedule)
    ready = list(range(len(schedule)))
    while ready:
        rank = ready.pop()
        clock = timed[rank][-1].end if timed[rank] else 0.0
        while position[rank] < len(schedule[rank]):
            action = schedule[rank][position[rank]]
            needs = dependencies(action, num_stages)
            if any(need not in ends for need in needs):
                break
            arrivals = [ends[need] + (transfer if rank_of[need] != rank else 0.0) for need in needs]
            start = max([clock, *arrivals])
            clock = start + durations[action.stage, action.direction].total
            ends[action] = clock
            timed[rank].append(TimedAction(action, start, clock))
            position[rank] += 1
            for other in range(len(schedule)):
                if other != rank and other not in ready:
                    ready.append(other)
    assert all(done == len(actions) for done, actions in zip(position, schedule, strict=True)), "schedule deadlocks"
    return Timeline(tuple(tuple(actions) for actions in timed))


def simulate_shared(
    schedule: Schedule, durations: Durations, transfer: float, slowdown: Callable[[int], float]
) -> Timeline:
    """Time a schedule whose ranks share processors.

    Like ``simulate``, but while ``n`` ranks compute at once each advances at the rate 1 / slowdown(n). Communication
    advances at its own rate and slows nobody. Cost: O(actions x ranks).
    """
    rank_of = {action: rank for rank, actions in enumerate(schedule) for action in actions}
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
                duration = durations[action.stage, action.direction]
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
                ends[run.action] = clock + step
                timed[rank].append(TimedAction(run.action, run.start, clock + step))
                position[rank] += 1
                del running[rank]
        clock += step
    assert all(done == len(actions) for done, actions in zip(position, schedule, strict=True)), "schedule deadlocks"
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


def held_microbatches(schedule: Schedule, rank: int) -> float:
    """Most microbatches whose activations a rank holds at once, in units of all its virtual stages."""
    stages = {action.stage for action in schedule[rank]}
    held = peak = 0
    for action in schedule[rank]:
        held += 1 if action.direction is Direction.FORWARD else -1
        peak = max(peak, held)
    return peak / len(stages)
