"""A fixed piece of work by which a machine's speed at different times compares.

Processors of a cloud share caches, memory and clocks with strangers: the same work takes a third longer a minute later.
So a profile and every run that is held to it time this work too, and the ratio tells what the machine added. It goes
round more blocks than the caches hold, as training does: work on a single block sees the processor's clock, but little
of what strangers do to caches and memory.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, BATCH, SEQ = 256, 4, 4, 128
BLOCKS = 12


class Block(nn.Module):
    """A transformer's mix of products, attention and memory-bound operations."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.output = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, width] to the same."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.output(mixed)
        return x + self.mlp(x)


class Yardstick:
    """Forward and backward of small transformer blocks in turn, on this rank's processor.

    Args:
        dtype: of the work.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        # The numbers that training draws stay the same.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = [Block().to(dtype) for _ in range(BLOCKS)]
            self.x = torch.rand(BATCH, SEQ, WIDTH, dtype=dtype)
        self._turn = 0
        for _ in range(BLOCKS):
            self.once()

    def once(self) -> None:
        """The work, once: forward and backward of the next block."""
        self.forward().sum().backward()

    def forward(self) -> Tensor:
        """Forward of the next block."""
        self._turn = (self._turn + 1) % BLOCKS
        result: Tensor = self.blocks[self._turn](self.x)
        return result

    def seconds(self, rounds: int) -> float:
        """Mean seconds of the work, now."""
        start = time.perf_counter()
        for _ in range(rounds):
            self.once()
        return (time.perf_counter() - start) / rounds
