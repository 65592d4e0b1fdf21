"""Sequence length, microbatch and global batch of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.runs.degrees import Degrees
from autopar.runs.reading import Read, find_int
from autopar.runs.rows import RunRow


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Sequences per step and per pass; ``stated`` is False where the global batch was assumed."""

    global_batch: int
    micro_batch: int
    stated: bool


def read_seq_len(row: RunRow) -> Read[int]:
    """Tokens per sequence."""
    found = row.seq_len or find_int(row.words("notes"), r"seq(?:[-_ ]?len(?:gth)?)?[ =](\d{3,})")
    if found:
        return found, ()
    usual = 2048 if (row.year or 2024) < 2024 else 4096
    return usual, (f"sequence length not stated: {usual} assumed",)


def read_batch(row: RunRow, degrees: Degrees, seq_len: int) -> Read[Batch]:
    """Global batch and microbatch; the microbatch is made smaller where the batch does not divide.

    A missing global batch is what the stated accumulation gives, else 8 microbatches per pipeline stage.
    """
    notes, dp = row.words("notes"), degrees.dp
    accumulation = find_int(
        notes, r"grad(?:ient)?[-_ ]accum\w*[ =](\d+)", r"accumulation[-_]steps[ =](\d+)", r"\bga (\d+)", r"mbc=(\d+)"
    )
    micro = row.micro_batch or find_int(
        notes, r"local batch (\d+)", r"_mbs(\d+)", r"micro[-_ ]batch(?:[-_ ]size)?[ =](\d+)"
    )
    total = row.global_batch or find_int(notes, r"(?:global[-_ ]batch(?:[-_ ]size)?|gbs)[ =](\d+)")
    assumed: list[str] = []
    if micro is None:
        micro = max(1, total // (dp * accumulation)) if total and accumulation else 1
        assumed.append(f"microbatch not stated: {micro} assumed")
    stated = total is not None
    if total is None:
        passes = accumulation or (8 * degrees.pp if degrees.pp > 1 else 1)
        total = dp * micro * passes
        stated = accumulation is not None
        assumed.append(f"global batch not stated: {total} assumed ({passes} microbatches)")
    if total % dp:
        rounded = -(-total // dp) * dp
        assumed.append(f"dp={dp} does not divide the global batch of {total}: {rounded} assumed")
        total = rounded
    if (total // dp) % micro:
        fitting = math.gcd(total // dp, micro)
        assumed.append(f"microbatch {micro} does not divide {total // dp} sequences per rank: {fitting}")
        micro = fitting
    return Batch(global_batch=total, micro_batch=micro, stated=stated), tuple(assumed)
