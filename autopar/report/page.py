"""A report as one HTML page that needs nothing else: styles and figures are in it, and there is no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

from autopar.plan import Plan, Recompute
from autopar.report.columns import Column, html_table
from autopar.report.content import DemoReport
from autopar.report.gallery import Drawing, draw
from autopar.report.names import layout_words
from autopar.report.numbers import percent, signed_percent, significant
from autopar.report.rows import (
    collective_columns,
    difference_columns,
    loss_columns,
    ranked_columns,
    stage_columns,
    traffic_columns,
    validation_page_columns,
)
from autopar.report.style import time_scale, to_svg
from autopar.report.tables import (
    breakdown_columns,
    memory_columns,
    plans_caption,
    profile_columns,
    profile_line,
    search_line,
    validation_caption,
)
from autopar.search.reason import reason
from costmodels.units import format_count


@dataclass(frozen=True, slots=True)
class _Section:
    anchor: str
    title: str
    body: str


def render_page(report: DemoReport, drawings: Mapping[str, Drawing] | None = None) -> str:
    """The whole page. ``drawings`` saves drawing the figures again (see ``gallery.draw``)."""
    figures = _Figures(drawings if drawings is not None else draw(report))
    sections = [
        _comparison(report, figures),
        _ranking(report),
        _time(report, figures),
        _memory(report, figures),
        _timeline(figures),
        _losses(report, figures),
        _machine(report, figures),
        _provenance(report),
    ]
    body = "\n".join(
        f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>\n{s.body}</section>' for s in sections if s.body
    )
    contents = " ".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections if s.body)
    folder = resources.files("autopar.report")
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(report.title),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        lead=escape(_lead(report)),
        headline=_headline(report),
        contents=contents,
        sections=body,
        footer=f"Written by autopar, {escape(report.date)}. Times and memory were measured on the machine named above.",
    )


@dataclass(frozen=True, slots=True)
class _Figures:
    drawings: Mapping[str, Drawing]

    def html(self, name: str, size: str = "") -> str:
        """The figure, or nothing where the report has no data for it."""
        drawing = self.drawings.get(name)
        if drawing is None:
            return ""
        mark = f' class="{size}"' if size else ""
        svg = to_svg(drawing.figure, drawing.name, drawing.description)
        return (
            f'<figure{mark}><div class="canvas">{svg}</div>'
            f"<figcaption>{escape(drawing.caption)}</figcaption></figure>\n"
        )


def _lead(report: DemoReport) -> str:
    workload, ranks = report.setting.workload, report.setting.cluster.world_size
    return (
        f"{report.model.name}: {format_count(report.setting.graph.num_parameters)} parameters, batches of "
        f"{workload.global_batch} sequences of {workload.seq_len} tokens, {workload.precision}, on {ranks} ranks. "
        f"{len(report.measurements)} plans were run for real."
    )


def _headline(report: DemoReport) -> str:
    best, validation = report.recommended, report.validation
    scale, unit = time_scale(best.step_s)
    measured = next((c for c in validation.comparisons if c.slug == best.plan.slug), None)
    found = (
        f"measured {significant(measured.measured_step_s / scale)} {unit} ({signed_percent(measured.error)} error)"
        if measured
        else "not among the plans that were run"
    )
    tau = "–" if validation.kendall_tau is None else f"{validation.kendall_tau:.2f}".replace("-", "\u2212")
    count = len(validation.comparisons)
    tiles = (
        (percent(validation.regret), "regret", _regret_text(report)),
        (
            percent(validation.time_error_median),
            "median error of step time",
            f"worst {percent(validation.time_error_worst)}; memory {percent(validation.memory_error_median)}, "
            f"worst {percent(validation.memory_error_worst)}",
        ),
        (tau, "Kendall tau", f"agreement of predicted and measured ranking of {count} plans; 1 is the same order"),
    )
    items = "".join(
        f'<li class="tile"><b>{escape(value)}</b><span>{escape(name)}</span><small>{escape(text)}</small></li>'
        for value, name, text in tiles
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)
    return (
        '<div class="choice"><p class="label">Recommended plan</p>'
        f'<p class="name">{escape(_choice(best.plan))}</p>'
        f"<p><code>{escape(best.plan.slug)}</code></p>"
        f"<p>{significant(best.step_s / scale)} {unit} per step predicted, {escape(found)}. "
        f"Reason: {escape(reason(best, best))}.</p></div>"
        f'<ul class="tiles">{items}</ul>{notes}'
    )


def _choice(plan: Plan) -> str:
    words = layout_words(plan)
    again = "" if plan.recompute is Recompute.NONE else f", {plan.recompute} recomputation"
    return f"{words[0].upper()}{words[1:]}, microbatches of {plan.microbatch_size}{again}"


def _regret_text(report: DemoReport) -> str:
    validation, names = report.validation, report.run_names()
    if validation.chosen == validation.best:
        return f"the plan predicted fastest, {names[validation.chosen]}, is the fastest measured"
    noise = max(validation.of(validation.chosen).noise, validation.of(validation.best).noise)
    return (
        f"{names[validation.chosen]}, predicted fastest, against {names[validation.best]}, measured fastest; "
        f"steps vary by {percent(noise)}"
    )


def _comparison(report: DemoReport, figures: _Figures) -> _Section:
    columns = validation_page_columns(report.validation, report.run_names())
    body = (
        f"{figures.html('predicted-measured', 'narrow')}"
        f"{html_table(columns, strong=(0,))}<p class=legend>{escape(validation_caption(report.validation))}</p>"
        f"{_alone(report)}{_agreement(report)}"
    )
    return _Section("comparison", "Predicted against measured", body)


def _alone(report: DemoReport) -> str:
    """What one process does alone, where it was run."""
    if report.reference is None:
        return ""
    measured = report.reference.median_step_s
    scale, unit = time_scale(measured)
    best = report.validation.of(report.validation.best)
    text = f"One process alone takes {significant(measured / scale)} {unit} per step"
    if report.reference_estimate is not None:
        predicted = report.reference_estimate.step_s
        error = signed_percent(predicted / measured - 1)
        text += f" ({significant(predicted / scale)} {unit} predicted, {error} error)"
    ratio = significant(measured / best.measured_step_s)
    return f"<p>{escape(text)}; the fastest plan is {ratio} times as fast.</p>"


def _agreement(report: DemoReport) -> str:
    """Whether the plans called the collectives that were predicted for them."""
    checks = [c.collectives for c in report.validation.comparisons if c.collectives is not None]
    if not checks:
        return ""
    right = sum(check.agree for check in checks)
    return (
        f"<p>Collectives were counted on every rank: {right} of {len(checks)} plans called exactly what was predicted, "
        "by kind, group, number and bytes.</p>"
        + _folded("Collectives that differ", difference_columns(report.validation, report.run_names()))
    )


def _ranking(report: DemoReport) -> _Section:
    best, device = report.result.best, report.device_word
    body = (
        f"<p>{escape(search_line(report.result))}.</p>"
        f"{html_table(ranked_columns(best, report.names(), report.validation, device=device), strong=(0,))}"
        f"<p class=legend>{escape(plans_caption(best[0], device=device))} "
        "measured: median, where the plan was run.</p>"
    )
    return _Section("plans", "Ranked plans and why", body)


def _time(report: DemoReport, figures: _Figures) -> _Section:
    table = _totalled(breakdown_columns(report.recommended))
    body = f"{figures.html('step-breakdown', 'middle')}<h3>The recommended plan in numbers</h3>{table}"
    return _Section("time", "Where the time goes", body)


def _memory(report: DemoReport, figures: _Figures) -> _Section:
    body = (
        f"{figures.html('memory', 'middle')}<div class=columns>"
        f"<div><h3>The recommended plan</h3>{_totalled(memory_columns(report.recommended))}</div>"
        f"<div><h3>Peak by pipeline rank</h3>{html_table(stage_columns(report.validation, report.run_names()))}</div>"
        "</div>"
    )
    return _Section("memory", "Memory", body)


def _timeline(figures: _Figures) -> _Section:
    return _Section("timeline", "One step over time", figures.html("timeline"))


def _losses(report: DemoReport, figures: _Figures) -> _Section:
    body = figures.html("losses", "middle")
    if body:
        body += _folded("Losses in numbers", loss_columns(report.measurements, report.run_names(), report.reference))
    return _Section("losses", "Losses", body)


def _machine(report: DemoReport, figures: _Figures) -> _Section:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report.machine.items())
    body = f"<dl>{rows}</dl>"
    profile = report.profile
    if profile is not None:
        body += f"<p>{escape(profile_line(profile))}.</p>"
        body += figures.html("collectives", "middle") + figures.html("matmul", "narrow")
        if profile.fits:
            body += f"<h3>Fits</h3>{html_table(profile_columns(profile))}"
    return _Section("machine", "The machine", body)


def _provenance(report: DemoReport) -> _Section:
    first = report.measurements[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    steps = len(first.step_s)
    memory = "torch.cuda.max_memory_allocated" if first.backend == "nccl" else "bytes of live tensors at their highest"
    ways = (
        ("predicted time", "operations of the model's graph priced by the fitted device, collectives by measured "
         "curves or links, put together by the pipeline schedule; nothing is taken from the runs below"),
        ("measured time", f"wall time of a whole step on the slowest rank, median of {steps} steps after warm-up"),
        ("measured memory", f"{memory}, each rank by itself, in a step that is not timed"),
        ("ran", f"{first.date[:10]} on {first.device}, {first.backend}; {versions}"),
    )  # fmt: skip
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in ways)
    assumptions = _listing("Sources of every constant", report.recommended.assumptions)
    counted = _folded("Collectives counted on rank 0", collective_columns(report.measurements, report.run_names()))
    wire = _folded("Bytes on the wire per step", traffic_columns(report.measurements, report.run_names()))
    body = f"<dl>{rows}</dl>{assumptions}{counted}{wire}<p>This command makes the page again:</p>"
    body += f"<pre><code>{escape(report.command)}</code></pre>"
    return _Section("provenance", "How each number came about", body)


def _totalled(columns: Sequence[Column]) -> str:
    """A table whose last row is the total."""
    return html_table(columns, strong=(len(columns[0].cells) - 1,))


def _listing(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{escape(title)}</summary><ul>{items}</ul></details>" if lines else ""


def _folded(title: str, columns: Sequence[Column]) -> str:
    """A table that is folded away; nothing where it has no columns."""
    return f"<details><summary>{escape(title)}</summary>{html_table(columns)}</details>" if columns else ""
