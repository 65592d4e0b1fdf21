"""What the training worker is told to do: job.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autopar.errors import InputError, PlanError
from autopar.model.spec import ModelSpec, Position
from autopar.plan import Plan
from autopar.runtime.support import check_supported, sequence_divisor, unsupported_workload
from autopar.workload import Workload
from costmodels.records import read_record, write_record

JOB_SCHEMA = 1
DEVICES = ("cpu", "cuda")
NUM_SYMBOLS = 256
INSPECTED_STEPS = 3
# DDP settles its buckets in the second step.
LEAST_WARMUP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """Training runs of one model and workload under several plans, one after another in the same processes.

    Attributes:
        plans: all of as many ranks as the job is started with.
        steps: timed steps of each plan.
        warmup: steps before; the inspected ones (collectives, memory, spans) follow them and come before the timed.
        seed: of the initial weights.
        learning_rate: constant.
        out_dir: gets a folder for each plan, named by its slug.
        device: cpu or cuda.
    """

    model: ModelSpec
    workload: Workload
    plans: tuple[Plan, ...]
    steps: int
    warmup: int = LEAST_WARMUP
    seed: int = 0
    learning_rate: float = 3e-4
    out_dir: str
    device: str = "cpu"

    @property
    def total_steps(self) -> int:
        """Steps of each plan in all."""
        return self.warmup + INSPECTED_STEPS + self.steps

    def measurement_file(self, plan: Plan) -> Path:
        """Where the measurement of a plan goes."""
        return Path(self.out_dir) / plan.slug / "measurement.json"


def check_job(job: TrainJob, world_size: int) -> None:
    """Refuse a job before any process starts.

    Raises:
        PlanError: a plan is not of ``world_size`` ranks, does not divide the batch, or the executor cannot run it.
        InputError: anything else that cannot work, with what to change.
    """
    if not job.plans:
        raise InputError("a training job needs at least one plan")
    if job.steps < 1 or job.warmup < LEAST_WARMUP:
        raise InputError(f"a training job needs steps>=1 and warmup>={LEAST_WARMUP}, not {job.steps} and {job.warmup}")
    if job.device not in DEVICES:
        raise InputError(f"device is '{job.device}'; it is one of {', '.join(DEVICES)}")
    if job.model.vocab_size < NUM_SYMBOLS:
        raise InputError(
            f"model {job.model.name}: text is bytes, so vocab_size is at least 256, not {job.model.vocab_size}"
        )
    if job.model.position is Position.LEARNED and job.workload.seq_len > job.model.max_seq_len:
        raise InputError(
            f"seq_len={job.workload.seq_len} is longer than the {job.model.max_seq_len} positions of {job.model.name}"
        )
    for reason in unsupported_workload(job.workload):
        raise InputError(reason.detail)
    if len({plan.slug for plan in job.plans}) < len(job.plans):
        raise InputError("a training job names a plan twice")
    for plan in job.plans:
        _check_plan(plan, job, world_size)


def _check_plan(plan: Plan, job: TrainJob, world_size: int) -> None:
    layout, workload = plan.layout, job.workload
    if layout.world_size != world_size:
        raise PlanError(f"plan {plan.slug} is for {layout.world_size} ranks, but there are {world_size}")
    if workload.global_batch % (layout.dp * plan.microbatch_size):
        raise PlanError(
            f"plan {plan.slug}: dp={layout.dp} times microbatch {plan.microbatch_size} does not divide the global "
            f"batch of {workload.global_batch}"
        )
    parts = sequence_divisor(plan)
    if workload.seq_len % parts:
        raise PlanError(
            f"plan {plan.slug}: cp={layout.cp}, tp={layout.tp} do not divide a sequence of {workload.seq_len} tokens: "
            f"use a multiple of {parts}"
        )
    check_supported(plan, job.model, plan.num_microbatches(workload))


def read_job(path: str | Path) -> TrainJob:
    """Read job.json. Raises InputError."""
    return read_record(TrainJob, path, JOB_SCHEMA)


def write_job(path: str | Path, job: TrainJob) -> None:
    """Write job.json whole."""
    write_record(path, job, JOB_SCHEMA)
