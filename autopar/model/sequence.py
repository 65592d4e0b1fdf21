"""What a module has to know of the sequence whose tokens it sees: where they stand, and what they may attend to.

A module that mixes tokens or encodes positions keeps a ``SequencePart`` in an attribute ``sequence_part`` and asks it.
By default that is the whole sequence. Under context parallelism the executor puts this rank's part in its place, on
every submodule that has such an attribute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class SequencePart:
    """The whole sequence: all its tokens are seen, in order."""

    def whole_length(self, length: int) -> int:
        """Tokens of a whole sequence of which ``length`` are seen."""
        return length

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Places in the whole sequence, [length] (int64), of the tokens that are seen."""
        return torch.arange(length, device=device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        """Attention of the tokens that are seen over the whole sequence.

        Args:
            query: [batch, heads, length, head size].
            key, value: [batch, key-value heads, length, head size]; fewer heads are repeated.
            causal: a token attends to those before it and itself.

        Returns:
            [batch, heads, length, head size of the values].
        """
        grouped = key.shape[1] < query.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
