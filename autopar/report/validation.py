"""The folder that says how far predictions of published runs can be trusted: README.md, plots, rows, numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autopar.fit.constants import Quantity
from autopar.fit.errors import Errors
from autopar.report.columns import Column, markdown_table
from autopar.report.numbers import signed_percent, significant
from autopar.report.plots.runs import (
    ErrorLine,
    Points,
    error_strips,
    errors_and_goals,
    runs_overview,
    runs_scatter,
)  # fmt: skip
from autopar.report.runs_tables import largest_parts, write_rows
from autopar.report.style import save_png
from autopar.report.sweeps import sweeps_text
from autopar.validate.bands import bands_toml
from autopar.validate.bars import BARS, TITLES, Bar
from autopar.validate.study import Judged, Study, measured_arrays
from costmodels.records import write_json, write_text
from costmodels.units import GIB

WORST = 12


def write_validation_report(study: Study, folder: Path) -> list[Path]:
    """Write README.md, ``rows.csv``, ``summary.json``, ``bands.toml`` and ``plots/`` into a folder; return files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "rows.csv", folder / "summary.json"]
    write_rows(study.validation, files[0])
    write_json(files[1], _summary(study))
    if study.bands is not None:
        files.append(folder / "bands.toml")
        write_text(files[-1], bands_toml(study.bands))
    files += _plots(study, folder / "plots")
    files.append(folder / "README.md")
    write_text(files[-1], readme(study))
    return files


def title_of(source: str) -> str:
    """A source as readers know it."""
    return next((bar.name for bar in BARS if bar.source == source), TITLES.get(source, source))


def in_order(sources: Iterable[str]) -> list[str]:
    """Sources in the order of the goals, those without one last."""
    order = list(dict.fromkeys(bar.source for bar in BARS))
    return sorted(sources, key=lambda source: order.index(source) if source in order else len(order))


def goal_of(source: str, what: str) -> float | None:
    """The bar of a source in percent."""
    return next((bar.percent for bar in BARS if bar.source == source and bar.what == what), None)


def points_of(study: Study, source: str, quantity: Quantity) -> Points:
    """Measured and predicted runs of one source."""
    validation = study.validation
    seconds, gib = measured_arrays(validation.problem)
    is_time = quantity is Quantity.TIME
    measured = seconds if is_time else gib
    shipped = validation.predictions.step_s if is_time else validation.predictions.memory_bytes / GIB
    unseen = study.left_out_s if is_time else study.left_out_gib
    cases = validation.problem.cases
    chosen = [
        i for i, case in enumerate(cases)
        if case.source == source and np.isfinite(measured[i]) and np.isfinite(shipped[i])
    ]  # fmt: skip
    return Points(
        title=title_of(source),
        labels=tuple(cases[i].id.removeprefix(f"{source}-") for i in chosen),
        measured=measured[chosen],
        predicted=shipped[chosen],
        left_out=np.asarray([unseen.get(i, np.nan) for i in chosen]),
        unit="s" if is_time else "GiB",
    )


def _plots(study: Study, folder: Path) -> list[Path]:
    files = []

    def save(name: str, figure: Any) -> None:
        save_png(figure, folder / f"{name}.png")
        files.append(folder / f"{name}.png")

    for judged, quantity, what, prefix in (
        (study.time, Quantity.TIME, "step time", "time"),
        (study.memory, Quantity.MEMORY, "memory", "memory"),
    ):
        if not judged:
            continue
        sources = in_order(judged)
        panels = [points_of(study, source, quantity) for source in sources]
        goals = [goal_of(source, prefix) for source in sources]
        save(f"{prefix}-overview", runs_overview(panels, title=f"Predicted against measured {what}"))
        save(f"{prefix}-errors", error_strips(panels, goals, title=f"{what.capitalize()}: errors of single runs"))
        for source, points in zip(sources, panels, strict=True):
            save(f"{prefix}-{source}", runs_scatter(points, what=what))
    if study.time:
        save("goals", errors_and_goals([_line(source, study.time[source]) for source in in_order(study.time)]))
    return files


def _line(source: str, judged: Judged) -> ErrorLine:
    def error(found: Errors | None) -> float | None:
        return found.mape if found else None

    return ErrorLine(
        title=title_of(source), shipped=judged.shipped.mape, model_out=error(judged.model_out),
        source_out=error(judged.source_out), rival=error(judged.rival), goal=goal_of(source, "time"),
    )  # fmt: skip


def _summary(study: Study) -> dict[str, Any]:
    def lines(judged: dict[str, Judged]) -> dict[str, Any]:
        return {
            source: {
                "rows": j.rows, "shipped_mape": j.shipped.mape, "shipped_bias": j.shipped.bias,
                "model_out_mape": j.model_out.mape if j.model_out else None,
                "model_out_bias": j.model_out.bias if j.model_out else None,
                "source_out_mape": j.source_out.mape if j.source_out else None,
                "rival_mape": j.rival.mape if j.rival else None, "tau": j.tau, "tau_model_out": j.tau_model_out,
            }
            for source, j in judged.items()
        }  # fmt: skip

    return {
        "schema_version": 1,
        "time": lines(dict(study.time)),
        "memory": lines(dict(study.memory)),
        "goals": [
            {"name": bar.name, "source": bar.source, "what": bar.what, "percent": bar.percent, "reached": reached}
            for bar, reached in study.bars
        ],
        "coverage": study.coverage,
        "memory_coverage": study.memory_coverage,
        "source_out_mean": study.source_out_mean,
        "constants": {c.constant.name: c.value for c in study.constants},
    }


def readme(study: Study) -> str:
    """The report's text."""
    runs = sum(row.supported for row in study.validation.rows)
    sources = len(study.validation.summaries)
    parts = [
        "# Predictions held against published runs",
        f"{runs} runs of {sources} sources, measured by others (`runs/README.md` names them), predicted from their "
        "layout alone. *Shipped* is the program as it is; *model left out* is a fit of all constants that had not "
        "seen the model, *source left out* one that had not seen the source: what to expect for a new model, or a new "
        "engine. The *rival* is a constant share of the peak, the best in hindsight for each source, times the "
        "pipeline's bubble. Errors are predicted / measured - 1: MAPE is their mean absolute value, bias their mean.",
        "Leaving out refits constants, not formulas: the formulas were chosen by people who had seen most of these "
        "runs, so that truly unseen engines will be predicted somewhat worse.",
        "![errors and goals](plots/goals.png)",
        "## Goals",
        "Step times with the model left out of the fit. Memory as shipped where no constant is fitted on memory.",
        markdown_table(goal_columns(study.bars)),
        "## Step time by source",
        markdown_table(judged_columns(study.time)),
        f"Bands (`band_low_s` to `band_high_s` in `rows.csv`) are made to hold four of five runs; {study.coverage:.0%} "
        "of the left-out runs lie in bands made of the others."
        if np.isfinite(study.coverage)
        else "",
        "Points below: single runs, their model left out of the fit (diamonds: beyond 40 percent); black: median and "
        "quartiles; grey: the goal for the mean absolute error.",
        "![errors of single runs](plots/time-errors.png)",
        "![predicted against measured](plots/time-overview.png)",
        "## Memory by source",
        markdown_table(judged_columns(study.memory, rival=False)) if study.memory else "No run says its memory.",
        f"Bands of memory, made of the intervals of its items, hold {study.memory_coverage:.0%} of the left-out runs, "
        "each in bands made without its model."
        if np.isfinite(study.memory_coverage)
        else "",
        "![errors of single runs](plots/memory-errors.png)" if study.memory else "",
        *_pairs_text(study),
        "## Would it have picked the right layout?",
        sweeps_text(study.sweeps, title_of),
        *_calibration_text(study),
        "## Furthest off",
        markdown_table(worst_columns(study)),
        "## Constants",
        "Start is what was believed before these runs were seen (centre of the prior); the range is that of the fits "
        "without one model: a constant that moves much rests on few models.",
        markdown_table(constant_columns(study)) if study.constants else "No constants are free.",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def goal_columns(bars: Sequence[tuple[Bar, float | None]]) -> list[Column]:
    """Goals and what was reached."""
    what = {
        "time": "step time",
        "memory": "memory",
        "calibrated": "step time, one run per width, tp and microbatch measured",
        "source left out": "step time, source left out, mean over sources",
        "memory difference": "difference of memory between two plans",
    }
    return [
        Column(header="source", cells=tuple(bar.name for bar, _ in bars), text=True),
        Column(header="what", cells=tuple(what[bar.what] for bar, _ in bars), text=True),
        Column(header="goal %", cells=tuple(f"{bar.percent:g}" for bar, _ in bars)),
        Column(header="reached %", cells=tuple("" if v is None else f"{v:.2f}" for _, v in bars)),
        Column(
            header="",
            cells=tuple("not measured" if v is None else "yes" if v <= bar.percent else "**no**" for bar, v in bars),
            text=True,
        ),
    ]


def judged_columns(judged: Any, *, rival: bool = True) -> list[Column]:
    """Errors by source in percent."""
    found = [(source, judged[source]) for source in in_order(judged)]

    def cells(pick: Any, text: str = "{:.1f}") -> tuple[str, ...]:
        return tuple("" if (value := pick(j)) is None else text.format(value) for _, j in found)

    columns = [
        Column(header="source", cells=tuple(title_of(source) for source, _ in found), text=True),
        Column(header="runs", cells=cells(lambda j: j.rows, "{}")),
        Column(header="shipped MAPE", cells=cells(lambda j: j.shipped.mape)),
        Column(header="bias", cells=cells(lambda j: j.shipped.bias, "{:+.1f}")),
        Column(header="tau", cells=cells(lambda j: j.tau, "{:.2f}")),
        Column(header="model left out", cells=cells(lambda j: j.model_out and j.model_out.mape)),
        Column(header="bias", cells=cells(lambda j: j.model_out and j.model_out.bias, "{:+.1f}")),
        Column(header="tau", cells=cells(lambda j: j.tau_model_out, "{:.2f}")),
        Column(header="source left out", cells=cells(lambda j: j.source_out and j.source_out.mape)),
    ]
    return [*columns, Column(header="rival", cells=cells(lambda j: j.rival and j.rival.mape))] if rival else columns


def worst_columns(study: Study, number: int = WORST) -> list[Column]:
    """Runs whose left-out step time is furthest off, with what their predicted step is made of."""
    validation = study.validation
    seconds, _ = measured_arrays(validation.problem)
    rows = {row.id: row for row in validation.rows}
    found = []
    for index, case in enumerate(validation.problem.cases):
        guess = study.left_out_s.get(index, float(validation.predictions.step_s[index]))
        if np.isfinite(seconds[index]) and np.isfinite(guess) and case.id in rows:
            found.append((guess / seconds[index] - 1, guess, rows[case.id]))
    found = sorted(found, key=lambda item: -abs(item[0]))[:number]
    return [
        Column(header="run", cells=tuple(row.id for _, _, row in found), text=True),
        Column(header="plan", cells=tuple(row.slug for _, _, row in found), text=True, code=True),
        Column(header="predicted s", cells=tuple(significant(guess) for _, guess, _ in found)),
        Column(header="measured s", cells=tuple(significant(row.measured_s or 0) for _, _, row in found)),
        Column(header="error", cells=tuple(signed_percent(error, 0) for error, _, _ in found)),
        Column(header="most of the step", cells=tuple(largest_parts(row.terms, 3) for _, _, row in found), text=True),
    ]


def constant_columns(study: Study) -> list[Column]:
    """Constants with their value, range, rows and reason."""
    found = study.constants
    return [
        Column(header="constant", cells=tuple(c.constant.name for c in found), text=True, code=True),
        Column(header="start", cells=tuple(f"{c.constant.start:.3g}" for c in found)),
        Column(header="fitted", cells=tuple(f"{c.value:.3g}" for c in found)),
        Column(header="without a model", cells=tuple(f"{c.low_left_out:.3g} to {c.high_left_out:.3g}" for c in found)),
        Column(header="runs", cells=tuple(str(c.rows) for c in found)),
        Column(header="fitted on", cells=tuple(", ".join(c.sources) for c in found), text=True),
        Column(header="why it is free", cells=tuple(c.constant.why for c in found), text=True),
    ]


def _calibration_text(study: Study) -> list[str]:
    if not study.calibrated:
        return []
    found = [(s, *pair) for s, pair in study.calibrated.items()]
    return [
        "## With one measured run",
        "Errors once one run of the same model width, tp and microbatch has been measured, every run of a cell serving "
        "once as the measured one (`autopar.validate.calibrate`).",
        markdown_table(
            [
                Column(header="source", cells=tuple(title_of(s) for s, _, _ in found), text=True),
                Column(header="pairs of runs", cells=tuple(str(n) for _, _, n in found)),
                Column(header="MAPE", cells=tuple(f"{100 * e:.1f}" for _, e, _ in found)),
            ]
        ),
    ]


def _pairs_text(study: Study) -> list[str]:
    found = sorted((p for p in study.pairs), key=lambda pair: pair.source)
    by_source: dict[str, list[float]] = {}
    for pair in found:
        by_source.setdefault(pair.source, []).append(abs(pair.error))
    if not by_source:
        return []
    lines = list(by_source.items())
    return [
        "Pairs of runs of one model and batch whose memory differs by half a GiB or more: error of the difference.",
        markdown_table(
            [
                Column(header="source", cells=tuple(title_of(s) for s, _ in lines), text=True),
                Column(header="pairs", cells=tuple(str(len(e)) for _, e in lines)),
                Column(header="median error", cells=tuple(f"{100 * statistics.median(e):.0f}%" for _, e in lines)),
                Column(header="mean error", cells=tuple(f"{100 * statistics.mean(e):.0f}%" for _, e in lines)),
            ]
        ),
    ]
