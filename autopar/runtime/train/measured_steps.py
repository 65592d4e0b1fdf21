"""The first steps of a real training as a measurement of its plan."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from autopar.measurement import RankMeasurement, write_measurement
from autopar.runtime.job import INSPECTED_STEPS
from autopar.runtime.step.inspection import Inspection
from autopar.runtime.step.trainer import Step, Trainer
from autopar.runtime.train.measuring import collect
from autopar.runtime.train.meter import Meter
from autopar.runtime.train.metrics import StepRecord

MEASURED_STEPS = 100
"""Timed steps that go into measurement.json, which is written as soon as they are made."""


@dataclass(kw_only=True, slots=True)
class MeasuredSteps:
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
