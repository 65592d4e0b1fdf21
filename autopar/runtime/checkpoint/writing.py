"""This rank's part of a checkpoint: equal pieces are divided among the ranks that have them, so that all write."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autopar.runtime.checkpoint.contents import Content
from autopar.runtime.checkpoint.folder import Tick
from autopar.runtime.checkpoint.manifest import (
    BUFFER,
    StoredFile,
    StoredPiece,
    StoredTensor,
    check_cover,
    file_name,
    tensor_key,
)
from autopar.runtime.checkpoint.tensor_file import DTYPE_NAMES, TensorToWrite, write_tensors
from autopar.runtime.parallel.holdings import Piece

LEAST_SHARE = 256
"""Elements below which a piece is not divided: not worth an entry of the manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one rank writes.

    Attributes:
        tensors: with their pieces in this rank's file.
        values: of those pieces, by key in the file.
    """

    tensors: tuple[StoredTensor, ...]
    values: tuple[tuple[str, Tensor], ...]


def share_of(piece: Piece, copies: int, number: int) -> Piece | None:
    """The rows of a piece that copy ``number`` of ``copies`` writes; None if it writes nothing."""
    rows = piece.shape[0] if piece.shape else 1
    parts = min(copies, rows, math.prod(piece.shape) // LEAST_SHARE)
    if parts <= 1:
        return piece if number == 0 else None
    if number >= parts:
        return None
    begin, end = number * rows // parts, (number + 1) * rows // parts
    return Piece(
        offset=(piece.offset[0] + begin, *piece.offset[1:]),
        local=(piece.local[0] + begin, *piece.local[1:]),
        shape=(end - begin, *piece.shape[1:]),
    )


def part_of(contents: Sequence[Content], numbers: Sequence[tuple[int, int]], rank: int, *, copy: bool) -> Part:
    """What a rank writes.

    Args:
        contents: what it has.
        numbers: for each content, how many equal ones there are and which of them this is.
        rank: this rank.
        copy: take the values as they are now; else the model must not change until they are written.
    """
    count: Counter[tuple[str, str]] = Counter()
    tensors, values = [], []
    for content, (copies, number) in zip(contents, numbers, strict=True):
        stored = []
        for piece in content.pieces:
            # Buffers such as running means may differ between replicas: one rank's are kept whole.
            share = share_of(piece, copies, number) if content.kind != BUFFER else (None if number else piece)
            if share is None:
                continue
            at = count[content.name, content.kind]
            count[content.name, content.kind] += 1
            stored.append(StoredPiece(file=rank, number=at, offset=share.offset, shape=share.shape))
            values.append((tensor_key(content.name, content.kind, at), _snapshot(content.local, share, copy)))
        tensors.append(
            StoredTensor(
                name=content.name, kind=content.kind, dtype=content.dtype, shape=content.shape, pieces=tuple(stored)
            )
        )
    return Part(tensors=tuple(tensors), values=tuple(values))


def _snapshot(local: Tensor, share: Piece, copy: bool) -> Tensor:
    rows = local[tuple(slice(at, at + size) for at, size in zip(share.local, share.shape, strict=True))]
    return rows.to(device="cpu", copy=True, memory_format=torch.contiguous_format) if copy else rows


def write_part(folder: Path, rank: int, values: Sequence[tuple[str, Tensor]], tick: Tick | None) -> StoredFile:
    """Write a rank's file."""
    wanted = (
        TensorToWrite(key=key, dtype=DTYPE_NAMES[value.dtype], shape=tuple(value.shape), make=partial(_same, value))
        for key, value in values
    )
    return write_tensors(folder / file_name(rank), wanted, tick=tick)


def _same(value: Tensor) -> Tensor:
    return value


def merged(parts: Sequence[Sequence[StoredTensor]]) -> tuple[StoredTensor, ...]:
    """Tensors with the pieces of all ranks. Raises ValueError if something is missing or does not fit."""
    found: dict[tuple[str, str], list[StoredTensor]] = {}
    for part in parts:
        for tensor in part:
            found.setdefault((tensor.name, tensor.kind), []).append(tensor)
    whole = []
    for (name, kind), same in found.items():
        if len({(tensor.dtype, tensor.shape) for tensor in same}) > 1:
            raise ValueError(f"ranks disagree on type or shape of {kind} {name}")
        pieces = tuple(piece for tensor in same for piece in tensor.pieces)
        whole.append(StoredTensor(name=name, kind=kind, dtype=same[0].dtype, shape=same[0].shape, pieces=pieces))
    check_cover(whole)
    return tuple(whole)
