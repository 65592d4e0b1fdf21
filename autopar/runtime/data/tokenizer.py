"""Text to token numbers: bytes as they are, or a tokenizer.json of the ``tokenizers`` package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from autopar.errors import InputError

Tokens = npt.NDArray[Any]
NUM_BYTES = 256
CHUNK_BYTES = 8 * 2**20
MISSING = "tokenizer.json needs the package tokenizers: pip install 'autopar[tokenizers]', or leave out --tokenizer"
END_OF_TEXT = "<|endoftext|>"
# What published tokenizers call the token between documents.
SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """Text to tokens."""

    @property
    def name(self) -> str:
        """``bytes`` or ``tokenizer.json``."""

    @property
    def sha256(self) -> str:
        """Of what defines it."""

    @property
    def vocab_size(self) -> int:
        """Tokens are below it."""

    @property
    def separator(self) -> int | None:
        """Token that ends every document; None without one."""

    def encode_file(self, path: Path) -> Iterator[Tokens]:
        """Tokens of a file, piece by piece. Raises InputError for text that it cannot read."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Every byte is a token."""

    name: str = "bytes"
    sha256: str = hashlib.sha256(b"bytes").hexdigest()
    vocab_size: int = NUM_BYTES
    separator: int | None = None

    def encode_file(self, path: Path) -> Iterator[Tokens]:
        """See ``Tokenizer``."""
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield np.frombuffer(chunk, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Json:
    """A tokenizer.json. Long files are cut at ends of lines, so that no piece needs much memory.

    Attributes:
        inner: ``tokenizers.Tokenizer``.
    """

    inner: Any
    sha256: str
    vocab_size: int
    separator: int | None
    name: str = "tokenizer.json"

    def encode_file(self, path: Path) -> Iterator[Tokens]:
        """See ``Tokenizer``."""
        with path.open("rb") as stream:
            while lines := stream.readlines(CHUNK_BYTES):
                try:
                    text = b"".join(lines).decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}: not UTF-8 text ({error}): convert it, or use bytes") from None
                yield np.asarray(self.inner.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json or its folder; bytes for an empty path.

    Raises:
        InputError: no such file, one that is not a tokenizer, or the package ``tokenizers`` is missing.
    """
    if not path:
        return Bytes()
    file = tokenizer_file(path)
    if not file.is_file():
        raise InputError(f"tokenizer {path}: no such file; it is a tokenizer.json or its folder")
    content = file.read_bytes()
    try:
        inner = _package().Tokenizer.from_buffer(content)
    except ValueError as error:
        raise InputError(f"tokenizer {file}: not a tokenizer.json: {error}") from None
    return Json(
        inner=inner,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=_highest(inner) + 1,
        separator=next((found for s in SEPARATORS if (found := inner.token_to_id(s)) is not None), None),
    )


def tokenizer_file(path: str) -> Path:
    """The tokenizer.json that a path means: itself, or the one in that folder."""
    return Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)


def train_tokenizer(files: Sequence[Path], vocab_size: int, path: Path) -> None:
    """Learn a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) from files and write its tokenizer.json.

    Raises:
        InputError: ``vocab_size`` has no room for the 256 bytes and the separator, or ``tokenizers`` is missing.
    """
    least = NUM_BYTES + 1
    if vocab_size < least:
        raise InputError(f"--vocab {vocab_size}: the bytes and {END_OF_TEXT} alone take {least}; use more")
    package = _package()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train([str(file) for file in files], trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def _highest(inner: Any) -> int:
    # Numbers of a vocabulary may have gaps: what a model needs is the highest.
    numbers: list[int] = list(inner.get_vocab(with_added_tokens=True).values())
    return max(numbers, default=-1)


def _package() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise InputError(MISSING) from None
    return tokenizers
