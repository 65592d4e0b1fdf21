"""``autopar validate``: runs, published or this program's own, predicted and held against what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autopar.cli.common import JsonFlag, OutOption, app, progress, say, show, terminal_width
from autopar.errors import InputError


@app.command()
def validate(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="CSV files of published runs, or measurement.json of own runs (or folders of them).",
            show_default=False,
        ),
    ] = None,
    as_json: JsonFlag = False,
    out: OutOption = None,
    assumptions: Annotated[bool, typer.Option("--assumptions", help="Say what the files leave open.")] = False,
    stack: Annotated[str | None, typer.Option("--stack", help="Training software, whatever the rows say.")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Folder: refit without each model, draw, write README.md.")
    ] = None,
    ship_bands: Annotated[
        bool, typer.Option("--ship-bands", help="With --report: put its bands into the specifications.")
    ] = False,
    recipes: Annotated[
        Path | None, typer.Option("--recipes", help="CSV of published plans, held against the search, instead of runs.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="profile.json of own runs; the nearest above them by default.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Hardware of own runs, instead of a profile.", show_default=False)
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Correct the profile by own runs; with -o, write it there.")
    ] = False,
) -> None:
    """Predict measured runs and say where predictions were wrong, or hold published plans against the search."""
    if runs and all(_is_own(path) for path in runs):
        for flag, given in (("--stack", stack), ("--report", report), ("--recipes", recipes)):
            if given is not None:
                raise InputError(f"{flag} is for published runs, not for measurement.json")
        from autopar.cli.measured import validate_measurements

        validate_measurements(runs, profile=profile, cluster=cluster, calibrated=calibrate, as_json=as_json, out=out)
        return
    for flag, wanted in (("--profile", profile), ("--cluster", cluster), ("--calibrate", calibrate)):
        if wanted:
            raise InputError(f"{flag} is for measurement.json of this program's runs")
    if recipes is not None:
        _validate_recipes(recipes, runs, as_json, report or out)
        return
    if not runs:
        raise InputError("nothing to validate: name CSV files of measured runs, or published plans with --recipes")
    from autopar.validate.runs import validate_runs

    found = validate_runs(runs, stack=stack)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        from autopar.report.runs_tables import assumptions_table, sources_table, worst_table

        width = terminal_width()
        show(sources_table(found, width=width), "", worst_table(found, width=width))
        if assumptions:
            show("", assumptions_table(found, width=width))
    if out is not None:
        from autopar.report.runs_tables import write_rows
        from costmodels.records import write_json

        write_json(out / "validation.json", found.to_json())
        write_rows(found, out / "rows.csv")
        say(f"wrote {out / 'validation.json'} and {out / 'rows.csv'}")
    if report is not None:
        from autopar.report.validation import write_validation_report
        from autopar.validate.study import study

        with progress() as on_message:
            judged = study(found, on_message=on_message)
        files = write_validation_report(judged, report)
        say(f"wrote {len(files)} files to {report}")
        if ship_bands and judged.bands is not None:
            from autopar.validate.bands import bands_toml
            from costmodels.records import write_text
            from costmodels.step_bands import bands_file

            write_text(bands_file(), bands_toml(judged.bands))
            say(f"wrote {bands_file()}")
        if ship_bands and judged.memory_bands is not None:
            from autopar.validate.memory_bands import memory_bands_toml
            from costmodels.memory_bands import memory_bands_file
            from costmodels.records import write_text

            write_text(memory_bands_file(), memory_bands_toml(judged.memory_bands))
            say(f"wrote {memory_bands_file()}")
    elif ship_bands:
        raise InputError("--ship-bands needs --report, which fits the bands")


def _is_own(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".json"


def _validate_recipes(path: Path, runs: list[Path] | None, as_json: bool, folder: Path | None) -> None:
    from autopar.report.recipes import to_json, write_recipes_report
    from autopar.validate.recipes import validate_recipes

    if runs:
        raise InputError(f"--recipes {path} is judged alone: leave out {', '.join(map(str, runs))}")
    with progress() as on_message:
        found = validate_recipes(path, on_message=on_message)
    if as_json:
        print(json.dumps(to_json(found)))
    else:
        left = sum(found.left_out.values())
        show(
            f"{len(found.judged)} published plans judged, {left} left out; {found.share_near:.0%} within 15 percent of "
            f"the best; {sum(not row.fits for row in found.judged)} do not fit in memory"
        )
    if folder is not None:
        files = write_recipes_report(found, folder)
        say(f"wrote {len(files)} files to {folder}")
