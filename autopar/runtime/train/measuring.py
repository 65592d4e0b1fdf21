"""From steps to a Measurement: the loop that measures a plan, and what all ranks bring together at its end."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import autopar
from autopar.measurement import Measurement, NodeTraffic, RankMeasurement
from autopar.runtime.job import INSPECTED_STEPS
from autopar.runtime.launch.nodes import INTERFACE_VARIABLE, counter_paths
from autopar.runtime.launch.worker import BACKENDS, device_name, synchronize
from autopar.runtime.observe.yardstick import Yardstick
from autopar.runtime.step.inspection import Inspection
from autopar.runtime.step.trainer import Step, Trainer

YARDSTICK_ROUNDS = 3


def measure(trainer: Trainer, batch_of: Callable[[int], Tensor], begin: Callable[[str], None]) -> Measurement:
    """Train under a plan and measure it: warm-up steps, three inspected ones, then timed ones.

    Only the timed steps run as in ordinary training, and only they are timed; all ranks begin each of them together.
    On CPUs the yardstick follows each of them.

    Args:
        trainer: at its first step.
        batch_of: this rank's share of the batch of a step, on the device.
        begin: told the phase of every step as it begins.
    """
    job, inspection = trainer.job, Inspection(trainer=trainer)
    steps: list[Step] = []
    for _ in range(job.warmup):
        begin("warmup")
        steps.append(trainer.step(batch_of(trainer.next_step)))
    for index in range(INSPECTED_STEPS):
        begin("inspect")
        steps.append(inspection.step(index, batch_of(trainer.next_step)))
    rank = inspection.result()
    dist.barrier()
    work = Yardstick() if trainer.model.device.type == "cpu" else None
    before, seconds, yardsticks = interface_counters(), [], list[float]()
    for _ in range(job.steps):
        begin("timed")
        batch = batch_of(trainer.next_step)
        dist.barrier()
        synchronize(trainer.model.device)
        start = time.perf_counter()
        steps.append(trainer.step(batch))
        synchronize(trainer.model.device)
        seconds.append(time.perf_counter() - start)
        if work:
            dist.barrier()
            yardsticks.append(work.seconds(YARDSTICK_ROUNDS))
    dist.barrier()
    traffic = node_traffic(before, interface_counters(), job.steps)
    begin("collecting")
    losses = [step.loss.item() for step in steps]
    norms = [step.grad_norm.item() for step in steps if step.grad_norm is not None]
    return collect(trainer, losses, norms, seconds, rank, traffic, yardsticks)


def collect(
    trainer: Trainer,
    losses: Sequence[float],
    grad_norms: Sequence[float],
    seconds: Sequence[float],
    rank: RankMeasurement,
    traffic: NodeTraffic | None,
    yardsticks: Sequence[float] = (),
) -> Measurement:
    """Bring together what all ranks measured: losses and yardsticks averaged, the slowest rank's step times."""
    job, device = trainer.job, trainer.model.device
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (list(losses), list(seconds), rank, traffic, list(yardsticks)))
    all_losses, all_seconds, ranks, all_traffic, all_yardsticks = zip(*gathered, strict=True)
    return Measurement(
        slug=trainer.plan.slug,
        model=job.model,
        workload=job.workload,
        plan=trainer.plan,
        backend=BACKENDS[job.device],
        device=device_name(device),
        versions={"python": platform.python_version(), "torch": torch.__version__, "autopar": autopar.__version__},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        # Every rank of a pipeline and tensor parallel group has the same loss: the mean of all is that over the data.
        losses=tuple(sum(column) / len(column) for column in zip(*all_losses, strict=True)),
        grad_norms=tuple(grad_norms),
        step_s=tuple(max(column) for column in zip(*all_seconds, strict=True)),
        ranks=ranks,
        traffic=tuple(node for node in all_traffic if node is not None),
        yardstick_s=tuple(sum(column) / len(column) for column in zip(*all_yardsticks, strict=True)),
    )


def interface_counters() -> tuple[int, int] | None:
    """Bytes that this node's interface has sent and received; None on all but the node's first rank."""
    interface = os.environ.get(INTERFACE_VARIABLE)
    if interface is None or os.environ.get("LOCAL_RANK") != "0":
        return None
    sent, received = (int(Path(path).read_text(encoding="ascii")) for path in counter_paths(interface))
    return sent, received


def node_traffic(before: tuple[int, int] | None, after: tuple[int, int] | None, steps: int) -> NodeTraffic | None:
    """Bytes per step between two readings of the counters."""
    if before is None or after is None:
        return None
    return NodeTraffic(
        node=int(os.environ["GROUP_RANK"]),
        sent_bytes=(after[0] - before[0]) / steps,
        received_bytes=(after[1] - before[1]) / steps,
    )
