"""A measured machine as the question that plans answer on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from autopar.errors import InputError
from autopar.estimate.setting import Setting
from autopar.model.build import build_graph
from autopar.model.spec import ModelSpec
from autopar.workload import Workload
from costmodels.calibration import MachineProfile, profile_cluster
from costmodels.hardware import Cluster
from costmodels.stack import Stack, load_stack

STACKS = {"gloo": "autopar-gloo", "nccl": "autopar-nccl"}
"""autopar's own executor, by backend."""


def runtime_stack(profile: MachineProfile, *, variants: Sequence[str] = ()) -> Stack:
    """autopar's own executor with the host overheads that were measured.

    Args:
        variants: of the stack that are on, such as ``compile``.
    """
    stack = load_stack("+".join((STACKS[profile.backend], *variants)))
    origin = {"overheads": "measured here, each wrapper against the same module without it"}
    return dataclasses.replace(stack, overheads=profile.host_overheads, origins={**stack.origins, **origin})


def measured_setting(spec: ModelSpec, workload: Workload, profile: MachineProfile, ranks: int) -> Setting:
    """Model and workload on as many ranks of a measured machine as a plan has.

    Raises:
        InputError: the profile is of another precision, or of fewer ranks.
    """
    if profile.precision != workload.precision.value:
        raise InputError(
            f"the profile of {profile.device_name} is of {profile.precision}, but the run is in "
            f"{workload.precision.value}: measure a profile with --precision {workload.precision.value}"
        )
    cluster = of_ranks(profile_cluster(profile), ranks)
    graph = build_graph(spec, seq_len=workload.seq_len, precision=workload.precision)
    return Setting(graph=graph, workload=workload, cluster=cluster, stack=runtime_stack(profile))


def of_ranks(cluster: Cluster, ranks: int) -> Cluster:
    """So many ranks of a cluster: of its first node, or of whole nodes. Raises InputError."""
    if ranks == cluster.world_size:
        return cluster
    nodes, left = divmod(ranks, cluster.devices_per_node)
    if ranks > cluster.world_size or (nodes and left):
        raise InputError(
            f"the run has {ranks} ranks, but {cluster.name} has {cluster.num_nodes} nodes of "
            f"{cluster.devices_per_node}: name the cluster of the run"
        )
    return dataclasses.replace(cluster, num_nodes=max(nodes, 1), devices_per_node=left or cluster.devices_per_node)
