"""Put the operations of a trace together into an OpGraph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import takewhile

from autopar.graph import MatmulShape, Op, OpGraph, OpKind, Parameter, SavedTensor, Split, check_graph
from autopar.model.capture.blocks import block_indices
from autopar.model.capture.group import Group, group_calls
from autopar.model.capture.ops import LOG_SOFTMAX, kept_name, kind_of, parameters_of, shape_of, traffic, workspace_bytes
from autopar.model.capture.records import Trace
from autopar.model.capture.splits import Division, divide, planned_styles
from autopar.model.tags import with_makers, with_modules


def assemble(
    trace: Trace,
    *,
    name: str,
    blocks: tuple[str, ...],
    plan: Mapping[str, str] | None,
    batch_size: int,
    seq_len: int,
) -> OpGraph:
    """Build the graph of a trace.

    Args:
        trace: of the whole model.
        name: of the graph.
        blocks: paths of the repeated blocks.
        plan: tensor parallel plan, see ``splits``.
        batch_size, seq_len: of the traced inputs.

    Raises:
        InputError: the plan names what is no product.
    """
    groups = group_calls(trace, name)
    kinds = {group.name: kind_of(group, trace.leaves.get(group.module, "")) for group in groups}
    shapes = {group.name: shape_of(group, kinds[group.name]) for group in groups}
    products = [g.module for g in groups if kinds[g.name] is OpKind.MATMUL and g.module in trace.leaves]
    styles = planned_styles(plan or {}, products, trace.leaves)
    vocabulary = _vocabulary(groups, kinds, shapes, trace) if plan else frozenset()
    indices, num_blocks = block_indices([group.module if group.in_model else None for group in groups], blocks)
    owned: dict[int, str] = {}
    divisions: dict[str, Division] = {}
    ops: list[Op] = []
    for group, block in zip(groups, indices, strict=True):
        kind, shape = kinds[group.name], shapes[group.name]
        reads = {use.storage for use in group.reads}
        division = divisions[group.name] = divide(
            kind,
            styles.get(group.module) if kind is OpKind.MATMUL else None,
            vocabulary=group.name in vocabulary,
            has_parameters=not reads.isdisjoint(trace.parameters),
            inputs=[divisions[producer.name].output for producer in group.producers],
        )
        before = set(owned)
        parameters = parameters_of(group, trace, owned, division.parameters)
        forward_bytes, backward_bytes = traffic(group, kind, trace.parameters)
        if backward_bytes:
            backward_bytes += sum(trace.accumulated.get(storage, 0) for storage in set(owned) - before)
        ops.append(
            Op(
                name=group.name,
                kind=kind,
                block=block,
                split=division.op,
                shape=shape,
                forward_flops=sum(kernel.flops for kernel in group.forward),
                backward_flops=sum(kernel.flops for kernel in group.backward),
                forward_bytes=forward_bytes,
                backward_bytes=backward_bytes,
                parameters=parameters,
                saved=_kept(group, kind, division),
                output_bytes=group.output_bytes,
                output_split=division.output,
            )
        )
    _adopt_unread(ops, trace, owned)
    if num_blocks == len(blocks):
        ops = _fill_empty_blocks(ops, blocks)
    edges = tuple((producer.name, group.name) for group in groups for producer in group.producers)
    ops = with_makers(with_modules(ops, edges, num_blocks), edges)
    graph = OpGraph(
        name=name,
        ops=tuple(ops),
        edges=edges,
        num_blocks=num_blocks,
        batch_size=batch_size,
        seq_len=seq_len,
        itemsize=trace.itemsize,
    )
    check_graph(graph)
    return graph


def _vocabulary(
    groups: list[Group], kinds: Mapping[str, OpKind], shapes: Mapping[str, object], trace: Trace
) -> frozenset[str]:
    """Operations over the vocabulary: a cross entropy, the product that it reads, and the embedding of the inputs
    that has a row for each of its columns."""
    found: set[str] = set()
    for loss in groups:
        if kinds[loss.name] is not OpKind.LOSS or not any(k.name == LOG_SOFTMAX for k in loss.forward):
            continue
        for head in loss.producers:
            shape = shapes[head.name]
            if not isinstance(shape, MatmulShape):
                continue
            found |= {loss.name, head.name}
            for group in groups:
                rows = {
                    trace.parameters[use.storage].shape[0] for use in group.reads if use.storage in trace.parameters
                }
                takes_input = any(use.storage in trace.inputs for use in group.reads)
                if kinds[group.name] is OpKind.EMBEDDING and takes_input and shape.n in rows:
                    found.add(group.name)
    return frozenset(found)


def _kept(group: Group, kind: OpKind, division: Division) -> tuple[SavedTensor, ...]:
    """Kept tensors, those of one role and split as one."""
    sizes: dict[tuple[str, Split], int] = {}
    roles = sorted(((kept_name(group, kind, s), s) for s in group.saved), key=lambda pair: pair[0] == "logsumexp")
    if any(saved.num_bytes == 0 for _, saved in roles):
        sizes[f"{group.name}.workspace", division.output] = workspace_bytes(group)
    for role, saved in roles:
        if role == "target" or not saved.floating:
            split = Split.NONE
        elif role == "output":
            split = division.output
        else:
            split = division.kept_input
        key = (f"{group.name}.{role}", split)
        sizes[key] = sizes.get(key, 0) + saved.num_bytes
    return tuple(SavedTensor(name=name, num_bytes=size, split=split) for (name, split), size in sizes.items() if size)


def _adopt_unread(ops: list[Op], trace: Trace, owned: Mapping[int, str]) -> None:
    """Give parameters that no operation reads to the operation that shares the longest path with them."""
    for storage, parameter in trace.parameters.items():
        if storage in owned or not ops:
            continue
        path = parameter.names[0].split(".")
        index = max(range(len(ops)), key=lambda i: _common_prefix(path, ops[i].name.split(".")))
        orphan = Parameter(name=parameter.names[0], elements=math.prod(parameter.shape), split=Split.NONE)
        ops[index] = dataclasses.replace(ops[index], parameters=(*ops[index].parameters, orphan))


def _common_prefix(left: list[str], right: list[str]) -> int:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return sum(1 for _ in same)


def _fill_empty_blocks(ops: list[Op], blocks: tuple[str, ...]) -> list[Op]:
    """Blocks that only reshape are operations without cost: a pipeline can still be cut between them."""
    present = {op.block for op in ops}
    empty = [
        Op(name=path, kind=OpKind.ELEMENTWISE, block=index, split=Split.TOKENS)
        for index, path in enumerate(blocks)
        if index not in present
    ]
    return sorted([*ops, *empty], key=lambda op: op.block)
