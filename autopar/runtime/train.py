"""The training worker: ``torchrun -m autopar.runtime.train job.json`` trains under each plan and measures it.

For each plan: warm-up steps, then three inspected steps (collectives counted; memory; spans), then timed steps. Only
the timed steps run as in ordinary training, and only they are timed.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import autopar
from autopar.measurement import Measurement, NodeTraffic, RankMeasurement, write_measurement
from autopar.plan import Plan
from autopar.runtime.inspection import inspect
from autopar.runtime.job import TrainJob, read_job
from autopar.runtime.mesh import build_mesh, used_axes
from autopar.runtime.nodes import INTERFACE_VARIABLE, counter_paths
from autopar.runtime.progress import Progress, report_progress, send_message
from autopar.runtime.text import Corpus, standard_library
from autopar.runtime.trainer import Trainer, build_trainer
from autopar.runtime.worker import BACKENDS, device_name, joined


def main(arguments: Sequence[str]) -> None:
    """Run the job in the file that ``arguments`` names."""
    with report_progress() as progress:
        job = read_job(arguments[0])
        with joined(job.device) as device:
            corpus = standard_library(job.workload.seq_len)
            meshes: dict[Any, DeviceMesh | None] = {}
            for index, plan in enumerate(job.plans):
                progress.update(plan=plan.slug, step=0, doing="building")
                where = {"slug": plan.slug, "index": index, "plans": len(job.plans)}
                _announce({"event": "plan_begin", **where})
                axes = tuple((axis, getattr(plan.layout, axis)) for axis in used_axes(plan.layout))
                if axes not in meshes:
                    meshes[axes] = build_mesh(plan.layout, device.type)
                measurement = _measure(job, plan, corpus, device, meshes[axes], progress, where)
                if dist.get_rank() == 0:
                    write_measurement(job.measurement_file(plan), measurement)
                    _announce(
                        {"event": "plan_end", **where, "step_s": measurement.median_step_s,
                         "loss": measurement.losses[-1], "peak_bytes": measurement.peak_bytes}
                    )  # fmt: skip
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _announce(message: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        send_message(message)


class _Ticks:
    """Tells the launcher of every action, so that a hanging rank can be told from a slow one."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def begin(self, action: str) -> None:
        """An action begins."""
        self._progress.tick(action)

    def end(self, action: str) -> None:
        """Nothing to tell."""


def _measure(
    job: TrainJob,
    plan: Plan,
    corpus: Corpus,
    device: torch.device,
    mesh: DeviceMesh | None,
    progress: Progress,
    where: dict[str, Any],
) -> Measurement:
    trainer = build_trainer(job, plan, corpus, device, mesh, _Ticks(progress))

    def begin(phase: str) -> None:
        progress.update(step=trainer.next_step)
        _announce({"event": "step", **where, "step": trainer.next_step, "steps": job.total_steps, "phase": phase})

    for _ in range(job.warmup):
        begin("warmup")
        trainer.prepare()
        trainer.step()
    begin("inspect")
    rank = inspect(trainer, device, mesh)
    dist.barrier()
    before, times = _interface_counters(), []
    for _ in range(job.steps):
        begin("timed")
        times.append(trainer.timed_step())
    dist.barrier()
    after = _interface_counters()
    progress.tick("collecting")
    return _collect(job, plan, device, trainer, rank, times, _traffic(before, after, job.steps))


def _interface_counters() -> tuple[int, int] | None:
    """Bytes that this node's interface has sent and received; None on all but the node's first rank."""
    interface = os.environ.get(INTERFACE_VARIABLE)
    if interface is None or os.environ.get("LOCAL_RANK") != "0":
        return None
    sent, received = (int(Path(path).read_text(encoding="ascii")) for path in counter_paths(interface))
    return sent, received


def _traffic(before: tuple[int, int] | None, after: tuple[int, int] | None, steps: int) -> NodeTraffic | None:
    if before is None or after is None:
        return None
    return NodeTraffic(
        node=int(os.environ["GROUP_RANK"]),
        sent_bytes=(after[0] - before[0]) / steps,
        received_bytes=(after[1] - before[1]) / steps,
    )


def _collect(
    job: TrainJob,
    plan: Plan,
    device: torch.device,
    trainer: Trainer,
    rank: RankMeasurement,
    times: Sequence[float],
    traffic: NodeTraffic | None,
) -> Measurement:
    """Bring together what all ranks measured: losses averaged over data, the slowest rank's step times."""
    losses = [loss.item() for loss in trainer.losses]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (losses, list(times), rank, traffic))
    all_losses, all_times, ranks, all_traffic = zip(*gathered, strict=True)
    return Measurement(
        slug=plan.slug,
        model=job.model,
        workload=job.workload,
        plan=plan,
        backend=BACKENDS[job.device],
        device=device_name(device),
        versions={"python": platform.python_version(), "torch": torch.__version__, "autopar": autopar.__version__},
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        # Every rank of a pipeline and tensor parallel group has the same loss: the mean of all is that over the data.
        losses=tuple(sum(column) / len(column) for column in zip(*all_losses, strict=True)),
        step_s=tuple(max(column) for column in zip(*all_times, strict=True)),
        ranks=ranks,
        traffic=tuple(node for node in all_traffic if node is not None),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
