"""The figures of a report, each with its file name, a caption, and words for readers who cannot see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autopar.report import plots
from autopar.report.content import DemoReport
from autopar.report.events import measured_events, predicted_events, representatives
from autopar.report.numbers import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A figure; ``name`` is its file's stem and unique."""

    name: str
    figure: Figure
    caption: str
    description: str


def draw(report: DemoReport) -> dict[str, Drawing]:
    """All figures that the report has data for, by name."""
    names, validation = report.run_names(), report.validation
    found = [
        Drawing(
            name="predicted-measured",
            figure=plots.predicted_measured(validation, names),
            caption="Each point is a plan. On the line a prediction is perfect; the bands are 10 and 20 percent around "
            "it. Whiskers are the quartiles of the measured steps. The star is the plan predicted fastest.",
            description="Scatter plot of predicted against measured step time; median error "
            f"{percent(validation.time_error_median)}",
        ),
        Drawing(
            name="step-breakdown",
            figure=plots.step_breakdown(report.estimates, names, validation),
            caption="Bars are predictions, split by what the time is spent on. The line across a bar is the median of "
            "the measured steps with its quartiles; the number is the prediction's error.",
            description="Stacked bars of the predicted parts of a step, one per plan, with the measured step time",
        ),
        Drawing(
            name="memory",
            figure=plots.memory_items(report.estimates, names, validation),
            caption="What the fullest rank holds at the peak of a step, predicted by item, and the measured peak.",
            description="Stacked bars of predicted memory items, one per plan, with the measured peak",
        ),
        _timeline(report),
    ]
    if any(m.losses for m in report.measurements):
        found.append(
            Drawing(
                name="losses",
                figure=plots.loss_curves(report.measurements, names, report.reference),
                caption="A plan decides where the work is done, not what is computed: all curves lie on each other.",
                description="Loss over steps of every plan, and the largest difference between plans at each step",
            )
        )
    profile = report.profile
    if profile is not None and profile.collectives:
        found.append(
            Drawing(
                name="collectives",
                figure=plots.collective_curves(profile, report.setting.cluster, report.setting.stack.algorithms),
                caption="Time of a collective over the size of its tensor, both axes logarithmic.",
                description="Measured time of collectives over message size, with the curves that the planner uses",
            )
        )
    if profile is not None and any(point.kind == "matmul" for point in profile.compute):
        found.append(
            Drawing(
                name="matmul",
                figure=plots.matmul_efficiency(profile, report.setting.cluster),
                caption="Share of the measured peak that products of many shapes reach, and what the fit says.",
                description="Scatter plot of fitted against measured efficiency of matrix products",
            )
        )
    return {drawing.name: drawing for drawing in found}


def _timeline(report: DemoReport) -> Drawing:
    slug = report.showcase()
    estimate, measurement = report.estimate_of(slug), report.measurement_of(slug)
    measured = measured_events(measurement, representatives(estimate.plan))
    name = report.run_names()[slug]
    return Drawing(
        name="timeline",
        figure=plots.step_timeline(
            name, predicted_events(report.setting, estimate), measured, median_s=measurement.median_step_s
        ),
        caption=f"Forward and backward passes of every microbatch under {name}, one rank per pipeline place. Thin bars "
        "are communication. Traces of all plans and ranks are in traces/, for ui.perfetto.dev.",
        description=f"Timeline of one step of {name}, predicted above measured",
    )
