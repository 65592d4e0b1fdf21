"""A transformer described by its numbers."""

from __future__ import annotations

import math
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
class Latent:
    """Multi-head latent attention (DeepSeek-V2, 2024): queries, keys and values come from narrow latents.

    Attributes:
        q_rank: width of the query's latent; 0 means that queries come from the stream directly.
        kv_rank: width of the latent of keys and values.
        nope_size: width of a query's and key's head without positions.
        rope_size: width of its rotary part; a token's key has one for all heads.
        value_size: width of a value's head.
    """

    q_rank: int
    kv_rank: int
    nope_size: int
    rope_size: int
    value_size: int

    def __post_init__(self) -> None:
        for field in ("kv_rank", "nope_size", "rope_size", "value_size"):
            if getattr(self, field) < 1:
                raise InputError(f"latent attention: {field} is {getattr(self, field)}; it must be at least 1")
        if self.q_rank < 0:
            raise InputError(f"latent attention: q_rank is {self.q_rank}; it is 0 (no latent of queries) or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Numbers of a transformer (decoder or encoder, dense or mixture of experts), enough to build its OpGraph.

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
        num_experts: routed experts of a mixture-of-experts block; 0 for a dense model.
        top_k: experts that a token is sent to.
        expert_ffn_size: inner width of one routed expert.
        shared_ffn_size: inner width of the expert that every token passes (all shared ones together); 0 for none.
        dense_layers: first blocks that have a dense feed-forward part instead of experts.
        latent: latent attention instead of separate query, key and value products.
        mtp_layers: extra blocks that predict tokens further ahead (multi-token prediction).
        window: tokens that a token sees in every second block, the first among them; 0 for all.
        qk_norm: queries and keys are normalised per head.
        clamped_activation: the gated activation clamps both its inputs and adds one to the linear one (GPT-OSS), which
            engines compute operation by operation.
        wide_blocks: last blocks whose products stay in bf16 where those of the others are narrower.
        dropout: attention probabilities and the results of attention and feed-forward are dropped in training.
        capacity_factor: rows of a sequence that an expert takes, relative to an even spread, ceil(s k / E * factor);
            the rest is dropped (GShard 2020). 0 for dropless.
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
    num_experts: int = 0
    top_k: int = 0
    expert_ffn_size: int = 0
    shared_ffn_size: int = 0
    dense_layers: int = 0
    latent: Latent | None = None
    mtp_layers: int = 0
    window: int = 0
    qk_norm: bool = False
    clamped_activation: bool = False
    wide_blocks: int = 0
    dropout: bool = False
    capacity_factor: float = 0.0

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
        for field in (
            "num_experts",
            "top_k",
            "expert_ffn_size",
            "shared_ffn_size",
            "dense_layers",
            "mtp_layers",
            "window",
            "wide_blocks",
        ):
            if getattr(self, field) < 0:
                raise InputError(f"model {self.name}: {field} is {getattr(self, field)}; it must be 0 or more")
        if self.num_experts:
            self._check_experts()
        elif self.top_k or self.expert_ffn_size or self.shared_ffn_size or self.capacity_factor:
            raise InputError(f"model {self.name}: it describes experts, but num_experts is 0")

    def _check_experts(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(
                f"model {self.name}: top_k={self.top_k} of {self.num_experts} experts: use 1 or more of them"
            )
        if self.expert_ffn_size < 1:
            raise InputError(f"model {self.name}: expert_ffn_size is {self.expert_ffn_size}; it must be at least 1")
        if self.dense_layers > self.num_layers:
            raise InputError(f"model {self.name}: dense_layers={self.dense_layers} of {self.num_layers} blocks")
        if not 0 <= self.capacity_factor < math.inf:
            raise InputError(
                f"model {self.name}: capacity_factor is {self.capacity_factor}; it is 0 (dropless) or more"
            )

    @property
    def unbuilt(self) -> tuple[str, ...]:
        """Names of the fields that ask for what the module of ``autopar.model.transformer`` does not have."""
        fields = ("latent", "mtp_layers", "window", "qk_norm", "clamped_activation", "dropout")
        return tuple(field for field in fields if getattr(self, field))
