"""Exact search through mixed plans: islands into lines, degrees, blocks per stage, sequences per replica.

Minimise step(x) = max over lines of step_line(x) over plans x whose stages fit in the memory of their islands. Blocks
of a line are solved by ``mixed_line``; sequences follow exactly: for a time T every choice of a line reaches a set of
totals (``batch_split.reachable_totals``), and T is enough if one total of each line together make the batch. T goes
down from one attained step to the next until nothing is below. Choices whose bound (``mixed_space``) is no better than
the last plan of the list are not priced, and counted as such. Ties go to less memory, then to the slug's order.
"""

from __future__ import annotations

import dataclasses
import math
import time
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from autopar.errors import NoFeasiblePlan
from autopar.estimate.mixed_result import MixedEstimate, estimate_mixed
from autopar.estimate.mixed_setting import MixedSetting, Shared, mixed_setting, shard_ranks
from autopar.estimate.setting import Setting
from autopar.mixed_plan import Line, MixedPlan, in_step
from autopar.plan import even_split
from autopar.search.mixed_family import Family, Share, best_of_family, families_of, family_bound, slowest
from autopar.search.mixed_line import split_line
from autopar.search.mixed_space import (
    Assignment,
    Choices,
    MixedSpace,
    assignments,
    choices_of,
    replica_vectors,
)
from costmodels.islands import MixedCluster
from costmodels.units import GIB

REPEATED = "repeated"
"""Reason of plans that are another's equal: sequence parallelism without tensor parallelism."""
NOT_PRICED = "bound"
"""Reason of plans whose bound is no better than the last of the list."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedSearchResult:
    """What a search found.

    Attributes:
        best: estimates in the order of rank.
        bound_s: no plan of the space is faster.
        considered: plans of the space, blocks and shares of the batch apart, since each plan's best are looked for.
        feasible: plans that were priced and fit.
        rejected: the others, by reason; with ``feasible`` they add up to ``considered``.
        seconds: of the search.
    """

    best: tuple[MixedEstimate, ...]
    bound_s: float
    considered: int
    feasible: int
    rejected: Mapping[str, int]
    seconds: float


@dataclass(slots=True)
class _Found:
    """The fastest plans so far, and what became of the others."""

    top: int
    ranked: list[tuple[float, float, str, MixedPlan]] = field(default_factory=list)
    considered: int = 0
    feasible: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    loosest: float = math.inf

    @property
    def limit(self) -> float:
        """Plans that take as long or longer do not make the list."""
        return self.ranked[self.top - 1][0] if len(self.ranked) >= self.top else math.inf

    def add(self, step_s: float, bound_s: float, memory: float, plan: MixedPlan) -> None:
        """Enter a plan, unless it was found before under another name."""
        if any(row[2] == plan.slug for row in self.ranked):
            self.rejected[REPEATED] += 1
            return
        insort(self.ranked, (step_s, memory, plan.slug, plan), key=lambda row: row[:3])
        self.feasible += 1
        self.loosest = min(self.loosest, bound_s)


def search_uneven_batch(setting: Setting, *, top: int = 10, space: MixedSpace | None = None) -> MixedSearchResult:
    """Plans of equal devices whose replicas need not divide the batch: some take a microbatch more (7 devices, 32).

    Raises:
        NoFeasiblePlan: nothing fits.
    """
    cluster = setting.cluster
    alone = MixedCluster(name=cluster.name, islands=(cluster,), between=cluster.links[-1])
    return search_mixed(mixed_setting(setting.graph, setting.workload, alone, setting.stack), top=top, space=space)


def search_mixed(setting: MixedSetting, *, top: int = 10, space: MixedSpace | None = None) -> MixedSearchResult:
    """Find the ``top`` fastest plans; of lines that share a batch, the best for each number of replicas and sharding.

    Raises:
        NoFeasiblePlan: nothing fits.
    """
    start = time.perf_counter()
    space, found = space or MixedSpace(), _Found(top=top)
    every = assignments(len(setting.cluster.islands), space.leave_out)
    singles: list[tuple[float, int, _Single]] = []
    families: list[tuple[float, int, Family]] = []
    for assignment in every:
        for item in _items(setting, space, assignment, found):
            if isinstance(item, Family):
                families.append((family_bound(setting, item), len(families), item))
            else:
                singles.append((item.bound, len(singles), item))
    singles.sort(key=lambda row: row[:2])
    families.sort(key=lambda row: row[:2])
    # A full list first: families are quick to rule out by its last plan, and slow to solve without.
    done = 0
    while done < len(singles) and found.limit == math.inf:
        _try_single(setting, space, singles[done][2], found)
        done += 1
    for _, _, family in families:
        _try_family(setting, space, family, found)
    for _, _, single in singles[done:]:
        _try_single(setting, space, single, found)
    if not found.ranked:
        raise NoFeasiblePlan(_nothing_fits(setting, found))
    best = [estimate_mixed(setting, row[3]) for row in found.ranked[:top]]
    rejected = {reason: number for reason, number in found.rejected.items() if number}
    return MixedSearchResult(
        best=tuple(best), bound_s=min(found.loosest, best[0].step_s), considered=found.considered,
        feasible=found.feasible, rejected=rejected, seconds=time.perf_counter() - start,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Single:
    """A line that takes the whole batch, without blocks, to be sharded in several ways."""

    bound: float
    choices: Choices
    index: int
    sequence_parallel: bool
    variants: tuple[tuple[int, str], ...]

    @property
    def line(self) -> Line:
        return self.choices.line(self.index)


def _items(
    setting: MixedSetting, space: MixedSpace, assignment: Assignment, found: _Found
) -> Iterator[Family | _Single]:
    """What is to be looked at under an assignment; what is forbidden at once is counted."""
    variants = space.sharding_variants(setting, len(assignment))
    for replicas, sp in product(replica_vectors(setting, assignment), (False, True)):
        if len(assignment) == 1:
            yield from _singles(setting, space, assignment[0], replicas[0], sp, variants, found)
            continue
        for zero, sharding in variants:
            shared = Shared(
                replicas=sum(replicas), lines=len(assignment), zero_stage=zero, sharding=sharding, sequence_parallel=sp
            )
            families, rejected = families_of(setting, space, assignment, replicas, shared)
            found.rejected.update(rejected)
            found.considered += sum(rejected.values()) + sum(family.size for family in families)
            yield from families


def _singles(
    setting: MixedSetting,
    space: MixedSpace,
    islands: tuple[int, ...],
    replicas: int,
    sp: bool,
    variants: tuple[tuple[int, str], ...],
    found: _Found,
) -> Iterator[_Single]:
    shared = Shared(replicas=replicas, lines=1, sequence_parallel=sp)
    choices, rejected = choices_of(setting, space, islands, shared, replicas)
    found.considered += (len(choices) + sum(rejected.values())) * len(variants)
    if sp:
        same = choices.without_tensor_parallel()
        rejected[REPEATED] += int(np.count_nonzero(same))
        choices = choices.select(~same)
    for reason, number in rejected.items():
        found.rejected[reason] += number * len(variants)
    least = choices.least_seconds(-(-setting.workload.global_batch // (choices.microbatch * replicas)))
    for index, bound in enumerate(least.tolist()):
        yield _Single(bound=bound, choices=choices, index=index, sequence_parallel=sp, variants=variants)


def _try_single(setting: MixedSetting, space: MixedSpace, single: _Single, found: _Found) -> None:
    if single.bound >= found.limit:
        found.rejected[NOT_PRICED] += len(single.variants)
        return
    for zero, sharding in single.variants:
        _try_line(setting, space, single.line, (zero, sharding, single.sequence_parallel), found)


def _try_line(
    setting: MixedSetting, space: MixedSpace, line: Line, decided: tuple[int, str, bool], found: _Found
) -> None:
    """Price a line that takes the whole batch."""
    zero, sharding, sp = decided
    batch = setting.workload.global_batch
    shared = Shared(replicas=line.replicas, lines=1, zero_stage=zero, sharding=sharding, sequence_parallel=sp)
    if any(shard_ranks(setting, line, segment, shared) is None for segment in line.segments):
        found.rejected["sharding"] += 1
        return
    line, undivided = _with_batch(line, batch), line
    if in_step(zero, setting.stack.data.accumulates_sharded) and line.batch[0] != line.batch[-1]:
        found.rejected["batch"] += 1
        return
    split = split_line(setting, undivided, shared, line.num_microbatches, found.limit, space.even)
    if split is None:
        found.rejected["memory"] += 1
        return
    if split.step_s >= found.limit:
        found.rejected[NOT_PRICED] += 1
        return
    whole = dataclasses.replace(line, blocks=split.line.blocks)
    plan = MixedPlan(lines=(whole,), zero_stage=zero, sharding=sharding, sequence_parallel=sp)
    found.add(split.step_s, split.bound_s, split.memory_bytes, plan)


def _try_family(setting: MixedSetting, space: MixedSpace, family: Family, found: _Found) -> None:
    """Price the best plan of lines that share the batch."""
    shares = best_of_family(setting, space, family, found.limit)
    found.rejected[NOT_PRICED] += family.size - (shares is not None)
    if shares is not None:
        bound = max(share.split.bound_s for share in shares)
        memory = max(share.split.memory_bytes for share in shares)
        found.add(slowest(shares), bound, memory, _joined(shares, family.shared))


def _joined(shares: tuple[Share, ...], shared: Shared) -> MixedPlan:
    lines = [_with_batch(share.split.line, share.total) for share in shares]
    divided = any(segment.tp > 1 for line in lines for segment in line.segments)
    return MixedPlan(
        lines=tuple(lines), zero_stage=shared.zero_stage, sharding=shared.sharding,
        sequence_parallel=shared.sequence_parallel and divided,
    )  # fmt: skip


def _with_batch(line: Line, total: int) -> Line:
    """A line whose replicas take a total as evenly as whole microbatches allow, the first ones what is left over."""
    shares = even_split(total // line.microbatch_size, line.replicas)
    return dataclasses.replace(line, batch=tuple(n * line.microbatch_size for n in shares))


def _nothing_fits(setting: MixedSetting, found: _Found) -> str:
    reasons = ", ".join(f"{number} by {reason}" for reason, number in found.rejected.items() if number)
    sizes = ", ".join(f"{island.name} {island.device.memory_bytes / GIB:.0f} GiB" for island in setting.cluster.islands)
    return (
        f"no plan of {setting.cluster.world_size} devices fits ({reasons}; a device has: {sizes}): use more devices, "
        "devices with more memory, a smaller model or another global batch"
    )
