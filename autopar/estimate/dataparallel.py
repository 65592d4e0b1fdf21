"""Seconds of data parallel communication that a step waits for, arrays [plans, ranks].

Dense weights are replicated or sharded over a stage's dp and cp ranks, experts over the ranks that hold equal experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.estimate.arrays import Ints, PlanArrays
from autopar.estimate.pieces import Floats
from autopar.estimate.setting import Setting
from autopar.estimate.stages import RankWork
from costmodels.collectives import collective_seconds
from costmodels.compute import stream_seconds
from costmodels.overlap import bucketed_tail_seconds, exposed_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightGroup:
    """Weights whose gradients are reduced over the same ranks.

    Attributes:
        parameters: on a rank, [plans, ranks].
        shards, replicas: ranks that divide the state, and groups of them with equal gradients, [plans, 1].
        stride: distance in ranks between neighbours, [plans, 1].
    """

    parameters: Floats
    shards: Ints
    replicas: Ints
    stride: Ints


def weight_groups(plans: PlanArrays, work: RankWork) -> tuple[WeightGroup, ...]:
    """Dense weights, and experts where the model has any."""
    column = (slice(None), None)
    shards, replicas = plans.shards[column], plans.replicas[column]
    dense = WeightGroup(
        parameters=work.parameters - work.experts, shards=shards, replicas=replicas, stride=plans.stride("data")[column]
    )
    if not work.experts.any():
        return (dense,)
    ranks = plans.expert_ranks[column]
    # Replicas around sharded groups stay what they are; a group of experts has fewer shards.
    expert_shards = np.where(shards > 1, np.maximum(ranks // np.maximum(replicas, 1), 1), 1)
    experts = WeightGroup(
        parameters=work.experts,
        shards=expert_shards,
        replicas=np.maximum(ranks // expert_shards, 1),
        stride=(plans.ep * plans.etp)[column],
    )
    return dense, experts


def exposed_data_parallel(setting: Setting, plans: PlanArrays, work: RankWork, num_microbatches: Floats) -> Floats:
    """Replicated gradients in buckets beside the last backward; sharded state by gathers and scatters.

    ZeRO-1 and ZeRO-2 gather the parameters once a step and scatter the gradients once; ZeRO-3 gathers them for every
    forward and every backward, in a pipeline m + 1 times (see traffic.num_gathers), block by block. Replicas around
    sharded groups add an all_reduce of the shard. Context parallel ranks have equal weights and unlike gradients: they
    count as data parallel ranks here.
    """
    stack, groups = setting.stack, weight_groups(plans, work)
    zero = plans.zero[:, None]
    replicated: Any = np.zeros_like(work.parameters)
    if (plans.zero == 0).any():
        replicated = sum((_replicated(setting, plans, work, group) for group in groups), replicated)
    if (plans.zero == 0).all():
        gathered = communication = np.zeros_like(work.parameters)
    else:
        gathered, communication = _sharded(setting, plans, work, num_microbatches, groups)
    window = _window(plans, work, num_microbatches)
    if setting.cluster.link_uses_host:
        exposed: Any = communication
    else:
        exposed = exposed_seconds(communication, window, hidden=stack.data.shard_hidden, leak=stack.data.shard_leak)
    exposed = exposed + np.where(zero < 3, plans.shards[:, None] * stack.data.owner_seconds, 0.0)
    exposed = np.where(plans.shards[:, None] > 1, exposed, 0.0)
    if stack.pipeline.serial_stages:
        # Every stage gathers before its first forward, for which the next stage waits.
        share = exposed / np.maximum(communication, 1e-30)
        real = np.arange(exposed.shape[1]) < plans.pp[:, None]
        exposed = exposed + np.cumsum(share * gathered * real, axis=1)[:, -1:] - share * gathered
        if not stack.pipeline.reduces_last:
            # A stage reduces within its last backward, for which the stage before waits.
            replicated = np.cumsum((replicated * real)[:, ::-1], axis=1)[:, ::-1]
    return np.asarray(np.where(zero == 0, replicated, exposed))


def _sharded(
    setting: Setting, plans: PlanArrays, work: RankWork, num_microbatches: Floats, groups: tuple[WeightGroup, ...]
) -> tuple[Floats, Floats]:
    """(seconds of gathering all weights once, seconds of all sharded communication of a step)."""
    zero, m = plans.zero[:, None], num_microbatches[:, None]
    repeated = setting.stack.data.accumulates_sharded & (zero >= 2)
    scatters = np.where(repeated, m, 1.0)
    gathers = gathers_per_step(plans, num_microbatches)
    pieces = np.maximum(work.num_groups, 1.0)
    gathered, communication = np.zeros_like(work.parameters), np.zeros_like(work.parameters)
    for group in groups:
        gradient = group.parameters * setting.reduce_bytes
        weights = group.parameters * setting.gather_bytes
        gather = pieces * _seconds(setting, "all_gather", group.shards, group.stride, weights / pieces)
        scatter = pieces * _seconds(setting, "reduce_scatter", group.shards, group.stride, gradient / pieces)
        shard = gradient / np.maximum(group.shards, 1)
        stride = group.stride * group.shards
        reduce_shard = pieces * _seconds(setting, "all_reduce", group.replicas, stride, shard / pieces)
        waiting = pieces * (gathers + scatters) * setting.collective_wait
        gathered = gathered + gather
        communication = communication + gathers * gather + scatters * scatter + reduce_shard + waiting
    return gathered, communication


def _replicated(setting: Setting, plans: PlanArrays, work: RankWork, group: WeightGroup) -> Any:
    habits = setting.stack.data
    gradient = group.parameters * setting.reduce_bytes
    buckets = 1.0 + np.ceil(np.maximum(gradient - habits.first_bucket_bytes, 0.0) / habits.bucket_bytes)
    communication = buckets * _seconds(setting, "all_reduce", group.replicas, group.stride, gradient / buckets)
    if not habits.bucketed_overlap or setting.cluster.link_uses_host:
        return communication
    tail: Floats = bucketed_tail_seconds(
        communication, work.backward_seconds, gradient, habits.first_bucket_bytes, habits.bucket_bytes
    )
    overlapped = tail + habits.replicated_leak * (communication - tail)
    if habits.overlap_single_stage:
        return np.where(plans.pp[:, None] > 1, communication, overlapped)
    return overlapped


def _window(plans: PlanArrays, work: RankWork, num_microbatches: Floats) -> Floats:
    """Compute beside which sharded communication can hide: the passes of the first and last virtual stage.

    Under ZeRO-3 every pass has its own gathers, so all passes count.
    """
    m, pp, vp = (x[:, None] for x in (num_microbatches, plans.pp, plans.vp))
    once = work.pass_seconds * np.where(pp > 1, np.minimum(m, pp) * (vp - 1) / vp + 1 / vp, 1.0)
    return np.where(plans.zero[:, None] == 3, work.pass_seconds * m, once)


def _seconds(setting: Setting, kind: str, ranks: Any, stride: Any, num_bytes: Any) -> Any:
    many = np.asarray(ranks) > 1
    if not many.any():
        return np.zeros(np.broadcast_shapes(many.shape, np.shape(num_bytes)))
    seconds = collective_seconds(setting.cluster, kind, ranks, stride, num_bytes, setting.stack.algorithms)
    return np.where(many, seconds, 0.0)


def copy_seconds(setting: Setting, plans: PlanArrays, work: RankWork, num_microbatches: Floats) -> Floats:
    """Copies between parameters and the flat buffers that are sent, [plans, ranks].

    Buckets of replicated gradients are written and divided by the ranks: four passes over them. Gathered weights are
    copied out and gradients to scatter copied in: two passes each.
    """
    if not setting.stack.data.copies_buffers:
        return np.zeros_like(work.parameters)
    zero, many = plans.zero[:, None], (plans.dp * plans.cp)[:, None] > 1
    gradient = work.parameters * setting.reduce_bytes
    weights = work.parameters * setting.gather_bytes
    sharded = 2 * gathers_per_step(plans, num_microbatches) * weights + 2 * gradient
    moved = np.where(many, np.where(zero == 0, 4 * gradient, np.where(plans.shards[:, None] > 1, sharded, 0.0)), 0.0)
    seconds: Floats = np.asarray(stream_seconds(setting.cluster.device, moved, "elementwise", ops=0.0))
    return seconds


def gathers_per_step(plans: PlanArrays, num_microbatches: Floats) -> Floats:
    """All-gathers of each weight, [plans, 1]: one; under ZeRO-3 2m, in a pipeline m + 1 (see traffic.num_gathers)."""
    m = num_microbatches[:, None]
    many = np.where(plans.pp[:, None] > 1, m + 1, 2 * m)
    return np.asarray(np.where(plans.zero[:, None] == 3, many, 1.0))
