"""From prices of pieces to what every pipeline rank of every plan does in a step, as arrays [plans, ranks]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.arrays import RECOMPUTE_CODES, SCHEDULE_CODES, Ints, PlanArrays, distinct, modules_mask
from autopar.estimate.pieces import BY_MODULE, Floats, Prices, Section
from autopar.plan import DEFAULT_MODULES, V_SCHEDULES, Recompute, even_split
from costmodels.stack import Stack


@dataclass(frozen=True, kw_only=True, slots=True)
class RankWork:
    """What each pipeline rank does per microbatch (all its virtual stages), arrays [plans, ranks].

    Which ranks these are, ``place`` says.
    Seconds of compute and of communication in forward and backward, recomputation apart; ``stall`` are the seconds
    that the device waits for launches; bytes kept per microbatch by the plan's recompute setting, among them
    ``kept_loss`` by the loss and ``kept_end`` by all that comes after the last block; bytes ``waiting`` between the two
    parts of a split backward; temporary bytes in blocks and in the model's ends; weights on a tensor parallel rank
    (``experts`` among them); groups of weights that are sharded together (each block, and the rest).
    """

    forward: Floats
    backward: Floats
    recompute: Floats
    tensor: Floats
    context: Floats
    expert: Floats
    forward_communication: Floats
    backward_communication: Floats
    stall: Floats
    kept: Floats
    block_kept: Floats
    block_activations: Floats
    kept_loss: Floats
    kept_end: Floats
    waiting: Floats
    working: Floats
    working_adding: Floats
    working_ends: Floats
    working_ends_adding: Floats
    parameters: Floats
    experts: Floats
    vocabulary: Floats
    block_parameters: Floats
    largest: Floats
    num_parameters: Floats
    num_groups: Floats
    place: Placement

    def take(self, rows: Ints) -> RankWork:
        """The same for plans whose work is that of these rows."""
        columns = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self) if f.name != "place"}
        return RankWork(**columns, place=self.place.take(rows))

    @property
    def ranks(self) -> Ints:
        """Number of the pipeline rank of each column, [plans, ranks]."""
        return self.place.ranks[self.place.shape]

    @property
    def pass_seconds(self) -> Floats:
        """Forward and backward of one microbatch, communication included."""
        compute = self.forward + self.backward + self.recompute
        return compute + self.forward_communication + self.backward_communication + self.stall

    @property
    def forward_seconds(self) -> Floats:
        """Forward of one microbatch, communication and its share of waiting for launches included."""
        return self.forward + self.forward_communication + self.stall / 3

    @property
    def backward_seconds(self) -> Floats:
        """Backward of one microbatch, recomputation and communication included."""
        return self.backward + self.recompute + self.backward_communication + self.stall * (2 / 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where the pieces of the model lie, for every distinct way of dividing them over pipeline ranks.

    Attributes:
        shape: [plans] which way each plan has.
        counts: [shapes, ranks, sections] pieces of each section that a rank holds.
        ranks: [shapes, ranks] ranks that are told apart; shapes with fewer repeat their last.
        like: [shapes, pipeline ranks] column of a rank that holds the same as each rank of the pipeline.
    """

    shape: Ints
    counts: Floats
    ranks: Ints
    like: Ints

    def take(self, rows: Ints) -> Placement:
        """The same for some plans."""
        return Placement(shape=self.shape[rows], counts=self.counts, ranks=self.ranks, like=self.like)


def placement(counts: Sequence[Floats], shape: Ints, *, every_rank: bool) -> Placement:
    """Of ``counts`` [ranks, sections] of each shape, every rank or those that tell all others."""
    columns = [(range(len(c)), np.arange(len(c))) if every_rank else telling_ranks(c) for c in counts]
    width = max(len(ranks) for ranks, _ in columns)
    deepest = max(len(c) for c in counts)
    ranks = np.asarray([[*told, *[told[-1]] * (width - len(told))] for told, _ in columns])
    like = np.asarray([[*first, *[first[-1]] * (deepest - len(first))] for _, first in columns])
    held = np.stack([c[told] for c, told in zip(counts, ranks, strict=True)])
    return Placement(shape=shape, counts=held, ranks=ranks, like=like)


def telling_ranks(counts: Floats) -> tuple[Ints, Ints]:
    """Ranks that tell all others: the first and the last of neighbours that hold the same; and whom each is like.

    ``counts`` are [ranks, sections]. Among ranks that hold the same, all that depends on the place in the pipeline
    (microbatches in flight, the end of the passes) goes one way, so that its extremes are at these; the pipeline's
    first and last rank are always among them.
    """
    last = len(counts) - 1
    changes = np.flatnonzero((counts[1:] != counts[:-1]).any(axis=1)) + 1
    starts = np.unique(np.asarray([0, last, min(1, last), *changes.tolist()]))
    ranks = np.unique(np.concatenate([starts, starts[1:] - 1, [last]]))
    first_of = starts[np.searchsorted(starts, np.arange(last + 1), side="right") - 1]
    return ranks, np.searchsorted(ranks, first_of)


def place(parts: Sequence[Section], num_blocks: int, plans: PlanArrays, stack: Stack, *, every_rank: bool) -> Placement:
    """Divide the pieces of a model as plans say."""
    shaped = np.isin(plans.schedule, [SCHEDULE_CODES.index(name) for name in V_SCHEDULES])
    first, shape = distinct(plans.pp, plans.vp, shaped, plans.split)
    counts = [
        section_counts(
            parts, num_blocks, int(plans.pp[i]), int(plans.vp[i]), plans.splits[int(plans.split[i])], stack,
            v_shaped=bool(shaped[i]),
        )
        for i in first.tolist()
    ]  # fmt: skip
    return placement(counts, shape, every_rank=every_rank)


def engine_split(num_blocks: int, num_stages: int, stack: Stack) -> tuple[int, ...]:
    """Blocks of each virtual stage as the engine divides them where the plan does not say."""
    if not stack.pipeline.balanced_ends or num_stages < 2:
        return even_split(num_blocks, num_stages)
    first, *middle, last = even_split(num_blocks + 2, num_stages)
    return (first - 1, *middle, last - 1)


def section_counts(
    parts: Sequence[Section],
    num_blocks: int,
    pp: int,
    vp: int,
    blocks: tuple[int, ...],
    stack: Stack,
    *,
    v_shaped: bool = False,
) -> Floats:
    """How many pieces of each section every pipeline rank holds, [ranks, sections].

    Virtual stages lie on the ranks in turn, those of V-shaped schedules there and back.
    """
    split = blocks or engine_split(num_blocks, pp * vp, stack)
    # One stage for what comes before the blocks, one for every block, one for what comes after them.
    stage_of = np.concatenate([[0], np.repeat(np.arange(pp * vp), split), [pp * vp - 1]])
    rank_of = np.where(v_shaped & (stage_of >= pp), 2 * pp - 1 - stage_of, stage_of % pp)
    counts = np.zeros((pp, len(parts)))
    for column, part in enumerate(parts):
        counts[:, column] = np.bincount(rank_of[np.clip(part.blocks, -1, num_blocks) + 1], minlength=pp)
    return counts


def rank_work(
    prices: Prices,
    rows: Ints,
    place: Placement,
    is_block: NDArray[np.bool_],
    is_end: NDArray[np.bool_],
    plans: PlanArrays,
    stack: Stack,
) -> RankWork:
    """Add up pieces: ``rows`` are the plans' combinations, ``place`` says what each rank holds.

    ``is_block`` and ``is_end`` [sections] say which are repeated blocks and which come after them.
    """
    counts = place.counts[place.shape]
    several = (place.ranks[place.shape].max(axis=1) > 0)[:, None]
    blocks_only = counts * is_block
    again = _again(prices, rows, blocks_only, plans)
    of = _totals({name: getattr(prices, name) for name in TOTALS}, rows, counts)
    most = _largest(
        {
            "block_kept": prices.kept * is_block,
            "block_activations": prices.kept_linear * is_block,
            "working": prices.working * is_block,
            "working_adding": prices.working_adding * is_block,
            "working_ends": prices.working * ~is_block,
            "working_ends_adding": prices.working_adding * ~is_block,
            "block_parameters": prices.parameters * is_block,
            "largest": prices.largest,
        },
        rows,
        counts,
    )
    most["block_kept"] = np.where(again.full, most["block_kept"], 0.0)
    forward_communication = of["tensor_forward"] + of["context_forward"] + of["expert_forward"]
    backward_communication = (
        of["tensor_backward"] + of["context_backward"] + of["expert_backward"]
    ) + again.communication
    tensor = of["tensor_forward"] + of["tensor_backward"] + again.tensor
    expert = of["expert_forward"] + of["expert_backward"] + again.expert
    device = of["forward"] + of["backward"] + again.seconds + forward_communication + backward_communication
    launch_seconds = stack.host.launch_seconds * (1 - stack.host.graphed)
    if stack.host.waits_for_blocks:
        stall = _stall_by_section(prices, rows, counts, is_block, again, launch_seconds, stack.host.exponent)
    else:
        host = (3 * of["calls"] + again.calls) * launch_seconds
        stall = launch_stall_seconds(device, host, stack.host.exponent)
    return RankWork(
        forward=of["forward"],
        backward=of["backward"],
        recompute=again.seconds,
        tensor=tensor,
        context=forward_communication + backward_communication - tensor - expert,
        expert=expert,
        forward_communication=forward_communication,
        backward_communication=backward_communication,
        stall=stall,
        kept=of["kept"] - again.freed,
        kept_loss=of["kept_loss"],
        waiting=of["waiting"],
        kept_end=_totals({"kept": prices.kept}, rows, counts * is_end)["kept"],
        # A shared weight that lies on another pipeline rank than its owner is a second copy.
        parameters=of["parameters"] + np.where(several, of["shared"], 0.0),
        experts=of["experts"],
        vocabulary=of["vocabulary"],
        num_parameters=of["num_parameters"],
        num_groups=blocks_only.sum(axis=2) + ((counts - blocks_only).sum(axis=2) > 0),
        place=place,
        **most,
    )


TOTALS = (
    "forward", "backward", "tensor_forward", "tensor_backward", "context_forward", "context_backward",
    "expert_forward", "expert_backward", "calls", "kept", "kept_loss", "waiting", "parameters", "shared", "experts",
    "vocabulary", "num_parameters",
)  # fmt: skip
"""Prices that a rank has of every section that it holds."""


def _totals(quantities: Mapping[str, Floats], rows: Ints, held: Floats) -> dict[str, Floats]:
    """Sums over sections of quantities [combinations, sections] times what ranks hold of them, [plans, ranks] each.

    Section by section, since a matrix product's order of summation depends on the number of plans.
    """
    stacked = np.stack([quantity[rows] for quantity in quantities.values()])
    found = np.zeros((len(quantities), *held.shape[:2]))
    for section in range(held.shape[2]):
        number = held[:, :, section]
        if number.any():
            found += stacked[:, :, section, None] * number
    return dict(zip(quantities, found, strict=True))


def _largest(quantities: Mapping[str, Floats], rows: Ints, held: Floats) -> dict[str, Floats]:
    """The largest of the sections that a rank has, [plans, ranks] each; quantities are [combinations, sections]."""
    stacked = np.stack([quantity[rows] for quantity in quantities.values()])
    found = np.zeros((len(quantities), *held.shape[:2]))
    for section in range(held.shape[2]):
        np.maximum(found, stacked[:, :, section, None] * (held[:, :, section] > 0), out=found)
    return dict(zip(quantities, found, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Again:
    """What recomputation costs and frees, [plans, ranks]; ``full`` says whose blocks are recomputed whole."""

    seconds: Floats
    calls: Floats
    tensor: Floats
    expert: Floats
    communication: Floats
    freed: Floats
    full: NDArray[np.bool_]


def _again(prices: Prices, rows: Ints, blocks: Floats, plans: PlanArrays) -> _Again:
    full = (plans.recompute == RECOMPUTE_CODES.index(Recompute.FULL))[:, None]
    selective = (plans.recompute == RECOMPUTE_CODES.index(Recompute.SELECTIVE))[:, None]
    held = np.maximum(blocks.sum(axis=2), 1.0)
    layers, vp = plans.recompute_layers[:, None], plans.vp[:, None]
    share = np.where(layers > 0, np.minimum(layers * vp / held, 1.0), 1.0)
    share = np.where(full, share, 0.0)

    seconds, calls, freed, tensor, expert, context = np.zeros((6, *blocks.shape[:2]))
    if selective.any():
        chosen = np.where(plans.modules > 0, plans.modules, modules_mask(DEFAULT_MODULES))
        for module in range(prices.again.shape[2]):
            hit = selective & ((chosen >> module) & 1)[:, None].astype(np.bool_)
            if hit.any():
                of = _totals({name: getattr(prices, name)[:, :, module] for name in BY_MODULE}, rows, blocks)
                seconds += np.where(hit, of["again"], 0.0)
                calls += np.where(hit, of["again_calls"], 0.0)
                freed += np.where(hit, of["freed"], 0.0)
    if full.any():
        of = _totals(
            {
                "seconds": prices.again_full,
                "calls": prices.calls,
                "freed": prices.kept - prices.kept_full,
                "tensor": prices.again_tensor,
                "expert": prices.expert_forward,
                "context": prices.again_context,
            },
            rows,
            blocks,
        )
        seconds, calls, freed = (
            seconds + share * of["seconds"],
            calls + share * of["calls"],
            freed + share * of["freed"],
        )
        tensor, expert, context = share * of["tensor"], share * of["expert"], share * of["context"]
    return _Again(
        seconds=seconds,
        calls=calls,
        tensor=tensor,
        expert=expert,
        communication=tensor + expert + context,
        freed=freed,
        full=full,
    )


def _stall_by_section(
    prices: Prices,
    rows: Ints,
    counts: Floats,
    is_block: NDArray[np.bool_],
    again: _Again,
    launch_seconds: float,
    exponent: float,
) -> Floats:
    """Seconds of waiting for launches where each block, and each end of the model, waits by itself, [plans, ranks].

    Recomputation is spread evenly over a rank's blocks.
    """
    device = prices.forward + prices.backward + prices.tensor_forward + prices.tensor_backward
    device = device + prices.context_forward + prices.context_backward + prices.expert_forward + prices.expert_backward
    held = np.maximum((counts * is_block).sum(axis=2), 1.0)
    stall: Floats = np.zeros(counts.shape[:2])
    for section in range(counts.shape[2]):
        number = counts[:, :, section]
        share = is_block[section] / held
        busy = device[rows, section][:, None] + share * (again.seconds + again.communication)
        host = (3 * prices.calls[rows, section][:, None] + share * again.calls) * launch_seconds
        stall += number * launch_stall_seconds(busy, host, exponent)
    return stall


def launch_stall_seconds(device: Floats, host: Floats, exponent: float) -> Floats:
    """Seconds that a pass takes beyond the device's own: (d^q + h^q)^(1/q) - d.

    q = 1 adds launches to kernels (each waits for the one before), a large q hides the shorter behind the longer.
    Source: single-node runs of small models, where q between 3 and 4 fits (q = 2 and 12 are worse).
    """
    longer = np.maximum(np.maximum(device, host), 1e-30)
    joint = longer * ((device / longer) ** exponent + (host / longer) ** exponent) ** (1 / exponent)
    return np.asarray(np.where(host > 0, joint - device, 0.0))


def with_overheads(work: RankWork, plans: PlanArrays, stack: Stack) -> RankWork:
    """Add the host time of wrappers around passes: any pass, pipeline actions, modules whose weights are gathered."""
    calls = stack.overheads
    sharded = ((plans.zero >= 1) & (plans.shards > 1))[:, None] * work.num_groups
    action = (plans.pp > 1)[:, None] * calls.get("pipeline.action", 0.0) + calls.get("pass", 0.0)
    return dataclasses.replace(
        work,
        forward=work.forward + action + sharded * calls.get("fsdp.module.forward", 0.0),
        backward=work.backward + action + sharded * calls.get("fsdp.module.backward", 0.0),
    )
