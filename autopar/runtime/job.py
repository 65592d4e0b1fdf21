"""What the training worker is told to do: job.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from autopar.errors import InputError, PlanError
from autopar.model.spec import ModelSpec, Position
from autopar.plan import Plan
from autopar.runtime.data.samples import cut_of
from autopar.runtime.data.tokenizer import NUM_BYTES
from autopar.runtime.data.tokens import read_header
from autopar.runtime.rates import RateSchedule
from autopar.runtime.support import check_supported, sequence_divisor, unsupported_compiled, unsupported_workload
from autopar.workload import Workload
from costmodels.records import read_record, write_record

JOB_SCHEMA = 1
DEVICES = ("cpu", "cuda")
CHECKPOINTS = "checkpoints"
INSPECTED_STEPS = 3
# DDP settles its buckets in the second step.
LEAST_WARMUP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Where tokens come from.

    Attributes:
        tokens: folder written by ``autopar tokenize``; empty for the standard library's sources as bytes.
        validation: share of the tokens, their end, that is kept from training where evaluations are asked for.
    """

    tokens: str = ""
    validation: float = 0.05

    @property
    def vocab_size(self) -> int:
        """Every token is below it. Raises InputError if the folder holds no tokens."""
        return read_header(Path(self.tokens)).vocab_size if self.tokens else NUM_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Loss on validation samples, the same ones every time.

    Attributes:
        every: steps between evaluations; there is one at the end as well. 0 for none at all.
        batches: global batches of an evaluation.
    """

    every: int = 0
    batches: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """Checkpoints of a run. A worker always goes on from the newest one that it finds.

    Attributes:
        every_steps: between checkpoints; 0 for none by steps.
        every_minutes: between checkpoints; 0 for none by time.
        at_end: one after the last step, and one when the run is told to stop.
        keep: newest ones that stay.
        asynchronous: write while training goes on.
        resume: go on from the newest one that is there; otherwise they are put aside before the run is started.
    """

    every_steps: int = 0
    every_minutes: float = 0.0
    at_end: bool = True
    keep: int = 2
    asynchronous: bool = False
    resume: bool = True

    @property
    def any(self) -> bool:
        """Whether there are checkpoints at all."""
        return self.at_end or self.every_steps > 0 or self.every_minutes > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Logging:
    """What is told of steps.

    Attributes:
        every: steps between log lines. All steps are in metrics.csv, written at the same times.
        tensorboard: also write event files, to ``out_dir/tensorboard``.
        flops_per_step: useful FLOP of a step of the global batch; 0 leaves MFU out.
        peak_flops: of one device, FLOP/s; 0 leaves MFU out.
        flops_convention: what counts as a useful FLOP.
    """

    every: int = 10
    tensorboard: bool = False
    flops_per_step: float = 0.0
    peak_flops: float = 0.0
    flops_convention: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What makes a job real training and not only a measurement.

    Attributes:
        rate: form of the learning rate.
        self_check: hold the plan to one process before the first step.
    """

    rate: RateSchedule = field(default_factory=RateSchedule)
    evaluation: Evaluation = field(default_factory=Evaluation)
    saving: Saving = field(default_factory=Saving)
    logging: Logging = field(default_factory=Logging)
    self_check: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """Training runs of one model and workload: several plans measured one after another, or one plan trained under.

    Attributes:
        plans: all of as many ranks as the job is started with.
        steps: timed steps of each plan; with ``training``, steps in all.
        warmup: steps before; the inspected ones (collectives, memory, spans) follow them and come before the timed.
        seed: of the initial weights and the order of samples.
        learning_rate: constant, or the highest where ``training`` says how it changes.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: greatest norm of the gradients; longer ones are shortened to it. 0 only measures the norm, None not even
            that.
        out_dir: gets a folder for each plan, named by its slug.
        device: cpu or cuda.
        compiled: compile the blocks of the model.
        fused_optimizer: AdamW in one kernel for all parameters of a kind.
        source: where the module is from: empty for the project's own, a Hugging Face config.json, or
            ``package.module:function``.
        data: what to train on.
        training: for real training under the only plan; None measures.
        timeout_s: seconds without progress after which a rank says where it is and ends, so that all are started again.
        predicted_memory: bytes of the fullest rank by item, as the estimate names them, to be told beside what was held
            if memory runs out; empty if nobody predicted.
    """

    model: ModelSpec
    workload: Workload
    plans: tuple[Plan, ...]
    steps: int
    warmup: int = LEAST_WARMUP
    seed: int = 0
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    out_dir: str
    device: str = "cpu"
    compiled: bool = False
    fused_optimizer: bool = True
    source: str = ""
    data: Data = field(default_factory=Data)
    training: Training | None = None
    timeout_s: float = 180.0
    predicted_memory: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Steps of each plan in all."""
        return self.steps if self.training else self.warmup + INSPECTED_STEPS + self.steps

    @property
    def evaluated_sequences(self) -> int:
        """Sequences of an evaluation; 0 if there are none."""
        evaluation = self.training.evaluation if self.training else None
        return evaluation.batches * self.workload.global_batch if evaluation and evaluation.every else 0

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints of real training go."""
        return Path(self.out_dir) / CHECKPOINTS

    @property
    def status_folder(self) -> Path:
        """Where ranks without a launcher report."""
        return Path(self.out_dir) / "ranks"

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
    if job.clip is not None and not job.clip >= 0:
        raise InputError(f"clip is {job.clip}; it is a norm, or 0 for no limit")
    if job.training is not None:
        _check_training(job, job.training)
    _check_text(job)
    for reason in unsupported_workload(job.workload):
        raise InputError(reason.detail)
    if len({plan.slug for plan in job.plans}) < len(job.plans):
        raise InputError("a training job names a plan twice")
    for plan in job.plans:
        _check_plan(plan, job, world_size)


def _check_text(job: TrainJob) -> None:
    model, vocab_size = job.model, job.data.vocab_size
    if not model.causal and model.vocab_size == vocab_size:
        raise InputError(
            f"model {model.name} learns masked tokens, and its last one is the mask: vocab_size is at least "
            f"{vocab_size + 1}, not {vocab_size}"
        )
    if model.vocab_size < vocab_size:
        what = f"tokens of {job.data.tokens} are" if job.data.tokens else "text is bytes, so they are"
        raise InputError(
            f"model {model.name}: {what} below {vocab_size}, and vocab_size is at least {vocab_size}, not "
            f"{model.vocab_size}"
        )
    if model.position is Position.LEARNED and job.workload.seq_len > model.max_seq_len:
        raise InputError(
            f"seq_len={job.workload.seq_len} is longer than the {model.max_seq_len} positions of {model.name}"
        )


def _check_training(job: TrainJob, training: Training) -> None:
    rate, evaluation, saving, logging = training.rate, training.evaluation, training.saving, training.logging
    if len(job.plans) != 1:
        raise InputError(f"real training is under one plan, not {len(job.plans)}")
    if not 0 <= rate.warmup_steps <= job.steps:
        raise InputError(f"a warm-up of {rate.warmup_steps} steps does not fit a training of {job.steps}")
    if not 0 <= rate.minimum <= 1:
        raise InputError(f"the least learning rate is a share of the highest, 0 to 1, not {rate.minimum}")
    if evaluation.every < 0 or evaluation.batches < 1:
        raise InputError(
            f"an evaluation takes at least one batch and comes every 0 (never) or more steps, not {evaluation.batches} "
            f"and {evaluation.every}"
        )
    if evaluation.every and not 0 < job.data.validation < 1:
        raise InputError(f"the share of the text kept for validation is between 0 and 1, not {job.data.validation}")
    if saving.every_steps < 0 or saving.every_minutes < 0 or saving.keep < 1:
        raise InputError(f"checkpoints: {saving} has a negative interval, or keeps none")
    if job.data.tokens:
        cut_of(
            read_header(Path(job.data.tokens)).num_tokens, job.workload.seq_len, validation=job.data.validation,
            validation_sequences=job.evaluated_sequences,
        )  # fmt: skip
    if logging.every < 1:
        raise InputError(f"a log line comes every 1 or more steps, not {logging.every}")
    if logging.tensorboard and find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the package tensorboard: pip install 'autopar[tensorboard]'")


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
    check_supported(plan, job.model, plan.num_microbatches(workload), job.source)
    if job.compiled and (reasons := unsupported_compiled(plan)):
        raise PlanError(f"plan {plan.slug} cannot be compiled: " + "; ".join(reason.detail for reason in reasons))


def read_job(path: str | Path) -> TrainJob:
    """Read job.json. Raises InputError."""
    return read_record(TrainJob, path, JOB_SCHEMA)


def write_job(path: str | Path, job: TrainJob) -> None:
    """Write job.json whole."""
    write_record(path, job, JOB_SCHEMA)
