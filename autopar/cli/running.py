"""``autopar profile``, ``demo`` and ``gpu``: commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopar.cli.common import Device, app, progress, say, show, terminal_width
from autopar.workload import Precision


@app.command()
def profile(
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("profile.json"),
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; 4 on CPUs, every device on CUDA.")] = None,
    device: Device = "auto",
    precision: Annotated[Precision | None, typer.Option(help="fp32 on CPUs, bf16 on CUDA.")] = None,
    quick: Annotated[bool, typer.Option(help="Coarser, in a third of the time.")] = False,
) -> None:
    """Measure this machine: operations and collectives over shapes and sizes; fit them; keep points and fits."""
    from autopar.demo import default_ranks, resolve_device
    from autopar.report.tables import profile_table
    from autopar.runtime.launch.nodes import local_node
    from autopar.runtime.profile.machine import profile_machine

    device = resolve_device(device)
    kind = precision or (Precision.FP32 if device == "cpu" else Precision.BF16)
    with progress() as on_message:
        measured = profile_machine(
            ranks=ranks or default_ranks(device), nodes=(local_node(),), device=device, precision=kind.value, out=out,
            quick=quick, on_message=on_message,
        )  # fmt: skip
    show(profile_table(measured, width=terminal_width()))
    say(f"wrote {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the report.")] = Path("reports/demo"),
    emulate: Annotated[
        str | None, typer.Option(help="NODESxRATE: run on an emulated cluster, such as 4x200mbit (needs root).")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes; 4 on CPUs, every device on CUDA.")] = None,
    device: Device = "auto",
    layouts: Annotated[int, typer.Option(min=2, help="Layouts to run beside a single process.")] = 10,
    plan: Annotated[list[str] | None, typer.Option(help="Run this plan, by slug, instead; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each in a round.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all layouts are run, one after another.")] = 3,
    quick: Annotated[bool, typer.Option(help="A coarse profile.")] = False,
    reuse: Annotated[bool, typer.Option(help="Predict anew for the profile and runs in --out; run nothing.")] = False,
) -> None:
    """Do it all: profile this machine, capture a model, plan, run plans, hold prediction to measurement."""
    from autopar.demo import DemoOptions, resolve_device
    from autopar.demo import demo as run_demo
    from autopar.report import write_report
    from autopar.report.tables import plans_table, profile_table, validation_table, verdict

    options = DemoOptions(
        out=out, ranks=ranks, emulate=emulate, device="cpu" if emulate else resolve_device(device),
        num_layouts=layouts, plans=tuple(plan or ()), steps=steps, rounds=rounds, quick=quick, reuse=reuse,
    )  # fmt: skip
    with progress() as on_message:
        report = run_demo(options, say, on_message)
    files = write_report(report, out)
    if report.profile is not None:
        show(profile_table(report.profile, width=terminal_width()))
    show(plans_table(report.result.best[:10], width=terminal_width(), device=report.device_word, title=report.title))
    show(validation_table(report.validation, width=terminal_width()), verdict(report.validation))
    say(f"wrote {len(files)} files; open {out / 'index.html'}")


@app.command()
def gpu(
    part: Annotated[str, typer.Option(help="Which settings: small, medium, large, or all.")] = "all",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for profile and results.")] = Path("gpu"),
    device: Device = "auto",
) -> None:
    """Profile one GPU, run single-GPU settings, and hold predicted step time and memory to what was measured."""
    from autopar.demo import resolve_device
    from autopar.gpu import measure_settings, settings_of
    from autopar.report.columns import markdown_table

    with progress() as on_message:
        results = measure_settings(settings_of(part), out, resolve_device(device), say, on_message)
    print(markdown_table(results.columns()))
    say(f"wrote {results.file}")
