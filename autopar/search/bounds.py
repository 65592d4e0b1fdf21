"""Lower bounds of step time and memory, by which a search leaves plans unpriced.

For every core and pipe, m microbatches, v virtual stages per rank and t_r seconds of a pass on rank r:

    step >= (1 + s) (max_r (m t_r + sum_{i<r} t_i / v) + h)

since rank r computes m passes one after another, cannot begin before the ranks before it have done one forward of a
virtual stage each, and is not done before they have done a backward each; schedules that put off the gradients of
weights fill that time, and keep m t_r alone. s is the share of stragglers, h the host's time per step; launches,
transfers between stages, data parallel traffic and the optimizer only add to it. t_r is linear in the pieces that a
rank holds, so that one matrix product bounds all pipes of a core.

    memory_r >= (1 + f) (w P_r + kept_r n_r) + reserve

with P_r weights, w bytes of each that no sharding of the space avoids, n_r microbatches in flight and kept_r what the
recomputation leaves of a microbatch. tests/search holds both against ``estimate``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.estimate.arrays import SCHEDULE_CODES, Bools, Ints
from autopar.estimate.pieces import OP_LEVEL, Floats, Prices, Section, combinations, price, sections
from autopar.estimate.setting import Setting
from autopar.estimate.stages import placement, section_counts
from autopar.estimate.step import SPLIT_BACKWARD, straggler_share
from autopar.graph import RECOMPUTE_MODULES, Op, Split
from autopar.plan import V_SCHEDULES
from autopar.search.space import SELECTIVE, Cores, Decisions
from autopar.workload import Precision
from costmodels.pipeline import peak_in_flight

SLACK = 1e-9
"""Share by which a bound must be beaten, for the rounding of sums in another order."""
EXPERT_OPS = (Split.EXPERT_TOKENS, Split.EXPERT_FEATURES, Split.EXPERT_COLUMN, Split.EXPERT_ROW)
PASS = (
    "forward", "backward", "tensor_forward", "tensor_backward", "context_forward", "context_backward",
    "expert_forward", "expert_backward",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """Prices of what cores need.

    Attributes:
        prices: of every distinct combination.
        rows: [cores] combination of each.
        passes: [combinations, sections] seconds of a pass without recomputation.
        again: [combinations, sections] more seconds of recomputing whole blocks.
        kept, kept_full, kept_least: [combinations, sections] bytes that a pass keeps without recomputation, with
            whole blocks recomputed, and no recomputation less than.
        is_block, is_end: [sections].
    """

    prices: Prices
    rows: Ints
    passes: Floats
    again: Floats
    kept: Floats
    kept_full: Floats
    kept_least: Floats
    is_block: Bools
    is_end: Bools


def price_pieces(setting: Setting, cores: Cores, decided: Decisions) -> Pieces:
    """Price what the cores need, each distinct combination once."""
    parts = sections(setting.graph)
    degrees, rows = combinations(cores)
    selective = decided.recompute == SELECTIVE
    prices = price(setting, degrees, parts, by_module=bool(selective.any()))
    is_block = np.asarray([part.is_block(setting.graph) for part in parts])
    again = prices.again_full + prices.again_tensor + prices.expert_forward + prices.context_forward
    full = np.where(is_block, prices.kept_full, prices.kept)
    op_level = 1 << RECOMPUTE_MODULES.index(OP_LEVEL)
    every_module = int(np.bitwise_or.reduce(decided.modules[selective], initial=0))
    least = np.minimum(prices.kept, full)
    for modules in (every_module & ~op_level, every_module & op_level):
        least = np.minimum(least, prices.kept - np.where(is_block, sum_of(prices.freed, modules), 0.0))
    return Pieces(
        prices=prices, rows=rows, passes=_passes(prices), again=np.where(is_block, again, 0.0), kept=prices.kept,
        kept_full=full, kept_least=least, is_block=is_block,
        is_end=np.asarray([part.is_end(setting.graph) for part in parts]),
    )  # fmt: skip


def _passes(prices: Prices) -> Floats:
    return np.asarray(sum((getattr(prices, name) for name in PASS), np.zeros_like(prices.forward)))


def sum_of(by_module: Floats, modules: int) -> Floats:
    """Of quantities [..., modules], the sum over those of a mask."""
    chosen = [bit for bit in range(by_module.shape[-1]) if modules >> bit & 1]
    return np.asarray(by_module[..., chosen].sum(axis=-1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What the telling ranks of some pipes hold.

    Attributes:
        counts: [pipes, ranks, sections] pieces.
        before: [pipes, ranks, sections] pieces of the ranks before.
        ranks: [pipes, ranks] their place in the pipeline.
        virtual: [pipes] by which the time of the ranks before divides; infinite where schedules fill it.
    """

    counts: Floats
    before: Floats
    ranks: Ints
    virtual: Floats

    def select(self, keep: Any) -> Shapes:
        """Of some pipes."""
        return Shapes(
            counts=self.counts[keep], before=self.before[keep], ranks=self.ranks[keep], virtual=self.virtual[keep]
        )


def shapes_of(setting: Setting, decided: Decisions, pp: int, pipes: Ints) -> Shapes:
    """Of the pipes of ``pp`` ranks."""
    parts, stack = sections(setting.graph), setting.stack
    split_backward = [SCHEDULE_CODES.index(name) for name in SPLIT_BACKWARD]
    shaped = [SCHEDULE_CODES.index(name) for name in V_SCHEDULES]
    whole = [
        section_counts(
            parts, setting.graph.num_blocks, pp, int(decided.pipe_vp[i]), decided.splits[int(decided.pipe_split[i])],
            stack, v_shaped=bool(decided.pipe_schedule[i] in shaped),
        )
        for i in pipes.tolist()
    ]  # fmt: skip
    placed = placement(whole, np.arange(len(pipes)), every_rank=False)
    before = np.stack([(np.cumsum(c, axis=0) - c)[ranks] for c, ranks in zip(whole, placed.ranks, strict=True)])
    filled = np.isin(decided.pipe_schedule[pipes], split_backward)
    virtual = np.where(filled, np.inf, decided.pipe_vp[pipes].astype(float))
    return Shapes(counts=placed.counts, before=before, ranks=placed.ranks, virtual=virtual)


def step_factor(setting: Setting, cores: Cores) -> Floats:
    """(1 + s) of each core."""
    return 1.0 + straggler_share(setting, cores.tp * cores.cp * cores.pp * cores.dp, cores.dp * cores.cp)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreBounds:
    """Of each core whatever is decided around it: least seconds of a step, and least bytes of its fullest rank."""

    seconds: Floats
    memory: Floats


def core_bounds(setting: Setting, cores: Cores, weights: tuple[Floats, Floats]) -> CoreBounds:
    """Passes and weights spread evenly over the pipeline's ranks, or the passes of the largest piece alone.

    Experts, and all that is sent to them, are priced apart from the rest: what they cost depends on other degrees, and
    there are far fewer of either than of both together.
    """
    m = setting.workload.global_batch // (cores.dp * cores.microbatch)
    parts = sections(setting.graph)
    total = np.asarray([len(part.blocks) for part in parts])
    passes, largest, dense, experts = np.zeros((4, len(cores)))
    for degrees, rows, some in _separate(setting, cores, parts):
        prices = price(setting, degrees, some, by_module=False)
        each = _passes(prices)
        passes += (each * total).sum(axis=1)[rows]
        np.maximum(largest, each.max(axis=1)[rows], out=largest)
        dense += ((prices.parameters - prices.experts) * total).sum(axis=1)[rows]
        experts += (prices.experts * total).sum(axis=1)[rows]
    work = np.maximum(passes / cores.pp, largest)
    seconds = step_factor(setting, cores) * (m * work + setting.stack.host.step_seconds)
    held = (dense * weights[0] + experts * weights[1]) / cores.pp
    return CoreBounds(seconds=seconds, memory=with_reserve(setting, held))


def _separate(setting: Setting, cores: Cores, parts: Sequence[Section]) -> Iterator[Any]:
    """(degrees, rows, sections) of dense operations, and of experts' where the model has any."""
    ones = np.ones_like(cores.tp)
    dense = dataclasses.replace(cores, ep=ones, etp=ones)
    yield (*combinations(dense), [_some(part, experts=False) for part in parts])
    if setting.graph.num_experts:
        # What experts cost depends on tp * cp alone, and on whether there is any tp.
        tp = np.where(cores.tp > 1, 2, 1)
        apart = dataclasses.replace(
            cores, tp=tp, cp=cores.tp * cores.cp // tp, sp=np.zeros_like(cores.sp), order=0 * tp
        )
        yield (*combinations(apart), [_some(part, experts=True) for part in parts])


def _some(part: Section, *, experts: bool) -> Section:
    """A section's operations of experts, or all others."""

    def keep(op: Op) -> bool:
        return (op.split in EXPERT_OPS) == experts

    return Section(
        tuple(op for op in part.ops if keep(op)), part.blocks,
        tuple(pair for pair in part.separate if keep(pair[0])), tuple(pair for pair in part.fused if keep(pair[0])),
    )  # fmt: skip


def pipe_seconds(passes: Floats, m: Floats, shapes: Shapes) -> Floats:
    """max_r (m t_r + sum_{i<r} t_i / v) of cores [cores, sections] in every pipe, [cores, pipes]."""
    own, fill = on_ranks(passes, shapes.counts), on_ranks(passes, shapes.before / shapes.virtual[:, None, None])
    return np.asarray((m[:, None, None] * own + fill).max(axis=2))


def on_ranks(each: Floats, counts: Floats) -> Floats:
    """Of quantities [cores, sections], what ranks with pieces [pipes, ranks, sections] have: [cores, pipes, ranks]."""
    pipes, ranks, parts = counts.shape
    return np.asarray((each @ counts.reshape(-1, parts).T).reshape(-1, pipes, ranks))


def weight_bytes(setting: Setting, cores: Cores, decided: Decisions) -> tuple[Floats, Floats]:
    """Bytes that a dense weight and an expert's take at least on a device, by any sharding of each core, [cores]."""
    data, narrow = setting.stack.data, setting.weight_bytes
    width = narrow - (narrow - 1) * (data.quantized_weights and setting.workload.precision is Precision.FP8)
    # Sharded weights that are cast from the master copy are part of the state.
    sharded_width = 0 if (data.casts_weights or data.shards_fp32) and narrow < 4 else width
    gradient = setting.gradient_bytes if data.persistent_gradients else 0.0
    edp = cores.dp * cores.cp * cores.tp // (cores.ep * cores.etp)
    least = [np.full(len(cores), np.inf), np.full(len(cores), np.inf)]
    for column, zero in enumerate(decided.zero.tolist()):
        if decided.in_node[column]:
            # Wherever the ranks of a node may shard by themselves, all may shard, which leaves less on each.
            continue
        state = 0.0 if decided.offload[column] else setting.state_bytes
        for which, ranks in enumerate((cores.dp * cores.cp, edp)):
            n = np.maximum(ranks, 1)
            held = (
                (sharded_width / n if zero >= 3 else width)
                + state / (n if zero >= 1 else 1)
                + gradient / (n if zero >= 2 else 1)
            )
            least[which] = np.minimum(least[which], np.where(cores.holdings[:, column], held, np.inf))
    return least[0], least[1]


def with_reserve(setting: Setting, used: Floats) -> Floats:
    memory = setting.stack.memory
    return (1 + memory.fragmentation) * (used + memory.workspace_bytes) + memory.reserve_bytes


def flights(decided: Decisions, pp: int, pipes: Ints, shapes: Shapes, m: Ints) -> Floats:
    """Microbatches in flight of every core's m, pipe and telling rank, [cores, pipes, ranks]."""
    found = np.empty((len(m), len(pipes), shapes.ranks.shape[1]))
    for code in np.unique(decided.pipe_schedule[pipes]).tolist():
        hit = decided.pipe_schedule[pipes] == code
        found[:, hit] = peak_in_flight(
            SCHEDULE_CODES[code].value, shapes.ranks[hit][None], pp, m[:, None, None].astype(float),
            decided.pipe_vp[pipes][hit][None, :, None].astype(float),
        )  # fmt: skip
    return found
