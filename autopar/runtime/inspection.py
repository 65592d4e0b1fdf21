"""Three steps of a plan under inspection: the collectives that it calls, the memory that it holds, its spans."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autopar.measurement import RankMeasurement
from autopar.runtime.counting import count_collectives, summed
from autopar.runtime.memory import measure_peak
from autopar.runtime.spans import record_spans
from autopar.runtime.trainer import Trainer


def inspect(trainer: Trainer, device: torch.device, mesh: DeviceMesh | None) -> RankMeasurement:
    """Run three steps and tell what this rank did in them; all ranks call it together."""
    trainer.prepare()
    calls = count_collectives(trainer.step_weighing_gradients, mesh)
    trainer.prepare()
    peak = measure_peak(trainer.step, device, trainer.buckets)
    trainer.prepare()
    spans = record_spans(trainer.step, calls, device, dist.barrier, _everyone)
    parameters, optimizer = trainer.parameter_bytes(), trainer.optimizer_bytes()
    memory = {
        "parameters": parameters,
        "gradients": trainer.gradient_bytes,
        "optimizer": optimizer,
        "buffers": peak.held - parameters - optimizer,
        "transient": peak.highest - peak.held,
    }
    return RankMeasurement(
        rank=dist.get_rank(),
        peak_bytes=peak.highest,
        memory=memory,
        collectives=summed(calls),
        spans=spans,
        moments=peak.moments,
    )


def _everyone(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
