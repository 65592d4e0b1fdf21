"""What the user wants trained: batch, sequence, precision, optimizer. The planner never changes it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autopar.errors import InputError


class Precision(StrEnum):
    """Type of forward and backward.

    FP32, FP16 and BF16 are the type of weights, activations and products alike. The narrow ones keep weights and
    activations in bf16 and multiply in the linear layers of the blocks only: FP8 with one scale per tensor, FP8_BLOCK
    one per 128 x 128 weights and 128 activations, MXFP8 one per 32 values, NVFP4 (4 bit) one per 16. Attention and
    the LM head stay in bf16.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    FP8_BLOCK = "fp8-block"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"

    @property
    def itemsize(self) -> int:
        """Bytes of one element of a kept weight or activation."""
        return 4 if self is Precision.FP32 else 2

    @property
    def base(self) -> Precision:
        """Type of everything but the products of the blocks."""
        return self if self in (Precision.FP32, Precision.FP16) else Precision.BF16


class Optimizer(StrEnum):
    """Update rule; sets the bytes of state per parameter."""

    ADAMW = "adamw"
    SGD = "sgd"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One training step's worth of work.

    Attributes:
        global_batch: sequences per optimizer step, over all ranks.
        seq_len: tokens per sequence.
        precision: type of weights and activations.
        optimizer: update rule.
    """

    global_batch: int
    seq_len: int
    precision: Precision = Precision.BF16
    optimizer: Optimizer = Optimizer.ADAMW

    def __post_init__(self) -> None:
        for name in ("global_batch", "seq_len"):
            if getattr(self, name) < 1:
                raise InputError(f"workload: {name} is {getattr(self, name)}; it must be at least 1")

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.global_batch * self.seq_len
