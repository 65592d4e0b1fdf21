"""What each rank sends in a step of one plan, under the names in which a run counts it.

These are the calls of autopar's own executor (the stacks ``autopar-*``): DTensor's collectives, keys and values of
context parallel ranks, tokens to experts and back, FSDP2's gathers and scatters per block and for the rest of the
stage, DDP's buckets, pipeline messages. A run counts the same keys, so that comparing them is a join.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from autopar.estimate.setting import Setting
from autopar.estimate.traffic.experts import count_exchange
from autopar.estimate.traffic.ledger import Ledger
from autopar.estimate.traffic.passes import count_context, count_loss, count_messages, count_tensor, partial_weights
from autopar.estimate.traffic.prices import TIED_AXIS
from autopar.estimate.traffic.stage import Stage, Weight, stages_of, weights_of
from autopar.estimate.traffic.weights import count_weights, num_buckets, num_gathers
from autopar.layout import Layout
from autopar.measurement import CountedCollective
from autopar.plan import Plan
from autopar.schedule.actions import build_schedule

__all__ = ["expected_collectives", "num_buckets", "num_gathers"]

NORM_BYTES = 8
"""Of the square of the gradient's norm."""


def expected_collectives(
    setting: Setting, plan: Plan, *, norm: bool = False
) -> tuple[tuple[CountedCollective, ...], ...]:
    """Collectives of one step, by rank.

    Args:
        norm: whether the norm of the gradients is taken, for clipping or for the log.
    """
    layout = plan.layout
    schedule = build_schedule(plan.schedule, layout.pp, plan.num_microbatches(setting.workload), layout.vp)
    places = [tuple(stages_of(setting, plan, actions)) for actions in schedule]
    ledgers = [_same_for_all(setting, plan, stages, norm) for stages in places]
    partial = [[w for stage in stages for w in partial_weights(setting, plan, stage)] for stages in places]
    tied = _tied(setting, plan, places)
    shards = layout.dp_shard * layout.cp if plan.zero_stage else 1
    index = {rank: number for group in layout.groups("dp_shard", "cp") for number, rank in enumerate(group)}

    def of_rank(rank: int) -> tuple[CountedCollective, ...]:
        """What differs from rank to rank: sums of gradients that are sharded, perhaps unevenly."""
        place, shard = layout.coordinates(rank)["pp"], index[rank] if shards > 1 else 0
        ledger = Ledger(ledgers[place])
        summed = sum(weight.shard(shards, shard) for weight in partial[place])
        ledger.add("all_reduce", "tp", layout.tp, len(partial[place]) > 0, summed * setting.gradient_bytes)
        for weight, group in tied[place]:
            size = weight.shard(shards, shard) * setting.gradient_bytes
            ledger.add("all_reduce", TIED_AXIS, group, size > 0, size)
        return ledger.entries()

    return tuple(map(of_rank, range(layout.world_size)))


def _same_for_all(setting: Setting, plan: Plan, stages: Sequence[Stage], norm: bool) -> Ledger:
    ledger = Ledger()
    for stage in stages:
        count_tensor(ledger, setting, plan, stage)
        count_context(ledger, setting, plan, stage)
        count_exchange(ledger, setting, plan, stage)
        count_weights(ledger, setting, plan, stage)
        count_messages(ledger, setting, plan, stage)
    count_loss(ledger, plan)
    if norm:
        ledger.add("all_reduce", world_axis(plan.layout), plan.layout.world_size, 1, NORM_BYTES)
    return ledger


def _tied(setting: Setting, plan: Plan, places: Sequence[Sequence[Stage]]) -> list[list[tuple[Weight, int]]]:
    """Of every pipeline rank its copies of weights that others have too, each once, and how many ranks have one."""
    held = [
        {weight.tied: weight for stage in stages for weight in weights_of(stage.ops, stage, setting, plan)}
        for stages in places
    ]
    copies = Counter(name for weights in held for name in weights)
    return [[(weight, copies[name]) for name, weight in weights.items() if copies[name] > 1] for weights in held]


def world_axis(layout: Layout) -> str:
    """How a run names the group of all ranks: by the axis that spans it, if one does."""
    for axis, degree in (("dp", layout.dp * layout.cp), ("tp", layout.tp), ("pp", layout.pp)):
        if degree == layout.world_size and not (axis == "dp" and layout.dp_replicate > 1 and layout.dp_shard > 1):
            return axis
    return "world"
