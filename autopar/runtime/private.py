"""Everything of torch that is private or unstable, in one place. Tried on torch 2.11 and 2.13."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.bias import causal_lower_right
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile
from torch.utils._python_dispatch import _disable_current_modes


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilerEvent:
    """One raw event of the profiler: times in nanoseconds on its own clock, memory change in bytes.

    ``annotation`` is a label that somebody put around others, not work; ``thread`` is of the host.
    """

    name: str
    start_ns: int
    duration_ns: int
    num_bytes: int
    asynchronous: bool
    on_cpu: bool
    thread: int = 0
    annotation: bool = False


def profiler_events(profiler: profile) -> list[ProfilerEvent]:
    """All events of an ended profiler in order of their start (its public lists leave out memory and clock)."""
    raw: Iterable[Any] = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    found = [
        ProfilerEvent(
            name=event.name(),
            start_ns=event.start_ns(),
            duration_ns=event.duration_ns(),
            num_bytes=event.nbytes(),
            asynchronous=event.is_async(),
            on_cpu="CPU" in str(event.device_type()),
            thread=event.start_thread_id(),
            annotation=event.is_user_annotation(),
        )
        for event in raw
    ]
    return sorted(found, key=lambda event: event.start_ns)


def group_of(argument: Any) -> dist.ProcessGroup:
    """The process group in an argument of a dispatched ``c10d`` operator."""
    return dist.ProcessGroup.unbox(argument)


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of a name, which is how functional collectives know it."""
    group: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return group


def merged_axes(mesh: DeviceMesh, axes: tuple[str, ...], name: str) -> DeviceMesh:
    """One axis ``name`` over several (or one) of a mesh, with a process group of its own; made once per mesh."""
    flat: DeviceMesh = mesh[axes]._flatten(name, backend_override=dist.get_backend(mesh.get_group(axes[0])))
    return flat


def joined_meshes(slow: DeviceMesh, fast: DeviceMesh) -> DeviceMesh:
    """A mesh of two parts of one mesh, the axes of ``slow`` first."""
    return DeviceMesh._concatenate([slow, fast])


def gather_first(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Parts of all ranks of a group, one after another along the first dimension."""
    return funcol.wait_tensor(funcol.all_gather_tensor(part, 0, group))


def scatter_first(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, along the first dimension, of the sum of a tensor over the ranks of a group."""
    return funcol.wait_tensor(funcol.reduce_scatter_tensor(whole, "sum", 0, group))


def lower_right_mask(rows: int, columns: int) -> Tensor:
    """A causal mask of the last ``rows`` of ``columns`` tokens that fused kernels know; also under a dispatch mode."""
    with _disable_current_modes():
        return causal_lower_right(rows, columns)  # type: ignore[no-untyped-call]


def meshes_kept_with(mesh: DeviceMesh) -> dict[str, DeviceMesh]:
    """Other meshes over the ranks of a mesh, by name; they live as long as it does."""
    kept: dict[str, DeviceMesh] = mesh.__dict__.setdefault("_autopar_meshes", {})
    return kept


def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Have DistributedDataParallel, when it wraps a module, leave some of its parameters alone."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def storage_of(tensor: Tensor) -> Hashable:
    """Stands for a tensor's storage; equal for views of the same, and of no other as long as it is held."""
    return StorageWeakRef(tensor.untyped_storage())


def fake_store() -> Any:
    """The store of the ``fake`` process group, which communicates with nobody."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    return FakeStore()


def shapes_alone() -> AbstractContextManager[Any]:
    """Context in which tensors have no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def has_dropout(module: nn.Module) -> bool:
    """Whether a module drops anything in training, so that recomputation has to restore the random state."""
    return any(isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0 for child in module.modules())


def is_strided_shard(placement: Placement) -> bool:
    """Whether an axis of a mesh divides what a later axis has divided before, as FSDP does over tensor parallelism."""
    return isinstance(placement, _StridedShard)


def pipeline_runtime(
    stages: Sequence[PipelineStage],
    rows: Sequence[Sequence[str]],
    num_microbatches: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> _PipelineScheduleRuntime:
    """What runs a schedule given as data; its ``step`` takes the local batch. Gradients are not scaled.

    Args:
        stages: of this rank, in the order of the model.
        rows: for every rank of the pipeline its actions, as ``autopar.schedule.notation`` writes them.
        num_microbatches: per step.
        loss_fn: of one microbatch.
    """
    runtime = _PipelineScheduleRuntime(list(stages), num_microbatches, loss_fn=loss_fn, scale_grads=False)
    runtime._prepare_schedule_with_comms(
        {rank: [_Action.from_str(step) for step in row] for rank, row in enumerate(rows)}
    )
    return runtime


def multiply_all(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all tensors by a scalar in place, in few kernels."""
    if tensors:
        torch._foreach_mul_(list(tensors), factor)
