"""The dense feed-forward part of a block as an ``nn.Module``: two products around GELU, or three around gated SiLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from autopar.model.spec import ModelSpec


class GatedSilu(nn.Module):
    """The activation of SwiGLU: silu(gate) * up (Shazeer 2020)."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Both inputs and the result are [..., width]."""
        return F.silu(gate) * up


class FeedForward(nn.Module):
    """Two products around GELU, or three around the gated SiLU.

    Args:
        spec: the model.
        width: inner features; None means the spec's ffn_size.
    """

    def __init__(self, spec: ModelSpec, width: int | None = None) -> None:
        super().__init__()
        width = spec.ffn_size if width is None else width
        self.gate: nn.Linear | None = None
        if spec.gated_mlp:
            self.gate = nn.Linear(spec.hidden_size, width, bias=spec.bias)
        self.up = nn.Linear(spec.hidden_size, width, bias=spec.bias)
        self.act: nn.Module = GatedSilu() if spec.gated_mlp else nn.GELU()
        self.down = nn.Linear(width, spec.hidden_size, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, h] to [B, S, h]."""
        inner = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x), self.up(x))
        result: Tensor = self.down(inner)
        return result
