"""Bytes that each pipeline rank holds at its peak, by item, arrays [plans, ranks].

The peak of a step is one of three moments. At the first backward of the last microbatch to arrive all activations in
flight are held, and the gradients only if an earlier backward has made them or their buffers stay. At the end of the
last backward the gradients are whole and one microbatch's activations are gone. While the optimizer steps, some
engines hold copies of what they update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.estimate.arrays import SCHEDULE_CODES, PlanArrays, schedules_of
from autopar.estimate.dataparallel import weight_groups
from autopar.estimate.pieces import Floats
from autopar.estimate.setting import Setting
from autopar.estimate.stages import RankWork
from autopar.workload import Precision
from costmodels.memory import sharded
from costmodels.offload import host_bytes
from costmodels.pipeline import SPLIT_SCHEDULES, peak_in_flight, waiting_at_peak

ITEMS = ("parameters", "gradients", "optimizer", "activations", "working", "buffers", "fragmentation", "reserve")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Items at the peak, arrays [plans, ranks] in bytes; their sum is the peak. ``host`` is in the host's memory."""

    parameters: Floats
    gradients: Floats
    optimizer: Floats
    activations: Floats
    working: Floats
    buffers: Floats
    fragmentation: Floats
    reserve: Floats
    host: Floats

    @property
    def total(self) -> Floats:
        """Peak of every rank."""
        return sum((getattr(self, item) for item in ITEMS), np.zeros_like(self.parameters))


def rank_memory(
    setting: Setting, plans: PlanArrays, work: RankWork, num_microbatches: Floats, boundary: Floats
) -> RankMemory:
    """Peak of every rank. ``num_microbatches`` and ``boundary`` (bytes between stages) are [plans]."""
    stack, column = setting.stack, (slice(None), None)
    zero, shards, m = plans.zero[column], plans.shards[column], num_microbatches[column]
    zero = np.where(zero == 1, stack.data.stage_one, zero)
    flight = _in_flight(plans, work, m)
    between = _between_parts(plans, work, m)
    weights = work.parameters * setting.weight_bytes
    groups = weight_groups(plans, work)

    def held(per_weight: Any, from_stage: int) -> Floats:
        parts = [sharded(group.parameters * per_weight, zero, from_stage, group.shards) for group in groups]
        return np.asarray(sum(parts[1:], parts[0]))

    casts = stack.data.casts_weights and setting.weight_bytes < 4
    whole_weights = stack.data.shards_fp32 & (zero == 3) & (shards > 1) & (setting.weight_bytes < 4) | casts
    parameters = np.where(whole_weights, held(4.0, 1 if casts else 3), held(setting.weight_bytes, 3))
    # FSDP2 keeps the shards beside what it gathers; ZeRO-2 with gathered weights until the last backward.
    shard_beside = np.where(
        (zero == 2) & (shards > 1) & ~np.asarray(stack.data.persistent_gradients), weights / shards, 0.0
    )
    if casts:
        shard_beside = np.where((zero == 3) & (shards > 1), 0.0, weights)
    unsharded = work.parameters * setting.gradient_bytes
    # Without a scatter per microbatch, gradients add up whole until the last one.
    adds_up_whole = (zero >= 2) & (m > 1) & ~np.asarray(stack.data.accumulates_sharded)
    gradients = np.where(adds_up_whole, unsharded, held(setting.gradient_bytes, 2))
    if stack.data.quantized_weights and setting.workload.precision is Precision.FP8:
        saved = (work.parameters - work.vocabulary) * (setting.weight_bytes - 1)
        parameters = parameters - np.where(zero == 3, saved / shards, saved)
    state, master = setting.state_bytes, stack.data.master_bytes if stack.data.master_weights else 0.0
    optimizer = np.where(whole_weights, held(state - master, 1), held(state, 1))
    offload = plans.offload[column]
    host = np.where(offload, held(host_bytes_of_a_weight(setting), 1), 0.0)
    optimizer = np.where(offload, 0.0, optimizer)
    step = np.where(offload, 0.0, stack.memory.step_bytes)
    if stack.memory.step_stays:
        optimizer = optimizer + np.where(zero == 0, work.parameters * step, 0.0)
    in_buckets = (zero == 0) & (plans.replicas[column] > 1) & ~np.asarray(stack.data.persistent_gradients)
    buckets = np.where(in_buckets, gradients, 0.0)

    early = (m > flight) | stack.data.persistent_gradients
    held_late = np.maximum(flight - 1, 0.0)
    late = (work.kept - work.kept_end) * held_late + work.kept_end * np.where(plans.gpipe[column], held_late, 0.0)
    gradient_of_largest = work.largest * setting.gradient_bytes
    # Unsharded gradients of a sharded block wait for their scatter.
    waiting = np.where((zero >= 2) & (shards > 1), work.block_parameters * setting.gradient_bytes, 0.0)
    whole = np.where(in_buckets & (m == 1), 0.0, gradients)
    adds = (m > 1) & ~np.asarray(stack.kernels.fused_accumulation)
    loss, block = _moments(setting, plans, work, flight, boundary, adds)
    in_block = block.total > loss.total
    full = np.where(in_block, block.activations, loss.activations)
    temporary = np.where(in_block, block.working, loss.working)
    full = full + between
    at_start = np.where(early, whole, 0.0) + full + temporary
    at_end = whole + late + gradient_of_largest + waiting
    first = at_start >= at_end
    buffers = buckets + shard_beside + _gathered_bytes(setting, plans, work) + np.where(first, 0.0, waiting)
    buffers = buffers + _pipeline_bytes(setting, plans, work, flight, m, boundary)
    buffers = buffers + stack.memory.workspace_bytes + stack.memory.vocab_bytes * work.vocabulary
    used_gradients = np.where(first & ~early, 0.0, whole)
    activations = np.where(first, full, late)
    working = np.where(first, temporary, gradient_of_largest)
    stepping = np.where(stack.memory.step_stays & (zero == 0), 0.0, held(step, 1)) + whole
    steps = stepping > used_gradients + activations + working
    used_gradients = np.where(steps, whole, used_gradients)
    activations, working = np.where(steps, 0.0, activations), np.where(steps, stepping - whole, working)
    used = parameters + used_gradients + optimizer + activations + working + buffers
    return RankMemory(
        parameters=parameters,
        gradients=used_gradients,
        optimizer=optimizer,
        activations=activations,
        working=working,
        buffers=buffers,
        fragmentation=stack.memory.fragmentation * used,
        reserve=np.full_like(used, stack.memory.reserve_bytes),
        host=host,
    )


def host_bytes_of_a_weight(setting: Setting) -> float:
    """Bytes in host memory of a weight whose optimizer state is offloaded."""
    return float(
        host_bytes(
            1.0, state_bytes=setting.state_bytes, gradient_bytes=setting.gradient_bytes,
            weight_bytes=setting.weight_bytes,
        )
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Moment:
    activations: Floats
    working: Floats

    @property
    def total(self) -> Floats:
        return self.activations + self.working


def _moments(
    setting: Setting, plans: PlanArrays, work: RankWork, flight: Floats, boundary: Floats, adds: Any
) -> tuple[_Moment, _Moment]:
    """First backward of the last microbatch: the loss, and, once that is gone, the first block."""
    habits = setting.stack.memory
    # Whatever comes after the last block waits for its backward alone, unless all forwards come first.
    at_end = np.where(plans.gpipe[:, None], flight, np.minimum(flight, 1.0))
    held = (work.kept - work.kept_end) * flight + work.kept_end * at_end
    ends = np.where(adds, work.working_ends_adding, work.working_ends)
    inside = np.where(adds, work.working_adding, work.working)
    if habits.working == "boundary":
        ends = inside = _boundary_working(plans, boundary)
    inside = inside + habits.block_share * work.block_activations
    return _Moment(held, ends), _Moment(held - work.kept_loss + work.block_kept, inside)


def _boundary_working(plans: PlanArrays, boundary: Floats) -> Floats:
    """Two whole activations where tensor parallel ranks gather them, two local ones where a pipeline sends them."""
    whole = boundary * np.where(plans.sp, plans.tp, 1)
    return np.asarray(np.where(plans.tp > 1, 2 * whole, 0.0) + np.where(plans.pp > 1, 2 * boundary, 0.0))[:, None]


def _in_flight(plans: PlanArrays, work: RankWork, m: Floats) -> Floats:
    ranks = work.ranks
    flight = np.empty_like(work.parameters)
    for code in schedules_of(plans):
        hit = plans.schedule == code
        name = SCHEDULE_CODES[int(code)].value
        flight[hit] = peak_in_flight(name, ranks[hit], plans.pp[hit, None], m[hit], plans.vp[hit, None])
    return flight


def _between_parts(plans: PlanArrays, work: RankWork, m: Floats) -> Floats:
    """What gradients between the parts of split backwards add to the peak of the activations."""
    found, ranks = np.zeros_like(work.parameters), work.ranks
    for code in schedules_of(plans):
        name = SCHEDULE_CODES[int(code)].value
        if name in SPLIT_SCHEDULES:
            hit = plans.schedule == code
            found[hit] = waiting_at_peak(
                name, ranks[hit], plans.pp[hit, None], m[hit], kept=work.kept[hit], waiting=work.waiting[hit]
            )
    return found


def _gathered_bytes(setting: Setting, plans: PlanArrays, work: RankWork) -> Floats:
    """Gathered weights of the blocks that ZeRO-3 computes and fetches; ZeRO-2 counts them as parameters."""
    block = work.block_parameters * setting.weight_bytes * setting.stack.data.gathered_blocks
    return np.where((plans.shards[:, None] > 1) & (plans.zero[:, None] == 3), block, 0.0)


def _pipeline_bytes(
    setting: Setting, plans: PlanArrays, work: RankWork, flight: Floats, m: Floats, boundary: Floats
) -> Floats:
    """Receive buffers, one per microbatch, virtual stage and neighbour, and results in flight, which no stage keeps.

    The first stage receives only gradients, the last only activations.
    """
    ranks = work.ranks
    pp, vp = plans.pp[:, None], plans.vp[:, None]
    first, last = ranks == 0, ranks == pp - 1
    received = m * (2 * vp - first - last)
    results = flight * (vp - last)
    used = np.where(pp > 1, (received + results) * boundary[:, None], 0.0)
    return used if setting.stack.pipeline.buffers else np.zeros_like(used)
