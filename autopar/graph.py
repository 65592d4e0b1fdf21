"""The model as operations: what each computes, reads, keeps for backward, and how ranks may divide it.

A graph describes one microbatch of ``batch_size`` sequences on one device, before any layout. Everything that
depends on activations grows linearly with the batch, so one graph prices every microbatch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx


class OpKind(StrEnum):
    """What decides the cost of an operation."""

    MATMUL = "matmul"
    ATTENTION = "attention"
    NORMALIZATION = "normalization"
    ELEMENTWISE = "elementwise"
    ACTIVATION = "activation"
    EMBEDDING = "embedding"
    LOSS = "loss"
    ROUTER = "router"
    PERMUTE = "permute"
    GROUPED_MATMUL = "grouped matmul"


class Split(StrEnum):
    """How tensor parallelism divides an operation, a parameter or a kept tensor.

    TOKENS are activations between column-row pairs: whole on every tensor parallel rank, or divided along the
    sequence under sequence parallelism. GATHERED are the same activations as the input of a column-parallel
    product: sequence parallelism gathers them first. FEATURES lie inside a pair and are always divided. COLUMN
    and ROW are weights (and their products) divided by output and by input features. VOCAB is divided where the
    stack shards the vocabulary. NONE is whole on every rank.

    Experts have their own ranks (``Layout.ep`` and ``Layout.etp``). EXPERT_TOKENS are rows routed to experts, as
    wide as the residual stream; EXPERT_FEATURES the rows inside an expert. EXPERT_COLUMN and EXPERT_ROW are the
    experts' weights (and their products): every ep rank holds its experts, divided over etp by output or input
    features.
    """

    NONE = "none"
    TOKENS = "tokens"
    GATHERED = "gathered"
    FEATURES = "features"
    COLUMN = "column"
    ROW = "row"
    VOCAB = "vocab"
    EXPERT_TOKENS = "expert tokens"
    EXPERT_FEATURES = "expert features"
    EXPERT_COLUMN = "expert column"
    EXPERT_ROW = "expert row"


# Names as in Megatron-Core's --recompute-modules. "moe" is the whole mixture of experts: it covers "moe_act".
RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm", "moe_act", "moe", "mla_up_proj", "op_level")


@dataclass(frozen=True, kw_only=True, slots=True)
class MatmulShape:
    """Product of [m, k] by [k, n]; m grows with the batch.

    Grouped (``groups`` > 1): m rows in all, divided among ``groups`` experts, each with its own [k, n].
    """

    m: int
    n: int
    k: int
    groups: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Scaled dot product attention of ``batch`` sequences.

    Attributes:
        value_size: width of a value's head; 0 means head_size.
        window: tokens that a token sees, itself included; 0 is the whole sequence.
        dropout: attention probabilities are dropped.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    query_len: int
    key_len: int
    head_size: int
    causal: bool
    value_size: int = 0
    window: int = 0
    dropout: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A weight. ``shared_with`` names the parameter whose storage it uses (tied embeddings)."""

    name: str
    elements: int
    split: Split
    shared_with: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedTensor:
    """A tensor that autograd keeps from forward to backward, owned by the first operation that keeps it.

    ``num_bytes`` is whole but for tensors of less than a byte an element.

    ``made_by`` is the recompute module (one of RECOMPUTE_MODULES) of the operation that produced it, so that
    recomputing that module frees it; empty if none did.
    """

    name: str
    num_bytes: float
    split: Split
    made_by: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operation with its backward.

    Attributes:
        name: module path, with a suffix where one module does several things.
        kind: what prices it.
        block: index of the repeated block; -1 before the first, ``num_blocks`` after the last.
        split: how tensor parallelism divides it.
        shape: of a product or an attention.
        forward_flops, backward_flops: of products and attention, mask not subtracted.
        forward_bytes, backward_bytes: memory traffic of memory-bound operations (read and written).
        parameters: weights that it owns or shares.
        saved: what backward needs, see SavedTensor.
        output_bytes: size of its result.
        output_split: how tensor parallelism divides its result.
        module: the part of a block that is recomputed together, one of RECOMPUTE_MODULES: ``core_attn`` (attention
            without its products), ``layernorm``, ``mlp`` (dense feed-forward), ``moe_act`` (activation of the
            experts), ``moe`` (the rest of router, experts and shared expert), ``mla_up_proj`` (from the latents to
            queries, keys and values); empty otherwise.
        wide: a product that stays in bf16 under a narrower precision of the workload.
    """

    name: str
    kind: OpKind
    block: int
    split: Split
    shape: MatmulShape | AttentionShape | None = None
    forward_flops: int = 0
    backward_flops: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    parameters: tuple[Parameter, ...] = ()
    saved: tuple[SavedTensor, ...] = ()
    output_bytes: int = 0
    output_split: Split = Split.TOKENS
    module: str = ""
    wide: bool = False

    @property
    def saved_bytes(self) -> float:
        """Bytes kept for backward, on one device without any split."""
        return sum(tensor.num_bytes for tensor in self.saved)

    @property
    def num_parameters(self) -> int:
        """Weights owned; shared ones count where they are first owned."""
        return sum(p.elements for p in self.parameters if p.shared_with is None)


@dataclass(frozen=True)
class OpGraph:
    """Operations in order of execution and the data that flows between them.

    Attributes:
        name: the model's name.
        ops: in the order of the forward pass.
        edges: (producer, consumer) pairs of operation names.
        num_blocks: repeated blocks.
        batch_size: sequences that the numbers are for.
        seq_len: tokens per sequence.
        itemsize: bytes of one activation element.
    """

    name: str
    ops: tuple[Op, ...]
    edges: tuple[tuple[str, str], ...]
    num_blocks: int
    batch_size: int
    seq_len: int
    itemsize: int

    def __hash__(self) -> int:
        """Of its numbers alone: a graph has thousands of operations, and is a key of what is derived from it."""
        return hash((self.name, self.num_blocks, self.batch_size, self.seq_len, self.itemsize, len(self.ops)))

    def digraph(self) -> nx.DiGraph[str]:
        """The graph in networkx, each node with its ``op``."""
        import networkx as nx  # half a second that planning does not need

        graph: nx.DiGraph[str] = nx.DiGraph(name=self.name)
        for op in self.ops:
            graph.add_node(op.name, op=op)
        graph.add_edges_from(self.edges)
        return graph

    def block_ops(self, block: int) -> tuple[Op, ...]:
        """Operations of one block; -1 and ``num_blocks`` are the ends of the model."""
        return tuple(op for op in self.ops if op.block == block)

    @cached_property
    def boundary_bytes(self) -> int:
        """Bytes of the activation between two blocks."""
        return next((op.output_bytes for op in reversed(self.block_ops(0))), 0)

    def parameters(self) -> Iterator[Parameter]:
        """Every weight once: shared ones are left out."""
        for op in self.ops:
            yield from (p for p in op.parameters if p.shared_with is None)

    @property
    def num_parameters(self) -> int:
        """Weights of the model."""
        return sum(parameter.elements for parameter in self.parameters())

    @property
    def active_parameters(self) -> int:
        """Weights that one token meets: of the experts only those that it is sent to."""
        total = 0
        for op in self.ops:
            if isinstance(op.shape, MatmulShape) and op.kind is OpKind.GROUPED_MATMUL:
                rows_per_expert = self.batch_size * self.seq_len * op.shape.groups
                total += op.num_parameters * op.shape.m // rows_per_expert
            else:
                total += op.num_parameters
        return total

    @cached_property
    def _grouped(self) -> MatmulShape | None:
        shapes = (op.shape for op in self.ops if op.split is Split.EXPERT_ROW)
        return next((shape for shape in shapes if isinstance(shape, MatmulShape)), None)

    @cached_property
    def num_experts(self) -> int:
        """Routed experts of a mixture-of-experts block; 0 without any."""
        return self._grouped.groups if self._grouped else 0

    @cached_property
    def expert_width(self) -> int:
        """Inner width of a routed expert; 0 without any."""
        return self._grouped.k if self._grouped else 0

    @cached_property
    def top_k(self) -> int:
        """Experts that a token is sent to; 0 without any."""
        return self._grouped.m // (self.batch_size * self.seq_len) if self._grouped else 0

    @cached_property
    def attention(self) -> AttentionShape | None:
        """Shape of the first attention, None for a model without any."""
        return next((op.shape for op in self.ops if isinstance(op.shape, AttentionShape)), None)

    @cached_property
    def stream_start(self) -> str | None:
        """Name of the operation whose result enters the first block."""
        before = [op for op in self.ops if op.block == -1]
        return before[-1].name if before else None

    @cached_property
    def _model_flops(self) -> tuple[int, int]:
        return sum(op.forward_flops for op in self.ops), sum(op.backward_flops for op in self.ops)

    def model_flops(self) -> tuple[int, int]:
        """FLOPs of forward and backward of one batch, without recomputation and with the whole mask."""
        return self._model_flops


def check_graph(graph: OpGraph) -> None:
    """Assert what every later step relies on: unique names, no cycle, edges in order, blocks without gaps."""
    order = {op.name: i for i, op in enumerate(graph.ops)}
    assert len(order) == len(graph.ops), "operation names are unique"
    for producer, consumer in graph.edges:
        assert order[producer] < order[consumer], f"edge {producer} -> {consumer} goes backwards"
    blocks = [op.block for op in graph.ops]
    assert blocks == sorted(blocks), "operations are ordered by block"
    assert set(blocks) - {-1, graph.num_blocks} == set(range(graph.num_blocks)), "every block has operations"
    names = [parameter.name for parameter in graph.parameters()]
    assert len(names) == len(set(names)), "every parameter is owned once"
