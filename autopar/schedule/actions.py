"""A schedule is data: for every pipeline rank the actions that it takes, in order.

An action is written ``2F0``: virtual stage 2, forward, microbatch 0, as torch.distributed.pipelining writes it.
Virtual stage i lives on rank i mod p. Sources: GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019, 2021).
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from autopar.errors import PlanError
from autopar.plan import ScheduleName


class Direction(StrEnum):
    """Forward or backward of a microbatch."""

    FORWARD = "F"
    BACKWARD = "B"


class Action(NamedTuple):
    """One pass of one microbatch through one virtual stage."""

    stage: int
    direction: Direction
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.direction}{self.microbatch}"


Schedule = tuple[tuple[Action, ...], ...]


def build_schedule(name: ScheduleName, num_ranks: int, num_microbatches: int, virtual: int = 1) -> Schedule:
    """Actions of every rank.

    Raises:
        PlanError: interleaving needs a multiple of ``num_ranks`` microbatches.
    """
    if name is ScheduleName.INTERLEAVED and virtual > 1:
        if num_microbatches % num_ranks:
            raise PlanError(
                f"the interleaved schedule takes a multiple of pp={num_ranks} microbatches, not {num_microbatches}"
            )
        return tuple(_interleaved(rank, num_ranks, num_microbatches, virtual) for rank in range(num_ranks))
    if name is ScheduleName.GPIPE:
        warmups = [num_microbatches] * num_ranks
    else:
        warmups = [min(num_microbatches, num_ranks - rank) for rank in range(num_ranks)]
    return tuple(_one_stage(rank, warmup, num_microbatches) for rank, warmup in enumerate(warmups))


def _one_stage(stage: int, warmup: int, num_microbatches: int) -> tuple[Action, ...]:
    """``warmup`` forwards, then a backward and a forward in turn, then the backwards that are left."""
    actions = [Action(stage, Direction.FORWARD, i) for i in range(warmup)]
    for i in range(num_microbatches):
        actions.append(Action(stage, Direction.BACKWARD, i))
        if warmup + i < num_microbatches:
            actions.append(Action(stage, Direction.FORWARD, warmup + i))
    return tuple(actions)


def _interleaved(rank: int, num_ranks: int, num_microbatches: int, virtual: int) -> tuple[Action, ...]:
    total = num_microbatches * virtual

    def step(k: int, forward: bool) -> Action:
        # Microbatches go in groups of num_ranks through one virtual stage after the other.
        group, within = divmod(k, num_ranks * virtual)
        chunk, offset = divmod(within, num_ranks)
        chunk = chunk if forward else virtual - 1 - chunk
        direction = Direction.FORWARD if forward else Direction.BACKWARD
        return Action(chunk * num_ranks + rank, direction, group * num_ranks + offset)

    warmup = min(total, (virtual - 1) * num_ranks + 2 * (num_ranks - 1 - rank) + 1)
    actions = [step(k, True) for k in range(warmup)]
    for k in range(total):
        actions.append(step(k, False))
        if warmup + k < total:
            actions.append(step(warmup + k, True))
    return tuple(actions)


def dependencies(action: Action, num_stages: int) -> tuple[Action, ...]:
    """What must have finished first: the neighbour's pass, and for a backward its own forward."""
    stage, direction, microbatch = action
    if direction is Direction.FORWARD:
        return (Action(stage - 1, direction, microbatch),) if stage else ()
    own = Action(stage, Direction.FORWARD, microbatch)
    return (own,) if stage == num_stages - 1 else (own, Action(stage + 1, direction, microbatch))
