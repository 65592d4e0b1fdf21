"""Single-GPU settings: one command profiles a GPU, runs them, and holds prediction to measurement.

The settings differ in family, size, sequence, microbatch, recomputation, compiled blocks and fused optimizer. A part
ends in ten minutes on a recent GPU; a profile that an earlier part left in the folder is used again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.errors import InputError, nearest
from autopar.estimate import Setting, estimate
from autopar.estimate.machine import runtime_stack
from autopar.model.build import build_graph
from autopar.model.presets import load_preset
from autopar.plan import Plan, Recompute, parse_slug
from autopar.report.columns import Column
from autopar.runtime.job import TrainJob
from autopar.runtime.launch.nodes import local_node
from autopar.runtime.profile.machine import profile_machine
from autopar.runtime.run import run_plans
from autopar.workload import Precision, Workload
from costmodels.calibration import MachineProfile, profile_cluster, read_profile
from costmodels.records import write_json
from costmodels.units import GIB

STALL_TIMEOUT_S = 240.0
STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSetting:
    """One run on one device."""

    part: str
    model: str
    seq_len: int
    global_batch: int
    microbatch: int
    recompute: Recompute = Recompute.NONE
    compiled: bool = False
    fused: bool = True

    @property
    def name(self) -> str:
        """Unique, and a folder's name."""
        habits = "".join(f".{variant}" for variant in self.variants)
        return f"{self.model}.s{self.seq_len}.b{self.global_batch}.mb{self.microbatch}.ac-{self.recompute}{habits}"

    @property
    def variants(self) -> tuple[str, ...]:
        """Of the stack."""
        return ("compile",) * self.compiled + ("unfused-optimizer",) * (not self.fused)

    @property
    def plan(self) -> Plan:
        """The plan of one rank."""
        return parse_slug(f"mb{self.microbatch}.ac-{self.recompute}")


def _setting(
    part: str,
    model: str,
    seq_len: int,
    batch: int,
    microbatch: int,
    *,
    full: bool = False,
    compiled: bool = False,
    fused: bool = True,
) -> GpuSetting:
    return GpuSetting(
        part=part, model=model, seq_len=seq_len, global_batch=batch, microbatch=microbatch,
        recompute=Recompute.FULL if full else Recompute.NONE, compiled=compiled, fused=fused,
    )  # fmt: skip


SETTINGS = (
    _setting("small", "gpt3-125m", 1024, 32, 8),
    _setting("small", "gpt3-125m", 1024, 32, 32),
    _setting("small", "gpt3-125m", 2048, 16, 8, full=True),
    _setting("small", "gpt3-125m", 1024, 32, 8, compiled=True),
    _setting("small", "gpt3-125m", 1024, 32, 8, fused=False),
    _setting("small", "gpt3-350m", 1024, 32, 8),
    _setting("small", "gpt3-350m", 2048, 16, 4),
    _setting("medium", "gpt3-760m", 2048, 16, 4),
    _setting("medium", "gpt3-1.3b", 2048, 8, 2),
    _setting("medium", "gpt3-1.3b", 2048, 8, 4, full=True),
    _setting("medium", "llama3.2-1b", 2048, 8, 2),
    _setting("medium", "llama3.2-1b", 2048, 8, 2, compiled=True),
    _setting("medium", "llama3.2-1b", 2048, 8, 2, fused=False),
    _setting("medium", "llama3.2-1b", 4096, 4, 1),
    _setting("large", "llama3.2-1b", 8192, 2, 1, full=True),
    _setting("large", "gpt3-2.7b", 2048, 8, 2),
    _setting("large", "llama3.2-3b", 2048, 8, 1),
    _setting("large", "llama3.2-3b", 2048, 8, 1, compiled=True),
    _setting("large", "llama3.2-3b", 4096, 4, 2, full=True),
)
"""What `autopar gpu` runs."""


def settings_of(part: str) -> tuple[GpuSetting, ...]:
    """Settings of a part, or all. Raises InputError."""
    parts = sorted({setting.part for setting in SETTINGS})
    if part not in (*parts, "all"):
        raise InputError(f"unknown part '{part}'{nearest(part, [*parts, 'all'])}")
    return tuple(setting for setting in SETTINGS if part in ("all", setting.part))


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuResult:
    """A setting predicted and measured, seconds and bytes."""

    name: str
    predicted_step_s: float
    measured_step_s: float
    predicted_bytes: float
    measured_bytes: int
    mfu: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuResults:
    """All results with their provenance."""

    device: str
    versions: dict[str, str]
    date: str
    results: tuple[GpuResult, ...]
    file: Path

    def columns(self) -> list[Column]:
        """The results as a table."""

        def error(predicted: float, measured: float) -> str:
            return f"{predicted / measured - 1:+.1%}"

        rows = self.results
        return [
            Column(header="setting", cells=tuple(row.name for row in rows), text=True),
            Column(header="predicted ms", cells=tuple(f"{1e3 * row.predicted_step_s:.1f}" for row in rows)),
            Column(header="measured ms", cells=tuple(f"{1e3 * row.measured_step_s:.1f}" for row in rows)),
            Column(header="error", cells=tuple(error(row.predicted_step_s, row.measured_step_s) for row in rows)),
            Column(header="predicted GiB", cells=tuple(f"{row.predicted_bytes / GIB:.2f}" for row in rows)),
            Column(header="measured GiB", cells=tuple(f"{row.measured_bytes / GIB:.2f}" for row in rows)),
            Column(header="error ", cells=tuple(error(row.predicted_bytes, row.measured_bytes) for row in rows)),
            Column(header="MFU", cells=tuple(f"{row.mfu:.1%}" for row in rows)),
        ]


def measure_settings(
    settings: Sequence[GpuSetting],
    out: Path,
    device: str,
    say: Callable[[str], None],
    progress: Callable[[dict[str, Any]], None],
) -> GpuResults:
    """Profile one device, unless ``out`` holds its profile, and run the settings; results are kept after each.

    Raises:
        RunError: a run failed; what was measured before stays in ``out``.
    """
    out.mkdir(parents=True, exist_ok=True)
    profile = _profile(out, device, say, progress)
    results: list[GpuResult] = []
    file = out / "results.json"
    found = GpuResults(
        device=profile.device_name, versions=dict(profile.versions), date=profile.date, results=(), file=file
    )
    for number, setting in enumerate(settings, start=1):
        say(f"setting {number} of {len(settings)}: {setting.name}")
        results.append(_measure(setting, profile, out, device, progress))
        found = dataclasses.replace(found, results=tuple(results))
        content = {"device": found.device, "versions": found.versions, "date": found.date, "results": results}
        write_json(file, {"schema_version": 1, **content})
    return found


def _profile(
    out: Path, device: str, say: Callable[[str], None], progress: Callable[[dict[str, Any]], None]
) -> MachineProfile:
    path = out / "profile.json"
    if path.exists():
        say(f"profile: {path}, measured before")
        return read_profile(path)
    say("profile: one device")
    precision = Precision.BF16 if device == "cuda" else Precision.FP32
    return profile_machine(
        ranks=1, nodes=(local_node(),), device=device, precision=precision.value, out=path, on_message=progress
    )


def _measure(
    setting: GpuSetting, profile: MachineProfile, out: Path, device: str, progress: Callable[[dict[str, Any]], None]
) -> GpuResult:
    spec, precision = load_preset(setting.model), Precision(profile.precision)
    workload = Workload(global_batch=setting.global_batch, seq_len=setting.seq_len, precision=precision)
    graph = build_graph(spec, seq_len=setting.seq_len, precision=precision)
    stack = runtime_stack(profile, variants=setting.variants)
    question = Setting(graph=graph, workload=workload, cluster=profile_cluster(profile), stack=stack)
    expected = estimate(question, setting.plan)
    job = TrainJob(
        model=spec,
        workload=workload,
        plans=(setting.plan,),
        steps=STEPS,
        out_dir=str(out / setting.name),
        device=device,
        compiled=setting.compiled,
        fused_optimizer=setting.fused,
    )
    [measured] = run_plans(
        job, nodes=(local_node(),), ranks_per_node=1, stall_timeout_s=STALL_TIMEOUT_S, on_message=progress
    )
    return GpuResult(
        name=setting.name,
        predicted_step_s=expected.step_s,
        measured_step_s=measured.median_step_s,
        predicted_bytes=expected.memory_bytes,
        measured_bytes=measured.peak_bytes,
        mfu=expected.mfu * expected.step_s / measured.median_step_s,
    )
