"""A transformer as an ordinary ``nn.Module``, built from a ModelSpec: GPT style, Llama style, mixtures of experts.

Pre-norm blocks, separate query, key and value products (or one fused), attention through
``scaled_dot_product_attention``. Module names are those of the analytic graph (``autopar.model.build``). Head counts
follow from the local width of the projections, so that tensor parallelism may divide them.

Letters: B sequences, S tokens, h hidden_size, V vocab_size.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.errors import InputError
from autopar.model.experts import MixtureOfExperts
from autopar.model.feed_forward import FeedForward
from autopar.model.sequence import SequencePart
from autopar.model.spec import ModelSpec, Norm, Position

ROTARY_BASE = 10000.0
INIT_STD = 0.02
NORM_EPS = 1e-5


class Embedding(nn.Module):
    """Token embedding, plus learned positions where the spec has them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.token = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.position = nn.Embedding(spec.max_seq_len, spec.hidden_size) if spec.position is Position.LEARNED else None
        self.sequence_part = SequencePart()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] (int64) to the stream [B, S, h]. Raises InputError if S exceeds the learned positions."""
        embedded: Tensor = self.token(tokens)
        if self.position is None:
            return embedded
        length = self.sequence_part.whole_length(tokens.shape[1])
        if length > self.position.num_embeddings:
            raise InputError(
                f"a sequence of {length} tokens is longer than the model's {self.position.num_embeddings} positions"
            )
        positions: Tensor = self.position(self.sequence_part.positions(tokens.shape[1], tokens.device))
        return embedded + positions


class Rotary(nn.Module):
    """Rotary position encoding of queries and keys (Su et al. 2021; halves rotated as in Llama)."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence_part = SequencePart()

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate [B, S, heads, head_size]; the head counts of query and key may differ."""
        length, size = query.shape[1], query.shape[-1]
        device = query.device
        exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
        positions = self.sequence_part.positions(length, device).float()
        angles = torch.outer(positions, ROTARY_BASE**-exponents)
        cos = angles.cos().repeat(1, 2).unsqueeze(1).to(query.dtype)
        sin = angles.sin().repeat(1, 2).unsqueeze(1).to(query.dtype)
        return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Scores(nn.Module):
    """Attention without its products: scores and the weighted sum of values."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal, self.sequence_part = causal, SequencePart()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, S, heads, head_size] to [B, S, heads, head_size]; keys and values may have fewer heads."""
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return self.sequence_part.attend(query, key, value, causal=self.causal).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_size = spec.head_size
        query_width, kv_width = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        self.qkv: nn.Linear | None = None
        if spec.fused_qkv:
            self.qkv = nn.Linear(spec.hidden_size, query_width + 2 * kv_width, bias=spec.bias)
            self.widths = (query_width, kv_width, kv_width)
        else:
            self.query = nn.Linear(spec.hidden_size, query_width, bias=spec.bias)
            self.key = nn.Linear(spec.hidden_size, kv_width, bias=spec.bias)
            self.value = nn.Linear(spec.hidden_size, kv_width, bias=spec.bias)
        self.rotary = Rotary() if spec.position is Position.ROTARY else None
        self.sdpa = Scores(causal=spec.causal)
        self.output = nn.Linear(query_width, spec.hidden_size, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each sequence: [B, S, h] to [B, S, h]."""
        batch, length = x.shape[0], x.shape[1]
        if self.qkv is not None:
            fused = self.qkv(x)
            query, key, value = fused.split([width * fused.shape[-1] // sum(self.widths) for width in self.widths], -1)
        else:
            query, key, value = self.query(x), self.key(x), self.value(x)
        query, key, value = (part.view(batch, length, -1, self.head_size) for part in (query, key, value))
        if self.rotary is not None:
            query, key = self.rotary(query, key)
        mixed = self.sdpa(query, key, value)
        attended: Tensor = self.output(mixed.reshape(batch, length, -1))
        return attended


class Block(nn.Module):
    """One pre-norm transformer block; ``experts`` if its feed-forward part is a mixture of experts."""

    def __init__(self, spec: ModelSpec, *, experts: bool = False) -> None:
        super().__init__()
        self.norm1 = _norm(spec)
        self.attention = Attention(spec)
        self.norm2 = _norm(spec)
        self.mlp = None if experts else FeedForward(spec)
        self.moe = MixtureOfExperts(spec) if experts else None

    def forward(self, x: Tensor) -> Tensor:
        """The stream [B, S, h] with this block's attention and feed-forward added."""
        x = x + self.attention(self.norm1(x))
        feed_forward = self.mlp if self.moe is None else self.moe
        assert feed_forward is not None
        result: Tensor = x + feed_forward(self.norm2(x))
        return result


class Transformer(nn.Module):
    """The whole model: embedding, blocks, final norm and LM head.

    Attributes:
        spec: the numbers that it was built from.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = Embedding(spec)
        self.blocks = nn.ModuleList(
            Block(spec, experts=spec.num_experts > 0 and index >= spec.dense_layers) for index in range(spec.num_layers)
        )
        self.norm = _norm(spec)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tied_embeddings:
            self.head.weight = self.embedding.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] (int64) to logits [B, S, V]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @property
    def tensor_parallel_plan(self) -> Mapping[str, str]:
        """How tensor parallelism divides the modules, by name pattern (``*`` is one path component).

        Styles are those of ``autopar.runtime.parallel.tensor_styles``.
        """
        spec, plan = self.spec, {"embedding.token": "vocab", "head": "vocab"}
        if spec.fused_qkv:
            query_width, kv_width = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
            plan["blocks.*.attention.qkv"] = f"colwise-fused {query_width} {kv_width} {kv_width}"
        else:
            plan |= {f"blocks.*.attention.{name}": "colwise" for name in ("query", "key", "value")}
        plan["blocks.*.attention.output"] = "rowwise"
        for part in self._feed_forward_parts():
            plan |= {f"{part}.{name}": "colwise" for name in (("gate", "up") if self.spec.gated_mlp else ("up",))}
            plan[f"{part}.down"] = "rowwise"
        return plan

    def _feed_forward_parts(self) -> tuple[str, ...]:
        """Dense feed-forward parts and shared experts; routed experts are divided by expert parallelism."""
        spec = self.spec
        dense = ("blocks.*.mlp",) if spec.dense_layers or not spec.num_experts else ()
        shared = ("blocks.*.moe.shared",) if spec.shared_ffn_size and spec.dense_layers < spec.num_layers else ()
        return dense + shared

    @property
    def recompute_parts(self) -> Mapping[str, tuple[str, ...]]:
        """Where the parts of a block that may be recomputed are: recompute module to name patterns."""
        spec, parts = (
            self.spec,
            {"core_attn": ("blocks.*.attention.sdpa",), "layernorm": ("blocks.*.norm1", "blocks.*.norm2")},
        )
        if spec.dense_layers or not spec.num_experts:
            parts["mlp"] = ("blocks.*.mlp",)
        if spec.dense_layers < spec.num_layers and spec.num_experts:
            parts |= {"moe": ("blocks.*.moe",), "moe_act": ("blocks.*.moe.act",)}
        return parts

    def pipeline_parts(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Names of the modules before the blocks, of the blocks, and after them.

        Calling all of them one after another, each on the result of the one before, is the forward pass.
        """
        return ("embedding",), tuple(f"blocks.{i}" for i in range(self.spec.num_layers)), ("norm", "head")


def _norm(spec: ModelSpec) -> nn.Module:
    if spec.norm is Norm.RMSNORM:
        return nn.RMSNorm(spec.hidden_size, eps=NORM_EPS)
    return nn.LayerNorm(spec.hidden_size, eps=NORM_EPS)


def build(spec: ModelSpec, seed: int = 0) -> Transformer:
    """Build the model in fp32 on the current default device, initialised from ``seed``.

    Every parameter is drawn from its own generator, seeded by ``seed`` and the parameter's name: the values depend
    on nothing else. Weights are normal with standard deviation 0.02 (those that write to the stream 0.02 /
    sqrt(2 num_layers), as GPT-2), norms are one, biases zero. On the meta device nothing is drawn.

    Raises:
        InputError: the spec has what this module does not (latent attention, a window, ...).
    """
    if spec.unbuilt:
        raise InputError(
            f"model {spec.name}: the module that is built here has no {', '.join(spec.unbuilt)}; it can be planned "
            "but not run"
        )
    model = Transformer(spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                _initialize(name, parameter, spec, seed)
    return model


def _initialize(name: str, parameter: nn.Parameter, spec: ModelSpec, seed: int) -> None:
    *_, module, kind = name.split(".")
    if kind == "bias":
        parameter.zero_()
    elif module.startswith("norm"):
        parameter.fill_(1.0)
    else:
        std = INIT_STD * (2 * spec.num_layers) ** -0.5 if module in ("output", "down") else INIT_STD
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        values = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        parameter.copy_(values)


def language_model_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, S, V] against the next tokens [B, S]."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
