"""Checkpoints without a model or other ranks: what a folder holds, and whole weights in one file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from autopar.errors import InputError
from autopar.runtime.checkpoint.folder import UNFINISHED, Tick, check_files, saved_steps, step_path
from autopar.runtime.checkpoint.manifest import BUFFER, WEIGHT, Damaged, Manifest, read_manifest
from autopar.runtime.checkpoint.reading import Reader
from autopar.runtime.checkpoint.tensor_file import TensorToWrite, write_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One checkpoint of a folder.

    Attributes:
        step: steps made before it.
        num_bytes: of its files as they are.
        damage: what is wrong with it; empty if it is whole.
        model, plan, optimizer, date: as in ``Manifest``; empty if that cannot be read.
        num_files: of tensors, one per rank that wrote it.
    """

    step: int
    num_bytes: int
    damage: str
    model: str = ""
    plan: str = ""
    optimizer: str = ""
    date: str = ""
    num_files: int = 0


def summaries(folder: Path, *, contents: bool = True, tick: Tick | None = None) -> list[Summary]:
    """All checkpoints of a folder, by step.

    Args:
        folder: as given to ``Checkpoints``.
        contents: read and hash all files; else only their sizes are compared.
        tick: called as reading goes on.

    Raises:
        InputError: there is no checkpoint.
    """
    return [_summary(step, step_path(folder, step), contents, tick) for step in _steps(folder)]


def _steps(folder: Path) -> tuple[int, ...]:
    steps = saved_steps(folder)
    if not steps:
        raise InputError(f"{folder} holds no checkpoints: name the folder that has directories such as step-00000100")
    return steps


def _summary(step: int, path: Path, contents: bool, tick: Tick | None) -> Summary:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    try:
        manifest = read_manifest(path)
    except Damaged as damaged:
        return Summary(step=step, num_bytes=size, damage=str(damaged))
    damage = ""
    try:
        check_files(path, manifest, range(len(manifest.files)), contents=contents, tick=tick)
    except Damaged as damaged:
        damage = str(damaged)
    return Summary(
        step=step, num_bytes=size, damage=damage, model=manifest.model, plan=manifest.plan,
        optimizer=manifest.optimizer, date=manifest.date, num_files=len(manifest.files),
    )  # fmt: skip


def export_weights(folder: Path, out: Path, *, step: int | None = None, tick: Tick | None = None) -> Manifest:
    """Write the weights and buffers of a checkpoint, whole, to one safetensors file.

    Names and types are those of the module; a parameter that is shared has its first name alone. One tensor at a time
    is in memory.

    Args:
        folder: as given to ``Checkpoints``.
        out: file to write; one that is there is replaced when the new one is whole.
        step: which checkpoint; the newest if None.
        tick: called as reading and writing go on.

    Returns:
        The manifest of what was exported.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    steps = _steps(folder)
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise InputError(f"{folder} has no checkpoint of step {chosen}; it has {', '.join(map(str, steps))}")
    path = step_path(folder, chosen)
    try:
        manifest = read_manifest(path)
        check_files(path, manifest, range(len(manifest.files)), tick=tick)
        _write_whole(Reader(path, manifest, tick), manifest, out, tick)
    except (Damaged, SafetensorError) as damaged:
        others = ", ".join(str(other) for other in steps if other != chosen)
        hint = f"; --step takes one of the others: {others}" if others else ""
        raise InputError(f"{path} cannot be exported: {damaged}{hint}") from damaged
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    return manifest


def _write_whole(reader: Reader, manifest: Manifest, out: Path, tick: Tick | None) -> None:
    tensors = (
        TensorToWrite(key=tensor.name, dtype=tensor.dtype, shape=tensor.shape, make=partial(reader.whole, tensor))
        for tensor in manifest.tensors
        if tensor.kind in (WEIGHT, BUFFER)
    )
    notes = {"format": "pt", "step": str(manifest.step), "model": manifest.model}
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{UNFINISHED}{out.name}")
    unfinished.unlink(missing_ok=True)
    try:
        write_tensors(unfinished, tensors, notes=notes, tick=tick)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
