"""ModelSpec from a Hugging Face ``config.json``: GPT-2, Llama-like, mixtures of experts, MPT, BLOOM, BERT, RoBERTa.

Keys are those of the ``transformers`` configuration classes of each ``model_type``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autopar.errors import InputError, nearest
from autopar.model.spec import Latent, ModelSpec, Norm, Position
from costmodels.records import read_json

Config = Mapping[str, Any]


def load_config(path: str | Path) -> ModelSpec:
    """Read a config.json. Raises InputError for a missing key or a model type that is not supported."""
    config = read_json(path)
    kind, where = str(config.get("model_type")), str(path)
    if kind not in READERS:
        raise InputError(f"{where}: model_type {config.get('model_type')!r} is not supported{nearest(kind, READERS)}")
    return ModelSpec(name=_name(config, where), **READERS[kind](config, where))


def _get(config: Config, key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where}: key '{key}' is {value!r}; expected a whole number")
    return value


def _first(config: Config, keys: tuple[str, ...], where: str) -> int:
    """The first of several names of one number that the file has."""
    return _get(config, next((key for key in keys if config.get(key) is not None), keys[0]), where)


def _name(config: Config, where: str) -> str:
    return str(config.get("_name_or_path") or config.get("name") or Path(where).resolve().parent.name)


def _every_block(config: Config, where: str, key: str) -> None:
    if config.get(key, 1) != 1:
        raise InputError(f"{where}: {key} is {config[key]!r}; only experts in every block are supported (1)")


def _gpt2(config: Config, where: str) -> dict[str, Any]:
    hidden, heads = _get(config, "n_embd", where), _get(config, "n_head", where)
    return {
        "num_layers": _get(config, "n_layer", where),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "ffn_size": config.get("n_inner") or 4 * hidden,
        "vocab_size": _get(config, "vocab_size", where),
        "max_seq_len": _get(config, "n_positions", where),
        "tied_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def _common(config: Config, where: str) -> dict[str, Any]:
    heads = _get(config, "num_attention_heads", where)
    return {
        "num_layers": _get(config, "num_hidden_layers", where),
        "hidden_size": _get(config, "hidden_size", where),
        "num_heads": heads,
        "num_kv_heads": heads,
        "ffn_size": _get(config, "intermediate_size", where),
        "vocab_size": _get(config, "vocab_size", where),
        "max_seq_len": _get(config, "max_position_embeddings", where),
    }


def _encoder(config: Config, where: str) -> dict[str, Any]:
    tied = bool(config.get("tie_word_embeddings", True))
    return _common(config, where) | {"tied_embeddings": tied, "causal": False}


def _llama(config: Config, where: str) -> dict[str, Any]:
    fields = _common(config, where)
    return fields | {
        "num_kv_heads": config.get("num_key_value_heads") or fields["num_heads"],
        "head_size": config.get("head_dim") or 0,
        "gated_mlp": True,
        "norm": Norm.RMSNORM,
        "position": Position.ROTARY,
        "bias": False,
        "fused_qkv": False,
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _qwen3(config: Config, where: str) -> dict[str, Any]:
    return _llama(config, where) | {"qk_norm": True}


def _qwen3_moe(config: Config, where: str) -> dict[str, Any]:
    _every_block(config, where, "decoder_sparse_step")
    if config.get("mlp_only_layers"):
        raise InputError(f"{where}: mlp_only_layers is {config['mlp_only_layers']!r}; only experts in every block are "
                         "supported (an empty list)")  # fmt: skip
    return _qwen3(config, where) | {
        "num_experts": _get(config, "num_experts", where),
        "top_k": _get(config, "num_experts_per_tok", where),
        "expert_ffn_size": _get(config, "moe_intermediate_size", where),
    }


def _mixtral(config: Config, where: str) -> dict[str, Any]:
    fields = _llama(config, where)
    return fields | {
        "num_experts": _get(config, "num_local_experts", where),
        "top_k": _first(config, ("num_experts_per_tok", "experts_per_token"), where),
        "expert_ffn_size": fields["ffn_size"],
    }


def _gpt_oss(config: Config, where: str) -> dict[str, Any]:
    window = config.get("sliding_window") or 0
    return _mixtral(config, where) | {"bias": True, "window": window, "clamped_activation": True}


def _deepseek(config: Config, where: str) -> dict[str, Any]:
    _every_block(config, where, "moe_layer_freq")
    latent = Latent(
        q_rank=config.get("q_lora_rank") or 0,
        kv_rank=_get(config, "kv_lora_rank", where),
        nope_size=_get(config, "qk_nope_head_dim", where),
        rope_size=_get(config, "qk_rope_head_dim", where),
        value_size=_get(config, "v_head_dim", where),
    )
    width = _get(config, "moe_intermediate_size", where)
    return _llama(config, where) | {
        "head_size": latent.nope_size + latent.rope_size,
        "num_experts": _get(config, "n_routed_experts", where),
        "top_k": _get(config, "num_experts_per_tok", where),
        "expert_ffn_size": width,
        "shared_ffn_size": (config.get("n_shared_experts") or 0) * width,
        "dense_layers": config.get("first_k_dense_replace") or 0,
        "mtp_layers": config.get("num_nextn_predict_layers") or 0,
        "latent": latent,
    }


def _mpt(config: Config, where: str) -> dict[str, Any]:
    hidden, heads = _get(config, "d_model", where), _get(config, "n_heads", where)
    attention = config.get("attn_config") or {}
    learned = bool(config.get("learned_pos_emb", True)) and not attention.get("alibi") and not attention.get("rope")
    return {
        "num_layers": _get(config, "n_layers", where),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": attention.get("kv_n_heads") or heads,
        "ffn_size": int(hidden * config.get("expansion_ratio", 4)),
        "vocab_size": _get(config, "vocab_size", where),
        "max_seq_len": _get(config, "max_seq_len", where),
        "position": Position.LEARNED if learned else Position.ROTARY if attention.get("rope") else Position.NONE,
        "bias": not config.get("no_bias", False),
        "tied_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def _bloom(config: Config, where: str) -> dict[str, Any]:
    hidden = _first(config, ("hidden_size", "n_embed"), where)
    heads = _first(config, ("n_head", "num_attention_heads"), where)
    return {
        "num_layers": _first(config, ("n_layer", "num_hidden_layers"), where),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "ffn_size": 4 * hidden,
        "vocab_size": _get(config, "vocab_size", where),
        "max_seq_len": config.get("seq_length") or 2048,
        "position": Position.NONE,
        "tied_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


READERS: Mapping[str, Callable[[Config, str], dict[str, Any]]] = {
    "gpt2": _gpt2, "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral, "gpt_oss": _gpt_oss, "deepseek_v2": _deepseek, "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek, "mpt": _mpt, "bloom": _bloom, "bert": _encoder, "roberta": _encoder,
    "xlm-roberta": _encoder,
}  # fmt: skip
