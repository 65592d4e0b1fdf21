"""OpGraph of a transformer from its numbers, without torch.

Symbols: b sequences, s tokens each, T = b s, h width, a heads, a_kv key-value heads, d head size, f feed-forward
width, V vocabulary, e bytes of an element. What autograd keeps is that of eager PyTorch with fused attention:
products and norms keep their input, activations their input, attention q, k, v, its output and the log-sum-exp.
A tensor counts at the first operation that keeps it, with its whole storage: a value that is a view of a fused qkv
product keeps all of that product. Gradients of a result with several users are added up in its producer's backward.

The graph that ``capture`` takes from the module of the same numbers is equal, operation by operation
(tests/model/test_capture.py). One kernel each is assumed for RMSNorm and rotary positions, as GPUs have them; where
eager PyTorch takes several (both on a CPU, rotary on any device without a fused one), the captured graph has more
traffic in these two operations and keeps more in them (RMSNorm its normalised input again, rotary its tables).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

from autopar.errors import InputError
from autopar.graph import (
    AttentionShape,
    MatmulShape,
    Op,
    OpGraph,
    OpKind,
    Parameter,
    SavedTensor,
    Split,
    check_graph,
)
from autopar.model.spec import ModelSpec, Norm, Position
from autopar.workload import Precision

INDEX_BYTES = 8
STATISTIC_BYTES = 4


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
    builder = _Builder(spec=spec, batch=batch_size, seq=seq_len, itemsize=precision.itemsize)
    stream = builder.embed()
    for block in range(spec.num_layers):
        stream = builder.transformer_block(block, stream)
    builder.head(stream)
    graph = OpGraph(
        name=spec.name,
        ops=tuple(_with_gradient_sums(builder.ops, builder.edges)),
        edges=tuple(builder.edges),
        num_blocks=spec.num_layers,
        batch_size=batch_size,
        seq_len=seq_len,
        itemsize=precision.itemsize,
    )
    check_graph(graph)
    return graph


def _with_gradient_sums(ops: list[Op], edges: list[tuple[str, str]]) -> list[Op]:
    """Add the traffic of summing gradients: each user of a result after the first reads two and writes one of its size.

    Operations that are priced by their shape carry no traffic.
    """
    users = Counter(producer for producer, _ in edges)
    return [
        dataclasses.replace(op, backward_bytes=op.backward_bytes + 3 * (users[op.name] - 1) * op.output_bytes)
        if users[op.name] > 1 and op.kind not in (OpKind.MATMUL, OpKind.ATTENTION)
        else op
        for op in ops
    ]


@dataclass(kw_only=True, slots=True)
class _Builder:
    """Collects operations; each method adds some and returns the name of the last."""

    spec: ModelSpec
    batch: int
    seq: int
    itemsize: int
    ops: list[Op] = field(default_factory=list)
    edges: list[tuple[str, str]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def activation_bytes(self, width: int) -> int:
        return self.tokens * width * self.itemsize

    def add(self, op: Op, *inputs: str) -> str:
        self.ops.append(op)
        self.edges.extend((producer, op.name) for producer in inputs)
        return op.name

    def linear(
        self, name: str, block: int, n: int, k: int, split: Split, source: str, *, keeps: Split | None, bias: bool
    ) -> str:
        """A product [T, k] x [k, n]; ``keeps`` is the split of the input that it keeps, None if kept before."""
        weight_split = split if split in (Split.COLUMN, Split.ROW, Split.VOCAB) else Split.NONE
        parameters = [Parameter(name=f"{name}.weight", elements=n * k, split=weight_split)]
        if bias:
            bias_split = Split.NONE if split is Split.ROW else weight_split
            parameters.append(Parameter(name=f"{name}.bias", elements=n, split=bias_split))
        saved = () if keeps is None else (self.kept(f"{name}.input", self.activation_bytes(k), keeps),)
        flops = 2 * self.tokens * n * k
        output_split = {Split.COLUMN: Split.FEATURES, Split.VOCAB: Split.VOCAB}.get(split, Split.TOKENS)
        op = Op(
            name=name,
            kind=OpKind.MATMUL,
            block=block,
            split=split,
            shape=MatmulShape(m=self.tokens, n=n, k=k),
            forward_flops=flops,
            backward_flops=2 * flops,
            parameters=tuple(parameters),
            saved=saved,
            output_bytes=self.activation_bytes(n),
            output_split=output_split,
        )
        return self.add(op, source)

    @staticmethod
    def kept(name: str, num_bytes: int, split: Split) -> SavedTensor:
        return SavedTensor(name=name, num_bytes=num_bytes, split=split)

    def normalization(self, name: str, block: int, source: str) -> str:
        h = self.spec.hidden_size
        centred = self.spec.norm is Norm.LAYERNORM
        parameters = [Parameter(name=f"{name}.weight", elements=h, split=Split.NONE)]
        if centred:
            parameters.append(Parameter(name=f"{name}.bias", elements=h, split=Split.NONE))
        statistics = self.tokens * STATISTIC_BYTES * (2 if centred else 1)
        op = Op(
            name=name,
            kind=OpKind.NORMALIZATION,
            block=block,
            split=Split.TOKENS,
            forward_bytes=2 * self.activation_bytes(h),
            backward_bytes=3 * self.activation_bytes(h),
            parameters=tuple(parameters),
            saved=(
                self.kept(f"{name}.input", self.activation_bytes(h), Split.TOKENS),
                self.kept(f"{name}.statistics", statistics, Split.TOKENS),
            ),
            output_bytes=self.activation_bytes(h),
        )
        return self.add(op, source)

    def residual(self, name: str, block: int, left: str, right: str, *, rows: int | None = None) -> str:
        """A sum; ``rows`` are the bytes of a right side without a batch, whose gradient backward sums over it."""
        size = self.activation_bytes(self.spec.hidden_size)
        op = Op(
            name=name,
            kind=OpKind.ELEMENTWISE,
            block=block,
            split=Split.TOKENS,
            forward_bytes=2 * size + (size if rows is None else rows),
            backward_bytes=0 if rows is None else size + rows,
            output_bytes=size,
        )
        return self.add(op, left, right)

    def embed(self) -> str:
        h = self.spec.hidden_size
        size = self.activation_bytes(h)
        weight = self.spec.vocab_size * h * self.itemsize
        stream = self.add(
            Op(
                name="embedding.token",
                kind=OpKind.EMBEDDING,
                block=-1,
                split=Split.VOCAB,
                forward_bytes=2 * size,
                # The gradient of a weight that the head shares is a sum of two.
                backward_bytes=2 * size + weight * (4 if self.spec.tied_embeddings else 1),
                parameters=(
                    Parameter(name="embedding.token.weight", elements=self.spec.vocab_size * h, split=Split.VOCAB),
                ),
                saved=(self.kept("embedding.token.input", self.tokens * INDEX_BYTES, Split.NONE),),
                output_bytes=size,
            )
        )
        if self.spec.position is not Position.LEARNED:
            return stream
        rows = self.seq * h * self.itemsize
        position = self.add(
            Op(
                name="embedding.position",
                kind=OpKind.EMBEDDING,
                block=-1,
                split=Split.NONE,
                forward_bytes=2 * rows,
                backward_bytes=2 * rows + self.spec.max_seq_len * h * self.itemsize,
                parameters=(
                    Parameter(name="embedding.position.weight", elements=self.spec.max_seq_len * h, split=Split.NONE),
                ),
                saved=(self.kept("embedding.position.input", self.seq * INDEX_BYTES, Split.NONE),),
                output_bytes=rows,
            )
        )
        return self.residual("embedding.add", -1, stream, position, rows=rows)

    def transformer_block(self, block: int, stream: str) -> str:
        prefix = f"blocks.{block}"
        normed = self.normalization(f"{prefix}.norm1", block, stream)
        attended = self.attention(f"{prefix}.attention", block, normed)
        stream = self.residual(f"{prefix}.add", block, stream, attended)
        normed = self.normalization(f"{prefix}.norm2", block, stream)
        fed = self.feed_forward(f"{prefix}.mlp", block, normed)
        return self.residual(f"{prefix}.add_1", block, stream, fed)

    def attention(self, prefix: str, block: int, source: str) -> str:
        spec, bias = self.spec, self.spec.bias
        query_width, kv_width = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        if spec.fused_qkv:
            width = query_width + 2 * kv_width
            qkv = self.linear(
                f"{prefix}.qkv", block, width, spec.hidden_size, Split.COLUMN, source, keeps=Split.GATHERED, bias=bias
            )
            inputs = [qkv]
        else:
            inputs = []
            for name, width in (("query", query_width), ("key", kv_width), ("value", kv_width)):
                keeps = None if inputs else Split.GATHERED
                inputs.append(
                    self.linear(
                        f"{prefix}.{name}", block, width, spec.hidden_size, Split.COLUMN, source, keeps=keeps, bias=bias
                    )
                )
        if spec.position is Position.ROTARY:
            *rotated, value = inputs if len(inputs) > 1 else inputs * 2
            inputs = [value, self.rotary(f"{prefix}.rotary", block, query_width + kv_width, rotated)]
        core = self.attention_core(f"{prefix}.sdpa", block, inputs)
        return self.linear(
            f"{prefix}.output", block, spec.hidden_size, query_width, Split.ROW, core, keeps=None, bias=bias
        )

    def rotary(self, name: str, block: int, width: int, inputs: list[str]) -> str:
        size = self.activation_bytes(width)
        op = Op(
            name=name,
            kind=OpKind.ELEMENTWISE,
            block=block,
            split=Split.FEATURES,
            forward_bytes=2 * size,
            backward_bytes=2 * size,
            output_bytes=size,
            output_split=Split.FEATURES,
        )
        return self.add(op, *inputs)

    def attention_core(self, name: str, block: int, inputs: list[str]) -> str:
        spec = self.spec
        query_width, kv_width = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        flops = 4 * self.batch * spec.num_heads * self.seq * self.seq * spec.head_size
        kept_width = query_width + 2 * kv_width
        if spec.fused_qkv and spec.position is Position.ROTARY:
            # The value is a view of the fused product, whose whole storage stays beside the rotated query and key.
            kept_width += query_width + kv_width
        saved = [
            self.kept(f"{name}.qkv", self.activation_bytes(kept_width), Split.FEATURES),
            self.kept(f"{name}.output", self.activation_bytes(query_width), Split.FEATURES),
            self.kept(f"{name}.logsumexp", self.tokens * spec.num_heads * STATISTIC_BYTES, Split.FEATURES),
        ]
        op = Op(
            name=name,
            kind=OpKind.ATTENTION,
            block=block,
            split=Split.FEATURES,
            shape=AttentionShape(
                batch=self.batch,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                query_len=self.seq,
                key_len=self.seq,
                head_size=spec.head_size,
                causal=spec.causal,
            ),
            forward_flops=flops,
            backward_flops=flops * 5 // 2,
            saved=tuple(saved),
            output_bytes=self.activation_bytes(query_width),
            output_split=Split.FEATURES,
        )
        return self.add(op, *inputs)

    def feed_forward(self, prefix: str, block: int, source: str) -> str:
        spec, f, h = self.spec, self.spec.ffn_size, self.spec.hidden_size
        inputs: list[str] = []
        for name in ("gate", "up") if spec.gated_mlp else ("up",):
            keeps = None if inputs else Split.GATHERED
            inputs.append(
                self.linear(f"{prefix}.{name}", block, f, h, Split.COLUMN, source, keeps=keeps, bias=spec.bias)
            )
        size = self.activation_bytes(f)
        saved = [self.kept(f"{prefix}.act.input", size * (2 if spec.gated_mlp else 1), Split.FEATURES)]
        if spec.gated_mlp:
            saved.append(self.kept(f"{prefix}.act.intermediate", size, Split.FEATURES))
        # Gated: silu (2 passes) and product (3); their backwards read and write 3 each, the product's twice.
        forward, backward = (5, 9) if spec.gated_mlp else (2, 3)
        op = Op(
            name=f"{prefix}.act",
            kind=OpKind.ACTIVATION,
            block=block,
            split=Split.FEATURES,
            forward_bytes=forward * size,
            backward_bytes=backward * size,
            saved=tuple(saved),
            output_bytes=size,
            output_split=Split.FEATURES,
        )
        activated = self.add(op, *inputs)
        return self.linear(f"{prefix}.down", block, h, f, Split.ROW, activated, keeps=Split.FEATURES, bias=spec.bias)

    def head(self, stream: str) -> str:
        spec, end = self.spec, self.spec.num_layers
        normed = self.normalization("norm", end, stream)
        logits = self.linear(
            "head", end, spec.vocab_size, spec.hidden_size, Split.VOCAB, normed, keeps=Split.GATHERED, bias=False
        )
        if spec.tied_embeddings:
            projection = self.ops[-1]
            weight = projection.parameters[0]
            tied = Parameter(
                name=weight.name, elements=weight.elements, split=weight.split, shared_with="embedding.token.weight"
            )
            self.ops[-1] = dataclasses.replace(projection, parameters=(tied,))
        size = self.tokens * spec.vocab_size * self.itemsize
        return self.add(
            Op(
                name="loss",
                kind=OpKind.LOSS,
                block=end,
                split=Split.VOCAB,
                forward_bytes=3 * size,
                backward_bytes=3 * size,
                saved=(
                    self.kept("loss.log_softmax", size, Split.VOCAB),
                    self.kept("loss.target", self.tokens * INDEX_BYTES + STATISTIC_BYTES, Split.NONE),
                ),
                output_bytes=STATISTIC_BYTES,
                output_split=Split.NONE,
            ),
            logits,
        )
