"""Samples of a corpus by their global index, so that every layout sees the same batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autopar.errors import InputError
from autopar.runtime.data.order import permuted


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """A stretch of tokens cut into sequences of ``seq_len``, each with the token that follows it.

    Sequence k is tokens k * seq_len to (k + 1) * seq_len, both included; what is left over at the end is dropped.
    Sample i of the endless order is sequence ``i mod n`` of epoch ``i // n``, each epoch in a permutation of its own;
    without a seed, the sequences in their order again and again.

    Attributes:
        tokens: [num_tokens], unsigned.
        seq_len: tokens of an input.
        seed: of the permutations; None keeps the order.
    """

    tokens: npt.NDArray[Any]
    seq_len: int
    seed: int | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences in an epoch."""
        return num_sequences(self.tokens.size, self.seq_len)

    def rows(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Samples ``start`` to ``start + count``: [count, seq_len + 1]."""
        sequences = self.sequences(start, count)
        return np.stack([self.tokens[k * self.seq_len : (k + 1) * self.seq_len + 1] for k in sequences]).astype(
            np.int64
        )

    def sequences(self, start: int, count: int) -> list[int]:
        """Which sequences these samples are."""
        places = np.arange(start, start + count, dtype=np.int64)
        epochs, inside = places // self.num_sequences, places % self.num_sequences
        if self.seed is None:
            return [int(k) for k in inside]
        found = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = permuted(inside[here], self.num_sequences, seed=self.seed, epoch=int(epoch))
        return [int(k) for k in found]


def num_sequences(num_tokens: int, seq_len: int) -> int:
    """Sequences of ``seq_len`` tokens, each with the one that follows it; neighbours share that one."""
    return max(0, (num_tokens - 1) // seq_len)


def cut_of(num_tokens: int, seq_len: int, *, validation: float, validation_sequences: int) -> int:
    """How many tokens are for training; the rest are for validation.

    Args:
        num_tokens: of the corpus.
        seq_len: tokens of an input.
        validation: share of the tokens that is kept for validation.
        validation_sequences: least that validation must have; 0 if it is not needed.

    Raises:
        InputError: a part is too short.
    """
    cut = num_tokens - (round(num_tokens * validation) if validation_sequences else 0)
    if not num_sequences(cut, seq_len):
        raise InputError(f"{cut} tokens of training text are too few for a sequence of {seq_len} and its next token")
    found = num_sequences(num_tokens - cut, seq_len)
    if found < validation_sequences:
        raise InputError(
            f"the last {num_tokens - cut} of {num_tokens} tokens, kept for validation, make {found} sequences of "
            f"{seq_len}, but one evaluation takes {validation_sequences}: use more text, a larger --validation, fewer "
            "--eval-batches, or --eval-every 0"
        )
    return cut


def split(
    tokens: npt.NDArray[Any], seq_len: int, *, validation: float, validation_sequences: int, seed: int
) -> tuple[Samples, Samples]:
    """Training samples in an order that ``seed`` gives and, from the end of the tokens, validation samples in order.

    They share no token. Other arguments and errors as of ``cut_of``.
    """
    cut = cut_of(tokens.size, seq_len, validation=validation, validation_sequences=validation_sequences)
    return (
        Samples(tokens=tokens[:cut], seq_len=seq_len, seed=seed),
        Samples(tokens=tokens[cut:], seq_len=seq_len),
    )
