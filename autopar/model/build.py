"""OpGraph of a transformer from its numbers, without torch.

Symbols: b sequences, s tokens each, T = b s, h width, a heads, a_kv key-value heads, d head size, f feed-forward
width, V vocabulary, E experts, k experts of a token, e bytes of an element. What autograd keeps is that of eager
PyTorch with fused attention: products and norms keep their input, activations their input, attention q, k, v, its
output and the log-sum-exp. A tensor counts at the first operation that keeps it, with its whole storage: a value that
is a view of a fused qkv product keeps all of that product. Gradients of a result with several users are added up in
its producer's backward.

The graph that ``capture`` takes from the module of the same numbers is equal, operation by operation
(tests/model/test_capture.py). One kernel each is assumed for RMSNorm and rotary positions, as GPUs have them; where
eager PyTorch takes several (both on a CPU, rotary on any device without a fused one), the captured graph has more
traffic in these two operations and keeps more in them (RMSNorm its normalised input again, rotary its tables).
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from autopar.errors import InputError
from autopar.graph import Op, OpGraph, OpKind, check_graph
from autopar.model.layers.attention import attention
from autopar.model.layers.builder import Builder
from autopar.model.layers.ends import embed, head, multi_token_head
from autopar.model.layers.feed_forward import feed_forward
from autopar.model.layers.moe import mixture_of_experts
from autopar.model.spec import ModelSpec, Position
from autopar.model.tags import with_makers
from autopar.workload import Precision

PRICED_BY_SHAPE = (OpKind.MATMUL, OpKind.GROUPED_MATMUL, OpKind.ATTENTION)


def build_graph(
    spec: ModelSpec, *, seq_len: int, batch_size: int = 1, precision: Precision = Precision.BF16
) -> OpGraph:
    """Build the graph of one microbatch of ``batch_size`` sequences of ``seq_len`` tokens.

    Raises:
        InputError: the sequence is longer than a learned position embedding.
    """
    if spec.position is Position.LEARNED and seq_len > spec.max_seq_len:
        raise InputError(
            f"model {spec.name}: seq_len={seq_len} is longer than its {spec.max_seq_len} learned positions"
        )
    builder = Builder(spec=spec, batch=batch_size, seq=seq_len, itemsize=precision.itemsize)
    stream = embed(builder)
    for block in range(spec.num_layers):
        stream = transformer_block(builder, f"blocks.{block}", block, stream)
    head(builder, stream)
    for depth in range(spec.mtp_layers):
        stream = multi_token_head(builder, f"mtp.{depth}", stream, transformer_block)
    graph = OpGraph(
        name=spec.name,
        ops=tuple(_with_wide_blocks(with_makers(_with_gradient_sums(builder.ops, builder.edges), builder.edges), spec)),
        edges=tuple(builder.edges),
        num_blocks=spec.num_layers,
        batch_size=batch_size,
        seq_len=seq_len,
        itemsize=precision.itemsize,
    )
    check_graph(graph)
    return graph


def transformer_block(builder: Builder, prefix: str, block: int, stream: str) -> str:
    """Attention and feed-forward (dense, or a mixture of experts), each normalised before and added after."""
    spec = builder.spec
    normed = builder.stream_norm(f"{prefix}.norm1", block, stream)
    attended = attention(builder, f"{prefix}.attention", block, normed)
    stream = builder.residual(f"{prefix}.add", block, stream, attended, dropout=spec.dropout)
    normed = builder.stream_norm(f"{prefix}.norm2", block, stream)
    if spec.num_experts and block >= spec.dense_layers:
        fed = mixture_of_experts(builder, f"{prefix}.moe", block, normed)
    else:
        fed = feed_forward(builder, f"{prefix}.mlp", block, normed, width=spec.ffn_size, module="mlp")
    return builder.residual(f"{prefix}.add_1", block, stream, fed, dropout=spec.dropout)


def _with_wide_blocks(ops: list[Op], spec: ModelSpec) -> list[Op]:
    """Mark the products of the last blocks that stay in bf16."""
    first = spec.num_layers - spec.wide_blocks
    return [dataclasses.replace(op, wide=True) if first <= op.block < spec.num_layers else op for op in ops]


def _with_gradient_sums(ops: list[Op], edges: list[tuple[str, str]]) -> list[Op]:
    """Add the traffic of summing gradients: each user of a result after the first reads two and writes one of its size.

    Operations that are priced by their shape carry no traffic.
    """
    users = Counter(producer for producer, _ in edges)
    return [
        dataclasses.replace(op, backward_bytes=op.backward_bytes + 3 * (users[op.name] - 1) * op.output_bytes)
        if users[op.name] > 1 and op.kind not in PRICED_BY_SHAPE
        else op
        for op in ops
    ]
