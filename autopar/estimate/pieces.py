"""Prices of the distinct pieces of a model: each unlike block, what comes before and what comes after.

A piece is priced once for every distinct combination of (tp, cp, sp, ep, etp, microbatch), from its operations; plans
then only add pieces up. Quantities are per microbatch on one rank of a pipeline stage that holds the piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autopar.estimate.arrays import Bools, Ints, distinct
from autopar.estimate.exchange import collective_calls_seconds, dispatch_seconds, merged
from autopar.estimate.kept import (
    PRODUCTS,
    freed_bytes,
    op_level_kept_bytes,
    saves_product,
    section_kept_bytes,
    waiting_bytes,
    working_bytes,
)
from autopar.estimate.opcosts import UNFUSED, attention_kernel, launches, op_seconds
from autopar.estimate.setting import Setting
from autopar.graph import RECOMPUTE_MODULES, MatmulShape, Op, OpGraph, OpKind, Split
from autopar.shard import (
    EXPERT_SPLITS,
    Degrees,
    boundary_bytes,
    context_collectives,
    expert_collectives,
    local_parameters,
    owned_parameters,
    parameter_share,
    tensor_collectives,
)
from costmodels.stack import Stack

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Section:
    """Operations of one unlike block with the blocks that are like it; -1 and num_blocks are the model's ends.

    ``separate`` are the same operations with their number where several cost alike: equal products once, memory-bound
    operations of one kind as one with the bytes of all. ``fused`` are these with column products of one input as one.
    """

    ops: tuple[Op, ...]
    blocks: tuple[int, ...]
    separate: tuple[tuple[Op, int], ...]
    fused: tuple[tuple[Op, int], ...]

    def priced(self, stack: Stack) -> tuple[tuple[Op, int], ...]:
        """Operations as a stack launches them, with their number."""
        return self.fused if stack.kernels.fused_projections else self.separate

    def is_block(self, graph: OpGraph) -> bool:
        """Whether this is a repeated block, which recomputation may cover."""
        return 0 <= self.blocks[0] < graph.num_blocks

    def is_end(self, graph: OpGraph) -> bool:
        """Whether this comes after the last block: norm, head, loss, and heads for tokens further ahead."""
        return self.blocks[0] >= graph.num_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Quantities of sections, arrays [combinations, sections]; those by module [combinations, sections, modules].

    Seconds, bytes, calls or elements.

    Attributes:
        forward, backward: seconds of compute.
        tensor_forward, tensor_backward: seconds of tensor parallel communication.
        context_forward, context_backward: seconds of context parallel communication.
        expert_forward, expert_backward: seconds of the exchange with experts.
        calls: operations that the host launches in forward.
        again, again_calls: seconds of compute and launches of recomputing a module (RECOMPUTE_MODULES).
        again_full, again_tensor, again_context: seconds of compute and of tensor and context parallel communication of
            recomputing the block, beside what backward has in any case.
        kept, kept_full: bytes kept for backward without recomputation and with the whole block recomputed.
        kept_linear: ``kept`` without the scores of unfused attention.
        kept_loss: bytes that the loss keeps.
        waiting: bytes of gradients that a split backward keeps for those of weights.
        freed: bytes that recomputing a module frees.
        working: bytes of the largest operation's temporary results in backward.
        working_adding: the same with the gradients of its own weights, before they are added to those of earlier
            microbatches.
        parameters: weights on a tensor parallel rank, experts included.
        experts: weights of experts.
        shared: weights that an earlier section owns and this one uses.
        vocabulary: elements of embeddings and heads.
        largest: elements of the largest weight on a tensor parallel rank.
        num_parameters: separate weights.
    """

    forward: Floats
    backward: Floats
    tensor_forward: Floats
    tensor_backward: Floats
    context_forward: Floats
    context_backward: Floats
    expert_forward: Floats
    expert_backward: Floats
    calls: Floats
    again: Floats
    again_calls: Floats
    again_full: Floats
    again_tensor: Floats
    again_context: Floats
    kept: Floats
    kept_linear: Floats
    kept_loss: Floats
    waiting: Floats
    kept_full: Floats
    freed: Floats
    working: Floats
    working_adding: Floats
    parameters: Floats
    experts: Floats
    shared: Floats
    vocabulary: Floats
    largest: Floats
    num_parameters: Floats


BY_MODULE = ("again", "again_calls", "freed")
OP_LEVEL = "op_level"


@lru_cache(maxsize=1024)
def sections(graph: OpGraph) -> tuple[Section, ...]:
    """Group equal blocks. Two blocks are equal if their operations are, names aside."""
    by_block: dict[int, list[Op]] = {}
    producers: dict[str, tuple[str, ...]] = {}
    for op in graph.ops:
        by_block.setdefault(op.block, []).append(op)
    for producer, consumer in graph.edges:
        producers[consumer] = (*producers.get(consumer, ()), producer)
    classes: dict[Any, tuple[tuple[Op, ...], list[int]]] = {}
    for block, ops in by_block.items():
        is_block = 0 <= block < graph.num_blocks
        key = ("block" if is_block else block, tuple(_signature(op) for op in ops))
        classes.setdefault(key, (tuple(ops), []))[1].append(block)
    return tuple(
        Section(ops, tuple(blocks), _merged(ops), _merged(_joined(ops, producers))) for ops, blocks in classes.values()
    )


class HasDegrees(Protocol):
    """What prices of pieces depend on, as arrays: of plans, or of whatever stands for many plans."""

    @property
    def tp(self) -> Ints: ...
    @property
    def cp(self) -> Ints: ...
    @property
    def sp(self) -> Bools: ...
    @property
    def microbatch(self) -> Ints: ...
    @property
    def ep(self) -> Ints: ...
    @property
    def etp(self) -> Ints: ...
    def stride(self, axis: str) -> Ints:
        """Distance in ranks between neighbours along an axis."""


def _joined(ops: Sequence[Op], producers: Mapping[str, tuple[str, ...]]) -> list[Op]:
    """Column products of one input as one product with all their columns: queries, keys and values; gate and up."""
    found: dict[Any, Op] = {}
    for op in ops:
        key: Any = op.name
        if op.kind is OpKind.MATMUL and op.split is Split.COLUMN and isinstance(op.shape, MatmulShape):
            key = (op.shape.m, op.shape.k, op.module, producers.get(op.name))
        first = found.get(key)
        if first is not None:
            assert isinstance(first.shape, MatmulShape) and isinstance(op.shape, MatmulShape)
            op = replace(first, shape=replace(first.shape, n=first.shape.n + op.shape.n))
        found[key] = op
    return list(found.values())


def _merged(ops: Sequence[Op]) -> tuple[tuple[Op, int], ...]:
    groups: dict[Any, tuple[Op, int]] = {}
    for op in ops:
        key = (op.kind, op.split, op.shape, op.module, op.wide, op.backward_bytes > 0)
        first, number = groups.get(key, (None, 0))
        if first is not None:
            op = replace(
                first,
                forward_bytes=first.forward_bytes + op.forward_bytes,
                backward_bytes=first.backward_bytes + op.backward_bytes,
            )
        groups[key] = (op, number + 1)
    return tuple(groups.values())


def _signature(op: Op) -> tuple[Any, ...]:
    return (
        op.kind, op.split, op.shape, op.forward_flops, op.backward_flops, op.forward_bytes, op.backward_bytes,
        op.output_bytes, op.module, op.wide, tuple((p.elements, p.split, p.shared_with) for p in op.parameters),
        tuple((t.num_bytes, t.split, t.made_by) for t in op.saved),
    )  # fmt: skip


def combinations(plans: HasDegrees) -> tuple[Degrees, Ints]:
    """Distinct (tp, cp, sp, microbatch, ep, etp) with strides and, for every plan, the index of its own."""
    columns = {
        "tp": plans.tp, "cp": plans.cp, "sp": plans.sp, "microbatch": plans.microbatch, "ep": plans.ep,
        "etp": plans.etp, "tp_stride": plans.stride("tp"), "cp_stride": plans.stride("cp"),
    }  # fmt: skip
    first, inverse = distinct(*columns.values())
    return Degrees(**{name: column[first] for name, column in columns.items()}), inverse


def price(setting: Setting, degrees: Degrees, parts: Sequence[Section], *, by_module: bool = True) -> Prices:
    """Price every section under every combination; ``by_module`` says whether a plan recomputes selectively.

    Prices of a single combination are kept, since estimates of plans of one setting often share it.
    """
    if np.size(degrees.tp) != 1:
        return _price(setting, degrees, parts, by_module)
    key = tuple(int(np.reshape(getattr(degrees, f.name), -1)[0]) for f in fields(Degrees))
    return _price_one(setting, key, by_module)


@lru_cache(maxsize=1024)
def _price_one(setting: Setting, key: tuple[int, ...], by_module: bool) -> Prices:
    names = [f.name for f in fields(Degrees)]
    columns = {name: np.asarray([value]) for name, value in zip(names, key, strict=True)}
    degrees = Degrees(**{**columns, "sp": columns["sp"].astype(np.bool_)})
    return _price(setting, degrees, sections(setting.graph), by_module)


def _price(setting: Setting, degrees: Degrees, parts: Sequence[Section], by_module: bool) -> Prices:
    columns = [_price_section(setting, degrees, part, by_module) for part in parts]
    return Prices(**{f.name: np.stack([column[f.name] for column in columns], axis=1) for f in fields(Prices)})


def _price_section(setting: Setting, degrees: Degrees, part: Section, by_module: bool) -> dict[str, Floats]:
    graph, stack = setting.graph, setting.stack
    zeros = np.zeros(len(degrees.tp))
    modules = np.zeros((len(degrees.tp), len(RECOMPUTE_MODULES)))
    row: dict[str, Any] = {f.name: (modules if f.name in BY_MODULE else zeros).copy() for f in fields(Prices)}
    last_product: Any = 0.0
    launched: list[tuple[Op, Any, Any]] = []
    for op, number in part.priced(setting.stack):
        forward, backward = op_seconds(op, setting, degrees, number)
        calls = launches(op, setting, degrees) * number
        row["forward"] += forward
        row["backward"] += backward
        row["calls"] += calls
        launched.append((op, forward, calls))
        if op.kind in PRODUCTS:
            last_product = forward / number
        if op.module:
            module = RECOMPUTE_MODULES.index(op.module)
            row["again"][:, module] += forward
            row["again_calls"][:, module] += calls
    row["kept"] += section_kept_bytes(part.ops, setting, degrees)
    row["kept_linear"] = row["kept"]
    if attention_kernel(setting) == UNFUSED:
        row["kept_linear"] = section_kept_bytes(part.ops, setting, degrees, scores=False)
    losses = [op for op in part.ops if op.kind is OpKind.LOSS]
    row["kept_loss"] += section_kept_bytes(losses, setting, degrees)
    row["waiting"] += waiting_bytes(part.ops, setting, degrees)
    if stack.memory.working == "operation":
        for op in part.ops:
            temporary = working_bytes(op, setting, degrees)
            own = setting.gradient_bytes * local_parameters([op], degrees, stack)
            row["working"] = np.maximum(row["working"], temporary)
            row["working_adding"] = np.maximum(row["working_adding"], temporary + own)
    row["vocabulary"] += local_parameters([op for op in part.ops if op.split is Split.VOCAB], degrees, stack)
    _price_communication(row, setting, degrees, part)
    if part.is_block(graph):
        row["kept_full"] += boundary_bytes(graph, degrees, stack)
        if by_module:
            _price_op_level(row, setting, degrees, part, launched)
        early = stack.kernels.recompute_stops_early
        row["again_full"] = row["forward"] - (last_product if early else 0.0)
        row["again_tensor"] = row["tensor_forward"] - _last_reduction(setting, degrees, part)
        # Recomputation is priced with a forward's gather: an engine whose backward then has no other saves one.
        row["again_context"] = row["context_forward"] * float(stack.context.recompute_gathers)
    else:
        row["kept_full"] = row["kept"]
    _count_parameters(row, setting, degrees, part)
    return row


def _last_reduction(setting: Setting, degrees: Degrees, part: Section) -> Any:
    """Seconds of reducing the result of a block's last product, which an engine may leave out of recomputation."""
    rows = [op for op in part.ops if op.split is Split.ROW]
    mixture = any(op.kind is OpKind.GROUPED_MATMUL for op in part.ops)
    rows = [op for op in rows if op.module == "moe"] if mixture else rows
    if setting.stack.tensor.recompute_reduces_last or not rows or not np.any(np.asarray(degrees.tp) > 1):
        return 0.0
    found = tensor_collectives(rows[-1:], setting.graph, degrees, setting.stack)
    seconds = [
        collective_calls_seconds(setting, collective, degrees.tp, degrees.tp_stride)
        for collective in found if collective.phase == "forward"
    ]  # fmt: skip
    return sum(seconds) * setting.stack.tensor.exposed


def _price_op_level(
    row: dict[str, Any], setting: Setting, degrees: Degrees, part: Section, launched: Sequence[tuple[Op, Any, Any]]
) -> None:
    """What recomputing by module frees; and recomputing operation by operation, attention and every second product
    kept (torchtitan's selective checkpoint)."""
    level = RECOMPUTE_MODULES.index(OP_LEVEL)
    for op, forward, calls in launched:
        if op.kind is OpKind.ATTENTION:
            continue
        share = 0.5 if saves_product(op, setting) else 1.0
        row["again"][:, level] += share * forward
        row["again_calls"][:, level] += share * calls
    freed = freed_bytes(part.ops, setting, degrees)
    freed[level] = row["kept"] - op_level_kept_bytes(part.ops, setting, degrees)
    row["freed"] = np.stack(freed, axis=1)


def _price_communication(row: dict[str, Any], setting: Setting, degrees: Degrees, part: Section) -> None:
    graph, stack = setting.graph, setting.stack
    if np.any(np.asarray(degrees.tp) > 1):
        for collective in merged(tensor_collectives(part.ops, graph, degrees, stack)):
            seconds = collective_calls_seconds(setting, collective, degrees.tp, degrees.tp_stride)
            row[f"tensor_{collective.phase}"] += seconds * stack.tensor.exposed
            if collective.phase == "forward":
                row["calls"] += collective.count * stack.host.calls.get("collective", 0.0)
    if np.any(np.asarray(degrees.cp) > 1):
        for collective in context_collectives(part.ops, graph, degrees):
            seconds = collective_calls_seconds(setting, collective, degrees.cp, degrees.cp_stride)
            row[f"context_{collective.phase}"] += seconds * stack.context.exposed
    if np.any(np.asarray(degrees.ep) * np.asarray(degrees.etp) > 1):
        for collective in expert_collectives(part.ops, graph, degrees):
            if collective.axis == "ep":
                seconds = dispatch_seconds(setting, collective, degrees) * stack.experts.exposed
            else:
                if stack.experts.shares == "all_to_all":
                    collective = replace(collective, kind="all_to_all")
                seconds = collective_calls_seconds(setting, collective, degrees.etp, 1)
            row[f"expert_{collective.phase}"] += seconds


def _count_parameters(row: dict[str, Any], setting: Setting, degrees: Degrees, part: Section) -> None:
    owned = {parameter.name for parameter in owned_parameters(part.ops)}
    for parameter in (p for op in part.ops for p in op.parameters):
        local = parameter.elements * parameter_share(parameter.split, degrees, setting.stack)
        if parameter.shared_with is not None and parameter.shared_with not in owned:
            row["shared"] += local
    for parameter in owned_parameters(part.ops):
        local = parameter.elements * parameter_share(parameter.split, degrees, setting.stack)
        row["parameters"] += local
        if parameter.split in EXPERT_SPLITS:
            row["experts"] += local
        row["largest"] = np.maximum(row["largest"], local)
        row["num_parameters"] += 1.0
