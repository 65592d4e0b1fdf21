"""Directories of checkpoints: made under another name and renamed when whole, old ones removed, damage found."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from autopar.runtime.checkpoint.manifest import Damaged, Manifest, file_name, read_manifest

UNFINISHED = ".tmp-"
CHUNK_BYTES = 16 * 2**20
_STEP = re.compile(r"step-(\d{8,})")
Tick = Callable[[], None]


def step_path(folder: Path, step: int) -> Path:
    """Directory of a step's checkpoint."""
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> tuple[int, ...]:
    """Steps that have a directory, whatever its state, in order."""
    if not folder.is_dir():
        return ()
    matches = (_STEP.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return tuple(sorted(int(match[1]) for match in matches if match))


def remove_unfinished(folder: Path) -> None:
    """Remove what saves that never ended have left."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)


def begin(folder: Path, step: int) -> Path:
    """An empty directory for a checkpoint in the making; leftovers of others are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    path = unfinished_path(folder, step)
    path.mkdir()
    return path


def unfinished_path(folder: Path, step: int) -> Path:
    """Directory of a checkpoint in the making."""
    return folder / f"{UNFINISHED}{step_path(folder, step).name}"


def finish(folder: Path, step: int) -> None:
    """Give a whole checkpoint its name. One of the same step is replaced."""
    made, path = unfinished_path(folder, step), step_path(folder, step)
    flush_directory(made)
    if path.exists():
        replaced = made.with_name(f"{made.name}.replaced")
        path.rename(replaced)
        made.rename(path)
        shutil.rmtree(replaced)
    else:
        made.rename(path)
    flush_directory(folder)


def flush_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_file(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def remove_old(folder: Path, step: int, keep: int) -> None:
    """Keep the checkpoint of ``step`` and the newest whole ones before it, ``keep`` in all; remove what is older.

    Later ones, which a run that goes on from an earlier step may find, are left until their step comes again.
    """
    kept = 0
    for other in reversed([found for found in saved_steps(folder) if found <= step]):
        if kept >= keep:
            shutil.rmtree(step_path(folder, other))
        elif looks_whole(step_path(folder, other)):
            kept += 1


def looks_whole(path: Path) -> bool:
    """Whether the manifest is as written and all files have their sizes; contents are not read."""
    try:
        manifest = read_manifest(path)
        check_files(path, manifest, range(len(manifest.files)), contents=False)
    except Damaged:
        return False
    return True


def check_files(
    path: Path, manifest: Manifest, files: Iterable[int], *, contents: bool = True, tick: Tick | None = None
) -> None:
    """Compare some files of a checkpoint with its manifest.

    Args:
        path: the checkpoint's directory.
        manifest: of that checkpoint.
        files: numbers of the files to look at.
        contents: compare their hashes, not only their sizes.
        tick: called as reading goes on.

    Raises:
        Damaged: with everything that is wrong.
    """
    found = []
    for number in files:
        name, wanted = file_name(number), manifest.files[number]
        try:
            size = (path / name).stat().st_size
            if size != wanted.size:
                found.append(f"{name} has {size} bytes instead of {wanted.size}")
            elif contents and file_hash(path / name, tick) != wanted.sha256:
                found.append(f"{name} was altered: its hash is not that of the manifest")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    if found:
        raise Damaged("; ".join(found))


def file_hash(path: Path, tick: Tick | None = None) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            found.update(chunk)
            if tick is not None:
                tick()
    return found.hexdigest()
