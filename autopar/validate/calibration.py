"""Measured runs folded into the profile of their machine, and whether that holds for runs that were left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from autopar.errors import InputError
from autopar.estimate import estimate
from autopar.measured import POINT_TO_POINT
from autopar.validate.attribution import BETWEEN, BUBBLE, OPTIMIZER, TRANSFER, Item, is_beside
from autopar.validate.measured_runs import JudgedRun, on_profile
from costmodels.calibration import with_fits
from costmodels.corrections import CORRECTED, corrected, fit_corrections
from costmodels.profiles import Correction, MachineProfile

WAITING = (BUBBLE, TRANSFER, BETWEEN)
"""Items that follow from the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibratedRun:
    """Step seconds of one run: predicted by the profile as it was, corrected by all runs, and by all others.

    ``held_out`` is None where there are no others.
    """

    slug: str
    measured_s: float
    before_s: float
    after_s: float
    held_out_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """A corrected profile and what it does to the runs."""

    profile: MachineProfile
    corrections: tuple[Correction, ...]
    runs: tuple[CalibratedRun, ...]


def calibrate(profile: MachineProfile, runs: Sequence[JudgedRun]) -> Calibration:
    """Correct a profile by runs that were judged with it.

    Raises:
        InputError: no runs.
    """
    if not runs:
        raise InputError("nothing to calibrate with: name a measurement.json")
    corrections = find_corrections(runs)
    found = with_fits(corrected(profile, corrections))
    results = []
    for run in runs:
        others = [other for other in runs if other is not run]
        held_out = _predict(corrected(profile, find_corrections(others)), run) if others else None
        results.append(
            CalibratedRun(
                slug=run.measurement.slug, measured_s=run.measurement.median_step_s, before_s=run.estimate.step_s,
                after_s=_predict(found, run), held_out_s=held_out,
            )
        )  # fmt: skip
    return Calibration(profile=found, corrections=corrections, runs=tuple(results))


def _predict(profile: MachineProfile, run: JudgedRun) -> float:
    return estimate(on_profile(profile)(run.measurement), run.measurement.plan).step_s


def find_corrections(runs: Sequence[JudgedRun]) -> tuple[Correction, ...]:
    """Factors of the parts that these runs show, fitted to all of their items at once."""
    columns, measured, steps = [], [], []
    for run in runs:
        for parts, seconds in _equations(run):
            columns.append([parts.get(name, 0.0) for name in CORRECTED])
            measured.append(seconds)
            steps.append(run.attribution.measured_step_s)
    shares = np.asarray(columns)
    seen = np.flatnonzero(shares.any(axis=0))
    factors = fit_corrections(shares[:, seen], np.asarray(measured), np.asarray(steps))
    names = tuple(f"{run.measurement.slug} of {run.measurement.date}" for run in runs)
    return tuple(
        Correction(
            name=CORRECTED[part], factor=float(factor), measurements=names, num_points=int((shares[:, part] > 0).sum()),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        for part, factor in zip(seen, factors, strict=True)
    )  # fmt: skip


def _equations(run: JudgedRun) -> list[tuple[dict[str, float], float]]:
    """(predicted seconds by part, measured seconds) of every item that a part of the profile makes.

    Replicated gradients are reduced beside the backward: what either costs shows in their sum alone.
    """
    beside = run.measurement.plan.zero_stage == 0 and run.measurement.plan.layout.world_size > 1
    together: dict[str, float] = {}
    seconds = 0.0
    found = []
    for item in run.attribution.time:
        part = part_of(item)
        if part is None:
            continue
        if beside and is_beside(item):
            together[part] = together.get(part, 0.0) + item.predicted
            seconds += item.measured
        else:
            found.append(({part: item.predicted}, item.measured))
    if together:
        found.append((together, seconds))
    return found


def part_of(item: Item) -> str | None:
    """The part of a profile that makes an item; None for waiting."""
    if item.name in WAITING:
        return None
    word = item.name.partition(" ")[0]
    part = OPTIMIZER if item.name == OPTIMIZER else "send" if word in POINT_TO_POINT else word
    return part if part in CORRECTED else None
