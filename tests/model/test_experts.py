"""Graphs of mixtures of experts, latent attention, multi-token prediction, windows, norms of heads and dropout."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autopar.errors import InputError
from autopar.graph import RECOMPUTE_MODULES, AttentionShape, MatmulShape, Op, OpGraph, OpKind, Split
from autopar.model import transformer
from autopar.model.build import build_graph
from autopar.model.huggingface import load_config
from autopar.model.presets import load_preset
from autopar.model.spec import Latent, ModelSpec, Norm, Position
from autopar.workload import Precision

# Released checkpoints and model cards, in billions: all weights, and those of one token. gpt-oss counts no embedding
# among the active ones (model card, table 1); DeepSeek-V3 counts no multi-token prediction.
PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9), "mixtral-8x22b": (140.6, 39.1), "deepseek-v2": (235.7, 21.4),
    "deepseek-v2-lite": (15.7, 2.66), "deepseek-v3": (671.0, 37.6), "qwen3-30b-a3b": (30.5, 3.35),
    "qwen3-235b-a22b": (235.1, 22.2), "gpt-oss-20b": (20.91, 3.61), "gpt-oss-120b": (116.83, 5.13),
    "moonlight-16b-a3b": (15.96, 2.92), "kimi-k2": (1026.4, 32.9), "llama4-scout": (107.77, 17.17),
    "qwen3-8b": (8.19, 8.19), "qwen3-14b": (14.77, 14.77), "qwen3-32b": (32.76, 32.76), "bloom-176b": (176.25, 176.25),
    "nemotron-4-15b": (15.6, 15.6), "nemotron-4-340b": (341.0, 341.0), "megatron-145b": (145.6, 145.6),
    "megatron-1t": (1008.0, 1008.0), "megatron-22b": (22.07, 22.07),
}  # fmt: skip

SMALL = ModelSpec(
    name="small", num_layers=3, hidden_size=24, num_heads=4, num_kv_heads=2, ffn_size=56, vocab_size=40, max_seq_len=64,
    gated_mlp=True, norm=Norm.RMSNORM, position=Position.ROTARY, bias=False, fused_qkv=False,
)  # fmt: skip
LATENT = Latent(q_rank=12, kv_rank=8, nope_size=6, rope_size=4, value_size=5)
EXPERTS = dataclasses.replace(
    SMALL, name="experts", num_experts=8, top_k=2, expert_ffn_size=16, shared_ffn_size=20, dense_layers=1
)


def graph_of(spec: ModelSpec, **changes: Any) -> OpGraph:
    return build_graph(dataclasses.replace(spec, **changes), seq_len=32, batch_size=3, precision=Precision.FP32)


def ops_of(graph: OpGraph, block: int) -> dict[str, Op]:
    prefix = f"blocks.{block}."
    return {op.name.removeprefix(prefix): op for op in graph.block_ops(block)}


def saved(op: Op) -> dict[str, int]:
    return {tensor.name.rpartition(".")[2]: tensor.num_bytes for tensor in op.saved}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_and_active_weights_are_the_published_ones(name: str) -> None:
    spec = dataclasses.replace(load_preset(name), mtp_layers=0)
    graph = build_graph(spec, seq_len=64)
    total, active = PUBLISHED[name]
    uncounted = spec.vocab_size * spec.hidden_size if name.startswith("gpt-oss") else 0
    assert graph.num_parameters == pytest.approx(total * 1e9, rel=3e-3)
    assert graph.active_parameters - uncounted == pytest.approx(active * 1e9, rel=5e-3)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-235b-a22b", "gpt-oss-120b", "llama3.1-405b"])
def test_flops_of_a_token_are_six_per_active_weight_and_attention(name: str) -> None:
    """6 N + 12 L a d s, N the active weights of products: published tables of training runs count like this."""
    spec, s = load_preset(name), 4096
    graph = build_graph(spec, seq_len=s)
    products = graph.active_parameters - spec.vocab_size * spec.hidden_size
    expected = 6 * products + 12 * spec.num_layers * spec.num_heads * spec.head_size * s
    # Biases and norms are weights without products.
    assert 3 * graph.model_flops()[0] / s == pytest.approx(expected, rel=1e-3)


def test_multi_token_prediction_adds_its_published_weights_and_flops() -> None:
    """DeepSeek-V3's report: 671 billion without it; the released checkpoint has 11.5 billion weights of it."""
    spec = load_preset("deepseek-v3")
    base, more = (build_graph(dataclasses.replace(spec, mtp_layers=n), seq_len=128) for n in (0, 1))
    assert more.num_parameters - base.num_parameters == pytest.approx(11.6e9, rel=0.01)
    forward = [sum(op.forward_flops for op in graph.ops) for graph in (base, more)]
    head = 2 * 128 * spec.vocab_size * spec.hidden_size
    block = sum(op.forward_flops for op in base.block_ops(60))
    assert forward[1] - forward[0] == block + head + 2 * 128 * 2 * spec.hidden_size**2
    assert more.num_blocks == base.num_blocks == 61
    shared = {p.name: p.shared_with for op in more.ops for p in op.parameters if p.shared_with}
    assert shared == {"mtp.0.embedding.weight": "embedding.token.weight", "mtp.0.head.weight": "head.weight"}


def test_blocks_before_dense_layers_have_no_experts() -> None:
    graph = graph_of(EXPERTS)
    assert "mlp.down" in ops_of(graph, 0) and not any("moe" in name for name in ops_of(graph, 0))
    assert {name for name in ops_of(graph, 1) if name.startswith("moe.")} == {
        "moe.shared.gate", "moe.shared.up", "moe.shared.act", "moe.shared.down", "moe.router", "moe.dispatch",
        "moe.up", "moe.act", "moe.down", "moe.combine", "moe.add",
    }  # fmt: skip
    assert (graph.num_experts, graph.top_k, graph.expert_width) == (8, 2, 16)
    assert graph_of(SMALL).num_experts == 0


def test_experts_products_are_grouped() -> None:
    ops = ops_of(graph_of(EXPERTS), 1)
    rows = 3 * 32 * 2
    assert ops["moe.up"].shape == MatmulShape(m=rows, n=32, k=24, groups=8)
    assert ops["moe.down"].shape == MatmulShape(m=rows, n=24, k=16, groups=8)
    assert ops["moe.up"].num_parameters == 8 * 32 * 24
    assert [ops[name].split for name in ("moe.up", "moe.down")] == [Split.EXPERT_COLUMN, Split.EXPERT_ROW]
    assert [ops[f"moe.{n}"].output_split for n in ("dispatch", "up", "act", "down", "combine")] == [
        Split.EXPERT_TOKENS, Split.EXPERT_FEATURES, Split.EXPERT_FEATURES, Split.EXPERT_TOKENS, Split.TOKENS,
    ]  # fmt: skip


class Experts(nn.Module):
    """A mixture of experts with every kernel written out, tokens sent round robin."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.top_k = spec.top_k
        self.router = nn.Linear(spec.hidden_size, spec.num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(spec.num_experts, spec.hidden_size, 2 * spec.expert_ffn_size))
        self.down = nn.Parameter(torch.randn(spec.num_experts, spec.expert_ffn_size, spec.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        experts, tokens = self.up.shape[0], x.shape[0]
        scores = self.router(x).softmax(dim=-1)
        chosen = (torch.arange(tokens * self.top_k) % experts).view(tokens, self.top_k)
        weights = scores.gather(1, chosen)
        order = chosen.flatten().argsort(stable=True)
        rows = x[order // self.top_k].view(experts, -1, x.shape[1])
        inner = torch.bmm(rows, self.up)
        gate, up = inner.chunk(2, dim=-1)
        outer = torch.bmm(F.silu(gate) * up, self.down).flatten(0, 1)
        weighted = outer * weights.flatten()[order].unsqueeze(1)
        return weighted[order.argsort()].view(tokens, self.top_k, -1).sum(1)


def test_experts_agree_with_a_module() -> None:
    """FLOPs of both passes and the floating point tensors that autograd keeps."""
    spec = dataclasses.replace(EXPERTS, shared_ffn_size=0)
    ops = {k: op for k, op in ops_of(graph_of(spec), 1).items() if k.startswith("moe.")}
    module, x = Experts(spec), torch.randn(96, 24, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x).sum().backward()
    assert counter.get_total_flops() == sum(op.forward_flops + op.backward_flops for op in ops.values())
    measured = sum(t.untyped_storage().nbytes() for a, t in kept.items() if a not in weights and t.is_floating_point())
    indices = saved(ops["moe.router"])["map"] + saved(ops["moe.dispatch"])["order"]
    assert measured == sum(op.saved_bytes for op in ops.values()) - indices


def test_kept_activations_of_deepseek_v3() -> None:
    """Bytes per token of a block, measured memory of which a published formula reproduces within 0.7 percent.

    2 [4 h + (2 (nope + rope) + value) a + 2 q_rank + (kv_rank + rope) + kv_rank + value a + 3 shared + k (2 h + 3 f)],
    with a fused activation; statistics, routing and the log-sum-exp aside.
    """
    spec = load_preset("deepseek-v3")
    graph = build_graph(spec, seq_len=64)
    small = ("statistics", "intermediate", "scores", "map", "order", "weights", "logsumexp")
    kept = sum(tensor.num_bytes for op in graph.block_ops(10) for tensor in op.saved if not tensor.name.endswith(small))
    h, a = 7168, 128
    attention = (2 * 192 + 128) * a + 2 * 1536 + 576 + 512 + 128 * a
    assert kept == 64 * 2 * (4 * h + attention + 3 * 2048 + 8 * (2 * h + 3 * 2048))


def test_latent_attention_has_wide_keys_and_narrow_values() -> None:
    graph = graph_of(SMALL, num_kv_heads=4, latent=LATENT)
    ops = ops_of(graph, 0)
    shape = ops["attention.sdpa"].shape
    assert isinstance(shape, AttentionShape)
    assert (shape.num_kv_heads, shape.head_size, shape.value_size) == (4, 10, 5)
    tokens, s, a = 96, 32, 4
    assert ops["attention.sdpa"].forward_flops == 2 * tokens * s * a * (10 + 5)
    assert ops["attention.sdpa"].backward_flops == 2 * tokens * s * a * (3 * 10 + 2 * 5)
    products = {name: op.shape for name, op in ops.items() if op.kind is OpKind.MATMUL and "attention" in name}
    assert products == {
        "attention.query_down": MatmulShape(m=tokens, n=12, k=24),
        "attention.query_up": MatmulShape(m=tokens, n=40, k=12),
        "attention.kv_down": MatmulShape(m=tokens, n=12, k=24),
        "attention.kv_up": MatmulShape(m=tokens, n=44, k=8),
        "attention.output": MatmulShape(m=tokens, n=24, k=20),
    }
    # The latents are whole on every tensor parallel rank, heads are divided.
    assert ops["attention.query_down"].split is ops["attention.kv_down"].split is Split.TOKENS
    assert ops["attention.query_up"].split is ops["attention.kv_up"].split is Split.COLUMN


class LatentAttention(nn.Module):
    """Latent attention with every product written out, positions left out."""

    def __init__(self, h: int, a: int, latent: Latent) -> None:
        super().__init__()
        self.latent, self.heads = latent, a
        self.query_down = nn.Linear(h, latent.q_rank, bias=False)
        self.query_up = nn.Linear(latent.q_rank, a * (latent.nope_size + latent.rope_size), bias=False)
        self.kv_down = nn.Linear(h, latent.kv_rank + latent.rope_size, bias=False)
        self.kv_up = nn.Linear(latent.kv_rank, a * (latent.nope_size + latent.value_size), bias=False)
        self.output = nn.Linear(a * latent.value_size, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        sizes = (self.latent.nope_size, self.latent.value_size)
        query = self.query_up(self.query_down(x)).view(b, s, self.heads, -1)
        narrow, rope = self.kv_down(x).split((self.latent.kv_rank, self.latent.rope_size), dim=-1)
        key, value = self.kv_up(narrow).view(b, s, self.heads, -1).split(sizes, dim=-1)
        key = torch.cat((key, rope.unsqueeze(2).expand(-1, -1, self.heads, -1)), dim=-1)
        scores = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1))
        mixed = torch.matmul(scores, value.transpose(1, 2))
        return self.output(mixed.transpose(1, 2).reshape(b, s, -1))


def test_latent_attention_agrees_with_a_module() -> None:
    """Products and weights; fused attention computes the scores once more in backward than the written out one."""
    spec = dataclasses.replace(SMALL, num_kv_heads=4, latent=LATENT)
    ops = {k: op for k, op in ops_of(graph_of(spec), 0).items() if k.startswith("attention.")}
    module, x = LatentAttention(24, 4, LATENT), torch.randn(3, 32, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    again = 2 * 96 * 32 * 4 * 10
    assert counter.get_total_flops() + again == sum(op.forward_flops + op.backward_flops for op in ops.values())
    norms = LATENT.q_rank + LATENT.kv_rank
    assert sum(p.numel() for p in module.parameters()) + norms == sum(op.num_parameters for op in ops.values())


def test_queries_without_a_latent() -> None:
    ops = ops_of(graph_of(SMALL, num_kv_heads=4, latent=dataclasses.replace(LATENT, q_rank=0)), 0)
    assert ops["attention.query"].shape == MatmulShape(m=96, n=40, k=24)
    assert "attention.query_down" not in ops and saved(ops["attention.kv_down"]) == {}


def test_every_second_block_has_a_window() -> None:
    graph = graph_of(SMALL, window=8)
    windows = [op.shape.window for op in graph.ops if isinstance(op.shape, AttentionShape)]
    assert windows == [8, 0, 8]
    whole = [op.shape.window for op in graph_of(SMALL, window=32).ops if isinstance(op.shape, AttentionShape)]
    assert whole == [0, 0, 0], "a window of the whole sequence is none"


@pytest.mark.parametrize("fused", [False, True])
def test_norms_of_heads_keep_their_input_once(fused: bool) -> None:
    plain, normed = (ops_of(graph_of(SMALL, fused_qkv=fused, qk_norm=on), 0) for on in (False, True))
    norm = normed["attention.qk_norm"]
    assert norm.num_parameters == 2 * 6
    query_key = 96 * (4 + 2) * 6 * 4
    kept = [sum(op.saved_bytes for name, op in ops.items() if "attention" in name) for ops in (plain, normed)]
    # A fused product is kept whole already, for its value.
    assert kept[1] - kept[0] == saved(norm)["statistics"] + (0 if fused else query_key)
    assert saved(norm)["statistics"] == 96 * 6 * 4


def test_dropout_is_korthikanti_s_34_bytes() -> None:
    """Korthikanti et al. 2022, section 4.1: 34 s b h without the attention matrix, of which 2 are dropout masks."""
    spec = dataclasses.replace(load_preset("gpt3-1.3b"), dropout=True)
    b, s, h = 2, 1024, spec.hidden_size
    graph = build_graph(spec, seq_len=s, batch_size=b)
    kept = sum(op.saved_bytes for op in graph.block_ops(0))
    assert kept == 34 * s * b * h + b * s * (16 + 4 * spec.num_heads)
    size = b * s * h
    add = ops_of(graph, 0)["add"]
    assert (add.forward_bytes, saved(add)) == (3 * 2 * size + size, {"mask": size})
    assert add.backward_bytes == 2 * 2 * size + size + 3 * 2 * size  # the last: two users' gradients added up
    assert [op.name for op in graph.block_ops(-1)][-1] == graph.stream_start == "embedding.dropout"
    assert graph.attention is not None and graph.attention.dropout


def test_modules_and_what_recomputing_them_frees() -> None:
    graph = graph_of(EXPERTS, latent=LATENT, num_kv_heads=4)
    dense, experts = ops_of(graph, 0), ops_of(graph, 1)
    assert {op.module for op in graph.ops} == {"", *RECOMPUTE_MODULES} - {"op_level"}
    assert {name for name, op in dense.items() if op.module == "mlp"} == {"mlp.gate", "mlp.up", "mlp.act", "mlp.down"}
    assert {name for name, op in experts.items() if op.module == "moe_act"} == {"moe.act"}
    assert all(op.module == "moe" for name, op in experts.items() if name.startswith("moe.") and name != "moe.act")

    def freed(ops: dict[str, Op], module: str) -> set[str]:
        return {
            tensor.name.partition(".")[2].partition(".")[2]
            for op in ops.values() for tensor in op.saved if tensor.made_by == module
        }  # fmt: skip

    assert freed(dense, "core_attn") == {"attention.sdpa.logsumexp"}
    assert freed(dense, "layernorm") == {
        "norm1.statistics", "norm2.statistics", "attention.query_down.input", "mlp.gate.input",
    }  # fmt: skip
    assert freed(dense, "mlp") == {"mlp.act.input", "mlp.act.intermediate", "mlp.down.input"}
    assert freed(dense, "mla_up_proj") == {
        "attention.sdpa.qkv", "attention.query_up.input", "attention.kv_up.input",
        "attention.query_norm.statistics", "attention.kv_norm.statistics",
    }  # fmt: skip
    assert freed(experts, "moe_act") == {"moe.act.intermediate", "moe.down.input"}
    assert freed(experts, "moe") == {
        "moe.shared.act.input", "moe.shared.act.intermediate", "moe.shared.down.input", "moe.router.scores",
        "moe.router.map", "moe.dispatch.order", "moe.up.input", "moe.act.input", "moe.combine.input",
        "moe.combine.weights",
    }  # fmt: skip
    # The stream, the result of attention and the input of the whole mixture stay.
    assert "moe.shared.gate.input" in freed(experts, "layernorm")


def test_experts_grow_linearly_with_the_batch() -> None:
    one, three = (build_graph(EXPERTS, seq_len=32, batch_size=batch) for batch in (1, 3))
    assert three.model_flops() == tuple(3 * flops for flops in one.model_flops())
    assert sum(op.saved_bytes for op in three.block_ops(1)) == 3 * sum(op.saved_bytes for op in one.block_ops(1))
    assert three.active_parameters == one.active_parameters


@pytest.mark.parametrize("precision", [Precision.FP8, Precision.FP8_BLOCK, Precision.MXFP8, Precision.NVFP4])
def test_narrow_products_keep_bf16_tensors(precision: Precision) -> None:
    assert precision.base is Precision.BF16 and precision.itemsize == 2
    assert build_graph(SMALL, seq_len=16, precision=precision) == build_graph(SMALL, seq_len=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, "top_k=9 of 8 experts"),
        ({"top_k": 0}, "top_k=0 of 8 experts"),
        ({"expert_ffn_size": 0}, "expert_ffn_size is 0"),
        ({"dense_layers": 4}, "dense_layers=4 of 3 blocks"),
        ({"num_experts": 0}, "describes experts, but num_experts is 0"),
        ({"window": -1}, "window is -1"),
    ],
)
def test_wrong_numbers_of_experts(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(EXPERTS, **change)


def test_what_the_module_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match="has no qk_norm; it can be planned but not run"):
        transformer.build(dataclasses.replace(EXPERTS, qk_norm=True))


DEEPSEEK = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_nextn_predict_layers": 1, "vocab_size": 129280, "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v3": DEEPSEEK,
    "moonlight-16b-a3b": DEEPSEEK | {
        "num_hidden_layers": 27, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None, "num_nextn_predict_layers": 0,
        "vocab_size": 163840, "max_position_embeddings": 8192,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": None,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "vocab_size": 151936, "max_position_embeddings": 40960,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
        "num_experts_per_tok": 4, "sliding_window": 128, "vocab_size": 201088, "max_position_embeddings": 131072,
    },
    "mpt-7b": {
        "model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "expansion_ratio": 4, "max_seq_len": 2048,
        "vocab_size": 50368, "no_bias": False, "learned_pos_emb": True, "attn_config": {"attn_impl": "triton"},
    },
    "bloom-176b": {
        "model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "vocab_size": 250880,
        "seq_length": 2048,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_hugging_face_configs_are_the_presets(tmp_path, name: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[name] | {"name": name}))
    assert load_config(path) == load_preset(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; only experts in every block"),
        ({"kv_lora_rank": None}, "key 'kv_lora_rank' is None"),
        ({"n_routed_experts": None}, "key 'n_routed_experts' is None"),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DEEPSEEK | change))
    with pytest.raises(InputError, match=message):
        load_config(path)


def test_released_mpt_has_no_learned_positions(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["mpt-7b"] | {"no_bias": True, "attn_config": {"alibi": True}}))
    spec = load_config(path)
    assert (spec.position, spec.bias) == (Position.NONE, False)
    # MPT-7B is published with 6.65 billion weights.
    assert build_graph(spec, seq_len=64).num_parameters == pytest.approx(6.65e9, rel=2e-3)
