"""Published runs on the terminal and as a table of rows: errors by source, the worst rows, what was assumed."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autopar.report.columns import Column, terminal_table
from autopar.report.names import MEMORY_LABELS, TERM_LABELS
from autopar.report.numbers import signed_percent, significant
from autopar.validate.runs import RunsValidation, SourceSummary, ValidatedRow

if TYPE_CHECKING:
    from rich.console import RenderableType

WORST = 10


def _number(value: float | None, text: str = "{:.1f}") -> str:
    return "" if value is None else text.format(value)


def source_columns(summaries: Sequence[SourceSummary]) -> list[Column]:
    """Errors by source."""
    return [
        Column(header="source", cells=tuple(s.source for s in summaries), text=True),
        Column(header="runs", cells=tuple(str(s.rows) for s in summaries)),
        Column(header="not predicted", cells=tuple(str(s.unsupported or "") for s in summaries), drop=2),
        Column(header="step time MAPE %", cells=tuple(_number(s.time_mape) for s in summaries)),
        Column(header="bias %", cells=tuple(_number(s.time_bias, "{:+.1f}") for s in summaries), drop=1),
        Column(header="Kendall tau", cells=tuple(_number(s.kendall_tau, "{:.2f}") for s in summaries), drop=1),
        Column(header="memory MAPE %", cells=tuple(_number(s.memory_mape) for s in summaries)),
    ]


def sources_table(found: RunsValidation, *, width: int = 120) -> RenderableType:
    """Errors by source for a terminal."""
    return terminal_table(source_columns(found.summaries), width, title="Predicted against measured")


def worst_rows(rows: Sequence[ValidatedRow], number: int = WORST) -> list[ValidatedRow]:
    """Rows whose step time is furthest off, the worst first; by memory where no row has a time."""
    timed = [(abs(row.time_error), row) for row in rows if row.time_error is not None]
    held = [(abs(row.memory_error), row) for row in rows if row.memory_error is not None]
    return [row for _, row in sorted(timed or held, key=lambda pair: -pair[0])[:number]]


def largest_parts(parts: Mapping[str, float], number: int = 2) -> str:
    """The largest parts of a predicted step or peak with their shares: ``backward 45%, forward 22%``."""
    whole = sum(parts.values()) or 1.0
    largest = sorted(parts.items(), key=lambda pair: -pair[1])[:number]
    names = {**MEMORY_LABELS, **TERM_LABELS}
    return ", ".join(f"{names.get(name, name)} {value / whole:.0%}" for name, value in largest)


def worst_columns(rows: Sequence[ValidatedRow]) -> list[Column]:
    """Rows with what was predicted, what was measured, and where the predicted time goes."""

    def cells(values: Sequence[float | None]) -> tuple[str, ...]:
        return tuple("" if value is None else significant(value) for value in values)

    timed = all(row.time_error is not None for row in rows)
    if timed:
        unit, predicted, measured = "s", [row.predicted_s for row in rows], [row.measured_s for row in rows]
    else:
        unit = "GiB"
        predicted, measured = [row.predicted_memory_gib for row in rows], [row.measured_memory_gib for row in rows]
    errors = [(row.time_error if timed else row.memory_error) or 0.0 for row in rows]
    parts = [largest_parts(row.terms if timed else row.memory_items) for row in rows]
    return [
        Column(header="run", cells=tuple(row.id for row in rows), text=True),
        Column(header="plan", cells=tuple(row.slug for row in rows), text=True, code=True, drop=2),
        Column(header="stack", cells=tuple(row.stack for row in rows), text=True, drop=3),
        Column(header=f"predicted {unit}", cells=cells(predicted)),
        Column(header=f"measured {unit}", cells=cells(measured)),
        Column(header="error", cells=tuple(signed_percent(error, 0) for error in errors)),
        Column(header="most of it", cells=tuple(parts), text=True, drop=1),
    ]


def worst_table(found: RunsValidation, *, width: int = 120) -> RenderableType:
    """The rows that are furthest off, for a terminal; and those that could not be predicted."""
    from rich.console import Group
    from rich.text import Text

    refused = Counter(row.reason for row in found.rows if not row.supported)
    lines = [Text(f"not predicted: {number} x {reason}", style="dim") for reason, number in refused.most_common(5)]
    worst = worst_rows(found.rows)
    if not worst:
        return Group(*lines)
    return Group(terminal_table(worst_columns(worst), width, title="Furthest off"), *lines)


def assumptions_table(found: RunsValidation, *, width: int = 120) -> RenderableType:
    """What the files leave open and was assumed, by how many rows it concerns."""
    counts = Counter(text for row in found.rows for text in row.assumptions).most_common()
    columns = [
        Column(header="rows", cells=tuple(str(number) for _, number in counts)),
        Column(header="assumed", cells=tuple(text for text, _ in counts), text=True, wraps=True, min_width=60),
    ]
    return terminal_table(columns, width, title="What the files leave open")


def write_rows(found: RunsValidation, path: Path) -> None:
    """All rows as CSV: predicted, measured, errors, band, terms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    terms = list(dict.fromkeys(name for row in found.rows for name in row.terms))
    header = [
        "id", "source", "status", "reason", "slug", "stack", "measured_s", "predicted_s", "error", "band_low_s",
        "band_high_s", "measured_memory_gib", "predicted_memory_gib", "memory_error", *(f"{name}_s" for name in terms),
    ]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in found.rows:
            numbers = [
                row.measured_s, row.predicted_s, row.time_error, row.band.low if row.band else None,
                row.band.high if row.band else None, row.measured_memory_gib, row.predicted_memory_gib,
                row.memory_error, *(row.terms.get(name) for name in terms),
            ]  # fmt: skip
            state = "ok" if row.supported else "unsupported"
            words = [row.id, row.source, state, row.reason, row.slug, row.stack]
            writer.writerow(words + ["" if value is None else f"{value:.6g}" for value in numbers])
