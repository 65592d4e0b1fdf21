"""How a schedule is written: actions such as ``2F0``, rows of them, and what an action waits for.

An action names a virtual stage, a pass and a microbatch, as torch.distributed.pipelining writes them: ``2F0`` is the
forward of microbatch 0 through virtual stage 2, ``1B3`` a whole backward, ``0I2`` and ``0W2`` its two halves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from autopar.errors import PlanError


class Direction(StrEnum):
    """A pass of a microbatch: forward, whole backward, or the gradients of the input and of the weights apart."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


class Action(NamedTuple):
    """One pass of one microbatch through one virtual stage."""

    stage: int
    direction: Direction
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.direction}{self.microbatch}"


class Pair(NamedTuple):
    """A forward and a whole backward of another microbatch that run at once, each hiding the other's communication."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


Schedule = tuple[tuple[Action, ...], ...]
"""For every pipeline rank the actions that it takes, in order."""

Step = Action | Pair
Steps = tuple[tuple[Step, ...], ...]
"""A schedule that says which actions run at once."""


def actions_of(step: Step) -> tuple[Action, ...]:
    """The action, or the two of a pair."""
    return tuple(step) if isinstance(step, Pair) else (step,)


def has_pairs(steps: Iterable[Step]) -> bool:
    """Whether some actions run at once."""
    return Pair in set(map(type, steps))


def flat(steps: Steps) -> Schedule:
    """The actions alone, a pair as forward and backward in turn."""
    return tuple(tuple(action for step in row for action in actions_of(step)) for row in steps)


_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\((\d+F\d+);(\d+B\d+)\)OVERLAP_F_B")


def parse_action(text: str) -> Action:
    """Read an action such as ``2F0``. Raises PlanError."""
    match = _ACTION.fullmatch(text.strip())
    if not match:
        raise PlanError(f"cannot read the action '{text}'; an action looks like 2F0: stage, F, B, I or W, microbatch")
    return Action(int(match[1]), Direction(match[2]), int(match[3]))


def parse_row(text: str) -> tuple[Step, ...]:
    """Read a rank's actions, separated by commas; empty places mark idle time and are left out. Raises PlanError."""
    steps: list[Step] = []
    for cell in text.split(","):
        pair = _PAIR.fullmatch(cell.strip())
        if pair:
            steps.append(Pair(parse_action(pair[1]), parse_action(pair[2])))
        elif cell.strip():
            steps.append(parse_action(cell))
    return tuple(steps)


def row_text(steps: Iterable[Step]) -> str:
    """A rank's actions, separated by commas; the inverse of ``parse_row``."""
    return ",".join(map(str, steps))


def rank_of_stage(stage: int, num_ranks: int, v_shaped: bool = False) -> int:
    """Where a virtual stage lives: i mod p, or down the ranks and up again (ZB-V, DualPipeV)."""
    lap, place = divmod(stage, num_ranks)
    return num_ranks - 1 - place if v_shaped and lap % 2 else place


def dependencies(action: Action, num_stages: int) -> tuple[Action, ...]:
    """What must have finished first; a whole backward counts as its BACKWARD_INPUT, which is what others wait for.

    A forward needs the stage before it, a backward its own forward and the stage after it, a gradient of the weights
    its own gradient of the input.
    """
    stage, direction, microbatch = action
    if direction is Direction.FORWARD:
        return (Action(stage - 1, direction, microbatch),) if stage else ()
    if direction is Direction.BACKWARD_WEIGHT:
        return (Action(stage, Direction.BACKWARD_INPUT, microbatch),)
    own = Action(stage, Direction.FORWARD, microbatch)
    return (own,) if stage == num_stages - 1 else (own, Action(stage + 1, Direction.BACKWARD_INPUT, microbatch))


def provides(action: Action) -> Action:
    """What others wait for when they wait for this action."""
    return action._replace(direction=Direction.BACKWARD_INPUT) if action.direction is Direction.BACKWARD else action
