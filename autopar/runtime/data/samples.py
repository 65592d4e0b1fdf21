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
        return max(0, (self.tokens.size - 1) // self.seq_len)

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


def split(
    tokens: npt.NDArray[Any], seq_len: int, *, validation: float, validation_sequences: int, seed: int
) -> tuple[Samples, Samples]:
    """Training samples and, from the end of the tokens, validation samples, which share no token.

    Args:
        tokens: of the corpus.
        seq_len: tokens of an input.
        validation: share of the tokens that is kept for validation.
        validation_sequences: least that validation must have; 0 if it is not needed.
        seed: of the order of training.

    Raises:
        InputError: a part is too short.
    """
    cut = tokens.size - (round(tokens.size * validation) if validation_sequences else 0)
    training = Samples(tokens=tokens[:cut], seq_len=seq_len, seed=seed)
    held_out = Samples(tokens=tokens[cut:], seq_len=seq_len)
    if not training.num_sequences:
        raise InputError(f"{cut} tokens of training text are too few for a sequence of {seq_len} and its next token")
    if held_out.num_sequences < validation_sequences:
        raise InputError(
            f"the last {tokens.size - cut} of {tokens.size} tokens, kept for validation, make "
            f"{held_out.num_sequences} sequences of {seq_len}, but one evaluation takes {validation_sequences}: use "
            "more text, a larger --validation, fewer --eval-batches, or --eval-every 0"
        )
    return training, held_out
