"""Columns of the page's tables that join predictions with runs: ranking, validation, stages, losses, collectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autopar.estimate import Estimate
from autopar.measurement import Measurement
from autopar.report.columns import Column
from autopar.report.numbers import signed_percent, significant
from autopar.report.style import memory_scale, time_scale
from autopar.report.tables import plan_columns, reason_columns, validation_columns
from autopar.validate import Validation
from costmodels.units import MIB

DEGREES = ("tp", "pp", "vp", "cp", "dp", "sharding")
"""Columns that a plan's short name makes superfluous."""


def ranked_columns(
    estimates: Sequence[Estimate], names: Mapping[str, str], validation: Validation | None, *, device: str
) -> list[Column]:
    """Ranked plans by name and reason with their numbers, the measured time where there is one, and the slug."""
    rank, *columns = [c for c in plan_columns(estimates, device=device) if c.header not in DEGREES]
    if validation is not None:
        scale, unit = time_scale(min(e.step_s for e in estimates))
        measured = {c.slug: significant(c.measured_step_s / scale) for c in validation.comparisons}
        step = next(i for i, column in enumerate(columns) if column.header.startswith("step "))
        cells = tuple(measured.get(e.plan.slug, "") for e in estimates)
        if any(cells):
            columns.insert(step + 1, Column(header=f"measured {unit}", cells=cells))
    _, slugs, why = reason_columns(estimates)
    named = tuple(names[slug] for slug in slugs.cells)
    plan = Column(header="plan and reason", cells=named, text=True, details=why.cells)
    return [rank, plan, *columns, slugs]


def validation_page_columns(validation: Validation, names: Mapping[str, str]) -> list[Column]:
    """The validation table with short names, slugs below them; the page has a sentence where all collectives agree."""
    slugs, *rest = validation_columns(validation)
    checks = [c.collectives for c in validation.comparisons]
    if all(check is not None and check.agree for check in checks):
        rest = [column for column in rest if column.header != "collectives"]
    named = tuple(names[slug] for slug in slugs.cells)
    return [Column(header="plan", cells=named, text=True, details=slugs.cells), *rest]


def stage_columns(validation: Validation, names: Mapping[str, str]) -> list[Column]:
    """Peak of every pipeline rank, predicted and measured, of plans with a pipeline; all plans where none has one."""
    piped = [c for c in validation.comparisons if len(c.stages) > 1] or list(validation.comparisons)
    rows = [(c, stage) for c in piped for stage in c.stages]
    scale, unit = memory_scale(max(stage.measured_bytes for _, stage in rows))
    return [
        Column(header="plan", cells=tuple(names[c.slug] for c, _ in rows), text=True),
        Column(header="pp rank", cells=tuple(str(stage.pp) for _, stage in rows)),
        Column(header=f"predicted {unit}", cells=tuple(f"{stage.predicted_bytes / scale:.1f}" for _, stage in rows)),
        Column(header="measured", cells=tuple(f"{stage.measured_bytes / scale:.1f}" for _, stage in rows)),
        Column(header="error", cells=tuple(signed_percent(stage.error) for _, stage in rows)),
    ]


def loss_columns(
    measurements: Sequence[Measurement], names: Mapping[str, str], reference: Measurement | None = None
) -> list[Column]:
    """First and last loss of every run, and how far it goes from the reference, or from the first run without one."""
    runs = [m for m in (*([reference] if reference else []), *measurements) if m.losses]
    if not runs:
        return []
    steps = min(len(m.losses) for m in runs)
    apart = [f"{loss_distance([m], runs[0]) or 0:.1e}" for m in runs]
    return [
        Column(header="plan", cells=tuple(names[m.slug] for m in runs), text=True),
        Column(header="steps", cells=tuple(str(len(m.losses)) for m in runs)),
        Column(header="first loss", cells=tuple(f"{m.losses[0]:.6f}" for m in runs)),
        Column(header=f"loss of step {steps}", cells=tuple(f"{m.losses[steps - 1]:.6f}" for m in runs)),
        Column(header=f"farthest from {names[runs[0].slug]}", cells=tuple(apart)),
    ]


def loss_distance(measurements: Sequence[Measurement], reference: Measurement | None = None) -> float | None:
    """Largest distance of any run's loss from the reference's at any step that both have.

    Without a reference from the first run's. None where there are no two runs with losses.
    """
    runs = [m for m in measurements if m.losses]
    base = reference or (runs.pop(0) if len(runs) > 1 else None)
    if base is None or not base.losses or not runs:
        return None
    return max(abs(a - b) for m in runs for a, b in zip(m.losses, base.losses, strict=False))


def difference_columns(validation: Validation, names: Mapping[str, str]) -> list[Column]:
    """Collectives that were not called as predicted; no columns where all were."""
    rows = [(c, d) for c in validation.comparisons if c.collectives is not None for d in c.collectives.differences]
    if not rows:
        return []
    return [
        Column(header="plan", cells=tuple(names[c.slug] for c, _ in rows), text=True),
        Column(header="rank", cells=tuple(str(d.rank) for _, d in rows)),
        Column(header="collective", cells=tuple(d.kind for _, d in rows), text=True),
        Column(header="axis", cells=tuple(d.axis for _, d in rows), text=True),
        Column(header="ranks", cells=tuple(str(d.group_size) for _, d in rows)),
        Column(header="calls predicted", cells=tuple(str(d.predicted_count) for _, d in rows)),
        Column(header="counted", cells=tuple(str(d.counted_count) for _, d in rows)),
        Column(header="bytes predicted", cells=tuple(str(d.predicted_bytes) for _, d in rows)),
        Column(header="counted", cells=tuple(str(d.counted_bytes) for _, d in rows)),
    ]


def collective_columns(measurements: Sequence[Measurement], names: Mapping[str, str]) -> list[Column]:
    """What the first rank of every run called in one step; no columns where nothing was counted."""
    rows = [(m, c) for m in measurements for c in min(m.ranks, key=lambda rank: rank.rank).collectives]
    if not rows:
        return []
    return [
        Column(header="plan", cells=tuple(names[m.slug] for m, _ in rows), text=True),
        Column(header="collective", cells=tuple(c.kind for _, c in rows), text=True),
        Column(header="axis", cells=tuple(c.axis for _, c in rows), text=True),
        Column(header="ranks", cells=tuple(str(c.group_size) for _, c in rows)),
        Column(header="calls", cells=tuple(str(c.count) for _, c in rows)),
        Column(header="MiB", cells=tuple(f"{c.num_bytes / MIB:.2f}" for _, c in rows)),
    ]


def traffic_columns(measurements: Sequence[Measurement], names: Mapping[str, str]) -> list[Column]:
    """Bytes that every node's interface saw in a step; no columns where interfaces were not counted."""
    rows = [(m, t) for m in measurements for t in m.traffic]
    if not rows:
        return []
    return [
        Column(header="plan", cells=tuple(names[m.slug] for m, _ in rows), text=True),
        Column(header="node", cells=tuple(str(t.node) for _, t in rows)),
        Column(header="sent MiB", cells=tuple(f"{t.sent_bytes / MIB:.2f}" for _, t in rows)),
        Column(header="received MiB", cells=tuple(f"{t.received_bytes / MIB:.2f}" for _, t in rows)),
    ]
