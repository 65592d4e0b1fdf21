"""What the settings of a published recipe forbid, beside what its engine offers (``costmodels.stack.Offers``).

A recipe fixes software settings that are no part of a plan (dispatcher, overlap, graphs). Some of them forbid plans
that the engine would run otherwise; a published plan is compared with those alone that run under its recipe's settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.estimate.arrays import RECOMPUTE_CODES, SCHEDULE_CODES, Bools, PlanArrays, modules_mask
from autopar.plan import Plan, Recompute, ScheduleName
from autopar.search.space import Space
from autopar.workload import Workload
from costmodels.stack import Stack

Forbids = Callable[[PlanArrays, Workload], Bools]
Forbidden = Callable[[PlanArrays], Bools]
MEGATRON_CORE = ("megatron-core", "megatron-bridge", "nemo-2024")
TRANSFORMER_CONFIG = "NVIDIA/Megatron-LM, megatron/core/transformer/transformer_config.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Restriction:
    """A condition under which plans do not run.

    Attributes:
        name: short key, for counts.
        stacks: engines that have it; empty for all.
        variants: settings of the stack, any of which brings it; empty where the engine alone does.
        groups: sources of rows that have it; empty for all.
        forbids: which plans are hit, [plans].
        source: where the condition is stated.
    """

    name: str
    stacks: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    forbids: Forbids
    source: str

    def applies(self, stack: str, group: str) -> bool:
        """Whether a stack, named with its variants, or a source of rows brings it."""
        engine, *variants = stack.split("+")
        return (
            (not self.stacks or engine in self.stacks)
            and (not self.variants or any(variant in variants for variant in self.variants))
            and (not self.groups or group in self.groups)
        )


def _full(plans: PlanArrays, workload: Workload) -> Bools:
    return np.asarray(plans.recompute == RECOMPUTE_CODES.index(Recompute.FULL))


def _keeps_more_than_inputs(plans: PlanArrays, workload: Workload) -> Bools:
    return ~_full(plans, workload) | (plans.recompute_layers > 0)


def _one_expert_rank(plans: PlanArrays, workload: Workload) -> Bools:
    return np.asarray(plans.ep * plans.etp == 1)


def _cannot_overlap(plans: PlanArrays, workload: Workload) -> Bools:
    serial = (plans.ep == 1) | ((plans.pp > 1) & (plans.vp == 1))
    return np.asarray(serial | _full(plans, workload) | (plans.modules & modules_mask(("moe",)) > 0))


def _sharded_in_pipeline(plans: PlanArrays, workload: Workload) -> Bools:
    return np.asarray((plans.zero == 3) & (plans.pp > 1))


def _ragged(plans: PlanArrays, workload: Workload) -> Bools:
    m = workload.global_batch // (plans.dp * plans.microbatch)
    interleaved = plans.schedule == SCHEDULE_CODES.index(ScheduleName.INTERLEAVED)
    return np.asarray(interleaved & (m % plans.pp != 0))


def _along_sequence(plans: PlanArrays, workload: Workload) -> Bools:
    return plans.sp


RESTRICTIONS: tuple[Restriction, ...] = (
    Restriction(
        name="flex dispatcher", stacks=MEGATRON_CORE, variants=("deepep", "hybridep"), forbids=_one_expert_rank,
        source="NVIDIA/Megatron-LM, megatron/core/transformer/moe/token_dispatcher.py: needs etp * ep > 1",
    ),
    Restriction(
        name="overlapped exchange", stacks=MEGATRON_CORE, variants=("a2a-overlap",), forbids=_cannot_overlap,
        source=f"{TRANSFORMER_CONFIG}: overlap_moe_expert_parallel_comm needs ep > 1 and, in a pipeline, virtual"
        " stages; no full recomputation, none of the module moe",
    ),
    Restriction(
        name="graphs of parts", stacks=MEGATRON_CORE, variants=("cuda-graph-partial",), forbids=_full,
        source=f"{TRANSFORMER_CONFIG}: full recomputation only with graphs of whole iterations",
    ),
    Restriction(
        name="FSDP in a pipeline", stacks=MEGATRON_CORE, forbids=_sharded_in_pipeline,
        source="scripts/performance of NVIDIA/NeMo and NVIDIA-NeMo/Megatron-Bridge: Megatron-FSDP without a"
        " pipeline (and for dense models alone)",
    ),
    Restriction(
        name="sequence parallelism", stacks=("megatron-2020", "megatron-2021"),
        forbids=_along_sequence, source="introduced by Korthikanti et al. 2022",
    ),
    Restriction(
        name="microbatches of interleaving", stacks=("megatron-2021", "megatron-2022"), forbids=_ragged,
        source="Narayanan et al. 2021, section 2.2.2: a multiple of the pipeline's ranks",
    ),
    Restriction(
        name="recomputation of the study", groups=("sc21",), forbids=_keeps_more_than_inputs,
        source="Narayanan et al. 2021, section 5: all runs of the table recompute activations",
    ),
)  # fmt: skip

RUNS_FSDP = ("megatron-core", "megatron-bridge")
"""Engines whose recipes also shard parameters (Megatron-FSDP), which their stacks do not offer to a search."""
COMMAND_LINE_ORDERS = ("tp-cp-dp-pp", "tp-pp-cp-dp")
"""Orders of the axes that Megatron's command line and Megatron-Bridge's recipes know."""


def restrictions_of(stack: str, group: str) -> tuple[Restriction, ...]:
    """All that apply to rows of a source under a stack."""
    return tuple(restriction for restriction in RESTRICTIONS if restriction.applies(stack, group))


def veto(found: tuple[Restriction, ...], workload: Workload) -> Forbidden:
    """The restrictions as the search asks for them."""

    def forbidden(plans: PlanArrays) -> Bools:
        hit = np.zeros(len(plans), dtype=np.bool_)
        for restriction in found:
            hit |= restriction.forbids(plans, workload)
        return hit

    return forbidden


def offering(stack: Stack, *, experts: bool) -> Stack:
    """The stack with what its recipes of models with or without experts use beside what it offers to a search."""
    engine = stack.name.split("+")[0]
    if experts or engine not in RUNS_FSDP or 3 in stack.data.shardable:
        return stack
    return dataclasses.replace(stack, data=dataclasses.replace(stack.data, shardable=(*stack.data.shardable, 3)))


def space_of(stack: str, group: str, published: Plan) -> Space:
    """Everything that the engine offers, virtual stages up to those of the published plan.

    What every restricted plan would be vetoed for is left out from the start.
    """
    names = {restriction.name for restriction in restrictions_of(stack, group)}
    kinds = tuple(Recompute)
    if names & {"graphs of parts", "overlapped exchange"}:
        kinds = (Recompute.NONE, Recompute.SELECTIVE)
    if "recomputation of the study" in names:
        kinds = (Recompute.FULL,)
    orders = COMMAND_LINE_ORDERS if stack.split("+")[0] in MEGATRON_CORE else None
    partial = "recomputation of the study" not in names
    vp = max(16, published.layout.vp)
    return Space(max_vp=vp, recompute=kinds, partial_recompute=partial, orders=orders)
