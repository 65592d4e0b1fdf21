"""What a job trains on, from the folder of tokens that it names or from the text that every installation has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autopar.runtime.data.samples import Samples, split
from autopar.runtime.data.text import standard_library
from autopar.runtime.data.tokens import open_tokens

Rows = Callable[[int, int], npt.NDArray[np.int64]]
"""From a global index and a number to that many samples, [number, seq_len + 1]."""


def measured_rows(tokens: str, seq_len: int, seed: int) -> Rows:
    """Samples for measuring: of a folder of tokens, or of the standard library's sources.

    Raises:
        InputError: no tokens there, or too few.
    """
    if not tokens:
        return standard_library(seq_len).rows
    training, _ = split(open_tokens(Path(tokens)), seq_len, validation=0.0, validation_sequences=0, seed=seed)
    return training.rows


def training_samples(
    tokens: str, seq_len: int, *, validation: float, validation_sequences: int, seed: int
) -> tuple[Samples, Samples]:
    """Samples for training, and those for validation (see ``split``), of the same two sources.

    Raises:
        InputError: no tokens there, or too few.
    """
    return split(
        _all_tokens(tokens), seq_len, validation=validation, validation_sequences=validation_sequences, seed=seed
    )


def _all_tokens(tokens: str) -> npt.NDArray[Any]:
    return open_tokens(Path(tokens)) if tokens else standard_library(1).data
