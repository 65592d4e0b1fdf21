"""Memory that a step really holds: live tensor bytes on a CPU, the allocator's peak on CUDA.

On a CPU the bytes of all tensors that are alive before the step are counted, and the profiler reports every allocation
and release during it; the peak is the highest sum. Buckets that DDP keeps between steps are alive but out of Python's
sight, and are told by the caller.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from autopar.runtime.private import profiler_events
from autopar.runtime.tensor_parallel import local_tensor

MEMORY_EVENT = "[memory]"


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Addresses and bytes of the storages of tensors, each once; of DTensors, of this rank's part."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        local = local_tensor(tensor)
        if local.device.type != "meta" and local.layout == torch.strided:
            storage = local.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of tensors; of DTensors, of this rank's part."""
    return sum(local.numel() * local.element_size() for local in map(local_tensor, tensors))


def live_storages() -> dict[int, int]:
    """Storages of all tensors on the CPU that Python knows of."""
    gc.collect()
    # Subclasses with their own dispatch (DTensor, results that are still being communicated) only wrap other tensors.
    found = [o for o in gc.get_objects() if getattr(type(o), "__torch_dispatch__", None) is Tensor.__torch_dispatch__]
    tensors = [o for o in found if issubclass(type(o), Tensor)]
    return storages(tensor for tensor in tensors if tensor.device.type == "cpu")


def measure_peak(step: Callable[[], None], device: torch.device, unseen: Mapping[int, int]) -> tuple[int, int]:
    """Run a step and tell the bytes held before it and its peak.

    Args:
        step: what to run; nothing that is alive before it may be released in it.
        device: where its tensors are.
        unseen: storages that are alive before, but perhaps not as tensors of Python (for the CPU; CUDA's allocator
            sees everything).
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return held, torch.cuda.max_memory_allocated(device)
    held = sum((live_storages() | dict(unseen)).values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    running = highest = 0
    for event in profiler_events(profiler):
        if event.name == MEMORY_EVENT and event.on_cpu:
            running += event.num_bytes
            highest = max(highest, running)
    return held, held + highest
