"""What every rank does first and last: find its device, join the others, leave them. For programs under torchrun."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from autopar.errors import RunError
from autopar.runtime.launch.rendezvous import fresh_store

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
JOIN_TIMEOUT_S = 300.0
# Collectives give up after the watchers of progress, whose message says more.
_LATER_S = 30.0


@contextmanager
def joined(device_type: str, timeout_s: float | None = None, *, host_backend: bool = False) -> Iterator[torch.device]:
    """Join the ranks that torchrun started, on gloo for the CPU or NCCL for CUDA, and leave them at the end.

    Args:
        device_type: cpu or cuda.
        timeout_s: without progress that the run's watchers allow; a collective over all ranks fails 30 seconds
            later. None: torch's own timeouts.
        host_backend: also gloo beside NCCL, for tensors in host memory.

    Yields:
        This rank's device.

    Raises:
        RunError: there is no CUDA device for this rank.
    """
    device = torch.device(device_type)
    if device_type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise RunError(
                f"local rank {local_rank} has no CUDA device: there are {torch.cuda.device_count()}; start fewer ranks "
                "per node or use the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store = fresh_store(JOIN_TIMEOUT_S)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if host_backend and device_type == "cuda" else BACKENDS[device_type],
        store=store,
        rank=int(os.environ["RANK"]) if store else -1,
        world_size=int(os.environ["WORLD_SIZE"]) if store else -1,
        timeout=None if timeout_s is None else timedelta(seconds=timeout_s + _LATER_S),
        device_id=device if device_type == "cuda" else None,
    )
    yield device
    # Not after a failure: peers that wait for this rank could keep it from leaving.
    dist.destroy_process_group()


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on a device has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
