"""The model of a run: numbers of the row, completed by the shipped model of its family -> ModelSpec.

The row's numbers win, so that a model cut to fewer layers keeps its family's widths. A family also gives what no
column says: kind of normalisation, positions, biases, head size, experts' width, latent attention.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

from autopar.model.presets import load_preset, preset_names
from autopar.model.spec import Latent, ModelSpec, Norm, Position
from autopar.runs.engines import LAYER_TRACES, Engine
from autopar.runs.reading import CannotRead, Read, find_int, has
from autopar.runs.rows import RunRow

# (pattern of the model's name, how the shipped models of the family are called); the first match counts.
FAMILIES: tuple[tuple[str, str], ...] = (
    (r"deepseek-?v3|deepseek-?r1|\bdsv3", "deepseek-v3"), (r"deepseek-?v2-?lite", "deepseek-v2-lite"),
    (r"deepseek-?v2", "deepseek-v2"), (r"deepseek-proxy", "deepseek-v2-lite"), (r"moonlight", "moonlight"),
    (r"kimi-?k2", "kimi-k2"), (r"qwen-?3", "qwen3"), (r"qwen", "qwen2"), (r"gpt-?oss", "gpt-oss"),
    (r"mixtral", "mixtral"), (r"mistral", "mistral"), (r"llama-?4", "llama4"), (r"llama-?3\.?2", "llama3.2"),
    (r"llama-?3\.?1", "llama3.1"), (r"llama-?3", "llama3"), (r"llama", "llama2"), (r"mpt", "mpt"),
    (r"bloom", "bloom"), (r"internlm", "internlm"), (r"nemotron-?4", "nemotron-4"), (r"nemotron", "nemotron"),
    (r"bert", "bert"), (r"megatron|mt-?nlg|turing", "megatron"), (r"gpt-?2", "gpt2"), (r"gpt|opt-", "gpt3"),
)  # fmt: skip

# Families whose layers are of another one's kind.
KIN: dict[str, str] = {"qwen2": "llama3", "mistral": "llama3"}

# Kinds of model that the program has no operations for.
BEYOND: tuple[tuple[str, str], ...] = (
    (r"nemotron.*(nano|super|ultra|lightning|v3|-h\b)|mamba|hybrid|jamba|ssm|rwkv", "state-space layers"),
    (r"qwen-?3(\.\d+)?-next|kimi-linear|minimax", "linear attention"),
    (r"(^|[^a-z])(m?t5|ul2|bart)([^a-z]|$)|encoder-decoder", "an encoder with a decoder"),
    (r"vlm|mimo|llava|multimodal|\bvit\b|\bclip\b|vision|audio|-vl(-|$)", "parts besides a language model"),
    (r"stable-?diffusion|\bflux|\bdit\b|unet|\bretro", "operations besides those of a language model"),
)

GPT_VOCAB = 50257  # of GPT-2, which GPT-like runs use
GPT_LIKE = ("gpt2", "gpt3", "megatron")
DENSE_DROPOUT = ("gpt", "bert", "megatron", "bloom", "mt-nlg")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)-?([bmt])(?![a-z])")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """A shipped model of the family; ``exact`` where it is the model itself (its widths are the row's).

    ``head_size`` is that of all its members where it does not follow from their widths, else None.
    """

    stem: str
    template: ModelSpec
    exact: bool
    head_size: int | None


def normal_name(name: str) -> str:
    """Lower case, parts divided by hyphens: ``LLAMA3.1_405B`` is ``llama3.1-405b``."""
    return re.sub(r"[\s_/]+", "-", name.strip().lower())


def read_model(row: RunRow, engine: Engine, seq_len: int, tp: int) -> Read[ModelSpec]:
    """Numbers of the model that was trained. Raises CannotRead where they are not known or go beyond ModelSpec."""
    name = normal_name(row.model_name or "model")
    notes = row.words("notes")
    beyond = next((what for pattern, what in BEYOND if has(name, pattern)), None)
    if beyond is None and has(notes, r"encoder-decoder|mamba\+|\+ ?mamba|hybrid mamba"):
        beyond = "layers besides a transformer's"
    if beyond:
        raise CannotRead(f"model '{row.model_name}' has {beyond}")
    if has(f"{name}; {notes}", r"\b(q?lora|peft)\b"):
        raise CannotRead("LoRA trains few of the weights")
    family = _family(name, row)
    spec, assumed = _complete(row, name, notes, family, engine, tp)
    spec, more = _fit_to_ranks(dataclasses.replace(spec, max_seq_len=seq_len), tp)
    return spec, (*assumed, *more)


def _family(name: str, row: RunRow) -> _Family | None:
    stem = next((stem for pattern, stem in FAMILIES if has(name, pattern)), None)
    if stem is None:
        return None
    own_name, stem = stem, KIN.get(stem, stem)
    members = [load_preset(known) for known in preset_names() if known == stem or known.startswith((f"{stem}-", stem))]
    if not members:
        return None
    # 128 of Qwen3 and 64 of gpt-oss are not hidden_size / num_heads: a family's head size is the same for all.
    sizes = {member.head_size for member in members}
    plain = all(member.head_size * member.num_heads == member.hidden_size for member in members)
    head_size = sizes.pop() if len(sizes) == 1 and not plain else None
    exact = [member for member in members if _same_widths(member, row) and _same_size(member, name, row)]
    exact.sort(key=lambda member: row.n_layers is not None and member.num_layers != row.n_layers)
    if exact and stem == own_name:
        return _Family(stem=stem, template=exact[0], exact=True, head_size=head_size)
    return _Family(stem=stem, template=members[0], exact=False, head_size=head_size)


def _same_widths(member: ModelSpec, row: RunRow) -> bool:
    pairs = ((row.hidden, member.hidden_size), (row.n_heads, member.num_heads))
    return all(stated is None or stated == own for stated, own in pairs)


def _same_size(member: ModelSpec, name: str, row: RunRow) -> bool:
    if row.hidden is not None:
        return row.n_experts is None or (row.n_experts > 1) == (member.num_experts > 0)
    wanted, own = _billions(name), _billions(member.name)
    return own is None or (wanted is not None and abs(wanted / own - 1) < 0.1)


def _billions(name: str) -> float | None:
    match = _SIZE.search(name)
    return float(match[1]) * {"m": 1e-3, "b": 1.0, "t": 1e3}[match[2]] if match else None


def _complete(
    row: RunRow, name: str, notes: str, family: _Family | None, engine: Engine, tp: int
) -> tuple[ModelSpec, tuple[str, ...]]:
    known = family.template if family and family.exact else None
    assumed: list[str] = []

    def number(
        stated: int | None, own: Callable[[ModelSpec], int] | None, what: str, otherwise: int | None = None
    ) -> int:
        if stated is not None:
            return stated
        if known is not None and own is not None:
            return own(known)
        if otherwise is None:
            raise CannotRead(f"model '{row.model_name}': {what} not known")
        assumed.append(f"{what} not stated: {otherwise} assumed")
        return otherwise

    layers = number(row.n_layers, lambda m: m.num_layers, "number of layers")
    hidden = number(row.hidden, lambda m: m.hidden_size, "hidden size")
    heads = number(row.n_heads, lambda m: m.num_heads, "number of heads")
    gated = row.gated_mlp if row.gated_mlp is not None else bool(family and family.template.gated_mlp)
    gpt = family is None or family.stem in GPT_LIKE
    padded = _cut if has(row.words("source_ref"), LAYER_TRACES) else _padded
    vocab = padded(GPT_VOCAB, tp) if family is None or gpt else family.template.vocab_size
    kind = _kind(notes, gated, family)
    head_size = known.head_size if known else (family.head_size if family else None) or 0
    if not head_size and hidden % heads:
        head_size = hidden // heads
        assumed.append(f"heads of {head_size} assumed, since {heads} heads do not divide {hidden}")
    spec = ModelSpec(
        name=row.model_name or "model",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=number(row.n_kv_heads, lambda m: m.num_kv_heads, "key-value heads", heads),
        head_size=head_size,
        ffn_size=number(row.ffn_hidden, lambda m: m.ffn_size, "feed-forward width", 4 * hidden),
        vocab_size=number(row.vocab, None if gpt else lambda m: m.vocab_size, "vocabulary", vocab),
        max_seq_len=1,
        gated_mlp=gated,
        norm=kind.norm,
        position=kind.position,
        bias=kind.bias,
        tied_embeddings=kind.tied_embeddings,
        causal=not has(name, "bert"),
        fused_qkv=kind.fused_qkv,
        qk_norm=bool(family and family.template.qk_norm) or has(notes, r"qk[-_ ](layer)?norm"),
        window=family.template.window if family else 0,
        clamped_activation=bool(family and family.template.clamped_activation),
        wide_blocks=_wide_blocks(notes, layers),
        dropout=_dropout(name, row, engine),
        latent=_latent(notes, known),
    )
    spec, more = _experts(spec, row, notes, known)
    mtp, why = _multi_token(spec, row, notes, known, engine)
    return dataclasses.replace(spec, mtp_layers=mtp), (*assumed, *more, *why)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    norm: Norm
    position: Position
    bias: bool
    tied_embeddings: bool
    fused_qkv: bool


def _kind(notes: str, gated: bool, family: _Family | None) -> _Kind:
    """Kinds of layers: of the family, else of GPT or (gated) Llama; flags of Megatron-LM in the notes win."""
    if family is not None:
        like = family.template
        kind = _Kind(
            norm=like.norm, position=like.position, bias=like.bias, tied_embeddings=like.tied_embeddings,
            fused_qkv=like.fused_qkv,
        )  # fmt: skip
    else:
        kind = _Kind(
            norm=Norm.RMSNORM if gated else Norm.LAYERNORM,
            position=Position.ROTARY if gated else Position.LEARNED,
            bias=not gated, tied_embeddings=not gated, fused_qkv=not gated,
        )  # fmt: skip
    if not has(notes, r"flags:"):
        return kind
    # Megatron-LM's command line: biases and tied embeddings unless switched off.
    return dataclasses.replace(
        kind,
        bias=not has(notes, r"disable-bias-linear"),
        tied_embeddings=not has(notes, r"untie-embeddings"),
        position=Position.ROTARY if has(notes, r"rope") else kind.position,
        norm=Norm.RMSNORM if has(notes, r"rmsnorm|swiglu") else kind.norm,
        fused_qkv=True,
    )


def _dropout(name: str, row: RunRow, engine: Engine) -> bool:
    """GPT and BERT of Megatron-LM are trained with its default dropout of 0.1; later families without."""
    notes = row.words("notes")
    default = engine.dropout or (has(notes, r"flags:") and not row.gated_mlp)
    return default and not has(notes, r"no dropout") and any(word in name for word in DENSE_DROPOUT)


def _wide_blocks(notes: str, layers: int) -> int:
    """Last blocks in bf16 where a narrower type is said to be of the first ones, or they are counted."""
    first = re.search(r"\blayers 0-(\d+)\b[^;]*\bbf16\b", notes)
    if first:
        return max(layers - 1 - int(first[1]), 0)
    return min(find_int(notes, r"last (\d+) (?:layers|blocks) (?:in|kept in|stay in) bf16") or 0, layers)


def _latent(notes: str, known: ModelSpec | None) -> Latent | None:
    if known is not None and known.latent is not None:
        return known.latent
    if not has(notes, r"multi-latent-attention|\bmla\b"):
        return None
    # Defaults of Megatron-LM's command line (megatron/training/arguments.py).
    return Latent(q_rank=0, kv_rank=32, nope_size=128, rope_size=64, value_size=128)


def _experts(spec: ModelSpec, row: RunRow, notes: str, known: ModelSpec | None) -> tuple[ModelSpec, tuple[str, ...]]:
    experts = row.n_experts if row.n_experts is not None else (known.num_experts if known else 0)
    if experts < 2:
        return spec, ()
    assumed: list[str] = []
    width = find_int(notes, r"moe[-_ ]ffn(?:[-_ ]hidden[-_ ]size)?[= ](\d+)", r"expert[-_ ]ffn[= ](\d+)")
    if width is None and known is not None and known.num_experts:
        width = known.expert_ffn_size
    if width is None:
        width = spec.ffn_size
        assumed.append("experts as wide as the stated feed-forward width")
    top_k = row.top_k or (known.top_k if known else 0)
    if not top_k:
        top_k = 2
        assumed.append("2 experts a token assumed")
    shared = find_int(notes, r"moe-shared-expert-intermediate-size=(\d+)", r"shared[-_ ]ffn[= ](\d+)")
    dense = find_int(notes, r"dense[-_ ]layers[= ](\d+)", r"\b(\d+) dense \+", r"moe-layer-freq=\(\[0\]\*(\d+)")
    if dense is None:
        dense = known.dense_layers if known else 0
        if dense and row.n_layers is not None and known is not None and row.n_layers < known.num_layers:
            assumed.append(f"the cut model keeps {dense} dense layers")
    changed = dataclasses.replace(
        spec, num_experts=experts, top_k=min(top_k, experts), expert_ffn_size=width,
        shared_ffn_size=shared if shared is not None else (known.shared_ffn_size if known else 0),
        dense_layers=min(dense, spec.num_layers),
    )  # fmt: skip
    return changed, tuple(assumed)


def _multi_token(
    spec: ModelSpec, row: RunRow, notes: str, known: ModelSpec | None, engine: Engine
) -> tuple[int, tuple[str, ...]]:
    """Layers of multi-token prediction: stated, seen in the pipeline's layout, else the family's."""
    if has(notes, r"w/o mtp|without mtp|no[_ ]mtp"):
        return 0, ()
    stated = find_int(notes, r"mtp[-_]num[-_]layers=(\d+)", r"\b(\d+) mtp layer")
    if stated is not None:
        return stated, ()
    layout = re.search(r"layout=(\S+)", notes)
    if layout:
        return layout[1].count("m"), ()
    own = known.mtp_layers if known else 0
    if has(notes, r"w/ mtp|with mtp"):
        return max(own, 1), ()
    if not own:
        return 0, ()
    if not engine.multi_token or (known is not None and spec.num_layers < known.num_layers):
        return 0, ("trained without multi-token prediction, assumed",)
    return own, (f"trained with {own} layer of multi-token prediction, assumed",)


def _padded(vocab: int, tp: int) -> int:
    """Rows of the embedding as Megatron-LM pads them: a multiple of 128 for each of the tp ranks."""
    return -(-vocab // (128 * tp)) * 128 * tp


def _cut(vocab: int, tp: int) -> int:
    """Rows of an embedding that is divided without padding: what tensor parallelism does not divide is dropped."""
    return vocab // tp * tp


def _fit_to_ranks(spec: ModelSpec, tp: int) -> Read[ModelSpec]:
    """Repeat key-value heads and pad the vocabulary where tensor parallelism does not divide them, as Megatron does."""
    assumed: list[str] = []
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads == 0 and spec.num_heads % tp == 0:
        assumed.append(f"{spec.num_kv_heads} key-value heads repeated for tp={tp}")
        spec = dataclasses.replace(spec, num_kv_heads=tp)
    if spec.vocab_size % tp:
        padded = _padded(spec.vocab_size, tp)
        assumed.append(f"vocabulary padded to {padded} for tp={tp}")
        spec = dataclasses.replace(spec, vocab_size=padded)
    return spec, tuple(assumed)
