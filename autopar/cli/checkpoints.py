"""``autopar checkpoint show`` and ``export``: what training has saved, and whole weights out of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopar.cli.common import JsonFlag, app, say, show, terminal_width

if TYPE_CHECKING:
    from autopar.report.columns import Column
    from autopar.runtime.checkpoint.offline import Summary

checkpoint = typer.Typer(help="Look at checkpoints and export their weights.", no_args_is_help=True)
app.add_typer(checkpoint, name="checkpoint")

Folder = Annotated[Path, typer.Argument(help="Folder with directories such as step-00000100.")]


@checkpoint.command("show")
def show_checkpoints(
    folder: Folder,
    contents: Annotated[bool, typer.Option("--hash/--no-hash", help="Read all files, or only look at sizes.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """List checkpoints: step, size, plan, and whether each is whole or what is wrong with it."""
    from autopar.runtime.checkpoint.offline import summaries

    found = summaries(folder, contents=contents)
    if as_json:
        print(json.dumps({"schema_version": 1, "checkpoints": [dataclasses.asdict(summary) for summary in found]}))
        return
    from autopar.report.columns import terminal_table

    show(terminal_table(_columns(found), terminal_width()))


def _columns(found: list[Summary]) -> list[Column]:
    from autopar.report.columns import Column
    from costmodels.units import format_bytes

    def texts(values: list[str]) -> tuple[str, ...]:
        return tuple(values)

    return [
        Column(header="step", cells=texts([str(s.step) for s in found])),
        Column(header="size", cells=texts([format_bytes(s.num_bytes) for s in found])),
        Column(header="files", cells=texts([str(s.num_files or "") for s in found]), drop=3),
        Column(header="model", cells=texts([s.model for s in found]), text=True, drop=2),
        Column(header="plan", cells=texts([s.plan for s in found]), text=True, drop=1),
        Column(header="written", cells=texts([s.date[:19].replace("T", " ") for s in found]), text=True, drop=4),
        Column(header="state", cells=texts([s.damage or "whole" for s in found]), text=True, wraps=True),
    ]


@checkpoint.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("model.safetensors"),
    step: Annotated[int | None, typer.Option(help="Which checkpoint; the newest by default.")] = None,
) -> None:
    """Write the whole weights of a checkpoint to one safetensors file, under the names of the module."""
    from autopar.runtime.checkpoint.offline import export_weights

    manifest = export_weights(folder, out, step=step)
    say(f"wrote {out}: {manifest.model or 'the model'} at step {manifest.step}")
