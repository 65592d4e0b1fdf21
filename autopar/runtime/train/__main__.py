"""The training worker: ``torchrun -m autopar.runtime.train job.json`` trains under a plan, or measures several."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autopar.measurement import write_measurement
from autopar.plan import Plan
from autopar.runtime.data.corpus import Rows, measured_rows
from autopar.runtime.job import TrainJob, read_job
from autopar.runtime.launch.progress import Progress, Ticks, announce, report_progress
from autopar.runtime.launch.watchdog import guard
from autopar.runtime.launch.worker import joined
from autopar.runtime.parallel.mesh import build_mesh, used_axes
from autopar.runtime.step.trainer import build_trainer
from autopar.runtime.train.measuring import measure
from autopar.runtime.train.training import train


def main(arguments: Sequence[str]) -> None:
    """Run the job in the file that ``arguments`` names."""
    with report_progress() as progress:
        job = read_job(arguments[0])
        guard(progress, timeout_s=job.timeout_s, folder=job.status_folder)
        with joined(job.device, job.timeout_s) as device:
            if job.training is not None:
                train(job, job.training, device, progress)
            else:
                _measure_all(job, device, progress)


def _measure_all(job: TrainJob, device: torch.device, progress: Progress) -> None:
    """Every plan, one after another; plans of the same axes share their process groups."""
    rows = measured_rows(job.data.tokens, job.workload.seq_len, job.seed)
    meshes: dict[Any, DeviceMesh | None] = {}
    for index, plan in enumerate(job.plans):
        axes = tuple((axis, getattr(plan.layout, axis)) for axis in used_axes(plan.layout))
        if axes not in meshes:
            meshes[axes] = build_mesh(plan.layout, device.type)
        _measure(job, plan, rows, device, meshes[axes], progress, {"index": index, "plans": len(job.plans)})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    job: TrainJob,
    plan: Plan,
    rows: Rows,
    device: torch.device,
    mesh: DeviceMesh | None,
    progress: Progress,
    place: dict[str, int],
) -> None:
    progress.update(plan=plan.slug, step=0, doing="building")
    announce({"event": "plan_begin", "slug": plan.slug, **place})
    trainer = build_trainer(job, plan, device, mesh, Ticks(progress))
    samples = trainer.objective.rows(rows)
    batch, size = job.workload.global_batch, job.workload.global_batch // plan.layout.dp
    offset = plan.layout.data_share(dist.get_rank()) * size

    def begin(phase: str) -> None:
        progress.update(step=trainer.next_step, doing=phase)
        announce(
            {"event": "step", "slug": plan.slug, **place, "step": trainer.next_step, "steps": job.total_steps,
             "phase": phase}
        )  # fmt: skip

    def batch_of(step: int) -> Tensor:
        return torch.from_numpy(samples(step * batch + offset, size)).to(device)

    found = measure(trainer, batch_of, begin)
    if dist.get_rank() == 0:
        write_measurement(job.measurement_file(plan), found)
        announce(
            {"event": "plan_end", "slug": plan.slug, **place, "step_s": found.median_step_s,
             "loss": found.losses[-1], "peak_bytes": found.peak_bytes}
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
