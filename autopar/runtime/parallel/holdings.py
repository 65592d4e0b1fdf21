"""What each rank holds of the whole model: rectangular pieces of parameters, and how many ranks hold the same.

A parameter is divided dimension by dimension. Every division cuts what the ones before left into equal parts, the
last ones smaller or empty where the size does not divide (as ``torch.chunk``). Along one dimension a rank therefore
holds *runs*, ranges of the whole in the order in which they lie in its local tensor; its pieces are the product of the
runs of all dimensions.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.runtime.private import is_strided_shard

Runs = tuple[tuple[int, int], ...]
"""Ranges [start, stop) along one dimension of a whole tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A rectangular part of a tensor.

    Attributes:
        offset: where it begins in the whole tensor.
        local: where it begins in this rank's local tensor.
        shape: its size.
    """

    offset: tuple[int, ...]
    local: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """What a rank holds of one parameter.

    Attributes:
        name: of the parameter in the whole model; a shared parameter has its first name.
        shape: of the whole parameter.
        pieces: together exactly this rank's local tensor; none if that is empty.
        copies: how many equal holdings of this parameter there are on all ranks, this one included.
        first: this is the first of them, in the order of ranks.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    copies: int = 1
    first: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One division: ``dim`` into ``parts`` parts, of which this rank has number ``index``."""

    dim: int
    parts: int
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeModel:
    """Parameters of a module before it is divided.

    Attributes:
        shapes: name to shape, shared parameters once.
        first_names: every name of a parameter to its first one.
    """

    shapes: Mapping[str, tuple[int, ...]]
    first_names: Mapping[str, str]


def whole_model(module: nn.Module) -> WholeModel:
    """Names and shapes of a module's parameters."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    names = {name: first[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}
    return WholeModel(
        shapes={name: tuple(parameter.shape) for name, parameter in module.named_parameters()}, first_names=names
    )


def cuts_of(tensor: Tensor) -> tuple[Cut, ...]:
    """The divisions of a DTensor in the order in which they were made; none of any other tensor.

    ``fully_shard`` divides what tensor parallelism left, though its axis comes first in the mesh; DTensor calls that a
    strided shard.
    """
    if not isinstance(tensor, DTensor):
        return ()
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    plain: list[Cut] = []
    strided: list[Cut] = []
    for axis, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise ValueError(f"a tensor placed as {tensor.placements} is no parameter")
        if is_strided_shard(placement) or placement.is_shard():
            cut = Cut(dim=placement.dim, parts=mesh.size(axis), index=coordinate[axis])  # type: ignore[attr-defined]
            (strided if is_strided_shard(placement) else plain).append(cut)
    return (*plain, *reversed(strided))


def cuts_by_name(module: nn.Module) -> dict[str, tuple[Cut, ...]]:
    """Divisions of a module's parameters. To be kept before DDP, which turns DTensors into their local tensors."""
    return {name: cuts_of(parameter) for name, parameter in module.named_parameters()}


def cut_runs(runs: Runs, cut: Cut) -> Runs:
    """Part ``cut.index`` of ``cut.parts`` of some runs, as ``torch.chunk`` divides."""
    total = sum(stop - start for start, stop in runs)
    size = math.ceil(total / cut.parts)
    begin, end = min(cut.index * size, total), min((cut.index + 1) * size, total)
    found, at = [], 0
    for start, stop in runs:
        low, high = max(begin - at, 0), min(end - at, stop - start)
        if low < high:
            found.append((start + low, start + high))
        at += stop - start
    return tuple(found)


def pieces_of(shape: Sequence[int], cuts: Iterable[Cut], rows: Runs | None = None) -> tuple[Piece, ...]:
    """Pieces of a tensor of ``shape`` that are left after some cuts.

    Args:
        shape: of the whole tensor.
        cuts: in the order in which they are made.
        rows: the order in which the rows (dim 0) were put before they were divided; as they are if None.
    """
    runs: list[Runs] = [((0, size),) if size else () for size in shape]
    if rows is not None:
        runs[0] = rows
    for cut in cuts:
        runs[cut.dim] = cut_runs(runs[cut.dim], cut)
    return tuple(
        Piece(
            offset=tuple(start for (start, _), _ in corner),
            local=tuple(local for _, local in corner),
            shape=tuple(stop - start for (start, stop), _ in corner),
        )
        for corner in itertools.product(*(_placed(_joined(along)) for along in runs))
    )


def _joined(runs: Runs) -> Runs:
    """Runs with neighbours that continue each other made one."""
    found: list[tuple[int, int]] = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def _placed(runs: Runs) -> list[tuple[tuple[int, int], int]]:
    """Runs with their places in the local tensor."""
    ends = itertools.accumulate((stop - start for start, stop in runs), initial=0)
    return list(zip(runs, ends, strict=False))


def find_holdings(
    whole: WholeModel,
    owned: Iterable[tuple[str, nn.Parameter]],
    divided: Mapping[str, tuple[Cut, ...]],
    *,
    rows: Mapping[str, Runs] | None = None,
) -> tuple[Holding, ...]:
    """What this rank holds, in the order of ``owned``. Every rank calls it at the same time: they compare.

    Args:
        whole: the model before it was divided.
        owned: this rank's parameters, wrapped, under their names in the whole model.
        divided: cuts of those parameters that were DTensors before they were wrapped (``cuts_by_name``).
        rows: the order in which rows of some parameters were put before they were divided, as runs of the whole's.
    """
    mine = []
    for name, parameter in owned:
        first_name = whole.first_names[name]
        cuts = cuts_of(parameter) if isinstance(parameter, DTensor) else divided.get(name, ())
        shape = whole.shapes[first_name]
        pieces = pieces_of(shape, cuts, (rows or {}).get(name))
        mine.append(Holding(name=first_name, shape=shape, pieces=pieces))
    return _counted(mine)


def _counted(mine: Sequence[Holding]) -> tuple[Holding, ...]:
    """Holdings with the number of their copies on all ranks."""
    keys = [_key(holding) for holding in mine]
    # A fake process group, with which layouts are tried without their ranks, exchanges nothing.
    world = dist.get_world_size() if dist.is_initialized() and dist.get_backend() != "fake" else 1
    rank, everyone = (dist.get_rank(), [keys] * world) if world > 1 else (0, [keys])
    if world > 1:
        dist.all_gather_object(everyone, keys)
    return tuple(
        Holding(name=h.name, shape=h.shape, pieces=h.pieces, copies=copies, first=number == 0)
        for h, (copies, number) in zip(mine, number_copies(everyone, rank), strict=True)
    )


def number_copies(everyone: Sequence[Sequence[bytes]], rank: int) -> list[tuple[int, int]]:
    """For each key of a rank, how many equal ones all ranks have, and how many of them come before it.

    Args:
        everyone: the keys of every rank.
        rank: whose keys are asked about.
    """
    copies = Counter(itertools.chain.from_iterable(everyone))
    before = Counter(itertools.chain.from_iterable(everyone[:rank]))
    found = []
    for key in everyone[rank]:
        found.append((copies[key], before[key]))
        before[key] += 1
    return found


def _key(holding: Holding) -> bytes:
    """Equal for equal pieces of the same parameter, on any rank."""
    where = [(piece.offset, piece.shape) for piece in holding.pieces]
    return hashlib.blake2b(repr((holding.name, where)).encode(), digest_size=12).digest()
