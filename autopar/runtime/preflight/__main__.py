"""The rank of a preflight: ``torchrun -m autopar.runtime.preflight job.json`` gathers facts for ``judge``."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import autopar
from autopar.runtime.launch.interfaces import address_of, mtu_of
from autopar.runtime.launch.nodes import INTERFACE_VARIABLE
from autopar.runtime.launch.progress import Progress, report_progress, send_message
from autopar.runtime.launch.watchdog import guard
from autopar.runtime.launch.worker import device_name, joined, synchronize
from autopar.runtime.preflight.judge import (
    LARGE_BYTES,
    SCHEMA,
    Facts,
    Link,
    PreflightJob,
    RankFacts,
    read_preflight_job,
    rounds,
)
from autopar.runtime.profile.links import wait_for_all
from costmodels.records import write_record

_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.int64), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
_SUM_ELEMENTS = 2**18
_PRODUCT_SIZE = {"cpu": 384, "cuda": 4096}
_PRODUCTS, _PINGS, _SENDS = 12, 20, 3
_SEEN_WITHIN_S = 20.0
"""A shared folder may show a new file late: clients of NFS keep what they know of a folder for some seconds."""


def main(arguments: Sequence[str]) -> None:
    """Gather facts as the job in the file that ``arguments`` names says; rank 0 writes them."""
    with report_progress() as progress:
        job = read_preflight_job(arguments[0])
        guard(progress, timeout_s=job.timeout_s, folder=Path(job.out).parent / "ranks")
        with joined(job.device, job.timeout_s, host_backend=True) as device:
            facts = _gather(job, device, progress)
        if int(os.environ["RANK"]) == 0:
            write_record(job.out, facts, SCHEMA)


def _gather(job: PreflightJob, device: torch.device, progress: Progress) -> Facts:
    parts = ("folder", "clocks", "sums", "products", "links")

    def begin(part: str) -> None:
        progress.update(plan="preflight", step=parts.index(part), doing=part)
        if dist.get_rank() == 0:
            send_message({"preflight": part, "done": parts.index(part), "of": len(parts)})

    node, num_nodes = _node_of_ranks()
    begin("folder")
    seen = _nodes_seen(Path(job.folder), node, num_nodes)
    begin("clocks")
    offset = _clock_offset()
    begin("sums")
    wrong = {str(dtype).removeprefix("torch."): lost for dtype in _DTYPES[device.type]
             if (lost := _lost_share(dtype, device)) is not None}  # fmt: skip
    begin("products")
    compute_s = _product_seconds(device)
    begin("links")
    links = _links(device, node, num_nodes, progress)
    own = RankFacts(
        rank=dist.get_rank(), node=node, host=socket.gethostname(), **_interface(),
        device=device_name(device), versions=_versions(device), clock_offset_s=offset, free_memory=_free_memory(),
        free_disk=float(shutil.disk_usage(job.folder).free), compute_s=compute_s, nodes_seen=seen, wrong_sums=wrong,
    )  # fmt: skip
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (own, links))
    return Facts(
        ranks=tuple(facts for facts, _ in everyone), links=tuple(link for _, some in everyone for link in some)
    )


def _node_of_ranks() -> tuple[int, int]:
    """This rank's node, nodes numbered in the order of their ranks, and how many there are."""
    return int(os.environ.get("GROUP_RANK", "0")), int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _interface() -> dict[str, Any]:
    name = os.environ.get(INTERFACE_VARIABLE) or os.environ.get("GLOO_SOCKET_IFNAME", "")
    return {"interface": name, "address": address_of(name) if name else "", "mtu": mtu_of(name) if name else 0}


def _versions(device: torch.device) -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "autopar": autopar.__version__}
    if device.type == "cuda":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _nodes_seen(folder: Path, node: int, num_nodes: int) -> tuple[int, ...]:
    """Nodes whose file is in the folder as this rank sees it; the files are removed."""
    names: list[Any] = [os.urandom(8).hex()]
    dist.broadcast_object_list(names, 0)
    own = folder / f".preflight-{names[0]}-{node}"
    if _local_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        own.touch()
    wait_for_all()
    seen, end = set[int](), time.monotonic() + _SEEN_WITHIN_S
    while len(seen) < num_nodes and time.monotonic() < end:
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        seen = {other for other in range(num_nodes) if f".preflight-{names[0]}-{other}" in found}
        if len(seen) < num_nodes:
            time.sleep(0.2)
    wait_for_all()
    if _local_rank() == 0:
        own.unlink(missing_ok=True)
    return tuple(sorted(seen))


def _clock_offset() -> float:
    """Seconds that this clock is ahead of rank 0's: the exchange with the shortest way there and back counts."""
    rank, offset = dist.get_rank(), 0.0
    for other in range(1, dist.get_world_size()):
        if rank in (0, other):
            best = float("inf")
            for _ in range(_PINGS):
                sent = time.time()
                theirs = _exchange_times(rank, other)
                way = time.time() - sent
                if rank == other and way < best:
                    best, offset = way, sent + way / 2 - theirs
    return offset


def _exchange_times(rank: int, other: int) -> float:
    """Rank ``other`` asks rank 0 for its clock; returns the answer there."""
    message = torch.zeros(1, dtype=torch.float64)
    if rank == 0:
        dist.recv(message, other)
        dist.send(torch.tensor([time.time()], dtype=torch.float64), other)
    else:
        dist.send(message, 0)
        dist.recv(message, 0)
    return float(message.item())


def _lost_share(dtype: torch.dtype, device: torch.device) -> int | None:
    """The rank whose share an all-reduce lost or changed; None if the sum is right.

    Element i is 1 on rank i modulo the number of ranks and 0 elsewhere, so that every sum is 1 in any type.
    """
    world = dist.get_world_size()
    owner = torch.arange(_SUM_ELEMENTS, device=device) % world
    value = (owner == dist.get_rank()).to(dtype)
    dist.all_reduce(value)
    wrong = owner[value != 1]
    return int(wrong[0].item()) if wrong.numel() else None


def _product_seconds(device: torch.device) -> float:
    """The fastest of several equal matrix products, all ranks at once."""
    size = _PRODUCT_SIZE[device.type]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    factor = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    wait_for_all()
    for _ in range(_PRODUCTS):
        synchronize(device)
        start = time.perf_counter()
        factor @ factor
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _links(device: torch.device, node: int, num_nodes: int, progress: Progress) -> list[Link]:
    """Links from this rank's node, measured by the first rank of each node, pairs that share no node at once."""
    firsts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(firsts, (node, _local_rank()))
    rank_of = {where: rank for rank, (where, local) in enumerate(firsts) if local == 0}
    found = []
    for pairs in rounds(num_nodes):
        mine = next((pair for pair in pairs if node in pair), None)
        if mine is not None and _local_rank() == 0:
            peer = mine[1] if node == mine[0] else mine[0]
            for source in mine:
                progress.tick(f"link of nodes {mine[0]} and {mine[1]}")
                seconds = [_one_way(device, rank_of[peer], source == node, size) for size in (4, LARGE_BYTES)]
                if source == node:
                    found.append(Link(source=node, target=peer, alpha_s=seconds[0], seconds=seconds[1]))
        wait_for_all()
    return found


def _one_way(device: torch.device, peer: int, sends: bool, num_bytes: int) -> float:
    """Seconds of a message and its answer of 4 bytes, the fastest of several; half of them if both are small."""
    message, answer = torch.zeros(num_bytes // 4, device=device), torch.zeros(1, device=device)
    best = float("inf")
    for _ in range(_PINGS if num_bytes <= 4 else _SENDS):
        start = time.perf_counter()
        for tensor, sent in ((message, sends), (answer, not sends)):
            (dist.send if sent else dist.recv)(tensor, peer)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best / 2 if num_bytes <= 4 else best


def _free_memory() -> float:
    """Bytes of host memory that a new process could get; infinite where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024.0 * float(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return float("inf")


if __name__ == "__main__":
    main(sys.argv[1:])
