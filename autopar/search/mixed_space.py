"""The space of mixed plans: which islands form which lines, and the degrees of each line's segments, with a bound.

An assignment puts islands, or some of them, into lines, each an ordered list of islands. A line with D replicas takes,
on each of its islands, every stages * tp * cp that make up the island's devices over D. Bounds on the step are arrays
over all choices of a line, so that most of them are never priced.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autopar.estimate.mixed import stage_rows, stage_seconds, straggler_share
from autopar.estimate.mixed_setting import MixedSetting, Shared
from autopar.layout import Layout
from autopar.mixed_plan import SHARDINGS, Line, Segment, segment_violations
from autopar.plan import Plan, Recompute
from autopar.search.space import divisors, factorisations

Floats = NDArray[np.float64]
Assignment = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedSpace:
    """Limits on what is looked at.

    Attributes:
        max_cp: largest context parallel degree.
        max_microbatch: most sequences of a forward pass.
        recompute: settings to try, on each island by itself.
        shardings: of mixed_plan.SHARDINGS.
        leave_out: islands may be left idle.
        even: blocks as the engine divides them, and no other split.
    """

    max_cp: int = 64
    max_microbatch: int = 64
    recompute: tuple[Recompute, ...] = tuple(Recompute)
    shardings: tuple[str, ...] = SHARDINGS
    leave_out: bool = True
    even: bool = False

    def sharding_variants(self, setting: MixedSetting, lines: int) -> tuple[tuple[int, str], ...]:
        """(ZeRO stage, sharding) of the engine; a single line is all."""
        kinds = [kind for kind in self.shardings if lines > 1 or kind != "line"]
        found = [(zero, kind) for zero in setting.stack.data.shardable if zero for kind in kinds]
        return (*([(0, "all")] if 0 in setting.stack.data.shardable else []), *found)


OPTION_REASONS = ("query heads", "key-value heads", "sequence")
"""Reasons against a segment, in the order in which they count."""


LAUNCH_BOUND = 1.02
"""Blocks that take this much longer by waiting for launches are bounded with it, and the ends of the model without."""


def microbatch_sizes(setting: MixedSetting, space: MixedSpace) -> tuple[int, ...]:
    """Sequences of a forward pass: divisors of the batch."""
    return tuple(d for d in divisors(setting.workload.global_batch) if d <= space.max_microbatch)


def assignments(num_islands: int, leave_out: bool = True) -> tuple[Assignment, ...]:
    """All ways to put islands into lines of ordered islands: of 2 islands, 3 with both and 2 with one."""
    found: set[Assignment] = set()
    for size in range(1 if leave_out else num_islands, num_islands + 1):
        for order in permutations(range(num_islands), size):
            for cuts in product((False, True), repeat=size - 1):
                lines: list[list[int]] = [[order[0]]]
                for island, cut in zip(order[1:], cuts, strict=True):
                    if cut:
                        lines.append([])
                    lines[-1].append(island)
                found.add(tuple(sorted(tuple(line) for line in lines)))
    return tuple(sorted(found, key=lambda a: (len(a), -sum(map(len, a)), a)))


def replica_counts(setting: MixedSetting, line: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of equal pipelines that a line's islands can be divided into."""
    sizes = [setting.cluster.islands[island].world_size for island in line]
    return divisors(math.gcd(*sizes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """All ways to lay out one line with a given number of replicas; arrays [choices].

    Attributes:
        islands, replicas: of the line.
        segments: [choices, segments] index of ``options`` of each island.
        options: segments of each island.
        microbatch, stages: sequences per pass; stages in all.
        pace: least seconds of a microbatch on the slowest stage.
        used, paces: [choices, segments] stages and pace if the fastest 1, 2, ... segments hold all blocks.
        ends: least seconds of what comes before and after the blocks.
        backward: least share of these that is backward.
        factor, extra: the step is factor * passes + extra at least.
    """

    islands: tuple[int, ...]
    replicas: int
    options: tuple[tuple[Segment, ...], ...]
    segments: NDArray[np.int64]
    microbatch: NDArray[np.int64]
    stages: NDArray[np.int64]
    pace: Floats
    used: NDArray[np.int64]
    paces: Floats
    ends: Floats
    backward: Floats
    factor: float
    extra: float

    def __len__(self) -> int:
        return len(self.microbatch)

    def line(self, index: int) -> Line:
        """One choice as a line without blocks and batch."""
        chosen = tuple(self.options[k][i] for k, i in enumerate(self.segments[index].tolist()))
        return Line(segments=chosen, replicas=self.replicas, microbatch_size=int(self.microbatch[index]))

    def without_tensor_parallel(self) -> NDArray[np.bool_]:
        """Choices with tp = 1 on all islands."""
        found = np.ones(len(self), dtype=np.bool_)
        for k, options in enumerate(self.options):
            found &= np.asarray([segment.tp == 1 for segment in options], dtype=np.bool_)[self.segments[:, k]]
        return found

    def least_seconds(self, num_microbatches: ArrayLike) -> Floats:
        """A step takes at least this, [choices]: the bound of ``mixed_line`` for divisible blocks.

        For a pace T the sum over stages is least with the fastest stages full; sum and x T together are convex in T,
        least where a number of the fastest segments is just full.
        """
        m, p = np.asarray(num_microbatches), self.stages
        others = np.maximum(m - p, 0) + self.backward * (np.minimum(m, p) - 1)
        whole = self.ends + ((others[:, None] + self.used) * self.paces).min(axis=1)
        return np.asarray(self.factor * np.maximum(m * self.pace, whole) + self.extra)

    def most_microbatches(self, seconds: float) -> NDArray[np.int64]:
        """A replica has at most so many if the step is to be within ``seconds``, [choices]; the inverse."""
        passes = (seconds - self.extra) / self.factor
        others = ((passes - self.ends)[:, None] / self.paces - self.used).max(axis=1)
        filling = self.backward * (self.stages - 1)
        full, some = self.stages + others - filling, 1 + others / np.maximum(self.backward, 1e-9)
        most = np.minimum(passes / self.pace, np.where(others >= filling, full, some)) * (1 + 1e-12)
        return np.where(others < 0, 0, np.floor(most)).astype(np.int64)

    def select(self, keep: NDArray[np.bool_]) -> Choices:
        """Some of the choices."""
        return Choices(
            islands=self.islands, replicas=self.replicas, options=self.options, segments=self.segments[keep],
            microbatch=self.microbatch[keep], stages=self.stages[keep], pace=self.pace[keep], used=self.used[keep],
            paces=self.paces[keep], ends=self.ends[keep], backward=self.backward[keep],
            factor=self.factor, extra=self.extra,
        )  # fmt: skip


def choices_of(
    setting: MixedSetting, space: MixedSpace, line: tuple[int, ...], shared: Shared, replicas: int
) -> tuple[Choices, Counter[str]]:
    """The legal choices of a line, and how many others each reason forbids."""
    batch, blocks = setting.workload.global_batch, setting.graph.num_blocks
    found_options = [segment_options(setting, space, island, replicas, shared.sequence_parallel) for island in line]
    options, refused = [legal for legal, _ in found_options], [dict(why) for _, why in found_options]
    sizes = microbatch_sizes(setting, space)
    rejected: Counter[str] = Counter()

    def left() -> int:
        return len(sizes) * math.prod(len(o) + sum(r.values()) for o, r in zip(options, refused, strict=True))

    for reason in OPTION_REASONS:
        before = left()
        refused = [{why: number for why, number in r.items() if why != reason} for r in refused]
        rejected[reason] += before - left()
    grid = np.stack(np.meshgrid(*(np.arange(len(o)) for o in options), indexing="ij"), axis=-1).reshape(-1, len(line))
    parts = []
    for size in sizes:
        bounds = _bounds(setting, space, options, grid, size, shared.sequence_parallel)
        parts.append((grid, np.full(len(grid), size, dtype=np.int64), *bounds))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    factor = 1 + setting.stack.straggler * _doublings(setting, shared)
    found = Choices(
        islands=line, replicas=replicas, options=tuple(options), segments=columns[0], microbatch=columns[1],
        stages=columns[2], pace=columns[3], used=columns[4], paces=columns[5], ends=columns[6], backward=columns[7],
        factor=factor, extra=setting.stack.host.step_seconds,
    )  # fmt: skip
    short = found.stages > blocks
    rejected["stages"] += int(np.count_nonzero(short))
    few = ~short & (found.microbatch * replicas > batch)
    rejected["batch"] += int(np.count_nonzero(few))
    return found.select(~short & ~few), rejected


def _doublings(setting: MixedSetting, shared: Shared) -> float:
    if not setting.stack.straggler:
        return 0.0
    alone = Line(segments=(Segment(island=0, stages=1),), replicas=1, microbatch_size=1)
    return straggler_share(setting, alone, shared) / setting.stack.straggler


@lru_cache(maxsize=4096)
def _all_options(setting: MixedSetting, space: MixedSpace, island: int, replicas: int) -> tuple[Segment, ...]:
    size = setting.cluster.islands[island].world_size // replicas
    return tuple(
        Segment(island=island, stages=stages, tp=tp, cp=cp, recompute=recompute)
        for tp, cp, stages in factorisations(size, 3)
        if cp <= space.max_cp
        for recompute in space.recompute
    )


def segment_options(
    setting: MixedSetting, space: MixedSpace, island: int, replicas: int, sequence_parallel: bool
) -> tuple[tuple[Segment, ...], Counter[str]]:
    """Degrees that an island allows, and how many are forbidden, by the first reason."""
    legal, refused = [], Counter[str]()
    for segment in _all_options(setting, space, island, replicas):
        why = segment_violations(segment, sequence_parallel, setting.graph, setting.workload)
        if why:
            refused[why[0].reason] += 1
        else:
            legal.append(segment)
    return tuple(legal), refused


def _bounds(
    setting: MixedSetting,
    space: MixedSpace,
    options: list[tuple[Segment, ...]],
    grid: NDArray[np.int64],
    microbatch: int,
    sp: bool,
) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64], Floats, Floats, Floats]:
    """(stages, pace, used, paces, ends, backward) of every row of ``grid``; waiting and transfers left out."""
    seconds = [_segment_seconds(setting, space, of_island, microbatch, sp) for of_island in options]
    depth = [np.asarray([segment.stages for segment in of_island], dtype=np.int64) for of_island in options]
    chosen = [found[grid[:, k]] for k, found in enumerate(seconds)]
    stages = np.stack([found[grid[:, k]] for k, found in enumerate(depth)], axis=1)
    block = np.stack([c[:, 0] for c in chosen], axis=1)
    first, last = chosen[0][:, 1], chosen[-1][:, 2]
    backward: Floats = np.min([c[:, 3] for c in chosen], axis=0)
    blocks = setting.graph.num_blocks
    fastest = np.argsort(block, axis=1, kind="stable")
    in_order: NDArray[np.int64] = np.take_along_axis(stages, fastest, axis=1)
    speeds = np.take_along_axis(stages / block, fastest, axis=1)
    paces = blocks / np.cumsum(speeds, axis=1) * (1 - 1e-9)
    pace = _least_pace(blocks, stages, block, first, last)
    used: NDArray[np.int64] = np.cumsum(in_order, axis=1)
    return stages.sum(axis=1), pace, used, paces, first + last, backward


def _least_pace(num_blocks: int, stages: NDArray[np.int64], block: Floats, first: Floats, last: Floats) -> Floats:
    """Least seconds of the slowest stage, [choices], of whole blocks; [choices, segments] stages and their block.

    From the pace of divisible blocks on, to the next at which some stage holds a block more, until all blocks have a
    place.
    """
    alone = stages.sum(axis=1) == 1
    kinds = [
        (stages[:, k] - (k == 0) - (k == stages.shape[1] - 1), k, np.zeros(len(block))) for k in range(block.shape[1])
    ]
    kinds += [(np.ones(len(block), dtype=np.int64), 0, first), (np.ones(len(block), dtype=np.int64), -1, last)]
    kinds = [(np.where(alone, 0, np.maximum(number, 0)), k, end) for number, k, end in kinds]
    pace = (num_blocks + first / block[:, 0] + last / block[:, -1]) / (stages / block).sum(axis=1)
    exact = num_blocks * block[:, 0] + first + last
    for _ in range(len(kinds) + 2):
        held = [np.floor(np.maximum(pace - end, 0) / block[:, k] * (1 + 1e-9)) for _, k, end in kinds]
        short = sum(number * h for (number, _, _), h in zip(kinds, held, strict=True)) < num_blocks
        following = [
            np.where(number > 0, end + (h + 1) * block[:, k], np.inf)
            for (number, k, end), h in zip(kinds, held, strict=True)
        ]
        pace = np.where(short & ~alone, np.min(following, axis=0), pace)
    return np.where(alone, exact, pace) * (1 - 1e-9)


def _segment_seconds(
    setting: MixedSetting, space: MixedSpace, options: tuple[Segment, ...], microbatch: int, sp: bool
) -> Floats:
    """[options, 4]: see ``_block_seconds``."""
    if not options:
        return np.zeros((0, 4))
    known = _block_seconds(setting, space, options[0].island)
    return np.asarray([known[s.tp, s.cp, s.recompute, microbatch, sp and s.tp > 1] for s in options])


@lru_cache(maxsize=256)
def _block_seconds(
    setting: MixedSetting, space: MixedSpace, island: int
) -> dict[tuple[int, int, Recompute, int, bool], tuple[float, float, float, float]]:
    """Of an island by (tp, cp, recomputation, microbatch, sp): seconds of the quickest block, of what the first and the
    last stage have beside blocks at least, and the least share that is backward.
    """
    size = setting.cluster.islands[island].world_size
    keys = [
        (tp, cp, recompute, microbatch, sp)
        for tp, cp, _ in factorisations(size, 3)
        if cp <= space.max_cp
        for sp in ((False, True) if tp > 1 else (False,))
        for recompute in space.recompute
        for microbatch in microbatch_sizes(setting, space)
    ]
    keys = [k for k in keys if not segment_violations(_probe(island, k), k[4], setting.graph, setting.workload)]
    if not keys:
        return {}
    plans = [
        Plan(layout=Layout(tp=tp, cp=cp, pp=2), microbatch_size=microbatch, recompute=recompute, sequence_parallel=sp)
        for tp, cp, recompute, microbatch, sp in keys
    ]
    row, total = stage_rows(setting.graph).row, setting.graph.num_blocks
    if total < 3:
        forward, backward, _ = stage_seconds(setting.islands[island], plans, np.asarray([row[0, total]]))
        whole = (forward + backward)[:, 0]
        return {key: (seconds / 1e6, 0.0, 0.0, 0.0) for key, seconds in zip(keys, whole.tolist(), strict=True)}
    wanted = [row[0, 1], row[total - 1, total], *sorted({int(row[i, i + 1]) for i in range(1, total - 1)})]
    forward, backward, stall = stage_seconds(setting.islands[island], plans, np.asarray(wanted))
    found, share = forward + backward, (backward / (forward + backward)).min(axis=1)
    middle, most = found[:, 2:].min(axis=1), found[:, 2:].max(axis=1)
    first, last = np.maximum(found[:, 0] - most, 0.0), np.maximum(found[:, 1] - most, 0.0)
    # Device seconds add up, ends included. Blocks that wait for launches do so too, but then ends may hide.
    waiting = (found + stall)[:, 2:].min(axis=1)
    waits = waiting > LAUNCH_BOUND * middle
    middle, share = np.where(waits, waiting, middle), np.where(waits, np.minimum(share, 2 / 3), share)
    first, last = np.where(waits, 0.0, first), np.where(waits, 0.0, last)
    return dict(zip(keys, zip(*(x.tolist() for x in (middle, first, last, share)), strict=True), strict=True))


def _probe(island: int, key: tuple[int, int, Recompute, int, bool]) -> Segment:
    return Segment(island=island, stages=1, tp=key[0], cp=key[1])


def replica_vectors(setting: MixedSetting, assignment: Assignment) -> Iterator[tuple[int, ...]]:
    """Numbers of replicas of every line of an assignment."""
    yield from product(*(replica_counts(setting, line) for line in assignment))
