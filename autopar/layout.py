"""Degrees of parallelism, their order on the machine, and the groups of ranks that follow.

Axes, slowest varying first, as in a torch DeviceMesh: pp, dp_replicate, dp_shard, cp, tp. Ranks that differ
only in tp are neighbours, since tensor parallelism talks the most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.errors import PlanError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Degrees of each mesh axis; 1 means the axis is not used.

    Attributes:
        tp: tensor parallel ranks (sequence parallelism shares them).
        cp: context parallel ranks.
        pp: pipeline stages (physical).
        vp: virtual stages per pipeline rank (interleaving); not a mesh axis.
        dp_replicate: data parallel ranks that hold equal copies.
        dp_shard: data parallel ranks that shard optimizer state, gradients or parameters (ZeRO).
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1

    def __post_init__(self) -> None:
        for name in (*AXES, "vp"):
            if getattr(self, name) < 1:
                raise PlanError(f"layout: {name} is {getattr(self, name)}; a degree is at least 1")
        if self.vp > 1 and self.pp == 1:
            raise PlanError(f"layout: vp={self.vp} needs a pipeline: use pp>=2 or vp=1")

    @property
    def dp(self) -> int:
        """All data parallel ranks."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.degrees())

    def degrees(self) -> tuple[int, ...]:
        """Degrees in the order of ``AXES``."""
        return tuple(getattr(self, axis) for axis in AXES)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a rank on every axis."""
        if not 0 <= rank < self.world_size:
            raise PlanError(f"rank {rank} is outside of 0..{self.world_size - 1}")
        position: dict[str, int] = {}
        for axis, degree in zip(reversed(AXES), reversed(self.degrees()), strict=True):
            rank, position[axis] = divmod(rank, degree)
        return {axis: position[axis] for axis in AXES}

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """Groups of ranks that differ only along ``axes``, in rank order.

        ``groups("tp")`` are the tensor parallel groups; ``groups("dp_replicate", "dp_shard")`` the data parallel
        ones.
        """
        for axis in axes:
            if axis not in AXES:
                raise PlanError(f"'{axis}' is not a mesh axis; the axes are {', '.join(AXES)}")
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            position = self.coordinates(rank)
            key = tuple(position[axis] for axis in AXES if axis not in axes)
            members.setdefault(key, []).append(rank)
        return tuple(tuple(ranks) for ranks in members.values())

    def stride(self, axis: str) -> int:
        """Distance in ranks between neighbours along ``axis``."""
        return math.prod(self.degrees()[AXES.index(axis) + 1 :])
