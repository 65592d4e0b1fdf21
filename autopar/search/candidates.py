"""Candidates: cores with a pipe and a recomputation whose bounds leave them in the running.

They are listed pipeline degree by pipeline degree: first matrices of cores against pipes with the recomputation that
costs the least and the one that keeps the least, then, of the pairs that are left, each recomputation. What a bound
rules out is counted, with everything that could still have been decided around it, and never listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from autopar.estimate.arrays import Bools, Ints
from autopar.estimate.pieces import Floats
from autopar.estimate.setting import Setting
from autopar.graph import RECOMPUTE_MODULES
from autopar.search.bounds import (
    Pieces,
    Shapes,
    flights,
    on_ranks,
    pipe_seconds,
    shapes_of,
    step_factor,
    with_reserve,
)
from autopar.search.rules import pipe_rules
from autopar.search.space import FULL, SELECTIVE, Cores, Decisions, Space

SLOWER = "slower"
MEMORY = "memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Equally long: index of the core, of the pipe, of the recomputation, and the least step time in seconds."""

    core: Ints
    pipe: Ints
    recompute: Ints
    seconds: Floats

    def __len__(self) -> int:
        return len(self.core)

    def select(self, keep: Ints | Bools) -> Candidates:
        """Those at indices or under a mask."""
        return Candidates(
            core=self.core[keep], pipe=self.pipe[keep], recompute=self.recompute[keep], seconds=self.seconds[keep]
        )


def joined(parts: list[Candidates]) -> Candidates:
    """Several lists as one."""
    nothing = np.zeros(0, dtype=np.int64)
    return Candidates(
        core=np.concatenate([nothing, *(part.core for part in parts)]),
        pipe=np.concatenate([nothing, *(part.pipe for part in parts)]),
        recompute=np.concatenate([nothing, *(part.recompute for part in parts)]),
        seconds=np.concatenate([np.zeros(0), *(part.seconds for part in parts)]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """Cores to look at and what is known of them.

    Attributes:
        pieces: prices of the cores' pieces.
        weights: least bytes of a dense weight and of an expert's on a device, [cores] each.
        around: [cores] ways to hold a plan's state.
        shapes: of the pipes of a pipeline degree, filled as they are asked for.
    """

    setting: Setting
    space: Space
    decided: Decisions
    cores: Cores
    pieces: Pieces
    weights: tuple[Floats, Floats]
    around: Ints
    shapes: dict[int, Shapes]

    def shapes_of(self, pp: int) -> Shapes:
        """Of all pipes of ``pp`` ranks."""
        if pp not in self.shapes:
            self.shapes[pp] = shapes_of(self.setting, self.decided, pp, self.decided.pipes_of[pp])
        return self.shapes[pp]


def candidates_of(ground: Ground, threshold: float, tally: Counter[str]) -> Candidates:
    """Candidates around the cores whose bounds are within memory and within ``threshold`` seconds."""
    pairs = [_pairs(ground, pp, threshold, tally) for pp in np.unique(ground.cores.pp).tolist()]
    return joined([found for each in pairs if len(each.core) for found in _recomputed(ground, each, threshold, tally)])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pairs:
    """Cores with a pipe, equally long; of telling ranks [pairs, ranks]: pieces (and those of the ranks before) by
    section, microbatches in flight, bytes of weights."""

    core: Ints
    pipe: Ints
    counts: Floats
    before: Floats
    flight: Floats
    static: Floats


def _pairs(ground: Ground, pp: int, threshold: float, tally: Counter[str]) -> _Pairs:
    chosen = np.flatnonzero(ground.cores.pp == pp)
    setting, decided, pieces = ground.setting, ground.decided, ground.pieces
    cores, rows, pipes = ground.cores.select(chosen), pieces.rows[chosen], decided.pipes_of[pp]
    around = ground.around[chosen][:, None] * decided.recomputes(pipes)
    m = setting.workload.global_batch // (cores.dp * cores.microbatch)
    alive = np.ones(around.shape, dtype=np.bool_)

    def rule_out(reason: str, hit: Bools) -> None:
        nonlocal alive
        tally[reason] += int(around[alive & hit].sum())
        alive = alive & ~hit

    for reason, hit in pipe_rules(setting, ground.space, decided, pp, m, pipes).items():
        rule_out(reason, hit)
    shapes = ground.shapes_of(pp)
    flight = flights(decided, pp, pipes, shapes, m)
    prices = pieces.prices
    experts = prices.experts[rows]
    weights = (prices.parameters[rows] - experts) * ground.weights[0][chosen, None]
    static = on_ranks(weights + experts * ground.weights[1][chosen, None], shapes.counts)
    held = on_ranks(np.where(pieces.is_end, 0.0, pieces.kept_least[rows]), shapes.counts) * flight
    used = with_reserve(setting, (static + held).max(axis=2))
    rule_out(MEMORY, used > setting.cluster.device.memory_bytes)
    least = pipe_seconds(pieces.passes[rows], m.astype(float), shapes) + setting.stack.host.step_seconds
    rule_out(SLOWER, step_factor(setting, cores)[:, None] * least > threshold)
    core, pipe = np.nonzero(alive)
    return _Pairs(
        core=chosen[core], pipe=pipes[pipe], counts=shapes.counts[pipe],
        before=shapes.before[pipe] / shapes.virtual[pipe, None, None], flight=flight[core, pipe],
        static=static[core, pipe],
    )  # fmt: skip


def _recomputed(ground: Ground, pairs: _Pairs, threshold: float, tally: Counter[str]) -> Iterator[Candidates]:
    """The pairs with every recomputation."""
    setting, decided, pieces = ground.setting, ground.decided, ground.pieces
    cores, rows = ground.cores.select(pairs.core), pieces.rows[pairs.core]
    m = (setting.workload.global_batch // (cores.dp * cores.microbatch))[:, None]
    factor, host = step_factor(setting, cores), setting.stack.host.step_seconds
    limit, around = setting.cluster.device.memory_bytes, ground.around[pairs.core]
    everyone = np.arange(len(rows))

    def total(each: Floats, counts: Floats = pairs.counts) -> Floats:
        """Of quantities [combinations, sections], what the ranks of each pair have, [pairs, ranks]."""
        return np.asarray(np.einsum("ps,prs->pr", each[rows], counts))

    def within(index: int, own: Floats, fill: Floats, kept: Floats, at: Ints = everyone) -> tuple[Candidates, Bools]:
        """Those of the pairs ``at`` that stay in the running, and which of these are not too slow."""
        used = pairs.static[at] + kept * pairs.flight[at] + end[at]
        room = with_reserve(setting, used.max(axis=1)) <= limit
        least = factor[at] * ((m[at] * own + fill).max(axis=1) + host)
        soon = least <= threshold
        tally[MEMORY] += int(around[at[~room]].sum())
        tally[SLOWER] += int(around[at[room & ~soon]].sum())
        found = np.flatnonzero(room & soon)
        chosen = at[found]
        return Candidates(
            core=pairs.core[chosen], pipe=pairs.pipe[chosen], recompute=np.full(len(found), index), seconds=least[found]
        ), soon

    end = total(np.where(pieces.is_end, pieces.kept, 0.0)) * np.minimum(pairs.flight, 1.0)
    inside = np.where(pieces.is_end, 0.0, pieces.kept)
    own, fill, kept = total(pieces.passes), total(pieces.passes, pairs.before), total(inside)
    again, freed = total(pieces.again), total(inside - np.where(pieces.is_end, 0.0, pieces.kept_full))
    modules = {}
    for bit in range(len(RECOMPUTE_MODULES)):
        if (decided.modules >> bit & 1).any():
            more, less = (
                np.where(pieces.is_block, x[:, :, bit], 0.0) for x in (pieces.prices.again, pieces.prices.freed)
            )
            modules[bit] = (total(more), total(more, pairs.before), total(less))
    for index in range(decided.whole_recomputes):
        if decided.recompute[index] == SELECTIVE:
            chosen = [sums for bit, sums in modules.items() if decided.modules[index] >> bit & 1]
            more, early, less = (sum(parts[1:], parts[0]) for parts in zip(*chosen, strict=True))
            yield within(index, own + more, fill + early, kept - less)[0]
        elif decided.recompute[index] == FULL:
            yield within(index, own + again, fill + total(pieces.again, pairs.before), kept - freed)[0]
        else:
            yield within(index, own, fill, kept)[0]
    if decided.partial:
        blocks = np.maximum((pairs.counts * pieces.is_block).sum(axis=2), 1.0)
        vp, most = decided.pipe_vp[pairs.pipe][:, None], decided.most_blocks[pairs.pipe]
        live, layers = everyone[most > 1], 1
        while len(live):
            share = np.minimum(layers * vp[live] / blocks[live], 1.0)
            found, soon = within(
                decided.whole_recomputes + layers - 1, own[live] + share * again[live], fill[live],
                kept[live] - share * freed[live], live,
            )  # fmt: skip
            yield found
            # Recomputing more blocks takes longer still.
            late = live[~soon]
            tally[SLOWER] += int((around[late] * (most[late] - 1 - layers)).sum())
            layers += 1
            live = live[soon & (most[live] > layers)]
