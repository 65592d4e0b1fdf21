"""Degrees of parallelism, their order on the machine, and the groups of ranks that follow.

Axes, slowest varying first, as in a torch DeviceMesh: pp, dp_replicate, dp_shard, cp, tp. Ranks that differ
only in tp are neighbours, since tensor parallelism talks the most. Other orders are named as Megatron-Core names them,
fastest first: ``tp-cp-dp-pp`` is the usual one, ``tp-pp-cp-dp`` keeps a pipeline inside the node. cp and dp stay side
by side in all of them, so that ranks with equal weights, and those that shard them, are evenly spaced.

Experts divide the same dp * cp * tp ranks of a pipeline stage anew: etp fastest, then ep, then edp, the ranks that
hold equal experts. These axes are no part of ``AXES``, but ``groups`` and ``stride`` know them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.errors import PlanError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("edp", "ep", "etp")
USUAL_ORDER = "tp-cp-dp-pp"
_DATA_ORDERS = {"cp-dp": ("dp_replicate", "dp_shard", "cp"), "dp-cp": ("cp", "dp_replicate", "dp_shard")}


def _named_orders() -> dict[str, tuple[str, ...]]:
    """Names of orders, fastest axis first, with their axes, slowest first."""
    found = {}
    for outer in (("tp", "data", "pp"), ("tp", "pp", "data"), ("data", "tp", "pp"), ("data", "pp", "tp"),
                  ("pp", "tp", "data"), ("pp", "data", "tp")):  # fmt: skip
        for inner, axes in _DATA_ORDERS.items():
            name = "-".join(inner if part == "data" else part for part in outer)
            found[name] = tuple(a for part in reversed(outer) for a in (axes if part == "data" else (part,)))
    return found


ORDERS = _named_orders()
"""Orders of the axes on the machine, the usual one first: name to axes, slowest first."""


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
        ep: expert parallel ranks; each holds num_experts / ep experts.
        etp: tensor parallel ranks of an expert.
        order: of the axes on the machine, one of ORDERS.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    etp: int = 1
    order: str = USUAL_ORDER

    def __post_init__(self) -> None:
        for name in (*AXES, "vp", "ep", "etp"):
            if getattr(self, name) < 1:
                raise PlanError(f"layout: {name} is {getattr(self, name)}; a degree is at least 1")
        if self.vp > 1 and self.pp == 1:
            raise PlanError(f"layout: vp={self.vp} needs a pipeline: use pp>=2 or vp=1")
        if self.stage_size % (self.ep * self.etp):
            raise PlanError(
                f"layout: ep*etp={self.ep * self.etp} does not divide the tp*cp*dp={self.stage_size} ranks of a "
                "pipeline stage: use a divisor"
            )
        if self.order not in ORDERS:
            raise PlanError(f"layout: unknown order '{self.order}'; the orders are {', '.join(ORDERS)}")
        if "dp-cp" in self.order and self.cp > 1 and self.dp_replicate > 1 and self.dp_shard > 1:
            raise PlanError(
                f"layout: order {self.order} puts replicas between the ranks that shard together over dp_shard and cp: "
                "use an order with cp-dp"
            )
        if self.ep * self.etp > 1 and not self.order.endswith("-pp"):
            raise PlanError(
                f"layout: experts divide the ranks of a pipeline stage, which order {self.order} does not keep "
                "together: use an order that ends in pp"
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the mesh, slowest varying first."""
        return ORDERS[self.order]

    @property
    def dp(self) -> int:
        """All data parallel ranks."""
        return self.dp_replicate * self.dp_shard

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage: tp * cp * dp."""
        return self.tp * self.cp * self.dp

    @property
    def edp(self) -> int:
        """Ranks of a pipeline stage that hold equal experts (data parallel ranks of the experts)."""
        return self.stage_size // (self.ep * self.etp)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.degrees())

    def degrees(self) -> tuple[int, ...]:
        """Degrees in the order of ``AXES``."""
        return tuple(getattr(self, axis) for axis in AXES)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a rank on every axis of ``AXES``."""
        return self._position(rank, self.axes)

    def _position(self, rank: int, axes: tuple[str, ...]) -> dict[str, int]:
        if not 0 <= rank < self.world_size:
            raise PlanError(f"rank {rank} is outside of 0..{self.world_size - 1}")
        position: dict[str, int] = {}
        for axis in reversed(axes):
            rank, position[axis] = divmod(rank, getattr(self, axis))
        return {axis: position[axis] for axis in axes}

    def data_share(self, rank: int) -> int:
        """Which of the ``dp`` equal shares of the global batch a rank takes."""
        position = self.coordinates(rank)
        return position["dp_replicate"] * self.dp_shard + position["dp_shard"]

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """Groups of ranks that differ only along ``axes``, in rank order.

        ``groups("tp")`` are the tensor parallel groups; ``groups("dp_replicate", "dp_shard")`` the data parallel
        ones; ``groups("ep")`` exchange tokens, and ``groups("edp")`` hold equal experts. Raises PlanError for an
        unknown axis and for axes of both divisions, which have no groups in common.
        """
        division = self._division(axes)
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            position = self._position(rank, division)
            key = tuple(position[axis] for axis in division if axis not in axes)
            members.setdefault(key, []).append(rank)
        return tuple(tuple(ranks) for ranks in members.values())

    def stride(self, axis: str) -> int:
        """Distance in ranks between neighbours along ``axis``."""
        division = self._division((axis,))
        return math.prod(getattr(self, inner) for inner in division[division.index(axis) + 1 :])

    def _division(self, axes: Sequence[str]) -> tuple[str, ...]:
        """The axes, slowest first, of which ``axes`` are some: those of dense layers or those of experts."""
        known = (*AXES, *EXPERT_AXES)
        for axis in axes:
            if axis not in known:
                raise PlanError(f"'{axis}' is not a mesh axis; the axes are {', '.join(known)}")
        if not any(axis in EXPERT_AXES for axis in axes):
            return self.axes
        mixed = [axis for axis in axes if axis not in ("pp", *EXPERT_AXES)]
        if mixed:
            raise PlanError(f"axis '{mixed[0]}' divides dense layers: it has no groups together with axes of experts")
        return ("pp", *EXPERT_AXES)
