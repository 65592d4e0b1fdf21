"""Tokens of a corpus in one flat file that is mapped into memory, with a header that says where they are from.

A folder holds ``tokens.bin`` (unsigned integers of 1, 2 or 4 bytes, little-endian), ``tokens.json`` (the header) and,
if text was not taken as bytes, ``tokenizer.json``. Documents follow one another in the order of the files, each ended
by the tokenizer's separator where it has one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autopar.errors import InputError
from autopar.runtime.data.tokenizer import Tokenizer
from costmodels.records import read_record, write_record

HEADER, TOKENS, TOKENIZER = "tokens.json", "tokens.bin", "tokenizer.json"
TOKENS_SCHEMA = 1
TYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file that tokens were made of, as it was then."""

    path: str
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What tokens.bin holds.

    Attributes:
        dtype: uint8, uint16 or uint32.
        num_tokens: in all.
        vocab_size: of the tokenizer; every token is below it.
        tokenizer: its name.
        tokenizer_sha256: of what defines it.
        sha256: of tokens.bin.
        files: in the order of the tokens.
    """

    dtype: str
    num_tokens: int
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    sha256: str
    files: tuple[SourceFile, ...]


def write_tokens(files: Sequence[Path], tokenizer: Tokenizer, folder: Path, tokenizer_file: Path | None) -> Header:
    """Tokenize files into a folder; nothing is done where it already holds the tokens of the very same files.

    The header is written last: a folder without one is not finished.

    Args:
        files: documents, in order.
        tokenizer: what turns them into tokens.
        folder: made if missing.
        tokenizer_file: of the tokenizer, to be kept beside the tokens.

    Raises:
        InputError: text that the tokenizer cannot read, or no token at all.
    """
    sources = tuple(_source(path) for path in files)
    if (folder / HEADER).exists():
        old = read_record(Header, folder / HEADER, TOKENS_SCHEMA)
        if old.files == sources and old.tokenizer_sha256 == tokenizer.sha256:
            return old
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEADER).unlink(missing_ok=True)
    dtype = _smallest_type(tokenizer.vocab_size)
    partial, digest, count = folder / f".{TOKENS}", hashlib.sha256(), 0
    with partial.open("wb") as stream:
        for path in files:
            pieces = tokenizer.encode_file(path)
            for piece in (*pieces, *_separators(tokenizer)):
                content = piece.astype(TYPES[dtype], copy=False).tobytes()
                stream.write(content)
                digest.update(content)
                count += piece.size
    if not count:
        raise InputError(f"{', '.join(map(str, files[:3]))}: no text in them")
    os.replace(partial, folder / TOKENS)
    if tokenizer_file is not None and tokenizer_file.resolve() != (folder / TOKENIZER).resolve():
        shutil.copyfile(tokenizer_file, folder / TOKENIZER)
    header = Header(
        dtype=dtype, num_tokens=count, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256, sha256=digest.hexdigest(), files=sources,
    )  # fmt: skip
    write_record(folder / HEADER, header, TOKENS_SCHEMA)
    return header


def read_header(folder: Path) -> Header:
    """Header of a folder of tokens, held to the size of tokens.bin.

    Raises:
        InputError: no tokens there, or a file that was cut short.
    """
    header = read_record(Header, folder / HEADER, TOKENS_SCHEMA)
    if header.dtype not in TYPES:
        raise InputError(f"{folder / HEADER}: dtype '{header.dtype}' is not one of {', '.join(TYPES)}")
    expected = header.num_tokens * np.dtype(TYPES[header.dtype]).itemsize
    found = (folder / TOKENS).stat().st_size if (folder / TOKENS).exists() else 0
    if found != expected:
        raise InputError(f"{folder / TOKENS} has {found} bytes, not the {expected} of its header: tokenize again")
    return header


def open_tokens(folder: Path) -> npt.NDArray[Any]:
    """All tokens, [num_tokens], mapped from the file. Raises InputError as ``read_header``."""
    return np.memmap(folder / TOKENS, dtype=TYPES[read_header(folder).dtype], mode="r")


def check_tokens(folder: Path) -> Header:
    """Read all of tokens.bin against the hash in its header. Raises InputError if it was altered."""
    header = read_header(folder)
    with (folder / TOKENS).open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != header.sha256:
        raise InputError(f"{folder / TOKENS} is not what its header was written for: tokenize again")
    return header


def _source(path: Path) -> SourceFile:
    status = path.stat()
    return SourceFile(path=str(path), num_bytes=status.st_size, modified_ns=status.st_mtime_ns)


def _separators(tokenizer: Tokenizer) -> tuple[npt.NDArray[Any], ...]:
    return () if tokenizer.separator is None else (np.asarray([tokenizer.separator]),)


def _smallest_type(vocab_size: int) -> str:
    return next(name for name, code in TYPES.items() if vocab_size <= np.iinfo(code).max + 1)
