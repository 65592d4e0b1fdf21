"""What activations a pipeline rank holds while a schedule runs.

A forward adds a virtual stage's activations. A whole backward frees them; of a backward in two halves, that of the
input frees one share and that of the weights the rest, which is what products with the weights have saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.schedule.notation import Action, Direction, Schedule, Steps, flat
from autopar.schedule.simulate import Timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Activations of a rank as a curve of steps.

    Attributes:
        seconds: from the start of the step, rising.
        amounts: bytes held from each moment to the next.
    """

    seconds: tuple[float, ...]
    amounts: tuple[float, ...]

    @property
    def peak(self) -> float:
        """Most that is held."""
        return max(self.amounts)


def held_curve(timeline: Timeline, kept: Mapping[int, float], weight_share: float = 1.0) -> tuple[Held, ...]:
    """The curve of every rank: activations are there when a forward starts and gone when a backward ends.

    Args:
        timeline: of a simulated schedule.
        kept: bytes that a microbatch leaves in each virtual stage.
        weight_share: share of them that a separate backward of weights still needs.
    """
    curves = []
    for row in timeline.ranks:
        changes = [
            (timed.start if timed.action.direction is Direction.FORWARD else timed.end, i, timed.action)
            for i, timed in enumerate(row)
        ]
        held, seconds, amounts = 0.0, [0.0], [0.0]
        for moment, _, action in sorted(changes):
            held += kept[action.stage] * _change(action, weight_share)
            seconds.append(moment)
            amounts.append(held)
        curves.append(Held(seconds=tuple(seconds), amounts=tuple(amounts)))
    return tuple(curves)


def held_microbatches(schedule: Schedule | Steps, rank: int, weight_share: float = 1.0) -> float:
    """Most microbatches whose activations a rank holds at once, in units of all its virtual stages."""
    actions = flat(schedule)[rank]
    held = peak = 0.0
    for action in actions:
        held += _change(action, weight_share)
        peak = max(peak, held)
    return peak / len({action.stage for action in actions})


def _change(action: Action, weight_share: float) -> float:
    """Microbatches of a virtual stage that an action adds to what is held."""
    return {
        Direction.FORWARD: 1.0,
        Direction.BACKWARD: -1.0,
        Direction.BACKWARD_INPUT: weight_share - 1.0,
        Direction.BACKWARD_WEIGHT: -weight_share,
    }[action.direction]
