"""Step time of plans from the work of their pipeline ranks: pipeline, data parallel, optimizer, as named terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.errors import PlanError
from autopar.estimate.arrays import SCHEDULE_CODES, Ints, PlanArrays, distinct
from autopar.estimate.dataparallel import copy_seconds, exposed_data_parallel, weight_groups
from autopar.estimate.pieces import Floats
from autopar.estimate.setting import Setting
from autopar.estimate.stages import RankWork
from autopar.plan import V_SCHEDULES, ScheduleName
from costmodels.collectives import collective_seconds
from costmodels.compute import stream_seconds
from costmodels.memory import sharded
from costmodels.offload import Host, offloaded_step
from costmodels.pipeline import pipeline_seconds, schedule_seconds

WEIGHT_SHARE = 0.5
"""Share of a backward that is the gradients of weights; exact for products, attention and norms have none."""
STRAGGLER_DEVICES = 8
"""Devices of the machine in whose number stragglers are counted, where NVLink does not join more."""
SPLIT_BACKWARD = (ScheduleName.ZB_H1, ScheduleName.ZB_H2, *V_SCHEDULES)

TERMS = (
    "forward", "backward", "recompute", "tensor_parallel", "context_parallel", "expert_parallel", "launch_bound",
    "pipeline_bubble", "pipeline_transfer", "processor_sharing", "gradient_accumulation", "data_parallel", "optimizer",
    "step_overhead", "stragglers",
)  # fmt: skip
"""Names of the parts of a step. They add up to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineEnds:
    """When the passes of every rank end, [plans, ranks], and how much longer sharing processors made them."""

    ends: Floats
    sharing: Floats

    def take(self, rows: Ints) -> PipelineEnds:
        """The same for plans whose pipelines are those of these rows."""
        return PipelineEnds(ends=self.ends[rows], sharing=self.sharing[rows])


def transfer_seconds(setting: Setting, plans: PlanArrays, boundary: Floats) -> Floats:
    """One transfer of ``boundary`` bytes between pipeline neighbours, [plans].

    Without sequence parallelism all tensor parallel ranks hold the same activation; a stack that scatters sends a part
    from each and gathers the parts inside the receiving group (Narayanan et al. 2021, section 4.1). Inside a node a
    send reaches a stack's ``node_share`` of the links.
    """
    stride = plans.stride("pp")
    algorithms, habits = setting.stack.algorithms, setting.stack.pipeline
    scatters = habits.scatters & (plans.tp > 1) & ~plans.sp
    part = boundary / np.where(scatters, plans.tp, 1)
    inside = stride < setting.cluster.domain
    seconds = collective_seconds(
        setting.cluster, "send", 2, stride, part / np.where(inside, habits.node_share, 1.0), algorithms
    )
    if habits.scatters:
        gather = collective_seconds(setting.cluster, "all_gather", plans.tp, plans.stride("tp"), boundary, algorithms)
        seconds = seconds + np.where(scatters, gather, 0.0)
    seconds = seconds * np.where(plans.vp > 1, habits.interleaved_exposed, 1.0)
    return np.asarray(np.where(plans.pp > 1, seconds + setting.collective_wait, 0.0))


def closed_form_ends(plans: PlanArrays, work: RankWork, num_microbatches: Floats, transfer: Floats) -> PipelineEnds:
    """Ends on processors of their own: the schedule's closed form for the first rank.

    Later ranks end as many backwards sooner, but where gradients of weights are put off to the end.
    """
    forwards, backwards, ranks = work.forward_seconds, work.backward_seconds, work.ranks
    end, before = np.empty(len(plans)), np.empty(ranks.shape)
    first, kind = distinct(plans.schedule, plans.pp)
    for index, (code, pp) in enumerate(zip(plans.schedule[first], plans.pp[first].tolist(), strict=True)):
        hit = np.flatnonzero(kind == index)
        name, rows = SCHEDULE_CODES[int(code)], hit[:, None]
        everyone = work.place.like[work.place.shape[hit], :pp]
        later = WEIGHT_SHARE if name in SPLIT_BACKWARD else 0.0
        backward = backwards[rows, everyone]
        end[hit] = schedule_seconds(
            name.value, forwards[rows, everyone], backward * (1 - later), backward * later, num_microbatches[hit],
            plans.vp[hit], transfer[hit],
        )  # fmt: skip
        if name in SPLIT_BACKWARD:
            before[hit] = 0.0
        else:
            sooner = (backward + transfer[rows]) / plans.vp[rows]
            before[hit] = np.take_along_axis(np.cumsum(sooner, axis=1) - sooner, ranks[hit], axis=1)
    return PipelineEnds(ends=end[:, None] - before, sharing=np.zeros_like(before))


def step_terms(
    setting: Setting, plans: PlanArrays, work: RankWork, num_microbatches: Floats, transfer: Floats, ends: PipelineEnds
) -> dict[str, Floats]:
    """Parts of the step, each [plans], named as in TERMS; their sum is the step time.

    The step ends with the rank that is last through its passes, its data parallel communication and its optimizer.
    Passes are those of the slowest rank; what the pipeline adds to them is bubble and transfers.
    """
    slowdown = setting.cluster.slowdown(active_ranks(setting, plans))
    accumulate = _accumulation(setting, plans, work, num_microbatches) * slowdown
    update = _update(setting, plans, work) * slowdown
    data = exposed_data_parallel(setting, plans, work, num_microbatches)
    data = data + slowdown * copy_seconds(setting, plans, work, num_microbatches)
    last = np.argmax(ends.ends + data + update + accumulate, axis=1)
    slowest = np.argmax(work.pass_seconds, axis=1)
    m = num_microbatches

    def of(quantity: Any, rank: Any) -> Floats:
        chosen: Floats = np.take_along_axis(np.asarray(quantity), rank[:, None], axis=1)[:, 0]
        return chosen

    terms: dict[str, Floats] = {
        "forward": m * of(work.forward, slowest),
        "backward": m * of(work.backward, slowest),
        "recompute": m * of(work.recompute, slowest),
        "tensor_parallel": m * of(work.tensor, slowest),
        "context_parallel": m * of(work.context, slowest),
        "expert_parallel": m * of(work.expert, slowest),
        "launch_bound": m * of(work.stall, slowest),
    }
    moved = pipeline_seconds(0.0, 0.0, plans.pp, m, plans.vp, transfer, all_forward_first=plans.gpipe)
    finished, sharing = of(ends.ends, last), of(ends.sharing, last)
    busy: Floats = sum(terms.values(), np.zeros_like(m))
    terms["pipeline_transfer"] = np.minimum(moved, np.maximum(finished - sharing - busy, 0.0))
    terms["processor_sharing"] = sharing
    bubble = finished - busy - terms["pipeline_transfer"] - sharing
    terms["pipeline_bubble"] = np.where(plans.pp > 1, bubble, 0.0)
    terms["gradient_accumulation"] = of(accumulate, last)
    terms["data_parallel"] = of(data, last)
    terms["optimizer"] = of(update, last)
    host = setting.stack.host.step_seconds
    terms["step_overhead"] = np.full_like(m, host)
    together: Floats = sum(terms.values(), np.zeros_like(m))
    terms["stragglers"] = straggler_share(setting, plans.world_size, plans.dp * plans.cp) * together
    return {name: terms[name] for name in TERMS}


def straggler_share(setting: Setting, world_size: Ints, replicas: Ints) -> Floats:
    """Share of a step that waits for the slowest machine, for every doubling of replicas on machines of their own."""
    machines = world_size / max(STRAGGLER_DEVICES, setting.cluster.domain)
    doublings = np.log2(np.maximum(np.minimum(machines, replicas), 1.0))
    return np.asarray(setting.stack.straggler * doublings)


def active_ranks(setting: Setting, plans: PlanArrays) -> int:
    """Ranks of one machine that compute at once when all do; plans of one search use equally many ranks."""
    machine = setting.cluster.ranks_per_machine or setting.cluster.devices_per_node
    return min(machine, int(plans.world_size.max(initial=1)))


def _accumulation(setting: Setting, plans: PlanArrays, work: RankWork, num_microbatches: Floats) -> Floats:
    """Adding every microbatch's gradients but the first to the sum: two reads and a write per weight.

    A product that accumulates in its epilogue saves one of the reads; where products are priced with the bytes that
    they move, these are among them. Where every microbatch's gradients are scattered, shards add up.
    """
    times = (num_microbatches - 1)[:, None]
    if setting.stack.kernels.fused_accumulation and setting.cluster.device.matmul.byte_cost:
        return np.zeros_like(times * work.parameters)
    held = work.parameters
    if setting.stack.data.accumulates_sharded:
        zero = plans.zero[:, None]
        parts = [sharded(group.parameters, zero, 2, group.shards) for group in weight_groups(plans, work)]
        held = sum(parts[1:], parts[0])
    moved = (2 if setting.stack.kernels.fused_accumulation else 3) * setting.gradient_bytes * held
    each: Floats = np.asarray(stream_seconds(setting.cluster.device, moved, "elementwise", ops=0.0))
    return times * each


def _update(setting: Setting, plans: PlanArrays, work: RankWork) -> Floats:
    """Optimizer step: state read and written, gradient read, weight written (and read, where it has no master copy).

    Weights that are cast when they are used are written then, and the master copy is read once more.
    """
    width, stack = setting.weight_bytes, setting.stack
    state = setting.state_bytes
    has_master = stack.data.master_weights and width < 4
    moved = 2 * state + setting.gradient_bytes + width * (1 if has_master else 2)
    moved = moved + (stack.data.master_bytes if has_master and stack.data.casts_weights else 0.0)
    moved = moved * stack.kernels.traffic.get("optimizer", 1.0)
    zero = plans.zero[:, None]
    parts = [sharded(group.parameters * moved, zero, 1, group.shards) for group in weight_groups(plans, work)]
    local: Floats = sum(parts[1:], parts[0])
    here = np.asarray(stream_seconds(setting.cluster.device, local, "optimizer", ops=1.0))
    if not plans.offload.any():
        return here
    traffic = stack.kernels.traffic.get("optimizer", 1.0)
    step = offloaded_step(
        host_of(setting), local / moved, gradient_bytes=setting.gradient_bytes, weight_bytes=width,
        moved_bytes=moved / traffic,
    )  # fmt: skip
    return np.where(plans.offload[:, None], step.seconds(), here)


def host_of(setting: Setting) -> Host:
    """The host that state is offloaded to. Raises PlanError where the device has none that is described."""
    host = setting.cluster.device.host
    if host is None:
        raise PlanError(
            f"plan: optimizer state is offloaded, but device {setting.cluster.device.name} has no host described: drop "
            "offload, or describe its [host]"
        )
    return host
