"""Writing safetensors files one tensor at a time, hashed on the way; reading is the library's.

The format (github.com/huggingface/safetensors): eight bytes of length, little-endian; a JSON header of that length,
name to dtype, shape and place; then the raw bytes. The library would take a copy of all tensors in memory and leave
the hash to a second reading.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autopar.runtime.checkpoint.folder import CHUNK_BYTES, Tick
from autopar.runtime.checkpoint.manifest import StoredFile

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorToWrite:
    """A tensor of a file, made when its turn comes.

    Attributes:
        key: its name in the file.
        dtype: as safetensors calls it.
        shape: its shape.
        make: gives its values, on any device.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_tensors(
    path: Path, tensors: Iterable[TensorToWrite], *, notes: Mapping[str, str] | None = None, tick: Tick | None = None
) -> StoredFile:
    """Write a new file and wait until it is on disk.

    Args:
        path: must not exist.
        tensors: what it is to hold.
        notes: free text for the header.
        tick: called as writing goes on.
    """
    # Widest types first, so that every tensor begins at a multiple of its element.
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    header: dict[str, object] = {"__metadata__": dict(notes)} if notes else {}
    end = 0
    for tensor in ordered:
        begin, end = end, end + math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        header[tensor.key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    found, size = hashlib.sha256(), 0
    with path.open("xb") as stream:
        begin_of_file = struct.pack("<Q", len(text)) + text
        size += stream.write(begin_of_file)
        found.update(begin_of_file)
        for tensor in ordered:
            data = _bytes_of(tensor)
            for begin in range(0, len(data), CHUNK_BYTES):
                part = data[begin : begin + CHUNK_BYTES]
                size += stream.write(part)
                found.update(part)
                if tick is not None:
                    tick()
        stream.flush()
        os.fsync(stream.fileno())
    return StoredFile(size=size, sha256=found.hexdigest())


def _bytes_of(wanted: TensorToWrite) -> Any:
    tensor = wanted.make()
    if tuple(tensor.shape) != wanted.shape or tensor.dtype != DTYPES[wanted.dtype]:
        raise ValueError(f"{wanted.key} is {tensor.dtype} {tuple(tensor.shape)}, not {wanted.dtype} {wanted.shape}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
