"""What must be the same for a run to go on where another one stopped. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.runtime.data.tokens import read_header
from autopar.runtime.job import TrainJob
from costmodels.records import to_plain

STANDARD_LIBRARY = "standard library"


def identity(job: TrainJob) -> dict[str, Any]:
    """Model, workload, data and seed as plain data: what the losses follow from, whatever the plan.

    Learning rate, steps and the plan may change from one run to the next.
    """
    tokens = read_header(Path(job.data.tokens)).sha256 if job.data.tokens else STANDARD_LIBRARY
    evaluated = job.training is not None and job.training.evaluation.every > 0
    data = {"tokens": tokens, "validation": job.data.validation if evaluated else 0.0}
    return {
        "model": to_plain(job.model),
        "source": job.source,
        "workload": to_plain(job.workload),
        "data": data,
        "seed": job.seed,
    }


def check_identity(found: Mapping[str, Any], job: TrainJob, where: str) -> None:
    """Refuse to go on with what another job has saved. Raises InputError with every difference."""
    lines = differences(found, identity(job))
    if lines:
        raise InputError(
            f"{where} is of another training: {'; '.join(lines)}. Use another --out, or --no-resume to begin anew there"
        )


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Each value that two nested mappings do not share: ``model.hidden_size is 64 there, 128 here``."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [*there, *(key for key in here if key not in there)]
        return [
            line for key in keys for line in differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if there == here else [f"{name} is {there!r} there, {here!r} here"]
