"""How a training run ended: result.json. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from costmodels.records import read_record, write_record

OUTCOME, OUTCOME_SCHEMA = "result.json", 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a training run came to.

    Attributes:
        plan: slug of the plan.
        first_step: steps that were done before, by an earlier run.
        steps_done: in all.
        steps: that the job asks for.
        stopped: told to stop before the last step.
        loss: of the last step; None if this run made none.
        validation_loss: of the last evaluation.
        step_s: median over this run.
        tokens: trained on in all.
    """

    plan: str
    first_step: int
    steps_done: int
    steps: int
    stopped: bool
    loss: float | None
    validation_loss: float | None
    step_s: float | None
    tokens: int


def read_outcome(folder: Path) -> Outcome:
    """Read result.json. Raises InputError."""
    return read_record(Outcome, folder / OUTCOME, OUTCOME_SCHEMA)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write result.json whole."""
    write_record(folder / OUTCOME, outcome, OUTCOME_SCHEMA)
