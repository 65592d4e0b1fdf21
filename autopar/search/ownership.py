"""Which part of which weights every rank holds under a plan, as integer rectangles.

A weight is ``outer`` equal units (experts; 1 for anything else) of ``inner`` elements. A rank holds an interval of the
units (expert parallelism), and of each unit an interval of its elements: its tensor parallel part, and of that its
ZeRO shard. Elements of a unit are counted in the order in which tensor parallelism divides it, and each unit is divided
into shards on its own, as FSDP2 does and nearly as Megatron-Core (which divides each bucket of weights). What a layout
holds of a weight is then a partition of it: two ranks hold the same rectangle or disjoint ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.stages import engine_split
from autopar.graph import OpGraph, Parameter, Split
from autopar.plan import V_SCHEDULES, Plan
from autopar.schedule.notation import rank_of_stage
from autopar.shard import EXPERT_SPLITS
from costmodels.stack import Stack

Ints = NDArray[np.int64]

DIVIDED, VOCABULARY, EXPERTS, REPLICATED = "divided", "vocabulary", "experts", "replicated"
KINDS = ("weights", "state")
"""What is held of a weight: itself, and its optimizer state (with the fp32 master copy, where there is one)."""
SHARDED_FROM = {"weights": 3, "state": 1}
"""ZeRO stage from which on each kind is sharded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipelined:
    """Weights that are divided alike and lie on the same pipeline ranks under two plans.

    Attributes:
        label: how tensor parallelism divides them: ``divided`` (column and row), ``vocabulary``, ``experts``,
            ``replicated``.
        divided: whether a rank has only its tensor parallel part.
        outer, inner: units of a weight, and elements of a unit.
        old, new: pipeline ranks that hold them under each plan.
        count: such weights.
    """

    label: str
    divided: bool
    outer: int
    inner: int
    old: frozenset[int]
    new: frozenset[int]
    count: int

    @property
    def elements(self) -> int:
        """Of one of them."""
        return self.outer * self.inner


def pipelined_weights(graph: OpGraph, stack: Stack, old: Plan, new: Plan) -> tuple[Pipelined, ...]:
    """All weights of the model, equal ones together. A shared weight lies also where it is used."""
    places = [_pipeline_ranks(graph, stack, plan) for plan in (old, new)]
    kinds = Counter(
        (_label(p, stack), _divided(p, stack), *_units(p, graph), places[0][p.name], places[1][p.name])
        for p in graph.parameters()
    )
    return tuple(
        Pipelined(label=label, divided=divided, outer=outer, inner=inner, old=before, new=after, count=count)
        for (label, divided, outer, inner, before, after), count in kinds.items()
    )


def _pipeline_ranks(graph: OpGraph, stack: Stack, plan: Plan) -> dict[str, frozenset[int]]:
    """Pipeline ranks that hold each weight, by its name."""
    stages, pp = plan.num_stages, plan.layout.pp
    split = plan.stage_blocks or engine_split(graph.num_blocks, stages, stack)
    stage_of_block = np.repeat(np.arange(stages), split)
    found: dict[str, set[int]] = {}
    for op in graph.ops:
        stage = 0 if op.block < 0 else stages - 1 if op.block >= graph.num_blocks else int(stage_of_block[op.block])
        for parameter in op.parameters:
            rank = rank_of_stage(stage, pp, plan.schedule in V_SCHEDULES)
            found.setdefault(parameter.shared_with or parameter.name, set()).add(rank)
    return {name: frozenset(ranks) for name, ranks in found.items()}


def _label(parameter: Parameter, stack: Stack) -> str:
    if parameter.split in EXPERT_SPLITS:
        return EXPERTS
    if parameter.split is Split.VOCAB:
        return VOCABULARY
    return DIVIDED if _divided(parameter, stack) else REPLICATED


def _divided(parameter: Parameter, stack: Stack) -> bool:
    """As ``shard.parameter_share``."""
    if parameter.split is Split.VOCAB:
        return stack.tensor.vocab_parallel
    return parameter.split in (Split.COLUMN, Split.ROW, *EXPERT_SPLITS)


def _units(parameter: Parameter, graph: OpGraph) -> tuple[int, int]:
    outer = graph.num_experts if parameter.split in EXPERT_SPLITS else 1
    assert parameter.elements % outer == 0, f"{parameter.name} is not equal parts of {outer} experts"
    return outer, parameter.elements // outer


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """One way in which ranks divide weights: part ``index`` of ``degree`` along each of three cuts, [ranks] each.

    Attributes:
        unit, unit_degree: of the units (experts).
        part, part_degree: of a unit's elements, by tensor parallelism.
        shard, shard_degree: of that part, by ZeRO.
    """

    unit: Ints
    unit_degree: int
    part: Ints
    part_degree: int
    shard: Ints
    shard_degree: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Position of every rank under a plan: its pipeline rank [ranks], divisions of dense weights and of experts."""

    pipeline: Ints
    dense: Division
    experts: Division | None
    zero: int


def places_of(plan: Plan, graph: OpGraph) -> Places:
    """Positions of all ranks of a plan. Shards as in ``estimate.dataparallel.weight_groups``, in the order of ranks."""
    layout = plan.layout
    rows = [layout.coordinates(rank) for rank in range(layout.world_size)]
    at = {axis: np.asarray([row[axis] for row in rows], dtype=np.int64) for axis in ("pp", "tp", "dp_replicate")}
    shards = layout.dp_shard * layout.cp if plan.zero_stage else 1
    together = (at["pp"] * layout.tp + at["tp"]) * layout.dp_replicate + at["dp_replicate"]
    dense = Division(
        unit=np.zeros_like(at["tp"]), unit_degree=1, part=at["tp"], part_degree=layout.tp,
        shard=_place_among_equals(together), shard_degree=shards,
    )  # fmt: skip
    if not graph.num_experts:
        return Places(pipeline=at["pp"], dense=dense, experts=None, zero=plan.zero_stage)
    in_stage = _place_among_equals(at["pp"])
    replicas = layout.dp * layout.cp // shards
    expert_shards = max(layout.edp // replicas, 1) if shards > 1 else 1
    experts = Division(
        unit=in_stage // layout.etp % layout.ep, unit_degree=layout.ep,
        part=in_stage % layout.etp, part_degree=layout.etp,
        shard=in_stage // (layout.ep * layout.etp) % expert_shards, shard_degree=expert_shards,
    )  # fmt: skip
    return Places(pipeline=at["pp"], dense=dense, experts=experts, zero=plan.zero_stage)


def _place_among_equals(keys: Ints) -> Ints:
    """Of every rank, how many before it have the same key; all keys are equally frequent."""
    order = np.argsort(keys, kind="stable")
    found = np.empty_like(order)
    found[order] = np.arange(len(keys)) % np.count_nonzero(keys == keys[0])
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Rectangles:
    """Units [first, last) and of each the elements [low, high); empty ones have high == low. Arrays of one shape."""

    first: Ints
    last: Ints
    low: Ints
    high: Ints

    @property
    def area(self) -> Ints:
        """Elements."""
        return np.asarray(np.maximum(self.last - self.first, 0) * np.maximum(self.high - self.low, 0))

    def at(self, index: Any) -> Rectangles:
        """Those at an index, mask or slice."""
        return Rectangles(first=self.first[index], last=self.last[index], low=self.low[index], high=self.high[index])

    def overlap(self, other: Rectangles) -> Ints:
        """Elements in common; shapes broadcast."""
        units = np.minimum(self.last, other.last) - np.maximum(self.first, other.first)
        elements = np.minimum(self.high, other.high) - np.maximum(self.low, other.low)
        return np.asarray(np.maximum(units, 0) * np.maximum(elements, 0))


def rectangles(weights: Pipelined, places: Places, kind: str, *, new: bool) -> Rectangles:
    """What every rank holds of each of these weights; nothing where they lie on other pipeline ranks.

    Part i of n of [a, b) is [a + (b - a) i // n, a + (b - a)(i + 1) // n).
    """
    division = places.experts if weights.label == EXPERTS else places.dense
    assert division is not None
    first, last = _cut(0, weights.outer, division.unit, division.unit_degree)
    low, high = np.zeros_like(first), np.full_like(first, weights.inner)
    if weights.divided:
        low, high = _cut(low, high, division.part, division.part_degree)
    if places.zero >= SHARDED_FROM[kind]:
        low, high = _cut(low, high, division.shard, division.shard_degree)
    holds = np.isin(places.pipeline, sorted(weights.new if new else weights.old))
    return Rectangles(first=first, last=last, low=low, high=np.where(holds, high, low))


def _cut(low: Any, high: Any, index: Ints, degree: int) -> tuple[Ints, Ints]:
    return low + (high - low) * index // degree, low + (high - low) * (index + 1) // degree
