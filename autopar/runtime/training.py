"""Real training under one plan: steps with their log, evaluations and checkpoints; the first ones are measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.measurement import RankMeasurement, write_measurement
from autopar.runtime.agreement import Hosts, Poll, stop_on_signal
from autopar.runtime.data.corpus import training_samples
from autopar.runtime.data.feed import Feed
from autopar.runtime.data.samples import Samples
from autopar.runtime.evaluate import evaluate
from autopar.runtime.inspection import Inspection
from autopar.runtime.job import INSPECTED_STEPS, Evaluation, Training, TrainJob
from autopar.runtime.measuring import collect
from autopar.runtime.mesh import build_mesh
from autopar.runtime.meter import Meter
from autopar.runtime.metrics import StepRecord, ValidationRecord
from autopar.runtime.outcome import write_outcome
from autopar.runtime.progress import Progress, Ticks, announce
from autopar.runtime.reporter import Reporter
from autopar.runtime.saving import Saver
from autopar.runtime.trainer import Step, Trainer, build_trainer

MEASURED_STEPS = 100
"""Timed steps that go into measurement.json, which is written as soon as they are made."""


def train(job: TrainJob, training: Training, device: torch.device, progress: Progress) -> None:
    """Train to the last step of the job, from the beginning or from the newest checkpoint.

    SIGTERM to any rank ends the run well soon after, with a checkpoint. ``result.json`` tells how it ended.
    """
    [plan] = job.plans
    progress.update(plan=plan.slug, step=0, doing="building")
    announce({"event": "plan_begin", "slug": plan.slug, "index": 0, "plans": 1})
    # Ranks that share sequences draw the same, others not; a checkpoint brings what was drawn from so far.
    torch.manual_seed(job.seed * plan.layout.dp + plan.layout.data_share(dist.get_rank()))
    trainer = build_trainer(job, plan, device, build_mesh(plan.layout, device.type), Ticks(progress))
    evaluation, batch = training.evaluation, job.workload.global_batch
    samples, held_out = training_samples(
        job.data.tokens, job.workload.seq_len, validation=job.data.validation, seed=job.seed,
        validation_sequences=evaluation.batches * batch if evaluation.every else 0,
    )  # fmt: skip
    saver, hosts = Saver(job, training.saving, progress.tick), Hosts()
    next_sample = saver.resume(trainer)
    first_step = trainer.next_step
    reporter = Reporter(job, training, first_step)
    if first_step:
        reporter.say(f"going on after step {first_step} of {job.steps}, from {saver.folder}")
    meter = Meter(trainer=trainer, hosts=hosts, logging=training.logging)
    measured = _Measured(trainer=trainer, meter=meter, steps_left=job.steps - first_step)
    with stop_on_signal() as stop, _feed(trainer, samples, next_sample) as feed:
        poll = Poll(hosts, stop, training.saving.every_minutes * 60)
        stopped = False
        while trainer.next_step < job.steps and not stopped:
            progress.update(step=trainer.next_step, doing="begins")
            reporter.begin(trainer.next_step)
            meter.begin()
            meter.end(measured.step(feed.take()))
            _tell(meter.collect(), reporter, measured, poll)
            done = trainer.next_step
            stopped, late = poll.ask(done)
            ending = stopped or done == job.steps
            evaluating = evaluation.every > 0 and (done % evaluation.every == 0 or done == job.steps)
            saving = saver.due(done, late=late, ending=ending)
            if done % training.logging.every == 0 or done == first_step + 1 or evaluating or saving or ending:
                meter.close()
            if evaluating or saving or ending:
                _tell(meter.collect(), reporter, measured, poll)
            if evaluating:
                loss = _validate(trainer, held_out, evaluation, progress)
                reporter.add_validation(ValidationRecord(step=done, loss=loss))
            if saving:
                progress.tick("checkpoint")
                saver.save(trainer, feed.next_sample)
                reporter.say(f"step {done}/{job.steps}  checkpoint")
        measured.finish()
    progress.tick("closing")
    saver.finish()
    reporter.close()
    if dist.get_rank() == 0:
        found = reporter.outcome(first_step=first_step, steps_done=trainer.next_step, stopped=stopped)
        write_outcome(Path(job.out_dir), found)


def _feed(trainer: Trainer, samples: Samples, next_sample: int) -> Feed:
    layout = trainer.plan.layout
    return Feed(
        samples.rows, first_sample=next_sample, global_batch=trainer.job.workload.global_batch,
        share=layout.data_share(dist.get_rank()), num_shares=layout.dp, device=trainer.model.device,
    )  # fmt: skip


def _validate(trainer: Trainer, held_out: Samples, evaluation: Evaluation, progress: Progress) -> float:
    with _feed(trainer, held_out, 0) as feed:

        def batches() -> Iterator[Tensor]:
            for number in range(evaluation.batches):
                progress.tick(f"evaluation {number}")
                yield feed.take()

        return evaluate(trainer.model, batches())


def _tell(records: tuple[StepRecord, ...], reporter: Reporter, measured: _Measured, poll: Poll) -> None:
    if records:
        reporter.add_steps(records)
        measured.add(records)
        poll.learn(min(record.seconds for record in records))


@dataclass(kw_only=True, slots=True)
class _Measured:
    """The steps that measurement.json is made of, if enough of them are left: warm-up, inspected, timed."""

    trainer: Trainer
    meter: Meter
    steps_left: int
    _inspection: Inspection | None = None
    _rank: RankMeasurement | None = None
    _made: int = 0
    _records: list[StepRecord] = field(default_factory=list)
    _written: bool = False

    def step(self, batch: Tensor) -> Step:
        """Make the next step, looked at if it is its turn."""
        inspected = self._made - self.trainer.job.warmup
        self._made += 1
        if not 0 <= inspected < INSPECTED_STEPS or self.steps_left <= self._before:
            return self.trainer.step(batch)
        if self._inspection is None:
            self._inspection = Inspection(trainer=self.trainer)
        step = self._inspection.step(inspected, batch)
        if inspected == INSPECTED_STEPS - 1:
            self._rank = self._inspection.result()
            self.meter.peak_bytes = self._rank.peak_bytes
            self._inspection = None
        return step

    def add(self, records: tuple[StepRecord, ...]) -> None:
        """Take the numbers of steps; write the file once there are enough of them."""
        if not self._written:
            self._records.extend(records)
            if len(self._records) >= self._before + MEASURED_STEPS:
                self.finish()

    def finish(self) -> None:
        """Write the file with the timed steps that there are. Collective."""
        if self._written or self._rank is None or len(self._records) <= self._before:
            return
        self._written = True
        seconds = [record.seconds for record in self._records[self._before :]]
        norms = [record.grad_norm for record in self._records if record.grad_norm is not None]
        found = collect(self.trainer, [r.loss for r in self._records], norms, seconds, self._rank, None)
        if dist.get_rank() == 0:
            write_measurement(self.trainer.job.measurement_file(self.trainer.plan), found)
        self._records = []

    @property
    def _before(self) -> int:
        return self.trainer.job.warmup + INSPECTED_STEPS
