"""Tensors out of the pieces of a checkpoint: only the slices that are wanted are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from autopar.runtime.checkpoint.folder import Tick
from autopar.runtime.checkpoint.manifest import Damaged, Manifest, StoredTensor, file_name
from autopar.runtime.checkpoint.tensor_file import DTYPES
from autopar.runtime.parallel.holdings import Piece, pieces_of


class Reader:
    """Reads tensors of one checkpoint. Its files must have been checked before.

    Args:
        path: directory of the checkpoint.
        manifest: of it.
        tick: called as reading goes on.
    """

    def __init__(self, path: Path, manifest: Manifest, tick: Tick | None = None) -> None:
        self._path, self._tick = path, tick
        self._tensors = {(tensor.name, tensor.kind): tensor for tensor in manifest.tensors}
        self._files: dict[int, Any] = {}

    def find(self, name: str, kind: str) -> StoredTensor | None:
        """A tensor of the checkpoint."""
        return self._tensors.get((name, kind))

    def fill(self, tensor: StoredTensor, pieces: Iterable[Piece], local: Tensor) -> None:
        """Set the values of some pieces of a tensor in ``local``, this rank's part of it. Raises Damaged."""
        for piece in pieces:
            missing = math.prod(piece.shape)
            for stored in tensor.pieces:
                common = [
                    (max(here, there), min(here + size, there + length))
                    for here, size, there, length in zip(
                        piece.offset, piece.shape, stored.offset, stored.shape, strict=True
                    )
                ]
                if any(low >= high for low, high in common):
                    continue
                source = tuple(slice(a - at, b - at) for (a, b), at in zip(common, stored.offset, strict=True))
                places = zip(common, piece.local, piece.offset, strict=True)
                target = tuple(slice(to + a - at, to + b - at) for (a, b), to, at in places)
                local[target] = self._open(stored.file).get_slice(tensor.key(stored))[source].to(local.device)
                missing -= math.prod(high - low for low, high in common)
                if self._tick is not None:
                    self._tick()
            if missing:
                raise Damaged(f"{tensor.kind} {tensor.name} is not whole: {missing} elements are missing")

    def whole(self, tensor: StoredTensor) -> Tensor:
        """A whole tensor, on the CPU."""
        found = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        self.fill(tensor, pieces_of(tensor.shape, ()), found)
        return found

    def random_states(self, rank: int, keys: Iterable[str]) -> dict[str, Tensor]:
        """Those of some states of random generators that a rank saved."""
        file = self._open(rank)
        present = set(file.keys())
        return {key: file.get_tensor(key) for key in keys if key in present}

    def _open(self, file: int) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self._path / file_name(file), framework="pt")
        return self._files[file]
