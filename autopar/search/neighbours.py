"""Plans that differ from a plan in one decision: what somebody would try who finds that it does not work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from autopar.errors import PlanError
from autopar.estimate import Setting
from autopar.graph import RECOMPUTE_MODULES
from autopar.layout import Layout
from autopar.plan import Plan, Recompute, ScheduleName, default_schedule
from autopar.search.space import divisors

DEFAULT_SCHEDULES = (ScheduleName.ONE_F_ONE_B, ScheduleName.INTERLEAVED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """A plan and what it changes: ``kind`` groups alternatives of one decision, ``words`` says which this is."""

    kind: str
    words: str
    plan: Plan


def neighbours(setting: Setting, plan: Plan) -> tuple[Neighbour, ...]:
    """All plans one decision away, each once, violations of the model or batch not yet looked at.

    Decisions: recomputation (selective by module, full for some or all blocks), ZeRO stage, microbatch, offload, the
    usual schedule in place of another, and each degree, for which data parallelism makes room or takes what is left.
    The world size becomes that of the cluster.
    """
    found: dict[str, Neighbour] = {}
    for kind, words, make in _changes(setting, plan):
        try:
            changed = make()
        except PlanError:
            continue
        if changed != plan:
            found.setdefault(changed.slug, Neighbour(kind=kind, words=words, plan=changed))
    return tuple(found.values())


Change = tuple[str, str, Callable[[], Plan]]


def _changes(setting: Setting, plan: Plan) -> Iterator[Change]:
    yield from _recomputations(setting, plan)
    yield from _shardings(setting, plan)
    yield from _microbatches(setting, plan)
    yield from _degrees(setting, plan)
    if plan.offload_optimizer:
        yield "offload", "optimizer state on the devices", partial(dataclasses.replace, plan, offload_optimizer=False)
    elif setting.stack.offers.offload:
        yield "offload", "optimizer state in host memory", partial(dataclasses.replace, plan, offload_optimizer=True)
    if plan.schedule not in DEFAULT_SCHEDULES:
        schedule = default_schedule(plan.layout.vp)
        yield "schedule", f"the {schedule} schedule", lambda: dataclasses.replace(plan, schedule=schedule)


def _recomputations(setting: Setting, plan: Plan) -> Iterator[Change]:
    def make(recompute: Recompute, modules: tuple[str, ...] = (), layers: int = 0) -> Callable[[], Plan]:
        return lambda: dataclasses.replace(
            plan, recompute=recompute, recompute_modules=modules, recompute_layers=layers
        )

    tagged, offers = {op.module for op in setting.graph.ops}, setting.stack.offers
    modules = [module for module in RECOMPUTE_MODULES if module in tagged and module in offers.selective]
    yield "recompute", "no recomputation", make(Recompute.NONE)
    yield "recompute", "selective recomputation", make(Recompute.SELECTIVE)
    for number in range(1, len(modules) + 1):
        for chosen in {tuple(modules[:number]), (modules[number - 1],)}:
            yield "recompute", f"selective recomputation of {' and '.join(chosen)}", make(Recompute.SELECTIVE, chosen)
    most = max(plan.blocks_of_stages(setting.graph.num_blocks), default=1)
    for layers in range(1, most if offers.partial_recompute else 1):
        words = f"full recomputation of {layers} block{'s' if layers > 1 else ''} of each virtual stage"
        yield "recompute", words, make(Recompute.FULL, (), layers)
    yield "recompute", "full recomputation", make(Recompute.FULL)


def _shardings(setting: Setting, plan: Plan) -> Iterator[Change]:
    layout = plan.layout

    def make(zero: int) -> Plan:
        replicate, shard = (layout.dp, 1) if zero == 0 else (1, layout.dp)
        spread = dataclasses.replace(layout, dp_replicate=replicate, dp_shard=shard)
        return dataclasses.replace(plan, zero_stage=zero, layout=spread)

    for zero in setting.stack.data.shardable:
        yield "sharding", f"ZeRO-{zero}" if zero else "no sharding", partial(make, zero)


def _microbatches(setting: Setting, plan: Plan) -> Iterator[Change]:
    batch, dp = setting.workload.global_batch, plan.layout.dp
    for size in divisors(batch // dp) if batch % dp == 0 else ():
        words = f"microbatches of {size}"
        yield "microbatch", words, partial(dataclasses.replace, plan, microbatch_size=size)


def _degrees(setting: Setting, plan: Plan) -> Iterator[Change]:
    layout, world = plan.layout, setting.cluster.world_size
    if layout.world_size != world:
        yield "degrees", "dp", lambda: with_degrees(plan, world)
    for axis in ("tp", "pp", "cp"):
        others = {"tp": layout.cp * layout.pp, "pp": layout.tp * layout.cp, "cp": layout.tp * layout.pp}[axis]
        if world % others:
            continue
        for degree in divisors(world // others):
            words = f"{axis}{degree}"
            for sequence in (True, False) if axis == "tp" and degree > 1 else (plan.sequence_parallel,):
                yield axis, words, _degree(plan, world, axis, degree, sequence)
    for degree in divisors(max(1, setting.graph.num_blocks // layout.pp)) if layout.pp > 1 else ():
        yield "virtual stages", f"vp{degree}", partial(with_degrees, plan, world, vp=degree)
    if setting.graph.num_experts:
        for degree in divisors(setting.graph.num_experts):
            yield "ep", f"ep{degree}", partial(with_degrees, plan, world, ep=degree)


def _degree(plan: Plan, world: int, axis: str, degree: int, sequence: bool) -> Callable[[], Plan]:
    def make() -> Plan:
        changed = with_degrees(plan, world, **{axis: degree})
        return dataclasses.replace(changed, sequence_parallel=sequence and changed.layout.tp > 1)

    return make


def with_degrees(plan: Plan, world_size: int, **degrees: int) -> Plan:
    """The plan with other degrees; data parallelism takes the ranks that are left.

    Replicas around sharded groups stay where they divide; virtual stages, the schedule and the split of blocks fall
    back to the usual ones where they no longer fit. Raises PlanError where degrees do not divide the ranks.
    """
    layout = dataclasses.replace(plan.layout, dp_replicate=1, dp_shard=1, ep=1, etp=1)
    wanted = {"ep": plan.layout.ep, "etp": plan.layout.etp, **degrees}
    pp, vp = wanted.pop("pp", layout.pp), wanted.pop("vp", layout.vp)
    vp = vp if pp > 1 else 1
    used = wanted.get("tp", layout.tp) * wanted.get("cp", layout.cp) * pp
    if world_size % used:
        raise PlanError(f"degrees of {used} ranks do not divide {world_size}")
    dp, zero = world_size // used, plan.zero_stage
    replicas = plan.layout.dp_replicate if zero and dp % plan.layout.dp_replicate == 0 else 1
    if zero and replicas == dp:
        replicas = 1
    spread = (replicas, dp // replicas) if zero else (dp, 1)
    axes: Any = {**wanted, "pp": pp, "vp": vp, "dp_replicate": spread[0], "dp_shard": spread[1]}
    changed: Layout = dataclasses.replace(layout, **axes)
    same_stages = (pp, vp) == (layout.pp, layout.vp)
    usual = plan.schedule in DEFAULT_SCHEDULES or not same_stages
    return dataclasses.replace(
        plan,
        layout=changed,
        sequence_parallel=plan.sequence_parallel and changed.tp > 1,
        schedule=default_schedule(vp) if usual else plan.schedule,
        stage_blocks=plan.stage_blocks if same_stages else (),
    )
