"""Bytes that move when a run changes its plan or its ranks: what each rank needs and does not have.

Exact under the division of weights that ``ownership`` states: rectangles of integers are cut, nothing is rounded.
Every rank of the new plan needs its part of the weights and of the optimizer state. What it held before stays; the rest
comes from another rank of its node (or NVLink domain) if one held it, else from a rank elsewhere, and where every
holder was lost, from a checkpoint. Several copies of the same bytes are one source, and a rank receives bytes once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autopar.errors import InputError, PlanError
from autopar.estimate.setting import Setting
from autopar.plan import Plan
from autopar.search.ownership import (
    KINDS,
    Ints,
    Pipelined,
    Rectangles,
    pipelined_weights,
    places_of,
    rectangles,
)

Bytes = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reshard:
    """Bytes of every rank of the new plan, [ranks] each; kept + inside + across + lost == needed.

    Attributes:
        needed: weights and optimizer state of the rank's part.
        kept: of these, what the rank held before.
        inside: what another rank of its node or domain held.
        across: what only ranks elsewhere held.
        lost: what nobody holds any more.
        moved_by_label: inside and across, summed over ranks, by how weights are divided (see ``Pipelined.label``).
        model_bytes: weights and optimizer state of the model, each once.
    """

    needed: Bytes
    kept: Bytes
    inside: Bytes
    across: Bytes
    lost: Bytes
    moved_by_label: Mapping[str, float] = field(default_factory=dict)
    model_bytes: float = 0.0

    @property
    def moved(self) -> Bytes:
        """Bytes that each rank receives from others."""
        return self.inside + self.across


def origins(old_world: int, new_world: int, lost: Collection[int] = ()) -> Ints:
    """The old rank that each new rank was, [new_world]; -1 for a device that is new to the run.

    A cluster with as many devices or more keeps every number: devices at lost numbers were replaced, and more follow.
    A smaller one numbers the survivors anew, in order.

    Raises:
        PlanError: a lost rank that the old plan did not have.
    """
    outside = [rank for rank in lost if not 0 <= rank < old_world]
    if outside:
        raise PlanError(f"lost rank {outside[0]} is outside of the old plan's 0..{old_world - 1}")
    found = np.full(new_world, -1, dtype=np.int64)
    if new_world >= old_world:
        found[:old_world] = np.arange(old_world)
        found[sorted(lost)] = -1
        return found
    survivors = np.setdiff1d(np.arange(old_world), np.asarray(sorted(lost), dtype=np.int64))[:new_world]
    found[: len(survivors)] = survivors
    return found


_LOST = re.compile(r"(?P<node>node)?(?P<first>\d+)(-(?P<last>\d+))?")


def parse_lost(text: str, devices_per_node: int, old_world: int) -> frozenset[int]:
    """Parse ``3,17``, ``8-15`` or ``node2,node4-5`` into old ranks. Raises InputError."""
    found: set[int] = set()
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = _LOST.fullmatch(word)
        if not match:
            raise InputError(f"lost '{word}' is not a rank (3), ranks (8-15), a node (node2) or nodes (node4-5)")
        size = devices_per_node if match["node"] else 1
        first, last = int(match["first"]), int(match["last"] or match["first"])
        ranks = range(first * size, (last + 1) * size)
        if not ranks or ranks[-1] >= old_world:
            raise InputError(f"lost '{word}' is outside of the old plan's ranks 0-{old_world - 1}")
        found.update(ranks)
    return frozenset(found)


def reshard(setting: Setting, old: Plan, new: Plan, *, origin: Ints, lost: Collection[int] = ()) -> Reshard:
    """Bytes that the ranks of ``new`` have to receive when the run has been under ``old``.

    Args:
        setting: model, workload and stack, and the new cluster, whose nodes say what is near.
        old, new: plans.
        origin: old rank of each new one, see ``origins``.
        lost: old ranks whose state is gone. Others that the new plan does not use can still send.
    """
    world = new.layout.world_size
    assert len(origin) == world, "one origin per rank of the new plan"
    alive = np.ones(old.layout.world_size, dtype=np.bool_)
    alive[sorted(lost)] = False
    totals = {name: np.zeros(world) for name in ("needed", "kept", "inside", "across", "lost")}
    by_label: dict[str, float] = defaultdict(float)
    near = _Neighbours.of(origin, setting.cluster.domain)
    for part in held_kinds(setting, old, new):
        elements = _elements(part, origin, alive, near)
        scale = part.weights.count * part.width
        for name, number in elements.items():
            totals[name] += scale * number
        by_label[part.weights.label] += scale * float((elements["inside"] + elements["across"]).sum())
    per_weight = setting.weight_bytes + setting.state_bytes
    return Reshard(**totals, moved_by_label=dict(by_label), model_bytes=per_weight * setting.graph.num_parameters)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldKind:
    """One kind (weights or state) of equal weights: what ranks held of it, and what they need.

    Attributes:
        held, wanted: by every old rank, by every new rank.
        width: bytes per element.
    """

    weights: Pipelined
    held: Rectangles
    wanted: Rectangles
    width: float


def held_kinds(setting: Setting, old: Plan, new: Plan) -> Iterator[HeldKind]:
    """Everything that the new plan needs."""
    before, after = places_of(old, setting.graph), places_of(new, setting.graph)
    width = {"weights": float(setting.weight_bytes), "state": float(setting.state_bytes)}
    for weights in pipelined_weights(setting.graph, setting.stack, old, new):
        for kind in KINDS:
            if kind == "weights" and _casts(setting, new):
                continue
            yield HeldKind(
                weights=weights,
                held=rectangles(weights, before, kind, new=False),
                wanted=rectangles(weights, after, kind, new=True),
                width=width[kind],
            )


def _casts(setting: Setting, plan: Plan) -> bool:
    """Whether weights are cast from the master copy, or shards of it, when they are used, and held nowhere else."""
    data, sharded = setting.stack.data, plan.zero_stage == 3 and plan.layout.dp_shard * plan.layout.cp > 1
    return (data.casts_weights or (data.shards_fp32 and sharded)) and setting.weight_bytes < 4


@dataclass(frozen=True, kw_only=True, slots=True)
class _Neighbours:
    """New ranks by domain: their old ranks [domains, members], -1 for none, and the domain of each rank [ranks]."""

    members: Ints
    domain: Ints

    @staticmethod
    def of(origin: Ints, size: int) -> _Neighbours:
        domains = -(-len(origin) // size)
        members = np.full(domains * size, -1, dtype=np.int64)
        members[: len(origin)] = origin
        return _Neighbours(members=members.reshape(domains, size), domain=np.arange(len(origin)) // size)


def _elements(part: HeldKind, origin: Ints, alive: NDArray[np.bool_], near: _Neighbours) -> dict[str, Ints]:
    """Elements of one weight that each new rank needs, and where they are, [ranks] each."""
    held, wanted = part.held, part.wanted
    needed = wanted.area
    zeros = np.zeros_like(needed)
    found = {"needed": needed, "kept": zeros, "inside": zeros, "across": zeros, "lost": zeros}
    who = np.flatnonzero(needed)
    wanted, source = wanted.at(who), origin[who]
    kept = np.where(source >= 0, wanted.overlap(held.at(source)), 0)
    members = near.members
    sends = (members >= 0) & alive[members] & (held.area[members] > 0)
    near_cells = held.at(members)
    first = _first_of_equals(near_cells, sends)
    rows = near.domain[who]
    reach = wanted.at(np.s_[:, None]).overlap(near_cells.at(rows))
    inside = np.where(first[rows], reach, 0).sum(axis=1) - kept
    anywhere = _covered(wanted, _distinct(held.at(alive & (held.area > 0))))
    parts = {
        "kept": kept, "inside": inside, "across": anywhere - inside - kept, "lost": needed[who] - anywhere,
    }  # fmt: skip
    for name, number in parts.items():
        found[name] = zeros.copy()
        found[name][who] = number
    return found


def _keys(cells: Rectangles) -> Ints:
    """A number for each cell of a partition, by its lower corner; empty cells must be left out."""
    return np.asarray(cells.first * (cells.high.max(initial=0) + 1) + cells.low)


def _first_of_equals(cells: Rectangles, valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Marks one of each set of equal valid cells in every row, [rows, cells]."""
    keys = np.where(valid, _keys(cells), -1)
    order = np.argsort(keys, axis=1, kind="stable")
    ordered = np.take_along_axis(keys, order, axis=1)
    distinct = np.ones_like(valid)
    distinct[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    marked = np.zeros_like(valid)
    np.put_along_axis(marked, order, distinct & (ordered >= 0), axis=1)
    return marked


def _distinct(cells: Rectangles) -> Rectangles:
    return cells.at(np.unique(_keys(cells), return_index=True)[1])


def _covered(wanted: Rectangles, cells: Rectangles) -> Ints:
    """Elements of each rectangle that disjoint cells cover, [wanted].

    Of every interval of units the cells are disjoint intervals of elements, whose measure up to a point is a lookup.
    """
    total = np.zeros_like(wanted.first)
    for unit in np.unique(cells.first):
        row = cells.at(cells.first == unit)
        row = row.at(np.argsort(row.low))
        before = np.concatenate([[0], np.cumsum(row.high - row.low)])
        units = np.minimum(wanted.last, row.last[0]) - np.maximum(wanted.first, unit)

        def up_to(point: Ints, row: Rectangles = row, before: Ints = before) -> Ints:
            index = np.searchsorted(row.low, point, side="right")
            last = np.maximum(index - 1, 0)
            over = np.where(index > 0, np.maximum(row.high[last] - point, 0), 0)
            return np.asarray(before[index] - over)

        total += np.maximum(units, 0) * (up_to(wanted.high) - up_to(wanted.low))
    return total
