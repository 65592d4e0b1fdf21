"""A report as files: the page, its figures, traces, a table, the headline figures, and a README for the repository."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from autopar.report.columns import markdown_table
from autopar.report.content import DemoReport
from autopar.report.gallery import draw
from autopar.report.page import render_page
from autopar.report.rows import loss_distance
from autopar.report.style import save_png
from autopar.report.tables import search_line, validation_caption, validation_columns, verdict
from autopar.report.trace import chrome_trace
from autopar.search.reason import reason
from costmodels.records import to_plain, write_json, write_text

SUMMARY_SCHEMA = 1


def write_report(report: DemoReport, out: Path) -> list[Path]:
    """Write a report under ``out`` and return the files.

    index.html (one page with everything), plots/*.png, trace.json (the plan whose step is drawn) and
    traces/<slug>.json (every plan that was run), table.csv, summary.json, README.md.
    """
    drawings = draw(report)
    written = []

    def text(name: str, content: str) -> None:
        write_text(out / name, content)
        written.append(out / name)

    for drawing in drawings.values():
        path = out / "plots" / f"{drawing.name}.png"
        save_png(drawing.figure, path)
        written.append(path)
    text("index.html", render_page(report, drawings))
    showcase = report.showcase()
    for estimate in report.estimates:
        slug = estimate.plan.slug
        trace = json.dumps(chrome_trace(report.setting, estimate, report.measurement_of(slug))) + "\n"
        text(f"traces/{slug}.json", trace)
        if slug == showcase:
            text("trace.json", trace)
    text("table.csv", table_csv(report))
    write_json(out / "summary.json", summary(report))
    written.append(out / "summary.json")
    text("README.md", readme(report))
    return written


def summary(report: DemoReport) -> dict[str, Any]:
    """Headline figures as plain data, seconds and bytes."""
    best, validation = report.recommended, report.validation
    return {
        "schema_version": SUMMARY_SCHEMA,
        "title": report.title,
        "command": report.command,
        "date": report.date,
        "machine": dict(report.machine),
        "model": report.model.name,
        "recommended": {"slug": best.plan.slug, "step_s": best.step_s, "memory_bytes": best.memory_bytes},
        "search": {
            "considered": report.result.considered,
            "feasible": report.result.feasible,
            "rejected": dict(report.result.rejected),
            "seconds": report.result.seconds,
        },
        "validation": to_plain(validation),
        "loss_apart": loss_distance(report.measurements, report.reference),
    }


def table_csv(report: DemoReport) -> str:
    """Every ranked plan and every plan that was run, predicted fastest first; what was not measured is empty."""
    estimates = {e.plan.slug: e for e in (*report.result.best, *report.estimates)}
    compared = {c.slug: c for c in report.validation.comparisons}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ("slug", "tp", "pp", "vp", "cp", "dp", "zero_stage", "microbatch", "sequence_parallel", "recompute",
         "predicted_step_s", "measured_step_s", "error", "noise", "predicted_memory_bytes", "measured_memory_bytes",
         "memory_error", "tokens_per_s_per_gpu", "mfu", "reason")
    )  # fmt: skip
    for e in sorted(estimates.values(), key=lambda e: (e.step_s, e.memory_bytes, e.plan.slug)):
        plan, layout, c = e.plan, e.plan.layout, compared.get(e.plan.slug)
        measured = (c.measured_step_s, c.error, c.noise) if c else ("", "", "")
        memory = (c.measured_memory_bytes, c.memory_error) if c else ("", "")
        writer.writerow(
            (plan.slug, layout.tp, layout.pp, layout.vp, layout.cp, layout.dp, plan.zero_stage, plan.microbatch_size,
             int(plan.sequence_parallel), plan.recompute.value, e.step_s, *measured, e.memory_bytes, *memory,
             e.tokens_per_s_per_gpu, e.mfu, reason(e, report.recommended))
        )  # fmt: skip
    return stream.getvalue()


def readme(report: DemoReport) -> str:
    """The figures in Markdown."""
    best, said = report.recommended, verdict(report.validation)
    machine = "\n".join(f"- {name}: {text}" for name, text in report.machine.items())
    notes = "".join(f"\n{note}\n" for note in report.notes)
    return (
        f"# {report.title}\n\n"
        f"Made by `{report.command}` on {report.date}. Open `index.html` for everything, and `trace.json` or a file of "
        "`traces/` in ui.perfetto.dev for a step of every plan, predicted beside measured.\n\n"
        f"{machine}\n\n"
        f"Recommended: `{best.plan.slug}` ({search_line(report.result)}).\n\n"
        f"{said[0].upper()}{said[1:]}.\n{notes}\n"
        f"{markdown_table(validation_columns(report.validation))}\n"
        f"{validation_caption(report.validation)}\n\n"
        "![Predicted against measured](plots/predicted-measured.png)\n\n"
        "![Predicted step by its parts](plots/step-breakdown.png)\n"
    )
