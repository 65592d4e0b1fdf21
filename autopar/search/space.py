"""The space of plans: every combination of what an engine lets its user decide, counted and, piece by piece, listed.

A *core* is what prices of pieces depend on: degrees tp cp pp dp ep etp, order of the axes, microbatch and sequence
parallelism. Around each core the other decisions are free of each other: a *pipe* (virtual stages, schedule, split of
the blocks), what is *recomputed*, and how state is *sharded* and offloaded. The space is their product, so that it is
counted without being listed; ``search.exhaustive`` lists only what its bounds leave.

Degrees run over all ordered factorisations of the ranks; vp over all numbers of virtual stages, the blocks divided as
the engine does or with fewer in the first and last stage; sharding stages over all data parallel ranks or over those of
a node; microbatch over the divisors of a rank's batch; recomputation over none, every set of modules, all blocks or the
first k of each virtual stage. Orders of axes that put every group on the same links count once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.arrays import (
    ORDER_CODES,
    RECOMPUTE_CODES,
    SCHEDULE_CODES,
    Bools,
    Ints,
    PlanArrays,
    modules_mask,
    strides,
)
from autopar.estimate.setting import Setting
from autopar.graph import RECOMPUTE_MODULES
from autopar.layout import USUAL_ORDER
from autopar.plan import V_SCHEDULES, VIRTUAL_SCHEDULES, Recompute, ScheduleName, even_split

AXES = ("tp", "cp", "pp", "ep", "etp")
NONE, SELECTIVE, FULL = (RECOMPUTE_CODES.index(kind) for kind in (Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL))


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Limits on what is looked at; what the engine does not offer is never looked at.

    Attributes:
        degrees: allowed degrees of an axis of AXES; all where it is not named.
        max_cp: largest context parallel degree.
        max_microbatch: most sequences of a pass.
        min_microbatches: of a pipeline (fewer leave most of it idle).
        max_vp: most virtual stages per rank.
        recompute: settings to try.
        partial_recompute, uneven_ends, offload: whether to try what the engine offers.
        every_module_set: all sets of modules that selective recomputation may cover; else the first module alone, and
            all of them.
        schedules, orders: to try; None means those that the engine offers.
    """

    degrees: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    max_cp: int = 64
    max_microbatch: int = 64
    min_microbatches: int = 1
    max_vp: int = 16
    recompute: tuple[Recompute, ...] = RECOMPUTE_CODES
    partial_recompute: bool = True
    uneven_ends: bool = True
    offload: bool = True
    every_module_set: bool = True
    schedules: tuple[ScheduleName, ...] | None = None
    orders: tuple[str, ...] | None = None


PLAIN = Space(partial_recompute=False, uneven_ends=False, offload=False, every_module_set=False, orders=(USUAL_ORDER,))
"""The part of the space that can be listed even for large clusters: degrees, microbatch, sharding, interleaving and
recomputation of whole stages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cores:
    """Cores as equally long arrays, and which ways of holding state each can have, [cores, holdings]."""

    tp: Ints
    cp: Ints
    pp: Ints
    dp: Ints
    ep: Ints
    etp: Ints
    order: Ints
    microbatch: Ints
    sp: Bools
    holdings: Bools

    def __len__(self) -> int:
        return len(self.tp)

    def stride(self, axis: str) -> Ints:
        """Distance in ranks between neighbours along an axis, as PlanArrays has it."""
        return strides(tp=self.tp, cp=self.cp, pp=self.pp, dp=self.dp, order=self.order, axes=(axis,))[axis]

    def select(self, keep: NDArray[Any]) -> Cores:
        """The cores under a mask or at indices."""
        return Cores(**{name: getattr(self, name)[keep] for name in Cores.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True, slots=True)
class Decisions:
    """What is decided around cores.

    Attributes:
        pipe_vp, pipe_schedule, pipe_split: of every pipe, [pipes]; ``pipes_of`` are those of a pipeline degree.
        most_blocks: of a virtual stage of each pipe, [pipes].
        splits: blocks per virtual stage, by code; the first is the engine's own.
        recompute, modules, layers: of every recomputation; the first ``whole_recomputes`` go with all pipes, the
            others, of the first k blocks, with those whose stages have more than k.
        zero, in_node, offload: sharding stage of every way of holding state, whether the ranks of a node shard by
            themselves, and whether optimizer state lies in host memory, [holdings].
    """

    pipe_vp: Ints
    pipe_schedule: Ints
    pipe_split: Ints
    pipes_of: Mapping[int, Ints]
    most_blocks: Ints
    splits: tuple[tuple[int, ...], ...]
    recompute: Ints
    modules: Ints
    layers: Ints
    whole_recomputes: int
    zero: Ints
    in_node: Bools
    offload: Bools

    @property
    def partial(self) -> bool:
        """Whether recomputation of the first blocks alone is looked at."""
        return len(self.recompute) > self.whole_recomputes

    def recomputes(self, pipes: Ints) -> Ints:
        """Number of recomputations that go with each pipe."""
        return self.whole_recomputes + self.partial * np.maximum(self.most_blocks[pipes] - 1, 0)


def divisors(number: int) -> tuple[int, ...]:
    """Divisors in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Ordered tuples of ``parts`` factors with this product."""
    if parts == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in factorisations(number // first, parts - 1):
            yield (first, *rest)


def cores_of(setting: Setting, space: Space, decided: Decisions) -> Cores:
    """All cores of a cluster's ranks, feasible or not."""
    offered = setting.stack.offers
    columns = _degrees(setting, space)
    orders = [ORDER_CODES.index(name) for name in (space.orders or offered.orders)]
    columns = _with_orders(columns, orders, setting)
    columns = _product(columns, "microbatch", *_microbatches(setting, space, columns["dp"]))
    several = columns["tp"] > 1
    columns = _product(columns, "sp", np.where(several, 2, 1), np.arange(2))
    return Cores(
        **{name: column for name, column in columns.items() if name != "sp"},
        sp=columns["sp"].astype(np.bool_),
        holdings=_holdings(setting, columns, decided),
    )


def _degrees(setting: Setting, space: Space) -> dict[str, Ints]:
    world, axes = setting.cluster.world_size, setting.stack.offers.axes
    dense = np.asarray(list(factorisations(world, 4)), dtype=np.int64)
    columns = dict(zip(("tp", "cp", "pp", "dp"), dense.T, strict=True))
    keep = columns["cp"] <= space.max_cp
    for axis in ("tp", "cp", "pp"):
        if axis not in axes:
            keep &= columns[axis] == 1
        if axis in space.degrees:
            keep &= np.isin(columns[axis], space.degrees[axis])
    columns = {name: column[keep] for name, column in columns.items()}
    stage_size = columns["tp"] * columns["cp"] * columns["dp"]
    experts = setting.graph.num_experts if "ep" in axes else 1
    allowed = {axis: space.degrees.get(axis) for axis in ("ep", "etp")}
    pairs = {
        size: [
            (ep, etp)
            for ep in divisors(size)
            if ep <= max(experts, 1) and (allowed["ep"] is None or ep in allowed["ep"])
            for etp in (divisors(size // ep) if experts > 1 else (1,))
            if etp <= setting.cluster.domain and (allowed["etp"] is None or etp in allowed["etp"])
        ]
        for size in np.unique(stage_size).tolist()
    }
    numbers = np.asarray([len(pairs[size]) for size in stage_size.tolist()], dtype=np.int64)
    columns = {name: np.repeat(column, numbers) for name, column in columns.items()}
    experts_of = np.asarray([pair for size in stage_size.tolist() for pair in pairs[size]], dtype=np.int64)
    columns["ep"], columns["etp"] = experts_of.reshape(-1, 2).T
    return columns


def _product(columns: dict[str, Ints], name: str, numbers: Ints, values: Ints, starts: Ints | None = None) -> Any:
    """Every row ``numbers`` times over, with a new column: the row's values, from its start on."""
    first = np.repeat(np.cumsum(numbers) - numbers, numbers)
    place = np.arange(len(first)) - first
    if starts is not None:
        place = place + np.repeat(starts, numbers)
    return {**{key: np.repeat(column, numbers) for key, column in columns.items()}, name: values[place]}


def _with_orders(columns: dict[str, Ints], orders: list[int], setting: Setting) -> dict[str, Ints]:
    """Rows in every order that puts some group on other links than the orders before it do."""
    reach = setting.cluster.reaches[-1]
    tp, cp, pp, dp = (columns[name] for name in ("tp", "cp", "pp", "dp"))
    experts = columns["ep"] * columns["etp"] > 1
    seen: list[Ints] = []
    distinct_order = np.zeros((len(tp), len(orders)), dtype=np.bool_)
    for place, order in enumerate(orders):
        code = np.full_like(tp, order)
        apart = strides(tp=tp, cp=cp, pp=pp, dp=dp, order=code)
        degrees = {"tp": tp, "cp": cp, "pp": pp, "data": cp * dp}
        key = np.zeros_like(tp)
        for axis, degree in degrees.items():
            key = key * (reach + 1) + np.where(degree > 1, np.minimum(apart[axis], reach), 0)
        allowed = ~experts | np.asarray(ORDER_CODES[order].endswith("-pp"))
        fresh = np.ones(len(tp), dtype=np.bool_)
        for earlier in seen:
            fresh &= key != earlier
        distinct_order[:, place] = fresh & allowed
        seen.append(np.where(allowed, key, -1))
    rows, chosen = np.nonzero(distinct_order)
    return {**{name: column[rows] for name, column in columns.items()}, "order": np.asarray(orders)[chosen]}


def _microbatches(setting: Setting, space: Space, dp: Ints) -> tuple[Ints, Ints, Ints]:
    """(number, values, first value) of sizes that divide a rank's batch; one where the batch itself does not divide."""
    batch = setting.workload.global_batch
    degrees, inverse = np.unique(dp, return_inverse=True)
    lists = [
        [1] if batch % degree else [s for s in divisors(batch // degree) if s <= space.max_microbatch]
        for degree in degrees.tolist()
    ]
    numbers = np.asarray([len(sizes) for sizes in lists])
    values = np.asarray([size for sizes in lists for size in sizes], dtype=np.int64)
    return numbers[inverse], values, (np.cumsum(numbers) - numbers)[inverse]


def _holdings(setting: Setting, columns: Mapping[str, Ints], decided: Decisions) -> Bools:
    tp, cp, dp, order = (columns[name] for name in ("tp", "cp", "dp", "order"))
    many = dp * cp > 1
    inside = shards_in_node(setting, tp, cp, columns["pp"], dp, order)
    divides = (inside > 1) & (inside < dp) & (dp % inside == 0)
    mixed = np.asarray(["dp-cp" in name for name in ORDER_CODES])[order] & (cp > 1)
    found = []
    for zero, in_node, offload in zip(decided.zero, decided.in_node, decided.offload, strict=True):
        if zero == 0:
            found.append(~many if offload else np.ones_like(many))
        else:
            found.append(many & divides & ~mixed if in_node else many)
    return np.stack(found, axis=1)


def shards_in_node(setting: Setting, tp: Ints, cp: Ints, pp: Ints, dp: Ints, order: Ints) -> Ints:
    """Data parallel ranks that share a node."""
    apart = strides(tp=tp, cp=cp, pp=pp, dp=dp, order=order)["data"]
    return np.asarray(np.maximum(1, setting.cluster.devices_per_node // (apart * cp)))


@lru_cache(maxsize=16)
def _pipes(blocks: int, degrees: tuple[int, ...], space_vp: int, uneven: bool, schedules: tuple[str, ...]) -> Any:
    vp: list[int] = []
    schedule: list[int] = []
    split: list[int] = []
    most: list[int] = []
    splits: dict[tuple[int, ...], int] = {(): 0}
    pipes_of: dict[int, list[int]] = {}

    def add(pp: int, virtual: int, name: str, blocks_of: tuple[int, ...], largest: int) -> None:
        pipes_of.setdefault(pp, []).append(len(vp))
        vp.append(virtual)
        schedule.append(SCHEDULE_CODES.index(ScheduleName(name)))
        split.append(splits.setdefault(blocks_of, len(splits)))
        most.append(largest)

    for pp in degrees:
        plain = [name for name in schedules if name not in VIRTUAL_SCHEDULES] if pp > 1 else ["1f1b"]
        virtual = {1: plain}
        for v in range(2, space_vp + 1 if pp > 1 and "interleaved" in schedules else 1):
            if pp * v <= blocks + 2 and (uneven or blocks % (pp * v) == 0):
                virtual[v] = ["interleaved"]
        if pp > 1 and 2 * pp <= blocks:
            virtual[2] = [*virtual.get(2, ()), *(name for name in schedules if name in V_SCHEDULES)]
        for v, names in virtual.items():
            ends = _uneven_splits(blocks, pp * v) if uneven and pp > 1 else ()
            for name in names:
                if pp * v <= blocks or (v == 1 and not ends):
                    add(pp, v, name, (), -(-blocks // (pp * v)))
                for blocks_of in ends:
                    add(pp, v, name, blocks_of, max(blocks_of))
    return tuple(np.asarray(x, dtype=np.int64) for x in (vp, schedule, split, most)), pipes_of, tuple(splits)


def _uneven_splits(blocks: int, stages: int) -> tuple[tuple[int, ...], ...]:
    """Divisions with equally many blocks in all stages but the first (up to 2 fewer) and the last (up to 3 fewer)."""
    found = []
    for first_fewer in range(3):
        for last_fewer in range(4):
            each, left = divmod(blocks + first_fewer + last_fewer, stages)
            if left or each < max(1, first_fewer, last_fewer):
                continue
            split = (each - first_fewer, *[each] * (stages - 2), each - last_fewer)
            if split != even_split(blocks, stages):
                found.append(split)
    return tuple(dict.fromkeys(found))


def decisions(setting: Setting, space: Space) -> Decisions:
    """What may be decided around the cores of a setting."""
    graph, offered = setting.graph, setting.stack.offers
    schedules = tuple(offered.schedules if space.schedules is None else (name.value for name in space.schedules))
    degrees = divisors(setting.cluster.world_size)
    (vp, schedule, split, most), pipes_of, splits = _pipes(
        graph.num_blocks, degrees, space.max_vp, space.uneven_ends and offered.uneven_ends, schedules
    )
    present = {op.module for op in graph.ops if 0 <= op.block < graph.num_blocks}
    modules = [m for m in RECOMPUTE_MODULES if m in offered.selective and (m in present or m == "op_level")]
    sets = [c for n in range(1, len(modules) + 1) for c in combinations(modules, n) if not {"moe", "moe_act"} <= set(c)]
    if not space.every_module_set:
        sets = [chosen for place, chosen in enumerate(sets) if place in (0, len(sets) - 1)]
    masks = [modules_mask((*chosen, "moe_act") if "moe" in chosen else chosen) for chosen in sets]
    options = [(NONE, 0, 0)] if Recompute.NONE in space.recompute else []
    options += [(SELECTIVE, mask, 0) for mask in masks if Recompute.SELECTIVE in space.recompute]
    options += [(FULL, 0, 0)] if Recompute.FULL in space.recompute else []
    whole = len(options)
    if space.partial_recompute and offered.partial_recompute and Recompute.FULL in space.recompute:
        options += [(FULL, 0, k) for k in range(1, graph.num_blocks)]
    kinds = np.asarray(options, dtype=np.int64).reshape(-1, 3).T
    hosted = space.offload and offered.offload and setting.cluster.device.host is not None
    held = [
        (zero, in_node, offload)
        for offload in (False, True)[: 1 + hosted]
        for zero in setting.stack.data.shardable
        for in_node in (False, True)[: 1 + (zero > 0)]
    ]
    return Decisions(
        pipe_vp=vp, pipe_schedule=schedule, pipe_split=split, most_blocks=most, splits=splits,
        pipes_of={pp: np.asarray(indices) for pp, indices in pipes_of.items()},
        recompute=kinds[0], modules=kinds[1], layers=kinds[2], whole_recomputes=whole,
        zero=np.asarray([zero for zero, _, _ in held]), in_node=np.asarray([in_node for _, in_node, _ in held]),
        offload=np.asarray([offload for _, _, offload in held]),
    )  # fmt: skip


def number_of_plans(cores: Cores, decided: Decisions) -> Ints:
    """Plans around each core."""
    degrees, which = np.unique(cores.pp, return_inverse=True)
    nothing = np.zeros(0, dtype=np.int64)
    each = [int(decided.recomputes(decided.pipes_of.get(pp, nothing)).sum()) for pp in degrees.tolist()]
    return np.asarray(np.asarray(each, dtype=np.int64)[which] * cores.holdings.sum(axis=1))


def assemble(
    setting: Setting, cores: Cores, decided: Decisions, core: Ints, pipe: Ints, recompute: Ints, holding: Ints
) -> PlanArrays:
    """Plans of these cores, pipes, recomputations and holdings, as equally long indices."""
    zero, dp = decided.zero[holding], cores.dp[core]
    inside = shards_in_node(setting, cores.tp[core], cores.cp[core], cores.pp[core], dp, cores.order[core])
    shards = np.where(zero == 0, 1, np.where(decided.in_node[holding], inside, dp))
    return PlanArrays(
        tp=cores.tp[core], cp=cores.cp[core], pp=cores.pp[core], vp=decided.pipe_vp[pipe],
        dp_replicate=dp // shards, dp_shard=shards, microbatch=cores.microbatch[core], zero=zero, sp=cores.sp[core],
        recompute=decided.recompute[recompute], schedule=decided.pipe_schedule[pipe], ep=cores.ep[core],
        etp=cores.etp[core], order=cores.order[core], modules=decided.modules[recompute],
        recompute_layers=decided.layers[recompute], offload=decided.offload[holding], split=decided.pipe_split[pipe],
        splits=decided.splits,
    )  # fmt: skip


def enumerate_plans(setting: Setting, space: Space | None = None) -> PlanArrays:
    """All plans of a space, feasible or not: for spaces small enough to list."""
    space = space or Space()
    decided = decisions(setting, space)
    return listed(setting, cores_of(setting, space, decided), decided)


def listed(setting: Setting, cores: Cores, decided: Decisions) -> PlanArrays:
    """All plans around cores."""
    rows = [
        (core, pipe, again, holding)
        for core, pp in enumerate(cores.pp.tolist())
        for pipe in decided.pipes_of.get(pp, np.zeros(0, dtype=np.int64))
        for again in range(int(decided.recomputes(pipe)))
        for holding in np.flatnonzero(cores.holdings[core])
    ]
    return assemble(setting, cores, decided, *np.asarray(rows, dtype=np.int64).reshape(-1, 4).T)
