"""Hugging Face's classes as chains of parts, which every kind of parallelism but those over the sequence can divide.

The module keeps the names of the class's own parameters. Between its parts runs the stream alone: what a block takes
beside it (rotary positions) is added where the block is called; masks are left out, as ``is_causal`` says the same for
sequences without padding. Dropout of the configuration is switched off, as in the ModelSpec read from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import InputError
from autopar.model.huggingface import load_config
from autopar.model.spec import ModelSpec
from autopar.runtime.parallel.parts import Chain
from autopar.runtime.sources import model_type
from costmodels.records import read_json


class HuggingFaceChain(Chain):
    """The parts of a Hugging Face model, called one after another: tokens [B, S] to logits [B, S, V].

    Attributes:
        spec: numbers of the model.
        source: path of its configuration.
        tensor_parallel_plan: see ``autopar.parallelize``; empty where its products cannot be divided.
    """

    def __init__(self, model: nn.Module, parts: _Parts, plan: Mapping[str, str], spec: ModelSpec, source: str) -> None:
        super().__init__(model, (*parts[0], *parts[1], *parts[2]))
        self._parts, self.tensor_parallel_plan, self.spec, self.source = parts, plan, spec, source

    def pipeline_parts(self) -> _Parts:
        """Names of the modules before the blocks, of the blocks, and after them."""
        return self._parts


_Parts = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def build_from_config(path: Path, seed: int) -> HuggingFaceChain:
    """The class of a config.json with initial weights drawn from ``seed``, in fp32; nothing is downloaded.

    Raises:
        InputError: transformers is missing, or the configuration asks for what a chain cannot do.
    """
    kind = model_type(path)
    import transformers

    fields = {key: value for key, value in read_json(path).items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(kind, **fields)
    _without_dropout(config)
    _check_window(config, path)
    auto: Any = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model: nn.Module = auto.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    parts, plan = _FAMILIES.get(kind, _decoder)(model, kind)
    return HuggingFaceChain(model, parts, plan, load_config(path), str(path))


def _without_dropout(config: Any) -> None:
    for name in vars(config):
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)


def _check_window(config: Any, path: Path) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise InputError(
            f"{path}: sliding_window={window} is shorter than max_position_embeddings="
            f"{config.max_position_embeddings}; only attention to all earlier tokens is supported: set sliding_window "
            "to null"
        )


class _Rotary:
    """Hook before a block: adds the rotary positions of its tokens."""

    def __init__(self, encoding: nn.Module) -> None:
        self.encoding = encoding

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        stream = inputs[0]
        positions = torch.arange(stream.shape[1], device=stream.device).unsqueeze(0)
        return inputs, {**named, "position_embeddings": self.encoding(stream, position_ids=positions)}


class _ShapesAlone:
    """Forward of a module whose result has the shape of its input; on the meta device that is all that is told."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        return torch.empty_like(x) if x.is_meta else self.forward(x)


class _AddedPositions(nn.Embedding):
    """A position embedding that is added to the stream."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, h] to [B, S, h]."""
        return x + super().forward(torch.arange(x.shape[1], device=x.device))


def _decoder(model: Any, kind: str) -> tuple[_Parts, Mapping[str, str]]:
    layers = model.model.layers
    for layer in layers:
        layer.register_forward_pre_hook(_Rotary(model.model.rotary_emb), with_kwargs=True)
        if kind == "mixtral":
            layer.mlp.forward = _ShapesAlone(layer.mlp.forward)
    columns = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    rows = ["self_attn.o_proj"]
    if kind != "mixtral":
        columns += ["mlp.gate_proj", "mlp.up_proj"]
        rows += ["mlp.down_proj"]
    inner = ["self_attn.q_norm", "self_attn.k_norm"] if kind == "qwen3" else []
    plan = {
        f"model.layers.*.{name}": style
        for names, style in ((columns, "colwise"), (rows, "rowwise"), (inner, "inner"))
        for name in names
    }
    blocks = tuple(f"model.layers.{index}" for index in range(len(layers)))
    return (("model.embed_tokens",), blocks, ("model.norm", "lm_head")), plan


def _gpt2(model: Any, kind: str) -> tuple[_Parts, Mapping[str, str]]:
    model.transformer.wpe.__class__ = _AddedPositions
    first = ("transformer.wte", "transformer.wpe")
    blocks = tuple(f"transformer.h.{index}" for index in range(len(model.transformer.h)))
    return (first, blocks, ("transformer.ln_f", "lm_head")), {}


def _bert(model: Any, kind: str) -> tuple[_Parts, Mapping[str, str]]:
    head = model.cls.predictions
    if head.bias is not head.decoder.bias:
        # A weight that nothing uses, where embedding and head are not tied.
        head.bias = None
    styles = {
        "attention.self.query": "colwise", "attention.self.key": "colwise", "attention.self.value": "colwise",
        "attention.output.dense": "rowwise", "attention.output.LayerNorm": "whole",
        "intermediate.dense": "colwise", "output.dense": "rowwise", "output.LayerNorm": "whole",
    }  # fmt: skip
    blocks = tuple(f"bert.encoder.layer.{index}" for index in range(len(model.bert.encoder.layer)))
    plan = {f"bert.encoder.layer.*.{name}": style for name, style in styles.items()}
    return (("bert.embeddings",), blocks, ("cls",)), plan


_FAMILIES: Mapping[str, Callable[[Any, str], tuple[_Parts, Mapping[str, str]]]] = {"gpt2": _gpt2, "bert": _bert}
