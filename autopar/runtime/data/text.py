"""Real text without any download: the sources of the installed Python standard library, byte by byte."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autopar.errors import InputError

CORPUS_BYTES = 4_000_000
# A prime far from any power of two: neighbouring samples start far apart, and none repeats for a whole epoch.
STRIDE = 2_147_483_647


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Text as bytes, cut into samples of ``seq_len`` tokens and the one that follows them.

    Attributes:
        data: uint8.
        seq_len: tokens of an input sequence.
    """

    data: npt.NDArray[np.uint8]
    seq_len: int

    def rows(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Samples ``start`` to ``start + count`` of an endless sequence: [count, seq_len + 1]."""
        positions = self.data.size - self.seq_len
        offsets = [(index * STRIDE) % positions for index in range(start, start + count)]
        return np.stack([self.data[offset : offset + self.seq_len + 1] for offset in offsets]).astype(np.int64)

    def samples(self, start: int, count: int) -> Tensor:
        """``rows`` as a tensor on the CPU."""
        return torch.from_numpy(self.rows(start, count))

    def global_batch(self, step: int, global_batch: int) -> Tensor:
        """All sequences of a training step: int64 [global_batch, seq_len + 1], the same under every layout."""
        return self.samples(step * global_batch, global_batch)

    def share(self, step: int, global_batch: int, index: int, num_shares: int) -> Tensor:
        """One data parallel rank's equal share of ``global_batch(step)``."""
        size = global_batch // num_shares
        return self.samples(step * global_batch + index * size, size)


def standard_library(seq_len: int) -> Corpus:
    """The first 4 MB of the standard library's top modules in the order of their names.

    Raises:
        InputError: its sources are not installed, or a sequence is longer than they are.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    chunks, size = [], 0
    for path in sorted(folder.glob("*.py")):
        chunks.append(path.read_bytes())
        size += len(chunks[-1])
        if size >= CORPUS_BYTES:
            break
    if size <= seq_len:
        raise InputError(f"{folder} holds {size} bytes of sources: too few for sequences of {seq_len} tokens")
    return Corpus(data=np.frombuffer(b"".join(chunks)[:CORPUS_BYTES], dtype=np.uint8), seq_len=seq_len)
