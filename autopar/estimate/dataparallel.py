"""Seconds of data parallel communication that a step waits for, arrays [plans, ranks]."""

from __future__ import annotations

from typing import Any

import numpy as np

from autopar.estimate.arrays import PlanArrays
from autopar.estimate.pieces import Floats
from autopar.estimate.setting import Setting
from autopar.estimate.stages import RankWork
from costmodels.collectives import collective_seconds
from costmodels.compute import stream_seconds
from costmodels.overlap import bucketed_tail_seconds, exposed_seconds


def exposed_data_parallel(setting: Setting, plans: PlanArrays, work: RankWork, num_microbatches: Floats) -> Floats:
    """Replicated gradients in buckets beside the last backward; sharded state by gathers and scatters.

    ZeRO-1 and ZeRO-2 gather the parameters once a step and scatter the gradients once; ZeRO-3 gathers them for every
    forward and every backward, in a pipeline m + 1 times (see traffic.num_gathers), block by block. Replicas around
    sharded groups add an all_reduce of the shard. Context parallel ranks have equal weights and unlike gradients: they
    count as data parallel ranks here.
    """
    column = (slice(None), None)
    replicas, shards, zero = plans.replicas[column], plans.shards[column], plans.zero[column]
    gradient = work.parameters * setting.reduce_bytes
    stride = plans.tp[column]
    replicated = _replicated(setting, plans, work, gradient, stride)
    groups = np.maximum(work.num_groups, 1.0)
    weights = work.parameters * setting.weight_bytes
    gather = groups * _seconds(setting, "all_gather", shards, stride, weights / groups)
    scatter = groups * _seconds(setting, "reduce_scatter", shards, stride, gradient / groups)
    shard = gradient / np.maximum(shards, 1)
    reduce_shard = groups * _seconds(setting, "all_reduce", replicas, stride * shards, shard / groups)
    repeated = setting.stack.accumulates_sharded & (zero >= 2)
    scatters = np.where(repeated, num_microbatches[column], 1.0)
    gathers = gathers_per_step(plans, num_microbatches)
    waiting = groups * (gathers + scatters) * setting.collective_wait
    communication = gathers * gather + scatters * scatter + reduce_shard + waiting
    window = _window(plans, work, num_microbatches)
    stack = setting.stack
    if setting.cluster.link_uses_host:
        exposed: Any = communication
    else:
        exposed = exposed_seconds(communication, window, hidden=stack.shard_hidden, leak=stack.shard_leak)
    exposed = np.where(shards > 1, exposed, 0.0)
    if stack.serial_stages:
        # Every stage gathers before its first forward, for which the next stage waits.
        share = exposed / np.maximum(communication, 1e-30)
        exposed = exposed + np.cumsum(share * gather, axis=1)[:, -1:] - share * gather
        # A stage reduces within its last backward, for which the stage before waits.
        replicated = np.cumsum(replicated[:, ::-1], axis=1)[:, ::-1]
    return np.asarray(np.where(zero == 0, replicated, exposed))


def _replicated(setting: Setting, plans: PlanArrays, work: RankWork, gradient: Floats, stride: Any) -> Any:
    stack = setting.stack
    ranks = plans.replicas[:, None]
    buckets = 1.0 + np.ceil(np.maximum(gradient - stack.first_bucket_bytes, 0.0) / stack.bucket_bytes)
    communication = buckets * _seconds(setting, "all_reduce", ranks, stride, gradient / buckets)
    if not stack.bucketed_overlap or setting.cluster.link_uses_host:
        return communication
    tail: Floats = bucketed_tail_seconds(
        communication, work.backward_seconds, gradient, stack.first_bucket_bytes, stack.bucket_bytes
    )
    return tail


def _window(plans: PlanArrays, work: RankWork, num_microbatches: Floats) -> Floats:
    """Compute beside which sharded communication can hide: the passes of the first and last virtual stage.

    Under ZeRO-3 every pass has its own gathers, so all passes count.
    """
    m, pp, vp = (x[:, None] for x in (num_microbatches, plans.pp, plans.vp))
    once = work.pass_seconds * np.where(pp > 1, np.minimum(m, pp) * (vp - 1) / vp + 1 / vp, 1.0)
    return np.where(plans.zero[:, None] == 3, work.pass_seconds * m, once)


def _seconds(setting: Setting, kind: str, ranks: Any, stride: Any, num_bytes: Any) -> Any:
    seconds = collective_seconds(setting.cluster, kind, ranks, stride, num_bytes, setting.stack.algorithms)
    return np.where(np.asarray(ranks) > 1, seconds, 0.0)


def copy_seconds(setting: Setting, plans: PlanArrays, work: RankWork, num_microbatches: Floats) -> Floats:
    """Copies between parameters and the flat buffers that are sent, [plans, ranks].

    Buckets of replicated gradients are written and divided by the ranks: four passes over them. Gathered weights are
    copied out and gradients to scatter copied in: two passes each.
    """
    if not setting.stack.copies_buffers:
        return np.zeros_like(work.parameters)
    zero, many = plans.zero[:, None], (plans.dp * plans.cp)[:, None] > 1
    gradient = work.parameters * setting.reduce_bytes
    weights = work.parameters * setting.weight_bytes
    sharded = 2 * gathers_per_step(plans, num_microbatches) * weights + 2 * gradient
    moved = np.where(many, np.where(zero == 0, 4 * gradient, np.where(plans.shards[:, None] > 1, sharded, 0.0)), 0.0)
    seconds: Floats = np.asarray(stream_seconds(setting.cluster.device, moved, "elementwise", ops=0.0))
    return seconds


def gathers_per_step(plans: PlanArrays, num_microbatches: Floats) -> Floats:
    """All-gathers of each weight, [plans, 1]: one; under ZeRO-3 2m, in a pipeline m + 1 (see traffic.num_gathers)."""
    m = num_microbatches[:, None]
    many = np.where(plans.pp[:, None] > 1, m + 1, 2 * m)
    return np.asarray(np.where(plans.zero[:, None] == 3, many, 1.0))
