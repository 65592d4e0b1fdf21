"""A plan for islands of unlike devices: which island computes which blocks, and how many sequences.

Lines are groups of equal pipelines; the stages of a line lie on one island or on several, one after another, and every
line holds the whole model. So one line over all islands is a pipeline across them, one line per island is data
parallelism across them, and anything between is both. Tensor and context parallel groups stay on one island.
Source: the space is that of AMP (Li et al. 2022), Metis (Um et al. 2024) and Sailor (2025), with sharding, context
parallelism and recomputation; unequal shares of the batch as in HetPipe (Park et al. 2020), but synchronous.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from autopar.errors import PlanError
from autopar.graph import OpGraph
from autopar.plan import Recompute, Rejected
from autopar.workload import Workload
from costmodels.islands import MixedCluster

SHARDINGS = ("all", "line", "node")
"""Who shards together: all replicas, those of a line, those in a node. Replicas of a group add up its gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Successive pipeline stages of a line on one island.

    Attributes:
        island: index of the cluster's islands.
        stages: how many.
        tp, cp: tensor and context parallel ranks of each.
        recompute: what backward computes again here.
    """

    island: int
    stages: int
    tp: int = 1
    cp: int = 1
    recompute: Recompute = Recompute.NONE

    @property
    def slug(self) -> str:
        """Such as ``i0.pp2.tp8.cp1.ac-none``."""
        return f"i{self.island}.pp{self.stages}.tp{self.tp}.cp{self.cp}.ac-{self.recompute}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Equal pipelines that pass through the same islands.

    Attributes:
        segments: in the order of the model.
        replicas: how many pipelines; each segment takes replicas * stages * tp * cp devices.
        microbatch_size: sequences per forward pass.
        blocks: of every stage, in the order of the model; empty while undecided.
        batch: sequences per step of every replica; empty while undecided.
    """

    segments: tuple[Segment, ...]
    replicas: int
    microbatch_size: int
    blocks: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()

    @property
    def num_stages(self) -> int:
        """Stages of each pipeline."""
        return sum(segment.stages for segment in self.segments)

    @property
    def num_microbatches(self) -> int:
        """Of the replica that has most."""
        return max(self.batch) // self.microbatch_size

    @property
    def segment_of_stage(self) -> tuple[int, ...]:
        """Index of the segment of each stage."""
        return tuple(i for i, segment in enumerate(self.segments) for _ in range(segment.stages))

    @property
    def slug(self) -> str:
        """Such as ``i0.pp2.tp8.cp1.ac-none.dp4.mb1.split-9x2.n17-16x3``."""
        parts = [segment.slug for segment in self.segments]
        parts += [f"dp{self.replicas}", f"mb{self.microbatch_size}"]
        parts += [f"split-{_runs(self.blocks)}"] if len(self.blocks) > 1 else []
        return ".".join([*parts, f"n{_runs(self.batch)}"] if self.batch else parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedPlan:
    """Lines, and the decisions that all of them share.

    Attributes:
        lines: data parallel to each other; no island is in two.
        zero_stage: as in Plan.
        sharding: of SHARDINGS, where zero_stage is not 0.
        sequence_parallel: as in Plan, wherever tp is above 1.
    """

    lines: tuple[Line, ...]
    zero_stage: int = 0
    sharding: str = "all"
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.sharding not in SHARDINGS:
            raise PlanError(f"plan: sharding is '{self.sharding}'; it is one of {', '.join(SHARDINGS)}")

    @property
    def replicas(self) -> int:
        """Pipelines in all."""
        return sum(line.replicas for line in self.lines)

    @property
    def slug(self) -> str:
        """The plan's name: what all share, then line by line."""
        shared = [f"z{self.zero_stage}" + (f"-{self.sharding}" if self.zero_stage else "")]
        shared += ["sp"] if self.sequence_parallel else []
        return "_".join([".".join(shared), *(line.slug for line in self.lines)])


def _runs(numbers: Iterable[int]) -> str:
    """``5-5-5-4`` as ``5x3-4``."""
    runs = [(number, len(list(alike))) for number, alike in groupby(numbers)]
    return "-".join(f"{number}x{times}" if times > 1 else f"{number}" for number, times in runs)


def in_step(zero_stage: int, accumulates_sharded: bool) -> bool:
    """Whether every microbatch has collectives of all replicas, so that all must run equally many.

    ZeRO-3 gathers weights for each; an engine that scatters gradients after each does so from ZeRO-2 on.
    """
    return zero_stage == 3 or (zero_stage == 2 and accumulates_sharded)


def segment_violations(segment: Segment, sequence_parallel: bool, graph: OpGraph, workload: Workload) -> list[Rejected]:
    """What forbids degrees of one segment, by the rules of ``plan.violations``."""
    found, attention = [], graph.attention
    for name, heads in (("query", attention.num_heads), ("key-value", attention.num_kv_heads)) if attention else ():
        if heads % segment.tp:
            detail = f"tp={segment.tp} does not divide {heads} {name} heads: use a divisor of {heads}"
            found.append(Rejected(reason=f"{name} heads", detail=detail, numbers={"tp": segment.tp, "heads": heads}))
    parts = (segment.tp if sequence_parallel else 1, 2 * segment.cp if segment.cp > 1 else 1)
    for axis, degree in zip(("tp", "cp"), parts, strict=True):
        if workload.seq_len % degree:
            detail = f"a sequence of {workload.seq_len} tokens does not divide into {degree} parts for {axis}"
            found.append(
                Rejected(reason="sequence", detail=detail, numbers={"seq_len": workload.seq_len, "parts": degree})
            )
    return found


def mixed_violations(
    plan: MixedPlan, graph: OpGraph, workload: Workload, cluster: MixedCluster
) -> tuple[Rejected, ...]:
    """Everything that forbids a plan before memory and time are looked at, each with the fix."""
    found: list[Rejected] = []

    def reject(reason: str, detail: str, **numbers: float) -> None:
        found.append(Rejected(reason=reason, detail=detail, numbers=numbers))

    used = [segment.island for line in plan.lines for segment in line.segments]
    if len(set(used)) < len(used) or any(not 0 <= island < len(cluster.islands) for island in used):
        reject("islands", f"segments are on islands {used}; use each of {len(cluster.islands)} at most once")
        return tuple(found)
    for line in plan.lines:
        for segment in line.segments:
            found += segment_violations(segment, plan.sequence_parallel, graph, workload)
            size = line.replicas * segment.stages * segment.tp * segment.cp
            island = cluster.islands[segment.island]
            if size != island.world_size:
                reject(
                    "world size", f"dp={line.replicas} * pp={segment.stages} * tp={segment.tp} * cp={segment.cp} is "
                    f"{size}, but {island.name} has {island.world_size} devices: change one of them",
                    product=size, world_size=island.world_size,
                )  # fmt: skip
        if len(line.blocks) != line.num_stages or sum(line.blocks) != graph.num_blocks or min(line.blocks) < 1:
            reject(
                "stages", f"blocks {_runs(line.blocks)} of {line.num_stages} stages: give each one or more of "
                f"{graph.num_blocks}", stages=line.num_stages, blocks=graph.num_blocks,
            )  # fmt: skip
        whole = all(share >= 1 and share % line.microbatch_size == 0 for share in line.batch)
        if len(line.batch) != line.replicas or not whole:
            reject(
                "batch", f"batch {_runs(line.batch)} of {line.replicas} replicas: give each microbatches of "
                f"{line.microbatch_size}", replicas=line.replicas, microbatch=line.microbatch_size,
            )  # fmt: skip
    total = sum(sum(line.batch) for line in plan.lines)
    if total != workload.global_batch:
        reject("batch", f"replicas take {total} of {workload.global_batch} sequences", total=total)
    degrees = {(segment.tp, segment.cp) for line in plan.lines for segment in line.segments}
    if plan.zero_stage and plan.sharding == "all" and len(plan.lines) > 1 and len(degrees) > 1:
        reject("sharding", "lines that shard together hold equal parts of a layer: give them equal tp and cp")
    return tuple(found)


def check_mixed_plan(plan: MixedPlan, graph: OpGraph, workload: Workload, cluster: MixedCluster) -> None:
    """Raise PlanError with every violation."""
    found = mixed_violations(plan, graph, workload, cluster)
    if found:
        raise PlanError(f"plan {plan.slug}: " + "; ".join(rejected.detail for rejected in found))
