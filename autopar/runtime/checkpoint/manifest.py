"""What a checkpoint says of itself: ``manifest.json``, with its own hash beside it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST_SCHEMA = 1
MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.sha256"
WEIGHT, BUFFER = "weight", "buffer"


class Damaged(Exception):
    """A checkpoint that is not as it was written. The message says what is wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPiece:
    """A rectangular part of a tensor in a file.

    Attributes:
        file: number of the rank that wrote it.
        number: among the pieces of this tensor in that file.
        offset: where it begins in the whole tensor.
        shape: its size.
    """

    file: int
    number: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A whole tensor in pieces.

    Attributes:
        name: of the parameter or buffer in the whole model.
        kind: ``weight``, ``buffer``, or the optimizer's word for a state of a parameter (``exp_avg``).
        dtype: as safetensors calls it (``F32``).
        shape: of the whole.
        pieces: cover every element once.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]

    def key(self, piece: StoredPiece) -> str:
        """Name of a piece in its file."""
        return tensor_key(self.name, self.kind, piece.number)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """Size in bytes and hash of a rank's file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scalar:
    """A number that an optimizer keeps per parameter; ``dtype`` is empty if it is no tensor."""

    value: float | int | bool
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A checkpoint.

    Attributes:
        step: steps that were made before it.
        plan: slug of the plan that it was written under.
        model: name of the model, empty if it has none.
        optimizer: class of the update rule, empty if none was saved.
        date: when it was written, ISO 8601.
        files: by number of the rank that wrote it.
        tensors: every tensor of the model and the optimizer.
        scalars: parameter to the optimizer's numbers for it (``step``).
        state: the caller's.
    """

    step: int
    plan: str
    model: str
    optimizer: str
    date: str
    files: tuple[StoredFile, ...]
    tensors: tuple[StoredTensor, ...]
    scalars: Mapping[str, Mapping[str, Scalar]]
    state: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of all files of tensors."""
        return sum(file.size for file in self.files)


def file_name(rank: int) -> str:
    """Of the tensors that a rank wrote."""
    return f"rank-{rank:05d}.safetensors"


def tensor_key(name: str, kind: str, number: int) -> str:
    """Of a piece in a file: weights under the name of the parameter, all else with its kind behind it."""
    return name + (f":{kind}" if kind != WEIGHT else "") + (f":{number}" if number else "")


def check_cover(tensors: Iterable[StoredTensor]) -> None:
    """Raise ValueError if the pieces of a tensor are not as many elements as it has."""
    for tensor in tensors:
        held, wanted = sum(math.prod(piece.shape) for piece in tensor.pieces), math.prod(tensor.shape)
        if held != wanted:
            raise ValueError(f"the ranks hold {held} of the {wanted} elements of {tensor.kind} {tensor.name}")


def write_manifest(folder: Path, manifest: Manifest) -> tuple[Path, Path]:
    """Write the manifest and its hash into a directory; the files that were written."""
    plain = {
        "schema_version": MANIFEST_SCHEMA,
        "step": manifest.step,
        "plan": manifest.plan,
        "model": manifest.model,
        "optimizer": manifest.optimizer,
        "date": manifest.date,
        "files": [
            {"name": file_name(rank), "size": file.size, "sha256": file.sha256}
            for rank, file in enumerate(manifest.files)
        ],
        "tensors": [
            {"name": tensor.name, "kind": tensor.kind, "dtype": tensor.dtype, "shape": tensor.shape,
             "pieces": [(piece.file, piece.number, piece.offset, piece.shape) for piece in tensor.pieces]}
            for tensor in manifest.tensors
        ],
        "scalars": {
            name: {key: {"value": scalar.value, "dtype": scalar.dtype} for key, scalar in scalars.items()}
            for name, scalars in manifest.scalars.items()
        },
        "state": manifest.state,
    }  # fmt: skip
    content = json.dumps(plain).encode()
    path, hash_path = folder / MANIFEST, folder / MANIFEST_HASH
    path.write_bytes(content)
    hash_path.write_text(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n", encoding="ascii")
    return path, hash_path


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint. Raises Damaged."""
    try:
        content = (folder / MANIFEST).read_bytes()
        wanted = (folder / MANIFEST_HASH).read_bytes().split(b" ")[0]
    except OSError as error:
        raise Damaged(f"{Path(error.filename or MANIFEST).name} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest().encode() != wanted:
        raise Damaged(f"{MANIFEST} is not the one that was written: its hash is not that of {MANIFEST_HASH}")
    try:
        return _from_plain(json.loads(content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} is no manifest: {error!r}") from error


def _from_plain(plain: dict[str, Any]) -> Manifest:
    if plain["schema_version"] != MANIFEST_SCHEMA:
        raise Damaged(f"{MANIFEST} has schema_version {plain['schema_version']}; this program reads {MANIFEST_SCHEMA}")
    return Manifest(
        step=plain["step"], plan=plain["plan"], model=plain["model"], optimizer=plain["optimizer"], date=plain["date"],
        files=tuple(StoredFile(size=file["size"], sha256=file["sha256"]) for file in plain["files"]),
        tensors=tuple(
            StoredTensor(
                name=tensor["name"], kind=tensor["kind"], dtype=tensor["dtype"], shape=tuple(tensor["shape"]),
                pieces=tuple(
                    StoredPiece(file=file, number=number, offset=tuple(offset), shape=tuple(shape))
                    for file, number, offset, shape in tensor["pieces"]
                ),
            )
            for tensor in plain["tensors"]
        ),
        scalars={
            name: {key: Scalar(value=scalar["value"], dtype=scalar["dtype"]) for key, scalar in scalars.items()}
            for name, scalars in plain["scalars"].items()
        },
        state=plain["state"],
    )  # fmt: skip
