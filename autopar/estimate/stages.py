"""From prices of pieces to what every pipeline rank of every plan does in a step, as arrays [plans, ranks]."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.arrays import RECOMPUTE_CODES, Ints, PlanArrays
from autopar.estimate.pieces import Floats, Prices, Section
from autopar.plan import Recompute, even_split
from costmodels.stack import Stack


@dataclass(frozen=True, kw_only=True, slots=True)
class RankWork:
    """What each pipeline rank does per microbatch (all its virtual stages), arrays [plans, ranks].

    Seconds of compute and of communication in forward and backward, recomputation apart; bytes kept per microbatch
    by the plan's recompute setting; temporary bytes; weights on a tensor parallel rank; groups of weights that are
    sharded together (each block, and the rest).
    """

    forward: Floats
    backward: Floats
    recompute: Floats
    tensor: Floats
    context: Floats
    forward_communication: Floats
    backward_communication: Floats
    kept: Floats
    block_kept: Floats
    working: Floats
    working_adding: Floats
    parameters: Floats
    block_parameters: Floats
    largest: Floats
    num_parameters: Floats
    num_groups: Floats

    @property
    def pass_seconds(self) -> Floats:
        """Forward and backward of one microbatch, communication included."""
        compute = self.forward + self.backward + self.recompute
        return compute + self.forward_communication + self.backward_communication

    @property
    def backward_seconds(self) -> Floats:
        """Backward of one microbatch, recomputation and communication included."""
        return self.backward + self.recompute + self.backward_communication


def stage_groups(plans: PlanArrays) -> list[tuple[int, int, tuple[int, ...], Ints]]:
    """Plans that divide the blocks alike: (pp, vp, stage_blocks by hand, indices)."""
    groups: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
    if not plans.stage_blocks:
        keys = plans.pp * 1_000_000 + plans.vp
        return [
            (int(key) // 1_000_000, int(key) % 1_000_000, (), np.flatnonzero(keys == key)) for key in np.unique(keys)
        ]
    for i in range(len(plans)):
        key = (int(plans.pp[i]), int(plans.vp[i]), plans.stage_blocks.get(i, ()))
        groups.setdefault(key, []).append(i)
    return [(*key, np.asarray(indices)) for key, indices in groups.items()]


def section_counts(parts: Sequence[Section], num_blocks: int, pp: int, vp: int, blocks: tuple[int, ...]) -> Floats:
    """How many pieces of each section every pipeline rank holds, [ranks, sections]."""
    split = blocks or even_split(num_blocks, pp * vp)
    stage_of_block = np.repeat(np.arange(pp * vp), split)
    counts = np.zeros((pp, len(parts)))
    for column, part in enumerate(parts):
        for block in part.blocks:
            stage = 0 if block < 0 else pp * vp - 1 if block >= num_blocks else stage_of_block[block]
            counts[stage % pp, column] += 1
    return counts


def rank_work(prices: Prices, rows: Ints, counts: Floats, is_block: NDArray[np.bool_], recompute: Ints) -> RankWork:
    """Add up pieces: ``rows`` are the plans' combinations, ``counts`` [ranks, sections] what each rank holds."""

    def total(quantity: Floats, held: Floats = counts) -> Floats:
        # Section by section, since a matrix product's order of summation depends on the number of plans.
        found: Floats = np.zeros((len(rows), len(held)))
        for section, number in enumerate(held.T):
            found += quantity[rows, section][:, None] * number
        return found

    full = (recompute == RECOMPUTE_CODES.index(Recompute.FULL))[:, None]
    selective = (recompute == RECOMPUTE_CODES.index(Recompute.SELECTIVE))[:, None]
    blocks_only = counts * is_block
    again = total(prices.forward, blocks_only)
    again_attention = total(prices.attention_forward, blocks_only)
    again_communication = total(prices.tensor_forward + prices.context_forward, blocks_only)
    tensor_again = total(prices.tensor_forward, blocks_only)
    tensor = total(prices.tensor_forward) + total(prices.tensor_backward) + np.where(full, tensor_again, 0.0)
    forward_communication = total(prices.tensor_forward) + total(prices.context_forward)
    backward_communication = (
        total(prices.tensor_backward) + total(prices.context_backward) + np.where(full, again_communication, 0.0)
    )
    present = counts > 0

    def largest(quantity: Floats) -> Floats:
        found: Floats = np.max(np.where(present[None, :, :], quantity[rows][:, None, :], 0.0), axis=2)
        return found

    kept = np.where(
        full, total(prices.kept_full), np.where(selective, total(prices.kept_selective), total(prices.kept))
    )
    return RankWork(
        forward=total(prices.forward),
        backward=total(prices.backward),
        recompute=np.where(full, again, np.where(selective, again_attention, 0.0)),
        tensor=tensor,
        context=forward_communication + backward_communication - tensor,
        forward_communication=forward_communication,
        backward_communication=backward_communication,
        kept=kept,
        block_kept=np.where(full, largest(prices.kept * is_block), 0.0),
        working=largest(prices.working),
        working_adding=largest(prices.working_adding),
        # A shared weight that lies on another pipeline rank than its owner is a second copy.
        parameters=total(prices.parameters) + (total(prices.shared) if len(counts) > 1 else 0.0),
        block_parameters=largest(prices.parameters * is_block),
        largest=largest(prices.largest),
        num_parameters=total(prices.num_parameters),
        num_groups=np.broadcast_to(
            blocks_only.sum(axis=1) + ((counts - blocks_only).sum(axis=1) > 0), (len(rows), len(counts))
        ),
    )


def with_overheads(work: RankWork, plans: PlanArrays, stack: Stack) -> RankWork:
    """Add the host time of wrappers around passes: pipeline actions, and modules whose weights are gathered."""
    calls = stack.overheads
    sharded = ((plans.zero >= 2) & (plans.shards > 1))[:, None] * work.num_groups
    action = (plans.pp > 1)[:, None] * calls.get("pipeline.action", 0.0)
    return dataclasses.replace(
        work,
        forward=work.forward + action + sharded * calls.get("fsdp.module.forward", 0.0),
        backward=work.backward + action + sharded * calls.get("fsdp.module.backward", 0.0),
    )
