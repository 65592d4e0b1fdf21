"""Three steps of a plan under inspection: the collectives that it calls, the memory that it holds, its spans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from autopar.measurement import RankMeasurement, Span
from autopar.runtime.observe.counting import Call, count_collectives, summed
from autopar.runtime.observe.memory import Peak, local_bytes, measure_peak, storages
from autopar.runtime.observe.spans import record_spans
from autopar.runtime.parallel.pipeline import Observer
from autopar.runtime.step.trainer import Step, Trainer


@dataclass(kw_only=True, slots=True)
class Inspection:
    """Three steps in a row, each looked at in its own way, since looking costs time and memory. They train as usual.

    Attributes:
        gradient_bytes: of this rank.
        buckets: storages that DDP keeps between steps for its gradients.
    """

    trainer: Trainer
    calls: list[Call] = field(default_factory=list)
    gradient_bytes: int = 0
    buckets: dict[int, int] = field(default_factory=dict)
    peak: Peak | None = None
    spans: tuple[Span, ...] = ()

    def step(self, index: int, batch: Tensor) -> Step:
        """Inspected step ``index``, 0 to 2: collectives and gradients, then memory, then spans. All ranks together."""
        done: list[Step] = []
        device = self.trainer.model.device

        def run(observer: Observer | None = None) -> None:
            done.append(self.trainer.step(batch, observer, self._weigh if index == 0 else None))

        if index == 0:
            self.calls = count_collectives(run, self.trainer.model.mesh)
        elif index == 1:
            self.peak = measure_peak(run, device, self.buckets)
        else:
            self.spans = record_spans(run, self.calls, device, dist.barrier, _everyone)
        return done[0]

    def _weigh(self) -> None:
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        plan = self.trainer.plan
        self.gradient_bytes = local_bytes(gradients)
        self.buckets = storages(gradients) if plan.zero_stage == 0 and plan.layout.dp > 1 else {}

    def result(self) -> RankMeasurement:
        """What this rank did, after the third step."""
        assert self.peak is not None
        parameters, optimizer = self.trainer.parameter_bytes(), self.trainer.optimizer_bytes()
        memory = {
            "parameters": parameters,
            "gradients": self.gradient_bytes,
            "optimizer": optimizer,
            "buffers": self.peak.held - parameters - optimizer,
            "transient": self.peak.highest - self.peak.held,
        }
        return RankMeasurement(
            rank=dist.get_rank(),
            peak_bytes=self.peak.highest,
            memory=memory,
            collectives=summed(self.calls),
            spans=self.spans,
            moments=self.peak.moments,
        )


def _everyone(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
