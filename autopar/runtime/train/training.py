"""Real training under one plan: steps with their log, evaluations and checkpoints; the first ones are measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.data.corpus import training_samples
from autopar.runtime.data.feed import Feed
from autopar.runtime.data.samples import Samples
from autopar.runtime.job import Evaluation, Training, TrainJob
from autopar.runtime.launch.progress import Progress, Ticks, announce
from autopar.runtime.outcome import write_outcome
from autopar.runtime.parallel.mesh import build_mesh
from autopar.runtime.step.evaluate import evaluate
from autopar.runtime.step.trainer import Trainer, build_trainer
from autopar.runtime.train.agreement import Hosts, Poll, stop_on_signal
from autopar.runtime.train.measured_steps import MeasuredSteps
from autopar.runtime.train.meter import Meter
from autopar.runtime.train.metrics import StepRecord, ValidationRecord
from autopar.runtime.train.reporter import Reporter
from autopar.runtime.train.saving import Saver
from autopar.runtime.train.self_check import self_check


def train(job: TrainJob, training: Training, device: torch.device, progress: Progress) -> None:
    """Train to the last step of the job, from the beginning or from the newest checkpoint.

    SIGTERM to any rank ends the run well soon after, with a checkpoint. ``result.json`` tells how it ended.
    """
    [plan] = job.plans
    progress.update(plan=plan.slug, step=0, doing="building")
    announce({"event": "plan_begin", "slug": plan.slug, "index": 0, "plans": 1})
    # Ranks that share sequences draw the same, others not; a checkpoint brings what was drawn from so far.
    torch.manual_seed(job.seed * plan.layout.dp + plan.layout.data_share(dist.get_rank()))
    mesh = build_mesh(plan.layout, device.type)
    trainer = build_trainer(job, plan, device, mesh, Ticks(progress))
    evaluation = training.evaluation
    samples, held_out = training_samples(
        job.data.tokens, job.workload.seq_len, validation=job.data.validation, seed=job.seed,
        validation_sequences=job.evaluated_sequences,
    )  # fmt: skip
    saver, hosts = Saver(job, training.saving, progress.tick), Hosts()
    next_sample = saver.resume(trainer)
    first_step = trainer.next_step
    reporter = Reporter(job, training, first_step)
    if first_step:
        reporter.say(f"going on after step {first_step} of {job.steps}, from {saver.folder}")
    for line in saver.skipped:
        reporter.say(line)
    if training.self_check and saver.plan != plan.slug:
        reporter.say(self_check(job, plan, device, mesh, progress.tick).sentence)
    meter = Meter(trainer=trainer, hosts=hosts, logging=training.logging)
    measured = MeasuredSteps(trainer=trainer, meter=meter, steps_left=job.steps - first_step)
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
        trainer.objective.rows(samples.rows), first_sample=next_sample, global_batch=trainer.job.workload.global_batch,
        share=layout.data_share(dist.get_rank()), num_shares=layout.dp, device=trainer.model.device,
    )  # fmt: skip


def _validate(trainer: Trainer, held_out: Samples, evaluation: Evaluation, progress: Progress) -> float:
    with _feed(trainer, held_out, 0) as feed:

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(evaluation.batches):
                progress.tick(f"evaluation {number}")
                yield trainer.objective.split(feed.take())

        return evaluate(trainer.model, batches())


def _tell(records: tuple[StepRecord, ...], reporter: Reporter, measured: MeasuredSteps, poll: Poll) -> None:
    if records:
        reporter.add_steps(records)
        measured.add(records)
        poll.learn(min(record.seconds for record in records))
