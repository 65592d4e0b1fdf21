"""Counting the collectives that a step really calls, whoever calls them: DTensor, FSDP2, DDP's reducer, pipelines.

All of them pass through PyTorch's dispatcher, where a TorchDispatchMode sees the operator, its tensors and its group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.errors import RunError
from autopar.measurement import CountedCollective
from autopar.runtime.parallel.mesh import EMBEDDING_AXIS, group_labels
from autopar.runtime.private import group_named, group_of

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
# Operators of the dispatcher: kind, and the positions of the whole (unsharded) payload and of the group.
_PAYLOADS: Mapping[str, tuple[str, int, int]] = {
    "c10d::allreduce_": ("all_reduce", 0, 1),
    "c10d::allreduce_coalesced_": ("all_reduce", 0, 1),
    "c10d::_allgather_base_": ("all_gather", 0, 2),
    "c10d::allgather_": ("all_gather", 0, 2),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0, 2),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "c10d::reduce_scatter_": ("reduce_scatter", 1, 2),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 2),
    "c10d::broadcast_": ("broadcast", 0, 1),
    "c10d::alltoall_base_": ("all_to_all", 1, 2),
    "c10d::alltoall_": ("all_to_all", 1, 2),
    "c10d::send": ("send", 0, 1),
    "c10d::recv_": ("recv", 0, 1),
}
# Functional collectives: kind, position of the payload, of the group's name, and of the group's size if the payload
# is one rank's part of the whole.
_FUNCTIONAL: Mapping[str, tuple[str, int, int, int | None]] = {
    "all_reduce": ("all_reduce", 0, 2, None),
    "all_reduce_": ("all_reduce", 0, 2, None),
    "all_reduce_coalesced": ("all_reduce", 0, 2, None),
    "all_gather_into_tensor": ("all_gather", 0, 2, 1),
    "all_gather_into_tensor_out": ("all_gather", 0, 2, 1),
    "all_gather_into_tensor_coalesced": ("all_gather", 0, 2, 1),
    "reduce_scatter_tensor": ("reduce_scatter", 0, 3, None),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 0, 3, None),
    "broadcast": ("broadcast", 0, 2, None),
    "all_to_all_single": ("all_to_all", 0, 3, None),
}
_SILENT = ("c10d::barrier", "c10d::monitored_barrier_")
_WAITS = ("wait_tensor", "_wrap_tensor_autograd")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of a collective, see CountedCollective."""

    kind: str
    axis: str
    group_size: int
    num_bytes: int


class CollectiveCounter(TorchDispatchMode):
    """Context in which every collective of this rank is noted, in the order of the calls.

    Args:
        mesh: gives groups the names of its axes.

    Raises:
        RunError: on a collective that it does not know, rather than missing it.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._names, self._ranks = group_labels(mesh)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note a collective and run the operator."""
        # A mode comes before subclasses: let DTensor first turn its operator into those that this is about.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in NAMESPACES:
            self._note(func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._schema.name
        if name in _PAYLOADS:
            kind, payload, group = _PAYLOADS[name]
            self._add(kind, _num_bytes(args[payload]), group_of(args[group]))
        elif func.namespace != "c10d" and name.partition("::")[2] in _FUNCTIONAL:
            kind, payload, group, size = _FUNCTIONAL[name.partition("::")[2]]
            parts = args[size] if size is not None else 1
            self._add(kind, parts * _num_bytes(args[payload]), group_named(args[group]))
        elif name not in _SILENT and name.partition("::")[2] not in _WAITS:
            raise RunError(f"the step calls the collective {name}, which is not counted yet")

    def _add(self, kind: str, num_bytes: int, group: dist.ProcessGroup) -> None:
        ranks = tuple(dist.get_process_group_ranks(group))
        axis = self._names.get(group.group_name) or self._ranks.get(ranks, "world")
        # By its ranks it may be a pipeline of two.
        axis = EMBEDDING_AXIS if group.group_desc == EMBEDDING_AXIS else axis
        self.calls.append(Call(kind=kind, axis=axis, group_size=group.size(), num_bytes=num_bytes))


def _num_bytes(payload: Any) -> int:
    if isinstance(payload, Tensor):
        return payload.numel() * payload.element_size()
    return sum(_num_bytes(item) for item in payload)


def summed(calls: Iterable[Call]) -> tuple[CountedCollective, ...]:
    """Calls of the same kind, axis and group size together, in a fixed order."""
    totals: dict[tuple[str, str, int], tuple[int, int]] = {}
    for call in calls:
        key = (call.axis, call.kind, call.group_size)
        count, num_bytes = totals.get(key, (0, 0))
        totals[key] = (count + 1, num_bytes + call.num_bytes)
    return tuple(
        CountedCollective(kind=kind, axis=axis, group_size=size, count=count, num_bytes=num_bytes)
        for (axis, kind, size), (count, num_bytes) in sorted(totals.items())
    )


def count_collectives(step: Callable[[], None], mesh: DeviceMesh | None) -> list[Call]:
    """Run a step and return its collectives in the order of the calls."""
    counter = CollectiveCounter(mesh)
    with counter:
        step()
    return counter.calls
