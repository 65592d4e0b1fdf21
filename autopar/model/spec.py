"""A transformer described by its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autopar.errors import InputError


class Norm(StrEnum):
    """Normalisation layer."""

    LAYERNORM = "layernorm"
    RMSNORM = "rmsnorm"


class Position(StrEnum):
    """How positions enter the model."""

    LEARNED = "learned"
    ROTARY = "rotary"
    NONE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Numbers of a dense transformer (decoder or encoder), enough to build its OpGraph.

    Attributes:
        num_layers: transformer blocks.
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads (fewer than ``num_heads``: grouped-query attention).
        head_size: width of a head; 0 means hidden_size / num_heads.
        ffn_size: inner width of the feed-forward part.
        vocab_size: rows of the embedding.
        max_seq_len: longest sequence (rows of a learned position embedding).
        gated_mlp: two input projections (SwiGLU) instead of one.
        norm: normalisation.
        position: position encoding.
        bias: linear layers add a bias.
        tied_embeddings: the LM head shares the embedding's weights.
        causal: a token sees only earlier ones.
        fused_qkv: query, key and value are one product.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    vocab_size: int
    max_seq_len: int
    head_size: int = 0
    gated_mlp: bool = False
    norm: Norm = Norm.LAYERNORM
    position: Position = Position.LEARNED
    bias: bool = True
    tied_embeddings: bool = False
    causal: bool = True
    fused_qkv: bool = True

    def __post_init__(self) -> None:
        for field in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "ffn_size",
            "vocab_size",
            "max_seq_len",
        ):
            if getattr(self, field) < 1:
                raise InputError(f"model {self.name}: {field} is {getattr(self, field)}; it must be at least 1")
        if self.head_size == 0:
            if self.hidden_size % self.num_heads:
                raise InputError(
                    f"model {self.name}: num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; "
                    "state head_size"
                )
            object.__setattr__(self, "head_size", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model {self.name}: num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
