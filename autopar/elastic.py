"""Training that goes on with fewer ranks: when a machine does not come back, plan anew for those that are left.

A run starts again on the same ranks as often as it may (``runtime.launch``). When that is used up, the node of the rank
to blame is left out, or on a single machine one rank; the planner picks the plan for the rest, of those that the
executor runs; and training goes on from its newest checkpoint, which any plan can read, with the same global batch and
the same order of samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from autopar.errors import InputError, NoFeasiblePlan
from autopar.estimate import Setting
from autopar.plan import Plan, PlanFile, Rejected
from autopar.runtime.launch.diagnosis import Fault, RunFault
from autopar.runtime.launch.nodes import Node
from autopar.runtime.support import unsupported
from autopar.search.replan import replan, setting_of
from autopar.search.space import Space
from costmodels.hardware import Cluster
from costmodels.stack import load_stack

OnMessage = Callable[[dict[str, Any]], None]
T = TypeVar("T")

SPACE = Space(offload=False)
_MACHINE_ERRORS = ("CUDA", "NCCL", "has no CUDA device", "Connection")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Nodes, and ranks on each of them."""

    nodes: tuple[Node, ...]
    ranks_per_node: int

    @property
    def number(self) -> int:
        """Ranks in all."""
        return len(self.nodes) * self.ranks_per_node


def train_on_what_is_left(
    content: PlanFile,
    ranks: Ranks,
    *,
    least: int,
    cluster_of: Callable[[Ranks], Cluster],
    run: Callable[[Plan, Ranks], T],
    stack: str,
    remaining_steps: Callable[[], int] | None = None,
    on_message: OnMessage | None = None,
) -> T:
    """Run a plan; each time its ranks cannot be had any more, go on under a new one for those that are left.

    Args:
        content: the plan with its model and workload.
        ranks: where it begins; as many as it is for.
        least: ranks below which it gives up.
        cluster_of: hardware of some ranks, for the planner.
        run: trains under a plan on these ranks, going on from the newest checkpoint.
        stack: what the planner takes the executor for.
        remaining_steps: to choose the plan for; None chooses for the time of a step.
        on_message: called before going on with the keys ``event`` (replan), ``what`` (one line: who is left out and
            why), ``slug`` (of the new plan) and ``ranks``.

    Raises:
        RunFault: the program itself failed, or too few ranks are left; what ``run`` raised.
    """
    plan = content.plan
    while True:
        try:
            return run(plan, ranks)
        except RunFault as failure:
            if not is_machines(failure.fault):
                raise
            found = next(_plans_without(content, plan, ranks, failure.fault, least, cluster_of, stack,
                                        remaining_steps), None)  # fmt: skip
            if found is None:
                raise
            (plan, ranks), left_out = found, _left_out(ranks, failure.fault, found[1])
            if on_message is not None:
                what = f"{failure.fault.what}: going on without {left_out}"
                on_message({"event": "replan", "what": what, "slug": plan.slug, "ranks": ranks.number})


def is_machines(fault: Fault) -> bool:
    """Whether a fault is one of the machine and not of the program: a rank killed, hung, or without its device."""
    return not fault.error or any(word in fault.error for word in _MACHINE_ERRORS)


def fewer(ranks: Ranks, lost: int | None) -> Iterator[Ranks]:
    """Ranks that are left without the one that was lost, the most first: whole nodes, or part of a single one."""
    if len(ranks.nodes) == 1:
        for number in range(ranks.ranks_per_node - 1, 0, -1):
            yield Ranks(nodes=ranks.nodes, ranks_per_node=number)
        return
    gone = len(ranks.nodes) - 1 if lost is None else lost // ranks.ranks_per_node
    left = ranks.nodes[:gone] + ranks.nodes[gone + 1 :]
    for number in range(len(left), 0, -1):
        yield Ranks(nodes=left[:number], ranks_per_node=ranks.ranks_per_node)
    yield from fewer(Ranks(nodes=left[:1], ranks_per_node=ranks.ranks_per_node), None)


def plan_for(content: PlanFile, cluster: Cluster, stack: str, *, remaining_steps: int | None = None) -> Plan:
    """The plan that a run should go on with on other hardware, of those that the executor runs.

    Raises:
        NoFeasiblePlan: nothing fits.
    """
    setting = setting_of(content, cluster, load_stack(stack))

    def refuse(plan: Plan) -> tuple[Rejected, ...]:
        return unsupported(plan, content.model, plan.num_microbatches(setting.workload))

    found = replan(content, setting, remaining_steps=remaining_steps, space=SPACE, unsupported=refuse)
    return _check_ranks(found.new.estimate.plan, setting)


def _check_ranks(plan: Plan, setting: Setting) -> Plan:
    if plan.layout.world_size != setting.cluster.world_size:
        raise NoFeasiblePlan(f"the best plan leaves {setting.cluster.world_size - plan.layout.world_size} ranks idle")
    return plan


def _plans_without(
    content: PlanFile,
    plan: Plan,
    ranks: Ranks,
    fault: Fault,
    least: int,
    cluster_of: Callable[[Ranks], Cluster],
    stack: str,
    remaining_steps: Callable[[], int] | None,
) -> Iterator[tuple[Plan, Ranks]]:
    current = dataclasses.replace(content, plan=plan, slug=plan.slug)
    steps = remaining_steps() if remaining_steps is not None else None
    for left in fewer(ranks, fault.rank):
        if left.number < least:
            return
        try:
            yield plan_for(current, cluster_of(left), stack, remaining_steps=steps), left
        except (NoFeasiblePlan, InputError):
            continue


def _left_out(before: Ranks, fault: Fault, after: Ranks) -> str:
    lost = [str(node.index) for node in before.nodes if node not in after.nodes]
    if lost:
        return f"node {', '.join(lost)}"
    return f"{before.number - after.number} of {before.number} ranks"
