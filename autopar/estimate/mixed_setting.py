"""What is given when mixed plans are priced, and how one line sees it: its islands with the others around them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

from autopar.estimate.setting import Setting
from autopar.graph import OpGraph
from autopar.layout import Layout
from autopar.mixed_plan import Line, MixedPlan, Segment
from autopar.plan import Plan
from autopar.workload import Workload
from costmodels.hardware import Cluster, NetworkLevel
from costmodels.islands import MixedCluster
from costmodels.stack import Stack


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MixedSetting:
    """As Setting, for a mixed cluster; ``islands`` are settings of one island each. See ``mixed_setting``."""

    graph: OpGraph
    workload: Workload
    cluster: MixedCluster
    stack: Stack
    islands: tuple[Setting, ...]


def mixed_setting(graph: OpGraph, workload: Workload, cluster: MixedCluster, stack: Stack) -> MixedSetting:
    """A setting. Raises InputError if a device does not have the workload's precision."""
    for island in cluster.islands:
        island.device.peak(workload.precision.value)
    islands = tuple(Setting(graph=graph, workload=workload, cluster=c, stack=stack) for c in cluster.islands)
    return MixedSetting(graph=graph, workload=workload, cluster=cluster, stack=stack, islands=islands)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What a line knows of the plan around it.

    Attributes:
        replicas, lines: of the whole plan.
        zero_stage, sharding, sequence_parallel: as in MixedPlan.
    """

    replicas: int
    lines: int
    zero_stage: int = 0
    sharding: str = "all"
    sequence_parallel: bool = False


def shared_by(plan: MixedPlan) -> Shared:
    """What the lines of a plan share."""
    return Shared(
        replicas=plan.replicas, lines=len(plan.lines), zero_stage=plan.zero_stage, sharding=plan.sharding,
        sequence_parallel=plan.sequence_parallel,
    )  # fmt: skip


def shard_ranks(setting: MixedSetting, line: Line, segment: Segment, shared: Shared) -> tuple[int, int] | None:
    """(groups of equal gradients, data parallel ranks that shard together); None where there is no such sharding."""
    if shared.zero_stage == 0:
        return shared.replicas, 1
    if shared.replicas * segment.cp == 1:
        return None
    if shared.sharding == "all":
        return 1, shared.replicas
    if shared.sharding == "line":
        return (shared.lines, line.replicas) if shared.lines > 1 and line.replicas > 1 else None
    cluster = setting.cluster.islands[segment.island]
    in_node = max(1, cluster.devices_per_node // (segment.tp * segment.cp))
    fits = 1 < in_node < shared.replicas and line.replicas % in_node == 0 and shared.replicas % in_node == 0
    return (shared.replicas // in_node, in_node) if fits else None


def segment_plan(setting: MixedSetting, line: Line, segment: Segment, shared: Shared) -> Plan:
    """The line as if all of it lay on the segment's island, which prices the segment's stages."""
    groups = shard_ranks(setting, line, segment, shared)
    assert groups is not None, "sharding was checked before"
    layout = Layout(
        tp=segment.tp, cp=segment.cp, pp=line.num_stages, dp_replicate=groups[0], dp_shard=groups[1]
    )  # fmt: skip
    return Plan(
        layout=layout, microbatch_size=line.microbatch_size, zero_stage=shared.zero_stage,
        sequence_parallel=shared.sequence_parallel and segment.tp > 1, recompute=segment.recompute,
    )  # fmt: skip


def pipeline_plan(line: Line, segment: Segment, shared: Shared) -> Plan:
    """The same with the line's own replicas only, whose stages are neighbours on the island."""
    layout = Layout(tp=segment.tp, cp=segment.cp, pp=line.num_stages, dp_replicate=line.replicas)
    return Plan(
        layout=layout, microbatch_size=line.microbatch_size,
        sequence_parallel=shared.sequence_parallel and segment.tp > 1,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def among_lines(setting: MixedSetting, island: int, stage_size: int) -> Setting:
    """An island as data parallel groups of several lines see it.

    ``stage_size`` neighbouring devices hold a stage; ranks beyond them are on other islands. A link between islands
    that is the island's own outermost one is no further level.
    """
    own = setting.islands[island]
    cluster, between = own.cluster, setting.cluster.between
    domain = min(cluster.domain, stage_size)
    kept = tuple(level for level in cluster.levels if level.size < stage_size)
    if between != cluster.links[-1] or kept != cluster.levels:
        kept = (*kept, NetworkLevel(size=stage_size, link=between))
    return dataclasses.replace(own, cluster=dataclasses.replace(cluster, domain_size=domain, levels=kept))


@lru_cache(maxsize=4096)
def across_islands(setting: MixedSetting, island: int, stage_size: int) -> Setting:
    """An island as a send to another island's stage sees it."""
    own = setting.islands[island]
    cluster: Cluster = dataclasses.replace(
        own.cluster, domain_size=min(own.cluster.domain, stage_size), network_link=setting.cluster.between, levels=()
    )
    return dataclasses.replace(own, cluster=cluster)
