"""Host seconds that PyTorch's parallel layers add per call: DTensor, FSDP2, pipeline schedules.

Measured on one rank, in groups of one, with layers so small that little but the host's work is left; the time of the
plain layers is subtracted. What a collective itself costs is measured elsewhere.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from autopar.runtime.profile.stopwatch import Clock

_TOKENS, _WIDTH, _LAYERS, _MICROBATCHES = 16, 64, 4, 8


def measure_overheads(clock: Clock, mesh: DeviceMesh, group: ProcessGroup, repeats: int) -> dict[str, float]:
    """Measure all overheads on this rank, which is alone in ``mesh`` (one axis) and ``group``.

    Returns:
        Seconds per call, by the keys that MachineProfile.host_overheads lists; never below zero.
    """
    found = {
        **_tensor_parallel(clock, mesh, repeats),
        **_fully_sharded(clock, mesh, repeats),
        "pipeline.action": _pipeline(clock, group, repeats),
    }
    return {name: max(0.0, seconds) for name, seconds in found.items()}


def _layers(clock: Clock) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS))).to(clock.device)


def _input(clock: Clock) -> Tensor:
    return torch.rand(1, _TOKENS, _WIDTH, device=clock.device, requires_grad=True)


def _passes(clock: Clock, module: nn.Module, repeats: int) -> tuple[float, float]:
    """Median host seconds of a forward and of a backward."""
    forwards, backwards = [], []
    x = _input(clock)
    for repeat in range(repeats + 3):
        output, ahead = clock.time(partial(module, x))
        gradient = torch.ones_like(output)
        _, back = clock.time(partial(output.backward, gradient))
        if repeat >= 3:
            forwards.append(ahead)
            backwards.append(back)
        module.zero_grad(set_to_none=True)
    return statistics.median(clock.read(forwards)), statistics.median(clock.read(backwards))


def _difference(clock: Clock, plain: nn.Module, changed: nn.Module, calls: int, repeats: int) -> tuple[float, float]:
    """Extra seconds per call in forward and in backward of a changed module over a plain one."""
    before, after = _passes(clock, plain, repeats), _passes(clock, changed, repeats)
    return (after[0] - before[0]) / calls, (after[1] - before[1]) / calls


def _tensor_parallel(clock: Clock, mesh: DeviceMesh, repeats: int) -> dict[str, float]:
    plain = _layers(clock)
    styles: dict[str, ParallelStyle] = {
        str(i): RowwiseParallel() if i % 2 else ColwiseParallel() for i in range(_LAYERS)
    }
    linear = _difference(clock, plain, parallelize_module(copy.deepcopy(plain), mesh, styles), _LAYERS, repeats)
    norms = nn.Sequential(*(nn.LayerNorm(_WIDTH) for _ in range(_LAYERS))).to(clock.device)
    sharded = parallelize_module(copy.deepcopy(norms), mesh, {str(i): SequenceParallel() for i in range(_LAYERS)})
    norm = _difference(clock, norms, sharded, _LAYERS, repeats)
    return {
        "tensor_parallel.linear.forward": linear[0],
        "tensor_parallel.linear.backward": linear[1],
        "tensor_parallel.norm.forward": norm[0],
        "tensor_parallel.norm.backward": norm[1],
    }


def _fully_sharded(clock: Clock, mesh: DeviceMesh, repeats: int) -> dict[str, float]:
    plain = _layers(clock)
    sharded = copy.deepcopy(plain)
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ahead, back = _difference(clock, plain, sharded, _LAYERS, repeats)
    return {"fsdp.module.forward": ahead, "fsdp.module.backward": back}


def _pipeline(clock: Clock, group: ProcessGroup, repeats: int) -> float:
    """Extra seconds per forward or backward of one microbatch that a schedule of one stage takes over a loop."""
    plain = _layers(clock)
    stage = PipelineStage(copy.deepcopy(plain), 0, 1, clock.device, group=group)
    schedule = ScheduleGPipe(stage, _MICROBATCHES, loss_fn=_loss)
    x = torch.rand(_MICROBATCHES, _TOKENS, _WIDTH, device=clock.device)
    target = torch.zeros_like(x)

    def loop() -> None:
        for part, goal in zip(x.chunk(_MICROBATCHES), target.chunk(_MICROBATCHES), strict=True):
            _loss(plain(part), goal).backward()

    scheduled = _median(clock, lambda: schedule.step(x, target=target, losses=[]), repeats)
    return (scheduled - _median(clock, loop, repeats)) / (2 * _MICROBATCHES)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def _median(clock: Clock, call: Callable[[], object], repeats: int) -> float:
    marks: Sequence[object] = [clock.time(call)[1] for _ in range(repeats + 2)]
    return statistics.median(clock.read(marks)[2:])
