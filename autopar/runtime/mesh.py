"""The DeviceMesh of a layout: axes named as in ``autopar.layout``, those of degree 1 left out."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar.errors import PlanError
from autopar.layout import AXES, Layout

DATA_AXES = ("dp_replicate", "dp_shard")


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh | None:
    """Make the mesh of a layout over all ranks; None for a single rank, which needs no communication.

    Raises:
        PlanError: the layout is not of as many ranks as there are.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if layout.world_size != world_size:
        hint = "" if dist.is_initialized() else "; start under torchrun and call torch.distributed.init_process_group"
        raise PlanError(f"the plan is for {layout.world_size} ranks, but there are {world_size}{hint}")
    axes = used_axes(layout)
    if not axes:
        return None
    return init_device_mesh(device_type, tuple(getattr(layout, axis) for axis in axes), mesh_dim_names=axes)


def used_axes(layout: Layout) -> tuple[str, ...]:
    """Axes with more than one rank, slowest varying first."""
    return tuple(axis for axis in AXES if getattr(layout, axis) > 1)


def submesh(mesh: DeviceMesh, *axes: str) -> DeviceMesh | None:
    """The part of a mesh that spans those of ``axes`` that it has; None if it has none of them."""
    names = tuple(axis for axis in axes if axis in (mesh.mesh_dim_names or ()))
    if not names:
        return None
    return mesh[names[0]] if len(names) == 1 else mesh[names]
