"""Memory that a step really holds: live tensor bytes on a CPU, the allocator's peak on CUDA.

On a CPU the bytes of all tensors that are alive before the step are counted, and the profiler reports every allocation
and release during it; the peak is the highest sum. Buckets that DDP keeps between steps are alive but out of Python's
sight, and are told by the caller.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from autopar.measurement import Moment
from autopar.runtime.parallel.tensor_parallel import local_tensor
from autopar.runtime.private import ProfilerEvent, profiler_events

MEMORY_EVENT = "[memory]"
BEGIN_MARK, END_MARK = "autopar begins: ", "autopar ends: "


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Bytes held before a step, the highest sum during it, and what was allocated around each of its actions."""

    held: int
    highest: int
    moments: tuple[Moment, ...]


def measure_peak(step: Callable[[Any], None], device: torch.device, unseen: Mapping[int, int]) -> Peak:
    """Run a step and tell the bytes held before it, its peak, and the bytes around its actions.

    Args:
        step: what to run, under an observer of actions; nothing that is alive before it may be released in it.
        device: where its tensors are.
        unseen: storages that are alive before, but perhaps not as tensors of Python (for the CPU; CUDA's allocator
            sees everything).
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        recorder = _AllocatorRecorder(device=device, held=held)
        step(recorder)
        return Peak(held=held, highest=held + recorder.highest(), moments=tuple(recorder.moments))
    held = sum((live_storages() | dict(unseen)).values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(_Marks())
    highest, moments = _read_curve(profiler_events(profiler))
    return Peak(held=held, highest=held + highest, moments=moments)


@dataclass(kw_only=True, slots=True)
class _AllocatorRecorder:
    """An observer that asks CUDA's allocator, whose books are the host's: nothing waits for the device."""

    device: torch.device
    held: int
    moments: list[Moment] = field(default_factory=list)
    between: int = 0
    _begin: int = 0

    def __post_init__(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def begin(self, action: str) -> None:
        """Note what is allocated."""
        self.between = max(self.between, self._restart())
        self._begin = torch.cuda.memory_allocated(self.device) - self.held

    def end(self, action: str) -> None:
        """Note what is allocated, and the most that was since the beginning."""
        end, peak = torch.cuda.memory_allocated(self.device) - self.held, self._restart()
        self.moments.append(Moment(name=action, begin_bytes=self._begin, peak_bytes=peak, end_bytes=end))

    def highest(self) -> int:
        """The most that was allocated, in actions or between them."""
        return max(self.between, self._restart(), *(moment.peak_bytes for moment in self.moments), 0)

    def _restart(self) -> int:
        highest = torch.cuda.max_memory_allocated(self.device) - self.held
        torch.cuda.reset_peak_memory_stats(self.device)
        return highest


class _Marks:
    """An observer that leaves marks among the profiler's events."""

    def begin(self, action: str) -> None:
        """Mark the beginning."""
        _mark(f"{BEGIN_MARK}{action}")

    def end(self, action: str) -> None:
        """Mark the end."""
        _mark(f"{END_MARK}{action}")


def _mark(name: str) -> None:
    with record_function(name):
        pass


def _read_curve(events: Iterable[ProfilerEvent]) -> tuple[int, tuple[Moment, ...]]:
    """Highest sum of allocations and releases, and the sums around marked actions."""
    running = highest = begin = peak = 0
    moments = []
    for event in events:
        if event.name == MEMORY_EVENT and event.on_cpu:
            running += event.num_bytes
            highest, peak = max(highest, running), max(peak, running)
        elif event.name.startswith(BEGIN_MARK):
            begin = peak = running
        elif event.name.startswith(END_MARK):
            name = event.name.removeprefix(END_MARK)
            moments.append(Moment(name=name, begin_bytes=begin, peak_bytes=peak, end_bytes=running))
    return highest, tuple(moments)
