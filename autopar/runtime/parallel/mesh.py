"""The DeviceMesh of a layout: axes named and ordered as in ``autopar.layout``, those of degree 1 left out."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar.errors import PlanError
from autopar.layout import Layout
from autopar.runtime.private import joined_meshes, merged_axes, meshes_kept_with

DATA_AXES = ("dp_replicate", "dp_shard")
# Context parallel ranks hold equal weights and see unlike tokens: to weights they are data parallel ranks.
WEIGHT_AXES = (*DATA_AXES, "cp")
EMBEDDING_AXIS = "embedding"
"""The ranks that have copies of a parameter that pipeline stages share. Their group says so in its description."""


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
    """Axes with more than one rank, slowest varying first, in the order of the layout."""
    return tuple(axis for axis in layout.axes if getattr(layout, axis) > 1)


def submesh(mesh: DeviceMesh | None, *axes: str) -> DeviceMesh | None:
    """The part of a mesh that spans those of ``axes`` that it has, in the mesh's order; None if it has none of them."""
    names = tuple(name for name in axis_names(mesh) if name in axes)
    if mesh is None or not names:
        return None
    return mesh[names[0]] if len(names) == 1 else mesh[names]


def axis_names(mesh: DeviceMesh | None) -> tuple[str, ...]:
    """Names of a mesh's axes, slowest varying first."""
    return (mesh.mesh_dim_names or ()) if mesh is not None else ()


def data_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The ranks that reduce the gradient of a dense weight: data parallel ones and, within them, context parallel ones.

    One axis ``dp`` where weights are replicated over all of these ranks or sharded over all of them; two axes,
    ``dp_replicate`` and ``dp_shard``, for replicas of sharded groups. Context parallel ranks are part of ``dp`` or of
    ``dp_shard``. With them the axis has a process group of its own, so that gradients do not wait behind keys and
    values. The first call for a mesh is collective.

    Returns:
        None where every rank has weights of its own.
    """
    names = [name for name in axis_names(mesh) if name in WEIGHT_AXES]
    if mesh is None or not names:
        return None
    hybrid = set(DATA_AXES) <= set(names)
    inner = tuple(name for name in names if not (hybrid and name == "dp_replicate"))
    sharded = merged_axes(mesh, inner, "dp_shard_cp" if hybrid else "dp_cp") if "cp" in inner else mesh[inner[0]]
    return joined_meshes(mesh["dp_replicate"], sharded) if hybrid else sharded


def expert_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """The same ranks divided for experts: axes pp, edp_replicate, edp, ep and etp, slowest first, if of several ranks.

    edp are the ranks that hold equal experts; where dense weights have replicas of sharded groups, so have experts, and
    edp are the ranks of one of these groups. Every axis has a process group of its own, though its ranks may be those
    of another mesh's axis. The first call for a mesh and a layout's degrees is collective.
    """
    made = meshes_kept_with(mesh)
    replicas = layout.dp_replicate if layout.dp_shard > 1 else 1
    degrees = {"pp": layout.pp, "edp_replicate": replicas, "edp": layout.edp // replicas, "ep": layout.ep,
               "etp": layout.etp}  # fmt: skip
    used = {axis: degree for axis, degree in degrees.items() if degree > 1}
    key = "experts " + " ".join(f"{axis}{degree}" for axis, degree in used.items())
    if key not in made:
        backend = dist.get_backend(mesh.get_group(0))
        made[key] = init_device_mesh(
            mesh.device_type, tuple(used.values()), mesh_dim_names=tuple(used),
            backend_override=dict.fromkeys((axis for axis in used if axis != "pp"), backend),
        )  # fmt: skip
    return made[key]


def group_labels(mesh: DeviceMesh | None) -> tuple[dict[str, str], dict[tuple[int, ...], str]]:
    """Labels of this rank's groups: by the name of the group, and by its ranks.

    Labels are the axes, those of experts included, but ``dp`` for all ranks of ``data_mesh`` where it has one axis. The
    name tells apart groups of equal ranks; ranks stand for the groups that FSDP2 makes of its own over tensor parallel
    modules.
    """
    if mesh is None:
        return {}, {}
    groups = {name: mesh.get_group(name) for name in axis_names(mesh)}
    data = data_mesh(mesh)
    if data is not None:
        labels = ("dp_replicate", "dp_shard") if data.ndim == 2 else ("dp",)
        groups |= {label: data.get_group(axis) for axis, label in enumerate(labels)}
    for experts in meshes_kept_with(mesh).values():
        groups = {name: experts.get_group(name) for name in axis_names(experts) if name != "pp"} | groups
    # Data parallel groups come last, so that theirs are the labels of equal ranks and of an equal group.
    return (
        {group.group_name: label for label, group in groups.items()},
        {tuple(dist.get_process_group_ranks(group)): label for label, group in groups.items()},
    )
