"""What of the graph each rank computes, keeps and sends under a layout.

Every function takes degrees as numbers or as arrays (one entry per candidate layout) and broadcasts, so that one
plan and a million are priced by the same lines. Symbols as in ``model.build``; t = tp, c = cp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.graph import MatmulShape, Op, OpGraph, OpKind, Parameter, SavedTensor, Split
from costmodels.stack import Stack

EXPERT_SPLITS = (Split.EXPERT_COLUMN, Split.EXPERT_ROW)
"""Weights that belong to experts."""
VOCAB_MULTIPLE = 128
"""Of the rows of a rank's part of a padded embedding: Megatron-LM's ``make_vocab_size_divisible_by``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """Everything that the cost of a stage's pieces depends on, as equally long arrays (or numbers).

    Attributes:
        tp, cp: degrees.
        sp: whether sequence parallelism is on.
        microbatch: sequences per pass.
        ep, etp: degrees of experts.
        tp_stride, cp_stride: distance in ranks between neighbours along tp and cp.
    """

    tp: Any
    cp: Any
    sp: Any
    microbatch: Any
    ep: Any = 1
    etp: Any = 1
    tp_stride: Any = 1
    cp_stride: Any = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Communication that an operation causes on one rank, per microbatch or per step.

    Attributes:
        kind: as in costmodels.collectives.
        axis: mesh axis of the group.
        phase: forward, backward or step.
        num_bytes: whole tensor, as CountedCollective counts it.
        count: calls.
        source: operation that needs it.
    """

    kind: str
    axis: str
    phase: str
    num_bytes: Any
    count: Any
    source: str


def activation_share(split: Split, degrees: Degrees, stack: Stack) -> Any:
    """Part of an activation that is on one rank: 1/(c t) inside a column-row pair, 1/c or 1/(c t) between pairs.

    Rows on their way to experts are divided over the tensor parallel ranks, but for those that share an expert.
    """
    tp, cp = np.asarray(degrees.tp, dtype=float), np.asarray(degrees.cp, dtype=float)
    sequence_divides = np.where(np.asarray(degrees.sp), tp, 1.0)
    divisor: Any
    match split:
        case Split.FEATURES | Split.COLUMN | Split.EXPERT_FEATURES:
            divisor = tp
        case Split.EXPERT_TOKENS | Split.EXPERT_COLUMN | Split.EXPERT_ROW:
            divisor = tp / np.asarray(degrees.etp, dtype=float)
        case Split.TOKENS | Split.ROW:
            divisor = sequence_divides
        case Split.GATHERED:
            divisor = 1.0 if stack.tensor.keeps_gathered else sequence_divides
        case Split.VOCAB:
            divisor = tp if stack.tensor.vocab_parallel else 1.0
        case Split.NONE:
            divisor = 1.0
    return 1.0 / (cp * divisor)


def parameter_share(split: Split, degrees: Degrees, stack: Stack) -> Any:
    """Part of a weight that is on one rank of a stage's tensor parallel group; of experts, of an expert's group."""
    tp = np.asarray(degrees.tp, dtype=float)
    if split in EXPERT_SPLITS:
        return 1.0 / (np.asarray(degrees.ep, dtype=float) * np.asarray(degrees.etp, dtype=float)) * np.ones_like(tp)
    divided = split in (Split.COLUMN, Split.ROW) or (split is Split.VOCAB and stack.tensor.vocab_parallel)
    return 1.0 / tp if divided else np.ones_like(tp)


def batch_scale(graph: OpGraph, degrees: Degrees) -> Any:
    """Factor from the graph's batch to the microbatch."""
    return np.asarray(degrees.microbatch, dtype=float) / graph.batch_size


def local_matmul(op: Op, graph: OpGraph, degrees: Degrees, stack: Stack) -> tuple[Any, Any, Any]:
    """(m, n, k) of a product on one rank: m shrinks with the context, n or k with tensor parallelism.

    Products of replicated weights work on a rank's part of the sequence. A stack may pad the head's rows.
    """
    assert isinstance(op.shape, MatmulShape)
    tp = np.asarray(degrees.tp, dtype=float)
    m = op.shape.m * batch_scale(graph, degrees) / np.asarray(degrees.cp, dtype=float)
    n, k = op.shape.n * np.ones_like(tp), op.shape.k * np.ones_like(tp)
    if op.split is Split.COLUMN or (op.split is Split.VOCAB and stack.tensor.vocab_parallel):
        n = n / tp
    elif op.split is Split.ROW:
        k = k / tp
    elif op.split is Split.TOKENS:
        m = m / np.where(np.asarray(degrees.sp), tp, 1.0)
    if op.split is Split.VOCAB and stack.tensor.pads_vocab:
        n = np.ceil(n / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return m, n, k


def local_grouped_matmul(op: Op, graph: OpGraph, degrees: Degrees) -> tuple[Any, Any, Any, Any]:
    """(m, n, k, groups) of experts' products on one rank, tokens spread evenly over the experts."""
    assert isinstance(op.shape, MatmulShape)
    ep, etp = np.asarray(degrees.ep, dtype=float), np.asarray(degrees.etp, dtype=float)
    share = etp / (np.asarray(degrees.tp, dtype=float) * np.asarray(degrees.cp, dtype=float))
    m = op.shape.m * batch_scale(graph, degrees) * share
    n, k = op.shape.n * np.ones_like(m), op.shape.k * np.ones_like(m)
    if op.split is Split.EXPERT_COLUMN:
        n = n / etp
    else:
        k = k / etp
    return m, n, k, op.shape.groups / ep


def local_parameters(ops: Iterable[Op], degrees: Degrees, stack: Stack) -> Any:
    """Weights of these operations on one tensor parallel rank; shared ones are not counted."""
    total: Any = np.zeros_like(np.asarray(degrees.tp, dtype=float))
    for parameter in owned_parameters(ops):
        total = total + parameter.elements * parameter_share(parameter.split, degrees, stack)
    return total


def owned_parameters(ops: Iterable[Op]) -> list[Parameter]:
    """Parameters of these operations that are not shared with an earlier one."""
    return [parameter for op in ops for parameter in op.parameters if parameter.shared_with is None]


def kept_bytes(tensors: Iterable[SavedTensor], graph: OpGraph, degrees: Degrees, stack: Stack) -> Any:
    """Bytes that one rank keeps of these tensors for one microbatch."""
    total: Any = np.zeros_like(np.asarray(degrees.tp, dtype=float))
    for tensor in tensors:
        total = total + tensor.num_bytes * activation_share(tensor.split, degrees, stack)
    return total * batch_scale(graph, degrees)


def boundary_bytes(graph: OpGraph, degrees: Any, stack: Stack) -> Any:
    """Bytes of the activation between two blocks on one rank: what pipeline neighbours send."""
    return graph.boundary_bytes * activation_share(Split.TOKENS, degrees, stack) * batch_scale(graph, degrees)


def tensor_collectives(ops: Iterable[Op], graph: OpGraph, degrees: Degrees, stack: Stack) -> list[Collective]:
    """Tensor parallel communication of these operations for one microbatch. Source: Korthikanti et al. 2022, section 4.

    A column-row pair needs its input gathered and its output reduced. Without sequence parallelism: an all_reduce of
    the output in forward and one of the input's gradient in backward. With it: all_gather and reduce_scatter in
    forward, and the same for the gradients in backward; a stack that keeps only the shard of the gathered input
    gathers it again.
    """
    tp, sp = np.asarray(degrees.tp, dtype=float), np.asarray(degrees.sp)
    plain, sequence = (tp > 1) & ~sp, (tp > 1) & sp
    scale = batch_scale(graph, degrees) / np.asarray(degrees.cp, dtype=float)
    found: list[Collective] = []

    def add(kind: str, phase: str, num_bytes: Any, when: Any, source: str) -> None:
        found.append(
            Collective(
                kind=kind, axis="tp", phase=phase, num_bytes=num_bytes * scale * when, count=when * 1.0, source=source
            )
        )

    for op in ops:
        vocabulary = op.split is Split.VOCAB and stack.tensor.vocab_parallel
        for tensor in op.saved:
            if tensor.split is not Split.GATHERED or not (op.split is Split.COLUMN or op.split is Split.VOCAB):
                continue
            # Replicated heads still take a gathered input under sequence parallelism, but add up no gradients.
            divided = op.split is Split.COLUMN or vocabulary
            add("all_gather", "forward", tensor.num_bytes, sequence, op.name)
            if divided:
                add("all_reduce", "backward", tensor.num_bytes, plain, op.name)
                add("reduce_scatter", "backward", tensor.num_bytes, sequence, op.name)
                if not stack.tensor.keeps_gathered:
                    add("all_gather", "backward", tensor.num_bytes, sequence, op.name)
        if op.split is Split.ROW:
            add("all_reduce", "forward", op.output_bytes, plain, op.name)
            add("reduce_scatter", "forward", op.output_bytes, sequence, op.name)
            add("all_gather", "backward", op.output_bytes, sequence, op.name)
        if op.kind is OpKind.EMBEDDING and vocabulary:
            add("all_reduce", "forward", op.output_bytes, plain, op.name)
            add("reduce_scatter", "forward", op.output_bytes, sequence, op.name)
            add("all_gather", "backward", op.output_bytes, sequence, op.name)
        elif not stack.tensor.vocab_parallel and op.name == graph.stream_start:
            # Replicated embeddings: every rank keeps its part of the sequence, and backward gathers the gradients.
            add("all_gather", "backward", op.output_bytes, sequence, op.name)
    return found


def context_collectives(ops: Iterable[Op], graph: OpGraph, degrees: Degrees) -> list[Collective]:
    """Context parallel communication: keys and values gathered in forward and again in backward, gradients reduced.

    Source: Llama 3 (2024), section 3.3.2 (all-gather based). Bytes are of the whole sequence's keys and values that a
    tensor parallel rank holds.
    """
    cp, tp = np.asarray(degrees.cp, dtype=float), np.asarray(degrees.tp, dtype=float)
    found = []
    for op in ops:
        if op.kind is not OpKind.ATTENTION or op.shape is None or isinstance(op.shape, MatmulShape):
            continue
        shape = op.shape
        width = shape.head_size + (shape.value_size or shape.head_size)
        size = shape.batch * shape.key_len * shape.num_kv_heads * width * graph.itemsize
        local = size / tp * batch_scale(graph, degrees) * (cp > 1)
        for kind, phase in (("all_gather", "forward"), ("all_gather", "backward"), ("reduce_scatter", "backward")):
            found.append(
                Collective(kind=kind, axis="cp", phase=phase, num_bytes=local, count=(cp > 1) * 1.0, source=op.name)
            )
    return found


def expert_collectives(ops: Iterable[Op], graph: OpGraph, degrees: Degrees) -> list[Collective]:
    """Exchange of tokens with experts: an all_to_all there and one back, in forward and for the gradients in backward.

    Bytes are those that one rank hands over: its tokens, top_k times. Ranks that share an expert gather what they
    receive and scatter what they return. Source: Lepikhin et al. 2020 (GShard); Megatron-Core's token dispatchers.
    """
    ep, etp = np.asarray(degrees.ep, dtype=float), np.asarray(degrees.etp, dtype=float)
    own = batch_scale(graph, degrees) / (np.asarray(degrees.tp, dtype=float) * np.asarray(degrees.cp, dtype=float))
    found: list[Collective] = []

    def add(kind: str, axis: str, phase: str, size: Any, when: Any, source: str) -> None:
        found.append(
            Collective(
                kind=kind, axis=axis, phase=phase, num_bytes=size * when, count=when * np.ones_like(ep), source=source
            )
        )

    for op in ops:
        if op.kind is not OpKind.GROUPED_MATMUL or not isinstance(op.shape, MatmulShape):
            continue
        there = op.split is Split.EXPERT_COLUMN and any(t.split is Split.EXPERT_TOKENS for t in op.saved)
        back = op.split is Split.EXPERT_ROW
        if not there and not back:
            continue
        rows = op.shape.m * (op.shape.n if back else op.shape.k) * graph.itemsize * own
        for phase in ("forward", "backward"):
            add("all_to_all", "ep", phase, rows, ep > 1, op.name)
            gathers = there == (phase == "forward")
            add("all_gather" if gathers else "reduce_scatter", "etp", phase, rows * etp, etp > 1, op.name)
    return found
