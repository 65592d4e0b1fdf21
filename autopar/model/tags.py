"""Recompute modules: which part of a block an operation belongs to, and which kept tensors recomputing it would free.

The vocabulary is ``autopar.graph.RECOMPUTE_MODULES``. Built graphs name the modules of their operations; for captured
ones they follow from the structure (``with_modules``). What made a kept tensor follows from its role, the last part of
its name (``with_makers``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from autopar.graph import Op, OpKind, SavedTensor, Split

# Tensors that come from the operations before.
TAKEN = ("input", "qkv")
# The result is also the input of the next operation, which keeps it whatever is recomputed here.
STAYS = ("output", "workspace", "target")


def with_modules(ops: Sequence[Op], edges: Collection[tuple[str, str]], num_blocks: int) -> list[Op]:
    """Name the modules of operations inside blocks: attention, norms of the stream, and products around activations."""
    producers, consumers = _neighbours(ops, edges)
    found: dict[str, str] = {}
    for op in ops:
        if not 0 <= op.block < num_blocks:
            continue
        if op.kind is OpKind.ATTENTION:
            found[op.name] = "core_attn"
        elif op.kind is OpKind.NORMALIZATION and op.split is Split.TOKENS:
            found[op.name] = "layernorm"
        elif op.kind is OpKind.ACTIVATION:
            around = [*producers[op.name], *consumers[op.name]]
            if around and all(neighbour.kind is OpKind.MATMUL for neighbour in around):
                found |= {name: "mlp" for name in (op.name, *(neighbour.name for neighbour in around))}
    return [dataclasses.replace(op, module=found.get(op.name, "")) for op in ops]


def with_makers(ops: Sequence[Op], edges: Collection[tuple[str, str]]) -> list[Op]:
    """Name the module that made each kept tensor, where recomputing that module would free it."""
    producers, _ = _neighbours(ops, edges)

    def maker(op: Op, tensor: SavedTensor) -> str:
        role = tensor.name.rpartition(".")[2]
        if role in STAYS:
            return ""
        modules = {producer.module for producer in producers[op.name]} if role in TAKEN else {op.module}
        return modules.pop() if len(modules) == 1 else ""

    return [
        dataclasses.replace(op, saved=tuple(dataclasses.replace(t, made_by=maker(op, t)) for t in op.saved))
        for op in ops
    ]


def _neighbours(
    ops: Sequence[Op], edges: Collection[tuple[str, str]]
) -> tuple[Mapping[str, list[Op]], Mapping[str, list[Op]]]:
    by_name = {op.name: op for op in ops}
    producers: dict[str, list[Op]] = {op.name: [] for op in ops}
    consumers: dict[str, list[Op]] = {op.name: [] for op in ops}
    for producer, consumer in edges:
        producers[consumer].append(by_name[producer])
        consumers[producer].append(by_name[consumer])
    return producers, consumers
