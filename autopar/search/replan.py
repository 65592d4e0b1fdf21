"""Replanning after a cluster changed: the new plan, what moving to it costs, and after how many steps that has paid.

Compared with the new plan is the old one carried over: the same degrees with as many replicas as the cluster has room
for. A run that goes on under a plan pays once to switch to it (bytes that move, and a restart where anything changes),
and then for every step. With switch seconds c and step seconds t of the new plan and C and T of the old one, the move
has paid after (c - C) / (T - t) steps; C is 0 where the old plan simply goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InputError, PlanError
from autopar.estimate import Estimate, Setting, estimate
from autopar.layout import Layout
from autopar.model.build import build_graph
from autopar.plan import Plan, PlanFile, Rejected, violations
from autopar.search.exhaustive import Unsupported, search
from autopar.search.renumber import node_order, origins_of
from autopar.search.reshard import Reshard, origins, reshard
from autopar.search.space import Space
from costmodels.hardware import Cluster
from costmodels.stack import Stack
from costmodels.units import GIB

RESTART_SECONDS = 120.0
"""From the end of the old processes to the first step of the new ones, bytes not counted. Assumed."""
STORAGE_PER_DEVICE = 2e12 / 16384
"""Bytes/s of checkpoint storage per device: 2 TB/s sustained for 16,384 GPUs (Llama 3, 2024, section 3.3.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchCosts:
    """What switching costs beside the bytes.

    Attributes:
        restart_s: seconds of a restart.
        storage_bandwidth: bytes/s of checkpoint storage, for all ranks together; 0 means STORAGE_PER_DEVICE for each.
        steps_since_checkpoint: that are run again where state has to come from the last checkpoint.
    """

    restart_s: float = RESTART_SECONDS
    storage_bandwidth: float = 0.0
    steps_since_checkpoint: float = 0.0

    def __post_init__(self) -> None:
        for name in ("restart_s", "storage_bandwidth", "steps_since_checkpoint"):
            if getattr(self, name) < 0:
                raise InputError(f"replanning: {name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A plan that the run can go on with.

    Attributes:
        estimate: of the plan on the new cluster.
        move: bytes of every rank.
        links_s: slowest rank's bytes over the links, see ``links_seconds``.
        storage_s: through a checkpoint instead, see ``storage_seconds``.
        from_checkpoint: state is lost, so that all ranks go back to the last checkpoint.
        restarts: whether anything changes.
        switch_s: seconds until the first new step: the way taken, the restart, and steps that are run again.
        node_order: old node at each new one, -1 for a machine without state; empty: ranks keep their numbers.
    """

    estimate: Estimate
    move: Reshard
    links_s: float
    storage_s: float
    from_checkpoint: bool
    restarts: bool
    switch_s: float
    node_order: tuple[int, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.estimate.plan

    @property
    def received(self) -> NDArray[np.float64]:
        """Bytes that each rank gets, [ranks]: what it lacks, or from a checkpoint all that it needs."""
        return self.move.needed if self.from_checkpoint else self.move.moved

    def total_s(self, steps: float) -> float:
        """Seconds to switch and run so many steps."""
        return self.switch_s + steps * self.estimate.step_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Replanning:
    """The answer.

    Attributes:
        old: the plan that the run has been under.
        world: ranks of the new cluster.
        lost: old ranks whose state is gone.
        new: the plan to move to: the fastest per step, or the best for the remaining steps where these are given.
        kept: the old plan carried over; None if it cannot run, and ``refused`` says why.
        remaining_steps: that the choice was made for; None if for the time of a step alone.
        costs: of switching, the storage's bandwidth filled in.
    """

    old: Plan
    world: int
    lost: tuple[int, ...]
    new: Option
    kept: Option | None
    refused: Rejected | None
    remaining_steps: float | None
    costs: SwitchCosts

    @property
    def payback_steps(self) -> float | None:
        """Steps until the move has paid; None where the old plan cannot run, or the new one is no faster."""
        if self.kept is None:
            return None
        gain = self.kept.estimate.step_s - self.new.estimate.step_s
        return max(self.new.switch_s - self.kept.switch_s, 0.0) / gain if gain > 0 else None


def setting_of(old: PlanFile, cluster: Cluster, stack: Stack) -> Setting:
    """Model and workload of a plan file on another cluster. Raises InputError if its devices lack the precision."""
    cluster.device.peak(old.workload.precision.value)
    graph = build_graph(old.model, seq_len=old.workload.seq_len, precision=old.workload.precision)
    return Setting(graph=graph, workload=old.workload, cluster=cluster, stack=stack)


def replan(
    old: PlanFile,
    setting: Setting,
    *,
    lost: Collection[int] = (),
    remaining_steps: float | None = None,
    costs: SwitchCosts | None = None,
    renumber: bool = False,
    top: int = 10,
    space: Space | None = None,
    unsupported: Unsupported | None = None,
) -> Replanning:
    """Plan anew for a changed cluster.

    Args:
        old: the plan file of the run; rank i of the new cluster is its rank i (see ``reshard.origins``).
        setting: model and workload of the run, with the new cluster.
        lost: old ranks whose state is gone.
        remaining_steps: that the run has still to do; then the plan is chosen, among the ``top`` fastest and the old
            one, whose switch and remaining steps take least.
        costs: of switching.
        renumber: start the nodes in the order that leaves most bytes in place, instead of by their old numbers.
        top: plans to choose from.
        space: limits on what is looked at.
        unsupported: asks a runtime what it cannot run; such plans are no choice.

    Raises:
        NoFeasiblePlan: nothing fits the new cluster.
        PlanError: a lost rank that the old plan did not have.
    """
    costs = costs or SwitchCosts()
    if not costs.storage_bandwidth:
        costs = dataclasses.replace(costs, storage_bandwidth=STORAGE_PER_DEVICE * setting.cluster.world_size)

    def option(found: Estimate) -> Option:
        return price_switch(setting, old.plan, found, lost=lost, costs=costs, renumber=renumber)

    carried = carry_over(setting, old.plan)
    if unsupported is not None and not isinstance(carried, Rejected):
        carried = next(iter(unsupported(carried.plan)), carried)
    kept = None if isinstance(carried, Rejected) else option(carried)
    ranked = search(setting, top=1 if remaining_steps is None else top, space=space, unsupported=unsupported).best
    options = [option(found) for found in ranked if kept is None or found.plan != kept.plan]
    if kept is not None:
        options.append(kept)
    if remaining_steps is None:
        new = min(options, key=lambda choice: choice.estimate.step_s)
    else:
        new = min(options, key=lambda choice: choice.total_s(remaining_steps))
    return Replanning(
        old=old.plan,
        world=setting.cluster.world_size,
        lost=tuple(sorted(lost)),
        new=new,
        kept=kept,
        refused=carried if isinstance(carried, Rejected) else None,
        remaining_steps=remaining_steps,
        costs=costs,
    )


def carry_over(setting: Setting, plan: Plan) -> Estimate | Rejected:
    """The plan's degrees with as many replicas as fit the cluster and the batch, priced, or why not even one runs.

    Where the replicas do not use all ranks, the rest are idle; the ranks used must be whole nodes, or part of one.
    """
    layout, world = plan.layout, setting.cluster.world_size
    group = layout.tp * layout.cp * layout.pp
    if group > world:
        return Rejected(
            reason="world size",
            detail=f"one replica of the old plan takes tp*cp*pp={group} ranks, but there are {world}",
            numbers={"replica": group, "world_size": world},
        )
    refused: list[Rejected] = []
    for dp in range(world // group, 0, -1):
        found = _carried(setting, plan, dp)
        if not isinstance(found, Rejected):
            return found
        refused.append(found)
        if found.reason == "memory":  # fewer replicas have no more room
            break
    first, last = refused[0], refused[-1]
    return last if first is last else dataclasses.replace(last, detail=f"{first.detail}; {last.detail}")


def _carried(setting: Setting, plan: Plan, dp: int) -> Estimate | Rejected:
    ranks = plan.layout.tp * plan.layout.cp * plan.layout.pp * dp
    cluster = _part_of(setting.cluster, ranks)
    if cluster is None:
        detail = f"dp={dp} takes {ranks} ranks, which are not whole nodes of {setting.cluster.devices_per_node}"
        return Rejected(reason="nodes", detail=detail, numbers={"ranks": ranks})
    try:
        carried = dataclasses.replace(plan, layout=_with_replicas(plan, dp))
    except PlanError as error:
        return Rejected(reason="layout", detail=str(error), numbers={"dp": dp})
    found = violations(carried, setting.graph, setting.workload, ranks)
    if found:
        return found[0]
    priced = estimate(dataclasses.replace(setting, cluster=cluster), carried)
    if priced.memory_bytes > priced.memory_limit:
        need, limit = priced.memory_gib, priced.memory_limit / GIB
        detail = f"with dp={dp} it needs {need:.1f} GiB of {limit:.1f} GiB per device"
        return Rejected(reason="memory", detail=detail, numbers={"memory_gib": need, "limit_gib": limit})
    return priced


def _with_replicas(plan: Plan, dp: int) -> Layout:
    """So many data parallel ranks, sharded as before where that is possible."""
    layout = plan.layout
    if plan.zero_stage == 0:
        return dataclasses.replace(layout, dp_replicate=dp, dp_shard=1)
    hybrid = layout.dp_replicate > 1 and layout.dp_shard > 1 and dp % layout.dp_shard == 0
    shards = layout.dp_shard if hybrid else dp
    return dataclasses.replace(layout, dp_replicate=dp // shards, dp_shard=shards)


def _part_of(cluster: Cluster, ranks: int) -> Cluster | None:
    if ranks == cluster.world_size:
        return cluster
    if ranks % cluster.devices_per_node == 0:
        return dataclasses.replace(cluster, num_nodes=ranks // cluster.devices_per_node)
    if ranks < cluster.devices_per_node:
        return dataclasses.replace(cluster, num_nodes=1, devices_per_node=ranks)
    return None


def price_switch(
    setting: Setting, old: Plan, found: Estimate, *, lost: Collection[int], costs: SwitchCosts, renumber: bool = False
) -> Option:
    """What going on with a plan costs a run that has been under ``old``; arguments as of ``replan``."""
    order = node_order(setting, old, found.plan, lost=lost) if renumber else None
    if order is None:
        origin = origins(old.layout.world_size, found.plan.layout.world_size, lost)
    else:
        origin = origins_of(order, setting.cluster.devices_per_node, lost)
    move = reshard(setting, old, found.plan, origin=origin, lost=lost)
    from_checkpoint = bool(move.lost.any())
    restarts = found.plan != old or bool(lost)
    links = links_seconds(setting.cluster, move)
    storage = storage_seconds(setting.cluster, move, costs.storage_bandwidth, writes=not from_checkpoint)
    again = costs.steps_since_checkpoint * found.step_s if from_checkpoint else 0.0
    switch = (storage if from_checkpoint else links) + costs.restart_s + again if restarts else 0.0
    return Option(
        estimate=found, move=move, links_s=links, storage_s=storage, from_checkpoint=from_checkpoint,
        restarts=restarts, switch_s=switch, node_order=() if order is None else tuple(order.tolist()),
    )  # fmt: skip


def links_seconds(cluster: Cluster, move: Reshard) -> float:
    """The slowest rank's bytes from its node over the node's link, then those from elsewhere over the network.

    Only what a rank receives is counted: bytes that many ranks need are passed on from one to the next while they
    arrive, so that no sender is busier than a receiver. Wrong where many ranks need different bytes of one holder.
    """
    node, network = cluster.node_link, cluster.network_link
    inside = move.inside / (node.bandwidth * node.efficiency)
    across = move.across / (network.bandwidth * network.efficiency)
    return float(np.max(inside + across))


def storage_seconds(cluster: Cluster, move: Reshard, bandwidth: float, *, writes: bool) -> float:
    """Through checkpoint storage: every byte of the model is read once, and written once before if ``writes``.

    Ranks that need the same bytes pass them on over the network, which bounds a rank's share.
    """
    network = cluster.network_link
    read = max(move.model_bytes / bandwidth, float(np.max(move.needed)) / (network.bandwidth * network.efficiency))
    return read + (move.model_bytes / bandwidth if writes else 0.0)
