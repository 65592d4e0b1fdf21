"""Tables of plans, of one plan, of a validation and of a profile: columns for any medium, and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autopar.estimate import Estimate
from autopar.report.columns import Column, terminal_table
from autopar.report.names import MEMORY_LABELS, TERM_LABELS, recompute_name, sharding_name
from autopar.report.numbers import parts_of, percent, signed_percent, significant
from autopar.report.style import memory_scale, time_scale
from autopar.search.exhaustive import SearchResult
from autopar.search.reason import reason
from autopar.validate import Validation
from costmodels.profiles import MachineProfile
from costmodels.units import GIB, TFLOPS, format_count

if TYPE_CHECKING:
    from rich.console import RenderableType


def plan_columns(estimates: Sequence[Estimate], *, device: str = "GPU") -> list[Column]:
    """Columns of ranked plans, best first; the reason compares each with the first.

    ``device`` is what a rank runs on, for the headers.
    """
    scale, unit = time_scale(min(e.step_s for e in estimates))
    plans = [e.plan for e in estimates]

    def number(header: str, cells: Sequence[str], drop: int = 0) -> Column:
        return Column(header=header, cells=tuple(cells), drop=drop)

    return [
        number("#", [str(i) for i in range(1, len(estimates) + 1)]),
        number("tp", [str(p.layout.tp) for p in plans]),
        number("pp", [str(p.layout.pp) for p in plans]),
        number("vp", [str(p.layout.vp) for p in plans], 7),
        number("cp", [str(p.layout.cp) for p in plans], 7),
        *([number("ep", [str(p.layout.ep) for p in plans])] if any(p.layout.ep > 1 for p in plans) else []),
        number("dp", [str(p.layout.dp) for p in plans]),
        Column(header="sharding", cells=tuple(sharding_name(p) for p in plans), text=True),
        number("mb", [str(p.microbatch_size) for p in plans]),
        Column(header="recompute", cells=tuple(recompute_name(p) for p in plans), text=True, drop=6),
        number(f"step {unit}", [significant(e.step_s / scale) for e in estimates]),
        number(f"tok/s/{device}", [significant(e.tokens_per_s_per_gpu) for e in estimates], 2),
        number(f"TF/s/{device}", [significant(e.model_flops_per_s_per_gpu / TFLOPS) for e in estimates], 5),
        number("MFU", [percent(e.mfu) for e in estimates], 1),
        number("GiB", [f"{e.memory_gib:.2f}" for e in estimates]),
        number("bubble", [percent(e.bubble_s / e.step_s) for e in estimates], 3),
        number("comm", [percent(e.exposed_communication_s / e.step_s) for e in estimates], 3),
    ]


def reason_columns(estimates: Sequence[Estimate]) -> list[Column]:
    """Columns with each plan's slug and why it ranks where it does."""
    return [
        Column(header="#", cells=tuple(str(i) for i in range(1, len(estimates) + 1))),
        Column(header="plan", cells=tuple(e.plan.slug for e in estimates), text=True, code=True),
        Column(header="why", cells=tuple(reason(e, estimates[0]) for e in estimates), text=True, wraps=True),
    ]


def memory_item_columns(estimates: Sequence[Estimate]) -> list[Column]:
    """Columns with the items of each plan's peak on its fullest rank; items that no plan has are left out."""
    scale, unit = memory_scale(max(e.memory_bytes for e in estimates))
    items = [item for item in MEMORY_LABELS if any(e.memory[item] for e in estimates)]
    return [
        Column(header="#", cells=tuple(str(i) for i in range(1, len(estimates) + 1))),
        *(
            Column(header=MEMORY_LABELS[item], cells=tuple(f"{e.memory[item] / scale:.2f}" for e in estimates))
            for item in items
        ),
        Column(header=f"peak {unit}", cells=tuple(f"{e.memory_bytes / scale:.2f}" for e in estimates)),
    ]


def plans_caption(estimate: Estimate, *, device: str = "GPU") -> str:
    """What the columns of a plans table mean."""
    return (
        f"mb: sequences per microbatch. tok: tokens. MFU and TF/s (TFLOP/s) count {estimate.flops_convention}; "
        f"the peak is {significant(estimate.peak_flops / TFLOPS)} TFLOP/s per {device}, dense. "
        "GiB: peak of the fullest rank. "
        "bubble, comm: share of the step spent waiting in the pipeline, and in communication that compute does "
        "not hide."
    )


def search_line(result: SearchResult) -> str:
    """One sentence on what the search looked at."""
    words = {"slower": "too slow by a bound", "memory": "too large"}
    refused = ", ".join(f"{number:,} {words.get(why, why)}" for why, number in result.rejected.items())
    tail = f"; ruled out: {refused}" if refused else ""
    return (
        f"{result.considered:,} plans considered, {result.priced:,} priced one by one, {result.feasible:,} of these fit"
        f"{tail}; searched in {result.seconds:.2f} s"
    )


def plans_table(
    estimates: Sequence[Estimate], *, width: int = 120, device: str = "GPU", title: str = "Plans"
) -> RenderableType:
    """Ranked plans with their numbers, then their names and reasons. Nothing is wider than ``width`` characters."""
    from rich.console import Group
    from rich.text import Text

    numbers = terminal_table(plan_columns(estimates, device=device), width, title=title, strong=(0,))
    items = terminal_table(memory_item_columns(estimates), width, strong=(0,))
    reasons = terminal_table(reason_columns(estimates), width, strong=(0,))
    return Group(
        numbers, Text(), items, Text(), reasons, Text(), Text(plans_caption(estimates[0], device=device), style="dim")
    )


def _parts_columns(
    parts: Mapping[str, float], labels: Mapping[str, str], header: str, scale: float, unit: str, decimals: int
) -> list[Column]:
    whole = sum(parts.values())
    shown = [name for name, value in parts.items() if value]
    amounts = parts_of([parts[name] / scale for name in shown], whole / scale, decimals)
    shares = parts_of([100 * parts[name] / whole for name in shown], 100.0, 1)
    return [
        Column(header=header, cells=(*(labels[name] for name in shown), "total"), text=True),
        Column(header=unit, cells=(*amounts, f"{whole / scale:.{decimals}f}")),
        Column(header="%", cells=(*shares, "100.0")),
    ]


def breakdown_columns(estimate: Estimate) -> list[Column]:
    """Parts of the step that take time; seconds and percents as printed add up to the total."""
    scale, unit = time_scale(estimate.step_s)
    decimals = max(0, 4 - len(str(int(estimate.step_s / scale))))
    return _parts_columns(estimate.breakdown, TERM_LABELS, "part of the step", scale, unit, decimals)


def memory_columns(estimate: Estimate) -> list[Column]:
    """Items of the fullest rank's peak, which add up to the total, and between what they lie four times of five."""
    scale, unit = memory_scale(estimate.memory_bytes)
    bands = estimate.memory_bands
    shown = [*(bands[name] for name, size in estimate.memory.items() if size), bands["total"]]
    return [
        *_parts_columns(estimate.memory, MEMORY_LABELS, "memory of the fullest rank", scale, unit, 2),
        Column(header="from", cells=tuple(f"{band.low / scale:.2f}" for band in shown)),
        Column(header="to", cells=tuple(f"{band.high / scale:.2f}" for band in shown)),
    ]


def rank_memory_columns(estimate: Estimate) -> list[Column]:
    """Peak of every pipeline rank with its band, against what a device offers."""
    peaks, bands = estimate.memory_per_rank, [bands["total"] for bands in estimate.memory_bands_per_rank]
    scale, unit = memory_scale(max(peaks))
    return [
        Column(header="pipeline rank", cells=tuple(str(rank) for rank in range(len(peaks)))),
        Column(header=unit, cells=tuple(f"{peak / scale:.2f}" for peak in peaks)),
        Column(header="from", cells=tuple(f"{band.low / scale:.2f}" for band in bands)),
        Column(header="to", cells=tuple(f"{band.high / scale:.2f}" for band in bands)),
        Column(header="of the device", cells=tuple(percent(peak / estimate.memory_limit) for peak in peaks)),
    ]


def plan_detail(estimate: Estimate, *, width: int = 120, device: str = "GPU") -> RenderableType:
    """One plan: headline, where its time and memory go, peaks by rank, and what the numbers rest on."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    scale, unit = time_scale(estimate.step_s)
    band = estimate.step_band
    headline = Text.assemble(
        (estimate.plan.slug, "bold"),
        f"\n{significant(estimate.step_s / scale)} {unit} per step "
        f"({significant(band.low / scale)} to {significant(band.high / scale)} in four of five runs like it), "
        f"{significant(estimate.tokens_per_s_per_gpu)} tokens/s/{device}, "
        f"{significant(estimate.model_flops_per_s_per_gpu / TFLOPS)} TFLOP/s/{device}, MFU {percent(estimate.mfu)}, "
        f"{estimate.memory_gib:.2f} of {estimate.memory_limit / GIB:.1f} GiB\n",
    )
    tables = [
        terminal_table(columns, width, strong=(len(columns[0].cells) - 1,) if total else ())
        for columns, total in (
            (breakdown_columns(estimate), True),
            (memory_columns(estimate), True),
            (rank_memory_columns(estimate), False),
        )
    ]
    spaced = [part for table in tables for part in (table, Text())]
    caption = Text(f"{plans_caption(estimate, device=device)} Range: {estimate.step_rule.origin}.\n", style="dim")
    assumptions = [Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in estimate.assumptions]
    return Group(headline, *spaced, caption, Text("Where the numbers come from", style="bold"), *assumptions)


def validation_columns(validation: Validation) -> list[Column]:
    """Predicted and measured, plan by plan, the fastest predicted first."""
    rows = validation.comparisons
    scale, unit = time_scale(min(c.measured_step_s for c in rows))
    size, size_unit = memory_scale(max(c.measured_memory_bytes for c in rows))
    by_measured = sorted(rows, key=lambda c: c.measured_step_s)
    columns = [
        Column(header="plan", cells=tuple(c.slug for c in rows), text=True, code=True),
        Column(header=f"predicted {unit}", cells=tuple(significant(c.predicted_step_s / scale) for c in rows)),
        Column(header=f"measured {unit}", cells=tuple(significant(c.measured_step_s / scale) for c in rows)),
        Column(header="error", cells=tuple(signed_percent(c.error) for c in rows)),
        Column(header="noise", cells=tuple(percent(c.noise) for c in rows), drop=3),
        Column(header="order", cells=tuple(str(by_measured.index(c) + 1) for c in rows), drop=2),
        Column(
            header=f"memory {size_unit}", cells=tuple(f"{c.predicted_memory_bytes / size:.1f}" for c in rows), drop=4
        ),
        Column(
            header=f"measured {size_unit}", cells=tuple(f"{c.measured_memory_bytes / size:.1f}" for c in rows), drop=4
        ),
        Column(header="memory error", cells=tuple(signed_percent(c.memory_error) for c in rows), drop=1),
    ]
    if validation.at_speed is not None:
        columns[4:4] = [
            Column(header="machine", cells=tuple(f"{c.slowness or 1:.2f}" for c in rows), drop=3),
            Column(header="error then", cells=tuple(signed_percent(c.at_speed_error or 0.0) for c in rows), drop=2),
        ]
    if any(c.collectives is not None for c in rows):
        cells = tuple(
            "not checked" if c.collectives is None
            else "as predicted" if c.collectives.agree
            else f"{len(c.collectives.differences)} of {c.collectives.checked} differ"
            for c in rows
        )  # fmt: skip
        columns.append(Column(header="collectives", cells=cells, text=True, drop=5))
    return columns


VALIDATION_CAPTION = (
    "error: predicted / measured - 1. measured: median of the timed steps; noise: distance of their quartiles over the "
    "median. order: place by measured time. Memory: peak of the rank that holds most."
)
SPEED_CAPTION = (
    " machine: seconds of the same small piece of work between the steps of this run, over those during the profile; "
    "error then: of the prediction for a machine of that speed."
)


def validation_caption(validation: Validation) -> str:
    """What the columns mean."""
    return VALIDATION_CAPTION + (SPEED_CAPTION if validation.at_speed is not None else "")


def verdict(validation: Validation) -> str:
    """The figures of merit in one line."""
    checks = [c.collectives for c in validation.comparisons if c.collectives is not None]
    counted = f"; collectives as predicted on {sum(c.agree for c in checks)} of {len(checks)} plans" if checks else ""
    tau = "-" if validation.kendall_tau is None else f"{validation.kendall_tau:.2f}"
    return (
        f"step time: median error {percent(validation.time_error_median)}, "
        f"worst {percent(validation.time_error_worst)}; "
        f"memory: median error {percent(validation.memory_error_median)}, "
        f"worst {percent(validation.memory_error_worst)}; "
        f"Kendall tau {tau}; "
        f"the plan predicted fastest is {percent(validation.regret)} slower than the fastest measured{counted}"
    )


def speed_note(validation: Validation) -> str:
    """What changes once the machine's speed during each run is known; empty where it is not."""
    found = validation.at_speed
    if found is None:
        return ""
    tau = "-" if found.kendall_tau is None else f"{found.kendall_tau:.2f}"
    return (
        f"During the runs the machine took {found.fastest:.2f} to {found.slowest:.2f} times as long as during the "
        f"profile; predicted for the speed of each run, the step time has a median error of "
        f"{percent(found.time_error_median)}, worst {percent(found.time_error_worst)}, Kendall tau {tau}."
    )


def validation_table(validation: Validation, *, width: int = 120) -> RenderableType:
    """Predicted against measured, with the figures of merit below."""
    from rich.console import Group
    from rich.text import Text

    table = terminal_table(validation_columns(validation), width, title="Predicted against measured", strong=(0,))
    said = [Text(line) for line in (verdict(validation), speed_note(validation)) if line]
    return Group(table, Text(), *said, Text(validation_caption(validation), style="dim"))


def profile_columns(profile: MachineProfile) -> list[Column]:
    """What was fitted to the measured points, and how well."""
    fits = profile.fits
    return [
        Column(header="fitted", cells=tuple(fit.name for fit in fits), text=True),
        Column(header="points", cells=tuple(str(fit.num_points) for fit in fits)),
        Column(header="median error", cells=tuple(percent(fit.median_error) for fit in fits)),
        Column(header="worst", cells=tuple(percent(fit.worst_error) for fit in fits)),
        Column(
            header="constants",
            cells=tuple(
                ", ".join(f"{name} {constant(value)}" for name, value in fit.constants.items()) for fit in fits
            ),
            text=True,
            wraps=True,
        ),
    ]


def constant(value: float) -> str:
    """A fitted constant, whatever its size."""
    return (
        f"{value:.2e}"
        if value and abs(value) < 1e-3
        else significant(value)
        if abs(value) < 1e4
        else (format_count(value))
    )


def profile_line(profile: MachineProfile) -> str:
    """What was measured, in one sentence."""
    link = f", links held to {profile.link_rate * 8 / 1e6:.0f} Mbit/s" if profile.link_rate else ""
    return (
        f"{profile.device_name}, {profile.ranks} ranks on {profile.cores} cores{link}, {profile.backend}, "
        f"{profile.precision}: {significant(profile.peaks['flops'] / 1e9)} GFLOP/s and "
        f"{profile.peaks['memory_bandwidth'] / 1e9:.1f} GB/s at best; {len(profile.compute)} compute points, "
        f"{len(profile.collectives)} collective points"
    )


def profile_table(profile: MachineProfile, *, width: int = 120) -> RenderableType:
    """Summary of a profile."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(profile_line(profile))]
    if profile.fits:
        parts += [Text(), terminal_table(profile_columns(profile), width, title="Profile")]
    return Group(*parts)
