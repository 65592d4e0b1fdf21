"""The profiling worker: ``torchrun -m autopar.runtime.profile job.json`` measures the machine that it runs on.

Rank 0 measures operations and host overheads while the others wait; then all ranks measure sharing and collectives.
Rank 0 writes the profile with its fits.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from autopar.runtime.launch.progress import Progress, report_progress, send_message
from autopar.runtime.launch.worker import device_name
from autopar.runtime.observe.yardstick import Yardstick
from autopar.runtime.profile.compute import (
    DTYPES,
    Paced,
    at_one_speed,
    make_grid,
    measure_bandwidth,
    measure_compute,
)
from autopar.runtime.profile.links import (
    PACE_ROUNDS,
    QUICK_SIZES,
    SIZES,
    layouts,
    measure_collectives,
    measure_sharing,
    measure_waiting,
    wait_for_all,
)
from autopar.runtime.profile.machine import ProfileJob, read_profile_job
from autopar.runtime.profile.overheads import measure_overheads
from autopar.runtime.profile.stopwatch import Clock
from costmodels.calibration import with_fits
from costmodels.profiles import CollectivePoint, ComputePoint, MachineProfile, SharingPoint, write_profile

_COMPUTE_PARTS = 8
_LINK_BUDGET_S, _QUICK_LINK_BUDGET_S = 0.25, 0.1


def main(path: str) -> None:
    """Measure what the job says and write the profile."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    job = read_profile_job(path)
    with report_progress() as progress:
        device = _start(job)
        try:
            _profile(job, device, _Reporter(progress, job))
        finally:
            dist.destroy_process_group()


class _Reporter:
    """Tells the launcher what is measured now, and on rank 0 whoever started it."""

    def __init__(self, progress: Progress, job: ProfileJob) -> None:
        self._progress, self._done = progress, 0
        groups = layouts(dist.get_world_size(), job.num_nodes)
        self._total = _COMPUTE_PARTS + 2 + sum(6 if group.size == 2 else 5 for group in groups)

    def finished(self, part: str) -> None:
        self._done += 1
        self._progress.update(plan="profile", step=self._done, doing=part)
        if dist.get_rank() == 0:
            send_message({"profile": part, "done": self._done, "of": self._total})


def _start(job: ProfileJob) -> torch.device:
    if job.device == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    return device


def _profile(job: ProfileJob, device: torch.device, reporter: _Reporter) -> None:
    clock, rank, ranks = Clock(device), dist.get_rank(), dist.get_world_size()
    grid = make_grid(job.device, job.quick)
    # Always in fp32, as in runs: what counts is the machine, and bf16 may be twenty times slower on processors.
    work = Yardstick() if job.device == "cpu" else None
    pace = partial(work.seconds, PACE_ROUNDS) if work else None
    mesh = init_device_mesh(job.device, (ranks, 1), mesh_dim_names=("others", "alone"))["alone"]
    compute: tuple[ComputePoint, ...] = ()
    overheads: dict[str, float] = {}
    bandwidth = alone = 0.0
    if rank == 0:
        paced: list[Paced] = []
        for part, points in measure_compute(clock, job.precision, grid, pace):
            paced += points
            reporter.finished(part)
        compute, alone = at_one_speed(paced)
        bandwidth = measure_bandwidth(clock, grid)
        before = pace() if pace else 0.0
        overheads = measure_overheads(clock, mesh, mesh.get_group(), 10 if job.quick else 40)
        if pace:
            factor = 2 * alone / (before + pace())
            overheads = {name: seconds * factor for name, seconds in overheads.items()}
        reporter.finished("host overheads")
    wait_for_all()
    sharing: tuple[SharingPoint, ...] = ()
    if job.device == "cpu" and ranks > 1:
        window = 0.4 if job.quick else 1.5
        sharing = measure_sharing(DTYPES[job.precision], window)
        overheads["collective.wait"] = measure_waiting(device, job.num_nodes, DTYPES[job.precision], window)
    reporter.finished("sharing")
    # On all ranks at once, at the speed that the points are of; rank 0 alone knows it and writes.
    yardstick = alone * max((point.slowdown for point in sharing), default=1.0)
    collectives: list[CollectivePoint] = []
    budget = _QUICK_LINK_BUDGET_S if job.quick else _LINK_BUDGET_S
    sizes = QUICK_SIZES if job.quick else SIZES
    for part, found in measure_collectives(device, job.num_nodes, sizes, budget, job.link_rate):
        collectives += found
        reporter.finished(part)
    if rank == 0:
        profile = MachineProfile(
            device_name=_device_name(device), device=job.device, backend="gloo" if job.device == "cpu" else "nccl",
            precision=job.precision, ranks=ranks, num_nodes=job.num_nodes, cores=len(os.sched_getaffinity(0)),
            memory_bytes=_memory_bytes(device, ranks // job.num_nodes),
            versions={"python": platform.python_version(), "torch": torch.__version__, "autopar": version("autopar")},
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            peaks={"flops": max(p.flops / p.seconds for p in compute), "memory_bandwidth": bandwidth},
            compute=compute, sharing=sharing, collectives=tuple(collectives), link_rate=job.link_rate,
            link_efficiency=job.link_efficiency, host_overheads=overheads, yardstick_s=yardstick,
        )  # fmt: skip
        write_profile(job.out, with_fits(profile))
    wait_for_all()


def _device_name(device: torch.device) -> str:
    return device_name(device) if device.type == "cuda" else f"{device_name(device)} core"


def _memory_bytes(device: torch.device, ranks_per_node: int) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_per_node


if __name__ == "__main__":
    main(sys.argv[1])
