"""Exchange of tokens with experts, as ``autopar.runtime.parallel.expert_parallel`` calls it.

Bytes are those of a router that spreads tokens evenly. What a rank hands over depends on the router; the sum over the
ranks of a group does not, unless a capacity drops tokens.
"""

from __future__ import annotations

from autopar.estimate.setting import Setting
from autopar.estimate.traffic.ledger import Ledger
from autopar.estimate.traffic.passes import MIXTURE
from autopar.estimate.traffic.stage import Stage
from autopar.graph import MatmulShape, Op, OpKind, Split
from autopar.plan import Plan

COUNT_BYTES = 8
"""Of an integer that tells how many rows go to an expert."""


def count_exchange(ledger: Ledger, setting: Setting, plan: Plan, stage: Stage) -> None:
    """Counts of rows, rows to the ranks of their experts and back, and the gradients the other way round."""
    layout, graph = plan.layout, setting.graph
    if layout.ep * layout.etp == 1:
        return
    ep, etp, experts = layout.ep, layout.etp, graph.num_experts
    for ops, recomputed in stage.parts:
        rows = sum(_row_bytes(op, setting, plan) for op in ops)
        if not rows:
            continue
        again = recomputed or MIXTURE in plan.recomputed_modules
        m, forwards = stage.num_microbatches, stage.num_microbatches * (2 if again else 1)
        ledger.add("all_to_all", "ep", ep, forwards, forwards * experts * COUNT_BYTES)
        ledger.add("all_gather", "etp", etp, forwards, forwards * etp * experts * COUNT_BYTES)
        # There and back.
        passes = 2 * (forwards + m)
        ledger.add("all_to_all", "ep", ep, passes, passes * rows)
        ledger.add("all_to_all", "etp", etp, passes, passes * rows * etp)


def _row_bytes(op: Op, setting: Setting, plan: Plan) -> float:
    """Bytes of the rows that a rank's tokens have in the first product of a mixture; 0 for other operations."""
    if op.kind is not OpKind.GROUPED_MATMUL or op.split is not Split.EXPERT_COLUMN:
        return 0.0
    assert isinstance(op.shape, MatmulShape)
    layout, graph = plan.layout, setting.graph
    tokens = op.shape.m * plan.microbatch_size / graph.batch_size / (layout.tp * layout.cp)
    return tokens * op.shape.k * graph.itemsize
