"""Running plans for real: from a job to measurements, or to a trained model. Imports no torch; the ranks do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from autopar.errors import InputError, RunError
from autopar.measurement import Measurement, read_measurement
from autopar.runtime.identity import check_identity
from autopar.runtime.job import TrainJob, check_job, write_job
from autopar.runtime.launch.diagnosis import explain_failure
from autopar.runtime.launch.launcher import OnMessage, launch
from autopar.runtime.launch.node_run import run_node, run_rank
from autopar.runtime.launch.nodes import Node
from autopar.runtime.launch.places import Place, Role
from autopar.runtime.launch.progress import FAILED, read_statuses
from autopar.runtime.outcome import OUTCOME, Outcome, read_outcome

WORKER = "autopar.runtime.train"


def run_plans(
    job: TrainJob,
    *,
    nodes: Sequence[Node],
    ranks_per_node: int,
    stall_timeout_s: float,
    max_restarts: int = 0,
    on_message: OnMessage | None = None,
) -> tuple[Measurement, ...]:
    """Train under every plan of a job and return what was measured, in the order of the plans.

    Files: ``out_dir/job.json``, the launcher's logs, and ``out_dir/<slug>/measurement.json`` of each plan, written as
    soon as the plan is done (those of plans that ended before a failure stay). Messages to ``on_message`` have the keys
    ``event`` (plan_begin, step, plan_end), ``slug``, ``index`` and ``plans`` (which of how many), and for a step
    ``step``, ``steps`` and ``phase`` (warmup, inspect, timed); plan_end has ``step_s``, ``loss`` and ``peak_bytes``.

    Raises:
        InputError, PlanError: the job cannot work; nothing was started.
        RunError: a rank died or hung.
    """
    check_job(job, len(nodes) * ranks_per_node)
    out_dir = Path(job.out_dir)
    files = [job.measurement_file(plan) for plan in job.plans]
    for file in files:
        file.unlink(missing_ok=True)
    write_job(out_dir / "job.json", dataclasses.replace(job, timeout_s=stall_timeout_s))
    launch(
        WORKER,
        out_dir / "job.json",
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        out_dir=out_dir,
        stall_timeout_s=stall_timeout_s,
        max_restarts=max_restarts,
        on_message=on_message,
    )
    missing = [plan.slug for plan, file in zip(job.plans, files, strict=True) if not file.exists()]
    if missing:
        raise RunError(f"the run ended well but left no measurement of {', '.join(missing)}")
    return tuple(read_measurement(file) for file in files)


def run_training(
    job: TrainJob,
    *,
    nodes: Sequence[Node],
    ranks_per_node: int,
    stall_timeout_s: float,
    max_restarts: int = 0,
    on_message: OnMessage | None = None,
) -> tuple[Outcome, Measurement | None]:
    """Train under the plan of a job that has ``training``, and return how it ended and what its first steps measured.

    Files in ``out_dir``: ``job.json``, ``metrics.csv``, ``validation.csv``, ``result.json``, ``checkpoints/``, the
    launcher's logs, and ``<slug>/measurement.json``, which stays that of an earlier run where this one made too few
    steps. Messages to ``on_message``: ``step`` as in ``run_plans``, ``log`` with a ``line`` to be shown, and those of
    ``launch``, of which a restart also says ``resumes_from``: the newest checkpoint, by name.

    Raises:
        InputError, PlanError: the job cannot work, or ``out_dir`` has checkpoints of another one; nothing was started.
        RunError: a rank died or hung.
    """
    prepare_training(job, len(nodes) * ranks_per_node, stall_timeout_s)

    def told(message: dict[str, Any]) -> None:
        if on_message is not None:
            on_message(_with_checkpoint(message, job.checkpoint_folder))

    launch(
        WORKER,
        job_file(job),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        out_dir=Path(job.out_dir),
        stall_timeout_s=stall_timeout_s,
        max_restarts=max_restarts,
        on_message=told,
    )
    return training_result(job)


def run_training_part(
    job: TrainJob,
    place: Place,
    *,
    ranks_per_node: int,
    stall_timeout_s: float,
    max_restarts: int = 0,
    interface: str = "",
    on_message: OnMessage | None = None,
) -> tuple[Outcome, Measurement | None] | None:
    """This process's part of a training whose nodes, or whose ranks, are each started by themselves.

    All parts get the same job; ``out_dir`` is a folder that they share, of files as in ``run_training``.

    Args:
        place: which part it is: the ranks of a node, or a rank.
        interface: network interface for collectives; empty leaves the choice to the backend.

    Returns:
        As ``run_training`` on the part that leads, None on the others.

    Raises:
        InputError, PlanError: the job cannot work.
        RunError: a rank died or hung, and torchrun gave up.
    """
    assert job.training is not None
    if not job.training.saving.resume:
        raise InputError(
            "--no-resume is for runs that are started as one: here a restart is a start; use another --out"
        )
    world_size = place.world_size or place.num_nodes * ranks_per_node
    if place.leads:
        prepare_training(job, world_size, stall_timeout_s)
    else:
        check_job(job, world_size)
        write_job(job_file(job), dataclasses.replace(job, timeout_s=stall_timeout_s))
    if place.role is Role.RANK:
        run_rank(place, WORKER, [str(job_file(job))])
    else:
        try:
            run_node(
                place, WORKER, job_file(job), ranks_per_node=ranks_per_node, max_restarts=max_restarts,
                interface=interface, on_message=on_message,
            )  # fmt: skip
        except RunError as error:
            statuses = read_statuses(job.status_folder, world_size)
            if not any(status.state == FAILED for status in statuses.values()):
                raise
            raise RunError(f"{error}\n{explain_failure([], statuses, world_size, lambda rank: None).text}") from None
    return training_result(job) if place.leads else None


def job_file(job: TrainJob) -> Path:
    """Where a job is written for its ranks."""
    return Path(job.out_dir) / "job.json"


def prepare_training(job: TrainJob, world_size: int, stall_timeout_s: float) -> None:
    """Check a job and its folder, and write the job down for so many ranks. Raises InputError, PlanError."""
    assert job.training is not None
    check_job(job, world_size)
    if job.training.saving.resume:
        check_resumable(job)
    else:
        put_aside(job.checkpoint_folder)
    (Path(job.out_dir) / OUTCOME).unlink(missing_ok=True)
    write_job(job_file(job), dataclasses.replace(job, timeout_s=stall_timeout_s))


def training_result(job: TrainJob) -> tuple[Outcome, Measurement | None]:
    """How a training ended and what was measured of it. Raises RunError if it left no word."""
    out_dir, [plan] = Path(job.out_dir), job.plans
    if not (out_dir / OUTCOME).exists():
        raise RunError(f"the run ended well but left no {out_dir / OUTCOME}")
    file = job.measurement_file(plan)
    return read_outcome(out_dir), read_measurement(file) if file.exists() else None


def _with_checkpoint(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    if message.get("event") != "restart":
        return message
    found = sorted(path.name for path in folder.glob("step-*"))
    return {**message, "resumes_from": found[-1] if found else "the beginning"}


def check_resumable(job: TrainJob) -> None:
    """Raise InputError if the newest checkpoint of a job's folder is of another training."""
    if not job.checkpoint_folder.is_dir():
        return
    # Checkpoints are torch's; where there are none, nothing is imported.
    from autopar.runtime.checkpoint.folder import saved_steps, step_path
    from autopar.runtime.checkpoint.manifest import Damaged, read_manifest

    for step in reversed(saved_steps(job.checkpoint_folder)):
        try:
            found = read_manifest(step_path(job.checkpoint_folder, step)).state["identity"]
        except Damaged:
            continue
        check_identity(found, job, f"{job.checkpoint_folder}, step {step},")
        return


def put_aside(folder: Path) -> None:
    """Give a folder the first free name ``folder.1``, ``folder.2``, ...; nothing if it is not there."""
    if folder.exists():
        number = next(n for n in count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))
