"""Step times, losses and norms of an interval, brought together without holding up the steps.

A rank only keeps what a step left on the device. At the end of an interval the copies to the host are queued, and one
step later, when they are long done, the ranks exchange them in one message.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.job import Logging
from autopar.runtime.step.trainer import Step, Trainer
from autopar.runtime.train.agreement import Hosts
from autopar.runtime.train.metrics import StepRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class _Interval:
    """Steps whose numbers are on their way to the host.

    Attributes:
        values: losses and then norms, [2 x steps], on the host once ``done`` has passed.
        marks: begin and end of each step.
    """

    steps: tuple[Step, ...]
    values: Tensor
    marks: tuple[tuple[Any, Any], ...]
    done: Any


@dataclass(kw_only=True, slots=True)
class Meter:
    """Of one rank; every rank calls the same methods at the same steps.

    Attributes:
        peak_bytes: of this rank where no device tells it; 0 if unknown.
    """

    trainer: Trainer
    hosts: Hosts
    logging: Logging
    peak_bytes: int = 0
    _steps: list[Step] = field(default_factory=list)
    _marks: list[tuple[Any, Any]] = field(default_factory=list)
    _begun: Any = None
    _closed: _Interval | None = None

    def begin(self) -> None:
        """A step begins."""
        self._begun = self._mark()

    def end(self, step: Step) -> None:
        """It has ended, as far as the host sees."""
        self._marks.append((self._begun, self._mark()))
        self._steps.append(step)

    def close(self) -> None:
        """End the interval: queue the copies to the host."""
        assert self._closed is None
        if not self._steps:
            return
        nothing = torch.full((), torch.nan, device=self.trainer.model.device)
        norms = [nothing if step.grad_norm is None else step.grad_norm for step in self._steps]
        values = torch.stack([value.float() for value in (*(step.loss for step in self._steps), *norms)])
        done = None
        if self._on_cuda:
            values, done = values.to("cpu", non_blocking=True), torch.cuda.Event()
            done.record()
        self._closed = _Interval(steps=tuple(self._steps), values=values, marks=tuple(self._marks), done=done)
        self._steps, self._marks = [], []

    def collect(self) -> tuple[StepRecord, ...]:
        """Steps of the interval that was closed, the same on every rank; none if none was."""
        interval, self._closed = self._closed, None
        if interval is None:
            return ()
        if interval.done is not None:
            interval.done.synchronize()
        number = len(interval.steps)
        seconds = [self._seconds(*mark) for mark in interval.marks]
        everyone = self.hosts.gather([*interval.values.tolist(), *seconds, self._peak()])
        losses, norms = everyone[:, :number].mean(dim=0).tolist(), everyone[0, number : 2 * number].tolist()
        slowest, fullest = everyone[:, 2 * number : -1].amax(dim=0).tolist(), int(everyone[:, -1].max())
        return tuple(
            self._record(step, loss, norm, longest, fullest)
            for step, loss, norm, longest in zip(interval.steps, losses, norms, slowest, strict=True)
        )

    def _record(self, step: Step, loss: float, norm: float, seconds: float, peak_bytes: int) -> StepRecord:
        logging, peak = self.logging, self.logging.peak_flops * dist.get_world_size()
        return StepRecord(
            step=step.index + 1,
            loss=loss,
            grad_norm=norm if step.grad_norm is not None else None,
            learning_rate=self.trainer.rate(step.index),
            seconds=seconds,
            tokens_per_s=self.trainer.job.workload.tokens / seconds,
            mfu=logging.flops_per_step / seconds / peak if peak and logging.flops_per_step else None,
            memory_bytes=peak_bytes or None,
        )

    @property
    def _on_cuda(self) -> bool:
        return self.trainer.model.device.type == "cuda"

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begun: Any, ended: Any) -> float:
        seconds: float = begun.elapsed_time(ended) / 1e3 if self._on_cuda else ended - begun
        return seconds

    def _peak(self) -> int:
        if self._on_cuda:
            return max(self.peak_bytes, torch.cuda.max_memory_allocated(self.trainer.model.device))
        return self.peak_bytes
