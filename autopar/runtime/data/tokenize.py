"""From what a user names as text to a folder of tokens. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autopar.errors import InputError
from autopar.runtime.data.files import find_files
from autopar.runtime.data.tokenizer import load_tokenizer, tokenizer_file, train_tokenizer
from autopar.runtime.data.tokens import HEADER, TOKENIZER, Header, check_tokens, write_tokens


def tokenize_files(patterns: Sequence[str], tokenizer: str, vocab_size: int | None, folder: Path) -> Header:
    """Tokenize text into a folder, which is left as it is if it already holds just that.

    Args:
        patterns: files, folders and globs.
        tokenizer: tokenizer.json or its folder; empty for bytes.
        vocab_size: learn a tokenizer of this size instead, kept in the folder.
        folder: for tokens and tokenizer.

    Raises:
        InputError: contradicting arguments, or as ``find_files``, ``load_tokenizer`` and ``write_tokens``.
    """
    if tokenizer and vocab_size is not None:
        raise InputError(f"--tokenizer {tokenizer} is a tokenizer already: leave out --vocab to use it")
    files = find_files(patterns)
    if vocab_size is not None:
        tokenizer = str(folder / TOKENIZER)
        train_tokenizer(files, vocab_size, folder / TOKENIZER)
    found = load_tokenizer(tokenizer)
    return write_tokens(files, found, folder, tokenizer_file(tokenizer) if tokenizer else None)


def find_tokens(data: Sequence[str], tokenizer: str, cache: Path) -> Path:
    """The folder of tokens that ``data`` is, or ``cache`` with the tokens of the text that it is.

    Raises:
        InputError: tokens that were altered, tokens of another tokenizer, or as ``tokenize_files``.
    """
    folders = [Path(name) for name in data if (Path(name) / HEADER).is_file()]
    if not folders:
        tokenize_files(data, tokenizer, None, cache)
        return cache
    if len(data) > 1:
        raise InputError(f"--data {folders[0]} holds tokens: name that folder alone, or text files")
    header = check_tokens(folders[0])
    if tokenizer and load_tokenizer(tokenizer).sha256 != header.tokenizer_sha256:
        raise InputError(f"--data {folders[0]} was made by another tokenizer than {tokenizer}: leave out --tokenizer")
    return folders[0]
