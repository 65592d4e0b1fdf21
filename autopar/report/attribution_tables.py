"""Where predictions of measured runs were wrong, as tables: by item of the step, of memory, and by collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autopar.report.columns import Column, terminal_table
from autopar.report.numbers import signed_percent, significant
from autopar.validate.attribution import Attribution, Item, verdict
from autopar.validate.calibration import Calibration
from costmodels.units import MIB

if TYPE_CHECKING:
    from rich.console import RenderableType

MILLI = 1e3


def time_columns(found: Attribution) -> list[Column]:
    """Items of the step with what they add to its error, and their sum."""
    whole = Item(name="step", predicted=found.predicted_step_s, measured=found.measured_step_s)
    return _item_columns((*found.named, whole), MILLI, "ms", found.measured_step_s, "of the step's error")


def memory_columns(found: Attribution) -> list[Column]:
    """Items of the fullest rank's peak with what they add to its error, and their sum."""
    whole = Item(name="peak", predicted=found.predicted_bytes, measured=found.measured_bytes)
    return _item_columns((*found.memory, whole), 1 / MIB, "MiB", found.measured_bytes, "of the peak's error")


def _item_columns(items: Sequence[Item], scale: float, unit: str, whole: float, header: str) -> list[Column]:
    return [
        Column(header="item", cells=tuple(item.name for item in items), text=True),
        Column(header=f"predicted {unit}", cells=tuple(significant(item.predicted * scale) for item in items)),
        Column(header=f"measured {unit}", cells=tuple(significant(item.measured * scale) for item in items)),
        Column(header=header, cells=tuple(signed_percent(item.difference / whole) for item in items)),
    ]


def collective_columns(found: Attribution) -> list[Column]:
    """Calls of one rank: how many and how large, how long they were to take and took, and what compute hid."""
    rows = found.collectives

    def both(predicted: int, counted: int) -> str:
        return str(counted) if predicted == counted else f"{counted} (not {predicted})"

    def measured(value: str) -> tuple[str, ...]:
        return tuple(significant(MILLI * getattr(row.measured, value)) if row.measured else "-" for row in rows)

    return [
        Column(header="collective", cells=tuple(f"{row.kind} on {row.axis}" for row in rows), text=True),
        Column(header="ranks", cells=tuple(str(row.group_size) for row in rows), drop=2),
        Column(header="calls", cells=tuple(both(row.predicted_count, row.counted) for row in rows)),
        Column(header="bytes", cells=tuple(both(row.predicted_bytes, row.counted_bytes) for row in rows), drop=3),
        Column(header="predicted ms", cells=tuple(significant(MILLI * row.predicted_s) for row in rows)),
        Column(header="moving ms", cells=measured("moving")),
        Column(header="waiting ms", cells=measured("waiting"), drop=1),
        Column(header="exposed ms", cells=measured("exposed")),
    ]


def attribution_tables(found: Attribution, *, width: int) -> tuple[RenderableType, ...]:
    """One run: the verdict, then its step, its collectives and its memory."""
    place = f"rank {found.rank}, which was busiest"
    tables: list[RenderableType] = [
        f"{found.slug}: {verdict(found)}",
        "",
        terminal_table(time_columns(found), width, title=f"Step of {place}"),
    ]
    if found.collectives:
        tables += ["", terminal_table(collective_columns(found), width, title=f"Collectives of {place}")]
    return (*tables, "", terminal_table(memory_columns(found), width, title="Memory of the fullest rank"), "")


def runs_columns(runs: Sequence[Attribution]) -> list[Column]:
    """Several runs, a line each."""
    return [
        Column(header="plan", cells=tuple(run.slug for run in runs), text=True, code=True),
        Column(header="predicted ms", cells=tuple(significant(MILLI * run.predicted_step_s) for run in runs), drop=1),
        Column(header="measured ms", cells=tuple(significant(MILLI * run.measured_step_s) for run in runs), drop=1),
        Column(header="error", cells=tuple(signed_percent(run.error) for run in runs)),
        Column(header="memory", cells=tuple(signed_percent(run.memory_error) for run in runs), drop=2),
        Column(header="where", cells=tuple(verdict(run) for run in runs), text=True, wraps=True),
    ]


def runs_table(runs: Sequence[Attribution], *, width: int) -> RenderableType:
    """Several runs, a line each, with their verdicts."""
    return terminal_table(runs_columns(runs), width, title="Where predictions were wrong")


def correction_columns(found: Calibration) -> list[Column]:
    """Factors of the parts of a profile."""
    rows = found.corrections
    return [
        Column(header="part of the profile", cells=tuple(row.name for row in rows), text=True),
        Column(header="factor", cells=tuple(f"{row.factor:.3f}" for row in rows)),
        Column(header="items", cells=tuple(str(row.num_points) for row in rows)),
        Column(header="runs", cells=tuple(str(len(row.measurements)) for row in rows)),
    ]


def calibrated_columns(found: Calibration) -> list[Column]:
    """Errors of every run before and after, and where the run itself was left out; the mean of their sizes below."""
    runs = found.runs

    def errors(name: str) -> tuple[str, ...]:
        shares = [(getattr(run, name) or float("nan")) / run.measured_s - 1 for run in runs]
        mean = sum(map(abs, shares)) / len(shares)
        return (*(signed_percent(share) if share == share else "-" for share in shares), signed_size(mean))

    return [
        Column(header="plan", cells=(*(run.slug for run in runs), "mean size"), text=True, code=True),
        Column(header="measured ms", cells=(*(significant(MILLI * run.measured_s) for run in runs), ""), drop=1),
        Column(header="before", cells=errors("before_s")),
        Column(header="after", cells=errors("after_s")),
        Column(header="held out", cells=errors("held_out_s")),
    ]


def signed_size(share: float) -> str:
    """A mean of sizes, which has no sign; a dash where there is none."""
    return f"{share:.1%}" if share == share else "-"


def calibration_tables(found: Calibration, *, width: int) -> tuple[RenderableType, ...]:
    """What was corrected and what that does to the runs."""
    return (
        terminal_table(correction_columns(found), width, title="Corrections of the profile"),
        "",
        terminal_table(
            calibrated_columns(found), width, title="Error of the step, predicted / measured - 1",
            caption="held out: corrected by the other runs alone",
        ),
    )  # fmt: skip
