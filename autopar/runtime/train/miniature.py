"""A small copy of a model that a plan divides in the same way: for checks, and without torch.

What divides stays divisible: heads by tp, experts by ep, sequences by the ranks that share them. What repeats repeats
less: blocks of a stage, microbatches.
"""

from __future__ import annotations

import dataclasses

from autopar.model.spec import ModelSpec
from autopar.plan import Plan, fewest_microbatches
from autopar.runtime.support import sequence_divisor
from autopar.workload import Workload

HEAD_SIZE, FFN_PER_RANK, VOCAB, TOKENS, BLOCKS_PER_STAGE = 8, 16, 128, 16, 2


def miniature(spec: ModelSpec, workload: Workload, plan: Plan) -> tuple[ModelSpec, Workload, Plan]:
    """Model, workload and plan: the layout is the same, microbatches are of one sequence.

    Widths are a few per tensor parallel rank, stages have one or two blocks (none where they have none), a step has
    twice as many microbatches as a pipeline has ranks, or as the schedule needs.
    """
    layout = plan.layout
    blocks = [min(number, BLOCKS_PER_STAGE) for number in plan.blocks_of_stages(spec.num_layers)]
    microbatches = min(
        plan.num_microbatches(workload), max(2 * layout.pp, fewest_microbatches(plan.schedule, layout.pp))
    )
    small_plan = dataclasses.replace(
        plan,
        microbatch_size=1,
        stage_blocks=tuple(blocks) if plan.stage_blocks else (),
        recompute_layers=min(plan.recompute_layers, 1),
    )
    divisor = sequence_divisor(plan)
    seq_len = min(divisor * max(TOKENS // divisor, 1), workload.seq_len)
    small = dataclasses.replace(workload, global_batch=layout.dp * microbatches, seq_len=seq_len)
    return _narrow(spec, plan, sum(blocks), seq_len), small, small_plan


def _narrow(spec: ModelSpec, plan: Plan, num_layers: int, seq_len: int) -> ModelSpec:
    layout = plan.layout
    kv_heads = layout.tp * min(spec.num_kv_heads // layout.tp, 2)
    heads = kv_heads * min(spec.num_heads // spec.num_kv_heads, 2)
    experts = layout.ep * min(spec.num_experts // layout.ep, 2)
    ffn = layout.tp * FFN_PER_RANK
    return dataclasses.replace(
        spec,
        name=f"{spec.name} in small",
        num_layers=num_layers,
        hidden_size=heads * HEAD_SIZE,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=HEAD_SIZE,
        ffn_size=min(spec.ffn_size, ffn),
        vocab_size=min(spec.vocab_size, VOCAB),
        max_seq_len=min(spec.max_seq_len, seq_len),
        num_experts=experts,
        top_k=min(spec.top_k, experts),
        expert_ffn_size=min(spec.expert_ffn_size, layout.etp * FFN_PER_RANK),
        shared_ffn_size=min(spec.shared_ffn_size, ffn),
        dense_layers=min(spec.dense_layers, 1),
        window=min(spec.window, max(seq_len // 2, 1)) if spec.window else 0,
    )
