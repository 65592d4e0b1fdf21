"""The learning rate of every step: warm-up, then constant, cosine or linear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Decay(StrEnum):
    """How the learning rate goes on after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class RateSchedule:
    """How the learning rate changes.

    Attributes:
        decay: after the warm-up.
        warmup_steps: over which it grows in equal parts, the last of them at the peak.
        minimum: that the last step has, as a share of the peak; for a constant one of no meaning.
    """

    decay: Decay = Decay.CONSTANT
    warmup_steps: int = 0
    minimum: float = 0.1


def rate_at(step: int, *, peak: float, steps: int, schedule: RateSchedule) -> float:
    """Learning rate of a step.

    With p = (step - warmup) / (steps - 1 - warmup) the decay is linear, 1 - p, or cosine, (1 + cos(pi p)) / 2
    (Loshchilov and Hutter 2016), between ``peak`` and ``minimum * peak``.

    Args:
        step: from 0.
        peak: highest rate.
        steps: of the whole training.
        schedule: its form.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay is Decay.CONSTANT:
        return peak
    gone = (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps)
    left = 1 - gone if schedule.decay is Decay.LINEAR else (1 + math.cos(math.pi * gone)) / 2
    return peak * (schedule.minimum + (1 - schedule.minimum) * left)
