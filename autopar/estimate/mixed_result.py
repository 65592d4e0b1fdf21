"""The estimate of one mixed plan: step time by terms, and what every stage of every line does and holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autopar.estimate.mixed import LineCosts, line_costs, line_terms, rows_of
from autopar.estimate.mixed_setting import MixedSetting, shared_by
from autopar.mixed_plan import Line, MixedPlan, check_mixed_plan
from costmodels.units import GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEstimate:
    """One pipeline stage of a line.

    Attributes:
        line, segment, island: where it is, as indices.
        blocks: that it holds.
        busy_s: seconds of a step in which its devices compute or wait for their own communication, in the replica that
            has most sequences.
        memory: bytes at the peak, by the names of ``memory.ITEMS``.
        memory_limit: bytes that a device of the island offers.
    """

    line: int
    segment: int
    island: int
    blocks: int
    busy_s: float
    memory: Mapping[str, float]
    memory_limit: float

    @property
    def memory_bytes(self) -> float:
        """Peak bytes."""
        return sum(self.memory.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedEstimate:
    """Prediction for one mixed plan.

    Attributes:
        stack: software that is assumed.
        step_s: seconds of a step, that of the slowest line.
        line_s: of every line, if the others were not there.
        breakdown: parts of the step in seconds, by the names of ``step.TERMS``, of the slowest line.
        stages: line by line.
        idle_devices: of islands that the plan leaves out, by name.
        tokens_per_s: throughput.
        mfu: useful FLOP/s over the dense peaks of all devices, used or not.
        assumptions: where the numbers behind the estimate come from.
    """

    plan: MixedPlan
    stack: str
    step_s: float
    line_s: tuple[float, ...]
    breakdown: Mapping[str, float]
    stages: tuple[StageEstimate, ...]
    idle_devices: Mapping[str, int]
    tokens_per_s: float
    mfu: float
    assumptions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage has enough memory."""
        return all(stage.memory_bytes <= stage.memory_limit for stage in self.stages)

    @property
    def memory_gib(self) -> float:
        """Peak GiB of the fullest stage."""
        return max(stage.memory_bytes for stage in self.stages) / GIB


def estimate_mixed(setting: MixedSetting, plan: MixedPlan) -> MixedEstimate:
    """Predict one plan. Raises PlanError if it violates the model, the workload or the cluster."""
    check_mixed_plan(plan, setting.graph, setting.workload, setting.cluster)
    shared = shared_by(plan)
    stages: list[StageEstimate] = []
    terms: list[dict[str, float]] = []
    for index, line in enumerate(plan.lines):
        m = np.full(1, line.num_microbatches, dtype=float)
        costs = line_costs(setting, line, shared, rows_of(setting.graph, [line.blocks]), m)
        terms.append({name: float(part[0]) for name, part in line_terms(setting, line, shared, costs).items()})
        stages += _stages(setting, index, line, costs)
    line_s = tuple(float(sum(part.values())) for part in terms)
    slowest = int(np.argmax(line_s))
    used = {segment.island for line in plan.lines for segment in line.segments}
    islands, precision = setting.cluster.islands, setting.workload.precision.value
    flops = 3 * setting.graph.model_flops()[0] / setting.graph.batch_size * setting.workload.global_batch
    peak = sum(island.world_size * island.device.peak(precision) for island in islands)
    return MixedEstimate(
        plan=plan, stack=setting.stack.name, step_s=line_s[slowest], line_s=line_s, breakdown=terms[slowest],
        stages=tuple(stages), tokens_per_s=setting.workload.tokens / line_s[slowest],
        idle_devices={island.name: island.world_size for i, island in enumerate(islands) if i not in used},
        mfu=flops / line_s[slowest] / peak, assumptions=_assumptions(setting),
    )  # fmt: skip


def _stages(setting: MixedSetting, index: int, line: Line, costs: LineCosts) -> list[StageEstimate]:
    passes = costs.num_microbatches[0] * costs.work.pass_seconds[0]
    busy = passes + costs.accumulation[0] + costs.data[0] + costs.update[0]
    return [
        StageEstimate(
            line=index, segment=k, island=line.segments[k].island, blocks=line.blocks[stage], busy_s=float(busy[stage]),
            memory={name: float(sizes[0, stage]) for name, sizes in costs.memory.items()},
            memory_limit=setting.cluster.islands[line.segments[k].island].device.memory_bytes,
        )
        for stage, k in enumerate(line.segment_of_stage)
    ]  # fmt: skip


def _assumptions(setting: MixedSetting) -> tuple[str, ...]:
    found = {}
    for island in setting.cluster.islands:
        found[f"device {island.device.name}"] = island.device.origins
        found.update({f"link {link.name}": link.origins for link in island.links})
    found[f"link {setting.cluster.between.name}"] = setting.cluster.between.origins
    found[f"stack {setting.stack.name}"] = setting.stack.origins
    return tuple(f"{owner}: {name}: {origin}" for owner, origins in found.items() for name, origin in origins.items())
