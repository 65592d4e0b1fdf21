"""ModelSpec from a Hugging Face ``config.json`` of a dense GPT-2, Llama-like, BERT or RoBERTa model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopar.errors import InputError, nearest
from autopar.model.spec import ModelSpec, Norm, Position
from costmodels.records import read_json

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
ENCODERS = ("bert", "roberta", "xlm-roberta")
KNOWN = ("gpt2", *LLAMA_LIKE, *ENCODERS)


def load_config(path: str | Path) -> ModelSpec:
    """Read a config.json. Raises InputError for a missing key or a model type that is not supported."""
    config = read_json(path)
    kind = config.get("model_type")
    where = str(path)
    if kind == "gpt2":
        return _gpt2(config, where)
    if kind in LLAMA_LIKE:
        return _llama(config, where)
    if kind in ENCODERS:
        return _encoder(config, where)
    raise InputError(f"{where}: model_type {kind!r} is not supported{nearest(str(kind), KNOWN)}")


def _get(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where}: key '{key}' is {value!r}; expected a whole number")
    return value


def _name(config: Mapping[str, Any], where: str) -> str:
    return str(config.get("_name_or_path") or config.get("name") or Path(where).resolve().parent.name)


def _gpt2(config: Mapping[str, Any], where: str) -> ModelSpec:
    hidden = _get(config, "n_embd", where)
    return ModelSpec(
        name=_name(config, where),
        num_layers=_get(config, "n_layer", where),
        hidden_size=hidden,
        num_heads=_get(config, "n_head", where),
        num_kv_heads=_get(config, "n_head", where),
        ffn_size=config.get("n_inner") or 4 * hidden,
        vocab_size=_get(config, "vocab_size", where),
        max_seq_len=_get(config, "n_positions", where),
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
    )


def _llama(config: Mapping[str, Any], where: str) -> ModelSpec:
    heads = _get(config, "num_attention_heads", where)
    return ModelSpec(
        name=_name(config, where),
        num_layers=_get(config, "num_hidden_layers", where),
        hidden_size=_get(config, "hidden_size", where),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or 0,
        ffn_size=_get(config, "intermediate_size", where),
        vocab_size=_get(config, "vocab_size", where),
        max_seq_len=_get(config, "max_position_embeddings", where),
        gated_mlp=True,
        norm=Norm.RMSNORM,
        position=Position.ROTARY,
        bias=False,
        fused_qkv=False,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _encoder(config: Mapping[str, Any], where: str) -> ModelSpec:
    heads = _get(config, "num_attention_heads", where)
    return ModelSpec(
        name=_name(config, where),
        num_layers=_get(config, "num_hidden_layers", where),
        hidden_size=_get(config, "hidden_size", where),
        num_heads=heads,
        num_kv_heads=heads,
        ffn_size=_get(config, "intermediate_size", where),
        vocab_size=_get(config, "vocab_size", where),
        max_seq_len=_get(config, "max_position_embeddings", where),
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        causal=False,
    )
