"""Many plans as arrays, so that one formula prices one plan or a million."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.layout import Layout
from autopar.plan import Plan, Recompute, ScheduleName, default_schedule

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

RECOMPUTE_CODES = tuple(Recompute)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanArrays:
    """Equally long arrays, one entry a plan; names as in Layout and Plan. ``recompute`` indexes RECOMPUTE_CODES.

    Attributes:
        stage_blocks: blocks per virtual stage where they are given by hand, by index of the plan.
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
    gpipe: Bools
    stage_blocks: dict[int, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.tp)

    @property
    def dp(self) -> Ints:
        """All data parallel ranks."""
        return self.dp_replicate * self.dp_shard

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

    def select(self, keep: NDArray[np.bool_] | Ints) -> PlanArrays:
        """The plans under a mask or at indices."""
        indices = np.flatnonzero(keep) if keep.dtype == np.bool_ else keep
        fields = {
            name: getattr(self, name)[indices] for name in PlanArrays.__dataclass_fields__ if name != "stage_blocks"
        }
        chosen = {new: self.stage_blocks[old] for new, old in enumerate(indices.tolist()) if old in self.stage_blocks}
        return PlanArrays(**fields, stage_blocks=chosen)

    def plan(self, index: int) -> Plan:
        """One entry as a Plan."""
        vp = int(self.vp[index])
        return Plan(
            layout=Layout(
                tp=int(self.tp[index]),
                cp=int(self.cp[index]),
                pp=int(self.pp[index]),
                vp=vp,
                dp_replicate=int(self.dp_replicate[index]),
                dp_shard=int(self.dp_shard[index]),
            ),
            microbatch_size=int(self.microbatch[index]),
            zero_stage=int(self.zero[index]),
            sequence_parallel=bool(self.sp[index]),
            schedule=ScheduleName.GPIPE if self.gpipe[index] else default_schedule(vp),
            recompute=RECOMPUTE_CODES[int(self.recompute[index])],
            stage_blocks=self.stage_blocks.get(index, ()),
        )


def to_arrays(plans: Sequence[Plan]) -> PlanArrays:
    """Plans as arrays; ``to_arrays(plans).plan(i) == plans[i]``."""

    def ints(values: Sequence[int]) -> Ints:
        return np.asarray(values, dtype=np.int64)

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
        gpipe=np.asarray([plan.schedule is ScheduleName.GPIPE for plan in plans], dtype=np.bool_),
        stage_blocks={i: plan.stage_blocks for i, plan in enumerate(plans) if plan.stage_blocks},
    )
