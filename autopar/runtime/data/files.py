"""Which files ``--data`` means: a file, a folder, or a glob pattern."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from autopar.errors import InputError


def find_files(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Text files in a fixed order: patterns as given, what one of them finds sorted by path, none twice.

    A folder means every file below it whose path has no part that starts with a dot. ``**`` in a pattern goes through
    folders.

    Raises:
        InputError: a pattern finds nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [Path(name) for name in glob.glob(pattern, recursive=True)] if glob.has_magic(pattern) else []
        if Path(pattern).exists():
            paths = [Path(pattern)]
        files = sorted(file for path in paths for file in _files_of(path))
        if not files:
            raise InputError(f"--data {pattern}: no such file, folder or pattern with files in it")
        found |= dict.fromkeys(file.resolve() for file in files)
    return tuple(found)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inner = [file for file in path.rglob("*") if file.is_file()]
    return [file for file in inner if not any(part.startswith(".") for part in file.relative_to(path).parts)]
