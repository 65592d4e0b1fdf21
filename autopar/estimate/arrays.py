"""Many plans as arrays, so that one formula prices one plan or a million."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.graph import RECOMPUTE_MODULES
from autopar.layout import ORDERS, Layout
from autopar.plan import Plan, Recompute, ScheduleName

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

RECOMPUTE_CODES = tuple(Recompute)
SCHEDULE_CODES = tuple(ScheduleName)
ORDER_CODES = tuple(ORDERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanArrays:
    """Equally long arrays, one entry a plan; names as in Layout and Plan.

    Attributes:
        recompute, schedule, order: index RECOMPUTE_CODES, SCHEDULE_CODES and ORDER_CODES.
        modules: what selective recomputation covers, a bit for each of RECOMPUTE_MODULES.
        recompute_layers: of every virtual stage that full recomputation covers; 0 means all.
        offload: optimizer state in host memory.
        split: blocks per virtual stage, an index of ``splits``; 0 means as the engine divides them.
        splits: divisions by hand, the first of them empty.
    """

    tp: Ints
    cp: Ints
    pp: Ints
    vp: Ints
    dp_replicate: Ints
    dp_shard: Ints
    microbatch: Ints
    zero: Ints
    sp: Bools
    recompute: Ints
    schedule: Ints
    ep: Ints
    etp: Ints
    order: Ints
    modules: Ints
    recompute_layers: Ints
    offload: Bools
    split: Ints
    splits: tuple[tuple[int, ...], ...] = ((),)

    def __len__(self) -> int:
        return len(self.tp)

    @property
    def dp(self) -> Ints:
        """All data parallel ranks."""
        return self.dp_replicate * self.dp_shard

    @property
    def gpipe(self) -> Bools:
        """All forwards before the first backward."""
        return np.asarray(self.schedule == SCHEDULE_CODES.index(ScheduleName.GPIPE))

    @property
    def expert_ranks(self) -> Ints:
        """Ranks of a stage that hold equal experts."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def shards(self) -> Ints:
        """Ranks that share sharded state: context parallel ranks hold equal weights, so they shard as well."""
        return np.where(self.zero > 0, self.dp_shard * self.cp, 1)

    @property
    def replicas(self) -> Ints:
        """Groups of equal gradients, each of ``shards`` ranks."""
        return self.dp * self.cp // self.shards

    @property
    def world_size(self) -> Ints:
        """Ranks of each plan."""
        return self.tp * self.cp * self.pp * self.dp

    def stride(self, axis: str) -> Ints:
        """Distance in ranks between neighbours along ``tp``, ``cp``, ``pp`` or ``data`` (ranks with equal weights)."""
        return strides(tp=self.tp, cp=self.cp, pp=self.pp, dp=self.dp, order=self.order, axes=(axis,))[axis]

    def select(self, keep: NDArray[np.bool_] | Ints) -> PlanArrays:
        """The plans under a mask or at indices."""
        indices = np.flatnonzero(keep) if keep.dtype == np.bool_ else keep
        return PlanArrays(**{name: getattr(self, name)[indices] for name in COLUMNS}, splits=self.splits)

    def plan(self, index: int) -> Plan:
        """One entry as a Plan."""
        return Plan(
            layout=Layout(
                tp=int(self.tp[index]),
                cp=int(self.cp[index]),
                pp=int(self.pp[index]),
                vp=int(self.vp[index]),
                dp_replicate=int(self.dp_replicate[index]),
                dp_shard=int(self.dp_shard[index]),
                ep=int(self.ep[index]),
                etp=int(self.etp[index]),
                order=ORDER_CODES[int(self.order[index])],
            ),
            microbatch_size=int(self.microbatch[index]),
            zero_stage=int(self.zero[index]),
            sequence_parallel=bool(self.sp[index]),
            schedule=SCHEDULE_CODES[int(self.schedule[index])],
            recompute=RECOMPUTE_CODES[int(self.recompute[index])],
            recompute_modules=modules_of(int(self.modules[index])),
            recompute_layers=int(self.recompute_layers[index]),
            stage_blocks=self.splits[int(self.split[index])],
            offload_optimizer=bool(self.offload[index]),
        )


COLUMNS = tuple(name for name in PlanArrays.__dataclass_fields__ if name != "splits")


def _inside(axis: str) -> dict[str, Bools]:
    """For every order, which degrees lie between neighbours along ``axis``; ``data`` is cp and dp as one."""
    found = {}
    for inner in ("tp", "pp", "data"):
        if inner == axis or (axis == "cp" and inner == "data"):
            continue
        places = {name: name.replace("cp-dp", "data").replace("dp-cp", "data").split("-") for name in ORDER_CODES}
        outer = "data" if axis == "cp" else axis
        found[inner] = np.asarray([places[name].index(inner) < places[name].index(outer) for name in ORDER_CODES])
    if axis == "cp":
        found["dp"] = np.asarray(["dp-cp" in name for name in ORDER_CODES])
    return found


_INSIDE = {axis: _inside(axis) for axis in ("tp", "cp", "pp", "data")}


def strides(
    *, tp: Ints, cp: Ints, pp: Ints, dp: Ints, order: Ints, axes: Sequence[str] = ("tp", "cp", "pp", "data")
) -> dict[str, Ints]:
    """Distance in ranks between neighbours along each axis; ``data`` are the ranks with equal weights, cp and dp."""
    degrees = {"tp": tp, "pp": pp, "dp": dp, "data": cp * dp}
    found = {}
    for axis in axes:
        apart = np.ones_like(tp)
        for inner, where in _INSIDE[axis].items():
            between = where[order]
            if between.any():
                apart = apart * np.where(between, degrees[inner], 1)
        found[axis] = apart
    return found


def distinct(*columns: NDArray[Any]) -> tuple[Ints, Ints]:
    """Of equally long columns of whole numbers from 0: an index of each distinct row, and each row's index of these."""
    if len(columns[0]) == 1:
        return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    key = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        key = key * (int(column.max(initial=0)) + 1) + column
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def modules_mask(modules: Sequence[str]) -> int:
    """Bits of recompute modules."""
    return sum(1 << RECOMPUTE_MODULES.index(module) for module in modules)


def modules_of(mask: int) -> tuple[str, ...]:
    """Modules of a mask, in the order of RECOMPUTE_MODULES."""
    return tuple(module for bit, module in enumerate(RECOMPUTE_MODULES) if mask >> bit & 1)


def to_arrays(plans: Sequence[Plan]) -> PlanArrays:
    """Plans as arrays; ``to_arrays(plans).plan(i) == plans[i]``."""

    def ints(values: Sequence[int]) -> Ints:
        return np.asarray(values, dtype=np.int64)

    splits = tuple(dict.fromkeys(((), *(plan.stage_blocks for plan in plans))))
    index = {split: code for code, split in enumerate(splits)}
    return PlanArrays(
        tp=ints([plan.layout.tp for plan in plans]),
        cp=ints([plan.layout.cp for plan in plans]),
        pp=ints([plan.layout.pp for plan in plans]),
        vp=ints([plan.layout.vp for plan in plans]),
        dp_replicate=ints([plan.layout.dp_replicate for plan in plans]),
        dp_shard=ints([plan.layout.dp_shard for plan in plans]),
        microbatch=ints([plan.microbatch_size for plan in plans]),
        zero=ints([plan.zero_stage for plan in plans]),
        sp=np.asarray([plan.sequence_parallel for plan in plans], dtype=np.bool_),
        recompute=ints([RECOMPUTE_CODES.index(plan.recompute) for plan in plans]),
        schedule=ints([SCHEDULE_CODES.index(plan.schedule) for plan in plans]),
        ep=ints([plan.layout.ep for plan in plans]),
        etp=ints([plan.layout.etp for plan in plans]),
        modules=ints([modules_mask(plan.recomputed_modules) for plan in plans]),
        recompute_layers=ints([plan.recompute_layers for plan in plans]),
        order=ints([ORDER_CODES.index(plan.layout.order) for plan in plans]),
        offload=np.asarray([plan.offload_optimizer for plan in plans], dtype=np.bool_),
        split=ints([index[plan.stage_blocks] for plan in plans]),
        splits=splits,
    )


def schedules_of(plans: PlanArrays) -> Ints:
    """Codes of the schedules that plans have, each once."""
    return plans.schedule if len(plans) == 1 else np.unique(plans.schedule)
