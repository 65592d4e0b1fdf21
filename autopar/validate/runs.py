"""Published runs, predicted and joined with what was measured, row by row and summarised by source.

A row becomes a case (``autopar.runs``), the case is priced, and whatever fails on the way fails for that row alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autopar.errors import InputError
from autopar.fit.cases import read_rows
from autopar.fit.problem import Case, Predictions, Problem, predict, prepare
from autopar.runs import RunRow, Unsupported, interpret
from autopar.validate.bands import band_of
from autopar.validate.plans import kendall_tau
from costmodels.memory_bands import TOTAL, MemoryBand, item_bands
from costmodels.stack import load_stack
from costmodels.step_bands import Band, Bands, load_bands
from costmodels.units import GIB

RUNS_SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidatedRow:
    """One measured run and its prediction.

    Attributes:
        id, source: of the run; the source groups rows in summaries.
        reason: why there is no prediction; empty where there is one.
        slug, stack: plan and software that were assumed for it.
        measured_s, predicted_s: seconds of a step; None where not measured, or not predicted.
        measured_memory_gib, predicted_memory_gib: GiB of the fullest rank, likewise.
        band, memory_band: intervals of predicted_s, and of the memory in bytes, that hold the truth four times of five.
        terms: seconds of the predicted step by name.
        memory_items: predicted GiB by name.
        assumptions: what the file does not say and was assumed.
    """

    id: str
    source: str
    reason: str = ""
    slug: str = ""
    stack: str = ""
    measured_s: float | None = None
    predicted_s: float | None = None
    measured_memory_gib: float | None = None
    predicted_memory_gib: float | None = None
    band: Band | None = None
    memory_band: MemoryBand | None = None
    terms: Mapping[str, float]
    memory_items: Mapping[str, float]
    assumptions: tuple[str, ...] = ()

    @property
    def supported(self) -> bool:
        """Whether there is a prediction."""
        return not self.reason

    @property
    def time_error(self) -> float | None:
        """predicted / measured - 1 of the step time."""
        return _error(self.predicted_s, self.measured_s)

    @property
    def memory_error(self) -> float | None:
        """The same of memory."""
        return _error(self.predicted_memory_gib, self.measured_memory_gib)


def _error(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured - 1 if predicted is not None and measured else None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSummary:
    """Errors of one source in percent, over its predicted rows; None where nothing was measured.

    Attributes:
        rows: with a prediction.
        unsupported: without.
        time_mape, time_bias: mean absolute and mean signed error of step times.
        kendall_tau: tau-b of predicted and measured step times.
        memory_mape: mean absolute error of memory.
    """

    source: str
    rows: int
    unsupported: int
    time_mape: float | None
    time_bias: float | None
    kendall_tau: float | None
    memory_mape: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunsValidation:
    """All rows in the order of the files, and a summary of each source.

    Attributes:
        problem: the cases behind the rows, for fits; ``predictions`` belong to it.
    """

    rows: tuple[ValidatedRow, ...]
    summaries: tuple[SourceSummary, ...]
    problem: Problem
    predictions: Predictions

    def to_json(self) -> dict[str, Any]:
        """What ``autopar validate --json`` prints."""
        return {
            "schema_version": RUNS_SCHEMA,
            "rows": [_row_json(row) for row in self.rows],
            "summary": [
                {
                    "source": s.source, "rows": s.rows, "time_mape": s.time_mape, "time_bias": s.time_bias,
                    "kendall_tau": s.kendall_tau, "memory_mape": s.memory_mape, "unsupported": s.unsupported,
                }
                for s in self.summaries
            ],
        }  # fmt: skip


def _row_json(row: ValidatedRow) -> dict[str, Any]:
    return {
        "id": row.id, "status": "ok" if row.supported else "unsupported", "reason": row.reason or None,
        "measured_s": row.measured_s, "predicted_s": row.predicted_s,
        "measured_memory_gib": row.measured_memory_gib, "predicted_memory_gib": row.predicted_memory_gib,
        "source": row.source, "slug": row.slug or None, "stack": row.stack or None,
        "band_low_s": row.band.low if row.band else None, "band_high_s": row.band.high if row.band else None,
        "memory_band_low_gib": row.memory_band.low / GIB if row.memory_band else None,
        "memory_band_high_gib": row.memory_band.high / GIB if row.memory_band else None,
    }  # fmt: skip


def validate_runs(paths: Sequence[str | Path], *, stack: str | None = None) -> RunsValidation:
    """Predict every run of some files and join predictions with measurements.

    Args:
        paths: CSV files of measured runs; a run that is in several of them counts once.
        stack: training software to assume for every row instead of what each row says.

    Raises:
        InputError: a file that is no table of runs, or an unknown stack.
    """
    if stack is not None:
        load_stack(stack)
    return validate_rows(read_rows(paths), stack=stack)


def validate_rows(rows: Sequence[RunRow], *, stack: str | None = None) -> RunsValidation:
    """``validate_runs`` for rows that are already read."""
    cases: list[Case] = []
    place: dict[int, int] = {}
    reasons: dict[int, str] = {}
    for position, row in enumerate(rows):
        try:
            found = interpret(row)
        except InputError as error:
            reasons[position] = str(error)
            continue
        except Exception as error:  # one row that nobody foresaw must not end the rest
            reasons[position] = f"cannot be interpreted: {type(error).__name__}: {error}"
            continue
        if isinstance(found, Unsupported):
            reasons[position] = found.reason
            continue
        place[position] = len(cases)
        cases.append(found if stack is None else replace(found, stack=stack))
    problem = prepare(cases)
    predictions = predict(problem)
    bands = load_bands()
    joined = tuple(
        _joined(row, cases[place[i]], place[i], problem, predictions, bands)
        if i in place
        else _refused(row, reasons[i])
        for i, row in enumerate(rows)
    )
    return RunsValidation(rows=joined, summaries=summarise_rows(joined), problem=problem, predictions=predictions)


def source_of(row: RunRow) -> str:
    """What groups a row in summaries: its id without the number at the end."""
    found = re.sub(r"-\d+$", "", row.id)
    return found if found != row.id else row.source or row.id


def _refused(row: RunRow, reason: str) -> ValidatedRow:
    return ValidatedRow(
        id=row.id, source=source_of(row), reason=reason, measured_s=row.iter_time_s,
        measured_memory_gib=row.mem_gb_per_gpu, terms={}, memory_items={},
    )  # fmt: skip


def _joined(
    row: RunRow, case: Case, index: int, problem: Problem, predictions: Predictions, bands: Bands
) -> ValidatedRow:
    failure = problem.failures.get(index)
    base = ValidatedRow(
        id=row.id, source=case.source, reason=failure or "", slug=case.plan.slug, stack=case.stack,
        measured_s=case.measured_s, measured_memory_gib=case.measured_memory_gib, terms={}, memory_items={},
        assumptions=tuple(getattr(case, "assumptions", ())),
    )  # fmt: skip
    if failure:
        return base
    seconds = float(predictions.step_s[index])
    return replace(
        base,
        predicted_s=seconds,
        predicted_memory_gib=float(predictions.memory_bytes[index]) / GIB,
        band=band_of(bands, case).around(seconds),
        memory_band=item_bands({n: float(part[index]) for n, part in predictions.items.items()}, case.stack)[TOTAL],
        terms={name: float(part[index]) for name, part in predictions.terms.items()},
        memory_items={name: float(part[index]) / GIB for name, part in predictions.items.items()},
    )


def summarise_rows(rows: Sequence[ValidatedRow]) -> tuple[SourceSummary, ...]:
    """Errors by source, in the order in which sources appear."""
    by_source: dict[str, list[ValidatedRow]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    return tuple(_summary(source, found) for source, found in by_source.items())


def _summary(source: str, rows: Sequence[ValidatedRow]) -> SourceSummary:
    time = np.asarray([row.time_error for row in rows if row.time_error is not None])
    memory = np.asarray([row.memory_error for row in rows if row.memory_error is not None])
    pairs = [(row.predicted_s, row.measured_s) for row in rows if row.time_error is not None]
    return SourceSummary(
        source=source,
        rows=sum(row.supported for row in rows),
        unsupported=sum(not row.supported for row in rows),
        time_mape=100 * float(np.mean(np.abs(time))) if time.size else None,
        time_bias=100 * float(np.mean(time)) if time.size else None,
        kendall_tau=kendall_tau([p for p, _ in pairs if p], [m for _, m in pairs if m]) if pairs else None,
        memory_mape=100 * float(np.mean(np.abs(memory))) if memory.size else None,
    )
