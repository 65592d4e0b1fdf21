"""``autopar validate measurement.json``: this program's own runs, taken apart, and folded into a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from autopar.cli.common import say, show, terminal_width
from autopar.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autopar.validate.calibration import Calibration
    from autopar.validate.measured_runs import JudgedRun

SHOWN_WHOLE = 3
"""Runs of which every table is shown; of more there is a line each."""


def validate_measurements(
    paths: Sequence[Path],
    *,
    profile: Path | None,
    cluster: str | None,
    calibrated: bool,
    as_json: bool,
    out: Path | None,
) -> None:
    """Say where predictions of own runs were wrong; write traces, and the calibrated profile if asked."""
    from autopar.report.attribution_tables import attribution_tables, calibration_tables, runs_table
    from autopar.validate.measured_runs import judge, to_json

    runs, profiles = judge(paths, profile=profile, cluster=cluster)
    for used in profiles if profile is None else ():
        say(f"profile: {used}")
    found = _calibrate(runs, profiles) if calibrated else None
    if as_json:
        from costmodels.records import to_plain

        content = to_json(runs)
        if found is not None:
            content |= {"corrections": to_plain(found.corrections), "calibrated": to_plain(found.runs)}
        print(json.dumps(content))
    else:
        width = terminal_width()
        if len(runs) <= SHOWN_WHOLE:
            for run in runs:
                show(*attribution_tables(run.attribution, width=width))
        else:
            show(runs_table([run.attribution for run in runs], width=width))
        if found is not None:
            show("", *calibration_tables(found, width=width))
    if out is not None:
        _write(runs, found, profiles, out)
    elif found is not None:
        say("nothing was written: name a folder with -o to keep the corrected profile")


def _calibrate(runs: Sequence[JudgedRun], profiles: Sequence[Path]) -> Calibration:
    from autopar.validate.calibration import calibrate
    from costmodels.profiles import read_profile

    if len(profiles) != 1:
        raise InputError(
            "--calibrate corrects one profile: name it with --profile"
            + (f" (the runs lie beside {', '.join(map(str, profiles))})" if profiles else "")
        )
    return calibrate(read_profile(profiles[0]), runs)


def _write(runs: Sequence[JudgedRun], found: Calibration | None, profiles: Sequence[Path], out: Path) -> None:
    from autopar.report.trace import chrome_trace
    from autopar.validate.measured_runs import to_json
    from costmodels.profiles import write_profile
    from costmodels.records import write_json, write_text

    kept = out / "profile.json"
    if found is not None and kept.exists():
        raise InputError(f"{kept} exists and is not overwritten: name another folder with -o")
    write_json(out / "validation.json", to_json(runs))
    for run in runs:
        trace = chrome_trace(run.setting, run.estimate, run.measurement)
        write_text(out / run.measurement.slug / "trace.json", json.dumps(trace))
    say(f"wrote {out / 'validation.json'} and {len(runs)} traces beside it, for ui.perfetto.dev")
    if found is not None:
        write_profile(kept, found.profile)
        say(f"wrote {kept}: {profiles[0]}, corrected")
