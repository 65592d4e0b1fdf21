"""What a pipeline rank holds and does of one virtual stage, as far as its traffic depends on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from autopar.estimate.setting import Setting
from autopar.graph import MatmulShape, Op, OpKind, Split
from autopar.plan import Plan, Recompute
from autopar.schedule.actions import Action
from autopar.shard import EXPERT_SPLITS, Degrees, parameter_share


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One virtual stage.

    Attributes:
        before, blocks, after: operations before the blocks, of each block, and after them.
        recomputed: for each block, whether backward computes it again as a whole.
        actions: passes of this stage, in order.
        num_microbatches: per step.
    """

    index: int
    before: tuple[Op, ...]
    blocks: tuple[tuple[Op, ...], ...]
    after: tuple[Op, ...]
    recomputed: tuple[bool, ...]
    actions: tuple[Action, ...]
    num_microbatches: int

    @property
    def parts(self) -> tuple[tuple[tuple[Op, ...], bool], ...]:
        """Operations and whether they are recomputed: of the ends together, and of each block."""
        return (((*self.before, *self.after), False), *zip(self.blocks, self.recomputed, strict=True))

    @property
    def ops(self) -> tuple[Op, ...]:
        """All operations, in the order of the model."""
        return (*self.before, *(op for block in self.blocks for op in block), *self.after)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A parameter as a rank holds it before it is sharded.

    Attributes:
        elements: on the rank.
        rows: its first dimension, along which FSDP2 divides it.
        expert: of routed experts.
        tied: the weight that it is a copy of or that has copies: its owner's name.
    """

    elements: float
    rows: float
    expert: bool
    tied: str

    def padded(self, shards: int) -> float:
        """Elements that are gathered and scattered: rows are filled up to a multiple of the shards."""
        return self.elements / self.rows * ceil(self.rows / shards) * shards

    def shard(self, shards: int, index: int) -> float:
        """Elements of one shard: every rank has as many rows as the first, while there are any."""
        each = ceil(self.rows / shards)
        return self.elements / self.rows * min(max(self.rows - index * each, 0), each)


def weights_of(ops: Sequence[Op], stage: Stage, setting: Setting, plan: Plan) -> list[Weight]:
    """Weights that these operations of a stage have, in their order.

    One that is shared with an earlier operation of the stage is that one's; with one of another stage, a copy.
    """
    graph = setting.graph
    width = graph.boundary_bytes / (graph.batch_size * graph.seq_len * graph.itemsize)
    own = {parameter.name for op in stage.ops for parameter in op.parameters}
    found = []
    for op in ops:
        for parameter in op.parameters:
            if parameter.shared_with in own:
                continue
            share = float(parameter_share(parameter.split, degrees_of(plan), setting.stack))
            elements = parameter.elements * share
            expert = parameter.split in EXPERT_SPLITS
            if expert:
                rows = graph.num_experts / plan.layout.ep
            elif parameter.name.endswith(".weight") and isinstance(op.shape, MatmulShape):
                rows = op.shape.n * (1.0 if parameter.split is Split.ROW else share)
            elif op.kind is OpKind.EMBEDDING:
                rows = elements / width
            else:
                rows = elements
            owner = parameter.shared_with or parameter.name
            found.append(Weight(elements=elements, rows=rows, expert=expert, tied=owner))
    return found


def stages_of(setting: Setting, plan: Plan, actions: Sequence[Action]) -> Iterator[Stage]:
    """Virtual stages of a pipeline rank that takes these actions, in the order of the model."""
    graph = setting.graph
    counts = plan.blocks_of_stages(graph.num_blocks)
    ends = list(accumulate(counts))
    for index in sorted({action.stage for action in actions}):
        held = range(ends[index] - counts[index], ends[index])
        yield Stage(
            index=index,
            before=tuple(graph.block_ops(-1)) if index == 0 else (),
            blocks=tuple(tuple(graph.block_ops(block)) for block in held),
            after=tuple(graph.block_ops(graph.num_blocks)) if index == plan.num_stages - 1 else (),
            recomputed=tuple(_recomputes(plan, place) for place in range(len(held))),
            actions=tuple(action for action in actions if action.stage == index),
            num_microbatches=plan.num_microbatches(setting.workload),
        )


def _recomputes(plan: Plan, place: int) -> bool:
    """Whether the block at this place of a virtual stage is recomputed as a whole."""
    return plan.recompute is Recompute.FULL and (not plan.recompute_layers or place < plan.recompute_layers)


def degrees_of(plan: Plan) -> Degrees:
    """Of one plan."""
    layout = plan.layout
    return Degrees(
        tp=layout.tp, cp=layout.cp, sp=plan.sequence_parallel, microbatch=plan.microbatch_size, ep=layout.ep,
        etp=layout.etp,
    )  # fmt: skip
