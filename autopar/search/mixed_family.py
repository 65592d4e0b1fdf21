"""Lines that share a batch: which choice each takes and how many sequences, exactly.

A family fixes assignment, replicas of every line, sharding and sequence parallelism; then the lines' choices depend on
each other through the batch alone. With T given, a choice of microbatch u and D replicas reaches the totals u k for
D <= k <= D m(T), m(T) the most microbatches of a replica within T; of equal u only the largest m(T) matters. T is
enough if totals of the lines add up to the batch. Bisection narrows T, then T goes down from one attained step to the
next until no combination is below it, so that the last one is the optimum. Where every microbatch has collectives of
all replicas, all run equally many, and each line takes its fastest choice.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.mixed_setting import MixedSetting, Shared, shard_ranks
from autopar.mixed_plan import in_step
from autopar.search.batch_split import reachable_totals, totals_that_add_up
from autopar.search.mixed_line import SplitLine, split_line
from autopar.search.mixed_space import Assignment, Choices, MixedSpace, choices_of

GROWTH, NARROW = 0.03, 1e-4
"""By how much T grows at first until it is enough, and the width at which bisection hands over."""
SLOWEST = 64.0
"""Times the bound that are tried before a family counts as too large for its memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Lines with their choices, and what they share."""

    lines: tuple[Choices, ...]
    shared: Shared

    @property
    def size(self) -> int:
        """Combinations of choices."""
        return math.prod(len(line) for line in self.lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A line with its blocks, and the sequences that all its replicas take together."""

    split: SplitLine
    total: int


def families_of(
    setting: MixedSetting, space: MixedSpace, assignment: Assignment, replicas: tuple[int, ...], shared: Shared
) -> tuple[tuple[Family, ...], Counter[str]]:
    """Families of one assignment, and how many combinations of choices each reason forbids.

    Lines that shard together take equal tp and cp on all islands: one family for each pair.
    """
    found = [choices_of(setting, space, line, shared, n) for line, n in zip(assignment, replicas, strict=True)]
    lines = [choices for choices, _ in found]
    forbidden = [dict(why) for _, why in found]
    rejected: Counter[str] = Counter()

    def left() -> int:
        return math.prod(len(c) + sum(why.values()) for c, why in zip(lines, forbidden, strict=True))

    for reason in {reason: None for why in forbidden for reason in why}:
        before = left()
        forbidden = [{r: number for r, number in why.items() if r != reason} for why in forbidden]
        rejected[reason] += before - left()
    if shared.zero_stage == 0:
        return (Family(lines=tuple(lines), shared=shared),), rejected
    before = left()
    lines = [choices.select(_shardable(setting, choices, shared)) for choices in lines]
    families = [Family(lines=tuple(lines), shared=shared)]
    if shared.sharding == "all":
        keys = [_common_degrees(choices) for choices in lines]
        equal = sorted(set.intersection(*(set(k.tolist()) for k in keys)) - {0})
        families = [
            Family(lines=tuple(c.select(k == key) for c, k in zip(lines, keys, strict=True)), shared=shared)
            for key in equal
        ]
    rejected["sharding"] += before - sum(family.size for family in families)
    return tuple(families), rejected


def _shardable(setting: MixedSetting, choices: Choices, shared: Shared) -> NDArray[np.bool_]:
    """Choices whose segments all have such a sharding."""
    keep = np.ones(len(choices), dtype=np.bool_)
    if not len(choices):
        return keep
    line = choices.line(0)
    for k, options in enumerate(choices.options):
        has = [shard_ranks(setting, line, segment, shared) is not None for segment in options]
        keep &= np.asarray(has, dtype=np.bool_)[choices.segments[:, k]]
    return keep


def _common_degrees(choices: Choices) -> NDArray[np.int64]:
    """A number for (tp, cp) of choices that have the same on all islands, 0 for the others."""
    codes = [
        np.asarray([segment.tp * 2**20 + segment.cp for segment in options], dtype=np.int64)[choices.segments[:, k]]
        for k, options in enumerate(choices.options)
    ]
    equal = np.all([code == codes[0] for code in codes], axis=0)
    return np.where(equal, codes[0], 0)


def family_bound(setting: MixedSetting, family: Family) -> float:
    """No combination of the family takes less."""
    if not family.size:
        return math.inf
    batch = setting.workload.global_batch
    if _in_step(setting, family):
        bounds = [
            max(float(c.least_seconds(np.float64(m))[c.microbatch == u].min()) for c, u in pairs)
            for m, pairs in _equal_microbatches(setting, family)
        ]
        return min(bounds, default=math.inf)
    low = high = max(float(c.least_seconds(np.ones(1)).min()) for c in family.lines)
    while sum(_most_sequences(c, high) for c in family.lines) < batch:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        enough = sum(_most_sequences(c, middle) for c in family.lines) >= batch
        low, high = (low, middle) if enough else (middle, high)
    return low


def _most_sequences(choices: Choices, seconds: float) -> int:
    most = choices.most_microbatches(seconds) * choices.microbatch
    return int(most.max()) * choices.replicas


def _in_step(setting: MixedSetting, family: Family) -> bool:
    return in_step(family.shared.zero_stage, setting.stack.data.accumulates_sharded)


def _equal_microbatches(setting: MixedSetting, family: Family) -> list[tuple[int, tuple[tuple[Choices, int], ...]]]:
    """(microbatches of every replica, each line with its microbatch size) that make up the batch."""
    found = []
    for units in product(*(sorted(set(c.microbatch.tolist())) for c in family.lines)):
        at_once = sum(c.replicas * unit for c, unit in zip(family.lines, units, strict=True))
        if setting.workload.global_batch % at_once == 0:
            pairs = tuple(zip(family.lines, units, strict=True))
            found.append((setting.workload.global_batch // at_once, pairs))
    return found


def best_of_family(setting: MixedSetting, space: MixedSpace, family: Family, limit: float) -> tuple[Share, ...] | None:
    """The shares of the fastest combination; None if none fits in memory and is faster than ``limit``."""
    if _in_step(setting, family):
        return _best_in_step(setting, space, family, limit)
    least = low = family_bound(setting, family)
    found, reach, growth = None, low, GROWTH
    while found is None:
        if reach >= min(limit, least * SLOWEST):
            return None
        low, reach, growth = reach, min(reach * (1 + growth), limit), 1.5 * growth
        found = _within(setting, space, family, reach)
    high = slowest(found)
    while high - low > NARROW * high:
        middle = (low + high) / 2
        better = _within(setting, space, family, middle)
        if better is None:
            low = middle
        else:
            found, high = better, slowest(better)
    while (better := _within(setting, space, family, high)) is not None:
        found, high = better, slowest(better)
    return found


def slowest(shares: tuple[Share, ...]) -> float:
    """The step of lines together."""
    return max(share.split.step_s for share in shares)


def _within(setting: MixedSetting, space: MixedSpace, family: Family, seconds: float) -> tuple[Share, ...] | None:
    """A combination that takes less than ``seconds``; None if there is none."""
    batch = setting.workload.global_batch
    most = [_most_sequences(choices, seconds) for choices in family.lines]
    reached: list[dict[int, tuple[int, int]]] = []
    for k, choices in enumerate(family.lines):
        need = batch - sum(most) + most[k]
        found = _reach(setting, space, choices, family.shared, seconds, need)
        if not found:
            return None
        reached.append(found)
        most[k] = max(unit * choices.replicas * m for unit, (_, m) in found.items())
        if sum(most) < batch:
            return None
    bits = [
        reachable_totals([(unit, c.replicas, c.replicas * m) for unit, (_, m) in found.items()], batch)
        for c, found in zip(family.lines, reached, strict=True)
    ]
    totals = totals_that_add_up(bits, batch)
    if totals is None:
        return None
    return tuple(
        _share(setting, space, choices, found, family.shared, total)
        for choices, found, total in zip(family.lines, reached, totals, strict=True)
    )


def _share(
    setting: MixedSetting,
    space: MixedSpace,
    choices: Choices,
    found: dict[int, tuple[int, int]],
    shared: Shared,
    total: int,
) -> Share:
    """The fastest of the choices that reach a total."""
    splits = []
    for unit, (index, most) in found.items():
        m = -(-total // (unit * choices.replicas))
        if total % unit == 0 and choices.replicas * unit <= total and m <= most:
            split = split_line(setting, choices.line(index), shared, m, math.inf, space.even)
            assert split is not None, "fewer microbatches need no more memory"
            splits.append(split)
    return Share(split=min(splits, key=lambda s: (s.step_s, s.memory_bytes, s.line.slug)), total=total)


def _reach(
    setting: MixedSetting, space: MixedSpace, choices: Choices, shared: Shared, seconds: float, need: int
) -> dict[int, tuple[int, int]]:
    """By microbatch size the choice with the most microbatches within ``seconds``, and how many.

    Choices that cannot reach ``need`` sequences by their bound are left out.
    """
    bound = choices.most_microbatches(seconds)
    bound = np.where(bound * choices.microbatch * choices.replicas >= max(need, 1), bound, 0)
    found: dict[int, tuple[int, int]] = {}
    for index in np.argsort(-bound, kind="stable").tolist():
        if bound[index] < 1:
            break
        unit = int(choices.microbatch[index])
        known = found.get(unit, (0, 0))[1]
        if bound[index] <= known:
            continue
        most = _most_within(setting, space, choices, index, shared, seconds, int(bound[index]), known)
        if most > known:
            found[unit] = (index, most)
    return found


def _most_within(
    setting: MixedSetting,
    space: MixedSpace,
    choices: Choices,
    index: int,
    shared: Shared,
    seconds: float,
    most: int,
    known: int,
) -> int:
    """The most microbatches in (known, most] with which a choice takes less than ``seconds``; ``known`` if none."""
    line, pace = choices.line(index), choices.pace[index] * choices.factor
    low, high, guess = known, most + 1, most
    while high - low > 1:
        split = split_line(setting, line, shared, guess, seconds, space.even)
        if split is None:
            high, guess = guess, (low + guess) // 2
        elif split.step_s < seconds:
            low, guess = guess, guess + max(1, math.floor((seconds - split.step_s) / pace))
        else:
            high, guess = guess, guess - max(1, math.floor((split.step_s - seconds) / pace))
        guess = min(max(guess, low + 1), high - 1)
    return low


def _best_in_step(setting: MixedSetting, space: MixedSpace, family: Family, limit: float) -> tuple[Share, ...] | None:
    best: tuple[Share, ...] | None = None
    for m, pairs in _equal_microbatches(setting, family):
        shares = []
        for choices, unit in pairs:
            split = _fastest(setting, space, choices.select(choices.microbatch == unit), family.shared, m, limit)
            if split is None:
                break
            shares.append(Share(split=split, total=m * unit * choices.replicas))
        if len(shares) == len(pairs):
            best = tuple(shares)
            limit = slowest(best)
    return best


def _fastest(
    setting: MixedSetting, space: MixedSpace, choices: Choices, shared: Shared, m: int, limit: float
) -> SplitLine | None:
    """The fastest choice with ``m`` microbatches; None if none fits and is faster than ``limit``."""
    best: SplitLine | None = None
    least = choices.least_seconds(np.full(len(choices), float(m)))
    for index in np.argsort(least, kind="stable").tolist():
        if least[index] >= limit:
            break
        split = split_line(setting, choices.line(index), shared, m, limit, space.even)
        if split is not None and split.step_s < limit:
            best, limit = split, split.step_s
    return best
