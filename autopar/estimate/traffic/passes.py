"""Collectives within passes: of tensor, sequence and context parallelism, and of the pipeline's messages."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.estimate.setting import Setting
from autopar.estimate.traffic.ledger import Ledger
from autopar.estimate.traffic.stage import Stage, Weight, degrees_of, weights_of
from autopar.graph import Op, OpKind, Split
from autopar.plan import V_SCHEDULES, Plan
from autopar.schedule.notation import rank_of_stage
from autopar.shard import batch_scale, boundary_bytes, context_collectives, tensor_collectives

LOSS_BYTES = STATISTIC_BYTES = 4
STATISTICS = 3
"""Of every token, that a loss over a divided vocabulary takes over the ranks: maximum, sum, the target's logit."""
MIXTURE = "moe"


def count_tensor(ledger: Ledger, setting: Setting, plan: Plan, stage: Stage) -> None:
    """Calls of DTensor, those of forward once more where a block is recomputed, up to its last product."""
    graph, degrees, tp, m = setting.graph, degrees_of(plan), plan.layout.tp, stage.num_microbatches
    for ops, recomputed in stage.parts:
        last = last_product(ops)
        for found in tensor_collectives(ops, graph, degrees, setting.stack):
            again = found.phase == "forward" and _runs_again(plan, recomputed, found.source, last)
            times = m * (2 if again else 1)
            ledger.add(found.kind, "tp", tp, times * float(found.count), times * float(found.num_bytes))
    if setting.stack.tensor.vocab_parallel:
        tokens = graph.batch_size * graph.seq_len * float(batch_scale(graph, degrees)) / plan.layout.cp
        losses = sum(op.kind is OpKind.LOSS for op in stage.after)
        calls = STATISTICS * m * losses
        ledger.add("all_reduce", "tp", tp, calls, calls * tokens * STATISTIC_BYTES)


def _runs_again(plan: Plan, recomputed: bool, source: str, last: str) -> bool:
    """Whether a forward's collective is part of what backward computes again.

    A module that is recomputed by itself keeps its input as it takes it, gathered; a mixture's shared expert gathers
    within it.
    """
    shared = MIXTURE in plan.recomputed_modules and ".shared." in source
    return (recomputed or shared) and source != last


def last_product(ops: Sequence[Op]) -> str:
    """Name of the product that ends a block: nobody needs its result again, and recomputation stops before it.

    Empty for a mixture of experts without a shared one, whose end is the weighted sum of rows.
    """
    rows = [op for op in ops if op.split is Split.ROW]
    if any(op.kind is OpKind.GROUPED_MATMUL for op in ops):
        rows = [op for op in rows if op.module == MIXTURE]
    return rows[-1].name if rows else ""


def partial_weights(setting: Setting, plan: Plan, stage: Stage) -> list[Weight]:
    """Weights whose gradients are summed over tensor parallel ranks at the end of a step.

    Under sequence parallelism, whatever is whole on each rank and sees its part of the tokens: norms, routers, and
    position embeddings where the token embedding scatters.
    """
    if not plan.sequence_parallel:
        return []
    positions = setting.stack.tensor.vocab_parallel

    def sees_part(op: Op) -> bool:
        if op.kind is OpKind.EMBEDDING:
            return positions and op.split is Split.NONE
        return op.kind in (OpKind.NORMALIZATION, OpKind.ROUTER) and op.split is Split.TOKENS

    return weights_of([op for op in stage.ops if sees_part(op)], stage, setting, plan)


def count_context(ledger: Ledger, setting: Setting, plan: Plan, stage: Stage) -> None:
    """Keys and values: gathered in forward, and again in backward or in the forward that it recomputes; scattered."""
    for ops, _ in stage.parts:
        for found in context_collectives(ops, setting.graph, degrees_of(plan)):
            calls = stage.num_microbatches * float(found.count)
            num_bytes = stage.num_microbatches * float(found.num_bytes)
            ledger.add(found.kind, "cp", plan.layout.cp, calls, num_bytes)


def count_messages(ledger: Ledger, setting: Setting, plan: Plan, stage: Stage) -> None:
    """Activations to the next stage and gradients to the one before, where these are on other ranks."""
    size = stage.num_microbatches * float(boundary_bytes(setting.graph, degrees_of(plan), setting.stack))
    for neighbour in (stage.index - 1, stage.index + 1):
        if 0 <= neighbour < plan.num_stages and rank_of(plan, neighbour) != rank_of(plan, stage.index):
            for kind in ("send", "recv"):
                ledger.add(kind, "pp", plan.layout.pp, stage.num_microbatches, size)


def rank_of(plan: Plan, stage: int) -> int:
    """Pipeline rank of a virtual stage."""
    return rank_of_stage(stage, plan.layout.pp, plan.schedule in V_SCHEDULES)


def count_loss(ledger: Ledger, plan: Plan) -> None:
    """The last stage tells the others the loss; context parallel ranks average theirs."""
    ledger.add("broadcast", "pp", plan.layout.pp, 1, LOSS_BYTES)
    ledger.add("all_reduce", "cp", plan.layout.cp, 1, LOSS_BYTES)
