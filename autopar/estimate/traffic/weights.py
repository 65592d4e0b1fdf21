"""Collectives of gradients and weights over ranks that hold equal ones: buckets of DDP, gathers and scatters of FSDP2.

Dense weights are reduced over data and context parallel ranks. Experts have ranks of their own where expert or tensor
parallelism divides those of a stage anew; else they are weights like others.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.estimate.setting import Setting
from autopar.estimate.traffic.ledger import Ledger
from autopar.estimate.traffic.stage import Stage, Weight, weights_of
from autopar.layout import Layout
from autopar.plan import Plan
from autopar.schedule.actions import Action, Direction
from costmodels.stack import Stack


def count_weights(ledger: Ledger, setting: Setting, plan: Plan, stage: Stage) -> None:
    """Of one virtual stage in a step."""
    apart = experts_apart(plan.layout)
    groups = [
        [weight for weight in weights_of(ops, stage, setting, plan) if not (apart and weight.expert)]
        for ops in (*stage.blocks, (*stage.before, *stage.after))
    ]
    if plan.zero_stage == 0:
        in_order = weights_of(stage.ops, stage, setting, plan)
        sizes = [w.elements * setting.reduce_bytes for w in in_order if not (apart and w.expert)]
        group = plan.layout.dp * plan.layout.cp
        ledger.add("all_reduce", "dp", group, num_buckets(sizes, setting.stack), sum(sizes))
    else:
        gathers = num_gathers(stage.actions, plan)
        for group_of_weights in filter(None, groups):
            _count_sharded(ledger, setting, plan, group_of_weights, gathers)
    if apart:
        _count_experts(ledger, setting, plan, stage)


def experts_apart(layout: Layout) -> bool:
    """Whether experts are held by other ranks than dense weights are."""
    return layout.ep * layout.etp * layout.tp > 1


def _count_sharded(ledger: Ledger, setting: Setting, plan: Plan, weights: Sequence[Weight], gathers: int) -> None:
    """One group of dense weights that FSDP2 shards together."""
    layout = plan.layout
    axis, shards = "dp_shard" if layout.dp_replicate > 1 else "dp", layout.dp_shard * layout.cp
    elements = sum(weight.padded(shards) for weight in weights)
    ledger.add("all_gather", axis, shards, gathers, gathers * elements * setting.gather_bytes)
    ledger.add("reduce_scatter", axis, shards, 1, elements * setting.reduce_bytes)
    ledger.add("all_reduce", "dp_replicate", layout.dp_replicate, 1, elements * setting.reduce_bytes / shards)


def _count_experts(ledger: Ledger, setting: Setting, plan: Plan, stage: Stage) -> None:
    """Experts on ranks of their own: each mixture is sharded by itself, or each weight reduced by itself.

    FSDP2 divides them along a dimension that is a multiple of the shards, so that nothing is filled up.
    """
    layout = plan.layout
    replicas = layout.dp_replicate if layout.dp_shard > 1 else 1
    equal = layout.edp // replicas
    sharded = plan.zero_stage > 0 and layout.dp_shard * layout.cp > 1 and equal > 1
    gathers = num_gathers(stage.actions, plan)
    for ops in stage.blocks:
        sizes = [weight.elements for weight in weights_of(ops, stage, setting, plan) if weight.expert]
        elements = sum(sizes)
        if not elements:
            continue
        if not sharded:
            for axis, group in (("edp_replicate", replicas), ("edp", equal)):
                ledger.add("all_reduce", axis, group, len(sizes), elements * setting.reduce_bytes)
            continue
        ledger.add("all_gather", "edp", equal, gathers, gathers * elements * setting.gather_bytes)
        ledger.add("reduce_scatter", "edp", equal, 1, elements * setting.reduce_bytes)
        ledger.add("all_reduce", "edp_replicate", replicas, 1, elements * setting.reduce_bytes / equal)


def num_buckets(sizes: Sequence[float], stack: Stack) -> int:
    """DDP's buckets: filled in the order in which gradients are ready, closed when they reach their size.

    Source: torch's compute_bucket_assignment_by_size; the first bucket is smaller.
    """
    buckets, filled, limit = 0, 0.0, stack.data.first_bucket_bytes
    for size in reversed(sizes):
        filled += size
        if filled >= limit:
            buckets, filled, limit = buckets + 1, 0.0, stack.data.bucket_bytes
    return buckets + (filled > 0)


def num_gathers(actions: Sequence[Action], plan: Plan) -> int:
    """All-gathers of a sharded group in one step of one stage.

    ZeRO-1 and ZeRO-2 gather once and keep the weights until the last backward. ZeRO-3 lets them go after each forward;
    after a backward too, but in a pipeline, where they stay for the pass that follows.
    """
    if plan.zero_stage < 3:
        return 1
    gathers, gathered = 0, False
    for action in actions:
        gathers += not gathered
        gathered = action.direction is not Direction.FORWARD and plan.layout.pp > 1
    return gathers
