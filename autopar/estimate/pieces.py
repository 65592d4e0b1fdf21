"""Prices of the distinct pieces of a model: each unlike block, what comes before and what comes after.

A piece is priced once for every distinct combination of (tp, cp, sp, microbatch), from its operations; plans then
only add pieces up. Quantities are per microbatch on one rank of a pipeline stage that holds the piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.arrays import Ints, PlanArrays
from autopar.estimate.setting import Setting
from autopar.graph import AttentionShape, Op, OpGraph, OpKind, Split
from autopar.shard import (
    Collective,
    Degrees,
    activation_share,
    batch_scale,
    boundary_bytes,
    context_collectives,
    kept_bytes,
    local_matmul,
    local_parameters,
    owned_parameters,
    parameter_share,
    tensor_collectives,
)
from costmodels.collectives import collective_seconds
from costmodels.compute import attention_seconds, matmul_seconds, stream_seconds

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Section:
    """Operations of one unlike block with the blocks that are like it; -1 and num_blocks are the model's ends."""

    ops: tuple[Op, ...]
    blocks: tuple[int, ...]

    def is_block(self, graph: OpGraph) -> bool:
        """Whether this is a repeated block, which recomputation may cover."""
        return 0 <= self.blocks[0] < graph.num_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Quantities of sections, arrays [combinations, sections]. Seconds, bytes, or elements.

    Attributes:
        forward, backward: seconds of compute.
        attention_forward: the part of ``forward`` in attention.
        tensor_forward, tensor_backward: seconds of tensor parallel communication.
        context_forward, context_backward: seconds of context parallel communication.
        kept, kept_selective, kept_full: bytes kept for backward without recomputation, with attention recomputed, and
            with the whole block recomputed.
        working: bytes of the largest operation's temporary results in backward.
        working_adding: the same with the gradients of its own weights, before they are added to those of earlier
            microbatches.
        parameters: weights on a tensor parallel rank.
        shared: weights that an earlier section owns and this one uses.
        largest: elements of the largest weight on a tensor parallel rank.
        num_parameters: separate weights.
    """

    forward: Floats
    backward: Floats
    attention_forward: Floats
    tensor_forward: Floats
    tensor_backward: Floats
    context_forward: Floats
    context_backward: Floats
    kept: Floats
    kept_selective: Floats
    kept_full: Floats
    working: Floats
    working_adding: Floats
    parameters: Floats
    shared: Floats
    largest: Floats
    num_parameters: Floats


def sections(graph: OpGraph) -> tuple[Section, ...]:
    """Group equal blocks. Two blocks are equal if their operations are, names aside."""
    by_block: dict[int, list[Op]] = {}
    for op in graph.ops:
        by_block.setdefault(op.block, []).append(op)
    classes: dict[Any, tuple[tuple[Op, ...], list[int]]] = {}
    for block, ops in by_block.items():
        is_block = 0 <= block < graph.num_blocks
        key = ("block" if is_block else block, tuple(_signature(op) for op in ops))
        classes.setdefault(key, (tuple(ops), []))[1].append(block)
    return tuple(Section(ops, tuple(blocks)) for ops, blocks in classes.values())


def _signature(op: Op) -> tuple[Any, ...]:
    return (
        op.kind, op.split, op.shape, op.forward_flops, op.backward_flops, op.forward_bytes, op.backward_bytes,
        op.output_bytes, tuple((p.elements, p.split, p.shared_with) for p in op.parameters),
        tuple((t.num_bytes, t.split) for t in op.saved),
    )  # fmt: skip


def combinations(plans: PlanArrays) -> tuple[Degrees, Ints]:
    """Distinct (tp, cp, sp, microbatch) and, for every plan, the index of its own."""
    columns = np.stack([plans.tp, plans.cp, plans.sp.astype(np.int64), plans.microbatch], axis=1)
    distinct, inverse = np.unique(columns, axis=0, return_inverse=True)
    tp, cp, sp, microbatch = distinct.T
    return Degrees(tp=tp, cp=cp, sp=sp.astype(np.bool_), microbatch=microbatch), inverse.reshape(-1)


def price(setting: Setting, degrees: Degrees, parts: Sequence[Section]) -> Prices:
    """Price every section under every combination."""
    columns = [_price_section(setting, degrees, part) for part in parts]
    return Prices(**{f.name: np.stack([column[f.name] for column in columns], axis=1) for f in fields(Prices)})


def _price_section(setting: Setting, degrees: Degrees, part: Section) -> dict[str, Floats]:
    graph, stack = setting.graph, setting.stack
    zeros = np.zeros(len(degrees.tp))
    row: dict[str, Any] = {field.name: zeros.copy() for field in fields(Prices)}
    for op in part.ops:
        forward, backward = op_seconds(op, setting, degrees)
        row["forward"] += forward
        row["backward"] += backward
        if op.kind is OpKind.ATTENTION:
            row["attention_forward"] += forward
        temporary = working_bytes(op, setting, degrees)
        own = setting.gradient_bytes * local_parameters([op], degrees, stack)
        row["working"] = np.maximum(row["working"], temporary)
        row["working_adding"] = np.maximum(row["working_adding"], temporary + own)
    for collective in tensor_collectives(part.ops, graph, degrees, stack):
        row[f"tensor_{collective.phase}"] += _seconds(setting, collective, degrees.tp, 1) * stack.tensor_exposed
    for collective in context_collectives(part.ops, graph, degrees):
        row[f"context_{collective.phase}"] += _seconds(setting, collective, degrees.cp, degrees.tp)
    saved = [tensor for op in part.ops for tensor in op.saved]
    row["kept"] += kept_bytes(saved, graph, degrees, stack)
    if part.is_block(graph):
        attention = [tensor for op in part.ops if op.kind is OpKind.ATTENTION for tensor in op.saved]
        recomputed = [tensor for tensor in attention if tensor.name.endswith("logsumexp")]
        row["kept_selective"] = row["kept"] - kept_bytes(recomputed, graph, degrees, stack)
        row["kept_full"] = boundary_bytes(graph, degrees, stack)
    else:
        row["kept_selective"] = row["kept_full"] = row["kept"]
    row["parameters"] += local_parameters(part.ops, degrees, stack)
    for parameter in (p for op in part.ops for p in op.parameters if p.shared_with is not None):
        row["shared"] += parameter.elements * parameter_share(parameter.split, degrees, stack)
    for parameter in owned_parameters(part.ops):
        local = parameter.elements * parameter_share(parameter.split, degrees, stack)
        row["largest"] = np.maximum(row["largest"], local)
        row["num_parameters"] += 1.0
    return row


def op_seconds(op: Op, setting: Setting, degrees: Degrees) -> tuple[Any, Any]:
    """Seconds of an operation's forward and backward on one rank."""
    device, precision, stack = setting.cluster.device, setting.workload.precision.value, setting.stack
    if op.kind is OpKind.MATMUL and op.shape is not None:
        m, n, k = local_matmul(op, setting.graph, degrees, stack)
        divided = (np.asarray(degrees.tp) > 1) & (op.split in (Split.COLUMN, Split.ROW))
        calls = stack.overheads
        forward = matmul_seconds(device, precision, m, n, k)
        backward = matmul_seconds(device, precision, m, n, k, backward=True)
        return (
            forward + divided * calls.get("tensor_parallel.linear.forward", 0.0),
            backward + divided * calls.get("tensor_parallel.linear.backward", 0.0),
        )
    if isinstance(op.shape, AttentionShape):
        shape, cp = op.shape, np.asarray(degrees.cp, dtype=float)
        arguments: dict[str, Any] = {
            "batch": shape.batch * batch_scale(setting.graph, degrees),
            "heads": shape.num_heads / np.asarray(degrees.tp, dtype=float),
            "query_len": shape.query_len / cp,
            "key_len": shape.key_len,
            "head_size": shape.head_size,
            "causal": shape.causal,
        }
        return (
            attention_seconds(device, precision, **arguments),
            attention_seconds(device, precision, **arguments, backward=True),
        )
    share = activation_share(op.split, degrees, stack) * batch_scale(setting.graph, degrees)
    forward = stream_seconds(device, op.forward_bytes * share, op.kind.value)
    backward = stream_seconds(device, op.backward_bytes * share, op.kind.value, backward=True)
    return forward, backward if op.backward_bytes else 0.0 * backward


def working_bytes(op: Op, setting: Setting, degrees: Degrees) -> Any:
    """Temporary bytes of an operation's backward: the gradients of its result and of what it keeps.

    The loss holds ``loss_copies`` tensors of the size of the logits beside what forward kept. A row product's result is
    reduced out of place; along the sequence its parts are gathered and joined (``sequence_copies``).
    """
    share = activation_share(op.output_split, degrees, setting.stack) * batch_scale(setting.graph, degrees)
    if op.kind is OpKind.LOSS:
        logits = max((tensor.num_bytes for tensor in op.saved), default=0)
        share = activation_share(op.split, degrees, setting.stack) * batch_scale(setting.graph, degrees)
        return logits * setting.stack.loss_copies * share
    gradients = kept_bytes(
        [tensor for tensor in op.saved if not tensor.name.endswith(("statistics", "logsumexp"))],
        setting.graph, degrees, setting.stack,
    )  # fmt: skip
    whole = op.output_bytes * batch_scale(setting.graph, degrees) / np.asarray(degrees.cp, dtype=float)
    divided = (np.asarray(degrees.tp) > 1) & (op.split is Split.ROW)
    return (
        op.output_bytes * share + gradients + whole * divided * np.where(degrees.sp, setting.stack.sequence_copies, 1)
    )


def _seconds(setting: Setting, collective: Collective, ranks: Any, stride: Any) -> Any:
    """Seconds of all calls of a collective; ``num_bytes`` is the sum over the calls."""
    calls = np.asarray(collective.count, dtype=float)
    each = np.asarray(collective.num_bytes, dtype=float) / np.maximum(calls, 1.0)
    seconds = collective_seconds(setting.cluster, collective.kind, ranks, stride, each, setting.stack.algorithms)
    return np.where(calls > 0, calls * (seconds + setting.collective_wait), 0.0)
