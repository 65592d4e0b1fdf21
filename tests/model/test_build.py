from __future__ import annotations

import json

import networkx as nx
import pytest

from autopar.errors import InputError
from autopar.graph import OpKind, Split
from autopar.model.build import build_graph
from autopar.model.huggingface import load_config
from autopar.model.presets import load_preset, preset_names
from autopar.workload import Precision

PUBLISHED_PARAMETERS = {
    # Papers and released checkpoints; padded vocabularies move GPT-3 by less than the tolerance.
    "gpt2-small": 124.4e6, "gpt2-medium": 354.8e6, "gpt2-large": 774.0e6, "gpt2-xl": 1557.6e6,
    "gpt3-175b": 174.6e9, "llama2-7b": 6.738e9, "llama2-13b": 13.016e9, "llama2-70b": 68.98e9,
    "llama3-8b": 8.030e9, "llama3.2-1b": 1.2358e9, "llama3.2-3b": 3.2127e9,
    "llama3-70b": 70.55e9, "llama3.1-405b": 405.85e9, "bert-large": 334e6, "roberta-large": 354e6,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_presets_have_the_published_number_of_weights(name: str) -> None:
    graph = build_graph(load_preset(name), seq_len=512)
    assert graph.num_parameters == pytest.approx(PUBLISHED_PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_a_sound_graph(name: str) -> None:
    spec = load_preset(name)
    graph = build_graph(spec, seq_len=128)
    assert nx.is_directed_acyclic_graph(graph.digraph())
    sizes = [len(graph.block_ops(block)) for block in range(graph.num_blocks)]
    assert len(set(sizes[: spec.dense_layers])) <= 1 and len(set(sizes[spec.dense_layers :])) == 1


def test_flops_are_the_closed_form() -> None:
    """Narayanan et al. 2021: 24 B s l h^2 (1 + s/(6h) + V/(12 l h)) forward, and twice that backward."""
    spec = load_preset("gpt3-175b")
    b, s, h, layers, v = 3, 2048, spec.hidden_size, spec.num_layers, spec.vocab_size
    graph = build_graph(spec, seq_len=s, batch_size=b)
    forward = 24 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))
    assert graph.model_flops()[0] == pytest.approx(forward, rel=1e-12)


def test_kept_activations_are_those_of_korthikanti_without_dropout() -> None:
    """Korthikanti et al. 2022, section 4.1, 16 bit: 34 s b h, less dropout masks (3) and with fused attention.

    Kept: norm inputs 4, qkv input 2, qkv 6, attention output 2, mlp input 2, GELU input 8, down input 8 = 32 s b h,
    plus statistics: two norms x 8 bytes a token, 4 bytes a token and head.
    """
    spec = load_preset("gpt3-1.3b")
    b, s, h = 2, 1024, spec.hidden_size
    graph = build_graph(spec, seq_len=s, batch_size=b)
    kept = sum(op.saved_bytes for op in graph.block_ops(0))
    assert kept == 32 * s * b * h + b * s * (16 + 4 * spec.num_heads)


def test_numbers_grow_linearly_with_the_batch() -> None:
    spec = load_preset("demo-gpt")
    one, three = (build_graph(spec, seq_len=64, batch_size=batch) for batch in (1, 3))
    assert three.model_flops() == tuple(3 * flops for flops in one.model_flops())
    block = [sum(op.saved_bytes for op in graph.block_ops(0)) for graph in (one, three)]
    assert block[1] == 3 * block[0]


def test_tied_embeddings_count_once() -> None:
    graph = build_graph(load_preset("gpt2-small"), seq_len=128)
    head = next(op for op in graph.ops if op.name == "head")
    assert head.parameters[0].shared_with == "embedding.token.weight"
    assert head.num_parameters == 0


def test_splits_pair_up() -> None:
    graph = build_graph(load_preset("llama3-8b"), seq_len=128)
    for block in range(graph.num_blocks):
        matmuls = [op for op in graph.block_ops(block) if op.kind is OpKind.MATMUL]
        assert [op.split for op in matmuls].count(Split.ROW) == 2
        gathers = [t for op in matmuls for t in op.saved if t.split is Split.GATHERED]
        assert len(gathers) == 2


def test_a_sequence_longer_than_the_positions() -> None:
    with pytest.raises(InputError, match="seq_len=2048 is longer than its 1024 learned positions"):
        build_graph(load_preset("gpt2-small"), seq_len=2048)


def test_precision_sets_bytes() -> None:
    spec = load_preset("demo-gpt")
    wide, narrow = (build_graph(spec, seq_len=64, precision=p) for p in (Precision.FP32, Precision.BF16))
    assert wide.ops[3].output_bytes == 2 * narrow.ops[3].output_bytes


def test_unknown_presets_name_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown model 'lama3-70b'; did you mean 'llama3-70b'"):
        load_preset("lama3-70b")


def test_hugging_face_configs(tmp_path) -> None:
    folder = tmp_path / "my-llama"
    folder.mkdir()
    path = folder / "config.json"
    llama = {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    }  # fmt: skip
    path.write_text(json.dumps(llama))
    spec = load_config(path)
    assert spec.name == "my-llama"
    assert (
        build_graph(spec, seq_len=128).num_parameters
        == build_graph(load_preset("llama3-70b"), seq_len=128).num_parameters
    )
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    path.write_text(json.dumps(gpt2))
    assert build_graph(load_config(path), seq_len=128).num_parameters == 124439808
    path.write_text(json.dumps({**llama, "num_hidden_layers": "many"}))
    with pytest.raises(InputError, match="key 'num_hidden_layers' is 'many'"):
        load_config(path)
    path.write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(InputError, match="model_type 'mamba' is not supported"):
        load_config(path)
