"""Measurement files of this program held against predictions for the machine that they ran on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.errors import InputError
from autopar.estimate import Estimate, Setting, estimate
from autopar.estimate.machine import STACKS, measured_setting, of_ranks
from autopar.estimate.traffic import expected_collectives
from autopar.measurement import Measurement, read_measurement
from autopar.model.build import build_graph
from autopar.validate.attribution import Attribution, attribute, verdict
from autopar.validate.plans import Validation, compare
from costmodels.islands import load_uniform
from costmodels.profiles import MachineProfile, read_profile
from costmodels.speed import slowness
from costmodels.stack import load_stack

FILE, PROFILE = "measurement.json", "profile.json"
FOLDERS_ABOVE = 4
"""Folders above a measurement in which its profile is looked for."""

SettingOf = Callable[[Measurement], Setting]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedRun:
    """One measurement with its prediction."""

    path: Path
    measurement: Measurement
    setting: Setting
    estimate: Estimate
    attribution: Attribution

    @property
    def verdict(self) -> str:
        """One line, see ``attribution.verdict``."""
        return verdict(self.attribution)


def measurement_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Files as named, and of folders all that lie below. Raises InputError where there is none."""
    found: list[Path] = []
    for path in paths:
        files = sorted(path.rglob(FILE)) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: no {FILE} in this folder or below")
        found += files
    return tuple(dict.fromkeys(found))


def profile_beside(path: Path) -> Path:
    """The profile.json nearest above a measurement. Raises InputError."""
    folder = path.resolve().parent
    for above in (folder, *folder.parents)[:FOLDERS_ABOVE]:
        if (above / PROFILE).exists():
            return above / PROFILE
    raise InputError(
        f"{path}: no {PROFILE} in its folder or {FOLDERS_ABOVE - 1} above: name one with --profile, or the hardware "
        "with --cluster"
    )


def on_profile(profile: MachineProfile) -> SettingOf:
    """Settings on a measured machine; they raise InputError for a run on another kind of device."""

    def setting(run: Measurement) -> Setting:
        if profile.backend != run.backend:
            raise InputError(
                f"the profile of {profile.device_name} is of {profile.backend}, but the run used {run.backend}: name "
                "its own"
            )
        return measured_setting(run.model, run.workload, profile, run.plan.layout.world_size)

    return setting


def on_cluster(cluster: str) -> SettingOf:
    """Settings on hardware by name, with the executor's stack for the backend of the run."""

    def setting(run: Measurement) -> Setting:
        hardware = of_ranks(load_uniform(cluster), run.plan.layout.world_size)
        graph = build_graph(run.model, seq_len=run.workload.seq_len, precision=run.workload.precision)
        stack = load_stack(STACKS[run.backend])
        return Setting(graph=graph, workload=run.workload, cluster=hardware, stack=stack)

    return setting


def judge(
    paths: Sequence[Path], *, profile: Path | None = None, cluster: str | None = None
) -> tuple[tuple[JudgedRun, ...], tuple[Path, ...]]:
    """Predict measured runs anew and take their errors apart.

    Args:
        paths: measurement files, or folders of them.
        profile: of the machine; None takes the nearest above each file.
        cluster: hardware by name instead of a profile.

    Returns:
        Runs in the order of the files, and the profiles that were used.

    Raises:
        InputError: both or neither of profile and cluster, or a file that cannot be used.
    """
    if profile is not None and cluster is not None:
        raise InputError("name the machine by --profile or by --cluster, not by both")
    runs, used, known = [], [], None
    for path in measurement_files(paths):
        if cluster is not None:
            settings = on_cluster(cluster)
        else:
            used.append(profile or profile_beside(path))
            known = read_profile(used[-1])
            settings = on_profile(known)
        runs.append(judge_one(path, read_measurement(path), settings, known))
    return tuple(runs), tuple(dict.fromkeys(used))


def judge_one(
    path: Path, measurement: Measurement, settings: SettingOf, profile: MachineProfile | None = None
) -> JudgedRun:
    """Predict one run and take its error apart; ``profile`` tells how fast the machine was before."""
    setting = settings(measurement)
    predicted = estimate(setting, measurement.plan)
    slower = slowness(profile, measurement.yardstick_s) if profile is not None else None
    found = attribute(setting, predicted, measurement, slowness=slower)
    return JudgedRun(path=path, measurement=measurement, setting=setting, estimate=predicted, attribution=found)


def run_verdict(path: Path, predicted: Mapping[str, float]) -> str:
    """The line that ends a run: where the prediction was wrong, or, without a profile above, by how much.

    Args:
        path: the run's measurement file.
        predicted: of its plan file, by name; empty if nobody predicted, and then the line is.
    """
    run = read_measurement(path)
    try:
        profile = read_profile(profile_beside(path))
        return judge_one(path, run, on_profile(profile), profile).verdict + "\n"
    except InputError:
        expected = predicted.get("step_s")
    if not expected or not run.step_s:
        return ""
    error = expected / run.median_step_s - 1
    return f"step predicted {abs(error):.0%} {'too long' if error > 0 else 'too short'}\n"


def validation_of(runs: Sequence[JudgedRun]) -> Validation:
    """Runs of different plans compared as the demo compares them, collectives included."""
    collectives = {
        run.measurement.slug: expected_collectives(
            run.setting, run.measurement.plan, norm=bool(run.measurement.grad_norms)
        )
        for run in runs
    }
    return compare([run.estimate for run in runs], [run.measurement for run in runs], collectives=collectives)


def to_json(runs: Sequence[JudgedRun]) -> dict[str, Any]:
    """Runs as plain data: seconds, bytes, shares."""
    return {"schema_version": 1, "runs": [_run_json(run) for run in runs]}


def _run_json(run: JudgedRun) -> dict[str, Any]:
    found = run.attribution
    return {
        "file": str(run.path), "slug": found.slug, "verdict": run.verdict, "rank": found.rank,
        "predicted_step_s": found.predicted_step_s, "measured_step_s": found.measured_step_s, "error": found.error,
        "predicted_bytes": found.predicted_bytes, "measured_bytes": found.measured_bytes,
        "memory_error": found.memory_error, "inspected": found.inspected, "noise": found.noise,
        "slowness": found.slowness,
        "time_s": {item.name: [item.predicted, item.measured] for item in found.time},
        "memory_bytes": {item.name: [item.predicted, item.measured] for item in found.memory},
        "collectives": [
            {"kind": c.kind, "axis": c.axis, "group_size": c.group_size,
             "count": [c.predicted_count, c.counted], "bytes": [c.predicted_bytes, c.counted_bytes],
             "predicted_s": c.predicted_s, "measured_s": c.measured.moving if c.measured else None,
             "waiting_s": c.measured.waiting if c.measured else None,
             "exposed_s": c.measured.exposed if c.measured else None}
            for c in found.collectives
        ],
    }  # fmt: skip
